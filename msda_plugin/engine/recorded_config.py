"""The config that MMEngine records in a checkpoint, used without running code from the file.

A config is code in all but name: MMEngine imports the dotted path of a type that is not registered, mmcv evaluates the
type of an NMS, and some of MMDetection's modules evaluate their arguments or run other config files. So the text is
parsed instead of executed, and what it names is restricted to registered classes.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'msda_plugin')  # imported if a config needs them
NMS = ('nms', 'soft_nms')
USED = ('default_scope', 'model', 'test_dataloader')  # what inference reads of a config


class NotSelfContainedError(ValueError):
    """The record is valid, but needs more than registered classes of known packages."""


class RecordedConfig(Config):
    """A config from a checkpoint; its modules are built from registered types only."""


def parse_config(text: str) -> dict:
    """Parse the text of a dumped config, ``Config.pretty_text``, without executing it.

    Args:
        text: Assignments of literals: constants, lists, tuples, dicts, and calls ``dict(key=value)``.

    Returns:
        Name -> value.

    Raises:
        ValueError: If the text contains anything else.
    """
    try:
        fields = {}
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    fields[name] = _literal(value)
                case _:
                    raise ValueError(f'line {statement.lineno} is not an assignment')
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # deep nesting raises the last two
        reason = str(error) or 'it is nested too deeply'
        raise ValueError(f'contains a config with more than literal values ({reason}), which is not run') from None
    return fields


def _literal(node: ast.expr) -> object:
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords):
            if all(keyword.arg for keyword in keywords):
                return {keyword.arg: _literal(keyword.value) for keyword in keywords}
        case ast.Dict(keys=keys, values=values):
            if all(keys):
                return {_literal(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.List(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_literal(element) for element in elements)
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id='inf' | 'nan' as name):  # floats are dumped in this form
            return float(name)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name() as operand):
            value = _literal(operand)
            if isinstance(value, (int, float)):
                return -value
    raise ValueError(f'line {node.lineno}: {ast.unparse(node)[:60]}')


def recorded_config(checkpoint: object) -> RecordedConfig | None:
    """The config that MMEngine stored with the weights, reduced to what inference needs.

    Args:
        checkpoint: The loaded checkpoint.

    Returns:
        Its fields ``default_scope``, ``model`` and ``test_dataloader``; None if the checkpoint has no config of
        MMDetection 3 with these fields.

    Raises:
        NotSelfContainedError: If the config needs a package or a file that could run other code.
        ValueError: If the config contains code.
    """
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    text = meta.get('cfg') if isinstance(meta, Mapping) else None
    if not isinstance(text, str):
        return None
    fields = parse_config(text)
    model, loader = fields.get('model'), fields.get('test_dataloader')
    if not isinstance(model, dict) or not isinstance(loader, dict) or not isinstance(loader.get('dataset'), dict):
        return None
    # The weights of `init_cfg` are not read for inference, and nothing evaluates the names and paths of a dataset.
    scopes = {
        fields.get('default_scope') or 'mmdet',
        *_check(model, 'model', skipped=('init_cfg',)),
        *_check(loader['dataset'], 'dataset', skipped=('metainfo', 'data_root', 'ann_file', 'data_prefix')),
    }
    _import(scopes, fields.get('custom_imports'))
    return RecordedConfig({name: fields[name] for name in USED if name in fields})


def _check(node: object, where: str, skipped: Sequence[str]) -> Iterator[str]:
    """Yield the packages that types name, and refuse values that a module could execute."""
    if isinstance(node, str) and '(' in node:  # an expression that calls nothing is harmless
        raise ValueError(f'contains a config with code in {where} ({node[:60]!r}), which is not run')
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in children:
        path = f'{where}.{key}'
        if key in skipped:
            continue
        if key == 'teacher_config':
            raise NotSelfContainedError(f'was trained with a config that runs another one ({path})')
        yield from _check(value, path, skipped)
        if key == 'nms' and isinstance(value, dict) and value.get('type', 'nms') not in NMS:
            raise ValueError(f'contains a config with the unknown type {value["type"]!r} of {path}')
        if key == 'type' and isinstance(value, str):
            if not re.fullmatch(r'\w+(\.\w+)?', value):
                raise NotSelfContainedError(
                    f'was trained with a config whose {path}, {value[:80]!r}, is no registered name'
                )
            if '.' in value:
                yield value.partition('.')[0]


def _import(scopes: Iterable[str], custom_imports: object) -> None:
    """Import the modules that the config needs, if they are OpenMMLab's or ours; others must be imported already."""
    modules = custom_imports.get('imports', []) if isinstance(custom_imports, dict) else []
    modules = [modules] if isinstance(modules, str) else modules
    names = [str(name) for name in (*scopes, *modules)]
    unknown = [name for name in names if name.split('.')[0] not in PACKAGES and name not in sys.modules]
    if unknown:
        raise NotSelfContainedError(f'needs the module {unknown[0]}, which is not imported')
    import_modules_from_strings(list(modules), allow_failed_imports=True)
