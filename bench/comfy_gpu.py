"""Attention and layer offload in a real ComfyUI server on its GPU: seconds a step, through the API queue, on Wan-shaped random weights.

    python bench/comfy_gpu.py [--parts attention dynamic legacy] [--size 1.3B] [--offload-size 14B/16] [--out bench/results/comfy_gpu_NAME_DATE.json]
    python bench/comfy_gpu.py --size tiny --offload-size tiny       any machine: does it run? On a CPU its times mean nothing

Needs ComfyUI (COMFYUI_PATH, else ~/comfy/ComfyUI), and disk for the weights. `attention`: the stock sampler alone and behind each mode of
Accelerate, 81 frames of 480 x 832. `dynamic` and `legacy`: limits that leave 80, 60, 40 and 20 % of the weights on the GPU, 17 frames, with
ComfyUI's DynamicVRAM and with --disable-dynamic-vram; the latent has to be that of ComfyUI alone, bit for bit. Every row is the second of two
runs of one server; seconds are the server's own for the whole workflow, whose models are loaded by then. Random weights say nothing of quality.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from tessera.cli.comfy_client import PromptFailedError
from tessera.cli.comfy_server import HOW_TO_GET, ComfyServer, find_comfy
from tessera.models.default.networks import WanTransformer

PACK = Path(__file__).resolve().parent.parent
TEXT = 64  # what Shapes Prompt gives
# Width, heads, blocks, hidden size of the feed-forward. Wan 2.1; of 14B also 16 of its 40 blocks; and a toy.
SIZES = {"1.3B": (1536, 12, 30, 8960), "14B/16": (5120, 40, 16, 13824), "14B": (5120, 40, 40, 13824), "tiny": (256, 2, 12, 512)}
SHARES = (0.8, 0.6, 0.4, 0.2)
GB = 1 << 30


def write_weights(folder: Path, size: str) -> str:
    """Random bfloat16 weights as a file for the stock loader; returns its name. The metadata says what ComfyUI cannot see from the shapes."""
    dim, heads, layers, ffn = SIZES[size]
    with torch.device("meta"):
        network = WanTransformer(dim=dim, heads=heads, layers=layers, ffn=ffn, text_dim=TEXT)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, dtype=torch.bfloat16, device=device)
        noise *= tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.02
        state[name] = (noise + (1 if "norm" in name and name.endswith("weight") else 0)).cpu()
    name = f"random_{size.replace('/', '_')}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / name, {"config": json.dumps({"transformer": {"text_dim": TEXT, "num_heads": heads}})})
    return name


def workflow(model: str, patch: dict[str, Any] | None, report: str, size: tuple[int, int, int], steps: int, seed: int) -> dict[str, Any]:
    """Load, patch, sample; the latent in a file, and what the report node says."""
    width, height, length = size
    graph: dict[str, Any] = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": model, "weight_dtype": "default"}},
        "3": {"class_type": "TesseraShapesPrompt", "inputs": {"text": "red disc moving right"}},
        "4": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": width, "height": height, "length": length, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                **{"model": ["1", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0]},
                **{"seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
            },
        },
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "bench"}},
    }
    if patch is not None:
        graph["2"] = {**patch, "inputs": {**patch["inputs"], "model": ["1", 0]}}
        graph["5"]["inputs"]["model"] = ["2", 0]
        graph["7"] = {"class_type": report, "inputs": {"model": ["2", 0], "samples": ["5", 0]}}
    return graph


def run(server: ComfyServer, *arguments: Any, steps: int) -> dict[str, Any]:
    """Seconds a step of the second of two runs, the latent of it, the report."""
    for seed in (1, 2):
        result = server.run(workflow(*arguments, steps, seed), timeout=600)
    (file,) = result.outputs["6"]["latents"]
    latent = load(server.fetch(file))["latent_tensor"]
    row = {"seconds_per_step": round(result.seconds / steps, 4), "finite": bool(latent.isfinite().all())}
    report = result.outputs.get("7", {})
    return {**row, "latent": latent, "line": report.get("text", [""])[0], "report": report.get("tessera", [{}])[0]}


def attention(server: ComfyServer, model: str, steps: int, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """The stock sampler and each mode of Accelerate, side by side in one server."""
    rows: list[dict[str, Any]] = []
    for mode in (None, "quality", "balanced", "fast"):
        patch = None if mode is None else {"class_type": "TesseraAccelerate", "inputs": {"mode": mode, "min_tokens": 0}}
        row = run(server, model, patch, "TesseraAttentionReport", size, steps=steps)
        report = row.pop("report")
        row |= {
            name: report.get(name) for name in ("calls", "sparse_share_in_window", "density", "overall_density", "backends", "refusals", "reasons")
        }
        del row["latent"]
        base = rows[0]["seconds_per_step"] if rows else row["seconds_per_step"]
        rows.append({"mode": mode, **row, "times_faster": round(base / row["seconds_per_step"], 3)})
        print(rows[-1], flush=True)
    return rows


def offload(server: ComfyServer, model: str, steps: int, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """ComfyUI alone, then limits."""
    stock = run(server, model, None, "", size, steps=steps)
    expected = stock.pop("latent")
    rows = [{"gb": None, **stock}]
    print(rows[-1], flush=True)

    def limited(gb: float) -> dict[str, Any]:
        patch = {"class_type": "TesseraLayerOffload", "inputs": {"limit": "use at most", "gb": round(gb, 2), "policy": "auto"}}
        row = run(server, model, patch, "TesseraOffloadReport", size, steps=steps)
        row["report"] = {name: value for name, value in row["report"].items() if isinstance(value, (int, float, str, type(None)))}
        row["equal"] = bool(torch.equal(row.pop("latent"), expected))
        return {"gb": round(gb, 2), **row}

    whole = limited(max(server.system["devices"][0]["vram_total"] / GB - 0.1, 0.1))
    report = whole["report"]
    rows.append(whole)
    print(rows[-1], flush=True)
    for share in SHARES:
        gb = (report["weights_bytes"] * share + (report["activation_bytes"] or 0) + (report["reserve_bytes"] or 0)) / GB
        try:
            rows.append({"share": share, **limited(max(gb, 0.1))})
        except PromptFailedError as error:  # a limit that cannot be kept is refused, which is a result too
            rows.append({"share": share, "gb": round(gb, 2), "error": str(error)[:400]})
        print({name: value for name, value in rows[-1].items() if name != "report"}, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["attention", "dynamic", "legacy"], choices=("attention", "dynamic", "legacy"))
    parser.add_argument("--size", choices=SIZES, default="1.3B", help="of the attention part")
    parser.add_argument("--offload-size", choices=SIZES, default="14B/16")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--offload-steps", type=int, default=6)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--arguments", default="", help="more of ComfyUI's command line, such as --arguments='--fast'")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    comfy = find_comfy()
    if comfy is None:
        sys.exit(f"bench/comfy_gpu.py needs ComfyUI: {HOW_TO_GET}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    out = options.out or PACK / "bench" / "results" / f"comfy_gpu_{re.sub('[^a-z0-9]+', '_', name.lower())}_{options.date}.json"
    large, small = (832, 480, options.frames), (832, 480, 17)
    if "tiny" in (options.size, options.offload_size):
        large = small = (128, 128, 17)
    result: dict[str, Any] = {"date": options.date, "device": name, "torch": torch.__version__, "command": sys.argv[1:]}
    with tempfile.TemporaryDirectory(prefix="tessera-weights-") as folder:
        models = Path(folder)
        for part in options.parts:
            size = options.size if part == "attention" else options.offload_size
            model = write_weights(models / "diffusion_models", size)
            arguments = [*options.arguments.split(), *(["--disable-dynamic-vram"] if part == "legacy" else [])]
            with ComfyServer(comfy, models=models, arguments=arguments) as server:
                result["comfyui"] = server.version
                if part == "attention":
                    rows = attention(server, model, options.steps, large)
                else:
                    rows = offload(server, model, options.offload_steps, small)
                dynamic = "DynamicVRAM support detected and enabled" in server.log
            result[part] = {"size": size, "width_height_frames": large if part == "attention" else small, "dynamic_vram": dynamic, "rows": rows}
            out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row for part in options.parts for row in result[part]["rows"] if not row.get("finite", True) or not row.get("equal", True)]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
