"""Adapters to other implementations of the same work, used where they are installed: `diffmf bench` times them.

Every peer gets its own layout (channels first, paths as separate sequences) and dtypes, prepared outside of what is
timed; the projections and the cross-scan are inside, except for Mamba-2, whose scan alone is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from diffmf_ops import modules, reference, ss2d
from diffmf_ops.modules import SS2D, linear
from diffmf_ops.reference import EXCHANGE_SOURCES

K = 4  # paths


class NotForThis(Exception):
    """The peer cannot do a case; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One implementation on one case. `outputs` and `leaves` are in its own layout; `leaves[:len(xs)]` are the x."""

    leaves: list[torch.Tensor]
    run: Callable[[], list[torch.Tensor]]
    seeds: list[torch.Tensor]  # gradients of the outputs
    to_ours: Callable[[list[torch.Tensor]], torch.Tensor]  # outputs, or gradients of the x, in the layout of ss2d
    projects: bool = True  # computes proj from x; else gets it, and the gradient of x does not pass through it
    comparable: bool = True  # computes what ss2d does

    @torch.no_grad()
    def forward(self):
        return self.run()

    def both(self):
        return torch.autograd.grad(self.run(), self.leaves, self.seeds)


def project(x, weight):
    """proj (..., H, W, K, R + 2N) of x (..., H, W, D)."""
    return linear(x, weight).unflatten(-1, (K, -1))


def _scan(x, weight, *parameters, exchange="none"):
    x, proj = modules.project(x, weight)
    return ss2d(x, proj.unflatten(-1, (K, -1)), *parameters, exchange=exchange)


def ours(case, tensors, dy) -> Contender:
    def run():
        return [_scan(*tensors, exchange=case.exchange)]

    return Contender(tensors, run, [dy], lambda outputs: outputs[0])


def separate(case, tensors, dy) -> Contender:
    """Two modalities by a launch each, without exchange."""
    if case.modalities == 1:
        raise NotForThis("for two modalities")
    parts = [[t[m].detach().requires_grad_() for t in tensors] for m in range(2)]

    def run():
        return [_scan(*part) for part in parts]

    leaves = [t for pair in zip(*parts, strict=True) for t in pair]
    return Contender(leaves, run, list(dy), torch.stack, comparable=case.exchange == "none")


def eager(case, tensors, dy) -> Contender:
    """The reference in plain PyTorch, a loop over tokens."""
    return _reference(case, tensors, dy, reference.ss2d, 4096)


def compiled(case, tensors, dy) -> Contender:
    """The reference by torch.compile, which unrolls the loop."""
    if not dy.is_cuda:
        raise NotForThis("for GPUs: torch 2.13's compiled backward of this loop corrupts memory on the CPU")
    return _reference(case, tensors, dy, _compile(), 64)


@cache
def _compile():
    return torch.compile(reference.ss2d)


def _reference(case, tensors, dy, operator, longest):
    if case.height * case.width > longest:
        raise NotForThis(f"for up to {longest} tokens")

    def run():
        x, weight, *parameters = tensors
        return [operator(x.float(), project(x, weight).float(), *parameters, exchange=case.exchange).to(x.dtype)]

    return Contender(tensors, run, [dy], lambda outputs: outputs[0])


@cache
def _oflex():
    """VMamba's selective scan: 16-bit inputs, float output."""
    kernels = import_module("selective_scan_cuda_oflex")

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, bias):
            y, states = kernels.fwd(u, delta, A, B, C, D, bias, True, 1, True)
            ctx.save_for_backward(u, delta, A, B, C, D, bias, states)
            return y

        @staticmethod
        def backward(ctx, dy):
            *inputs, states = ctx.saved_tensors
            return tuple(kernels.bwd(*inputs, dy.contiguous(), states, True, 1)[:7])

    return Scan.apply


@cache
def _mamba():
    scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    import_module("selective_scan_cuda")  # scan exists without it

    def apply(u, delta, A, B, C, D, bias):
        return scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

    return apply


def vmamba(case, tensors, dy) -> Contender:
    """VMamba's forward_corev2: Triton cross-scan, grouped projections, oflex scan, Triton cross-merge."""
    return _pipeline(case, tensors, dy, _oflex(), torch.float32)


def mamba_ssm(case, tensors, dy) -> Contender:
    """The same with mamba_ssm's selective_scan_fn."""
    return _pipeline(case, tensors, dy, _mamba(), case.dtype)


def _pipeline(case, tensors, dy, scan, output_dtype):
    lead = tensors if case.modalities == 2 else [t[None] for t in tensors]
    dy = dy if case.modalities == 2 else dy[None]
    x, weight, dt_weight, dt_bias, A, D = ([t.detach() for t in lead[i]] for i in range(6))
    groups = [
        [t.permute(0, 3, 1, 2).contiguous() for t in x],
        [t[..., None] for t in weight],  # (K · row, D, 1)
        [t.flatten(0, 1)[..., None].to(case.dtype) for t in dt_weight],
        [t.flatten() for t in dt_bias],
        [t.expand(-1, -1, case.states).flatten(0, 1).contiguous() for t in A],
        [t.flatten() for t in D],
    ]
    groups = [[t.requires_grad_() for t in group] for group in groups]

    def run():
        return _scan_images(scan, *groups, case.exchange)

    def to_ours(images):
        images = [t.permute(0, 2, 3, 1) for t in images]
        return torch.stack(images) if case.modalities == 2 else images[0]

    seeds = [t.permute(0, 3, 1, 2).contiguous().to(output_dtype) for t in dy]
    return Contender([t for group in groups for t in group], run, seeds, to_ours)


def _scan_images(scan, x, weight, dt_weight, dt_bias, A, D, exchange):
    """Lists of one tensor a modality, images channels first: cross-scan, projections, scan, cross-merge."""
    csm = import_module("csm_triton")
    batch, _, height, width = x[0].shape
    states, rank = A[0].shape[1], dt_weight[0].shape[1]
    tokens, rows, outputs = [], [], []
    for image, matrix in zip(x, weight, strict=True):
        scanned = csm.cross_scan_fn(image).view(batch, -1, height * width)
        row = F.conv1d(scanned, matrix, groups=K).view(batch, K, -1, height * width)
        rows.append(row.split([rank, states, states], 2))
        tokens.append(scanned)
    for m in range(len(x)):
        low = rows[m][0].contiguous().view(batch, -1, height * width)
        delta = F.conv1d(low, dt_weight[m], groups=K)
        _, B, C = rows[EXCHANGE_SOURCES[exchange][m]]
        y = scan(tokens[m], delta, A[m], B.contiguous(), C.contiguous(), D[m], dt_bias[m])
        y = y.view(batch, K, -1, height, width)
        outputs.append(csm.cross_merge_fn(y).view(batch, -1, height, width))
    return outputs


def has_vmamba() -> bool:
    return all(find_spec(name) is not None for name in ("csm_triton", "selective_scan_cuda_oflex"))


def vmamba_scan(module: SS2D, x: torch.Tensor) -> torch.Tensor:
    """What `SS2D.scan` computes, by VMamba's kernels; between channels-last modules, as the network has them."""
    if module.reproject:
        raise NotForThis("for the direct exchange")
    paired = x.dim() == 5
    lead = [t if paired else t[None] for t in (x, module.x_proj_weight, module.dt_projs_weight)]
    lead += [t if paired else t[None] for t in (module.dt_projs_bias, module.A_logs, module.Ds)]
    images, weight, dt_weight, dt_bias, A_logs, D = lead
    outputs = _scan_images(
        _oflex(),
        [t.permute(0, 3, 1, 2).contiguous() for t in images],
        [t.flatten(0, 1)[..., None] for t in weight],
        [t.flatten(0, 1)[..., None] for t in dt_weight],
        [t.flatten() for t in dt_bias],
        [-t.exp().expand(-1, module.d_state).contiguous() for t in A_logs],
        list(D),
        module.exchange,
    )
    y = torch.stack([t.permute(0, 2, 3, 1) for t in outputs]).to(x.dtype)
    return y if paired else y[0]


def mamba2(case, tensors, dy) -> Contender:
    """Mamba-2's scan (Triton) on the same tokens: a head a path, one step and one decay for all channels."""
    if not case.shared_decay or case.modalities == 2:
        raise NotForThis("for the scalar A of one modality")
    scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    x, weight, dt_weight, dt_bias, A, D = (t.detach() for t in tensors)
    order = torch.stack([reference.path_indices(case.height, case.width, k, x.device) for k in range(K)])
    inverse = order.argsort(1)

    def in_order(image):  # (B, H, W, D) -> (B, L, K, D)
        return image.flatten(1, 2)[:, order.t()].contiguous()

    def to_ours(outputs):
        return sum(outputs[0][:, inverse[k], k] for k in range(K)).unflatten(1, (case.height, case.width))

    row = project(x, weight).flatten(1, 2)
    row = torch.stack([row[:, order[k], k] for k in range(K)], 2)  # (B, L, K, R + 2N)
    low, B, C = (t.contiguous() for t in row.split([case.rank, case.states, case.states], -1))
    step = torch.einsum("blkr,kr->blk", low.float(), dt_weight[:, 0]).to(case.dtype)
    leaves = [in_order(x), step, A[:, 0, 0].contiguous(), B, C, D.clone(), dt_bias[:, 0].contiguous()]
    leaves = [t.requires_grad_() for t in leaves]
    tokens, step, A, B, C, D, bias = leaves

    def run():
        return [scan(tokens, step, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)]

    return Contender(leaves, run, [in_order(dy)], to_ours, projects=False)


PEERS = {
    "vmamba": vmamba,
    "mamba_ssm": mamba_ssm,
    "mamba2": mamba2,
    "separate": separate,
    "eager": eager,
    "compile": compiled,
}


@contextmanager
def tf32(allowed: bool):
    """TF32 for all projections or for none: by default PyTorch lets convolutions use it, which the peers project with,
    and not matrix products, which ours is."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def relative_error(found, expected) -> float:
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm()).item()


def errors(peer: Contender, case, tensors, dy) -> dict[str, float]:
    """Relative errors of a peer's output and gradient of x against ours, without TF32."""
    x, weight, *parameters = tensors
    with tf32(False):
        proj = project(x, weight)
        y = ss2d(x, proj if peer.projects else proj.detach(), *parameters, exchange=case.exchange)
        (dx,) = torch.autograd.grad(y, x, dy)
        outputs = peer.run()
        count = len(peer.leaves) // 6 if peer.projects else 1
        gradients = torch.autograd.grad(outputs, peer.leaves[:count], peer.seeds)
    return {
        "y": relative_error(peer.to_ours([t.detach() for t in outputs]), y.detach()),
        "dx": relative_error(peer.to_ours(list(gradients)), dx),
    }
