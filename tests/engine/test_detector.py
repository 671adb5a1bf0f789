"""The Python interface: what goes in, what comes out, and one sentence for what is refused."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from msda_plugin import Detector
from msda_plugin.engine.detector import DetectionResult
from msda_plugin.engine.inference import predict, read_image
from msda_plugin.engine.model_zoo import find_model
from msda_plugin.registry import MODELS
from msda_plugin.tools.shape_images import CLASSES, draw_image

ROOT = Path(__file__).parents[2]
LOADER = """
default_scope = 'mmdet'
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
"""


def save(cfg, path, classes=CLASSES, initialized=False):
    """Write the checkpoint of an untrained model as MMEngine does, with its config."""
    init_default_scope('mmdet')
    text = cfg.pretty_text  # MMDetection changes the config of a model that it builds
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    if initialized:
        model.init_weights()
    for parameter in model.parameters():  # makes scores and boxes differ
        parameter.data += 0.02 * torch.randn(parameter.shape)
    meta = dict(cfg=text, dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


def with_loader(text):
    return Config.fromstring(text + LOADER, '.py')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    cfg = Config.fromfile(find_model('deformable-detr-two-stage_shunted-nano').config)
    cfg.merge_from_dict(dict(model=dict(num_queries=20, test_cfg=dict(max_per_img=20))))
    return save(with_loader(cfg.pretty_text), tmp_path_factory.mktemp('run') / 'best_epoch_1.pth')


@pytest.fixture(scope='module')
def detector(checkpoint):
    return Detector(checkpoint, device='cpu')


@pytest.fixture
def photo(tmp_path):
    """A file of 96x64 pixels and its content."""
    pixels = draw_image(3, (96, 64))[0]
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png', pixels


def same(first, second):
    np.testing.assert_array_equal(first.boxes, second.boxes)
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.labels, second.labels)
    return True


# ---- the package ----------------------------------------------------------------------------------------------------
def test_import_stays_light():
    code = 'import sys, msda_plugin; from msda_plugin import Detector; print([m for m in sys.modules if m in {}])'
    heavy = ('torch', 'mmcv', 'mmengine', 'mmdet', 'cv2', 'PIL', 'matplotlib', 'supervision')
    done = subprocess.run([sys.executable, '-c', code.format(heavy)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize('page', ['README.md', 'docs/api/detector.md'])
def test_code_of_the_documentation_runs(page, checkpoint, photo, tmp_path, monkeypatch):
    (tmp_path / 'work_dirs').mkdir()
    (tmp_path / 'work_dirs' / 'shapes').symlink_to(checkpoint.parent)
    Image.open(photo[0]).save(tmp_path / 'photo.jpg')
    writer = cv2.VideoWriter(str(tmp_path / 'clip.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 5, (96, 64))
    writer.write(photo[1])
    writer.release()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert any('Detector(' in block for block in blocks)
    namespace = {}
    for block in blocks:
        if 'import supervision' not in block or find_spec('supervision'):
            exec(compile(block, page, 'exec'), namespace)
    assert (tmp_path / 'out.jpg').is_file()


# ---- results --------------------------------------------------------------------------------------------------------
def test_equals_predict_bit_for_bit(detector, photo):
    result = detector(photo[0], score_threshold=0)
    expected = predict(detector.model, read_image(photo[0])).pred_instances.numpy()
    np.testing.assert_array_equal(result.boxes, expected.bboxes)
    np.testing.assert_array_equal(result.scores, expected.scores)
    np.testing.assert_array_equal(result.labels, expected.labels)
    assert result.boxes.shape == (20, 4) and len(result) == 20 and result.path == str(photo[0])
    assert (result.boxes.dtype, result.scores.dtype, result.labels.dtype) == (np.float32, np.float32, np.int64)
    assert result.names.tolist() == [CLASSES[label] for label in expected.labels]
    assert (np.diff(result.scores) <= 0).all() and result.masks is None
    assert detector.class_names == tuple(CLASSES) and detector.device == torch.device('cpu')
    np.testing.assert_array_equal(result.image, photo[1])


def test_threshold(detector, photo):
    scores = detector(photo[0], 0).scores
    result = detector(photo[0], score_threshold=float(scores[4]))
    assert len(result) == (scores >= scores[4]).sum() < 20
    nothing = detector(photo[0], score_threshold=1)
    assert len(nothing) == 0 and nothing and nothing.boxes.shape == (0, 4) and nothing.names.shape == (0,)
    assert nothing.to_coco(1) == [] and repr(nothing) == '<DetectionResult: no detections>'
    assert nothing.draw().shape == (427, 640, 3)


def test_coco(detector, photo):
    result = detector(photo[0], score_threshold=0)
    first = result.to_coco(image_id=7)[0]
    x1, y1, x2, y2 = result.boxes[0].astype(float)
    assert first['image_id'] == 7 and first['category_id'] == result.labels[0] + 1
    np.testing.assert_allclose(first['bbox'], [x1, y1, x2 - x1, y2 - y1], atol=0.0051)
    assert first['score'] == pytest.approx(result.scores[0], abs=5.1e-5)
    assert result.to_coco(7, [10, 20, 30, 40, 50, 60])[0]['category_id'] == (result.labels[0] + 1) * 10


def test_save(detector, photo, tmp_path):
    result = detector(photo[0], score_threshold=0)
    result.save(tmp_path / 'new' / 'out.jpg')
    result.save(tmp_path / 'out.png')
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / 'out.png')), result.draw())
    assert Image.open(tmp_path / 'new' / 'out.jpg').size == (640, 427)  # small images are enlarged
    for name in ('out', 'out.xyz'):
        with pytest.raises(ValueError, match='choose a name such as out.jpg'):
            result.save(tmp_path / name)


def test_supervision(detector, photo):
    supervision = pytest.importorskip('supervision', reason='supervision is not installed; pip install supervision')
    result = detector(photo[0], score_threshold=0)
    detections = result.to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 20
    np.testing.assert_array_equal(detections.xyxy, result.boxes)
    np.testing.assert_array_equal(detections.confidence, result.scores)
    np.testing.assert_array_equal(detections.class_id, result.labels)
    np.testing.assert_array_equal(detections['class_name'], result.names)
    annotated = supervision.BoxAnnotator().annotate(result.image.copy(), detections)
    assert (annotated != result.image).any()
    assert len(detector(photo[0], score_threshold=1).to_supervision()) == 0


def test_without_supervision(detector, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, 'supervision', None)
    with pytest.raises(ImportError, match='to_supervision.. needs supervision .*pip install supervision'):
        detector(photo[0]).to_supervision()


# ---- images ---------------------------------------------------------------------------------------------------------
def test_kinds_of_images(detector, photo):
    path, pixels = photo
    expected = detector(path, 0)
    alpha = np.dstack([pixels, pixels[..., :1]])
    assert same(detector(str(path), 0), expected)
    assert same(detector(pixels, 0), expected) and detector(pixels, 0).path is None
    assert same(detector(pixels[..., ::-1], 0, channel_order='bgr'), expected)
    assert same(detector(cv2.imread(str(path)), 0, channel_order='bgr'), expected)
    assert not np.array_equal(detector(pixels[..., ::-1], 0).scores, expected.scores)
    assert same(detector(alpha, 0), expected)
    assert same(detector(alpha[..., [2, 1, 0, 3]], 0, channel_order='bgr'), expected)
    assert same(detector(Image.fromarray(pixels), 0), expected)
    assert same(detector(Image.open(path), 0), expected)
    assert same(detector(Image.fromarray(alpha), 0), expected)
    gray = pixels[..., 0]
    expected = detector(np.dstack([gray] * 3), 0)
    for image in (gray, gray[..., None], Image.fromarray(gray)):
        assert same(detector(image, 0), expected)


def test_formats_of_files_and_pil_images_agree(detector, photo, tmp_path):
    """16 bits, palettes, and the orientation in EXIF data."""
    image = Image.fromarray(photo[1])
    sixteen = np.asarray(image.convert('L')).astype(np.uint16) * 257 + 3
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees when shown
    image.save(tmp_path / 'turned.png', exif=exif)
    Image.fromarray(sixteen).save(tmp_path / 'sixteen.png')
    image.convert('P').save(tmp_path / 'palette.png')
    image.convert('1').save(tmp_path / 'bilevel.png')
    for name in ('turned', 'sixteen', 'palette', 'bilevel'):
        path = tmp_path / f'{name}.png'
        assert same(detector(path, 0), detector(Image.open(path), 0)), name
    turned = detector(tmp_path / 'turned.png', 0)
    assert turned.image.shape == (96, 64, 3)
    assert same(turned, detector(np.rot90(photo[1], -1), 0))


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (33, 31)])
def test_odd_sizes(detector, size):
    result = detector(np.zeros((*size, 3), np.uint8), 0)
    assert len(result) and np.isfinite(result.boxes).all()
    result.draw()


@pytest.mark.parametrize(
    'image, error, message',
    [
        (np.zeros((4, 4, 3), np.uint16), ValueError, r'an array \(4, 4, 3\) uint16; expected .* uint8'),
        (np.zeros((4, 4, 3), np.float32), ValueError, 'float32; expected'),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r'\(4, 4, 2\) uint8; expected'),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, 'several images are a list'),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r'\(0, 4, 3\) uint8; expected'),
        (Image.fromarray(np.zeros((4, 4), np.float32)), ValueError, 'mode F.; scale it to 8 bits'),
        (torch.zeros(3, 4, 4), TypeError, 'an image is a Tensor; expected a path, a NumPy array'),
        (None, TypeError, 'an image is a NoneType'),
        (True, TypeError, 'an image is a bool'),
        ([0], TypeError, 'an image is a int'),
        ('none.jpg', FileNotFoundError, 'none.jpg does not exist'),
    ],
)
def test_images_that_are_refused(detector, image, error, message):
    with pytest.raises(error, match=message):
        detector(image)


def test_broken_files_are_refused(detector, photo, tmp_path):
    (tmp_path / 'empty.jpg').touch()
    (tmp_path / 'text.png').write_text('not an image')
    for name in ('empty.jpg', 'text.png'):
        with pytest.raises(ValueError, match=f'{name} cannot be read as an image'):
            detector([photo[0], tmp_path / name])
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'cut.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'cut.png').read_bytes()[:5000])
    with pytest.raises(ValueError, match='the PIL image cannot be read'):
        detector(Image.open(tmp_path / 'cut.png'))


def test_arguments_that_are_refused(detector, photo):
    with pytest.raises(ValueError, match='score_threshold must be from 0 to 1, got 30'):
        detector(photo[0], 30)
    with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
        detector(photo[0], batch_size=0)
    with pytest.raises(ValueError, match="channel_order must be 'rgb' or 'bgr', got 'RGB'"):
        detector(photo[0], channel_order='RGB')


# ---- several images -------------------------------------------------------------------------------------------------
def test_lists_are_batched(detector, photo, tmp_path, monkeypatch):
    images = [draw_image(index, (96, 64))[0] for index in range(4)] + [photo[0], Image.fromarray(photo[1])]
    batches, forward = [], detector.model.forward
    monkeypatch.setattr(
        detector.model,
        'forward',
        lambda inputs, *args, **kw: batches.append(len(inputs)) or forward(inputs, *args, **kw),
    )
    results = detector(images, 0, batch_size=4)
    assert batches == [4, 2] and [result.path for result in results] == [None] * 4 + [str(photo[0]), None]
    for image, result in zip(images, results, strict=True):
        alone = detector(image, 0)
        np.testing.assert_allclose(result.scores, alone.scores, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(result.boxes[:3], alone.boxes[:3], rtol=1e-4, atol=1e-3)
    assert detector([]) == [] and len(detector((photo[1],), 0)) == 1


def test_folder(detector, photo, tmp_path):
    (tmp_path / 'more').mkdir()
    (tmp_path / '.hidden').mkdir()
    for name in ('more/B.JPG', 'more/a.bmp', '.hidden/c.png'):
        Image.fromarray(photo[1]).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('not an image')
    results = detector(tmp_path, 0)
    assert [Path(result.path).name for result in results] == ['B.JPG', 'a.bmp', 'photo.png']
    (tmp_path / 'nothing').mkdir()
    with pytest.raises(FileNotFoundError, match='nothing contains no image'):
        detector(tmp_path / 'nothing')


@pytest.fixture
def clip(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / 'clip.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 64))
    for index in range(5):
        writer.write(draw_image(index, (96, 64))[0][..., ::-1])
    writer.release()
    return tmp_path / 'clip.avi'


def test_video_gives_a_generator(detector, clip):
    results = detector(clip, 0, batch_size=2)
    assert iter(results) is results
    results = list(results)
    assert len(results) == 5 and all(result.path == str(clip) for result in results)
    reader = cv2.VideoCapture(str(clip))
    for result in results:
        frame = reader.read()[1]
        np.testing.assert_array_equal(result.image, frame[..., ::-1])
        alone = detector(frame, 0, channel_order='bgr')
        np.testing.assert_allclose(result.scores, alone.scores, rtol=1e-4, atol=1e-6)
    (clip.parent / 'broken.mp4').write_text('not a video')
    with pytest.raises(ValueError, match='broken.mp4 cannot be read; convert it to MP4'):
        detector(clip.parent / 'broken.mp4')


def test_camera_runs_frame_by_frame(detector, clip, monkeypatch):
    read, real = [], cv2.VideoCapture

    class Camera:
        def __init__(self, index):
            assert index == 0
            self.reader = real(str(clip))

        def read(self):
            read.append(1)
            return self.reader.read()

    monkeypatch.setattr(cv2, 'VideoCapture', Camera)
    results = detector(0, 0)
    assert next(results).path is None and len(read) == 1  # no frame is waited for before the first result
    assert len(list(results)) == 4
    monkeypatch.setattr(cv2, 'VideoCapture', real)
    with pytest.raises(ValueError, match='the camera 9999 cannot be read'):
        detector(9999)


# ---- options --------------------------------------------------------------------------------------------------------
def test_sources(detector, checkpoint, photo, tmp_path):
    expected = detector(photo[0], 0)
    cfg = with_loader(Config.fromfile(find_model('deformable-detr-two-stage_shunted-nano').config).pretty_text)
    cfg.merge_from_dict(dict(model=dict(num_queries=10, test_cfg=dict(max_per_img=10))))
    cfg.dump(tmp_path / 'ten.py')
    assert same(Detector(checkpoint.parent, device='cpu')(photo[0], 0), expected)
    assert detector.config is None and detector.checkpoint == str(checkpoint)
    for given in (
        Detector(tmp_path / 'ten.py', checkpoint=checkpoint, device='cpu'),
        Detector(checkpoint, config=tmp_path / 'ten.py', device='cpu'),
    ):
        assert given.config == str(tmp_path / 'ten.py') and given.model.num_queries == 10
    with pytest.raises(ValueError, match="unknown model 'rtdetrr'"):
        Detector('rtdetrr')
    with pytest.raises(ValueError, match='has no usable|contains no config'):
        torch.save(dict(weight=torch.zeros(1)), tmp_path / 'bare.pth')
        (tmp_path / 'ten.py').unlink()
        Detector(tmp_path / 'bare.pth')


def test_two_configs_next_to_a_checkpoint(checkpoint, tmp_path):
    """The checkpoint says which one made it."""
    (tmp_path / 'best.pth').write_bytes(checkpoint.read_bytes())
    for name in ('one.py', 'two.py'):
        (tmp_path / name).write_text('raise RuntimeError("this file was executed")')
    assert Detector(tmp_path, device='cpu').model.num_queries == 20


def test_nms(checkpoint, photo):
    from mmcv.ops import batched_nms

    plain = Detector(checkpoint, device='cpu')(photo[0], 0)
    strict = Detector(checkpoint, device='cpu', nms=0.05)
    result = strict(photo[0], 0)
    boxes, scores, labels = (torch.from_numpy(array) for array in (plain.boxes, plain.scores, plain.labels))
    kept = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.05))[1].numpy()
    assert 0 < len(kept) < 20
    np.testing.assert_array_equal(result.boxes, plain.boxes[kept])
    np.testing.assert_array_equal(result.labels, plain.labels[kept])
    assert same(Detector(checkpoint, device='cpu', nms=False)(photo[0], 0), plain)
    assert Detector(checkpoint, device='cpu', nms=True)._nms == 0.7


def test_nms_of_the_config(checkpoint, photo, tmp_path):
    """A suppression that the model has is changed, so that the model applies it once."""
    cfg = Config.fromstring(torch.load(checkpoint, weights_only=True)['meta']['cfg'], '.py')
    cfg.model.test_cfg.nms = dict(type='nms', iou_threshold=0.05)
    cfg.dump(tmp_path / 'nms.py')
    plain = Detector(checkpoint, device='cpu')(photo[0], 0)
    strict = Detector(checkpoint, device='cpu', nms=0.05)(photo[0], 0)

    def made(nms):
        detector = Detector(checkpoint, config=tmp_path / 'nms.py', device='cpu', nms=nms)
        assert detector._nms is None
        return detector(photo[0], 0)

    assert same(made(None), strict) and same(made(True), strict) and same(made(0.05), strict)
    assert same(made(False), plain) and len(strict) < len(made(0.5)) <= 20


def test_image_size(checkpoint, photo):
    detector = Detector(checkpoint, device='cpu', image_size=(128, 32))
    assert predict(detector.model, photo[1]).img_shape == (32, 48)
    detector = Detector(checkpoint, device='cpu', image_size=128)
    assert predict(detector.model, photo[1]).img_shape == (85, 128)


def test_half_precision_is_close(detector, checkpoint, photo):
    half = Detector(checkpoint, device='cpu', half=True)(photo[0], 0)
    full = detector(photo[0], 0)
    assert half.boxes.dtype == half.scores.dtype == np.float32
    assert not np.array_equal(half.scores, full.scores)
    np.testing.assert_allclose(half.scores, full.scores, atol=0.05)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(nms=0.0), 'nms must be True, False, or an IoU threshold above 0 and up to 1, got 0.0'),
        (dict(nms=2), 'nms must be True'),
        (dict(image_size=(64, 0)), r'image_size must be a side or \(width, height\) in pixels, got \(64, 0\)'),
        (dict(image_size=(64, 64, 3)), 'image_size must be'),
        (dict(device='gpu'), "device must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        (dict(device='cuda:99'), "the device is 'cuda:99', but torch sees"),
    ],
    ids=str,
)
def test_options_that_are_refused(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        Detector(checkpoint, **options)


def test_class_names_must_fit(checkpoint, tmp_path):
    loaded = torch.load(checkpoint, weights_only=True)
    loaded['meta']['dataset_meta'] = dict(classes=('one',))
    torch.save(loaded, tmp_path / 'one.pth')
    with pytest.raises(ValueError, match='the model predicts label [1-5], but has only 1 class names'):
        Detector(tmp_path / 'one.pth', device='cpu')(np.zeros((64, 64, 3), np.uint8), 0)


# ---- stock models ---------------------------------------------------------------------------------------------------
RESNET = "dict(type='ResNet', depth=18, base_channels=8, init_cfg=None)"
RETINANET = f"""
model = dict(type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone={RESNET}, neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    bbox_head=dict(type='RetinaHead', num_classes=6, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
            strides=[4, 8, 16, 32])),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=50))
"""
MASK_RCNN = """
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
model = dict(backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16), rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=6),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=6)),
    test_cfg=dict(rpn=dict(max_per_img=20, nms_pre=50), rcnn=dict(score_thr=0.0, max_per_img=10)))
"""
MASK2FORMER = """
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
model = dict(backbone=dict(depth=18, base_channels=8, init_cfg=None),
    panoptic_head=dict(in_channels=[8, 16, 32, 64], feat_channels=32, out_channels=32, num_things_classes=6,
        num_queries=10,
        pixel_decoder=dict(encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=dict(embed_dims=32),
            ffn_cfg=dict(embed_dims=32, feedforward_channels=32))), positional_encoding=dict(num_feats=16)),
        positional_encoding=dict(num_feats=16),
        transformer_decoder=dict(num_layers=3, layer_cfg=dict(self_attn_cfg=dict(embed_dims=32),
            cross_attn_cfg=dict(embed_dims=32), ffn_cfg=dict(embed_dims=32, feedforward_channels=32))),
        loss_cls=dict(class_weight=[1.0] * 6 + [0.1])),
    panoptic_fusion_head=dict(num_things_classes=6), test_cfg=dict(max_per_image=10))
"""


def stock(text, tmp_path):
    (tmp_path / 'stock.py').write_text(text)
    model = Config.fromfile(tmp_path / 'stock.py').model
    (tmp_path / 'stock.py').unlink()
    cfg = Config(dict(model=model, **Config.fromstring(LOADER, '.py').to_dict()))
    return save(cfg, tmp_path / 'stock.pth')


def test_nms_of_a_stock_detector(photo, tmp_path):
    checkpoint = stock(RETINANET, tmp_path)
    boxes = {nms: len(Detector(checkpoint, device='cpu', nms=nms)(photo[0], 0)) for nms in (None, True, 0.1, False)}
    assert boxes[None] == boxes[True] and 0 < boxes[0.1] < boxes[None] < boxes[False]


@pytest.mark.parametrize('text', [MASK_RCNN, MASK2FORMER], ids=['Mask R-CNN', 'Mask2Former'])
def test_masks(text, photo, tmp_path):
    from pycocotools.mask import decode

    detector = Detector(stock(text, tmp_path), device='cpu', nms=0.9)
    results = detector([photo[1], photo[1][:40]], 0)
    for result, (height, width) in zip(results, ((64, 96), (40, 96)), strict=True):
        count = len(result)
        assert count and result.boxes.shape == (count, 4) and (np.diff(result.scores) <= 0).all()
        assert result.masks.shape == (count, height, width) and result.masks.dtype == bool
        np.testing.assert_array_equal(decode(result.to_coco(1)[0]['segmentation']), result.masks[0])
    results[0].save(tmp_path / 'out.jpg')


def test_accelerate(tiny_stock_config, photo, tmp_path):
    cfg = Config.fromfile(tiny_stock_config)
    cfg = Config(dict(model=cfg.model, **Config.fromstring(LOADER, '.py').to_dict()))
    # MMDetection leaves some parameters uninitialized before init_weights.
    checkpoint = save(cfg, tmp_path / 'stock.pth', initialized=True)
    plain, fast = (
        Detector(checkpoint, device='cpu', accelerate=accelerate, image_size=256) for accelerate in (False, True)
    )
    kinds = [
        {type(module).__module__.split('.')[0] for module in model.modules()} for model in (plain.model, fast.model)
    ]
    assert 'msda_plugin' not in kinds[0] and 'msda_plugin' in kinds[1]
    np.testing.assert_allclose(fast(photo[0], 0).scores, plain(photo[0], 0).scores, rtol=1e-4, atol=1e-6)


def test_a_model_without_objects_is_refused(detector):
    from mmdet.structures import DetDataSample

    with pytest.raises(ValueError, match='DeformableDETR predicts no objects with scores'):
        detector._result(DetDataSample(text='a'), 0, None, None)


def test_result_is_public():
    result = DetectionResult(np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), ('cat',))
    assert repr(result) == '<DetectionResult: 1 cat>' and result.names.tolist() == ['cat']
