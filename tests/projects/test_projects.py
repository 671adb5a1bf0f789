"""The worked projects do what their READMEs say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECTS = Path(__file__).parents[2] / 'projects'
LOOKUP = """
import sys
import torch
from mmengine.registry import MODELS
neck = MODELS.build(dict(
    type='example_project.ContextNeck',
    attention=dict(type='msda_plugin.DeformableAttention', embed_dims=32, num_heads=4),
    neck=dict(type='mmdet.ChannelMapper', in_channels=[16, 32], out_channels=8)))
assert type(neck.attention).__module__ == 'msda_plugin.layers.deformable_attention'
outs = neck([torch.rand(1, 16, 8, 6), torch.rand(1, 32, 4, 3)])
assert [tuple(out.shape) for out in outs] == [(1, 8, 8, 6), (1, 8, 4, 3)]
"""


def run(*command, cwd=PROJECTS / 'example_project'):
    env = dict(os.environ, PYTHONPATH=str(PROJECTS / 'example_project'))
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_another_package_finds_our_layers_by_name_alone():
    sources = (PROJECTS / 'example_project' / 'example_project').glob('*.py')
    assert not any(
        'import msda_plugin' in text or 'from msda_plugin' in text for text in (path.read_text() for path in sources)
    )
    run('-c', LOOKUP)


@pytest.mark.slow
@pytest.mark.parametrize(
    'project, config',
    [
        ('example_project', 'retinanet_r18-context-neck_1xb4-1e_shapes.py'),
        ('mfds_detr', 'mfds-detr_r18_1xb1-44e_bccd.py'),
    ],
)
def test_trains(project, config, tmp_path):
    """A few iterations on four images; a small training and its evaluation, through the command line."""
    from msda_plugin.tools import shapes

    shapes.main(['--out', str(tmp_path / 'data'), '--train', '4', '--val', '2'])
    options = [
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        f'data_root={tmp_path / "data"}/',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False',
    ]
    if project == 'example_project':  # a warm-up that fits two iterations
        options += ['train_dataloader.batch_size=2', 'param_scheduler.0.end=2']
    if project == 'mfds_detr':  # the shapes stand in for the photographs
        categories = json.loads((tmp_path / 'data/annotations/train.json').read_text())['categories']
        names = ','.join(category['name'] for category in categories)
        options += [
            f'model.bbox_head.num_classes={len(categories)}',
            f'val_evaluator.ann_file={tmp_path / "data/annotations/val.json"}',
        ]
        for split in ('train', 'val'):
            dataset = f'{split}_dataloader.dataset'
            options += [
                f'{dataset}.metainfo.classes=[{names}]',
                f'{dataset}.ann_file=annotations/{split}.json',
                f'{dataset}.data_prefix.img={split}/',
            ]
    run(
        '-m',
        'msda_plugin',
        'train',
        PROJECTS / project / 'configs' / config,
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        *options,
    )
    assert list((tmp_path / 'work').glob('epoch_1.pth'))
