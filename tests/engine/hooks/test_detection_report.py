"""The page after a test, and after a training."""

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from toy_training import make_runner

from msda_plugin.engine.detection_report import Detections
from msda_plugin.engine.hooks import DetectionReportHook, TrainingReportHook


@pytest.fixture
def log(monkeypatch):
    """Messages of MMEngine's logger at INFO or above."""
    lines = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: lines.append(record.getMessage()))
    return lines


def pack(info):
    sample = DetDataSample(metainfo=dict(img_id=info.get('img_id'), img_path=info['img_path'], ori_shape=(48, 64)))
    return dict(sample_idx=info['sample_idx'], data_samples=sample)


def make(folder, hook, epochs=3, **options):
    """A toy training whose samples know their image."""
    runner = make_runner(folder, hook=hook, epochs=epochs, **options)
    runner.val_dataloader.dataset.pipeline = pack
    return runner


def facts(page):
    rows = re.findall(r'<tr><td>(.*?)</td><td>(.*?)</td></tr>', page.split('id="settings"')[1])
    return {name: unescape(value) for name, value in rows}


def test_page_of_a_training(tmp_path, log):
    runner = make(tmp_path, dict(type='msda_plugin.TrainingReportHook'))
    runner.train()
    page = (tmp_path / 'work' / 'report.html').read_text(encoding='utf-8')
    # The metric is 0.1, 0.4, 0.3: the page is on the second validation, whose checkpoint is the best one.
    assert facts(page)['validation'] == 'after epoch 2, iteration 6'
    assert 'best_coco_bbox_mAP_epoch_2.pth' in facts(page)['checkpoint']
    assert facts(page)['images'] == facts(page)['training images'] == '3'
    objects = sum(len(runner.val_dataloader.dataset.get_data_info(index)['instances']) for index in range(3))
    assert facts(page)['boxes'] == str(objects)
    assert facts(page)['classes'].startswith('6: circle, square')
    assert page.count('<b>triangle 0.90</b>') == 3  # the detector returns the same boxes for every image
    assert 'alt="training curves"' in page
    message = next(text for text in log if text.startswith('Training finished'))
    assert 'report, for a browser:    ' in message and message.count('report.html') == 1
    assert not [text for text in log if 'lacks' in text]


def test_the_page_of_a_resumed_training(tmp_path, log):
    """The best validation was in another process: the page is on the last one, and says so."""
    hook = dict(type='msda_plugin.TrainingReportHook', num_images=0)
    make(tmp_path, hook, epochs=2).train()
    resumed = make(tmp_path, hook, epochs=3, resume=True)
    resumed.train()  # its metric starts at 0.1 again
    page = (tmp_path / 'work' / 'report.html').read_text(encoding='utf-8')
    assert facts(page)['validation'] == 'after epoch 3, iteration 9'
    assert 'epoch_3.pth' in facts(page)['checkpoint'] and 'best' not in facts(page)['checkpoint']


def test_no_page(tmp_path):
    make(tmp_path, dict(type='msda_plugin.TrainingReportHook', page=False)).train()
    assert not (tmp_path / 'work' / 'report.html').exists()
    assert (tmp_path / 'work' / 'curves.png').exists()


def test_a_failure_does_not_stop_the_training(tmp_path, log, monkeypatch):
    def fail(self, outputs):
        raise AttributeError('no boxes here')

    monkeypatch.setattr(Detections, 'add', fail)
    runner = make(tmp_path, TrainingReportHook(), epochs=2)
    runner.train()
    assert runner.iter == 6 and not (tmp_path / 'work' / 'report.html').exists()
    assert sum('lacks report.html: AttributeError: no boxes here' in text for text in log) == 2  # one a validation


def test_samples_without_an_image(tmp_path, log):
    make_runner(tmp_path, epochs=1).train()
    assert any('needs img_id and img_path in meta_keys' in text for text in log)


@pytest.mark.parametrize('below', [None, 'mine/deep'])
def test_page_of_a_test(tmp_path, below):
    folder = below and str(tmp_path / below)
    runner = make(tmp_path, dict(type='msda_plugin.TrainingReportHook', page=False))
    hook = DetectionReportHook(folder)
    runner._test_loop = runner.val_loop  # a loop with a dataset
    samples = [runner.val_dataloader.dataset[index] for index in range(3)]
    for _ in range(2):  # a second test starts anew
        hook.before_test_epoch(runner)
        for index, sample in enumerate(samples):
            batch = dict(sample_idx=[index], data_samples=[sample['data_samples']])
            hook.after_test_iter(runner, index, None, runner.model(**batch, mode='predict'))
    hook.after_test_epoch(runner, {})
    page = Path(folder or runner.log_dir, 'report.html').read_text(encoding='utf-8')
    assert facts(page)['images'] == '3' and 'alt="training curves"' not in page
    assert 'triangle 0.90' in page


def test_truths(tmp_path):
    dataset = make_runner(tmp_path, epochs=1).train_dataloader.dataset
    found = Detections()
    with pytest.raises(ValueError, match=r'no detections for .*0\.png'):
        found.with_truths(dataset)
    runner = make(tmp_path, TrainingReportHook(), epochs=1)
    for index in (2, 0, 1):
        sample = runner.val_dataloader.dataset[index]['data_samples']
        found.add(runner.model(sample_idx=[index], data_samples=[sample], mode='predict'))
    images = found.with_truths(dataset)
    assert [image.path.rsplit('/')[-1] for image in images] == ['0.png', '1.png', '2.png']
    info = dataset.get_data_info(1)
    np.testing.assert_allclose(images[1].boxes, [instance['bbox'] for instance in info['instances']])
    assert images[1].labels.tolist() == [instance['bbox_label'] for instance in info['instances']]
    assert images[1].found.tolist() == [[4, 4, 30, 30], [1, 1, 9, 9]] and images[1].scores.dtype == np.float32
    assert not images[1].ignored.any()
