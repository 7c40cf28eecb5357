import pytest
import torch
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st

from diffmf_ops import cross_merge, cross_scan, reference

PATHS = st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)), paths=PATHS)
def test_match_the_reference(device, dtype, sizes, paths):
    x = torch.randn(sizes, device=device).to(dtype)
    y = cross_scan(x, paths)
    assert torch.equal(y, reference.cross_scan(x, paths))
    tokens = torch.randn(y.shape, device=device).to(dtype)
    merged = cross_merge(tokens, sizes[2:], paths)
    # float32: the same additions in the same order; 16 bits: one rounding, measured 1.9e-3 at most.
    expected = reference.cross_merge(tokens.float(), sizes[2:], paths)
    assert merged.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(merged, expected)
    else:
        assert_close(merged, expected, 4e-3)


def test_gradients_are_each_other():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 3, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cross_scan, x)
    assert torch.autograd.gradcheck(lambda t: cross_merge(t, (4, 5)), y)
    assert torch.autograd.gradgradcheck(cross_scan, x)


def test_opcheck(device):
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    y = torch.randn(2, 4, 3, 20, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.diffmf.cross_scan.default, (x, (0, 1, 2, 3)))
    torch.library.opcheck(torch.ops.diffmf.cross_merge.default, (y, 4, 5, (0, 1, 2, 3)))


def test_strided_input_and_compile(device):
    x = torch.randn(2, 9, 7, 3, device=device).permute(0, 3, 1, 2)
    compiled = torch.compile(lambda t: cross_merge(cross_scan(t), (9, 7)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), 4 * x, 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_scan(torch.randn(3, 4, 5)), r"x: shape \(3, 4, 5\)"),
        (lambda: cross_scan(torch.ones(1, 1, 2, 2, dtype=torch.int32)), "x: dtype torch.int32"),
        (lambda: cross_scan(torch.randn(1, 1, 2, 2), (4,)), "paths"),
        (lambda: cross_merge(torch.randn(1, 4, 1, 6), (2, 2)), "y: shape"),
        (lambda: cross_merge(torch.randn(1, 4, 1, 6), (2, 3, 1)), r"shape: \(2, 3, 1\), expected \(H, W\)"),
        (lambda: cross_merge(torch.randn(1, 4, 1, 6), 6), r"shape: 6, expected \(H, W\)"),
        (lambda: cross_merge(torch.randn(1, 4, 1, 6), (2.0, 3.0)), r"shape: \(2.0, 3.0\), expected \(H, W\)"),
        (lambda: cross_scan(torch.randn(1, 1, 2, 2).to_sparse()), "x: torch.sparse_coo, expected torch.strided"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
