"""The fused scan in VMamba's networks and in those that carry a copy of its SS2D layer, as MambaIR and VM-UNet do."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .modules import SS2D, LayerNorm

TOLERANCE = 1e-2  # relative L2: equal layers differ by 1e-6 in float32, those with a wrong path by 0.1 and more


def replace_ss2d(network: nn.Module, layer: type[nn.Module]) -> int:
    """Replaces every instance of `layer` inside the network, in place, by `SS2D`; returns how many there were.

    `layer` is the network's own class, for example `basicsr.archs.mambair_arch.SS2D`: (B, H, W, C) -> the same shape,
    or (B, C, H, W) where its attribute channel_first says so, with the parameters of VMamba's SS2D. They stay the same
    objects in the same order: checkpoints, optimizers and weight sharing are not touched. Forward hooks of the replaced
    layers are gone.

    Each layer is run beside its replacement on small random pictures, as it is and, training, with random parameters,
    in float32 on its parameters' device (move the network to the GPU first where its scan needs one), and has to give
    the same values.

    Raises:
        ValueError: the network holds no such layer, or one with other parameters or with buffers, or one that computes
            something else.
        RuntimeError: a layer cannot be run.
        TypeError: not a network, or not a class. Nothing is replaced in any of these cases.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: a {type(network).__name__}, expected a torch.nn.Module")
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(f"layer: {layer!r}, expected a class of torch.nn.Module")
    places = [
        (parent, f"{prefix}.{name}".lstrip("."), name, child)
        for prefix, parent in network.named_modules()
        for name, child in parent._modules.items()  # a layer may be held twice
        if isinstance(child, layer) and not isinstance(child, SS2D)
    ]
    if not places:
        inside = f"inside a {type(network).__name__}" + (", only itself" if isinstance(network, layer) else "")
        raise ValueError(f"network: found no {layer.__name__} {inside}, expected at least one")
    replacements = {}
    for _, path, _, old in places:
        if old not in replacements:
            replacements[old] = _replacement(path, old)
            _check_equal(path, old, replacements[old])
    for parent, _, name, old in places:
        parent.register_module(name, replacements[old])
    return len(places)


def _replacement(path: str, old: nn.Module) -> SS2D:
    """An SS2D that holds the parameters of the old layer."""
    parameters = dict(old.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    buffers = [name for name, _ in old.named_buffers()]
    if buffers:
        raise ValueError(f"{path}: buffers {', '.join(buffers)}, expected none, as in VMamba's SS2D")
    try:
        d_model, inner = shapes["out_proj.weight"]
        rank = shapes["dt_projs_weight"][-1]
        states = (shapes["x_proj_weight"][1] - rank) // 2
        kernel_size = shapes.get("conv2d.weight", (1,))[-1]
        gated = shapes["in_proj.weight"][0] != inner
        one_decay = shapes["A_logs"][1] == 1
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: parameters {shapes}, expected those of VMamba's SS2D") from error
    forward_type = "v05" if gated else "v05_noz"
    forward_type += "_nozact" if getattr(old, "disable_z_act", False) else ""
    forward_type += "" if "out_norm.weight" in shapes else "_onnone"
    dropout = getattr(old, "dropout", None)
    try:
        with torch.device("meta"):
            new = SS2D(
                d_model,
                states,
                math.nextafter(inner / d_model, math.inf),  # so that its product is not rounded below inner
                rank,
                d_conv=kernel_size,
                conv_bias="conv2d.bias" in shapes,
                dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
                bias="in_proj.bias" in shapes,
                forward_type=forward_type,
                channel_first=getattr(old, "channel_first", False),
                scalar_decay=one_decay and states > 1,
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = {name: tuple(parameter.shape) for name, parameter in new.named_parameters()}
    if shapes != expected:
        differing = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"{path}: parameters {', '.join(f'{name} {shapes.get(name)}' for name in differing)}, "
            f"expected as in VMamba's SS2D {', '.join(f'{name} {expected.get(name)}' for name in differing)}"
        )
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        new.get_submodule(module).register_parameter(leaf, parameter)
    for name in ("act", "out_act"):
        if isinstance(getattr(old, name, None), nn.Module):
            setattr(new, name, getattr(old, name))
    if isinstance(new.out_norm, LayerNorm):
        new.out_norm.eps = getattr(old.out_norm, "eps", new.out_norm.eps)
    for held, of_old in ((new._parameters, old._parameters), (new._modules, old._modules)):
        order = list(of_old)  # optimizers and averages of weights go by it
        for name in sorted(held, key=lambda name: order.index(name) if name in order else len(order)):
            held[name] = held.pop(name)
    return new.train(old.training)


@torch.no_grad()
def _check_equal(path: str, old: nn.Module, new: SS2D) -> None:
    """Runs both as they are, and in training with random parameters: at first those of a network may hide its scan."""
    device = new.out_proj.weight.device
    if device.type == "meta":
        raise ValueError(f"{path}: on the meta device, expected one that it can be run on")
    generator = torch.Generator("cpu").manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    for training, (batch, height, width) in ((False, (1, 5, 7)), (True, (2, 19, 10))):
        shape = (batch, new.d_model, height, width) if new.channel_first else (batch, height, width, new.d_model)
        picture = random(shape)
        try:
            layers = [copy.deepcopy(layer).float().train(training) for layer in (old, new)]
            if training:
                values = {name: _typical(name, random(p.shape)) for name, p in new.named_parameters()}
                for layer in layers:
                    if isinstance(getattr(layer, "dropout", None), nn.Dropout):
                        layer.dropout.p = 0.0
                    for name, parameter in layer.named_parameters():
                        parameter.copy_(values[name])
            with torch.autocast(device.type, enabled=False):
                expected, found = (layer(picture) for layer in layers)
        except Exception as error:
            text = f"{path}: a {type(old).__name__} cannot be run on {device} with an input {shape}: {error}"
            raise RuntimeError(text) from error
        if not isinstance(expected, Tensor) or expected.shape != found.shape:
            shown = getattr(expected, "shape", type(expected))
            raise ValueError(f"{path}: returns {shown}, expected {tuple(found.shape)}")
        error = ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()  # both may be zero
        if not error < TOLERANCE:
            raise ValueError(
                f"{path}: relative difference {error:.2g} to VMamba's SS2D, expected below {TOLERANCE}: "
                "other paths, scan, activation, norm or gate"
            )


def _typical(name: str, values: Tensor) -> Tensor:
    """Standard normal values as the parameter of that name: with these every part of a layer shows in its output."""
    if name == "dt_projs_bias":
        return values - 2  # steps of about 0.1
    if name == "A_logs":
        return values
    if name == "out_norm.weight":
        return 1 + values / 10
    if values.dim() == 1:  # biases and the skip: small beside the scan
        return values / 10
    fan_in = values[0, 0].numel() if name in ("conv2d.weight", "x_proj_weight") else values.shape[-1]
    return values / fan_in**0.5
