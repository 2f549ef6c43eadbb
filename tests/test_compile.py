"""Under torch.compile the attention is one opaque node: no graph break, and the same numbers as without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.kernels import dispatch, reference
from tessera.kernels.attention import attention, describe, explain
from tessera.kernels.block_mask import BlockMask, PooledTail


def block(x: Tensor, indices: Tensor, counts: Tensor, key_bias: Tensor) -> Tensor:
    """A model's block around the op: views before, arithmetic after, dense and sparse, with and without the lse."""
    q, k, v = (y.unflatten(-1, (2, 32)).transpose(1, 2) for y in (x, x * 0.5, x + 1))
    mask = BlockMask(indices, counts, 32, 16)
    sparse, lse = attention(q, k, v, block_mask=mask, key_bias=key_bias, return_lse=True)
    sparse = sparse + attention(q, k, v, block_mask=mask, key_bias=key_bias, tail=PooledTail(3))
    dense = attention(q, k, v, precision="native")
    return (sparse + dense).transpose(1, 2).flatten(2) * lse.mean(1)[..., None].exp()


def arguments(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = torch.rand(1, 2, -(-tokens // 32), -(-tokens // 16)) < 0.6
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, 32, 16)
    return torch.randn(2, tokens, 64), mask.indices, mask.counts, torch.randn(2, tokens)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager(backend: str) -> None:
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for tokens in (70, 100):
        values = arguments(tokens)
        torch.testing.assert_close(compiled(*values), block(*values))


def test_compiled_equals_float64() -> None:
    q, k, v = (torch.randn(1, 2, 50, 32) for _ in range(3))
    compiled = torch.compile(lambda *tensors: attention(*tensors), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), reference.attention(q, k, v)[0].float(), atol=1e-5, rtol=1e-4)


def test_a_choice_is_what_runs_in_the_compiled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 50, 32) for _ in range(3))
    choice = explain(describe(q, k, v), "native")
    compiled = torch.compile(lambda *tensors: attention(*tensors, choice=choice), fullgraph=True, backend="aot_eager")
    expected = reference.attention(q, k, v)[0].float()
    monkeypatch.setattr(dispatch, "choose", None)
    torch.testing.assert_close(compiled(q, k, v), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_of_the_compiled_call_are_those_of_the_eager_one(return_lse: bool, sparse: bool) -> None:
    """To q, k, v and the bias, through both results, with a mask that the compiled function makes from its arguments."""
    indices, counts = arguments(50)[1:3]
    tensors = [torch.randn(2, 2, 50, 16), torch.randn(2, 1, 50, 16), torch.randn(2, 1, 50, 16), torch.randn(2, 50)]
    tensors[3][:, 4:9] = -torch.inf

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        mask = BlockMask(indices, counts, 32, 16) if sparse else None
        if not return_lse:
            return attention(q, k, v, block_mask=mask, key_bias=bias).sin()
        out, lse = attention(q, k, v, block_mask=mask, key_bias=bias, return_lse=True)
        return out.sin() + lse[..., None].cos()

    gradients = []
    for function in (call, torch.compile(call, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in tensors]
        function(*inputs).sum().backward()
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(gradient.any() for gradient in gradients[0])


def test_with_gradients_there_is_no_whole_graph() -> None:
    compiled = torch.compile(lambda q: attention(q, q, q), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="_run"):
        compiled(torch.randn(1, 2, 20, 16, requires_grad=True))


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_op_is_what_torch_expects_of_one(return_lse: bool) -> None:
    """Schema, fake kernel and shapes, checked by torch itself."""
    q = torch.randn(1, 2, 40, 32).transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.tessera.attention.default, (q, q, q, None, None, 0, 0, 0, None, "native", "", 0.2, return_lse))
