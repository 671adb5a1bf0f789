"""Parts of messages."""

from collections.abc import Iterable


def listed(names: Iterable, limit: int = 20) -> str:
    """'a, b, c and 12 more'; 'nothing' if there are no names."""
    names = [str(name) for name in names]
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return (', '.join(names[:limit]) or 'nothing') + more


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """'1 image', '2 images'; ``plural`` is the noun with an s unless given."""
    return f'{number} {noun if number == 1 else plural or noun + "s"}'
