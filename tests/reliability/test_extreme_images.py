"""Training on images of extreme sizes and various formats, with no boxes or hundreds of boxes."""

import json
import math
import random

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from small_training import MAIN_JOB, arguments

from msda_plugin.compat import accept_sides_of_one_pixel
from msda_plugin.tools.shapes import CLASSES

SCALE = 128  # images of the main job are resized to fit into this square
# (width, height), pixels
SIZES = ((1, 1), (1, 300), (300, 1), (2, 77), (8000, 1), (1, 8000), (8000, 500), (31, 33), (640, 480), (128, 128))


def noise(size, seed):
    """Coarse noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def write_kinds(folder):
    """Write one image, 60 x 40, in several formats; returns the file names."""
    image = noise((60, 40), seed=3)
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by 90 degrees when shown, hence 40 x 60
    gray16 = np.asarray(image.convert('L')).astype(np.uint16) * 257
    image.convert('L').save(folder / 'gray.png')
    image.convert('L').save(folder / 'gray.jpg')
    image.convert('RGBA').save(folder / 'alpha.png')
    image.convert('P').save(folder / 'palette.png')
    image.convert('1').save(folder / 'bilevel.png')
    image.convert('CMYK').save(folder / 'cmyk.jpg')
    image.save(folder / 'turned.jpg', exif=turned, quality=95)
    Image.fromarray(gray16).save(folder / 'sixteen_bits.png')
    return sorted(path.name for path in folder.iterdir())


def annotations(sizes, generator):
    """COCO content for these (name, width, height), with 0, 1, 7 or 500 boxes per image, some of one pixel."""
    images, boxes = [], []
    for number, (name, width, height) in enumerate(sizes):
        images.append(dict(id=number, file_name=name, width=width, height=height))
        for _ in range(generator.choice((0, 1, 7, 500))):
            x, y = generator.randrange(width), generator.randrange(height)
            box = [x, y, generator.randint(1, width - x), generator.randint(1, height - y)]
            boxes.append(
                dict(
                    id=len(boxes),
                    image_id=number,
                    category_id=generator.randrange(len(CLASSES)),
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
    return dict(
        images=images, annotations=boxes, categories=[dict(id=number, name=name) for number, name in enumerate(CLASSES)]
    )


def write_data(root, sizes, seed):
    generator = random.Random(seed)
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / split).mkdir()
        listed = [(name, *((40, 60) if name == 'turned.jpg' else (60, 40))) for name in write_kinds(root / split)]
        for number, size in enumerate(sizes):
            name = f'{number}.{generator.choice(("png", "jpg"))}'
            noise(size, seed=number).save(root / split / name)
            listed.append((name, *size))
        generator.shuffle(listed)
        content = annotations(listed, generator)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    return len(listed)


def test_training_on_extreme_images(training_server, tmp_path, long_run):
    rounds = 10 if long_run else 1
    sizes = [*SIZES, (8000, 8000)] if long_run else SIZES
    options = [f'train_cfg.max_epochs={2 if long_run else 1}', 'train_cfg.val_interval=1']
    peaks = []
    for seed in range(rounds):
        count = write_data(tmp_path / str(seed) / 'data', sizes, seed)
        work_dir, log = tmp_path / str(seed) / 'work', tmp_path / f'{seed}.log'
        answer = training_server.run(arguments(tmp_path / str(seed) / 'data', work_dir, *options), log)
        assert answer['status'] == 0, log.read_text()[-3000:]
        peaks.append(answer['peak'])
        records = [
            json.loads(line)
            for path in work_dir.glob('*/vis_data/scalars.json')
            for line in path.read_text().splitlines()
        ]
        losses = [record['loss'] for record in records if 'loss' in record]
        assert len(losses) >= math.ceil(count / 4) and all(map(math.isfinite, losses))
        assert (work_dir / 'predictions.png').is_file()
    print(
        f'\n{rounds} trainings on {count} images each, of {min(sizes)} to {max(sizes)} pixels, 0 to 500 boxes: all '
        f'complete, losses finite; peak memory of a process {max(peaks) / 2**20:.0f} MB'
    )
    assert max(peaks) < 2**30 + 8000 * 8000 * 3 * 4


@pytest.fixture(scope='module')
def load():
    """A function of a path that loads and resizes the image as in the main job."""
    from mmcv.transforms import Compose
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    accept_sides_of_one_pixel()
    pipeline = Compose(Config.fromfile(str(MAIN_JOB)).test_pipeline[:2])  # load, resize
    return lambda path: pipeline(dict(img_path=str(path)))


@pytest.mark.parametrize('size', SIZES)
def test_resize_of_extreme_sizes(load, size, tmp_path):
    noise(size, seed=1).save(tmp_path / 'a.png')
    loaded = load(tmp_path / 'a.png')
    factor = SCALE / max(size)
    expected = tuple(max(1, int(side * factor + 0.5)) for side in reversed(size))
    assert loaded['img'].shape == (*expected, 3) and loaded['ori_shape'] == size[::-1]
    assert max(loaded['img_shape']) == SCALE
    assert loaded['scale_factor'] == (expected[1] / size[0], expected[0] / size[1])


@pytest.mark.parametrize('direction', ['horizontal', 'vertical', 'diagonal'])
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 1), (9, 7)])
def test_flip_of_extreme_sizes(load, size, direction):
    import mmcv
    from mmdet.datasets.transforms import PackDetInputs

    image = np.asarray(noise(size, seed=2))
    flipped = mmcv.imflip(image, direction)
    vertical, horizontal = direction != 'horizontal', direction != 'vertical'
    assert np.array_equal(flipped, image[:: -1 if vertical else 1, :: -1 if horizontal else 1])
    packed = PackDetInputs(meta_keys=())(dict(img=flipped))
    assert packed['inputs'].shape == (3, *size[::-1])


def test_every_format_is_read_as_8_bit_color(load, tmp_path):
    names = write_kinds(tmp_path)
    loaded = {name: load(tmp_path / name) for name in names}
    assert len(names) == 8
    for name, results in loaded.items():
        assert results['img'].dtype == np.uint8 and results['img'].ndim == 3 and results['img'].shape[2] == 3, name
        assert results['ori_shape'] == ((60, 40) if name == 'turned.jpg' else (40, 60)), name
    gray, deep = (loaded[name]['img'].astype(int) for name in ('gray.png', 'sixteen_bits.png'))
    assert abs(gray - deep).max() <= 1  # the upper 8 of the 16 bits
    # The EXIF orientation is applied: rotated clockwise by 90 degrees.
    upright, turned = (loaded[name]['img'][..., ::-1].astype(int) for name in ('alpha.png', 'turned.jpg'))
    assert abs(np.rot90(upright, -1) - turned).mean() < 8  # JPEG
