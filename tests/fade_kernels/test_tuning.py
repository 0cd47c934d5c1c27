"""Choice and cache of tilings, without a GPU: times come from a table."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fade_kernels.triton_kernels import masked_lora_forward, masked_lora_input_gradient, tuning
from fade_kernels.triton_kernels.launch import Tiling
from fade_kernels.triton_kernels.tuning import Problem, choose_tiling, measured_choice, tiling_name

SLOW = Tiling({"BT": 128, "BN": 64}, num_warps=8, num_stages=3)
FAST = Tiling({"BT": 64, "BN": 64}, num_warps=4, num_stages=2)
TOO_LARGE = Tiling({"BT": 512, "BN": 512}, num_warps=8, num_stages=5)
TIMES = {tiling_name(SLOW): 2.0, tiling_name(FAST): 1.0, tiling_name(TOO_LARGE): float("inf")}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tuning.cache_path()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing read yet."""
    monkeypatch.setattr(tuning, "_choices", {})


def timer(calls: list[str]) -> Callable[[Tiling], float]:
    def milliseconds(tiling: Tiling) -> float:
        calls.append(tiling_name(tiling))
        return TIMES[calls[-1]]

    return milliseconds


def test_names() -> None:
    assert tiling_name(SLOW) == "BT128-BN64-w8-s3"
    assert Problem("bf16", 4097, 320, 640, 16).bucket() == "bf16 T8192 N320 K640 R16"
    assert [Problem("fp32", T, 1, 1, 1).bucket().split()[1] for T in (1, 2, 3, 4, 5)] == ["T1", "T2", "T4", "T4", "T8"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FADE_CACHE", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "tilings.json"
    monkeypatch.delenv("FADE_CACHE")
    assert tuning.cache_path().parent == Path.home() / ".cache" / "fade_kernels"


def test_measures_once_and_remembers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    assert measured_choice("key", (SLOW, TOO_LARGE, FAST), timer(calls)) == FAST
    assert len(calls) == 3
    assert json.loads(path.read_text()) == {"key": tiling_name(FAST)}
    assert measured_choice("key", (SLOW, TOO_LARGE, FAST), timer(calls)) == FAST
    forget(monkeypatch)
    assert measured_choice("key", (SLOW, TOO_LARGE, FAST), timer(calls)) == FAST
    assert len(calls) == 3
    assert measured_choice("other", (SLOW,), timer(calls)) == SLOW
    assert len(calls) == 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_keeps_what_another_process_wrote_meanwhile(path: Path) -> None:
    measured_choice("mine", (SLOW, FAST), timer([]))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"theirs": "x"}))
    measured_choice("mine too", (SLOW, FAST), timer([]))
    assert set(json.loads(path.read_text())) == {"mine", "theirs", "mine too"}


def test_a_tiling_that_no_longer_ships_is_measured_anew(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"key": "BT1-w1-s1"}')
    assert measured_choice("key", (SLOW, FAST), timer([])) == FAST


@pytest.mark.parametrize("content", ["{", "[]", '{"key": 3}', "\x00"], ids=["cut off", "a list", "numbers", "binary"])
def test_damaged_cache_is_ignored_with_one_warning(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert measured_choice("key", (SLOW, FAST), timer([])) == FAST
        assert measured_choice("key", (SLOW, FAST), timer([])) == FAST
    assert [str(path) in str(warning.message) for warning in caught] == [True]
    assert json.loads(path.read_text()) == {"key": tiling_name(FAST)}


def test_unwritable_cache_warns_and_still_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "file" / "below"))
    forget(monkeypatch)
    calls: list[str] = []
    with pytest.warns(UserWarning, match="could not be kept"):
        assert measured_choice("key", (SLOW, FAST), timer(calls)) == FAST
    assert measured_choice("key", (SLOW, FAST), timer(calls)) == FAST
    assert len(calls) == 2


def test_refuses_too_many_and_none_that_runs(path: Path) -> None:
    with pytest.raises(ValueError, match="between 1 and 6"):
        measured_choice("key", (SLOW,) * 7, timer([]))
    with pytest.raises(ValueError, match="between 1 and 6"):
        measured_choice("key", (), timer([]))
    with pytest.raises(RuntimeError, match="could run"):
        measured_choice("key", (TOO_LARGE,), timer([]))


@pytest.mark.parametrize("autotune", ["0", "1"])
def test_off_the_gpu_and_unasked_the_default_is_taken(autotune: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FADE_AUTOTUNE", autotune)
    device = torch.device("cpu" if autotune == "1" else "cuda")

    def run(tiling: Tiling) -> None:
        raise AssertionError("measured")

    assert choose_tiling("kernel", Problem("bf16", 1, 1, 1, 1), SLOW, (FAST,), device, run) is SLOW


@pytest.mark.parametrize("module", [masked_lora_forward, masked_lora_input_gradient], ids=["forward", "input gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 32, 33, 128])
def test_defaults_are_among_the_candidates(module: object, dtype: torch.dtype, rank: int) -> None:
    for precision in ("ieee", "tf32"):
        candidates = module.candidate_tilings(dtype, rank, precision)
        assert 1 <= len(candidates) <= tuning.MAX_CANDIDATES
        for T in (1, 77, 4096, 32768):
            for width in (1, 320, 3072):
                assert module.default_tiling(dtype, T, width, width, rank, precision) in candidates


def test_defaults_grow_with_the_rows() -> None:
    def rows(T: int) -> int:
        return masked_lora_forward.default_tiling(torch.bfloat16, T, 320, 320, 16).blocks["BT"]

    assert rows(8) < rows(154) < rows(32768)
