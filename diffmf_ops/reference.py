"""The operators in plain PyTorch, as the definition every compiled path is tested against.

Any floating dtype (float64 included), any device, differentiable by autograd. A sequential loop over the tokens: for
checking, not for speed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Whose B and C each modality's scan reads (0 infrared, 1 visible): Eqs. 6, 15 and 16 of the paper.
EXCHANGE_SOURCES = {"none": (0, 1), "mutual": (1, 0), "from_visible": (1, 1), "from_infrared": (0, 0)}


def path_indices(height: int, width: int, path: int, device=None) -> torch.Tensor:
    """Row-major pixel index of every scan position of one path, shape (H·W,).

    0 row-major, 1 column-major, 2 the reverse of 0, 3 the reverse of 1 (VMamba's order).
    """
    pixels = torch.arange(height * width, device=device)
    if path % 2 == 1:
        pixels = pixels.view(height, width).t().reshape(-1)
    return pixels.flip(0) if path >= 2 else pixels


def cross_scan(x: torch.Tensor, paths=(0, 1, 2, 3)) -> torch.Tensor:
    """(B, C, H, W) -> (B, K, C, H·W): the image's pixels in the order of each path."""
    height, width = x.shape[-2:]
    flat = x.flatten(2)
    return torch.stack([flat[:, :, path_indices(height, width, path, x.device)] for path in paths], dim=1)


def cross_merge(y: torch.Tensor, shape, paths=(0, 1, 2, 3)) -> torch.Tensor:
    """(B, K, C, H·W) -> (B, C, H, W): each path's tokens back at their pixels, summed over the paths."""
    height, width = shape
    merged = torch.zeros_like(y[:, 0])
    for k, path in enumerate(paths):
        inverse = path_indices(height, width, path, y.device).argsort()
        merged = merged + y[:, k][:, :, inverse]
    return merged.unflatten(2, (height, width))


def _scan(x, delta, A, B, C, discretization):
    """x, delta (..., L, D); A (..., D, N); B, C (..., L, N) -> y (..., L, D) and the last state (..., D, N)."""
    state = torch.zeros(
        torch.broadcast_shapes(x.shape[:-2] + A.shape[-2:-1] + B.shape[-1:]), dtype=x.dtype, device=x.device
    )
    outputs = []
    for t in range(x.shape[-2]):
        z = delta[..., t, :, None] * A
        step = delta[..., t, :, None]
        if discretization == "zoh":  # near A = 0 by its series
            step = torch.where(A == 0, step * (1 + z / 2), torch.expm1(z) / torch.where(A == 0, 1, A))
        state = torch.exp(z) * state + step * B[..., t, None, :] * x[..., t, :, None]
        outputs.append((state * C[..., t, None, :]).sum(-1))
    return torch.stack(outputs, dim=-2), state


def ss2d(x, proj, dt_weight, dt_bias, A, D=None, *, paths=(0, 1, 2, 3), exchange="none", discretization="euler"):
    """Reference of :func:`diffmf_ops.ss2d`; same arguments, all of one dtype."""
    two = dt_weight.dim() == 4
    if not two:
        x, proj, dt_weight, dt_bias, A = (t.unsqueeze(0) for t in (x, proj, dt_weight, dt_bias, A))
        D = None if D is None else D.unsqueeze(0)
    rank = dt_weight.shape[-1]
    states = (proj.shape[-1] - rank) // 2
    height, width = x.shape[2:4]
    per_path = x.dim() == 6
    source = list(EXCHANGE_SOURCES[exchange][: x.shape[0]])
    merged = 0
    for k, path in enumerate(paths):
        order = path_indices(height, width, path, x.device)
        xk = (x[..., k, :] if per_path else x).flatten(2, 3)[:, :, order]  # (M, B, L, D)
        pk = proj[..., k, :].flatten(2, 3)[:, :, order]  # (M, B, L, R + 2N)
        delta = F.softplus(torch.einsum("mblr,mdr->mbld", pk[..., :rank], dt_weight[:, k]) + dt_bias[:, None, None, k])
        exchanged = pk[source]
        B, C = exchanged[..., rank : rank + states], exchanged[..., rank + states :]
        y, _ = _scan(xk, delta, A[:, None, k], B, C, discretization)
        if D is not None:
            y = y + D[:, None, None, k] * xk
        merged = merged + y[:, :, order.argsort()]
    merged = merged.unflatten(2, (height, width))
    return merged if two else merged[0]


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """Reference of :func:`diffmf_ops.selective_scan`; same arguments and results."""
    batch, channels, length = u.shape

    def tokens(parameter):  # B or C as (batch, D, L, N)
        if parameter.dim() == 2:
            return parameter[None, :, None].expand(batch, -1, length, -1)
        if parameter.dim() == 3:
            parameter = parameter.unsqueeze(1)
        return parameter.repeat_interleave(channels // parameter.shape[1], dim=1).transpose(2, 3)

    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    # Every channel as a sequence of its own, so that B and C may differ between channels.
    y, state = _scan(u[..., None], delta[..., None], A[None, :, None], tokens(B), tokens(C), "euler")
    y, state = y[..., 0], state[..., 0, :]
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_last_state else y


def depthwise_conv_silu(x, weight, bias=None):
    """Reference of :func:`diffmf_ops.depthwise_conv_silu`; same arguments, all of one dtype."""
    if x.dim() == 5:
        biases = [None] * len(x) if bias is None else bias
        return torch.stack([depthwise_conv_silu(*each) for each in zip(x, weight, biases, strict=True)])
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return F.silu(y).permute(0, 2, 3, 1)


def norm_gate(y, weight, bias, z=None, eps=1e-5):
    """Reference of :func:`diffmf_ops.norm_gate`; same arguments, all of one dtype."""
    affine = (*weight.shape[:-1], 1, 1, 1, weight.shape[-1])
    out = F.layer_norm(y, y.shape[-1:], eps=eps) * weight.view(affine) + bias.view(affine)
    return out if z is None else out * F.silu(z)
