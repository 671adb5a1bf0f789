"""With the same seed and data, DeformableDETR and MMDetection's have equal losses at every training step."""

import numpy as np
import pytest
import torch
from detector_cases import build, deformable_detr_config
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from mmengine.optim import OptimWrapper
from torch.utils.data import DataLoader

from msda_plugin.tools.shapes import CLASSES, generate

ROUNDS, BATCHES, BATCH, SIZE = 5, 4, 2, (64, 64)
# Learning rates at which rounding differences do not grow.
RATES = {'base': 5e-4, 'two_stage': 1e-4}
FORMS = {'base': {}, 'two_stage': dict(with_box_refine=True, as_two_stage=True, dims=256)}


@pytest.fixture(scope='module')
def batches(tmp_path_factory):
    """Batches of one round; about half of the images are narrower, so that batches are padded."""
    folder = tmp_path_factory.mktemp('shapes')
    generate(str(folder), train=BATCHES * BATCH, val=1, size=SIZE, seed=0)
    dataset = DATASETS.build(
        dict(
            type='mmdet.CocoDataset',
            data_root=str(folder),
            ann_file='annotations/train.json',
            data_prefix=dict(img='train/'),
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(filter_empty_gt=False),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='mmdet.LoadAnnotations', with_bbox=True),
                dict(type='RandomChoiceResize', resize_type='mmdet.Resize', scales=[SIZE, (48, 64)], keep_ratio=False),
                dict(type='mmdet.PackDetInputs'),
            ],
        )
    )
    np.random.seed(0)
    return list(DataLoader(dataset, BATCH, collate_fn=pseudo_collate))


def loss_curve(scope, batches, rate, **fields):
    config = deformable_detr_config(
        scope,
        **fields,
        data_preprocessor=dict(
            type='mmdet.DetDataPreprocessor', mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4], pad_size_divisor=32
        ),
    )
    config['bbox_head']['num_classes'] = len(CLASSES)
    model = build(config).train()
    optimizer = OptimWrapper(
        torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4), clip_grad=dict(max_norm=0.1)
    )
    return torch.stack([model.train_step(batch, optimizer)['loss'].detach() for batch in batches * ROUNDS])


@pytest.mark.parametrize('form', FORMS)
def test_follows_mmdetections_loss_curve(form, batches):
    ours, theirs = (loss_curve(scope, batches, RATES[form], **FORMS[form]) for scope in ('msda_plugin', 'mmdet'))
    assert len(ours) == 20 and theirs[-BATCHES:].mean() < 0.98 * theirs[:BATCHES].mean()
    assert ((ours - theirs).abs() / theirs).max() < 1e-3
