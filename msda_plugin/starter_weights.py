"""Starter weights: detectors pre-trained on generated scenes (configs/scenes), stored in the package.

A file ``weights/MODEL-HASH.pth`` holds those of the model ``MODEL``: a state dict in float16, with the first digits of
the file's SHA-256 in its name. MMEngine loads it as ``msda_plugin://MODEL``, in ``load_from`` and in ``init_cfg``.
"""

import re
from pathlib import Path

import torch
from mmengine.runner import CheckpointLoader

import msda_plugin
from msda_plugin.safe_loading import load_checkpoint, verify_hash

FOLDER = Path(msda_plugin.__file__).parent / 'weights'
SCHEME = 'msda_plugin://'
DIGITS = 16  # of the SHA-256


def file_of(model: str) -> Path | None:
    """The file with the starter weights of a model, compared with the hash in its name; None if there is none.

    Raises:
        ValueError: If the file does not match its hash, or there are several.
    """
    pattern = re.compile(rf'{re.escape(model)}-[0-9a-f]{{{DIGITS}}}\.pth')
    files = sorted(path for path in FOLDER.glob('*.pth') if pattern.fullmatch(path.name))
    if len(files) > 1:
        raise ValueError(
            f'{FOLDER} has several starter weights for {model}: {", ".join(p.name for p in files)}; keep one'
        )
    for path in files:
        verify_hash(path, 'reinstall msda_plugin, or train without it with --from-scratch')
        return path
    return None


@CheckpointLoader.register_scheme(prefixes=SCHEME)
def load_from_package(filename: str, map_location: str | torch.device | None = None) -> object:
    """Load ``msda_plugin://MODEL``; MMEngine logs the name of this function.

    Raises:
        FileNotFoundError: If the model has no starter weights.
        ValueError: As in `file_of`.
    """
    path = file_of(filename.removeprefix(SCHEME))
    if path is None:
        names = sorted(path.stem.rpartition('-')[0] for path in FOLDER.glob('*.pth'))
        raise FileNotFoundError(f'{filename}: there are starter weights for {", ".join(names) or "no model"} only')
    return load_checkpoint(path, map_location)
