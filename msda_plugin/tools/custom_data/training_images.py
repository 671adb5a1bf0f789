"""A contact sheet of training images after augmentation, drawn before the training."""

from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor

from msda_plugin import compat
from msda_plugin.engine.hooks.seed import seeded
from msda_plugin.engine.messages import counted, shown_path
from msda_plugin.visualization import draw_contact_sheet, write_png

NUM_IMAGES = 12
NORMALIZED = 10.0  # pixel values up to this one come from a normalization in the pipeline


def draw_training_images(cfg: Config, path: Path) -> str:
    """Draw training images with their boxes, as the train pipeline and the wrappers of the dataset return them.

    The dataset is built anew: a training that follows starts from its own, without what transforms may have stored.

    Args:
        cfg: Complete config.
        path: The PNG file.

    Returns:
        A sentence that names the file; or, because no drawing should stop a training, why there is none.
    """
    try:
        count = _draw(cfg, path)
    except Exception as error:
        return f'training images: not drawn, because of {type(error).__name__}: {error}'
    return f'training images: {counted(count, "example")} with boxes, after augmentation: {shown_path(path)}'


def _draw(cfg: Config, path: Path) -> int:
    compat.import_mmdet()
    seed = cfg.get('randomness', {}).get('seed') or 0
    images, truths, captions = [], [], []
    with (
        DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmdet')),
        compat.redirect_pycocotools(lambda text: None),
        seeded(seed),
    ):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        chosen = sorted(np.random.default_rng(seed).permutation(len(dataset))[:NUM_IMAGES].tolist())
        # Twice: transforms with a cache, such as CachedMosaic, change nothing before they have seen some images.
        for _ in range(2):
            samples = [dataset[index] for index in chosen]
    for sample in samples:
        objects = sample['data_samples'].gt_instances
        boxes = getattr(objects.bboxes, 'tensor', objects.bboxes).reshape(-1, 4).numpy()
        images.append(_pixels(sample['inputs']))
        truths.append((boxes, objects.labels.numpy()))
        height, width = images[-1].shape[:2]
        name = Path(sample['data_samples'].get('img_path') or '').name
        captions.append(f'{name}: {width}×{height}, {counted(len(boxes), "box", "boxes")}'.removeprefix(': '))
    write_png(path, draw_contact_sheet(images, truths, dataset.metainfo['classes'], captions))
    return len(images)


def _pixels(inputs: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 RGB of the (3, H, W) BGR of a pipeline. Normalized values are stretched to 0-255."""
    image = inputs.numpy()[::-1].transpose(1, 2, 0)
    if image.dtype != np.uint8:
        image = image.astype(float)
        if np.abs(image).max() <= NORMALIZED:
            image = (image - image.min()) / max(image.max() - image.min(), 1e-6) * 255
        image = image.clip(0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(image)
