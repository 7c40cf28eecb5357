import json

import pytest

from diffmf_model import bench, cli


def test_bench_measures_a_named_case_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.CASES, "tiny", bench.Case(1, 8, 5, 7, 4, 1))
    assert cli.main(["bench", "tiny", "--device", "cpu", "--reference", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "ss2d_cpu.json").read_text())
    (row,) = results["rows"]
    assert row["case"] == "1×8×5×7 N4 R1 float32"
    for key in ("kernel", "forward", "forward and backward"):
        assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]
    assert set(row["reference"]) == {"forward", "forward and backward"}
    assert results["environment"]["threads"] >= 1
    assert row["case"] in capsys.readouterr().out


def test_bench_names_an_unknown_case(capsys):
    assert cli.main(["bench", "nonsense", "--device", "cpu"]) == 2
    assert "'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_cases_exist(device):
    assert bench.DEFAULTS[device] and set(bench.DEFAULTS[device]) <= set(bench.CASES)
