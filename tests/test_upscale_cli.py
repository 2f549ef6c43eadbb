"""python -m tessera upscale: what it makes of files, read back by other means, and what it refuses before it starts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin
from safetensors.torch import load_file

av = pytest.importorskip("av")

from tessera.__main__ import main  # noqa: E402
from tessera.models.media.picture_files import Picture, read_picture, write_picture  # noqa: E402
from tessera.models.upscale import catanet  # noqa: E402
from tessera.models.upscale.networks import BUILT_IN, read_network  # noqa: E402
from tessera.models.upscale.pictures import Network, upscale  # noqa: E402

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def run(*arguments) -> int:
    return main(["upscale", *map(str, arguments)])


def ramp(height=40, width=60, channels=3, top=255, kind=np.uint8):
    y, x = np.mgrid[:height, :width]
    planes = [x / (width - 1), y / (height - 1), (x + y) / (height + width - 2), np.full(x.shape, 0.6)]
    return (np.stack(planes[:channels], -1) * top).round().astype(kind)


def write16(file: Path, codes: np.ndarray) -> None:
    """A 16-bit file as FFmpeg writes it."""
    height, width, channels = codes.shape
    order = "be" if file.suffix == ".png" else "le"
    name = {1: "gray16", 3: "rgb48", 4: "rgba64"}[channels] + order
    frame = av.VideoFrame.from_ndarray(codes if channels > 1 else codes[..., 0], format=name)
    with av.open(str(file), "w", format="image2") as container:
        stream = container.add_stream("png" if file.suffix == ".png" else "tiff", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, name
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read16(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        frame = next(container.decode(video=0))
    assert "16" in frame.format.name or "48" in frame.format.name or "64" in frame.format.name
    out = frame.to_ndarray(format={1: "gray16le", 3: "rgb48le", 4: "rgba64le"}[len(frame.format.components)])
    return out.reshape(*out.shape[:2], -1)


# Files


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_picture_of_each_type(tmp_path, suffix, capsys):
    """Bicubic against Pillow's, a library of its own (both a = -0.5, edges aside)."""
    source, target = tmp_path / "a.png", tmp_path / f"b{suffix}"
    Image.fromarray(ramp()).save(source)
    assert run(source, target, "--factor", "0.5", "--model", "bicubic") == 0
    with Image.open(target) as image:
        assert (image.format, image.mode, image.size) == ({".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()), "RGB", (30, 20))
        reference = Image.fromarray(ramp()).resize((30, 20), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(image, int) - np.asarray(reference, int))
    assert difference.max() <= (1 if suffix in (".png", ".tif") else 12) and difference.mean() < 2
    assert f"{target}: 30 x 20, bicubic" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_arrive_and_leave(tmp_path, suffix, channels):
    """At factor 1 every code is kept; FFmpeg writes the source and reads the result."""
    codes = ramp(channels=channels, top=65535, kind=np.uint16)
    source = tmp_path / f"a{suffix}"
    write16(source, codes)
    for target in (tmp_path / "b.png", tmp_path / "b.tif"):
        assert run(source, target, "--factor", "1", "--model", "bicubic") == 0
        assert np.array_equal(read16(target), codes)


def test_sixteen_bit_grey_with_alpha(tmp_path):
    pixels = torch.from_numpy(ramp(channels=4, top=65535, kind=np.int32)).movedim(-1, 0) / 65535
    pixels[:3] = pixels[0]
    for name in ("a.png", "a.tif"):
        write_picture(tmp_path / name, Picture(pixels.float(), bits=16, grey=True))
        again = read_picture(tmp_path / name)
        assert again.grey == (name == "a.png") and again.bits == 16
        torch.testing.assert_close(again.pixels, pixels.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture(tmp_path, mode):
    colours = Image.fromarray(ramp(channels=4), "RGBA")
    image = Image.fromarray(ramp(channels=1, top=65535, kind=np.uint16)[..., 0]) if mode == "I;16" else colours.convert(mode)
    source, target = tmp_path / "a.tif", tmp_path / "b.png"
    image.save(source)
    assert run(source, target, "--factor", "1", "--model", "bicubic") == 0
    with Image.open(target) as result:
        expected = {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)
        assert result.mode in (expected, "I") and result.size == image.size
        wanted = image if expected == mode else image.convert(expected)
        assert np.array_equal(np.asarray(result).astype(int), np.asarray(wanted).astype(int))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_orientation(tmp_path, turn, suffix):
    """As Pillow turns it, and the tag is gone: a viewer must not turn it again."""
    exif = Image.Exif()
    exif[274], exif[271] = turn, "Camera"
    source, target = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    Image.fromarray(ramp()).save(source, exif=exif)
    assert run(source, target, "--factor", "1", "--model", "bicubic") == 0
    with Image.open(source) as before, Image.open(target) as after:
        upright = ImageOps.exif_transpose(before)
        assert after.size == upright.size and 274 not in after.getexif() and after.getexif()[271] == "Camera"
        assert np.abs(np.asarray(after, int) - np.asarray(upright, int)).max() <= 6 * (suffix == ".jpg")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("bits", [8, 16])
def test_profile_exif_and_text_are_kept(tmp_path, suffix, bits):
    exif = Image.Exif()
    exif[271] = "Camera"
    exif.get_ifd(0x8769).update({0xA002: 60, 0xA003: 40, 0x829A: TiffImagePlugin.IFDRational(1, 50)})
    picture = Picture(torch.rand(3, 40, 60), bits, profile=SRGB, exif=exif, text={"workflow": '{"nodes": "é"}'})
    write_picture(tmp_path / "a.png", picture)
    assert run(tmp_path / "a.png", tmp_path / f"b{suffix}", "--factor", "2", "--model", "bicubic") == 0
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert image.info["icc_profile"] == SRGB
        found = image.getexif()
        assert found[271] == "Camera" and (found.get_ifd(0x8769)[0xA002], found.get_ifd(0x8769)[0xA003]) == (120, 80)
        assert float(found.get_ifd(0x8769)[0x829A]) == 0.02
        if suffix == ".png":
            image.load()
            assert image.text == {"workflow": '{"nodes": "é"}'}


def test_what_a_file_type_cannot_hold_is_said(tmp_path, capsys):
    write16(tmp_path / "a.png", ramp(top=65535, kind=np.uint16))
    assert run(tmp_path / "a.png", tmp_path / "b.jpg", "--factor", "1", "--model", "bicubic") == 0
    assert "16 bits became 8" in capsys.readouterr().out
    frames = [Image.fromarray(ramp()), Image.fromarray(255 - ramp())]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    assert run(tmp_path / "c.gif", tmp_path / "c.png", "--factor", "1", "--model", "bicubic") == 0
    assert "only the first of 2 pictures" in capsys.readouterr().out


def test_alpha(tmp_path, capsys):
    clear = ramp(channels=4)
    Image.fromarray(clear).save(tmp_path / "a.png")
    for suffix in (".png", ".webp", ".tif"):
        assert run(tmp_path / "a.png", tmp_path / f"b{suffix}", "--factor", "2", "--model", "bicubic") == 0
        assert Image.open(tmp_path / f"b{suffix}").mode == "RGBA"
    assert run(tmp_path / "a.png", tmp_path / "b.jpg", "--factor", "2") == 1
    assert "JPEG has no transparency" in capsys.readouterr().err and not (tmp_path / "b.jpg").exists()
    clear[..., 3] = 255
    Image.fromarray(clear).save(tmp_path / "opaque.png")
    assert run(tmp_path / "opaque.png", tmp_path / "b.jpg", "--factor", "2", "--model", "bicubic") == 0


# Networks


@pytest.mark.parametrize(("factor", "scale", "size"), [("2", 2, (64, 60)), ("2.5", 4, (80, 75))])
def test_the_built_in_network_is_chosen_by_the_factor(tmp_path, factor, scale, size, capsys):
    """The same as the network in one piece, computed here."""
    codes = ramp(30, 32)
    Image.fromarray(codes).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", tmp_path / "b.png", "--factor", factor) == 0
    output = capsys.readouterr()
    assert f"1 x {scale}x network" in output.out and "patch 1 of 1, 100%, 0:00 left" in output.err
    network = catanet.build(load_file(BUILT_IN[scale]))
    with torch.no_grad():
        wanted = upscale(torch.from_numpy(codes).movedim(-1, 0) / 255, Network(network, scale), size)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), (wanted * 255).round().byte().movedim(0, -1).numpy())


def test_official_layouts_of_weight_files(tmp_path):
    """The published .pth files hold their weights under `params`; nothing else is unpickled."""
    state = load_file(BUILT_IN[2])
    torch.save({"params": {f"module.{key}": value.float() for key, value in state.items()}}, tmp_path / "official.pth")
    x = torch.rand(3, 30, 30)
    with torch.no_grad():
        outs = [read_network(file)(torch.device("cpu"))(x) for file in (BUILT_IN[2], tmp_path / "official.pth")]
    assert outs[0].shape == (3, 60, 60) and torch.equal(*outs)


class Trap:
    """Pickled, it would make a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_weight_files_that_are_not(tmp_path, capsys):
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    torch.save({"params": Trap(tmp_path / "sprung")}, tmp_path / "evil.pth")
    (tmp_path / "text.safetensors").write_text("no weights, but longer than eight bytes")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    for name, message in [
        ("evil.pth", "evil.pth: asks for io.open, which is code and is not run"),
        ("text.safetensors", "text.safetensors: not a safetensors file"),
        ("empty.pth", "holds no weights"),
        ("none.pth", "none.pth does not exist"),
        ("a.png", "a weight file ends in"),
        ("other.pth", "spandrel"),
    ]:
        assert run(tmp_path / "a.png", tmp_path / "b.png", "--factor", "2", "--model", tmp_path / name) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "b.png").exists()


def test_another_architecture_through_spandrel(tmp_path):
    """SPAN with random weights, against spandrel's own call."""
    spandrel = pytest.importorskip("spandrel", reason="needs spandrel: pip install spandrel")
    from spandrel.architectures.SPAN import SPAN

    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=2, norm=False).eval()
    torch.save(network.state_dict(), tmp_path / "span.pth")
    x = torch.rand(3, 20, 24)
    with torch.no_grad():
        out = read_network(tmp_path / "span.pth")(torch.device("cpu"))(x)
        wanted = spandrel.ModelLoader("cpu").load_from_file(str(tmp_path / "span.pth")).eval()(x[None])[0]
    torch.testing.assert_close(out, wanted)


def test_workers_make_the_same_file(tmp_path, package_path):
    """Two processes of a command line of its own against this one, CATANet: the bytes are equal."""
    Image.fromarray(ramp(70, 64)).save(tmp_path / "a.png")
    arguments = ["--factor", "2", "--tile", "64", "--overlap", "16", "--threads", "1", "--workers"]
    threads = torch.get_num_threads()
    try:
        assert run(tmp_path / "a.png", tmp_path / "1.png", *arguments, "1") == 0
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, "-m", "tessera", "upscale", str(tmp_path / "a.png"), str(tmp_path / "2.png"), *arguments, "2"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(package_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 x 2x network, 2 workers" in done.stdout and "patch 2 of 2, 100%" in done.stderr
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


# Sizes, folders, videos


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (["--factor", "1.5"], (90, 60)),
        (["--megapixels", "0.015"], (150, 100)),
        (["--size", "hd"], (1080, 720)),
        (["--size", "Full HD"], (1620, 1080)),
    ],
)
def test_sizes(tmp_path, arguments, size):
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", tmp_path / "b.png", "--model", "bicubic", *arguments) == 0
    assert Image.open(tmp_path / "b.png").size == size


def test_a_folder(tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.bmp")):
        Image.fromarray(np.roll(ramp(), number, 0)).save(source / name)
    (source / "broken.png").write_bytes((source / "a.png").read_bytes()[:60])
    (source / "notes.txt").write_text("not a picture")
    assert run(source, target, "--factor", "2", "--model", "bicubic") == 1
    assert "1 of 4 pictures could not be done: broken.png" in capsys.readouterr().err
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.jpg", "c.bmp.png"]
    (source / "broken.png").unlink()
    (target / "b.jpg").write_text("mine")
    assert run(source, target, "--factor", "2", "--model", "bicubic") == 0
    assert "3 of 3 results" in capsys.readouterr().out and (target / "b.jpg").read_text() == "mine"
    assert run(source, target, "--factor", "2", "--model", "bicubic", "--overwrite") == 0
    assert Image.open(target / "b.jpg").size == (120, 80)


def test_a_video_with_its_sound(tmp_path, capsys):
    source, target = tmp_path / "a.mp4", tmp_path / "b.mkv"
    with av.open(str(source), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream("aac", rate=48000)
        for number in range(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.roll(ramp(32, 48), 3 * number, 1), format="rgb24")))
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 48000
        container.mux(sound.encode(tone))
        for stream in (video, sound):
            container.mux(stream.encode(None))
    assert run(source, target, "--factor", "2", "--model", "bicubic") == 0
    with av.open(str(target)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.audio and len(frames) == 5 and frames[0].shape == (64, 96, 3)
    output = capsys.readouterr()
    assert "5 frames" in output.out and "frame 5 of 5, 100%" in output.err


# Refusals


def test_bad_input(tmp_path, capsys):
    picture, video = tmp_path / "a.png", tmp_path / "a.mp4"
    Image.fromarray(ramp()).save(picture)
    video.write_bytes(b"not a video at all")
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.bmp", "a.bmp.png"):
        Image.fromarray(ramp()).save(tmp_path / "two" / name)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "out.png"
    for arguments, message in [
        ((tmp_path / "no.png", out, "--factor", "2"), "no such file"),
        ((picture, tmp_path / "no" / "b.png", "--factor", "2"), "the folder to write into does not exist"),
        ((picture, tmp_path / "b.gif", "--factor", "2"), "pictures are written as .png"),
        ((video, out, "--factor", "2"), "is a video and"),
        ((video, tmp_path / "b.mp4", "--factor", "2"), "is no video"),
        ((picture, picture, "--factor", "2", "--overwrite"), "is the source itself"),
        ((picture, tmp_path, "--factor", "2"), "is the source itself"),
        ((picture, tmp_path / "there.png", "--factor", "2"), "give --overwrite"),
        ((tmp_path / "text.png", out, "--factor", "2"), "is no picture"),
        ((tmp_path / "float.tif", out, "--factor", "2"), "32 bits a channel"),
        ((tmp_path / "empty", tmp_path / "o", "--factor", "2"), "holds no pictures"),
        ((tmp_path / "two", tmp_path / "o", "--factor", "2"), "two/a.bmp.png would both be written as"),
        ((tmp_path, picture, "--factor", "2"), "OUT must be one too"),
        ((tmp_path, tmp_path, "--factor", "2"), "the folder of the sources itself"),
        ((picture, out, "--factor", "0"), "factor is 0"),
        ((picture, out, "--factor", "nan"), "factor is nan"),
        ((picture, out, "--megapixels", "-1"), "megapixels is -1"),
        ((picture, out, "--megapixels", "1e9"), "megapixels is 1e+09; use a number above 0, up to 10000"),
        ((picture, out, "--factor", "2", "--chunk", "0"), "--chunk is for diffusion models"),
        ((picture, out, "--factor", "2", "--chunk-overlap", "4"), "--chunk-overlap is for diffusion models"),
        ((picture, out, "--size", "16K"), "--size is '16K'"),
        ((picture, out, "--factor", "2", "--tile", "8"), "--tile is 8; use at least 64"),
        ((picture, out, "--factor", "2", "--overlap", "200"), "--overlap is 200 and --tile 256; use 0 to 128"),
        ((picture, out, "--factor", "2", "--workers", "0"), "--workers is 0"),
        ((picture, tmp_path / "b.webp", "--megapixels", "1000"), "WEBP holds 16383 a side"),
    ]:
        assert run(*arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before and not (tmp_path / "o").exists()


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("mine")

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(tmp_path / "a.png", tmp_path / "b.png", "--factor", "2", "--model", "bicubic", "--overwrite") == 1
    assert (tmp_path / "b.png").read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_png_text_types_survive():
    """Both PNG text chunks, through memory: Latin-1 in tEXt, the rest in iTXt."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "steps: 20")
    info.add_itxt("note", "日本", "ja")
    data = io.BytesIO()
    Image.fromarray(ramp()).save(data, "PNG", pnginfo=info)
    with Image.open(data) as image:
        image.load()
        assert image.text == {"parameters": "steps: 20", "note": "日本"}
