"""`diffmf bench-model` on a tiny network."""

import json

import pytest
import torch

from diffmf_model import bench_model
from diffmf_model.config import load_config
from diffmf_model.network import DIFFMF
from diffmf_ops import modules, reference

TINY = ["model.d_model=4", "model.d_state=2", "model.stages=1"]


def test_everything_is_measured_and_written(tmp_path, command):
    arguments = ["bench-model", "--device", "cpu", "--size", "12x13", "--size", "2x11x12", "--repeats", "2"]
    status, stdout, stderr = command(*arguments, "--reference", "11x11", "--output", tmp_path, *TINY)
    assert status == 0, stderr
    results = json.loads((tmp_path / "model_cpu.json").read_text())
    rows = results["rows"]
    found = [(row["task"], row["size"], row["mode"]) for row in rows]
    expected = [(task, size, "eager") for task in ("fuse", "train") for size in ("12x13", "2x11x12")]
    expected += [(task, "11x11", mode) for task in ("fuse", "train") for mode in ("eager", "reference")]
    assert found == expected + [("modules", size, "eager") for size in ("12x13", "2x11x12")]
    for row in rows[:8]:
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        batch = 2 if row["size"] == "2x11x12" else 1
        assert row["images_per_second"] == pytest.approx(1e3 * batch / row["ms"]["median"])
    assert stdout.count("times as long") == 2 and "where the time goes, 12x13 fp32" in stdout
    assert results["environment"]["torch"] == torch.__version__


def test_the_parts_and_the_kinds_add_up():
    config = load_config(None, TINY)
    row = bench_model.module_times(config, torch.device("cpu"), (1, 12, 13), "fp32", 2)
    assert sum(row["kinds"].values()) == pytest.approx(row["total"])
    expected = {"stem_ir", "stem_vi", "extraction.0", "channel_exchange", "spatial_exchange.high", "decoder"}
    assert expected < set(row["parts"]) and "spatial_exchange" not in row["parts"]
    assert sum(row["parts"].values()) <= row["total"] and {"SS2D", "Conv2d", "Linear"} < set(row["kinds"])


def test_the_reference_network_is_the_same_network():
    model = DIFFMF(load_config(None, TINY).model)
    ir, vi = torch.rand(2, 1, 1, 6, 7)
    with torch.no_grad():
        with bench_model.on_reference():
            assert modules.ss2d is reference.ss2d
            expected = model(ir, vi)
        assert modules.ss2d is not reference.ss2d
        assert torch.allclose(model(ir, vi), expected, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", bench_model.PRECISIONS)
@pytest.mark.parametrize("task", bench_model.TASKS)
def test_a_graph_runs(task, precision):
    row = bench_model.measure(load_config(None, TINY), torch.device("cuda"), (1, 16, 16), task, precision, "graph", 2)
    assert row["ms"]["median"] > 0 and row["peak_mib"] > 0


def test_wrong_use(fails):
    assert "--mode graph: expected a CUDA device" in fails("bench-model", "--device", "cpu", "--mode", "graph")
    for size in ("12", "0x4", "axb", "1x2x3x4"):
        assert f"size {size!r}: expected HxW" in fails("bench-model", "--device", "cpu", "--size", size)
    assert "--repeats: expected at least 1" in fails("bench-model", "--device", "cpu", "--repeats", "0")
    assert "model.d_model" in fails("bench-model", "--device", "cpu", "model.d_model=x")
