"""Randomly changed configs give either a model with finite losses or an error message."""

import copy

import cv2
import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import strategies as st
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from msda_plugin.engine.data_check import check_config_data
from msda_plugin.engine.model_zoo import find_model
from msda_plugin.registry import MODELS
from msda_plugin.tools.common.errors import user_errors
from msda_plugin.tools.shapes import generate

ODD = (
    None,
    True,
    0,
    -1,
    1,
    3,
    7,
    1.5,
    64,
    'text',
    'msda_plugin.ShuntedTransfomer',
    'ReLU',
    (),
    (1, 2),
    [8, 16],
    {},
    {'type': 'LN'},
    {'type': 'NoSuchLayer'},
)


def paths(node, path=()):
    """The path of every entry of nested dicts and lists."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    data = tmp_path_factory.mktemp('data') / 'shapes'
    generate(str(data), train=1, val=1, size=(32, 32))
    cfg = Config.fromfile(find_model('deformable-detr-two-stage_shunted-nano').config)
    cfg.merge_from_dict(
        dict(
            model=dict(
                num_queries=4, test_cfg=dict(max_per_img=4), encoder=dict(num_layers=1), decoder=dict(num_layers=1)
            )
        )
    )
    loaders = {
        f'{split}_dataloader': dict(
            batch_size=1,
            dataset=dict(
                type='mmdet.CocoDataset',
                ann_file=f'annotations/{split}.json',
                data_root=f'{data}/',
                data_prefix=dict(img=f'{split}/'),
                metainfo=dict(classes=('circle', 'square', 'triangle', 'star', 'ring', 'cross')),
            ),
        )
        for split in ('train', 'val')
    }
    return dict(
        model=cfg.model.to_dict(),
        **loaders,
        val_evaluator=dict(type='mmdet.CocoMetric', ann_file=f'{data}/annotations/val.json'),
    )


def compute_losses(model):
    """The losses of one image with one object."""
    image = torch.from_numpy(cv2.circle(np.zeros((32, 32, 3), np.uint8), (16, 16), 8, (255, 0, 0), -1)).permute(2, 0, 1)
    sample = DetDataSample(metainfo=dict(img_shape=(32, 32), ori_shape=(32, 32), scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 24.0, 24.0]]), labels=torch.tensor([0]))
    batch = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), training=True)
    return model(**batch, mode='loss')


def test_configs(config, long_run, capsys):
    places = list(paths(config))
    edits = st.lists(
        st.tuples(st.sampled_from(places), st.one_of(st.just('remove'), st.sampled_from(ODD))), min_size=1, max_size=2
    )
    init_default_scope('mmdet')

    def check(case):
        changed = copy.deepcopy(config)
        for path, value in case:
            node = changed
            for key in path[:-1]:
                node = (
                    node[key]
                    if isinstance(node, (dict, list)) and (key in node if isinstance(node, dict) else key < len(node))
                    else None
                )
            if not isinstance(node, (dict, list)):
                continue  # removed by an earlier change
            if value == 'remove' and path[-1] in (node if isinstance(node, dict) else range(len(node))):
                del node[path[-1]]
            elif isinstance(node, dict) or path[-1] < len(node):
                node[path[-1]] = copy.deepcopy(value)
        capsys.readouterr()
        torch.manual_seed(0)
        try:
            with user_errors('train'):
                cfg = Config(changed)
                check_config_data(cfg, ('train', 'val'))
                model = MODELS.build(cfg.model)
                model.init_weights()
                losses = compute_losses(model)
        except SystemExit as stopped:
            said = capsys.readouterr().err
            assert stopped.code == 2 and 'Traceback' not in said and len(said.splitlines()) >= 2
            return 'rejected'
        assert losses and all(torch.as_tensor(value).isfinite().all() for value in losses.values())
        return 'valid'

    fuzz('configs', st.one_of(st.just([]), edits), 500 if long_run else 25, check)


@pytest.mark.parametrize('number', [1, 5, 7])
def test_wrong_number_of_classes(number, config, capsys):
    changed = copy.deepcopy(config)
    changed['model']['bbox_head']['num_classes'] = number
    with pytest.raises(ValueError, match=f'num_classes is {number}, but .* has 6 classes'):
        check_config_data(Config(changed), ('train',))
