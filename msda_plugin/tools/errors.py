"""A user's mistake ends in one sentence, not in a traceback."""
import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MISTAKES = (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ImportError, SyntaxError)


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
    return message or type(error).__name__


def _near(name: str) -> list[str]:
    from mmdet.registry import MODELS as DETECTION

    from msda_plugin.registry import HOOKS, MODELS
    known = []
    for registry in (MODELS, HOOKS, DETECTION):
        registry.import_from_location()
        prefix = f'{registry.scope}.'
        known += [prefix + key for key in registry.module_dict]
    by_short = {key.rsplit('.', 1)[-1].lower(): key for key in reversed(known)}
    return [by_short[key] for key in difflib.get_close_matches(name.rsplit('.', 1)[-1].lower(), by_short, n=2)]
