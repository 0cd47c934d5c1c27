"""The report of a synthetic run: complete, self-contained, accessible, and its numbers those of the evaluation."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fade.concept import bundled_concept
from fade.config import Config
from fade.digitcanvas import DIGITS, STYLES
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError, printable
from fade.evaluation import Evaluation
from fade.evaluation.answers import class_answers
from fade.evaluation.run import _summarise
from fade.report import before_after_picture, human_bytes, outcome, render_report, short_layer_name, write_report

from .test_evaluation import synthetic

ATTENTION = [
    f"{block}.attentions.0.transformer_blocks.0.attn{kind}.{projection}"
    for block in ("down_blocks.0", "mid_block", "up_blocks.1")
    for kind in (1, 2)
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
]
CONVOLUTIONS = ["down_blocks.0.resnets.0.conv1", "up_blocks.1.upsamplers.0.conv"]


def metadata(forget: str = "three", surrogate: str = "eight", layers: list[str] = ATTENTION, **config: Any) -> dict:
    records = [
        {
            "name": name, "shape": [64, 96], "saliency_mean": 0.5 + i, "saliency_max": 9.25 + i, "selected": 61 + i,
            "density": (61 + i) / 6144, "tiles_occupied": 0.5,
        }
        for i, name in enumerate(layers)
    ]  # fmt: skip
    return {
        "concept": vars(bundled_concept(DIGITCANVAS, forget, surrogate)),
        "config": Config().replace(**config).to_dict(),
        "fingerprint": {"float32": "0123456789abcdef" * 4},
        "base": "digitcanvas",
        "versions": {"torch": "9.8.7"},
        "created": "2026-02-03T04:05:06+00:00",
        "form": "values",
        "run": {
            "seconds": {"data": 1.25, "locate": 2.5, "overwrite": 17.75},
            "peak_memory_bytes": {"locate": 812_300_000, "overwrite": 934_500_000},
            "losses": {
                "forget": [0.1 * math.exp(-i / 9) for i in range(40)],
                "retain": [0.01 + 0.001 * (i % 3) for i in range(40)],
            },
            "threshold": 3.5,
            "selected": sum(r["selected"] for r in records),
            "total": 6144 * len(records),
            "layers": records,
            "training_mode": {
                "asked": "auto", "used": "mixed", "layers": {"one-product": 5, "exact": 3},
                "rounded_weights": "kept", "exact_because": ["the cost model prefers it"],
            },
        },
    }  # fmt: skip


class Page(HTMLParser):
    """Everything in the page that could refer to something, every image, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.references += [v for k, v in values.items() if k in ("src", "href", "xlink:href", "srcset") and v]
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "img":
            self.images.append(values)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += " " + data


@pytest.fixture(scope="module", params=[("three", "eight"), ("neon", "plain")], ids=["digit", "style"])
def run(request: pytest.FixtureRequest) -> tuple[Evaluation, str, Page]:
    evaluation, *_ = synthetic(*request.param, seed=5)
    html = render_report(evaluation, metadata(*request.param), 43_210, 22.25, 51.5)
    return evaluation, html, Page(html)


def test_the_page_needs_nothing_from_outside(run: tuple[Evaluation, str, Page]) -> None:
    _, html, page = run
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference.startswith(("data:image/webp;base64,", "#")), reference[:80]
        if reference.startswith("#"):
            assert reference[1:] in page.ids
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_every_picture_is_described_and_shows_the_evaluations_pixels(run: tuple[Evaluation, str, Page]) -> None:
    evaluation, html, page = run
    answers = evaluation.answers
    words, across = (DIGITS, STYLES) if answers.domain == "digit" else (STYLES, DIGITS)
    assert len(page.images) == 2 * (3 + len(words) - 1)
    assert all(image["alt"] for image in page.images)
    assert html.count('role="img" aria-label="') == html.count("<svg") >= 4

    source = page.images[1]["src"].removeprefix("data:image/webp;base64,")
    assert evaluation.forget in page.images[1]["alt"]
    assert "Adapted" in page.images[1]["alt"]
    strip = Image.open(io.BytesIO(base64.b64decode(source)))
    side = strip.height
    gap = (strip.width - len(across) * side) / (len(across) - 1)
    pixel = strip.convert("RGB").getpixel((int(2 * (side + gap)) + side // 2, side // 2))
    first = [i for i in range(80) if answers.forgotten[i]]
    expected = evaluation.images[first[2]][:, 16, 16] * 255
    assert list(pixel) == expected.round().int().tolist()


def test_numbers_settings_and_costs_are_in_the_text(run: tuple[Evaluation, str, Page]) -> None:
    evaluation, _, page = run
    text = " ".join(page.text.split())
    for name in ("UA", "IRA", "CRA"):
        assert f"{evaluation.metrics[name]:.1f}" in text
    assert f"{evaluation.metrics['drift']:.4f}" in text
    for expected in (
        "43.2 kB", "20.2 s", "22.2", "51.5", "812.3 MB", "934.5 MB", "9.8.7", "188, 288, 588",
        "locate.keep", "overwrite.learning_rate", str(Config().overwrite.learning_rate),
        "evaluation.guidance_scale", "0123456789abcdef",
        "5 layers in one product, weights rounded once a step and kept; 3 exact (the cost model prefers it)",
    ):  # fmt: skip
        assert expected in text, expected
    assert outcome(evaluation) in text
    for layer in ATTENTION:
        assert layer in text


def test_the_outcome_counts_images() -> None:
    evaluation, before, after = synthetic("three", "eight", seed=11)
    forgotten = evaluation.answers.forgotten
    still = int((after["digit"][forgotten] == 3).sum())
    once = int((before["digit"][forgotten] == 3).sum())
    sentence = outcome(evaluation)
    assert sentence.startswith(f"Of 24 images asked to show “three”, {still} still do ({once} before);")
    assert f"{evaluation.metrics['CRA']:.1f} % of the styles" in sentence


def test_text_from_the_adapter_is_escaped() -> None:
    evaluation, *_ = synthetic("three", "eight", seed=2)
    record = metadata()
    record["base"] = "<script>alert(1)</script>"
    record["concept"]["retain_prompts"] = ["a <b>bold</b> prompt"]
    html = render_report(evaluation, record, 1)
    assert "<script" not in html
    assert "<b>bold" not in html


@pytest.mark.parametrize("word", [r"$\foo$", "a\x1b[2Jb\u202ec\nd", "<b>{x}梵高"])
def test_classes_and_layers_may_be_called_anything(word: str) -> None:
    concept = {"forget": word, "surrogate": f"{word}2", "forget_prompts": [f"a photo of {word}"]}
    answers = class_answers(concept, [f"{word}3"], (1,))
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"judge": word, "images": 3, "seeds": [1], "steps": 2, "guidance_scale": 3.0}
    evaluation = _summarise(answers, answers.prompted, answers.prompted, images, images, settings)
    record = metadata(layers=[word, f"{word}.0"])
    record |= {"concept": concept, "base": word, "versions": {word: word}}
    html = render_report(evaluation, record, 1)
    page = Page(html)
    shown = [line for line in page.text.replace("\n", " ").split(" ") if line]
    assert all(printable(line) == line for line in shown)
    assert page.text.count(printable(word)) > 8  # title, charts, rows, settings, prompts
    assert before_after_picture(evaluation, tile=16).width > 100


def test_records_with_the_least_in_them() -> None:
    """As `read_adapter_file` lets them through: every part of the run's record may be missing."""
    evaluation, *_ = synthetic("three", "eight", seed=2)
    full = metadata()
    for run in ({}, {"seconds": {"locate": 1.0}}, {"total": 9}, {"layers": full["run"]["layers"]}, {"losses": {}}):
        html = render_report(evaluation, {"concept": full["concept"], "run": run, "config": {}}, 1)
        assert Page(html).open == []


@pytest.mark.parametrize("layers", [CONVOLUTIONS, ATTENTION[:2] + CONVOLUTIONS], ids=["convolutions", "both"])
@pytest.mark.parametrize("scaling", ["none", "module"])
def test_layer_charts_of_any_targets(layers: list[str], scaling: str) -> None:
    evaluation, *_ = synthetic("three", "eight", seed=2)
    page = Page(render_report(evaluation, metadata(layers=layers, locate__scaling=scaling), 1))
    for name in layers:
        assert all(part in page.text for part in short_layer_name(name).split(" ")[:1])
    assert ("Largest saliency" in page.text) == (scaling == "module")


def test_a_dense_run_without_saliency_and_without_losses() -> None:
    evaluation, *_ = synthetic("three", "eight", seed=2)
    record = metadata(locate__granularity="none")
    for layer in record["run"]["layers"]:
        layer |= {"saliency_mean": None, "saliency_max": None, "density": 1.0}
    record["run"]["losses"] = {"forget": [], "retain": []}
    text = Page(render_report(evaluation, record, 1)).text
    assert "Weights kept by the mask" in text
    assert "Losses of stage 2" not in text


def test_one_domain_as_a_clip_judge_gives() -> None:
    concept = {"forget": "dog", "surrogate": "cat", "forget_prompts": ["a photo of dog", "dog"]}
    answers = class_answers(concept, ["horse"], (1, 2))
    judged = {"class": torch.tensor([1, 1, 1, 1, 2, 2] * 2)}
    images = torch.rand(12, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    settings = {"judge": "CLIP zero-shot", "images": 12, "seeds": [1, 2], "steps": 2, "guidance_scale": 3.0}
    evaluation = _summarise(answers, answers.prompted, judged, images, images, settings)
    record = metadata()
    record["concept"] = {**concept, "surrogate_prompts": ["cat"], "retain_prompts": ["a horse"]}
    html = render_report(evaluation, record, 1)
    assert "none still do (4 before); 100.0 % of the other classes are still drawn right." in html
    assert "CRA" not in Page(html).text.split("Metrics")[1].split("UA, IRA and CRA")[0]
    picture = Image.open(io.BytesIO(base64.b64decode(Page(html).images[0]["src"].partition(",")[2])))
    assert picture.height == 160  # scaled down from 200


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "down 0.1 self q"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "mid cross out"),
        ("up_blocks.2.attentions.0.transformer_blocks.3.attn2.to_v", "up 2.0 (3) cross v"),
        ("down_blocks.0.resnets.0.conv1", "down 0 res 0.conv1"),
        ("conv_in", "conv_in"),
    ],
)
def test_layer_names_are_short(name: str, short: str) -> None:
    assert short_layer_name(name) == short


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (43_210, "43.2 kB"), (2_500_000, "2.5 MB"), (3.21e9, "3.21 GB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_the_picture_holds_before_and_after_of_three_classes() -> None:
    evaluation, *_ = synthetic("three", "eight", seed=4)
    picture = before_after_picture(evaluation, tile=32)
    pixels = np.asarray(picture)
    shown = {tuple(row[left : left + 3].flatten().tolist()) for row in pixels for left in range(len(row) - 2)}
    forgotten = evaluation.answers.forgotten.nonzero().flatten()[:8].tolist()
    for image in (evaluation.baseline, evaluation.images):
        for i in forgotten:
            corner = (image[i][:, 0, :3] * 255).round().int().T.flatten().tolist()
            assert tuple(corner) in shown


def test_a_failed_write_keeps_the_old_report(tmp_path: Path) -> None:
    evaluation, *_ = synthetic("three", "eight", seed=1)
    path = tmp_path / "report.html"
    write_report(path, evaluation, metadata(), adapter_bytes=1)
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_report(path, evaluation, {}, adapter_bytes=1)
    assert path.read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FadeError, match="cannot create the folder"):
        write_report(tmp_path / "file" / "report.html", evaluation, metadata(), adapter_bytes=1)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
