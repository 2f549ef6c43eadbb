"""What a pooled tail costs: exact figures of block pairs, the threshold over them, and the error that they predict."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.kernels import reference
from tessera.kernels.block_mask import BlockMask, PooledTail
from tessera.kernels.sparsity import RECIPES, TokenGrid, choose, get, prepare, sparse_attention, with_tail
from tessera.kernels.sparsity import exact as measure
from tessera.kernels.sparsity.select import SELECTORS, Forced, Pairs, within_error
from tessera.kernels.sparsity.tokens import Tokens

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=40)


def call(tokens, batch=1, heads=2, kv_heads=2, block=32, granule=8, bias=None, query_bias=None, seed=0, smooth=0.0):
    """Random tokens; smooth: how alike neighbours are."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, tokens, 16, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, tokens, 16, generator=generator)
    if smooth:
        k, v = (x + smooth * x.unflatten(2, (-1, granule)).mean(3, keepdim=True).expand(-1, -1, -1, granule, -1).flatten(2, 3) for x in (k, v))
    return Tokens(2 * q, k, v, query_bias, bias, block, granule, 0.25)


def weights(tokens):
    """Exact attention weights in float64: `(batch, heads, queries, keys)`."""
    groups = tokens.q.shape[1] // tokens.k.shape[1]
    scores = tokens.q.double() @ tokens.k.double().repeat_interleave(groups, 1).mT * tokens.scale
    return (scores if tokens.key_bias is None else scores + tokens.key_bias.double()[:, None, None]).softmax(-1)


def cost(tokens, size):
    """|r|^2 of every row and block of so many keys, r = N - T w - (D - T) o, as it is written down. float64 `(batch, heads, queries, blocks)`."""
    groups = tokens.q.shape[1] // tokens.k.shape[1]
    p, q = weights(tokens), tokens.q.double()
    k, v = (x.double().repeat_interleave(groups, 1) for x in (tokens.k, tokens.v))
    scores = q @ k.mT * tokens.scale
    bias = torch.zeros(tokens.q.shape[0], k.shape[2]).double() if tokens.key_bias is None else tokens.key_bias.double()
    lse = (scores + bias[:, None, None]).logsumexp(-1)
    out = p @ v
    found = []
    for start in range(0, k.shape[2], size):
        inside = slice(start, start + size)
        part = p[..., inside]
        weight = bias[:, inside].exp()[:, None, :, None]
        total = weight.sum(2)[..., 0]  # (batch, 1)
        k_mean, v_mean = ((x[:, :, inside] * weight).sum(2) / total[..., None].clamp(min=1e-300) for x in (k, v))
        t = total[..., None] * ((q * k_mean[:, :, None]).sum(-1) * tokens.scale - lse).exp()
        d = part.sum(-1)
        r = part @ v[:, :, inside] - t[..., None] * v_mean[:, :, None] - (d - t)[..., None] * out
        found.append(r.square().sum(-1))
    return torch.stack(found, -1), out


def by_block(rows, block):
    return torch.stack([part.sum(2) for part in rows.split(block, 2)], 2)


@quick
@given(
    st.integers(1, 130), st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (2, 2)]), st.sampled_from([(16, 8), (32, 8), (32, 16), (64, 64)]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_error_and_mass_are_their_formulas(tokens, batch, heads, sizes, with_bias, filled):
    bias = torch.randn(batch, tokens) if with_bias else None
    if with_bias and tokens > 20:
        bias[:, 3:17] = -torch.inf  # a whole granule, and parts of two
    query_bias = torch.zeros(1, tokens).masked_fill(torch.arange(tokens) % 5 == 3, -torch.inf) if filled else None
    given_tokens = call(tokens, batch, *heads, *sizes, bias, query_bias)
    block, granule = sizes
    shown = torch.ones(tokens) if query_bias is None else query_bias[0].exp()
    *costs, energy = measure.error(given_tokens)
    for found, size in zip(costs, (granule, block), strict=True):
        rows, out = cost(given_tokens, size)
        torch.testing.assert_close(found.double(), by_block(rows * shown[:, None], block), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(energy.double(), (out * shown[:, None]).square().sum((1, 2, 3)), atol=1e-5, rtol=1e-5)
    p = torch.nn.functional.pad(weights(given_tokens), (0, -tokens % granule)).unflatten(-1, (-1, granule)).sum(-1)
    torch.testing.assert_close(measure.mass(given_tokens).double(), by_block(p * shown[:, None], block), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("piece", [1, 40_000])
def test_pieces_of_any_size_give_the_same(piece, monkeypatch):
    tokens = call(300, 2, 4, 2)
    expected = measure.error(tokens)
    monkeypatch.setitem(measure.PIECE_BYTES, "cpu", piece)
    torch.testing.assert_close(measure.error(tokens), expected)


def test_leaving_out_one_block_costs_what_is_measured():
    """To first order: the true change of the output when one granule of little weight goes to its pooled key."""
    tokens = call(256, heads=1, kv_heads=1)
    tokens = replace(tokens, q=tokens.q / 4)
    found, _, _ = measure.error(tokens)
    out, _ = reference.attention(tokens.q, tokens.k, tokens.v, scale=0.25)
    for granule in (0, 7, 31):
        kept = torch.ones(1, 1, 8, 32, dtype=torch.bool)
        kept[..., granule] = False
        changed, _ = reference.attention(tokens.q, tokens.k, tokens.v, scale=0.25, block_mask=BlockMask.from_dense(kept, 32, 8), tail=PooledTail(4))
        true = by_block((changed - out).square().sum(-1)[..., None], 32)[..., 0]
        torch.testing.assert_close(found[..., granule].double(), true, rtol=0.1, atol=1e-6)


def test_equal_keys_and_values_in_a_block_cost_nothing():
    tokens = call(64)
    k, v = (x.clone() for x in (tokens.k, tokens.v))
    k[:, :, 8:16], v[:, :, 8:16] = k[:, :, 8:9], v[:, :, 8:9]
    found, _, _ = measure.error(Tokens(tokens.q, k, v, None, None, 32, 8, 0.25))
    assert found[..., 1].amax() < 1e-9 * found.amax()


@quick
@given(st.integers(0, 999), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.floats(0.0, 2.0))
def test_a_threshold_over_two_levels_is_the_best_choice(seed, ratio, blocks, level):
    """Of all choices (a coarse block dropped as a whole, or any of its granules but one at least), by trying each."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.rand(blocks * ratio - (seed % ratio), generator=generator)
    coarse = 3 * torch.rand(blocks, generator=generator)
    worth = measure.two_level(fine, coarse, ratio)
    assert worth.shape == fine.shape and (worth >= 0).all()
    for block in range(blocks):
        inside = slice(block * ratio, (block + 1) * ratio)
        costs, gains = fine[inside].tolist(), worth[inside].tolist()
        assert sum(gains) == pytest.approx(coarse[block].item(), abs=1e-5), "nothing kept costs what the coarse pooled key costs"
        options = {(): coarse[block].item()}
        for kept in range(1, 2 ** len(costs)):
            ids = tuple(i for i in range(len(costs)) if kept >> i & 1)
            options[ids] = sum(c for i, c in enumerate(costs) if i not in ids)
        chosen = tuple(i for i, gain in enumerate(gains) if gain > level)
        best = min(cost + level * len(ids) for ids, cost in options.items())
        assert options[chosen] + level * len(chosen) == pytest.approx(best, abs=1e-5)
        assert options[chosen] == pytest.approx(sum(gain for gain in gains if gain <= level), abs=1e-5), "what is dropped adds up"


# threshold


@quick
@given(st.integers(0, 99), st.floats(0.02, 0.9))
def test_an_error_is_kept_within_by_as_few_pairs_as_can_be(seed, error):
    scores = torch.rand(2, 3, 4, 16, generator=torch.Generator().manual_seed(seed)).square() / 48
    forced = Forced.of(torch.arange(16) // 4 == torch.arange(4)[:, None], CPU)
    kept = within_error(Pairs(scores, forced, (32, 8)), error).to_dense(16)
    assert kept[:, :, forced.pairs].all()
    for sample in range(2):
        dropped = scores[sample][~kept[sample]].double()
        assert dropped.sum() <= error**2 * (1 + 1e-6)
        chosen = scores[sample][kept[sample] & ~forced.pairs].double()
        if len(chosen):
            assert dropped.sum() + chosen.min() > error**2 * (1 - 1e-6), "one more could have gone"
            assert not len(dropped) or chosen.min() >= dropped.max()
    by_density = SELECTORS["threshold"](Pairs(scores[:1], forced, (32, 8)), (kept[0] & ~forced.pairs).sum().item() / (3 * 48), {})
    assert torch.equal(by_density.to_dense(16)[0], kept[0]), "a density and an error are two ways to set one threshold"


def test_samples_have_thresholds_of_their_own():
    scores = torch.rand(1, 2, 4, 16)
    both = torch.cat([scores, 100 * torch.rand(1, 2, 4, 16)])
    forced = Forced.of(torch.zeros(4, 16, dtype=torch.bool), CPU)
    alone = SELECTORS["threshold"](Pairs(scores, forced, (32, 8)), 0.3, {}).to_dense(16)
    assert torch.equal(SELECTORS["threshold"](Pairs(both, forced, (32, 8)), 0.3, {}).to_dense(16)[:1], alone)


def test_a_block_that_is_hidden_is_not_dropped_at_a_cost():
    forced = Forced.of(torch.zeros(2, 4, dtype=torch.bool), CPU)
    hidden = torch.tensor([[False, False, True, False]])
    kept = within_error(Pairs(torch.full((1, 1, 2, 4), 0.01), forced, (32, 8), None, hidden), 0.15).to_dense(4)
    assert not kept[..., 2].any() and kept.sum() == 4, "0.15^2 allows two of the six others"


# the recipe


GRID = TokenGrid(4, 8, 8, after=10)


def smooth_video(seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(0, size / 4, size) for size in (4, 8, 8)), indexing="ij")
    place = torch.stack(axes, -1).view(-1, 3) @ torch.randn(batch, 2, 3, 16, generator=generator)
    text = torch.randn(batch, 2, 10, 16, generator=generator)
    q, k, v = (torch.cat([(2 * place + x).sin() * 2, text], 2) for x in (0.0, 0.1, 0.7))
    return q, k, v + 0.3 * torch.randn(v.shape, generator=generator)


@pytest.mark.parametrize("budget", [dict(density=0.3), dict(density=0.1), dict(error=0.05)])
def test_the_prediction_is_near_the_error(budget):
    recipe = get("tessera")
    layout = prepare(recipe, GRID, CPU, block=32)
    q, k, v = smooth_video()
    mask, predicted = choose(recipe, layout, q, k, v, **budget)
    out, same = sparse_attention(recipe, layout, q, k, v, density=0.3, precision="native", mask=mask)
    exact = reference.attention(q, k, v)[0]
    measured = ((out - exact).norm() / exact.norm()).item()
    assert same is mask and predicted.shape == (1,)
    if "error" in budget:
        assert predicted.item() <= budget["error"]
    assert 0.25 * measured < predicted.item() < measured, "errors of blocks add up worse than independent ones"


def test_it_beats_the_others_at_equal_work():
    q, k, v = smooth_video()
    exact = reference.attention(q, k, v)[0]

    def run(recipe, density):
        layout = prepare(recipe, GRID, CPU, block=32)
        out, mask = sparse_attention(recipe, layout, q, k, v, density=density, precision="native")
        return ((out - exact).norm() / exact.norm()).item(), layout.work(mask).item()

    error, work = run(get("tessera"), 0.2)
    for name in ("sparge", "draft", "oracle"):
        other, more = run(get(name), 0.35)
        assert more >= work and error < 0.8 * other, name


@pytest.mark.parametrize("name", sorted(name for name, recipe in RECIPES.items() if recipe.compensate == "drop"))
def test_every_recipe_can_have_the_tail(name):
    q, k, v = smooth_video()
    exact = reference.attention(q, k, v)[0]
    errors, works = [], []
    for recipe in (get(name), with_tail(get(name))):
        layout = prepare(recipe, GRID, CPU, block=32)
        out, mask = sparse_attention(recipe, layout, q, k, v, density=0.25, precision="native")
        errors.append((out - exact).norm() / exact.norm())
        works.append(layout.work(mask))
    assert layout.granule == 8 and layout.tail == PooledTail(4)
    assert errors[1] < 0.75 * errors[0] and works[1] < works[0] + 0.13


def test_work_counts_kept_and_pooled_pairs():
    layout = prepare(get("tessera"), TokenGrid(1, 8, 16), CPU, block=32)  # 4 query blocks, 16 granules, 4 coarse blocks
    kept = torch.zeros(1, 1, 4, 16, dtype=torch.bool)
    kept[..., 0] = True  # 8 keys, 3 fine pooled keys beside them, 3 coarse ones
    assert layout.work(BlockMask.from_dense(kept, 32, 8)).item() == pytest.approx((8 + 3 + 3) / 128)
    plain = prepare(get("sparge"), TokenGrid(1, 8, 16), CPU, block=32)
    assert plain.work(BlockMask.from_dense(kept[..., :4], 32, 32)).item() == pytest.approx(32 / 128)


@pytest.mark.parametrize(
    ("name", "budget", "said"),
    [
        ("tessera", dict(), "density is None, error None; give one of them"),
        ("tessera", dict(density=0.3, error=0.1), "density is 0.3, error 0.1; give one"),
        ("tessera", dict(error=0.0), "error is 0.0; use a value above 0"),
        ("tessera", dict(error=1.01), "error is 1.01; use"),
        ("tessera", dict(error=float("nan")), "error is nan"),
        ("sparge", dict(error=0.1), "error is 0.1, but sparge cannot predict one; give it a density"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(name, budget, said):
    with pytest.raises(ValueError, match=said):
        choose(get(name), prepare(get(name), GRID, CPU, block=32), *smooth_video(), **budget)


def test_an_output_of_nothing_predicts_nothing():
    q, k, v = smooth_video()
    mask, predicted = choose(get("tessera"), prepare(get("tessera"), GRID, CPU, block=32), q, k, torch.zeros_like(v), density=0.3)
    assert predicted.item() == 0.0 and mask.counts.any()
