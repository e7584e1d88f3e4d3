"""What quantization costs: methods x formats, in bytes, perplexity, divergence and decoding speed.

    python bench/quality.py --model DIR --text FILE --calibration OTHER_FILE

Every model is compared with the unquantized one on the same tokens: each document of the text
(`<|endoftext|>` ends one) by itself, its first tokens. Ends with one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptfast.calibrated import Awq, Gptq, Method, quantize_model
from gptfast.calibration import calibration_ids, read_documents
from gptfast.commands.bench import commit, device_name
from gptfast.device import parse_device
from gptfast.engine import Engine
from gptfast.evaluation import Comparison, compare
from gptfast.evaluation.windows import Window, documents
from gptfast.hub import DEFAULT_MODEL, find_model
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.quantization import QuantPlan, fill, quant_plan, rounded
from gptfast.sampling import SamplingParams
from gptfast.tokenizer import load_tokenizer
from quantize.packing import pack_linears

METHODS: dict[str, Callable[[], Method] | None] = {
    "plain": None,  # round to nearest without a search
    "rtn": None,
    "gptq": Gptq,
    "awq": Awq,
}
DEFAULT_ROWS = (
    "rtn:int8 rtn:int8-dynamic rtn:fp8 plain:int4-g32 rtn:int4-g32 rtn:int4-g32-asym "
    "rtn:int4-g32-dynamic gptq:int4-g32 awq:int4-g32 rtn:int4-g64 gptq:int4-g64 awq:int4-g64 "
    "rtn:mxfp4 rtn:int3-g32 gptq:int3-g32 awq:int3-g32"
).split()


@dataclass
class Subject:
    """A quantized model, and what was measured of it."""

    name: str
    model: Transformer
    comparison: Comparison
    seconds: list[float]

    def as_dict(self) -> dict[str, Any]:
        found, bits = self.comparison, bits_per_weight(self.model)
        return {
            "row": self.name,
            "bits_per_weight": bits,
            "nll": found.model.nats_per_token,
            "nll_added": found.nll_difference,
            "perplexity": found.model.perplexity,
            "kl_mean": found.kl_mean,
            "kl_p99": found.kl_p99,
            "top1_agreement": found.top1_agreement,
            "decode_tok_s": 1 / median(self.seconds),
        }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device, folder = parse_device(args.device), find_model(args.model)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    texts = list(read_documents(args.text))[: args.max_documents]
    windows = documents([tokenizer.encode(text) for text in texts], args.window)
    ids = calibration_ids(
        read_documents(args.calibration), tokenizer, args.num_samples, args.seq_len
    )
    reference = load(folder, args.dtype, device)
    subjects = []
    for row in args.rows:
        start = perf_counter()
        model = quantized(row, args, folder, ids, device)
        made = perf_counter() - start
        comparison = compare(model, reference, windows, batch_size=8)
        subjects.append(Subject(row, model, comparison, []))
        note(f"{row}: made in {made:.1f} s, {comparison.nll_difference:+.4f} nats")
    plain = Subject("unquantized", reference, comparison, [])
    measure_speed([plain, *subjects], args.rounds)
    report(args, windows, subjects, 1 / median(plain.seconds))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--calibration", help="other text; default: the bundled stories")
    parser.add_argument("--max-documents", type=int, default=200)
    parser.add_argument("--window", type=int, default=512, help="tokens of a document")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, metavar="METHOD:FORMAT")
    return parser.parse_args()


def quantized(
    row: str, args: argparse.Namespace, folder: Path, ids: torch.Tensor, device: torch.device
) -> Transformer:
    method, _, name = row.partition(":")
    plan, make = quant_plan(name), METHODS[method]
    if method == "rtn":
        return load(folder, args.dtype, device, quant=plan)
    if make is None:
        return _plainly_rounded(folder, plan, args.dtype, device)
    model = load(folder, args.dtype, device)
    quantize_model(model, ids.to(device), plan, make())
    pack_linears(model, model.dtype)
    return model


def _plainly_rounded(
    folder: Path, plan: QuantPlan, dtype: str, device: torch.device
) -> Transformer:
    model = load(folder, dtype, device)
    formats, tied = plan.formats(model), model.config.tied_head
    weights = list(model.named_parameters())
    fill(model, rounded(weights, formats, tied, search=False), model.dtype)
    pack_linears(model, model.dtype)
    return model


def bits_per_weight(model: Transformer) -> float:
    """Of the body: scales and zeros included, head and embedding not."""
    modules = [model.get_submodule(name) for name in model.formats if name.startswith("blocks")]
    weights = [(m.weight_bytes, m.dequantize().numel()) for m in modules if hasattr(m, "format")]
    num_bytes, count = map(sum, zip(*weights, strict=True)) if weights else (4, 1)
    return 8 * num_bytes / count


def measure_speed(subjects: Sequence[Subject], rounds: int, num_tokens: int = 64) -> None:
    """Seconds of a decoded token, the models in turn."""
    engines = [Engine(subject.model, 1, 256) for subject in subjects]
    params = SamplingParams(temperature=0, max_new_tokens=num_tokens + 1, ignore_eos=True)
    for number in range(rounds + 1):
        for subject, engine in zip(subjects, engines, strict=True):
            engine.submit([1, 2, 3], params)
            engine.step()
            start = perf_counter()
            while engine.has_work:
                engine.step()
            if number:
                subject.seconds.append((perf_counter() - start) / num_tokens)


def report(
    args: argparse.Namespace,
    windows: Sequence[Window],
    subjects: Sequence[Subject],
    plain_tok_s: float,
) -> None:
    first = subjects[0].comparison.reference
    rows = [subject.as_dict() for subject in subjects]
    columns: dict[str, tuple[str, str]] = {
        "bits_per_weight": ("bits", ".2f"),
        "nll_added": ("nats added", "+.4f"),
        "perplexity": ("perplexity", ".3f"),
        "kl_mean": ("KL mean", ".4f"),
        "kl_p99": ("KL p99", ".3f"),
        "top1_agreement": ("top-1", ".1%"),
        "decode_tok_s": ("tok/s", ".0f"),
    }
    print(
        f"{Path(args.model).name}, {first.num_tokens:,} tokens of {len(windows)} documents: "
        f"{first.nats_per_token:.4f} nats, perplexity {first.perplexity:.3f}, {plain_tok_s:.0f} "
        f"tok/s unquantized in {args.dtype}"
    )
    print(f"{'':22}" + "".join(f"{title:>12}" for title, _ in columns.values()))
    for row in rows:
        cells = (format(row[key], spec).rjust(12) for key, (_, spec) in columns.items())
        print(f"{row['row']:22}" + "".join(cells))
    header = {
        "benchmark": "quality",
        "model": Path(args.model).name,
        "text": Path(args.text).name,
        "calibration": Path(args.calibration).name if args.calibration else "bundled stories",
        "num_tokens": first.num_tokens,
        "nll": first.nats_per_token,
        "decode_tok_s": plain_tok_s,
        "dtype": args.dtype,
        "device_name": device_name(parse_device(args.device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps({**header, "rows": rows}))


note = partial(print, file=sys.stderr, flush=True)

if __name__ == "__main__":
    main()
