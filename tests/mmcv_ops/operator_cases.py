"""Cases for mmcv's operators, called as mmcv's Python calls its compiled extension.

``CASES`` maps a name to a function ``run(ext) -> {output name: tensor}``, where `ext` is ``mmcv._ext`` or its
substitute. Inputs are drawn by NumPy, so they are the same with every version of PyTorch.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import torch

F64, F32 = torch.float64, torch.float32


def _random(seed):
    return np.random.RandomState(seed)


def _tensor(array, dtype):
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


# ---- nms ------------------------------------------------------------------------------------------------------------
def boxes_and_scores(count, seed, extent=60.0, equal=False):
    random = _random(seed)
    xy = random.uniform(-10, extent, (count, 2))
    boxes = np.concatenate([xy, xy + random.uniform(0, 30, (count, 2))], 1)
    scores = np.full(count, 0.5) if equal else random.permutation(count) / max(1, count)
    return _tensor(boxes, F32), _tensor(scores, F32)


def run_nms(ext, boxes, scores, iou_threshold=0.5, offset=0):
    return dict(kept=ext.nms(boxes, scores, iou_threshold=float(iou_threshold), offset=offset))


def run_softnms(ext, boxes, scores, method, iou_threshold=0.3, sigma=0.5, min_score=1e-3, offset=0):
    dets = boxes.new_zeros((boxes.size(0), 5), device='cpu')
    kept = ext.softnms(
        boxes.cpu(),
        scores.cpu(),
        dets.cpu(),
        iou_threshold=float(iou_threshold),
        sigma=float(sigma),
        min_score=float(min_score),
        method=int(method),
        offset=int(offset),
    )
    return dict(kept=kept, dets=dets[: kept.size(0)])


def run_nms_match(ext, boxes, scores, iou_threshold=0.5):
    groups = ext.nms_match(torch.cat([boxes, scores[:, None]], 1), iou_threshold=float(iou_threshold))
    return dict(members=torch.tensor(sum(groups, [])), sizes=torch.tensor([len(group) for group in groups]))


# ---- RoIs -----------------------------------------------------------------------------------------------------------
def feature(shape, seed, dtype):
    return _tensor(_random(seed).randn(*shape), dtype)


def regions(count, seed, dtype, images=2, extent=40.0, kind='random'):
    """(count, 5) RoIs on and around an image of 40 x 48 pixels, that is a feature of 10 x 12 with a scale of 1/4."""
    random = _random(seed)
    xy = random.uniform(-15, extent, (count, 2))
    sizes = random.uniform(0, 35, (count, 2))
    if kind == 'empty':
        sizes[:] = 0
    if kind == 'outside':
        xy += 200
    if kind == 'integer':
        xy, sizes = xy.round(), sizes.round()
    index = random.randint(0, images, (count, 1))
    return _tensor(np.concatenate([index, xy, xy + sizes], 1), dtype)


def run_roi_align(ext, input, rois, size=(3, 2), scale=0.25, sampling_ratio=0, pool_mode=1, aligned=True):
    shape = (rois.size(0), input.size(1), *size)
    output = input.new_zeros(shape)
    argmax_y, argmax_x = (input.new_zeros(shape if pool_mode == 0 else 0) for _ in range(2))
    options = dict(
        aligned_height=size[0],
        aligned_width=size[1],
        spatial_scale=scale,
        sampling_ratio=sampling_ratio,
        pool_mode=pool_mode,
        aligned=aligned,
    )
    ext.roi_align_forward(input, rois, output, argmax_y, argmax_x, **options)
    grad_output = feature(shape, 99, input.dtype).to(input.device)
    grad_input = torch.zeros_like(input)
    ext.roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, **options)
    found = dict(output=output, grad_input=grad_input)
    return found if pool_mode == 1 else dict(found, argmax_y=argmax_y, argmax_x=argmax_x)


def run_roi_pool(ext, input, rois, size=(3, 2), scale=0.25):
    shape = (rois.size(0), input.size(1), *size)
    output, argmax = input.new_zeros(shape), input.new_zeros(shape, dtype=torch.int)
    options = dict(pooled_height=size[0], pooled_width=size[1], spatial_scale=scale)
    ext.roi_pool_forward(input, rois, output, argmax, **options)
    grad_input = torch.zeros_like(input)
    ext.roi_pool_backward(feature(shape, 99, input.dtype).to(input.device), rois, argmax, grad_input, **options)
    return dict(output=output, argmax=argmax, grad_input=grad_input)


# ---- deformable convolution -----------------------------------------------------------------------------------------
def convolution(
    seed,
    dtype,
    modulated,
    channels=(4, 6),
    image=(7, 6),
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=1,
    deform_groups=1,
    batch=2,
    spread=2.0,
    bias=True,
):
    """Tensors and geometry; `spread` is the standard deviation of the offsets, and 0 samples at pixels exactly."""
    random = _random(seed)
    out = [
        (length + 2 * pad - step * (size - 1) - 1) // move + 1
        for length, size, move, pad, step in zip(image, kernel, stride, padding, dilation, strict=True)
    ]
    samples = deform_groups * kernel[0] * kernel[1]

    def draw(*shape, scale=1.0):
        return _tensor(random.randn(*shape) * scale, dtype)

    return SimpleNamespace(
        input=draw(batch, channels[0], *image),
        weight=draw(channels[1], channels[0] // groups, *kernel),
        bias=draw(channels[1]) if bias else draw(0),
        with_bias=bias,
        offset=draw(batch, 2 * samples, *out, scale=spread),
        mask=draw(batch, samples, *out).sigmoid() if modulated else None,
        grad_output=draw(batch, channels[1], *out),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=deform_groups,
    )


def run_deform_conv(ext, case):
    output = torch.empty_like(case.grad_output)
    options = dict(
        kW=case.kernel[1],
        kH=case.kernel[0],
        dW=case.stride[1],
        dH=case.stride[0],
        padW=case.padding[1],
        padH=case.padding[0],
        dilationW=case.dilation[1],
        dilationH=case.dilation[0],
        group=case.groups,
        deformable_group=case.deform_groups,
    )
    step = len(case.input)
    columns, ones = case.input.new_empty(0), case.input.new_empty(0)
    ext.deform_conv_forward(case.input, case.weight, case.offset, output, columns, ones, **options, im2col_step=step)
    grad_input, grad_offset, grad_weight = map(torch.zeros_like, (case.input, case.offset, case.weight))
    ext.deform_conv_backward_input(
        case.input,
        case.offset,
        case.grad_output,
        grad_input,
        grad_offset,
        case.weight,
        columns,
        **options,
        im2col_step=step,
    )
    ext.deform_conv_backward_parameters(
        case.input, case.offset, case.grad_output, grad_weight, columns, ones, **options, scale=1, im2col_step=step
    )
    return dict(output=output, grad_input=grad_input, grad_offset=grad_offset, grad_weight=grad_weight)


def run_modulated_deform_conv(ext, case):
    output = torch.empty_like(case.grad_output)
    options = dict(
        kernel_h=case.kernel[0],
        kernel_w=case.kernel[1],
        stride_h=case.stride[0],
        stride_w=case.stride[1],
        pad_h=case.padding[0],
        pad_w=case.padding[1],
        dilation_h=case.dilation[0],
        dilation_w=case.dilation[1],
        group=case.groups,
        deformable_group=case.deform_groups,
        with_bias=case.with_bias,
    )
    ones, columns = case.input.new_empty(0), case.input.new_empty(0)
    ext.modulated_deform_conv_forward(
        case.input, case.weight, case.bias, ones, case.offset, case.mask, output, columns, **options
    )
    names = ('input', 'weight', 'bias', 'offset', 'mask')
    grads = {f'grad_{name}': torch.zeros_like(getattr(case, name)) for name in names}
    ext.modulated_deform_conv_backward(
        case.input,
        case.weight,
        case.bias,
        ones,
        case.offset,
        case.mask,
        columns,
        *grads.values(),
        case.grad_output,
        **options,
    )
    return dict(output=output, **grads)


# ---- the cases of the golden file -----------------------------------------------------------------------------------
def _nms_cases():
    for count, offset, equal in ((0, 0, False), (1, 0, False), (40, 0, False), (40, 1, False), (6, 0, True)):
        name = f'{count}_boxes_offset{offset}{"_equal_scores" if equal else ""}'
        inputs = boxes_and_scores(count, 1, equal=equal)
        yield f'nms/{name}', lambda ext, inputs=inputs, offset=offset: run_nms(ext, *inputs, offset=offset)
        for method, method_name in enumerate(('naive', 'linear', 'gaussian')):
            yield (
                f'softnms/{method_name}_{name}',
                lambda ext, inputs=inputs, offset=offset, method=method: run_softnms(
                    ext, *inputs, method, offset=offset, min_score=0.05
                ),
            )
        if count and not offset:
            yield f'nms_match/{name}', lambda ext, inputs=inputs: run_nms_match(ext, *inputs)


def _roi_align_cases():
    input = feature((2, 2, 10, 12), 2, F64)
    for kind, aligned, ratio, pool_mode in itertools.product(
        ('random', 'empty', 'outside', 'integer', 'none'), (True, False), (0, 2), (0, 1)
    ):
        rois = regions(0 if kind == 'none' else 4, 3, F64, kind=kind)
        options = dict(sampling_ratio=ratio, pool_mode=pool_mode, aligned=aligned)
        name = f'roi_align/{kind}_{("max", "avg")[pool_mode]}_ratio{ratio}{"_aligned" if aligned else ""}'
        yield name, lambda ext, rois=rois, options=options: run_roi_align(ext, input, rois, **options)


CONVOLUTIONS = dict(
    plain={},
    at_pixels=dict(spread=0.0),
    far_offsets=dict(spread=8.0),
    stride=dict(stride=(2, 1), padding=(0, 2)),
    dilation=dict(dilation=(2, 1), padding=(2, 0)),
    groups=dict(groups=2),
    deform_groups=dict(deform_groups=2),
    both_groups=dict(channels=(8, 4), groups=4, deform_groups=2, stride=(2, 2)),
    kernel=dict(kernel=(1, 3), padding=(0, 1)),
    no_bias=dict(bias=False),
)


def _convolution_cases():
    for name, options in CONVOLUTIONS.items():
        plain, modulated = (convolution(5, F64, modulated, **options) for modulated in (False, True))
        if name != 'no_bias':
            yield f'deform_conv/{name}', lambda ext, case=plain: run_deform_conv(ext, case)
        yield f'modulated_deform_conv/{name}', lambda ext, case=modulated: run_modulated_deform_conv(ext, case)


CASES = dict([*_nms_cases(), *_roi_align_cases(), *_convolution_cases()])
