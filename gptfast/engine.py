"""Engine: token ids in, a stream of token ids out. One loop for one prompt, a batch, a chat, and
later a server.

Knows ids, never text. Requests wait in a queue for one of a fixed number of rows; `step` reads a
bounded piece of prompt, decodes a token (with a draft, perhaps several) for every active row, and
returns what became known.
Sampled tokens feed the next step on the device; the host reads them one step behind (on a CPU, at
once).
"""

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from gptfast.cache import parse_kv_cache_dtype
from gptfast.cached import LARGEST_PIECE, common_prefix
from gptfast.capacity import check_sizes, check_speculate_k, context_length
from gptfast.model import Transformer
from gptfast.requests import Event, FinishReason, Request, TokenLogprob
from gptfast.runner import ModelRunner
from gptfast.sampling import SamplingParams, token_logprobs
from gptfast.speculation.drafts import Draft, Text
from gptfast.speculation.speculator import Round, Speculator
from gptfast.stats import DecodeCounters, RequestStats, SpeculationStats


@dataclass(frozen=True)
class _InFlight:
    """One step's sampled tokens on their way to the host: entry i belongs to requests[i]. Those of
    a round of speculation are packed as there.
    """

    tokens: Tensor
    requests: Sequence[Request | None]
    logprobs: tuple[Tensor, Tensor, Tensor] | None
    ready: torch.cuda.Event | None
    is_decode: bool
    round: Round | None = None


class Engine:
    """Runs one model for up to `num_rows` requests at a time.

    `max_seq_len` (prompt and new tokens of a row) is by default what the model's facts say, bounded
    by the free memory. ValueError where more is asked than the facts allow; MemoryError where the
    cache does not fit. `kv_cache_dtype` is one of cache.KV_CACHE_DTYPES.

    With a `draft` it speculates: `speculate_k` tokens at a time, or as many as pay (None).
    """

    def __init__(
        self,
        model: Transformer,
        num_rows: int = 1,
        max_seq_len: int | None = None,
        compile: bool = False,
        kv_cache_dtype: str = "auto",
        draft: Draft | None = None,
        speculate_k: int | None = None,
    ) -> None:
        check_sizes(model.config, num_rows, max_seq_len)
        check_speculate_k(draft is not None, speculate_k)
        parse_kv_cache_dtype(kv_cache_dtype, model.device)
        self.model, self.num_rows = model, num_rows
        self.max_seq_len = context_length(model, num_rows, max_seq_len, kv_cache_dtype, draft)
        self.runner = ModelRunner(model, num_rows, self.max_seq_len, compile, kv_cache_dtype)
        self.device = self.runner.device
        self._speculator: Speculator | None = None
        if draft is not None:
            self._speculator = Speculator(
                draft.name, self.runner, draft.drafter(self.runner), speculate_k
            )
        self.counters = DecodeCounters()
        self._queue: deque[Request] = deque()
        self._rows: list[Request | None] = [None] * num_rows
        self._cached: list[list[int]] = [[] for _ in range(num_rows)]  # tokens in each row's slots
        self._in_flight: deque[_InFlight] = deque()
        self._lag = 1 if self.device.type == "cuda" else 0
        self._next_id = 0

    # -- requests --

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Queues a prompt and returns the id its events will carry. ValueError if it cannot run."""
        self.check(prompt_ids, params)
        ids, room = list(prompt_ids), self.max_seq_len - len(prompt_ids)
        budget = room if params.max_new_tokens is None else min(room, params.max_new_tokens)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        request = Request(self._next_id, ids, params, seed, budget, RequestStats(len(ids)))
        self._next_id += 1
        self._queue.append(request)
        return request.id

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """ValueError where `submit` would refuse."""
        config, ids = self.model.config, prompt_ids
        if not ids:
            raise ValueError("the prompt has no tokens; at least one is needed")
        for token in ids:
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary (0 to {config.vocab_size - 1})"
                )
        if len(ids) > self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the context holds {self.max_seq_len} "
                f"(max_seq_len; the model allows {config.max_seq_len}); shorten the prompt"
            )
        params.validate_for(config.vocab_size)

    def cancel(self, request_id: int) -> Event | None:
        """Ends a request where it stands and frees its row; None where it is not running."""
        running = [*self._queue, *filter(None, self._rows)]
        request = next((request for request in running if request.id == request_id), None)
        if request is None:
            return None
        if request in self._queue:
            self._queue.remove(request)
        return self._finish(request, (), (), "cancelled")

    @property
    def has_work(self) -> bool:
        # Tokens on their way belong to requests in rows, or to ones that have ended.
        return bool(self._queue or any(self._rows))

    def warm_up(self, requests: Sequence[SamplingParams]) -> None:
        """Compiles now what requests with these parameters need, where this engine is compiled, and
        where it speculates measures what that costs. Nothing may be running.
        """
        self.runner.warm_up(requests)
        if self._speculator is not None:
            self._speculator.warm_up([params.plan for params in requests])
            self._speculator.calibrate()

    def reset_counters(self) -> None:
        """Counters of decode steps and of speculation begin anew."""
        self.counters.reset()
        if self._speculator is not None:
            self._speculator.reset_stats()

    @property
    def speculation(self) -> SpeculationStats | None:
        """What drafts have come to since the counters were reset; None without them."""
        return None if self._speculator is None else self._speculator.stats

    def forget(self) -> None:
        """Drops what idle rows remember of earlier prompts, so that the next one is read whole."""
        for row in range(self.num_rows):
            if self._rows[row] is None:
                self._cached[row] = []
                if self._speculator is not None:
                    self._speculator.forget(row)

    # -- the loop --

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One turn: fill free rows, read a piece of prompt, decode a token a row, report."""
        events = self._admit()
        self._prefill()
        events += self._reread()
        events += self._arrived(0 if self._wants_texts() else self._lag)
        decoding = [request for request in self._rows if request is not None and request.decoding]
        served = {event.request_id for event in events}
        if events and all(request.id in served for request in decoding):
            return events  # a first token goes out before the next one is begun
        if decoding:
            self._decode()
        return events + self._arrived(self._lag if decoding else 0)

    def _admit(self) -> list[Event]:
        """Gives free rows to waiting requests: each gets the row that holds most of its prompt."""
        events = []
        if self._speculator is not None and self._queue and not any(self._rows):
            self._speculator.calibrate()
        while self._queue and (free := [r for r in range(self.num_rows) if not self._rows[r]]):
            request = self._queue.popleft()
            if request.budget <= 0:
                events.append(self._finish(request, (), (), "length"))
                continue
            reusable = len(request.prompt_ids) <= self.model.config.max_reusable_length
            shared = {
                row: common_prefix(self._cached[row], request.prompt_ids) if reusable else 0
                for row in free
            }
            # Among rows that share nothing, the emptiest: other conversations stay cached.
            row = max(free, key=lambda row: (shared[row], -len(self._cached[row])))
            # The last prompt token is always run: its logits give the first new token.
            request.num_prefilled = min(shared[row], len(request.prompt_ids) - 1)
            request.row = row
            request.stats.num_cached_tokens = request.num_prefilled
            request.stats.started_at = perf_counter()
            self._rows[row] = request
            self._cached[row] = request.prompt_ids[: request.num_prefilled]
            limit = len(request.prompt_ids) + request.budget
            self.runner.start_row(row, request.prompt_ids, request.params, request.seed, limit)
            if self._speculator is not None:
                self._speculator.start_row(row, request.prompt_ids)
        return events

    def _prefill(self) -> None:
        """Reads one largest piece's worth of prompts, so that decoding rows wait a bounded time."""
        allowance = LARGEST_PIECE
        for request in sorted(filter(None, self._rows), key=lambda request: request.id):
            while allowance > 0 and request.num_dispatched == 0:
                allowance -= self._prefill_piece(request, allowance)

    def _prefill_piece(self, request: Request, allowance: int) -> int:
        """Reads the next piece of a prompt; after the last, samples the first token.

        Returns the number of tokens read.
        """
        start, row = request.num_prefilled, request.row
        piece = request.prompt_ids[start : start + allowance]
        hidden = self.runner.prefill(piece, start, row)
        request.num_prefilled += len(piece)
        self._cached[row] += piece
        if self._speculator is not None:
            self._speculator.prefill(row, request.prompt_ids, request.num_prefilled)
        if request.num_prefilled == len(request.prompt_ids):
            tokens, logits = self.runner.first_token(hidden, len(piece) - 1, row)
            self._send(tokens, logits, [request], is_decode=False)
        return len(piece)

    def _reread(self) -> list[Event]:
        """Reads rows anew that have just grown beyond the length at which their rotation changes;
        the newest token is read by the next step, as always. All of it in one step, for which the
        other rows wait: the row would be of no use half read.
        """
        limit = self.model.config.reread_length
        if limit is None:
            return []
        grown = [
            request
            for request in filter(None, self._rows)
            if request.decoding and not request.reread
            if len(request.prompt_ids) <= limit < request.num_tokens
        ]
        events = self._arrived(0) if grown else []  # the host must know all tokens
        for request in grown:
            # Fewer drafted tokens may have been accepted than could have been.
            if not request.finished and request.num_tokens > limit:
                request.reread = True
                known = [*request.prompt_ids, *request.token_ids[:-1]]
                self.runner.reread(known, request.row)
        return events

    def _decode(self) -> None:
        compile_s, start = self.runner.compile_s, perf_counter()
        requests = [r if r is not None and r.decoding else None for r in self._rows]
        used = max(request.num_tokens for request in requests if request)
        self.runner.shows_logits = any(r.params.logprobs is not None for r in requests if r)
        if self._speculator is None:
            tokens, logits = self.runner.decode(used)
            self._send(tokens, logits, requests, is_decode=True)
        else:
            begun = self._speculate(self._speculator, requests, used)
            self._send(begun.packed, begun.logits, requests, is_decode=True, round=begun)
        compiling = self.runner.compile_s - compile_s
        self.counters.seconds += perf_counter() - start - compiling
        self.counters.num_steps += 1

    def _wants_texts(self) -> bool:
        """Whether the next round has to wait for the tokens of the last one."""
        if self._speculator is None:
            return False
        rows = [row for row, request in enumerate(self._rows) if request and request.decoding]
        return self._speculator.wants_texts(rows)

    def _speculate(
        self, speculator: Speculator, requests: Sequence[Request | None], used: int
    ) -> Round:
        known: dict[int, Text] = {
            request.row: (request.prompt_ids, request.token_ids) for request in requests if request
        }
        room = max(r.budget - r.num_dispatched for r in requests if r)
        return speculator.begin(known, used, room, complete=not self._in_flight)

    # -- from the device to events --

    def _send(
        self,
        tokens: Tensor,
        logits: Tensor,
        requests: Sequence[Request | None],
        is_decode: bool,
        round: Round | None = None,
    ) -> None:
        """Starts the copy of sampled tokens to the host."""
        wanted = [r.params.logprobs for r in requests if r and r.params.logprobs is not None]
        most = min(max(wanted, default=0), logits.size(-1))
        logprobs = None
        if wanted:
            sampled = tokens[:, 1:] if round and round.num_drafted else tokens
            logprobs = token_logprobs(logits.flatten(0, -2), sampled.flatten(), most)
        ready = None
        if self.device.type == "cuda":
            pinned = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            tokens = pinned.copy_(tokens, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        for request in filter(None, requests):
            request.num_dispatched += 1
            request.num_drafted += round.num_drafted if round else 0
        self._in_flight.append(_InFlight(tokens, requests, logprobs, ready, is_decode, round))

    def _arrived(self, lag: int) -> list[Event]:
        """Events of the steps that have been sent, but for the newest `lag` of them."""
        events = []
        while len(self._in_flight) > lag:
            events += self._read(self._in_flight.popleft())
        return events

    def _read(self, sent: _InFlight) -> list[Event]:
        """Turns tokens that have arrived into events; finishes requests that end with them."""
        start = perf_counter()
        if sent.ready is not None:
            sent.ready.synchronize()
        rows, now = sent.tokens.tolist(), perf_counter()
        if sent.is_decode:  # a first token is waited for with its prompt
            self.counters.seconds += now - start
        events: list[Event] = []
        accepted: dict[int, tuple[int, int]] = {}
        for index, (row, request) in enumerate(zip(rows, sent.requests, strict=True)):
            if request is None or request.finished:
                continue  # ended while this step was under way
            tokens, width = [row], 1
            if sent.round is not None:
                if sent.round.num_drafted:
                    tokens, width = row[1 : 1 + row[0]], len(row) - 1
                accepted[request.row] = self._outcome(request, sent.round, len(tokens))
            for place, token in enumerate(tokens):
                request.token_ids.append(token)
                request.stats.token_times.append(now)
                self.counters.num_tokens += sent.is_decode
                at = index * width + place
                logprobs = _token_logprob(token, at, sent.logprobs, request.params.logprobs)
                reason = self._finish_reason(request, token)
                if reason is not None:
                    events.append(self._finish(request, (token,), logprobs, reason))
                    break  # what was accepted behind an end is no part of the text
                events.append(Event(request.id, (token,), request.stats, logprobs))
        if self._speculator is not None and sent.round is not None:
            self._speculator.observe(sent.round, accepted)
        return events

    def _outcome(self, request: Request, ended: Round, num_new: int) -> tuple[int, int]:
        """Settles a row's round -> how many drafted tokens could have been accepted, and were."""
        request.num_dispatched += num_new - 1
        request.num_drafted -= ended.num_drafted
        room = request.budget - len(request.token_ids) - 1
        return min(ended.proposals[request.row][1], ended.num_drafted, room), max(0, num_new - 1)

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        params = request.params
        if token in params.stop_token_ids:
            return "stop"
        if token in self.model.config.eos_token_ids and not params.ignore_eos:
            return "stop"
        return "length" if len(request.token_ids) >= request.budget else None

    def _finish(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason,
    ) -> Event:
        """Frees the row. What its slots hold stays known, for a later prompt that begins so."""
        request.finished = True
        if request.row >= 0:
            self._rows[request.row] = None
            # The newest token has not been through the model: its slot is not filled.
            self._cached[request.row] += request.token_ids[:-1]
            if request.num_tokens > self.model.config.max_reusable_length:
                self._cached[request.row] = []
            self.runner.stop_row(request.row)
        return Event(request.id, token_ids, request.stats, logprobs, reason)

    # -- beside the loop --

    def all_logits(self, token_ids: Sequence[int]) -> Iterator[Tensor]:
        """Teacher-forced float32 logits of every position, piece by piece [t, V].

        Runs through row 0 of an idle engine: RuntimeError where requests are running. ValueError
        where there are no tokens or more than the context holds.
        """
        vocab_size = self.model.config.vocab_size
        if self.has_work:
            raise RuntimeError("the engine is running requests; finish or cancel them first")
        if not 0 < len(token_ids) <= self.max_seq_len:
            raise ValueError(f"{len(token_ids)} tokens given; 1 to {self.max_seq_len} are needed")
        if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise ValueError(f"token ids must be 0 to {vocab_size - 1}, the vocabulary's")
        self._cached[0] = []
        self.runner.cache.lengths[0] = len(token_ids)
        for start in range(0, len(token_ids), LARGEST_PIECE):
            piece = token_ids[start : start + LARGEST_PIECE]
            with torch.no_grad():
                hidden = self.runner.prefill(piece, start, 0)
                yield self.runner.main.logits(hidden[:, : len(piece)], compiled=False)[0]


def _token_logprob(
    token: int, index: int, logprobs: tuple[Tensor, Tensor, Tensor] | None, wanted: int | None
) -> tuple[TokenLogprob, ...]:
    if logprobs is None or wanted is None:
        return ()
    chosen, values, ids = logprobs
    top = dict(zip(ids[index].tolist()[:wanted], values[index].tolist(), strict=False))
    return (TokenLogprob(token, chosen[index].item(), top),)
