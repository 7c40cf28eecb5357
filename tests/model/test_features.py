"""Fig. 8's views."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffmf_model import cli
from diffmf_model.checkpoint import save_model
from diffmf_model.config import ModelConfig
from diffmf_model.features import feature_views
from diffmf_model.network import DIFFMF

TINY = {"d_model": 4, "d_state": 2, "stages": 2}


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(3)
    Image.fromarray(random.integers(0, 256, (7, 9), dtype=np.uint8)).save(tmp_path / "ir.png")
    Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).save(tmp_path / "vi.png")
    save_model(tmp_path / "w.safetensors", DIFFMF(ModelConfig(**TINY)))
    return tmp_path


def test_views_are_the_modules_outputs():
    model = DIFFMF(ModelConfig(**TINY)).eval()
    ir, vi = torch.rand(2, 1, 1, 6, 5)
    views = feature_views(model, ir, vi)
    exchange = ["channel_exchange_infrared", "channel_exchange_visible"]
    assert list(views) == ["difference_1", "difference_2", *exchange, "spatial_exchange"]
    with torch.no_grad():
        stems = [stem(image.permute(0, 2, 3, 1)) for stem, image in ((model.stem_ir, ir), (model.stem_vi, vi))]
        _, shared = model.extraction[0](torch.stack(stems), torch.stack(stems))
    torch.testing.assert_close(views["difference_1"], torch.tanh((shared[1] - shared[0]).abs())[0].mean(-1))
    assert all(view.shape == (6, 5) and view.std() > 0 for view in views.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_left_out_modules_have_no_view():
    config = ModelConfig(**TINY, extraction=False, channel_exchange="off", spatial_exchange=False)
    assert feature_views(DIFFMF(config), *torch.rand(2, 1, 1, 4, 4)) == {}


def test_command_writes_colour_pictures(files, capsys):
    out = files / "views"
    arguments = ["features", str(files / "ir.png"), str(files / "vi.png"), "--output", str(out), "--device", "cpu"]
    assert cli.main([*arguments, "--weights", str(files / "w.safetensors")]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "channel_exchange_infrared.png",
        "channel_exchange_visible.png",
        "difference_1.png",
        "difference_2.png",
        "spatial_exchange.png",
    ]
    picture = np.asarray(Image.open(out / "difference_1.png"))
    # viridis from its first colour to its last
    assert picture.shape == (7, 9, 3) and {(68, 1, 84), (253, 231, 37)} <= {
        tuple(p) for p in picture.reshape(-1, 3).tolist()
    }


def test_errors_are_one_line(files, capsys):
    Image.new("L", (8, 7)).save(files / "small.png")
    arguments = ["features", str(files / "ir.png"), str(files / "small.png"), "--output", str(files / "o")]
    assert cli.main([*arguments, "--weights", str(files / "w.safetensors")]) == 2
    assert "must have one size" in capsys.readouterr().err
    assert cli.main([*arguments, "--colormap", "mud"]) == 2
    assert "expected a matplotlib colour map such as viridis, found 'mud'" in capsys.readouterr().err
