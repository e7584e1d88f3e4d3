"""What ranks other than 0 do: what rank 0 tells them, until it ends."""

from functools import partial

import torch

from gptfast import together
from gptfast.cached import CachedModel
from gptfast.graphs import Graph, capture
from gptfast.parallel import Group, Op, give_up


def follow(group: Group) -> None:
    """Returns when rank 0 has ended in good order."""
    try:
        _obey(group, until=Op.STOP)
    except BaseException as error:
        give_up(error)
        raise


def _obey(group: Group, until: Op) -> None:
    while True:
        op, number, *numbers = group.receive()
        if op == until:
            return
        if op == Op.CALL:
            together.answer(group, number)
        elif op == Op.FREE:
            together.free(number)
        elif op == Op.CAPTURE:
            device = torch.device("cuda", torch.cuda.current_device())
            capture(group, device, partial(_obey, group, Op.CAPTURED))
        else:
            _run(together.made(number), Op(op), numbers)


def _run(made: CachedModel | Graph, op: Op, numbers: list[int]) -> None:
    if isinstance(made, Graph):
        made.replay()
    else:
        made.follow(op, numbers)
