"""An image that disappears or breaks during a training is named in one sentence."""

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from PIL import Image

from msda_plugin.engine.broken_image import BrokenImageError
from msda_plugin.engine.runner import DetectionRunner


@DATASETS.register_module()
class Pictures(BaseDataset):
    """Loads images as MMDetection's datasets do."""

    def load_data_list(self):
        return [dict(img_path=f'{self.data_root}/{index}.png') for index in range(6)]


class Mean(BaseModel):
    def __init__(self, raises=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.raises = raises

    def forward(self, img, mode='tensor', **kwargs):
        if self.raises:
            raise RuntimeError('an error of the model')
        return dict(loss=self.weight * np.stack(img).mean())


class Break(Hook):
    """Breaks an image before the second epoch."""

    def __init__(self, path, how):
        self.path, self.how = path, how

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            if self.how is None:
                self.path.unlink()
            else:
                self.path.write_bytes(self.how)


def make_runner(folder, *hooks, workers=0, raises=False):
    for index in range(6):
        Image.new('RGB', (8, 8), (index,) * 3).save(folder / f'{index}.png')
    dataset = dict(type='Pictures', data_root=str(folder), pipeline=[dict(type='LoadImageFromFile')])
    make_runner.count = getattr(make_runner, 'count', 0) + 1
    return DetectionRunner(
        Mean(raises),
        str(folder / 'work'),
        train_dataloader=dict(
            batch_size=2, num_workers=workers, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=True)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        cfg=Config({}),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
        custom_hooks=hooks,
        experiment_name=f'{folder.name}_{make_runner.count}',
        default_scope='mmdet',
        log_level='WARNING',
    )


PROBLEMS = {'is missing': None, 'is empty': b'', 'cannot be read': b'no image'}


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('problem', PROBLEMS)
def test_the_image_is_named(problem, workers, tmp_path):
    path = tmp_path / '3.png'
    with pytest.raises(BrokenImageError) as stopped:
        make_runner(tmp_path, Break(path, PROBLEMS[problem]), workers=workers).train()
    assert str(stopped.value) == (
        f'the image {path} {problem}, although it was there before; restore it, and resume from '
        f'{tmp_path}/work/epoch_1.pth with --resume'
    )


def test_other_errors_keep_their_traceback(tmp_path):
    runner = make_runner(tmp_path, raises=True)
    with pytest.raises(RuntimeError, match='an error of the model'):
        runner.train()
