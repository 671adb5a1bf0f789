"""Runs exported detectors. Needs the runtime of the file, and neither its config nor MMDetection.

`open_exported` chooses the runtime by the suffix: onnxruntime for ``.onnx``, torch for ``.pt2``, OpenVINO for ``.xml``.
All run on the CPU.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np

from msda_plugin.export.card import KEY, ModelCard

Detections = tuple[np.ndarray, ...]  # boxes, scores and labels, and masks if the detector predicts them


class ExportedModel(ABC):
    """A detector in a file of ``python -m msda_plugin export``.

    Args:
        path: The file.
        threads: Number of CPU threads; None: the runtime's choice.

    Attributes:
        card: What the file says about itself.
        runtime: Name and version of the runtime.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If the runtime is not installed.
        ValueError: If the file is broken, or ``export`` did not write it.
    """

    card: ModelCard
    runtime: str

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'the exported model {path} does not exist; write it with msda_plugin export')
        self._load(threads)

    @abstractmethod
    def _load(self, threads: int | None) -> None:
        """Load the file, and set ``card`` and ``runtime``."""

    @abstractmethod
    def _run(self, images: np.ndarray) -> Detections:
        """Run one batch of the card's shape and dtype."""

    def run(self, images: np.ndarray) -> Detections:
        """Run one batch, of exactly the card's shape.

        Args:
            images: (bs, height, width, 3) uint8, RGB.

        Returns:
            The card's outputs: boxes (bs, n, 4), scores (bs, n), labels (bs, n), and masks (bs, n, height, width) if
            the detector predicts them.

        Raises:
            ValueError: If shape or dtype are not those of the card, or the runtime fails.
        """
        # AOTInductor would read other sizes out of bounds.
        expected, dtype = self.card.inputs['images']['shape'], self.card.inputs['images']['dtype']
        fits = len(expected) == images.ndim and all(
            side in (None, given) for side, given in zip(expected, images.shape, strict=True)
        )
        if not fits or images.dtype != dtype:
            sides = ', '.join(str(side or 'any') for side in expected)
            raise ValueError(
                f'{self.path} takes images ({sides}) {dtype}: batch, height, width, RGB; got {images.shape} '
                f'{images.dtype}: resize them, or export the detector with another --size and --batch'
            )
        return self._run(np.ascontiguousarray(images))

    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect objects in images of any size; they are resized as the card says.

        Args:
            images: Each (height, width, 3) uint8, RGB.

        Returns:
            For each image boxes (n, 4), x1 y1 x2 y2 in pixels of the image, scores (n,), labels (n,), and masks
            (n, height, width) bool of the image if the detector predicts them.

        Raises:
            ValueError: If the file is not a whole detector.
        """
        self.check_detects()
        fitted = [fit(image, self.card) for image in images]
        results = []
        # Neighbors of the same size run together.
        for _, group in groupby(zip(images, fitted, strict=True), key=lambda pair: pair[1][0].shape):
            group = list(group)
            found = self.run_all([pixels for _, (pixels, _) in group])
            results += [
                _in_image(detections, image.shape, factors)
                for detections, (image, (_, factors)) in zip(found, group, strict=True)
            ]
        return results

    def check_detects(self) -> None:
        """Raise ValueError if the file is a part of a detector."""
        if self.card.note:
            raise ValueError(
                f'{self.path} gives no detections: it is the {self.card.note}; its outputs are those of run()'
            )

    def run_all(self, inputs: Sequence[np.ndarray]) -> list[Detections]:
        """Run inputs of one size, in batches of the card's size; returns the detections in each."""
        size, results = self.card.batch or len(inputs), []
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            outputs = self.run(np.stack(filled))
            results += [tuple(output[i] for output in outputs) for i in range(len(batch))]
        return results

    def _read_card(self, text: str | None) -> ModelCard:
        if not text:
            raise ValueError(f'{self.path} was not written by msda_plugin export: its classes are unknown')
        try:
            return ModelCard.from_json(text)
        except ValueError as error:
            raise ValueError(f'{self.path}: {error}') from None

    def _broken(self, error: Exception) -> ValueError:
        reason = ' '.join(str(error).split())[:300]
        return ValueError(f'{self.path} cannot be loaded: it is damaged, or not a {self.path.suffix} model ({reason})')

    def _failed(self, error: Exception, images: np.ndarray) -> ValueError:
        reason = ' '.join(str(error).split())[:300]
        return ValueError(f'{self.path} cannot run images {images.shape} ({reason})')


class OnnxModel(ExportedModel):
    """A ``.onnx`` file in onnxruntime."""

    def _load(self, threads: int | None) -> None:
        onnxruntime = require('onnxruntime')
        failures = _onnxruntime_errors(onnxruntime)
        self.runtime = f'onnxruntime {onnxruntime.__version__}'
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        content = self.path.read_bytes()
        if b'MSDeformAttn' in content or b'MultiscaleDeformableAttnPlugin_TRT' in content:
            from msda_plugin import onnxruntime_library

            options.register_custom_ops_library(str(onnxruntime_library()))
        try:
            self.session = onnxruntime.InferenceSession(self.path, options, providers=['CPUExecutionProvider'])
        except failures as error:
            raise self._broken(error) from None
        self.card = self._read_card(self.session.get_modelmeta().custom_metadata_map.get(KEY))
        self._failures = failures

    def _run(self, images: np.ndarray) -> Detections:
        try:
            return tuple(self.session.run(list(self.card.outputs), dict(images=images)))
        except self._failures as error:
            raise self._failed(error, images) from None


class TorchModel(ExportedModel):
    """A ``.pt2`` package of AOTInductor in torch, which contains compiled code: load only files that you trust."""

    def _load(self, threads: int | None) -> None:
        import torch

        import msda_plugin.ops  # noqa: F401  (the package calls torch.ops.msda)

        self.runtime = f'torch {torch.__version__}'
        if threads:
            torch.set_num_threads(threads)
        try:
            self.package = torch._inductor.aoti_load_package(str(self.path))
            metadata = self.package.get_metadata()
        except Exception as error:  # of many types, for files that are not packages
            raise self._broken(error) from None
        self.card = self._read_card(metadata.get(KEY))

    def _run(self, images: np.ndarray) -> Detections:
        import torch

        try:
            with torch.inference_mode():
                return tuple(output.numpy() for output in self.package(torch.from_numpy(images)))
        except RuntimeError as error:
            if self.card.size is None and 'Expected' in str(error):  # a condition on the sizes
                reason = ' '.join(str(error).split())[:200]
                raise ValueError(
                    f'{self.path} cannot run images {images.shape}: their coarsest map needs more than one row and '
                    f'column; enlarge them, or export the detector with --size ({reason})'
                ) from None
            raise self._failed(error, images) from None


class OpenVINOModel(ExportedModel):
    """An ``.xml`` file with its ``.bin`` in OpenVINO."""

    def _load(self, threads: int | None) -> None:
        openvino = require('openvino')
        self.runtime = f'openvino {version("openvino")}'
        core = openvino.Core()
        try:
            model = core.read_model(self.path)
            text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
        except RuntimeError as error:
            raise self._broken(error) from None
        self.card = self._read_card(text)
        # OpenVINO would choose bfloat16 where the processor has it.
        options = dict(PERFORMANCE_HINT='LATENCY', INFERENCE_PRECISION_HINT='f32')
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        self.compiled = core.compile_model(model, 'CPU', options)

    def _run(self, images: np.ndarray) -> Detections:
        try:
            found = self.compiled(dict(images=images))
        except RuntimeError as error:
            raise self._failed(error, images) from None
        return tuple(np.array(found[name]) for name in self.card.outputs)


RUNTIMES = {'.onnx': OnnxModel, '.pt2': TorchModel, '.xml': OpenVINOModel}


def open_exported(path: str | os.PathLike, threads: int | None = None) -> ExportedModel:
    """Load an exported detector; arguments and errors are those of :class:`ExportedModel`."""
    if not is_exported(path):
        raise ValueError(f'{path} is not an exported model; expected a file with the suffix {", ".join(RUNTIMES)}')
    return RUNTIMES[Path(path).suffix](path, threads)


def is_exported(path: object) -> bool:
    """Whether a path has the suffix of an exported model."""
    return isinstance(path, (str, os.PathLike)) and Path(path).suffix in RUNTIMES


def require(package: str) -> ModuleType:
    """Import a package of ``msda_plugin[export]``.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f'{package} is needed ({error}); pip install msda_plugin[export]') from None


def _onnxruntime_errors(onnxruntime: ModuleType) -> tuple[type[Exception], ...]:
    state = onnxruntime.capi.onnxruntime_pybind11_state
    errors = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*errors, RuntimeError, ValueError)


# ---- images ---------------------------------------------------------------------------------------------------------
def fit(image: np.ndarray, card: ModelCard) -> tuple[np.ndarray, tuple[float, float]]:
    """Resize an image for the model.

    Args:
        image: (height, width, 3) uint8, RGB.
        card: Of the model.

    Returns:
        The input, (height, width, 3) uint8, and the factors of width and height that the image was resized by.
    """
    height, width = image.shape[:2]
    if card.size is not None:
        target = card.size[::-1]
        factor = min(target[0] / width, target[1] / height)
    else:
        target = card.scale
        factor = min(max(target) / max(height, width), min(target) / min(height, width))
    if card.keep_ratio:
        resized = max(int(width * factor + 0.5), 1), max(int(height * factor + 0.5), 1)
    else:
        resized = tuple(target)
    pixels = image if resized == (width, height) else cv2.resize(image, resized, interpolation=cv2.INTER_LINEAR)
    if card.size is not None and pixels.shape[:2] != tuple(card.size):
        padded = np.empty((*card.size, 3), np.uint8)
        padded[:] = card.pad_color
        padded[: pixels.shape[0], : pixels.shape[1]] = pixels
        pixels = padded
    return pixels, (resized[0] / width, resized[1] / height)


def _in_image(detections: Detections, shape: tuple[int, ...], factors: tuple[float, float]) -> Detections:
    """The detections of an input, without empty rows, in pixels of the image."""
    boxes, scores, labels, *masks = detections
    found = labels >= 0
    boxes = boxes[found] / np.array(factors * 2, np.float32)
    height, width = shape[:2]
    boxes = np.clip(boxes, 0, np.array((width, height) * 2, np.float32))
    resized = [_resize_masks(part[found], (height, width), factors) for part in masks]
    return boxes, scores[found], labels[found].astype(np.int64), *resized


def _resize_masks(masks: np.ndarray, size: tuple[int, int], factors: tuple[float, float]) -> np.ndarray:
    """Masks (n, height, width) of an input at the (height, width) of the image, without the input's padding."""
    if masks.shape[1:] == size and factors == (1, 1):
        return masks
    rows, columns = round(size[0] * factors[1]), round(size[1] * factors[0])
    resized = np.zeros((len(masks), *size), bool)
    for mask, target in zip(masks[:, :rows, :columns], resized, strict=True):
        target[:] = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) > 0.5
    return resized
