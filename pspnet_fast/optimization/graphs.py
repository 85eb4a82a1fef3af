"""CUDA graphs of a function, one for each shape of its arguments."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Function = Callable[..., Any]
MOST = 4  # graphs, each of which keeps its memory
_WARM_UP = 3  # calls before a capture, in which libraries choose their kernels


class Graphs:
    """Replays a function of CUDA tensors from the second call on with arguments of the same shapes.

    Only the first shapes that recur get a graph; with others, and where capturing fails, the function runs as it is.
    Results are the caller's. Calls from several threads wait for one another.

    Args:
        function: of tensors alone, whose result depends on nothing else.
        capture: makes the replay of a function on given arguments; replaced in tests.
    """

    def __init__(self, function: Function, capture: Callable[..., Function] | None = None) -> None:
        self._function, self._capture = function, capture or _capture
        self._graphs: dict[Any, Function] = {}
        self._seen: Counter[Any] = Counter()
        self._lock = threading.Lock()

    def __call__(self, *tensors: Tensor) -> Any:
        """function(*tensors)."""
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        with self._lock:
            if key not in self._graphs:
                self._seen[key] += 1
                if self._seen[key] < 2 or len(self._graphs) >= MOST:
                    return self._function(*tensors)
                try:
                    self._graphs[key] = self._capture(self._function, *tensors)
                except RuntimeError:  # it waits for the device, for example
                    self._graphs[key] = self._function
            return self._graphs[key](*tensors)


def _capture(function: Function, *tensors: Tensor) -> Function:
    inputs = [t.clone() for t in tensors]
    device = tensors[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function(*inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)

    def replay(*tensors: Tensor) -> Any:
        for to, tensor in zip(inputs, tensors, strict=True):
            to.copy_(tensor)
        graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, outputs)

    return replay
