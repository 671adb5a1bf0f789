"""Inference: find the files of a model, load it, read images, predict."""

import copy
import os
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from torch import nn

from msda_plugin import compat
from msda_plugin.convert.conversion import unwrap
from msda_plugin.engine.images import read_image as read_image
from msda_plugin.engine.model_zoo import download_weights, find_model
from msda_plugin.engine.recorded_config import NotSelfContainedError, RecordedConfig, recorded_config
from msda_plugin.registry import MODELS

MAIN_JOB = 'shapes*'  # work dirs of `make train`


# ---- which files ----------------------------------------------------------------------------------------------------
def find_checkpoint(
    config: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    work_dirs: str | os.PathLike = 'work_dirs',
) -> tuple[str | None, str]:
    """Find the checkpoint of a config, or of the last `make train`.

    Args:
        config: A Python config file.
        checkpoint: A file or a URL. None: the best checkpoint, otherwise the last one, in the config's work dir or next
            to the config; without a config, in the newest work dir of `make train`.
        work_dirs: Folder that contains the work dirs.

    Returns:
        ``(config, checkpoint)``; the config is None if none was given: :func:`load_detector` finds that of the
        checkpoint.

    Raises:
        FileNotFoundError: If a given file does not exist, or no checkpoint is found.
    """
    for what, path in (('config', config), ('checkpoint', checkpoint)):
        if path is not None and not Path(path).is_file() and '://' not in str(path):
            raise FileNotFoundError(
                f'the {what} {path} does not exist; give the path of a '
                f'{"Python config" if what == "config" else ".pth"} file'
            )
    if checkpoint is None:
        pattern = MAIN_JOB if config is None else Path(config).stem
        found = sorted(filter(None, map(best_checkpoint, Path(work_dirs).glob(pattern))), key=_age)
        found = found or ([best_checkpoint(Path(config).parent)] if config is not None else [])
        if not found or found[-1] is None:
            where = Path(work_dirs, pattern)
            remedy = 'run `make train` first, or choose' if config is None else 'choose'
            raise FileNotFoundError(
                f'no checkpoint is given, and there is none in {where}; {remedy} one with --checkpoint'
            )
        checkpoint = found[-1]
    return None if config is None else str(config), str(checkpoint)


def find_source(
    source: str | os.PathLike, config: str | os.PathLike | None = None, checkpoint: str | os.PathLike | None = None
) -> tuple[str | None, str]:
    """Find config and checkpoint for what a user names.

    Args:
        source: A checkpoint (path or URL), a Python config file, the work dir of a training, or the name of a model
            with published weights, which are downloaded once.
        config: Config for a checkpoint or work dir.
        checkpoint: Checkpoint for a config.

    Returns:
        ``(config, checkpoint)`` as :func:`find_checkpoint` returns them.

    Raises:
        FileNotFoundError: If there is no such file, or no checkpoint for it.
        OSError: If published weights cannot be downloaded.
        ValueError: If ``source`` and another argument are both a config or both a checkpoint, or there is no model of
            this name.
    """
    path = Path(source)
    if path.is_dir():
        found = best_checkpoint(path)
        if found is None:
            raise FileNotFoundError(f'the folder {path} contains no checkpoint (*.pth); give a work dir')
        source = found
    elif not path.is_file() and '://' not in str(source):
        if path.suffix or len(path.parts) > 1:
            raise FileNotFoundError(
                f"'{source}' does not exist; give a checkpoint (.pth), a Python config file, a work dir, or the name "
                'of a model'
            )
        if config is not None or checkpoint is not None:
            raise ValueError(f"the model '{source}' has its own config and weights; name it alone")
        model = find_model(str(source))
        return str(model.config), str(download_weights(model))
    kind, other = ('config', config) if path.suffix == '.py' else ('checkpoint', checkpoint)
    if other is not None:
        raise ValueError(f"'{path}' is a {kind}, and {kind}= names another one, '{other}'; give one of them")
    return find_checkpoint(source, checkpoint) if kind == 'config' else find_checkpoint(config, source)


def best_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """The newest of the best checkpoints of a training, otherwise the newest checkpoint; None if there is none."""
    for pattern in ('best_*.pth', '*.pth'):
        if found := max(Path(work_dir).glob(pattern), key=_age, default=None):
            return found
    return None


def _age(path: Path) -> float:
    return path.stat().st_mtime


# ---- the model ------------------------------------------------------------------------------------------------------
def load_detector(
    config: str | os.PathLike | Config | None, checkpoint: str | os.PathLike, device: str | torch.device | None = None
) -> nn.Module:
    """Build the detector of a checkpoint and load its weights.

    Args:
        config: Path of a Python config file, or the config. None: the config that the checkpoint contains, which
            MMEngine stores with the weights; it is parsed, not executed. If the checkpoint contains none, or one that
            needs other packages, the only Python file next to it is taken, which is executed.
        checkpoint: Path or URL of a checkpoint: MMEngine's, or a bare state dict.
        device: None: the GPU if there is one, otherwise the CPU.

    Returns:
        The model in evaluation mode, with ``cfg`` and ``dataset_meta`` (``classes``: names of the labels, from the
        checkpoint, or otherwise from the dataset of the config).

    Raises:
        OSError: If the checkpoint cannot be read or downloaded.
        ValueError: If no config is given or found, or the checkpoint is incomplete, contains code, or does not fit the
            model.
    """
    return build_detector(*read_checkpoint(config, checkpoint), checkpoint, device)


def read_checkpoint(
    config: str | os.PathLike | Config | None, checkpoint: str | os.PathLike
) -> tuple[Config, dict[str, object]]:
    """Read a checkpoint to the CPU, and its config; arguments and errors as in :func:`load_detector`."""
    with compat.load_checkpoints_strictly():
        loaded = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu', logger='silent')
    if isinstance(config, Config):
        return config, loaded
    if config is not None:
        return Config.fromfile(config), loaded
    try:
        recorded, reason = recorded_config(loaded), 'contains no config'
    except NotSelfContainedError as error:
        recorded, reason = None, str(error)
    except ValueError as error:
        raise ValueError(f'the checkpoint {checkpoint} {error}; name its config file') from None
    if recorded is not None:
        return recorded, loaded
    configs = [] if '://' in str(checkpoint) else sorted(Path(checkpoint).parent.glob('*.py'))
    if len(configs) != 1:
        raise ValueError(
            f'the checkpoint {checkpoint} {reason}, and there are {len(configs)} Python files next to it, expected one '
            'config; choose it with --config, or config= in Python'
        )
    return Config.fromfile(configs[0]), loaded


def build_detector(
    cfg: Config, loaded: dict[str, object], checkpoint: str | os.PathLike, device: str | torch.device | None = None
) -> nn.Module:
    """Build the detector from the results of :func:`read_checkpoint`; see :func:`load_detector`."""
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    compat.import_mmdet()
    restricted = compat.registered_types_only() if isinstance(cfg, RecordedConfig) else nullcontext()
    with restricted, compat.load_checkpoints_strictly():  # some detectors load a teacher
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        meta = loaded['meta'].get('dataset_meta') if 'state_dict' in loaded and 'meta' in loaded else None
        model.dataset_meta = {key.lower(): value for key, value in meta.items()} if meta else _dataset_meta(cfg)
        model.test_pipeline = _test_pipeline(cfg) if cfg.get('test_dataloader') else None
    state_dict = {name.removeprefix('module.'): value for name, value in unwrap(loaded).items()}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:  # torch's has a first line without content, and names every weight
        reason = textwrap.shorten(str(error).partition('\n')[2] or str(error), 400, placeholder=' …')
        raise ValueError(
            f'the checkpoint {checkpoint} does not fit the config ({reason}); choose the config it was trained with'
        ) from None
    model.cfg = cfg
    return model.to(device or ('cuda' if torch.cuda.is_available() else 'cpu')).eval()


def _dataset_meta(cfg: Config) -> dict:
    """Metainfo of the config's test dataset, without reading its files."""
    dataset = cfg.test_dataloader.dataset
    return dict(DATASETS.build({**copy.deepcopy(dataset), 'lazy_init': True}).metainfo)


def _test_pipeline(cfg: Config) -> Compose:
    """The transforms of the config's test data, for images in memory."""
    pipeline = [
        step
        for step in copy.deepcopy(get_test_pipeline_cfg(cfg))
        if not step['type'].split('.')[-1].startswith('LoadAnnotations')
    ]
    pipeline[0]['type'] = 'mmdet.LoadImageFromNDArray'
    return Compose(pipeline)


# ---- images ---------------------------------------------------------------------------------------------------------
def predict(model: nn.Module, image: np.ndarray) -> DetDataSample:
    """Detect objects in one image, through the test pipeline of the model's config.

    Args:
        model: From :func:`load_detector`.
        image: (H, W, 3) uint8, RGB.

    Returns:
        ``pred_instances`` with ``bboxes`` (N, 4) as x1 y1 x2 y2 in pixels of ``image``, ``scores`` (N,) from high to
        low and ``labels`` (N,), indices of ``model.dataset_meta['classes']``; and the pipeline's ``ori_shape``,
        ``img_shape``, ``batch_input_shape`` (h, w) and ``scale_factor`` (w, h).
    """
    (sample,) = predict_batch(model, [image])
    return sample


def predict_batch(model: nn.Module, images: Sequence[np.ndarray]) -> list[DetDataSample]:
    """Detect objects in images. Those that the pipeline resizes to the same size form a batch.

    No image is padded to the size of another one, so results do not depend on the other images, up to rounding.

    Args:
        model: From :func:`load_detector`.
        images: Each (H, W, 3) uint8, RGB.

    Returns:
        One sample for each image, as :func:`predict` returns it.
    """
    if model.test_pipeline is None:
        raise ValueError('the config of the model has no test_dataloader, whose pipeline prepares the images; add one')
    with compat.accept_sides_of_one_pixel():
        # The model's preprocessor expects BGR, as files are read.
        data = [model.test_pipeline(dict(img=np.ascontiguousarray(image[..., ::-1]), img_id=0)) for image in images]
    batches: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(data):
        batches.setdefault(tuple(item['inputs'].shape), []).append(index)
    samples: dict[int, DetDataSample] = {}
    for indices in batches.values():
        with torch.no_grad():
            found = model.test_step(pseudo_collate([data[index] for index in indices]))
        samples |= dict(zip(indices, found, strict=True))
    return [samples[index] for index in range(len(images))]
