"""MMEngine's runner, with what a config says checked before anything is built from it."""
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from msda_plugin.data_check import check_config_data
from msda_plugin.registry import RUNNERS

DATA_FIELDS = tuple(f'{split}_{part}' for split in ('train', 'val', 'test') for part in ('dataloader', 'evaluator'))


def propagate_data_root(cfg: Config) -> None:
    """Make ``--cfg-options data_root=DIR`` mean what it says, in place.

    A config uses its ``data_root`` to write its data sets and evaluators when it is parsed; overriding the variable
    afterwards reaches none of them. Here every path that begins with the root of the file gets the new one.
    """
    new = cfg.get('data_root')
    if not new or not cfg.filename or not Path(cfg.filename).is_file():
        return
    old = Config.fromfile(cfg.filename).get('data_root')
    if not old or old == new:
        return
    new = new.rstrip('/') + '/' if old.endswith('/') else new
    for field in DATA_FIELDS:
        if cfg.get(field) is not None:
            cfg[field] = _replace_prefix(cfg[field], old, new)


def _replace_prefix(node, old: str, new: str):
    if isinstance(node, str):
        return new + node[len(old):] if node.startswith(old) else node
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _replace_prefix(value, old, new)
        return node
    if isinstance(node, (list, tuple)):
        return type(node)(_replace_prefix(value, old, new) for value in node)
    return node


@RUNNERS.register_module()
class DetectionRunner(Runner):
    """The runner of this project's configs: ``runner_type = 'msda_plugin.DetectionRunner'``.

    ``--cfg-options data_root=DIR`` reaches every data set and evaluator, and data is checked before it is used:
    training and validation data when a training starts, test data when a test does.
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
