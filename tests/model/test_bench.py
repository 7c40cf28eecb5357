import json

import pytest
import torch

from diffmf_model import bench, ceilings, cli, peers
from diffmf_model.timing import alternate

SMALL = bench.Case(1, 8, 5, 7, 4, 1)
PAIR = bench.Case(2, 8, 5, 3, 4, 1, modalities=2, exchange="mutual")
TIMES = ("forward", "forward and backward")


def test_bench_measures_a_named_case_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.ALL, "tiny", SMALL)
    assert cli.main(["bench", "tiny", "--device", "cpu", "--peers", "eager", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "ss2d_cpu.json").read_text())
    (row,) = results["rows"]
    assert (row["name"], row["case"]) == ("tiny", "1×8×5×7 N4 R1 float32")
    for key in ("kernel", *TIMES):
        assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]
    assert set(row["peers"]["eager"]) == {"error", *TIMES}
    assert max(row["peers"]["eager"]["error"].values()) < 1e-5
    assert results["environment"]["threads"] >= 1
    printed = capsys.readouterr().out
    assert row["case"] in printed and "geometric mean, eager" in printed


def test_bench_compares_two_modalities_with_two_launches(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.GROUPS, "pair", ["exchange"])
    monkeypatch.setitem(bench.ALL, "exchange", PAIR)
    assert cli.main(["bench", "pair", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "ss2d_cpu_pair.json").read_text())["rows"]
    assert set(row["peers"]) == {"separate"}
    assert row["peers"]["separate"]["error"] == {}  # it exchanges nothing


def test_a_peer_that_is_off_is_refused(tmp_path, monkeypatch, capsys):
    def doubled(case, tensors, dy):
        right = peers.eager(case, tensors, dy)
        return peers.Contender(right.leaves, lambda: [2 * y for y in right.run()], right.seeds, right.to_ours)

    monkeypatch.setitem(peers.PEERS, "eager", doubled)
    monkeypatch.setitem(bench.ALL, "tiny", SMALL)
    assert cli.main(["bench", "tiny", "--device", "cpu", "--peers", "eager", "--output", str(tmp_path)]) == 2
    assert "eager on 1×8×5×7" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "ss2d_cpu.json").read_text())["rows"]
    assert row["peers"] == {} and "relative errors" in row["failed"]["eager"]


@pytest.mark.parametrize("arguments", [["nonsense"], ["tiny", "--peers", "nonsense"]])
def test_bench_names_what_is_unknown(arguments, capsys):
    assert cli.main(["bench", *arguments, "--device", "cpu"]) == 2
    assert "'nonsense'" in capsys.readouterr().err


def test_bench_says_which_peer_is_not_importable(capsys, monkeypatch):
    def absent(case, tensors, dy):
        raise ImportError("No module named 'absent'")

    monkeypatch.setitem(peers.PEERS, "mamba2", absent)
    assert cli.main(["bench", "tiny", "--device", "cpu", "--peers", "mamba2"]) == 2
    assert "mamba2" in capsys.readouterr().err
    assert bench.importable(["mamba2"], "cpu", required=False) == []
    assert "No module named 'absent'" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_cases_exist(device):
    assert bench.DEFAULTS[device] and set(bench.DEFAULTS[device]) <= set(bench.CASES)


def test_groups_are_of_cases_and_names_are_not_reused():
    assert len(bench.ALL) == len(bench.CASES) + len(bench.SWEEP) + len(bench.LENGTH)
    assert all(name in bench.ALL for group in bench.GROUPS.values() for name in group)


def test_contenders_alternate():
    called = []
    times = alternate({name: lambda name=name: called.append(name) for name in "abc"}, "cpu", repeats=3)
    assert "".join(called[-9:]) == "abcbcacab"
    assert set(times) == {"a", "b", "c"}


@pytest.mark.parametrize("case", [SMALL, PAIR, bench.Case(1, 8, 4, 5, 4, 2, shared_decay=True)], ids=str)
def test_the_peers_pipelines_compute_what_ss2d_does(case, monkeypatch):
    """The adapters on the CPU, the peers' kernels replaced by functions of the same signature."""
    monkeypatch.setattr(peers, "import_module", stand_in)
    tensors = bench.make_inputs(case, "cpu")
    dy = torch.randn_like(tensors[0])
    contenders = [peers._pipeline(case, tensors, dy, selective_scan, torch.float32)]
    if case.shared_decay:
        contenders.append(peers.mamba2(case, tensors, dy))
    for contender in contenders:
        errors = peers.errors(contender, case, tensors, dy)
        assert max(errors.values()) < 1e-5, errors
        assert len(contender.both()) == len(contender.leaves)


def selective_scan(u, delta, A, B, C, D, bias):
    return peers.reference.selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)


class stand_in:
    """In place of the modules csm_triton and mamba_ssm.ops.triton.ssd_combined."""

    def __init__(self, name):
        assert name in ("csm_triton", "mamba_ssm.ops.triton.ssd_combined")

    cross_scan_fn = staticmethod(peers.reference.cross_scan)

    @staticmethod
    def cross_merge_fn(y):
        return peers.reference.cross_merge(y.flatten(3), y.shape[-2:])

    @staticmethod
    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, *, D, dt_bias, dt_softplus):
        heads, width = x.shape[2:]
        u = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, K · D, L)
        delta = (dt + dt_bias).transpose(1, 2).repeat_interleave(width, 1)
        decay = A.repeat_interleave(width)[:, None].expand(-1, B.shape[-1])
        y = selective_scan(u, delta, decay, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D.flatten(), None)
        return y.unflatten(1, (heads, width)).permute(0, 3, 1, 2)


def test_limits_count_exp2_and_bytes():
    rates = dict.fromkeys(("exp2", "copy", *ceilings.SCAN_PROBES), 1000.0)
    paper = ceilings.needs(bench.CASES["paper"])
    assert paper["state steps"] == 4 * 512 * 512 * 64 * 16
    assert paper["exp2"] == 2 * paper["state steps"]
    assert paper["bytes"] == 4 * 512 * 512 * (64 + 4 * 34 + 64)
    limits = ceilings.limits(bench.CASES["paper-scalar-a"], rates)
    assert limits["two passes"] == 16 * limits["exp2"]
