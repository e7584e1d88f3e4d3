"""Composes children's stories: `compose(seed)` is one story, the same for the same seed.

Owns the frame of a story: an opening that brings in the hero, one plot, a closing that refers back
to the opening. A plot is a function of a tale whose hero and weather are bound: it binds what else
it needs, tells the middle so that later sentences follow from earlier ones (who has what, where it
lies, what was promised), and returns what the hero keeps in the end ("" if nothing). All text comes
from the tables and templates beside this file; one name in five is invented on the spot.
"""

from random import Random

import story_words as words
from story_plots_belongings import PLOTS_OF_BELONGINGS
from story_plots_courage import PLOTS_OF_COURAGE
from story_plots_lessons import PLOTS_OF_LESSONS
from story_plots_making import PLOTS_OF_MAKING
from story_tale import Tale

PLOTS = PLOTS_OF_BELONGINGS + PLOTS_OF_MAKING + PLOTS_OF_COURAGE + PLOTS_OF_LESSONS


def compose(seed: int | str) -> str:
    """A story of about 100 to 450 words for this seed."""
    return tell(Random(f"story {seed}"))


def tell(rng: Random) -> str:
    """A story whose every choice comes from `rng`; one in eight tells two plots of its hero."""
    tale = Tale(rng)
    set_scene(tale)
    opening(tale)
    start = tale.text()
    plots = rng.sample(PLOTS, 2 if tale.chance(0.125) else 1)
    keepsake = plots[0](tale)
    for plot in plots[1:]:
        tale.new_paragraph()
        later = tale.phrase("[A few days|A week|Some weeks] later")
        tale.bind(when=later, one_time=later)
        keepsake = plot(tale)
    closing(tale, keepsake, start)
    return tale.text()


def set_scene(tale: Tale) -> None:
    """Binds the hero, what the hero is like, and the weather."""
    tale.hero()
    trait = tale.pick(words.TRAITS)
    to_do, did, doing = tale.pick(words.HOBBIES)
    weather = tale.pick(words.WEATHERS)
    tale.bind(trait=trait, trait_says=tale.pick(words.TRAITS[trait]))
    tale.bind(to_do=to_do, did=did, doing=doing)
    tale.bind(weather=weather, weather_says=tale.pick(words.WEATHERS[weather]))
    tale.bind(time=tale.pick(words.TIMES), little=tale.pick(words.SIZES))
    tale.bind(sound=tale.pick(words.SOUNDS))
    home = ("in a small house", "near the forest", "in a little village", "by the sea",
            "at the end of a long road", "in a warm home under a hill", "next to a mill",
            "in a tall house in the city", "on a farm", "by a blue lake", "in a green valley",
            "behind the school", "not far from the river")  # fmt: skip
    tale.bind(home=tale.pick(home))


def opening(tale: Tale) -> None:
    if tale.chance(0.2):
        tale.bind(
            when=tale.phrase("That [same |]{time}"), one_time=tale.phrase("Later that {time}")
        )
        tale.say(
            "It was a {weather} {time}, and {weather_says}. A {little} {hi} looked out of the "
            "window.",
            "One {weather} {time}, a {trait} {hi} [woke up early|could not sit still|got up with a "
            "smile].",
            "On a {weather} {time}, a [{little}|{trait}] {hi} [sat in front of the house|was ready "
            "for something new].",
        )
    else:
        tale.bind(when=tale.phrase("One {weather} {time}"), one_time=tale.phrase("One {time}"))
        tale.say(
            "Once upon a time, [there was|there lived] a [{little}|{trait}|{trait} {little}] {hi}.",
            "Once upon a time, in a [land far away|small village|big forest|quiet valley], there "
            "lived a [{little}|{trait}] {hi}.",
            "Once upon a time, a [{little}|{trait}] {hi} lived {home}.",
            "There [was once|once was|was] a [{little}|{trait}] {hi}.",
            "{h} was a [{trait}|{little}|{trait} {little}] {h.kind} who lived {home}.",
            "A [{little}|{trait}] {hi} lived {home}.",
            "Long ago, a {trait} {hi} lived {home}.",
            "Do you know {h}? {h} was a {little} {h.kind} who lived {home}.",
            "This is the story of {h}, a {trait} {h.kind} who lived {home}.",
            "Far, far away, {home}, there lived a {trait} {hi}.",
            "Many years ago, there was a {hi}, who was [very|rather|quite] {trait}.",
            "In a [small|big|quiet|noisy] [town|village|forest], there was a {hi}.",
        )
    tale.maybe(
        0.6,
        "{h} loved to {to_do}.",
        "{h.he} [loved|liked] to {to_do} [all day long|every day|more than anything].",
        "What {h} liked best was {doing}.",
        "{h} was {trait_says}, and {h.he} loved to {to_do}.",
        "Everyone [loved|liked] {h}, [and {h} loved {doing}|who was {trait_says}].",
        "{h.he} was {trait_says}.",
    )


def closing(tale: Tale, keepsake: str, start: str) -> None:
    """A last look back: to the keepsake, or to what the `start` of the story said of the hero."""
    endings = [
        "What a [day|story] for a [small |]{h.kind} named {h}!",
        "And that is [how|the way] {h} became a [happy|very happy] {h.kind}.",
        "[That night|In the evening], {h} [slept well|was tired but happy|went to bed with a "
        "smile].",
    ]
    if str(tale.slots["trait"]) in start:
        endings += [
            "So ends the story of {h}, the {trait} {h.kind}.",
            "And {h} is still a very {trait} {h.kind}.",
        ]
    if any(tale.phrase(slot) in start for slot in ("{to_do}", "{doing}")):
        endings = [
            "On the way home, {h} {did}.",
            "And that evening, {h} {did} [again|once more|until bedtime].",
            "That night, {h} was [tired|happy], and {h.he} dreamed of {doing}.",
            "And if you [pass by|look closely], you can [still |]see {h} {doing}.",
            "{h} was so happy that {h.he} {did} [all the way home|before bed|with a big smile].",
            "“What a day,” thought {h}, and {h.he} {did} [a little|once more].",
        ]
    if keepsake and tale.chance(0.6):
        tale.bind(keepsake=tale.phrase(keepsake))
        endings = [
            "That night, {h} put {keepsake} next to {h.his} bed and [fell asleep|slept well|smiled "
            "in the dark].",
            "Before {h.he} fell asleep, {h} looked at {keepsake} [once more|one last time] and "
            "[smiled|said good night to it].",
            "When it was time for bed, {keepsake} [lay next to {h}|was right beside {h}].",
        ]
    tale.maybe(0.7, *endings)
    tale.maybe(
        0.35,
        "And they all lived happily ever after.",
        "The end.",
        "And everyone was [happy|glad] again.",
        "It had been a very good day.",
        "And {h} never forgot that day.",
    )
