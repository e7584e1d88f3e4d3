"""LLM: text in, text out. The engine knows only ids; here prompts are encoded, text is streamed and
stop strings end it.

    llm = LLM("storyteller", compile=True)
    print(llm.generate("Once upon a time", SamplingParams(seed=1))[0].text)
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from gptfast import parallel
from gptfast.cache import parse_kv_cache_dtype
from gptfast.capacity import check_sizes, check_speculate_k, largest_peak
from gptfast.chat import Message, find_template
from gptfast.checkpoint import Progress, inspect, read_config
from gptfast.compiler import started_early
from gptfast.device import parse_device
from gptfast.engine import Engine
from gptfast.follower import follow
from gptfast.hub import DEFAULT_MODEL, find_model
from gptfast.joint import choose_sums, load_model
from gptfast.loading import check_plan
from gptfast.quantization import PLAIN, QuantPlan, quant_plan, running_notes
from gptfast.requests import FinishReason, TokenLogprob
from gptfast.sampling import SamplingParams
from gptfast.speculation.drafts import Draft
from gptfast.speculation.sources import find_draft
from gptfast.stats import RequestStats, RunStats
from gptfast.tokenizer import TextStream, Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
# Rows that a call with several prompts uses unless batch_size says otherwise.
DEFAULT_MAX_ROWS = 8


@dataclass(frozen=True)
class Chunk:
    """A piece of output `index`: new tokens, and the text that became certain with them."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stats: RequestStats


@dataclass(frozen=True)
class Output:
    """What one prompt became. `text` and `token_ids` are new ones only.

    `finish_reason` is "stop" (an end-of-sequence or stop token, a stop string) or "length";
    "cancelled" where the stream was left early.
    """

    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stats: RequestStats
    logprobs: list[TokenLogprob] | None


class OutputBuilder:
    """Collects the chunks of one output."""

    def __init__(self, prompt: Prompt, params: SamplingParams) -> None:
        self.prompt = prompt
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stats = RequestStats(0)

    def add(self, chunk: Chunk) -> None:
        self.text.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        if self.logprobs is not None:
            self.logprobs.extend(chunk.logprobs)
        self.finish_reason, self.stats = chunk.finish_reason, chunk.stats

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def output(self) -> Output:
        text = "".join(self.text)
        reason = self.finish_reason or "cancelled"
        return Output(self.prompt, text, self.token_ids, reason, self.stats, self.logprobs)


class LLM:
    """A model with its tokenizer, ready to generate.

    `model` is a folder, a hub id or a bundled name; `dtype` auto, bf16, fp16, fp32 or a
    torch.dtype. `kv_cache_dtype` int8 or fp8 stores keys and values in eight bits a number (auto:
    in `dtype`). `batch_size` is the number of rows that run together (None: as many as a call has
    prompts, at most 8). `max_seq_len` is the number of tokens of prompt and output that a row holds
    (None: what the model allows and the memory holds). ValueError for what cannot be used,
    MemoryError for what does not fit.

    `draft` makes it speculate: a model of the same tokenizer (as `model`; `draft_quant` as
    `quant`), "ngram" (what the text itself says next), "layers:N" (the model's first layers) or a
    format such as "int4" (the model, rounded more coarsely). `speculate_k` tokens are drafted at a
    time, 1 to 15, or as many as pay (None).

    `quant` rounds the linears to a format while they are read: int8, int4 (groups of 32, head in
    int8), int4-g64-asym, int8-dynamic ... (`quantize.formats.Format.parse`), or a QuantPlan;
    "none" makes plain numbers of weights that are stored quantized.

    Under torchrun each process computes a share of the model. The program goes on in rank 0 alone:
    in the others LLM(...) never returns, does what rank 0 asks for, and ends the process when rank
    0 ends. `tensor_parallel_size` only says how many processes there should be. With
    `expert_parallel` each has whole experts of a mixture, not a share of every one.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        quant: QuantPlan | str | None = None,
        kv_cache_dtype: str = "auto",
        compile: bool = False,
        max_seq_len: int | None = None,
        batch_size: int | None = None,
        revision: str | None = None,
        draft: str | Path | None = None,
        speculate_k: int | None = None,
        draft_quant: QuantPlan | str | None = None,
        tensor_parallel_size: int | None = None,
        expert_parallel: bool = False,
        progress: Progress = iter,
    ) -> None:
        group = parallel.start(tensor_parallel_size)
        if group.rank > 0:
            follow(group)
            raise SystemExit(0)
        self.group = replace(group, by_expert=expert_parallel)
        if isinstance(quant, str) and quant != PLAIN:
            quant = quant_plan(quant)
        check_speculate_k(draft is not None, speculate_k)
        if draft is None and draft_quant is not None:
            raise ValueError("draft_quant is for the weights of a draft, and there is no draft")
        parse_kv_cache_dtype(kv_cache_dtype, parse_device(device))
        start = perf_counter()
        self.folder = find_model(model, revision)
        self.config, _ = read_config(self.folder)
        check_sizes(self.config, 1 if batch_size is None else batch_size, max_seq_len)
        self.tokenizer = load_tokenizer(self.folder)
        self.chat_template = find_template(self.folder)
        source = inspect(self.folder)
        check_plan(source, quant)
        draft_source = None
        if draft is not None:
            draft_source = find_draft(draft, source, self.tokenizer, quant, draft_quant)
        self.left_out = source.left_out  # parts of the files that are no language model, in words
        # Last, so that what else may be wrong is said before gigabytes are read.
        with started_early(parse_device(device)) if compile else nullcontext():
            self.model = load_model(
                self.group, source, dtype, parse_device(device), progress, quant
            )
            self.draft: Draft | None = None
            if draft_source is not None:
                self.draft = draft_source.load(self.model, dtype, progress)
        self.notes = [*source.notes, *running_notes(self.model)]  # on quantized weights, in words
        self.notes += filter(None, [choose_sums(self.group, self.model)])
        self.load_s = perf_counter() - start
        self._batch_size, self._max_seq_len, self._compile = batch_size, max_seq_len, compile
        self._kv_cache_dtype, self._speculate_k = kv_cache_dtype, speculate_k
        self.engine = self._build_engine(1 if batch_size is None else batch_size)

    # -- text --

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Outputs in the order of `prompts` (texts or lists of token ids; `n` of each next to each
        other).
        """
        prompts = _as_list(prompts)
        each = _one_each(prompts, params)
        builders = [
            OutputBuilder(prompt, p)
            for prompt, p in zip(prompts, each, strict=True)
            for _ in range(p.n)
        ]
        for chunk in self.stream_many(prompts, each):
            builders[chunk.index].add(chunk)
        return [builder.output() for builder in builders]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Chunks as they become known. Closing the iterator early cancels what is still running."""
        return self.stream_many([prompt], params)

    def stream_many(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Chunk]:
        """As `stream`, for several prompts at once: `Chunk.index` counts outputs as `generate`
        orders them.
        """
        each = _one_each(prompts, params)
        if any(p.stop for p in each):
            self._need_tokenizer()
        work = [
            (ids, replace(p, n=1, seed=None if p.seed is None else (p.seed + copy) % 2**63))
            for ids, p in zip(map(self.encode, prompts), each, strict=True)
            for copy in range(p.n)
        ]
        num_rows = min(len(work), DEFAULT_MAX_ROWS)
        if self._batch_size is None and self.engine.num_rows < num_rows:
            self.engine = self._build_engine(num_rows)
        # Bad input is met here, before the first chunk is asked for.
        for ids, p in work:
            self.engine.check(ids, p)
        return self._run(self.engine, work)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        **variables: Any,
    ) -> Output:
        """The next message of a conversation of {"role", "content"}; what earlier turns cached is
        not read again. `variables` as in `encode_chat`.
        """
        return self.generate([self.encode_chat(messages, **variables)], params)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        **variables: Any,
    ) -> Iterator[Chunk]:
        return self.stream(self.encode_chat(messages, **variables), params)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: ids as they are, text with the tokenizer's own
        beginning-of-sequence.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self._need_tokenizer()
        ids = tokenizer.encode(prompt)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        if not ids:
            raise ValueError(
                "the prompt is empty and the tokenizer has no beginning-of-sequence token to "
                "start from; give some text"
            )
        return ids

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation up to where the model answers.

        `variables` are the template's own (enable_thinking=False), or `tools` and `documents`
        (lists of dictionaries), `name` (of one of several templates), `continue_final_message`.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.folder.name} has no chat template; use generate, or a model tuned for chat"
            )
        return self.chat_template.encode(self._need_tokenizer(), messages, **variables)

    # -- numbers --

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Teacher-forced logits [T, V], float32, on the CPU: row t predicts token t + 1."""
        return torch.cat([piece.cpu() for piece in self.engine.all_logits(list(token_ids))])

    def score(self, token_ids: Sequence[int]) -> Tensor:
        """Log probabilities [T - 1] of tokens 1..T-1, each given all before it. float32, on the
        CPU.
        """
        ids, start = list(token_ids), 0
        targets = torch.tensor(ids[1:], dtype=torch.int64, device=self.engine.device)
        scores = []
        for piece in self.engine.all_logits(ids):  # [t, V]
            wanted = targets[start : start + piece.size(0)].unsqueeze(1)
            scores.append(piece[: len(wanted)].log_softmax(-1).gather(1, wanted).squeeze(1).cpu())
            start += piece.size(0)
        return torch.cat(scores)

    def run_stats(
        self, requests: Sequence[RequestStats], device_bandwidth: float | None = None
    ) -> RunStats:
        """Statistics of the requests of the last call; `device_bandwidth` in bytes per second."""
        engine = self.engine
        return RunStats(
            requests=requests,
            load_s=self.load_s,
            compile_s=engine.runner.compile_s,
            decode=engine.counters,
            weight_bytes=self.model.bytes_per_step,
            cache_bytes_per_token=engine.runner.cache.bytes_per_token,
            peak_memory_bytes=largest_peak(self.group, str(engine.device)),
            device_bandwidth=device_bandwidth,
            speculation=engine.speculation,
            num_ranks=self.group.size,
        )

    # -- how it runs --

    def _run(
        self, engine: Engine, work: Sequence[tuple[list[int], SamplingParams]]
    ) -> Iterator[Chunk]:
        if engine.has_work:  # its events would be taken from whoever waits for them
            raise RuntimeError("another stream of this LLM is running; finish or close it first")
        engine.warm_up([params for _, params in work])
        engine.reset_counters()
        running: dict[int, tuple[int, _Text]] = {}
        delivered: dict[int, RequestStats] = {}
        try:
            for index, (ids, params) in enumerate(work):
                running[engine.submit(ids, params)] = index, _Text(self.tokenizer, ids, params)
            while running:
                for event in engine.step():
                    if event.request_id not in running:
                        continue  # ended by a stop string
                    index, text = running[event.request_id]
                    piece, reason = text.push(event.token_ids, event.finish_reason)
                    if reason is not None:
                        del running[event.request_id]
                        engine.cancel(event.request_id)
                        _cut(engine, event.stats, text.num_tokens)
                    delivered[event.request_id] = event.stats
                    yield Chunk(index, piece, event.token_ids, event.logprobs, reason, event.stats)
        finally:
            for request_id, (_, text) in running.items():
                engine.cancel(request_id)
                if request_id in delivered:
                    _cut(engine, delivered[request_id], text.num_tokens)

    def _build_engine(self, num_rows: int) -> Engine:
        return Engine(
            self.model,
            num_rows,
            self._max_seq_len,
            self._compile,
            self._kv_cache_dtype,
            self.draft,
            self._speculate_k,
        )

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.folder} has no tokenizer; give prompts as token ids")
        return self.tokenizer


class _Text:
    """The text of one output as it becomes certain: whole characters only, and never any of a stop
    string.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        # What precedes decides whether the first word keeps its space.
        self._stream: TextStream | None = tokenizer.stream(after=prompt_ids) if tokenizer else None
        self._stops = params.stop
        self._held = ""
        self.num_tokens = 0

    def push(
        self, token_ids: Sequence[int], reason: FinishReason | None
    ) -> tuple[str, FinishReason | None]:
        """The text that `token_ids` make certain, and why the output ends, if it does."""
        self.num_tokens += len(token_ids)
        if self._stream is None:
            return "", reason
        # A token that stops is not part of the text.
        ids = token_ids[:-1] if reason == "stop" else token_ids
        text = self._held + self._stream.push(ids)
        if reason is not None:
            text += self._stream.flush()
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)], "stop"
        keep = 0 if reason is not None else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], reason

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )


def _cut(engine: Engine, stats: RequestStats, num_tokens: int) -> None:
    """Leaves tokens out of the statistics that were accepted together with the last one that is
    part of an output, and are not.
    """
    engine.counters.num_tokens -= len(stats.token_times) - num_tokens
    del stats.token_times[num_tokens:]


def _one_each(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """Sampling parameters for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(params)} sampling parameters were given; "
            "give one, or one for each prompt"
        )
    return list(params)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, or a list of ids) or many, as a list of prompts."""
    if isinstance(prompts, str) or (prompts and all(isinstance(item, int) for item in prompts)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))
