"""Accelerate, Sparse Attention and Attention Report."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ...kernels.dispatch import PRECISIONS
from ...kernels.sparsity import RECIPES, Recipe, get
from ...models.patchers.report import AttentionReport as Report
from ...models.patchers.report import heat_map, summary
from ...models.patchers.search import SEARCH_PAYS
from ...models.patchers.settings import BLOCK_SIZES, MIN_TOKENS, AttentionSettings, parse_layers
from ..comfy import described
from .host import last_report, patch_attention

CATEGORY = "Tessera/attention"
MODES = {"quality": (0.03, 0.5), "balanced": (0.06, 0.3), "fast": (0.12, 0.2)}
"""Mode -> (error of a call, density of runs that are too short to look for what keeps it)."""


def accelerate_settings(mode: str, min_tokens: int, **changes: Any) -> AttentionSettings:
    """What *Accelerate* does in a mode; `bench/quality.py` measures it. changes: of other fields, to measure what else there could be. A method
    that cannot predict an error gets the density."""
    error, density = MODES[mode]
    settings = {"method": "tessera", "density": density, "gentle_few_steps": True, "min_tokens": min_tokens, **changes}
    return AttentionSettings(**{"error": error if get(settings["method"]).by_error else None, **settings})


_MODEL_TIP = "Any diffusion model. It is cloned: the model that you connect stays as it was, and bypassing this node removes the patch."
_MIN_TOKENS_TIP = (
    "Shorter sequences are not made sparse: below about 12k tokens dense attention is as fast. Count: frames x height x width in latent patches."
)


class Accelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraAccelerate",
            display_name="Accelerate",
            category=CATEGORY,
            description="Makes the attention of a video or image model sparse and quantized, with settings chosen for you: it looks once what "
            "can be left out, and keeps what the mode's error needs. Put it between the model loader and the sampler. After a run the node shows "
            "what ran, with which error, and why.",
            search_aliases=["sparse attention", "sage attention", "speed up", "fast video"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL_TIP),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="balanced",
                    tooltip="Error that the attention may have after the dense first steps: "
                    + ", ".join(f"{mode} {error:.0%}" for mode, (error, _) in MODES.items())
                    + ". It is the predicted difference from dense attention in what attention passes on, not in pixels. How much is computed "
                    "for it, and the error that was measured, stand on the node after a run. "
                    f"Models that sample in 8 steps or fewer keep one dense step; runs with fewer than {SEARCH_PAYS} sparse steps go by a density.",
                ),
                io.Int.Input("min_tokens", default=MIN_TOKENS, min=0, max=1 << 24, tooltip=_MIN_TOKENS_TIP, advanced=True),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The accelerated clone.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, mode: str, min_tokens: int) -> io.NodeOutput:
        return io.NodeOutput(patch_attention(model, accelerate_settings(mode, min_tokens), cls.hidden.unique_id))


def _option(recipe: Recipe) -> io.DynamicCombo.Option:
    """A method with the widgets that are its own."""
    widgets: list[io.Input] = [
        io.Float.Input(name, default=own.default, min=own.minimum, max=own.maximum, step=own.step, tooltip=own.tooltip)
        for name, own in recipe.settings.items()
    ]
    if recipe.by_error:
        tip = (
            "Error that the attention of a call may have: 0.08 is a predicted difference of 8 % from dense attention, in what attention passes "
            "on, not in pixels. As many blocks are kept as that takes: density is then a result, on the node's line, and the widget serves only "
            f"runs that are too short to look (fewer than {SEARCH_PAYS} sparse steps). 0: the density counts."
        )
        widgets.append(io.Float.Input("error", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tip))
    if recipe.quick is not None:
        tip = "Steps after which it looks again for the blocks to keep. Looking takes time, which is on the node's line. 0: once a run."
        widgets.append(io.Int.Input("search_every", default=0, min=0, max=100, optional=True, tooltip=tip))
    return io.DynamicCombo.Option(recipe.name, widgets)


def _check_percents(start_percent: float, end_percent: float) -> None:
    AttentionSettings(start_percent=start_percent, end_percent=end_percent).validate()


def _check_blocks(dense_blocks: str) -> None:
    parse_layers(dense_blocks)


def _check_error(method: dict[str, Any], beside: dict[str, Any]) -> None:
    """ComfyUI would pass over an error that an API prompt gives to another method."""
    error = beside.get("method.error")
    if error:
        raise ValueError(f"method.error is {described(error)}, but {method['method']} cannot predict one; use tessera, or 0 and a density")


class SparseAttention(io.ComfyNode):
    checks = (_check_percents, _check_blocks, _check_error)

    @classmethod
    def define_schema(cls) -> io.Schema:
        methods = [recipe for recipe in RECIPES.values() if not recipe.control]
        return io.Schema(
            node_id="TesseraSparseAttention",
            display_name="Sparse Attention",
            category=CATEGORY,
            description="Block-sparse self-attention with every setting in your hands. Use Accelerate for settings chosen for you.",
            search_aliases=["rainfusion", "draft attention", "sparge", "sage attention", "block sparse"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL_TIP),
                io.DynamicCombo.Input(
                    "method",
                    options=[_option(recipe) for recipe in methods],
                    tooltip="How the kept blocks are found. " + " ".join(f"{recipe.name}: {recipe.title}." for recipe in methods),
                ),
                io.Float.Input(
                    "density",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the blocks that the method chooses. What it always keeps (text, first frame, a block's own) comes on top; "
                    "the density on the node's line counts both. Lower is faster. 1, with an error of 0, is dense: with native precision the result "
                    "is then exactly that of ComfyUI alone.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *PRECISIONS],
                    default="native",
                    tooltip="native: the model's own. int8: INT8 q.k with smoothed K (Ampere or newer). "
                    "auto: int8 where the GPU has it, else native.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Sampling before this part of the noise schedule stays dense: the first steps decide the composition.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Sampling after this part of the schedule stays dense."
                ),
                io.String.Input(
                    "dense_blocks",
                    default="0",
                    tooltip="Transformer blocks that stay dense, counted from 0 in the order of execution: 0,1 or 0-3. Empty: none.",
                ),
                io.Int.Input("min_tokens", default=MIN_TOKENS, min=0, max=1 << 24, tooltip=_MIN_TOKENS_TIP),
                io.Combo.Input(
                    "block",
                    options=["auto", *map(str, BLOCK_SIZES)],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Tokens in a block. auto: the largest of 128, 64, 32, 16 that leaves 16 blocks.",
                ),
                io.Int.Input(
                    "mask_refresh",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Sampling steps that share one selection of blocks, of methods that choose at every step. 1: chosen anew at every step.",
                ),
                io.Boolean.Input(
                    "tail",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="What is left out is pooled instead of dropped: a block of keys that is left out counts as one mean key. Key blocks are "
                    "finer. A little more work, a smaller error. tessera always has it.",
                ),
            ],
            accept_all_inputs=True,  # for _check_error
            outputs=[io.Model.Output(display_name="model", tooltip="The patched clone.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        method: dict[str, Any],
        density: float,
        precision: str,
        start_percent: float,
        end_percent: float,
        dense_blocks: str,
        min_tokens: int,
        block: str = "auto",
        mask_refresh: int = 1,
        tail: bool = False,
    ) -> io.NodeOutput:
        recipe = get(method["method"])
        settings = AttentionSettings(
            method=recipe.name,
            method_settings={name: value for name, value in method.items() if name in recipe.settings},
            density=density,
            error=method.get("error") or None,
            tail=tail,
            precision=precision,
            start_percent=start_percent,
            end_percent=end_percent,
            dense_blocks=parse_layers(dense_blocks),
            min_tokens=min_tokens,
            block=None if block == "auto" else int(block),
            mask_refresh=mask_refresh,
            search_every=method.get("search_every", 0),
        )
        return io.NodeOutput(patch_attention(model, settings, cls.hidden.unique_id))


class AttentionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraAttentionReport",
            display_name="Attention Report",
            category=CATEGORY,
            description="What the attention patch did in the run that made these samples: a heat map of density by step and layer, "
            "and all figures as text.",
            search_aliases=["sparse attention report", "heat map", "density"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that went into the sampler, patched by Accelerate or Sparse Attention."),
                io.Latent.Input("samples", tooltip="The sampler's output. It passes through unchanged; it makes this node wait for the run."),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The samples, unchanged."),
                io.Image.Output(display_name="heat map", tooltip="Rows: sampling steps. Columns: layers. Bright: dense."),
                io.String.Output(display_name="report", tooltip="All figures as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, samples: Any) -> io.NodeOutput:
        report, line = last_report(model), None
        if report is None:  # its patch node is bypassed, or was never there: say so, and let the workflow run on
            report, line = Report("none", "native").as_dict(), "No attention patch on this model: it ran as ComfyUI runs it."
        picture = heat_map(report)
        preview = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(samples, picture, json.dumps(report), ui={**preview, "text": (line or summary(report),), "tessera": (report,)})
