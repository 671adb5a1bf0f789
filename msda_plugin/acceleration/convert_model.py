"""Put the operator into a model that was built without it, in place, and take it out again.

What changes is the class of some modules, and nothing else: modules, parameters, hooks and modes stay the objects they
are, so that optimizers, distributed wrappers and averaged copies go on with them, and checkpoints fit before and after.

- mmcv's ``MultiScaleDeformableAttention`` runs our operator.
- In a model that has such layers, mmcv's feed-forward networks, its multi-head attentions and the dropouts of all three
  hold less memory, with the same numbers from the same random state (:mod:`msda_plugin.acceleration.memory_efficient`).
  The
  feed-forward networks alone keep half of what a stock encoder layer keeps for the backward pass.
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

STOCK_FORWARD = StockAttention.forward  # read before msda_plugin.auto exchanges it
QUANTISATION = ('torch.ao.nn.', 'torch.ao.quantization.', 'torchao.')


def accelerate(model: nn.Module) -> int:
    """Let every mmcv ``MultiScaleDeformableAttention`` of a model run our operator, in place.

    Subclasses that keep mmcv's forward change as well and stay instances of their class. Left alone are layers with a
    forward of their own, and layers where no compiled kernels can run, since mmcv's may be faster there. The log says
    how many layers changed, which backend runs and why, and what was left alone for which reason.

    Args:
        model: any module. Wrappers (DistributedDataParallel, MMEngine's, averaged models) are looked into. Layers that
            run our operator already stay as they are.

    Returns:
        How many attention layers changed.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``, or its weights have a dtype that the operator does not take.
        ValueError: The model is quantised, prepared for it, or scripted. It is left as it was.

    Example:
        >>> from mmcv.ops import MultiScaleDeformableAttention
        >>> accelerate(torch.nn.Sequential(MultiScaleDeformableAttention(), MultiScaleDeformableAttention()))
        2
    """
    _refuse(model)
    found, backends, left_alone, before = [], set(), {}, 0
    for name, layer in model.named_modules():
        if isinstance(layer, MultiScaleDeformableAttention):
            before += 1
        elif isinstance(layer, StockAttention):
            backend, obstacle = _examine(layer)
            if obstacle:
                left_alone.setdefault(obstacle, []).append(name or 'the model itself')
            else:
                found.append(layer)
                backends.add(backend)

    for layer in found:
        _change_class(layer, MultiScaleDeformableAttention)
    if found:
        _lighten(model)
    _report(model, len(found), before, backends, left_alone)
    return len(found)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`, in place. Layers that were built as ours stay ours.

    Returns:
        How many attention layers went back to mmcv's.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    _check_module(model)
    count = 0
    for module in model.modules():
        if hasattr(module, 'stock_class'):
            count += isinstance(module, MultiScaleDeformableAttention)
            module.__class__ = module.stock_class
    print_log(
        f'restore: {count} MultiScaleDeformableAttention layers of {type(model).__name__} run mmcv again.',
        logger='current',
    )
    return count


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model is a {type(model).__name__}, but a torch.nn.Module is needed, such as runner.model')


def _refuse(model: nn.Module) -> None:
    """Raise unless classes can be exchanged in this model without changing what it computes."""
    _check_module(model)
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else 'the model itself'
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f'the model is scripted or traced ({where} is a {type(module).__name__}), and its code is '
                'fixed: accelerate it before torch.jit'
            )
        types = [*type(module).__mro__, *(type(parameter) for parameter in module.parameters(recurse=False))]
        if any(f'{type_.__module__}.'.startswith(QUANTISATION) for type_ in types):
            raise ValueError(
                f'the model is quantised or prepared for it ({where} is a {type(module).__module__}.'
                f'{type(module).__name__}), and its ranges hold for the stock layers: accelerate the '
                'float model, and quantise only what is outside the attention layers'
            )


def _examine(layer: StockAttention) -> tuple[Backend, str]:
    """The backend that would run the layer, and an empty string or why the layer is to be left alone."""
    weight = layer.value_proj.weight
    backend = backend_for(weight.device, weight.dtype)
    forwards = (STOCK_FORWARD, MultiScaleDeformableAttention.forward)
    if 'forward' in vars(layer) or type(layer).forward not in forwards:
        return backend, f'{type(layer).__name__} has a forward of its own'
    if backend.name == 'reference':
        return backend, f'no compiled kernels would run: {backend.reason}'
    return backend, ''


def _lighten(model: nn.Module) -> None:
    """Let the transformer layers of mmcv hold less memory. Only parts that are exactly the stock ones change."""
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
    """``ours``, which remembers ``stock``, is an instance of it too, and bears its name."""

    def reduce(module):
        return _new, (stock, ours), vars(module)

    # Copies and pickles name a class by its module, where this one is not.
    return type(
        stock.__name__,
        (ours,) if issubclass(ours, stock) else (ours, stock),
        {'__module__': ours.__module__, '__doc__': ours.__doc__, 'stock_class': stock, '__reduce__': reduce},
    )


def _new(stock: type[nn.Module], ours: type[nn.Module]) -> nn.Module:
    cls = _class_in_place_of(stock, ours)
    return cls.__new__(cls)


def _report(
    model: nn.Module, count: int, before: int, backends: set[Backend], left_alone: dict[str, list[str]]
) -> None:
    """Log, once, what was changed, what was not, and why."""
    layers = f'MultiScaleDeformableAttention layers of {type(model).__name__}'
    if count:
        named = ' and '.join(f'backend {name} ({reason})' for name, reason in sorted(backends))
        sentences = [f'{count} {layers} run the operator of msda_plugin now, {named}.']
    elif before or left_alone:
        sentences = [f'none of the {layers} was changed.']
    else:
        sentences = [f'{type(model).__name__} has no MultiScaleDeformableAttention of mmcv; nothing was changed.']
    if before:
        sentences.append(f'{before} ran it before.')
    sentences += [f'Left alone: {", ".join(names)} ({why}).' for why, names in left_alone.items()]
    print_log(
        f'accelerate: {" ".join(sentences)}', logger='current', level=logging.WARNING if left_alone else logging.INFO
    )
