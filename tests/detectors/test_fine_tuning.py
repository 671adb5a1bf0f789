"""A checkpoint for other classes starts a training, with new class layers, and nothing else."""

import copy
import logging

import pytest
import torch
from detector_cases import WHOLE, build, deformable_detr_config, detr_config, make_images, make_samples
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from torch.utils.data import Dataset

from msda_plugin.engine.runner import DetectionRunner
from msda_plugin.heads import set_prediction
from msda_plugin.registry import MODELS

CASES = {
    'detr': (detr_config, {}, ['fc_cls']),
    'base': (deformable_detr_config, {}, ['cls_branches.0', 'cls_branches.1']),
    'two_stage': (
        deformable_detr_config,
        dict(with_box_refine=True, as_two_stage=True),
        ['cls_branches.0', 'cls_branches.1', 'cls_branches.2'],
    ),
}


def make(case, num_classes=3, **changes):
    config, fields, _ = CASES[case]
    config = config(**copy.deepcopy(fields), **changes)
    config['bbox_head']['num_classes'] = num_classes
    return config


def names_of(case):
    return [f'bbox_head.{name}' for name in CASES[case][2]]


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(set_prediction, 'print_log', lambda message, **how: messages.append((message, how['level'])))
    return messages


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def trained(case, num_classes=5):
    model = build(make(case, num_classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    return model


def assert_all_but_class_layers_loaded(model, source, case):
    class_layers = tuple(names_of(case))
    for name, value in model.state_dict().items():
        assert name.startswith(class_layers) or torch.equal(value, source[name]), name


def test_class_layers_start_anew_and_the_log_names_them(case, said):
    model, source = build(make(case)), trained(case).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = model.load_state_dict(source)  # strict
    assert not result.missing_keys and not result.unexpected_keys
    assert_all_but_class_layers_loaded(model, source, case)
    for name in names_of(case):
        assert torch.equal(model.state_dict()[f'{name}.weight'], before[f'{name}.weight'])
        assert torch.equal(model.state_dict()[f'{name}.bias'], before[f'{name}.bias'])
    ((message, level),) = said
    assert ', '.join(names_of(case)) in message and 'keep their initial' in message and level == logging.WARNING
    outputs = (6, 4) if case == 'detr' else (5, 3)
    assert f'have {outputs[0]} outputs there and {outputs[1]} here' in message
    assert model.bbox_head.new_class_layers == tuple(names_of(case))


def test_a_checkpoint_that_fits_is_loaded_whole(case, said):
    model, source = build(make(case)), trained(case, num_classes=3).state_dict()
    model.load_state_dict(trained(case).state_dict())
    model.load_state_dict(source)
    assert model.bbox_head.new_class_layers == () and len(said) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_what_else_does_not_fit_is_an_error(case):
    model, source = build(make(case)), trained(case).state_dict()
    name = 'query_embedding.weight' if 'query_embedding.weight' in source else 'pos_trans_fc.weight'
    source[name] = source[name][:-1]
    with pytest.raises(RuntimeError, match=f'size mismatch for {name}'):
        model.load_state_dict(source)
    wide = MODELS.build(make(case, 5, dims=64))
    with pytest.raises(RuntimeError, match=f'size mismatch for {names_of(case)[0]}.weight'):
        model.load_state_dict(wide.state_dict())


def test_by_mmengines_loader_and_prefix(case, said, tmp_path):
    source = trained(case).state_dict()
    torch.save(dict(state_dict={f'module.{name}': value for name, value in source.items()}), tmp_path / 'model.pth')
    model = build(make(case))
    load_checkpoint(model, str(tmp_path / 'model.pth'), strict=True)
    assert_all_but_class_layers_loaded(model, source, case)
    assert len(said) == 1


def test_init_cfg_loads_a_whole_detector(case, said, tmp_path):
    torch.save(dict(state_dict=trained(case).state_dict()), tmp_path / 'model.pth')
    model = build(make(case, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'model.pth'))))
    assert_all_but_class_layers_loaded(model, trained(case).state_dict(), case)
    for name in names_of(case):
        assert torch.equal(model.state_dict()[f'{name}.bias'], build(make(case)).state_dict()[f'{name}.bias'])
    assert len(said) == 1


class Pictures(Dataset):
    metainfo = dict(classes=('a', 'b', 'c'))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=make_images()[index % 2], data_samples=make_samples(WHOLE)[index % 2])


def make_runner(case, work_dir, load_from, resume=False, num_classes=3, runner=DetectionRunner, **fields):
    return runner(
        model=make(case, num_classes, data_preprocessor=dict(type='mmdet.DetDataPreprocessor')),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(type=Pictures),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=fields.pop('max_iters', 1)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1, filename_tmpl='{}.pth')),
        default_scope='mmdet',
        load_from=str(load_from),
        resume=resume,
        cfg=Config(dict()),
        log_level='WARNING',
        experiment_name=f'fine_tuning_{work_dir.name}',
        **fields,
    )


@pytest.mark.parametrize('runner', [Runner, DetectionRunner])
def test_a_runner_fine_tunes(case, runner, said, tmp_path):
    source = trained(case).state_dict()
    torch.save(dict(state_dict=source, meta={}), tmp_path / 'coco.pth')
    model = make_runner(case, tmp_path, tmp_path / 'coco.pth', runner=runner).train()
    assert_all_but_class_layers_loaded(model, source, case)
    assert len(said) == 1 and torch.load(tmp_path / '1.pth')['state_dict'].keys() == source.keys()


def test_other_classes_are_not_resumed_or_tested(said, tmp_path):
    torch.save(dict(state_dict=trained('detr', 3).state_dict(), meta={}), tmp_path / 'coco.pth')
    make_runner('detr', tmp_path, tmp_path / 'coco.pth').train()
    make_runner('detr', tmp_path / 'again', tmp_path / '1.pth', resume=True, max_iters=2).train()
    message = r'another number of classes \(bbox_head.fc_cls do not fit\), .* neither be resumed nor evaluated'
    with pytest.raises(ValueError, match=message):
        make_runner('detr', tmp_path / 'other', tmp_path / '1.pth', resume=True, max_iters=2, num_classes=5).train()
    tester = make_runner('detr', tmp_path / 'tested', tmp_path / '1.pth', num_classes=5)
    with pytest.raises(ValueError, match=message):
        tester.load_or_resume()
