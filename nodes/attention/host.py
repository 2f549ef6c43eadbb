"""How sparse attention is put into a ComfyUI model: its part of a sampling run, of a model call and of an attention call."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...models.families import find, spans_of
from ...models.patchers.attention import AttentionPatch, ModelCall
from ...models.patchers.report import summary
from ...models.patchers.settings import AttentionSettings
from ..comfy import BOXES, OVERRIDE, Overrides, Wrapper, attached, last_result, network_in, pause_malloc_graph, say

KEY = "tessera_attention"


def patch_attention(model: Any, settings: AttentionSettings, node_id: str | None) -> Any:
    """A clone of `model` whose attention follows `settings`. `node_id` is the node that shows the result line.

    An attention patch of this pack that the model already carries is replaced. The given model is left as it was.
    """
    host = _AttentionHost(settings, node_id)
    callbacks = {CallbacksMP.ON_PRE_RUN: host.pre_run, CallbacksMP.ON_CLEANUP: host.cleanup}
    return attached(model, KEY, host, {WrappersMP.APPLY_MODEL: host.apply_model}, callbacks)


def last_report(model: Any) -> dict[str, Any] | None:
    """What the last sampling run with this model's attention patch did; None when it carries no patch or has not run."""
    return last_result(model, KEY)


class _AttentionHost:
    """Connects one AttentionPatch to ComfyUI's sampling life cycle."""

    def __init__(self, settings: AttentionSettings, node_id: str | None):
        self.patch = AttentionPatch(settings, pause_malloc_graph)
        self.node_id = node_id
        self.result: dict[str, Any] | None = None
        self.started = False
        self.overrides = Overrides(self._override)

    def pre_run(self, patcher: Any) -> None:
        self.started = False

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        """APPLY_MODEL wrapper: the same signature for every family, outside what torch.compile captures."""
        transformer_options = {} if transformer_options is None else transformer_options
        base = executor.class_obj
        network = network_in(base)
        if not self.started:
            self.started = True
            sigmas = transformer_options.get("sample_sigmas")
            self.patch.start(lambda percent: float(base.model_sampling.percent_to_sigma(percent)), [] if sigmas is None else sigmas.tolist())
            family = find(network)
            self.patch.report.family = None if family is None else family.name
        latent_shape = tuple(kwargs["latent_shapes"][0]) if "latent_shapes" in kwargs else tuple(x.shape)
        spans = spans_of(network, latent_shape, kwargs)
        if spans is not None and BOXES in transformer_options:
            spans = replace(spans, boxes=transformer_options[BOXES])
        window = transformer_options.get("context_window")
        branch = (tuple(transformer_options.get("uuids", ())), None if window is None else tuple(window.index_list))
        sigma = float(t.flatten()[0])

        def forward(call: ModelCall) -> Any:
            # The step's own dictionary, freshly merged: an override set by a later node is chained, not lost.
            options = {**transformer_options, KEY: call, OVERRIDE: self.overrides[transformer_options.get(OVERRIDE)]}
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

        call = ModelCall(spans, sigma, branch, x.device)
        self.patch.begin(call)
        out = forward(call)
        if self.patch.finish(call):
            out = forward(self.patch.again(call))
        return out

    def cleanup(self, patcher: Any) -> None:
        """After every sampling run, also a failed or interrupted one."""
        if not self.started:
            return
        self.started = False
        self.result = self.patch.report.as_dict()
        self.patch.release()
        line = summary(self.result)
        logging.info("Tessera: %s", line)
        say(self.node_id, line)

    def _override(self, inner: Wrapper) -> Wrapper:
        def override(
            func: Wrapper,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            heads: int,
            mask: Tensor | None = None,
            attn_precision: Any = None,
            skip_reshape: bool = False,
            skip_output_reshape: bool = False,
            transformer_options: Any = None,
            **kwargs: Any,
        ) -> Any:
            def dense() -> Any:
                arguments = dict(
                    mask=mask,
                    attn_precision=attn_precision,
                    skip_reshape=skip_reshape,
                    skip_output_reshape=skip_output_reshape,
                    transformer_options=transformer_options,
                    **kwargs,
                )
                return inner(func, q, k, v, heads, **arguments)

            call = None if transformer_options is None else transformer_options.get(KEY)
            if call is None:
                return dense()

            def to_host(out: Tensor) -> Tensor:
                return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

            q4, k4, v4 = (q, k, v) if skip_reshape else _split_heads(q, k, v, heads, kwargs.get("enable_gqa", False))
            key_bias, unsupported = _key_bias(mask, k4.shape[0], k4.shape[-2])
            return self.patch.attend(
                call,
                q4,
                k4,
                v4,
                dense,
                to_host,
                key_bias=key_bias,
                unsupported=unsupported,
                quantize=kwargs.get("low_precision_attention", True),
                scale=kwargs.get("scale"),
            )

        disabled: Wrapper = torch.compiler.disable(override)  # under torch.compile its decisions would be baked into the graph at the first step
        return disabled


def _split_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, grouped: bool) -> list[Tensor]:
    """q `(batch, tokens, heads * head_dim)` and k, v of any shape of whole tokens (core's SD 3.5 hands v with its heads apart) as
    `(batch, heads, tokens, head_dim)`; what cannot be read so comes back as it is. grouped: k and v have heads of their own number."""
    batch, head_dim = q.shape[0], q.shape[-1] // heads
    split = []
    for x in (q, k, v):
        count = x.shape[-1] // head_dim if grouped and head_dim else heads
        token = batch * count * head_dim
        whole = x.shape[0] == batch and token and x.numel() % token == 0
        split.append(x.reshape(batch, -1, count, head_dim).transpose(1, 2) if whole else x)
    return split


def _key_bias(mask: Tensor | None, batch: int, k_len: int) -> tuple[Tensor | None, str | None]:
    """(bias `(batch, k_len)`, None) where a mask only hides or weighs keys; (None, reason) where it differs between queries."""
    if mask is None:
        return None, None
    # ComfyUI reads a 2-D mask as (q_len, k_len), a 3-D one as (batch, q_len, k_len), a 4-D one as (batch, heads, q_len, k_len).
    per_key = mask.shape[0] == 1 if mask.ndim == 2 else all(size == 1 for size in mask.shape[1:-1]) and mask.shape[0] in (1, batch)
    if not per_key or mask.shape[-1] != k_len:
        return None, "attention mask that differs between queries"
    bias = mask.reshape(-1, k_len)
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=bias.device).masked_fill_(~bias, float("-inf"))
    return bias.float().expand(batch, k_len), None
