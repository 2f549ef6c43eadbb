"""compensate: what happens to the blocks that are not kept.

A compensator is `f(q, k, v, mask, block, scores, settings, key_bias, scale, precision, choice) -> out`, all in permuted order: it runs the
sparse attention of q, k and v over `mask`, and accounts for the rest. block: tokens in a block; scores: the estimator's, or None where the
mask is one that was used before; settings: the method's numbers; key_bias, scale, precision and choice: as `attention` takes them, choice for
the call that `plan.describe` describes. A call of another shape besides is given no choice: nobody has asked about it, and the report
does not know what computed it. The means of blocks are those of `estimate.block_mean`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .. import registry
from ..attention import attention
from ..block_mask import BlockMask
from ..dispatch import Choice

Compensator = Callable[
    [Tensor, Tensor, Tensor, BlockMask, int, "Tensor | None", Mapping[str, float], "Tensor | None", float, str, "Choice | None"], Tensor
]
COMPENSATORS: dict[str, Compensator] = {}


def compensator(function: Compensator) -> Compensator:
    registry.add(COMPENSATORS, "compensator", function.__name__, function)
    return function


@compensator
def drop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    block: int,
    scores: Tensor | None,
    settings: Mapping[str, float],
    key_bias: Tensor | None,
    scale: float,
    precision: str,
    choice: Choice | None,
) -> Tensor:
    """The rest is left out; the kept blocks share the whole weight."""
    return attention(q, k, v, block_mask=mask, key_bias=key_bias, scale=scale, precision=precision, choice=choice)
