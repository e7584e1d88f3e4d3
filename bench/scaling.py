"""The model of scaling: what a decode step takes when ranks share a model, from what each has to
read and what they have to tell each other. Arithmetic; measures nothing.

    step     = read + exchange + fixed
    read     = (weights + tokens in the cache x cache bytes a token) / (bandwidth x reached)
    exchange = sum over collectives: count x (latency + moved bytes / link bandwidth)
    fixed    = step_s + layers x layer_s: kernel boundaries, the host, sampling

Bytes are those of the rank that has most; `fixed` does not shrink with the number of ranks. All
ranks wait for each other at every collective, so nothing of this overlaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "broadcast"]


@dataclass(frozen=True)
class Share:
    """What one rank has to read for a token, in bytes: weights (`whole_bytes` of them are not cut:
    every rank reads them), and keys and values for each token in the cache.
    """

    weight_bytes: float
    whole_bytes: float = 0.0
    cache_bytes_per_token: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """A collective of a step, `count` times, of a tensor of `num_bytes` on each rank."""

    what: str
    kind: Kind
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Link:
    """What connects ranks: seconds of the smallest collective, and bytes a second into one rank."""

    latency_s: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """`bandwidth`: bytes a second that one rank's memory gives while all ranks read, of which a
    step `reached` that part. `link` is within a host. Where ranks are on several hosts of
    `ranks_per_host`, a collective takes a second round over the `network`.
    """

    bandwidth: float
    reached: float
    link: Link
    layer_s: float = 0.0
    step_s: float = 0.0
    network: Link | None = None
    ranks_per_host: int = 8


def moved_bytes(kind: Kind, num_bytes: float, num_ranks: int) -> float:
    """Bytes that come into the busiest rank, in the algorithm that moves least: a ring for sums."""
    if num_ranks == 1:
        return 0.0
    if kind == "all_reduce":
        return 2 * num_bytes * (num_ranks - 1) / num_ranks
    return num_bytes * (num_ranks - 1 if kind == "all_gather" else 1)


def collective_seconds(kind: Kind, num_bytes: float, num_ranks: int, machine: Machine) -> float:
    """Of one: among the ranks of a host, then among hosts. 0 where there is nobody to talk to.
    ValueError where hosts are not connected.
    """
    local = min(num_ranks, machine.ranks_per_host)
    num_hosts = -(-num_ranks // machine.ranks_per_host)
    rounds = [(machine.link, local, num_bytes)] if local > 1 else []
    if num_hosts > 1:
        if machine.network is None:
            raise ValueError(f"{num_ranks} ranks need {num_hosts} hosts, and there is no network")
        # Gathered from a whole host at once; sums are as large as each part.
        together = local * num_bytes if kind == "all_gather" else num_bytes
        rounds.append((machine.network, num_hosts, together))
    return sum(
        link.latency_s + moved_bytes(kind, size, count) / link.bandwidth
        for link, count, size in rounds
    )


def exchange_seconds(exchanges: Sequence[Exchange], num_ranks: int, machine: Machine) -> float:
    """Of all collectives of a step."""
    return sum(
        each.count * collective_seconds(each.kind, each.num_bytes, num_ranks, machine)
        for each in exchanges
    )


def read_seconds(share: Share, context: int, machine: Machine) -> float:
    """Of the weights, and of a cache that holds `context` tokens."""
    size = share.weight_bytes + context * share.cache_bytes_per_token
    return size / (machine.bandwidth * machine.reached)


def step_seconds(
    share: Share,
    exchanges: Sequence[Exchange],
    num_layers: int,
    num_ranks: int,
    machine: Machine,
    context: int = 0,
) -> float:
    """Of one decode step: see the top."""
    fixed = machine.step_s + num_layers * machine.layer_s
    exchange = exchange_seconds(exchanges, num_ranks, machine)
    return read_seconds(share, context, machine) + exchange + fixed


def efficiency(tok_s: float, num_ranks: int, alone_tok_s: float) -> float:
    """Of `num_ranks` ranks, beside as many times the speed of one."""
    return tok_s / (num_ranks * alone_tok_s)


def fitted(
    machine: Machine,
    num_layers: int,
    alone: tuple[Share, float],
    shared: tuple[Share, Sequence[Exchange], int, float],
) -> Machine:
    """`machine` with the `reached` and the `layer_s` at which two measured steps of a model take
    the seconds that they took: alone (share, seconds), and of several ranks (share, exchanges,
    number of ranks, seconds). ValueError where no positive values do.
    """
    few, exchanges, num_ranks, shared_s = shared
    many, alone_s = alone
    quiet_s = shared_s - exchange_seconds(exchanges, num_ranks, machine)
    if not (many.weight_bytes > few.weight_bytes and alone_s > quiet_s):
        raise ValueError("fewer bytes must take less time; these two steps fit no machine")
    speed = (many.weight_bytes - few.weight_bytes) / (alone_s - quiet_s)
    layer_s = (alone_s - many.weight_bytes / speed - machine.step_s) / num_layers
    if layer_s < 0:
        raise ValueError("the steps leave less than no time for what does not shrink")
    return replace(machine, reached=speed / machine.bandwidth, layer_s=layer_s)
