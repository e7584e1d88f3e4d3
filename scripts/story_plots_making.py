"""Plots about what becomes of things: shared, traded, grown, built, searched for.

The contract of a plot is in story_grammar.py.
"""

import story_words as words
from story_tale import Tale


def shared_food(tale: Tale) -> str:
    """Shares or refuses to share food, counting what is left; hunger comes back around."""
    foods = tale.pick(words.FOODS)
    count = tale.rng.randrange(2, len(words.NUMBERS))
    tale.bind(foods=foods, food=words.ONE_FOOD[foods])
    tale.bind(many=words.NUMBERS[count], fewer=words.NUMBERS[count - 1])
    tale.friend()
    tale.parent()
    tale.place()
    tale.say(
        "{when}, {p} gave {h} a basket with {many} {foods}. “[Share them with "
        "others|Do not eat them all at once],” said {p}.",
        "{one_time}, {h} had {many} {foods} in a bag. {h.he} went to {place} to eat them.",
        "{h} loved {foods}. {when}, {h.he} [had|packed] {many} {foods} for lunch.",
    )
    tale.new_paragraph()
    tale.say(
        "{place.at}, {h} met a {fi}. {f} looked [very hungry|tired and hungry]. “May I have one "
        "{food}, please?” asked {f}.",
        "Then a {fi} came along. “[Those|Your] {foods} smell so good. Can I have one?” {f.he} "
        "asked.",
    )
    if tale.chance(0.5):
        tale.say(
            "“[Of course|Yes]! I have {many},” said {h}, and gave {f.him} one. Now there were "
            "{fewer} {foods} left.",
            "{h} [smiled|nodded] and gave {f} one {food}. “Now I have {fewer}, and that is [still "
            "enough|plenty],” {h.he} said.",
        )
        tale.say(
            "They sat down {spot} and ate together. {f} told [funny stories|a long story|many "
            "jokes], and {h} laughed.",
            "{f} ate [every crumb|it slowly] and said, “Thank you, {h}. I will not forget this.”",
        )
        tale.new_paragraph()
        tale.say(
            "A few days later, {h} [fell into a hole|hurt {h.his} foot|got lost|got stuck in the "
            "mud] {place.at}. “Help!” {h.he} [called|cried]. Who came running? It was {f}!",
            "The next week, {h} had no lunch and [was very hungry|{h.his} tummy was empty]. Then "
            "{h.he} saw {f} with a big basket.",
        )
        tale.say(
            "“You shared your {foods} with me, so now I [help|will help] you,” said {f}.",
            "{f} remembered the {food} and was glad to help. “[Friends help each other|Now it is "
            "my turn],” {f.he} said.",
        )
        tale.say("{h} learned that [kindness comes back|a small gift can come back as a big one].")
        return ""
    tale.say(
        "“No! They are all mine,” said {h}. {h.he} [turned away|ran off] and ate all {many} "
        "{foods} alone {spot}.",
        "“I have only {many},” said {h}, and {h.he} ate them all, one after another.",
    )
    tale.say(
        "Soon {h.his} tummy [hurt|began to hurt]. “Ouch, too many {foods}!” {h.he} [cried|"
        "groaned].",
        "But the {foods} did not taste as good as before. {f} was gone, and {h} felt lonely.",
    )
    tale.new_paragraph()
    tale.say(
        "The next day, it was {f} who had [a big pie|a bag of nuts|warm bread]. {h} [looked at the "
        "ground|was ashamed]. “I am sorry that I did not share my {foods},” {h.he} said.",
    )
    tale.say(
        "{f} thought for a moment. “[That is all right|I forgive you],” {f.he} said, and [broke|"
        "cut] the food in two. “[Half for you and half for me|One part is for you].”",
    )
    tale.say(
        "Nothing had ever tasted so good. [From then on|After that], whenever {h} had {foods}, "
        "{h.he} gave [the first one|half of them] to {f}.",
        "“Tomorrow I will bring {foods} for you,” said {h}. And {h.he} did. {h.he} brought {many} "
        "{foods}, and {f} ate the biggest one.",
    )
    return ""


def trade_chain(tale: Tale) -> str:
    """Wants a gift for somebody, owns little, and trades from hand to hand until it fits."""
    tale.thing("t", words.TREASURES)
    tale.thing("u", words.CLOTHES)
    tale.thing("v", words.TOYS)
    tale.parent()
    tale.helper("w")
    tale.helper("x")
    tale.say(
        "It was almost the birthday of {p}. {h} wanted to give {p.him} a {v}, because {p.he} [had "
        "lost {p.his} own|had always wanted one|liked nothing better]. But {h} had [no money|very "
        "little].",
        "{p} was sad because {p.his} {v} was broken. {h} wanted to find a new one, but {h.he} had "
        "[no money at all|not a single coin].",
    )
    tale.say("All {h.he} had was a {t}. {h.he} took it and [walked|set out|went] to the market.")
    tale.new_paragraph()
    tale.say(
        "On the way, {h.he} met a {wi}. “What a [nice|lovely] {t_noun}! I [need|have always "
        "wanted] one,” said {w}. “Will you trade it for my {u}?”",
        "First {h.he} saw a {wi} who [had|carried] a {u}. “I would give my {u_noun} for your "
        "{t_noun},” said {w}.",
    )
    tale.say(
        "{h} [thought about it|nodded]. {h.he} gave the {t_noun} away and got the {u}.",
        "“[Yes, please|That is fair],” said {h}. Now {h.he} had a {u} and no {t_noun}.",
    )
    tale.say(
        "[A little further|Near the bridge|At the market], a {xi} was [shivering|looking sad|"
        "sitting alone]. “Oh, a {u}! That is just what I need,” said {x}. “I can give you my {v}.”",
        "Then {h.he} came to a {xi}. “Where did you get that {u}?” asked {x}. “I have a {v}, but I "
        "would rather have a {u_noun}.”",
    )
    tale.say(
        "{h} could not believe it. “A {v}! That is what I [need|am looking for]!” {h.he} [cried|"
        "said]. They traded, and {x} took the {u_noun} [with a smile|at once].",
    )
    tale.new_paragraph()
    tale.say(
        "{h} ran home and gave the {v} to {p}. “[Where did you get it|How did you pay for it]?” "
        "asked {p}. “I traded my {t_noun} for a {u_noun}, and the {u_noun} for a {v_noun},” said "
        "{h}.",
    )
    tale.say(
        "{p} [hugged {h.him}|laughed and cried]. “You gave away your {t}, just for me. That is the "
        "best gift of all,” {p.he} said.",
        "{p} [was so happy|had tears in {p.his} eyes]. {p.he} kept the {v_noun} [for many years|on "
        "the best shelf|next to {p.his} bed].",
    )
    return ""


def seed_grows(tale: Tale) -> str:
    """Plants a seed and must wait; what grows is shared with the one who gave it."""
    plant = tale.pick(words.PLANTS)
    tale.bind(plant=plant, fruit=words.PLANTS[plant])
    tale.helper()
    tale.friend()
    tale.bind(bed=tale.pick(("near the fence", "behind the house", "next to the gate",
                             "by the well", "in an old pot", "under the window")))  # fmt: skip
    tale.say(
        "{when}, a {wi} gave {h} a tiny seed. “[Give it water|Take care of it] and "
        "wait. Then you will see [something wonderful|a surprise],” said {w}.",
        "{one_time}, {h} helped a {wi} carry [wood|water|a heavy bag]. “Thank you. This is for "
        "you,” said {w}, and gave {h.him} a small seed.",
    )
    tale.say(
        "{h} [planted|put] the seed in the ground {bed} and gave it some water. Then {h.he} sat "
        "down and waited.",
    )
    tale.new_paragraph()
    tale.say(
        "The next day, there was nothing. The day after, there was still nothing. “[Why is it so "
        "slow|Is it asleep]?” [asked|sighed] {h}.",
        "{h} looked at the ground {bed} [every morning|ten times a day]. But nothing happened.",
    )
    if tale.chance(0.5):
        tale.say(
            "{h} wanted to dig the seed up. “Stop! If you dig it up, it will never grow,” said a "
            "{fi}. So {h} left the seed in the ground.",
            "“I will give up,” said {h}. But {h.his} friend {f} said, “[Wait a little longer|Good "
            "things take time].”",
        )
    else:
        tale.say(
            "A {fi} laughed at {h.him}. “[Nothing will ever grow there|It is only a stone],” "
            "said {f}. But {h} kept on giving it water.",
        )
    tale.say(
        "{h} [sang|talked] to the seed [each morning|every evening]. When it was hot, {h.he} gave "
        "it [more|cool] water. When it was cold, {h.he} covered it with [leaves|straw].",
        "Every day, {h} carried water to the spot {bed}, even when {h.he} was tired.",
    )
    tale.new_paragraph()
    tale.say(
        "Then one morning, a small green leaf [came out of the ground|was there]! “Look, {f}! "
        "Look!” [cried|shouted] {h}. It grew and grew until it was a big {plant}.",
        "At last, something green looked out of the earth. Week after week it grew, and it became "
        "a [tall|strong|beautiful] {plant}.",
    )
    tale.say(
        "[Soon|In the end|By summer] there were {fruit} [everywhere|all over it]. {h} gave some to "
        "{f} and took the [best|biggest] ones to {w}.",
        "{h} invited {f} and {w}. Together they [looked at|counted] the {fruit}, and {w} said, "
        "“You [knew how to wait|took good care of my seed].”",
    )
    tale.say("{h} kept one seed for next year and planted it {bed}.", "And {h} was very proud.")
    return ""


def building(tale: Tale) -> str:
    """Builds alone and fails; builds with a friend and it stands."""
    build, material, ruin = tale.pick(words.BUILDS)
    tale.bind(build=build, material=material, ruin=ruin)
    tale.friend()
    tale.place()
    tale.thing("t", words.TREASURES, words.CLOTHES)
    tale.say(
        "{when}, {h} wanted to build a {build}. “It will be the [biggest|best|most "
        "beautiful] {build} [in the world|of all]!” {h.he} said.",
        "{h} had a big plan. {h.he} wanted to build a {build} out of {material}.",
    )
    tale.say(
        "{h.his} friend {f} came by. “May I help you?” asked {f}. “No, I can do it [alone|by "
        "myself],” said {h}.",
        "A {fi} was watching. “Do you need help?” {f.he} asked. But {h} shook {h.his} head. “I "
        "want to do it alone,” {h.he} said.",
    )
    tale.new_paragraph()
    tale.say(
        "{h} worked [all morning|very hard|for a long time]. {h.he} [carried|brought] more and "
        "more {material}. But when the {build} was almost done, {ruin}.",
        "{h.he} took the {material} and [started|began] to work. It looked good at first. Then "
        "{ruin}!",
    )
    tale.say(
        "{h} [tried again|started over], but {ruin} again. {h.he} was [angry|tired|close to tears]"
        " and [kicked the {material}|sat down on the ground].",
        "“Oh no! All my work!” cried {h}. {h.he} [sat down and cried|wanted to give up].",
    )
    tale.new_paragraph()
    tale.say(
        "{f} [came back|sat down next to {h.him}]. “[Two can build better than one|I have an "
        "idea],” said {f}. “[I bring the {material} and you build|You bring the {material} and I "
        "build].”",
        "“I was wrong,” said {h} to {f}. “Will you help me with my {build}?” “[Of course|I would "
        "love to],” said {f}.",
    )
    tale.say(
        "So they worked side by side. {f} brought the {material}, and {h} [put everything in its "
        "place|made it strong]. This time, the {build} [stayed up|was strong|did not break].",
        "They built it together, [bit by bit|slowly and carefully]. [In the evening|At last], the "
        "{build} was done, and it [was strong|stood firm].",
    )
    tale.say(
        "On top of it they put a {t}, so that everyone could see that it was [theirs|the {build} "
        "of {h} and {f}].",
        "“It is not my {build}. It is our {build},” said {h}, and {f} [smiled|laughed|cheered].",
    )
    return ""


def treasure_map(tale: Tale) -> str:
    """Follows a map from clue to clue with a friend; the treasure is shared."""
    tale.place()
    tale.friend()
    tale.thing("t", words.TREASURES, words.CLOTHES)
    tale.bind(steps=tale.pick(words.NUMBERS), steps2=tale.pick(words.NUMBERS))
    tale.bind(hidden=tale.pick(("in an old book", "behind a picture", "in a bottle",
                                "under a loose board", "in a dusty drawer")))  # fmt: skip
    tale.say(
        "{when}, {h} found a map {hidden}. There was [a big cross|an X] on it. “A "
        "treasure!” {h.he} [whispered|cried].",
        "{hidden}, {h} found [a piece of paper|something strange]. It was a treasure map!",
    )
    tale.say(
        "{h} ran to {h.his} friend, a {fi}. “Look, {f}! The map [shows|begins at] {place},” said "
        "{h}. “[Let us go|Come with me]!”",
        "{h} showed it to {h.his} best friend {f}. “That is {place}! [Let us go|I know the way],” "
        "said {f}.",
    )
    tale.new_paragraph()
    tale.say(
        "{place.at}, the map said: “Take {steps} steps and look {spot}.” They took {steps} steps "
        "and looked {spot}. There was a small note.",
        "First they had to look {spot}. They [ran|walked] to {place} and looked there. They found "
        "a note.",
    )
    tale.say(
        "The note said: “Take {steps2} more steps and look {spot2}.” {f} [counted|walked slowly], "
        "and {h} [followed|held the map].",
        "“The treasure is {spot2},” {h} read. “[Quick|Hurry|Come on], {f}!”",
    )
    tale.maybe(
        0.5,
        "[Suddenly there was a noise|It was getting dark|A crow screamed]. {f} [was afraid|wanted "
        "to go home], but {h} took {f.his} hand. “We are [almost there|together],” {h.he} said.",
        "{h} [fell over a root|slipped in the mud] and lost the map. {f} [found|caught] it again.",
    )
    tale.new_paragraph()
    tale.say(
        "{spot2}, there was [an old box|a small chest|a clay pot]. They opened it. Inside was a "
        "{t}!",
        "They [dug|searched] {spot2} and found [a box|a bag|a chest]. What was in it? A {t}!",
    )
    if tale.chance(0.5):
        tale.say(
            "“You found the map, so it is yours,” said {f}. “No, we found it together,” said {h}. "
            "So {h} keeps the {t_noun} [one week|one day], and {f} keeps it the next.",
            "They [decided|agreed] to share it. On some days the {t} is at {h}'s house, and on "
            "some days it is at {f}'s house.",
        )
    else:
        tale.say(
            "Under the {t_noun} was a letter. “[Whoever finds this should hide something for the "
            "next one|Now hide it again for somebody else],” it said. So they [drew a new map|hid "
            "it again {spot3}].",
        )
    tale.say(
        "“The best part was [looking for it with you|the adventure],” said {f}, and {h} agreed.",
        "[That night|In the evening], {h} dreamed of [the old map|more treasures {place.at}].",
    )
    return ""


PLOTS_OF_MAKING = (
    shared_food,
    trade_chain,
    seed_grows,
    building,
    treasure_map,
)
