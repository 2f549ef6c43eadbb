"""Layer offload inside ComfyUI: its own memory manager with and without the Layer Offload node, on a Wan-shaped model of random weights.

    python bench/comfy_offload.py [--size 14B] [--steps 6] [--shape 5,60,104] [--out bench/results/comfy_offload_NAME_DATE.json]
    python bench/comfy_offload.py --size tiny       any machine: does it run? On a CPU the limit has no effect, and the times mean nothing

Needs ComfyUI (COMFYUI_PATH, else ~/comfy/ComfyUI) on a machine with a GPU. The same latent, steps and seed for every row: ComfyUI alone,
then limits that leave 80, 60, 40 and 20 % of the weights on the device. Seconds a step, peak, what was resident; and whether the latent
equals that of ComfyUI alone, bit for bit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parent.parent
# Width, heads, blocks, hidden size of the feed-forward, width of the text: Wan 2.1 14B with 16 of its 40 blocks, and a toy.
SIZES = {"14B": (5120, 40, 16, 13824, 4096), "1.3B": (1536, 12, 30, 8960, 4096), "tiny": (256, 2, 12, 512, 4096)}
SHARES = (0.8, 0.6, 0.4, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="14B")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--shape", default="5,60,104", help="latent frames, height, width (default: %(default)s, 17 frames of 480 x 832)")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from tessera.cli.comfy_server import HOW_TO_GET, find_comfy

    comfy = find_comfy()
    if comfy is None:
        sys.exit(f"bench/comfy_offload.py needs ComfyUI: {HOW_TO_GET}")
    job = {"size": options.size, "steps": options.steps, "shape": [int(part) for part in options.shape.split(",")]}
    command = [str(comfy.python), __file__, "--inside", str(comfy.path), str(PACK / ".pkg"), json.dumps(job)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    rows = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    head, rows = rows[0], rows[1:]
    name = re.sub("[^A-Za-z0-9]+", "_", head["device"])
    out = options.out or PACK / "bench" / "results" / f"comfy_offload_{name}_{options.date}.json"
    out.write_text(json.dumps({"date": options.date, **job, **head, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print({key: row[key] for key in ("limit", "seconds_per_step", "equal", "line")})
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


def inside(comfyui: str, package_parent: str, job: dict[str, Any]) -> None:
    """Runs in ComfyUI's own Python."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, comfyui)
    sys.path.append(package_parent)
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    import comfy.model_management as mm
    import comfy.sd
    import comfyui_version
    import utils.extra_config  # noqa: F401  (first, as main.py does: nodes.py puts a folder with another `utils` before it)

    import nodes
    from tessera.models.default.networks import WanTransformer
    from tessera.models.patchers.offload_report import summary
    from tessera.nodes.memory import MemorySettings, last_report, patch_memory

    dim, heads, layers, ffn, text = SIZES[job["size"]]
    with torch.device("meta"):
        network = WanTransformer(dim=dim, heads=heads, layers=layers, ffn=ffn, text_dim=text)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16)
        state[name] = noise * (tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.02) + (1 if "norm" in name and name.endswith("weight") else 0)
    model = comfy.sd.load_diffusion_model_state_dict(state)
    device = mm.get_torch_device()

    def emit(**row: Any) -> None:
        print("RESULT " + json.dumps(row), flush=True)

    emit(device=mm.get_torch_device_name(device), comfyui=comfyui_version.__version__, torch=torch.__version__, weights=model.model_size())
    positive = [[torch.randn(1, 64, text, generator=generator), {}]]
    latent = {"samples": torch.zeros(1, 16, *job["shape"])}

    def sample(patched: Any) -> Any:
        return nodes.common_ksampler(patched, 1, job["steps"], 1.0, "euler", "simple", positive, positive, latent)[0]["samples"]

    with torch.inference_mode():
        everything = patch_memory(model, MemorySettings(limit="use at most", gb=_total(mm, device)), None)
        sample(everything)  # loads, warms up, measures the activations
        expected = sample(everything)
        report = last_report(everything)
        emit(limit=None, seconds_per_step=report["seconds_per_step"], equal=True, line=summary(report), report=_short(report))
        mm.unload_all_models()
        stock = sample(model)
        for share in SHARES:
            gb = (report["weights_bytes"] * share + (report["activation_bytes"] or 0) + (report["reserve_bytes"] or 0)) / (1 << 30)
            patched = patch_memory(model, MemorySettings(limit="use at most", gb=max(gb, 0.1)), None)
            sample(patched)
            found = sample(patched)
            row = last_report(patched)
            equal = bool(torch.equal(found, stock) and torch.equal(found, expected))
            emit(limit=gb, seconds_per_step=row["seconds_per_step"], equal=equal, line=summary(row), report=_short(row))


def _total(mm: Any, device: Any) -> float:
    return 1.0 if mm.is_device_cpu(device) else mm.get_total_memory(device) / (1 << 30)


def _short(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if isinstance(value, (int, float, str, type(None)))}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    else:
        main()
