"""Necks: maps of a backbone to maps of one width."""
from .mfds_hs_fpn import MFDSHSFPN

__all__ = ['MFDSHSFPN']
