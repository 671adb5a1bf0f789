"""Checks that the parts of a detection transformer fit together."""

from collections.abc import Mapping, Sequence

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt, SwinTransformer
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.necks import ChannelMapper
from torch import Tensor, nn


class NeckInputCheck:
    """Mixin for detectors that checks the maps of the backbone before the neck takes them.

    It reports what a convolution of the neck would reject less clearly, for backbones that do not declare their
    channels. Must precede MMDetection's class in the list of bases.

    Attributes:
        neck_in_channels: ``in_channels`` of the neck's config; None skips the check.
    """

    neck_in_channels: int | Sequence[int] | None = None

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Images (bs, 3, h, w) -> maps of the neck, or of the backbone if there is no neck.

        Raises:
            ValueError: If the backbone's maps do not have the channels that the neck takes.
        """
        feats = self.backbone(batch_inputs)
        if not self.with_neck:
            return feats
        # Sizes are plain numbers: no synchronization, and no trace of the check in a compiled or exported graph.
        check_in_channels([feat.shape[1] for feat in feats], self.neck_in_channels)
        return self.neck(feats)


def check_given(name: str, parts: Mapping[str, dict | None]) -> None:
    """Raise ValueError unless every part of detector ``name`` has a config."""
    if missing := [part for part, cfg in parts.items() if cfg is None]:
        raise ValueError(f'{name} needs a config for each of {list(parts)}; missing: {missing}')


def check_parts(detector: DetectionTransformer, neck_cfg: Mapping | None, num_maps: int, wants: str) -> None:
    """Check the parts of a detection transformer against each other.

    Args:
        detector: the detector, built.
        neck_cfg: config of its neck; None if it has none.
        num_maps: number of maps the transformer takes.
        wants: the same in words, for errors ('num_feature_levels=4').

    Raises:
        ValueError: If numbers of channels, maps or boxes do not match.
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
    channels = declared_channels(detector.backbone)
    if channels is not None and detector.with_neck:
        check_in_channels(channels, neck_cfg.get('in_channels'))
    elif channels not in (None, [detector.embed_dims] * num_maps):
        raise ValueError(
            f'the backbone gives maps of {channels} channels, and there is no neck, but {wants} and '
            f'embed_dims={detector.embed_dims}: add a neck, such as mmdet.ChannelMapper'
        )
    check_max_per_img(detector)


def check_max_per_img(detector: DetectionTransformer) -> None:
    """Raise ValueError if ``test_cfg.max_per_img`` exceeds the number of boxes of a detection transformer."""
    num_classes = detector.bbox_head.num_classes if detector.bbox_head.loss_cls.use_sigmoid else 1
    num_boxes = detector.num_queries * num_classes
    max_per_img = detector.test_cfg.get('max_per_img', detector.num_queries)
    if max_per_img > num_boxes:
        # With a softmax, a query has a single class.
        raise ValueError(
            f'test_cfg.max_per_img={max_per_img} asks for more boxes than there are: num_queries='
            f'{detector.num_queries} x {num_classes} classes = {num_boxes}; lower max_per_img, or raise '
            'num_queries'
        )


def declared_channels(backbone: nn.Module) -> list[int] | None:
    """Channels of each map that a backbone returns, if it declares them.

    msda_plugin's backbones declare them as ``out_channels``, one value per map. Of MMDetection's, ResNet, ResNeXt and
    Swin Transformer have public attributes that give them.
    """
    out_channels = getattr(backbone, 'out_channels', None)
    out_indices = getattr(backbone, 'out_indices', None)
    if isinstance(out_channels, Sequence):
        # Some code uses this name for all stages, including those that are not returned.
        is_per_map = not isinstance(out_indices, Sequence) or len(out_indices) == len(out_channels)
        return list(out_channels) if is_per_map else None
    # Exact types, because subclasses may return other maps. Maps come in the order of the stages.
    if type(backbone) is SwinTransformer:
        return [backbone.num_features[i] for i in sorted(backbone.out_indices)]
    if type(backbone) in (ResNet, ResNetV1d, ResNeXt):
        return [backbone.feat_dim // 2 ** (backbone.num_stages - 1 - i) for i in sorted(backbone.out_indices)]
    return None


def check_in_channels(channels: Sequence[int], in_channels: int | Sequence[int] | None) -> None:
    """Check the channels of a backbone's maps against ``in_channels`` of the neck.

    Raises:
        ValueError: If they differ. An int stands for every map; None accepts any channels.
    """
    if isinstance(in_channels, int):
        in_channels = [in_channels] * len(channels)
    if in_channels is not None and list(in_channels) != list(channels):
        raise ValueError(
            f'the backbone gives maps of {list(channels)} channels, but neck.in_channels is '
            f'{list(in_channels)}: make them equal (out_indices of the backbone selects its maps)'
        )
