"""The inputs of every node: held against its own schema before any work; what does not fit is refused in one sentence."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

SHOWN = 40  # characters of a wrong value that a message repeats
LISTED = 12  # choices that a message names


class RefusedError(ValueError):
    """What is wrong with the input `name`."""

    def __init__(self, name: str, text: str):
        super().__init__(text)
        self.name = name


class _Complaint(str):
    """What `validate_inputs` answers, so that it is shown once, beside the input that it is about.

    ComfyUI repeats an answer beside each argument `x` of `validate_inputs`, but leaves out what is an ExecutionBlocker: to every other argument
    this is one. Where ComfyUI should stop to call it `x`, the answer is repeated again.
    """

    name: str

    def __new__(cls, text: str, name: str) -> _Complaint:
        made = super().__new__(cls, text)
        made.name = name
        return made

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        beside = sys._getframe(1).f_locals.get("x")
        return ExecutionBlocker if isinstance(beside, str) and beside is not self and beside != self.name else _Complaint


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """`node` with its inputs guarded: what is known when a prompt is queued is checked then, and the values of links when the node runs.

    A node may have `checks`: functions whose arguments are named as inputs of it, which raise ValueError with a sentence that begins with one
    of these names. Each is called when all of its inputs are known. `beside` as an argument: what a prompt gives besides the inputs, by its
    name there, where the schema accepts all inputs; the node itself is not given it.
    """
    execute, checks = node.execute.__func__, getattr(node, "checks", ())

    def admitted(given: dict[str, Any], queued: bool) -> dict[str, Any]:
        inputs = {entry.id: entry for entry in node.define_schema().inputs}
        files = {names[0] for names in map(_arguments, checks) if len(names) == 1}  # a check knows more files than a list does
        out = _admitted(inputs.values(), {name: value for name, value in given.items() if name in inputs}, queued, files, "")
        beside = {name: value for name, value in given.items() if name not in inputs}
        for check in checks:
            known = {name: beside if name == "beside" else out.get(name, getattr(inputs[name], "default", None)) for name in _arguments(check)}
            if _is_known(known):
                _call(check, known)
        return out

    def validate_inputs(cls: Any, /, **given: Any) -> bool | str:
        try:
            admitted(given, queued=True)
        except RefusedError as refused:
            there = refused.name.partition(".")[0] in given
            return _Complaint(str(refused), refused.name if there else next(iter(given), ""))
        return True

    @wraps(execute)
    def enter(cls: Any, /, **given: Any) -> io.NodeOutput:
        return execute(cls, **admitted(given, queued=False))

    node.validate_inputs = classmethod(validate_inputs)
    node.execute = classmethod(enter)
    return node


def _arguments(check: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(check).parameters)


def _call(check: Callable[..., Any], known: dict[str, Any]) -> None:
    names = {inner: f"{name}.{inner}" for name, value in known.items() if isinstance(value, Mapping) for inner in value}
    names |= {name: name for name in (*known, *known.get("beside", ()))}
    try:
        check(**known)
    except ValueError as error:
        raise RefusedError(names.get(str(error).split(" ", 1)[0], next(iter(known))), str(error)) from error


def _is_known(value: Any) -> bool:
    return all(map(_is_known, value.values())) if isinstance(value, Mapping) else value is not None


def _admitted(inputs: Any, given: Mapping[str, Any], queued: bool, files: set[str], prefix: str) -> dict[str, Any]:
    """`given` in the types of the schema. None is what is not known yet in a queued prompt, and nothing where an input is optional."""
    out = dict(given)
    for entry in inputs:
        name, value = prefix + entry.id, given.get(entry.id)
        if isinstance(entry, io.DynamicCombo.Input):
            if entry.id in given or not entry.optional:
                out[entry.id] = _chosen(entry, name, value, queued)
        elif value is None and entry.optional:
            out.pop(entry.id, None)
        elif entry.id in given:
            out[entry.id] = None if queued and _left_to_comfy(entry, value) else _value(entry, name, value, name in files)
    return out


def _chosen(entry: Any, name: str, value: Any, queued: bool) -> Any:
    options = {option.key: option.inputs for option in entry.options}
    key = value.get(entry.id) if isinstance(value, Mapping) else None  # ComfyUI leaves out a choice that it does not know
    if not isinstance(key, str) or key not in options:
        raise RefusedError(name, f"{name} is not known; use {_listed(list(options))}")
    return _admitted(options[key], value, queued, set(), f"{name}.")


def _left_to_comfy(entry: Any, value: Any) -> bool:
    """Whether a queued value is not known yet, or refused by ComfyUI itself: a list is a link, and numbers are made of what looks like them."""
    made = int if isinstance(entry, io.Int.Input) else float if isinstance(entry, io.Float.Input) else None
    return value is None or isinstance(value, list) or (made is not None and not isinstance(value, made))


def _value(entry: Any, name: str, value: Any, file: bool) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(entry, io.Int.Input | io.Float.Input):
        return _number(entry, name, value)
    if isinstance(entry, io.String.Input):
        if not isinstance(value, str | int | float):
            raise RefusedError(name, f"{name} is {described(value)}, and not a text; connect a text")
        return str(value)  # as ComfyUI makes texts of numbers in widgets
    if not isinstance(entry, io.Boolean.Input | io.Combo.Input):
        return _linked(KINDS[entry.io_type], name, value[None] if _is_one_mask(entry, value) else value)
    if isinstance(entry, io.Boolean.Input):
        fits, use = isinstance(value, bool), "true or false"
    else:
        fits, use = isinstance(value, str) and (file or value in entry.options), _listed(entry.options)
    if not fits:
        raise RefusedError(name, f"{name} is {described(value)}; use {use}")
    return value


def _is_one_mask(entry: Any, value: Any) -> bool:
    return entry.io_type == "MASK" and isinstance(value, Tensor) and value.ndim == 2


def _linked(kind: Kind, name: str, value: Any) -> Any:
    if value is None:
        raise RefusedError(name, f"{name} is empty: {kind.empty}; {kind.remedy}")
    if not kind.fits(value):
        raise RefusedError(name, f"{name} is {described(value)}, and not {kind.what}; {kind.remedy}")
    return value


def _number(entry: Any, name: str, value: Any) -> Any:
    whole = isinstance(entry, io.Int.Input)
    low, high = entry.min, entry.max
    ends = f"{low} to {high}" if whole else f"{low:g} to {high:g}"
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high or (whole and value != int(value)):
        raise RefusedError(name, f"{name} is {described(value)}; use a {'whole ' if whole else ''}number from {ends}")
    return int(value) if whole else float(value)


def _listed(choices: list[str]) -> str:
    if len(choices) > LISTED:
        return f"one of the {len(choices)} in its list"
    if not choices:
        return "a file of its list, which is empty"
    *others, last = (f"'{choice}'" if " " in choice else choice for choice in choices)
    return f"{', '.join(others)} or {last}" if others else last


def described(value: Any) -> str:
    """A value as a message repeats it."""
    if value is None:
        return "empty"
    if isinstance(value, str):
        return f"{value[:SHOWN]!r}" + "..." * (len(value) > SHOWN)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value!s:.{SHOWN}}"
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a record of {', '.join(map(str, value))}"[:SHOWN] if value else "an empty record"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


class Kind(NamedTuple):
    """What a socket takes. what: in words. remedy: what to do where it is something else. empty: why there may be nothing."""

    fits: Callable[[Any], bool]
    what: str
    remedy: str
    empty: str = "the node that it is connected to gives none"


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


def _batch(axes: int, channels: tuple[int, ...] = ()) -> Callable[[Any], bool]:
    """A tensor of floats of so many axes, none of them empty."""

    def fits(value: Any) -> bool:
        real = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == axes and min(value.shape) > 0
        return real and (not channels or value.shape[-1] in channels)

    return fits


def _is_model(value: Any) -> bool:
    network = getattr(value, "model", None)
    return _has("clone", "model_options")(value) and getattr(network, "diffusion_model", None) is not None and hasattr(network, "latent_format")


def _is_vae(value: Any) -> bool:  # of a checkpoint that has none it is there without a network
    return _has("encode", "decode", "latent_dim", "latent_channels")(value) and getattr(value, "first_stage_model", None) is not None


def _is_latent(value: Any) -> bool:
    samples = value.get("samples") if isinstance(value, Mapping) else None
    return isinstance(samples, Tensor) or getattr(samples, "is_nested", False)  # nested: of picture and sound


def _is_conditioning(value: Any) -> bool:
    def is_pair(pair: Any) -> bool:
        text, extras = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        return isinstance(text, Tensor) and text.ndim == 3 and isinstance(extras, Mapping)

    return isinstance(value, list | tuple) and len(value) > 0 and all(map(is_pair, value))


def _is_audio(value: Any) -> bool:
    fits = isinstance(value, Mapping) and _batch(3)(value.get("waveform"))
    rate = value.get("sample_rate") if fits else None
    return isinstance(rate, int | float) and 1 <= rate <= 2**31


def some(kind: type) -> Callable[[Any], bool]:
    """A list of that class, not empty."""
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(part, kind) for part in value)


KINDS = {
    "MODEL": Kind(_is_model, "a diffusion model", "connect the MODEL of a model loader"),
    "CLIP": Kind(
        _has("tokenize", "encode_from_tokens"),
        "a text encoder",
        "load one with a CLIP loader and connect it to the LoRA loader, where there is one",
        "the checkpoint holds no text encoder",
    ),
    "VAE": Kind(_is_vae, "a VAE with weights", "load the model's with Load VAE and connect it", "the checkpoint holds no VAE"),
    "IMAGE": Kind(
        _batch(4, (1, 3, 4)), "pictures (batch, height, width, channels) of 1, 3 or 4 channels", "connect an IMAGE with one picture or more"
    ),
    "MASK": Kind(_batch(3), "masks (batch, height, width)", "connect a MASK with one picture or more"),
    "LATENT": Kind(_is_latent, "a latent", "connect the LATENT of a sampler or of an empty latent"),
    "CONDITIONING": Kind(_is_conditioning, "conditioning", "connect the CONDITIONING of a text encoder"),
    "UPSCALE_MODEL": Kind(_has("model", "scale", "size_requirements"), "an upscale model", "connect Load Upscale Model"),
    "VIDEO": Kind(_has("get_components", "get_stream_source"), "a video", "connect Load Video or Create Video"),
    "AUDIO": Kind(_is_audio, "sound (batch, channels, samples) with its rate", "connect an AUDIO, or nothing"),
}


def custom(io_type: str, kind: Kind) -> Any:
    """A type of sockets that core does not have, or not in every version. Raises ValueError where it has a kind already."""
    if io_type in KINDS:
        raise ValueError(f"{io_type} has a kind already")
    KINDS[io_type] = kind
    return io.Custom(io_type)
