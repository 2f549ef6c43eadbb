"""What sparsity costs in quality, on the default weights: single attention calls, and whole clips in real ComfyUI.

    python bench/quality.py heads         one attention call, every method, on recorded and planted heads (bench/heads.py); minutes, one thread
    python bench/quality.py clips         whole clips, settings of *Sparse Attention*, three densities; `--prompts 2 --seeds 1` for a short run
    python bench/quality.py accelerate    whole clips, settings of *Accelerate* in each of its modes, each method in the place of its own

The first two write truth_heads.json, truth_clips.json and the page that shows both, truth.md with truth.png; the last one quality.json and
quality.md. A method may be spelled with a tail, sparge+tail, wherever one may be named.

Clips need ComfyUI (COMFYUI_PATH, else ~/comfy/ComfyUI). Each clip is compared with the dense clip of its prompt and seed, as decoded: PSNR over
the clip, SSIM (Wang et al. 2004, a mean over frames); latent error is relative to the dense latent's norm. Only prompts and seeds whose dense
clip shows what was asked for are used.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
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
SPARSE = {"start_percent": 0.3, "dense_blocks": [0, 3]}
DENSITIES = {True: (0.25, 0.15, 0.1), False: (0.3, 0.2, 0.1)}
"""Of *Sparse Attention*: methods with a tail, which costs work, too, and methods without."""
MEANS = ("density", "work", "window_work", "overall_work", "searches", "psnr", "ssim", "latent_error", "sparse_share")


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "accelerate":
        result = clips_result(options)
        (options.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
        text = "\n".join(["# Sparse against dense on the default weights", "", *clips_table(result)]) + "\n"
        (options.out / "quality.md").write_text(text)
    else:
        result = heads_result(options) if options.what == "heads" else clips_result(options)
        (options.out / f"truth_{options.what}.json").write_text(json.dumps(result, indent=1) + "\n")
        text = page(options.out)
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    heads, clips, accelerate = (parts.add_parser(name) for name in ("heads", "clips", "accelerate"))
    heads.add_argument("--clips", type=int, default=4, help="to record")
    heads.add_argument("--layers", type=int, default=2, help="to plant")
    heads.add_argument("--threads", type=int, default=1)
    for part, steps in ((clips, 12), (accelerate, 20)):
        part.add_argument("--prompts", type=int, default=8)
        part.add_argument("--seeds", type=int, default=2)
        part.add_argument("--first-seed", type=int, default=1)
        part.add_argument("--steps", type=int, default=steps)
        part.add_argument("--methods", nargs="+", help="default: all recipes; for clips each with the tail, too")
        part.add_argument("--workers", type=int, default=2, help="processes, each with a share of the prompts")
    accelerate.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="those not named stay in the file as they are")
    accelerate.add_argument("--start-percent", type=float, help="default: the node's")
    accelerate.add_argument("--dense-blocks", type=int, nargs="*", help="default: the node's")
    for part in (heads, clips, accelerate):
        part.add_argument("--date", default=datetime.date.today().isoformat())
        part.add_argument("--out", type=Path, default=PACK / "bench" / "results", help="a folder")
    return parser.parse_args()


def heads_result(options: argparse.Namespace) -> dict[str, Any]:
    import heads
    import torch

    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        recorded = heads.recorded(PROMPTS[: options.clips], SIZE, FRAMES, SCHEDULE["cfg"], SHIFT)
        groups = {"recorded": recorded, "planted": map(heads.planted, range(1, options.layers + 1))}
        tables = {name: heads.summarise(row for layer in layers for row in heads.measure(layer)) for name, layers in groups.items()}
    facts = dict(date=options.date, command=command(), torch=torch.__version__, threads=options.threads, clips=options.clips, layers=options.layers)
    return {**facts, **tables}


def command() -> str:
    return " ".join(["python bench/quality.py", *sys.argv[1:]])


def clips_result(options: argparse.Namespace) -> dict[str, Any]:
    from tessera.cli.comfy_server import HOW_TO_GET, find_comfy

    comfy = find_comfy()
    if comfy is None:
        sys.exit(f"bench/quality.py needs ComfyUI: {HOW_TO_GET}")
    cases = accelerate_cases(options) if options.what == "accelerate" else sparse_cases(options)
    with ThreadPoolExecutor(options.workers) as pool:
        parts = list(pool.map(lambda worker: run_worker(comfy, options, cases, worker), range(options.workers)))
    heads, rows = [part[0] for part in parts], [row for part in parts for row in part[1:]]
    head = {**heads[0], **{name: sum(part[name] for part in heads) for name in ("clips", "tried")}, "command": command()}
    if options.what == "accelerate" and tuple(options.modes) != MODES:
        before = json.loads((options.out / "quality.json").read_text())
        head["command"] = before["command"]
        if changed := [name for name in head if before[name] != head[name]]:
            sys.exit(f"bench/quality.py: {', '.join(changed)} differ from those of {options.out}; run all modes")
        rows = [row for row in before["runs"] if row["mode"] not in (*options.modes, None)] + rows
    return {"date": options.date, **head, "table": summarise(rows), "runs": rows}


def accelerate_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What to run: a method, a mode, and how the settings of *Accelerate* are changed."""
    from tessera.kernels.sparsity import RECIPES

    guards = {name: value for name in ("start_percent", "dense_blocks") if (value := getattr(options, name)) is not None}
    methods = options.methods or list(RECIPES)
    return [{"method": method, "mode": mode, "changes": {**spelled(method), **guards}} for mode in options.modes for method in methods]


def sparse_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What to run: a method, the density that is asked for, and the settings of *Sparse Attention*."""
    import heads

    cases = []
    methods = heads.methods()
    if unknown := set(options.methods or ()) - set(methods):
        sys.exit(f"bench/quality.py: methods {', '.join(sorted(unknown))} are not known; use some of {', '.join(methods)}")
    for method in options.methods or methods:
        for density in DENSITIES[methods[method].compensate == "pooled_tail"]:
            cases.append({"method": method, "mode": density, "changes": {**spelled(method), **SPARSE, "density": density}})
    return cases


def spelled(method: str) -> dict[str, Any]:
    """The settings that a spelling such as sparge+tail stands for."""
    name, plus, _ = method.partition("+")
    return {"method": name, **({"tail": True} if plus else {})}


def run_worker(comfy: Any, options: argparse.Namespace, cases: list[dict[str, Any]], worker: int) -> list[dict[str, Any]]:
    """One process with its share of the prompts. Small models use two cores better as two processes than as two threads."""
    job = {"prompts": options.prompts // options.workers, "seeds": options.seeds, "steps": options.steps, "first_seed": options.first_seed}
    job |= {"cases": cases, "accelerate": options.what == "accelerate", "worker": worker, "workers": options.workers}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        job["folder"] = folder
        inside = [str(comfy.python), __file__, "--inside", str(comfy.path), str(PACK / ".pkg"), json.dumps(job)]
        with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("RESULT "):
                    lines.append(json.loads(line.removeprefix("RESULT ")))
                    if len(lines) > 1:
                        lines[-1] |= compared(Path(lines[-1].pop("clip")), Path(lines[-1].pop("dense")))
                    print(lines[-1], flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines


def compared(clip: Path, dense: Path) -> dict[str, float]:
    """PSNR and SSIM of two clips `(frames, height, width, 3)` in 0..1, saved by `Sampler.keep`; the first one's file is removed."""
    import numpy as np
    from skimage.metrics import structural_similarity

    run, base = np.load(clip), np.load(dense)
    clip.unlink()
    error = max(float(np.square(run - base, dtype=np.float64).mean()), 1e-12)
    as_published = dict(channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    frames = [float(structural_similarity(one, other, **as_published)) for one, other in zip(run, base, strict=True)]
    return {"psnr": -10 * math.log10(error), "ssim": statistics.fmean(frames)}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over prompts and seeds, one row for each (method, mode or density)."""
    table = []
    keys = list(dict.fromkeys((row["method"], row["mode"]) for row in rows))
    for method, mode in keys:
        group = [row for row in rows if (row["method"], row["mode"]) == (method, mode)]
        mean = {name: statistics.fmean(row[name] for row in group) for name in MEANS}
        worst = {f"{name}_min": min(row[name] for row in group) for name in ("psnr", "ssim")}
        table.append({"method": method, "mode": mode, "runs": len(group), **worst, **mean})
    return table


def clips_table(result: dict[str, Any]) -> list[str]:
    dense = " ".join(map(str, result["dense_blocks"])) or "none"
    lines = [
        f"`{result['command']}`, {result['date']}: ComfyUI {result['comfyui']}, torch {result['torch']}, CPU. "
        f"{result['clips']} clips of {FRAMES} frames, {SIZE} x {SIZE} ({result['tokens']} tokens, blocks of {result['block']}), {result['steps']} "
        f"steps, the first {result['start_percent']:.0%} of the schedule dense, dense blocks (of 6): {dense}.",
        f"Mean over prompts and seeds whose dense clip shows its caption ({result['clips']} of {result['tried']} tried), each against its own dense "
        "clip. Density is what the sparse calls keep of all block pairs, with what is kept in any case; work counts the tail, too. *In the window* "
        "is the work of all calls in steps and blocks that may be sparse: some are dense, because a search looks again. *Overall* counts all "
        "dense calls. Searches are of a whole clip; what they cost beside the dense calls that they look at is in no work. *random* keeps random "
        "blocks, *oracle* those that exact attention looks at most; *another seed* compares two dense runs.",
        "",
        "| method | asked | density | work | in the window | overall | searches | PSNR dB (worst) | SSIM (worst) | latent error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["table"]:
        cells = [row["method"], row["mode"] or "", *(f"{row[name]:.3f}" for name in ("density", "work", "window_work"))]
        cells += [f"{row['overall_work']:.2f}", f"{row['searches']:.1f}", f"{row['psnr']:.1f} ({row['psnr_min']:.1f})"]
        cells += [f"{row['ssim']:.3f} ({row['ssim_min']:.3f})", f"{row['latent_error']:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def page(folder: Path) -> str:
    """truth.md, and its picture, of the results that lie in the folder."""
    import chart
    import heads

    lines = ["# What sparsity costs in quality"]
    found = folder / "truth_clips.json"
    if found.exists():
        result = json.loads(found.read_text())
        chart.draw(result["table"], folder / "truth.png")
        lines += ["", "## Whole clips", "", "![PSNR against the work in the window, a line a method](truth.png)", "", *clips_table(result)]
    found = folder / "truth_heads.json"
    if found.exists():
        lines += ["", *heads.markdown(json.loads(found.read_text()))]
    text = "\n".join(lines) + "\n"
    (folder / "truth.md").write_text(text)
    return text


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

    from tessera.nodes.attention import AttentionSettings, accelerate_settings, last_report, patch_attention

    def settings(mode: str | float, **changes: Any) -> AttentionSettings:
        if "dense_blocks" in changes:
            changes["dense_blocks"] = frozenset(changes["dense_blocks"])
        return accelerate_settings(mode, 0, **changes) if job["accelerate"] else AttentionSettings(min_tokens=0, **changes)

    first = job["cases"][0]
    plain = settings(first["mode"], **first["changes"])
    if job["workers"] > 1:
        torch.set_num_threads(1)
    with torch.inference_mode():
        host = Sampler(job["steps"], Path(job["folder"]))
        dense, tried = host.good_clips(job)
        versions = dict(comfyui=comfyui_version.__version__, torch=torch.__version__)
        guards = dict(start_percent=plain.start_percent, dense_blocks=sorted(plain.dense_blocks))
        emit(**versions, clips=len(dense), tried=tried, steps=job["steps"], tokens=576, block=32, **guards)
        bases = {key: host.keep(run) for key, run in dense.items()}

        def result(case: dict[str, Any], key: tuple[str, int], run: tuple[Any, Any], figures: dict[str, float]) -> None:
            base = dense[key][0]
            files = dict(clip=str(host.keep(run)), dense=str(bases[key]))
            latent_error = float((run[0] - base).norm() / base.norm())
            emit(method=case["method"], mode=case["mode"], prompt=key[0], seed=key[1], **figures, latent_error=latent_error, **files)

        for case in job["cases"]:
            patched = patch_attention(host.model, settings(case["mode"], **case["changes"]), None)
            for key in dense:
                run = host.sample(patched, *key)
                report = last_report(patched)
                figures = {name: report[name] for name in ("density", "work", "overall_work", "searches")}
                share = report["sparse_share_in_window"]
                result(case, key, run, {**figures, "sparse_share": share, "window_work": share * report["work"] + 1 - share})
        for prompt, seed in dense:
            other = host.sample(host.model, prompt, seed + 1000)
            figures = dict(density=1.0, work=1.0, window_work=1.0, overall_work=1.0, searches=0, sparse_share=0.0)
            result({"method": "another seed (dense)", "mode": None}, (prompt, seed), other, figures)


class Sampler:
    """The default weights in ComfyUI, by its stock nodes. A clip is (latents, frames `(frames, height, width, 3)` in 0..1)."""

    def __init__(self, steps: int, clips: Path) -> None:
        import folder_paths
        import torch
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        import nodes
        from tessera.models.default import vocabulary
        from tessera.nodes import DEFAULT_WEIGHTS

        for folder in ("diffusion_models", "vae"):
            folder_paths.add_model_folder_path(folder, str(DEFAULT_WEIGHTS / folder))
        self.nodes, self.encode, self.steps = nodes, vocabulary.encode, steps
        self.files = (clips / f"{number}.npy" for number in itertools.count())
        self.model = ModelSamplingSD3().patch(nodes.UNETLoader().load_unet("tessera_shapes_t2v.safetensors", "default")[0], SHIFT)[0]
        self.vae = nodes.VAELoader().load_vae("tessera_shapes_vae.safetensors")[0]
        self.empty = {"samples": torch.zeros(1, 16, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)}

    def sample(self, patched: Any, prompt: str, seed: int) -> tuple[Any, Any]:
        positive, negative = ([[self.encode(text), {}]] for text in (prompt, ""))
        latent = self.nodes.common_ksampler(patched, seed, self.steps, positive=positive, negative=negative, latent=self.empty, **SCHEDULE)[0]
        return latent["samples"], self.nodes.VAEDecode().decode(self.vae, latent)[0].clamp(0, 1).reshape(FRAMES, SIZE, SIZE, 3)

    def keep(self, run: tuple[Any, Any]) -> Path:
        """The file with the clip: what compares clips need not be in ComfyUI's environment."""
        import numpy as np

        file = next(self.files)
        np.save(file, run[1].numpy())
        return file

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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    else:
        main()
