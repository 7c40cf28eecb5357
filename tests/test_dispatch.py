from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diffmf_ops.flops  # noqa: F401
from diffmf_ops import backend, cross_scan, depthwise_conv_silu, selective_scan, ss2d
from diffmf_ops.checks import check_once
from diffmf_ops.depthwise_conv_silu import _depthwise_conv_silu


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def inputs():
    return torch.randn(2, 5, 6, 8), torch.randn(8, 1, 3, 3), torch.randn(8)


def test_a_plain_call_does_not_meet_the_dispatcher(monkeypatch):
    x, weight, bias = (t.requires_grad_() for t in inputs())
    expected = torch.ops.diffmf.depthwise_conv_silu(*(t.unsqueeze(0) for t in (x, weight, bias))).squeeze(0)
    monkeypatch.setattr(_depthwise_conv_silu, "registered", None)
    y = depthwise_conv_silu(x, weight, bias)
    assert torch.equal(y, expected)
    wanted, found = (torch.autograd.grad(t.sum(), (x, weight, bias)) for t in (expected, y))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_dispatch_modes_see_the_operators():
    x, weight, bias = (t.requires_grad_() for t in inputs())
    with Recorder() as recorder:
        depthwise_conv_silu(x, weight, bias).sum().backward()
    assert {"diffmf.depthwise_conv_silu.default", "diffmf.depthwise_conv_silu_backward.default"} <= set(recorder.seen)


def test_flops_are_counted():
    """A multiply-add is 2, a state's step 9; backward twice forward."""
    B, L, K, D, R, N = 2, 3 * 5, 4, 6, 2, 7
    x, proj = torch.randn(B, 3, 5, D, requires_grad=True), torch.randn(B, 3, 5, K, R + 2 * N)
    parameters = torch.randn(K, D, R), torch.randn(K, D), -torch.rand(K, D, 1), torch.randn(K, D)
    with FlopCounterMode(display=False) as counter:
        ss2d(x, proj, *parameters).sum().backward()
    forward = B * K * L * D * (2 * R + 9 * N + 1)
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.diffmf.ss2d] == forward and counted[torch.ops.diffmf.ss2d_backward] == 2 * forward

    sequences = [torch.randn(B, c, L) for c in (D, D)], [torch.randn(B, 1, N, L) for _ in range(2)]
    u = sequences[0][0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        selective_scan(u, sequences[0][1], -torch.rand(D, N), *sequences[1]).sum().backward()
    assert counter.get_total_flops() == 3 * 9 * B * L * D * N

    x, weight, _ = inputs()
    with FlopCounterMode(display=False) as counter:
        depthwise_conv_silu(x.requires_grad_(), weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 9 * x.numel()


def test_transforms_see_the_operators():
    x = torch.randn(2, 3, 4, 5)
    gradient = torch.func.grad(lambda t: cross_scan(t).square().sum())(x)
    torch.testing.assert_close(gradient, 8 * x)


def test_gradients_of_every_item():
    """torch.func.vmap of a gradient, with tensors that are batched along other axes, or not, or missing."""
    x, proj = torch.randn(3, 1, 4, 5, 6), torch.randn(1, 4, 5, 4, 3, 6)
    A = -torch.rand(4, 6, 2)

    def loss(dt_weight, x, proj):
        return ss2d(x, proj, dt_weight, torch.zeros(4, 6), A).square().sum()

    dt_weight = torch.randn(4, 6, 2)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 4))(dt_weight, x, proj)
    for i in range(3):
        assert torch.equal(found[i], torch.func.grad(loss)(dt_weight, x[i], proj[..., i, :]))


def test_jacobians_by_batched_gradients():
    x, weight, bias = inputs()

    def function(bias):
        return depthwise_conv_silu(x[:1, :2, :2], weight, bias)

    expected = torch.autograd.functional.jacobian(function, bias)
    assert expected.shape == (1, 2, 2, 8, 8)
    torch.testing.assert_close(torch.func.jacrev(function)(bias), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(function, bias, vectorize=True), expected)


def test_tensor_subclasses_see_the_operators():
    with torch._subclasses.FakeTensorMode():
        x, weight, bias = inputs()
        assert depthwise_conv_silu(x, weight, bias).shape == x.shape


def test_meta_tensors_have_shapes_only():
    x, weight, bias = (t.to("meta") for t in inputs())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = depthwise_conv_silu(x, weight, bias)
        assert y.is_meta and y.shape == x.shape


def test_negated_views_have_their_sign():
    x = torch.randn(2, 5, 6, 1, dtype=torch.complex64).conj().imag
    _, weight, _ = inputs()
    assert x.is_neg()
    found = depthwise_conv_silu(x, weight[:1])
    assert torch.equal(found, depthwise_conv_silu(x.clone(), weight[:1]))


def test_profilers_name_the_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        depthwise_conv_silu(*inputs())
    assert "diffmf::depthwise_conv_silu" in {event.key for event in profile.key_averages()}


def test_forward_mode_differentiation_is_refused():
    x, weight, bias = inputs()
    message = "diffmf::depthwise_conv_silu: forward-mode differentiation is not supported"
    with forward_ad.dual_level():
        depthwise_conv_silu(x, weight, bias)
        with pytest.raises(NotImplementedError, match=message):
            depthwise_conv_silu(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda t: depthwise_conv_silu(t, weight, bias), (x,), (torch.ones_like(x),))


def test_arguments_that_passed_a_check_pass_it_again_without_it():
    checked = []

    def check(tensor, limit):
        checked.append((tensor, limit))
        if len(tensor) > limit:
            raise ValueError("tensor: too long")

    for tensor in (torch.zeros(3), torch.ones(3), torch.zeros(3, requires_grad=True)):
        check_once(check, tensor, 4)
    assert len(checked) == 1
    for tensor in (torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta")):
        check_once(check, tensor, 4)
    check_once(check, torch.zeros(3), 5)
    assert len(checked) == 5
    for _ in range(2):
        with pytest.raises(ValueError):
            check_once(check, torch.zeros(3), 2)
        check_once(check, [0, 0, 0], 4)  # no key for a list
    assert len(checked) == 9


@pytest.mark.parametrize(
    ("archs", "runs", "does_not_run"),
    [
        ("80-real 90", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a-real 120-real", [(9, 0), (12, 0), (12, 1)], [(8, 9), (10, 3)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("80-virtual", [(8, 0), (12, 0)], [(7, 5)]),
        ("native", [(9, 0)], []),
    ],
)
def test_which_gpus_a_build_runs_on(archs, runs, does_not_run, monkeypatch):
    module = SimpleNamespace(cuda_archs=archs)
    monkeypatch.setattr(backend, "module", lambda: module)
    backend._check_capability.cache_clear()
    for capability in runs + does_not_run:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        device = torch.device("cuda", 10 * capability[0] + capability[1])
        if capability in runs:
            backend._check_capability(device)
            continue
        with pytest.raises(RuntimeError, match=rf"cuda:\d+ has compute .*, but diffmf was built for {archs};"):
            backend._check_capability(device)
    backend._check_capability.cache_clear()
