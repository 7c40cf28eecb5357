"""The network: shapes, every ablation switch, and the paper's formulas against NumPy restatements."""

import numpy as np
import pytest
import torch

from diffmf_model.channel_exchange import ChannelReweighting
from diffmf_model.config import ModelConfig
from diffmf_model.extraction import guide
from diffmf_model.network import DIFFMF, Decoder, _patches
from diffmf_model.spatial_exchange import (
    CrossModalScan,
    SpatialExchange,
    _double,
    _halve,
    interleave_columns,
    side_by_side,
    stack_channels,
)

TINY = {"d_model": 4, "d_state": 2, "stages": 1}
SWITCHES = [
    {},
    {"stages": 2, "mlp_ratio": 2.0, "drop_path": 0.2},
    {"gated": False, "ssm_ratio": 1.0},
    {"extraction": False},
    {"guidance": "visible_first"},
    {"guidance": "parallel"},
    {"guidance": "none"},
    {"channel_exchange": "reproject"},
    {"channel_exchange": "off"},
    {"exchange": "from_visible"},
    {"exchange": "from_infrared", "channel_exchange": "reproject"},
    {"exchange": "none"},
    {"reweighting": False},
    {"residual": False},
    {"gate": "fig2"},
    {"spatial_exchange": False},
    {"scalar_decay": True},
    {"patch_size": 2},
    {"patch_size": 2, "decoder_layers": 3, "decoder_ratio": 1.6},
]


def images(*shape):
    return torch.rand(shape), torch.rand(shape)


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_trains(switch):
    model = DIFFMF(ModelConfig(**TINY | switch))
    shape = (1, 1, 5 * model.config.patch_size, 6 * model.config.patch_size)
    ir, vi = (image.requires_grad_() for image in images(*shape))
    fused = model(ir, vi)
    assert fused.shape == shape and fused.min() >= 0 and fused.max() <= 1
    torch.nn.functional.mse_loss(fused, torch.rand(shape)).backward()
    assert ir.grad.abs().sum() > 0 and vi.grad.abs().sum() > 0
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A dropped path's parameters see no gradient in that step. Without the gate, the output bias of the last share
    # block cancels in the difference of the two modalities.
    cancelled = [] if switch.get("gated", True) else ["extraction.0.share_block.op.out_norm.bias"]
    assert set(unreached) <= set(cancelled) or "drop_path" in switch


def test_every_switch_changes_the_result():
    """The same seed and images: switches that keep the parameters give other pictures."""
    ir, vi = images(1, 1, 6, 5)
    results = []
    for switch in [s for s in SWITCHES if s.keys() <= {"guidance", "exchange", "gate"}]:
        torch.manual_seed(0)
        model = DIFFMF(ModelConfig(**TINY | switch))
        with torch.no_grad():
            for parameter in model.parameters():  # away from the start, where exchange and gate matter little
                parameter.add_(0.3 * torch.randn_like(parameter))
            results.append(model(ir, vi).flatten())
    distances = torch.cdist(torch.stack(results), torch.stack(results)) + torch.eye(len(results))
    assert len(results) == 7 and distances.min() > 1e-4


@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (7, 5), (9, 8)])
def test_any_size_and_batches_are_independent(size, patch_size):
    model = DIFFMF(ModelConfig(**TINY, patch_size=patch_size)).eval()
    ir, vi = images(2, 1, *size)
    with torch.no_grad():
        both = model(ir, vi)
        alone = torch.cat([model(ir[:1], vi[:1]), model(ir[1:], vi[1:])])
    assert both.shape == (2, 1, *size)
    assert (both - alone).abs().max() < 1e-5  # measured 1.2e-7


def test_patches_are_the_pixels_of_their_place():
    """A network of patches without anything between them gives every pixel back where it was."""
    image = torch.rand(2, 1, 5, 7)
    patches = _patches(image, 3)
    assert patches.shape == (2, 2, 3, 9)
    assert torch.equal(patches[:, 1, 2, [0, 1, 3]], image[:, 0, [3, 3, 4], [6, 6, 6]])  # the last column repeats
    decoder = Decoder(ModelConfig(d_model=9, patch_size=3))
    decoder.features = torch.nn.Identity()
    with torch.no_grad():
        decoder.image.bias.zero_()
        torch.nn.init.dirac_(decoder.image.weight)
    found = decoder(patches)[..., :5, :7]
    assert (found - torch.sigmoid(image)).abs().max() < 1e-6  # a sigmoid's last bit: measured 6e-8


def test_autocast_gives_fp32_images_close_to_fp32():
    model = DIFFMF(ModelConfig(**TINY)).eval()
    ir, vi = images(1, 1, 8, 7)
    with torch.no_grad():
        expected = model(ir, vi)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ir, vi)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.02  # measured up to 1.5e-3


@pytest.mark.parametrize(
    ("ir", "vi", "error", "message"),
    [
        (
            torch.rand(1, 3, 4, 4),
            torch.rand(1, 1, 4, 4),
            ValueError,
            r"ir: expected shape \(B, 1, H, W\).*\(1, 3, 4, 4\)",
        ),
        (torch.rand(1, 1, 4, 4), torch.rand(1, 4, 4), ValueError, r"vi: expected shape .*found \(1, 4, 4\)"),
        (torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 5), ValueError, "vi: expected the shape of ir"),
        (torch.rand(1, 1, 0, 4), torch.rand(1, 1, 0, 4), ValueError, "ir: expected shape"),
        (torch.ones(1, 1, 4, 4).int(), torch.rand(1, 1, 4, 4), TypeError, "ir: expected a floating-point image"),
    ],
)
def test_wrong_images_are_refused(ir, vi, error, message):
    with pytest.raises(error, match=message):
        DIFFMF(ModelConfig(**TINY))(ir, vi)


def test_guidance_is_algorithm_1():
    features, shared = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    (infrared, visible), (share_ir, share_vi) = features.numpy(), shared.numpy()
    diff = np.tanh(np.abs(share_vi - share_ir))
    guided_ir = (1 - diff) * infrared + diff * visible
    guided_vi = (1 - diff) * visible + diff * infrared
    expected = {
        "infrared_first": (guided_ir, (1 - diff) * visible + diff * guided_ir),
        "visible_first": ((1 - diff) * infrared + diff * guided_vi, guided_vi),
        "parallel": (guided_ir, guided_vi),
        "none": (infrared + share_ir, visible + share_vi),
    }
    for guidance, (ir, vi) in expected.items():
        found = guide(features, shared, guidance).numpy()
        np.testing.assert_allclose(found, np.stack([ir, vi]), rtol=1e-5, atol=1e-6)  # measured 4e-7


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("gate", ["eq8", "fig2"])
def test_reweighting_is_equations_7_and_8(residual, gate):
    module = ChannelReweighting(ModelConfig(d_model=5, residual=residual, gate=gate))
    features, exchanged = torch.randn(2, 3, 4, 2, 5), torch.randn(2, 3, 4, 2, 5)
    with torch.no_grad():
        found = module(features, exchanged).numpy()
    w = {name: value.numpy() for name, value in module.state_dict().items()}
    e, f = features.numpy(), exchanged.numpy()
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    mixed = []
    for m in range(2):
        left = f[m]
        if residual:
            weight = sigmoid(e[m].mean((1, 2)) @ w["residual.weight"][m].T + w["residual.bias"][m])
            left = left + e[m] * weight[:, None, None]
        mixed.append(left * (f[m] @ w["projection.weight"][m].T + w["projection.bias"][m]))
    pooled = np.concatenate([e[0].mean((1, 2)), (f[0] if gate == "eq8" else e[1]).mean((1, 2))], axis=1)
    omega = sigmoid(pooled @ w["gate.weight"].T + w["gate.bias"])[:, None, None]
    expected = [(1 - omega) * mixed[m] + omega * mixed[1 - m] for m in range(2)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-5)  # measured 1e-6


def test_realignments_are_equation_10():
    maps = torch.randn(2, 3, 4, 5, 6)
    column, row, concat = interleave_columns(maps), side_by_side(maps), stack_channels(maps)
    assert column.shape == row.shape == (3, 4, 10, 6) and concat.shape == (3, 4, 5, 12)
    for m in range(2):
        assert torch.equal(column[:, :, m::2], maps[m])
        assert torch.equal(row[:, :, 5 * m : 5 * m + 5], maps[m])
        assert torch.equal(concat[..., 6 * m : 6 * m + 6], maps[m])


def test_cross_modal_scan_folds_to_the_same_pixel():
    """With VSS blocks that pass their input on, all three realignments fold back to the mean of the two maps."""
    level = CrossModalScan(ModelConfig(**TINY))
    level.column = level.row = level.concat = torch.nn.Identity()
    maps = torch.randn(2, 3, 4, 5, 4)
    with torch.no_grad():
        expected = level.projection(maps.mean(0).repeat(1, 1, 1, 3))
        assert torch.allclose(level(maps), expected, atol=1e-5)  # measured 2e-7


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 7), (6, 8)])
def test_scales(size):
    maps = torch.randn(2, 3, *size, 4)
    half = _halve(maps)
    height, width = size
    assert half.shape == (2, 3, -(-height // 2), -(-width // 2), 4)
    i, j = half.shape[2] - 1, half.shape[3] - 1  # the corner block, which odd sizes cut
    torch.testing.assert_close(half[:, :, i, j], maps[:, :, 2 * i :, 2 * j :].mean((2, 3)))
    constant = torch.full((3, *half.shape[2:4], 4), 0.7)
    assert torch.allclose(_double(constant, maps[0]), torch.full((3, *size, 4), 0.7))
    assert SpatialExchange(ModelConfig(**TINY))(maps).shape == (3, *size, 4)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_exports_for_any_size_that_is_halved_without_rest(patch_size):
    model = DIFFMF(ModelConfig(**TINY, patch_size=patch_size)).eval()
    step = 4 * patch_size
    sizes = {2: step * torch.export.Dim("height", min=2, max=512), 3: step * torch.export.Dim("width", min=2, max=512)}
    with torch.no_grad():
        example = torch.rand(2, 1, 3 * step, 4 * step)
        program = torch.export.export(model, (example, example.flip(0)), dynamic_shapes=(sizes, sizes))
        ir, vi = torch.rand(2, 2, 1, 5 * step, 2 * step)
        torch.testing.assert_close(program.module()(ir, vi), model(ir, vi), atol=1e-5, rtol=1e-4)
