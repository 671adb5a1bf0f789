"""Figures of detections, training curves and attention."""

from msda_plugin.visualization.attention import Recording, record_attention
from msda_plugin.visualization.attention_figure import draw_heads, draw_query
from msda_plugin.visualization.attention_page import attention_page, write_attention_page
from msda_plugin.visualization.curves import draw_curves
from msda_plugin.visualization.detection import (
    class_colors,
    draw_boxes,
    draw_contact_sheet,
    draw_sheet,
    score_caption,
    write_png,
)
from msda_plugin.visualization.edge_distributions import draw_edges

__all__ = [
    'Recording',
    'attention_page',
    'class_colors',
    'draw_boxes',
    'draw_contact_sheet',
    'draw_curves',
    'draw_edges',
    'draw_heads',
    'draw_query',
    'draw_sheet',
    'record_attention',
    'score_caption',
    'write_attention_page',
    'write_png',
]
