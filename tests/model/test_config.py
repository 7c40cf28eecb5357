"""Configuration files and overrides."""

import pytest

from diffmf_model.config import Config, load_config, to_dict, updated
from diffmf_model.errors import UserError


def test_defaults_are_the_paper_s():
    config = load_config()
    assert (config.model.d_model, config.model.d_state, config.model.stages) == (32, 16, 4)
    assert (config.train.lr, config.train.epochs, config.model.guidance) == (2e-5, 46, "infrared_first")
    assert load_config("paper").data.batch_size == 2
    assert load_config("roadscene").train.schedule == "cosine"


def test_file_then_overrides(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('[model]\nd_model = 8\nguidance = "parallel"\n[train]\nlr = 1\n')
    config = load_config(file, ["model.d_model=16", "model.residual=false", "train.max_minutes=2.5", "model.gate=fig2"])
    assert (config.model.d_model, config.model.guidance, config.model.residual) == (16, "parallel", False)
    assert config.train.lr == 1.0 and config.train.max_minutes == 2.5 and config.model.gate == "fig2"
    assert updated(Config(), to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "override 'epochs=3': expected section.key=value"),
        ("train.epochs", "override 'train.epochs': expected section.key=value"),
        ("trian.epochs=3", "unknown section 'trian'; expected one of model, loss, data, train, logging"),
        ("train.epoch=3", "train.epoch: unknown setting; train has weights, epochs"),
        ("train.epochs=three", "train.epochs: expected an integer from 1 to inf, found 'three'"),
        ("train.epochs=0", "train.epochs: expected an integer from 1 to inf, found 0"),
        ("train.epochs=2.5", "train.epochs: expected an integer from 1 to inf, found '2.5'"),
        ("train.lr=nan", "train.lr: expected a number from 0 to inf, found nan"),
        ("model.residual=maybe", "model.residual: expected true or false, found 'maybe'"),
        ("model.guidance=v3", "model.guidance: expected one of infrared_first, .*, found 'v3'"),
        ("data.crop_size=8", "data.crop_size: expected an integer from 11 to inf, found 8"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "my.toml: not a TOML file"),
        ("[model]\nwidth = 3\n", "my.toml: model.width: unknown setting"),
        ("[model]\nd_model = true\n", "my.toml: model.d_model: expected an integer from 2 to inf, found True"),
        ('[train]\nlr = "fast"\n', "my.toml: train.lr: expected a number from 0 to inf, found 'fast'"),
        ("model = 3\n", "my.toml: model: expected a table of settings, found 3"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(file)


def test_a_folder_does_not_hide_a_bundled_configuration(tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("small").model.d_model == 16


def test_missing_file_lists_the_bundled_names():
    with pytest.raises(UserError, match=r"absent.toml: cannot be read .*one of paper, roadscene, small"):
        load_config("absent.toml")
