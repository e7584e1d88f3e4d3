"""torch.compile as this project uses it: what it is told, where it keeps what it has made, and its
import beside other work. Knows no model.
"""

import gc
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from quantize.kernels.build import Unavailable, cache_folder


def compile_alone(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """torch.compile of a copy of `function`, so that other runners of the process do not count
    towards its recompilation limit: the compiler keeps its graphs with the code object.
    (`isolate_recompiles=True` says the same, but torch 2.11 does not know it.)

    What it makes is kept in `compiled_folder`, unless TORCHINDUCTOR_CACHE_DIR names another place.
    """
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    with suppress(Unavailable, OSError):  # then PyTorch's own place, below /tmp
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_folder()))
        if device.type == "cuda":  # for kernels of our own, before Inductor has any
            os.environ.setdefault("TRITON_CACHE_DIR", str(compiled_folder() / "triton"))
    return torch.compile(copy, fullgraph=True, options=options(device))


def options(device: torch.device) -> dict[str, Any]:
    """Inductor's settings."""
    if device.type == "cuda":
        return {"coordinate_descent_tuning": True}
    # Making a precompiled header takes 4 s, and kernels compile no faster with it (1.5 s each).
    found: dict[str, Any] = {"cpp_cache_precompile_headers": False}
    if platform.machine() in ("x86_64", "AMD64"):
        # Trying whether the compiler knows AVX costs 5 s cold and 0.9 warm. Every compiler of C++20
        # does; which of it the processor has is asked all the same.
        found["cpp.vec_isa_ok"] = True
    return found


def compiled_folder() -> Path:
    """Where compiled graphs are kept between processes. Unavailable as `cache_folder`."""
    return cache_folder("graphs")


@contextmanager
def started_early(device: torch.device) -> Iterator[None]:
    """Imports the compiler, and does what its first use does once, in a thread beside the `with`
    block, which ends when both have ended. It takes a second, as reading weights does.
    """
    thread = threading.Thread(target=_start, args=(device,), name="compiler")
    with without_collection():
        thread.start()
        try:
            yield
        finally:
            thread.join()


@contextmanager
def without_collection() -> Iterator[None]:
    """No search for circular garbage in the `with` block. It is a third of the time of importing
    the compiler, and a fifth of that of tracing, which make a million objects that stay.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _start(device: torch.device) -> None:
    """What fails here fails again, and is said, where something is compiled."""
    with suppress(Exception), torch.no_grad():
        linear = torch.nn.Linear(2, 2, device=device)
        x = torch.ones(2, 2, device=device)
        compile_alone(_run, device)(linear, x)
        if device.type == "cpu":
            from torch._inductor import config, cpu_vec_isa

            with config.patch({"cpp.vec_isa_ok": options(device).get("cpp.vec_isa_ok")}):
                cpu_vec_isa.pick_vec_isa()


def _run(module: torch.nn.Module, *inputs: Any) -> Tensor:
    return module(*inputs)
