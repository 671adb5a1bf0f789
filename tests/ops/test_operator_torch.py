"""The operator with opcheck, torch.compile, torch.export, torch.func, autocast and ONNX."""

import io
import warnings

import pytest
import torch
from operator_cases import grid_sample_attention, locations_and_weights, make_case
from torch import nn
from torch.utils.checkpoint import checkpoint

from msda_plugin.ops import backend_for, ms_deform_attn, ms_deform_attn_fused, use_backend

needs_cpu = pytest.mark.skipif(backend_for('cpu', torch.float32).name != 'cpu', reason='libmsda_cpu is not built')


def op_arguments(name, dtype=torch.float32, requires_grad=True, reference_size=2, points=3):
    case = make_case(dtype=dtype, reference_size=reference_size, head_dim=8, points=points)
    if requires_grad:
        case.requires_grad()
    levels = (torch.tensor(case.shapes), torch.tensor([0, 35, 41]))
    tensors = case.fused() if 'fused' in name else case.plain()
    arguments = (tensors[0], *levels, *tensors[1:], False, case.num_points or [])
    return (torch.rand(2, 4, 16).to(dtype), *arguments) if name.endswith('backward') else arguments


@needs_cpu
@pytest.mark.parametrize(
    'name', ['ms_deform_attn', 'ms_deform_attn_backward', 'ms_deform_attn_fused', 'ms_deform_attn_fused_backward']
)
@pytest.mark.parametrize('dtype, points', [(torch.float32, 3), (torch.bfloat16, 3), (torch.float32, [2, 4, 1])])
def test_opcheck(name, dtype, points):
    # A second derivative is not traced ahead of time, so the backward operators are checked without gradients.
    arguments = op_arguments(name, dtype, requires_grad=not name.endswith('backward'), points=points)
    torch.library.opcheck(getattr(torch.ops.msda, name).default, arguments)


class Attention(nn.Module):
    """The plain and the fused form, with levels as a tensor."""

    def forward(self, value, shapes, locations, weights, reference_points, offsets, logits):
        return ms_deform_attn(value, shapes, None, locations, weights) + ms_deform_attn_fused(
            value, shapes, None, reference_points, offsets, logits
        )


def module_inputs(dtype=torch.float32, **sizes):
    case = make_case(dtype=dtype, **sizes)
    return case, (case.value, torch.tensor(case.shapes), *case.plain()[1:], *case.fused()[1:])


def expected_output(case):
    plain = grid_sample_attention(case.value, case.shapes, case.locations, case.weights)
    locations, weights = locations_and_weights(case.shapes, *case.fused()[1:])
    return plain + grid_sample_attention(case.value, case.shapes, locations, weights)


@pytest.mark.parametrize('backend', ['reference', pytest.param('cpu', marks=needs_cpu)])
def test_compile_once_for_all_sizes(backend):
    """No graph break, one graph for all sizes, and the gradients of eager mode."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with use_backend(backend):
        compiled = torch.compile(Attention(), fullgraph=True, dynamic=True, backend=counting)
        # Sizes that are equal at first share a symbol, so they all differ here.
        for sizes in (
            {'batch': 5, 'queries': 8},
            {'batch': 4, 'queries': 19},
            {'batch': 7, 'shapes': [(8, 9), (4, 4), (2, 3)], 'queries': 13},
        ):
            case, inputs = module_inputs(**sizes)
            torch.testing.assert_close(compiled(*inputs), expected_output(case), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@needs_cpu
@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    case, inputs = module_inputs()
    inputs = tuple(t.requires_grad_() if t.is_floating_point() else t for t in inputs)
    differentiable = [t for t in inputs if t.requires_grad]
    compiled = torch.compile(Attention(), fullgraph=True)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), differentiable)
    expected = torch.autograd.grad(Attention()(*inputs).square().sum(), differentiable)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@needs_cpu
@pytest.mark.parametrize('points', [3, [2, 4, 1]], ids=str)
def test_compile_with_pairs_and_choices(points):
    """Levels as pairs. A compiled function follows a later choice of backend."""
    torch._dynamo.reset()
    case = make_case(dtype=torch.float32, points=points)
    compiled = torch.compile(
        lambda v, p, w: ms_deform_attn(v, case.shapes, None, p, w, num_points=case.num_points),
        fullgraph=True,
        backend='eager',
    )
    expected = grid_sample_attention(case.value, case.shapes, case.locations, case.weights, case.num_points)
    torch.testing.assert_close(compiled(*case.plain()), expected)
    with use_backend('reference'):
        torch.testing.assert_close(compiled(*case.plain()), expected)
    with use_backend('cuda'), pytest.raises(Exception, match='cuda'):
        compiled(*case.plain())


@needs_cpu
def test_export():
    case, inputs = module_inputs(batch=2, queries=6)
    batch, queries = torch.export.Dim('batch'), torch.export.Dim('queries')
    both = {0: batch, 1: queries}
    program = torch.export.export(Attention(), inputs, dynamic_shapes=({0: batch}, {}, both, both, both, both, both))
    other, other_inputs = module_inputs(batch=3, queries=11, seed=5)
    torch.testing.assert_close(program.module()(*other_inputs), expected_output(other))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {'msda.ms_deform_attn.default', 'msda.ms_deform_attn_fused.default'} <= targets


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
def test_onnx(dynamo):
    """The exported model decomposes the operator, and onnxruntime agrees with it."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript' if dynamo else 'onnx')
    case, inputs = module_inputs(shapes=[(6, 7), (3, 4)], queries=5, head_dim=8)
    inputs[2][0, 0, 0, 0, 0] = -3.0
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        names = ['value', 'shapes', 'locations', 'weights', 'points', 'offsets', 'logits']
        torch.onnx.export(Attention().eval(), inputs, file, input_names=names, dynamo=dynamo, opset_version=18)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    (output,) = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(output), Attention()(*inputs), rtol=1e-4, atol=1e-5)


class PointsPerLevel(nn.Module):
    def forward(self, value, shapes, reference_points, offsets, logits):
        return ms_deform_attn_fused(value, shapes, None, reference_points, offsets, logits, num_points=[2, 4])


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
def test_onnx_with_points_per_level(dynamo):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript' if dynamo else 'onnx')
    case = make_case(shapes=[(6, 7), (3, 4)], points=[2, 4], reference_size=4, dtype=torch.float32)
    inputs = (case.value, torch.tensor(case.shapes), *case.fused()[1:])
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        names = ['value', 'shapes', 'points', 'offsets', 'logits']
        torch.onnx.export(PointsPerLevel().eval(), inputs, file, input_names=names, dynamo=dynamo, opset_version=18)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    (output,) = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(output), PointsPerLevel()(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('backend', ['reference', pytest.param('cpu', marks=needs_cpu)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(backend, dtype):
    """A 16-bit value from a linear layer with float32 locations and weights: the output has the value's dtype."""
    case = make_case(dtype=torch.float32, head_dim=8)
    linear = nn.Linear(8, 8)
    with use_backend(backend), torch.autocast('cpu', dtype):
        value = linear(case.value)
        output = ms_deform_attn(value, case.shapes, None, case.locations, case.weights)
        fused = ms_deform_attn_fused(value, case.shapes, None, *case.fused()[1:])
    assert value.dtype == output.dtype == fused.dtype == dtype
    with torch.no_grad():
        exact = grid_sample_attention(value.float(), case.shapes, case.locations, case.weights)
    torch.testing.assert_close(output.float(), exact, rtol=2**-8, atol=1e-3)
    (output.sum() + fused.sum()).backward()
    assert linear.weight.grad.isfinite().all()


@needs_cpu
def test_float32_reference_points_cost_no_conversion():
    """Under autocast, offsets and logits come in 16 bits from their layers; they are not copied to float32."""
    case = make_case(dtype=torch.bfloat16)
    value, points, *rest = case.fused()
    with torch.profiler.profile() as profile, torch.no_grad():
        ms_deform_attn_fused(value, case.shapes, None, points.float(), *rest)
        assert points.float().dtype == torch.float32
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts['msda::ms_deform_attn_fused'] == 1
    assert counts['aten::_to_copy'] == 2  # those of this test


@needs_cpu
def test_fake_tensors_need_no_data():
    arguments = op_arguments('ms_deform_attn_fused', requires_grad=False)
    meta = [t.to('meta') if isinstance(t, torch.Tensor) else t for t in arguments]
    output = torch.ops.msda.ms_deform_attn_fused(*meta)
    assert output.is_meta and output.shape == (2, 4, 16)


def plain_and_fused(shapes):
    """Both forms, as functions of tensors."""

    def plain(value, locations, weights):
        return ms_deform_attn(value, shapes, None, locations, weights)

    def fused(value, reference_points, offsets, logits):
        return ms_deform_attn_fused(value, shapes, None, reference_points, offsets, logits)

    return plain, fused


def test_gradients_of_single_images():
    """A transform of a transform of torch.func: the gradients of each image, in one call."""
    case = make_case(batch=3)
    for form, tensors in zip(plain_and_fused(case.shapes), (case.plain(), case.fused()), strict=True):

        def loss(*image, form=form):
            return form(*(tensor[None] for tensor in image)).sin().sum()

        numbers = tuple(range(len(tensors)))
        together = torch.func.vmap(torch.func.grad(loss, numbers))(*tensors)
        for index in range(3):
            leaves = [tensor[index].clone().requires_grad_() for tensor in tensors]
            alone = torch.autograd.grad(loss(*leaves), leaves)
            torch.testing.assert_close([tensor[index] for tensor in together], list(alone))


def test_forward_mode_differentiation():
    case = make_case(shapes=((3, 2),), batch=1, queries=2).requires_grad()
    for form, tensors in zip(plain_and_fused(case.shapes), (case.plain(), case.fused()), strict=True):
        assert torch.autograd.gradcheck(form, tensors, check_forward_ad=True, check_backward_ad=False)


def test_checkpointing_recomputes_with_gradients():
    """The backward pass of the operator is the first to ask for saved tensors."""
    case = make_case().requires_grad()
    for form, tensors in zip(plain_and_fused(case.shapes), (case.plain(), case.fused()), strict=True):

        def block(value, *rest, form=form):
            return form(value.exp(), *rest)

        expected = torch.autograd.grad(block(*tensors).sum(), tensors)
        recomputed = checkpoint(block, *tensors, use_reentrant=False).sum()
        torch.testing.assert_close(torch.autograd.grad(recomputed, tensors), expected)


def test_compiled_autograd():
    case = make_case().requires_grad()
    for form, tensors in zip(plain_and_fused(case.shapes), (case.plain(), case.fused()), strict=True):
        expected = torch.autograd.grad(form(*tensors).sum(), tensors)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend='aot_eager', fullgraph=True)):
            form(*tensors).sum().backward()
        torch.testing.assert_close([tensor.grad for tensor in tensors], list(expected))
        for tensor in tensors:
            tensor.grad = None


@needs_cpu
def test_fused_keeps_only_its_inputs():
    case = make_case(dtype=torch.float32).requires_grad()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ms_deform_attn_fused(case.value, case.shapes, None, *case.fused()[1:])
    pointers = {t.data_ptr() for t in case.fused()}
    assert all(t.data_ptr() in pointers or t.dtype == torch.int64 for t in kept)


@needs_cpu
@pytest.mark.parametrize('deterministic', [None, True, False])
def test_deterministic_argument(deterministic):
    case = make_case(dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        outputs = [
            ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights, deterministic=deterministic)
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*outputs)
