"""The image part of Grounding DINO: backbone and neck."""

import numpy as np
import pytest
import torch

from msda_plugin.engine.detector import Detector
from msda_plugin.export import proof
from msda_plugin.export.deployable import DeployableDetector
from msda_plugin.export.runtimes import open_exported
from msda_plugin.export.writers import SUFFIXES, make_card, write
from msda_plugin.tools import export as command
from msda_plugin.tools.shape_images import draw_image

FAST = ('onnx',)


def drawn(count: int, width: int, height: int) -> list[np.ndarray]:
    return [draw_image(seed, (width, height))[0] for seed in range(count)]


def export(model, format, folder, **options):
    pytest.importorskip('onnx')
    pytest.importorskip('openvino' if format == 'openvino' else 'onnxruntime')
    detector = DeployableDetector(model).eval()
    card = make_card(detector, format, **options)
    path = folder / f'model{SUFFIXES[format]}'
    write(detector, card, path)
    return open_exported(path, threads=1)


@pytest.mark.parametrize(
    'format', [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SUFFIXES]
)
def test_a_file_computes_the_features(format, build, tmp_path):
    model, images = build('grounding-dino'), drawn(2, 101, 75)
    expected = proof.predict_features(model, images)
    exported = export(model, format, tmp_path, batch=2, size=(75, 101))
    assert list(exported.card.outputs) == [*(f'features_{level}' for level in range(4)), 'padding_mask']
    shapes = {name: tensor['shape'] for name, tensor in exported.card.outputs.items()}
    assert shapes['features_0'] == [2, 32, 12, 16] and shapes['features_3'] == [2, 32, 2, 2]
    assert shapes['padding_mask'] == [2, 96, 128]
    found = exported.run_all(images)
    agreement = proof.compare_features(expected, found, proof.TOLERANCE)
    assert agreement.holds and agreement.maps == 8, agreement
    mask = found[0][-1]
    assert mask.dtype == bool and not mask[:75, :101].any() and mask[75:].all() and mask[:, 101:].all()


def test_any_size(build, tmp_path):
    model = build('grounding-dino')
    exported = export(model, 'onnx', tmp_path, batch=None, dynamic=True)
    assert exported.card.outputs['features_0']['shape'] == [None, 32, None, None]
    for case in [(1, 101, 75), (3, 96, 128)]:
        expected = proof.predict_features(model, drawn(*case))
        assert proof.compare_features(expected, exported.run_all(drawn(*case)), proof.TOLERANCE).holds


def test_the_file_says_where_it_ends(build, tmp_path):
    model = build('grounding-dino')
    model.dataset_meta = {}  # the classes come with the text
    exported = export(model, 'onnx', tmp_path, size=(64, 96))
    assert exported.card.note.startswith('image backbone and neck of GroundingDINO; the language model, the encoder')
    assert exported.card.class_names == () and exported.card.max_detections == 0
    with pytest.raises(ValueError, match='gives no detections: it is the image backbone and neck of GroundingDINO'):
        Detector(exported.path)
    with pytest.raises(ValueError, match='gives no detections'):
        exported(drawn(1, 96, 64))


def test_what_counts_as_the_same_features():
    maps = np.linspace(-4, 4, 24, dtype=np.float32).reshape(2, 3, 4), np.ones((2, 2, 2), np.float32)
    mask = np.zeros((6, 8), bool)

    def compare(*found):
        return proof.compare_features([(*maps, mask)], [found], 1e-3)

    close = compare(maps[0] + 2e-3, maps[1], mask)
    assert close.holds and close.maps == 2 and close.difference == pytest.approx(2e-3, rel=1e-3)
    assert close.relative == pytest.approx(5e-4, rel=1e-3)
    assert not compare(maps[0], maps[1] + 2e-3, mask).holds
    assert not compare(*maps, ~mask).holds
    assert not compare(maps[0][:1], maps[1], mask).holds
    assert not compare(maps[0] * np.nan, maps[1], mask).holds
    assert not proof.compare_features([], [], 1e-3).holds


def test_the_command(build, tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    monkeypatch.setattr(proof, 'SECONDS', 0)
    model = build('grounding-dino')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'model.pth')
    arguments = [model.cfg.filename, str(tmp_path / 'model.pth'), '--format', 'onnx', '--out', str(tmp_path / 'm.onnx')]
    assert command.main([*arguments, '--num-images', '2']) == 0
    report = capsys.readouterr().out
    assert 'features_0 (1, 32, 12, 12) float32' in report and 'padding_mask (1, 96, 96) bool' in report
    assert 'note:    image backbone and neck of GroundingDINO' in report
    assert 'PyTorch are the same: 8 feature maps of 2 images, largest difference' in report
    with pytest.raises(SystemExit):
        command.main([*arguments, '--data', 'val.json'])
    assert 'it has no AP; leave out --data' in capsys.readouterr().err
