"""`python -m tessera run`: what it reads, what it saves and where, and what it says of what went wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tessera.__main__ import main
from tessera.cli import run
from tessera.cli.comfy_client import PromptRefusedError
from tessera.cli.comfy_server import ComfyServer
from tessera.cli.workflow_files import read_workflow
from tessera.models.layers import formats as files

# Words of Python's that no user should read.
PYTHON = re.compile(r"Traceback|\[Errno|NoneType|\w+Error\b|got itself in trouble|'(dict|list|str|int)' object|codec|Expecting|<class")


def image(color: int = 255, **changes) -> dict:
    return {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": color, **changes}}


def saver(node: str, prefix: str) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": [node, 0], "filename_prefix": prefix}}


TWO = {"1": image(255), "2": saver("1", "a/pic"), "3": image(0), "4": saver("3", "b/pic")}
CANVAS = {"last_node_id": 2, "nodes": [{"id": 1, "type": "EmptyImage", "widgets_values": [32, 32, 1, 0]}], "links": [], "version": 0.4}


# Reading


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + json.dumps(TWO).encode(),
        json.dumps(TWO).encode("utf-16"),
        json.dumps(TWO | {"_comment": "text", "#": [1, 2], "// later": None, "note": "text", "_meta": {"a": 1}}).encode(),
        json.dumps({"prompt": TWO, "client_id": "x"}).encode(),
        b'{"_": 1, "_": 2, ' + json.dumps(TWO).encode()[1:],
    ],
    ids=["byte order mark", "UTF-16", "comments", "a request", "two comments"],
)
def test_what_is_around_a_workflow_is_taken_off(tmp_path, data):
    (tmp_path / "w.json").write_bytes(data)
    assert read_workflow(tmp_path / "w.json") == TWO


def test_a_node_may_have_no_inputs_and_any_name(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps({"prompt": {"class_type": "A"}, "2:1": {"class_type": "B", "inputs": {"a": 1}}}))
    assert read_workflow(tmp_path / "w.json") == {"prompt": {"class_type": "A", "inputs": {}}, "2:1": {"class_type": "B", "inputs": {"a": 1}}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "no JSON file, or cut off (line 1, column 2)"),
        (json.dumps(TWO).encode()[:-9], "no JSON file, or cut off"),
        (b"\x80" * 128, "no JSON file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no JSON file"),
        (b"[" * 100_000, "no JSON file"),
        (b'{"1": ' + b"9" * 5000 + b"}", "no JSON file"),
        (b"[1,2]", "holds a list"),
        (b"null", "holds no nodes"),
        (b"3", "holds no nodes"),
        (b'"text"', "holds no nodes"),
        (b"{}", "holds no nodes"),
        (b'{"_comment": "text"}', "holds no nodes"),
        (json.dumps(CANVAS).encode(), "as the editor saves it"),
        (json.dumps({"prompt": CANVAS}).encode(), "as the editor saves it"),
        (b'{"1": null}', "'1' is no node"),
        (b'{"1": {"class_type": "A"}, "2": {"class_type": "B"}, "1": {"class_type": "C"}}', "'1' is there twice"),
        (b'{"prompt": {"1": {"class_type": "A"}, "1": {"class_type": "A"}}}', "'1' is there twice"),
        (b'{"1": {"class_type": "A", "inputs": {"seed": 1, "seed": 2}}}', "'seed' is there twice"),
        (b'{"1": {"inputs": {}}}', "'1' is no node"),
        (b'{"1": {"class_type": 3}}', "'1' is no node"),
        (b'{"1": {"class_type": "A", "inputs": [1]}}', "'1' is no node"),
        (b'{"1": {"class_type": "A", "inputs": null}}', "'1' is no node"),
    ],
)
def test_one_sentence_about_a_file_that_is_no_workflow(tmp_path, capsys, monkeypatch, data, message):
    """Before any server is looked for: there is none."""
    monkeypatch.setattr(run, "find_comfy", lambda: pytest.fail("the file was not judged first"))
    file = tmp_path / "w.json"
    file.write_bytes(data)
    assert main(["run", str(file), "--output", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert message in text and str(file) in text and "File > Export (API)" in text
    assert text.count("\n") == 1 and not PYTHON.search(text)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read(tmp_path, capsys):
    for file, words in ((tmp_path / "missing.json", "No such file"), (tmp_path, "directory")):
        assert main(["run", str(file)]) == 1
        text = capsys.readouterr().err
        assert str(file) in text and words in text and not PYTHON.search(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("true", True),
        ("red disc", "red disc"),
        ("a=b", "a=b"),
        ("", ""),
        ("NaN", "NaN"),
        (str(2**80), 2**80),
        ("9" * 5000,) * 2,
    ],
)
def test_a_setting(text, value):
    workflow = {"3": image(), "9": {"class_type": "A", "inputs": {}}}
    run.change(workflow, f"3.color={text}")
    assert workflow["3"]["inputs"]["color"] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("null", "null"), ("1.10", "1.10"), ("true", "true"), ("[1]", "[1]"), ('["3", 0]', '["3", 0]'), ("a b", "a b"), ('"1.10"', "1.10"), ("", "")],
)
def test_a_setting_of_a_text_stays_text(text, value):
    workflow = {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "pic"}}}
    run.change(workflow, f"9.filename_prefix={text}")
    assert workflow["9"]["inputs"]["filename_prefix"] == value


def test_a_link_may_replace_a_text():
    workflow = {"5": {"class_type": "StringConcatenate", "inputs": {}}, "9": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}}
    run.change(workflow, '9.text=["5", 0]')
    assert workflow["9"]["inputs"]["text"] == ["5", 0]


@pytest.mark.parametrize("setting", ["3.colour=1", "4.color=1", "color=1", "=1", "", "3.color", "9.color=1", "3.=1"])
def test_a_setting_that_does_not_fit(setting):
    with pytest.raises(ValueError, match=re.escape(f"--set {setting}: ") + ".*write node.input=value"):
        run.change({"3": image(), "9": {"class_type": "A", "inputs": {}}}, setting)


# Real ComfyUI. `run` starts a server each time; here it gets the one that runs, with the files that it has saved in between.


@pytest.fixture
def command(any_comfy: ComfyServer, tmp_path, capsys, monkeypatch):
    """Run a workflow into tmp_path/out; returns the exit status and what was printed."""
    assert any_comfy._base is not None
    theirs = any_comfy._base / "output"

    class Shared:
        def __init__(self, comfy, *, models, arguments):
            assert arguments[0] == "--output-directory"
            self.staged = Path(arguments[1])
            shutil.rmtree(theirs)
            theirs.mkdir()
            # So that it saves again what it has saved for the test before.
            any_comfy._request("/free", {"free_memory": True})
            any_comfy.run({"1": image(0), "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})

        def __enter__(self):
            return any_comfy

        def __exit__(self, *_):
            shutil.copytree(theirs, self.staged, dirs_exist_ok=True)

    monkeypatch.setattr(run, "ComfyServer", Shared)
    monkeypatch.setattr(run, "find_comfy", lambda: any_comfy.comfy)

    def command(workflow, *arguments):
        (tmp_path / "w.json").write_text(json.dumps(workflow), encoding="utf-8")
        status = main(["run", str(tmp_path / "w.json"), "--output", str(tmp_path / "out"), *arguments])
        printed = capsys.readouterr()
        assert not PYTHON.search(printed.err), printed.err
        return status, printed.out + printed.err

    return command


def pictures(folder: Path) -> dict[str, tuple]:
    """The first pixel of every picture below a folder."""
    return {file.relative_to(folder).as_posix(): Image.open(file).getpixel((0, 0)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.comfy
def test_two_subfolders_twice(command, tmp_path):
    assert command(TWO)[0] == 0
    assert pictures(tmp_path / "out") == {"a/pic_00001_.png": (0, 0, 255), "b/pic_00001_.png": (0, 0, 0)}
    status, text = command(TWO, "--set", "1.color=65280", "--set", "2.filename_prefix=a/pic")
    assert status == 0 and str(tmp_path / "out/a/pic_00002_.png") in text.splitlines()
    four = {f"{folder}/pic_0000{index}_.png" for folder in "ab" for index in (1, 2)}
    assert pictures(tmp_path / "out").keys() == four
    assert [pictures(tmp_path / "out")[f"a/pic_0000{index}_.png"] for index in (1, 2)] == [(0, 0, 255), (0, 255, 0)]
    assert command({"1": image(65280), "2": saver("1", "é 😀/pic")}, "--overwrite")[0] == 0
    assert command(TWO, "--overwrite", "--set", "1.color=16711680")[0] == 0
    assert pictures(tmp_path / "out").keys() == four | {"é 😀/pic_00001_.png"}
    assert pictures(tmp_path / "out")["a/pic_00001_.png"] == (255, 0, 0)


UPSCALE = {"size": "factor", "size.factor": 2.0, "tile": 256, "overlap": 256}
PARTIAL = {
    "1": image(),
    "3": saver("1", "red/pic"),
    "5": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "tessera_catanet_x2.safetensors"}},
    "6": {"class_type": "TesseraPatchUpscale", "inputs": {"upscale_model": ["5", 0], "image": ["1", 0], **UPSCALE}},
    "7": saver("6", "big/pic"),
}


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("workflow", "lines"),
    [
        (PARTIAL, [r"would leave out a part", r"TesseraPatchUpscale \(node 6\): .*overlap"]),
        ({**TWO, "2": {"class_type": "SaveImage"}}, [r"SaveImage \(node 2\): Required input is missing: images"]),
        ({**TWO, "9": {"class_type": "NodeThatIsNotThere"}, "10": saver("9", "x")}, [r"NodeThatIsNotThere", r"its own nodes and Tessera's"]),
        ({"1": image()}, [r"no output node.*add one"]),
        ({"1": image(), "2": saver("99", "x")}, [r"SaveImage \(node 2\) takes images from node 99, which is not in the file"]),
        ({"1": image(-1), "2": saver("1", "x")}, [r"EmptyImage \(node 1\): .*color"]),
        ({"1": image(2**70), "2": saver("1", "x")}, [r"EmptyImage \(node 1\): .*color"]),
        ({"1": image("red"), "2": saver("1", "x")}, [r"EmptyImage \(node 1\): .*color"]),
    ],
    ids=["a part", "no inputs", "missing node", "no output node", "broken link", "too small", "too large", "text"],
)
def test_a_workflow_that_is_refused(command, tmp_path, workflow, lines):
    """Before anything runs, so nothing is saved, also not by the nodes that could run."""
    status, text = command(workflow)
    assert status == 1 and str(tmp_path / "w.json") in text
    for line in lines:
        assert re.search(line, text), text
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.comfy
def test_the_client_refuses_a_part_too(any_comfy: ComfyServer):
    with pytest.raises(PromptRefusedError, match=r"TesseraPatchUpscale \(node 6\)") as error:
        any_comfy.run(PARTIAL)
    assert error.value.status == 200


LAYERS = {
    "1": image(width=16, height=16),
    "2": {"class_type": "TesseraLayersFromImages", "inputs": {"image": ["1", 0], "names": "", "trim": False, "width": 0, "height": 0}},
    "5": {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["2", 0], "filename_prefix": "f/l", "format": "png"}},
}
VIDEO = {
    "1": image(batch_size=3),
    "3": {
        "class_type": "TesseraSaveTransparentVideo",
        "inputs": {"images": ["1", 0], "filename_prefix": "v/s", "fps": 8.0, "format": "PNG sequence", "format.bits": "8", "alpha": "straight"},
    },
}


@pytest.mark.comfy
def test_folders_animations_texts_and_previews(command, tmp_path):
    graph = LAYERS | {
        "6": {"class_type": "SaveAnimatedWEBP", "inputs": {"images": ["1", 0], "filename_prefix": "w", "fps": 6.0, "lossless": True, "quality": 80}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
        "9": {"class_type": "PreviewAny", "inputs": {"source": "a text"}},
    }
    graph["6"]["inputs"]["method"] = "default"
    for turn in (1, 2):
        status, text = command(graph)
        assert status == 0, text
        assert "PreviewImage (node 7): 1 preview, not kept" in text and "PreviewAny (node 9): a text" in text
        assert "TesseraSaveLayers (node 5): l_00001_" in text and "(node 5): 1 preview" not in text
        assert files.read(tmp_path / f"out/f/l_0000{turn}_")[0].width == 16
        assert (tmp_path / f"out/w_0000{turn}_.webp").stat().st_size
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"f", "w_00001_.webp", "w_00002_.webp"}
    assert command({"9": graph["9"]})[0] == 0


@pytest.mark.comfy
def test_the_client_fetches_folders_or_names_them(any_comfy: ComfyServer, tmp_path):
    """Over HTTP, from the names that the nodes tell; of a node that tells none, the folder is named, and the rest is there."""
    outputs = any_comfy.run(LAYERS | VIDEO | {"9": saver("1", "é/pic")}).outputs
    saved, left = any_comfy.save(outputs, tmp_path)
    assert not left and len(saved) == 5 and saved[0].parent == tmp_path / "f"
    names = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert any(re.fullmatch(r"f/l_\d+_/layers.json", name) for name in names)
    assert len([name for name in names if re.fullmatch(r"v/s_\d+_/.*\.png", name)]) == 3
    assert any_comfy._base is not None
    for name in names:
        assert (tmp_path / name).read_bytes() == (any_comfy._base / "output" / name).read_bytes()
    del outputs["5"]["tessera_files"][0]["files"]
    saved, left = any_comfy.save(outputs, tmp_path / "again")
    assert len(saved) == 4 and len(left) == 1 and re.match(r"output/f/l_\d+_ stays on http://127.0.0.1:\d+, .*\(404 Not Found\)", left[0])


# A saver whose output feeds what fails, so that it comes first.
FAILING = VIDEO | {
    "4": {"class_type": "ImageScaleBy", "inputs": {"image": ["3", 0], "upscale_method": "bilinear", "scale_by": 0.01}},
    "5": saver("4", "b/pic"),
}


@pytest.mark.comfy
def test_what_was_finished_before_a_failure_is_saved(command, tmp_path):
    status, text = command(FAILING)
    assert status == 1 and "ImageScaleBy (node 4)" in text
    names = pictures(tmp_path / "out/v/s_00001_").keys()
    assert len(names) == 3 and not any(".part" in name for name in names)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v"]


# And the command as it is, with a server of its own.

NODES = """
import os
import signal
import time

import comfy.model_management
from comfy_execution.graph_utils import ExecutionBlocker


class Odd:
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "go"
    CATEGORY = "odd"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "what": ("STRING",)}}

    def go(self, image, what):
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "wait":
            open(os.path.join(os.path.dirname(__file__), "waiting"), "w").close()
        while what == "wait":
            time.sleep(0.1)
            comfy.model_management.throw_exception_if_processing_interrupted()
        return (ExecutionBlocker(None) if what == "block" else image,)


class Mute:
    RETURN_TYPES = ()
    FUNCTION = "go"
    CATEGORY = "odd"
    OUTPUT_NODE = True
    INPUT_TYPES = Odd.INPUT_TYPES

    def go(self, image, what):
        import folder_paths

        with open(os.path.join(folder_paths.get_output_directory(), what), "w") as file:
            file.write("mute")
        return {}


NODE_CLASS_MAPPINGS = {"Odd": Odd, "Mute": Mute}
"""


@pytest.fixture
def odd_nodes(tmp_path, monkeypatch):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "__init__.py").write_text(NODES)
    if run.find_comfy() is None:
        pytest.skip("needs ComfyUI")
    monkeypatch.setattr(run, "ComfyServer", partial(ComfyServer, custom_nodes=[tmp_path / "odd"]))


def odd(source: str, what: str, kind: str = "Odd") -> dict:
    return {"class_type": kind, "inputs": {"image": [source, 0], "what": what}}


@pytest.mark.comfy
def test_a_node_that_made_nothing(odd_nodes, tmp_path, capsys):
    """What another node saved without a word is saved, and does not stand for the two that made nothing."""
    graph = TWO | {"5": odd("1", "block"), "6": saver("5", "x"), "7": odd("5", ""), "8": saver("7", "y"), "9": odd("1", "mute.txt", "Mute")}
    (tmp_path / "w.json").write_text(json.dumps(graph))
    assert main(["run", str(tmp_path / "w.json"), "--output", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert "SaveImage (node 6), SaveImage (node 8), Mute (node 9) reported no file" in text
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")} == {
        *("a/pic_00001_.png", "b/pic_00001_.png", "mute.txt")
    }


@pytest.mark.comfy
def test_a_server_that_dies(odd_nodes, tmp_path, capsys):
    """Its files are there, with a name that says that no node has vouched for them."""
    graph = VIDEO | {"4": odd("3", "die"), "5": saver("4", "x")}
    (tmp_path / "w.json").write_text(json.dumps(graph))
    assert main(["run", str(tmp_path / "w.json"), "--output", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert "was killed, as a rule because memory ran out" in text and not PYTHON.search(text)
    assert len(list((tmp_path / "out/v/s_00001_").glob("*.part.png"))) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v"]


INTERRUPTED = """
import sys
from functools import partial
from pathlib import Path
from tessera.__main__ import main
from tessera.cli import run

run.ComfyServer = partial(run.ComfyServer, custom_nodes=[Path(sys.argv[1])])
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.comfy
def test_ctrl_c(odd_nodes, tmp_path, package_path):
    """As a terminal sends it, to the whole group: the server still tells what is whole, and is stopped then."""
    (tmp_path / "w.json").write_text(json.dumps(VIDEO | {"4": odd("3", "wait"), "5": saver("4", "x")}))
    command = [sys.executable, "-c", INTERRUPTED, tmp_path / "odd", "run", tmp_path / "w.json", "--output", tmp_path / "out"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(package_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "odd" / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.strip() == "tessera run: stopped"
    names = [file.name for file in (tmp_path / "out/v/s_00001_").iterdir()]
    assert len(names) == 3 and not any(".part" in name for name in names)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v"]
    assert str(tmp_path / "out") not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
