"""Runs inside ComfyUI's Python (see test_comfy_offload.py): the memory limit against ComfyUI's real manager, on a pretended GPU.

    python comfy_offload.py COMFYUI PACKAGE_PARENT MODELS

COMFYUI: a checkout. PACKAGE_PARENT: a folder with the package under the name `tessera`. MODELS: a models folder with the tiny default model.
Prints one JSON object per case.
"""

import gc
import json
import random
import sys
from pathlib import Path

COMFYUI, PACKAGE_PARENT, MODELS = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path += [PACKAGE_PARENT, str(Path(__file__).parent)]

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)  # small tensors: threads would only wait for each other

import comfy.controlnet  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import pretend_gpu  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does: nodes.py puts a folder with another `utils` before it)
from comfy.patcher_extension import CallbacksMP, WrappersMP  # noqa: E402

import nodes  # noqa: E402
import tessera.nodes.offload.host as memory  # noqa: E402
import tessera.nodes.offload.look_ahead as look_ahead  # noqa: E402
from tessera.models.offload import GB, picture, summary  # noqa: E402
from tessera.models.offload.blocks import find_blocks  # noqa: E402
from tessera.models.patchers.settings import AttentionSettings  # noqa: E402
from tessera.nodes.attention import last_report as attention_report  # noqa: E402
from tessera.nodes.attention import patch_attention  # noqa: E402
from tessera.nodes.offload import MemorySettings, last_report, patch_memory  # noqa: E402

DEVICE, gpu = pretend_gpu.DEVICE, pretend_gpu.gpu
SHAPE = (1, 16, 3, 8, 8)
TOTAL = gpu.total


def load(**options):
    return comfy.sd.load_diffusion_model(f"{MODELS}/diffusion_models/tessera_shapes_t2v.safetensors", model_options=options)


def flux():
    """Two lists of blocks of different classes."""
    from comfy.ldm.flux.model import Flux

    sizes = dict(vec_in_dim=768, context_in_dim=768, hidden_size=256, num_heads=2, depth=2, depth_single_blocks=3)
    fixed = dict(axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
    options = dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    network = Flux(image_model="flux", in_channels=16, out_channels=16, mlp_ratio=4.0, **sizes, **fixed, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted(network.state_dict().items()):
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
            tensor.copy_(torch.ones(tensor.shape) if name.endswith("scale") else torch.randn(tensor.shape, generator=generator) * scale)
    return comfy.sd.load_diffusion_model_state_dict(network.state_dict())


def conditioning(tokens=12, width=64, **extra):
    return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(tokens)), extra]]


COND = conditioning()


def sample(model, cond=COND, shape=SHAPE, steps=2, seed=1):
    return nodes.common_ksampler(model, seed, steps, 2.0, "euler", "simple", cond, cond, {"samples": torch.zeros(shape)})[0]["samples"]


def limited(model, nbytes, **changes):
    return patch_memory(model, MemorySettings(gb=nbytes / GB, **changes), None)


def forward_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


def wrappers(model):
    tables = (*model.wrappers.values(), *model.callbacks.values())
    return sum(len(functions) for table in tables for functions in table.values())


def on_device(model):
    """Bytes of the modules that the manager has moved: what is there, whatever it counts."""
    return sum(mm.module_size(module) for module in model.model.modules() if getattr(module, "comfy_patched_weights", False))


def largest_module(model):
    return max(mm.module_size(module) for module in model.model.modules() if hasattr(module, "comfy_cast_weights"))


def limits(model, cond=COND, shape=SHAPE):
    """(smallest limit that works, limit that holds every weight), as the report of a run says."""
    patched = limited(model, 12 * GB)
    sample(patched, cond, shape)
    report = last_report(patched)
    smallest = report["smallest_limit_bytes"] + 4096
    everything = report["activation_bytes"] + report["reserve_bytes"] + report["weights_bytes"] + 8 * largest_module(model)
    return smallest, everything


def between(low, high, count):
    return [low + (high - low) * index // (count - 1) for index in range(count)]


def run_limits(make, cond, shape):
    """From the smallest limit to all weights and back, every second one twice: bitwise stock, within the limit, as close as modules allow."""
    model = make()
    options = repr(model.model_options)
    stock = sample(model, cond, shape)
    fully = model.loaded_size()
    smallest, everything = limits(model, cond, shape)
    rows = []
    for limit in (*between(smallest, everything, 5)[::-1], *between(smallest, everything, 5)[1:]):
        patched, loads = limited(model, limit), [0]
        patched.add_callback_with_key(CallbacksMP.ON_LOAD, "test", lambda patcher, *_, loads=loads: loads.append(patcher.loaded_size()))
        for _ in range(2):
            out = sample(patched, cond, shape)
            report = last_report(patched)
            rows.append(
                {
                    "most while loading": max(loads),
                    "bitwise": torch.equal(out, stock),
                    "budget": report["weights_budget_bytes"],
                    "loaded": model.loaded_size(),
                    "on device": on_device(model),
                    "buffer": model.model.model_offload_buffer_memory,
                    "reported": report["resident_bytes"],
                    "within": report["within_limit"],
                    "hooks": forward_hooks(model),
                    "line": summary(report),
                }
            )
    image = picture(report, summary(report))
    last = limited(model, smallest)
    sample(last, cond, shape, steps=3)
    return {
        "rows": rows,
        "weights": model.model_size(),
        "fully": fully,
        "module": largest_module(model),
        "report": last_report(last),
        "picture": [list(image.shape), float(image.min()), float(image.max())],
        "bypass_bitwise": torch.equal(sample(model, cond, shape), stock),
        "bypass_loads_all": model.loaded_size() == fully,
        "untouched": repr(model.model_options) == options and wrappers(model) == 0 and forward_hooks(model) == 0,
    }


def run_policies():
    model = load()
    stock = sample(model)
    smallest, everything = limits(model)
    result = {}
    for k in (2, 3):
        patched = limited(model, everything, policy="superpipeline", k=k, k_prime=1)
        result[f"k {k}"] = {"bitwise": torch.equal(sample(patched), stock), "loaded": model.loaded_size(), "report": last_report(patched)}
    free = limited(model, TOTAL - smallest, limit="leave free")
    result["leave free"] = {"bitwise": torch.equal(sample(free), stock), "loaded": model.loaded_size(), "report": last_report(free)}
    mm.MIN_WEIGHT_MEMORY_RATIO = 0.4  # where ComfyUI keeps 40 % of the device for weights, whatever a sampling demands
    ratio = limited(model, smallest)
    result["share kept by core"] = {"bitwise": torch.equal(sample(ratio), stock), "loaded": model.loaded_size(), "report": last_report(ratio)}
    mm.MIN_WEIGHT_MEMORY_RATIO = 0.0
    again = limited(limited(model, smallest), everything)
    result["applied twice"] = {"bitwise": torch.equal(sample(again), stock), "wrappers": wrappers(again), "report": last_report(again)}
    gpu.total = smallest  # other programs hold the rest: the limit is larger than what there is
    crowded = limited(model, smallest)
    gpu.total = smallest - 65536
    result["other programs"] = {"bitwise": torch.equal(sample(crowded), stock), "loaded": model.loaded_size(), "report": last_report(crowded)}
    gpu.total = TOTAL
    return result


def run_copies():
    """What the report says ComfyUI copies, against what its own cast function was called for; the link is pretended."""
    model = load()
    stock = sample(model)
    smallest, everything = limits(model)
    calls, cast, link, streams = [], comfy.ops.cast_bias_weight, memory._link, mm.NUM_STREAMS

    def spy(module, *args, **kwargs):
        calls.append(sum(tensor.nbytes for tensor in (module.weight, module.bias) if tensor is not None))
        return cast(module, *args, **kwargs)

    result = {}
    for name, limit, rate, mm.NUM_STREAMS in (
        ("no link", smallest, None, 2),
        ("two streams", smallest, 2e9, 2),
        ("no stream", smallest, 2e9, 0),
        ("nothing streamed", everything, 2e9, 2),
    ):
        memory._link = lambda device, rate=rate: rate
        patched = limited(model, limit)
        calls.clear()
        comfy.ops.cast_bias_weight = spy
        same = torch.equal(sample(patched), stock)
        comfy.ops.cast_bias_weight = cast
        report = last_report(patched)
        image = picture(report, summary(report))
        result[name] = {"bitwise": same, "calls": len(calls), "bytes": sum(calls), "report": report, "line": summary(report)}
        result[name].update({"hooks": forward_hooks(model), "picture": list(image.shape)})

    def full(device):
        raise torch.cuda.OutOfMemoryError("no room for 64 MB")

    memory._link = full
    patched = limited(model, smallest)
    result["no room to measure"] = {"bitwise": torch.equal(sample(patched), stock), "report": last_report(patched)}
    memory._link, mm.NUM_STREAMS = link, streams
    return result


def run_lora():
    """The error against the fully loaded run, with our limit and with stock's own partial load of as many weights."""
    model = load(dtype=torch.bfloat16)  # rounding a patched weight to 16 bits is where a partial load differs
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for name, tensor in model.model.state_dict().items():
        if name.startswith("diffusion_model.blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            key = name.removesuffix(".weight")
            lora[f"{key}.lora_up.weight"] = torch.randn(tensor.shape[0], 4, generator=generator) * 0.05
            lora[f"{key}.lora_down.weight"] = torch.randn(4, tensor.shape[1], generator=generator) * 0.05
    patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    plain, full = sample(model), sample(patched)
    smallest, everything = limits(patched)
    rows = []
    for limit in between(smallest, everything, 4):
        ours = limited(patched, limit)
        error = float((sample(ours) - full).abs().max())
        report, loaded = last_report(ours), model.loaded_size()
        mm.unload_all_models()
        # A stock run that keeps as much: on a device that ends where our limit does.
        least = comfy.sampler_helpers.estimate_memory(patched, SHAPE, {"positive": [{}]})[1]
        gpu.total = int(report["weights_budget_bytes"] + max(mm.minimum_inference_memory(), least + mm.extra_reserved_memory()))
        stock_error = float((sample(patched) - full).abs().max())
        stock_loaded = model.loaded_size()
        gpu.total = TOTAL
        mm.unload_all_models()
        rows.append(
            {"error": error, "stock_error": stock_error, "loaded": loaded, "stock_loaded": stock_loaded, "budget": report["weights_budget_bytes"]}
        )
    return {"lora_matters": float((full - plain).abs().max()), "patches": len(patched.patches), "rows": rows}


class ControlNet(comfy.controlnet.ControlBase):
    """A control net with weights and memory of its own, which changes nothing."""

    def __init__(self, patcher):
        super().__init__()
        self.patcher = patcher

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return None

    def get_models(self):
        return [self.patcher]

    def inference_memory_requirements(self, dtype):
        return 3 * 1024**2

    def pre_run(self, model, percent_to_timestep_function):
        pass

    def copy(self):
        return ControlNet(self.patcher)


def run_together():
    """Other patches: attention in both orders, a control net, another pack's wrapper; and two models with limits of their own."""
    model, other = load(), load()
    stock, stock_other = sample(model, seed=3), sample(other, seed=4)
    smallest, everything = limits(model)
    middle = (smallest + everything) // 2
    result = {}

    sparse = AttentionSettings(method="sparge", density=0.5, min_tokens=0, block=16)
    alone = sample(patch_attention(model, sparse, None))
    for order in ("attention first", "limit first"):
        if order == "attention first":
            both = limited(patch_attention(model, sparse, None), middle)
        else:
            both = patch_attention(limited(model, middle), sparse, None)
        result[order] = {
            "bitwise": torch.equal(sample(both), alone),
            "sparse": attention_report(both)["calls"].get("sparse", 0),
            "budget": last_report(both)["weights_budget_bytes"],
            "loaded": model.loaded_size(),
        }

    weights = torch.nn.Sequential(*(comfy.ops.disable_weight_init.Linear(256, 256, device="cpu", dtype=torch.float32) for _ in range(2)))
    for module in weights:
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    control = comfy.model_patcher.ModelPatcher(weights, DEVICE, torch.device("cpu"))
    with_control = [[COND[0][0], {"control": ControlNet(control), "control_apply_to_uncond": True}]]
    patched = limited(model, middle)
    out = sample(patched, with_control, seed=3)
    report = last_report(patched)
    result["control net"] = {
        "bitwise": torch.equal(out, stock),
        "held": model.loaded_size() + control.loaded_size(),
        "room": report["limit_bytes"] - report["activation_bytes"] - report["reserve_bytes"],
        "report": report,
    }
    mm.unload_all_models()

    seen = []

    def others(executor, model, noise_shape, conds, *args, **kwargs):
        seen.append(sorted(conds))
        return executor(model, noise_shape, conds, *args, **kwargs)

    for order in ("before", "after"):
        base = model.clone()
        if order == "before":
            base.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "another pack", others)
        wrapped = limited(base, middle)
        if order == "after":
            wrapped.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "another pack", others)
        result[f"other wrapper {order}"] = {"bitwise": torch.equal(sample(wrapped, seed=3), stock), "within": last_report(wrapped)["within_limit"]}
    result["other wrappers saw"] = seen

    high, low = limited(model, smallest), limited(other, middle)
    rows = []
    for _ in range(2):
        for patched, seed, expected in ((high, 3, stock), (low, 4, stock_other)):
            same = torch.equal(sample(patched, seed=seed), expected)
            report = last_report(patched)
            room = report["limit_bytes"] - report["activation_bytes"] - report["reserve_bytes"]
            rows.append({"bitwise": same, "held": model.loaded_size() + other.loaded_size(), "room": room, "own": patched.loaded_size()})
    result["two models"] = {"rows": rows, "module": largest_module(model)}
    return result


class Stop:
    """Raises at the nth run of a block."""

    def __init__(self, model, error, block, call):
        self.error, self.left = error, call
        self.handle = find_blocks(model.model.diffusion_model)[block].module.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        self.left -= 1
        if self.left == 0:
            if self.error is mm.InterruptProcessingException:
                mm.interrupt_current_processing()
                mm.throw_exception_if_processing_interrupted()
            raise self.error("on purpose")


ERRORS = (mm.InterruptProcessingException, torch.cuda.OutOfMemoryError)


def failing(model, patched, error, block, call, steps=3):
    """Sample until the error; what ComfyUI's executor does after it. True where it was raised."""
    stop = Stop(model, error, block, call)
    try:
        sample(patched, steps=steps)
        return False
    except ERRORS as raised:
        if isinstance(raised, torch.cuda.OutOfMemoryError):
            mm.unload_all_models()
        return True
    finally:
        stop.handle.remove()


def run_failures():
    model = load()
    stock = sample(model)
    smallest, _ = limits(model)
    result = {}
    for name, error in (("interrupt", ERRORS[0]), ("out of memory", ERRORS[1])):
        patched = limited(model, smallest)
        raised = failing(model, patched, error, block=2, call=2)
        report = last_report(patched)
        result[name] = {
            "raised": raised,
            "hooks": forward_hooks(model),
            "handles": len(patched.get_attachment(memory.KEY).handles),
            "steps": report["steps"],
            "next_bitwise": torch.equal(sample(patched), stock),
            "next_within": last_report(patched)["within_limit"],
        }
    patched = limited(model, smallest)
    mm.unload_all_models()

    def no_room(*_):
        raise torch.cuda.OutOfMemoryError("on purpose")

    patched.add_callback_with_key(CallbacksMP.ON_LOAD, "test", no_room)
    try:
        sample(patched)
        raised = False
    except torch.cuda.OutOfMemoryError:
        raised = True
        mm.unload_all_models()
    reported = last_report(patched) is not None
    patched.remove_callbacks_with_key(CallbacksMP.ON_LOAD, "test")
    same = torch.equal(sample(patched), stock)
    result["out of memory while loading"] = {"raised": raised, "reported": reported, "hooks": forward_hooks(model), "next_bitwise": same}
    return result


def run_soak(items=200, settled=60):
    """What a day of a queue does: other limits, interrupts, running out of memory. Nothing may be left over, and results stay right."""
    model = load()
    stock = sample(model)
    smallest, everything = limits(model)
    rng = random.Random(0)
    blocks = len(find_blocks(model.model.diffusion_model))
    wrong, raised, expected, counts = 0, 0, 0, {}
    for item in range(1, items + 1):
        patched = limited(model, rng.randrange(smallest, everything), policy=rng.choice(["auto", "resident"]))
        if rng.random() < 0.5:
            patched = patch_attention(patched, AttentionSettings(density=1.0, min_tokens=0), None)
        kind = rng.randrange(4)
        if kind < 2:
            raised += failing(model, patched, ERRORS[kind], rng.randrange(blocks), rng.randrange(1, 3), steps=2)
            expected += 1
        else:
            wrong += not torch.equal(sample(patched), stock)
            wrong += not last_report(patched)["within_limit"]
        wrong += forward_hooks(model) != 0
        del patched
        if item in (settled, items):
            wrong += not torch.equal(sample(model), stock)
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            counts[item] = [tensors, wrappers(model), len(mm.current_loaded_models), len(model.model.__dict__), len(model.attachments)]
    return {"wrong": wrong, "raised": raised, "expected": expected, "settled": counts[settled], "end": counts[items]}


def message(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def run_errors():
    model = load()
    smallest, _ = limits(model)
    settings = MemorySettings
    result = {
        name: message(lambda changes=changes: patch_memory(model, settings(**changes), None))
        for name, changes in {
            "nan": {"gb": float("nan")},
            "infinite": {"gb": float("inf")},
            "zero": {"gb": 0.0},
            "negative": {"gb": -2.0},
            "more than the device": {"gb": 17.0},
            "leave all": {"limit": "leave free", "gb": 16.0},
            "unknown limit": {"limit": "half"},
            "unknown policy": {"policy": "magic"},
            "k 1": {"policy": "superpipeline", "k": 1},
            "k_prime": {"policy": "superpipeline", "k": 2, "k_prime": 3},
        }.items()
    }
    runs = []
    tiny = limited(model, smallest - 65536)
    tiny.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", lambda executor, *args, **kwargs: runs.append(1) or executor(*args, **kwargs))
    result["too small"] = message(lambda: sample(tiny))
    result["too small, reported"] = last_report(tiny) is not None
    result["model calls"] = len(runs)
    result["leave too much"] = message(lambda: sample(limited(model, 15.9 * GB, limit="leave free")))
    result["window too large"] = message(lambda: sample(limited(model, smallest + 65536, policy="superpipeline", k=5)))
    suggested = float(result["too small"].split("use at least ")[1].split()[0])
    result["suggestion works"] = bool(sample(limited(model, suggested * GB)).isfinite().all())
    result["hooks"] = forward_hooks(model)
    return result


def run_cpu():
    """On a CPU ComfyUI places nothing: the node says so and changes nothing."""
    model = load()
    model.load_device = torch.device("cpu")
    stock = sample(model)
    patched = limited(model, GB // 10)
    same = torch.equal(sample(patched), stock)
    report = last_report(patched)
    image = picture(report, summary(report))
    return {"bitwise": same, "report": report, "line": summary(report), "hooks": forward_hooks(model), "picture": list(image.shape)}


class Vbar:
    """comfy-aimdo's address range of one model, as far as ComfyUI sees it: pages of 64 KB, a ceiling, a floor."""

    PAGE = 65536

    def __init__(self, nbytes, events):
        self.nbytes, self.events = nbytes, events
        self.ceiling, self.floor, self.used = nbytes, 0, 0

    def prioritize(self, *_):
        self.events.append(["prioritize"])
        self.ceiling = self.nbytes

    def set_watermark(self, nbytes):
        self.events.append(["set_watermark", nbytes])
        self.ceiling = min(nbytes // self.PAGE * self.PAGE, self.nbytes)
        self.used = min(self.used, self.ceiling)

    def set_watermark_limit(self, nbytes):
        self.events.append(["set_watermark_limit", nbytes])
        self.floor = nbytes

    def touch(self):
        """Every weight was used: pages below the ceiling stay."""
        self.used = self.ceiling

    def loaded_size(self):
        return self.used

    def free_memory(self, nbytes):
        freed = min(nbytes, max(self.used - self.floor, 0))
        self.used -= freed
        self.events.append(["free_memory", nbytes])
        return freed


class OldVbar(Vbar):
    """Of a comfy-aimdo without a ceiling."""

    set_watermark = property()


class DynamicPatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcherDynamic's contract towards the manager and the samplers; weights stay where they are."""

    def is_dynamic(self):
        return True

    def loaded_size(self):
        return self.model.dynamic_vbars[self.load_device].loaded_size() + self.model.model_loaded_weight_memory

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, dirty=False):
        assert not force_patch_weights
        assert not full_load
        self.model.dynamic_vbars[self.load_device].prioritize()
        self.model.model_loaded_weight_memory = 5000  # small weights are put on the device at once
        self.model.device = device_to

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        self.load(device_to)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = self.model.dynamic_vbars[self.load_device].free_memory(memory_to_free)
        if freed < memory_to_free:
            freed += self.model.model_loaded_weight_memory
            self.model.model_loaded_weight_memory = 0
        return freed

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.partially_unload(None, 1e32)


class Prefetch:
    """`comfy.model_prefetch` as far as the look-ahead uses it, with its list semantics."""

    def __init__(self, core=False):
        self.PREFETCH_QUEUES, self.fetched, self.core = [], [], core

    def make_prefetch_queue(self, queue, device, transformer_options):
        queue = [None, *queue, None]
        self.PREFETCH_QUEUES.append(queue)
        return queue

    def prefetch_queue_pop(self, queue, device, module):
        queue.pop(0)
        if queue[0] is not None:
            assert module in queue[0]
            self.fetched.append(len(queue[0]))
            queue[0] = ("stream", queue[0])


def dynamic(events, vbar=Vbar):
    plain = load()
    model = DynamicPatcher(plain.model, DEVICE, plain.offload_device)
    model.model.dynamic_vbars = {DEVICE: vbar(model.model_size(), events)}
    model.model.dynamic_pins = {}
    touch = model.model.dynamic_vbars[DEVICE].touch
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", lambda executor, *args, **kwargs: (executor(*args, **kwargs), touch())[0])
    return model


def run_dynamic():
    events, other_events = [], []
    model, other = dynamic(events), dynamic(other_events)
    stock = sample(model)
    fully = model.loaded_size()
    sample(other)
    smallest, everything = limits(model)
    result = {"fully": fully, "weights": model.model_size()}
    for name, limit in (("smallest", smallest), ("all", everything)):
        events.clear()
        other_events.clear()
        patched = limited(model, limit)
        same = torch.equal(sample(patched), stock)
        report = last_report(patched)
        result[name] = {"bitwise": same, "events": list(events), "other": list(other_events), "report": report, "others_hold": other.loaded_size()}
        sample(other)
    events.clear()
    result["bypass"] = {"bitwise": torch.equal(sample(model), stock), "events": list(events), "loaded": model.loaded_size()}
    events.clear()
    patched = limited(model, smallest)
    result["interrupt"] = {"raised": failing(model, patched, ERRORS[0], 2, 2), "events": list(events), "hooks": forward_hooks(model)}

    real = look_ahead.model_prefetch
    for name, prefetch in (("look ahead", Prefetch()), ("no look ahead", None)):
        look_ahead.model_prefetch = prefetch
        events.clear()
        patched = limited(model, everything, policy="superpipeline", k=2, k_prime=2)
        same = torch.equal(sample(patched), stock)
        fetched, queues = ([], []) if prefetch is None else (prefetch.fetched, prefetch.PREFETCH_QUEUES)
        left = [len(queue) for queue in queues]
        result[name] = {"bitwise": same, "fetched": fetched, "left": left, "report": last_report(patched), "events": list(events)}
    look_ahead.model_prefetch = real

    streamed = []
    for index, block in enumerate(find_blocks(model.model.diffusion_model)):
        for module in block.module.modules():
            if hasattr(module, "comfy_cast_weights") and module.weight is not None:
                module._v, module._v_signature = object(), None if index >= 3 else 7  # as above and below the watermark
                streamed += [mm.module_size(module)] if index >= 3 else []
    link, memory._link = memory._link, lambda device: 2e9
    patched = limited(model, smallest)
    same = torch.equal(sample(patched), stock)
    result["copies"] = {"bitwise": same, "report": last_report(patched), "streamed": streamed}
    memory._link = link

    old_events = []
    old = dynamic(old_events, OldVbar)
    patched = limited(old, smallest)
    result["old aimdo"] = {"bitwise": torch.equal(sample(patched), stock), "report": last_report(patched)}
    return result


CASES = {
    "limits, video": lambda: run_limits(load, COND, SHAPE),
    "limits, image": lambda: run_limits(flux, conditioning(8, 768, pooled_output=torch.zeros(1, 768), guidance=3.5), (1, 16, 8, 8)),
    "policies": run_policies,
    "copies": run_copies,
    "lora": run_lora,
    "together": run_together,
    "failures": run_failures,
    "soak": run_soak,
    "errors": run_errors,
    "cpu": run_cpu,
    "dynamic": run_dynamic,
}

with torch.inference_mode():
    for case, run in CASES.items():
        print("RESULT " + json.dumps({"case": case, **run()}), flush=True)
        mm.unload_all_models()
        gc.collect()
