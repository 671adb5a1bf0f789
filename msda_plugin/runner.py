"""MMEngine's runner, with what a config says checked before anything is built from it."""
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from msda_plugin.data_check import check_config_data
from msda_plugin.registry import RUNNERS

DATA_FIELDS = tuple(f'{split}_{part}' for split in ('train', 'val', 'test') for part in ('dataloader', 'evaluator'))


def propagate_data_root(cfg: Config) -> None:
    """Make a changed ``data_root`` reach the data sets and evaluators, in place.

    A config uses its ``data_root`` to write them when it is parsed; a value given later (``--cfg-options
    data_root=DIR``, a config that inherits, an edited copy of a config that a training left) reaches none of them. Here
    every path under the old root gets the new one. The old root is the one that all data sets share, or else the one
    that the config file names.

    Raises:
        ValueError: the data sets have several roots, and none is plainly the one to replace.
    """
    new = cfg.get('data_root')
    roots = {root for field in DATA_FIELDS for root in _find(cfg.get(field), 'data_root')}
    if not new or not roots or new.rstrip('/') in {root.rstrip('/') for root in roots}:
        return
    if len(roots) > 1 and cfg.filename and Path(cfg.filename).is_file():
        roots &= {Config.fromfile(cfg.filename).get('data_root')}
    if len(roots) != 1:
        raise ValueError(f"data_root is '{new}', but the data sets of the config start from several other folders; set "
                         "the data_root of each data set, such as train_dataloader.dataset.data_root")
    [old] = roots
    for field in DATA_FIELDS:
        if cfg.get(field) is not None:
            cfg[field] = _move(cfg[field], old.rstrip('/'), new.rstrip('/'))


def _find(node: object, key: str) -> Iterator[str]:
    """Every value of `key` in nested dicts and lists."""
    if isinstance(node, dict):
        if node.get(key):
            yield node[key]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _find(child, key)


def _move(node: object, old: str, new: str) -> object:
    """`node` with `new` instead of `old` in every path at or under `old`."""
    if isinstance(node, str):
        return new + node[len(old):] if node == old or node.startswith(f'{old}/') else node
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _move(value, old, new)
        return node
    if isinstance(node, (list, tuple)):
        return type(node)(_move(value, old, new) for value in node)
    return node


@RUNNERS.register_module()
class DetectionRunner(Runner):
    """The runner of this project's configs: ``runner_type = 'msda_plugin.DetectionRunner'``.

    A changed ``data_root`` reaches every data set and evaluator, and data is checked before it is used: training and
    validation data when a training starts, test data when a test does.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'DetectionRunner':
        propagate_data_root(cfg)
        return super().from_cfg(cfg)

    def check_data(self, *splits: str) -> None:
        """Check the data sets of these splits ('train', 'val', 'test'), each once.

        Raises:
            FileNotFoundError: a data root, an annotation file or images that are not there.
            ValueError: an annotation file that is not COCO, classes that it does not have, or a head for another
                number of classes.
        """
        checked = self.__dict__.setdefault('_checked_splits', set())
        check_config_data(self.cfg, [split for split in splits if split not in checked])
        checked.update(splits)

    def train(self) -> nn.Module:
        self.check_data('train', 'val')
        return super().train()

    def val(self) -> dict:
        self.check_data('val')
        return super().val()

    def test(self) -> dict:
        self.check_data('test')
        return super().test()
