"""What torch.utils.flop_counter.FlopCounterMode counts for the operators, once this module is imported; else nothing.

(It imports Triton where there is one, which `import diffmf_ops` shall not have to.)

A multiply-add is 2, as in its own formulas. A channel's step along a path is 9 for each state, as is usual for Mamba's
scans (VMamba counts them so), 1 for the skip and 2R for the low rank of Δ. Activations and norms count nothing, and a
backward pass twice what the forward does.
"""

from __future__ import annotations

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from . import depthwise_conv_silu, selective_scan, ss2d  # noqa: F401  which register the operators


def _scan(steps: int, states: int, skip: bool) -> int:
    return steps * (9 * states + skip)


@register_flop_formula(torch.ops.diffmf.ss2d)
def _ss2d(x, proj, dt_weight, dt_bias, A, D, *_, **__) -> int:
    rank = dt_weight[-1]
    steps = prod(proj[:-1]) * x[-1]
    return _scan(steps, (proj[-1] - rank) // 2, D is not None) + 2 * steps * rank


@register_flop_formula(torch.ops.diffmf.ss2d_backward)
def _ss2d_backward(dy, states, *arguments, **_) -> int:
    return 2 * _ss2d(*arguments)


@register_flop_formula(torch.ops.diffmf.selective_scan)
def _selective_scan(u, delta, A, B, C, D, *_, **__) -> int:
    return _scan(prod(u), A[-1], D is not None)


@register_flop_formula(torch.ops.diffmf.selective_scan_backward)
def _selective_scan_backward(dy, states, *arguments, **_) -> int:
    return 2 * _selective_scan(*arguments)


@register_flop_formula(torch.ops.diffmf.depthwise_conv_silu)
def _depthwise_conv_silu(x, weight, *_, **__) -> int:
    return 2 * prod(x) * weight[-1] ** 2


@register_flop_formula(torch.ops.diffmf.depthwise_conv_silu_backward)
def _depthwise_conv_silu_backward(dy, *arguments, **_) -> int:
    return 2 * _depthwise_conv_silu(*arguments)
