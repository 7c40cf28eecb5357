"""`diffmf evaluate`: the model, other methods and the no-learning baselines scored on the same pairs, in one table."""

import argparse
import csv
import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .checkpoint import add_device_argument, add_weights_argument, load_model, select_device
from .data import PairDataset, check_same_size, listed, read_names
from .errors import UserError
from .fuse import fuse_luma, recolour
from .images import atomic_write, is_colour, list_images, luma, make_folder, read_image, to_uint8
from .metrics import METRICS, PROTOCOLS, evaluate_pair

# The columns that published tables share; the mean rank is taken over these.
RANKED = ("EN", "SD", "SF", "MI", "VIF", "AG", "SCD", "Qabf")
MODEL = "DIFF-MF"

Scores = dict[str, dict[str, float]]  # by name of the pair, then by metric


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="ROOT", help="data set with the source images in ir/ and vi/")
    parser.add_argument("--names", metavar="FILE", help="text file of the pairs to score, one a line (default: all)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders of fused images, named as the pairs, or metrics.json files of earlier evaluations",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="default: %(default)s")
    parser.add_argument("--stretch", action="store_true", help="min-max stretch fused images first (inflates SD)")
    add_weights_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--output", metavar="DIR", help="write metrics.md, metrics.csv and metrics.json here")


def run(args: argparse.Namespace) -> int:
    device = select_device(args.device)
    dataset = PairDataset(args.data, names=None if args.names is None else read_names(args.names))
    names = dataset.names
    settings = {"protocol": args.protocol, "stretch": args.stretch}
    fusers: dict[str, Callable | None] = {MODEL: None}  # the model is loaded once all the rest is known to be there
    scored: dict[str, Scores] = {}
    order = [MODEL]
    for path in map(Path, args.methods):
        if path.is_dir():
            new = {path.name: partial(_read_fused, _fused_files(path, names))}
            fusers |= new
        else:
            new = read_scores(path, names, settings)
            new = {f"{method} ({path.parent})" if method in order else method: new[method] for method in new}
            scored |= new
        order += new
    order += BASELINES
    repeated = [method for method in order if order.count(method) > 1]
    if repeated:
        raise UserError(f"--methods: {repeated[0]} appears twice")
    if args.output is not None:
        make_folder(args.output)
    fusers[MODEL] = partial(_fuse, load_model(args.weights, device), device)
    scored |= evaluate(dataset, fusers | BASELINES, args.protocol, args.stretch, device)
    scores = {method: scored[method] for method in order}
    means = {
        method: {metric: _mean([row[metric] for row in table.values()]) for metric in METRICS}
        for method, table in scores.items()
    }
    treatment = "fused images min-max stretched" if args.stretch else "images scored as written"
    title = f"{args.data}: {len(names)} pairs, protocol {args.protocol}, {treatment}"
    markdown = markdown_table(title, means)
    print(markdown, end="")
    if args.output is not None:
        folder = Path(args.output)
        methods = [{"method": method, "per_image": table} for method, table in scores.items()]
        record = {"data": str(args.data), **settings, "pairs": len(names), "methods": methods}
        _write_text(folder / "metrics.md", markdown)
        _write_text(folder / "metrics.csv", _csv_table(means))
        _write_text(folder / "metrics.json", json.dumps(_without_nan(record), indent=1) + "\n")
    return 0


@torch.inference_mode()
def evaluate(
    dataset: PairDataset, fusers: dict[str, Callable], protocol: str, stretch: bool, device: torch.device
) -> dict[str, Scores]:
    """Scores of every fuser on every pair.

    A fuser maps (name, ir (1, H, W) float, vi (C, H, W) float) in [0, 1] to the fused image (1 or 3, H, W) in [0, 1].
    Under `vifb` a grey fused image takes the colours of a coloured visible one, as the toolbox's methods do.
    Raises UserError for unreadable images and wrong sizes.
    """
    scores: dict[str, Scores] = {method: {} for method in fusers}
    with tqdm(total=len(dataset) * len(fusers), desc="scoring", unit="image") as progress:
        for pair in dataset.pairs:
            ir, vi = luma(read_image(pair.ir)), _opaque(read_image(pair.vi))
            check_same_size(pair.ir, pair.vi, ir.shape[1:], vi.shape[1:])
            for method, fuse in fusers.items():
                fused = fuse(pair.name, ir, vi).cpu()
                check_same_size(f"{method}'s {pair.name}", pair.vi, fused.shape[1:], vi.shape[1:])
                if protocol == "vifb" and fused.shape[0] == 1 and is_colour(vi):
                    fused = recolour(fused, vi)
                images = (to_uint8(image).to(device) for image in (fused, ir, vi))
                try:
                    scores[method][pair.name] = evaluate_pair(*images, protocol, stretch)
                except ValueError as error:
                    raise UserError(f"{pair.name}: {error}") from error
                progress.update()
    return scores


def strongest_detail(ir: torch.Tensor, vi: torch.Tensor, sigma: float = 2.0) -> torch.Tensor:
    """The larger of the two blurred images plus, at each pixel, the stronger of the two details left by the blur."""
    radius = round(4 * sigma)
    window = torch.exp(-torch.arange(-radius, radius + 1, dtype=ir.dtype).square() / (2 * sigma * sigma))
    window = window / window.sum()
    images = torch.stack((ir, vi))
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    base = F.conv2d(F.conv2d(padded, window[None, None, :, None]), window[None, None, None, :])
    detail = images - base
    return base.amax(dim=0) + torch.where(detail[0].abs() > detail[1].abs(), detail[0], detail[1])


def _baseline(rule: Callable, name: str, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    # On whole grey levels in float64, so that an average of x.5 rounds the same way everywhere.
    levels = (to_uint8(luma(image)).double() for image in (ir, vi))
    return rule(*levels).round().clamp(0, 255) / 255


BASELINES = {
    "mean (no learning)": partial(_baseline, lambda ir, vi: (ir + vi) / 2),
    "maximum (no learning)": partial(_baseline, torch.maximum),
    "maximum + strongest detail (no learning)": partial(_baseline, strongest_detail),
}


def read_scores(path: Path, names: list[str], settings: dict) -> dict[str, Scores]:
    """The scores in a metrics.json file, by method, of the named pairs.

    Raises UserError for another layout, protocol or stretch, and for missing pairs or metrics.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {"protocol": record["protocol"], "stretch": record.get("stretch", False)}
        methods = {each["method"]: each["per_image"] for each in record.get("methods", [record])}
        missing = sorted({name for table in methods.values() for name in names if name not in table})
        if not missing:
            scores = {
                method: {name: {m: _number(table[name][m]) for m in METRICS} for name in names}
                for method, table in methods.items()
                if method not in BASELINES
            }
    except OSError as error:
        raise UserError(f"{path}: expected a folder or a metrics.json file ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a metrics file of `diffmf evaluate` ({error!r})") from error
    if found != settings:
        raise UserError(f"{path}: scored with {found}, this table with {settings}")
    if missing:
        raise UserError(f"{path}: no scores for {listed(missing)}")
    return scores


def mean_ranks(means: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each method's rank from 1, averaged over the RANKED metrics; equal values share their ranks, nan comes last."""
    ranks = {method: [] for method in means}
    for metric in RANKED:
        values = {method: -math.inf if math.isnan(row[metric]) else row[metric] for method, row in means.items()}
        for method, value in values.items():
            above = sum(other > value for other in values.values())
            equal = sum(other == value for other in values.values())
            ranks[method].append(1 + above + (equal - 1) / 2)
    return {method: _mean(each) for method, each in ranks.items()}


def markdown_table(title: str, means: dict[str, dict[str, float]]) -> str:
    """One row a method, the best of each column bold."""
    ranks = mean_ranks(means)
    best = {metric: max(row[metric] for row in means.values()) for metric in METRICS}
    lines = [f"**{title}**; means, higher is better; mean rank over {', '.join(RANKED)}", ""]
    lines += [f"| method | {' | '.join(METRICS)} | mean rank |", "| --- |" + " ---: |" * (len(METRICS) + 1)]
    for method, row in means.items():
        cells = [f"**{row[m]:.{_digits(m)}f}**" if row[m] == best[m] else f"{row[m]:.{_digits(m)}f}" for m in METRICS]
        rank = f"**{ranks[method]:.2f}**" if ranks[method] == min(ranks.values()) else f"{ranks[method]:.2f}"
        lines.append(f"| {method} | {' | '.join(cells)} | {rank} |")
    return "\n".join(lines) + "\n"


def _csv_table(means: dict[str, dict[str, float]]) -> str:
    ranks = mean_ranks(means)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *METRICS, "mean rank"])
    writer.writerows([method, *(row[m] for m in METRICS), ranks[method]] for method, row in means.items())
    return text.getvalue()


def _digits(metric: str) -> int:
    return 3 if metric in ("VIF", "Qabf", "SSIM") else 2


def _fuse(model: torch.nn.Module, device: torch.device, name: str, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    try:
        return fuse_luma(model, ir, luma(vi), device)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _fused_files(folder: Path, names: list[str]) -> dict[str, Path]:
    files = list_images(folder)
    missing = [name for name in names if name not in files]
    if missing:
        raise UserError(f"{folder}: no fused image for {listed(missing)}")
    return files


def _read_fused(files: dict[str, Path], name: str, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    return _opaque(read_image(files[name]))


def _opaque(image: torch.Tensor) -> torch.Tensor:
    """Without the alpha channel, where there is one."""
    return image[:-1] if image.shape[0] in (2, 4) else image


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _without_nan(value):
    """JSON has no nan: it becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
