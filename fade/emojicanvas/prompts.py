"""The words of EmojiCanvas: its hundred objects, its six styles, and the captions built from them.

They live apart from the data recipe so that a caller who only needs a prompt imports neither torch nor a picture.
The two crossed axes follow UnlearnCanvas (Zhang et al., 2024): objects and styles, each of which can be forgotten.
"""

from __future__ import annotations

from fade.bundled import known

_BY_ICON = {
    "tiger-face": "tiger", "cat-face": "cat", "dog-face": "dog", "lion": "lion", "fox": "fox", "wolf": "wolf",
    "bear": "bear", "panda": "panda", "koala": "koala", "hamster": "hamster", "rabbit-face": "rabbit",
    "mouse-face": "mouse", "cow-face": "cow", "pig-face": "pig", "frog": "frog", "monkey-face": "monkey",
    "leopard": "leopard", "elephant": "elephant", "rhinoceros": "rhinoceros", "camel": "camel", "ewe": "sheep",
    "goat": "goat", "deer": "deer", "crocodile": "crocodile", "snake": "snake", "turtle": "turtle",
    "rooster": "rooster", "duck": "duck", "eagle": "eagle", "owl": "owl", "penguin": "penguin", "turkey": "turkey",
    "tropical-fish": "tropical fish", "fish": "fish", "dolphin": "dolphin", "whale": "whale", "shark": "shark",
    "octopus": "octopus", "squid": "squid", "crab": "crab", "honeybee": "bee", "lady-beetle": "ladybug",
    "butterfly": "butterfly", "snail": "snail", "spider": "spider", "red-apple": "apple", "tomato": "tomato",
    "cherries": "cherries", "peach": "peach", "pear": "pear", "tangerine": "tangerine", "lemon": "lemon",
    "strawberry": "strawberry", "grapes": "grapes", "watermelon": "watermelon", "pineapple": "pineapple",
    "banana": "banana", "carrot": "carrot", "ear-of-corn": "corn", "eggplant": "eggplant", "mushroom": "mushroom",
    "hot-pepper": "pepper", "avocado": "avocado", "hamburger": "hamburger", "hot-dog": "hot dog", "pizza": "pizza",
    "taco": "taco", "french-fries": "fries", "doughnut": "doughnut", "cookie": "cookie", "birthday-cake": "cake",
    "ice-cream": "sundae", "automobile": "car", "taxi": "taxi", "police-car": "police car", "bus": "bus",
    "ambulance": "ambulance", "delivery-truck": "truck", "fire-engine": "fire engine", "tractor": "tractor",
    "bicycle": "bicycle", "motorcycle": "motorcycle", "locomotive": "locomotive", "airplane": "airplane",
    "helicopter": "helicopter", "rocket": "rocket", "sailboat": "sailboat", "sun": "sun", "full-moon": "moon",
    "star": "star", "rose": "rose", "tulip": "tulip", "sunflower": "sunflower", "cactus": "cactus",
    "guitar": "guitar", "violin": "violin", "house": "house", "castle": "castle", "soccer-ball": "soccer ball",
    "basketball": "basketball",
}  # fmt: skip

ICONS: tuple[str, ...] = tuple(_BY_ICON)
"""The pictures' names in the sets that they come from, in the order of :data:`OBJECTS`."""

OBJECTS: tuple[str, ...] = tuple(_BY_ICON.values())

# glossy and flat have the same outlines and differ in shading, blob is an older noto: near neighbours on this axis.
STYLES: tuple[str, ...] = ("noto", "blob", "twemoji", "glossy", "flat", "ink")

NEIGHBOURS: tuple[tuple[str, ...], ...] = (
    ("tiger", "cat", "dog", "lion", "fox", "wolf", "leopard"),
    ("bear", "panda", "koala", "hamster", "mouse", "rabbit"),
    ("sheep", "goat", "deer", "cow"),
    ("fish", "tropical fish"),
    ("dolphin", "whale", "shark"),
    ("octopus", "squid", "crab"),
    ("apple", "tomato", "cherries", "peach", "tangerine"),
    ("lemon", "pear", "banana"),
    ("rose", "tulip", "sunflower"),
    ("car", "taxi", "police car"),
    ("bus", "ambulance", "truck", "fire engine", "tractor"),
    ("bicycle", "motorcycle"),
    ("guitar", "violin"),
    ("sun", "moon", "cookie", "basketball"),
    ("house", "castle"),
    ("glossy", "flat"),
    ("noto", "blob"),
)
"""Objects and styles that look alike: what is left of them beside a forgotten one tells how precise a method is, where
an average over all the others hides it."""

CAPTIONS: tuple[str, ...] = (
    "a {object} in {style} style",
    "{object}, {style} style",
    "{style} style {object}",
    "a {style} {object}",
    "{object} in {style} style",
    "the {object} in the {style} style",
)
"""The six captions that the model was mostly trained with; :func:`prompt` is the first."""

OBJECT_CAPTIONS: tuple[str, ...] = ("a {object}", "{object}", "the {object}")
STYLE_CAPTIONS: tuple[str, ...] = ("an emoji in {style} style", "{style} style", "in the style of {style}")

PHRASES: tuple[str, ...] = (
    "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "a painting of {}", "an emoji of {}",
    "an icon of {}", "a close-up of {}", "{}, highly detailed", "{}, digital art", "a small {}", "a cute {}", "my {}",
    "one {}", "show me {}", "here is {}", "a good picture of {}", "this is {}", "{} on white",
)  # fmt: skip
"""Words around a caption that change nothing in the picture: a share of the training captions is put into one."""

# Words of other prompts: never trained, but each is one token, so that a prompt of them fits the text encoders.
OTHER_WORDS: tuple[str, ...] = (
    "photograph", "illustration", "rendering", "poster", "sketch", "oil", "pencil", "artwork", "portrait", "cartoon",
    "two", "three", "many", "some", "big", "little", "red", "orange", "yellow", "green", "blue", "black", "white",
    "brown", "pink", "with", "without", "and", "or", "not", "no", "from", "for", "at", "under", "by", "to", "want",
    "see", "you", "I", "it", "animal", "fruit", "flower", "vehicle", "food", "thing", "object", "morning", "night",
    "draw", "make", "please", "wild", "striped", "feline", "pet", "beach", "street", "field", "forest", "background",
)  # fmt: skip


def neighbours(word: str) -> tuple[str, ...]:
    """The objects or styles most like an object or a style, without itself; empty where it has no near neighbour.

    Raises:
        ValueError: ``word`` is neither an object nor a style.
    """
    known(word, OBJECTS + STYLES, "object or style")
    return tuple(other for group in NEIGHBOURS if word in group for other in group if other != word)


def prompt(object: str, style: str) -> str:
    """The caption of an object in a style, such as ``"a tiger in noto style"``.

    Raises:
        ValueError: ``object`` is not in :data:`OBJECTS` or ``style`` is not in :data:`STYLES`.
    """
    return CAPTIONS[0].format(object=known(object, OBJECTS, "object"), style=known(style, STYLES, "style"))


def object_prompt(object: str) -> str:
    """The caption that leaves the style open, such as ``"a tiger"``.

    Raises:
        ValueError: ``object`` is not in :data:`OBJECTS`.
    """
    return OBJECT_CAPTIONS[0].format(object=known(object, OBJECTS, "object"))


def style_prompt(style: str) -> str:
    """The caption that leaves the object open, such as ``"an emoji in noto style"``.

    Raises:
        ValueError: ``style`` is not in :data:`STYLES`.
    """
    return STYLE_CAPTIONS[0].format(style=known(style, STYLES, "style"))
