"""Files of other origin, missing runtimes, and the images that a file is given."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from msda_plugin.export.card import ModelCard, tensors
from msda_plugin.export.runtimes import ExportedModel, fit, open_exported

INPUTS, OUTPUTS = tensors(2, (64, 96), 5)
CARD = ModelCard(
    name='tiny',
    format='onnx',
    class_names=('circle', 'square'),
    batch=2,
    size=(64, 96),
    scale=(96, 64),
    keep_ratio=True,
    pad_color=(124, 116, 104),
    max_detections=5,
    inputs=INPUTS,
    outputs=OUTPUTS,
)


class Fake(ExportedModel):
    """Finds the whole input in each image, and counts batches."""

    def __init__(self, card):
        self.card, self.batches = card, []

    def _load(self, threads):
        raise AssertionError

    def _run(self, images):
        self.batches.append(images.shape)
        height, width = images.shape[1:3]
        boxes = np.zeros((len(images), 5, 4), np.float32)
        boxes[:, 0] = 0, 0, width / 2, height / 2
        labels = np.full((len(images), 5), -1)
        labels[:, 0] = 1
        scores = np.zeros((len(images), 5), np.float32)
        scores[:, 0] = 0.5
        return boxes, scores, labels


def test_the_card_survives_json():
    assert ModelCard.from_json(CARD.to_json()) == CARD
    assert CARD.inputs['images'] == dict(shape=[2, 64, 96, 3], dtype='uint8')
    with pytest.raises(ValueError, match="its metadata 'msda_plugin' cannot be read"):
        ModelCard.from_json('{"name": "tiny"}')


def test_images_fill_the_top_left_of_a_fixed_size():
    image = np.full((100, 100, 3), 200, np.uint8)
    pixels, factors = fit(image, CARD)
    assert pixels.shape == (64, 96, 3) and factors == (0.64, 0.64)
    assert (pixels[:, :64] == 200).all() and (pixels[:, 64:] == (124, 116, 104)).all()


def test_images_are_stretched_without_keep_ratio():
    pixels, factors = fit(np.full((100, 100, 3), 200, np.uint8), replace(CARD, keep_ratio=False))
    assert pixels.shape == (64, 96, 3) and factors == (0.96, 0.64) and (pixels == 200).all()


@pytest.mark.parametrize('size', [(480, 640), (640, 480), (33, 500), (64, 96)])
@pytest.mark.parametrize('keep_ratio', [True, False])
def test_any_size_is_that_of_the_test_pipeline(size, keep_ratio):
    from mmcv.transforms import TransformBroadcaster  # noqa: F401  (registers mmcv's transforms)
    from mmdet.datasets.transforms import Resize

    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = Resize(scale=(133, 80), keep_ratio=keep_ratio)(dict(img=image.copy()))
    card = replace(CARD, size=None, scale=(133, 80), keep_ratio=keep_ratio)
    pixels, factors = fit(image, card)
    np.testing.assert_array_equal(pixels, expected['img'])
    np.testing.assert_allclose(factors, expected['scale_factor'])


def test_batches_are_filled_and_boxes_are_in_pixels_of_the_image():
    model = Fake(CARD)
    results = model([np.zeros((128, 192, 3), np.uint8)] * 3)
    assert model.batches == [(2, 64, 96, 3)] * 2 and len(results) == 3
    for boxes, scores, labels in results:
        np.testing.assert_allclose(boxes, [[0, 0, 96, 64]])
        assert scores.tolist() == [0.5] and labels.tolist() == [1]


def test_masks_are_those_of_the_image():
    """Without the padding of the input, at the size of the image."""

    class Halves(Fake):
        def _run(self, images):
            masks = np.zeros((len(images), 5, *images.shape[1:3]), bool)
            masks[:, 0, :, :32] = True  # the left half of a square image, and the padding
            masks[:, 0, :, 64:] = True
            return *super()._run(images), masks

    model = Halves(CARD)
    [(boxes, _, _, masks)] = model([np.zeros((128, 128, 3), np.uint8)])
    assert masks.shape == (1, 128, 128) and masks.dtype == bool
    assert masks[0, :, :63].all() and not masks[0, :, 65:].any()
    [(_, _, _, masks)] = model([np.zeros((64, 96, 3), np.uint8)])
    assert masks.sum() == 64 * 64


def test_images_of_one_size_run_together():
    model = Fake(replace(CARD, batch=None, size=None, inputs=tensors(None, None, 5)[0]))
    sizes = [(64, 96), (64, 96), (96, 64)]
    results = model([np.zeros((*size, 3), np.uint8) for size in sizes])
    assert model.batches == [(2, 64, 96, 3), (1, 96, 64, 3)]
    np.testing.assert_allclose(results[2][0], [[0, 0, 32, 48]])


@pytest.mark.parametrize(
    'shape, dtype, got',
    [
        ((2, 96, 64, 3), np.uint8, r'\(2, 96, 64, 3\) uint8'),
        ((3, 64, 96, 3), np.uint8, r'\(3, 64, 96, 3\) uint8'),
        ((64, 96, 3), np.uint8, r'\(64, 96, 3\) uint8'),
        ((2, 64, 96, 4), np.uint8, r'\(2, 64, 96, 4\) uint8'),
        ((2, 64, 96, 3), np.float32, r'\(2, 64, 96, 3\) float32'),
    ],
)
def test_inputs_of_another_shape_or_dtype(shape, dtype, got):
    """Also for AOTInductor, which checks nothing."""
    model = Fake(CARD)
    model.path = 'model.pt2'
    with pytest.raises(ValueError, match=rf'model.pt2 takes images \(2, 64, 96, 3\) uint8: .* got {got}: resize them'):
        model.run(np.zeros(shape, dtype))
    assert not model.batches


def test_a_list_of_inputs_of_another_size():
    model = Fake(replace(CARD, batch=None, inputs=tensors(None, (64, 96), 5)[0]))
    model.path = 'model.pt2'
    with pytest.raises(ValueError, match=r'model.pt2 takes images \(any, 64, 96, 3\) uint8: .* got \(1, 96, 64, 3\)'):
        model.run_all([np.zeros((96, 64, 3), np.uint8)])


def test_a_file_that_does_not_exist_or_has_another_suffix(tmp_path):
    with pytest.raises(FileNotFoundError, match='the exported model none.onnx does not exist'):
        open_exported('none.onnx')
    with pytest.raises(ValueError, match='is not an exported model; expected a file with the suffix .onnx, .pt2, .xml'):
        open_exported(tmp_path / 'model.pth')


@pytest.mark.parametrize('suffix, package', [('.onnx', 'onnxruntime'), ('.xml', 'openvino'), ('.pt2', 'torch')])
def test_a_damaged_file(suffix, package, tmp_path):
    pytest.importorskip(package)
    path = tmp_path / f'model{suffix}'
    path.write_bytes(b'not a model')
    with pytest.raises(ValueError, match=f'it is damaged, or not a {suffix} model') as raised:
        open_exported(path)
    assert '\n' not in str(raised.value)


def test_a_file_of_another_program(tmp_path):
    pytest.importorskip('onnxruntime')
    onnx = pytest.importorskip('onnx')
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in 'xy')
    graph = onnx.helper.make_graph([onnx.helper.make_node('Abs', ['x'], ['y'])], 'graph', [x], [y])
    path = tmp_path / 'model.onnx'
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8), path)
    with pytest.raises(ValueError, match='was not written by msda_plugin export: its classes are unknown'):
        open_exported(path)


@pytest.mark.parametrize('suffix, package', [('.onnx', 'onnxruntime'), ('.xml', 'openvino')])
def test_a_runtime_that_is_not_installed(suffix, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f'model{suffix}'
    path.write_bytes(b'')
    with pytest.raises(ImportError, match=rf'{package} is needed .*; pip install msda_plugin\[export\]'):
        open_exported(path)
