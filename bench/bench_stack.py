"""Twelve of DigitCanvas's eighteen concepts forgotten at once: an adapter for each, added up, any one taken out again.

    python -m bench.bench_stack [--output FILE] [--method METHOD] [--keep 0.01] [--seeds 1] [--without three,neon,...]

The surrogates are among the six that stay. Measured for the sum of all, for the sum without each of `--without` (all
twelve by default), and for one adapter that forgets all twelve: UA (mean and least over the concepts), IRA over what is
left, and in how many of its images the concept that was taken out is recognised again.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import environment, print_table, write_json

CONCEPTS = {
    "zero": "six", "one": "seven", "two": "six", "three": "eight", "four": "nine", "five": "six", "neon": "plain",
    "laser": "plain", "ink": "plain", "pencil": "plain", "outline": "mosaic", "stripes": "mosaic",
}  # fmt: skip


def measure(
    pipeline: Any, file: Path, seeds: int, baseline: Any, back: str | None = None
) -> tuple[dict[str, Any], Any]:
    """The numbers of one combined file; `back` is the concept that was taken out of it."""
    import fade
    from fade.evaluation import evaluate, first_seeds

    adapter = fade.load_adapter(pipeline, file)
    evaluation = evaluate(pipeline, adapter, seeds=first_seeds(seeds), baseline=baseline, progress=False)
    adapter.remove()
    row = {
        "UA": evaluation.metrics["UA"],
        "UA_least": min(concept["UA"] for concept in evaluation.concepts),
        "IRA": evaluation.metrics["IRA"],
        "CRA": evaluation.metrics["CRA"],
        "drift": evaluation.metrics["drift"],
    }
    if back is not None:
        domain = next(d for d, words in evaluation.answers.classes.items() if back in words)
        row |= {"back": back, "back_shown": evaluation.receivers[domain][back]["after"]}
    return row, evaluation.baseline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/stack.json"))
    parser.add_argument("--method", default="closed-form")
    parser.add_argument("--keep", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--without", default=",".join(CONCEPTS))
    arguments = parser.parse_args()

    import fade
    from fade.digitcanvas import load_pipeline

    pipeline = load_pipeline()
    config = fade.Config().replace(overwrite__method=arguments.method, locate__keep=arguments.keep)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        start = time.perf_counter()
        adapters = fade.unlearn_each(pipeline, CONCEPTS, config=config, output=path / "each", progress=False)
        seconds = {"each": time.perf_counter() - start}
        for adapter in adapters.values():
            adapter.remove()
        files = [path / "each" / concept for concept in CONCEPTS]
        start = time.perf_counter()
        combined = fade.combine_adapters(files, path / "all.safetensors")
        seconds["combine"] = time.perf_counter() - start
        rows["all"], baseline = measure(pipeline, path / "all.safetensors", arguments.seeds, None)
        rows["all"] |= {"bytes": combined.bytes, "density": combined.density}
        for concept in filter(None, arguments.without.split(",")):
            rest = path / f"without-{concept}.safetensors"
            fade.combine_adapters([path / "all.safetensors"], rest, without=[concept])
            rows[f"without {concept}"], _ = measure(pipeline, rest, arguments.seeds, baseline, concept)
        start = time.perf_counter()
        fade.unlearn(pipeline, CONCEPTS, config=config, output=path / "joint", progress=False).remove()
        seconds["together"] = time.perf_counter() - start
        rows["together, in one adapter"], _ = measure(
            pipeline, path / "joint" / "adapter.safetensors", arguments.seeds, baseline
        )
    names = ("UA", "UA_least", "IRA", "back_shown")
    print_table(["", *names], [[n, *(f"{r[k]:.1f}" if k in r else "" for k in names)] for n, r in rows.items()])
    settings = {"concepts": CONCEPTS, "method": arguments.method, "keep": arguments.keep, "seeds": arguments.seeds}
    write_json(arguments.output, {"environment": environment(), **settings, "seconds": seconds, "rows": rows})


if __name__ == "__main__":
    main()
