"""Runs inside ComfyUI's Python (see test_comfy_art.py): ART's regions on the stock Flux, Qwen-Image and Wan.

    python comfy_art.py COMFYUI PACKAGE_PARENT SCRATCH

Prints one JSON object per case; what was sampled goes to SCRATCH.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

COMFYUI, PACKAGE_PARENT, SCRATCH = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import LatentPreviewMethod, args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)

import comfy.model_management as mm  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import latent_preview  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from comfy.ldm.wan.model import VaceWanModel, WanModel  # noqa: E402
from comfy.model_base import LongCatImage  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes  # noqa: E402
from tessera.kernels.sparsity import plan  # noqa: E402
from tessera.models.layers.default import sampling, vocabulary  # noqa: E402
from tessera.models.layers.document import Document, Group, Layer, from_core, rgba, to_core  # noqa: E402
from tessera.models.layers.regions import filled, layer_embedding, pictures, schedule_shift, snap  # noqa: E402
from tessera.models.layers.transparent_vae import grey_blended  # noqa: E402
from tessera.nodes.attention import AttentionSettings, last_report, patch_attention  # noqa: E402
from tessera.nodes.offload import MemorySettings, patch_memory  # noqa: E402
from tessera.nodes.regions import KEY, patch_regions  # noqa: E402
from tessera.nodes.regions.nodes import (  # noqa: E402
    DECODERS,
    FOLDER,
    NAMES,
    NONE,
    DecodeRegionLayers,
    DecodeRegionVideo,
    EncodeRegionLayers,
    RegionLayers,
)
from tessera.training.layers import dataset, evaluate, export  # noqa: E402
from tessera.training.layers.drawn import pixels  # noqa: E402

REGIONS = snap([(0, 17, 30, 40), (16, 0, 32, 32), (63, 40, 100, 100)], 64, 48)
SHAPE = (1, 16, len(REGIONS.boxes), 2 * REGIONS.height, 2 * REGIONS.width)
STEPS, GUIDANCE, CFG, TEXT = 3, 4.0, 3.5, 7


ragged, blocks_of = plan.ragged, []


def recorded(grid, *rest):
    blocks_of.append(grid.boxes)
    return ragged(grid, *rest)


plan.ragged = recorded


def emit(case, **values):
    print("RESULT " + json.dumps({"case": case, **values}), flush=True)


def conditioning(seed, width, tokens=TEXT, **extra):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, width, generator=generator), {"pooled_output": torch.randn(1, 64, generator=generator), **extra}]]


def sample(model, positive, negative, latent=None, cfg=CFG, **more):
    samples = torch.full(SHAPE, 0.25) if latent is None else latent
    return nodes.common_ksampler(model, 8, STEPS, cfg, "euler", "simple", positive, negative, {"samples": samples, **more})[0]["samples"]


def loaded(state, config):
    """Through ComfyUI's own detection; `config` replaces what it fixes at full size."""
    import comfy.model_detection as detection

    detect = detection.detect_unet_config
    # None: not ComfyUI's own names, which it then converts.
    detection.detect_unet_config = lambda *given, **named: (found := detect(*given, **named)) and {**found, **config}
    try:
        return comfy.sd.load_diffusion_model_state_dict(state)
    finally:
        detection.detect_unet_config = detect


flux = loaded(load_file(Path(SCRATCH) / "flux.safetensors"), dict(vec_in_dim=64, context_in_dim=64))
embedding = layer_embedding(load_file(Path(SCRATCH) / "layer_pe.safetensors"), REGIONS, 128)
positive, negative = (conditioning(seed, 64, guidance=GUIDANCE) for seed in (1, 2))
patched = patch_regions(flux, REGIONS, embedding, schedule_shift(REGIONS.tokens))


def parity():
    lora = load_file(Path(SCRATCH) / "lora.safetensors")
    sampled = sample(comfy.sd.load_lora_for_models(patched, None, lora, 1.0, 0.0)[0], positive, negative)
    without = sample(patched, positive, negative)
    plain = sample(patch_regions(flux, REGIONS, None, schedule_shift(REGIONS.tokens)), positive, negative)
    sigmas = comfy.samplers.calculate_sigmas(patched.get_model_object("model_sampling"), "simple", STEPS)
    start = torch.full(SHAPE, 0.25)
    # At sigma 1, the first of the schedule, the noise is all there is.
    tensors = {
        "sampled": sampled,
        "without embedding": plain,
        "without LoRA": without,
        "noise": comfy.sample.prepare_noise(start, 8),
        "sigmas": sigmas,
    }
    for name, cond in (("positive", positive), ("negative", negative)):
        tensors |= {f"{name}.context": cond[0][0], f"{name}.pooled": cond[0][1]["pooled_output"]}
    save_file({name: value.contiguous() for name, value in tensors.items()}, Path(SCRATCH) / "sampled.safetensors")
    return without


def randomised(network):
    """Its state dict, with weights that make every output depend on every input."""
    generator = torch.Generator().manual_seed(3)
    for tensor in network.state_dict().values():
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (tensor.ndim == 1))
    return network.state_dict()


def qwen():
    """The stock forward of layers as frames, with the keys outside of the boxes masked by an attention override."""
    operations = dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    sizes = dict(num_attention_heads=1, joint_attention_dim=64, num_layers=2)
    model = loaded(randomised(QwenImageTransformer2DModel(image_model="qwen_image", in_channels=64, **sizes, **operations)), sizes)
    texts = conditioning(4, 64), conditioning(5, 64)
    ours = patch_regions(model, REGIONS, None, None)
    inside = torch.zeros(TEXT + len(REGIONS.boxes) * REGIONS.height * REGIONS.width, dtype=torch.bool)
    inside[:TEXT] = True
    area = torch.zeros(SHAPE[2:], dtype=torch.bool)
    for layer, (x, y, width, height) in enumerate(REGIONS.boxes):
        area[layer, 2 * y : 2 * (y + height), 2 * x : 2 * (x + width)] = True
    inside[TEXT:] = area[:, ::2, ::2].flatten()

    def masked(func, q, k, v, heads, mask=None, **kwargs):
        bias = torch.zeros(inside.shape).masked_fill(~inside, -1e9)  # not every attention of ComfyUI's takes a boolean mask
        return func(q, k, v, heads, mask=bias.expand(q.shape[0], 1, q.shape[2], -1), **kwargs)

    stock = model.clone()
    whole = sample(stock, *texts)
    stock.model_options["transformer_options"]["optimized_attention_override"] = masked
    wanted, got = sample(stock, *texts), sample(ours, *texts)
    scale = wanted.abs().max()
    error = ((wanted - got).abs() * area).max() / scale
    emit("qwen", error=float(error), unmasked=float(((whole - got).abs() * area).max() / scale))


WAN = dict(dim=192, ffn_dim=256, num_heads=3, num_layers=2, text_dim=64)


def stock_wan(kind=WanModel, **sizes):
    return kind(**{**WAN, **sizes}, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)


def ran(model, noise, texts, callback=None):
    return comfy.sample.sample(model, noise, STEPS, CFG, "euler", "simple", *texts, torch.full(noise.shape, 0.25), callback=callback)


def wan():
    """Of layers that are `apart` frames apart, the stock forward of all frames between: keys outside of the boxes, and frames that a layer has
    not, are masked by an attention override."""
    model = loaded(randomised(stock_wan()), WAN)
    texts = conditioning(4, 64), conditioning(5, 64)
    table = torch.randn(len(REGIONS.boxes), WAN["dim"], generator=torch.Generator().manual_seed(12))
    for frames, apart in ((1, 4), (3, 4), (5, 5)):
        regions = replace(REGIONS, frames=frames)
        noise = torch.randn(1, 16, len(REGIONS.boxes), apart, *SHAPE[3:], generator=torch.Generator().manual_seed(13))
        area = torch.zeros(noise.shape[2:], dtype=torch.bool)
        for layer, (x, y, width, height) in enumerate(REGIONS.boxes):
            area[layer, :frames, 2 * y : 2 * (y + height), 2 * x : 2 * (x + width)] = True
        bias = torch.zeros(area[..., ::2, ::2].numel()).masked_fill(~area[..., ::2, ::2].flatten(), -1e9)

        def masked(func, q, k, v, heads, mask=None, bias=bias, **kwargs):
            own = q.shape[1] == k.shape[1]  # else the text's
            return func(q, k, v, heads, mask=bias.expand(q.shape[0], 1, q.shape[1], -1) if own else mask, **kwargs)

        stock = model.clone()
        stock.model_options["transformer_options"]["optimized_attention_override"] = masked
        added = table.T[None, :, :, None].repeat(1, 1, 1, apart).flatten(2)[..., None, None]
        hook = model.model.diffusion_model.patch_embedding.register_forward_hook(lambda _module, _args, out, added=added: out + added)
        wanted = ran(stock, noise.flatten(2, 3), texts).unflatten(2, noise.shape[2:4])[:, :, :, :frames]
        hook.remove()
        ours = patch_regions(patch_regions(model, REGIONS, None, None), regions, table, schedule_shift(regions.tokens))
        given, seen = noise[:, :, :, :frames].flatten(2, 3), []
        got = ran(ours, given, texts, lambda step, denoised, x, total, seen=seen: seen.append(denoised))
        shown = model.model.process_latent_out(seen[-1]).unflatten(2, (-1, frames))[:, :, ~area[:, :frames]]
        outside = got.unflatten(2, (-1, frames))[:, :, ~area[:, :frames]]
        without = ran(patch_regions(model, regions, None, None), given, texts)
        scale, area = wanted.abs().max(), area[:, :frames]
        emit(
            f"wan {frames}",
            error=float(((wanted - got.unflatten(2, (-1, frames))).abs() * area).max() / scale),
            unembedded=float((without - got).abs().max() / scale),
            outside=float((outside - 0.25).abs().max()),
            shown_outside=float((shown - 0.25).abs().max()),
            previews=[list(x0.shape) for x0 in seen],
            wrappers=[sum(KEY in group for group in one.wrappers.values()) for one in (ours, model)],
        )
        if frames == 3:
            wan_with_others(ours, got, given, texts)


def wan_with_others(ours, got, noise, texts):
    """Another block patch under ours, Sparse Attention over the strip, and Layer Offload."""
    calls = []

    def record(args, extra):
        calls.append(args["img"].shape[1])
        return extra["original_block"](args)

    watched = ours.clone()
    watched.set_model_patch_replace(record, "dit", "double_block", 1)
    same = ran(watched, noise, texts)
    dense = patch_attention(ours, AttentionSettings(min_tokens=0, density=1.0, precision="native", block=16), None)
    at_density_1 = ran(dense, noise, texts)
    sparse = patch_attention(ours, AttentionSettings(min_tokens=0, density=0.5, precision="native", block=16, start_percent=0.0), None)
    out = ran(sparse, noise, texts)
    limited = ran(patch_memory(ours, MemorySettings(gb=1.0), None), noise, texts)
    emit(
        "wan with others",
        same=float((same - got).abs().max()),
        dense=float((at_density_1 - got).abs().max()),
        limited=float((limited - got).abs().max()),
        tokens=sorted(set(calls)),
        family=last_report(sparse)["family"],
        calls=last_report(sparse)["calls"],
        boxes=blocks_of[-1],
        finite=bool(out.isfinite().all()),
        changed=float((out - got).abs().max()),
    )


def hooks(sampled):
    seen, shapes = [], []

    def record(step, denoised, x, total):
        shapes.append(list(denoised.shape))
        seen.append(denoised)

    noise = comfy.sample.prepare_noise(torch.zeros(SHAPE), 8)
    again = patch_regions(patched, REGIONS, embedding, schedule_shift(REGIONS.tokens))
    watched = patch_attention(again, AttentionSettings(min_tokens=0, density=1.0, precision="native", block=16), None)
    got = comfy.sample.sample(
        *(watched, noise, STEPS, CFG, "euler", "simple", positive, negative, torch.full(SHAPE, 0.25)),
        callback=record,
    )
    report = last_report(watched)
    core = ModelSamplingFlux().patch(flux, 1.15, 0.5, 1024, 768)[0]
    emit(
        "hooks",
        patches=sorted(flux.model_options["transformer_options"].get("patches", {})),
        wrappers=sorted(key for group in flux.wrappers.values() for key in group if key == KEY),
        twice=len(again.model_options["transformer_options"]["patches"]["post_input"]),
        shift=flux.get_model_object("model_sampling").shift,
        **{"core shift": core.get_model_object("model_sampling").shift, "our shift": schedule_shift(64 * 48)},
        same=float((got - sampled).abs().max()),
        previews=shapes,
        kept=[list(x0.shape) for x0 in seen],
        calls=report["calls"],
        reasons=report["reasons"],
    )


def previews():
    """Core's own sampler nodes while it previews with TAESD, which of Flux's latents takes pictures only."""
    folder = Path(SCRATCH) / "vae_approx"
    folder.mkdir()
    taesd = random_taesd()
    save_file({name: value.clone() for name, value in taesd.taesd_decoder.state_dict().items()}, folder / "taef1_decoder.safetensors")
    folder_paths.add_model_folder_path("vae_approx", str(folder))
    images = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: images.append(preview))
    args.preview_method = LatentPreviewMethod.TAESD
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive, negative)
    guider.set_cfg(CFG)
    sigmas = comfy.samplers.calculate_sigmas(patched.get_model_object("model_sampling"), "simple", STEPS)
    latent = {"samples": torch.full(SHAPE, 0.25)}
    try:
        made = SamplerCustomAdvanced.execute(Noise_RandomNoise(8), guider, comfy.samplers.sampler_object("euler"), sigmas, latent)
        last = images[-1][1]
        sample(patched, positive, negative)
    finally:
        args.preview_method = LatentPreviewMethod.NoPreviews
        comfy.utils.set_progress_bar_global_hook(None)
    samples, denoised = (one["samples"] for one in made.args)
    previewer = latent_preview.TAESDPreviewerImpl(TAESD(None, str(folder / "taef1_decoder.safetensors"), latent_channels=16))
    wanted = previewer.decode_latent_to_preview(patched.model.process_latent_in(denoised[:, :, 0]))
    pixels = [torch.tensor(list(image.getdata())) for image in (last, wanted)]
    emit(
        "previews",
        images=[list(preview[1].size) for preview in images],
        last=int((pixels[0] - pixels[1]).abs().max()),
        varied=float(pixels[1].float().std()),
        denoised=float((denoised - samples).abs().max() / samples.abs().max()),
    )


def variants(sampled):
    """A batch, a mask that protects all but one layer, and sparse attention on the strip."""
    two = sample(patched, positive, negative, torch.full((2, *SHAPE[1:]), 0.25))
    mask = torch.zeros(1, 1, *SHAPE[2:])
    mask[:, :, 3] = 1
    protected = sample(patched, positive, negative, noise_mask=mask)
    changed = ((protected - 0.25).abs() > 1e-4).flatten(3).any(3).any(1)[0].tolist()
    sparse = patch_attention(patched, AttentionSettings(min_tokens=0, density=0.5, precision="native", block=16, start_percent=0.0), None)
    out = sample(sparse, positive, negative)
    emit(
        "variants",
        batch=float((two[:1] - sampled).abs().max() / sampled.abs().max()),
        changed=changed,
        calls=last_report(sparse)["calls"],
        boxes=blocks_of[-1],
        finite=bool(out.isfinite().all()),
    )


def reference():
    """A reference latent: its tokens follow the regions' and count as picture, not as text."""
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(9))
    ids = []

    def record(args):
        ids.append(args["img_ids"].clone())
        return args

    watched = patched.clone()
    watched.set_model_patch(record, "post_input")
    with_reference = conditioning(1, 64, guidance=GUIDANCE, reference_latents=[latent])
    out = sample(watched, with_reference, with_reference, cfg=1.0)
    plain = sample(patched, positive, positive, cfg=1.0)
    # Stock: index 1, rows and columns from 0, as no other reference came before. The regions have 0 to 4.
    wanted = torch.tensor([[float(len(REGIONS.boxes)), r, c] for r in range(2) for c in range(2)])
    after = all(torch.equal(part[0, REGIONS.tokens :], wanted) for part in ids)
    given = torch.zeros(1, REGIONS.tokens + 3, 3)
    given[0, REGIONS.tokens :, 0] = torch.tensor([-1.0, 0.0, 2.0])
    options = {"reference_image_num_tokens": [1, 1, 1]}
    hook = patched.model_options["transformer_options"]["patches"]["post_input"][0]
    moved = hook({"img": torch.zeros(1, REGIONS.tokens + 3, 128), "img_ids": given, "transformer_options": options})["img_ids"]
    emit(
        "reference",
        finite=bool(out.isfinite().all()),
        changed=float((out - plain).abs().max()),
        after=after,
        numbers=moved[0, REGIONS.tokens :, 0].tolist(),
    )


def refusals():
    area = conditioning(1, 64, guidance=GUIDANCE, area=(2, 2, 0, 0))
    tiles = patched.clone()
    tiles.remove_wrappers_with_key("outer_sample", KEY)
    clip = replace(REGIONS, frames=3)
    small = patch_regions(loaded(randomised(stock_wan()), WAN), REGIONS, None, None)
    frame = torch.zeros(1, 16, 1, 6, 8)
    longcat = copy.copy(flux.model)
    longcat.__class__ = LongCatImage

    def with_more(model, width, **more):
        return sample(model, conditioning(1, width, **more), conditioning(2, width))

    def of(network):
        return SimpleNamespace(model=SimpleNamespace(diffusion_model=network))

    for case, action in (
        ("other latent", lambda: sample(patched, positive, negative, torch.zeros(1, 16, 6, 8))),
        ("area", lambda: sample(patched, area, negative)),
        ("inpainting", lambda: with_more(patched, 64, concat_latent_image=torch.zeros(1, 16, 6, 8))),
        ("reference_latents", lambda: with_more(small, 64, reference_latents=[frame])),
        ("context_latents", lambda: with_more(small, 64, context_latents=[frame])),
        ("time_dim_concat", lambda: with_more(small, 64, time_dim_concat=frame)),
        ("LongCat", lambda: patch_regions(SimpleNamespace(model=longcat), REGIONS, None, None)),
        ("tiles", lambda: sample(tiles, positive, negative, torch.zeros(1, 16, 4, 4))),
        ("other model", lambda: patch_regions(of(torch.nn.Identity()), REGIONS, None, None)),
        ("image to video", lambda: patch_regions(of(stock_wan(in_dim=36)), REGIONS, None, None)),
        ("VACE", lambda: patch_regions(of(stock_wan(VaceWanModel, vace_layers=1, vace_in_dim=96)), REGIONS, None, None)),
        ("clips of Flux", lambda: patch_regions(flux, clip, None, None)),
        ("embedding width", lambda: layer_embedding({"layer_pe": torch.zeros(1, 52, 1, 1, 64)}, REGIONS, 128)),
    ):
        try:
            action()
        except ValueError as error:
            emit(case, error=str(error))


def random_taesd():
    network = TAESD(latent_channels=16)
    generator = torch.Generator().manual_seed(11)
    for tensor in (tensor for name, tensor in network.state_dict().items() if name.startswith("taesd")):
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.0
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return network


def small_vae():
    """The smallest network that ComfyUI's VAE loader takes for Flux."""
    save_file({name: value.clone() for name, value in random_taesd().state_dict().items()}, Path(SCRATCH) / "taesd.safetensors")


class Default:
    """The layered model that comes with the pack, as stock loaders and Region Layers give it, and without ComfyUI."""

    name = export.EMBEDDING.name

    def __init__(self):
        for folder in (FOLDER, DECODERS):
            for place in (export.HERE, Path(SCRATCH)):
                folder_paths.add_model_folder_path(folder, str(place / folder))
            folder_paths.folder_names_and_paths[folder][1].add(".safetensors")
        self.networks = evaluate.load(export.HERE)
        loaded = comfy.sd.load_diffusion_model(str(export.HERE / export.TRANSFORMER))
        self.model = ModelSamplingSD3().patch(loaded, sampling.SHIFT)[0]
        self.vae = comfy.sd.VAE(sd=load_file(export.HERE / export.VAE))

    def region_layers(self, width, height, boxes="", vae=None, **more):
        return RegionLayers.PREPARE_CLASS_CLONE(None).execute(self.model, vae or self.vae, width, height, boxes, self.name, 0.5, 1.15, **more).args


def lines_of_region_layers(default):
    """What the node shows for a canvas as its model was trained on, and for others."""
    shown = []
    with mock.patch("tessera.nodes.regions.nodes.say", lambda node_id, text: shown.append(text)):
        default.region_layers(128, 96, "16 16 48 48")
        default.region_layers(512, 96, "0 0 128 96")
    emit("lines", shown=shown)


def said(text):
    return [[vocabulary.embed(vocabulary.parse(text))[None], {}]]


def published_figures(default):
    """KSampler and the nodes around it against the code that the model's figures come from, on the same noise."""
    text, seed = "red disc, blue ring, yellow triangle on green", 2
    vae, network, decoder = default.networks
    for frames in (1, 9):
        model, latent = default.region_layers(128, 96, "16 16 48 48\n64 32 48 48", frames=frames)
        regions = latent[KEY]
        wanted = sampling.latents(network, regions, vocabulary.parse(text), seed)
        strip = torch.randn(1, 16, 2, 2 * regions.tokens, generator=torch.Generator().manual_seed(seed))
        noise = regions.scatter(strip, torch.zeros_like(latent["samples"]), 2)
        with mock.patch.object(comfy.sample, "prepare_noise", return_value=noise):
            run = (model, seed, sampling.STEPS, sampling.CFG, "euler", "simple", said(text), said(""), latent)
            made = nodes.KSampler().sample(*run)[0]
        error = regions.crop(made["samples"] - wanted[None], 2).abs().max() / wanted.abs().max()
        decoded = sampling.decode(vae, decoder, wanted, regions)
        if frames > 1:
            (images,) = DecodeRegionVideo.execute(made, default.vae, default.name).args[1]
            emit("published 9", error=float(error), merged=float((images - decoded.merged).abs().max()))
            continue
        (document,), image = DecodeRegionLayers.execute(made, default.vae, default.name).args
        differences = [(image - decoded.merged).abs().max()]
        for (_, layer), canvas, (x, y, width, height) in zip(list(from_core(document).walk())[1:], decoded.layers, regions.boxes[2:], strict=True):
            cut = canvas[0, 16 * y : 16 * (y + height), 16 * x : 16 * (x + width)]
            differences.append((layer.image - cut).abs().max())
        emit("published 1", error=float(error), merged=float(differences[0]), layers=float(max(differences[1:])))


def watched(default):
    """Progress of the transparent decoder, its memory, and an interrupt between its blocks."""
    _, latent = default.region_layers(64, 48, "0 0 32 32\n16 0 32 32")
    steps, asked = [], []
    load = mm.load_models_gpu

    def loading(models, *rest, **more):
        asked.append(more.get("memory_required"))
        return load(models, *rest, **more)

    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: steps.append([value, total]))
    try:
        with mock.patch.object(mm, "load_models_gpu", loading):
            DecodeRegionLayers.execute(latent, default.vae, default.name)
        comfy.utils.set_progress_bar_global_hook(lambda *_, **__: mm.interrupt_current_processing())
        try:
            DecodeRegionLayers.execute(latent, default.vae, default.name)
            stopped = False
        except mm.InterruptProcessingException:
            stopped = True
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        mm.interrupt_current_processing(False)
    decoder = default.networks[2]
    wanted = decoder.memory(latent[KEY].finer(2), 2)
    emit("watched", steps=steps, blocks=len(decoder.blocks), stopped=stopped, memory=[asked[-1], wanted])


def drawn(seed):
    """A drawn layered picture as a document, and its boxes as text."""
    generator = torch.Generator().manual_seed(seed)
    found = dataset.sample(1, generator)
    _, back, layers = dataset.pictures_of(found, 1, generator)
    placed = [Layer(f"shape {number}", layer[0], x, y) for number, ((x, y, _, _), layer) in enumerate(layers, 1)]
    boxes = [pixels(box) for box in dataset.boxes_of(found)[2:]]
    document = Document(back.shape[1], back.shape[0], (Layer("ground", rgba(back)), *placed))
    return document, "\n".join(" ".join(map(str, box)) for box in boxes)


def encoded(default):
    """A drawn picture in, and out again; encoded by the networks alone as well; sampled again with less noise than all."""
    document, boxes = drawn(7)
    model, latent = default.region_layers(document.width, document.height, boxes)
    regions, vae = latent[KEY], default.networks[0]
    (made,) = EncodeRegionLayers.execute(to_core(document), default.vae, latent).args
    codes = [vae.encode((grey_blended(shown) * 2 - 1).movedim(-1, 0)[None, :, None])[0, :, 0] for shown in pictures(document, regions)]
    wanted = filled(latent["samples"][0], regions, codes)
    out = [layer for _, layer in from_core(DecodeRegionLayers.execute(made, default.vae, default.name).args[0][0]).walk()]
    alphas, colours, fits = [], [], []
    for before, after in zip(document.layers[1:], out[1:], strict=True):
        solid = before.image[..., 3] > 0.99
        alphas.append((after.image - before.image)[..., 3].square().mean())
        colours.append((after.image - before.image)[solid][:, :3].square().mean())
        fits.append(evaluate.iou(after.image[..., 3], before.image[..., 3]))
    inside = regions.scatter(torch.ones(1, 16, 2, 2 * regions.tokens), torch.zeros_like(latent["samples"]), 2).bool()

    def moved(denoise):
        again = nodes.KSampler().sample(model, 1, 4, 1.0, "euler", "simple", said("red disc"), said(""), made, denoise)[0]["samples"]
        return float((again - made["samples"])[inside].square().mean().sqrt() / made["samples"][inside].std())

    two = {**latent, "samples": latent["samples"].repeat(2, 1, 1, 1, 1)}
    emit(
        "encoded",
        layers=len(out),
        names=[layer.name for layer in out] == [layer.name for layer in document.layers],
        places=[layer.bounds for layer in out] == [layer.bounds for layer in document.layers],
        error=float((made["samples"][0] - wanted).abs().max() / wanted.abs().max()),
        outside=float((made["samples"] - latent["samples"])[~inside].abs().max()),
        alpha=float(-10 * torch.stack(alphas).mean().log10()),
        colour=float(-10 * torch.stack(colours).mean().log10()),
        iou=sum(fits) / len(fits),
        moved=[moved(0.1), moved(1.0)],
        batch=len(EncodeRegionLayers.execute(to_core(document), default.vae, two).args[0]["samples"]),
    )
    return document, latent, made


def rgba_vae(default):
    """Qwen-Image-Layered's autoencoder takes alpha: nothing is transparent there, and layers are not blended."""
    vae = comfy.sd.VAE(sd=load_file(next((Path(SCRATCH) / "vae").glob("*.safetensors"))))
    _, latent = default.region_layers(64, 48, "16 0 32 32", vae)
    canvas = torch.full((1, 48, 64, 4), 0.5)
    found = {}
    for name, alpha in (("clear", 0.0), ("opaque", 1.0)):
        canvas[..., 3] = alpha
        found[name] = float((latent["samples"][:, :, 1] - vae.encode(canvas)[:, :, 0]).abs().max())
    picture = torch.rand(32, 32, 4, generator=torch.Generator().manual_seed(4))
    document = Document(64, 48, (Layer("back", torch.ones(48, 64, 4)), Layer("front", picture, 16, 0)))
    (made,) = EncodeRegionLayers.execute(to_core(document), vae, latent).args
    around = torch.zeros(1, 64, 64, 4)
    around[:, 16:48, 16:48] = torch.where(picture[..., 3:] > 0, picture, 0)
    wanted = vae.encode(around)[0, :, 0, 2:-2, 2:-2]
    emit("RGBA", layer=float((made["samples"][0, :, 2, :4, 2:6] - wanted).abs().max()), **found)


def documents(default):
    """Boxes from layers: those that show, and all numbers of them."""
    picture = torch.ones(16, 16, 4)
    hidden = Group("hidden", (Layer("in a group", picture, 0, 0),), visible=False)
    document = Document(60, 48, (Layer("shown", picture, 32, 16), Layer("off", picture, 0, 0, visible=False), hidden))
    _, latent = default.region_layers(64, 48, "0 0 16 16", layers=to_core(document))
    none = default.region_layers(64, 48)[1]
    model, most = default.region_layers(64, 48, "0 0 16 16\n" * 50)
    sampled = nodes.KSampler().sample(model, 1, 2, 1.0, "euler", "simple", said("red disc"), said(""), most)[0]
    alone = nodes.KSampler().sample(*default.region_layers(64, 48)[:1], 1, 2, 1.0, "euler", "simple", said("red disc"), said(""), none)[0]
    emit(
        "documents",
        boxes=latent[KEY].boxes[2:],
        names=latent[NAMES],
        decoded=[len(DecodeRegionLayers.execute(one, default.vae, default.name).args[0][0]["layers"]) for one in (sampled, alone)],
    )


def batches(default, document, latent, made):
    """Each sample of a batch against that sample alone, by the decoders of pictures and of clips."""

    def pictures_of(samples, name):
        documents, merged = DecodeRegionLayers.execute(samples, default.vae, name).args
        return [[one, *(layer.image for _, layer in from_core(core).walk())] for core, one in zip(documents, merged, strict=True)]

    def clips_of(samples, name):
        layers, merged = DecodeRegionVideo.execute(samples, default.vae, name).args
        return [[one, *(layer.frames.images for layer in clips)] for clips, one in zip(layers, merged, strict=True)]

    clip = default.region_layers(64, 48, "0 0 32 32", frames=5)[1]
    for case, samples, decoded in (("pictures", made, pictures_of), ("clips", clip, clips_of)):
        for name in (NONE, default.name):
            singles = [{**samples, "samples": factor * samples["samples"]} for factor in (1.0, 0.5)]
            both = decoded({**samples, "samples": torch.cat([single["samples"] for single in singles])}, name)
            alone = [decoded(single, name)[0] for single in singles]
            pairs = [list(zip(one, other, strict=True)) for one, other in zip(both, alone, strict=True)]
            emit(
                f"batch of {case}, {name}",
                error=max(float((one - other).abs().max()) for pair in pairs for one, other in pair),
                apart=min(float((one - other).abs().max()) for one, other in zip(*both, strict=True)),
            )


def node_refusals(default, document, latent, made):
    core = to_core(document)
    clip = default.region_layers(64, 48, frames=9)[1]
    taesd = comfy.sd.VAE(sd={name: value.clone() for name, value in random_taesd().state_dict().items()})
    large = to_core(replace(document, width=1024, height=1000))
    moved = to_core(document.map(lambda layer: replace(layer, x=layer.x + 8)))
    for case, action in (
        ("51 boxes", lambda: default.region_layers(64, 48, "0 0 16 16\n" * 51)),
        ("layers' canvas", lambda: default.region_layers(64, 48, layers=large)),
        ("decoder's channels", lambda: DecodeRegionLayers.execute(made, default.vae, "narrow.safetensors")),
        ("pictures' VAE", lambda: DecodeRegionVideo.execute(clip, taesd, NONE)),
        ("encode: canvas", lambda: EncodeRegionLayers.execute(large, default.vae, latent)),
        ("encode: number", lambda: EncodeRegionLayers.execute({**core, "layers": core["layers"][:-1]}, default.vae, latent)),
        ("encode: place", lambda: EncodeRegionLayers.execute(moved, default.vae, latent)),
        ("encode: clip", lambda: EncodeRegionLayers.execute(core, default.vae, clip)),
        ("encode: latent", lambda: EncodeRegionLayers.execute(core, default.vae, {"samples": torch.zeros(1, 16, 4, 4)})),
    ):
        try:
            action()
        except ValueError as error:
            emit(case, error=str(error))


with torch.inference_mode():
    sampled = parity()
    qwen()
    wan()
    hooks(sampled)
    variants(sampled)
    previews()
    reference()
    refusals()
    small_vae()
    default = Default()
    lines_of_region_layers(default)
    published_figures(default)
    watched(default)
    rgba_vae(default)
    documents(default)
    made = encoded(default)
    batches(default, *made)
    node_refusals(default, *made)
