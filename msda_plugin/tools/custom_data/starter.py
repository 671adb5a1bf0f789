"""Starter weights: what ``train --data`` begins with instead of random weights.

To store those of a training, in the place of earlier ones::

    python -m msda_plugin.tools.custom_data.starter work_dirs/NAME/iter_21000.pth
"""

import argparse
import io
import sys
from hashlib import sha256
from pathlib import Path

import torch
from mmengine.config import Config

from msda_plugin import starter_weights
from msda_plugin.engine.config_walk import without_pretrained
from msda_plugin.engine.model_zoo import Model, models
from msda_plugin.files import atomic_write
from msda_plugin.safe_loading import load_checkpoint
from msda_plugin.tools.common.errors import user_errors
from msda_plugin.tools.custom_data.config import DEFAULT_MODEL

MAX_BYTES = 10_000_000


def choose_weights(cfg: Config, model: Model, from_scratch: bool = False) -> str:
    """Let a training on custom data begin with starter weights, if nothing else is loaded.

    Args:
        cfg: The config of the training; its ``load_from`` is set.
        model: The model. A config file elsewhere with the name of a model has no starter weights.
        from_scratch: Remove every checkpoint that ``cfg`` names.

    Returns:
        A sentence on the weights.
    """
    random = without_pretrained(cfg.model)
    if from_scratch:
        cfg.model, cfg.load_from = random, None
        return 'weights: random'
    if cfg.get('load_from'):
        return f'weights: {cfg.load_from}'
    known = models().get(model.name)
    path = starter_weights.file_of(model.name) if known and known.config.samefile(model.config) else None
    if path is None:
        return 'weights: random' if random == cfg.model else 'weights: random, except those that the config names'
    cfg.load_from = starter_weights.SCHEME + model.name
    return f'weights: {path.name}, pre-trained on generated scenes (--from-scratch: random weights)'


def store(checkpoint: Path, model: str = DEFAULT_MODEL) -> Path:
    """Store the weights of a checkpoint, averaged if it has an ``EMAHook``, as starter weights; replaces earlier ones.

    Args:
        checkpoint: From a training of `msda_plugin.DetectionRunner`.
        model: Name of its model.

    Returns:
        The file, in `starter_weights.FOLDER`.

    Raises:
        OSError: If the checkpoint cannot be read, or the file cannot be written.
        ValueError: If it is not a checkpoint, exceeds the range of float16, or needs more than 10 MB.
    """
    content = load_checkpoint(checkpoint, 'cpu')
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in content['state_dict'].items()
    }
    infinite = [name for name, value in weights.items() if not value.isfinite().all()]
    if infinite:
        raise ValueError(f'{infinite[0]} of {checkpoint} is not finite in float16; train with a lower learning rate')
    meta = dict(
        dataset_meta=dict(classes=tuple(content['meta']['dataset_meta']['classes'])), iterations=content['meta']['iter']
    )
    buffer = io.BytesIO()  # torch.save writes the name of a file into it, which would change the hash
    torch.save(dict(meta=meta, state_dict=weights), buffer)
    data = buffer.getvalue()
    if len(data) > MAX_BYTES:
        raise ValueError(f'the weights need {len(data)} bytes, at most {MAX_BYTES} are stored')
    folder = starter_weights.FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f'{model}-{sha256(data).hexdigest()[: starter_weights.DIGITS]}.pth'
    earlier = [other for other in folder.glob(f'{model}-*.pth') if other != path]
    with atomic_write(path) as part:
        part.write_bytes(data)
    for other in earlier:
        other.unlink()
    return path


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin.tools.custom_data.starter',
        description='Store the weights of a checkpoint as starter weights.',
    )
    parser.add_argument('checkpoint', type=Path, help='checkpoint of a training on scenes')
    parser.add_argument('--model', default=DEFAULT_MODEL, help='name of its model (default: %(default)s)')
    args = parser.parse_args(argv)
    with user_errors('starter'):
        print(store(args.checkpoint, args.model))
    return 0


if __name__ == '__main__':
    sys.exit(main())
