"""Errors of users end in one sentence instead of a traceback."""

import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config.config import ConfigParsingError

# Errors whose message is clear without their type.
SELF_EXPLANATORY = (OSError, ValueError, LookupError, ImportError, SyntaxError, RuntimeError, ConfigParsingError)
# Registries with names that are suggested for an unknown one.
KINDS = (
    *('MODELS', 'HOOKS', 'DATASETS', 'DATA_SAMPLERS', 'TRANSFORMS', 'METRICS'),
    *('OPTIMIZERS', 'PARAM_SCHEDULERS', 'LOOPS', 'RUNNERS'),
)


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
    # The lookbehinds avoid quadratic time for very long words.
    unknown = re.search(r"(?<![\w.])([\w.]+)'? is not in the (\S+) registry", message)
    if unknown:
        near = _similar(unknown[1])
        hint = f'did you mean {" or ".join(near)}?' if near else 'types of msda_plugin are written msda_plugin.NAME.'
        return f"there is no type '{unknown[1]}' in the registry {unknown[2]}; {hint}"
    argument = re.search(r"(?<!\w)(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    built = _class_built(error, argument[1]) if argument else None
    if built is not None:
        known = [name for part in built.__mro__[:-1] for name in inspect.signature(part.__init__).parameters]
        near = difflib.get_close_matches(argument[2], known, n=2)
        hint = f'did you mean {" or ".join(dict.fromkeys(near))}?' if near else 'remove it from the config'
        return f"{built.__name__} has no argument '{argument[2]}'; {hint}"
    clear = isinstance(error, SELF_EXPLANATORY) and ' ' in message  # a key alone is not clear
    return message if clear else f'{type(error).__name__}: {message}'


def _class_built(error: BaseException, name: str) -> type | None:
    """The class that MMEngine was building from a config when the error was raised; ``name`` had the argument."""
    from mmengine.registry import LOOPS

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    built = [frame.f_locals['obj_cls'] for frame in frames if 'obj_cls' in frame.f_locals]
    found = built[-1] if built else LOOPS.get(name)  # a loop without a type is built by the runner itself
    return found if isinstance(found, type) else None


def _similar(name: str) -> list[str]:
    from mmdet import registry as detection
    from mmengine import registry as engine

    from msda_plugin import registry as plugin

    known = {}
    for module, prefix in ((engine, ''), (detection, ''), (plugin, 'msda_plugin.')):
        for kind in KINDS:
            registry = getattr(module, kind, None)
            if registry is not None:
                registry.import_from_location()
                known |= {key.lower(): prefix + key for key in registry.module_dict}
    return [known[key] for key in difflib.get_close_matches(name.rsplit('.', 1)[-1].lower(), known, n=2)]
