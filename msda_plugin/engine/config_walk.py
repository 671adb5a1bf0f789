"""Nested dicts and lists of a config."""

from collections.abc import Callable, Iterator


def walk(node: object, where: str = '') -> Iterator[tuple[str, object]]:
    """Yield ``(path, value)`` for ``node`` and everything in it, parents first.

    Args:
        node: A dict, list, tuple or single value of a config.
        where: Path of ``node``. Paths are dotted, as ``--cfg-options`` takes them: ``model.heads.1``.
    """
    yield where, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, child in children:
        yield from walk(child, f'{where}.{key}' if where else str(key))


def rebuild(node: object, change: Callable[[object, object], object]) -> object:
    """A copy of ``node`` with every value replaced by ``change(key or index, value)``, parents first."""
    if isinstance(node, dict):
        return type(node)({key: rebuild(change(key, value), change) for key, value in node.items()})
    if isinstance(node, (list, tuple)):
        return type(node)(rebuild(change(index, value), change) for index, value in enumerate(node))
    return node


def without_pretrained(node: object) -> object:
    """A copy of ``node`` in which no module names pretrained weights."""

    def change(key: object, value: object) -> object:
        pretrained = isinstance(value, dict) and value.get('type') == 'Pretrained'
        return None if pretrained or key == 'pretrained' else value

    return rebuild(node, change)
