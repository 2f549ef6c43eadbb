"""Network upscaling in figures: seams, the cost of tiling, speed beside ComfyUI's own node, and memory from file to file.

    PYTHON_OF_COMFYUI bench/upscale.py COMFYUI PACKAGE_PARENT [--picture FILE] [--parts seams speed memory] [--out FILE]

seams: the gradient on the borders of patches, tiled over untiled on the same lines, mean over 16 offsets of the grid. speed: the built-in
CATANet x2 on one picture: untiled, in our patches, and by *Upscale Image (using Model)*, one after another, several rounds, medians of the
process's CPU seconds. memory: peak of a process that upscales a clip to 3840 x 2160 through the real decoder and encoder. The machine should
have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("comfyui")
parser.add_argument("package_parent")
parser.add_argument("--picture", help="default: drawn waves and discs")
parser.add_argument("--parts", nargs="+", default=["seams", "speed", "memory"])
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "upscale.json"))
options = parser.parse_args()
sys.argv = sys.argv[:1]
sys.path.insert(0, options.comfyui)
sys.path.append(options.package_parent)

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader  # noqa: E402
from PIL import Image  # noqa: E402

from tessera.models.media.resize import resize  # noqa: E402
from tessera.models.upscale import metrics, spandrel_catanet  # noqa: E402
from tessera.models.upscale.pictures import Network, plan, upscale  # noqa: E402
from tessera.nodes import UPSCALE  # noqa: E402
from tessera.nodes.upscale import PatchUpscale  # noqa: E402

torch.set_num_threads(options.threads)
TILE, OVERLAP = 256, 32  # ours; ComfyUI's node has 512 and 32


def drawn(height: int, width: int) -> torch.Tensor:
    """Waves of many lengths and directions, and discs with hard edges: `(3, height, width)`."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    waves = sum(torch.sin(torch.randn(()) * x / 4 + torch.randn(()) * y / 4 + 6.3 * torch.rand(3, 1, 1)) / (1 + index % 6) for index in range(24))
    out = waves / waves.abs().max() * 0.4 + 0.5
    for _ in range(24):
        centre, radius = torch.rand(2) * torch.tensor([width, height]), 5 + 40 * torch.rand(())
        out = torch.where((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2, torch.rand(3, 1, 1), out)
    return out


def picture(height: int, width: int) -> torch.Tensor:
    if options.picture is None:
        return drawn(height, width)
    with Image.open(options.picture) as image:
        found = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0).float() / 255
    return resize(found, (width, height)).clamp(0, 1)


def model():
    import folder_paths

    folder_paths.add_model_folder_path("upscale_models", str(UPSCALE / "upscale_models"))
    spandrel_catanet.register()
    return UpscaleModelLoader.execute("tessera_catanet_x2.safetensors").args[0]


def seams() -> dict[str, float]:
    """Mean over 16 offsets of the grid, which moves when the picture is cut at the top and left."""
    loaded, image = model(), picture(200, 216)
    network = Network(lambda x: loaded(x), 2, 28)
    excess, largest = [], 0.0
    for offset in range(16):
        part = image[:, offset : offset + 184, offset : offset + 200]
        whole = network(part[None])[0].clamp(0, 1)
        tiled = upscale(part, network, (400, 368), tile=96, overlap=32)
        excess.append(metrics.seam_excess(tiled, plan(184, 200, 96, 32), 2, whole))
        largest = max(largest, float((tiled - whole).abs().max()))
    return dict(mean=statistics.mean(excess), lowest=min(excess), highest=max(excess), largest_difference_255=255 * largest)


def speed() -> dict[str, float]:
    """160 x 928 is two of ComfyUI's tiles."""
    loaded, image = model(), picture(160, 928)
    PatchUpscale.hidden = SimpleNamespace(unique_id=None)  # what the server fills in
    network, batch = Network(lambda x: loaded(x), 2, 28), image.movedim(0, -1)[None]
    tiling = plan(*image.shape[-2:], TILE, OVERLAP)
    runs = {
        "untiled": lambda: network(image[None]),
        "tiled": lambda: upscale(image, network, (1856, 320), tile=TILE, overlap=OVERLAP),
        "Patch Upscale (network)": lambda: PatchUpscale.execute(loaded, batch, {"size": "factor", "factor": 2.0}, TILE, OVERLAP),
        "Upscale Image (using Model)": lambda: ImageUpscaleWithModel.execute(loaded, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["tiled"] / medians["untiled"] / tiling.recomputed
    return dict(
        medians,
        recomputed=tiling.recomputed,
        tiled_over_untiled_and_recomputed=ratio,
        comfyui_over_ours=medians["Upscale Image (using Model)"] / medians["Patch Upscale (network)"],
    )


MEMORY = """
import sys
import torch
from torch.nn import functional as F
from safetensors.torch import load_file
from tessera.models.upscale import catanet
from tessera.models.upscale.pictures import Network, upscale
from tessera.models.upscale.video import upscale_video

torch.set_num_threads(1)
source, target, weights = sys.argv[1:]
if weights == "bicubic":
    operator = lambda frames: F.interpolate(frames, scale_factor=2, mode="bicubic")
else:
    network = Network(catanet.build(load_file(weights)), 4, catanet.MIN_SIDE)
    operator = lambda frames: torch.stack([upscale(frame, network, (3840, 2160)) for frame in frames])
with torch.inference_mode():
    upscale_video(source, target, operator, (3840, 2160))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory() -> dict[str, int | float]:
    """Peak resident kB of a process that makes a clip of 3840 x 2160 of one of 1920 x 1080, or with CATANet x4 of one of 960 x 540."""
    found: dict[str, int | float] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = (("bicubic", 20, "bicubic", 2), ("bicubic", 200, "bicubic", 2), ("CATANet", 3, "tessera_catanet_x4.safetensors", 4))
        for name, frames, weights, factor in runs:
            width, height = 3840 // factor, 2160 // factor
            source = Path(folder, f"{frames}.mp4")
            with av.open(str(source), "w") as container:
                stream = container.add_stream("libx264", rate=Fraction(25), options={"preset": "ultrafast"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                base = (drawn(height, width) * 255).byte().movedim(0, -1).numpy()
                for index in range(frames):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(base, 4 * index, 1), format="rgb24")))
                container.mux(stream.encode())
            path = weights if weights == "bicubic" else str(UPSCALE / "upscale_models" / weights)
            target = Path(folder, f"out{frames}.mp4")
            # glibc keeps freed frames of this size otherwise, and how many differs from run to run.
            environment = {"PYTHONPATH": options.package_parent, "MALLOC_MMAP_THRESHOLD_": "1000000", "PATH": "/usr/bin:/bin"}
            done = subprocess.run([sys.executable, "-c", MEMORY, source, target, path], env=environment, capture_output=True, text=True, check=True)
            found[f"{name}, {frames} frames"] = int(done.stdout)
            with av.open(str(target)) as container:
                video = container.streams.video[0]
                assert (video.width, video.height, sum(1 for _ in container.decode(video))) == (3840, 2160, frames)
            print(f"{name}, {frames} frames: {done.stdout.strip()} kB", flush=True)
    found["200 over 20"] = found["bicubic, 200 frames"] / found["bicubic, 20 frames"]
    return found


def main() -> None:
    target = Path(options.out)
    results = json.loads(target.read_text()) if target.exists() else {}
    about = dict(
        torch=torch.__version__, threads=options.threads, date=time.strftime("%Y-%m-%d"), picture=options.picture and Path(options.picture).name
    )
    for part in options.parts:
        results[part] = {**globals()[part](), "about": about}
        print(part, json.dumps(results[part], indent=1), flush=True)
        target.write_text(json.dumps(results, indent=1) + "\n")


with torch.inference_mode():
    main()
