"""Runs inside ComfyUI's Python (see test_comfy_offload.py): `tessera.offload` around weights in ComfyUI's own quantized formats.

python comfy_quantized.py COMFYUI PACKAGE_PARENT
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

from comfy.quant_ops import QuantizedTensor  # noqa: E402

import tessera  # noqa: E402
from tessera.models.offload.memory import nbytes_of  # noqa: E402


class Layer(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.weight = torch.nn.Parameter(QuantizedTensor.from_float(torch.randn(64, 64), layout), requires_grad=False)

    def forward(self, x):
        return torch.tanh(x @ self.weight.dequantize().to(x.dtype).T)


for layout in ("TensorCoreFP8E4M3Layout", "TensorCoreNVFP4Layout", "TensorWiseINT8Layout"):
    module = torch.nn.Sequential(*(Layer(layout) for _ in range(6)))
    x, nbytes = torch.randn(3, 64), nbytes_of(module)
    with torch.no_grad():
        expected = module(x)
        with tessera.offload(module, (nbytes / 6 * 2.6 + 4096) / 2**30, device="cpu") as handle:
            equal = all(torch.equal(module(x), expected) for _ in range(3))
            report = handle.report()
        after = torch.equal(module(x), expected) and all(type(layer.weight).__name__ == "QuantizedTensor" for layer in module)
    print("RESULT " + json.dumps({"case": layout, "equal": equal, "after": after, "copied": report["copied_bytes"], "nbytes": nbytes}), flush=True)
