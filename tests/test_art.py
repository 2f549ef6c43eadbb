"""ART's regions and its transparent autoencoder: against loops, torch's own attention and diffusers' rotary embedding in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from tessera.models.layers.document import Document, Group, Layer
from tessera.models.layers.regions import WHOLE, Regions, filled, layer_embedding, parse_boxes, pictures, positions, snap, visible
from tessera.models.layers.transparent_vae import TransparentDecoder, build, grey_blended, published


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
    frames = random.randint(1, 3)
    regions = snap(boxes, width, height, frames)
    whole = {(r, c) for r in range(-(-height // 16)) for c in range(-(-width // 16))}
    places = [whole, whole, *(covered(box, width, height) for box in boxes)]
    wanted = [(layer, frame, *place) for layer, there in enumerate(places) for frame in range(frames) for place in sorted(there)]
    assert [tuple(row) for row in regions.ids.tolist()] == wanted
    assert regions.tokens == len(wanted)


@pytest.mark.parametrize(("patch", "frames"), [(1, 1), (2, 1), (8, 1), (2, 3)])
def test_crop_reads_the_tokens_in_order_and_scatter_puts_them_back(patch, frames):
    regions = Regions(4, 3, ((0, 0, 4, 3), (1, 1, 2, 2), (2, 0, 2, 3)), frames)
    latent = torch.randn(2, 5, 3 * frames, 3 * patch, 4 * patch)
    assert regions.fits(latent, patch) and not regions.fits(latent[:, :, 1:], patch)
    strip = regions.crop(latent, patch)
    assert strip.shape == (2, 5, patch, patch * regions.tokens)
    for number, (layer, frame, row, column) in enumerate(regions.ids.tolist()):
        token = latent[:, :, layer * frames + frame, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        assert torch.equal(strip[..., number * patch : (number + 1) * patch], token)
    canvas = torch.randn_like(latent)
    back = regions.scatter(strip, canvas, patch)
    inside = regions.scatter(torch.ones_like(strip), torch.zeros_like(latent), patch).bool()
    assert torch.equal(back, torch.where(inside, latent, canvas))
    assert int(inside[0, 0].sum()) == regions.tokens * patch**2
    assert torch.equal(regions.crop(back, patch), strip)


def test_finer_regions_cover_the_same_place():
    regions = Regions(4, 3, ((0, 0, 4, 3), (1, 1, 2, 2)), 2)
    ones = []
    for grid, patch in ((regions, 4), (regions.finer(2), 2)):
        ones.append(grid.scatter(torch.ones(1, 1, patch, patch * grid.tokens), torch.zeros(1, 1, 4, 12, 16), patch))
    assert torch.equal(*ones)


@pytest.mark.parametrize(("spacing", "frames", "apart"), [(1, 1, 1), (4, 1, 4), (4, 3, 4), (4, 7, 7)])
def test_no_two_tokens_share_a_position(spacing, frames, apart):
    regions = Regions(3, 2, ((0, 0, 3, 2), (0, 0, 3, 2), (1, 1, 2, 1)), frames)
    wanted = [
        (layer * apart + frame, row, column)
        for layer, (x, y, width, height) in enumerate(regions.boxes)
        for frame in range(frames)
        for row in range(y, y + height)
        for column in range(x, x + width)
    ]
    assert [tuple(position) for position in positions(regions, spacing).tolist()] == wanted
    assert len(set(wanted)) == regions.tokens


def test_all_bad_boxes_in_one_message():
    with pytest.raises(
        ValueError, match=r"box 2 \(0 x 5 pixels\) has no area; box 3 \(at -9, 0, 9 x 9\) lies outside .* x, y, width, height"
    ) as error:
        snap([(0, 0, 8, 8), (3, 3, 0, 5), (-9, 0, 9, 9), (10, 10, 6, 6), (10, 10, 6, 6)], 64, 64)
    assert "box 1" not in str(error.value) and "box 5" not in str(error.value), "boxes may overlap"
    assert [len(snap([(0, 0, 8, 8)] * count, 64, 64).boxes) for count in (0, 50)] == [WHOLE, WHOLE + 50]
    with pytest.raises(ValueError, match="boxes has 51 foregrounds; use at most 50"):
        snap([(0, 0, 8, 8)] * 51, 64, 64)
    with pytest.raises(ValueError, match="the canvas is 0 x 64"):
        snap([], 0, 64)


def test_the_layer_embedding_of_the_published_layout():
    regions, table = snap([(0, 0, 16, 16)], 32, 32), torch.randn(1, 52, 1, 1, 8)
    assert torch.equal(layer_embedding({"layer_pe": table}, regions, 8), table[0, :3, 0, 0])
    with pytest.raises(ValueError, match="no tensor 'layer_pe'; its tensors are other"):
        layer_embedding({"other": table}, regions, 8)
    with pytest.raises(ValueError, match=r"is \(1, 2, 1, 1, 8\); model and boxes need \(1, 3 or more"):
        layer_embedding({"layer_pe": table[:, :2]}, regions, 8)


def test_boxes_are_read_a_line_each():
    assert parse_boxes("1, 2,3 4\n\n  -5 6 7 8  ") == [(1, 2, 3, 4), (-5, 6, 7, 8)] and parse_boxes("") == []
    for line in ("1 2 3", "1 2 3 4 5", "1 2 3 4.5"):
        with pytest.raises(ValueError, match=f"boxes has '{line}' in line 2; write x, y, width, height"):
            parse_boxes(f"0 0 8 8\n{line}")


def flat(name: str, colour: float, alpha: float, width: int, height: int, **where) -> Layer:
    return Layer(name, torch.tensor([colour, colour, colour, alpha]).expand(height, width, 4).clone(), **where)


def test_what_an_autoencoder_is_shown():
    """Against the definition, pixel by pixel: a half-transparent layer in a group of opacity 0.5 over a background smaller than the canvas."""
    hidden = flat("hidden", 1.0, 1.0, 64, 48, visible=False)
    group = Group("group", (flat("front", 0.8, 0.5, 20, 10, x=18, y=20),), opacity=0.5)
    document = Document(60, 48, (flat("back", 0.2, 1.0, 60, 30), hidden, group))
    regions = snap([(16, 16, 32, 16)], 60, 48)
    assert [layer.name for layer in visible(document, 60, 48)] == ["back", "front"]
    merged, back, front = pictures(document, regions)
    assert merged.shape == back.shape == (48, 64, 4) and front.shape == (16 + 32, 32 + 32, 4)
    for y in range(48):
        for x in range(64):
            ground = 1.0 if x < 60 and y < 30 else 0.0
            assert back[y, x].tolist() == pytest.approx([0.2 * ground] * 3 + [ground])
            over = 0.25 if 18 <= x < 38 and 20 <= y < 30 else 0.0
            alpha = over + ground * (1 - over)
            assert merged[y, x, 3] == pytest.approx(alpha)
            if alpha:
                assert merged[y, x, 0] == pytest.approx((0.8 * over + 0.2 * ground * (1 - over)) / alpha, abs=1e-6)
            assert front[y, x].tolist() == pytest.approx([0.8, 0.8, 0.8, 0.25] if over else [0.0] * 4)  # its box is 16, 16: the token around it


def test_codes_fill_their_boxes_and_nothing_else():
    regions = snap([(16, 16, 32, 16), (0, 0, 16, 48)], 64, 48)
    latent = torch.randn(5, 4, 6, 8)
    codes = [torch.randn(5, 6, 8), torch.randn(5, 6, 8), torch.randn(5, 2 + 4, 4 + 4), torch.randn(5, 6 + 4, 2 + 4)]
    wanted = latent.clone()
    wanted[:, 0], wanted[:, 1] = codes[:2]
    wanted[:, 2, 2:4, 2:6] = codes[2][:, 2:4, 2:6]
    wanted[:, 3, :, :2] = codes[3][:, 2:8, 2:4]
    assert torch.equal(filled(latent, regions, iter(codes)), wanted)
    with pytest.raises(ValueError, match=r"vae encodes layers to \(5, 3, 4\), and latent has \(5, 6, 8\); use the VAE that Region Layers had"):
        filled(latent, regions, [code[:, ::2, ::2] for code in codes])


def test_a_document_that_does_not_fit_its_boxes_is_refused():
    regions = snap([(16, 16, 16, 16)], 64, 48)
    back, front = flat("back", 0.2, 1.0, 64, 48), flat("front", 0.8, 1.0, 16, 16, x=16, y=16)
    with pytest.raises(ValueError, match=r"layers has a canvas of 200 x 48 pixels, and Region Layers one of 64 x 48; set .* to 208 and 48"):
        pictures(Document(200, 48, (back, front)), regions)
    with pytest.raises(ValueError, match="layers has 0 visible layers, and latent has boxes for 1 foregrounds"):
        pictures(Document(64, 48), regions)
    for x, y, beyond in ((15, 16, True), (16, 17, True), (40, 40, True), (16, 16, False)):
        document = Document(64, 48, (back, Layer("front", front.image, x, y)))
        if beyond:
            with pytest.raises(ValueError, match=rf"layer 'front' \(at {x}, {y}, 16 x 16\) reaches out of its box \(16, 16, 16 x 16\)"):
                pictures(document, regions)
        else:
            pictures(document, regions)
    corner = snap([(48, 32, 16, 16)], 64, 48)
    pictures(Document(64, 48, (back, Layer("front", front.image, 56, 40))), corner)  # the canvas cuts it, and its box with it


def test_grey_blending_is_the_formula_of_the_paper():
    image = torch.rand(5, 7, 4, dtype=torch.float64)
    colour, alpha = image[..., :3] * 2 - 1, image[..., 3:] * 2 - 1
    torch.testing.assert_close(grey_blended(image) * 2 - 1, (0.5 * alpha + 0.5) * colour)


def transparent_decoder(width: int, blocks: int, hidden: int, channels: int, tail: bool = False) -> dict[str, torch.Tensor]:
    """Random weights under the published names; tail: with ours, for clips."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"fc_in": (width, channels), "encoder.ln": (width,)}
    if tail:
        shapes |= {"tail.time": (4 * width, width), "tail.up.0": (256, width, 1, 1), "tail.up.1": (128, 64, 1, 1), "tail.up.2": (64, 32, 1, 1)}
        shapes |= {f"tail.mix.{number}": (size, size, 3, 3) for number, size in enumerate((64, 32, 16))} | {"tail.out": (4, 16, 1, 1)}
    else:
        shapes["fc_out"] = (256, width)
    for index in range(blocks):
        layer = f"encoder.layers.encoder_layer_{index}."
        shapes |= {f"{layer}ln_1": (width,), f"{layer}ln_2": (width,), f"{layer}self_attention.in_proj": (3 * width, width)}
        shapes |= {f"{layer}self_attention.out_proj": (width, width), f"{layer}mlp.0": (hidden, width), f"{layer}mlp.3": (width, hidden)}
    state = {}
    for name, shape in shapes.items():
        join = "_" if name.endswith("in_proj") else "."
        weight = torch.randn(shape, generator=generator) * (math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1) + (len(shape) == 1)
        state[f"decoder.{name}{join}weight"] = weight
        state[f"decoder.{name}{join}bias"] = torch.randn(shape[0], generator=generator) * 0.1
    if tail:
        state["decoder.layer_spacing"] = torch.tensor([4])
    return state


def in_float64(state, latent, regions: Regions) -> torch.Tensor:
    """The decoder over again: torch's MultiheadAttention, diffusers' rotary embedding, loops over layers: `(frames, h, w, 4)` each, in -1..1."""
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="the reference")
    rotary = pytest.importorskip("diffusers.models.transformers.transformer_flux").FluxPosEmbed(theta=10000, axes_dim=(8, 28, 28))
    state = {name.removeprefix("decoder."): value.double() for name, value in state.items()}

    def linear(x, name):
        return nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    frames, spacing = regions.frames, int(state.get("layer_spacing", 1))
    places = [
        (layer, frame, r, c)
        for layer, (x, y, w, h) in enumerate(regions.boxes)
        for frame in range(frames)
        for r in range(y, y + h)
        for c in range(x, x + w)
    ]
    x = linear(torch.stack([latent[:, layer * frames + frame, r, c].double() for layer, frame, r, c in places])[None], "fc_in")
    width = x.shape[-1]
    tables = rotary(torch.tensor([(layer * spacing + frame, r, c) for layer, frame, r, c in places]))
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
    x = norm(x, "encoder.ln")[0]
    found = []
    for layer, (left, top, w, h) in enumerate(regions.boxes):
        grid = torch.zeros(frames, h, w, width, dtype=torch.float64)
        for (owner, frame, r, c), token in zip(places, x, strict=True):
            if owner == layer:
                grid[frame, r - top, c - left] = token
        found.append(convolved(grid, state) if "tail.out.weight" in state else patched(linear(grid[0], "fc_out")))
    return found


def patched(tokens):
    """The published end: each token is 4 channels of 8 x 8 pixels. `(1, h, w, 4)`."""
    height, width, _ = tokens.shape
    picture = torch.zeros(1, 8 * height, 8 * width, 4, dtype=torch.float64)
    for r in range(height):
        for c in range(width):
            picture[0, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] = tokens[r, c].view(4, 8, 8).permute(1, 2, 0)
    return picture


def convolved(grid, state):
    """Our end, a frame at a time."""
    pictures = []
    for number, frame in enumerate(grid):
        times = [frame]
        if number:
            times = nn.functional.linear(frame, state["tail.time.weight"], state["tail.time.bias"]).split(frame.shape[-1], -1)
        for y in times:
            y = y.permute(2, 0, 1)[None]
            for stage in range(3):
                z = nn.functional.conv2d(y, state[f"tail.up.{stage}.weight"], state[f"tail.up.{stage}.bias"])
                y = z.new_zeros(1, z.shape[1] // 4, 2 * z.shape[2], 2 * z.shape[3])
                for place in range(4):
                    y[:, :, place // 2 :: 2, place % 2 :: 2] = z[:, place::4]
                y = y + nn.functional.conv2d(y * y.sigmoid(), state[f"tail.mix.{stage}.weight"], state[f"tail.mix.{stage}.bias"], padding=1)
            pictures.append(nn.functional.conv2d(y * y.sigmoid(), state["tail.out.weight"], state["tail.out.bias"])[0].permute(1, 2, 0))
    return torch.stack(pictures)


def check_decoded(network, latent, regions, wanted):
    """In 0..1 and clamped as `(frames, h, w, 4)`, and before that as training sees it; with and without the first two layers."""
    pictures, layers = network.pictures(latent, regions), network(latent, regions)
    assert len(pictures) == len(layers) == len(wanted) == len(regions.boxes)
    for picture, layer, right in zip(pictures, layers, wanted, strict=True):
        torch.testing.assert_close(picture.movedim(1, -1).double(), right, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.double(), ((right + 1) / 2).clamp(0, 1), rtol=0, atol=5e-6)
    for later, layer in zip(network(latent, regions, 2), layers[2:], strict=True):
        assert torch.equal(later, layer)
    values = torch.cat([right.flatten() for right in wanted])
    assert (values.abs() > 1).any() and (values.abs() < 1).double().mean() > 0.3, "clamped values prove nothing"


@torch.no_grad()
def test_the_transparent_decoder_is_the_published_network():
    state = transparent_decoder(width=128, blocks=2, hidden=96, channels=16)
    regions = Regions(6, 4, ((0, 0, 6, 4), (0, 0, 6, 4), (1, 1, 3, 2), (2, 0, 4, 3)))
    latent = torch.randn(16, 4, 4, 6)
    check_decoded(build(state), latent, regions, in_float64(state, latent, regions))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_the_transparent_decoder_with_a_convolutional_end(frames):
    """Three latent frames are nine: one, four and four."""
    state = transparent_decoder(width=128, blocks=2, hidden=96, channels=16, tail=True)
    regions = Regions(6, 4, ((0, 0, 6, 4), (0, 0, 6, 4), (1, 1, 3, 2), (2, 0, 4, 3)), frames)
    latent = torch.randn(16, 4 * frames, 4, 6)
    wanted = in_float64(state, latent, regions)
    assert wanted[2].shape == (1 + 4 * (frames - 1), 16, 24, 4)
    check_decoded(build(state), latent, regions, wanted)


@torch.no_grad()
@pytest.mark.parametrize(("width", "hidden", "tail", "frames"), [(128, 512, False, 1), (64, 64, False, 1), (64, 64, True, 3), (128, 512, True, 3)])
def test_the_memory_that_the_decoder_asks_for(width, hidden, tail, frames):
    """Against the most that PyTorch's profiler sees allocated."""
    network = TransparentDecoder(16, width, 2, hidden, tail=tail)
    regions = Regions(16, 12, ((0, 0, 16, 12),) * 3 + ((2, 2, 8, 8),) * 2, frames)
    latent = torch.randn(16, 5 * frames, 12, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        network.pictures(latent, regions, WHOLE)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most <= network.memory(regions, WHOLE) * 1.01 <= 2 * most


@torch.no_grad()
def test_the_decoder_reports_each_block_and_layer_and_stops_where_it_is_told():
    network, regions, steps = TransparentDecoder(16, 64, 3, 64), Regions(3, 2, ((0, 0, 3, 2),) * 5), []

    def report():
        steps.append(len(steps))
        if len(steps) == 7:
            raise InterruptedError

    network.pictures(torch.randn(16, 5, 2, 3), regions, 2, report)
    assert len(steps) == 3 + 3
    with pytest.raises(InterruptedError):
        network(torch.randn(16, 5, 2, 3), regions, 2, report)
    assert len(steps) == 7


def test_every_part_of_the_decoder_of_clips_gets_a_gradient():
    network = TransparentDecoder(16, 64, 1, 64, tail=True, layer_spacing=4)
    pictures = network.pictures(torch.randn(16, 9, 2, 3), Regions(3, 2, ((0, 0, 3, 2),) * 3, 3))
    torch.stack(pictures).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("tail", [False, True])
def test_weights_are_written_as_they_are_read(tail):
    state = transparent_decoder(width=128, blocks=2, hidden=96, channels=16, tail=tail)
    written = published(build(state))
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) and written[name].dtype == value.dtype for name, value in state.items())


def test_a_decoder_of_pictures_refuses_a_clip():
    network = build(transparent_decoder(width=64, blocks=1, hidden=64, channels=16))
    with pytest.raises(ValueError, match="the transparent decoder is for pictures, and the layers have 3 latent frames; use one for clips"):
        network(torch.zeros(16, 6, 1, 1), Regions(1, 1, ((0, 0, 1, 1),) * 2, 3))


def test_other_weights_are_no_transparent_decoder():
    state = transparent_decoder(width=64, blocks=1, hidden=64, channels=16)
    with pytest.raises(ValueError, match=r"no transparent decoder: it needs decoder\.fc_in.weight, .* the tensors are layer_pe"):
        build({"layer_pe": torch.zeros(1)})
    lacking = {name: value for name, value in state.items() if "ln_2" not in name}
    with pytest.raises(ValueError, match=r"not the weights of a transparent decoder: .*ln_2"):
        build(lacking)
