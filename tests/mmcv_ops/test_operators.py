"""The operators against compiled mmcv (golden file, and directly where it is installed) and against definitions."""

import ast
import importlib
import importlib.util
import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from msda_plugin.mmcv_ops import extension, torchvision_ops
from msda_plugin.mmcv_ops.nms import nms


def _cases():
    spec = importlib.util.spec_from_file_location('operator_cases', Path(__file__).parent / 'operator_cases.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _cases()
GOLDEN = np.load(Path(__file__).parents[1] / 'golden' / 'mmcv_ops.npz')


@pytest.fixture(autouse=True)
def pytorch_path(monkeypatch):
    """PyTorch's path runs, also where torchvision is installed."""
    monkeypatch.setattr(torchvision_ops, 'find', lambda device_type: (None, 'disabled by the test'))


@pytest.fixture
def compiled():
    ext = pytest.importorskip('mmcv._ext', reason='mmcv has no operators')
    if ext.__file__.endswith('.py'):
        pytest.skip('mmcv has no compiled operators')
    return ext


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f'{name}: {text}')


@pytest.mark.parametrize('name', cases.CASES)
def test_equals_golden(name):
    for output, value in cases.CASES[name](extension).items():
        expected = torch.from_numpy(GOLDEN[f'{name}/{output}'])
        assert value.shape == expected.shape
        assert_close(value.to(expected.dtype), expected, rtol=1e-5, atol=1e-6)


class _OnDevice:
    """The extension, called with copies of its tensors on another device."""

    def __init__(self, device):
        self.device = device

    def __getattr__(self, name):
        def call(*args, **kwargs):
            moved = [a.to(self.device, copy=True) if isinstance(a, torch.Tensor) else a for a in args]
            result = getattr(extension, name)(*moved, **kwargs)
            for original, copy in zip(args, moved, strict=True):
                if isinstance(original, torch.Tensor):
                    original.copy_(copy)
            return result.cpu() if isinstance(result, torch.Tensor) else result

        return call


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize(
    'name', [name for name in cases.CASES if not name.startswith(('softnms', 'nms_match')) and 'equal' not in name]
)
def test_equals_golden_on_gpu(name):
    for output, value in cases.CASES[name](_OnDevice('cuda')).items():
        expected = torch.from_numpy(GOLDEN[f'{name}/{output}'])
        assert_close(value.to(expected.dtype), expected, rtol=1e-5, atol=1e-6)


def test_golden_file_has_every_case():
    assert {name.rpartition('/')[0] for name in GOLDEN.files} == set(cases.CASES)


@pytest.mark.parametrize('name', cases.CASES)
def test_equals_compiled(name, compiled):
    assert_equal(cases.CASES[name](extension), cases.CASES[name](compiled), 1e-6 if 'nms' in name else 1e-11)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('offset', (0, 1))
def test_random_boxes_equal_compiled(compiled, seed, offset):
    count = (3, 50, 700, 2000)[seed]
    inputs = cases.boxes_and_scores(count, seed, extent=5 * math.sqrt(count))
    inputs = (inputs[0], (inputs[1] * 20).round() / 20)  # many equal scores
    for threshold in (0.0, 0.3, 0.7):
        found, expected = (cases.run_nms(ext, *inputs, threshold, offset) for ext in (extension, compiled))
        assert_equal(found, expected, 0)
    found, expected = (cases.run_nms_match(ext, *inputs) for ext in (extension, compiled))
    assert_equal(found, expected, 0)
    for method in range(3):
        found, expected = (
            cases.run_softnms(ext, *inputs, method, min_score=0.2, offset=offset) for ext in (extension, compiled)
        )
        assert_equal(found, expected, 1e-6)


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize('seed', range(6))
def test_random_regions_equal_compiled(compiled, seed, dtype):
    input = cases.feature((3, 5, 11, 9), seed, dtype)
    rois = cases.regions(20, seed, dtype, images=3, kind=('random', 'integer')[seed % 2])
    for ratio in (0, 1, 3):
        for pool_mode in (0, 1):
            options = dict(
                size=(2 + seed, 3), scale=0.25 if seed % 3 else 0.3, sampling_ratio=ratio, pool_mode=pool_mode
            )
            found, expected = (
                cases.run_roi_align(ext, input, rois, **options, aligned=seed < 3) for ext in (extension, compiled)
            )
            assert_equal(found, expected, 1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize('name', cases.CONVOLUTIONS)
def test_random_convolutions_equal_compiled(compiled, name, dtype):
    for seed in range(3):
        options = dict(cases.CONVOLUTIONS[name], image=(9 + seed, 8), batch=3)
        plain, modulated = (cases.convolution(seed, dtype, modulated, **options) for modulated in (False, True))
        for run, case in ((cases.run_deform_conv, plain), (cases.run_modulated_deform_conv, modulated)):
            assert_equal(run(extension, case), run(compiled, case), 2e-5 if dtype == torch.float32 else 1e-11)


def test_tensors_that_are_not_contiguous_equal_compiled(compiled):
    """channels_last, transposed and strided tensors. mmcv's kernels read flat memory, so they get contiguous ones."""
    last = dict(memory_format=torch.channels_last)
    input = cases.feature((2, 6, 10, 12), 1, torch.float32)
    rois = cases.regions(5, 1, torch.float32)
    for pool_mode in (0, 1):
        found = cases.run_roi_align(extension, input.to(**last), rois.T.contiguous().T, pool_mode=pool_mode)
        assert_equal(found, cases.run_roi_align(compiled, input, rois, pool_mode=pool_mode), 1e-5)
    boxes, scores = cases.boxes_and_scores(50, 1)
    found = cases.run_nms(extension, boxes.T.contiguous().T, scores[:, None].repeat(1, 2)[:, 1])
    assert_equal(found, cases.run_nms(compiled, boxes, scores), 0)
    for modulated, run in ((False, cases.run_deform_conv), (True, cases.run_modulated_deform_conv)):
        case = cases.convolution(1, torch.float64, modulated, deform_groups=2)
        expected = run(compiled, case)
        for name, value in vars(case).items():
            if isinstance(value, torch.Tensor) and value.ndim == 4:
                setattr(case, name, value.to(**last))
        assert_equal(run(extension, case), expected, 1e-11)


def test_one_region_and_one_image_equal_compiled(compiled):
    input, rois = cases.feature((1, 3, 10, 12), 1, torch.float64), cases.regions(1, 1, torch.float64, images=1)
    found, expected = (cases.run_roi_align(ext, input, rois) for ext in (extension, compiled))
    assert_equal(found, expected, 1e-11)
    case = cases.convolution(1, torch.float64, True, batch=1, image=(1, 1))
    found, expected = (cases.run_modulated_deform_conv(ext, case) for ext in (extension, compiled))
    assert_equal(found, expected, 1e-11)


def _larger_offsets():
    """Offsets and mask of a larger feature, as in DyHead."""
    case, larger = (cases.convolution(5, torch.float64, True, image=(size, 6)) for size in (7, 9))
    case.offset, case.mask = larger.offset, larger.mask
    return case


def test_offsets_of_a_larger_feature_equal_compiled(compiled):
    case = _larger_offsets()
    found, expected = (cases.run_modulated_deform_conv(ext, case) for ext in (extension, compiled))
    assert_equal(found, expected, 1e-11)


# ---- what compiled mmcv has not on the CPU --------------------------------------------------------------------------
def test_nms_takes_every_float_dtype():
    boxes, scores = cases.boxes_and_scores(300, 7)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        boxes_, scores_ = boxes.to(dtype), scores.to(dtype)
        expected = nms(boxes_.double(), scores_.double(), 0.5, 0)
        order = torch.sort(scores_, descending=True).indices
        if torch.equal(order, torch.sort(scores_.double(), descending=True).indices):
            assert_close(nms(boxes_, scores_, 0.5, 0), expected)
        assert len(nms(boxes_, scores_, 0.5, 0)) > 0


def test_nms_of_a_chain_of_boxes_alternates():
    """Each box suppresses the next one only: the longest chain of decisions."""
    count = 1000
    left = torch.arange(count).float()
    boxes = torch.stack([left, torch.zeros(count), left + 1.9, torch.ones(count)], 1)
    assert nms(boxes, -left, 0.3, 0).tolist() == list(range(0, count, 2))


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16), ids=str)
def test_low_precision_is_float32_rounded(dtype):
    tolerance = 2 * torch.finfo(dtype).eps
    input, rois = cases.feature((2, 3, 10, 12), 1, dtype), cases.regions(5, 1, dtype)
    found = cases.run_roi_align(extension, input, rois)['output']
    expected = cases.run_roi_align(extension, input.float(), rois.float())['output']
    assert found.dtype == dtype
    assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    case = cases.convolution(1, dtype, True)
    single = SimpleNamespace(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in vars(case).items()})
    found, expected = (cases.run_modulated_deform_conv(extension, c) for c in (case, single))
    for name, value in found.items():
        assert value.dtype == dtype
        scale = float(expected[name].abs().max())  # sums of rounded products
        assert_close(value.float(), expected[name], rtol=tolerance, atol=2 * tolerance * scale)


def test_autocast_leaves_the_dtype_of_deformable_convolution_alone():
    case = cases.convolution(1, torch.float32, True)
    expected = cases.run_modulated_deform_conv(extension, case)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_equal(cases.run_modulated_deform_conv(extension, case), expected, 0)


def test_nan_offsets_give_zero_gradients():
    case = cases.convolution(1, torch.float64, False)
    case.offset[0, 0, 0, 0] = math.nan
    found = cases.run_deform_conv(extension, case)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert found['grad_offset'][0, 0, 0, 0] == 0


def test_deformable_convolution_names_a_wrong_shape():
    case = cases.convolution(1, torch.float32, True)
    case.mask = case.mask[:, :-1]
    with pytest.raises(RuntimeError, match='mask has shape .* is needed'):
        cases.run_modulated_deform_conv(extension, case)


def test_aligned_regions_of_negative_size_raise():
    rois = torch.tensor([[0.0, 5, 5, 3, 8]])
    with pytest.raises(RuntimeError, match='x2 >= x1'):
        cases.run_roi_align(extension, torch.zeros(1, 1, 10, 12), rois)


def test_regions_in_several_chunks_equal_one_chunk(monkeypatch):
    from msda_plugin.mmcv_ops import roi

    input, rois = cases.feature((2, 3, 10, 12), 1, torch.float64), cases.regions(9, 1, torch.float64)
    runs = [
        lambda: cases.run_roi_align(extension, input, rois, pool_mode=0),
        lambda: cases.run_roi_align(extension, input, rois, pool_mode=1),
        lambda: cases.run_roi_pool(extension, input, rois),
    ]
    expected = [run() for run in runs]
    monkeypatch.setattr(roi, 'MAX_SAMPLES', 20)
    monkeypatch.setattr(roi, 'MAX_VALUES', 20)
    for run, values in zip(runs, expected, strict=True):
        assert_equal(run(), values, 1e-12)


def _roi_pool_definition(input, rois, size, scale):
    """The loops of mmcv's CUDA kernel."""
    height, width = input.shape[2:]
    output = torch.zeros(len(rois), input.shape[1], *size, dtype=input.dtype)
    argmax = torch.zeros(output.shape, dtype=torch.int)
    for n, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for ph in range(size[0]):
            for pw in range(size[1]):
                edges = [
                    (start + index * (end - start) / bins, start + (index + 1) * (end - start) / bins)
                    for start, end, index, bins in ((y1, y2, ph, size[0]), (x1, x2, pw, size[1]))
                ]
                (top, bottom), (left, right) = (
                    (min(max(math.floor(low), 0), length), min(max(math.ceil(high), 0), length))
                    for (low, high), length in zip(edges, (height, width), strict=True)
                )
                for c in range(input.shape[1]):
                    best, place = (-math.inf, -1) if bottom > top and right > left else (0.0, -1)
                    for y in range(top, bottom):
                        for x in range(left, right):
                            if input[int(image), c, y, x] > best:
                                best, place = input[int(image), c, y, x], y * width + x
                    output[n, c, ph, pw], argmax[n, c, ph, pw] = best, place
    return output, argmax


@pytest.mark.parametrize('kind', ('random', 'outside', 'integer', 'malformed', 'none'))
def test_roi_pool_equals_its_definition(kind):
    input = cases.feature((2, 3, 10, 12), 1, torch.float64)
    rois = cases.regions(0 if kind == 'none' else 5, 2, torch.float64, kind=kind)
    if kind == 'malformed':
        rois[0, 3] = rois[0, 1] - 3
    found = cases.run_roi_pool(extension, input, rois)
    output, argmax = _roi_pool_definition(input, rois, (3, 2), 0.25)
    assert_close(found['output'], output)
    assert torch.equal(found['argmax'], argmax)
    grad_output, expected = cases.feature(output.shape, 99, torch.float64), torch.zeros_like(input)
    for n, c, ph, pw in (argmax >= 0).nonzero().tolist():
        expected[int(rois[n, 0]), c].view(-1)[argmax[n, c, ph, pw]] += grad_output[n, c, ph, pw]
    assert_close(found['grad_input'], expected)


# ---- focal loss -----------------------------------------------------------------------------------------------------
@pytest.fixture
def focal_loss(monkeypatch):
    from mmcv.ops import focal_loss as module

    monkeypatch.setattr(module, 'ext_module', extension)
    return module


@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize('gamma, alpha', ((2.0, 0.25), (1.5, 0.6), (0.0, 0.5)))
def test_sigmoid_focal_loss_equals_mmdetection(focal_loss, dtype, gamma, alpha):
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    logits = cases.feature((9, 4), 1, torch.float64).mul(3).to(dtype).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 4, 0, 2, 4])  # 4 is the background
    factors = cases.feature((9, 4), 2, dtype)
    loss = focal_loss.sigmoid_focal_loss(logits, target, gamma, alpha, None, 'none')
    (grad,) = torch.autograd.grad(loss, logits, factors)
    exact = logits.detach().double().requires_grad_()
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4]
    expected = py_sigmoid_focal_loss(exact, one_hot, None, gamma, alpha, 'none')
    (expected_grad,) = torch.autograd.grad(expected, exact, factors.double())
    tolerance = dict(rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=max(1e-6, torch.finfo(dtype).eps))
    assert_close(loss.double(), expected, **tolerance)
    assert_close(grad.double(), expected_grad, **tolerance)


@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_softmax_focal_loss_equals_its_definition(focal_loss, dtype):
    logits = cases.feature((7, 4), 1, torch.float64).to(dtype).requires_grad_()
    target, weight = torch.tensor([0, 1, 2, 3, -1, 0, 2]), torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=dtype)
    loss = focal_loss.softmax_focal_loss(logits, target, 2.0, 0.25, weight, 'none')
    (grad,) = torch.autograd.grad(focal_loss.softmax_focal_loss(logits, target, 2.0, 0.25, weight, 'sum'), logits)
    exact = logits.detach().double().requires_grad_()
    index = target.clamp(min=0)
    probability = exact.softmax(1).gather(1, index[:, None])[:, 0]
    expected = -0.25 * (1 - probability) ** 2 * probability.log() * weight.double()[index] * (target >= 0)
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    tolerance = dict(rtol=max(1e-5, 4 * torch.finfo(dtype).eps), atol=max(1e-6, 2 * torch.finfo(dtype).eps))
    assert_close(loss.double(), expected, **tolerance)
    assert_close(grad.double(), expected_grad, **tolerance)


def test_sigmoid_focal_loss_of_extreme_logits_and_class_weights(focal_loss):
    logits = torch.tensor([[-200.0, 200.0], [200.0, -200.0], [0.0, 0.0]])
    target, weight = torch.tensor([0, 0, 2]), torch.tensor([2.0, 3.0])
    loss = focal_loss.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, 'none')
    least = math.log(torch.finfo(torch.float32).tiny)  # mmcv bounds the logarithm
    assert_close(loss[0], torch.tensor([-0.25 * 2 * least, -0.75 * 2 * least]))
    assert_close(loss[1], torch.zeros(2))
    assert_close(loss[2], torch.full((2,), 0.75 * 0.25 * math.log(2)))  # the background has no weight


# ---- deformable attention -------------------------------------------------------------------------------------------
@pytest.mark.parametrize('backend', (None, 'reference'))
def test_ms_deform_attn_equals_mmcv(monkeypatch, backend):
    from mmcv.ops import multi_scale_deform_attn as module

    from msda_plugin.ops import use_backend

    monkeypatch.setattr(module, 'ext_module', extension)
    shapes = torch.tensor([[6, 4], [3, 2]])
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 30, 2, 8), (2, 5, 2, 2, 3, 2), (2, 5, 2, 2, 3))
    ]
    expected = module.multi_scale_deformable_attn_pytorch(leaves[0], shapes, *leaves[1:])
    grad_output = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
    with use_backend(backend):
        output = module.MultiScaleDeformableAttnFunction.apply(
            leaves[0], shapes, torch.tensor([0, 24]), leaves[1], leaves[2], 64
        )
        grads = torch.autograd.grad(output, leaves, grad_output)
    assert_close(output, expected)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, leaves, grad_output), strict=True):
        assert_close(grad, expected_grad)


# ---- CARAFE and masked convolution ----------------------------------------------------------------------------------
@pytest.mark.parametrize('groups, kernel_size, scale', ((1, 5, 2), (2, 3, 3), (4, 1, 1)))
def test_carafe_equals_its_definition(monkeypatch, groups, kernel_size, scale):
    module = importlib.import_module('mmcv.ops.carafe')  # mmcv.ops.carafe itself is the function
    monkeypatch.setattr(module, 'ext_module', extension)
    features = cases.feature((2, 4, 5, 6), 1, torch.float64).requires_grad_()
    masks = cases.feature((2, groups * kernel_size**2, 5 * scale, 6 * scale), 2, torch.float64).requires_grad_()
    # (bs, groups, channels of a group, kernel_size², height, width)
    windows = torch.nn.functional.unfold(features, kernel_size, padding=kernel_size // 2)
    windows = windows.view(2, groups, 4 // groups, kernel_size**2, 5, 6)
    windows = windows.repeat_interleave(scale, 4).repeat_interleave(scale, 5)
    expected = (windows * masks.view(2, groups, 1, kernel_size**2, 5 * scale, 6 * scale)).sum(3).flatten(1, 2)
    output = module.carafe(features, masks, kernel_size, groups, scale)
    assert_close(output, expected)
    grad_output = cases.feature(expected.shape, 3, torch.float64)
    found = [torch.zeros_like(t) for t in (features, masks)]
    unused = [torch.empty(0)] * 4
    extension.carafe_backward(
        grad_output, features.detach(), masks.detach(), *unused, *found, kernel_size, groups, scale
    )
    for grad, expected_grad in zip(found, torch.autograd.grad(expected, (features, masks), grad_output), strict=True):
        assert_close(grad, expected_grad)


def test_masked_convolution_equals_convolution_where_the_mask_is(monkeypatch):
    from mmcv.ops import masked_conv as module

    monkeypatch.setattr(module, 'ext_module', extension)
    input, weight = cases.feature((1, 3, 6, 7), 1, torch.float32), cases.feature((5, 3, 3, 3), 2, torch.float32)
    bias, mask = cases.feature((5,), 3, torch.float32), cases.feature((1, 6, 7), 4, torch.float32)
    found = module.masked_conv2d(input, mask, weight, bias, 1)
    expected = torch.nn.functional.conv2d(input, weight, bias, padding=1) * (mask > 0)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- operators that are not there -----------------------------------------------------------------------------------
def _names_and_calls():
    """The names that the installed mmcv's Python files take from the extension, and their calls as (name, call)."""
    names, calls = set(), []
    for path in Path(importlib.util.find_spec('mmcv').submodule_search_locations[0]).rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'load_ext':
                names |= set(ast.literal_eval(node.args[1]))
            if isinstance(node, ast.Attribute) and getattr(node.value, 'id', '') == 'ext_module':
                names.add(node.attr)
            if isinstance(node, ast.Call) and getattr(getattr(node.func, 'value', None), 'id', '') == 'ext_module':
                calls.append((node.func.attr, node))
    return names, calls


def test_every_name_of_mmcv_runs_or_raises_one_sentence():
    names, _ = _names_and_calls()
    assert {'nms', 'roi_align_forward', 'knn_forward', 'sync_bn_forward_mean'} <= names and len(names) > 100
    assert set(extension.__all__) <= names
    for name in names - set(extension.__all__):
        with pytest.raises(NotImplementedError) as caught:
            getattr(extension, name)(torch.zeros(1), anything=1)
        said = str(caught.value)
        assert said.startswith(f'The operator {name} is not available') and 'Compile mmcv: ' in said
        assert '\n' not in said


def test_mmcv_calls_fit_the_signatures():
    checked = set()
    for name, call in _names_and_calls()[1]:
        if name in extension.__all__:
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
            signature = inspect.signature(getattr(extension, name))
            unpacks = len(keywords) < len(call.keywords)  # **options
            (signature.bind_partial if unpacks else signature.bind)(*call.args, **keywords)
            checked.add(name)
    assert checked == set(extension.__all__)


def test_other_operators_exist_and_raise_when_called():
    assert hasattr(extension, 'border_align_forward')
    with pytest.raises(NotImplementedError, match='border_align_forward is not available, .*: make setup MMCV_OPS=1'):
        extension.border_align_forward(1, pool_size=2)
    assert not hasattr(extension, '__path__')


# ---- torchvision ----------------------------------------------------------------------------------------------------
@pytest.fixture
def fake_torchvision(monkeypatch, compiled):
    """torchvision's three functions, with its signatures, made of compiled mmcv's; counts the calls."""
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d, roi_align
    from mmcv.ops import nms as mmcv_nms

    calls = []

    def run(name, function, *args):
        calls.append(name)
        return function(*args)

    def deform(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
        groups = input.shape[1] // weight.shape[1]
        deform_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
        if mask is None:
            function, tensors = deform_conv2d, (input, offset, weight)
        else:
            function, tensors = modulated_deform_conv2d, (input, offset, mask, weight, bias)
        return run('deform_conv2d', function, *tensors, stride, padding, dilation, groups, deform_groups)

    return SimpleNamespace(
        calls=calls,
        nms=lambda boxes, scores, iou_threshold: run('nms', mmcv_nms, boxes, scores, iou_threshold)[1],
        roi_align=lambda input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False: run(
            'roi_align', roi_align, input, boxes, output_size, spatial_scale, sampling_ratio, 'avg', aligned
        ),
        deform_conv2d=deform,
    )


def test_torchvision_is_accepted_when_it_agrees(fake_torchvision):
    assert torchvision_ops._disagreement(fake_torchvision, 'cpu') == ''
    for name in ('nms', 'roi_align', 'deform_conv2d'):
        wrong = SimpleNamespace(**vars(fake_torchvision))
        right = getattr(wrong, name)
        setattr(wrong, name, lambda *args, right=right, **kwargs: right(*args, **kwargs) + 1)
        assert torchvision_ops._disagreement(wrong, 'cpu') == name


@pytest.mark.parametrize('name', [name for name in cases.CASES if 'outside' not in name and 'empty' not in name])
def test_torchvision_runs_where_it_can(monkeypatch, fake_torchvision, name):
    monkeypatch.setattr(torchvision_ops, 'find', lambda device_type: (fake_torchvision, ''))
    test_equals_golden(name)
    uses_it = 'conv' in name or name.startswith('nms/') and 'offset1' not in name and not name.startswith('nms/0_')
    assert bool(fake_torchvision.calls) == uses_it


@pytest.mark.parametrize('aligned', (True, False))
def test_torchvision_pools_float32_regions(monkeypatch, fake_torchvision, aligned):
    input, rois = cases.feature((2, 3, 10, 12), 1, torch.float32), cases.regions(9, 1, torch.float32)
    expected = cases.run_roi_align(extension, input, rois, aligned=aligned)
    monkeypatch.setattr(torchvision_ops, 'find', lambda device_type: (fake_torchvision, ''))
    assert_equal(cases.run_roi_align(extension, input, rois, aligned=aligned), expected, 1e-5)
    assert fake_torchvision.calls == ['roi_align', 'roi_align']
    test_aligned_regions_of_negative_size_raise()


def test_torchvision_gets_no_equal_scores(monkeypatch):
    """It sorts them in another order than mmcv."""
    boxes, _ = cases.boxes_and_scores(40, 1)
    seen = []

    def run(boxes, scores, iou_threshold):
        seen.append(scores)
        return torch.arange(len(boxes))

    monkeypatch.setattr(torchvision_ops, 'find', lambda device_type: (SimpleNamespace(nms=run), ''))
    scores = torch.arange(40).remainder(5) / 5
    assert torch.equal(nms(boxes, scores, 0.5, 0), torch.sort(scores, descending=True).indices)
    assert bool((seen[0].diff() < 0).all())


@pytest.mark.parametrize('padding', ((1, 1), (3, 2)))
def test_torchvision_gets_no_samples_off_the_image(monkeypatch, fake_torchvision, padding):
    """It has a gradient at a coordinate of exactly -1, and crashes at NaN."""
    case = cases.convolution(5, torch.float64, True, spread=0.0, padding=padding)
    case.offset[0, 3, 2, 2], case.offset[1, 4, 1, 1] = math.nan, math.inf
    expected = cases.run_modulated_deform_conv(extension, case)
    seen = []
    run = fake_torchvision.deform_conv2d
    fake_torchvision.deform_conv2d = lambda input, offset, *args: (seen.append(offset), run(input, offset, *args))[1]
    monkeypatch.setattr(torchvision_ops, 'find', lambda device_type: (fake_torchvision, ''))
    assert_equal(cases.run_modulated_deform_conv(extension, case), expected, 1e-11)
    for offset in seen:
        assert bool(((offset == 0) | (offset == -1e6)).all())
        assert bool((offset[0, :, 0, 0] == -1e6).any()) and bool((offset[0, :, 3, 3] == 0).any())


@pytest.mark.parametrize('name', cases.CASES)
def test_installed_torchvision_equals_pytorch(monkeypatch, name):
    expected = cases.CASES[name](extension)
    monkeypatch.undo()
    if torchvision_ops.find('cpu')[0] is None:
        pytest.skip('no torchvision that runs')
    assert_equal(cases.CASES[name](extension), expected, 1e-11)


def test_torchvision_is_refused_with_a_reason(monkeypatch):
    monkeypatch.undo()
    find = torchvision_ops.find.__wrapped__
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    assert find('cpu') == (None, 'torchvision is not installed')

    def missing_operator(*args):
        raise RuntimeError('operator torchvision::nms does not exist')

    broken = SimpleNamespace(ops=SimpleNamespace(nms=missing_operator))
    monkeypatch.setitem(sys.modules, 'torchvision', broken)
    ops, reason = find('cpu')
    assert ops is None and reason == 'torchvision does not run on cpu: operator torchvision::nms does not exist'


def test_low_precision_does_not_use_torchvision(monkeypatch, fake_torchvision):
    monkeypatch.setattr(torchvision_ops, 'find', lambda device_type: (fake_torchvision, ''))
    boxes, scores = cases.boxes_and_scores(5, 1)
    nms(boxes.half(), scores.half(), 0.5, 0)
    assert not fake_torchvision.calls
