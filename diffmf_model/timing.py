"""Timing that can be trusted: warmed up, cache flushed, median with spread, and a record of where it was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from .images import atomic_write


def milliseconds(function, device: str, **options) -> dict[str, float]:
    """`alternate` of a single function."""
    return alternate({"": function}, device, **options)[""]


WAIT_CYCLES = 8_000_000  # 4 ms at 2 GHz


def alternate(
    functions: dict, device: str, *, repeats: int = 20, seconds: float = 0.5, queued: bool = False
) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum time in ms of each function, called in turn, each round starting with the next one.

    On a GPU by events, the second-level cache overwritten before each call; on a CPU by the wall clock. Up to `repeats`
    rounds, and at least 3, in about `seconds`; two rounds before them warm up. With `queued` the GPU waits 4 ms before
    each call, while the host queues its launches: then the time is the device's, not the host's.
    """
    names = list(functions)
    for name in names:  # whatever is compiled or tuned at the first call
        functions[name]()
    begin = time.perf_counter()
    for name in names:
        functions[name]()
        if device == "cuda":
            torch.cuda.synchronize()
    repeats = min(repeats, max(3, int(seconds / (time.perf_counter() - begin))))
    order = [names[(turn + i) % len(names)] for turn in range(repeats) for i in range(len(names))]
    calls = [functions[name] for name in order]
    times = _gpu_clock(calls, queued) if device == "cuda" else _cpu_clock(calls)
    found = {name: [t for t, timed in zip(times, order, strict=True) if timed == name] for name in names}
    return {n: {"median": statistics.median(t), "min": min(t), "max": max(t)} for n, t in found.items()}


def _gpu_clock(calls, queued: bool) -> list[float]:
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    for call, (start, end) in zip(calls, events, strict=True):
        flush.zero_()
        if queued:
            torch.cuda._sleep(WAIT_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _cpu_clock(calls) -> list[float]:
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def peak_extra_mib(function) -> float:
    """MiB that a call allocates on the GPU at its peak, beyond what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def environment(device: str) -> dict:
    """Machine, versions and commit of a measurement; DIFFMF_COMMIT names the commit of a copy without its history."""
    named = os.environ.get("DIFFMF_COMMIT")
    found = {
        "commit": named or _git("rev-parse", "--short", "HEAD"),
        "modified": not named and bool(_git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "clocks": _clocks()}
    else:
        found |= {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    return found


def _git(*arguments: str) -> str | None:
    checkout = Path(__file__).parents[1]  # an installed copy must not name the repository that happens to be around it
    command = ["git", "-C", str(checkout), f"--git-dir={checkout / '.git'}", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy without its history


def _clocks() -> dict | None:
    """MHz of the current GPU's multiprocessors under load and at most, or None where NVML does not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        clock = pynvml.NVML_CLOCK_SM
        load = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        for _ in range(300):  # about 100 ms, still running when the clock is read
            load.zero_()
        return {
            "sm": pynvml.nvmlDeviceGetClockInfo(handle, clock),
            "sm max": pynvml.nvmlDeviceGetMaxClockInfo(handle, clock),
        }
    except Exception as error:  # a record without clocks is better than none; NVML fails in many ways
        print(f"clocks unknown: {error}")
        return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_results(name: str, device: str, folder: Path, **results) -> Path:
    """Writes the results with the environment to `folder`/NAME.json; after every row, so that none is lost."""
    path = folder / f"{name}.json"
    with atomic_write(path) as file:
        file.write((json.dumps({"environment": environment(device), **results}, indent=1) + "\n").encode())
    return path
