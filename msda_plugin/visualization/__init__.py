"""Figures of detections, training curves and attention."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from msda_plugin.visualization.attention import Recording, record_attention
    from msda_plugin.visualization.attention_figure import draw_heads, draw_query
    from msda_plugin.visualization.attention_html import attention_page, write_attention_page

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

_ATTENTION = {
    'attention': ('Recording', 'record_attention'),
    'attention_figure': ('draw_heads', 'draw_query'),
    'attention_html': ('attention_page', 'write_attention_page'),
}


def __getattr__(name: str) -> object:
    # Attention needs MMDetection, and boxes do not.
    for module, names in _ATTENTION.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f'{__name__}.{module}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
