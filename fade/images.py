"""Pictures and captions from people's folders: what a viewer shows is what is trained on.

A folder is walked with its subfolders, in a fixed order. Captions lie beside a picture (`a.txt` or `a.caption` for
`a.png`) or in `metadata.jsonl` / `metadata.csv` as in a Hugging Face imagefolder (a column `file_name`, relative to the
metadata file, and one of `text`, `caption`, `prompt`). Pictures are decoded one at a time and made small at once.
"""

import contextlib
import csv
import io
import json
import mimetypes
import os
import posixpath
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

from fade.errors import FadeError, printable

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white, as in most viewers."""

SIDECARS = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Where captions are looked for; what comes first wins, a caption beside its picture before one in a table."""

MOST_CAPTION_BYTES = 1 << 20
"""A file beside a picture that is larger is no caption."""

_CAPTION_LIKE = (*SIDECARS, ".captions", ".cap", ".tags", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
_NOT_DATA = ("__macosx", "@eadir", "$recycle.bin")  # thumbnails and leftovers that systems keep beside pictures
# Formats of Pillow that are no pictures for training: those that start another program and those it cannot decode.
_NOT_RASTER = ("EPS", "MPEG")
_OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".dng", ".nef", ".arw", ".cr2", ".cr3", ".raf", ".orf", ".rw2")


@dataclass(frozen=True)
class Picture:
    """A picture file, its `name` relative to the folder with `/`, and its caption's lines (none where it has none)."""

    path: Path
    name: str
    caption: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureFolder:
    """What `find_pictures` found: the pictures, sorted; how many captions came from where; what to warn of."""

    folder: Path
    pictures: tuple[Picture, ...]
    sources: dict[str, int]
    warnings: tuple[str, ...]

    def summary(self, most: int) -> str:
        """One line for the user: how many pictures, in how many folders, and how many captions of what kind."""
        folders = len({posixpath.dirname(picture.name) for picture in self.pictures})
        used = f", {most} of them used" if most < len(self.pictures) else ""
        kinds = ", ".join(f"{count} in {kind}" for kind, count in self.sources.items())
        captions = f"{sum(self.sources.values())} captions ({kinds})" if kinds else "no captions"
        return f"{_count(len(self.pictures), 'picture')} in {_count(folders, 'folder')}{used}; {captions}"

    def order(self, most: int) -> list[Picture]:
        """The pictures in the order in which to read up to `most`: spread evenly over the folder, then the others,
        which stand in for those that cannot be read."""
        total = len(self.pictures)
        first = [i * total // most for i in range(most)] if most < total else list(range(total))
        rest = sorted(set(range(total)) - set(first))
        return [self.pictures[i] for i in (*first, *rest)]


@cache
def openable_formats() -> tuple[str, ...]:
    """The kinds of pictures that the installed Pillow opens; HEIC among them where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(kind for kind, (factory, _) in Image.OPEN.items() if kind not in _NOT_RASTER and not _is_stub(factory))


@cache
def openable_suffixes() -> frozenset[str]:
    """Suffixes of the pictures that the installed Pillow opens."""
    formats = openable_formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def _is_stub(factory: Any) -> bool:
    """Whether Pillow only recognises the format and needs a handler that nobody installed to decode it."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


# --- finding ---------------------------------------------------------------------------------------------------------


def find_pictures(folder: str | Path, leave_out: str | Path | None = None) -> PictureFolder:
    """The pictures of a folder and its subfolders with their captions; `leave_out` is a subfolder to pass over.

    Hidden files and folders are passed over. Raises FadeError where the folder is missing or holds no picture, for a
    caption that is no UTF-8, and for a broken metadata file, with the line.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FadeError(f"there is no image folder {root}")
    paths: dict[str, Path] = {}
    texts: dict[str, Path] = {}
    tables: list[str] = []
    other, caption_like, closed = [], [], []
    excluded = None if leave_out is None else os.path.realpath(leave_out)
    for name, path in _walk(root, excluded, closed):
        suffix = path.suffix.lower()
        if path.name.lower() in METADATA_FILES:
            tables.append(name)
        elif suffix in openable_suffixes():
            paths[name] = path
        elif suffix in SIDECARS:
            texts[name] = path
        elif suffix in _OTHER_PICTURES or (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
            other.append(name)
        if suffix in _CAPTION_LIKE:
            caption_like.append(name)
    unknown = f"image(s) of kinds that this Pillow cannot open in {root}: {listed(other)}"
    if any(name.lower().endswith((".heic", ".heif")) for name in other):
        unknown += "; HEIC opens where pillow-heif is installed"
    if not paths:
        hint = f"; there are {len(other)} {unknown}" if other else ""
        raise FadeError(f"the folder {root} holds no image that can be read{hint}. {_kinds()}")

    notes = [f"skipped {len(other)} {unknown}"] if other else []
    if closed:
        notes.append(f"cannot look into {len(closed)} folder(s) in {root}: {listed(closed)}")
    tabled = _read_tables(root, tables, paths, notes)
    beside = _Names(texts)
    pictures, sources = [], Counter()
    for name in sorted(paths, key=lambda name: name.split("/")):
        caption, source = _caption(name, beside, tabled)
        pictures.append(Picture(paths[name], name, caption))
        if source:
            sources[source] += 1
    if caption_like and not sources:
        notes.append(
            f"no caption was found for the images in {root}, although it holds {listed(caption_like)}; captions are "
            f"read from NAME.txt or NAME.caption beside NAME.png, and from {' or '.join(METADATA_FILES)} with the "
            f"columns file_name and {' or '.join(CAPTION_COLUMNS)}"
        )
    return PictureFolder(root, tuple(pictures), dict(sources), tuple(notes))


def _walk(root: Path, excluded: str | None, closed: list[str]) -> Iterator[tuple[str, Path]]:
    """Files below `root` with their relative names; links are followed, but never round in a circle."""
    seen = {os.path.realpath(root)}

    def cannot_look(error: OSError) -> None:
        if Path(error.filename) == root:
            raise FadeError(f"cannot look into the image folder {root}: {error.strerror}") from error
        closed.append(os.path.relpath(error.filename, root))

    for directory, folders, files in os.walk(root, onerror=cannot_look, followlinks=True):
        entered = []
        for folder in sorted(folders):
            real = os.path.realpath(os.path.join(directory, folder))
            if not folder.startswith(".") and folder.lower() not in _NOT_DATA and real not in seen and real != excluded:
                seen.add(real)
                entered.append(folder)
        folders[:] = entered
        for file in sorted(files):
            path = Path(directory, file)
            # A broken link counts as a file: it is named among what cannot be read. Pipes and devices would not end.
            if not file.startswith(".") and (path.is_file() or not path.exists()):
                yield path.relative_to(root).as_posix(), path


class _Names:
    """Relative names, found in whichever Unicode form and, failing that, whichever case they are asked for: systems
    differ in both."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.exact = {unicodedata.normalize("NFC", name): value for name, value in values.items()}
        self.folded = {name.casefold(): value for name, value in self.exact.items()}

    def get(self, name: str) -> Any:
        name = unicodedata.normalize("NFC", name)
        return self.exact.get(name, self.folded.get(name.casefold()))


def _caption(name: str, beside: _Names, tabled: dict[str, tuple[tuple[str, ...], str]]) -> tuple[tuple[str, ...], str]:
    """The lines of a picture's caption and where they come from: the first place that holds any text."""
    stem = posixpath.splitext(name)[0]
    for suffix in SIDECARS:
        for place in (stem + suffix, name + suffix):
            path = beside.get(place)
            if path is not None and (lines := _lines(_read_text(path, "caption"))):
                return lines, suffix
    return tabled.get(name, ((), ""))


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in map(str.strip, text.splitlines()) if line)


def _read_text(path: Path, what: str, most: int | None = MOST_CAPTION_BYTES) -> str:
    """A UTF-8 text file, with or without a byte order mark. Raises FadeError."""
    try:
        if most is not None and path.stat().st_size > most:
            raise FadeError(f"the {what} {shown(path)} has {path.stat().st_size:,} bytes; remove it if it is none")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FadeError(f"cannot read the {what} {shown(path)}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FadeError(f"cannot read the {what} {shown(path)}: {error}; write it in UTF-8 or remove it") from error
    if "\0" in text:
        raise FadeError(f"the {what} {shown(path)} holds NUL characters, as UTF-16 does; write it in UTF-8")
    return text


# --- metadata files --------------------------------------------------------------------------------------------------


def _read_tables(
    root: Path, tables: list[str], paths: dict[str, Path], notes: list[str]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Captions by picture from every metadata file; the nearest file to a picture wins."""
    captions: dict[str, tuple[tuple[str, ...], str]] = {}
    names = _Names({name: name for name in paths})
    for table in sorted(tables, key=lambda name: (-name.count("/"), name.lower().endswith(".csv"), name)):
        path, kind = root / table, posixpath.basename(table).lower()
        rows = list((_jsonl_rows if kind.endswith(".jsonl") else _csv_rows)(path))
        missing, columns = [], set()
        for line, row in rows:
            columns |= row.keys()
            file = row.get("file_name")
            if not isinstance(file, str) or not file.strip():
                raise FadeError(f"{shown(path)}, line {line}: no file_name; every row names its picture there")
            lines = _caption_of_row(row, f"{shown(path)}, line {line}")
            name = _picture_of_row(file.strip(), root, posixpath.dirname(table), names)
            if name is None:
                missing.append(file)
            elif lines:
                captions.setdefault(name, (lines, kind))
        if rows and columns.isdisjoint(CAPTION_COLUMNS):
            notes.append(
                f"{shown(path)} has no column {', '.join(CAPTION_COLUMNS)}: no caption is read from it (it has "
                f"{listed(sorted(map(str, columns)))})"
            )
        if missing:
            notes.append(f"{len(missing)} of {_count(len(rows), 'row')} in {shown(path)} name no picture there: "
                         f"{listed(missing)}")  # fmt: skip
    return captions


def _picture_of_row(file: str, root: Path, directory: str, names: _Names) -> str | None:
    """The relative name of the picture that a row names, None where there is none."""
    for spelt in (file, file.replace("\\", "/")):
        absolute = os.path.relpath(spelt, os.path.abspath(root)) if os.path.isabs(spelt) else None
        found = names.get(absolute or posixpath.normpath(posixpath.join(directory, spelt)))
        if found is not None:
            return found
    return None


def _caption_of_row(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The lines of a row's caption; a list is several captions."""
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        for text in texts:
            try:
                text.encode()
            except (AttributeError, UnicodeEncodeError) as error:
                raise FadeError(f"{where}: the {column} is no valid text: {text!r}") from error
        if lines := tuple(line for text in texts for line in _lines(text)):
            return lines
    return ()


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _read_text(path, "metadata file", most=None)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FadeError(f"{shown(path)}, line {number} is no valid JSON ({error}); one object a line") from error
        if not isinstance(row, dict):
            raise FadeError(f"{shown(path)}, line {number} is no JSON object; write one object a line")
        yield number, {key.strip().lower(): value for key, value in row.items()}


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _read_text(path, "metadata file", most=None)
    heading = text.partition("\n")[0]
    delimiters = [d for d in ",;\t" if "file_name" in (c.strip().strip('"').lower() for c in heading.split(d))]
    if not delimiters:
        raise FadeError(f"{shown(path)}, line 1: no column file_name; its first line names the columns")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiters[0], strict=True)
    try:
        columns = [column.strip().lower() for column in next(reader)]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise FadeError(
                    f"{shown(path)}, line {reader.line_num} has {_count(len(cells), 'cell')} where the first line "
                    f"names {_count(len(columns), 'column')}; put captions that hold commas in double quotes"
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise FadeError(f"{shown(path)}, line {reader.line_num} is no valid CSV: {error}") from error


# --- decoding --------------------------------------------------------------------------------------------------------


def read_square(path: str | Path, side: int) -> Image.Image:
    """A picture as a viewer shows it, cropped to its centred square and scaled to `side`: RGB, in sRGB.

    Turned as its EXIF tag says, embedded colour profiles applied, 16-bit and float grey scaled to 8 bits, transparent
    pixels on `BACKGROUND`, the first frame of an animation. JPEGs are decoded at a fraction of their size where that
    suffices. Whatever Pillow raises for broken files passes through; more pixels than `Image.MAX_IMAGE_PIXELS` to
    decode raise Image.DecompressionBombError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged tags; what cannot be read is named by the caller
        with Image.open(path, formats=openable_formats()) as image:
            drafted = image.draft(None, (2 * side, 2 * side))
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
            _scale_key(image)
            image.load()
            return square(image, side, drafted and drafted[1][2:])


def readable(
    pictures: Iterable[Picture], side: int, unreadable: dict[str, str]
) -> Iterator[tuple[Picture, Image.Image]]:
    """The pictures that can be read, each with its `read_square`, one at a time; of the others, by name, why not."""
    for picture in pictures:
        try:
            image = read_square(picture.path, side)
        except Exception as error:  # decoders raise anything for broken files
            unreadable[picture.name] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        yield picture, image


def refuse_unreadable(found: PictureFolder) -> None:
    """Raises FadeError where no picture of a folder can be read; looks no further than the first that can."""
    unreadable: dict[str, str] = {}
    if next(readable(found.pictures, 8, unreadable), None) is None:
        report_unreadable(found.folder, unreadable, read=False)


def report_unreadable(folder: Path, unreadable: Mapping[str, str], read: bool) -> None:
    """Warns of the images that `readable` skipped, if any. Raises FadeError where none could be `read`."""
    if not unreadable:
        return
    named = f"{listed(unreadable)}; of the first: {shown(next(iter(unreadable.values())))}"
    if not read:
        raise FadeError(
            f"none of the {len(unreadable)} images in {folder} can be read; are they really images? {named}"
        )
    warnings.warn(printable(f"skipped {len(unreadable)} unreadable image(s) in {folder}: {named}"), stacklevel=3)


def square(image: Image.Image, side: int, extent: tuple[float, float] | None = None) -> Image.Image:
    """As `read_square`, of an opened picture; `extent` is its width and height where they are no whole pixels."""
    profile, turn = image.info.get("icc_profile"), _orientation(image)
    image = _plain(image)
    # The square is cut out before scaling: a strip scaled as a whole would be larger than memory.
    width, height = extent or image.size
    least = min(width, height)
    left, top = (width - least) / 2, (height - least) / 2
    box = (left, top, left + least, top + least)
    image = image.resize((side, side), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    image.info = {}  # what it says is done here, and must not be done again
    if turn is not None:
        image = image.transpose(turn)
    if "A" not in image.getbands() or image.mode == "LAB":
        return _to_srgb(image, profile)
    colour = image.convert("L") if image.mode == "LA" else image.convert("RGB")
    ground = Image.new("RGB", image.size, BACKGROUND)
    return Image.composite(_to_srgb(colour, profile), ground, image.getchannel("A"))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _scale_key(image: Image.Image) -> None:
    """The key colour in 8 bits, of a PNG with fewer or more, which Pillow gives as it is in the file."""
    key = image.info.get("transparency")
    if image.format != "PNG" or not image.tile:
        return
    if isinstance(key, int):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args), 1)
    elif isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(part >> 8 for part in key)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How the EXIF tag says to turn the picture. Pillow turns TIFFs itself and then removes the tag."""
    try:
        return _TURNS.get(image.getexif().get(0x0112))
    except Exception:  # a damaged EXIF block: viewers show the picture unturned
        return None


def _plain(image: Image.Image) -> Image.Image:
    """The picture in 8 bits a channel: L, LA, RGB, RGBA, CMYK or LAB, without palette or key colour."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_8_bit(image)
    if image.mode in ("La", "RGBa"):
        return image.convert(image.mode.upper())
    if image.mode in ("CMYK", "LAB"):
        return image
    grey, seen_through = image.mode in ("1", "L", "LA"), image.has_transparency_data
    mode = ("LA" if seen_through else "L") if grey else ("RGBA" if seen_through else "RGB")
    return image if image.mode == mode else image.convert(mode)


def _grey_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey by its whole range: 65535 is white in 16 bits. In wider types the range is one of
    [0, 1] (float), [0, 255] and [0, 65535] of which the picture fills at least half, else the picture's own."""
    key = image.info.get("transparency")
    hidden = np.asarray(image) == key if isinstance(key, int) else None
    full_range = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    values = np.array(image, np.float32)
    finite = np.isfinite(values)
    low = float(values.min(initial=np.inf, where=finite))
    high = float(values.max(initial=-np.inf, where=finite))
    if full_range and image.mode != "F":
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and 127 < high <= 255:
        low, high = 0.0, 255.0
    elif low >= 0 and 32767 < high <= 65535:
        low, high = 0.0, 65535.0
    # In place: a photo of 12 megapixels has 48 MB here.
    values -= low
    values *= 255 / max(high - low, 1e-30)
    values = np.nan_to_num(values, copy=False, nan=0.0).clip(0, 255, out=values)
    grey = Image.fromarray(values.round(out=values).astype(np.uint8))
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return grey


_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB, CMYK or LAB as RGB in sRGB. A profile that is broken or of another kind of colours is ignored, as viewers
    do."""
    source = _profile(profile)
    if source is None and image.mode == "LAB":
        source = ImageCms.createProfile("LAB")
    if source is not None:
        wanted = "LAB" if image.mode == "LAB" else _PROFILE_MODES.get(_space(source), "")
        if wanted == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if wanted == image.mode:
            try:
                return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            except ImageCms.PyCMSError:
                pass
    return image.convert("RGB")


def _profile(data: bytes | None) -> ImageCms.ImageCmsProfile | None:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(data)) if data else None
    except (OSError, ImageCms.PyCMSError):
        return None


def _space(profile: Any) -> str:
    return getattr(profile, "profile", profile).xcolor_space.strip()


# --- telling ---------------------------------------------------------------------------------------------------------


def shown(text: object) -> str:
    """A name as it may be printed: control characters, which could drive a terminal, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def listed(names: Collection[str], most: int = 5) -> str:
    """The first few names of a list."""
    return ", ".join(map(shown, list(names)[:most])) + (", …" if len(names) > most else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _kinds() -> str:
    usual = [s for s in (".png", ".jpg", ".webp", ".tif", ".gif", ".bmp", ".avif", ".heic") if s in openable_suffixes()]
    return f"Images end in {', '.join(usual)} or another suffix that Pillow knows"
