"""Reports of trainings with a toy detector on drawn shapes."""

import json

import numpy as np
import pytest
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from PIL import Image
from toy_training import make_runner

from msda_plugin.engine.hooks import TrainingReportHook
from msda_plugin.engine.hooks.training_report import _evaluating, _TrainSample


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
    assert curves.shape[1] > 1500  # two panels
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


def pack(info):
    sample = DetDataSample(metainfo=dict(img_id=7, ori_shape=(48, 64), img_path=info['img_path']))
    return dict(sample_idx=info['sample_idx'], data_samples=sample)


def test_accuracy_on_training_images(tmp_path, log, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        'msda_plugin.engine.hooks.training_report.draw_curves',
        lambda *args, **options: drawn.append(options) or np.zeros((1, 1, 3), np.uint8),
    )
    # The detector finds the first object of one image, and nothing else.
    runner = make_runner(tmp_path, hook=dict(type='msda_plugin.TrainingReportHook', num_train_images=2), epochs=2)
    dataset = runner.train_dataloader.dataset
    runner.val_dataloader.dataset.pipeline = pack
    chosen = _TrainSample(dataset, pack, 2)
    monkeypatch.setattr(
        type(dataset), 'get_data_info', known(dataset, chosen.chosen[0], dict(bbox=[4.0, 4, 30, 30], bbox_label=2))
    )
    runner.train()
    report = json.loads((tmp_path / 'work' / 'metrics.json').read_text())
    assert [entry['bbox_mAP'] for entry in report['history']] == [0.1, 0.4]  # the validation's are as before
    for entry in report['history']:
        assert 0 < entry['train_bbox_mAP'] <= entry['train_bbox_mAP_50'] <= 1
    assert drawn[-1]['train_accuracy']['AP'] == [entry['train_bbox_mAP'] for entry in report['history']]
    assert sum('on 2 training images: AP ' in text for text in log) == 2
    scalars = [json.loads(line) for path in (tmp_path / 'work').glob('*/vis_data/*.json') for line in path.open()]
    assert [entry['step'] for entry in scalars if 'train_bbox_mAP' in entry] == [1, 2]


@pytest.mark.parametrize('trained, said', [(0.9, True), (0.46, True), (0.44, False), (0.1, False), (None, False)])
def test_overfitting_is_named(trained, said, tmp_path, log, quick_curves, monkeypatch):
    """The last validation has an AP of 0.3."""
    monkeypatch.setattr(TrainingReportHook, '_train_metrics', lambda *_: dict(train_bbox_mAP=trained))
    make_runner(tmp_path, hook=dict(type='msda_plugin.TrainingReportHook', num_train_images=2)).train()
    message = next(text for text in log if text.startswith('Training finished'))
    assert ('Overfitting: AP' in message) == said
    assert not said or f'AP {trained:.3f} on training images, but 0.300 on validation images. More' in message


def known(dataset, index, instance):
    """A ``get_data_info`` whose sample ``index`` has just this object."""
    original = type(dataset).get_data_info

    def get_data_info(self, idx):
        info = original(self, idx)
        if idx == index:
            info['instances'] = [dict(instance, ignore_flag=0)]
        return info

    return get_data_info


def test_the_sample_of_training_images_is_fixed(tmp_path):
    dataset = make_runner(tmp_path).train_dataloader.dataset
    state = np.random.get_state()[1].copy()
    first, second = (_TrainSample(dataset, pack, 2) for _ in range(2))
    assert first.chosen == second.chosen == sorted(set(first.chosen)) and len(first) == 2
    assert len(_TrainSample(dataset, pack, 99)) == len(dataset) == 3
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    sample = first[1]['data_samples']
    assert sample.img_id == 1 and sample.instances == dataset.get_data_info(first.chosen[1])['instances']


def test_a_failure_on_training_images_does_not_stop_the_training(tmp_path, quick_curves, log):
    hook = dict(type='msda_plugin.TrainingReportHook', num_train_images=2)
    make_runner(tmp_path, hook=hook).train()  # the pipeline has no data samples
    assert any('The training report lacks the AP on training images' in text for text in log)
    assert json.loads((tmp_path / 'work' / 'metrics.json').read_text())['finished'] is True


def test_predictions_state_their_threshold(tmp_path, quick_curves, monkeypatch):
    given = []
    monkeypatch.setattr(
        'msda_plugin.engine.hooks.training_report.draw_sheet',
        lambda *args, **options: given.append((args, options)) or np.zeros((1, 1, 3), np.uint8),
    )
    make_runner(tmp_path, hook=dict(type='msda_plugin.TrainingReportHook', score_thr=0.95)).train()
    (((images, truths, predictions, classes), options),) = given
    assert options == dict(score_thr=0.95)
    assert all(scores.max() == np.float32(0.9) for *_, scores in predictions)  # for the highest score


def test_bad_arguments():
    with pytest.raises(ValueError, match="may contain the placeholders .* only, got 'run {model}'"):
        TrainingReportHook(next_steps=['run {model}'])
    with pytest.raises(ValueError, match='num_images must not be negative, got -1'):
        TrainingReportHook(num_images=-1)
    with pytest.raises(ValueError, match='num_train_images must not be negative, got -2'):
        TrainingReportHook(num_train_images=-2)
