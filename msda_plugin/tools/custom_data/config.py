"""The config of a training on custom data: a model, with settings that are derived from the data."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmengine.config import Config, ConfigDict

from msda_plugin.engine.config_walk import walk
from msda_plugin.engine.data_check import bbox_heads
from msda_plugin.engine.messages import counted
from msda_plugin.engine.model_zoo import config_folder
from msda_plugin.engine.nms import set_nms, supports_nms
from msda_plugin.files import atomic_write
from msda_plugin.tools.common.mixed_precision import bfloat16_is_faster, use_mixed_precision
from msda_plugin.tools.custom_data.recipe import (
    BATCH_SIZE,
    LR,
    NARROWEST,
    TRAIN_SAMPLE,
    WEAK_PART,
    Objects,
    Plan,
    Recipe,
    choose_augmentation,
    choose_recipe,
    choose_side,
    load_pipeline,
    train_pipeline,
)

DEFAULT_MODEL = 'rtdetr_r18vd-nano'
KEPT = (
    'model',
    'optim_wrapper',
    'custom_hooks',
    'custom_imports',
    'model_wrapper_cfg',
    'find_unused_parameters',
    'load_from',
)  # entries taken from a complete config; the others belong to its data and schedule
WARM_UP = 150  # optimizer steps
# The learning rate grows with the batch (https://arxiv.org/abs/1706.02677), for Adam and AdamW with its square root
# (https://arxiv.org/abs/2205.10287), up to this factor.
MAX_LR_FACTOR = 4


@dataclass(frozen=True)
class Choices:
    """Options of a training; None: as in the config of the model, or derived from the data."""

    work_dir: str
    epochs: int | None = None
    minutes: float | None = None  # for the training and its validations
    patience: int | None = None  # validations without progress before the training stops
    batch_size: int | None = None
    accumulate: int | None = None
    effective_batch: int | None = None  # instead of accumulate; a multiple of the batch size
    lr: float | None = None
    image_size: tuple[int, int] | None = None  # (width, height), pixels
    augmentation: str | None = None  # one of recipe.AUGMENTATIONS
    workers: int = 2
    seed: int = 0
    load_from: str | None = None
    device: str | None = None
    amp: bool | None = None  # mixed precision


@dataclass(frozen=True)
class Data:
    """The data of a training.

    Attributes:
        files: Split -> annotation file and image folder.
        classes: Class names.
        num_images: Number of training images.
        most_boxes: Maximum number of boxes per training image.
        num_val: Number of validation images.
        objects: Sizes of the training images and their objects.
    """

    files: dict[str, tuple[Path, Path]]
    classes: tuple[str, ...]
    num_images: int
    most_boxes: int
    num_val: int = 1
    objects: Objects = field(default_factory=Objects)

    @property
    def train_sample(self) -> int:
        """Number of training images whose AP is measured, to show overfitting."""
        return min(TRAIN_SAMPLE, self.num_images, self.num_val)


# ---- the config -----------------------------------------------------------------------------------------------------
def build_config(model: Path, data: Data, choices: Choices, plan: Plan | None = None) -> tuple[Config, list[str]]:
    """Build the complete config of a training.

    Args:
        model: Config file of the model; the optimizer of a complete config is used as well.
        data: The training data.
        choices: The user's options. What they leave open is chosen by `choose_recipe`.
        plan: The plan for ``choices.minutes``, which replaces the number of epochs.

    Returns:
        The config, and sentences on the derived settings.

    Raises:
        ValueError: If the model cannot be trained with boxes only.
    """
    source = Config.fromfile(str(model))
    cfg = Config.fromfile(str(config_folder() / '_base_' / 'default_runtime.py'))
    cfg = Config({**cfg.to_dict(), **{key: source[key] for key in KEPT if source.get(key) is not None}})
    complete = source.get('optim_wrapper') is not None
    fine_tuning = complete and choices.load_from is not None
    recipe = choose_recipe(data.num_images, fine_tuning)
    size, chosen = choices.image_size or _image_size(source), []
    if size is None:
        side = choose_side(data.objects)
        size, chosen = (side, side), [f'image size: {side}, chosen from the sizes of images and objects']
    notes = _fit_model(cfg.model, model, data, None if complete else size)
    choices, reduced = _fit_batch(data, _fill(choices, recipe, plan))
    passes = choices.epochs * _epoch_images(data, plan) / data.num_images
    augmentation = choices.augmentation or choose_augmentation(passes, fine_tuning)
    notes = [*reduced, *_set_optimizer(cfg, source, choices), *chosen, *notes]
    augmentation = augmentation if _can_crop(cfg.model, size) else 'weak'
    notes.append(f'augmentation: {augmentation}')
    transforms, mixing = train_pipeline(augmentation, recipe.scales, size)
    _set_data(cfg, data, choices, transforms, bool(mixing), size, plan)
    _set_schedule(cfg, data, choices, plan, mixing)
    cfg.runner_type = 'msda_plugin.DetectionRunner'
    cfg.work_dir = choices.work_dir
    cfg.randomness = dict(seed=choices.seed)
    cfg.launcher = 'none'
    if choices.load_from:
        cfg.load_from = choices.load_from
    if choices.device:
        cfg.device = choices.device
    amp = choices.amp
    if amp is None:  # operators of other models may lack bfloat16
        amp = str(cfg.model.type).startswith('msda_plugin.') and bfloat16_is_faster(choices.device)
    if amp:
        use_mixed_precision(cfg)
        notes.append('precision: mixed; --no-amp switches it off')
    return cfg, notes


def _fill(choices: Choices, recipe: Recipe, plan: Plan | None) -> Choices:
    """The choices, completed by the recipe."""
    effective = choices.effective_batch
    fitting = (batch for batch in range(BATCH_SIZE, 0, -1) if effective is None or effective % batch == 0)
    batch = choices.batch_size or next(fitting)
    accumulate = choices.accumulate or (effective // batch if effective else 1)
    epochs = plan.epochs if plan else choices.epochs or recipe.epochs
    return replace(choices, batch_size=batch, accumulate=accumulate, epochs=epochs)


def _fit_model(model: ConfigDict, path: Path, data: Data, size: tuple[int, int] | None) -> list[str]:
    """Fit a model to the data; with a ``size``, also its number of queries to images of this size."""
    if any(path.endswith('.mask_head') for path, _ in walk(model, 'model')):
        raise ValueError(
            f"the model '{path.stem}' predicts masks, which --data does not support; choose one for boxes only"
        )
    num_classes = len(data.classes)
    heads = list(bbox_heads(model))
    if not heads:
        raise ValueError(
            f"the model '{path.stem}' has no bbox_head to set the number of classes of; choose another model"
        )
    for _, head in heads:
        head.num_classes = num_classes
    notes = []
    if supports_nms(model) and 'nms' not in (model.get('test_cfg') or {}):
        set_nms(model, True)
        notes.append(
            'non-maximum suppression: on, because a DETR still predicts duplicates after a short training; test '
            '--no-nms switches it off'
        )
    if model.get('num_queries'):
        if model.num_queries < data.most_boxes:
            notes.append(
                f'num_queries: {2 * data.most_boxes} instead of {model.num_queries}, because images have up to '
                f'{data.most_boxes} boxes'
            )
            model.num_queries = 2 * data.most_boxes
        fitting = max(data.most_boxes, _narrowest_pixels(size)) if size else model.num_queries
        if model.num_queries > fitting:
            notes.append(
                f'num_queries: {fitting} instead of {model.num_queries}, because images of {size[0]}×{size[1]} have '
                'few pixels to choose them from'
            )
            model.num_queries = fitting
        # There are no more predictions than this.
        limit = model.num_queries * num_classes
        model.test_cfg = model.get('test_cfg') or ConfigDict()
        model.test_cfg.max_per_img = min(model.test_cfg.get('max_per_img', 100), limit)
    return notes


def _fit_batch(data: Data, choices: Choices) -> tuple[Choices, list[str]]:
    """Choices whose batch, and whose accumulated batch, is not larger than the data set."""
    batch = min(choices.batch_size, data.num_images)
    accumulate = min(choices.accumulate, -(-data.num_images // batch))
    asked, effective = choices.batch_size * choices.accumulate, batch * accumulate
    if asked == effective:
        return choices, []
    note = f'batch size: {effective} instead of {asked}, because there are {data.num_images} training images'
    return replace(choices, batch_size=batch, accumulate=accumulate), [note]


def _set_optimizer(cfg: Config, source: Config, choices: Choices) -> list[str]:
    if source.get('optim_wrapper') is None:
        cfg.optim_wrapper = dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=LR, weight_decay=1e-4),
            clip_grad=dict(max_norm=0.1, norm_type=2),
        )
        base = BATCH_SIZE
    else:
        base = (
            (source.get('auto_scale_lr') or {}).get('base_batch_size')
            or (source.get('train_dataloader') or {}).get('batch_size')
            or BATCH_SIZE
        )
    optimizer = cfg.optim_wrapper.optimizer
    effective = choices.batch_size * choices.accumulate
    if choices.lr is None:
        written = optimizer.lr
        adaptive = str(optimizer.type).startswith('Adam')
        ratio = (effective / base) ** (0.5 if adaptive else 1)
        optimizer.lr = float(f'{written * min(ratio, MAX_LR_FACTOR):.4g}')
        fraction = f'√({effective} / {base})' if adaptive else f'{effective} / {base}'
        note = (
            f'learning rate: {optimizer.lr:g} = {written:g} × {fraction}, scaled to the batch size'
            if ratio <= MAX_LR_FACTOR
            else f'learning rate: {optimizer.lr:g} = {written:g} × {MAX_LR_FACTOR}, the maximum; the batch size alone '
            f'gives {fraction}; set another one with --lr'
        )
    else:
        optimizer.lr = choices.lr
        note = f'learning rate: {choices.lr:g}, as given'
    if choices.accumulate > 1:
        cfg.optim_wrapper.accumulative_counts = choices.accumulate
    # The images of one iteration, from which MMEngine scales a training on more GPUs.
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=choices.batch_size)
    return [
        f'batch: {counted(effective, "image")}'
        + (f', {choices.accumulate} × {choices.batch_size} accumulated' if choices.accumulate > 1 else ''),
        note,
    ]


def _image_size(source: Config) -> tuple[int, int] | None:
    """(width, height) of the test pipeline of a complete config."""
    for _, node in walk((source.get('test_dataloader') or {}).get('dataset', {})):
        if isinstance(node, dict) and str(node.get('type')).split('.')[-1] == 'Resize' and node.get('scale'):
            return tuple(node['scale'])
    return None


def _epoch_images(data: Data, plan: Plan | None) -> int:
    return plan.epoch_images if plan and plan.epoch_images else data.num_images


def _can_crop(model: ConfigDict, size: tuple[int, int]) -> bool:
    """Whether images can be cropped and mixed until the last epochs.

    The hook that ends it, one of YOLOX, needs ``bbox_head``. A two-stage model needs a pixel of the feature maps for
    each query, also in the narrowest crop.
    """
    return 'bbox_head' in model and _narrowest_pixels(size) >= model.get('num_queries', 0)


def _narrowest_pixels(size: tuple[int, int]) -> int:
    """Pixels of the finest map, of stride 8, of the narrowest images and crops that fit into a size."""
    return int(NARROWEST * size[0] * size[1] / 8**2)


def _set_data(
    cfg: Config,
    data: Data,
    choices: Choices,
    transforms: list[dict],
    mixing: bool,
    size: tuple[int, int],
    plan: Plan | None,
) -> None:
    image, boxes = load_pipeline()
    test_pipeline = [
        image,
        dict(type='Resize', scale=size, keep_ratio=True),
        boxes,
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]

    def dataset(split: str, pipeline: list, **fields) -> dict:
        ann_file, images = data.files[split]
        return dict(
            type='CocoDataset',
            metainfo=dict(classes=data.classes),
            ann_file=str(ann_file),
            data_prefix=dict(img=f'{images}{os.sep}'),
            pipeline=pipeline,
            **fields,
        )

    def loader(dataset: dict, **sampler) -> dict:
        return dict(
            batch_size=choices.batch_size,
            num_workers=choices.workers,
            persistent_workers=choices.workers > 0,
            sampler=sampler,
            dataset=dataset,
        )

    loading = [image, boxes]
    train = dataset('train', loading if mixing else loading + transforms, filter_cfg=dict(filter_empty_gt=False))
    if mixing:
        train = dict(type='MultiImageMixDataset', dataset=train, pipeline=transforms)
    cfg.train_dataloader = loader(
        train,
        **dict(type='msda_plugin.PartSampler', num_samples=plan.epoch_images)
        if plan and plan.epoch_images
        else dict(type='DefaultSampler', shuffle=True),
    )
    for split, used in (('val', 'val'), ('test', 'test' if 'test' in data.files else 'val')):
        cfg[f'{split}_dataloader'] = loader(
            dataset(used, test_pipeline, test_mode=True), type='DefaultSampler', shuffle=False
        )
        cfg[f'{split}_evaluator'] = dict(
            type='CocoMetric', ann_file=str(data.files[used][0]), metric='bbox', classwise=True, format_only=False
        )


def _set_schedule(cfg: Config, data: Data, choices: Choices, plan: Plan | None, mixing: list[str]) -> None:
    epochs, iterations = choices.epochs, -(-_epoch_images(data, plan) // choices.batch_size)  # iterations per epoch
    interval = plan.val_interval if plan else max(1, epochs // 10)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=interval)
    cfg.val_cfg = dict(type='ValLoop')
    cfg.test_cfg = dict(type='TestLoop')
    warm_up = min(WARM_UP * choices.accumulate, epochs * iterations // 10)
    # LinearLR takes two iterations or more. A warm-up that changes nothing keeps the number of schedulers, on which a
    # resumed training depends.
    warm_up, start_factor = (warm_up, 0.01) if warm_up > 1 else (1, 1.0)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=start_factor, by_epoch=False, begin=0, end=warm_up),
        # With an end, a training that is resumed with more epochs continues at the lowest rate.
        dict(
            type='CosineAnnealingLR',
            by_epoch=True,
            begin=0,
            end=epochs,
            T_max=epochs,
            eta_min_ratio=0.02,
            convert_to_iter_based=True,
        ),
    ]
    cfg.default_hooks.logger.interval = max(1, min(50, iterations // 4))
    # A pipeline to switch to belongs to the config's own data.
    replaced = ('msda_plugin.TrainingReportHook', 'EMAHook', 'PipelineSwitchHook')
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook.get('type') not in replaced]
    hooks += [
        dict(type='msda_plugin.TrainingReportHook', num_train_images=data.train_sample),
        # The weights are averaged over about a tenth of the training, and over less at its start.
        dict(
            type='EMAHook',
            ema_type='ExpMomentumEMA',
            momentum=float(f'{min(0.02, max(0.0005, 10 / (epochs * iterations))):.2g}'),
            gamma=max(1, epochs * iterations // 10),
            update_buffers=True,
        ),
    ]
    if mixing:  # The end sees real images. This hook of YOLOX also sets use_l1, which heads of DETRs do not read.
        last = round(WEAK_PART * epochs)
        hooks.append(dict(type='YOLOXModeSwitchHook', num_last_epochs=last, skip_type_keys=mixing))
    if choices.patience:
        hooks.append(
            dict(
                type='EarlyStoppingHook',
                monitor='coco/bbox_mAP',
                rule='greater',
                min_delta=0.001,
                patience=choices.patience,
            )
        )
    if plan:
        hooks.append(
            dict(type='msda_plugin.TimeBudgetHook', minutes=round(choices.minutes, 2), val_epochs=plan.val_epochs)
        )
    cfg.custom_hooks = hooks


def save_config(cfg: Config, folder: str | os.PathLike, stem: str) -> Config:
    """Write the config to ``{folder}/{stem}.py`` and read it back, so that the training uses exactly this file.

    The config that an earlier call wrote there under another name, for other data or another model, is removed: a work
    dir has one config.
    """
    path = Path(folder, f'{stem}.py')
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write_text(cfg.pretty_text, encoding='utf-8')
    for other in path.parent.glob('*.py'):
        text = other.read_text(encoding='utf-8', errors='replace')
        belongs = re.search(r"^work_dir = '(.*)'$", text, re.MULTILINE)
        if (
            other != path
            and belongs
            and Path(belongs[1]).absolute() == path.parent.absolute()
            and 'msda_plugin.TrainingReportHook' in text
        ):
            other.unlink()
    return Config.fromfile(str(path))
