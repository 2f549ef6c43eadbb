"""A sparse method is a recipe of five parts: permute -> estimate -> select -> compensate, and a schedule (`models/patchers`).

Each part is a small function on tensors, registered by name in the module of its kind. A paper is a few declarative lines here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .. import registry


@dataclass(frozen=True)
class Setting:
    """A number that belongs to one method; a node shows a widget for it."""

    default: float
    minimum: float
    maximum: float
    step: float
    tooltip: str


@dataclass(frozen=True)
class Recipe:
    """One sparse method. permute, estimate, select and compensate are keys of the registries in the modules of those names.

    granules: key blocks in a query block, where each has 8 keys or more. protect_text, protect_first_frame: rows and columns of blocks with such
    tokens are dense. protect_own_block: each query block reads itself. needs_grid: False where the method still makes sense on tokens in their
    given order. by_error: its scores are squared errors that add up, so an error may be asked for in place of a density. quick: the
    estimator for a run in which looking once with `estimate` does not pay; None where `estimate` is cheap enough for every call.
    control: for measurements only, not offered to users.
    """

    name: str
    title: str
    source: str
    estimate: str
    select: str
    permute: str | None = None
    compensate: str = "drop"
    granules: int = 1
    protect_text: bool = True
    protect_first_frame: bool = False
    protect_own_block: bool = True
    needs_grid: bool = True
    by_error: bool = False
    quick: str | None = None
    control: bool = False
    settings: Mapping[str, Setting] = field(default_factory=dict)


_SIMILARITY = {
    "similarity": Setting(
        0.0,
        0.0,
        1.0,
        0.05,
        "Blocks whose tokens are less alike than this are kept whole, on top of the density. 0: guard off (the authors' -0.1). 0.3: careful.",
    )
}

_ALL = (  # the first is the default
    Recipe(
        name="tessera",
        title="measures once what it costs to leave out a block, keeps the blocks where that is most, and pools the rest",
        source="ours: docs/method.md",
        permute="window3d",
        estimate="tail_error",
        select="threshold",
        compensate="pooled_tail",
        granules=4,
        protect_own_block=False,
        needs_grid=False,
        by_error=True,
        quick="pooled",
    ),
    Recipe(
        name="sparge",
        title="block means with a self-similarity guard, top-k; works without knowing the model family",
        source="SpargeAttn, Zhang et al. 2025, arXiv:2502.18137; the 3-D windows are ours, the paper suggests a Hilbert curve",
        permute="window3d",
        estimate="pooled_similarity",
        select="topk",
        needs_grid=False,
        settings=_SIMILARITY,
    ),
    Recipe(
        name="rainfusion2",
        title="3-D windows, block means, top-k; text and first frame stay dense",
        source="RainFusion2.0, Chen et al. 2025, arXiv:2512.24086; window order as in ModelTC/LightX2V",
        permute="window3d",
        estimate="pooled",
        select="topk",
        protect_first_frame=True,
    ),
    Recipe(
        name="draft",
        title="tiles inside a frame, block means, one threshold per head; text stays dense",
        source="DraftAttention, Shen et al. 2025, arXiv:2505.14708",
        permute="spatial_tiles",
        estimate="pooled",
        select="global_quantile",
    ),
    Recipe(
        name="sparge_top_p",
        title="like sparge, but rows whose attention is spread out get more blocks than rows whose attention is sharp",
        source="SpargeAttn's cumulative rule (cdfthreshd), with the share of attention solved for the density",
        permute="window3d",
        estimate="pooled_similarity",
        select="top_p",
        needs_grid=False,
        settings=_SIMILARITY,
    ),
    Recipe(
        name="random",
        title="random blocks",
        source="control for measurements",
        permute="window3d",
        estimate="random",
        select="topk",
        control=True,
    ),
    Recipe(
        name="oracle",
        title="the blocks that exact attention looks at most, found anew for every call",
        source="control for measurements: what every cheap score stands for",
        permute="window3d",
        estimate="exact_mass",
        select="topk",
        control=True,
    ),
)

RECIPES = registry.by_name("recipe", _ALL)


LEAST_GRANULE = 8
"""Keys. Finer ones would make the tail as long as what it replaces."""


def with_tail(recipe: Recipe) -> Recipe:
    """The recipe with finer key blocks and the pooled tail for what it drops."""
    return replace(recipe, granules=4, compensate="pooled_tail")


def get(name: str) -> Recipe:
    """The recipe of a name. Raises ValueError naming it and the known ones."""
    if name not in RECIPES:
        known = ", ".join(recipe.name for recipe in RECIPES.values() if not recipe.control)
        raise ValueError(f"method is {name!r}, which is not known; use one of {known}")
    return RECIPES[name]
