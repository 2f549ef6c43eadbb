"""ART's regions and its transparent autoencoder: against loops, torch's own attention and diffusers' rotary embedding in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from tessera.models.layers.art import layer_embedding
from tessera.models.layers.regions import Regions, snap
from tessera.models.layers.transparent_vae import build, grey_blended


def random_boxes(count: int, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """With some part on the canvas, some of it perhaps beyond."""
    boxes = []
    for _ in range(count):
        x, y = random.randint(-40, width - 1), random.randint(-40, height - 1)
        boxes.append((x, y, random.randint(max(1 - x, 1), width + 60), random.randint(max(1 - y, 1), height + 60)))
    return boxes


def covered(box, width: int, height: int) -> set[tuple[int, int]]:
    """(row, column) of every token of 16 pixels that a box touches, pixel by pixel."""
    x, y, w, h = box
    return {(r // 16, c // 16) for r in range(max(y, 0), min(y + h, height)) for c in range(max(x, 0), min(x + w, width))}


@pytest.mark.parametrize("seed", range(8))
def test_boxes_snap_to_the_tokens_they_touch(seed):
    random.seed(seed)
    width, height = random.randint(17, 150), random.randint(17, 150)
    boxes = random_boxes(5, width, height)
    regions = snap(boxes, width, height)
    whole = {(r, c) for r in range(-(-height // 16)) for c in range(-(-width // 16))}
    places = [whole, whole, *(covered(box, width, height) for box in boxes)]
    wanted = [(layer, *place) for layer, there in enumerate(places) for place in sorted(there)]
    assert [tuple(row) for row in regions.ids.tolist()] == wanted
    assert regions.tokens == len(wanted)


@pytest.mark.parametrize("patch", [1, 2, 8])
def test_crop_reads_the_tokens_in_order_and_scatter_puts_them_back(patch):
    regions = Regions(4, 3, ((0, 0, 4, 3), (1, 1, 2, 2), (2, 0, 2, 3)))
    latent = torch.randn(2, 5, 3, 3 * patch, 4 * patch)
    strip = regions.crop(latent, patch)
    assert strip.shape == (2, 5, patch, patch * regions.tokens)
    for number, (layer, row, column) in enumerate(regions.ids.tolist()):
        token = latent[:, :, layer, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        assert torch.equal(strip[..., number * patch : (number + 1) * patch], token)
    canvas = torch.randn_like(latent)
    back = regions.scatter(strip, canvas, patch)
    inside = regions.scatter(torch.ones_like(strip), torch.zeros_like(latent), patch).bool()
    assert torch.equal(back, torch.where(inside, latent, canvas))
    assert int(inside[0, 0].sum()) == regions.tokens * patch**2
    assert torch.equal(regions.crop(back, patch), strip)


def test_finer_regions_cover_the_same_place():
    regions = Regions(4, 3, ((0, 0, 4, 3), (1, 1, 2, 2)))
    ones = []
    for grid, patch in ((regions, 4), (regions.finer(2), 2)):
        ones.append(grid.scatter(torch.ones(1, 1, patch, patch * grid.tokens), torch.zeros(1, 1, 2, 12, 16), patch))
    assert torch.equal(*ones)


def test_all_bad_boxes_in_one_message():
    with pytest.raises(
        ValueError, match=r"box 2 \(0 x 5 pixels\) has no area; box 3 \(at -9, 0, 9 x 9\) lies outside .* x, y, width, height"
    ) as error:
        snap([(0, 0, 8, 8), (3, 3, 0, 5), (-9, 0, 9, 9), (10, 10, 6, 6), (10, 10, 6, 6)], 64, 64)
    assert "box 1" not in str(error.value) and "box 5" not in str(error.value), "boxes may overlap"
    with pytest.raises(ValueError, match="boxes has 200 foregrounds; use at most 50"):
        snap([(0, 0, 8, 8)] * 200, 64, 64)
    with pytest.raises(ValueError, match="the canvas is 0 x 64"):
        snap([], 0, 64)


def test_the_layer_embedding_of_the_published_layout():
    regions, table = snap([(0, 0, 16, 16)], 32, 32), torch.randn(1, 52, 1, 1, 8)
    assert torch.equal(layer_embedding({"layer_pe": table}, regions, 8), table[0, :3, 0, 0])
    with pytest.raises(ValueError, match="no tensor 'layer_pe'; its tensors are other"):
        layer_embedding({"other": table}, regions, 8)
    with pytest.raises(ValueError, match=r"is \(1, 2, 1, 1, 8\); model and boxes need \(1, 3 or more"):
        layer_embedding({"layer_pe": table[:, :2]}, regions, 8)


def test_grey_blending_is_the_formula_of_the_paper():
    image = torch.rand(5, 7, 4, dtype=torch.float64)
    colour, alpha = image[..., :3] * 2 - 1, image[..., 3:] * 2 - 1
    torch.testing.assert_close(grey_blended(image) * 2 - 1, (0.5 * alpha + 0.5) * colour)


def transparent_decoder(width: int, blocks: int, hidden: int, channels: int) -> dict[str, torch.Tensor]:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"fc_in": (width, channels), "fc_out": (256, width), "encoder.ln": (width,)}
    for index in range(blocks):
        layer = f"encoder.layers.encoder_layer_{index}."
        shapes |= {f"{layer}ln_1": (width,), f"{layer}ln_2": (width,), f"{layer}self_attention.in_proj": (3 * width, width)}
        shapes |= {f"{layer}self_attention.out_proj": (width, width), f"{layer}mlp.0": (hidden, width), f"{layer}mlp.3": (width, hidden)}
    state = {}
    for name, shape in shapes.items():
        join = "_" if name.endswith("in_proj") else "."
        weight = torch.randn(shape, generator=generator) * (shape[1] ** -0.5 if len(shape) > 1 else 0.1) + (len(shape) == 1)
        state[f"decoder.{name}{join}weight"] = weight
        state[f"decoder.{name}{join}bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return state


def in_float64(state, latent, regions: Regions) -> torch.Tensor:
    """The decoder over again: torch's MultiheadAttention, diffusers' rotary embedding, loops over layers. `(layers, h, w, 4)` in -1..1."""
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="the reference")
    rotary = pytest.importorskip("diffusers.models.transformers.transformer_flux").FluxPosEmbed(theta=10000, axes_dim=(8, 28, 28))
    state = {name.removeprefix("decoder."): value.double() for name, value in state.items()}

    def linear(x, name):
        return nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    places = [(layer, r, c) for layer, (x, y, w, h) in enumerate(regions.boxes) for r in range(y, y + h) for c in range(x, x + w)]
    x = linear(torch.stack([latent[:, layer, r, c].double() for layer, r, c in places])[None], "fc_in")
    width = x.shape[-1]
    tables = rotary(torch.tensor(places))
    for index in range(sum("mlp.0.weight" in name for name in state)):
        layer = f"encoder.layers.encoder_layer_{index}."
        attention = nn.MultiheadAttention(width, width // 64, batch_first=True, dtype=torch.float64)
        prefix = f"{layer}self_attention."
        attention.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
        y = norm(x, f"{layer}ln_1")
        heads = y.unflatten(-1, (-1, 64)).transpose(1, 2)
        turned = embeddings.apply_rotary_emb(heads, tuple(table.double() for table in tables)).transpose(1, 2).flatten(2).double()
        x = x + attention(turned, turned, y, need_weights=False)[0]
        x = x + linear(nn.functional.gelu(linear(norm(x, f"{layer}ln_2"), f"{layer}mlp.0")), f"{layer}mlp.3")
    out = linear(norm(x, "encoder.ln"), "fc_out")[0]
    canvas = torch.zeros(len(regions.boxes), 8 * regions.height, 8 * regions.width, 4, dtype=torch.float64)
    canvas[..., 3] = -1
    for (layer, r, c), values in zip(places, out, strict=True):
        canvas[layer, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] = values.view(4, 8, 8).permute(1, 2, 0)
    return canvas


@torch.no_grad()
def test_the_transparent_decoder_is_the_published_network():
    state = transparent_decoder(width=128, blocks=2, hidden=96, channels=16)
    regions = Regions(6, 4, ((0, 0, 6, 4), (0, 0, 6, 4), (1, 1, 3, 2), (2, 0, 4, 3)))
    latent = torch.randn(16, 4, 4, 6)
    wanted = ((in_float64(state, latent, regions) + 1) / 2).clamp(0, 1)
    got = build(state)(latent, regions)
    assert got.shape == (4, 32, 48, 4)
    assert ((wanted > 0) & (wanted < 1)).double().mean() > 0.3, "clamped values prove nothing"
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6)


def test_other_weights_are_no_transparent_decoder():
    state = transparent_decoder(width=64, blocks=1, hidden=64, channels=16)
    with pytest.raises(ValueError, match=r"no transparent decoder: it needs decoder\.fc_in.weight, .* the tensors are layer_pe"):
        build({"layer_pe": torch.zeros(1)})
    lacking = {name: value for name, value in state.items() if "ln_2" not in name}
    with pytest.raises(ValueError, match=r"(?s)do not fit together: .*ln_2"):
        build(lacking)
