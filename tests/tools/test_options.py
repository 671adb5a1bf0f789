"""Options of train and test that change the config."""

import pytest

from msda_plugin.engine.nms import NMS
from msda_plugin.tools import test as test_command
from msda_plugin.tools import train
from msda_plugin.tools.common import launch

CONFIG = 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
BCCD = 'configs/bccd/deformable-detr-two-stage_shunted-nano_1xb1-44e_bccd.py'


@pytest.fixture
def config_of(tmp_path, monkeypatch, request):
    """The config that a command builds its runner from."""
    monkeypatch.chdir(request.config.rootpath)
    (tmp_path / 'epoch_1.pth').touch()
    built = []

    def build_runner(cfg, *splits):
        built.append(cfg)
        raise ValueError('it is not built')

    monkeypatch.setattr(launch, 'build_runner', build_runner)

    def run(command, *argv):
        with pytest.raises(SystemExit):
            command.main([*argv, '--work-dir', str(tmp_path)])
        return built.pop()

    return run


def test_nms_of_a_test(config_of, tmp_path):
    argv = [CONFIG, str(tmp_path / 'epoch_1.pth')]
    assert config_of(test_command, *argv).model.test_cfg.nms == NMS
    assert config_of(test_command, *argv, '--nms').model.test_cfg.nms == NMS
    assert config_of(test_command, *argv, '--no-nms').model.test_cfg.nms is None


def test_nms_is_refused_for_other_heads(config_of, tmp_path, capsys):
    config = 'configs/shapes/mmdet-deformable-detr-two-stage_r18_1xb4-4e_shapes.py'
    with pytest.raises(IndexError):
        config_of(test_command, config, str(tmp_path / 'epoch_1.pth'), '--nms')
    assert 'for the heads of msda_plugin only' in capsys.readouterr().err


def test_verbose(config_of, tmp_path):
    assert config_of(train, CONFIG).verbose is False
    assert config_of(train, CONFIG, '--verbose').verbose is True
    assert config_of(test_command, CONFIG, str(tmp_path / 'epoch_1.pth'), '--verbose').verbose is True


def test_train_ap(config_of, tmp_path):
    assert config_of(train, CONFIG).custom_hooks == [dict(type='msda_plugin.TrainingReportHook')]
    report = dict(type='msda_plugin.TrainingReportHook', num_train_images=50)
    assert config_of(train, CONFIG, '--train-ap', '50').custom_hooks == [report]
    first, second = config_of(train, BCCD, '--train-ap', '50').custom_hooks
    assert first == report and second.type == 'EMAHook'
    path = tmp_path / 'config.py'
    path.write_text("model = dict(type='msda_plugin.ShuntedTransformer')\n")
    assert config_of(train, str(path), '--train-ap', '50').custom_hooks == [report]


def test_report_of_a_test(config_of, tmp_path):
    argv = [BCCD, str(tmp_path / 'epoch_1.pth')]
    own = config_of(test_command, *argv).custom_hooks
    page = dict(type='msda_plugin.DetectionReportHook', out_dir=None)
    assert config_of(test_command, *argv, '--report').custom_hooks == [*own, page]
    page['out_dir'] = str(tmp_path / 'page')
    assert config_of(test_command, *argv, '--report', page['out_dir']).custom_hooks == [*own, page]
    (tmp_path / 'file').touch()
    with pytest.raises(IndexError):
        config_of(test_command, *argv, '--report', str(tmp_path / 'file'))


@pytest.mark.parametrize(('value', 'dtype'), [('float32', None), ('bfloat16', 'bfloat16')])
def test_accelerate_of_a_test(config_of, tmp_path, value, dtype):
    argv = [CONFIG, str(tmp_path / 'epoch_1.pth')]
    hook = dict(type='msda_plugin.AccelerateHook', inference=True, dtype=dtype)
    before = config_of(test_command, *argv).get('custom_hooks') or []
    assert config_of(test_command, *argv, '--accelerate', value).custom_hooks == [*before, hook]
