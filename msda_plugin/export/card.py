"""What an exported file says about itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

KEY = 'msda_plugin'  # of the card in the metadata of ONNX files, OpenVINO models and AOTInductor packages

Size = tuple[int, int]


@dataclass(frozen=True)
class ModelCard:
    """Facts about an exported detector, stored in the file as JSON.

    The input ``images`` is (batch, height, width, 3) uint8, RGB. The outputs are ``boxes`` (batch, max_detections, 4)
    float32, x1 y1 x2 y2 in pixels of the input, ``scores`` (batch, max_detections) float32, 0-1, from high to low, and
    ``labels`` (batch, max_detections) int64, indices of ``class_names``. Rows after the last detection have label -1.
    Detectors that predict masks have a fourth output, ``masks`` (batch, max_detections, height, width) bool. Files with
    a ``note`` have other outputs, and ``max_detections`` 0.

    Attributes:
        name: Name of the config.
        format: 'onnx', 'onnx-gather', 'onnx-custom', 'torch' or 'openvino'.
        class_names: Names of the labels.
        batch: Number of images in a batch; None: any.
        size: (height, width) of the input, pixels; None: any.
        scale: (width, height) that the config resizes images to.
        keep_ratio: Images keep their aspect ratio; they then fill the top left of an input of fixed size.
        pad_color: RGB color, 0-255, of the rest of an input of fixed size.
        max_detections: Number of rows of the outputs.
        half: The weights are 16-bit.
        inputs, outputs: Shape and dtype by name; None in a shape is any size.
        versions: Versions of the packages that wrote the file.
        note: Which part of the model is in the file; empty for a whole detector.
    """

    name: str
    format: str
    class_names: tuple[str, ...]
    batch: int | None
    size: Size | None
    scale: Size
    keep_ratio: bool
    pad_color: tuple[int, ...]
    max_detections: int
    half: bool = False
    inputs: dict[str, dict] = field(default_factory=dict)
    outputs: dict[str, dict] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ''

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> 'ModelCard':
        """Read a card.

        Raises:
            ValueError: If the text is not a card.
        """
        try:
            values = json.loads(text)
            known = {item.name for item in fields(cls)}
            values = {name: _tuples(value) for name, value in values.items() if name in known}
            return cls(**values)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f'its metadata {KEY!r} cannot be read ({error}); export the detector again') from None


def _tuples(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def tensors(
    batch: int | None, size: Size | None, max_detections: int, masks: bool = False
) -> tuple[dict[str, dict], dict[str, dict]]:
    """``inputs`` and ``outputs`` of a card; the outputs contain ``masks`` if asked for."""

    def tensor(shape: Sequence[int | None], dtype: str) -> dict:
        return dict(shape=list(shape), dtype=dtype)

    height, width = size or (None, None)
    outputs = dict(
        boxes=tensor((batch, max_detections, 4), 'float32'),
        scores=tensor((batch, max_detections), 'float32'),
        labels=tensor((batch, max_detections), 'int64'),
    )
    if masks:
        outputs['masks'] = tensor((batch, max_detections, height, width), 'bool')
    return dict(images=tensor((batch, height, width, 3), 'uint8')), outputs
