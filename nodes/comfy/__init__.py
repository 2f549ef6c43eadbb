"""ComfyUI itself: what every capability needs of it, and the only place where its versions differ."""

from .inputs import Kind, custom, described, guarded, some
from .patching import BOXES, OVERRIDE, Overrides, Wrapper, attached, last_result, network_in
from .paths import check_prefix, existing, input_path, numbered
from .reporting import progress, said, saved_file, say
from .versions import (
    bit_depth_of,
    call_vbar,
    is_dynamic,
    load_upscale_model,
    model_prefetch,
    pause_malloc_graph,
    trim_of,
    unload_upscale_model,
    vbar_of,
)

__all__ = [
    "BOXES",
    "OVERRIDE",
    "Kind",
    "Overrides",
    "Wrapper",
    "attached",
    "bit_depth_of",
    "call_vbar",
    "check_prefix",
    "custom",
    "described",
    "existing",
    "guarded",
    "input_path",
    "is_dynamic",
    "last_result",
    "load_upscale_model",
    "model_prefetch",
    "network_in",
    "numbered",
    "pause_malloc_graph",
    "progress",
    "said",
    "saved_file",
    "say",
    "some",
    "trim_of",
    "unload_upscale_model",
    "vbar_of",
]
