"""Runs inside ComfyUI's Python (see test_comfy_lora_composer.py): LoRA Composer on tiny models through the stock loaders.

    python comfy_lora_composer.py COMFYUI PACKAGE_PARENT MODELS

Writes a tiny SD1.5 checkpoint and LoRAs into MODELS unless they are there. Prints one JSON object per case.
"""

import json
import logging
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

COMFYUI, PACKAGE_PARENT, MODELS = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)

import comfy.clip_model  # noqa: E402
import comfy.ldm.flux.model  # noqa: E402
import comfy.ldm.wan.model  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import folder_paths  # noqa: E402
import node_helpers  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import nodes  # noqa: E402
from tessera.models.patchers.lora_composer.composer import ALL, CROSS  # noqa: E402
from tessera.models.patchers.lora_composer.concepts import Box  # noqa: E402
from tessera.models.patchers.lora_composer.latent import enhancement_loss  # noqa: E402
from tessera.nodes.lora import host as life  # noqa: E402
from tessera.nodes.lora import nodes as host  # noqa: E402

host.LoRAComposer.hidden = SimpleNamespace(unique_id=None)  # as the server does
for kind in ("checkpoints", "loras"):
    folder_paths.add_model_folder_path(kind, str(MODELS / kind), is_default=True)

start = time.monotonic()
# As the shared workflow calls them.
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
LORAS = [f"your_{which}_lora.safetensors" for which in ("first", "second", "third")]
NEW = dict(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
LINEAR = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.2")


def emit(case, **values):
    print(time.monotonic() - start, time.process_time(), file=sys.stderr)
    print("RESULT " + json.dumps({"case": case, **values}), flush=True)


def filled(module, seed):
    """Fan-in scaled weights, the same for the same names."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(module.state_dict().items()):
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(noise / value[0].numel() ** 0.5 if value.ndim > 1 else noise * 0.05 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return module


def write_checkpoint(file):
    config = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 1], num_heads=8)
    config |= dict(transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=-1, context_dim=768)
    unet = UNetModel(num_head_channels=-1, use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False, **config, **NEW)
    state = {f"model.diffusion_model.{key}": value.half() for key, value in filled(unet, 1).state_dict().items()}
    state |= {f"first_stage_model.{key}": value.half() for key, value in filled(TAESD(latent_channels=4).float(), 2).state_dict().items()}
    # The stock loader takes a whole CLIP-L only. Its layers are left at nothing, so that the text is its embedding, and the file is quick.
    text = json.loads((Path(COMFYUI) / "comfy" / "sd1_clip_config.json").read_text())
    clip = comfy.clip_model.CLIPTextModel(text, torch.float32, "cpu", comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(3)
    for key, value in clip.state_dict().items():
        if not key.startswith("text_model."):
            continue
        out = torch.zeros(value.shape, dtype=torch.half)
        if "embedding" in key:
            out = torch.randn(value.shape, generator=generator).half()
        elif "norm" in key and key.endswith("weight"):
            out += 1
        state[f"cond_stage_model.transformer.{key}"] = out
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, str(file))
    return unet


def lora_of(network, names, seed, rank=4):
    """A random LoRA in the common format, for the layers whose name ends in one of `names`."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, module in network.named_modules():
        if name.endswith(names):
            key = "lora_unet_" + name.replace(".", "_")
            out[f"{key}.lora_up.weight"] = torch.randn(module.weight.shape[0], rank, generator=generator) * 0.3
            out[f"{key}.lora_down.weight"] = torch.randn(rank, module.weight.shape[1], generator=generator) * module.weight.shape[1] ** -0.5
            out[f"{key}.alpha"] = torch.tensor(rank / 2)
    return out


def write(folder):
    checkpoint = folder / "checkpoints" / CHECKPOINT
    if checkpoint.is_file():
        return
    unet = write_checkpoint(checkpoint)
    (folder / "loras").mkdir(exist_ok=True)
    for index, name in enumerate(LORAS):
        save_file(lora_of(unet, LINEAR, 10 + index), str(folder / "loras" / name))
    other = lora_of(unet, ("attn2.to_k",), 20)
    save_file({key: value.repeat(1, 2) if "down" in key else value for key, value in other.items()}, str(folder / "loras" / "other_base.safetensors"))
    save_file(
        {f"lora_unet_nobody.{key}": torch.ones(4, 4) for key in ("lora_up.weight", "lora_down.weight")}, str(folder / "loras" / "none.safetensors")
    )


EMPTY = {"samples": torch.zeros(1, 4, 8, 16)}  # 128 x 64 pixels
BOXES = [(0, 0, 40, 64), (40, 0, 40, 64), (88, 8, 40, 48)]
PROMPTS = ["photo of a cat", "a dog on grass", "a red bird"]
NAMES = ["cat", "dog", "red bird"]


@cache
def region(index, lora=None, box=None, words=None, concepts=()):
    loaded = nodes.LoraLoader().load_lora(model, clip, lora or LORAS[index], 0.8, 1.0)
    words = NAMES[index] if words is None else words
    return host.ConceptRegion.execute(*loaded, PROMPTS[index], words, *(box or BOXES[index]), concepts=concepts).args[0]


def three():
    return region(2, concepts=region(1, concepts=region(0)))


def composed(concepts, isolation=True, reinitialise=False, enhancement=0.0, layers=CROSS, latent=EMPTY, base=None):
    settings = dict(isolation=isolation, reinitialise=reinitialise, enhancement=enhancement, layers=layers)
    return host.LoRAComposer.execute(base or model, concepts, latent, **settings).args[0]


@cache
def encode(text):
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def predict(patcher, x, text, branches, sigma=3.0, options=None):
    """One call of the model as the sampler makes it, negative and positive in one batch."""
    mm.load_models_gpu([patcher])
    patcher.pre_run()
    transformer = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers, "cond_or_uncond": branches, **(options or {})}
    out = patcher.model.apply_model(x, torch.full((len(x),), sigma), c_crossattn=text, transformer_options=transformer)
    patcher.cleanup()
    return out


def merged_weights(patcher):
    """The attn2 weights as the stock loader makes them, float64."""
    mm.unload_all_models()
    mm.load_models_gpu([patcher])
    names = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
    found = {
        key: value.double().clone() for key, value in patcher.model.diffusion_model.state_dict().items() if ".attn2." in key and key.endswith(names)
    }
    mm.unload_all_models()
    return found


def cross_attention():
    """Every cross-attention call of a forward: outside the boxes the base's own bits, inside the stock-merged LoRA's in float64."""
    concepts = three()
    patched = composed(concepts)
    network = model.model.diffusion_model
    merged = [merged_weights(part.model) for part in concepts]
    base = merged_weights(model)
    seen = []
    patched.set_model_attn2_patch(lambda n, context, value, extra: (seen.append([n.clone(), context.clone()]), (n, context, value))[1])
    patched.set_model_attn2_output_patch(lambda n, extra: (seen[-1].extend([n.clone(), extra["block"], extra["activations_shape"][-2:]]), n)[1])
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(5))
    text = torch.cat([encode("")[0][0], encode("three animals")[0][0]])
    predict(patched, x, text, [1, 0])
    mm.load_models_gpu([model])
    outside_equal, worst, changed, calls = True, 0.0, 1e9, []
    blocks = {"input": "input_blocks", "output": "output_blocks"}
    for n, context, out, block, size in seen:
        name = f"{blocks[block[0]]}.{block[1]}.1.transformer_blocks.0.attn2"
        module = network.get_submodule(name)
        own = module(n, context=context, transformer_options={})
        labels = torch.zeros(size, dtype=torch.long)
        for index, (left, top, width, height) in enumerate(BOXES, 1):  # cells wholly inside, found by trying every one
            cell = (64 // size[0], 128 // size[1])
            for row in range(size[0]):
                for column in range(size[1]):
                    if (
                        left <= column * cell[1]
                        and (column + 1) * cell[1] <= left + width
                        and top <= row * cell[0]
                        and (row + 1) * cell[0] <= top + height
                    ):
                        labels[row, column] = index
        flat = labels.flatten()
        outside_equal &= torch.equal(out[:, flat == 0], own[:, flat == 0])
        for index in range(3):
            rows, weights = flat == index + 1, merged[index]
            for sample, words in ((0, context[0]), (1, concepts[index].context[0])):
                heads = [
                    (value.double() @ weight.T).unflatten(-1, (8, -1)).transpose(0, 1)
                    for value, weight in (
                        (n[sample][rows], base[f"{name}.to_q.weight"]),
                        (words, weights[f"{name}.to_k.weight"]),
                        (words, weights[f"{name}.to_v.weight"]),
                    )
                ]
                q, k, v = heads
                mixed = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
                wanted = mixed.transpose(0, 1).flatten(1) @ weights[f"{name}.to_out.0.weight"].T + weights[f"{name}.to_out.0.bias"]
                got = out[sample][rows].double()
                worst = max(worst, float((got - wanted).norm() / wanted.norm()))
                changed = min(changed, float((got - own[sample][rows].double()).norm() / wanted.norm()))
        calls.append([int((flat == index).sum()) for index in range(4)])
    emit("cross", calls=calls, outside_equal=outside_equal, error=worst, changed=changed)


def isolation():
    """The masks that reach ComfyUI's attention."""
    found = []

    def probe(func, q, k, v, heads, mask=None, **kwargs):
        if mask is not None:
            weights = (torch.zeros(mask.shape) + mask).softmax(-1)  # equal scores: the mask alone
            found.append((q.shape[1], k.shape[1], weights))
        return func(q, k, v, heads, mask=mask, **kwargs)

    patched = composed(three())
    x, text = torch.randn(1, 4, 8, 16), encode("three animals")[0][0]
    predict(patched, x, text, [0], options={life.OVERRIDE: probe})
    zero, sums = True, 0.0
    for tokens, _, weights in found:
        height, width = (8, 16) if tokens == 128 else (4, 8)
        place = torch.zeros(height, width, dtype=torch.long)
        for index, (left, top, w, h) in enumerate(BOXES, 1):
            place[-(-top * height // 64) : (top + h) * height // 64, -(-left * width // 128) : (left + w) * width // 128] = index
        flat = place.flatten()
        for a in (1, 2, 3):
            for b in (1, 2, 3):
                part = weights[flat == a][:, flat == b]
                zero &= bool((part == 0).all()) if a != b else bool((part > 0).all())
        zero &= bool((weights[flat == 0] > 0).all()) and bool((weights[:, flat == 0] > 0).all())
        sums = max(sums, float((weights.sum(-1) - 1).abs().max()))
    off = []
    predict(
        composed(three(), isolation=False),
        x,
        text,
        [0],
        options={life.OVERRIDE: lambda f, *a, mask=None, **k: (off.append(mask), f(*a, mask=mask, **k))[1]},
    )
    emit("isolation", masked=len(found), zero=zero, sums=sums, off=[mask is None for mask in off])


def whole_canvas():
    """One concept, whose box is the picture, in all layers: the stock LoRA loader's model."""
    part = region(0, box=(0, 0, 128, 64))
    patched = composed(part, layers=ALL)
    x, text = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(6)), encode("something")[0][0]
    got = predict(patched, x, torch.cat([text, text]), [1, 0])
    stock = predict(part[0].model, x, torch.cat([text, part[0].context]), [1, 0])
    base = predict(model, x, torch.cat([text, text]), [1, 0])
    emit("whole", error=float((got - stock).norm() / stock.norm()), moved=float((stock - base).norm() / stock.norm()))
    # The same on top of a style LoRA, which the whole picture has.
    styled = nodes.LoraLoader().load_lora(model, clip, LORAS[2], 0.5, 0.0)[0]
    both = nodes.LoraLoader().load_lora(styled, clip, LORAS[0], 0.8, 0.0)[0]
    patched = composed((host.Region(both, part[0].context, (1,), part[0].box),), layers=ALL, base=styled)
    got, stock = predict(patched, x[:1], text, [0]), predict(both, x[:1], part[0].context, [0])
    base = predict(styled, x[:1], part[0].context, [0])
    emit("whole on a style", error=float((got - stock).norm() / stock.norm()), moved=float((stock - base).norm() / stock.norm()))


def sample(patcher, latent=EMPTY, steps=3, positive=None, **stage):
    positive = encode("three animals") if positive is None else positive
    return nodes.common_ksampler(patcher, 7, steps, 3.0, "euler", "normal", positive, encode(""), latent, **stage)[0]["samples"]


class Lines(logging.Handler):
    """What the nodes say after a run."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        if "LoRA Composer: " in record.getMessage():
            self.lines.append(record.getMessage().partition("LoRA Composer: ")[2])


said = Lines()
logging.getLogger().addHandler(said)
logging.getLogger().setLevel(logging.INFO)


def sampling():
    concepts = three()
    plain = sample(model)
    runs = {}
    for name, settings in (
        ("regions", {}),
        ("start", dict(reinitialise=True)),
        ("step", dict(enhancement=1.0)),
        ("all", dict(reinitialise=True, enhancement=1.0)),
    ):
        patched = composed(concepts, **settings)
        runs[name] = sample(patched)
    again = sample(patched)
    names = sorted(runs)
    apart = min(float((runs[a] - runs[b]).abs().max()) for a in names for b in names if a < b)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.diffusion_model.modules())
    finite = all(bool(run.isfinite().all()) for run in runs.values())
    emit(
        "sampling",
        apart=apart,
        finite=finite,
        repeatable=torch.equal(runs["all"], again),
        shape=list(again.shape),
        untouched=torch.equal(plain, sample(model)),
        hooks=hooks,
        options=sorted(model.model_options["transformer_options"]),
    )


def gradient(name="gradient", positive=None, steps=4):
    """The gradient of the enhancement loss through the real UNet, against a difference; and where one step of the schedule leads."""
    patched = composed(three(), enhancement=1.0)
    wrappers = patched.wrappers[life.WrappersMP.PREDICT_NOISE][life.KEY]
    composer_host = wrappers[0].__self__
    losses, moved = [], []
    original = composer_host._enhance

    def watch(guider, x, timestep, options, step, size):
        def loss(z):
            with torch.inference_mode(False), torch.no_grad(), life._Differentiable():
                maps = composer_host._maps(guider, z.clone(), timestep.clone(), options, with_self=True)
                return float(enhancement_loss(maps, composer_host.composer.concepts, composer_host.composer.canvas).double().sum())

        before, start = x.clone(), loss(x)
        original(guider, x, timestep, options, step, size)
        direction = x - before
        small = 1e-2 / float(direction.norm())
        slope = (loss(before + small * direction) - loss(before - small * direction)) / (2 * small)
        scale = float(1 + timestep[0] ** 2)
        losses.append([start, float(composer_host.schedule.losses[-1])])
        moved.append([slope, -float(direction.double().pow(2).sum()) / (size * scale), float(direction.norm())])

    composer_host._enhance = watch
    sample(patched, steps=steps, positive=positive)
    emit(name, losses=losses, slopes=moved)


def stages():
    """A second stage, which goes on with a latent and no noise; and prompts that are several, or not in force from the start."""
    concepts, runs, lines = three(), {}, {}
    first = {"samples": sample(model, steps=2, start_step=0, last_step=1)}
    late = node_helpers.conditioning_set_values(encode("three animals"), {"start_percent": 0.3, "end_percent": 1.0})
    both = encode("three animals") + encode("a field")
    every = dict(reinitialise=True, enhancement=1.0)
    for name, settings, run in (
        ("second", dict(reinitialise=True), dict(latent=first, steps=2, start_step=1, last_step=2, disable_noise=True)),
        ("second alone", {}, dict(latent=first, steps=2, start_step=1, last_step=2, disable_noise=True)),
        ("several", every, dict(steps=1, positive=both)),
        ("several alone", {}, dict(steps=1, positive=both)),
        ("late", every, dict(steps=4, positive=late)),
    ):
        runs[name] = sample(composed(concepts, **settings), **run)
        lines[name] = said.lines[-1]
    emit(
        "stages",
        finite={name: bool(run.isfinite().all()) for name, run in runs.items()},
        same=torch.equal(runs["second"], runs["second alone"]),
        moved=float((runs["several"] - runs["several alone"]).abs().max()),
        lines=lines,
    )


def guiders():
    """Whose forwards get the concepts: by conditioning, in the order in which a guider calls them."""
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_perpneg as perpneg

    positive, middle, negative = encode("three animals"), encode("a field"), encode("")
    patched = composed(three())
    seen, wrapper = [], patched.wrappers[life.WrappersMP.APPLY_MODEL][life.KEY][0].__self__
    call = wrapper.composer.call

    def watch(shape, text, conditional, *rest):
        names = [next(name for name, cond in known.items() if torch.equal(part, cond[0][0])) for part in text.chunk(len(conditional))]
        seen.extend(zip(names, conditional, strict=True))
        return call(shape, text, conditional, *rest)

    known = {"positive": positive, "middle": middle, "negative": negative}
    wrapper.composer.call = watch
    dual = custom.Guider_DualCFG(patched)
    dual.set_conds(positive, middle, negative)
    dual.set_cfg(3.0, 2.0)
    perp = perpneg.Guider_PerpNeg(patched)
    perp.set_conds(positive, middle, negative)
    perp.set_cfg(3.0, 1.0)
    found = {}
    for name, guider in (("dual", dual), ("perpneg", perp)):
        seen.clear()
        guider.sample(torch.randn(1, 4, 8, 16), EMPTY["samples"], comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 0.0]), seed=1)
        found[name] = sorted(set(seen))
    # As self-attention guidance does: the negative prompt by itself, and one self-attention replaced.
    guided = patched.clone()
    guided.set_model_attn1_replace(lambda q, k, v, extra: v, "input", 1)
    guided.set_model_sampler_post_cfg_function(
        lambda args: comfy.samplers.calc_cond_batch(args["model"], [args["uncond"]], args["input"], args["sigma"], args["model_options"])[0]
    )
    seen.clear()
    sample(guided, steps=1)
    emit("guiders", **found, alone=sorted(set(seen)), line=said.lines[-1])


def control():
    """Enhancement with a ControlNet, whose output ComfyUI adds in place: the gradient is that of a difference."""
    import comfy.cldm.cldm
    import comfy.controlnet

    config = dict(model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 1], num_heads=8, transformer_depth=[1, 1], transformer_depth_middle=-1)
    config |= dict(context_dim=768, use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False)
    net = filled(comfy.cldm.cldm.ControlNet(image_size=32, in_channels=4, hint_channels=3, **config, **NEW), 40)
    loaded = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    hint = torch.rand(1, 64, 128, 3, generator=torch.Generator().manual_seed(8))
    positive, _ = nodes.ControlNetApplyAdvanced().apply_controlnet(encode("three animals"), encode(""), loaded, hint, 0.5, 0.0, 1.0)
    gradient("control", positive, steps=1)


def blocks():
    """From 1024 tokens on by blocks: against a dense mask. And with Sparse Attention behind the node."""
    from tessera.models.patchers.lora_composer import composer
    from tessera.nodes.attention import SparseAttention

    SparseAttention.hidden = SimpleNamespace(unique_id=None)
    large = {"samples": torch.zeros(1, 4, 32, 64)}
    halves = region(1, box=(256, 0, 256, 256), concepts=region(0, box=(0, 0, 256, 256)))
    patched = composed(halves, latent=large)
    out = [sample(patched, large, steps=1)]
    line = said.lines[-1]
    keep, composer.BLOCK_TOKENS = composer.BLOCK_TOKENS, 10**9
    out.append(sample(patched, large, steps=1))
    dense = said.lines[-1]
    composer.BLOCK_TOKENS = keep
    settings = dict(method={"method": "sparge"}, density=0.3, precision="auto", start_percent=0.0, end_percent=1.0, dense_blocks="0", min_tokens=0)
    try:
        sample(SparseAttention.execute(patched, **settings).args[0], large, steps=1)
        refused = None
    except RuntimeError as error:
        refused = str(error)
    error = float((out[0] - out[1]).norm() / out[1].norm())
    emit("blocks", error=error, line=line, dense=dense, refused=refused)


def refusals():
    import comfy_extras.nodes_tomesd as tome

    def message(action):
        try:
            action()
        except (ValueError, RuntimeError) as error:
            return str(error)
        return None

    first = region(0)
    plain = composed(first)
    eager = composed(first, enhancement=1.0)
    strip = plain.clone()
    strip.model_options["transformer_options"][life.BOXES] = ()
    taken = plain.clone()
    # A node behind ours whose override computes self-attention itself.
    taken.add_wrapper_with_key(
        life.WrappersMP.APPLY_MODEL,
        "other",
        lambda executor, *a, **k: executor(*a[:5], {**a[5], life.OVERRIDE: lambda func, *b, **c: func(*b, **c)}, *a[6:], **k),
    )
    replaced = plain.clone()
    replaced.set_model_attn2_replace(lambda q, k, v, extra: q, "input", 1)
    area = nodes.ConditioningSetArea().append(encode("area"), 64, 64, 0, 0, 1.0)[0]
    x, text = torch.randn(1, 4, 8, 16), encode("x")[0][0]
    cases = {
        "overlap": lambda: composed(region(1, box=(32, 0, 40, 64), concepts=first)),
        "empty": lambda: composed(region(0, box=(0, 0, 0, 64))),
        "outside": lambda: composed(region(0, box=(100, 0, 40, 64))),
        "other base": lambda: composed(region(0, lora="other_base.safetensors")),
        "no lora": lambda: composed(region(0, lora="none.safetensors")),
        "words": lambda: region(0, words="horse"),
        "prompt width": lambda: predict(composed(first), x, torch.zeros(1, 77, 32), [0]),
        "area": lambda: nodes.common_ksampler(plain, 1, 1, 1.0, "euler", "normal", area, encode(""), EMPTY),
        "unipc": lambda: nodes.common_ksampler(eager, 1, 1, 1.0, "uni_pc", "normal", encode("x"), encode(""), EMPTY),
        "sparse after": lambda: predict(taken, x, text, [0]),
        "replaced": lambda: predict(replaced, x, text, [0]),
        "behind": lambda: composed(region(1), base=first[0].model),
        "tiny box": lambda: sample(composed(region(0, box=(3, 3, 2, 2)))),
        "no cell": lambda: sample(composed(region(0, box=(8, 8, 8, 8)), enhancement=1.0)),
        "other shape": lambda: sample(plain, {"samples": torch.zeros(1, 4, 16, 8)}),
        "strip": lambda: sample(strip),
        "tome": lambda: sample(tome.TomePatchModel.execute(plain, 0.3).args[0]),
    }
    emit("refusals", **{case: message(action) for case, action in cases.items()})


def dit(name, base, text_width, tokens, sigma, latent):
    """One concept on the whole canvas of a transformer: the stock LoRA's model with the concept's prompt. And two, side by side."""
    network = base.model.diffusion_model
    filled(network, 8)
    ends = ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "text_embedding.2")
    ends += ("attn.qkv", "attn.proj", "mlp.0", "linear1", "linear2", "txt_in", "attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_add_out")
    ends += ("net.0.proj", "net.2")
    generator = torch.Generator().manual_seed(9)
    loras = [lora_of(network, ends, 30 + index) for index in (0, 1)]
    if name == "flux":  # a third of a layer, in diffusers' names
        down, up = torch.randn(4, 64, generator=generator) / 8, torch.randn(64, 4, generator=generator) * 0.3
        loras[0] |= {"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": down}
        loras[0] |= {"transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight": up}
    if name == "wan":  # another kind of LoRA, which is no product of two small matrices
        shapes = {"w1_a": (64, 4), "w1_b": (4, 96), "w2_a": (64, 4), "w2_b": (4, 96)}
        loras[0] |= {f"lora_unet_blocks_0_ffn_2.hada_{part}": torch.randn(shape, generator=generator) * 0.3 for part, shape in shapes.items()}
    loaded = [comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)[0] for lora in loras]
    kinds = sorted({type(entry[1]).__name__ for entries in loaded[0].patches.values() for entry in entries})
    parts = sum(entry[3] is not None for entries in loaded[0].patches.values() for entry in entries)
    prompts = [torch.randn(1, tokens, text_width, generator=generator) for _ in range(3)]
    given = {"y": torch.randn(1, 32, generator=generator), "guidance": torch.tensor([3.5])} if name == "flux" else {}
    x = torch.randn(1, *latent, generator=generator)

    def forward(patcher, text, **extra):
        mm.load_models_gpu([patcher])
        patcher.pre_run()
        options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers, "cond_or_uncond": [0]}
        out = patcher.model.apply_model(x, torch.tensor([sigma]), c_crossattn=text, transformer_options=options, **given, **extra)
        patcher.cleanup()
        return out

    def compose(concepts, **settings):
        return composed(concepts, layers=ALL, latent={"samples": torch.zeros(1, *latent)}, base=base, **settings)

    whole = (host.Region(loaded[0], prompts[0], (), Box(0, 0, 128, 64)),)
    got, plain = forward(compose(whole), prompts[2]), forward(base, prompts[2])
    if name == "qwen":  # whose text has positions: the stock model is given the same text, and a mask that hides the picture's prompt
        hidden = torch.cat([torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens, dtype=torch.long)], 1)
        stock = forward(loaded[0], torch.cat([prompts[2], prompts[0]], 1), attention_mask=hidden)
    else:
        stock = forward(loaded[0], prompts[0])
    halves = tuple(host.Region(loaded[index], prompts[index], (), Box(64 * index, 0, 64 * index + 64, 64)) for index in (0, 1))
    apart = forward(compose(halves), prompts[2])
    # With nothing but the first concept's prompt changed, isolation keeps the second half of the picture as it was.
    changed = forward(compose((host.Region(loaded[0], -prompts[0], (), halves[0].box), halves[1])), prompts[2])
    middle = x.shape[-1] // 2
    halves = tuple(host.Region(part.model, part.context, (1, 2), part.box) for part in halves)
    pooled = {"pooled_output": given.get("y"), "guidance": 3.5}
    pictures, maps, keep = [], [], life._Host._maps
    life._Host._maps = lambda self, *a, **k: (maps.append(keep(self, *a, **k)), maps[-1])[1]
    for start in (False, True):
        run = [[[prompts[2], pooled]], [[-prompts[2], pooled]], {"samples": torch.zeros(1, *latent)}]
        pictures.append(nodes.common_ksampler(compose(halves, reinitialise=start), 3, 1, 2.0, "euler", "simple", *run)[0]["samples"])
    life._Host._maps = keep
    refused = []
    for action in (lambda: compose(whole, enhancement=1.0), lambda: compose(region(0))):
        try:
            action()
        except ValueError as error:
            refused.append(str(error))
    if name == "flux":
        # Redux: a mask over text and picture. And LoRAs without a layer of the picture, or with none that works token by token.
        image = x.shape[-2] * x.shape[-1] // 4
        mask = torch.zeros(1, tokens + image, tokens + image)
        mask[:, tokens:, tokens : tokens + image // 2] = -2.0
        redux = [forward(compose(whole), prompts[2], attention_mask=mask), forward(loaded[0], prompts[0], attention_mask=mask)]
        outcome = []
        for layers in ("txt_in", "img_mod.lin"):
            loader = comfy.sd.load_lora_for_models(base, None, lora_of(network, (layers,), 40), 1.0, 0.0)[0]
            try:
                run[0][0][0] = prompts[2]
                patched = compose((host.Region(loader, prompts[0], (1,), whole[0].box),))
                outcome.append(bool(nodes.common_ksampler(patched, 3, 1, 2.0, "euler", "simple", *run)[0]["samples"].isfinite().all()))
            except ValueError as error:
                outcome.append(str(error))
        difference = float((redux[0] - redux[1]).norm() / redux[1].norm())
        emit("flux only", redux=difference, masked=float((redux[1] - stock).norm() / stock.norm()), layers=outcome)
    emit(
        name,
        error=float((got - stock).norm() / stock.norm()),
        moved=float((stock - plain).norm() / stock.norm()),
        second_half=float((apart - changed)[..., middle:].abs().max()),
        first_half=float((apart - changed)[..., :middle].abs().max()),
        sampled=[bool(picture.isfinite().all()) for picture in pictures],
        started=float((pictures[0] - pictures[1]).abs().max()),
        maps=[[list(part.shape) for part in maps[0].cross[index]] for index in (0, 1)],
        kinds=kinds,
        parts=parts,
        refused=refused,
    )


def words():
    """The tokens at the rows that are found, in encoders with and without start, template and padding."""
    import comfy.sdxl_clip
    import comfy.text_encoders.flux
    import comfy.text_encoders.qwen_image

    found = {}
    for name, tokenizer, key, inner in (
        ("clip", clip.tokenizer, "l", "clip_l"),
        ("sdxl", comfy.sdxl_clip.SDXLTokenizer(), "g", "clip_g"),
        ("t5", comfy.text_encoders.flux.FluxTokenizer(), "t5xxl", "t5xxl"),
        ("qwen", comfy.text_encoders.qwen_image.QwenImageTokenizer(), "qwen25_7b", "qwen25_7b"),
    ):
        fake = SimpleNamespace(tokenize=tokenizer.tokenize_with_weights)
        tokens = fake.tokenize("a red cat, and a black dog beside the red cat")
        ids = [entry[0] for chunk in tokens[key] for entry in chunk]
        cut = 34 if name == "qwen" else 0  # the template that ComfyUI's encoder cuts off
        text = {token: piece for piece, token in getattr(tokenizer, inner).tokenizer.get_vocab().items()}
        rows = {asked: host._rows_of(fake, tokens, len(ids) - cut, asked) for asked in ("red cat", "dog", "")}
        pieces = {asked: [text[ids[row + cut]] for row in places] for asked, places in rows.items()}
        found[name] = pieces
    emit("words", **found)


def patcher(config, kind):
    config.custom_operations = comfy.ops.disable_weight_init
    config.set_inference_dtype(torch.float32, None)
    base = kind(config)
    return comfy.model_patcher.ModelPatcher(base.eval(), load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def sdxl():
    """One concept on the whole canvas: the stock LoRA's model. And two with everything, on the maps of the coarsest level."""
    small = dict(image_size=32, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=[1, 1, 1], channel_mult=[1, 1, 1])
    small |= dict(num_head_channels=32, transformer_depth=[0, 1, 1], transformer_depth_output=[0, 0, 1, 1, 1, 1], transformer_depth_middle=1)
    small |= dict(num_heads=-1, context_dim=48, adm_in_channels=2816, num_classes="sequential", use_spatial_transformer=True, legacy=False)
    base = patcher(comfy.supported_models.SDXL(small | dict(use_linear_in_transformer=True)), comfy.model_base.SDXL)
    network = filled(base.model.diffusion_model, 8)
    loaded = [comfy.sd.load_lora_for_models(base, None, lora_of(network, LINEAR, 30 + index), 1.0, 0.0)[0] for index in (0, 1)]
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randn(1, 77, 48, generator=generator) for _ in range(4)]
    pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)}

    def run(patched, text):
        conds = [[text, pooled]], [[prompts[3], pooled]]
        return nodes.common_ksampler(patched, 7, 2, 1.0 if text is prompts[0] else 3.0, "euler", "normal", *conds, latent)[0]["samples"]

    latent = {"samples": torch.zeros(1, 4, 8, 16)}
    whole = (host.Region(loaded[0], prompts[0], (1,), Box(0, 0, 128, 64)),)
    got, stock, plain = run(composed(whole, layers=ALL, base=base), prompts[0]), run(loaded[0], prompts[0]), run(base, prompts[0])
    halves = tuple(host.Region(loaded[index], prompts[index], (1, 2), Box(64 * index, 0, 64 * index + 64, 64)) for index in (0, 1))
    pictures = [run(composed(halves, base=base, **settings), prompts[2]) for settings in ({}, dict(reinitialise=True, enhancement=1.0))]
    emit(
        "sdxl",
        error=float((got - stock).norm() / stock.norm()),
        moved=float((plain - stock).norm() / stock.norm()),
        sampled=[bool(picture.isfinite().all()) for picture in pictures],
        started=float((pictures[0] - pictures[1]).abs().max()),
        line=said.lines[-1],
        maps=life.map_size(network, (1, 4, 8, 16)),
    )


def transformers():
    small = dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=24, hidden_size=64, mlp_ratio=2.0, num_heads=2)
    small |= dict(depth=1, depth_single_blocks=1, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True)
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
        small |= dict(txt_ids_dims=[])
    flux = patcher(comfy.supported_models.Flux(small), comfy.model_base.Flux)
    dit("flux", flux, 24, 16, 0.7, (16, 8, 16))
    small = dict(
        image_model="wan2.1", model_type="t2v", dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=24, freq_dim=32
    )
    wan = patcher(comfy.supported_models.WAN21_T2V(small), comfy.model_base.WAN21)
    dit("wan", wan, 24, 32, 0.7, (16, 2, 8, 16))
    small = dict(image_model="qwen_image", in_channels=64, num_layers=2, num_attention_heads=1, joint_attention_dim=24)
    qwen = patcher(comfy.supported_models.QwenImage(small), comfy.model_base.QwenImage)
    dit("qwen", qwen, 24, 16, 0.7, (16, 1, 8, 16))


write(MODELS)
with torch.inference_mode():
    model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)
    cross_attention()
    isolation()
    whole_canvas()
    sampling()
    gradient()
    stages()
    guiders()
    control()
    blocks()
    refusals()
    sdxl()
    words()
    transformers()
