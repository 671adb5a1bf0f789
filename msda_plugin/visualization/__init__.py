"""Pictures from plain arrays: detections, and the curves of a training."""
from msda_plugin.visualization.curves import draw_curves
from msda_plugin.visualization.detection import class_colours, draw_boxes, draw_sheet, write_png

__all__ = ['class_colours', 'draw_boxes', 'draw_curves', 'draw_sheet', 'write_png']
