"""Options that several commands share, and how they become an LLM and sampling parameters."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from gptfast import __version__
from gptfast.cache import KV_CACHE_DTYPES
from gptfast.device import DTYPES
from gptfast.hub import DEFAULT_MODEL
from gptfast.llm import LLM
from gptfast.parallel import Group, start
from gptfast.quantization import PLAIN, QuantPlan, quant_plan
from gptfast.sampling import SamplingParams


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "--checkpoint-path",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="folder, Hugging Face id or bundled name (storyteller, storyteller-draft); "
        "default: %(default)s",
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="of weights and cache; default: what the checkpoint says",
    )
    add_quant_options(group)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--version", action="version", version=f"gptfast {__version__}")


def add_quant_options(group: Any) -> None:
    """To a parser, or a group of one."""
    group.add_argument(
        "--quant",
        metavar="FORMAT",
        help="round the weights while loading: int8, int4 (groups of 32, head in int8), "
        "int4-g64-asym, int8-dynamic, int4-dynamic (8-bit activations too), fp8; none: plain "
        "numbers of a quantized checkpoint",
    )
    group.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale; -1: a whole row"
    )
    group.add_argument("--quant-head", metavar="FORMAT", help="of the head; default: int8; or none")
    group.add_argument(
        "--quant-embedding", metavar="FORMAT", help="of the embedding; default: none"
    )
    group.add_argument(
        "--quant-exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help='parts that stay plain: "blocks.0.*", "mlp.down"; may be given several times',
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it runs")
    group.add_argument("--compile", action="store_true", help="compile with torch.compile")
    group.add_argument(
        "--max-seq-len",
        type=int,
        metavar="TOKENS",
        help="prompt and output tokens of a row; default: the model's context, if memory allows",
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=list(KV_CACHE_DTYPES),
        help="what keys and values are stored as, int8 and fp8 with a scale for each head and "
        "position; default: as --dtype says",
    )
    group.add_argument(
        "--tensor-parallel-size",
        type=int,
        metavar="N",
        help="the number of processes that share the model; it is torchrun's to start them "
        "(torchrun --standalone --nproc-per-node N), this only checks",
    )
    group.add_argument(
        "--expert-parallel",
        action="store_true",
        help="with several processes: each has whole experts, not a share of every expert",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speculative decoding")
    group.add_argument(
        "--draft",
        "--draft-model",
        "--draft-checkpoint-path",
        metavar="DRAFT",
        help="what proposes tokens that the model only checks: a smaller model of the same "
        "tokenizer (as --model), ngram (what the text itself says next), layers:N (the model's "
        "first layers), or a coarser format such as int4",
    )
    group.add_argument(
        "--speculate-k",
        type=int,
        metavar="K",
        help="tokens proposed at a time, 1 to 15; default: as many as pay, and none where none do",
    )
    group.add_argument(
        "--draft-quant", metavar="FORMAT", help="round the weights of a draft model, as --quant"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-n",
        "--max-new-tokens",
        "--max-tokens",
        type=int,
        default=200,
        metavar="N",
        help="default: %(default)s",
    )
    group.add_argument(
        "--temperature", type=float, default=0.8, help="0 is greedy; default: %(default)s"
    )
    group.add_argument("--top-k", type=int, default=200, help="0 is off; default: %(default)s")
    group.add_argument("--top-p", type=float, default=1.0, help="1 is off; default: %(default)s")
    group.add_argument("--min-p", type=float, default=0.0, help="0 is off; default: %(default)s")
    for name, neutral in (("repetition", 1.0), ("presence", 0.0), ("frequency", 0.0)):
        group.add_argument(
            f"--{name}-penalty",
            type=float,
            default=neutral,
            metavar="X",
            help=f"{neutral:g} is off; default: %(default)s",
        )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end where this text would appear; may be given several times",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-sequence token"
    )
    group.add_argument(
        "--seed",
        type=int,
        help="the same seed gives the same text (with a draft model, at one --speculate-k)",
    )


def sampling_params(args: argparse.Namespace, **others: Any) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        seed=args.seed,
        **others,
    )


def set_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; at least 1 is needed")
        torch.set_num_threads(args.threads)


def chosen_quant(args: argparse.Namespace) -> QuantPlan | str | None:
    """What the options say of quantization; ValueError for details of none."""
    details = (args.group_size, args.quant_head, args.quant_embedding, args.quant_exclude or None)
    if args.quant in (None, PLAIN):
        if any(detail is not None for detail in details):
            raise ValueError("--group-size and --quant-... are details of --quant; give it too")
        return args.quant
    return quant_plan(args.quant, *details[:3], exclude=args.quant_exclude)


def chosen_group(args: argparse.Namespace) -> Group:
    """The processes that share the model: ALONE where torchrun has started none."""
    return replace(start(args.tensor_parallel_size), by_expert=args.expert_parallel)


def load_llm(args: argparse.Namespace, batch_size: int) -> LLM:
    """The model that the options ask for, with its draft where the command has these options."""
    set_threads(args)
    return LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        quant=chosen_quant(args),
        compile=args.compile,
        max_seq_len=args.max_seq_len,
        batch_size=batch_size,
        revision=args.revision,
        draft=getattr(args, "draft", None),
        speculate_k=getattr(args, "speculate_k", None),
        draft_quant=getattr(args, "draft_quant", None),
        tensor_parallel_size=args.tensor_parallel_size,
        expert_parallel=args.expert_parallel,
        progress=progress_bar,
    )


def note_loaded(args: argparse.Namespace, llm: LLM) -> None:
    """Says what was loaded, how long it took and how long the context is. Commands check what they
    were given first: an error stands alone.
    """
    config, context = llm.config, llm.engine.max_seq_len
    formats = Counter(form.name for form in llm.model.formats.values()).most_common()
    kinds = [str(llm.model.dtype).removeprefix("torch."), *(name for name, _ in formats)]
    note(
        f"Loaded {llm.folder.name}: {config.num_parameters:,} parameters, "
        f"{', '.join(kinds)} on {llm.engine.device}"
    )
    if not llm.group.is_alone:
        note(f"Tensor parallel: {llm.group.text(llm.engine.device)}")
    if args.kv_cache_dtype != "auto":
        note(f"Keys and values are stored as {args.kv_cache_dtype}")
    for line in llm.notes:
        note(line)
    if llm.draft is not None:
        model, ranks = llm.draft.model, llm.group.size
        where = "" if model is None or ranks == 1 else f", on each of {ranks} ranks"
        if where and model is not None and model.group.is_alone:
            where = ", on rank 0 alone"
        note(f"Draft: {llm.draft.text}{where}")
    if llm.left_out:
        note(f"Left out, because it is no language model: {llm.left_out}")
    note(f"Time to load model: {llm.load_s:.2f} seconds")
    if args.max_seq_len is None and context < config.max_seq_len:
        note(
            f"Context: {context} tokens, which is what the free memory holds "
            f"(the model allows {config.max_seq_len}; --max-seq-len sets it)"
        )


def progress_bar(items: Iterable[Any]) -> Iterable[Any]:
    """A bar on stderr that shows only where loading takes more than a moment."""
    return tqdm(items, desc="Loading weights", unit="tensor", delay=1.0, leave=False)


def note(line: str) -> None:
    """A line about the work, beside the result: stderr, so that stdout stays the result's own."""
    print(line, file=sys.stderr, flush=True)
