"""The fused scan in VMamba's networks and in those that carry a copy of its SS2D layer, as MambaIR and VM-UNet do."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .modules import SS2D

TOLERANCE = 1e-2  # relative L2: equal layers differ by 7e-7 in float32, those with a wrong path by 0.09 and more


def replace_ss2d(network: nn.Module, layer: type[nn.Module]) -> int:
    """Replaces every instance of `layer` inside the network, in place, by `SS2D`; returns how many there were.

    `layer` is the network's own class, for example `basicsr.archs.mambair_arch.SS2D`: (B, H, W, C) -> the same shape,
    or (B, C, H, W) where its attribute channel_first says so, with the parameters of VMamba's SS2D. They stay the same
    objects: checkpoints, optimizers and weight sharing are not touched. Forward hooks of the replaced layers are gone.

    Each layer is run beside its replacement on a small random picture, in float32, on its parameters' device (move the
    network to the GPU first where its scan needs one), and has to give the same values.

    Raises:
        ValueError: the network holds no such layer, or one with other parameters, or one that computes something else.
        RuntimeError: a layer cannot be run. Nothing is replaced in either case.
    """
    places = [
        (parent, f"{prefix}.{name}".lstrip("."), name, child)
        for prefix, parent in network.named_modules()
        for name, child in parent._modules.items()  # a layer may be held twice
        if isinstance(child, layer) and not isinstance(child, SS2D)
    ]
    if not places:
        raise ValueError(f"network: found no {layer.__name__} inside a {type(network).__name__}, expected at least one")
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
    parameters = dict(old.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    try:
        d_model, inner = shapes["out_proj.weight"]
        rank = shapes["dt_projs_weight"][-1]
        states = (shapes["x_proj_weight"][1] - rank) // 2
        kernel_size = shapes.get("conv2d.weight", (1,))[-1]
        gated = shapes["in_proj.weight"][0] != inner
        one_decay = shapes["A_logs"][1] == 1
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: parameters {shapes}, expected those of VMamba's SS2D") from error
    dropout = getattr(old, "dropout", None)
    with torch.device("meta"):
        new = SS2D(
            d_model,
            states,
            math.nextafter(inner / d_model, math.inf),  # so that its product with d_model is not rounded below inner
            rank,
            d_conv=kernel_size,
            conv_bias="conv2d.bias" in shapes,
            dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
            bias="in_proj.bias" in shapes,
            forward_type="v05" if gated else "v05_noz",
            channel_first=getattr(old, "channel_first", False),
            scalar_decay=one_decay and states > 1,
        )
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
    new.out_norm.eps = old.out_norm.eps
    return new.train(old.training)


@torch.no_grad()
def _check_equal(path: str, old: nn.Module, new: SS2D) -> None:
    """Runs both as they are and without the skip, beside which the scan hardly shows before training.

    Parameters that are zero, as the last of a residual branch may be at first, would hide all before them: both get the
    same random ones.
    """
    device = new.out_proj.weight.device
    generator = torch.Generator("cpu").manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    picture = random((1, new.d_model, 5, 7) if new.channel_first else (1, 5, 7, new.d_model))
    old, new = (copy.deepcopy(layer).float().eval() for layer in (old, new))
    of_old = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if not parameter.any():
            of_old[name].copy_(parameter.copy_(random(parameter.shape)))
    for skip in (1, 0):
        outputs = []
        for layer in (old, new):
            layer.Ds *= skip
            with torch.autocast(device.type, enabled=False):
                try:
                    outputs.append(layer(picture))
                except Exception as error:
                    raise RuntimeError(f"{path}: a {type(layer).__name__} cannot be run on {device}") from error
        expected, found = outputs
        if not isinstance(expected, Tensor) or expected.shape != found.shape:
            shown = getattr(expected, "shape", type(expected))
            raise ValueError(f"{path}: returns {shown}, expected {tuple(found.shape)}")
        error = ((found - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE:
            raise ValueError(f"{path}: relative difference {error:.2g} to VMamba's SS2D, expected below {TOLERANCE}")
