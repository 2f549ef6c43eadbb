"""Video file to video file: whatever the operator does not change is in the result as it was in the source, read back by another decode."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

av = pytest.importorskip("av")

from tessera.models.errors import FileError  # noqa: E402
from tessera.models.media.containers import BrokenVideoError  # noqa: E402
from tessera.models.upscale.video import upscale_video  # noqa: E402
from tessera.models.upscale.video_reader import Clip, inspect_video, open_reader  # noqa: E402

# R'G'B' to Y'CbCr as the standards print it: weights of luma, divisors of B'-Y' and R'-Y'.
MATRICES = {
    1: ((0.2126, 0.7152, 0.0722), 1.8556, 1.5748),
    5: ((0.299, 0.587, 0.114), 1.772, 1.402),
    6: ((0.299, 0.587, 0.114), 1.772, 1.402),
    7: ((0.212, 0.701, 0.087), 1.826, 1.576),
    9: ((0.2627, 0.6780, 0.0593), 1.8814, 1.4746),
}
LOSSLESS = {"qp": "0", "preset": "ultrafast"}


class StopError(Exception):
    """What a host raises to stop a run."""


def bicubic(frames):
    return F.interpolate(frames, scale_factor=2, mode="bicubic")


def identity(frames):
    return frames


def to_codes(rgb, matrix, full, bits=8):
    """Y, Cb and Cr of one colour in 0..1."""
    luma_of, blue, red = MATRICES[matrix]
    luma = sum(weight * value for weight, value in zip(luma_of, rgb, strict=True))
    chroma = (rgb[2] - luma) / blue, (rgb[0] - luma) / red
    step, top, half = 2 ** (bits - 8), 2**bits - 1, 2 ** (bits - 1)
    if full:
        return [luma * top, *(value * top + half for value in chroma)]
    return [(luma * 219 + 16) * step, *(value * 224 * step + half for value in chroma)]


def to_rgb(codes, matrix, full, bits=8):
    """The other way."""
    luma_of, blue, red = MATRICES[matrix]
    step, top, half = 2 ** (bits - 8), 2**bits - 1, 2 ** (bits - 1)
    luma = codes[0] / top if full else (codes[0] / step - 16) / 219
    cb, cr = ((code - half) / (top if full else 224 * step) for code in codes[1:])
    r, b = luma + red * cr, luma + blue * cb
    return [r, (luma - luma_of[0] * r - luma_of[2] * b) / luma_of[1], b]


def plane(frame, index):
    """Codes of a plane of a planar frame."""
    part = frame.planes[index]
    kind = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
    return np.frombuffer(part, kind).reshape(part.height, -1)[:, : part.width]


def picture(width, height, number, pixel_format="yuv420p"):
    """A frame with structure that differs with its number, all of it colours that RGB has."""
    frame = av.VideoFrame(width, height, pixel_format)
    bits = frame.format.components[0].bits
    for index in range(3):
        codes = plane(frame, index)
        y, x = np.mgrid[: codes.shape[0], : codes.shape[1]]
        base, spread = (118, 20) if index else (60, 130)
        codes[...] = (base + (x * 3 + y * 2 + number * 7 + index * 9) % spread) * 2 ** (bits - 8)
    return frame


def flat(width, height, codes, pixel_format="yuv420p"):
    frame = av.VideoFrame(width, height, pixel_format)
    for index, code in enumerate(codes):
        plane(frame, index)[...] = round(code)
    return frame


def write(path, frames, *, codec="libx264", options=None, pts=None, time_base=Fraction(1, 25), tags=None, sound=0.0, sound_codec="aac", **more):
    """A file of these frames, with a sine of `sound` seconds. pts: default one tick a frame."""
    frames = list(frames)
    with av.open(path, "w", **more) as container:
        video = container.add_stream(codec, rate=25, options=LOSSLESS if options is None else options)
        video.width, video.height, video.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        video.time_base = video.codec_context.time_base = time_base
        for name, value in (tags or {}).items():
            setattr(video.codec_context, name, value)
        if sound:
            audio = container.add_stream(sound_codec, rate=48000)
            audio.layout = "stereo"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = (number if pts is None else pts[number]), time_base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for start in range(0, round(sound * 48000), 1024):
            wave = np.sin(np.arange(start, start + 1024) / 48000 * 440 * 2 * np.pi).astype(np.float32) / 2
            part = av.AudioFrame.from_ndarray(np.stack((wave, wave)), format="fltp", layout="stereo")
            part.sample_rate, part.pts, part.time_base = 48000, start, Fraction(1, 48000)
            container.mux(audio.encode(part))
        if sound:
            container.mux(audio.encode(None))
    return path


def clip(path, count=12, width=64, height=48, **more):
    return write(path, (picture(width, height, number) for number in range(count)), **more)


def read(path):
    """All frames, and the stream's facts."""
    with av.open(path) as container:
        return list(container.decode(video=0)), container.streams.video[0].codec_context


def times(path):
    frames, _ = read(path)
    return [frame.pts * frame.time_base for frame in frames]


def sound_packets(path):
    with av.open(path) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def leftovers(folder, *expected):
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in expected)


def probe(path):
    if shutil.which("ffprobe") is None:
        pytest.skip("needs ffprobe: apt-get install ffmpeg")
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json", os.fspath(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    return clip(folder / "source.mp4", sound=0.8)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_bicubic(source, out):
    calls = []
    target = out / "result.mp4"
    summary = upscale_video(source, target, bicubic, (128, 96), on_frame=lambda done, total, frame: calls.append((done, total, frame)))
    frames, context = read(target)
    assert (summary.frames, summary.width, summary.height, summary.codec, summary.pixel_format) == (12, 128, 96, "h264", "yuv420p")
    assert (context.width, context.height, context.pix_fmt) == (128, 96, "yuv420p")
    assert len(frames) == 12 and leftovers(out) == ["result.mp4"]
    assert [done for done, _, _ in calls] == list(range(13)) and {total for _, total, _ in calls} == {12}
    assert calls[0][2] is None and all(frame.shape == (3, 96, 128) for _, _, frame in calls[1:])
    # What was written is what the operator made, up to the encoder.
    for (_, _, made), frame in zip(calls[1:], frames, strict=True):
        luma = 0.299 * made[0] + 0.587 * made[1] + 0.114 * made[2]
        assert np.abs(plane(frame, 0).astype(float) - (luma.clamp(0, 1) * 219 + 16).numpy()).mean() < 2


def test_identity_is_the_source(source, out):
    """With a lossless encoder: luma bit by bit, and chroma where it does not change from pixel to pixel."""
    upscale_video(source, out / "same.mkv", identity, (64, 48), codec="ffv1")
    for before, after in zip(read(source)[0], read(out / "same.mkv")[0], strict=True):
        assert (plane(before, 0) == plane(after, 0)).all()
    smooth = [flat(64, 48, (60 + 10 * number, 120, 140)) for number in range(6)]
    write(out / "smooth.mp4", smooth)
    upscale_video(out / "smooth.mp4", out / "smooth.mkv", identity, (64, 48), codec="ffv1")
    for before, after in zip(smooth, read(out / "smooth.mkv")[0], strict=True):
        assert all((plane(before, index) == plane(after, index)).all() for index in range(3))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("time_base", [Fraction(1, 90000), Fraction(1, 1000), Fraction(1001, 30000)])
def test_time_stamps(out, suffix, time_base):
    ticks = np.cumsum([0, 1, 1, 3, 1, 7, 1, 1, 2, 1, 1, 5]) * round(Fraction(1, 25) / time_base)
    clip(out / "in.mp4", pts=[int(tick) for tick in ticks], time_base=time_base)
    target = out / f"result{suffix}"
    summary = upscale_video(out / "in.mp4", target, bicubic, (128, 96))
    before, after = times(out / "in.mp4"), times(target)
    assert len(before) == 12
    if suffix != ".mkv":
        assert before == after
    else:
        assert max(abs(a - b) for a, b in zip(before, after, strict=True)) <= Fraction(1, 2000)
        assert any("milliseconds" in note for note in summary.notes) == any((1000 * time).denominator > 1 for time in before)
    if suffix != ".mkv":
        with av.open(out / "in.mp4") as a, av.open(target) as b:
            lengths = [item.streams.video[0].duration * item.streams.video[0].time_base for item in (a, b)]
        assert abs(lengths[0] - lengths[1]) <= Fraction(1, 100)  # the last frame lasts as long


def test_a_clock_that_starts_anywhere_starts_at_zero(out):
    clip(out / "in.ts", pts=[25 * 3600 + number for number in range(12)])
    assert times(out / "in.ts")[0] > 3000
    upscale_video(out / "in.ts", out / "result.mp4", identity, (64, 48))
    assert times(out / "result.mp4") == [Fraction(number, 25) for number in range(12)]


TAGS = {
    "bt709": {"colorspace": 1, "color_range": 1, "color_primaries": 1, "color_trc": 1},
    "bt601": {"colorspace": 6, "color_range": 1, "color_primaries": 6, "color_trc": 6},
    "pal": {"colorspace": 5, "color_range": 1, "color_primaries": 5, "color_trc": 6},
    "full": {"colorspace": 1, "color_range": 2, "color_primaries": 1, "color_trc": 13},
    "hlg": {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 18},
    "pq": {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 16},
}


@pytest.mark.parametrize("name", TAGS)
def test_colour_tags(out, name):
    deep = name in ("hlg", "pq")
    frames = [picture(64, 48, number, "yuv420p10le" if deep else "yuv420p") for number in range(3)]
    write(out / "in.mp4", frames, tags=TAGS[name])
    summary = upscale_video(out / "in.mp4", out / "result.mp4", bicubic, (128, 96))
    context = read(out / "result.mp4")[1]
    assert {key: int(getattr(context, key)) for key in TAGS[name]} == TAGS[name]
    assert not summary.notes and summary.pixel_format == ("yuv420p10le" if deep else "yuv420p")
    stream = probe(out / "result.mp4")["streams"][0]
    names = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020nc"}
    assert stream["color_space"] == names[TAGS[name]["colorspace"]] and stream["color_range"] == ("pc" if name == "full" else "tv")
    transfers = {1: "bt709", 6: "smpte170m", 13: "iec61966-2-1", 16: "smpte2084", 18: "arib-std-b67"}
    assert stream["color_transfer"] == transfers[TAGS[name]["color_trc"]] and stream["nb_read_frames"] == "3"


def test_what_was_assumed_is_tagged(out):
    """A player would guess the matrix by the size, which is another one now."""
    write(out / "in.mp4", [picture(64, 48, 0)])
    summary = upscale_video(out / "in.mp4", out / "result.mp4", identity, (64, 48))
    assert int(read(out / "result.mp4")[1].colorspace) == 6
    assert any("BT.601" in note for note in summary.notes)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("deep", [False, True])
def test_constant_colours(out, matrix, full, deep):
    bits = 10 if deep else 8
    pixel_format = "yuv420p10le" if deep else "yuv420p"
    colours = [(0.8, 0.3, 0.1), (0.1, 0.6, 0.9), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
    codes = [[round(code) for code in to_codes(colour, matrix, full, bits)] for colour in colours]
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    write(out / "in.mp4", (flat(64, 48, code, pixel_format) for code in codes), tags=tags, options={**LOSSLESS, "g": "1"})
    seen = []

    def operator(frames):
        seen.extend(frames.mean((2, 3)).tolist())
        return bicubic(frames)

    upscale_video(out / "in.mp4", out / "result.mp4", operator, (128, 96))
    for code, rgb, frame in zip(codes, seen, read(out / "result.mp4")[0], strict=True):
        expected = np.clip(to_rgb(code, matrix, full, bits), 0, 1)
        assert np.abs(expected - rgb).max() < 1e-4
        result = to_rgb([plane(frame, index).mean() for index in range(3)], matrix, full, bits)
        assert np.abs(np.clip(result, 0, 1) - expected).max() <= 1 / 255


@pytest.mark.parametrize("kind", ["yuv420p10le", "yuv444p16le", "yuv422p12le"])
def test_more_than_8_bit(out, kind):
    """A ramp of more than 256 levels keeps them, whatever the format: nothing on the way has 8 bit."""
    bits = av.VideoFormat(kind).components[0].bits
    frame = av.VideoFrame(1024, 32, kind)
    top = 2**bits
    plane(frame, 0)[...] = np.linspace(0.1 * top, 0.9 * top, 1024).astype(int)
    for index in (1, 2):
        plane(frame, index)[...] = top // 2
    write(out / "in.mkv", [frame], codec="ffv1", options={}, tags={"colorspace": 1, "color_range": 1})
    upscale_video(out / "in.mkv", out / "exact.mkv", identity, (1024, 32), codec="ffv1")
    exact = plane(read(out / "exact.mkv")[0][0], 0)[0].astype(float)
    assert np.abs(exact - plane(frame, 0)[0] / 2.0 ** (bits - 10)).max() <= 1 and len(np.unique(exact)) > 700
    summary = upscale_video(out / "in.mkv", out / "result.mp4", bicubic, (2048, 64))
    assert (summary.codec, summary.pixel_format) == ("hevc", "yuv420p10le")
    assert len(np.unique(plane(read(out / "result.mp4")[0][0], 0))) > 256


@pytest.mark.parametrize("kind", ["nv12", "yuyv422", "yuv411p", "yuv444p", "yuvj420p", "gray", "gray10le", "rgb24", "bgra", "gbrp", "rgb48le"])
def test_pixel_formats(out, kind):
    """The operator sees the same colour whatever the layout in the file."""
    rgb = av.VideoFormat(kind).is_rgb
    colour = (0.4, 0.4, 0.4) if kind.startswith("gray") else (0.8, 0.4, 0.2)
    if rgb:
        array = np.broadcast_to(np.array([round(value * 255) for value in colour], np.uint8), (48, 64, 3))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(format=kind)
    elif kind.startswith("gray"):
        frame = flat(64, 48, [0.4 * (1023 if kind == "gray10le" else 255)], kind)
    else:
        planar = {"nv12": "yuv420p", "yuyv422": "yuv422p", "p010le": "yuv420p10le"}.get(kind, kind)
        frame = flat(64, 48, to_codes(colour, 6, kind == "yuvj420p", av.VideoFormat(planar).components[0].bits), planar).reformat(format=kind)
    if kind == "yuvj420p":
        write(out / "in.nut", [frame], codec="mjpeg", options={"q": "1"})
    else:
        write(out / "in.nut", [frame], codec="rawvideo", options={})
    seen = []

    def operator(frames):
        seen.append(frames)
        return frames

    upscale_video(out / "in.nut", out / "result.mp4", operator, (64, 48))
    expected = torch.tensor(colour).view(3, 1, 1).expand(3, 48, 64)
    torch.testing.assert_close(seen[0][0], expected, rtol=0, atol=1.5 / 255)


# In a process of its own, which an encoder that writes beyond its memory ends.
ENCODE = """
import hashlib, sys
from fractions import Fraction
import av, torch
from tessera.models.upscale.video import upscale_video
from tessera.models.upscale.video_reader import Clip

target, bits = sys.argv[1], int(sys.argv[2])
for size in sys.argv[3:]:
    width, height = map(int, size.split("x"))
    frames = torch.rand(5, height, width, 3, generator=torch.Generator().manual_seed(1))
    upscale_video(Clip(frames, Fraction(8), bits=bits), target, lambda frames: frames, (width, height))
    with av.open(target) as container:
        digest = hashlib.sha256(b"".join(bytes(packet) for packet in container.demux(video=0)))
        print(size, container.streams.video[0].codec_context.codec.canonical_name, digest.hexdigest())
"""


def encoded(run_python, monkeypatch, target, bits, sizes, fill):
    """What is in the files, where memory that nobody wrote is filled with a number; glibc's checks of the heap are on if they are there."""
    checks = next(iter(sorted(Path("/lib").glob("*/libc_malloc_debug.so.0"))), None)
    if checks is not None:
        monkeypatch.setenv("LD_PRELOAD", str(checks))
        monkeypatch.setenv("MALLOC_CHECK_", "3")
    monkeypatch.setenv("MALLOC_PERTURB_", str(fill))
    return run_python("-c", ENCODE, str(target), str(bits), *sizes).splitlines()


@pytest.mark.parametrize(("suffix", "bits", "codec"), [(".mp4", 8, "h264"), (".mp4", 10, "h264"), (".webm", 8, "vp9")])
def test_small_sizes_do_not_end_the_process(run_python, monkeypatch, out, suffix, bits, codec):
    found = encoded(run_python, monkeypatch, out / f"a{suffix}", bits, ["34x34", "48x32", "16x16", "2x2"], 165)
    assert [line.split()[1] for line in found] == [codec] * 4


def test_the_same_frames_make_the_same_file(run_python, monkeypatch, out):
    """Whatever is in memory, and on any processor: x264 read more of its own than it had written."""
    one, two = (encoded(run_python, monkeypatch, out / "a.mp4", 8, ["96x64", "130x98", "200x120"], fill) for fill in (165, 90))
    assert one == two


@pytest.mark.parametrize("codec", ["libx265", "libsvtav1"])
def test_an_encoder_that_is_unsafe_at_a_size_is_named(source, out, codec):
    with pytest.raises(ValueError, match=rf"{codec} is (unsafe below 64 x 64 pixels, and this is 128 x 48|not in this build).*\. Use another codec"):
        upscale_video(source, out / "a.mp4", bicubic, (128, 48), codec=codec)


@pytest.mark.parametrize(("width", "height"), [(33, 17), (65, 40), (2, 3), (1, 1)])
def test_odd_sizes(out, width, height):
    frames = [picture(width, height, number) for number in range(3)]
    write(out / "in.nut", frames, codec="rawvideo", options={})
    summary = upscale_video(out / "in.nut", out / "result.mp4", identity, (width, height))
    even = (width + width % 2, height + height % 2)
    assert (summary.width, summary.height) == even and any(f"{even[0]} x {even[1]}" in note for note in summary.notes)
    after, context = read(out / "result.mp4")
    assert (context.width, context.height) == even and len(after) == 3
    upscale_video(out / "in.nut", out / "triple.mp4", lambda x: F.interpolate(x, scale_factor=3), (3 * width, 3 * height))
    assert len(read(out / "triple.mp4")[0]) == 3


def test_windows(out):
    """Frames come back in order, each with its own time, however many are looked at together."""
    levels = [16 + 12 * number for number in range(17)]
    ticks = np.cumsum([1 + number % 3 for number in range(17)]).tolist()
    write(out / "in.mp4", (flat(64, 48, (level, 128, 128)) for level in levels), pts=ticks, options={**LOSSLESS, "g": "1"})
    sizes = []

    def operator(frames):
        sizes.append(len(frames))
        return bicubic(frames)

    upscale_video(out / "in.mp4", out / "result.mp4", operator, (128, 96), window=5, overlap=2)
    frames, _ = read(out / "result.mp4")
    assert set(sizes) == {5}
    assert [frame.pts * frame.time_base for frame in frames] == times(out / "in.mp4")
    assert np.abs(np.array([plane(frame, 0).mean() for frame in frames]) - levels).max() < 1


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("deep", [False, True])
def test_short_clips(out, count, deep):
    write(out / "in.mp4", (picture(64, 48, number, "yuv420p10le" if deep else "yuv420p") for number in range(count)))
    upscale_video(out / "in.mp4", out / "result.mp4", bicubic, (128, 96), window=5, overlap=2)
    assert times(out / "result.mp4") == [Fraction(number, 25) for number in range(count)]


@pytest.mark.parametrize("seconds", [0.3, 2.0])
@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "aac"), (".mkv", "aac"), (".mov", "pcm_s16le"), (".mkv", "flac")])
def test_sound_is_copied(out, seconds, suffix, codec):
    """Packet by packet, shorter or longer than the picture."""
    options = {} if suffix == ".mkv" or codec == "aac" else {"format": "mov"}
    clip(out / f"in{suffix}", sound=seconds, sound_codec=codec, **options)
    summary = upscale_video(out / f"in{suffix}", out / f"result{suffix}", bicubic, (128, 96))
    assert summary.audio == "copied"
    before = sound_packets(out / f"in{suffix}")
    assert len(before) > 3 and sound_packets(out / f"result{suffix}") == before
    assert len(read(out / f"result{suffix}")[0]) == 12


def test_sound_that_the_container_does_not_take(source, out):
    summary = upscale_video(source, out / "result.webm", bicubic, (128, 96))
    assert (summary.audio, summary.codec) == ("re-encoded", "vp9")
    assert any("aac to libopus" in note for note in summary.notes)
    with av.open(out / "result.webm") as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert abs(samples / 48000 - 0.8) < 0.1


@pytest.mark.parametrize("suffix", [".mov", ".webm"])
def test_sound_that_no_encoder_takes_as_it_is(out, suffix):
    """192 kHz, and a layout of six channels that AAC does not know."""
    with av.open(out / "in.mkv", "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("flac", rate=192000)
        audio.layout, audio.format = "5.1(side)", "s16"
        for number in range(5):
            container.mux(video.encode(picture(64, 48, number)))
        container.mux(video.encode(None))
        for start in range(0, 38400, 4096):
            part = av.AudioFrame.from_ndarray(np.zeros((1, 4096 * 6), np.int16), format="s16", layout="5.1(side)")
            part.sample_rate, part.pts, part.time_base = 192000, start, Fraction(1, 192000)
            container.mux(audio.encode(part))
        container.mux(audio.encode(None))
    summary = upscale_video(out / "in.mkv", out / f"result{suffix}", bicubic, (128, 96))
    assert summary.audio == "re-encoded"
    with av.open(out / f"result{suffix}") as container:
        assert container.streams.audio[0].codec_context.layout.nb_channels == 6
        assert len(list(container.decode(audio=0))) > 5


def test_no_sound(out):
    clip(out / "in.mp4")
    assert upscale_video(out / "in.mp4", out / "result.mp4", bicubic, (128, 96)).audio == "none"


def test_metadata_and_rotation(out):
    path = out / "in.mov"
    with av.open(path, "w", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata.update({"title": "A title", "workflow": '{"nodes": []}'})
        video = container.add_stream("libx264", rate=25, options=LOSSLESS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(4, 3)
        turned = hasattr(video, "set_display_rotation")
        if turned:
            video.set_display_rotation(90)
        for number in range(3):
            container.mux(video.encode(picture(64, 48, number)))
        container.mux(video.encode(None))
    upscale_video(path, out / "result.mp4", bicubic, (128, 96))
    with av.open(out / "result.mp4") as container:
        assert container.metadata["title"] == "A title" and container.metadata["workflow"] == '{"nodes": []}'
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        if turned:
            assert next(container.decode(video=0)).rotation == 90 == inspect_video(path).rotation


def test_subtitles(out, source):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg: apt-get install ffmpeg")
    (out / "words.srt").write_text("1\n00:00:00,100 --> 00:00:00,300\nHello\n\n2\n00:00:00,320 --> 00:00:00,400\nworld\n")
    command = ["ffmpeg", "-loglevel", "error", "-i", source, "-i", out / "words.srt", "-c", "copy", "-metadata:s:s", "language=eng", out / "in.mkv"]
    subprocess.run(command, check=True)
    summary = upscale_video(out / "in.mkv", out / "result.mkv", bicubic, (128, 96))
    with av.open(out / "result.mkv") as container:
        assert [bytes(packet) for packet in container.demux(subtitles=0) if packet.size] == [b"Hello", b"world"]
        assert container.streams.subtitles[0].metadata["language"] == "eng"
    assert not any("subtitles" in note for note in summary.notes)
    summary = upscale_video(out / "in.mkv", out / "result.mp4", bicubic, (128, 96))
    assert any("subtitles" in note and ".mkv does" in note for note in summary.notes)


def test_chapters_and_what_is_left_out(out, source):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg: apt-get install ffmpeg")
    (out / "tags.txt").write_text(";FFMETADATA1\ntitle=T\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=200\ntitle=One\n")
    write(out / "cover.png", [av.VideoFrame(32, 32, "rgb24")], codec="png", options={}, format="image2")
    inputs = ["-i", source, "-i", out / "tags.txt", "-i", source, "-i", out / "cover.png"]
    maps = ["-map", "0:v", "-map", "0:a", "-map", "2:a", "-map", "3:v", "-map_metadata", "1", "-metadata:s:a:1", "language=ger"]
    options = ["-c", "copy", "-disposition:v:1", "attached_pic"]
    subprocess.run(["ffmpeg", "-loglevel", "error", *inputs, *maps, *options, out / "in.mp4"], check=True)
    summary = upscale_video(out / "in.mp4", out / "result.mp4", bicubic, (128, 96))
    assert any(note.startswith("left out: a cover picture") for note in summary.notes)
    with av.open(out / "result.mp4") as container:
        assert [item.metadata.get("language") for item in container.streams.audio] == ["und", "ger"]
        if hasattr(container, "chapters"):
            assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["One"]


def test_source_as_data(source, out):
    data = io.BytesIO(source.read_bytes())
    data.read()
    assert inspect_video(data).frames == 12
    summary = upscale_video(data, out / "result.mp4", bicubic, (128, 96))
    assert (summary.frames, summary.audio) == (12, "copied")
    assert times(out / "result.mp4") == times(source) and sound_packets(out / "result.mp4") == sound_packets(source)
    with pytest.raises(BrokenVideoError, match="given as data"):
        upscale_video(io.BytesIO(b"no video at all"), out / "other.mp4", bicubic, (128, 96))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_interrupt_keeps_the_finished_part(source, out, suffix):
    target = out / f"result{suffix}"
    target.write_bytes(b"what was there")

    def stop(done, total, frame):
        if done == 7:
            raise StopError

    with pytest.raises(StopError) as caught:
        upscale_video(source, target, bicubic, (128, 96), on_frame=stop, interrupt=StopError)
    part = out / f"result.part{suffix}"
    assert str(part) in caught.value.__notes__[0]
    assert leftovers(out) == sorted([f"result.part{suffix}", f"result{suffix}"]) and target.read_bytes() == b"what was there"
    assert len(read(part)[0]) == 7 and sound_packets(part)
    with av.open(part) as container:
        assert container.duration < 1e6 * (7 / 25 + 0.5)


def complaints(path):
    """What FFmpeg's own program finds wrong with a file."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg: apt-get install ffmpeg")
    command = ["ffmpeg", "-v", "error", "-i", path, "-fps_mode", "passthrough", "-enc_time_base:v", "1:1000", "-f", "null", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def stop_after(count):
    def stop(done, total, frame):
        if done == count:
            raise StopError

    return stop


@pytest.mark.parametrize(("suffix", "pixel_format"), [(".mp4", "yuv420p"), (".mkv", "yuv420p"), (".webm", "yuv420p"), (".mp4", "yuv420p10le")])
def test_an_interrupted_run_goes_on(out, suffix, pixel_format):
    """Twice interrupted, at uneven times: the frames are those of an uninterrupted run, none was computed twice, and sound is whole."""
    ticks = [0, 40, 80, 200, 240, 280, 290, 400, 440, 480, 520, 600]
    frames = (picture(64, 48, number, pixel_format) for number in range(12))
    source = write(out / "in.mp4", frames, pts=ticks, time_base=Fraction(1, 1000), sound=0.8)
    target, part = out / f"result{suffix}", out / f"mine{suffix}"
    calls = []

    def operator(frames):
        calls.append(1)
        return bicubic(frames)

    for stop, kept in ((5, 0), (9, 5)):
        seen = []

        def on_frame(done, total, frame, stop=stop, seen=seen):
            seen.append(done)
            stop_after(stop)(done, total, frame)

        with pytest.raises(StopError):
            upscale_video(source, target, operator, (128, 96), on_frame=on_frame, interrupt=StopError, part=part, resume=True)
        assert seen == list(range(kept, stop + 1)) and len(read(part)[0]) == stop
    with pytest.raises(StopError):  # before anything new: the part stays
        upscale_video(source, target, operator, (128, 96), on_frame=stop_after(9), interrupt=StopError, part=part, resume=True)
    assert len(read(part)[0]) == 9
    assert upscale_video(source, target, operator, (128, 96), part=part, resume=True).frames == 12
    assert len(calls) == 12 and leftovers(out, "in.mp4") == [target.name]
    upscale_video(source, out / f"whole{suffix}", bicubic, (128, 96))
    for before, after in zip(read(out / f"whole{suffix}")[0], read(target)[0], strict=True):
        assert np.abs(plane(before, 0).astype(float) - plane(after, 0)).mean() < 2 * 2 ** (10 * (pixel_format != "yuv420p") / 5)
    apart = [abs(a - b) for a, b in zip(times(target), times(out / f"whole{suffix}"), strict=True)]
    assert max(apart) <= (0 if suffix == ".mp4" else Fraction(1, 1000))
    assert sound_packets(target) == sound_packets(out / f"whole{suffix}")
    assert not complaints(target)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le"])
def test_an_interrupted_run_goes_on_where_frames_lie_far_apart(out, pixel_format):
    """An encoder that starts there counts its order of decoding from long before."""
    ticks = [0, 10, 20, 30, 40, 50, 60, 70, 1000, 2000, 3000, 4000]
    frames = (picture(64, 48, number, pixel_format) for number in range(12))
    source = write(out / "in.mp4", frames, pts=ticks, time_base=Fraction(1, 1000))
    with pytest.raises(StopError):
        upscale_video(source, out / "result.mp4", bicubic, (128, 96), on_frame=stop_after(7), interrupt=StopError, resume=True)
    upscale_video(source, out / "result.mp4", bicubic, (128, 96), resume=True)
    assert times(out / "result.mp4") == [Fraction(tick, 1000) for tick in ticks] and not complaints(out / "result.mp4")


RESUMED = [(".mp4", 8), (".mp4", 10), (".mkv", 8), (".mkv", 10), (".webm", 8)]


@pytest.mark.parametrize(("suffix", "bits"), RESUMED)
@pytest.mark.parametrize("stops", [(1,), (1, 2, 3), (3, 4, 6)])
def test_an_interrupted_run_goes_on_where_one_tick_is_one_frame(out, suffix, bits, stops):
    """As of clips in memory, and .avi: there is no time between two frames for the order of decoding to fit in."""
    levels = [0.05 + 0.09 * number for number in range(10)]
    clip = Clip(torch.tensor(levels)[:, None, None, None].expand(-1, 64, 64, 3), Fraction(16), bits=bits)
    target, made = out / f"result{suffix}", []

    def operator(frames):
        made.append(1)
        return frames

    for stop in stops:
        with pytest.raises(StopError):
            upscale_video(clip, target, operator, (64, 64), on_frame=stop_after(stop), interrupt=StopError, resume=True)
    upscale_video(clip, target, operator, (64, 64), resume=True)
    frames, _ = read(target)
    found = [to_rgb([plane(frame, index).mean() for index in range(3)], 1, False, bits)[0] for frame in frames]
    assert np.abs(np.array(found) - levels).max() < 0.01 and len(made) == 10 and leftovers(out) == [target.name]
    tolerance = 0 if suffix == ".mp4" else Fraction(1, 2000)
    assert max(abs(time - Fraction(number, 16)) for number, time in enumerate(times(target))) <= tolerance
    assert not complaints(target)


@pytest.mark.parametrize("kind", ["words", "cut", "empty", "another size", "another codec", "sound"])
def test_a_part_that_cannot_be_continued_is_made_anew(source, out, kind):
    part = out / "result.part.mp4"
    if kind in ("words", "empty"):
        part.write_bytes(b"words " * 100 if kind == "words" else b"")
    elif kind == "cut":
        part.write_bytes(source.read_bytes()[:-900])
    elif kind == "sound":
        write(part, [picture(128, 96, 0)], sound=0.2, codec="mpeg4", options={})
    else:
        size = (64, 48) if kind == "another size" else (128, 96)
        write(part, [picture(*size, number) for number in range(3)], **({"codec": "mpeg4", "options": {}} if kind == "another codec" else {}))
    summary = upscale_video(source, out / "result.mp4", bicubic, (128, 96), resume=True)
    assert "result.part.mp4 could not be continued, and all frames were made anew" in summary.notes
    assert summary.frames == len(read(out / "result.mp4")[0]) == 12


def test_resume_needs_single_frames(source, out):
    with pytest.raises(ValueError, match="window 1 or no resume"):
        upscale_video(source, out / "result.mp4", bicubic, (128, 96), window=4, overlap=2, resume=True)


def test_clip_in_memory(out):
    """Colours of sRGB come out of an independent conversion; sound has the length of the picture; stamps are exact."""
    colours = torch.tensor([[0.8, 0.3, 0.1], [0.1, 0.6, 0.9], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]] * 3)
    frames = colours[:, None, None].expand(12, 48, 64, 3)
    wave = torch.sin(torch.arange(48000) / 48000 * 440 * 2 * torch.pi).expand(2, -1) / 2
    clip = Clip(frames, Fraction(23.976), wave)
    summary = upscale_video(clip, out / "result.mp4", bicubic, (128, 96), metadata={"workflow": '{"nodes": []}'})
    assert (summary.frames, summary.audio, summary.pixel_format, summary.notes) == (12, "encoded", "yuv420p", [])
    decoded, context = read(out / "result.mp4")
    assert [int(getattr(context, name)) for name in ("colorspace", "color_range", "color_primaries", "color_trc")] == [1, 1, 1, 13]
    for colour, frame in zip(colours.tolist(), decoded, strict=True):
        assert np.abs(np.array(to_rgb([plane(frame, index).mean() for index in range(3)], 1, False)) - colour).max() < 2 / 255
    assert times(out / "result.mp4") == [Fraction(number * 125, 2997) for number in range(12)]
    with av.open(out / "result.mp4") as container:
        assert container.metadata["workflow"] == '{"nodes": []}'
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
    assert abs(heard.shape[1] - 12 * 2002) <= 2048 and np.abs(heard[:, 2048:20000]).max() == pytest.approx(0.5, abs=0.05)
    assert upscale_video(Clip(frames, Fraction(25), bits=10), out / "deep.mp4", bicubic, (128, 96)).pixel_format == "yuv420p10le"
    assert "transparency" in upscale_video(Clip(torch.rand(1, 4, 4, 4), Fraction(25)), out / "a.webm", bicubic, (8, 8)).notes[0]
    with pytest.raises(ValueError, match=r"\(0, 48, 64, 3\).*at least one frame"):
        upscale_video(Clip(frames[:0], Fraction(25)), out / "none.mp4", bicubic, (128, 96))


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
@pytest.mark.parametrize(("trim", "expected"), [((0.4, 0.8), range(10, 30)), ((1.0, 0.0), range(25, 50)), ((-0.4, 0.0), range(40, 50))])
def test_trim(out, suffix, trim, expected):
    """The frames asked for, from zero on, with the sound that belongs to them, copied. The clock of .ts files starts anywhere."""
    source = clip(out / f"in{suffix}", 50, options={**LOSSLESS, "g": "12"}, sound=2.0)
    summary = upscale_video(source, out / "result.mkv", identity, (64, 48), trim=trim, codec="ffv1")
    before, after = read(source)[0], read(out / "result.mkv")[0]
    assert summary.frames == len(after) == len(expected) and inspect_video(source, trim).frames == len(expected)
    for number, frame in zip(expected, after, strict=True):
        assert (plane(before[number], 0) == plane(frame, 0)).all()
    assert times(out / "result.mkv") == [Fraction(number, 25) for number in range(len(expected))]
    adts = 7 if suffix == ".ts" else 0  # bytes of a header that other files do without
    kept, whole = sound_packets(out / "result.mkv"), [packet[adts:] for packet in sound_packets(source)]
    first = whole.index(kept[0])
    assert kept == whole[first : first + len(kept)]
    assert abs(len(kept) * 1024 / 48000 - len(expected) / 25) < 0.05 and abs(first * 1024 / 48000 - expected[0] / 25) < 0.05


@pytest.mark.parametrize("trim", [(0.0, 0.0), (0.4, 0.0)])
def test_a_source_that_was_opened_for_its_facts_is_read_on(out, monkeypatch, trim):
    source = clip(out / "in.mp4", 30, sound=1.2)
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda file, *rest, **more: opened.append(file) or real(file, *rest, **more))
    upscale_video(source, out / "by_path.mkv", identity, (64, 48), trim=trim, codec="ffv1")
    opened.clear()
    with open_reader(source, trim) as reader:
        assert (reader.facts.width, reader.facts.height) == (64, 48)
        upscale_video(reader, out / "by_reader.mkv", identity, (64, 48), codec="ffv1")
    assert opened.count(f"file:{source}") == 1 and times(out / "by_reader.mkv") == times(out / "by_path.mkv")
    assert sound_packets(out / "by_reader.mkv") == sound_packets(out / "by_path.mkv")


def test_trim_behind_the_end(source, out):
    with pytest.raises(ValueError, match=r"no frame from second 9.00 on; start the trim earlier"):
        upscale_video(source, out / "result.mp4", bicubic, (128, 96), trim=(9.0, 0.0))
    assert leftovers(out) == []


def test_sound_in_an_unknown_format(source, out):
    """As phones record a second track: FFmpeg can neither name nor decode it."""
    (out / "in.mp4").write_bytes(source.read_bytes().replace(b"mp4a", b"apac").replace(b"esds", b"xsds"))
    summary = upscale_video(out / "in.mp4", out / "result.mp4", bicubic, (128, 96))
    assert summary.audio == "none" and any("unknown format" in note for note in summary.notes) and len(read(out / "result.mp4")[0]) == 12


def test_interrupt_before_the_first_frame(source, out):
    def stop(done, total, frame):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_video(source, out / "result.mp4", bicubic, (128, 96), on_frame=stop)
    assert leftovers(out) == []


def test_an_error_of_the_operator_leaves_nothing(source, out):
    target = out / "result.mp4"
    target.write_bytes(b"what was there")
    calls = []

    def operator(frames):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("the operator's own")
        return bicubic(frames)

    with pytest.raises(RuntimeError, match="the operator's own"):
        upscale_video(source, target, operator, (128, 96))
    with pytest.raises(ValueError, match=r"\(3, 48, 64\).*result.mp4.*\(3, 96, 128\)"):
        upscale_video(source, target, identity, (128, 96))
    assert leftovers(out) == ["result.mp4"] and target.read_bytes() == b"what was there"


def test_a_target_that_cannot_be_replaced_costs_no_work(source, out, monkeypatch):
    """Windows, while a player has the old file open."""
    target = out / "result.mp4"
    target.write_bytes(b"what was there")
    replace = os.replace

    def locked(old, new):
        if new == target:
            raise PermissionError(13, "in use")
        replace(old, new)

    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises(PermissionError, match=r"in use.*result.part.mp4"):
        upscale_video(source, target, bicubic, (128, 96))
    assert len(read(out / "result.part.mp4")[0]) == 12 and leftovers(out) == ["result.mp4", "result.part.mp4"]
    with pytest.raises(ValueError, match="unfinished part"):
        upscale_video(out / "result.part.mp4", target, bicubic, (128, 96))


def test_success_replaces_what_was_there(source, out):
    target = out / "result.mp4"
    target.write_bytes(b"what was there")
    upscale_video(source, target, bicubic, (128, 96))
    assert len(read(target)[0]) == 12 and leftovers(out) == ["result.mp4"]


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing.mp4", None, FileNotFoundError, "no such file"),
        ("empty.mp4", b"", BrokenVideoError, "empty.mp4"),
        ("junk.mp4", b"words " * 100, BrokenVideoError, "junk.mp4"),
    ],
)
def test_no_video(out, name, content, error, words):
    if content is not None:
        (out / name).write_bytes(content)
    with pytest.raises(error, match=words):
        upscale_video(out / name, out / "result.mp4", bicubic, (128, 96))
    assert leftovers(out, name) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize(("kind", "words"), [("pipe", "a pipe or a device"), ("device", "a pipe or a device"), ("folder", "a folder")])
def test_what_has_no_end_is_not_opened(out, kind, words):
    path = out / "a.mp4"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    for read in (inspect_video, lambda path: upscale_video(path, out / "b.mp4", identity, (64, 48))):
        with pytest.raises(FileError, match=f"a.mp4 is {words} and no file; choose a video file"):
            read(path)
    assert leftovers(out) == ["a.mp4"]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9"), (".mov", "mpeg4"), (".avi", "mjpeg")]
)
def test_mutants(out, suffix, codec):
    """Whatever is wrong with a file: it is upscaled, or one sentence of ours about it is said."""
    sound = {"sound": 0.3, "sound_codec": {".webm": "libopus", ".avi": "pcm_s16le"}.get(suffix, "aac")}
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    frames = (picture(32, 24, number, pixel_format) for number in range(4))
    path, random = write(out / f"in{suffix}", frames, codec=codec, options={}, **sound), Random(3)
    whole = path.read_bytes()
    for _ in range(30):
        data = bytearray(whole)
        for _ in range(random.choice((1, 2, 8))):
            place = random.randrange(min(len(data), 600)) if random.random() < 0.6 else random.randrange(len(data))
            length = random.choice((1, 2, 4, 8))
            data[place : place + length] = random.choice((bytes(length), b"\xff" * length, random.randbytes(length), b""))
        path.write_bytes(data[: random.choice((len(data), len(data), random.randrange(1, len(data))))])
        try:
            facts = inspect_video(path)
            upscale_video(path, out / "result.mkv", identity, (facts.width, facts.height), codec="ffv1")
        except FileError as error:
            assert "\n" not in str(error) and not re.search(r"NoneType|object has no|avcodec|Errno", str(error)), error


def test_sound_only_and_no_frames(out):
    with av.open(out / "sound.m4a", "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=48000)
        audio.layout = "mono"
        part = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        part.sample_rate = 48000
        container.mux(audio.encode(part))
        container.mux(audio.encode(None))
    with pytest.raises(ValueError, match=r"sound.m4a has no video stream, only audio"):
        upscale_video(out / "sound.m4a", out / "result.mp4", bicubic, (128, 96))
    for name in ("none.mkv", "none.mp4", "none.avi"):
        with av.open(out / name, "w") as container:
            video = container.add_stream("libx264", rate=25)
            video.width, video.height = 64, 48
            container.start_encoding()
        with pytest.raises(ValueError, match=name):
            upscale_video(out / name, out / "result.mp4", bicubic, (128, 96))
        assert leftovers(out, "sound.m4a", "none.mkv", "none.mp4", "none.avi") == []


@pytest.mark.parametrize(("suffix", "options"), [(".mp4", {"movflags": "faststart"}), (".mkv", {}), (".mov", {"movflags": "faststart"})])
def test_truncated(out, suffix, options):
    """The message says where, and what could be read is kept under another name."""
    whole = clip(out / f"whole{suffix}", 60, options={"preset": "ultrafast", "g": "10"}, container_options=options, sound=2.4)
    cut = out / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    with pytest.raises(BrokenVideoError, match=rf"cut{suffix} .* at second [01]\.\d\d.* frames before that .*result.part.mp4"):
        upscale_video(cut, out / "result.mp4", bicubic, (128, 96))
    assert leftovers(out, whole.name, cut.name) == ["result.part.mp4"]
    assert 20 < len(read(out / "result.part.mp4")[0]) < 50


def test_size_that_changes(out):
    """Two streams of packets one after the other, as broadcasts do at a change of programme."""
    parts = [clip(out / f"part{width}.ts", 5, width, 48).read_bytes() for width in (64, 96)]
    (out / "in.ts").write_bytes(b"".join(parts))
    with pytest.raises(BrokenVideoError, match="64 x 48 to 96 x 48 at second"):
        upscale_video(out / "in.ts", out / "result.mp4", bicubic, (128, 96))
    assert len(read(out / "result.part.mp4")[0]) == 5


def test_names(source, out):
    with pytest.raises(ValueError, match=r"result.gif ends in '.gif'.*\.mp4, \.mov, \.mkv, \.webm"):
        upscale_video(source, out / "result.gif", bicubic, (128, 96))
    with pytest.raises(ValueError, match=r"source.mp4 is the source itself"):
        upscale_video(source, source.parent / ".." / "in" / "source.mp4", bicubic, (128, 96))
    with pytest.raises(FileNotFoundError, match="make it first"):
        upscale_video(source, out / "absent" / "result.mp4", bicubic, (128, 96))
    with pytest.raises(ValueError, match="0 x 96"):
        upscale_video(source, out / "result.mp4", bicubic, (0, 96))
    with pytest.raises(ValueError, match="nonsense is not in this build"):
        upscale_video(source, out / "result.mp4", bicubic, (128, 96), codec="nonsense")
    (out / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder.mp4"):
        upscale_video(source, out / "folder.mp4", bicubic, (128, 96))
    assert leftovers(out) == ["folder.mp4"]
    odd = out / "a: b%03d 'c'.mp4"
    upscale_video(source, odd, bicubic, (128, 96))
    assert upscale_video(odd, out / "again.mp4", identity, (128, 96)).frames == 12


def test_no_permission(source, out, monkeypatch):
    out.chmod(0o500)
    if os.access(out, os.W_OK):  # root may write everywhere

        def refuse(*arguments):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    try:
        with pytest.raises(PermissionError, match=r"nothing can be written into .*Permission denied.*choose another folder"):
            upscale_video(source, out / "result.mp4", bicubic, (128, 96))
        assert leftovers(out) == []
    finally:
        out.chmod(0o700)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_disk_full(source, out, suffix):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", out], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(OSError, match=rf"result{suffix} could not be written after \d+ frames: No space left.*make room") as caught:
            upscale_video(source, out / f"result{suffix}", bicubic, (128, 96), crf=0)
        assert caught.value.errno == 28 and leftovers(out) == []
    finally:
        subprocess.run(["umount", out], check=True)


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from torch.nn import functional as F
from tessera.models.upscale.video import upscale_video

torch.set_num_threads(1)
upscale_video(sys.argv[1], sys.argv[2], lambda frames: F.interpolate(frames, scale_factor=2, mode="bicubic"), (1280, 720))
# Linux hands ru_maxrss on to a child, so that it may be the peak of the tests.
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
print(own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_depend_on_length(run_python, out, monkeypatch):
    # glibc would keep freed frames of this size in its heap, whose holes make some runs 5 % larger than others.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    peaks: dict[int, list[int]] = {20: [], 200: []}
    for count, runs in ((20, 3), (200, 1)):
        clip(out / f"in{count}.mp4", count, 640, 360, options={"preset": "ultrafast"})
        for _ in range(runs):
            peaks[count].append(int(run_python("-c", MEMORY, str(out / f"in{count}.mp4"), str(out / f"result{count}.mp4"))))
    assert max(peaks[200]) <= 1.02 * max(peaks[20]), peaks
