"""Runs inside ComfyUI's Python (see test_comfy_search.py): the built-in model, looked at once a run, together with what else users connect.

    python comfy_search.py COMFYUI PACKAGE_PARENT

Prints one JSON object.
"""

import json
import sys

COMFYUI, PACKAGE_PARENT = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import folder_paths  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does: nodes.py puts a folder with another `utils` before it)
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode  # noqa: E402
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # noqa: E402

import nodes  # noqa: E402
from tessera.models.default import vocabulary  # noqa: E402
from tessera.nodes import DEFAULT_WEIGHTS  # noqa: E402
from tessera.nodes.attention import SparseAttention, last_report  # noqa: E402

STEPS = 10


def sparse(model, **changes):
    inputs = dict(
        method={"method": "tessera", "error": 0.08},
        density=0.3,
        precision="native",
        start_percent=0.3,
        end_percent=1.0,
        dense_blocks="",
        min_tokens=0,
    )
    return SparseAttention.PREPARE_CLASS_CLONE(None).execute(model=model, **{**inputs, **changes}).args[0]


def sample(model, prompt="red disc right", seed=1, steps=STEPS, frames=33, sampler="euler", **stage):
    positive, negative = ([[vocabulary.encode(text), {}]] for text in (prompt, ""))
    latent = stage.pop("latent", {"samples": torch.zeros(1, 16, (frames - 1) // 4 + 1, 16, 16)})
    return nodes.common_ksampler(model, seed, steps, 3.0, sampler, "simple", positive, negative, latent, **stage)[0]["samples"]


def story(report):
    return {
        name: report[name] for name in ("calls", "calls_in_window", "searches", "error", "notes", "mask_bytes", "reasons", "self_attention_calls")
    }


def difference(a, b):
    return float((a - b).norm() / b.norm())


def cached(model, node, threshold):
    """Steps are skipped where they change little, with and without the patch: among them may be the one that looks."""
    plain = sample(node.execute(model, threshold, 0.15, 0.95, False).args[0])
    patched = node.execute(sparse(model), threshold, 0.15, 0.95, False).args[0]
    out = sample(patched)
    return {"finite": bool(out.isfinite().all()), "error": difference(out, plain), "report": story(last_report(patched))}


def windows(model):
    patched = WanContextWindowsManualNode.execute(
        model=sparse(model), context_length=17, context_overlap=1, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", freenoise=True,
    ).args[0]  # fmt: skip
    out = sample(patched, frames=33)
    return {"finite": bool(out.isfinite().all()), "report": story(last_report(patched))}


def two_experts(model):
    """Wan 2.2's way: the first half of the steps with one patched model, the second with another, twice in one prompt."""
    outs, reports = [], []
    high, low = sparse(model), sparse(model, method={"method": "tessera", "error": 0.15})
    for _ in range(2):
        half = sample(high, last_step=5)
        reports.append(story(last_report(high)))
        whole = sample(low, latent={"samples": half}, start_step=5, disable_noise=True, force_full_denoise=True)
        reports.append(story(last_report(low)))
        outs.append(whole)
    return {"same": torch.equal(*outs), "finite": bool(outs[0].isfinite().all()), "reports": reports}


def interleaved(model):
    """One patched model in several runs: other prompts, seeds, lengths, samplers between two of the same, and one that is interrupted."""
    patched = sparse(model)
    first = sample(patched)
    sample(patched, "green square left", 7)
    sample(patched, frames=17)
    sample(patched, sampler="dpmpp_2m")
    heun = sample(patched, sampler="heun")
    interrupted = False
    hook = patched.clone()
    calls = []

    def stop(executor, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 6:
            raise comfy.model_management.InterruptProcessingException
        return executor(*arguments, **keywords)

    hook.add_wrapper_with_key("diffusion_model", "stop", stop)
    try:
        sample(hook)
    except comfy.model_management.InterruptProcessingException:
        interrupted = True
    return {"same": torch.equal(sample(patched), first), "interrupted": interrupted, "heun_finite": bool(heun.isfinite().all())}


def batch(model):
    """Two clips at once, and one clip whose positive and negative conditioning run in one model call or two."""
    patched = sparse(model)
    out = sample(patched, latent={"samples": torch.zeros(2, 16, 9, 16, 16)})
    return {"finite": bool(out.isfinite().all()), "report": story(last_report(patched))}


def compiled(model, plain):
    """`torch.compile` around the network, as TorchCompileModel does it; its backend is the tracer alone, which needs no compiler."""
    wrapped = sparse(model)
    set_torch_compile_wrapper(model=wrapped, backend="eager", options={})
    out = sample(wrapped)
    captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
    return {"error": difference(out, plain), "captured": captured, "report": story(last_report(wrapped))}


with torch.inference_mode():
    for folder in ("diffusion_models", "vae"):
        folder_paths.add_model_folder_path(folder, str(DEFAULT_WEIGHTS / folder))
    model = ModelSamplingSD3().patch(nodes.UNETLoader().load_unet("tessera_shapes_t2v.safetensors", "default")[0], 5.0)[0]
    dense = sample(model)
    patched = sparse(model)
    plain = sample(patched)
    result = {"plain": {"error": difference(plain, dense), "report": story(last_report(patched))}}
    result["easycache"] = cached(model, EasyCacheNode, 0.1)
    result["lazycache"] = cached(model, LazyCacheNode, 0.3)
    result["windows"] = windows(model)
    result["two_experts"] = two_experts(model)
    result["interleaved"] = interleaved(model)
    result["batch"] = batch(model)
    few = sparse(model, start_percent=0.0)
    sample(few, steps=4)
    result["few_steps"] = story(last_report(few))
    result["compiled"] = compiled(model, plain)
    result["bypassed"] = torch.equal(sample(model), dense)
print("RESULT " + json.dumps(result))
