"""The storyteller's tokenizer: byte-level BPE trained on composed stories, and its files.

Any text round-trips, since the 256 bytes are tokens. `<s>` begins every text, `</s>` ends a story.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 2048
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1

# Co-writing: all messages are one continuing story. What an earlier turn rendered is a prefix of
# what the next turn renders; a message that brings no space of its own gets one before it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if not loop.first and message['content'][:1] not in [' ', '\\n'] %}{{ ' ' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}"
    "{% else %}{{ message['content'].rstrip() }}{% endif %}{% endfor %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of exactly VOCAB_SIZE tokens whose `encode` puts `<s>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
            ),
        ]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (BOS_ID, EOS_ID)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json (special tokens, chat template)."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(facts, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
