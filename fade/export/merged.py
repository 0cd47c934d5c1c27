"""An unlearned pipeline with the adapter merged into its weights: an ordinary diffusers folder, or one file in the
original layout.

For programs that know no masks: whoever loads it needs nothing of this package, and cannot switch the adapter off.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fade.adapter import Adapter, MergeReport
from fade.errors import FadeError
from fade.export.edit import Edit, ExportReport, check_file
from fade.export.original_layout import original_state
from fade.files import atomic_folder, atomic_write, check_replaceable
from fade.guards import merged_copy
from fade.loading import without_loading_bars
from fade.rollback import merges_as_found

INDEX = "model_index.json"
RECORD = "fade_export.json"
"""A file in a merged folder that says what is merged into it."""


def write(
    edit: Edit,
    path: Path,
    say: Callable[[str], None],
    overwrite: bool,
    single_file: bool | None = None,
    lossy: bool = False,
) -> ExportReport:
    """Writes the whole pipeline of the attached adapter; one file in the original layout where `single_file` is set or
    the output ends in `.safetensors`. Its dtype is the pipeline's: 16 bits round the change and need `lossy`.

    Raises FadeError as `fade.export.export` says, and where there is no pipeline.
    """
    if edit.adapter is None:
        raise FadeError(
            "a merged export is a whole model, so it needs the one that the adapter was made for; pass --model"
        )
    pipeline, adapter = edit.adapter.pipeline, edit.adapter
    if not hasattr(pipeline, "save_pretrained") or isinstance(pipeline, torch.nn.Module):
        raise FadeError("a merged export writes a whole pipeline, and this adapter is on a denoiser alone")
    dtype = adapter.denoiser.dtype
    if dtype != torch.float32 and not lossy:
        raise FadeError(
            f"rounding the merged weights to {str(dtype).removeprefix('torch.')} is not exact; load the model in fp32, "
            "or pass --lossy too"
        )
    if single_file or (single_file is None and path.suffix == ".safetensors"):
        check_file(path, overwrite)
        merged = _save_single(edit, pipeline, adapter, path, say)
    else:
        merged = save_merged(pipeline, adapter, path, overwrite, edit)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return ExportReport(path, size, _exactness(merged, dtype), merged.relative_loss, {})


def save_merged(
    pipeline: Any, adapter: Adapter, output: str | Path, overwrite: bool = False, edit: Edit | None = None
) -> MergeReport:
    """Writes the pipeline to the folder `output` with `save_pretrained`, in its own dtype, with the adapter (and every
    other FADE adapter that is on) merged into the weights, and the record of `edit` beside them.

    The folder appears complete or not at all. `pipeline` is afterwards what it was. Raises FadeError where the folder
    exists (`overwrite` replaces it) or cannot be written (an old folder then stays as it was), and while other adapters
    are on.
    """
    output = Path(output).absolute()
    check_replaceable(output, overwrite, INDEX, "diffusers model folder")
    with atomic_folder(output, INDEX) as folder, merges_as_found(adapter.layers.values()):
        report = _merge(adapter)
        with without_loading_bars():
            pipeline.save_pretrained(folder, safe_serialization=True)
        if edit is not None:
            record = edit.record("merged", _exactness(report, adapter.denoiser.dtype))
            (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
    return report


def _save_single(edit: Edit, pipeline: Any, adapter: Adapter, path: Path, say: Callable[[str], None]) -> MergeReport:
    with merges_as_found(adapter.layers.values()):
        report = _merge(adapter)
        with merged_copy(adapter.denoiser):
            state = original_state(pipeline)
        say(f"writing {sum(tensor.nbytes for tensor in state.values()):,} bytes in the original layout")
        record = edit.record("merged (original layout)", _exactness(report, adapter.denoiser.dtype))
        with atomic_write(path) as temporary:
            save_file(state, temporary, metadata=record)
    return report


def _merge(adapter: Adapter) -> MergeReport:
    if adapter.merged:
        adapter.unmerge()
    return adapter.merge()


def _exactness(report: MergeReport, dtype: torch.dtype) -> str:
    precision = str(dtype).removeprefix("torch.")
    return (
        f"{report.entries:,} weights changed; rounding to {precision} lost at most {100 * report.relative_loss:.2g} % "
        "of a layer's change"
    )
