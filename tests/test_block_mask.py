"""BlockMask: lists of blocks and the boolean masks that they stand for."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.kernels import block_mask
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
    assert mask.key_blocks == wider.key_blocks == shape[-1]
    again = BlockMask(mask.indices, mask.counts, 16, 8)  # what is trusted would pass
    assert again.last == (dense * torch.arange(shape[-1])).amax()
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


@pytest.mark.parametrize("wrong", [torch.ones(2, 2, dtype=torch.bool), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 0, 2, dtype=torch.bool)])
def test_wrong_input_is_named(wrong):
    with pytest.raises(ValueError, match="boolean"):
        BlockMask.from_dense(wrong, 16, 16)


def lists(rows, dtype=torch.int32):
    return torch.tensor([[rows]], dtype=dtype)


GOOD = {"indices": lists([[0, 2, 3], [1, 2, 9]]), "counts": torch.tensor([[[3, 2]]], dtype=torch.int32), "block_m": 16, "block_n": 16}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": torch.tensor([[[3, 4]]], dtype=torch.int32)}, "counts go from 3 to 4; expected 0 to the width of indices, 3"),
        ({"counts": torch.tensor([[[-1, 2]]], dtype=torch.int32)}, "counts go from -1 to 2"),
        ({"indices": lists([[0, 2, 3], [-1, 2, 9]])}, "ids go from -1 to 3"),
        ({"key_blocks": 3}, "ids go from 0 to 3; expected 0 to the last key block, 2"),
        ({"indices": lists([[0, 2, 2], [1, 2, 9]])}, "do not ascend, or one occurs twice"),
        ({"indices": lists([[0, 3, 2], [1, 2, 9]])}, "do not ascend"),
        ({"indices": lists([[0, 2, 3], [1, 1, 9]])}, "do not ascend"),
        ({"indices": GOOD["indices"].long()}, "indices is torch.int64, counts torch.int32; both must be torch.int32"),
        ({"indices": GOOD["indices"].float()}, "indices is torch.float32"),
        ({"counts": GOOD["counts"].long()}, "counts torch.int64"),
        ({"counts": torch.tensor([[[3]]], dtype=torch.int32)}, "counts \\(1, 1, 1\\); expected \\(batch, heads, query blocks, width\\)"),
        ({"indices": GOOD["indices"][0]}, "indices has shape \\(1, 2, 3\\)"),
        ({"counts": GOOD["counts"].to("meta")}, "indices is on cpu, counts on meta"),
        ({"block_m": 0}, "block_m is 0, block_n 16; both must be whole numbers"),
        ({"block_n": -16}, "block_n -16"),
    ],
)
def test_a_malformed_mask_is_refused(change, said):
    BlockMask(**GOOD)
    with pytest.raises(ValueError, match="BlockMask: .*" + said):
        BlockMask(**GOOD | change)


def test_what_is_not_read_is_not_looked_at():
    """Padding behind the counts may be anything, and a mask may be empty."""
    assert BlockMask(**GOOD | {"key_blocks": 4}).last == 3
    assert BlockMask(**GOOD | {"counts": torch.zeros(1, 1, 2, dtype=torch.int32), "key_blocks": 1}).last == 0
    assert BlockMask(lists([[]]), torch.zeros(1, 1, 1, dtype=torch.int32), 16, 16).last == 0


def test_only_the_makers_of_masks_are_trusted():
    """Ids that a selection made are not looked at: on a device that would wait for it."""
    wrong = GOOD | {"indices": lists([[0, 2, 2], [1, 2, 9]])}
    mask = BlockMask(**wrong, trusted=True)
    assert mask.last is None
    with pytest.raises(ValueError, match="ascend"):
        dataclasses.replace(mask, block_m=32)
    with pytest.raises(ValueError, match="int32"):
        BlockMask(**GOOD | {"counts": GOOD["counts"].long()}, trusted=True)


def test_masks_on_a_device_are_looked_at_behind_a_switch(monkeypatch):
    """The meta device holds no numbers: looking at them fails."""
    on_device = GOOD | {name: GOOD[name].to("meta") for name in ("indices", "counts")}
    monkeypatch.setattr(block_mask, "CHECK_ON_DEVICE", False)
    assert BlockMask(**on_device).last is None
    monkeypatch.setattr(block_mask, "CHECK_ON_DEVICE", True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        BlockMask(**on_device)


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        (torch.zeros(1, 1, 2, 1), "from_indices: indices is torch.float32"),
        (torch.zeros(1, 1, 2, 1, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 2, 1, dtype=torch.long), "shape \\(1, 2, 1\\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.long), "occurs twice"),
        (torch.full((1, 1, 2, 1), -3), "ids go from -3"),
        (torch.tensor([[[[0, -(2**32) + 1]]]]), "ids go from -2147483648"),
    ],
)
def test_from_indices_refuses(indices, said):
    with pytest.raises(ValueError, match=said):
        BlockMask.from_indices(indices, 16, 16)


def test_a_large_id_does_not_come_round_as_a_small_one():
    mask = BlockMask.from_indices(torch.tensor([[[[0, 2**32 + 1]]]]), 16, 16)
    assert mask.last == 2**31 - 1


@pytest.mark.parametrize("size", [0, -16, 16.0])
def test_block_sizes_are_whole_numbers(size):
    with pytest.raises(ValueError, match=f"block_m is {size}, block_n 16"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), size, 16)
