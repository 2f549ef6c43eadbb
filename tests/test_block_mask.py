"""BlockMask: lists of blocks and the boolean masks that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.kernels.block_mask import BlockMask, num_blocks

quick = settings(deadline=None, max_examples=60)


def masks(seed, shape, density):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@quick
@given(st.integers(0, 999), st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 9)] * 2), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_round_trip(seed, shape, density):
    dense = masks(seed, shape, density)
    mask = BlockMask.from_dense(dense, 16, 8)
    assert mask.indices.dtype == mask.counts.dtype == torch.int32
    assert mask.indices.is_contiguous() and mask.counts.is_contiguous()
    assert torch.equal(mask.to_dense(shape[-1]), dense)
    assert torch.equal(mask.counts.long(), dense.sum(-1))
    assert mask.indices.shape[-1] == max(1, int(dense.sum(-1).amax()))
    wider = BlockMask.from_dense(dense, 16, 8, width=shape[-1])
    assert torch.equal(wider.to_dense(shape[-1]), dense) and wider.indices.shape[-1] == shape[-1]


@quick
@given(st.integers(0, 999), st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 9)] * 2))
def test_ids_ascend_and_padding_is_never_read(seed, shape):
    mask = BlockMask.from_dense(masks(seed, shape, 0.4), 16, 8)
    real = torch.arange(mask.indices.shape[-1]) < mask.counts[..., None]
    steps = mask.indices.diff(dim=-1)
    assert (steps[real[..., 1:]] > 0).all()
    poisoned = BlockMask(mask.indices.masked_fill(~real, 10**6), mask.counts, 16, 8)
    assert torch.equal(poisoned.to_dense(shape[-1]), mask.to_dense(shape[-1]))


def test_from_indices_sorts():
    mask = BlockMask.from_indices(torch.tensor([[[[4, 0, 2], [1, 3, 0]]]]), 8, 8)
    assert mask.indices.tolist() == [[[[0, 2, 4], [0, 1, 3]]]]
    assert mask.counts.tolist() == [[[3, 3]]]


def test_token_mask_and_density():
    dense = torch.tensor([[[[True, False, True], [False, True, False]]]])
    mask = BlockMask.from_dense(dense, 4, 2)
    tokens = mask.token_mask(7, 5)
    assert tokens.shape == (1, 1, 7, 5)
    for row in range(7):
        for column in range(5):
            assert tokens[0, 0, row, column] == dense[0, 0, row // 4, column // 2]
    assert mask.density(5).item() == pytest.approx(0.5)


def test_num_blocks_rounds_up():
    assert [num_blocks(tokens, 16) for tokens in (1, 15, 16, 17, 32)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("wrong", [torch.ones(2, 2, dtype=torch.bool), torch.ones(1, 1, 2, 2)])
def test_wrong_input_is_named(wrong):
    with pytest.raises(ValueError, match="boolean"):
        BlockMask.from_dense(wrong, 16, 16)
