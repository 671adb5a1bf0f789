# Deformable DETR on a plain ViT-B with windows and the simple feature pyramid, with MAE's published weights.
_base_ = '../deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='msda_plugin.VisionTransformer',
        arch='base',
        img_size=1024,
        with_cls_token=False,
        final_norm=False,
        window_size=14,
        use_rel_pos=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/mae_pretrain_vit_base.pth'),
    ),
    neck=dict(
        _delete_=True,
        type='msda_plugin.SimpleFeaturePyramid',
        in_channels=768,
        out_channels=256,
        scale_factors=(2.0, 1.0, 0.5),
        num_outs=4,
    ),
)
