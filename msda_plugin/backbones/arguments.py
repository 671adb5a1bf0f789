"""What every backbone asks of its arguments, in the same words."""
from collections.abc import Mapping, Sequence

from torch import Tensor


def choose_arch(arch: str | dict, archs: Mapping[str, dict]) -> dict:
    """The arch dict of a published name, or the given dict where it has the keys of one.

    Raises:
        ValueError: for an unknown name, or missing or unknown keys.
    """
    keys = next(iter(archs.values())).keys()
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(f'unknown arch {arch!r}; known: {sorted(archs)}, or give a dict with the keys '
                             f'{list(keys)}')
        return archs[arch]
    missing, unknown = keys - arch.keys(), arch.keys() - keys
    if missing or unknown:
        raise ValueError(f'arch dict does not fit: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}; '
                         f'expected exactly {list(keys)}')
    return arch


def check_indices(name: str, indices: Sequence[int], count: int, of: str) -> tuple[int, ...]:
    """The indices, which must increase and lie in 0 to ``count`` - 1; ``of`` is what they count, such as 'stages'.

    Raises:
        ValueError: they do not.
    """
    if not indices or any(not 0 <= i < count for i in indices) or sorted(set(indices)) != list(indices):
        raise ValueError(f'{name}={tuple(indices)} does not fit; expected increasing indices of {of}, 0 to {count - 1}')
    return tuple(indices)


def check_frozen_stages(frozen_stages: int, count: int, first: str, of: str) -> int:
    """The number, -1 to ``count``; ``first`` is what 0 freezes.

    Raises:
        ValueError: it is out of range.
    """
    if not -1 <= frozen_stages <= count:
        raise ValueError(f'frozen_stages={frozen_stages} is out of range; expected -1 (none), 0 ({first}), or up to '
                         f'{count} {of}')
    return frozen_stages


def check_image(backbone: str, x: Tensor, in_channels: int) -> None:
    """Raise ValueError unless ``x`` is (B, in_channels, H, W)."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f'{backbone} got an image of shape {tuple(x.shape)}; expected (B, {in_channels}, H, W); set '
                         'in_channels if the images have another number')
