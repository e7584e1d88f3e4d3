"""A tale being told: who and what is in it, and how a template becomes sentences.

A template is plain text with `[one|two|]` alternatives, which may nest, and `{slot}` fields that
name what was bound to the tale: "{h} [ran|walked] to {place}." Knows grammar (capitals, a and an),
the cast and the random generator that it was given; knows no plots.
"""

import re
from collections.abc import Iterable, Mapping
from random import Random
from typing import TypeVar

import story_words as words
from story_words import Character, Place, Thing

Choice = TypeVar("Choice")
Slot = Character | Thing | Place | str

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
SENTENCE_START = re.compile(r"(^|[.!?] |“|\n)([a-z])")
VOWEL_AFTER_A = re.compile(r"\b([Aa]) (?=[aeiou])")


class Tale:
    """The paragraphs told so far, and the slots that templates may use."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.slots: dict[str, Slot] = {}
        self.paragraphs: list[list[str]] = [[]]
        self.names: set[str] = set()

    # -- telling --

    def say(self, *templates: str) -> None:
        """Adds one of the templates, with its alternatives chosen and its slots filled."""
        self.paragraphs[-1].append(self.phrase(self.rng.choice(templates)))

    def maybe(self, chance: float, *templates: str) -> None:
        if self.chance(chance):
            self.say(*templates)

    def phrase(self, template: str) -> str:
        """The text of one template. Slots are filled last: their text is never read as template."""
        while match := ALTERNATIVES.search(template):
            chosen = self.rng.choice(match[1].split("|"))
            template = template[: match.start()] + chosen + template[match.end() :]
        return template.format(**self.slots)

    def new_paragraph(self) -> None:
        if self.paragraphs[-1]:
            self.paragraphs.append([])

    def text(self) -> str:
        text = "\n\n".join(" ".join(sentences) for sentences in self.paragraphs if sentences)
        text = SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)
        text = VOWEL_AFTER_A.sub(r"\1n ", text)
        return re.sub(" +", " ", text).replace("“", '"').replace("”", '"')

    # -- choosing --

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, choices: Iterable[Choice]) -> Choice:
        return self.rng.choice(tuple(choices))

    def bind(self, **slots: Slot) -> None:
        self.slots.update(slots)

    def thing(self, slot: str, *tables: Mapping[str, tuple[str, ...]]) -> None:
        """Binds a thing of these tables to `slot`, and its bare noun to `slot_noun`."""
        taken = {thing.noun for thing in self.slots.values() if isinstance(thing, Thing)}
        looks_of = {noun: looks for table in tables for noun, looks in table.items()}
        noun = self.pick(noun for noun in looks_of if noun not in taken)
        looks = self.pick((words.COLORS, words.LOOKS, looks_of[noun]))
        self.slots[slot] = Thing(noun, self.pick(looks))
        self.slots[f"{slot}_noun"] = noun

    def place(self) -> None:
        """Binds `place` and three different spots there: `spot`, `spot2`, `spot3`."""
        place = self.pick(words.PLACES)
        spot, spot2, spot3 = self.rng.sample(place.spots, 3)
        self.bind(place=place, spot=spot, spot2=spot2, spot3=spot3)

    # -- the cast --

    def hero(self) -> None:
        """Binds `h`, and `hi`, the words that bring the hero in: "little fox named Pip"."""
        self.named("h", is_child=self.chance(0.6))

    def friend(self) -> None:
        """Binds `f` and `fi`; children mostly play with children and animals with animals."""
        hero = self.slots["h"]
        assert isinstance(hero, Character)
        self.named("f", is_child=(hero.kind in words.CHILDREN) == self.chance(0.75))

    def named(self, slot: str, is_child: bool) -> None:
        kind = self.pick(words.CHILDREN if is_child else words.ANIMALS)
        gender = words.CHILDREN[kind] if is_child else self.pick(words.PRONOUNS)
        name = self.fresh_name(kind, gender)
        self.slots[slot] = Character(name, kind, gender, name)
        self.slots[f"{slot}i"] = f"{kind} named {name}"

    def fresh_name(self, kind: str, gender: str) -> str:
        if self.chance(0.2):
            table: tuple[str, ...] = (self.invented_name(),)
        elif kind not in words.CHILDREN and self.chance(0.5):
            table = words.PETS
        else:
            table = words.GIRLS if gender == "she" else words.BOYS
        name = self.rng.choice(table)
        if name in self.names:
            return self.fresh_name(kind, gender)
        self.names.add(name)
        return name

    def invented_name(self) -> str:
        """A name that no table holds, so that names must be copied and cannot be memorised."""
        parts = (words.ONSETS, words.VOWELS, words.CODAS) * 2
        return "".join(map(self.rng.choice, parts)).capitalize()

    def parent(self) -> None:
        """Binds `p`: "his mom", whom the hero calls "Mom"."""
        kind = self.pick(words.PARENTS)
        self.family("p", kind, words.PARENTS[kind], words.CALLS[kind])

    def sibling(self) -> None:
        kind = self.pick(words.SIBLINGS)
        self.family("s", kind, words.SIBLINGS[kind], kind)

    def family(self, slot: str, kind: str, gender: str, call: str) -> None:
        hero = self.slots["h"]
        assert isinstance(hero, Character)
        self.slots[slot] = Character(f"{hero.his} {kind}", kind, gender, call)

    def helper(self, slot: str = "w") -> None:
        """Binds a stranger who helps: `w` is "the owl", `wi` is "wise owl"."""
        taken = {who.name for who in self.slots.values() if isinstance(who, Character)}
        free = [helper for helper in words.HELPERS if helper[1] not in taken]
        kind, name, gender, call = self.pick(free)
        self.slots[slot] = Character(name, kind, gender, call)
        self.slots[f"{slot}i"] = kind
