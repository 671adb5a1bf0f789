"""Position biases of deformable multi-head attention, added to the logits of queries and deformed points.

The biases of all queries are quadratic in the map size (0.8 GB per layer for 12 heads on a 50x80 map, without
intermediate results). Each module therefore takes a map's queries and points, and returns a function that computes the
biases of a slice of the queries.

Sources: as in `deformable_multi_head_attention`.
"""

from collections.abc import Callable

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

# A slice of the queries, counted row by row -> bias (B or 1, heads, slice, n).
PartialBias = Callable[[slice], Tensor]


class RelativePositionTable(BaseModule):
    """A table of biases over displacements, -2 to 2 along each axis, interpolated bilinearly.

    Args:
        num_heads: number of heads; a multiple of ``num_groups``.
        num_groups: number of groups of heads; each has its own points.
        map_size: (H, W) of the map that the table is made for; the table has 2H - 1 rows and 2W - 1 columns.
        resize: resize the table bicubically to the table size of the query map before the interpolation.
    """

    def __init__(self, num_heads: int, num_groups: int, map_size: tuple[int, int], resize: bool):
        super().__init__()
        self.num_groups = num_groups
        self.resize = resize
        self.values_per_pair = num_heads + 2 * num_groups
        self.table = nn.Parameter(torch.empty(num_heads, *(2 * side - 1 for side in map_size)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as in the authors' code."""
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(self, query_grid: Tensor, positions: Tensor) -> PartialBias:
        """Queries (H, W, 2) and points (B, num_groups, Hk, Wk, 2), both (y, x), -1 to 1 -> their biases."""
        table = self.table.to(positions.dtype)
        size = tuple(2 * side - 1 for side in query_grid.shape[:2])
        if self.resize and table.shape[1:] != size:
            table = F.interpolate(table[None], size, mode='bicubic')[0]
        table = table.unflatten(0, (self.num_groups, -1)).repeat(positions.shape[0], 1, 1, 1)
        # grid_sample takes (x, y), -1 to 1 over the table.
        queries = 0.5 * query_grid.view(-1, 1, 2).flip(-1)
        points = 0.5 * positions.flatten(0, 1).flatten(1, 2)[:, None].flip(-1)

        def bias(part: slice) -> Tensor:
            bias = F.grid_sample(table, queries[part] - points, align_corners=True)
            return bias.unflatten(0, (positions.shape[0], self.num_groups)).flatten(1, 2)

        return bias


class LogSpacedPositionBias(BaseModule):
    """A small MLP of the log-spaced displacement, shared by all groups (Swin V2's log-CPB).

    Args:
        num_heads: number of heads; a multiple of ``num_groups``.
        num_groups: number of groups of heads; each has its own points.
        hidden_dims: hidden channels of the MLP.
    """

    def __init__(self, num_heads: int, num_groups: int, hidden_dims: int = 32):
        super().__init__()
        self.values_per_pair = num_heads + num_groups * hidden_dims
        self.mlp = nn.Sequential(
            nn.Linear(2, hidden_dims),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dims, num_heads // num_groups, bias=False),
        )

    def forward(self, query_grid: Tensor, positions: Tensor) -> PartialBias:
        """Queries (H, W, 2) and points (B, num_groups, Hk, Wk, 2), both (y, x), -1 to 1 -> their biases."""
        queries = 4 * query_grid.view(-1, 1, 2)
        points = 4 * positions.flatten(2, 3)[:, :, None]

        def bias(part: slice) -> Tensor:
            displacement = queries[part] - points
            displacement = displacement.sign() * (displacement.abs() + 1).log2() / 3
            # (B, num_groups, slice, n, heads of a group) -> (B, num_heads, slice, n)
            return self.mlp(displacement.to(self.mlp[0].weight.dtype)).permute(0, 1, 4, 2, 3).flatten(1, 2)

        return bias


class FixedPositionTable(BaseModule):
    """A table with one bias per query and point, independent of the offsets, resized bicubically for other maps.

    Args:
        num_heads: number of heads.
        map_size: (H, W) of the queries that the table is made for.
        num_points: (Hk, Wk) of the points that the table is made for.
    """

    def __init__(self, num_heads: int, map_size: tuple[int, int], num_points: tuple[int, int]):
        super().__init__()
        self.map_size = map_size
        self.num_points = num_points
        self.values_per_pair = num_heads
        self.table = nn.Parameter(torch.empty(num_heads, map_size[0] * map_size[1], num_points[0] * num_points[1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as in the authors' code."""
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(self, query_grid: Tensor, positions: Tensor) -> PartialBias:
        """Queries (H, W, 2) and points (B, num_groups, Hk, Wk, 2) -> their biases, which depend on the sizes only."""
        map_size, num_points = query_grid.shape[:2], positions.shape[2:4]
        if map_size == self.map_size and num_points == self.num_points:
            return lambda part: self.table[None, :, part]
        table = self.table.to(positions.dtype)
        # Bicubic interpolation is linear in the map: these are its coefficients, (H * W, queries of the table).
        shares = torch.eye(table.shape[1], dtype=table.dtype, device=table.device).unflatten(1, self.map_size)
        shares = F.interpolate(shares[None], map_size, mode='bicubic')[0].flatten(1).t()

        def bias(part: slice) -> Tensor:
            rows = (shares[part] @ table).unflatten(2, self.num_points)
            return F.interpolate(rows, num_points, mode='bicubic').flatten(2)[None]

        return bias
