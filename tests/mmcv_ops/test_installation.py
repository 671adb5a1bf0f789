"""``python -m msda_plugin mmcv-ops`` on copies of mmcv without compiled operators."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from msda_plugin.mmcv_ops import installation
from msda_plugin.tools import mmcv_ops as tool

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mmcv(tmp_path, monkeypatch):
    """The folder of an mmcv that has only the files that are looked at; it is found in place of the installed one."""
    folder = tmp_path / 'mmcv'
    for name, text in {
        '__init__.py': '',
        'ops/__init__.py': '',
        'ops/nms.py': "ext_module = ext_loader.load_ext('_ext', ['nms', 'softnms', 'nms_rotated'])",
        'ops/roi_align.py': "ext_module = ext_loader.load_ext('_ext', ['roi_align_forward', 'roi_align_backward'])",
        'utils/ext_loader.py': '',
    }.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    find_as_installed(monkeypatch, folder)
    return folder


def find_as_installed(monkeypatch, folder):
    spec = None
    if folder is not None:
        spec = importlib.util.spec_from_file_location(
            'mmcv', folder / '__init__.py', submodule_search_locations=[str(folder)]
        )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec if name == 'mmcv' else find_spec(name))


def run(command, capsys):
    code = tool.main([command])
    out, err = capsys.readouterr()
    return code, out + err


def test_install_and_remove(mmcv, capsys):
    before = sorted(mmcv.rglob('*'))
    assert run('status', capsys)[0] == 1
    code, said = run('install', capsys)
    assert code == 0 and said.startswith('mmcv now uses the operators of msda_plugin')
    assert (mmcv / '_ext.py').read_text() == installation.SUBSTITUTE
    assert (mmcv / '_ext.py').stat().st_mode & 0o777 == 0o644
    assert run('install', capsys) == (0, f'mmcv already uses the operators of msda_plugin: {mmcv}/_ext.py.\n')
    assert run('status', capsys)[0] == 0
    assert run('remove', capsys) == (0, f'Removed {mmcv}/_ext.py.\n')
    assert run('remove', capsys) == (0, f'There is nothing to remove in {mmcv}.\n')
    assert sorted(mmcv.rglob('*')) == before


def test_install_replaces_an_older_substitute(mmcv, capsys):
    (mmcv / '_ext.py').write_text(installation.MARKER + '\nan older version')
    assert run('install', capsys)[0] == 0
    assert (mmcv / '_ext.py').read_text() == installation.SUBSTITUTE


def test_compiled_operators_win(mmcv, capsys):
    run('install', capsys)
    shutil.copy(torch._C.__file__, mmcv / f'_ext{EXTENSION_SUFFIXES[0]}')  # a library that loads
    code, said = run('install', capsys)
    assert code == 0 and said.startswith('mmcv has compiled operators') and said.endswith('Nothing was installed.\n')
    assert {row.runs for row in installation.status()} == {'compiled mmcv'}
    assert run('status', capsys)[0] == 0
    assert run('remove', capsys)[0] == 0  # the substitute from before
    assert [path.name for path in mmcv.glob('_ext*')] == [f'_ext{EXTENSION_SUFFIXES[0]}']


def test_compiled_operators_that_do_not_load(mmcv, capsys):
    """As after a change of torch."""
    library = mmcv / f'_ext{EXTENSION_SUFFIXES[0]}'
    library.write_bytes(b'no library')
    code, said = run('install', capsys)
    assert code == 2 and said.startswith(f'msda_plugin mmcv-ops: mmcv was compiled for another torch ({library}: ')
    assert said.endswith(f'{installation.REINSTALL}, then {installation.INSTALL}\n') and said.count('\n') == 1
    code, said = run('status', capsys)
    assert code == 1 and 'not available: mmcv was compiled for another torch' in said and 'all operators' in said


def test_compiled_operators_without_torch(mmcv, capsys, monkeypatch):
    (mmcv / f'_ext{EXTENSION_SUFFIXES[0]}').touch()
    monkeypatch.setitem(sys.modules, 'torch', None)
    code, said = run('install', capsys)
    assert code == 2 and 'torch cannot be imported' in said and said.count('\n') == 1


def test_operators_compiled_for_another_python_do_not_count(mmcv, capsys):
    (mmcv / '_ext.cpython-27-x86_64-linux-gnu.so').touch()
    assert run('install', capsys)[0] == 0
    assert (mmcv / '_ext.py').is_file()


def test_status_names_what_runs(mmcv, capsys):
    installation.install()
    rows = {(row.operator, row.device): row for row in installation.status()}
    assert rows['softnms', 'cpu'].runs == 'PyTorch'
    assert rows['roi_align', 'cpu'].runs in ('PyTorch', 'torchvision')
    assert rows['nms_rotated', 'all'].runs == 'not available'
    said = run('status', capsys)[1]
    assert 'roi_align' in said and 'nms_rotated' in said.partition('not available')[2]


def test_status_without_torch(mmcv, capsys, monkeypatch):
    installation.install()
    monkeypatch.setitem(sys.modules, 'torch', None)
    code, said = run('status', capsys)
    assert code == 1 and 'not available: ModuleNotFoundError' in said


@pytest.mark.parametrize('command', ('install', 'remove', 'status'))
def test_no_mmcv(monkeypatch, capsys, command):
    find_as_installed(monkeypatch, None)
    monkeypatch.setattr(metadata, 'distributions', lambda name: [])
    code, said = run(command, capsys)
    assert code == 2 and said.startswith('msda_plugin mmcv-ops: mmcv is not installed') and said.count('\n') == 1


def test_mmcv_without_its_files(monkeypatch, capsys):
    find_as_installed(monkeypatch, None)
    distributions = metadata.distributions
    monkeypatch.setattr(metadata, 'distributions', lambda name: distributions(name='pip') if 'lite' in name else [])
    code, said = run('install', capsys)
    assert code == 2 and 'mmcv-lite is installed, but its files are missing: pip install --force-reinstall' in said


def test_incomplete_mmcv(mmcv, capsys):
    (mmcv / 'ops/__init__.py').unlink()
    for command in ('install', 'status'):
        code, said = run(command, capsys)
        assert code == 2 and 'is incomplete, ops/__init__.py is missing' in said and said.count('\n') == 1
    assert not (mmcv / '_ext.py').exists()


def test_remove_after_mmcv_was_uninstalled(mmcv, capsys):
    """pip leaves the file that it did not install."""
    installation.install()
    for path in mmcv.iterdir():
        if path.name != '_ext.py':
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run('install', capsys)[0] == 2
    assert run('remove', capsys)[0] == 0
    assert not list(mmcv.iterdir())


@pytest.mark.parametrize('command', ('install', 'remove'))
def test_foreign_file_is_left_alone(mmcv, capsys, command):
    (mmcv / '_ext.py').write_text('nms = None\n')
    code, said = run(command, capsys)
    assert code == 2 and 'was not written by msda_plugin' in said and said.count('\n') == 1
    assert (mmcv / '_ext.py').read_text() == 'nms = None\n'
    assert run('status', capsys)[0] == 1


def test_read_only_folder(mmcv, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'write_text', refuse)
    code, said = run('install', capsys)
    assert code == 2 and f'{mmcv} is not writable (Permission denied)' in said and said.count('\n') == 1


def test_remove_from_a_read_only_folder(mmcv, capsys, monkeypatch):
    installation.install()

    def refuse(*args, **kwargs):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(Path, 'unlink', refuse)
    code, said = run('remove', capsys)
    assert code == 2 and f'{mmcv} is not writable (Read-only file system)' in said and said.count('\n') == 1


@pytest.mark.parametrize('half', (False, True), ids=('uninstalled', 'half-installed'))
def test_import_after_msda_plugin_was_uninstalled(mmcv, half):
    installation.install()
    if half:
        (mmcv.parent / 'msda_plugin').mkdir()
    program = f'import sys; sys.path.insert(0, {str(mmcv.parent)!r}); import mmcv._ext'
    done = subprocess.run([sys.executable, '-I', '-S', '-c', program], capture_output=True, text=True)
    *_, said = done.stderr.splitlines()
    assert said.startswith('ImportError: mmcv was installed without compiled operators and msda_plugin, which provided')
    assert said.endswith(f'install msda_plugin again, or delete {mmcv}/_ext.py and compile mmcv')
    assert done.stderr.count('Error') == 2  # the name and the cause in brackets: no chain of exceptions


def test_failed_write_leaves_nothing(mmcv, capsys, monkeypatch):
    def refuse(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'replace', refuse)
    assert run('install', capsys)[0] == 2
    assert not [path for path in mmcv.iterdir() if 'ext' in path.name]


def test_wrong_usage_exits_with_2():
    with pytest.raises(SystemExit) as caught:
        tool.main(['reinstall'])
    assert caught.value.code == 2


# ---- the real mmcv, in other processes ------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """A folder with a copy of the installed mmcv's Python files, to be put first on the path."""
    spec = importlib.util.find_spec('mmcv')
    if spec is None:
        pytest.skip('mmcv is not installed')
    site = tmp_path_factory.mktemp('site')
    shutil.copytree(
        spec.submodule_search_locations[0],
        site / 'mmcv',
        ignore=shutil.ignore_patterns('_ext*', '__pycache__', 'csrc', '.mim'),
    )
    return site


def python(site, *arguments, path=()):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (site, *path, ROOT))), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=site, capture_output=True, text=True)


@pytest.mark.slow
def test_mmcv_without_compiled_operators(site):
    use = 'import torch, mmcv.ops; print(mmcv.ops.nms(torch.rand(9, 4), torch.rand(9), 0.5)[0].shape[1])'
    assert 'mmcv._ext' in python(site, '-c', use).stderr
    done = python(site, '-m', 'msda_plugin', 'mmcv-ops', 'install')
    assert done.returncode == 0, done.stderr
    assert python(site, '-c', use).stdout == '5\n'
    # mmdet finds the operators, in this process and in a spawned one, though nothing imported msda_plugin
    spawned = python(
        site,
        '-c',
        'import multiprocessing, mmdet.models, sys\n'
        'from mmcv.ops import batched_nms\n'
        'from mmdet.models.dense_heads import base_dense_head as head\n'
        'assert head.batched_nms is batched_nms\n'
        'if __name__ == "__main__":\n'
        '    import torch\n'
        '    from mmcv.ops import nms\n'
        '    with multiprocessing.get_context("spawn").Pool(1) as pool:\n'
        '        print(pool.apply(nms, (torch.rand(9, 4), torch.rand(9), 0.5))[0].shape[1])\n',
    )
    assert spawned.stdout == '5\n', spawned.stderr
    gone = python(site, '-c', 'import sys; sys.modules["msda_plugin.mmcv_ops"] = None; import mmcv.ops')
    assert (
        gone.stderr.strip()
        .splitlines()[-1]
        .startswith(
            'ImportError: mmcv was installed without compiled operators and msda_plugin, which provided them, cannot be'
        )
    )
    information = 'from mmcv.utils import collect_env; print(collect_env()["MMCV Compiler"])'
    assert python(site, '-c', information).stdout.strip() == 'none: operators of msda_plugin'
    assert python(site, '-m', 'msda_plugin', 'mmcv-ops', 'remove').returncode == 0
    assert 'mmcv._ext' in python(site, '-c', use).stderr


@pytest.mark.slow
def test_compiled_extension_next_to_the_substitute_is_imported(site):
    compiled = importlib.util.find_spec('mmcv._ext')
    if compiled is None or compiled.origin.endswith('.py'):
        pytest.skip('mmcv has no compiled operators')
    assert python(site, '-m', 'msda_plugin', 'mmcv-ops', 'install').returncode == 0
    link = site / 'mmcv' / Path(compiled.origin).name
    link.symlink_to(compiled.origin)
    found = python(site, '-c', 'import torch, mmcv._ext; print(mmcv._ext.__file__)').stdout.strip()
    link.unlink()
    assert found == str(link)
