"""`norm_gate`: the layer normalization and the SiLU gate at the end of a VSS block's scan, in one pass."""

from __future__ import annotations

import torch

from . import backend, scan
from .checks import cast, check_activation, check_device, check_dtype, check_once, check_range, check_rank, check_shape
from .dispatch import Operator, autocast_dtype


def norm_gate(
    y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, z: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """LayerNorm of the last axis of y, times SiLU(z) where z is given. Statistics are float32.

    Args:
        y: (B, H, W, D), or (M, B, H, W, D) with parameters of its own for each modality; float32, bfloat16 or float16,
            also float64 on the CPU.
        weight, bias: ([M,] D), float32 (float64 with float64 y).
        z: shape and dtype of y, or None. y and z may be slices of the channels of larger tensors, read in place.
        eps: added to the variance, at least 0.

    Returns:
        The shape and dtype of y, contiguous. Under autocast y keeps its dtype, z gets it, and the parameters are cast
        to float32. Differentiable once in all four tensors; the same input gives the same bits on every run.

    Raises:
        ValueError: a shape or device that does not fit; TypeError: a dtype. Both name the argument.
    """
    check_rank("y", y, (4, 5), "(B, H, W, D), or with a leading M")
    check_rank("weight", weight, (1, 2), "(D,), or with a leading M")
    check_rank("bias", bias, (1, 2), "(D,), or with a leading M")
    if z is not None:
        check_rank("z", z, (4, 5), "the shape of y")
    if autocast_dtype(y) is not None:
        weight, bias = cast(torch.float32, weight=weight, bias=bias)
        (z,) = cast(y.dtype, z=z)
    check_once(_check_arguments, y, weight, bias, z, eps)
    return _norm_gate(y, weight, bias, z, eps)


def _check_arguments(y, weight, bias, z, eps) -> None:
    lead = tuple(y.shape[:-4])
    m = "M, " if lead else ""
    check_activation("y", y, scan.ACTIVATIONS)
    check_range("y: channels D", y.shape[-1], 1, scan.MAX_CHANNELS)
    if lead:
        check_range("y: modalities M", lead[0], 1, 65535)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (*lead, y.shape[-1]), f"({m}D)")
        check_dtype(name, tensor, scan.parameter_dtype(y.dtype), f"parameters beside {y.dtype} activations")
        check_device(name, tensor, y.device, "y")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: {eps!r}, expected a number")
    check_range("eps", eps, 0, float("inf"))
    if z is not None:
        check_shape("z", z, tuple(y.shape), "the shape of y")
        check_dtype("z", z, y.dtype, "the dtype of y")
        check_device("z", z, y.device, "y")


def _pixels(tensor):
    """(tensor, stride of a modality, stride of a pixel), copied unless all pixels of a modality are equally spaced."""
    modality = tensor.stride(0) if tensor.dim() == 5 else 0
    batch, row, column, channel = tensor.stride()[-4:]
    items, height, width, channels = tensor.shape[-4:]
    # From the innermost axis with several entries outwards, each must continue the one inside.
    spacing, expected = None, None
    even = channel == 1 or channels == 1
    for count, stride in ((width, column), (height, row), (items, batch)):
        if count > 1:
            if spacing is None:
                spacing = expected = stride
            even = even and stride == expected
            expected = stride * count
    if not even:
        tensor = tensor.contiguous()
        return tensor, items * height * width * channels, channels
    return tensor, modality, channels if spacing is None else spacing


class _Call:
    """The problem and its inputs, with the tensors the addresses point into kept alive."""

    def __init__(self, y, weight, bias, z, eps):
        c = backend.module()
        self.tensors = [_pixels(y), (None, 0, 0) if z is None else _pixels(z)]
        self.parameters = [weight.contiguous(), bias.contiguous()]
        batch, height, width, channels = y.shape[-4:]
        sizes = (y.shape[0] if y.dim() == 5 else 1, batch * height * width, channels)
        self.problem = c.NormGateProblem(scan.kernel_dtype(y.dtype), sizes, eps)
        self.inputs = c.NormGateInputs(
            *(v for t, *strides in self.tensors for v in (0 if t is None else t.data_ptr(), tuple(strides))),
            *(t.data_ptr() for t in self.parameters),
        )


@Operator
def _norm_gate(
    y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, z: torch.Tensor | None, eps: float
) -> torch.Tensor:
    out = y.new_empty(y.shape)
    if out.numel() > 0:
        call = _Call(y, weight, bias, z, eps)
        backend.run("norm_gate_forward", y.device, call.problem, call.inputs, out.data_ptr(), workspace=False)
    return out


@_norm_gate.register_fake
def _(y, weight, bias, z, eps):
    return y.new_empty(y.shape)


@Operator
def _norm_gate_backward(
    dout: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, z: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of y, weight, bias and z (empty when z is None)."""
    dy, dz = y.new_empty(y.shape), y.new_empty(0 if z is None else y.shape)
    if dy.numel() == 0:
        return dy, weight.new_zeros(weight.shape), bias.new_zeros(bias.shape), dz
    call = _Call(y, weight, bias, z, eps)
    dout = backend.aligned(dout)
    with backend.on(y.device):
        parts = getattr(backend.module(), f"norm_gate_backward_parts_{y.device.type}")(call.problem, call.inputs)
    dweight, dbias = (weight.new_empty((parts, *weight.shape)) for _ in range(2))
    gradients = backend.module().NormGateGradients(
        dout.data_ptr(), dy.data_ptr(), 0 if z is None else dz.data_ptr(), dweight.data_ptr(), dbias.data_ptr()
    )
    backend.run("norm_gate_backward", y.device, call.problem, call.inputs, gradients, workspace=False)
    return dy, dweight.sum(0), dbias.sum(0), dz


@_norm_gate_backward.register_fake
def _(dout, y, weight, bias, z, eps):
    dz = y.new_empty(0 if z is None else y.shape)
    return y.new_empty(y.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dz


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dout):
    y, weight, bias, z = ctx.saved_tensors
    dy, dweight, dbias, dz = _norm_gate_backward(dout, y, weight, bias, z, ctx.eps)
    return dy, dweight, dbias, None if z is None else dz, None


_norm_gate.register_autograd(_gradients, setup_context=_save_inputs)
_norm_gate_backward.refuse_double_backward()
