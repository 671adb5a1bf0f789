"""The recipe of a training on custom data: what is chosen from the data instead of asked for.

docs/tutorials/own_data.md has a table of the recipes, and what they were tried on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDES = (320, 384, 448, 512, 576, 640)  # image sizes in pixels
SMALL = 24  # pixels that a small object should have in the resized image
BATCH_SIZE = 4  # of one image, the statistics of batch norms are too noisy
LR = 4e-4  # of this batch size, for models whose config has none
AUGMENTATIONS = ('weak', 'medium', 'strong')
SEEN = 10_000  # images that a short training from starter weights sees, with repetitions
EPOCHS = (12, 100)
# A published detector already finds objects.
FINE_TUNING_SEEN, FINE_TUNING_EPOCHS = 4_000, (12, 36)
MANY_PASSES = 60  # through the data
WEAK_PART = 0.15  # of the epochs, at the end, without the strong augmentations
TRAIN_SAMPLE = 32  # training images whose AP is measured
NARROWEST = 0.4  # of the area of the image size, that a crop covers: 1:2, scaled by 0.8
GRAY = 114.0  # padding of mixed images, as in YOLOX


@dataclass(frozen=True)
class Objects:
    """Sizes of images and objects.

    Attributes:
        small: Size of small objects: the 5th percentile of the square root of their area, as a fraction of the longer
            side of their image; 0 without boxes.
        image_side: Longer side of the images in pixels, the median.
    """

    small: float = 0.0
    image_side: int = SIDES[0]


@dataclass(frozen=True)
class Recipe:
    """What is chosen from the data.

    Attributes:
        epochs: Number of epochs.
        scales: Smallest and largest random image size, as a factor.
    """

    epochs: int
    scales: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """A training within a time.

    Attributes:
        epochs: Number of epochs.
        val_interval: Epochs from one validation to the next.
        val_epochs: Duration of a validation, in epochs.
        epoch_images: Images per epoch, if an epoch is a part of the data; else None.
    """

    epochs: int
    val_interval: int
    val_epochs: float
    epoch_images: int | None


def choose_recipe(num_images: int, fine_tuning: bool) -> Recipe:
    """The recipe for a data set.

    Args:
        num_images: Number of training images.
        fine_tuning: Whether the training starts from a published detector, which needs less: fewer epochs, sizes that
            do not exceed the given one.
    """
    seen, (fewest, most) = (FINE_TUNING_SEEN, FINE_TUNING_EPOCHS) if fine_tuning else (SEEN, EPOCHS)
    return Recipe(
        epochs=min(most, max(fewest, round(seen / num_images))), scales=(0.6, 1.0) if fine_tuning else (0.8, 1.2)
    )


def choose_augmentation(passes: float, fine_tuning: bool) -> str:
    """The augmentation for a number of passes through the data. In a few, a detector does not learn it by heart."""
    return 'medium' if passes >= MANY_PASSES and not fine_tuning else 'weak'


def measure_objects(images: Sequence[dict], annotations: Sequence[dict]) -> Objects:
    """Measure the ``images`` and ``annotations`` of a COCO file, without crowds."""
    sides = {image['id']: max(image['width'], image['height']) for image in images}
    sizes = [(a['bbox'][2] * a['bbox'][3]) ** 0.5 / sides[a['image_id']] for a in annotations if not a.get('iscrowd')]
    return Objects(
        small=float(np.quantile(sizes, 0.05)) if sizes else 0.0, image_side=int(np.median(list(sides.values())))
    )


def choose_side(objects: Objects) -> int:
    """The image size in pixels at which small objects can be recognized, at most that of the images."""
    enough = next((side for side in SIDES if side * objects.small >= SMALL), SIDES[-1]) if objects.small else SIDES[0]
    largest = next((side for side in SIDES if side >= objects.image_side), SIDES[-1])
    return min(enough, largest)


def load_pipeline() -> list[dict]:
    """Transforms that read an image and its boxes."""
    return [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]


def train_pipeline(
    augmentation: str, scales: tuple[float, float], size: tuple[int, int]
) -> tuple[list[dict], list[str]]:
    """Transforms after `load_pipeline`, for images that fit into ``size`` (width, height).

    ``weak`` varies sizes and flips, ``medium`` also crops and changes colors, ``strong`` also makes mosaics.

    Returns:
        The transforms, and the types of those that end before the last epochs, which need ``MultiImageMixDataset``.
    """
    mosaic = [dict(type='Mosaic', img_scale=size, pad_val=GRAY, prob=0.3)]
    crop = dict(type='MinIoURandomCrop', min_ious=(0.3, 0.5, 0.7, 0.9), min_crop_size=0.4)
    strength = AUGMENTATIONS.index(augmentation)
    ending = [*(mosaic if strength > 1 else []), *([dict(type='RandomApply', transforms=[crop])] if strength else [])]
    lasting = [
        dict(type='RandomResize', scale=size, ratio_range=scales, keep_ratio=True),
        *([dict(type='YOLOXHSVRandomAug')] if strength else []),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ]
    return [*ending, *lasting], [step['type'] for step in ending]
