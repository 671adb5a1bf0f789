# Learned queries, box refinement.
_base_ = './deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
model = dict(as_two_stage=False)
