"""Measures the bundled storyteller and its draft on held-out stories, and writes their README.

    python scripts/report_storyteller.py gptfast/storyteller

Loads the checkpoints as any user would, so that the numbers are those of the files.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from story_grammar import PLOTS, tell
from story_tale import Tale
from story_text import SEPARATOR, calibration_text
from story_words import BOYS, GIRLS, PETS
from tokenizers import Tokenizer
from train_storyteller import (
    CONFIGS,
    NUM_HELD_OUT,
    POOL,
    RECIPES,
    ROWS,
    SEQ_LEN,
    first_story,
    held_out_story,
    story_ids,
    training_story,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gptfast.llm import LLM
from gptfast.sampling import SamplingParams

NUM_OVERLAP = 200
NUM_NAMES = 50
OPENINGS = (
    "Once upon a time",
    "One rainy morning, a small dragon named Coco",
    "There was a boy named Theo. He had a blue drum.",
)

README = """# storyteller, storyteller-draft

Two small Llama-architecture models that tell children's stories, with one tokenizer. They are the
default model, the tests' real weights and the demo. The text they learned from is composed by
`scripts/story_grammar.py`; no text from elsewhere was used. The weights are under this project's
licence (Apache-2.0).

    python scripts/train_storyteller.py --out gptfast/storyteller
    python scripts/report_storyteller.py gptfast/storyteller

{table}

- **Text**: {plots} plots told with templates, tables of words and a seeded generator. Every story
  is composed anew, and one name in five is invented, so names, things and places have to be copied
  from the story itself. Training stories have the seeds `train N`, held-out stories the seeds
  `held-out N`; no story was seen twice.
- **Tokenizer**: byte-level BPE with {vocab} tokens, trained on the training stories 0 to 19999;
  `<s>` (0) begins every text and `</s>` (1) ends a story. About {tokens:.0f} tokens a story.
- **Training**: batches of {rows} stories, each alone in its row; Muon (rate {muon}, momentum 0.95,
  weight decay {decay}) for the weights inside the blocks, AdamW (0.9, 0.98) for the embedding and
  the norms; gradients clipped at {clip}, {warmup} steps of warmup, then a cosine down to a
  twentieth; attention begins as a copier (`let_attention_copy`); bf16 autocast on one thread. The
  draft learned from the text and from the storyteller's probabilities, half and half. Training
  took {minutes}.
- **Held-out loss**: mean negative log-likelihood in nats per token over {held_out} held-out
  stories, float32 arithmetic on the stored bf16 weights. The grammar's own choices are at most
  {entropy:.3f} nats per token; their true entropy, a little less, is what no model can beat.
- **Not memorised**: of the 8-word strings of held-out stories, {seen8:.1%} also occur somewhere in
  the storyteller's {num_stories:,} training stories; of the 16-word strings {seen16:.1%}, of the
  32-word strings {seen32:.1%}. No held-out story occurs there.
- **Draft**: on held-out text both models' most likely token is the same at {agreement:.1%} of
  positions; the overlap of their distributions, which is the chance that a sampled draft token is
  accepted at temperature 1, is {overlap:.1%}.
- **Names**: given "Once upon a time, there was a little fox named X.", the story sampled at
  temperature 0.8 keeps X to its second half for {known:.0%} of {num_names} names of the tables and
  for {invented:.0%} of {num_names} newly invented ones. Limit: names of another make, whose pieces
  never formed a name in training (Velmur, Aisha), are mostly changed on the way.
- **Chat** is co-writing: the template joins all messages into one story, which the model goes on
  with.
- **Calibration text**: `stories.txt` holds {calibration:,} more stories, with the seeds
  `calibration N` (`python scripts/story_text.py gptfast/storyteller/stories.txt`). It is what
  `gptfast quantize` shows a model where no better text is given; neither training nor a figure here
  has used it.

## Samples

Temperature 0.8, seed 1; the opening in bold was given.

{samples}
"""


def held_out_ids(tokenizer: Tokenizer, index: int) -> list[int]:
    """Two plots may be longer than the context; what lies beyond is not scored."""
    return story_ids(tokenizer, held_out_story(index))[:SEQ_LEN]


def held_out_loss(llm: LLM, tokenizer: Tokenizer) -> float:
    total, count = 0.0, 0
    for index in range(NUM_HELD_OUT):
        scores = llm.score(held_out_ids(tokenizer, index))
        total, count = total - float(scores.sum()), count + scores.numel()
    return total / count


def draft_agreement(model: LLM, draft: LLM, tokenizer: Tokenizer) -> tuple[float, float]:
    """Share of equal most likely tokens, and mean overlap sum(min(p, q)) of the distributions."""
    equal = overlap = count = 0.0
    for index in range(NUM_OVERLAP):
        ids = held_out_ids(tokenizer, index)[:-1]
        wanted, drafted = model.logits(ids), draft.logits(ids)  # [T, V]
        equal += int((wanted.argmax(-1) == drafted.argmax(-1)).sum())
        overlap += float(torch.minimum(wanted.softmax(-1), drafted.softmax(-1)).sum())
        count += len(ids)
    return equal / count, overlap / count


class CountingRandom(Random):
    """Adds up the nats of the choices made: an upper bound on the entropy of what they make."""

    nats = 0.0

    def choice(self, options: Sequence[Any]) -> Any:  # type: ignore[override]
        self.nats += math.log(len(options))
        return super().choice(options)

    def sample(self, options: Sequence[Any], k: int) -> list[Any]:  # type: ignore[override]
        self.nats += math.log(math.perm(len(options), k))
        return super().sample(options, k)

    def randrange(self, start: int, stop: int) -> int:  # type: ignore[override]
        self.nats += math.log(stop - start)
        return super().randrange(start, stop)

    def random(self) -> float:
        """A yes or a no."""
        self.nats += math.log(2)
        return super().random()

    def getrandbits(self, k: int) -> int:
        """Overridden so that the base class goes on choosing by bits and not by `random`."""
        return super().getrandbits(k)


def grammar_entropy(tokenizer: Tokenizer) -> float:
    nats, count = 0.0, 0
    for index in range(NUM_HELD_OUT):
        rng = CountingRandom(f"story held-out {index}")
        count += len(story_ids(tokenizer, tell(rng))) - 1
        nats += rng.nats
    return nats / count


def strings_of(story: str, num_words: int) -> Iterator[str]:
    story_words = story.split()
    for start in range(len(story_words) - num_words + 1):
        yield " ".join(story_words[start : start + num_words])


def seen_shares(num_stories: int, lengths: tuple[int, ...]) -> list[float]:
    """For each length in words: the share of held-out strings that some training story contains."""
    held_out = [held_out_story(index) for index in range(NUM_OVERLAP)]
    unseen = {n: {string for story in held_out for string in strings_of(story, n)} for n in lengths}
    start = first_story(RECIPES["storyteller"].seed)
    for index in range(start, start + math.ceil(num_stories / POOL) * POOL):
        story = training_story(index)
        for n in lengths:
            unseen[n].difference_update(strings_of(story, n))
    strings = {
        n: [string for story in held_out for string in strings_of(story, n)] for n in lengths
    }
    return [sum(s not in unseen[n] for s in strings[n]) / len(strings[n]) for n in lengths]


def share_kept(llm: LLM, names: Sequence[str]) -> float:
    """Share of names that the sampled story says at least three times, also in its second half."""
    params = SamplingParams(temperature=0.8, seed=1, max_new_tokens=400)
    prompts = [f"Once upon a time, there was a little fox named {name}." for name in names]
    texts = [output.text for output in llm.generate(prompts, params)]
    kept = [
        text.count(name) >= 3 and name in text[len(text) // 2 :]
        for name, text in zip(names, texts, strict=True)
    ]
    return sum(kept) / len(kept)


def table_of(folder: Path, losses: dict[str, float]) -> str:
    lines = [
        "| | parameters | layers × dim | heads / KV heads | hidden | context | weights | seed | "
        "steps × stories | AdamW rate | held-out loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, config in CONFIGS.items():
        recipe = RECIPES[name]
        size = (folder / name / "model.safetensors").stat().st_size / 1e6
        lines.append(
            f"| {name} | {config.num_parameters:,} | {config.num_layers} × {config.dim} | "
            f"{config.num_heads} / {config.num_kv_heads} × {config.head_dim} | "
            f"{config.hidden_dim} | {config.max_seq_len} | {size:.2f} MB bf16 | {recipe.seed} | "
            f"{recipe.steps:,} × {ROWS} | {recipe.adam_rate:g} | "
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
    losses = {name: held_out_loss(llm, tokenizer) for name, llm in llms.items()}
    agreement, overlap = draft_agreement(llms["storyteller"], llms["storyteller-draft"], tokenizer)
    num_stories = RECIPES["storyteller"].steps * ROWS
    seen8, seen16, seen32 = seen_shares(num_stories, (8, 16, 32))
    recipe = RECIPES["storyteller"]
    rng = Random("names of the report")
    known = rng.sample(sorted({*GIRLS, *BOYS, *PETS}), NUM_NAMES)
    invented = [Tale(rng).invented_name() for _ in range(NUM_NAMES)]
    text = README.format(
        table=table_of(folder, losses),
        plots=len(PLOTS),
        vocab=tokenizer.get_vocab_size(),
        tokens=sum(len(story_ids(tokenizer, held_out_story(i))) for i in range(400)) / 400,
        decay=recipe.weight_decay,
        clip=recipe.clip,
        warmup=recipe.warmup,
        rows=ROWS,
        muon=recipe.muon_rate,
        minutes=arguments.minutes,
        held_out=NUM_HELD_OUT,
        entropy=grammar_entropy(tokenizer),
        seen8=seen8,
        seen16=seen16,
        seen32=seen32,
        num_stories=num_stories,
        agreement=agreement,
        num_names=NUM_NAMES,
        known=share_kept(llms["storyteller"], known),
        invented=share_kept(llms["storyteller"], invented),
        overlap=overlap,
        calibration=calibration_text().count(SEPARATOR) + 1,
        samples=samples_of(llms["storyteller"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
