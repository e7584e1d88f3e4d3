"""Measures the bundled storyteller and its draft on held-out stories, and writes their README.

    python scripts/report_storyteller.py gptfast/storyteller

Loads the checkpoints as any user would, so that the numbers are those of the files.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from story_grammar import PLOTS
from tokenizers import Tokenizer
from train_storyteller import (
    CONFIGS,
    NUM_HELD_OUT,
    RECIPES,
    ROWS,
    SEQ_LEN,
    first_story,
    held_out_story,
    packed_row,
    story_ids,
    training_story,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gptfast.llm import LLM
from gptfast.sampling import SamplingParams

NUM_OVERLAP = 200
OPENINGS = ("Once upon a time", "One rainy morning, a small dragon named Zuri", "There was a boy")

README = """# storyteller, storyteller-draft

Two small Llama-architecture models that tell children's stories, with one tokenizer. They are the
default model, the tests' real weights and the demo. The text they learned from is composed by
`scripts/story_grammar.py`; no text from elsewhere was used. The weights are under this project's
licence (Apache-2.0).

    python scripts/train_storyteller.py --out gptfast/storyteller
    python scripts/report_storyteller.py gptfast/storyteller

{table}

- **Text**: {plots} plots told with templates, tables of words and a seeded generator; every story
  is composed anew, and one name in eight is invented, so names, things and places have to be
  copied from the story itself. Training stories have the seeds `train N`, held-out stories the
  seeds `held-out N`; the sets are disjoint and no story was seen twice.
- **Tokenizer**: byte-level BPE with {vocab} tokens, trained on the training stories 0 to 19999;
  `<s>` (0) begins every text and `</s>` (1) ends a story. About {tokens:.0f} tokens a story.
- **Training**: AdamW (0.9, 0.98, weight decay {decay}), clipping at {clip}, {warmup} steps of
  warmup, then a cosine down to a twentieth; rows of {seq_len} tokens that begin with a whole story;
  bf16 autocast on one thread of a shared 2-core machine ({minutes}). The draft learned from the
  text and from the storyteller's probabilities, half and half.
- **Held-out loss**: mean negative log-likelihood in nats per token over {held_out} held-out
  stories, float32 arithmetic on the stored bf16 weights. A perfect model would reach the entropy of
  the grammar, not zero.
- **Not memorised**: of the 8-word strings of held-out stories, {seen8:.1%} also occur somewhere in
  the storyteller's {num_stories:,} training stories; of the 16-word strings {seen16:.1%}, of the
  32-word strings {seen32:.1%}. No held-out story occurs there.
- **Draft**: on held-out text both models' most likely token is the same at {agreement:.1%} of
  positions; the overlap of their distributions, which is the chance that a sampled draft token is
  accepted at temperature 1, is {overlap:.1%}.
- **Chat** is co-writing: the template joins all messages into one story, which the model goes on
  with.

## Samples

Temperature 0.8, seed 1; the opening in bold was given.

{samples}
"""


def held_out_losses(llm: LLM, tokenizer: Tokenizer) -> float:
    total, count = 0.0, 0
    for index in range(NUM_HELD_OUT):
        scores = llm.score(story_ids(tokenizer, held_out_story(index)))
        total, count = total - float(scores.sum()), count + scores.numel()
    return total / count


def draft_agreement(model: LLM, draft: LLM, tokenizer: Tokenizer) -> tuple[float, float]:
    """Share of equal most likely tokens, and mean overlap sum(min(p, q)) of the distributions."""
    equal = overlap = count = 0.0
    for index in range(NUM_OVERLAP):
        ids = story_ids(tokenizer, held_out_story(index))[:-1]
        wanted, drafted = model.logits(ids), draft.logits(ids)  # [T, V]
        equal += int((wanted.argmax(-1) == drafted.argmax(-1)).sum())
        overlap += float(torch.minimum(wanted.softmax(-1), drafted.softmax(-1)).sum())
        count += len(ids)
    return equal / count, overlap / count


def count_training_stories(tokenizer: Tokenizer) -> int:
    recipe = RECIPES["storyteller"]
    index = first_story(recipe)
    for _ in range(recipe.steps * ROWS):
        _, index = packed_row(tokenizer, index)
    return index - first_story(recipe)


def strings_of(story: str, num_words: int) -> Iterator[str]:
    story_words = story.split()
    for start in range(len(story_words) - num_words + 1):
        yield " ".join(story_words[start : start + num_words])


def seen_shares(num_stories: int, lengths: tuple[int, ...]) -> list[float]:
    """For each length in words: the share of held-out strings that some training story contains."""
    held_out = [held_out_story(index) for index in range(NUM_OVERLAP)]
    unseen = {n: {string for story in held_out for string in strings_of(story, n)} for n in lengths}
    start = first_story(RECIPES["storyteller"])
    for index in range(start, start + num_stories):
        story = training_story(index)
        for n in lengths:
            unseen[n].difference_update(strings_of(story, n))
    strings = {
        n: [string for story in held_out for string in strings_of(story, n)] for n in lengths
    }
    return [sum(s not in unseen[n] for s in strings[n]) / len(strings[n]) for n in lengths]


def table_of(folder: Path, losses: dict[str, float]) -> str:
    lines = [
        "| | parameters | layers × dim | heads / KV heads | hidden | context | weights | seed | "
        "steps × tokens | peak rate | held-out loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, config in CONFIGS.items():
        recipe = RECIPES[name]
        size = (folder / name / "model.safetensors").stat().st_size / 1e6
        lines.append(
            f"| {name} | {config.num_parameters:,} | {config.num_layers} × {config.dim} | "
            f"{config.num_heads} / {config.num_kv_heads} × {config.head_dim} | "
            f"{config.hidden_dim} | {config.max_seq_len} | {size:.2f} MB bf16 | {recipe.seed} | "
            f"{recipe.steps:,} × {ROWS * SEQ_LEN:,} | {recipe.learning_rate:g} | "
            f"**{losses[name]:.4f}** |"
        )
    return "\n".join(lines)


def samples_of(llm: LLM) -> str:
    params = SamplingParams(temperature=0.8, seed=1, max_new_tokens=400)
    texts = []
    for opening, output in zip(OPENINGS, llm.generate(list(OPENINGS), params), strict=True):
        text = f"**{opening}**{output.text}".rstrip()
        texts.append("\n".join(f"> {line}".rstrip() for line in text.split("\n")))
    return "\n\n---\n\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the two checkpoints are")
    parser.add_argument("--minutes", default="about an hour for both", help="what training took")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = arguments.folder
    llms = {name: LLM(folder / name, dtype="fp32") for name in CONFIGS}
    tokenizer = Tokenizer.from_file(str(folder / "storyteller" / "tokenizer.json"))
    losses = {name: held_out_losses(llm, tokenizer) for name, llm in llms.items()}
    agreement, overlap = draft_agreement(llms["storyteller"], llms["storyteller-draft"], tokenizer)
    num_stories = count_training_stories(tokenizer)
    seen8, seen16, seen32 = seen_shares(num_stories, (8, 16, 32))
    recipe = RECIPES["storyteller"]
    text = README.format(
        table=table_of(folder, losses),
        plots=len(PLOTS),
        vocab=tokenizer.get_vocab_size(),
        tokens=sum(len(story_ids(tokenizer, held_out_story(i))) for i in range(400)) / 400,
        decay=recipe.weight_decay,
        clip=recipe.clip,
        warmup=recipe.warmup,
        seq_len=SEQ_LEN,
        minutes=arguments.minutes,
        held_out=NUM_HELD_OUT,
        seen8=seen8,
        seen16=seen16,
        seen32=seen32,
        num_stories=num_stories,
        agreement=agreement,
        overlap=overlap,
        samples=samples_of(llms["storyteller"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
