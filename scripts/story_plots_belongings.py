"""Plots about what somebody has: lost, found, broken, envied, kept from others.

The contract of a plot is in story_grammar.py.
"""

import story_words as words
from story_tale import Tale


def lost_thing(tale: Tale) -> str:
    """Loses a beloved thing, looks in the wrong places, and finds it through somebody's help."""
    tale.thing("t", words.TOYS, words.CLOTHES)
    tale.place()
    tale.helper()
    tale.say(
        "{h} had a {t}. It was a [present|gift] from {h.his} [grandma|grandpa|aunt|uncle], and "
        "{h.he} [took it everywhere|loved it very much|never went anywhere without it].",
        "Of all [{h.his} things|the things {h.he} had], {h} loved {h.his} {t} the most.",
        "{h.his} favorite thing was a {t}. {h} [carried it everywhere|kept it close all the time].",
    )
    tale.new_paragraph()
    tale.say(
        "{when}, {h} took the {t_noun} to {place}. [The day began so well|They went everywhere "
        "together|It was a good day for a walk].",
        "{when}, {h} went to {place} with the {t}.",
        "{when}, {h} [walked|ran|went] to {place}, and of course the {t_noun} came too.",
    )
    tale.say(
        "{h} [played|ran around|jumped and laughed] until [{h.he} was tired|the sun was low]. "
        "[But then|Suddenly] {h.he} [saw|noticed] that the {t_noun} was [gone|not there anymore].",
        "{h.he} had so much fun that {h.he} forgot about the {t_noun}. When {h.he} wanted to go "
        "home, the {t_noun} was gone.",
    )
    tale.say(
        "“Oh no! Where is my {t}?” [cried|asked|shouted] {h}.",
        "“My {t_noun}! I [lost|cannot find] my {t_noun}!” {h.he} [cried|said].",
        "{h} felt [very|so] sad. A big tear rolled down {h.his} [cheek|nose].",
    )
    tale.say(
        "{h.he} looked {spot}, but the {t_noun} was not there. {h.he} looked {spot2}, but it was "
        "not there [either|at all].",
        "First {h.he} [looked|searched] {spot}. Then {h.he} [looked|searched] {spot2}. [Nothing!|"
        "There was no {t_noun}.|But {h.he} found nothing.]",
    )
    tale.new_paragraph()
    tale.say(
        "Just then, a {wi} came by. “Why are you [so sad|crying], {h}?” asked {w}. “I lost my "
        "{t},” said {h}.",
        "A {wi} [saw|heard] {h} and [stopped|came closer]. “What is wrong?” {w.he} asked. “My "
        "{t} is gone,” said {h}.",
    )
    if tale.chance(0.7):
        tale.say(
            "“I saw a {t_noun} {spot3},” said {w}. “[Come with me|Let us look together|Go and "
            "see]!”",
            "“[Hmm|Let me think]. There is something {spot3}. It could be a {t_noun},” said {w}.",
        )
        tale.say(
            "{h} ran to look, and there was the {t}, right {spot3}! “[Thank you|Oh, thank you], "
            "{w.call}!” said {h}.",
            "They went there together. [And what did they see?|And look!] The {t_noun} was {spot3}!"
            " {h} hugged the {t_noun} and then {h.he} hugged {w}.",
        )
    else:
        tale.say(
            "{w} [smiled|laughed]. “I [found|picked up] this {spot3}. Is it yours?” {w.he} asked, "
            "and held up the {t}.",
        )
        tale.say(
            "“Yes! [Thank you|Thank you so much], {w.call}!” {h} [shouted|said] and [jumped for "
            "joy|danced with joy].",
        )
    tale.say(
        "[After that|From that day on], {h} always [took good care of|held on tight to|kept "
        "an eye on] the {t_noun}.",
        "{h} [carried|took] the {t_noun} home and [promised|said] to be more careful next time.",
    )
    return "the {t}"


def found_thing(tale: Tale) -> str:
    """Finds a thing that is not one's own; keeping it feels bad, giving it back brings a friend."""
    tale.thing("t", words.TOYS, words.CLOTHES, words.TREASURES)
    tale.place()
    tale.friend()
    tale.say(
        "{when}, {h} [was walking|was playing] {place.at}. {spot}, {h.he} "
        "[found|saw] something [wonderful|strange|new]. It was a {t}!",
        "{one_time}, {h} went to {place}. “What is that?” {h.he} [asked|said]. There was a {t} "
        "{spot}.",
    )
    tale.say(
        "“[Now it is mine|I will keep it|How lucky I am]!” said {h}, and took the {t_noun} "
        "[home|along].",
        "{h} looked around. Nobody was there, so {h.he} took the {t_noun} [home|along].",
    )
    tale.new_paragraph()
    tale.say(
        "[A little later|The next day|On the way home], {h} [met|saw] a {fi}. {f} was "
        "[crying|looking for something|very sad]. “[What is the matter|What happened]?” asked {h}.",
    )
    tale.say(
        "“I lost my {t},” said {f}. “[My mom gave it to me|My dad made it for me|It was a "
        "present|I have looked everywhere|It is the only one I have].”",
        "“My {t} is gone,” {f} said. “I think I left it {place.at}.”",
    )
    if tale.chance(0.5):
        tale.say(
            "{h} [wanted to keep the {t_noun}|did not want to give it back]. “I [have not seen "
            "it|do not know where it is],” {h.he} said. But {h.his} [face turned red|tummy felt "
            "funny|heart felt heavy].",
        )
        tale.say(
            "That night, {h} could not sleep. {h.he} looked at the {t_noun} and thought of {f}. "
            "[In the morning|When the sun came up], {h.he} ran to {f}. “I am sorry. I found your "
            "{t_noun} {spot}, and I did not tell you,” {h.he} said.",
            "{h.he} could not [play|eat] anymore. All {h.he} could think about was {f}. So {h.he} "
            "went back and said, “I was not honest. Here is your {t_noun}.”",
        )
        tale.say(
            "{f} was [surprised|quiet for a moment], but then {f.he} smiled. “Thank you for "
            "telling [me|the truth],” {f.he} said.",
        )
    else:
        tale.say(
            "{h} [wanted to keep the {t_noun}|liked the {t_noun} very much], but {h.he} knew what "
            "was right. “I found it {spot}. Here you are,” {h.he} said and gave the {t_noun} to "
            "{f}.",
            "“Is this it?” asked {h} and held up the {t_noun}. “Yes! You found it!” [cried|"
            "shouted] {f}.",
        )
        tale.say(
            "{f} [was so happy|jumped up and down|hugged {h}]. “[You are very kind|You are a good "
            "friend|Thank you], {h}!” {f.he} said.",
        )
    tale.say(
        "From then on, {h} and {f} played with the {t_noun} together [every day|all summer|after "
        "school].",
        "“[Can we play with it together|Do you want to play with me]?” asked {f}. And so the "
        "{t} [gave|brought] {h} [a new friend|something better: a friend].",
    )
    return ""


def broken_thing(tale: Tale) -> str:
    """Breaks something at home and lies or owns up; the truth mends more than the thing."""
    noun = tale.pick(words.BREAKABLE)
    look = tale.pick([*words.COLORS, "old", "pretty", "big", "beautiful"])
    tale.bind(t=words.Thing(noun, look), t_noun=noun)
    tale.parent()
    tale.sibling()
    tale.bind(blamed=tale.pick(("the cat", "the dog", "the puppy", "{s}")))
    tale.bind(blamed=tale.phrase(str(tale.slots["blamed"])))
    tale.say(
        "{p} had a {t}. [“Please be careful with it,” {p.he} always said.|It stood on [a shelf|"
        "the table|a chest].|{p.he} loved it very much.]",
        "There was a {t} in the house, and {p} loved it. [“Do not play near it,” {p.he} said.|]",
    )
    tale.new_paragraph()
    tale.say(
        "{when}, {h} was [running|jumping|playing with a ball|dancing] in the house. "
        "[Crash!|Bang!|Oh no!] The {t_noun} [fell|fell down|was hit] and broke [into many pieces|"
        "in two].",
    )
    tale.say(
        "{h} [was scared|felt cold|stood very still]. “{p.call} will be [so angry|so sad|mad at "
        "me],” {h.he} [thought|whispered].",
    )
    if tale.chance(0.65):
        tale.say(
            "So {h.he} hid the pieces [under the bed|behind the sofa|in a drawer|under the rug].",
            "{h.he} quickly put the pieces [in a bag|in a box|under a blanket].",
        )
        tale.new_paragraph()
        tale.say(
            "[Soon|In the evening|Later], {p} came [home|into the room]. “Where is my {t_noun}?” "
            "{p.he} asked. “[It was {blamed}|I think {blamed} broke it]!” said {h}.",
        )
        tale.say(
            "{p} [was angry with {blamed}|did not say anything|looked at {blamed} and sighed]. "
            "{h} [felt worse and worse|looked at the floor|could not eat {h.his} dinner].",
            "But it was a lie, and the lie [felt like a stone in {h.his} tummy|made {h} feel very "
            "bad].",
        )
        tale.say(
            "[At bedtime|At last|After a while], {h} [began to cry|went to {p}]. “It was not "
            "{blamed}. It was me. I broke the {t_noun} and I told a lie. I am sorry,” {h.he} said.",
        )
        tale.say(
            "{p} [hugged {h.him}|took {h.his} hand]. “I am [sad about|not happy about] the "
            "{t_noun}, but I am glad that you told [me |]the truth,” {p.he} said.",
        )
        tale.maybe(0.5, "Then {h} said sorry to {blamed} too.")
    else:
        tale.say(
            "{h.he} [could hide the pieces|could run away], but {h.he} did not. {h.he} [took a "
            "deep breath and |]went to {p}. “I broke your {t_noun}. I am so sorry,” {h.he} said.",
        )
        tale.say(
            "{p} looked at the pieces and [was quiet|sighed]. Then {p.he} smiled. “Thank you for "
            "telling me at once. That was brave,” {p.he} said.",
        )
    tale.say(
        "Together they [glued|put] the {t_noun} [back together|together again]. It had [a few "
        "lines|a crack], but [{p} loved it even more|it was still beautiful].",
        "The next day, {h} made a new {t_noun} out of clay. It was a little crooked, but {p} "
        "[said it was the best {t_noun} in the world|loved it].",
    )
    tale.say(
        "{h} [learned|knew now] that [the truth is better than a lie|a broken {t_noun} can be "
        "fixed, but a lie only gets bigger|telling the truth makes the heart light].",
    )
    return ""


def jealousy(tale: Tale) -> str:
    """A friend's thing is wanted and taken; it brings no joy until it is given back."""
    tale.thing("t", words.TOYS)
    tale.friend()
    tale.place()
    tale.say(
        "{h} and {f} were [best friends|good friends|neighbors]. {when}, {f} came to "
        "{place} with a [brand new|wonderful] toy. It was a {t}!",
        "{one_time}, {h} met {h.his} friend {f} {place.at}. {f} had a {t}, and everybody wanted to "
        "see it.",
    )
    tale.say(
        "{h} [wanted the {t_noun} so much|had no {t_noun}]. “Why does {f} have one and not me?” "
        "{h.he} [thought|asked {h.himself}].",
        "“May I play with it?” asked {h}. “[Later|Not now],” said {f}. {h} [felt jealous|got "
        "angry].",
    )
    tale.new_paragraph()
    tale.say(
        "When {f} was not looking, {h} took the {t_noun} and hid it {spot}.",
        "{f} put the {t_noun} down to get some water. Quickly, {h} grabbed it and hid {spot}.",
    )
    tale.say(
        "{f} looked for the {t_noun} [everywhere|{spot2}|{spot3}]. “Have you seen my {t}, {h}?” "
        "{f.he} asked with tears in {f.his} eyes.",
        "When {f} came back, the {t_noun} was gone. {f} [began to cry|cried and cried].",
    )
    tale.say(
        "{h} [had the {t_noun} now|could play with the {t_noun} now], but it was no fun at all. It "
        "is no fun to play [alone|with a stolen {t_noun}].",
        "{h} [saw the tears|heard {f} cry], and [all the joy was gone|{h.his} heart hurt].",
    )
    tale.new_paragraph()
    tale.say(
        "{h} went to get the {t_noun} and gave it back. “I took it because I was jealous. [I am so "
        "sorry|Please forgive me],” {h.he} said.",
        "“Here is your {t_noun}. I hid it {spot}. I wanted one too, but that was wrong,” said {h}.",
    )
    tale.say(
        "{f} [was angry at first|wiped {f.his} tears], but then {f.he} said, “[Next time, just ask "
        "me again|A friend is more important than a {t_noun}].”",
        "“[You should have waited|That was not nice],” said {f}. “But you told me the truth. "
        "[Let us take turns|Come, we can play together].”",
    )
    tale.say(
        "And so they took turns with the {t} until [the sun went down|it was time to go home].",
        "That afternoon, the {t_noun} was twice as much fun, because they played with it together.",
    )
    return ""


def selfish_toy(tale: Tale) -> str:
    """Will not share a thing, is left alone with it, and learns why things need friends."""
    tale.thing("t", words.TOYS)
    tale.friend()
    tale.sibling()
    tale.place()
    tale.say(
        "For {h.his} birthday, {h} got a {t}. “It is mine, and nobody else may touch it,” {h.he} "
        "said.",
        "{h} had a {t} and did not like to share it. “[Go away|Do not touch it]!” {h.he} said to "
        "everyone.",
    )
    tale.say(
        "{s} asked, “Can I play with it?” “No!” said {h}. {f} asked, “Can I play with it?” “No!” "
        "said {h} again.",
        "{f} came to play. “What a great {t_noun}! Can we play with it together?” {f.he} asked. "
        "But {h} said no.",
    )
    tale.new_paragraph()
    tale.say(
        "So {f} and {s} went to {place} [without {h}|and played there]. {h} stayed [alone|behind] "
        "with the {t_noun}.",
        "[Soon|After a while] nobody asked anymore. {f} went to {place} to play with {s}, and {h} "
        "was alone.",
    )
    tale.say(
        "At first, {h} was happy. But after a while the {t_noun} was boring. From far away, "
        "{h.he} heard {f} and {s} laugh.",
        "{h} played with the {t_noun} for an hour. [It was so quiet|Nobody laughed, nobody "
        "clapped]. “Why am I not happy?” {h.he} asked.",
    )
    tale.new_paragraph()
    tale.say(
        "{h} took the {t_noun} and [ran|went] to {place}. “I am sorry. [You can have the first "
        "turn|Please play with me],” {h.he} said and gave the {t_noun} to {f}.",
    )
    tale.say(
        "{f} [smiled|was surprised]. “Thank you, {h}!” {f.he} said. They all played with the {t} "
        "[until dinner|all day|until the stars came out].",
        "First {f} played with it, then {s}, and then {h}. [Everybody laughed|It was the best day "
        "of the week].",
    )
    tale.say(
        "{h} found out that a {t_noun} is [only half as much fun|not much fun] without friends.",
        "Now, when {h} gets something new, {h.he} always asks {f} and {s} to come and play.",
    )
    return "the {t}"


PLOTS_OF_BELONGINGS = (
    lost_thing,
    found_thing,
    broken_thing,
    jealousy,
    selfish_toy,
)
