"""OpenVINO GenAI as a contestant of bench/peers.py. Imports neither torch nor gptfast, which would
be in the figures of its start and its memory.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy
import openvino
import openvino_genai


class OpenVino:
    """GenAI's pipeline on the CPU with paged attention, its default and the faster of its two
    (measured): bfloat16 activations, keys and values (its default of 8 bits is slower at long
    contexts), prompts in one piece. It keeps prefixes of prompts, so a prompt must be new to be
    measured.
    """

    version = openvino_genai.__version__

    def __init__(self, folder: Path, threads: int) -> None:
        self.pipeline = openvino_genai.LLMPipeline(
            folder,
            openvino_genai.Tokenizer(folder),  # empty: it is given token ids
            "CPU",
            ATTENTION_BACKEND="PA",
            INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT="bf16",
            KV_CACHE_PRECISION="bf16",
        )
        self._held: list[int] = []

    def run(self, prompt: Sequence[int], num_new_tokens: int) -> tuple[list[int], list[float]]:
        """Continues a prompt greedily -> new tokens, and seconds from the beginning to each."""
        config = openvino_genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.min_new_tokens = config.max_new_tokens = num_new_tokens
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, len(prompt)), dtype=numpy.int64))
        start = perf_counter()
        result = self.pipeline.generate(openvino_genai.TokenizedInputs(ids, mask), config)
        end = perf_counter() - start
        # Its own clock (milliseconds) tells the times between tokens; the last one came at the end.
        clock = result.perf_metrics.raw_metrics.m_new_token_times
        return list(result.tokens[0]), [end - (clock[-1] - time) / 1e3 for time in clock]

    def hold(self, context: Sequence[int], max_seq_len: int) -> None:
        """Computes the keys and values of `context`, which are then kept."""
        self._held = list(context)
        self.run(self._held, 1)

    def resume(self, num_new_tokens: int) -> tuple[list[int], list[float]]:
        """As `run`, behind the context that is held and one more token."""
        return self.run([*self._held, 1], num_new_tokens)
