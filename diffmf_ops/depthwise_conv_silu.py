"""`depthwise_conv_silu`: the depthwise convolution and SiLU of a VSS block, on channels-last tensors."""

from __future__ import annotations

import torch

from . import backend, scan
from .checks import cast, check_activation, check_device, check_dtype, check_once, check_range, check_rank, check_shape
from .dispatch import Operator, autocast_dtype

KERNEL_SIZES = (1, 3, 5, 7)


def depthwise_conv_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU of a depthwise convolution with zero padding; the image keeps its size.

    Args:
        x: (B, H, W, D), or (M, B, H, W, D) with weights of its own for each modality; float32, bfloat16 or float16,
            also float64 on the CPU. Any strides; a slice of the channels of a larger tensor is read in place.
        weight: ([M,] D, 1, k, k) with k of 1, 3, 5 or 7, float32 (float64 with float64 x).
        bias: ([M,] D) or None, dtype of weight.

    Returns:
        The shape of x, contiguous, dtype of x. Under autocast x is cast to its dtype, the parameters to float32.
        Differentiable once in all three tensors; the same input gives the same bits on every run.

    Raises:
        ValueError: a shape or device that does not fit; TypeError: a dtype. Both name the argument.
    """
    check_rank("x", x, (4, 5), "(B, H, W, D), or with a leading M")
    check_rank("weight", weight, (4, 5), "(D, 1, k, k), or with a leading M")
    if bias is not None:
        check_rank("bias", bias, (1, 2), "(D,), or with a leading M")
    dtype = autocast_dtype(x)
    if dtype is not None:
        (x,) = cast(dtype, x=x)
        weight, bias = cast(torch.float32, weight=weight, bias=bias)
    check_once(_check_arguments, x, weight, bias)
    return _depthwise_conv_silu(x, weight, bias)


def _check_arguments(x, weight, bias) -> None:
    lead = tuple(x.shape[:-4])
    m = "M, " if lead else ""
    check_activation("x", x, scan.ACTIVATIONS)
    height, width, channels = x.shape[-3:]
    check_range("x: height", height, 1, 2**20)
    check_range("x: width", width, 1, 2**20)
    check_range("x: height * width", height * width, 1, 2**30)
    check_range("x: channels D", channels, 1, scan.MAX_CHANNELS)
    if lead:
        check_range("x: modalities M", lead[0], 1, 65535)
    size = weight.shape[-1]
    if size not in KERNEL_SIZES:
        raise ValueError(f"weight: kernel size {size}, expected one of {KERNEL_SIZES}")
    check_shape("weight", weight, (*lead, channels, 1, size, size), f"({m}D, 1, k, k)")
    if bias is not None:
        check_shape("bias", bias, (*lead, channels), f"({m}D)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_dtype(name, tensor, scan.parameter_dtype(x.dtype), f"parameters beside {x.dtype} activations")
            check_device(name, tensor, x.device, "x")


class _Call:
    """The problem and its inputs, with the tensors the addresses point into kept alive."""

    def __init__(self, x, weight, bias):
        c = backend.module()
        self.x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        self.parameters = [None if t is None else t.contiguous() for t in (weight, bias)]
        one = x.dim() == 4  # no axis of modalities
        sizes = (*((1,) if one else ()), *x.shape)
        self.problem = c.DepthwiseConvProblem(scan.kernel_dtype(x.dtype), sizes, weight.shape[-1])
        self.inputs = c.DepthwiseConvInputs(
            self.x.data_ptr(),
            (*((0,) if one else ()), *self.x.stride()[:-1], 0),
            *(0 if t is None else t.data_ptr() for t in self.parameters),
        )


@Operator
def _depthwise_conv_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty(x.shape)
    if y.numel() > 0:
        call = _Call(x, weight, bias)
        arguments = (call.problem, call.inputs, y.data_ptr())
        backend.run("depthwise_conv_silu_forward", x.device, *arguments, workspace=False)
    return y


@_depthwise_conv_silu.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@Operator
def _depthwise_conv_silu_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias (empty when bias is None)."""
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx, weight.new_zeros(weight.shape), weight.new_zeros(0 if bias is None else bias.shape)
    call = _Call(x, weight, bias)
    dy = dy.contiguous()
    with backend.on(x.device):
        count_parts = getattr(backend.module(), f"depthwise_conv_silu_backward_parts_{x.device.type}")
        parts = count_parts(call.problem, call.inputs)
    dweight = weight.new_empty((parts, *weight.shape))
    dbias = weight.new_empty(0 if bias is None else (parts, *bias.shape))
    gradients = backend.module().DepthwiseConvGradients(
        dy.data_ptr(), dx.data_ptr(), dweight.data_ptr(), 0 if bias is None else dbias.data_ptr()
    )
    backend.run("depthwise_conv_silu_backward", x.device, call.problem, call.inputs, gradients)
    return dx, dweight.sum(0), dbias if bias is None else dbias.sum(0)


@_depthwise_conv_silu_backward.register_fake
def _(dy, x, weight, bias):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _depthwise_conv_silu_backward(dy, x, weight, bias)
    return dx, dweight, None if bias is None else dbias


_depthwise_conv_silu.register_autograd(_gradients, setup_context=_save_inputs)
_depthwise_conv_silu_backward.refuse_double_backward()
