"""Layer Offload and Offload Report."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ...models.offload import OffloadReport as Report
from ...models.offload import picture, summary
from .host import last_report, patch_memory
from .settings import LIMITS, POLICIES, MemorySettings, check_settings

CATEGORY = "Tessera/memory"


def _check_window(policy: str, k: int, k_prime: int) -> None:
    check_settings(MemorySettings(policy=policy, k=k, k_prime=k_prime))


class LayerOffload(io.ComfyNode):
    checks = (_check_window,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraLayerOffload",
            display_name="Layer Offload",
            category=CATEGORY,
            description="Keeps sampling within a memory limit in gigabytes: as many weights as fit stay on the GPU, ComfyUI streams the rest "
            "from RAM. The result stays the same. After a run the node shows what was resident and what was streamed.",
            search_aliases=["block swap", "low vram", "vram limit", "memory budget", "offload", "superpipeline"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any diffusion model. It is cloned: the model that you connect stays as it was, and bypassing this node removes the "
                    "limit.",
                ),
                io.Combo.Input(
                    "limit",
                    options=list(LIMITS),
                    default=LIMITS[0],
                    tooltip="use at most: what this ComfyUI may hold on the GPU in total while it samples. "
                    "leave free: what it leaves to other programs on that GPU.",
                ),
                io.Float.Input(
                    "gb",
                    default=8.0,
                    min=0.1,
                    max=1024.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Gigabytes of the limit, 1 GB = 1024 x 1024 x 1024 bytes, as ComfyUI counts. Weights, activations and a reserve have to "
                    "fit; when the limit is too small, the error names the smallest that works.",
                ),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default=POLICIES[0],
                    tooltip="auto and resident: as many weights stay as the limit has room for. superpipeline: the weights of k blocks stay, which "
                    "leaves more of the limit unused.",
                ),
                io.Int.Input(
                    "k",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="superpipeline only: size of the window, in blocks. 0: as large as the limit allows.",
                ),
                io.Int.Input(
                    "k_prime",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="superpipeline only, experimental: blocks that are fetched ahead together, where ComfyUI runs with DynamicVRAM. 0: "
                    "ComfyUI's own way. Without DynamicVRAM it has no effect.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The clone that keeps to the limit.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, limit: str, gb: float, policy: str, k: int = 0, k_prime: int = 0) -> io.NodeOutput:
        return io.NodeOutput(patch_memory(model, MemorySettings(limit, gb, policy, k, k_prime), cls.hidden.unique_id))


class OffloadReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraOffloadReport",
            display_name="Offload Report",
            category=CATEGORY,
            description="What the memory limit did in the run that made these samples: a picture of one step and of memory against the limit, "
            "and all figures as text.",
            search_aliases=["offload report", "vram report", "memory report"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that went into the sampler, with a limit from Layer Offload."),
                io.Latent.Input("samples", tooltip="The sampler's output. It passes through unchanged; it makes this node wait for the run."),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The samples, unchanged."),
                io.Image.Output(display_name="time line", tooltip="Blocks of one step over time, the copies as predicted, memory against the limit."),
                io.String.Output(display_name="report", tooltip="All figures as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, samples: Any) -> io.NodeOutput:
        report, line = last_report(model), None
        if report is None:  # its node is bypassed, or was never there: say so, and let the workflow run on
            line = "No memory limit on this model: ComfyUI placed its weights by itself."
            report = Report("none", "no limit", no_effect="this model has none").as_dict()
        line = line or summary(report)
        image = picture(report, line)
        preview = ui.PreviewImage(image, cls=cls).as_dict()
        return io.NodeOutput(samples, image, json.dumps(report), ui={**preview, "text": (line,), "tessera": (report,)})
