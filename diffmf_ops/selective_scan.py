"""`selective_scan`: the one-dimensional scan with mamba_ssm's interface, on the kernels of `ss2d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import scan
from .checks import (
    cast,
    check_activation,
    check_device,
    check_dtype,
    check_flag,
    check_once,
    check_range,
    check_rank,
    check_shape,
)
from .dispatch import Operator, autocast_dtype


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
):
    """Selective scan of sequences; a drop-in for mamba_ssm's `selective_scan_fn` with real A.

    h_l = exp(Δ_l·A)·h_{l−1} + Δ_l·B_l·u_l,  y_l = C_l·h_l + D·u_l, gated by SiLU(z) where z is given.

    Args:
        u, delta: (B, D, L), float32, bfloat16 or float16 (float64 on the CPU), of one dtype, as B, C and z.
        A: (D, N), real, float32 (float64 with float64 u), as D and delta_bias.
        B, C: (D, N), (B, N, L) or (B, G, N, L) with G a divisor of D. Constant ones of shape (D, N), which may have
            the dtype of A, are expanded over the sequence: right, but neither fast nor small.
        D, delta_bias: (D,) or None.
        z: (B, D, L) or None.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last token (no gradient flows through it).

    Returns:
        y (B, D, L) in the dtype of u, and with return_last_state the last state (B, D, N), float32. Under autocast u
        keeps its dtype, as in mamba_ssm; delta, B, C and z get it, and the parameters are cast to float32.

    Raises:
        ValueError: a shape or device that does not fit; TypeError: a dtype. Both name the argument.
    """
    check_rank("u", u, (3,), "(B, D, L)")
    if autocast_dtype(u) is not None:
        delta, B, C, z = cast(u.dtype, delta=delta, B=B, C=C, z=z)
        A, D, delta_bias = cast(torch.float32, A=A, D=D, delta_bias=delta_bias)
    check_once(check_arguments, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    B, C = _grouped(B, C, u)
    tensors = (u, delta, A, B, C, D, delta_bias)
    y, last_state, _ = _selective_scan(*tensors, delta_softplus, return_last_state, scan.saves_states(tensors))
    if z is not None:
        y = y * F.silu(z)
    return (y, last_state.detach()) if return_last_state else y


def check_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state) -> None:
    """Raises ValueError or TypeError, naming the argument, unless the arguments of `selective_scan` fit together."""
    check_flag("delta_softplus", delta_softplus)
    check_flag("return_last_state", return_last_state)
    check_activation("u", u, scan.ACTIVATIONS)
    batch, channels, length = u.shape
    check_range("u: length L", length, 1, 2**30)
    check_range("u: channels D", channels, 1, scan.MAX_CHANNELS)
    check_rank("A", A, (2,), "(D, N)")
    states = A.shape[1]
    check_range("A: states N", states, 1, scan.MAX_STATES)
    check_shape("delta", delta, (batch, channels, length), "(B, D, L)")
    check_shape("A", A, (channels, states), "(D, N)")
    for name, tensor in (("B", B), ("C", C)):
        check_rank(name, tensor, (2, 3, 4), "(D, N), (B, N, L) or (B, G, N, L)")
        if tensor.dim() == 2:
            check_shape(name, tensor, (channels, states), "(D, N)")
        elif tensor.dim() == 3:
            check_shape(name, tensor, (batch, states, length), "(B, N, L)")
        else:
            groups = tensor.shape[1]
            check_shape(name, tensor, (batch, groups, states, length), "(B, G, N, L)")
            if groups < 1 or channels % groups != 0:
                raise ValueError(f"{name}: {groups} groups, expected a divisor of D = {channels}")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            check_shape(name, tensor, (channels,), "(D,)")
    if z is not None:
        check_shape("z", z, (batch, channels, length), "(B, D, L)")
    wanted = scan.parameter_dtype(u.dtype)
    for name, tensor, dtype in (
        ("delta", delta, u.dtype), ("B", B, u.dtype), ("C", C, u.dtype), ("z", z, u.dtype),
        ("A", A, wanted), ("D", D, wanted), ("delta_bias", delta_bias, wanted),
    ):  # fmt: skip
        if name in ("B", "C") and tensor.dim() == 2 and tensor.dtype == wanted:
            dtype = wanted
        if tensor is not None:
            check_dtype(name, tensor, dtype, f"beside {u.dtype} u")
            check_device(name, tensor, u.device, "u")


def _grouped(B, C, u):
    """B and C as (B, G, N, L) with one G; constants get a group per channel."""
    batch, channels, length = u.shape

    def grouped(tensor):
        if tensor.dim() == 2:
            return tensor.to(u.dtype)[None, :, :, None].expand(batch, -1, -1, length)
        return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor

    B, C = grouped(B), grouped(C)
    if B.shape[1] != C.shape[1]:  # the finest grouping serves both only if it is one group per channel
        groups = max(B.shape[1], C.shape[1])
        groups = groups if groups % min(B.shape[1], C.shape[1]) == 0 else channels
        B, C = (t.repeat_interleave(groups // t.shape[1], dim=1) for t in (B, C))
    return B, C


def _tokens(tensor, groups):
    """(B, D, L) -> (G, B, 1, L, D/G): groups play the part of modalities, sequences that of one-row images."""
    return tensor.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).unsqueeze(2)


def _sequences(tokens):
    """(G, B, 1, L, D/G) -> (B, D, L)."""
    return tokens.squeeze(2).permute(1, 0, 3, 2).flatten(1, 2).contiguous()


def _per_group(parameter, groups):
    """(D, ...) -> (G, K = 1, D/G, ...)."""
    return None if parameter is None else parameter.unflatten(0, (groups, -1)).unsqueeze(1)


def _scan_arguments(u, delta, A, B, C, D, delta_bias):
    groups = B.shape[1]
    rows = B.new_empty((*B.shape[:2], 2 * B.shape[2], B.shape[3]))
    torch.cat([B, C], dim=2, out=rows)  # autocast lets this form alone
    proj = rows.permute(1, 0, 3, 2)[:, :, None, :, None]  # (G, B, 1, L, 1, 2N)
    return (
        _tokens(u, groups), proj, _tokens(delta, groups).unsqueeze(4), None,
        *(_per_group(t, groups) for t in (delta_bias, A, D)),
    )  # fmt: skip


@Operator
def _selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    save_states: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the last state (B, D, N) and the states for the backward pass; the latter two empty where not wanted."""
    y, states, last = scan.forward(
        scan.Form(softplus=delta_softplus),
        *_scan_arguments(u, delta, A, B, C, D, delta_bias),
        save_states=save_states,
        last_state=return_last_state,
    )
    if return_last_state:  # (G, B, 1, N, D/G)
        last = last.squeeze(2).permute(1, 0, 3, 2).flatten(1, 2).contiguous()
    return _sequences(y), last, states


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, return_last_state, save_states):
    batch, channels, _ = u.shape
    state = scan.parameter_dtype(u.dtype)
    last = u.new_empty((batch, channels, A.shape[1]) if return_last_state else (0,), dtype=state)
    x, proj = _scan_arguments(u, delta, A, B, C, D, delta_bias)[:2]
    states = u.new_empty(scan.states_shape(x, proj, 0) if save_states else (0,), dtype=state)
    return u.new_empty(u.shape), last, states


@Operator
def _selective_scan_backward(
    dy: torch.Tensor,
    states: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias (empty where that input is None)."""
    groups, n = B.shape[1], A.shape[1]
    dx, dproj, ddelta, _, dbias, dA, dD = scan.backward(
        scan.Form(softplus=delta_softplus),
        _tokens(dy, groups),
        states,
        *_scan_arguments(u, delta, A, B, C, D, delta_bias),
    )
    # Copies even where a view would be contiguous: the outputs of an operator must not share memory.
    halves = dproj[:, :, 0, :, 0].permute(1, 0, 3, 2).split(n, dim=2)
    dB, dC = (t.clone(memory_format=torch.contiguous_format) for t in halves)
    dD, dbias = (A.new_empty(0) if t is None else t.flatten() for t in (dD, dbias))
    return _sequences(dx), _sequences(ddelta.squeeze(4)), dA.flatten(0, 2), dB, dC, dD, dbias


@_selective_scan_backward.register_fake
def _(dy, states, u, delta, A, B, C, D, delta_bias, delta_softplus):
    gradients = [t.new_empty(t.shape) for t in (u, delta, A, B, C)]
    return (*gradients, *(A.new_empty(0) if t is None else t.new_empty(t.shape) for t in (D, delta_bias)))


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _, save_states = inputs
    ctx.set_materialize_grads(False)  # no zeros the size of the states as their gradient
    ctx.save_for_backward(output[2] if save_states else None, *tensors)


def _gradients(ctx, dy, _dlast, _dstates):
    if dy is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes it at every look
    scan.check_saved("selective_scan", saved[0])
    *gradients, dD, dbias = _selective_scan_backward(dy, *saved, ctx.delta_softplus)
    D, delta_bias = saved[-2:]
    return *gradients, None if D is None else dD, None if delta_bias is None else dbias, None, None, None


_selective_scan.register_autograd(_gradients, setup_context=_save_inputs)
_selective_scan_backward.refuse_double_backward()
