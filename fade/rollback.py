"""All or nothing: what is undone where a change to a model fails half-way, Ctrl-C included."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fade.layers import MaskBuffer, MaskedLoraLayer


@contextlib.contextmanager
def structure_as_found_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Where something fails, these modules have the parts, attributes and classes that they had.

    What was attached, wrapped, switched or scaled is undone; what was written into tensors is not.
    """
    found = [(module, type(module), vars(module).copy(), _containers(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, cls, attributes, containers in found:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            # In place, because others hold some of them (the handles of hooks), and past what they do on being written.
            for container, contents in containers:
                kind = dict if isinstance(container, dict) else list
                kind.clear(container)
                (dict.update if kind is dict else list.extend)(container, contents)
            if isinstance(module, MaskBuffer):
                module.set_scale(module._exact_scale)
        raise


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    values = vars(module).values()
    return [
        (value, dict(value) if isinstance(value, dict) else list(value))
        for value in values
        if isinstance(value, (dict, list))
    ]


@contextlib.contextmanager
def merges_as_found_on_error(layers: Iterable[MaskedLoraLayer]) -> Iterator[None]:
    """Where something fails, what was merged into these layers is merged again, and nothing else."""
    before = [(layer, layer.stack()) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, stack in before:
            if layer.stack() != stack:
                layer.restack(stack)
        raise
