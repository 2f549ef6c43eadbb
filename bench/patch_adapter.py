"""The patch adapter on held-out clips of the default model, in real ComfyUI: PSNR and flicker of every level, all through the same VAE.

    PYTHON_OF_COMFYUI bench/patch_adapter.py COMFYUI PACKAGE_PARENT [--clips 8] [--adapter NAME] [--degradations "x8" "x8, noise 13/255"]

Clips of 17 frames, 256 x 256, drawn with seeds that training never used, are made 8 times smaller (bicubic), with and without noise, and
upscaled. Results are added to bench/results/patch_adapter.json; the table in the .md beside it is made of what is there.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("comfyui")
parser.add_argument("package_parent")
parser.add_argument("--clips", type=int, default=8)
parser.add_argument("--adapter", default="tessera_shapes_patch_adapter.safetensors")
parser.add_argument("--frames", type=int, default=17)
parser.add_argument("--degradations", nargs="+", default=["x8", "x8, noise 13/255"])
parser.add_argument("--only", default="", help="names of rows, separated by ;")
parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
parser.add_argument("--augmentation", type=float, default=0.0)
options = parser.parse_args()
sys.argv = sys.argv[:1]
sys.path.insert(0, options.comfyui)
sys.path.append(options.package_parent)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import folder_paths  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from safetensors.torch import load_file  # noqa: E402

import nodes  # noqa: E402
from tessera.models.default import vocabulary  # noqa: E402
from tessera.models.upscale import catanet, colour, pictures  # noqa: E402
from tessera.models.upscale.metrics import flicker, psnr  # noqa: E402
from tessera.nodes import DEFAULT_WEIGHTS, UPSCALE  # noqa: E402
from tessera.nodes.upscale import PatchUpscaleVideo  # noqa: E402
from tessera.nodes.upscale import patch_adapter as host  # noqa: E402
from tessera.training.default import clips  # noqa: E402
from tessera.training.upscale.train_patch_adapter import CANVAS, degrade  # noqa: E402

torch.set_num_threads(1)
for kind in ("diffusion_models", "vae"):
    folder_paths.add_model_folder_path(kind, str(DEFAULT_WEIGHTS / kind))
folder_paths.folder_names_and_paths[host.FOLDER] = ([str(UPSCALE / host.FOLDER)], {".safetensors"})

model = nodes.UNETLoader().load_unet("tessera_shapes_t2v.safetensors", "default")[0]
vae = nodes.VAELoader().load_vae("tessera_shapes_vae.safetensors")[0]
adapter = host.LoadPatchAdapter.execute(options.adapter).args[0]
EMPTY = [[vocabulary.embed([[-1, -1, -1]]), {}]]
DEGRADATIONS = {"x8": (8, 0.0), "x8, noise 13/255": (8, 0.1), "x4": (4, 0.0)}  # noise in units of [-1, 1]
catanets = {scale: catanet.build(load_file(UPSCALE / "upscale_models" / f"tessera_catanet_x{scale}.safetensors")).eval() for scale in (4,)}


def through_vae(frames):
    """`(frames, height, width, 3)` encoded and decoded again."""
    out = vae.decode(vae.encode(frames))
    return out.reshape(-1, *out.shape[-3:])[: len(frames)].clamp(0, 1)


def enlarge(small):
    return torch.stack([pictures.resize(frame.movedim(-1, 0), (CANVAS, CANVAS)).clamp(0, 1).movedim(0, -1) for frame in small])


def network(small):
    net = catanets[4]
    frames = [pictures.upscale(frame.movedim(-1, 0), pictures.Network(net, 4, 28), (CANVAS, CANVAS)) for frame in small]
    return torch.stack([frame.movedim(0, -1) for frame in frames])


def diffusion(small, **changes):
    settings = dict(
        denoise=1.0, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple", seed=3, tile=128, frames=0, positive=EMPTY, negative=EMPTY
    )
    settings |= dict(coordinates="window", fusion="joint", colour="none", adapter=adapter, augmentation=options.augmentation) | changes
    return PatchUpscaleVideo.execute(model, vae, image=small, size={"size": "factor", "factor": CANVAS / small.shape[1]}, **settings).args[0]


class OtherView:
    """The guide with another global view, for the time of a run."""

    def __init__(self, change):
        self.change, self.original = change, host.PatchGuide.__init__

    def __enter__(self):
        original, change = self.original, self.change

        def init(guide, loaded, enlarged, whole, *rest):
            original(guide, loaded, enlarged, change(whole), *rest)

        host.PatchGuide.__init__ = init

    def __exit__(self, *_):
        host.PatchGuide.__init__ = self.original


def rows(large, small, caption, other):
    """name -> a function that makes the clip."""
    text = [[vocabulary.embed([caption]), {}]]
    level_a = dict(adapter=None, denoise=0.25, cfg=3.0, positive=text)

    def changed(change, **more):
        with OtherView(change):
            return diffusion(small, **more)

    def view(frames):
        resized = [pictures.resize(frame.movedim(-1, 0), (128, 128)).clamp(0, 1).movedim(0, -1) for frame in frames]
        return lambda whole: model.model.process_latent_in(vae.encode(torch.stack(resized))).to(whole)

    return {
        "large clip": lambda: through_vae(large),
        "bicubic": lambda: through_vae(enlarge(small)),
        "CATANet, frame by frame": lambda: through_vae(network(small)),
        "a, denoise 0.25": lambda: diffusion(small, **level_a),
        "b, 20 steps": lambda: diffusion(small),
        "c, 4 steps": lambda: diffusion(small, steps=4),
        "c, 4 steps, blank view": lambda: changed(view(torch.full_like(small, 0.1)), steps=4),
        "c, 4 steps, another clip's view": lambda: changed(view(other), steps=4),
        "c, 2 steps": lambda: diffusion(small, steps=2),
        "c, 1 step": lambda: diffusion(small, steps=1),
    }


def main():
    wanted = [name for name in options.only.split(";") if name]
    results = {}
    for name in options.degradations:
        factor, noise = DEGRADATIONS[name]
        generator = torch.Generator().manual_seed(990_000)
        captions = clips.random_captions(options.clips, generator)
        drawn = [clips.draw(caption[None], options.frames, CANVAS, generator) for caption in captions]
        smalls = [degrade(large, factor, noise, generator) for large in drawn]
        to_images = lambda clip: ((clip[0] + 1) / 2).movedim(0, -1)  # noqa: E731
        table = results[name] = {}
        for index in range(options.clips):
            large, small, other = to_images(drawn[index]), to_images(smalls[index]), to_images(smalls[(index + 1) % options.clips])
            for row, make in rows(large, small, captions[index].tolist(), other).items():
                if wanted and row not in (*wanted, "large clip"):
                    continue
                begin = time.time()
                out = make()
                seconds = time.time() - begin
                pixels, drawn_pixels = out.movedim(-1, 1), large.movedim(-1, 1)
                matched = colour.match(pixels, enlarge(small).movedim(-1, 1), "wavelet")
                found = dict(psnr=psnr(pixels, drawn_pixels), psnr_wavelet=psnr(matched, drawn_pixels), seconds=seconds)
                if row == "large clip":
                    reference = pixels
                found |= dict(psnr_vae=psnr(pixels, reference), psnr_vae_wavelet=psnr(matched, reference))
                found |= dict(flicker=flicker(pixels - drawn_pixels), flicker_wavelet=flicker(matched - drawn_pixels))
                table.setdefault(row, []).append(found)
            print(name, index, {row: round(found[-1]["psnr"], 2) for row, found in table.items()}, flush=True)
    about = {name: getattr(options, name) for name in ("clips", "frames", "adapter", "augmentation")}
    about |= dict(torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    file = Path(options.out, "patch_adapter.json")
    everything = json.loads(file.read_text()) if file.exists() else {}
    everything |= {name: dict(about=about, rows=table) for name, table in results.items()}
    file.write_text(json.dumps(everything, indent=1) + "\n")
    text = report(everything)
    print(text)
    file.with_suffix(".md").write_text(text)


def report(everything):
    """The means as a Markdown table."""
    kinds = {"psnr_vae": "PSNR", "psnr": "PSNR to the drawn clip", "psnr_wavelet": "the same with wavelet colours", "flicker": "flicker"}
    lines = [
        f"Means of {options.clips} held-out clips, {options.frames} frames, 256 x 256, seed 3; windows of 128. Everything has gone through the",
        "default VAE once. PSNR in dB against the large clip through the same VAE, and against the clip as drawn, where the VAE's own loss is",
        "the limit; wavelet colours are those of the enlarged clip. Flicker: mean absolute second difference in time of the error against",
        "the drawn clip, in 1/255.",
        "",
        "| " + " | ".join(["", *(f"{name}: {kind}" for name in everything for kind in kinds.values())]) + " |",
        "|---" * (1 + len(kinds) * len(everything)) + "|",
    ]
    for row in next(iter(everything.values()))["rows"]:
        cells = []
        for part in everything.values():
            means = {kind: statistics.mean(found[kind] for found in part["rows"][row]) for kind in kinds}
            cells += [f"{means[kind] * (255 if kind == 'flicker' else 1):.2f}" for kind in kinds]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines) + "\n"


with torch.inference_mode():
    main()
