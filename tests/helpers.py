"""Random problems for the operators, and the error measure of all tolerances."""

import torch
from hypothesis import strategies as st

PARAMETERS = ("dt_weight", "dt_bias", "A", "D")
# Of ss2d.
# Largest errors over 300 drawn problems each on the CPU, forward and worst gradient: float32 2.9e-7 and 2.1e-6;
# bfloat16 2.4e-3 and 2.6e-3; float16 3.6e-4 and 3.3e-4. On a GPU only held to the bounds, not recorded.
SS2D_TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2), torch.float16: (5e-3, 5e-3)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64 (the plain norm of found where expected is zero).

    Below the smallest normal number of found's dtype, 6e-5 of float16, values have a fixed spacing instead of a
    relative one: a norm below that many of them counts as one of that size.
    """
    smallest = torch.finfo(found.dtype).tiny * found.numel() ** 0.5
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    scale = expected.norm().item()
    return (found - expected).norm().item() / (max(scale, smallest) if scale > 0 else 1.0)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "result") -> None:
    """Fails unless the relative error is within the tolerance; NaN fails."""
    error = relative_error(found, expected)
    assert error <= tolerance, f"{what}: relative L2 error {error:.3g}, tolerated {tolerance:.3g}"


@st.composite
def problems(draw, max_side=12, max_channels=40, max_states=20):
    """Options of one ss2d problem, including odd shapes."""
    modalities = draw(st.sampled_from([1, 2]))
    paths = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=5)))
    states = draw(st.one_of(st.integers(1, max_states), st.sampled_from([1, 4, 8, 16, 64])))
    return {
        "modalities": modalities,
        "batch": draw(st.integers(1, 3)),
        "height": draw(st.integers(1, max_side)),
        "width": draw(st.integers(1, max_side)),
        "channels": draw(st.integers(1, max_channels)),
        "states": states,
        "rank": draw(st.integers(1, 6)),
        "paths": draw(st.sampled_from([(0, 1, 2, 3), paths])),
        "exchange": draw(
            st.sampled_from(["none", "mutual", "from_visible", "from_infrared"] if modalities == 2 else ["none"])
        ),
        "discretization": draw(st.sampled_from(["euler", "zoh"])),
        "shared_decay": draw(st.booleans()),
        "per_path": draw(st.booleans()),
        "skip": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def make_inputs(
    *, modalities=1, batch=1, height=8, width=8, channels=8, states=4, rank=2, paths=(0, 1, 2, 3), shared_decay=False,
    per_path=False, skip=True, strided=False, seed=None, device="cpu", dtype=torch.float32, **_,
):  # fmt: skip
    """Tensors of ss2d in argument order, scaled like a trained network's, rounded to what `dtype` holds."""
    if seed is not None:
        torch.manual_seed(seed)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    lead = () if modalities == 1 else (2,)
    k = len(paths)
    x_shape = (*lead, batch, height, width, *((k,) if per_path else ()), channels)
    row = rank + 2 * states
    x = torch.randn(x_shape, dtype=torch.float64)
    # Unit-sized rows, B and C scaled so that y stays of the size of x whatever N.
    proj = torch.randn(*lead, batch, height, width, k, row, dtype=torch.float64)
    proj[..., rank:] /= states**0.25
    if strided:  # views of larger tensors, and a transposed image
        x = torch.randn(*x_shape[:-1], channels + 3, dtype=torch.float64)[..., 2 : 2 + channels]
        proj = torch.nn.functional.pad(proj, (1, 2))[..., 1 : 1 + row]
        h = len(lead) + 1
        x, proj = (t.transpose(h, h + 1).contiguous().transpose(h, h + 1) for t in (x, proj))
    dt_weight = torch.randn(*lead, k, channels, rank, dtype=torch.float64) / rank**0.5
    dt_bias = torch.rand(*lead, k, channels, dtype=torch.float64) * 4 - 5  # steps of about 0.01 to 0.3
    A = -torch.rand(*lead, k, channels, 1 if shared_decay else states, dtype=torch.float64) * 8 - 0.1
    D = torch.randn(*lead, k, channels, dtype=torch.float64) if skip else None
    x, proj = (t.to(device, dtype) for t in (x, proj))
    return [x, proj, *(None if t is None else t.to(device, parameter) for t in (dt_weight, dt_bias, A, D))]


def options_of(problem):
    return {name: problem[name] for name in ("paths", "exchange", "discretization")}


def with_gradients(function, tensors, seed_gradient):
    """Output of function(*tensors) and the gradients of all tensors that are not None."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    y.backward(seed_gradient.to(y))
    return y.detach(), [None if t is None else t.grad for t in tensors]


def double(tensors):
    """The same tensors in float64 on the CPU, for the reference."""
    return [None if t is None else t.detach().double().cpu() for t in tensors]
