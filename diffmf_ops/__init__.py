"""Fused 2-D selective scans: CrossScan, selective scan and CrossMerge in one kernel, forward and backward."""

from .backend import has_cuda, import_error
from .cross_scan import cross_merge, cross_scan
from .depthwise_conv_silu import depthwise_conv_silu
from .modules import SS2D, VSSBlock
from .norm_gate import norm_gate
from .replace_ss2d import replace_ss2d
from .selective_scan import selective_scan
from .ss2d import ss2d
from .stand_in import stand_in_for_mamba_ssm

__all__ = [
    "SS2D",
    "VSSBlock",
    "cross_merge",
    "cross_scan",
    "depthwise_conv_silu",
    "has_cuda",
    "import_error",
    "norm_gate",
    "replace_ss2d",
    "selective_scan",
    "ss2d",
    "stand_in_for_mamba_ssm",
]
