"""The untrained parts of the DigitCanvas pipeline: tokenizer, text encoder, VAE, UNet and noise schedule.

Every part is the class Stable Diffusion 1.x uses (Rombach et al., 2022), only narrower, so that whatever works on this
pipeline works on Stable Diffusion too. Sizes are chosen for 32x32 pictures and two CPU cores.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fade.digitcanvas.data import IMAGE_SIZE
from fade.digitcanvas.prompts import DIGITS, STYLES, digit_prompt, prompt, style_prompt

TEXT_WIDTH = 64
MAX_TOKENS = 16
LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4

_START, _END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"


def learn_merges(word_counts: dict[str, int]) -> list[tuple[str, str]]:
    """The byte-pair merges (Sennrich et al., 2016) that make each of some words one token, most frequent pair first.

    Written out because the trainer of ``tokenizers`` breaks ties by hash order and numbers tokens anew in every run.
    """
    words = {word: [*word[:-1], word[-1] + _END_OF_WORD] for word in word_counts}
    letters = {token for tokens in words.values() for token in tokens}
    inner = sorted(token for token in letters if not token.endswith(_END_OF_WORD))
    order = inner + sorted(letters.difference(inner), reverse=True)
    merges: list[tuple[str, str]] = []
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for word, tokens in words.items():
            for pair in pairwise(tokens):
                counts[pair] += word_counts[word]
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], order.index(pair[0]), order.index(pair[1])))
        merges.append(best)
        order.append("".join(best))
        for tokens in words.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == best:
                    tokens[i : i + 2] = ["".join(best)]
                i += 1


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train CLIP's byte-level BPE on the captions, write it to ``folder`` and load it.

    The alphabet holds all 256 bytes, so any text tokenises; a word of the captions is one token.
    """
    captions = [prompt(digit, style) for digit in DIGITS for style in STYLES]
    captions += [digit_prompt(digit) for digit in DIGITS] + [style_prompt(style) for style in STYLES]
    merges = learn_merges(Counter(word for caption in captions for word in caption.split()))

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIP's order: bytes, bytes that end a word, merges, special tokens.
    tokens = alphabet + [letter + _END_OF_WORD for letter in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), _START, _END])}
    folder.mkdir(parents=True, exist_ok=True)
    # Files of an earlier tokenizer would be read instead of the two written here.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    loaded = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    loaded.save_pretrained(folder)
    return loaded


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text transformer: width 64, 2 layers, 4 heads."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """A VAE from [n, 3, 32, 32] in [-1, 1] to latents [n, 4, 8, 8]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A denoiser of latents [n, 4, 8, 8] with cross-attention at both of its two levels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule: 1,000 steps, scaled-linear betas, epsilon prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
