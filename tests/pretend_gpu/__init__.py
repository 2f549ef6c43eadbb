"""A GPU of 16 GB that only pretends, for tests of memory limits: imported by comfy_offload.py, or linked into a server's custom_nodes.

The device is `cpu:0`, which torch computes on as on `cpu` and which is not equal to it. So ComfyUI's real memory manager places weights
there, counts them, loads models partially and evicts them, as on a GPU. Only what would ask a driver is replaced.
"""

import sys
import weakref

import comfy.model_management as mm
import comfy.model_patcher
import torch

DEVICE = torch.device("cpu:0")


class PretendLink:
    """In a server: passes the model on, and gives the pretended device a link of that many bytes a second, since there is none to measure."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "pretend", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "rate": ("FLOAT", {"max": 1e15})}}

    def pretend(self, model, rate):
        for module in list(sys.modules.values()):
            if hasattr(module, "_MemoryHost"):
                module._link = lambda device: rate
        return (model,)


NODE_CLASS_MAPPINGS = {"PretendLink": PretendLink}


class PretendGpu:
    """total: bytes that the device has for ComfyUI. What it holds is what the manager believes to have put there."""

    def __init__(self, total=16 * 1024**3):
        self.total = total
        self.models = weakref.WeakSet()
        make, is_cpu = comfy.model_patcher.ModelPatcher.__init__, mm.is_device_cpu

        def noted(patcher, model, load_device, *args, **kwargs):
            make(patcher, model, load_device, *args, **kwargs)
            if load_device == DEVICE:
                self.models.add(model)

        comfy.model_patcher.ModelPatcher.__init__ = noted
        mm.is_device_cpu = lambda device: is_cpu(device) and device.index is None
        mm.get_torch_device = lambda: DEVICE
        mm.get_total_memory = lambda dev=None, torch_total_too=False: (self.total, self.total) if torch_total_too else self.total
        mm.get_free_memory = lambda dev=None, torch_free_too=False: (self.free(), 0) if torch_free_too else self.free()
        mm.should_use_fp16 = mm.should_use_bf16 = lambda *args, **kwargs: False
        mm.vram_state = mm.VRAMState.NORMAL_VRAM
        mm.MIN_WEIGHT_MEMORY_RATIO = 0.0  # as on NVIDIA
        mm.NUM_STREAMS = 2

    def held(self):
        vbars = (vbar for model in self.models for vbar in getattr(model, "dynamic_vbars", {}).values())
        return sum(model.model_loaded_weight_memory for model in self.models) + sum(vbar.loaded_size() for vbar in vbars)

    def free(self):
        return self.total - self.held()


gpu = PretendGpu()
