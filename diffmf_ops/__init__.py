"""Fused 2-D selective scans: CrossScan, selective scan and CrossMerge in one kernel, forward and backward."""

from .backend import has_cuda, import_error
from .cross_scan import cross_merge, cross_scan
from .modules import SS2D, VSSBlock
from .selective_scan import selective_scan
from .ss2d import ss2d

__all__ = ["SS2D", "VSSBlock", "cross_merge", "cross_scan", "has_cuda", "import_error", "selective_scan", "ss2d"]
