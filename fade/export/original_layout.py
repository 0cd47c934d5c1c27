"""A Stable Diffusion pipeline's weights under the names of the original (CompVis, Stability) checkpoints.

diffusers ships the way from there alone (`diffusers.loaders.single_file_utils`). The names here are its inverse, and
every state dict made is sent back through that conversion: what does not come back under the same names, bit for bit,
is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from fade.errors import FadeError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip

State = Mapping[str, Tensor]


def original_state(pipeline: Any) -> dict[str, Tensor]:
    """UNet, VAE and text encoders of a Stable Diffusion 1.x, 2.x or XL pipeline, on the CPU and contiguous.

    Raises FadeError for another kind of pipeline, and for parts that the original layout has no names for.
    """
    state: dict[str, Tensor] = {}
    try:
        state |= _unet(pipeline.unet)
        state |= _vae(pipeline.vae)
        if getattr(pipeline, "text_encoder_2", None) is not None:
            state |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
            state |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
        elif pipeline.text_encoder.config.hidden_act == "quick_gelu":
            state |= _clip(pipeline.text_encoder, "cond_stage_model.transformer.")
        else:
            state |= _open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    except AttributeError as error:
        raise FadeError(
            f"a {type(pipeline).__name__} has no single file in the original layout, which Stable Diffusion 1.x, 2.x "
            f"and XL have ({error}); write a folder instead"
        ) from error
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}


def _unet(unet: Any) -> dict[str, Tensor]:
    state, deep = unet.state_dict(), unet.config.layers_per_block + 1
    fixed = {ours: theirs for part in single_file_utils.DIFFUSERS_TO_LDM_MAPPING["unet"].values()
             for ours, theirs in part.items()}  # fmt: skip
    with_attention = {key.split(".")[1] for key in state if re.match(r"up_blocks\.\d+\.attentions\.", key)}

    def name(key: str) -> str:
        if key in fixed:
            return fixed[key]
        block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
        if block is None:
            middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key)
            if middle is None:
                return key
            kind, index, rest = middle.groups()
            inner = _renamed(rest, _RESNET) if kind == "resnets" else rest
            return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{inner}"
        side, i, kind, j, rest = block.groups()
        if kind == "downsamplers":
            return f"input_blocks.{deep * (int(i) + 1)}.0.{_renamed(rest, {'conv': 'op'})}"
        if kind == "upsamplers":
            return f"output_blocks.{deep * int(i) + deep - 1}.{1 + (i in with_attention)}.{rest}"
        at = deep * int(i) + int(j)
        where = f"input_blocks.{at + 1}" if side == "down" else f"output_blocks.{at}"
        return f"{where}.0.{_renamed(rest, _RESNET)}" if kind == "resnets" else f"{where}.1.{rest}"

    original = {UNET + name(key): tensor for key, tensor in state.items()}
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(original), dict(unet.config))
    _check("unet", state, back)
    return original


def _vae(vae: Any) -> dict[str, Tensor]:
    state, last = vae.state_dict(), len(vae.config.up_block_types) - 1
    fixed = single_file_utils.DIFFUSERS_TO_LDM_MAPPING["vae"]

    def name(key: str) -> str:
        if key in fixed:
            return fixed[key]
        part, _, rest = key.partition(".")
        if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
            return f"{part}.mid.attn_1.{_renamed(found[1], _VAE_ATTENTION)}"
        if found := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", rest):
            rest = f"mid.block_{int(found[1]) + 1}.{found[2]}"
        elif found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", rest):
            side, i, kind, j, rest = found.groups()
            i = int(i) if side == "down" else last - int(i)
            inner = f"block.{j}" if kind == "resnets" else f"{side}sample"
            rest = f"{side}.{i}.{inner}.{rest}"
        return f"{part}.{rest.replace('conv_shortcut', 'nin_shortcut')}"

    original = {}
    for key, tensor in state.items():
        theirs = name(key)
        # Attention there is of convolutions.
        as_convolution = ".mid.attn_1." in theirs and tensor.dim() == 2
        original[VAE + theirs] = tensor[:, :, None, None] if as_convolution else tensor
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(original), dict(vae.config))
    _check("vae", state, back)
    return original


def _clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = _text_state(encoder)
    original = {prefix + key: tensor for key, tensor in state.items()}
    _check("text encoder", state, single_file_utils.convert_ldm_clip_checkpoint(dict(original)))
    return original


def _open_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = _text_state(encoder)
    fixed = single_file_utils.DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    original = {}
    for key, tensor in state.items():
        if key in fixed:
            original[prefix + fixed[key]] = tensor.T if key == "text_projection.weight" else tensor
            continue
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", key)
        if found is None:
            original[prefix + key] = tensor
            continue
        block = f"{prefix}transformer.resblocks.{found[1]}."
        projection = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", found[2])
        if projection is None:
            original[block + _renamed(found[2], _OPEN_CLIP)] = tensor
        elif projection[1] == "q":
            parts = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            original[f"{block}attn.in_proj_{projection[2]}"] = torch.cat(parts)
    model = getattr(encoder, "text_model", encoder)
    _check("text encoder", state, single_file_utils.convert_open_clip_checkpoint(model, dict(original), prefix))
    return original


def _text_state(encoder: Any) -> dict[str, Tensor]:
    """Under the names that diffusers' conversion uses, whichever release of transformers made the encoder."""
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in encoder.state_dict().items()
        if not key.endswith("position_ids")  # a constant, which later releases no longer keep
    }


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """With the module before the parameter's own name renamed."""
    module, _, own = name.rpartition(".")
    return f"{names.get(module, module)}.{own}"


def _check(part: str, state: State, back: State) -> None:
    kept = {key for key, tensor in state.items() if key in back and torch.equal(back[key], tensor)}
    lost = sorted(state.keys() - kept) or sorted(back.keys() - kept)
    if lost:
        raise FadeError(
            f"the {part} is not one of Stable Diffusion 1.x, 2.x or XL: the original layout has no name for {lost[0]}; "
            "write a folder instead"
        )
