"""`diffmf evaluate`: the model, other methods and the no-learning baselines scored on the same pairs, in one table."""

import argparse
import csv
import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import published
from .checkpoint import add_device_argument, add_weights_argument, load_model, select_device
from .data import PairDataset, check_same_size, listed, read_names
from .errors import UserError
from .fuse import fuse_luma, recolour
from .images import atomic_write, is_colour, list_images, luma, make_folder, read_image, to_uint8
from .metrics import METRICS, PROTOCOLS, evaluate_pair
from .published import PublishedTable

# The columns that published tables share; the mean rank is taken over these.
RANKED = ("EN", "SD", "SF", "MI", "VIF", "AG", "SCD", "Qabf")
MODEL = "DIFF-MF"

Scores = dict[str, dict[str, float]]  # by name of the pair, then by metric


class Table(NamedTuple):
    """One table: its title and the pairs whose means it shows."""

    title: str
    names: list[str]


class Group(NamedTuple):
    """Pairs that are scored once, for one table or several."""

    dataset: PairDataset
    tables: list[Table]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        metavar="ROOT",
        help="data set with the source images in ir/ and vi/, or a folder with tno/ and roadscene/: then the tables of "
        "TNO-25, TNO-42 and RoadScene-50",
    )
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
    parser.add_argument(
        "--published",
        choices=published.set_names(),
        help="the test set that ROOT is, for published rows beside ours (TNO-25 and TNO-42 are recognized)",
    )
    add_weights_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--output", metavar="DIR", help="write metrics.md, metrics.csv and metrics.json here")


def run(args: argparse.Namespace) -> int:
    device = select_device(args.device)
    groups = _groups(args)
    settings = {"protocol": args.protocol, "stretch": args.stretch}
    methods = _methods(args.methods, groups, settings)
    if args.output is not None:
        make_folder(args.output)
    model = model_fuser(load_model(args.weights, device), device)  # once all the rest is known to be there
    treatment = "fused images min-max stretched" if args.stretch else "images scored as written"
    texts, rows, records, per_image = [], [], {}, {}
    for group, (fusers, scored) in zip(groups, methods, strict=True):
        scores = scored | evaluate(group.dataset, {MODEL: model} | fusers | BASELINES, **settings, device=device)
        order = [MODEL, *(method for method in scores if method != MODEL and method not in BASELINES), *BASELINES]
        for method in order:
            per_image.setdefault(method, {}).update(scores[method])
        for table in group.tables:
            means = {method: mean_scores(scores[method], table.names) for method in order}
            others = published.tables(args.published or published.set_of(table.names), **settings)
            shown = [_without(table, means) for table in others]
            title = f"{table.title}: {len(table.names)} pairs, protocol {args.protocol}, {treatment}"
            texts.append(markdown_table(title, means, shown))
            rows += [[table.title, *row] for row in _csv_rows(means, shown)]
            ranked = means | _same_pairs(shown)
            records[table.title] = {"pairs": table.names, "means": means, "mean ranks": mean_ranks(ranked)}
            records[table.title] |= {"ranks": column_ranks(ranked), "published": [each._asdict() for each in shown]}
    markdown = "\n".join(texts)
    print(markdown, end="")
    if args.output is not None:
        folder = Path(args.output)
        pairs = sum(len(group.dataset) for group in groups)
        record = {"data": str(args.data), **settings, "pairs": pairs, "tables": records}
        record["methods"] = [{"method": method, "per_image": table} for method, table in per_image.items()]
        _write_text(folder / "metrics.md", markdown)
        _write_text(folder / "metrics.csv", _csv_text(rows))
        _write_text(folder / "metrics.json", json.dumps(_without_nan(record), indent=1) + "\n")
    return 0


def _groups(args: argparse.Namespace) -> list[Group]:
    root = Path(args.data)
    if not all((root / folder).is_dir() for folder in ("tno", "roadscene")):
        dataset = PairDataset(root, names=None if args.names is None else read_names(args.names))
        if args.published is not None and published.count_of(args.published) not in (None, len(dataset)):
            raise UserError(f"--published: {args.published} has another number of pairs than {root}, {len(dataset)}")
        return [Group(dataset, [Table(str(args.data), dataset.names)])]
    for option in ("names", "published"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option}: expected a single data set, {root} holds tno and roadscene")
    tno, roadscene = PairDataset(root / "tno"), PairDataset(root / "roadscene", split="test")
    some = read_names(root / "tno" / "tno25.txt")
    missing = [name for name in some if name not in tno.names]
    if missing:
        raise UserError(f"{root / 'tno'}: no pair named {listed(missing)}")
    tables = [Table(f"TNO-{len(names)}", names) for names in (some, tno.names)]
    return [Group(tno, tables), Group(roadscene, [Table(f"RoadScene-{len(roadscene)}", roadscene.names)])]


def _methods(paths: list[str], groups: list[Group], settings: dict) -> list[tuple[dict[str, Callable], dict]]:
    """(fusers, scores) of the --methods, for each group.

    With several groups a method is left out of those of whose pairs it has none. Raises UserError for a method that has
    only some of a group's pairs or that is in no group, and for a name given twice.
    """
    found = [({}, {}) for _ in groups]
    taken = [MODEL, *BASELINES]
    for path in map(Path, paths):
        folder = path.is_dir()
        tables = list_images(path) if folder else read_scores(path, settings)
        for name, has in {path.name: tables}.items() if folder else tables.items():
            ours = name in (MODEL, *BASELINES)  # a folder's name twice is a mistake, but one may be called as ours are
            method = f"{name} ({path.parent})" if name in taken and (ours or not folder) else name
            if method in taken:
                raise UserError(f"--methods: {method} appears twice")
            taken.append(method)
            for group, (fusers, scored) in zip(groups, found, strict=True):
                names = group.dataset.names
                missing = [each for each in names if each not in has]
                if len(groups) > 1 and len(missing) == len(names):
                    continue
                if missing:
                    raise UserError(f"{path}: no {'fused image' if folder else 'scores'} for {listed(missing)}")
                if folder:
                    fusers[method] = partial(_read_fused, has)
                else:
                    scored[method] = {each: has[each] for each in names}
            if not any(method in fusers or method in scored for fusers, scored in found):
                raise UserError(f"{path}: {method} has none of the pairs")
    return found


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
            ir, vi = ir.to(device), vi.to(device)
            for method, fuse in fusers.items():
                fused = fuse(pair.name, ir, vi).to(device)
                check_same_size(f"{method}'s {pair.name}", pair.vi, fused.shape[1:], vi.shape[1:])
                if protocol == "vifb" and fused.shape[0] == 1 and is_colour(vi):
                    fused = recolour(fused, vi)
                images = (to_uint8(image) for image in (fused, ir, vi))
                try:
                    scores[method][pair.name] = evaluate_pair(*images, protocol, stretch)
                except ValueError as error:
                    raise UserError(f"{pair.name}: {error}") from error
                progress.update()
    return scores


def strongest_detail(ir: torch.Tensor, vi: torch.Tensor, sigma: float = 2.0) -> torch.Tensor:
    """The larger of the two blurred images plus, at each pixel, the stronger of the two details left by the blur."""
    radius = round(4 * sigma)
    window = torch.exp(
        -torch.arange(-radius, radius + 1, dtype=ir.dtype, device=ir.device).square() / (2 * sigma * sigma)
    )
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


def read_scores(path: Path, settings: dict) -> dict[str, Scores]:
    """The scores in a metrics.json file, by method. Raises UserError for another layout, protocol or stretch."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {"protocol": record["protocol"], "stretch": record.get("stretch", False)}
        methods = {each["method"]: each["per_image"] for each in record.get("methods", [record])}
        if found == settings:
            return {
                method: {name: {m: _number(row[m]) for m in METRICS} for name, row in table.items()}
                for method, table in methods.items()
                if method not in BASELINES
            }
    except OSError as error:
        raise UserError(f"{path}: expected a folder or a metrics.json file ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a metrics file of `diffmf evaluate` ({error!r})") from error
    raise UserError(f"{path}: scored with {found}, this table with {settings}")


def column_ranks(means: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each method's rank from 1 in each metric that it has; equal values share theirs, nan comes last."""
    ranks = {method: {} for method in means}
    for metric in METRICS:
        values = {m: -math.inf if math.isnan(row[metric]) else row[metric] for m, row in means.items() if metric in row}
        for method, value in values.items():
            above = sum(other > value for other in values.values())
            equal = sum(other == value for other in values.values())
            ranks[method][metric] = 1 + above + (equal - 1) / 2
    return ranks


def mean_ranks(means: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each method's `column_ranks`, averaged over those of the RANKED metrics that it has."""
    ranks = column_ranks(means)
    return {method: _mean([row[metric] for metric in RANKED if metric in row]) for method, row in ranks.items()}


def markdown_table(title: str, means: dict[str, dict[str, float]], others: list[PublishedTable] = ()) -> str:
    """One row a method: means with their ranks, the best of each column bold; published rows in italics.

    Published rows of the same pairs are ranked with the rest; those of other data stand below, without ranks.
    """
    ranked = means | _same_pairs(others)
    ranks, averages = column_ranks(ranked), mean_ranks(ranked)
    lines = [f"**{title}**; means (and ranks), higher is better; mean rank over {', '.join(RANKED)}", ""]
    lines += [f"| method | {' | '.join(METRICS)} | mean rank |", "| --- |" + " ---: |" * (len(METRICS) + 1)]

    def bold(text: str, best: bool) -> str:
        return f"**{text}**" if best else text

    columns = {m: [row[m] for row in ranked.values() if m in row and not math.isnan(row[m])] for m in METRICS}
    top = {m: max(values, default=math.inf) for m, values in columns.items()}
    for method, row in ranked.items():
        cells = [
            f"{bold(f'{row[m]:.{digits(m)}f}', row[m] == top[m])} ({ranks[method][m]:g})" if m in row else "–"
            for m in METRICS
        ]
        rank = bold(f"{averages[method]:.2f}", averages[method] == min(averages.values()))
        name = method.replace("|", "\\|")
        lines.append(f"| {name if method in means else f'*{name}*'} | {' | '.join(cells)} | {rank} |")
    for table in others:
        for method, row in table.rows.items() if not table.same_pairs else ():
            cells = [f"{row[m]:.{digits(m)}f}" if m in row else "–" for m in METRICS]
            lines.append(f"| *{method}, {table.source}* | {' | '.join(cells)} | – |")
    lines += ["", standing(ranked)]
    if others:
        # Methods that were scored here have left their table, all of them perhaps.
        notes = [f"{listed(list(table.rows))}: {table.source}, {table.data}" for table in others if table.rows]
        ranking = "ranked where the pairs are the same, over the columns they have"
        lines += ["", f"*Italics*: published rows, {ranking}. " + "; ".join(notes) + "."]
    return "\n".join(lines) + "\n"


def standing(means: dict[str, dict[str, float]]) -> str:
    """Where the model stands: its first places among the methods alone, and its mean rank with the baselines too."""
    averages = mean_ranks(means)
    place = 1 + sum(other < averages[MODEL] for other in averages.values())
    ranked = f"number {place} of {len(means)} by mean rank, the no-learning rules included."
    methods = {method: row for method, row in means.items() if method not in BASELINES}
    if len(methods) == 1:
        return f"{MODEL} is {ranked} No other method was scored."
    alone = column_ranks(methods)[MODEL]
    first = [metric for metric in RANKED if alone[metric] == 1]
    return (
        f"{MODEL} is first among the {len(methods)} methods in {len(first)} of {len(RANKED)} "
        f"columns ({', '.join(first) or 'none'}), and {ranked}"
    )


def _same_pairs(others: list[PublishedTable]) -> dict[str, dict[str, float]]:
    return {method: row for table in others if table.same_pairs for method, row in table.rows.items()}


def _without(table: PublishedTable, means: dict[str, dict[str, float]]) -> PublishedTable:
    """Rows of the same pairs give way to the same method scored here."""
    here = {method.lower() for method in means} if table.same_pairs else set()
    return table._replace(rows={method: row for method, row in table.rows.items() if method.lower() not in here})


def _csv_rows(means: dict[str, dict[str, float]], others: list[PublishedTable]) -> list[list]:
    ranked = means | _same_pairs(others)
    ranks, averages = column_ranks(ranked), mean_ranks(ranked)
    sources = {method: f"{table.source}; {table.data}" for table in others for method in table.rows if table.same_pairs}
    rows = [
        [method, sources.get(method, "here"), *(row.get(m) for m in METRICS), averages[method]]
        + [ranks[method].get(m) for m in METRICS]
        for method, row in ranked.items()
    ]
    for table in others:
        for method, row in table.rows.items() if not table.same_pairs else ():
            rows.append([method, f"{table.source}; {table.data}", *(row.get(m) for m in METRICS)])
    return rows


def _csv_text(rows: list[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "method", "source", *METRICS, "mean rank", *(f"{m} rank" for m in METRICS)])
    writer.writerows(rows)
    return text.getvalue()


def digits(metric: str) -> int:
    """Decimals that a table shows."""
    return 3 if metric in ("VIF", "Qabf", "SSIM") else 2


def model_fuser(model: torch.nn.Module, device: torch.device) -> Callable:
    """The network as `evaluate` takes it."""
    return partial(_fuse, model, device)


def mean_scores(scores: Scores, names: list[str]) -> dict[str, float]:
    """The means over the named pairs, by metric."""
    return {metric: _mean([scores[name][metric] for name in names]) for metric in METRICS}


def _fuse(model: torch.nn.Module, device: torch.device, name: str, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
    try:
        return fuse_luma(model, ir, luma(vi), device)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


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
