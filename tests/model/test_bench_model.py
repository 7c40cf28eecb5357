"""`diffmf bench-model` on a tiny network."""

import json

import pytest
import torch

from diffmf_model import bench_model, peers
from diffmf_model.config import load_config
from diffmf_model.network import DIFFMF
from diffmf_ops import modules, reference, selective_scan

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


class FakeCSM:
    """What VMamba's csm_triton computes, on any device."""

    @staticmethod
    def cross_scan_fn(x):  # (B, C, H, W) -> (B, K, C, L)
        forward = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
        return torch.cat([forward, forward.flip(-1)], 1)

    @staticmethod
    def cross_merge_fn(y):  # (B, K, C, H, W) -> (B, C, L)
        rows, columns = (y.flatten(3)[:, :2] + y.flatten(3)[:, 2:].flip(-1)).unbind(1)
        return rows + columns.unflatten(-1, (y.shape[-1], y.shape[-2])).transpose(2, 3).flatten(2)


def scan_in_torch(u, delta, A, B, C, D, bias):
    return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)


@pytest.fixture
def stand_ins(monkeypatch):
    """For VMamba's kernels, on any device."""
    monkeypatch.setattr(peers, "import_module", lambda name: {"csm_triton": FakeCSM}[name])
    monkeypatch.setattr(peers, "_oflex", lambda: scan_in_torch)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("scalar", ["true", "false"])
def test_the_network_on_vmambas_kernels_is_the_same_network(scalar):
    """With stand-ins for the kernels: what is between them is ours."""
    model = DIFFMF(load_config(None, [*TINY, f"model.scalar_decay={scalar}"]).model)
    ir, vi = torch.rand(2, 1, 1, 6, 7)
    with torch.no_grad():
        expected = model(ir, vi)
        with bench_model.on_vmamba():
            assert modules.SS2D.scan is peers.vmamba_scan
            assert torch.allclose(model(ir, vi), expected, atol=1e-5)
        assert modules.SS2D.scan is not peers.vmamba_scan


@pytest.mark.usefixtures("stand_ins")
def test_what_vmambas_kernels_cannot_do_is_a_row_without_a_time():
    config = load_config(None, [*TINY, "model.channel_exchange=reproject"])
    with bench_model.on_vmamba():
        row = bench_model.measure(config, torch.device("cpu"), (1, 6, 7), "fuse", "fp32", "vmamba", 1)
    assert row == {"error": "VMamba's kernels are measured for the direct exchange only"}


@pytest.mark.skipif(not (torch.cuda.is_available() and peers.has_vmamba()), reason="needs VMamba's kernels")
@pytest.mark.parametrize("mode", ["vmamba", "vmamba-graph"])
def test_the_network_on_vmambas_own_kernels(mode):
    config = load_config(None, ["model.d_model=8", "model.stages=1"])
    model = DIFFMF(config.model).cuda()
    ir, vi = torch.rand(2, 1, 1, 24, 20, device="cuda")
    with torch.no_grad(), peers.tf32(False):
        expected = model(ir, vi)
        with bench_model.on_vmamba():
            assert torch.allclose(model(ir, vi), expected, atol=1e-4)
    with bench_model.on_vmamba():
        row = bench_model.measure(config, torch.device("cuda"), (1, 16, 16), "train", "bf16", mode, 2)
    assert row["ms"]["median"] > 0


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
