"""Plain Vision Transformer, optionally with ViTDet's windows and relative positions.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, https://arxiv.org/abs/2010.11929; Li et al.,
"Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), ECCV 2022,
https://arxiv.org/abs/2203.16527, with the details of the published code. The packages mmdet 3.3 and
onedl-mmdetection 3.5 have no ViT.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.backbones.published_backbone import (
    PublishedBackbone,
    check_frozen_stages,
    check_image,
    check_indices,
    choose_arch,
)
from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map
from msda_plugin.layers.transformer_parts import run_layer
from msda_plugin.registry import MODELS

# The published sizes.
ARCHS = {
    'tiny': dict(embed_dims=192, depth=12, num_heads=3, mlp_ratio=4),
    'small': dict(embed_dims=384, depth=12, num_heads=6, mlp_ratio=4),
    'base': dict(embed_dims=768, depth=12, num_heads=12, mlp_ratio=4),
    'large': dict(embed_dims=1024, depth=24, num_heads=16, mlp_ratio=4),
}

# Up to this number of tokens, relative positions are added as a bias per pair of tokens, which is faster but takes
# memory quadratic in the number of tokens.
SMALL_MAP = 400


class Attention(BaseModule):
    """Multi-head self-attention. On large maps, the scores of all pairs of tokens are never stored.

    Args:
        embed_dims: channels C; a multiple of ``num_heads``.
        num_heads: attention heads.
        qkv_bias: whether the query, key and value projection has a bias.
        rel_pos_size: (height, width) of the map that the tables of decomposed relative positions belong to (they are
            resized linearly to other maps); None: no relative positions.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, qkv_bias: bool = True, rel_pos_size: tuple[int, int] | None = None
    ):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.use_rel_pos = rel_pos_size is not None
        if rel_pos_size is not None:
            # Row i belongs to the distance i - (side - 1) from the key's row (or column) to the query's.
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * side - 1, embed_dims // num_heads)) for side in rel_pos_size
            )

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) -> tokens (B, N, C); with relative positions, N = H * W of ``hw_shape``, row by row."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.use_rel_pos:
            x = self._attend_with_rel_pos(query, key, value, hw_shape)
        else:
            x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _attend_with_rel_pos(self, query: Tensor, key: Tensor, value: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """softmax(q k^T / sqrt(d) + q R_h + q R_w) v on (B, heads, H * W, d)."""
        (height, width), head_dim = hw_shape, query.shape[3]
        query_map = query.unflatten(2, hw_shape)
        bias_h = torch.einsum('bnhwd,hkd->bnhwk', query_map, _rel_pos(self.rel_pos_h, height))
        bias_w = torch.einsum('bnhwd,wkd->bnhwk', query_map, _rel_pos(self.rel_pos_w, width))
        if height * width <= SMALL_MAP:
            bias = bias_h[..., :, None] + bias_w[..., None, :]
            return F.scaled_dot_product_attention(query, key, value, bias.flatten(4, 5).flatten(2, 3))
        # Append to the query its products with the table entries of all rows and columns, and to the key the one-hot
        # codes of its row and column. Their dot product adds both biases without a bias per pair of tokens.
        query = torch.cat([query * head_dim**-0.5, torch.cat([bias_h, bias_w], dim=4).flatten(2, 3)], dim=3)
        rows, columns = (torch.eye(side, dtype=key.dtype, device=key.device) for side in hw_shape)
        codes = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2)
        key = torch.cat([key, codes.flatten(0, 1).expand(*key.shape[:2], -1, -1)], dim=3)
        # The fused kernels require values of the same length as queries and keys.
        value = F.pad(value, (0, height + width))
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :head_dim]


class ViTBlock(BaseModule):
    """Pre-norm transformer block with attention over the whole map or within square windows.

    Args:
        embed_dims, num_heads, qkv_bias, rel_pos_size: see :class:`Attention`.
        mlp_ratio: hidden channels of the feed-forward layer, as a multiple of ``embed_dims``.
        drop_path_rate: stochastic depth, 0-1.
        window_size: side of a window, in tokens; 0: no windows.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        window_size: int = 0,
        rel_pos_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = Attention(embed_dims, num_heads, qkv_bias, rel_pos_size)
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        hidden_dims = int(embed_dims * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(embed_dims, hidden_dims), act=nn.GELU(), fc2=nn.Linear(hidden_dims, embed_dims))
        )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C), without windows also (B, 1 + H * W, C), of a map of ``hw_shape`` -> same shape."""
        x = x + self.drop_path(self._attend(self.norm1(x), hw_shape))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        if not self.window_size:
            return self.attn(x, hw_shape)
        window = (self.window_size, self.window_size)
        return merge_windows(self.attn(split_windows(x, hw_shape, self.window_size), window), hw_shape)


def split_windows(x: Tensor, hw_shape: tuple[int, int], size: int) -> Tensor:
    """Tokens (B, H * W, C) -> tokens of windows (B * windows, size * size, C), zero-padded at the bottom and right."""
    height, width = hw_shape
    x = F.pad(x.unflatten(1, hw_shape), (0, 0, 0, -width % size, 0, -height % size))
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge_windows(x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """Undo ``split_windows``: tokens of windows (B * windows, size * size, C) -> tokens (B, H * W, C)."""
    height, width = hw_shape
    size = math.isqrt(x.shape[1])
    grid = (-1, math.ceil(height / size), math.ceil(width / size))
    x = x.unflatten(1, (size, size)).unflatten(0, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width].flatten(1, 2)


@MODELS.register_module()
class VisionTransformer(PublishedBackbone):
    """Vision Transformer as a detection backbone with maps of stride ``patch_size``.

    ViTDet's backbone is ``VisionTransformer('base', with_cls_token=False, window_size=14, use_rel_pos=True,
    final_norm=False)``, followed by the neck ``SimpleFeaturePyramid``.

    Args:
        arch: 'tiny', 'small', 'base', 'large', or a dict with the keys of an entry of ``ARCHS``: ``embed_dims``,
            ``depth``, ``num_heads``, ``mlp_ratio``.
        in_channels: channels of the images.
        patch_size: side of a patch, in pixels.
        img_size: side, or (height, width), in pixels, of the images that the position embeddings belong to: the size of
            the pre-training, or with ``use_rel_pos`` the size of the fine-tuning, because the relative positions of
            global blocks are not pre-trained. For images of other sizes, embeddings are resized (bicubic).
        out_indices: 0-based blocks whose maps are returned, in increasing order; None: only the last.
        with_cls_token: whether a class token takes part in the attention; the maps do not contain it.
        final_norm: whether the last block's map is normalized.
        window_size: side, in patches, of the attention windows (14 in ViTDet); 0: global attention. As in ViTDet, maps
            are padded to complete windows with zeros after the norm, and the padding takes part in the attention.
        global_indices: blocks with global attention if ``window_size`` is set; None: the last block of each quarter,
            as in ViTDet.
        use_rel_pos: add ViTDet's decomposed relative positions to the attention scores. Their tables are initialized
            with zeros and may be missing from the checkpoint of ``init_cfg``.
        frozen_stages: -1 freezes nothing; 0 freezes patch embedding, positions and class token; k > 0 also the first k
            blocks (no gradients, eval mode). If all blocks are frozen, so is the final norm.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        drop_path_rate: stochastic depth of the last block, 0-1; increases linearly from 0 over the blocks.
        qkv_bias: whether the query, key and value projections have a bias.
        init_cfg: ``dict(type='Pretrained', checkpoint=path_or_url)`` loads a checkpoint of timm, MAE or mmpretrain, a
            converted one, or that of a detector (its ``backbone``, or another ``prefix``). None: truncated normal
            weights of standard deviation 0.02, and 1 / sqrt(fan-in) in the patch embedding.

    When a checkpoint is loaded, its positions are resized to the grid of ``img_size``, and its class token and final
    norm are ignored if the model has none; both are logged.

    Raises:
        ValueError: If ``arch`` is unknown or invalid, options do not fit together, or an index is out of range.

    Example:
        >>> backbone = VisionTransformer('tiny')
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 75, 101))]
        [(1, 192, 5, 7)]
    """

    family = 'vision_transformer'

    def __init__(
        self,
        arch: str | dict = 'base',
        in_channels: int = 3,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        out_indices: Sequence[int] | None = None,
        with_cls_token: bool = True,
        final_norm: bool = True,
        window_size: int = 0,
        global_indices: Sequence[int] | None = None,
        use_rel_pos: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        arch = resolve_arch(arch)
        dims, depth = arch['embed_dims'], arch['depth']
        if global_indices is not None and not window_size:
            raise ValueError(
                f'global_indices={tuple(global_indices)} needs windows, but window_size=0 makes every block global; '
                'set window_size, such as 14'
            )
        if global_indices is None:
            global_indices = sorted({math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
        out_indices = check_indices(
            'out_indices', (depth - 1,) if out_indices is None else out_indices, depth, 'blocks'
        )
        if global_indices:
            check_indices('global_indices', global_indices, depth, 'blocks')
        check_frozen_stages(frozen_stages, depth, 'what comes before the blocks', 'blocks')
        if with_cls_token and (window_size or use_rel_pos):
            raise ValueError(
                'windows and relative positions do not support a class token: set with_cls_token=False '
                f'to use window_size={window_size}, use_rel_pos={use_rel_pos}'
            )
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if window_size < 0 or patch_size < 1 or len(img_size) != 2 or min(img_size) < 1:
            raise ValueError(
                f'window_size={window_size}, patch_size={patch_size}, img_size={img_size} are invalid; expected '
                'window_size of 0 or more, patch_size of 1 or more, and img_size as a side or (height, width)'
            )

        self.in_channels = in_channels
        self.embed_dims = dims
        self.patch_size = patch_size
        self.grid = tuple(math.ceil(side / patch_size) for side in img_size)
        self.out_indices = out_indices
        self.out_channels = (dims,) * len(out_indices)
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp

        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, dims, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims)) if with_cls_token else None
        # The position of the class token, if any, comes first.
        self.pos_embed = nn.Parameter(torch.zeros(1, with_cls_token + math.prod(self.grid), dims))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            window = 0 if i in global_indices else window_size
            rel_pos_size = ((window, window) if window else self.grid) if use_rel_pos else None
            self.blocks.append(
                ViTBlock(
                    dims,
                    arch['num_heads'],
                    arch['mlp_ratio'],
                    qkv_bias,
                    drop_path_rate * i / max(depth - 1, 1),
                    window,
                    rel_pos_size,
                )
            )
        self.norm = nn.LayerNorm(dims, eps=1e-6) if final_norm else None
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) -> one map (B, C, ceil(H / patch_size), ceil(W / patch_size)) per entry
        of ``out_indices``; the images are zero-padded to complete patches.

        Raises:
            ValueError: If the channels differ from ``in_channels``.
        """
        check_image('VisionTransformer', x, self.in_channels)
        x = self.patch_embed(F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size)))
        hw_shape = (x.shape[2], x.shape[3])
        x = map_to_tokens(x) + self._positions(hw_shape)
        if self.cls_token is not None:
            cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        outs = []
        for i, block in enumerate(self.blocks[: self.out_indices[-1] + 1]):
            x = run_layer(block, self.with_cp, x=x, hw_shape=hw_shape)
            if i in self.out_indices:
                out = x if self.cls_token is None else x[:, 1:]
                if self.norm is not None and i == len(self.blocks) - 1:
                    out = self.norm(out)
                outs.append(tokens_to_map(out, hw_shape))
        return tuple(outs)

    def _positions(self, hw_shape: tuple[int, int]) -> Tensor:
        """Position embeddings of a map's patches, (1, H * W, C)."""
        positions = self.pos_embed if self.cls_token is None else self.pos_embed[:, 1:]
        return _resize_positions(positions, self.grid, hw_shape)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                parameter.requires_grad_(False)
        frozen = [self.patch_embed, *self.blocks[: self.frozen_stages]]
        if self.frozen_stages == len(self.blocks) and self.norm is not None:
            frozen.append(self.norm)
        for module in frozen:
            module.eval().requires_grad_(False)

    def _draw_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def _load_published(self, state_dict: dict[str, Tensor], path: str) -> None:
        self._fit_state_dict(state_dict)
        own = self.state_dict()
        # Pre-trained models have no tables of relative positions; they start from zero.
        missing = [key for key in own if key not in state_dict and '.rel_pos_' not in key]
        unexpected = [key for key in state_dict if key not in own]
        if missing or unexpected:
            raise ValueError(
                f'{path} does not fit the model: missing keys {missing}, unexpected keys {unexpected}; '
                'set arch, with_cls_token, final_norm, qkv_bias and use_rel_pos as in the checkpoint'
            )
        wrong = [
            f'{key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}'
            for key, value in state_dict.items()
            if value.shape != own[key].shape
        ]
        if wrong:
            raise ValueError(
                f'{path} belongs to a ViT of another size: {"; ".join(wrong[:3])} ({len(wrong)} in total); '
                'set arch, patch_size, in_channels, img_size and window_size as in the checkpoint'
            )
        self.load_state_dict(state_dict, strict=False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        self._fit_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_state_dict(self, state_dict: dict[str, Tensor], prefix: str = '') -> None:
        """In place, resize positions of another resolution, and remove parts that this model does not have."""
        done = []
        pos_embed, cls_token = f'{prefix}pos_embed', f'{prefix}cls_token'
        if self.cls_token is None and cls_token in state_dict:
            done.append('ignored the class token')
            del state_dict[cls_token]
            if pos_embed in state_dict:
                state_dict[pos_embed] = state_dict[pos_embed][:, 1:]
        norm = [key for key in state_dict if key.startswith(f'{prefix}norm.')]
        if self.norm is None and norm:
            done.append('ignored the final norm')
            for key in norm:
                del state_dict[key]
        positions = state_dict.get(pos_embed)
        if positions is not None and positions.shape[1:] != self.pos_embed.shape[1:]:
            first = 0 if self.cls_token is None else 1
            side = math.isqrt(max(positions.shape[1] - first, 0))
            # The grid of a non-square table is unknown; loading it fails with torch's message about the sizes.
            if side and side * side == positions.shape[1] - first:
                done.append(f'resized the positions from {side}x{side} to {self.grid[0]}x{self.grid[1]}')
                state_dict[pos_embed] = torch.cat(
                    [positions[:, :first], _resize_positions(positions[:, first:], (side, side), self.grid)], dim=1
                )
        if done:
            print_log(f'VisionTransformer checkpoint: {"; ".join(done)}', logger='current')


def resolve_arch(arch: str | dict) -> dict:
    """The arch dict of a published name, or a given dict; raises ValueError if the dict is invalid."""
    arch = choose_arch(arch, ARCHS)
    if min(arch.values()) <= 0 or arch['embed_dims'] % arch['num_heads']:
        raise ValueError(
            f'arch dict is invalid: got {dict(arch)}; expected positive numbers, and embed_dims a multiple of num_heads'
        )
    return arch


def _resize_positions(positions: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize positions (1, h * w, C) of a ``grid`` (h, w) to (1, H * W, C) of a ``size`` (H, W), bicubic."""
    if grid == size:
        return positions
    return map_to_tokens(F.interpolate(tokens_to_map(positions, grid), size, mode='bicubic', align_corners=False))


def _rel_pos(table: Tensor, side: int) -> Tensor:
    """Table (2 * size - 1, d) -> entries (side, side, d) by the distance of query and key along this axis."""
    if table.shape[0] != 2 * side - 1:
        table = F.interpolate(table.t()[None], 2 * side - 1, mode='linear', align_corners=False)[0].t()
    position = torch.arange(side, device=table.device)
    return table[position[:, None] - position + side - 1]
