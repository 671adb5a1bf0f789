"""Exported files compute what the detector computes, and say what they are."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import MaskFormerHead
from PIL import Image
from torch import nn

from msda_plugin.acceleration import accelerate
from msda_plugin.engine.detector import Detector
from msda_plugin.export import proof
from msda_plugin.export.deployable import CannotExportError, DeployableDetector
from msda_plugin.export.runtimes import open_exported
from msda_plugin.export.writers import SUFFIXES, make_card, write
from msda_plugin.layers.rep_vgg import RepVGGBlock
from msda_plugin.libraries import LIBRARY_DIR
from msda_plugin.tools import demo
from msda_plugin.tools.shape_images import draw_image

TRANSFORMERS = ('base', 'refine', 'two-stage', 'detr', 'dino', 'stock-two-stage', 'rtdetr', 'dfine')
KINDS = (*TRANSFORMERS, 'retinanet', 'faster-rcnn', 'mask-rcnn', 'mask2former')
# Each takes seconds, and torch's compilation a minute.
FAST = [
    ('onnx', 'dino'),
    ('onnx', 'dfine'),
    ('onnx', 'mask-rcnn'),
    ('onnx-custom', 'mask2former'),
    ('onnx-custom', 'refine'),
    ('onnx-custom', 'rtdetr'),
    ('onnx-gather', 'detr'),
    ('openvino', 'detr'),
]
CASES = [
    pytest.param(format, kind, marks=[] if (format, kind) in FAST else pytest.mark.slow)
    for format in SUFFIXES
    for kind in KINDS
]
EMPTY = [  # detectors that can find nothing: other transformers always return their best boxes
    pytest.param(format, kind, marks=[] if (format, kind) == ('onnx', 'retinanet') else pytest.mark.slow)
    for format in SUFFIXES
    for kind in ('retinanet', 'faster-rcnn', 'mask-rcnn', 'mask2former')
]
SHOWN = [
    pytest.param(format, kind, marks=[] if (format, kind) == ('onnx', 'mask2former') else pytest.mark.slow)
    for format in ('onnx', 'torch', 'openvino')
    for kind in ('mask-rcnn', 'mask2former')
]


def drawn(count: int, width: int, height: int) -> list[np.ndarray]:
    return [draw_image(seed, (width, height))[0] for seed in range(count)]


def export(model: nn.Module, format: str, folder, **options):
    """Write an accelerated model, and load the file."""
    pytest.importorskip('onnx')
    pytest.importorskip('openvino' if format == 'openvino' else 'onnxruntime')
    if format == 'onnx-custom' and not Path(LIBRARY_DIR, 'libmsda_onnxruntime.so').is_file():
        pytest.skip('the library for onnxruntime was not built')
    accelerate(model)
    detector = DeployableDetector(model).eval()
    card = make_card(detector, format, **options)
    path = folder / f'model{SUFFIXES[format]}'
    nodes = write(detector, card, path)
    exported = open_exported(path, threads=1)
    assert exported.card == card
    assert nodes.total() > 100
    return exported, nodes


def assert_same(expected, found, images):
    agreement = proof.compare(expected, found, images, proof.TOLERANCE)
    assert agreement.holds and not agreement.exchanged, agreement
    assert agreement.matched == sum(len(labels) for _, _, labels, *_ in expected)


@pytest.mark.parametrize('format, kind', CASES)
def test_a_file_computes_what_the_detector_computes(format, kind, build, tmp_path):
    """At an odd size, which is padded, and with a batch of two."""
    model, images = build(kind), drawn(2, 101, 75)
    expected = proof.predict_inputs(model, images)
    assert all(len(labels) for _, _, labels, *_ in expected)
    exported, nodes = export(model, format, tmp_path, batch=2, size=(75, 101))
    assert_same(expected, exported.run_all(images), images)
    deformable = kind not in ('detr', 'retinanet', 'faster-rcnn', 'mask-rcnn')
    assert ('GridSample' in nodes) == (deformable and format in ('onnx', 'openvino'))


@pytest.mark.parametrize(
    'format, kind',
    [
        ('onnx', 'two-stage'),
        *(pytest.param('onnx', kind, marks=pytest.mark.slow) for kind in KINDS if kind != 'two-stage'),
        pytest.param('openvino', 'two-stage', marks=pytest.mark.slow),
    ],
)
def test_a_dynamic_file_takes_images_and_batches_of_any_size(format, kind, build, tmp_path):
    model = build(kind)
    cases = [(1, 101, 75), (3, 96, 128)]
    expected = [proof.predict_inputs(model, drawn(*case)) for case in cases]
    exported, _ = export(model, format, tmp_path, batch=None, dynamic=True)
    for case, detections in zip(cases, expected, strict=True):
        assert_same(detections, exported.run_all(drawn(*case)), drawn(*case))


@pytest.mark.slow  # minutes each
@pytest.mark.parametrize('kind', ['two-stage', 'detr', 'dino'])
def test_a_torch_file_takes_images_of_any_size(kind, build, tmp_path):
    model = build(kind)
    cases = [(2, 331, 203), (1, 160, 300), (1, 480, 161)]
    expected = [proof.predict_inputs(model, drawn(*case)) for case in cases]
    exported, _ = export(model, 'torch', tmp_path, batch=1, dynamic=True)
    for case, detections in zip(cases, expected, strict=True):
        assert_same(detections, exported.run_all(drawn(*case)), drawn(*case))
    if kind == 'two-stage':
        with pytest.raises(ValueError, match='coarsest map needs more than one row and column; enlarge them'):
            exported.run(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.slow
def test_a_torch_file_takes_batches_of_any_size(build, tmp_path):
    model = build('dino')
    expected = proof.predict_inputs(model, drawn(3, 101, 75))
    exported, _ = export(model, 'torch', tmp_path, batch=None, size=(75, 101))
    for count in (1, 3):
        assert_same(expected[:count], exported.run_all(drawn(count, 101, 75)), drawn(count, 101, 75))


@pytest.mark.parametrize('kind', ['rtdetr', 'dfine'])
def test_the_file_has_the_fused_detector(kind, build, tmp_path):
    """RepVGG branches and batch norms are not in the file; the detector keeps them."""
    pytest.importorskip('onnx')
    model = build(kind)
    detector, before = DeployableDetector(model).eval(), copy.deepcopy(model.state_dict())
    path = tmp_path / 'model.onnx'
    nodes = write(detector, make_card(detector, 'onnx', size=(64, 96)), path)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert 'BatchNormalization' not in nodes
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    branches = sum(isinstance(module, RepVGGBlock) for module in model.modules())
    assert branches and nodes['Conv'] == convolutions - branches


@pytest.mark.parametrize('kind', ['mask-rcnn', 'mask2former'])
def test_masks_are_those_of_the_detector(kind, build):
    model = build(kind)
    detector, image = DeployableDetector(model).eval(), drawn(1, 101, 75)[0]
    assert detector.predicts_masks
    [(boxes, scores, labels, masks)] = proof.predict_inputs(model, [image])
    assert 0.02 < masks.mean() < 0.98
    with torch.no_grad():
        found = [part[0].numpy() for part in detector(torch.from_numpy(image[None]))]
    np.testing.assert_allclose(found[0][: len(boxes)], boxes[np.argsort(-scores)], atol=1e-3)
    np.testing.assert_array_equal(found[3][: len(boxes)], masks[np.argsort(-scores)])
    assert found[3].dtype == bool and found[3].shape == (detector.max_detections, 75, 101)


def test_stuff_of_a_panoptic_mask2former_leaves_rows_empty(build):
    model = build('mask2former')
    model.panoptic_fusion_head.num_things_classes = 2
    torch.nn.init.normal_(model.panoptic_head.cls_embed.weight)  # detections of several classes
    image = drawn(1, 101, 75)[0]
    [(boxes, scores, labels, masks)] = proof.predict_inputs(model, [image])
    assert 0 < len(labels) < 12
    with torch.no_grad():
        found = [part[0].numpy() for part in DeployableDetector(model).eval()(torch.from_numpy(image[None]))]
    assert (found[2] < 2).all() and (found[2] >= 0).sum() == len(labels)
    empty = found[2] < 0
    assert not found[0][empty].any() and not found[1][empty].any() and not found[3][empty].any()


def test_an_empty_row_has_an_empty_mask(build, tmp_path):
    model = build('mask-rcnn')
    model.roi_head.test_cfg.score_thr = 1.0
    exported, _ = export(model, 'onnx', tmp_path, size=(64, 96))
    boxes, scores, labels, masks = exported.run(np.stack(drawn(1, 96, 64)))
    assert (labels == -1).all() and masks.shape == (1, 15, 64, 96) and not masks.any()
    assert exported(drawn(1, 300, 200))[0][3].shape == (0, 200, 300)


@pytest.mark.parametrize('format, kind', SHOWN)
def test_the_detector_and_the_demo_show_the_masks_of_a_file(format, kind, build, tmp_path):
    exported, _ = export(build(kind), format, tmp_path, size=(64, 96))
    image = drawn(1, 800, 480)[0]
    Image.fromarray(image).save(tmp_path / 'photo.png')
    assert demo.main([str(tmp_path / 'photo.png'), '--model', str(exported.path), '--out', str(tmp_path / 'out')]) == 0
    picture = np.asarray(Image.open(tmp_path / 'out' / 'photo.png'))
    result = Detector(exported.path)(image)
    assert len(result) and result.masks.any()
    np.testing.assert_array_equal(picture, result.draw())
    without = replace(result, masks=None).draw()
    changed = (picture != without).any(2)
    assert changed.any() and not changed[~result.masks.any(0)].any()
    assert all('segmentation' in item for item in json.loads((tmp_path / 'out' / 'results.json').read_text()))


def test_the_masks_of_a_detector_have_the_size_of_the_image(build, tmp_path):
    exported, _ = export(build('mask2former'), 'onnx', tmp_path, size=(64, 96))
    result = Detector(exported.path)(drawn(1, 200, 120)[0], score_threshold=0.0)
    assert len(result) and result.masks.shape == (len(result), 120, 200) and result.masks.dtype == bool
    coco = result.to_coco(1)
    assert all(item['segmentation']['size'] == [120, 200] for item in coco)
    for (x1, y1, x2, y2), mask in zip(result.boxes, result.masks, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):  # boxes are those of the masks, up to the resizing by 2.1
            np.testing.assert_allclose(
                [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], [x1, y1, x2, y2], atol=2.1
            )


@pytest.mark.parametrize('format, kind', EMPTY)
def test_rows_without_a_detection(format, kind, build, tmp_path):
    model = build(kind)
    if kind == 'mask2former':
        model.panoptic_fusion_head.num_things_classes = 0  # everything is stuff
    else:
        model.test_cfg.get('rcnn', model.test_cfg).score_thr = 1.0
    exported, _ = export(model, format, tmp_path, batch=2, size=(75, 101))
    boxes, scores, labels, *masks = exported.run(np.stack(drawn(2, 101, 75)))
    assert labels.shape == (2, exported.card.max_detections) and (labels == -1).all()
    assert not scores.any() and not boxes.any() and not any(part.any() for part in masks)
    for boxes, scores, labels, *masks in exported(drawn(2, 300, 200)):
        assert boxes.shape == (0, 4) and len(scores) == len(labels) == 0
        assert all(part.shape == (0, 200, 300) for part in masks)


def test_half_precision(build, tmp_path):
    onnx = pytest.importorskip('onnx')
    model, images = build('refine'), drawn(1, 101, 75)
    expected = proof.predict_inputs(model, images)
    exported, _ = export(model, 'onnx', tmp_path, size=(75, 101), half=True)
    found = exported.run_all(images)
    assert proof.compare(expected, found, images, 5e-3).holds
    assert not np.array_equal(found[0][1], expected[0][1])
    weights = onnx.load(exported.path).graph.initializer
    half = sum(np.prod(weight.dims) for weight in weights if weight.data_type == onnx.TensorProto.FLOAT16)
    assert half > 0.95 * sum(np.prod(weight.dims) for weight in weights)


def test_the_preprocessing_is_in_the_file(build):
    """Order of channels, normalization and padding are those of the detector."""
    model = build('retinanet')
    detector = DeployableDetector(model).eval()
    assert detector.pad_color == (124, 116, 104)
    image = draw_image(0, (101, 75))[0]
    with torch.no_grad():
        boxes, scores, labels = detector(torch.from_numpy(image[None]))
    [expected] = proof.predict_inputs(model, [image])
    number = len(expected[1])
    np.testing.assert_allclose(boxes[0, :number].numpy(), expected[0], atol=1e-3)
    np.testing.assert_allclose(scores[0, :number].numpy(), expected[1], atol=1e-5)
    assert (labels[0, number:] == -1).all()
    model.data_preprocessor._channel_conversion = False  # a model that was trained on BGR
    assert DeployableDetector(model).bgr and DeployableDetector(model).pad_color == (104, 116, 124)


def test_an_operator_that_onnx_cannot_express(build, tmp_path):
    model = build('detr')
    neck = model.neck.forward
    model.neck.forward = lambda maps: tuple(part.lgamma() for part in neck(maps))
    detector = DeployableDetector(model).eval()
    with pytest.raises(CannotExportError, match='ONNX cannot express a part of the detector'):
        write(detector, make_card(detector, 'onnx', size=(64, 64)), tmp_path / 'model.onnx')
    assert not list(tmp_path.glob('*.onnx'))


def test_detectors_that_cannot_be_exported(build):
    model = build('two-stage')
    model.bbox_head.__class__ = type(
        'OwnHead', (type(model.bbox_head),), dict(_predict_by_feat_single=lambda self, *args: None)
    )
    with pytest.raises(CannotExportError, match='OwnHead computes its detections in a way of its own'):
        DeployableDetector(model)
    model = build('mask2former')
    model.panoptic_fusion_head.test_cfg.instance_on = False
    with pytest.raises(CannotExportError, match='only instances can be exported, no panoptic segmentation'):
        DeployableDetector(model)
    model.panoptic_head.__class__ = MaskFormerHead
    with pytest.raises(CannotExportError, match='Mask2Former with MaskFormerHead and MaskFormerFusionHead cannot be'):
        DeployableDetector(model)
    model = build('mask-rcnn')
    model.test_cfg.rcnn.mask_thr_binary = -1
    with pytest.raises(CannotExportError, match='only binary masks can be exported'):
        DeployableDetector(model)
    with pytest.raises(CannotExportError, match='Linear cannot be exported; expected a detection transformer'):
        DeployableDetector(nn.Linear(1, 1))
    model = build('retinanet')
    model.bbox_head.test_cfg.nms.type = 'soft_nms'
    with pytest.raises(CannotExportError, match="only dict\\(type='nms', iou_threshold=…\\)"):
        DeployableDetector(model)


def test_the_format_torch_has_a_fixed_batch_or_a_fixed_size(build):
    detector = DeployableDetector(build('detr'))
    with pytest.raises(
        CannotExportError, match='a file for images of any size has a fixed one: choose it with --batch'
    ):
        make_card(detector, 'torch', batch=None, dynamic=True)
    assert make_card(detector, 'torch', batch=1, dynamic=True).inputs['images']['shape'] == [1, None, None, 3]
    assert make_card(detector, 'torch', batch=None).inputs['images']['shape'] == [None, 72, 96, 3]


def test_a_stock_transformer_that_needs_a_mask_of_padding(build):
    model = build('dino')
    model.data_preprocessor.pad_size_divisor = 32
    detector = DeployableDetector(model)
    assert make_card(detector, 'onnx', size=(64, 96)).size == (64, 96)
    with pytest.raises(CannotExportError, match='choose --size with sides that are multiples of 32'):
        make_card(detector, 'onnx', size=(75, 96))
    with pytest.raises(CannotExportError, match='choose --size with sides that are multiples of 32'):
        make_card(detector, 'onnx', dynamic=True)


def test_format_and_suffix_belong_together(build, tmp_path):
    detector = DeployableDetector(build('detr')).eval()
    with pytest.raises(ValueError, match=r'the format onnx is written to a \.onnx file, got model\.xml'):
        write(detector, make_card(detector, 'onnx'), Path('model.xml'))
