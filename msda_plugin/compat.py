"""Every workaround for a dependency, each with its reason and the version that ends it."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from msda_plugin import safe_loading


def load_checkpoints_strictly() -> None:
    """Let MMEngine read the checkpoints that it writes, and no code from any checkpoint.

    MMEngine stores its message hub beside the weights: ``HistoryBuffer`` objects that hold NumPy arrays and name four
    methods of their own. Exactly these are added to the allow-list of ``torch.load(weights_only=True)``, the default
    since torch 2.6, so that ``--resume`` and ``mim test`` work and nothing else gets through
    (https://github.com/open-mmlab/mmengine/issues/1655).

    onedl-mmengine 0.10.12 reads them as well, but by allowing `getattr`, and where a file is refused it loads it again
    with ``weights_only=False``, which runs whatever the file says. Both MMEngines load URLs by a function of torch.hub
    whose default is ``weights_only=False``, and do not compare a download with the hash in its name. Their loaders are
    replaced by those of `msda_plugin.safe_loading`.

    Ends with: an mmengine that loads its own checkpoints and refuses others; 0.10.7 and onedl-mmengine 0.10.12 do not.
    """
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import checkpoint

    numpy_1 = np.lib.NumpyVersion(np.__version__) < '2.0.0'
    multiarray = np.core.multiarray if numpy_1 else np._core.multiarray
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'uint32', 'bool')]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *dtypes,
            # By their name in NumPy 1 and in NumPy 2: a checkpoint may come from the other one.
            *(
                (getattr(multiarray, name), f'numpy.{package}.multiarray.{name}')
                for package in ('core', '_core')
                for name in ('_reconstruct', 'scalar')
            ),
            # The pickle names the methods by `getattr`, which must not be allowed as it is.
            (_history_buffer_method, 'builtins.getattr'),
        ]
    )
    if hasattr(checkpoint, '_safe_torch_load'):
        checkpoint._safe_torch_load = safe_loading.load_checkpoint
    for loader, schemes in ((load_from_local, ''), (load_from_http, ('http://', 'https://'))):
        checkpoint.CheckpointLoader.register_scheme(schemes, loader, force=True)
        setattr(checkpoint, loader.__name__, loader)  # which other schemes ('torchvision://', …) end in


# Named as in MMEngine, which logs the names.
def load_from_local(filename: str, map_location: str | torch.device | None = None) -> object:
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'the checkpoint {filename} does not exist; give the path of a .pth file, or a URL')
    return safe_loading.load_checkpoint(path, map_location)


def load_from_http(
    filename: str, map_location: str | torch.device | None = None, model_dir: str | None = None, progress: bool = False
) -> object:
    """The checkpoint of a URL; of several processes the first one downloads it."""
    from mmengine.dist import barrier, get_rank

    try:
        if get_rank() == 0:
            safe_loading.fetch(filename, model_dir, progress=progress)
    finally:  # also where it fails: the others wait here, and then fail alike
        barrier()
    return safe_loading.load_checkpoint(safe_loading.fetch(filename, model_dir), map_location)


def _history_buffer_method(owner: type, name: str):
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(
            f'a checkpoint may name HistoryBuffer.min, max, current and mean; this one asks for {name!r} of {owner!r}'
        )
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


def accept_sides_of_one_pixel() -> None:
    """Let mmcv resize and flip pictures that are hundreds of times longer than wide, or a pixel wide from the start.

    Scaled down to fit, their short side is less than half a pixel, which mmcv rounds to 0 and OpenCV refuses; here it
    is 1. Flipped along a side of one pixel, a picture is a view with a negative stride that NumPy calls contiguous;
    MMDetection does not copy it then, and torch refuses it. `msda_plugin.DetectionRunner` calls this.

    Ends with: an mmcv whose ``rescale_size`` and ``imflip`` do so; 2.1.0 and onedl-mmcv 2.3.6 do not.
    """
    import mmcv

    mmcv.image.geometric._scale_size = _scale_size
    mmcv.imflip = _imflip


def _imflip(img: np.ndarray, direction: str = 'horizontal') -> np.ndarray:
    from mmcv.image.geometric import imflip

    flipped = imflip(img, direction)
    return flipped.copy() if flipped.flags.c_contiguous else flipped


def _scale_size(size: tuple[int, int], scale: float | tuple[float, float]) -> tuple[int, int]:
    factors = scale if isinstance(scale, tuple) else (scale, scale)
    width, height = (max(1, int(side * float(factor) + 0.5)) for side, factor in zip(size, factors, strict=True))
    return width, height
