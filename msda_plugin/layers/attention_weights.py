"""The attention weights that ``scaled_dot_product_attention`` does not return."""

from torch import Tensor


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weights inside ``scaled_dot_product_attention(query, key, value, bias)``.

    Args:
        query: (..., num_queries, head_dim).
        key: (..., num_keys, head_dim).
        bias: added to the scores, (..., num_queries, num_keys); None: no bias.

    Returns:
        (..., num_queries, num_keys), summing to 1 over the keys.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1)
