"""What each attack brings back of a digit and of a style that the default method has forgotten: the numbers of
docs/threats.md.

    python -m bench.threats              run what the file lacks, attack by attack (minutes, one process of one thread)
    python -m bench.threats --show       run nothing: print the table of the file
    python -m bench.threats --markdown   the same, as docs/threats.md has it

Two adapters for DigitCanvas are made with the default settings and attacked with everything that `fade attack` has.
They stay in `--folder` with their pictures; a run that is stopped goes on at the attack where it was. Processor seconds
are of one thread, the first time: nothing of the base model was kept before.

    {"schema": 1, "kind": "threats", "environment", "rows": [
        {"forget", "surrogate", "seed", "method", "seconds", "adapter_bytes", "metrics": {name: number}, "pictures",
         "base", "unattacked", "left_out": {attack: why}, "cpu_seconds": {attack: seconds},
         "attacks": [{"attack", "setting", "settings", "recognised", "pictures", "numbers", "found"}]}]}
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.files import ROOT, load_kind, write_json
from fade.evaluation.attacks.relearning import undecided

SCHEMA = 1
RESULTS = ROOT / "bench" / "results" / "threats.json"
FOLDER = ROOT / "build" / "threats"
MODEL = "digitcanvas"
CONCEPTS = {"three": "eight", "neon": "plain"}
"""To forget, a digit and a style, and what takes their place."""
PICTURES = 24
"""That an attack draws."""
SHOWN = ("attack", "setting", "settings", "recognised", "pictures", "numbers", "found")


@dataclass(frozen=True)
class Threat:
    """A line of the table: who attacks how, and what is promised. `settings` are those that it is about; `told` is what
    stands behind the attack's name."""

    who: str
    can: str
    attack: str
    promised: str
    told: str = ""
    settings: Callable[[Mapping[str, Any]], bool] = lambda settings: True


NOTHING = "nothing"
THREATS = (
    Threat(
        "**a prompt**: a service that draws what is typed", "ask plainly", "",
        "the concept's prompts and the templates it was made with draw the surrogate, as far as the report's UA says",
    ),
    Threat(
        "a prompt, and a copy of the text encoder", "search words that it takes for the concept", "token-search",
        "nothing: words that were in no template are not covered. Held-out phrasings are counted by "
        "`fade evaluate --phrasings`",
    ),
    Threat(
        "a prompt, and once the weights", "search words with gradients", "prompt-tokens", NOTHING,
        "three words before the prompt",
    ),
    Threat(
        "**an embedding**: a program that loads textual inversions", "train a new word elsewhere, load it here",
        "textual-inversion", NOTHING, "1 / 5 vectors",
    ),
    Threat(
        "conditionings of their own (an API that takes embeddings)", "train the conditioning", "embedding-inversion",
        "nothing: an edit of the text path changes what words mean, not what the denoiser can draw",
    ),
    Threat("**the sampler**", "draw with more noise", "noise-probe", NOTHING, "η 1 / 1.28 / 1.57 / 1.85"),
    Threat(
        "two models", "let the base model begin, after 2 / 5 / 10 of 20 steps the adapted one", "completion",
        "nothing: what is in the picture is not taken out of it",
    ),
    Threat(
        "**a picture of the concept**", "noise it and draw on, at strength 0.6 / 0.8", "image-to-image", NOTHING
    ),
    Threat(
        "a picture", "hide its lower / right half and have it drawn", "inpainting",
        "nothing: the half that is shown is the concept's",
    ),
    Threat(
        "a picture, and the sampler", "invert it without a word and draw it again, plainly / as a fixed point",
        "null-text-inversion", "nothing, as for embeddings",
    ),
    Threat(
        "**merged weights**, no attack meant", "quantise to int8 / fp8 / 4 bits", "quantising",
        "nothing; the edit is of single weights, so rounding could take it",
    ),
    Threat("merged weights", "prune 10 / 30 % of every weight", "pruning", NOTHING),
    Threat("merged weights", "train on for 100 steps with other pictures", "benign-fine-tuning", NOTHING),
    Threat(
        "merged weights and pictures", "fine-tune the edited layers on 1 / 5 / 10 / 50 pictures", "relearning", NOTHING,
        settings=lambda settings: settings["layers"] == "edited",
    ),
    Threat(
        "merged weights and pictures", "fine-tune every layer on 10 pictures", "relearning", NOTHING,
        settings=lambda settings: settings["layers"] == "every",
    ),
    Threat(
        "**the adapter's file** or a switch for it", "take it off", "removal",
        "that it is exact: every base weight has its bits back. Whoever must not have the concept must not have this",
    ),
)  # fmt: skip


# --- what is run -----------------------------------------------------------------------------------------------------


def fill(output: Path, folder: Path) -> dict[str, Any]:
    """Runs what the file lacks, and writes it after every attack."""
    import torch

    from bench.harness import environment
    from fade.evaluation.attacks import ATTACKS, attack

    torch.set_num_threads(1)
    payload = load_kind(output, "threats") if output.exists() else {"schema": SCHEMA, "kind": "threats", "rows": []}
    rows = {row["forget"]: row for row in payload["rows"]}
    for forget in CONCEPTS:
        if not any(_lacks(rows.get(forget, {}), name) for name in ATTACKS):
            continue
        made = folder / forget
        adapter, row = _made(forget, made, rows.get(forget))
        for name in [name for name in ATTACKS if _lacks(row, name)]:
            start = time.process_time()
            record = attack(
                adapter.pipeline, adapter, [name], pictures=PICTURES, record=made / "attacks.json",
                cache=made / "kept", progress=False,
            )  # fmt: skip
            found = [one for one in map(record.find, ATTACKS[name]) if one is not None]
            row["attacks"] = [one for one in row["attacks"] if one["attack"] != name]
            row["attacks"] += [{key: getattr(one, key) for key in SHOWN} for one in found]
            row["cpu_seconds"][name] = round(time.process_time() - start, 1)
            row["left_out"] |= record.left_out
            row |= {"pictures": PICTURES, "base": record.base.recognised, "unattacked": record.unattacked.recognised}
            rows[forget] = row
            payload |= {"environment": environment(), "rows": [rows[one] for one in CONCEPTS if one in rows]}
            write_json(output, payload)
            print(f"{forget}, {name}: {row['cpu_seconds'][name]:.0f} s", file=sys.stderr, flush=True)
    return payload


def _lacks(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row is without an attack, or without one of its settings as they are now."""
    from fade.evaluation.attacks import ATTACKS

    done = [one["settings"] for one in row.get("attacks", ()) if one["attack"] == name]
    wanted = [json.loads(json.dumps(asdict(one))) for one in ATTACKS[name]]
    return name not in row.get("left_out", {}) and any(settings not in done for settings in wanted)


def _made(forget: str, folder: Path, row: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The adapter, attached to a model, and its row: those that there are, or new ones."""
    import fade
    from fade import bundled
    from fade.measure import measured

    file, pipeline = folder / "adapter.safetensors", bundled.model(MODEL).load_pipeline()
    if row is not None and file.exists():
        return fade.load_adapter(pipeline, file), row
    config = fade.Config()
    with measured() as cost:
        adapter = fade.unlearn(
            pipeline, forget, CONCEPTS[forget], config=config, output=folder, overwrite=True, progress=False
        )
    found = fade.evaluate(pipeline, adapter, seeds=(1,), progress=False)
    (folder / "attacks.json").unlink(missing_ok=True)  # on another adapter
    return adapter, {
        "forget": forget, "surrogate": CONCEPTS[forget], "seed": config.seed, "method": config.overwrite.method,
        "seconds": round(cost.seconds, 1), "adapter_bytes": file.stat().st_size, "metrics": found.metrics,
        "left_out": {}, "cpu_seconds": {}, "attacks": [],
    }  # fmt: skip


# --- what is shown ---------------------------------------------------------------------------------------------------


def lines(payload: Mapping[str, Any]) -> list[list[str]]:
    """Header, and a line for each of `THREATS` with what it brought back of each concept."""
    rows = payload["rows"]
    concepts = [f"{row['forget']} → {row['surrogate']} (base model {row['base']})" for row in rows]
    table = [["who has", "can", "attack", "promised", *concepts]]
    for threat in THREATS:
        named = f"`{threat.attack}`" if threat.attack else "–"
        named += f" ({threat.told})" if threat.told else ""
        table.append([threat.who, threat.can, named, threat.promised, *(_cell(threat, row) for row in rows)])
    return table


def _cell(threat: Threat, row: Mapping[str, Any]) -> str:
    """Pictures recognised by setting, and what the attack says beside."""
    if not threat.attack:
        return str(row["unattacked"])
    found = [one for one in row["attacks"] if one["attack"] == threat.attack and threat.settings(one["settings"])]
    if not found:
        return "cannot" if threat.attack in row["left_out"] else "not run"
    counts, numbers = _several(one["recognised"] for one in found), [one["numbers"] for one in found]
    if threat.attack == "relearning":
        half, anew = (_several(one[name] for one in numbers) for name in ("steps_to_half", "anew_steps_to_half"))
        last = _several(max(map(int, one["recognised_after"])) for one in numbers)
        which = _several(one["settings"]["pictures"] for one in found if undecided(one["numbers"]))
        of = f" of {which} pictures" if len(found) > 1 else ""
        open_ = f" (the checks do not tell which is sooner{of})" if which else ""
        return f"half back at {half} steps, learnt anew at {anew}{open_}; {counts} after {last}"
    if all("base_recognised" in one for one in numbers):
        return f"{counts} (base model {_several(one['base_recognised'] for one in numbers)})"
    if all("pictures_equal_base" in one for one in numbers):
        same = all(one["pictures_equal_base"] for one in numbers)
        return f"{counts}, {'' if same else 'not '}the base model's pictures bit for bit"
    return counts


def _several(values: Iterable[Any]) -> str:
    return " / ".join("never" if value is None else str(value) for value in values)


def markdown(payload: Mapping[str, Any]) -> str:
    """As docs/threats.md has it."""
    header, *rows = lines(payload)
    text = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*text, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.threats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to fill")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where adapters and pictures are kept")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--markdown", action="store_true", help="run nothing, and print as docs/threats.md has it")
    a = parser.parse_args(argv)
    payload = load_kind(a.output, "threats") if a.show or a.markdown else fill(a.output, a.folder)
    if a.markdown:
        print(markdown(payload), end="")
        return 0
    header, *rows = lines(payload)
    for line in rows:
        print(f"{line[2].strip('`'):45}", *(f"{name}: {cell}" for name, cell in zip(header[4:], line[4:], strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
