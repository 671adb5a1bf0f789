"""Counts the MACs of a model's modules while it runs."""

from collections.abc import Callable
from math import prod

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from msda_plugin import ops  # noqa: F401  registers torch.ops.msda and its FLOP formulas
from msda_plugin.costs.formulas import MACS_PER_SAMPLE

MATRIX_PRODUCTS = [getattr(torch.ops.aten, name) for name in ('mm', 'addmm', 'bmm', 'baddbmm')]
NEIGHBORS = 4  # of a bilinear interpolation


def count_macs(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Count the MACs (multiply-accumulate operations, of 2 FLOPs each) of one run.

    Matrix products, convolutions (also deformable ones), attention and sampling are counted. Softmax, norms,
    activations and additions are not.

    Args:
        model: The model whose modules are counted.
        run: A function that calls the model, on any device. It runs without gradients.

    Returns:
        The MACs of each submodule with any, by its name in ``model``, and those of the complete run under ``''``. A
        module includes its children. A module that is called twice counts twice.
    """
    root = type(model).__name__
    names = {module: f'{root}.{name}' for name, module in model.named_modules()}
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            torch.ops.aten.grid_sampler_2d: _grid_sample,
        },
    )

    def matrix_products(module: nn.Module) -> int:
        return sum(counter.flop_counts[names[module]].get(product, 0) for product in MATRIX_PRODUCTS)

    def before_deformable_convolution(module: nn.Module, args: tuple) -> None:
        seen[module] = matrix_products(module)

    def count_deformable_convolution(module: nn.Module, args: tuple, out: Tensor) -> None:
        # The product of mmcv's compiled operator is invisible, the one of msda_plugin.mmcv_ops is counted already.
        flops = 2 * _deformable_convolution(module, out) - (matrix_products(module) - seen.pop(module))
        for name in counter.mod_tracker.parents | {names[module]}:
            counter.flop_counts[name]['deformable convolution'] += flops

    seen = {}
    handles = []
    for module in names:
        if isinstance(module, DeformConv2d | ModulatedDeformConv2d):
            handles.append(module.register_forward_pre_hook(before_deformable_convolution))
            handles.append(module.register_forward_hook(count_deformable_convolution))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # FlopCounterMode has no formula for it
    try:
        for parameter in trainable:  # FlopCounterMode cannot track a view of one without gradients
            parameter.requires_grad_(False)
        with torch.no_grad(), counter:
            run()
    finally:
        for parameter in trainable:
            parameter.requires_grad_()
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    return {
        '': counts.pop('Global', 0),
        **{name.removeprefix(f'{root}.'): count for name, count in counts.items() if count and name != root},
    }


count_multiply_adds = count_macs  # former name


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _grid_sample(value: torch.Size, grid: torch.Size, *args, out_shape=None, **kwargs) -> int:
    return 2 * NEIGHBORS * prod(out_shape)


def _deformable_convolution(conv: nn.Module, out: Tensor) -> int:
    """MACs of mmcv's deformable convolution: sampling, and the matrix product."""
    samples = out.shape[0] * out.shape[2] * out.shape[3] * conv.weight.shape[2] * conv.weight.shape[3]
    return samples * conv.in_channels * (MACS_PER_SAMPLE + conv.out_channels // conv.groups)
