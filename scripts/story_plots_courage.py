"""Plots about courage and help: fears, races, rescues, lost ways, storms.

The contract of a plot is in story_grammar.py.
"""

import re

import story_words as words
from story_tale import Tale


def fear_overcome(tale: Tale) -> str:
    """Is afraid of something, until somebody else's need is greater than the fear."""
    fear = tale.pick(words.FEARS)
    where, advice = words.FEARS[fear]
    tale.bind(fear=fear, advice=advice, where=where, the_where=re.sub("^an? ", "the ", where))
    tale.friend()
    tale.parent()
    tale.say(
        "But {h} had a secret. {h.he} was afraid of {fear}.",
        "There was only one thing that {h} did not like: {h.he} was afraid of {fear}.",
        "{h} was afraid of {fear}. [Everybody knew it|Only {p} knew it|{h.he} told nobody].",
    )
    tale.maybe(
        0.6,
        "“[Do not worry|Listen]. {advice},” said {p}. But {h} was [still afraid|not so sure].",
        "{p} always said, “{advice}.”",
    )
    tale.new_paragraph()
    tale.say(
        "{when}, {h} and {h.his} friend {f} [were playing|went for a walk]. They came "
        "to {where}. “I will not go there,” said {h}. But {f} [ran ahead|was not afraid].",
        "{one_time}, {h} was out with a {fi}. They saw {where}. {h} [stopped|took a step back], "
        "but {f} [went on|laughed and ran on].",
    )
    tale.say(
        "[Then|Suddenly], {h} heard {f} cry, “Help! [My foot is stuck|I fell down|I cannot get "
        "back]!”",
        "A moment later there was a [loud cry|scream]. It was {f}! “Help me, {h}!” {f.he} "
        "[called|shouted].",
    )
    tale.say(
        "{h} looked around, but nobody else was there. {h.his} [knees|hands|legs] were shaking.",
        "{h} felt {h.his} heart beat fast. What should {h.he} do?",
    )
    tale.say(
        "Then {h.he} [remembered|thought of] the words of {p}: “{advice}.” {h} [took a deep breath|"
        "closed {h.his} eyes for a moment] and went to {f}.",
        "“{f} needs me,” {h.he} said to {h.himself}. “[I can do it|I am afraid, but I will go].” "
        "And step by step, {h.he} went.",
    )
    tale.new_paragraph()
    tale.say(
        "{h.he} [took the hand of {f}|held out {h.his} hand] and pulled {f.him} [out|to safety]. "
        "“You came! And you are so afraid of {fear}!” said {f}.",
        "{h} helped {f} up, and together they [got away|came back]. “Thank you, {h}. That was very "
        "brave,” said {f}.",
    )
    tale.say(
        "“I was afraid the whole time,” said {h}. “[Yes, that is what brave means|But you came],” "
        "{f} said.",
        "{h} looked back at {the_where} and [laughed|smiled]. It did not look so bad anymore.",
    )
    tale.say(
        "Since that day, {h} is [not so|only a little] afraid of {fear}.",
        "When {p} heard about it, {p.he} was very proud. “Now you know more about {fear} than I "
        "do,” {p.he} said.",
    )
    return ""


def race(tale: Tale) -> str:
    """Two run a race; pride or kindness decides it, and winning is not the point."""
    tale.friend()
    tale.place()
    tale.helper()
    prize = tale.pick(("golden cup", "big cake", "blue ribbon", "basket of pears", "silver bell",
                       "pot of honey", "paper crown", "wooden horse", "bag of nuts"))  # fmt: skip
    tale.bind(prize=f"the {prize}", a_prize=f"a {prize}")
    animal = tale.pick(words.SMALL_ANIMALS)
    tale.bind(animal=animal)
    tale.say(
        "{when}, there was a race {place.at}. The prize was {a_prize}. {h} wanted to "
        "win it, and so did a {fi}. A {wi} was the judge.",
        "“Let us have a race to {place}!” said {f}, a {f.kind} who lived next door. A {wi} "
        "promised {a_prize} to the winner.",
    )
    tale.say(
        "“I will win! You are much too slow,” [laughed|said] {f}.",
        "“Nobody is faster than I am,” said {f} and [laughed|stretched {f.his} legs].",
        "“Good luck, {h}!” said {f}. “Good luck, {f}!” said {h}.",
    )
    tale.new_paragraph()
    tale.say(
        "“One, two, three, go!” called {w}. They ran as fast as they could. At first, {f} was in "
        "front.",
        "{w} [clapped|rang a bell], and off they went. {f} was fast, but {h} was close behind.",
    )
    tale.say(
        "[Halfway|Near the end], they heard a small cry {spot}. A {animal} was [caught in a net|"
        "stuck under a branch|lying on its back].",
        "Then {h} saw a {animal} {spot}. It [was hurt|could not move|cried for help].",
    )
    if tale.chance(0.5):
        tale.say(
            "{f} ran on. But {h} stopped. “[Do not be afraid|I will help you],” {h.he} said and "
            "[carefully |]set the {animal} free.",
            "“I cannot run past,” thought {h}. So {h.he} stopped and helped the {animal}, while "
            "{f} ran on.",
        )
        tale.say(
            "When {h} came to the end, {f} was already there. {f} had won {prize}.",
            "Of course, {f} was the winner. {h} came in last, with the {animal} in {h.his} arms.",
        )
        tale.new_paragraph()
        tale.say(
            "But then {w} told everyone what {h} did for the {animal}. {f} [looked down|turned "
            "red]. “You are the real winner,” {f.he} said, and gave {prize} to {h}.",
            "“Why are you so late?” asked {f}. {h} showed {f.him} the {animal}. {f} was quiet for "
            "a while. Then {f.he} shared {prize} with {h}.",
        )
        tale.say(
            "The {animal} [became|was] their friend, and it came to see them [every day|often].",
            "Everybody cheered for {h} and for the little {animal}.",
        )
    else:
        tale.say(
            "Both of them stopped. “The race can wait,” said {h}. {f} nodded, and together they "
            "[helped|freed] the {animal}.",
            "“{f}, come back! It needs us both!” called {h}. {f} [turned around|came back], and "
            "they helped the {animal} together.",
        )
        tale.new_paragraph()
        tale.say(
            "Then they [walked|ran] to the end side by side. “Who is the winner?” asked {w}. “Both "
            "of us!” said {h} and {f}.",
            "They came to the end hand in hand, with the {animal} between them. {w} laughed and "
            "gave {prize} to both of them.",
        )
        tale.say(
            "They shared {prize}, and the {animal} got a part too.",
            "And {prize} was shared by three: {h}, {f} and the {animal}.",
        )
    return ""


def rescue(tale: Tale) -> str:
    """Hears a small animal in need, tries what fails, fetches what works, gains a friend."""
    tale.place()
    animal = tale.pick(words.SMALL_ANIMALS)
    tale.named("f", is_child=False)
    trap, first, tool, works = tale.pick((
        ("high up in a tree", "jumped as high as {h.he} could", "a ladder", "climbed up"),
        ("at the bottom of a deep hole", "reached down with {h.his} arm", "a long rope",
         "let it down into the hole"),
        ("on a rock in the water", "threw a stick", "a small boat", "rowed to the rock"),
        ("under a heavy branch", "pushed the branch", "a strong pole", "lifted the branch"),
        ("in a thorny bush", "pulled at the thorns", "a pair of gloves", "opened the bush"),
        ("inside an old barrel", "shook the barrel", "a hammer", "opened the lid"),
        ("on the roof of a shed", "called it down", "a tall ladder", "climbed to the roof"),
        ("behind a locked door", "kicked the door", "a key", "opened the door"),
    ))  # fmt: skip
    tale.bind(animal=animal, trap=trap, tool=tool, works=works)
    tale.bind(the_tool=re.sub("^a ", "the ", tool))
    tale.bind(first=tale.phrase(first))
    tale.helper()
    tale.bind(pet=str(tale.slots["f"]))
    tale.say(
        "{when}, {h} was {place.at}. “{sound}! {sound}!” Somebody was calling. {h} "
        "[looked around|listened].",
        "{h} was on the way to {place} when {h.he} heard a soft voice: “{sound}! {sound}!”",
    )
    tale.say(
        "It was a {animal}! It sat {trap} and could not get [out|away].",
        "There, {trap}, was a {animal}. It looked [so afraid|cold and tired].",
    )
    tale.new_paragraph()
    tale.say(
        "“[Wait|Do not be afraid], I will help you,” said {h}. First {h.he} {first}, but it did "
        "not work.",
        "{h} {first}, but [that was no good|it was no use]. The {animal} began to cry.",
    )
    tale.say(
        "“I need {tool},” {h} thought. {h.he} ran to a {wi} and asked, “May I [borrow|have] "
        "{tool}, please?”",
        "So {h} ran to get help. {h.he} found a {wi}, and {w} had {tool}. “Take it,” {w.he} said.",
    )
    tale.say(
        "{h} came back with {the_tool}, {works} and [took the {animal} out|saved the {animal}].",
        "With {the_tool}, it was easy. {h} {works}, and the {animal} was free!",
    )
    tale.new_paragraph()
    if tale.chance(0.6):
        tale.say(
            "The {animal} [licked|touched] {h.his} hand. It [followed|would not leave] {h} all the "
            "way home. “Can you stay with me? I will call you {pet},” said {h}.",
            "The {animal} had no home. So {h} took it along and [called|named] it {pet}.",
        )
        tale.say(
            "{h} made a bed for {pet} out of [a box and a blanket|straw|soft leaves]. And {pet} "
            "[was never alone again|slept there every night].",
            "{h} brought {the_tool} back to {w} and showed {w.him} {pet}. “[What a nice name|You "
            "two belong together],” said {w}.",
        )
    else:
        tale.say(
            "[Then|Just then] the mother of the {animal} came. “You saved my little one,” she "
            "said. “[Thank you, {h}!|How can I thank you, {h}?]”",
            "The {animal} [ran|went] home to its mother. But it [turned around|stopped] once more "
            "and said, “Thank you, {h}!”",
        )
        tale.say(
            "{h} gave {the_tool} back to {w} and went home with a [warm|light] heart.",
            "“You are welcome,” said {h}, and {h.he} took {the_tool} back to {w}.",
        )
    return ""


def lost_way(tale: Tale) -> str:
    """Goes too far from home, remembers advice, and comes home with somebody's help."""
    tale.parent()
    tale.place()
    tale.helper()
    tale.bind(color=tale.pick(("red", "blue", "green", "yellow", "white", "brown")))
    lure = tale.pick(("a butterfly", "a rabbit", "a bright light", "a fat toad",
                      "a yellow bird", "a dragonfly", "a balloon"))  # fmt: skip
    tale.bind(lure=lure, the_lure=re.sub("^a ", "the ", lure))
    tale.say(
        "The house of {h} had a {color} door. “Never go too far from home,” {p} always said. "
        "“And if you are lost, [stay where you are|ask somebody kind] and do not run.”",
        "“[Remember|Do not forget], our house has a {color} door,” said {p}. “If you ever get "
        "lost, tell somebody about it.”",
    )
    tale.new_paragraph()
    tale.say(
        "{when}, {h} saw {lure} and [followed it|ran after it]. On and on {h.he} "
        "went, until {h.he} came to {place}.",
        "{one_time}, {h} and {p} went to {place}. There was {lure}! {h} let go of {p.his} hand "
        "and followed it.",
    )
    tale.say(
        "Then {the_lure} was gone, and {h} did not know [where {h.he} was|the way home]. It was "
        "[getting dark|very quiet].",
        "When {h} turned around, everything looked [strange|different]. “Where am I?” {h.he} "
        "whispered.",
    )
    tale.say(
        "{h} wanted to [run|cry], but then {h.he} thought of what {p} had said. {h.he} sat down "
        "{spot} and waited.",
        "{h} [cried a little|was very afraid]. Then {h.he} remembered what {p} always said, and "
        "{h.he} stayed {spot}.",
    )
    tale.new_paragraph()
    tale.say(
        "After some time, a {wi} came along. “Are you lost, little one?” asked {w}. “Yes. I live "
        "in a house with a {color} door,” said {h}.",
        "A {wi} found {h.him} there. “Where do you live?” {w} asked. “My house has a {color} "
        "door,” {h.he} said.",
    )
    tale.say(
        "“A {color} door? I know that house!” said {w}. “[Come with me|Follow me].”",
        "“Oh, I have seen a {color} door [behind the mill|at the end of the road|on the hill],” "
        "said {w}, and took {h.him} there.",
    )
    tale.say(
        "And there it was, the {color} door! {p} ran out and [hugged {h}|took {h} in {p.his} "
        "arms].",
        "Soon they saw the {color} door. In front of it stood {p}. “{h}! There you are!” {p.he} "
        "cried.",
    )
    tale.say(
        "“I followed {lure}, and then I was lost,” said {h}. “But I remembered what you said.”",
        "“Thank you,” said {p} to {w}, and {p.he} gave {w.him} [some tea|a bowl of soup|a big "
        "pie]. {h} never followed {lure} again.",
    )
    return ""


def storm(tale: Tale) -> str:
    """A storm catches somebody out; a shelter is shared with one who was thought an enemy."""
    tale.place()
    tale.friend()
    tale.thing("t", words.CLOTHES)
    shelter = tale.pick(("a cave", "an old barn", "a hollow tree", "a small hut", "an empty shed",
                         "a tent", "an old mill"))  # fmt: skip
    tale.bind(shelter=shelter, bare=shelter.split(" ", 1)[1])
    tale.say(
        "{h} did not like {f}. {f} was a {f.kind} who was [loud and rude|always mean to {h.him}], "
        "and they never played together.",
        "{h} and {f} were not friends. They had [a fight|quarreled] about a {t} long ago.",
    )
    tale.new_paragraph()
    tale.say(
        "{one_time}, {h} was {place.at} when [dark clouds came|the sky turned black]. The wind "
        "[howled|roared], and it began to rain hard.",
        "{one_time}, {h} went to {place}. Suddenly there was a [big|terrible] storm. The rain "
        "fell, and the thunder rolled.",
    )
    tale.say(
        "{h} ran and found {shelter}. [It was dark inside|{h.he} went in]. But somebody was "
        "already there. It was {f}!",
        "Near {place} there was {shelter}. {h} ran inside, and there sat {f}, all wet.",
    )
    tale.say(
        "“[Go away|This is my place],” said {f}. But then there was [a flash|thunder], and {f} "
        "[jumped|began to shake].",
        "They did not speak. {h} sat on one side of the {bare}, and {f} sat on the other side.",
    )
    tale.new_paragraph()
    tale.say(
        "{h} saw that {f} was cold. {h.he} looked at {h.his} {t} and thought for a moment. “Here, "
        "take it,” {h.he} said and gave the {t_noun} to {f}.",
        "“Are you afraid?” asked {h}. “A little,” said {f}. So {h} sat down next to {f.him} and "
        "gave {f.him} a {t}.",
    )
    tale.say(
        "“Why are you so nice to me?” asked {f}. “Because [the storm is big and we are small|it is "
        "better to be two in a storm],” said {h}.",
        "“I am sorry that I was mean,” said {f}. “I am sorry too,” said {h}.",
    )
    tale.say(
        "They told each other stories until the rain stopped. Outside, there was a rainbow over "
        "{place}.",
        "When the storm was over, the sun came out. They left the {bare} together and jumped over "
        "the puddles.",
    )
    tale.say(
        "{f} gave the {t} back, but {f.he} kept something better: a friend.",
        "Today, {h} and {f} are the best of friends, and the {bare} is their secret place.",
    )
    return ""


PLOTS_OF_COURAGE = (
    fear_overcome,
    race,
    rescue,
    lost_way,
    storm,
)
