"""The untrained parts of the EmojiCanvas pipeline: tokenizers, text encoders, VAE, transformer and noise schedule.

Every part is the class FLUX.1 uses (Black Forest Labs, 2024), only narrower, so that whatever works on this pipeline
works on FLUX.1 too. Sizes are chosen for 64x64 pictures, two CPU cores and 16 MB.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from fade.digitcanvas.models import learn_merges
from fade.emojicanvas.config import IMAGE_SIZE, MAX_TOKENS
from fade.emojicanvas.prompts import (
    CAPTIONS,
    OBJECT_CAPTIONS,
    OBJECTS,
    OTHER_WORDS,
    PHRASES,
    STYLE_CAPTIONS,
    STYLES,
)

TEXT_WIDTH = 96
LATENT_CHANNELS = 16
LATENT_SIZE = IMAGE_SIZE // 8
PATCHES = (LATENT_SIZE // 2) ** 2
"""Picture tokens of the transformer: 2x2 latents each, of 4 * LATENT_CHANNELS channels."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"


def caption_words() -> list[str]:
    """Every word of the captions, and some of other prompts, in a fixed order and as it is written."""
    texts = [*OBJECTS, *STYLES, *OTHER_WORDS]
    for template in (*CAPTIONS, *OBJECT_CAPTIONS, *STYLE_CAPTIONS, *PHRASES):
        texts.append(template.replace("{object}", "").replace("{style}", "").replace("{}", ""))
    return list(dict.fromkeys(word.strip(",") for text in texts for word in text.split() if word.strip(",")))


def build_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train CLIP's byte-level BPE on the words of the captions, write it to ``folder`` and load it.

    The alphabet holds all 256 bytes, so any text tokenises; a word of the captions is one token.
    """
    # CLIP reads lower case and cuts at hyphens.
    merges = learn_merges(Counter(part for word in caption_words() for part in word.lower().split("-")))
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


def build_t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """A unigram tokenizer (Kudo, 2018) of T5's form, written to ``folder`` and loaded from it.

    A word of the captions is one token; other text falls into such words and single characters, and a character outside
    ASCII is the unknown token. Nothing is estimated: a whole word always scores higher than its letters.
    """
    words = [f"▁{word}" for word in caption_words()]
    letters = [letter for letter in string.printable if not letter.isspace()]
    pieces = ["▁", *(letter for letter in letters if f"▁{letter}" not in words), *words]
    pieces += [letter for letter in letters if letter not in pieces]
    scores = {"▁": -5.0, **{piece: -1.0 - 9.0 * (not piece.startswith("▁")) for piece in pieces[1:]}}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    built = T5TokenizerFast(vocab=special + list(scores.items()), extra_ids=0, model_max_length=MAX_TOKENS)
    built.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text transformer, of which FLUX.1 reads the pooled state alone: width 96, 2 layers, 4 heads."""
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


def build_text_encoder_2(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A T5 1.1 encoder, whose states the transformer reads token by token: width 96, 2 layers, 4 heads."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """A VAE from [n, 3, 64, 64] in [-1, 1] to latents [n, 16, 8, 8]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        shift_factor=0.0,
        force_upcast=False,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer() -> FluxTransformer2DModel:
    """A denoiser of packed latents [n, 16, 64] with 2 double and 4 single stream blocks of 6 heads of 32.

    Modulation and output start at zero, so that each block begins as the identity (Peebles & Xie, 2023).
    """
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if name == "proj_out" or (".norm" in f".{name}" and name.endswith(".linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow (Liu et al., 2022) without a shift towards noise, which pictures as small as these do not need."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)
