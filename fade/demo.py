"""The demo: a bundled model forgets a concept, both stages, evaluation and report, in one call on a plain CPU.

Everything that it leaves behind is what `fade unlearn` and `fade evaluate --report` leave, for that model.
"""

import json
import time
from pathlib import Path
from typing import Any

from fade import bundled
from fade.config import Config
from fade.errors import FadeError
from fade.evaluation import Evaluation, evaluate, full_record
from fade.files import atomic_write
from fade.measure import measured
from fade.report import before_after_picture, write_report
from fade.unlearning import ADAPTER_FILE, unlearn

REPORT_FILE, METRICS_FILE, PICTURE_FILE = "report.html", "metrics.json", "before-after.png"


def run_demo(
    output: str | Path,
    forget: str | None = None,
    surrogate: str | None = None,
    config: Config | None = None,
    *,
    model: str = bundled.DEFAULT,
    overwrite: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> tuple[Evaluation, dict[str, Any]]:
    """Unlearns `forget` in the bundled `model`; adapter, report, metrics and a before/after picture go to `output`.

    Without words, the model's own for this. `cache` is the folder of pictures that were drawn before, as for
    `fade.evaluate`. Returns the evaluation (of three seeds) and what `metrics.json` holds.
    Raises FadeError for a model that is not bundled, for words that it does not know, for one word without the other,
    and where `output` is in use without `overwrite`.
    """
    described = bundled.model(model)
    if (forget is None) != (surrogate is None):
        raise FadeError("the demo needs the concept to forget and its surrogate, or neither: --forget A --surrogate B")
    if forget is None or surrogate is None:
        forget, surrogate = described.demo
    start = time.perf_counter()
    output = Path(output)
    pipeline = described.load_pipeline()
    adapter = unlearn(
        pipeline, forget, surrogate, config=config, output=output, overwrite=overwrite, progress=progress
    )  # fmt: skip
    for stale in (REPORT_FILE, METRICS_FILE, PICTURE_FILE):
        (output / stale).unlink(missing_ok=True)
    with measured() as evaluating:
        evaluation = evaluate(pipeline, adapter, cache=cache, progress=progress)
    size = (output / ADAPTER_FILE).stat().st_size
    total = time.perf_counter() - start
    write_report(
        output / REPORT_FILE, evaluation, adapter.metadata,
        adapter_bytes=size, evaluate_seconds=evaluating.seconds, total_seconds=total,
    )  # fmt: skip
    with atomic_write(output / PICTURE_FILE) as temporary:
        before_after_picture(evaluation).save(temporary, format="PNG", optimize=True)
    record = full_record(evaluation, adapter.metadata, size, evaluating.seconds, time.perf_counter() - start)
    with atomic_write(output / METRICS_FILE) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
    return evaluation, record
