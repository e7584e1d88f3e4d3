"""Devices and dtypes by their usual names, and how much memory is free. Knows no model."""

import os
import resource
from pathlib import Path

import torch

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch.dtype for a name or a torch.dtype; None for "auto" (what the checkpoint says)."""
    if dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype {str(dtype)!r} is unknown; use auto, {', '.join(DTYPES)}")


def parse_device(device: str | torch.device | None) -> torch.device:
    """A usable device for a name; None or "auto" is CUDA where there is one, else the CPU."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported; use auto, cpu, cuda or cuda:N")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(
            f"device {str(device)!r} is not there: this torch sees {found} CUDA devices; use cpu"
        )
    return parsed


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_meminfo_available(), _cgroup_free(), _address_space_free()]
    return min((limit for limit in limits if limit is not None), default=None)


def check_fits(
    num_bytes: int, device: torch.device, what: str, remedy: str, free: int | None = None
) -> None:
    """MemoryError that says what was needed and what was free (None: is found out), before anything
    is allocated.
    """
    free = free_memory(device) if free is None else free
    if free is not None and num_bytes > free:
        raise MemoryError(
            f"{what} needs {format_bytes(num_bytes)}, and {format_bytes(free)} are free on "
            f"{device}; {remedy}"
        )


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on the device for CUDA, resident of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def format_bytes(num_bytes: float) -> str:
    """Decimal units, three digits: 2.20 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def _meminfo_available() -> int | None:
    available = _bytes_named("/proc/meminfo", "MemAvailable")
    return None if available is None else max(0, available - _mapped())


def _mapped() -> int:
    """Bytes of files that this process has mapped and uses: the system would give them up for
    others, but weights are among them.
    """
    return _bytes_named("/proc/self/status", "RssFile") or 0


def _bytes_named(path: str, name: str) -> int | None:
    """Of the line "name: N kB" of a file of the system."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _cgroup_free() -> int | None:
    """What the control group (a container's limit) leaves; version 2 only."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        current = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # Pages of files are counted but given up under pressure.
    return max(0, int(limit) - current + max(0, int(stat.get("inactive_file", 0)) - _mapped()))


def _address_space_free() -> int | None:
    """What `ulimit -v` leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return max(0, limit - pages * os.sysconf("SC_PAGESIZE"))
