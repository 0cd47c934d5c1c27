"""PEFT's SHiRA: the masked values with their positions, as a folder that `PeftModel.from_pretrained` loads.

PEFT makes room for r·(N + K) values in every layer, one r for all, with a random mask, and then overwrites both from
the file. So every layer is filled up to that number with zeros at positions outside the mask: the densest layer
decides, and nothing is added to any weight that the adapter does not change.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import ShiraConfig
from safetensors.torch import save_file
from torch import Tensor

from fade.errors import FadeError
from fade.export.edit import Edit, ErrorSum, ExportReport, chosen_dtype, refuse_nothing
from fade.files import atomic_folder, check_replaceable

CONFIG = "adapter_config.json"


def write(
    edit: Edit, path: Path, say: Callable[[str], None], overwrite: bool, lossy: bool = False, dtype: str = "fp32"
) -> ExportReport:
    """Writes the folder. Raises FadeError as `fade.export.export` says, and for what SHiRA cannot hold: convolutions,
    and a layer too small for the number of values that the densest one needs."""
    precision = chosen_dtype(dtype, lossy)
    check_replaceable(path, overwrite, CONFIG, "PEFT adapter folder")
    r = _common_rank(edit)
    tensors, errors, changed = {}, ErrorSum(), 0
    for name in edit.layers:
        delta = edit.delta(name)
        indices = _positions(edit, name, r)
        values = delta[indices[0], indices[1]].to(precision)
        key = f"base_model.model.{name}"
        tensors[f"{key}.shira_weight"], tensors[f"{key}.shira_indices"] = values, indices.int()
        errors.add(name, delta, torch.zeros_like(delta).index_put_((indices[0], indices[1]), values.float()))
        changed += bool(delta.any())
    refuse_nothing(edit, changed)
    exactness = errors.words(lossy)
    size = sum(tensor.nbytes for tensor in tensors.values())
    selected = sum(layer.mask.count for layer in edit.layers.values())
    held = sum(tensor.numel() for key, tensor in tensors.items() if key.endswith("weight"))
    say(f"writing {size:,} bytes: {selected:,} values, filled up to {held:,} (r = {r} for every layer)")
    config = ShiraConfig(
        r=r,
        random_seed=0,
        target_modules=sorted(edit.layers),
        base_model_name_or_path=str(edit.metadata.get("base", "unknown")),
        inference_mode=True,
    )
    with atomic_folder(path, CONFIG) as folder:
        config.save_pretrained(folder)
        file = folder / "adapter_model.safetensors"
        save_file(tensors, file, metadata=edit.record("shira", exactness))
    return ExportReport(path, (path / file.name).stat().st_size, exactness, errors.total, errors.layers)


def _common_rank(edit: Edit) -> int:
    """The smallest r with room for every layer's values."""
    needed = {}
    for name, layer in edit.layers.items():
        if edit.kernel(name):
            raise FadeError(
                f"{name} is a convolution, and PEFT's SHiRA has linear layers alone; export it as lora or diff"
            )
        needed[name] = -(-layer.mask.count // sum(layer.mask.shape))
    densest = max(needed, key=needed.__getitem__)
    r = max(1, needed[densest])
    for name, layer in edit.layers.items():
        n, k = layer.mask.shape
        if r * (n + k) > n * k:
            values = edit.layers[densest].mask.count
            raise FadeError(
                f"PEFT's SHiRA takes the same r in every layer, at least {r} for the {values:,} values of {densest}, "
                f"and r·(N + K) = {r * (n + k):,} values are more than the {n * k:,} weights of {name}; unlearn with a "
                "smaller keep, or export it as lora or diff"
            )
    return r


def _positions(edit: Edit, name: str, r: int) -> Tensor:
    """int64 [2, r·(N + K)]: rows and columns of the mask's entries, then of the first others."""
    chosen = edit.layers[name].mask.unpack().cpu()
    spare = r * sum(chosen.shape) - int(chosen.sum())
    return torch.cat([chosen.nonzero(), (~chosen).nonzero()[:spare]]).T.contiguous()
