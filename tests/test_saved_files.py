"""What a workflow saved goes below a folder of the user's: nothing is lost, written over, or written elsewhere."""

from __future__ import annotations

import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

import pytest

from tessera.cli import saved_files
from tessera.cli.comfy_client import ComfyClient
from tessera.cli.saved_files import open_staging, place

PYTHON = re.compile(r"Traceback|\[Errno|\w+Error\b")  # words of Python's that no user should read


def put(staged: Path, *names: str, text: str = "new") -> None:
    for name in names:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(text)


def found(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([], ["pic_00001_.png", "a/pic_00001_.png"], ["pic_00001_.png", "a/pic_00001_.png"]),
        ([], [".mine/vae_00001_.safetensors", ".vae_00001_.safetensors"], [".mine/vae_00001_.safetensors", ".vae_00001_.safetensors"]),
        # The rule of ComfyUI's get_save_image_path: on from the highest number of the prefix, whatever the ending.
        (["pic_00001_.png"], ["pic_00001_.png", "pic_00002_.png"], ["pic_00002_.png", "pic_00003_.png"]),
        (["pic_00007_.png"], ["pic_00001_.png", "pic_00002_.png"], ["pic_00008_.png", "pic_00009_.png"]),
        (["c_00001_.mp4"], ["c_00001_.mp4", "c_00001_.png"], ["c_00002_.mp4", "c_00002_.png"]),
        (["pic_00001_.png"], ["pictures_00001_.png", "a_pic_00001_.png"], ["pictures_00001_.png", "a_pic_00001_.png"]),
        (["a/pic_00001_.png"], ["a/pic_00001_.png", "b/pic_00001_.png"], ["a/pic_00002_.png", "b/pic_00001_.png"]),
        (["pic_99999_.png"], ["pic_00001_.png"], ["pic_100000_.png"]),
        (["x.json"], ["x.json", "y.json"], ["x_00001_.json", "y.json"]),
        (["x.json", "x_00001_.json"], ["x.json"], ["x_00002_.json"]),
        (["é😀_00001_.png"], ["é😀_00001_.png"], ["é😀_00002_.png"]),
        (["v1.5_00001_.png"], ["v1.5_00001_.png"], ["v1.5_00002_.png"]),
    ],
)
def test_nothing_is_written_over(tmp_path, old, new, expected):
    put(tmp_path, *old, text="old")
    staged = open_staging(tmp_path)
    put(staged, *new)
    placed = place(staged, tmp_path, [])
    assert found(tmp_path) == dict.fromkeys(old, "old") | dict.fromkeys(expected, "new")
    assert sorted(placed) == sorted(tmp_path / name for name in expected)


def test_a_folder_goes_as_one(tmp_path):
    """The second one is not mixed with the first, and the names in it stay."""
    for index in range(2):
        staged = open_staging(tmp_path)
        put(staged, "f/l_00001_/layers.json", "f/l_00001_/0_00001_.png", text=str(index))
        assert place(staged, tmp_path, [PurePosixPath("f/l_00001_")]) == [tmp_path / f"f/l_0000{index + 1}_"]
    assert found(tmp_path) == {f"f/l_0000{i + 1}_/{name}": str(i) for i in range(2) for name in ("layers.json", "0_00001_.png")}


def test_overwrite(tmp_path):
    put(tmp_path, "pic_00001_.png", "pic_00002_.png", "l_00001_/0.png", "l_00001_/1.png", text="old")
    staged = open_staging(tmp_path)
    put(staged, "pic_00001_.png", "l_00001_/0.png")
    place(staged, tmp_path, [PurePosixPath("l_00001_")], overwrite=True)
    assert found(tmp_path) == {"pic_00001_.png": "new", "pic_00002_.png": "old", "l_00001_/0.png": "new"}


def test_what_may_be_unfinished_is_called_so(tmp_path):
    """What no node reported when a run did not end. Files that a writer has not even named are left out, reported ones with a dot are not."""
    staged = open_staging(tmp_path)
    put(staged, "a/pic_00001_.png", "clip_00001_.mp4", ".hidden_00001_.png", ".mine/model.v1_00001_.safetensors")
    put(staged, ".0f0f0f0f0f0f0f0f.part", "a/.1f1f1f1f1f1f1f1f.part/0.png", ".clip.0a1b2c3d.mp4")
    place(staged, tmp_path, [PurePosixPath("a/pic_00001_.png"), PurePosixPath(".hidden_00001_.png")], ended=False)
    names = ["a/pic_00001_.png", "clip_00001_.part.mp4", ".hidden_00001_.png", ".mine/model.v1_00001_.part.safetensors"]
    assert found(tmp_path) == dict.fromkeys(names, "new")


def test_runs_at_the_same_time(tmp_path):
    """Each claims its names: nothing is lost, whoever is first."""
    stages = [open_staging(tmp_path) for _ in range(8)]
    for index, staged in enumerate(stages):
        put(staged, *(f"pic_{number:05}_.png" for number in range(1, 41)), "l_00001_/0.png", text=str(index))
    threads = [threading.Thread(target=place, args=(staged, tmp_path, [PurePosixPath("l_00001_")])) for staged in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found(tmp_path).values()) == sorted(str(index) for index in range(8) for _ in range(41))
    assert len(list(tmp_path.glob("l_*"))) == 8


def test_what_cannot_be_moved_is_named(tmp_path):
    put(tmp_path, "a")  # where a folder has to be
    staged = open_staging(tmp_path)
    put(staged, "a/pic_00001_.png", "b/pic_00001_.png")
    with pytest.raises(OSError, match=rf"a/pic_00001_.png cannot be moved .*is in {re.escape(str(staged))}") as error:
        place(staged, tmp_path, [])
    assert not PYTHON.search(str(error.value))
    assert (staged / "a/pic_00001_.png").read_text() == "new" and (staged / "b/pic_00001_.png").read_text() == "new"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_to(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"name another folder with --output") as error:
        open_staging(tmp_path / place)
    assert place in str(error.value) and not PYTHON.search(str(error.value))


OUTSIDE = [
    ("x.png", "../up"),
    ("../x.png", ""),
    ("/etc/x.png", ""),
    ("x.png", "/etc"),
    ("..\\x.png", ""),
    ("x.png", "..\\up"),
    ("x.png", "a/../../b"),
    ("C:\\x.png", ""),
]


@pytest.mark.parametrize(("filename", "subfolder"), OUTSIDE)
def test_a_server_cannot_name_a_place_outside(filename, subfolder):
    with pytest.raises(ValueError, match="outside its output folder"):
        saved_files.relative_path({"filename": filename, "subfolder": subfolder})


def test_a_file_that_is_saved_and_shown_is_one():
    file = {"filename": "x.webm", "subfolder": "", "type": "output"}
    outputs = {"1": {"images": [file], "animated": [True], "tessera_files": [file], "text": ["x.webm"]}, "2": {"images": [file | {"type": "temp"}]}}
    assert list(saved_files.entries(outputs)) == [("1", file), ("2", file | {"type": "temp"})]


@pytest.fixture
def stand_in():
    """A server that gives out what is in `files`, and says that it gives twice as much of "half"."""
    there = {"pic.png": b"picture", "half.png": b"half"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            query = parse_qs(urlsplit(self.path).query)
            name = "/".join([*query.get("subfolder", []), query["filename"][0]])
            data = there.get(name)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"") * (2 if name == "half.png" else 1)))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ComfyClient(f"127.0.0.1:{server.server_port}"), there
    server.shutdown()


def test_the_client_saves_what_is_whole_and_names_the_rest(stand_in, tmp_path):
    client, there = stand_in
    there |= {"folder/0.png": b"0", "folder/1.png": b"1", "folder2/0.png": b"0"}
    put(tmp_path, "pic.png", text="old")
    entry = {"type": "output", "subfolder": ""}
    bad = [{**entry, "filename": name, "subfolder": place} for name, place in OUTSIDE]
    lacking = {**entry, "filename": "folder2", "files": ["0.png", "2.png"]}
    escaping = {**entry, "filename": "folder3", "files": ["../../x"]}
    outputs = {
        "1": {"images": [{**entry, "filename": "pic.png"}, {**entry, "filename": "half.png"}, *bad], "animated": [True], "text": ["a"]},
        "2": {"files": [{**entry, "filename": "folder", "files": ["0.png", "1.png"]}, lacking, escaping, {**entry, "filename": "none.png"}]},
        "3": {"images": [{**entry, "filename": "preview.png", "type": "temp"}]},
    }
    saved, left = client.save(outputs, tmp_path)
    assert found(tmp_path) == {"pic.png": "old", "pic_00001_.png": "picture", "folder/0.png": "0", "folder/1.png": "1"}
    assert saved == [tmp_path / "folder", tmp_path / "pic_00001_.png"] and len(left) == 1 + len(OUTSIDE) + 3
    assert "output/half.png only in part" in left[0] and all("outside its output folder" in text for text in left[1 : 1 + len(OUTSIDE)])
    assert left[-3].startswith("output/folder2/2.png stays on") and "outside" in left[-2] and left[-1].startswith("output/none.png stays on")
    assert [path.name for path in tmp_path.parent.glob("x*")] == []


def test_a_full_disk_is_not_taken_for_a_dead_server(stand_in, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        stand_in[0].save({"1": {"images": [{"type": "output", "subfolder": "", "filename": "pic.png"}]}}, tmp_path)
    assert not list(tmp_path.iterdir())
