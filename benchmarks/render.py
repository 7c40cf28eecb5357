"""`python benchmarks/render.py` writes README.md's tables, docs/benchmarks.md and its plots from benchmarks/results.

Needs matplotlib (the extra `features`) where there are results to plot.
"""

import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "diffmf": "diffmf",
    "vmamba": "VMamba",
    "mamba_ssm": "mamba_ssm",
    "mamba2": "Mamba-2 SSD",
    "separate": "two launches",
    "eager": "PyTorch reference",
    "compile": "compiled reference",
}
TIMES = ("forward", "forward and backward")


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def where(environment: dict) -> str:
    machine = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    clocks = environment.get("clocks")
    if clocks:
        machine += f" at {clocks['sm']} of {clocks['sm max']} MHz"
    return f"{machine}, torch {environment['torch']}, commit {environment['commit']}"


def spread(time: dict) -> str:
    found = f" ({time['min']:.2f}–{time['max']:.2f})" if "min" in time else ""
    return f"{time['median']:.2f}{found}"


def origin(results: dict) -> str:
    """Where the results were measured, and what is to be known about them."""
    note = f" {results['note']}." if "note" in results else ""
    return f"{where(results['environment'])}.{note}"


def memory(entry: dict) -> str:
    return " / ".join(f"{mib:.0f}" for mib in entry.get("extra MiB", {}).values())


def ratio(row: dict, peer: str, key: str) -> float:
    """How many times as long as diffmf the peer takes."""
    return row["peers"][peer][key]["median"] / row[key]["median"]


def beside(rows: list[dict]) -> list[str]:
    """The peers of any of the rows."""
    return [peer for peer in NAMES if any(peer in row.get("peers", {}) for row in rows)]


def means(rows: list[dict], peer: str) -> list[float]:
    found = [row for row in rows if peer in row.get("peers", {})]
    return [math.exp(sum(math.log(ratio(row, peer, key)) for row in found) / len(found)) for key in TIMES]


def pair(values) -> str:
    return " / ".join(f"{value:.1f}×" for value in values)


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def speed_table(results: dict) -> str:
    """Our times, and each peer's as multiples of them."""
    rows, peers = results["rows"], beside(results["rows"])
    header = [
        "B×D×H×W, states, rank, dtype",
        "kernel",
        "GEMM + kernel",
        "forward + backward",
        "extra MiB fwd / fwd+bwd",
    ]
    lines = []
    for row in rows:
        line = [row["case"], *(spread(row[key]) for key in ("kernel", *TIMES)), memory(row)]
        lines.append(line + [pair(ratio(row, p, k) for k in TIMES) if p in row["peers"] else "" for p in peers])
    if peers:
        lines.append(["geometric mean", "", "", "", "", *(pair(means(rows, peer)) for peer in peers)])
    note = "; a peer's column: its time as a multiple of ours, forward / forward + backward" if peers else ""
    content = table(header + [NAMES[peer] for peer in peers], lines)
    return f"{content}\n\nms, median (range){note}; {where(results['environment'])}."


def contender_table(results: dict) -> str:
    """One line per case and implementation."""
    header = ["case", "implementation", "forward", "forward + backward", "extra MiB", "times as long", "relative error"]
    lines = []
    for row in results["rows"]:
        lines.append([row["case"], "diffmf", *(spread(row[key]) for key in TIMES), memory(row), "", ""])
        for name, peer in row.get("peers", {}).items():
            error = " / ".join(f"{value:.0e}" for value in peer["error"].values())
            times = [spread(peer[key]) for key in TIMES]
            lines.append(["", NAMES[name], *times, memory(peer), pair(ratio(row, name, k) for k in TIMES), error])
    for peer in beside(results["rows"]):
        lines.append(["geometric mean", NAMES[peer], "", "", "", pair(means(results["rows"], peer)), ""])
    return table(header, lines)


def kernel_table(results: dict) -> str:
    """The forward kernel alone against the ceilings measured in the same run."""
    lines = []
    for row in (row for row in results["rows"] if "limits" in row):
        kernel, limits = row["kernel"]["median"], row["limits"]
        shares = [f"{limits[key] / kernel:.0%}" for key in ("copy", "exp2")]
        rate = f"{row['bytes'] / kernel / 1e6:.0f}"
        lines.append([row["case"], spread(row["kernel"]), rate, *shares, f"{kernel / limits['two passes']:.2f}×"])
    header = ["case", "kernel", "GB/s", "of copy", "of exp2", "two bare passes"]
    rates = ", ".join(f"{name.replace('_', ' ')} {rate / 1e12:.2f}" for name, rate in results["ceilings"].items())
    return f"{table(header, lines)}\n\nMeasured ceilings, 10¹² operations (copy: bytes) a second: {rates}."


def cpu_table(results: dict) -> str:
    header = ["B×D×H×W, states, rank, dtype", "forward", "PyTorch reference", "ratio"]
    lines = []
    for row in results["rows"]:
        times = [spread(entry["forward"]) for entry in (row, row["peers"]["eager"])]
        lines.append([row["case"], *times, f"{ratio(row, 'eager', 'forward'):.0f}×"])
    return f"{table(header, lines)}\n\nms, median (range); {where(results['environment'])}."


def rows_of(results: dict) -> dict[tuple, dict]:
    """The measured rows of a network by task, size, precision and mode."""
    keys = ("task", "size", "precision", "mode")
    return {tuple(row[key] for key in keys): row for row in results["rows"] if "ms" in row}


def model_table(results: dict) -> str:
    """Fusing and training of the whole network; on VMamba's kernels beside the same mode on ours."""
    header = ["task", "size", "precision", "mode", "ms", "images a second", "peak MiB", "times as long"]
    rows = rows_of(results)

    def longer(row):
        ours = {"vmamba": "eager", "vmamba-graph": "graph", "reference": "eager"}.get(row["mode"])
        ours = rows.get((row["task"], row["size"], row["precision"], ours))
        return f"{row['ms']['median'] / ours['ms']['median']:.1f}×" if ours else ""

    lines = [
        [
            *(row["task"], row["size"].replace("x", "×"), row["precision"], row["mode"], spread(row["ms"])),
            *(f"{row['images_per_second']:.1f}", f"{row['peak_mib']:.0f}" if "peak_mib" in row else "–", longer(row)),
        ]
        for row in rows.values()
    ]
    return table(header, lines)


SHOWN = (("fuse", "512x512"), ("fuse", "768x1024"), ("train", "4x128x128"))


def network_table(names: list[str]) -> str:
    """The networks of these results, each as one CUDA graph, and on VMamba's kernels as one."""
    networks = {NETWORKS[name]: load(name) for name in names}
    header = ["network", "task", "size", "fp32, ms", "bf16, ms", "on VMamba's kernels, fp32 / bf16"]
    lines = []
    for name, results in networks.items():
        rows = rows_of(results)
        for task, size in SHOWN:
            times = [rows[task, size, precision, "graph"]["ms"] for precision in ("fp32", "bf16")]
            peers = [rows[task, size, precision, "vmamba-graph"]["ms"] for precision in ("fp32", "bf16")]
            longer = pair(peer["median"] / ours["median"] for peer, ours in zip(peers, times, strict=True))
            lines.append([name, task, size.replace("x", "×"), *map(spread, times), longer])
    origins = "; ".join(f"{name}: {where(results['environment'])}" for name, results in networks.items())
    return f"{table(header, lines)}\n\nms, median (range), of one CUDA graph; 4×128×128 is four crops. {origins}."


def replaced_table(results: dict) -> str:
    """Other people's networks with our layer, and how many times as long they take with their own."""
    rows = {(row["title"], row["task"], row["shape"], row["precision"], row["mode"]): row for row in results["rows"]}
    header = ["network, layers", "task", "input", "fp32", "bf16", "eager, fp32 / bf16", "peak MiB, fp32; bf16"]
    lines = []

    def longer(row):
        return row["ms"]["theirs"]["median"] / row["ms"]["ours"]["median"]

    for title, task, shape in dict.fromkeys(key[:3] for key in rows):
        eager, graph = ([rows[title, task, shape, p, mode] for p in ("fp32", "bf16")] for mode in ("eager", "graph"))
        times = [f"{spread(row['ms']['ours'])}, {longer(row):.1f}×" for row in graph]
        peaks = "; ".join(f"{row['peak_mib']['ours']:.0f} of {row['peak_mib']['theirs']:.0f}" for row in eager)
        lines.append([f"{title}, {eager[0]['layers']}", task, shape, *times, pair(map(longer, eager)), peaks])
    note = (
        "ms, median (range), as one CUDA graph, and how many times as long the network takes with its own layer; that "
        "also of eager calls, where the network's launches may be what takes the time; memory of eager calls, of what "
        "they take with its own layer"
    )
    return f"{table(header, lines)}\n\n{note}; {where(results['environment'])}."


def plot_modules(results: dict, path: Path) -> None:
    """Where a fused pair's time goes: parts of the network, and kinds of module (each without what it contains)."""
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if "parts" in row]
    figure, panels = pyplot.subplots(len(rows), 2, figsize=(11, 3.2 * len(rows)), layout="constrained", squeeze=False)
    for row, line in zip(rows, panels, strict=True):
        for panel, of in zip(line, ("parts", "kinds"), strict=True):
            names = [name for name, ms in row[of].items() if ms >= 0.005 * sum(row[of].values())]
            panel.barh(names, [row[of][name] for name in names])
            panel.invert_yaxis()
            panel.set(title=f"{row['size']} {row['precision']}: {of}", xlabel="ms")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_speedups(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    peers = [peer for peer in beside(rows) if peer not in ("eager", "compile", "separate")]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 0.45 * len(rows) + 1.5), sharey=True, layout="constrained")
    for panel, key in zip(panels, TIMES, strict=True):
        height = 0.8 / len(peers)
        for i, peer in enumerate(peers):
            there = [(n, ratio(row, peer, key)) for n, row in enumerate(rows) if peer in row["peers"]]
            panel.barh(
                [n + (i + 0.5) * height - 0.4 for n, _ in there], [r for _, r in there], height, label=NAMES[peer]
            )
        panel.axvline(1, color="black", linewidth=1)
        panel.set(title=key, xlabel="peer's time / diffmf's time")
        panel.set_yticks(range(len(rows)), [row["case"] for row in rows])
    panels[0].invert_yaxis()
    panels[0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_length(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, key in zip(panels, TIMES, strict=True):
        for name in ("diffmf", *beside(rows)):
            entries = [(row["tokens"], row if name == "diffmf" else row["peers"].get(name)) for row in rows]
            there = [(tokens, entry[key]["median"]) for tokens, entry in entries if entry is not None]
            panel.loglog(*zip(*there, strict=True), marker="o", label=NAMES[name])
        panel.set(title=key, xlabel="tokens L")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    panels[0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_roofline(results: dict, path: Path) -> None:
    """Exp2 a second over exp2 per byte that must move: the roofs are the measured copy and exp2 rates."""
    from matplotlib import pyplot

    copy, exp2 = (results["ceilings"][key] for key in ("copy", "exp2"))
    rows = [row for row in results["rows"] if "limits" in row]
    figure, panel = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        operations = row["limits"]["exp2"] * exp2 / 1e3
        marker = "o" if "float32" in row["dtype"] else "s"
        panel.loglog(
            operations / row["bytes"], operations / row["kernel"]["median"] * 1e3, marker, label=row["case"], alpha=0.8
        )
    low, high = panel.get_xlim()
    ends = sorted({low, min(max(exp2 / copy, low), high), high})
    panel.plot(ends, [min(x * copy, exp2) for x in ends], color="black", label="measured copy and exp2 rates")
    panel.set(xlabel="exp2 of two passes per byte of x, proj and y", ylabel="exp2 per second, forward kernel alone")
    panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


NETWORKS = {
    "model_cuda": "The paper's network",
    "model_small_cuda": "diffmf-s",
    "model_cpu": "The paper's network on a CPU",
    "model_small_cpu": "diffmf-s on a CPU",
}
TITLES = {"ss2d_cuda": "Cases", "ss2d_cuda_length": "Time against image size", "ss2d_cuda_sweep": "Sweep"}


def write_report(docs: Path) -> None:
    """docs/benchmarks.md and its plots, of those results that were measured beside peers, and of the whole network."""
    found = {name: results for name in TITLES if (results := load(name)) and beside(results["rows"])}
    models = {name: results for name in NETWORKS if (results := load(name))}
    if not found and not models:
        return
    parts = ["# Benchmarks", "Written by `benchmarks/render.py` from `benchmarks/results`, measured by `diffmf bench`."]
    parts.append(
        "ms, median (range) of calls in turn, each after the second-level cache was overwritten. Projection GEMMs are "
        "included on both sides, in TF32 where inputs are float32, except for Mamba-2, whose scan alone is timed, and "
        "for the kernel tables."
    )
    for name, results in found.items():
        plots = [("speedup", lambda r, path: plot_speedups(r["rows"], path))]
        if name == "ss2d_cuda_length":
            plots = [("length", lambda r, path: plot_length(r["rows"], path))]
        parts.append(f"## {TITLES[name]}")
        if "ceilings" in results:
            plots.append(("roofline", plot_roofline))
        for kind, plot in plots:
            picture = f"{name}_{kind}.png"
            plot(results, docs / picture)
            parts.append(f"![{TITLES[name]}, {kind}]({picture})")
        parts.append(contender_table(results))
        if "ceilings" in results:
            parts.append(kernel_table(results))
        parts.append(origin(results))
    if models:
        parts += [
            "## The network",
            "Measured by `diffmf bench-model`: random weights, one pair; 4×128×128 is four crops. `graph` is one CUDA "
            "graph, `vmamba` the same network on VMamba's kernels, eager, `vmamba-graph` that as one CUDA graph.",
        ]
    for name, results in models.items():
        parts += [f"### {NETWORKS[name]}", model_table(results)]
        if any("parts" in row for row in results["rows"]):
            plot_modules(results, docs / f"{name}_modules.png")
            parts.append(f"![{NETWORKS[name]}, by part and by kind of module]({name}_modules.png)")
        parts.append(origin(results))
    (docs / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


def readme_tables() -> dict[str, str]:
    return {
        "cuda": speed_table(load("ss2d_cuda")),
        "cpu": cpu_table(load("ss2d_cpu")),
        "network": network_table(["model_cuda", "model_small_cuda"]),
        "replaced": replaced_table(load("networks_cuda")),
    }


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    for name, content in readme_tables().items():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        head, rest = text.split(begin)
        text = head + begin + content + "\n" + end + rest.split(end)[1]
    path.write_text(text)
    write_report(ROOT / "docs")


if __name__ == "__main__":
    main()
