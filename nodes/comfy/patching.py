"""How anything is put into a ComfyUI model and taken out again: wrappers, callbacks, a host, attention overrides.

Patches live on a clone of the user's model and die with it: nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

OVERRIDE = "optimized_attention_override"
BOXES = "tessera_region_boxes"  # in transformer_options: TokenGrid.boxes of a strip of regions

Wrapper = Callable[..., Any]


def network_in(base: Any) -> Any:
    """The network of a base model (`patcher.model`), without torch.compile's wrapper."""
    return getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)


def attached(model: Any, key: str, host: Any, wrappers: Mapping[str, Wrapper], callbacks: Mapping[str, Wrapper] | None = None) -> Any:
    """A clone of `model` with `host` and its wrappers and callbacks by kind, in the place of what is there under `key`. `model` stays as it was."""
    patched = model.clone()
    for kind, wrapper in wrappers.items():
        patched.remove_wrappers_with_key(kind, key)
        patched.add_wrapper_with_key(kind, key, wrapper)
    for kind, callback in (callbacks or {}).items():
        patched.remove_callbacks_with_key(kind, key)
        patched.add_callback_with_key(kind, key, callback)
    patched.set_attachments(key, host)
    return patched


def last_result(model: Any, key: str) -> dict[str, Any] | None:
    """`result` of the host under `key`: what the last sampling run did; None where there is none, or no run."""
    host = model.get_attachment(key)
    return None if host is None else host.result


class Overrides(dict[Any, Wrapper]):
    """The attention overrides of one patch, each by the override that it lies on, which may be None: a model's other patches are chained, not lost.

    make: gives the override that lies on the function it gets, which is called as `inner(func, q, k, v, heads, ...)`. Made once, so that
    compiled models see one function object; one that has this patch below it already stays as it is.
    """

    def __init__(self, make: Callable[[Wrapper], Wrapper]):
        super().__init__()
        self._make = make

    def __missing__(self, previous: Wrapper | None) -> Wrapper:
        below = getattr(previous, "chain", ())
        if previous is not None and any(each is self for each in below):
            return previous
        override = self._make(previous or _attention)
        setattr(override, "chain", (self, *below))  # noqa: B010 (mypy knows no attributes of functions)
        self[previous] = override
        return override


def _attention(func: Wrapper, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)
