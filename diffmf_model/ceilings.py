"""What the GPU can do at most, measured by small kernels, and what of it a forward scan needs."""

from __future__ import annotations

from functools import partial

import torch

from diffmf_ops import backend

from .timing import milliseconds

SCAN_PROBES = ("scan_states", "scan_output", "shared_scan_states", "shared_scan_output")


def measure() -> dict[str, float]:
    """Operations per second of every probe, and bytes per second read and written by a copy."""
    kinds = backend.module().Probe
    sink = torch.empty(1, device="cuda")
    found = {}
    stream = torch.cuda.current_stream().cuda_stream
    for name in ("exp2", "fma", *SCAN_PROBES):
        repetitions = 2000 if name in SCAN_PROBES else 20000
        launch = partial(backend.module().probe_cuda, getattr(kinds, name), repetitions, sink.data_ptr(), stream)
        found[name] = launch() / milliseconds(launch, "cuda", repeats=5)["median"] * 1e3
    source = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() / milliseconds(lambda: target.copy_(source), "cuda", repeats=5)["median"] * 1e3
    return found


def needs(case) -> dict[str, float]:
    """Of one forward scan: state-steps of a pass, exp2 of two passes, and bytes of x, proj and y touched once."""
    channel_steps = case.modalities * case.batch * case.height * case.width * 4 * case.channels
    row = 4 * (case.rank + 2 * case.states)
    pixels = case.modalities * case.batch * case.height * case.width
    return {
        "state steps": channel_steps * case.states,
        "exp2": 2 * channel_steps * (1 if case.shared_decay else case.states),
        "bytes": pixels * (2 * case.channels + row) * case.dtype.itemsize,
    }


def limits(case, ceilings: dict[str, float]) -> dict[str, float]:
    """ms that a forward scan takes at the measured ceilings: its exp2, its bytes, and the bare two-pass recurrence."""
    need = needs(case)
    first, second = SCAN_PROBES[2:] if case.shared_decay else SCAN_PROBES[:2]
    return {
        "exp2": need["exp2"] / ceilings["exp2"] * 1e3,
        "copy": need["bytes"] / ceilings["copy"] * 1e3,
        "two passes": need["state steps"] * (1 / ceilings[first] + 1 / ceilings[second]) * 1e3,
    }
