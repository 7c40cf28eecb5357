"""`diffmf experiments`: one table of training runs, from the records in their folders (docs/experiments.md)."""

import argparse
import json
from pathlib import Path

from .checkpoint import read_training_state
from .config import Config, to_dict, updated
from .errors import UserError
from .evaluate import digits
from .images import atomic_write
from .metrics import METRICS

# What a run's result does not depend on.
LEFT_OUT = ("logging", "train.save_steps", "train.validate_epochs", "train.best_by", "data.workers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of `diffmf train`")
    parser.add_argument("--output", metavar="FILE", help="write the table to this Markdown file instead of printing it")


def run(args: argparse.Namespace) -> int:
    text = markdown([read_run(Path(folder)) for folder in args.runs])
    if args.output is None:
        print(text, end="")
    else:
        with atomic_write(args.output) as file:
            file.write(text.encode())
        print(f"{len(args.runs)} runs written to {args.output}")
    return 0


def read_run(folder: Path) -> dict:
    """A run folder's name, configuration, record of the training (empty before run.json was kept) and best validation.

    Raises UserError where there is no run.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        kept = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        best = [line for line in map(json.loads, kept) if line["best"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not the folder of a training run ({error})") from error
    saved = record.get("config") or read_training_state(folder / "state.safetensors")[1]["config"]
    config = updated(Config(), saved, where=f"{folder}: ")
    return {
        "name": folder.resolve().name,
        "config": config,
        "steps": len(lines),
        "best": best[-1] if best else None,
    } | {key: record.get(key) for key in ("images_per_second", "environment", "planned_steps")}


def differences(config: Config) -> list[str]:
    """`section.key=value` of every setting that differs from the default and that the result may depend on."""
    default, given = to_dict(Config()), to_dict(config)
    return [
        f"{section}.{key}={value:g}" if isinstance(value, float) else f"{section}.{key}={str(value).lower()}"
        for section, values in given.items()
        for key, value in values.items()
        if value != default[section][key] and not {section, f"{section}.{key}"} & set(LEFT_OUT)
    ]


def markdown(runs: list[dict]) -> str:
    lines = [
        "# Training runs",
        "",
        "Written by `diffmf experiments RUN ... --output docs/experiments.md` from the runs' records. Settings that "
        "differ from the defaults (the paper's), steps done, speed, and the validation of the best checkpoint.",
        "",
        f"| run | settings | steps | images/s | GPU | commit | best at | {' | '.join(METRICS)} |",
        "| --- | --- | ---: | ---: | --- | --- | ---: |" + " ---: |" * len(METRICS),
    ]
    for each in runs:
        best, machine = each["best"], each["environment"] or {}
        planned = each["planned_steps"]
        steps = f"{each['steps']}" if planned in (None, each["steps"]) else f"{each['steps']} of {planned}"
        speed = "–" if each["images_per_second"] is None else f"{each['images_per_second']:.1f}"
        scores = ["–"] * len(METRICS) if best is None else [f"{best[m]:.{digits(m)}f}" for m in METRICS]
        cells = [each["name"], " ".join(f"`{d}`" for d in differences(each["config"])) or "defaults", steps, speed]
        cells += [machine.get("gpu") or machine.get("cpu") or "–", machine.get("commit") or "–"]
        cells += ["–" if best is None else str(best["step"]), *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
