"""The compiled module, loaded once; what it was built with; and the error if it could not be loaded."""

from __future__ import annotations

import importlib
import re
from contextlib import nullcontext
from functools import cache

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
    if kind not in ("cpu", "cuda", "meta"):  # of meta tensors PyTorch asks for shapes only
        raise ValueError(f"{name}: on {tensor.device}, expected a cpu or cuda tensor")


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("80-real 90": binaries of 8.0 and 9.0, and PTX of 9.0) runs on a GPU.

    A binary does on GPUs of its own major version from its minor version on, PTX on all from its version on; with a
    letter ("90a") both on that version only.
    """
    for arch in archs.split():
        match = re.fullmatch(r"(\d+)([a-z]?)(-\w+)?", arch)
        if match is None:  # CMake's "native", "all" or "all-major"
            return True
        (major, minor), kind = divmod(int(match[1]), 10), match[3]
        if match[2]:
            if (major, minor) == capability:
                return True
            continue
        if kind != "-virtual" and major == capability[0] and minor <= capability[1]:
            return True
        if kind != "-real" and (major, minor) <= capability:
            return True
    return False


@cache
def _check_capability(device: torch.device) -> None:
    """Raises RuntimeError unless this build has code for the GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(module().cuda_archs, (major, minor)):
        raise RuntimeError(
            f"{device} has compute capability {major}.{minor}, but diffmf was built for {module().cuda_archs}; "
            f"reinstall it on this machine, or with DIFFMF_CUDA_ARCHS={major}{minor}-real"
        )


def on(device: torch.device):
    """Context in which the device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and from a multiple of 16 bytes on: a contiguous slice may start anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def run(name: str, device: torch.device, *arguments, workspace: bool = True) -> None:
    """Calls the kernel `name` of the device: on the CPU with torch's number of threads, on a GPU on the current stream.

    With ``workspace``, a GPU kernel also gets scratch memory of the size it asks for, allocated by torch.
    """
    if device.type == "cpu":
        getattr(module(), f"{name}_cpu")(*arguments, torch.get_num_threads())
        return
    _check_capability(device)
    with on(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if not workspace:
            getattr(module(), f"{name}_cuda")(*arguments, stream)
            return
        size = getattr(module(), f"{name}_workspace_cuda")(arguments[0])
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        getattr(module(), f"{name}_cuda")(*arguments, scratch.data_ptr(), stream)
