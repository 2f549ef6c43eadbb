"""Runs inside ComfyUI's Python (see test_comfy_patch_adapter.py): a patch adapter on the stock model.

    python comfy_patch_adapter.py COMFYUI PACKAGE_PARENT SCRATCH

Prints one JSON object per case.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

COMFYUI, PACKAGE_PARENT, SCRATCH = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)

import comfy.model_management as mm  # noqa: E402
import folder_paths  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from safetensors.torch import save_file  # noqa: E402

import nodes  # noqa: E402
from tessera.models.default import vocabulary  # noqa: E402
from tessera.models.upscale.patch_adapter import Config, PatchAdapter, Window, initialise, metadata  # noqa: E402
from tessera.nodes import DEFAULT_WEIGHTS  # noqa: E402
from tessera.nodes.attention import AttentionSettings, patch_attention  # noqa: E402
from tessera.nodes.upscale import PatchUpscaleVideo  # noqa: E402
from tessera.nodes.upscale import patch_adapter as host  # noqa: E402
from tessera.nodes.upscale.windows import JointModulation  # noqa: E402
from tessera.training.default import evaluate  # noqa: E402
from tessera.training.upscale.train_patch_adapter import Model  # noqa: E402

for kind in ("diffusion_models", "vae"):
    folder_paths.add_model_folder_path(kind, str(DEFAULT_WEIGHTS / kind))
folder_paths.folder_names_and_paths[host.FOLDER] = ([SCRATCH], {".safetensors"})


def emit(case, **values):
    print("RESULT " + json.dumps({"case": case, **values}), flush=True)


def random_model():
    """The library's form of base, adapter and LoRA, all of it at work."""
    model = Model(evaluate.load()[1], Config(), 4)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapter_file(state, config, name):
    save_file({key: value.detach().contiguous() for key, value in state.items()}, str(Path(SCRATCH) / name), metadata=metadata(config))
    return name


library = random_model()
unet = nodes.UNETLoader().load_unet("tessera_shapes_t2v.safetensors", "default")[0]
adapter = host.LoadPatchAdapter.execute(adapter_file(library.trained(), Config(), "random.safetensors")).args[0]
vae = nodes.VAELoader().load_vae("tessera_shapes_vae.safetensors")[0]
empty = [[vocabulary.embed([[-1, -1, -1]]), {}]]
text = [[vocabulary.encode("red disc left"), {}]]


def parity():
    """One prediction of the stock model with the adapter, against the library's forward, window by window and fused."""
    generator = torch.Generator().manual_seed(6)
    canvas, whole = torch.randn(1, 16, 5, 16, 24, generator=generator), torch.randn(1, 16, 5, 16, 16, generator=generator)
    x, sigma = torch.randn(1, 16, 5, 16, 24, generator=generator), torch.tensor([0.6])
    for name in ("plain", "attention patch"):
        patched = host.adapted(unet, adapter)
        if name == "attention patch":
            patched = patch_attention(patched, AttentionSettings(min_tokens=10**6), None)
        guide = host.PatchGuide(adapter, canvas, whole, 0.0, 8.0, 0)
        handler = JointModulation(8, "window", guide=guide)
        mm.load_models_gpu([patched, adapter.patcher])
        patched.pre_run()
        seen = {}

        def predict(model, conds, part, timestep, options, patched=patched, seen=seen):
            c = torch.cat([empty[0][0], text[0][0]])
            transformer = {**patched.model_options["transformer_options"], **options["transformer_options"]}
            out = model.apply_model(part.repeat(2, 1, 1, 1, 1), timestep.repeat(2), c_crossattn=c, transformer_options=transformer)
            call = options["transformer_options"][host.KEY]
            seen[tuple((s.start, s.stop) for s in call.slices)] = out[:1].clone()
            return [out[:1], out[1:]]

        options = {"transformer_options": {"wrappers": patched.wrappers}}
        fused = handler.execute(predict, patched.model, [[{}], [{}]], x, sigma, options)
        worst = 0.0
        for slices, got in seen.items():
            cut = (..., *(slice(*part) for part in slices))
            window = Window(slices[1][0] / 16, slices[2][0] / 24, slices[1][1] / 16, slices[2][1] / 24)
            velocity = library(x[cut], sigma, canvas[cut], torch.zeros(1), torch.tensor([8.0]), [window], whole)
            wanted = x[cut] - sigma * velocity  # apply_model gives the clean latent
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
        patched.cleanup()
        mm.unload_all_models()
        counts = dict(windows=len(seen), views=len(guide.views), functions=len(guide.overrides))
        emit(f"parity {name}", error=worst, two=float((fused[0] - fused[1]).abs().max()), **counts)


def sampling():
    """The node, start to end; the model that was given is as it was afterwards."""
    frames = torch.rand(5, 24, 32, 3, generator=torch.Generator().manual_seed(1))

    def run(**changes):
        settings = dict(denoise=1.0, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", seed=3, tile=512, frames=0)
        settings |= dict(coordinates="canvas", fusion="joint", colour="none", adapter=adapter) | changes
        return PatchUpscaleVideo.execute(unet, vae, empty, empty, frames, {"size": "factor", "factor": 6.0}, **settings).args[0]

    before = {name: value.clone() for name, value in unet.model.diffusion_model.state_dict().items()}
    with_adapter, again, without = run(), run(), run(adapter=None, tile=128)
    mm.unload_all_models()
    after = unet.model.diffusion_model.state_dict()
    emit(
        "sampling",
        shape=list(with_adapter.shape),
        repeatable=torch.equal(with_adapter, again),
        different=float((with_adapter - without).abs().max()),
        untouched=all(torch.equal(value, after[name]) for name, value in before.items()),
        options=sorted(unet.model_options["transformer_options"]),
    )


def refusals():
    small = Config(dim=96, layers=2)
    plain = "plain.safetensors"
    save_file({"x": torch.zeros(1)}, str(Path(SCRATCH) / plain))
    name = adapter_file(initialise(PatchAdapter(small)).state_dict(), small, "small.safetensors")
    Path(SCRATCH, "cut.safetensors").write_bytes(Path(SCRATCH, name).read_bytes()[:-100])
    many = adapter_file(initialise(PatchAdapter(small)).state_dict(), replace(small, layers=10**8), "many.safetensors")
    for case, action in (
        ("other base", lambda: host.adapted(unet, host.LoadPatchAdapter.execute(name).args[0])),
        ("no adapter", lambda: host.LoadPatchAdapter.execute(plain)),
        ("cut off", lambda: host.LoadPatchAdapter.execute("cut.safetensors")),
        ("many layers", lambda: host.LoadPatchAdapter.execute(many)),
    ):
        try:
            action()
        except ValueError as error:
            emit(case, error=str(error))


with torch.inference_mode():
    parity()
    sampling()
    refusals()
