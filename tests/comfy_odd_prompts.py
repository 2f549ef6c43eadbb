"""Runs inside ComfyUI's Python (see test_comfy_odd_prompts.py): prompts with wrong values and links, by ComfyUI's own validation and queue.

    python comfy_odd_prompts.py COMFYUI PACKAGE_PARENT MODELS [COUNT [SEED [NODE]]]

MODELS: a folder of tiny_models.write_models. COUNT: prompts, drawn from all of (node, input, wrong value); 0 for all, each once. NODE: only
its prompts. Prints one JSON object per prompt that was answered otherwise than by a result or a sentence, and the counts.

A sentence is a ValueError, or an error of this pack's, by its own `raise`, or a refusal of `validate_inputs` beside one input: in one line, without
Python's words.
"""

import asyncio
import contextlib
import copy
import io
import json
import logging
import math
import random
import re
import signal
import sys
import tempfile
import traceback
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

COMFYUI, PACKAGE_PARENT, MODELS, *given = sys.argv[1:]
COUNT, SEED, NODE = (*given, *("0", "0", "")[len(given) :])
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)
logging.disable(logging.CRITICAL)

import utils.extra_config  # noqa: E402,F401  (first, as main.py does)

# isort: split
import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import execution  # noqa: E402
import folder_paths  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from comfy_api.latest import InputImpl, Types, _io  # noqa: E402
from comfy_extras.nodes_upscale_model import UpscaleModelLoader  # noqa: E402

import nodes  # noqa: E402
from tessera import nodes as pack  # noqa: E402
from tessera.models.layers.document import Document, Layer, to_core  # noqa: E402
from tessera.models.layers.formats import write  # noqa: E402

PACKAGE = str(Path(pack.__file__).parent.parent)
SECONDS = 300  # for one prompt
LONGEST = 700  # characters of a sentence
PYTHON = re.compile(
    r"NoneType|[a-z]Error\b|Traceback|has no attribute|unsupported operand|out of range|must be .*, not |not subscriptable|not iterable"
    r"|unhashable|positional argument|keyword argument|size of tensor|must match|mat1|not supported between|to unpack|'\w+' object|invalid literal"
    r"|could not convert|codec can't|null byte|null character|\[Errno|division by zero|object of type|be interpreted|indices must|recursion"
    r"|Exceeds the|cannot convert|can't convert|argument must|unexpected keyword|<[\w.]+ object|<class|ambiguous|\bdtype\b|tensor\("
)


class Link(str):
    """The name of a value that another node gives."""


class Give:
    """Gives any value; ComfyUI takes its output for any type."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "give", ("*",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"key": ("STRING",)}}

    def give(self, key):
        return (VALUES[key],)


class Sink:
    """Ends a prompt."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "take", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    def take(self, value):
        return {}


class Clip:
    """A text encoder of one token a word, with the methods that the nodes call."""

    def tokenize(self, text):
        return {"l": [[(1, 1.0), *((2 + sum(map(ord, word)), 1.0) for word in text.split()), (0, 1.0)]]}

    def encode_from_tokens(self, tokens):
        return torch.zeros(1, len(tokens["l"][0]), 64)


def folders(root):
    for kind in ("input", "output", "temp"):
        Path(root, kind).mkdir()
        getattr(folder_paths, f"set_{kind}_directory")(str(Path(root, kind)))
    write(Document(48, 40, LAYERS), Path(root, "input", "three.ora"))
    with av.open(str(Path(root, "input", "clip.mp4")), "w") as container:
        stream = container.add_stream("mpeg4", 24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode())


def registered():
    """The pack's nodes by their ids, put where ComfyUI looks for them."""
    extension = asyncio.run(pack.comfy_entrypoint())
    for kind in ("diffusion_models", "vae", "patch_adapters", "layer_embeddings", "transparent_decoders"):
        folder_paths.add_model_folder_path(kind, str(Path(MODELS, kind)), is_default=True)
    asyncio.run(extension.on_load())
    found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    nodes.NODE_CLASS_MAPPINGS.update(found | {"Give": Give, "Sink": Sink})
    return found


def run(node, **inputs):
    """A node by itself."""
    hidden = SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
    return type("Node", (node,), {"hidden": hidden}).execute(**inputs).args


LAYERS = tuple(Layer(name, torch.full((20, 30, 4), 0.5), 4 * number) for number, name in enumerate("abc"))
ROOT = tempfile.TemporaryDirectory()
folders(ROOT.name)
NODES = registered()
SHORT = {node_id.removeprefix("Tessera"): node for node_id, node in NODES.items()}

# What the nodes take.
model = nodes.UNETLoader().load_unet("tessera_layers.safetensors", "default")[0]
vae = nodes.VAELoader().load_vae("tessera_layers_vae.safetensors")[0]
weights = model.model.diffusion_model.blocks[0].self_attn.q.weight
lora = {
    f"diffusion_model.blocks.0.self_attn.q.lora_{end}.weight": torch.ones(*size)
    for end, size in (("up", (len(weights), 4)), ("down", (4, weights.shape[1])))
}
concept = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
image = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
audio = {"waveform": torch.zeros(1, 2, 800), "sample_rate": 48000}
GOOD = {
    "model": model,
    "concept model": concept,
    "vae": vae,
    "clip": Clip(),
    "image": image,
    "mask": torch.zeros(1, 16, 16),
    "latent": {"samples": torch.zeros(1, 16, 1, 16, 16)},
    "conditioning": run(SHORT["ShapesPrompt"], text="red disc left")[0],
    "upscale model": run(UpscaleModelLoader, model_name="tessera_catanet_x2.safetensors")[0],
    "video": InputImpl.VideoFromComponents(Types.VideoComponents(images=image, frame_rate=Fraction(24), audio=audio)),
    "audio": audio,
    "layers": to_core(Document(48, 40, LAYERS)),
    "adapter": run(SHORT["LoadPatchAdapter"], adapter_name="tiny_patch_adapter.safetensors")[0],
    "text": "a text",
    "number": 7,
}
GOOD["concepts"] = run(SHORT["ConceptRegion"], model=concept, clip=Clip(), prompt="a cat", words="cat", x=0, y=0, width=64, height=64)[0]
GOOD["video layers"] = run(SHORT["AddVideoLayer"], images=image, name="", x=0, y=0, opacity=1.0, blend_mode="normal", ending="hold")[0]
REGION = {"width": 64, "height": 48, "boxes": "0, 0, 32, 32", "layer_embedding": "none", "base_shift": 0.5, "max_shift": 1.15}
GOOD["region model"], GOOD["region latent"] = run(SHORT["RegionLayers"], model=model, vae=vae, frames=1, **REGION)
GOOD["region clip"] = run(SHORT["RegionLayers"], model=model, vae=vae, frames=5, **REGION)[1]

SIZE = {"size": "factor", "size.factor": 2.0}
PATCHES = {"tile": 64, "overlap": 8}
LAYOUT = {"layers": Link("layers"), "fit": "contain"}
BASES = {
    "Accelerate": [{"model": Link("model"), "mode": "fast", "min_tokens": 0}],
    "SparseAttention": [
        {"model": Link("model"), **method, "density": 0.5, "precision": "native", "start_percent": 0.1, "end_percent": 0.9}
        | {"dense_blocks": "0", "min_tokens": 0, "block": "auto", "mask_refresh": 1, "tail": tail}
        for method, tail in (({"method": "rainfusion2"}, True), ({"method": "tessera", "method.error": 0.08, "method.search_every": 2}, False))
    ],
    "AttentionReport": [{"model": Link("model"), "samples": Link("latent")}],
    "LayerOffload": [{"model": Link("model"), "limit": "use at most", "gb": 4.0, "policy": "superpipeline", "k": 2, "k_prime": 1}],
    "OffloadReport": [{"model": Link("model"), "samples": Link("latent")}],
    "PatchUpscale": [
        {"upscale_model": Link("upscale model"), "image": Link("image"), **size, **PATCHES}
        for size in (SIZE, {"size": "megapixels", "size.megapixels": 0.01}, {"size": "named", "size.name": "720p"})
    ][:2],
    "PatchUpscaleVideoNetwork": [{"upscale_model": Link("upscale model"), "video": Link("video"), **SIZE, **PATCHES, "crf": 20}],
    "PatchUpscaleVideoFile": [
        {"upscale_model": Link("upscale model"), "file": "clip.mp4", **SIZE, **PATCHES, "filename_prefix": "v/x", "container": "mkv", "crf": 20}
    ],
    "PatchUpscaleVideo": [
        {"model": Link("model"), "vae": Link("vae"), "positive": Link("conditioning"), "negative": Link("conditioning"), "image": Link("image")}
        | {**SIZE, "denoise": 0.5, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 1, "tile": 64, "frames": 0}
        | {"coordinates": "canvas", "fusion": "joint", "colour": "wavelet", **adapter}
        for adapter in ({"adapter": Link("adapter"), "augmentation": 0.0}, {})
    ],
    "LoadPatchAdapter": [{"adapter_name": "tiny_patch_adapter.safetensors"}],
    "UpscaleReport": [{"image": Link("image"), "original": Link("image"), "reference": Link("image"), **PATCHES}],
    "LayersFromImages": [
        {"image": Link("image"), "mask": Link("mask"), "layers": Link("layers"), "names": "x", "trim": True, "width": 0, "height": 0}
        | {"first": "a layer", "order": "first is lowest", "mask_means": "transparent", "threshold": 0.0, "drop_empty": True, "clean": "edges"}
        | {"clean.matte": "black", "clean.low": 0.1, "clean.high": 0.9, "clean.specks": 1, "clean.bleed": 1}
    ],
    "ComposeLayers": [{"layers": Link("layers"), "light": "sRGB", "background": "white"}],
    "EditLayer": [
        {"layers": Link("layers"), "layer": "1", "change": change, **{f"change.{name}": value for name, value in more.items()}}
        for change, more in {
            "position": {"x": 1, "y": 2},
            "size": {"width": 5, "height": 6},
            "turn": {"degrees": 30.0, "flip_h": True, "flip_v": False},
            "opacity": {"opacity": 0.5},
            "blend mode": {"blend_mode": "multiply"},
            "visibility": {"visible": False},
            "name": {"name": "new"},
            "order": {"position": 2},
            "mask": {"mask": Link("mask")},
        }.items()
    ],
    "AutoLayout": [
        {**LAYOUT, "layout": "grid", "layout.columns": 2, "layout.gap": 2, "layout.background": False},
        {**LAYOUT, "layout": "golden", "layout.background": True},
        {**LAYOUT, "layout": "masks", "layout.masks": Link("mask"), "layout.background": False},
        {**LAYOUT, "layout": "caption", "layout.caption": "a on the left"},
    ],
    "Layout": [{**LAYOUT, "width": 48, "height": 40, "boxes": '[{"name": "a", "x": 0, "y": 0, "width": 8, "height": 8}]'}],
    "SaveLayers": [{"layers": Link("layers"), "filename_prefix": "l/x", "format": kind} for kind in ("ora", "png")],
    "LoadLayers": [{"file": "three.ora"}],
    "RegionLayers": [{"model": Link("model"), "vae": Link("vae"), "layers": Link("layers"), "frames": 1, **REGION}],
    "EncodeRegionLayers": [{"layers": Link("layers"), "vae": Link("vae"), "latent": Link("region latent")}],
    "DecodeRegionLayers": [{"samples": Link("region latent"), "vae": Link("vae"), "transparent_decoder": "none"}],
    "DecodeRegionVideo": [{"samples": Link("region clip"), "vae": Link("vae"), "transparent_decoder": "none"}],
    "SaveTransparentVideo": [
        {"images": Link("image"), "filename_prefix": "t/x", "fps": 24.0, "alpha": "straight", "mask": Link("mask"), "audio": Link("audio")}
        | {"format": kind, **{f"format.{name}": value for name, value in more.items()}}
        for kind, more in {"FFV1": {"bits": "8"}, "animated WebP": {"lossless": True, "quality": 80}, "PNG sequence": {"bits": "16"}}.items()
    ],
    "LoadTransparentVideo": [{"file": "clip.mp4", "channels": "RGBA", "alpha": "auto", "start": 0, "frames": 0}],
    "AddVideoLayer": [
        {"images": Link("image"), "name": "new", "x": 1, "y": 2, "opacity": 0.5, "blend_mode": "normal", "ending": "loop"}
        | {"mask": Link("mask"), "layers": Link("video layers")}
    ],
    "ComposeLayeredVideo": [{"layers": Link("video layers"), "layer": "", "width": 0, "height": 0}],
    "ConceptRegion": [
        {"model": Link("concept model"), "clip": Link("clip"), "prompt": "a cat", "words": "cat", "x": 0, "y": 0, "width": 64, "height": 64}
        | {"concepts": Link("concepts")}
    ],
    "LoRAComposer": [
        {"model": Link("model"), "concepts": Link("concepts"), "latent": Link("latent"), "isolation": True, "reinitialise": True}
        | {"enhancement": 0.0, "layers": "all layers"}
    ],
    "ShapesPrompt": [{"text": "red disc left"}],
    "LayersPrompt": [{"text": "red disc on green"}],
}
assert BASES.keys() == SHORT.keys(), BASES.keys() ^ SHORT.keys()

# What they are given instead: as widgets,
TEXTS = [
    "",
    " ",
    "7",
    "-1",
    "0.5",
    "nan",
    "x",
    "\0",
    "\ud800",
    "é漢🙂",
    "a" * 100_000,
    "9" * 5000,
    "../../x",
    "/",
    "x/",
    "a\nb",
    "C:\\x",
    "x [output]",
]
TEXTS += ["[]", "[1, 2]", "null", '{"a": 1}', "[" * 50_000, '[{"name": 1}]', '[{"x": "a"}]', '[{"x": NaN}]', '[{"x": 1e999, "y": 0, "width": 5}]']
TEXTS += [
    "0, 0, 0, 0",
    "1, 2, 3",
    "-9999, 0, 5, 5",
    "\n".join(["0, 0, 16, 16"] * 60),
    "5-1",
    "0-" + "9" * 30,
    "²",
    "%date%",
    "three.ora",
    "none",
    ".mp4",
]
WIDGETS = [None, True, False, 0, -1, 1.5, math.nan, math.inf, -math.inf, 10**9, 2**70, -(2**70), 1e30, -0.001, *TEXTS]
WIDGETS += [{}, {"a": 1}, {"__value__": [1, 2]}, {"__value__": None}, {"__value__": {}}, [], [1]]


def picture(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def layer(**changed):
    return {"version": 1, "canvas": (16, 16), "layers": [{"image": image[:1], "type": "raster", **changed}]}


def patcher(network):
    return comfy.model_patcher.ModelPatcher(network, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def flux():
    """A picture model with another latent and another text than the good one's."""
    sizes = dict(vec_in_dim=64, context_in_dim=64, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)
    fixed = dict(axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[], in_channels=16, mlp_ratio=4.0)
    new = dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    network = Flux(image_model="flux", out_channels=16, **sizes, **fixed, **new)
    detect = comfy.model_detection.detect_unet_config
    comfy.model_detection.detect_unet_config = lambda *given, **named: (found := detect(*given, **named)) and {**found, **sizes}
    try:
        return comfy.sd.load_diffusion_model_state_dict({key: value * 0 for key, value in network.state_dict().items()})
    finally:
        comfy.model_detection.detect_unet_config = detect


def picture_vae():
    """One of pictures, with 4 channels."""
    return comfy.sd.VAE(sd={key: value * 0 for key, value in TAESD(latent_channels=4).state_dict().items()})


unknown = torch.nn.Module()
unknown.diffusion_model = torch.nn.Linear(1, 1)
# and by links: what nodes may give, and what only a broken one does.
CONSTANTS = {
    f"constant {index}": value for index, value in enumerate([*WIDGETS, b"x", object(), (), (1,), [None], [[]], {"samples": None}, int, len])
}
PICTURES = {
    "no pictures": picture(0, 16, 16, 3),
    "no rows": picture(1, 0, 16, 3),
    "no columns": picture(1, 16, 0, 3),
    "grey": picture(2, 16, 16, 1),
    "two channels": picture(2, 16, 16, 2),
    "rgba": torch.rand(2, 16, 16, 4, generator=torch.Generator().manual_seed(1)),
    "five channels": picture(2, 16, 16, 5),
    "no channels": picture(2, 16, 16, 0),
    "one picture": picture(16, 16, 3),
    "five axes": picture(1, 2, 16, 16, 3),
    "bytes": picture(2, 16, 16, 3, dtype=torch.uint8),
    "booleans": picture(2, 16, 16, 3, dtype=torch.bool),
    "float64": picture(2, 16, 16, 3, dtype=torch.float64),
    "half": picture(2, 16, 16, 3, dtype=torch.float16),
    "bfloat16": picture(2, 16, 16, 3, dtype=torch.bfloat16),
    "complex": picture(2, 16, 16, 3, dtype=torch.complex64),
    "nan picture": picture(2, 16, 16, 3) * math.nan,
    "inf picture": picture(2, 16, 16, 3) + math.inf,
    "beyond 1": picture(2, 16, 16, 3) + 7,
    "one pixel": picture(1, 1, 1, 3),
    "long picture": picture(1, 3, 70, 3),
    "three pictures": picture(3, 17, 19, 3),
    "turned": picture(2, 3, 16, 16).movedim(1, -1),
    "scalar": torch.tensor(1.0),
    "vector": picture(4),
    "flat mask": picture(16, 16),
    "no masks": picture(0, 16, 16),
    "three masks": picture(3, 5, 7),
    "nan mask": picture(1, 16, 16) * math.nan,
    "mask of no size": picture(1, 0, 0),
    "mask of halves": picture(1, 16, 16, dtype=torch.float16),
    "mask with channel": picture(1, 16, 16, 1),
}
LATENTS = {
    **{f"latent of {rank} axes": {"samples": picture(*(1, 16, 1, 16, 16, 2)[:rank])} for rank in range(7)},
    "latent of 4 channels": {"samples": picture(1, 4, 16, 16)},
    "two latents": {"samples": picture(2, 16, 1, 16, 16)},
    "no latents": {"samples": picture(0, 16, 1, 16, 16)},
    "latent without size": {"samples": picture(1, 16, 1, 0, 0)},
    "latent without samples": {"noise_mask": picture(1, 16, 16)},
    "latent of text": {"samples": "x"},
    "nested latent": {"samples": comfy.nested_tensor.NestedTensor([picture(1, 16, 1, 16, 16), picture(1, 8, 20)])},
    "two region latents": {**GOOD["region latent"], "samples": GOOD["region latent"]["samples"].repeat(2, 1, 1, 1, 1)},
    "region latent of another size": {**GOOD["region latent"], "samples": picture(1, 16, 3, 4, 4)},
    "region latent of 4 channels": {**GOOD["region latent"], "samples": GOOD["region latent"]["samples"][:, :4]},
    "nan region latent": {**GOOD["region latent"], "samples": GOOD["region latent"]["samples"] * math.nan},
}
MODELS_AND_PARTS = {
    "patcher of no model": patcher(torch.nn.Linear(1, 1)),
    "patcher of an unknown network": patcher(unknown),
    "plain object": SimpleNamespace(),
    "object with a model": SimpleNamespace(model=SimpleNamespace(diffusion_model=None)),
    "flux": flux(),
    "picture vae": picture_vae(),
    "vae without weights": comfy.sd.VAE(sd={}),
}
CONDITIONINGS = {
    "no conditioning": [],
    "conditioning without extras": [[picture(1, 4, 64)]],
    "conditioning of nothing": [[None, {}]],
    "conditioning with None": [[picture(1, 4, 64), None]],
    "conditioning of numbers": [1, 2],
    "conditioning of another model": [[picture(1, 4, 100), {}]],
    "conditioning of two axes": [[picture(4, 64), {}]],
}
LAYER_DOCUMENTS = {
    "layers of version 2": {"version": 2, "layers": []},
    "no layers": {"version": 1, "canvas": (16, 16), "layers": []},
    "layers None": {"version": 1, "canvas": (16, 16), "layers": None},
    "layers of numbers": {"version": 1, "canvas": (16, 16), "layers": [1]},
    "layers of text": {"version": 1, "canvas": (16, 16), "layers": "abc"},
    **{f"layers on {canvas!r}": {"version": 1, "canvas": canvas, "layers": []} for canvas in ("x", (0, 0), (1, 2, 3), 5, (None, 1), (math.nan, 1))},
    **{
        f"layer with {name} {number}": layer(**{name: value})
        for name, values in {
            "image": [None, 5, "x", picture(16, 16), picture(16, 16, 3), picture(1, 16, 16, 2), picture(0, 16, 16, 3), picture(1, 0, 0, 4)],
            "mask": [5, "x", picture(16, 16), picture(2, 3), picture(1, 1, 16, 16), picture(0, 16, 16), picture(1, 0, 0)],
            "type": ["text", None, 5],
            "x": ["a", math.nan, 2**70, 1.5],
            "w": ["a", math.nan, -5, 10**9],
            "rotation": ["a", math.nan, []],
            "opacity": ["a", None, 7, math.nan],
            "blend_mode": [None, 5, "x", []],
            "visible": ["x", None],
            "name": [5, None, "x" * 10_000, []],
            "z_index": ["a", None, math.nan],
            "tessera": ["x", 5, {"opacity": "x"}],
        }.items()
        for number, value in enumerate(values)
    },
}
LISTS = {"nothing in a list": (), "texts in a list": ("x",), "a list of video layers": list(GOOD["video layers"])}
CLIPS = {
    "video of no frames": InputImpl.VideoFromComponents(Types.VideoComponents(images=picture(0, 16, 16, 3), frame_rate=Fraction(24))),
    "video of rate 0": InputImpl.VideoFromComponents(Types.VideoComponents(images=image, frame_rate=Fraction(0))),
    "video of masks": InputImpl.VideoFromComponents(Types.VideoComponents(images=picture(1, 16, 16), frame_rate=Fraction(24))),
    "video that is no file": InputImpl.VideoFromFile(io.BytesIO(b"nothing")),
    "video that is gone": InputImpl.VideoFromFile("/nowhere/x.mp4"),
}
SOUNDS = {
    "audio without sound": {"sample_rate": 48000},
    "audio without rate": {"waveform": picture(1, 2, 800)},
    **{f"audio of {rank} axes": {"waveform": picture(*(1, 2, 8, 3)[:rank]), "sample_rate": 48000} for rank in (0, 1, 2, 4)},
    **{f"audio of rate {rate!r}": {"waveform": picture(1, 2, 800), "sample_rate": rate} for rate in (0, -1, 1.5, "x", None, math.nan, 10**9)},
    "audio of 9 channels": {"waveform": picture(1, 9, 800), "sample_rate": 48000},
    "audio of no samples": {"waveform": picture(1, 2, 0), "sample_rate": 48000},
    "nan audio": {"waveform": picture(1, 2, 800) * math.nan, "sample_rate": 48000},
    "loud audio": {"waveform": picture(1, 2, 800) + 1e30, "sample_rate": 48000},
}
NEAR = {  # what is nearly of a type, and most likely to pass for it
    **dict.fromkeys(("IMAGE", "MASK"), PICTURES),
    **dict.fromkeys(("MODEL", "CLIP", "VAE", "UPSCALE_MODEL", "TESSERA_PATCH_ADAPTER"), MODELS_AND_PARTS),
    **dict.fromkeys(("TESSERA_CONCEPTS", "TESSERA_VIDEO_LAYERS"), LISTS),
    "LATENT": LATENTS,
    "CONDITIONING": CONDITIONINGS,
    "LAYERS": LAYER_DOCUMENTS,
    "VIDEO": CLIPS,
    "AUDIO": SOUNDS,
}
VALUES = {**GOOD, **CONSTANTS}
for group in NEAR.values():
    VALUES |= group
FAR = 8  # links of quite another type for each input
MISSING = object()
# Mistakes whose answers are known by heart: one beside the input that it is about, before anything runs.
KNOWN = {
    "percents": ("SparseAttention", {"start_percent": 0.95}),
    "blocks": ("SparseAttention", {"dense_blocks": "1-x"}),
    "method": ("SparseAttention", {"method": "magic"}),
    "density": ("SparseAttention", {"density": math.nan}),
    "error": ("SparseAttention", {"method": "tessera", "method.error": 1.5}),
    "error of a method without": ("SparseAttention", {"method": "sparge", "method.similarity": 0.0, "method.error": 0.08}),
    "search": ("SparseAttention", {"method": "tessera", "method.search_every": -1}),
    "range": ("Accelerate", {"min_tokens": -1}),
    "choice": ("Accelerate", {"mode": "reckless"}),
    "window": ("LayerOffload", {"k": 1}),
    "overlap": ("PatchUpscale", {"overlap": 40}),
    "overlap of a report": ("UpscaleReport", {"overlap": 40}),
    "factor": ("PatchUpscaleVideoNetwork", {"size.factor": 1000.0}),
    "size": ("PatchUpscaleVideo", {"size": "huge"}),
    "video": ("PatchUpscaleVideoFile", {"file": "gone.mp4"}),
    "clip": ("LoadTransparentVideo", {"file": "../gone.mp4"}),
    "document": ("LoadLayers", {"file": "gone.psd"}),
    "prefix": ("SaveLayers", {"filename_prefix": "../x"}),
    "alpha": ("SaveTransparentVideo", {"format": "animated WebP", "format.lossless": True, "format.quality": 80, "alpha": "premultiplied"}),
    "edges": ("LayersFromImages", {"clean.low": 0.95}),
    "matte": ("LayersFromImages", {"clean.matte": "dark"}),
    "change": ("EditLayer", {"change": "colour"}),
    "rule": ("AutoLayout", {"layout": MISSING}),
    "socket": ("ComposeLayers", {"layers": "a text"}),
    "boxes": ("RegionLayers", {"boxes": "0, 0, 5"}),
    "boxes outside": ("RegionLayers", {"boxes": "64, 0, 16, 16"}),
    "json": ("Layout", {"boxes": "[1]"}),
    "box": ("ConceptRegion", {"width": 0}),
    "word": ("ShapesPrompt", {"text": "purple"}),
    "caption": ("LayersPrompt", {"text": "red disc on green on blue"}),
}
# The same, and what else only the values of links can be, when the node runs and before it works.
KNOWN_LINKED = {
    "percents": ("SparseAttention", {"start_percent": Link("nearly 1")}),
    "density": ("SparseAttention", {"density": Link("constant 6")}),
    "error": ("SparseAttention", {"method": "tessera", "method.error": Link("constant 6")}),
    "error of a method without": ("SparseAttention", {"method": "draft", "method.error": Link("nearly 1")}),
    "no error of a method without": ("SparseAttention", {"method": "draft", "method.error": 0.0, "method.search_every": 3}),
    "old": ("SparseAttention", {"method": "tessera", "tail": MISSING, "block": MISSING, "mask_refresh": MISSING}),
    "overlap": ("PatchUpscale", {"tile": Link("100"), "overlap": Link("nearly 100")}),
    "mode": ("Accelerate", {"mode": Link("text")}),
    "boxes": ("RegionLayers", {"boxes": Link("text")}),
    "document": ("LoadLayers", {"file": Link("text")}),
    "clip": ("ConceptRegion", {"clip": Link("constant 0")}),
    "nothing": ("ConceptRegion", {"concepts": Link("constant 0")}),
    "model": ("Accelerate", {"model": Link("vae")}),
    "image": ("AddVideoLayer", {"images": Link("two channels")}),
    "mask": ("EditLayer", {"change": "mask", "change.mask": Link("mask with channel")}),
    "whole": ("LayerOffload", {"k": Link("half")}),
    "text": ("EditLayer", {"layer": Link("vae")}),
    "number as text": ("EditLayer", {"layer": Link("constant 4")}),
    "whole number of NumPy": ("EditLayer", {"change.x": Link("NumPy's 3")}),
    "flat mask": ("EditLayer", {"change": "mask", "change.mask": Link("flat mask")}),
    "item": ("ComposeLayers", {"layers": Link("layer with x 0")}),
    "latent": ("LoRAComposer", {"latent": Link("latent of 2 axes")}),
}
VALUES |= {"nearly 1": 0.95, "100": 100, "nearly 100": 90, "half": 2.5, "NumPy's 3": np.int64(3)}


class OvertimeError(Exception):
    pass


def prompt_of(node, inputs):
    """(the prompt, what an input without a link is)."""
    prompt = {"node": {"class_type": f"Tessera{node}", "inputs": {}}, "end": {"class_type": "Sink", "inputs": {"value": ["node", 0]}}}
    for name, value in inputs.items():
        if isinstance(value, Link):
            prompt[f"give {name}"] = {"class_type": "Give", "inputs": {"key": str(value)}}
            value = [f"give {name}", 0]
        if value is not MISSING:
            prompt["node"]["inputs"][name] = copy.deepcopy(value)
    return prompt


def answered(node, inputs):
    """(kind of answer, what is wrong with it or None, the text)."""
    prompt = prompt_of(node, inputs)
    valid, _, outputs, errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    found = [error for report in errors.values() for error in report["errors"]]
    if not valid:
        ours = [error for error in found if error["type"] == "custom_validation_failed"]
        raised = [error for error in found if "exception" in error["type"] and PACKAGE in "".join(error["extra_info"].get("traceback", ()))]
        texts = [error["details"].partition(" - ")[2] for error in ours]
        wrong = "validation raised" if raised else "more than one message" if ours and len(found) > 1 else None
        for text in texts:
            wrong = wrong or fault(text)
        return "refused" if ours or raised else "ComfyUI refused", wrong, "; ".join(error["details"] for error in found)
    server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *given: None)
    server.send_progress_text = lambda *given: None
    cache = {"cache_type": execution.CacheType.NONE, "cache_args": {"lru": 0, "ram": 0, "ram_inactive": 0}}
    executor = execution.PromptExecutor(server, **cache)
    executor.execute(prompt, "id", {}, outputs)
    failed = next((data for event, data in executor.status_messages if event == "execution_error"), None)
    if failed is None:
        return "result", None, ""
    text = failed["exception_message"].strip()
    wrong = fault(text)
    last = failed["traceback"][-1]
    if PACKAGE not in last or "raise" not in last:
        wrong = wrong or f"not said by this pack: {last.strip()}"
    elif failed["exception_type"] != "ValueError" and not failed["exception_type"].startswith("tessera."):
        wrong = wrong or failed["exception_type"]
    return "error", wrong, text


def fault(text):
    if "\n" in text:
        return "several lines"
    if len(text) > LONGEST or not text:
        return f"{len(text)} characters"
    word = PYTHON.search(text)
    return word and f"Python's {word[0]!r}"


def cases():
    """Every node, every input of it, every wrong widget, and links of nearly its type and of some others: (node, inputs, the input's name)."""
    out = []
    for node, bases in BASES.items():
        for base in bases:
            types = schema(node, base)
            for name in base:
                near = {**CONSTANTS, **NEAR.get(types[name], {})}
                far = random.Random(f"{SEED} {node} {name}").sample([key for key in VALUES if key not in near], FAR)
                out += [(node, {**base, name: value}, name) for value in [MISSING, *WIDGETS, *map(Link, [*near, *far])]]
            out += [(node, {**base, "extra": 5}, "extra"), (node, base, "")]
    return out


def schema(node, inputs):
    """The types of the inputs, by name."""
    found = _io.get_finalized_class_inputs(SHORT[node].INPUT_TYPES(), inputs)[0]
    return {name: kind for part in ("required", "optional") for name, (kind, *_) in found[part].items()}


def known():
    """[input, what is said beside it] of each queued mistake, and what is said when a link holds it."""
    for case, (node, changed) in KNOWN.items():
        errors = asyncio.run(execution.validate_prompt("id", prompt_of(node, {**BASES[node][0], **changed}), None))[3].get("node", {"errors": []})
        emit(case, said=[[error["extra_info"].get("input_name"), error["details"]] for error in errors["errors"]])
    for case, (node, changed) in KNOWN_LINKED.items():
        kind, wrong, text = answered(node, {**BASES[node][0], **changed})
        emit(f"linked {case}", kind=kind, wrong=wrong, text=text)


def main():
    every = [case for case in cases() if NODE in ("", case[0])]
    drawn = random.Random(SEED).sample(every, min(int(COUNT), len(every))) if int(COUNT) else every
    counts, leaks = {}, 0
    signal.signal(signal.SIGALRM, lambda *given: (_ for _ in ()).throw(OvertimeError()))
    for node, inputs, name in drawn:
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                kind, wrong, text = answered(node, inputs)
        except OvertimeError:
            kind, wrong, text = "overtime", f"more than {SECONDS} s", ""
        except Exception:  # not by ComfyUI's own paths
            kind, wrong, text = "escaped", "an exception out of ComfyUI", traceback.format_exc()
        finally:
            signal.alarm(0)
        counts[kind] = counts.get(kind, 0) + 1
        if wrong:
            leaks += 1
            value = inputs.get(name)
            emit(
                "leak",
                node=node,
                input=name,
                value="missing" if value is MISSING else f"{type(value).__name__} {value!r:.60}",
                kind=kind,
                wrong=wrong,
                text=text[:400],
            )
    emit("counts", prompts=len(drawn), possible=len(every), leaks=leaks, **counts)


def emit(case, **values):
    print("RESULT " + json.dumps({"case": case, **values}), flush=True)


known()
main()
