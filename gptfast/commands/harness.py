"""lm-evaluation-harness asks, an LLM answers. The only place that knows `lm_eval`, and of it only
`Tasks` does: requests are whatever has `args`.

What the harness defines is kept: spaces at the end of a context belong to the continuation, a text
without context is scored after BOS (else EOS), long contexts lose their beginning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gptfast.checkpoint import Progress
from gptfast.evaluation import (
    DEFAULT_BATCH_SIZE,
    Window,
    beginning_of,
    continuation,
    rolling,
    score,
)
from gptfast.llm import LLM, OutputBuilder
from gptfast.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 256
# Names under which tasks give the number of new tokens.
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Settings of other engines that change nothing here while they have these values.
NEUTRAL = {"num_beams": 1, "use_cache": True, "skip_special_tokens": True}


class Request(Protocol):
    """`args` is (context, continuation), (text,), or (context, settings of generation)."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Answers:
    """The three things that a task asks of a language model. `batch_size` rows are scored together;
    what is generated runs in as many as the LLM has.
    """

    def __init__(
        self,
        llm: LLM,
        batch_size: int = DEFAULT_BATCH_SIZE,
        kv_cache_dtype: str = "auto",
        progress: Progress = iter,
    ) -> None:
        if llm.tokenizer is None:
            raise ValueError(f"{llm.folder} has no tokenizer, and tasks are text")
        self.llm, self.tokenizer = llm, llm.tokenizer
        self._batch_size, self._kv_cache_dtype = batch_size, kv_cache_dtype
        self.progress = progress
        self.max_length = llm.engine.max_seq_len
        self._adds_bos = beginning_of(self.tokenizer) is not None

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For (context, continuation): the log probability of the continuation, and whether it is
        what greedy decoding would say.
        """
        pairs = [self.encode_pair(*request.args) for request in requests]
        windows = [continuation(*pair, self.max_length) for pair in pairs]
        return self._score(windows)

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """For (text,): the log probability of all of it, in windows that overlap by one token. BOS
        is no part of it. (The harness's own Hugging Face model scores one BOS after another.)
        """
        texts = [self._encode(request.args[0], bos=False) for request in requests]
        parts = [rolling(ids, self.prefix, self.max_length) for ids in texts]
        answers = iter(self._score([window for windows in parts for window in windows]))
        return [sum((next(answers)[0] for _ in windows), start=0.0) for windows in parts]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """For (context, settings): what follows, up to a stop string, an end token or a length."""
        length = min(DEFAULT_NEW_TOKENS, self.max_length // 2)
        work = [(each.args[0], generation_params(each.args[1], length)) for each in requests]
        params = [each for _, each in work]
        prompts = [self._prompt(context, each) for context, each in work]
        builders = [OutputBuilder(*pair) for pair in zip(prompts, params, strict=True)]
        if work:
            for chunk in self.progress(self.llm.stream_many(prompts, params)):
                builders[chunk.index].add(chunk)
        return ["".join(builder.text) for builder in builders]

    def encode_pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what continues it, cut where the context alone ends."""
        if not context:
            return [self.prefix], self._encode(text, bos=False)
        kept = context.rstrip()
        head = self._encode(kept, self._adds_bos)
        if not head:  # a context of spaces
            return [self.prefix], self._encode(context + text, bos=False)
        return head, self._encode(context + text, self._adds_bos)[len(head) :]

    @property
    def prefix(self) -> int:
        """The token after which a text begins."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError(
            f"{self.llm.folder.name} names no BOS and no EOS token, so nothing can be scored "
            "without a context"
        )

    def _encode(self, text: str, bos: bool) -> list[int]:
        return self.tokenizer.encode(text, bos=bos)

    def _prompt(self, context: str, params: SamplingParams) -> list[int]:
        """The end of a context, so that the new tokens fit behind it."""
        ids = self._encode(context, self._adds_bos) or [self.prefix]
        room = self.max_length - (params.max_new_tokens or 0)
        if room < 1:
            raise ValueError(
                f"a task wants {params.max_new_tokens} new tokens and the context holds "
                f"{self.max_length}; raise --max-seq-len or leave this task out"
            )
        return ids[-room:]

    def _score(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        how = (self._batch_size, self._kv_cache_dtype, self.progress)
        scores = score(self.llm.model, windows, *how)
        return [(each.logprobs.double().sum().item(), bool(each.is_top.all())) for each in scores]


def generation_params(
    settings: Mapping[str, Any], default_length: int = DEFAULT_NEW_TOKENS
) -> SamplingParams:
    """Sampling parameters for the settings of a task; greedy unless it says `do_sample`. ValueError
    for a setting that is not known and would change what is generated.
    """
    left = {key: value for key, value in settings.items() if value is not None}
    lengths = [left.pop(key) for key in LENGTH_KEYS if key in left]
    until = left.pop("until", ())
    stop = [until] if isinstance(until, str) else list(until)
    sampled = left.pop("do_sample", False)
    chosen = {key: left.pop(key) for key in SAMPLING_KEYS if key in left}
    unknown = [key for key, value in left.items() if NEUTRAL.get(key) != value]
    if unknown:
        raise ValueError(f"a task generates with {unknown[0]}={left[unknown[0]]!r}: not known here")
    if not sampled:
        chosen["temperature"] = 0.0
    return SamplingParams(
        max_new_tokens=int(lengths[0]) if lengths else default_length,
        stop=tuple(text for text in stop if text),
        seed=0,
        **chosen,
    )


# --- the harness itself ---


@dataclass(frozen=True)
class Results:
    """What `lm_eval.simple_evaluate` returned."""

    raw: Mapping[str, Any]
    text: str

    def as_dict(self) -> dict[str, Any]:
        wanted = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
        return {key: self.raw[key] for key in wanted if self.raw.get(key)}


class Tasks:
    """Tasks by name, known to exist. ValueError names those that do not, and how to install the
    harness where it is missing.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        try:
            # Optional: only for --tasks; it brings some forty packages and takes seconds.
            import lm_eval
            import lm_eval.tasks
        except ImportError as error:
            raise ValueError(
                f"--tasks needs lm-evaluation-harness ({error}): pip install 'gptfast[eval]'"
            ) from None
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--task-path {folder} is not a folder; it holds tasks' yaml files")
        self._lm_eval = lm_eval
        self._manager = lm_eval.tasks.TaskManager(
            include_path=None if folder is None else str(folder)
        )
        self.names = list(names)
        known = set(self._manager.all_tasks)
        missing = [name for name in self.names if name not in known]
        if missing:
            raise ValueError(
                f"lm-evaluation-harness knows no task {missing[0]!r}; `lm-eval ls tasks` lists "
                "those it has, and --task-path names a folder with your own"
            )

    def run(
        self, answers: Answers, num_fewshot: int | None = None, limit: int | None = None
    ) -> Results:
        from lm_eval.api.model import LM
        from lm_eval.utils import make_table

        class Model(LM):
            """Answers, as the harness wants to see them."""

            loglikelihood = answers.loglikelihood
            loglikelihood_rolling = answers.loglikelihood_rolling
            generate_until = answers.generate_until

        raw = self._lm_eval.simple_evaluate(
            model=Model(),
            tasks=self.names,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=self._manager,
            log_samples=False,
        )
        tables = [make_table(raw)]
        if raw.get("groups"):
            tables.append(make_table(raw, "groups"))
        return Results(raw, "\n".join(tables))
