"""Conversions between feature maps, tokens and attention heads, and the checks of their sizes.

Tokens (B, H * W, C) and a channels-last map (B, C, H, W) are two views of the same memory.
"""

from torch import Tensor, nn


def tokens_to_map(x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """View tokens (B, H * W, C) as a map (B, C, H, W). Contiguous tokens give a channels-last map without a copy."""
    return x.unflatten(1, hw_shape).permute(0, 3, 1, 2)


def map_to_tokens(x: Tensor) -> Tensor:
    """View a map (B, C, H, W) as tokens (B, H * W, C). A channels-last map gives contiguous tokens without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """View tokens (B, N, C) as (B, num_heads, N, C / num_heads)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, num_heads, N, head_dim) -> tokens (B, N, num_heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)


def check_tokens(layer: nn.Module, x: Tensor, hw_shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``x`` has shape (B, H * W, ``layer.embed_dims``) with (H, W) = ``hw_shape``."""
    height, width = hw_shape
    if min(height, width) < 1:
        raise ValueError(f'{type(layer).__name__} got a {height}x{width} map; expected at least 1 pixel a side')
    if x.dim() != 3 or x.shape[1] != height * width or x.shape[2] != layer.embed_dims:
        raise ValueError(
            f'{type(layer).__name__} got tokens of shape {tuple(x.shape)} for a {height}x{width} map; '
            f'expected (B, {height * width}, {layer.embed_dims})'
        )


def check_heads(embed_dims: int, num_heads: int) -> None:
    """Raise ValueError unless ``num_heads`` divides ``embed_dims``."""
    if num_heads < 1 or embed_dims < 1 or embed_dims % num_heads:
        raise ValueError(
            f'embed_dims={embed_dims} is not a multiple of num_heads={num_heads}, both at least 1: change one of them'
        )
