"""An ordinary LoRA: A [R, K] and B [N, R] with BA = Δ, for every program that loads LoRAs.

A mask that is whole rows and columns, or rows × columns, is a sum of few rectangles r cᵀ, and on each of them Δ has
exact factors:

- of factors, M⊙(BA) = Σ (diag(r) B)(A diag(c)), of rank r for each rectangle;
- of values, the rows (or columns) of Δ themselves against one-hot columns (rows), bit for bit;
- where Δ is of low rank by itself, as a dense closed form's is (at most one for each token that differs), its singular
  vectors.

Any other mask makes Δ of full rank, and its nearest LoRA another edit: refused, unless `lossy` asks for it.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from fade.adapter_file import component_of
from fade.errors import FadeError
from fade.export.edit import (
    EXACT,
    Edit,
    ErrorSum,
    ExportReport,
    check_file,
    chosen_dtype,
    kohya_name,
    refuse_nothing,
)
from fade.files import atomic_folder, atomic_write, check_replaceable
from fade_kernels import BitMask

KEYS = ("diffusers", "peft", "kohya")
MOST_RECTANGLES = 2
"""Whole rows beside whole columns are two: all columns of some rows, some columns of all others."""

Factors = tuple[Tensor, Tensor]
"""A [R, K] and B [N, R], float32 on the CPU."""


def write(
    edit: Edit,
    path: Path,
    say: Callable[[str], None],
    overwrite: bool,
    keys: str = "diffusers",
    lossy: bool = False,
    rank: int | None = None,
    dtype: str = "fp32",
) -> ExportReport:
    """Writes a LoRA with the keys of diffusers, of PEFT (a folder) or of kohya's trainers, which ComfyUI reads.

    `rank` is what layers get, with `lossy`, whose Δ is no LoRA of a smaller rank: the nearest one (truncated SVD).
    Raises FadeError as `fade.export.export` says.
    """
    if keys not in KEYS:
        raise FadeError(f"there are no keys {keys!r}; choose one of {', '.join(KEYS)}")
    if rank is not None and not lossy:
        raise FadeError("a rank is for a lossy export; pass --lossy too, or leave the rank out")
    if rank is not None and rank < 1:
        raise FadeError(f"the rank must be at least 1, not {rank}")
    precision = chosen_dtype(dtype, lossy)
    if keys == "peft":
        check_replaceable(path, overwrite, "adapter_config.json", "PEFT adapter folder")
    else:
        check_file(path, overwrite)

    found, refused = {}, []
    for name in edit.layers:
        edit.kernel(name)
        delta = edit.delta(name)
        factors = exact_factors(edit, name, delta)
        if rank is not None and (factors is None or len(factors[0]) > rank):
            factors = nearest(delta, rank)
        if factors is None:
            refused.append(name)
        elif len(factors[0]):
            found[name] = factors
    if refused:
        raise FadeError(_no_lora(edit, refused))
    refuse_nothing(edit, len(found))

    alpha = _usual_rank(found)
    layers, errors = {}, ErrorSum()
    for name, (lora_a, lora_b) in found.items():
        scaling = alpha / len(lora_a) if keys == "kohya" else 1.0
        lora_a, lora_b = lora_a.to(precision).contiguous(), (lora_b / scaling).to(precision).contiguous()
        layers[name] = lora_a, lora_b
        errors.add(name, edit.delta(name), scaling * (lora_b.double() @ lora_a.double()))
    tensors, header = _named(layers, edit, keys, alpha)
    exactness = errors.words(lossy)
    record = {**edit.record(f"lora ({keys} keys)", exactness), **header}
    size = sum(tensor.nbytes for tensor in tensors.values())
    ranks = [len(lora_a) for lora_a, _ in layers.values()]
    dense = sum(len(lora_b) * lora_a.shape[1] for lora_a, lora_b in layers.values()) * precision.itemsize
    larger = f" (as diff it would take {dense:,})" if size > dense else ""
    say(f"writing {size:,} bytes{larger}: ranks {min(ranks)} to {max(ranks)} in {len(layers)} layers")
    if keys == "peft":
        with atomic_folder(path, "adapter_config.json") as folder:
            _peft_config(layers, edit).save_pretrained(folder)
            save_file(tensors, folder / "adapter_model.safetensors", metadata=record)
        written = path / "adapter_model.safetensors"
    else:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=record)
        written = path
    return ExportReport(path, written.stat().st_size, exactness, errors.total, errors.layers)


def exact_factors(edit: Edit, name: str, delta: Tensor) -> Factors | None:
    """Factors of a layer's Δ, of rank 0 where that is zero, or None where only the trivial ones of full rank are."""
    layer = edit.layers[name]
    n, k = delta.shape
    rectangles = _rectangles(layer.mask)
    few = len(rectangles) <= MOST_RECTANGLES
    if not bool(delta.any()):
        return torch.zeros(0, k), torch.zeros(n, 0)
    copied = sum(min(int(rows.sum()), int(columns.sum())) for rows, columns in rectangles)
    if layer.factors is not None:
        of_factors = len(layer.factors[0]) * len(rectangles)
        if of_factors < (copied if few else min(n, k)):
            return _restricted(layer.factors, rectangles, edit.scales[name])
    if not few:
        return None
    if copied * (n + k) >= n * k:
        # As large as Δ itself: worth asking whether it is of lower rank.
        left, values, right = _svd(delta)
        low = _numerical_rank(values)
        if low < copied:
            return _scaled(left, values, right, low)
    return _copies(delta, rectangles)


def nearest(delta: Tensor, rank: int) -> Factors:
    """The LoRA of a rank that is nearest to Δ in the Frobenius norm."""
    left, values, right = _svd(delta)
    return _scaled(left, values, right, min(rank, _numerical_rank(values)))


def _rectangles(mask: BitMask) -> list[tuple[Tensor, Tensor]]:
    """A mask as rectangles without overlap: for each pattern that rows have, these rows and its columns, as bool."""
    patterns, which = torch.unique(mask.words.cpu(), dim=0, return_inverse=True)
    columns = BitMask(patterns, (len(patterns), mask.shape[1])).unpack()
    return [(which == index, pattern) for index, pattern in enumerate(columns) if bool(pattern.any())]


def _restricted(factors: Factors, rectangles: list[tuple[Tensor, Tensor]], scale: float) -> Factors:
    lora_a, lora_b = (factor.detach().cpu().float().flatten(1) for factor in factors)
    lora_b = lora_b * scale
    return (
        torch.cat([lora_a * columns for _, columns in rectangles]),
        torch.cat([lora_b * rows[:, None] for rows, _ in rectangles], dim=1),
    )


def _copies(delta: Tensor, rectangles: list[tuple[Tensor, Tensor]]) -> Factors:
    n, k = delta.shape
    downs, ups = [], []
    for rows, columns in rectangles:
        row, column = rows.nonzero()[:, 0], columns.nonzero()[:, 0]
        if len(row) <= len(column):
            downs.append(delta[row] * columns)
            ups.append(torch.zeros(n, len(row)).index_put_((row, torch.arange(len(row))), torch.ones(())))
        else:
            downs.append(torch.zeros(len(column), k).index_put_((torch.arange(len(column)), column), torch.ones(())))
            ups.append(delta[:, column] * rows[:, None])
    return torch.cat(downs), torch.cat(ups, dim=1)


def _svd(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(delta.double(), full_matrices=False)


def _numerical_rank(values: Tensor) -> int:
    """The smallest rank whose Frobenius error is below half of `EXACT`; rounding the factors has the other half."""
    left_out = values.square().flip(0).cumsum(0).flip(0)
    return int((left_out > (EXACT / 2) ** 2 * left_out[0]).sum()) if len(values) else 0


def _scaled(left: Tensor, values: Tensor, right: Tensor, rank: int) -> Factors:
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float()


def _no_lora(edit: Edit, refused: list[str]) -> str:
    name = refused[0]
    n, k = edit.layers[name].mask.shape
    others = f" (and {len(refused) - 1} others)" if len(refused) > 1 else ""
    patterns = len(_rectangles(edit.layers[name].mask))
    return (
        f"the mask of {name}{others} is not whole rows and columns (its rows have {patterns} different patterns), so a "
        f"LoRA would need a rank of up to {min(n, k)} to hold the change exactly. Export it as shira or diff; or "
        "unlearn with --granularity channel, which a LoRA holds exactly; or pass --lossy --rank R for the nearest LoRA "
        "of rank R"
    )


def _usual_rank(layers: dict[str, Factors]) -> int:
    """The most frequent one: r of PEFT's configuration, and kohya's alpha.

    Of all layers the same alpha, which B makes up for, because diffusers (0.42) loses those of attention layers that
    differ from the most frequent.
    """
    return Counter(len(lora_a) for lora_a, _ in layers.values()).most_common(1)[0][0]


def _named(layers: dict[str, Factors], edit: Edit, keys: str, alpha: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under their keys, and what the file's header says beyond the record."""
    tensors: dict[str, Tensor] = {}
    for name, (lora_a, lora_b) in layers.items():
        kernel = edit.kernel(name)
        rank = len(lora_a)
        down = lora_a.reshape(rank, -1, *kernel)
        up = lora_b.reshape(len(lora_b), rank, *(1 for _ in kernel))
        if keys == "kohya":
            own = kohya_name(name)
            tensors[f"{own}.lora_down.weight"], tensors[f"{own}.lora_up.weight"] = down, up
            tensors[f"{own}.alpha"] = torch.tensor(float(alpha))
        else:
            prefix = f"{component_of(edit.metadata)}." if keys == "diffusers" else "base_model.model."
            tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"] = down, up
    if keys == "kohya":
        return tensors, {"ss_network_module": "networks.lora"}
    if keys == "peft":
        return tensors, {}
    # Without it, releases of diffusers before 0.36 scale layers whose rank is not the most frequent one.
    config = {f"{component_of(edit.metadata)}.{key}": value for key, value in _settings(layers).items()}
    return tensors, {"lora_adapter_metadata": json.dumps(config)}


def _settings(layers: dict[str, Factors]) -> dict[str, object]:
    """LoraConfig's arguments: every layer at its own rank, with a scaling of 1."""
    ranks = {name: len(lora_a) for name, (lora_a, _) in layers.items()}
    rank = _usual_rank(layers)
    patterns = {f"^{name}": own for name, own in ranks.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
    }


def _peft_config(layers: dict[str, Factors], edit: Edit) -> LoraConfig:
    base = str(edit.metadata.get("base", "unknown"))
    return LoraConfig(**_settings(layers), base_model_name_or_path=base, inference_mode=True)
