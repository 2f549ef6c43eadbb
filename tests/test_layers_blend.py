"""Blend modes against the W3C's formulas in plain Python and against psd-tools; compositing against formulas; transforms against Pillow."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from psd_tools.composite.blend import BLEND_FUNC
from psd_tools.constants import BlendMode

from tessera.models.layers.blend import MODES, to_linear, to_srgb
from tessera.models.layers.compose import composite, on_checkerboard, without_faint_groups
from tessera.models.layers.document import Document, Group, Layer, Transform
from tessera.models.layers.psd import BLEND_KEYS as KEYS


def levels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape).float() / 255


def flat(colour: tuple[float, ...], height: int = 4, width: int = 4) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float32).expand(height, width, 4).contiguous()


# W3C, Compositing and Blending Level 1, section 10, a channel at a time, in float64.
def soft_light(b: float, s: float) -> float:
    d = ((16 * b - 12) * b + 4) * b if b <= 0.25 else math.sqrt(b)
    return b - (1 - 2 * s) * b * (1 - b) if s <= 0.5 else b + (2 * s - 1) * (d - b)


def hard_light(b: float, s: float) -> float:
    return b * 2 * s if s <= 0.5 else b + (2 * s - 1) - b * (2 * s - 1)


SEPARABLE = {
    "normal": lambda b, s: s,
    "multiply": lambda b, s: b * s,
    "screen": lambda b, s: 1 - (1 - b) * (1 - s),
    "overlay": lambda b, s: hard_light(s, b),
    "darken": min,
    "lighten": max,
    "color-dodge": lambda b, s: 0.0 if b == 0 else 1.0 if s == 1 else min(1.0, b / (1 - s)),
    "color-burn": lambda b, s: 1.0 if b == 1 else 0.0 if s == 0 else 1 - min(1.0, (1 - b) / s),
    "hard-light": hard_light,
    "soft-light": soft_light,
    "difference": lambda b, s: abs(b - s),
    "exclusion": lambda b, s: b + s - 2 * b * s,
    # GIMP's manual: layer modes
    "grain-extract": lambda b, s: min(max(b - s + 0.5, 0.0), 1.0),
    "grain-merge": lambda b, s: min(max(b + s - 0.5, 0.0), 1.0),
}


@pytest.mark.parametrize("mode", SEPARABLE)
def test_separable_modes_follow_their_formulas(mode):
    """All pairs of 52 levels, the ends among them."""
    values = [i / 255 for i in range(0, 256, 5)]
    expected = torch.tensor([[SEPARABLE[mode](b, s) for s in values] for b in values], dtype=torch.float64)
    grid = torch.tensor(values, dtype=torch.float64)
    got = MODES[mode](grid[:, None].expand(-1, 52), grid.expand(52, -1))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)  # vectorised square roots were seen 3e-11 off


@pytest.mark.parametrize("mode", [mode for mode in KEYS if mode not in ("pass-through", "dissolve", "hard-mix")])
def test_modes_agree_with_psd_tools(mode):
    backdrop, source = levels(60, 60, 3), levels(60, 60, 3)
    backdrop[:20] = backdrop[:20].round()  # the ends too
    source[10:30] = source[10:30].round()
    expected = BLEND_FUNC[BlendMode(KEYS[mode])](backdrop.numpy().copy(), source.numpy().copy())
    difference = np.abs(MODES[mode](backdrop, source).numpy() - expected)
    assert difference.max() < 1e-4


# (source, backdrop) of 255 -> hard mix, from a file that Photoshop has merged
PHOTOSHOP = {(0, 255): 1, (255, 0): 0, (6, 249): 1, (39, 216): 1, (83, 172): 1, (172, 83): 0, (205, 50): 0, (249, 6): 0}


def test_hard_mix_follows_adobes_sentence_but_on_the_tie():
    """ "If the resulting sum for a channel is 255 or greater, it receives a value of 255; if less than 255, a value of 0."

    Where it is 255, Photoshop's own merged pictures have 255 under the darker source, and 0 under the lighter one.
    """
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    expected = ((a + b > 255) | (a + b == 255) & (a > b)).float()
    assert torch.equal(MODES["hard-mix"](a.float() / 255, b.float() / 255), expected)
    found = {(source, below): MODES["hard-mix"](torch.tensor([below / 255]), torch.tensor([source / 255])).item() for source, below in PHOTOSHOP}
    assert found == PHOTOSHOP


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "dissolve"])
def test_a_layer_of_half_opacity_over_a_half_transparent_backdrop(mode):
    """W3C section 5 and 10: co = as (1 - ab) Cs + as ab B(Cb, Cs) + (1 - as) ab Cb."""
    bottom, top = levels(8, 8, 4), levels(8, 8, 4)
    got = composite(Document(8, 8, (Layer("b", bottom), Layer("t", top, opacity=0.5, blend_mode=mode)))).double()
    cb, ab, cs, a_s = bottom[..., :3].double(), bottom[..., 3:].double(), top[..., :3].double(), top[..., 3:].double() * 0.5
    alpha = a_s + ab - a_s * ab
    colour = a_s * (1 - ab) * cs + a_s * ab * MODES[mode](cb, cs) + (1 - a_s) * ab * cb
    torch.testing.assert_close(got[..., 3:], alpha, atol=1e-6, rtol=0)
    close = got[..., :3] * alpha - colour
    if mode in ("hard-mix", "darker-color", "lighter-color", "color-dodge", "color-burn", "vivid-light", "divide"):
        assert close.abs().median() < 1e-6  # steps and poles: float32 may fall on the other side of a tie
    else:
        assert close.abs().max() < 1e-5


def test_a_constant_stays_constant():
    """Layers of one colour, whatever their alphas, masks and groups, give that colour."""
    colour = (0.2, 0.5, 0.7)
    layers = [Layer(f"{i}", torch.cat([flat((*colour, 0))[..., :3], levels(4, 4, 1)], -1), mask=levels(4, 4)) for i in range(6)]
    document = Document(4, 4, (Layer("p", flat((*colour, 1))), *layers[:3], Group("g", tuple(layers[3:]), 0.3, "normal")))
    for linear in (False, True):
        torch.testing.assert_close(composite(document, linear=linear), flat((*colour, 1)), atol=1e-6, rtol=0)


def test_linear_light_is_the_mean_of_light():
    half = Document(4, 4, (Layer("black", flat((0, 0, 0, 1))), Layer("white", flat((1, 1, 1, 1)), opacity=0.5)))
    assert composite(half)[0, 0, 0] == pytest.approx(0.5)
    assert composite(half, linear=True)[0, 0, 0] == pytest.approx(1.055 * 0.5 ** (1 / 2.4) - 0.055, abs=1e-6)
    x = torch.linspace(0, 1, 999, dtype=torch.float64)
    torch.testing.assert_close(to_srgb(to_linear(x)), x, atol=1e-6, rtol=0)


def test_groups_isolate_or_pass_through():
    paper, ink = Layer("paper", flat((0.5, 0.5, 0.5, 1))), Layer("ink", flat((0.5, 0.5, 0.5, 1)), blend_mode="multiply")

    def centre(group: Group) -> float:
        return float(composite(Document(4, 4, (paper, group)))[1, 1, 0])

    assert centre(Group("g", (ink,))) == pytest.approx(0.25), "sees the paper"
    assert centre(Group("g", (ink,), blend_mode="normal")) == pytest.approx(0.5), "has nothing below it"
    assert centre(Group("g", (ink,), opacity=0.4)) == pytest.approx(0.6 * 0.5 + 0.4 * 0.25)
    assert centre(Group("g", (ink,), opacity=0.4, blend_mode="multiply")) == pytest.approx(0.6 * 0.5 + 0.4 * 0.25)
    assert centre(Group("g", (ink,), visible=False)) == 0.5
    assert centre(Group("g")) == centre(Group("g", blend_mode="screen")) == 0.5, "empty"


def faint(seed: int) -> Document:
    """Groups of all kinds in one another, hidden and overhanging ones too, over a backdrop that is transparent in places."""
    source = np.random.default_rng(seed)

    def nodes(depth: int) -> tuple[Layer | Group, ...]:
        out: list[Layer | Group] = []
        for _ in range(source.integers(1, 4)):
            common = float(source.choice([1.0, 0.7, 0.2])), bool(source.random() < 0.85)
            if depth and source.random() < 0.6:
                out.append(
                    Group("g", nodes(depth - 1), common[0], str(source.choice(["pass-through", "pass-through", "normal", "screen"])), common[1])
                )
            else:
                mode = str(source.choice(["normal", "multiply", "hue", "dissolve", "difference"]))
                out.append(Layer("l", levels(*source.integers(3, 20, 2), 4), *map(int, source.integers(-8, 18, 2)), common[0], mode, common[1]))
        return tuple(out)

    return Document(23, 19, (Layer("below", levels(12, 23, 4)), *nodes(4)))


def faint_groups(nodes: tuple) -> int:
    groups = [node for node in nodes if isinstance(node, Group)]
    return sum(faint_groups(group.layers) + (group.blend_mode == "pass-through" and group.opacity < 1) for group in groups)


@pytest.mark.parametrize("seed", range(12))
def test_faint_groups_that_pass_through_can_be_done_without(seed):
    before = faint(seed)
    after, notes = without_faint_groups(before)
    assert faint_groups(after.layers) == 0 and bool(notes) == bool(faint_groups(before.layers))
    assert (composite(after) - composite(before)).abs().max() < 1e-5


def test_a_faint_group_of_normal_layers_keeps_them():
    inner = (Layer("a", levels(4, 4, 4)), Group("in", (Layer("b", levels(4, 4, 4), 1, 1),), 0.5))
    before = Document(6, 6, (Layer("below", levels(6, 6, 4)), Group("g", inner, 0.6)))
    after, notes = without_faint_groups(before)
    assert [node.name for node in after.layers[1].layers] == ["a", "in"] and len(notes) == 2
    assert (composite(after) - composite(before)).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["normal", "multiply", "hue", "dissolve"])
def test_layers_beyond_the_canvas_are_cropped(mode):
    """As on a larger canvas of which the part is cut out, on odd sizes."""
    bottom, top = levels(13, 17, 4), levels(11, 9, 4)
    for x, y in ((-4, -5), (12, 8), (-2, 6), (-9, 0), (17, 3), (40, 40)):
        small = Document(17, 13, (Layer("b", bottom), Group("g", (Layer("t", top, x, y, 0.7, mode),), 0.9, "normal")))
        inner = small.map(lambda layer: Layer(layer.name, layer.image, layer.x + 20, layer.y + 20, layer.opacity, layer.blend_mode))
        large = composite(Document(57, 53, inner.layers))
        torch.testing.assert_close(composite(small), large[20:33, 20:37])


def test_each_layer_that_is_drawn_is_announced():
    """Not those that nobody sees: hidden, without opacity, beyond the canvas, alone or in such groups; what the caller raises ends the work."""
    one = flat((1, 0, 0, 1))
    unseen = (Layer("h", one, visible=False), Layer("o", one, opacity=0.0), Layer("far", one, 9, 9), Group("g", (Layer("i", one),), visible=False))
    inside = Group("deep", (Layer("b", one, 2, 2), Group("d", (Layer("c", one), Layer("far", one, 40, 3)), 0.5)), blend_mode="screen")
    document = Document(8, 8, (Layer("a", one), *unseen, inside, Group("far", (Layer("f", one, 90),))))
    called: list[tuple[int, int]] = []
    composite(document, on_layer=lambda done, total: called.append((done, total)))
    assert called == [(0, 3), (1, 3), (2, 3)]

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        composite(document, on_layer=stop)


def test_dissolve_is_there_or_not_with_a_chance_of_alpha():
    document = Document(100, 100, (Layer("b", flat((0, 0, 0, 1), 100, 100)), Layer("t", flat((1, 1, 1, 0.5), 100, 100), 0, 0, 0.6, "dissolve")))
    picture = composite(document)
    assert set(picture[..., 0].unique().tolist()) == {0.0, 1.0}
    assert picture[..., 0].mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(picture, composite(document))


def test_dissolve_needs_no_memory_for_what_is_far_away():
    """A group whose layers lie two million pixels apart; the part on the canvas does not change when all of it moves with the canvas."""
    grey = flat((1, 1, 1, 0.5), 8, 8)
    far = (Layer("a", grey, -(2**20), -(2**20)), Layer("b", grey, 2**20, 2**20), Layer("c", grey))
    picture = composite(Document(8, 8, (Group("g", far, blend_mode="dissolve"),)))
    assert 10 < picture[..., 3].sum() < 54 and set(picture[..., 3].unique().tolist()) == {0.0, 1.0}
    moved = tuple(replace(layer, x=layer.x + 3) for layer in far[2:])
    still = composite(Document(8, 8, (Group("g", far[2:], blend_mode="dissolve"),)))
    assert torch.equal(composite(Document(8, 8, (Group("g", moved, blend_mode="dissolve"),)))[:, 3:], still[:, :-3])


def test_a_turned_layer_is_drawn_only_where_the_canvas_is():
    """A strip of 20,000 pixels, whose bounds have 200 million, over a corner of it; the part is that of the whole."""
    picture = torch.nn.functional.interpolate(torch.rand(1, 4, 3, 9), (60, 200), mode="bilinear")[0].movedim(0, -1).contiguous()
    turned = Layer("t", picture, -70, -20, mask=torch.rand(60, 200), transform=Transform(240, 60, 0.5, True))
    part = turned.baked((3, 4, 20, 10))
    assert part.bounds == (3, 4, 20, 10)
    left, top, _, _ = turned.bounds
    whole = turned.baked()
    for ours, all_of_it in ((part.image, whole.image), (part.mask, whole.mask)):
        torch.testing.assert_close(ours, all_of_it[4 - top : 14 - top, 3 - left : 23 - left], atol=1e-5, rtol=0)
    strip = Layer("s", flat((1, 0, 0, 1), 1, 1), -9_900, 4, transform=Transform(20_000, 9, 0.785))
    drawn = strip.baked((100, 0, 8, 8))
    assert drawn.image.shape == (8, 8, 4) and composite(Document(400, 400, (strip,)))[..., 3].sum() > 100


def test_checkerboard_shows_only_through():
    squares = on_checkerboard(torch.cat([flat((1, 0, 0, 1), 16, 8), flat((0, 0, 0, 0), 16, 8)], 1))
    assert torch.equal(squares[:, :8], flat((1, 0, 0, 1), 16, 8)[..., :3])
    assert squares[0, 8, 0] != squares[8, 8, 0]


def test_flips_and_quarter_turns_move_pixels_exactly():
    picture = levels(5, 8, 4)
    layer = Layer("a", picture, 10, 20)
    half = Transform(rotation=math.pi)
    assert torch.equal(Layer("a", picture, transform=half).baked().image, picture.rot90(2, (0, 1)))
    assert torch.equal(Layer("a", picture, transform=Transform(flip_h=True)).baked().image, picture.flip(1))
    assert torch.equal(Layer("a", picture, transform=Transform(flip_v=True)).baked().image, picture.flip(0))
    turned = Layer("a", picture, 10, 20, transform=Transform(rotation=math.pi / 2)).baked()
    assert torch.equal(turned.image, picture.rot90(-1, (0, 1))), "clockwise"
    assert (turned.x, turned.y) == (11, 18) and layer.baked() is layer


def test_turned_and_scaled_layers_agree_with_pillow():
    smooth = torch.nn.functional.interpolate(torch.rand(1, 4, 5, 5), (61, 81), mode="bicubic")[0].clamp(0, 1).movedim(0, -1).contiguous()
    smooth[..., 3] = 1
    turned = Layer("a", smooth, transform=Transform(rotation=math.radians(30))).baked()
    colours = Image.fromarray((smooth * 255).round().byte().numpy()).rotate(-30, Image.Resampling.BILINEAR, expand=True)
    across, down = (turned.image.shape[1] - colours.width) // 2, (turned.image.shape[0] - colours.height) // 2
    part = slice(20, -20)
    ours = turned.image[down : down + colours.height, across : across + colours.width]
    inside = ours[..., 3] > 0.999
    difference = (ours - torch.from_numpy(np.asarray(colours).copy()).float() / 255)[part, part].abs()[inside[part, part]]
    assert inside[part, part].sum() > 2000 and difference.max() < 0.03  # half a pixel of another centre, at most
    assert (turned.x, turned.y, turned.image.shape[1], turned.image.shape[0]) == turned.bounds
    scaled = Layer("a", smooth, 3, 4, transform=Transform(40, 30, flip_h=True)).baked()
    expected = Image.fromarray((smooth.flip(1) * 255).round().byte().numpy()).resize((40, 30), Image.Resampling.BICUBIC)
    assert (scaled.image - torch.from_numpy(np.asarray(expected).copy()).float() / 255).abs().max() < 0.02
    assert (scaled.x, scaled.y) == (3, 4)


def test_colours_under_full_transparency_do_not_bleed():
    picture = flat((0, 1, 0, 0), 20, 20).clone()
    picture[5:15, 5:15] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    for transform in (Transform(33, 17), Transform(rotation=0.3)):
        shown = Layer("a", picture, transform=transform).baked().image
        seen = shown[..., 3] > 0.02
        assert seen.any() and shown[seen][:, 1].max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("linear", [False, True])
def test_the_gpu_composes_alike(linear):
    """Modes with steps and poles may fall on the other side of a tie."""
    layers = [Layer(mode, levels(8, 8, 4), 8 * index - 3, 1, 0.9, mode, mask=levels(8, 8)) for index, mode in enumerate(MODES)]
    document = Document(8 * len(MODES), 9, (Layer("paper", levels(9, 8 * len(MODES), 4)), Group("g", tuple(layers), 0.8, "screen")))
    apart = (composite(document, linear=linear, device=torch.device("cuda")) - composite(document, linear=linear)).abs()
    assert apart.median() < 1e-6 and (apart > 1e-4).float().mean() < 0.01
