"""Multi-scale deformable attention: the operator, its reference, and the choice of backend. Needs only torch."""

from msda_plugin.ops.backends import Backend, backend_for, use_backend
from msda_plugin.ops.functional import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_reference

__all__ = [
    'Backend',
    'backend_for',
    'ms_deform_attn',
    'ms_deform_attn_fused',
    'ms_deform_attn_reference',
    'use_backend',
]
