"""The video upscaling nodes through the queue of real ComfyUI, old and new: what was written is read by FFmpeg, PyAV and a formula.

The upscale model is a network of zeros, which its architecture (SRVGGNetCompact) adds to the nearest pixel: each pixel becomes four.
"""

from __future__ import annotations

import json
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

av = pytest.importorskip("av")

from test_upscale_video import LOSSLESS, TAGS, clip, leftovers, picture, plane, probe, read, sound_packets, times, write  # noqa: E402

from tessera.cli.comfy_client import PromptFailedError, PromptRefusedError  # noqa: E402
from tessera.cli.comfy_server import ComfyServer  # noqa: E402

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

MODEL = "nearest_x2.safetensors"
TICKS = [0, 40, 80, 200, 240, 280, 290, 400]  # milliseconds: a rate that varies


@pytest.fixture
def server(any_comfy: ComfyServer) -> ComfyServer:
    file = base(any_comfy) / "models" / "upscale_models" / MODEL
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        shapes = {"body.0.weight": (8, 3, 3, 3), "body.0.bias": (8,), "body.1.weight": (8,), "body.2.weight": (8, 8, 3, 3), "body.2.bias": (8,)}
        shapes |= {"body.3.weight": (8,), "body.4.weight": (12, 8, 3, 3), "body.4.bias": (12,)}
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    return any_comfy


def base(server: ComfyServer) -> Path:
    assert server._base is not None
    return server._base


def source(server: ComfyServer, name: str = "in.mp4", **more) -> Path:
    """Eight frames of 64 x 48 with sound, tags and uneven times in the server's input folder."""
    frames = (picture(64, 48, number) for number in range(8))
    settings = {"pts": TICKS, "time_base": Fraction(1, 1000), "tags": TAGS["bt709"], "sound": 0.44, **more}
    return write(base(server) / "input" / name, frames, **settings)


def video_graph(source, **changes):
    """A node that gives VIDEO, the upscaling node, and Save Video."""
    settings = {"size": "factor", "size.factor": 2.0, "tile": 64, "overlap": 16, "crf": 10, **changes}
    return {
        "1": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": MODEL}},
        **source,
        "5": {"class_type": "TesseraPatchUpscaleVideoNetwork", "inputs": {"upscale_model": ["1", 0], "video": ["2", 0], **settings}},
        "6": {"class_type": "SaveVideo", "inputs": {"video": ["5", 0], "filename_prefix": "v/up", "format": "mp4", "codec": "auto"}},
    }


def file_graph(file, **changes):
    settings = {"size": "factor", "size.factor": 2.0, "tile": 64, "overlap": 16, "crf": 10, "container": "mp4", "filename_prefix": "f/up", **changes}
    return {
        "1": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": MODEL}},
        "5": {"class_type": "TesseraPatchUpscaleVideoFile", "inputs": {"upscale_model": ["1", 0], "file": file, **settings}},
    }


def load(file):
    return {"2": {"class_type": "LoadVideo", "inputs": {"file": file}}}


def saved(server, outputs, node, tmp_path):
    (entry,) = outputs[node]["images"]
    assert outputs[node]["animated"] == [True] and entry["type"] == "output"
    path = tmp_path / entry["filename"]
    path.write_bytes(server.fetch(entry))
    return path


def assert_pixels_are_doubled(before, after):
    """Up to the encoder, and the rounding on the way to R'G'B' and back."""
    for one, two in zip(before, after, strict=True):
        assert np.abs(plane(one, 0).repeat(2, 0).repeat(2, 1).astype(float) - plane(two, 0)).mean() < 2


def test_video_to_video(server, tmp_path):
    """Picture, times, colour tags and sound of a loaded file, read from what the stock Save Video wrote."""
    before = source(server)
    outputs = server.run(video_graph(load("in.mp4")), timeout=600).outputs
    after = saved(server, outputs, "6", tmp_path)
    assert_pixels_are_doubled(read(before)[0], read(after)[0])
    assert times(after) == times(before) and sound_packets(after) == sound_packets(before)
    line = outputs["5"]["text"][0]
    assert "64 x 48 to 128 x 96: 8 frames, 1 x 2x network, 1 patch a frame, h264 yuv420p, sound copied" in line
    found = {stream["codec_type"]: stream for stream in probe(after)["streams"]}
    assert (found["video"]["width"], found["video"]["height"], found["video"]["nb_read_frames"]) == (128, 96, "8")
    assert {found["video"][tag] for tag in ("color_space", "color_transfer", "color_primaries")} == {"bt709"}
    assert found["audio"]["codec_name"] == "aac"


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_file_to_file(server, tmp_path, container):
    before = source(server)
    folder = base(server) / "output" / "f"
    outputs = server.run(file_graph("in.mp4", container=container, **{"filename_prefix": f"f/{container}/up"}), timeout=600).outputs
    after = saved(server, outputs, "5", tmp_path)
    assert leftovers(folder / container) == [f"up_00001_.{container}"]
    assert_pixels_are_doubled(read(before)[0], read(after)[0])
    assert sound_packets(after) == sound_packets(before)
    assert max(abs(a - b) for a, b in zip(times(before), times(after), strict=True)) <= (0 if container == "mp4" else Fraction(1, 40))
    with av.open(after) as written:
        tags = {key.lower(): value for key, value in written.metadata.items()}
        assert json.loads(tags["prompt"])["5"]["class_type"] == "TesseraPatchUpscaleVideoFile"


def test_made_of_pictures(server, tmp_path):
    """No file behind it: the pictures themselves are taken, tagged as what ComfyUI's pictures are, and their sound."""
    before = source(server, pts=None, time_base=Fraction(1, 25), sound=0.32)
    nodes = {
        "3": {"class_type": "LoadVideo", "inputs": {"file": "in.mp4"}},
        "4": {"class_type": "GetVideoComponents", "inputs": {"video": ["3", 0]}},
        "2": {"class_type": "CreateVideo", "inputs": {"images": ["4", 0], "audio": ["4", 1], "fps": 25.0}},
    }
    after = saved(server, server.run(video_graph(nodes), timeout=600).outputs, "6", tmp_path)
    frames, context = read(after)
    assert_pixels_are_doubled(read(before)[0], frames)
    assert [int(getattr(context, name)) for name in ("colorspace", "color_range", "color_primaries", "color_trc")] == [1, 1, 1, 13]
    assert times(after) == [Fraction(number, 25) for number in range(8)]
    with av.open(after) as written:
        samples = sum(frame.samples for frame in written.decode(audio=0))
    assert abs(samples / 48000 - 0.32) < 0.05


def test_trimmed(server, tmp_path):
    """Trim Video only notes the times; what comes out is that part, its sound with it."""
    before = clip(base(server) / "input" / "long.mp4", 20, sound=0.8)
    nodes = {
        "3": {"class_type": "LoadVideo", "inputs": {"file": "long.mp4"}},
        "2": {"class_type": "Video Slice", "inputs": {"video": ["3", 0], "start_time": 0.2, "duration": 0.24, "strict_duration": False}},
    }
    after = saved(server, server.run(video_graph(nodes), timeout=600).outputs, "6", tmp_path)
    assert_pixels_are_doubled(read(before)[0][5:11], read(after)[0])
    kept, whole = sound_packets(after), sound_packets(before)
    assert kept == whole[whole.index(kept[0]) :][: len(kept)] and abs(len(kept) * 1024 / 48000 - 0.24) < 0.05


def test_one_pixel(server, tmp_path):
    write(base(server) / "input" / "dot.mkv", [picture(1, 1, 0, "yuv444p")], codec="ffv1", options={})
    outputs = server.run(file_graph("dot.mkv", filename_prefix="dot/up"), timeout=600).outputs
    assert [(frame.width, frame.height) for frame in read(saved(server, outputs, "5", tmp_path))[0]] == [(2, 2)]


def test_files_are_offered(server):
    (base(server) / "input" / "deeper").mkdir(exist_ok=True)
    source(server, "deeper/offered.mp4")
    widget = server.get("/object_info/TesseraPatchUpscaleVideoFile")["TesseraPatchUpscaleVideoFile"]["input"]["required"]["file"]
    assert "deeper/offered.mp4" in (widget[0] if isinstance(widget[0], list) else widget[1]["options"])


REFUSED = {
    "missing": ({"file": "absent.mp4"}, "file is 'absent.mp4', which is not in ComfyUI's input folder; copy it there"),
    "outside": ({"file": "../models/x.mp4"}, "file is '../models/x.mp4', which lies outside ComfyUI's folders"),
    "absolute": ({"file": "/etc/hostname"}, "which lies outside ComfyUI's folders"),
    "overlap": ({"overlap": 40}, "overlap is 40 and tile 64; use at most 32"),
    "size": ({"size": "huge"}, "size is not known"),
    "container": ({"container": "gif"}, "container is 'gif'; use mp4, mkv, mov or webm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_known_is_refused_before_the_run(server, case):
    changes, words = REFUSED[case]
    source(server)
    with pytest.raises(PromptRefusedError) as error:
        server.queue(file_graph(**{"file": "in.mp4", **changes}))
    assert words in str(error.value)


def broken(path: Path, name: str) -> None:
    if name == "cut":
        whole = clip(path.with_name("whole.mp4"), 40, options={**LOSSLESS, "g": "5"}, container_options={"movflags": "faststart"})
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    elif name == "empty":
        with av.open(path, "w") as container:
            video = container.add_stream("libx264", rate=25)
            video.width, video.height = 64, 48
            container.start_encoding()
    else:
        path.write_bytes(b"words " * 100)


BROKEN = {
    "cut": r"cut.mp4 is .*cut off at second \d\.\d\d.*the \d+ frames before that are finished, in .*up\.\w+\.part\.mp4",
    "empty": r"empty.mp4.*",
    "words": r"words.mp4 is no video, or its beginning or end is missing",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(server, name):
    """One clear message; the finished part of a file that was cut off keeps a name of its own."""
    broken(base(server) / "input" / f"{name}.mp4", name)
    with pytest.raises(PromptFailedError, match=BROKEN[name]):
        server.run(file_graph(f"{name}.mp4", filename_prefix=f"{name}/up"), timeout=600)
    folder = base(server) / "output" / name
    left = leftovers(folder) if folder.exists() else []
    assert [entry.split(".", 2)[2] for entry in left] == (["part.mp4"] if name == "cut" else [])


def test_places_that_cannot_be_written(server):
    source(server)
    with pytest.raises(PromptRefusedError, match="leaves the output folder"):
        server.run(file_graph("in.mp4", filename_prefix="../../up"), timeout=600)
    folder = base(server) / "output" / "locked"
    folder.mkdir(exist_ok=True)
    # Root, who runs many of these machines, may write whatever the permissions say.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=16k", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk that cannot be written")
    try:
        with pytest.raises(PromptFailedError, match=r"nothing can be written into .*locked.*choose another folder"):
            server.run(file_graph("in.mp4", filename_prefix="locked/up"), timeout=600)
        assert leftovers(folder) == []
    finally:
        subprocess.run(["umount", folder], check=True)
