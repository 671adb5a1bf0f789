"""``--cfg-options KEY=VALUE``: reads the values, checks the keys, and changes the config."""

import ast
import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Sequence

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS

from msda_plugin.engine.runner import DetectionRunner

# Fields that the runner, or a tool of MMDetection, takes from the config in addition to the runner's arguments.
FURTHER_FIELDS = (
    'activation_checkpointing',
    'compile',
    'data_root',
    'device',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'tta_model',
    'tta_pipeline',
    'verbose',
)
TEXT_OR_NUMBER = ('arch', 'loss_scale', 'priority')  # fields that take both, such as loss_scale='dynamic'


def apply_cfg_options(cfg: Config, options: Sequence[str] | None) -> None:
    """Change fields of a config.

    Args:
        cfg: The config, changed in place.
        options: Strings of the form ``KEY=VALUE``. A key is a path such as ``param_scheduler.0.end``. Values are those
            of MMEngine's ``DictAction``, or dicts in Python's notation: ``dict(type='nms')``, ``{'type': 'nms'}``.

    A field that is new in an existing dict is a warning on standard error, with similar names.

    Raises:
        ValueError: If an option has another form, its first key is neither in the config nor known to MMEngine, a list
            has no such index, or the value does not fit the present one.
    """
    changes = dict(_parse(option) for option in options or ())
    for key, value in changes.items():
        _check(cfg, key, value)
    cfg.merge_from_dict(changes)


# ---- values ---------------------------------------------------------------------------------------------------------
def _parse(option: str) -> tuple[str, object]:
    key, equals, text = option.partition('=')
    if not equals or not all(key.split('.')):
        raise ValueError(f"--cfg-options takes KEY=VALUE, such as train_cfg.max_epochs=12; got '{option}'")
    text = text.strip()
    if re.match(r'[\[({]|dict\(', text) and re.search(r'\bdict\(|{', text):
        try:
            return key, _literal(ast.parse(text, mode='eval').body)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            pass  # such as the file name {}.pth
    if ' ' in text and not re.search(r'[,()\[\]]', text):
        return key, text.strip('\'"')  # DictAction would remove the spaces
    try:
        if not re.search(r'\bdict\(', text):
            return key, DictAction._parse_iterable(text)
    except (AssertionError, RecursionError):
        pass
    raise ValueError(
        f"--cfg-options cannot read the value of {key}, got '{text}'; it takes a number, a text, a list such as [1,2], "
        f"or dict(type='NAME'), in quotation marks for the shell; single fields are set with {key}.FIELD=VALUE"
    )


def _literal(node: ast.AST) -> object:
    """The value of a Python literal, in which dicts may also be written as ``dict(key=value)``."""
    if isinstance(node, ast.Call):
        if getattr(node.func, 'id', None) != 'dict' or node.args or not all(word.arg for word in node.keywords):
            raise ValueError('a function call')
        return {word.arg: _literal(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_literal(value) for value in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    return ast.literal_eval(node)


# ---- keys -----------------------------------------------------------------------------------------------------------
def _check(cfg: Config, key: str, value: object) -> None:
    first, *rest = key.split('.')
    if first not in cfg:
        known = {*cfg, *_fields_of_runner(cfg)}
        if first not in known:
            near = ['.'.join([name, *rest]) for name in _similar(first, known)]
            hint = (
                f'did you mean {" or ".join(near)}?' if near else f'the config has {", ".join(sorted(map(str, cfg)))}'
            )
            raise ValueError(f"--cfg-options {key}: '{first}' is not in the config; {hint}")
        return
    node, path = cfg[first], first
    for part in rest:
        if isinstance(node, dict):
            if part not in node:
                if part == '_delete_':  # MMEngine's, to replace a dict instead of merging into it
                    return
                near = [f'{path}.{name}' for name in _similar(part, node)]
                hint = f'did you mean {" or ".join(near)}?' if near else f'{path} has {", ".join(map(str, node))}'
                _warn(f'--cfg-options {key}: {path}.{part} is not in the config, and is added; {hint}')
                return
            if node[part] is None and f'{path}.{part}' != key:
                node[part] = ConfigDict()  # MMEngine merges only into dicts
            child = node[part]
        elif isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ValueError(
                    f'--cfg-options {key}: {path} is a list of {len(node)}, which takes an index below {len(node)}, '
                    f"got '{part}'"
                )
            child = node[int(part)]
        else:
            raise ValueError(
                f"--cfg-options {key}: {path} is {_shown(node)}, which has no field '{part}'; set {path} as a whole"
            )
        node, path = child, f'{path}.{part}'
    # A dict deeper in the config may have a name instead, such as arch='tiny'.
    single = isinstance(value, (int, float) if rest else (int, float, str)) and not isinstance(value, bool)
    if isinstance(node, dict) and single:
        raise ValueError(
            f'--cfg-options {key}={value}: {key} is a dict; set one of its fields, such as '
            f'{key}.{next(iter(node), "type")}'
        )
    number = isinstance(node, (int, float)) and not isinstance(node, bool)
    if number and isinstance(value, str) and key.split('.')[-1] not in TEXT_OR_NUMBER:
        _warn(f"--cfg-options {key}: the config has the number {node}, got the text '{value}'")


def _fields_of_runner(cfg: Config) -> set[str]:
    """The config fields that the runner of a config reads."""
    kind = cfg.get('runner_type')
    runner = (RUNNERS.get(kind) if isinstance(kind, str) else kind) or DetectionRunner
    return {*inspect.signature(runner.__init__).parameters, *FURTHER_FIELDS} - {'self', 'cfg'}


def _similar(name: str, known: Iterable) -> list[str]:
    return difflib.get_close_matches(name, map(str, known), n=2)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _warn(sentence: str) -> None:
    if os.environ.get('RANK', '0') == '0':
        print(f'warning: {sentence}', file=sys.stderr)
