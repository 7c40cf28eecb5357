"""`diffmf bench`: times ss2d with its projection GEMM, from x to the merged y, beside peers in the same run.

Projections may use TF32 on both sides; errors are measured without it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from diffmf_ops import ss2d

from . import ceilings, peers
from .checkpoint import add_device_argument, select_device
from .errors import UserError
from .images import make_folder
from .timing import alternate, milliseconds, peak_extra_mib, write_results

QUEUED = "Calls were queued while the device waited, so the host's time to launch is not in these numbers"


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
    modalities: int = 1
    exchange: str = "none"

    def __str__(self):
        kind = str(self.dtype).removeprefix("torch.")
        more = " scalar A" * self.shared_decay + f" two modalities, exchange {self.exchange}" * (self.modalities == 2)
        return f"{self.batch}×{self.channels}×{self.height}×{self.width} N{self.states} R{self.rank} {kind}{more}"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = {
    "tiny": Case(1, 64, 64, 64, 16, 2),
    "paper": Case(1, 64, 512, 512, 16, 2),
    "paper-bf16": Case(1, 64, 512, 512, 16, 2, BF16),
    "paper-scalar-a": Case(1, 64, 512, 512, 16, 2, shared_decay=True),
    "paper-scalar-a-bf16": Case(1, 64, 512, 512, 16, 2, BF16, shared_decay=True),
    "m3fd": Case(1, 64, 768, 1024, 16, 2),
    "crops": Case(4, 64, 128, 128, 16, 2),
    "crops-bf16": Case(4, 64, 128, 128, 16, 2, BF16),
    "batch4": Case(4, 64, 256, 256, 16, 2),
    "vmamba": Case(64, 192, 56, 56, 1, 6),
    "vmamba-bf16": Case(64, 192, 56, 56, 1, 6, BF16),
    "exchange": Case(1, 64, 512, 512, 16, 2, modalities=2, exchange="mutual"),
    "exchange-bf16": Case(1, 64, 512, 512, 16, 2, BF16, modalities=2, exchange="mutual"),
}
DEFAULTS = {"cpu": ["tiny"], "cuda": [name for name in CASES if name != "tiny"]}
SWEEP = {
    "n1": Case(4, 96, 128, 128, 1, 6),
    "n4": Case(4, 64, 128, 128, 4, 4, BF16),
    "n8": Case(2, 128, 128, 128, 8, 8),
    "n8-f16": Case(2, 128, 128, 128, 8, 8, F16),
    "n32": Case(2, 64, 128, 128, 32, 4),
    "n64": Case(1, 128, 128, 128, 64, 8),
    "n64-bf16": Case(1, 128, 128, 128, 64, 8, BF16),
    "d16": Case(4, 16, 256, 256, 16, 1),
    "d48-odd": Case(3, 48, 199, 131, 16, 3),
    "d384-14": Case(64, 384, 14, 14, 1, 24),
    "d384-14-bf16": Case(64, 384, 14, 14, 1, 24, BF16),
    "d768-7": Case(64, 768, 7, 7, 1, 48),
    "d768-7-n16-bf16": Case(64, 768, 7, 7, 16, 48, BF16),
    "d768-7-one": Case(1, 768, 7, 7, 16, 48),
    "d96-56-f16": Case(32, 96, 56, 56, 16, 6, F16),
    "d256-batch1": Case(1, 256, 64, 64, 16, 16),
    "d192-32-bf16": Case(16, 192, 32, 32, 16, 12, BF16),
    "wide": Case(1, 64, 16, 4096, 16, 2),
    "2048": Case(1, 32, 2048, 2048, 16, 2),
    "2048-bf16": Case(1, 32, 2048, 2048, 16, 2, BF16),
    "scalar-a-n64": Case(2, 64, 128, 128, 64, 4, shared_decay=True),
    "two-none": Case(2, 64, 128, 128, 16, 2, modalities=2),
    "two-mutual": Case(2, 64, 128, 128, 16, 2, modalities=2, exchange="mutual"),
    "two-from-visible-bf16": Case(2, 64, 128, 128, 16, 2, BF16, modalities=2, exchange="from_visible"),
    "two-from-infrared-7": Case(32, 96, 7, 7, 8, 6, F16, modalities=2, exchange="from_infrared"),
}
LENGTH = {f"side{side}": Case(1, 64, side, side, 16, 2) for side in (32, 64, 128, 256, 512, 1024, 2048)}
GROUPS = {"sweep": list(SWEEP), "length": list(LENGTH)}
ALL = CASES | SWEEP | LENGTH
QUICK = {"cpu": ["separate"], "cuda": ["vmamba", "mamba_ssm", "mamba2", "separate"]}  # the rest loop over tokens

# Relative L2 errors above which a peer does not compute the same. Wide: Triton multiplies in TF32, and in 16 bits the
# peers round steps as large as 6 to a relative 2^-9, while a mistake in an adapter gives errors near 1.
WRONG = {F32: 1e-2, BF16: 1e-1, F16: 5e-2}


def make_inputs(case: Case, device: str):
    """x, the projection's weight, and the operator's parameters; all require gradients.

    With the scalar A all channels of a path have one step and one decay, which is what Mamba-2 computes.
    """
    lead = (2,) if case.modalities == 2 else ()
    k, d, row = 4, case.channels, case.rank + 2 * case.states
    own = 1 if case.shared_decay else d
    x = torch.randn(*lead, case.batch, case.height, case.width, d, device=device, dtype=case.dtype)
    weight = torch.randn(*lead, k * row, d, device=device, dtype=case.dtype) / d**0.5
    dt_weight = torch.randn(*lead, k, own, case.rank, device=device) / case.rank**0.5
    dt_bias = torch.rand(*lead, k, own, device=device) * 4 - 6  # steps of 0.002 to 0.13, as VMamba initializes them
    decays = torch.arange(1, case.states + 1, device=device, dtype=torch.float32)
    A = -(decays[:1] if case.shared_decay else decays).expand(*lead, k, d, -1)
    D = torch.ones(*lead, k, d, device=device)
    dt_weight, dt_bias = dt_weight.expand(*lead, k, d, -1), dt_bias.expand(*lead, k, d)
    return [t.clone().contiguous().requires_grad_() for t in (x, weight, dt_weight, dt_bias, A, D)]


def measure(case: Case, device: str, wanted: list[str], seconds: float, limits: dict | None = None) -> dict:
    """One row: times and memory of ss2d, and of each wanted peer that can do the case with its errors against ss2d.

    A peer that computes something else, or raises, is not timed: "failed" of the row says why.
    """
    tensors = make_inputs(case, device)
    dy = torch.randn_like(tensors[0])
    contenders = {"diffmf": peers.ours(case, tensors, dy)}
    row = {"case": str(case), "dtype": str(case.dtype), "tokens": case.height * case.width}
    row |= {"peers": {}, "failed": {}}
    for name in wanted:
        try:
            peer = peers.PEERS[name](case, tensors, dy)
            found = peers.errors(peer, case, tensors, dy) if peer.comparable else {}
        except peers.NotForThis:
            continue
        except RuntimeError as error:  # out of memory among others
            row["failed"][name] = str(error).partition("\n")[0]
            continue
        if not all(error <= WRONG[case.dtype] for error in found.values()):  # not-a-number included
            row["failed"][name] = f"relative errors {found}, expected at most {WRONG[case.dtype]}"
            continue
        contenders[name] = peer
        row["peers"][name] = {"error": found}

    with torch.no_grad():
        proj = peers.project(tensors[0], tensors[1])

    @torch.no_grad()
    def kernel():
        ss2d(tensors[0], proj, *tensors[2:], exchange=case.exchange)

    row["kernel"] = milliseconds(kernel, device, seconds=seconds, queued=True)
    for key, method in (("forward", "forward"), ("forward and backward", "both")):
        calls = {name: getattr(contender, method) for name, contender in contenders.items()}
        with peers.tf32(True):
            times = alternate(calls, device, seconds=seconds, queued=True)
        for name in contenders:
            target = row if name == "diffmf" else row["peers"][name]
            target[key] = times[name]
            if device == "cuda":
                target.setdefault("extra MiB", {})[key] = peak_extra_mib(calls[name])
    if limits is not None:
        row["limits"] = limits
        row["bytes"] = ceilings.needs(case)["bytes"]
    return row


def importable(names: list[str], device: str, required: bool) -> list[str]:
    """The peers that are installed; says why not of the others, by a UserError where they are required."""
    probe = Case(1, 16, 2, 2, 4, 1, shared_decay=True)
    found = []
    for name in names:
        try:
            tensors = make_inputs(probe, device)
            peers.PEERS[name](probe, tensors, torch.ones_like(tensors[0]))
        except peers.NotForThis:
            pass
        except ImportError as error:
            if required:
                raise UserError(f"--peers {name}: not importable ({error})") from error
            print(f"without {name}: {error}")
            continue
        found.append(name)
    return found


def geometric_mean(values) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "; ".join(f"{name}: {case}" for name, case in CASES.items())
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"B×D×H×W, states N, rank R; {names}; groups: {', '.join(GROUPS)}"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--peers",
        metavar="LIST",
        help=f"timed in turn with ss2d, of {', '.join(peers.PEERS)}; empty for none "
        "(default: those that are importable, without eager and compile)",
    )
    parser.add_argument("--seconds", type=float, default=0.4, metavar="S", help="for each measurement (default: 0.4)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the numbers to DIR/ss2d_{cpu,cuda}[_GROUP].json"
    )


def select_cases(names: list[str], device: str) -> list[str]:
    chosen = []
    for name in names or DEFAULTS[device]:
        if name not in ALL and name not in GROUPS:
            raise UserError(f"case {name!r}: expected one of {', '.join([*GROUPS, *ALL])}")
        chosen += GROUPS.get(name, [name])
    return chosen


def select_peers(names: str | None, device: str) -> list[str]:
    if names is None:
        return importable(QUICK[device], device, required=False)
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in peers.PEERS:
            raise UserError(f"--peers {name!r}: expected some of {', '.join(peers.PEERS)}")
    return importable(wanted, device, required=True)


def run(args: argparse.Namespace) -> int:
    device = select_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    chosen = select_cases(args.cases, device.type)
    wanted = select_peers(args.peers, device.type)
    if args.output is not None:
        make_folder(args.output)
    results = {"rows": []}
    if device.type == "cuda":
        results["note"] = QUEUED
        results["ceilings"] = ceilings.measure()
        rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in results["ceilings"].items())
        print(f"ceilings, T/s: {rates}")
    group = args.cases if len(args.cases) == 1 and args.cases[0] in GROUPS else []
    file, written = "_".join(["ss2d", device.type, *group]), None
    print(f"{'case':40} {'kernel':>9} {'forward':>9} {'fwd+bwd':>9}  ms, median; extra MiB")
    for name in chosen:
        case = ALL[name]
        limits = ceilings.limits(case, results["ceilings"]) if "ceilings" in results else None
        row = {"name": name, **measure(case, device.type, wanted, args.seconds, limits)}
        results["rows"].append(row)
        show(row)
        if args.output is not None:
            written = write_results(file, device.type, args.output, **results)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show_means(results["rows"])
    if written is not None:
        print(f"written: {written}")
    failed = [f"{name} on {row['case']}: {why}" for row in results["rows"] for name, why in row["failed"].items()]
    if failed:
        raise UserError("; ".join(failed))
    return 0


def show(row: dict) -> None:
    def line(entry):
        times = " ".join(f"{entry[key]['median']:9.3f}" for key in ("forward", "forward and backward"))
        return f"{times}  {'/'.join(f'{v:.0f}' for v in entry.get('extra MiB', {}).values())}"

    kernel = row["kernel"]["median"]
    print(f"{row['case']:40} {kernel:9.3f} {line(row)}", flush=True)
    if "limits" in row:
        exp2, copy, floor = (row["limits"][key] / kernel for key in ("exp2", "copy", "two passes"))
        rate = row["bytes"] / kernel / 1e6
        print(f"    kernel: {rate:.0f} GB/s, {copy:.0%} of copy, {exp2:.0%} of exp2, {1 / floor:.2f} × two bare passes")
    for name, why in row["failed"].items():
        print(f"    {name} FAILED: {why}", flush=True)
    for name, peer in row["peers"].items():
        ratios = " ".join(
            f"{peer[key]['median'] / row[key]['median']:.2f}×" for key in ("forward", "forward and backward")
        )
        error = "/".join(f"{value:.0e}" for value in peer["error"].values())
        print(f"    {name:46} {line(peer)}  takes {ratios}  {error and f'relative error {error}'}", flush=True)


def show_means(rows: list[dict]) -> None:
    for name in peers.PEERS:
        beside = [row for row in rows if name in row["peers"]]
        for key in ("forward", "forward and backward"):
            if beside:
                mean = geometric_mean([row["peers"][name][key]["median"] / row[key]["median"] for row in beside])
                print(f"geometric mean, {name}, {key}: {mean:.2f}× over {len(beside)} cases")
