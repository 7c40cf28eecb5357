"""Model files and training states as safetensors: written whole or not at all, never unpickled.

A model file holds the network's parameters and, in its metadata, its configuration. A training state adds the
optimizer, the averaged weights and the position in the run, so that one file is one consistent moment of a run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import Config, to_dict, updated
from .errors import UserError
from .images import atomic_write
from .network import DIFFMF

ASSETS = Path(__file__).parent / "assets"
BUNDLED = {
    "full": ASSETS / "diffmf.safetensors",
    "small": ASSETS / "diffmf-s.safetensors",
}
MODEL_KIND, STATE_KIND = "diffmf model", "diffmf training state"
METADATA = "diffmf"  # one entry, since safetensors writes several in any order


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Declares --device, for `select_device`."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Declares --weights, for `load_model`."""
    parser.add_argument(
        "--weights",
        metavar="W",
        help=f"model file, or weights that the package carries: {', '.join(BUNDLED)} (default: full)",
    )


def select_device(name: str | None = None) -> torch.device:
    """The named device; None is CUDA where there is one, else the CPU. Raises UserError for a device that is absent."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: expected cpu, cuda or cuda:N, found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu, cuda or cuda:N, found {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device: {name} asked for, but {count} CUDA devices are available")
    # With its index: torch.cuda.set_device takes no device without.
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def save_model(path: str | Path, model: DIFFMF) -> None:
    """Writes the parameters and the configuration, atomically. Raises UserError when the file cannot be written."""
    _write(path, dict(model.state_dict()), MODEL_KIND, {"model": to_dict(model.config)})


def load_model(path: str | Path | None = None, device: str | torch.device = "cpu") -> DIFFMF:
    """The network of a model file, on `device`, in eval mode; None loads the weights that the package carries, and so
    does the name of a set of them, "full" or "small" (diffmf-s).

    Raises UserError for a file that is missing, is not safetensors, is truncated, was not written by `save_model`, or
    whose tensors do not fit its configuration.
    """
    path = resolve_weights(path)
    tensors, info = _read(path, MODEL_KIND)
    config = updated(Config(), {"model": info.get("model", {})}, where=f"{path}: ").model
    with torch.device("meta"):
        model = DIFFMF(config)
    _check_fit(path, model, tensors)
    model.load_state_dict(tensors, assign=True)
    return model.to(device, torch.float32).eval()


def resolve_weights(path: str | Path | None) -> Path:
    """The model file that `load_model` reads: a name in BUNDLED, unless there is a file of that name, or a path."""
    if path is None:
        return BUNDLED["full"]
    return Path(path) if Path(path).is_file() else BUNDLED.get(str(path), Path(path))


def save_training_state(
    path: str | Path, model: DIFFMF, optimizer: torch.optim.Optimizer, averaged: nn.Module | None, info: dict[str, Any]
) -> None:
    """Writes everything that a run continues from. info: plain values; the configuration is one of them."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if averaged is not None:
        tensors |= {f"averaged/{name}": value for name, value in averaged.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{key}/{names[index]}": value for key, value in values.items()}
    _write(path, tensors, STATE_KIND, info)


def read_training_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the info of a training state, on the CPU. Raises UserError as `load_model` does."""
    return _read(path, STATE_KIND)


def restore_training_state(
    path: str | Path,
    tensors: dict[str, Tensor],
    model: DIFFMF,
    optimizer: torch.optim.Optimizer,
    averaged: nn.Module | None,
) -> None:
    """Puts the tensors of `read_training_state` back in place. Raises UserError where they do not fit."""
    weights = _under("model/", tensors)
    _check_fit(path, model, weights)
    model.load_state_dict(weights)
    if averaged is not None:
        weights = _under("averaged/", tensors)
        _check_fit(path, averaged, weights)
        averaged.load_state_dict(weights)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in _under("optimizer/", tensors).items():
        key, _, parameter = name.partition("/")
        moments.setdefault(parameter, {})[key] = value
    names = [name for name, _ in model.named_parameters()]
    state = {index: moments[name] for index, name in enumerate(names) if name in moments}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _write(path: str | Path, tensors: dict[str, Tensor], kind: str, info: dict[str, Any]) -> None:
    plain = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    data = save(plain, metadata={METADATA: json.dumps({"kind": kind, **info})})
    with atomic_write(path) as file:
        file.write(data)


def _read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        names = f", or one of {', '.join(BUNDLED)}" if kind == MODEL_KIND else ""
        raise UserError(f"{path}: no such file; expected a {kind} (.safetensors){names}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({error})") from error
    try:
        info = json.loads(metadata.get(METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: its metadata is damaged ({error})") from error
    found = info.get("kind", "a file without that mark") if isinstance(info, dict) else "damaged metadata"
    if found != kind:
        raise UserError(f"{path}: expected a {kind}, found {found}")
    return tensors, info


def _check_fit(path: str | Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise UserError(f"{path}: {len(missing)} tensors of its configuration are missing, the first is {missing[0]}")
    if extra:
        raise UserError(f"{path}: {len(extra)} tensors are not in its configuration, the first is {extra[0]}")
    for name, value in expected.items():
        if tensors[name].shape != value.shape:
            found = tuple(tensors[name].shape)
            raise UserError(f"{path}: {name} has shape {found}, its configuration asks for {tuple(value.shape)}")
