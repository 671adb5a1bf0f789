# Modulated deformable convolutions (DCNv2) in the last two stages of the backbone.
_base_ = './deformable-detr_r50_16xb2-50e_coco.py'
model = dict(
    backbone=dict(
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False), stage_with_dcn=(False, False, True, True)
    )
)
