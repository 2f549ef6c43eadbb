"""Diffusion upscaling by several servers, with stand-ins whose pictures follow a formula, and with real ComfyUI."""

from __future__ import annotations

import io
import json
import threading
import time
from email import message_from_bytes
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from conftest import _installed
from PIL import Image

av = pytest.importorskip("av")

from tessera.__main__ import main  # noqa: E402
from tessera.cli import comfy_client, diffusion_workflow  # noqa: E402
from tessera.cli.chunks import AHEAD, Chunks  # noqa: E402
from tessera.cli.comfy_server import ComfyServer  # noqa: E402
from tessera.models.upscale.video import upscale_video  # noqa: E402
from tessera.models.upscale.video_reader import Clip  # noqa: E402

NODE = "TesseraPatchUpscaleVideo"


def workflow(**changes) -> dict[str, dict]:
    """Two steps of the default model. The frames of node 4, and node 7, are not wanted."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tessera_shapes_t2v.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": "tessera_shapes_vae.safetensors"}},
        "3": {"class_type": "TesseraShapesPrompt", "inputs": {"text": "red disc right"}},
        "4": {"class_type": "LoadVideo", "inputs": {"file": "not there.mp4"}},
        "6": {"class_type": "GetVideoComponents", "inputs": {"video": ["4", 0]}},
        "5": {
            "class_type": NODE,
            "inputs": {
                **{"model": ["1", 0], "vae": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "image": ["6", 0]},
                **{"size": "megapixels", "size.megapixels": 8.0, "denoise": 0.5, "steps": 4, "cfg": 1.0, "sampler_name": "euler"},
                **{"scheduler": "simple", "seed": 1, "tile": 64, "frames": 0, "coordinates": "canvas", "fusion": "joint", "colour": "wavelet"},
                **changes,
            },
        },
        "7": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "up"}},
    }


def make_clip(file: Path, count: int = 17, width: int = 32, height: int = 32) -> Path:
    """25 frames a second of a ramp that moves, with a tone."""
    x = torch.linspace(0, 1, width).view(1, 1, width, 1)
    y = torch.linspace(0, 1, height).view(1, height, 1, 1)
    time = torch.linspace(0, 1, count).view(count, 1, 1, 1)
    frames = torch.cat([(x + y * 0 + time) / 2, (y + x * 0 + time) / 2, (x + y) / 4 + time / 2], -1)
    sound = torch.sin(torch.arange(count * 1920) / 20)[None] / 2
    upscale_video(Clip(frames, Fraction(25), sound), file, lambda x: x, (width, height), crf=1)
    return file


def decoded(file: Path, kind: str = "rgb24") -> np.ndarray:
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format=kind) for frame in container.decode(video=0)])


def sound(file: Path) -> list[bytes]:
    with av.open(str(file)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command on a clip of 17 frames; returns the exit status, what it printed, and the file."""
    source = make_clip(tmp_path / "clip.mp4")

    def run(*servers, graph=None, name="out.mp4", arguments=()):
        (tmp_path / "workflow.json").write_text(json.dumps(workflow() if graph is None else graph))
        urls = ["--servers", ",".join(servers)] if servers else []
        chunks = ["--chunk", "9", "--chunk-overlap", "4"]
        command = ["upscale", source, tmp_path / name, "--factor", "2", "--diffusion", tmp_path / "workflow.json", *urls, *chunks, *arguments]
        status = main([*map(str, command)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, tmp_path / name

    return run


# Stand-ins for ComfyUI


class Fake:
    """A server that makes frame i of a chunk a grey of (i + 1) / 16. It does what `plan` says about its n-th prompt, in order; then well."""

    def __init__(self, *plan, deep=True, nodes=True):
        self.plan, self.deep, self.nodes = list(plan), deep, nodes
        self.files, self.history, self.seen, self.begun = {}, {}, [], []
        self.dead = False
        self.before = lambda: None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if not fake.dead:
                    self.answer(fake.get(urlsplit(self.path)))

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                out = None if fake.dead else fake.post(self.path, self.headers["Content-Type"], body)
                if not fake.dead:
                    self.answer(out)

            def answer(self, out):
                status, out = out if isinstance(out, tuple) else (200, out)
                data = out if isinstance(out, bytes) else json.dumps(out).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, url):
        if url.path == "/system_stats":
            return {"system": {"comfyui_version": "9"}}
        if url.path.startswith("/object_info/"):
            name = url.path.rpartition("/")[2]
            there = (name != NODE or self.nodes) and (name != "SaveImageAdvanced" or self.deep)
            return {name: {"output_name": ["images", "audio", "fps", *(["bit_depth"] if self.deep else [])]}} if there else {}
        if url.path == "/view":
            query = parse_qs(url.query, keep_blank_values=True)
            return self.files[query["type"][0], query["subfolder"][0], query["filename"][0]]
        if url.path == "/queue":
            return {"queue_running": [], "queue_pending": []}
        return {key: entry for key, entry in self.history.items() if key == url.path.rpartition("/")[2]}

    def post(self, path, kind, body):
        if path == "/upload/image":
            parts = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body).get_payload()
            fields = {part.get_param("name", header="Content-Disposition"): part for part in parts}
            name = fields["image"].get_filename()
            assert fields["overwrite"].get_payload() == "true"
            self.files[fields["type"].get_payload(), fields["subfolder"].get_payload(), name] = fields["image"].get_payload(decode=True)
        if path == "/prompt":
            self.begun.append(path)
            self.before()
            return self.prompt(json.loads(body)["prompt"])
        return {}

    def prompt(self, graph):
        what = self.plan.pop(0) if self.plan else "well"
        number = str(len(self.begun))
        if what == "vanish":
            self.dead = True
        elif what == "refuse":
            return 400, {"error": {"message": "no", "details": "such model"}, "node_errors": {}}
        elif what == "part":
            report = {"class_type": NODE, "errors": [{"message": "bad", "details": "tile"}]}
            return {"prompt_id": number, "node_errors": {"5": report}}
        elif what != "forget":
            self.history[number] = self.done(graph, what)
        self.seen.append(graph)
        return {"prompt_id": number}

    def done(self, graph, what):
        entry = [0, "", graph, {}, ["tessera_save"]]
        if what.endswith("Error"):
            error = {"node_type": NODE, "node_id": "5", "exception_type": what, "exception_message": "on purpose"}
            return {"prompt": entry, "status": {"messages": [["execution_error", error]]}, "outputs": {}}
        frames, link = [], graph["5"]["inputs"]["image"]
        links = []
        while link is not None:
            node = graph[link[0]]
            links.append(node["inputs"]["image2"] if node["class_type"] == "ImageBatch" else link)
            link = node["inputs"].get("image1")
        for link in reversed(links):
            file = graph[graph[link[0]]["inputs"]["video"][0]]["inputs"]["file"]
            assert file.endswith(" [temp]")
            folder, _, name = file.removesuffix(" [temp]").partition("/")
            with av.open(io.BytesIO(self.files["temp", folder, name])) as container:
                frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        self.frames = frames
        saved = []
        save = graph["tessera_save"]
        assert save["class_type"] == ("SaveImageAdvanced" if self.deep else "PreviewImage")
        where = ("output", "tessera") if self.deep else ("temp", "")
        for index in range(len(frames) - (what == "few")):
            shape = (frames[0].shape[0] * 2, frames[0].shape[1] * 2, 3)
            grey = (index + 1) / 16 * (65535 if self.deep else 255)
            data = picture(np.full(shape, grey, np.uint16 if self.deep else np.uint8))
            saved.append({"filename": f"{len(self.begun)}_{index}.png", "subfolder": where[1], "type": where[0]})
            self.files[(*where, saved[-1]["filename"])] = data
        messages = [["execution_start", {"timestamp": 0}], ["execution_success", {"timestamp": 1}]]
        outputs = {} if what == "nothing" else {"tessera_save": {"images": saved}}
        return {"prompt": entry, "status": {"messages": messages}, "outputs": outputs}


def picture(codes: np.ndarray) -> bytes:
    """A PNG file of 8 or 16 bits."""
    kind = "rgb48be" if codes.dtype == np.uint16 else "rgb24"
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *codes.shape[:2], kind, Fraction(1)
    return b"".join(map(bytes, [*encoder.encode(av.VideoFrame.from_ndarray(codes, format=kind)), *encoder.encode(None)]))


def blended(count=17, chunk=9, overlap=4) -> np.ndarray:
    """The grey of each frame by hand: chunks at 0, 5 and 8, each with a weight that falls over four frames at inner ends."""
    time = np.arange(count) + 0.5
    total = weights = 0
    for start in (0, 5, 8):
        stop = start + chunk
        rise = (time - start) / overlap if start else np.ones(count)
        fall = (stop - time) / overlap if stop < count else np.ones(count)
        weight = np.clip(np.minimum(rise, fall), 0, 1)
        if start:
            weight[:start] = 0
        total = total + weight * (np.arange(count) - start + 1) / 16
        weights = weights + weight
    return total / weights


@pytest.mark.parametrize("deep", [True, False], ids=["16 bit", "8 bit"])
def test_chunks_are_cut_and_blended_by_the_formula(run, tmp_path, monkeypatch, deep):
    """Also: the frames arrive as they are, in several files; sound and rate are kept; the servers' disks are not filled."""
    monkeypatch.setattr(diffusion_workflow, "PIECE", 4000)
    one, two = Fake(deep=deep), Fake(deep=deep)
    status, text, out = run(one.url, two.url)
    assert status == 0, text
    found = decoded(out)
    assert found.shape == (17, 64, 64, 3)
    assert np.abs(found / 255 - blended()[:, None, None, None]).max() < 2.5 / 255
    assert "64 x 64, 17 frames, 3 chunks on 2 servers" in text
    assert sound(out) == sound(tmp_path / "clip.mp4") and len(sound(out)) > 10
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 25
    graphs = one.seen + two.seen
    assert len(graphs) == 3
    for graph in graphs:
        assert not {"4", "6", "7"} & set(graph)
        assert {name: value for name, value in graph["5"]["inputs"].items() if name.startswith("size")} == {"size": "factor", "size.factor": 2.0}
        assert graph["5"]["inputs"]["seed"] == 1
    assert all("tessera_joined_1" in graph for graph in graphs)
    last = max(one, two, key=lambda fake: len(fake.seen))
    theirs = decoded(tmp_path / "clip.mp4").astype(int)
    assert len(last.frames) == 9
    # A frame more or less would be 8 codes; decoders differ by 2 at the steps of this ramp's chroma.
    assert min(np.abs(np.stack(last.frames) - theirs[start : start + 9]).mean() for start in (0, 5, 8)) < 3
    assert all(data == b"" for fake in (one, two) for data in fake.files.values())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "out.mp4", "workflow.json"]


@pytest.mark.parametrize("what", ["RuntimeError", "vanish", "refuse", "part", "forget", "few", "nothing"])
def test_what_a_server_does_not_do_another_does(run, monkeypatch, what):
    monkeypatch.setattr(comfy_client, "LOOK", 0.0)
    good, bad, turn = Fake(), Fake(what), threading.Event()
    bad.before = turn.set
    good.before = lambda: turn.wait(60)  # else it might do all of them
    status, text, out = run(good.url, bad.url)
    assert status == 0, text
    assert len(bad.begun) >= 1
    assert np.abs(decoded(out) / 255 - blended()[:, None, None, None]).max() < 2.5 / 255
    assert f"failed on {bad.url} and was computed again" in text
    assert (f"{bad.url} was left out" in text) == (what in ("vanish", "refuse", "part"))
    assert len(good.seen) + len(bad.seen) >= 3


def test_a_failing_chunk_fails_the_run_after_three_attempts(run, tmp_path):
    one, two = Fake(*["RuntimeError"] * 9), Fake(*["RuntimeError"] * 9)
    status, text, _ = run(one.url, two.url)
    assert status == 1
    assert "failed 3 times" in text or "no server is left" in text
    assert f"{NODE} (node 5): on purpose" in text
    assert len(one.begun) + len(two.begun) <= 6
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "workflow.json"]


def test_what_the_workflow_does_wrong_is_not_tried_again(run):
    one = Fake("ValueError")
    status, text, out = run(one.url)
    assert status == 1 and f"{NODE} (node 5): on purpose" in text and len(one.begun) == 1 and not out.exists()


def test_what_is_finished_is_kept(run, tmp_path):
    """Two of three chunks, of which the frames before the third are final."""
    one = Fake("well", "well", "refuse")
    status, text, out = run(one.url)
    assert status == 1 and not out.exists()
    assert "no server is left" in text and "no such model" in text and "The 8 finished frames are in" in text
    assert len(decoded(tmp_path / "out.part.mp4")) == 8


def test_memory_and_disk_hold_few_chunks(run, tmp_path):
    """While the first chunk is not done, the others wait on the disk, and no more are read than is promised."""
    make_clip(tmp_path / "clip.mp4", count=77)
    slow, fast = Fake(), Fake()
    at_once, release = [], threading.Event()

    def count():
        at_once.append(len([folder for folder in tmp_path.glob(".out.*/*") if folder.is_dir()]))

    def first():
        count()
        if len(slow.begun) == 1:
            assert release.wait(60)

    def other():
        count()
        if len(fast.begun) == 3:
            release.set()

    slow.before, fast.before = first, other
    status, text, out = run(slow.url, fast.url)
    assert status == 0, text
    assert len(decoded(out)) == 77 and "15 chunks" in text
    assert max(at_once) <= AHEAD * 2


def test_one_clear_error(run, tmp_path):
    fake = Fake()
    lacking = workflow()
    del lacking["5"]
    twice = workflow() | {"9": workflow()["5"]}
    canvas = {"nodes": [], "links": [], "version": 0.4}
    for graph, message in ((lacking, "has 0 nodes of type TesseraPatchUpscaleVideo"), (twice, "has 2 nodes"), (canvas, "Export (API)")):
        status, text, _ = run(fake.url, graph=graph)
        assert status == 1 and message in text and "workflow.json" in text
    assert "127.0.0.1:9; check the address" in run(fake.url, "127.0.0.1:9")[1]
    without = Fake(nodes=False)
    assert f"{without.url} has no node {NODE}" in run(fake.url, without.url)[1]
    assert "write a video" in run(fake.url, name="out.png")[1]
    for arguments, message in (
        (["--ray"], "--ray is for networks"),
        (["--model", "bicubic"], "--model is for networks"),
        (["--workers", "2"], "--workers is 2"),
        (["--chunk", "4"], "--chunk is 4 and --chunk-overlap 4"),
        (["--diffusion", str(tmp_path / "missing.json")], "missing.json"),
    ):
        status, text, _ = run(fake.url, arguments=arguments)
        assert status == 1 and message in text, text
    assert main(["upscale", str(tmp_path / "clip.mp4"), str(tmp_path / "o.mp4"), "--factor", "2", "--servers", fake.url]) == 1
    assert not fake.begun
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "workflow.json"]


# Real ComfyUI


@pytest.mark.comfy
def test_frames_go_over_unchanged(any_comfy: ComfyServer, tmp_path, monkeypatch):
    """To the server and back with nothing in between, an odd width and several files: newer servers keep more than 8 bits."""
    deep = diffusion_workflow.takes_16_bits(any_comfy)
    assert deep == (any_comfy.version != "0.18.1")
    frames = torch.rand(5, 3, 30, 70, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(diffusion_workflow, "PIECE", 20_000)
    files = diffusion_workflow.write_frames(frames, tmp_path, deep)
    assert len(files) > 1
    for file in files:
        any_comfy.upload(file.read_bytes(), {"filename": file.name, "subfolder": "tessera", "type": "temp"})
    link, graph = diffusion_workflow.transfer_in([f"tessera/{file.name} [temp]" for file in files])
    graph["save"] = diffusion_workflow.transfer_out(link, "tessera/there", deep)
    pictures = any_comfy.run(graph).outputs["save"]["images"]
    assert len(pictures) == 5
    for frame, picture in zip(frames, pictures, strict=True):
        (tmp_path / "picture.png").write_bytes(any_comfy.fetch(picture))
        error = (diffusion_workflow.read_frame(tmp_path / "picture.png", deep) - frame) * 255
        assert error.abs().max() < (0.2 if deep else 1.01)
        assert error.mean().abs() < (0.02 if deep else 0.6)
    any_comfy.upload(b"", pictures[0])
    assert any_comfy.fetch(pictures[0]) == b""


@pytest.mark.comfy
@pytest.mark.slow
def test_one_server_or_two_or_one_that_is_killed(comfy: ComfyServer, tiny_models, run, tmp_path, monkeypatch):
    """The same chunks each time, bit by bit, and those that one gets by hand."""
    chunks: dict[str, list] = {}
    following = Chunks.next

    def noted(self, *arguments):
        chunks[name].append(following(self, *arguments))
        return chunks[name][-1]

    monkeypatch.setattr(Chunks, "next", noted)
    texts, files = {}, {}
    with ComfyServer(_installed(old=False), models=tiny_models) as second:

        def kill() -> None:
            while not second.get("/queue")["queue_running"]:
                time.sleep(0.01)
            second._process.kill()

        for name in ("alone", "both", "survived"):
            chunks[name] = []
            if name == "survived":
                threading.Thread(target=kill, daemon=True).start()
            status, texts[name], files[name] = run(comfy.url, *([] if name == "alone" else [second.url]), name=f"{name}.mp4")
            assert status == 0, texts[name]
            if name == "both":
                assert second.get("/history") and "3 chunks on 2 servers" in texts[name]
    assert f"failed on {second.url} and was computed again" in texts["survived"] and f"{second.url} was left out" in texts["survived"]
    for name in chunks:
        assert len(chunks[name]) == 3 and all(torch.equal(one, other) for one, other in zip(chunks["alone"], chunks[name], strict=True))
        assert decoded(files[name]).shape == (17, 64, 64, 3) and sound(files[name]) == sound(tmp_path / "clip.mp4")
    error = [[np.abs(theirs - ours.numpy()).mean() for ours in chunks["alone"]] for theirs in by_hand(comfy, tmp_path / "clip.mp4")]
    for index, line in enumerate(error):  # ComfyUI's decoder is another one
        assert line[index] < 3 / 255 and all(line[other] > 10 / 255 for other in range(3) if other != index), error


def by_hand(server: ComfyServer, clip: Path) -> list[np.ndarray]:
    """The three chunks as one would queue them. `(9, 3, 64, 64)` in 0..1."""
    server.upload(clip.read_bytes(), {"filename": "by_hand.mp4", "subfolder": "", "type": "input"})
    chunks = []
    for start in (0, 5, 8):
        graph = workflow(**{"size": "factor", "size.factor": 2.0, "image": ["8", 0]})
        del graph["5"]["inputs"]["size.megapixels"]
        graph["4"]["inputs"]["file"] = "by_hand.mp4"
        graph["8"] = {"class_type": "ImageFromBatch", "inputs": {"image": ["6", 0], "batch_index": start, "length": 9}}
        pictures = server.run(graph).outputs["7"]["images"]
        chunks.append(np.stack([np.asarray(Image.open(io.BytesIO(server.fetch(picture)))) for picture in pictures]).transpose(0, 3, 1, 2) / 255)
    return chunks


@pytest.mark.comfy
@pytest.mark.slow
def test_servers_of_this_machine(run, monkeypatch):
    """One is started, and again when its process is gone."""
    _installed(old=False)
    started = []
    enter = ComfyServer.__enter__

    def noted(self):
        enter(self)
        started.append(self)
        if len(started) == 1:
            threading.Thread(target=kill, args=(self,), daemon=True).start()
        return self

    def kill(server):
        while not server.get("/queue")["queue_running"]:
            time.sleep(0.01)
        server._process.kill()

    monkeypatch.setattr(ComfyServer, "__enter__", noted)
    status, text, out = run(arguments=["--workers", "1", "--chunk", "17"])
    assert status == 0, text
    assert len(started) == 2 and started[0] is started[1] and "was computed again" in text and "left out" not in text
    assert decoded(out).shape == (17, 64, 64, 3)
    assert started[0]._process.poll() is not None and not started[0]._base.exists()
