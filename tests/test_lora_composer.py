"""LoRA Composer without a host: boxes, isolation, re-initialisation and the enhancement loss, against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.models.patchers.lora_composer.composer import ALL, BLOCK_TOKENS, Call, Composer
from tessera.models.patchers.lora_composer.concepts import Box, Concept, Delta, validate
from tessera.models.patchers.lora_composer.concepts import fits as _fits
from tessera.models.patchers.lora_composer.isolation import Isolation, skip
from tessera.models.patchers.lora_composer.latent import Schedule, enhancement_loss, reinitialise
from tessera.models.patchers.lora_composer.maps import Maps

CANVAS = (96, 128)


def concept(box: Box, words: tuple[int, ...] = (1, 2)) -> Concept:
    return Concept(box, torch.zeros(1, 4, 8), words, {})


@pytest.mark.parametrize("grid", [(12, 16), (6, 8), (7, 9), (3, 4), (1, 1)])
def test_a_box_s_cells_are_those_wholly_inside(grid):
    height, width = grid
    for _ in range(20):
        (left, right), (top, bottom) = sorted(torch.randint(0, 129, (2,)).tolist()), sorted(torch.randint(0, 97, (2,)).tolist())
        rows, columns = Box(left, top, right, bottom).cells(height, width, CANVAS)
        # Fractions of the picture, multiplied out: a cell's edges are row / height and (row + 1) / height.
        assert list(range(rows.start, rows.stop)) == [r for r in range(height) if r * 96 >= top * height and (r + 1) * 96 <= bottom * height]
        assert list(range(columns.start, columns.stop)) == [c for c in range(width) if c * 128 >= left * width and (c + 1) * 128 <= right * width]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box(0, 0, 64, 96), Box(63, 95, 128, 96)], "boxes of concept 1 .* and concept 2 .* overlap"),
        ([Box(8, 8, 8, 16)], "concept 1 has an empty box"),
        ([Box(0, 0, 64, 96), Box(64, 0, 136, 96)], "concept 2's box .* leaves the canvas of 128 x 96"),
        ([Box(-8, 0, 64, 96)], "concept 1's box .* leaves the canvas"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        validate(boxes, CANVAS)
    validate([Box(0, 0, 64, 96), Box(64, 0, 128, 96)], CANVAS)  # side by side is no overlap


@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        ((8, 2), (3, 6), r"concept 2's LoRA is damaged: to_q has matrices of ranks 2 and 3"),
        ((8, 2), (2, 7), r"concept 2's LoRA belongs to another base: its to_q goes from 7 to 8 channels, the model's from 6 to 8"),
        ((9, 2), (2, 6), "belongs to another base"),
        ((8, 7), None, "belongs to another base"),
    ],
)
def test_loras_that_do_not_fit_are_refused(up, down, message):
    layer = torch.nn.Linear(6, 8)
    assert _fits(2, "to_q", layer, [Delta(torch.zeros(8, 2), torch.zeros(2, 6)), Delta(torch.zeros(8, 6))])
    with pytest.raises(ValueError, match=message):
        _fits(2, "to_q", layer, [Delta(torch.zeros(up), None if down is None else torch.zeros(down))])
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="concept 2's LoRA is damaged: to_q has NaN or infinity"):
            _fits(2, "to_q", layer, [Delta(torch.zeros(8, 2), torch.full((2, 6), value))])
        with pytest.raises(ValueError, match="concept 2's LoRA is damaged: to_q has NaN or infinity"):
            _fits(2, "to_q", layer, [Delta(torch.full((8, 6), -value))])


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match=r"model is a Linear; LoRA Composer supports SD1\.5, SDXL, Flux, Chroma, Wan and Qwen-Image"):
        Composer(torch.nn.Linear(2, 2), [concept(Box(0, 0, 64, 96))], CANVAS, layers=ALL)


LABELS = torch.zeros(30, 36, dtype=torch.int64)
LABELS[3:20, 1:18] = 1
LABELS[3:25, 18:30] = 2
LABELS[26:30, 0:5] = 3
TEXTS = {"unet": (), "negative prompt": (9,), "prompts": (9, 5, 7, 11)}


def written_out(text: tuple[int, ...], isolate: bool) -> torch.Tensor:
    """bool `(tokens, tokens)`: who reads whom, token by token."""
    kinds = [("text", 0)] * (text[0] if text else 0)
    for index, length in enumerate(text[1:], 1):
        kinds += [("text", index)] * length
    kinds += [("image", label) for label in LABELS.flatten().tolist()]

    def reads(query, key):
        (kind, mine), (other, its) = query, key
        if kind == "text" and mine > 0:
            return its == mine  # a concept's prompt: itself and its box
        if other == "text":
            return its == (mine if len(text) > 1 else 0)
        return mine == 0 or its in (0, mine) or not isolate

    distinct = sorted(set(kinds))
    table = torch.tensor([[reads(a, b) for b in distinct] for a in distinct])
    place = torch.tensor([distinct.index(kind) for kind in kinds])
    return table[place][:, place]


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_isolation_is_attention_over_what_may_be_read(text, isolate):
    isolation = Isolation(3, LABELS.flatten(), text, isolate, torch.device("cpu"))
    allowed = written_out(text, isolate)
    tokens = len(allowed)
    assert tokens >= BLOCK_TOKENS
    assert torch.equal(isolation.allowed(), allowed)
    q, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
    scores = (q.double() @ k.double().transpose(-1, -2) * 0.3).masked_fill(~allowed, -math.inf)
    wanted = scores.softmax(-1) @ v.double()
    blocks = isolation.blocks()
    skipped = skip(blocks, q, k, v, 0.3)
    assert skipped is not None
    assert (blocks.density < 1) == (not allowed.all())
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=isolation.bias(q.dtype), scale=0.3)
    for got in (skipped, dense):
        assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("way", ["blocks", "mask"])
def test_between_concepts_attention_is_exactly_zero(way):
    """A value that only one concept has: no other concept's output holds any of it, however strongly its key answers."""
    isolation = Isolation(3, LABELS.flatten(), (), True, torch.device("cpu"))
    labels = LABELS.flatten()
    q, k = torch.randn(1, 1, len(labels), 16), torch.randn(1, 1, len(labels), 16) * 8
    v = torch.nn.functional.one_hot(labels, 16).float()[None, None]
    if way == "blocks":
        out = skip(isolation.blocks(), q, k, v)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=isolation.bias(q.dtype))
    for mine in (1, 2, 3):
        for other in (1, 2, 3):
            share = out[0, 0, labels == mine, other]
            assert torch.equal(share, torch.zeros_like(share)) if mine != other else share.max() > 0
        assert out[0, 0, labels == 0, mine].max() > 0, "the background reads every concept"
        assert out[0, 0, labels == mine, 0].max() > 0, "and every concept the background"


def maps_with(size: tuple[int, int], cross: torch.Tensor, concepts: list[Concept], own: torch.Tensor | None = None) -> Maps:
    """cross: `(concepts, batch, height * width, tokens)`, split over two layers whose mean it is."""
    maps = Maps(size)
    for index, (values, concept) in enumerate(zip(cross, concepts, strict=True)):
        maps.cross[index] = [values[..., list(concept.words)] * share for share in (0.5, 1.5)]
    maps.own = [] if own is None else [own]
    return maps


def test_reinitialisation_copies_the_window_that_answers_most():
    noise = torch.randn(2, 4, 24, 31)  # 6 x 8 cells of 4, of which the last column is not whole
    boxes = [Box(0, 0, 48, 32), Box(64, 48, 128, 96)]
    cross = torch.rand(2, 2, 6, 8, 4) * 0.01
    best = {(0, 0): (3, 4), (0, 1): (1, 2), (1, 0): (0, 0), (1, 1): (3, 3)}  # (concept, sample) -> corner of the window
    window = {0: (2, 3), 1: (3, 4)}
    for (index, sample), (row, column) in best.items():
        cross[index, sample, row : row + window[index][0], column : column + window[index][1], 1:3] += 1.0
        cross[index, sample, 5, 7, 3] = 100.0  # a word that does not count
    concepts = [concept(box) for box in boxes]
    out = reinitialise(noise, maps_with((6, 8), cross.flatten(2, 3), concepts), concepts, CANVAS)
    for sample in (0, 1):
        wanted = noise[sample].clone()
        for index, (first, size) in enumerate((((0, 0), (8, 12)), ((12, 16), (12, 15)))):
            row, column = (4 * place for place in best[index, sample])
            wanted[:, first[0] : first[0] + size[0], first[1] : first[1] + size[1]] = noise[sample, :, row : row + size[0], column : column + size[1]]
        wanted = (wanted - wanted.mean()) / wanted.std() * noise[sample].std() + noise[sample].mean()
        assert torch.allclose(out[sample], wanted, atol=1e-5)


def loss_by_loops(cross: torch.Tensor, own: torch.Tensor, boxes: list[tuple[int, int, int, int]], words: tuple[int, ...]) -> float:
    """The loss of one picture, cell by cell, in Python's float64. cross: `(concepts, height, width, tokens)`. As in the paper, for two words."""
    height, width = cross.shape[1:3]
    total = 0.0
    for values, (top, left, bottom, right) in zip(cross.tolist(), boxes, strict=True):
        cells = [(r, c) for r in range(top, bottom) for c in range(left, right)]
        best = max(int(len(cells) * 0.2), 1)
        for word in words:

            def smooth(r, c, word=word, values=values):
                weights = {-1: math.exp(-1), 0: 1.0, 1: math.exp(-1)}
                near = {
                    (dr, dc): values[height - 1 - abs(height - 1 - abs(r + dr))][width - 1 - abs(width - 1 - abs(c + dc))][word]
                    for dr in weights
                    for dc in weights
                }
                return sum(weights[dr] * weights[dc] * value for (dr, dc), value in near.items()) / (1 + 2 * math.exp(-1)) ** 2

            def middle(place, first, stop):
                return math.exp(-0.5 * (-1 + 2 * (place - first) / (stop - first - 1)) ** 2)

            bells = {(r, c): middle(r, top, bottom) * middle(c, left, right) for r, c in cells}
            weighted = sorted((smooth(r, c) * bells[r, c] / max(bells.values()) for r, c in cells), reverse=True)
            total += 8 * max(0.0, 1 - sum(weighted[:best]) / best)
            columns = [abs(max(smooth(r, c) for r in range(top, bottom)) - 1) for c in range(left, right)]
            rows = [abs(max(smooth(r, c) for c in range(left, right)) - 1) for r in range(top, bottom)]
            total += 2 * sum(columns) / width + 2 * sum(rows) / height
        outward = [own[r * width + c, i * width + j].item() for r, c in cells for i in range(height) for j in range(width) if (i, j) not in cells]
        total += 10 * sum(sorted(outward, reverse=True)[:best]) / best
    return total


def test_the_enhancement_loss_is_the_formula():
    cross, own = torch.rand(2, 2, 6 * 8, 4), torch.randn(2, 48, 48).softmax(-1)
    concepts = [concept(Box(0, 0, 48, 32)), concept(Box(64, 32, 128, 96), (0, 2))]
    losses = enhancement_loss(maps_with((6, 8), cross, concepts, own), concepts, CANVAS)
    for sample in (0, 1):
        wanted = sum(
            loss_by_loops(cross[[index], sample].view(1, 6, 8, 4), own[sample], [box], words)
            for index, (box, words) in enumerate((((0, 0, 2, 3), (1, 2)), ((2, 4, 6, 8), (0, 2))))
        )
        assert float(losses[sample]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("words", [(1,), (1, 2, 3, 0)])
def test_a_concept_weighs_the_same_however_many_words_name_it(words):
    """Where all words are attended to alike, it is the loss of the paper's two."""
    cross, own = torch.rand(1, 1, 6 * 8, 1).expand(-1, -1, -1, 4), torch.randn(1, 48, 48).softmax(-1)
    losses = []
    for named in ((1, 2), words):
        concepts = [concept(Box(0, 0, 48, 32), named)]
        losses.append(float(enhancement_loss(maps_with((6, 8), cross, concepts, own), concepts, CANVAS)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_maps_are_the_mean_over_the_conditionings_of_a_forward():
    """Two conditionings of two latents in one batch, and one conditioning in a forward of its own."""
    call = object.__new__(Call)
    call.conditionings = 2
    x = torch.rand(4, 3, 2)
    assert torch.equal(call.per_latent(x), torch.stack([(x[0] + x[2]) / 2, (x[1] + x[3]) / 2]))
    call.conditionings = 1
    assert torch.equal(call.per_latent(x[:2]), x[:2])
    assert not Maps((6, 8)).complete and not Maps((6, 8), with_self=True, cross={0: [x]}).complete
    assert Maps((6, 8), cross={0: [x]}).complete


def test_following_the_gradient_brings_a_concept_into_its_box():
    """A map that is the softmax of free scores: after forty steps its word is in the box, all over it, and nowhere else needed."""
    scores = torch.zeros(1, 48, 4, requires_grad=True)
    own = torch.full((1, 48, 48), 1 / 48)
    concepts = [concept(Box(64, 32, 128, 96), (2,))]
    for _ in range(40):
        maps = maps_with((6, 8), scores.softmax(-1)[None], concepts, own)
        (gradient,) = torch.autograd.grad(enhancement_loss(maps, concepts, CANVAS), scores)
        scores = (scores - 5.0 * gradient).detach().requires_grad_(True)
    shown = scores.detach().softmax(-1)[0, :, 2].view(6, 8)
    assert shown[2:, 4:].amax(0).min() > 0.8 and shown[2:, 4:].amax(1).min() > 0.8
    assert float(shown[:, :3].max()) == pytest.approx(0.25, abs=0.01)


def test_the_schedule_is_the_authors():
    """They move the latent at steps 0 to 25 of 50, also at the one whose loss has risen, and not after it."""
    schedule = Schedule(50, 1.0, 1)
    sizes = [schedule.size(step) for step in range(50)]
    assert sizes[0] == 20.0 and sizes[25] == pytest.approx(20 * math.sqrt(1 - 0.5 * 25 / 49))
    assert sizes[26:] == [0.0] * 24
    for step, loss in enumerate([9.0, 10.0, 8.0, 8.5, 8.6, 7.0]):
        assert schedule.record(step, torch.tensor([loss])).tolist() == [True]
        assert schedule.size(step + 1) > 0, "a rise counts from the sixth step on"
    assert schedule.record(6, torch.tensor([7.5])).tolist() == [True]
    assert schedule.size(7) == 0.0
    assert Schedule(50, 0.0, 1).size(0) == 0.0 and Schedule(50, 0.5, 1).size(0) == 10.0
    for steps, moves in ((1, 1), (2, 1), (20, 10), (60, 26)):
        assert [Schedule(steps, 1.0, 1).size(step) > 0 for step in range(steps)] == [True] * moves + [False] * (steps - moves)


def test_each_latent_of_a_batch_stops_by_itself():
    schedule = Schedule(50, 1.0, 3)
    losses = [[9.0, 9.0, 9.0]] * 5 + [[8.0, 10.0, 8.0], [7.0, 1.0, 8.5], [6.0, 1.0, 1.0]]
    moved = [schedule.record(step, torch.tensor(loss)).tolist() for step, loss in enumerate(losses)]
    assert moved == [[True, True, True]] * 6 + [[True, False, True], [True, False, False]]
    assert schedule.size(8) > 0
    schedule.record(8, torch.tensor([7.0, 0.0, 0.0]))
    assert schedule.size(9) == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_isolation_on_a_gpu_skips_blocks_and_lets_nothing_pass(dtype):
    isolation = Isolation(3, LABELS.flatten(), (), True, torch.device("cuda"))
    labels = LABELS.flatten().cuda()
    q, k = (torch.randn(1, 1, len(labels), 64, device="cuda", dtype=dtype) for _ in range(2))
    v = torch.nn.functional.one_hot(labels, 64).to(dtype)[None, None]
    wanted = ((q.double() @ k.double().transpose(-1, -2) / 8).masked_fill(~isolation.allowed(), -math.inf)).softmax(-1) @ v.double()
    out = skip(isolation.blocks(), q, k, v)
    assert (out - wanted).abs().max() < 1e-2
    assert torch.equal(out == 0, wanted == 0)
