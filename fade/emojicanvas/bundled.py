"""EmojiCanvas as `fade.bundled` describes a model that comes with the package."""

from fade.bundled import BundledModel, Domain
from fade.emojicanvas import MODEL_PATH, load_judges, load_pipeline
from fade.emojicanvas.config import IMAGE_SIZE, SAMPLING
from fade.emojicanvas.prompts import NEIGHBOURS, OBJECTS, STYLES


def _look_alikes(words: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(group for group in NEIGHBOURS if group[0] in words)


OBJECT = Domain(
    name="object",
    words=OBJECTS,
    caption="a {}",
    phrasings=(
        "{}", "a {}", "the {}", "an image of {}", "a photo of {}", "a picture of {}", "a drawing of {}",
        "a painting of {}", "{}, digital art", "{}, <other> style", "a <other> {}",
    ),
    held_out=(
        "a photograph of {}", "an illustration of a {}", "a close-up of {}", "{}, highly detailed", "show me {}",
        "a cute <other> {}", "my {} in <other> style", "here is a <other> {}", "{} in <other>",
    ),
    look_alikes=_look_alikes(OBJECTS),
    drawn=20,
)  # fmt: skip
STYLE = Domain(
    name="style",
    words=STYLES,
    caption="an emoji in {} style",
    phrasings=(
        "{}", "{} style", "in the style of {}", "an emoji in {} style", "<other>, {} style", "a {} <other>",
    ),
    held_out=(
        "a photograph of a <other> in {} style", "<other> in the style of {}", "a cute {} <other>",
        "show me a {} <other>", "my <other>, {} style", "<other> in {}",
    ),
    look_alikes=_look_alikes(STYLES),
)  # fmt: skip

MODEL = BundledModel(
    name="emojicanvas",
    title="EmojiCanvas",
    path=MODEL_PATH,
    domains=(OBJECT, STYLE),
    caption="a {} in {} style",
    marks=(("vae", "sample_size", IMAGE_SIZE), ("transformer", "joint_attention_dim", 96)),
    load_pipeline=load_pipeline,
    load_judges=load_judges,
    steps=SAMPLING["num_inference_steps"],
    guidance_scale=SAMPLING["true_cfg_scale"],
    demo=("tiger", "dog"),
)
