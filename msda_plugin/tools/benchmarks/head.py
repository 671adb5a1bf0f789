"""``benchmark head``: ``loss_by_feat`` of the heads against MMDetection's, with the same predictions."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from mmdet.models.dense_heads import DETRHead as MMDetDETRHead
from mmengine.structures import InstanceData
from torch import Tensor, nn

from msda_plugin.registry import MODELS
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.op import PYRAMID
from msda_plugin.tools.benchmarks.options import add_options, describe_machine
from msda_plugin.tools.benchmarks.timing import Timer

NUM_CLASSES = 80
LAYERS = 6
IMAGE = (800, 1066)
BOX_COSTS = [
    dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
    dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: Name of the row.
        head: Class of the head.
        sigmoid: Whether the class scores are sigmoids (focal loss), else a softmax (cross-entropy).
        keys: Encoder proposals per image; 0: not a two-stage detector.
    """

    name: str
    head: str
    sigmoid: bool
    keys: int = 0

    def build(self, scope: str) -> MMDetDETRHead:
        """Build the head of this scope ('mmdet' or 'msda_plugin')."""
        if self.sigmoid:
            loss = dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0)
            cost = dict(type='mmdet.FocalLossCost', weight=2.0)
        else:
            loss = dict(type='mmdet.CrossEntropyLoss', bg_cls_weight=0.1, class_weight=1.0)
            cost = dict(type='mmdet.ClassificationCost', weight=1.0)
        return MODELS.build(
            dict(
                type=f'{scope}.{self.head}',
                num_classes=NUM_CLASSES,
                sync_cls_avg_factor=True,
                loss_cls=loss,
                loss_bbox=dict(type='mmdet.L1Loss', loss_weight=5.0),
                loss_iou=dict(type='mmdet.GIoULoss', loss_weight=2.0),
                train_cfg=dict(assigner=dict(type='mmdet.HungarianAssigner', match_costs=[cost, *BOX_COSTS])),
            )
        )


CASES = (
    Case('Deformable DETR', 'DeformableDETRHead', sigmoid=True),
    Case('two-stage', 'DeformableDETRHead', sigmoid=True, keys=sum(height * width for height, width in PYRAMID)),
    Case('DETR', 'DETRHead', sigmoid=False),
)


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``head``, whose namespace `run` takes."""
    parser = subparsers.add_parser('head', help="matching and losses of the heads against MMDetection's")
    add_options(parser, repeats=9)
    parser.add_argument('--queries', type=int, default=300, help='default: %(default)s')
    parser.add_argument('--batch', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--objects', type=int, default=20, help='objects per image (default: %(default)s)')
    return parser


def conditions(args: argparse.Namespace) -> str:
    """The conditions of the measurements."""
    return (
        f'{args.queries} queries, {LAYERS} layers, batch {args.batch}, {args.objects} objects an image, '
        f'{NUM_CLASSES} classes; {describe_machine(args)}; median of {args.repeats} runs'
    )


def run(args: argparse.Namespace) -> int:
    """Time the losses and their gradients in every case, and print one line each."""
    print(f'loss_by_feat and its gradients: {conditions(args)}')
    print(f'{"head":<18}{"mmdet ms":>10}{"ours ms":>10}{"ratio":>8}{"largest difference of a loss":>30}')
    for row in comparisons(args):
        print(f'{row.case:<18}{row.milliseconds(digits=1)}{row.difference:>30.1e}', flush=True)
    return 0


def comparisons(args: argparse.Namespace) -> Iterator[Comparison]:
    """Time the losses and their gradients in every case."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    timer = Timer(device, args.repeats)
    for case in CASES:
        heads = [case.build(scope).to(device) for scope in ('mmdet', 'msda_plugin')]
        inputs = make_inputs(case, args.batch, args.queries, args.objects, device)
        stock, ours = map(Measurement, timer(*(partial(step, head, inputs) for head in heads)))
        yield Comparison(
            case.name, 'losses and gradients', ('mmdet', 'ours'), stock, ours, largest_difference(*heads, inputs)
        )


def make_inputs(case: Case, batch: int, queries: int, objects: int, device: torch.device) -> list:
    """Seeded arguments of ``loss_by_feat``: predictions that require gradients, and the objects of each image."""
    generator = torch.Generator().manual_seed(0)

    def predictions(*shape: int) -> list[Tensor]:
        logits = torch.randn(*shape, NUM_CLASSES + (not case.sigmoid), generator=generator) - 2
        boxes = torch.rand(*shape, 4, generator=generator) * torch.tensor([0.8, 0.8, 0.4, 0.4]) + 0.05
        return [tensor.to(device).requires_grad_() for tensor in (logits, boxes)]

    inputs = predictions(LAYERS, batch, queries)
    if case.head == 'DeformableDETRHead':
        inputs += predictions(batch, case.keys) if case.keys else [None, None]
    height, width = IMAGE
    instances = []
    for _ in range(batch):
        low = torch.rand(objects, 2, generator=generator) * torch.tensor([width, height]) * 0.7
        size = torch.rand(objects, 2, generator=generator) * 200 + 10
        labels = torch.randint(NUM_CLASSES, (objects,), generator=generator)
        instances.append(InstanceData(bboxes=torch.cat([low, low + size], 1).to(device), labels=labels.to(device)))
    return [*inputs, instances, [dict(img_shape=IMAGE)] * batch]


def step(head: nn.Module, inputs: list) -> dict[str, Tensor]:
    """Compute all losses and the gradients of the predictions; returns the losses."""
    losses = {name: loss.squeeze() for name, loss in head.loss_by_feat(*inputs).items()}
    torch.autograd.grad(sum(losses.values()), [leaf for leaf in inputs if isinstance(leaf, Tensor)])
    return losses


def largest_difference(stock: nn.Module, ours: nn.Module, inputs: list) -> float:
    """Largest relative difference of a loss."""
    expected, losses = step(stock, inputs), step(ours, inputs)
    return max(float(((losses[name] - loss) / loss).detach().abs()) for name, loss in expected.items())
