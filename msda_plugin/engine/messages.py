"""Parts of messages."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np


def listed(names: Iterable, limit: int = 20) -> str:
    """'a, b, c and 12 more'; 'nothing' if there are no names."""
    names = [str(name) for name in names]
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return (', '.join(names[:limit]) or 'nothing') + more


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """'1 image', '2 images'; ``plural`` is the noun with an s unless given."""
    return f'{number} {noun if number == 1 else plural or noun + "s"}'


def plain_metrics(metrics: Mapping[str, object]) -> dict[str, float | None]:
    """The metrics that are numbers, without the dataset's prefix if names stay unique; None for NaN and infinity."""
    names = [name.rsplit('/', 1)[-1] for name in metrics]
    if len(set(names)) < len(names):
        names = list(metrics)
    numbers = {}
    for name, value in zip(names, metrics.values(), strict=True):
        if isinstance(value, (int, float, np.number)):
            numbers[name] = float(value) if math.isfinite(float(value)) else None
    return numbers


def short_metric(name: str) -> str:
    """'bbox_mAP_50' → 'AP50', 'segm_mAP' → 'mask AP'."""
    return re.sub(r'^(bbox|segm)_mAP_?', lambda match: 'mask AP' if match[1] == 'segm' else 'AP', name)


def shown_path(path: str | os.PathLike) -> str:
    """The path, relative if it is below the current folder."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
