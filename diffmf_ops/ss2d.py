"""The fused operator: CrossScan, (cross-modal) selective scan and CrossMerge in one kernel launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import scan
from .checks import (
    cast,
    check_activation,
    check_choice,
    check_device,
    check_dtype,
    check_once,
    check_paths,
    check_range,
    check_rank,
    check_shape,
)
from .dispatch import Operator, autocast_dtype
from .reference import EXCHANGE_SOURCES

DISCRETIZATIONS = ("euler", "zoh")


def ss2d(
    x: torch.Tensor,
    proj: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    paths: Sequence[int] = (0, 1, 2, 3),
    exchange: str = "none",
    discretization: str = "euler",
) -> torch.Tensor:
    """Scans an image along K paths and adds the paths' outputs.

    For modality m, path k and the pixels p of the path in order, with h = 0 at the start::

        Δ   = softplus(Σ_r proj[m,b,p,k,r] · dt_weight[m,k,d,r] + dt_bias[m,k,d])
        B_n = proj[s(m),b,p,k,R+n],  C_n = proj[s(m),b,p,k,R+N+n]
        h_n = exp(Δ·A[m,k,d,n]) · h_n + Δ·B_n·x[m,b,p,(k,)d]
        y[m,b,p,d] += Σ_n C_n·h_n + D[m,k,d]·x[m,b,p,(k,)d]

    With two modalities (infrared, visible) every tensor has a leading axis M = 2 and `exchange` chooses s(m), whose B
    and C modality m reads. State and accumulation are float32 (float64 for float64 x). Differentiable once in all six
    tensors. The same input gives the same bits on every run.

    Args:
        x: (B, H, W, D), or (B, H, W, K, D) when every path scans its own tokens; float32, bfloat16 or float16, also
            float64 on the CPU. Any strides.
        proj: (B, H, W, K, R + 2N), the low-rank part of Δ, B and C of each pixel and path; dtype of x.
        dt_weight: (K, D, R), float32 (float64 with float64 x, as the parameters below).
        dt_bias: (K, D).
        A: (K, D, N), negative; or (K, D, 1), one decay per channel for all states (the SSD / Mamba-2 form).
        D: (K, D) skip weights, or None.
        paths: K codes: 0 row-major, 1 column-major, 2 the reverse of 0, 3 the reverse of 1 (VMamba's order).
        exchange: "none", "mutual" (DIFF-MF Eq. 6), "from_visible" (Eq. 15) or "from_infrared" (Eq. 16).
        discretization: "euler" as above, or "zoh", which replaces Δ·B_n by (exp(Δ·A_n) − 1)/A_n · B_n (Eq. 2).

    Returns:
        y: (B, H, W, D), dtype of x. Under autocast x and proj are cast to its dtype, the parameters to float32.

    Raises:
        ValueError: a shape, device, path or mode that does not fit; TypeError: a dtype. Both name the argument.
    """
    check_rank("x", x, (4, 5, 6), "(B, H, W, D), (B, H, W, K, D), or with a leading M = 2")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, proj = cast(dtype, x=x, proj=proj)
        dt_weight, dt_bias, A, D = cast(torch.float32, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
    paths = check_paths(paths)
    check_once(check_arguments, x, proj, dt_weight, dt_bias, A, D, paths, exchange, discretization)
    tensors = (x, proj, dt_weight, dt_bias, A, D)
    y, _ = _ss2d(*tensors, paths, exchange, discretization, scan.saves_states(tensors))
    return y


def check_arguments(x, proj, dt_weight, dt_bias, A, D, paths, exchange, discretization) -> None:
    """Raises ValueError or TypeError, naming the argument, unless the arguments of `ss2d` fit together."""
    check_choice("exchange", exchange, tuple(EXCHANGE_SOURCES))
    check_choice("discretization", discretization, DISCRETIZATIONS)
    check_rank("dt_weight", dt_weight, (3, 4), "(K, D, R), or (2, K, D, R) for two modalities")
    lead = tuple(dt_weight.shape[:-3])
    m = "2, " if lead else ""
    if lead not in ((), (2,)):
        raise ValueError(f"dt_weight: {lead[0]} modalities, expected 2 on a leading axis (or no such axis)")
    if exchange != "none" and not lead:
        raise ValueError(f"exchange: {exchange!r} with one modality, expected 'none' (or a leading axis of 2)")
    check_rank("x", x, (len(lead) + 4, len(lead) + 5), f"({m}B, H, W, D) or ({m}B, H, W, K, D)")
    check_activation("x", x, scan.ACTIVATIONS)
    batch, height, width = x.shape[len(lead) : len(lead) + 3]
    channels, k = x.shape[-1], len(paths)
    if x.dim() == len(lead) + 5:
        check_shape("x", x, (*lead, batch, height, width, k, channels), f"({m}B, H, W, K, D)")
    else:
        check_shape("x", x, (*lead, batch, height, width, channels), f"({m}B, H, W, D)")
    check_range("x: height", height, 1, 2**20)
    check_range("x: width", width, 1, 2**20)
    check_range("x: height * width", height * width, 1, 2**30)
    check_range("x: channels D", channels, 1, scan.MAX_CHANNELS)
    rank = dt_weight.shape[-1]
    check_range("dt_weight: rank R", rank, 1, scan.MAX_RANK)
    check_shape("dt_weight", dt_weight, (*lead, k, channels, rank), f"({m}K, D, R)")
    check_rank("proj", proj, (len(lead) + 5,), f"({m}B, H, W, K, R + 2N)")
    if proj.shape[-1] <= rank or (proj.shape[-1] - rank) % 2 != 0:
        raise ValueError(f"proj: rows of {proj.shape[-1]} values, expected R + 2N with R = {rank}")
    states = (proj.shape[-1] - rank) // 2
    check_range("proj: states N", states, 1, scan.MAX_STATES)
    check_shape("proj", proj, (*lead, batch, height, width, k, rank + 2 * states), f"({m}B, H, W, K, R + 2N)")
    check_shape("dt_bias", dt_bias, (*lead, k, channels), f"({m}K, D)")
    check_rank("A", A, (len(lead) + 3,), f"({m}K, D, N) or ({m}K, D, 1)")
    check_shape("A", A, (*lead, k, channels, states if A.shape[-1] != 1 else 1), f"({m}K, D, N or 1)")
    if D is not None:
        check_shape("D", D, (*lead, k, channels), f"({m}K, D)")
    check_dtype("proj", proj, x.dtype, "the dtype of x")
    wanted = scan.parameter_dtype(x.dtype)
    for name, tensor in (("dt_weight", dt_weight), ("dt_bias", dt_bias), ("A", A), ("D", D)):
        if tensor is not None:
            check_dtype(name, tensor, wanted, f"parameters beside {x.dtype} activations")
    for name, tensor in (("proj", proj), ("dt_weight", dt_weight), ("dt_bias", dt_bias), ("A", A), ("D", D)):
        if tensor is not None:
            check_device(name, tensor, x.device, "x")


@Operator
def _ss2d(
    x: torch.Tensor,
    proj: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    paths: Sequence[int],
    exchange: str,
    discretization: str,
    save_states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the states for the backward pass (empty unless save_states)."""
    form = scan.Form(tuple(paths), exchange, discretization)
    return scan.forward(form, x, proj, None, dt_weight, dt_bias, A, D, save_states=save_states)[:2]


@_ss2d.register_fake
def _(x, proj, dt_weight, dt_bias, A, D, paths, exchange, discretization, save_states):
    y = x.new_empty((*x.shape[: proj.dim() - 2], x.shape[-1]))
    shape = scan.states_shape(x, proj, dt_weight.shape[-1]) if save_states else (0,)
    return y, x.new_empty(shape, dtype=scan.parameter_dtype(x.dtype))


@Operator
def _ss2d_backward(
    dy: torch.Tensor,
    states: torch.Tensor,
    x: torch.Tensor,
    proj: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    paths: Sequence[int],
    exchange: str,
    discretization: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, proj, dt_weight, dt_bias, A and D (empty when D is None)."""
    form = scan.Form(tuple(paths), exchange, discretization)
    dx, dproj, _, ddt_weight, ddt_bias, dA, dD = scan.backward(
        form, dy, states, x, proj, None, dt_weight, dt_bias, A, D
    )
    return dx, dproj, ddt_weight, ddt_bias, dA, A.new_empty(0) if dD is None else dD


@_ss2d_backward.register_fake
def _(dy, states, x, proj, dt_weight, dt_bias, A, D, paths, exchange, discretization):
    gradients = [t.new_empty(t.shape) for t in (x, proj, dt_weight, dt_bias, A)]
    return (*gradients, A.new_empty(0) if D is None else D.new_empty(D.shape))


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.paths, ctx.exchange, ctx.discretization, save_states = inputs
    ctx.set_materialize_grads(False)  # no zeros the size of the states as their gradient
    ctx.save_for_backward(output[1] if save_states else None, *tensors)


def _gradients(ctx, dy, _dstates):
    if dy is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes it at every look
    scan.check_saved("ss2d", saved[0])
    *gradients, dD = _ss2d_backward(dy, *saved, ctx.paths, ctx.exchange, ctx.discretization)
    return *gradients, None if saved[-1] is None else dD, None, None, None, None


_ss2d.register_autograd(_gradients, setup_context=_save_inputs)
_ss2d_backward.refuse_double_backward()
