"""``train --data`` before the training: check the data, print a summary, write the config."""

import argparse
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

from mmengine.config import Config

from msda_plugin.engine.checkpoint_files import check_classes, last_checkpoint, latest_complete_checkpoint, no_file
from msda_plugin.engine.config_check import check_fields
from msda_plugin.engine.config_walk import without_pretrained
from msda_plugin.engine.messages import counted
from msda_plugin.engine.model_zoo import download_weights, find_model
from msda_plugin.tools.common.cfg_options import apply_cfg_options
from msda_plugin.tools.common.launch import check_device, check_folder
from msda_plugin.tools.common.progress import progress
from msda_plugin.tools.custom_data import coco, formats
from msda_plugin.tools.custom_data.budget import earlier_plan, measure_speed, plan_training
from msda_plugin.tools.custom_data.config import DEFAULT_MODEL, Choices, Data, build_config, save_config
from msda_plugin.tools.custom_data.recipe import measure_objects
from msda_plugin.tools.custom_data.starter import choose_weights
from msda_plugin.tools.custom_data.training_images import draw_training_images

FOR_TRAINING = 0.97  # of the minutes that are left


def prepare(args: argparse.Namespace) -> Config:
    """Check the data, print a summary, and write the config to the work dir.

    Args:
        args: From the parser of ``train``.

    Returns:
        The config, as read back from its file.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        FileExistsError: If the work dir contains another training.
        ValueError: If the format of the data is not recognized or wrong, images are unreadable, or arguments contradict
            each other.
    """
    started = time.monotonic()
    _check_arguments(args)
    model = find_model(args.model or DEFAULT_MODEL)
    data = Path(args.data)
    work_dir = Path(args.work_dir or f'work_dirs/{data.absolute().stem}')
    check_folder(work_dir)
    if args.dry_run and last_checkpoint(work_dir) is not None:
        work_dir = work_dir / 'dry_run'  # the files of a training stay as they are
    elif args.resume is None and last_checkpoint(work_dir) is not None:
        raise FileExistsError(
            f'{work_dir} already contains a training; continue it with --resume, or choose another --work-dir'
        )
    choices = Choices(
        work_dir=str(work_dir),
        epochs=args.epochs,
        minutes=args.minutes,
        patience=args.patience,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        effective_batch=args.effective_batch,
        lr=args.lr,
        image_size=_size(args.image_size),
        augmentation=args.augment,
        seed=args.seed or 0,
        workers=min(4, (os.cpu_count() or 1) // 2) if args.workers is None else args.workers,
        load_from=args.load_from,
        device=args.device,
        amp=args.amp,
    )

    splits, classes = _read(args, data, choices.seed)
    report = work_dir / 'data_report.txt'
    coco.write_report(splits, report)
    print(coco.describe(splits, classes, report))
    bad = [name for split in splits for name in split.bad_images]
    if bad and not args.skip_bad_images:
        are, them = ('is', 'it') if len(bad) == 1 else ('are', 'them')
        raise ValueError(
            f'{counted(len(bad), "image")} {are} missing or unreadable, such as {bad[0]} (complete list: {report}); '
            f'replace {them}, or leave {them} out with --skip-bad-images'
        )
    if args.resume is not None and not args.dry_run:  # before the training's files are replaced
        named = latest_complete_checkpoint(work_dir, 'epoch_*.pth')[0] if args.resume == 'auto' else args.resume
        if named and '://' not in named:
            check_classes(named, classes)
    train = splits[0]
    files = {split.name: (coco.write(split, work_dir / 'annotations'), split.images) for split in splits}
    published = model.weights is not None and choices.load_from is None and not args.from_scratch
    if published:
        loads = not args.dry_run and args.resume is None
        # MMEngine downloads from a URL when the config is trained.
        choices = replace(
            choices, load_from=str(download_weights(model)) if loads or model.converter else model.weights
        )
    found = Data(
        files,
        classes,
        num_images=len(train.content['images']),
        most_boxes=train.most_boxes,
        num_val=len(splits[1].content['images']),
        objects=measure_objects(train.content['images'], train.content['annotations']),
    )
    path = work_dir / f'{model.config.stem}_{data.absolute().stem}.py'
    cfg, notes = build_config(model.config, found, choices)
    if args.minutes is not None:
        cfg, notes = _plan(cfg, model.config, found, choices, path if args.resume is not None else None, started)
    if published:  # of the whole detector
        cfg.model = without_pretrained(cfg.model)
        notes.append(f'weights: {model.name}, published at {model.weights}')
    else:
        notes.append(choose_weights(cfg, model, args.from_scratch))
    apply_cfg_options(cfg, args.cfg_options)
    check_fields(cfg)
    cfg = save_config(cfg, work_dir, path.stem)
    saved = f'config: {cfg.filename} (also works with the tools of MMDetection)'
    images = draw_training_images(cfg, work_dir / 'training_images.png')
    print('\n'.join([f'model: {model.config.stem}', *notes, saved, images, '']), flush=True)
    return cfg


def _read(args: argparse.Namespace, data: Path, seed: int) -> tuple[list[coco.Split], tuple[str, ...]]:
    """The cleaned splits, training first, and the classes."""
    val, images = (Path(path) if path else None for path in (args.val, args.images))
    splits = formats.load_splits(data, val, images, args.format)
    classes = coco.choose_classes(splits[0], args.classes)
    tick = progress(sum(len(split.content['images']) for split in splits), 'Reading every image once:')
    for split in splits:
        coco.clean(split, classes, skip_bad_images=args.skip_bad_images, tick=tick)
        if not split.content['images']:
            raise ValueError(f'no image of {split.ann_file} can be read; give their folder with --images DIR')
    given = next((split.ann_file for split in splits if split.name == 'val'), None)
    if given is None:
        splits.insert(1, coco.split_off(splits[0], 0.2 if args.val_part is None else args.val_part, seed))
    elif args.val_part is not None:
        raise ValueError(f'--val-part is given, but there are validation data: {given}; remove --val-part')
    return splits, classes


def _plan(
    cfg: Config, model: Path, data: Data, choices: Choices, resumed: Path | None, started: float
) -> tuple[Config, list[str]]:
    """The config for ``choices.minutes``, less those since ``started``, and notes.

    The epochs of a resumed training have the length that its config says.
    """
    if resumed is not None and resumed.is_file() and (found := earlier_plan(Config.fromfile(str(resumed)))):
        return build_config(model, data, choices, found)
    print('Measuring the speed:', end=' ', flush=True)
    speed = measure_speed(cfg)
    print(f'{speed.train:.2f} seconds an iteration, {speed.val:.2f} in validation\n')
    # The training's start and report come out of the last part.
    minutes = FOR_TRAINING * (choices.minutes - (time.monotonic() - started) / 60)
    batch = cfg.train_dataloader.batch_size
    found = plan_training(minutes, speed, data.num_images, batch, -(-(data.num_val + data.train_sample) // batch))
    cfg, notes = build_config(model, data, replace(choices, minutes=minutes), found)
    epoch = f', of {found.epoch_images} images each' if found.epoch_images else ''
    said = f'time: {choices.minutes:g} minutes, planned as {counted(found.epochs, "epoch")}{epoch}'
    return cfg, [f'{said}, and corrected after each', *notes]


# ---- arguments ------------------------------------------------------------------------------------------------------
def _check_arguments(args: argparse.Namespace) -> None:
    if args.config is not None:
        raise ValueError(f'both the config {args.config} and --data are given; give only one of them')
    if args.launcher != 'none':
        raise ValueError(
            '--data trains in one process; for several, write the config with --dry-run, and train it with --launcher '
            'and --auto-scale-lr'
        )
    if args.auto_scale_lr:
        raise ValueError(
            '--auto-scale-lr needs a config; with --data the learning rate is always scaled, unless --lr is given'
        )
    for name in ('epochs', 'minutes', 'patience', 'batch_size', 'accumulate', 'effective_batch', 'lr'):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f'--{name.replace("_", "-")} must be positive, got {value}')
    if args.batch_size and args.effective_batch and args.effective_batch % args.batch_size:
        below = max(1, args.effective_batch // args.batch_size) * args.batch_size
        raise ValueError(
            f'--effective-batch must be a multiple of the batch size {args.batch_size}, got {args.effective_batch}; '
            f'use {below} or {below + args.batch_size}'
        )
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise ValueError(f'--seed must be from 0 to {2**32 - 1}, got {args.seed}')
    if args.workers is not None and args.workers < 0:
        raise ValueError(f'--workers must not be negative, got {args.workers}')
    if args.device:
        check_device(args.device)
    if args.load_from and not Path(args.load_from).is_file() and '://' not in args.load_from:
        raise FileNotFoundError(
            f'the checkpoint {args.load_from} {no_file(args.load_from)}; give the path of a .pth file'
        )


def _size(text: str | None) -> tuple[int, int] | None:
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text) if text else None
    if text and (not match or min(int(match[1]), int(match[2] or match[1])) < 32):
        raise ValueError(
            f"--image-size must be a side such as 320 or WIDTHxHEIGHT such as 320x240, at least 32 pixels, got '{text}'"
        )
    return (int(match[1]), int(match[2] or match[1])) if match else None
