"""Necks: feature maps of a backbone to maps of equal width."""

from msda_plugin.necks.hybrid_encoder import HybridEncoder
from msda_plugin.necks.mfds_hs_fpn import MFDSHSFPN
from msda_plugin.necks.pvt_neck import PVTNeck
from msda_plugin.necks.simple_feature_pyramid import SimpleFeaturePyramid
from msda_plugin.necks.swin_neck import SwinNeck

__all__ = ['MFDSHSFPN', 'HybridEncoder', 'PVTNeck', 'SimpleFeaturePyramid', 'SwinNeck']
