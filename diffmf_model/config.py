"""Configuration: dataclasses with the paper's values as defaults, TOML files, and `section.key=value` overrides.

Every error is a UserError that names the key, what was found and what was expected.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUNDLED = Path(__file__).parent / "configs"


def _within(default: float, minimum: float, maximum: float = float("inf")):
    return field(default=default, metadata={"range": (minimum, maximum)})


@dataclass(frozen=True)
class ModelConfig:
    """The network and its ablations (Tables II to VI of the paper)."""

    d_model: int = _within(32, 2)  # C
    d_state: int = _within(16, 1, 256)  # N
    ssm_ratio: float = _within(2.0, 0.5, 64.0)  # D / C
    scalar_decay: bool = False  # one decay per channel for all states (the SSD form of A)
    patch_size: int = _within(1, 1, 16)  # pixels of a token along either axis; 1 in the paper's network
    stages: int = _within(4, 1)
    gated: bool = True  # the VSS block's multiplicative branch z
    mlp_ratio: float = _within(0.0, 0.0)  # the VSS block's MLP; 0 for none
    drop_path: float = _within(0.0, 0.0, 0.99)
    extraction: bool = True
    guidance: Literal["infrared_first", "visible_first", "parallel", "none"] = "infrared_first"
    channel_exchange: Literal["direct", "reproject", "off"] = "direct"
    exchange: Literal["mutual", "from_visible", "from_infrared", "none"] = "mutual"
    reweighting: bool = True
    residual: bool = True
    gate: Literal["eq8", "fig2"] = "eq8"
    spatial_exchange: bool = True
    decoder_layers: int = _within(1, 1)  # convolutions before the one that makes the image
    decoder_ratio: float = _within(1.0, 0.1, 64.0)  # their width / C


@dataclass(frozen=True)
class LossConfig:
    """Weights of Eq. 14 (lambda 1, 2, 3) and of Eq. 11 (w 1, 2), and what the fused image is compared with."""

    target: Literal["maximum", "salient"] = "maximum"  # Eqs. 12 and 13, or `loss.salient_target`
    contrast: float = _within(1.0, 0.0)  # salient: gain of the intensities
    level: float = _within(0.5, 0.0, 1.0)  # salient: what mid-grey becomes
    toe: float = _within(0.08, 0.01, 0.5)  # salient: intensities this near to 0 are compressed
    shoulder: float = _within(0.08, 0.01, 0.5)  # salient: intensities this near to 1 are compressed
    detail: float = _within(1.0, 0.0)  # salient: gain of the gradients
    shared: float = _within(0.0, 0.0)  # salient: part of both sources that is added to the chosen one
    regions: float = _within(0.0, 0.0)  # salient: how much the intensities follow the choice of the gradients
    window: float = _within(4.0, 0.5)  # salient: sigma, in pixels, of the regions that choose the gradients
    ssim: float = _within(10.0, 0.0)
    texture: float = _within(20.0, 0.0)
    intensity: float = _within(20.0, 0.0)
    ssim_infrared: float = _within(0.5, 0.0)
    ssim_visible: float = _within(0.5, 0.0)


@dataclass(frozen=True)
class DataConfig:
    crop_size: int = _within(128, 11)  # pixels; 11 is the SSIM window
    batch_size: int = _within(4, 1)  # per process
    jitter: float = _within(0.0, 0.0, 0.9)  # how far contrast and exposure of the sources vary, as a part
    workers: int = _within(0, 0)  # 0 loads in the training process, from memory


@dataclass(frozen=True)
class TrainConfig:
    weights: str = ""  # start from a model file, or from bundled weights by name; empty for random values
    epochs: int = _within(46, 1)
    lr: float = _within(2e-5, 0.0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = _within(0, 0)
    clip_norm: float = _within(1.0, 0.0)  # gradient norm; 0 for no clipping
    ema: float = _within(0.0, 0.0, 0.99999)  # decay of the averaged weights; 0 for none
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # the training step's network by torch.compile
    seed: int = _within(0, 0, 2**63 - 1)
    validate_epochs: int = _within(1, 1)
    save_steps: int = _within(200, 1)
    max_minutes: float = _within(0.0, 0.0)  # stop after saving; 0 for no limit
    fit_minutes: float = _within(0.0, 0.0)  # plan no more steps than this time allows, measured at the start; 0 for all
    best_by: str = "VIF+Qabf+SSIM"  # validation metrics to add up and maximize, or "loss" to minimize


@dataclass(frozen=True)
class LoggingConfig:
    tensorboard: bool = True
    scalar_steps: int = _within(10, 1)
    images: int = _within(2, 0)  # validation pairs shown in TensorBoard


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    logging: LoggingConfig = LoggingConfig()


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Declares --config, for `load_config`."""
    parser.add_argument("--config", metavar="FILE", help=f"TOML file, or a bundled configuration: {_bundled_names()}")


def load_config(file: str | Path | None = None, overrides: list[str] = (), base: Config | None = None) -> Config:
    """`base` (the defaults), then the TOML file's values, then the `section.key=value` overrides.

    file: a path, or the name of a bundled configuration such as "paper".
    Raises UserError for a missing or malformed file and for unknown keys or values.
    """
    config = base or Config()
    if file is not None:
        config = updated(config, _read_toml(file), where=f"{file}: ")
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot):
            raise UserError(f"override {override!r}: expected section.key=value, such as train.epochs=10")
        config = updated(config, {section: {name: text}}, parse=True)
    return config


def updated(config: Config, tables: dict[str, Any], where: str = "", parse: bool = False) -> Config:
    """`config` with the values of {section: {key: value}}; with `parse` the values are text. Raises UserError."""
    if not isinstance(tables, dict):
        raise UserError(f"{where}expected sections {_names(Config)}, found {tables!r}")
    for section, values in tables.items():
        if section not in {f.name for f in fields(Config)}:
            raise UserError(f"{where}unknown section {section!r}; expected one of {_names(Config)}")
        current = getattr(config, section)
        if not isinstance(values, dict):
            raise UserError(f"{where}{section}: expected a table of settings, found {values!r}")
        types = get_type_hints(type(current))
        known = {f.name: f for f in fields(current)}
        checked = {}
        for name, value in values.items():
            key = f"{where}{section}.{name}"
            if name not in known:
                raise UserError(f"{key}: unknown setting; {section} has {_names(type(current))}")
            checked[name] = _checked(key, value, types[name], known[name].metadata.get("range"), parse)
        config = replace(config, **{section: replace(current, **checked)})
    return config


def to_dict(config) -> dict[str, Any]:
    """A configuration, or one section of it, as plain values that `updated` takes back."""
    return asdict(config)


def _checked(key: str, value: Any, kind: Any, limits: tuple[float, float] | None, parse: bool) -> Any:
    if get_origin(kind) is Literal:
        accepted, expected = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    elif kind is bool:
        value = {"true": True, "false": False}.get(value.lower(), value) if parse else value
        accepted, expected = isinstance(value, bool), "true or false"
    elif kind is str:
        accepted, expected = isinstance(value, str), "text"
    else:
        value = _number(value, kind) if parse else value
        accepted = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        low, high = limits
        accepted = accepted and low <= value <= high
        expected = f"{'a number' if kind is float else 'an integer'} from {low:g} to {high:g}"
    if not accepted:
        raise UserError(f"{key}: expected {expected}, found {value!r}")
    return float(value) if kind is float else value


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text  # refused, and shown, by the check


def _names(section: type) -> str:
    return ", ".join(f.name for f in fields(section))


def _bundled_names() -> str:
    return ", ".join(sorted(p.stem for p in BUNDLED.glob("*.toml")))


def _read_toml(file: str | Path) -> dict[str, Any]:
    bundled = BUNDLED / f"{file}.toml"
    path = bundled if bundled.is_file() and not Path(file).is_file() else Path(file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{file}: cannot be read ({reason}); expected a TOML file or one of {_bundled_names()}"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: not a TOML file ({error})") from error
