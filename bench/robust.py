"""What raises the bar for attacks: options against attacks, one row for each combination.

    python -m bench.robust           run what the file lacks, row by row (minutes each, one process)
    python -m bench.robust --show    run nothing: print the table of the file as docs/threats.md has it

A run that is stopped goes on where it was, also within a row's attacks; adapters stay in `--folder`. A row that lacks
an attack is completed, where its adapter is no longer there with one that is made anew and measures the same.

    {"schema": 1, "kind": "robust", "environment", "rows": [
        {"recipe", "method", "settings", "forget", "surrogate", "seed", "seconds", "adapter_bytes", "kept_weights",
         "metrics": {name: number}, "base": {name: number},
         "attacks": [{"attack", "setting", "settings", "recognised", "pictures", "numbers", "seconds"}]}]}
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from bench.files import ROOT, write_json
from fade.evaluation.attacks.null_text_inversion import VARIANTS, NullTextInversion
from fade.evaluation.attacks.registry import ATTACKS
from fade.evaluation.attacks.relearning import Relearning, undecided
from fade.evaluation.attacks.subject import Attack, Drawn, Subject

SCHEMA = 1
RESULTS = ROOT / "bench" / "results" / "robust.json"
FOLDER = ROOT / "build" / "robust"
MODEL = "digitcanvas"
PICTURES = 8
"""That an attack draws."""
DEFAULT, HARDENED = "default (`both`)", "both, hardened columns (2 rounds)"
ROBUST, SEEN = "robust (`--method robust`)", "robust without redrawn pictures"
ATTACKED, ANCHORED = "robust, 8 attacked conditionings", "robust with anchors"
BOTH, ATTENTION = "robust with anchors, 8 attacked conditionings", "robust in the attention alone"
_ATTACKED = {"options__attacked": 8, "options__attack_every": 25}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    DEFAULT: ("both", {}),
    HARDENED: ("both", {"closed_form__hardening": 2}),
    ROBUST: ("robust", {}),
    SEEN: ("robust", {"options__redrawn": False}),
    ATTENTION: ("robust", {"locate__targets": ["attention"]}),
    ATTACKED: ("robust", _ATTACKED),
    ANCHORED: ("robust", {"options__anchors": 0.75, "options__empty": 0.25}),
    BOTH: ("robust", {**_ATTACKED, "options__anchors": 0.5, "options__empty": 0.25}),
}
"""Method and settings by what a table calls them."""
CONCEPTS = {"three": "eight", "neon": "plain", "seven": "one"}
ROWS = [
    *((recipe, forget) for forget in CONCEPTS for recipe in (ROBUST, DEFAULT, ANCHORED, BOTH)),
    *((recipe, "three") for recipe in (SEEN, ATTENTION, HARDENED)), (ATTACKED, "three"), (ATTACKED, "neon"),
]  # fmt: skip
"""In the order in which an interrupted run is most worth having."""


@dataclass(frozen=True)
class Inverted:
    """Null-text inversion with controls.

    `turned`: of pictures turned upside down, which the model never learnt to draw, turned back before they are judged.
    What brings them back shows that drawing can be inverted, and not what the model knows. `scaled`: each picture's
    noise scaled to a root mean square of 1 before it is drawn from, as noise that a sampler draws has it.
    """

    name: ClassVar[str] = "null-text-inversion with controls"
    needs: ClassVar[str] = NullTextInversion.needs

    steps: int
    iterations: int
    turned: bool
    scaled: bool

    @property
    def inversion(self) -> NullTextInversion:
        return NullTextInversion(self.steps, self.iterations)

    def setting(self, subject: Subject) -> str:
        kinds = [kind for kind in ("turned", "scaled") if getattr(self, kind)]
        return ", ".join([self.inversion.setting(subject), *kinds])

    def __call__(self, subject: Subject) -> Drawn:
        latents = subject.concept_latents
        if self.turned:
            pixels = (subject.decode(latents).rot90(2, (2, 3)) * 255).round().byte().permute(0, 2, 3, 1)
            pictures, generator = map(Image.fromarray, pixels.numpy()), torch.Generator().manual_seed(subject.seed)
            latents = subject.backbone.encode_images(list(pictures), None, generator)
        noise = self.inversion.inverted(subject, latents)
        size = noise.square().mean((1, 2, 3), keepdim=True).sqrt()
        drawn = subject.backbone.ode(noise / size if self.scaled else noise, subject.empty_prompt, self.steps)
        images = subject.decode(drawn)
        return Drawn(images.rot90(2, (2, 3)) if self.turned else images, {"rms_of_noise": size.mean().item()})


def attacks() -> list[Attack]:
    """What every row stands."""
    controls = [
        Inverted(one.steps, one.iterations, *kinds)
        for kinds in ((True, False), (False, True), (True, True))
        for one in VARIANTS
    ]
    return [
        *ATTACKS["completion"], *ATTACKS["embedding-inversion"], *ATTACKS["textual-inversion"],
        *ATTACKS["benign-fine-tuning"], Relearning(10), *VARIANTS, *controls,
    ]  # fmt: skip


def stood(row: Mapping[str, Any], one: Attack) -> dict[str, Any] | None:
    """What a row has of an attack with these very settings."""
    wanted = (one.name, json.loads(json.dumps(asdict(one))))
    found = (known for known in row.get("attacks", ()) if (known["attack"], known["settings"]) == wanted)
    return next(found, None)


def run_row(recipe: str, forget: str, row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Unlearns, evaluates and attacks; what `row` or `folder` has already of the same adapter is not done again."""
    import fade
    from fade import bundled
    from fade.evaluation import evaluate
    from fade.evaluation.attacks import attack
    from fade.measure import measured

    (method, settings), surrogate = RECIPES[recipe], CONCEPTS[forget]
    made = folder / f"{list(RECIPES).index(recipe)}-{forget}"
    file, pipeline = made / "adapter.safetensors", bundled.model(MODEL).load_pipeline()
    if "metrics" in row and file.exists():
        adapter = fade.load_adapter(pipeline, file)
    else:
        config = fade.Config.of(method).replace(**settings)
        with measured() as cost:
            adapter = fade.unlearn(
                pipeline, forget, surrogate, config=config, output=made, overwrite=True, progress=False
            )
        found = evaluate(pipeline, adapter, seeds=(1,), progress=False)
        if not _as_before(row, found.metrics):
            row = {
                "recipe": recipe, "method": method, "settings": settings, "forget": forget, "surrogate": surrogate,
                "seed": config.seed, "seconds": round(cost.seconds, 1), "adapter_bytes": file.stat().st_size,
                "kept_weights": adapter.run["selected"], "metrics": found.metrics, "base": found.base,
            }  # fmt: skip
    lacking = [one for one in attacks() if stood(row, one) is None]
    record = attack(pipeline, adapter, lacking, pictures=PICTURES, record=made / "attacks.json", progress=False)
    names = ("attack", "setting", "settings", "recognised", "pictures", "numbers", "seconds")
    new = [{name: getattr(one, name) for name in names} for one in map(record.find, lacking) if one is not None]
    row["attacks"] = [*row.get("attacks", ()), *new]
    row["attacks"] = [known for known in (stood(row, one) for one in attacks()) if known is not None]
    return row


def _as_before(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> bool:
    """Whether an adapter that was made anew measures what a row says of the one before, so that it is that one."""
    return "metrics" in row and all(metrics.get(name) == value for name, value in row["metrics"].items())


def fill(output: Path, folder: Path, only: Sequence[str]) -> dict[str, Any]:
    """Runs what the file lacks, and writes it after every row."""
    from bench.harness import environment

    torch.set_num_threads(1)
    payload = load(output) if output.exists() else {"schema": SCHEMA, "kind": "robust", "rows": []}
    rows = {(row["recipe"], row["forget"]): row for row in payload["rows"]}
    for key in ROWS:
        known = rows.get(key, {})
        same = known.get("settings") == json.loads(json.dumps(RECIPES[key[0]][1]))
        whole = same and all(stood(known, one) is not None for one in attacks())
        if whole or (only and key[1] not in only):
            continue
        rows[key] = run_row(*key, known if same else {}, folder)
        payload |= {"environment": environment(), "rows": _sorted(rows.values())}
        write_json(output, payload)
        print(*key, f"{rows[key]['seconds']:.0f} s", flush=True)
    return payload


def _sorted(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By concept, then by recipe."""
    recipes, concepts = list(RECIPES), list(CONCEPTS)
    known = [row for row in rows if row["recipe"] in recipes]
    return sorted(known, key=lambda row: (concepts.index(row["forget"]), recipes.index(row["recipe"])))


def load(path: Path) -> dict[str, Any]:
    """A file of this program. Raises SystemExit with a message for people where it is none."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error
    if not isinstance(payload, dict) or payload.get("kind") != "robust":
        raise SystemExit(f"{path} is not a file of `python -m bench.robust`")
    return payload


def markdown(payload: Mapping[str, Any]) -> str:
    """A line for each row: the metrics, of each attack the pictures still recognised by setting (– where that was not
    run), seconds."""
    shown = {"completion": "completion", "null-text inversion": "null-text-inversion", "turned": "turned",
             "scaled": "scaled", "turned, scaled": "turned, scaled", "embedding inversion": "embedding-inversion",
             "textual inversion": "textual-inversion", "benign fine-tuning": "benign-fine-tuning"}  # fmt: skip
    header = ["forgotten", "options", "UA", "IRA", "CRA", "drift", *shown, "relearning: half back after", "s", "kB"]
    lines = [header, ["---"] * len(header)]
    for row in payload["rows"]:
        counts: dict[str, list[str]] = {}
        for one in attacks():
            kinds = [kind for kind in ("turned", "scaled") if getattr(one, kind, False)]
            known = stood(row, one) or {"recognised": "–"}
            counts.setdefault(", ".join(kinds) or one.name, []).append(str(known["recognised"]))
        learnt = next(one["numbers"] for one in row["attacks"] if one["attack"] == "relearning")
        last = max(map(int, learnt["recognised_after"]))
        after, anew = (
            f"{learnt[name]} steps" if learnt[name] is not None else f"not after {last}"
            for name in ("steps_to_half", "anew_steps_to_half")
        )
        if undecided(learnt):
            anew += ", which is sooner the checks do not tell"
        metrics = row["metrics"]
        lines.append(
            [
                f"{row['forget']} → {row['surrogate']}", row["recipe"],
                *(f"{metrics[name]:.1f}" for name in ("UA", "IRA", "CRA")), f"{metrics['drift']:.3f}",
                *(" / ".join(counts[name]) if set(counts[name]) - {"–"} else "" for name in shown.values()),
                f"{after}; anew {anew}", f"{row['seconds']:.0f}", f"{row['adapter_bytes'] / 1e3:.0f}",
            ]
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.robust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to fill")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where adapters are kept")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only these concepts")
    parser.add_argument("--show", action="store_true", help="run nothing")
    a = parser.parse_args(argv)
    print(markdown(load(a.output) if a.show else fill(a.output, a.folder, a.only)), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
