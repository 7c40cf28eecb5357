"""`diffmf bench`: times ss2d with its projection GEMM, from x to the merged y."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from diffmf_ops import reference, ss2d

from .checkpoint import add_device_argument, select_device
from .errors import UserError
from .timing import milliseconds, peak_extra_mib, write_results


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    height: int
    width: int
    states: int
    rank: int
    dtype: torch.dtype = torch.float32
    shared_decay: bool = False

    def __str__(self):
        kind = str(self.dtype).removeprefix("torch.")
        decay = " scalar A" if self.shared_decay else ""
        return f"{self.batch}×{self.channels}×{self.height}×{self.width} N{self.states} R{self.rank} {kind}{decay}"


F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "tiny": Case(1, 64, 64, 64, 16, 2),
    "paper": Case(1, 64, 512, 512, 16, 2),
    "paper-bf16": Case(1, 64, 512, 512, 16, 2, BF16),
    "paper-scalar-a": Case(1, 64, 512, 512, 16, 2, shared_decay=True),
    "m3fd": Case(1, 64, 768, 1024, 16, 2),
    "crops": Case(4, 64, 128, 128, 16, 2),
    "crops-bf16": Case(4, 64, 128, 128, 16, 2, BF16),
    "batch4": Case(4, 64, 256, 256, 16, 2),
    "vmamba": Case(64, 192, 56, 56, 1, 6),
    "vmamba-bf16": Case(64, 192, 56, 56, 1, 6, BF16),
}
DEFAULTS = {"cpu": ["tiny"], "cuda": [name for name in CASES if name != "tiny"]}


def make_inputs(case: Case, device: str):
    """x, the projection's weight, and the operator's parameters; all require gradients."""
    k, d, row = 4, case.channels, case.rank + 2 * case.states
    x = torch.randn(case.batch, case.height, case.width, d, device=device, dtype=case.dtype)
    weight = torch.randn(k * row, d, device=device, dtype=case.dtype) / d**0.5
    dt_weight = torch.randn(k, d, case.rank, device=device) / case.rank**0.5
    dt_bias = torch.rand(k, d, device=device) * 4 - 6  # steps of 0.002 to 0.13, as VMamba initializes them
    decays = torch.arange(1, case.states + 1, device=device, dtype=torch.float32)
    A = -(decays[:1] if case.shared_decay else decays).expand(k, d, -1).clone()
    D = torch.ones(k, d, device=device)
    return [t.requires_grad_() for t in (x, weight, dt_weight, dt_bias, A, D)]


def scan(operator, x, weight, *parameters):
    proj = torch.nn.functional.linear(x, weight).unflatten(-1, (4, -1))
    return operator(x, proj, *parameters)


def measure(case: Case, device: str, with_reference: bool) -> dict:
    tensors = make_inputs(case, device)
    with torch.no_grad():
        seed = torch.randn_like(tensors[0])
        proj = torch.nn.functional.linear(tensors[0], tensors[1]).unflatten(-1, (4, -1))

    def forward(operator=ss2d):
        with torch.no_grad():
            return scan(operator, *tensors)

    def both(operator=ss2d):
        torch.autograd.grad(scan(operator, *tensors), tensors, seed)

    @torch.no_grad()
    def kernel():
        ss2d(tensors[0], proj, *tensors[2:])

    row = {
        "case": str(case),
        "kernel": milliseconds(kernel, device),
        "forward": milliseconds(forward, device),
        "forward and backward": milliseconds(both, device),
    }
    if device == "cuda":
        row["extra MiB"] = {"forward": peak_extra_mib(forward), "forward and backward": peak_extra_mib(both)}
    if with_reference:
        row["reference"] = {
            "forward": milliseconds(lambda: forward(reference.ss2d), device, repeats=3, warmup=1),
            "forward and backward": milliseconds(lambda: both(reference.ss2d), device, repeats=3, warmup=1),
        }
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "; ".join(f"{name}: {case}" for name, case in CASES.items())
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"B×D×H×W, states N, rank R; {names}")
    add_device_argument(parser)
    parser.add_argument("--reference", action="store_true", help="also time the PyTorch reference (slow)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the numbers to DIR/ss2d_{cpu,cuda}.json")


def run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        raise UserError(f"case {unknown[0]!r}: expected one of {', '.join(CASES)}")
    device = select_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows = []
    print(f"{'case':40} {'kernel':>9} {'forward':>9} {'fwd+bwd':>9}  ms, median; extra MiB")
    for name in args.cases or DEFAULTS[device.type]:
        row = measure(CASES[name], device.type, args.reference)
        rows.append(row)
        times = " ".join(f"{row[key]['median']:9.3f}" for key in ("kernel", "forward", "forward and backward"))
        extra = "/".join(f"{v:.0f}" for v in row.get("extra MiB", {}).values())
        print(f"{row['case']:40} {times}  {extra}", flush=True)
        for key, time in row.get("reference", {}).items():
            ratio = time["median"] / row[key]["median"]
            print(f"    reference {key}: {time['median']:.1f} ms, {ratio:.0f} times as long", flush=True)
    if args.output is not None:
        print(f"written: {write_results(f'ss2d_{device.type}', device.type, rows, args.output)}")
    return 0
