"""`diffmf ablate`: training in parallel processes, resuming, the table's signs; `diffmf experiments` on its runs."""

import json

import numpy as np
import pytest
from PIL import Image

from diffmf_model import ablate, published
from diffmf_model.config import ModelConfig, load_config
from diffmf_model.metrics import METRICS

SETTINGS = ["model.d_model=4", "model.d_state=2", "model.stages=1", "data.crop_size=16", "data.batch_size=2"]
SETTINGS += ["train.precision=fp32", "logging.tensorboard=false"]


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(5)
    for folder, shape in (("ir", (42, 45)), ("vi", (42, 45, 3))):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(4):
            picture = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            picture.save(tmp_path / "data" / folder / f"{i}.png")
    return tmp_path / "data"


def test_variants_are_the_paper_s_rows():
    rows = {(table, row) for table, rows in published.ablations()["tables"].items() for row in rows}
    variants = {(each.table, each.row) for name, each in ablate.VARIANTS.items() if name != ablate.FULL}
    assert variants == rows and len(rows) == 11
    configs = [load_config(None, each.overrides).model for each in ablate.VARIANTS.values()]
    assert configs[0] == ModelConfig() and len(set(configs)) == 12


def test_signs():
    paper = published.ablations()
    settings = {"data": "d", "split": "val", "config": {"train": {"seed": 0}}}
    full = dict.fromkeys(METRICS, 1.0)
    # EN, SF, AG fall as in the paper; MI falls where the paper's rises; VIF does not move; SD rises.
    other = full | {"EN": 0.9, "SF": 0.9, "AG": 0.9, "MI": 0.9, "SD": 1.1}
    assert paper["tables"]["II"]["w/o channel-exchange"]["MI"] > paper["full"]["MI"]
    records = {
        name: {"means": means, "steps": steps, "settings": settings}
        for name, means, steps in (("full", full, 5), ("no-channel-exchange", other, 4))
    }
    text = ablate.markdown(records, "5 steps")
    row = next(line for line in text.splitlines() if line.startswith("| II | w/o channel-exchange | "))
    assert "| 0.90 (-0.10) | 1.10 (+0.10) |" in row and row.endswith("| 3 of 6: EN, SF, AG |")
    assert "agrees with the paper's in 3 of 6 cases (EN 1 of 1, SD 0 of 1" in text
    assert "| *w/o channel-exchange, paper* | 6.80 (-0.39) |" in text
    assert "Unequal steps (time limit): full 5, no-channel-exchange 4" in text


def test_two_variants_at_once_then_resumed(data, tmp_path, command, fails):
    output = tmp_path / "out"
    arguments = ["ablate", "--data", data, "--output", output, "--steps", "2", "--jobs", "2", "--device", "cpu"]
    chosen = ["--variant", "no-residual", "--variant", "no-spatial-exchange"]
    status, stdout, stderr = command(*arguments, *chosen[:2], *SETTINGS)
    assert status == 0, stderr
    assert "2 variants to train, 2 steps each; 0 done before" in stdout and "| VI | w/o residual connection |" in stdout
    first = (output / "no-residual" / "record.json").read_bytes()
    assert json.loads(first)["steps"] == 2 and (output / "ablations.md").read_text() in stdout
    status, stdout, stderr = command(*arguments, *chosen, *SETTINGS)
    assert status == 0 and "1 variants to train, 2 steps each; 2 done before" in stdout
    assert (output / "no-residual" / "record.json").read_bytes() == first
    assert [each["variant"] for each in json.loads((output / "ablations.json").read_text())] == [
        "full",
        "no-spatial-exchange",
        "no-residual",
    ]
    assert "made with other data or settings" in fails(*arguments, *chosen, *SETTINGS, "train.lr=0.5")

    # The runs' folders are what `diffmf experiments` reads.
    status, stdout, stderr = command("experiments", output / "full", output / "no-residual")
    assert status == 0, stderr
    rows = [line.split(" | ") for line in stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| run", "| ---", "| full", "| no-residual"]
    assert "`model.residual=false`" in rows[3][1] and "`model.residual=false`" not in rows[2][1]
    assert "`model.d_model=4`" in rows[2][1] and "tensorboard" not in rows[2][1] and rows[2][2] == "2"
    (output / "full" / "run.json").unlink()  # a run of an earlier version
    status, stdout, _ = command("experiments", output / "full", "--output", tmp_path / "experiments.md")
    text = (tmp_path / "experiments.md").read_text()
    assert (
        status == 0 and "1 runs written" in stdout and "`model.d_model=4`" in text and "| 2 | – | – | – | 2 |" in text
    )
    assert "not the folder of a training run" in fails("experiments", tmp_path)


def test_a_failed_variant_does_not_stop_the_others(data, tmp_path, command, monkeypatch):
    broken = ablate.VARIANTS["no-residual"]._replace(overrides=["train.best_by=PSNR"])
    monkeypatch.setitem(ablate.VARIANTS, "no-residual", broken)
    arguments = ["ablate", "--data", data, "--output", tmp_path / "out", "--steps", "1", "--device", "cpu"]
    status, stdout, stderr = command(*arguments, "--variant", "no-residual", *SETTINGS)
    assert status == 1 and "no-residual: training failed: diffmf: error: train.best_by" in stderr
    assert "1 of 2 variants failed" in stderr and "| | DIFF-MF |" in stdout


def test_an_interrupted_variant_continues_with_its_settings_only(data, tmp_path, command, fails, monkeypatch):
    monkeypatch.setattr(ablate, "VARIANTS", {"full": ablate.VARIANTS["full"]})
    arguments = ["ablate", "--data", data, "--output", tmp_path / "out", "--steps", "1", "--device", "cpu", *SETTINGS]
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "_train", lambda *_: "ended before its first step")
        assert command(*arguments)[0] == 1
        assert command(*arguments, "train.lr=0.5")[0] == 1  # there is no state yet
    (tmp_path / "out/full/state.safetensors").touch()
    assert "record.json: made with other data or settings" in fails(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "_train", lambda command, *_: str("--resume" in command))
        assert "training failed: True" in command(*arguments, "train.lr=0.5")[2]


def test_wrong_use(data, tmp_path, fails):
    arguments = ["ablate", "--data", data, "--output", tmp_path / "out"]
    assert "--steps: expected at least 1, found 0" in fails(*arguments, "--steps", "0")
    assert "--minutes: expected at least 0, found nan" in fails(*arguments, "--minutes", "nan")
    assert "fewer than one batch" in fails(*arguments, "data.batch_size=9")
    assert "model.d_model: expected an integer" in fails(*arguments, "model.d_model=x")
    assert "no such folder" in fails("ablate", "--data", tmp_path / "gone")
    assert "no other split" in fails(*arguments, "--split", "other")
