"""`diffmf info`: what is installed and what was found, for bug reports."""

import argparse
import platform
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from . import checkpoint
from .cli import package_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    rows = [
        ("diffmf", package_version()),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("PyTorch sees", f"{torch.cuda.device_count()} CUDA devices"),
        ("NumPy", np.__version__),
        *_backends(),
        *_devices(),
        *_weights(),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


def _backends() -> list[tuple[str, str]]:
    from diffmf_ops import backend

    if backend.import_error is not None:
        error = backend.import_error
        return [("kernels", f"the compiled module failed to load: {type(error).__name__}: {error}")]
    if not backend.has_cuda():
        return [("kernels", "C++ (built without CUDA)")]
    module = backend.module()
    return [("kernels", f"C++ and CUDA, by nvcc {module.cuda_version} for {module.cuda_archs}")]


def _devices() -> list[tuple[str, str]]:
    try:
        import pynvml
    except ImportError as error:
        return [("GPU", f"unknown, nvidia-ml-py is missing ({error})")]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [("GPU", f"none found (NVML: {error})")]
    try:
        rows = [("NVIDIA driver", pynvml.nvmlSystemGetDriverVersion())]
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            free = f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
            rows.append((f"GPU {index}", f"{pynvml.nvmlDeviceGetName(handle)}, sm_{major}{minor}, {free}"))
        return rows
    finally:
        pynvml.nvmlShutdown()


def _weights() -> list[tuple[str, str]]:
    return [row for path in checkpoint.BUNDLED.values() for row in _weights_in(path)]


def _weights_in(path: Path) -> list[tuple[str, str]]:
    try:
        with safe_open(path, framework="np") as file:
            count = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        return [("weights", f"{path}: cannot be read ({error})")]
    rows = [("weights", f"{path}, {path.stat().st_size / 2**20:.1f} MiB, {count} parameters")]
    return rows + [(f"  {key}", value) for key, value in sorted(metadata.items())]
