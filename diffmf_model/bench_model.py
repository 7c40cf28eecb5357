"""`diffmf bench-model`: the whole network, fusing one pair and training, and where the time goes.

fuse: the network alone, batch 1, as `diffmf fuse` runs it. train: forward, loss, backward, clipping and Adam, as
`diffmf train` does, without loading. eager, by torch.compile, and as one CUDA graph; vmamba and vmamba-graph are the
same network, eager and as a graph, on VMamba's kernels where they are installed. fp32 is without TF32, tf32 is with it.
Peak memory is all that is allocated on the GPU at the peak, weights included; for a graph, while it is captured.
Weights are random: they do not change the time.
"""

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from diffmf_ops import modules, reference

from . import peers
from .checkpoint import add_device_argument, select_device
from .config import Config, add_config_argument, load_config
from .cuda_graph import captured
from .errors import UserError
from .images import make_folder
from .loss import FusionLoss
from .network import DIFFMF
from .timing import milliseconds, write_results

TASKS, PRECISIONS = ("fuse", "train"), ("fp32", "tf32", "bf16")
MODES = ("eager", "compile", "graph", "vmamba", "vmamba-graph")
SIZES = {"cuda": ["512x512", "768x1024"], "cpu": ["128x128"]}
CROPS = "4x128x128"  # the batch that training throughput is compared on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", action="append", metavar="[Bx]HxW", help="may be repeated (default: 512x512, 768x1024; CPU: 128x128)"
    )
    parser.add_argument("--task", action="append", choices=TASKS, help="default: both")
    parser.add_argument("--mode", action="append", choices=MODES, help="default: all there are; on a CPU eager")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="default: fp32 and bf16; on a CPU fp32"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls (default: %(default)s)")
    parser.add_argument(
        "--reference", metavar="HxW", help="also the network on the PyTorch reference of the scan, at this size (slow)"
    )
    add_config_argument(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the numbers to DIR/model[_CONFIG]_{cpu,cuda}.json"
    )
    add_device_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as model.stages=2")


def run(args: argparse.Namespace) -> int:
    device = select_device(args.device)
    on_gpu = device.type == "cuda"
    config = load_config(args.config, args.overrides)
    tasks, sizes = args.task or TASKS, args.size or SIZES[device.type]
    modes = args.mode or (MODES[: 5 if peers.has_vmamba() else 3] if on_gpu else MODES[:1])
    precisions = args.precision or (("fp32", "bf16") if on_gpu else ("fp32",))
    for mode in modes:
        if mode not in MODES[:2] and not on_gpu:
            raise UserError(f"--mode {mode}: expected a CUDA device, found {device}")
        if mode.startswith("vmamba") and not peers.has_vmamba():
            raise UserError(f"--mode {mode}: VMamba's csm_triton and selective_scan_cuda_oflex are not installed")
    if args.repeats < 1:
        raise UserError(f"--repeats: expected at least 1, found {args.repeats}")
    shapes = {size: parse_size(size) for size in [*sizes, *([args.reference] if args.reference else [])]}
    if args.output is not None:
        make_folder(args.output)
    if on_gpu:
        torch.cuda.set_device(device)
    rows, name = [], "_".join(["model", *([Path(args.config).stem] if args.config else []), device.type])

    def keep(row: dict) -> None:
        rows.append(row)
        print(chart(row) if row["task"] == "modules" else line(row) + "\n", end="", flush=True)
        if args.output is not None:
            write_results(name, device.type, args.output, rows=rows)

    print(f"{'task':6}{'size':>12} {'precision':10}{'mode':14}{'ms':>10}{'images/s':>10}{'peak MiB':>10}", flush=True)
    for task in tasks:
        crops = [CROPS] if task == "train" and args.size is None and on_gpu else []
        for size in [*sizes, *crops]:
            for precision in precisions:
                for mode in modes:
                    row = {"task": task, "size": size, "precision": precision, "mode": mode}
                    with on_vmamba() if mode.startswith("vmamba") else contextlib.nullcontext():
                        row |= measure(config, device, parse_size(size), task, precision, mode, args.repeats)
                    keep(row)
    if args.reference:
        shape = shapes[args.reference]
        for task in tasks:
            pair = []
            for mode, patch in (("eager", contextlib.nullcontext()), ("reference", on_reference())):
                with patch:
                    row = measure(
                        config, device, shape, task, "fp32", "eager", 2 if mode == "reference" else args.repeats
                    )
                pair.append({"task": task, "size": args.reference, "precision": "fp32", "mode": mode} | row)
                keep(pair[-1])
            if all("ms" in each for each in pair):
                ratio = pair[1]["ms"]["median"] / pair[0]["ms"]["median"]
                print(f"    on the PyTorch reference {ratio:.1f} times as long", flush=True)
    for size in sizes:
        for precision in precisions:
            parts = {"task": "modules", "size": size, "precision": precision, "mode": "eager"}
            parts |= module_times(config, device, shapes[size], precision, args.repeats)
            keep(parts)
    if args.output is not None:
        print(f"written: {args.output / name}.json")
    return 0


def parse_size(text: str) -> tuple[int, int, int]:
    """ "BxHxW" or "HxW" -> (B, H, W). Raises UserError."""
    numbers = text.split("x")
    if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(f"size {text!r}: expected HxW or BxHxW, such as 768x1024")
    return (1, *map(int, numbers))[-3:]


def measure(
    config: Config,
    device: torch.device,
    shape: tuple[int, int, int],
    task: str,
    precision: str,
    mode: str,
    repeats: int,
) -> dict:
    """{"ms": median, min, max, "images_per_second", "peak_mib" (GPU)}, or {"error": why there is no number}."""
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    try:
        with _backend_settings(precision, searching=task == "train"):
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            function = (_fuse if task == "fuse" else _train)(config, device, shape, precision, mode)
            if gpu and not mode.endswith("graph"):  # a replay allocates nothing
                function()  # compiles, chooses convolutions
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                function()
                torch.cuda.synchronize()
            peak = {"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if gpu else {}
            times = milliseconds(function, device.type, repeats=repeats)
            return {"ms": times, "images_per_second": 1e3 * shape[0] / times["median"]} | peak
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except peers.NotForThis as error:
        return {"error": f"VMamba's kernels are measured {error} only"}
    except RuntimeError as error:
        if mode != "compile":
            raise
        return {"error": f"torch.compile failed: {str(error).strip().splitlines()[0]}"}
    finally:
        if mode == "compile":
            torch.compiler.reset()


@contextlib.contextmanager
def _backend_settings(precision: str, searching: bool):
    """TF32 where asked for, and cuDNN's search for the fastest convolution, which `diffmf train` switches on."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, searching
    try:
        with peers.tf32(precision == "tf32"):
            yield
    finally:
        cudnn.benchmark = before


def _images(device: torch.device, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    batch, height, width = shape
    return tuple(torch.rand(batch, 1, height, width, device=device) for _ in range(2))


def autocast(device: torch.device, precision: str):
    # Without the cache of cast weights, which must not outlive a graph's capture.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def _fuse(config: Config, device: torch.device, shape: tuple, precision: str, mode: str) -> Callable:
    model = DIFFMF(config.model).to(device).eval()
    network = torch.compile(model, dynamic=False) if mode == "compile" else model
    ir, vi = _images(device, shape)

    @torch.inference_mode()
    def fuse():
        with autocast(device, precision):
            return network(ir, vi)

    return captured(fuse) if mode.endswith("graph") else fuse


def _train(config: Config, device: torch.device, shape: tuple, precision: str, mode: str) -> Callable:
    model = DIFFMF(config.model).to(device).train()
    network = torch.compile(model, dynamic=False) if mode == "compile" else model
    loss = FusionLoss(config.loss)
    on_gpu, graph = device.type == "cuda", mode.endswith("graph")
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr, fused=on_gpu, capturable=graph)
    ir, vi = _images(device, shape)

    def step():
        optimizer.zero_grad()
        with autocast(device, precision):
            fused = network(ir, vi)
        loss(fused, ir, vi)["total"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm or float("inf"))
        optimizer.step()

    return captured(step) if mode.endswith("graph") else step


def on_reference():
    """A context in which SS2D calls the PyTorch reference instead of the fused operator."""
    return mock.patch.object(modules, "ss2d", reference.ss2d)


def on_vmamba():
    """A context in which SS2D calls VMamba's kernels for its projections and its scan."""
    return mock.patch.object(modules.SS2D, "scan", peers.vmamba_scan)


def module_times(config: Config, device: torch.device, shape: tuple, precision: str, repeats: int) -> dict:
    """{"parts": ms of the network's parts, "kinds": ms of each class of modules without the modules inside it}.

    One eager forward pass, mean of `repeats`, by events on a GPU: where the launches are slower than the kernels, the
    waiting is counted too.
    """
    model = DIFFMF(config.model).to(device).eval()
    ir, vi = _images(device, shape)
    names = dict(model.named_modules())
    marks = defaultdict(list)
    gpu = device.type == "cuda"

    def mark():
        if not gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def once():
        with torch.inference_mode(), autocast(device, precision), _backend_settings(precision, searching=False):
            model(ir, vi)

    once()
    with contextlib.ExitStack() as hooks:
        for name, module in names.items():
            hooks.callback(module.register_forward_pre_hook(lambda m, i, name=name: marks[name].append(mark())).remove)
            hooks.callback(module.register_forward_hook(lambda m, i, o, name=name: marks[name].append(mark())).remove)
        for _ in range(repeats):
            once()
    if gpu:
        torch.cuda.synchronize()
    spans = {
        name: sum(a.elapsed_time(b) if gpu else 1e3 * (b - a) for a, b in zip(m[::2], m[1::2], strict=True)) / repeats
        for name, m in marks.items()
    }
    kinds = defaultdict(float)
    for name, span in spans.items():
        children = [f"{name}.{child}" if name else child for child, _ in names[name].named_children()]
        kinds[type(names[name]).__name__] += span - sum(_time_of(spans, names, child) for child in children)
    parts = {n: t for n, t in spans.items() if n and n.count(".") == n.startswith(("extraction", "spatial"))}
    return {"parts": parts, "kinds": dict(sorted(kinds.items(), key=lambda each: -each[1])), "total": spans[""]}


def _time_of(spans: dict[str, float], names: dict[str, nn.Module], name: str) -> float:
    """A module's time; of one that is never called itself (a list of modules), its children's."""
    if name in spans:
        return spans[name]
    return sum(_time_of(spans, names, f"{name}.{child}") for child, _ in names[name].named_children())


def line(row: dict) -> str:
    start = f"{row['task']:6}{row['size']:>12} {row['precision']:10}{row['mode']:14}"
    if "error" in row:
        return f"{start}  {row['error']}"
    peak = f"{row['peak_mib']:10.0f}" if "peak_mib" in row else f"{'–':>10}"
    return f"{start}{row['ms']['median']:10.2f}{row['images_per_second']:10.1f}{peak}"


def chart(row: dict) -> str:
    """The parts and kinds of `module_times` as bars of text."""
    text = [f"where the time goes, {row['size']} {row['precision']}, eager: {row['total']:.2f} ms with hooks"]
    for title in ("parts", "kinds"):
        text.append(f"  {title}")
        for name, span in row[title].items():
            bar = "█" * round(40 * max(span, 0) / max(row["total"], 1e-9))
            text.append(f"  {name:28}{span:9.2f} ms {bar}")
    return "\n".join(text) + "\n"
