"""Makes a model run msda_plugin's operator, in place, and undoes it.

Only the classes of some modules change. Modules, parameters, hooks and modes stay the same objects, so optimizers,
distributed wrappers and averaged copies keep working, and checkpoints stay compatible.

- The attention layers of mmcv (:mod:`msda_plugin.acceleration.mmcv_models`) and of Hugging Face transformers
  (:mod:`msda_plugin.acceleration.transformers_models`) run msda_plugin's operator.
- In a model with mmcv's, its feed-forward networks and multi-head attentions, and the dropouts of all three, become
  memory-efficient (:mod:`msda_plugin.acceleration.memory_efficient`), with the same results from the same random state.
  The feed-forward networks store half of what a stock encoder layer stores for the backward pass.
- In a model with transformers', frozen batch norms run in one pass in inference.
- The attention between image and text of Grounding DINO and GLIP projects the words instead of the pixels
  (:mod:`msda_plugin.acceleration.text_fusion`).
- Instance masks of MMDetection's MaskFormer and Mask2Former are computed one query at a time on CPUs
  (:mod:`msda_plugin.acceleration.mask_fusion`).
- On request, convolutions run in ``channels_last`` and with the batch norms folded into them
  (:mod:`msda_plugin.acceleration.convolutions`), linear layers in oneDNN
  (:mod:`msda_plugin.acceleration.linear`), dropouts draw their random numbers faster
  (:mod:`msda_plugin.acceleration.fast_dropout`), and inference runs in bfloat16
  (:mod:`msda_plugin.acceleration.low_precision`).

Each framework is imported only for a model with its layers, and none is needed for the others.
"""

import logging
import sys
from functools import cache
from types import ModuleType

import torch
from torch import nn

from msda_plugin.ops import Backend, backend_for

QUANTIZATION = ('torch.ao.nn.', 'torch.ao.quantization.', 'torchao.')


def accelerate(
    model: nn.Module,
    *,
    inference: bool = False,
    channels_last: bool | None = None,
    fold: bool | None = None,
    fast_dropout: bool = False,
    dtype: torch.dtype | None = None,
    training_dtype: torch.dtype | None = None,
) -> int:
    """Make every multi-scale deformable attention of mmcv and transformers run msda_plugin's operator, in place.

    Subclasses that inherit the forward change as well, and stay instances of their class. Layers that override forward
    do not change, nor do layers of transformers whose results are not those of the operator (another version), nor
    layers for which no compiled kernels exist, since the stock code may be faster there. The log names the number of
    changed layers, the backend, and the unchanged layers with the reason: MMEngine's current log where it is imported,
    else Python's, as ``msda_plugin``.

    The keyword arguments are further steps, for models with and without such layers. Parameters and checkpoints stay
    unchanged with all of them, and a changed model can still be trained. They can be added by a second call.

    Args:
        model: any module, including wrappers (DistributedDataParallel, MMEngine's, averaged models).
        inference: Take the steps that make inference faster with equal results: ``channels_last`` and ``fold``, unless
            these say otherwise, activations that overwrite their input, and float32 linear layers in oneDNN on CPUs
            where it is faster.
        channels_last: Run convolutions in this memory format, in training too. Code that calls ``view`` on feature maps
            may need ``reshape``.
        fold: Fold batch norms in evaluation mode into convolutions, also the constant ones of a backbone in training,
            which then takes less memory; see :func:`fold_batch_norms`. RepVGG blocks, as in RT-DETR and D-FINE, become
            one convolution in inference.
        fast_dropout: Draw the random numbers of ``nn.Dropout`` faster in training on a CPU. They differ from PyTorch's.
        dtype: Run the model in bfloat16 in evaluation mode, or in float16 on a GPU. Predictions of boxes and scores,
            reference points and post-processing stay in float32. None: as the weights.
        training_dtype: Run the model in bfloat16 in training mode, with the same exceptions. Parameters, gradients and
            optimizer stay in float32, and the loss is not scaled. None: as the weights.

    Returns:
        The number of changed attention layers.

    Raises:
        TypeError: If ``model`` is not a ``torch.nn.Module``, or the operator does not support the dtype of its weights.
        ValueError: If the model is quantized, prepared for quantization, or scripted; or its device has no fast
            instructions for the dtype, or its weights are not float32. It stays unchanged.

    Example:
        >>> from mmcv.ops import MultiScaleDeformableAttention
        >>> accelerate(torch.nn.Sequential(MultiScaleDeformableAttention(), MultiScaleDeformableAttention()))
        2
    """
    from msda_plugin.acceleration import convolutions, linear, low_precision  # these import this module
    from msda_plugin.acceleration import fast_dropout as dropout

    _refuse(model)
    if dtype is not None:
        low_precision.check_dtype(model, dtype)
    if training_dtype is not None:
        low_precision.check_dtype(model, training_dtype, training=True)
    found, backends, unchanged, before = [], set(), {}, 0
    for name, layer in model.named_modules():
        if not ('sampling_offsets' in layer._modules and 'attention_weights' in layer._modules):
            continue
        if any(base.__module__.startswith('msda_plugin.') for base in type(layer).__mro__):
            before += 1
            continue
        ours, reason = _framework(layer).examine(layer)
        if not reason:
            weight = next(getattr(layer, 'value_proj', layer).parameters())  # D-FINE's has no projection of the value
            backend = backend_for(weight.device, weight.dtype)
            reason = f'no compiled kernels: {backend.reason}' if backend.name == 'reference' else ''
        if reason:
            unchanged.setdefault(reason, []).append(name or 'the model itself')
        else:
            found.append((layer, ours))
            backends.add(backend)

    for layer, ours in found:
        change_class(layer, ours)
    for framework in {_framework(layer) for layer, _ in found}:
        framework.change_other_layers(model)
    _report(model, len(found), before, backends, unchanged)

    if inference if channels_last is None else channels_last:
        log(f'accelerate: {convolutions.use_channels_last(model)} convolutions now run in channels_last.')
    if inference if fold is None else fold:
        convolutions.fold_batch_norms(model)
        log(f'accelerate: {convolutions.fold_branches(model)} RepVGG blocks now run as one convolution in inference.')
    if inference:
        log(f'accelerate: {convolutions.use_inplace_relu(model)} ReLUs now overwrite their input in inference.')
        log(f'accelerate: {linear.use_onednn_linear(model)} linear layers now run in oneDNN in inference.')
    if fast_dropout:
        log(f'accelerate: {dropout.use_fast_dropout(model)} dropouts now draw other random numbers, faster.')
    if dtype is not None:
        low_precision.use_dtype(model, dtype)
        log(f'accelerate: {type(model).__name__} now runs in {dtype} in evaluation mode.')
    if training_dtype is not None:
        low_precision.use_dtype(model, training_dtype, training=True)
        log(f'accelerate: {type(model).__name__} now runs in {training_dtype} in training mode.')
    return len(found)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`, in place. Layers built as msda_plugin's stay unchanged.

    Returns:
        The number of attention layers that run their stock code again.

    Raises:
        TypeError: If ``model`` is not a ``torch.nn.Module``.
    """
    _check_module(model)
    count = 0
    for module in model.modules():
        if hasattr(module, 'stock_class'):
            count += 'sampling_offsets' in module._modules  # the others are dropouts and the like
            for field in (field for change in module.changes for field in getattr(change, 'added_fields', ())):
                vars(module).pop(field, None)
            module.__class__ = module.stock_class
    log(f'restore: {count} MultiScaleDeformableAttention layers of {type(model).__name__} are stock again.')
    return count


def _framework(layer: nn.Module) -> ModuleType:
    """The module for the framework that a deformable attention layer comes from; imports it."""
    if any(base.__module__ == 'mmcv.ops.multi_scale_deform_attn' for base in type(layer).__mro__):
        from msda_plugin.acceleration import mmcv_models

        return mmcv_models
    from msda_plugin.acceleration import transformers_models

    return transformers_models


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


def change_class(module: nn.Module, ours: type[nn.Module]) -> None:
    """Make a module run the code of ``ours``. It stays an instance of its class, which it stores as ``stock_class``.

    A module that has changed before also keeps that change, under this one. Fields of ``ours`` that
    :func:`restore` has to remove are listed in its ``added_fields``.
    """
    changes = getattr(module, 'changes', ())
    if ours not in changes:
        module.__class__ = _class_in_place_of(stock_class(module), (*changes, ours))


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before :func:`change_class`."""
    return getattr(module, 'stock_class', type(module))


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is exactly a ``cls`` of torch or mmcv's wrapper of it, with the forward of that class."""
    stock = stock_class(module)
    wrapped = stock.__module__ == 'mmcv.cnn.bricks.wrappers' and issubclass(stock, cls)
    return (stock is cls or wrapped) and 'forward' not in vars(module)


@cache
def _class_in_place_of(stock: type[nn.Module], changes: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    """A subclass of ``changes``, the last one first, and of ``stock``, with the name of ``stock``."""

    def reduce(module):
        return _new, (stock, changes), vars(module)

    ours = changes[-1]
    # Copies and pickles look a class up in its module, which does not contain this one.
    return type(
        stock.__name__,
        (*reversed(changes), *(() if any(issubclass(change, stock) for change in changes) else (stock,))),
        {
            '__module__': ours.__module__,
            '__doc__': ours.__doc__,
            'stock_class': stock,
            'changes': changes,
            '__reduce__': reduce,
        },
    )


def _new(stock: type[nn.Module], changes: tuple[type[nn.Module], ...] | type[nn.Module]) -> nn.Module:
    # Pickles of earlier versions contain a single class.
    cls = _class_in_place_of(stock, changes if isinstance(changes, tuple) else (changes,))
    return cls.__new__(cls)


@cache
def is_frozen_batch_norm(stock: type[nn.Module]) -> bool:
    """Whether a class is the frozen batch norm of a model of transformers, with eps 1e-5."""
    if not (stock.__name__.endswith('FrozenBatchNorm2d') and stock.__module__.startswith('transformers.')):
        return False
    from msda_plugin.acceleration import transformers_models

    return transformers_models.has_results_of_frozen_batch_norm(stock)


def _report(model: nn.Module, count: int, before: int, backends: set[Backend], unchanged: dict[str, list[str]]) -> None:
    """Log what changed, what did not, and why."""
    layers = f'MultiScaleDeformableAttention layers of {type(model).__name__}'
    if count:
        named = ' and '.join(f'backend {name} ({reason})' for name, reason in sorted(backends))
        sentences = [f"{count} {layers} now run msda_plugin's operator, {named}."]
    elif before or unchanged:
        sentences = [f'none of the {layers} changed.']
    else:
        sentences = [
            f'{type(model).__name__} has no multi-scale deformable attention of mmcv or transformers; nothing changed.'
        ]
    if before:
        sentences.append(f'{before} already ran it.')
    sentences += [f'Unchanged: {", ".join(names)} ({reason}).' for reason, names in unchanged.items()]
    log(f'accelerate: {" ".join(sentences)}', logging.WARNING if unchanged else logging.INFO)


def log(message: str, level: int = logging.INFO) -> None:
    """Write to MMEngine's current log where it is imported, else to Python's."""
    if 'mmengine' in sys.modules:
        from mmengine.logging import print_log

        print_log(message, logger='current', level=level)
    else:
        logging.getLogger('msda_plugin').log(level, message)
