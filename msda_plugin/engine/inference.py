"""What `demo` and `visualize` share: which model, from which files, and one image through it."""

import copy
import os
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from torch import nn

from msda_plugin.convert.conversion import unwrap
from msda_plugin.registry import MODELS

MAIN_JOB = 'shapes*'  # the folders of `make train` below the work dirs, one a stack


def find_checkpoint(
    config: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    work_dirs: str | os.PathLike = 'work_dirs',
) -> tuple[str, str]:
    """Paths of a config and a checkpoint that belong together; what is not named is looked for.

    Args:
        config: None: the one that lies beside the checkpoint.
        checkpoint: A file, or a URL if the config is named. None: the best one (else the last) of the config's work
            dir; without a config, of `make train`, the newest where it ran on both stacks.
        work_dirs: Folder of the work dirs.

    Returns:
        ``(config, checkpoint)``.

    Raises:
        FileNotFoundError: There is no such file, or none is found.
        ValueError: It is not plain which config belongs to the checkpoint.
    """
    for what, path in (('config', config), ('checkpoint', checkpoint)):
        if path is not None and not Path(path).is_file() and '://' not in str(path):
            raise FileNotFoundError(
                f'the {what} {path} does not exist; give the path of a '
                f'{"Python config" if what == "config" else ".pth"} file'
            )
    if checkpoint is None:
        pattern = MAIN_JOB if config is None else Path(config).stem
        found = sorted(filter(None, map(_best_checkpoint, Path(work_dirs).glob(pattern))), key=_age)
        if not found:
            where = Path(work_dirs, pattern)
            remedy = 'run `make train` first, or name' if config is None else 'name'
            raise FileNotFoundError(
                f'no checkpoint is named, and there is none in {where}; {remedy} one with --checkpoint'
            )
        checkpoint = found[-1]
    if config is None:
        beside = sorted(Path(checkpoint).parent.glob('*.py'))
        if len(beside) != 1:
            raise ValueError(
                f'{len(beside)} Python files lie beside the checkpoint {checkpoint}, and one, its config, '
                'is needed; name it with --config'
            )
        (config,) = beside
    return str(config), str(checkpoint)


def _best_checkpoint(work_dir: Path) -> Path | None:
    """The newest of the best checkpoints of a training, else the newest at all."""
    return max(work_dir.glob('best_*.pth'), key=_age, default=max(work_dir.glob('*.pth'), key=_age, default=None))


def _age(path: Path) -> float:
    return path.stat().st_mtime


def load_detector(
    config: str | os.PathLike | Config, checkpoint: str | os.PathLike, device: str | torch.device | None = None
) -> nn.Module:
    """The detector of a config with the weights of a checkpoint, ready to predict.

    Args:
        config: Path of a Python config file, or the config.
        checkpoint: Path or URL of a checkpoint: MMEngine's, or a bare state dict.
        device: None: the GPU where there is one, else the CPU.

    Returns:
        The model in evaluation mode, with ``cfg`` and ``dataset_meta`` (``classes``: the names of its labels, as the
        checkpoint has them, else the data set of the config).

    Raises:
        OSError: The checkpoint cannot be read, or downloaded.
        ValueError: It is no whole checkpoint, holds more than weights, or its weights are not those of the model.
    """
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    loaded = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu', logger='silent')
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    state_dict = {name.removeprefix('module.'): value for name, value in unwrap(loaded).items()}
    _check_fit(model, state_dict, checkpoint)
    model.load_state_dict(state_dict)
    model.cfg = cfg
    meta = loaded['meta'].get('dataset_meta') if 'state_dict' in loaded and 'meta' in loaded else None
    model.dataset_meta = {key.lower(): value for key, value in meta.items()} if meta else _dataset_meta(cfg)
    return model.to(device or ('cuda' if torch.cuda.is_available() else 'cpu')).eval()


def _check_fit(model: nn.Module, state_dict: dict, checkpoint: str | os.PathLike) -> None:
    own = model.state_dict()
    wrong = [
        f'{len(names)} {what} (such as {names[0]})'
        for what, names in (
            ('weights are missing', [name for name in own if name not in state_dict]),
            ('are not in the model', [name for name in state_dict if name not in own]),
            (
                'have another shape',
                [name for name in own if name in state_dict and state_dict[name].shape != own[name].shape],
            ),
        )
        if names
    ]
    if wrong:
        raise ValueError(
            f'the checkpoint {checkpoint} does not fit the config: {", ".join(wrong)}; name the config '
            'that it was trained with'
        )


def _dataset_meta(cfg: Config) -> dict:
    """What the test data set of the config says of itself, without reading its files."""
    dataset = cfg.test_dataloader.dataset
    return dict(DATASETS.build({**copy.deepcopy(dataset), 'lazy_init': True}).metainfo)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image file as (H, W, 3) uint8, RGB, turned as its EXIF entry says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image that can be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'the image {path} does not exist; give the path of an image file')
    try:
        image = mmcv.imread(str(path))
    except cv2.error:  # an empty file, or one of too many pixels
        image = None
    if image is None:
        raise ValueError(f'{path} is not an image that can be read; give a JPEG or PNG file')
    return np.ascontiguousarray(image[..., ::-1])


def predict(model: nn.Module, image: np.ndarray) -> DetDataSample:
    """Detect objects in one image, through the test pipeline of the model's config.

    Args:
        model: From :func:`load_detector`.
        image: (H, W, 3) uint8, RGB.

    Returns:
        ``pred_instances``: ``bboxes`` (N, 4) as x1 y1 x2 y2 in pixels of ``image``, ``scores`` (N,) from high to low,
        ``labels`` (N,), indices of ``model.dataset_meta['classes']``; and what the pipeline did: ``ori_shape``,
        ``img_shape``, ``batch_input_shape`` (h, w), ``scale_factor`` (w, h).
    """
    pipeline = [
        step
        for step in copy.deepcopy(get_test_pipeline_cfg(model.cfg))
        if not step['type'].split('.')[-1].startswith('LoadAnnotations')
    ]
    pipeline[0]['type'] = 'mmdet.LoadImageFromNDArray'
    # Files are read as BGR, which is what the model's preprocessor expects.
    data = Compose(pipeline)(dict(img=np.ascontiguousarray(image[..., ::-1]), img_id=0))
    with torch.no_grad():
        (sample,) = model.test_step(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))
    return sample
