"""Accelerate, Sparse Attention and Attention Report."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ...kernels.dispatch import PRECISIONS
from ...kernels.sparsity import RECIPES
from ...models.patchers.report import AttentionReport as Report
from ...models.patchers.report import heat_map, summary
from ...models.patchers.settings import BLOCK_SIZES, MIN_TOKENS, AttentionSettings, parse_layers
from .host import last_report, patch_attention

CATEGORY = "Tessera/attention"
MODES = {"quality": 0.5, "balanced": 0.3, "fast": 0.2}


def accelerate_settings(mode: str, min_tokens: int, **changes: Any) -> AttentionSettings:
    """What *Accelerate* does in a mode; `bench/quality.py` measures it. changes: of other fields, to measure what else there could be."""
    return AttentionSettings(**{"density": MODES[mode], "gentle_few_steps": True, "min_tokens": min_tokens, **changes})


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
            description="Makes the attention of a video or image model sparse and quantized, with settings chosen for you. "
            "Put it between the model loader and the sampler. After a run the node shows what ran and why.",
            search_aliases=["sparse attention", "sage attention", "speed up", "fast video"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL_TIP),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="balanced",
                    tooltip="Share of the blocks that is chosen after the dense first steps: quality 50 %, balanced 30 %, fast 20 %. "
                    "Text and first frame are kept in any case and come on top. "
                    "Models that sample in 8 steps or fewer keep one dense step and at least 50 %.",
                ),
                io.Int.Input("min_tokens", default=MIN_TOKENS, min=0, max=1 << 24, tooltip=_MIN_TOKENS_TIP, advanced=True),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The accelerated clone.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, mode: str, min_tokens: int) -> io.NodeOutput:
        return io.NodeOutput(patch_attention(model, accelerate_settings(mode, min_tokens), cls.hidden.unique_id))


def _setting_widget(name: str, setting: Any) -> io.Input:
    return io.Float.Input(name, default=setting.default, min=setting.minimum, max=setting.maximum, step=setting.step, tooltip=setting.tooltip)


def _check_percents(start_percent: float, end_percent: float) -> None:
    AttentionSettings(start_percent=start_percent, end_percent=end_percent).validate()


def _check_blocks(dense_blocks: str) -> None:
    parse_layers(dense_blocks)


class SparseAttention(io.ComfyNode):
    checks = (_check_percents, _check_blocks)

    @classmethod
    def define_schema(cls) -> io.Schema:
        methods = [
            io.DynamicCombo.Option(name, [_setting_widget(key, setting) for key, setting in recipe.settings.items()])
            for name, recipe in RECIPES.items()
            if not recipe.control
        ]
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
                    options=methods,
                    tooltip="How the kept blocks are found. "
                    + " ".join(f"{name}: {recipe.title}." for name, recipe in RECIPES.items() if not recipe.control),
                ),
                io.Float.Input(
                    "density",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the blocks that the method chooses. What it always keeps (text, first frame, a block's own) comes on top; "
                    "the density on the node's line counts both. Lower is faster. 1 = dense: with native precision the result is then "
                    "exactly that of ComfyUI alone.",
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
                    tooltip="Sampling steps that share one selection of blocks. 1: chosen anew at every step.",
                ),
            ],
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
    ) -> io.NodeOutput:
        settings = AttentionSettings(
            method=method["method"],
            method_settings={name: value for name, value in method.items() if name != "method"},
            density=density,
            precision=precision,
            start_percent=start_percent,
            end_percent=end_percent,
            dense_blocks=parse_layers(dense_blocks),
            min_tokens=min_tokens,
            block=None if block == "auto" else int(block),
            mask_refresh=mask_refresh,
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
