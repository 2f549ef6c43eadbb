"""The layered model: its caption, its drawings, its networks against the stock ones, and what the weights in this repository make."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tessera.models.default import networks as video
from tessera.models.default.vocabulary import COLOURS, MOTIONS
from tessera.models.layers.default import networks, sampling, vocabulary
from tessera.models.layers.default.vocabulary import SHAPES, Caption, Kind
from tessera.models.layers.document import Document, Layer
from tessera.models.layers.regions import LAYER_SPACING, TRAINED, WHOLE, Regions, beyond_training, filled, pictures, positions
from tessera.models.layers.transparent_vae import grey_blended
from tessera.training.layers import dataset, drawn, evaluate, export, train, train_decoder

KINDS = st.builds(Kind, st.integers(0, len(COLOURS) - 1), st.integers(0, len(SHAPES) - 1), st.integers(-1, len(MOTIONS) - 1))
CAPTIONS = st.builds(Caption, st.lists(KINDS, max_size=vocabulary.MAX_OBJECTS).map(tuple), st.integers(-1, len(COLOURS) - 1))


@given(CAPTIONS)
def test_a_caption_survives_being_written(caption):
    assert vocabulary.parse(vocabulary.text(caption)) == caption


@given(CAPTIONS)
def test_words_can_be_read_from_a_token(caption):
    """Rows of a Hadamard matrix are orthogonal: the sum of a token's words says which they are."""
    table = vocabulary.word_vectors()
    assert torch.equal(table @ table.T, 64 * torch.eye(len(vocabulary.WORDS)))
    *objects, ground = (vocabulary.embed(caption) @ table.T / 64).unbind(0)
    for kind, found in zip(caption.kinds, objects, strict=True):
        words = {COLOURS[kind.colour], SHAPES[kind.shape]} | ({MOTIONS[kind.motion]} if kind.motion >= 0 else set())
        assert {vocabulary.WORDS[index] for index in found.nonzero().flatten().tolist()} == words
    assert {vocabulary.WORDS[index] for index in ground.nonzero().flatten().tolist()} == (
        {COLOURS[caption.ground], "on"} if caption.ground >= 0 else set()
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("red dog", "'dog' is not in the vocabulary"),
        ("red", "has no shape"),
        ("disc on blue", "has no colour"),
        ("red disc blue", "two of a kind: red and blue"),
        ("red disc on blue on green", "2 times"),
        ("red disc on blue ring", "name one colour"),
        (", ".join(["red disc"] * 9), "9 objects"),
    ],
)
def test_a_caption_that_cannot_be_understood_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        vocabulary.parse(text)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("disc", math.pi), ("square", 4), ("triangle", 2), ("diamond", 2), ("ring", 0.7 * math.pi), ("cross", 4 - 4 * 0.64**2)],
)
@pytest.mark.parametrize(("width", "height"), [(16, 16), (48, 32), (96, 80)])
def test_shapes_have_their_area_and_place(shape, area, width, height):
    """Area from geometry, on the half width and height inside the margin."""
    alpha = drawn.coverage(Kind(0, SHAPES.index(shape)), width, height)
    half = (width / 2 - drawn.MARGIN) * (height / 2 - drawn.MARGIN)
    assert float(alpha.sum()) == pytest.approx(area * half, rel=0.05)  # samples on the edge count as inside
    assert torch.allclose(alpha, alpha.flip(1))
    assert alpha.shape == (height, width) and alpha[0].max() == 0  # nothing touches the border of the box


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_moving_shapes_cross_their_box(motion, axis, sign):
    clip = drawn.foreground(Kind(0, 0, MOTIONS.index(motion)), 64, 48, 9)[..., 3]
    grid = torch.stack(torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij"))
    centres = (clip[:, None] * grid).sum((2, 3)) / clip.sum((1, 2))[:, None]
    steps = centres.diff(dim=0)
    assert (steps[:, axis] * sign > 0.5).all() and steps[:, 1 - axis].abs().max() < 1e-3
    assert clip[:, 0].max() == clip[:, -1].max() == clip[:, :, 0].max() == clip[:, :, -1].max() == 0


@settings(max_examples=30)
@given(st.integers(0, 50), st.integers(0, 10**6))
def test_layouts_are_inside_the_canvas_and_show_every_kind(foregrounds, seed):
    generator = torch.Generator().manual_seed(seed)
    regions, caption = drawn.layout(foregrounds, generator), drawn.caption(foregrounds, generator)
    assert len(regions.boxes) == foregrounds + 2
    for x, y, width, height in regions.boxes:
        assert min(x, y) >= 0 and min(width, height) >= 1 and x + width <= regions.width and y + height <= regions.height
        assert (width in dataset.SIZES and height in dataset.SIZES) or (width, height) == (regions.width, regions.height)
    assert set(drawn.assign(caption, foregrounds, generator)) == set(caption.kinds)


def test_one_region_is_the_stock_transformer():
    """A single layer over the whole canvas without an embedding is what Wan's own forward computes."""
    torch.manual_seed(0)
    model = networks.LayeredTransformer().eval()
    stock = video.init_transformer(video.build_transformer(layers=4)).eval()
    for value in stock.head.parameters():
        torch.nn.init.normal_(value, std=0.1)
    model.load_state_dict({**stock.state_dict(), "layer_pe": torch.zeros(model.layer_pe.shape)})
    regions = Regions(6, 4, ((0, 0, 6, 4),), 3)
    x, context = torch.randn(2, 16, 3, 8, 12), torch.randn(2, 5, 64)
    t = torch.tensor([900.0, 200.0])
    where = dict(positions=positions(regions, LAYER_SPACING).expand(2, -1, -1), layers=regions.ids[:, 0].expand(2, -1))
    with torch.no_grad():
        made = model(regions.crop(x, 2)[:, :, None], t, context, **where)
        wanted = regions.crop(stock(x, t, context), 2)[:, :, None]
    assert wanted.std() > 0.1 and torch.allclose(made, wanted, atol=1e-5)


def _work(folder, frames: int):
    """A training folder with a random VAE: its table has only the boxes of the layouts in it."""
    torch.manual_seed(0)
    vae = video.init_vae(video.build_vae()).eval()
    generator = torch.Generator().manual_seed(3)
    samples, table = [], {}
    with torch.no_grad():
        while len(samples) < 5:
            found = dataset.sample(frames, generator)
            if len(found["boxes"]) > 7:
                continue
            merged, back, _ = dataset.pictures_of(found, frames, generator)
            samples.append(found | dict(whole=dataset.whole_latents(vae, merged, back).half()))
            for kind, (_, _, width, height) in zip(found["shown"].tolist(), dataset.boxes_of(found)[2:], strict=True):
                table[(*kind, width, height)] = dataset.foreground_latents(vae, [Kind(*kind)], width, height, frames)[0].half()
    (folder / f"layouts{frames}").mkdir()
    torch.save(samples, folder / f"layouts{frames}" / "000.pt")
    torch.save(table, dataset.table_path(str(folder), frames))
    return train.Layouts(str(folder), frames, dataset.shards(str(folder), frames))


@pytest.mark.parametrize("frames", [1, 9])
def test_training_sees_what_a_host_samples(tmp_path, frames):
    """Strips are Regions.crop of the layers on their canvases, and so are the decoder's targets; padding does not change a layout's result."""
    layouts = _work(tmp_path, frames)
    assert layouts.tokens.tolist() == sorted(layouts.tokens.tolist())
    torch.manual_seed(0)
    model = train.start().eval()
    single = []
    for index, sample in enumerate(layouts.samples):
        regions = layouts.regions(index)
        canvas = torch.zeros(1, 16, len(regions.boxes) * regions.frames, 2 * regions.height, 2 * regions.width)
        pictures = []
        for layer, (x, y, width, height) in enumerate(regions.boxes):
            if layer < WHOLE:
                latent = sample["whole"][layer]
            else:
                kind = Kind(*sample["shown"][layer - WHOLE].tolist())
                latent = layouts.table[(*kind, width, height)]
                pictures.append(drawn.foreground(kind, 16 * width, 16 * height, frames).movedim(-1, 1) * 2 - 1)
            times = slice(layer * regions.frames, (layer + 1) * regions.frames)
            canvas[0, :, times, 2 * y : 2 * (y + height), 2 * x : 2 * (x + width)] = latent
        assert torch.equal(layouts.strip(index).float(), regions.crop(canvas, 2)[0])
        latent, targets, fine = train_decoder.example(layouts, index, torch.Generator(), 0.0)
        assert torch.allclose(regions.crop(latent[None], 2), video.unwhiten(regions.crop(canvas, 2)[:, :, None])[:, :, 0])
        made = train_decoder.build().pictures(latent, fine, WHOLE)
        for target, picture, right in zip(targets, made, pictures, strict=True):
            assert torch.equal(target, right) and picture.shape == right.shape
        single.append(_velocity(model, layouts, range(index, index + 1)))
    together = _velocity(model, layouts, range(len(layouts.samples)))
    for made, alone in zip(together, single, strict=True):
        assert torch.allclose(made[..., : alone.shape[-1]], alone[0], atol=1e-4)


@torch.no_grad()
def _velocity(model, layouts, which):
    contexts = [vocabulary.embed(dataset.caption_of(layouts.samples[index])) for index in which]
    return model(
        train.strips(layouts, which), torch.full((len(which),), 500.0), **networks.collate([layouts.regions(index) for index in which], contexts)
    )


def test_a_channel_counts_as_it_shows(tmp_path):
    """Of a decoder that shows the first channel doubled, the second as it is, and no other. It is given Wan's latents, not normalised ones."""

    class Decoder:
        def decode(self, latent):
            return 2 * latent[:, :1] + latent[:, 1:2]

    whole, foregrounds = train.channel_weights(Decoder(), _work(tmp_path, 1), many=5)
    errors = [(2 * video.WAN21_STD[0]) ** 2, video.WAN21_STD[1] ** 2]
    assert whole[:2].tolist() == pytest.approx([0.25 + 0.75 * error / (sum(errors) / 16) for error in errors], rel=0.1)
    assert (whole[2:] == 0.25).all() and whole.mean() == pytest.approx(1) and (foregrounds == 1).all()


def test_the_loss_token_by_token():
    """Against loops in float64: padding counts nothing, the merged picture more, and each kind of layer has its channels' weights."""
    layers, there = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    x0, noise, v = torch.randn(3, 2, 16, 1, 2, 10)
    weights = torch.rand(2, 16)
    given = dict(layers=layers, pad=torch.zeros(2, 1, 1, 5).masked_fill(~there[:, None, None], -math.inf))
    found = train.flow_loss(lambda x, t, **_: v, x0, noise, torch.tensor([0.3, 0.8]), given, weights)
    total = counted = 0.0
    for sample in range(2):
        for token in range(5):
            if there[sample, token]:
                count = train.MERGED if layers[sample, token] == 0 else 1.0
                scale = count * weights[int(layers[sample, token] > 1)].double()
                error = (v - noise + x0)[sample, :, 0, :, 2 * token : 2 * token + 2].double().square()
                total += float((error * scale[:, None, None]).sum())
                counted += float(4 * scale.sum())
    assert float(found) == pytest.approx(total / counted, rel=1e-5)


def test_reading_layers_knows_right_from_wrong():
    kinds = [Kind(0, SHAPES.index("disc")), Kind(2, SHAPES.index("cross"))]
    right = drawn.foreground(kinds[1], 48, 32)
    fit, box, named = evaluate.read(right, kinds)
    assert fit == pytest.approx(1, abs=1e-6) and named and box < 0.75
    assert not evaluate.read(drawn.foreground(Kind(1, SHAPES.index("cross")), 48, 32), kinds)[2]  # a green one is not named
    assert evaluate.read(drawn.foreground(Kind(0, SHAPES.index("ring")), 48, 32), [kinds[1]])[0] < 0.6
    assert evaluate.read(torch.zeros(1, 32, 48, 4), kinds)[0] == 0


@pytest.fixture(scope="module")
def weights():
    return evaluate.load(export.HERE)


@given(st.integers(1, 50), st.booleans(), st.integers(0, 2**32))
def test_layouts_of_the_training_are_within_what_the_file_says(foregrounds, clip, seed):
    made = drawn.layout(min(foregrounds, dataset.IN_CLIPS) if clip else foregrounds, torch.Generator().manual_seed(seed), 8 if clip else 10)
    regions = Regions(made.width, made.height, made.boxes, 3 if clip else 1)
    assert not beyond_training(json.dumps(export.TRAINED_ON), regions)


@pytest.mark.parametrize(
    ("size", "boxes", "frames", "found"),
    [
        ((8, 8), [(0, 0, 8, 8)], 1, ["a box of 128 pixels (16 to 96)"]),
        ((32, 8), [(0, 0, 2, 2)], 1, ["width 512 (96 to 160)"]),
        ((9, 5), [], 3, ["width 144 (96 to 128)", "height 80 (96 to 128)"]),
        ((8, 8), [(0, 0, 5, 5)] * 7, 1, ["boxes 2.7 times the canvas together (up to 2.3)"]),
        ((8, 8), [(0, 0, 1, 1)] * 7, 5, ["7 foregrounds (up to 6)", "5 latent frames (1 or 3)"]),
    ],
)
def test_what_the_model_has_not_seen_is_said(size, boxes, frames, found):
    regions = Regions(*size, ((0, 0, *size),) * WHOLE + tuple(boxes), frames)
    assert beyond_training(json.dumps(export.TRAINED_ON), regions) == found


def test_the_file_says_what_it_was_trained_on():
    with safe_open(export.HERE / export.EMBEDDING, "pt") as file:
        assert json.loads(file.metadata()[TRAINED]) == json.loads(json.dumps(export.TRAINED_ON))


def test_the_weights_are_small():
    files = [export.HERE / file for file in (export.VAE, export.TRANSFORMER, export.EMBEDDING, export.DECODER)]
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def test_pictures_of_held_out_layouts(weights):
    """A sample of what bench/results/layered_model.json has for a hundred layouts."""
    figures, _ = evaluate.evaluate(weights, 12, 1, torch.Generator().manual_seed(77))
    assert sum(row["merged_db"] for row in figures["rows"]) / 12 == pytest.approx(figures["merged_db"], abs=1e-2)
    assert figures["merged_db"] >= 23 and figures["merged_db"] >= figures["another_layout_db"] + 6
    assert figures["iou"] >= 0.8 and figures["iou"] >= figures["filled_box_iou"] + 0.1
    assert figures["named"] >= 0.8


@torch.no_grad()
def test_layers_that_are_encoded_come_back(weights):
    """The real VAE and decoder on a drawn layout of seven shapes."""
    vae, _, decoder = weights
    generator = torch.Generator().manual_seed(0)
    sample = dataset.sample(1, generator)
    _, back, layers = dataset.pictures_of(sample, 1, generator)
    height, width, _ = back.shape
    boxes = dataset.boxes_of(sample)
    regions = Regions(*boxes[0][2:], tuple(boxes))
    placed = [Layer("shape", layer[0], x, y) for (x, y, _, _), layer in layers]
    document = Document(width, height, (Layer("ground", torch.cat([back, torch.ones(height, width, 1)], -1)), *placed))
    codes = [vae.encode((grey_blended(picture) * 2 - 1).movedim(-1, 0)[None, :, None])[0, :, 0] for picture in pictures(document, regions)]
    latent = filled(torch.zeros(16, len(boxes), height // 8, width // 8), regions, codes)
    alphas, colours, fits = [], [], []
    for made, (_, right) in zip(decoder(latent, regions.finer(2), WHOLE), layers, strict=True):
        solid = right[..., 3] > 0.99
        alphas.append((made - right)[..., 3].square().mean())
        colours.append((made - right)[solid][:, :3].square().mean())
        fits.append(evaluate.iou(made[..., 3], right[..., 3]))
    alpha, colour = (float(-10 * torch.stack(errors).mean().log10()) for errors in (alphas, colours))
    assert alpha >= 27 and colour >= 40 and sum(fits) / len(fits) >= 0.95


def test_a_ground_alone_has_figures_without_layers(weights):
    figures, _ = evaluate.evaluate(weights, 1, 1, torch.Generator().manual_seed(1), 2)
    assert figures["layers"] == "2 to 2" and figures["iou"] is None and figures["merged_db"] > 30 and len(figures["rows"]) == 1


def test_what_moves_in_a_clip_stays_in_its_box(weights):
    vae, model, decoder = weights
    caption = vocabulary.parse("red disc moving right on blue")
    regions = Regions(8, 6, ((0, 0, 8, 6),) * 2 + ((1, 1, 5, 3),), 3)
    made = sampling.decode(vae, decoder, sampling.latents(model, regions, caption, 5), regions)
    assert made.merged.shape == (9, 96, 128, 3) and made.layers.shape == (1, 9, 96, 128, 4)
    alpha = made.layers[0, ..., 3]
    centres = (alpha.sum(1) * torch.arange(128)).sum(1) / alpha.sum((1, 2))
    assert centres[-1] - centres[0] > 15 and alpha[:, :, :16].max() == 0
    assert evaluate.read(made.layers[0, :, 16:64, 16:96], list(caption.kinds))[0] > 0.7
