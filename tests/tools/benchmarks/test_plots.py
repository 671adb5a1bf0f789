"""SVG figures of benchmark results."""

from xml.etree import ElementTree

import pytest

from msda_plugin.tools.benchmarks.plots import FASTER, SLOWER, draw_growth, draw_overview, draw_speeds, growth_svg

GROWTH = ([64, 256], dict(one=[0.001, 0.004], two=[0.002, 0.03]), dict(one=1.0, two=2.0))


def size_of(svg):
    root = ElementTree.fromstring(svg)
    assert root.tag == '{http://www.w3.org/2000/svg}svg'
    return [float(root.get(key).removesuffix('pt')) for key in ('width', 'height')]


def test_height_grows_with_number_of_bars():
    few = draw_speeds(['a', 'b'], [39.4, 1.2], ['1 s → 2 s', ''], sides=('mmcv', 'ours'))
    many = draw_speeds(['case'] * 9, [2.0] * 9, [''] * 9, sides=('mmcv', 'ours'))
    assert size_of(few)[0] == size_of(many)[0] and size_of(few)[1] < size_of(many)[1]
    assert FASTER in few and SLOWER not in few


@pytest.mark.parametrize('speeds', [[0.5, 2.0], [0.97], [1.0]])
def test_slower_bars_have_another_color(speeds):
    svg = draw_speeds([str(speed) for speed in speeds], speeds, [''] * len(speeds), sides=('plain', 'ours'))
    assert (SLOWER in svg) == (min(speeds) < 1)
    assert (FASTER in svg) == (max(speeds) >= 1)


def test_overview_and_growth():
    size_of(draw_overview({'Operator': [39.0, 5.0], 'Layers': [0.8]}))
    size_of(growth_svg(*GROWTH))
    (axis,) = draw_growth(*GROWTH).axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1, 4], [2, 30]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ['one: pixels^1.00', 'two: pixels^2.00']


def test_svg_is_reproducible():
    assert growth_svg(*GROWTH) == growth_svg(*GROWTH)
