"""Attention figures, logged during validation by a runner with a small detector."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from msda_plugin.engine.hooks import AttentionVisualizationHook
from msda_plugin.registry import MODELS

CONFIG = Path(__file__).parents[3] / 'configs' / 'shapes' / 'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'


class ToyData(BaseDataset):
    """Three noise images, resized to twice their size as a pipeline does."""

    METAINFO = dict(classes=tuple('abcdef'))

    def load_data_list(self):
        items = []
        for index in range(3):
            pixels = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f'{self.data_root}/{index}.png')
            items.append(dict(img_path=f'{self.data_root}/{index}.png', pixels=pixels))
        return items

    def prepare_data(self, index):
        info = self.get_data_info(index)
        pixels = info['pixels'].repeat(2, 0).repeat(2, 1)[..., ::-1]
        sample = DetDataSample(
            metainfo=dict(
                img_path=info['img_path'],
                img_shape=(96, 128),
                ori_shape=(48, 64),
                scale_factor=(2.0, 2.0),
                img_id=index,
            )
        )
        return dict(inputs=torch.from_numpy(pixels.transpose(2, 0, 1).copy()), data_samples=sample)


class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


@pytest.fixture(scope='module')
def model():
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(CONFIG).model)
    model.init_weights()
    return model


@pytest.fixture
def logged(monkeypatch):
    """(name, step, image) of each call of add_image."""
    from mmengine.visualization import LocalVisBackend

    seen = []
    original = LocalVisBackend.add_image

    def add_image(self, name, image, step=0, **kwargs):
        seen.append((name, step, image))
        original(self, name, image, step, **kwargs)

    monkeypatch.setattr(LocalVisBackend, 'add_image', add_image)
    return seen


def make_runner(folder, model, hook, batch_size=2):
    data = ToyData(data_root=str(folder), lazy_init=False)
    loader = dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=data,
        collate_fn=pseudo_collate,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    return Runner(
        model,
        str(folder / 'work'),
        val_dataloader=loader,
        val_cfg=dict(),
        val_evaluator=[ToyMetric()],
        default_scope='mmdet',
        custom_hooks=[hook],
        experiment_name=f'{folder.name}-{batch_size}',
        visualizer=dict(
            type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name=f'{folder.name}-{batch_size}'
        ),
    )


@pytest.mark.parametrize('batch_size', [1, 2])
def test_logs_a_figure_for_each_of_the_first_images(tmp_path, model, logged, batch_size):
    hook = dict(type='msda_plugin.AttentionVisualizationHook', num_images=2, layers=['decoder.layers.1'])
    make_runner(tmp_path, model, hook, batch_size).val()
    assert [(name, step) for name, step, _ in logged] == [('attention_0', 0), ('attention_1', 0)]
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 and min(image.shape[:2]) > 200 for *_, image in logged)
    assert not np.array_equal(logged[0][2], logged[1][2])
    assert len(list(tmp_path.glob('work/*/vis_data/vis_image/attention_*.png'))) == 2


def test_records_only_the_batches_it_draws(tmp_path, model, monkeypatch):
    hooked = []
    layer = model.decoder.layers[1].cross_attn
    original = type(layer).forward

    def forward(self, *args, **kwargs):
        if self is layer:
            hooked.append(len(layer._forward_hooks))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(layer), 'forward', forward)
    hook = dict(type='msda_plugin.AttentionVisualizationHook', num_images=1, layers=['decoder.layers.1'])
    make_runner(tmp_path, model, hook, batch_size=1).val()
    assert hooked == [1, 0, 0]
    assert not any(module._forward_hooks for module in model.modules())


def test_draws_in_every_second_validation(tmp_path, model, logged, monkeypatch):
    monkeypatch.setattr('msda_plugin.engine.hooks.attention_visualization.draw_query', lambda image, *_, **__: image)
    hook = dict(type='msda_plugin.AttentionVisualizationHook', num_images=1, interval=2, layers=['encoder.layers.1'])
    runner = make_runner(tmp_path, model, hook)
    counts = []
    for _ in range(3):
        runner.val()
        counts.append(len(logged))
    assert counts == [1, 1, 2]


def test_the_query_is_the_highest_scoring_detection(tmp_path, model, logged, monkeypatch):
    queries = []
    monkeypatch.setattr(
        'msda_plugin.engine.hooks.attention_visualization.draw_query',
        lambda image, query, title: queries.append(query) or image,
    )
    runner = make_runner(tmp_path, model, dict(type='msda_plugin.AttentionVisualizationHook', num_images=3))
    runner.val()
    runner.model.eval()
    for index, query in enumerate(queries):
        with torch.no_grad():
            (answer,) = runner.model.val_step(pseudo_collate([runner.val_dataloader.dataset[index]]))
        np.testing.assert_allclose(query.box, answer.pred_instances.bboxes[0], atol=1e-3)
        assert query.layers[-1].name == 'decoder.layers.1.cross_attn'
    assert len(queries) == 3


def test_hooks_of_an_interrupted_validation_are_removed(tmp_path, model):
    hook = AttentionVisualizationHook(num_images=1)
    runner = make_runner(tmp_path, model, hook)
    hook.before_val_epoch(runner)
    hook.before_val_iter(runner, 0)
    assert any(module._forward_hooks for module in model.modules())
    hook.before_val_epoch(runner)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize('fields', [dict(num_images=0), dict(interval=0)])
def test_bad_arguments(fields):
    with pytest.raises(ValueError, match='num_images and interval must be at least 1, got'):
        AttentionVisualizationHook(**fields)
