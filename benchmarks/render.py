"""Writes the tables of README.md from benchmarks/results: `python benchmarks/render.py`."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def where(environment: dict) -> str:
    machine = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    return f"{machine}, torch {environment['torch']}, commit {environment['commit']}"


def spread(time: dict) -> str:
    return f"{time['median']:.2f} ({time['min']:.2f}–{time['max']:.2f})"


def cuda_table() -> str:
    results = load("ss2d_cuda")
    lines = [
        "| B×D×H×W, states, rank, dtype | kernel | GEMM + kernel | forward + backward | extra MiB fwd / fwd+bwd |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        extra = " / ".join(f"{mib:.0f}" for mib in row["extra MiB"].values())
        times = " | ".join(spread(row[key]) for key in ("kernel", "forward", "forward and backward"))
        lines.append(f"| {row['case']} | {times} | {extra} |")
    return "\n".join([*lines, "", f"ms, median (range); {where(results['environment'])}."])


def cpu_table() -> str:
    results = load("ss2d_cpu")
    lines = ["| B×D×H×W, states, rank, dtype | forward | PyTorch reference | ratio |", "| --- | --- | --- | --- |"]
    for row in results["rows"]:
        time, reference = row["forward"], row["reference"]["forward"]
        ratio = reference["median"] / time["median"]
        lines.append(f"| {row['case']} | {spread(time)} | {spread(reference)} | {ratio:.0f}× |")
    return "\n".join([*lines, "", f"ms, median (range); {where(results['environment'])}."])


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    for name, table in (("cuda", cuda_table()), ("cpu", cpu_table())):
        begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        head, rest = text.split(begin)
        text = head + begin + table + "\n" + end + rest.split(end)[1]
    path.write_text(text)


if __name__ == "__main__":
    main()
