"""Calls of the ss2d kernels on tensors in their own layout, shared by the operators `ss2d` and `selective_scan`.

Layout: x (M, B, H, W, D) or (M, B, H, W, K, D), proj (M, B, H, W, K, R + 2N), delta (M, B, H, W, K, D) or None, and the
parameters with leading (M, K, D). See csrc/include/diffmf/ss2d.h for the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from . import backend
from .dispatch import wants_gradient

MAX_CHANNELS, MAX_STATES, MAX_RANK = 65536, 256, 64
MAX_IMAGES = 2**24  # tasks are counted in 32 bits: images times blocks of channels
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


def saves_states(tensors) -> bool:
    """Whether a gradient is wanted. A trace may run with one wanted and be checked without, so is for inference."""
    return wants_gradient(tensors) and not torch.jit.is_tracing()


def check_saved(name: str, states: torch.Tensor | None) -> None:
    """Raises RuntimeError where a backward pass misses the states."""
    if states is None:
        raise RuntimeError(
            f"{name}: the states were not saved; to be trained, export without torch.no_grad() and do not trace"
        )


def kernel_dtype(dtype: torch.dtype):
    """The compiled module's name of an activation dtype."""
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
    return getattr(backend.module().DType, names[dtype])


@lru_cache(maxsize=512)
def _problem(dtype, sizes, form, shared_decay):
    c = backend.module()
    modalities, batch = sizes[:2]
    if modalities * batch > MAX_IMAGES:
        raise ValueError(
            f"batch: {batch}, expected at most {MAX_IMAGES // modalities} (with {modalities} modalities or groups)"
        )
    return c.SS2DProblem(
        dtype=kernel_dtype(dtype),
        sizes=sizes,
        paths=form.paths,
        exchange=getattr(c.Exchange, form.exchange),
        discretization=getattr(c.Discretization, form.discretization),
        shared_decay=shared_decay,
        softplus=form.softplus,
    )


def _addressable(tensor, lead):
    """The tensor ([M,] B, H, W, ..., C), copied unless channels are contiguous and an image's pixels equally spaced.

    By less than 2^31 bytes, which the CUDA kernels count in 32 bits.
    """
    if tensor is None:
        return None
    shape, stride = tensor.shape, tensor.stride()
    height, width = shape[lead + 1], shape[lead + 2]
    channels = stride[-1] == 1 or shape[-1] == 1
    pixels = height == 1 or width == 1 or stride[lead + 1] == width * stride[lead + 2]
    near = stride[lead + 1 if width == 1 else lead + 2] * tensor.element_size() < 2**31
    return tensor if channels and pixels and near else tensor.contiguous()


def _address(tensor) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(tensor, lead, per_path: bool):
    if tensor is None:
        return (0,) * 5
    stride = tensor.stride() if lead else (0, *tensor.stride())
    return (*stride[:4], stride[4] if per_path else 0)


def _lead(proj) -> int:
    """Axes before that of the batch: 1 where there is one of modalities (or of groups), else 0."""
    return proj.dim() - 5


def _sizes(x, proj, rank):
    lead = _lead(proj)
    return (*((1,) if lead == 0 else ()), *x.shape[: lead + 3], x.shape[-1], (proj.shape[-1] - rank) // 2, rank)


def states_shape(x, proj, rank) -> tuple[int, ...]:
    """Shape of the states saved for the backward pass: (M, B, K, pieces, N, D), as many pieces as x's device wants."""
    modalities, batch, height, width, channels, states, _ = _sizes(x, proj, rank)
    pieces = -(-height * width // backend.module().checkpoint_of(x.device.type == "cuda", states))
    return (modalities, batch, proj.shape[-2], pieces, states, channels)


class _Call:
    """One scan's problem and inputs, with the tensors the addresses point into kept alive."""

    def __init__(self, form, x, proj, delta, dt_weight, dt_bias, A, D):
        self.rank = 0 if dt_weight is None else dt_weight.shape[-1]
        lead = _lead(proj)
        self.per_path = x.dim() == lead + 5
        self.x, self.proj, self.delta = (_addressable(t, lead) for t in (x, proj, delta))
        self.parameters = [None if t is None else t.contiguous() for t in (dt_weight, dt_bias, A, D)]
        self.problem = _problem(x.dtype, _sizes(x, proj, self.rank), form, A.shape[-1] == 1)
        self.inputs = backend.module().SS2DInputs(
            _address(self.x),
            _strides(self.x, lead, self.per_path),
            _address(self.proj),
            _strides(self.proj, lead, True),
            _address(self.delta),
            _strides(self.delta, lead, True),
            *map(_address, self.parameters),
        )


def forward(form, x, proj, delta, dt_weight, dt_bias, A, D, *, save_states=False, last_state=False):
    """Returns y ([M,] B, H, W, D), the saved states and the last state (M, B, K, N, D); empty where not wanted.

    The tensors have the shapes of `ss2d`, all with an axis M or none; delta ([M,] B, H, W, K, D) takes the place of
    dt_weight and the low-rank part of proj where dt_weight is None.
    """
    rank = 0 if dt_weight is None else dt_weight.shape[-1]
    shape = states_shape(x, proj, rank)
    state = {"dtype": parameter_dtype(x.dtype), "device": x.device}
    y = x.new_empty((*x.shape[: _lead(proj) + 3], x.shape[-1]))
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
    inputs = (x, proj, delta, dt_weight, dt_bias, A, D)
    if dy.numel() == 0:
        return tuple(None if t is None else torch.zeros_like(t) for t in inputs)
    dense = torch.contiguous_format
    gradients = [None if t is None else torch.empty_like(t, memory_format=dense) for t in inputs]
    call = _Call(form, *inputs)
    dy, states = dy.contiguous(), backend.aligned(states)  # hooks on saved tensors may have moved the states
    arguments = backend.module().SS2DGradients(_address(dy), _address(states), call.per_path, *map(_address, gradients))
    backend.run("ss2d_backward", x.device, call.problem, call.inputs, arguments)
    return tuple(gradients)
