"""On a real GPU: every implementation against float64, its self-test, and tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from tessera.kernels import backends, dispatch, quantize, reference, selftest
from tessera.kernels.attention import attention, describe, explain
from tessera.kernels.block_mask import BlockMask, PooledTail, num_blocks
from tessera.kernels.triton_backend import IMPLEMENTATIONS

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOLERANCE = {implementation.precision: implementation.tolerance for implementation in IMPLEMENTATIONS}


def skip_without(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, has {free:.1f}")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=CUDA, dtype=dtype)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out - expected).abs().sum() / expected.abs().sum())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda implementation: implementation.name)
def test_self_test(implementation: dispatch.Implementation) -> None:
    assert selftest.failure(implementation, CUDA) is None


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        *(("native", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        *(("int8", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        *(("bf16", torch.float32), ("fp16", torch.float32)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("head_dim", "blocks"),
    [
        *((head_dim, None) for head_dim in (40, 64, 128)),
        *((64, (16, 16)), (128, (128, 8)), (128, (128, 32)), (64, (32, 8)), (96, (64, 32))),
        *((64, (128, 64)), (128, (128, 64)), (128, (128, 128)), (72, (256, 256))),
    ],
    ids=str,
)
@pytest.mark.parametrize("tail", [None, PooledTail(4)], ids=["drop", "tail"])
def test_every_implementation_equals_float64(
    head_dim: int, blocks: tuple[int, int] | None, precision: str, dtype: torch.dtype, tail: PooledTail | None
) -> None:
    if tail is not None and blocks is None:
        pytest.skip("a tail needs a mask")
    backends.register_all()
    q, v = normal(2, 4, 611, head_dim, dtype=dtype), normal(2, 2, 777, head_dim, dtype=dtype)
    k = normal(2, 2, 777, head_dim, dtype=dtype) + 4 * normal(1, 2, 1, head_dim, dtype=dtype)
    key_bias = normal(2, 777, dtype=torch.float32)
    key_bias[1, 100:300] = -torch.inf
    mask = None
    if blocks is not None:
        kept = torch.rand(1, 4, num_blocks(611, blocks[0]), num_blocks(777, blocks[1]), device=CUDA) < 0.4
        kept[:, 1, 0] = False
        mask = BlockMask.from_dense(kept, *blocks)
    problem = describe(q, k, v, block_mask=mask, key_bias=key_bias, tail=tail)
    expected, expected_lse = reference.attention(q, k, v, block_mask=mask, key_bias=key_bias, tail=tail)
    ran = 0
    for implementation in dispatch.implementations():
        if implementation.precision != precision or implementation.refuse(problem):
            continue
        ran += 1
        out, lse = implementation.load()(q, k, v, mask, key_bias, head_dim**-0.5, True, *([] if tail is None else [tail]))
        empty = expected_lse == -torch.inf
        assert torch.isfinite(out).all() and (out[empty] == 0).all()
        assert relative_error(out, expected) < TOLERANCE[precision], implementation.name
        assert torch.equal(lse == -torch.inf, empty)
        assert (lse - expected_lse)[~empty].abs().max() < selftest.LSE_TOLERANCE, implementation.name
    if not ran:
        pytest.skip(f"no implementation takes {dtype} at precision {precision}")


def test_auto_takes_int8_on_a_tensor_core_gpu() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs sm_80 or newer")
    q = normal(1, 2, 300, 128)
    attention(q, q, q)
    choice = explain(describe(q, q, q))
    assert choice.implementation.name == "triton/int8", choice.refusals


def test_quantization_kernels_equal_plain_torch() -> None:
    from tessera.kernels.triton_backend import quantize as kernels

    q, k = normal(2, 4, 333, 96), normal(2, 2, 555, 96) + 5
    q8, q_scale, _ = kernels.quantize_q(q, 0.1, None)
    k8, k_scale = kernels.quantize_k(k, quantize.key_mean(k))
    for numbers, scale, (expected, expected_scale) in (
        (q8, q_scale, quantize.quantize_q(q, 0.1)),
        (k8, k_scale, quantize.quantize_k(k, quantize.key_mean(k))),
    ):
        torch.testing.assert_close(scale, expected_scale)
        assert (numbers[..., :96].int() - expected.int()).abs().max() <= 1
        assert (numbers[..., :96] == expected).float().mean() > 0.99


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_more_than_two_billion_elements_in_q(precision: str) -> None:
    """The last rows of q and of the output lie beyond 2^31 elements."""
    skip_without(24)
    q = torch.zeros(1, 4, 4_200_000, 128, device=CUDA, dtype=torch.bfloat16)
    q[:, :, -200:] = normal(1, 4, 200, 128)
    assert q.numel() > 2**31
    k, v = normal(1, 4, 100, 128), normal(1, 4, 100, 128)
    out = attention(q, k, v, precision=precision)
    expected, _ = reference.attention(q[:, 3:, -200:], k[:, 3:], v[:, 3:])
    assert relative_error(out[:, 3:, -200:], expected) < TOLERANCE[precision]


@pytest.mark.parametrize("granule", [64, 8])
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_tokens_that_are_far_apart(precision: str, granule: int) -> None:
    """The keys' offsets within one head pass 2^31 elements."""
    skip_without(8)
    stride = 2**23
    around = torch.empty(300, stride, device=CUDA, dtype=torch.bfloat16)
    q, k, v = (around[:, 128 * i : 128 * (i + 1)].copy_(normal(300, 128))[None, None] for i in range(3))
    assert 299 * k.stride(2) > 2**31
    mask = BlockMask.from_dense(torch.rand(1, 1, 3, num_blocks(300, granule), device=CUDA) < 0.8, 128, granule)
    expected, _ = reference.attention(q, k, v, block_mask=mask)
    assert relative_error(attention(q, k, v, block_mask=mask, precision=precision), expected) < TOLERANCE[precision]


def test_many_batches() -> None:
    """More (batch, head) pairs than the second dimension of a CUDA grid takes."""
    q = normal(40_000, 2, 16, 32)
    expected, _ = reference.attention(q[-10:], q[-10:], q[-10:])
    assert relative_error(attention(q, q, q, precision="native")[-10:], expected) < TOLERANCE["native"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    q, k, v = (normal(1, 2, 300, 64) for _ in range(3))
    function = torch.compile(lambda *tensors: attention(*tensors, precision="int8") * 2, fullgraph=True, backend=backend)
    torch.testing.assert_close(function(q, k, v), attention(q, k, v, precision="int8") * 2)


@pytest.mark.parametrize("tail", [None, PooledTail(4)], ids=["dense", "tail"])
def test_inside_a_cuda_graph(tail: PooledTail | None) -> None:
    q, k, v = (normal(1, 2, 300, 64) for _ in range(3))
    mask = None if tail is None else BlockMask.from_dense(torch.rand(1, 2, 3, 10, device=CUDA) < 0.4, 128, 32)
    expected = attention(q, k, v, block_mask=mask, precision="int8", tail=tail)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, block_mask=mask, precision="int8", tail=tail)
    graph.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("block", "granule", "head_dim"), [(128, 32, 128), (128, 32, 64), (32, 8, 64)])
def test_costs_of_the_tail_are_those_of_plain_torch(block: int, granule: int, head_dim: int) -> None:
    from tessera.kernels.sparsity import exact
    from tessera.kernels.sparsity.tokens import Tokens

    q, k, v = normal(1, 4, 1000, head_dim), normal(1, 2, 1000, head_dim), normal(1, 2, 1000, head_dim)
    bias = normal(1, 1000).float()
    found = exact.error(Tokens(q, k, v, None, bias, block, granule, head_dim**-0.5))
    expected = exact.error(Tokens(q.float().cpu(), k.float().cpu(), v.float().cpu(), None, bias.cpu(), block, granule, head_dim**-0.5))
    for costs, right in zip(found, expected, strict=True):
        assert ((costs.cpu() - right).norm() / right.norm()).item() < 2e-2
