"""``python -m msda_plugin export``: writes a detector for ONNX, AOTInductor or OpenVINO, and compares it.

After writing, the file runs in its own runtime on images; its detections are compared with PyTorch's, and both are
timed. The exit status is 1 if they differ by more than the tolerance.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msda_plugin.engine.messages import counted, listed
from msda_plugin.tools.common.errors import user_errors

if TYPE_CHECKING:
    from torch import nn

    from msda_plugin.export.card import ModelCard
    from msda_plugin.export.proof import Agreement, FeatureAgreement

FORMATS = ('onnx', 'onnx-gather', 'onnx-custom', 'torch', 'openvino')
NUM_IMAGES = 4
COMMON_NODES = 6  # printed by name


def height_and_width(text: str) -> tuple[int, int]:
    """'320' → (320, 320), '800x1344' → (800, 1344)"""
    found = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    if not found or 0 in (size := (int(found[1]), int(found[2] or found[1]))):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a size; expected height x width, such as 800x1344, or a side'
        )
    return size


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status: 0, or 1 if the file differs from PyTorch by more than the tolerance."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin export',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Write a detector as an ONNX file, an AOTInductor package or an OpenVINO model, run the file in\n'
        'its own runtime, and compare its detections and its speed with PyTorch. Normalization, padding, top-k and\n'
        'non-maximum suppression are in the file; images are resized outside.',
        epilog='examples:\n'
        '  python -m msda_plugin export work_dirs/shapes/epoch_7.pth --format onnx --out model.onnx\n'
        '  python -m msda_plugin demo photo.jpg --model model.onnx',
    )
    parser.add_argument(
        'source',
        nargs='+',
        metavar='CONFIG CHECKPOINT',
        help='Python config file and checkpoint; or one of: checkpoint that contains its config, work dir, model name',
    )
    parser.add_argument('--format', required=True, choices=FORMATS, help='what to write')
    parser.add_argument('--out', required=True, metavar='FILE', help='.onnx, .pt2 (torch) or .xml (openvino)')
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        '--size', type=height_and_width, metavar='HxW', help="size of the images (default: the config's scale)"
    )
    shape.add_argument(
        '--dynamic', action='store_true', help='images of any size, and batches of any size (torch: of --batch)'
    )
    parser.add_argument(
        '--batch', type=positive, metavar='N', help='images in a batch (default: 1, with --dynamic any)'
    )
    parser.add_argument(
        '--half', action='store_true', help='16-bit weights: float16 (ONNX, OpenVINO) or bfloat16 arithmetic (torch)'
    )
    parser.add_argument(
        '--tensorrt',
        action='store_true',
        help='with onnx-custom: the node is MultiscaleDeformableAttnPlugin_TRT, which TensorRT has',
    )
    parser.add_argument('--images', metavar='PATH', help='image, or folder of images, to compare on (default: drawn)')
    parser.add_argument('--data', metavar='JSON', help='COCO annotations of --images: compute the AP of both')
    parser.add_argument(
        '--num-images',
        type=positive,
        metavar='N',
        help=f'maximum number of images to compare on (default: {NUM_IMAGES}, and all of --data)',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        metavar='T',
        help='largest difference of a box relative to the longer side of the image, and of a score (default: 0.001, '
        'with --half 0.03)',
    )
    args = parser.parse_args(argv)
    if len(args.source) > 2:
        parser.error(f'expected a config and a checkpoint, got {listed(args.source)}')
    if args.tensorrt and args.format != 'onnx-custom':
        parser.error('--tensorrt needs --format onnx-custom')
    with user_errors('export'):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from mmengine.logging import MMLogger

    from msda_plugin.acceleration import accelerate
    from msda_plugin.engine.inference import find_checkpoint, find_source, load_detector
    from msda_plugin.export import proof
    from msda_plugin.export.deployable import DeployableDetector
    from msda_plugin.export.runtimes import open_exported
    from msda_plugin.export.writers import check_format, make_card, write

    out = Path(args.out)
    check_format(args.format, out)
    config, checkpoint = find_checkpoint(*args.source) if len(args.source) == 2 else find_source(args.source[0])
    model = load_detector(config, checkpoint, 'cpu')
    MMLogger.get_instance('mmengine').setLevel('ERROR')
    detector = DeployableDetector(model).eval()
    if args.data and not detector.detects:
        raise ValueError(f'the file is the {detector.note}: it has no AP; leave out --data')
    predict = proof.predict_inputs if detector.detects else proof.predict_features
    batch = args.batch or (None if args.dynamic and args.format != 'torch' else 1)
    card = make_card(detector, args.format, batch=batch, size=args.size, dynamic=args.dynamic, half=args.half)
    tolerance = args.tolerance or (proof.HALF_TOLERANCE if args.half else proof.TOLERANCE)
    images = _images(args, card)
    batches = _batches(images, card)
    inputs = [pixels for batch in batches for pixels in batch]

    def run_torch(batch: Sequence[np.ndarray]) -> list:
        return predict(model, batch)

    expected = [found for batch in batches for found in run_torch(batch)]
    seconds = {'PyTorch': proof.median_time(run_torch, batches)}
    data = None
    if args.data:
        data = proof.LabeledImages(args.data, args.images, card.class_names, args.num_images)
        precision = {'PyTorch': data.average_precision(lambda image: _detect_torch(model, image))}
    if detector.detects and accelerate(model):
        seconds['PyTorch, accelerated'] = proof.median_time(run_torch, batches)

    nodes = write(detector, card, out, tensorrt=args.tensorrt)
    print(_describe(out, card, nodes), flush=True)
    exported = open_exported(out, threads=_threads())
    found = [found for batch in batches for found in exported.run_all(batch)]
    if detector.detects:
        agreement = proof.compare(expected, found, inputs, tolerance)
        print(_compared(agreement, len(inputs), exported.runtime))
    else:
        agreement = proof.compare_features(expected, found, tolerance)
        print(_compared_features(agreement, len(inputs), exported.runtime))
    seconds[exported.runtime] = proof.median_time(exported.run_all, batches)
    print(_timed(seconds, len(batches[0]), batches[0][0].shape))
    if data is not None:
        precision[exported.runtime] = data.average_precision(lambda image: exported([image])[0])
        parts = [f'{name} {value:.4f}' for name, value in precision.items()]
        print(f'AP:      {", ".join(parts)}, on {counted(len(data.files), "image")}')
    if not agreement.holds:
        print(
            f'msda_plugin export: {out} differs from PyTorch by more than the tolerance {tolerance}; do not use it',
            file=sys.stderr,
        )
        return 1
    return 0


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _images(args: argparse.Namespace, card: 'ModelCard') -> list[np.ndarray]:
    """The images to compare on: given ones, or drawn ones of the model's classes."""
    from msda_plugin.engine.detector import IMAGES, find_files
    from msda_plugin.engine.images import read_image
    from msda_plugin.tools import scene_images, shape_images

    count = args.num_images or NUM_IMAGES
    if args.images:
        path = Path(args.images)
        files = find_files(path, IMAGES) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f'the folder {path} contains no image ({", ".join(IMAGES)})')
        return [read_image(file) for file in files[:count]]
    generator = shape_images if card.class_names == shape_images.CLASSES else scene_images
    width, height = card.size[::-1] if card.size else card.scale
    return [generator.draw_image(seed, (width, height))[0] for seed in range(count)]


def _batches(images: Sequence[np.ndarray], card: 'ModelCard') -> list[list[np.ndarray]]:
    """Batches of inputs of the same size, as the file takes them."""
    from msda_plugin.export.runtimes import fit

    by_size: dict[tuple, list[np.ndarray]] = {}
    for image in images:
        pixels = fit(image, card)[0]
        by_size.setdefault(pixels.shape, []).append(pixels)
    batches = []
    for inputs in by_size.values():
        size = card.batch or len(inputs)
        inputs += [inputs[-1]] * (-len(inputs) % size)
        batches += [inputs[start : start + size] for start in range(0, len(inputs), size)]
    return batches


def _detect_torch(model: 'nn.Module', image: np.ndarray) -> tuple[np.ndarray, ...]:
    from msda_plugin.engine.inference import predict

    found = predict(model, image).pred_instances
    return found.bboxes.float().numpy(), found.scores.float().numpy(), found.labels.numpy()


# ---- the report -----------------------------------------------------------------------------------------------------
def _describe(out: Path, card: 'ModelCard', nodes: Counter) -> str:
    files = [out, out.with_suffix('.bin')] if out.suffix == '.xml' else [out]
    size = sum(os.path.getsize(file) for file in files) / 1e6
    common = ', '.join(f'{count} {name}' for name, count in nodes.most_common(COMMON_NODES))
    shapes = ', '.join(
        f'{name} ({", ".join(str(side or "any") for side in tensor["shape"])}) {tensor["dtype"]}'
        for name, tensor in {**card.inputs, **card.outputs}.items()
    )
    return (
        f'wrote:   {out}, {size:.1f} MB, {nodes.total()} nodes ({common} and {counted(len(nodes), "type")} in all)\n'
        f'tensors: {shapes}\n' + (f'note:    {card.note}' if card.note else f'classes: {listed(card.class_names)}')
    )


def _compared(agreement: 'Agreement', number: int, runtime: str) -> str:
    result = 'the same' if agreement.holds else 'DIFFERENT'
    text = (
        f'{counted(agreement.matched, "detection")} in {counted(number, "image")} matched, largest difference of boxes '
        f'{agreement.box:.2g} pixels ({agreement.relative_box:.2g} of the image), of scores {agreement.score:.2g}; '
        f'tolerance {agreement.tolerance:g}'
    )
    if agreement.mask is not None:
        text += f'; smallest IoU of masks {agreement.mask:.4f}, tolerance {agreement.mask_limit:g}'
    if agreement.exchanged:
        text += f'; {counted(agreement.exchanged, "exchange")} of equal scores at the end of the top-k'
    if agreement.missing:
        text += f'; {counted(agreement.missing, "detection")} without a counterpart'
    return f'proof:   {runtime} and PyTorch are {result}: {text}'


def _compared_features(agreement: 'FeatureAgreement', number: int, runtime: str) -> str:
    result = 'the same' if agreement.holds else 'DIFFERENT'
    text = (
        f'{counted(agreement.maps, "feature map")} of {counted(number, "image")}, largest difference '
        f'{agreement.difference:.2g} ({agreement.relative:.2g} of the largest value); tolerance {agreement.tolerance:g}'
    )
    if agreement.masks_differ:
        text += '; other shapes, padding masks, or infinite values'
    return f'proof:   {runtime} and PyTorch are {result}: {text}'


def _timed(seconds: dict[str, float], batch: int, shape: tuple[int, ...]) -> str:
    *others, (runtime, own) = seconds.items()
    parts = [f'{runtime} {own * 1000:.1f} ms']
    parts += [f'{name} {other * 1000:.1f} ms ({other / own:.2f}x)' for name, other in others]
    return (
        f'time:    {", ".join(parts)}; batch {batch}, {shape[0]}x{shape[1]}, {counted(_threads(), "thread")} '
        f'of {os.cpu_count()}'
    )


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
