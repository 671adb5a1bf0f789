"""``benchmark model``: a model before and after :func:`msda_plugin.accelerate`.

The model of a config of MMDetection, or with ``hf:NAME`` one of Hugging Face transformers.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmcv.ops import MultiScaleDeformableAttention as StockAttention
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from msda_plugin.acceleration import accelerate
from msda_plugin.acceleration.low_precision import check_dtype
from msda_plugin.acceleration.mmcv_models import STOCK_FORWARD
from msda_plugin.engine.config_walk import rebuild, without_pretrained
from msda_plugin.ops import backend_for
from msda_plugin.registry import MODELS
from msda_plugin.tools.benchmarks import transformers_model
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.fresh_process import in_a_process, peak_bytes
from msda_plugin.tools.benchmarks.options import describe_machine, describe_memory
from msda_plugin.tools.benchmarks.timing import Timer, synchronize
from msda_plugin.tools.common.errors import user_errors

NUM_OBJECTS = transformers_model.NUM_OBJECTS
TRANSFORMERS = 'hf:'  # begins the name of a model of transformers
# The keyword arguments of accelerate.
VARIANTS = {
    'accelerated': {},
    'channels_last': dict(channels_last=True),
    'fold': dict(fold=True),
    'fast_dropout': dict(fast_dropout=True),
    'float32': dict(inference=True, fast_dropout=True),
    'bfloat16': dict(inference=True, fast_dropout=True, dtype=torch.bfloat16, training_dtype=torch.bfloat16),
}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``model``, whose namespace `run` takes."""
    parser = subparsers.add_parser('model', help='a model before and after msda_plugin.accelerate')
    parser.add_argument(
        'config',
        help='config file; PACKAGE::CONFIG such as mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py; '
        f'or {", ".join(TRANSFORMERS + name for name in transformers_model.NAMES)} of Hugging Face transformers',
    )
    parser.add_argument('--device', default='cpu', help='default: %(default)s')
    parser.add_argument('--height', type=int, default=800, help='image height (default: %(default)s)')
    parser.add_argument('--width', type=int, help='image width (default: 1344, or 1066 for hf:NAME)')
    parser.add_argument('--batch', type=int, default=1, help='images per batch (default: %(default)s)')
    parser.add_argument('--runs', type=int, default=3, help='timed runs, after one warm-up run (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: %(default)s)')
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=VARIANTS,
        default=['accelerated', 'float32', 'bfloat16'],
        metavar='VARIANT',
        help='compared with the stock model: accelerated: accelerate(model); channels_last, fold, fast_dropout: with '
        'this argument; float32: with inference=True and fast_dropout=True; bfloat16: with these and dtype and '
        'training_dtype=torch.bfloat16 (default: accelerated float32 bfloat16)',
    )
    parser.add_argument('--skip-training', action='store_true', help='only inference')
    return parser


def conditions(args: argparse.Namespace) -> str:
    """The conditions of the measurements."""
    backend = backend_for(args.device, torch.float32)
    return (
        f'{args.batch}x3x{args.height}x{image_width(args)}, {describe_machine(args)}; backend {backend.name} '
        f'({backend.reason}); median of {args.runs} runs; peak {describe_memory(args.device)}'
    )


def image_width(args: argparse.Namespace) -> int:
    return args.width or (1066 if args.config.startswith(TRANSFORMERS) else 1344)


def run(args: argparse.Namespace) -> int:
    """Print seconds, peak memory, ratios and largest output difference of inference, and of the training step.

    Weights, images and objects are random; nothing is downloaded. Each row is measured in a fresh process for its peak
    memory.
    """
    with user_errors('benchmark model'):
        build(args)
        head = f'{args.config}\n{conditions(args)}'
    print(head)
    print(f'{"":<16}{"":<14}{"seconds":>9}{"MB":>8}{"speed":>8}{"memory":>8}{"difference":>12}{"attention s":>13}')
    printed = set()
    for item in comparisons(args):
        if isinstance(item, str):
            print(item)
            continue
        for side, columns, measured in item.lines():
            if (item.run, side) in printed:
                continue
            printed.add((item.run, side))
            difference = '' if item.difference is None or side == 'stock' else f'{item.difference:.1e}'
            attention = '' if measured.attention is None else f'{measured.attention:.3f}'
            print(f'{item.run:<16}{side:<14}{columns}{difference:>12}{attention:>13}'.rstrip(), flush=True)
    return 0


def comparisons(args: argparse.Namespace) -> Iterator[Comparison | str]:
    """Inference and training step, each side in a fresh process, and sentences about the attention layers."""
    name = Path(args.config.split('::')[-1]).stem
    runs = [False] if args.skip_training else [False, True]
    stock = [in_a_process(measure, args, None, training) for training in runs]
    for variant in args.variants:
        dtype = VARIANTS[variant].get('dtype')
        try:
            if dtype is not None:
                check_dtype(nn.Linear(1, 1, device=args.device), dtype)
        except ValueError as error:
            yield f'{variant} was not measured: {error}'
            continue
        for training in runs:
            measured = in_a_process(measure, args, variant, training)
            if not training:
                inference = measured
                count, difference, choices, otherwise = in_a_process(compare, args, variant)
            run = 'training step' if training else 'inference'
            yield Comparison(name, run, ('stock', variant), stock[training], measured, None if training else difference)
        yield (
            f'{variant}: {count} attention layers take {stock[0].attention:.3f} s of the stock inference, and '
            f'{inference.attention:.3f} s here. Largest difference of the raw outputs: {difference:.1e}'
            + (
                f' (both models use the proposals of the stock model; this one would rank {otherwise} of {choices} '
                'differently, near ties)'
                if choices
                else ''
            )
        )


def measure(args: argparse.Namespace, variant: str | None, training: bool) -> Measurement:
    """Measure a variant, or None: the stock model, in this process.

    Time, peak memory and, for inference, the time in attention layers.
    """
    device = torch.device(args.device)
    model = build(args)
    if variant:
        accelerate(model, **VARIANTS[variant])
    model.train(training)
    batch = batch_for(args, model, training)

    def step(_: None = None) -> None:
        with torch.set_grad_enabled(training):
            if training:
                loss(model, batch).backward()
            else:
                run_model(model, batch, 'predict')

    seconds = Timer(device, args.runs).median(step, prepare=model.zero_grad)
    peak = peak_bytes(args.device)
    attention = None
    if not training:
        marks = watch_attention(model, device)
        step()
        attention = sum(marks[1::2]) - sum(marks[::2])
    return Measurement(seconds, peak, attention)


def compare(args: argparse.Namespace, variant: str = 'accelerated') -> tuple[int, float, int, int]:
    """Run one model before and after ``accelerate``.

    Returns:
        Number of attention layers, largest output difference, top-k choices, and how many of these differ.
    """
    model = build(args).eval()
    batch = batch_for(args, model, training=False)
    choices = SameChoices()
    with torch.no_grad(), choices:
        expected = list(tensors_in(run_model(model, batch, 'tensor')))
        count = accelerate(model, **VARIANTS[variant])
        choices.replay()
        outputs = list(tensors_in(run_model(model, batch, 'tensor')))
    # Grounding DINO's logits are infinite where the prompt has no token.
    difference = max(
        torch.where(a == b, 0, a - b).abs().max().item() for a, b in zip(outputs, expected, strict=True) if a.numel()
    )
    return count, difference, choices.count, choices.otherwise


def build(args: argparse.Namespace) -> nn.Module:
    """Build the model, with the same weights in every process.

    The weights of sampling offsets and attention weights, initially zero, are drawn, so that sampling depends on the
    queries as in a trained model. Also sets the number of threads and silences MMEngine's log.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If there is no model of this name, the config has no model, or its model has no mmcv
            ``MultiScaleDeformableAttention``.
        ImportError: If transformers is needed, but not installed.
    """
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('msda_plugin').setLevel(logging.WARNING)
    torch.manual_seed(0)
    if args.config.startswith(TRANSFORMERS):
        model = transformers_model.build(args.config.removeprefix(TRANSFORMERS))
    else:
        model = build_from_config(args)
    for layer in attention_layers(model):
        nn.init.normal_(layer.sampling_offsets.weight, std=0.05)
        nn.init.normal_(layer.attention_weights.weight, std=0.05)
    return model.to(args.device)


def build_from_config(args: argparse.Namespace) -> nn.Module:
    """Build the model of a config, with mmcv's attention layers."""
    if '::' not in args.config and not Path(args.config).is_file():
        raise FileNotFoundError(
            f'the config {args.config} does not exist; give the path of a Python config file, or '
            'mmdet::FAMILY/NAME.py for a config of a package'
        )
    cfg = get_config(args.config) if '::' in args.config else Config.fromfile(args.config)
    if 'model' not in cfg:
        raise ValueError(f'the config {args.config} has no model; give the config of a detector')
    StockAttention.forward = STOCK_FORWARD  # the config may import msda_plugin.auto
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = revert_sync_batchnorm(MODELS.build(without_downloads(cfg.model)))
    model.init_weights()
    if not any(isinstance(module, StockAttention) for module in model.modules()):
        raise ValueError(
            f'the model of {args.config}, {type(model).__name__}, has no MultiScaleDeformableAttention of mmcv to '
            'accelerate'
        )
    return model


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with multi-scale deformable attention, of mmcv, transformers, or msda_plugin."""
    return [module for module in model.modules() if 'sampling_offsets' in module._modules]


def batch_for(args: argparse.Namespace, model: nn.Module, training: bool) -> dict:
    """The arguments of a model's forward."""
    sizes = (args.height, image_width(args), args.batch, training)
    if args.config.startswith(TRANSFORMERS):
        batch = transformers_model.make_batch(args.config.removeprefix(TRANSFORMERS), *sizes)
        return transformers_model.to_device(batch, torch.device(args.device))
    return make_batch(model, *sizes)


def run_model(model: nn.Module, batch: dict, mode: str) -> object:
    """The outputs of a model; transformers' have no modes."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.meshgrid: in an upcoming release')  # MMDetection's call
        return model(**batch, mode=mode) if hasattr(model, 'data_preprocessor') else model(**batch)


def loss(model: nn.Module, batch: dict) -> Tensor:
    """The loss of a training step."""
    outputs = run_model(model, batch, 'loss')
    return model.parse_losses(outputs)[0] if hasattr(model, 'parse_losses') else outputs.loss


def without_downloads(node: object) -> object:
    """A copy of a config without pretrained weights, and without batch augmentations, which change the image size."""
    return without_pretrained(rebuild(node, lambda key, value: None if key == 'batch_augments' else value))


def make_batch(model: nn.Module, height: int, width: int, batch: int, training: bool) -> dict:
    """Seeded, preprocessed images with boxes, masks and, for panoptic models, the first stuff class everywhere."""
    rng = np.random.default_rng(0)
    size = (height, width)
    data = {'inputs': [], 'data_samples': []}
    for _ in range(batch):
        corners = rng.uniform(0, 1, (NUM_OBJECTS, 2, 2)).astype(np.float32)
        corners.sort(axis=1)
        boxes = corners.reshape(-1, 4) * np.array(size[::-1] * 2, np.float32)
        masks = np.zeros((NUM_OBJECTS, *size), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1 : y2 + 1, x1 : x2 + 1] = 1
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes),
            masks=BitmapMasks(masks, *size),
            labels=torch.zeros(NUM_OBJECTS, dtype=torch.int64),
        )
        stuff = getattr(getattr(model, 'panoptic_head', None), 'num_things_classes', 255)
        sample.gt_sem_seg = PixelData(sem_seg=torch.full((1, *size), stuff, dtype=torch.int64))
        data['inputs'].append(torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)))
        data['data_samples'].append(sample)
    return model.data_preprocessor(data, training)


def watch_attention(model: nn.Module, device: torch.device) -> list[float]:
    """A list to which each call of an attention layer appends the time before and after it."""
    marks = []

    def mark(*_) -> None:
        synchronize(device)
        marks.append(time.perf_counter())

    for layer in attention_layers(model):
        layer.register_forward_pre_hook(mark)
        layer.register_forward_hook(mark)
    return marks


def tensors_in(outputs: object) -> Iterator[Tensor]:
    """All floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, dict):
        yield from tensors_in(list(outputs.values()))
    elif isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from tensors_in(output)


class SameChoices(TorchFunctionMode):
    """Replays the ``topk`` choices of a first pass in a second one.

    A two-stage model takes its queries from the highest-scoring proposals, in order: rounding can exchange two queries
    with nearly equal scores, which would hide the difference between the layers.

    Attributes:
        count: Number of choices in the first pass.
        otherwise: Number of choices that the second pass would have made differently.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.otherwise = 0
        self._chosen: list[Tensor] = []
        self._replayed: Iterator[Tensor] | None = None

    def replay(self) -> None:
        """Start the second pass."""
        self._replayed = iter(self._chosen)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (torch.topk, Tensor.topk):
            return result
        if self._replayed is None:
            self._chosen.append(result.indices)
            self.count += result.indices.numel()
            return result
        indices = next(self._replayed)
        self.otherwise += int((indices != result.indices).sum())
        scores, dim = args[0], args[2] if len(args) > 2 else (kwargs or {}).get('dim', -1)
        return torch.return_types.topk((scores.gather(dim, indices), indices))
