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


def milliseconds(function, device: str, *, repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median, minimum and maximum over `repeats` calls, in ms.

    On a GPU by events, the second-level cache overwritten before each call; on a CPU by the wall clock.
    """
    for _ in range(warmup):
        function()
    times = []
    if device == "cuda":
        flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    else:
        for _ in range(repeats):
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


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
    found = {
        "commit": os.environ.get("DIFFMF_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
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


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_results(name: str, device: str, rows: list[dict], folder: Path) -> Path:
    """Writes rows with the environment to `folder`/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    return path
