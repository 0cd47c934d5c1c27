"""The solved edit of the layers that read the prompt alone (`fade.closed_form`), and training that starts from it."""

from fade.methods.base import Method

CLOSED_FORM = Method(
    name="closed-form",
    summary="Solves the edit of the layers that read the prompt alone, on a mask chosen for it, without training.",
    source="ours; the equations of UCE, arXiv 2308.14761, on a mask",
    trains=False,
    solves=True,
)

BOTH = Method(
    name="both",
    summary="Solves the edit in closed form, then trains on from it by distillation; the default.",
    source="ours",
    solves=True,
)
