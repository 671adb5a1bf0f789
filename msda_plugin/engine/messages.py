"""Parts of messages."""

from collections.abc import Iterable


def listed(names: Iterable, limit: int = 20) -> str:
    """'a, b, c and 12 more'; 'nothing' if there are no names."""
    names = [str(name) for name in names]
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return (', '.join(names[:limit]) or 'nothing') + more
