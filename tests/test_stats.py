"""Statistics by hand computation."""

import pytest
import torch

from gptfast.stats import DecodeCounters, RequestStats, RunStats, percentile, read_bandwidth


def request(prompt: int, cached: int, start: float, times: list[float]) -> RequestStats:
    return RequestStats(
        prompt, cached, submitted_at=start - 1.0, started_at=start, token_times=times
    )


def test_a_request_splits_waiting_prefill_and_decode():
    numbers = request(10, 4, 100.0, [100.5, 100.7, 100.8, 101.2]).as_dict()
    assert numbers["ttft_s"] == pytest.approx(1.5)  # a second of it waiting for a row
    assert numbers["prefill_tok_s"] == pytest.approx(6 / 0.5)  # what was cached is not counted
    assert numbers["decode_tok_s"] == pytest.approx(3 / 0.7)  # the first token is prefill's
    assert numbers["itl_p50_ms"] == pytest.approx(200)
    assert numbers["itl_p99_ms"] == pytest.approx(400)


def test_a_request_without_tokens_has_no_rates():
    numbers = RequestStats(3).as_dict()
    assert numbers["new_tokens"] == 0
    assert all(numbers[key] is None for key in ("ttft_s", "decode_tok_s", "itl_p99_ms"))


def test_bytes_per_token_share_the_weights_over_the_rows_and_add_the_used_cache():
    requests = [request(8, 0, 0.0, [1.0, 2.0, 3.0, 4.0]) for _ in range(2)]
    stats = RunStats(
        requests=requests,
        load_s=1.0,
        compile_s=2.0,
        decode=DecodeCounters(seconds=3.0, num_tokens=6, num_steps=3),
        weight_bytes=1000,
        cache_bytes_per_token=7,
        peak_memory_bytes=5,
        device_bandwidth=4000.0,
    )
    numbers = stats.as_dict()
    assert numbers["bytes_per_token"] == 1000 // 2 + 7 * (8 + 2)
    assert numbers["decode_tok_s"] == pytest.approx(2.0)
    assert numbers["bandwidth_gb_s"] == pytest.approx(570 * 2 / 1e9)
    assert numbers["bandwidth_fraction"] == pytest.approx(570 * 2 / 4000)
    assert numbers["new_tokens"] == 8 and numbers["prompt_tokens"] == 16


def test_percentiles_are_nearest_rank():
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1.0) == 100
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([], 0.5) is None


def test_read_bandwidth_is_a_plausible_number():
    assert 1e8 < read_bandwidth(torch.device("cpu"), seconds=0.01) < 1e13
