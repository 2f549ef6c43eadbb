"""The transparent video nodes through the queue of real ComfyUI, old and new: files are read by FFmpeg's program and Pillow."""

from __future__ import annotations

import io
import json
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

av = pytest.importorskip("av")

from conftest import _installed  # noqa: E402
from test_transparent_video import COUNT, HEIGHT, WIDTH, clip, ffprobe, independent, needs_ffmpeg, over, placed, psnr, written  # noqa: E402

from tessera.cli.comfy_client import PromptFailedError, PromptRefusedError  # noqa: E402
from tessera.cli.comfy_server import ComfyServer  # noqa: E402
from tessera.models.layers.video_reader import load  # noqa: E402
from tessera.models.layers.video_writer import CLIP_FORMATS as FORMATS  # noqa: E402
from tessera.models.media.sound import Sound  # noqa: E402

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

HERE = Path(__file__).parent
FRAMES = torch.stack(clip()).double().numpy()
WIDGETS = {
    "ProRes 4444": {},
    "VP9 WebM": {"format.crf": 14},
    "animated WebP": {"format.lossless": True, "format.quality": 90},
    "APNG": {"format.bits": "16"},
    "FFV1": {"format.bits": "16"},
    "PNG sequence": {"format.bits": "16"},
}


def base(server: ComfyServer) -> Path:
    assert server._base is not None
    return server._base


@pytest.fixture
def server(any_comfy: ComfyServer) -> ComfyServer:
    """With a clip in its input folder: 16-bit PNG files and a sound as long."""
    if not (base(any_comfy) / "input" / "shots" / "take").exists():
        folder = base(any_comfy) / "input" / "shots"
        folder.mkdir()
        tone = torch.sin(torch.arange(48000 * COUNT // 24) / 48000 * 440 * 6.2832)[None] * 0.4
        written(folder, "PNG sequence", rate=Fraction(30000, 1001), bits=16, sound=Sound(tone, 48000)).rename(folder / "take")
    return any_comfy


def load_node(file="shots/take/", **changes):
    settings = {"file": file, "channels": "RGBA", "alpha": "auto", "start": 0, "frames": 0, **changes}
    return {"class_type": "TesseraLoadTransparentVideo", "inputs": settings}


def save_node(format, images, **changes):
    settings = {"images": images, "filename_prefix": f"{format}/take", "fps": 29.97, "format": format, "alpha": "straight"}
    return {"class_type": "TesseraSaveTransparentVideo", "inputs": {**settings, **WIDGETS.get(format, {}), **changes}}


def saved(server, outputs, node) -> Path:
    (entry,) = outputs[node]["tessera_files"]
    assert entry["type"] == "output"
    return base(server) / "output" / entry["subfolder"] / entry["filename"]


def annotated(server, path) -> str:
    """A file of the output folder, as ComfyUI names it to loaders."""
    return f"{path.relative_to(base(server) / 'output').as_posix()} [output]"


@needs_ffmpeg
@pytest.mark.parametrize("format", FORMATS)
def test_a_clip_with_sound_through_the_queue(server, format):
    graph = {"1": load_node(), "2": save_node(format, ["1", 0], audio=["1", 2])}
    outputs = server.run(graph, timeout=300).outputs
    path = saved(server, outputs, "2")
    assert path.name.startswith("take_0000") and path.suffix == FORMATS[format].suffix
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []
    found = independent(path, format, 16)
    if format == "VP9 WebM":
        assert psnr(found[..., 3] - FRAMES[..., 3]) > 45
    else:
        assert np.abs(found[..., 3] - FRAMES[..., 3]).max() <= (0.51 / 255 if format == "animated WebP" else 0.7 / 1023)
    assert psnr(found[..., :3] * found[..., 3:] - FRAMES[..., :3] * FRAMES[..., 3:]) > (37 if format == "VP9 WebM" else 55)
    (entry,) = outputs["2"]["images"]
    assert outputs["2"]["animated"] == [True] and f"{WIDTH} x {HEIGHT}, {COUNT} frames at 29.97 a second" in outputs["2"]["text"][0]
    if format in ("VP9 WebM", "animated WebP", "APNG"):
        assert server.fetch(entry) == path.read_bytes()
        assert (FORMATS[format].sound is None) == ("the sound was left out" in outputs["2"]["text"][0]) or format == "VP9 WebM"
    else:  # what browsers do not play has a small WebM beside it
        assert entry["type"] == "temp" and entry["filename"].endswith(".webm")
        with av.open(io.BytesIO(server.fetch(entry))) as container:
            assert container.streams.video[0].metadata["alpha_mode"] == "1" and len(list(container.decode(video=0))) == COUNT
    if format in ("ProRes 4444", "VP9 WebM", "FFV1"):
        streams = {stream["codec_type"]: stream for stream in ffprobe(path)["streams"]}
        assert float(Fraction(streams["video"]["avg_frame_rate"])) == pytest.approx(30000 / 1001, rel=1e-4) and "audio" in streams
        tags = {key.lower(): value for key, value in ffprobe(path)["format"]["tags"].items()}
        assert json.loads(tags["prompt"])["2"]["class_type"] == "TesseraSaveTransparentVideo"
    elif format == "PNG sequence":
        assert (path / "sound.wav").is_file() and json.loads(Image.open(path / "00000.png").text["prompt"]).keys() == graph.keys()
    # A part of what was written, by the other node.
    again = {"3": load_node(annotated(server, path), start=1, frames=3)}
    again["4"] = save_node("PNG sequence", ["3", 0], audio=["3", 2], filename_prefix="again/x")
    outputs = server.run(again, timeout=300).outputs
    assert "straight alpha" in outputs["3"]["text"][0]
    back = saved(server, outputs, "4")
    assert psnr(independent(back, "PNG sequence", 16)[..., 3] - FRAMES[1:4, ..., 3]) > 45
    sound = load(back).sound()
    assert (sound is None) == (FORMATS[format].sound is None)
    if sound is not None:
        assert abs(sound.samples.shape[1] / sound.rate - 3 * 1001 / 30000) < 0.03


def test_picture_and_mask(server):
    """As core's Load Image gives them: the mask hides. One without transparency, whose mask is 64 x 64, is opaque."""
    frame = (FRAMES[0] * 255).round().astype(np.uint8)
    Image.fromarray(frame).save(base(server) / "input" / "cut.png")
    Image.fromarray(frame[..., :3]).save(base(server) / "input" / "opaque.png")
    for name, alpha in (("cut", frame[..., 3]), ("opaque", np.full((HEIGHT, WIDTH), 255))):
        graph = {"1": {"class_type": "LoadImage", "inputs": {"image": f"{name}.png"}}}
        graph["2"] = save_node("PNG sequence", ["1", 0], mask=["1", 1], **{"format.bits": "8"})
        path = saved(server, server.run(graph, timeout=300).outputs, "2")
        assert np.array_equal(np.asarray(Image.open(path / "00000.png"))[..., 3], alpha)
    graph["2"] = save_node("APNG", ["1", 0])
    assert "nothing is transparent: connect a mask" in server.run(graph, timeout=300).outputs["2"]["text"][0]


def test_image_and_mask_of_the_loader(server):
    """RGB for core's nodes, and a mask that joins to the same picture by core's own Join Image with Alpha, which takes 1 for hidden."""
    graph = {
        "1": load_node(channels="RGB"),
        "2": {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["1", 0], "alpha": ["1", 1]}},
        "3": save_node("PNG sequence", ["2", 0], filename_prefix="joined/x", fps=24),
        "4": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "rgb"}},
    }
    outputs = server.run(graph, timeout=300).outputs
    found = torch.stack(list(load(saved(server, outputs, "3")))).numpy()
    assert np.abs(found - FRAMES).max() < 1e-4
    assert {Image.open(io.BytesIO(server.fetch(entry))).mode for entry in outputs["4"]["images"]} == {"RGB"}


def test_premultiplied(server):
    graph = {"1": load_node(), "2": save_node("FFV1", ["1", 0], alpha="premultiplied")}
    path = saved(server, server.run(graph, timeout=300).outputs, "2")
    graph = {"3": load_node(annotated(server, path)), "4": save_node("PNG sequence", ["3", 0], filename_prefix="straight/x")}
    outputs = server.run(graph, timeout=300).outputs
    assert "premultiplied alpha" in outputs["3"]["text"][0]
    visible = FRAMES[..., 3] > 0.2
    assert np.abs(torch.stack(list(load(saved(server, outputs, "4")))).numpy() - FRAMES)[visible].max() < 1e-3


def test_layers_of_video(server):
    """Two clips over one another, and the upper alone, against Porter and Duff's formula."""
    layer = {"x": 0, "y": 0, "opacity": 1.0, "blend_mode": "normal", "ending": "hold"}
    graph = {
        "1": load_node(),
        "2": load_node(start=1, frames=2),
        "3": {"class_type": "TesseraAddVideoLayer", "inputs": {**layer, "images": ["1", 0], "name": "below"}},
        "4": {
            "class_type": "TesseraAddVideoLayer",
            "inputs": {**layer, "images": ["2", 0], "name": "above", "x": 10, "opacity": 0.5, "ending": "loop", "layers": ["3", 0]},
        },
    }
    for number, name in ((5, ""), (6, "above")):
        graph[str(number)] = {"class_type": "TesseraComposeLayeredVideo", "inputs": {"layers": ["4", 0], "layer": name, "width": 0, "height": 0}}
        graph[str(number + 2)] = save_node("PNG sequence", [str(number), 0], filename_prefix=f"layers/{number}")
    outputs = server.run(graph, timeout=300).outputs
    found = torch.stack(list(load(saved(server, outputs, "7")))).numpy()
    assert len(found) == COUNT
    for number, frame in enumerate(found):
        above = placed(FRAMES[1 + number % 2][:, : WIDTH - 10], 10, 0, WIDTH, HEIGHT, 0.5)
        expected = over(FRAMES[number], above)
        assert np.abs(frame[..., 3] - expected[..., 3]).max() < 1e-3
        assert np.abs(frame[..., :3] * frame[..., 3:] - expected[..., :3] * expected[..., 3:]).max() < 1e-3
    alone = torch.stack(list(load(saved(server, outputs, "8")))).numpy()
    assert len(alone) == 2 and np.abs(alone[1, :, 10:, 3] - FRAMES[2, :, : WIDTH - 10, 3] / 2).max() < 1e-3
    graph["6"]["inputs"]["layer"] = "beside"
    with pytest.raises(PromptFailedError, match="layer is 'beside', which is none of below, above"):
        server.run(graph, timeout=300)


def test_what_is_offered(server):
    written(base(server) / "input", "APNG").rename(base(server) / "input" / "moving.png")
    Image.new("RGB", (8, 8)).save(base(server) / "input" / "still.png")
    written(base(server) / "input", "VP9 WebM")
    widget = server.get("/object_info/TesseraLoadTransparentVideo")["TesseraLoadTransparentVideo"]["input"]["required"]["file"]
    options = widget[0] if isinstance(widget[0], list) else widget[1]["options"]
    assert {"moving.png", "clip.webm", "shots/take/"} <= set(options) and "still.png" not in options and widget[1]["video_upload"]


REFUSED = {
    "missing": ({"1": load_node("absent.mov")}, "file is 'absent.mov', which is not in ComfyUI's input folder; upload it"),
    "outside": ({"1": load_node("../models/")}, "file is '../models/', which lies outside ComfyUI's folders"),
    "absolute": ({"1": load_node("/etc/hostname")}, "which lies outside ComfyUI's folders"),
    "webp": ({"2": save_node("animated WebP", ["1", 0], alpha="premultiplied")}, "animated WebP holds straight alpha only; use straight"),
    "apng": ({"2": save_node("APNG", ["1", 0], alpha="premultiplied")}, "APNG holds straight alpha only; use straight"),
    "sequence": ({"2": save_node("PNG sequence", ["1", 0], alpha="premultiplied")}, "PNG sequence holds straight alpha only; use straight"),
    "format": ({"2": save_node("GIF", ["1", 0])}, "format is not known; use 'ProRes 4444', 'VP9 WebM'"),
    "bits": ({"2": save_node("FFV1", ["1", 0], **{"format.bits": "12"})}, "format.bits is '12'; use 8 or 16"),
    "fps": ({"2": save_node("FFV1", ["1", 0], fps=0)}, "fps is 0.0; use a number from 0.01 to 1000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_known_is_refused_before_the_run(server, case):
    changes, words = REFUSED[case]
    with pytest.raises(PromptRefusedError) as error:
        server.queue({"1": load_node(), "2": save_node("FFV1", ["1", 0]), **changes})
    assert words in str(error.value)


PREFIXES = {"v1.2/take.v3": "v1.2/take.v3", "ümlaut/日本 %width%x%height%": f"ümlaut/日本 {WIDTH}x{HEIGHT}", "slash/": "slash", "a/./b/../c": "a/c"}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(server, prefix):
    """Named as core's Save Image does; and numbered on, also where that would begin at 1 again. Dots are in names of folders as in those of files."""
    small = {"class_type": "EmptyImage", "inputs": {"width": WIDTH, "height": HEIGHT, "batch_size": 1, "color": 0}}
    for number in (1, 2):
        graph = {"1": {**small, "inputs": {**small["inputs"], "color": number}}}
        for node, format in (("2", "PNG sequence"), ("3", "APNG")):
            graph[node] = save_node(format, ["1", 0], filename_prefix=f"{node}/{prefix}", **{"format.bits": "8"})
        graph["4"] = {"class_type": "TesseraLayersFromImages", "inputs": {"image": ["1", 0], "names": "", "trim": False, "width": 0, "height": 0}}
        graph["5"] = {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["4", 0], "filename_prefix": f"5/{prefix}", "format": "png"}}
        outputs = server.run(graph, timeout=300).outputs
        for node, suffix in (("2", ""), ("3", ".png"), ("5", "")):
            path = saved(server, outputs, node)
            assert path == base(server) / "output" / node / f"{PREFIXES[prefix]}_{number:05}_{suffix}" and path.exists()


def everything(server: ComfyServer) -> set[Path]:
    """In the server's folders, and what the test's own prefix would name outside them."""
    inside = (path for folder in ("input", "output", "temp") for path in (base(server) / folder).rglob("*") if path.is_file())
    return {*inside, *base(server).parent.glob("tessera_out*")}


FAILING = {
    "outside": ({"2": save_node("FFV1", ["1", 0], filename_prefix="../../tessera_out")}, "leaves the output folder"),
    "masks": ({"2": save_node("FFV1", ["1", 0], mask=["4", 1])}, "mask has 2 frames and images 5; give one for all, or one each"),
    "start": ({"1": load_node(start=9)}, "start is 9, and shots/take/ has no more frames than that"),
    "broken": ({"1": load_node("words.mov")}, "words.mov is no video, or its beginning or end is missing"),
}


@pytest.mark.parametrize("case", FAILING)
def test_one_message_and_nothing_written(server, case):
    (base(server) / "input" / "words.mov").write_bytes(b"words " * 100)
    changes, words = FAILING[case]
    before = everything(server)
    with pytest.raises((PromptFailedError, PromptRefusedError), match=words):
        server.run({"1": load_node(), "2": save_node("FFV1", ["1", 0]), "4": load_node(frames=2), **changes}, timeout=300)
    assert everything(server) == before


def test_a_disk_that_is_full(server):
    folder = base(server) / "output" / "small"
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(PromptFailedError, match="No space left on device; make room there or choose another folder"):
            server.run({"1": load_node(), "2": save_node("ProRes 4444", ["1", 0], filename_prefix="small/x")}, timeout=300)
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)


# In process


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def results(request, package_path) -> dict[str, dict]:
    install = _installed(old=request.param)
    command = [install.python, HERE / "comfy_transparent_video.py", install.path, package_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize(("case", "total"), [("load", 5), ("compose", 6), ("webm", 6), ("mov", 12)])
def test_a_bar_that_can_be_stopped(results, case, total):
    """One step a frame: those that are left out at the beginning count, and those of the preview that a browser plays."""
    line = results[case]
    assert line["shown"] == [[value, total] for value in range(1, total + 1)] and line["error"] is None
    shown, error = line["stopped"]
    assert shown[-1][0] == (8 if case == "mov" else 2) and error == "InterruptProcessingException"
    assert line["files"] == (["out_00003_.mov"] if case == "mov" else [])


def test_a_changed_picture_of_a_sequence_is_noticed(results):
    """And no picture is opened again to offer the choices, but for that one."""
    first, second, third = results["pictures"]["prints"]
    assert first == second != third
    assert results["pictures"]["choices"][0] == results["pictures"]["choices"][2] and "take/" in results["pictures"]["choices"][0]
    assert results["pictures"]["read"] == ["0.png", "1.png", "2.png", "asked", "asked", "1.png", "asked"]


def test_a_clip_that_memory_cannot_hold(results):
    """A WebP of two pictures, of which one lasts hours: refused at once, and its beginning can be loaded."""
    assert re.match(r"16777216 frames of 512 x 512 are 65536 GB, and this machine has \d+; take a part of them", results["memory 0"]["error"])
    assert results["memory 1"]["error"] is None
