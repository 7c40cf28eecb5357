"""`cross_scan` and `cross_merge`: the unfused halves of `ss2d`, for models that scan with something else."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch

from . import backend, scan
from .checks import check_activation, check_paths, check_range, check_rank, check_shape
from .dispatch import Operator


def cross_scan(x: torch.Tensor, paths: Sequence[int] = (0, 1, 2, 3)) -> torch.Tensor:
    """The pixels of an image in the order of each path, as VMamba's CrossScan.

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16 (float64 on the CPU).
        paths: K codes: 0 row-major, 1 column-major, 2 the reverse of 0, 3 the reverse of 1.

    Returns:
        (B, K, C, H·W), dtype of x.

    Raises:
        ValueError: a shape, device or path that does not fit; TypeError: a dtype. Both name the argument.
    """
    check_rank("x", x, (4,), "(B, C, H, W)")
    check_activation("x", x, scan.ACTIVATIONS)
    check_range("x: height * width", x.shape[2] * x.shape[3], 1, 2**30)
    return _cross_scan(x, check_paths(paths))


def cross_merge(y: torch.Tensor, shape: Sequence[int], paths: Sequence[int] = (0, 1, 2, 3)) -> torch.Tensor:
    """The tokens of all paths back at their pixels and added, as VMamba's CrossMerge.

    Args:
        y: (B, K, C, H·W), dtypes as for `cross_scan`; added in float32 (float64) and rounded once.
        shape: (H, W) of the image.
        paths: K codes as for `cross_scan`.

    Returns:
        (B, C, H, W), dtype of y.

    Raises:
        ValueError: a shape, device or path that does not fit; TypeError: a dtype. Both name the argument.
    """
    paths = check_paths(paths)
    check_rank("y", y, (4,), "(B, K, C, H·W)")
    integers = isinstance(shape, Sequence) and all(isinstance(s, (Integral, torch.SymInt)) for s in shape)
    if not integers or len(shape) != 2:
        raise ValueError(f"shape: {shape!r}, expected (H, W)")
    height, width = shape
    check_range("shape: height", height, 1, 2**20)
    check_range("shape: width", width, 1, 2**20)
    check_range("shape: height * width", height * width, 1, 2**30)
    check_shape("y", y, (y.shape[0], len(paths), y.shape[2], height * width), "(B, K, C, H·W)")
    check_activation("y", y, scan.ACTIVATIONS)
    return _cross_merge(y, height, width, paths)


def _shape(batch, channels, height, width, paths):
    return backend.module().CrossScanProblem((batch, channels, height, width), tuple(paths))


@Operator
def _cross_scan(x: torch.Tensor, paths: Sequence[int]) -> torch.Tensor:
    y = _fake_cross_scan(x, paths)
    if y.numel() > 0:
        x = x.contiguous()
        shape = _shape(*x.shape, paths)
        backend.run("cross_scan", x.device, shape, x.element_size(), x.data_ptr(), y.data_ptr(), workspace=False)
    return y


@_cross_scan.register_fake
def _fake_cross_scan(x, paths):
    return x.new_empty((x.shape[0], len(paths), x.shape[1], x.shape[2] * x.shape[3]))


@Operator
def _cross_merge(y: torch.Tensor, height: int, width: int, paths: Sequence[int]) -> torch.Tensor:
    x = _fake_cross_merge(y, height, width, paths)
    if x.numel() > 0:
        y = y.contiguous()
        shape, dtype = _shape(*x.shape, paths), scan.kernel_dtype(y.dtype)
        backend.run("cross_merge", y.device, shape, dtype, y.data_ptr(), x.data_ptr(), workspace=False)
    return x


@_cross_merge.register_fake
def _fake_cross_merge(y, height, width, paths):
    return y.new_empty((y.shape[0], y.shape[2], height, width))


# Each is the other's gradient; both are linear, so they may be differentiated any number of times.
def _save_scan(ctx, inputs, output):
    x, ctx.paths = inputs
    ctx.size = x.shape[2:]


def _save_merge(ctx, inputs, output):
    ctx.paths = inputs[3]


_cross_scan.register_autograd(lambda ctx, dy: (_cross_merge(dy, *ctx.size, ctx.paths), None), setup_context=_save_scan)
_cross_merge.register_autograd(
    lambda ctx, dx: (_cross_scan(dx, ctx.paths), None, None, None), setup_context=_save_merge
)
