import pytest
import torch
from helpers import assert_close, double, with_gradients
from hypothesis import given
from hypothesis import strategies as st

from diffmf_ops import norm_gate, reference

# Relative errors, forward and worst gradient.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (3e-6, 2e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}
NAMES = ("y", "weight", "bias", "z")


def make_inputs(lead, sizes, gate, device="cpu", dtype=torch.float32, strided=False):
    """y, weight, bias and z; with `strided` y and z are halves of the channels of larger tensors."""
    *pixels, channels = sizes
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    both = [
        (torch.randn(*lead, *pixels, (2 if strided else 1) * channels, device=device) * 2 + 1).to(dtype)
        for _ in range(2)
    ]
    # Neighbouring channels lie apart: a few that happen to be nearly equal make results large and mostly rounding.
    both[0] += (torch.arange(both[0].shape[-1], device=device) % 3 * 16 - 16).to(dtype)
    # SiLU's slope is zero at -1.278: where all values (of one pixel with one channel) are near, theirs is rounding.
    both[1] += torch.where(both[1] < -1.278, -0.3, 0.3).to(dtype)
    weight, bias = (torch.randn(*lead, channels, device=device, dtype=parameter) for _ in range(2))
    return [both[0][..., :channels], weight, bias, both[1][..., -channels:] if gate else None]


def check(tensors, dtype):
    # Positive, mostly: the sum over a few pixels, bias's gradient, shall not nearly cancel.
    seed = (torch.randn(tensors[0].shape) * 0.3 + 1).to(tensors[0].device, dtype)
    out, gradients = with_gradients(norm_gate, tensors, seed)
    expected, expected_gradients = with_gradients(reference.norm_gate, double(tensors), seed.double().cpu())
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, expected, TOLERANCES[dtype][0])
    for name, found, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert (found is None) == (wanted is None)
        if found is None:
            continue
        # With one channel y's gradient is zero but for rounding, with two it nearly cancels; so may that of a few
        # pixels with three channels, which has a single direction left.
        if name == "y" and (tensors[0].shape[-1] <= 2 or tensors[0].numel() < 24):
            continue
        assert_close(found, wanted, TOLERANCES[dtype][1], name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(
    lead=st.sampled_from([(), (1,), (2,)]),
    sizes=st.tuples(
        st.integers(1, 3),
        st.integers(1, 20),
        st.integers(1, 20),
        st.integers(3, 20) | st.sampled_from([1, 2, 32, 64, 96, 192, 300, 516]),
    ),
    gate=st.booleans(),
    strided=st.booleans(),
)
def test_matches_the_reference(device, dtype, lead, sizes, gate, strided):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 runs on the CPU only")
    check(make_inputs(lead, sizes, gate, device, dtype, strided), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [32, 64, 67, 512, 1000])
def test_many_pixels(device, dtype, channels):
    check(make_inputs((2,), (2, 75, 70 if channels < 100 else 3, channels), True, device, dtype, strided=True), dtype)


@pytest.mark.parametrize("gate", [False, True])
def test_gradcheck(gate):
    tensors = make_inputs((2,), (1, 2, 3, 5), gate, dtype=torch.float64)
    assert torch.autograd.gradcheck(norm_gate, [None if t is None else t.detach().requires_grad_() for t in tensors])


def test_any_strides(device):
    y, weight, bias, z = make_inputs((), (2, 9, 11, 64), True, device)
    check([y.transpose(1, 2), weight, bias, z.transpose(1, 2)], torch.float32)  # rows and columns exchanged
    misaligned = torch.randn(2, 9, 11, 65, device=device)[..., 1:]
    channels_first = torch.randn(2, 64, 9, 11, device=device).permute(0, 2, 3, 1)
    check([misaligned, weight, bias, channels_first], torch.float32)
    check([y.expand(2, 9, 11, 64)[:, ::2], weight, bias, z[:, ::2]], torch.float32)


def test_a_large_mean_does_not_cancel(device):
    y, weight, bias, z = make_inputs((), (1, 3, 3, 64), True, device)
    shifted = y + 1000
    exact = reference.norm_gate(*double([shifted, weight, bias, z]))
    assert_close(norm_gate(shifted, weight, bias, z), exact, 1e-4)  # the mean itself is rounded to 6e-5


def test_the_same_bits_again(device):
    tensors = make_inputs((2,), (2, 50, 45, 64), True, device)
    seed = torch.randn(tensors[0].shape, device=device)
    first, again = (with_gradients(norm_gate, tensors, seed) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("gate", [False, True])
def test_opcheck(device, gate):
    tensors = [None if t is None else t.requires_grad_() for t in make_inputs((2,), (1, 4, 5, 8), gate, device)]
    torch.library.opcheck(torch.ops.diffmf.norm_gate.default, (*tensors, 1e-5))


def test_compile_and_autocast(device):
    tensors = make_inputs((), (1, 4, 5, 8), True, device)
    compiled = torch.compile(norm_gate, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tensors), norm_gate(*tensors), 1e-6)
    y, weight, bias, z = tensors
    with torch.autocast(device, torch.bfloat16):
        kept = norm_gate(y, weight.bfloat16(), bias, z.bfloat16())
        low = norm_gate(y.bfloat16(), weight, bias, z)
    assert kept.dtype == torch.float32 and low.dtype == torch.bfloat16
    for found in (kept, low):
        assert_close(found, reference.norm_gate(*tensors), 3e-2)


def test_empty_batch(device):
    tensors = make_inputs((2,), (0, 4, 5, 8), True, device)
    out, gradients = with_gradients(norm_gate, tensors, torch.zeros(tensors[0].shape))
    assert out.shape == (2, 0, 4, 5, 8) and gradients[0].shape == gradients[3].shape == out.shape
    assert gradients[1].abs().sum() == 0 and gradients[2].abs().sum() == 0


def test_nan_stays_in_its_pixel(device):
    y, weight, bias, z = make_inputs((), (3, 6, 5, 8), True, device)
    y[1, 3, 2, 4] = float("nan")
    out = norm_gate(y, weight, bias, z)
    assert out[1, 3, 2].isnan().all() and out.isnan().sum() == 8


def test_double_backward_is_refused(device):
    y, weight, bias, _ = make_inputs((), (1, 3, 3, 4), False, device)
    y.requires_grad_()
    (dy,) = torch.autograd.grad(norm_gate(y, weight, bias).pow(3).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dy.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.randn(3, 4, 5)}, r"y: shape \(3, 4, 5\)"),
        ({"y": torch.ones(1, 3, 4, 5, dtype=torch.int32)}, "y: dtype torch.int32"),
        ({"weight": torch.randn(6)}, r"weight: shape \(6,\)"),
        ({"weight": torch.randn(5).double()}, "weight: dtype torch.float64"),
        ({"bias": torch.randn(5, device="meta")}, "bias: on meta"),
        ({"eps": -1e-5}, "eps: -1e-05, expected 0 to inf"),
        ({"eps": "small"}, "eps: 'small', expected a number"),
        ({"z": torch.randn(1, 3, 4, 6)}, r"z: shape \(1, 3, 4, 6\)"),
        ({"z": torch.randn(1, 3, 4, 5).bfloat16()}, "z: dtype torch.bfloat16"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    arguments = {"y": torch.randn(1, 3, 4, 5), "weight": torch.randn(5), "bias": torch.randn(5), "z": None} | change
    with pytest.raises((ValueError, TypeError), match=message):
        norm_gate(**arguments)
