"""The documentation builds without warnings, and the reference contains every public name."""

import html
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {  # page of docs/api -> package whose public names it documents
    'detector': 'engine.detector',
    'ops': 'ops',
    'layers': 'layers',
    'backbones': 'backbones',
    'necks': 'necks',
    'heads': 'heads',
    'detectors': 'detectors',
    'convert': 'convert',
    'hooks': 'engine.hooks',
    'visualization': 'visualization',
    'costs': 'costs',
}


CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
# Measures the page in a browser; the result becomes an attribute of the body.
MEASURE = """<script>addEventListener('load', () => setTimeout(() => {
    const long = [...document.querySelectorAll('pre code')].filter(code => code.scrollWidth > code.clientWidth + 1);
    document.body.setAttribute('data-measured', JSON.stringify({
        page: document.documentElement.scrollWidth, window: innerWidth, long: long.length,
        stuck: long.filter(code => !['auto', 'scroll'].includes(getComputedStyle(code).overflowX)).length,
        image: (document.querySelector('article img') ?? document.body).getBoundingClientRect().bottom}));
}, 200));</script></body>"""


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The folder of the built site."""
    tmp_path = tmp_path_factory.mktemp('site')
    for package in ('mkdocs', 'material', 'mkdocstrings'):
        pytest.importorskip(package, reason=f'{package} is not installed; pip install -r requirements/docs.txt')
    shutil.copytree(ROOT / 'docs', tmp_path / 'docs')
    shutil.copy(ROOT / 'mkdocs.yml', tmp_path)
    (tmp_path / 'msda_plugin').symlink_to(ROOT / 'msda_plugin')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / 'build' / 'site'


def test_builds_and_has_every_public_name(site):
    for name, package in PAGES.items():
        page = (site / 'api' / name / 'index.html').read_text()
        module = importlib.import_module(f'msda_plugin.{package}')
        public = [name for name in module.__all__ if callable(getattr(module, name))]
        missing = [p for p in public if not re.search(rf'id="msda_plugin\.{re.escape(package)}(\.\w+)?\.{p}"', page)]
        assert public and not missing, f'docs/api/{name}.md lacks {missing}'


def measure(site, page, width, tmp_path):
    """What `MEASURE` measures of a page in a window of this width (Chromium: at least 500) and height 1000."""
    path = site / page / 'measured.html'
    path.write_text((site / page / 'index.html').read_text().replace('</body>', MEASURE))
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--hide-scrollbars']
    flags += ['--virtual-time-budget=2000', f'--user-data-dir={tmp_path}', f'--window-size={width},1000', '--dump-dom']
    result = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=60)
    return json.loads(html.unescape(re.search(r'data-measured="(.*?)"', result.stdout)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason='needs a Chromium: apt-get install chromium')
@pytest.mark.parametrize('width', [500, 1400])
@pytest.mark.parametrize('page', ['', 'benchmarks', 'tutorials/own_data', 'api/layers'])
def test_long_lines_of_code_scroll(site, page, width, tmp_path):
    measured = measure(site, page, width, tmp_path)
    assert measured['page'] <= measured['window'] and not measured['stuck']
    assert measured['long'] or width > 500  # narrow windows have something to scroll


@pytest.mark.skipif(CHROMIUM is None, reason='needs a Chromium: apt-get install chromium')
def test_the_first_screen_has_commands_and_an_image(site, tmp_path):
    assert 0 < measure(site, '', 1400, tmp_path)['image'] <= 1000
    page = (site / 'index.html').read_text()
    assert page.index('.venv/bin/activate') < page.index('<img') < page.index('id="commands"')
