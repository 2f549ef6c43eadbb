"""ART's regions on ComfyUI's own Flux, Qwen-Image and Wan, old and new: equal to the whole canvas with masked tokens; and through the queue."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import _installed
from PIL import Image
from safetensors.torch import load, load_file, save_file
from test_art import in_float64, transparent_decoder
from test_comfy_transparent_video import base, save_node, saved
from test_transparent_video import independent, needs_ffmpeg, psnr

from tessera.cli.comfy_client import PromptFailedError, PromptRefusedError
from tessera.cli.comfy_server import ComfyServer
from tessera.models.layers.regions import Regions
from tiny_models import LAYERS as LAYERS_FILE
from tiny_models import LAYERS_VAE, write_qwen_image_layered

HERE = Path(__file__).parent
LAYERS, HEIGHT, WIDTH = 5, 3, 4  # of the canvas, in tokens
SIZES = [[3, 4], [3, 4], [2, 2], [2, 2], [1, 1]]  # height and width of the layers
BOXES = [(0, 0, 4, 3), (0, 0, 4, 3), (0, 1, 2, 2), (1, 0, 2, 2), (3, 2, 1, 1)]  # what tests/comfy_art.py's boxes snap to
STEPS, GUIDANCE, CFG, TEXT = 3, 4.0, 3.5, 7

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def published() -> tuple[torch.nn.Module, torch.Tensor]:
    """diffusers' Flux at reduced width and depth, whose names the published weights use, and a random `layer_pe`."""
    diffusers = pytest.importorskip("diffusers", reason="the reference")
    sizes = dict(num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=64, pooled_projection_dim=64)
    network = diffusers.FluxTransformer2DModel(**sizes, in_channels=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1))
    return network, torch.randn(1, 52, 1, 1, 128, generator=generator)


def published_lora() -> dict[str, torch.Tensor]:
    """Under the names that diffusers' pipelines write."""
    generator = torch.Generator().manual_seed(6)
    modules = {"transformer_blocks.0.attn.to_q": (128, 128), "transformer_blocks.1.ff.net.0.proj": (512, 128)}
    modules |= {"single_transformer_blocks.0.attn.to_v": (128, 128), "single_transformer_blocks.1.proj_out": (128, 640)}
    lora = {}
    for name, (rows, columns) in modules.items():
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * columns**-0.5
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
    return lora


def reference(network, layer_pe, tensors) -> torch.Tensor:
    """The whole canvas of every layer through diffusers, keys outside of the boxes masked; Euler, two passes. `(1, 16, layers, h, w)`."""
    grid = torch.cartesian_prod(torch.arange(LAYERS), torch.arange(HEIGHT), torch.arange(WIDTH))
    inside = torch.tensor([x <= c < x + w and y <= r < y + h for layer, r, c in grid.tolist() for x, y, w, h in [BOXES[layer]]])
    hook = network.x_embedder.register_forward_hook(lambda _module, _args, out: out + layer_pe[0, :, 0, 0][grid[:, 0]])
    mask = torch.cat([torch.ones(TEXT, dtype=torch.bool), inside])[None, None, None]

    def velocity(tokens, sigma, text):
        return network(
            hidden_states=tokens,
            encoder_hidden_states=tensors[f"{text}.context"],
            pooled_projections=tensors[f"{text}.pooled"],
            timestep=torch.tensor([sigma]),
            guidance=torch.tensor([GUIDANCE]),
            img_ids=grid.float(),
            txt_ids=torch.zeros(TEXT, 3),
            joint_attention_kwargs={"attention_mask": mask},
            return_dict=False,
        )[0]

    tokens = tensors["noise"].unflatten(-1, (WIDTH, 2)).unflatten(-3, (HEIGHT, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    mu = 0.5 + 0.65 * (int(inside.sum()) - 256) / 3840  # diffusers.pipelines.flux.calculate_shift, of the tokens inside
    times = [1 - step / STEPS for step in range(STEPS)]
    sigmas = [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in times] + [0.0]
    torch.testing.assert_close(tensors["sigmas"], torch.tensor(sigmas), rtol=0, atol=2e-4)  # ComfyUI reads them from a table of 10000
    for sigma, after in zip(tensors["sigmas"].tolist(), tensors["sigmas"].tolist()[1:], strict=False):
        negative = velocity(tokens, sigma, "negative")
        tokens = tokens + (after - sigma) * (negative + CFG * (velocity(tokens, sigma, "positive") - negative))
    hook.remove()
    # Back to the autoencoder's scale (scaling_factor, shift_factor of FLUX.1's); outside of the boxes stays what the given latent held.
    tokens = torch.where(inside[:, None], tokens / 0.3611 + 0.1159, 0.25)
    return tokens.unflatten(1, (LAYERS, HEIGHT, WIDTH)).unflatten(-1, (16, 2, 2)).permute(0, 4, 1, 2, 5, 3, 6).flatten(-2).flatten(-3, -2)


@pytest.fixture(scope="module")
def model():
    return published()


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def results(request, package_path, tmp_path_factory, model):
    install, folder = _installed(old=request.param), tmp_path_factory.mktemp("art")
    save_file(model[0].state_dict(), folder / "flux.safetensors")
    save_file({"layer_pe": model[1]}, folder / "layer_pe.safetensors")
    save_file(published_lora(), folder / "lora.safetensors")
    write_qwen_image_layered(folder)
    (folder / "transparent_decoders").mkdir()
    save_file(transparent_decoder(width=64, blocks=1, hidden=64, channels=4), folder / "transparent_decoders" / "narrow.safetensors")
    command = [install.python, HERE / "comfy_art.py", install.path, package_path, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["case"]: line for line in lines} | {name: load_file(folder / f"{name}.safetensors") for name in ("sampled", "taesd")}


def test_flux_with_published_names_is_the_whole_canvas_with_masked_tokens(results, model):
    """Crop, positions, layer embedding, LoRA, shift, embedded guidance, true CFG and scatter, against another library's Flux."""
    tensors = results["sampled"]
    network, lora = copy.deepcopy(model[0]), published_lora()
    with torch.no_grad():
        for name in (name.removesuffix(".lora_A.weight") for name in lora if "lora_A" in name):
            module = network.get_submodule(name.removeprefix("transformer."))
            module.weight += lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        wanted = reference(network, model[1], tensors)
    error = float((tensors["sampled"] - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-4
    for other in ("without embedding", "without LoRA"):
        assert float((tensors[other] - wanted).abs().max()) > 0.1, "what does nothing proves nothing"


def test_qwen_image_is_its_own_forward_with_masked_tokens(results):
    assert results["qwen"]["error"] < 1e-4 and results["qwen"]["unmasked"] > 1e-2


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_wan_is_its_own_forward_with_masked_tokens(results, frames):
    """Pictures, and clips of 9 and 17 frames: crop, positions in time and space, layer embedding, scatter."""
    line = results[f"wan {frames}"]
    assert line["error"] < 1e-4 and line["unembedded"] > 1e-2 and line["outside"] == 0 and line["shown_outside"] < 1e-5
    assert line["previews"] == [[1, 16, frames * LAYERS, 2 * HEIGHT, 2 * WIDTH]] * STEPS
    assert line["wrappers"] == [2, 0], "applied twice, and the model itself left as it was"


def test_wan_with_other_patches(results):
    line = results["wan with others"]
    assert line["tokens"] == [99], "the strip's, three frames of them"
    assert line["same"] == line["limited"] == 0 and line["dense"] < 1e-5
    assert line["family"] == "Wan" and line["calls"]["sparse"] == 2 * STEPS and line["finite"] and line["changed"] > 1e-3
    assert line["boxes"] == [[3, *size] for size in SIZES], "sparse blocks end where layers do"


def test_the_hooks_leave_nothing_behind(results):
    line = results["hooks"]
    assert line["patches"] == [] and line["wrappers"] == [] and line["twice"] == 1 and line["shift"] == pytest.approx(1.15)
    assert line["same"] == 0.0 and line["core shift"] == pytest.approx(line["our shift"], rel=1e-9)
    assert line["previews"] == [[1, 16, 2 * HEIGHT, 2 * WIDTH]] * STEPS and line["kept"] == [[1, 16, LAYERS, 2 * HEIGHT, 2 * WIDTH]] * STEPS
    assert line["calls"] == {"host": 4 * STEPS} and line["reasons"] == {"density 1": 4 * STEPS}, "an attention patch knows where the text is"


def test_batches_masks_and_sparse_attention(results):
    line = results["variants"]
    assert line["batch"] < 1e-5
    assert line["changed"] == [False, False, False, True, False]
    assert line["calls"] == {"sparse": 4 * STEPS} and line["finite"] and line["boxes"] == [[1, *size] for size in SIZES]


def test_core_previews_flux_and_keeps_all_layers_of_what_it_shows(results):
    """TAESD takes pictures; denoised_output of SamplerCustomAdvanced, after the last step, is what was sampled, outside of the boxes too."""
    line = results["previews"]
    assert line["images"] == [[16 * WIDTH, 16 * HEIGHT]] * 2 * STEPS
    assert line["last"] <= 1 and line["varied"] > 1 and line["denoised"] < 1e-5


def test_reference_pictures_come_after_the_layers(results):
    line = results["reference"]
    assert line["finite"] and line["changed"] > 1e-3 and line["after"]
    assert line["numbers"] == [-1, 0, 1 + LAYERS], "core's numbers are shifted from 1 on"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other latent", r"latent_image is \(1, 16, 6, 8\), and the model's regions need \(1, 16, 5, 6, 8\); use model and latent of one"),
        ("area", "the conditioning has area, which know nothing of regions"),
        ("inpainting", "the conditioning has concat_latent_image, which know nothing of regions"),
        ("reference_latents", "the conditioning has reference_latents, which know nothing of regions"),
        ("context_latents", "the conditioning has context_latents, which know nothing of regions"),
        ("time_dim_concat", "the conditioning has time_dim_concat, which know nothing of regions"),
        ("LongCat", "model is LongCatImage, and regions are for Flux.1, Qwen-Image and Wan"),
        ("tiles", "the model got 4 picture tokens and its regions have 33"),
        ("other model", r"model is Identity, and regions are for Flux.1, Qwen-Image and Wan text-to-video"),
        ("image to video", r"model is WanModel, and regions are for .* Wan text-to-video \(2.1, 2.2 14B\); load one of those"),
        ("VACE", r"model is VaceWanModel, and regions are for"),
        ("clips of Flux", r"frames is more than 1, and model is Flux, which makes pictures; set frames to 1, or load a Wan model"),
        ("51 boxes", "boxes has 51 foregrounds; use at most 50"),
        ("layers' canvas", "layers has a canvas of 1024 x 1000 pixels, and Region Layers one of 64 x 48; set .* to 1024 and 1008"),
        ("decoder's channels", "narrow.safetensors reads latents of 4 channels, and samples has 16; use that of the model's VAE"),
        ("pictures' VAE", "vae decodes pictures; use the video VAE that Region Layers had"),
        ("encode: canvas", "layers has a canvas of 1024 x 1000 pixels, and Region Layers one of"),
        ("encode: number", r"layers has \d+ visible layers, and latent has boxes for \d+ foregrounds; give the background and one layer a box"),
        ("encode: place", r"layer 'shape 1' \(at .*\) reaches out of its box \(.*\); .*give Region Layers boxes that hold the layers"),
        ("encode: clip", "latent is for clips of 3 latent frames, and layers are pictures; set frames of Region Layers to 1"),
        ("encode: latent", r"latent is \(1, 16, 4, 4\) without its regions; connect the latent of Region Layers"),
        ("embedding width", r"the layer embedding is \(1, 52, 1, 1, 64\); model and boxes need \(1, 5 or more, 1, 1, 128\)"),
    ],
)
def test_what_does_not_fit_is_refused(results, case, message):
    assert re.search(message, results[case]["error"])


@pytest.mark.parametrize("decoder", ["none", "tessera_layers.safetensors"])
@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_each_sample_of_a_batch_is_decoded_as_it_is_alone(results, kind, decoder):
    line = results[f"batch of {kind}, {decoder}"]
    assert line["error"] < 1e-4 and line["apart"] > 0.01


def test_region_layers_says_what_its_model_was_not_trained_on(results):
    within, beyond = results["lines"]["shown"]
    assert within == "105 of 144 tokens lie in boxes"  # twice 8 x 6, and 3 x 3
    assert beyond == (
        "432 of 576 tokens lie in boxes\ntessera_layers.safetensors was not trained on this, expect a poor picture: width 512 (96 to 160), "
        "a box of 128 pixels (16 to 96)"
    )


@pytest.mark.parametrize("frames", [1, 9])
def test_the_nodes_make_what_the_published_figures_are_of(results, frames):
    """The default model's 20 steps through Region Layers, KSampler and the decoding nodes, against models/layers/default/sampling.py."""
    line = results[f"published {frames}"]
    assert line["error"] < 1e-4 and line["merged"] < 1e-3 and line.get("layers", 0) < 1e-3


def test_the_transparent_decoder_reports_and_can_be_stopped(results):
    line = results["watched"]
    total = line["blocks"] + 2
    assert line["steps"][0] == [1, total] and line["steps"][-1] == [total, total], "ComfyUI leaves out some between"
    assert line["stopped"]
    assert line["memory"][0] == line["memory"][1] > 0


def test_a_drawn_picture_is_encoded_and_decoded(results):
    line = results["encoded"]
    assert line["layers"] > 3 and line["names"] and line["places"]
    assert line["error"] < 1e-4 and line["outside"] == 0
    assert line["alpha"] >= 27 and line["colour"] >= 40 and line["iou"] >= 0.95
    assert 0.05 < line["moved"][0] < 0.6 * line["moved"][1], "a low denoise changes it, and keeps most"
    assert line["batch"] == 2


def test_an_autoencoder_with_alpha_gets_alpha(results):
    line = results["RGBA"]
    assert line["clear"] == 0 and line["opaque"] > 1e-2 and line["layer"] < 1e-5


def test_what_shows_of_a_document_is_in_a_box(results):
    line = results["documents"]
    assert line["boxes"] == [[2, 1, 1, 1], [0, 0, 1, 1]] and line["names"] == ["Background", "shown", "Layer 2"]
    assert line["decoded"] == [51, 1], "50 foregrounds, and none"


def graph(boxes: str = "0, 17, 30, 40\n16 0 32 32", decoder: str = "none", vae: str = "tiny_taesd.safetensors") -> dict[str, dict]:
    where = dict(width=64, height=48, layer_embedding="tiny_layer_pe.safetensors", base_shift=0.5, max_shift=1.15)
    run = dict(seed=1, steps=2, cfg=3.5, sampler_name="euler", scheduler="simple", denoise=1.0)
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tiny_flux.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": vae}},
        "3": {"class_type": "TesseraShapesPrompt", "inputs": {"text": "red disc left"}},
        "4": {
            "class_type": "TesseraRegionLayers",
            "inputs": {"model": ["1", 0], "vae": ["2", 0], "boxes": boxes, **where},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {"model": ["4", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 1], **run},
        },
        "6": {"class_type": "TesseraDecodeRegionLayers", "inputs": {"samples": ["5", 0], "vae": ["2", 0], "transparent_decoder": decoder}},
        "7": {"class_type": "TesseraComposeLayers", "inputs": {"layers": ["6", 0], "light": "sRGB", "background": "black"}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "regions"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["6", 1], "filename_prefix": "merged"}},
    }


@pytest.fixture
def server(any_comfy: ComfyServer, results, model, tmp_path) -> ComfyServer:
    """With a tiny Flux under the published names, its layer embedding, a transparent decoder and a small VAE."""
    assert any_comfy._base is not None
    folder = any_comfy._base / "models"
    decoder = transparent_decoder(width=64, blocks=1, hidden=64, channels=16)
    for name, state in (
        ("diffusion_models/tiny_flux", model[0].state_dict()),
        ("layer_embeddings/tiny_layer_pe", {"layer_pe": model[1]}),
        ("transparent_decoders/tiny_decoder", decoder),
        ("vae/tiny_taesd", results["taesd"]),
    ):
        file = folder / f"{name}.safetensors"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            save_file(state, file)
    return any_comfy


def pictures(server: ComfyServer, **changes) -> list[np.ndarray]:
    outputs = server.run(graph(**changes), timeout=600).outputs
    return [np.asarray(Image.open(io.BytesIO(server.fetch(outputs[node]["images"][0])))) for node in ("8", "9")]


once = pytest.mark.parametrize("results", [False], ids=["new"], indirect=True)


@once
def test_through_the_queue(server):
    opaque, merged = pictures(server)
    transparent, same = pictures(server, decoder="tiny_decoder.safetensors")
    assert opaque.shape == merged.shape == transparent.shape == (48, 64, 3)
    assert (merged == same).all(), "the merged picture is not the transparent decoder's"
    outside = np.ones((48, 64), bool)
    outside[16:48, :32] = outside[:32, 16:48] = False
    assert (opaque[outside] == transparent[outside]).all() and (opaque != transparent).any()
    video_vae, _ = pictures(server, vae="tessera_shapes_vae.safetensors")
    assert video_vae.shape == (48, 64, 3)


@once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"boxes": "0 0 0 10\n70 0 10 10"},
            r"box 1 \(0 x 10 pixels\) has no area; box 2 \(at 70, 0, 10 x 10\) lies outside of the canvas",
        ),
        ({"boxes": "0 0 10 10\n" * 200}, "boxes has 200 foregrounds; use at most 50"),
        ({"boxes": "a dog"}, "boxes has 'a dog' in line 1; write x, y, width, height in pixels"),
    ],
)
def test_bad_boxes_are_refused_with_one_message(server, changes, message):
    with pytest.raises(PromptRefusedError, match=message) as refused:
        server.run(graph(**changes))
    (error,) = refused.value.body["node_errors"].values()
    assert [found["extra_info"]["input_name"] for found in error["errors"]] == ["boxes"]


OVER = "0, 17, 30, 40\n16 0 32 32"  # what BOXES' first two foregrounds come from


def wan_graph(frames: int | None, decode: str, decoder: str = LAYERS_FILE) -> dict[str, dict]:
    """The built-in layered model, whatever decodes it as node 7; 8 keeps the latent, 9 to 11 decode its first layer by core's own nodes."""
    where = dict(width=64, height=48, boxes=OVER, layer_embedding=LAYERS_FILE, base_shift=0.5, max_shift=1.15)
    length = {} if frames is None else {"frames": frames}
    run = dict(seed=1, steps=2, cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": LAYERS_FILE, "weight_dtype": "default"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": LAYERS_VAE}},
        "3": {"class_type": "TesseraLayersPrompt", "inputs": {"text": "red disc, blue ring on green"}},
        "4": {"class_type": "TesseraLayersPrompt", "inputs": {"text": ""}},
        "5": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 5.0}},
        "6": {"class_type": "TesseraRegionLayers", "inputs": {"model": ["5", 0], "vae": ["2", 0], **where, **length}},
        "0": {
            "class_type": "KSampler",
            "inputs": {"model": ["6", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["6", 1], **run},
        },
        "7": {"class_type": decode, "inputs": {"samples": ["0", 0], "vae": ["2", 0], "transparent_decoder": decoder}},
        "8": {"class_type": "SaveLatent", "inputs": {"samples": ["0", 0], "filename_prefix": "regions"}},
        "9": {"class_type": "LatentCut", "inputs": {"samples": ["0", 0], "dim": "t", "index": 0, "amount": ((frames or 1) - 1) // 4 + 1}},
        "10": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["2", 0]}},
        "11": {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "first"}},
        "12": {"class_type": "SaveImage", "inputs": {"images": ["7", 1], "filename_prefix": "merged"}},
    }


def as_core_decodes_it(server: ComfyServer, outputs: dict) -> np.ndarray:
    """The merged picture or clip, which core decodes to the same; but for rounding, as ours decodes layers in batches."""
    merged, core = (
        np.stack([np.asarray(Image.open(io.BytesIO(server.fetch(entry)))).astype(int) for entry in outputs[node]["images"]]) for node in ("12", "11")
    )
    assert np.abs(merged - core).max() <= 1
    return merged


@torch.no_grad()
def foregrounds(server: ComfyServer, outputs: dict, weights: Path, frames: int) -> np.ndarray:
    """`(layers, frames, 48, 64, 4)` in 0..1: the transparent decoder over again, on the latent that was saved."""
    latent = load(server.fetch(outputs["8"]["latents"][0]))["latent_tensor"]
    assert latent.shape == (1, 16, 4 * frames, 6, 8)
    regions = Regions(8, 6, tuple((2 * x, 2 * y, 2 * w, 2 * h) for x, y, w, h in BOXES[:4]), frames)
    cuts = in_float64(load_file(weights / "transparent_decoders" / LAYERS_FILE), latent[0], regions)[2:]
    canvas = np.zeros((len(cuts), len(cuts[0]), 48, 64, 4))
    for layer, cut, (x, y, w, h) in zip(canvas, cuts, BOXES[2:4], strict=True):
        layer[:, 16 * y : 16 * (y + h), 16 * x : 16 * (x + w)] = ((cut + 1) / 2).clamp(0, 1)
    return canvas


def test_a_layered_picture_of_wan_becomes_a_psd(any_comfy, tiny_models):
    psd_tools = pytest.importorskip("psd_tools", reason="reads the file back")
    graph = wan_graph(None, "TesseraDecodeRegionLayers")
    graph["13"] = {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["7", 0], "filename_prefix": "wan", "format": "psd"}}
    drawn = json.dumps([{"name": "left", "x": 0, "y": 17, "width": 30, "height": 40}])  # the first of OVER
    graph["14"] = {"class_type": "TesseraLayout", "inputs": {"width": 64, "height": 48, "boxes": drawn, "fit": "contain"}}
    graph["6"]["inputs"] |= {"layers": ["14", 0], "boxes": OVER.splitlines()[1]}
    outputs = any_comfy.run(graph, timeout=600).outputs
    assert as_core_decodes_it(any_comfy, outputs).shape == (1, 48, 64, 3)
    wanted = foregrounds(any_comfy, outputs, tiny_models, 1)[:, 0]
    psd = psd_tools.PSDImage.open(io.BytesIO(any_comfy.fetch(outputs["13"]["tessera_files"][0])))
    assert psd.size == (64, 48)
    assert [(layer.name, layer.bbox) for layer in psd] == [
        ("Background", (0, 0, 64, 48)),
        ("left", (0, 16, 32, 48)),
        ("Layer 2", (16, 0, 48, 32)),
    ]
    for layer, canvas in zip(list(psd)[1:], wanted, strict=True):
        left, top, right, bottom = layer.bbox
        assert np.abs(layer.numpy() - canvas[top:bottom, left:right]).max() < 0.51 / 255
        assert canvas[..., 3].std() > 0.05, "an even alpha proves little"


def test_a_layered_picture_is_encoded_and_sampled_again(any_comfy):
    """Decode, encode, sample with less noise, decode, through the queue. Core's VAE Encode makes the same of the merged picture."""
    graph = wan_graph(None, "TesseraDecodeRegionLayers")
    run = graph["0"]["inputs"] | {"latent_image": ["14", 0], "denoise": 0.5}
    graph |= {
        "13": {"class_type": "TesseraComposeLayers", "inputs": {"layers": ["7", 0], "light": "sRGB", "background": "transparent"}},
        "14": {"class_type": "TesseraEncodeRegionLayers", "inputs": {"layers": ["7", 0], "vae": ["2", 0], "latent": ["6", 1]}},
        "15": {"class_type": "SaveLatent", "inputs": {"samples": ["14", 0], "filename_prefix": "encoded"}},
        "16": {"class_type": "VAEEncode", "inputs": {"pixels": ["13", 0], "vae": ["2", 0]}},
        "17": {"class_type": "SaveLatent", "inputs": {"samples": ["16", 0], "filename_prefix": "core"}},
        "18": {"class_type": "KSampler", "inputs": run},
        "19": {"class_type": "TesseraDecodeRegionLayers", "inputs": graph["7"]["inputs"] | {"samples": ["18", 0]}},
        "20": {"class_type": "SaveImage", "inputs": {"images": ["19", 1], "filename_prefix": "again"}},
    }
    outputs = any_comfy.run(graph, timeout=600).outputs
    ours, core = (load(any_comfy.fetch(outputs[node]["latents"][0]))["latent_tensor"] for node in ("15", "17"))
    assert ours.shape == (1, 16, 4, 6, 8) and core.std() > 0.01
    torch.testing.assert_close(ours[:, :, :1], core, rtol=0, atol=1e-4 * float(core.abs().max()))
    again = np.asarray(Image.open(io.BytesIO(any_comfy.fetch(outputs["20"]["images"][0]))))
    assert again.shape == (48, 64, 3) and again.std() > 1


@needs_ffmpeg
def test_layered_clips_of_wan_become_transparent_videos(any_comfy, tiny_models):
    """The composite, and one layer alone, in ProRes 4444 and VP9, read by FFmpeg's program."""
    graph = wan_graph(9, "TesseraDecodeRegionVideo")
    for number, name in (("13", ""), ("14", "Layer 2")):
        graph[number] = {"class_type": "TesseraComposeLayeredVideo", "inputs": {"layers": ["7", 0], "layer": name, "width": 0, "height": 0}}
    videos = {"15": ("13", "ProRes 4444"), "16": ("14", "ProRes 4444"), "17": ("14", "VP9 WebM")}
    for number, (images, format) in videos.items():
        graph[number] = save_node(format, [images, 0], fps=24, filename_prefix=f"wan/{number}")
    outputs = any_comfy.run(graph, timeout=600).outputs
    assert as_core_decodes_it(any_comfy, outputs).shape == (9, 48, 64, 3)
    wanted = foregrounds(any_comfy, outputs, tiny_models, 3)
    whole, alone, small = (independent(saved(any_comfy, outputs, number), videos[number][1], 16, 64, 48) for number in videos)
    assert whole.shape == alone.shape == small.shape == (9, 48, 64, 4)
    assert (whole[..., 3] == 1).all() and np.abs(alone[..., 3] - wanted[1, ..., 3]).max() < 0.7 / 1023
    assert psnr((alone - wanted[1])[..., :3] * wanted[1, ..., 3:]) > 35
    assert psnr(small[..., 3] - wanted[1, ..., 3]) > 35
    over = wanted[1, ..., 3] > 0.98
    assert over.any() and psnr((whole - wanted[1])[over][:, :3]) > 35, "the uppermost layer hides what is below"


VIDEO = "TesseraDecodeRegionVideo"
REFUSED_CLIPS = {
    "as a picture": ("TesseraDecodeRegionLayers", {}, "samples has clips of 3 latent frames; decode them with Decode Region Video"),
    "for pictures": (VIDEO, {"7": {"transparent_decoder": "tiny_pictures.safetensors"}}, "is for pictures, and the layers have 3 latent frames"),
    "other latent": (VIDEO, {"7": {"samples": ["9", 0]}}, "without its regions; connect a sampler that had the latent of Region Layers"),
    "unknown word": (VIDEO, {"3": {"text": "red elephant"}}, "the word 'elephant' is not in the vocabulary of these weights"),
}


@pytest.mark.parametrize("case", REFUSED_CLIPS)
def test_what_clips_cannot_be(any_comfy, case):
    decode, changes, words = REFUSED_CLIPS[case]
    file = base(any_comfy) / "models" / "transparent_decoders" / "tiny_pictures.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file(transparent_decoder(width=64, blocks=1, hidden=64, channels=16), file)
    graph = wan_graph(9, decode)
    for node, inputs in changes.items():
        graph[node]["inputs"] |= inputs
    try:
        with pytest.raises((PromptFailedError, PromptRefusedError)) as error:
            any_comfy.run(graph, timeout=600)
    finally:
        file.unlink()
    assert words in str(error.value)
