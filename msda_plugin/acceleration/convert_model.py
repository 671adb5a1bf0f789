"""Makes a model run msda_plugin's operator, in place, and undoes it.

Only the classes of some modules change. Modules, parameters, hooks and modes stay the same objects, so optimizers,
distributed wrappers and averaged copies keep working, and checkpoints stay compatible.

- mmcv's ``MultiScaleDeformableAttention`` runs msda_plugin's operator.
- In a model with such layers, mmcv's feed-forward networks and multi-head attentions, and the dropouts of all three,
  become memory-efficient (:mod:`msda_plugin.acceleration.memory_efficient`), with the same results from the same random
  state. The feed-forward networks store half of what a stock encoder layer stores for the backward pass.
"""

import logging
from functools import cache

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmcv.cnn.bricks.transformer import MultiheadAttention as StockMultiheadAttention
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as StockAttention
from mmengine.logging import print_log
from mmengine.model import Sequential
from torch import nn

from msda_plugin.acceleration.memory_efficient import Dropout, LinearReLUDropout, MultiheadAttention
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.ops import Backend, backend_for

STOCK_FORWARD = StockAttention.forward  # read before msda_plugin.auto replaces it
QUANTIZATION = ('torch.ao.nn.', 'torch.ao.quantization.', 'torchao.')


def accelerate(model: nn.Module) -> int:
    """Make every mmcv ``MultiScaleDeformableAttention`` of a model run msda_plugin's operator, in place.

    Subclasses that inherit mmcv's forward change as well, and stay instances of their class. Layers that override
    forward do not change, nor do layers for which no compiled kernels exist, since mmcv's may be faster there. The log
    names the number of changed layers, the backend, and the unchanged layers with the reason.

    Args:
        model: any module, including wrappers (DistributedDataParallel, MMEngine's, averaged models).

    Returns:
        The number of changed attention layers.

    Raises:
        TypeError: If ``model`` is not a ``torch.nn.Module``, or the operator does not support the dtype of its weights.
        ValueError: If the model is quantized, prepared for quantization, or scripted. It stays unchanged.

    Example:
        >>> from mmcv.ops import MultiScaleDeformableAttention
        >>> accelerate(torch.nn.Sequential(MultiScaleDeformableAttention(), MultiScaleDeformableAttention()))
        2
    """
    _refuse(model)
    found, backends, unchanged, before = [], set(), {}, 0
    for name, layer in model.named_modules():
        if isinstance(layer, MultiScaleDeformableAttention):
            before += 1
        elif isinstance(layer, StockAttention):
            backend, reason = _examine(layer)
            if reason:
                unchanged.setdefault(reason, []).append(name or 'the model itself')
            else:
                found.append(layer)
                backends.add(backend)

    for layer in found:
        _change_class(layer, MultiScaleDeformableAttention)
    if found:
        _reduce_memory(model)
    _report(model, len(found), before, backends, unchanged)
    return len(found)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`, in place. Layers built as msda_plugin's stay unchanged.

    Returns:
        The number of attention layers restored to mmcv's.

    Raises:
        TypeError: If ``model`` is not a ``torch.nn.Module``.
    """
    _check_module(model)
    count = 0
    for module in model.modules():
        if hasattr(module, 'stock_class'):
            count += isinstance(module, MultiScaleDeformableAttention)
            module.__class__ = module.stock_class
    print_log(
        f"restore: {count} MultiScaleDeformableAttention layers of {type(model).__name__} run mmcv's operator again.",
        logger='current',
    )
    return count


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model is a {type(model).__name__}; expected a torch.nn.Module, such as runner.model')


def _refuse(model: nn.Module) -> None:
    """Raise if changing classes could change the results of this model."""
    _check_module(model)
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else 'the model itself'
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f'the model is scripted or traced ({where} is a {type(module).__name__}), so its code cannot '
                'change: accelerate it before torch.jit'
            )
        types = [*type(module).__mro__, *(type(parameter) for parameter in module.parameters(recurse=False))]
        if any(f'{type_.__module__}.'.startswith(QUANTIZATION) for type_ in types):
            raise ValueError(
                f'the model is quantized or prepared for quantization ({where} is a {type(module).__module__}.'
                f'{type(module).__name__}), with ranges calibrated for the stock layers: accelerate the '
                'float model, and quantize only modules outside the attention layers'
            )


def _examine(layer: StockAttention) -> tuple[Backend, str]:
    """The backend for the layer, and the reason why it cannot change; an empty string if it can."""
    weight = layer.value_proj.weight
    backend = backend_for(weight.device, weight.dtype)
    forwards = (STOCK_FORWARD, MultiScaleDeformableAttention.forward)
    if 'forward' in vars(layer) or type(layer).forward not in forwards:
        return backend, f'{type(layer).__name__} overrides forward'
    if backend.name == 'reference':
        return backend, f'no compiled kernels: {backend.reason}'
    return backend, ''


def _reduce_memory(model: nn.Module) -> None:
    """Make mmcv's transformer layers memory-efficient. Only modules of exactly the stock classes change."""
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            parts = [module.dropout]
        elif type(module) is StockMultiheadAttention:
            parts = [module.attn, module.proj_drop]
        elif type(module) is FFN:
            parts = list(module.layers)
        else:
            continue
        for part in parts:
            if type(part) is nn.Dropout:
                _change_class(part, Dropout)
            elif type(part) is nn.MultiheadAttention:
                _change_class(part, MultiheadAttention)
            elif type(part) is Sequential and [type(step) for step in part][1:] == [nn.ReLU, nn.Dropout]:
                _change_class(part, LinearReLUDropout)


def _change_class(module: nn.Module, ours: type[nn.Module]) -> None:
    module.__class__ = _class_in_place_of(type(module), ours)


@cache
def _class_in_place_of(stock: type[nn.Module], ours: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``ours`` and ``stock`` with the name of ``stock``, which it stores as ``stock_class``."""

    def reduce(module):
        return _new, (stock, ours), vars(module)

    # Copies and pickles look a class up in its module, which does not contain this one.
    return type(
        stock.__name__,
        (ours,) if issubclass(ours, stock) else (ours, stock),
        {'__module__': ours.__module__, '__doc__': ours.__doc__, 'stock_class': stock, '__reduce__': reduce},
    )


def _new(stock: type[nn.Module], ours: type[nn.Module]) -> nn.Module:
    cls = _class_in_place_of(stock, ours)
    return cls.__new__(cls)


def _report(model: nn.Module, count: int, before: int, backends: set[Backend], unchanged: dict[str, list[str]]) -> None:
    """Log what changed, what did not, and why."""
    layers = f'MultiScaleDeformableAttention layers of {type(model).__name__}'
    if count:
        named = ' and '.join(f'backend {name} ({reason})' for name, reason in sorted(backends))
        sentences = [f"{count} {layers} now run msda_plugin's operator, {named}."]
    elif before or unchanged:
        sentences = [f'none of the {layers} changed.']
    else:
        sentences = [f'{type(model).__name__} has no mmcv MultiScaleDeformableAttention; nothing changed.']
    if before:
        sentences.append(f'{before} already ran it.')
    sentences += [f'Unchanged: {", ".join(names)} ({reason}).' for reason, names in unchanged.items()]
    print_log(
        f'accelerate: {" ".join(sentences)}', logger='current', level=logging.WARNING if unchanged else logging.INFO
    )
