"""Files that are damaged, are something else, or ask for more than they hold: one sentence that names the file, from every reader."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("av")
tifffile = pytest.importorskip("tifffile")

import broken_files  # noqa: E402
from broken_files import READERS, broken, outcome  # noqa: E402

from tessera.__main__ import main  # noqa: E402
from tessera.cli import hyperspectral  # noqa: E402
from tessera.cli import upscale as command  # noqa: E402
from tessera.models.errors import FileError  # noqa: E402
from tessera.models.layers import transparent_vae  # noqa: E402
from tessera.models.media.picture_files import read_picture  # noqa: E402
from tessera.models.upscale import catanet, patch_adapter  # noqa: E402
from tessera.models.upscale.essaformer import ESSAformer  # noqa: E402
from tessera.models.upscale.networks import BUILT_IN, read_network  # noqa: E402
from tessera.models.upscale.pictures import Network, upscale  # noqa: E402
from tessera.models.weight_files import check_numbers, read_safetensors, read_sizes  # noqa: E402

COUNT = int(os.environ.get("TESSERA_BROKEN_FILES", 300))


def enlarge(*arguments) -> int:
    return main(["upscale", *map(str, arguments), "--factor", "2"])


@pytest.mark.parametrize("reader", READERS)
def test_random_damage(reader, tmp_path):
    """TESSERA_BROKEN_FILES=5000 for more of them."""
    seeds = READERS[reader].seeds()
    for name, data in seeds.items():
        (tmp_path / name).write_bytes(data)
        if name != "small.pth":
            READERS[reader].load(tmp_path / name)
    told = 0
    for name, data in broken(reader, range(COUNT // len(READERS))):
        (tmp_path / name).write_bytes(data)
        told += outcome(reader, tmp_path / name) is not None
    assert told


@pytest.mark.parametrize("text", ["cut off", "{}: KeyError: 'a'", "{}: 'NoneType' object has no attribute 'shape'", "{}: a\nb", "{}: cut off"])
def test_the_check_itself(text, tmp_path, monkeypatch):
    def load(path):
        raise FileError(text.format(path))

    monkeypatch.setitem(READERS, "made up", broken_files.Reader(dict, load))
    if text == "{}: cut off":
        assert outcome("made up", tmp_path / "a.png") == f"{tmp_path / 'a.png'}: cut off"
    else:
        with pytest.raises(AssertionError):
            outcome("made up", tmp_path / "a.png")


def raw(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(shape: list, start: int, stop: int, dtype: str = "F16") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "a list": ([1, 2, 3], b""),
    "a text": ("abc", b""),
    "null": (None, b""),
    "deep": (b"[" * 100000, b""),
    "no offsets": ({f"blocks.{i}.w": {"dtype": "F16", "shape": [2, 2]} for i in range(2)}, b""),
    "offsets backwards": ({f"blocks.{i}.w": entry([64, 64], 100, 0) for i in range(3)}, b"\0" * 100),
    "offsets that overlap": ({f"blocks.{i}.w": entry([8, 8], 64 * i, 64 * i + 128) for i in range(3)}, b"\0" * 256),
    "a hole": ({f"blocks.{i}.w": entry([8, 8], 200 * i, 200 * i + 128) for i in range(3)}, b"\0" * 528),
    "beyond the end": ({f"blocks.{i}.w": entry([64, 64], 8192 * i, 8192 * i + 8192) for i in range(3)}, b"\0" * 8192),
    "more than it says": ({f"blocks.{i}.w": entry([2], 4 * i, 4 * i + 4) for i in range(3)}, b"\0" * 99),
    "a shape that is text": ({f"blocks.{i}.w": entry("abc", 0, 8192) for i in range(3)}, b"\0" * 8192),  # type: ignore[arg-type]
    "another shape": ({f"blocks.{i}.w": entry([3], 4 * i, 4 * i + 4) for i in range(3)}, b"\0" * 12),
    "an unknown dtype": ({f"blocks.{i}.w": entry([2], 4 * i, 4 * i + 4, "Q99") for i in range(3)}, b"\0" * 12),
    "entries that are numbers": ({"blocks.0.w": 5, "blocks.1.w": 6}, b""),
    "metadata that are no text": ({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("found", [*HEADERS, "empty", "three bytes", "an endless header", "GGUF", "a folder"])
def test_headers_of_safetensors(found, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    if found in HEADERS:
        raw(path, *HEADERS[found])
    elif found == "a folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "three bytes": b"\1\2\3", "GGUF": b"GGUF\3\0\0\0" + bytes(200)}.get(found, b"\0" * 7 + b"\x80{}"))
    for load in (read_safetensors, read_sizes, patch_adapter.load, read_network, hyperspectral._network):
        with pytest.raises((FileError, OSError, ValueError), match=r"model\.safetensors(: not a safetensors file| is a folder|: no such file)"):
            load(path)
    assert main(["offload-plan", "--model", str(path), "--gb", "1", "--gpu", "RTX 3060"]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors" in error and not broken_files.OF_PYTHON.search(error)
    if found in ("beyond the end", "more than it says"):
        assert "another number of bytes than follow: cut off, or written over" in error


def test_sizes_are_those_that_the_library_loads(tmp_path):
    """Every dtype, from the header alone and as torch has them."""
    dtypes = ["bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "float32", "int64", "float64", "complex64", "float8_e4m3fn"]
    state = {f"{index}.{name}": torch.zeros(3, 5, index + 1).to(getattr(torch, name)) for index, name in enumerate(dtypes)}
    save_file(state, tmp_path / "a.safetensors")
    assert read_sizes(tmp_path / "a.safetensors") == {name: (tuple(value.shape), value.nbytes) for name, value in state.items()}


def test_blocks_of_nothing_are_no_blocks(tmp_path, capsys):
    path = raw(tmp_path / "a.safetensors", {f"blocks.{i}.w": entry([0, 64], 0, 0) for i in range(3)})
    assert main(["offload-plan", "--model", str(path), "--gb", "1", "--gpu", "RTX 3060"]) == 1
    assert "a.safetensors has no repeated blocks" in capsys.readouterr().err
    tensors = {f"blocks.{i}.{name}": torch.zeros(shape) for i in range(3) for name, shape in (("w", (0, 64)), ("v", (0, 0)), ("b", (64,)))}
    save_file(tensors | {f"blocks.{i}.w": torch.zeros(0, 0) for i in range(3)}, path)
    assert main(["offload-plan", "--model", str(path), "--gb", "1", "--gpu", "RTX 3060"]) == 0
    assert "3 blocks" in capsys.readouterr().out


# What asks for much


def huge_adapter(path: Path, **changes) -> Path:
    config = patch_adapter.Config(4, 8, 2, 32, 2, 1, 1)
    state = {name: value.clone() for name, value in patch_adapter.PatchAdapter(config).state_dict().items()}
    settings = json.loads(patch_adapter.metadata(config)[patch_adapter.KIND]) | changes
    save_file(state, path, {patch_adapter.KIND: json.dumps(settings)})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 10**8}, "layers is 100000000 in its metadata, and its tensors are of 2"),
        ({"blocks": 10**8}, "blocks is 100000000"),
        ({"dim": 10**9}, r"norm_k.0.weight is \(8,\) and should be \(1000000000,\)"),
        ({"width": 10**30}, "no network has the sizes"),
        ({"native": [10**6, 10**6]}, "native is .* sides of 1024 at most"),
        ({"native": 5}, "describe no patch adapter"),
        ({"heads": 0}, "describe no patch adapter"),
        ({"heads": "two"}, "describe no patch adapter"),
        ({"more": 1}, "describe no patch adapter"),
        ({"heads": 32}, "a head has an even share"),
    ],
)
def test_an_adapter_is_what_its_tensors_are(changes, message, tmp_path):
    patch_adapter.load(huge_adapter(tmp_path / "a.safetensors"))
    with pytest.raises(FileError, match=rf"a\.safetensors: .*{message}"):
        patch_adapter.load(huge_adapter(tmp_path / "a.safetensors", **changes))


def test_half_a_lora_is_refused(tmp_path):
    path = huge_adapter(tmp_path / "a.safetensors")
    state, metadata = read_safetensors(path)
    for lora in ({"up": (8, 2)}, {"up": (8, 2), "down": (3, 8)}, {"up": (8, 2, 1), "down": (2, 8)}):
        extra = {f"lora.q.lora_{part}.weight": torch.zeros(shape) for part, shape in lora.items()}
        save_file({name: value.clone() for name, value in state.items()} | extra, tmp_path / "b.safetensors", metadata)
        with pytest.raises(FileError, match=r"b\.safetensors: lora\.q is no pair of matrices"):
            patch_adapter.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("packed", [True, False])
def test_one_number_is_no_ten_gigabytes(packed, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"params": {"body.weight": torch.zeros(1).expand(50_000, 50_000)}}, path, _use_new_zipfile_serialization=packed)
    assert path.stat().st_size < 3000
    with pytest.raises(FileError, match=r"a\.pth: body\.weight is \(50000, 50000\), which a file of [\d,]+ bytes cannot hold"):
        read_network(path)


def test_tensors_that_share_their_bytes_are_whole(tmp_path):
    """Tied weights, and a small one that is repeated, are in real files."""
    tied = torch.randn(300, 300)
    torch.save({"a.weight": tied, "b.weight": tied, "mask": torch.ones(1, 1).expand(40, 40)}, tmp_path / "a.pth")
    state = {name: value.shape for name, value in load_bytes(read_network(tmp_path / "a.pth").weights).items()}
    assert state == {"a.weight": (300, 300), "b.weight": (300, 300), "mask": (40, 40)}


def load_bytes(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


def test_nothing_of_any_shape(tmp_path):
    """A tensor without elements costs a file nothing, and a network that was built to its other sides would."""
    state = {name: value.clone() for name, value in load_file(BUILT_IN[2]).items()}
    state["first_conv.weight"] = torch.zeros(0, 10**9, 3, 3, dtype=torch.float16)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"first_conv\.weight is \(0, 1000000000, 3, 3\), which a file of"):
        read_network(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"not the weights of CATANet: first_conv\.weight"):  # built without memory
        catanet.build(state)


def test_layers_by_their_names(tmp_path):
    save_file({"body.0.weight": torch.zeros(3, 3), "body.99999999.weight": torch.zeros(3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="has 2 tensors and names one of them layer 99999999"):
        read_network(tmp_path / "a.safetensors")


def test_a_decoder_is_what_its_tensors_are():
    network = transparent_vae.TransparentDecoder(4, 64, 2, 32, tail=True, layer_spacing=4)
    state = transparent_vae.published(network)
    transparent_vae.build(state)
    for name, value, message in [
        ("fc_in.weight", torch.zeros(64 * 10**4, 0), "should be"),
        ("fc_in.weight", torch.zeros(64), "no transparent decoder"),
        ("layer_spacing", torch.tensor([10**12]), "layer_spacing of the transparent decoder is"),
        ("layer_spacing", torch.tensor([1.5]), "layer_spacing of the transparent decoder is"),
        ("layer_spacing", torch.tensor([1, 2]), "layer_spacing of the transparent decoder is"),
        ("encoder.layers.encoder_layer_1.self_attention.in_proj_weight", torch.tensor(1.0), "should be"),
        ("tail.mix.0.weight", torch.zeros(2), r"tail\.mix\.0\.weight is \(2,\) and should be"),
    ]:
        with pytest.raises(ValueError, match=message):
            transparent_vae.build(state | {f"decoder.{name}": value})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<u2', 'fortran_order': False, 'shape': (100000, 100000, 100)}", "mmap length is greater than"),
        ("{'descr': '<u2', 'fortran_order': False, 'shape': (-1, 5, 5)}", "damaged"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1)}", "plain numbers"),
        ("{'descr': '<u2', 'fortran_order': False, 'shape': (" + "-" * 9000 + "1,)}", "nested too deeply|damaged"),
    ],
)
def test_npy_headers(header, message, tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64)
    with pytest.raises(FileError, match=rf"a\.npy: .*({message})"):
        hyperspectral._read(path)


def test_tiffs_that_claim_much(tmp_path):
    cube = np.zeros((3, 64, 64), np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, cube, photometric="minisblack", planarconfig="separate", compression="deflate")
    assert np.array_equal(hyperspectral._read(path)[0], cube)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            file.pages[0].tags[tag].overwrite(60000)
    with pytest.raises(FileError, match=r"a\.tif: claims 20\.1 GB, which [\d,]+ bytes cannot hold"):
        hyperspectral._read(path)
    tifffile.imwrite(path, cube, photometric="minisblack", planarconfig="separate")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FileError, match=r"a\.tif: cut off"):
        hyperspectral._read(path)


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_that_goes_round_in_a_circle(big, tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((4, 16, 16), np.uint16), photometric="minisblack", metadata=None, bigtiff=big, contiguous=False)
    with tifffile.TiffFile(path) as file:
        last, second = file.pages[-1], file.pages[1].offset
        link = last.offset + (8 if big else 2) + len(last.tags) * (20 if big else 12)
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q" if big else "<I", data, link, second)
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"a\.tif: damaged, its pictures follow each other in a circle"):
        hyperspectral._read(path)


def test_pictures_that_claim_much(tmp_path):
    def chunk(tag: bytes, value: bytes) -> bytes:
        return struct.pack(">I", len(value)) + tag + value + struct.pack(">I", zlib.crc32(tag + value))

    def png(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

    path = tmp_path / "a.png"
    for size, message in (((12000, 12000), "claims 12000 x 12000 pixels in 74 bytes"), ((60000, 60000), "more pixels than the 179 million")):
        path.write_bytes(png(*size))
        with pytest.raises(FileError, match=rf"a\.png.*{message}"):
            read_picture(path)
    Image.new("1", (8000, 8000)).save(path)  # nothing drawn on much, which is a picture
    assert read_picture(path).pixels.shape == (1, 8000, 8000) and path.stat().st_size < 20000


# Values


def test_weights_that_are_not_numbers(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    state = {name: value.clone() for name, value in load_file(BUILT_IN[2]).items()}
    state["mid_convs.3.bias"][5] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    torch.save({"params": state}, tmp_path / "nan.pth")
    state["mid_convs.3.bias"][5] = -torch.inf
    save_file(state, tmp_path / "infinite.safetensors")
    for name, found in (("nan.safetensors", "NaN"), ("nan.pth", "NaN"), ("infinite.safetensors", "infinity")):
        assert enlarge(tmp_path / "a.png", tmp_path / "b.png", "--model", tmp_path / name) == 1
        assert f"{name}: mid_convs.3.bias has {found}" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()
    essaformer = {name: value.clone() for name, value in ESSAformer(5, 4, 2).state_dict().items()}
    essaformer["conv_last.bias"][0] = torch.nan
    save_file(essaformer, tmp_path / "cube.safetensors")
    with pytest.raises(FileError, match=r"cube\.safetensors: conv_last\.bias has NaN"):
        hyperspectral._network(tmp_path / "cube.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_looked_for_in_every_dtype(dtype):
    good = torch.linspace(-200, 200, 64).to(dtype)
    check_numbers("w", {"a": good, "b": torch.arange(3)})
    broken = good.clone()
    broken[7] = torch.nan
    with pytest.raises(FileError, match=r"w: a has NaN"):
        check_numbers("w", {"a": broken})


def test_a_network_that_makes_no_numbers():
    with pytest.raises(ValueError, match="the network makes of the picture NaN"):
        upscale(torch.rand(3, 8, 8), Network(lambda x: x.repeat(1, 1, 2, 2).log() * torch.nan, 2), (16, 16))
    with pytest.raises(ValueError, match="the network makes of the picture infinity"):
        upscale(torch.rand(3, 8, 8), Network(lambda x: x.repeat(1, 1, 2, 2) / 0, 2), (12, 12))
    with pytest.raises(ValueError, match="the picture has infinity"):
        upscale(torch.full((3, 8, 8), torch.inf), Network(lambda x: x.repeat(1, 1, 2, 2), 2), (16, 16))
    with pytest.raises(ValueError, match="the picture has NaN"):
        upscale(torch.full((3, 8, 8), torch.nan), Network(lambda x: x.repeat(1, 1, 2, 2), 2), (16, 16))


@pytest.mark.parametrize("wrapped", [("net",), ("model", "params_ema"), ("state_dict",), ("model_state_dict",), ()])
def test_weights_in_wrappers(wrapped, tmp_path):
    state = {"a": torch.rand(3)}
    for key in wrapped:
        state = {"epoch": 3, key: state}
    torch.save(state, tmp_path / "a.pth")
    assert load_bytes(read_network(tmp_path / "a.pth").weights).keys() == {"a"}


def test_a_network_that_does_not_fit_is_refused_before_the_pictures(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    state = {name: value.clone() for name, value in load_file(BUILT_IN[2]).items()}
    save_file(state | {"mid_convs.3.bias": torch.zeros(7)}, tmp_path / "a.safetensors")
    assert enlarge(tmp_path / "in", tmp_path / "out", "--model", tmp_path / "a.safetensors") == 1
    error = capsys.readouterr().err
    assert "a.safetensors: these are not the weights of CATANet: mid_convs.3.bias is (7,) and should be (40,)" in error and error.count("\n") == 1


# Pictures


def tiff(path: Path, codes: np.ndarray, **options) -> Path:
    tifffile.imwrite(path, codes, **options)
    return path


def codes16(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (40, 60, channels), dtype=np.uint16)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (codes16(3), {"photometric": "rgb", "tile": (32, 32)}, "16 bits in tiles"),
        (codes16(4), {"photometric": "separated"}, "16 bits of CMYK colours in 4 channels"),
        (codes16(3), {"photometric": "cielab"}, "no picture|16 bits of Lab colours"),
        (codes16(1)[..., 0].astype(np.int16), {}, "signed numbers"),
        (codes16(1)[..., 0].astype(np.int8), {}, "signed numbers"),
    ],
)
def test_tiffs_that_would_come_out_wrong(codes, options, message, tmp_path):
    with pytest.raises(FileError, match=rf"a\.tif .*{message}"):
        read_picture(tiff(tmp_path / "a.tif", codes, **options))


def test_tiffs_of_other_kinds_are_right(tmp_path):
    """Premultiplied alpha against the quotient; inverted grey and separate channels against the numbers themselves."""
    codes = codes16(4)
    codes[..., :3] = (codes[..., :3].astype(np.float64) * codes[..., 3:] / 65535).round()
    straight = np.concatenate([codes[..., :3] * 65535.0 / np.maximum(codes[..., 3:], 1), codes[..., 3:]], -1).clip(0, 65535) / 65535
    found = read_picture(tiff(tmp_path / "a.tif", codes, photometric="rgb", extrasamples=["assocalpha"]))
    np.testing.assert_allclose(found.pixels.movedim(0, -1).numpy(), straight, atol=1 / 65535)

    grey = np.stack([np.full((9, 8), 60), np.full((9, 8), 120)], -1).astype(np.uint8)
    found = read_picture(tiff(tmp_path / "b.tif", grey, photometric="minisblack", planarconfig="contig", extrasamples=["assocalpha"]))
    np.testing.assert_allclose(found.pixels[:, 0, 0].numpy(), [0.5, 0.5, 0.5, 120 / 255], atol=1 / 255)

    found = read_picture(tiff(tmp_path / "c.tif", codes[..., 0], photometric="miniswhite"))
    np.testing.assert_allclose(found.pixels[0].numpy(), 1 - codes[..., 0] / 65535, atol=1e-6)
    planes = np.ascontiguousarray(np.moveaxis(codes[..., :3], -1, 0))
    found = read_picture(tiff(tmp_path / "d.tif", planes, photometric="rgb", planarconfig="separate"))
    np.testing.assert_allclose(found.pixels.numpy(), planes / 65535, atol=1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_damaged_in_the_middle(name, tmp_path):
    """FFmpeg, which decodes them, fills in what it cannot read and says nothing."""
    codes = (np.arange(200 * 300).reshape(200, 300) % 65536).astype(np.uint16)
    path = tmp_path / name
    if name == "a.tif":
        tiff(path, np.stack([codes] * 3, -1), photometric="rgb", compression="deflate")
    else:
        Image.fromarray(codes).save(path)
    read_picture(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(range(40))
    path.write_bytes(data)
    with pytest.raises(FileError, match=rf"{name}: not a whole picture"):
        read_picture(path)


def jpeg_with_text_as_resolution(path: Path) -> Path:
    """Its EXIF has XResolution (282), a fraction, as text, and the camera's name (271)."""
    entries = struct.pack("<HHI4s", 271, 2, 4, b"Cam\0") + struct.pack("<HHI4s", 282, 2, 3, b"72\0\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    Image.new("RGB", (32, 24), (200, 100, 50)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_of_a_wrong_type(tmp_path, suffix, capsys):
    source = jpeg_with_text_as_resolution(tmp_path / "a.jpg")
    assert enlarge(source, tmp_path / f"b{suffix}", "--model", "bicubic") == 0
    assert "EXIF entries of a wrong type were left out: XResolution" in capsys.readouterr().out
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert image.size == (64, 48) and image.getexif()[271] == "Cam" and image.getexif().get(282) != "72"


def test_one_file_does_not_end_the_folder(tmp_path, capsys, monkeypatch):
    """A damaged one, one that is refused, and one that Tessera itself stumbles over."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "odd.png", "z.png"):
        Image.new("RGB", (8, 8)).save(source / name)
    (source / "broken.avif").write_bytes(b"\0\0\0\x20ftypavif" + bytes(300))
    tiff(source / "tiles.tif", codes16(3), photometric="rgb", tile=(32, 32))

    def stumbling(path, read=read_picture):
        return {}["missing"] if path.name == "odd.png" else read(path)

    monkeypatch.setattr(command, "read_picture", stumbling)
    assert enlarge(source, target, "--model", "bicubic") == 1
    error = capsys.readouterr().err
    assert "3 of 5 pictures could not be done: broken.avif, odd.png, tiles.tif" in error
    assert f"{source / 'odd.png'}: an error in Tessera itself. Please report it" in error
    assert "Traceback" not in error and "KeyError" not in error and error.count("\n") == 4
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "z.png"]
