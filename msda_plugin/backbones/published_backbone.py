"""Base class of the backbones: published weights, frozen stages and checks of arguments."""

from collections.abc import Mapping, Sequence

from mmengine.model import BaseModule
from torch import Tensor

from msda_plugin.convert import convert_state_dict, load_checkpoint_file


class PublishedBackbone(BaseModule):
    """A backbone whose ``init_cfg=dict(type='Pretrained', checkpoint=…)`` loads published checkpoints unconverted.

    Attributes:
        family: family of its checkpoints, one of ``msda_plugin.convert.FAMILIES``.
        out_channels: channels of each map that ``forward`` returns. Detectors compare them with ``in_channels`` of the
            neck; other backbones may declare them, too.
    """

    family: str
    out_channels: tuple[int, ...]

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, or initialize the weights as published.

        Raises:
            ValueError: If the checkpoint belongs to another family or does not fit this model.
        """
        if self.init_cfg is None:
            self._draw_weights()
        elif isinstance(self.init_cfg, dict) and self.init_cfg['type'] == 'Pretrained':
            path = self.init_cfg['checkpoint']
            state_dict = convert_state_dict(load_checkpoint_file(path, self.init_cfg.get('prefix')), self.family)
            try:
                self._load_published(state_dict, path)
            except RuntimeError as error:  # from load_state_dict, with one line per key
                raise ValueError(
                    f'{path} does not fit this {type(self).__name__}: {" ".join(str(error).split())}'
                ) from None
        else:
            super().init_weights()

    def train(self, mode: bool = True) -> 'PublishedBackbone':
        """Set the mode; frozen stages stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _draw_weights(self) -> None:
        """Initialize the weights as published."""
        raise NotImplementedError

    def _load_published(self, state_dict: dict[str, Tensor], path: str) -> None:
        """Load the converted state dict of the file ``path``."""
        self.load_state_dict(state_dict)

    def _freeze_stages(self) -> None:
        """Disable gradients and training mode of the stages that ``frozen_stages`` selects."""
        raise NotImplementedError


def choose_arch(arch: str | dict, archs: Mapping[str, dict]) -> dict:
    """The arch dict of a published name, or ``arch`` itself if it is a dict with the same keys.

    Raises:
        ValueError: If the name is unknown, or keys are missing or unknown.
    """
    keys = next(iter(archs.values())).keys()
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(
                f'unknown arch {arch!r}; known: {sorted(archs)}, or give a dict with the keys {list(keys)}'
            )
        return archs[arch]
    missing, unknown = keys - arch.keys(), arch.keys() - keys
    if missing or unknown:
        raise ValueError(
            f'arch dict is invalid: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}; '
            f'expected exactly {list(keys)}'
        )
    return arch


def check_indices(name: str, indices: Sequence[int], count: int, of: str) -> tuple[int, ...]:
    """``indices`` as a tuple; ``of`` names what they count, such as 'stages'.

    Raises:
        ValueError: If they do not increase, or are not within 0 to ``count`` - 1.
    """
    if not indices or any(not 0 <= i < count for i in indices) or sorted(set(indices)) != list(indices):
        raise ValueError(f'{name}={tuple(indices)} is invalid; expected increasing indices of {of}, 0 to {count - 1}')
    return tuple(indices)


def check_frozen_stages(frozen_stages: int, count: int, first: str, of: str) -> int:
    """``frozen_stages``, -1 to ``count``; ``first`` names the part that 0 freezes.

    Raises:
        ValueError: If it is out of range.
    """
    if not -1 <= frozen_stages <= count:
        raise ValueError(
            f'frozen_stages={frozen_stages} is out of range; expected -1 (none), 0 ({first}), or up to {count} {of}'
        )
    return frozen_stages


def check_image(backbone: str, x: Tensor, in_channels: int) -> None:
    """Raise ValueError unless ``x`` is (B, in_channels, H, W)."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f'{backbone} got images of shape {tuple(x.shape)}; expected (B, {in_channels}, H, W). Set in_channels to '
            'the number of image channels'
        )
