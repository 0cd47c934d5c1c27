"""An unlearned pipeline as an ordinary diffusers folder, with the adapter merged into the weights.

For programs that know no masks: whoever loads the folder needs nothing of this package, and cannot switch the adapter
off. It lives apart from `fade.adapter` because it leaves the world of adapters.
"""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from fade.adapter import Adapter, MergeReport
from fade.errors import FadeError
from fade.files import WRITE_ERRORS, reason
from fade.loading import without_loading_bars
from fade.rollback import merges_as_found


def save_merged(pipeline: Any, adapter: Adapter, output: str | Path, overwrite: bool = False) -> MergeReport:
    """Writes the pipeline to the folder `output` with `save_pretrained`, in its own dtype, with the adapter (and every
    other FADE adapter that is on) merged into the weights.

    The folder appears complete or not at all: it is written beside its place, then renamed. `pipeline` is afterwards
    what it was. Raises FadeError where the folder exists (`overwrite` replaces it) or cannot be written (an old folder
    then stays as it was), and while other adapters are on.
    """
    output = Path(output).absolute()
    if output.exists() and not (output / "model_index.json").is_file():
        raise FadeError(f"{output} is not a diffusers model folder, so it is not replaced; name another output")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise FadeError(f"{output} exists already; pass --overwrite to replace it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FadeError(f"cannot create the folder {output.parent}: {error.strerror or error}") from error

    mark = secrets.token_hex(4)
    fresh, old = (output.with_name(f".{output.name}.{mark}.{state}") for state in ("part", "old"))
    try:
        with merges_as_found(adapter.layers.values()):
            if adapter.merged:
                adapter.unmerge()
            report = adapter.merge()
            with without_loading_bars():
                pipeline.save_pretrained(fresh, safe_serialization=True)
        mode = (fresh / "model_index.json").stat().st_mode
        for weights in fresh.rglob("*.safetensors"):
            weights.chmod(mode)  # written for their owner alone
        if output.exists():
            os.replace(output, old)
        try:
            os.replace(fresh, output)
        except BaseException:
            if old.exists():
                os.replace(old, output)
            raise
    except WRITE_ERRORS as error:
        raise FadeError(f"cannot write {output}: {reason(error)}; nothing was changed") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return report
