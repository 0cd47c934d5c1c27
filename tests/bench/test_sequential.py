"""Requests one after another: what is made beside what, going on, reasons, what is shown."""

import json
from pathlib import Path
from typing import Any

import pytest

import fade.digitcanvas
from bench import sequential
from bench.sequential import CONCEPTS
from fade.concept import pairs_in
from fade.errors import FadeError
from fade.peft_file import read_any_file

LAST = len(CONCEPTS)


def numbers(ua: float = 100.0, ira: float = 99.0) -> dict[str, Any]:
    return {"UA": ua, "UA_least": ua - 10, "IRA": ira, "CRA": 98.0, "drift": 0.02}


def measured(method: str, request: int, ua: float) -> dict[str, Any]:
    told = {"method": method, "request": request, "forget": list(CONCEPTS)[request - 1]}
    return {**told, **numbers(ua), "seconds": 1.5 * request, "adapter_bytes": 46_000}


class Pretended:
    """Requests that are only noted; some fail."""

    noted: list[tuple[str, Any]]
    failing: set[tuple[str, int]]

    def __init__(self, pipeline: Any, method: str, folder: Path, seeds: int) -> None:
        self.method = method

    def measure(self, number: int) -> dict[str, Any]:
        self.noted.append((self.method, number))
        if (self.method, number) in self.failing:
            raise FadeError("nothing is left to change")
        return {**numbers(), "seconds": 1.0, "adapter_bytes": 10}

    def take_back(self, concept: str) -> dict[str, Any]:
        self.noted.append((self.method, concept))
        return {**numbers(), "back": concept, "back_shown": 100.0}


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    monkeypatch.setattr(sequential, "Requests", Pretended)
    monkeypatch.setattr(fade.digitcanvas, "load_pipeline", lambda: None)
    monkeypatch.setattr(Pretended, "noted", [], raising=False)
    monkeypatch.setattr(Pretended, "failing", set(), raising=False)
    return Pretended.noted


def test_goes_on_at_the_request_where_it_was(noted: list[tuple[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "sequential.json"
    done = [measured("uce", number, 100.0) for number in range(1, 5)]
    payload = {"schema": 1, "kind": "sequential", "concepts": CONCEPTS, "seeds": 1, "rows": done, "taken_back": []}
    output.write_text(json.dumps(payload))
    sequential.fill(["uce"], output, tmp_path, 1)
    assert noted == [*(("uce", number) for number in range(5, LAST + 1)), ("uce", sequential.BACK)]
    noted.clear()
    found = sequential.fill(["uce", "speed"], output, tmp_path, 1)
    assert {method for method, _ in noted} == {"speed"} and len(noted) == LAST + 1
    assert [row["request"] for row in found["rows"]] == [*range(1, LAST + 1)] * 2
    assert found["rows"] == json.loads(output.read_text())["rows"]
    with pytest.raises(SystemExit, match="other concepts or seeds"):
        sequential.fill(["uce"], output, tmp_path, 2)


def test_a_method_that_cannot_go_on_says_why_once(noted: list[tuple[str, Any]], tmp_path: Path) -> None:
    Pretended.failing.add(("speed", 3))
    output = tmp_path / "sequential.json"
    for _ in range(2):
        found = sequential.fill(["speed"], output, tmp_path, 1)
    assert noted == [("speed", 1), ("speed", 2), ("speed", 3)]
    assert found["rows"][-1]["reason"] == "nothing is left to change" and found["taken_back"] == []
    assert "- speed stopped at 'two', request 3: nothing is left to change" in sequential.markdown(found)


def test_each_request_is_made_beside_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def measure(pipeline: Any, file: Path, seeds: int, baseline: Any, back: str | None = None) -> tuple[Any, Any]:
        asked.append([pair.forget for pair in pairs_in(read_any_file(file)[1].metadata["concept"])])
        return numbers(), baseline

    monkeypatch.setattr(sequential, "measure", measure)
    monkeypatch.setattr(sequential, "CONCEPTS", dict(list(CONCEPTS.items())[:3]))
    first, second, third = sequential.CONCEPTS
    pipeline = fade.digitcanvas.load_pipeline()
    requests = sequential.Requests(pipeline, "closed-form", tmp_path, 1)
    row = requests.measure(2)  # the first is made on the way
    assert asked == [[first, second]] and row["adapter_bytes"] > 1000 and row["seconds"] > 0
    assert fade.adapters(pipeline) == {}
    files = sorted(tmp_path.glob("closed-form/*/adapter.safetensors"))
    kept = [read_any_file(file)[1].metadata["concept"]["retain_prompts"] for file in files]
    assert all(any(first in prompt.split() for prompt in prompts) == (n > 0) for n, prompts in enumerate(kept))
    before = files[0].stat().st_mtime_ns
    sequential.Requests(pipeline, "closed-form", tmp_path, 1).measure(3)
    assert asked[-1] == [first, second, third] and files[0].stat().st_mtime_ns == before
    requests.take_back(second)
    assert asked[-1] == [first, third]


def test_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [measured("uce", number, 100.0 - number) for number in range(1, LAST + 1)]
    rows += [measured("speed", 1, 75.0)]
    back = [{"method": "uce", **numbers(97.0), "back": "three", "back_shown": 87.5}]
    path = tmp_path / "sequential.json"
    path.write_text(json.dumps({"kind": "sequential", "rows": rows, "taken_back": back}))
    assert sequential.main(["--show", "--markdown", "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert "| uce | 99.0 (89) | 99.0 | 96.0 (86) | 99.0 | 92.0 (82) | 99.0 | 88.0 (78) | 99.0 | 98.0 | 0.020 |" in text
    assert "| 87.5 | 97.0 (87) |" in text
    assert "| speed | 75.0 (65) | 99.0 | - | - | - | - | - | - | 98.0 | 0.020 | 1.5 | 46 | - | - |" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(SystemExit, match="not a file of `python -m bench.sequential`"):
        sequential.main(["--show", "--output", str(other)])
