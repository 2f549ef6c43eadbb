"""compensate: what happens to the blocks that are not kept.

A compensator is `f(q, k, v, mask, key_bias, precision, choice, scale) -> out`, all in permuted order: it runs the sparse attention, which
`plan.describe` describes and choice was made for if there is one, and accounts for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import registry
from ..attention import attention
from ..block_mask import BlockMask
from ..dispatch import Choice

Compensator = Callable[[Tensor, Tensor, Tensor, BlockMask, "Tensor | None", str, "Choice | None", float], Tensor]
COMPENSATORS: dict[str, Compensator] = {}


def compensator(function: Compensator) -> Compensator:
    registry.add(COMPENSATORS, "compensator", function.__name__, function)
    return function


@compensator
def drop(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, key_bias: Tensor | None, precision: str, choice: Choice | None, scale: float) -> Tensor:
    """The rest is left out; the kept blocks share the whole weight."""
    return attention(q, k, v, block_mask=mask, key_bias=key_bias, precision=precision, choice=choice, scale=scale)
