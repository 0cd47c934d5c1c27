"""A tiny pipeline of every family, of random weights that depend on a seed alone, built without a network.

`FACTORIES` maps a family's name to a function of nothing that builds its pipeline; `PIPELINES` has what the tests run
over. Sizes are those of diffusers' own fast tests or smaller.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .tokenizers import VOCABULARY, word_tokenizer

FACTORIES: dict[str, Callable[[], Any]] = {}


def family(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a factory under the name that the family has in `fade.backbones.FAMILIES`."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        FACTORIES[name] = build
        return build

    return register


def build(name: str, seed: int = 0) -> Any:
    """A family's pipeline in evaluation mode: every parameter random, none zero, as gates are at initialisation.

    Leaves torch's generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FACTORIES[name]()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                randomise(part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cast(pipeline: Any, dtype: torch.dtype) -> Any:
    """As `from_pretrained` loads it: modules that a part says it needs in float32 stay so."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)
            kept = getattr(part, "_keep_in_fp32_modules", None) or ()
            for name, module in part.named_modules():
                if name.rpartition(".")[2] in kept:
                    module.float()
    return pipeline


def randomise(module: nn.Module) -> None:
    """Matrices with variance 1/fan-in, vectors near what they were: nothing is switched off, nothing explodes."""
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))


def clip(width: int = 32, length: int = 16, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=length,
        bos_token_id=VOCABULARY["<s>"], eos_token_id=VOCABULARY["</s>"], pad_token_id=VOCABULARY["<pad>"],
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(VOCABULARY), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=VOCABULARY["</s>"], dropout_rate=0.1,
        )
    )  # fmt: skip


def decoder(config: type, model: type, width: int = 32, layers: int = 2, **more: Any) -> Any:
    """A language model of the kind that generates."""
    heads = width // 8
    return model(
        config(
            vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=8, max_position_embeddings=1024,
            pad_token_id=VOCABULARY["<pad>"], bos_token_id=VOCABULARY["<s>"], eos_token_id=VOCABULARY["</s>"], **more,
        )
    )  # fmt: skip


CHAT = "{% for message in messages %}the {{ message.content }} picture of {% endfor %}"
"""A chat template: words before and after what is said."""


CHAT_OF_PARTS = "{% for message in messages %}the {{ message.content[0].text }} picture of {% endfor %}"
"""The same for messages that may have pictures, too."""


def chat_tokenizer(length: int, template: str = CHAT, **more: Any) -> Any:
    tokenizer = word_tokenizer(length, begin=False, **more)
    tokenizer.chat_template = template
    return tokenizer


def kl(channels: int, blocks: tuple[int, ...] = (16, 32), **config: Any) -> AutoencoderKL:
    """Factor 2, or 2 for each block but one."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=blocks, norm_num_groups=8, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(blocks), up_block_types=("UpDecoderBlock2D",) * len(blocks),
        **config,
    )  # fmt: skip


def flow_scheduler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **config,
    )  # fmt: skip


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip


@family("Stable Diffusion 1.x/2.x")
def stable_diffusion() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=kl(4), text_encoder=clip(), tokenizer=word_tokenizer(16),
        unet=unet(cross_attention_dim=32, attention_head_dim=4), scheduler=ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@family("Stable Diffusion XL")
def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=kl(4), text_encoder=clip(), tokenizer=word_tokenizer(16), text_encoder_2=clip(projected=True),
        tokenizer_2=word_tokenizer(16),
        unet=unet(
            cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32, transformer_layers_per_block=(1, 2),
        ),
        scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip


@family("PixArt-Sigma")
def pixart_sigma() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tokenizer=word_tokenizer(300, begin=False), text_encoder=t5(), vae=kl(4),
        transformer=PixArtTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, num_attention_heads=3, attention_head_dim=8, in_channels=4,
            out_channels=8, cross_attention_dim=24, caption_channels=32, interpolation_scale=1,
            use_additional_conditions=False,
        ),
        scheduler=ddim(),
    )  # fmt: skip


@family("Stable Diffusion 3/3.5")
def sd3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=8,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=flow_scheduler(shift=3.0), vae=kl(8, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False,
                                                    use_post_quant_conv=False),
        text_encoder=clip(projected=True, length=77), tokenizer=word_tokenizer(77),
        text_encoder_2=clip(projected=True, length=77), tokenizer_2=word_tokenizer(77),
        text_encoder_3=t5(64), tokenizer_3=word_tokenizer(16, begin=False),
    )  # fmt: skip


def _flux(guided: bool) -> FluxPipeline:
    return FluxPipeline(
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=guided),
        vae=kl(
            4, shift_factor=0.12, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False, sample_size=16
        ),
        text_encoder=clip(), tokenizer=word_tokenizer(16), text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(16, begin=False),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guided,
            axes_dims_rope=(4, 4, 8),
        ),
    )  # fmt: skip


@family("FLUX.1")
def flux() -> FluxPipeline:
    return _flux(guided=True)


@family("Chroma")
def chroma() -> ChromaPipeline:
    pipeline = ChromaPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=kl(4, shift_factor=0.12, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5(), tokenizer=word_tokenizer(512, begin=False),
        transformer=ChromaTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
            approximator_hidden_dim=32, approximator_layers=1,
        ),
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


def qwen2_vl(width: int = 16, layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(VOCABULARY), "hidden_size": width, "intermediate_size": 2 * width,
                "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
                "rope_parameters": rope,
                "pad_token_id": 0, "bos_token_id": VOCABULARY["<s>"], "eos_token_id": VOCABULARY["</s>"],
            },
            vision_config={
                "depth": 1, "hidden_size": width, "intermediate_size": width, "num_heads": 2, "out_hidden_size": width,
            },
        )
    )  # fmt: skip


@family("Qwen-Image")
def qwen_image() -> QwenImagePipeline:
    pipeline = QwenImagePipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 2.0, 1.2],
        ),
        text_encoder=qwen2_vl(), tokenizer=word_tokenizer(1024, begin=False),
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
    )  # fmt: skip
    begin = pipeline.prompt_template_encode.split("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer.tokenize(begin))
    pipeline.default_sample_size = 8
    return pipeline


def gemma2(width: int = 16) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0,
            bos_token_id=VOCABULARY["<s>"], eos_token_id=VOCABULARY["</s>"],
        )
    )  # fmt: skip


@family("Sana")
def sana() -> SanaPipeline:
    blocks = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)), "layers_per_block": (1, 1),
        }.items()
    }  # fmt: skip
    return SanaPipeline(
        tokenizer=word_tokenizer(1024, end=False), text_encoder=gemma2(),
        vae=AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
            upsample_block_type="interpolate", scaling_factor=0.41, **blocks,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
            sample_size=16, patch_size=1,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++",
        ),
    )  # fmt: skip


@family("AuraFlow")
def aura_flow() -> AuraFlowPipeline:
    return AuraFlowPipeline(
        tokenizer=word_tokenizer(256, begin=False),
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(VOCABULARY), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
                eos_token_id=VOCABULARY["</s>"], dropout_rate=0.1,
            )
        ),
        vae=kl(4),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
            out_channels=4, pos_embed_max_size=16,
        ),
        scheduler=flow_scheduler(shift=1.73),
    )  # fmt: skip


@family("Lumina 2")
def lumina2() -> Lumina2Pipeline:
    """With a VAE of factor 8: the pipeline takes it for granted."""
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        ),
        scheduler=flow_scheduler(shift=6.0),
        vae=kl(
            4, (8, 8, 8, 8), shift_factor=0.12, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=gemma2(), tokenizer=word_tokenizer(256, end=False),
    )  # fmt: skip


@family("Z-Image")
def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=flow_scheduler(shift=3.0),
        vae=kl(
            4, shift_factor=0.12, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False, sample_size=16
        ),
        text_encoder=decoder(Qwen3Config, Qwen3Model), tokenizer=chat_tokenizer(64),
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
            axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
    )  # fmt: skip


@family("CogView4")
def cogview4() -> CogView4Pipeline:
    return CogView4Pipeline(
        tokenizer=word_tokenizer(64, padding_side="left"), text_encoder=decoder(GlmConfig, GlmModel), vae=kl(4),
        transformer=CogView4Transformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            text_embed_dim=32, time_embed_dim=16, condition_dim=4, sample_size=8, rope_axes_dim=(16, 16),
        ),
        scheduler=flow_scheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    )  # fmt: skip


def _flux2(guided: bool) -> dict[str, Any]:
    """The parts that all have. Statistics of the batch norm are those of no identity."""
    vae = AutoencoderKLFlux2(
        in_channels=3, out_channels=3, block_out_channels=(16, 32), norm_num_groups=8, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return {
        "scheduler": flow_scheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae,
        "transformer": Flux2Transformer2DModel(
            in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * 16, timestep_guidance_channels=8, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guided,
        ),
    }  # fmt: skip


@family("FLUX.2")
def flux2() -> Flux2Pipeline:
    """Of the text encoder the layers 10, 20 and 30 are read."""
    return Flux2Pipeline(
        text_encoder=decoder(MistralConfig, MistralModel, width=16, layers=30),
        tokenizer=chat_tokenizer(512, CHAT_OF_PARTS, padding_side="left"), **_flux2(guided=True),
    )  # fmt: skip


@family("FLUX.2 klein")
def flux2_klein() -> Flux2KleinPipeline:
    """Of the text encoder the layers 9, 18 and 27 are read."""
    return Flux2KleinPipeline(
        text_encoder=decoder(Qwen3Config, Qwen3ForCausalLM, width=16, layers=27), tokenizer=chat_tokenizer(512),
        **_flux2(guided=False),
    )  # fmt: skip


@family("HiDream-I1")
def hidream() -> HiDreamImagePipeline:
    pipeline = HiDreamImagePipeline(
        scheduler=flow_scheduler(shift=3.0),
        vae=kl(4, shift_factor=0.12, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projected=True, length=128), tokenizer=word_tokenizer(128),
        text_encoder_2=clip(projected=True, length=128), tokenizer_2=word_tokenizer(128),
        text_encoder_3=t5(), tokenizer_3=word_tokenizer(16, begin=False),
        text_encoder_4=decoder(LlamaConfig, LlamaForCausalLM, width=16, attn_implementation="eager"),
        tokenizer_4=word_tokenizer(128, padding_side="left"),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1, 1),
            force_inference_output=True,
        ),
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


class Processor:
    """Of a tokenizer, what reads text and pictures is to a pipeline that has text alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: None = None, videos: None = None, **how: Any) -> Any:
        return self.tokenizer(text, **how)

    def decode(self, ids: Any) -> str:
        return self.tokenizer.decode(ids)


@family("Kandinsky 5")
def kandinsky5() -> Kandinsky5T2IPipeline:
    pipeline = Kandinsky5T2IPipeline(
        transformer=Kandinsky5Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=16, model_dim=32, ff_dim=64,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
        ),
        vae=kl(4, shift_factor=0.12, scaling_factor=0.36), text_encoder=decoder(Qwen2Config, Qwen2Model),
        tokenizer=Processor(word_tokenizer(64, begin=False)), text_encoder_2=clip(length=77),
        tokenizer_2=word_tokenizer(77), scheduler=flow_scheduler(shift=3.0),
    )  # fmt: skip
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "the painting of {} in two", 3
    pipeline.vae_scale_factor_spatial, pipeline.resolutions = 2, [(16, 16), (8, 32)]
    return pipeline


@family("HunyuanImage 2.1")
def hunyuan_image() -> HunyuanImagePipeline:
    """Of the first text encoder the layer two before the last is read."""
    pipeline = HunyuanImagePipeline(
        scheduler=flow_scheduler(shift=5.0),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
            spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75,
        ),
        text_encoder=qwen2_vl(layers=3), tokenizer=word_tokenizer(1024, begin=False), text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(16, begin=False),
        transformer=HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=2, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=32,
            rope_axes_dim=(8, 8),
        ),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5),
        ocr_guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_start_step=38),
    )  # fmt: skip
    begin = pipeline.prompt_template_encode.split("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer.tokenize(begin))
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length, pipeline.default_sample_size = 32, 16, 8
    return pipeline
