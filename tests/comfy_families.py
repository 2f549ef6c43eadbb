"""Runs inside ComfyUI's Python (see test_comfy_families.py): every supported family, with and without the patch, on tiny random models.

    python comfy_families.py COMFYUI PACKAGE_PARENT [CASE ...]

COMFYUI: a checkout. PACKAGE_PARENT: a folder with the package under the name `tessera`. CASE: of family_cases.CASES; all, and a model of no
family, if none is named. Prints one JSON object per case.
"""

import json
import sys

COMFYUI, PACKAGE_PARENT, *NAMES = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does: nodes.py puts a folder with another `utils` before it)

import nodes  # noqa: E402
import tessera.models.patchers.attention as patcher  # noqa: E402
from family_cases import CASES, VIDEO, operations, random_weights, wan  # noqa: E402
from tessera.nodes.attention import Accelerate, SparseAttention, last_report  # noqa: E402

ERROR = 0.3  # random queries and keys: to leave anything out costs a lot
LOOKING_STEPS = 4  # fewest in which a run looks for what keeps an error


def sample(model, cond, shape, steps=3, callback=None):
    return nodes.common_ksampler(model, 1, steps, 2.0, "euler", "simple", cond, cond, {"samples": torch.zeros(shape)})[0]["samples"]


def node_output(node, **inputs):
    return node.PREPARE_CLASS_CLONE(None).execute(**inputs).args[0]


def sparse(model, **changes):
    inputs = dict(
        method={"method": "rainfusion2"},
        density=0.5,
        precision="native",
        start_percent=0.0,
        end_percent=1.0,
        dense_blocks="",
        min_tokens=0,
        block="16",
    )
    return node_output(SparseAttention, model=model, **{**inputs, **changes})


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


def run(make, cond, shape):
    model = make()
    options = repr(model.model_options)
    stock = sample(model, cond, shape)
    result = {"stock_finite": bool(stock.isfinite().all()), "latent": list(stock.shape)}

    everything = sparse(model, density=1.0)
    result["density_1_bitwise"] = torch.equal(sample(everything, cond, shape), stock)
    counts, hooked = hook(model)
    sample(hooked, cond, shape)
    result["hooked"] = {"stock": counts["self"]}
    for method in ("rainfusion2", "draft", "sparge"):
        counts, hooked = hook(model)
        patched = sparse(hooked, method={"method": method})
        out = sample(patched, cond, shape)
        report = last_report(patched)
        result["hooked"][method] = counts["self"]
        result[method] = {"finite": bool(out.isfinite().all()), "error": relative_error(out, stock), "report": report}
    patched = sparse(model, method={"method": "tessera", "error": ERROR}, density=0.9)
    out = sample(patched, cond, shape, steps=LOOKING_STEPS)
    result["looked"] = {"finite": bool(out.isfinite().all()), "report": last_report(patched)}
    tail = sparse(model, method={"method": "rainfusion2"}, tail=True)
    result["tail_error"] = relative_error(sample(tail, cond, shape), stock)
    whole = sparse(model, method={"method": "sparge", "similarity": 0.999})  # nothing is that alike: every block is kept, by our own kernel
    result["all_blocks_error"] = relative_error(sample(whole, cond, shape), stock)
    chained = sparse(sparse(model, density=0.9), density=0.5)
    sample(chained, cond, shape)
    result["applied_twice"] = {"density": last_report(chained)["density"], "calls": last_report(chained)["self_attention_calls"]}
    accelerated = node_output(Accelerate, model=model, mode="fast", min_tokens=0)
    sample(accelerated, cond, shape)
    result["accelerate"] = last_report(accelerated)

    result["nan_recovers"], result["nan_report"] = poisoned(model, cond, shape, stock)
    result["other_override_seen"] = other_override(model, cond, shape, stock)
    result["interrupt"] = interrupted(model, cond, shape)
    if make is wan and shape == VIDEO:
        result["windows_share_nothing"] = windows(model, cond)
    result["bypass_bitwise"] = torch.equal(sample(model, cond, shape), stock)
    result["model_untouched"] = repr(model.model_options) == options
    return result


def hook(model):
    """(counts, a clone whose attention counts the calls with as many queries as keys that the host computes)."""
    counts = {"self": 0}

    def count(func, q, k, *arguments, skip_reshape=False, **keywords):
        counts["self"] += q.shape[-2] == k.shape[-2] if skip_reshape else q.shape[1] == k.shape[1]
        return func(q, k, *arguments, skip_reshape=skip_reshape, **keywords)

    hooked = model.clone()
    hooked.model_options["transformer_options"]["optimized_attention_override"] = count
    return counts, hooked


def windows(model, cond):
    """One step in context windows: masks that serve several steps must not pass from window to window."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    outs = []
    for refresh in (1, 5):
        patched = WanContextWindowsManualNode.execute(
            model=sparse(model, mask_refresh=refresh),
            context_length=17,
            context_overlap=1,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
            freenoise=True,
        ).args[0]
        outs.append(sample(patched, cond, (1, 16, 15, 16, 12), steps=1))
        assert last_report(patched)["self_attention_calls"] > 2 * 3, "more than one window ran"
    return torch.equal(*outs)


def poisoned(model, cond, shape, stock):
    """Our kernel returns NaN at its first call: the model call must be repeated dense, so that the result is the stock one."""
    original = patcher.sparse_attention

    def broken(*arguments, **keywords):
        out, mask = original(*arguments, **keywords)
        return out * float("nan"), mask

    patcher.sparse_attention = broken
    try:
        patched = sparse(model)
        out = sample(patched, cond, shape)
    finally:
        patcher.sparse_attention = original
    report = last_report(patched)
    return torch.equal(out, stock), {"repeated": report["repeated_model_calls"], "notes": report["notes"]}


def other_override(model, cond, shape, stock):
    """Another pack's override, set before and after ours, must still get the calls that stay dense."""
    seen = []

    def other(func, *arguments, **keywords):
        seen.append(arguments[0].shape)
        return func(*arguments, **keywords)

    counts = []
    for order in ("before", "after"):
        seen.clear()
        base = model.clone()
        if order == "before":
            base.model_options["transformer_options"]["optimized_attention_override"] = other
        patched = sparse(base, density=1.0)
        if order == "after":
            patched.model_options["transformer_options"]["optimized_attention_override"] = other
        same = torch.equal(sample(patched, cond, shape), stock)
        counts.append(len(seen) if same and last_report(patched)["self_attention_calls"] else 0)
    return counts


def interrupted(model, cond, shape):
    patched = sparse(model)
    original = patcher.sparse_attention

    def stop(*arguments, **keywords):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    patcher.sparse_attention = stop
    try:
        sample(patched, cond, shape)
        return "not raised"
    except comfy.model_management.InterruptProcessingException:
        host = patched.get_attachment("tessera_attention")
        return {"layouts_released": not host.patch._arrangements, "reported": last_report(patched) is not None}
    finally:
        patcher.sparse_attention = original


def unet():
    """Stable Diffusion 1.5's UNet, one level deep: a model that no family describes."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    sizes = dict(in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 1], context_dim=768, num_heads=8)
    depth = dict(transformer_depth=[1, 0], transformer_depth_output=[1, 1, 0, 0], transformer_depth_middle=-1, num_head_channels=-1)
    flags = dict(use_spatial_transformer=True, use_linear_in_transformer=False, use_temporal_attention=False, legacy=False, adm_in_channels=None)
    network = UNetModel(image_size=32, **sizes, **depth, **flags, **operations())
    return comfy.sd.load_diffusion_model_state_dict({f"model.diffusion_model.{key}": value for key, value in random_weights(network).items()})


def run_unknown_family():
    model = unet()
    cond = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0)), {}]]
    shape = (1, 4, 24, 16)
    stock = sample(model, cond, shape)
    result = {}
    for method in ("rainfusion2", "sparge"):
        patched = sparse(model, method={"method": method})
        out = sample(patched, cond, shape)
        result[method] = {"bitwise": torch.equal(out, stock), "error": relative_error(out, stock), "report": last_report(patched)}
    return {**result, "bypass_bitwise": torch.equal(sample(model, cond, shape), stock)}


with torch.inference_mode():
    if not NAMES:
        print("RESULT " + json.dumps({"case": "unknown family", **run_unknown_family()}), flush=True)
    for case in NAMES or CASES:
        print("RESULT " + json.dumps({"case": case, **run(*CASES[case][1:])}), flush=True)
