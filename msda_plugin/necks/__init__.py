"""Necks: maps of a backbone to maps of one width."""

from .mfds_hs_fpn import MFDSHSFPN
from .pvt_neck import PVTNeck
from .simple_feature_pyramid import SimpleFeaturePyramid
from .swin_neck import SwinNeck

__all__ = ['MFDSHSFPN', 'PVTNeck', 'SimpleFeaturePyramid', 'SwinNeck']
