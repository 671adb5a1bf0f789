"""The attention between image and text of Grounding DINO and GLIP, with its products in another order.

The stock layers project each pixel to 1024 channels or more, three times, although a text has only a few words. The
same numbers come from projecting the words: scores (x W) k are x (W k), a few columns per pixel, and a mean of
projected pixels is the projection of a mean. This holds for gradients and dropout as well.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.acceleration.convert_model import is_plain

LIMIT = 50000  # of scores, within the range of half precision


class TransformersTextFusion(nn.Module):
    """The layer of transformers' Grounding DINO and MM Grounding DINO."""

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Attend from each pixel to the words, and from each word to the pixels.

        Args:
            vision_features: (bs, num_pixels, channels).
            text_features: (bs, num_words, channels).
            vision_attention_mask: (bs, num_pixels), True at padding.
            text_attention_mask: (bs, num_words), True at padding.

        Returns:
            Output and attention weights of the pixels, (bs, num_pixels, channels) and (bs * num_heads, num_pixels,
            num_words); and of the words, with pixels and words exchanged.
        """
        if not _has_plain_projections(self):
            return super().forward(vision_features, text_features, vision_attention_mask, text_attention_mask)
        products = _scores(self, vision_features, text_features, self.vision_proj, self.text_proj)
        products = (products - products.max()).clamp(-LIMIT, LIMIT)
        to_pixels = _relative_to_largest(products.mT)
        if vision_attention_mask is not None:
            to_pixels = to_pixels.masked_fill(_per_head(self, vision_attention_mask), -torch.inf)
        if text_attention_mask is not None:
            products = products.masked_fill(_per_head(self, text_attention_mask), -torch.inf)
        to_pixels, to_words = to_pixels.softmax(-1), products.softmax(-1)
        kept_words = F.dropout(to_words, self.dropout, self.training)
        kept_pixels = F.dropout(to_pixels, self.dropout, self.training)
        pixels = _pixel_outputs(kept_words, text_features, self.values_text_proj, self.out_vision_proj)
        words = _word_outputs(kept_pixels, vision_features, self.values_vision_proj, self.out_text_proj)
        return (pixels, to_words), (words, to_pixels)


class MMDetectionTextFusion(nn.Module):
    """The layer of MMDetection's Grounding DINO and GLIP."""

    def forward(
        self,
        vision: Tensor,
        lang: Tensor,
        attention_mask_v: Tensor | None = None,
        attention_mask_l: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend from each pixel to the words, and from each word to the pixels.

        Args:
            vision: (bs, num_pixels, channels).
            lang: (bs, num_words, channels).
            attention_mask_v: (bs, num_pixels), True at padding.
            attention_mask_l: (bs, num_words), 0 at padding; other numbers are added to the scores.

        Returns:
            (bs, num_pixels, channels) and (bs, num_words, channels).
        """
        if not _has_plain_projections(self):
            return super().forward(vision, lang, attention_mask_v, attention_mask_l)
        low = -LIMIT if self.clamp_min_for_underflow else None
        high = LIMIT if self.clamp_max_for_overflow else None
        products = _scores(self, vision, lang, self.v_proj, self.l_proj)
        if self.stable_softmax_2d:
            products = products - products.max()
        if low is not None or high is not None:
            products = products.clamp(low, high)
        to_pixels = _relative_to_largest(products.mT, low, high)
        if attention_mask_v is not None:
            to_pixels = to_pixels.masked_fill(_per_head(self, attention_mask_v), -torch.inf)
        if attention_mask_l is not None:
            products = products + _per_head(self, attention_mask_l.masked_fill(attention_mask_l == 0, -9e15))
        kept_words = F.dropout(products.softmax(-1), self.dropout, self.training)
        kept_pixels = F.dropout(to_pixels.softmax(-1), self.dropout, self.training)
        pixels = _pixel_outputs(kept_words, lang, self.values_l_proj, self.out_v_proj)
        return pixels, _word_outputs(kept_pixels, vision, self.values_v_proj, self.out_l_proj)


def _has_plain_projections(layer: nn.Module) -> bool:
    """Whether all projections are linear layers with a bias and without hooks: their weights are used directly."""
    return all(
        is_plain(part, nn.Linear)
        and part.bias is not None
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        for part in layer.children()
    )


def _scores(layer: nn.Module, pixels: Tensor, words: Tensor, pixel_proj: nn.Linear, word_proj: nn.Linear) -> Tensor:
    """Scaled products of the projected pixels and words, (bs * num_heads, num_pixels, num_words)."""
    keys = _split_heads(word_proj(words), layer.num_heads) * layer.scale  # (bs, heads, words, head_dim)
    weight = pixel_proj.weight.unflatten(0, (layer.num_heads, -1))  # (heads, head_dim, channels)
    bias = pixel_proj.bias.view(layer.num_heads, -1, 1)
    columns = (keys @ weight).flatten(1, 2)  # (bs, heads * words, channels)
    products = torch.baddbmm((keys @ bias).flatten(1).unsqueeze(1), pixels, columns.mT)
    return products.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2).flatten(0, 1)


def _pixel_outputs(weights: Tensor, words: Tensor, value_proj: nn.Linear, out_proj: nn.Linear) -> Tensor:
    """(bs * num_heads, num_pixels, num_words) attention weights -> (bs, num_pixels, channels)."""
    weights = weights.unflatten(0, (len(words), -1))  # (bs, heads, pixels, words)
    values = _split_heads(value_proj(words), weights.shape[1])  # (bs, heads, words, head_dim)
    projection = out_proj.weight.unflatten(1, (weights.shape[1], -1)).permute(1, 2, 0)  # (heads, head_dim, channels)
    return torch.baddbmm(out_proj.bias, weights.transpose(1, 2).flatten(2), (values @ projection).flatten(1, 2))


def _word_outputs(weights: Tensor, pixels: Tensor, value_proj: nn.Linear, out_proj: nn.Linear) -> Tensor:
    """(bs * num_heads, num_words, num_pixels) attention weights -> (bs, num_words, channels)."""
    weights = weights.unflatten(0, (len(pixels), -1))  # (bs, heads, words, pixels)
    num_heads = weights.shape[1]
    means = (weights.flatten(1, 2) @ pixels).unflatten(1, (num_heads, -1))  # (bs, heads, words, channels)
    projection = value_proj.weight.unflatten(0, (num_heads, -1))  # (heads, head_dim, channels)
    # After dropout the weights do not add up to 1.
    values = means @ projection.mT + weights.sum(-1, keepdim=True) * value_proj.bias.view(num_heads, 1, -1)
    return out_proj(values.transpose(1, 2).flatten(2))


def _relative_to_largest(scores: Tensor, low: float | None = -LIMIT, high: float | None = LIMIT) -> Tensor:
    scores = scores - scores.amax(-1, keepdim=True)
    return scores if low is None and high is None else scores.clamp(low, high)


def _per_head(layer: nn.Module, mask: Tensor) -> Tensor:
    """(bs, num_keys) -> (bs * num_heads, 1, num_keys)."""
    return mask.repeat_interleave(layer.num_heads, 0).unsqueeze(1)


def _split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    return tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)
