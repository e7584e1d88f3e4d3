"""What the ranks (processes) of one host say to each other through memory that all of them have
mapped: sums of 4 KB take some microseconds, where sockets take hundreds.

The ops are functional, and opaque to the compiler. Ranks have to call them in one order, which is
theirs in eager code. A compiled graph keeps the order of ops of which one needs the result of the
other, as a model's do, and leaves out those whose result nobody uses: so nothing may hang on either
where ranks compile different graphs.

An op waits without the GIL: first it spins, then it sleeps. `SharedMemory.abort` ends all waits,
those to come too, with a RuntimeError in every rank.
"""

import os
import secrets
import stat
import weakref
from pathlib import Path

import torch
from torch import Tensor

from gptfast.kernels.cpu_step import STEP

FOLDER = Path("/dev/shm")
# Longer tensors are said in pieces. 16 rows of 16384 float32, all that a fused step says at once.
PIECE_BYTES = 1 << 20

# Not `custom_op`: that costs 14 us a call beside 2.5, and the first one imports the compiler (1 s).
for _name in ("shared_all_reduce", "shared_all_gather", "shared_broadcast"):
    torch.library.define(f"gptfast::{_name}", "(Tensor x, int handle) -> Tensor")


class SharedMemory:
    """This rank's access to memory of `size` ranks. One rank creates it and tells the others its
    name; the file of that name is gone when all have attached.

    One thread at a time uses it; `handle` is what the ops take.
    """

    def __init__(self, path: Path, rank: int, size: int, piece_bytes: int) -> None:
        self.name, self.rank, self.size = path.name, rank, size
        with open(path, "r+b", opener=_opened) as file:
            found = os.fstat(file.fileno())
            needed = torch.ops.gptfast.shared_file_bytes(size, piece_bytes)
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o600:
                raise ValueError(f"{path} is not of this user alone")
            if found.st_size != needed:
                raise ValueError(
                    f"{path} has {found.st_size} bytes; {size} ranks need {needed}: "
                    "was it created for another number of ranks?"
                )
            self.handle, is_last = torch.ops.gptfast.map_shared(
                file.fileno(), rank, size, piece_bytes
            )
        if is_last:
            path.unlink()
        # Not at the end of the process, where a thread may still be waiting.
        weakref.finalize(self, torch.ops.gptfast.unmap_shared, self.handle).atexit = False

    @classmethod
    def create(cls, size: int, piece_bytes: int = PIECE_BYTES) -> "SharedMemory":
        """As rank 0. ValueError where `why_not` has a reason, or there is not enough memory."""
        if (reason := why_not()) is not None:
            raise ValueError(reason)
        path = FOLDER / f"gptfast-{secrets.token_hex(16)}"
        needed = torch.ops.gptfast.shared_file_bytes(size, piece_bytes)
        try:
            with open(path, "xb", opener=_opened) as file:
                os.posix_fallocate(file.fileno(), 0, needed)  # else SIGBUS, where memory is short
            memory = cls(path, 0, size, piece_bytes)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise ValueError(
                    f"{FOLDER} has no {needed} bytes for {size} ranks ({error.strerror})"
                ) from None
            raise
        weakref.finalize(memory, path.unlink, missing_ok=True)  # where not all have come
        return memory

    @classmethod
    def attach(
        cls, name: str, rank: int, size: int, piece_bytes: int = PIECE_BYTES
    ) -> "SharedMemory":
        """As another rank. ValueError where this process cannot reach what rank 0 created."""
        if (reason := why_not()) is not None:
            raise ValueError(reason)
        try:
            return cls(FOLDER / Path(name).name, rank, size, piece_bytes)
        except OSError as error:
            raise ValueError(
                f"rank {rank} does not find {FOLDER / name} ({error.strerror}): "
                "is it on another host, or in another container?"
            ) from None

    def abort(self) -> None:
        """Makes every rank that waits raise RuntimeError, and all that will. From any thread."""
        torch.ops.gptfast.abort_shared(self.handle)


def why_not() -> str | None:
    """Why ranks cannot share memory here; None where they can."""
    if not os.access(FOLDER, os.W_OK):
        return f"{FOLDER} is not there, or cannot be written"
    return STEP.why_not() if STEP.load() is None else None


def shared_all_reduce(x: Tensor, handle: int) -> Tensor:
    """The sum of all ranks' x (bfloat16, float16 or float32, of one shape), added up in float32 in
    the order of ranks: the same bits on all.
    """
    return torch.ops.gptfast.shared_all_reduce.default(x, handle)


def shared_all_gather(x: Tensor, handle: int) -> Tensor:
    """All ranks' x [..], of any type and of one shape -> [size, ..]."""
    return torch.ops.gptfast.shared_all_gather.default(x, handle)


def shared_broadcast(x: Tensor, handle: int) -> Tensor:
    """Rank 0's x; the others' have its shape and type. Rank 0 does not wait for them."""
    return torch.ops.gptfast.shared_broadcast.default(x, handle)


@torch.library.register_fake("gptfast::shared_all_reduce")
@torch.library.register_fake("gptfast::shared_broadcast")
def _(x: Tensor, handle: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("gptfast::shared_all_gather")
def _(x: Tensor, handle: int) -> Tensor:
    return x.new_empty(torch.ops.gptfast.shared_size(handle), *x.shape)


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
