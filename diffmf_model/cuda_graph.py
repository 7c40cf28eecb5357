"""Functions of tensors as CUDA graphs: where launches, not kernels, take the time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # on a stream of their own, as capture wants it: they choose convolutions and allocate


def captured(function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """`function(*inputs)` as a CUDA graph: the result replays it for other CUDA or pinned tensors of the same shapes.

    Every replay returns the same tensors, overwritten. Gradients that the function resets and computes are rewritten
    too. The function must not wait for the device or choose anything by a tensor's value, and must enter autocast
    itself: what autocast keeps of the weights is gone when it ends, and the graph would read it. It runs on the device
    of the first input, or without inputs on the current one.
    """
    inputs = [each.clone() for each in inputs]
    with torch.cuda.device(inputs[0].device if inputs else None):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread may be pinning memory
            outputs = function(*inputs)

    def replay(*values: Tensor) -> Any:
        for kept, value in zip(inputs, values, strict=True):
            kept.copy_(value, non_blocking=True)
        graph.replay()
        return outputs

    replay.function = function  # the graph reads what it holds, a model's weights for example, but does not keep it
    return replay
