"""Every implementation, whatever its backend: what it takes on this machine, it computes as float64 does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.kernels import backends, dispatch, reference
from tessera.kernels.attention import attention, describe, explain
from tessera.kernels.block_mask import BlockMask, PooledTail, num_blocks

backends.register_all()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def view(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory of (batch, tokens, heads, head_dim), as models lay them out."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def problems(device: str, dtype: torch.dtype):
    """(q, k, v, mask, bias, tail): odd lengths, grouped heads, ragged blocks, empty rows, hidden keys, a batch."""
    for head_dim, blocks in ((40, None), (64, None), (64, (16, 32)), (128, (64, 64))):
        q, k, v = (view(torch.randn(2, heads, tokens, head_dim).to(device, dtype)) for heads, tokens in ((4, 131), (2, 203), (2, 203)))
        bias = torch.randn(2, 203, device=device)
        bias[1, 20:90] = -torch.inf
        mask = None
        if blocks is not None:
            kept = torch.rand(2, 4, num_blocks(131, blocks[0]), num_blocks(203, blocks[1])) < 0.5
            kept[:, 1, 0] = False
            mask = BlockMask.from_dense(kept.to(device), *blocks)
        for tail in (None,) if mask is None else (None, PooledTail(2)):
            yield q, k, v, mask, None, tail
            yield q, k, v, mask, bias, tail


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", dispatch.implementations(), ids=lambda row: row.name)
def test_an_implementation_computes_what_it_takes(row: dispatch.Implementation, device: str) -> None:
    for q, k, v, mask, bias, tail in problems(device, row.self_test_dtype):
        problem = describe(q, k, v, block_mask=mask, key_bias=bias, tail=tail)
        with backends.use_backend(row.name):
            choice = explain(problem)
            if choice.implementation is None:
                assert choice.refusals[row.name], "a refusal has words"
                continue
            out, lse = attention(q, k, v, block_mask=mask, key_bias=bias, tail=tail, return_lse=True)
            alone = attention(q, k, v, block_mask=mask, key_bias=bias, tail=tail)
        expected, expected_lse = reference.attention(q, k, v, block_mask=mask, key_bias=bias, tail=tail)
        for found in (out, alone):
            assert found.dtype == q.dtype and float((found - expected).abs().sum() / expected.abs().sum()) <= row.tolerance
        empty = expected_lse.isneginf()
        assert torch.equal(lse.isneginf(), empty) and not out[empty].any() and not alone[empty].any()
        assert float((lse - expected_lse)[~empty].abs().max()) < 0.1


def test_every_backend_is_a_package_and_a_line_of_the_table(root: Path) -> None:
    packages = {folder.name for folder in (root / "kernels").glob("*_backend")}
    assert {f"{row.backend.replace('sdpa', 'torch')}_backend" for row in dispatch.implementations()} == packages
