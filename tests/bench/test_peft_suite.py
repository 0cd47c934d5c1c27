"""The runner of PEFT's own suite, on a suite of three tests."""

import textwrap
from pathlib import Path

import pytest

from bench.peft_suite import SUITE, NoSuiteError, compare, run_suite, unpack_tests

TESTS = """
    import pytest
    import torch
    from datasets import load_dataset
    from peft import LoHaConfig, LoraConfig, get_peft_model

    def adapted(**settings):
        config = LoraConfig(target_modules=["0"], init_lora_weights=False, **settings)
        return get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)

    def test_merge():
        model, x = adapted(), torch.randn(3, 6)
        before = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), before)

    def test_delta_is_dense():
        layer = adapted().base_model.model[0]
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(layer.get_delta_weight("default"), lora_b @ lora_a * layer.scaling["default"])

    def test_dora():
        adapted(use_dora=True)(torch.randn(3, 6))

    def test_that_fails():
        adapted()
        raise RuntimeError("on any layer")

    @pytest.mark.parametrize("config_cls", [LoHaConfig])
    def test_of_another_method(config_cls):
        raise AssertionError("not LoRA's")
"""


def test_what_fails_on_ours_alone_is_told(tmp_path: Path) -> None:
    source = tmp_path / "peft"
    (source / SUITE).parent.mkdir(parents=True)
    (source / SUITE).write_text(textwrap.dedent(TESTS), encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    assert unpack_tests(source, folder) == "unknown"
    ours = run_suite(folder, "factors")
    assert {test.partition("::")[2]: bool(record["masked"]) for test, record in ours.items()} == {
        "test_merge": True, "test_delta_is_dense": True, "test_dora": False, "test_that_fails": True,
    }  # fmt: skip
    plain = run_suite(folder, "plain", [test for test, record in ours.items() if record["masked"]])
    result = compare(ours, plain)
    assert (result["tests"], result["pass_on_peft"], result["pass_on_ours"]) == (3, 2, 1)
    assert [failure["test"] for failure in result["failures"]] == ["test_delta_is_dense"]
    assert "assert" in result["failures"][0]["reason"]


def test_a_folder_without_the_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoSuiteError, match="neither a checkout of PEFT"):
        unpack_tests(tmp_path, tmp_path)
