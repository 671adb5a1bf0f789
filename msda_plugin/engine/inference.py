"""Inference on one image: find the files of a model, load it, predict."""

import copy
import os
import textwrap
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

from msda_plugin import compat
from msda_plugin.convert.conversion import unwrap
from msda_plugin.registry import MODELS

MAIN_JOB = 'shapes*'  # work dirs of `make train`


def find_checkpoint(
    config: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    work_dirs: str | os.PathLike = 'work_dirs',
) -> tuple[str, str]:
    """Find a config and a checkpoint that belong together.

    Args:
        config: None: the config next to the checkpoint.
        checkpoint: A file, or a URL if ``config`` is given. None: the best checkpoint, otherwise the last one, in the
            config's work dir; without a config, in the newest work dir of `make train`.
        work_dirs: Folder that contains the work dirs.

    Returns:
        ``(config, checkpoint)``.

    Raises:
        FileNotFoundError: If a given file does not exist, or no checkpoint is found.
        ValueError: If there is not exactly one config next to the checkpoint.
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
            remedy = 'run `make train` first, or choose' if config is None else 'choose'
            raise FileNotFoundError(
                f'no checkpoint is given, and there is none in {where}; {remedy} one with --checkpoint'
            )
        checkpoint = found[-1]
    if config is None:
        configs = sorted(Path(checkpoint).parent.glob('*.py'))
        if len(configs) != 1:
            raise ValueError(
                f'there are {len(configs)} Python files next to the checkpoint {checkpoint}, expected one config; '
                'choose it with --config'
            )
        (config,) = configs
    return str(config), str(checkpoint)


def _best_checkpoint(work_dir: Path) -> Path | None:
    """The newest of the best checkpoints of a training, otherwise the newest checkpoint."""
    return max(work_dir.glob('best_*.pth'), key=_age, default=max(work_dir.glob('*.pth'), key=_age, default=None))


def _age(path: Path) -> float:
    return path.stat().st_mtime


def load_detector(
    config: str | os.PathLike | Config, checkpoint: str | os.PathLike, device: str | torch.device | None = None
) -> nn.Module:
    """Build the detector of a config and load a checkpoint into it.

    Args:
        config: Path of a Python config file, or the config.
        checkpoint: Path or URL of a checkpoint: MMEngine's, or a bare state dict.
        device: None: the GPU if there is one, otherwise the CPU.

    Returns:
        The model in evaluation mode, with ``cfg`` and ``dataset_meta`` (``classes``: names of the labels, from the
        checkpoint, or otherwise from the dataset of the config).

    Raises:
        OSError: If the checkpoint cannot be read or downloaded.
        ValueError: If the checkpoint is incomplete, contains more than weights, or does not fit the model.
    """
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    compat.import_mmdet()
    with compat.load_checkpoints_strictly():
        loaded = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu', logger='silent')
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    state_dict = {name.removeprefix('module.'): value for name, value in unwrap(loaded).items()}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:  # torch's has a first line without content, and names every weight
        reason = textwrap.shorten(str(error).partition('\n')[2] or str(error), 400, placeholder=' …')
        raise ValueError(
            f'the checkpoint {checkpoint} does not fit the config ({reason}); choose the config it was trained with'
        ) from None
    model.cfg = cfg
    meta = loaded['meta'].get('dataset_meta') if 'state_dict' in loaded and 'meta' in loaded else None
    model.dataset_meta = {key.lower(): value for key, value in meta.items()} if meta else _dataset_meta(cfg)
    return model.to(device or ('cuda' if torch.cuda.is_available() else 'cpu')).eval()


def _dataset_meta(cfg: Config) -> dict:
    """Metainfo of the config's test dataset, without reading its files."""
    dataset = cfg.test_dataloader.dataset
    return dict(DATASETS.build({**copy.deepcopy(dataset), 'lazy_init': True}).metainfo)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8, RGB, rotated according to its EXIF data.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read as an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'the image {path} does not exist; give the path of an image file')
    try:
        image = mmcv.imread(str(path))
    except cv2.error:  # the file is empty, or has too many pixels
        image = None
    if image is None:
        raise ValueError(f'{path} cannot be read as an image; give a JPEG or PNG file')
    return np.ascontiguousarray(image[..., ::-1])


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
    pipeline = [
        step
        for step in copy.deepcopy(get_test_pipeline_cfg(model.cfg))
        if not step['type'].split('.')[-1].startswith('LoadAnnotations')
    ]
    pipeline[0]['type'] = 'mmdet.LoadImageFromNDArray'
    # The model's preprocessor expects BGR, as files are read.
    data = Compose(pipeline)(dict(img=np.ascontiguousarray(image[..., ::-1]), img_id=0))
    with torch.no_grad():
        (sample,) = model.test_step(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))
    return sample
