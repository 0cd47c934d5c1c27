"""Settings: every value is checked, and nothing unknown is ignored."""

from pathlib import Path
from typing import Any

import pytest

import fade
from fade import unlearning
from fade.config import PAPER, Config
from fade.digitcanvas import load_pipeline
from fade.errors import FadeError


def test_round_trip_through_a_dictionary() -> None:
    config = PAPER.replace(locate__targets=["to_k", "*.conv1"], overwrite__timestep_band=[0, 0.5], seed=7)
    assert Config.from_dict(config.to_dict()) == config
    assert config.locate.targets == ("to_k", "*.conv1")


def test_replace_changes_only_what_it_names() -> None:
    config = Config().replace(locate__keep=0.2, overwrite__method="distillation", overwrite__rank=2)
    assert (config.locate.keep, config.overwrite.rank) == (0.2, 2)
    assert config.data == Config().data
    assert config.overwrite.alpha == Config().overwrite.alpha


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'seed = 3\n[locate]\nkeep = 1\ntargets = ["to_v"]\n[overwrite]\nsteps = 5\ntraining_mode = "auto"\n'
    )
    config = Config.load(path)
    assert (config.seed, config.locate.keep, config.locate.targets, config.overwrite.steps) == (3, 1.0, ("to_v",), 5)
    assert (config.overwrite.training_mode, config.overwrite.cuda_graph) == ("auto", "auto")


def test_the_papers_procedure_draws_fresh_noise_and_makes_every_step() -> None:
    assert (PAPER.overwrite.pool, PAPER.overwrite.stops, PAPER.overwrite.steps) == (0, False, 200)
    assert Config().overwrite.pool > 0 and Config().overwrite.stops


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lokate": {}}, "unknown setting 'lokate'"),
        ({"locate": {"kep": 0.1}}, "unknown setting 'locate.kep'"),
        ({"overwrite": {"lora_dropout": 0.2}}, "unknown setting 'overwrite.lora_dropout'"),
        ({"locate": {"keep": 0}}, r"keep must be in \(0, 1\]"),
        ({"locate": {"keep": 1.01}}, r"keep must be in \(0, 1\]"),
        ({"locate": {"keep": float("nan")}}, r"keep must be in \(0, 1\]"),
        ({"locate": {"saliency": "gradient"}}, "'locate.saliency' must be one of 'denoising'"),
        ({"locate": {"targets": "to_q"}}, "'locate.targets' must be a list"),
        ({"locate": {"targets": []}}, "targets must name at least one"),
        ({"locate": 3}, "'locate' must be a table"),
        ({"overwrite": {"rank": 0}}, "rank must be at least 1"),
        ({"overwrite": {"rank": 2.5}}, "'overwrite.rank' must be of type int"),
        ({"overwrite": {"rank": True}}, "'overwrite.rank' must be of type int"),
        ({"overwrite": {"learning_rate": "fast"}}, "'overwrite.learning_rate' must be of type float"),
        ({"overwrite": {"learning_rate": 0}}, "learning_rate must be a positive, finite number"),
        ({"overwrite": {"forget_weight": -1}}, "forget_weight must be finite and not negative"),
        ({"overwrite": {"stop_forget": -0.1}}, "stop_forget must be finite and not negative"),
        ({"overwrite": {"stop_every": 0}}, "stop_every must be at least 1"),
        ({"overwrite": {"pool": -1}}, "pool must be finite and not negative"),
        ({"overwrite": {"timestep_band": [0.5, 0.5]}}, "timestep_band must satisfy"),
        ({"overwrite": {"timestep_band": [0.1, 0.2, 0.3]}}, "must have 2 entries"),
        ({"data": {"resolution": 4}}, "resolution must be at least 8"),
        (
            {"overwrite": {"training_mode": "rounded"}},
            "'overwrite.training_mode' must be one of 'exact', 'one-product'",
        ),
        ({"overwrite": {"cuda_graph": True}}, "'overwrite.cuda_graph' must be one of 'auto', 'on', 'off'"),
        ({"data": {"plurals": "yes"}}, "'data.plurals' must be of type bool"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**63 - 1}, "seed must be in"),
        ({"overwrite": {"rank": 10**6}}, "rank must be at most"),
        ({"overwrite": {"alpha": float("inf")}}, "alpha must be a positive, finite number"),
        ({"locate": {"tile": 10**9}}, "tile must be in"),
        ({"data": {"guidance_scale": float("nan")}}, "guidance_scale must be a finite number"),
    ],
)
def test_bad_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(FadeError, match=message):
        Config.from_dict(values)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FadeError, match="cannot read the config file"):
        Config.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("keep == 3")
    with pytest.raises(FadeError, match="not valid TOML"):
        Config.load(tmp_path / "bad.toml")


@pytest.mark.parametrize("changes", [{"method": "both"}, {"method": "closed-form"}, {"parameters": "values"}])
@pytest.mark.parametrize(("name", "value"), [("rank", 4), ("alpha", 1.0)])
def test_what_only_factors_have_is_not_ignored_in_silence(changes: dict[str, str], name: str, value: float) -> None:
    base = {"overwrite__method": "distillation"} | {f"overwrite__{key}": text for key, text in changes.items()}
    with pytest.raises(FadeError, match=f"{name} would be ignored.*distillation with parameters factors"):
        Config().replace(**base, **{f"overwrite__{name}": value})
    Config().replace(overwrite__method="distillation", **{f"overwrite__{name}": value})
    with pytest.raises(FadeError, match=f"{name} would be ignored: what the method uce computes has the rank"):
        Config.of("uce").replace(**{f"overwrite__{name}": value})


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("both", {}, set()), ("distillation", {}, set()), ("esd-x", {}, set()),
        ("salun", {}, {"forget", "retain"}), ("salun", {"locate__saliency": "distillation"}, {"retain"}),
        ("fade", {}, {"forget"}), ("fade", {"locate__granularity": "none"}, set()),
        ("distillation", {"locate__saliency": "contrast"}, {"forget", "retain"}),
        ("distillation", {"overwrite__ekpc": 1e-3}, {"retain"}), ("ssd", {}, {"forget", "retain"}),
    ],
)  # fmt: skip
def test_what_is_denoised(name: str, changes: dict[str, Any], parts: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run has pictures of just that show their prompts."""
    config = Config.of(name, **changes)
    assert config.denoises == parts

    class Seen(Exception):
        pass

    def prepared(*given: Any) -> None:
        raise Seen(given[-1])

    monkeypatch.setattr(unlearning, "prepare_latents", prepared)
    with pytest.raises(Seen) as seen:
        fade.unlearn(load_pipeline(), "three", "eight", config=config, progress=False)
    assert seen.value.args[0] == parts
