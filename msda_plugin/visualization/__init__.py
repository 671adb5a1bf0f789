"""Pictures: detections, the curves of a training, and what attention looks at."""

from msda_plugin.visualization.attention import Recording, record_attention
from msda_plugin.visualization.attention_page import attention_page, write_attention_page
from msda_plugin.visualization.attention_picture import draw_heads, draw_query
from msda_plugin.visualization.curves import draw_curves
from msda_plugin.visualization.detection import class_colours, draw_boxes, draw_sheet, write_png

__all__ = [
    'Recording',
    'attention_page',
    'class_colours',
    'draw_boxes',
    'draw_curves',
    'draw_heads',
    'draw_query',
    'draw_sheet',
    'record_attention',
    'write_attention_page',
    'write_png',
]
