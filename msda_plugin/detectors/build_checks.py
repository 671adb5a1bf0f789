"""Checks, when a detection transformer is built, that its parts fit one another."""

from collections.abc import Mapping

import torch
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.necks import ChannelMapper
from torch import nn


def check_given(name: str, parts: Mapping[str, dict | None]) -> None:
    """Raise ValueError unless there is a config for every part of detector ``name``."""
    if missing := [part for part, cfg in parts.items() if cfg is None]:
        raise ValueError(f'{name} needs a config for each of {list(parts)}; missing: {missing}')


def check_parts(detector: DetectionTransformer, neck_cfg: Mapping | None, num_maps: int, wants: str) -> None:
    """Check what any detection transformer needs of its parts.

    Args:
        detector: built, with all its parts.
        neck_cfg: config of its neck, None where it has none.
        num_maps: how many maps the transformer takes.
        wants: says so in an error ('num_feature_levels=4').

    Raises:
        ValueError: numbers of channels, maps or boxes do not fit.
    """
    neck_cfg = neck_cfg or {}
    widths = {
        'encoder': detector.embed_dims,
        'decoder': detector.decoder.embed_dims,
        'bbox_head': detector.bbox_head.embed_dims,
        'positional_encoding (2 * num_feats)': 2 * detector.positional_encoding.num_feats,
    }
    if 'out_channels' in neck_cfg:
        widths['neck (out_channels)'] = neck_cfg['out_channels']
    if len(set(widths.values())) > 1:
        raise ValueError(f'all parts need the same number of channels, but embed_dims are {widths}')
    num_outs = neck_cfg.get('num_outs')
    if num_outs is None and detector.with_neck and isinstance(detector.neck, ChannelMapper):
        num_outs = len(detector.neck.convs)
    if num_outs not in (None, num_maps):
        raise ValueError(f'the neck gives num_outs={num_outs} maps, but {wants}: make them equal')
    _check_backbone(detector, neck_cfg, num_maps, wants)

    num_classes = detector.bbox_head.num_classes if detector.bbox_head.loss_cls.use_sigmoid else 1
    num_boxes = detector.num_queries * num_classes
    max_per_img = detector.test_cfg.get('max_per_img', detector.num_queries)
    if max_per_img > num_boxes:
        # A softmax gives a query one class alone.
        raise ValueError(
            f'test_cfg.max_per_img={max_per_img} asks for more boxes than there are: num_queries='
            f'{detector.num_queries} x {num_classes} classes = {num_boxes}; lower max_per_img, or raise '
            'num_queries'
        )


def _check_backbone(detector: DetectionTransformer, neck_cfg: Mapping, num_maps: int, wants: str) -> None:
    channels = map_channels(detector.backbone)
    if channels is None:
        return
    if not detector.with_neck:
        if channels != [detector.embed_dims] * num_maps:
            raise ValueError(
                f'the backbone gives maps of {channels} channels, and there is no neck, but {wants} and '
                f'embed_dims={detector.embed_dims}: add a neck, such as mmdet.ChannelMapper'
            )
        return
    in_channels = neck_cfg.get('in_channels')
    if isinstance(in_channels, int):
        in_channels = [in_channels] * len(channels)
    if in_channels is not None and list(in_channels) != channels:
        raise ValueError(
            f'the backbone gives maps of {channels} channels, but neck.in_channels is '
            f'{list(in_channels)}: make them equal (out_indices of the backbone chooses its maps)'
        )


def map_channels(backbone: nn.Module) -> list[int] | None:
    """How many channels the maps of a backbone have, by a small image; None if it cannot be run on one.

    Nothing of the backbone changes: it is in evaluation mode meanwhile.
    """
    tensor = next(backbone.parameters(), torch.empty(0))
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            maps = backbone(tensor.new_zeros(1, 3, 64, 64))
        return [feature.shape[1] for feature in maps]
    except Exception:  # an operator for another device, a larger image wanted, ...: training will tell
        return None
    finally:
        backbone.train(training)
