"""Other engines as contestants of `gptfast bench`, on the same folder of weights.

They are optional: each is imported where it is built, and a missing one is a ValueError that names
what to install.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gptfast.commands.contest import Contestant, Trace
from gptfast.stats import RequestStats

# What --peer accepts: name -> the contestants it adds, given whether --compile was asked for.
PEERS: dict[str, Callable[[bool], list[Callable[..., Contestant]]]] = {
    "transformers": lambda compile: [
        partial(Transformers, compile=compiled) for compiled in ([False, True][: 1 + compile])
    ],
}


class Transformers:
    """transformers' own `generate`: with its default cache, or with a static one and compiled."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, compile: bool
    ) -> None:
        transformers = self._package = _import_transformers()
        self.compiled = compile
        self.name = "transformers compiled" if compile else "transformers"
        self.version = transformers.__version__
        self.compile_s = None if compile else 0.0
        start = perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.load_s = perf_counter() - start
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if compile:
            config = transformers.CompileConfig(mode="default", fullgraph=False)
            config._compile_all_devices = True  # it compiles for accelerators only otherwise
            settings |= {"cache_implementation": "static", "compile_config": config}
        self.settings = settings

    def new_cache(self, max_seq_len: int) -> Any:
        """An empty cache of the kind that `run` uses: a growing one; compiled, of a fixed size."""
        if not self.compiled:
            return self._package.DynamicCache(config=self.model.config)
        return self._package.StaticCache(self.model.config, max_cache_len=max_seq_len)

    @torch.no_grad()
    def run(self, prompts: Sequence[list[int]], num_new_tokens: int, **settings: Any) -> Trace:
        """As every contestant; `settings` go to `generate`."""
        tokens = torch.tensor(prompts, device=self.model.device)  # [B, T]
        clock = _Clock()
        output = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=num_new_tokens,
            max_new_tokens=num_new_tokens,
            streamer=clock,
            **self.settings | settings,
        )
        new = output[:, tokens.size(1) :].tolist()
        return Trace(new, [clock.stats(len(prompt)) for prompt in prompts])


class _Clock:
    """A streamer that notes when tokens come: first the prompt, then one call per step."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None: ...

    def stats(self, num_prompt_tokens: int) -> RequestStats:
        return RequestStats(
            num_prompt_tokens,
            submitted_at=self.start,
            started_at=self.start,
            token_times=self.times[1:],
        )


def _import_transformers() -> Any:
    try:
        import transformers  # optional: an engine to compare with, nothing else
    except ImportError:
        raise ValueError(
            "--peer transformers needs the package transformers: pip install 'gptfast[peers]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
