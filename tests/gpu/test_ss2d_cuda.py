"""What only a GPU can show: graph capture with one kernel node, streams, long sequences, 64-bit offsets."""

import ctypes
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from helpers import PARAMETERS, SS2D_TOLERANCES, assert_close, double, make_inputs, with_gradients

from diffmf_ops import cross_merge, cross_scan, ss2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kernel_names(function) -> list[str]:
    """Names of the kernels that one call launches, memset and copy nodes left out."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type.name == "CUDA" and "Mem" not in e.name]


def graph_kernel_nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Number of kernel nodes in a captured graph (kept with keep_graph=True)."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    count = ctypes.c_size_t()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    kernels = 0
    for node in nodes:
        kind = ctypes.c_int()
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kernels += kind.value == 0  # CU_GRAPH_NODE_TYPE_KERNEL
    return kernels


def capture(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def assert_matches_float64(tensors, **options):
    """y and every gradient of ss2d against the CPU kernel in float64."""
    forward, backward = SS2D_TOLERANCES[tensors[0].dtype]
    seed = torch.randn(tensors[0].shape)
    y, gradients = with_gradients(lambda *t: ss2d(*t, **options), tensors, seed)
    expected, expected_gradients = with_gradients(lambda *t: ss2d(*t, **options), double(tensors), seed)
    assert_close(y, expected, forward, "y")
    for name, found, wanted in zip(("x", "proj", *PARAMETERS), gradients, expected_gradients, strict=True):
        assert_close(found, wanted, backward, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", ["none", "mutual", "from_visible"])
def test_one_kernel_node_per_pass(dtype, exchange):
    tensors = make_inputs(modalities=2, height=96, width=160, channels=64, states=16, device="cuda", dtype=dtype)
    tensors = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        graph, y = capture(lambda: ss2d(*tensors, exchange=exchange))
    assert graph_kernel_nodes(graph) == 1
    y.zero_()
    graph.replay()
    assert torch.equal(y, ss2d(*tensors, exchange=exchange))

    # The backward pass is one launch, which also adds up the parts of the parameter gradients.
    y = ss2d(*tensors, exchange=exchange)
    seed = torch.randn_like(y)
    names = kernel_names(lambda: torch.autograd.grad(y, tensors, seed, retain_graph=True))
    assert len(names) == 1 and "ss2d_backward" in names[0], names


def test_forward_and_backward_replay_in_a_graph():
    tensors = make_inputs(height=70, width=50, channels=48, states=8, device="cuda")
    seed = torch.randn(tensors[0].shape, device="cuda")

    def step():
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = ss2d(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, seed)

    expected = [t.clone() for t in step()]
    graph, results = capture(step)
    for t in results:
        t.zero_()
    graph.replay()
    assert all(torch.equal(found, wanted) for found, wanted in zip(results, expected, strict=True))


def test_runs_on_the_current_stream():
    tensors = make_inputs(height=64, width=64, channels=64, states=16, device="cuda")
    expected = ss2d(*tensors)
    stream = torch.cuda.Stream()
    source = tensors[0].clone()
    tensors[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # x becomes right only after this stream's own delay
        tensors[0].copy_(source)
        y = ss2d(*tensors)
    stream.synchronize()
    assert torch.equal(y, expected)


# The bounds of the operators; an H200 was within them, its errors were not recorded.
@pytest.mark.parametrize(
    ("height", "width", "paths"),
    [(1024, 1024, (0, 1, 2, 3)), (1, 1_000_003, (0, 2)), (257, 1031, (1, 3))],
)
def test_long_sequences_match_float64(height, width, paths):
    tensors = make_inputs(height=height, width=width, channels=8, states=4, paths=paths, device="cuda")
    assert_matches_float64(tensors, paths=paths)


# Where the work does not divide evenly in the backward pass: blocks of 96 threads, and chunks that begin between two
# saved states.
@pytest.mark.parametrize(
    ("batch", "side", "channels", "states"),
    [(64, 28, 384, 1), (2, 90, 48, 16), (1, 32, 64, 16), (1, 95, 64, 16), (3, 41, 64, 8), (32, 57, 96, 16)],
)
def test_uneven_divisions_match_float64(batch, side, channels, states):
    tensors = make_inputs(batch=batch, height=side, width=side, channels=channels, states=states, device="cuda")
    assert_matches_float64(tensors)


# Up to 256 states, in both discretizations.
@pytest.mark.parametrize("shared_decay", [False, True], ids=["A", "scalar_A"])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("states", [129, 256])
def test_most_states_match_float64(states, discretization, shared_decay):
    tensors = make_inputs(height=9, width=23, channels=6, states=states, shared_decay=shared_decay, device="cuda")
    assert_matches_float64(tensors, discretization=discretization)


def assert_fits(shapes):
    for (channels, states, rank), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        shape = {"height": 9, "width": 23, "channels": channels, "states": states, "rank": rank}
        assert_matches_float64(make_inputs(**shape, device="cuda", dtype=dtype))


# What a block may have on an RTX 30 or 40 and on an A100. A device is asked once in a process, hence one of its own.
@pytest.mark.parametrize("shared_bytes", [101_376, 166_912])
def test_fits_devices_with_less_shared_memory(monkeypatch, shared_bytes):
    monkeypatch.setenv("DIFFMF_SHARED_BYTES", str(shared_bytes))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        # The last stages of VMamba-T and -B; high rank; many states.
        shapes = [(768, 1, 48), (1024, 1, 64), (40, 16, 64), (40, 128, 4), (24, 256, 4)]
        process.submit(assert_fits, shapes).result()


def test_names_what_a_device_lacks(monkeypatch):
    monkeypatch.setenv("DIFFMF_SHARED_BYTES", "16384")
    process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with process, pytest.raises(RuntimeError, match="bytes of shared memory, more than"):
        process.submit(assert_fits, [(64, 64, 2)]).result()


def test_default_width_at_a_megapixel_matches_float64():
    # The paper's width, 1,048,576 tokens, against the CPU kernel in float64.
    tensors = make_inputs(height=1024, width=1024, channels=64, states=16, paths=(0,), device="cuda")
    y = ss2d(*tensors, paths=(0,))
    assert_close(y, ss2d(*double(tensors), paths=(0,)), 1e-5)


def test_offsets_past_two_to_the_31():
    # proj has 2 * 3072 * 3072 * 4 * 34 = 2.57e9 elements; the second image lies wholly past 2^31.
    # Swapped, it lies before; both launches cut the images alike, so the bits must agree.
    one = make_inputs(height=3072, width=3072, channels=16, states=16, device="cuda", dtype=torch.bfloat16)
    x, proj = (torch.cat([torch.randn_like(t), t]) for t in one[:2])
    parameters = one[2:]
    assert proj.numel() > 2**31
    y = ss2d(x, proj, *parameters)
    assert torch.equal(ss2d(x.flip(0), proj.flip(0), *parameters)[0], y[1])


def test_scan_and_merge_match_the_reference_on_large_images():
    x = torch.randn(2, 3, 517, 300, device="cuda")
    y = cross_scan(x)
    assert torch.equal(y.cpu(), cross_scan(x.cpu()))
    assert torch.equal(cross_merge(y, (517, 300)).cpu(), cross_merge(y.cpu(), (517, 300)))
