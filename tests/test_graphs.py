"""The end of captured graphs. tests/test_gpu.py captures."""

import pytest
import torch

from gptfast.graphs import Graph, _let_all_go
from gptfast.parallel import Group


def test_graphs_end_before_their_group_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for them, and a group's end waited for ever. Those that nobody has are gone."""
    ended = []

    class Captured:
        def reset(self) -> None:
            ended.append(self)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kept, forgotten = (Graph(Group(0, 2), Captured()) for _ in range(2))  # type: ignore[arg-type]
    captured = kept._graph
    del forgotten
    _let_all_go()
    assert ended == [captured]
