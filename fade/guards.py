"""What a model with a masked adapter on it must not do in silence: be saved, lose its adapters, or fuse projections
past them. The guards stand in place of four of diffusers' methods on the model while an adapter is attached.
"""

import contextlib
import warnings
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fade.base_model import own_modules, under_fused_projections
from fade.errors import FadeError
from fade.layers import MaskedLoraLayer
from fade.rollback import merges_as_found
from fade.tuner import FadeConfig


def in_force(model: nn.Module) -> dict[str, str]:
    """The FADE adapters that act on the model now without being merged, and what each forgets."""
    acting = {name for layer in model.modules() if isinstance(layer, MaskedLoraLayer) for name in layer.acting()}
    configs = {name: config for name, config in getattr(model, "peft_config", {}).items() if name in acting}
    return {name: config.forgets for name, config in configs.items() if isinstance(config, FadeConfig)}


class _Guard:
    """A stand-in for one of the model's methods; a class, so that copies and pickles of the model keep it."""

    method: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)


class _Unload(_Guard):
    method = "unload_lora"

    def __call__(self) -> None:
        _refuse_fused(self.model, getattr(self.model, "peft_config", {}))
        for name, forgets in in_force(self.model).items():
            warnings.warn(
                f"the FADE adapter {name!r} has been unloaded with all the others: the model can draw {forgets!r} "
                "again. Load it again with fade.load_adapter",
                stacklevel=2,
            )
        self.original()
        remove_guards(self.model)


class _Delete(_Guard):
    method = "delete_adapters"

    def __call__(self, adapter_names: Any) -> None:
        named = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        _refuse_fused(self.model, named)
        self.original(adapter_names)


def _refuse_fused(model: nn.Module, names: Collection[str]) -> None:
    for module in under_fused_projections(model):
        for name in getattr(module, "lora_mask", ()):
            if name in names:
                raise FadeError(
                    f"the projections are drawn with as fused copies, which hold {name!r}; call "
                    "unfuse_qkv_projections() first"
                )


class _FuseProjections(_Guard):
    method = "fuse_qkv_projections"

    def __call__(self) -> None:
        for layer in (module for module in self.model.modules() if isinstance(module, MaskedLoraLayer)):
            for name in layer.lora_mask:
                if name not in layer.merged_adapters:
                    raise FadeError(
                        f"fused projections are copies of the frozen weights, which would leave out the adapter "
                        f"{name!r} however it is switched; merge() or remove() it first, then fuse"
                    )
        self.original()


class _Save(_Guard):
    method = "save_pretrained"

    # The parameters stand here because DiffusionPipeline.save_pretrained looks which of them there are.
    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        with merged_copy(self.model):
            self.original(
                save_directory, is_main_process=is_main_process, save_function=save_function,
                safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size,
                push_to_hub=push_to_hub, **kwargs,
            )  # fmt: skip


_GUARDS = (_Unload, _Delete, _FuseProjections, _Save)


def put_guards(model: nn.Module) -> None:
    """Puts the guards in place of the methods that the model has."""
    for guard in _GUARDS:
        if hasattr(type(model), guard.method):
            setattr(model, guard.method, guard(model))
    for part in model.children():
        if _bare_alone not in part._state_dict_hooks.values():
            part.register_state_dict_post_hook(_bare_alone)


def remove_guards(model: nn.Module) -> None:
    """Gives the model its own methods back."""
    for guard in _GUARDS:
        if isinstance(vars(model).get(guard.method), guard):
            delattr(model, guard.method)
    for part in model.children():
        for key in [key for key, hook in part._state_dict_hooks.items() if hook is _bare_alone]:
            del part._state_dict_hooks[key]


@contextlib.contextmanager
def merged_copy(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model's state dict is that of a bare model which draws what this one draws.

    The FADE adapters that are on are merged for that time, and un-merged bit for bit. Raises FadeError where other
    adapters are on (and not merged), which cannot be un-merged exactly.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MaskedLoraLayer)]
    configs = getattr(model, "peft_config", {})
    others = sorted(
        {
            name
            for layer in model.modules()
            if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters
            # a layer's list of what is active holds names that it does not have, too
            for name in set(layer.active_adapters) & set(layer._get_available_adapters()) - set(layer.merged_adapters)
            if name in configs and not isinstance(configs[name], FadeConfig)
        }
    )
    if others:
        raise FadeError(
            f"the adapters {', '.join(others)} are on, and a saved model holds no adapters: switch them off or delete "
            "them first (the FADE adapter stays in the saved weights), or save the adapters alone"
        )
    handle = model.register_state_dict_post_hook(_bare)
    try:
        with merges_as_found(layers):
            for layer in layers:
                if acting := layer.acting():
                    layer.merge(safe_merge=True, adapter_names=acting, held=True)
            yield
    except ValueError as error:
        raise error if isinstance(error, FadeError) else FadeError(str(error)) from error
    finally:
        handle.remove()


def _bare(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Names without wrappers, and nothing that is an adapter's."""
    names = {path: name for name, path, _ in own_modules(model)}
    kept = {}
    for key, tensor in state.items():
        path, _, own = key.removeprefix(prefix).rpartition(".")
        if path in names:
            kept[f"{prefix}{names[path]}.{own}" if names[path] else f"{prefix}{own}"] = tensor
    state.clear()
    state.update(kept)


def _bare_alone(part: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Of a part asked by itself, the frozen weights alone: what `ControlNetModel.from_unet` copies part by part."""
    if not prefix:
        _bare(part, state, prefix, metadata)
