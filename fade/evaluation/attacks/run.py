"""Runs attacks one after the other: draws, has the pictures judged, and keeps a record that an interrupted run goes on
from."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones import backbone_for
from fade.bundled import drawing
from fade.concept import pairs_in, substitute
from fade.errors import FadeError, printable
from fade.evaluation.answers import AnswerSet, first_seeds
from fade.evaluation.attacks.registry import chosen_attacks, setting_of
from fade.evaluation.attacks.subject import Attack, CannotAttackError, Drawn, Subject
from fade.evaluation.drawings import Kept
from fade.evaluation.intervals import wilson_interval
from fade.evaluation.judging import judge_for
from fade.evaluation.metrics.unlearncanvas import Target
from fade.files import atomic_write, check_writable, remove_parts
from fade.images import listed
from fade.modes import plain_mode
from fade.pictures import TILE, data_uri, strip

if TYPE_CHECKING:
    from rich.table import Table

    from fade.adapter import Adapter

_MOST_COLUMNS = 12
"""Pictures side by side in a sheet."""


@dataclass
class AttackResult:
    """What one attack brought back."""

    attack: str
    setting: str
    recognised: int
    """Pictures that the judge still recognises as the concept."""
    pictures: int
    seconds: float
    """By the clock; what was kept by an earlier run took none."""
    settings: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    """The attack's own, such as losses."""
    found: str = ""
    """What the count does not tell, such as the steps that it took."""
    needs: str = ""
    """What whoever attacks must have."""
    sheet: str = field(default="", repr=False)
    """The pictures side by side: WebP as a data URI."""
    images: Tensor | None = field(default=None, repr=False, compare=False)
    """The pictures, float32 [n, 3, H, W] in [0, 1]; None where the result comes from a file."""

    @property
    def told(self) -> str:
        """The setting, and what was found with it."""
        return f"{self.setting} ({self.found})" if self.found else self.setting

    @property
    def rate(self) -> float:
        """Attack success rate in percent."""
        return 100.0 * self.recognised / self.pictures

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate, in percent; pictures count as independent draws, as in `evaluate`."""
        low, high = wilson_interval(self.recognised, self.pictures)
        return 100.0 * low, 100.0 * high

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "attack": self.attack,
            "setting": self.setting,
            "still_recognised": self.rate,
            "interval_95": {"images": self.pictures, "low": low, "high": high},
            "recognised": self.recognised,
            "pictures": self.pictures,
            "seconds": self.seconds,
            "settings": self.settings,
            "numbers": self.numbers,
            "found": self.found,
            "needs": self.needs,
            "sheet": self.sheet,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> AttackResult:
        """Raises KeyError, TypeError or ValueError for what `to_dict` did not write."""
        record = {"found": "", **record}  # which earlier versions did not tell
        result = cls(**{name: record[name] for name in cls.__dataclass_fields__ if name != "images"})
        texts = (result.attack, result.setting, result.found, result.needs, result.sheet)
        counts = (result.recognised, result.pictures)
        if not (
            all(isinstance(text, str) for text in texts)
            and all(type(count) is int for count in counts)
            and 0 <= result.recognised <= result.pictures
            and result.pictures > 0
            and isinstance(result.seconds, int | float)
            and isinstance(result.settings, dict)
            and isinstance(result.numbers, dict)
        ):
            raise ValueError("a result has other fields")
        return result


@dataclass
class AttackRecord:
    """Every attack on one adapter, beside what base and adapted model draw when nobody attacks."""

    forget: str
    surrogate: str | None
    path: str | None
    """Where the edit sits: `text path`, `denoiser`, `both`, or None where the adapter's file does not tell."""
    settings: dict[str, Any]
    model: str
    """Digest of everything that the pictures depend on, the adapter included."""
    base: AttackResult
    """The base model draws the concept."""
    unattacked: AttackResult
    """So does the adapted one."""
    results: list[AttackResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Attacks that were asked for and cannot take this model, by name, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, the pictures as data URIs."""
        return {
            "forget": self.forget,
            "surrogate": self.surrogate,
            "path": self.path,
            "settings": self.settings,
            "model": self.model,
            "base": self.base.to_dict(),
            "unattacked": self.unattacked.to_dict(),
            "results": [result.to_dict() for result in self.results],
            "left_out": self.left_out,
        }

    def find(self, attack: Attack) -> AttackResult | None:
        """The result of an attack with these very settings."""
        wanted = (attack.name, json.loads(json.dumps(asdict(attack))))
        return next((result for result in self.results if (result.attack, result.settings) == wanted), None)

    def table(self) -> Table:
        """As a rich table: how many pictures are still recognised, beside base model and no attack."""
        from rich.markup import escape
        from rich.table import Table

        title = f"attacks on forgetting {self.forget!r}: pictures still recognised, of {self.base.pictures}"
        table = Table(title=escape(printable(title)), title_justify="left")
        for name in ("attack", "setting"):
            table.add_column(name)
        for name in ("recognised %", "95 %", "base", "no attack", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        for result in self.results:
            low, high = result.interval
            table.add_row(
                escape(printable(result.attack)), escape(printable(result.told)), f"{result.rate:.1f}",
                f"{low:.1f}–{high:.1f}", f"{self.base.rate:.1f}", f"{self.unattacked.rate:.1f}",
                f"{result.seconds:.1f}",
            )  # fmt: skip
        return table


@plain_mode()
def attack(
    pipeline: Any,
    adapter: Adapter,
    attacks: Sequence[str | Attack] | None = None,
    *,
    forget: str | None = None,
    pictures: int = 24,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    judge: str | None = None,
    classes: Sequence[str] = (),
    record: str | Path | None = None,
    overwrite: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> AttackRecord:
    """Tries to get the forgotten concept back, and counts the pictures that a judge still recognises as it.

    Args:
        adapter: the attached `fade.Adapter`; its metadata names the concept. It is enabled when this returns.
        attacks: names of `ATTACKS`, or attacks with settings of your own, as objects (`TextualInversion(3)`) or texts
            (`"textual-inversion:vectors=3,iterations=500"`); all of `ATTACKS` by default.
        forget: which concept to bring back, where the adapter forgets several.
        pictures: that each attack draws: every forget prompt in turn, then again with the next seed.
        steps: denoising steps per picture, where an attack has no number of its own; None as for `fade.evaluate`.
        guidance_scale: classifier-free guidance, where an attack uses any; None as for `fade.evaluate`.
        batch_size: pictures drawn at once.
        seed: of everything random in the attacks but the noise that pictures begin from.
        judge, classes: as for `fade.evaluate`.
        record: JSON file that is written after every attack. One that holds attacks on the same adapter with the same
            settings is gone on with: nothing in it is done again, and what it holds beside is kept.
        overwrite: begin anew where `record` holds something else.
        cache: folder in which what depends on the base model alone (what it draws, words found by its text encoder,
            learning anew) is kept and looked for, as for `fade.evaluate`: it is done once for all adapters. None keeps
            nothing beyond this call.

    Raises:
        FadeError: an unknown attack, or a setting or value that it does not have, no judge that knows the concept,
            settings out of range, or a `record` of something else; in each case before anything is drawn. An attack
            that cannot take the model (`CannotAttackError`), or for which the device has too little memory, is left
            out, and the record says why.
    """
    wanted = chosen_attacks(attacks)
    if pictures < 1:
        raise FadeError(f"an attack needs at least one picture, not {pictures}")
    if record is not None:
        check_writable(record)
    concept = adapter.metadata["concept"]
    backbone, drawn_as = backbone_for(pipeline), drawing(pipeline, steps, guidance_scale)
    backbone.check_trainable()
    asked = judge_for(pipeline, concept, judge, classes, backbone.device)
    target = _target(asked.answers(first_seeds(1)), forget)
    prompts = int(target.named(asked.answers(first_seeds(1)).prompted).sum())
    answers = asked.answers(first_seeds(math.ceil(pictures / prompts)))
    rows = target.named(answers.prompted).nonzero().flatten()[:pictures]
    word, surrogate = answers.words(target)
    pair = next(pair for pair in pairs_in(concept) if pair.forget.strip() == word)
    subject = Subject(
        backbone=backbone,
        adapter=adapter.enable(),
        prompts=tuple(answers.prompts[row] for row in rows.tolist()),
        seeds=tuple(answers.seeds[row] for row in rows.tolist()),
        recognised=lambda images: asked.heads[target.domain](images) == target.forget,
        forget=word,
        surrogates=tuple(
            substitute(answers.prompts[row], word, pair.surrogate, apart=pair.apart) for row in rows.tolist()
        ),
        retained=tuple(concept.get("retain_prompts", ())),
        steps=drawn_as.steps,
        guidance_scale=drawn_as.guidance_scale,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        kept=Kept(cache),
    )
    settings = {
        "judge": asked.name,
        "pictures": pictures,
        **vars(drawn_as),
        "seed": seed,
        "scale": sorted(set(adapter.scales.values())),
        "classes": list(answers.classes[target.domain]),
        "prompts": list(dict.fromkeys(subject.prompts)),
    }
    model = hashlib.sha256(json.dumps(subject.digests, sort_keys=True).encode()).hexdigest()
    columns = min(prompts, _MOST_COLUMNS)

    def measure(
        name: str, setting: str, draw: Callable[[], Drawn], needs: str = "", options: dict[str, Any] | None = None
    ) -> AttackResult:
        start = time.perf_counter()
        try:
            drawn = draw()
        finally:
            adapter.enable()
        seconds = time.perf_counter() - start
        return AttackResult(
            attack=name,
            setting=setting,
            recognised=int(subject.recognised(drawn.images).sum()),
            pictures=len(drawn.images),
            seconds=round(seconds, 2),
            settings=options or {},
            numbers=drawn.numbers,
            found=drawn.found,
            needs=needs,
            sheet=data_uri(strip(drawn.images, columns=columns), exact=drawn.images.shape[-1] <= TILE),
            images=drawn.images,
        )

    def save() -> None:
        if record is not None:
            with atomic_write(record) as temporary:
                temporary.write_text(json.dumps(found.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8")

    found = None if record is None or overwrite else _earlier(Path(record), model, settings)
    if record is not None:
        remove_parts(record)
    if found is None:

        def adapted() -> Drawn:
            return Drawn(subject.decode(subject.adapted_latents))

        found = AttackRecord(
            forget=word,
            surrogate=surrogate,
            path=adapter.run.get("path"),
            settings=settings,
            model=model,
            base=measure("none", "base model", lambda: Drawn(subject.decode(subject.concept_latents))),
            unattacked=measure("none", "adapted model", adapted),
        )
        save()
    for one in wanted:
        if found.find(one) is None:
            options = json.loads(json.dumps(asdict(one)))
            try:
                result = measure(one.name, setting_of(one, subject), lambda one=one: one(subject), one.needs, options)
            except CannotAttackError as error:
                found.left_out[one.name] = str(error)
            except torch.OutOfMemoryError:
                found.left_out[one.name] = (
                    f"the memory of {backbone.device} does not hold it ({setting_of(one, subject)}); draw fewer "
                    "pictures at once, or attack on a device of more memory"
                )
            else:
                found.results.append(result)
                found.left_out.pop(one.name, None)
            save()
    return found


def _target(answers: AnswerSet, forget: str | None) -> Target:
    """The concept to attack. Raises FadeError where there are several and none of them is named."""
    by_word = {answers.words(target)[0]: target for target in answers.targets}
    if forget is None and len(by_word) > 1:
        raise FadeError(
            f"the adapter forgets {listed(list(by_word))}; name the one to bring back: --forget {next(iter(by_word))}"
        )
    if forget is not None and forget not in by_word:
        raise FadeError(f"the adapter does not forget {forget!r}, but {listed(list(by_word))}")
    return answers.targets[0] if forget is None else by_word[forget]


def _earlier(path: Path, model: str, settings: dict[str, Any]) -> AttackRecord | None:
    """What a file has of the same attack; None where there is no file.

    Raises FadeError for a file that is no such record, or one of another adapter or other settings.
    """
    if not path.exists():
        return None
    instead = "name another file, or replace it with --overwrite"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = AttackRecord(
            **{name: record[name] for name in ("forget", "surrogate", "path", "settings", "model")},
            base=AttackResult.from_dict(record["base"]),
            unattacked=AttackResult.from_dict(record["unattacked"]),
            results=[AttackResult.from_dict(result) for result in record["results"]],
            left_out=dict(record.get("left_out", {})),
        )
        theirs = dict(found.settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FadeError(f"{path} is there already and is no record of attacks; {instead}") from error
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise FadeError(f"{path} holds attacks with {name} = {theirs.get(name)}, not {value}; {instead}")
    if found.model != model:
        raise FadeError(f"{path} holds attacks on another adapter or another base model; {instead}")
    return found
