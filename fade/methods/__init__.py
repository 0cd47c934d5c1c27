"""Methods: recipes for how a concept is forgotten, one small file each.

A method names parts: which weights are located, what an adapter is trained on (an `Objective`) or how it is computed
without training (an `edit`), and with which settings. It has no loop of its own, so checkpoints, processes, CUDA graphs
and files are the same for all. A method is a file here and a line of `METHODS`; its module is imported when it is used.
"""

import functools
import importlib

from fade.errors import FadeError
from fade.methods.base import Edit, Editing, Method, NoOptions

METHODS = {
    "both": "fade.methods.closed_form:BOTH",
    "closed-form": "fade.methods.closed_form:CLOSED_FORM",
    "distillation": "fade.methods.distillation:DISTILLATION",
    "robust": "fade.methods.robust:ROBUST",
    "fade": "fade.methods.fade:FADE",
    "primal-dual": "fade.methods.primal_dual:PRIMAL_DUAL",
    "salun": "fade.methods.salun:SALUN",
    "erasediff": "fade.methods.erasediff:ERASEDIFF",
    "retrack": "fade.methods.retrack:RETRACK",
    "esd-x": "fade.methods.esd:ESD_X",
    "esd-u": "fade.methods.esd:ESD_U",
    "concept-ablation": "fade.methods.concept_ablation:CONCEPT_ABLATION",
    "leco": "fade.methods.leco:LECO",
    "gradient-ascent": "fade.methods.gradient_ascent:GRADIENT_ASCENT",
    "negated-lora": "fade.methods.negated_lora:NEGATED_LORA",
    "uce": "fade.methods.uce:UCE",
    "speed": "fade.methods.speed:SPEED",
    "ssd": "fade.methods.ssd:SSD",
    "loku": "fade.methods.loku:LOKU",
}
"""Where each method is, as module:name; in the order in which they are listed."""

__all__ = ["METHODS", "Edit", "Editing", "Method", "NoOptions", "method"]


@functools.cache
def method(name: str) -> Method:
    """The method of that name. Raises FadeError naming the known ones where there is none."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise FadeError(f"there is no method {name!r}; known are {known} (fade methods says what each does)")
    module, _, variable = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), variable)
