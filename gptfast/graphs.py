"""CUDA graphs of what a step does on the device. In a group of several ranks each captures its own
part while rank 0 captures, and replays it when rank 0 does.
"""

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from gptfast.parallel import Group, Op, before_end
from gptfast.together import known, number_of

Results = TypeVar("Results")


class Graph:
    """What was captured once, to be run again and again on the same addresses."""

    def __init__(self, group: Group, graph: torch.cuda.CUDAGraph) -> None:
        self._group, self._graph = group, graph
        _alive.add(self)

    def let_go(self) -> None:
        """Never to be replayed again."""
        self._graph.reset()

    def replay(self) -> None:
        with self._group.unbroken():
            if self._group.leads:
                self._group.send(Op.REPLAY, number_of(self))
            self._graph.replay()


_alive: "weakref.WeakSet[Graph]" = weakref.WeakSet()


def _let_all_go() -> None:
    """NCCL (2.26 and after) does not end before the graphs that hold its collectives do."""
    if _alive:
        torch.cuda.synchronize()
    for graph in list(_alive):
        graph.let_go()


before_end(_let_all_go)


def capture(
    group: Group, device: torch.device, function: Callable[[], Results]
) -> tuple[Graph, Results]:
    """A graph of what `function` does on the device, and what it returns: there later results will
    be. Capturing runs nothing, so no row is disturbed.
    """
    with group.unbroken():
        if group.leads:
            group.send(Op.CAPTURE)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        # Threads of NCCL's own may do meanwhile what is forbidden in this one.
        mode = "global" if group.is_alone else "thread_local"
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=stream, capture_error_mode=mode),
        ):
            results = function()
        if group.leads:
            group.send(Op.CAPTURED)
        captured = Graph(group, graph)
        return (captured if group.is_alone else known(group, captured)), results
