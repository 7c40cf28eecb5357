import pytest
import torch
from helpers import assert_close, double, with_gradients
from hypothesis import given
from hypothesis import strategies as st

from diffmf_ops import depthwise_conv_silu, reference

# Relative errors, forward and worst gradient; the 16-bit backward pass on a GPU rounds the gradient of the
# pre-activation as PyTorch does.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (3e-6, 2e-5),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (2e-3, 4e-3),
}


def make_inputs(lead, sizes, size, bias, device="cpu", dtype=torch.float32, strided=False):
    """x, weight and bias; with `strided` x is the first half of the channels of a larger tensor."""
    batch, height, width, channels = sizes
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*lead, batch, height, width, (2 if strided else 1) * channels, device=device).to(dtype)
    weight = torch.randn(*lead, channels, 1, size, size, device=device, dtype=parameter) / size
    bias = torch.randn(*lead, channels, device=device, dtype=parameter) if bias else None
    if x.numel() < 32:  # SiLU's slope is zero at -1.278, and a gradient of values near there alone mostly rounding
        x, weight, bias = (None if t is None else t.abs() for t in (x, weight, bias))
    return [x[..., :channels], weight, bias]


def check(tensors, dtype):
    # Positive, mostly: sums over the pixels, the parameters' gradients, shall not nearly cancel.
    seed = (torch.randn(tensors[0].shape) * 0.3 + 1).to(tensors[0].device, dtype)
    y, gradients = with_gradients(depthwise_conv_silu, tensors, seed)
    expected, expected_gradients = with_gradients(reference.depthwise_conv_silu, double(tensors), seed.double().cpu())
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, expected, TOLERANCES[dtype][0])
    for name, found, wanted in zip(("x", "weight", "bias"), gradients, expected_gradients, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert_close(found, wanted, TOLERANCES[dtype][1], name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(
    lead=st.sampled_from([(), (1,), (2,)]),
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20) | st.sampled_from([32, 64, 96])
    ),
    size=st.sampled_from([3, 3, 1, 5, 7]),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_matches_the_reference(device, dtype, lead, sizes, size, bias, strided):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 runs on the CPU only")
    check(make_inputs(lead, sizes, size, bias, device, dtype, strided), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [64, 128, 130, 67])
def test_images_of_several_tiles(device, dtype, channels):
    check(make_inputs((2,), (2, 75, 70, channels), 3, True, device, dtype, strided=True), dtype)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_gradcheck(size):
    tensors = make_inputs((2,), (1, 3, 4, 2), size, True, dtype=torch.float64)
    assert torch.autograd.gradcheck(depthwise_conv_silu, [t.detach().requires_grad_() for t in tensors])


def test_any_strides(device):
    x = torch.randn(2, 64, 9, 11, device=device).permute(0, 2, 3, 1)  # channels first in memory
    rows = torch.randn(2, 11, 9, 65, device=device).transpose(1, 2)[..., 1:]  # misaligned, columns first
    _, weight, bias = make_inputs((), (1, 1, 1, 64), 3, True, device)
    for tensor in (x, rows):
        check([tensor, weight, bias], torch.float32)
    assert torch.equal(depthwise_conv_silu(x, weight, bias), depthwise_conv_silu(x.contiguous(), weight, bias))


def test_silu_of_very_negative_values(device):
    x = torch.tensor([-80.0, -3e38, 3e38, -float("inf"), float("inf"), float("nan")], device=device).view(1, 1, 1, 6)
    y = depthwise_conv_silu(x, torch.ones(6, 1, 1, 1, device=device))
    torch.testing.assert_close(y, torch.nn.functional.silu(x), equal_nan=True, rtol=1e-5, atol=1e-36)


def test_the_same_bits_again(device):
    tensors = make_inputs((2,), (2, 50, 45, 64), 3, True, device)
    seed = torch.randn(tensors[0].shape, device=device)
    first, again = (with_gradients(depthwise_conv_silu, tensors, seed) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(device, bias):
    tensors = [None if t is None else t.requires_grad_() for t in make_inputs((2,), (1, 4, 5, 8), 3, bias, device)]
    torch.library.opcheck(torch.ops.diffmf.depthwise_conv_silu.default, tuple(tensors))


def test_compile_and_autocast(device):
    tensors = make_inputs((), (1, 4, 5, 8), 3, True, device)
    compiled = torch.compile(depthwise_conv_silu, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tensors), depthwise_conv_silu(*tensors), 1e-6)
    with torch.autocast(device, torch.bfloat16):
        y = depthwise_conv_silu(tensors[0], tensors[1].bfloat16(), tensors[2])
    assert y.dtype == torch.bfloat16
    assert_close(y, reference.depthwise_conv_silu(*tensors), 3e-2)


def test_empty_batch(device):
    tensors = make_inputs((2,), (0, 4, 5, 8), 3, True, device)
    y, gradients = with_gradients(depthwise_conv_silu, tensors, torch.zeros(tensors[0].shape))
    assert y.shape == (2, 0, 4, 5, 8) and gradients[0].shape == y.shape
    assert gradients[1].abs().sum() == 0 and gradients[2].abs().sum() == 0


def test_nan_stays_in_its_item(device):
    x, weight, bias = make_inputs((), (3, 6, 5, 8), 3, True, device)
    x[1, 3, 2, 4] = float("nan")
    y = depthwise_conv_silu(x, weight, bias)
    assert y[1, 2:5, 1:4, 4].isnan().all() and y.isnan().sum() == 9


def test_double_backward_is_refused(device):
    x, weight, _ = make_inputs((), (1, 3, 3, 4), 3, False, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(depthwise_conv_silu(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 4, 5)}, r"x: shape \(3, 4, 5\)"),
        ({"x": torch.ones(1, 3, 4, 5, dtype=torch.int32)}, "x: dtype torch.int32"),
        ({"x": torch.ones(1, 0, 4, 5)}, "x: height: 0"),
        ({"weight": torch.randn(5, 1, 4, 4)}, "weight: kernel size 4"),
        ({"weight": torch.randn(6, 1, 3, 3)}, r"weight: shape \(6, 1, 3, 3\)"),
        ({"weight": torch.randn(5, 1, 3, 3).double()}, "weight: dtype torch.float64"),
        ({"bias": torch.randn(4)}, r"bias: shape \(4,\)"),
        ({"bias": torch.randn(5, device="meta")}, "bias: on meta"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    arguments = {"x": torch.randn(1, 3, 4, 5), "weight": torch.randn(5, 1, 3, 3), "bias": torch.randn(5)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        depthwise_conv_silu(**arguments)
