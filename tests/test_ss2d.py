import pytest
import torch
from helpers import (
    PARAMETERS,
    SS2D_TOLERANCES,
    assert_close,
    double,
    make_inputs,
    options_of,
    problems,
    relative_error,
    with_gradients,
)
from hypothesis import given

import diffmf_ops
from diffmf_ops import reference, ss2d

NAMES = ("x", "proj", *PARAMETERS)


def check_against_reference(tensors, options, tolerances):
    seed = torch.randn(reference_shape(tensors, options), dtype=tensors[0].dtype)
    y, gradients = with_gradients(lambda *t: ss2d(*t, **options), tensors, seed)
    expected, expected_gradients = with_gradients(lambda *t: reference.ss2d(*t, **options), double(tensors), seed)
    assert y.dtype == tensors[0].dtype
    errors = [relative_error(y, expected)]
    assert_close(y, expected, tolerances[0], "y")
    for name, found, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert_close(found, wanted, tolerances[1], f"gradient of {name}")
            errors.append(relative_error(found, wanted))
    return errors


def reference_shape(tensors, options):
    x, dt_weight = tensors[0], tensors[2]
    per_path = x.dim() == dt_weight.dim() + 2
    return (*x.shape[:-2], x.shape[-1]) if per_path else x.shape


@pytest.mark.parametrize("dtype", SS2D_TOLERANCES, ids=str)
@given(problem=problems())
def test_matches_the_reference(device, dtype, problem):
    tensors = make_inputs(**problem, device=device, dtype=dtype)
    check_against_reference(tensors, options_of(problem), SS2D_TOLERANCES[dtype])


@given(problem=problems(max_side=7, max_channels=18, max_states=6))
def test_float64_matches_the_reference(problem):
    # Largest over 100 draws: 5e-16 forward, 4e-15 in a gradient.
    tensors = make_inputs(**problem, dtype=torch.float64)
    check_against_reference(tensors, options_of(problem), (1e-12, 1e-11))


@pytest.mark.parametrize(
    ("height", "width", "channels", "states", "rank", "paths"),
    [
        (1, 1, 1, 1, 1, (0, 1, 2, 3)),
        (1, 300, 3, 2, 1, (0, 2, 1, 3)),
        (67, 1, 5, 16, 2, (3,)),
        (23, 29, 64, 16, 2, (0, 1, 2, 3)),
        (9, 11, 256, 3, 16, (0, 3)),
        (5, 7, 4, 256, 64, (1, 2)),
        (6, 5, 300, 33, 48, (0, 1)),
        (9, 14, 22, 100, 3, (0, 1, 2, 3)),
        (8, 8, 192, 1, 6, (0, 1, 2, 3)),
        (7, 5, 8, 64, 1, (0, 0, 1, 1, 2, 2, 3, 3)),
    ],
)
@pytest.mark.parametrize("exchange", ["none", "from_visible"])
def test_extreme_shapes(device, height, width, channels, states, rank, paths, exchange):
    problem = {"height": height, "width": width, "channels": channels, "states": states, "rank": rank, "paths": paths}
    tensors = make_inputs(modalities=1 if exchange == "none" else 2, **problem, device=device)
    check_against_reference(tensors, {"paths": paths, "exchange": exchange}, SS2D_TOLERANCES[torch.float32])


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("exchange", ["none", "mutual", "from_visible", "from_infrared"])
def test_gradcheck(exchange, discretization):
    tensors = make_inputs(
        modalities=2, height=3, width=4, channels=3, states=2, paths=(0, 3), dtype=torch.float64, per_path=True
    )
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *t: ss2d(*t, paths=(0, 3), exchange=exchange, discretization=discretization), tensors
    )


def test_zoh_is_accurate_for_tiny_steps(device):
    # exp(Δ·A) − 1 cancels in float32 where Δ·A is about 1e-5; measured 1.5e-6 on the CPU.
    tensors = make_inputs(height=6, width=6, device=device)
    tensors[3] = torch.full_like(tensors[3], -12.0)
    options = {"discretization": "zoh"}
    check_against_reference(tensors, options, SS2D_TOLERANCES[torch.float32])


# Both sides of where the kernels take a polynomial for (exp(Δ·A) − 1)/(Δ·A), and far from it.
@pytest.mark.parametrize("shared_decay", [False, True], ids=["A", "scalar_A"])
def test_zoh_of_slow_fast_and_growing_states(device, shared_decay):
    tensors = make_inputs(height=9, width=11, channels=12, states=6, shared_decay=shared_decay, device=device)
    sizes = torch.tensor([-1e-12, -1e-3, -0.4, -3.0, -40.0, 0.02], device=device)
    shape = tensors[4].shape  # [M, K, D, N or 1]
    tensors[4] = (sizes.repeat(2)[:, None] if shared_decay else sizes).expand(shape).contiguous()
    options = {"discretization": "zoh"}
    check_against_reference(tensors, options, SS2D_TOLERANCES[torch.float32])
    slow, still = [list(tensors) for _ in range(2)]
    slow[4], still[4] = torch.full(shape, -1e-12, device=device), torch.zeros(shape, device=device)
    assert_close(ss2d(*still, **options), ss2d(*slow, **options), 1e-5)  # bbar = Δ where A = 0
    check_against_reference(still, options, SS2D_TOLERANCES[torch.float32])


def test_very_negative_raw_step_keeps_its_relative_accuracy(device):
    # softplus(-30) = 9e-14: log(1 + e^x) taken naively is 0 in float32.
    tensors = make_inputs(height=4, width=4, skip=False, device=device)
    tensors[3] = torch.full_like(tensors[3], -30.0)
    check_against_reference(tensors, {}, SS2D_TOLERANCES[torch.float32])


def test_two_runs_give_the_same_bits(device):
    tensors = make_inputs(modalities=2, batch=2, height=33, width=41, channels=64, states=16, device=device)
    seed = torch.randn(tensors[0].shape)
    runs = [with_gradients(lambda *t: ss2d(*t, exchange="from_visible"), tensors, seed) for _ in range(3)]
    for y, gradients in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, runs[0][1], strict=True))


def test_thread_count_does_not_change_a_bit():
    tensors = make_inputs(height=20, width=30, channels=48, states=8)
    seed = torch.randn(tensors[0].shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(ss2d, tensors, seed))
    finally:
        torch.set_num_threads(before)
    for y, gradients in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_nonfinite_values_stay_in_their_batch_item(device):
    tensors = make_inputs(batch=3, height=9, width=9, device=device)
    clean = ss2d(*tensors)
    tensors[0][1, 4, 4, 0] = float("nan")
    tensors[1][1, 2, 2, 0, 3] = float("inf")
    y = ss2d(*tensors)
    assert not torch.isfinite(y[1]).all()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])


def test_nan_reaches_the_tokens_after_it(device):
    tensors = make_inputs(height=1, width=40, paths=(0,), device=device)
    tensors[0][0, 0, 25] = float("nan")
    y = ss2d(*tensors, paths=(0,))
    assert torch.isfinite(y[0, 0, :25]).all() and torch.isnan(y[0, 0, 25:]).all()


@pytest.mark.parametrize("where", ["x", "proj"])
@pytest.mark.parametrize(("states", "shared_decay"), [(4, False), (4, True), (24, True), (40, True)])
def test_nan_of_one_path_reaches_the_tokens_after_it_and_no_other(device, states, shared_decay, where):
    tensors = make_inputs(
        height=1, width=40, states=states, shared_decay=shared_decay, paths=(0, 2), per_path=True, device=device
    )
    tensors[NAMES.index(where)][0, 0, 21, 0] = float("nan")  # path 0 alone
    y = ss2d(*tensors, paths=(0, 2))
    assert torch.isfinite(y[0, 0, :21]).all() and torch.isnan(y[0, 0, 21:]).all()
    tensors[NAMES.index(where)][0, 0, :, 0] = 0.0
    tensors[NAMES.index(where)][0, 0, 21, 1] = float("nan")  # path 2, from the end
    y = ss2d(*tensors, paths=(0, 2))
    assert torch.isfinite(y[0, 0, 22:]).all() and torch.isnan(y[0, 0, :22]).all()


@pytest.mark.parametrize("dtype", SS2D_TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("states", "channels", "rank"), [(17, 5, 1), (24, 40, 3), (32, 64, 2), (33, 16, 7), (64, 24, 4), (65, 8, 2)]
)
@pytest.mark.parametrize("steep", [False, True])
def test_many_states_share_a_decay(device, dtype, states, channels, rank, steep):
    """On a GPU by matrix products up to 64 states; steep decays leave their range within a tile."""
    tensors = make_inputs(
        batch=2, height=13, width=21, channels=channels, states=states, rank=rank, shared_decay=True, device=device,
        dtype=dtype,
    )  # fmt: skip
    if steep:
        tensors[4] = tensors[4] * 60
    check_against_reference(tensors, {}, SS2D_TOLERANCES[dtype])


def test_empty_batch(device):
    tensors = [t.requires_grad_() for t in make_inputs(batch=0, device=device)]
    y = ss2d(*tensors)
    assert y.shape == tensors[0].shape
    y.sum().backward()
    assert all((t.grad == 0).all() for t in tensors[2:])


def test_double_backward_is_refused(device):
    tensors = [t.requires_grad_() for t in make_inputs(height=3, width=3, device=device)]
    (gradient,) = torch.autograd.grad(ss2d(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_autocast_casts_activations_and_keeps_parameters(device):
    tensors = make_inputs(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ss2d(*tensors)
    assert y.dtype == torch.bfloat16
    rounded = [t.bfloat16() for t in tensors[:2]] + tensors[2:]
    assert torch.equal(y, ss2d(*rounded))


def test_autocast_hides_no_bad_input(device):
    x, proj, *parameters = make_inputs(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"x: dtype .*int32"):
            ss2d(x.int(), proj, *parameters)
        with pytest.raises(TypeError, match=r"proj: dtype .*complex64"):
            ss2d(x, proj + 1j, *parameters)
        with pytest.raises(TypeError, match="proj: a list"):
            ss2d(x, [proj], *parameters)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device, reentrant):
    tensors = [t.requires_grad_() for t in make_inputs(device=device)]
    expected = torch.autograd.grad(ss2d(*tensors).square().sum(), tensors)
    y = torch.utils.checkpoint.checkpoint(ss2d, *tensors, use_reentrant=reentrant)
    y.square().sum().backward()
    assert all(torch.equal(t.grad, wanted) for t, wanted in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", ["none", "mutual"])
def test_opcheck(device, dtype, exchange):
    tensors = make_inputs(modalities=2, height=4, width=5, channels=6, states=3, device=device, dtype=dtype)
    tensors = [t.requires_grad_() for t in tensors]
    arguments = (*tensors, (0, 1, 2, 3), exchange, "euler", True)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if torch.__version__ >= (2, 7) else {}  # before, opcheck has its own only
    torch.library.opcheck(torch.ops.diffmf.ss2d.default, arguments, **tolerance)
    with torch.no_grad():
        y, states = torch.ops.diffmf.ss2d(*arguments)
    detached = [t.detach() for t in tensors]
    torch.library.opcheck(
        torch.ops.diffmf.ss2d_backward.default,
        (torch.randn_like(y), states, *detached, (0, 1, 2, 3), exchange, "euler"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device, dynamic):
    torch._dynamo.reset()

    def block(*tensors):
        return torch.nn.functional.silu(ss2d(*tensors, exchange="mutual")) * 2

    # The same kernel, but the arithmetic around it may be ordered differently: a few float32 roundings.
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height in (5, 9) if dynamic else (5,):
        tensors = make_inputs(modalities=2, height=height, width=6, device=device)
        seed = torch.randn(tensors[0].shape)
        y, gradients = with_gradients(compiled, tensors, seed)
        expected, expected_gradients = with_gradients(block, tensors, seed)
        assert_close(y, expected, 1e-6)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            assert_close(found, wanted, 1e-6)


def test_exports(device):
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return ss2d(*tensors)

    tensors = tuple(make_inputs(device=device))
    program = torch.export.export(Scan(), tensors)
    assert torch.equal(program.module()(*tensors), ss2d(*tensors))


def test_inference_saves_no_states(monkeypatch):
    saved = []
    original = diffmf_ops.scan.forward

    def spy(*arguments, **options):
        saved.append(options["save_states"])
        return original(*arguments, **options)

    monkeypatch.setattr(diffmf_ops.scan, "forward", spy)
    tensors = make_inputs()
    ss2d(*tensors)
    tensors[4].requires_grad_()
    with torch.no_grad():
        ss2d(*tensors)
    ss2d(*tensors)
    assert saved == [False, False, True]


def _changed(index, change, **problem):
    tensors = make_inputs(**problem)
    tensors[index] = change(tensors[index])
    return tensors


BAD = {
    "x: shape": lambda: (_changed(0, lambda t: t[0, 0]), {}),
    "x: dtype torch.int32": lambda: (_changed(0, lambda t: t.int()), {}),
    "proj: dtype torch.bfloat16": lambda: (_changed(1, lambda t: t.bfloat16()), {}),
    "proj: rows of 9": lambda: (_changed(1, lambda t: t[..., :9]), {}),
    "proj: shape": lambda: (_changed(1, lambda t: t[:, :3]), {}),
    "dt_weight: shape": lambda: (_changed(2, lambda t: t[:, :3]), {}),
    "dt_weight: dtype torch.float64": lambda: (_changed(2, lambda t: t.double()), {}),
    "dt_bias: shape": lambda: (_changed(3, lambda t: t[:2]), {}),
    "A: shape": lambda: (_changed(4, lambda t: t[..., :2]), {}),
    "D: shape": lambda: (_changed(5, lambda t: t[..., :2]), {}),
    "A: on meta": lambda: (_changed(4, lambda t: t.to("meta")), {}),
    "paths: ": lambda: (make_inputs(), {"paths": (0, 1, 2, 4)}),
    "paths: \\(\\)": lambda: (make_inputs(), {"paths": ()}),
    "exchange: 'both'": lambda: (make_inputs(modalities=2), {"exchange": "both"}),
    "exchange: 'mutual' with one modality": lambda: (make_inputs(), {"exchange": "mutual"}),
    "discretization: 'bilinear'": lambda: (make_inputs(), {"discretization": "bilinear"}),
    "proj: states N: 300": lambda: (make_inputs(states=300), {}),
    "dt_weight: rank R: 65": lambda: (make_inputs(rank=65), {}),
    "x: torch.sparse_coo": lambda: (_changed(0, lambda t: t.to_sparse()), {}),
    "x: a list": lambda: (_changed(0, lambda t: t.tolist()), {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    tensors, options = BAD[message]()
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        ss2d(*tensors, **options)
    assert "expected" in str(caught.value)
