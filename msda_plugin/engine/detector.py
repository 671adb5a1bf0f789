"""Detect objects in images, folders and videos, in three lines of Python.

MMDetection is imported when a `Detector` is made, not with this module.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import supervision
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from PIL import Image

__all__ = ['DetectionResult', 'Detector']

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
READABLE = 640  # smaller images are drawn with this longer side, pixels, so that labels are readable


@dataclass(frozen=True, eq=False, repr=False)
class DetectionResult:
    """The detections in one image, sorted by score from high to low; arrays are NumPy's.

    Attributes:
        boxes: (n, 4) float32, x1 y1 x2 y2 in pixels of the image.
        scores: (n,) float32, 0-1.
        labels: (n,) int64, indices of ``class_names``.
        class_names: All names that the detector knows.
        masks: (n, height, width) bool from detectors that predict masks, otherwise None.
        path: The file that the image or video frame was read from; None for images in memory and cameras.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    masks: np.ndarray | None = None
    path: str | None = None
    _image: np.ndarray | None = None

    @property
    def names(self) -> np.ndarray:
        """(n,) class names of the detections."""
        return np.array([self.class_names[label] for label in self.labels], dtype=str)

    @property
    def image(self) -> np.ndarray:
        """The image, (height, width, 3) uint8, RGB. That of a file is read again; others are kept."""
        from msda_plugin.engine.images import read_image

        return read_image(self.path) if self._image is None else self._image

    def __len__(self) -> int:
        return len(self.scores)

    def __bool__(self) -> bool:
        return True  # a result without detections is a result

    def __repr__(self) -> str:
        counts = ', '.join(f'{number} {name}' for name, number in Counter(self.names.tolist()).most_common())
        return f'<DetectionResult: {counts or "no detections"}>'

    def draw(self) -> np.ndarray:
        """Draw boxes with class names and scores, and masks, on the image; see `msda_plugin.visualization.draw_boxes`.

        Returns:
            (height, width, 3) uint8, RGB. Images smaller than 640 pixels are enlarged to this longer side.
        """
        from msda_plugin.visualization import draw_boxes

        image = self.image
        small = max(image.shape[:2]) < READABLE
        return draw_boxes(
            image,
            self.boxes,
            self.labels,
            self.class_names,
            self.scores,
            masks=self.masks,
            longer_side=READABLE if small else None,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the image with boxes and masks, as `draw` returns it; the format follows from the suffix.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the suffix is not that of an image format.
        """
        from PIL import Image

        from msda_plugin.visualization import write_png

        path = Path(path)
        if path.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"cannot save an image as '{path}'; choose a name such as {path.stem}.jpg")
        drawn = self.draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == '.png':
            write_png(path, drawn)
        else:
            Image.fromarray(drawn).save(path, quality=92)

    def to_supervision(self) -> 'supervision.Detections':
        """Convert to supervision's ``Detections``, with ``class_name`` in its data.

        Raises:
            ImportError: If supervision is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError(f'to_supervision() needs supervision ({error}); pip install supervision') from None
        return Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            mask=self.masks,
            data=dict(class_name=self.names),
        )

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict]:
        """Convert to COCO's results format.

        Args:
            image_id: ``id`` of the image in the annotation file.
            category_ids: Category id of each label. None: label + 1.

        Returns:
            One dict for each detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height, pixels, 2
            decimals), ``score`` (4 decimals), and with masks ``segmentation`` (compressed RLE).
        """
        results = [
            dict(
                image_id=image_id,
                category_id=int(label) + 1 if category_ids is None else category_ids[label],
                score=round(float(score), 4),
                bbox=[round(float(value), 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            )
            for (x1, y1, x2, y2), label, score in zip(self.boxes, self.labels, self.scores, strict=True)
        ]
        if self.masks is not None:
            from pycocotools.mask import encode

            for result, mask in zip(results, self.masks, strict=True):
                rle = encode(np.asfortranarray(mask, np.uint8))
                result['segmentation'] = dict(size=rle['size'], counts=rle['counts'].decode())
        return results


class Detector:
    """A detector that is ready for images.

    Args:
        source: A checkpoint (path or URL), a Python config file, the work dir of a training, the name of a model
            with published weights, which are downloaded once (``python -m msda_plugin models`` lists the names), or a
            file of ``python -m msda_plugin export`` (.onnx, .pt2 or .xml), which takes no other arguments and runs on
            the CPU, without MMDetection. With a config or work dir, the best checkpoint of the training is taken. None:
            ``checkpoint``, or that of the last `make train`.
        config: Python config file. None: the config that the checkpoint contains, which is parsed, not executed; if
            it contains none, or one that needs other packages, the only Python file next to the checkpoint.
        checkpoint: Checkpoint for a config.
        device: Such as 'cpu' or 'cuda:1'. None: the GPU if there is one, otherwise the CPU.
        half: Run in mixed precision with ``torch.autocast``: float16 on GPUs, bfloat16 on CPUs.
        accelerate: Run msda_plugin's operator in a stock model, and convolutions in ``channels_last`` with folded batch
            norms (`msda_plugin.accelerate` with ``inference=True``).
        nms: Non-maximum suppression per class. None: as in the config; a number: with this IoU threshold, above 0 and
            up to 1; True: with the threshold of the config, otherwise 0.7; False: without. A suppression that the
            model's config has changes its threshold, or is switched off with a threshold of 1.
        image_size: Side, or (width, height), in pixels that images are fitted into. None: as in the config.

    Attributes:
        model: The model, a ``torch.nn.Module`` in evaluation mode; of an exported file, a
            `msda_plugin.export.runtimes.ExportedModel`.
        class_names: Names of the labels.
        config: Path of the config file; None if the checkpoint contained it.
        checkpoint: Path or URL of the checkpoint, or of the exported file.

    Raises:
        ImportError: If the runtime of an exported file is not installed.
        OSError: If a file cannot be found, read or downloaded.
        ValueError: If the checkpoint has no usable config, contains code, or does not fit the config; an argument is
            out of its range; or an exported file is broken, or other arguments come with it.
    """

    def __init__(
        self,
        source: str | os.PathLike | None = None,
        *,
        config: str | os.PathLike | None = None,
        checkpoint: str | os.PathLike | None = None,
        device: 'str | torch.device | None' = None,
        half: bool = False,
        accelerate: bool = False,
        nms: bool | float | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        from msda_plugin.export.runtimes import is_exported

        self.half, self._nms = half, None
        if is_exported(source):
            given = dict(
                config=config,
                checkpoint=checkpoint,
                device=None if str(device) == 'cpu' else device,
                half=half or None,
                accelerate=accelerate or None,
                nms=nms,
                image_size=image_size,
            )
            self._load_exported(source, [name for name, value in given.items() if value is not None])
            return
        from msda_plugin.engine.inference import build_detector, find_checkpoint, find_source, read_checkpoint

        _check_device(device)
        find = find_checkpoint if source is None else partial(find_source, source)
        config, self.checkpoint = find(config, checkpoint)
        cfg, loaded = read_checkpoint(config, self.checkpoint)
        self.config = cfg.filename
        self._nms = _set_nms(cfg, nms)
        if image_size is not None:
            _set_image_size(cfg, image_size)
        self.model = build_detector(cfg, loaded, self.checkpoint, device)
        if accelerate:
            from msda_plugin.acceleration import accelerate as accelerate_model

            accelerate_model(self.model, inference=True)
        class_names = self.model.dataset_meta.get('classes')
        if not class_names:
            raise ValueError(
                f'neither the checkpoint {self.checkpoint} nor its config has class names; add '
                'metainfo=dict(classes=(…)) to test_dataloader.dataset in the config'
            )
        self.class_names = tuple(class_names)

    def _load_exported(self, path: str | os.PathLike, others: Sequence[str]) -> None:
        from msda_plugin.export.runtimes import open_exported

        if others:
            raise ValueError(
                f"'{path}' is an exported model, which runs on the CPU as it is; leave out {', '.join(others)}, or "
                'export it again'
            )
        self.model = open_exported(path)
        self.model.check_detects()
        self.config, self.checkpoint, self.class_names = None, str(path), self.model.card.class_names

    @property
    def device(self) -> 'torch.device':
        """The device of the model."""
        import torch

        return next(self.model.parameters()).device if isinstance(self.model, torch.nn.Module) else torch.device('cpu')

    def __call__(
        self,
        images: 'str | os.PathLike | int | np.ndarray | Image.Image | Sequence',
        score_threshold: float = 0.3,
        *,
        batch_size: int = 4,
        channel_order: Literal['rgb', 'bgr'] = 'rgb',
    ) -> DetectionResult | list[DetectionResult] | Iterator[DetectionResult]:
        """Detect objects.

        Args:
            images: An image, a list or tuple of images, a folder, a video file, or the index of a camera. An image is
                a path, a PIL image, or an array (height, width), (height, width, 1), (height, width, 3) or (height,
                width, 4) uint8, whose fourth channel is ignored. Images are rotated according to their EXIF data.
                Folders are searched recursively for images, sorted by path.
            score_threshold: Minimum score of a detection, 0-1.
            batch_size: Maximum number of images that run through the model together. Only images that the model sees
                at the same size form a batch. The frames of a camera run one by one.
            channel_order: Order of the channels of arrays; OpenCV reads 'bgr'.

        Returns:
            A result for an image, a list of results for a list or folder, and for a video or camera a generator of
            results, one for each frame.

        Raises:
            FileNotFoundError: If a file does not exist, or a folder contains no image.
            TypeError: If ``images`` is none of these.
            ValueError: If an image or video cannot be read, an array has another shape or dtype, or an argument is out
                of its range.
        """
        if not 0 <= score_threshold <= 1:
            raise ValueError(f'score_threshold must be from 0 to 1, got {score_threshold}')
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}')
        if channel_order not in ('rgb', 'bgr'):
            raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
        if isinstance(images, int) and not isinstance(images, bool):
            return self._frames(images, score_threshold, 1)
        if isinstance(images, (str, os.PathLike)):
            path = Path(images)
            if path.suffix.lower() in VIDEOS and path.is_file():
                return self._frames(path, score_threshold, batch_size)
            if path.is_dir():
                images = find_files(path, IMAGES)
                if not images:
                    raise FileNotFoundError(f'the folder {path} contains no image ({", ".join(IMAGES)})')
        several = isinstance(images, (list, tuple))
        results = []
        for chunk in _chunks(images if several else [images], batch_size):
            read = [_read(image, channel_order) for image in chunk]
            in_files = [isinstance(image, (str, os.PathLike)) for image in chunk]
            results += self._detect(
                read,
                score_threshold,
                paths=[str(image) if file else None for image, file in zip(chunk, in_files, strict=True)],
                kept=[None if file else pixels for pixels, file in zip(read, in_files, strict=True)],
            )
        return results if several else results[0]

    def _frames(self, source: Path | int, score_threshold: float, batch_size: int) -> Iterator[DetectionResult]:
        """Open a video or camera; returns the generator of its results."""
        import cv2

        reader = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        first = reader.read()
        if not first[0]:
            raise ValueError(
                f'the camera {source} cannot be read; choose the index of another one'
                if isinstance(source, int)
                else f'the video {source} cannot be read; convert it to MP4 (H.264)'
            )
        path = None if isinstance(source, int) else str(source)

        def frames() -> Iterator[np.ndarray]:
            read, frame = first
            while read:
                yield np.ascontiguousarray(frame[..., ::-1])
                read, frame = reader.read()

        def results() -> Iterator[DetectionResult]:
            for batch in _chunks(frames(), batch_size):
                yield from self._detect(batch, score_threshold, [path] * len(batch), batch)

        return results()

    def _detect(
        self,
        images: Sequence[np.ndarray],
        score_threshold: float,
        paths: Sequence[str | None],
        kept: Sequence[np.ndarray | None],
    ) -> list[DetectionResult]:
        """Detect objects in (height, width, 3) uint8 RGB images; ``kept`` are the images that the results hold."""
        from msda_plugin.export.runtimes import ExportedModel

        if isinstance(self.model, ExportedModel):
            return [
                _exported_result(found, score_threshold, self.class_names, path, image)
                for found, path, image in zip(self.model(images), paths, kept, strict=True)
            ]
        import torch

        from msda_plugin.engine.inference import predict_batch

        device = self.device.type
        dtype = torch.bfloat16 if device == 'cpu' else torch.float16
        with torch.autocast(device, dtype) if self.half else nullcontext():
            samples = predict_batch(self.model, images)
        return [
            self._result(sample, score_threshold, path, image)
            for sample, path, image in zip(samples, paths, kept, strict=True)
        ]

    def _result(
        self, sample: 'DetDataSample', score_threshold: float, path: str | None, image: np.ndarray | None
    ) -> DetectionResult:
        found = sample.get('pred_instances')
        if found is None:
            raise ValueError(
                f'{type(self.model).__name__} predicts no objects with scores ({", ".join(sample.keys())}); choose a '
                'detector or an instance segmentation model'
            )
        found = found[found.scores.float() >= score_threshold]
        found = found[found.scores.argsort(descending=True, stable=True)]
        if self._nms is not None and len(found):
            from mmcv.ops import batched_nms

            nms = dict(type='nms', iou_threshold=self._nms)
            found = found[batched_nms(found.bboxes.float(), found.scores.float(), found.labels, nms)[1]]
        if len(found) and found.labels.max() >= len(self.class_names):
            raise ValueError(
                f'the model predicts label {int(found.labels.max())}, but has only {len(self.class_names)} class names '
                f'({", ".join(self.class_names[:5])}…); choose the config that the checkpoint was trained with'
            )
        return DetectionResult(
            boxes=found.bboxes.float().cpu().numpy(),
            scores=found.scores.float().cpu().numpy(),
            labels=found.labels.cpu().numpy(),
            class_names=self.class_names,
            masks=found.masks.cpu().numpy() if 'masks' in found else None,
            path=path,
            _image=image,
        )


def _exported_result(
    found: tuple[np.ndarray, ...],
    score_threshold: float,
    class_names: tuple[str, ...],
    path: str | None,
    image: np.ndarray | None,
) -> DetectionResult:
    boxes, scores, labels, *masks = (part[found[1] >= score_threshold] for part in found)
    return DetectionResult(boxes, scores, labels, class_names, *masks, path=path, _image=image)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


# ---- arguments ------------------------------------------------------------------------------------------------------
def _check_device(device: 'str | torch.device | None') -> None:
    import torch

    try:
        device = torch.device(device or 'cpu')
    except RuntimeError:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from None
    count = torch.cuda.device_count()
    if device.type == 'cuda' and (device.index or 0) >= count:
        raise ValueError(f"the device is '{device}', but torch sees {count or 'no'} GPUs; choose another device")


def _set_nms(cfg: 'Config', nms: bool | float | None) -> float | None:
    """Set the threshold of the suppression that the model has; returns it if the model has none."""
    from msda_plugin.engine.config_walk import walk
    from msda_plugin.engine.nms import NMS

    if nms is None:
        return None
    if not isinstance(nms, bool) and not 0 < nms <= 1:
        raise ValueError(f'nms must be True, False, or an IoU threshold above 0 and up to 1, got {nms!r}')
    found = [
        node
        for path, node in walk(cfg.model.get('test_cfg'))
        if path.split('.')[-1] == 'nms' and isinstance(node, dict) and 'rpn' not in path.split('.')
    ]
    for node in found:
        if nms is False:
            node.update(type='nms', iou_threshold=1.0)
        elif nms is not True:
            node.update(iou_threshold=float(nms))
    if found or nms is False:
        return None
    return NMS['iou_threshold'] if nms is True else float(nms)


def _set_image_size(cfg: 'Config', size: int | tuple[int, int]) -> None:
    """Set the size that the test pipeline resizes images to, (width, height)."""
    from mmdet.utils import get_test_pipeline_cfg

    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f'image_size must be a side or (width, height) in pixels, got {size!r}')
    changed = False
    for step in get_test_pipeline_cfg(cfg):
        name = str(step['type']).split('.')[-1]
        if name in ('Resize', 'FixScaleResize') and step.get('scale'):
            step['scale'], changed = sides, True
        elif name == 'Pad' and step.get('size'):
            step['size'] = sides
    if not changed:
        raise ValueError('image_size needs a Resize with a scale in the test pipeline of the config, which has none')


# ---- images ---------------------------------------------------------------------------------------------------------
def find_files(folder: str | os.PathLike, suffixes: Sequence[str]) -> list[Path]:
    """The files below a folder with one of these suffixes, in any case; sorted, without hidden ones."""
    return sorted(
        path
        for path in Path(folder).rglob('*')
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith('.') for part in path.relative_to(folder).parts)
    )


def _read(image: object, channel_order: str) -> np.ndarray:
    """An image as (height, width, 3) uint8, RGB."""
    from PIL import Image

    from msda_plugin.engine.images import read_image

    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f'an image is a {type(image).__name__}; expected a path, a NumPy array, a PIL image, or a list of them'
        )
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or not image.size:
        raise ValueError(
            f'an image is an array {image.shape} {image.dtype}; expected (height, width), or (height, width, 1, 3 or 4 '
            'channels), uint8; several images are a list'
        )
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., :3] if channel_order == 'rgb' else image[..., 2::-1]


def _from_pil(image: 'Image.Image') -> np.ndarray:
    from PIL import ImageOps

    if image.mode in ('I', 'F'):
        raise ValueError(f'the image has 32 bits per pixel (mode {image.mode}); scale it to 8 bits first')
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I;16'):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(image.convert('RGB'))
    except OSError as error:  # PIL reads a file when its pixels are needed
        raise ValueError(f'the PIL image cannot be read: {error}') from None
