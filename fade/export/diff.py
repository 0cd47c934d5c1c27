"""Δ itself, dense, as `.diff` keys, which ComfyUI and A1111 add to the weights. Exact for every mask, and as large as
the weights that it changes."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from fade.export.edit import (
    Edit,
    ErrorSum,
    ExportReport,
    check_file,
    chosen_dtype,
    kohya_name,
    refuse_nothing,
)
from fade.files import atomic_write


def write(
    edit: Edit, path: Path, say: Callable[[str], None], overwrite: bool, lossy: bool = False, dtype: str = "fp32"
) -> ExportReport:
    """Writes one tensor `lora_unet_….diff` for each layer, of its weight's shape.

    Raises FadeError as `fade.export.export` says.
    """
    precision = chosen_dtype(dtype, lossy)
    check_file(path, overwrite)
    shapes = {}
    for name, layer in edit.layers.items():
        kernel = edit.kernel(name)
        n, k = layer.mask.shape
        shapes[name] = (n, k // (kernel[0] * kernel[1] if kernel else 1), *kernel)
    size = sum(layer.mask.shape[0] * layer.mask.shape[1] for layer in edit.layers.values()) * precision.itemsize
    say(f"writing {size:,} bytes: every weight of {len(shapes)} layers")

    tensors, errors = {}, ErrorSum()
    for name, shape in shapes.items():
        delta = edit.delta(name)
        if bool(delta.any()):
            written = delta.to(precision)
            tensors[f"{kohya_name(name)}.diff"] = written.reshape(shape)
            errors.add(name, delta, written)
    refuse_nothing(edit, len(tensors))
    exactness = errors.words(lossy)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=edit.record("diff", exactness))
    return ExportReport(path, path.stat().st_size, exactness, errors.total, errors.layers)
