"""Workarounds for dependencies, each with its reason and the version that makes it unnecessary.

Functions that replace code of a dependency return a handle: ``close()``, or the end of a ``with`` block, restores the
original. `restore` does so for all replacements. Importing msda_plugin calls only `allow_checkpoint_types`.
"""

import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from msda_plugin import safe_loading


class Replaced(ExitStack):
    """Attributes that were replaced; ``close()`` restores them."""

    def set(self, owner: object, name: str, value: object) -> None:
        if self not in _in_effect:
            _in_effect.append(self)
            self.callback(_in_effect.remove, self)
        if hasattr(owner, name):
            self.callback(setattr, owner, name, getattr(owner, name))
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)


_in_effect: list[Replaced] = []


def restore() -> None:
    """Restore everything that the functions of this module replaced."""
    for replaced in list(_in_effect):
        replaced.close()


def allow_checkpoint_types() -> None:
    """Allow ``torch.load(weights_only=True)``, the default since torch 2.6, to read MMEngine's checkpoints.

    MMEngine stores its message hub next to the weights: ``HistoryBuffer`` objects that hold NumPy arrays and name four
    of their methods. These types and methods are added to torch's allow-list, so that ``--resume`` and ``mim test``
    work (https://github.com/open-mmlab/mmengine/issues/1655).

    Ends with: an mmengine that adds them; 0.10.7 does not.
    """
    from mmengine.logging import HistoryBuffer

    numpy_1 = np.lib.NumpyVersion(np.__version__) < '2.0.0'
    multiarray = np.core.multiarray if numpy_1 else np._core.multiarray
    dtypes = [type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'uint32', 'bool')]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *dtypes,
            # By their names in NumPy 1 and in NumPy 2, because either may have written the checkpoint.
            *(
                (getattr(multiarray, name), f'numpy.{package}.multiarray.{name}')
                for package in ('core', '_core')
                for name in ('_reconstruct', 'scalar')
            ),
            # The pickle names the methods with `getattr`, which is not safe to allow in general.
            (_history_buffer_method, 'builtins.getattr'),
        ]
    )


def load_checkpoints_strictly() -> Replaced:
    """Let MMEngine read checkpoints with `msda_plugin.safe_loading`, until the handle is closed.

    onedl-mmengine 0.10.12 loads a file that ``weights_only=True`` refuses again with ``weights_only=False``, which runs
    any code in it. Both MMEngines load URLs with a function of torch.hub whose default is ``weights_only=False``, and
    do not compare a download with the hash in its name. `msda_plugin.DetectionRunner` installs this and logs it;
    `load_detector` uses it while it reads a checkpoint.

    Returns:
        The handle; an empty one if the replacement is already installed.

    Ends with: an mmengine that never loads with ``weights_only=False``; 0.10.7 and onedl-mmengine 0.10.12 do.
    """
    from mmengine.runner import checkpoint

    allow_checkpoint_types()
    replaced = Replaced()
    if checkpoint.load_from_local is load_from_local:
        return replaced
    if hasattr(checkpoint, '_safe_torch_load'):
        replaced.set(checkpoint, '_safe_torch_load', safe_loading.load_checkpoint)
    replaced.set(checkpoint.CheckpointLoader, '_schemes', checkpoint.CheckpointLoader._schemes.copy())
    for loader, schemes in ((load_from_local, ''), (load_from_http, ('http://', 'https://'))):
        checkpoint.CheckpointLoader.register_scheme(schemes, loader, force=True)
        replaced.set(checkpoint, loader.__name__, loader)  # other schemes ('torchvision://', …) call it
    return replaced


# MMEngine logs the names of these functions.
def load_from_local(filename: str, map_location: str | torch.device | None = None) -> object:
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'the checkpoint {filename} does not exist; give the path of a .pth file, or a URL')
    return safe_loading.load_checkpoint(path, map_location)


def load_from_http(
    filename: str, map_location: str | torch.device | None = None, model_dir: str | None = None, progress: bool = False
) -> object:
    """Load the checkpoint of a URL, which one of several processes downloads."""
    from mmengine.dist import barrier, get_rank

    try:
        if get_rank() == 0:
            safe_loading.fetch(filename, model_dir, progress=progress)
    finally:  # the other processes wait here; after an error they fail in the same way
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
    """Around ``init_weights`` of a detector, load the ``Pretrained`` checkpoint of its ``init_cfg`` last.

    MMDetection's DETRs let MMEngine load the pretrained detector first, and then overwrite its encoder and decoder with
    random weights.

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


def accept_sides_of_one_pixel() -> Replaced:
    """Let mmcv resize and flip images that are one pixel wide or hundreds of times longer than wide.

    The short side of a long image, scaled to fit, is less than half a pixel: mmcv rounds it to 0, which OpenCV refuses;
    here it is 1. An image flipped along a side of one pixel is a view with a negative stride that NumPy calls
    contiguous; MMDetection does not copy it then, and torch refuses it. `msda_plugin.DetectionRunner` installs this.

    Returns:
        The handle; an empty one if the replacement is already installed.

    Ends with: an mmcv that handles such images in ``rescale_size`` and ``imflip``; 2.1.0 and onedl-mmcv 2.3.6 do not.
    """
    import mmcv

    replaced = Replaced()
    if mmcv.imflip is not _imflip:
        replaced.set(mmcv.image.geometric, '_scale_size', _scale_size)
        replaced.set(mmcv, 'imflip', _imflip)
    return replaced


def registered_types_only() -> Replaced:
    """Let MMEngine's registries find registered types only, until the handle is closed.

    They import the dotted path of a type that is not registered, so a config from an untrusted file could call any
    function: ``type='os.system'``. `msda_plugin.engine.inference.load_detector` uses it for configs from checkpoints.

    Ends with: an mmengine that can be told not to; 0.10.7 and onedl-mmengine 0.10.12 cannot.
    """
    from mmengine.registry import registry

    replaced = Replaced()
    replaced.set(registry, 'get_object_from_string', lambda name: None)
    return replaced


def match_non_finite_predictions() -> Replaced:
    """Let the Hungarian assigners match predictions that are NaN or infinite, to any object.

    MMDetection's assigners end in SciPy's ``matrix contains invalid numeric entries``, and those of msda_plugin in a
    ``FloatingPointError``. With arbitrary matches the loss is NaN instead, in one of several processes, too, and
    `msda_plugin.engine.hooks.SkipNonFiniteHook` skips the step. The hook installs this during a training.

    Returns:
        The handle; an empty one if the replacement is already installed.

    Ends with: an mmdet whose assigners accept such costs; 3.3.0 and onedl-mmdetection 3.5.1 do not.
    """
    from mmdet.models.task_modules.assigners import hungarian_assigner, topk_hungarian_assigner

    from msda_plugin.heads.matching import HungarianMatcher

    replaced = Replaced()
    if hungarian_assigner.linear_sum_assignment is not _assign_finite:
        for module in (hungarian_assigner, topk_hungarian_assigner):
            replaced.set(module, 'linear_sum_assignment', _assign_finite)
        replaced.set(HungarianMatcher, 'accepts_non_finite', True)
    return replaced


def _assign_finite(costs: np.ndarray | torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(np.nan_to_num(np.asarray(costs)))


def _imflip(img: np.ndarray, direction: str = 'horizontal') -> np.ndarray:
    from mmcv.image.geometric import imflip

    flipped = imflip(img, direction)
    return flipped.copy() if flipped.flags.c_contiguous else flipped


def _scale_size(size: tuple[int, int], scale: float | tuple[float, float]) -> tuple[int, int]:
    factors = scale if isinstance(scale, tuple) else (scale, scale)
    width, height = (max(1, int(side * float(factor) + 0.5)) for side, factor in zip(size, factors, strict=True))
    return width, height


def import_mmdet() -> None:
    """Import MMDetection's datasets and metrics without their notices about optional packages.

    onedl-mmdetection prints 'Could not import OneDL. Skipping OneDL datasets.' twice, for a package that is not public,
    and warns that faster_coco_eval is missing, even if no config uses it.

    Ends with: an mmdet that imports them silently; onedl-mmdetection 3.5.1 does not, mmdet 3.3.0 does.
    """
    from mmengine.logging import logger

    with Replaced() as replaced, warnings.catch_warnings():
        # Shadows the built-in function in the module of `print_log`.
        replaced.set(logger, 'print', lambda text: None if 'OneDL' in text else print(text))
        warnings.filterwarnings('ignore', 'faster_coco_eval is not installed')
        for name in ('mmdet.datasets', 'mmdet.evaluation'):
            import_module(name)


def redirect_pycocotools(write: Callable[[str], object]) -> Replaced:
    """Pass what pycocotools prints to ``write``, until the handle is closed.

    pycocotools prints its progress and its table of results, and has no option to log them or to leave them out.

    Ends with: a pycocotools that logs; 2.0.11 prints.
    """
    replaced = Replaced()
    for name in ('pycocotools.coco', 'pycocotools.cocoeval', 'mmdet.datasets.api_wrappers.cocoeval_mp'):
        if name in sys.modules:  # shadows the built-in function
            replaced.set(sys.modules[name], 'print', lambda *values, **_: write(' '.join(map(str, values))))
    return replaced


def trace_sizes_of_unflatten() -> Replaced:
    """Let ``torch.jit.trace`` record the sizes of tensors that pass ``Tensor.unflatten``.

    It records them as numbers, so a graph for images of any size keeps those of its example.

    Ends with: torch's TorchScript exporter; 2.10 to 2.13 need it.
    """

    def unflatten(tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        dim = dim % tensor.dim()
        return tensor.view(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])

    replaced = Replaced()
    replaced.set(torch.Tensor, 'unflatten', unflatten)
    return replaced


def export_stock_detectors() -> Replaced:
    """Let ``torch.export`` trace MMDetection's Deformable DETR, the detectors derived from it, and Mask2Former.

    They keep the sizes of their maps in a tensor (``torch._shape_as_tensor``), whose numbers the layers read; while
    exporting, tensors have none ("its data is not allocated yet"). In the replaced code the sizes are numbers. DINO's
    ``len(query)``, ``Tensor.new_tensor`` and ``torch.linspace`` would fix them and the batch to those of the example.

    Ends with: an mmdet whose sizes are numbers; 3.3.0 and onedl-mmdetection 3.5.1 have tensors.
    """
    from mmdet.models.detectors import DINO, DeformableDETR
    from mmdet.models.layers import MSDeformAttnPixelDecoder

    original = DeformableDETR.pre_transformer

    def pre_transformer(self, mlvl_feats, batch_data_samples=None):
        inputs = original(self, mlvl_feats, batch_data_samples)
        for part in inputs:
            part['spatial_shapes'] = tuple(tuple(feat.shape[-2:]) for feat in mlvl_feats)
        return inputs

    def forward_decoder(self, query, memory, memory_mask, dn_mask=None, **inputs):
        hidden_states, references = self.decoder(
            query=query,
            value=memory,
            key_padding_mask=memory_mask,
            self_attn_mask=dn_mask,
            reg_branches=self.bbox_head.reg_branches,
            **inputs,
        )
        return dict(hidden_states=hidden_states, references=list(references))

    linspace = torch.linspace

    def count_pixels(start, end, steps, **options):
        if not isinstance(steps, torch.SymInt):
            return linspace(start, end, steps, **options)
        return torch.arange(steps, **options) + start  # the rows or columns of a map, at a distance of 1

    def new_tensor(tensor, data, dtype=None, device=None, **options):
        return torch.tensor(data, dtype=dtype or tensor.dtype, device=device or tensor.device, **options)

    replaced = Replaced()
    replaced.set(torch, '_shape_as_tensor', lambda tensor: torch.tensor(tensor.shape))
    replaced.set(torch, 'linspace', count_pixels)
    replaced.set(torch.Tensor, 'new_tensor', new_tensor)
    replaced.set(DeformableDETR, 'pre_transformer', pre_transformer)
    replaced.set(DINO, 'forward_decoder', forward_decoder)
    replaced.set(MSDeformAttnPixelDecoder, 'forward', _decode_pixels)
    return replaced


def _decode_pixels(self, feats: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``MSDeformAttnPixelDecoder.forward``: maps, fine to coarse -> mask features, and maps from coarse to fine."""
    from msda_plugin.layers.reference_points import pixel_centers

    batch, coarse = feats[0].shape[0], [*feats[::-1]][: self.num_encoder_levels]
    shapes = tuple(tuple(feat.shape[-2:]) for feat in coarse)
    inputs, positions = [], []
    for feat, conv, embed in zip(coarse, self.input_convs, self.level_encoding.weight, strict=True):
        inputs.append(conv(feat).flatten(2).transpose(1, 2))
        no_padding = feat.new_zeros((batch, *feat.shape[-2:]), dtype=torch.bool)
        position = self.postional_encoding(no_padding)
        positions.append(position.flatten(2).transpose(1, 2) + embed)
    ratios = feats[0].new_ones(batch, len(shapes), 2)
    memory = self.encoder(
        query=torch.cat(inputs, 1),
        query_pos=torch.cat(positions, 1),
        key_padding_mask=None,
        spatial_shapes=shapes,
        reference_points=pixel_centers(shapes, ratios)[:, :, None].expand(-1, -1, len(shapes), -1),
        level_start_index=None,
        valid_ratios=ratios,
    )
    parts = memory.transpose(1, 2).split([height * width for height, width in shapes], 2)
    maps = [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
    for level in reversed(range(self.num_input_levels - self.num_encoder_levels)):
        feat = self.lateral_convs[level](feats[level])
        above = torch.nn.functional.interpolate(maps[-1], size=feat.shape[-2:], mode='bilinear')
        maps.append(self.output_convs[level](feat + above))
    return self.mask_feature(maps[-1]), maps[: self.num_outs]
