"""The result lines of a run: first the shape that gpt-fast's users know, then the honest split."""

from typing import Any

from gptfast.device import format_bytes
from gptfast.llm import Output
from gptfast.stats import RequestStats, RunStats


def result_lines(number: int, output: Output) -> list[str]:
    """Lines below one output. tokens/sec is the decode rate: neither prefill nor compilation is in
    it.
    """
    return [f"Time for inference {number}: {rate_text(output.stats)}"]


def rate_text(stats: RequestStats) -> str:
    numbers = stats.as_dict()
    if not stats.token_times:
        return "no new tokens"
    total = stats.token_times[-1] - stats.submitted_at
    rate = numbers["decode_tok_s"]
    speed = f"{rate:.2f} tokens/sec" if rate else "too short to measure tokens/sec"
    return f"{total:.3f} sec total, {speed}"


def summary_lines(stats: RunStats) -> list[str]:
    """Lines below all outputs."""
    numbers = stats.as_dict()
    lines = ["=========="]
    if numbers["decode_tok_s"]:
        lines.append(f"Average tokens/sec: {numbers['decode_tok_s']:.2f}")
    ranks = f" on each of {stats.num_ranks} ranks" if stats.num_ranks > 1 else ""
    lines.append(f"Memory used: {format_bytes(numbers['peak_memory_bytes'])}{ranks}")
    if numbers["ttft_s"] is not None:
        cached = sum(request.num_cached_tokens for request in stats.requests)
        reused = f", {cached} of them from the cache" if cached else ""
        rate = f", {numbers['prefill_tok_s']:.1f} tokens/sec" if numbers["prefill_tok_s"] else ""
        lines.append(
            f"Prefill: {numbers['prompt_tokens']} tokens{reused}{rate}, "
            f"first token after {numbers['ttft_s'] * 1e3:.1f} ms (median)"
        )
    if numbers["decode_tok_s"]:
        lines.append(
            f"Decode: {stats.decode.num_tokens} tokens in {stats.decode.num_steps} steps, between "
            f"tokens p50 {numbers['itl_p50_ms']:.2f} ms, p99 {numbers['itl_p99_ms']:.2f} ms"
        )
        lines.append(
            f"Bandwidth achieved: {numbers['bandwidth_gb_s']:.2f} GB/s "
            f"({format_bytes(numbers['bytes_per_token'])} read per token){ranks}"
            + (
                f", {numbers['bandwidth_fraction']:.0%} of what was measured here"
                if numbers["bandwidth_fraction"]
                else ""
            )
        )
    lines += _speculation_lines(numbers["speculation"])
    lines.append(f"Load: {numbers['load_s']:.2f} s, compile: {numbers['compile_s']:.2f} s")
    return lines


def _speculation_lines(numbers: dict[str, Any] | None) -> list[str]:
    if numbers is None:
        return []
    lines = [f"Draft {numbers['draft']}: nothing was drafted"]
    if numbers["drafted"]:
        places = " ".join(f"{share:.0%}" for share in numbers["acceptance_by_position"])
        lines = [
            f"Draft {numbers['draft']}: {numbers['accepted']} of {numbers['drafted']} tokens "
            f"accepted ({numbers['acceptance']:.0%}; by place {places}), "
            f"{numbers['mean_accepted_length']:.2f} tokens a round"
        ]
        if numbers["speedup"]:
            lines.append(
                f"Draft and verification cost {numbers['draft_cost']:.2f} + "
                f"{numbers['verify_cost']:.2f} plain steps a round: {numbers['speedup']:.2f} x "
                "plain decoding"
            )
    return lines + ([numbers["note"]] if numbers["note"] else [])
