"""A float32 model in bfloat16 or float16, which keeps its parameters.

Convolutions and linear layers run under ``torch.autocast``. The layers that predict boxes and scores stay in float32,
and so do reference points, sampling locations, position encodings, normalizations and post-processing.
"""

import re

import torch
from torch import Tensor, nn

from msda_plugin.acceleration.convert_model import change_class, is_plain

# Parts of the names of modules that predict boxes and scores, in MMDetection's and transformers' models.
PREDICTORS = re.compile(r'bbox|box_|cls_|class_|score|reference_points|reg_branches')


class Autocast(nn.Module):
    """A model that runs under autocast in evaluation or training mode, or both, and returns float32."""

    added_fields = ('inference_dtype', 'training_dtype')
    inference_dtype: torch.dtype | None = None
    training_dtype: torch.dtype | None = None

    def forward(self, *args, **kwargs) -> object:
        """As in the stock class; floating-point tensors of a lower precision in the outputs become float32."""
        dtype = self.training_dtype if self.training else self.inference_dtype
        if dtype is None:
            return super().forward(*args, **kwargs)
        with torch.autocast(next(self.parameters()).device.type, dtype):
            outputs = super().forward(*args, **kwargs)
        return _to_float32(outputs)


class Float32Linear(nn.Linear):
    """``nn.Linear`` that computes in float32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        device = x.device.type
        if not torch.is_autocast_enabled(device) or self.weight.dtype != torch.float32:
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            return super().forward(x.float())


def check_dtype(model: nn.Module, dtype: torch.dtype, training: bool = False) -> None:
    """Raise if a model cannot run in ``dtype``, or not faster than in float32."""
    parameter = next(model.parameters(), torch.empty(0))
    device = parameter.device.type
    # The gradients of a training in float16 would need a scaled loss.
    supported = (torch.bfloat16, torch.float16) if device == 'cuda' and not training else (torch.bfloat16,)
    if dtype not in supported:
        raise ValueError(
            f'{"training_dtype" if training else "dtype"} is {dtype}; expected {" or ".join(map(str, supported))} on '
            f'{device}, or None for the dtype of the weights'
        )
    if parameter.dtype != torch.float32:
        raise ValueError(
            f'dtype {dtype} needs a float32 model, but its weights are {parameter.dtype}: leave it out, or call '
            'model.float()'
        )
    if device == 'cpu' and not cpu_has_bfloat16():
        raise ValueError(
            f'this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16), so {dtype} would be slower than float32: '
            'leave it out'
        )
    if device == 'cuda' and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError('this GPU has no bfloat16: use dtype=torch.float16')


def use_dtype(model: nn.Module, dtype: torch.dtype, training: bool = False) -> None:
    """Make a model run in ``dtype`` in evaluation or training mode, in place; ``restore`` undoes it."""
    while isinstance(getattr(model, 'module', None), nn.Module):  # test_step of a wrapper skips its forward
        model = model.module
    change_class(model, Autocast)
    vars(model)['training_dtype' if training else 'inference_dtype'] = dtype
    for name, module in model.named_modules():
        if is_plain(module, nn.Linear) and PREDICTORS.search(name):
            change_class(module, Float32Linear)


def cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, 'get_capabilities'):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16'))
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _to_float32(outputs: object) -> object:
    """The same nested tuples, lists and mappings, also named ones, with float32 instead of lower precisions."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    if isinstance(outputs, tuple) and hasattr(outputs, '_fields'):
        return type(outputs)(*map(_to_float32, outputs))
    if type(outputs) in (tuple, list):
        return type(outputs)(map(_to_float32, outputs))
    if isinstance(outputs, dict):
        converted = {key: _to_float32(value) for key, value in outputs.items()}
        return converted if type(outputs) is dict else type(outputs)(**converted)  # transformers' ModelOutput
    return outputs
