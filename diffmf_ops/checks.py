"""Argument checks whose messages name the argument, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from operator import index

import torch

from . import backend
from .dispatch import PLAIN

MAX_PATHS = 8  # kMaxPaths of the kernels
_passed: set[tuple] = set()  # by check_once


def check_once(check: Callable, *arguments) -> None:
    """check(*arguments), unless it has passed for such tensors (shapes, dtypes, devices) and equal other arguments.

    A thorough check takes longer than the launch of a kernel.
    """
    described = [(a.shape, a.dtype, a.device) if type(a) in PLAIN else a for a in arguments]
    if torch.compiler.is_compiling() or any(isinstance(a, torch.Tensor) for a in described):
        return check(*arguments)
    key = (check, *described)
    try:
        passed = key in _passed
    except TypeError:  # an argument that cannot be hashed, of a type that no check expects; or a symbolic size
        return check(*arguments)
    if not passed:
        check(*arguments)
        if len(_passed) >= 4096:
            _passed.clear()
        _passed.add(key)


def cast(dtype: torch.dtype, **tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The floating-point tensors in this dtype, others and None as they are; TypeError names what is no tensor."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: a {type(tensor).__name__}, expected a tensor")
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors.values()]


def check_rank(name: str, tensor: torch.Tensor, ranks: tuple[int, ...], layout: str) -> None:
    """Raises TypeError unless a dense tensor, ValueError unless its number of dimensions is one of `ranks`."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: a {type(tensor).__name__}, expected a tensor {layout}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: {tensor.layout}, expected torch.strided")
    if tensor.dim() not in ranks:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {layout}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], layout: str) -> None:
    """Raises ValueError unless the tensor has this shape (TypeError unless it is a tensor)."""
    check_rank(name, tensor, (len(shape),), f"{layout} = {tuple(shape)}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {layout} = {tuple(shape)}")


def check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype, reason: str) -> None:
    """Raises TypeError unless the tensor has this dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: dtype {tensor.dtype}, expected {dtype} ({reason})")


def check_activation(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError for a dtype, ValueError for a device that no kernel takes."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}")
    if tensor.device.type == "cuda" and tensor.dtype == torch.float64:
        raise TypeError(f"{name}: dtype torch.float64 on {tensor.device}; float64 runs on the CPU only")
    backend.check_device(name, tensor)


def check_device(name: str, tensor: torch.Tensor, device: torch.device, other: str) -> None:
    """Raises ValueError unless the tensor is on this device."""
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device} like {other}")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {value}, expected {low} to {high}")


def check_flag(name: str, value: bool) -> None:
    """Raises TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {value!r}, expected True or False")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_paths(paths) -> tuple[int, ...]:
    """The path codes as a tuple; raises ValueError unless they are 1 to 8 integers from 0 to 3."""
    try:
        codes = tuple(index(path) for path in paths)
    except TypeError:
        codes = ()
    if not 1 <= len(codes) <= MAX_PATHS or any(code not in (0, 1, 2, 3) for code in codes):
        raise ValueError(f"paths: {paths!r}, expected 1 to {MAX_PATHS} codes from 0 to 3")
    return codes
