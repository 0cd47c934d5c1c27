"""Every method and every setting: either another value changes what the run does or says, or it is refused where it is
given, and then it would have changed nothing."""

import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

import fade.config
import fade.unread
from fade import cli
from fade.concept import concept_from_words
from fade.config import ClosedFormConfig, Config, DataConfig, LocateConfig, OverwriteConfig
from fade.errors import FadeError
from fade.methods import METHODS
from fade.request import settings_for

from ..conftest import tiny_pipeline

CONCEPT = concept_from_words("cat", "dog", ["a {}", "one {}"], ["a house", "a tree", "a car", "a dog"])
SMALL = {
    "data__forget_samples": 2, "data__retain_samples": 3, "data__sampling_steps": 1, "locate__batch_size": 2,
    "overwrite__steps": 2, "overwrite__batch_size": 3, "overwrite__retain_batch_size": 1, "overwrite__warmup_steps": 0,
    "locate__keep": 0.1, "overwrite__stop_every": 2, "overwrite__cooldown_steps": 2, "overwrite__learning_rate": 1e-2,
    "overwrite__checkpoint_every": 3,
}  # fmt: skip
OTHERS: dict[str, tuple[Any, ...]] = {
    "data.forget_images": ("cats",), "data.retain_images": ("others",), "data.forget_from": ("surrogate", "concept"),
    "data.forget_samples": (5,), "data.retain_samples": (6,), "data.sampling_steps": (2,),
    "data.guidance_scale": (6.0,), "data.batch_size": (1,), "data.resolution": (16,), "data.plurals": (True,),
    "locate.saliency": ("denoising", "contrast", "random"), "locate.guidance": (2.0,),
    "locate.scaling": ("none", "module"), "locate.keep": (0.3,), "locate.granularity": ("none", "tile"),
    "locate.tile": (8,), "locate.targets": (("attn2.to_k",),), "locate.passes": (7,), "locate.batch_size": (3,),
    "locate.per_sample": (True, False), "locate.memory_budget": ("7GB",),
    "overwrite.parameters": ("factors", "values"), "overwrite.rank": (3,), "overwrite.alpha": (5.0,),
    "overwrite.steps": (4,), "overwrite.stop_forget": (0.0, 0.4), "overwrite.stop_flat": (0.9,),
    "overwrite.stop_every": (1,), "overwrite.cooldown_steps": (1,), "overwrite.pool": (2, 0),
    "overwrite.batch_size": (2,), "overwrite.retain_batch_size": (3,), "overwrite.accumulation": (2,),
    "overwrite.learning_rate": (0.03,), "overwrite.warmup_steps": (2,), "overwrite.weight_decay": (0.7,),
    "overwrite.max_grad_norm": (1e-4,), "overwrite.forget_weight": (0.77,), "overwrite.retain_weight": (0.55,),
    "overwrite.dual_rate": (0.7,), "overwrite.dual_bound": (0.6,), "overwrite.gift": (0.3,), "overwrite.ekpc": (0.3,),
    "overwrite.timesteps": ("targeted", "uniform"), "overwrite.timestep_band": ((0.1, 0.5),),
    "overwrite.checkpoint_every": (1,), "overwrite.training_mode": ("one-product", "exact"),
    "overwrite.cuda_graph": ("off",),
    "closed_form.retain_change": (0.3,), "closed_form.left": (0.6,), "closed_form.retain_weight": (3.0,),
    "closed_form.phrasings": (False,), "closed_form.protect": (("a lamp",),), "closed_form.hardening": (1,),
    "closed_form.refit": (True,), "closed_form.damping": (0.3,), "gradient_checkpointing": (True,), "seed": (7,),
    "options.answer": ("random",), "options.barrier": ("cosine", "fixed"), "options.direction": ("prompt",),
    "options.neutral": ("empty",), "options.among": ("all",), "options.tokens": ("following",),
    "options.preserved": ("last",), "options.neighbours": (1,), "options.most": (100.0,), "options.slack": (0.5,),
    "options.bound": (1e-3,), "options.anchors": (0.4,), "options.empty": (1.0,),
    "options.attacked": (3,), "options.threshold": (3.0,),
}  # fmt: skip
"""Other values for every setting; options that are numbers or switches need none here."""
BESIDE = {"options.attacked": {"options__attacked_share": 1.0, "options__attack_every": 1, "options__attack_steps": 1}}
"""What must be set with it for a setting to show in so short a run."""
TABLES = {"data": DataConfig, "locate": LocateConfig, "overwrite": OverwriteConfig, "closed_form": ClosedFormConfig}


def settings_of(config: Config) -> list[str]:
    named = [f"{table}.{one.name}" for table, kind in TABLES.items() for one in dataclasses.fields(kind)]
    named += [f"options.{name}" for name in config.options] + ["gradient_checkpointing", "seed"]
    return [name for name in named if name != "overwrite.method"]


def value_of(config: Config, name: str) -> Any:
    table, _, own = name.rpartition(".")
    if table == "options":
        return config.options[own]
    return getattr(getattr(config, table) if table else config, own)


def other_value(config: Config, name: str) -> Any:
    now = value_of(config, name)
    if name not in OTHERS:
        return not now if isinstance(now, bool) else now + 1 if isinstance(now, int) else now * 0.6 or 0.2
    return next(value for value in OTHERS[name] if value != now)


def with_value(config: Config, name: str, value: Any) -> Config:
    return config.replace(**{name.replace(".", "__"): value})


def small(name: str) -> Config:
    config = Config.of(name)
    few = {"overwrite__pool": 3} if config.overwrite.pool else {}
    few |= {"overwrite__stop_forget": 1e9} if config.overwrite.stops else {}
    # Dual ascent begins without a forget loss: nothing has a retain loss before the third step.
    few |= {"overwrite__steps": 3} if config.overwrite.dual_rate else {}
    options = {f"options__{key}": 2 for key in config.options if key.endswith("steps")}
    options |= {"options__eta": 1e4} if "eta" in config.options else {}  # so that the inner steps have a say
    for key, value in {**SMALL, **few, **options}.items():
        config = with_value(config, key.replace("__", "."), value)
    return config.without_ignored()


@pytest.fixture(scope="module")
def shared(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StableDiffusionPipeline]:
    """A pipeline for all runs, in a folder with pictures of both kinds."""
    folder, before = tmp_path_factory.mktemp("pictures"), Path.cwd()
    for kind in ("cats", "others"):
        (folder / kind).mkdir()
        for index in range(2):
            Image.effect_noise((32, 32), 90).convert("RGB").save(folder / kind / f"{index}.png")
    os.chdir(folder)
    yield tiny_pipeline(tokenizer)
    os.chdir(before)


def outcome(
    pipeline: StableDiffusionPipeline, config: Config, output: Path | None = None
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The adapter's weights and what the run's record says, whether the settings are all read or not."""
    with patch.object(Config, "refuse_ignored"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = fade.unlearn(pipeline, concept=CONCEPT, config=config, output=output, progress=False)
    beside = ("seconds", "peak_memory_bytes", "saliency_plan", "saliency")
    weights = [layer.get_delta_weight("fade").clone() for layer in adapter.layers.values()]
    adapter.remove()
    return weights, {key: value for key, value in adapter.run.items() if key not in beside}


def same(one: tuple[list[torch.Tensor], dict], two: tuple[list[torch.Tensor], dict]) -> bool:
    alike = len(one[0]) == len(two[0]) and all(map(torch.equal, one[0], two[0]))
    return alike and one[1] == two[1]


@contextlib.contextmanager
def reads() -> Iterator[set[str]]:
    """Collects which settings are looked at meanwhile, by other than those that only check, copy or record them."""
    found: set[str] = set()
    doing = {name for kind in (Config, *TABLES.values()) for name, one in vars(kind).items() if type(one) is property}

    def watching(table: str, names: set[str]) -> Any:
        def get(self: Any, name: str) -> Any:
            if name in names:
                frame = sys._getframe(1)
                while frame.f_code.co_filename == config_file and frame.f_code.co_name in doing:
                    frame = frame.f_back
                if frame.f_code.co_filename not in passing and frame.f_code.co_name != "settings_for":
                    found.add(f"{table}.{name}" if table else name)
            return object.__getattribute__(self, name)

        return get

    config_file = fade.config.__file__
    passing = {config_file, fade.unread.__file__, dataclasses.__file__}
    with contextlib.ExitStack() as patches:
        for table, kind in (("", Config), *TABLES.items()):
            names = {one.name for one in dataclasses.fields(kind)}
            patches.enter_context(patch.object(kind, "__getattribute__", watching(table, names)))
        yield found


AT_RISK = ("overwrite.forget_weight", "overwrite.retain_weight", "overwrite.dual_rate")
"""What every trained method looks at, and its own code may pass over all the same; as it may its options."""


@pytest.mark.parametrize("name", METHODS)
def test_a_setting_changes_what_a_run_does_or_is_refused(
    shared: StableDiffusionPipeline, name: str, tmp_path: Path
) -> None:
    config = small(name)
    passed_over, every = config.unread(), settings_of(config)
    assert passed_over.keys() <= set(every)
    everything = config
    for setting in passed_over:
        told = f"{setting} would (be ignored: .*the method {name} |not hold: the method {name} )"
        with pytest.raises(FadeError, match=told):
            with_value(config, setting, other_value(config, setting)).refuse_ignored()
        with contextlib.suppress(FadeError):
            everything = with_value(everything, setting, other_value(config, setting))
    with reads() as looked_at:
        found = outcome(shared, config, tmp_path / "run")
    assert same(outcome(shared, everything), found)
    tables = [setting for setting in every if not setting.startswith("options.")]
    assert not [setting for setting in tables if setting not in passed_over and setting not in looked_at]
    risky = [s for s in every if (s in AT_RISK or s.startswith("options.")) and s not in passed_over]
    for setting in risky:
        changed = with_value(config, setting, other_value(config, setting)).replace(**BESIDE.get(setting, {}))
        assert setting not in changed.ignored()  # what it switches off may be
        assert not same(outcome(shared, changed.without_ignored()), found), setting


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_own_settings_and_those_of_earlier_files_are_not_refused(name: str) -> None:
    config = Config.of(name)
    config.refuse_ignored()
    several = settings_for(config, 3, True)  # as a record has it: keep and retain_change are for so many concepts
    assert Config.from_dict(several.to_dict()) == several
    given = Config.from_dict(with_value(config, "locate.passes", 9).to_dict())
    assert given.without_ignored().ignored() == {} and (given.locate.passes == 9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"overwrite__method": "salun", "locate__granularity": "none", "locate__keep": 0.2}, "locate.keep"),
        ({"overwrite__method": "distillation", "locate__tile": 8}, "locate.tile"),
        ({"overwrite__method": "distillation", "locate__saliency": "random", "locate__passes": 3}, "locate.passes"),
        ({"overwrite__method": "both", "locate__scaling": "none"}, "locate.scaling"),
        ({"closed_form__retain_weight": 1.0, "closed_form__left": 0.5}, "closed_form.left"),
        ({"overwrite__method": "erasediff", "options__barrier": "fixed", "options__eta": 0.3}, "options.eta"),
        ({"overwrite__method": "robust", "options__redrawn": False, "options__bound": 3.0}, "options.bound"),
        ({"overwrite__method": "robust", "options__attack_rate": 0.5}, "options.attack_rate"),
        ({"overwrite__method": "retrack", "overwrite__timesteps": "uniform", "overwrite__timestep_band": (0.0, 0.5)},
         "overwrite.timestep_band"),
    ],
)  # fmt: skip
def test_what_another_setting_switches_off_is_refused(changes: dict[str, Any], told: str) -> None:
    config = Config().replace(**changes)
    with pytest.raises(FadeError, match=f"^{told} would be ignored: the method {config.overwrite.method} "):
        config.refuse_ignored()


def test_what_a_setting_switches_on_is_read() -> None:
    for changes in (
        {"overwrite__method": "esd-x", "locate__granularity": "element", "locate__keep": 0.2},
        {"overwrite__method": "erasediff", "options__barrier": "fixed", "overwrite__forget_weight": 0.3},
        {"overwrite__method": "leco", "locate__granularity": "element", "data__forget_images": "cats"},
        {"overwrite__method": "robust", "options__attacked": 4, "options__anchors": 0.1, "options__attack_rate": 0.5},
        {"overwrite__dual_rate": 0.1, "overwrite__dual_bound": 0.3},
        {"overwrite__method": "loku", "locate__passes": 3},
    ):
        Config().replace(**changes).refuse_ignored()


def test_a_run_and_the_command_line_refuse_and_a_resumed_run_goes_on(
    shared: StableDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config.of("uce").replace(locate__keep=0.5)
    with pytest.raises(FadeError, match="locate.keep would be ignored: the method uce"):
        fade.unlearn(shared, concept=CONCEPT, config=config)
    with pytest.raises(FadeError, match="nothing to resume"):  # and not that an earlier version took the setting
        fade.unlearn(shared, concept=CONCEPT, config=config, output=tmp_path / "none", resume=True)
    file = tmp_path / "run.toml"
    file.write_text("[locate]\nkeep = 0.5\n")
    words = ["unlearn", "digitcanvas", "--forget", "three", "--surrogate", "eight", "--output", str(tmp_path / "out")]
    for given, told in (
        (["--keep", "0.01", "--method", "esd-x"], "--keep would be ignored: the method esd-x"),  # at its default, too
        (["--config", str(file), "--method", "esd-x"], "locate.keep would be ignored: the method esd-x"),
        (["--method", "robust", "--option", "attack_steps=3"], "--option attack_steps would be ignored: the method"),
    ):
        assert cli.main([*words, *given]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert told in line
    assert cli.main(["plan", "digitcanvas", "--method", "ssd", "--keep", "0.5"]) == 2
    assert "--keep would be ignored: the method ssd" in capsys.readouterr().err


def test_one_method_is_told_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "retrack", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["overwrite.timestep_band"] == [0.4, 1.0] and "locate.keep" in told["unread"]
    assert cli.main(["methods", "erasediff"]) == 0
    shown = capsys.readouterr().out
    assert "overwrite.steps = 100" in shown and "--gift" in shown and "--dual-rate" not in shown
    assert cli.main(["methods", "gift"]) == 2
    assert "there is no method 'gift'" in capsys.readouterr().err
