"""Every workaround for a dependency, each with its reason and the version that ends it."""
import numpy as np
import torch


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read the checkpoints that MMEngine writes.

    MMEngine stores its message hub beside the weights: ``HistoryBuffer`` objects that hold NumPy arrays and name four
    methods of their own. Exactly these are added to torch's allow-list, so that ``--resume`` and ``mim test`` work and
    nothing else gets through.

    Ends with: onedl-mmengine, which loads them by itself; no release of mmengine (0.10.7 is the last) does.
    """
    from mmengine.logging import HistoryBuffer
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'uint32', 'bool')]
    torch.serialization.add_safe_globals([
        HistoryBuffer, multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *dtypes,
        # The pickle names the methods by `getattr`, which must not be allowed as it is.
        (_history_buffer_method, 'builtins.getattr'),
    ])


def _history_buffer_method(owner: type, name: str):
    from mmengine.logging import HistoryBuffer
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise ValueError(f'a checkpoint may name HistoryBuffer.min, max, current and mean; this one asks for {name!r} '
                         f'of {owner!r}: do not load it')
    return getattr(owner, name)
