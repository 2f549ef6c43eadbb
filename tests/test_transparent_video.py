"""Transparent video: what is written is read by FFmpeg's own program, Pillow and Chromium; what others wrote is read here."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import wave
import weakref
import zlib
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

av = pytest.importorskip("av")

from test_browser import chromium  # noqa: E402, F401  (a fixture)
from test_upscale_video import to_rgb  # noqa: E402

from tessera.models.errors import FileError  # noqa: E402
from tessera.models.layers import video_reader, video_writer  # noqa: E402
from tessera.models.layers.video import ClipLayer, LayeredClip  # noqa: E402
from tessera.models.layers.video_reader import load  # noqa: E402
from tessera.models.layers.video_writer import ALPHA, pull_push, save  # noqa: E402
from tessera.models.layers.video_writer import CLIP_FORMATS as FORMATS  # noqa: E402
from tessera.models.media.containers import BrokenVideoError  # noqa: E402
from tessera.models.media.sound import Sound  # noqa: E402
from tessera.models.upscale.video import upscale_video  # noqa: E402

WIDTH, HEIGHT, COUNT = 96, 64, 5
RATE = Fraction(24)
CASES = [(format, bits) for format, kind in FORMATS.items() for bits in kind.pixels]
STORED = [(*case, alpha) for case in CASES for alpha in ALPHA if alpha == "straight" or FORMATS[case[0]].premultiplied]
LOSSY = {"ProRes 4444", "VP9 WebM"}

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg") or not shutil.which("ffprobe"), reason="needs FFmpeg's programs: apt-get install ffmpeg")
every_case = pytest.mark.parametrize(("format", "bits", "alpha"), STORED)
every_format = pytest.mark.parametrize("format", FORMATS)


def clip(width=WIDTH, height=HEIGHT, count=COUNT):
    """A disc with a soft edge that moves and is half transparent on its left, over colours that no pixel below it shows."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    frames = []
    for number in range(count):
        alpha = (height * 0.35 - torch.hypot(x - width * 0.35 - number * 4, y - height / 2)).clamp(0, 1) * (0.3 + x / width).clamp(0, 1)
        colour = torch.stack([x / width, y / height, 0.5 + 0.3 * (x / 9 + number).sin()], -1)
        frames.append(torch.cat([torch.where(alpha[..., None] > 0, colour, 0.0), alpha[..., None]], -1))
    return frames


def written(folder, format, frames=None, rate=RATE, **more):
    target = folder / f"clip{FORMATS[format].suffix}"
    save(target, clip() if frames is None else frames, rate, format, **more)
    return target


def ffprobe(path, *more):
    return json.loads(
        subprocess.run(
            ["ffprobe", "-v", "error", "-show_streams", "-show_format", "-of", "json", *more, path], capture_output=True, check=True
        ).stdout
    )


def raw(path, pixel_format, size, *before):
    """The planes or packed numbers of every frame, by FFmpeg's program."""
    command = ["ffmpeg", "-v", "error", *before, "-i", path, "-map", "0:v", "-f", "rawvideo", "-pix_fmt", pixel_format, "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    numbers = np.frombuffer(data, np.uint8 if pixel_format in ("yuva420p", "bgra", "rgba") else "<u2").astype(np.float64)
    return numbers.reshape(-1, size)


def independent(path, format, bits, width=WIDTH, height=HEIGHT):
    """(frames, height, width, 4) in 0..1 as stored, by a program that is not PyAV and formulas that are not ours."""
    if format == "animated WebP":
        frames = []
        with Image.open(path) as image:
            for number in range(image.n_frames):
                image.seek(number)
                frames.append(np.asarray(image.convert("RGBA")) / 255)
        return np.stack(frames)
    if format == "PNG sequence" and bits == 8:
        return np.stack([np.asarray(Image.open(file)) / 255 for file in sorted(path.glob("*.png"))])
    pixels = width * height
    if format == "ProRes 4444":
        planes = raw(path, "yuva444p12le", pixels * 4).reshape(-1, 4, height, width)
        return np.stack([*to_rgb([planes[:, index] for index in range(3)], 1, False, 12), planes[:, 3] / 4095], -1)
    if format == "VP9 WebM":
        data = raw(path, "yuva420p", pixels * 5 // 2, "-c:v", "libvpx-vp9")
        luma, alpha = (part.reshape(-1, height, width) for part in (data[:, :pixels], data[:, -pixels:]))
        chroma = data[:, pixels : pixels * 3 // 2].reshape(-1, 2, height // 2, width // 2).repeat(2, 2).repeat(2, 3)
        return np.stack([*to_rgb([luma, chroma[:, 0], chroma[:, 1]], 1, False), alpha / 255], -1)
    if format == "FFV1" and bits == 16:
        return raw(path, "gbrap16le", pixels * 4).reshape(-1, 4, height, width)[:, [2, 0, 1, 3]].transpose(0, 2, 3, 1) / 65535
    if format == "PNG sequence":
        path = path / "%05d.png"
    depth = "rgba" if bits == 8 else "rgba64le"
    return raw(path, depth, pixels * 4).reshape(-1, height, width, 4) / (2**bits - 1)


def psnr(error):
    return -10 * np.log10(np.mean(np.square(error)) + 1e-12)


@needs_ffmpeg
@every_case
def test_an_independent_reader_sees_alpha_and_colour(tmp_path, format, bits, alpha):
    """Colours are compared where they show: as they are added to what lies below."""
    frames = torch.stack(clip()).double().numpy()
    found = independent(written(tmp_path, format, alpha=alpha, bits=bits), format, bits)
    assert found.shape == frames.shape
    errors = np.abs(found[..., 3] - frames[..., 3])
    if format == "VP9 WebM":
        assert psnr(errors) > 45
    else:
        assert errors.max() <= (0.7 if format == "ProRes 4444" else 0.51) / (2**bits - 1)
    shown = found[..., :3] if alpha == "premultiplied" else found[..., :3] * found[..., 3:]
    errors = np.abs(shown.clip(0, 1) - frames[..., :3] * frames[..., 3:])
    if format in LOSSY:
        assert psnr(errors) > (60 if format == "ProRes 4444" else 43 if alpha == "straight" else 37)
    else:
        assert errors.max() <= 1.01 / (2**bits - 1)
    if alpha == "straight" and format not in LOSSY:
        visible = frames[..., 3] > 0
        assert np.abs(found - frames)[visible].max() <= 0.51 / (2**bits - 1)


@needs_ffmpeg
@every_case
def test_load_reads_what_the_independent_reader_reads(tmp_path, format, bits, alpha):
    """And premultiplied colours come back straight, by the file's own tag."""
    path = written(tmp_path, format, alpha=alpha, bits=bits)
    opened = load(path)
    found = torch.stack(list(opened)).double().numpy()
    expected = independent(path, format, bits)
    kind = (opened.width, opened.height, opened.rate, opened.transparent, opened.premultiplied, opened.notes)
    assert kind == (WIDTH, HEIGHT, RATE, True, alpha == "premultiplied", ())
    assert opened.frames in (COUNT, None) and opened.bits == (12 if format == "ProRes 4444" else bits)
    assert np.abs(found[..., 3] - expected[..., 3]).max() < 1e-6
    shown = expected[..., :3] if alpha == "premultiplied" else expected[..., :3] * expected[..., 3:]
    difference = np.abs(found[..., :3] * found[..., 3:] - np.minimum(shown.clip(0, 1), expected[..., 3:]))
    assert (psnr(difference) > 40) if format == "VP9 WebM" else difference.max() < 1e-5
    assert torch.equal(torch.stack(list(opened)), torch.from_numpy(found).float()), "it can be read again"


def test_a_choice_overrules_the_tag(tmp_path):
    """Half of white, premultiplied, is grey: taken for straight it stays that."""
    path = written(tmp_path, "FFV1", [torch.tensor([1.0, 1.0, 1.0, 0.5]).expand(8, 8, 4)], alpha="premultiplied")
    assert float(next(iter(load(path)))[0, 0, 0]) == pytest.approx(1, abs=0.01)
    assert float(next(iter(load(path, "straight")))[0, 0, 0]) == pytest.approx(0.5, abs=0.01)
    path = written(tmp_path, "APNG", [torch.tensor([0.5, 0.5, 0.5, 0.5]).expand(8, 8, 4)])
    assert float(next(iter(load(path, "premultiplied")))[0, 0, 0]) == pytest.approx(1, abs=0.01)


OTHERS = {
    "prores.mov": ["-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", "10", "-b:v", "0", "-auto-alt-ref", "0"],
    "vp8.webm": ["-c:v", "libvpx", "-pix_fmt", "yuva420p", "-crf", "4", "-b:v", "4M", "-auto-alt-ref", "0"],
    "ffv1.mkv": ["-c:v", "ffv1", "-pix_fmt", "yuva444p"],
    "deep.mkv": ["-c:v", "ffv1", "-pix_fmt", "yuva422p10le"],
    "animation.mov": ["-c:v", "qtrle", "-pix_fmt", "argb"],
    "png.mov": ["-c:v", "png", "-pix_fmt", "rgba64be"],
    "animated.png": ["-f", "apng", "-pix_fmt", "rgba"],
    "grey.png": ["-f", "apng", "-pix_fmt", "ya8"],
}


@needs_ffmpeg
@pytest.mark.parametrize("name", OTHERS)
def test_files_of_ffmpeg(tmp_path, name):
    """Alpha of every codec that FFmpeg's program writes it with, at its own rate."""
    frames = torch.stack(clip())
    data = (frames * 255).round().byte().numpy().tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", f"{WIDTH}x{HEIGHT}", "-r", "30000/1001", "-i", "-"]
    path = tmp_path / name
    subprocess.run(["ffmpeg", "-v", "error", *source, *OTHERS[name], path], input=data, check=True)
    opened = load(path)
    found = torch.stack(list(opened))
    assert opened.transparent and len(found) == COUNT and float(opened.rate) == pytest.approx(30000 / 1001, abs=0.01)
    assert psnr((found[..., 3] - frames[..., 3]).numpy()) > 33
    if name != "grey.png":
        assert psnr((found[..., :3] * found[..., 3:] - frames[..., :3] * frames[..., 3:]).numpy()) > 25


def test_files_of_pillow(tmp_path):
    """WebP joins equal frames, and PNG is of mode P, L or RGB as well."""
    frames = [(frame * 255).round().byte().numpy() for frame in clip(count=3)]
    pictures = [Image.fromarray(frames[index]) for index in (0, 1, 1, 2)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=40, lossless=True)
    opened = load(tmp_path / "a.webp")
    assert (opened.rate, opened.frames, opened.notes) == (Fraction(25), 4, ())
    for found, index in zip(opened, (0, 1, 1, 2), strict=True):
        assert np.array_equal((found[..., 3] * 255).round().numpy(), frames[index][..., 3])
    pictures[0].save(tmp_path / "b.webp", save_all=True, append_images=pictures[1:2], duration=[100, 370], lossless=True)
    opened = load(tmp_path / "b.webp")
    assert len(list(opened)) == 2 and float(opened.rate) == pytest.approx(2 / 0.47, abs=0.001) and "100 to 370 ms" in opened.notes[0]
    folder = tmp_path / "sequence"
    folder.mkdir()
    for name, number, mode in (("take9", 9, "P"), ("take10", 10, "L"), ("take100", 100, "RGB"), ("²3", 200, "RGB")):
        Image.new("RGBA", (4, 4), (number, number, number, 255)).convert(mode).save(folder / f"{name}.png")
    opened = load(folder)
    assert [round(float(frame[0, 0, 0]) * 255) for frame in opened] == [9, 10, 100, 200]
    assert opened.notes == ("there is no frame rate in it; 24 was assumed",)
    assert all(bool((frame[..., 3] == 1).all()) for frame in opened)


def test_opaque_video_has_alpha_one(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    opened = load(tmp_path / "a.mp4", "premultiplied")
    assert not opened.transparent and not opened.premultiplied
    assert [bool((frame[..., 3] == 1).all()) for frame in opened] == [True]


# Colour at edges


def test_bled_colours(tmp_path):
    """Visible pixels stay as they are, holes get a mixture of their surroundings, an empty picture stays finite."""
    picture = torch.rand(37, 53, 4)
    picture[..., 3] = (picture[..., 3] > 0.97).float() * 0.5
    filled = pull_push(picture)
    visible = picture[..., 3] > 0
    assert torch.equal(filled[visible], picture[visible]) and torch.equal(filled[..., 3], picture[..., 3])
    low, high = (getattr(picture[visible][:, :3], name)(0) for name in ("amin", "amax"))
    assert bool(((filled[..., :3] >= low - 1e-5) & (filled[..., :3] <= high + 1e-5)).all())
    constant = torch.where(visible[..., None], torch.tensor([0.2, 0.7, 0.4, 0.5]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.allclose(pull_push(constant)[..., :3], torch.tensor([0.2, 0.7, 0.4]).expand(37, 53, 3), atol=1e-5)
    assert bool((pull_push(torch.rand(9, 7, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])) == 0).all())
    assert pull_push(filled[:1, :1]).shape == (1, 1, 4)


@needs_ffmpeg
@pytest.mark.parametrize("format", sorted(LOSSY))
def test_no_other_colour_comes_into_an_edge(tmp_path, format, monkeypatch):
    """A red disc over black that nobody sees: without its colour below the edge, that black would be in it."""
    frames = [torch.cat([torch.tensor([1.0, 0.1, 0.1]) * (frame[..., 3:] > 0), (frame[..., 3:] > 0).float()], -1) for frame in clip()]
    errors = []
    for name in ("pull_push", "as it is"):
        if name != "pull_push":
            monkeypatch.setattr(video_writer, "pull_push", lambda picture: picture)
        found = independent(written(tmp_path, format, frames), format, 10)
        visible = torch.stack(frames)[..., 3].numpy() == 1
        errors.append(np.abs(found[..., :3] - (1.0, 0.1, 0.1))[visible].max())
    assert errors[0] < 0.03 and errors[1] > 2 * errors[0], errors


# What else is in a file


@needs_ffmpeg
@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 12, Fraction(59, 2), 60])
@every_format
def test_rates(tmp_path, format, rate):
    path = written(tmp_path, format, rate=rate, bits=None)
    assert load(path).rate == rate
    if format == "animated WebP":
        with Image.open(path) as image:
            durations = []
            for number in range(image.n_frames):
                image.seek(number)
                image.load()
                durations.append(image.info["duration"])
        assert abs(sum(durations) - 1000 * COUNT / rate) <= 2 and max(durations) - min(durations) <= 1
    elif format == "APNG":
        with Image.open(path) as image:
            assert image.info["duration"] == pytest.approx(float(1000 / rate), rel=1e-3)
    elif format != "PNG sequence":
        (stream,) = ffprobe(path, "-count_frames")["streams"]
        assert float(Fraction(stream["avg_frame_rate"])) == pytest.approx(float(rate), rel=1e-3) and stream["nb_read_frames"] == str(COUNT)


@pytest.mark.parametrize("count", [1, 2])
@every_format
def test_rates_of_short_clips(tmp_path, format, count):
    """One frame has no second one to tell its time by."""
    opened = load(written(tmp_path, format, clip(count=count), Fraction(30000, 1001)))
    assert opened.frames == count
    assert (opened.rate, opened.notes) == (Fraction(30000, 1001), ())


def red(path, count, source, *options):
    """A clip of FFmpeg's program: red, half transparent, 30 a second, with a filter that leaves frames out."""
    picture = f"color=red@0.5:s=32x32:r=30:d={count / 30},format=rgba"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, *source, "-fps_mode", "vfr", *options, path], check=True)
    return path


VARYING = {  # 30 a second, then 3
    "vfr.webm": ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0"],
    "vfr.mkv": ["-c:v", "ffv1"],
    "vfr.mov": ["-c:v", "qtrle", "-pix_fmt", "argb"],
    "vfr.png": ["-f", "apng"],
}


@needs_ffmpeg
@pytest.mark.parametrize("name", VARYING)
def test_a_rate_that_varies(tmp_path, name):
    """All frames, the mean of their rates, and a note. Chosen so that the frames times the file's rate are far from their number."""
    path = red(tmp_path / name, 120, ["-vf", "select='lt(n,30)+not(mod(n,10))'"], *VARYING[name])
    opened = load(path)
    assert opened.frames == len(list(opened)) == 39
    seconds = 4 if name == "vfr.png" else 3.7  # FFmpeg gives an APNG's last frame the time of the one before
    assert float(opened.rate) == pytest.approx(39 / seconds, rel=0.001)
    assert re.fullmatch(r"its frames last 33 to 33[34] ms; they were given one rate, the mean", *opened.notes)


@needs_ffmpeg
@pytest.mark.parametrize("ending", ["mkv", "mov"])
def test_video_that_starts_late(tmp_path, ending):
    """Two seconds of sound come first: what a header calls a length may be an end."""
    codec = {"mkv": ["-c:v", "ffv1", "-c:a", "flac"], "mov": ["-c:v", "qtrle", "-pix_fmt", "argb", "-c:a", "pcm_s16le"]}[ending]
    delayed = ["-f", "lavfi", "-i", "sine=d=3", "-filter_complex", "[0:v]setpts=PTS+2/TB[v]", "-map", "[v]", "-map", "1:a"]
    opened = load(red(tmp_path / f"late.{ending}", 30, delayed, *codec))
    assert (opened.frames, opened.rate, opened.notes) == (30, 30, ()) and len(list(opened)) == 30


@needs_ffmpeg
@pytest.mark.parametrize("first", ["sound", "picture"])
def test_sound_stays_with_its_frames(tmp_path, first):
    """A tone that begins one second in, with the picture, or one second after it."""
    late = {"sound": "[0:v]setpts=PTS+1/TB[v];[1:a]anull[a]", "picture": "[0:v]null[v];[1:a]atrim=1[a]"}[first]
    tone = ["-f", "lavfi", "-i", "aevalsrc=sin(2760*t)*gte(t\\,1):d=2:s=48000", "-filter_complex", late, "-map", "[v]", "-map", "[a]"]
    sound = load(red(tmp_path / "a.mkv", 60, tone, "-c:v", "ffv1", "-c:a", "flac")).sound()
    assert sound is not None
    loud = sound.samples[0].abs().unflatten(0, (-1, 4800)).mean(1) > 0.1  # by tenths of a second
    assert loud.tolist() == [True] * 10 if first == "sound" else [False] * 10 + [True] * 10


@needs_ffmpeg
def test_a_clip_that_was_trimmed_without_encoding(tmp_path):
    """MOV keeps the frames before the first one that shows, and says that they do not."""
    whole = written(tmp_path, "ProRes 4444", clip(count=48))
    subprocess.run(["ffmpeg", "-v", "error", "-ss", "0.51", "-i", whole, "-c", "copy", tmp_path / "part.mov"], check=True)
    opened = load(tmp_path / "part.mov")
    assert opened.frames == len(list(opened)) == 48 - 13


@needs_ffmpeg
def test_a_last_frame_that_is_held(tmp_path):
    """Matroska's header counts its length in, and the frame itself does not have it."""
    held = red(tmp_path / "held.mov", 120, ["-vf", "select='lt(n,30)+eq(n,110)'"], "-c:v", "png", "-pix_fmt", "rgba")
    lasting = ["-c", "copy", "-bsf:v", r"setts=duration=if(eq(N\,30)\,20*DURATION\,DURATION)"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", held, *lasting, tmp_path / "held.mkv"], check=True)
    assert len(list(load(tmp_path / "held.mkv"))) == 31


@needs_ffmpeg
@pytest.mark.parametrize("name", VARYING)
def test_a_rate_that_varies_cut_off(tmp_path, name):
    """By less than half of it, so that its header is whole."""
    noise = ["-vf", "geq=r='random(1)*255':g=0:b=0:a=128,select='lt(n,30)+not(mod(n,10))'"]
    path = red(tmp_path / name, 120, noise, *VARYING[name], *(["-movflags", "+faststart"] if name == "vfr.mov" else []))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    with pytest.raises(BrokenVideoError, match=r"cut off after \d+ frames"):
        list(load(path))


@needs_ffmpeg
@pytest.mark.parametrize("case", ["held", "sound", "whole"])
def test_both_readers_of_video_have_one_rule(tmp_path, case):
    """A last frame that is held, and sound that goes on after the picture: cut off in the sound, a file is not whole either."""
    if case == "held":
        first = red(tmp_path / "a.mov", 120, ["-vf", "select='lt(n,30)+eq(n,110)'"], "-c:v", "png", "-pix_fmt", "rgba")
        lasting = ["-c", "copy", "-bsf:v", r"setts=duration=if(eq(N\,30)\,20*DURATION\,DURATION)"]
        path = tmp_path / "held.mkv"
        subprocess.run(["ffmpeg", "-v", "error", "-i", first, *lasting, path], check=True)
    else:
        path = red(tmp_path / "long.mkv", 31, ["-f", "lavfi", "-i", "sine=d=9"], "-c:v", "ffv1", "-c:a", "pcm_s16le")
    if case == "sound":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 8 // 10])
        with pytest.raises(BrokenVideoError, match=r"cut off after 31 frames, at second \d\.\d\d of 9.0\d; get a complete"):
            list(load(path))
        with pytest.raises(BrokenVideoError, match=r"cut off at second \d\.\d\d of 9.0\d; get a complete"):
            upscale_video(path, tmp_path / "out.mkv", lambda x: x, (32, 32), codec="ffv1")
    else:
        assert len(list(load(path))) == upscale_video(path, tmp_path / "out.mkv", lambda x: x, (32, 32), codec="ffv1").frames == 31


def test_a_large_file_is_not_looked_through(tmp_path, monkeypatch):
    """Its rate is that of the beginning, and its length an estimate; every frame is read."""
    path = written(tmp_path, "FFV1", [torch.rand(64, 96, 4) for _ in range(40)], 25)
    monkeypatch.setattr(video_reader, "LOOKED_AT", path.stat().st_size // 4)
    opened = load(path)
    assert opened.rate == 25 and 36 <= opened.frames <= 44 and len(list(opened)) == 40


def test_a_header_that_lies_about_the_length(tmp_path):
    """The number of frames, which memory is set aside by, is counted."""
    path = written(tmp_path, "FFV1")
    data = path.read_bytes()
    (place,) = [match.start() for match in re.finditer(rb"00:00:00\.2", data)]
    path.write_bytes(data[:place] + b"99" + data[place + 2 :])
    assert load(path).frames == COUNT


@pytest.mark.parametrize("tag", ["1000000000", "1/1000000000000", "0", "-24", "nan"])
def test_a_tag_that_is_no_rate(tmp_path, tag):
    """As if it were not there."""
    pictures = [Image.new("RGBA", (4, 4), colour) for colour in ("red", "blue")]
    exif = Image.Exif()
    exif[0x0110] = f"fps:{tag}"
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=[40, 80], exif=exif.tobytes())
    assert (load(tmp_path / "a.webp").rate, load(tmp_path / "a.webp").frames) == (25, 3)
    text = PngInfo()
    text.add_text("fps", tag)
    (tmp_path / "sequence").mkdir()
    Image.new("RGBA", (4, 4)).save(tmp_path / "sequence" / "0.png", pnginfo=text)
    assert load(tmp_path / "sequence").notes == ("there is no frame rate in it; 24 was assumed",)


@needs_ffmpeg
@pytest.mark.parametrize("format", ["ProRes 4444", "VP9 WebM"])
def test_colour_tags(tmp_path, format):
    (stream,) = ffprobe(written(tmp_path, format))["streams"]
    tags = {"color_range": "tv", "color_space": "bt709"}
    if format == "VP9 WebM" or hasattr(av.VideoFrame, "color_trc"):  # PyAV 14 cannot tell these to ProRes
        tags |= {"color_transfer": "bt709", "color_primaries": "bt709"}
    assert tags.items() <= stream.items()
    if format == "VP9 WebM":
        assert stream["tags"]["alpha_mode"] == "1"
    else:
        assert (stream["codec_name"], stream["profile"]) == ("prores", "4444")


@needs_ffmpeg
@every_format
def test_texts(tmp_path, format):
    """The workflow, where each kind of file has such things."""
    workflow = json.dumps({"1": {"class_type": "Ümlaut"}})
    path = written(tmp_path, format, metadata={"prompt": workflow, "workflow": "{}"})
    if format == "PNG sequence":
        path = path / "00002.png"
    if format == "animated WebP":
        with Image.open(path) as image:
            assert image.info["loop"] == 0, "for ever"
            values = [value for value in image.getexif().values() if isinstance(value, str)]
        assert f"prompt:{workflow}" in values and "workflow:{}" in values
    elif path.suffix == ".png":
        with Image.open(path) as image:
            assert image.text["prompt"] == workflow and image.text["workflow"] == "{}" and image.info.get("loop", 0) == 0
            image.load()
    else:
        tags = {key.lower(): value for key, value in ffprobe(path)["format"]["tags"].items()}
        assert tags["prompt"] == workflow and tags["workflow"] == "{}"


@needs_ffmpeg
@pytest.mark.parametrize("channels", [1, 2, 6])
@every_format
def test_sound(tmp_path, format, channels):
    """Cut off where the picture ends. Bit depth and compression are the format's; files of pictures alone say that they have none."""
    count = 12
    tones = torch.stack([torch.sin(torch.arange(44100) / 44100 * 440 * (1 + index) * 6.2832) * 0.4 for index in range(channels)])
    target = tmp_path / f"clip{FORMATS[format].suffix}"
    result = save(target, clip(count=count), RATE, format, sound=Sound(tones, 44100))
    if FORMATS[format].sound is None:
        assert result.notes == [f"the sound was left out: {format} has none"] and load(target).sound() is None
        return
    file = target / "sound.wav" if format == "PNG sequence" else target
    command = ["ffmpeg", "-v", "error", "-i", file, "-map", "0:a", "-f", "f32le", "-ac", str(channels), "-ar", "44100", "-"]
    heard = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4").reshape(-1, channels).T
    sound = load(target).sound()
    assert sound is not None and sound.samples.shape[0] == channels
    for samples, rate in ((heard, 44100), (sound.samples.numpy(), sound.rate)):
        assert abs(samples.shape[1] / rate - count / RATE) < 0.03
        if format != "VP9 WebM":  # Opus is lossy
            assert rate == 44100 and np.abs(samples - tones[:, : samples.shape[1]].numpy()).max() < 1e-5
        elif channels < 6:
            spectrum = np.abs(np.fft.rfft(samples[-1]))
            assert abs(spectrum.argmax() * rate / samples.shape[1] - 440 * channels) < 10


def test_quality(tmp_path):
    """Lower quality is smaller; alpha of WebP does not suffer."""
    frames = [torch.cat([torch.rand(64, 96, 3), frame[..., 3:]], -1) for frame in clip()]
    sizes = []
    for format, settings in (("VP9 WebM", [{"crf": 4}, {"crf": 50}]), ("animated WebP", [{}, {"quality": 90}, {"quality": 20}])):
        sizes.append([])
        for number, more in enumerate(settings):
            (tmp_path / f"{format}{number}").mkdir()
            path = written(tmp_path / f"{format}{number}", format, frames, **more)
            sizes[-1].append(path.stat().st_size)
            if format == "animated WebP":
                found = independent(path, format, 8)
                assert np.abs(found[..., 3] - torch.stack(frames)[..., 3].numpy()).max() <= 0.51 / 255
    assert sizes == [sorted(each, reverse=True) for each in sizes] and all(len(set(each)) == len(each) for each in sizes)


# Refusals


GOOD = {"target": "a.webm", "frames": clip(32, 32, 2), "rate": 24, "format": "VP9 WebM"}
REFUSED = {
    "format": ({"format": "GIF"}, "format is 'GIF'; use one of ProRes 4444"),
    "ending": ({"target": "a.mov"}, "the name a.mov is not one of VP9 WebM; end it in .webm"),
    "folder": ({"target": "a.png", "format": "PNG sequence"}, "it is a folder, so give it no ending"),
    "alpha": ({"alpha": "none"}, "alpha is 'none'; use straight or premultiplied"),
    "rate": ({"rate": 0}, "frame rate is 0; use 0.01 to 1000 a second"),
    "bits": ({"bits": 16}, "bits is 16; VP9 WebM has 8 a channel"),
    "webp": ({"alpha": "premultiplied", "target": "a.webp", "format": "animated WebP"}, "animated WebP holds straight alpha only"),
    "apng": ({"alpha": "premultiplied", "target": "a.png", "format": "APNG"}, "alpha is premultiplied, and APNG holds straight alpha only"),
    "png": ({"alpha": "premultiplied", "target": "a", "format": "PNG sequence"}, "PNG sequence holds straight alpha only; use straight"),
    "long": ({"frames": [torch.rand(1, 16384, 4)], "target": "a.webp", "format": "animated WebP"}, "16384 x 1, and animated WebP holds 16383"),
    "sound": ({"sound": Sound(torch.zeros(3, 9), 44100)}, r"the sound is \(3, 9\) .*give 1, 2, 6 or 8 channels"),
    "tiny rate": ({"rate": Fraction(1, 3000)}, "frame rate is 0.000333333; use 0.01 to 1000 a second"),
    "silence": ({"sound": Sound(torch.tensor([[0.0, torch.nan]]), 44100)}, "the sound has values that are not finite numbers"),
    "nothing": ({"frames": []}, "has no frame; give one at least"),
    "opaque": ({"frames": [torch.rand(8, 8, 3)]}, r"are \(8, 8, 3\) .*give RGBA"),
    "sizes": ({"frames": [torch.rand(8, 8, 4), torch.rand(8, 6, 4)]}, r"frame 1 is \(8, 6, 4\) and the first \(8, 8, 4\)"),
    "numbers": ({"frames": [torch.rand(8, 8, 4), torch.full((8, 8, 4), torch.nan)]}, "frame 1 has values that are not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_message_and_no_file(tmp_path, case):
    changes, message = REFUSED[case]
    arguments = {**GOOD, **changes}
    with pytest.raises(ValueError, match=message):
        save(tmp_path / arguments.pop("target"), arguments.pop("frames"), arguments.pop("rate"), **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("width", "height"), [(33, 27), (64, 47), (63, 48), (1, 1), (3, 1)])
def test_odd_sizes(tmp_path, width, height):
    """Kept by every format, also by VP9, whose colours are for blocks of 2 x 2 pixels."""
    frames = [(frame + 0.2).clamp(0, 1) for frame in clip(width, height, 2)]
    for format in FORMATS:
        found = torch.stack(list(load(written(tmp_path, format, frames))))
        errors = (found - torch.stack(frames)).abs()
        assert errors[..., 3].max() < (0.12 if format == "VP9 WebM" else 0.003)
        assert errors[..., :3].mean() < (0.08 if format == "VP9 WebM" else 0.003), format


@needs_ffmpeg
def test_an_odd_vp9_is_right_to_an_independent_reader(tmp_path):
    """The last column and row too."""
    frames = [torch.tensor([0.2, 0.7, 0.4, 0.6]).expand(27, 33, 4)] * 2
    found = raw(written(tmp_path, "VP9 WebM", frames), "rgba", 27 * 33 * 4, "-c:v", "libvpx-vp9").reshape(2, 27, 33, 4) / 255
    assert np.abs(found - (0.2, 0.7, 0.4, 0.6)).max() < 0.025


def test_a_dot_in_the_name_of_a_folder(tmp_path):
    """As a file name prefix "v1.2" makes it; the ending of another format is a mistake."""
    target = tmp_path / "v1.2_00001_"
    save(target, clip(), RATE, "PNG sequence")
    assert len(list(load(target))) == COUNT


def test_a_missing_encoder_is_named(tmp_path, monkeypatch):
    real = av.codec.Codec

    def without(name, mode="r"):
        if name == "libvpx-vp9":
            raise ValueError(name)
        return real(name, mode)

    monkeypatch.setattr(video_writer.av.codec, "Codec", without)
    with pytest.raises(ValueError, match=r"VP9 WebM needs the encoder libvpx-vp9, which this build of PyAV has not; .*FFV1"):
        written(tmp_path, "VP9 WebM")
    assert list(tmp_path.iterdir()) == []


@every_format
def test_a_run_that_is_stopped_leaves_what_was_there(tmp_path, format):
    class StopError(Exception):
        pass

    def frames():
        yield from clip()[:3]
        raise StopError

    target = tmp_path / f"clip{FORMATS[format].suffix}"
    if format != "PNG sequence":
        target.write_bytes(b"old")
    with pytest.raises(StopError):
        save(target, frames(), RATE, format, sound=Sound(torch.zeros(1, 48000), 48000))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == ([] if format == "PNG sequence" else [(target.name, b"old")])


def test_a_folder_that_exists_is_not_written_into(tmp_path):
    written(tmp_path, "PNG sequence")
    with pytest.raises(ValueError, match="is a folder that exists; choose another name"):
        written(tmp_path, "PNG sequence")


def test_a_full_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        for format in ("ProRes 4444", "PNG sequence"):
            with pytest.raises(OSError, match="No space left"):
                written(tmp_path, format, [torch.rand(64, 96, 4) for _ in range(30)])
            assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@every_format
def test_memory_does_not_grow_with_the_clip(tmp_path, format):
    """Of fifty frames no more than four are alive at any time, on the way out and on the way in."""
    alive: list[weakref.ref] = []
    most = 0

    def frames(source):
        nonlocal most
        for frame in source:
            alive.append(weakref.ref(frame))
            most = max(most, sum(reference() is not None for reference in alive))
            yield frame
            del frame

    path = written(tmp_path, format, frames(frame.roll(number, 1) for number, frame in enumerate(clip(32, 32, 1) * 50)))
    written_most, most = most, 0
    alive.clear()
    for _ in frames(iter(load(path))):
        pass
    assert len(alive) == 50 and written_most <= 4 and most <= 4


# Damaged files


@every_format
def test_half_a_file(tmp_path, format):
    """One error that says so, whether the header went with it or the pictures."""
    path = written(tmp_path, format, [torch.rand(64, 96, 4) for _ in range(12)])
    damaged = path / "00007.png" if format == "PNG sequence" else path
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut off|damaged|cannot be (read|decoded)|beginning or end is missing|not all of it"):
        for _ in load(path):
            pass


def test_what_is_no_video(tmp_path):
    for name in ("a.mov", "a.webp", "a.png"):
        (tmp_path / name).write_bytes(b"words " * 100)
        with pytest.raises(BrokenVideoError, match=r"is no |damaged"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "absent.mov")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no .png file in it"):
        load(tmp_path / "empty")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 48000, 0, "NONE", ""))
        sound.writeframes(bytes(9600))
    with pytest.raises(ValueError, match="has no video stream, only audio"):
        load(tmp_path / "sound.wav")
    folder = written(tmp_path, "PNG sequence")
    Image.new("RGBA", (5, 5)).save(folder / "00003.png")
    with pytest.raises(BrokenVideoError, match="changes its size from 96 x 64 to 5 x 5 at frame 3"):
        list(load(folder))


UNREAL = ["pipe", "device", "socket", "pipe in a folder"]


def unreal(folder, kind, name="a.mp4"):
    """What has a name and is no file: opening it would wait for ever, or never end."""
    path = folder / name
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "pipe in a folder":
        path = folder / "sequence"
        path.mkdir()
        os.mkfifo(path / "0.png")
    else:
        os.mkfifo(path)
    return path


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("kind", UNREAL)
@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.png"])
def test_what_has_no_end_is_not_opened(tmp_path, kind, name):
    with pytest.raises(FileError, match=r"is a pipe or a device and no file; choose a video file"):
        load(unreal(tmp_path, kind, name))


def test_a_mark_of_transparency_on_a_codec_without(tmp_path):
    """FFmpeg's program copies it from a transparent WebM."""
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.metadata["alpha_mode"] = 32, 32, "yuv420p", "1"
        container.mux([*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode(None)])
    opened = load(tmp_path / "a.mkv")
    assert len(list(opened)) == 1 and not opened.transparent
    assert "it is marked as transparent, but no alpha could be read of its mpeg4" in opened.notes[-1]


def test_an_unknown_codec(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode(None)])
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"mp4v" in data
    (tmp_path / "a.mp4").write_bytes(data.replace(b"mp4v", b"zzzz").replace(b"esds", b"xxxx"))
    with pytest.raises(FileError, match=r"a.mp4 has video of a kind that FFmpeg .* does not decode; export it as"):
        load(tmp_path / "a.mp4")


def test_a_16_bit_apng_of_others_is_not_called_damaged(tmp_path):
    """With frames blended over one another, which FFmpeg does not do at 16 bits."""
    path = written(tmp_path, "APNG", bits=16)
    data = bytearray(path.read_bytes())
    places = [match.start() for match in re.finditer(b"fcTL", data)][1:]
    for place in places:
        data[place + 4 + 25] = 1  # blend_op: over
        data[place + 30 : place + 34] = struct.pack(">I", zlib.crc32(data[place : place + 30]))
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"is of a kind that FFmpeg .* does not decode; export it with 8 bits a channel, or as another kind"):
        list(load(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_that_claims_much(tmp_path):
    """Before any of it is made room for; and times that would be years are not searched for a rate."""
    path = written(tmp_path, "animated WebP")
    data = bytearray(path.read_bytes())
    assert data[12:16] == b"VP8X"
    data[24:30] = (11999).to_bytes(3, "little") * 2
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"claims frames of 12000 x 12000 pixels in [\d,]+ bytes, which is no video"):
        load(path)
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "yuv420p"
        for time in (0, 10**12):
            frame = av.VideoFrame(8, 8, "yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    opened = load(tmp_path / "a.mkv")
    assert opened.rate == Fraction(1, 100) and any("0.01 was taken" in note for note in opened.notes)


@every_format
def test_mutants(tmp_path, format):
    """Whatever is wrong with a file is one sentence of ours about it."""
    path, random = written(tmp_path, format, clip(32, 24, 3), sound=Sound(torch.zeros(1, 6000), 48000)), Random(7)
    file = path / "00001.png" if format == "PNG sequence" else path
    whole = file.read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(random.choice((1, 2, 8))):
            place = random.randrange(min(len(data), 600)) if random.random() < 0.6 else random.randrange(len(data))
            length = random.choice((1, 2, 4, 8))
            data[place : place + length] = random.choice((bytes(length), b"\xff" * length, random.randbytes(length), b""))
        file.write_bytes(data[: random.choice((len(data), len(data), random.randrange(len(data))))])
        try:
            opened = load(path)
            list(opened)
            opened.sound()
        except FileError as error:
            assert "\n" not in str(error) and not re.search(r"NoneType|object has no|avcodec|Errno", str(error)), error


# A browser

PLAY = """async ([kind, data, time]) => {
    const thing = document.createElement(kind);
    const loaded = new Promise((resolve, reject) => {
        thing.addEventListener(kind === 'video' ? 'loadeddata' : 'load', resolve);
        thing.addEventListener('error', () => reject(new Error('it cannot be shown')));
    });
    thing.src = data;
    await loaded;
    if (kind === 'video') {  // 'seeked' alone comes before the frame can be drawn, on a busy machine
        const shown = new Promise(resolve => {
            const look = (now, frame) => frame.mediaTime > time - 1 / 24 ? resolve() : thing.requestVideoFrameCallback(look);
            thing.requestVideoFrameCallback(look);
        });
        thing.currentTime = time;
        await shown;
    }
    const canvas = document.createElement('canvas');
    canvas.width = thing.videoWidth || thing.naturalWidth;
    canvas.height = thing.videoHeight || thing.naturalHeight;
    const context = canvas.getContext('2d');
    context.drawImage(thing, 0, 0);
    return [canvas.width, canvas.height, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
}"""


@pytest.mark.browser
@pytest.mark.parametrize("format", ["VP9 WebM", "animated WebP", "APNG"])
def test_chromium_shows_it_transparent(tmp_path, format, chromium):  # noqa: F811
    """Straight alpha is what browsers take: the colours of half transparent pixels are right in it too."""
    frames = clip()
    mime = {"VP9 WebM": "video/webm", "animated WebP": "image/webp", "APNG": "image/apng"}[format]
    data = f"data:{mime};base64,{base64.b64encode(written(tmp_path, format).read_bytes()).decode()}"
    page = chromium.new_page()
    number = 3 if format == "VP9 WebM" else 0  # of a picture, canvas takes the first
    width, height, values = page.evaluate(PLAY, ["video" if format == "VP9 WebM" else "img", data, (number + 0.5) / 24])
    page.close()
    found = np.array(values).reshape(height, width, 4) / 255
    expected = frames[number].double().numpy()
    assert psnr(found[..., 3] - expected[..., 3]) > 40
    assert psnr(found[..., :3] * found[..., 3:] - expected[..., :3] * expected[..., 3:]) > 38


# Layers


def over(below, above):
    """Straight alpha, float64 (Porter and Duff 1984)."""
    alpha = above[..., 3:] + below[..., 3:] * (1 - above[..., 3:])
    colour = above[..., :3] * above[..., 3:] + below[..., :3] * below[..., 3:] * (1 - above[..., 3:])
    return np.concatenate([np.divide(colour, alpha, out=np.zeros_like(colour), where=alpha > 0), alpha], -1)


def placed(frame, x, y, width, height, opacity=1.0):
    canvas = np.zeros((height, width, 4))
    canvas[y : y + frame.shape[0], x : x + frame.shape[1]] = frame
    canvas[..., 3] *= opacity
    return canvas


@pytest.mark.parametrize("ending", ["hold", "loop", "hide"])
def test_layers_over_one_another(tmp_path, ending):
    """A clip of five frames below, one of two above it at (7, 5), half there; and the upper one alone."""
    below, above = clip(40, 30, 5), [torch.rand(10, 12, 4) for _ in range(2)]
    upper = ClipLayer("upper", torch.stack(above), 7, 5, 0.5, ending=ending)
    layered = LayeredClip(40, 30, (ClipLayer("lower", load(written(tmp_path, "FFV1", below, bits=16))), upper))
    found = list(layered)
    assert len(found) == 5
    order = {"hold": [0, 1, 1, 1, 1], "loop": [0, 1, 0, 1, 0], "hide": [0, 1, None, None, None]}[ending]
    for frame, lower, index in zip(found, below, order, strict=True):
        expected = lower.double().numpy()
        if index is not None:
            expected = over(expected, placed(above[index].double().numpy(), 7, 5, 40, 30, 0.5))
        error = np.abs(frame.numpy() - expected)
        assert error[..., 3].max() < 1e-4 and (error[..., :3] * expected[..., 3:]).max() < 1e-4
    alone = list(upper.on_canvas(40, 30))
    assert len(alone) == 2
    for frame, source in zip(alone, above, strict=True):
        assert np.abs(frame.numpy()[..., 3] - placed(source.numpy(), 7, 5, 40, 30, 0.5)[..., 3]).max() < 1e-6


def test_a_blend_mode_of_a_layer():
    base, top = torch.tensor([0.5, 0.25, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.25, 1.0])
    layers = (ClipLayer("a", base.expand(2, 4, 4, 4)), ClipLayer("b", top.expand(1, 4, 4, 4), blend_mode="multiply"))
    found = torch.stack(list(LayeredClip(4, 4, layers)))
    assert torch.allclose(found, (base * top).expand(2, 4, 4, 4))


def test_layers_that_cannot_be():
    with pytest.raises(ValueError, match="layer 'x' has ending 'stop'; use one of hold, loop, hide"):
        ClipLayer("x", [], ending="stop")
    with pytest.raises(ValueError, match="layer 'x' has blend mode 'glow'"):
        list(LayeredClip(4, 4, (ClipLayer("x", torch.rand(1, 4, 4, 4), blend_mode="glow"),)))
    assert list(LayeredClip(4, 4, (ClipLayer("x", [], ending="loop"),))) == []
