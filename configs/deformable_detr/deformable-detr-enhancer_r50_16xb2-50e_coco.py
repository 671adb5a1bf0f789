# Grounding DINO's image feature enhancer as the encoder.
_base_ = './deformable-detr_r50_16xb2-50e_coco.py'
model = dict(
    encoder=dict(_delete_=True, type='msda_plugin.GroundingDinoImageEncoder'),
    positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
)
