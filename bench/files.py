"""Where the repository is, and how a result file is written. Imports nothing that could fail on a new machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def write_json(path: str | Path, payload: Mapping[str, Any], *, line_a_row: bool = False) -> None:
    """Writes a result file: under a temporary name first, then renamed. Of a file of many rows each takes one line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(_text(payload, line_a_row))
    temporary.replace(path)


def _text(payload: Mapping[str, Any], line_a_row: bool) -> str:
    if not line_a_row:
        return json.dumps(payload, indent=2) + "\n"
    head = json.dumps({**payload, "rows": []}, indent=2)
    rows = ",\n    ".join(map(json.dumps, payload["rows"]))
    return head.replace('"rows": []', f'"rows": [\n    {rows}\n  ]') + "\n"


def load_kind(path: str | Path, kind: str) -> dict[str, Any]:
    """A result file of a script that says its kind. Raises SystemExit with a message for people where it is none."""
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as a {kind} file: {error}") from error
    if not isinstance(payload, dict) or payload.get("kind") != kind:
        raise SystemExit(f"{path} is not a file of `python -m bench.{kind}`")
    return payload
