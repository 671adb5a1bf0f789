"""``python -m msda_plugin demo``: draws detected boxes on images, folders of images, and videos.

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
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from msda_plugin.tools.common.errors import user_errors

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
KNOWN = IMAGES + VIDEOS
READABLE = 640  # smaller images are enlarged to this longer side, pixels, so that labels are readable


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
            files = sorted(
                path
                for path in given.rglob('*')
                if path.is_file()
                and path.suffix.lower() in KNOWN
                and not any(part.startswith('.') for part in path.relative_to(given).parts)
                and not path.resolve().is_relative_to(out.resolve())
            )
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
        model: From `msda_plugin.engine.inference.load_detector`.
        out: Output folder.
        score_thr: Minimum score of a box, 0-1.
    """

    def __init__(self, model, out: str | os.PathLike, score_thr: float) -> None:
        self.model, self.out, self.score_thr = model, Path(out), score_thr
        self.classes = tuple(model.dataset_meta['classes'])
        self.results: list[dict] = []  # detections in images, not in videos
        self.images: list[dict] = []
        self.videos: list[dict] = []
        self.counts: Counter = Counter()  # number of boxes by class name

    def run_image(self, path: Path, target: Path) -> None:
        """Detect objects in an image file and write it with boxes.

        Raises:
            OSError, ValueError: If the image cannot be read.
        """
        from PIL import Image

        from msda_plugin.engine.inference import read_image
        from msda_plugin.visualization import write_png

        image = read_image(path)
        drawn, found = self.detect(image, len(self.images) + 1)
        self.images.append(
            dict(
                id=len(self.images) + 1,
                file_name=str(path),
                width=image.shape[1],
                height=image.shape[0],
                picture=str(target.relative_to(self.out)),
            )
        )
        self.results += found
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix.lower() == '.png':
            write_png(target, drawn)
        else:
            Image.fromarray(drawn).save(target, quality=92)

    def run_video(self, path: Path, target: Path) -> Iterator[None]:
        """Detect objects in each frame of a video and write the video and its results; yields after each frame.

        Raises:
            ValueError: If the video cannot be read, or OpenCV cannot write videos.
        """
        import cv2

        reader, writer, results, number = cv2.VideoCapture(str(path)), None, [], 0
        rate = reader.get(cv2.CAP_PROP_FPS)
        rate = rate if math.isfinite(rate) and rate > 0 else 25.0
        try:
            while True:
                read, frame = reader.read()
                if not read:
                    break
                drawn, found = self.detect(np.ascontiguousarray(frame[..., ::-1]), number)
                drawn = drawn[: drawn.shape[0] // 2 * 2, : drawn.shape[1] // 2 * 2]  # the codec needs even sides
                if writer is None:
                    height, width = frame.shape[:2]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    writer = cv2.VideoWriter(
                        str(target), cv2.VideoWriter_fourcc(*'mp4v'), rate, (drawn.shape[1], drawn.shape[0])
                    )
                    if not writer.isOpened():
                        raise ValueError(
                            f'OpenCV cannot write the video {target}; install opencv-python from its wheel'
                        )
                writer.write(np.ascontiguousarray(drawn[..., ::-1]))
                results += found
                number += 1
                yield
        finally:  # also after Ctrl-C: the frames so far are a playable video
            reader.release()
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
        if not number:
            raise ValueError(f'the video {path} cannot be read; convert it to MP4 (H.264)')

    def detect(self, image: np.ndarray, image_id: int) -> tuple[np.ndarray, list[dict]]:
        """Detect objects in an image, (H, W, 3) uint8 RGB.

        Returns:
            The image with boxes, (H', W', 3) uint8 RGB, and the detections in COCO's results format.
        """
        from msda_plugin.engine.inference import predict
        from msda_plugin.visualization import draw_boxes

        found = predict(self.model, image).pred_instances.cpu().numpy()
        kept = found.scores >= self.score_thr
        boxes, labels, scores = found.bboxes[kept], found.labels[kept], found.scores[kept]
        self.counts.update(self.classes[label] for label in labels)
        small = max(image.shape[:2]) < READABLE
        drawn = draw_boxes(image, boxes, labels, self.classes, scores, longer_side=READABLE if small else None)
        return drawn, [
            dict(
                image_id=image_id,
                category_id=int(label) + 1,
                score=round(float(score), 4),
                bbox=[round(float(value), 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            )
            for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores, strict=True)
        ]

    def write(self) -> None:
        """Write ``results.json`` and ``images.json``."""
        self.out.mkdir(parents=True, exist_ok=True)
        _write_json(self.out / 'results.json', self.results)
        _write_json(
            self.out / 'images.json',
            dict(
                images=self.images,
                videos=self.videos,
                categories=[dict(id=index, name=name) for index, name in enumerate(self.classes, 1)],
            ),
        )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + '\n')


def _plural(count: int, noun: str) -> str:
    return f'{count} {noun}{"" if count == 1 else "s"}'


def _frames(path: Path) -> int:
    """Number of frames by the header of a video; 0 if it has none."""
    import cv2

    reader = cv2.VideoCapture(str(path))
    number = reader.get(cv2.CAP_PROP_FRAME_COUNT)
    reader.release()
    return int(number) if math.isfinite(number) and number > 0 else 0


def _run(demo: Demo, targets: dict[Path, Path]) -> list[str]:
    """Process all files, with a progress bar on a terminal; returns one message for each file that cannot be read."""
    from mmengine.utils import ProgressBar

    total = sum(_frames(path) if is_video(path) else 1 for path in targets)
    bar = ProgressBar(total, file=sys.stderr) if total > 1 and sys.stderr.isatty() else None
    skipped = []
    try:
        for path, target in targets.items():
            try:
                for _ in demo.run_video(path, target) if is_video(path) else [demo.run_image(path, target)]:
                    if bar and bar.completed < total:
                        bar.update()
            except (OSError, ValueError) as error:
                skipped.append(str(error))
    finally:
        if bar:
            print(file=sys.stderr)
        demo.write()
    return skipped


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status: 0, or 1 if files could not be read."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin demo',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Draw detected boxes on images, folders of images and videos.\n'
        'Writes the drawn files, results.json (COCO results format) and images.json (the ids in it).',
        epilog='examples:\n'
        '  python -m msda_plugin demo photo.jpg\n'
        '  python -m msda_plugin demo folder clip.mp4 --checkpoint work_dirs/mine/epoch_12.pth --out pictures',
    )
    parser.add_argument('inputs', nargs='+', metavar='IMAGE|FOLDER|VIDEO', help='files and folders to read')
    parser.add_argument('--config', help='Python config file (default: the one next to the checkpoint)')
    parser.add_argument(
        '--checkpoint', help='.pth file (default: the best one of `make train`, or in the work dir of --config)'
    )
    parser.add_argument('--out', default='pictures', metavar='DIR', help='output folder (default: %(default)s)')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, metavar='P', help='minimum score of a box, 0-1 (default: %(default)s)'
    )
    parser.add_argument('--device', help='cpu, cuda or cuda:N (default: cuda if available)')
    args = parser.parse_args(argv)
    with user_errors('demo'):
        from msda_plugin.engine.inference import find_checkpoint, load_detector
        from msda_plugin.tools.common.launch import check_device

        if not 0 <= args.score_thr <= 1:
            raise ValueError(f'--score-thr must be from 0 to 1, got {args.score_thr}')
        if args.device:
            check_device(args.device)
        targets = find_sources(args.inputs, args.out)
        config, checkpoint = find_checkpoint(args.config, args.checkpoint)
        demo = Demo(load_detector(config, checkpoint, args.device), args.out, args.score_thr)
        Path(args.out).mkdir(parents=True, exist_ok=True)
    print(
        f'{checkpoint}: {len(demo.classes)} classes, {", ".join(demo.classes[:20])}'
        f'{", …" if len(demo.classes) > 20 else ""}',
        flush=True,
    )
    skipped = _run(demo, targets)

    frames = sum(video['num_frames'] for video in demo.videos)
    done = [_plural(len(demo.images), 'image')] if demo.images else []
    done += [f'{_plural(frames, "frame")} of {_plural(len(demo.videos), "video")}'] if demo.videos else []
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
