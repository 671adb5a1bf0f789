"""A user's mistake ends in one sentence, not in a traceback."""
import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from mmengine.config.config import ConfigParsingError

MISTAKES = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError, SyntaxError,
            NameError, ConfigParsingError, UnpicklingError, EOFError, RuntimeError)


@contextmanager
def user_errors(command: str) -> Iterator[None]:
    """Ends the process with status 2 and one sentence when the block, which sets something up, raises.

    Only what reads configs, data or checkpoints belongs inside; an error in the middle of training keeps its
    traceback. ``MSDA_TRACEBACK=1`` shows it here as well.
    """
    try:
        yield
    except MISTAKES as error:
        if os.environ.get('MSDA_TRACEBACK') == '1':
            raise
        print(f'msda_plugin {command}: {explain(error)}\n(MSDA_TRACEBACK=1 shows where it was raised.)',
              file=sys.stderr)
        raise SystemExit(2) from error


def explain(error: BaseException) -> str:
    """The message of `error` in one line; for an unknown registry name, with the names that come near."""
    message = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    unknown = re.search(r"'?([\w.]+)'? is not in the (\S+) registry", message)
    if unknown:
        near = _near(unknown[1])
        hint = f'did you mean {" or ".join(near)}?' if near else 'a type of this package is written msda_plugin.NAME.'
        return f"there is no type '{unknown[1]}' in the registry {unknown[2]}; {hint}"
    # What these say is not written for a user, and needs its kind to be understood.
    bare = isinstance(error, (TypeError, AttributeError, AssertionError, NameError)) or not message
    return f'{type(error).__name__}: {message}' if bare else message


def _near(name: str) -> list[str]:
    from mmdet import registry as detection

    from msda_plugin import registry as ours
    known = {}
    for module, prefix in ((detection, ''), (ours, 'msda_plugin.')):
        for kind in ('MODELS', 'HOOKS', 'DATASETS', 'DATA_SAMPLERS', 'TRANSFORMS', 'METRICS', 'OPTIMIZERS', 'RUNNERS'):
            registry = getattr(module, kind, None)
            if registry is not None:
                registry.import_from_location()
                known |= {key.lower(): prefix + key for key in registry.module_dict}
    return [known[key] for key in difflib.get_close_matches(name.rsplit('.', 1)[-1].lower(), known, n=2)]
