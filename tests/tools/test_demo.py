"""Boxes on images, folders and videos: what is read, what is written, what is said."""

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

from msda_plugin.registry import MODELS
from msda_plugin.tools.custom_data.config import find_model
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
    """A detector that has learned nothing, in a work dir like that of `make train`."""
    folder = tmp_path_factory.mktemp('run') / 'work_dirs' / 'shapes'
    folder.mkdir(parents=True)
    cfg = Config.fromfile(str(find_model('deformable-detr-two-stage_shunted-nano')))
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
def pictures(tmp_path):
    """A folder of images of every kind, and of files that are none."""
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
    exif[0x0112] = 6  # the camera was held upright
    turned.save(folder / 'turned.jpg', exif=exif)
    (folder / 'notes.txt').write_text('not an image, and not looked at')
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


def test_a_folder_of_images(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run(checkpoint, pictures, '--out', out) == 0
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
    found = coco.loadRes(str(out / 'results.json'))  # pycocotools takes them
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
    # The same pixels in another file give the same boxes, and something is drawn.
    boxes = {
        name: [a['bbox'] for a in found.loadAnns(found.getAnnIds(imgIds=[image['id']]))]
        for image in coco.dataset['images']
        for name in [image['file_name'].rsplit('/', 1)[-1]]
    }
    assert boxes['a.png'] == boxes['a.bmp'] and boxes['a.png'] != boxes['turned.jpg']
    drawn, plain = (np.array(Image.open(folder / 'a.png').resize((640, 427))) for folder in (out, pictures))
    assert (drawn != plain).mean() > 0.01


def test_files_that_cannot_be_read_are_said_and_the_others_drawn(checkpoint, pictures, tmp_path, capsys):
    (pictures / 'empty.jpg').touch()
    (pictures / 'text.png').write_text('not an image')
    shutil.copy(pictures / 'a.jpg', pictures / 'upper.JPG')
    assert run(checkpoint, pictures, '--out', tmp_path / 'out') == 1
    said = capsys.readouterr()
    assert '7 images drawn' in said.out and (tmp_path / 'out/upper.JPG').is_file()
    assert [line.rsplit('/', 1)[-1].split()[0] for line in said.err.splitlines() if 'skipped' in line] == [
        'empty.jpg',
        'text.png',
    ]


def test_names_that_would_collide(tmp_path):
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
    (tmp_path / 'x' / 'out' / 'a.jpg').touch()  # of an earlier run
    assert len(find_sources([tmp_path / 'x'], tmp_path / 'x' / 'out')) == 3


def test_a_score_that_nothing_reaches(checkpoint, pictures, tmp_path, capsys):
    assert (
        main(
            [
                str(pictures / 'a.jpg'),
                '--checkpoint',
                str(checkpoint),
                '--out',
                str(tmp_path / 'out'),
                '--score-thr',
                '1',
            ]
        )
        == 0
    )
    assert 'none with a score of 1.0 or more; try a lower --score-thr' in capsys.readouterr().out
    assert json.loads((tmp_path / 'out/results.json').read_text()) == []
    assert max(Image.open(tmp_path / 'out/a.jpg').size) == 640  # small ones are enlarged


def test_the_checkpoint_of_the_main_job_is_the_default(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parents[2])
    assert main([str(pictures / 'a.jpg'), '--out', str(tmp_path / 'out')]) == 0
    assert 'work_dirs/shapes/epoch_1.pth: 6 classes, circle' in capsys.readouterr().out


def test_no_checkpoint_at_all(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = sentence([pictures / 'a.jpg'], capsys)
    assert 'no checkpoint is given' in message and 'make train' in message and '--checkpoint' in message


def test_mistakes_end_in_a_sentence(checkpoint, pictures, tmp_path, capsys):
    named = ['--checkpoint', checkpoint, '--out', tmp_path / 'out']
    assert 'none.jpg does not exist' in sentence([tmp_path / 'none.jpg', *named], capsys)
    (tmp_path / 'nothing').mkdir()
    assert 'holds no image and no video' in sentence([tmp_path / 'nothing', *named], capsys)
    assert 'would be replaced' in sentence([pictures / 'a.jpg', '--checkpoint', checkpoint, '--out', pictures], capsys)
    assert 'a number from 0 to 1' in sentence([pictures, *named, '--score-thr', '30'], capsys)
    assert '--device must be cpu, cuda or cuda:N' in sentence([pictures, *named, '--device', 'gpu'], capsys)
    assert 'cuda:99, but torch' in sentence([pictures, *named, '--device', 'cuda:99'], capsys)
    cut = checkpoint.with_name('cut.pth')
    cut.write_bytes(checkpoint.read_bytes()[:20_000])
    message = sentence([pictures, '--checkpoint', cut, '--config', checkpoint.with_name('config.py')], capsys)
    cut.unlink()
    assert 'cut.pth' in message


# ---- videos ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def clip(tmp_path):
    path = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 64))
    for index in range(4):
        writer.write(draw_image(index, (96, 64))[0][..., ::-1])
    writer.release()
    return path


def test_a_video(checkpoint, clip, tmp_path, capsys):
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


def test_a_file_that_is_no_video(checkpoint, pictures, tmp_path, capsys):
    (pictures / 'broken.mp4').write_text('not a video')
    assert run(checkpoint, pictures / 'broken.mp4', pictures / 'a.jpg', '--out', tmp_path / 'out') == 1
    said = capsys.readouterr()
    assert 'broken.mp4 is not a video that can be read' in said.err and '1 image drawn' in said.out
    assert not (tmp_path / 'out/broken.mp4').exists()


def test_ctrl_c_keeps_what_is_done(checkpoint, clip, pictures, tmp_path, monkeypatch, capsys):
    from msda_plugin import __main__
    from msda_plugin.tools import demo

    real, calls = demo.Demo.detect, []

    def detect(self, image, image_id):
        calls.append(image_id)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, image, image_id)

    monkeypatch.setattr(demo.Demo, 'detect', detect)
    assert (
        __main__.main(
            [
                'demo',
                str(pictures / 'a.jpg'),
                str(clip),
                '--checkpoint',
                str(checkpoint),
                '--score-thr',
                '0',
                '--out',
                str(tmp_path / 'out'),
            ]
        )
        == 130
    )
    assert 'stopped by Ctrl-C' in capsys.readouterr().err
    assert len(json.loads((tmp_path / 'out/results.json').read_text())) == 10
    assert {r['image_id'] for r in json.loads((tmp_path / 'out/clip.avi.mp4.json').read_text())} == {0, 1}
