"""The words of the story grammar: names, animals, things, places, and what they allow.

Owns tables and the small frozen records that carry grammar (pronouns, articles, places with their
spots). Knows nothing of plots, sentences or randomness.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pronouns:
    he: str
    him: str
    his: str
    himself: str


PRONOUNS = {
    "he": Pronouns("he", "him", "his", "himself"),
    "she": Pronouns("she", "her", "her", "herself"),
}


@dataclass(frozen=True)
class Character:
    """Someone in a story. `str()` is how the text refers to them once they are known."""

    name: str  # "Mia", "the owl", "his mom"
    kind: str  # "girl", "rabbit", "owl"
    gender: str  # "he" or "she"
    call: str = ""  # how others address them: "Mia", "Mr. Owl", "Mom"

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return PRONOUNS[self.gender].he

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def him(self) -> str:
        return PRONOUNS[self.gender].him

    @property
    def his(self) -> str:
        return PRONOUNS[self.gender].his

    @property
    def himself(self) -> str:
        return PRONOUNS[self.gender].himself


@dataclass(frozen=True)
class Thing:
    """An object with the adjective that it keeps through the whole story: "red ball"."""

    noun: str
    look: str

    def __str__(self) -> str:
        return f"{self.look} {self.noun}"


@dataclass(frozen=True)
class Place:
    name: str  # "the park"
    at: str  # "in the park"
    spots: tuple[str, ...]  # where a thing may lie or somebody may hide there

    def __str__(self) -> str:
        return self.name


GIRLS = tuple(
    """Mia Lily Anna Emma Sara Lucy Ella Rosie Nora Zoe Ruby Molly Ivy Clara Amy Daisy Julia Kate
    Sophie Maya Lola Tina Nina Eva Grace Hannah Jane Alice Poppy Penny Holly Abby Bella Chloe Dora
    Elsa Fiona Gina Heidi Iris Jenny Kim Leah Mary Nelly Olivia Paula Rita Susie Tess""".split()
)
BOYS = tuple(
    """Tom Ben Max Sam Leo Jack Tim Finn Noah Adam Oscar Henry Luke Peter Billy Danny Eli Felix
    George Hugo Ian Jake Kevin Louis Mark Nick Oliver Paul Ray Simon Theo Victor Will Zack Alex
    Bob Charlie David Eddie Fred Gabe Harry Isaac Joe Kyle Liam Mike Ned Owen Ralph""".split()
)
PETS = tuple(
    """Pip Bobo Coco Nibbles Fluffy Rusty Spot Biscuit Pepper Hazel Honey Ginger Patches Whiskers
    Bramble Clover Dusty Fern Gus Hop Jojo Kiki Lulu Momo Nutmeg Otto Pippa Quill Scout Tilly
    Willow Ziggy Buttons Cookie Dot Ember Flick Moss Pebble Skip""".split()
)
# An invented name is two syllables of onset, vowel and coda.
ONSETS = tuple("b bl br d dr f gl h j k kl l m n qu r s st t th tr v w y".split())
VOWELS = tuple("a e i o".split())
CODAS = ("", "", "", "n", "r", "l", "m")

CHILDREN = {"girl": "she", "boy": "he"}
ANIMALS = tuple(
    """rabbit fox bear mouse cat dog squirrel frog duck hedgehog turtle bird pig lamb owl deer
    beaver monkey elephant penguin otter kitten puppy goat mole badger raccoon lion tiger panda
    donkey koala pony chick dragon dinosaur wolf giraffe elf fairy zebra hippo""".split()
)
SIZES = ("little", "small", "young", "tiny")

# trait -> what people said of somebody like that
TRAITS = {
    "kind": ("always ready to help", "nice to everyone"),
    "brave": ("not afraid of many things", "always the first to try"),
    "curious": ("always asking questions", "never tired of looking at new things"),
    "shy": ("always very quiet", "afraid to talk to others"),
    "funny": ("always telling jokes", "good at making others laugh"),
    "clever": ("always full of ideas", "good at solving problems"),
    "cheerful": ("always smiling", "happy from morning to night"),
    "careful": ("never in a hurry", "always very careful"),
    "lazy": ("always a little sleepy", "never in a hurry to work"),
    "proud": ("always sure to be the best", "never ready to ask for help"),
    "gentle": ("soft and gentle with everyone", "good to every small creature"),
    "stubborn": ("never ready to give up", "not good at listening"),
    "silly": ("always making funny faces", "full of silly ideas"),
    "helpful": ("always the first to help", "happy to help with any job"),
    "playful": ("always ready for a game", "never tired of playing"),
    "impatient": ("not good at waiting", "always in a hurry"),
}

# (to do it, did it, doing it)
HOBBIES = (
    ("sing", "sang", "singing"),
    ("dance", "danced", "dancing"),
    ("run", "ran", "running"),
    ("climb", "climbed", "climbing"),
    ("draw", "drew", "drawing"),
    ("paint pictures", "painted a picture", "painting pictures"),
    ("tell stories", "told a story", "telling stories"),
    ("count the clouds", "counted the clouds", "counting the clouds"),
    ("look at the stars", "looked at the stars", "looking at the stars"),
    ("jump in puddles", "jumped in the puddles", "jumping in puddles"),
    ("pick flowers", "picked flowers", "picking flowers"),
    ("collect stones", "collected stones", "collecting stones"),
    ("watch the birds", "watched the birds", "watching the birds"),
    ("play hide and seek", "played hide and seek", "playing hide and seek"),
    ("whistle", "whistled", "whistling"),
    ("explore", "explored", "exploring"),
    ("roll down hills", "rolled down the hill", "rolling down hills"),
    ("make up songs", "made up a song", "making up songs"),
    ("chase butterflies", "chased butterflies", "chasing butterflies"),
    ("hop on one foot", "hopped on one foot", "hopping on one foot"),
)

COLORS = "red blue green yellow purple orange pink white brown black silver golden".split()
LOOKS = "little old new shiny pretty special tiny bright".split()

# noun -> looks that only it (and its like) can have, besides colours and LOOKS
TOYS = {
    "ball": ("bouncy", "round"),
    "kite": ("paper", "long"),
    "boat": ("wooden", "paper"),
    "drum": ("loud", "round"),
    "doll": ("soft", "pretty"),
    "car": ("fast", "wooden"),
    "truck": ("big", "wooden"),
    "train": ("wooden", "long"),
    "robot": ("metal", "funny"),
    "teddy bear": ("soft", "fluffy"),
    "puzzle": ("wooden", "hard"),
    "book": ("big", "thick"),
    "whistle": ("loud", "metal"),
    "flute": ("wooden", "long"),
    "top": ("wooden", "round"),
    "puppet": ("funny", "soft"),
    "bell": ("loud", "metal"),
    "wagon": ("wooden", "big"),
    "yo-yo": ("round", "wooden"),
    "balloon": ("big", "round"),
}
CLOTHES = {
    "hat": ("warm", "straw"),
    "scarf": ("warm", "long"),
    "coat": ("warm", "thick"),
    "cap": ("soft", "round"),
    "ribbon": ("long", "soft"),
    "button": ("round", "big"),
    "mitten": ("warm", "soft"),
    "necklace": ("long", "beautiful"),
    "ring": ("beautiful", "round"),
    "umbrella": ("big", "striped"),
    "bag": ("big", "striped"),
    "blanket": ("warm", "soft"),
}
TREASURES = {
    "key": ("rusty", "heavy"),
    "coin": ("round", "heavy"),
    "shell": ("smooth", "round"),
    "stone": ("smooth", "round"),
    "feather": ("soft", "long"),
    "lamp": ("rusty", "dusty"),
    "box": ("wooden", "dusty"),
    "mirror": ("round", "dusty"),
    "watch": ("heavy", "round"),
    "crown": ("paper", "heavy"),
    "bottle": ("glass", "dusty"),
    "map": ("dusty", "paper"),
}
BREAKABLE = ("vase", "cup", "bowl", "plate", "lamp", "mirror", "jar", "teapot", "clock", "pot")

FOODS = tuple(
    """apples cookies berries carrots pancakes nuts cakes pears plums sandwiches cherries muffins
    oranges peaches buns grapes""".split()
)
ONE_FOOD = {
    "apples": "apple",
    "cookies": "cookie",
    "berries": "berry",
    "carrots": "carrot",
    "pancakes": "pancake",
    "nuts": "nut",
    "cakes": "cake",
    "pears": "pear",
    "plums": "plum",
    "sandwiches": "sandwich",
    "cherries": "cherry",
    "muffins": "muffin",
    "oranges": "orange",
    "peaches": "peach",
    "buns": "bun",
    "grapes": "grape",
}
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MEALS = ("soup", "bread", "pie", "porridge", "stew", "noodles", "rice", "toast", "pizza", "salad")
PLANTS = {
    "sunflower": "flowers",
    "pumpkin": "pumpkins",
    "tomato plant": "tomatoes",
    "apple tree": "apples",
    "bean plant": "beans",
    "rose bush": "roses",
    "strawberry plant": "strawberries",
    "lemon tree": "lemons",
    "cherry tree": "cherries",
    "carrot": "carrots",
}

PLACES = (
    Place("the park", "in the park",
          ("under a bench", "behind the big tree", "near the fountain", "next to the swings",
           "in the tall grass", "under the slide")),
    Place("the forest", "in the forest",
          ("under a bush", "behind an old oak", "inside a hollow log", "on a soft bed of moss",
           "near the stream", "between two rocks")),
    Place("the beach", "at the beach",
          ("in the warm sand", "behind a rock", "near the water", "under a boat",
           "next to a sand castle", "by a little pool")),
    Place("the garden", "in the garden",
          ("under the roses", "behind the shed", "next to the pond", "between the carrots",
           "under the apple tree", "near the gate")),
    Place("the farm", "on the farm",
          ("in the barn", "behind the tractor", "under the hay", "near the well",
           "next to the chicken house", "in the corn")),
    Place("the meadow", "in the meadow",
          ("in the tall grass", "under a daisy", "near the fence", "behind a small hill",
           "next to a gray stone", "by the path")),
    Place("the river", "by the river",
          ("on the bank", "under the bridge", "between the reeds", "behind a willow tree",
           "on a flat stone", "in the mud")),
    Place("the lake", "by the lake",
          ("under the dock", "in the reeds", "behind a canoe", "near the ducks",
           "on the shore", "next to a fallen tree")),
    Place("the market", "at the market",
          ("under a table", "behind a barrel", "next to the flower stand", "behind a basket",
           "near the bakery", "between two carts")),
    Place("the hill", "on the hill",
          ("behind a big rock", "in the heather", "under a pine tree", "near the old wall",
           "at the very top", "in a small hole")),
    Place("the playground", "at the playground",
          ("under the slide", "in the sandbox", "behind the swings", "near the seesaw",
           "next to the fence", "under a bench")),
    Place("the yard", "in the yard",
          ("behind the dog house", "under the porch", "next to the wood pile", "near the fence",
           "behind a flower pot", "under the old cart")),
    Place("the village", "in the village",
          ("near the well", "behind the school", "under the bridge", "next to the mill",
           "in front of the bakery", "by the old gate")),
    Place("the orchard", "in the orchard",
          ("under a plum tree", "behind a ladder", "behind a basket of pears",
           "near the stone wall", "next to the beehives", "in the wet leaves")),
)  # fmt: skip

# weather -> a sentence that may follow it
WEATHERS = {
    "sunny": ("the sun was shining", "the sky was blue"),
    "rainy": ("the rain tapped on the roof", "there were puddles everywhere"),
    "windy": ("the wind blew through the trees", "the leaves danced in the air"),
    "snowy": ("everything was white", "the snow was soft and deep"),
    "cloudy": ("gray clouds covered the sky", "the sun was hiding"),
    "foggy": ("the fog was thick", "it was hard to see far"),
    "warm": ("the air smelled of flowers", "the bees were busy"),
    "cold": ("there was ice on the pond", "the air was fresh"),
}
TIMES = ("day", "morning", "afternoon")

# (who they are at first, what they are called then, gender, how one speaks to them)
HELPERS = (
    ("old man", "the old man", "he", "sir"),
    ("old woman", "the old woman", "she", "ma'am"),
    ("farmer", "the farmer", "he", "Mr. Farmer"),
    ("baker", "the baker", "he", "Mr. Baker"),
    ("fisherman", "the fisherman", "he", "sir"),
    ("gardener", "the gardener", "she", "ma'am"),
    ("mailman", "the mailman", "he", "sir"),
    ("wise owl", "the owl", "she", "Mrs. Owl"),
    ("crow", "the crow", "he", "Mr. Crow"),
    ("slow snail", "the snail", "he", "Mr. Snail"),
    ("gray goose", "the goose", "she", "Mrs. Goose"),
    ("old turtle", "the turtle", "he", "Mr. Turtle"),
    ("busy bee", "the bee", "she", "Mrs. Bee"),
    ("big horse", "the horse", "he", "Mr. Horse"),
    ("small spider", "the spider", "she", "Mrs. Spider"),
    ("tiny ant", "the ant", "he", "Mr. Ant"),
    ("teacher", "the teacher", "she", "teacher"),
    ("police officer", "the officer", "she", "officer"),
)
SMALL_ANIMALS = (
    "kitten", "puppy", "baby bird", "duckling", "bunny", "hedgehog", "baby squirrel", "little owl",
    "lamb", "mouse", "frog", "piglet", "chick", "baby turtle", "foal", "baby rabbit",
)  # fmt: skip
PARENTS = {"mom": "she", "dad": "he", "grandma": "she", "grandpa": "he", "aunt": "she"}
CALLS = {"mom": "Mom", "dad": "Dad", "grandma": "Grandma", "grandpa": "Grandpa", "aunt": "Auntie"}
SIBLINGS = {"sister": "she", "brother": "he", "cousin": "she"}

# fear -> (where it is met, what others say about it)
FEARS = {
    "the dark": ("a dark cave", "the dark is only the day with its eyes closed"),
    "deep water": ("a deep pond", "the water will carry you if you stay calm"),
    "high places": ("a tall tree", "just look at your hands and not at the ground"),
    "tunnels": ("a long tunnel", "a tunnel always has an end"),
    "big dogs": ("a yard with a big dog", "most dogs only want to be friends"),
    "spiders": ("a cave full of webs", "spiders are more afraid of you"),
    "strange noises": ("an empty house", "a noise is only a noise"),
    "bridges": ("a long bridge", "one step and then one more is all you need"),
}
# (to do it, could do it, doing it, what goes wrong)
SKILLS = (
    ("ride a bike", "riding a bike", "fell off the bike"),
    ("swim", "swimming", "swallowed a lot of water"),
    ("fly a kite", "flying a kite", "got the string in a knot"),
    ("play the flute", "playing the flute", "made only a terrible squeak"),
    ("bake bread", "baking bread", "burned the bread"),
    ("skate", "skating", "slipped and landed on the ice"),
    ("read", "reading", "mixed up all the letters"),
    ("juggle", "juggling", "dropped everything on the floor"),
    ("tie a bow", "tying a bow", "made a big knot"),
    ("catch a fish", "catching a fish", "caught only an old boot"),
    ("climb a rope", "climbing a rope", "slid all the way down"),
    ("stand on one leg", "standing on one leg", "fell over"),
    ("jump rope", "jumping rope", "tripped over the rope"),
    ("paint", "painting", "spilled the paint on the floor"),
)
# (what is built, what it is made of, what destroys it)
BUILDS = (
    ("sand castle", "sand", "a big wave washed it away"),
    ("tower", "blocks", "it shook and fell down with a crash"),
    ("snowman", "snow", "its head rolled off"),
    ("tree house", "boards", "the floor broke in two"),
    ("raft", "logs", "it turned over and sank"),
    ("bridge", "sticks", "it broke in the middle"),
    ("nest", "twigs", "the wind blew it apart"),
    ("fort", "pillows", "the roof came down"),
    ("dam", "stones", "the water pushed it over"),
    ("bird house", "wood", "one wall fell off"),
)
SOUNDS = ("Squeak", "Help", "Meep", "Oh no", "Ouch", "Eek", "Peep")
