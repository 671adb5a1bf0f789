"""The page stands alone, escapes names, and shows every number; a browser draws it."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from msda_plugin.engine.detection_analysis import DetectedImage, analyze
from msda_plugin.visualization.report_page import report_page

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
EVIL = '</td><script>document.title="broken"</script><img src=x onerror=alert(1)> "quoted" \' & 猫'


class Page(HTMLParser):
    """Text, tags with attributes, tables as lists of rows, and figures as (rectangles, caption)."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.tables, self.figures = '', [], [], []
        self._cell = None
        self._in_caption = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self._cell = ''
        elif tag == 'figure':
            self.figures.append(([], []))  # rectangles, parts of the caption
        elif tag == 'figcaption':
            self._in_caption = True
        elif tag == 'rect':
            self.figures[-1][0].append(attributes)

    def handle_endtag(self, tag):
        if tag in ('td', 'th'):
            self.tables[-1][-1].append(self._cell.strip())
            self._cell = None
        elif tag == 'figcaption':
            self._in_caption = False

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data
        if self._in_caption:
            self.figures[-1][1].append(data)


def image(truths=(), found=(), path='a.png'):
    return DetectedImage(
        path=path,
        boxes=np.array([box for _, box in truths], float).reshape(-1, 4),
        labels=np.array([label for label, _ in truths], int),
        ignored=np.zeros(len(truths), bool),
        found=np.array([box for *_, box in found], float).reshape(-1, 4),
        found_labels=np.array([label for label, *_ in found], int),
        scores=np.array([score for _, score, _ in found], float),
    )


PICTURE = np.full((120, 200, 3), (200, 30, 30), np.uint8)
IMAGES = [
    image(
        [(0, (10, 10, 50, 50)), (1, (100, 20, 140, 60))],
        [(0, 0.9, (10, 10, 50, 50)), (0, 0.8, (100, 20, 140, 58)), (1, 0.7, (150, 80, 190, 110))],
        path=f'folder/{EVIL}.png',
    ),
    image([(0, (0, 0, 20, 20))]),
]


def make_page(images=IMAGES, names=('cat', EVIL), read_image=lambda path: PICTURE, **options):
    analysis = analyze(images, len(names), score_thr=0.5)
    return report_page(
        analysis, images, names, read_image, title=f'Report of {EVIL}', facts={'config': EVIL}, **options
    )


def test_it_stands_alone_and_is_escaped():
    page = make_page(curves=PICTURE)
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {'script', 'link', 'iframe', 'object', 'base', 'form'}
    links = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ('src', 'href')]
    assert len(links) > 6 and all(link.startswith(('data:image/', '#')) for link in links)
    assert not any(name.startswith('on') for _, attributes in parsed.tags for name in attributes)
    assert not re.search(r'https?:|//[a-z]|@import|url\(', re.sub('base64,[^"]*', '', page))
    assert "default-src 'none'" in next(
        attributes['content'] for _, attributes in parsed.tags if attributes.get('http-equiv')
    )
    assert parsed.text.count(EVIL) >= 5 and '<img src=x' not in page


def test_numbers():
    parsed = Page(make_page())
    classes, matrix, settings = parsed.tables
    head, mean, cat, evil = classes
    assert head[0] == 'class' and head[-2:] == ['boxes', 'images']
    assert (mean[0], cat[0], evil[0]) == ('all', 'cat', EVIL)
    half = f'{51 / 101:.3f}'  # one of the two cats, with the highest score
    assert cat[1:] == [half, half, half, '0.500', '0.500', '1', '1', '1', '2', '2']
    assert evil[1:] == ['0.000'] * 5 + ['0', '1', '1', '1', '1']
    assert mean[1] == f'{51 / 202:.3f}' and mean[4:] == ['0.333', '0.333', '1', '2', '2', '3', '2']
    assert [row[0] for row in matrix] == ['true ↓ predicted →', 'cat', EVIL, 'no object']
    assert matrix[0][1:] == ['cat', EVIL, 'missed']
    assert [row[1:] for row in matrix[1:]] == [['1', '', '1'], ['1', '', ''], ['', '1', '']]
    assert f'{EVIL} detected as cat (1).' in ' '.join(parsed.text.split())
    assert settings == [['config', EVIL]]
    assert 'score ≥ 0.50' in parsed.text and 'IoU ≥ 0.5' in parsed.text


def test_mistakes():
    page = make_page()
    (wrong, nothing, confused, missed) = Page(page).figures
    assert wrong[1] == ['cat 0.80', f': the object is annotated as {EVIL}, IoU 0.95', f'folder/{EVIL}.png']
    assert nothing[1][:2] == [f'{EVIL} 0.70', ': no object of this class here']
    assert confused[1][:2] == [EVIL, ': detected as cat 0.80, IoU 0.95']
    assert missed[1] == ['cat', ': no detection of this class here', 'a.png']
    (red,) = [rect for rect in wrong[0] if rect['class'] == 'mistake']
    assert [red[side] for side in ('x', 'y', 'width', 'height')] == ['100.0', '20.0', '40.0', '38.0']
    # The crop is 80 pixels wide, twice the box, and has the true box, but no detection that is farther away.
    assert [rect['class'] for rect in wrong[0]] == ['under', 'true', 'under', 'mistake']
    (first, *_) = [attributes for tag, attributes in Page(page).tags if tag == 'svg']
    assert first['viewbox'] == '80 0 80 80'
    (href, *_) = [attributes['href'] for tag, attributes in Page(page).tags if tag == 'image']
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(href.split(',')[1]))))
    assert pixels.shape == (80, 80, 3) and np.abs(pixels.astype(int) - PICTURE[0, 0]).max() < 12


@pytest.mark.parametrize('box', [(0, 0, 4, 4), (190, 100, 200, 120), (-30, -20, 500, 400), (300, 300, 310, 310)])
def test_crops_at_the_edge(box):
    page = make_page([image([(0, box)])])
    (x, y, width, height) = map(int, re.search('viewBox="([^"]*)"', page)[1].split())
    assert 0 <= x < x + width <= 200 and 0 <= y < y + height <= 120 and min(width, height) >= 50


def test_an_unreadable_image():
    def read_image(path):
        raise OSError('no such <file>')

    parsed = Page(make_page(read_image=read_image))
    assert parsed.text.count('the image cannot be read: no such <file>') == 4


@pytest.mark.parametrize(
    'images, said',
    [
        ([image([(0, (1, 1, 9, 9))])], 'predicts no box at all'),
        ([image([(0, (1, 1, 9, 9))])], 'No detection reaches this score threshold and matches an object.'),
        ([image()], 'There is no true box'),
        ([image([(0, (1, 1, 9, 9))], [(0, 0.9, (1, 1, 9, 9))])], 'None: every detection matches a true box.'),
    ],
)
def test_nothing_to_show(images, said):
    parsed = Page(make_page(images))
    assert said in ' '.join(parsed.text.split())
    assert 'nan' not in parsed.text.lower()


def test_eighty_classes():
    names = [f'class {index}' for index in range(80)]
    truths = [(index, (5 * index, 0, 5 * index + 4, 4)) for index in range(79)]
    found = [((index + (index % 9 == 0)) % 80, 0.6 + index / 400, box) for index, box in truths]
    page = make_page([image(truths, found)], names)
    classes, matrix, _ = Page(page).tables
    assert len(classes) == 82 and len(matrix) == 82 and all(len(row) == 82 for row in matrix)
    assert classes[-1][:2] == ['class 79', '–']
    assert page.count('class="swatch"') == 10
    assert len(page) < 3e6


def test_the_matrix_of_many_classes_has_those_with_errors():
    names = [f'class {index}' for index in range(300)]
    page = make_page([image([(250, (0, 0, 9, 9))], [(251, 0.9, (0, 0, 9, 9))])], names)
    _, matrix, _ = Page(page).tables
    assert len(matrix) == 102 and {'class 250', 'class 251'} < {row[0] for row in matrix}
    assert '200 are left out' in ' '.join(Page(page).text.split())


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium; apt install chromium')
def test_a_browser_draws_it(tmp_path):
    path = tmp_path / 'page.html'
    path.write_text(make_page(), encoding='utf-8')
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--window-size=1000,2600']
    command = [CHROMIUM, *options, f'--screenshot={tmp_path / "page.png"}', path.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(tmp_path / 'page.png').convert('RGB')).astype(int)
    for color in ((200, 30, 30), (255, 59, 65)):  # a crop, and the rectangle of a mistake
        assert (np.abs(pixels - color).max(axis=-1) < 15).sum() > 300
