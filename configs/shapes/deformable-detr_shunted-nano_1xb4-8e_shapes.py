# The base form: learned queries, no box refinement.
_base_ = './deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
model = dict(as_two_stage=False, with_box_refine=False)
