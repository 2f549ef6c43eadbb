"""Runs inside ComfyUI's Python (see test_comfy_upscale.py): fused windows with operators whose result is known, and the network node.

    python comfy_upscale.py COMFYUI PACKAGE_PARENT

Prints one JSON object per case.
"""

import json
import sys
import tempfile
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

COMFYUI, PACKAGE_PARENT = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import av  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)

import comfy.conds  # noqa: E402
import comfy.model_detection as model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from server import PromptServer  # noqa: E402

import nodes  # noqa: E402
from tessera.models.default import vocabulary  # noqa: E402
from tessera.models.upscale.video import upscale_video  # noqa: E402
from tessera.models.upscale.video_reader import Clip, VideoReader  # noqa: E402
from tessera.nodes import DEFAULT_WEIGHTS  # noqa: E402
from tessera.nodes.upscale import PatchUpscale, PatchUpscaleVideoFile  # noqa: E402
from tessera.nodes.upscale.pictures import Display  # noqa: E402
from tessera.nodes.upscale.windows import JointModulation  # noqa: E402


def emit(case, **values):
    print("RESULT " + json.dumps({"case": case, **values}), flush=True)


def windows():
    """The handler with operators in place of the model."""
    torch.manual_seed(0)
    for shape in ((1, 4, 40, 56), (2, 16, 9, 24, 34), (1, 4, 17 * 2, 23 * 2)):
        for fusion in ("joint", "average"):
            for frames in (0, 4):
                x = torch.randn(shape)
                seen = []

                def identity(model, conds, part, timestep, options, seen=seen):
                    seen.append((tuple(part.shape), options["transformer_options"].get("rope_options")))
                    return [part, 2 * part]

                handler = JointModulation(8, "canvas", frames, frames // 2, fusion)
                options = {"transformer_options": {"mine": 1}}
                out = handler.execute(identity, None, [[{}], [{}]], x, None, options)
                error = max(float((out[0] - x).abs().max()), float((out[1] - 2 * x).abs().max()))
                constant = handler.execute(lambda m, c, part, t, o: [torch.full_like(part, 0.5)], None, [[{}]], x, None, options)[0]
                sides = {size[-2:] for size, _ in seen}
                emit(
                    f"windows {shape} {fusion} {frames}",
                    error=error,
                    constant=float((constant - 0.5).abs().max()),
                    largest=max(max(side) for side in sides),
                    shifts=sorted({(rope["shift_y"], rope["shift_x"]) for _, rope in seen}),
                    untouched=options == {"transformer_options": {"mine": 1}},
                    used=handler.should_use_context(None, None, x, None, options),
                )
    small = torch.randn(1, 4, 16, 16)
    emit("small", used=JointModulation(8).should_use_context(None, None, small, None, {}))


def conditions():
    """What lies on the latent is cut like it; the rest is for all windows."""
    x = torch.arange(40 * 40.0).view(1, 1, 40, 40)
    cond = {
        "model_conds": {"c_concat": comfy.conds.CONDNoiseShape(x.clone()), "c_crossattn": comfy.conds.CONDCrossAttn(torch.ones(1, 7, 8))},
        "strength": 1.0,
    }
    equal, whole = [], []

    def operator(model, conds, part, timestep, options):
        inner = conds[0][0]["model_conds"]
        equal.append(torch.equal(inner["c_concat"].cond, part))
        whole.append(tuple(inner["c_crossattn"].cond.shape) == (1, 7, 8))
        return [part]

    JointModulation(8, "window").execute(operator, None, [[cond], None][:1], x, None, {"transformer_options": {}})
    emit("conditions", cut=all(equal), whole=all(whole), windows=len(equal), untouched=torch.equal(cond["model_conds"]["c_concat"].cond, x))
    try:
        JointModulation(8).execute(operator, None, [[{**cond, "control": object()}]], x, None, {"transformer_options": {}})
    except ValueError as error:
        emit("control", error=str(error))


def image_to_video():
    """Wan I2V: the low-resolution view in the concatenated latent is cut like the windows, the picture tokens of the whole frame stay whole."""
    from types import SimpleNamespace

    from comfy.ldm.wan.model import WanModel
    from comfy.patcher_extension import WrappersMP

    operations = dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    sizes = dict(dim=64, ffn_dim=64, text_dim=64, num_heads=1, num_layers=1)
    network = WanModel(model_type="i2v", in_dim=36, freq_dim=256, out_dim=16, **sizes, **operations)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in sorted(network.state_dict().items())}
    detect = model_detection.detect_unet_config
    model_detection.detect_unet_config = lambda *args, **kwargs: {**detect(*args, **kwargs), **sizes}
    try:
        model = comfy.sd.load_diffusion_model_state_dict(state)
    finally:
        model_detection.detect_unet_config = detect
    picture, mask = torch.randn(1, 16, 3, 32, 48, generator=generator), torch.rand(1, 1, 3, 32, 48, generator=generator)
    tokens = torch.randn(1, 257, 1280, generator=generator)
    seen = []

    def spy(executor, x, timestep, context, clip_fea=None, *rest, **kwargs):
        seen.append((x[:1, 16:].clone(), None if clip_fea is None else clip_fea[:1].clone()))
        return executor(x, timestep, context, clip_fea, *rest, **kwargs)

    extra = {"concat_latent_image": picture, "concat_mask": mask, "clip_vision_output": SimpleNamespace(penultimate_hidden_states=tokens)}
    positive = [[torch.randn(1, 4, 64, generator=generator), extra]]
    latent = torch.zeros(1, 16, 3, 32, 48)
    calls = {}
    for name, handler in (("whole", None), ("windows", JointModulation(8))):
        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", spy)
        if handler is not None:
            patched.model_options["context_handler"] = handler
        seen.clear()
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        comfy.sample.sample(patched, noise, 1, 1.0, "euler", "simple", positive, positive, latent, seed=1)
        calls[name] = list(seen)
    whole = calls["whole"][0][0]
    cuts = [whole[..., top : top + 16, left : left + 16] for top in range(0, 17, 2) for left in range(0, 33, 2)]
    emit(
        "image to video",
        windows=len(calls["windows"]),
        cut=all(any(torch.equal(part, cut) for cut in cuts) for part, _ in calls["windows"]),
        different=len({float(part.sum()) for part, _ in calls["windows"]}),
        whole=all(torch.equal(fea, tokens) for _, fea in calls["windows"]),
    )


def seams():
    """One step's prediction of the default model, fused both ways: how much the seams of the grid stand out against other lines."""
    model = nodes.UNETLoader().load_unet("tessera_shapes_t2v.safetensors", "default")[0]
    positive = [[vocabulary.encode("red disc right"), {}]]
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(1, 16, 5, 48, 48, generator=generator)
    result = {}
    for fusion in ("joint", "average"):
        patched = model.clone()
        patched.model_options["context_handler"] = JointModulation(8, "window", fusion=fusion)
        out = nodes.common_ksampler(patched, 3, 4, 1.0, "euler", "simple", positive, positive, {"samples": latent}, denoise=0.5)[0]["samples"]
        lines = list(range(16, 48, 16)) if fusion == "joint" else list(range(8, 48, 8))
        steps = (out.diff(dim=-1).abs().mean((0, 1, 2, 3)), out.diff(dim=-2).abs().mean((0, 1, 2, 4)))
        on = sum(float(step[[line - 1 for line in lines]].mean()) for step in steps)
        every = sum(float(step.mean()) for step in steps)
        result[fusion] = on / every
    emit("seams", **result)


class Nearest:
    """An upscale model as ComfyUI hands it over, at whose n-th patch the user presses the stop button, or something fails."""

    scale = 2
    size_requirements = SimpleNamespace(minimum=1, multiple_of=1)
    model = torch.nn.Conv2d(1, 1, 1)

    def __init__(self, stop=None, error=None):
        self.stop, self.error, self.calls = stop, error, 0

    def to(self, device):
        pass

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.stop:
            if self.error is not None:
                raise self.error
            comfy.model_management.interrupt_current_processing()
        return torch.nn.functional.interpolate(x, scale_factor=2)


@contextmanager
def counted(source):
    """How often a file is opened, and how many frames are decoded of whatever is."""
    counts = {"opened": 0, "decoded": 0}
    real_open, real_decoded = av.open, VideoReader._decoded

    def open_one(file, *rest, **more):
        counts["opened"] += file == source
        return real_open(file, *rest, **more)

    def decoded(reader):
        for item in real_decoded(reader):
            counts["decoded"] += isinstance(item, av.VideoFrame)
            yield item

    av.open, VideoReader._decoded = open_one, decoded
    try:
        yield counts
    finally:
        av.open, VideoReader._decoded = real_open, real_decoded


def interrupted():
    """A clip of 12 frames of 2 patches, stopped in the middle of the sixth: what is kept, said, and computed in the next run."""
    PromptServer.instance = SimpleNamespace(client_id="window", send_progress_text=lambda line, node, window: said.append(line))
    node = type("Node", (PatchUpscaleVideoFile,), {"hidden": SimpleNamespace(unique_id="7", prompt={"1": {}}, extra_pnginfo=None)})
    previews = []
    comfy.utils.PROGRESS_BAR_HOOK = lambda value, total, preview, node_id=None: previews.append((value, total, preview[1].size))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        folder_paths.set_input_directory(folder)
        folder_paths.set_output_directory(str(out))
        for name in ("stop", "memory"):
            frames = torch.rand(12, 48, 96, 3, generator=torch.Generator().manual_seed(1))
            upscale_video(Clip(frames, Fraction(25)), Path(folder) / f"{name}.mp4", lambda x: x, (96, 48))
            error = torch.cuda.OutOfMemoryError("device full") if name == "memory" else None
            first, second, third = Nearest(11, error), Nearest(), Nearest()
            said, found, lists = [], "", []
            arguments = {"file": f"{name}.mp4", "size": {"size": "factor", "factor": 2.0}, "tile": 64, "overlap": 16}
            arguments |= {"filename_prefix": f"sub/{name}", "container": "mp4", "crf": 16}
            try:
                node.execute(upscale_model=first, **arguments)
            except (comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError) as stopped:
                found = type(stopped).__name__
            comfy.model_management.interrupt_current_processing(False)
            lists.append(sorted(file.name for file in (out / "sub").glob(f"*{name}*")))
            with counted(f"file:{folder}/{name}.mp4") as count_of:
                node.execute(upscale_model=third, **{**arguments, "crf": 17})  # another run: it must not take the part
            node.execute(upscale_model=second, **arguments)
            lists.append(sorted(file.name for file in (out / "sub").glob(f"*{name}*")))
            with av.open(str(out / "sub" / f"{name}_00002_.mp4")) as container:
                count = len(list(container.decode(video=0)))
            calls = [first.calls, third.calls, second.calls]
            emit(f"interrupted {name}", found=found, files=lists, calls=calls, said=said, previews=previews, frames=count, **count_of)


def pictures():
    """Three pictures of 2 patches with 1, 3 and 4 channels, stopped in the second: finished patches are not computed again, nor is a level lost."""
    node = type("Node", (PatchUpscale,), {"hidden": SimpleNamespace(unique_id="7")})
    for channels in (1, 3, 4):
        image = torch.linspace(0, 1, 3 * 48 * 96).view(3, 48, 96, 1).repeat(1, 1, 1, channels)
        image[..., 3:] = 0.25
        said = []
        PromptServer.instance = SimpleNamespace(client_id="window", send_progress_text=lambda line, node, window, said=said: said.append(line))
        comfy.utils.PROGRESS_BAR_HOOK = lambda value, total, preview, node_id=None: preview[1].load()
        model = Nearest(stop=3)
        arguments = {"upscale_model": model, "image": image, "size": {"size": "factor", "factor": 2.0}, "tile": 64, "overlap": 16}
        try:
            node.execute(**arguments)
        except comfy.model_management.InterruptProcessingException:
            comfy.model_management.interrupt_current_processing(False)
        stopped = model.calls
        out = node.execute(**arguments).result[0]
        error = (out - image.repeat_interleave(2, 1).repeat_interleave(2, 2)).abs().max()
        emit(f"pictures {channels}", calls=[stopped, model.calls], error=float(error), shape=list(out.shape), said=said)
    said = []
    PromptServer.instance = SimpleNamespace(client_id="window", send_progress_text=lambda line, node, window: said.append(line))
    display = Display("7", "frame", None)
    display.plan(8, 8, 1, 2, 64, 16)
    display.finished(0, None)
    display.finished(1, torch.zeros(3, 16, 16))
    emit("unknown length", said=said)


folder = DEFAULT_WEIGHTS / "diffusion_models"
folder_paths.add_model_folder_path("diffusion_models", str(folder))
with torch.inference_mode():
    windows()
    conditions()
    image_to_video()
    seams()
    interrupted()
    pictures()
