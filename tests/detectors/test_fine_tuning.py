"""A checkpoint with another number of classes can start a training; loading it in any other way raises."""

import copy

import pytest
import torch
from detector_cases import WHOLE, build, deformable_detr_config, detr_config, make_images, make_samples
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner, load_checkpoint
from torch.utils.data import Dataset

from msda_plugin.engine.runner import DetectionRunner
from msda_plugin.heads.class_layers import adapt_class_layers
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


# ---- loading is strict ----------------------------------------------------------------------------------------------
def other_classes(case):
    return f'size mismatch for {names_of(case)[0]}.weight.*another number of classes .*set num_classes .*load_from'


@pytest.mark.parametrize('strict', [True, False])
def test_plain_loading_raises(case, strict):
    with pytest.raises(RuntimeError, match=other_classes(case)) as raised:
        build(make(case)).load_state_dict(trained(case).state_dict(), strict=strict)
    outputs = (6, 4) if case == 'detr' else (5, 3)
    assert f'({outputs[0]} outputs, the model has {outputs[1]})' in str(raised.value)
    assert '\n' not in str(raised.value)


def test_mmengines_loader_raises(case, tmp_path):
    torch.save(dict(state_dict={f'module.{k}': v for k, v in trained(case).state_dict().items()}), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match=other_classes(case)):
        load_checkpoint(build(make(case)), str(tmp_path / 'a.pth'))  # logs other mismatches


def test_init_detector_raises(case, tmp_path):
    from mmdet.apis import init_detector

    cfg = Config(dict(model=make(case), default_scope='mmdet', test_dataloader=dict(dataset=dict())))
    for num_classes in (3, 5):
        meta = dict(dataset_meta=dict(classes=['a', 'b', 'c']))
        source = dict(state_dict=trained(case, num_classes).state_dict(), meta=meta)
        torch.save(source, tmp_path / f'{num_classes}.pth')
    model = init_detector(cfg, str(tmp_path / '3.pth'), device='cpu', palette='random')
    assert torch.equal(next(model.parameters()), next(trained(case, 3).parameters()))
    with pytest.raises(RuntimeError, match=other_classes(case)):
        init_detector(cfg, str(tmp_path / '5.pth'), device='cpu', palette='random')


def test_init_cfg_raises(case, tmp_path):
    torch.save(dict(state_dict=trained(case).state_dict()), tmp_path / 'model.pth')
    with pytest.raises(RuntimeError, match=other_classes(case)):
        build(make(case, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'model.pth'))))
    torch.save(dict(state_dict=trained(case, 3).state_dict()), tmp_path / 'model.pth')
    build(make(case, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'model.pth'))))


def test_other_mismatches_are_errors(case):
    model, source = build(make(case)), trained(case, 3).state_dict()
    name = 'query_embedding.weight' if 'query_embedding.weight' in source else 'pos_trans_fc.weight'
    source[name] = source[name][:-1]
    with pytest.raises(RuntimeError, match=f'size mismatch for {name}'):
        model.load_state_dict(source)
    wide = MODELS.build(make(case, 5, dims=64))
    with pytest.raises(RuntimeError, match=f'size mismatch for {names_of(case)[0]}.weight'):
        model.load_state_dict(wide.state_dict())


# ---- adapting is explicit -------------------------------------------------------------------------------------------
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_class_layers_are_adapted(case, prefix):
    model, source = build(make(case)), trained(case).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state_dict = {prefix + name: value for name, value in source.items()}
    outputs = (6, 4) if case == 'detr' else (5, 3)
    assert adapt_class_layers(state_dict, model) == dict.fromkeys(names_of(case), outputs)
    model.load_state_dict({name.removeprefix(prefix): value for name, value in state_dict.items()})
    assert_all_but_class_layers_loaded(model, source, case)
    for name in names_of(case):
        assert torch.equal(model.state_dict()[f'{name}.weight'], before[f'{name}.weight'])
        assert torch.equal(model.state_dict()[f'{name}.bias'], before[f'{name}.bias'])


def test_a_checkpoint_that_fits_is_not_adapted(case):
    model, source = build(make(case)), trained(case, 3).state_dict()
    state_dict = dict(source)
    assert adapt_class_layers(state_dict, model) == {}
    assert all(state_dict[name] is value for name, value in source.items())


def test_only_the_head_is_adapted(case):
    head, source = build(make(case)).bbox_head, trained(case).bbox_head.state_dict()
    assert list(adapt_class_layers(source, head)) == [name.removeprefix('bbox_head.') for name in names_of(case)]
    head.load_state_dict(source)


class Images(Dataset):
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
            dataset=dict(type=Images),
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


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(MMLogger, 'warning', lambda self, message, *args: messages.append(message))
    return messages


@pytest.mark.parametrize(
    'fields',
    [
        dict(),
        dict(custom_hooks=[dict(type='EMAHook')]),
        dict(runner=Runner, custom_hooks=[dict(type='msda_plugin.FineTuningHook')]),
    ],
    ids=['DetectionRunner', 'EMAHook', 'Runner'],
)
def test_load_from_fine_tunes_and_names_the_layers(case, fields, said, tmp_path):
    source = trained(case).state_dict()
    torch.save(dict(state_dict=source, meta={}), tmp_path / 'coco.pth')
    model = make_runner(case, tmp_path, tmp_path / 'coco.pth', **fields).train()
    assert_all_but_class_layers_loaded(model, source, case)
    (message,) = [message for message in said if 'another number of classes' in message]
    outputs = '6 outputs, now 4' if case == 'detr' else '5 outputs, now 3'
    assert all(f'{name} ({outputs})' in message for name in names_of(case))
    assert torch.load(tmp_path / '1.pth')['state_dict'].keys() == source.keys()


def test_without_the_hook_load_from_raises(tmp_path):
    torch.save(dict(state_dict=trained('detr').state_dict(), meta={}), tmp_path / 'coco.pth')
    with pytest.raises(RuntimeError, match=other_classes('detr')):
        make_runner('detr', tmp_path, tmp_path / 'coco.pth', runner=Runner).train()


def test_resuming_and_testing_are_strict(tmp_path):
    torch.save(dict(state_dict=trained('detr', 3).state_dict(), meta={}), tmp_path / 'coco.pth')
    make_runner('detr', tmp_path, tmp_path / 'coco.pth').train()
    make_runner('detr', tmp_path / 'again', tmp_path / '1.pth', resume=True, max_iters=2).train()
    with pytest.raises(RuntimeError, match=other_classes('detr')):
        make_runner('detr', tmp_path / 'other', tmp_path / '1.pth', resume=True, max_iters=2, num_classes=5).train()
    tester = make_runner('detr', tmp_path / 'tested', tmp_path / '1.pth', num_classes=5)
    with pytest.raises(RuntimeError, match=other_classes('detr')):
        tester.load_or_resume()
