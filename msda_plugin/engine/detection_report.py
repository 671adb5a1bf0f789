"""The report of a validation or test as an HTML page: collects detections, and writes the page."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmengine.dist import collect_results
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from PIL import Image
from torch.utils.data import Dataset

from msda_plugin import __version__
from msda_plugin.engine.detection_analysis import DetectedImage, analyze
from msda_plugin.engine.messages import listed, shown_path
from msda_plugin.files import atomic_write
from msda_plugin.visualization.report_page import report_page

NUM_MISTAKES = 16  # false positives, and misses, on the page


class Detections:
    """The detections of a validation or test, collected batch by batch."""

    def __init__(self) -> None:
        self._samples: list[dict] = []

    def add(self, outputs: Sequence[BaseDataElement]) -> None:
        """Keep the predicted boxes of a batch, on the CPU."""
        for sample in outputs:
            found = sample.pred_instances.cpu().numpy()
            self._samples.append(
                dict(
                    image=(sample.get('img_id'), sample.get('img_path')),
                    found=np.asarray(found.bboxes, np.float32).reshape(-1, 4),
                    found_labels=np.asarray(found.labels, int),
                    scores=np.asarray(found.scores, np.float32),
                )
            )

    def gather(self, num_images: int) -> None:
        """Collect the detections of all processes in the first one; every process calls it."""
        self._samples = collect_results(self._samples, num_images, 'cpu') or []

    def with_truths(self, dataset: Dataset) -> list[DetectedImage]:
        """The images of the dataset with their true boxes and the detections.

        Raises:
            ValueError: If there are no detections for an image of the dataset, because the samples lack its id.
        """
        found = {sample['image']: sample for sample in self._samples}
        images = []
        for index in range(len(dataset)):
            info = dataset.get_data_info(index)
            sample = found.get((info.get('img_id'), info.get('img_path')))
            if sample is None:
                raise ValueError(
                    f'no detections for {info.get("img_path")}; PackDetInputs of the test pipeline needs img_id and '
                    'img_path in meta_keys'
                )
            instances = info['instances']
            images.append(
                DetectedImage(
                    path=str(info['img_path']),
                    boxes=np.array([instance['bbox'] for instance in instances], float).reshape(-1, 4),
                    labels=np.array([instance['bbox_label'] for instance in instances], int),
                    ignored=np.array([bool(instance.get('ignore_flag')) for instance in instances], bool),
                    **{name: array for name, array in sample.items() if name != 'image'},
                )
            )
        return images


def write_report(
    path: str | os.PathLike,
    runner: Runner,
    dataset: Dataset,
    detections: Detections,
    *,
    facts: Mapping[str, object],
    curves: Path | None,
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        runner: For config and model.
        dataset: The images that were tested.
        detections: Theirs.
        facts: What to list among the settings, before what follows from runner and dataset: name -> value.
        curves: PNG file of the training curves, which need not exist.
    """
    images = detections.with_truths(dataset)
    names = [str(name) for name in dataset.metainfo['classes']]
    model = runner.cfg.get('model')
    facts = {
        **facts,
        'model': model.get('type') if isinstance(model, dict) else None,
        'data': _source(dataset),
        'images': len(images),
        'images without a box': sum(not (~image.ignored).any() for image in images),
        'boxes': sum(int((~image.ignored).sum()) for image in images),
        'classes': f'{len(names)}: {listed(names, 100)}',
        'msda_plugin': __version__,
    }
    page = report_page(
        analyze(images, len(names), num_mistakes=NUM_MISTAKES),
        images,
        names,
        lambda image: mmcv.imread(image, channel_order='rgb'),
        title=f'Report of {Path(runner.cfg.filename or runner.experiment_name).stem}',
        facts={name: str(value) for name, value in facts.items() if value is not None},
        curves=np.asarray(Image.open(curves).convert('RGB')) if curves and curves.is_file() else None,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:  # names of files need not be valid text
        unfinished.write_text(page, encoding='utf-8', errors='backslashreplace')


def _source(dataset: Dataset) -> str | None:
    """The annotation file."""
    while not getattr(dataset, 'ann_file', None) and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return shown_path(dataset.ann_file) if getattr(dataset, 'ann_file', None) else None
