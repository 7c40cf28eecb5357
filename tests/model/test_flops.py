"""The operation count against the paper's total and against hand-computed modules."""

import pytest

from diffmf_model import cli
from diffmf_model.config import ModelConfig, load_config
from diffmf_model.flops import PAPER_SSM, count


def test_total_is_the_paper_s():
    costs, transformer = count(ModelConfig(), 512, 512)
    assert costs[""].total == pytest.approx(PAPER_SSM, rel=0.05)
    assert transformer > 100 * costs[""].total


def test_modules_by_hand():
    """An extraction stage at C = 8, N = 4 (D = 16, R = 1): four VSS blocks and two 3x3 convolutions."""
    pixels = 12 * 10
    costs, _ = count(ModelConfig(d_model=8, d_state=4), 12, 10)
    stage = costs["extraction.2"]
    assert stage.scan == 4 * 4 * (9 * pixels * 16 * 4 + pixels * 16)
    assert stage.linear == 4 * pixels * (8 * 32 + 16 * 4 * (1 + 2 * 4) + 4 * 16 * 1 + 16 * 8)
    assert stage.convolution == 4 * pixels * 16 * 9 + 2 * pixels * 8 * 8 * 9
    assert costs["stem_ir"].total == pixels * (8 * 9 + 8 * 8 * 9)
    parts = [
        c.total for name, c in costs.items() if name and name.count(".") == name.startswith(("extraction", "spatial"))
    ]
    assert costs[""].total == pytest.approx(sum(parts))


def test_transformer_variant_by_hand():
    """Without channel and spatial exchange, one stage: four Restormer blocks of C = 8 instead of four VSS blocks."""
    pixels, hidden = 6 * 7, 21
    config = ModelConfig(d_model=8, stages=1, channel_exchange="off", spatial_exchange=False)
    costs, transformer = count(config, 6, 7)
    block = 4 * pixels**2 * 8 + pixels * (4 * 8 * 8 + 27 * 8 + 3 * 8 * hidden + 18 * hidden)
    vss = costs["extraction.0.self_block"].total + costs["extraction.0.share_block"].total
    assert transformer == costs[""].total - vss + 4 * block


def test_the_small_network_is_twenty_times_cheaper():
    full, small = (count(load_config(name).model, 64, 64)[0][""].total for name in (None, "small"))
    assert full > 20 * small


def test_command(capsys):
    assert cli.main(["flops", "--height", "64", "--width", "64", "model.d_model=8", "model.stages=2"]) == 0
    out = capsys.readouterr().out
    assert "393.871" in out and "336852.764" in out and "extraction.1" in out and "extraction.2" not in out
    assert "2 extraction stages, 3x3 convolutions of C channels (1*C in the decoder)," in out
    assert cli.main(["flops", "--height", "64", "--width", "64", "--config", "small"]) == 0
    assert "3x3 convolutions of C channels (4*C in the decoder)," in capsys.readouterr().out
    assert cli.main(["flops", "--height", "0"]) == 2
    assert capsys.readouterr().err.strip() == "diffmf: error: --height: expected at least 1, found 0"
