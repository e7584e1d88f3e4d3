"""Plots about what is learned: promises, skills, care, wishes, recipes, honesty.

The contract of a plot is in story_grammar.py.
"""

import story_words as words
from story_tale import Tale


def promise(tale: Tale) -> str:
    """Promises to do a task, is tempted away, and either keeps the promise or makes it good."""
    tale.parent()
    tale.place()
    tale.friend()
    task, trouble, repair = tale.pick((
        ("water the flowers", "the flowers were dry and hung their heads",
         "carried water to the flowers until the moon came up"),
        ("feed the hens", "the hens were hungry and loud", "gave the hens twice as much corn"),
        ("close the gate", "the goat was gone", "searched for the goat until it was found"),
        ("watch the soup", "the soup was black and the kitchen was full of smoke",
         "washed the pot and cooked a new soup"),
        ("bring in the laundry", "the rain had made all the laundry wet",
         "hung every shirt up again by the fire"),
        ("feed the dog", "the dog was hungry and very sad",
         "gave the dog a big bowl of food and a long walk"),
        ("pick up the eggs", "a fox had taken all the eggs",
         "built a strong door for the hen house"),
        ("shut the window", "the wind had blown everything off the table",
         "picked everything up and cleaned the whole room"),
        ("bring wood for the fire", "the house was cold and dark",
         "carried wood until the house was warm again"),
    ))  # fmt: skip
    tale.bind(task=task, trouble=trouble, repair=repair)
    tale.say(
        "{when}, {p} had to go to town. “Please {task} while I am away. Do you "
        "promise?” asked {p}. “I promise!” said {h}.",
        "“Can you {task} today?” {p} asked. “[Yes, I promise|I will, I promise],” said {h}.",
    )
    tale.new_paragraph()
    tale.say(
        "But then a {fi} came by. “Let us go to {place}!” said {f}. “[It is so much fun|Everybody "
        "is there].”",
        "Just then, {h.his} friend {f} called, “{h}! Come to {place} with me! [There is a fair|I "
        "found something {spot}]!”",
    )
    if tale.chance(0.4):
        tale.say(
            "{h} wanted to go very much. But {h.he} shook {h.his} head. “First I have to {task}. I "
            "promised it,” {h.he} said.",
            "“I cannot come yet,” said {h}. “I promised to {task}.”",
        )
        tale.say(
            "“Then I will help you,” said {f}. [Together they were done in no time|With two, it "
            "went twice as fast]. After that, they [ran|went] to {place}.",
            "{f} [was a little sad|sighed], but {f.he} waited. When the work was done, they ran to "
            "{place} together.",
        )
        tale.new_paragraph()
        tale.say(
            "When {p} came back and saw that everything was done, {p.he} [smiled|was proud]. “You "
            "kept your promise,” {p.he} said.",
        )
        tale.say(
            "“A promise is a promise,” said {h}, and {p} gave {h.him} and {f} [a big piece of cake|"
            "hot chocolate|a kiss each].",
        )
        return ""
    tale.say(
        "{h} [forgot all about the promise|thought, “I can do it later”], and off they went. They "
        "played {place.at} [all day|for hours].",
        "“[I will be back soon|It will not take long],” {h} thought, and ran to {place} with {f}. "
        "They had so much fun that {h.he} forgot the time.",
    )
    tale.say(
        "[When {h} came home|In the evening], {trouble}. {h.he} had forgotten to {task}!",
        "Suddenly, {h} stopped. “Oh no! I forgot to {task}!” {h.He} ran home, but it was too late: "
        "{trouble}.",
    )
    tale.new_paragraph()
    tale.say(
        "{p} was [not angry, but very sad|disappointed]. “[I trusted you|You gave me your "
        "promise],” {p.he} said. {h} [hung {h.his} head|felt terrible].",
    )
    tale.say(
        "“I am sorry. I will make it good,” said {h}. And {h.he} {repair}. Even {f} came to help.",
        "{h} did not just say sorry. {h.he} {repair}.",
    )
    tale.say(
        "The next time {p} asked {h} to {task}, {h.he} did it [at once|right away], and only then "
        "did {h.he} go to {place}.",
        "After that, when {h} [made|gave] a promise, {h.he} kept it.",
    )
    return ""


def learn_skill(tale: Tale) -> str:
    """Cannot do a thing that others can; a teacher and practice change it."""
    skill, doing, failure = tale.pick(words.SKILLS)
    tale.bind(skill=skill, doing=doing, failure=failure)
    tale.friend()
    tale.helper()
    tale.bind(days=tale.pick(words.NUMBERS))
    tale.say(
        "{h} wanted to learn to {skill}. {h.his} friend {f} could {skill} very well, but {h} could "
        "not.",
        "Everyone could {skill}. Only {h} could not. “I wish I could {skill} like {f},” {h.he} "
        "[said|sighed].",
    )
    tale.say(
        "{when}, {h.he} tried it. But {h.he} {failure}. {f} [laughed|giggled], and "
        "{h} [ran away|turned red].",
        "{h} tried to {skill}, but {h.he} {failure}. “I will never learn it,” {h.he} said.",
    )
    tale.new_paragraph()
    tale.say(
        "A {wi} had seen it all. “Do you know how often I {failure}?” asked {w}. “[A hundred times|"
        "More than I can count]. [Come, I will show you|Try it once more].”",
        "{h} told a {wi} about it. “{doing} is hard at first,” said {w}. “[I can teach you|Come to "
        "me every day].”",
    )
    tale.say(
        "So {h} [practiced|tried] every day. On the first day, {h.he} {failure}. On the second "
        "day, {h.he} {failure} again. But {h.he} did not give up.",
        "For {days} days, {w} and {h} worked together. Sometimes {h} {failure}, and then they both "
        "laughed and tried again.",
    )
    tale.say(
        "After {days} days, it [worked|happened]. {h} could {skill}! “I can do it! Look at me!” "
        "{h.he} shouted.",
        "And then, one {time}, {h} could {skill}, just like that. {w} clapped and "
        "[cheered|danced].",
    )
    tale.new_paragraph()
    if tale.chance(0.5):
        tale.say(
            "{f} [could not believe it|was surprised]. “I am sorry that I laughed,” {f.he} said. "
            "“[Let us do it together|You are as good as me].”",
            "The next day, {h} showed {f} what {h.he} could do. “Wow! You can {skill} now!” said "
            "{f}.",
        )
    else:
        tale.say(
            "Soon after, {h} met a {little} child who {failure} and cried. “Do you know how often "
            "I {failure}?” asked {h}. “Come, I will show you.”",
        )
    tale.say(
        "{h} [thanked|hugged] {w} and said, “[You never gave up on me|Without you, I would have "
        "stopped].”",
        "Now {doing} was [what {h} liked best|the easiest thing in the world].",
    )
    return ""


def sick_friend(tale: Tale) -> str:
    """A friend is ill; care and a present help, and later it is the other way round."""
    tale.friend()
    tale.thing("t", words.TOYS, words.CLOTHES)
    tale.bind(meal=tale.pick(words.MEALS), ill=tale.pick(("a cold", "a fever", "a bad cough",
                                                         "a sore "
                                                         "throat", "a broken leg")))  # fmt: skip
    tale.place()
    tale.say(
        "{h} and {f} met {place.at} every day. But one {time}, {f} did not come.",
        "Every {time}, {h} played with a {fi}. But one day, {f} was not there.",
    )
    tale.say(
        "{h} waited {spot}. Then {h.he} went to the house of {f}. {f} was in bed with {ill}.",
        "“Where is {f}?” {h} asked. “{f} is in bed. {f.he} has {ill},” said the mother of {f}.",
    )
    tale.new_paragraph()
    tale.say(
        "{h} [ran|went] home and [made|cooked] some {meal}. {h.he} also took {h.his} {t}, and "
        "brought both to {f}.",
        "“I will bring something,” said {h}. {h.he} came back with warm {meal} and {h.his} own "
        "{t}.",
    )
    tale.say(
        "“This {t} is for you until you are well again,” said {h}. {f} ate the {meal} and smiled "
        "[a little|for the first time].",
        "{f} ate all the {meal} and held the {t_noun} tight. “[You are so good to me|Now I feel "
        "better],” {f.he} said.",
    )
    tale.say(
        "{h} came every day and told {f.him} what was new {place.at}.",
        "Every day, {h} sat by the bed and [sang a song|read a story|told jokes].",
    )
    tale.new_paragraph()
    tale.say(
        "[After a week|Some days later|Soon], {f} was well again. {f.he} gave the {t} back to {h}, "
        "and they ran to {place}.",
    )
    tale.say(
        "But then {h} [got|had] {ill} too! [Guess who came|Who stood at the door]? It was {f}, "
        "with a big bowl of {meal}. “Now it is my turn,” {f.he} said.",
        "“When you are sick, I will cook {meal} for you,” said {f}. “But I hope you never have "
        "{ill},” {f.he} added, and they laughed.",
    )
    return "the {t}"


def wishes(tale: Tale) -> str:
    """A found thing grants wishes; a foolish one must be undone with the last."""
    tale.thing("t", words.TREASURES)
    tale.place()
    tale.parent()
    wish, result, undo = tale.pick((
        ("to be as tall as a tree", "could not get through the door anymore", "be small again"),
        ("to have a mountain of {foods}", "could not move, because there were {foods} everywhere",
         "have only one of the {foods}"),
        ("never to go to bed again", "was so tired that everything hurt", "sleep in my own bed"),
        ("to fly like a bird", "flew so high that the house was only a dot",
         "stand on the ground again"),
        ("that it was winter all year", "was cold, and all the flowers were gone",
         "see the flowers again"),
        ("to be all alone with every toy in the world", "had every toy, but nobody to play with",
         "have my family back"),
        ("that nobody could see {h.him}", "called and called, but nobody looked",
         "be seen again"),
        ("that everything {h.he} touched turned to gold",
         "could not eat, because the bread was gold", "eat bread again"),
    ))  # fmt: skip
    tale.bind(foods=tale.pick(words.FOODS))
    tale.bind(wish=tale.phrase(wish), result=tale.phrase(result), undo=tale.phrase(undo))
    tale.say(
        "{when}, {h} found a {t} {place.at}. It lay {spot}. {h.he} rubbed it [to make "
        "it clean|with {h.his} sleeve], and a voice said, “You have two wishes.”",
        "{spot}, {h} found a {t}. When {h.he} picked it up, it [began to shine|got warm]. “I give "
        "you two wishes,” said the {t_noun}.",
    )
    tale.say(
        "{h} did not think for long. {h.he} wished {wish}.",
        "“Two wishes! [I know what I want|How wonderful]!” said {h}. And {h.he} wished {wish}.",
    )
    tale.new_paragraph()
    tale.say(
        "[Puff!|Bang!|Whoosh!] The wish came true. At first it was [great fun|wonderful]. But "
        "[soon|then] {h} {result}.",
        "There was a [flash|puff of smoke], and it was so. {h} [laughed|danced]. But after a while "
        "{h.he} {result}.",
    )
    tale.say(
        "“[This is terrible|This is not what I wanted]!” cried {h}. {h.he} missed {p}.",
        "{h} began to cry. “If only {p.call} were here,” {h.he} said.",
    )
    tale.say(
        "Then {h.he} remembered the {t_noun}. There was one wish left. “I wish to {undo},” {h.he} "
        "said.",
        "But there was still one wish. {h} took the {t} and said, “Please, let me {undo}.”",
    )
    tale.new_paragraph()
    tale.say(
        "And so it was. {h} ran home and hugged {p}. “Where have you been?” asked {p}. “I have "
        "learned to be careful with wishes,” said {h}.",
        "Everything was as before. {h} ran into the arms of {p} and [told {p.him} everything|did "
        "not let go for a long time].",
    )
    tale.say(
        "{h.he} took the {t} back to {place} and put it {spot}, [just where it had been|for "
        "somebody wiser].",
        "The {t} never spoke again, but {h} kept it [on a shelf|in a drawer], to remember.",
    )
    return ""


def cooking(tale: Tale) -> str:
    """Cooks for somebody, mistakes one thing for another, and saves the day with a laugh."""
    tale.parent()
    tale.friend()
    dish = tale.pick(("a cake", "a pie", "pancakes", "a big soup", "cookies", "porridge"))
    wrong, right = tale.pick((
        ("salt", "sugar"), ("pepper", "flour"), ("soap", "milk"),
        ("sand", "sugar"), ("vinegar", "milk"), ("mustard", "honey"),
    ))  # fmt: skip
    bare = dish.removeprefix("a ").removeprefix("big ")
    tale.bind(dish=dish, bare=bare, wrong=wrong, right=right)
    it = "them" if bare in ("pancakes", "cookies") else "it"
    tale.bind(it=it, was="were" if it == "them" else "was", they="they" if it == "them" else "it")
    tale.say(
        "It was the birthday of {f}, a {f.kind} who lived next door. {h} wanted to make {dish} for "
        "{f.him}.",
        "{h}'s friend {f} was coming for dinner. “I will make {dish} [all by myself|for {f}],” "
        "{h.he} told {p}.",
    )
    tale.say(
        "“[Read|Look at] the labels first,” said {p}. But {h} was in a hurry. {h.he} thought that "
        "the {wrong} was {right} and took a lot of it.",
        "{p} said, “Do you need help?” “No, thank you,” said {h}. But {h.he} took the wrong jar. "
        "It was {wrong} and not {right}!",
    )
    tale.new_paragraph()
    tale.say(
        "The {bare} looked [good|perfect]. {f} came and took a big bite. [Then {f.he} made a very "
        "strange face|{f.his} eyes got very big]. “It is very special,” {f.he} said.",
        "When the {bare} {was} ready, {h} gave some to {f}. {f} ate a little and [coughed|turned "
        "green].",
    )
    tale.say(
        "{h} tried {it} too. “Yuck! That is {wrong}!” {h.he} cried. {h} was [so ashamed|close to "
        "tears].",
        "“Is it not good?” asked {h} and took a bite. “Oh no! I took {wrong} and not {right}!”",
    )
    tale.new_paragraph()
    tale.say(
        "But {f} began to laugh. {p} laughed too, and in the end even {h} laughed. “Let us make "
        "{dish} once more, all together,” said {p}.",
        "“[Never mind|That can happen to anyone],” said {f}. “Come, we can try again with real "
        "{right}.”",
    )
    tale.say(
        "This time, {h} [read every label|tried everything first]. {f} brought the {right}, and "
        "{p} held the spoon. The new {bare} {was} [delicious|the best ever].",
        "{h} put in the {right}, {f} stirred, and {p} watched the oven. It smelled wonderful, and "
        "nothing was left on the plates.",
    )
    tale.say(
        "Since then, {f} always asks, “Is there any {wrong} in it?” And {h} laughs.",
        "“Next time, I will ask for help,” said {h}, and {p} [smiled|gave {h.him} a kiss].",
    )
    return ""


def the_false_alarm(tale: Tale) -> str:
    """Cries for help for fun until nobody believes it, and must win back the trust."""
    tale.helper("w")
    tale.friend()
    tale.place()
    danger = tale.pick(("a wolf", "a snake", "a fire", "a giant", "a ghost", "a monster", "a bull"))
    tale.bind(danger=danger, bare=danger.split(" ", 1)[1])
    tale.say(
        "{h} was bored {place.at}. So {h.he} shouted, “Help! There is {danger} {spot}!” A {wi} and "
        "{f} came running.",
        "{when}, {h} wanted to play a trick. “Help! {danger}!” {h.he} shouted. "
        "{h.his} friend {f} and a {wi} ran to {place} to help.",
    )
    tale.say(
        "But there was no {bare}. {h} laughed and laughed. “I fooled you!” {h.he} said. {w} was "
        "[not amused|angry].",
        "“Where is the {bare}?” asked {w}. “[Nowhere|There is none]! It was a joke,” said {h}. {f} "
        "shook {f.his} head.",
    )
    tale.maybe(
        0.6,
        "The next day, {h.he} did it again. “Help! {danger}!” {f} and {w} came, and again there "
        "was nothing.",
        "{h} did it a second time, and a third time. Each time, {f} and {w} came for nothing.",
    )
    tale.new_paragraph()
    tale.say(
        "But then, one {time}, there really was {danger} {spot}! “Help! Please help me!” cried "
        "{h}. But nobody came. “It is only a joke again,” said {w}.",
        "Some days later, {h} went to {place} and saw {danger}, a real one. {h.he} shouted as loud "
        "as {h.he} could. But {w} did not even [turn around|look up].",
    )
    tale.say(
        "{h} [ran for {h.his} life|climbed up a tree|hid {spot2}] and was very afraid.",
        "{h} hid {spot3}, and {h.his} heart beat like a drum.",
    )
    tale.say(
        "Only {f} thought, “What if it is true this time?” {f.He} came, and together they got "
        "away.",
        "At last, {f} came to look. “It is true!” {f.he} cried, and [took|pulled] {h} away just in "
        "time.",
    )
    tale.new_paragraph()
    tale.say(
        "“Why did nobody believe me?” asked {h}. “Because you lied so often,” said {f}.",
        "“You told us about {danger} when there was none,” said {w} later. “How could we know?”",
    )
    tale.say(
        "{h} said sorry to {w} and to {f}. From then on, {h.he} only called for help when "
        "{h.he} needed it.",
        "{h} understood. It took a long time until {w} trusted {h.him} again, but {h} never lied "
        "about {danger} again.",
    )
    return ""


PLOTS_OF_LESSONS = (
    promise,
    learn_skill,
    sick_friend,
    wishes,
    cooking,
    the_false_alarm,
)
