"""Reports of trainings with a toy detector on drawn shapes."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image

from msda_plugin.engine.hooks import TrainingReportHook
from msda_plugin.engine.hooks.training_report import _evaluating
from msda_plugin.tools.shapes import CLASSES, draw_image

AP = (0.1, 0.4, 0.3)  # what the toy metric reports, validation by validation


class ToyData(BaseDataset):
    METAINFO = dict(classes=CLASSES)

    def load_data_list(self):
        items = []
        for index in range(3):
            image, annotations = draw_image((9, index), (64, 48))
            path = f'{self.data_root}/{index}.png'
            Image.fromarray(image).save(path)
            boxes = [(a.box[0], a.box[1], a.box[0] + a.box[2], a.box[1] + a.box[3]) for a in annotations]
            items.append(
                dict(
                    img_path=path,
                    instances=[
                        dict(bbox=box, bbox_label=a.label, ignore_flag=0)
                        for box, a in zip(boxes, annotations, strict=True)
                    ],
                )
            )
        return items


class ToyDetector(BaseModel):
    """Learns one number; predicts one box with a high and one with a low score."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(3.0))
        self.seen = []

    def forward(self, sample_idx, mode='tensor', **kwargs):
        if mode == 'loss':
            return dict(loss_cls=self.number**2, loss_bbox=self.number.abs())
        self.seen.append((self.training, float(self.number), torch.is_grad_enabled()))
        found = InstanceData(
            bboxes=torch.tensor([[4.0, 4, 30, 30], [1, 1, 9, 9]]),
            labels=torch.tensor([2, 3]),
            scores=torch.tensor([0.9, 0.1]),
        )
        return [BaseDataElement(pred_instances=found) for _ in sample_idx]


class ToyMetric(BaseMetric):
    default_prefix = 'coco'
    calls = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        value = AP[ToyMetric.calls % len(AP)]
        ToyMetric.calls += 1
        return dict(bbox_mAP=value, bbox_mAP_50=value + 0.2, bbox_mAP_l=float('nan'))


def make_runner(folder, by_epoch=True, hook=None, custom_hooks=(), resume=False, epochs=3):
    ToyMetric.calls = 0
    (folder / 'images').mkdir(exist_ok=True)

    def loader():
        return dict(
            batch_size=1,
            num_workers=0,
            dataset=ToyData(data_root=str(folder / 'images'), lazy_init=False),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=pseudo_collate,
        )

    train_cfg = (
        dict(by_epoch=True, max_epochs=epochs)
        if by_epoch
        else dict(by_epoch=False, max_iters=3 * epochs, val_interval=3)
    )
    return Runner(
        ToyDetector(),
        str(folder / 'work'),
        train_dataloader=loader(),
        val_dataloader=loader(),
        train_cfg=train_cfg,
        val_cfg=dict(),
        val_evaluator=[ToyMetric()],
        resume=resume,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_scope='mmengine',
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                interval=1 if by_epoch else 3,
                by_epoch=by_epoch,
                max_keep_ckpts=1,
                save_best='coco/bbox_mAP',
                rule='greater',
            )
        ),
        custom_hooks=[hook or dict(type='msda_plugin.TrainingReportHook'), *custom_hooks],
        cfg=Config(dict(model='toy'), filename=None),
        experiment_name=f'{folder.name}-{by_epoch}-{resume}-{epochs}',
    )


@pytest.fixture
def log(monkeypatch):
    """Messages of MMEngine's logger at INFO or above."""
    lines = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: lines.append(record.getMessage()))
    return lines


@pytest.fixture
def quick_curves(monkeypatch):
    monkeypatch.setattr(
        'msda_plugin.engine.hooks.training_report.draw_curves', lambda *_, **__: np.zeros((1, 1, 3), np.uint8)
    )


@pytest.mark.parametrize('by_epoch', [True, False])
def test_report(tmp_path, log, by_epoch):
    runner = make_runner(tmp_path, by_epoch)
    runner.train()
    work = tmp_path / 'work'
    report = json.loads((work / 'metrics.json').read_text())
    assert report['finished'] is True
    assert report['final'] == report['history'][-1]
    assert (report['final']['bbox_mAP'], report['best']['bbox_mAP']) == (0.3, 0.4)
    assert report['best']['iter'] == 6 and [entry['iter'] for entry in report['history']] == [3, 6, 9]
    assert report['final']['bbox_mAP_l'] is None
    if by_epoch:
        assert [entry['epoch'] for entry in report['history']] == [1, 2, 3]
    seconds = [entry['seconds'] for entry in report['history']]
    assert seconds == sorted(seconds) and seconds[-1] <= report['train_seconds']
    assert report['num_params'] == report['num_trainable_params'] == 1
    assert report['best_checkpoint'].endswith('.pth') and 'best_coco_bbox_mAP' in report['best_checkpoint']

    curves = np.asarray(Image.open(work / 'curves.png'))
    assert curves.shape[1] > 1500  # three panels
    sheet = np.asarray(Image.open(work / 'predictions.png'))
    assert sheet.shape[1] > 4 * 384 and sheet.shape[0] > 2 * 288
    assert not list(work.glob('.*.tmp'))

    message = next(text for text in log if text.startswith('Training finished'))
    assert 'AP 0.300, AP50 0.500' in message and 'Best: AP 0.400' in message
    for name in ('metrics.json', 'curves.png', 'predictions.png', 'best_coco_bbox_mAP'):
        assert name in message
    assert f'python -m msda_plugin test CONFIG {report["best_checkpoint"]}' in message


def test_predictions_use_evaluation_mode(tmp_path, quick_curves):
    runner = make_runner(tmp_path)
    runner.train()
    validations = 3 * 3
    assert len(runner.model.seen) == validations + 3
    assert all(not training and not grad for training, _, grad in runner.model.seen[validations:])
    assert runner.model.training is False  # as the last validation left it


def test_averaged_weights_are_used_and_restored(tmp_path, quick_curves):
    runner = make_runner(tmp_path, custom_hooks=[dict(type='EMAHook', momentum=0.5)])
    runner.train()
    own = float(runner.model.number)
    assert runner.model.seen[-1][1] == runner.model.seen[-4][1] != own  # those of the last validation
    runner.model.train()
    with _evaluating(runner):
        assert not runner.model.training and float(runner.model.number) != own
    assert runner.model.training and float(runner.model.number) == own


def test_a_stopped_training_leaves_a_report(tmp_path):
    class Stop(TrainingReportHook):
        def before_train_epoch(self, runner):
            if runner.epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, hook=Stop()).train()
    report = json.loads((tmp_path / 'work' / 'metrics.json').read_text())
    assert report['finished'] is False and len(report['history']) == 2
    assert (tmp_path / 'work' / 'curves.png').is_file()


def test_a_resumed_training_continues_the_report(tmp_path, quick_curves):
    make_runner(tmp_path, epochs=2).train()
    before = json.loads((tmp_path / 'work' / 'metrics.json').read_text())
    runner = make_runner(tmp_path, resume=True, epochs=3)
    runner.train()
    report = json.loads((tmp_path / 'work' / 'metrics.json').read_text())
    assert report['history'][:2] == before['history'] and len(report['history']) == 3
    assert report['history'][2]['seconds'] >= before['history'][1]['seconds']
    assert len(runner.message_hub.get_scalar('train/loss').data[0]) == 9


def test_a_new_training_in_an_old_work_dir_starts_a_new_report(tmp_path, quick_curves):
    for _ in range(2):
        make_runner(tmp_path, epochs=2).train()
    assert len(json.loads((tmp_path / 'work' / 'metrics.json').read_text())['history']) == 2


@pytest.mark.parametrize('what, broken', [('images', 'draw_sheet'), ('curves', 'draw_curves')])
def test_a_failure_in_drawing_does_not_stop_the_training(tmp_path, monkeypatch, quick_curves, log, what, broken):
    def fail(*args, **kwargs):
        raise RuntimeError('no ink')

    monkeypatch.setattr(f'msda_plugin.engine.hooks.training_report.{broken}', fail)
    runner = make_runner(tmp_path)
    runner.train()
    assert runner.iter == 9
    assert any('The training report lacks' in text and what in text and 'no ink' in text for text in log)
    assert json.loads((tmp_path / 'work' / 'metrics.json').read_text())['finished'] is True
    assert any(text.startswith('Training finished') for text in log)


def test_custom_next_steps(tmp_path, quick_curves, log):
    make_runner(
        tmp_path, hook=dict(type='msda_plugin.TrainingReportHook', num_images=0, next_steps=['look into {work_dir}'])
    ).train()
    assert not (tmp_path / 'work' / 'predictions.png').exists()
    assert next(text for text in log if text.startswith('Training finished')).endswith(f'look into {tmp_path}/work')


def test_bad_arguments():
    with pytest.raises(ValueError, match="may contain the placeholders .* only, got 'run {model}'"):
        TrainingReportHook(next_steps=['run {model}'])
    with pytest.raises(ValueError, match='num_images must not be negative, got -1'):
        TrainingReportHook(num_images=-1)
