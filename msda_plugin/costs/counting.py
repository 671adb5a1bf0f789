"""Counts the multiply-adds of a model while it runs, module by module."""

from collections.abc import Callable

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from msda_plugin import ops  # noqa: F401  registers torch.ops.msda

from .formulas import OPERATIONS_PER_SAMPLE

aten = torch.ops.aten
NEIGHBOURS = 4  # that a bilinear interpolation reads


def count_multiply_adds(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Count the multiply-adds of one run.

    Matrix products, convolutions (deformable ones too), attention in one operation, and sampling are counted; softmax,
    norms, activations and additions are not.

    Args:
        model: the model whose modules are named.
        run: calls it, on any device; no gradients are kept.

    Returns:
        The count of each submodule that was called and did any, by its name in ``model``, and of the whole run under
        ''. A module includes its children; one that is called twice counts twice.
    """
    counter = _Counter()
    counts: dict[str, int] = {}
    unseen = 0  # of deformable convolutions, whose kernels no counter sees
    handles = []

    def total() -> int:
        return counter.operations // 2 + unseen

    def watch(name: str, module: nn.Module) -> None:
        entered: list[int] = []

        def before(*_) -> None:
            entered.append(total())

        def after(module: nn.Module, args: tuple, out: object) -> None:
            nonlocal unseen
            if isinstance(module, DeformConv2d | ModulatedDeformConv2d):
                unseen += _deformable_convolution(module, out)
            counts[name] = counts.get(name, 0) + total() - entered.pop()

        handles.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

    for name, module in model.named_modules():
        if name:
            watch(name, module)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operation that no counter looks into
    try:
        with torch.no_grad(), counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    return {'': total(), **{name: count for name, count in counts.items() if count}}


class _Counter(TorchDispatchMode):
    """Adds up floating-point operations by torch's own formulas and ours.

    torch's ``FlopCounterMode`` is not used, because it cannot run without gradients where a parameter is an argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.formulas = {**flop_registry, **_formulas()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func.overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _formulas() -> dict[object, Callable[..., int]]:
    """Operation -> its floating-point operations, two for a multiply-add, from its arguments' shapes."""

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def grid_sample(value, grid, *args, out_shape=None, **kwargs) -> int:
        return 2 * NEIGHBOURS * out_shape.numel()

    def deformable(value, shapes, starts, *rest, out_shape=None, **kwargs) -> int:
        *_, num_levels, num_points, _ = rest[-3]
        return 2 * OPERATIONS_PER_SAMPLE * out_shape.numel() * num_levels * num_points

    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten.grid_sampler_2d: grid_sample,
        torch.ops.msda.ms_deform_attn: deformable,
        torch.ops.msda.ms_deform_attn_fused: deformable,
    }
    return {operation: shape_wrapper(formula) for operation, formula in formulas.items()}


def _deformable_convolution(conv: nn.Module, out: Tensor) -> int:
    """Multiply-adds of a deformable convolution: the samples it interpolates, and the product with the weights."""
    samples = out.shape[0] * out.shape[2] * out.shape[3] * conv.weight.shape[2] * conv.weight.shape[3]
    return samples * conv.in_channels * (OPERATIONS_PER_SAMPLE + conv.out_channels // conv.groups)
