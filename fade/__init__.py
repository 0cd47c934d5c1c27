"""FADE: make a diffusion model forget a concept, with a sparse adapter that can be switched, merged and removed.

    adapter = fade.unlearn(pipeline, forget="three", surrogate="eight")
    adapter.save("no-three.safetensors")
    adapter = fade.load_adapter(pipeline, "no-three.safetensors")

Names are imported when first used, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "fade.adapter",
    "adapters": "fade.adapter",
    "load_adapter": "fade.adapter",
    "status": "fade.adapter",
    "ClosedFormConfig": "fade.config",
    "Concept": "fade.concept",
    "Config": "fade.config",
    "DataConfig": "fade.config",
    "LocateConfig": "fade.config",
    "OverwriteConfig": "fade.config",
    "FadeError": "fade.errors",
    "attack": "fade.evaluation",
    "combine_adapters": "fade.combine",
    "evaluate": "fade.evaluation",
    "unlearn": "fade.unlearning",
    "unlearn_each": "fade.unlearning",
}

__all__ = [
    "Adapter",
    "ClosedFormConfig",
    "Concept",
    "Config",
    "DataConfig",
    "FadeError",
    "LocateConfig",
    "OverwriteConfig",
    "__version__",
    "adapters",
    "attack",
    "combine_adapters",
    "evaluate",
    "load_adapter",
    "status",
    "unlearn",
    "unlearn_each",
]

if TYPE_CHECKING:
    from fade.adapter import Adapter, adapters, load_adapter, status
    from fade.combine import combine_adapters
    from fade.concept import Concept
    from fade.config import ClosedFormConfig, Config, DataConfig, LocateConfig, OverwriteConfig
    from fade.errors import FadeError
    from fade.evaluation import attack, evaluate
    from fade.unlearning import unlearn, unlearn_each


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fade' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
