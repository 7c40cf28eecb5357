import importlib.util
import json
from pathlib import Path

import pytest

from diffmf_model import bench, ceilings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def time(median):
    return {"median": median, "min": 0.9 * median, "max": 1.1 * median}


def made_up(names):
    rates = {"exp2": 4e12, "fma": 3e13, "copy": 4e12, **dict.fromkeys(ceilings.SCAN_PROBES, 3e12)}
    rows = []
    for n, name in enumerate(names, start=1):
        case = bench.ALL[name]
        row = {"name": name, "case": str(case), "dtype": str(case.dtype), "tokens": case.height * case.width}
        row |= {"kernel": time(n), "forward": time(2 * n), "forward and backward": time(5 * n)}
        memory = {"extra MiB": {"forward": 1, "forward and backward": 2}}
        peer = {"error": {"y": 1e-6}, "forward": time(8 * n), "forward and backward": time(10 * n)} | memory
        limits = ceilings.limits(case, rates)
        peers = {"vmamba": peer} if n == 1 else {"vmamba": peer, "mamba2": peer}
        rows.append(row | memory | {"limits": limits, "bytes": ceilings.needs(case)["bytes"], "peers": peers})
    where = {"gpu": "a GPU", "clocks": {"sm": 1, "sm max": 2}, "torch": "0", "commit": "abc"}
    return {"environment": where, "rows": rows, "ceilings": rates}


def test_the_readme_is_what_render_writes(render):
    text = (ROOT / "README.md").read_text()
    for name, table in render.readme_tables().items():
        assert f"<!-- table {name} -->\n{table}\n<!-- end {name} -->" in text


def test_the_report_is_what_render_writes(render, tmp_path):
    pytest.importorskip("matplotlib")
    render.write_report(tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def test_tables_and_plots_of_results_with_peers(render, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    files = {"ss2d_cuda": ["paper", "paper-bf16"], "ss2d_cuda_sweep": ["n1", "n4"], "ss2d_cuda_length": bench.LENGTH}
    for file, names in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(made_up(names)))
    timed = {"task": "fuse", "size": "8x16", "precision": "bf16", "mode": "graph", "ms": time(4)}
    timed |= {"images_per_second": 250, "peak_mib": 7}
    modules = {"task": "modules", "size": "8x16", "precision": "bf16", "mode": "eager"}
    modules |= {"parts": {"stem": 1.0, "decoder": 2.0}, "kinds": {"SS2D": 3.0}}
    network = {"environment": made_up([])["environment"], "rows": [timed, modules]}
    (tmp_path / "model_cuda.json").write_text(json.dumps(network))
    render.write_report(tmp_path)
    report = (tmp_path / "benchmarks.md").read_text()
    assert "| geometric mean | VMamba |  |  |  | 4.0× / 2.0× |  |" in report
    assert "a GPU at 1 of 2 MHz" in report
    assert "| fuse | 8×16 | bf16 | graph | 4.00 (3.60–4.40) | 250.0 | 7 |" in report
    for picture in tmp_path.glob("*.png"):
        assert f"]({picture.name})" in report
    assert len(list(tmp_path.glob("*.png"))) == 7
    assert "| geometric mean |  |  |  |  | 4.0× / 2.0× | 4.0× / 2.0× |" in render.speed_table(render.load("ss2d_cuda"))
