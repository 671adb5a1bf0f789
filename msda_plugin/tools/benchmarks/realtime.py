"""``benchmark realtime``: RT-DETR, RT-DETRv2 or D-FINE against Hugging Face transformers' model of the same weights."""

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from msda_plugin.acceleration import accelerate
from msda_plugin.backbones.hgnetv2 import resolve_arch
from msda_plugin.backbones.resnet_vd import ResNetVD
from msda_plugin.convert import convert_state_dict
from msda_plugin.registry import MODELS
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.model import SameChoices, without_downloads
from msda_plugin.tools.benchmarks.options import add_options, describe_machine
from msda_plugin.tools.benchmarks.timing import Timer
from msda_plugin.tools.common.errors import user_errors

FAMILIES = {'msda_plugin.RTDETR': 'rtdetr', 'msda_plugin.DFINE': 'dfine'}
PER_LEVEL = 'msda_plugin.PointsPerLevelAttention'
EXAMPLE = """example:
  python -m msda_plugin benchmark realtime configs/dfine/dfine_hgnetv2-n_8xb16-160e_coco.py"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``realtime``, whose namespace `run` takes."""
    parser = subparsers.add_parser(
        'realtime',
        help="RT-DETR and D-FINE against transformers' models",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file of configs/rtdetr or configs/dfine')
    add_options(parser, repeats=15)
    parser.add_argument('--height', type=int, default=640, help='image height (default: %(default)s)')
    parser.add_argument('--width', type=int, default=640, help='image width (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=1, help='images per batch (default: %(default)s)')
    return parser


def conditions(args: argparse.Namespace) -> str:
    """The conditions of the measurements."""
    return (
        f'{args.batch}x3x{args.height}x{args.width}, {describe_machine(args)}; median of {args.repeats} runs in '
        'alternation'
    )


def run(args: argparse.Namespace) -> int:
    """Print the times of inference, from images to logits and boxes, their ratio, and the largest difference.

    Weights and images are random; nothing is downloaded.
    """
    with user_errors('benchmark realtime'):
        rows = list(comparisons(args))
    print(f'{args.config}: {conditions(args)}')
    print(f'{"model":<12}{"hf ms":>10}{"ours ms":>10}{"ratio":>8}{"largest difference":>20}')
    for row in rows:
        print(f'{row.case:<12}{row.milliseconds()}{row.difference:>20.1e}', flush=True)
    return 0


def comparisons(args: argparse.Namespace) -> Iterator[Comparison]:
    """Inference as built, and in the deployment form: ``accelerate(model.fuse(), inference=True)``."""
    torch.set_num_threads(args.threads)
    stock, ours = build(args.config, args.device)
    deployed = copy.deepcopy(ours).fuse()
    accelerate(deployed, inference=True)
    images = torch.randn(args.batch, 3, args.height, args.width, generator=torch.Generator().manual_seed(0))
    images = images.to(args.device)
    models = {'as built': ours, 'deployed': deployed}
    with torch.no_grad():
        differences = [largest_difference(stock, model, images) for model in models.values()]
        calls: list[Callable[[], object]] = [lambda: stock(images)]
        calls += [lambda model=model: model(images, mode='tensor') for model in models.values()]
        theirs, *seconds = Timer(torch.device(args.device), args.repeats).in_turn(*calls)
    for name, difference, took in zip(models, differences, seconds, strict=True):
        yield Comparison(
            name, 'inference', ('transformers', 'ours'), Measurement(theirs), Measurement(took), difference
        )


def largest_difference(stock: nn.Module, ours: nn.Module, images: Tensor) -> float:
    """Largest absolute difference of logits or boxes, with the same pixels selected as queries."""
    choices = SameChoices()
    with choices:
        expected = stock(images)
        choices.replay()
        logits, boxes = ours(images, mode='tensor')
    return max(float((a - b).abs().max()) for a, b in ((logits[-1], expected.logits), (boxes[-1], expected.pred_boxes)))


def build(config: str, device: str = 'cpu') -> tuple[nn.Module, nn.Module]:
    """The models of transformers and of the config in evaluation mode, with the same seeded random weights."""
    model = load_model_config(config)
    torch.manual_seed(0)
    stock = transformers_model(model)
    randomize(stock)
    ours = MODELS.build(model)
    # Frozen norms of transformers have no counters of batches, which have no influence.
    ours.load_state_dict(convert_state_dict(stock.state_dict(), FAMILIES[model.type]), strict=False)
    return stock.eval().to(device), ours.eval().to(device)


def load_model_config(config: str) -> ConfigDict:
    """The model of a config file, without pretrained weights.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If its model is neither an RT-DETR nor a D-FINE.
    """
    if not Path(config).is_file():
        raise FileNotFoundError(f'the config {config} does not exist; give a file of configs/rtdetr or configs/dfine')
    cfg = Config.fromfile(config)
    kind = str(cfg.get('model', {}).get('type'))
    if kind not in FAMILIES:
        raise ValueError(f'the model of {config} is {kind}; expected one of {", ".join(FAMILIES)}')
    MMLogger.get_instance('msda_plugin').setLevel(logging.WARNING)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return without_downloads(cfg.model)


def transformers_model(model: ConfigDict) -> nn.Module:
    """The model of transformers for a model's config.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If it has no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'benchmark realtime needs transformers ({error}): pip install transformers') from error
    backbone, neck, decoder = model.backbone, model.neck, model.decoder
    levels = len(neck.in_channels)
    fields = dict(
        num_labels=model.bbox_head.num_classes,
        num_queries=model.num_queries,
        encoder_in_channels=list(neck.in_channels),
        feat_strides=[8, 16, 32][-levels:],
        encode_proj_layers=[levels - 1],
        encoder_hidden_dim=neck.out_channels,
        encoder_ffn_dim=neck.get('feedforward_channels', 1024),
        encoder_attention_heads=neck.get('num_heads', 8),
        hidden_expansion=neck.get('expansion', 1.0),
        decoder_in_channels=[neck.out_channels] * levels,
        decoder_layers=decoder.num_layers,
    )
    if FAMILIES[model.type] == 'dfine':
        if (act := decoder.get('act', 'ReLU')) != 'ReLU':
            raise ValueError(f'the decoder has activations of type {act}; the D-FINE of transformers has ReLU only')
        arch = resolve_arch(backbone.arch)
        channels = list(arch['channels'])
        config = transformers.DFineConfig(
            **fields,
            backbone_config=transformers.HGNetV2Config(
                out_indices=[i + 1 for i in backbone.get('out_indices', (1, 2, 3))],
                stem_channels=[3, *arch['stem']],
                stage_in_channels=[arch['stem'][1], *channels[:-1]],
                stage_mid_channels=list(arch['inner']),
                stage_out_channels=channels,
                hidden_sizes=channels,
                stage_num_blocks=list(arch['blocks']),
                stage_numb_of_layers=[arch['layers']] * len(channels),
                use_learnable_affine_block=backbone.get('use_lab', False),
            ),
            depth_mult=neck.get('num_blocks', 3) / 3,
            d_model=decoder.embed_dims,
            decoder_ffn_dim=decoder.feedforward_channels,
            decoder_attention_heads=decoder.num_heads,
            decoder_n_points=list(decoder.num_points),
            num_feature_levels=len(decoder.num_points),
            eval_idx=decoder.get('eval_layer', -1),
            reg_scale=model.bbox_head.reg_scale,
        )
        return transformers.DFineForObjectDetection(config)
    depth, width = backbone.depth, backbone.get('base_channels', 64)
    expansion = 1 if depth < 50 else 4
    layer = decoder.layer_cfg
    attention = layer.cross_attn_cfg
    version = 'V2' if attention.get('type') == PER_LEVEL else ''
    fields |= dict(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=width,
            hidden_sizes=[width * expansion * 2**i for i in range(4)],
            depths=list(ResNetVD.arch_settings[depth][1]),
            layer_type='basic' if expansion == 1 else 'bottleneck',
            out_indices=[i + 1 for i in backbone.out_indices],
        ),
        d_model=attention.embed_dims,
        decoder_ffn_dim=layer.ffn_cfg.feedforward_channels,
        decoder_attention_heads=attention.num_heads,
        decoder_n_points=attention.num_points,
        num_feature_levels=model.num_feature_levels,
    )
    if version:
        fields['decoder_method'] = attention.get('method', 'default')
    config = getattr(transformers, f'RTDetr{version}Config')(**fields)
    return getattr(transformers, f'RTDetr{version}ForObjectDetection')(config)


def randomize(model: nn.Module) -> None:
    """Draw weights that keep the scale of the signal, so that sampling and refinement depend on the image."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point() or name.endswith(('.up', '.reg_scale', 'points_scale')):
                continue
            if value.dim() > 1:
                value.normal_(0, value[0].numel() ** -0.5)
            elif name.endswith(('weight', 'scale', 'running_var')):
                value.uniform_(0.5, 1.5)
            else:
                value.uniform_(-0.1, 0.1)
