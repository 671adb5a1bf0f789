"""The learning rate of a training that is resumed with more epochs than its schedule has."""

from mmengine.config import ConfigDict
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from msda_plugin.engine.messages import counted

EXTENDED = ('ConstantLR', 'CosineAnnealingLR', 'ExponentialLR', 'LinearLR', 'MultiStepLR', 'PolyLR', 'StepLR')


def warn_of_the_rest(runner: Runner) -> None:
    """Log the learning rate that a resumed training goes on with, if its schedule ends before it does.

    Args:
        runner: After the checkpoint was resumed.
    """
    if not runner.iter or not isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        return
    unit, done, length, iterations = _progress(runner)
    if done >= length:
        runner.logger.warning(
            f'the training already ended with {unit} {done}: nothing is left to train; set a higher train_cfg.max_'
            f'{_short(unit)} (--epochs with --data) to continue it'
        )
        return
    schedulers = runner.param_schedulers if isinstance(runner.param_schedulers, list) else []
    schedulers = [scheduler for scheduler in schedulers if scheduler.param_name == 'lr']
    left = [  # iterations until a scheduler ends
        (scheduler.end - scheduler._global_step) * (len(runner.train_dataloader) if scheduler.by_epoch else 1)
        for scheduler in schedulers
    ]
    if not schedulers or max(left) >= (length - done) * iterations:
        return
    group = runner.optim_wrapper.param_groups[0]
    rate = f'{group["lr"]:.3g} ({group["lr"] / (group["initial_lr"] or 1):.0%} of {group["initial_lr"]:.3g})'
    # The last step of a schedule is the one before its end.
    over = max(left) <= 1
    says = (
        f'the schedule has ended, and the learning rate stays at {rate}'
        if over
        else f'the schedule ends after {unit} {done + round(max(left) / iterations)}, from where the learning rate, '
        f'now {rate}, stays the same'
    )
    runner.logger.warning(
        f'resuming after {unit} {done} of {length}: {says}; add --extend to start the schedule anew over the last '
        f'{counted(length - done, unit)}'
    )


def extend_schedule(runner: Runner) -> None:
    """Start the learning rate schedule anew, from the base learning rate, over the rest of a resumed training.

    The schedule is that of the config, without its warm-up, stretched or shortened to the remaining epochs or
    iterations. Optimizer state, averaged weights and schedules of other values than the learning rate stay as they are.
    The number of schedulers stays the same, so that the training can be resumed again with or without this.

    Args:
        runner: After the checkpoint was resumed.

    Raises:
        ValueError: If nothing is left to train, there is no schedule, or a scheduler has no length to change.
    """
    if not isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        raise ValueError(f'--extend needs a loop by epochs or iterations, got {type(runner.train_loop).__name__}')
    unit, done, length, iterations = _progress(runner)
    if not runner.iter:
        raise ValueError(
            f'--extend continues a training, but there is no checkpoint in {runner.work_dir}; leave it out'
        )
    if done >= length:
        raise ValueError(
            f'--extend needs a longer training: the checkpoint is at {unit} {done}, and the training ends with {unit} '
            f'{length}; set a higher train_cfg.max_{_short(unit)} (--epochs with --data)'
        )
    written = runner.cfg.get('param_scheduler')
    written = [written] if isinstance(written, dict) and 'type' in written else written
    if not written or not isinstance(written, list) or not isinstance(runner.param_schedulers, list):
        raise ValueError('--extend needs param_scheduler, a list of schedulers for one optimizer, in the config')
    per_epoch = len(runner.train_dataloader)
    entries = [
        (index, cfg, 1 if not cfg.get('by_epoch', True) else per_epoch)  # iterations of one step
        for index, cfg in enumerate(written)
        if runner.param_schedulers[index].param_name == 'lr'
    ]
    warm_ups = [entry for entry in entries if _rises(entry[1])]
    others = [entry for entry in entries if not _rises(entry[1])]
    for index, cfg, _ in others:
        if _kind(cfg) not in EXTENDED:
            raise ValueError(
                f'--extend cannot change the length of param_scheduler.{index} ({_kind(cfg)}); it knows '
                f'{", ".join(EXTENDED)}'
            )
    # The schedule's own length in iterations, without a warm-up that comes first.
    ends = [_end(cfg) * step for _, cfg, step in others if _end(cfg)]
    start = min((cfg.get('begin', 0) * step for _, cfg, step in others), default=0)
    start = start if start <= max((cfg.get('end', 0) * step for _, cfg, step in warm_ups), default=0) else 0
    total = max(ends, default=_written_length(runner, unit, length) * iterations) - start
    rest = (length - done) * iterations

    for index, _, _ in warm_ups:
        scheduler = runner.param_schedulers[index]
        scheduler.end = min(scheduler.end, scheduler._global_step)
    for group in runner.optim_wrapper.param_groups:
        group['lr'] = group['initial_lr']
    for index, cfg, step in others:
        fitted = _fit(cfg, start // step, rest / total, max(1, round(rest / step)))
        runner.param_schedulers[index] = PARAM_SCHEDULERS.build(
            fitted, default_args=dict(optimizer=runner.optim_wrapper, epoch_length=per_epoch)
        )
    base = runner.optim_wrapper.param_groups[0]['initial_lr']
    runner.logger.info(
        f'resuming after {unit} {done} of {length}: the schedule starts anew over the last '
        f'{counted(length - done, unit)}, from the learning rate {base:.3g}'
    )


def _progress(runner: Runner) -> tuple[str, int, int, int]:
    """(unit, units done, units of the training, iterations per unit)."""
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        return 'epoch', loop.epoch, loop.max_epochs, len(loop.dataloader)
    return 'iteration', loop.iter, loop.max_iters, 1


def _short(unit: str) -> str:
    return {'epoch': 'epochs', 'iteration': 'iters'}[unit]


def _kind(cfg: ConfigDict) -> str:
    return (cfg['type'] if isinstance(cfg['type'], str) else cfg['type'].__name__).rpartition('.')[2]


def _rises(cfg: ConfigDict) -> bool:
    """Whether a scheduler is a warm-up."""
    kind = _kind(cfg)
    if kind == 'LinearLR':
        return cfg.get('start_factor', 1 / 3) < cfg.get('end_factor', 1.0)
    return kind == 'ConstantLR'


def _end(cfg: ConfigDict) -> int | None:
    return cfg.get('end') or (cfg.get('begin', 0) + cfg['T_max'] if cfg.get('T_max') else None)


def _written_length(runner: Runner, unit: str, length: int) -> int:
    """The length of the training in the config's file."""
    train_cfg = (runner.as_written or {}).get('train_cfg') or {}
    return train_cfg.get(f'max_{_short(unit)}') or length


def _fit(cfg: ConfigDict, start: int, scale: float, rest: int) -> ConfigDict:
    """A scheduler that begins at 0 instead of ``start``, with its fields multiplied by ``scale``; all in its steps."""

    def scaled(length: int) -> int:
        return max(1, round(length * scale))

    fitted = ConfigDict(cfg.copy())
    begin = max(0, round((cfg.get('begin', 0) - start) * scale))
    end = max(1, round((cfg['end'] - start) * scale)) if cfg.get('end') else rest
    fitted.begin, fitted.end = min(begin, end - 1), end
    for name in ('T_max', 'step_size'):
        if cfg.get(name):
            fitted[name] = scaled(cfg[name])
    if cfg.get('milestones'):
        fitted.milestones = [scaled(milestone) for milestone in cfg.milestones]
    return fitted
