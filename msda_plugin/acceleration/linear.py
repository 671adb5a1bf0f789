"""Linear layers of float32 models in oneDNN, for inference on CPUs where it is faster than PyTorch's choice.

PyTorch computes them in MKL, which runs AVX2 code on CPUs of other vendors than Intel, and copies the bias into the
output first. oneDNN runs AVX-512 code on all CPUs that have it.
"""

import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from msda_plugin.acceleration.convert_model import change_class, is_plain

CPUINFO = Path('/proc/cpuinfo')


class Linear(nn.Linear):
    """``nn.Linear`` that computes in oneDNN where it runs in float32 on a CPU and needs no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias = self.weight, self.bias
        if (
            x.device.type == 'cpu'
            and x.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled('cpu')
            and torch.backends.mkldnn.enabled
            and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
            and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        ):
            return onednn_linear(x, weight, bias)
        return super().forward(x)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``F.linear``, for float32 tensors of any strides on the CPU; it has no backward pass."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


def use_onednn_linear(model: nn.Module) -> int:
    """Make each ``nn.Linear`` of a model compute in oneDNN, in place; ``restore`` undoes it.

    No module changes where oneDNN is not known to be faster.

    Returns:
        The number of changed layers.
    """
    count = 0
    for module in model.modules() if onednn_is_faster() else ():
        if is_plain(module, nn.Linear) and not isinstance(module, Linear):
            change_class(module, Linear)
            count += 1
    return count


def onednn_is_faster() -> bool:
    """Whether this CPU has AVX-512 and MKL does not use it."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith('AVX512')
        and not _is_intel()
    )


def _is_intel() -> bool:
    return 'GenuineIntel' in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())
