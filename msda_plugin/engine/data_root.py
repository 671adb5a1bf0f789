"""``--cfg-options data_root=DIR`` applies to every dataset and evaluator."""

from mmengine.config import Config

from msda_plugin.engine.config_walk import rebuild, walk

FIELDS = tuple(f'{split}_{part}' for split in ('train', 'val', 'test') for part in ('dataloader', 'evaluator'))


def propagate_data_root(cfg: Config, as_written: Config | None = None) -> None:
    """Apply a changed ``data_root`` to every path below the old one in dataloaders and evaluators, in place.

    A config file inserts its ``data_root`` into these fields when it is parsed; a value that is set later, by
    ``--cfg-options`` or by a config that inherits, does not reach them. The old root is the one that all datasets
    share, or otherwise the ``data_root`` of ``as_written``.

    Args:
        cfg: The config.
        as_written: The config as its file has it, if there is one.

    Raises:
        ValueError: If the datasets have several roots and none of them is that of ``as_written``.
    """
    new = cfg.get('data_root')
    roots = {
        node['data_root']
        for field in FIELDS
        for _, node in walk(cfg.get(field))
        if isinstance(node, dict) and node.get('data_root')
    }
    if not new or not roots or new.rstrip('/') in {root.rstrip('/') for root in roots}:
        return
    if len(roots) > 1 and as_written is not None:
        roots &= {as_written.get('data_root')}
    if len(roots) != 1:
        raise ValueError(
            f"data_root is '{new}', but the datasets of the config have several other roots; set the data_root of each "
            'dataset, such as train_dataloader.dataset.data_root'
        )
    [old] = roots
    old, new = old.rstrip('/'), new.rstrip('/')

    def move(key: object, value: object) -> object:
        below = isinstance(value, str) and (value == old or value.startswith(f'{old}/'))
        return new + value[len(old) :] if below else value

    for field in FIELDS:
        if cfg.get(field) is not None:
            cfg[field] = rebuild(cfg[field], move)
