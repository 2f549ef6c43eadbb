"""Layers against the merged picture of their file, and colours of other spaces: PSD and OpenRaster."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from psd_tools.constants import Resource
from psd_tools.psd import PSD
from psd_tools.psd.image_resources import ImageResource
from test_layers_blend import flat, levels
from test_layers_document import same
from test_layers_files import one_layer, ora_of, png_bomb
from test_layers_psd import changed, psd_of

from tessera.models.layers import compare
from tessera.models.layers.compose import composite
from tessera.models.layers.document import Document, Group, Layer
from tessera.models.layers.formats import read, write

# Against the merged picture


def merged(change: Callable[[np.ndarray], None]) -> Callable[[PSD], None]:
    """Changes the planes of the merged picture, uint8 `(channels, height, width)`."""

    def apply(psd: PSD) -> None:
        stored = b"".join(psd.image_data.get_data(psd.header))
        planes = np.frombuffer(stored, np.uint8).reshape(psd.header.channels, psd.header.height, psd.header.width).copy()
        change(planes)
        psd.image_data.set_data([plane.tobytes() for plane in planes], psd.header)

    return apply


def test_layers_that_are_not_the_merged_picture_are_told_with_figures(tmp_path):
    """Two of 24 pixels, one by 10 and one by 90 of 255; by 4, which is rounding, none."""
    write(Document(6, 4, (Layer("grey", flat((0.4, 0.4, 0.4, 1), 4, 6)),)), tmp_path / "a.psd")

    def within(planes: np.ndarray) -> None:
        planes[0] += 4

    def beyond(planes: np.ndarray) -> None:
        planes[1, 2, 3] += 10
        planes[2, 0, 0] -= 90

    assert read(changed(tmp_path / "a.psd", merged(within)))[1] == []
    write(Document(6, 4, (Layer("grey", flat((0.4, 0.4, 0.4, 1), 4, 6)),)), tmp_path / "a.psd")
    (line,) = read(changed(tmp_path / "a.psd", merged(beyond)))[1]
    mean = (10 + 90) / 24
    assert line == f"its layers together differ from its own merged picture in 8.3 % of the pixels: by {mean:.2g} of 255 on average, 90 at most"


def test_transparency_is_compared_too_and_not_what_is_under_it(tmp_path):
    """A program may leave any colour where nothing is."""
    write(Document(6, 4, (Layer("grey", flat((0.4, 0.4, 0.4, 1), 2, 2)),)), tmp_path / "a.psd")

    def black(planes: np.ndarray) -> None:
        planes[:3, :, 2:] = 0

    def opaque(planes: np.ndarray) -> None:
        planes[3] = 255

    assert read(changed(tmp_path / "a.psd", merged(black)))[1] == []
    assert "in 83 % of the pixels" in read(changed(tmp_path / "a.psd", merged(opaque)))[1][0]


@pytest.mark.parametrize("offset", range(5))
def test_a_large_canvas_is_compared_at_some_of_its_pixels(offset, tmp_path, monkeypatch):
    """Overhanging layers, masks, groups and modes: the pixels that are looked at are as in the whole composite."""
    monkeypatch.setattr(compare, "PIXELS", 61 * 47 // 16 + 1)
    layers = tuple(Layer(f"{x}", levels(9 + x, 14, 4), 5 * x - 7 - offset, 3 * x - 4, 0.8, "multiply", mask=levels(9 + x, 14)) for x in range(10))
    before = Document(61, 47, (Layer("below", levels(47, 61, 4)), Group("g", layers, 0.7, "normal")))
    step = compare.stride(61, 47)
    whole = composite(before)
    whole[..., :3] = whole[..., :3] * whole[..., 3:] + 1 - whole[..., 3:]
    monkeypatch.setattr(compare, "TOLERANCE", 1e-3)
    assert step > 3 and compare.difference(before, whole[::step, ::step]) is None
    whole[step, step] += 0.5
    assert "% of the pixels: by" in compare.difference(before, whole[::step, ::step])


def test_how_many_pixels_are_compared():
    for width, height in ((1, 1), (1024, 1024), (1025, 1024), (30_000, 30_000), (30_000, 1), (4096, 4096)):
        step = compare.stride(width, height)
        assert (width / step) * (height / step) <= compare.PIXELS and (step == 1 or width * height > compare.PIXELS)


def test_a_damaged_or_missing_merged_picture_is_told_and_the_layers_are_read(tmp_path):
    before = Document(6, 4, (Layer("a", levels(4, 6, 4)),))
    write(before, tmp_path / "a.psd")

    def cut(psd: PSD) -> None:
        psd.image_data.data = psd.image_data.data[:9]

    found, notes = read(changed(tmp_path / "a.psd", cut))
    same(before, found)
    assert notes == ["its merged picture is damaged, and the layers could not be checked against it"]

    def none(psd: PSD) -> None:
        version = struct.pack(">IB", 1, 0) + 2 * struct.pack(">I", 0) + struct.pack(">I", 1)
        psd.image_resources[Resource.VERSION_INFO] = ImageResource(key=Resource.VERSION_INFO, data=version)

    found, notes = read(changed(tmp_path / "a.psd", none))
    same(before, found)
    assert notes == ["no merged picture is in it to check the layers against"]


# Colours


def icc(primaries: list[list[float]] | None, gamma: float) -> bytes:
    """A profile of version 2: a matrix to D50 XYZ by rows, None for grey, and one gamma."""
    xyz = lambda values: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))  # noqa: E731
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white, name = xyz((0.9642, 1.0, 0.8249)), b"desc" + bytes(4) + struct.pack(">I", 5) + b"Test\0" + bytes(78)
    tags = {b"desc": name, b"wtpt": white}
    if primaries is None:
        tags |= {b"kTRC": curve}
    else:
        tags |= {key: xyz(column) for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), np.array(primaries).T, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for key, data in tags.items():
        data += bytes(-len(data) % 4)
        table += key + struct.pack(">II", at + len(body), len(data))
        body += data
    size = at + len(body)
    space = b"GRAY" if primaries is None else b"RGB "
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


# Adobe RGB (1998) Color Image Encoding, version 2005-05, annex A.3: to D50 XYZ
ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
# IEC 61966-2-1, adapted to D50 (Bradford)
SRGB = [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]


def encoded(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def with_profile(profile: bytes) -> Callable[[PSD], None]:
    def change(psd: PSD) -> None:
        psd.image_resources[Resource.ICC_PROFILE] = ImageResource(key=Resource.ICC_PROFILE, data=profile)

    return change


def test_colours_of_another_space_become_srgb(tmp_path):
    picture = levels(4, 6, 4)
    write(Document(6, 4, (Layer("a", picture),)), tmp_path / "a.psd")
    found, notes = read(changed(tmp_path / "a.psd", with_profile(icc(ADOBE, 563 / 256))))
    linear = picture[..., :3].numpy().astype(np.float64) ** (563 / 256)
    expected = encoded(linear @ np.array(ADOBE).T @ np.linalg.inv(np.array(SRGB)).T)
    assert np.abs(found.layers[0].image[..., :3].numpy() - expected).max() < 1.5 / 255
    assert torch.equal(found.layers[0].image[..., 3], picture[..., 3])
    assert notes[0] == "its colours are converted from 'Test' to sRGB; edges and blend modes may shift a little"


def test_colours_of_another_space_lose_sixteen_bits_and_it_is_said(tmp_path):
    found, notes = read(changed(psd_of(tmp_path, "RGB", 16), with_profile(icc(ADOBE, 563 / 256))))
    assert notes[0] == "its colours are converted from 'Test' to sRGB, in 8 bits a channel; edges and blend modes may shift a little"
    stored = np.linspace(0, 1, 48).reshape(4, 3, 4)
    expected = encoded(stored[..., :3] ** (563 / 256) @ np.array(ADOBE).T @ np.linalg.inv(np.array(SRGB)).T)
    assert np.abs(found.layers[0].image[..., :3].numpy() - expected).max() < 2 / 255
    assert np.abs(found.layers[0].image[..., 3].numpy() - stored[..., 3]).max() < 1 / 65535, "alpha keeps them"


def test_grey_of_another_gamma_becomes_srgb(tmp_path):
    found, notes = read(changed(psd_of(tmp_path, "L"), with_profile(icc(None, 1.0))))
    ramp = np.rint(np.linspace(0, 1, 24).reshape(4, 3, 2)[..., 0] * 255) / 255
    assert np.abs(found.layers[0].image[..., 1].numpy() - encoded(ramp)).max() < 1.5 / 255
    assert notes[0].startswith("its colours are converted from 'Test' to sRGB")


def test_srgb_by_whatever_name_stays_as_it_is(tmp_path):
    before = Document(6, 4, (Layer("a", levels(4, 6, 4)),))
    write(before, tmp_path / "a.psd")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found, notes = read(changed(tmp_path / "a.psd", with_profile(srgb)))
    same(before, found)
    assert notes == []


@pytest.mark.parametrize("profile", [b"", b"not a profile", icc(None, 2.2), icc(ADOBE, 2.2)[:200]])
def test_a_profile_that_cannot_be_used_is_told(profile, tmp_path):
    before = Document(6, 4, (Layer("a", levels(4, 6, 4)),))
    write(before, tmp_path / "a.psd")
    found, notes = read(changed(tmp_path / "a.psd", with_profile(profile)))
    same(before, found)
    assert notes == ["its colour profile is damaged, or for other colours; the values are taken as sRGB"]


# OpenRaster


def picture_bytes(picture: torch.Tensor, **more: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray((picture * 255).round().byte().numpy()).save(stream, "PNG", **more)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("merged", "note"),
    [
        (picture_bytes(flat((1, 0, 0, 0.6), 6, 8)), None),
        (
            picture_bytes(flat((1, 0, 0, 1), 6, 8)),
            "its layers together differ from its own merged picture in 100 % of the pixels: by 102 of 255 on average",
        ),
        (picture_bytes(flat((1, 0, 0, 1), 5, 8)), "its merged picture is damaged or of another size, and the layers could not be checked against it"),
        (b"GIF", "its merged picture is damaged or of another size, and the layers could not be checked against it"),
        (png_bomb(8)[:60], "its merged picture is damaged or of another size, and the layers could not be checked against it"),
        (png_bomb(30_000), "its merged picture is damaged or of another size, and the layers could not be checked against it"),
    ],
)
def test_an_openraster_file_is_compared_with_its_merged_picture(merged, note, tmp_path):
    members = {"a.png": picture_bytes(flat((1, 0, 0, 0.6), 6, 8)), "mergedimage.png": merged}
    found, notes = read(ora_of(tmp_path / "a.ora", one_layer("a.png"), **members))
    assert (composite(found)[0, 0] - torch.tensor([1, 0, 0, 0.6])).abs().max() < 1e-6
    assert len(notes) == (note is not None) and (note is None or notes[0].startswith(note))


@pytest.mark.parametrize(("mode", "primaries"), [("RGB", ADOBE), ("RGBA", ADOBE), ("L", None)])
def test_pngs_of_another_colour_space_become_srgb(mode, primaries, tmp_path):
    picture = Image.fromarray((levels(6, 8, 4) * 255).byte().numpy()).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, "PNG", icc_profile=icc(primaries, 563 / 256))
    found, notes = read(ora_of(tmp_path / "a.ora", one_layer("a.png"), **{"a.png": stream.getvalue()}))
    stored = np.asarray(picture.convert("RGBA")).astype(np.float64) / 255
    linear = stored[..., :3] ** (563 / 256)
    expected = encoded(linear if primaries is None else linear @ np.array(ADOBE).T @ np.linalg.inv(np.array(SRGB)).T)
    assert np.abs(found.layers[0].image[..., :3].numpy() - expected).max() < 1.5 / 255
    assert np.abs(found.layers[0].image[..., 3].numpy() - stored[..., 3]).max() < 1e-6
    assert notes == ["a.png: its colours are converted from 'Test' to sRGB"]


def test_a_png_profile_that_cannot_be_used_is_told(tmp_path):
    data = picture_bytes(flat((1, 0, 0, 1), 6, 8), icc_profile=b"none")
    found, notes = read(ora_of(tmp_path / "a.ora", one_layer("a.png"), **{"a.png": data}))
    assert torch.equal(found.layers[0].image, flat((1, 0, 0, 1), 6, 8))
    assert notes == ["a.png: its colour profile is damaged, or for other colours; the values are taken as sRGB"]
