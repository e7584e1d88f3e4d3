"""Names of devices and dtypes, and what is said when memory is short."""

import pytest
import torch

from gptfast import device


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", None),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        ("fp32", torch.float32),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_dtypes_have_short_and_long_names(name, dtype):
    assert device.parse_dtype(name) == dtype


@pytest.mark.parametrize("name", ["int8", "half", "", torch.int8, None])
def test_unknown_dtypes_are_named(name):
    with pytest.raises(ValueError, match=r"dtype .* is unknown; use auto, bf16"):
        device.parse_dtype(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cuda:99", "mps"])
def test_unusable_devices_are_named(name):
    with pytest.raises(ValueError, match="device"):
        device.parse_device(name)


def test_the_default_device_exists():
    assert device.parse_device(None).type in ("cpu", "cuda")
    assert device.parse_device("cpu") == torch.device("cpu")


def test_too_little_memory_says_what_was_needed_and_free(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda where: 3_000_000_000)
    with pytest.raises(MemoryError, match=r"a giant needs 5.00 GB, and 3.00 GB are free on cpu"):
        device.check_fits(5_000_000_000, torch.device("cpu"), "a giant", "think smaller")
    device.check_fits(2_000_000_000, torch.device("cpu"), "a dwarf", "")


def test_free_memory_is_known_on_linux():
    free = device.free_memory(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e15


def test_bytes_in_decimal_units():
    texts = [device.format_bytes(n) for n in (12, 1234, 2_200_000_000, 3.5e12)]
    assert texts == ["12 B", "1.23 kB", "2.20 GB", "3.50 TB"]
