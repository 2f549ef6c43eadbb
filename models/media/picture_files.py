"""Picture files in and out of tensors: 8 and 16 bits, transparency, colour profile and EXIF kept."""

from __future__ import annotations

import errno
import io
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from ..errors import FileError, reading
from .atomic import finished
from .png_text import insert_chunks, text_chunks

# What is written, and the longest side that it can hold. All four hold profiles and EXIF.
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
LONGEST = {"JPEG": 65500, "WEBP": 16383}
DEEP = ("PNG", "TIFF")  # hold 16 bits
SETTINGS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "exact": True},
}
# Pillow has no colour with 16 bits a channel; PyAV has. By the number of channels.
_AV16 = {1: "gray16", 2: "ya16", 3: "rgb48", 4: "rgba64"}
LARGEST = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's own limit
DENSEST, SMALL = 8 * 1032, 1 << 24  # pixels a byte, as deflate makes them of an empty PNG of 1 bit; and how many may be claimed in any case
_ORIENTATION = 274
_DIRECTORIES = (0x8769, 0x8825)  # EXIF and GPS have directories of their own
_PHOTOMETRIC = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab"}
# TIFF 6.0 tags that say how the old file's pixels lie in it, which is the new file's own affair.
_LAYOUT = {
    254,
    255,
    *range(256, 260),
    262,
    266,
    273,
    _ORIENTATION,
    277,
    278,
    279,
    284,
    292,
    293,
    317,
    320,
    *range(322, 326),
    330,
    338,
    339,
    347,
    34675,
}


class UnreadError(ValueError):
    """What is not read of a picture, as the rest of a sentence about its file."""


@dataclass
class Picture:
    """pixels: float32 `(channels, height, width)` in 0..1, upright; 1 (grey), 3 (RGB) or 4 (RGBA, straight alpha) channels.

    bits: of the file's channels, 8 or 16. grey: the colours are equal. notes: sentences on what was not read.
    """

    pixels: Tensor
    bits: int = 8
    grey: bool = False
    profile: bytes | None = field(default=None, repr=False)  # ICC
    exif: Image.Exif = field(default_factory=Image.Exif, repr=False)
    text: dict[str, str] = field(default_factory=dict, repr=False)  # of a PNG, such as a workflow
    notes: list[str] = field(default_factory=list)


def read_picture(file: Path) -> Picture:
    """Any file that Pillow reads. Raises FileNotFoundError, PermissionError, or FileError for what is no whole picture of up to 16 bits."""
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file; check the path", str(file))
    data = file.read_bytes()
    with warnings.catch_warnings(), reading(file, "a whole picture", "get a complete copy of it, or export it again"):
        warnings.simplefilter("ignore")  # Pillow's on large pictures, and on each odd tag
        try:
            with Image.open(io.BytesIO(data)) as image:
                _check_size(image, len(data))
                return _decoded(image, data)
        except UnidentifiedImageError as error:
            raise FileError(f"{file} is no picture that Pillow {PIL.__version__} reads; export it as PNG or TIFF") from error
        except Image.DecompressionBombError as error:
            raise FileError(f"{file} has more pixels than the {LARGEST / 1e6:.0f} million that Pillow reads; cut it into parts") from error
        except UnreadError as error:
            raise FileError(f"{file} {error}") from error


def _check_size(image: Any, size: int) -> None:
    """Formats that draw with predictions claim any number of pixels in a few bytes."""
    pixels = image.width * image.height
    if pixels > max(DENSEST * size, SMALL):
        raise UnreadError(f"claims {image.width} x {image.height} pixels in {size:,} bytes, which is no picture; export it again")


def _decoded(image: Any, data: bytes) -> Picture:
    notes: list[str] = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"only the first of {image.n_frames} pictures in the file was used")
    profile, text, exif = image.info.get("icc_profile"), dict(getattr(image, "text", {})), _exif(image, notes)
    deep = image.format in DEEP and _bits(image, data) == 16
    if image.format == "TIFF":
        _check_tiff(image.tag_v2, deep)
    if deep:
        values = _decoded16(image, data)
    elif image.mode.startswith("I;16"):
        values, deep = np.asarray(image).astype(np.uint16)[..., None], True
    elif image.mode in ("I", "F"):
        raise UnreadError("has 32 bits a channel; export it with 8 or 16")
    else:
        if image.mode in ("CMYK", "LAB"):
            image, profile = _to_srgb(image, profile), None
            notes.append("the colours were converted to sRGB")
        values = _decoded8(image)
    values = _upright(values, exif.get(_ORIENTATION, 1))
    for tag in _LAYOUT & set(exif):
        del exif[tag]
    channels = values.shape[2]
    if channels == 2:  # grey with alpha: a network takes colours
        values = values[..., [0, 0, 0, 1]]
    pixels = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)).div_(65535 if deep else 255)
    return Picture(pixels, 16 if deep else 8, channels < 3, profile, exif, text, notes)


def _decoded8(image: Any) -> np.ndarray:
    """uint8 (height, width, channels), 1 to 4."""
    clear = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    values = np.asarray(image.convert(("LA" if clear else "L") if grey else ("RGBA" if clear else "RGB")))
    return values.reshape(*values.shape[:2], -1)


def _upright(values: np.ndarray, turn: int) -> np.ndarray:
    """turn: EXIF's orientation, 1 to 8."""
    if turn in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        values = values[:, ::-1]
    if turn in (3, 4, 7, 8):
        values = values[::-1]
    return values


def _bits(image: Any, data: bytes) -> int:
    """Of a channel, from the header: Pillow's mode does not tell."""
    return data[24] if image.format == "PNG" else max(image.tag_v2.get(258, (1,)))


def _exif(image: Any, notes: list[str]) -> Image.Exif:
    """What can also be written: cameras and programs store entries as other types than theirs."""
    try:
        exif: Image.Exif = image.getexif()
        directories = [exif, *(exif.get_ifd(tag) for tag in _DIRECTORIES)]
        left = [(found, tag) for found in directories for tag in set(found) - set(_DIRECTORIES) if not _writable(tag, found[tag])]
        for found, tag in left:
            del found[tag]
        exif.tobytes()
    except Exception:  # of a damaged directory Pillow raises whatever comes
        notes.append("its EXIF data are damaged and were left out")
        return Image.Exif()
    if left:
        notes.append(f"EXIF entries of a wrong type were left out: {', '.join(ExifTags.TAGS.get(tag, str(tag)) for _, tag in left)}")
    return exif


def _writable(tag: int, value: Any) -> bool:
    probe = Image.Exif()
    probe[tag] = value
    try:
        probe.tobytes()
    except Exception:  # as above
        return False
    return True


def _check_tiff(tags: Mapping[int, Any], deep: bool) -> None:
    """Raise UnreadError for what Pillow, or with 16 bits FFmpeg, would give wrongly without a word."""
    kind, samples, bits = tags.get(262, 1), tags.get(277, 1), tags.get(258, (1,))
    if 2 in tags.get(339, ()):
        raise UnreadError("is a TIFF with signed numbers; export it with unsigned ones")
    if deep and 322 in tags:
        raise UnreadError("is a TIFF with 16 bits in tiles; export it in strips")
    if deep and (kind not in (0, 1, 2) or samples > 4 or len(set(bits)) > 1):
        colours = _PHOTOMETRIC.get(kind, "unknown")
        raise UnreadError(f"is a TIFF with 16 bits of {colours} colours in {samples} channels; export it as grey or RGB")


def _decoded16(image: Any, data: bytes) -> np.ndarray:
    """uint16 (height, width, channels), 1 to 4, with straight alpha."""
    import av

    image.load()  # stops at what is damaged, where FFmpeg fills it in
    context: Any = av.CodecContext.create(image.format.lower(), "r")
    try:
        frame = [*context.decode(av.Packet(data)), *context.decode(None)][0]
    except (av.FFmpegError, IndexError) as error:
        raise UnreadError("is damaged, or of a kind that FFmpeg does not decode with 16 bits; export it again, as PNG") from error
    channels = len(frame.format.components)
    plane = frame.reformat(format=f"{_AV16[channels]}le").planes[0]
    values = np.frombuffer(plane, "<u2").reshape(plane.height, -1)[:, : plane.width * channels].reshape(plane.height, plane.width, channels)
    if image.format == "TIFF" and 1 in image.tag_v2.get(338, ()):  # premultiplied
        alpha = np.maximum(values[..., -1:], 1)
        values = np.concatenate([(values[..., :-1] * 65535.0 / alpha).clip(0, 65535).round(), values[..., -1:]], -1)
    return values


def _to_srgb(image: Any, profile: bytes | None) -> Any:
    if profile is None:
        if image.mode == "LAB":
            profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        else:
            return image.convert("RGB")
    try:
        return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise UnreadError(f"has a colour profile that cannot be used ({error}); export it as RGB") from error


def fitted(picture: Picture, target: Path, size: tuple[int, int]) -> Picture:
    """The picture without what `target` cannot hold, notes on it added. size: (width, height) to be written.

    Raises ValueError where that would lose transparency, for a size that the file type does not have, and for a type that is not written.
    """
    kind = PICTURE_FORMATS.get(target.suffix.lower())
    if kind is None:
        raise ValueError(f"{target} ends in {target.suffix!r}; pictures are written as {', '.join(PICTURE_FORMATS)}")
    if max(size) > LONGEST.get(kind, max(size)):
        raise ValueError(
            f"{target} would have {size[0]} x {size[1]} pixels and {kind} holds {LONGEST[kind]} a side; use .png or .tif, or a smaller size"
        )
    if kind == "JPEG" and len(picture.pixels) == 4:
        if picture.pixels[3].amin() < 1:
            raise ValueError(f"{target}: JPEG has no transparency and the source has; write .png, .webp or .tif")
        picture = replace(picture, pixels=picture.pixels[: 1 if picture.grey else 3])
    if picture.bits == 16 and kind not in DEEP:
        notes = [*picture.notes, f"16 bits became 8: {kind} has no more; .png and .tif have"]
        picture = replace(picture, bits=8, notes=notes)
    return picture


def write_picture(target: Path, picture: Picture) -> None:
    """Write a `fitted` picture. The file gets its name when it is complete; what has that name is replaced."""
    kind = PICTURE_FORMATS[target.suffix.lower()]
    pixels = picture.pixels
    if picture.grey and len(pixels) == 4 and (kind, picture.bits) != ("TIFF", 16):  # which Pillow, for one, does not read
        pixels = torch.cat([pixels[:3].mean(0, keepdim=True), pixels[3:]])
    top = 2**picture.bits - 1
    codes = (pixels.clamp(0, 1) * top).round().to(torch.int32 if picture.bits == 16 else torch.uint8).movedim(0, -1).contiguous().numpy()
    _resize_exif(picture.exif, codes.shape[1], codes.shape[0])
    with finished(target) as unfinished:
        if kind == "TIFF":
            unfinished.write_bytes(_tiff(codes, picture))
        elif picture.bits == 16:
            unfinished.write_bytes(_png16(codes, picture))
        else:
            image = Image.fromarray(codes[..., 0] if codes.shape[2] == 1 else codes)
            extra = {"pnginfo": text_chunks(picture.text)} if kind == "PNG" else {}
            image.save(unfinished, kind, icc_profile=picture.profile, exif=picture.exif, **SETTINGS[kind], **extra)


def _resize_exif(exif: Image.Exif, width: int, height: int) -> None:
    inner = exif.get_ifd(0x8769)
    if 0xA002 in inner:
        inner[0xA002], inner[0xA003] = width, height


def _png16(codes: np.ndarray, picture: Picture) -> bytes:
    import av

    height, width, channels = codes.shape
    name = f"{_AV16[channels]}be"
    frame = av.VideoFrame(width, height, name)
    plane: Any = frame.planes[0]
    np.frombuffer(plane, ">u2").reshape(height, -1)[:, : width * channels] = codes.reshape(height, -1)
    context: Any = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt, context.time_base = width, height, name, 1
    data = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    chunks: list[tuple[Any, ...]] = [*text_chunks(picture.text).chunks]
    if picture.profile is not None:
        chunks.insert(0, (b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.profile)))
    if len(picture.exif):
        chunks.append((b"eXIf", picture.exif.tobytes().removeprefix(b"Exif\0\0")))
    file = io.BytesIO()
    insert_chunks(io.BytesIO(data), file, chunks)
    return file.getvalue()


def _tiff(codes: np.ndarray, picture: Picture) -> bytes:
    """TIFF 6.0 with one strip, compressed with deflate. Pillow writes no 16-bit colour, and with libtiff no EXIF directory."""
    height, width, channels = codes.shape
    strip = zlib.compress(codes.astype("<u2" if picture.bits == 16 else np.uint8).tobytes())
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in picture.exif.items():
        directory[tag] = value
    for tag in _DIRECTORIES:
        if inner := picture.exif.get_ifd(tag):
            directory[tag] = inner
    directory[256], directory[257], directory[258], directory[259] = width, height, (picture.bits,) * channels, 8
    directory[262], directory[273], directory[277], directory[278], directory[279] = (2 if channels > 2 else 1), 0, channels, height, len(strip)
    if channels in (2, 4):
        directory[338] = 2  # straight alpha
    if picture.profile is not None:
        directory.tagtype[34675] = 7
        directory[34675] = picture.profile
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue() + strip
