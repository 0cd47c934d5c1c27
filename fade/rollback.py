"""All or nothing: what is undone where a change to a model fails half-way, Ctrl-C included."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fade.layers import MaskBuffer, MaskedLoraLayer, Merged


@contextlib.contextmanager
def structure_as_found_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Where something fails, these modules have the parts, attributes and classes that they had.

    What was attached, wrapped, switched, scaled or set to be trained is undone; what was written into tensors is not.
    """
    modules = list(modules)
    found = [(module, type(module), vars(module).copy(), _containers(module)) for module in modules]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    needed = [p.requires_grad for p in parameters]
    try:
        yield
    except BaseException:
        for module, cls, attributes, containers in found:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            # In place, because others hold some of them (the handles of hooks), and past what they do on being written.
            for container, contents in containers:
                kind = next(kind for kind in (OrderedDict, dict, list) if isinstance(container, kind))
                kind.clear(container)
                (list.extend if kind is list else kind.update)(container, contents)
            if isinstance(module, MaskBuffer):
                module.set_scale(module._exact_scale)
        for parameter, needs in zip(parameters, needed, strict=True):
            if parameter.requires_grad != needs:
                parameter.requires_grad_(needs)
        raise


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    # Most are empty (a module's kinds of hooks): thousands of copies of nothing would take the time.
    return [
        (value, (dict(value) if isinstance(value, dict) else list(value)) if value else ())
        for value in vars(module).values()
        if isinstance(value, (dict, list))
    ]


@contextlib.contextmanager
def merges_as_found(layers: Iterable[MaskedLoraLayer], on_error_alone: bool = False) -> Iterator[None]:
    """Afterwards (or `on_error_alone`) what was merged into these layers is merged, bit for bit, and nothing else.

    An interruption while they are put back is raised once all are.
    """
    before = [(layer, layer.stack()) for layer in layers]
    try:
        yield
    except BaseException:
        _put_back(before)
        raise
    if not on_error_alone:
        _put_back(before)


def _put_back(before: list[tuple[MaskedLoraLayer, list[Merged]]]) -> None:
    interruption: BaseException | None = None
    for layer, stack in before:
        for _ in range(2):
            try:
                if layer.stack() != stack:
                    layer.restack(stack)
                break
            except BaseException as error:
                interruption = interruption or error
    if interruption is not None:
        raise interruption
