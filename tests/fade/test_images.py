"""Pictures as a viewer shows them, folders as people keep them, captions in every usual place."""

import io
import json
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from fade.errors import FadeError
from fade.images import find_pictures, openable_suffixes, read_square, square

SIDE = 24


def smooth(rng: np.random.Generator, width: int = 96, height: int = 64, channels: int = 3) -> np.ndarray:
    """A random smooth picture, uint8 [height, width, channels], different in every corner."""
    corners = rng.integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = [
        Image.fromarray(corners[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    return np.stack([np.asarray(channel) for channel in image], -1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def pixels(image: Image.Image | Path) -> np.ndarray:
    read = read_square(image, SIDE) if isinstance(image, Path) else square(image, SIDE)
    assert read.mode == "RGB" and read.size == (SIDE, SIDE)
    return np.asarray(read).astype(int)


def difference(first: Image.Image | Path, second: Image.Image | Path) -> float:
    return float(np.abs(pixels(first) - pixels(second)).mean())


def on_white(colour: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(colour.convert("RGB"), Image.new("RGB", colour.size, "white"), alpha)


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_pictures_are_turned_as_their_exif_tag_says(
    rng: np.random.Generator, tmp_path: Path, suffix: str, orientation: int
) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    stored = Image.fromarray(smooth(rng))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a{suffix}", exif=exif, **({"lossless": True} if suffix == ".webp" else {"quality": 98}))
    tagged = stored.copy()
    tagged.getexif()[0x0112] = orientation
    upright = Image.fromarray(np.asarray(ImageOps.exif_transpose(tagged)))
    assert difference(tmp_path / f"a{suffix}", upright) < 4
    others = [upright.transpose(turn) for turn in Image.Transpose]
    assert min(difference(tmp_path / f"a{suffix}", other) for other in others) > 4


def test_what_was_done_to_a_picture_is_not_done_again(rng: np.random.Generator, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = matrix_profile((2.6, 2.6, 2.6))
    Image.fromarray(smooth(rng)).save(tmp_path / "a.png", exif=exif, icc_profile=profile)
    once = read_square(tmp_path / "a.png", SIDE)
    assert np.array_equal(np.asarray(square(once, SIDE)), np.asarray(once))


def test_a_damaged_exif_block_turns_nothing(rng: np.random.Generator, tmp_path: Path) -> None:
    image = Image.fromarray(smooth(rng))
    image.save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert difference(tmp_path / "a.png", image) == 0


# --- grey of more than 8 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "convert"),
    [
        (".png", lambda v: v.astype(np.uint16) * 257),
        (".tif", lambda v: v.astype(np.uint16) * 257),
        (".pgm", lambda v: v.astype(np.uint16) * 257),
        (".tif", lambda v: v.astype(np.int32) * 257),
        (".tif", lambda v: v.astype(np.int32)),
        (".tif", lambda v: v.astype(np.int32) * 9000 - 1_000_000),
        (".tif", lambda v: (v / 255).astype(np.float32)),
        (".tif", lambda v: v.astype(np.float32)),
        (".tif", lambda v: (v * 7.5 - 300).astype(np.float32)),
    ],
)
def test_grey_of_more_bits_is_scaled_and_not_clipped(
    rng: np.random.Generator, tmp_path: Path, suffix: str, convert: Callable[[np.ndarray], np.ndarray]
) -> None:
    values = smooth(rng, channels=1)[..., 0]
    values[0, :2] = 0, 255  # the whole range, so that stretching it changes nothing
    Image.fromarray(convert(values)).save(tmp_path / f"a{suffix}")
    assert np.abs(pixels(tmp_path / f"a{suffix}") - pixels(Image.fromarray(values))).max() <= 1


def test_a_dark_16_bit_picture_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 2570, np.uint16)).save(tmp_path / "a.png")
    assert set(pixels(tmp_path / "a.png").flat) == {10}


def test_what_is_no_number_is_a_black_pixel(rng: np.random.Generator, tmp_path: Path) -> None:
    values = rng.random((SIDE, SIDE), np.float32)
    spoilt = values.copy()
    spoilt[3, 4], spoilt[5, 6], spoilt[7, 8] = np.nan, -np.inf, np.inf
    Image.fromarray(spoilt).save(tmp_path / "a.tif")
    got = pixels(tmp_path / "a.tif")[..., 0]
    assert (got[3, 4], got[5, 6], got[7, 8]) == (0, 0, 255)
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "b.tif")
    assert set(pixels(tmp_path / "b.tif").flat) == {0}


# --- transparency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RGBA.png", "RGBA.webp", "RGBA.tif", "LA.png", "PA.tif", "P.png", "P index.png"])
def test_transparent_pixels_are_white(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    colour = Image.fromarray(smooth(rng))
    if kind.startswith("LA"):
        colour = colour.convert("L").convert("RGB")
    mode = kind.split(".")[0]
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[16:48, 32:64] = 0 if mode.startswith("P") else rng.integers(0, 200)
    alpha = Image.fromarray(alpha)
    wanted = on_white(colour, alpha)
    for hidden in ((0, 0, 0), (0, 255, 0)):
        image = colour.copy()
        image.paste(hidden, (40, 24, 56, 40)) if mode.startswith("P") else None
        if mode == "LA":
            image = image.convert("L")
        image.putalpha(alpha)
        if mode == "P index":
            image = image.convert("RGB").quantize(200)
            array = np.asarray(image).copy()
            array[np.asarray(alpha) == 0] = 255
            image = Image.fromarray(array, "P")
            image.putpalette([*rng.integers(0, 256, 765).tolist(), *hidden])
            wanted = on_white(image.convert("RGB"), alpha)
            image.save(tmp_path / kind, transparency=255)
        else:
            image = image.quantize(255) if mode.startswith("P") else image
            image = image.convert("PA") if mode == "PA" else image
            image.save(tmp_path / kind, **({"lossless": True} if kind.endswith("webp") else {}))
        assert difference(tmp_path / kind, wanted) < (9 if mode in ("P", "PA") else 2.5)
        inner = pixels(tmp_path / kind)[10:14, 10:14]
        assert np.abs(inner - pixels(wanted)[10:14, 10:14]).max() <= (1 if alpha.getpixel((48, 32)) == 0 else 3)


def png(depth: int, colour_type: int, rows: list[bytes], width: int, key: bytes) -> bytes:
    """A PNG of any bit depth with a key colour, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_key_colours_of_grey_pngs_of_any_depth(rng: np.random.Generator, tmp_path: Path, depth: int) -> None:
    most = 2**depth - 1
    key, other = (int(v) for v in rng.choice(most + 1, 2, replace=False))
    values = np.full((SIDE, SIDE), other)
    values[:, SIDE // 2 :] = key
    bits = "".join(f"{v:0{depth}b}" for v in values[0])
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    (tmp_path / "a.png").write_bytes(png(depth, 0, [row] * SIDE, SIDE, struct.pack(">H", key)))
    got = pixels(tmp_path / "a.png")
    assert (got[:, SIDE // 2 + 1 :] == 255).all()
    assert np.abs(got[:, : SIDE // 2 - 1] - other * 255 / most).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_key_colours_of_colour_pngs(rng: np.random.Generator, tmp_path: Path, depth: int) -> None:
    key, other = rng.integers(1, 2**depth - 1, 3), rng.integers(1, 2**depth - 1, 3)
    kind = ">B" if depth == 8 else ">H"
    row = b"".join(struct.pack(kind, v) for v in [*other] * (SIDE // 2) + [*key] * (SIDE // 2))
    tagged = b"".join(struct.pack(">H", v) for v in key)
    (tmp_path / "a.png").write_bytes(png(depth, 2, [row] * SIDE, SIDE, tagged))
    got = pixels(tmp_path / "a.png")
    assert (got[:, SIDE // 2 + 1 :] == 255).all()
    assert np.abs(got[0, 0] - other / 2 ** (depth - 8)).max() <= 1


# --- colour profiles -------------------------------------------------------------------------------------------------


def icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 2."""
    table, data, offset = [], b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table.append(name + struct.pack(">II", offset + len(data), len(value)))
        data += value + b"\0" * (-len(value) % 4)
    header = bytearray(128)
    header[8:12], header[12:16], header[16:20], header[20:24] = b"\x02\x40\0\0", kind, space, pcs
    header[36:40], header[68:80] = b"acsp", struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    header[0:4] = struct.pack(">I", offset + len(data))
    return bytes(header) + struct.pack(">I", len(tags)) + b"".join(table) + data


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


WHITE = xyz(0.9642, 1.0, 0.8249)
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


def matrix_profile(gammas: tuple[float, float, float], primaries: tuple[tuple[float, ...], ...] = SRGB) -> bytes:
    tags = {b"wtpt": WHITE}
    for name, primary, gamma in zip((b"r", b"g", b"b"), primaries, gammas, strict=True):
        tags |= {name + b"XYZ": xyz(*primary), name + b"TRC": gamma_curve(gamma)}
    return icc(b"RGB ", tags)


def srgb_of(linear: np.ndarray) -> np.ndarray:
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_colour_profile_is_applied(rng: np.random.Generator, tmp_path: Path) -> None:
    values = smooth(rng, SIDE, SIDE) // 2 + 100  # not so dark that 8 bits of the linear values are too few
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=matrix_profile((1.0, 1.0, 1.0)))
    assert np.abs(pixels(tmp_path / "a.png") - srgb_of(values / 255)).max() <= 2
    swapped = (SRGB[2], SRGB[1], SRGB[0])
    Image.fromarray(values).save(
        tmp_path / "b.jpg", quality=100, subsampling=0, icc_profile=matrix_profile((1, 1, 1), swapped)
    )
    assert np.abs(pixels(tmp_path / "b.jpg") - srgb_of(values[..., ::-1] / 255)).mean() <= 3


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_is_applied(rng: np.random.Generator, tmp_path: Path, mode: str) -> None:
    values = smooth(rng, SIDE, SIDE, 1)[..., 0] // 2 + 100
    image = Image.fromarray(values) if mode != "I;16" else Image.fromarray(values.astype(np.uint16) * 257)
    image = image.convert("LA") if mode == "LA" else image
    profile = icc(b"GRAY", {b"wtpt": WHITE, b"kTRC": gamma_curve(1.0)})
    image.save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(pixels(tmp_path / "a.png")[..., 0] - srgb_of(values / 255)).max() <= 2


def cmyk_profile() -> bytes:
    """A press that prints the inks exchanged: cyan as yellow would be, black as nothing."""
    grid, table = 2, []
    for corner in range(grid**4):
        c, m, y, _ = (corner >> 3 & 1, corner >> 2 & 1, corner >> 1 & 1, corner & 1)
        lightness, a, b = 100 - 30 * (c + m + y), 40 * m - 40 * y, 60 * c - 40 * m
        table += [round(lightness * 2.55), round(a) + 128, round(b) + 128]
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, grid, 0])
    lut += struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return icc(b"CMYK", {b"wtpt": WHITE, b"A2B0": lut + ramp * 4 + bytes(table) + ramp * 3}, b"prtr", b"Lab ")


def test_cmyk_goes_through_its_profile(rng: np.random.Generator, tmp_path: Path) -> None:
    profile = cmyk_profile()
    image = Image.fromarray(smooth(rng, channels=4), "CMYK")
    image.save(tmp_path / "a.tif", icc_profile=profile)
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (16, 0, 80, 64))
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    wanted = ImageCms.profileToProfile(small, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.abs(pixels(tmp_path / "a.tif") - np.asarray(wanted).astype(int)).max() <= 1
    assert difference(tmp_path / "a.tif", image.convert("RGB")) > 20


@pytest.mark.parametrize(
    "profile", [b"no profile" * 20, icc(b"GRAY", {b"wtpt": WHITE, b"kTRC": gamma_curve(1.0)}), b""]
)
def test_a_profile_that_does_not_fit_is_ignored(rng: np.random.Generator, tmp_path: Path, profile: bytes) -> None:
    image = Image.fromarray(smooth(rng))
    image.save(tmp_path / "a.png", icc_profile=profile)
    assert difference(tmp_path / "a.png", image) == 0


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (2, 3), (5000, 7)])
def test_odd_shapes_are_cropped_before_they_are_scaled(rng: np.random.Generator, tmp_path: Path, size: tuple) -> None:
    # Scaled as a whole to 512 pixels, the strips would have 15 gigapixels.
    colour = tuple(int(v) for v in rng.integers(0, 256, 3))
    Image.new("RGB", size, colour).save(tmp_path / "a.png")
    assert read_square(tmp_path / "a.png", 512).getcolors() == [(512 * 512, colour)]


def test_the_centre_is_kept(rng: np.random.Generator) -> None:
    values = smooth(rng, 90, 40)
    assert np.abs(pixels(Image.fromarray(values)) - pixels(Image.fromarray(values[:, 25:65]))).max() <= 12


def test_too_many_pixels_are_refused_unless_fewer_are_decoded(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(smooth(rng, 150, 110))
    for name in ("a.png", "a.jpg"):
        image.save(tmp_path / name, quality=95)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(Image.DecompressionBombError):
        read_square(tmp_path / "a.png", SIDE)
    small = read_square(tmp_path / "a.jpg", SIDE)  # decoded at half its size
    assert np.abs(np.asarray(small).astype(int) - pixels(image)).mean() < 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert difference(tmp_path / "a.png", image) == 0


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    first, second = Image.new("RGB", (30, 30), (200, 0, 0)), Image.new("RGB", (30, 30), (0, 0, 200))
    first.save(
        tmp_path / f"a{suffix}",
        save_all=True,
        append_images=[second],
        **({"lossless": True} if suffix == ".webp" else {}),
    )
    assert difference(tmp_path / f"a{suffix}", first) < 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX"])
def test_every_other_mode(rng: np.random.Generator, tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(smooth(rng))
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
        converted.info.clear()
    else:
        converted = image.quantize(255) if mode == "P" else image.convert(mode)
    converted.save(tmp_path / "a.tif")
    wanted = image.convert("L") if mode in ("1", "L") else converted.convert("RGB") if mode == "P" else image
    assert difference(tmp_path / "a.tif", wanted) < (25 if mode == "1" else 4)


def test_a_picture_is_known_by_its_content_and_no_other_program_is_started(rng, tmp_path: Path) -> None:
    Image.fromarray(smooth(rng)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert read_square(tmp_path / "a.jpg", SIDE).size == (SIDE, SIDE)
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(Image.UnidentifiedImageError):
        read_square(tmp_path / "b.png", SIDE)
    assert not {".eps", ".ps", ".mpg", ".h5", ".wmf"} & openable_suffixes()


# --- folders ---------------------------------------------------------------------------------------------------------


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def names(folder: Path, **options: object) -> list[str]:
    return [found.name for found in find_pictures(folder, **options).pictures]


def test_subfolders_are_walked_in_order_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    shown = ["B.PNG", "a.jpg", "b/10.png", "b/2.png", "b/c/d.webp", "x.png/e.png"]
    hidden = [".a.png", "._a.png", ".cache/a.png", "b/.git/a.png", "__MACOSX/a.png", "@eaDir/a.png"]
    for name in (*reversed(shown), *hidden):
        picture(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.md"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "empty.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    assert names(tmp_path) == shown
    assert names(tmp_path, leave_out=tmp_path / "b") == ["B.PNG", "a.jpg", "x.png/e.png"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    picture(tmp_path / "outside" / "a.png")
    folder = tmp_path / "folder"
    picture(folder / "sub" / "b.png")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "sub" / "round").symlink_to(folder)
    (folder / "c.png").symlink_to(tmp_path / "outside" / "a.png")
    (folder / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert names(folder) == ["c.png", "linked/a.png", "lost.png", "sub/b.png"]


def test_pictures_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    kinds = [kind for kind in (".heic", ".jxl", ".svg", ".nef", ".cr2") if kind not in openable_suffixes()]
    for index, kind in enumerate(kinds):
        (tmp_path / f"{index}{kind.upper()}").write_bytes(b"x")
    (warning,) = find_pictures(tmp_path).warnings
    assert warning.startswith(f"skipped {len(kinds)} image(s)")
    assert all(f"{index}{kind.upper()}" in warning for index, kind in enumerate(kinds))
    (tmp_path / "a.png").unlink()
    with pytest.raises(FadeError, match=r"holds no image that can be read; there are .* 0\.(HEIC|JXL)"):
        find_pictures(tmp_path)


def test_more_pictures_than_wanted_are_taken_evenly(tmp_path: Path) -> None:
    for sub in "abcd":
        for index in range(5):
            picture(tmp_path / sub / f"{index}.png")
    order = [found.name for found in find_pictures(tmp_path).order(8)]
    assert sorted(order) == names(tmp_path)
    assert order[:8] == sorted(order[:8])
    assert {name[0] for name in order[:8]} == set("abcd")
    assert [found.name for found in find_pictures(tmp_path).order(99)] == names(tmp_path)


# --- captions --------------------------------------------------------------------------------------------------------


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    return {found.name: found.caption for found in find_pictures(folder).pictures}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"a.txt": b"a cat"}, ("a cat",)),
        ({"a.caption": b"a cat\n"}, ("a cat",)),
        ({"a.png.txt": b"a cat"}, ("a cat",)),
        ({"a.TXT": b"a cat"}, ("a cat",)),
        ({"a.txt": b"\xef\xbb\xbfa cat\r\n"}, ("a cat",)),
        ({"a.txt": b"\r\n\r\n  a cat \r\nasleep\r\n"}, ("a cat", "asleep")),
        ({"a.txt": b""}, ()),
        ({"a.txt": b" \n\t\n", "a.caption": b"a cat"}, ("a cat",)),
        ({"a.txt": b"1st", "a.caption": b"2nd", "metadata.csv": b"file_name,text\na.png,3rd"}, ("1st",)),
        ({"a.caption": b"2nd", "metadata.csv": b"file_name,text\na.png,3rd"}, ("2nd",)),
        ({"metadata.jsonl": b'\xef\xbb\xbf{"file_name": "a.png", "text": "a cat"}\r\n\r\n'}, ("a cat",)),
        ({"metadata.jsonl": b'{"file_name": "./a.png", "caption": "a\\u2028cat", "extra": [1]}'}, ("a", "cat")),
        ({"metadata.jsonl": b'{"file_name": "a.png", "prompt": ["", "a cat", "a dog"]}'}, ("a cat", "a dog")),
        ({"metadata.jsonl": b'{"file_name": "a.png", "text": null, "caption": "a cat"}'}, ("a cat",)),
        ({"metadata.jsonl": b'{"file_name": "a.png", "text": null}'}, ()),
        ({"metadata.csv": b'file_name,text\r\na.png,"a cat, asleep"\r\n'}, ("a cat, asleep",)),
        ({"metadata.csv": b'\xef\xbb\xbf"file_name";"caption"\na.png;a cat, asleep\n\n'}, ("a cat, asleep",)),
        ({"metadata.csv": b"prompt\tFile_Name\nsaid \xe2\x80\x9ccat\xe2\x80\x9d\ta.png"}, ("said “cat”",)),
        ({"metadata.csv": b'file_name,text\na.png,"a cat\nasleep"\n'}, ("a cat", "asleep")),
        ({"metadata.csv": b"file_name,text\nA.PNG,a cat\n"}, ("a cat",)),
    ],
)  # fmt: skip
def test_captions_are_read_from_every_usual_place(tmp_path: Path, files: dict, wanted: tuple[str, ...]) -> None:
    picture(tmp_path / "a.png")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert captions(tmp_path) == {"a.png": wanted}


def test_metadata_in_subfolders(tmp_path: Path) -> None:
    for name in ("a.png", "s/b.png", "s/t/c.png", "s/t/d.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,top a\ns/b.png,top b\ns\\t\\c.png,top c\n")
    rows = [{"file_name": "b.png", "text": "near b"}, {"file_name": f"{tmp_path}/s/t/d.png", "text": "near d"}]
    (tmp_path / "s" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = find_pictures(tmp_path)
    assert captions(tmp_path) == {
        "a.png": ("top a",), "s/b.png": ("near b",), "s/t/c.png": ("top c",), "s/t/d.png": ("near d",)
    }  # fmt: skip
    assert found.sources == {"metadata.csv": 2, "metadata.jsonl": 2}
    assert found.summary(99) == "4 pictures in 3 folders; 4 captions (2 in metadata.csv, 2 in metadata.jsonl)"
    assert "4 pictures in 3 folders, 2 of them used" in found.summary(2)
    assert not found.warnings


def test_names_match_in_either_unicode_form(tmp_path: Path) -> None:
    name = "Ëñ三🎨"
    picture(tmp_path / f"{unicodedata.normalize('NFD', name)}.png")
    (tmp_path / f"{unicodedata.normalize('NFC', name)}.txt").write_text("a cat", encoding="utf-8")
    assert list(captions(tmp_path).values()) == [("a cat",)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "ein Kätzchen".encode("latin-1"), r"cannot read the caption .*a\.txt: .*write it in UTF-8"),
        ("a.txt", "a cat".encode("utf-16"), r"cannot read the caption .*a\.txt: .*write it in UTF-8"),
        ("a.caption", "a cat".encode("utf-16-le"), r"the caption .*a\.caption holds NUL characters, as UTF-16"),
        ("a.txt", b"x" * (1 << 21), r"the caption .*a\.txt has 2,097,152 bytes"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_name": ', r"line 2 is no valid JSON"),
        ("metadata.jsonl", b"\n[1]", r"line 2 is no JSON object"),
        ("metadata.jsonl", b"[" * 100_000, r"line 1 is no valid JSON"),
        ("metadata.jsonl", b'{"text": "x"}', r"line 1: no file_name"),
        ("metadata.jsonl", b'{"file_name": 3, "text": "x"}', r"line 1: no file_name"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 3}', r"line 1: the text is no valid text: 3"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\\ud800"}', r"line 1: the text is no valid text"),
        ("metadata.jsonl", "ä".encode("latin-1"), r"cannot read the metadata file .*write it in UTF-8"),
        ("metadata.csv", b"image,text\na.png,x\n", r"line 1: no column file_name"),
        ("metadata.csv", b"", r"line 1: no column file_name"),
        ("metadata.csv", b"file_name,text\na.png,x\nb.png,a cat, asleep\n", r"line 3 has 3 cells .*double quotes"),
        ("metadata.csv", b"file_name,text\na.png\n", r"line 2 has 1 cell where the first line names 2 columns"),
        ("metadata.csv", b'file_name,text\na.png,"a cat\n', r"line 2 is no valid CSV"),
        ("metadata.csv", b"file_name,text\n,a cat\n", r"line 2: no file_name"),
    ],
)  # fmt: skip
def test_broken_captions_are_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FadeError, match=message) as caught:
        find_pictures(tmp_path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b.txt": "a cat"}, r"no caption was found .* although it holds b\.txt"),
        ({"captions.json": "{}"}, r"no caption was found .* although it holds captions\.json"),
        ({"a.tags": "cat"}, r"no caption was found .* although it holds a\.tags"),
        ({"metadata.jsonl": '{"file_name": "z.png", "text": "x"}'}, r"1 of 1 row in .*metadata\.jsonl name no picture"),
        ({"metadata.csv": "file_name,label\na.png,3\n"}, r"metadata\.csv has no column text, caption, prompt"),
    ],
)  # fmt: skip
def test_captions_that_reach_no_picture_are_told(tmp_path: Path, files: dict[str, str], message: str) -> None:
    picture(tmp_path / "a.png")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = find_pictures(tmp_path)
    assert any(re.search(message, warning) for warning in found.warnings), found.warnings
    assert found.summary(9) == "1 picture in 1 folder; no captions"


def test_file_names_cannot_drive_a_terminal(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "\x1b[31mred.heic").write_bytes(b"x")
    assert not any("\x1b" in warning for warning in find_pictures(tmp_path).warnings)
