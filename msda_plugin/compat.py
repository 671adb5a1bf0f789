"""Every workaround for a dependency, each with its reason and the version that ends it."""
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read the checkpoints that MMEngine writes.

    MMEngine stores its message hub beside the weights: ``HistoryBuffer`` objects that hold NumPy arrays and name four
    methods of their own. Exactly these are added to torch's allow-list, so that ``--resume`` and ``mim test`` work and
    nothing else gets through (https://github.com/open-mmlab/mmengine/issues/1655).

    onedl-mmengine 0.10.12 reads them as well, but by allowing `getattr`, and where a file is refused it loads it again
    with ``weights_only=False``, which runs whatever the file says. Its loader is replaced by the strict one.

    Ends with: an mmengine that loads its own checkpoints and refuses others; 0.10.7 and onedl-mmengine 0.10.12 do not.
    """
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import checkpoint
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'uint32', 'bool')]
    torch.serialization.add_safe_globals([
        HistoryBuffer, multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *dtypes,
        # The pickle names the methods by `getattr`, which must not be allowed as it is.
        (_history_buffer_method, 'builtins.getattr'),
    ])
    if hasattr(checkpoint, '_safe_torch_load'):
        checkpoint._safe_torch_load = _load_weights_only


def _load_weights_only(file, map_location=None, weights_only=True) -> dict:
    return torch.load(file, map_location=map_location, weights_only=True)


def _history_buffer_method(owner: type, name: str):
    from mmengine.logging import HistoryBuffer
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(
            f'a checkpoint may name HistoryBuffer.min, max, current and mean; this one asks for {name!r} of {owner!r}')
    return getattr(owner, name)


@contextmanager
def pretrained_last(module: torch.nn.Module) -> Iterator[None]:
    """Around ``init_weights`` of a detector: what ``init_cfg`` wants loaded (``Pretrained``) is loaded at the end.

    The ``init_weights`` of MMDetection's DETRs let MMEngine load a pretrained detector first, and then overwrite its
    encoder and decoder with random weights.

    Ends with: an mmdet whose DETRs load last; 3.3.0 and onedl-mmdetection 3.5.1 do not.
    """
    from mmengine.model import PretrainedInit, initialize
    init_cfg = module.init_cfg
    cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
    pretrained = [cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)]
    module.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
    yield
    module.init_cfg = init_cfg
    initialize(module, pretrained)
