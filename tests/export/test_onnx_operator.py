"""The operator in an ONNX file: each form against grid_sample in torch, in stock onnxruntime where it can run."""

import io
import re
import warnings
from collections import Counter

import onnx
import pytest
import torch
from operator_cases import grid_sample_attention, locations_and_weights, make_case
from torch import nn

import msda_plugin
from msda_plugin.export.onnx_operator import operator_as
from msda_plugin.libraries import LIBRARY_DIR
from msda_plugin.ops import ms_deform_attn, ms_deform_attn_fused

onnxruntime = pytest.importorskip('onnxruntime')

built = (LIBRARY_DIR / 'libmsda_onnxruntime.so').exists()
needs_library = pytest.mark.skipif(not built, reason='libmsda_onnxruntime.so is not built')

FORMS = ('grid_sample', 'gather', 'custom', 'tensorrt')
TENSORRT = 'MultiscaleDeformableAttnPlugin_TRT'
NODES = {  # of the plain and the fused operator
    'custom': [('msda_plugin', 'MSDeformAttn'), ('msda_plugin', 'MSDeformAttnFused')],
    'tensorrt': [('trt.plugins', TENSORRT)] * 2,
}
# Odd sizes, levels of one pixel, one row and one column.
SHAPES = ((7, 5), (3, 4), (1, 6), (5, 1), (1, 1))


class Both(nn.Module):
    """The plain and the fused operator; the levels' shapes are an input, or those of feature maps."""

    def forward(self, value, shapes, locations, weights, reference_points, offsets, logits):
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        plain = ms_deform_attn(value, shapes, starts, locations, weights)
        return plain, ms_deform_attn_fused(value, shapes, None, reference_points, offsets, logits)


NAMES = ['value', 'shapes', 'locations', 'weights', 'reference_points', 'offsets', 'logits']
AXES = {'value': {0: 'batch', 1: 'keys'}} | {name: {0: 'batch', 1: 'queries'} for name in NAMES[2:]}


def make_inputs(shapes=SHAPES, dtype=torch.float32, reference_size=2, **sizes):
    """Inputs of `Both`, with samples far outside, at edges and at centers of pixels; and the expected outputs."""
    case = make_case(shapes, reference_size=reference_size, spread=0.8, **sizes)
    case.locations[0, 0, 0, :, 0] = torch.tensor([-300.0, 1e4])
    case.locations[0, 1, 0, :, 0] = torch.tensor([0.0, 1.0])
    case.locations[0, 2, 0, :, 0] = torch.tensor([0.5, 0.5])
    case.offsets[0, 0] *= 1000
    # The expectation is exact: in float64, from the rounded inputs.
    case = case.to(dtype)
    exact = case.to(torch.float64)
    locations, weights = locations_and_weights(case.shapes, *exact.fused()[1:])
    expected = (
        grid_sample_attention(exact.value, case.shapes, exact.locations, exact.weights),
        grid_sample_attention(exact.value, case.shapes, locations, weights),
    )
    return (case.value, torch.tensor(case.shapes), *case.plain()[1:], *case.fused()[1:]), expected


def export(model, inputs, form, **options):
    file = io.BytesIO()
    options = {'opset_version': 16, 'dynamo': False} | options
    with operator_as(form), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model.eval(), inputs, file, **options)
    return onnx.load_from_string(file.getvalue())


def run(model, inputs, library=None):
    options = onnxruntime.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    arrays = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, arrays)]


def counts(model):
    return Counter((node.domain, node.op_type) for node in model.graph.node)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('reference_size', [2, 4])
def test_forms_in_torch(form, reference_size):
    """Within the block, torch computes the form itself."""
    inputs, expected = make_inputs(reference_size=reference_size)
    with operator_as(form):
        outputs = Both()(*inputs)
    for output, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, e.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('form', FORMS[:2])
@pytest.mark.parametrize('reference_size', [2, 4])
@pytest.mark.parametrize('opset', [16, 20])
def test_decompositions_in_onnxruntime(form, reference_size, opset):
    inputs, expected = make_inputs(reference_size=reference_size)
    model = export(Both(), inputs, form, input_names=NAMES, opset_version=opset)
    assert {domain for domain, _ in counts(model)} == {''}
    assert counts(model)['', 'GridSample'] == (2 * len(SHAPES) if form == 'grid_sample' else 0)
    for output, e in zip(run(model, inputs), expected, strict=True):
        torch.testing.assert_close(output, e.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('form', FORMS[:2])
def test_dynamic_sizes(form):
    """Batch, queries and the sizes of the levels, which come as a tensor."""
    inputs, _ = make_inputs()
    model = export(Both(), inputs, form, input_names=NAMES, dynamic_axes=AXES)
    for sizes in (
        {'batch': 1, 'queries': 3},
        {'batch': 3, 'queries': 9, 'shapes': ((4, 9), (2, 2), (1, 1), (1, 3), (6, 5)), 'seed': 1},
    ):
        other, expected = make_inputs(**sizes)
        for output, e in zip(run(model, other), expected, strict=True):
            torch.testing.assert_close(output, e.float(), rtol=1e-4, atol=2e-5)


class FromMaps(nn.Module):
    """The levels' shapes are those of feature maps: Python integers, or tensors while an export traces them."""

    def forward(self, locations, weights, *maps):
        value = torch.cat([image.flatten(2).transpose(1, 2) for image in maps], 1)
        value = value.view(*value.shape[:2], 2, -1)  # unflatten would record the sizes as numbers
        return ms_deform_attn(value, [image.shape[-2:] for image in maps], None, locations, weights)


@pytest.mark.parametrize('form', FORMS[:2])
def test_dynamic_maps(form):
    def maps_and_expected(shapes, seed):
        case = make_case(shapes, seed=seed, dtype=torch.float32)
        parts = case.value.flatten(2).split([h * w for h, w in shapes], 1)
        maps = [part.transpose(1, 2).unflatten(-1, size) for part, size in zip(parts, shapes, strict=True)]
        return (*case.plain()[1:], *maps), grid_sample_attention(case.value, shapes, case.locations, case.weights)

    inputs, _ = maps_and_expected([(5, 7), (3, 2)], 0)
    names = ['locations', 'weights', 'fine', 'coarse']
    axes = {'fine': {2: 'h', 3: 'w'}, 'coarse': {2: 'h2', 3: 'w2'}}
    model = export(FromMaps(), inputs, form, input_names=names, dynamic_axes=axes)
    other, expected = maps_and_expected([(4, 3), (9, 1)], 1)
    torch.testing.assert_close(run(model, other)[0], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('form', FORMS[:2])
def test_float16_computes_in_float32(form):
    inputs, expected = make_inputs(dtype=torch.float16)
    outputs = run(export(Both(), inputs, form, input_names=NAMES), inputs)
    for output, e in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float16
        torch.testing.assert_close(output, e.half(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('form', FORMS[2:])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_one_node(form, dtype):
    inputs, _ = make_inputs(dtype=dtype)
    model = export(Both(), inputs, form, input_names=NAMES)
    assert [(node.domain, node.op_type) for node in model.graph.node if node.domain] == NODES[form]
    assert counts(model)['', 'GridSample'] == 0
    assert {o.domain: o.version for o in model.opset_import} == {'': 16, NODES[form][0][0]: 1}
    # The sizes of the output are known to what follows.
    sizes = [[size.dim_value for size in output.type.tensor_type.shape.dim] for output in model.graph.output]
    assert sizes == [[2, 4, 12]] * 2


@needs_library
@pytest.mark.parametrize('form', FORMS[2:])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize('reference_size', [2, 4])
def test_one_node_in_onnxruntime(form, dtype, tolerance, reference_size):
    """With the library; the batch, the queries and the sizes of the levels change after the export."""
    inputs, _ = make_inputs(dtype=dtype, reference_size=reference_size)
    model = export(Both(), inputs, form, input_names=NAMES, dynamic_axes=AXES)
    for sizes in ({}, {'batch': 3, 'queries': 9, 'shapes': ((4, 9), (2, 2), (1, 1), (1, 3), (6, 5)), 'seed': 1}):
        other, expected = make_inputs(dtype=dtype, reference_size=reference_size, **sizes)
        for output, e in zip(run(model, other, msda_plugin.onnxruntime_library()), expected, strict=True):
            torch.testing.assert_close(output, e.to(dtype), rtol=tolerance, atol=tolerance)


def test_tensorrt_inputs():
    """The value first, then shapes and starts in int32, as NVIDIA's plugin takes them; everything else in float32."""
    inputs, _ = make_inputs(dtype=torch.float16)
    model = export(Both(), inputs, 'tensorrt', input_names=NAMES)
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {info.name: info.type.tensor_type.elem_type for info in known}
    nodes = [node for node in model.graph.node if node.op_type == TENSORRT]
    float32, int32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    assert [[types[name] for name in node.input] for node in nodes] == [[float32, int32, int32, float32, float32]] * 2


def test_gather_is_the_default():
    inputs, _ = make_inputs()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(Both(), inputs, file, input_names=NAMES, dynamo=False, opset_version=16)
    assert counts(onnx.load_from_string(file.getvalue())) == counts(export(Both(), inputs, 'gather', input_names=NAMES))


def test_block_ends():
    """The form before the block returns, after an error too."""
    inputs, expected = make_inputs(dtype=torch.float64)
    with operator_as('gather'):
        with pytest.raises(TypeError, match=re.escape("torch.float64, but the form 'custom' needs float32 or float16")):
            with operator_as('custom'):
                Both()(*inputs)
        assert counts(export(Both(), inputs, 'gather', input_names=NAMES))['', 'GridSample'] == 0
    torch.testing.assert_close(Both()(*inputs)[0], expected[0])


def test_unknown_form():
    with pytest.raises(ValueError, match="form is 'trt', but one of grid_sample, gather, custom, tensorrt is needed"):
        with operator_as('trt'):
            pass
