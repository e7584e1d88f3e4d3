"""llama.cpp as a contestant of bench/peers.py, through llama-cpp-python's bindings of its C API:
between two tokens Python makes one call and one argmax.

Imports neither torch nor gptfast, which would be in the figures of its start and its memory.
"""

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import llama_cpp
import numpy

BATCH = 512  # tokens of a prompt computed at once; its default for both sizes
# Tokens that decide, at a long context, whether flash attention is the faster: on a CPU it is not
# always. The best of so many trials each, in turns.
TRIAL_TOKENS, TRIALS = 8, 3


class LlamaCpp:
    """A GGUF on the CPU: the file mapped, keys and values in float16, flash attention."""

    version = llama_cpp.__version__

    def __init__(self, path: Path, threads: int, max_seq_len: int) -> None:
        self.path, self.threads = path, threads
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.row = _Row(self.model, threads, max_seq_len, flash=True)

    def run(self, prompt: Sequence[int], num_new_tokens: int) -> tuple[list[int], list[float]]:
        """Continues a prompt greedily -> new tokens, and seconds from the beginning to each."""
        self.row.keep(0)
        return self.row.generate(prompt, num_new_tokens)

    def hold(self, context: Sequence[int], max_seq_len: int) -> None:
        """Makes room for `max_seq_len` tokens, and has keys and values of `context` there: computed
        once, then kept in a file beside the weights, of whatever format those are.
        """
        self.row.free()
        rows = [_Row(self.model, self.threads, max_seq_len, flash) for flash in (True, False)]
        for flash, row in zip((True, False), rows, strict=True):
            row.fill(context, self.path.with_name(f"llama-context-{len(context)}-{flash:d}.state"))
        best = [math.inf, math.inf]
        for _ in range(TRIALS):
            for place, row in enumerate(rows):
                _, times = row.generate(context[:1], TRIAL_TOKENS)
                best[place] = min(best[place], times[-1] - times[0])
                row.keep(len(context))
        self.row, self._held = rows.pop(best.index(min(best))), len(context)
        rows[0].free()

    def resume(self, num_new_tokens: int) -> tuple[list[int], list[float]]:
        """As `run`, behind the context that is held and one more token."""
        self.row.keep(self._held)
        return self.row.generate([1], num_new_tokens)


class _Row:
    """Memory for one text of up to `max_seq_len` tokens, and what computes it."""

    def __init__(self, model: Any, threads: int, max_seq_len: int, flash: bool) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max_seq_len, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no memory for {max_seq_len} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def free(self) -> None:
        llama_cpp.llama_free(self.context)

    def keep(self, num_tokens: int) -> None:
        """Forgets all but the first so many tokens."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, num_tokens, -1)

    def fill(self, context: Sequence[int], file: Path) -> None:
        """Keys and values of `context`, from the file or else into it."""
        tokens = (llama_cpp.llama_token * len(context))(*context)
        found = ctypes.c_size_t()
        if file.exists():
            place = (bytes(file), 0, tokens, len(context), ctypes.byref(found))
            llama_cpp.llama_state_seq_load_file(self.context, *place)
        if found.value != len(context):
            self.keep(0)
            self._read(context)
            part = file.with_suffix(".part")
            place = (bytes(part), 0, tokens, len(context))
            llama_cpp.llama_state_seq_save_file(self.context, *place)
            part.rename(file)

    def generate(self, prompt: Sequence[int], num_new_tokens: int) -> tuple[list[int], list[float]]:
        """Continues what is in memory and a prompt -> new tokens, and seconds to each."""
        new: list[int] = []
        times: list[float] = []
        start, tokens = perf_counter(), prompt
        for _ in range(num_new_tokens):
            new.append(int(numpy.argmax(self._read(tokens))))
            times.append(perf_counter() - start)
            tokens = new[-1:]
        return new, times

    def _read(self, tokens: Sequence[int]) -> Any:
        """Logits [V] behind the last of these tokens, which follow those in memory."""
        for start in range(0, len(tokens), BATCH):
            piece = tokens[start : start + BATCH]
            array = (llama_cpp.llama_token * len(piece))(*piece)
            batch = llama_cpp.llama_batch_get_one(array, len(piece))
            if code := llama_cpp.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode ended with {code}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return numpy.ctypeslib.as_array(logits, (self.vocab_size,))
