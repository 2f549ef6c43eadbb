"""Layers from Images, Compose, Edit, Save and Load: documents of core's LAYERS type, on every supported version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...models.layers.blend import MODES
from ...models.layers.clean import Cleaning, colour, stacked
from ...models.layers.compose import composite, on_checkerboard, thumbnails
from ...models.layers.document import MAX_SIDE, Document, Layer, clean_name, from_core, rgba, to_core
from ...models.layers.formats import EXTENSIONS, FORMATS, either, read, write
from ...models.layers.layout import chosen, restacked
from ..comfy import Kind, check_prefix, custom, input_path, numbered, progress, said, saved_file

CATEGORY = "Tessera/layers"
# io.Layers is newer than our oldest ComfyUI.
Layers = custom(
    "LAYERS",
    Kind(lambda value: isinstance(value, Mapping) and "layers" in value, "layers", "connect Layers from Images, Load Layers or Add Layer"),
)
ORDERS = ("first is lowest", "first is top")
FIRST = ("a layer", "left out", "hidden")  # what the first picture of a batch is; the last two: the merged picture
BACKGROUNDS = {"transparent": None, "white": 1.0, "grey": 0.5, "black": 0.0}
SHOWN = 63  # layers that a node shows beside the composite: Region Layers' 50 and some, in a grid of 8 x 8


def all_layers(document: Document) -> list[Layer]:
    return [layer for _, layer in document.walk()]


def summary(document: Document) -> str:
    return f"{len(all_layers(document))} layers, {document.width} x {document.height}"


def shown(cls: Any, document: Document, layers: Sequence[Layer], lines: Sequence[str]) -> dict[str, Any]:
    """The lines on the running node `cls`; for its `ui` they too, and thumbnails of the document and of these layers of it."""
    return _pictures(cls, document, layers) | said(cls, "\n".join([*lines, *_not_shown(layers)]))


def _pictures(cls: Any, document: Document, layers: Sequence[Layer], picture: Tensor | None = None) -> dict[str, Any]:
    """picture: the composite `(height, width, 4)`, where it is made anyway; shown as large as it is, instead of its thumbnail."""
    small = thumbnails(document, layers[:SHOWN], on_layer=progress())
    whole = small[:1] if picture is None else on_checkerboard(picture)[None]
    batches = [whole, small[1:]] if layers else [whole]
    return {"images": [image for batch in batches for image in ui.PreviewImage(batch, cls=cls).values]}


def _not_shown(layers: Sequence[Layer]) -> list[str]:
    return [f"the pictures are of the first {SHOWN} layers"] if len(layers) > SHOWN else []


def _side(name: str, what: str) -> Any:
    return io.Int.Input(name, default=0, min=0, max=MAX_SIDE, tooltip=what)


def _cleaning(clean: dict[str, Any]) -> Cleaning | None:
    if clean["clean"] == "off":
        return None
    return Cleaning(colour(clean["matte"]), clean["low"], clean["high"], clean["specks"], clean["bleed"])


class LayersFromImages(io.ComfyNode):
    checks = (_cleaning,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        def pixels(name: str, default: int, high: int, what: str) -> Any:
            return io.Int.Input(name, default=default, min=0, max=high, tooltip=what)

        def alpha(name: str, default: float, what: str) -> Any:
            return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=what)

        edges = [
            io.String.Input(
                "matte",
                default="none",
                tooltip="The colour that shows through at the edges, taken out of them: black for premultiplied pictures, white, grey, #336699 ...",
            ),
            alpha("low", 0.05, "Alpha up to this becomes 0: no haze where nothing should be, and tighter boxes."),
            alpha("high", 0.95, "Alpha from this on becomes 1: no pinholes in what should be solid."),
            pixels("specks", 16, 1_000_000, "Connected pixels fewer than this are removed. 0: none."),
            pixels("bleed", 2, 256, "How many pixels outwards solid colours replace those of soft edges and of transparent pixels. 0: not at all."),
        ]
        return io.Schema(
            node_id="TesseraLayersFromImages",
            display_name="Layers from Images",
            category=CATEGORY,
            description="Makes layers of a batch of pictures, such as Qwen-Image-Layered's: names, cleans, orders and trims them.",
            search_aliases=["layer", "rgba", "qwen image layered", "layerdiffuse", "layer stack", "defringe", "unpremultiply", "alpha bleed"],
            inputs=[
                io.Image.Input("image", tooltip="A picture or a batch, RGB or RGBA (straight alpha). Each becomes a layer."),
                io.Mask.Input("mask", optional=True, tooltip="One for all or one each: 1 where the layer is transparent, as Load Image gives it."),
                Layers.Input("layers", optional=True, tooltip="Layers below the new ones."),
                io.String.Input("names", default="", multiline=True, tooltip="One name a line, in the pictures' order. Missing ones are numbered."),
                io.Boolean.Input(
                    "trim", default=True, tooltip="Cut each layer to the pixels that are not fully transparent. It stays where it was on the canvas."
                ),
                _side("width", "Of the canvas, in pixels. 0: that of the layers below, or of the pictures."),
                _side("height", "Of the canvas, in pixels. 0: that of the layers below, or of the pictures."),
                # Workflows from before these had been added lack them.
                io.Combo.Input(
                    "first",
                    options=list(FIRST),
                    default=FIRST[0],
                    optional=True,
                    tooltip="What the first picture is. Qwen-Image-Layered's is the merged picture: leave it out, or keep it hidden.",
                ),
                io.Combo.Input("order", options=list(ORDERS), default=ORDERS[0], optional=True, tooltip="In which the pictures are stacked."),
                io.Combo.Input(
                    "mask_means",
                    options=["transparent", "opaque"],
                    default="transparent",
                    optional=True,
                    tooltip="What 1 in the mask means. opaque: for decoders that give alpha itself as the mask, such as Layer Diffuse Decode.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Pixels with alpha up to this count as nothing there when layers are trimmed or dropped.",
                ),
                io.Boolean.Input("drop_empty", default=False, optional=True, tooltip="Leave out layers with nothing in them; the node says which."),
                io.DynamicCombo.Input(
                    "clean",
                    options=[io.DynamicCombo.Option("off", []), io.DynamicCombo.Option("edges", edges)],
                    optional=True,
                    tooltip="edges: repair alpha and the colours of edges. A mask becomes part of the picture then.",
                ),
            ],
            outputs=[Layers.Output(display_name="layers")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        names: str,
        trim: bool,
        width: int,
        height: int,
        mask: Tensor | None = None,
        layers: Any = None,
        first: str = FIRST[0],
        order: str = ORDERS[0],
        mask_means: str = "transparent",
        threshold: float = 0.0,
        drop_empty: bool = False,
        clean: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        below = None if layers is None else from_core(layers)
        if mask is not None and len(mask) not in (1, len(image)):
            raise ValueError(f"mask has {len(mask)} pictures and image {len(image)}; give one for all, or one each")
        item: dict[str, Any] = {"image": image, "mask": 1 - mask if mask is not None and mask_means == "opaque" else mask, "z_index": 0}
        made = from_core({"version": 1, "canvas": (image.shape[2], image.shape[1]), "layers": [item]})
        new, notes = stacked(
            [layer for _, layer in made.walk()],
            [clean_name(line) for line in names.rstrip().splitlines()],
            merged=first,
            top_first=order == ORDERS[1],
            cleaning=None if clean is None else _cleaning(clean),
            trim=trim,
            threshold=threshold,
            drop_empty=drop_empty,
            numbered_from=1 + (0 if below is None else sum(1 for _ in below.walk())),
        )
        canvas = below or made
        document = Document(width or canvas.width, height or canvas.height, (*(below.layers if below else ()), *new))
        return io.NodeOutput(to_core(document), ui=shown(cls, document, new, [summary(document), *notes]))


class ComposeLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraComposeLayers",
            display_name="Compose Layers",
            category=CATEGORY,
            description="Flattens layers into one picture as Photoshop and Krita do, with all their blend modes, groups and masks.",
            search_aliases=["flatten", "merge layers", "composite", "blend modes"],
            inputs=[
                Layers.Input("layers", tooltip="From Layers from Images, Load Layers, or core's Add Layer."),
                io.Combo.Input(
                    "light",
                    options=["sRGB", "linear"],
                    default="sRGB",
                    tooltip="sRGB: on the stored values, as Photoshop and Krita do. linear: as light adds up; soft edges and modes look different.",
                ),
                io.Combo.Input("background", options=list(BACKGROUNDS), default="transparent", tooltip="What lies under everything."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="RGBA with straight alpha; RGB where nothing is transparent."),
                io.Mask.Output(display_name="mask", tooltip="1 where the picture is transparent."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, layers: Any, light: str, background: str) -> io.NodeOutput:
        document = from_core(layers)
        line, level = summary(document), BACKGROUNDS[background]
        if level is not None:
            paper = Layer("background", rgba(torch.full((document.height, document.width, 1), level)))
            document = replace(document, layers=(paper, *document.layers))
        # On the CPU: a canvas need not fit beside the models.
        picture = composite(document, linear=light == "linear", on_layer=progress())[None].to(mm.intermediate_device())
        opaque = bool((picture[..., 3] > 1 - 1e-4).all())
        preview = ui.PreviewImage(on_checkerboard(picture[0])[None], cls=cls).as_dict()
        return io.NodeOutput(picture[..., :3] if opaque else picture, 1 - picture[..., 3], ui=preview | said(cls, line))


class EditLayer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def whole(name: str, default: int, low: int, what: str) -> Any:
            return io.Int.Input(name, default=default, min=low, max=MAX_SIDE, tooltip=what)

        options = [
            io.DynamicCombo.Option("position", [whole("x", 0, -MAX_SIDE, "Left edge, in pixels."), whole("y", 0, -MAX_SIDE, "Upper edge.")]),
            io.DynamicCombo.Option("size", [_side("width", "In pixels; 0: its own."), _side("height", "In pixels; 0: its own.")]),
            io.DynamicCombo.Option(
                "turn",
                [
                    io.Float.Input("degrees", default=0.0, min=-360.0, max=360.0, step=1.0, tooltip="Clockwise, about its centre."),
                    io.Boolean.Input("flip_h", default=False, tooltip="Left and right change places."),
                    io.Boolean.Input("flip_v", default=False, tooltip="Top and bottom change places."),
                ],
            ),
            io.DynamicCombo.Option(
                "opacity", [io.Float.Input("opacity", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="1 hides what is below.")]
            ),
            io.DynamicCombo.Option("blend mode", [io.Combo.Input("blend_mode", options=list(MODES), tooltip="How it mixes with what is below.")]),
            io.DynamicCombo.Option("visibility", [io.Boolean.Input("visible", default=True, tooltip="Whether it shows.")]),
            io.DynamicCombo.Option("name", [io.String.Input("name", default="", tooltip="The new name.")]),
            io.DynamicCombo.Option("order", [whole("position", -1, -MAX_SIDE, "1 is the lowest in its group, -1 the uppermost.")]),
            io.DynamicCombo.Option("mask", [io.Mask.Input("mask", tooltip="1 where the layer is transparent; of any size. Replaces its mask.")]),
        ]
        return io.Schema(
            node_id="TesseraEditLayer",
            display_name="Edit Layer",
            category=CATEGORY,
            description="Changes one property of a layer, or of all layers of a name. Chain several for several properties.",
            search_aliases=["layer opacity", "layer position", "blend mode", "rename layer"],
            inputs=[
                Layers.Input("layers", tooltip="Any layers; those that are not meant stay as they are."),
                io.String.Input("layer", default="1", tooltip="A name, or a number from the bottom: 1 is the lowest, -1 the uppermost."),
                io.DynamicCombo.Input("change", options=options, tooltip="Which property."),
            ],
            outputs=[Layers.Output(display_name="layers")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, layers: Any, layer: str, change: dict[str, Any]) -> io.NodeOutput:
        document = from_core(layers)
        found = chosen(document, str(layer))
        if change["change"] == "order":
            for one in found:
                document = replace(document, layers=restacked(document.layers, one, change["position"]))
            edited = found
        else:
            edited = [_changed(one, change) for one in found]
            document = document.map(lambda one: next((new for old, new in zip(found, edited, strict=True) if one is old), one))
        line = f"{change['change']} of {edited[0].name!r}" + (f", {len(edited)} layers" if len(edited) > 1 else "")
        return io.NodeOutput(to_core(document), ui=shown(cls, document, edited, [line]))


def _changed(layer: Layer, change: dict[str, Any]) -> Layer:
    kind, new = change["change"], {key: value for key, value in change.items() if key != "change"}
    if kind == "size":
        return replace(layer, transform=replace(layer.transform, **new))
    if kind == "turn":
        turn = math.radians(new.pop("degrees"))
        return replace(layer, transform=replace(layer.transform, rotation=turn, **new))
    if kind == "mask":
        item = {"image": layer.image[None], "mask": new["mask"][:1], "z_index": 0}
        return replace(layer, mask=next(from_core({"layers": [item]}).walk())[1].mask)
    if kind == "name":
        return replace(layer, name=clean_name(new["name"]))
    return replace(layer, **new)


class SaveLayers(io.ComfyNode):
    checks = (check_prefix,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraSaveLayers",
            display_name="Save Layers",
            category=CATEGORY,
            description="Saves layers to a file that Photoshop, GIMP or Krita opens: names, groups, masks, opacity and blend modes stay editable.",
            search_aliases=["psd", "ora", "openraster", "photoshop", "krita", "export layers"],
            is_output_node=True,
            inputs=[
                Layers.Input("layers", tooltip="From Layers from Images, Layout, Load Layers, or core's Add Layer."),
                io.String.Input("filename_prefix", default="layers/Tessera", tooltip="In the output folder; a number is added."),
                io.Combo.Input("format", options=list(FORMATS), tooltip=" ".join(f"{name}: {kind.title}." for name, kind in FORMATS.items())),
            ],
            outputs=[Layers.Output(display_name="layers", tooltip="The layers, unchanged.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, layers: Any, filename_prefix: str, format: str) -> io.NodeOutput:
        document = from_core(layers)
        folder, name, counter, subfolder = numbered(filename_prefix, document.width, document.height)
        target = folder / f"{name}_{counter:05}_{FORMATS[format].suffix}"
        picture, layers_of_it = composite(document, on_layer=progress()), all_layers(document)
        pictures = _pictures(cls, document, layers_of_it, picture)
        write(document, target, picture, progress(), format)  # last: what fails or is stopped leaves no file
        lines = [f"{target.name} in {subfolder or 'the output folder'}", *_not_shown(layers_of_it)]
        return io.NodeOutput(layers, ui=pictures | said(cls, "\n".join(lines)) | {"tessera_files": (saved_file(target, subfolder),)})


def _input_file(file: str) -> Path:
    path = input_path(file)
    if path is None or not path.is_file() or path.suffix.lower() not in EXTENSIONS:
        raise ValueError(f"file is {file!r:.200}, which is no {either(EXTENSIONS)} in the input folder; put it there, and refresh the list (R)")
    return path


class LoadLayers(io.ComfyNode):
    checks = (_input_file,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = Path(folder_paths.get_input_directory())
        found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS)
        kinds = " or ".join(f"{kind.title} ({', '.join(kind.extensions)})" for kind in FORMATS.values() if kind.suffix)
        return io.Schema(
            node_id="TesseraLoadLayers",
            display_name="Load Layers",
            category=CATEGORY,
            description=f"Reads the layers of a {kinds} file from the input folder.",
            search_aliases=["psd", "ora", "openraster", "import layers", "open photoshop"],
            inputs=[io.Combo.Input("file", options=found, tooltip=f"A {either(EXTENSIONS)} file in ComfyUI's input folder or below it.")],
            outputs=[
                Layers.Output(display_name="layers"),
                io.String.Output(display_name="report", tooltip="What of the file is not kept or looks different, a line each."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> Any:
        if not isinstance(file, str):
            return "unknown"  # linked
        try:
            state = _input_file(file).stat()
        except (OSError, ValueError):
            return "unknown"  # gone: the run says so
        return f"{state.st_mtime_ns} {state.st_size}"

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        document, notes = read(_input_file(file))
        pictures = shown(cls, document, all_layers(document), [summary(document), *notes])
        return io.NodeOutput(to_core(document), "\n".join(notes), ui=pictures)
