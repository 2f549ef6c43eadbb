"""The layer document: ComfyUI's LAYERS in and out, what is refused, automatic layout."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_layers_blend import flat, levels

from tessera.models.layers import document as module
from tessera.models.layers.document import Document, Group, Layer, Transform, clean_name, from_core, rgba, to_core
from tessera.models.layers.layout import arranged, chosen, from_caption, from_json, from_masks, golden, grid, place, restacked, trimmed


def document() -> Document:
    """Everything that a document can hold, on an odd canvas."""
    inner = Group("heads", (Layer("hidden", levels(3, 3, 4), 5, 5, 1.0, "hue", False), Layer("twin", levels(2, 5, 4))), 102 / 255, "normal")
    first = Group(
        "people 😀", (Layer("é/..\\x 😀", levels(17, 21, 4), 50, -3, 128 / 255, "multiply", True, levels(17, 21)), inner), 51 / 255, "screen"
    )
    second = Group("people 😀", (Layer("twin", levels(9, 9, 4), 20, 20, 51 / 255, "soft-light", mask=levels(9, 9)),), visible=False)
    return Document(61, 47, (Layer("ground", levels(47, 61, 4)), first, second, Layer("far out", levels(4, 4, 4), -100, 900, 1.0, "darker-color")))


def same(a: Document, b: Document, opacity: float = 1e-9) -> None:
    """Every property and every pixel."""
    assert (a.width, a.height) == (b.width, b.height)
    for (around_a, one), (around_b, two) in zip(a.walk(), b.walk(), strict=True):
        for x, y in zip((*around_a, one), (*around_b, two), strict=True):
            assert (x.name, x.blend_mode, x.visible) == (y.name, y.blend_mode, y.visible)
            assert abs(x.opacity - y.opacity) <= opacity
        assert (one.x, one.y, one.size, one.transform.rotation) == (two.x, two.y, two.size, two.transform.rotation)
        assert (one.transform.flip_h, one.transform.flip_v) == (two.transform.flip_h, two.transform.flip_v)
        assert torch.equal(one.image, two.image)
        assert (one.mask is None) == (two.mask is None) and (one.mask is None or torch.equal(one.mask, two.mask))


def test_layers_travel_through_comfyui_and_back():
    before = document()
    wire = to_core(before)
    modes = {item["blend_mode"] for item in wire["layers"]}
    assert modes <= {"normal", "multiply", "hue", "soft-light", "darken"}, "core refuses the modes that it does not know"
    assert [item["visible"] for item in wire["layers"]] == [True, True, False, True, False, True]
    assert wire["layers"][1]["opacity"] == pytest.approx(51 / 255 * 128 / 255)
    after = from_core(wire)
    assert torch.allclose(1 - wire["layers"][1]["mask"][0], after.layers[1].layers[0].mask)
    same(before, after)
    assert isinstance(after.layers[2], Group) and not after.layers[2].visible, "two groups of one name stay two"


def test_documents_share_their_pixels():
    """Through ComfyUI and back, and in every changed copy; a picture is searched for odd numbers once."""
    before = document()
    for (_, one), (_, two) in zip(before.walk(), from_core(to_core(from_core(to_core(before)))).walk(), strict=True):
        assert two.image is one.image and two.mask is one.mask
    picture = torch.rand(4, 4, 4)
    assert rgba(picture) is picture
    assert from_core({"layers": [{"image": picture[None]}]}).layers[0].image.data_ptr() == picture.data_ptr()
    assert torch.equal(rgba(2 * picture - 1), (2 * picture - 1).clamp(0, 1)) and torch.equal(rgba(picture.double()), picture)


def test_a_changed_copy_is_not_searched_again(monkeypatch):
    layer = Layer("a", torch.rand(4, 4, 4), mask=torch.rand(4, 4))
    searched: list[torch.Tensor] = []
    monkeypatch.setattr(module, "_finite", lambda x: searched.append(x) or True)
    moved = from_core(to_core(Document(4, 4, (replace(layer, x=3),)))).layers[0]
    assert moved.x == 3 and searched == []
    mask = torch.rand(4, 4)
    replace(moved, mask=mask)
    assert len(searched) == 1 and searched[0] is mask


def test_what_another_node_changed_is_taken():
    (item,) = to_core(Document(4, 4, (Layer("a", torch.rand(4, 4, 4), mask=torch.rand(4, 4)),)))["layers"]
    picture, mask = torch.rand(1, 6, 5, 3), torch.full((1, 4, 4), 0.25)
    other = from_core({"layers": [item | {"image": picture}]}).layers[0]
    assert torch.equal(other.image[..., :3], picture[0]) and other.mask.shape == (6, 5)
    assert torch.equal(from_core({"layers": [item | {"mask": mask}]}).layers[0].mask, 1 - mask[0])
    assert from_core({"layers": [item | {"mask": None}]}).layers[0].mask is None


def test_what_core_makes_is_read_as_core_reads_it():
    """comfy_extras/nodes_compositor.py: stable order by z_index, batches expand, masks are 1 where transparent, radians, w and h from 0."""
    image = torch.rand(2, 6, 8, 3)
    items = [
        {"image": image, "type": "raster", "x": 1, "y": 2, "z_index": 5, "name": "pair", "mask": torch.full((1, 3, 4), 0.25)},
        {"image": torch.rand(1, 4, 4, 4), "type": "raster", "z_index": -1, "w": 12, "rotation": math.pi / 4, "flip_h": True, "opacity": 0.5},
    ]
    read = from_core({"version": 1, "layers": items})
    first, second, third = (layer for _, layer in read.walk())
    assert (first.size, first.transform.rotation, first.transform.flip_h, first.opacity) == ((12, 4), math.pi / 4, True, 0.5)
    assert torch.equal(second.image[..., :3], image[0]) and torch.equal(third.image[..., :3], image[1])
    assert second.image[..., 3].min() == 1 and torch.equal(second.mask, torch.full((6, 8), 0.75))
    assert (second.name, third.name, second.x, second.y) == ("pair 1", "pair 2", 1, 2)
    assert (read.width, read.height) == (12, 8), "as far as the layers reach"


def nested(depth: int) -> Group:
    group = Group("g")
    for _ in range(depth - 1):
        group = Group("g", (group,))
    return group


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layer("a", torch.rand(0, 5, 4)), r"layer 'a' has an image \(0, 5, 4\)"),
        (lambda: Layer("a", torch.rand(5, 5, 3)), r"give float32 \(height, width, 4\)"),
        (lambda: Layer("a", torch.rand(5, 5, 4).double()), "float64"),
        (lambda: Layer("a", torch.full((2, 2, 4), float("nan"))), "not finite"),
        (lambda: Layer("a", torch.rand(5, 5, 4), mask=torch.rand(4, 5)), r"mask \(4, 5\).*\(5, 5\)"),
        (lambda: Layer("a", torch.rand(5, 5, 4), opacity=1.5), "opacity 1.5; use 0 to 1"),
        (lambda: Layer("a", torch.rand(5, 5, 4), opacity=float("nan")), "opacity nan"),
        (lambda: Layer("a", torch.rand(5, 5, 4), blend_mode="glow"), "blend mode 'glow'; use one of normal"),
        (lambda: Layer("a\0", torch.rand(5, 5, 4)), "control characters"),
        (lambda: Layer("a\ufffe", torch.rand(5, 5, 4)), "control characters"),
        (lambda: Layer("a" * 256, torch.rand(5, 5, 4)), "too long"),
        (lambda: Layer("a", torch.full((2, 2, 4), float("inf"))), "not finite"),
        (lambda: Layer("a", torch.rand(5, 5, 4), x=2**20 + 1), "'a' lies at 1048577, 0; use whole pixels, 1048576 at most"),
        (lambda: Layer("a", torch.rand(5, 5, 4), y=-(10**400)), "'a' lies at 0, -1000.{,40}; use"),
        (lambda: Layer("a", torch.rand(5, 5, 4), x=0.5), r"'a' lies at 0\.5, 0; use whole pixels"),
        (lambda: Layer("a", torch.rand(5, 5, 4), visible="no"), "'a' has visible 'no'; use true or false"),
        (lambda: Layer("a", torch.rand(5, 5, 4), transform=Transform(-1)), "use sizes of 0 to"),
        (lambda: Layer("a", torch.rand(5, 5, 4), transform=Transform(height=2**21)), "use sizes of 0 to 1048576 whole pixels"),
        (lambda: Layer("a", torch.rand(5, 5, 4), transform=Transform(rotation=float("nan"))), "a finite rotation"),
        (lambda: Layer("a", torch.rand(5, 5, 4), transform=Transform(30_000, 30_000)), "shown at 30000 x 30000"),
        (lambda: Layer("a", torch.rand(5, 5, 4), transform=Transform(30_000, 1, math.pi / 4)), "shown at 2121[45] x 2121[45]"),
        (lambda: nested(101), "group 'g' holds groups in groups, 101 deep; use at most 100"),
        (lambda: Group("a", blend_mode="glow"), "group 'a' has blend mode 'glow'"),
        (lambda: Document(0, 5), "canvas is 0 x 5"),
        (lambda: Document(5, 30_001), "canvas is 5 x 30001"),
        (lambda: Document(8.5, 5), r"canvas is 8\.5 x 5; use 1 to 30000 whole pixels"),
        (lambda: rgba(torch.rand(5, 5, 2)), "use 1, 3 or 4 channels"),
        (lambda: from_core([]), "not a LAYERS document"),
        (lambda: from_core({"version": 2, "layers": []}), "not a LAYERS document of version 1"),
        (lambda: from_core({"layers": [{"type": "vector"}]}), "type 'vector'"),
        (lambda: from_core({"layers": [{"image": torch.rand(1, 2, 2, 4), "name": "a", "x": float("nan")}]}), "an item 'a' with x nan; use"),
        (lambda: Layer(7, torch.rand(5, 5, 4)), "a layer has 7 as its name; use text"),
        (lambda: Layer("a", [[1.0]]), "layer 'a' has no picture"),
        (lambda: Layer("a", torch.rand(5, 5, 4), mask=0.5), "something else as its mask"),
        (lambda: Layer("a", torch.rand(5, 5, 4), opacity="0.5"), "opacity '0.5'; use 0 to 1"),
        (lambda: Layer("a", torch.rand(5, 5, 4), opacity=10**400), "opacity 1000.*; use 0 to 1"),
        (lambda: Layer("a", torch.rand(5, 5, 4), blend_mode=torch.rand(9, 9)), "blend mode tensor.*; use one of normal"),
        (lambda: Layer("a", torch.rand(5, 5, 4), transform=Transform(rotation="1")), "turned by '1'; use sizes of .*a finite rotation"),
        (lambda: from_core({"layers": [{"type": torch.rand(9, 9)}]}), "type tensor"),
        (lambda: from_core({"layers": 7}), "^layers has items that are no layers; connect Layers from Images"),
        (lambda: from_core({"layers": ["a"]}), "^layers has items that are no layers; connect Layers from Images"),
        (lambda: from_core({"layers": [{"image": 7}]}), r"an item without a name with the image 7; use one of \(batch, height, width, channels\)"),
        (lambda: from_core({"layers": [{"image": torch.rand(1, 2, 2, 4), "x": "3"}]}), "an item without a name with x '3'; use a number"),
        (lambda: from_core({"layers": [{"image": torch.rand(1, 2, 2, 4), "z_index": "3"}, {"z_index": 1}]}), "with z_index '3'; use a number"),
        (lambda: from_core({"layers": [{"image": torch.rand(1, 2, 2, 4), "mask": True}]}), r"the mask True; use one of \(batch, height, width\)"),
        (lambda: from_core({"layers": [], "canvas": 7}), "^layers has the canvas 7; use a width and a height in pixels"),
        (lambda: place(Layer("a", torch.rand(5, 5, 4)), (0, 0, 0, 7)), "the box of layer 'a' is 0 x 7"),
        (lambda: grid(9, 20, 20, gap=10), "do not fit 20 x 20"),
        (lambda: golden(30, 20, 20), "30 golden sections do not fit"),
        (lambda: from_masks(torch.zeros(1, 4, 4)), "mask 1 has nothing above 0.5"),
        (lambda: from_json("[" * 100_000, 8, 8), "boxes is JSON with too long a number, or nested too deep; write a list"),
        (
            lambda: from_json(f'[{{"x": {"9" * 4000}, "y": 0, "width": 1, "height": 1}}]', 8, 8),
            "box 1 has x 9{60}, which is more than 1048576 pixels",
        ),
        (lambda: from_json('[{"x": 0, "y": 0, "width": 1e308, "height": 1}]', 8, 8), r"has width 1e\+308, which is more"),
        (lambda: from_json(f'[{{"name": "{"n" * 999}", "x": 0, "y": 0, "width": 0, "height": 1}}]', 8, 8), "box 1 'n{40}' has no area"),
        (lambda: chosen(document(), "dog"), r"layer is 'dog'.*1 'ground', 2 "),
        (lambda: chosen(document(), "7"), "none of that name or number"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_names_are_cleaned_of_what_no_file_holds():
    assert clean_name(" a\nb\0😀" + "x" * 400) == "a b 😀" + "x" * 250
    assert clean_name("a\uffffb\ufffe\ud800") == "a b"


@pytest.mark.parametrize("count", [0, 1, 2, 7, 50, 200])
def test_grids_are_equal_cells_that_do_not_overlap(count):
    boxes = grid(count, 641, 427, gap=3)
    assert len(boxes) == count
    taken = torch.zeros(427, 641)
    for x, y, width, height in boxes:
        assert x >= 3 and y >= 3 and x + width <= 638 and y + height <= 424
        taken[y : y + height, x : x + width] += 1
    assert taken.max() <= 1
    sizes = {box[2:] for box in boxes}
    assert all(abs(a - c) <= 1 and abs(b - d) <= 1 for a, b in sizes for c, d in sizes)


def test_golden_sections_cover_the_canvas_in_the_golden_ratio():
    boxes = golden(6, 1618, 1000)
    assert boxes[:4] == [(0, 0, 1000, 1000), (1000, 0, 618, 618), (1236, 618, 382, 382), (1000, 764, 236, 236)], "squares that wind inwards"
    taken = torch.zeros(1000, 1618)
    for x, y, width, height in boxes:
        taken[y : y + height, x : x + width] += 1
    assert torch.equal(taken, torch.ones(1000, 1618))
    areas = [width * height for _, _, width, height in boxes[:-1]]
    for larger, smaller in itertools.pairwise(areas):
        assert larger / smaller == pytest.approx(((1 + 5**0.5) / 2) ** 2, rel=0.02)


def test_boxes_from_masks_are_their_bounds():
    masks = torch.zeros(2, 20, 30)
    masks[0, 3:9, 4:15] = 1
    masks[1, 19, 29] = 0.6
    assert from_masks(masks) == [(4, 3, 11, 6), (29, 19, 1, 1)]
    assert from_masks(masks, (60, 40)) == [(8, 6, 22, 12), (58, 38, 2, 2)]


def test_fits():
    layer = Layer("a", torch.rand(10, 20, 4), transform=Transform(rotation=1.0))
    assert place(layer, (100, 50, 40, 40)).bounds == (100, 60, 40, 20)
    assert place(layer, (100, 50, 40, 40), "cover").bounds == (80, 50, 80, 40)
    assert place(layer, (100, 50, 40, 40), "stretch").bounds == (100, 50, 40, 40)


def test_overlapping_and_missing_boxes():
    before = document()
    after, notes = arranged(before, [(0, 0, 9, 9)] * 4 + [(-5, 200, 9, 9)], "stretch", background=True)
    layers = [layer for _, layer in after.walk()]
    assert [layer.bounds for layer in layers] == [(0, 0, 61, 47), *[(0, 0, 9, 9)] * 4, (-5, 200, 9, 9)] and not notes
    _, notes = arranged(before, [(0, 0, 9, 9)] * 5)
    assert notes == ["far out: there is no box for it"]


def test_two_hundred_layers_in_a_grid():
    many = Document(640, 400, tuple(Layer(f"{i}", flat((i / 200, 0, 0, 1))) for i in range(200)))
    after, _ = arranged(many, grid(200, 640, 400), "stretch")
    assert len({layer.bounds for layer in after.layers}) == 200


def test_captions_place_layers():
    names = ("mountains", "dog", "small bird", "old tree", "cup")
    picture = Document(600, 300, tuple(Layer(name, torch.rand(10, 10, 4)) for name in reversed(names)))
    caption = "A big dog on the left, a small bird top right; mountains in the background and an old tree in the foreground at the bottom."
    after, notes = from_caption(caption, picture, "stretch")
    where = {layer.name: layer.bounds for _, layer in after.walk()}
    assert where["mountains"] == (0, -150, 600, 600), "covers the canvas"
    assert where["dog"] == (0, 50, 400, 200)
    assert where["small bird"] == (400, 0, 200, 100)
    assert where["old tree"] == (200, 200, 200, 100)
    assert notes == ["cup: the caption does not say where"] and where["cup"] == (0, 0, 10, 10)
    assert [layer.name for layer in after.layers] == ["mountains", "cup", "small bird", "dog", "old tree"]


@pytest.mark.parametrize(
    ("caption", "places"),
    [
        ("a cat left of the dog, a dog on the right", {"cat": 100, "dog": 500}),
        ("a cat left of the dog", {"cat": 100, "dog": None}),
        ("on the left, a dog on the right", {"dog": 500}),
        ("a dog. The dog is on the right", {"dog": 500}),
        ("two dogs on the left, boxes right", {"dog": 100, "box": 500}),
        ("a big dog on the left, a dog on the right", {"big dog": 100, "dog": 500}),
        ("the rock and roll band on the left and a v1.5 logo on the right", {"Rock and Roll Band": 100, "v1.5 logo": 500}),
        ("salt, pepper on the left", {"salt, pepper": 100}),
        ("a dog far left in the background", {"dog": 100, "background": None}),
        ("hotdogs on the left", {"dog": None, "😀": None}),
    ],
)
def test_a_clause_is_about_the_layer_that_it_names_first(caption, places):
    """Centres across a canvas of three times 200 pixels."""
    picture = Document(600, 300, tuple(Layer(name, torch.rand(10, 10, 4), 1) for name in places))
    after, notes = from_caption(caption, picture)
    found = {layer.name: layer.bounds[0] + layer.bounds[2] // 2 for _, layer in after.walk()}
    assert found == {name: 6 if centre is None else centre for name, centre in places.items()}
    assert notes == [f"{name}: the caption does not say where" for name, centre in places.items() if centre is None]


def test_trimmed_layers_look_the_same():
    picture = torch.zeros(20, 30, 4)
    picture[3:9, 4:15] = levels(6, 11, 4).clamp_min(1 / 255)
    layer = trimmed(Layer("a", picture, 7, 8))
    assert (layer.x, layer.y) == (11, 11) and torch.equal(layer.image, picture[3:9, 4:15])
    masked = trimmed(Layer("a", picture, mask=torch.ones(20, 30).index_fill(1, torch.arange(10), 0)))
    assert masked.bounds == (10, 3, 5, 6) and masked.mask.shape == (6, 5)
    empty = Layer("a", torch.zeros(5, 5, 4))
    assert trimmed(empty) is empty


def test_layers_are_chosen_and_restacked():
    before = document()
    assert [layer.name for layer in chosen(before, "twin")] == ["twin", "twin"]
    assert chosen(before, "1")[0].name == "ground" and chosen(before, "-1")[0].name == "far out"
    layer = chosen(before, "1")[0]
    moved = {position: [node.name for node in restacked(before.layers, layer, position)].index("ground") for position in (1, 2, 4, 99, -1, -2, -99)}
    assert moved == {1: 0, 2: 1, 4: 3, 99: 3, -1: 3, -2: 2, -99: 0}
    hidden = chosen(before, "hidden")[0]
    inner = restacked(before.layers, hidden, -1)[1].layers[1]
    assert [node.name for node in inner.layers] == ["twin", "hidden"]
