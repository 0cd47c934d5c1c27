"""A judge for models that bring none: CLIP used zero-shot on a handful of words.

Radford et al. (arXiv 2103.00020, section 3.1): an image belongs to the class whose text embedding, averaged over prompt
templates, is nearest to the image's. It is weaker than a trained judge; its accuracy on the base model's images is
therefore always reported beside the unlearned model's.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import LongTensor, Tensor

from fade.errors import FadeError
from fade.loading import find_files, weights_variant

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")


class ClipJudge:
    """Tells which of `classes` an image shows, with a CLIP model in a folder or on the Hugging Face hub.

    Raises FadeError when the model cannot be loaded or is no CLIP model, and for fewer than two distinct classes.
    """

    def __init__(self, model: str | Path, classes: Sequence[str], device: str | torch.device = "cpu") -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.classes = tuple(classes)
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise FadeError(f"a judge needs at least two different classes, got {', '.join(self.classes) or 'none'}")
        if not Path(model).exists() and str(model).count("/") != 1:
            raise FadeError(f"there is no judge {str(model)!r}: give a folder or hub id (owner/name) of a CLIP model")
        source, files = find_files(str(model), "config.json", "the judge")
        try:
            config = AutoConfig.from_pretrained(source)
            if config.model_type != "clip":
                raise FadeError(f"the judge {str(model)!r} is a {config.model_type} model; give a CLIP model")
            variant = weights_variant(str(model), {"": files}, "CLIPModel", source)
            self._model = CLIPModel.from_pretrained(source, variant=variant, use_safetensors=True)
            self._model.eval().requires_grad_(False).float().to(device)
            self._processor = CLIPImageProcessor.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except FadeError:
            raise
        # A damaged folder shows itself anywhere in the libraries that read it.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FadeError(f"cannot load a CLIP model from {str(model)!r}: {reason}") from error
        texts = [template.replace("{}", word) for word in self.classes for template in TEMPLATES]
        self._tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 32) -> LongTensor:
        """Index into `classes` of each image: float images [n, 3, H, W] in [0, 1] -> int64 [n] on the CPU."""
        answers = []
        for chunk in images.split(batch_size):
            levels = [image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy() for image in chunk.cpu()]
            pixels = self._processor(levels, return_tensors="pt")["pixel_values"].to(self._model.device)
            output = self._model(
                input_ids=self._tokens["input_ids"],
                attention_mask=self._tokens["attention_mask"],
                pixel_values=pixels,
            )
            texts = output.text_embeds.reshape(len(self.classes), len(TEMPLATES), -1).mean(1)  # [classes, width]
            texts = texts / texts.norm(dim=-1, keepdim=True)
            answers.append((output.image_embeds @ texts.T).argmax(1).cpu())
        return torch.cat(answers) if answers else torch.empty(0, dtype=torch.long)
