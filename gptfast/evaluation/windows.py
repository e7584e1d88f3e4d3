"""How a text of token ids becomes windows, each read by itself: what tells one definition of
perplexity from another.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens that are read together: `ids[first:]` are scored, each given all before it in `ids`.
    `start` is the place of `ids[0]` in the whole text.
    """

    ids: Sequence[int]
    first: int
    start: int = 0

    @property
    def num_inputs(self) -> int:
        """Tokens that are read: the last one is only predicted."""
        return len(self.ids) - 1

    @property
    def num_scored(self) -> int:
        return max(0, len(self.ids) - self.first)


def strided(ids: Sequence[int], window: int, stride: int) -> list[Window]:
    """Windows that begin every `stride` tokens; only tokens not yet scored count, and never the
    first of a window, which has nothing before it. A text shorter than a window is one window.

    The definition of https://huggingface.co/docs/transformers/perplexity, as an average over
    tokens (the code there weighs later windows by one token less than they score).
    """
    if window < 2:
        raise ValueError(f"the window is {window} tokens; at least 2 are needed")
    if not 1 <= stride <= window:
        raise ValueError(f"the stride is {stride}; it must be from 1 to the window, {window}")
    windows, scored = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        windows.append(Window(ids[start:end], max(1, scored - start), start))
        scored = end
        if end == len(ids):
            break
    return windows


def second_halves(ids: Sequence[int], window: int, bos: int | None) -> list[Window]:
    """Windows that do not overlap, each beginning with `bos` in the place of its first token (None:
    left as it is), of which only the second half is scored; what is left at the end is not read.

    The definition of llama.cpp's perplexity tool: of n tokens, those from n // 2 + 1 on. (The tool
    wants two windows of text at least; here one will do.)
    """
    if window < 3:
        raise ValueError(f"the window is {window} tokens; at least 3 are needed")
    if len(ids) < window:
        raise ValueError(
            f"the text has {len(ids)} tokens, and a whole window of {window} is needed; give more "
            "text or a smaller window"
        )
    windows = []
    for start in range(0, len(ids) - window + 1, window):
        first = ids[start] if bos is None else bos
        windows.append(Window([first, *ids[start + 1 : start + window]], window // 2 + 1, start))
    return windows


def documents(texts: Sequence[Sequence[int]], window: int) -> list[Window]:
    """The beginning of each text alone, up to `window` tokens, all but the first scored. Places
    count through the texts joined.
    """
    windows, start = [], 0
    for ids in texts:
        windows.append(Window(ids[:window], 1, start))
        start += len(ids)
    return windows


def continuation(context: Sequence[int], ids: Sequence[int], max_inputs: int) -> Window:
    """Scores `ids` after the end of `context`, as much of it as fits: a model reads at most
    `max_inputs` tokens, and the last of `ids` need not be read.
    """
    if not context or not 0 < len(ids) <= max_inputs:
        raise ValueError(
            f"a continuation of {len(ids)} tokens after {len(context)}; needed are 1 to "
            f"{max_inputs} (what the context holds) after at least 1"
        )
    whole = [*context, *ids][-(max_inputs + 1) :]
    return Window(whole, len(whole) - len(ids))


def rolling(ids: Sequence[int], prefix: int, max_inputs: int) -> list[Window]:
    """Scores every one of `ids` once: windows as long as `max_inputs` allows, the first after
    `prefix`, the others after the one token before them, the last after as much as fits.
    """
    whole, windows = [prefix, *ids], []
    for start in range(0, len(ids), max_inputs):
        end = min(start + max_inputs, len(ids)) + 1
        begin = max(0, end - max_inputs - 1) if end == len(whole) else start
        windows.append(Window(whole[begin:end], start + 1 - begin, begin))
    return windows
