"""Steps with NaN or infinite losses or gradients are skipped, named and leave nothing behind."""

import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import mmengine.optim.optimizer.amp_optimizer_wrapper as amp
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from msda_plugin import compat
from msda_plugin.engine.hooks import NonFiniteError, SkipNonFiniteHook
from msda_plugin.engine.runner import DetectionRunner

MAIN_JOB = Path(__file__).parents[3] / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
NAN = float('nan')


class Poisonable(BaseModel):
    """A layer with batch statistics; a sample says what it damages."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def forward(self, inputs, data_samples, mode='tensor'):
        poison = {sample.get('poison') for sample in data_samples}
        outputs = self.layers(torch.stack(inputs) * (NAN if 'input' in poison else 1))
        if 'gradient' in poison:
            outputs.register_hook(lambda grad: grad * float('inf'))
        loss = outputs.square().mean() + (NAN if 'loss' in poison else 0)
        return dict(loss_a=loss, loss_b=torch.ones(()))


def samples(count, poison=()):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.rand(3, generator=generator) for _ in range(count)]
    return [
        dict(inputs=x, data_samples=BaseDataElement(metainfo=dict(img_path=f'{i}.jpg', poison=dict(poison).get(i))))
        for i, x in enumerate(drawn)
    ]


def make_runner(folder, dataset, batch_size=2, epochs=1, wrapper=None, hook=None, model=None, runner_type=None, **kw):
    make_runner.count = getattr(make_runner, 'count', 0) + 1
    wrapper = dict(wrapper or {})
    wrapper.setdefault('optimizer', dict(type='AdamW', lr=1e-2, fused=True))
    return (runner_type or DetectionRunner)(
        model or Poisonable(),
        str(folder),
        train_dataloader=dict(
            batch_size=batch_size, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        cfg=Config({}),
        optim_wrapper=wrapper,
        default_hooks=dict(skip_non_finite=hook) if hook else None,
        custom_hooks=[dict(type='EMAHook', momentum=0.1)],
        experiment_name=f'{folder.name}_{make_runner.count}',
        log_level='WARNING',
        **kw,
    )


def state(runner):
    """Everything that a checkpoint holds of model, averaged model and optimizer."""
    (ema,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
    return dict(
        model=runner.model.state_dict(), ema=ema.ema_model.state_dict(), optimizer=runner.optim_wrapper.state_dict()
    )


def leaves(node, name=''):
    if isinstance(node, (dict, list, tuple)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(child, f'{name}/{key}')
    else:
        yield name, node


def assert_equal(one, other, without=()):
    one, other = dict(leaves(one)), dict(leaves(other))
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        if not name.startswith(tuple(without)):
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, (name, value, other[name])


def said(runner):
    lines = []
    runner.logger.addFilter(lambda record: lines.append(record.getMessage()) or True)
    return lines


@pytest.fixture
def mixed_precision(monkeypatch):
    """MMEngine's ``AmpOptimWrapper`` on the CPU, where it refuses to run: bfloat16 with a scaled loss."""
    monkeypatch.setattr(amp, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp, 'GradScaler', partial(torch.amp.GradScaler, device='cpu'))
    return dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(init_scale=1024.0))


WRAPPERS = {
    'clipping': dict(clip_grad=dict(max_norm=0.1)),
    'no clipping': {},
    'clipping by value': dict(clip_grad=dict(type='value', clip_value=0.1)),
    'SGD with momentum': dict(optimizer=dict(type='SGD', lr=1e-2, momentum=0.9, weight_decay=1e-2)),
}


def run_both(tmp_path, kind, wrapper, count=60, at=(0, 7, 8, 30, 59), accumulate=1):
    """A training with poisoned samples, and one from whose data their whole steps are missing."""
    poison = {2 * accumulate * step + 1: kind for step in at}
    data = samples(2 * accumulate * count, poison)
    missing = {2 * accumulate * step + i for step in at for i in range(2 * accumulate)}
    wrapper = dict(wrapper, accumulative_counts=accumulate)
    poisoned = make_runner(tmp_path / 'poisoned', data, wrapper=wrapper)
    messages = said(poisoned)
    poisoned.train()
    clean = make_runner(tmp_path / 'clean', [one for i, one in enumerate(data) if i not in missing], wrapper=wrapper)
    clean.train()
    return poisoned, clean, [line for line in messages if 'the step is skipped' in line]


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('kind', ['input', 'loss', 'gradient'])
def test_a_poisoned_step_leaves_nothing_behind(kind, wrapper, tmp_path):
    poisoned, clean, messages = run_both(tmp_path, kind, WRAPPERS[wrapper])
    assert_equal(state(poisoned), state(clean))
    assert len(messages) == 5
    what = 'gradients' if kind == 'gradient' else 'losses (loss, loss_a)'
    assert messages[1].startswith(f'iteration 8: NaN or infinite {what}; the step is skipped. ')
    assert messages[1].endswith('Images: 14.jpg, 15.jpg')


def test_a_thousand_steps(tmp_path):
    at = [step for step in range(1000) if step % 7 == 3 or 500 <= step < 509]
    poisoned, clean, messages = run_both(tmp_path, 'input', WRAPPERS['clipping'], 1000, at)
    assert_equal(state(poisoned), state(clean))
    assert len(messages) == len(at) > 140


@pytest.mark.parametrize('kind', ['input', 'loss'])
def test_mixed_precision_keeps_its_loss_scale(kind, mixed_precision, tmp_path):
    poisoned, clean, messages = run_both(tmp_path, kind, dict(mixed_precision, clip_grad=dict(max_norm=0.1)))
    assert_equal(state(poisoned), state(clean))
    assert len(messages) == 5 and poisoned.optim_wrapper.loss_scaler.get_scale() == 1024


def test_an_overflow_of_mixed_precision_lowers_the_scale(mixed_precision, tmp_path):
    # Twelve halvings of 1024 give 0.25: steps count as soon as the scale is below 1.
    data = samples(40, {2 * step: 'gradient' for step in range(12)})
    runner = make_runner(tmp_path, data, wrapper=mixed_precision)
    messages = said(runner)
    runner.train()
    messages = [line for line in messages if 'the step is skipped' in line]
    assert runner.optim_wrapper.loss_scaler.get_scale() == 0.25
    assert [line.split(':')[0] for line in messages] == ['iteration 11', 'iteration 12']
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


def test_schedulers_do_not_warn(tmp_path, recwarn):
    schedule = dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=2)
    make_runner(tmp_path, samples(8), param_scheduler=[schedule]).train()
    assert not [warning for warning in recwarn if 'has been overridden' in str(warning.message)]


def test_a_fixed_loss_scale(mixed_precision, tmp_path):
    """It cannot be lowered, so every overflow counts."""
    data = samples(40, {2 * step: 'gradient' for step in range(20)})
    runner = make_runner(tmp_path, data, wrapper=dict(mixed_precision, loss_scale=1024.0))
    with pytest.raises(NonFiniteError, match='stopped after 10 steps in a row .* NaN or infinite gradients'):
        runner.train()


def test_accumulated_gradients(tmp_path):
    poisoned, clean, messages = run_both(tmp_path, 'input', WRAPPERS['clipping'], at=(2, 3), count=10, accumulate=3)
    # EMAHook averages after every iteration, also without a step.
    assert_equal(state(poisoned), state(clean), without=['/ema'])
    assert [line.partition(': ')[0] for line in messages] == ['iteration 7', 'iteration 10']
    assert messages[0].endswith('Images: 12.jpg, 13.jpg')  # not those of the other two iterations


@pytest.mark.parametrize('poisoned_at', [0, 5])
def test_accumulation_beyond_an_epoch(poisoned_at, tmp_path):
    """Steps of 4 iterations, epochs of 6: the second step has iterations of both."""
    data = samples(12, {2 * poisoned_at: 'input'})
    runner = make_runner(tmp_path, data, epochs=2, wrapper=dict(accumulative_counts=4))
    messages = said(runner)
    runner.train()
    skipped = [line.partition(':')[0] for line in messages if 'the step is skipped' in line]
    assert skipped == (['iteration 1', 'iteration 7'] if poisoned_at == 0 else ['iteration 6', 'iteration 12'])
    for name, value in runner.model.state_dict().items():
        assert value.isfinite().all(), name


def test_the_logged_losses_stay_finite(tmp_path):
    poisoned, _, _ = run_both(tmp_path, 'gradient', WRAPPERS['clipping'], at=(3,), count=6)
    scalars = poisoned.message_hub.log_scalars
    for name, length in (('loss', 6), ('grad_norm', 5)):
        values, counts = scalars[f'train/{name}'].data
        assert len(values) == len(counts) == length and torch.tensor(values).isfinite().all()


def test_stops_after_several_in_a_row(tmp_path):
    poison = {2 * step: 'input' for step in (1, 2, *range(5, 20))}
    runner = make_runner(tmp_path, samples(40, poison), hook=dict(type='msda_plugin.SkipNonFiniteHook', stop_after=3))
    with pytest.raises(NonFiniteError) as stopped:
        runner.train()
    sentence = str(stopped.value)
    assert sentence.startswith('stopped after 3 steps in a row with NaN or infinite losses or gradients (last: ')
    assert 'iteration 8, NaN or infinite losses (loss, loss_a), images 14.jpg, 15.jpg)' in sentence
    assert f'{tmp_path}/stopped_iter_8.pth' in sentence and 'no checkpoint to resume from yet' in sentence
    saved = torch.load(tmp_path / 'stopped_iter_8.pth', weights_only=False)
    clean = make_runner(tmp_path / 'clean', [one for i, one in enumerate(samples(10)) if i not in (2, 3, 4, 5)])
    clean.train()
    expected = state(clean)
    assert_equal(saved['state_dict'], {k[7:]: v for k, v in expected['ema'].items() if k.startswith('module.')})
    assert_equal(saved['optimizer'], expected['optimizer'])


def test_the_last_checkpoint_is_named(tmp_path):
    model = Poisonable()
    runner = make_runner(tmp_path, samples(40), epochs=2, model=model)
    runner.register_hook(PoisonSecondEpoch())
    with pytest.raises(NonFiniteError, match=f'--resume continues from {tmp_path}/epoch_1.pth'):
        runner.train()


class PoisonSecondEpoch(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == 1:
            for sample in data_batch['data_samples']:
                sample.set_metainfo(dict(poison='input'))


def test_switched_off_and_on(tmp_path):
    data = samples(8, {2: 'input'})
    off = make_runner(tmp_path / 'off', data)
    off._hooks = [hook for hook in off.hooks if not isinstance(hook, SkipNonFiniteHook)]
    off.train()
    assert not all(torch.isfinite(p).all() for p in off.model.parameters())
    on = make_runner(tmp_path / 'on', data, runner_type=Runner)  # MMEngine's, with the hook in the config
    on.register_hook(dict(type='msda_plugin.SkipNonFiniteHook'))
    on.train()
    assert all(torch.isfinite(p).all() for p in on.model.parameters())
    assert 'step' not in vars(on.optim_wrapper) and 'backward' not in vars(on.optim_wrapper)
    with pytest.raises(ValueError, match='stop_after must be at least 1, got 0'):
        SkipNonFiniteHook(0)


def test_a_training_that_fails_leaves_nothing_replaced(tmp_path):
    from mmdet.models.task_modules.assigners import hungarian_assigner

    before = hungarian_assigner.linear_sum_assignment
    seen = []

    class Fails(Hook):
        def before_train_iter(self, *args, **kwargs):
            seen.append(hungarian_assigner.linear_sum_assignment)
            raise RuntimeError('stops here')

    runner = make_runner(tmp_path, samples(4))
    runner.register_hook(Fails())
    with pytest.raises(RuntimeError, match='stops here'):
        runner.train()
    assert seen[0] is not before and hungarian_assigner.linear_sum_assignment is before


def test_assigners_match_non_finite_predictions():
    from mmdet.registry import TASK_UTILS
    from mmengine.structures import InstanceData

    assigner = TASK_UTILS.build(
        dict(type='mmdet.HungarianAssigner', match_costs=[dict(type='mmdet.BBoxL1Cost', weight=1.0)])
    )
    predictions = InstanceData(bboxes=torch.full((5, 4), NAN), scores=torch.rand(5, 2))
    objects = InstanceData(bboxes=torch.tensor([[1.0, 1, 5, 5], [2, 2, 8, 9]]), labels=torch.tensor([0, 1]))
    meta = dict(img_shape=(10, 10))
    with pytest.raises(ValueError, match='invalid numeric entries'):
        assigner.assign(predictions, objects, meta)
    with compat.match_non_finite_predictions():
        assert assigner.assign(predictions, objects, meta).num_gts == 2
    with pytest.raises(ValueError, match='invalid numeric entries'):
        assigner.assign(predictions, objects, meta)


@pytest.mark.parametrize('ours', [True, False])
def test_detectors_give_a_loss_for_non_finite_images(ours, tiny_stock_config):
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    init_default_scope('mmdet')
    cfg = Config.fromfile(str(MAIN_JOB if ours else tiny_stock_config)).model
    model = MODELS.build(cfg)
    objects = InstanceData(bboxes=torch.tensor([[1.0, 1, 50, 50], [20, 20, 60, 60]]), labels=torch.tensor([0, 1]))
    meta = dict(img_shape=(128, 128), batch_input_shape=(128, 128), ori_shape=(128, 128), scale_factor=(1, 1))
    batch = [DetDataSample(metainfo=meta, gt_instances=objects)]
    with pytest.raises((FloatingPointError, ValueError), match='NaN or infinite|invalid numeric entries'):
        model.loss(torch.full((1, 3, 128, 128), NAN), batch)
    with compat.match_non_finite_predictions():
        loss, _ = model.parse_losses(model.loss(torch.full((1, 3, 128, 128), NAN), batch))
        assert loss.isnan()
        loss.backward()


PROCESSES = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import torch
from mmengine.dist import get_rank
from test_skip_non_finite import make_runner, said, samples, state
torch.set_num_threads(1)
out = Path(sys.argv[1])
poison = {{3: 'input', 8: 'gradient', 12: 'loss'}} if sys.argv[2] == 'poisoned' else {{}}
data = [one for i, one in enumerate(samples(40, poison)) if poison or i // 4 not in (0, 2, 3)]
runner = make_runner(
    out, data, launcher='pytorch', wrapper=dict(clip_grad=dict(max_norm=0.1)),
    env_cfg=dict(dist_cfg=dict(backend='gloo')))
lines = said(runner)
runner.train()
torch.save(dict(state(runner), lines=lines), out / f'{{sys.argv[2]}}_{{get_rank()}}.pth')
"""


@pytest.mark.slow
def test_processes_skip_the_same_steps(tmp_path):
    """Batches of two processes: 0, 2 and 1, 3; 4, 6 and 5, 7; … Each poisoned sample is that of one process."""
    script = tmp_path / 'processes.py'
    script.write_text(PROCESSES.format(folder=str(Path(__file__).parent)))
    saved = {}
    for name in ('poisoned', 'clean'):
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = free.getsockname()[1]
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}']
        done = subprocess.run([*command, script, tmp_path, name], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        for rank in (0, 1):
            saved[name, rank] = torch.load(tmp_path / f'{name}_{rank}.pth', weights_only=False)
    for rank in (0, 1):
        # The statistics of a process are of its own images.
        one, other = saved['poisoned', rank], saved['clean', rank]
        lines = one.pop('lines')
        other.pop('lines')
        assert_equal(one, other)
        skipped = [line for line in lines if 'the step is skipped' in line]
        assert [line.split(':')[0] for line in skipped] == ['iteration 1', 'iteration 3', 'iteration 4']
        assert [line.rpartition(': ')[2] for line in skipped] == [
            '1.jpg, 3.jpg',
            '8.jpg, 10.jpg, 9.jpg, 11.jpg',
            '12.jpg, 14.jpg',
        ]
