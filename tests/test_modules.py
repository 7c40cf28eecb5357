"""SS2D and VSSBlock against VMamba's definition, restated here in plain float64 PyTorch."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

from diffmf_ops.modules import SS2D, VSSBlock, _one_more_rank, linear, project
from diffmf_ops.reference import EXCHANGE_SOURCES

# Relative L2 errors measured: fp32 up to 2.2e-7; bf16 autocast up to 6.3e-3.
FP32, BF16 = 3e-6, 3e-2


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def scan_tokens(u, delta, A, B, C, D):
    """Mamba's selective scan of one sequence: u, delta (D, L), A (D, N), B, C (N, L), D (D,) -> (D, L)."""
    h, y = torch.zeros_like(A), torch.empty_like(u)
    for t in range(u.shape[1]):
        h = (delta[:, t, None] * A).exp() * h + delta[:, t, None] * B[None, :, t] * u[:, t, None]
        y[:, t] = h @ C[:, t] + D * u[:, t]
    return y


def routes(image):
    """(C, H, W) -> its four routes (C, L): rows, columns, and both backwards."""
    rows, columns = image.flatten(1), image.transpose(1, 2).flatten(1)
    return [rows, columns, rows.flip(1), columns.flip(1)]


def unroute(tokens, k, height, width):
    tokens = tokens.flip(1) if k >= 2 else tokens
    return tokens.unflatten(1, (width, height)).transpose(1, 2) if k % 2 else tokens.unflatten(1, (height, width))


def path_parameters(p, k):
    inner = p["dt_projs_weight"].shape[1]
    part = slice(k * inner, (k + 1) * inner)
    return -p["A_logs"][part].exp(), p["Ds"][part], p["dt_projs_weight"][k], p["dt_projs_bias"][k]


def conv_branch(p, x, gated=True):
    """in_proj, the depthwise convolution and SiLU: x (C, H, W) -> (D, H, W), z."""
    x = torch.einsum("oc,chw->ohw", p["in_proj.weight"], x)
    x, z = x.chunk(2) if gated else (x, None)
    if "conv2d.weight" in p:
        x = F.conv2d(x[None], p["conv2d.weight"], p.get("conv2d.bias"), padding=1, groups=len(x))[0]
    return F.silu(x), z


def split_projection(p, route, k):
    rank = p["dt_projs_weight"].shape[2]
    states = p["A_logs"].shape[1]
    return (p["x_proj_weight"][k] @ route).split([rank, states, states])


def ss2d_of(p, own, other=None):
    """The scan of `own` (D, H, W), with B and C from `other`'s parameters and tokens where given -> (D, H, W)."""
    source_p, source = other or (p, own)
    merged = 0
    for k in range(4):
        A, D, dt_weight, dt_bias = path_parameters(p, k)
        low_rank = split_projection(p, routes(own)[k], k)[0]
        delta = F.softplus(dt_weight @ low_rank + dt_bias[:, None])
        _, B, C = split_projection(source_p, routes(source)[k], k)
        merged = merged + unroute(scan_tokens(routes(own)[k], delta, A, B, C, D), k, *own.shape[1:])
    return merged


def finish(p, y, z, options):
    if "out_norm.weight" in p:
        y = F.layer_norm(y.permute(1, 2, 0), (len(y),), p["out_norm.weight"], p["out_norm.bias"]).permute(2, 0, 1)
    y = F.gelu(y) if "oact" in options else y
    if z is not None:
        y = y * (z if "nozact" in options else F.silu(z))
    return torch.einsum("oc,chw->ohw", p["out_proj.weight"], y)


def parameters_of(module, prefix="", modality=None):
    """float64 parameters below prefix, of one modality of a two-modality module where given."""
    values = {
        n.removeprefix(prefix): v.detach().double() for n, v in module.state_dict().items() if n.startswith(prefix)
    }
    return values if modality is None else {name: value[modality] for name, value in values.items()}


def randomize(module):
    """Norms and biases away from their trivial start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def test_parameters_are_vmamba_s():
    """vmambav2v_tiny_224 (s1l8): d_state 1, ssm_ratio 1, no convolution bias, v05_noz, MLP ratio 4."""
    block = VSSBlock(96, ssm_d_state=1, ssm_ratio=1.0, ssm_conv_bias=False, forward_type="v05_noz", channel_first=True)
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    assert shapes == {
        "norm.weight": (96,),
        "norm.bias": (96,),
        "op.x_proj_weight": (4, 8, 96),
        "op.A_logs": (384, 1),
        "op.Ds": (384,),
        "op.dt_projs_weight": (4, 96, 6),
        "op.dt_projs_bias": (4, 96),
        "op.in_proj.weight": (96, 96),
        "op.conv2d.weight": (96, 1, 3, 3),
        "op.out_norm.weight": (96,),
        "op.out_norm.bias": (96,),
        "op.out_proj.weight": (96, 96),
        "norm2.weight": (96,),
        "norm2.bias": (96,),
        "mlp.fc1.weight": (384, 96),
        "mlp.fc1.bias": (384,),
        "mlp.fc2.weight": (96, 384),
        "mlp.fc2.bias": (96,),
    }
    gated = {name: tuple(value.shape) for name, value in SS2D(32).state_dict().items()}
    assert gated["in_proj.weight"] == (128, 32) and gated["conv2d.bias"] == (64,) and gated["A_logs"] == (256, 16)


def test_initial_decay_and_step_are_mamba_s():
    op = SS2D(32, d_state=5, modalities=2)
    assert torch.allclose(op.A_logs.exp(), torch.arange(1.0, 6.0).expand(2, 256, 5))
    steps = F.softplus(op.dt_projs_bias)
    assert 0.0009 < steps.min() < 0.002 and 0.05 < steps.max() < 0.101
    assert op.dt_projs_weight.abs().max() <= 2**-0.5


@pytest.mark.parametrize(
    ("forward_type", "options"),
    [
        ("v03", {}),
        ("v04_nozact", {"d_state": 3}),
        ("v05", {"conv_bias": False, "ssm_ratio": 1.0}),
        ("v05_noz", {"d_state": 1}),
        ("v05_oact", {"d_conv": 1}),
        ("v05_onnone_noz", {"dt_rank": 5}),
    ],
)
def test_ss2d_is_vmamba_s(forward_type, options):
    height, width = torch.randint(1, 7, (2,)).tolist()
    op = randomize(SS2D(12, **{"d_state": 4} | options, forward_type=forward_type))
    x = torch.randn(2, height, width, 12)
    p = parameters_of(op)
    expected = []
    for image in x.double():
        inner, z = conv_branch(p, image.permute(2, 0, 1), gated="_noz" not in forward_type.replace("_nozact", ""))
        expected.append(finish(p, ss2d_of(p, inner), z, forward_type).permute(1, 2, 0))
    expected = torch.stack(expected)
    with torch.no_grad():
        assert relative_error(op(x), expected) < FP32
        first = SS2D(12, **{"d_state": 4} | options, forward_type=forward_type, channel_first=True)
        first.load_state_dict(op.state_dict())
        assert relative_error(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), expected) < FP32
        with torch.autocast("cpu", torch.bfloat16):
            low = op(x)
        assert low.dtype == torch.bfloat16 and relative_error(low, expected) < BF16


@pytest.mark.parametrize("mlp_ratio", [0.0, 2.0])
def test_vss_block_is_vmamba_s(mlp_ratio):
    block = randomize(VSSBlock(8, ssm_d_state=2, mlp_ratio=mlp_ratio))
    x = torch.randn(1, 4, 5, 8)
    p, q = parameters_of(block, "op."), parameters_of(block)
    image = x[0].double()
    inner, z = conv_branch(p, F.layer_norm(image, (8,), q["norm.weight"], q["norm.bias"]).permute(2, 0, 1))
    expected = image + finish(p, ss2d_of(p, inner), z, "").permute(1, 2, 0)
    if mlp_ratio:
        hidden = F.layer_norm(expected, (8,), q["norm2.weight"], q["norm2.bias"])
        hidden = F.gelu(hidden @ q["mlp.fc1.weight"].T + q["mlp.fc1.bias"])
        expected = expected + hidden @ q["mlp.fc2.weight"].T + q["mlp.fc2.bias"]
    with torch.no_grad():
        assert relative_error(block(x)[0] - x[0], expected - image) < FP32


def test_pointwise_convolution_weights_load():
    block = VSSBlock(8, ssm_d_state=2)
    state = {
        name: value[..., None, None] if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")) else value
        for name, value in randomize(VSSBlock(8, ssm_d_state=2)).state_dict().items()
    }
    assert state["op.in_proj.weight"].dim() == 4
    block.load_state_dict(state)
    assert torch.equal(block.op.in_proj.weight, state["op.in_proj.weight"][..., 0, 0])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_projected_gradients_are_those_of_a_linear_layer(lead, wanted, device):
    x = torch.randn(*lead, 3, 5, 7, 6, dtype=torch.float64, device=device).transpose(-2, -3)
    weight = torch.randn(*lead, 8, 6, dtype=torch.float64, device=device)
    ours = [t.clone().requires_grad_(each) for t, each in zip((x, weight), wanted, strict=True)]
    plain = [t.clone().requires_grad_(each) for t, each in zip((x, weight), wanted, strict=True)]
    same_x, proj = project(*ours)
    assert torch.equal(same_x, x)
    torch.testing.assert_close(proj, linear(x, weight), rtol=1e-12, atol=1e-12)
    ((same_x.sin() * 3).sum() + proj.square().sum()).backward()
    ((plain[0].sin() * 3).sum() + linear(*plain).square().sum()).backward()
    for one, other, each in zip(ours, plain, wanted, strict=True):
        assert (one.grad is not None) == each
        if each:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mlp_ratio", [0.0, 2.0])
def test_two_modalities_are_two_blocks(mlp_ratio):
    both = randomize(VSSBlock(8, ssm_d_state=3, mlp_ratio=mlp_ratio, modalities=2))
    x = torch.randn(2, 3, 5, 4, 8)
    with torch.no_grad():
        found = both(x)
        for modality in range(2):
            single = VSSBlock(8, ssm_d_state=3, mlp_ratio=mlp_ratio)
            single.load_state_dict({name: value[modality] for name, value in both.state_dict().items()})
            # The same arithmetic in other GEMM shapes: measured 1e-7.
            assert relative_error(found[modality], single(x[modality]).double()) < FP32


@pytest.mark.parametrize("modalities", [1, 2])
def test_empty_batch(modalities):
    block = VSSBlock(8, ssm_d_state=3, mlp_ratio=2.0, modalities=modalities)
    x = torch.empty((2, 0, 4, 5, 8) if modalities == 2 else (0, 4, 5, 8), requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_an_activation_that_is_replaced_later_also_gates():
    layer = SS2D(8, d_state=3)
    x = torch.randn(1, 4, 5, 8)
    layer.act = nn.GELU()
    other = SS2D(8, d_state=3, act_layer=nn.GELU)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_whoever_sorts_modules_and_parameters_knows_them():
    """As VMamba's initialization and optimizers do: linear layers, and what has no weight decay."""
    layer = SS2D(8)
    assert isinstance(layer.in_proj, nn.Linear) and isinstance(layer.out_proj, nn.Linear)
    assert layer.A_logs._no_weight_decay and layer.Ds._no_weight_decay


@pytest.mark.parametrize("exchange", EXCHANGE_SOURCES)
def test_direct_exchange(exchange):
    op = randomize(SS2D(8, d_state=3, modalities=2, exchange=exchange))
    x = torch.randn(2, 1, 4, 3, 8)
    p = [parameters_of(op, modality=m) for m in range(2)]
    inner, z = zip(*(conv_branch(p[m], x[m, 0].double().permute(2, 0, 1)) for m in range(2)), strict=True)
    with torch.no_grad():
        found = op(x)
    for m, source in enumerate(
        {"none": (0, 1), "mutual": (1, 0), "from_visible": (1, 1), "from_infrared": (0, 0)}[exchange]
    ):
        scanned = ss2d_of(p[m], inner[m], (p[source], inner[source]))
        assert relative_error(found[m, 0], finish(p[m], scanned, z[m], "").permute(1, 2, 0)) < FP32


@pytest.mark.parametrize("exchange", EXCHANGE_SOURCES)
def test_reprojected_exchange(exchange):
    """Eqs. 4 to 6 route by route: scan order first, then project, split, exchange, project back, SSM, merge."""
    op = randomize(SS2D(8, d_state=3, modalities=2, exchange=exchange, reproject=True))
    x = torch.randn(2, 1, 3, 4, 8)
    p = [parameters_of(op, modality=m) for m in range(2)]
    inner, z = zip(*(conv_branch(p[m], x[m, 0].double().permute(2, 0, 1)) for m in range(2)), strict=True)
    with torch.no_grad():
        found = op(x)
    for m, source in enumerate(
        {"none": (0, 1), "mutual": (1, 0), "from_visible": (1, 1), "from_infrared": (0, 0)}[exchange]
    ):
        merged = 0
        for k in range(4):
            own = (p[m]["exchange_proj_weight"][k] @ routes(inner[m])[k])[:16]
            given = (p[source]["exchange_proj_weight"][k] @ routes(inner[source])[k])[16:]
            tokens = p[m]["exchange_reproj_weight"][k] @ torch.cat([own, given])
            A, D, dt_weight, dt_bias = path_parameters(p[m], k)
            low_rank, B, C = split_projection(p[m], tokens, k)
            delta = F.softplus(dt_weight @ low_rank + dt_bias[:, None])
            merged = merged + unroute(scan_tokens(tokens, delta, A, B, C, D), k, 3, 4)
        assert relative_error(found[m, 0], finish(p[m], merged, z[m], "").permute(1, 2, 0)) < FP32


@pytest.mark.parametrize("options", [{}, {"modalities": 2, "exchange": "mutual"}, {"modalities": 2, "reproject": True}])
def test_gradients_reach_every_parameter(options):
    op = SS2D(8, d_state=2, **options)
    x = torch.randn(2, 2, 3, 3, 8)[0 if len(options) == 0 else slice(None)].requires_grad_()
    op(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert [name for name, p in op.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_drop_path_drops_whole_samples():
    block = VSSBlock(4, ssm_d_state=1, drop_path=0.5, mlp_ratio=0.0, modalities=2)
    x = torch.randn(2, 50, 2, 2, 4)
    with torch.no_grad():
        change = (block(x) - x).abs().amax((2, 3, 4))
        kept = change > 0
        assert 20 < kept.sum() < 80  # of 100, 6 standard deviations
        assert torch.equal(block.eval()(x), block(x))
        full = block(x) - x
        block.train()
        torch.manual_seed(1)
        twice = block(x) - x
        kept = twice.abs().amax((2, 3, 4)) > 0
        assert torch.allclose(twice[kept], 2 * full[kept], rtol=1e-4, atol=1e-5)
        assert torch.equal(VSSBlock(4, ssm_d_state=1, drop_path=1.0, mlp_ratio=0.0, modalities=2)(x), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward_type": "v052dc"}, "forward_type: .*found 'v052dc'"),
        ({"forward_type": "v05_onsoftmax"}, "forward_type: .*found 'v05_onsoftmax'"),
        ({"initialize": "v1"}, "initialize: expected 'v0', found 'v1'"),
        ({"modalities": 3}, "modalities: expected 1 or 2, found 3"),
        ({"exchange": "both", "modalities": 2}, "exchange: expected one of none, mutual.*found 'both'"),
        ({"exchange": "mutual"}, "needs modalities=2"),
        ({"reproject": True}, "needs modalities=2"),
        ({"channel_first": True, "modalities": 2}, "channel_first=True needs modalities=1"),
        ({"d_conv": 4}, "d_conv: expected an odd size .*found 4"),
        ({"ssm_ratio": 0.1}, r"ssm_ratio \* d_model: expected 1 to 65536, found 0"),
        ({"dt_rank": 0}, "dt_rank: expected 1 to 64, found 0"),
        ({"d_state": 0}, "d_state: expected 1 to 256, found 0"),
    ],
)
def test_unsupported_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SS2D(8, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_layer": "silu"}, "act_layer: expected a module's class such as torch.nn.SiLU, found 'silu'"),
        ({"act_layer": torch.nn.SiLU()}, r"act_layer: .*found SiLU\(\)"),
        ({"dt_rank": 2.5}, "dt_rank: expected an integer, found 2.5"),
        ({"d_state": None}, "d_state: expected an integer, found None"),
    ],
)
def test_arguments_of_other_types_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        SS2D(8, **options)


def test_refuses_other_tensors_by_their_shape():
    for layer, shape, layout in (
        (SS2D(8), (5, 6, 8), "(B, H, W, d_model)"),
        (SS2D(8), (1, 8, 5, 6), "(B, H, W, d_model) with d_model = 8"),
        (SS2D(8, channel_first=True), (1, 5, 6, 8), "(B, d_model, H, W) with d_model = 8"),
        (SS2D(8, modalities=2), (1, 5, 6, 8), "(2, B, H, W, d_model)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"x: shape {shape}, expected {layout}")):
            layer(torch.randn(shape))


def test_block_takes_options_by_name_only():
    with pytest.raises(TypeError, match="positional"):
        VSSBlock(8, 0.1, torch.nn.LayerNorm)  # VMamba's third is norm_layer
    with pytest.raises(ValueError, match=r"drop_path: 2\.0, expected 0 to 1"):
        VSSBlock(8, 2.0)


def test_trains_only_where_states_are_saved():
    """Traced, or exported under no_grad, a layer is for inference, and runs with gradients on too."""
    layer, x = SS2D(8, 4), torch.randn(1, 5, 6, 8)
    expected = layer(x)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
    for program in (exported, torch.jit.trace(layer, x)):
        y = program(x)
        assert_close(y, expected, FP32)
        with pytest.raises(RuntimeError, match="ss2d: the states were not saved"):
            y.sum().backward()


def test_vmamba_s_block_can_hold_it():
    # The keywords with which vmamba.VSSBlock makes its _SS2D.
    op = SS2D(
        d_model=8,
        d_state=1,
        ssm_ratio=2.0,
        dt_rank="auto",
        act_layer=torch.nn.SiLU,
        d_conv=3,
        conv_bias=False,
        dropout=0.0,
        initialize="v0",
        forward_type="v05_noz",
        channel_first=True,
    )
    assert op(torch.randn(1, 8, 5, 4)).shape == (1, 8, 5, 4)


def test_dt_rank_is_vmamba_s():
    assert [SS2D(c, d_state=1).dt_rank for c in (1, 16, 17, 96)] == [math.ceil(c / 16) for c in (1, 16, 17, 96)]


@pytest.mark.parametrize("modalities", [1, 2])
def test_one_more_rank_changes_nothing(modalities):
    op = randomize(SS2D(8, d_state=2, dt_rank=3, modalities=modalities))
    x = torch.randn(*(() if modalities == 1 else (2,)), 2, 5, 4, 16)
    with torch.no_grad():
        expected = op.scan(x)
        op.x_proj_weight, op.dt_projs_weight = map(
            torch.nn.Parameter, _one_more_rank(op.x_proj_weight, op.dt_projs_weight)
        )
        assert op.dt_projs_weight.shape[-1] == 4 and op.x_proj_weight.shape[-2] == 4 + 2 * 2
        assert relative_error(op.scan(x), expected.double()) < FP32  # the same sums in GEMMs of other shapes


@pytest.mark.parametrize("modalities", [1, 2])
def test_scalar_decay_is_one_decay_for_all_states(modalities):
    scalar = SS2D(6, d_state=3, modalities=modalities, scalar_decay=True)
    assert scalar.A_logs.shape == (2, 48, 1)[2 - modalities :]
    full = SS2D(6, d_state=3, modalities=modalities)
    weights = scalar.state_dict()
    full.load_state_dict(weights | {"A_logs": weights["A_logs"].expand(full.A_logs.shape)})
    x = torch.randn((2, 2, 4, 5, 6)[2 - modalities :])
    with torch.no_grad():
        assert relative_error(scalar(x), full(x)) < FP32
