"""Before an implementation is used on a GPU architecture for the first time, it computes one small problem and is compared.

Kernels are compiled on the user's machine, by the compiler and driver that are installed there, for a GPU that may never
have been tried: a kernel that fails or computes noise is found here, not in somebody's pictures. The problem is hostile on
purpose: odd lengths, ragged blocks, granules with a pooled tail, empty rows, a key bias, outlier channels, and keys with a large common component.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, gpu, reference
from .block_mask import BlockMask, PooledTail, num_blocks

LSE_TOLERANCE = 0.1
"""Largest difference in natural-log units. INT8, the coarsest, stays below half of it here."""

_passed: dict[tuple[str, str], bool] = {}


def ensure(implementation: dispatch.Implementation, device: torch.device) -> bool:
    """True if `implementation` may be used on `device`: its test passed, now or before. Else it has been disabled, with a reason.

    The test runs once per (implementation, GPU architecture) in a process; from then on this is a dictionary lookup.
    During the capture of a CUDA graph nothing can be compared, so the answer is True and the test waits for the next call.
    """
    if implementation.trusted:
        return True
    key = (implementation.name, gpu.of(device).name)
    if key not in _passed:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True
        reason = failure(implementation, device)
        if reason is not None:
            dispatch.disable(*key, reason)
        _passed[key] = reason is None
    return _passed[key]


def failure(implementation: dispatch.Implementation, device: torch.device) -> str | None:
    """Run the test. None if it passes, else the reason in words. Both head sizes that have a kernel configuration are run, and a tail."""
    try:
        run = implementation.load()
        for head_dim, blocks, tail in ((128, (128, 64), None), (64, None, None), (128, (128, 32), PooledTail(4))):
            reason = _compare(run, implementation, device, head_dim, blocks, tail)
            if reason is not None:
                return f"self-test failed on {gpu.of(device).name}: {reason}"
    except Exception as error:  # a compiler, a driver, a kernel: whatever fails must not take the user's run with it
        return f"self-test failed on {gpu.of(device).name}: {type(error).__name__}: {error}"
    return None


def _compare(
    run: dispatch.Run,
    implementation: dispatch.Implementation,
    device: torch.device,
    head_dim: int,
    blocks: tuple[int, int] | None,
    tail: PooledTail | None,
) -> str | None:
    q, k, v, key_bias = (tensor.to(device) for tensor in _problem(head_dim, implementation.self_test_dtype))
    mask = None
    if blocks is not None:
        generator = torch.Generator("cpu").manual_seed(1)
        shape = (1, q.shape[1], num_blocks(q.shape[2], blocks[0]), num_blocks(k.shape[2], blocks[1]))
        kept = torch.rand(shape, generator=generator, device="cpu") < 0.5
        kept[:, 0, 0] = False
        mask = BlockMask.from_dense(kept.to(device), *blocks)
    scale = head_dim**-0.5
    out, lse = run(q, k, v, mask, key_bias, scale, True, *([] if tail is None else [tail]))
    assert lse is not None
    expected, expected_lse = reference.attention(q, k, v, block_mask=mask, key_bias=key_bias, scale=scale, tail=tail)
    empty = expected_lse == -torch.inf
    if not bool(torch.isfinite(out).all()):
        return "the output is not finite"
    if bool((out[empty] != 0).any()) or not torch.equal(lse == -torch.inf, empty):
        return "queries that read nothing do not give zeros and an lse of -inf"
    error = float((out.double() - expected).abs().sum() / expected.abs().sum())
    if not error <= implementation.tolerance:
        return f"relative error {error:.3f} against float64, head_dim {head_dim}, where {implementation.tolerance} is allowed"
    lse_error = float((lse - expected_lse)[~empty].abs().max())
    if not lse_error <= LSE_TOLERANCE:
        return f"log-sum-exp is off by {lse_error:.3f} against float64, head_dim {head_dim}, where {LSE_TOLERANCE} is allowed"
    return None


def _problem(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q `(1, 2, 150, head_dim)`, k and v `(1, 1, 331, head_dim)` of `dtype`, float32 key_bias `(1, 331)`; the same on every device."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    channels = torch.exp(0.2 * normal(1, 1, 1, head_dim))
    q = normal(1, 2, 150, head_dim) * channels
    k = normal(1, 1, 331, head_dim) * channels + 4 * normal(1, 1, 1, head_dim)
    v = normal(1, 1, 331, head_dim)
    key_bias = normal(1, 331)
    key_bias[:, 100:120] = -torch.inf
    return q.to(dtype), k.to(dtype), v.to(dtype), key_bias
