"""The config that MMEngine records in a checkpoint, used without running code from the file.

A config is code in all but name: MMEngine imports the dotted path of a type that is not registered, mmcv evaluates the
type of an NMS, and some of MMDetection's modules evaluate their arguments or run other config files. So the text is
parsed instead of executed, and what it names is restricted to registered classes.
"""

import ast
import re
import sys
from collections.abc import Iterable, Mapping

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from msda_plugin.engine.config_walk import walk

PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'msda_plugin')  # imported if a config needs them
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
        case ast.Constant(value=value):
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
    dataset = loader['dataset']
    _check(model, 'model')
    _check(dataset, 'test_dataloader.dataset')
    scopes = [fields.get('default_scope') or 'mmdet', *_scopes((model, dataset))]
    _import(scopes, fields.get('custom_imports'))
    return RecordedConfig({name: fields[name] for name in USED if name in fields})


def _check(node: object, where: str) -> None:
    """Refuse values that a module could execute."""
    for path, value in walk(node, where):
        last = path.rsplit('.', 1)[-1]
        if last == 'teacher_config':
            raise NotSelfContainedError(f'was trained with a config that runs another one ({path})')
        # Expressions that call nothing are harmless. Nothing evaluates `init_cfg`, and of a dataset only the pipeline.
        used = '.pipeline.' in path if path.startswith('test_dataloader') else '.init_cfg' not in path
        if used and isinstance(value, str) and '(' in value:
            raise ValueError(f'contains a config with code in {path} ({value[:60]!r}), which is not run')
        if last == 'nms' and isinstance(value, dict) and value.get('type', 'nms') not in NMS:
            raise ValueError(f'contains a config with the unknown {path}.type {value["type"]!r}')


def _scopes(node: object) -> Iterable[str]:
    """The packages that the types in a config name."""
    for path, value in walk(node):
        if path.endswith('.type') and isinstance(value, str) and '.' in value:
            scope, _, name = value.partition('.')
            if not re.fullmatch(r'\w+', name):  # MMEngine would import this path
                raise NotSelfContainedError(f'was trained with a config whose type {value[:80]!r} is not registered')
            yield scope


def _import(scopes: Iterable[str], custom_imports: object) -> None:
    """Import the modules that the config needs, if they are OpenMMLab's or ours; others must be imported already."""
    modules = custom_imports.get('imports', []) if isinstance(custom_imports, dict) else []
    modules = [modules] if isinstance(modules, str) else modules
    unknown = [name for name in (*scopes, *modules) if name.split('.')[0] not in PACKAGES and name not in sys.modules]
    if unknown:
        raise NotSelfContainedError(f'needs the module {unknown[0]}, which is not imported')
    import_modules_from_strings(list(modules), allow_failed_imports=True)
