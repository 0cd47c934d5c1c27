"""The report of one unlearning run: one HTML file with its pictures inside, which asks nothing of the network.

It is built from the adapter's metadata and an `Evaluation` alone. Charts are inline SVG whose ink follows the page's
colour, so that they are legible in light and dark and on paper; the page itself is `templates/report.html`.
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fade.errors import printable
from fade.evaluation.run import Evaluation
from fade.files import atomic_write
from fade.measure import human_bytes
from fade.pictures import TILE, data_uri, strip

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL.Image import Image
    from torch import Tensor

    from fade.evaluation.attacks import AttackRecord

BEFORE, AFTER = "#3d7fd9", "#e07b39"
MORE_COLOURS = ("#4a9d5b", "#8b62b8")
INK = "#010203"
"""Drawn by matplotlib, then replaced by the page's text colour."""

_ATTENTION = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn([12])\.to_(q|k|v|out)"
)

_SHORTER = (
    ("down_blocks.", "down "), ("up_blocks.", "up "), ("mid_block", "mid"), (".attentions.", " attn "),
    (".resnets.", " res "), (".transformer_blocks.", "."), ("downsamplers", "down"), ("upsamplers", "up"),
)  # fmt: skip


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    metadata: dict[str, Any],
    *,
    adapter_bytes: int,
    evaluate_seconds: float | None = None,
    total_seconds: float | None = None,
    attacks: "AttackRecord | None" = None,
) -> None:
    """Writes the report to `path`, replacing a file of that name only once the new one is complete.

    Args:
        metadata: the adapter's, with its run record under "run".
        adapter_bytes: size of the adapter file.
        evaluate_seconds, total_seconds: wall time of the evaluation and of the whole command, where known.
        attacks: what attacks on the same adapter brought back, where there were any.

    Raises FadeError where the file cannot be written.
    """
    html = render_report(evaluation, metadata, adapter_bytes, evaluate_seconds, total_seconds, attacks)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def render_report(
    evaluation: Evaluation,
    metadata: dict[str, Any],
    adapter_bytes: int,
    evaluate_seconds: float | None = None,
    total_seconds: float | None = None,
    attacks: "AttackRecord | None" = None,
) -> str:
    """The report as one HTML string. Arguments as for `write_report`."""
    run = metadata.get("run", {})
    return _template("report.html").render(
        forget=evaluation.forget,
        surrogate=evaluation.surrogate,
        outcome=outcome(evaluation),
        figures=_key_figures(evaluation, run, adapter_bytes),
        grids=_grids(evaluation),
        matrices=_matrices(evaluation),
        layer_charts=_layer_charts(run, metadata.get("config", {})),
        layers=run.get("layers", []),
        losses=_loss_chart(run.get("losses", {})),
        metrics=_metric_rows(evaluation),
        notes=evaluation.notes,
        attacks=attacks,
        costs=_cost_rows(run, adapter_bytes, evaluate_seconds, total_seconds),
        settings=_setting_rows(metadata, evaluation=evaluation.settings),
        prompts={kind: metadata["concept"].get(f"{kind}_prompts", ()) for kind in ("forget", "surrogate", "retain")},
        versions=metadata.get("versions", {}),
        created=metadata.get("created", ""),
        place=where_it_sits(run.get("path")),
        base=metadata.get("base", "the base model"),
        before_colour=BEFORE,
        after_colour=AFTER,
    )


def write_attack_report(path: str | Path, attacks: "AttackRecord", metadata: dict[str, Any]) -> None:
    """Writes a page of attacks alone, as `write_report` does. Raises FadeError where the file cannot be written."""
    html = _template("attacks.html").render(
        attacks=attacks,
        outcome=attack_outcome(attacks),
        settings=_setting_rows(metadata, attack=attacks.settings),
        created=metadata.get("created", ""),
        place=where_it_sits(attacks.path),
        base=metadata.get("base", "the base model"),
        before_colour=BEFORE,
        after_colour=AFTER,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _template(name: str) -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("fade", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=shown,
    )  # fmt: skip
    return environment.get_template(name)


_PATHS = {
    "text path": "the text path: the prompt means something else to the denoiser, which can still draw the concept",
    "denoiser": "the denoiser, behind what reads the prompt",
    "both": "the text path and the denoiser behind it",
}


def where_it_sits(path: str | None) -> str:
    """What an adapter's record says of the place of its edit, in words."""
    return _PATHS.get(path, "a place that its file does not tell")


_ROUNDED = {"kept": "rounded once a step and kept", "refilled": "rounded anew by each product"}


def how_it_was_trained(run: dict[str, Any]) -> str | None:
    """The arithmetic of a run's training, in words; None where its record does not tell it."""
    if (mode := run.get("training_mode")) is None:
        return None
    because = f" ({'; '.join(mode['exact_because'])})" if mode.get("exact_because") else ""
    if mode["used"] == "exact":
        return f"every product exact{because}"
    count, exact = mode["layers"]["one-product"], mode["layers"]["exact"]
    others = f"; {exact} exact{because}" if exact else ""
    return f"{count} layers in one product, weights {_ROUNDED[mode['rounded_weights']]}{others}"


def outcome(evaluation: Evaluation) -> str:
    """What happened, in one sentence with its numbers."""
    kept = [f"{evaluation.metrics['IRA']:.1f} % of the other {_domains(evaluation)}"]
    if (other := _other_domain(evaluation)) is not None:
        kept.append(f"{evaluation.metrics['CRA']:.1f} % of the {_plural(other)}")
    rest = f"{' and '.join(kept)} are still drawn right."
    if len(evaluation.concepts) > 1:
        gone = sum(concept["UA"] >= 99 for concept in evaluation.concepts)
        return (
            f"Of {len(evaluation.concepts)} concepts, {gone} are forgotten (UA of 99 % or more), and on average "
            f"{evaluation.metrics['UA']:.1f} % of the images asked to show one no longer do; {rest}"
        )
    forgotten = int(evaluation.answers.forgotten.sum())
    left, before = (round((100 - m["UA"]) * forgotten / 100) for m in (evaluation.metrics, evaluation.base))
    return (
        f"Of {forgotten} images asked to show “{evaluation.forget}”, {left or 'none'} still "
        f"{'does' if left == 1 else 'do'} ({before} before); {rest}"
    )


def attack_outcome(attacks: "AttackRecord") -> str:
    """What the strongest attack brought back, in one sentence with its numbers."""
    asked = f"Asked plainly, the adapted model draws “{attacks.forget}” in {attacks.unattacked.recognised} of "
    asked += f"{attacks.unattacked.pictures} pictures (the base model in {attacks.base.recognised})"
    strongest = max(attacks.results, key=lambda result: result.rate, default=None)
    if strongest is None:
        return f"{asked}."
    return (
        f"{asked}; the strongest attack, {strongest.attack} ({strongest.setting}), gets it in "
        f"{strongest.recognised} of {strongest.pictures}."
    )


def _domains(evaluation: Evaluation) -> str:
    """The domains that have something to forget, in words: `digits and styles`."""
    return " and ".join(map(_plural, evaluation.answers.domains))


def _other_domain(evaluation: Evaluation) -> str | None:
    """The domain that has nothing to forget, if there is one."""
    others = evaluation.answers.classes.keys() - set(evaluation.answers.domains)
    return next(iter(others), None)


def before_after_picture(evaluation: Evaluation, tile: int = 64) -> "Image":
    """A picture to show around: the forgotten concept and two neighbours at the first seed, before above after."""
    from PIL import Image, ImageDraw, ImageFont

    words = evaluation.answers.classes[evaluation.answers.domain]
    forget = evaluation.answers.forget
    near = sorted(_retained_classes(evaluation), key=lambda word: abs(word - forget))[:2]
    groups = [
        (printable(words[word]), [strip(_pick(evaluation, images, word, 0), tile) for images in _both(evaluation)])
        for word in (forget, *sorted(near))
    ]
    margin, gap, space, text = 12, 4, 20, 110
    width, height = groups[0][1][0].size
    picture = Image.new(
        "RGB", (2 * margin + text + width, 2 * margin + len(groups) * (2 * height + gap) + 2 * space), "white"
    )
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=17)
    top = margin
    for word, (before, after) in groups:
        for label, row in ((f"{word}, before", before), (f"{word}, after", after)):
            pen.text((margin + text - 10, top + height // 2), label, fill="#333333", font=font, anchor="rm")
            picture.paste(row, (margin + text, top), row)
            top += height + gap
        top += space - gap
    return picture


def _plural(word: str) -> str:
    return {"class": "classes"}.get(word, f"{word}s")


def _both(evaluation: Evaluation) -> tuple["Tensor", "Tensor"]:
    return evaluation.baseline, evaluation.images


def _retained_classes(evaluation: Evaluation) -> list[int]:
    return evaluation.answers.retained(evaluation.answers.domain)


def _pick(evaluation: Evaluation, images: "Tensor", word: int, seed_index: int, domain: str | None = None) -> "Tensor":
    """Images of one class of a domain (by default the first concept's) at one seed, in the order of their prompts."""
    return images[_indices(evaluation, word, seed_index, domain)]


def _indices(evaluation: Evaluation, word: int, seed_index: int, domain: str | None = None) -> list[int]:
    answers = evaluation.answers
    seed = list(dict.fromkeys(answers.seeds))[seed_index]
    labels = answers.prompted[domain or answers.domain].tolist()
    return [i for i, label in enumerate(labels) if label == word and answers.seeds[i] == seed]


def _grids(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What was to be forgotten and what was to be kept, domain by domain: rows of before and after.

    A single concept is shown at every seed; several, and the retained classes, at the first.
    """
    answers = evaluation.answers
    seeds = list(dict.fromkeys(answers.seeds))
    grids = []
    for domain in answers.domains:
        words, kind = answers.classes[domain], {"columns": _columns(evaluation, domain)}
        gone = [target.forget for target in answers.targets if target.domain == domain]
        rows = [(words[word], word, 0) for word in gone]
        if len(answers.targets) == 1:
            rows = [(f"seed {seed}", gone[0], index) for index, seed in enumerate(seeds)]
        kept = [(words[word], word, 0) for word in answers.retained(domain)]
        first = f" (seed {seeds[0]})" if len(answers.targets) > 1 else ""
        grids += [
            {
                "title": f"Forgotten: {', '.join(words[word] for word in gone)}{first}", "forgotten": True,
                "rows": [_grid_row(evaluation, domain, *row) for row in rows], **kind,
            },
            {
                "title": f"Kept: every other {domain} (seed {seeds[0]})", "forgotten": False,
                "rows": [_grid_row(evaluation, domain, *row) for row in kept], **kind,
            },
        ]  # fmt: skip
    return grids


def _columns(evaluation: Evaluation, domain: str) -> list[str]:
    """What the images of a class of the domain differ in: the other domain's classes, or the prompts."""
    answers = evaluation.answers
    target = next(target for target in answers.targets if target.domain == domain)
    first = _indices(evaluation, target.forget, 0, domain)
    crossed = [other for other in answers.classes if other != domain]
    if crossed:
        return [answers.classes[crossed[0]][answers.prompted[crossed[0]][i]] for i in first]
    return [answers.prompts[i].replace(answers.words(target)[0], "…") for i in first]


def _grid_row(evaluation: Evaluation, domain: str, label: str, word: int, seed_index: int) -> dict[str, str]:
    before, after = (
        data_uri(strip(_pick(evaluation, images, word, seed_index, domain)), exact=images.shape[-1] <= TILE)
        for images in _both(evaluation)
    )
    answers = evaluation.answers
    seed = list(dict.fromkeys(answers.seeds))[seed_index]
    place = f"“{answers.classes[domain][word]}” ({', '.join(_columns(evaluation, domain))}), seed {seed}"
    return {
        "label": label,
        "before": before,
        "after": after,
        "before_alt": f"Base model: {place}",
        "after_alt": f"Adapted model: {place}",
    }


def _figure(width: float, height: float, draw: Callable[[Any], None], label: str, columns: int = 1) -> dict[str, str]:
    """An inline SVG drawn by `draw(axes)`, its text and lines in the page's text colour, with its description."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.linewidth": 0.6,
        "text.parse_math": False,  # a class may be called "$x$"
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The text stays text, drawn in the reader's font, whatever matplotlib's own has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots(1, columns, squeeze=False)[0] if columns > 1 else figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend)_[\d.]+"', "", svg)
    return {"svg": svg, "label": label, "width": f"{width * 96:.0f}px"}


def _heat(axes: Any, values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], *,
          colour: str, top: float, text: Callable[[float], str]) -> None:  # fmt: skip
    """Cells whose opacity grows with their value, so that they read on a light and on a dark page; None is no cell."""
    from matplotlib.patches import Rectangle

    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value is None or math.isnan(value):
                continue
            strength = 0.06 + 0.74 * min(1.0, max(0.0, value / top if top > 0 else 0.0))
            axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, alpha=strength, linewidth=0))
            axes.text(x + 0.5, y + 0.52, text(value), ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    rows, columns = [printable(name) for name in rows], [printable(name) for name in columns]
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _matrices(evaluation: Evaluation) -> list[dict[str, str]]:
    """Interference: accuracy before and after, per crossing of the two domains or, with one domain, per class."""
    answers = evaluation.answers
    if not evaluation.matrix:
        words = list(evaluation.receivers["class"])
        values = [[evaluation.receivers["class"][w][when] for w in words] for when in ("before", "after")]

        def draw(axes: Any) -> None:
            _heat(axes, values, ["base model", "adapted"], words, colour=BEFORE, top=100, text=lambda v: f"{v:.0f}")

        label = f"Share of images judged as the class that was asked for, in percent. Forgotten: {evaluation.forget}."
        return [_figure(max(3.5, 0.6 * len(words) + 1.5), 2.2, draw, label)]

    (first, rows), (second, columns) = ((d, list(evaluation.receivers[d])) for d in answers.classes)
    pictures = []
    for domain in (answers.domain, *(d for d in answers.classes if d != answers.domain)):

        def draw(panels: Any, domain: str = domain) -> None:
            for axes, when, title in zip(panels, ("before", "after"), ("base model", "adapted"), strict=True):
                cells = evaluation.matrix[domain][when]
                _heat(axes, cells, rows, columns, colour=BEFORE if when == "before" else AFTER, top=100,
                      text=lambda v: "" if v == 100 else f"{v:.0f}")  # fmt: skip
                axes.set_title(f"right {domain}, {title}")

        label = (
            f"Share of images with the right {domain}, in percent, per {first} (row) and {second} (column), for the "
            "base model and the adapted one. Cells without a number are 100."
        )
        pictures.append(_figure(8.6, 0.26 * len(rows) + 1.1, draw, label, columns=2))
    return pictures


def short_layer_name(name: str) -> str:
    """A layer's name as a reader says it: `down 0.1 self q`, `mid cross out`; others shortened."""
    match = _ATTENTION.fullmatch(name.removesuffix(".0") if name.endswith("to_out.0") else name)
    if match:
        block, projection = _attention_place(match)
        return f"{block} {projection}"
    for long, short in _SHORTER:
        name = name.replace(long, short)
    return name


def _attention_place(match: re.Match[str]) -> tuple[str, str]:
    way, level, index, depth, kind, projection = match.groups()
    block = "mid" if way is None else f"{way} {level}.{index}"
    if depth != "0":
        block += f" ({depth})"
    return block, f"{'self' if kind == '1' else 'cross'} {projection}"


def _layer_charts(run: dict[str, Any], config: dict[str, Any]) -> list[dict[str, str]]:
    """Mask density and saliency by layer: a grid block x projection where all are attention projections, else bars."""
    layers = run.get("layers", [])
    if not layers:
        return []
    scaled = config.get("locate", {}).get("scaling") == "module"

    def saliency(layer: dict[str, Any]) -> float | None:
        if layer["saliency_max"] is None:
            return None
        if scaled:
            return layer["saliency_max"] / layer["saliency_mean"] if layer["saliency_mean"] else 0.0
        return layer["saliency_mean"]

    quantities = [("Weights kept by the mask, %", AFTER, lambda layer: 100 * layer["density"])]
    if any(layer["saliency_max"] is not None for layer in layers):
        title = "Largest saliency ÷ the layer's mean" if scaled else "Mean saliency"
        quantities.append((title, BEFORE, saliency))
    matches = [_ATTENTION.fullmatch(layer["name"].removesuffix(".0")) for layer in layers]
    kind = run.get("saliency") or config.get("locate", {}).get("saliency", "unknown")
    note = f"By layer, saliency “{kind}”: " + " and ".join(title for title, *_ in quantities) + "."

    if all(matches):
        places = [_attention_place(match) for match in matches]
        rows = sorted(dict.fromkeys(block for block, _ in places), key=_block_order)
        order = [f"{kind} {part}" for kind in ("self", "cross") for part in ("q", "k", "v", "out")]
        columns = [name for name in order if any(name == projection for _, projection in places)]

        def draw(panels: Any) -> None:
            for axes, (title, colour, quantity) in zip(_several(panels), quantities, strict=True):
                by_place = {place: quantity(layer) for place, layer in zip(places, layers, strict=True)}
                cells = [[by_place.get((row, column)) for column in columns] for row in rows]
                top = max((value for value in by_place.values() if value is not None), default=1.0)
                _heat(axes, cells, rows, columns, colour=colour, top=top, text=_short_number)
                axes.set_title(title)

        height = 0.28 * len(rows) + 1.1
    else:
        names = [printable(short_layer_name(layer["name"])) for layer in layers]

        def draw(panels: Any) -> None:
            for position, (axes, (title, colour, quantity)) in enumerate(
                zip(_several(panels), quantities, strict=True)
            ):  # fmt: skip
                axes.barh(range(len(layers)), [quantity(layer) or 0.0 for layer in layers], color=colour, height=0.75)
                axes.set_yticks(range(len(layers)), names if position == 0 else [""] * len(layers), fontsize=7.5)
                axes.set(ylim=(len(layers) - 0.4, -0.6))
                axes.set_title(title)
                axes.tick_params(axis="y", length=0)

        height = 0.17 * len(layers) + 0.8
    return [_figure(4.6 * len(quantities), height, draw, note, columns=len(quantities))]


def _several(panels: Any) -> Sequence[Any]:
    return panels if hasattr(panels, "__len__") else [panels]


def _block_order(block: str) -> tuple[int, str]:
    return {"d": 0, "m": 1, "u": 2}[block[0]], block


def _short_number(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 99.5:
        return f"{value:.0f}"
    if value >= 0.095:
        return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.01 else f"{value:.2f}"


def _loss_chart(losses: dict[str, Sequence[float]]) -> dict[str, str] | None:
    """Losses by step, as the method names them: every step faint, a running mean over a twentieth of the steps in
    full. Of FADE's two the forget loss has the adapter's colour and the retain loss the base model's."""
    colours = itertools.chain((AFTER, BEFORE), itertools.cycle(MORE_COLOURS))
    curves = [(name, values or [], colour) for (name, values), colour in zip(losses.items(), colours, strict=False)]
    steps = max((len(values) for _, values, _ in curves), default=0)
    if steps == 0:
        return None

    def draw(axes: Any) -> None:
        window = max(1, steps // 20)
        for name, values, colour in curves:
            axis = range(1, len(values) + 1)
            sums = [0.0, *itertools.accumulate(values)]
            smooth = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
            # An untouched adapter has a retain loss of exactly zero, which a logarithmic axis cannot show.
            axes.plot(axis, [value or math.nan for value in values], color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(axis, [value or math.nan for value in smooth], color=colour, linewidth=1.8, label=name)
        if any(value > 0 for _, values, _ in curves for value in values):
            axes.set_yscale("log")
        axes.set(xlabel="optimiser step", ylabel="mean squared error")
        axes.legend(frameon=False)

    ends = ", ".join(f"{name} from {values[0]:.2g} to {values[-1]:.2g}" for name, values, _ in curves if values)
    return _figure(8.6, 2.8, draw, f"Losses over {steps} steps: {ends}.")


def _key_figures(evaluation: Evaluation, run: dict[str, Any], adapter_bytes: int) -> list[tuple[str, str]]:
    """The handful of numbers at the top: (value, what it is)."""
    metrics = evaluation.metrics
    figures = [
        (f"{metrics['UA']:.1f} %", "forgotten (UA)"),
        (f"{metrics['IRA']:.1f} %", f"other {_domains(evaluation)} kept (IRA)"),
    ]
    if metrics["NA"] is not None:
        figures.append((f"{metrics['NA']:.1f} %", "nearest look-alikes kept (NA)"))
    if (other := _other_domain(evaluation)) is not None:
        figures.append((f"{metrics['CRA']:.1f} %", f"{_plural(other)} kept (CRA)"))
    if run.get("total"):
        figures.append((f"{100 * run.get('selected', 0) / run['total']:.3g} %", "of the target weights changed"))
    if run.get("path") in _PATHS:
        figures.append((run["path"], "where the edit sits"))
    figures.append((human_bytes(adapter_bytes), "adapter file"))
    stages = [run.get("seconds", {}).get(stage) for stage in ("locate", "overwrite")]
    if None not in stages:
        figures.append((f"{sum(stages):.1f} s", "locate + overwrite"))
    return figures


def _metric_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    rows = []
    for metric, value in evaluation.shown:
        span = value.interval
        rows.append(
            {
                "name": metric.name,
                "meaning": evaluation.meaning(metric),
                "before": metric.text(value.base) or "–",
                "after": metric.text(value.adapted),
                "interval": f"{metric.text(span.low)} – {metric.text(span.high)}" if span else "–",
                "images": str(span.images) if span else "–",
            }
        )
    if len(evaluation.concepts) > 1:
        rows += [
            {
                "name": "UA", "meaning": f"of “{concept['forget']}” alone", "before": "–", "interval": "–",
                "after": f"{concept['UA']:.1f}", "images": "–",
            }
            for concept in evaluation.concepts
        ]  # fmt: skip
    return rows


def _cost_rows(
    run: dict[str, Any], adapter_bytes: int, evaluate_seconds: float | None, total_seconds: float | None
) -> list[tuple[str, str, str]]:
    """(part, seconds, peak memory)."""
    seconds, memory = run.get("seconds", {}), run.get("peak_memory_bytes", {})
    titles = {"data": "sample the data", "locate": "1 locate", "overwrite": "2 overwrite"}
    if "steps" in run:
        titles["overwrite"] += f" ({run['steps']} steps)"
    rows = [
        (titles.get(part, part), f"{value:.1f}", human_bytes(memory[part]) if part in memory else "–")
        for part, value in seconds.items()
    ]
    if evaluate_seconds is not None:
        rows.append(("evaluate", f"{evaluate_seconds:.1f}", "–"))
    if total_seconds is not None:
        rows.append(("everything", f"{total_seconds:.1f}", "–"))
    return rows


def _setting_rows(metadata: dict[str, Any], **more: dict[str, Any]) -> list[tuple[str, str]]:
    """Every setting of the adapter's, and more by section, flattened: ("locate.keep", "0.01")."""

    def flatten(values: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
        rows = []
        for key, value in values.items():
            if isinstance(value, dict):
                rows += flatten(value, f"{prefix}{key}.")
            else:
                shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                rows.append((f"{prefix}{key}", shown))
        return rows

    rows = flatten(metadata.get("config", {}), "") + flatten(more, "")
    if "method" in metadata.get("run", {}):
        rows.insert(0, ("method", metadata["run"]["method"]))
    if "form" in metadata:
        rows.append(("file form", metadata["form"]))
    if (trained := how_it_was_trained(metadata.get("run", {}))) is not None:
        rows.append(("trained with", trained))
    fingerprint = metadata.get("fingerprint", {})
    return rows + [(f"base fingerprint, {dtype}", digest) for dtype, digest in fingerprint.items()]
