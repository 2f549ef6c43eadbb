"""compensate: what happens to the blocks that are not kept.

A compensator is `f(tokens, mask, scores, settings, precision, choice) -> out`: it runs the sparse attention of a call's `Tokens` over `mask`, and
accounts for the rest. scores: the estimator's, or None where the mask is one that was used before; settings: the method's numbers;
precision and choice: as `attention` takes them, choice for the call that `plan.describe` describes. A call of another shape besides is given
no choice: nobody has asked about it, and the report does not know what computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .. import registry
from ..attention import attention
from ..block_mask import BlockMask, PooledTail
from ..dispatch import Choice
from .tokens import Tokens

Compensator = Callable[[Tokens, BlockMask, "Tensor | None", Mapping[str, float], str, "Choice | None"], Tensor]
COMPENSATORS: dict[str, Compensator] = {}


def compensator(function: Compensator) -> Compensator:
    registry.add(COMPENSATORS, "compensator", function.__name__, function)
    return function


def tail_of(name: str, block: int, granule: int) -> PooledTail | None:
    """The tail that the compensator of a name has the kernel compute."""
    return PooledTail(block // granule) if name == "pooled_tail" else None


@compensator
def drop(tokens: Tokens, mask: BlockMask, scores: Tensor | None, settings: Mapping[str, float], precision: str, choice: Choice | None) -> Tensor:
    """The rest is left out; the kept blocks share the whole weight."""
    return attention(tokens.q, tokens.k, tokens.v, block_mask=mask, key_bias=tokens.key_bias, scale=tokens.scale, precision=precision, choice=choice)


@compensator
def pooled_tail(
    tokens: Tokens, mask: BlockMask, scores: Tensor | None, settings: Mapping[str, float], precision: str, choice: Choice | None
) -> Tensor:
    """The rest stands in the softmax as pooled keys: one a key block beside what is kept, one a query block's size where nothing is. Ours."""
    tail = tail_of("pooled_tail", tokens.block, tokens.granule)
    return attention(
        tokens.q, tokens.k, tokens.v, block_mask=mask, key_bias=tokens.key_bias, scale=tokens.scale, precision=precision, choice=choice, tail=tail
    )
