"""The parts of a sparse method, and recipes as wholes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tessera.kernels import attention as kernel
from tessera.kernels import reference, registry
from tessera.kernels.block_mask import PooledTail, num_blocks
from tessera.kernels.pool import block_mean, hidden_blocks
from tessera.kernels.sparsity import RECIPES, Arrangement, Recipe, TokenGrid, describe, get, prepare, sparse_attention
from tessera.kernels.sparsity.compensate import COMPENSATORS, compensator
from tessera.kernels.sparsity.estimate import ESTIMATORS, estimator
from tessera.kernels.sparsity.permute import PERMUTERS, permuter
from tessera.kernels.sparsity.select import SELECTORS, Forced, Pairs, selector
from tessera.kernels.sparsity.tokens import Tokens

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=60)
grids = st.builds(TokenGrid, st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 40), st.integers(0, 40))
boxes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9)
region_grids = st.builds(
    lambda boxes, before, after: TokenGrid(1, 1, sum(f * h * w for f, h, w in boxes), before, after, tuple(boxes)),
    boxes,
    st.integers(0, 40),
    st.integers(0, 40),
)
blocks = st.sampled_from([16, 32, 64, 128])
methods = st.sampled_from(sorted(RECIPES))
REGIONS = TokenGrid(1, 1, 3 * 5 + 7 * 9 + 2, before=5, after=3, boxes=((1, 3, 5), (1, 7, 9), (1, 1, 2)))


def tensors(tokens, batch=1, heads=2, kv_heads=None, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads or heads, tokens, head_dim, generator=generator)
    return q, k, v


def look(name, q, k, query_bias, key_bias, block, scale, numbers):
    """What an estimator says, where values have no part in it."""
    return ESTIMATORS[name](Tokens(q, k, torch.zeros_like(k), query_bias, key_bias, block, block, scale), numbers)


def pick(name, scores, forced, density, block, must=None, hidden=None):
    """What a selector keeps."""
    return SELECTORS[name](Pairs(scores, forced, (block, block), must, hidden), density, {})


def coordinates(grid, tokens):
    """(frame, row, column) of each video token."""
    ids = tokens - grid.before
    return ids // (grid.height * grid.width), ids // grid.width % grid.height, ids % grid.width


# permute


@quick
@given(st.sampled_from(sorted(PERMUTERS)), grids, blocks, st.booleans())
def test_order_is_a_permutation_with_the_protected_tokens_last(name, grid, block, protect):
    order = PERMUTERS[name](grid, block, protect)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(grid.seq_len))
    text = grid.before + grid.after
    end = grid.seq_len - text
    outside = (order < grid.before) | (order >= grid.seq_len - grid.after)
    assert outside[end:].all() and not outside[:end].any()
    assert order[end:].tolist() == [*range(grid.before), *range(grid.seq_len - grid.after, grid.seq_len)]
    if protect and grid.frames > 1:
        area = grid.height * grid.width
        assert order[end - area : end].tolist() == list(range(grid.before, grid.before + area))


WINDOWS = {128: (2, 8, 8), 64: (1, 8, 8), 32: (2, 4, 4), 16: (1, 4, 4)}
FLAT = {128: (1, 8, 16), 64: (1, 8, 8), 32: (1, 4, 8), 16: (1, 4, 4)}


@quick
@given(st.sampled_from(["window3d", "spatial_tiles"]), grids, blocks, st.booleans())
def test_full_tiles_come_first_and_fill_whole_blocks(name, grid, block, protect):
    order = PERMUTERS[name](grid, block, protect)
    frames = grid.frames - (1 if protect and grid.frames > 1 else 0)
    flat, tile = FLAT[block], WINDOWS[block] if name == "window3d" else FLAT[block]
    deep = frames // tile[0] * (grid.height // tile[1]) * (grid.width // tile[2])
    single = frames % tile[0] * (grid.height // flat[1]) * (grid.width // flat[2])
    for index in range(deep + single):
        tokens = order[index * block : (index + 1) * block]
        extents = tuple(int(axis.max() - axis.min()) + 1 for axis in coordinates(grid, tokens))
        assert extents == (tile if index < deep else flat)
        assert [int(axis.min()) % size for axis, size in zip(coordinates(grid, tokens)[1:], extents[1:], strict=True)] == [0, 0]


@pytest.mark.parametrize("frames, shape", [(2, {32: (2, 4, 4), 16: (2, 2, 4), 8: (2, 2, 2)}), (1, {32: (1, 4, 8), 16: (1, 4, 4), 8: (1, 2, 4)})])
def test_granules_of_windows_are_compact(frames, shape):
    grid = TokenGrid(frames, 16, 16)
    order = PERMUTERS["window3d"](grid, 128, False)
    for granule, extents in shape.items():
        for tokens in order.split(granule):
            assert tuple(int(axis.max() - axis.min()) + 1 for axis in coordinates(grid, tokens)) == extents


def test_spatial_tiles_are_the_formula_of_draft_attention():
    grid = TokenGrid(3, 16, 48, before=5, after=7)
    order = PERMUTERS["spatial_tiles"](grid, 128, False)
    for f in range(3):
        for strip in range(2):
            for column in range(3):
                for r in (0, 3, 7):
                    for c in (0, 9, 15):
                        new = ((f * 2 + strip) * 3 + column) * 128 + r * 16 + c
                        old = f * 16 * 48 + (8 * strip + r) * 48 + 16 * column + c
                        assert order[new] == old + 5


# estimate


@quick
@given(st.integers(1, 100), st.sampled_from([1, 7, 16, 64]))
def test_block_mean_counts_the_real_tokens(tokens, block):
    x = torch.randn(2, 3, tokens, 4).to(torch.bfloat16)
    means = block_mean(x, block)
    assert means.dtype == torch.float32
    expected = torch.stack([part.float().mean(2) for part in x.split(block, 2)], 2)
    torch.testing.assert_close(means, expected)


def test_pooled_is_the_formula_and_ignores_a_common_key_offset():
    q, k, _ = tensors(100, heads=4, kv_heads=2)
    scores, must = look("pooled", q, k, None, None, 16, 0.3, {})
    assert must is None
    q_mean = torch.stack([part.mean(2) for part in q.split(16, 2)], 2)
    k_smooth = (k - k.mean(2, keepdim=True)).repeat_interleave(2, 1)
    k_mean = torch.stack([part.mean(2) for part in k_smooth.split(16, 2)], 2)
    torch.testing.assert_close(scores, (q_mean @ k_mean.mT * 0.3).softmax(-1))
    assert scores.shape == (1, 4, 7, 7)
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 4, 7))
    torch.testing.assert_close(look("pooled", q, k + 3.0, None, None, 16, 0.3, {})[0], scores, atol=1e-5, rtol=1e-4)


def test_similarity_guard():
    q, k, _ = tensors(64, heads=1)
    q[:, :, :16] = torch.randn(16)  # block 0 of q: all alike
    k[:, :, 16:32] = 5 * torch.randn(16)  # blocks 1 and 2 of k: all alike, and opposite, so that the mean of k stays where it is
    k[:, :, 32:48] = -k[:, :, 16:32]
    off, none = look("pooled_similarity", q, k, None, None, 16, 0.3, {"similarity": 0.0})
    assert none is None, "nothing may be insisted on where the guard is off: the selection would lose its even rows"
    torch.testing.assert_close(off, look("pooled", q, k, None, None, 16, 0.3, {})[0])
    scores, must = (x[0, 0] for x in look("pooled_similarity", q, k, None, None, 16, 0.3, {"similarity": 0.5}))
    assert must.shape == scores.shape and must[1:].all(), "query blocks that disagree are dense"
    assert must[0].tolist() == [True, False, False, True]
    assert scores[0, 1:3].sum().item() == pytest.approx(1.0), "the softmax runs over the judged columns only"
    # The definition, pair by pair.
    smooth = F.normalize(k - k.mean(2, keepdim=True), dim=-1)[0, 0]
    for block in range(4):
        unit = smooth[block * 16 : block * 16 + 16]
        assert ((unit @ unit.T).mean() <= 0.5).item() == must[0, block].item()


def hide(bias, share, seed=0):
    """bias with that share of the keys hidden in every sample, but one at least left."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(bias.shape, generator=generator).argsort(-1).argsort(-1)
    return bias.masked_fill(ranks < min(round(share * bias.shape[1]), bias.shape[1] - 1), float("-inf"))


@quick
@given(st.integers(1, 100), st.sampled_from([7, 16, 64]), st.sampled_from([0.0, 0.5, 0.95]), st.sampled_from([0.0, -1e6, -3e38]))
def test_block_mean_weighs_the_tokens(tokens, block, hidden, level):
    x = torch.randn(2, 3, tokens, 4)
    bias = hide(torch.randn(2, tokens) + level, hidden)
    weights = (bias.double() - bias.double().amax(1, keepdim=True)).exp()  # of one sample; a block's own largest cancels
    for block_index, (part, weight) in enumerate(zip(x.double().split(block, 2), bias.double().split(block, 1), strict=True)):
        peak = weight.amax(1, keepdim=True).nan_to_num(neginf=0.0)
        weight = (weight - peak).exp()
        total = weight.sum(1).clamp(min=1e-300)[:, None, None]
        expected = (part * weight[:, None, :, None]).sum(2) / total
        torch.testing.assert_close(block_mean(x, block, bias)[:, :, block_index].double(), expected, atol=1e-5, rtol=1e-4)
    assert weights.shape == bias.shape


@pytest.mark.parametrize("similarity", [0.0, 0.06])
@pytest.mark.parametrize("name", ["pooled", "pooled_similarity"])
def test_a_bias_of_zero_is_none(name, similarity):
    q, k, _ = tensors(100, batch=2, heads=4, kv_heads=2)
    zero = torch.zeros(2, 100)
    plain = look(name, q, k, None, None, 16, 0.3, {"similarity": similarity})
    biased = look(name, q, k, zero[:1], zero, 16, 0.3, {"similarity": similarity})
    torch.testing.assert_close(biased[0], plain[0])
    if plain[1] is None:
        assert biased[1] is None
    else:
        assert torch.equal(plain[1], biased[1]) and plain[1].any() and not plain[1].all()


@pytest.mark.parametrize("name", ["pooled", "pooled_similarity"])
def test_scores_are_the_exact_attention_where_the_tokens_of_a_block_are_alike(name):
    """The bias of each key is weighed as the softmax does: whole blocks, hidden or partly hidden, and finite numbers."""
    q, k, _ = tensors(96, batch=2, heads=4, kv_heads=2)
    q, k = (x[:, :, ::16].repeat_interleave(16, 2) for x in (q, k))
    bias = hide(2 * torch.randn(2, 96), 0.4)
    bias[1, 32:48] = -torch.inf
    scores, _ = look(name, q, k, None, bias, 16, 0.3, {"similarity": 0.0})
    exact = (q @ k.repeat_interleave(2, 1).mT * 0.3 + bias[:, None, None]).softmax(-1)[:, :, ::16].unflatten(-1, (6, 16)).sum(-1)
    torch.testing.assert_close(scores, exact)
    assert hidden_blocks(bias, 16).tolist() == [[False] * 6, [False, False, True, False, False, False]]


@pytest.mark.parametrize("similarity", [0.0, 0.1])
@pytest.mark.parametrize("name", ["pooled", "pooled_similarity"])
def test_hidden_tokens_judge_nothing(name, similarity):
    q, k, _ = tensors(100)
    query_bias, key_bias = hide(torch.zeros(1, 100), 0.4, 1), hide(torch.randn(1, 100), 0.6, 2)
    before = look(name, q, k, query_bias, key_bias, 16, 0.3, {"similarity": similarity})
    q = torch.where(query_bias.isneginf()[:, None, :, None], 100 * torch.randn_like(q), q)
    k = torch.where(key_bias.isneginf()[:, None, :, None], 100 * torch.randn_like(k), k)
    after = look(name, q, k, query_bias, key_bias, 16, 0.3, {"similarity": similarity})
    torch.testing.assert_close(after[0], before[0])
    if before[1] is None:
        assert after[1] is None
    else:
        assert torch.equal(before[1], after[1]) and before[1].any() and not before[1].all()


def test_random_scores_are_the_same_every_time():
    q, k, _ = tensors(100)
    scores, must = look("random", q, k, None, None, 16, 1.0, {})
    assert must is None and scores.shape == (1, 2, 7, 7)
    assert torch.equal(scores, look("random", k, q, None, None, 16, 1.0, {})[0])


# select


def layouts(grid, block, name="rainfusion2"):
    return prepare(get(name), grid, CPU, block=block)


def scores_for(layout, seed=0, batch=2, heads=3):
    rows, columns = layout.forced.pairs.shape
    return torch.randn(batch, heads, rows, columns, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@quick
@given(st.sampled_from(sorted(SELECTORS)), grids, blocks, st.floats(0.01, 1.0), st.integers(0, 99))
def test_the_choice_is_the_density_of_what_is_open_and_forced_blocks_come_on_top(name, grid, block, density, seed):
    layout = layouts(grid, block)
    forced = layout.forced.pairs
    mask = pick(name, scores_for(layout, seed), layout.forced, density, block)
    kept = mask.to_dense(forced.shape[1])
    assert kept.shape == (2, 3, *forced.shape)
    assert (kept | ~forced).all()
    own, is_open = (kept & ~forced).sum(-1), (~forced).sum(-1)
    if name == "topk":
        assert ((own - density * is_open).abs() < 1 + 1e-4).all(), "every row chooses its share of what it may choose from"
    wanted = density * is_open.sum() * (3 if name == "threshold" else 1)
    found = own.sum((1, 2)) if name == "threshold" else own.sum(2)
    assert ((found - wanted).abs() <= 0.5 + 1e-4).all(), "the pairs that were asked for, to the pair"
    assert mask.density(grid.seq_len).item() == pytest.approx((own.sum((1, 2)) + 3 * forced.sum()).float().mean().item() / 3 / forced.numel())


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES.values() if recipe.protect_first_frame or recipe.protect_text])
@pytest.mark.parametrize("frames", [3, 5, 9])
def test_protected_tokens_do_not_starve_the_rest(recipe, frames):
    """The first frame and the text alone are more than the density: the others still choose as if they were alone."""
    grid = TokenGrid(frames, 8, 16, after=128)
    layout = prepare(recipe, grid, CPU, block=32)
    q, k, v = tensors(grid.seq_len)
    kept = sparse_attention(recipe, layout, q, k, v, density=0.2, precision="native")[1].to_dense(layout.forced.pairs.shape[1])
    is_open = ~layout.forced.pairs
    assert (kept & is_open).sum() / (2 * is_open.sum()) == pytest.approx(0.2, abs=0.06 if recipe.select == "topk" else 0.01)


@quick
@given(grids, blocks, st.floats(0.01, 1.0))
def test_topk_gives_every_free_row_the_same_and_the_best(grid, block, density):
    layout = layouts(grid, block)
    forced = layout.forced
    scores = scores_for(layout)
    mask = pick("topk", scores, forced, density, block)
    free = mask.counts[:, :, forced.free_rows]
    assert not free.numel() or free.amax() - free.amin() <= 1
    assert (mask.counts[:, :, forced.dense_rows] == forced.pairs.shape[1]).all()
    assert mask.indices.amax() < forced.pairs.shape[1], "padding is a valid id, kernels may prefetch it"
    kept = mask.to_dense(forced.pairs.shape[1])
    chosen, left = scores.masked_fill(~kept | forced.pairs, 2.0).amin(-1), scores.masked_fill(kept, -1.0).amax(-1)
    assert (chosen >= left).all()


def test_rows_with_unequal_forced_blocks_choose_unequal_numbers():
    """No layout of today has such rows; a fixed pattern would."""
    pairs = torch.zeros(4, 8, dtype=torch.bool)
    pairs[0] = True
    pairs[1, :6] = pairs[2, 3] = True
    forced = Forced.of(pairs, CPU)
    scores = torch.rand(1, 2, 4, 8)
    for must in (None, torch.zeros(1, 2, 4, 8, dtype=torch.bool)):
        mask = pick("topk", scores, forced, 0.6, 16, must)
        assert mask.counts.tolist() == [[[8, 7, 5, 5]] * 2] and mask.indices.amax() < 8
        kept = mask.to_dense(8)
        assert (kept | ~pairs).all()
        for head in range(2):
            for row, own in ((1, 1), (2, 4), (3, 5)):
                free = (~pairs[row]).nonzero()[:, 0]
                best = free[scores[0, head, row, free].topk(own).indices]
                assert kept[0, head, row][best].all()
    even = Forced.of(torch.eye(4, dtype=torch.bool), CPU)
    assert pick("topk", torch.rand(1, 1, 4, 4), even, 2 / 3, 16).indices.shape == (1, 1, 4, 3)


def test_topk_reads_nothing_from_the_device(monkeypatch):
    layout = layouts(TokenGrid(3, 16, 16, after=20), 32)
    scores = scores_for(layout)
    layout.forced.row_counts(0.4)

    def read(*_):
        raise AssertionError("a read from the device")

    hidden = torch.zeros(2, scores.shape[-1], dtype=torch.bool)
    hidden[1, :5] = True
    text_free = prepare(get("sparge"), TokenGrid(3, 16, 16), CPU, block=32)
    text_free.forced.row_counts(0.4)
    for name in ("item", "tolist", "cpu", "__int__", "__float__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    pick("topk", scores, layout.forced, 0.4, 32)
    pick("topk", scores, layout.forced, 0.4, 32, None, hidden)
    pick("topk", scores[..., :24, :24], text_free.forced, 0.4, 32, None, hidden[:, :24])


def test_equal_scores_do_not_raise_the_density():
    """Sharp attention underflows to scores of exactly 0; a comparison with a threshold would then keep everything."""
    layout = layouts(TokenGrid(1, 32, 32), 32)
    for name in SELECTORS:
        mask = pick(name, torch.eye(32).expand(1, 1, 32, 32), layout.forced, 8 / 31, 32)
        assert mask.density(1024).item() == 9 / 32, name


def test_global_quantile_gives_more_to_the_rows_that_score_more():
    layout = prepare(get("draft"), TokenGrid(1, 16, 32), CPU, block=64)
    scores = torch.rand(1, 1, 8, 8)
    scores[0, 0, 2] += 1.0
    mask = pick("global_quantile", scores, layout.forced, 0.25, 64)
    assert mask.counts[0, 0, 2] == 8 and mask.counts.sum() == 8 + 14


def test_top_p_gives_more_to_rows_that_are_spread_out():
    layout = prepare(get("sparge"), TokenGrid(1, 16, 32), CPU, block=64)
    scores = torch.randn(1, 1, 8, 8).mul(8).softmax(-1)
    scores[0, 0, 2] = 1 / 8
    mask = pick("top_p", scores, layout.forced, 0.4, 64)
    assert mask.counts[0, 0, 2] == mask.counts.amax() and mask.counts.float().var() > 0


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("method", ["sparge", "random"])
def test_what_the_estimator_insists_on_comes_on_top(name, method):
    """Whatever the method and its settings. The row's own choice is as large as without, and falls on other blocks."""
    layout = layouts(TokenGrid(3, 8, 16, after=10), 16, method)
    rows, columns = layout.forced.pairs.shape
    scores = torch.rand(1, 2, rows, columns)
    scores[:, 0, :, 3] = 2.0  # the best of every row, if it were open to choice
    must = torch.zeros(scores.shape, dtype=torch.bool)
    must[:, 0, :, 3] = must[:, 1, 4] = True
    own = pick(name, scores, layout.forced, 0.3, 16).to_dense(columns) & ~layout.forced.pairs
    kept = pick(name, scores, layout.forced, 0.3, 16, must).to_dense(columns)
    assert (kept | ~must).all() and (kept | ~layout.forced.pairs).all()
    chosen = kept & ~must & ~layout.forced.pairs
    if name == "topk":
        assert torch.equal(chosen.sum(-1)[0, 0], own.sum(-1)[0, 0])
        others = torch.arange(rows) != 4
        assert torch.equal(chosen[0, 1, others], own[0, 1, others]) and not chosen[0, 1, 4].any()
    else:
        over = (1, 2, 3) if name == "threshold" else (2, 3)
        assert torch.equal(chosen.sum(over), own.sum(over))
    worst = scores.masked_fill(~chosen, 2.0).amin(-1)
    best = scores.masked_fill(kept, -1.0).amax(-1)
    assert name in ("global_quantile", "threshold") or (worst >= best).all(), "within a row, what is chosen is better than what is left"


@quick
@given(st.sampled_from(sorted(SELECTORS)), grids, blocks, st.floats(0.01, 1.0), st.sampled_from([0.1, 0.5, 0.9]), st.booleans(), st.integers(0, 99))
def test_hidden_blocks_are_never_kept_and_take_no_budget(name, grid, block, density, share, insists, seed):
    layout = layouts(grid, block, "draft")
    columns = layout.forced.pairs.shape[1]
    scores = scores_for(layout, seed)
    hidden = hide(torch.zeros(2, columns), share, seed).isneginf()
    must = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.1 if insists else None
    kept = pick(name, scores, layout.forced, density, block, must, hidden).to_dense(columns)
    visible = ~hidden[:, None, None]
    anyway = layout.forced.pairs.expand(scores.shape) if must is None else layout.forced.pairs | must
    assert not (kept & ~visible).any()
    assert (kept | ~(anyway & visible)).all()
    assert kept.any(-1).all() or columns == 1
    is_open = ~anyway & visible
    own = (kept & is_open).sum(-1)
    starved = ~(anyway & visible).any(-1) & (own == 1)
    if name == "topk":
        wanted = (density * (~layout.forced.pairs).sum(-1)).expand(own.shape)
        assert ((own - torch.minimum(wanted, is_open.sum(-1).float())).abs() < 1 + 1e-4)[~starved].all()
    elif not starved.any():
        every, over = (3, (1, 2, 3)) if name == "threshold" else (1, (2, 3))
        wanted = torch.tensor(round(density * int((~layout.forced.pairs).sum()) * every))
        assert torch.equal((kept & is_open).sum(over), torch.minimum(wanted, is_open.sum(over)))
    if name == "topk" and columns > 1:
        chosen, left = scores.masked_fill(~(kept & is_open), 2.0).amin(-1), scores.masked_fill(kept | ~is_open, -1.0).amax(-1)
        assert (chosen >= left).all()


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_row_with_nothing_forced_reads_its_best_block(name):
    forced = Forced.of(torch.zeros(6, 6, dtype=torch.bool), CPU)
    scores = torch.rand(1, 2, 6, 6)
    scores[0, 0, 1, 4] = 2.0
    kept = pick(name, scores, forced, 0.01, 16).to_dense(6)
    assert (kept.sum(-1) == 1).all() and torch.equal(kept.long().argmax(-1), scores.argmax(-1))
    for must in (None, torch.zeros(1, 2, 6, 6, dtype=torch.bool)):
        hidden = torch.tensor([[False] * 4 + [True] * 2])
        kept = pick(name, scores, forced, 0.01, 16, must, hidden).to_dense(6)
        assert (kept.sum(-1) == 1).all() and torch.equal(kept.long().argmax(-1), scores[..., :4].argmax(-1))
    nothing = pick(name, scores, forced, 0.5, 16, None, torch.ones(1, 6, dtype=torch.bool))
    assert not nothing.counts.any()


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_insisting_on_everything_is_dense(name):
    layout = layouts(TokenGrid(1, 16, 16), 16, "sparge")
    scores = torch.full((1, 1, 16, 16), float("nan"))  # a softmax over no column
    kept = pick(name, scores, layout.forced, 0.3, 16, torch.ones(1, 1, 16, 16, dtype=torch.bool)).to_dense(16)
    assert kept.all()


# prepare


@quick
@given(methods, grids, blocks)
def test_layout_protects_text_first_frame_and_the_own_block(name, grid, block):
    recipe = get(name)
    layout = prepare(recipe, grid, CPU, block=block)
    order = layout.order
    assert torch.equal(order[layout.inverse], torch.arange(grid.seq_len))
    assert torch.equal(layout.inverse[order], torch.arange(grid.seq_len))
    granule = max(block // recipe.granules, 8)
    assert layout.granule == granule
    rows, columns = layout.forced.pairs.shape
    assert (rows, columns) == (num_blocks(grid.seq_len, block), num_blocks(grid.seq_len, granule))
    protected = (order < grid.before) | (order >= grid.seq_len - grid.after)
    if recipe.protect_first_frame and grid.frames > 1:
        protected |= (order >= grid.before) & (order < grid.before + grid.height * grid.width)
    blocks_with, granules_with = ({int(position) // size for position in protected.nonzero()} for size in (block, granule))
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    for token in range(0, grid.seq_len if recipe.protect_own_block else 0, granule):
        expected[token // block, token // granule] = True
    for index in blocks_with:
        expected[index] = True
    for index in granules_with:
        expected[:, index] = True
    assert torch.equal(layout.forced.pairs, expected)
    dense = [index for index, row in enumerate(expected.tolist()) if all(row)]
    assert set(blocks_with) <= set(dense)
    assert layout.forced.dense_rows.tolist() == dense
    assert layout.forced.free_rows.tolist() == [index for index in range(rows) if index not in dense]


def test_layout_without_a_grid():
    layout = prepare(get("sparge"), None, CPU, block=16, seq_len=100)
    assert layout.order is None and layout.inverse is None
    assert torch.equal(layout.forced.pairs, torch.eye(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="rainfusion2"):
        prepare(get("rainfusion2"), None, CPU, seq_len=100)
    with pytest.raises(ValueError, match="seq_len"):
        prepare(get("sparge"), None, CPU)


# compensate


def kept_blocks_alone(q, k, v, mask, key_bias):
    return reference.attention(q, k, v, block_mask=mask, key_bias=key_bias)[0]


def kept_blocks_and_pooled_keys(q, k, v, mask, key_bias):
    tail = PooledTail(mask.block_m // mask.block_n)
    return reference.attention(q, k, v, block_mask=mask, key_bias=key_bias, tail=tail)[0]


EXACT = {"drop": kept_blocks_alone, "pooled_tail": kept_blocks_and_pooled_keys}
"""What a compensator computes, in float64 with every score in memory: (q, k, v, mask, key_bias) -> out, all in the order of the blocks."""


def test_every_compensator_has_its_formula():
    """Every recipe is held against it."""
    assert set(EXACT) == set(COMPENSATORS)


# recipes


PARTS = [
    ("permuter", permuter, PERMUTERS),
    ("estimator", estimator, ESTIMATORS),
    ("selector", selector, SELECTORS),
    ("compensator", compensator, COMPENSATORS),
]


def test_every_recipe_names_parts_that_exist():
    for recipe in RECIPES.values():
        assert recipe.permute is None or recipe.permute in PERMUTERS
        assert recipe.estimate in ESTIMATORS and recipe.select in SELECTORS and recipe.compensate in COMPENSATORS
        assert recipe.title and recipe.source
        assert all(setting.minimum <= setting.default <= setting.maximum for setting in recipe.settings.values())


def test_users_read_of_every_method(root):
    for name in (name for name, recipe in RECIPES.items() if not recipe.control):
        for page in ("README.md", "web/docs/TesseraSparseAttention.md"):
            assert f"`{name}`" in (root / page).read_text(), f"{page} does not name {name}"


@pytest.mark.parametrize(("kind", "table"), [("permute", PERMUTERS), ("estimate", ESTIMATORS), ("select", SELECTORS), ("compensate", COMPENSATORS)])
def test_every_part_is_named_by_a_recipe(kind, table):
    """Then the tests that loop over recipes run it."""
    assert {getattr(recipe, kind) for recipe in RECIPES.values()} == set(table)


@pytest.mark.parametrize(("kind", "register", "table"), PARTS)
def test_a_part_of_a_name_that_is_taken_is_refused(kind, register, table):
    for name, part in list(table.items()):

        def other():
            raise AssertionError

        other.__name__ = name
        with pytest.raises(ValueError, match=rf"two of {kind} '{name}': tessera\..*\.{part.__qualname__} and .*other; rename one"):
            register(other)
        assert table[name] is part


def test_a_recipe_of_a_name_that_is_taken_is_refused():
    twin = Recipe("draft", "another", "nobody", "pooled", "topk")
    with pytest.raises(ValueError, match=r"two of recipe 'draft': Recipe\(name='draft', title='tiles.*Recipe\(name='draft', title='another'"):
        registry.by_name("recipe", (*RECIPES.values(), twin))


@pytest.mark.parametrize("name", ["topk"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_rows_with_unequal_shares_forced_choose_the_best_of_their_own_rest(name, density):
    """By hand: row r has 3 r + 1 of 12 pairs forced, the last one all; each takes its best open ones on top."""
    pairs = torch.arange(12) < torch.tensor([[1], [4], [7], [10], [12]])
    forced = Forced.of(pairs, CPU)
    scores = torch.rand(2, 3, 5, 12)
    mask = pick(name, scores, forced, density, 16).to_dense(12)
    own = (pairs.shape[1] - pairs.sum(1)).tolist()
    for row, open_pairs in enumerate(own):
        chosen = (mask & ~pairs)[:, :, row]
        counts = chosen.sum(-1)
        assert (counts == counts[0, 0]).all() and abs(int(counts[0, 0]) - density * open_pairs) <= 1
        best = scores[:, :, row].masked_fill(pairs[row], -1).topk(int(counts[0, 0]), -1).indices
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter_(-1, best, True))
    assert (mask | ~pairs).all(), "what is forced is kept"
    assert abs(int((mask & ~pairs)[0, 0].sum()) - density * sum(own)) <= 0.5


def test_an_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'radial'.*rainfusion2, draft, sparge") as error:
        get("radial")
    assert "random" not in str(error.value)


@quick
@given(
    methods,
    grids | region_grids,
    st.sampled_from([16, 32]),
    st.floats(0.05, 1.0),
    st.sampled_from([(2, 2), (4, 2)]),
    st.integers(1, 2),
    st.booleans(),
)
def test_sparse_attention_is_what_its_compensator_makes_of_the_blocks_it_reports(name, grid, block, density, heads, batch, with_bias):
    assume(grid.seq_len > 1)
    recipe = get(name)
    layout = prepare(recipe, grid, CPU, block=block)
    q, k, v = tensors(grid.seq_len, batch, *heads)
    bias = torch.randn(batch, grid.seq_len) if with_bias else None
    out, mask = sparse_attention(recipe, layout, q, k, v, density=density, precision="native", key_bias=bias)
    biases = torch.zeros(batch, grid.seq_len) if bias is None else bias
    biases = biases[:, layout.order] if layout.hidden is None else biases[:, layout.order].masked_fill(layout.hidden, float("-inf"))
    expected = EXACT[recipe.compensate](*(x[:, :, layout.order] for x in (q, k, v)), mask, biases)[:, :, layout.inverse]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    again, same = sparse_attention(recipe, layout, q, k, v, density=density, precision="native", key_bias=bias, mask=mask)
    assert same is mask and torch.equal(out, again)


BIASES = {
    "the second half": lambda tokens: torch.zeros(2, tokens).index_fill(1, torch.arange(tokens // 2, tokens), float("-inf")),
    "every other key": lambda tokens: hide(torch.zeros(2, tokens), 0.5),
    "another half a sample": lambda tokens: torch.stack([hide(torch.zeros(1, tokens), 0.5, seed)[0] for seed in (1, 2)]),
    "blocks": lambda tokens: hide(torch.zeros(2, tokens // 32), 0.5).repeat_interleave(32, 1),
    "all but one": lambda tokens: hide(torch.zeros(2, tokens), 1.0),
}


@pytest.mark.parametrize("bias", sorted(BIASES))
@pytest.mark.parametrize("name, similarity", [*((name, 0.0) for name in sorted(RECIPES)), ("sparge", 0.5), ("sparge_top_p", 0.5)])
def test_the_choice_sees_what_is_hidden(name, similarity, bias):
    recipe = get(name)
    settings = {"similarity": similarity} if recipe.settings else {}
    grid = TokenGrid(3, 16, 16)
    layout = prepare(recipe, grid, CPU, block=32)
    q, k, v = (x.expand(2, -1, -1, -1) for x in smooth_video(grid, heads=1))
    key_bias = BIASES[bias](grid.seq_len)
    exact = reference.attention(q, k, v, key_bias=key_bias)[0]
    plain = reference.attention(q, k, v)[0]
    hidden = hidden_blocks(key_bias.index_select(1, layout.order), layout.granule)
    for density in (0.01, 0.3):
        out, mask = sparse_attention(recipe, layout, q, k, v, density=density, precision="native", key_bias=key_bias, settings=settings)
        assert not (mask.to_dense(hidden.shape[1]) & hidden[:, None, None]).any()
        assert (out != 0).any(-1).all(), "a row of zeros although there are visible keys"
    without = sparse_attention(recipe, layout, q, k, v, density=0.3, precision="native", settings=settings)[0]
    error, usual = ((x - y).norm() / y.norm() for x, y in ((out, exact), (without, plain)))
    assert error <= 1.1 * usual + 0.02


def test_a_sample_without_a_visible_key_gives_zeros():
    grid = TokenGrid(2, 16, 16, after=20)
    q, k, v = tensors(grid.seq_len, batch=2)
    key_bias = torch.zeros(2, grid.seq_len)
    key_bias[1] = -torch.inf
    for name in sorted(RECIPES):
        layout = prepare(get(name), grid, CPU, block=32)
        out, mask = sparse_attention(get(name), layout, q, k, v, density=0.3, precision="native", key_bias=key_bias)
        assert not out[1].any() and not mask.counts[1].any() and (out[0] != 0).any(-1).all(), name


def test_what_fills_a_block_of_a_box_judges_nothing():
    """Each box is judged by the means of its own tokens, as if they were alone in their block."""
    recipe = get("draft")
    layout = prepare(recipe, REGIONS, CPU, block=32)
    q, k, v = tensors(REGIONS.seq_len)
    seen = {}

    def note(*arguments):
        seen["scores"] = pooled(*arguments)[0]
        return seen["scores"], None

    pooled = ESTIMATORS["pooled"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ESTIMATORS, "pooled", note)
        sparse_attention(recipe, layout, q, k, v, density=0.3, precision="native")
    order, shown = layout.order, ~layout.hidden
    parts = [order[start : start + 32][shown[start : start + 32]] for start in range(0, len(order), 32)]
    assert any(len(part) < 32 for part in parts[:-1])
    q_mean, k_mean = (torch.stack([x[:, :, part].mean(2) for part in parts], 2) for x in (q, k))
    size = torch.tensor([len(part) / len(order[32 * i : 32 * i + 32]) for i, part in enumerate(parts)])
    torch.testing.assert_close(seen["scores"], (q_mean @ k_mean.mT * 16**-0.5 + size.log()).softmax(-1))


def test_a_compensator_is_told_what_the_choice_knew():
    """In the order of the blocks; and no scores where the mask was there before."""
    recipe = get("sparge")
    layout = prepare(recipe, TokenGrid(2, 8, 16, after=5), CPU, block=32)
    q, k, v = tensors(261)
    bias = torch.randn(1, 261)
    seen = []

    def note(tokens, mask, *others):
        seen.append((tokens, mask, others))
        return drop(tokens, mask, *others)

    drop = COMPENSATORS["drop"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPENSATORS, "drop", note)
        keywords = dict(density=0.3, precision="native", key_bias=bias, settings={"similarity": 0.2})
        _, mask = sparse_attention(recipe, layout, q, k, v, **keywords)
        sparse_attention(recipe, layout, q, k, v, mask=mask, **keywords)
    for tokens, used, (_, numbers, precision, choice) in seen:
        assert used is mask and (tokens.block, tokens.granule, tokens.scale) == (32, 32, 0.25) and numbers == {"similarity": 0.2}
        for source, permuted in ((q, tokens.q), (k, tokens.k), (v, tokens.v)):
            assert torch.equal(permuted, source.index_select(2, layout.order))
        assert torch.equal(tokens.key_bias, bias[:, layout.order]) and (precision, choice) == ("native", None)
    expected = ESTIMATORS["pooled_similarity"](seen[0][0], {"similarity": 0.2})[0]
    assert torch.equal(seen[0][2][0], expected) and seen[1][2][0] is None


@quick
@given(methods, region_grids, blocks)
def test_boxes_have_blocks_of_their_own(name, grid, block):
    """Every token is somewhere once; no box is in more blocks than it must be, text shares none; little is filled in."""
    layout = prepare(get(name), grid, CPU, block=block)
    shown = ~layout.hidden
    assert torch.equal(layout.order[shown].sort().values, torch.arange(grid.seq_len))
    assert torch.equal(layout.order[layout.inverse], torch.arange(grid.seq_len)) and shown[layout.inverse].all()
    sizes = torch.tensor([f * h * w for f, h, w in grid.boxes])
    owner = torch.full((grid.seq_len,), -1)
    owner[grid.before : grid.before + int(sizes.sum())] = torch.arange(len(sizes)).repeat_interleave(sizes)
    for box, size in enumerate(sizes.tolist()):
        where = layout.inverse[owner == box] // block
        assert len(where.unique()) == num_blocks(size, block)
    assert not set((layout.inverse[owner < 0] // block).tolist()) & set((layout.inverse[owner >= 0] // block).tolist())
    assert len(layout.order) <= 2 * grid.seq_len + 2 * block


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_density_one_is_dense_attention(name):
    grid = TokenGrid(3, 10, 13, before=4, after=9)
    q, k, v = tensors(grid.seq_len)
    out, mask = sparse_attention(get(name), prepare(get(name), grid, CPU, block=16), q, k, v, density=1.0, precision="native")
    assert mask.density(grid.seq_len) == 1.0
    torch.testing.assert_close(out.double(), reference.attention(q, k, v)[0], atol=1e-5, rtol=0)


def test_without_a_grid_tokens_stay_in_order():
    q, k, v = tensors(100)
    layout = prepare(get("sparge"), None, CPU, block=16, seq_len=100)
    out, mask = sparse_attention(get("sparge"), layout, q, k, v, density=0.4, precision="native")
    torch.testing.assert_close(out.double(), reference.attention(q, k, v, block_mask=mask)[0], atol=1e-5, rtol=0)


def test_settings_reach_the_method():
    q, k, v = tensors(256)
    layout = prepare(get("sparge"), TokenGrid(1, 16, 16), CPU, block=16)

    def run(**settings):
        return sparse_attention(get("sparge"), layout, q, k, v, density=0.25, precision="native", settings=settings)[1].density(256)

    own_block, rest = 1 / 16, 15 / 16  # 0.25 of the rest
    assert run() == run(similarity=0.0) == pytest.approx(own_block + 0.25 * rest, abs=1 / 512)
    assert run(similarity=1.0) == 1.0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name, grid", [("sparge", None), ("rainfusion2", TokenGrid(3, 8, 9, before=4)), ("draft", REGIONS)])
def test_describe_is_the_problem_that_the_kernel_gets(name, grid, with_bias, grad, monkeypatch):
    """What a caller asks about beforehand is the call, with its padding and the bias that hides it; and the answer is what runs."""
    tokens = 200 if grid is None else grid.seq_len
    layout = prepare(get(name), grid, CPU, block=16, seq_len=tokens)
    q, k, v = tensors(tokens)
    q.requires_grad_(grad)
    bias = torch.randn(1, tokens) if with_bias else None
    asked = describe(layout, q, k, v, key_bias=bias)
    choice = kernel.explain(asked, "native")
    seen = []
    original = kernel.describe

    def note(*arguments, **keywords):
        seen.append(original(*arguments, **keywords))
        return seen[-1]

    monkeypatch.setattr(kernel, "describe", note)
    monkeypatch.setattr(kernel, "explain", None)
    sparse_attention(get(name), layout, q, k, v, density=0.3, key_bias=bias, choice=choice)
    assert seen[-1] == asked and asked.requires_grad == grad and asked.blocks == (16, 16)


@pytest.mark.parametrize("grid", [None, TokenGrid(3, 8, 9, before=4), REGIONS])
def test_a_layout_of_other_lengths_is_refused(grid):
    tokens = 200 if grid is None else grid.seq_len
    layout = prepare(get("sparge"), grid, CPU, block=16, seq_len=tokens)
    for wrong in (tokens - 1, tokens + 1):
        with pytest.raises(ValueError, match=f"the layout is for {tokens} tokens, but q has {wrong} and k {wrong}"):
            sparse_attention(get("sparge"), layout, *tensors(wrong), density=0.5)
    q, k, v = tensors(tokens)
    with pytest.raises(ValueError, match="q has"):
        sparse_attention(get("sparge"), layout, q[:, :, :-1], k, v, density=0.5)
    with pytest.raises(ValueError, match="key_bias has shape"):
        sparse_attention(get("sparge"), layout, q, k, v, density=0.5, key_bias=torch.zeros(1, tokens + 1))
    with pytest.raises(ValueError, match="NaN"):
        sparse_attention(get("sparge"), layout, q, k, v, density=0.5, key_bias=torch.full((1, tokens), torch.nan))


def test_a_bool_bias_hides_in_a_sparse_call():
    q, k, v = tensors(200)
    layout = prepare(get("sparge"), None, CPU, block=16, seq_len=200)
    visible = torch.arange(200)[None] < 70
    out, mask = sparse_attention(get("sparge"), layout, q, k, v, density=0.9, key_bias=visible)
    expected = reference.attention(q, k, v, block_mask=mask, key_bias=torch.zeros(1, 200).masked_fill(~visible, -torch.inf))[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    assert not mask.to_dense(13)[..., 5:].any() and mask.to_dense(13)[..., :5].any(-1).all()


def smooth_video(grid, heads=2, head_dim=16):
    """q, k, v of tokens whose likeness falls with their distance in the video."""
    axes = [torch.linspace(0, size / 6, size) for size in (grid.frames, grid.height, grid.width)]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    features = (position @ torch.randn(heads, 3, head_dim) + 6 * torch.rand(heads, 1, head_dim)).sin()[None] * 3
    return features, features, torch.randn(1, heads, grid.seq_len, head_dim)


@pytest.mark.parametrize("frames", [4, 2])
@pytest.mark.parametrize("name", [recipe.name for recipe in RECIPES.values() if not recipe.control])
def test_chosen_blocks_beat_random_ones(name, frames):
    """Of two frames, `rainfusion2` keeps one and all that it reads anyway: the other half must still be worth its density."""
    grid = TokenGrid(frames, 16, 16)
    q, k, v = smooth_video(grid)
    exact, _ = reference.attention(q, k, v)

    def run(method, density):
        layout: Arrangement = prepare(get(method), grid, CPU, block=32)
        out, mask = sparse_attention(get(method), layout, q, k, v, density=density, precision="native")
        return ((out - exact).norm() / exact.norm()).item(), mask.density(grid.seq_len).item()

    error, density = run(name, 0.5)
    own_block = 1 / num_blocks(grid.seq_len, 32)
    random_error, random_density = run("random", (density - own_block) / (1 - own_block))
    assert random_density == pytest.approx(density, abs=2e-3)
    assert error < 0.5 * random_error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(density=0.0), "density is 0.0; use a value above 0"),
        (dict(density=1.5), "density is 1.5"),
        (dict(density=float("nan")), "density is nan"),
        (dict(settings={"foo": 1.0}), "rainfusion2 has no setting foo; it has none"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_call(changes, said):
    q, k, v = (torch.randn(1, 1, 256, 16) for _ in "qkv")
    layout = prepare(get("rainfusion2"), TokenGrid(1, 16, 16), q.device, block=16)
    with pytest.raises(ValueError, match=said):
        sparse_attention(get("rainfusion2"), layout, q, k, v, **{"density": 0.5, **changes})


def test_a_block_has_a_token():
    with pytest.raises(ValueError, match="block is 0"):
        prepare(get("rainfusion2"), TokenGrid(1, 16, 16), torch.device("cpu"), block=0)
