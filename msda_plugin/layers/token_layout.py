"""Tokens and maps are two views of one memory, as long as maps are channels-last."""

from torch import Tensor, nn


def tokens_to_map(x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """View tokens (B, H * W, C) as a map (B, C, H, W). Contiguous tokens give a channels-last map: nothing moves."""
    return x.unflatten(1, hw_shape).permute(0, 3, 1, 2)


def map_to_tokens(x: Tensor) -> Tensor:
    """View a map (B, C, H, W) as tokens (B, H * W, C). A channels-last map gives contiguous tokens: nothing moves."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def check_tokens(layer: nn.Module, x: Tensor, hw_shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``x`` is (B, H * W, C), (H, W) = ``hw_shape`` and C = ``layer.embed_dims``."""
    height, width = hw_shape
    if min(height, width) < 1:
        raise ValueError(f'{type(layer).__name__} got a {height}x{width} map; expected at least 1 pixel a side')
    if x.dim() != 3 or x.shape[1] != height * width or x.shape[2] != layer.embed_dims:
        raise ValueError(
            f'{type(layer).__name__} got tokens of shape {tuple(x.shape)} for a {height}x{width} map; '
            f'expected (B, {height * width}, {layer.embed_dims})'
        )


def check_heads(embed_dims: int, num_heads: int) -> None:
    """Raise ValueError unless the channels can be split over the heads."""
    if num_heads < 1 or embed_dims < 1 or embed_dims % num_heads:
        raise ValueError(
            f'embed_dims={embed_dims} is not a multiple of num_heads={num_heads}, both at least 1: change one of them'
        )
