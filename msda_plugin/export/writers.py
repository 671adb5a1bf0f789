"""Writes a detector as an ONNX file, an AOTInductor package or an OpenVINO model."""

import copy
import os
import warnings
from collections import Counter
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from torch import Tensor

from msda_plugin import compat
from msda_plugin.export.card import KEY, ModelCard
from msda_plugin.export.deployable import CannotExportError, DeployableDetector
from msda_plugin.export.onnx_operator import operator_as
from msda_plugin.export.runtimes import require
from msda_plugin.files import atomic_write
from msda_plugin.version import __version__

if TYPE_CHECKING:
    import onnx

OPSET = 17  # the first with LayerNormalization; GridSample needs 16
SUFFIXES = {'onnx': '.onnx', 'onnx-gather': '.onnx', 'onnx-custom': '.onnx', 'torch': '.pt2', 'openvino': '.xml'}
FORMATS = tuple(SUFFIXES)
FORMS = {'onnx': 'grid_sample', 'onnx-gather': 'gather', 'onnx-custom': 'custom'}
EXAMPLE = (2, 203, 331)  # batch, height and width of the example of a graph for any size


def write(detector: DeployableDetector, card: ModelCard, path: str | os.PathLike, *, tensorrt: bool = False) -> Counter:
    """Write a detector.

    Args:
        detector: In evaluation mode, on the CPU. It stays as it is; RT-DETR and D-FINE are fused in the file.
        card: Its format, batch and size are written, and the card itself.
        path: The file; its suffix is that of the format.
        tensorrt: In the format 'onnx-custom', the operator's node is that of TensorRT's plugin.

    Returns:
        The number of nodes of the graph by type.

    Raises:
        CannotExportError: If PyTorch cannot trace the detector.
        ImportError: If a package that the format needs is missing.
        ValueError: If the suffix is not that of the format.
    """
    path = Path(path)
    check_format(card.format, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(detector.model, 'fuse'):  # folds RepVGG branches, and removes layers that only the training needs
        detector = copy.deepcopy(detector)
        detector.model.fuse()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of tracing: the file is compared with PyTorch afterwards
        if card.format == 'torch':
            return _write_torch(detector, card, path)
        if card.format == 'openvino':
            return _write_openvino(detector, card, path)
        return _write_onnx(detector, card, path, 'tensorrt' if tensorrt else FORMS[card.format])


def make_card(
    detector: DeployableDetector,
    format: str,
    *,
    batch: int | None = 1,
    size: tuple[int, int] | None = None,
    dynamic: bool = False,
    half: bool = False,
) -> ModelCard:
    """Describe the file that a detector is written to.

    Args:
        detector: Its model has the config and class names, as those of `msda_plugin.engine.inference.load_detector`.
        format: One of :data:`FORMATS`.
        batch: Number of images in a batch; None: any, not with 'torch' and ``dynamic``.
        size: (height, width) of the images, pixels; None: the scale of the config's test pipeline.
        dynamic: Images of any size.
        half: 16-bit weights.

    Raises:
        CannotExportError: If the test pipeline does more than resize and pad, which no runtime would do, or the format
            cannot express images or batches of any size.
        ValueError: If the config has no class names.
    """
    cfg, names = detector.model.cfg, detector.model.dataset_meta.get('classes') or ()
    if not names and detector.detects:
        raise ValueError('the model has no class names; add metainfo=dict(classes=(…)) to test_dataloader.dataset')
    if format == 'torch' and dynamic and batch is None:
        raise CannotExportError(
            'torch.export compares strides with the batch, so a file for images of any size has a fixed one: choose it '
            'with --batch'
        )
    scale, keep_ratio = _resizing(cfg)
    size = None if dynamic else size or scale[::-1]
    detector.check_size(size)
    inputs, outputs = detector.tensors(batch, size)
    packages = ('onnx', 'onnxruntime') if format.startswith('onnx') else ('openvino',) if format == 'openvino' else ()
    return ModelCard(
        name=Path(cfg.filename).stem if cfg.filename else type(detector.model).__name__,
        format=format,
        class_names=tuple(names),
        batch=batch,
        size=size,
        scale=scale,
        keep_ratio=keep_ratio,
        pad_color=detector.pad_color,
        max_detections=detector.max_detections,
        half=half,
        inputs=inputs,
        outputs=outputs,
        versions=versions(*packages),
        note=detector.note,
    )


def _resizing(cfg: Config) -> tuple[tuple[int, int], bool]:
    """(width, height) that the test pipeline resizes images to, and whether it keeps their aspect ratio."""
    scale = None
    for step in get_test_pipeline_cfg(cfg):
        kind = step['type'] if isinstance(step['type'], str) else step['type'].__name__
        kind = kind.split('.')[-1]
        if kind in ('Resize', 'FixScaleResize') and step.get('scale'):
            side = step['scale']
            scale = (side, side) if isinstance(side, int) else tuple(side)
            keep_ratio = bool(step.get('keep_ratio', False))
        elif not kind.startswith(('Load', 'Pack', 'Pad')):
            raise CannotExportError(f'the test pipeline has the step {kind}; only Resize and Pad can be exported')
    if scale is None:
        raise CannotExportError('the test pipeline has no Resize with a scale, which tells the size of the images')
    return scale, keep_ratio


def check_format(format: str, path: Path) -> None:
    """Raise ValueError unless a format exists and the path has its suffix."""
    if format not in SUFFIXES:
        raise ValueError(f'the format is {format!r}; expected one of {", ".join(FORMATS)}')
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f'the format {format} is written to a {SUFFIXES[format]} file, got {path}')


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, and msda_plugin's."""
    found = dict(msda_plugin=__version__, torch=torch.__version__)
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _example(card: ModelCard) -> Tensor:
    size = card.size or EXAMPLE[1:]
    shape = (card.batch or EXAMPLE[0], *size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _reason(error: Exception) -> str:
    return ' '.join(str(error).split())[:400] or type(error).__name__


# ---- ONNX -----------------------------------------------------------------------------------------------------------
def _write_onnx(detector: DeployableDetector, card: ModelCard, path: Path, form: str) -> Counter:
    onnx = require('onnx')
    named = {('images', 1): 'height', ('images', 2): 'width', ('masks', 2): 'height', ('masks', 3): 'width'}
    dynamic = {
        name: {
            axis: named.get((name, axis), f'{name}_{axis}' if axis else 'batch')
            for axis, side in enumerate(tensor['shape'])
            if side is None
        }
        for name, tensor in {**card.inputs, **card.outputs}.items()
    }
    with atomic_write(path) as unfinished:
        try:
            with operator_as(form), compat.trace_sizes_of_unflatten():
                torch.onnx.export(
                    detector,
                    (_example(card),),
                    str(unfinished),
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=['images'],
                    output_names=list(card.outputs),
                    dynamic_axes=dynamic,
                )
        except torch.onnx.errors.OnnxExporterError as error:
            raise CannotExportError(f'ONNX cannot express a part of the detector: {_reason(error)}') from error
        model = onnx.load(str(unfinished))
        if card.half:
            model = _half(model, detector)
        onnx.helper.set_model_props(model, {KEY: card.to_json()})
        onnx.checker.check_model(model)
        onnx.save(model, str(unfinished))
    return Counter(node.op_type for node in model.graph.node)


def _half(model: 'onnx.ModelProto', detector: DeployableDetector) -> 'onnx.ModelProto':
    """Convert the layers to float16. Coordinates stay float32: 11 bits are a pixel of a large image."""
    require('onnxruntime')
    from onnx import helper
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    modules = detector.model.named_modules()
    sampling = {f'.{name}' for name, module in modules if isinstance(module, MultiScaleDeformableAttention)}

    def computes_coordinates(node: 'onnx.NodeProto') -> bool:
        parent = node.name.replace('/', '.').rpartition('.')[0]  # the module that the node belongs to
        outside_of_layers = node.name.count('/') <= 2 and node.op_type not in ('Conv', 'Gemm', 'MatMul')
        return outside_of_layers or parent in sampling

    converted = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, 'GridSample', 'Range', 'ScatterND'],
        node_block_list=[node.name for node in model.graph.node if computes_coordinates(node)],
    )
    # A weight of several nodes in float32 is cast once for each of them, under one name.
    nodes = {tuple(node.output): node for node in converted.graph.node}
    # Between two nodes in float32, the converter rounds to float16 and back.
    producers = {output: node for node in nodes.values() for output in node.output}
    for node in nodes.values():
        rounding = producers.get(node.input[0]) if _is_cast(node, 'FLOAT') else None
        if rounding is not None and _is_cast(rounding, 'FLOAT16'):
            source = producers.get(rounding.input[0])
            if source is not None and computes_coordinates(source):
                node.CopyFrom(helper.make_node('Identity', [rounding.input[0]], list(node.output), name=node.name))
    del converted.graph.node[:]
    converted.graph.node.extend(nodes.values())
    sorted_model = OnnxModel(converted)
    sorted_model.topological_sort()
    return sorted_model.model


def _is_cast(node: 'onnx.NodeProto', dtype: str) -> bool:
    from onnx import TensorProto

    return node.op_type == 'Cast' and node.attribute[0].i == getattr(TensorProto, dtype)


# ---- OpenVINO -------------------------------------------------------------------------------------------------------
def _write_openvino(detector: DeployableDetector, card: ModelCard, path: Path) -> Counter:
    openvino = require('openvino')
    onnx_path = path.with_name(f'.{path.stem}.{os.getpid()}.onnx')
    try:
        _write_onnx(detector, card, onnx_path, 'grid_sample')
        try:
            model = openvino.convert_model(onnx_path)
        except RuntimeError as error:
            raise CannotExportError(f'OpenVINO cannot convert the detector: {_reason(error)}') from error
    finally:
        onnx_path.unlink(missing_ok=True)
    model.set_rt_info(card.to_json(), KEY)
    openvino.save_model(model, path, compress_to_fp16=card.half)
    return Counter(operation.get_type_name() for operation in model.get_ordered_ops())


# ---- torch ----------------------------------------------------------------------------------------------------------
def _write_torch(detector: DeployableDetector, card: ModelCard, path: Path) -> Counter:
    shape = card.inputs['images']['shape']
    dynamic = ({dim: torch.export.Dim.DYNAMIC for dim, side in enumerate(shape) if side is None},)
    half = torch.autocast('cpu', torch.bfloat16) if card.half else nullcontext()
    try:
        with half, compat.export_stock_detectors():
            program = torch.export.export(
                detector,
                (_example(card),),
                dynamic_shapes=dynamic,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,  # checked in the file
            )
    except Exception as error:
        raise CannotExportError(f'torch.export cannot trace the detector: {_reason(error)}') from error
    try:
        with atomic_write(path) as unfinished:
            written = torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(unfinished.with_suffix('.pt2')),
                inductor_configs={'aot_inductor.metadata': {KEY: card.to_json()}},
            )
            os.replace(written, unfinished)
    except Exception as error:
        raise CannotExportError(
            f'AOTInductor cannot compile the detector, or there is no C++ compiler: {_reason(error)}'
        ) from error
    return Counter(
        getattr(node.target, '__name__', str(node.target)) for node in program.graph.nodes if node.op == 'call_function'
    )
