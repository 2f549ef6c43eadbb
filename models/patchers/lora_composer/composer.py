"""The concepts at work in a model: injection of each LoRA inside its box, and self-attention under the concepts' mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...families import TokenSpans, find, spans_of
from .concepts import Concept, Delta, fits, validate
from .isolation import BLOCK, Isolation, skip
from .maps import Maps, map_size, probabilities, word_map

CROSS, ALL = "cross-attention", "all layers"
"""Which layers of a LoRA take part: keys, values and output of cross-attention, as in the paper, or every linear layer."""

BLOCK_TOKENS = 16 * BLOCK
"""From this length on isolation skips blocks; below it there is nothing to gain over a dense mask."""

Made = TypeVar("Made")

_UNET = "comfy.ldm.modules.diffusionmodules.openaimodel"


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
        keep: Callable[[], AbstractContextManager[Any]] = nullcontext,
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
        joint = ("double_blocks", "single_blocks", "transformer_blocks")
        self._blocks = list(self._cross.values()) or [block for name in joint for block in getattr(network, name, ())]  # one self-attention each
        self._linear: dict[str, nn.Module] = {}
        for index, concept in enumerate(concepts, 1):
            wanted = [name for name in concept.deltas if self._takes_part(name, layers)]
            taken = [name for name in wanted if fits(index, name, modules.get(name), concept.deltas[name])]
            if not taken:
                raise ValueError(f"concept {index}'s LoRA changes none of the model's {layers}; use a LoRA of this base, or layers: {ALL}")
            self._linear |= {name: modules[name] for name in taken}
        self.release()
        self.counts = {"injected": 0, "linear": 0, "block mask": 0, "block density": 0.0, "dense mask": 0, "replaced": 0}

    def release(self) -> None:
        """Drop the tensors that were placed on a device."""
        self._placed: dict[tuple[Any, ...], Any] = {}

    def _takes_part(self, name: str, layers: str) -> bool:
        if layers == ALL or self._cross_name is None:
            return True
        parent, _, last = name.removesuffix(".0").rpartition(".")
        return name.startswith("text_embedding.") or (parent in self._cross and last in ("to_k", "to_v", "to_out", "k", "v", "o"))

    def only_for_concepts(self, name: str) -> bool:
        """Whether a layer is part of the way from a prompt to the cross-attention's output: what injection replaces as a whole."""
        return name.startswith("text_embedding.") or any(part == self._cross_name for part in name.split("."))

    def check(self, latent_shape: tuple[int, ...], maps: bool) -> None:
        """Raises ValueError where latents of this shape do not show the canvas, or a box holds no token of them, or no cell of their `maps`."""
        height, width = latent_shape[-2:]
        if abs(height * self.canvas[1] - width * self.canvas[0]) >= max(self.canvas):
            raise ValueError(
                f"LoRA Composer: the sampler's latent is {width} x {height}, and the boxes lie in a picture of {self.canvas[1]} x {self.canvas[0]}; "
                "give LoRA Composer the sampler's latent"
            )
        spans = spans_of(self.network, latent_shape, {})
        grids = [((height, width) if spans is None else (spans.height, spans.width), "token", "enlarge it")]
        if maps:
            grids.append((map_size(self.network, latent_shape), "cell of the attention maps", "enlarge it, or turn reinitialise and enhancement off"))
        for (rows, columns), unit, remedy in grids:
            for index, concept in enumerate(self.concepts, 1):
                if any(part.start == part.stop for part in concept.box.cells(rows, columns, self.canvas)):
                    raise ValueError(f"concept {index}'s box ({concept.box}) holds no whole {unit} ({columns} x {rows} in all); {remedy}")

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
            down = None if delta.down is None else delta.down.to(like.device, like.dtype)
            return Delta(delta.up.to(like.device, like.dtype), down, delta.start)

        return self.once((id(delta), like.device, like.dtype), make)

    def once(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` makes, kept under `key` until `release`."""
        if key not in self._placed:
            with self._keep():
                self._placed[key] = make()
        made: Made = self._placed[key]
        return made

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
        handles: list[RemovableHandle] = [module.register_forward_hook(call.linear_hook(name)) for name, module in self._linear.items()]
        handles += [module.register_forward_pre_hook(call.enter_block) for module in self._blocks]
        handles += [module.register_forward_pre_hook(call.enter_cross) for module in self._cross.values()]
        handles += [module.register_forward_hook(call.cross_hook, with_kwargs=True) for module in self._cross.values()]
        try:
            yield call
        finally:
            for handle in handles:
                handle.remove()


class _Place(NamedTuple):
    """Where the picture lies in a self-attention, in tokens. text: in front of it, the prompt and each concept's (joint attention)."""

    height: int
    width: int
    frames: int = 1
    before: int = 0  # references
    after: int = 0
    text: tuple[int, ...] = ()


class Call:
    """One forward of the network."""

    def __init__(
        self, composer: Composer, latent_shape: tuple[int, ...], batch: int, conditional: Sequence[bool], extras: Mapping[str, Any], maps: Maps | None
    ):
        self.composer, self.maps = composer, maps
        self.only: int | None = None  # the concept whose own forward is under way
        self.inside_cross = False
        self.reached = False  # whether the model ran a layer of the LoRAs
        self.self_attentions = 0  # that the model's blocks have
        self.conditionings = len(conditional)
        flags = torch.tensor(list(conditional)).repeat_interleave(batch // len(conditional))
        self.batches = {kind: (flags == kind).nonzero()[:, 0] for kind in (True, False)}
        self.spans: TokenSpans | None = None
        self.levels: dict[int, tuple[int, int]] = {}
        if composer.kind == "unet":
            height, width = latent_shape[-2:]
            while height * width not in self.levels:
                self.levels[height * width] = (height, width)
                height, width = -(-height // 2), -(-width // 2)
        else:
            self.spans = spans_of(composer.network, latent_shape, extras)
            assert self.spans is not None
        self.prompts = tuple(concept.context.shape[1] for concept in composer.concepts) if composer.kind == "joint" and all(conditional) else ()
        self._texts: dict[int, Tensor] = {}

    def per_latent(self, x: Tensor) -> Tensor:
        """The mean over the conditionings, which are `(conditionings * batch, ...)` one after the other."""
        return x.reshape(self.conditionings, -1, *x.shape[1:]).mean(0)

    def image_rows(self, tokens: int, device: torch.device) -> list[Tensor] | None:
        """Per concept its rows in a sequence of image tokens; None where a sequence of this length is none."""
        if self.spans is None:
            return self.composer.rows(*self.levels[tokens], 1, device) if tokens in self.levels else None
        return self._rows_in(self.spans, device) if tokens == self.spans.image_tokens else None

    def _rows_in(self, spans: TokenSpans, device: torch.device) -> list[Tensor]:
        return [rows + spans.references_before for rows in self.composer.rows(spans.height, spans.width, spans.frames, device)]

    def token_rows(self, name: str, x: Tensor) -> list[Tensor] | None:
        """Per concept the rows of `x` `(batch, tokens, channels)` that its LoRA is added to at layer `name`; None where there are none."""
        if x.ndim != 3:
            return None
        if self.composer.kind != "joint":
            return self.image_rows(x.shape[1], x.device)
        assert self.spans is not None
        text = x.shape[1]
        parts: list[list[Tensor]] = [[] for _ in self.composer.concepts]
        if not any(part.startswith(("txt", "add_")) or part == "to_add_out" for part in name.split(".")):
            text -= self.spans.image_tokens
            if text < 0:
                return None
            for part, rows in zip(parts, self._rows_in(self.spans, x.device), strict=True):
                part.append(rows + text)
        if text and self.prompts:
            start = text - sum(self.prompts)
            if start < 0:
                return None
            for part, length in zip(parts, self.prompts, strict=True):
                part.append(torch.arange(start, start + length, device=x.device))
                start += length
        return [torch.cat(part) if part else torch.empty(0, dtype=torch.int64, device=x.device) for part in parts]

    def linear_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        replaced = self.composer.only_for_concepts(name)

        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            self.reached = True
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

    def enter_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.self_attentions += self.only is None

    def enter_cross(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inside_cross = True

    def cross_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
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
            self._look(self.maps, module, x)
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

    def _look(self, maps: Maps, module: Any, x: Tensor) -> None:
        """At a cross-attention: the concepts' keys against the base's queries of the whole picture."""
        if self.composer.kind == "unet":
            if x.shape[1] != math.prod(maps.size):
                return
            to_q, to_k, heads = module.to_q, module.to_k, module.heads
        else:
            to_q, to_k, heads = (lambda x: module.norm_q(module.q(x))), (lambda x: module.norm_k(module.k(x))), module.num_heads
        q = to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for index, concept in enumerate(self.composer.concepts):
            with self.concept(index):
                k = to_k(self.text(index, x)).unflatten(-1, (heads, -1)).transpose(1, 2)
            maps.keep(index, self.per_latent(word_map(q, k, concept.words)))

    def _look_joint(self, maps: Maps, q: Tensor, k: Tensor, place: _Place, scale: float | None) -> None:
        """At a joint attention of text and picture: the same with the appended prompts."""
        start, *lengths = place.text
        picture = q[:, :, sum(place.text) + place.before : q.shape[2] - place.after]
        for index, (length, concept) in enumerate(zip(lengths, self.composer.concepts, strict=True)):
            maps.keep(index, self.per_latent(word_map(picture, k[:, :, start : start + length], concept.words, scale)))
            start += length

    def _place(self, tokens: int) -> _Place | None:
        """Of the picture in its self-attention; None where a sequence of this length is another."""
        if self.spans is None:
            return _Place(*self.levels[tokens]) if tokens in self.levels else None
        grid = self.spans.grid(tokens, tokens)
        if grid is None:
            return None
        text = (tokens - self.spans.image_tokens - sum(self.prompts), *self.prompts) if self.composer.kind == "joint" else ()
        return _Place(grid.height, grid.width, grid.frames, self.spans.references_before, self.spans.references_after, text)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masked: Callable[[Tensor], Tensor], scale: float | None, blocks: bool) -> Tensor | None:
        """Self-attention under the concepts' mask; None where a call is not the picture's self-attention or needs no mask.

        q, k, v: `(batch, heads, tokens, head_dim)`. masked(mask): the host's attention with an additive mask `(tokens, tokens)`, in the form
        of q. blocks: False where the host's own mask must be kept, so that blocks cannot be skipped.
        """
        place = self._place(q.shape[2]) if k.shape[2] == q.shape[2] else None
        if place is None:
            return None
        once, counts = self.composer.once, self.composer.counts
        isolation = once(("isolation", place, q.device), lambda: self._isolation(place, q.device)) if self.composer.isolate or self.prompts else None
        if self.maps is not None:
            if self.prompts:
                self._look_joint(self.maps, q, k, place, scale)
            if self.maps.with_self and q.shape[2] == math.prod(self.maps.size):
                self.maps.own.append(self.per_latent(probabilities(q, k, scale, None if isolation is None else isolation.bias(torch.float32))))
        if isolation is None:
            return None
        if blocks and q.shape[2] >= BLOCK_TOKENS:
            sorted_blocks = once(("blocks", place, q.device), isolation.blocks)
            if (out := skip(sorted_blocks, q, k, v, scale)) is not None:
                counts["block mask"] += 1
                counts["block density"] += sorted_blocks.density
                return out
        counts["dense mask"] += 1
        return masked(once(("mask", place, q.device, q.dtype), lambda: isolation.bias(q.dtype)))

    def _isolation(self, place: _Place, device: torch.device) -> Isolation:
        labels = F.pad(self.composer.labels(place.height, place.width).repeat(place.frames), (place.before, place.after))
        return Isolation(len(self.composer.concepts), labels, place.text, self.composer.isolate, device)
