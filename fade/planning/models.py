"""Models without their weights: from the configurations in a diffusers folder, of a bundled model, or of those shipped
in `fade/configs`, every part on the meta device.

A shipped one is a JSON file: the pipeline's class and settings, and for each part its library, class and configuration
as the model's own folder has them; of tokenizers what a plan reads. `hub` lists the ids that it has on the hub.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fade import bundled
from fade.backbones import Backbone, backbone_for
from fade.errors import FadeError
from fade.files import atomic_write
from fade.loading import pipeline_class

SHIPPED = Path(__file__).parents[1] / "configs"
_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class Description:
    """A pipeline in words: its index (class and settings), and of each part (library, class, configuration)."""

    name: str
    index: Mapping[str, Any]
    parts: Mapping[str, tuple[str, str, Mapping[str, Any]]]

    def write(self, folder: Path) -> None:
        """As a diffusers folder without weights or tokenizers."""
        classes = {name: [library, cls] for name, (library, cls, _) in self.parts.items()}
        _write(folder / "model_index.json", {**self.index, **classes})
        for name, (_, cls, config) in self.parts.items():
            (folder / name).mkdir(exist_ok=True)
            _write(folder / name / _config_file(name, cls), config)


class Tokenizer:
    """What a plan needs of a tokenizer: how many tokens it reads, and where it pads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_max_length = int(min(config.get("model_max_length") or 2**30, 2**30))
        self.padding_side = config.get("padding_side") or "right"
        self.eos_token = self.pad_token = config.get("eos_token")


def shipped() -> dict[str, Path]:
    """The models whose configurations come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def describe(model: str) -> Description:
    """The configurations of a folder, a bundled model's name, or a shipped name or hub id.

    Raises FadeError listing the shipped names for one that is unknown, and for a folder without configurations.
    """
    path = Path(model).expanduser()
    if path.exists():
        return _of_folder(path.resolve().name, path)
    if (name := model.lower()) in bundled.PACKAGES:
        return _of_folder(name, bundled.model(name).path)
    known = shipped()
    if model.lower() in known:
        return _of_file(known[model.lower()])
    for file in known.values():
        if model in json.loads(file.read_text(encoding="utf-8"))["hub"]:
            return _of_file(file)
    raise FadeError(
        f"there is no model {model!r} to plan: give a diffusers folder, {' or '.join(bundled.PACKAGES)}, or one of "
        f"those whose configurations are known: {', '.join(known)}"
    )


def _of_file(path: Path) -> Description:
    record = json.loads(path.read_text(encoding="utf-8"))
    parts = {name: (*part["class"], part["config"]) for name, part in record["parts"].items()}
    return Description(path.stem, record["index"], parts)


def _of_folder(model: str, path: Path) -> Description:
    if not (path / "model_index.json").is_file():
        raise FadeError(
            f"{model} is no diffusers folder: it holds no model_index.json. A plan needs that and the config.json of "
            "each part, and no weights"
        )
    index = _read(path / "model_index.json")
    parts = {}
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)):
            continue
        library, cls = value
        file = path / name / _config_file(name, cls)
        if not _tokenizes(name, cls) and library in _LIBRARIES and not file.is_file():
            raise FadeError(f"cannot plan {model}: {name}/{file.name} is missing, which says how large that part is")
        parts[name] = (library, cls, _read(file) if file.is_file() else {})
    return Description(model, index, parts)


def _write(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _config_file(part: str, cls: str) -> str:
    if _tokenizes(part, cls):
        return "tokenizer_config.json"
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def _tokenizes(part: str, cls: str) -> bool:
    return part.startswith("tokenizer") or "Tokenizer" in cls or "Processor" in cls


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FadeError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise FadeError(f"{path} is no configuration: it holds no table")
    return value


def build(description: Description) -> Backbone:
    """The pipeline of a description, with every part on the meta device, in float32.

    Raises FadeError for a class that is not supported and for a configuration that its class does not take.
    """
    return backbone_for(made(description, "meta"))


def made(description: Description, device: str, given: Mapping[str, Any] | None = None) -> Any:
    """A pipeline of a description: its parts made on a device, with the weights they are initialised with, but for
    those `given`; tokenizers that are not are `Tokenizer`."""
    classes = {name: cls for name, (_, cls, _) in description.parts.items()}
    pipeline = pipeline_class(description.name, description.index, classes)
    taken = inspect.signature(pipeline.__init__).parameters
    parts: dict[str, Any] = {}
    for name, parameter in taken.items():
        if name in (given or {}):
            parts[name] = given[name]
        elif name in description.parts:
            parts[name] = _part(description.name, device, name, *description.parts[name])
        elif name in description.index and not isinstance(description.index[name], list):
            parts[name] = description.index[name]
        elif parameter.default is parameter.empty and name not in ("self", "args", "kwargs"):
            parts[name] = None
    if "requires_safety_checker" in taken:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline(**parts)


def _part(model: str, device: str, name: str, library: str, cls: str, config: Mapping[str, Any]) -> Any:
    if _tokenizes(name, cls):
        return Tokenizer(config)
    if library not in _LIBRARIES or name in ("safety_checker", "feature_extractor", "image_encoder"):
        return None
    try:
        found = getattr(importlib.import_module(library), cls)
        if library == "diffusers":
            make = partial(found.from_config, dict(config))
        else:
            make = partial(found, found.config_class.from_dict(dict(config)))
        with torch.device("cpu" if name == "scheduler" else device):
            part = make()
    # Whatever a class says of a configuration that is not its own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FadeError(f"cannot plan {model}: the configuration of its {name} makes no {cls}: {reason}") from error
    return part.eval().requires_grad_(False) if isinstance(part, nn.Module) else part
