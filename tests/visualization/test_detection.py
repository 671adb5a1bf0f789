"""Boxes on images, and sheets of ground truth and predictions."""

import numpy as np
import pytest
from PIL import Image

from msda_plugin.visualization import class_colors, draw_boxes, draw_contact_sheet, draw_sheet, score_caption, write_png
from msda_plugin.visualization.detection import GAP

GRAY = np.full((40, 60, 3), 128, np.uint8)
NAMES = ('cat', 'dog')


def columns_of(drawn, color):
    """First and last column, first and last row with this color."""
    rows, columns = np.where((drawn == color).all(axis=2))
    return columns.min(), columns.max(), rows.min(), rows.max()


def test_colors_are_distinct_and_stable():
    colors = class_colors(100)
    assert colors.shape == (100, 3) and colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == 100
    np.testing.assert_array_equal(class_colors(3), colors[:3])


def test_box_lies_on_its_edges():
    drawn = draw_boxes(GRAY, np.array([[20, 18, 50, 36]]), np.array([1]), NAMES)
    assert drawn.shape == GRAY.shape
    color = class_colors(2)[1]
    assert tuple(drawn[18, 30]) == tuple(drawn[30, 20]) == tuple(color)
    assert tuple(drawn[35, 30]) == tuple(drawn[30, 49]) == tuple(color)
    assert tuple(drawn[27, 35]) == (128, 128, 128)


def test_enlarging_scales_image_and_boxes():
    drawn = draw_boxes(GRAY, np.array([[15, 10, 30, 20]]), np.array([0]), NAMES, longer_side=240)
    assert drawn.shape == (160, 240, 3)
    assert columns_of(drawn[40:], class_colors(2)[0]) == (60, 119, 0, 39)  # the tag lies above


def test_the_input_image_is_not_modified():
    image = GRAY.copy()
    draw_boxes(image, np.array([[0, 0, 60, 40]]), np.array([0]), NAMES)
    np.testing.assert_array_equal(image, GRAY)


def test_the_highest_scoring_box_is_on_top_and_keeps_its_tag():
    box = np.array([[10, 14, 50, 34]])
    two = draw_boxes(GRAY, np.repeat(box, 2, axis=0), np.array([0, 1]), NAMES, np.array([0.9, 0.4]), longer_side=240)
    other = draw_boxes(GRAY, np.repeat(box, 2, axis=0), np.array([1, 0]), NAMES, np.array([0.4, 0.9]), longer_side=240)
    np.testing.assert_array_equal(two, other)
    assert tuple(two[100, 40]) == tuple(class_colors(2)[0])


@pytest.mark.parametrize('height, width', [(1, 8000), (8000, 1), (1, 1)])
def test_an_image_of_one_row_or_column(height, width):
    image = np.full((height, width, 3), 128, np.uint8)
    drawn = draw_boxes(image, np.array([[0, 0, width, height]]), np.array([0]), NAMES, longer_side=384)
    assert drawn.shape[:2] == (384 if height >= width else 1, 384 if width >= height else 1)


@pytest.mark.parametrize(
    'box', [[-50, -50, 500, 500], [59.9, 39.9, 60, 40], [70, 50, 90, 60], [10, 10, 10, 10], [np.nan, 0, 5, 5]]
)
def test_odd_boxes_are_drawn_somewhere_inside(box):
    drawn = draw_boxes(GRAY, np.array([box]), np.array([0]), NAMES, np.array([0.5]))
    assert (drawn != GRAY).any()


def test_masks_are_tinted_below_the_boxes():
    image = np.full((100, 200, 3), 128, np.uint8)
    masks = np.zeros((2, 100, 200), bool)
    masks[0, 50:60, 40:150] = masks[1, 50:70, 40:60] = True
    boxes, labels, scores = np.array([[20, 40, 180, 90]] * 2), np.array([0, 1]), np.array([0.9, 0.4])
    plain = draw_boxes(image, boxes, labels, NAMES, scores)
    drawn = draw_boxes(image, boxes, labels, NAMES, scores, masks=masks)
    first, second = (tuple(np.round(0.5 * 128 + 0.5 * color).astype(np.uint8)) for color in class_colors(2))
    assert tuple(drawn[55, 100]) == first and tuple(drawn[65, 50]) == second
    assert tuple(drawn[55, 50]) == first  # of the higher score
    np.testing.assert_array_equal(drawn[~masks.any(0)], plain[~masks.any(0)])
    enlarged = draw_boxes(image, boxes, labels, NAMES, scores, masks=masks, longer_side=400)
    assert tuple(enlarged[110, 200]) == first
    with pytest.raises(ValueError, match=r'masks must be \(2, 100, 200\) bool, .* got \(2, 50, 100\) bool'):
        draw_boxes(image, boxes, labels, NAMES, scores, masks=masks[:, ::2, ::2])


def test_no_boxes():
    np.testing.assert_array_equal(draw_boxes(GRAY, np.zeros((0, 4)), np.zeros(0), NAMES), GRAY)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((GRAY / 255, np.zeros((0, 4)), []), r'image must be \(H, W, 3\) uint8, got \(40, 60, 3\) float64'),
        ((GRAY[..., 0], np.zeros((0, 4)), []), r'image must be \(H, W, 3\) uint8, got \(40, 60\) uint8'),
        ((GRAY, np.zeros((2, 4)), [0]), 'equal lengths, got 2, 1'),
        ((GRAY, np.zeros((1, 4)), [2]), 'labels must be from 0 to 1, .* got 2 to 2'),
    ],
)
def test_bad_arrays(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_boxes(*arguments, NAMES)


def test_sheet_shows_every_image_twice_and_names_the_classes():
    images = [np.full((*size, 3), value, np.uint8) for size, value in (((30, 60), 10), ((60, 30), 20), ((30, 30), 30))]
    nothing = np.zeros((0, 4)), np.zeros(0, int)
    sheet = draw_sheet(images, [nothing] * 3, [(*nothing, np.zeros(0))] * 3, NAMES, tile=120, columns=2)
    areas = [(sheet == value).all(axis=2).sum() for value in (10, 20, 30)]
    assert areas == [2 * 60 * 120, 2 * 120 * 60, 2 * 120 * 120]
    truth = np.array([[2, 12, 28, 28]]), np.array([1])
    with_box = draw_sheet(images, [truth] + [nothing] * 2, [(*nothing, np.zeros(0))] * 3, NAMES, tile=120, columns=2)
    assert with_box.shape == sheet.shape
    changed = np.where((sheet != with_box).any(axis=2))
    assert changed[1].min() < 132 and not (sheet != with_box)[:150, 140:].any()  # the true side of the first pair
    assert (with_box[-20:] == class_colors(2)[1]).all(axis=2).any()  # the legend


def test_the_caption_lies_below_the_image():
    plain = draw_boxes(GRAY, np.array([[15, 10, 30, 20]]), np.array([0]), NAMES, longer_side=240)
    drawn = draw_boxes(GRAY, np.array([[15, 10, 30, 20]]), np.array([0]), NAMES, longer_side=240, caption='score ≥ 0.3')
    np.testing.assert_array_equal(drawn[:160], plain)
    band = drawn[160:]
    assert len(band) == round(11 * 1.4) and (band < 100).any() and (band[:, 0] == 255).all()
    two_lines = draw_boxes(GRAY, np.zeros((0, 4)), [], NAMES, caption='score ≥ 0.3')  # the image is 60 pixels wide
    assert len(two_lines) == len(GRAY) + 2 * len(band)


@pytest.mark.parametrize(
    'scores, caption',
    [
        ([0.3, 0.1], 'score ≥ 0.3'),
        ([0.123, 0.29], 'no score ≥ 0.3, highest 0.29'),
        ([0.0123], 'no score ≥ 0.3, highest 0.0123'),
        ([], 'no detections'),
    ],
)
def test_the_caption_states_the_threshold_or_the_highest_score(scores, caption):
    assert score_caption(np.array(scores), 0.3) == caption


def test_a_sheet_applies_and_states_its_threshold():
    box, nothing = (np.array([[2, 2, 28, 28]]), np.array([1])), (np.zeros((0, 4)), np.zeros(0, int))
    image = np.full((30, 30, 3), 10, np.uint8)

    def sheet(score, **options):
        return draw_sheet([image], [nothing], [(*box, np.array([score]))], NAMES, tile=120, **options)

    stated = sheet(0.5, score_thr=0.4)
    assert stated.shape == sheet(0.5).shape  # nothing below the image, only the header differs
    assert (stated[40:] == sheet(0.5)[40:]).all() and (stated[:40] != sheet(0.5)[:40]).any()
    below = sheet(0.3, score_thr=0.4)
    assert not (below == class_colors(2)[1]).all(axis=2).any()  # neither the box nor its legend
    assert len(below) > len(sheet(0.3, score_thr=0.2))  # the highest score
    empty = draw_sheet([image], [nothing], [(*nothing, np.zeros(0))], NAMES, tile=120)
    assert len(empty) < len(below)


def test_sheet_of_nothing():
    with pytest.raises(ValueError, match='got 0 images'):
        draw_sheet([], [], [], NAMES)


def test_write_png(tmp_path):
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    write_png(tmp_path / 'a.png', image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'a.png')), image)
    assert [path.name for path in tmp_path.iterdir()] == ['a.png']


def test_contact_sheet():
    images = [np.full((40, 60, 3), (90, 90, 90), np.uint8), np.full((60, 30, 3), (0, 0, 250), np.uint8)] * 3
    truths = [(np.array([[5.0, 5, 30, 30]]), np.array([1])), (np.empty((0, 4)), np.empty(0, int))] * 3
    sheet = draw_contact_sheet(images, truths, ('cat', 'dog'), ['a.png: 60×40'] * 6, tile=120, columns=4)
    assert sheet.shape[1] == 4 * 120 + 5 * GAP and sheet.dtype == np.uint8
    assert (sheet[GAP : GAP + 80, GAP : GAP + 120] == 90).all(axis=-1).mean() > 0.5
    assert (sheet[GAP + 60, 2 * GAP + 120 : 2 * GAP + 180] == (0, 0, 250)).all()
    assert (sheet == class_colors(2)[1]).all(axis=-1).sum() > 3 * 100  # boxes and legend
    assert not (sheet == class_colors(2)[0]).all(axis=-1).any()


def test_contact_sheet_of_unequal_lengths():
    with pytest.raises(ValueError, match='got 1 images, 0 boxes, 1 captions'):
        draw_contact_sheet([np.zeros((4, 4, 3), np.uint8)], [], (), ['a'])
    with pytest.raises(ValueError, match='at least one image'):
        draw_contact_sheet([], [], (), [])
