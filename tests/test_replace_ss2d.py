"""replace_ss2d on a layer that is written out in PyTorch, as VMamba and the networks that copy its SS2D have it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

from diffmf_ops import SS2D, reference, replace_ss2d


class ScanLayer(nn.Module):
    """(B, H, W, C) -> the same shape. Everything that such layers differ in is an argument."""

    def __init__(
        self, channels=6, inner=7, states=3, rank=2, kernel_size=3, bias=False, conv_bias=True, gated=True, decays=None,
        dropout=0.0, paths=(0, 1, 2, 3), eps=1e-5, act=F.silu, out_act=nn.Identity, norm=True, gate_act=True,
    ):  # fmt: skip
        super().__init__()
        k, self.sizes, self.paths, self.inner = len(paths), (rank, states, states), paths, inner
        self.act = act() if isinstance(act, type) else act
        self.out_act, self.disable_z_act = out_act(), not gate_act
        self.in_proj = nn.Linear(channels, inner * (2 if gated else 1), bias)
        if kernel_size is not None:
            self.conv2d = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.randn(k, rank + 2 * states, inner) / inner**0.5)
        self.dt_projs_weight = nn.Parameter(torch.randn(k, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.randn(k, inner) - 4)
        self.A_logs = nn.Parameter(torch.randn(k * inner, decays or states))
        self.Ds = nn.Parameter(torch.ones(k * inner))
        self.out_norm = nn.LayerNorm(inner, eps) if norm else nn.Identity()
        self.out_proj = nn.Linear(inner, channels, bias)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x):
        x, *z = self.in_proj(x).split(self.inner, dim=-1)
        x = x.permute(0, 3, 1, 2)
        x = self.act(self.conv2d(x) if hasattr(self, "conv2d") else x)
        tokens = reference.cross_scan(x, self.paths)
        delta, B, C = torch.einsum("bkdl,kcd->bkcl", tokens, self.x_proj_weight).split(self.sizes, dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", delta, self.dt_projs_weight)
        y = reference.selective_scan(
            tokens.flatten(1, 2), delta.flatten(1, 2), -self.A_logs.exp().expand(-1, self.sizes[1]), B, C, self.Ds,
            delta_bias=self.dt_projs_bias.flatten(), delta_softplus=True,
        )  # fmt: skip
        y = reference.cross_merge(y.unflatten(1, (len(self.paths), -1)), x.shape[-2:], self.paths)
        y = self.out_act(self.out_norm(y.permute(0, 2, 3, 1)))
        for gate in z:
            y = y * (gate if self.disable_z_act else self.act(gate))
        y = self.out_proj(y)
        return y if self.dropout is None else self.dropout(y)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = ScanLayer(**options)
        self.layers = nn.Sequential(nn.LayerNorm(6), ScanLayer(**options))

    def forward(self, x):
        return self.layers(x + self.attention(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": False, "conv_bias": False, "bias": True, "kernel_size": 5},
        {"inner": 29, "states": 1, "rank": 1, "eps": 1e-3},
        {"decays": 1, "inner": 12},
        {"kernel_size": None},
        {"act": nn.GELU},
        {"gate_act": False, "out_act": nn.GELU, "norm": False},
    ],
    ids=str,
)
def test_same_values_same_parameters_and_gradients(options):
    network = Block(**options).eval()
    x = torch.randn(2, 4, 5, 6)
    names, parameters = zip(*network.named_parameters(), strict=True)
    expected = network(x)
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    assert replace_ss2d(network, ScanLayer) == 2
    assert isinstance(network.attention, SS2D) and isinstance(network.layers[1], SS2D)
    now = dict(network.named_parameters())
    assert set(now) == set(names) and all(now[n] is p for n, p in zip(names, parameters, strict=True))
    found = network(x)
    assert_close(found, expected, 2e-6)  # largest of 400: 2.9e-7
    for name, g, e in zip(
        names, torch.autograd.grad(found.square().sum(), parameters), gradients, strict=True
    ):  # largest of 400: 4.0e-6
        assert_close(g, e, 4e-5, name)


def test_channels_first():
    class ChannelsFirst(ScanLayer):
        channel_first = True

        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    network, x = nn.Sequential(ChannelsFirst()), torch.randn(2, 6, 4, 5)
    expected = network(x)
    replace_ss2d(network, ScanLayer)
    assert_close(network(x), expected, 2e-6)


def test_keeps_the_order_of_parameters():
    """Optimizers know their parameters by it."""
    layer = ScanLayer()
    layer.in_proj = layer._modules.pop("in_proj")
    layer.x_proj_weight = layer._parameters.pop("x_proj_weight")
    network = nn.Sequential(layer)
    names = [name for name, _ in network.named_parameters()]
    replace_ss2d(network, ScanLayer)
    assert names == [name for name, _ in network.named_parameters()]


def test_keeps_dropout_mode_dtype_and_sharing():
    network = nn.ModuleList([ScanLayer(dropout=0.25).half()] * 2).train()
    network[0].A_logs.requires_grad_(False)
    assert replace_ss2d(network, ScanLayer) == 2
    assert network[0] is network[1] and network[0].training and network[0].dropout.p == 0.25
    assert network[0].out_proj.weight.dtype == torch.float16 and not network[0].A_logs.requires_grad


def test_layers_whose_output_starts_at_zero_are_compared_too():
    def zero(layer):
        nn.init.zeros_(layer.out_proj.weight)
        return layer

    network = nn.Sequential(zero(ScanLayer()))
    assert replace_ss2d(network, ScanLayer) == 1
    assert not network[0].out_proj.weight.any()
    with pytest.raises(ValueError, match="relative difference"):
        replace_ss2d(nn.Sequential(zero(ScanLayer(paths=(1, 0, 2, 3)))), ScanLayer)


def test_whatever_the_default_dtype():
    network = nn.Sequential(ScanLayer())
    torch.set_default_dtype(torch.float64)
    try:
        assert replace_ss2d(network, ScanLayer) == 1
    finally:
        torch.set_default_dtype(torch.float32)
    assert network[0].A_logs.dtype == torch.float32


def fresh(layer):
    """As VMamba's networks start: next to the biases the scan hardly shows in the output."""
    for linear in (layer.in_proj, layer.out_proj):
        nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.uniform_(layer.x_proj_weight, -0.1, 0.1)
    return layer


class DropsInTraining(ScanLayer):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Windowed(ScanLayer):
    """8 x 8 pixels at a time."""

    def forward(self, x):
        rows = [[super(Windowed, self).forward(w) for w in row.split(8, dim=2)] for row in x.split(8, dim=1)]
        return torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)


class Transposed(ScanLayer):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Flat(ScanLayer):
    def forward(self, x):
        return super().forward(x).flatten(1, 2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: ScanLayer(paths=(1, 0, 2, 3)), "relative difference"),
        (lambda: ScanLayer(paths=(0, 1, 2, 1)), "relative difference"),
        (lambda: ScanLayer(act=F.gelu), "relative difference"),
        (lambda: fresh(ScanLayer(paths=(0, 0, 0, 0), states=1)), "relative difference"),
        (lambda: fresh(ScanLayer(paths=(0, 0, 2, 2))), "relative difference"),
        (lambda: DropsInTraining(), "relative difference"),
        (lambda: Windowed(), "relative difference"),
        (lambda: ScanLayer(act=nn.BatchNorm2d(7)), "buffers act.running_mean"),
        (lambda: ScanLayer(kernel_size=4), "d_conv: expected an odd size"),
        (lambda: ScanLayer().to("meta"), "on the meta device"),
        (lambda: Transposed(), "relative difference"),
        (lambda: Flat(), r"returns .*, expected \(1, 5, 7, 6\)"),
        (lambda: ScanLayer(paths=(0, 1)), r"x_proj_weight \(2, 8, 7\), expected .*x_proj_weight \(4, 8, 7\)"),
        (lambda: nn.Linear(3, 3), "expected those of VMamba's SS2D"),
    ],
)
def test_refuses_what_computes_something_else(layer, message):
    odd = layer()
    network = nn.Sequential(ScanLayer(), nn.Sequential(odd))
    with pytest.raises(ValueError, match=message) as error:
        replace_ss2d(network, nn.Linear if isinstance(odd, nn.Linear) else ScanLayer)
    assert "1.0: " in str(error.value) or isinstance(odd, nn.Linear)
    assert type(network[0]) is ScanLayer and network[1][0] is odd, "nothing may be replaced"


def test_needs_a_layer_to_replace():
    with pytest.raises(ValueError, match="found no ScanLayer inside a Sequential"):
        replace_ss2d(nn.Sequential(nn.Linear(2, 2)), ScanLayer)
    with pytest.raises(ValueError, match="found no ScanLayer inside a ScanLayer, only itself"):
        replace_ss2d(ScanLayer(), ScanLayer)
    with pytest.raises(TypeError, match="network: a str"):
        replace_ss2d("vmamba", ScanLayer)
    with pytest.raises(TypeError, match="layer: 'SS2D'"):
        replace_ss2d(nn.Sequential(ScanLayer()), "SS2D")


def test_names_the_layer_that_does_not_run():
    class Broken(ScanLayer):
        def forward(self, x):
            raise OSError("no such device")

    with pytest.raises(
        RuntimeError, match=r"0: a Broken cannot be run on cpu with an input \(1, 5, 7, 6\): no such device"
    ):
        replace_ss2d(nn.Sequential(Broken()), Broken)
