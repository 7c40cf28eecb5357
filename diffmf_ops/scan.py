"""Calls of the ss2d kernels on tensors in their own layout, shared by the operators `ss2d` and `selective_scan`.

Layout: x (M, B, H, W, D) or (M, B, H, W, K, D), proj (M, B, H, W, K, R + 2N), delta (M, B, H, W, K, D) or None, and the
parameters with leading (M, K, D). See csrc/include/diffmf/ss2d.h for the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from . import backend

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Form:
    """What of a scan is not a tensor."""

    paths: tuple[int, ...] = (0,)
    exchange: str = "none"
    discretization: str = "euler"
    softplus: bool = True


def parameter_dtype(activation: torch.dtype) -> torch.dtype:
    """Parameters and states are float32, or float64 beside float64 activations."""
    return torch.float64 if activation == torch.float64 else torch.float32


def kernel_dtype(dtype: torch.dtype):
    """The compiled module's name of an activation dtype."""
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
    return getattr(backend.module().DType, names[dtype])


@lru_cache(maxsize=512)
def _problem(dtype, sizes, form, shared_decay):
    c = backend.module()
    return c.SS2DProblem(
        dtype=kernel_dtype(dtype),
        sizes=sizes,
        paths=form.paths,
        exchange=getattr(c.Exchange, form.exchange),
        discretization=getattr(c.Discretization, form.discretization),
        shared_decay=shared_decay,
        softplus=form.softplus,
    )


def _addressable(tensor):
    """The tensor (M, B, H, W, ..., C), copied unless channels are contiguous and an image's pixels equally spaced."""
    if tensor is None:
        return None
    height, width = tensor.shape[2:4]
    channels = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    pixels = height == 1 or width == 1 or tensor.stride(2) == width * tensor.stride(3)
    return tensor if channels and pixels else tensor.contiguous()


def _address(tensor) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(tensor, per_path: bool):
    if tensor is None:
        return (0,) * 5
    return (*tensor.stride()[:4], tensor.stride(4) if per_path else 0)


def _sizes(x, proj, rank):
    return (*x.shape[:4], x.shape[-1], (proj.shape[-1] - rank) // 2, rank)


def states_shape(x, proj, rank) -> tuple[int, ...]:
    """Shape of the states saved for the backward pass: (M, B, K, pieces, N, D), as many pieces as x's device wants."""
    modalities, batch, height, width, channels, states, _ = _sizes(x, proj, rank)
    pieces = -(-height * width // backend.module().checkpoint_of(x.device.type == "cuda", states))
    return (modalities, batch, proj.shape[4], pieces, states, channels)


class _Call:
    """One scan's problem and inputs, with the tensors the addresses point into kept alive."""

    def __init__(self, form, x, proj, delta, dt_weight, dt_bias, A, D):
        self.rank = 0 if dt_weight is None else dt_weight.shape[-1]
        self.per_path = x.dim() == 6
        self.x, self.proj, self.delta = (_addressable(t) for t in (x, proj, delta))
        self.parameters = [None if t is None else t.contiguous() for t in (dt_weight, dt_bias, A, D)]
        self.problem = _problem(x.dtype, _sizes(x, proj, self.rank), form, A.shape[-1] == 1)
        self.inputs = backend.module().SS2DInputs(
            _address(self.x),
            _strides(self.x, self.per_path),
            _address(self.proj),
            _strides(self.proj, True),
            _address(self.delta),
            _strides(self.delta, True),
            *map(_address, self.parameters),
        )


def forward(form, x, proj, delta, dt_weight, dt_bias, A, D, *, save_states=False, last_state=False):
    """Returns y (M, B, H, W, D), the saved states and the last state (M, B, K, N, D); empty where not wanted."""
    rank = 0 if dt_weight is None else dt_weight.shape[-1]
    shape = states_shape(x, proj, rank)
    state = {"dtype": parameter_dtype(x.dtype), "device": x.device}
    y = x.new_empty((*x.shape[:4], x.shape[-1]))
    states = torch.empty(shape if save_states else (0,), **state)
    last = torch.empty((*shape[:3], *shape[4:]) if last_state else (0,), **state)
    if y.numel() > 0:
        call = _Call(form, x, proj, delta, dt_weight, dt_bias, A, D)
        outputs = backend.module().SS2DOutputs(
            _address(y), _address(states) if save_states else 0, _address(last) if last_state else 0
        )
        backend.run("ss2d_forward", x.device, call.problem, call.inputs, outputs)
    return y, states, last


def backward(form, dy, states, x, proj, delta, dt_weight, dt_bias, A, D):
    """Returns the gradients of x, proj, delta, dt_weight, dt_bias, A and D; None for an absent input."""
    inputs = (x, proj, delta)
    parameters = (dt_weight, dt_bias, A, D)
    dx, dproj, ddelta = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)
    if dy.numel() == 0:
        return dx, dproj, ddelta, *(None if t is None else torch.zeros_like(t) for t in parameters)
    call = _Call(form, x, proj, delta, dt_weight, dt_bias, A, D)
    dy = dy.contiguous()
    device = x.device
    with backend.on(device):
        parts = getattr(backend.module(), f"ss2d_backward_parts_{device.type}")(call.problem)
    sums = [None if t is None else torch.empty((parts, *t.shape), dtype=t.dtype, device=t.device) for t in parameters]
    gradients = backend.module().SS2DGradients(
        _address(dy), _address(states), call.per_path, *map(_address, (dx, dproj, ddelta)), *map(_address, sums)
    )
    backend.run("ss2d_backward", device, call.problem, call.inputs, gradients)
    return dx, dproj, ddelta, *(None if t is None else t.sum(0) for t in sums)
