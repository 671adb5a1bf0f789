"""``--cfg-options``: values in every notation, misspelled keys, values that do not fit."""

import re

import pytest
from mmengine.config import Config, ConfigDict

from msda_plugin.tools.common.cfg_options import apply_cfg_options


@pytest.fixture
def cfg():
    return Config(
        dict(
            model=dict(backbone=dict(arch='tiny'), neck=None, test_cfg=dict(nms=dict(type='soft_nms'))),
            optim_wrapper=dict(loss_scale=512.0, optimizer=dict(lr=0.1)),
            param_scheduler=[dict(end=3), dict(end=4)],
            train_cfg=dict(max_epochs=8),
        )
    )


@pytest.mark.parametrize(
    'text, value',
    [
        ('5', 5),
        ('1e-4', 1e-4),
        ('none.json', 'none.json'),
        ('False', False),
        ('None', None),
        ('1,2', [1, 2]),
        ('(1,2)', (1, 2)),
        ('[(1,a),(2,b)]', [(1, 'a'), (2, 'b')]),
        ('/my data/coco', '/my data/coco'),
        ('epoch_{}.pth', 'epoch_{}.pth'),
        ('{}.pth', '{}.pth'),
        ("dict(type='nms')", dict(type='nms')),
        ("dict(type='nms', iou_threshold=0.5)", dict(type='nms', iou_threshold=0.5)),
        ("{'type': 'nms', 'sizes': (1, 2)}", dict(type='nms', sizes=(1, 2))),
        ("[dict(type='A'), dict(type='B', of=dict(x=-1))]", [dict(type='A'), dict(type='B', of=dict(x=-1))]),
        ('a=b', 'a=b'),
    ],
)
def test_values(cfg, text, value):
    apply_cfg_options(cfg, [f'data_root={text}'])
    assert cfg.data_root == value and type(cfg.data_root) in (type(value), ConfigDict)


@pytest.mark.parametrize('option', ['foo', '=1', 'a..b=1', ''])
def test_no_key_and_value(cfg, option):
    with pytest.raises(
        ValueError, match=re.escape(f"takes KEY=VALUE, such as train_cfg.max_epochs=12; got '{option}'")
    ):
        apply_cfg_options(cfg, [option])


@pytest.mark.parametrize(
    'text', ["dict(type='nms'", 'dict(nms)', 'f(a,b)', '[1,2', "dict(type=open('x'))", 'dict(**{})']
)
def test_values_that_cannot_be_read(cfg, text):
    with pytest.raises(ValueError, match=r'cannot read the value of model.test_cfg.nms, .* model.test_cfg.nms.FIELD='):
        apply_cfg_options(cfg, [f'model.test_cfg.nms={text}'])


def test_a_dict_is_merged(cfg):
    apply_cfg_options(cfg, ["model.test_cfg.nms=dict(type='nms', iou_threshold=0.5)", 'param_scheduler.1.end=5'])
    assert cfg.model.test_cfg.nms == dict(type='nms', iou_threshold=0.5)
    assert [scheduler.end for scheduler in cfg.param_scheduler] == [3, 5]
    apply_cfg_options(cfg, ['model.neck.type=FPN'])  # None becomes a dict
    assert cfg.model.neck == dict(type='FPN')


def test_a_first_key_that_is_not_in_the_config(cfg):
    with pytest.raises(ValueError, match=r"'mdoel' is not in the config; did you mean model.backbone.arch\?"):
        apply_cfg_options(cfg, ['mdoel.backbone.arch=base'])
    with pytest.raises(ValueError, match=r"'zzz' is not in the config; the config has model, optim_wrapper,"):
        apply_cfg_options(cfg, ['zzz=1'])
    assert cfg.model.backbone.arch == 'tiny' and 'mdoel' not in cfg


def test_fields_of_the_runner_need_not_be_in_the_config(cfg, capsys):
    options = ['load_from=a.pth', 'resume=True', 'randomness.seed=3', 'device=cpu', 'find_unused_parameters=True']
    apply_cfg_options(cfg, [*options, "custom_hooks=[dict(type='EMAHook')]", 'env_cfg.cudnn_benchmark=True'])
    assert (cfg.load_from, cfg.randomness.seed, cfg.custom_hooks[0].type) == ('a.pth', 3, 'EMAHook')
    assert capsys.readouterr().err == ''
    with pytest.raises(ValueError, match=r"'rseume' is not in the config; did you mean resume\?"):
        apply_cfg_options(cfg, ['rseume=True'])


def test_a_new_field_is_a_warning(cfg, capsys, monkeypatch):
    apply_cfg_options(cfg, ['train_cfg.max_epoch=1', 'model.backbnoe.arch=base', 'train_cfg._delete_=True'])
    first, second = capsys.readouterr().err.splitlines()
    assert 'train_cfg.max_epoch is not in the config, and is added; did you mean train_cfg.max_epochs?' in first
    assert 'model.backbnoe is not in the config, and is added; did you mean model.backbone?' in second
    monkeypatch.setenv('RANK', '1')  # one process of several
    apply_cfg_options(cfg, ['train_cfg.max_epcoh=1'])
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    'option, message',
    [
        ('param_scheduler.2.end=5', "param_scheduler is a list of 2, which takes an index below 2, got '2'"),
        ('param_scheduler.x.end=5', "param_scheduler is a list of 2, which takes an index below 2, got 'x'"),
        ('train_cfg.max_epochs.x=5', "train_cfg.max_epochs is 8, which has no field 'x'"),
        ('model=1', 'model is a dict; set one of its fields, such as model.backbone'),
        ('model.backbone=5', 'model.backbone is a dict; set one of its fields, such as model.backbone.arch'),
    ],
)
def test_a_value_that_does_not_fit(cfg, option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_cfg_options(cfg, [option])


def test_text_in_place_of_a_number_is_a_warning(cfg, capsys):
    apply_cfg_options(cfg, ['optim_wrapper.optimizer.lr=abc', 'optim_wrapper.loss_scale=dynamic'])
    (said,) = capsys.readouterr().err.splitlines()
    assert "optim_wrapper.optimizer.lr: the config has the number 0.1, got the text 'abc'" in said
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
