"""A user's mistake ends in one sentence, not in a traceback."""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config.config import ConfigParsingError

# Errors whose message is written to be read alone; others need their kind to be understood.
SPEAKING = (OSError, ValueError, LookupError, ImportError, SyntaxError, RuntimeError, ConfigParsingError)


@contextmanager
def user_errors(command: str) -> Iterator[None]:
    """Ends the process with status 2 and one sentence when the block, which sets something up, raises.

    Only what reads configs, data or checkpoints belongs inside; an error in the middle of training keeps its
    traceback. ``MSDA_TRACEBACK=1`` shows it here as well.
    """
    try:
        yield
    except Exception as error:  # configs and files go wrong in every way there is
        if os.environ.get('MSDA_TRACEBACK') == '1':
            raise
        print(
            f'msda_plugin {command}: {explain(error)}\n(MSDA_TRACEBACK=1 shows where it was raised.)', file=sys.stderr
        )
        raise SystemExit(2) from error


def explain(error: BaseException) -> str:
    """The message of `error` in one line; for an unknown registry name, with the names that come near."""
    message = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    # From the beginning of a word on: from each of its letters, a very long one would take very long.
    unknown = re.search(r"(?<![\w.])([\w.]+)'? is not in the (\S+) registry", message)
    if unknown:
        near = _near(unknown[1])
        hint = f'did you mean {" or ".join(near)}?' if near else 'a type of this package is written msda_plugin.NAME.'
        return f"there is no type '{unknown[1]}' in the registry {unknown[2]}; {hint}"
    speaks = isinstance(error, SPEAKING) and ' ' in message  # a key alone does not
    return message if speaks else f'{type(error).__name__}: {message}'


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
