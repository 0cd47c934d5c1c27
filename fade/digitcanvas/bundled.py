"""DigitCanvas as `fade.bundled` describes a model that comes with the package."""

from fade.bundled import BundledModel, Domain
from fade.digitcanvas import DIGITS, MODEL_PATH, STYLES, load_judges, load_pipeline

# The base model was trained with three captions alone; of 40 phrasings tried of either kind, the held-out ones are
# among those that it mostly follows all the same.
DIGIT = Domain(
    name="digit",
    words=DIGITS,
    caption="the digit {}",
    phrasings=(
        "{}", "a {}", "the {}", "digit {}", "a digit {}", "the digit {}", "{} in <other> style", "{} in <other>",
        "a <other> {}", "<other> digit {}", "digit {} in <other> style", "the digit {}, <other> style",
        "the digit {} in the <other> style",
    ),
    held_out=(
        "<other> style {}", "a digit {} in <other> style", "the digit {} in <other>", "my {} in <other> style",
        "the <other> digit {}", "{} digit", "{} as <other>",
    ),
    look_alikes=(("three", "five", "eight"), ("four", "nine"), ("one", "seven")),
)  # fmt: skip
STYLE = Domain(
    name="style",
    words=STYLES,
    caption="a digit in {} style",
    phrasings=(
        "{}", "{} style", "a digit in {} style", "{} digit", "digit <other> in {} style", "the digit <other>, {} style",
        "the digit <other> in the {} style", "<other> in {}", "the {} digit <other>",
    ),
    held_out=(
        "a digit <other> in {} style", "the digit <other> in {}", "<other> as {}", "<other> in {} style", "{} <other>",
        "show <other> in {}", "digit, {}",
    ),
    look_alikes=(("neon", "laser"), ("ink", "pencil")),
)  # fmt: skip

MODEL = BundledModel(
    name="digitcanvas",
    title="DigitCanvas",
    path=MODEL_PATH,
    domains=(DIGIT, STYLE),
    caption="the digit {} in {} style",
    marks=(("unet", "sample_size", 8),),
    load_pipeline=load_pipeline,
    load_judges=load_judges,
    steps=20,
    guidance_scale=3.0,
    demo=("three", "eight"),
)
