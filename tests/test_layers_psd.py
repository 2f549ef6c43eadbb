"""Photoshop files of other programs: what of them becomes layers, what is said of the rest, and how little a small one may ask for."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psd_tools
import pytest
import torch
from PIL import Image
from psd_tools.constants import BlendMode, Clipping, Compression, EffectOSType, Tag
from psd_tools.psd import PSD
from psd_tools.psd.descriptor import Bool, Descriptor, Double, Integer, List
from psd_tools.psd.effects_layer import ShadowInfo
from psd_tools.psd.layer_and_mask import ChannelData, ChannelDataList, ChannelInfo, LayerRecord, MaskData, MaskFlags, MaskParameters
from psd_tools.psd.tagged_blocks import DescriptorBlock, DescriptorBlock2
from psd_tools.psd.vector import Path as VectorPath
from test_layers_blend import flat, levels
from test_layers_document import document, same

from tessera.models.errors import FileError
from tessera.models.layers.compose import composite
from tessera.models.layers.document import Document, Group, Layer, Transform
from tessera.models.layers.formats import read, write


def psd_of(tmp_path: Path, mode: str, depth: int = 8) -> Path:
    psd = psd_tools.PSDImage.new(mode, (6, 5), depth=depth)
    channels = {"L": 1, "RGB": 3, "CMYK": 4, "LAB": 3}[mode]
    psd.create_pixel_layer_from_array(np.linspace(0, 1, 4 * 3 * (channels + 1), dtype=np.float32).reshape(4, 3, channels + 1), name="a", left=1)
    psd.save(tmp_path / "b.psd")
    return tmp_path / "b.psd"


def test_sixteen_bits_are_read_as_they_are(tmp_path):
    read_back, _ = read(psd_of(tmp_path, "RGB", 16))
    expected = torch.linspace(0, 1, 48).view(4, 3, 4)
    assert (read_back.layers[0].image - expected).abs().max() < 1 / 65535
    assert read_back.layers[0].x == 1


def test_grey_becomes_rgb(tmp_path):
    picture = read(psd_of(tmp_path, "L"))[0].layers[0].image
    assert picture.shape == (4, 3, 4) and torch.equal(picture[..., 0], picture[..., 2])


@pytest.mark.parametrize(("mode", "depth"), [("CMYK", 8), ("LAB", 8), ("RGB", 32)])
def test_colours_that_are_not_rgb_are_refused(mode, depth, tmp_path):
    with pytest.raises(ValueError, match=rf"b\.psd cannot be read: it is {mode} with {depth} bits a channel; convert it to RGB"):
        read(psd_of(tmp_path, mode, depth))


def test_what_psd_holds_beyond_us_is_reported(tmp_path):
    psd = psd_tools.PSDImage.new("RGBA", (6, 5))
    below = psd.create_pixel_layer(Image.new("RGBA", (4, 4), "red"), name="below")
    above = psd.create_pixel_layer(Image.new("RGBA", (4, 4), "blue"), name="above", opacity=100)
    above.clipping, above.fill_opacity = True, 51
    psd.create_group(name="grouped", blend_mode=BlendMode.NORMAL)
    psd.create_pixel_layer(Image.new("RGBA", (2, 2)), name="masked").create_mask(Image.new("L", (1, 1), 128), top=1, left=1)
    off = psd.create_pixel_layer(Image.new("RGBA", (2, 2)), name="mask off")
    off.create_mask(Image.new("L", (2, 2), 0)).disabled = True
    psd.save(tmp_path / "b.psd")
    found, notes = read(tmp_path / "b.psd")
    assert notes[1] == "above: it is not clipped to the layer below" and len(notes) == 3
    assert notes[0] == "its extra channels (saved selections or spot colours) are not read: 1" and "merged picture" in notes[2]
    assert found.layers[1].opacity == pytest.approx(100 / 255 * 51 / 255)
    assert torch.equal(found.layers[3].mask, torch.tensor([[0.0, 0.0], [0.0, 128 / 255]])), "beyond a mask's box is its background"
    assert found.layers[4].mask is None and below.name == found.layers[0].name


def test_what_groups_hold_beyond_us_is_reported(tmp_path):
    psd = psd_tools.PSDImage.new("RGBA", (6, 5))
    psd.create_pixel_layer(Image.new("RGBA", (4, 4), "red"), name="below")
    group = psd.create_group(name="grouped")
    group._record.clipping = Clipping.NON_BASE
    shadow = Descriptor(classID=b"DrSh", items={b"enab": Bool(True), b"present": Bool(True), b"showInDialog": Bool(True)})
    effects = DescriptorBlock2(version=0, items={b"masterFXSwitch": Bool(True), b"DrSh": shadow}, classID=b"null", data_version=16)
    group._record.tagged_blocks.set_data(Tag.OBJECT_BASED_EFFECTS_LAYER_INFO, effects)
    psd.save(tmp_path / "b.psd")
    assert read(tmp_path / "b.psd")[1][1:3] == ["grouped: it is not clipped to the layer below", "grouped: layer effects are not read"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_flattened_psd_is_one_layer(mode, tmp_path):
    picture = Image.fromarray((levels(5, 6, 4) * 255).byte().numpy()).convert(mode)
    psd_tools.PSDImage.frompil(picture).save(tmp_path / "b.psd")
    found, notes = read(tmp_path / "b.psd")
    (layer,) = found.layers
    assert notes == ["it has no layers; its merged picture is read as one"] and layer.name == "Background"
    expected = torch.from_numpy(np.asarray(picture.convert("RGBA")).copy()).float() / 255
    assert (layer.image[..., 3] - expected[..., 3]).abs().max() < 1e-6
    if mode != "RGBA":
        assert (layer.image - expected).abs().max() < 1e-6
    shutil.copy(tmp_path / "b.psd", tmp_path / "large.psd")
    with open(tmp_path / "large.psd", "r+b") as stream:  # height and width in the header: 900 million pixels
        stream.seek(14)
        stream.write(struct.pack(">II", 30_000, 30_000))
    with pytest.raises(ValueError, match=r"large\.psd .* 900 million pixels"):
        read(tmp_path / "large.psd")


def test_a_layer_larger_than_psd_holds_is_refused_before_writing(tmp_path):
    strip = Document(8, 8, (Group("g", (Layer("w", flat((1, 0, 0, 1), 1, 1), transform=Transform(1, 30_001)),)),))
    with pytest.raises(ValueError, match=r"'w' is 1 x 30001 pixels, and PSD holds 30000 a side; make it smaller, or save as \.ora"):
        write(strip, tmp_path / "a.psd")
    assert not list(tmp_path.iterdir())


def test_empty_layers_and_masks_of_groups_are_reported(tmp_path):
    write(Document(6, 5, (Group("grouped"),)), tmp_path / "b.psd")
    with open(tmp_path / "b.psd", "rb") as stream:
        psd = PSD.read(stream)
    layers = psd.layer_and_mask_information.layer_info
    layers.layer_records[-1].mask_data = MaskData(0, 0, 5, 6)
    channel = ChannelData(data=bytes(30))
    layers.layer_records[-1].channel_info.append(ChannelInfo(-2, 32))
    layers.channel_image_data[-1].append(channel)
    layers.layer_records.append(LayerRecord(name="nothing", channel_info=[ChannelInfo(number, 2) for number in range(-1, 3)]))
    layers.channel_image_data.append(ChannelDataList(ChannelData() for _ in range(4)))
    layers.layer_count -= 1
    with open(tmp_path / "b.psd", "wb") as stream:
        psd.write(stream)
    found, notes = read(tmp_path / "b.psd")
    assert notes == ["grouped: masks of groups are not read", "nothing: a layer of kind pixel without pixels is left out"]
    assert [node.name for node in found.layers] == ["grouped"]


def test_a_psd_channel_that_does_not_unpack_is_no_black_layer(tmp_path):
    write(Document(6, 5, (Layer("a", levels(5, 6, 4)),)), tmp_path / "b.psd")
    with open(tmp_path / "b.psd", "rb") as stream:
        psd = PSD.read(stream)
    layers = psd.layer_and_mask_information.layer_info
    layers.channel_image_data[0][1].data, layers.layer_records[0].channel_info[1].length = bytes(2), 4  # too short for its row lengths
    with open(tmp_path / "b.psd", "wb") as stream:
        psd.write(stream)
    with pytest.raises(ValueError, match=r"^b\.psd cannot be read: the pixels of 'a' are damaged; make or download it again$"):
        read(tmp_path / "b.psd")


# What is in no file that psd-tools makes: a file of ours, changed in its records


def changed(file: Path, change: Callable[[PSD], None], version: int = 1) -> Path:
    """Parsed, changed and written again."""
    with open(file, "rb") as stream:
        psd = PSD.read(stream)
    change(psd)
    if version == 2:
        resized(psd)
    with open(file, "wb") as stream:
        psd.write(stream)
    return file


def resized(psd: PSD) -> None:
    """As PSB: its RLE rows have longer lengths."""
    layers = psd.layer_and_mask_information.layer_info
    for record, channels in zip(layers.layer_records, layers.channel_image_data, strict=True):
        for channel in channels:
            if record.width and record.height:
                channel.set_data(channel.get_data(record.width, record.height, 8, 1), record.width, record.height, 8, 2)
    planes = psd.image_data.get_data(psd.header)
    psd.header.version = 2
    psd.image_data.set_data(planes, psd.header)


def records(psd: PSD) -> Any:
    return psd.layer_and_mask_information.layer_info.layer_records


def add_plane(psd: PSD, layer: int, number: int, plane: torch.Tensor) -> None:
    """A channel of 8 bits to a layer."""
    data = (plane * 255).round().byte().numpy()
    channel = ChannelData(Compression.RLE)
    if data.size:
        channel.set_data(data.tobytes(), data.shape[1], data.shape[0], 8)
    records(psd)[layer].channel_info.append(ChannelInfo(number, len(channel.data) + 2))
    psd.layer_and_mask_information.layer_info.channel_image_data[layer].append(channel)


WHITE = Layer("paper", flat((1, 1, 1, 1), 4, 6))


def test_psb_is_read(tmp_path):
    before = document()
    write(before, tmp_path / "a.psd")
    changed(tmp_path / "a.psd", lambda psd: None, version=2).rename(tmp_path / "a.psb")
    assert (tmp_path / "a.psb").read_bytes()[4:6] == b"\0\2"
    after, notes = read(tmp_path / "a.psb")
    same(before, after, opacity=1e-9)
    assert notes == []


@pytest.mark.parametrize("density", [64, 128, 191])
def test_the_density_of_a_mask_is_read(density, tmp_path):
    """Photoshop's own file: a green layer over white, its mask 0, 127 and 255, at density 64 has red at 64 (from 255 - 64) to 0."""
    mask = torch.tensor([0, 127, 255]).repeat_interleave(2).expand(4, 6) / 255
    write(Document(6, 4, (WHITE, Layer("green", flat((0, 1, 0, 1), 4, 6), mask=mask))), tmp_path / "a.psd")

    def change(psd: PSD) -> None:
        data = records(psd)[1].mask_data
        data.flags.parameters_applied, data.parameters = True, MaskParameters(user_mask_density=density)

    found, notes = read(changed(tmp_path / "a.psd", change))
    red = [density * (255 - m) / 255 for m in (0, 127, 255)]
    assert (composite(found)[0, ::2, 0] * 255 - torch.tensor(red)).abs().max() < 1
    assert len(notes) == 1 and "differ from its own merged picture in 67 % of the pixels" in notes[0], "it was made without"


def vector(kind: str, parameters: MaskParameters | None = None, user: torch.Tensor | None = None) -> Callable[[PSD], None]:
    """The upper layer gets a vector mask, drawn into channel -2 at half its coverage; user: beside a user's mask, in channel -3."""

    def change(psd: PSD) -> None:
        record = records(psd)[1]
        record.tagged_blocks.set_data(Tag.VECTOR_MASK_SETTING1, 3, 0, VectorPath())
        record.flags.pixel_data_irrelevant = kind == "shape"
        flags = MaskFlags(user_mask_from_render=True, parameters_applied=parameters is not None)
        real = {} if user is None else {"real_flags": MaskFlags(), "real_background_color": 255, "real_top": 0, "real_left": 0}
        real |= {} if user is None else {"real_bottom": user.shape[0], "real_right": user.shape[1]}
        record.mask_data = MaskData(0, 0, 4, 6, 0, flags, parameters, **real)
        add_plane(psd, 1, -2, torch.full((4, 6), 0.4))
        if user is not None:
            add_plane(psd, 1, -3, user)

    return change


@pytest.mark.parametrize(
    ("change", "mask", "note"),
    [
        (vector("pixel"), 0.4, None),
        (vector("pixel", MaskParameters(vector_mask_density=51)), 1 - 0.2 * 0.6, None),
        (vector("pixel", MaskParameters(vector_mask_density=51), torch.empty(0, 0)), 1 - 0.2 * 0.6, None),  # the user's mask was removed
        (vector("pixel", None, torch.full((4, 6), 0.6)), 0.4, None),
        (vector("pixel", MaskParameters(51, None, 51), torch.full((4, 6), 0.6)), 0.4, "top: the density of its vector mask is not read"),
        (vector("shape"), None, None),  # its alpha has it
        (vector("shape", None, torch.full((4, 6), 0.6)), 0.6, None),
        (vector("shape", MaskParameters(51), torch.full((4, 6), 0.6)), 1 - 0.2 * 0.4, None),
        (vector("shape", MaskParameters(None, None, 51)), None, "top: the density of its vector mask is not read"),
        (vector("pixel", MaskParameters(None, 2.5)), 0.4, "top: the feather of its mask is not read"),
        (vector("shape", MaskParameters(None, None, None, 1.0)), None, "top: the feather of its mask is not read"),
    ],
)
def test_masks_that_are_drawn_of_vector_masks(change, mask, note, tmp_path):
    """Channel -2 is what Photoshop has drawn of both masks, -3 the user's own; the alpha of a shape has the vector mask in it already."""
    write(Document(6, 4, (WHITE, Layer("top", flat((1, 0, 0, 1), 4, 6)))), tmp_path / "a.psd")
    found, notes = read(changed(tmp_path / "a.psd", change))
    if mask is None:
        assert found.layers[1].mask is None
    else:
        assert (found.layers[1].mask - mask).abs().max() < 1 / 255
    assert [line for line in notes if "merged picture" not in line] == ([note] if note else [])


def test_a_mask_of_sixteen_bits_keeps_them(tmp_path):
    file = psd_of(tmp_path, "RGB", 16)

    def change(psd: PSD) -> None:
        layers = psd.layer_and_mask_information.tagged_blocks.get_data(Tag.LAYER_16) or psd.layer_and_mask_information.layer_info
        layers.layer_records[0].mask_data = MaskData(0, 1, 4, 4)
        channel = ChannelData(Compression.RAW, np.full((4, 3), 12345, ">u2").tobytes())
        layers.layer_records[0].channel_info.append(ChannelInfo(-2, len(channel.data) + 2))
        layers.channel_image_data[0].append(channel)

    found, notes = read(changed(file, change))
    assert (found.layers[0].mask - 12345 / 65535).abs().max() < 1e-6
    assert notes[0] == "its 16 bits a channel become 8 where the layers are saved"


def board(kind: int, *colour: float) -> Callable[[PSD], None]:
    """The group becomes an artboard at 1, 1 of 3 x 2 pixels, as Photoshop writes it."""

    def change(psd: PSD) -> None:
        sides = {b"Top ": Double(1), b"Left": Double(1), b"Btom": Double(3), b"Rght": Double(4)}
        paint = {key: Double(value) for key, value in zip((b"Rd  ", b"Grn ", b"Bl  "), colour, strict=False)}
        items = {b"artboardRect": Descriptor(classID=b"classFloatRect", items=sides), b"artboardBackgroundType": Integer(kind)}
        items[b"Clr "] = Descriptor(classID=b"RGBC", items=paint)
        block = DescriptorBlock(classID=b"artboard", items=items, version=16)
        records(psd)[-1].tagged_blocks.set_data(Tag.ARTBOARD_DATA1, block)

    return change


@pytest.mark.parametrize(("kind", "colour"), [(1, (1, 1, 1, 1)), (2, (0, 0, 0, 1)), (3, None), (4, (18 / 255, 108 / 255, 200 / 255, 1))])
def test_artboards_have_their_colour_and_edges(kind, colour, tmp_path):
    """Kinds as in Photoshop's own files; psd-tools names them otherwise."""
    red, nested = Layer("red", flat((1, 0, 0, 1), 2, 2), 0, 0), Layer("blue", flat((0, 0, 1, 1), 1, 9), 3, 2, mask=torch.full((1, 9), 0.2))
    write(Document(6, 4, (Group("board", (red, Group("in", (nested,)))),)), tmp_path / "a.psd")
    found, _ = read(changed(tmp_path / "a.psd", board(kind, 18, 108, 200)))
    expected = torch.zeros(4, 6, 4)
    if colour is not None:
        expected[1:3, 1:4] = torch.tensor(colour)
    expected[1, 1] = torch.tensor([1.0, 0, 0, 1])
    below = expected[2, 3].clone()
    alpha = 0.2 + 0.8 * below[3]
    expected[2, 3] = torch.cat([(0.2 * torch.tensor([0, 0, 1.0]) + 0.8 * below[3] * below[:3]) / alpha, alpha[None]])
    assert (composite(found) - expected).abs().max() < 1e-5
    layers = found.layers[0].layers
    assert [node.name for node in layers] == (["Artboard"] if colour is not None else []) + ["red", "in"]
    assert torch.equal(layers[-2].image, red.image), "what is cut is masked, and there"


def effects(**there: object) -> Callable[[PSD], None]:
    """lfx2 with a drop shadow, as Photoshop CS writes it: without `present`."""

    def change(psd: PSD) -> None:
        shadow = {b"enab": Bool(True)} | {key.encode(): value for key, value in there.items() if key != "switch"}
        items = {b"masterFXSwitch": Bool(there.get("switch", True)), b"DrSh": Descriptor(classID=b"DrSh", items=shadow)}
        if "listed" in there:
            items = {b"masterFXSwitch": Bool(True), b"dropShadowMulti": List([Descriptor(classID=b"DrSh", items={b"enab": Bool(True)})])}
        block = DescriptorBlock2(version=0, items=items, classID=b"null", data_version=16)
        records(psd)[1].tagged_blocks.set_data(Tag.OBJECT_BASED_EFFECTS_LAYER_INFO, block)

    return change


def block(tag: Tag, *value: object) -> Callable[[PSD], None]:
    return lambda psd: records(psd)[1].tagged_blocks.set_data(tag, *value) and None


def blend_if(ranges: str) -> Callable[[PSD], None]:
    def change(psd: PSD) -> None:
        found = records(psd)[1].blending_ranges
        if ranges == "all":
            found.composite_ranges = [(0x4060, 0xFFFF), (0, 0xFFFF)]
        else:
            found.channel_ranges[2][1] = (0, 0x80FF)

    return change


def oldest(enabled: int) -> Callable[[PSD], None]:
    return block(Tag.EFFECTS_LAYER, {EffectOSType.DROP_SHADOW: ShadowInfo(2, enabled=enabled)})


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (effects(), "layer effects are not read"),
        (effects(listed=True), "layer effects are not read"),
        (effects(present=Bool(True)), "layer effects are not read"),
        (effects(present=Bool(False)), None),
        (effects(enab=Bool(False)), None),
        (effects(switch=False), None),
        (oldest(1), "layer effects are not read"),
        (oldest(0), None),
        (block(Tag.KNOCKOUT_SETTING, 1), "its knockout is not read"),
        (block(Tag.KNOCKOUT_SETTING, 0), None),
        (block(Tag.CHANNEL_BLENDING_RESTRICTIONS_SETTING, [2]), "it is blended into all channels, though some are switched off"),
        (block(Tag.TRANSPARENCY_SHAPES_LAYER, 0), "that its transparency should not shape it is not read"),
        (block(Tag.VECTOR_MASK_SETTING1, 3, 0, VectorPath()), "its vector mask is not read"),
        (block(Tag.VECTOR_MASK_SETTING1, 3, 4, VectorPath()), None),  # switched off
        (blend_if("all"), "blend-if is not read, and hides nothing of it"),
        (blend_if("green"), "blend-if is not read, and hides nothing of it"),
    ],
)
def test_what_is_not_read_is_named(change, note, tmp_path):
    write(Document(6, 4, (WHITE, Layer("top", flat((1, 0, 0, 1), 4, 6)))), tmp_path / "a.psd")
    assert read(changed(tmp_path / "a.psd", change))[1] == ([f"top: {note}"] if note else [])


FILL = ("color-burn", "linear-burn", "color-dodge", "linear-dodge", "vivid-light", "linear-light", "hard-mix", "difference")


@pytest.mark.parametrize("mode", [*FILL, "normal", "multiply", "pin-light"])
def test_fill_opacity_is_an_opacity_but_for_eight_modes_and_groups(mode, tmp_path):
    group = Group("g", (Layer("in", flat((0, 1, 0, 1), 2, 2)),))
    top = Layer("top", flat((1, 0, 0, 1), 4, 6), opacity=102 / 255, blend_mode=mode)
    write(Document(6, 4, (WHITE, top, group)), tmp_path / "a.psd")

    def change(psd: PSD) -> None:
        for number in (1, -1):
            records(psd)[number].tagged_blocks.set_data(Tag.BLEND_FILL_OPACITY, 51)

    found, notes = read(changed(tmp_path / "a.psd", change))
    assert [node.opacity for node in found.layers] == pytest.approx([1, 0.4 * 0.2, 0.2])
    ours = [f"top: its fill opacity acts as opacity, which looks different with {mode}"] if mode in FILL else []
    assert notes[:-1] == [*ours, "g: its fill opacity acts as opacity, which looks different in a group"] and "differ" in notes[-1]


# Small files that ask for much


@pytest.mark.parametrize(("at", "claim", "message"), [(14, (300_000, 300_000), "the canvas is 300000 x 300000; use 1 to 30000 whole pixels a side")])
def test_a_canvas_beyond_the_limit_is_refused_by_its_header(at, claim, message, tmp_path):
    write(Document(6, 4, (Layer("a", levels(4, 6, 4)),)), tmp_path / "a.psd")
    changed(tmp_path / "a.psd", lambda psd: None, version=2)
    with open(tmp_path / "a.psd", "r+b") as stream:
        stream.seek(at)
        stream.write(struct.pack(">II", *claim))
    with pytest.raises(FileError, match=rf"^a\.psd cannot be read: {message}$"):
        read(tmp_path / "a.psd")


@pytest.mark.parametrize(
    ("sides", "count", "message"),
    [
        ((16_000, 16_000), 1, r"^a\.psd cannot be read: the pixels of 'a' are damaged"),
        ((20_000, 20_000), 2, r"^a\.psd cannot be read: its layers have 800 million pixels; 536 million are read at most$"),
        ((2**31 - 1, 2**31 - 1), 1, "million pixels"),
        ((2**31 - 1, -(2**31)), 1, "without pixels is left out"),
    ],
)
def test_a_layer_that_claims_more_than_is_there_costs_nothing(sides, count, message, tmp_path):
    write(Document(6, 4, tuple(Layer("a", levels(4, 6, 4)) for _ in range(count))), tmp_path / "a.psd")

    def change(psd: PSD) -> None:
        for record in records(psd):
            record.right, record.bottom = sides

    changed(tmp_path / "a.psd", change)
    tracemalloc.start()
    try:
        if "left out" in message:
            assert message in " ".join(read(tmp_path / "a.psd")[1])
        else:
            with pytest.raises(FileError, match=message):
                read(tmp_path / "a.psd")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
