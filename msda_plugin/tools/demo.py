"""``python -m msda_plugin demo``: draws detected boxes and masks on images, folders of images, and videos.

The output folder contains the images and videos with boxes, and

- ``results.json``: the detections in all images, in COCO's results format
  (``[{"image_id": 1, "category_id": 3, "bbox": [x, y, width, height], "score": 0.9}, …]``, pixels of the image);
- ``images.json``: the images and categories that these ids refer to, as in a COCO annotation file, and the videos;
- ``VIDEO.json`` next to each video: its detections in the same format; ``image_id`` is the frame number from 0.
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from msda_plugin.engine.detector import IMAGES, VIDEOS, DetectionResult, Detector, find_files
from msda_plugin.engine.messages import counted
from msda_plugin.tools.common.errors import user_errors

KNOWN = IMAGES + VIDEOS


def find_sources(inputs: Sequence[str | os.PathLike], out: str | os.PathLike) -> dict[Path, Path]:
    """Map each file to read to the file in ``out`` to write; no two files are written to the same place.

    Folders are searched recursively, and the output has the same subfolders; files in ``out`` are skipped. JPEG and PNG
    files keep their names; ``.png`` is appended to those of other images, ``.mp4`` to those of videos.

    Args:
        inputs: Image files, video files and folders.
        out: Output folder.

    Raises:
        FileNotFoundError: If an input does not exist, or a folder contains no image and no video.
        ValueError: If the output would overwrite an input.
    """
    out = Path(out)
    targets: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            files = [path for path in find_files(given, KNOWN) if not path.resolve().is_relative_to(out.resolve())]
            if not files:
                raise FileNotFoundError(f'the folder {given} contains no image and no video ({", ".join(KNOWN)})')
        elif given.is_file():
            files = [given]
        else:
            raise FileNotFoundError(f'{given} does not exist; give an image, a video or a folder')
        for path in files:
            name = path.relative_to(given) if given.is_dir() else Path(path.name)
            if is_video(path):
                name = name if path.suffix == '.mp4' else name.with_name(f'{name.name}.mp4')
            elif path.suffix.lower() not in ('.jpg', '.jpeg', '.png'):
                name = name.with_name(f'{name.name}.png')
            if path not in targets:
                targets[path] = _free(out / name, targets.values())
    inside = [path for path, target in targets.items() if target.resolve() == path.resolve()]
    if inside:
        raise ValueError(f'{inside[0].name} would be overwritten in --out {out}; choose another folder')
    return targets


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _free(target: Path, taken: Sequence[Path]) -> Path:
    number, free = 2, target
    while free in taken:
        free = target.with_name(f'{target.stem}_{number}{target.suffix}')
        number += 1
    return free


class Demo:
    """Draws detections and collects them in COCO's results format.

    Args:
        detector: The detector.
        out: Output folder.
        score_thr: Minimum score of a box, 0-1.
        batch_size: Maximum number of images, or frames of a video, that run through the model together.
    """

    def __init__(self, detector: Detector, out: str | os.PathLike, score_thr: float, batch_size: int = 4) -> None:
        self.detector, self.out = detector, Path(out)
        self.options = dict(score_threshold=score_thr, batch_size=batch_size)
        self.results: list[dict] = []  # detections in images, not in videos
        self.images: list[dict] = []
        self.videos: list[dict] = []
        self.counts: Counter = Counter()  # number of boxes by class name

    def run_images(self, files: dict[Path, Path]) -> list[str]:
        """Detect objects in image files and write them with boxes.

        Returns:
            One message for each file that cannot be read or written.
        """
        from msda_plugin.engine.images import read_image

        images, skipped = {}, []
        for path in files:
            try:
                images[path] = read_image(path)
            except (OSError, ValueError) as error:
                skipped.append(str(error))
        for path, result in zip(images, self.detector(list(images.values()), **self.options), strict=True):
            try:
                result.save(files[path])
            except OSError as error:
                skipped.append(str(error))
                continue
            height, width = images[path].shape[:2]
            self.images.append(
                dict(
                    id=len(self.images) + 1,
                    file_name=str(path),
                    width=width,
                    height=height,
                    picture=str(files[path].relative_to(self.out)),
                )
            )
            self.results += self._count(result).to_coco(len(self.images))
        return skipped

    def run_video(self, path: Path, target: Path) -> Iterator[None]:
        """Detect objects in each frame of a video and write the video and its results; yields after each frame.

        Raises:
            ValueError: If the video cannot be read, or OpenCV cannot write videos.
        """
        import cv2

        writer, results, number, rate = None, [], 0, _frames(path)[1]
        try:
            for result in self.detector(path, **self.options):
                drawn = result.draw()
                drawn = drawn[: drawn.shape[0] // 2 * 2, : drawn.shape[1] // 2 * 2]  # the codec needs even sides
                if writer is None:
                    height, width = result.image.shape[:2]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    writer = cv2.VideoWriter(
                        str(target), cv2.VideoWriter_fourcc(*'mp4v'), rate, (drawn.shape[1], drawn.shape[0])
                    )
                    if not writer.isOpened():
                        raise ValueError(
                            f'OpenCV cannot write the video {target}; install opencv-python from its wheel'
                        )
                writer.write(np.ascontiguousarray(drawn[..., ::-1]))
                results += self._count(result).to_coco(number)
                number += 1
                yield
        finally:  # also after Ctrl-C: the frames so far are a playable video
            if writer is not None:
                writer.release()
                _write_json(target.with_name(f'{target.name}.json'), results)
                self.videos.append(
                    dict(
                        file_name=str(path),
                        num_frames=number,
                        frames_per_second=rate,
                        width=width,
                        height=height,
                        video=str(target.relative_to(self.out)),
                    )
                )

    def _count(self, result: DetectionResult) -> DetectionResult:
        self.counts.update(result.names.tolist())
        return result

    def write(self) -> None:
        """Write ``results.json`` and ``images.json``."""
        self.out.mkdir(parents=True, exist_ok=True)
        _write_json(self.out / 'results.json', self.results)
        _write_json(
            self.out / 'images.json',
            dict(
                images=self.images,
                videos=self.videos,
                categories=[dict(id=index, name=name) for index, name in enumerate(self.detector.class_names, 1)],
            ),
        )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + '\n')


def _frames(path: Path) -> tuple[int, float]:
    """Number of frames and frames per second by the header of a video; 0 and 25 if it has none."""
    import cv2

    reader = cv2.VideoCapture(str(path))
    number, rate = reader.get(cv2.CAP_PROP_FRAME_COUNT), reader.get(cv2.CAP_PROP_FPS)
    reader.release()
    return int(number) if math.isfinite(number) and number > 0 else 0, rate if 0 < rate < math.inf else 25.0


def _run(demo: Demo, targets: dict[Path, Path]) -> list[str]:
    """Process all files, with a progress bar on a terminal; returns one message for each file that cannot be read."""
    from mmengine.utils import ProgressBar

    total = sum(_frames(path)[0] if is_video(path) else 1 for path in targets)
    bar = ProgressBar(total, file=sys.stderr) if total > 1 and sys.stderr.isatty() else None

    def tick(number: int = 1) -> None:
        if bar:
            bar.update(min(number, total - bar.completed))

    images = [path for path in targets if not is_video(path)]
    size, skipped = demo.options['batch_size'], []
    try:
        for start in range(0, len(images), size):
            batch = {path: targets[path] for path in images[start : start + size]}
            skipped += demo.run_images(batch)
            tick(len(batch))
        for path in filter(is_video, targets):
            try:
                for _ in demo.run_video(path, targets[path]):
                    tick()
            except (OSError, ValueError) as error:
                skipped.append(str(error))
    finally:
        if bar:
            print(file=sys.stderr)
        demo.write()
    return skipped


def image_size(text: str) -> tuple[int, int]:
    """'320' → (320, 320), '320x240' → (320, 240)"""
    found = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} is not a size; expected a side such as 320, or 320x240, in pixels')
    return int(found[1]), int(found[2] or found[1])


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status: 0, or 1 if files could not be read."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin demo',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Draw detected boxes and masks on images, folders of images and videos.\n'
        'Writes the drawn files, results.json (COCO results format) and images.json (the ids in it).',
        epilog='examples:\n'
        '  python -m msda_plugin demo photo.jpg\n'
        '  python -m msda_plugin demo folder clip.mp4 --checkpoint work_dirs/mine/epoch_12.pth --out pictures',
    )
    parser.add_argument('inputs', nargs='+', metavar='IMAGE|FOLDER|VIDEO', help='files and folders to read')
    parser.add_argument(
        '--model',
        metavar='NAME|PATH',
        help='name of a model with published weights (python -m msda_plugin models), a checkpoint, a work dir, or a '
        'file of python -m msda_plugin export (.onnx, .pt2, .xml)',
    )
    parser.add_argument('--config', help='Python config file (default: the one that the checkpoint contains)')
    parser.add_argument(
        '--checkpoint', help='.pth file (default: the best one of `make train`, or in the work dir of --config)'
    )
    parser.add_argument('--out', default='pictures', metavar='DIR', help='output folder (default: %(default)s)')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, metavar='P', help='minimum score of a box, 0-1 (default: %(default)s)'
    )
    parser.add_argument('--device', help='cpu, cuda or cuda:N (default: cuda if available)')
    parser.add_argument(
        '--nms',
        action=argparse.BooleanOptionalAction,
        help='non-maximum suppression within each class (default: as in the config)',
    )
    parser.add_argument(
        '--image-size',
        type=image_size,
        metavar='S|WxH',
        help='size in pixels that images are fitted into (default: as in the config)',
    )
    parser.add_argument(
        '--batch-size', type=int, default=4, metavar='N', help='images that run together (default: %(default)s)'
    )
    parser.add_argument('--half', action='store_true', help='mixed precision: float16 on GPUs, bfloat16 on CPUs')
    args = parser.parse_args(argv)
    with user_errors('demo'):
        if not 0 <= args.score_thr <= 1:
            raise ValueError(f'--score-thr must be from 0 to 1, got {args.score_thr}')
        if args.device:
            from msda_plugin.tools.common.launch import check_device  # imports MMDetection

            check_device(args.device)
        if args.batch_size < 1:
            raise ValueError(f'--batch-size must be at least 1, got {args.batch_size}')
        targets = find_sources(args.inputs, args.out)
        detector = Detector(
            args.model,
            config=args.config,
            checkpoint=args.checkpoint,
            device=args.device,
            half=args.half,
            nms=args.nms,
            image_size=args.image_size,
        )
        if detector.device.type == 'cpu':
            from msda_plugin.acceleration import keep_freed_memory  # imports torch

            keep_freed_memory()
        demo = Demo(detector, args.out, args.score_thr, args.batch_size)
        Path(args.out).mkdir(parents=True, exist_ok=True)
    print(
        f'{detector.checkpoint}: {len(detector.class_names)} classes, {", ".join(detector.class_names[:20])}'
        f'{", …" if len(detector.class_names) > 20 else ""}',
        flush=True,
    )
    with user_errors('demo'):
        skipped = _run(demo, targets)

    frames = sum(video['num_frames'] for video in demo.videos)
    done = [counted(len(demo.images), 'image')] if demo.images else []
    done += [f'{counted(frames, "frame")} of {counted(len(demo.videos), "video")}'] if demo.videos else []
    counts = ', '.join(f'{number} {name}' for name, number in demo.counts.most_common())
    print(
        f'{" and ".join(done) or "nothing"} drawn in {args.out}; boxes: '
        + (counts or f'none with a score of at least {args.score_thr}; try a lower --score-thr')
    )
    print(f'results: {Path(args.out, "results.json")}')
    for reason in skipped:
        print(f'msda_plugin demo: skipped: {reason}', file=sys.stderr)
    return 1 if skipped else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
