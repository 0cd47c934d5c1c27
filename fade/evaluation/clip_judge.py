"""CLIP: a judge for models that bring none, used zero-shot on a handful of words, and a score of pictures and prompts.

Radford et al. (arXiv 2103.00020, section 3.1): an image belongs to the class whose text embedding, averaged over prompt
templates, is nearest to the image's. It is weaker than a trained judge; its accuracy on the base model's images is
therefore always reported beside the unlearned model's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor

from fade.errors import FadeError
from fade.evaluation.features import levels
from fade.loading import find_files, weights_variant

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")


def _load(model: str, what: str, device: str | torch.device) -> tuple[Any, Any, Any]:
    """Model, image processor and tokenizer of a folder or hub id. Raises FadeError; `what` the model is for, in its
    messages."""
    from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

    if not Path(model).exists() and model.count("/") != 1:
        raise FadeError(f"there is no {what} {model!r}: give a folder or hub id (owner/name) of a CLIP model")
    source, files = find_files(model, "config.json", f"the {what}")
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != "clip":
            raise FadeError(f"the {what} {model!r} is a {config.model_type} model; give a CLIP model")
        variant = weights_variant(model, {"": files}, "CLIPModel", source)
        loaded = CLIPModel.from_pretrained(source, variant=variant, use_safetensors=True)
        loaded.eval().requires_grad_(False).float().to(device)
        return loaded, CLIPImageProcessor.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except FadeError:
        raise
    # A damaged folder shows itself anywhere in the libraries that read it.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FadeError(f"cannot load a CLIP model from {model!r}: {reason}") from error


class Clip:
    """A CLIP model that scores how well pictures fit prompts; `name` is its folder or hub id.

    Raises FadeError when it cannot be loaded or is no CLIP model.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        self.name = str(model)
        self._model, self._processor, self._tokenizer = _load(str(model), "CLIP model", device)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        """100 · max(cos, 0) of each picture and its own prompt: float [n, 3, H, W] in [0, 1] and n prompts -> float64
        [n] on the CPU. Prompts are cut at what the text encoder reads."""
        found, texts = [torch.empty(0, dtype=torch.float64)], list(prompts)
        for index in range(0, len(images), batch_size):
            own = slice(index, index + batch_size)
            tokens = self._tokenizer(texts[own], padding=True, truncation=True, return_tensors="pt")
            pixels = self._processor(levels(images[own]), return_tensors="pt")["pixel_values"]
            output = self._model(
                input_ids=tokens["input_ids"].to(self._model.device),
                attention_mask=tokens["attention_mask"].to(self._model.device),
                pixel_values=pixels.to(self._model.device),
            )
            cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds, dim=1)
            found.append(100.0 * cosines.double().clamp(min=0).cpu())
        return torch.cat(found)


class ClipJudge:
    """Tells which of `classes` an image shows, with a CLIP model in a folder or on the Hugging Face hub.

    Raises FadeError when the model cannot be loaded or is no CLIP model, and for fewer than two distinct classes.
    """

    def __init__(self, model: str | Path, classes: Sequence[str], device: str | torch.device = "cpu") -> None:
        self.classes = tuple(classes)
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise FadeError(f"a judge needs at least two different classes, got {', '.join(self.classes) or 'none'}")
        self._model, self._processor, tokenizer = _load(str(model), "judge", device)
        texts = [template.replace("{}", word) for word in self.classes for template in TEMPLATES]
        self._tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 32) -> LongTensor:
        """Index into `classes` of each image: float images [n, 3, H, W] in [0, 1] -> int64 [n] on the CPU."""
        answers = []
        for chunk in images.split(batch_size):
            pixels = self._processor(levels(chunk), return_tensors="pt")["pixel_values"].to(self._model.device)
            output = self._model(
                input_ids=self._tokens["input_ids"],
                attention_mask=self._tokens["attention_mask"],
                pixel_values=pixels,
            )
            texts = output.text_embeds.reshape(len(self.classes), len(TEMPLATES), -1).mean(1)  # [classes, width]
            texts = texts / texts.norm(dim=-1, keepdim=True)
            answers.append((output.image_embeds @ texts.T).argmax(1).cpu())
        return torch.cat(answers) if answers else torch.empty(0, dtype=torch.long)
