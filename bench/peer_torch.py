"""gptfast and transformers as contestants of bench/peers.py: those of `gptfast bench`, which also
learn to stand behind a long context that nobody has read.

Keys and values of that context are made up: a step takes as long over any numbers, and reading
8,192 tokens takes half a minute.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.commands.contest import Gptfast, Trace
from gptfast.commands.peers import Transformers
from gptfast.loading import load

Run = tuple[list[int], list[float]]  # new tokens, and seconds from the beginning to each


class Ours:
    """This engine on a folder of weights in any precision."""

    version = Gptfast.version

    def __init__(self, folder: Path, threads: int, max_seq_len: int, compile: bool) -> None:
        torch.set_num_threads(threads)
        self._compile = compile
        self._contestant = Gptfast(partial(load, folder), 1, max_seq_len, compile)
        self.step_bytes = self._contestant.model.bytes_per_step
        self._held: list[int] = []

    def run(self, prompt: Sequence[int], num_new_tokens: int) -> Run:
        """Continues a prompt greedily."""
        return _of_one(self._contestant.run([list(prompt)], num_new_tokens))

    def hold(self, context: Sequence[int], max_seq_len: int) -> None:
        """Makes room for `max_seq_len` tokens, and has something in the place of the context's keys
        and values.
        """
        model = self._contestant.model
        if self._contestant.engine.max_seq_len < max_seq_len:
            self._contestant = Gptfast(lambda: model, 1, max_seq_len, self._compile)
        engine, (num_heads, *widths) = self._contestant.engine, model.config.cache_shape
        slots = torch.arange(len(context))[None]
        for layer in engine.runner.cache.layers:
            key, value = (_numbers(1, len(context), num_heads, width) for width in widths)
            layer.write(key, value, slots)
        self._held = engine._cached[0] = list(context)

    def resume(self, num_new_tokens: int) -> Run:
        """As `run`, behind the context that is held and one more token."""
        prompt = [*self._held, 1]
        return _of_one(self._contestant.continue_all([prompt], num_new_tokens))


class Theirs:
    """transformers on a Hugging Face folder, eager or compiled."""

    def __init__(self, folder: Path, threads: int, compile: bool) -> None:
        torch.set_num_threads(threads)
        self._contestant = Transformers(folder, torch.bfloat16, torch.device("cpu"), compile)
        self.version = self._contestant.version
        self._held: list[int] = []
        self._cache: Any = None

    def run(self, prompt: Sequence[int], num_new_tokens: int) -> Run:
        """Continues a prompt greedily."""
        return _of_one(self._contestant.run([list(prompt)], num_new_tokens))

    def hold(self, context: Sequence[int], max_seq_len: int) -> None:
        """Stands behind `context`. A cache of a fixed size, all of which every step reads, gets no
        more room than what comes needs.
        """
        torch.compiler.reset()  # a second size would else be compiled for all sizes, and slower
        self._held, self._cache = list(context), None

    def resume(self, num_new_tokens: int) -> Run:
        """As `run`, behind the context that is held and one more token."""
        if self._cache is None or not self._contestant.compiled:  # a growing cache stays grown
            room = len(self._held) + 1 + num_new_tokens
            self._cache = self._contestant.new_cache(room)
        else:
            self._cache.reset()
        config = self._contestant.model.config
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        shape = (1, config.num_key_value_heads, 1, width)
        for layer in range(config.num_hidden_layers):
            numbers = _numbers(*shape).expand(-1, -1, len(self._held), -1)
            self._cache.update(numbers, numbers, layer)
        cache = {"past_key_values": self._cache, "cache_implementation": None}
        prompt = [*self._held, 1]
        return _of_one(self._contestant.run([prompt], num_new_tokens, **cache))


def _of_one(trace: Trace) -> Run:
    [request] = trace.requests
    return trace.token_ids[0], [time - request.submitted_at for time in request.token_times]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)
