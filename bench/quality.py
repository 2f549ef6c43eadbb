"""What sparsity costs in quality: every recipe against the dense run of the same seed, in real ComfyUI, on the default weights.

    python bench/quality.py [--prompts 8] [--seeds 2] [--steps 20] [--workers 2] [--out FILE]
    python bench/quality.py --start-percent 0.3 --dense-blocks 0 3 --out FILE    with other guards than the node's

Needs ComfyUI (COMFYUI_PATH, else ~/comfy/ComfyUI). The settings are those of *Accelerate* in each of its modes, with each method in the
place of its own. PSNR between decoded videos, latent error relative to the dense latent's norm. Only prompts and seeds whose dense clip
shows what was asked for are used. Writes JSON and, beside it, the same table as Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parent.parent
MODES = ("quality", "balanced", "fast")  # of *Accelerate*
PROMPTS = (
    "red disc right",
    "green square left",
    "blue triangle up",
    "yellow disc down",
    "white square up",
    "magenta triangle right",
    "green disc left",
    "yellow square down",
    "blue disc up",
    "red triangle left",
    "white disc right",
    "magenta square down",
)
SIZE, FRAMES = 128, 33  # what the weights were trained for: 9 x 8 x 8 = 576 tokens
SCHEDULE = dict(cfg=3.0, sampler_name="euler", scheduler="simple")
SHIFT = 5.0


def main() -> None:
    from tessera.kernels.sparsity import RECIPES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(RECIPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="those not named stay in the file as they are")
    parser.add_argument("--start-percent", type=float, help="default: the node's")
    parser.add_argument("--dense-blocks", type=int, nargs="*", help="default: the node's")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a share of the prompts")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=PACK / "bench" / "results" / "quality.json")
    options = parser.parse_args()

    from tessera.cli.comfy_server import HOW_TO_GET, find_comfy

    comfy = find_comfy()
    if comfy is None:
        sys.exit(f"bench/quality.py needs ComfyUI: {HOW_TO_GET}")
    with ThreadPoolExecutor(options.workers) as pool:
        parts = list(pool.map(lambda worker: run_worker(comfy, options, worker), range(options.workers)))
    heads, rows = [part[0] for part in parts], [row for part in parts for row in part[1:]]
    head = {**heads[0], **{name: sum(part[name] for part in heads) for name in ("clips", "tried")}}
    if options.modes != MODES:
        before = json.loads(options.out.read_text())
        if changed := [name for name in head if before[name] != head[name]]:
            sys.exit(f"bench/quality.py: {', '.join(changed)} differ from those of {options.out}; run all modes")
        rows = [row for row in before["runs"] if row["mode"] not in (*options.modes, None)] + rows
        head["command"] = before["command"]
    else:
        head["command"] = " ".join(["python bench/quality.py", *sys.argv[1:]])
    result = {"date": options.date, **head, "table": summarise(rows), "runs": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    options.out.with_suffix(".md").write_text(text)
    print(text)


def run_worker(comfy: Any, options: argparse.Namespace, worker: int) -> list[dict[str, Any]]:
    """One process with its share of the prompts. Small models use two cores better as two processes than as two threads."""
    job = {"prompts": options.prompts // options.workers, "seeds": options.seeds, "steps": options.steps}
    job |= {"methods": list(options.methods), "modes": list(options.modes), "first_seed": options.first_seed}
    job["guards"] = {name: value for name in ("start_percent", "dense_blocks") if (value := getattr(options, name)) is not None}
    job |= {"worker": worker, "workers": options.workers}
    command = [str(comfy.python), __file__, "--inside", str(comfy.path), str(PACK / ".pkg"), json.dumps(job)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                lines.append(json.loads(line.removeprefix("RESULT ")))
                print(lines[-1], flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over prompts and seeds, one row for each (method, density)."""
    table = []
    keys = list(dict.fromkeys((row["method"], row["mode"]) for row in rows))
    for method, mode in keys:
        group = [row for row in rows if (row["method"], row["mode"]) == (method, mode)]
        mean = {name: statistics.fmean(row[name] for row in group) for name in ("density", "overall_density", "psnr", "latent_error", "sparse_share")}
        table.append({"method": method, "mode": mode, "runs": len(group), "psnr_min": min(row["psnr"] for row in group), **mean})
    return table


def markdown(result: dict[str, Any]) -> str:
    dense = " ".join(map(str, result["dense_blocks"])) or "none"
    lines = [
        "# Sparse against dense on the default weights",
        "",
        f"`{result['command']}`, {result['date']}: ComfyUI {result['comfyui']}, torch {result['torch']}, CPU. "
        f"{result['clips']} clips of {FRAMES} frames, {SIZE} x {SIZE} ({result['tokens']} tokens, blocks of {result['block']}), {result['steps']} "
        f"steps. The settings of *Accelerate*: the first {result['start_percent']:.0%} of the schedule dense, dense blocks (of 6): {dense}.",
        f"Mean over prompts and seeds whose dense clip shows its caption ({result['clips']} of {result['tried']} tried). Density is of the sparse "
        "calls, with the blocks that are kept in any case; *overall* counts the dense calls. *random* keeps random blocks; *another seed* "
        "compares two dense runs.",
        "",
        "| method | mode | density | overall | PSNR dB (worst) | latent error | sparse calls in the window |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["table"]:
        lines.append(
            f"| {row['method']} | {row['mode'] or ''} | {row['density']:.2f} | {row['overall_density']:.2f} "
            f"| {row['psnr']:.1f} ({row['psnr_min']:.1f}) "
            f"| {row['latent_error']:.3f} | {row['sparse_share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def inside(comfyui: str, package_parent: str, job: dict[str, Any]) -> None:
    """Runs in ComfyUI's own Python: stock loaders, stock sampler, our nodes."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, comfyui)
    sys.path.append(package_parent)
    import torch
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True

    import comfyui_version
    import utils.extra_config  # noqa: F401  (first, as main.py does: nodes.py puts a folder with another `utils` before it)

    from tessera.nodes.attention import accelerate_settings, last_report, patch_attention

    guards = dict(job["guards"])
    if "dense_blocks" in guards:
        guards["dense_blocks"] = frozenset(guards["dense_blocks"])
    plain = accelerate_settings("quality", 0, **guards)
    if job["workers"] > 1:
        torch.set_num_threads(1)
    with torch.inference_mode():
        host = Sampler(job["steps"])
        dense, tried = host.good_clips(job)
        versions = dict(comfyui=comfyui_version.__version__, torch=torch.__version__)
        blocks = sorted(plain.dense_blocks)
        emit(
            **versions,
            clips=len(dense),
            tried=tried,
            steps=job["steps"],
            tokens=576,
            block=32,
            start_percent=plain.start_percent,
            dense_blocks=blocks,
        )
        for mode in job["modes"]:
            for method in job["methods"]:
                patched = patch_attention(host.model, accelerate_settings(mode, 0, method=method, **guards), None)
                for (prompt, seed), base in dense.items():
                    run = host.sample(patched, prompt, seed)
                    report = last_report(patched)
                    figures = dict(
                        density=report["density"], overall_density=report["overall_density"], sparse_share=report["sparse_share_in_window"]
                    )
                    emit(method=method, mode=mode, prompt=prompt, seed=seed, **figures, **compared(run, base))
        for (prompt, seed), base in dense.items():
            other = host.sample(host.model, prompt, seed + 1000)
            figures = dict(density=1.0, overall_density=1.0, sparse_share=0.0)
            emit(method="another seed (dense)", mode=None, prompt=prompt, seed=seed, **figures, **compared(other, base))


class Sampler:
    """The default weights in ComfyUI, by its stock nodes. A clip is (latents, frames `(frames, height, width, 3)` in 0..1)."""

    def __init__(self, steps: int) -> None:
        import folder_paths
        import torch
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        import nodes
        from tessera.models.default import vocabulary
        from tessera.nodes import DEFAULT_WEIGHTS

        for folder in ("diffusion_models", "vae"):
            folder_paths.add_model_folder_path(folder, str(DEFAULT_WEIGHTS / folder))
        self.nodes, self.encode, self.steps = nodes, vocabulary.encode, steps
        self.model = ModelSamplingSD3().patch(nodes.UNETLoader().load_unet("tessera_shapes_t2v.safetensors", "default")[0], SHIFT)[0]
        self.vae = nodes.VAELoader().load_vae("tessera_shapes_vae.safetensors")[0]
        self.empty = {"samples": torch.zeros(1, 16, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)}

    def sample(self, patched: Any, prompt: str, seed: int) -> tuple[Any, Any]:
        positive, negative = ([[self.encode(text), {}]] for text in (prompt, ""))
        latent = self.nodes.common_ksampler(patched, seed, self.steps, positive=positive, negative=negative, latent=self.empty, **SCHEDULE)[0]
        return latent["samples"], self.nodes.VAEDecode().decode(self.vae, latent)[0].clamp(0, 1).reshape(FRAMES, SIZE, SIZE, 3)

    def good_clips(self, job: dict[str, Any]) -> tuple[dict[tuple[str, int], tuple[Any, Any]], int]:
        """(dense clips that show their caption, `seeds` of each of this worker's prompts, by (prompt, seed); how many were tried)."""
        from tessera.models.default import vocabulary
        from tessera.training.default import clips

        good: dict[tuple[str, int], tuple[Any, Any]] = {}
        tried = 0
        for prompt in PROMPTS[job["worker"] :: job["workers"]]:
            found = {}
            for seed in itertools.islice(itertools.count(job["first_seed"]), 2 * job["seeds"]):
                tried += 1
                run = self.sample(self.model, prompt, seed)
                if tuple(clips.score(run[1].permute(3, 0, 1, 2) * 2 - 1)) == tuple(vocabulary.parse(prompt)):
                    found[prompt, seed] = run
                if len(found) == job["seeds"]:
                    good |= found
                    break
            if len(good) == job["prompts"] * job["seeds"]:
                break
        return good, tried


def emit(**row: Any) -> None:
    print("RESULT " + json.dumps(row), flush=True)


def compared(run: tuple[Any, Any], base: tuple[Any, Any]) -> dict[str, float]:
    psnr = float(-10 * (run[1] - base[1]).square().mean().clamp_min(1e-12).log10())
    return {"psnr": psnr, "latent_error": float((run[0] - base[0]).norm() / base[0].norm())}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    else:
        main()
