"""Settings of attacks: what values they may have, and how they are told and read as text. The fields of an attack say
their range by their type, such as `vectors: Count = 1`."""

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Annotated, Any, Literal

from fade.errors import FadeError


@dataclass(frozen=True)
class Within:
    """Numbers from `least` to `most`; without `least` itself where they are to be `above` it."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def holds(self, value: Any) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most and not (self.above and value == self.least)

    @property
    def words(self) -> str:
        if self.most < math.inf:
            return f" from {self.least:g} to {self.most:g}"
        return "" if self.least == -math.inf else f" {'above' if self.above else 'of at least'} {self.least:g}"


@dataclass(frozen=True)
class Ascending:
    """Whole numbers from 1 on, each greater than the one before; so many at least."""

    count: int = 1

    def holds(self, values: Any) -> bool:
        whole = all(type(value) is int for value in values)
        return whole and len(values) >= self.count and all(a < b for a, b in zip((0, *values), values, strict=False))


Count = Annotated[int, Within(1)]
Steps = Annotated[int, Within(0)]
"""Of what may also not be done at all."""
Share = Annotated[float, Within(0, 1)]
Amount = Annotated[float, Within(0)]
Rate = Annotated[float, Within(0, above=True)]
Number = Annotated[float, Within()]
Checks = Annotated[tuple[int, ...], Ascending()]
EarlyChecks = Annotated[tuple[int, ...], Ascending(0)]


def told(attack: Any) -> str:
    """An attack's settings as they are read: `vectors=1, iterations=100`."""
    return ", ".join(f"{one.name}={as_text(getattr(attack, one.name))}" for one in fields(attack))


def difference(attack: Any, other: Any) -> str:
    """`told` of the settings that are not another's."""
    pairs = ((one.name, getattr(attack, one.name)) for one in fields(attack))
    return ", ".join(f"{name}={as_text(value)}" for name, value in pairs if value != getattr(other, name))


def usual(variants: Sequence[Any]) -> Any:
    """The settings that a setting of one's own changes: an attack's defaults, and where it has none what its first
    variant has."""
    defaults = {one.name: one.default for one in fields(variants[0]) if one.default is not MISSING}
    return replace(variants[0], **defaults)


def changed(variants: Sequence[Any], texts: Mapping[str, str]) -> Any:
    """An attack with settings by name, as texts. Raises FadeError, telling those that there are."""
    attack = usual(variants)
    hints = typing.get_type_hints(type(attack), include_extras=True)
    known = {one.name: hints[one.name] for one in fields(attack)}
    there_are = f"it has {told(attack)}" if known else "it has none"
    values = {}
    for name, text in texts.items():
        if name not in known:
            raise FadeError(f"the attack {attack.name} has no setting {name!r}; {there_are}")
        try:
            values[name] = _value(text, known[name])
        except ValueError as error:
            raise FadeError(
                f"{name} of the attack {attack.name} is to be {_words(known[name])}, not {text!r}; {there_are}"
            ) from error
    return checked(replace(attack, **values))


def checked(attack: Any) -> Any:
    """The attack. Raises FadeError for a setting out of its range."""
    hints = typing.get_type_hints(type(attack), include_extras=True)
    for one in fields(attack):
        value = getattr(attack, one.name)
        if not _holds(value, hints[one.name]):
            raise FadeError(
                f"{one.name} of the attack {attack.name} is to be {_words(hints[one.name])}, not {as_text(value)}"
            )
    return attack


def as_text(value: Any) -> str:
    """A setting's value as it is read."""
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parts(hint: Any) -> tuple[Any, Any]:
    """The type of a setting, and its range."""
    return typing.get_args(hint)[:2] if typing.get_origin(hint) is Annotated else (hint, Within())


def _value(text: str, hint: Any) -> Any:
    """What a text says. Raises ValueError for what it does not say."""
    kind, _ = _parts(hint)
    if typing.get_origin(kind) is tuple:
        value: Any = tuple(int(part) for part in text.split("/") if part.strip())
    else:
        value = text if typing.get_origin(kind) is Literal else kind(text)
    if not _holds(value, hint):
        raise ValueError(text)
    return value


def _holds(value: Any, hint: Any) -> bool:
    kind, allowed = _parts(hint)
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and allowed.holds(value)
    return (type(value) is int or (kind is float and type(value) is float)) and allowed.holds(value)


def _words(hint: Any) -> str:
    kind, allowed = _parts(hint)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        return "whole numbers from 1 on with / between them, each greater than the one before"
    return f"a {'whole ' if kind is int else ''}number{allowed.words}"
