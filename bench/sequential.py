"""Twelve requests to forget, one after another, as they come in: what each method has forgotten and kept after each.

    python -m bench.sequential [--methods closed-form both uce speed …] [--show] [--markdown]

The requests and their order are `bench_stack`'s. Each is made on DigitCanvas with what was made for the requests before
it on, and told what that forgets (`fade.unlearn(beside=…)`), so that the changes add up; like every adapter it is made
against the base model's weights. An earlier one could not know of a later. After each the sum is measured: UA over
everything that was forgotten so far (mean and least), IRA, CRA and drift of what is left, seconds. At the end one
concept is taken back: how much of it is recognised again, and whether the others stay forgotten. A method that cannot
go on says why, in its last row.

What is made stays in `--folder`; a run that is stopped goes on at the request where it was.

    {"schema": 1, "kind": "sequential", "environment", "concepts": {forget: surrogate}, "seeds",
     "rows": [{"method", "request": 1 …, "forget", "UA", "UA_least", "IRA", "CRA", "drift", "seconds",
               "adapter_bytes"} | {"method", "request", "forget", "reason"}],
     "taken_back": [{"method", "back", "back_shown", "UA", "UA_least", "IRA", "CRA", "drift"}]}
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.bench_stack import CONCEPTS, measure
from bench.files import ROOT, load_kind, write_json

SCHEMA = 1
RESULTS = ROOT / "bench" / "results" / "sequential.json"
FOLDER = ROOT / "build" / "sequential"
DEFAULT = ("closed-form", "both", "uce", "speed", "concept-ablation", "loku")
BACK = "three"
"""The concept that is taken back at the end."""
SHOWN = (1, 4, 8, len(CONCEPTS))
"""Requests after which the printed table tells."""


class Requests:
    """The requests of one method on a pipeline. Their adapters are kept in a folder, and found there again."""

    def __init__(self, pipeline: Any, method: str, folder: Path, seeds: int) -> None:
        self._pipeline, self._method, self._folder, self._seeds = pipeline, method, folder / method, seeds
        self._baseline: Any = None

    def measure(self, number: int) -> dict[str, Any]:
        """The numbers after so many requests; adapters that are not there are made. Raises FadeError where one cannot
        be."""
        from fade.adapter_file import read_adapter_file

        for earlier in range(1, number + 1):
            if not self._file(earlier).exists():
                self._make(earlier)
        found = read_adapter_file(self._file(number))
        costs = {"seconds": sum(found.metadata["run"]["seconds"].values()), "adapter_bytes": found.bytes}
        return self._measured(self._sum_of(number)) | costs

    def take_back(self, concept: str) -> dict[str, Any]:
        """The numbers of all requests without one."""
        import fade

        rest = self._folder / "rest.safetensors"
        fade.combine_adapters([self._sum_of(len(CONCEPTS))], rest, without=[concept], overwrite=True)
        return self._measured(rest, concept)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:02d}-{list(CONCEPTS)[number - 1]}" / "adapter.safetensors"

    def _make(self, number: int) -> None:
        import fade

        before = [fade.load_adapter(self._pipeline, self._sum_of(number - 1), "before")] if number > 1 else []
        try:
            fade.unlearn(
                self._pipeline, *list(CONCEPTS.items())[number - 1], method=self._method, beside=before,
                output=self._file(number).parent, overwrite=True, progress=False,
            ).remove()  # fmt: skip
        finally:
            for adapter in before:
                adapter.remove()

    def _sum_of(self, requests: int) -> Path:
        """The file of the first requests added up."""
        import fade

        path = self._folder / "sum.safetensors"
        fade.combine_adapters([self._file(number) for number in range(1, requests + 1)], path, overwrite=True)
        return path

    def _measured(self, file: Path, back: str | None = None) -> dict[str, Any]:
        row, self._baseline = measure(self._pipeline, file, self._seeds, self._baseline, back)
        return row


def fill(methods: Sequence[str], output: Path, folder: Path, seeds: int) -> dict[str, Any]:
    """Does what the file lacks, and writes it after every request. Raises SystemExit where it is of other pictures."""
    from bench.harness import environment
    from fade.digitcanvas import load_pipeline
    from fade.errors import FadeError
    from fade.progress import progress_bar

    settings = {"concepts": CONCEPTS, "seeds": seeds}
    empty = {"schema": SCHEMA, "kind": "sequential", **settings, "rows": [], "taken_back": []}
    payload = load_kind(output, "sequential") if output.exists() else empty
    if {name: payload[name] for name in settings} != settings:
        raise SystemExit(f"{output} is of other concepts or seeds; name another file: --output FILE")

    def save() -> None:
        payload["environment"] = environment()
        write_json(output, payload)

    pipeline = load_pipeline()
    with progress_bar("requests", len(methods) * len(CONCEPTS), True) as advance:
        for method in methods:
            requests = Requests(pipeline, method, folder, seeds)
            for number, forget in enumerate(CONCEPTS, 1):
                done = [row for row in payload["rows"] if row["method"] == method]
                if len(done) < number and not any("reason" in row for row in done):
                    row: dict[str, Any] = {"method": method, "request": number, "forget": forget}
                    try:
                        row |= requests.measure(number)
                    except FadeError as reason:
                        row["reason"] = str(reason)
                    payload["rows"].append(row)
                    save()
                advance(f"{method}, {forget}")
            finished = sum(row["method"] == method and "reason" not in row for row in payload["rows"])
            if finished == len(CONCEPTS) and method not in {row["method"] for row in payload["taken_back"]}:
                payload["taken_back"].append({"method": method, **requests.take_back(BACK)})
                save()
    return payload


# --- what is shown ---------------------------------------------------------------------------------------------------


def lines(payload: dict[str, Any]) -> list[list[str]]:
    """Header and one line a method: UA (least) and IRA after some of the requests, drift and CRA after the last, the
    median seconds and kB of a request, and what taking one back does."""
    from statistics import median

    curves = (f"{name} after {number}" for number in SHOWN for name in ("UA", "IRA"))
    table = [["method", *curves, "CRA", "drift", "s", "kB", f"{BACK} back", "UA of the rest"]]
    for method in dict.fromkeys(row["method"] for row in payload["rows"]):
        own = {row["request"]: row for row in payload["rows"] if row["method"] == method and "reason" not in row}
        line = [method]
        for number in SHOWN:
            row = own.get(number)
            line += ["-", "-"] if row is None else [f"{row['UA']:.1f} ({row['UA_least']:.0f})", f"{row['IRA']:.1f}"]
        if own:
            last, rows = own[max(own)], own.values()
            line += [f"{last['CRA']:.1f}" if last["CRA"] is not None else "-", f"{last['drift']:.3f}"]
            line += [f"{median(row['seconds'] for row in rows):.1f}"]
            line += [f"{median(row['adapter_bytes'] for row in rows) / 1e3:.0f}"]
        back = next((row for row in payload["taken_back"] if row["method"] == method), None)
        line += [f"{back['back_shown']:.1f}", f"{back['UA']:.1f} ({back['UA_least']:.0f})"] if back else []
        table.append([*line, *["-"] * (len(table[0]) - len(line))])
    return table


def reasons(payload: dict[str, Any]) -> list[str]:
    """Why a method did not go on."""
    return [
        f"{row['method']} stopped at {row['forget']!r}, request {row['request']}: {row['reason']}"
        for row in payload["rows"]
        if "reason" in row
    ]


def markdown(payload: dict[str, Any]) -> str:
    header, *rows = lines(payload)
    text = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    text += ["| " + " | ".join(row) + " |" for row in rows]
    text += ["", *(f"- {reason}" for reason in reasons(payload))]
    return "\n".join(text).rstrip() + "\n"


def draw(payload: dict[str, Any], path: Path) -> None:
    """UA and IRA against the number of requests, a line a method; a figure without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"UA": "UA: forgotten, of all so far", "UA_least": "UA of the concept least forgotten", "IRA": "IRA: kept"}
    for axes, (name, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for index, method in enumerate(dict.fromkeys(row["method"] for row in payload["rows"])):
            own = [row for row in payload["rows"] if row["method"] == method and "reason" not in row]
            # Lines may lie on one another.
            style = {"marker": "osD^v"[index % 5], "markersize": max(3, 8 - index), "alpha": 0.8}
            axes.plot([row["request"] for row in own], [row[name] for row in own], label=method, **style)
        axes.set(title=title, xlabel="requests, one after another", ylabel="percent", ylim=(-3, 103))
        axes.set_xticks(range(1, len(CONCEPTS) + 1))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    from bench.harness import print_table
    from fade.methods import METHODS

    parser = argparse.ArgumentParser(
        prog="python -m bench.sequential", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", default=DEFAULT, help="only these")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to fill")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where adapters are kept")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--show", action="store_true", help="run nothing: print the table of the file")
    parser.add_argument("--markdown", action="store_true", help="print as Markdown")
    a = parser.parse_args(argv)
    payload = load_kind(a.output, "sequential") if a.show else fill(a.methods, a.output, a.folder, a.seeds)
    if a.markdown:
        print(markdown(payload), end="")
    else:
        print("percent; in brackets the concept that is least forgotten")
        header, *rows = lines(payload)
        print_table(header, rows)
        print(*reasons(payload), sep="\n")
    draw(payload, a.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
