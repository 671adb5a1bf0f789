"""The export command: the report, the exit status, and the demo of the file without MMDetection."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from msda_plugin.engine.detector import Detector
from msda_plugin.export import proof, writers
from msda_plugin.registry import MODELS
from msda_plugin.tools.export import main
from msda_plugin.tools.shapes import CLASSES, draw_image

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

CONFIG = """
_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
model = dict(
    type='msda_plugin.DETR', num_queries=20, test_cfg=dict(max_per_img=10),
    backbone=dict(depth=18, base_channels=8, init_cfg=None), neck=dict(in_channels=[64], out_channels=32),
    encoder=dict(num_layers=1, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4), ffn_cfg=dict(embed_dims=32, feedforward_channels=48))),
    decoder=dict(num_layers=2, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4), cross_attn_cfg=dict(embed_dims=32, num_heads=4),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=48))),
    positional_encoding=dict(num_feats=16),
    bbox_head=dict(type='msda_plugin.DETRHead', embed_dims=32, num_classes=6))
test_dataloader = dict(dataset=dict(_delete_=True, type='CocoDataset', pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A config with an untrained checkpoint, and images with annotations."""
    folder = tmp_path_factory.mktemp('export')
    (folder / 'tiny.py').write_text(CONFIG)
    cfg = Config.fromfile(folder / 'tiny.py')
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'fc_cls' in name or 'reg' in name:
            torch.nn.init.normal_(parameter, std=0.3)
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'tiny.pth')
    images, annotations = [], []
    for seed in range(2):
        image, objects = draw_image(seed + 3, (192, 128))
        Image.fromarray(image).save(folder / f'{seed}.png')
        images.append(dict(id=seed, file_name=f'{seed}.png', width=192, height=128))
        for label, box in ((item.label, [float(side) for side in item.box]) for item in objects):
            annotations.append(
                dict(id=len(annotations) + 1, image_id=seed, category_id=label + 1, bbox=box, area=100.0, iscrowd=0)
            )
    categories = [dict(id=label, name=name) for label, name in enumerate(CLASSES, 1)]
    (folder / 'val.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(proof, 'SECONDS', 0)


def export(folder, *args, format='onnx', out='model.onnx'):
    return main(
        [str(folder / 'tiny.py'), str(folder / 'tiny.pth'), '--format', format, '--out', str(folder / out), *args]
    )


@pytest.fixture(scope='module')
def file(folder):
    """The detector as an ONNX file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, 'SECONDS', 0)
        assert export(folder, '--num-images', '1', out='file.onnx') == 0
    return folder / 'file.onnx'


def test_report(folder, capsys):
    assert export(folder, '--data', str(folder / 'val.json'), '--images', str(folder), '--batch', '2') == 0
    report = capsys.readouterr().out
    assert 'images (2, 64, 96, 3) uint8, boxes (2, 10, 4) float32' in report
    assert 'circle, square' in report and ' nodes (' in report and ' MB, ' in report
    assert '20 detections in 2 images matched, largest difference of boxes' in report
    assert 'PyTorch are the same' in report and 'ms (' in report and 'batch 2, 64x96' in report
    precisions = report.partition('AP:')[2]
    assert precisions.count('PyTorch ') == 1 and 'onnxruntime' in precisions and 'on 2 images' in precisions


def test_a_file_that_differs_has_another_exit_status(folder, capsys, monkeypatch):
    def write_other(detector, card, path, **options):
        with torch.no_grad():
            detector.model.neck.convs[0].conv.weight.mul_(-1)
        return original(detector, card, path, **options)

    original = writers.write
    monkeypatch.setattr(writers, 'write', write_other)
    assert export(folder, '--num-images', '1') == 1
    output = capsys.readouterr()
    assert 'PyTorch are DIFFERENT' in output.out
    assert 'differs from PyTorch by more than the tolerance 0.001; do not use it' in output.err


def test_demo_without_config_and_without_mmdetection(file, folder, tmp_path):
    """A subprocess in which neither mmdet nor mmcv can be imported."""
    block = (
        'import sys\n'
        'class Block:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        "        if name.split('.')[0] in ('mmdet', 'mmcv'):\n"
        "            raise ImportError(name + ' must not be imported')\n"
        'sys.meta_path.insert(0, Block())\n'
        'from msda_plugin.__main__ import main\n'
        'sys.exit(main(sys.argv[1:]))\n'
    )
    arguments = [
        'demo',
        str(folder / '0.png'),
        '--model',
        str(file),
        '--out',
        str(tmp_path / 'out'),
        '--score-thr',
        '0',
    ]
    done = subprocess.run(
        [sys.executable, '-c', block, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert '6 classes, circle, square' in done.stdout
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert len(results) == 10
    assert Image.open(tmp_path / 'out' / '0.png').size == (640, 427)

    boxes = Detector(config=folder / 'tiny.py', checkpoint=folder / 'tiny.pth', device='cpu')(folder / '0.png', 0)
    expected = boxes.to_coco(1)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours['category_id'] == theirs['category_id']
        np.testing.assert_allclose(ours['bbox'], theirs['bbox'], atol=0.02)
        assert ours['score'] == pytest.approx(theirs['score'], abs=2e-4)


def test_detector_takes_the_file(file, folder):
    detector = Detector(file)
    assert detector.class_names == CLASSES and detector.checkpoint == str(file) and detector.config is None
    assert detector.device.type == 'cpu'
    image = np.asarray(Image.open(folder / '0.png'))
    first, second = detector([folder / '0.png', image], score_threshold=0.1)
    assert len(first) and first.boxes.shape == (len(first), 4) and (first.scores >= 0.1).all()
    np.testing.assert_array_equal(first.boxes, second.boxes)
    np.testing.assert_array_equal(second.image, image)
    with pytest.raises(ValueError, match='is an exported model, which runs on the CPU as it is; leave out half, nms'):
        Detector(file, half=True, nms=0.5)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--size', 'large'], "'large' is not a size; expected height x width"),
        (['--size', '0x64'], "'0x64' is not a size"),
        (['--size', '64', '--dynamic'], 'not allowed with argument'),
        (['--batch', '0'], "'0' is not a positive integer"),
        (['--tensorrt'], '--tensorrt needs --format onnx-custom'),
    ],
)
def test_arguments(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(folder, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments, options, message',
    [
        ([], dict(out='model.pt'), 'the format onnx is written to a .onnx file'),
        (['--images', 'nowhere.png'], {}, 'the image nowhere.png does not exist'),
        (['--data', 'nowhere.json'], {}, 'the annotation file nowhere.json does not exist'),
    ],
)
def test_errors_are_one_sentence(folder, arguments, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(folder, *arguments, **options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and 'Traceback' not in error


def test_a_missing_exporter(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(SystemExit):
        export(folder)
    assert 'onnx is needed' in (error := capsys.readouterr().err) and 'pip install msda_plugin[export]' in error
