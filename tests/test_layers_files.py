"""PSD, OpenRaster and PNG files: round trips, other readers, damaged and hostile files, the command line."""

from __future__ import annotations

import io
import json
import re
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psd_tools
import pytest
import torch
from PIL import Image
from test_layers_blend import flat, levels
from test_layers_document import document, same
from test_layers_psd import psd_of

from tessera.__main__ import main
from tessera.models.errors import FileError
from tessera.models.layers import pixels as files
from tessera.models.layers import png
from tessera.models.layers.blend import MODES
from tessera.models.layers.compose import composite, without_faint_groups
from tessera.models.layers.document import Document, Group, Layer, Transform
from tessera.models.layers.formats import FORMATS, read, write
from tessera.models.layers.ora import OPERATORS
from tessera.models.layers.pixels import file_name
from tessera.models.layers.psd import BLEND_KEYS as KEYS

each_format = pytest.mark.parametrize("ending", [kind.suffix for kind in FORMATS.values()])


@each_format
def test_every_property_and_pixel_comes_back(ending, tmp_path):
    before = document()
    write(before, tmp_path / f"a{ending}")
    after, notes = read(tmp_path / f"a{ending}")
    same(before, after, opacity=1e-9)  # of the document's opacities, all are n / 255
    assert notes == [] and torch.equal(composite(before), composite(after))
    assert len(list(tmp_path.iterdir())) == 1, "nothing unfinished is left"


@each_format
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (333, 1)])
def test_odd_sizes_and_documents_without_layers(ending, size, tmp_path):
    empty = Document(*size, (Group("empty"),))
    full = Document(*size, (Layer("a", levels(1, 3, 4)), Layer("b", levels(size[1], size[0], 4), 1, -1)))
    for name, before in (("empty", empty), ("bare", Document(*size)), ("full", full)):
        write(before, tmp_path / (name + ending))
        after, _ = read(tmp_path / (name + ending))
        same(before, after)
        assert [node.name for node in before.layers] == [node.name for node in after.layers]


@pytest.mark.parametrize(("ending", "modes"), [(".psd", KEYS), (".ora", OPERATORS), ("", MODES)])
def test_every_blend_mode_has_a_name_in_the_file(ending, modes, tmp_path):
    names = [mode for mode in modes if mode in MODES]
    nodes = [Layer(mode, levels(2, 2, 4), blend_mode=mode) for mode in names]
    before = Document(4, 4, (*nodes, *(Group(mode, (nodes[0],), blend_mode=mode) for mode in names)))
    write(before, tmp_path / f"a{ending}")
    same(before, read(tmp_path / f"a{ending}")[0])


@each_format
def test_two_hundred_layers(ending, tmp_path):
    before = Document(200, 10, tuple(Layer(f"{i}", levels(9, 2, 4), i) for i in range(200)))
    write(before, tmp_path / f"a{ending}")
    same(before, read(tmp_path / f"a{ending}")[0])


@pytest.mark.parametrize("ending", [".psd", ".ora"])
def test_transforms_become_pixels(ending, tmp_path):
    before = Document(40, 30, (Layer("a", levels(9, 13, 4), 5, 6, mask=levels(9, 13), transform=Transform(20, 11, 0.4, True)),))
    write(before, tmp_path / f"a{ending}")
    after, _ = read(tmp_path / f"a{ending}")
    assert after.layers[0].transform == Transform() and after.layers[0].bounds == before.layers[0].bounds
    assert (composite(after) - composite(before)).abs().max() < 0.01
    write(before, tmp_path / "kept")
    same(before, read(tmp_path / "kept")[0])


def test_psd_is_flattened_alike_by_psd_tools_and_its_merged_picture_is_ours(tmp_path):
    before = document()
    write(before, tmp_path / "a.psd")
    psd = psd_tools.PSDImage.open(tmp_path / "a.psd")
    ours = composite(before).numpy()
    for picture in (psd.composite(), psd.composite(ignore_preview=True)):
        theirs = np.asarray(picture.convert("RGBA")) / 255
        assert np.abs(theirs - ours)[..., 3].max() < 1.01 / 255
        assert (np.abs(theirs - ours)[..., :3] * ours[..., 3:]).max() < 2 / 255
    with Image.open(tmp_path / "a.psd") as merged:  # a reader without layers; PSD keeps colours over white
        paper = ours[..., :3] * ours[..., 3:] + 1 - ours[..., 3:]
        assert np.abs(np.asarray(merged.convert("RGB")) / 255 - paper).max() < 0.51 / 255


def test_ora_is_an_archive_as_the_standard_says(tmp_path):
    before = document()
    write(before, tmp_path / "a.ora")
    with zipfile.ZipFile(tmp_path / "a.ora") as archive:
        first = archive.infolist()[0]
        assert (first.filename, first.compress_type, archive.read(first)) == ("mimetype", zipfile.ZIP_STORED, b"image/openraster")
        assert (tmp_path / "a.ora").read_bytes()[30:54] == b"mimetypeimage/openraster"
        merged = np.asarray(Image.open(io.BytesIO(archive.read("mergedimage.png"))))
        assert np.abs(merged / 255 - composite(before).numpy()).max() < 0.51 / 255
        assert max(Image.open(io.BytesIO(archive.read("Thumbnails/thumbnail.png"))).size) <= 256
        masked = np.asarray(Image.open(io.BytesIO(archive.read(next(n for n in archive.namelist() if n.startswith("data/0")))))).astype(float) / 255
        assert all(name.isascii() and "\\" not in name and ".." not in name for name in archive.namelist())
    assert masked.shape[2] == 4


def test_a_masked_ora_layer_looks_right_to_other_readers(tmp_path):
    picture, mask = levels(5, 7, 4), levels(5, 7)
    write(Document(7, 5, (Layer("m", picture, mask=mask),)), tmp_path / "a.ora")
    with zipfile.ZipFile(tmp_path / "a.ora") as archive:
        stack = archive.read("stack.xml").decode()
        source = stack.split('src="')[1].split('"')[0]
        shown = torch.from_numpy(np.array(Image.open(io.BytesIO(archive.read(source))))).float() / 255
    assert (shown[..., 3] - picture[..., 3] * mask).abs().max() < 0.51 / 255


def test_modes_and_groups_that_a_format_has_not_are_refused_before_writing(tmp_path):
    grain = Document(4, 4, (Group("g", (Layer("g", levels(2, 2, 4), blend_mode="grain-merge"),)),))
    with pytest.raises(ValueError, match=r"'g' has blend mode grain-merge, which PSD has not; choose another, or save as \.ora"):
        write(grain, tmp_path / "a.psd")
    through = Document(4, 4, (Group("g", (Layer("g", levels(2, 2, 4)),), 0.5),))
    with pytest.raises(ValueError, match=r"group 'g' passes through at opacity 0.5.*\.psd"):
        write(through, tmp_path / "a.ora")
    (tmp_path / "there").mkdir()
    for name in ("there", "a.gif"):
        with pytest.raises(ValueError, match=r"folder that exists|ends in \.gif"):
            write(grain, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write(document(), tmp_path / "a.ora")
    before = (tmp_path / "a.ora").read_bytes()
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(Document(3, 3), tmp_path / "a.ora")
    assert (tmp_path / "a.ora").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\x", "/abs", "C:\\x", "CON", "😀😀", "", ".hidden", "a/b", "é" * 200, " . ", "a:b*c?d|e<f>"]
)
def test_names_become_plain_file_names(name, tmp_path):
    plain = file_name(name, 7, ".png")
    assert plain.startswith("007_") and plain.isascii() and len(plain) < 80
    assert not set(plain) & set('/\\:*?"<>|') and ".." not in plain
    folder = tmp_path / "in" / "out"
    write(Document(4, 4, (Layer(name, levels(2, 2, 4)),)), folder)
    assert read(folder)[0].layers[0].name == name
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"] and [path.name for path in tmp_path.iterdir()] == ["in"]


# Files of other programs


# What Python says of its own code, and not of a file
PYTHON = re.compile(
    r"[A-Z]\w+Error\b|Traceback|NoneType|'(int|str|list|dict|float|tuple)'|object (has|is)|unpack requires|\bbuffer\b|recursion|codec|<class"
)


def broken(data: bytes, seed: int, cuts: int = 12, flips: int = 30) -> Iterator[bytes]:
    """Cut at many places, and with bytes changed."""
    source = np.random.default_rng(seed)
    yield from (data[: len(data) * i // cuts] for i in range(cuts))
    for number in range(flips):
        part = bytearray(data)
        for place in source.integers(0, len(data), 1 + number % 8):
            part[place] = source.integers(0, 256)
        yield bytes(part)


@each_format
def test_damaged_files_are_one_sentence(ending, tmp_path):
    """A sentence that names the file, or a document, but never another exception."""
    write(document(), tmp_path / f"a{ending}")
    whole = tmp_path / f"a{ending}" if ending else tmp_path / "a" / png.INDEX
    failed = 0
    for part in broken(whole.read_bytes(), 0):
        whole.write_bytes(part)
        try:
            read(whole)
        except FileError as error:
            failed += 1
            assert whole.name in str(error) and "\n" not in str(error) and not PYTHON.search(str(error)), error
    assert failed >= 9


def ora_of(path: Path, stack: str | bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "image/openraster", zipfile.ZIP_STORED)
        archive.writestr("stack.xml", stack)
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return path


def one_layer(source: str = "data/a.png", more: str = "") -> str:
    return f'<image w="8" h="6"><stack><layer name="a" src="{source}" {more}/></stack></image>'


def png_bytes(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def png_bomb(side: int) -> bytes:
    """A header that declares side x side pixels, and next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


ONE = png_bytes(Image.new("RGBA", (2, 2)))
LAUGHS = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>' + one_layer("&b;")


@pytest.mark.parametrize(
    ("stack", "member", "message"),
    [
        (one_layer("../../etc/passwd"), b"", "points out of the archive"),
        (one_layer("data/..\\..\\x.png"), b"", "points out of the archive"),
        (one_layer("/etc/passwd"), b"", "points out of the archive"),
        (one_layer("data/missing.png"), b"", "it has no file 'data/missing.png'; make or download it again"),
        (one_layer(), b"GIF89a", "'data/a.png' is not a sound PNG"),
        (one_layer(), png_bomb(30_000), "900 million pixels"),
        (one_layer(), png_bomb(14_000), "too short for 14000 x 14000 pixels"),  # 196 million, beyond what Pillow would warn of
        (one_layer(), png_bomb(1000), "too short for 1000 x 1000 pixels"),
        (one_layer(), png_bomb(20), "'data/a.png' is damaged, no sound PNG; make or download it again"),
        (one_layer(), png_bomb(1)[:20], "not a sound PNG .it does not begin as one"),
        (one_layer(), png_bomb(8) + bytes(2**21), "longer than 8 x 8 pixels can be; do not trust this file"),
        (LAUGHS, b"", "declarations"),
        (('<?xml version="1.0" encoding="UTF-16"?>' + LAUGHS).encode("utf-16"), b"", "declarations"),
        ("<!DOCTYPE image>" + one_layer(), b"", "declarations"),
        ('<?xml version="1.0" encoding="bogus"?>' + one_layer(), b"", "evil.ora: not an OpenRaster file, or damaged; make"),
        ("<image w='8' h='6'>" + "<stack>" * 5000 + "</stack>" * 5000 + "</image>", b"", "evil.ora: not an OpenRaster file, or damaged; make"),
        ("<image w='8' h='6'>" + "<stack>" * 102 + "</stack>" * 102 + "</image>", b"", "101 deep; use at most 100"),
        (b"<image", b"", "evil.ora: not an OpenRaster file, or damaged; make or download it again"),
        ("<image w='8' h='6'/>", b"", "no stack"),
        ("<image w='8000000' h='6'><stack/></image>", b"", "canvas is 8000000 x 6"),
        ("<image w='8' h='6'><stack><stack x='899999999'><layer src='data/a.png' x='9'/></stack></stack></image>", ONE, "lies at 900000008, 0"),
        ("<image w='8.5' h='6'><stack/></image>", b"", "w='8.5' in stack.xml is not a number of pixels"),
        (one_layer(more='opacity="7"'), ONE, "opacity 7"),
        (one_layer(more='opacity="high"'), ONE, "high"),
        (b" " * (2**24 + 1), b"", "longer than 16 MiB"),
    ],
)
def test_hostile_ora_files_are_refused(stack, member, message, tmp_path):
    file = ora_of(tmp_path / "evil.ora", stack, data__a__png=b"", **{"data__a.png": member})
    with pytest.raises(ValueError, match=message) as caught:
        read(file)
    assert "evil.ora" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.ora"], "nothing was unpacked"


def test_a_bomb_is_not_unpacked(tmp_path):
    """64 MiB of zeros behind a small picture's header: no more is read than the picture can be."""
    with zipfile.ZipFile(tmp_path / "evil.ora", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("stack.xml", one_layer("a.png"))
        archive.writestr("a.png", png_bomb(8) + bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"evil\.ora .*'a\.png' is longer than 8 x 8 pixels"):
            read(tmp_path / "evil.ora")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_ora_members_are_stored_or_deflated(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.ora", "w", method) as archive:
        archive.writestr("stack.xml", one_layer())
    with pytest.raises(ValueError, match=rf"evil\.ora .*stack\.xml is compressed by method {method}; OpenRaster has stored and deflated"):
        read(tmp_path / "evil.ora")


def test_layers_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIXELS", 10)
    for name in ("a.psd", "a.ora", "a"):
        write(Document(4, 4, (Layer("a", levels(2, 3, 4)), Layer("b", levels(2, 3, 4)))), tmp_path / name)
        with pytest.raises(FileError, match="cannot be read: its layers have 0 million pixels; 0 million are read at most"):
            read(tmp_path / name)


def naming(kind: str, folder: Path, count: int, data: bytes) -> Path:
    """A document with one picture, named by many layers."""
    if kind == "ora":
        stack = "".join(f'<layer name="{i}" src="a.png" x="{i}"/>' for i in range(count))
        return ora_of(folder / "a.ora", f'<image w="8" h="6"><stack>{stack}</stack></image>', **{"a.png": data})
    (folder / "a").mkdir()
    (folder / "a" / "a.png").write_bytes(data)
    entries = [{"name": f"{i}", "blend_mode": "normal", "image": "a.png", "x": count - 1 - i} for i in range(count)]
    (folder / "a" / png.INDEX).write_text(json.dumps({"version": 1, "width": 8, "height": 6, "layers": entries}))
    return folder / "a"


@pytest.mark.parametrize("kind", ["ora", "folder"])
def test_one_picture_of_many_layers_is_unpacked_once_or_not_at_all(kind, tmp_path):
    """A megabyte that is 16 000 x 16 000 pixels, 200 times: 51 200 million, and nothing of them is unpacked."""
    (tmp_path / "small").mkdir()
    found, notes = read(naming(kind, tmp_path / "small", 200, png_bytes(Image.new("RGBA", (3, 2), "red"))))
    assert len({layer.image.data_ptr() for _, layer in found.walk()}) == 1 and notes == []
    assert [layer.x for _, layer in found.walk()] == list(range(199, -1, -1))
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match="its layers have 768 million pixels; 536 million are read at most"):
            read(naming(kind, tmp_path, 200, png_bomb(16_000)))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_more_layers_than_psd_holds_are_refused(tmp_path):
    with pytest.raises(FileError, match="it has more than 32767 layers; so many are read at most"):
        read(naming("ora", tmp_path, 2 * 2**15, ONE))


def test_ora_of_other_programs(tmp_path):
    """Offsets of stacks add up (the standard's own example), modes by their other names, elements that we have not, 16 bits."""
    deep = np.arange(4, dtype=np.uint16).reshape(2, 2) * 16000
    stack = """<image w="8" h="6" version="0.0.3"><!-- a --><stack>
        <text name="words" x="1"/>
        <stack x="10" isolation="auto"><layer name="upper" src="data/a.png" x="5" y="5" composite-op="svg:add"/></stack>
        <layer src="data/b.png" composite-op="krita:unheard_of" visibility="hidden"/>
    </stack></image>"""
    members = {"data__a.png": png_bytes(Image.new("RGB", (3, 2), "red")), "data__b.png": png_bytes(Image.fromarray(deep))}
    found, notes = read(ora_of(tmp_path / "a.ora", stack, **members))
    lower, group = found.layers
    assert isinstance(group, Group) and group.blend_mode == "pass-through" and not lower.visible
    assert (group.layers[0].x, group.layers[0].y, group.layers[0].blend_mode) == (15, 5, "linear-dodge")
    assert torch.equal(group.layers[0].image, flat((1, 0, 0, 1), 2, 3))
    assert torch.equal(lower.image[..., 0], (torch.arange(4).view(2, 2) * 16000 // 256).float() / 255)
    assert notes == [": krita:unheard_of is not known; normal is used", "data/b.png: its 16 bits a channel are read as 8", "words: text is left out"]


def test_sixteen_bits_in_a_folder_are_read_as_eight(tmp_path):
    write(Document(4, 4, (Layer("a", levels(3, 2, 4), mask=levels(3, 2)),)), tmp_path / "a")
    (mask,) = (tmp_path / "a").glob("*_mask.png")
    Image.fromarray(np.full((3, 2), 0x4000, np.uint16)).save(mask)
    found, notes = read(tmp_path / "a")
    assert torch.equal(found.layers[0].mask, torch.full((3, 2), 0x40 / 255)) and notes == [f"{mask.name}: its 16 bits a channel are read as 8"]


@pytest.mark.parametrize("name", [f"a{kind.suffix}" for kind in FORMATS.values()])
def test_layers_are_announced_while_they_are_written(tmp_path, name):
    before, announced = document(), []
    count = len(list(before.walk()))
    write(before, tmp_path / name, None, lambda *given: announced.append(given))
    assert announced == [(done, count) for done in range(count)]

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write(before, tmp_path / f"b{name[1:]}", None, stop)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("x")
    monkeypatch.setattr(png, "composite", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="f is a file that exists; choose another name, or remove it"):
        write(Document(4, 4), tmp_path / "f")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["x"]


def layer(**change: object) -> dict[str, object]:
    """An entry of layers.json."""
    return {"name": "a", "blend_mode": "normal", "image": "merged.png"} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "its version is 2, not 1; save the layers again"),
        ({"layers": [{"name": "a", "blend_mode": "normal", "image": "../../x.png"}]}, "'../../x.png' is not in the folder"),
        ({"layers": [{"name": "a", "blend_mode": "normal", "image": "none.png"}]}, "none.png"),
        ({"layers": [{"name": "a", "blend_mode": "glow"}]}, "'image' of 'a' is missing; give text"),
        ({"layers": [3]}, "'layers' holds 3; give an object for each layer"),
        ({"layers": [{"name": "a", "blend_mode": "normal", "image": "merged.png", "x": "left"}]}, "'x' of 'a' is 'left'; give a whole number"),
        ({"layers": [layer(x=float("inf"))]}, "'x' of 'a' is inf; give a whole number"),
        ({"layers": [layer(y=2**31)]}, "'a' lies at 0, 2147483648; use whole pixels"),
        ({"layers": [layer(visible="no")]}, "'visible' of 'a' is 'no'; give true or false"),
        ({"layers": [layer(rotation=10**400)]}, "'a' is shown at .*, turned by 1000.*; use .* a finite rotation"),
        ({"layers": [layer(width=float("inf"))]}, "'width' of 'a' is inf; give a whole number"),
        ({"layers": [layer(width=-1)]}, "'a' is shown at -1 x 0 pixels.*; use sizes of 0 to"),
        ({"layers": [layer(opacity=10**400)]}, "'a' has opacity 1000"),
        ({"layers": [layer(opacity="0.5")]}, "'opacity' of 'a' is '0.5'; give a number"),
        ({"layers": [layer(opacity=True)]}, "'opacity' of 'a' is True; give a number"),
        ({"layers": [layer(name=None)]}, "'name' is None; give text"),
        ({"layers": [layer(blend_mode=[])]}, r"'blend_mode' of 'a' is \[\]; give text"),
        ({"layers": [layer(image=None)]}, "'image' of 'a' is None; give text"),
        ({"layers": [layer(image="\0")]}, "is not in the folder"),
        ({"layers": [layer(mask=7)]}, "'mask' of 'a' is 7; give text"),
        ({"layers": [layer(layers=7)]}, "'layers' of 'a' is 7; give a list"),
        ({"layers": {}}, "'layers' is {}; give a list"),
        ({"layers": [layer(image="layers.json")]}, "'layers.json' is not a sound PNG"),
        ({"width": "8"}, "'width' is '8'; give a whole number"),
        ({"width": 8.5}, "'width' is 8.5; give a whole number"),
        ({"width": 0}, "canvas is 0 x"),
    ],
)
def test_bad_descriptions_are_refused(change, message, tmp_path):
    write(Document(4, 4), tmp_path / "a")
    index = tmp_path / "a" / png.INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "a")
    assert "a/layers.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is no JSON file, or cut off (line 1, column 1)"),
        ('{"version": 1,\n', "it is no JSON file, or cut off (line 2, column 1)"),
        ('{"width": ' + "9" * 5000 + "}", "it holds a number of thousands of digits"),
    ],
    ids=["empty", "cut", "digits"],
)
def test_descriptions_that_are_no_json(text, message, tmp_path):
    (tmp_path / png.INDEX).write_text(text)
    with pytest.raises(FileError) as caught:
        read(tmp_path)
    assert f"{png.INDEX} cannot be read: {message}" in str(caught.value) and not re.search(r"Expecting|sys\.", str(caught.value))


def test_a_description_that_nests_without_end_is_one_sentence(tmp_path):
    write(Document(4, 4), tmp_path / "a")
    (tmp_path / "a" / png.INDEX).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"^a/layers\.json: not a description of layers, or damaged"):
        read(tmp_path / "a")


def test_the_command_line_flattens_groups_that_openraster_has_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    inside = (Layer("a", levels(9, 9, 4), 3, 4, blend_mode="multiply"), Layer("b", levels(9, 9, 4), 6, 1))
    normal = Group("n", (Layer("c", levels(9, 9, 4), 9, 9),), 102 / 255)
    before = Document(20, 20, (Layer("below", levels(20, 20, 4)), Group("g", inside, 153 / 255), normal))
    write(before, tmp_path / "a.psd")
    assert main(["layers", str(tmp_path / "a.psd"), str(tmp_path / "b.ora")]) == 1
    assert "group 'n' passes through at opacity 0.4, which OpenRaster has not; use normal, save as .psd, or convert" in capsys.readouterr().err
    assert main(["layers", "--flatten-groups", str(tmp_path / "a.psd"), str(tmp_path / "b.ora")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("b.ora: 3 layers on 20 x 20 pixels")
    assert out[1] == "  g: a group that passed through at opacity 0.6 is one layer now"
    assert out[2] == "  n: a group that passed through at opacity 0.4 is a normal one, which looks the same"
    after, notes = read(tmp_path / "b.ora")
    assert notes == [] and [node.name for node in after.layers] == ["below", "g", "n"] and after.layers[2].layers[0].name == "c"
    assert (composite(after) - composite(before)).abs().max() < 2.5 / 255


def test_flattened_groups_say_what_they_lose():
    """Nothing of one beyond the canvas is lost; one that becomes a layer is cut to the canvas, and says so."""

    def group(name: str, *layers: Layer) -> Group:
        return Group(name, layers, 0.5)

    def part(x: int, y: int, **changes) -> Layer:
        return Layer(f"{x}", levels(9, 9, 4), x, y, blend_mode="multiply", **changes)

    away, partly = group("away", part(20, 0), part(-9, 3)), group("partly", part(-3, 4), part(14, 12))
    hidden, both = group("hidden", part(2, 2), part(3, 3, visible=False)), group("both", part(15, 15), part(4, 4, opacity=0.0))
    before = Document(20, 20, (Layer("below", levels(20, 20, 4)), away, partly, hidden, both))
    after, notes = without_faint_groups(before)
    assert after.layers[1].layers == away.layers and after.layers[1].blend_mode == "normal"
    assert all(isinstance(node, Layer) for node in after.layers[2:]) and after.layers[2].bounds == (0, 4, 20, 16)
    start = "a group that passed through at opacity 0.5 is"
    assert notes == [
        f"away: {start} a normal one, which looks the same",
        f"partly: {start} one layer now, without what lay beyond the canvas",
        f"hidden: {start} one layer now, without its layers that do not show",
        f"both: {start} one layer now, without what lay beyond the canvas and its layers that do not show",
    ]
    assert (composite(after) - composite(before)).abs().max() < 1e-5


def test_the_command_line_converts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    write(document(), tmp_path / "a.psd")
    assert main(["layers", "a.psd", "b.ora"]) == 0
    assert capsys.readouterr().out == "b.ora: 6 layers on 61 x 47 pixels\n"
    assert main(["layers", "b.ora", "c"]) == main(["layers", "c", "d.psd"]) == 0
    same(read(tmp_path / "a.psd")[0], read(tmp_path / "d.psd")[0])
    psd_of(tmp_path, "CMYK").rename("cmyk.psd")
    ora_of(tmp_path / "bomb.ora", one_layer("a.png"), **{"a.png": png_bomb(30_000)})
    Path("cut.ora").write_bytes(Path("b.ora").read_bytes()[:-100])
    Path("cut.psd").write_bytes(Path("a.psd").read_bytes()[:3000])
    Path("link.psd").hardlink_to("a.psd")
    there = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for wrong, message in (
        (("none.psd", "x.ora"), "none.psd does not exist"),
        (("a.psd", "c"), "c is a folder that exists"),
        (("--overwrite", "a.psd", "c"), "c is a folder that exists"),
        (("a.psd", "b.ora"), "b.ora: the file is there already; choose another name, or give --overwrite"),
        (("a.psd", "a.psd"), "a.psd is the source itself; choose another name for the result"),
        (("--overwrite", "a.psd", "link.psd"), "link.psd is the source itself"),
        (("--overwrite", "c", "c"), "c is the source itself"),
        (("a.psd", "x.tga"), ".tga"),
        (("cmyk.psd", "x.ora"), "cmyk.psd cannot be read: it is CMYK with 8 bits a channel; convert it to RGB"),
        (("bomb.ora", "x.psd"), "bomb.ora cannot be read: its layers have 900 million pixels"),
        (("cut.ora", "x"), "cut.ora: not an OpenRaster file, or damaged; make or download it again"),
        (("cut.psd", "x"), "cut.psd: not a Photoshop file, or damaged"),
    ):
        assert main(["layers", *wrong]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == there, "nothing was written"
    Path("b.ora").write_text("mine")
    assert main(["layers", "--overwrite", "a.psd", "b.ora"]) == 0 and len(read(tmp_path / "b.ora")[0].layers) > 0
    psd_of(tmp_path, "RGB", 16)
    assert main(["layers", "b.psd", "sixteen.ora"]) == 0
    assert torch.equal(read(tmp_path / "sixteen.ora")[0].layers[0].image, (read(tmp_path / "b.psd")[0].layers[0].image * 255).round() / 255)


def test_the_command_s_help_and_the_pages_know_every_format(root, capsys):
    """The help is written out, since the table would bring torch into every command."""
    with pytest.raises(SystemExit):
        main(["layers", "--help"])
    pages = [root / "README.md", root / "web" / "docs" / "TesseraSaveLayers.md", root / "web" / "docs" / "TesseraLoadLayers.md"]
    for text in (capsys.readouterr().out, *(page.read_text() for page in pages)):
        for kind in FORMATS.values():
            assert kind.suffix.lstrip(".").upper() in text.upper() if kind.suffix else "PNG" in text
