"""The demo command: inputs, output files and messages for images, folders and videos."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image
from pycocotools.coco import COCO

from msda_plugin.engine.detector import Detector
from msda_plugin.engine.model_zoo import find_model
from msda_plugin.registry import MODELS
from msda_plugin.tools.demo import find_sources, main
from msda_plugin.tools.shapes import CLASSES, draw_image

DATA = """
default_scope = 'mmdet'
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
"""


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """An untrained detector, in a work dir like that of `make train`."""
    folder = tmp_path_factory.mktemp('run') / 'work_dirs' / 'shapes'
    folder.mkdir(parents=True)
    cfg = Config.fromfile(find_model('deformable-detr-two-stage_shunted-nano').config)
    cfg.merge_from_dict(dict(model=dict(num_queries=10, test_cfg=dict(max_per_img=10))))
    (folder / 'config.py').write_text(cfg.pretty_text + DATA)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=CLASSES))), folder / 'epoch_1.pth'
    )
    return folder / 'epoch_1.pth'


@pytest.fixture
def images(tmp_path):
    """A folder with images of several formats and a text file."""
    folder = tmp_path / 'photos'
    (folder / 'more').mkdir(parents=True)
    image = draw_image(3, (96, 64))[0]
    Image.fromarray(image).save(folder / 'a.jpg')
    Image.fromarray(image).save(folder / 'a.png')
    Image.fromarray(image).save(folder / 'a.bmp')
    Image.fromarray(image[..., 0]).save(folder / 'more' / 'gray.png')
    Image.fromarray(np.dstack([image, image[..., :1]])).save(folder / 'more' / 'alpha.png')
    turned = Image.fromarray(image)
    exif = turned.getexif()
    exif[0x0112] = 6  # portrait orientation
    turned.save(folder / 'turned.jpg', exif=exif)
    (folder / 'notes.txt').write_text('not an image')
    return folder


def run(checkpoint, *args):
    return main([*map(str, args), '--checkpoint', str(checkpoint), '--score-thr', '0'])


def sentence(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in argv])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert 'Traceback' not in message
    return message


def test_folder_of_images(checkpoint, images, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run(checkpoint, images, '--out', out) == 0
    assert {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()} == {
        'a.jpg',
        'a.png',
        'a.bmp.png',
        'turned.jpg',
        'more/gray.png',
        'more/alpha.png',
        'results.json',
        'images.json',
    }
    assert '6 images drawn' in capsys.readouterr().out

    coco = COCO(str(out / 'images.json'))
    found = coco.loadRes(str(out / 'results.json'))  # pycocotools reads them
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    sizes = {
        image['file_name'].rsplit('/', 1)[-1]: (image['width'], image['height'])
        for image in coco.loadImgs(coco.getImgIds())
    }
    assert sizes['a.bmp'] == sizes['gray.png'] == sizes['alpha.png'] == (96, 64) and sizes['turned.jpg'] == (64, 96)
    assert len(found.getAnnIds()) == 6 * 10
    for annotation in found.loadAnns(found.getAnnIds()):
        (image,) = coco.loadImgs(annotation['image_id'])
        x, y, w, h = annotation['bbox']
        assert 0 <= x <= x + w <= image['width'] + 0.02 and 0 <= y <= y + h <= image['height'] + 0.02
        assert 0 <= annotation['score'] <= 1 and annotation['category_id'] in coco.getCatIds()
    # The same pixels in another format give the same boxes, and something is drawn.
    boxes = {
        name: [a['bbox'] for a in found.loadAnns(found.getAnnIds(imgIds=[image['id']]))]
        for image in coco.dataset['images']
        for name in [image['file_name'].rsplit('/', 1)[-1]]
    }
    assert boxes['a.png'] == boxes['a.bmp'] and boxes['a.png'] != boxes['turned.jpg']
    drawn, plain = (np.array(Image.open(folder / 'a.png').resize((640, 427))) for folder in (out, images))
    assert (drawn != plain).mean() > 0.01


def test_unreadable_files_are_skipped(checkpoint, images, tmp_path, capsys):
    (images / 'empty.jpg').touch()
    (images / 'text.png').write_text('not an image')
    shutil.copy(images / 'a.jpg', images / 'upper.JPG')
    assert run(checkpoint, images, '--out', tmp_path / 'out') == 1
    said = capsys.readouterr()
    assert '7 images drawn' in said.out and (tmp_path / 'out/upper.JPG').is_file()
    assert [line.rsplit('/', 1)[-1].split()[0] for line in said.err.splitlines() if 'skipped' in line] == [
        'empty.jpg',
        'text.png',
    ]


def test_duplicate_names(tmp_path):
    for folder in ('x', 'y'):
        (tmp_path / folder).mkdir()
        for name in ('a.jpg', 'b.tif', 'clip.avi'):
            (tmp_path / folder / name).touch()
    sources = [tmp_path / 'x', tmp_path / 'y', tmp_path / 'x' / 'a.jpg']
    targets = find_sources(sources, tmp_path / 'out')
    assert [target.name for target in targets.values()] == [
        'a.jpg',
        'b.tif.png',
        'clip.avi.mp4',
        'a_2.jpg',
        'b.tif_2.png',
        'clip.avi_2.mp4',
    ]
    (tmp_path / 'x' / 'out').mkdir()
    (tmp_path / 'x' / 'out' / 'a.jpg').touch()  # from an earlier run
    assert len(find_sources([tmp_path / 'x'], tmp_path / 'x' / 'out')) == 3


def test_no_box_above_threshold(checkpoint, images, tmp_path, capsys):
    out = tmp_path / 'out'
    assert main([str(images / 'a.jpg'), '--checkpoint', str(checkpoint), '--out', str(out), '--score-thr', '1']) == 0
    assert 'none with a score of at least 1.0; try a lower --score-thr' in capsys.readouterr().out
    assert json.loads((out / 'results.json').read_text()) == []
    assert max(Image.open(out / 'a.jpg').size) == 640  # small images are enlarged


def test_default_checkpoint_is_that_of_make_train(checkpoint, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parents[2])
    assert main([str(images / 'a.jpg'), '--out', str(tmp_path / 'out')]) == 0
    assert 'work_dirs/shapes/epoch_1.pth: 6 classes, circle' in capsys.readouterr().out


def test_no_checkpoint(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = sentence([images / 'a.jpg'], capsys)
    assert 'no checkpoint is given' in message and 'make train' in message and '--checkpoint' in message


def test_invalid_arguments(checkpoint, images, tmp_path, capsys):
    named = ['--checkpoint', checkpoint, '--out', tmp_path / 'out']
    assert 'none.jpg does not exist' in sentence([tmp_path / 'none.jpg', *named], capsys)
    (tmp_path / 'nothing').mkdir()
    assert 'contains no image and no video' in sentence([tmp_path / 'nothing', *named], capsys)
    assert 'a.jpg would be overwritten' in sentence(
        [images / 'a.jpg', '--checkpoint', checkpoint, '--out', images], capsys
    )
    assert '--score-thr must be from 0 to 1, got 30.0' in sentence([images, *named, '--score-thr', '30'], capsys)
    assert '--batch-size must be at least 1, got 0' in sentence([images, *named, '--batch-size', '0'], capsys)
    assert "'big' is not a size; expected a side" in sentence([images, *named, '--image-size', 'big'], capsys)
    assert '--device must be cpu, cuda or cuda:N' in sentence([images, *named, '--device', 'gpu'], capsys)
    assert 'cuda:99, but torch' in sentence([images, *named, '--device', 'cuda:99'], capsys)
    cut = checkpoint.with_name('cut.pth')
    cut.write_bytes(checkpoint.read_bytes()[:20_000])
    message = sentence([images, '--checkpoint', cut, '--config', checkpoint.with_name('config.py')], capsys)
    cut.unlink()
    assert 'cut.pth' in message


def test_options_reach_the_detector(checkpoint, images, tmp_path, monkeypatch):
    made = []

    class Recorded(Detector):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(kwargs)

        def __call__(self, *args, **kwargs):
            made.append(kwargs)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr('msda_plugin.tools.demo.Detector', Recorded)
    options = ['--no-nms', '--image-size', '64x96', '--half', '--batch-size', '2', '--device', 'cpu']
    assert run(checkpoint, images / 'a.jpg', images / 'a.png', images / 'a.bmp', '--out', tmp_path, *options) == 0
    assert made == [
        dict(config=None, checkpoint=str(checkpoint), device='cpu', half=True, nms=False, image_size=(64, 96)),
        dict(score_threshold=0.0, batch_size=2),
        dict(score_threshold=0.0, batch_size=2),
    ]


# ---- videos ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def clip(tmp_path):
    path = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 64))
    for index in range(4):
        writer.write(draw_image(index, (96, 64))[0][..., ::-1])
    writer.release()
    return path


def test_video(checkpoint, clip, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run(checkpoint, clip, '--out', out) == 0
    assert '4 frames of 1 video drawn' in capsys.readouterr().out
    results = json.loads((out / 'clip.avi.mp4.json').read_text())
    assert [result['image_id'] for result in results] == [frame for frame in range(4) for _ in range(10)]
    (video,) = json.loads((out / 'images.json').read_text())['videos']
    assert (video['num_frames'], video['frames_per_second'], video['width'], video['height']) == (4, 5.0, 96, 64)
    reader = cv2.VideoCapture(str(out / 'clip.avi.mp4'))
    frames = []
    while (read := reader.read())[0]:
        frames.append(read[1])
    assert len(frames) == 4 and frames[0].shape == (426, 640, 3) and reader.get(cv2.CAP_PROP_FPS) == 5


def test_unreadable_video(checkpoint, images, tmp_path, capsys):
    (images / 'broken.mp4').write_text('not a video')
    assert run(checkpoint, images / 'broken.mp4', images / 'a.jpg', '--out', tmp_path / 'out') == 1
    said = capsys.readouterr()
    assert 'broken.mp4 cannot be read' in said.err and '1 image drawn' in said.out
    assert not (tmp_path / 'out/broken.mp4').exists()


def test_ctrl_c_keeps_results_so_far(checkpoint, clip, images, tmp_path, monkeypatch, capsys):
    from msda_plugin import __main__

    real, calls = Detector._detect, []

    def detect(self, images, *args, **kwargs):
        calls.append(len(images))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, images, *args, **kwargs)

    monkeypatch.setattr(Detector, '_detect', detect)
    out = tmp_path / 'out'
    argv = [images / 'a.jpg', clip, '--checkpoint', checkpoint, '--score-thr', '0', '--out', out, '--batch-size', '1']
    assert __main__.main(['demo', *map(str, argv)]) == 130
    assert 'stopped by Ctrl-C' in capsys.readouterr().err
    assert len(json.loads((out / 'results.json').read_text())) == 10
    assert {r['image_id'] for r in json.loads((out / 'clip.avi.mp4.json').read_text())} == {0, 1}
