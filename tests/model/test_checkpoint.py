"""Model files: round trip, and one clear line for everything that is not one."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from diffmf_model import checkpoint
from diffmf_model.checkpoint import load_model, save_model, select_device
from diffmf_model.config import ModelConfig, to_dict
from diffmf_model.errors import UserError
from diffmf_model.network import DIFFMF

CONFIG = ModelConfig(d_model=4, d_state=2, stages=1, gate="fig2", channel_exchange="reproject")


def save_as(path, tensors, model=None, kind="diffmf model"):
    info = {"kind": kind, "model": to_dict(CONFIG) if model is None else model}
    save_file(tensors, path, {"diffmf": json.dumps(info)})


@pytest.fixture
def weights():
    return DIFFMF(CONFIG).state_dict()


def test_round_trip(tmp_path):
    model = DIFFMF(CONFIG)
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    first = path.read_bytes()
    loaded = load_model(path, "cpu")
    assert not loaded.training and loaded.config == CONFIG
    ir, vi = torch.rand(2, 1, 1, 5, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ir, vi), model(ir, vi))
    save_model(path, loaded)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"model.safetensors: not a safetensors file, or damaged"):
        load_model(path)
    torch.save({"weights": Bomb()}, path)
    with pytest.raises(UserError, match=r"model.safetensors: not a safetensors file, or damaged"):
        load_model(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_files(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_model(path, DIFFMF(CONFIG))
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(UserError, match=r"model.safetensors: not a safetensors file, or damaged"):
        load_model(path)


def test_bundled_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = tmp_path / "diffmf-s.safetensors"
    monkeypatch.setitem(checkpoint.BUNDLED, "small", small)
    with pytest.raises(UserError, match=r"diffmf-s.safetensors: no such file; expected .*, or one of full, small"):
        load_model("small")
    save_model(small, DIFFMF(CONFIG))
    assert load_model("small").config == CONFIG
    assert load_model("full").config == load_model().config
    save_model(tmp_path / "small", DIFFMF(ModelConfig(d_model=5, d_state=1)))
    assert load_model("small").config.d_model == 5  # a file goes before a name
    with pytest.raises(UserError, match=r"medium: no such file; expected .*, or one of full, small"):
        load_model("medium")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(UserError, match=f"{path.name}: no such file; expected a diffmf model"):
            load_model(path)


def test_other_safetensors_files(tmp_path, weights):
    path = tmp_path / "other.safetensors"
    save_file(weights, path)
    with pytest.raises(UserError, match="expected a diffmf model, found a file without that mark"):
        load_model(path)
    save_as(path, weights, kind="diffmf training state")
    with pytest.raises(UserError, match="expected a diffmf model, found diffmf training state"):
        load_model(path)
    save_file(weights, path, {"diffmf": "{"})
    with pytest.raises(UserError, match="its metadata is damaged"):
        load_model(path)
    save_file(weights, path, {"diffmf": "[]"})
    with pytest.raises(UserError, match="expected a diffmf model, found damaged metadata"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 3}, "model.width: unknown setting"),
        ({"d_model": "4"}, "model.d_model: expected an integer"),
        ({"gate": "eq9"}, "model.gate: expected one of eq8, fig2, found 'eq9'"),
        ({"stages": 2}, r"tensors of its configuration are missing, the first is extraction.1"),
        ({"spatial_exchange": False}, r"tensors are not in its configuration, the first is spatial_exchange"),
        ({"d_state": 3}, r"has shape \(.*\), its configuration asks for \("),
    ],
)
def test_mismatched_configuration(tmp_path, weights, change, message):
    path = tmp_path / "model.safetensors"
    save_as(path, weights, to_dict(CONFIG) | change)
    with pytest.raises(UserError, match=f"model.safetensors: .*{message}"):
        load_model(path)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_model(tmp_path / "file" / "model.safetensors", DIFFMF(CONFIG))


def test_devices():
    assert select_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:x", "meta"):
        with pytest.raises(UserError, match=f"device: expected cpu, cuda or cuda:N, found '{name}'"):
            select_device(name)
    with pytest.raises(UserError, match=r"device: cuda:99 asked for, but \d+ CUDA devices are available"):
        select_device("cuda:99")
