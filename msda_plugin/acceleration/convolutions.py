"""Faster convolutions that keep their parameters: folded batch norms, and the memory format ``channels_last``.

A folded convolution multiplies its weight by the scale of the batch norm behind it, and the batch norm returns its
input. Parameters, buffers and checkpoints stay those of the stock modules. Where a gradient is needed, every forward
computes the products, and the backward pass stores one feature map less (You et al., Efficient ConvBN Blocks, 2023,
https://arxiv.org/abs/2305.11624). Elsewhere they are stored, and computed again when a parameter, its dtype or its
device changes, and after every ``train()`` and ``eval()``. A batch norm in training mode runs its stock code.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from msda_plugin.acceleration.convert_model import change_class, is_frozen_batch_norm, is_plain, log, stock_class

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # without a forward
Products = tuple[Tensor, Tensor | None]


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, with a batch norm folded into it or in ``channels_last``, or both.

    Attributes:
        folded_norm: The batch norm that only this convolution's output passes through. No child: the module with the
            forward owns it.
        channels_last: Whether input and output are in this memory format.
    """

    added_fields = ('folded_norm', 'channels_last')
    folded_norm: nn.Module | None = None
    channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        """(bs, in_channels, h, w) -> (bs, out_channels, h, w)."""
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        norm = self.folded_norm
        if norm is not None and norm.training:
            return super().forward(x)
        gradient = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *_affine(self), *(() if norm is None else _affine(norm)))
        )
        if norm is None and (gradient or not self.channels_last):
            return super().forward(x)
        return self._conv_forward(x, *(self._compute_products() if gradient else self._products()))

    def train(self, mode: bool = True) -> nn.Module:
        """As in ``nn.Module``; the next forward computes the products again."""
        _products.pop(self, None)
        return super().train(mode)

    def _products(self) -> Products:
        """Weight and bias of this convolution and its batch norm, in the memory format of the output."""
        return _stored(self, self._tensors(), self._compute_products)

    def _tensors(self) -> list[Tensor]:
        norm = self.folded_norm
        return [*_affine(self), *(() if norm is None else (*_affine(norm), norm.running_mean, norm.running_var))]

    def _compute_products(self) -> Products:
        weight, bias, norm = self.weight, self.bias, self.folded_norm
        if norm is not None:
            # The factors of the channels in float64: these are few. The backward pass stores the weight as it is.
            shift = norm.running_mean.double() if bias is None else norm.running_mean.double() - bias.double()
            scale = (norm.running_var.double() + getattr(norm, 'eps', 1e-5)).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight.double()
            bias = -shift * scale if norm.bias is None else norm.bias.double() - shift * scale
            weight, bias = weight * scale.to(weight.dtype)[:, None, None, None], bias.to(weight.dtype)
        return weight.contiguous(memory_format=_format(self)), bias


class RepVGG(nn.Module):
    """The activation of the sum of two convolutions with batch norms, as one convolution where no gradient is needed.

    Attributes:
        branches: The two convolutions, the one with the larger kernel first. No children: the stock modules own them.
        last: The activation, or None.
    """

    added_fields = ('branches', 'last')
    branches: tuple[Conv2d, Conv2d]
    last: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(bs, in_channels, h, w) -> (bs, out_channels, h, w)."""
        large, small = self.branches
        if any(conv.folded_norm is None or conv.folded_norm.training for conv in self.branches):
            return super().forward(x)
        tensors = [tensor for conv in self.branches for tensor in conv._tensors()]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
            return super().forward(x)
        if large.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = large._conv_forward(x, *_stored(self, tensors, self._compute_products))
        return y if self.last is None else self.last(y)

    def train(self, mode: bool = True) -> nn.Module:
        """As in ``nn.Module``; the next forward computes the products again."""
        _products.pop(self, None)
        return super().train(mode)

    def _compute_products(self) -> Products:
        (weight, bias), (small, small_bias) = (conv._compute_products() for conv in self.branches)
        border = [(a - b) // 2 for a, b in zip(weight.shape[:1:-1], small.shape[:1:-1], strict=True) for _ in range(2)]
        summed = weight + F.pad(small, border)
        return summed.contiguous(memory_format=_format(self.branches[0])), bias + small_bias


class FoldedBatchNorm(nn.Module):
    """A batch norm that a :class:`Conv2d` before it has already applied."""

    def forward(self, x: Tensor) -> Tensor:
        """(bs, channels, h, w) -> (bs, channels, h, w)."""
        return super().forward(x) if self.training else x


class InplaceReLU(nn.ReLU):
    """``nn.ReLU`` that overwrites its input where no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return super().forward(x) if x.requires_grad else x.relu_()


_products: WeakKeyDictionary[nn.Module, tuple[tuple, Products]] = WeakKeyDictionary()


def _affine(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (module.weight, module.bias) if tensor is not None]


def _format(conv: Conv2d) -> torch.memory_format:
    return torch.channels_last if conv.channels_last else torch.contiguous_format


def _stored(module: nn.Module, tensors: list[Tensor], compute: Callable[[], Products]) -> Products:
    """The products of a module, computed again if one of the tensors has changed, or the dtype of autocast."""
    if any(tensor.is_inference() for tensor in tensors):  # these do not count their changes
        return compute()
    dtype = torch.get_autocast_dtype(tensors[0].device.type) if _autocasts(tensors[0]) else None
    state = (dtype, *((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors))
    stored, products = _products.get(module, (None, None))
    if stored != state:
        with torch.no_grad():
            products = tuple(t if t is None or dtype is None else t.to(dtype) for t in compute())
        _products[module] = (state, products)
    return products


def _autocasts(weight: Tensor) -> bool:
    return torch.is_autocast_enabled(weight.device.type) and weight.dtype == torch.float32


def fold_batch_norms(model: nn.Module) -> int:
    """Fold each batch norm in evaluation mode into the convolution before it, in place; ``restore`` undoes it.

    Only classes of modules change: parameters and checkpoints stay as they are, gradients reach the parameters of both,
    and batch norms in training mode still update their statistics.

    A pair is found by tracing the forward of the module that owns it, called with its default arguments: the output of
    an ``nn.Conv2d`` must be used once, as the input of an ``nn.BatchNorm2d``, ``nn.SyncBatchNorm``, or frozen batch
    norm of torchvision or transformers. Batch norms that stay are logged with the reason.

    The folded weights are stored beside the parameters. They follow every change that PyTorch counts
    (``load_state_dict``, ``copy_``, optimizers, ``to``); after writing to ``parameter.data``, call ``model.eval()``.

    Returns:
        The number of folded batch norms.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fold_batch_norms(model)
        1
    """
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    count, unchanged = 0, {}
    for parent, norms in _owners(model):
        convolutions, reason = _convolutions_before(parent, norms)
        for norm in norms:
            conv = convolutions.get(norm)
            why = (
                reason
                or (conv is None and 'its input is not the output of one convolution, used once')
                or (conv is not None and uses[conv] + uses[norm] > 2 and 'a module occurs more than once')
                or _why_not(conv, norm)
            )
            if why:
                unchanged.setdefault(why, []).append(names[norm])
                continue
            change_class(conv, Conv2d)
            vars(conv)['folded_norm'] = norm
            change_class(norm, FoldedBatchNorm)
            count += 1
    stay = ' '.join(f'Not folded: {", ".join(names)} ({why}).' for why, names in unchanged.items())
    log(
        f'fold_batch_norms: {count} batch norms of {type(model).__name__} are folded in evaluation mode. {stay}'.strip()
    )
    return count


def fold_branches(model: nn.Module) -> int:
    """Compute RepVGG blocks as one convolution in evaluation mode, in place; ``restore`` undoes it.

    A block is a module whose forward is the sum of two branches, perhaps with an activation behind it; each branch is
    a convolution with a batch norm that :func:`fold_batch_norms` has folded, and nothing else. Where a gradient is
    needed, and with batch norms in training mode, a block runs its stock code.

    Returns:
        The number of changed blocks.
    """
    count = 0
    for parent in list(model.modules()):
        if isinstance(parent, (*CONTAINERS, RepVGG)) or len(list(parent.children())) not in (2, 3):
            continue
        found = _two_branches(parent)
        if found and _can_be_summed(*found[:2]):
            large, small, last = found
            change_class(parent, RepVGG)
            vars(parent).update(branches=(large, small), last=last)
            count += 1
    return count


def _two_branches(parent: nn.Module) -> tuple[Conv2d, Conv2d, nn.Module | None] | None:
    """The convolutions of two branches whose sum is the output, and the activation; None for other modules."""
    branches = {child: conv for child in parent.children() if (conv := _only_convolution(child))}
    calls = _trace(parent, []) if len(branches) == 2 else ''
    if isinstance(calls, str) or [node.op for _, node in calls].count('placeholder') != 1:
        return None
    steps = [(module, node) for module, node in calls if node.op not in ('placeholder', 'output')]
    last = steps.pop() if len(steps) == 4 else None
    if len(steps) != 3 or {steps[0][0], steps[1][0]} != set(branches):
        return None
    (_, first), (_, second), (_, total) = steps
    [source] = [node for _, node in calls if node.op == 'placeholder']
    output = calls[-1][1].args[0]
    if (
        first.args != (source,)
        or second.args != (source,)
        or total.target not in (operator.add, torch.add)
        or set(total.args) != {first, second}
        or any(node.kwargs for node in (first, second, total))
        or (output is not total if last is None else last[0] is None or last[1].args != (total,))
        or (last is not None and (output is not last[1] or last[1].kwargs))
    ):
        return None
    large, small = sorted(branches.values(), key=lambda conv: -conv.kernel_size[0])
    return large, small, None if last is None else last[0]


def _only_convolution(branch: nn.Module) -> Conv2d | None:
    """The convolution of a module that only applies it, with the batch norm folded into it; or None."""
    convs = [module for module in branch.modules() if isinstance(module, Conv2d) and module.folded_norm is not None]
    parts = [module for module in branch.modules() if not isinstance(module, nn.Identity)]
    if len(convs) != 1 or set(parts) != {branch, convs[0], convs[0].folded_norm}:
        return None
    if any(part._forward_hooks or part._forward_pre_hooks or 'forward' in vars(part) for part in branch.modules()):
        return None
    calls = _trace(branch, [])
    if isinstance(calls, str):
        return None
    value = calls[0][1]  # the argument; a chain of modules leads from it to the output
    for module, node in calls:
        if module is not None and node.args == (value,) and not node.kwargs:
            value = node
    return convs[0] if calls[-1][1].args == (value,) else None


def _can_be_summed(large: Conv2d, small: Conv2d) -> bool:
    """Whether two convolutions have the same output positions, and the kernel of one fits into that of the other."""
    same = ('in_channels', 'out_channels', 'stride', 'groups', 'padding_mode')
    return (
        all(getattr(large, field) == getattr(small, field) for field in same)
        and large.padding_mode == 'zeros'
        and all(
            conv.dilation == (1, 1) and conv.padding == tuple(size // 2 for size in conv.kernel_size)
            for conv in (large, small)
        )
        and all(a >= b and a % 2 == b % 2 == 1 for a, b in zip(large.kernel_size, small.kernel_size, strict=True))
    )


def use_channels_last(model: nn.Module) -> int:
    """Make each ``nn.Conv2d`` of a model compute in ``channels_last``, in place; ``restore`` undoes it.

    Parameters keep their memory format. An input in another format is copied, so all convolutions of a chain but the
    first have nothing to convert.

    Returns:
        The number of changed convolutions.
    """
    count = 0
    for module in model.modules():
        if is_plain(module, nn.Conv2d) and not vars(module).get('channels_last'):
            change_class(module, Conv2d)
            vars(module)['channels_last'] = True
            count += 1
    return count


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules with a forward, and the batch norms that are their children, directly or in lists."""
    for parent in list(model.modules()):
        if not isinstance(parent, CONTAINERS):
            norms = [child for child in _children(parent) if _is_batch_norm(child)]
            if norms:
                yield parent, norms


def _children(parent: nn.Module) -> Iterator[nn.Module]:
    for child in parent.children():
        yield child
        if isinstance(child, CONTAINERS):
            yield from _children(child)


def _is_batch_norm(module: nn.Module, folded: bool = False) -> bool:
    """Whether a module is a batch norm that can be folded, or also one that is."""
    if isinstance(module, FoldedBatchNorm) and not folded:
        return False
    cls = stock_class(module)
    return (
        cls in (nn.BatchNorm2d, nn.SyncBatchNorm)
        or (cls.__module__, cls.__name__) == ('torchvision.ops.misc', 'FrozenBatchNorm2d')
        or is_frozen_batch_norm(cls)
    )


def _why_not(conv: nn.Module, norm: nn.Module) -> str:
    """The reason why a batch norm cannot be folded into a convolution, or an empty string."""
    if any('forward' in vars(module) for module in (conv, norm)):
        return 'a forward of its own'
    if not is_plain(conv, nn.Conv2d):
        return f'the convolution before it is a {type(conv).__name__}'
    if isinstance(conv, Conv2d) and conv.folded_norm is not None:
        return 'the convolution before it has another batch norm'
    if any(module._forward_hooks or module._forward_pre_hooks for module in (conv, norm)):
        return 'a hook reads the tensor between the two'
    return 'no running statistics' if norm.running_mean is None else ''


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _trace(parent: nn.Module, modes: list[nn.Module]) -> list[tuple[nn.Module | None, fx.Node]] | str:
    """The calls in the forward in evaluation mode, with the module of each if there is one; or why it has no trace.

    The mode of ``modes`` is that of evaluation, too: a forward may read it, as that of Shunted Transformer does.
    """
    clone = copy(parent)  # with the same children; keeps what the forward assigns to self
    clone.training = False
    parameters = inspect.signature(clone.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    before = [module.training for module in modes]
    try:
        for module in modes:
            module.training = False
        nodes = _Tracer().trace(clone, defaults or None).nodes
    except Exception as error:  # noqa: BLE001  (of any type: the code is not ours)
        return f'the forward of {type(parent).__name__} cannot be traced: {str(error).splitlines()[0]}'
    finally:
        for module, mode in zip(modes, before, strict=True):
            module.training = mode
    modules = dict(clone.named_modules(remove_duplicate=False))
    return [(modules[node.target] if node.op == 'call_module' else None, node) for node in nodes]


def _input(node: fx.Node) -> fx.Node | None:
    """The only argument of a call, if nothing else uses it."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return source if isinstance(source, fx.Node) and len(source.users) == 1 else None


def _convolutions_before(parent: nn.Module, norms: list[nn.Module]) -> tuple[dict[nn.Module, nn.Module], str]:
    """The module whose output is the input of each batch norm and goes nowhere else, and why there is none."""
    calls = _trace(parent, norms)
    if isinstance(calls, str):
        return {}, calls
    modules = {node: module for module, node in calls}
    times = Counter(modules.values())
    if not any(times[norm] for norm in norms):
        return {}, f'the forward of {type(parent).__name__} does not call it in evaluation mode'
    found = {}
    for norm, node in calls:
        conv = modules.get(_input(node)) if norm in norms else None
        if isinstance(conv, nn.Conv2d) and times[norm] == times[conv] == 1:
            found[norm] = conv
    return found, ''


def use_inplace_relu(model: nn.Module) -> int:
    """Make each ``nn.ReLU`` overwrite its input where no gradient is needed, in place; ``restore`` undoes it.

    Only after a convolution, linear layer, batch norm or sum whose result the forward uses nowhere else; found as in
    :func:`fold_batch_norms`.

    Returns:
        The number of changed modules.
    """
    count = 0
    for parent in list(model.modules()):
        if isinstance(parent, CONTAINERS):
            continue
        relus = [child for child in _children(parent) if type(child) is nn.ReLU and not child.inplace]
        calls = _trace(parent, []) if relus else ''
        if isinstance(calls, str):
            continue
        modules = {node: module for module, node in calls}
        for relu in relus:
            inputs = [_input(node) for module, node in calls if module is relu]
            if inputs and all(node is not None and _is_new(node, modules) for node in inputs):
                change_class(relu, InplaceReLU)
                count += 1
    return count


def _is_new(node: fx.Node, modules: dict[fx.Node, nn.Module | None]) -> bool:
    """Whether a result is a tensor that nothing else holds."""
    if node.op == 'call_function' and node.target in (operator.add, torch.add):
        return True
    if node.op == 'call_function' and node.target is operator.iadd:
        source = node.args[0]
        return isinstance(source, fx.Node) and len(source.users) == 1 and source.op == 'call_module'
    module = modules[node]
    if module is None or module._forward_hooks:
        return False
    return is_plain(module, nn.Conv2d) or is_plain(module, nn.Linear) or _is_batch_norm(module, folded=True)
