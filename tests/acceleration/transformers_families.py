"""Tiny models of transformers' families with multi-scale deformable attention: random weights, no downloads."""

import torch
import transformers
from torch import nn

HEIGHT, WIDTH = 75, 101
RESNET = dict(
    embedding_size=8,
    hidden_sizes=[8, 16, 32, 64],
    depths=[1, 1, 1, 1],
    layer_type='basic',
    out_features=['stage2', 'stage3', 'stage4'],
)
SWIN = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.0)
BERT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=120)
CLIP_TEXT = BERT | dict(max_position_embeddings=16, eos_token_id=2)


def resnet():
    return transformers.ResNetConfig(**RESNET)


def deformable_detr(**fields):
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=10,
        num_labels=5,
        **fields,
    )
    return transformers.DeformableDetrForObjectDetection(config), pixels()


def deformable_detr_two_stage():
    return deformable_detr(two_stage=True, with_box_refine=True, two_stage_num_proposals=10)


def grounding_dino(kind='GroundingDino'):
    text = transformers.BertConfig(**BERT)
    backbone = transformers.SwinConfig(**SWIN, out_indices=[2, 3, 4])
    config = getattr(transformers, f'{kind}Config')(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=10,
        max_text_len=8,
        disable_custom_kernels=True,
    )
    words = torch.tensor([[101, 7, 9, 102, 8, 102], [101, 5, 102, 0, 0, 0]])
    inputs = dict(input_ids=words, attention_mask=(words > 0).long())
    return getattr(transformers, f'{kind}ForObjectDetection')(config), pixels() | inputs


def mm_grounding_dino():
    return grounding_dino('MMGroundingDino')


def omdet_turbo():
    config = transformers.OmDetTurboConfig(
        text_config=transformers.CLIPTextConfig(**CLIP_TEXT, projection_dim=16),
        backbone_config=transformers.SwinConfig(**SWIN, out_indices=[2, 3, 4]),
        apply_layernorm_after_vision_backbone=False,
        image_size=96,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        class_embed_dim=16,
        task_encoder_hidden_dim=32,
        num_queries=10,
        encoder_hidden_dim=32,
        vision_features_channels=[32, 32, 32],
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=4,
        encoder_dim_feedforward=32,
        encoder_layers=1,
        decoder_hidden_dim=32,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=32,
        disable_custom_kernels=True,
    )
    words = torch.tensor([[1, 7, 2], [1, 9, 2], [1, 5, 2]])
    inputs = dict(
        pixel_values=torch.randn(2, 3, 96, 96),
        classes_input_ids=torch.cat([words, words]),
        classes_attention_mask=torch.ones(6, 3, dtype=torch.long),
        tasks_input_ids=words[:2],
        tasks_attention_mask=torch.ones(2, 3, dtype=torch.long),
        classes_structure=torch.tensor([3, 3]),
    )
    return transformers.OmDetTurboForObjectDetection(config), inputs


def rt_detr(kind='RTDetr', head='ForObjectDetection', **fields):
    config = getattr(transformers, f'{kind}Config')(
        backbone_config=fields.pop('backbone_config', None) or transformers.RTDetrResNetConfig(**RESNET),
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_queries=10,
        num_denoising=0,
        num_labels=5,
        **(dict(d_model=32) | fields),
    )
    return getattr(transformers, kind + head)(config), dict(pixel_values=torch.randn(2, 3, 64, 96))


def rt_detr_v2(**fields):
    return rt_detr('RTDetrV2', **fields)


def rt_detr_v2_discrete():
    return rt_detr_v2(decoder_method='discrete', decoder_offset_scale=0.7)


def hgnet_v2(out_features=('stage2', 'stage3', 'stage4')):
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        stage_in_channels=[8, 8, 16, 32],
        stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[8, 16, 32, 64],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=list(out_features),
    )


def d_fine(kind='DFine', points=(3, 6, 2), **fields):
    return rt_detr(kind, backbone_config=hgnet_v2(), decoder_n_points=list(points), **fields)


def d_fine_discrete():
    return d_fine(decoder_method='discrete')


def deimv2():
    return d_fine('Deimv2')


def lw_detr():
    backbone = transformers.LwDetrViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        patch_size=16,
        num_windows=4,
        out_indices=[1, 2],
        window_block_indices=[0],
    )
    config = transformers.LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[0.5, 2.0],
        d_model=32,
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        num_queries=10,
        group_detr=2,
        num_labels=5,
    )
    return transformers.LwDetrForObjectDetection(config), pixels(64, 64)


def rf_detr():
    backbone = dict(
        model_type='rf_detr_dinov2',
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        num_windows=2,
        out_indices=[1, 2],
    )
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        num_queries=10,
        group_detr=2,
        num_labels=5,
        intermediate_size=32,
    )
    return transformers.RfDetrForObjectDetection(config), pixels(56, 56)


def pp_doclayout_v2():
    reading = dict(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=1,
        coordinate_size=8,
        shape_size=8,
        num_classes=20,
        global_pointer_head_size=8,
    )
    return rt_detr(
        'PPDocLayoutV2', reading_order_config=reading, class_thresholds=[0.1] * 5, class_order=[0, 1, 2, 3, 4]
    )


def pp_doclayout_v3():
    backbone = hgnet_v2(out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    return rt_detr('PPDocLayoutV3', backbone_config=backbone, mask_feature_channels=[8, 8], x4_feat_dim=8)


def pp_doclayout_v4():
    return rt_detr('PPDocLayoutV4', hidden_size=32)


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN, out_features=['stage1', 'stage2', 'stage3', 'stage4']),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=64,
        num_queries=10,
        num_labels=5,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), pixels()


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN, out_features=['stage1', 'stage2', 'stage3', 'stage4']),
        num_queries=10,
        task_seq_len=7,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=4,
        dim_feedforward=64,
        query_dec_layers=1,
    )
    model = transformers.OneFormerForUniversalSegmentation(config)
    return model, pixels() | dict(task_inputs=torch.randint(0, 9, (2, 7)))


FAMILIES = {
    build.__name__: build
    for build in (
        deformable_detr,
        deformable_detr_two_stage,
        grounding_dino,
        mm_grounding_dino,
        omdet_turbo,
        rt_detr,
        rf_detr,
        lw_detr,
        pp_doclayout_v2,
        pp_doclayout_v3,
        pp_doclayout_v4,
        mask2former,
        oneformer,
        rt_detr_v2,
        rt_detr_v2_discrete,
        d_fine,
        d_fine_discrete,
        deimv2,
    )
}


def build(name):
    """A model, and the arguments of its forward for two images, one of them padded where the family has a mask."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # larger than at initialization, so that the outputs depend on the attention
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if 'sampling_offsets' in module._modules:
            for layer in module.children():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.3)
    return model, inputs


def pixels(height=HEIGHT, width=WIDTH):
    mask = torch.ones(2, height, width, dtype=torch.long)
    mask[1, height * 2 // 3 :] = 0
    mask[1, :, width * 3 // 4 :] = 0
    return dict(pixel_values=torch.randn(2, 3, height, width), pixel_mask=mask)


def tensors_in(outputs):
    """All floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, dict):
        yield from tensors_in(list(outputs.values()))
    elif isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from tensors_in(output)
