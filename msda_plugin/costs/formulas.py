"""MACs (multiply-accumulate operations) and memory of attention layers as functions of their sizes.

Sources: Vaswani et al., https://arxiv.org/abs/1706.03762 (table 1); Zhu et al., Deformable DETR,
https://arxiv.org/abs/2010.04159 (sections 3, 4.1 and appendix A.1); Wang et al., PVT, https://arxiv.org/abs/2102.12122;
Liu et al., Swin, https://arxiv.org/abs/2103.14030 (equations 1 and 2); Ren et al., Shunted Transformer,
https://arxiv.org/abs/2111.15193. The formulas are for one image and one layer. They are exact: they count every
matrix product, convolution and interpolation, like torch's FLOP counter, which counts 2 FLOPs for each MAC. As in the
papers, softmax, norms, activations and additions are left out; they grow no faster than the memory.
"""

from dataclasses import dataclass

MACS_PER_SAMPLE = 5  # per channel: four neighbors of a bilinear interpolation, and the product with the weight
KERNEL = 3  # of the depthwise convolution on the values of shunted attention
LINEAR_SRA_SIDE = 7


@dataclass(frozen=True)
class Cost:
    """The cost of one layer on one image.

    Attributes:
        projection: MACs of linear layers and convolutions, which treat each position alone or with fixed neighbors.
        mixing: MACs between positions: attention scores and weighted sums, or sampling.
        memory: Number of elements that a plain implementation holds in addition to input and output: queries, keys and
            values, and attention scores or sampling points with their weights.
    """

    projection: int
    mixing: int
    memory: int

    @property
    def macs(self) -> int:
        return self.projection + self.mixing

    multiply_adds = macs  # former name

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(self.projection + other.projection, self.mixing + other.mixing, self.memory + other.memory)


def convolution(height: int, width: int, channels: int, kernel_size: int = 3) -> Cost:
    """A k x k convolution from C to C channels, stride 1: H W C^2 k^2."""
    return Cost(height * width * channels**2 * kernel_size**2, 0, 0)


def cross_attention(num_queries: int, num_keys: int, channels: int, num_heads: int = 8) -> Cost:
    """Queries over keys: 2 N_q C^2 + 2 N_k C^2, and 2 N_q N_k C."""
    return Cost(
        2 * (num_queries + num_keys) * channels**2,
        2 * num_queries * num_keys * channels,
        (num_queries + 2 * num_keys) * channels + num_heads * num_queries * num_keys,
    )


def self_attention(num_tokens: int, channels: int, num_heads: int = 8) -> Cost:
    """Every token over every token: 4 N C^2 + 2 N^2 C."""
    return cross_attention(num_tokens, num_tokens, channels, num_heads)


def vit_attention(
    image_height: int, image_width: int, channels: int, patch_size: int = 16, num_heads: int = 12
) -> Cost:
    """Self-attention over the patches of an image: N = H W / P^2, the last row and column of patches padded."""
    return self_attention(-(-image_height // patch_size) * -(-image_width // patch_size), channels, num_heads)


def detr_encoder_layer(height: int, width: int, channels: int, num_heads: int = 8) -> Cost:
    """DETR's encoder attends to all pixels of its map: 4 H W C^2 + 2 H^2 W^2 C."""
    return self_attention(height * width, channels, num_heads)


def detr_decoder_layer(num_queries: int, height: int, width: int, channels: int, num_heads: int = 8) -> Cost:
    """Self-attention of the object queries, then cross-attention to all pixels, which is linear in H W."""
    return self_attention(num_queries, channels, num_heads) + cross_attention(
        num_queries, height * width, channels, num_heads
    )


def spatial_reduction_attention(height: int, width: int, channels: int, reduction: int, num_heads: int = 8) -> Cost:
    """PVT: keys and values from merged windows of R x R: 2 H W C (H W / R^2), and H W C^2 for the merging."""
    num_tokens, num_keys = height * width, max(height // reduction, 1) * max(width // reduction, 1)
    merging = num_keys * reduction**2 * channels**2 if reduction > 1 else 0
    return cross_attention(num_tokens, num_keys, channels, num_heads) + Cost(merging, 0, 0)


def linear_spatial_reduction_attention(height: int, width: int, channels: int, num_heads: int = 8) -> Cost:
    """PVT v2: keys and values from a map pooled to 7 x 7, whatever its size, so that the cost is linear in H W."""
    num_keys = LINEAR_SRA_SIDE**2
    return cross_attention(height * width, num_keys, channels, num_heads) + Cost(num_keys * channels**2, 0, 0)


def window_attention(height: int, width: int, channels: int, window_size: int = 7, num_heads: int = 8) -> Cost:
    """Swin: 4 H W C^2 + 2 M^2 H W C, with H and W rounded up to multiples of M except in the output projection."""
    padded = -(-height // window_size) * -(-width // window_size) * window_size**2
    return Cost(
        (3 * padded + height * width) * channels**2,
        2 * padded * window_size**2 * channels,
        3 * padded * channels + num_heads * padded * window_size**2,
    )


def shunted_attention(height: int, width: int, channels: int, reduction: int, num_heads: int = 8) -> Cost:
    """Half the heads over merged windows of R x R, half over R/2 x R/2, and a depthwise convolution on the values.

    ``reduction=1`` is self-attention over all pixels, with the same convolution.
    """
    num_tokens = height * width
    if reduction == 1:
        return self_attention(num_tokens, channels, num_heads) + Cost(num_tokens * channels * KERNEL**2, 0, 0)
    cost = Cost(2 * num_tokens * channels**2, 0, num_tokens * channels)  # query and output projection
    for rate in (reduction, reduction // 2):
        num_keys = (height // rate) * (width // rate)
        half = channels // 2
        cost += Cost(
            num_keys * (rate**2 * channels**2 + channels**2 + half * KERNEL**2),
            2 * num_tokens * num_keys * half,
            num_keys * channels + num_heads // 2 * num_tokens * num_keys,
        )
    return cost


def deformable_attention(
    num_queries: int, num_keys: int, channels: int, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
) -> Cost:
    """Each query samples L K points per head: N_k C^2 + N_q C^2 + 3 N_q C M L K, and 5 N_q L K C.

    In Deformable DETR's encoder the queries are the pixels, N_q = N_k = the sum of H_l W_l, so the cost is linear in
    their number. In its decoder only the projection of the values depends on the number of pixels.
    """
    samples = num_heads * num_levels * num_points
    return Cost(
        (num_keys + num_queries) * channels**2 + 3 * num_queries * channels * samples,
        MACS_PER_SAMPLE * num_queries * num_levels * num_points * channels,
        num_keys * channels + 3 * num_queries * samples,
    )
