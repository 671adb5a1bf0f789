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

if TYPE_CHECKING:
    from msda_plugin.visualization.attention import Recording, record_attention
    from msda_plugin.visualization.attention_figure import draw_heads, draw_query
    from msda_plugin.visualization.attention_html import attention_page, write_attention_page
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

_OF_MODELS = {
    'attention': ('Recording', 'record_attention'),
    'attention_figure': ('draw_heads', 'draw_query'),
    'attention_html': ('attention_page', 'write_attention_page'),
    'edge_distributions': ('draw_edges',),
}


def __getattr__(name: str) -> object:
    # What a model computes inside needs MMDetection, and boxes do not.
    for module, names in _OF_MODELS.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f'{__name__}.{module}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
