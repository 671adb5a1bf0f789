"""The page is self-contained, escapes its data, and is drawn correctly by a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from msda_plugin.visualization import attention_page, write_attention_page
from msda_plugin.visualization.attention import LayerView, QueryView

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
EVIL = '</script><script>document.title="broken"</script><!-- & "quoted" \u2028'
IMAGE = np.full((80, 100, 3), 200, np.uint8)


def sampled(name, kind, heads=2, seed=0):
    """Two levels and three points per head, all at different locations."""
    random = np.random.default_rng(seed)
    head, level, point = (part.ravel() for part in np.indices((heads, 2, 3)))
    weight = random.random(len(head))
    return LayerView(
        name=name,
        kind=kind,
        query=f'{kind} query 3',
        at=np.array([50.0, 40]),
        box=np.array([30.0, 20, 70, 60]) if kind == 'decoder' else None,
        head=head,
        level=level,
        xy=np.column_stack([10 + 20 * head + 5 * point, 10 + 30 * level + 0.25 * point]),
        weight=weight / weight.sum() * heads,
        level_names=('level 0, 10×12', 'level 1, 5×6'),
    )


def cells():
    """Two heads on a coarse grid of two cells, one head on a fine grid of four."""
    return LayerView(
        name='backbone.attn',
        kind='shunted',
        query='token 3',
        at=np.array([50.0, 40]),
        box=None,
        head=np.array([0, 0, 1, 1, 2, 2, 2, 2]),
        level=np.array([0, 0, 0, 0, 1, 1, 1, 1]),
        xy=np.array([(25.0, 40), (75, 40)] * 2 + [(12.5, 40), (37.5, 40), (62.5, 40), (87.5, 40)]),
        weight=np.array([1, 0, 0.5, 0.5, 0.1, 0.2, 0.3, 0.4]),
        level_names=('coarse', 'fine'),
        cells=np.array([(50.0, 80), (25, 80)]),
    )


def make_queries():
    layers = (cells(), sampled('encoder.0', 'encoder'), sampled('decoder.0', 'decoder', seed=1))
    return [
        QueryView(f'detection 0: {EVIL}', np.array([50.0, 40]), np.array([32.0, 22, 68, 58]), layers),
        QueryView('point (3, 4)', np.array([3.0, 4]), None, layers[:2]),
    ]


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_is_self_contained():
    page = attention_page(IMAGE, make_queries(), title='a title')
    addresses = [found for found in re.findall(r'https?://[^\s"\'<>]+', page) if found != 'http://www.w3.org/2000/svg']
    assert addresses == []
    assert not re.search(r'<(link|iframe|object|embed|img)\b|\bsrc=|@import|url\(|fetch\(|XMLHttpRequest|import ', page)
    assert not re.search(r'innerHTML|outerHTML|document\.write|eval\(', page)
    assert data_of(page)['image'].startswith('data:image/png;base64,')
    large = attention_page(np.zeros((700, 900, 3), np.uint8), make_queries(), title='a title')
    assert data_of(large)['image'].startswith('data:image/jpeg;base64,') and data_of(large)['width'] == 900


def test_data_is_escaped_and_restored():
    page = attention_page(IMAGE, make_queries(), title=EVIL)
    data = data_of(page)
    assert data['queries'][0]['label'] == f'detection 0: {EVIL}'
    assert page.count('</script>') == 2 and '<!--' not in page and '\u2028' not in page.split('id="data"')[1]
    assert '<title>&lt;/script&gt;' in page
    layer = data['queries'][0]['layers'][2]
    assert (layer['x'], layer['level'], layer['head']) == (
        [10, 15, 20] * 2 + [30, 35, 40] * 2,
        [0, 0, 0, 1, 1, 1] * 2,
        [0] * 6 + [1] * 6,
    )


def test_a_page_needs_a_query():
    with pytest.raises(ValueError, match='at least one query'):
        attention_page(IMAGE, [], title='')


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason='needs a Chromium: apt-get install chromium')


def browse(tmp_path, state='', script=''):
    """The DOM after a browser opened the page with this URL fragment and ran a script."""
    path = tmp_path / 'page.html'
    write_attention_page(path, IMAGE, make_queries(), title=EVIL)
    if script:
        path.write_text(path.read_text().replace('</body>', f'<script>{script}</script></body>'))
    flags = [
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--disable-quic',
        '--no-first-run',
        '--disable-sync',
        '--disable-background-networking',
        '--disable-component-update',
        '--virtual-time-budget=2000',
        f'--user-data-dir={tmp_path / "profile"}',
        '--window-size=1200,900',
        '--dump-dom',
    ]
    result = subprocess.run([CHROMIUM, *flags, f'{path.as_uri()}#{state}'], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def samples_in(document):
    """(x, y, head, level) of each drawn point, from its transform."""
    pattern = (
        r'<path class="sample"[^>]*data-head="(\d+)" data-level="(\d+)"'
        r'[^>]*transform="translate\(([\d.-]+) ([\d.-]+)\)"'
    )
    return sorted((float(x), float(y), int(head), int(level)) for head, level, x, y in re.findall(pattern, document))


@needs_browser
def test_a_browser_first_draws_the_last_layer(tmp_path):
    document = browse(tmp_path)
    view = sampled('decoder.0', 'decoder')
    expected = sorted(
        (x, y, head, level)
        for (x, y), head, level in zip(view.xy.tolist(), view.head.tolist(), view.level.tolist(), strict=True)
    )
    assert samples_in(document) == expected
    assert 'decoder.0 · decoder query 3 · 12 points' in document
    assert '<rect x="32" y="22" width="36" height="36"' in document  # the detection, in pixels of the image
    assert '<rect x="30" y="20" width="40" height="40"' in document  # the reference box of the layer
    assert '<title>broken' not in document and '&lt;/script&gt;' in document


@needs_browser
def test_a_browser_restores_the_state_of_the_url(tmp_path):
    document = browse(tmp_path, 'query=1&layer=encoder.0&head=1&level=0&zoom=0')
    assert samples_in(document) == [(30, 10, 1, 0), (35, 10.25, 1, 0), (40, 10.5, 1, 0)]
    assert 'viewBox="0 0 100 80"' in document
    assert 'point (3, 4) · encoder.0 · encoder query 3 · 3 points' in document


@needs_browser
def test_selectors_and_mean_cells_over_heads(tmp_path):
    choose = """
        const layer = document.getElementById('layer');
        layer.value = 'backbone.attn';
        layer.dispatchEvent(new Event('change'));"""
    document = browse(tmp_path, script=choose)
    drawn = re.findall(
        r'<rect class="sample" data-x="([\d.]+)"[^>]*x="([\d.]+)" y="0" width="50" height="80" '
        r'fill-opacity="([\d.]+)"',
        document,
    )
    # Mean weights of 0.75 and 0.25 on the coarse grid; the largest has the highest opacity.
    assert sorted((float(x), float(left), round(float(depth), 3)) for x, left, depth in drawn) == [
        (25, 0, 0.75),
        (75, 50, 0.25),
    ]
    assert '2 cells' in document
    options = re.search(r'<select id="level">(.*?)</select>', document)[1]
    assert re.findall(r'>(\w+)<', options) == ['coarse', 'fine']


def values_after(tmp_path, steps, state=''):
    """What a script of `steps` logs with `log(value)` in the browser, as strings."""
    script = f"""
        const log = value => {{
            const line = document.createElement('li');
            line.className = 'logged';
            line.textContent = value;
            document.body.append(line);
        }};
        const choose = (id, value) => {{
            const control = document.getElementById(id);
            if (control.type === 'checkbox') control.checked = value; else control.value = value;
            control.dispatchEvent(new Event('change'));
        }};
        const value = id => document.getElementById(id).value;
        const click = (x, y) => {{  // pixels of the image
            const at = new DOMPoint(x, y).matrixTransform(document.getElementById('figure').getScreenCTM());
            document.elementFromPoint(at.x, at.y).dispatchEvent(
                new MouseEvent('click', {{bubbles: true, clientX: at.x, clientY: at.y}}));
        }};
        {steps}"""
    return re.findall(r'<li class="logged">(.*?)</li>', browse(tmp_path, state, script))


@needs_browser
def test_a_layer_without_the_chosen_level_or_head_does_not_change_the_choice(tmp_path):
    logged = values_after(
        tmp_path,
        """
        choose('layer', 'backbone.attn');
        log(value('level') + ' ' + value('head'));
        choose('layer', 'decoder.0');
        log(value('level') + ' ' + value('head'));
        choose('head', '1');
        choose('layer', 'backbone.attn');
        choose('head', '2');
        choose('layer', 'decoder.0');
        log(value('level') + ' ' + value('head'));
        choose('head', '1');
        choose('query', '1');
        log(value('layer') + ' ' + value('head'));
        choose('query', '0');
        log(value('layer') + ' ' + value('head'));
        """,
    )
    assert logged == ['0 all', 'all all', 'all all', 'encoder.0 1', 'decoder.0 1']


@needs_browser
def test_the_url_keeps_a_choice_that_the_layer_lacks(tmp_path):
    logged = values_after(tmp_path, "log(location.hash); choose('layer', 'decoder.0'); log(value('level'));",
                          'layer=backbone.attn&level=all')  # fmt: skip
    assert 'level=all' in logged[0] and logged[1] == 'all'


@needs_browser
def test_controls_that_change_nothing_are_disabled(tmp_path, monkeypatch):
    near = sampled('decoder.0', 'decoder')
    near = replace(near, xy=45 + near.xy / 10, box=np.array([45.0, 35, 55, 45]))
    layers = (cells(), sampled('encoder.0', 'encoder'), near)
    queries = [
        QueryView('detection 0', near.at, near.box, layers),
        QueryView('point (3, 4)', np.array([3.0, 4]), None, layers[:2]),
    ]
    monkeypatch.setitem(globals(), 'make_queries', lambda: queries)
    logged = values_after(
        tmp_path,
        """
        const disabled = () => log(Array.from(document.querySelectorAll('header [id]:disabled'), n => n.id).join(' '));
        disabled();
        choose('layer', 'backbone.attn');
        disabled();
        choose('layer', 'decoder.0');
        choose('head', '1');
        choose('level', '0');
        disabled();
        choose('head', 'all');
        choose('level', 'all');
        choose('query', '1');
        disabled();
        """,
    )
    # The backbone attends to the whole image, with merged heads; one head and one level have one color; a point has no
    # boxes.
    assert logged == ['', 'color zoom', 'color', 'boxes']
    one = [QueryView('point', np.array([3.0, 4]), None, layers[:1])]
    monkeypatch.setitem(globals(), 'make_queries', lambda: one)
    document = browse(tmp_path)
    disabled = re.findall(r'id="(\w+)"[^>]* disabled=""', document)
    assert disabled == ['query', 'layer', 'color', 'zoom', 'boxes', 'others']


@needs_browser
def test_clicking_a_box_selects_its_query(tmp_path, monkeypatch):
    layers = (cells(), sampled('decoder.0', 'decoder', seed=1))
    boxes = {'left': (2, 2, 30, 60), 'inside left': (5, 5, 15, 25), 'right': (60, 5, 98, 70)}
    queries = [
        QueryView(name, np.array([0.5, 0.5]) * (box[0] + box[2], box[1] + box[3]), np.array(box, float), layers)
        for name, box in boxes.items()
    ]
    queries.append(QueryView('point', np.array([45.0, 75]), None, layers[:1]))
    monkeypatch.setitem(globals(), 'make_queries', lambda: queries)
    logged = values_after(
        tmp_path,
        """
        choose('zoom', false);
        const at = (x, y) => { click(x, y); log(value('query')); };
        at(80, 65);   // right
        at(50, 30);   // no box
        choose('layer', 'backbone.attn');  // its cells cover the image
        at(25, 55);   // left
        at(10, 10);   // inside left, the smaller of two
        at(10, 10);   // the larger one
        at(46, 74);   // the point
        choose('others', false);
        at(80, 65);   // hidden
        """,
        'query=0',
    )
    assert logged == ['2', '2', '0', '1', '0', '3', '3']


@needs_browser
def test_the_status_names_the_largest_and_the_uniform_weight(tmp_path):
    document = browse(tmp_path, 'query=0&layer=backbone.attn&level=1&head=2')
    assert '4 cells · max weight 0.40, uniform 0.25<' in document
    document = browse(tmp_path, 'query=0&layer=backbone.attn&level=0&head=1')
    assert '2 cells · max weight 0.50, uniform 0.50 (nearly uniform)<' in document
