"""Errors of users end in one sentence instead of a traceback."""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config.config import ConfigParsingError

# Errors whose message is clear without their type.
SELF_EXPLANATORY = (OSError, ValueError, LookupError, ImportError, SyntaxError, RuntimeError, ConfigParsingError)


@contextmanager
def user_errors(command: str) -> Iterator[None]:
    """Exit with status 2 and one sentence if the block raises.

    Use it for code that reads configs, data or checkpoints; errors during training keep their traceback.
    ``MSDA_TRACEBACK=1`` shows the traceback here, too.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except Exception as error:  # invalid configs and files raise errors of many types
        if os.environ.get('MSDA_TRACEBACK') == '1':
            raise
        print(
            f'msda_plugin {command}: {explain(error)}\n(MSDA_TRACEBACK=1 shows where it was raised.)', file=sys.stderr
        )
        raise SystemExit(2) from error


def explain(error: BaseException) -> str:
    """The message of ``error`` in one line; for an unknown registry name, with similar names."""
    message = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    # The lookbehind avoids quadratic time for very long words.
    unknown = re.search(r"(?<![\w.])([\w.]+)'? is not in the (\S+) registry", message)
    if unknown:
        near = _similar(unknown[1])
        hint = f'did you mean {" or ".join(near)}?' if near else 'types of msda_plugin are written msda_plugin.NAME.'
        return f"there is no type '{unknown[1]}' in the registry {unknown[2]}; {hint}"
    argument = re.search(r"class `(\w+)` in ([\w/]+)\.py: .*unexpected keyword argument '(\w+)'", message)
    if argument:
        near = difflib.get_close_matches(argument[3], _arguments(argument[1], argument[2]), n=2)
        hint = f'did you mean {" or ".join(near)}?' if near else 'remove it from the config'
        return f"{argument[1]} has no argument '{argument[3]}'; {hint}"
    clear = isinstance(error, SELF_EXPLANATORY) and ' ' in message  # a key alone is not clear
    return message if clear else f'{type(error).__name__}: {message}'


def _arguments(name: str, module: str) -> list[str]:
    """The arguments of a class and of the classes that it inherits from."""
    try:
        kind = getattr(importlib.import_module(module.replace('/', '.')), name)
    except (ImportError, AttributeError):  # defined within a function
        return []
    return [argument for part in kind.__mro__[:-1] for argument in inspect.signature(part.__init__).parameters]


def _similar(name: str) -> list[str]:
    from mmdet import registry as detection

    from msda_plugin import registry as plugin

    known = {}
    for module, prefix in ((detection, ''), (plugin, 'msda_plugin.')):
        for kind in ('MODELS', 'HOOKS', 'DATASETS', 'DATA_SAMPLERS', 'TRANSFORMS', 'METRICS', 'OPTIMIZERS', 'RUNNERS'):
            registry = getattr(module, kind, None)
            if registry is not None:
                registry.import_from_location()
                known |= {key.lower(): prefix + key for key in registry.module_dict}
    return [known[key] for key in difflib.get_close_matches(name.rsplit('.', 1)[-1].lower(), known, n=2)]
