"""The encoders and decoders of DETR and Deformable DETR share one layer stack and stay instances of MMDetection's."""

import pytest
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models import layers as mmdet_layers

from msda_plugin import layers
from msda_plugin.layers import MultiScaleDeformableAttention

PARTS = ('TransformerEncoder', 'TransformerEncoderLayer', 'TransformerDecoder', 'TransformerDecoderLayer')
ATTENTION = dict(embed_dims=16, num_heads=2)
LAYER = dict(self_attn_cfg=ATTENTION, ffn_cfg=dict(embed_dims=16, feedforward_channels=32))


@pytest.mark.parametrize('part', PARTS)
def test_classes(part):
    detr, deformable = getattr(layers, f'Detr{part}'), getattr(layers, f'DeformableDetr{part}')
    assert issubclass(deformable, detr)
    assert issubclass(detr, getattr(mmdet_layers, f'Detr{part}'))
    assert issubclass(deformable, getattr(mmdet_layers, f'DeformableDetr{part}'))


@pytest.mark.parametrize(
    'prefix, attention', [('Detr', MultiheadAttention), ('DeformableDetr', MultiScaleDeformableAttention)]
)
def test_default_types(prefix, attention):
    encoder = getattr(layers, f'{prefix}TransformerEncoder')(2, LAYER, num_cp=1)
    decoder = getattr(layers, f'{prefix}TransformerDecoder')(2, LAYER | dict(cross_attn_cfg=ATTENTION), num_cp=2)
    for stack, name in ((encoder, 'EncoderLayer'), (decoder, 'DecoderLayer')):
        assert {type(layer) for layer in stack.layers} == {getattr(layers, f'{prefix}Transformer{name}')}
        assert stack.embed_dims == 16
    assert (encoder.num_cp, decoder.num_cp) == (1, 2)
    assert type(encoder.layers[0].self_attn) is attention
    assert type(decoder.layers[0].self_attn) is MultiheadAttention
    assert type(decoder.layers[0].cross_attn) is attention
    assert hasattr(decoder, 'post_norm') == (prefix == 'Detr')
