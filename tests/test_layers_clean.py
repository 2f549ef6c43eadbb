"""Cleaning of alpha against float64, brute force and true composites; how a batch becomes layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_layers_blend import flat, levels

from tessera.models.layers import document
from tessera.models.layers.clean import MERGED, Cleaning, bled, cleaned, colour, levelled, stacked, without_matte, without_specks
from tessera.models.layers.compose import composite, on_checkerboard, thumbnails
from tessera.models.layers.document import Document, Group, Layer
from tessera.models.media.resize import resize

MATTES = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "grey": (128 / 255,) * 3, "any": (0.2, 0.9, 0.4)}


def over(picture: np.ndarray, ground) -> np.ndarray:
    """Straight alpha over one colour, in float64."""
    return picture[..., 3:] * picture[..., :3] + (1 - picture[..., 3:]) * np.asarray(ground, np.float64)


def disc(size: int = 40, radius: float = 14.0, soft: float = 3.0) -> torch.Tensor:
    """Alpha of a disc whose edge is `soft` pixels wide, `(size, size)`."""
    axis = torch.arange(size) - (size - 1) / 2
    return ((radius - torch.hypot(axis[:, None], axis)) / soft + 0.5).clamp(0, 1)


@pytest.mark.parametrize("matte", MATTES)
def test_the_matte_is_taken_out_again(matte):
    """Composed over the matte in float64 and rounded to bytes, as a file holds it; then over other grounds: within a step of the true composite."""
    true = levels(64, 64, 4).double().numpy()
    true[0, 0, 3] = 0
    held = np.concatenate([np.rint(over(true, MATTES[matte]) * 255) / 255, true[..., 3:]], -1)
    out = without_matte(torch.from_numpy(held).float(), MATTES[matte])
    assert out.dtype == torch.float32 and 0 <= float(out.min()) and float(out.max()) <= 1
    for ground in (*MATTES.values(), (1.0, 0.0, 0.5)):
        assert np.abs(over(out.double().numpy(), ground) - over(true, ground)).max() <= 1 / 255
    assert torch.equal(out[0, 0], torch.from_numpy(held[0, 0]).float()), "a colour that nobody can know stays"
    solid = torch.from_numpy(true[..., 3] > 0.5)
    assert np.abs(out.numpy() - true)[solid.numpy()].max() <= 1.01 / 255, "the colour itself, where alpha does not hide its rounding"


@pytest.mark.parametrize("alpha", [0.0, 1e-45, 1e-38, 1e-7, 1 / 255, 1.0])
def test_no_alpha_makes_a_colour_that_is_not_one(alpha):
    for value in (0.0, 0.3, 1.0):
        out = without_matte(flat((value, value, value, alpha)), MATTES["grey"])
        assert out.isfinite().all() and 0 <= float(out.min()) and float(out.max()) <= 1


def test_levels_of_alpha():
    picture = torch.rand(30, 30, 4)
    picture[..., 3] = torch.linspace(0, 1, 900).view(30, 30)
    out = levelled(picture, 0.1, 0.75)
    wanted = np.interp(picture[..., 3].double().numpy(), [0.1, 0.75], [0, 1])
    assert np.abs(out[..., 3].numpy() - wanted).max() < 1e-6
    assert torch.equal(out[..., :3], picture[..., :3])
    assert out[..., 3][picture[..., 3] <= 0.1].eq(0).all() and out[..., 3][picture[..., 3] >= 0.75].eq(1).all()
    assert torch.equal(levelled(picture, 0.0, 1.0), picture), "the defaults change nothing, bit for bit"


def filled(there: np.ndarray) -> np.ndarray:
    """The number of pixels of the group that each pixel is in, by flood fill."""
    sizes = np.zeros(there.shape, int)
    seen = np.zeros(there.shape, bool)
    for start in zip(*np.nonzero(there), strict=True):
        if seen[start]:
            continue
        seen[start], group, open_ = True, [start], [start]
        while open_:
            y, x = open_.pop()
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if 0 <= near[0] < there.shape[0] and 0 <= near[1] < there.shape[1] and there[near] and not seen[near]:
                    seen[near] = True
                    group.append(near)
                    open_.append(near)
        for pixel in group:
            sizes[pixel] = len(group)
    return sizes


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 1.0])
def test_specks_are_removed(share):
    picture = levels(37, 53, 4).clamp_min(1 / 255)
    picture[..., 3] *= torch.rand(37, 53) < share
    sizes = filled(picture[..., 3].numpy() > 0)
    for pixels in (1, 2, 5, 40):
        out = without_specks(picture, pixels)
        assert torch.equal(out[..., 3], picture[..., 3] * torch.from_numpy(sizes >= pixels))
        assert torch.equal(out[..., :3], picture[..., :3])


def test_a_line_of_one_pixel_that_winds_is_one_thing():
    """Groups are followed however long they are: the alpha of a spiral of 2000 pixels and of a diagonal."""
    there = np.zeros((64, 64), bool)
    y, x, dy, dx = 0, 0, 0, 1
    while not there[y, x]:
        there[y, x] = True
        ahead = y + 2 * dy, x + 2 * dx
        if not (0 <= y + dy < 64 and 0 <= x + dx < 64) or (0 <= ahead[0] < 64 and 0 <= ahead[1] < 64 and there[ahead]):
            dy, dx = dx, -dy
        y, x = y + dy, x + dx
    assert there.sum() > 1900
    for one in (there, np.eye(64, dtype=bool)):
        picture = torch.zeros(64, 64, 4)
        picture[..., 3] = torch.from_numpy(one)
        assert torch.equal(without_specks(picture, int(one.sum())), picture)
        assert not without_specks(picture, int(one.sum()) + 1).any()


@pytest.mark.parametrize("reach", [1, 4, 100])
@pytest.mark.parametrize("shape", [(23, 31), (1, 40), (40, 1)])
def test_colours_come_from_the_nearest_opaque_pixel(reach, shape):
    """Against the distance to every pixel. Where two are equally near, either will do."""
    picture = torch.rand(*shape, 4)
    picture[..., 3] = torch.where(torch.rand(shape) < 0.05, 1.0, torch.where(torch.rand(shape) < 0.3, 0.5, 0.0))
    out = bled(picture, reach)
    assert torch.equal(out[..., 3], picture[..., 3])
    alpha = picture[..., 3].numpy()
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(float)

    def nearest(place, sources, colours):
        """Distance to the nearest source, and the colours that are as near."""
        distances = np.linalg.norm(places[sources] - places[place], axis=-1)
        near = np.isclose(distances, distances.min(initial=np.inf))
        return distances.min(initial=np.inf), colours[sources][near]

    taken = 0
    for place in np.ndindex(*shape):
        found = out[place][:3].numpy()
        distance, colours = nearest(place, alpha >= 0.95, picture[..., :3].numpy())
        if alpha[place] < 0.95 and distance > reach and alpha[place] == 0:
            distance, colours = nearest(place, alpha > 0, out[..., :3].numpy())
        if alpha[place] >= 0.95 or distance > reach:
            assert np.array_equal(found, picture[place][:3].numpy())
        else:
            assert (colours == found).all(-1).any()
            taken += 1
    assert taken > 5


@pytest.mark.parametrize("ground", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.1, 0.8, 0.3)])
def test_no_fringe_of_the_old_ground_is_left(ground):
    """A disc of one colour whose edge holds black, and nothing but black around it: over another ground, at its size and at half of it."""
    own, alpha = torch.tensor([0.9, 0.5, 0.2]), disc()
    true = torch.cat([own.expand(40, 40, 3), alpha[..., None]], -1)
    dirty = torch.cat([own * (alpha[..., None] > 0.96) + 0.3 * own * ((alpha > 0) & (alpha <= 0.96))[..., None], alpha[..., None]], -1)
    clean = bled(dirty, 4)

    def halved(picture: torch.Tensor) -> np.ndarray:
        """Straight channels one by one, as programs that know no better resize them."""
        return picture.double().unflatten(0, (20, 2)).unflatten(2, (20, 2)).mean((1, 3)).numpy()

    for picture, sizes in ((clean, True), (dirty, False)):
        whole = np.abs(over(picture.double().numpy(), ground) - over(true.double().numpy(), ground)).max() <= 1 / 255
        half = np.abs(over(halved(picture), ground) - over(halved(true), ground)).max() <= 1 / 255
        assert (whole, half) == (sizes, sizes)


def test_cleaning_is_its_steps_in_order():
    """Haze, a speck and a matte, on pictures of any memory layout; colours under the final alpha."""
    alpha = disc()
    own = torch.tensor([0.9, 0.5, 0.2]).expand(40, 40, 3)
    mixed = own * alpha[..., None] + (1 - alpha[..., None])
    picture = torch.cat([mixed, alpha[..., None]], -1)
    picture[..., 3] = picture[..., 3].clamp_min(0.03)
    picture[2:4, 2:4, 3] = 0.9
    out = cleaned(picture.movedim(-1, 0).contiguous().movedim(0, -1), Cleaning(MATTES["white"], 0.05, 0.95, 16, 3))
    assert not out[:4, :4, 3].any() and out[0, :, 3].eq(0).all()
    wanted = ((alpha - 0.05) / 0.9).clamp(0, 1)
    assert (out[..., 3] - wanted).abs().max() < 1e-6
    assert (out[..., :3] - own)[out[..., 3] > 0].abs().max() < 1e-5
    assert torch.equal(cleaned(picture, Cleaning()), picture), "the defaults change nothing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cleaning(low=0.5, high=0.5), "low is 0.5 and high is 0.5; use 0 <= low < high <= 1"),
        (lambda: Cleaning(low=float("nan")), "low is nan"),
        (lambda: Cleaning(high=1.5), "high is 1.5"),
        (lambda: Cleaning(specks=-1), "specks is -1 and bleed is 0; use numbers of pixels from 0 up"),
        (lambda: colour("mauvish"), "matte is 'mauvish'; use none, or a colour such as black"),
        (lambda: stacked([Layer("a", flat((1, 1, 1, 1)))], merged="hidden"), "image has only the merged picture, which is hidden; give a batch"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_colours_by_name_and_number():
    assert colour(" None ") is None and colour("black") == (0, 0, 0) and colour("#fff") == (1, 1, 1)
    assert colour("#336699") == (0x33 / 255, 0x66 / 255, 0x99 / 255) == colour("rgb(51, 102, 153)")


def batch(*alphas: float) -> list[Layer]:
    """Pictures of 6 x 8 with a square of 2 x 3 at (2, 1), of these alphas; the level of red is the place in the batch."""
    layers = []
    for index, alpha in enumerate(alphas):
        picture = torch.zeros(6, 8, 4)
        picture[1:3, 2:5] = torch.tensor([index / 10, 0, 0, alpha])
        layers.append(Layer(f"{index}", picture))
    return layers


def order(layers: list[Layer]) -> list[int]:
    return [round(float(layer.image[..., 0].max()) * 10) for layer in layers]


def test_batches_become_layers_in_either_order():
    layers, notes = stacked(batch(1, 1, 1), ["a", "", "c"])
    assert [layer.name for layer in layers] == ["a", "Layer 2", "c"] and order(layers) == [0, 1, 2]
    assert notes == ["1 of 3 layers have no name and are numbered"]
    assert {layer.bounds for layer in layers} == {(2, 1, 3, 2)}
    layers, notes = stacked(batch(1, 1, 1), ["a", "b", "c", "d", "e"], top_first=True, trim=False)
    assert [layer.name for layer in layers] == ["c", "b", "a"] and order(layers) == [2, 1, 0]
    assert notes == ["names has 5 lines for 3 layers; not used: d, e"]
    assert {layer.bounds for layer in layers} == {(0, 0, 8, 6)}
    layers, notes = stacked(batch(1, 1), numbered_from=4)
    assert [layer.name for layer in layers] == ["Layer 4", "Layer 5"] and not notes


@pytest.mark.parametrize("top_first", [False, True])
def test_the_merged_picture_takes_no_name(top_first):
    layers, _ = stacked(batch(1, 1, 1), ["a", "b"], merged="left out", top_first=top_first)
    assert sorted((layer.name, *order([layer])) for layer in layers) == [("a", 1), ("b", 2)]
    layers, _ = stacked(batch(1, 1, 1), ["a", "b"], merged="hidden", top_first=top_first)
    assert [layer.visible for layer in layers] == [False, True, True] and layers[0].name == MERGED
    assert layers[0].bounds == (0, 0, 8, 6) and order(layers) == ([0, 2, 1] if top_first else [0, 1, 2])


def test_empty_layers_are_left_out_and_named():
    layers, notes = stacked(batch(1, 0, 0.2, 0.6), ["a", "b", "c", "d"], drop_empty=True, threshold=0.2)
    assert [layer.name for layer in layers] == ["a", "d"] and notes == ["b: empty, left out", "c: empty, left out"]
    layers, notes = stacked(batch(1, 0), ["a", "b"])
    assert [layer.bounds for layer in layers] == [(2, 1, 3, 2), (0, 0, 8, 6)] and not notes
    assert stacked(batch(0), drop_empty=True)[0] == []


def test_boxes_are_cut_at_the_threshold():
    (layer,) = batch(1)
    layer.image[4, 7, 3] = 0.1
    assert stacked([layer])[0][0].bounds == (2, 1, 6, 4)
    assert stacked([layer], threshold=0.1)[0][0].bounds == (2, 1, 3, 2)


def test_a_mask_becomes_part_of_a_cleaned_picture():
    """And cleaning knows of it: what it hides has no colour of its own."""
    picture, mask = flat((0.5, 0.5, 0.5, 1.0), 6, 8), torch.zeros(6, 8)
    picture[1:3, 2:5, :3] = 1.0
    mask[1:3, 2:5] = 0.97
    layer = Layer("a", picture, mask=mask)
    (kept,), (made,) = stacked([layer])[0], stacked([layer], cleaning=Cleaning(bleed=1), trim=False)[0]
    assert kept.bounds == (2, 1, 3, 2) and torch.equal(kept.mask, mask[1:3, 2:5])
    assert made.mask is None and torch.equal(made.image[..., 3], mask)
    assert made.image[0, 3, 0] == 1.0 and made.image[5, 7, 0] == 0.5


def test_thumbnails_show_the_whole_and_each_layer_where_it_is():
    layers = [Layer("ground", flat((0, 0, 1, 1), 30, 60)), Layer("hidden", flat((1, 0, 0, 1), 10, 20), 40, 20, visible=False)]
    small = thumbnails(Document(60, 30, tuple(layers)), layers, side=30)
    assert small.shape == (3, 15, 30, 3)
    empty = on_checkerboard(torch.zeros(15, 30, 4))
    blue, red = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    assert torch.equal(small[0], blue.expand(15, 30, 3)) and torch.equal(small[1], small[0])
    assert torch.equal(small[2, 10:, 20:], red.expand(5, 10, 3)) and torch.equal(small[2, :10], empty[:10])
    whole = Document(9, 7, (Layer("a", levels(5, 5, 4), 1, 1),))
    assert torch.equal(thumbnails(whole, ())[0], on_checkerboard(composite(whole))), "what is small enough is shown as it is"


def test_thumbnails_shrink_each_layer_once_and_announce_it(monkeypatch):
    layers = [Layer("ground", flat((0, 0, 1, 1), 30, 60)), Layer("hidden", flat((1, 0, 0, 1), 10, 20), 40, 20, visible=False)]
    shrunk: list[tuple[int, int]] = []
    monkeypatch.setattr(document, "resize", lambda picture, size: shrunk.append(size) or resize(picture, size))
    called: list[tuple[int, int]] = []
    thumbnails(Document(60, 30, (layers[0], Group("g", (layers[1],)))), layers, side=30, on_layer=lambda *at: called.append(at))
    assert called == [(0, 2), (1, 2)] and shrunk == [(30, 15), (10, 5)]


def test_thumbnails_of_large_layers_are_where_the_layers_are():
    """A disc of 1000 pixels a side, with a mask over its left half, against the mean of the pixels that each thumbnail's pixel covers."""
    y, x = torch.meshgrid(*[torch.arange(1000) / 1000] * 2, indexing="ij")
    disc = torch.stack([x, y, 1 - x, ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.09).float()], -1)
    layer = Layer("disc", disc, mask=(x >= 0.5).float())
    (shown,) = thumbnails(Document(1000, 1000, (layer,)), (), side=50)
    alpha = disc[..., 3:] * (x >= 0.5)[..., None]
    whole = torch.cat([disc[..., :3] * alpha, alpha], -1).unflatten(0, (50, 20)).unflatten(2, (50, 20)).mean((1, 3))
    expected = on_checkerboard(torch.cat([whole[..., :3] / whole[..., 3:].clamp_min(1e-6), whole[..., 3:]], -1))
    assert (shown - expected).abs().mean() < 0.01 and (shown - expected).abs().max() < 0.25, "only edges differ"
