"""The compiled module, loaded once; what it was built with; and the error if it could not be loaded."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import torch

try:
    _C = importlib.import_module("diffmf_ops._C")
    import_error: ImportError | None = None
except ImportError as error:  # kept and shown by every operator and by `diffmf info`
    _C = None
    import_error = error


def module():
    """The compiled module; raises ImportError with the reason if it failed to load."""
    if _C is None:
        raise ImportError(f"diffmf_ops._C could not be loaded ({import_error}); reinstall diffmf") from import_error
    return _C


def has_cuda() -> bool:
    """Whether the CUDA kernels were compiled in."""
    return _C is not None and _C.cuda_version is not None


def check_device(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless this build has kernels for the tensor's device."""
    kind = tensor.device.type
    if kind == "cuda" and not has_cuda() and import_error is None:
        raise ValueError(f"{name}: on {tensor.device}, but diffmf was built without CUDA; reinstall it with nvcc")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{name}: on {tensor.device}, expected a cpu or cuda tensor")


def on(device: torch.device):
    """Context in which the device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def run(name: str, device: torch.device, *arguments, workspace: bool = True) -> None:
    """Calls the kernel `name` of the device: on the CPU with torch's number of threads, on a GPU on the current stream.

    With ``workspace``, a GPU kernel also gets scratch memory of the size it asks for, allocated by torch.
    """
    if device.type == "cpu":
        getattr(module(), f"{name}_cpu")(*arguments, torch.get_num_threads())
        return
    with on(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if not workspace:
            getattr(module(), f"{name}_cuda")(*arguments, stream)
            return
        size = getattr(module(), f"{name}_workspace_cuda")(arguments[0])
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        getattr(module(), f"{name}_cuda")(*arguments, scratch.data_ptr(), stream)
