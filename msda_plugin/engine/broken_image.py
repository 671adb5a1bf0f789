"""Names the image that a training could not read."""

import os
from collections.abc import Iterator

from mmengine.runner import Runner

from msda_plugin.engine.checkpoint_files import TrainingStopped, last_checkpoint_of


class BrokenImageError(TrainingStopped, RuntimeError):
    """The training stopped because an image was deleted or damaged meanwhile; the message names it."""


def broken_image_error(runner: Runner, error: BaseException) -> BrokenImageError | None:
    """The error to raise for ``error``, which occurred while ``runner`` was training; None if no image explains it.

    The training stops, instead of going on without the image, because a resumed one repeats the epoch exactly.
    """
    if not _in_data_loading(error):
        return None
    text = str(error)  # with the worker's traceback
    for path in _image_paths(runner):
        if not os.path.isfile(path):
            problem = 'is missing'
        elif not os.path.getsize(path):
            problem = 'is empty'
        elif path in text:
            problem = 'cannot be read'
        else:
            continue
        last = last_checkpoint_of(runner)
        resume = f'resume from {last} with --resume' if last else 'start again; there is no checkpoint yet'
        return BrokenImageError(f'the image {path} {problem}, although it was there before; restore it, and {resume}')
    return None


def _in_data_loading(error: BaseException) -> bool:
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get('__name__', '').startswith('torch.utils.data.'):
            return True
        frame = frame.tb_next
    return False


def _image_paths(runner: Runner) -> Iterator[str]:
    for loop in (runner.train_loop, runner.val_loop):
        dataset = loop.dataloader.dataset if loop is not None else None
        if hasattr(dataset, 'get_data_info'):
            for index in range(len(dataset)):
                path = dataset.get_data_info(index).get('img_path')
                if path and '://' not in path:
                    yield path
