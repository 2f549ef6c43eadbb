"""Runs inside ComfyUI's Python (see test_comfy_transparent_video.py): progress, stops, memory and the choice of files.

    python comfy_transparent_video.py COMFYUI PACKAGE_PARENT

Prints one JSON object per case.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

COMFYUI, PACKAGE_PARENT = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)

import comfy.model_management as mm  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from PIL import Image  # noqa: E402

import nodes  # noqa: E402,F401
from tessera.models.layers import video_reader  # noqa: E402
from tessera.models.layers.video_writer import save  # noqa: E402
from tessera.nodes.layers import AddVideoLayer, ComposeLayeredVideo, LoadTransparentVideo, SaveTransparentVideo  # noqa: E402
from tessera.nodes.layers.transparent_video import _choices  # noqa: E402

COUNT = 6
CLIP = torch.rand(COUNT, 16, 16, 4)


def emit(case, **values):
    print("RESULT " + json.dumps({"case": case, **values}), flush=True)


def watched(function, stop=None):
    """What the bar showed last, and the error, of a run that is stopped when the bar is at `stop`."""
    shown = []

    def hook(value, total, preview, node_id=None):
        shown.append((value, total))
        if value == stop:
            mm.interrupt_current_processing()

    comfy.utils.PROGRESS_BAR_HOOK = hook
    comfy.utils.time = SimpleNamespace(perf_counter=lambda: float(len(shown)))  # bars leave out what comes too soon
    try:
        function()
    except (mm.InterruptProcessingException, ValueError) as error:
        mm.interrupt_current_processing(False)
        return shown, type(error).__name__
    return shown, None


def outside(node):
    """The node class as ComfyUI prepares it for a run, without a graph around it."""
    return type("Node", (node,), {"hidden": SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id=None)})


def bars(folder):
    layer = {"name": "", "x": 0, "y": 0, "opacity": 1.0, "blend_mode": "normal", "ending": "hold"}
    layers = AddVideoLayer.execute(images=CLIP, **layer).result[0]
    node = outside(SaveTransparentVideo)
    runs = {
        "load": lambda: outside(LoadTransparentVideo).execute("clip.mkv", "RGBA", "auto", 3, 2),
        "compose": lambda: ComposeLayeredVideo.execute(layers, "", 0, 0),
        "webm": lambda: node.execute(CLIP, "out", 24.0, {"format": "VP9 WebM", "crf": 20}, "straight"),
        "mov": lambda: node.execute(CLIP, "out", 24.0, {"format": "ProRes 4444"}, "straight"),
    }
    for name, run in runs.items():
        shown, error = watched(run)
        before = {file.name for file in folder.rglob("*")}
        # Of ProRes, in the middle of its preview.
        stopped = watched(run, 8 if name == "mov" else 2)
        files = sorted({file.name for file in folder.rglob("*")} - before)
        emit(name, shown=shown, error=error, stopped=stopped, files=files)


def pictures(folder):
    """A picture of a sequence changes, and its folder does not."""
    (folder / "take").mkdir()
    for number in range(3):
        Image.new("RGBA", (4, 4)).save(folder / "take" / f"{number}.png")
    read, known = [], folder.joinpath("take", "1.png")
    real = video_reader.is_animated_png
    video_reader.is_animated_png = lambda path: read.append(path.name) or real(path)
    prints, choices = [], []
    for change in ("", "", "red"):
        if change:
            Image.new("RGBA", (4, 4), change).save(known)
            os.utime(known, ns=(0, 0))
        prints.append(LoadTransparentVideo.fingerprint_inputs("take/"))
        choices.append(_choices())
        read.append("asked")
    emit("pictures", prints=prints, choices=choices, read=sorted(read[:3]) + read[3:])


def memory(folder):
    pictures = [Image.new("RGBA", (512, 512), colour) for colour in ("red", "blue")]
    pictures[0].save(folder / "long.webp", save_all=True, append_images=pictures[1:], duration=[1, 16_777_215], lossless=True)
    for count in (0, 1):
        try:
            outside(LoadTransparentVideo).execute("long.webp", "RGBA", "auto", 0, count)
            emit(f"memory {count}", error=None)
        except ValueError as error:
            emit(f"memory {count}", error=str(error))


with tempfile.TemporaryDirectory() as name, torch.inference_mode():
    folder_paths.set_input_directory(name)
    folder_paths.set_output_directory(name)
    folder_paths.set_temp_directory(name)
    save(Path(name, "clip.mkv"), CLIP, 24, "FFV1")
    bars(Path(name))
    pictures(Path(name))
    memory(Path(name))
