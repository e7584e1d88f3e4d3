"""What bench/peers.py makes of its figures: ratios, a table, a plot. Measures nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, dict[str, Any]]  # contestant -> its figures; the first one is ours


def speeds(contexts: Sequence[int]) -> dict[str, str]:
    """Key of each speed in the figures, and what it is called."""
    keys = {"decode_tok_s": "decode", "prefill_tok_s": "prefill"}
    return keys | {f"context_{length}_tok_s": f"at {length:,}" for length in contexts}


def equal_tokens(tokens: Sequence[int], own: Sequence[int]) -> float:
    """Share of the tokens before the first that differs from ours."""
    pairs = enumerate(zip(tokens, own, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(own)) / len(own)


def over_best_peer(figures: Figures) -> dict[str, dict[str, Any]]:
    """For each of ours and each speed: how many times that of the fastest peer it is, and whose
    that was. Nothing where there is no peer.
    """
    ours = {name: each for name, each in figures.items() if name.startswith("gptfast ")}
    theirs = {name: each for name, each in figures.items() if name not in ours}
    if not theirs:
        return {}
    keys = [key for key in next(iter(ours.values())) if key.endswith("_tok_s")]
    best = {key: max(theirs, key=lambda name: theirs[name][key]) for key in keys}
    return {
        name: {
            key: {"ratio": each[key] / theirs[best[key]][key], "peer": best[key]} for key in keys
        }
        for name, each in ours.items()
    }


def table(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal: of each precision all contestants, then ours over the best peer. A
    speed's "x" is its ratio to the first line of its group.
    """
    columns = speeds(result["contexts"])
    rows = [
        f"{result['model']} ({result['weights']} weights), {result['device_name']}, "
        f"{result['threads']} threads, torch {result['torch']}, commit {result['commit']}",
        f"tok/s, medians of {result['rounds']} rounds: {result['new_tokens']} tokens after "
        f"{result['prompt_tokens']}, prefill of {result['prefill_tokens']}, then "
        f"{result['context_tokens']} behind each context",
    ]
    for group, figures in result["groups"].items():
        rows.append("")
        titles = "".join(f"{title:>10}{'x':>6}" for title in columns.values())
        rows.append(f"{group:24}{titles}{'read %':>8}{'first s':>9}{'peak GB':>9}  version")
        own = next(iter(figures.values()))
        for name, each in figures.items():
            cells = "".join(f"{each[key]:10.1f}{each[key] / own[key]:6.2f}" for key in columns)
            rows.append(
                f"{name:24}{cells}{100 * each['bandwidth_fraction']:8.1f}"
                f"{each['first_token_s']:9.2f}{each['peak_memory_bytes'] / 1e9:9.2f}"
                f"  {each['version']}{_rounds(each, result['rounds'])}"
            )
        for name, ratios in result["over_best_peer"][group].items():
            parts = (
                f"{title} {ratios[key]['ratio']:.2f} ({ratios[key]['peer']})"
                for key, title in columns.items()
            )
            rows.append(f"{name} over the best peer: {', '.join(parts)}")
        bandwidths = [each["read_bandwidth_gb_s"] for each in figures.values()]
        rows.append(f"memory read {min(bandwidths):.0f} to {max(bandwidths):.0f} GB/s")
    return rows


def _rounds(figures: dict[str, Any], num_rounds: int) -> str:
    """Who was far behind had fewer."""
    count = len(figures["per_round"])
    return "" if count == num_rounds else f" ({count} rounds)"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars, one panel a speed: all contestants, ours in another colour."""
    import matplotlib  # optional: the extra `bench`

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = speeds(result["contexts"])
    entries = [
        (name, each) for figures in result["groups"].values() for name, each in figures.items()
    ][::-1]
    names = [name for name, _ in entries]
    colours = ["tab:orange" if name.startswith("gptfast ") else "tab:gray" for name in names]
    size = (3.2 * len(columns) + 2, 0.35 * len(names) + 1.2)
    figure, axes = pyplot.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False)
    for axis, (key, title) in zip(axes[0], columns.items(), strict=True):
        bars = axis.barh(names, [each[key] for _, each in entries], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set_title(f"{title}, tok/s")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['model']}, {result['device_name']}, {result['threads']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
