"""`diffmf ablate`: the paper's Tables II to VI at a reduced budget, and whether their signs hold.

Every variant is trained from the same seed, on the same pairs, for the same number of steps, by `diffmf train` in a
process of its own, into OUTPUT/VARIANT; its last weights are scored on one split. A variant whose record.json has its
scores is not trained again, and one that was interrupted continues, both with the settings that it began with only.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from . import published
from .checkpoint import add_device_argument, load_model, select_device
from .config import load_config, to_dict
from .data import PairDataset
from .errors import UserError
from .evaluate import digits, evaluate, mean_scores, model_fuser
from .images import atomic_write, make_folder
from .metrics import PROTOCOLS


class Variant(NamedTuple):
    """A row of one of the paper's tables and the settings that make it."""

    table: str
    row: str
    overrides: list[str]


FULL = "full"
VARIANTS = {
    FULL: Variant("", "DIFF-MF", []),
    "no-extraction": Variant("II", "w/o feature extract", ["model.extraction=false"]),
    "no-channel-exchange": Variant("II", "w/o channel-exchange", ["model.channel_exchange=off"]),
    "no-spatial-exchange": Variant("II", "w/o spatial-exchange", ["model.spatial_exchange=false"]),
    "no-guidance": Variant("II", "w/o difference guidance", ["model.guidance=none"]),
    "guidance-v1": Variant("III", "diff guide v1", ["model.guidance=visible_first"]),
    "guidance-v2": Variant("III", "diff guide v2", ["model.guidance=parallel"]),
    "no-ssd-exchange": Variant("IV", "w/o SSD exchange", ["model.exchange=none"]),
    "no-reweighting": Variant("IV", "w/o channel reweighting", ["model.reweighting=false"]),
    "exchange-v1": Variant("V", "version 1", ["model.exchange=from_visible"]),
    "exchange-v2": Variant("V", "version 2", ["model.exchange=from_infrared"]),
    "no-residual": Variant("VI", "w/o residual connection", ["model.residual=false"]),
}
METRICS = ("EN", "SD", "SF", "MI", "VIF", "AG")  # of the paper's tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="ROOT", help="data set with ir/, vi/ and optionally splits/")
    parser.add_argument("--output", default="runs/ablations", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--config", default="roadscene", metavar="FILE", help="as for train (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of every variant, rounded up to whole epochs (1000)")
    parser.add_argument("--minutes", type=float, default=0, help="stop training a variant after this time (0: never)")
    parser.add_argument("--jobs", type=int, default=1, help="variants trained at once (default: %(default)s)")
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="this one, beside the full network; may be repeated"
    )
    parser.add_argument("--split", default="val", help="split that is scored (default: %(default)s)")
    add_device_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every variant, as for train")


def run(args: argparse.Namespace) -> int:
    for name, least in (("steps", 1), ("jobs", 1), ("minutes", 0)):
        if not getattr(args, name) >= least:
            raise UserError(f"--{name}: expected at least {least}, found {getattr(args, name)}")
    device = select_device(args.device)
    pairs = len(PairDataset(args.data, split="train"))
    test = PairDataset(args.data, split=args.split)
    batches = pairs // load_config(args.config, args.overrides).data.batch_size
    if batches == 0:
        raise UserError(f"{args.data}: {pairs} training pairs are fewer than one batch (data.batch_size)")
    epochs = math.ceil(args.steps / batches)
    budget = [f"train.epochs={epochs}", f"train.validate_epochs={epochs}", f"train.max_minutes={args.minutes}"]
    output = make_folder(args.output)
    names = [name for name in VARIANTS if args.variant is None or name in (FULL, *args.variant)]
    records, waiting = {}, {}
    for name in names:
        overrides = [*args.overrides, *budget, *VARIANTS[name].overrides]
        settings = {"data": str(args.data), "split": args.split}
        settings |= {"config": to_dict(load_config(args.config, overrides))}
        record = _read_record(output / name, settings)
        if "means" in record:
            records[name] = record
        else:
            waiting[name] = (overrides, settings)
    print(f"{len(waiting)} variants to train, {epochs * batches} steps each; {len(records)} done before", flush=True)
    scoring = threading.Lock()

    def train_and_score(name: str) -> None:
        overrides, settings = waiting[name]
        folder = output / name
        command = [sys.executable, "-m", "diffmf_model", "train", "--data", str(args.data), "--output", str(folder)]
        command += ["--resume"] if (folder / "state.safetensors").exists() else []
        command += ["--config", args.config, "--device", str(device), *overrides]
        record = {"variant": name, "settings": settings}
        _write(make_folder(folder) / "record.json", json.dumps(record, indent=1) + "\n")
        failure = _train(command, folder, args.jobs)
        if failure is not None:
            print(f"diffmf: {name}: training failed: {failure} ({folder / 'train.log'})", file=sys.stderr, flush=True)
            return
        with scoring:
            fuser = model_fuser(load_model(folder / "last.safetensors", device), device)
            scores = evaluate(test, {name: fuser}, PROTOCOLS[0], False, device)[name]
        steps = len((folder / "log.jsonl").read_text().splitlines())
        record |= {"steps": steps, "means": mean_scores(scores, test.names)}
        _write(folder / "record.json", json.dumps(record, indent=1) + "\n")
        records[name] = record
        print(f"{name}: {steps} steps", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train_and_score, waiting))
    if FULL in records:
        done = {name: records[name] for name in names if name in records}
        text = markdown(done, f"{epochs * batches} steps" + (f" or {args.minutes:g} minutes" if args.minutes else ""))
        _write(output / "ablations.md", text)
        _write(output / "ablations.json", json.dumps(list(done.values()), indent=1) + "\n")
        print(text, end="")
    failed = len(names) - len(records)
    if failed:
        print(f"diffmf: {failed} of {len(names)} variants failed; the same command continues them", file=sys.stderr)
    return 1 if failed else 0


def _train(command: list[str], folder: Path, jobs: int) -> str | None:
    """Runs one training into its log. Returns None, or the last line of what it said when it failed."""
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with open(folder / "train.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=threads | os.environ).returncode
    lines = (folder / "train.log").read_text(encoding="utf-8").strip().splitlines()
    return None if status == 0 else (lines[-1] if lines else f"exit status {status}")


def _read_record(folder: Path, settings: dict) -> dict:
    """A variant's record: with its means once it is finished, empty before it began. UserError for other settings."""
    path = folder / "record.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a record of `diffmf ablate` ({error!r})") from error
    began = "means" in record or (folder / "state.safetensors").exists()
    if began and found != settings:
        raise UserError(f"{path}: made with other data or settings; use another --output")
    return record


def markdown(records: dict[str, dict], budget: str) -> str:
    """Each variant's means and changes from the full network, ours over the paper's, and how many signs agree."""
    paper, ours = published.ablations(), {name: record["means"] for name, record in records.items()}
    settings = records[FULL]["settings"]
    lines = [
        f"**Ablations (Tables II to VI): {budget}, seed {settings['config']['train']['seed']}, trained on "
        f"{settings['data']}, scored on its {settings['split']} split**; protocol {PROTOCOLS[0]}; in brackets the "
        f"change from the full network. *Italics*: the paper's rows, {paper['data']}. One seed each: small "
        "changes are noise.",
        "",
        f"| table | variant | {' | '.join(METRICS)} | signs that agree |",
        "| --- | --- |" + " ---: |" * len(METRICS) + " --- |",
        *(
            f"| | {label} | {' | '.join(f'{means[m]:.{digits(m)}f}' for m in METRICS)} | |"
            for label, means in (("DIFF-MF", ours[FULL]), ("*DIFF-MF, paper*", paper["full"]))
        ),
    ]
    agreeing = dict.fromkeys(METRICS, 0)
    variants = [name for name in records if name != FULL]
    for name in variants:
        table, row, _ = VARIANTS[name]
        theirs = paper["tables"][table][row]
        agree = [m for m in METRICS if _sign(ours[name][m] - ours[FULL][m]) == _sign(theirs[m] - paper["full"][m])]
        for metric in agree:
            agreeing[metric] += 1
        for label, means, full in ((row, ours[name], ours[FULL]), (f"*{row}, paper*", theirs, paper["full"])):
            cells = [f"{means[m]:.{digits(m)}f} ({means[m] - full[m]:+.{digits(m)}f})" for m in METRICS]
            signs = f"{len(agree)} of {len(METRICS)}: {', '.join(agree) or 'none'}" if label == row else ""
            lines.append(f"| {table} | {label} | {' | '.join(cells)} | {signs} |")
    total = len(variants) * len(METRICS)
    each = ", ".join(f"{metric} {count} of {len(variants)}" for metric, count in agreeing.items())
    lines += [
        "",
        f"The sign of the change agrees with the paper's in {sum(agreeing.values())} of {total} cases ({each}).",
    ]
    short = {name: record["steps"] for name, record in records.items() if record["steps"] != records[FULL]["steps"]}
    if short:
        lines += [
            f"Unequal steps (time limit): {FULL} {records[FULL]['steps']}, "
            + ", ".join(f"{n} {s}" for n, s in short.items())
        ]
    return "\n".join(lines) + "\n"


def _sign(change: float) -> int:
    return (change > 0) - (change < 0)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
