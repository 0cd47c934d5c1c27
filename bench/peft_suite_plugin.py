"""A pytest plugin that puts masked layers under PEFT's own tests; `bench.peft_suite` starts pytest with it.

Every LoraConfig gets MASKED_LAYERS registered, so that PEFT builds its LoRA on an `nn.Linear` and an `nn.Conv2d` from
them; every plain LoRA adapter on such a layer then gets a mask of half the weight. What masked adapters do not do (DoRA
and other variants, `lora_bias`, groups, initialisations that change the base weight) stays an adapter without a mask
on a masked layer. A mask is drawn from the adapter's initial factors: the same seed gives the same mask, as it gives
the same factors, and an adapter that a file is loaded into begins with another mask than the file's.

Apart from `bench.peft_suite` because it imports PEFT, in a process of its own.
"""

import json
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig

PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal")

_masked_adapters = 0
_masks_wanted = True


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fade")
    group.addoption("--fade-form", choices=["plain", "factors", "values"], help="plain: PEFT's own layers")
    group.addoption("--fade-report", type=Path, help="JSON lines: one object per test")
    group.addoption("--fade-only", type=Path, help="a file of node ids, one per line: run these alone")


def pytest_configure(config: pytest.Config) -> None:
    # PEFT's test helpers import it; the tests of custom models load no data set.
    sys.modules.setdefault("datasets", types.SimpleNamespace(load_dataset=None))
    if config.getoption("--fade-form") != "plain":
        put_masked_layers_under_lora(values=config.getoption("--fade-form") == "values")


def put_masked_layers_under_lora(values: bool) -> None:
    """Patches LoraConfig and the masked layers' `update_layer` for the rest of the process."""
    # As attaching an adapter does: it also changes how PEFT adds masked adapters up.
    import fade.tuner  # noqa: F401
    from fade.layers import MASKED_LAYERS

    post_init = LoraConfig.__post_init__

    def register(config: LoraConfig) -> None:
        post_init(config)
        if type(config) is LoraConfig:
            config._register_custom_module(MASKED_LAYERS)

    LoraConfig.__post_init__ = register
    for layer_class in MASKED_LAYERS.values():
        layer_class.update_layer = _mask_after(layer_class.update_layer, values)


def _mask_after(update_layer: Any, values: bool) -> Any:
    def update_and_mask(layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        global _masked_adapters
        update_layer(layer, adapter_name, *args, **kwargs)
        config = kwargs.get("config")
        if not _is_plain(layer, adapter_name, config):
            return
        _masked_adapters += 1
        mask = _half_mask(layer, adapter_name)
        layer.set_mask(adapter_name, mask)
        if values:
            # With low_cpu_mem_usage PEFT makes the factors on the meta device, and a file's take their place.
            factor = layer.lora_A[adapter_name].weight
            trained = torch.zeros(mask.count) if factor.is_meta else layer.packed_values(adapter_name)
            # Without a rank the scale is alpha.
            layer.r[adapter_name], layer.lora_alpha[adapter_name] = 1, layer.scaling[adapter_name]
            layer.set_values(adapter_name, mask, trained.to(factor.dtype))
            layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    return update_and_mask


def _is_plain(layer: Any, adapter_name: str, config: LoraConfig) -> bool:
    return (
        adapter_name not in layer.lora_variant
        and not layer.lora_bias[adapter_name]
        and getattr(layer.get_base_layer(), "groups", 1) == 1
        and config.init_lora_weights in PLAIN_INITIALISATIONS
        and _masks_wanted
    )


def _half_mask(layer: Any, adapter_name: str) -> Any:
    from fade_kernels import BitMask

    weight = layer.get_base_layer().weight
    shape = (weight.shape[0], weight[0].numel())
    lora_a = layer.lora_A[adapter_name].weight.detach()
    factors = f"{shape}" if lora_a.is_meta else f"{shape}{lora_a.float().flatten().tolist()}"
    generator = torch.Generator().manual_seed(zlib.crc32(factors.encode()))
    return BitMask.pack(torch.rand(shape, generator=generator, device="cpu") < 0.5)


def _is_lora(item: pytest.Item) -> bool:
    """Whether a test is not parametrised by the configuration of another method."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    others = [
        p for p in parameters if isinstance(p, type) and issubclass(p, PeftConfig) and not issubclass(p, LoraConfig)
    ]
    return not others


def _is_plain_case(item: pytest.Item) -> bool:
    """Whether a test's settings are plain LoRA's. Some tests switch the initialisation of a variant off in one of their
    two models: a mask in that one alone would compare two things."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    settings = [p for p in parameters if isinstance(p, dict)]
    return all(s.get("init_lora_weights", True) in PLAIN_INITIALISATIONS for s in settings)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if path := config.getoption("--fade-only"):
        wanted = set(path.read_text(encoding="utf-8").splitlines())
        items[:] = [item for item in items if item.nodeid in wanted]
    else:
        items[:] = [item for item in items if _is_lora(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    global _masks_wanted
    before, _masks_wanted = _masked_adapters, _is_plain_case(item)
    result = yield
    item.config.stash[_CURRENT]["masked"] = _masked_adapters - before
    _write(item.config, item.config.stash[_CURRENT])
    return result


_CURRENT = pytest.StashKey[dict[str, Any]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.when == "setup":
        item.config.stash[_CURRENT] = {"test": item.nodeid, "outcome": "passed", "seconds": 0.0, "reason": ""}
    record = item.config.stash[_CURRENT]
    record["seconds"] += report.duration
    if record["outcome"] == "passed" and report.outcome != "passed":
        record["outcome"] = report.outcome
        if call.excinfo is not None:
            record["reason"] = call.excinfo.exconly().strip().splitlines()[0]
    return report


def _write(config: pytest.Config, record: dict[str, Any]) -> None:
    with config.getoption("--fade-report").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
