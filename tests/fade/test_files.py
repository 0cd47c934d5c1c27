"""The old file survives whatever happens while a new one is written."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fade.errors import FadeError
from fade.files import WRITE_ERRORS, atomic_write


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["file"]


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), RuntimeError("no"), OSError(errno.ENOSPC, "No space left"), FULL], ids=repr
)
def test_the_old_file_survives(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def failing() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(FadeError if isinstance(failure, WRITE_ERRORS) else type(failure)):
        failing()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(FadeError, match=r"cannot write .*file: No space left; nothing was changed"):
        with atomic_write(tmp_path / "file"):
            raise OSError(errno.ENOSPC, "No space left")


def test_a_full_disk_under_safetensors_is_the_same_message(tmp_path: Path) -> None:
    with pytest.raises(FadeError, match=r"cannot write .*file: No space left on device .*; nothing was changed"):
        with atomic_write(tmp_path / "file"):
            raise FULL


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(FadeError, match="cannot create the folder"), atomic_write(tmp_path / "taken" / "file"):
        pass
