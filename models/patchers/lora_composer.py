"""LoRA-Composer (Yang et al. 2024, arXiv:2403.11627): several concept LoRAs in one picture, each in its own box. Knows no host.

Four parts. *Injection*: inside a box the cross-attention is the one of the concept's LoRA and prompt. *Isolation*: self-attention does not
pass from one concept's box to another's. *Re-initialisation*: each box starts from that part of the noise where its concept shows best.
*Enhancement*: a gradient step on the latent makes the concept appear in its box and fill it.

Where a model has no cross-attention (joint attention: Flux, Qwen-Image) the concepts' prompts are appended to the text, a mask lets each
box read its own prompt, and the LoRA is added for the tokens of its box and prompt. Constants are those of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import attention as kernel
from ...kernels import dispatch
from ...kernels.block_mask import BlockMask, num_blocks
from ..families import TokenLayout, find, layout_of

CROSS, ALL = "cross-attention", "all layers"
"""Which layers of a LoRA take part: keys, values and output of cross-attention, as in the paper, or every linear layer."""

MAP_SCALE = 4
"""The attention maps that are looked at are this many times smaller than the latent (16 x 32 for 512 x 1024 pixels in the paper)."""

BLOCK = 64
BLOCK_TOKENS = 16 * BLOCK
"""From this length on isolation skips blocks; below it there is nothing to gain over a dense mask."""

STEP_SIZE, LAST_STEP, PATIENCE = 20.0, 25, 5
_UNET = "comfy.ldm.modules.diffusionmodules.openaimodel"


@dataclass(frozen=True)
class Box:
    """Pixels left..right-1, top..bottom-1 of the canvas."""

    left: int
    top: int
    right: int
    bottom: int

    def cells(self, height: int, width: int, canvas: tuple[int, int]) -> tuple[slice, slice]:
        """(rows, columns) of the cells that lie wholly inside, on a grid over the canvas (height, width); empty where none does."""

        def inside(start: int, stop: int, cells: int, pixels: int) -> slice:
            first = -(-start * cells // pixels)
            return slice(first, max(stop * cells // pixels, first))

        return inside(self.top, self.bottom, height, canvas[0]), inside(self.left, self.right, width, canvas[1])

    def __str__(self) -> str:
        return f"x {self.left}..{self.right}, y {self.top}..{self.bottom}"


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to a linear layer's output channels from `start` on: up (down x), or up x where there is no down."""

    up: Tensor  # (out, rank) or (out, in)
    down: Tensor | None = None  # (rank, in)
    start: int = 0


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept.

    context: its prompt, encoded, `(1, tokens, width)`. words: the rows of the context that name it. deltas: its LoRA by the layer's name.
    """

    box: Box
    context: Tensor
    words: tuple[int, ...]
    deltas: Mapping[str, Sequence[Delta]]


def validate(boxes: Sequence[Box], canvas: tuple[int, int]) -> None:
    """Raises ValueError where a box is empty, outside the canvas (height, width), or shares a pixel with another."""
    height, width = canvas
    for index, box in enumerate(boxes, 1):
        if box.left >= box.right or box.top >= box.bottom:
            raise ValueError(f"concept {index} has an empty box ({box}); give it a width and a height above 0")
        if box.left < 0 or box.top < 0 or box.right > width or box.bottom > height:
            raise ValueError(f"concept {index}'s box ({box}) leaves the canvas of {width} x {height}; move it, or make the canvas larger")
        for other, second in enumerate(boxes[: index - 1], 1):
            if box.left < second.right and second.left < box.right and box.top < second.bottom and second.top < box.bottom:
                raise ValueError(f"the boxes of concept {other} ({second}) and concept {index} ({box}) overlap; move them apart")


def kind_of(network: nn.Module) -> str | None:
    """How a network takes text: "unet", "cross" (Wan) or "joint" (Flux, Qwen-Image); None for one that is not supported."""
    if any(cls.__module__ == _UNET for cls in type(network).__mro__):
        return "unet"
    family = find(network)
    return None if family is None else {"Wan": "cross", "Flux": "joint", "Qwen-Image": "joint"}.get(family.name)


class Composer:
    """The concepts at work in one patched model. `call` announces a forward; `attend` computes its self-attention.

    canvas: (height, width) in pixels of the boxes. layers: CROSS or ALL. keep: entered around the creation of tensors that outlive a call.
    Raises ValueError for boxes that do not fit, a network that is not supported and a LoRA that does not belong to it.
    """

    def __init__(
        self,
        network: nn.Module,
        concepts: Sequence[Concept],
        canvas: tuple[int, int],
        *,
        isolate: bool = True,
        layers: str = CROSS,
        keep: Callable[[], AbstractContextManager] = nullcontext,
    ):
        validate([concept.box for concept in concepts], canvas)
        kind = kind_of(network)
        if kind is None:
            raise ValueError(f"model is a {type(network).__name__}; LoRA Composer supports SD1.5, SDXL, Flux, Chroma, Wan and Qwen-Image")
        self.network, self.concepts, self.canvas, self.isolate, self.kind = network, concepts, canvas, isolate, kind
        self._keep = keep
        self._cross_name = {"unet": "attn2", "cross": "cross_attn", "joint": None}[kind]
        modules = dict(network.named_modules())
        self._cross = {name: module for name, module in modules.items() if name.rpartition(".")[2] == self._cross_name}
        self._linear: dict[str, nn.Module] = {}
        for index, concept in enumerate(concepts, 1):
            wanted = [name for name in concept.deltas if self._takes_part(name, layers)]
            taken = [name for name in wanted if _fits(index, name, modules.get(name), concept.deltas[name])]
            if not taken:
                raise ValueError(f"concept {index}'s LoRA changes none of the model's {layers}; use a LoRA of this base, or layers: {ALL}")
            self._linear |= {name: modules[name] for name in taken}
        self.release()
        self.counts = {"injected": 0, "linear": 0, "block mask": 0, "dense mask": 0}

    def release(self) -> None:
        """Drop the tensors that were placed on a device."""
        self._placed: dict[tuple, Any] = {}

    def _takes_part(self, name: str, layers: str) -> bool:
        if layers == ALL or self._cross_name is None:
            return True
        parent, _, last = name.removesuffix(".0").rpartition(".")
        return name.startswith("text_embedding.") or (parent in self._cross and last in ("to_k", "to_v", "to_out", "k", "v", "o"))

    def only_for_concepts(self, name: str) -> bool:
        """Whether a layer is part of the way from a prompt to the cross-attention's output: what injection replaces as a whole."""
        return name.startswith("text_embedding.") or any(part == self._cross_name for part in name.split("."))

    def labels(self, height: int, width: int) -> Tensor:
        """int64 `(height * width,)`: 0 for the background, i + 1 for concept i."""
        out = torch.zeros(height, width, dtype=torch.int64)
        for index, concept in enumerate(self.concepts, 1):
            out[concept.box.cells(height, width, self.canvas)] = index
        return out.flatten()

    def rows(self, height: int, width: int, frames: int, device: torch.device) -> list[Tensor]:
        """Per concept the int64 ids of its tokens, in raster order over frames, height, width."""

        def make() -> list[Tensor]:
            labels = self.labels(height, width).repeat(frames)
            return [(labels == index).nonzero()[:, 0].to(device) for index in range(1, len(self.concepts) + 1)]

        return self.once(("rows", height, width, frames, device), make)

    def delta(self, delta: Delta, like: Tensor) -> Delta:
        """`delta` on the device and in the dtype of `like`."""

        def make() -> Delta:
            up, down = (None if part is None else part.to(like.device, like.dtype) for part in (delta.up, delta.down))
            assert up is not None
            return Delta(up, down, delta.start)

        return self.once((id(delta), like.device, like.dtype), make)

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` makes, kept under `key` until `release`."""
        if key not in self._placed:
            with self._keep():
                self._placed[key] = make()
        return self._placed[key]

    @contextmanager
    def call(
        self,
        latent_shape: tuple[int, ...],
        text: Tensor,
        conditional: Sequence[bool],
        extras: Mapping[str, Any] | None = None,
        maps: Maps | None = None,
    ) -> Iterator[Call]:
        """One forward of the network, with hooks on its layers until the block is left.

        text: the encoded prompt `(batch, tokens, width)`. conditional: for equal parts of the batch, whether it is the prompt's and not the
        negative prompt's. extras: the forward's keyword arguments. maps: filled with attention maps.
        """
        for index, concept in enumerate(self.concepts, 1):
            if concept.context.shape[-1] != text.shape[-1]:
                raise ValueError(
                    f"concept {index}'s prompt was encoded in {concept.context.shape[-1]} channels, the model's prompt in {text.shape[-1]}; "
                    "encode both with the CLIP of the same checkpoint"
                )
        call = Call(self, latent_shape, text.shape[0], conditional, extras or {}, maps)
        handles = []
        try:
            for name, module in self._linear.items():
                handles.append(module.register_forward_hook(call.linear_hook(name)))
            for module in self._cross.values():
                handles.append(module.register_forward_pre_hook(call.enter_cross))
                handles.append(module.register_forward_hook(call.cross_hook, with_kwargs=True))
            yield call
        finally:
            for handle in handles:
                handle.remove()


def _fits(index: int, name: str, module: Any, deltas: Sequence[Delta]) -> bool:
    """Whether a layer takes a concept's deltas. Only linear layers do. Raises ValueError where the shapes are another base's."""
    if not hasattr(module, "in_features"):
        return False
    for delta in deltas:
        columns = (delta.up if delta.down is None else delta.down).shape[1]
        if columns != module.in_features or delta.start + delta.up.shape[0] > module.out_features:
            raise ValueError(
                f"concept {index}'s LoRA belongs to another base: its {name} goes from {columns} to {delta.up.shape[0]} channels, "
                f"the model's from {module.in_features} to {module.out_features}"
            )
    return True


class Call:
    """One forward of the network."""

    def __init__(
        self, composer: Composer, latent_shape: tuple[int, ...], batch: int, conditional: Sequence[bool], extras: Mapping[str, Any], maps: Maps | None
    ):
        self.composer, self.maps = composer, maps
        self.only: int | None = None  # the concept whose own forward is under way
        self.inside_cross = False
        flags = torch.tensor(list(conditional)).repeat_interleave(batch // len(conditional))
        self.batches = {kind: (flags == kind).nonzero()[:, 0] for kind in (True, False)}
        self.layout: TokenLayout | None = None
        self.levels: dict[int, tuple[int, int]] = {}
        if composer.kind == "unet":
            height, width = latent_shape[-2:]
            while height * width not in self.levels:
                self.levels[height * width] = (height, width)
                height, width = -(-height // 2), -(-width // 2)
        else:
            self.layout = layout_of(composer.network, latent_shape, extras)
            assert self.layout is not None
        self.prompts = tuple(concept.context.shape[1] for concept in composer.concepts) if composer.kind == "joint" and all(conditional) else ()
        self._texts: dict[int, Tensor] = {}
        finest = next(iter(self.levels.values())) if self.layout is None else (self.layout.height, self.layout.width)
        for index, concept in enumerate(composer.concepts, 1):
            if any(part.start == part.stop for part in concept.box.cells(*finest, composer.canvas)):
                raise ValueError(
                    f"concept {index}'s box ({concept.box}) holds no whole token of the {finest[1]} x {finest[0]} in the picture; enlarge it"
                )

    def image_rows(self, tokens: int, device: torch.device) -> list[Tensor] | None:
        """Per concept its rows in a sequence of image tokens; None where a sequence of this length is none."""
        if self.layout is None:
            return self.composer.rows(*self.levels[tokens], 1, device) if tokens in self.levels else None
        layout = self.layout
        if tokens != layout.image_tokens:
            return None
        return [rows + layout.references_before for rows in self.composer.rows(layout.height, layout.width, layout.frames, device)]

    def token_rows(self, name: str, x: Tensor) -> list[Tensor] | None:
        """Per concept the rows of `x` `(batch, tokens, channels)` that its LoRA is added to at layer `name`; None where there are none."""
        if x.ndim != 3:
            return None
        if self.composer.kind != "joint":
            return self.image_rows(x.shape[1], x.device)
        assert self.layout is not None
        image, tokens = self.layout.image_tokens, x.shape[1]
        text_only = any(part.startswith(("txt", "add_")) or part == "to_add_out" for part in name.split("."))
        both = not text_only and tokens > image
        parts: list[list[Tensor]] = [[] for _ in self.composer.concepts]
        if both or not text_only:
            found = self.image_rows(image, x.device)
            if tokens < image or found is None:
                return None
            for part, rows in zip(parts, found, strict=True):
                part.append(rows + (tokens - image))
        if text_only or both:
            start = (tokens if text_only else tokens - image) - sum(self.prompts)
            if self.prompts and start < 0:
                return None
            for part, length in zip(parts, self.prompts, strict=bool(self.prompts)):
                part.append(torch.arange(start, start + length, device=x.device))
                start += length
        return [torch.cat(part) if part else torch.empty(0, dtype=torch.int64, device=x.device) for part in parts]

    def linear_hook(self, name: str) -> Callable:
        replaced = self.composer.only_for_concepts(name)

        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            x = args[0]
            where: list[tuple[int, Any]]
            if self.only is not None:
                where = [(self.only, slice(None))]
            else:
                rows = None if replaced else self.token_rows(name, x)
                if rows is None:
                    return None
                where = [(index, part) for index, part in enumerate(rows) if len(part)]
            todo = [(part, delta) for index, part in where for delta in self.composer.concepts[index].deltas.get(name, ())]
            if not todo:
                return None
            self.composer.counts["linear"] += 1
            out = out.clone()
            for part, delta in todo:
                delta = self.composer.delta(delta, x)
                inner = x[:, part] if delta.down is None else F.linear(x[:, part], delta.down)
                channels = slice(delta.start, delta.start + delta.up.shape[0])
                out[:, part, channels] += F.linear(inner, delta.up).to(out.dtype)
            return out

        return hook

    def enter_cross(self, module: nn.Module, args: tuple) -> None:
        self.inside_cross = True

    def cross_hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """Replaces the rows of each box by the module's own output for the concept's prompt, with the concept's LoRA in its layers."""
        if self.only is not None:
            return None
        x = args[0]
        context = args[1] if len(args) > 1 else kwargs["context"]
        regions = self.image_rows(x.shape[1], x.device)
        if regions is None:
            raise ValueError(
                f"LoRA Composer: cross-attention over {x.shape[1]} tokens, which is no level of this latent; "
                "leave out nodes that change the size inside the model (deep shrink)"
            )
        if self.maps is not None:
            self.maps.look(self, module, x)
        pictures = kwargs.get("context_img_len") or 0
        others = {key: value for key, value in kwargs.items() if key not in ("context", "value")}
        out = out.clone()
        for index, rows in enumerate(regions):
            for conditional, batch in self.batches.items():
                if not len(rows) or not len(batch):
                    continue
                batch = batch.to(x.device)
                text = context[batch]
                if conditional:
                    text = torch.cat([text[:, :pictures], self.text(index, x).expand(len(batch), -1, -1)], 1)
                with self.concept(index):
                    part = module(x[batch][:, rows], context=text, **others)
                out[batch[:, None], rows] = part.to(out.dtype)
        self.inside_cross = False
        self.composer.counts["injected"] += 1
        return out

    @contextmanager
    def concept(self, index: int) -> Iterator[None]:
        """Every layer runs with the LoRA of one concept."""
        self.only = index
        try:
            yield
        finally:
            self.only = None

    def text(self, index: int, like: Tensor) -> Tensor:
        """A concept's prompt as the cross-attention takes it."""
        if index not in self._texts:
            text = self.composer.concepts[index].context.to(like.device, like.dtype)
            if self.composer.kind == "cross":
                with self.concept(index):
                    text = self.composer.network.get_submodule("text_embedding")(text)
            self._texts[index] = text
        return self._texts[index]

    def appended(self, text: Tensor) -> Tensor:
        """The text of a joint-attention model followed by the concepts' prompts, where this is the prompt's forward."""
        if not self.prompts:
            return text
        return torch.cat([text, *(concept.context.to(text).expand(text.shape[0], -1, -1) for concept in self.composer.concepts)], 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masked: Callable[[Tensor], Tensor], scale: float | None, blocks: bool) -> Tensor | None:
        """Self-attention under the concepts' mask; None where a call is not the picture's self-attention or needs no mask.

        q, k, v: `(batch, heads, tokens, head_dim)`. masked(mask): the host's attention with an additive mask `(tokens, tokens)`, in the form
        of q. blocks: False where the host's own mask must be kept, so that blocks cannot be skipped.
        """
        tokens = q.shape[2]
        if k.shape[2] != tokens:
            return None
        text: tuple[int, ...] = ()
        if self.layout is None:
            if tokens not in self.levels:
                return None
            size = (*self.levels[tokens], 1)
            before = after = 0
        else:
            grid = self.layout.grid(tokens, tokens)
            if grid is None:
                return None
            size = (grid.height, grid.width, grid.frames)
            before, after = self.layout.references_before, self.layout.references_after
            length = tokens - self.layout.image_tokens
            if self.composer.kind == "joint":
                text = (length - sum(self.prompts), *self.prompts)
        if not self.composer.isolate and not self.prompts:
            if self.maps is not None:
                self.maps.look_self(q, k, None, scale)
            return None
        if self.maps is not None and self.prompts:
            self.maps.look_joint(self, q, k, scale)
        key, once = (size, before, after, text, q.device), self.composer.once

        def make() -> Isolation:
            labels = F.pad(self.composer.labels(*size[:2]).repeat(size[2]), (before, after))
            return Isolation(len(self.composer.concepts), labels, text, self.composer.isolate, q.device)

        isolation: Isolation = once(("isolation", key), make)
        if self.maps is not None:
            self.maps.look_self(q, k, isolation, scale)
        if blocks and tokens >= BLOCK_TOKENS:
            out = skip(once(("blocks", key), isolation.blocks), q, k, v, scale)
            if out is not None:
                self.composer.counts["block mask"] += 1
                return out
        self.composer.counts["dense mask"] += 1
        return masked(once(("mask", key, q.dtype), lambda: isolation.bias(q.dtype)))


class Isolation:
    """Who reads whom in self-attention, as groups of tokens: background, one a concept, and in front of them the text if there is any.

    labels: int64 `(image tokens,)`, 0 for the background. text: lengths of the global prompt and of each concept's prompt (joint attention).
    A concept's box reads the background, itself, and its own prompt (without one, the global prompt), and other boxes unless `isolate`.
    """

    def __init__(self, concepts: int, labels: Tensor, text: Sequence[int], isolate: bool, device: torch.device):
        prompts = len(text) > 1
        everything = 1 + concepts  # the label of the global prompt; the concepts' prompts follow
        self.groups = torch.cat([*(torch.full((length,), everything + index) for index, length in enumerate(text)), labels]).to(device)
        reads = torch.zeros(2 + 2 * concepts, 2 + 2 * concepts, dtype=torch.bool)
        picture = slice(0, 1 + concepts)
        reads[[0, everything], picture] = True
        reads[[0, everything], everything] = True
        for index in range(1, 1 + concepts):
            reads[index, picture] = not isolate
            reads[index, [0, index]] = True
            reads[index, everything + index if prompts else everything] = True
            reads[everything + index, [index, everything + index]] = True
        self.reads = reads.to(device)

    def allowed(self) -> Tensor:
        """bool `(tokens, tokens)`, True where a query reads a key."""
        return self.reads[self.groups][:, self.groups]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The same as an additive mask: 0 or -inf."""
        allowed = self.allowed()
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))

    def blocks(self) -> Blocks:
        """The same as a block mask: tokens sorted by group, and every group filled up to whole blocks with hidden keys."""
        order, real, block_groups = [], [], []
        for group in self.groups.unique().tolist():
            ids = (self.groups == group).nonzero()[:, 0]
            count = num_blocks(len(ids), BLOCK)
            order.append(F.pad(ids, (0, count * BLOCK - len(ids))))
            real.append(torch.arange(count * BLOCK, device=ids.device) < len(ids))
            block_groups += [group] * count
        sources, kept = torch.cat(order), torch.cat(real)
        inverse = torch.empty_like(self.groups)
        inverse[sources[kept]] = kept.nonzero()[:, 0]
        key_bias = torch.zeros(len(sources), device=kept.device).masked_fill_(~kept, float("-inf"))
        return Blocks(sources, inverse, key_bias, BlockMask.from_dense(self.reads[block_groups][:, block_groups][None, None], BLOCK, BLOCK))


@dataclass(frozen=True)
class Blocks:
    """order: int64 (padded,) source of each position. inverse: int64 (tokens,) position of each token. key_bias: float32 (padded,)."""

    order: Tensor
    inverse: Tensor
    key_bias: Tensor
    mask: BlockMask


def skip(blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor | None:
    """Attention of `(batch, heads, tokens, head_dim)` that skips what is not read; None where no backend takes the call."""
    padded = len(blocks.order)
    own = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(q.dtype, "native")
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    problem = dispatch.Problem(q.device, q.dtype, q.shape[1], k.shape[1], padded, padded, q.shape[3], (BLOCK, BLOCK), True, grad)
    precision = next((name for name in (own, "native") if kernel.explain(problem, name).implementation is not None), None)
    if precision is None:
        return None
    key_bias = blocks.key_bias.expand(q.shape[0], -1)
    q, k, v = (x.index_select(2, blocks.order) for x in (q, k, v))
    return kernel.attention(q, k, v, block_mask=blocks.mask, key_bias=key_bias, precision=precision, scale=scale).index_select(2, blocks.inverse)


@dataclass
class Maps:
    """Attention maps of one forward, of its conditional batch. Lists over layers; means over heads.

    size: (height, width) of the tokens that are looked at. cross: per concept `(batch, frames * height * width, words)`. with_self: also
    collect `own`, the self-attention `(batch, height * width, height * width)` (UNet).
    """

    size: tuple[int, int]
    with_self: bool = False
    cross: dict[int, list[Tensor]] = field(default_factory=dict)
    own: list[Tensor] = field(default_factory=list)

    def look(self, call: Call, module: Any, x: Tensor) -> None:
        """At a cross-attention: the concepts' keys against the base's queries of the whole picture."""
        if call.composer.kind == "unet":
            if x.shape[1] != math.prod(self.size):
                return
            to_q, to_k, heads = module.to_q, module.to_k, module.heads
        else:
            heads = module.num_heads
            to_q, to_k = (lambda x: module.norm_q(module.q(x))), (lambda x: module.norm_k(module.k(x)))
        q = to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for index in range(len(call.composer.concepts)):
            with call.concept(index):
                k = to_k(call.text(index, x)).unflatten(-1, (heads, -1)).transpose(1, 2)
            self._keep(call, index, q, k, None)

    def look_joint(self, call: Call, q: Tensor, k: Tensor, scale: float | None) -> None:
        """At a joint attention of text and picture: the same with the appended prompts."""
        assert call.layout is not None
        first = q.shape[2] - call.layout.image_tokens + call.layout.references_before
        last = q.shape[2] - call.layout.references_after
        start = q.shape[2] - call.layout.image_tokens - sum(call.prompts)
        for index, length in enumerate(call.prompts):
            self._keep(call, index, q[:, :, first:last], k[:, :, start : start + length], scale)
            start += length

    def look_self(self, q: Tensor, k: Tensor, isolation: Isolation | None, scale: float | None) -> None:
        if self.with_self and q.shape[2] == math.prod(self.size):
            self.own.append(_probabilities(q, k, None if isolation is None else isolation.bias(torch.float32), scale))

    def _keep(self, call: Call, index: int, q: Tensor, k: Tensor, scale: float | None) -> None:
        words = call.composer.concepts[index].words
        heads = (
            _probabilities(q[:, [head]], k[:, [head]], None, scale)[..., list(words)] for head in range(q.shape[1])
        )  # one by one: videos are long
        self.cross.setdefault(index, []).append(sum(heads, torch.zeros((), device=q.device)) / q.shape[1])

    def concept(self, index: int) -> Tensor:
        """`(batch, height, width, words)`, the mean over layers and frames."""
        return torch.stack(self.cross[index]).mean(0).unflatten(1, (-1, *self.size)).mean(1)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias).softmax(-1).mean(1)


def map_size(network: nn.Module, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the tokens whose maps are looked at: of a UNet, the level with cross-attention whose scale is nearest to MAP_SCALE."""
    layout = layout_of(network, latent_shape, {})
    if layout is not None:
        return layout.height, layout.width
    scale, scales = 1, set()
    for block in network.get_submodule("input_blocks").children():
        scale *= 2 if any(type(module).__name__ == "Downsample" for module in block.modules()) else 1
        if any(name.endswith("attn2") for name, _ in block.named_modules()):
            scales.add(scale)
    height, width = latent_shape[-2:]
    for _ in range(min(scales, key=lambda found: abs(found - MAP_SCALE)).bit_length() - 1):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def reinitialise(noise: Tensor, maps: Maps, concepts: Sequence[Concept], canvas: tuple[int, int]) -> Tensor:
    """Each box gets a copy of the box-sized window of `noise` `(batch, ..., height, width)` in which its words are attended to most.

    The result has the mean and the deviation of the noise. A box that is smaller than a cell of the maps is left as it is.
    """
    out = noise.clone()
    height, width = maps.size
    steps = [-(-full // cells) for full, cells in zip(noise.shape[-2:], maps.size, strict=True)]
    for index, concept in enumerate(concepts):
        rows, columns = concept.box.cells(height, width, canvas)
        window = (rows.stop - rows.start, columns.stop - columns.start)
        if 0 in window:
            continue
        scores = F.avg_pool2d(maps.concept(index).sum(-1)[:, None], window, stride=1)[:, 0]
        for sample, best in enumerate(scores.flatten(1).argmax(1).tolist()):
            corner = (best // scores.shape[-1], best % scores.shape[-1])
            source, target = [], []
            for axis, (first, cells, step) in enumerate(zip((rows.start, columns.start), window, steps, strict=True)):
                full = noise.shape[axis - 2]
                size = min(cells * step, full - max(first, corner[axis]) * step)  # the last cell of an odd size is not whole
                source.append(slice(corner[axis] * step, corner[axis] * step + size))
                target.append(slice(first * step, first * step + size))
            out[sample, ..., target[0], target[1]] = noise[sample, ..., source[0], source[1]]
    dims = tuple(range(1, noise.ndim))
    mean, std = noise.mean(dims, keepdim=True), noise.std(dims, keepdim=True)
    return (out - out.mean(dims, keepdim=True)) / out.std(dims, keepdim=True) * std + mean


def enhancement_loss(maps: Maps, concepts: Sequence[Concept], canvas: tuple[int, int]) -> Tensor:
    """Scalar: small where every concept's words are attended to strongly and all over its box, and its box attends to itself.

    Per word 8 (1 - mean of the best fifth, under a Gaussian around the box's middle) + 2 L1(1 in the box's rows and columns, their maxima);
    per concept 10 times the strongest self-attention from the box to elsewhere.
    """
    height, width = maps.size
    own = torch.stack(maps.own).mean(0)
    total = own.new_zeros(())
    for index, concept in enumerate(concepts):
        rows, columns = concept.box.cells(height, width, canvas)
        inside = torch.zeros(height, width, device=own.device)
        inside[rows, columns] = 1.0
        best = max(int(inside.sum() * 0.2), 1)
        if not inside.any():
            continue
        gauss = torch.zeros_like(inside)
        gauss[rows, columns] = _bell(rows.stop - rows.start, own.device)[:, None] * _bell(columns.stop - columns.start, own.device)
        gauss = gauss / gauss.max()
        smooth = _smooth(maps.concept(index).movedim(-1, 1))
        strongest = (smooth * gauss).flatten(2).topk(best, -1).values.mean(-1)
        total = total + 8.0 * (1.0 - strongest).clamp_min(0).sum()
        boxed = smooth * inside
        for axis in (-2, -1):
            total = total + 2.0 * (boxed.amax(axis) - inside.amax(axis)).abs().mean(-1).sum()
        flat = inside.flatten().bool()
        if not flat.all():
            outward = own[:, flat][:, :, ~flat].flatten(1)
            total = total + 10.0 * outward.topk(min(best, outward.shape[1]), -1).values.mean(-1).sum()
    return total


def _bell(cells: int, device: torch.device) -> Tensor:
    """exp(-x^2 / 2) over x = -1..1."""
    return torch.exp(-0.5 * torch.linspace(-1.0, 1.0, cells, device=device) ** 2)


def _smooth(x: Tensor) -> Tensor:
    """3 x 3 smoothing of `(batch, maps, height, width)` with the authors' kernel exp(-(d / 2 sigma)^2), sigma 0.5, borders reflected."""
    if min(x.shape[-2:]) < 2:
        return x
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], device=x.device) ** 2))
    kernel = line[:, None] * line / line.sum() ** 2
    return F.conv2d(F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[:, 0].unflatten(0, x.shape[:2])


class Schedule:
    """When and how far the latent is moved: 20 sqrt(1 .. 1/2) over the steps, until the loss rises after 5 steps, and 25 of 50 steps at most."""

    def __init__(self, steps: int, strength: float):
        self.steps, self.strength = steps, strength
        self.losses: list[float] = []
        self.stopped = strength <= 0

    def size(self, step: int) -> float:
        """The step size in the latent of variance 1; 0 where the latent stays."""
        last = min(LAST_STEP, (self.steps - 1) // 2)
        if self.stopped or step > last:
            return 0.0
        return self.strength * STEP_SIZE * math.sqrt(1.0 - 0.5 * step / max(self.steps - 1, 1))

    def record(self, step: int, loss: float) -> None:
        self.stopped = bool(self.losses) and loss > self.losses[-1] and step >= PATIENCE
        self.losses.append(loss)
