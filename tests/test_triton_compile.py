"""Every dispatched kernel variant compiles for every architecture, on its tensor cores, without spills, within shared memory.

Nothing runs: Triton cross-compiles without a GPU. Registers, spills and shared memory are read from the cubin.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tessera.kernels import gpu
from tessera.kernels.triton_backend import compile_table, interpreting
from tessera.kernels.triton_backend.compile_table import ARCHITECTURES, Entry

triton = pytest.importorskip("triton", reason="Triton is not installed")
if interpreting():
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tessera.kernels.triton_backend import attention, quantize, tail, tail_costs  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Compile anew, so that a cached result of another version never passes a test."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def compile_kernel(kernel, types: dict[str, str], constants: dict, capability: tuple[int, int], num_warps: int, num_stages: int):
    """Compile as a launch would: arguments not named in `types` are None or constants, pointers are aligned to 16 bytes."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = {(position,): [["tt.divisibility", 16]] for position, kind in enumerate(signature.values()) if kind.startswith("*")}
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(
        ASTSource(kernel, signature, constexprs, aligned), target=target, options={"num_warps": num_warps, "num_stages": num_stages}
    )


def compile_attention(entry: Entry, capability: tuple[int, int]):
    operand = "i8" if entry.qk == "int8" else entry.qk
    types = {"q": f"*{operand}", "k": f"*{operand}", "v": f"*{entry.pv}", "out": f"*{entry.pv}", "to_log2": "fp32"}
    types |= dict.fromkeys(attention.RUNTIME_NUMBERS, "i32")
    if entry.blocks:
        types |= {"indices": "*i32", "counts": "*i32"}
    if entry.qk == "int8":
        types |= {"q_scale": "*fp32", "k_scale": "*fp32"}
    if entry.key_bias:
        types["key_bias"] = "*fp32"
    if entry.lse:
        types["lse"] = "*fp32"
    if entry.tail:
        types |= {"tail_indices": "*i32", "tail_counts": "*i32", "pooled_k": f"*{operand}", "pooled_v": f"*{entry.pv}", "pooled_bias": "*fp32"}
        if entry.qk == "int8":
            types["pooled_scale"] = "*fp32"
    unit = 16 if entry.head_dim % 16 == 0 else 8
    config = entry.config(capability)
    constants = compile_table.attention_constants(entry.head_dim, entry.blocks, entry.qk, config, unit)
    return compile_kernel(attention.attention_kernel, types, constants, capability, config.num_warps, config.num_stages)


def tensor_core_instructions(entry: Entry, capability: tuple[int, int]) -> list[str]:
    """Patterns of the instructions that q.k and p.v must become.

    wgmma (Hopper) and tcgen05 (data-center Blackwell) take 64 rows at least; smaller tiles use mma.sync there too. Triton
    does not lower INT8 dots to tcgen05, so data-center Blackwell uses mma.sync for q.k.
    """
    value = {"fp16": "f16", "bf16": "bf16"}[entry.pv]
    wide = entry.config(capability).block_m >= 64
    if wide and capability == (9, 0):
        half, int8 = rf"wgmma\.mma_async\.\S*k16\.f32\.{value}\.{value}", r"wgmma\.mma_async\.\S*k32\.s32\.s8\.s8"
    else:
        half, int8 = rf"mma\.sync\.\S*m16n8k16\.row\.col\.f32\.{value}\.{value}", r"mma\.sync\.\S*m16n8k32\.\S*s32\.s8\.s8"
    if wide and capability == (10, 0):
        half = r"tcgen05\.mma\.\S*kind::f16"
    return [int8, half] if entry.qk == "int8" else [half]


def resources(compiled, folder: Path) -> dict[str, int]:
    """Registers a thread, and bytes of stack (where spilled registers go), by the name that cuobjdump gives them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}


def check(compiled, capability: tuple[int, int], folder: Path) -> None:
    used = resources(compiled, folder)
    assert used["STACK"] == used["LOCAL"] == 0, f"registers are spilled: {used}"
    assert compiled.metadata.shared <= gpu.from_capability(capability).shared_memory


@pytest.mark.parametrize("entry", compile_table.entries(), ids=lambda entry: entry.name)
@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda capability: "sm_{}{}".format(*capability))
def test_attention(entry: Entry, capability: tuple[int, int], tmp_path: Path) -> None:
    compiled = compile_attention(entry, capability)
    for pattern in tensor_core_instructions(entry, capability):
        assert re.search(pattern, compiled.asm["ptx"]), pattern
    check(compiled, capability, tmp_path)


@pytest.mark.parametrize("entry", [entry for entry in compile_table.entries() if entry.blocks], ids=lambda entry: entry.name)
def test_key_loads_through_the_list_are_pipelined(entry: Entry) -> None:
    """On Ampere asynchronous copies bring K and V while the tensor cores work, although the address depends on the list."""
    assert "cp.async.cg.shared.global" in compile_attention(entry, (8, 0)).asm["ptx"]


@pytest.mark.parametrize(("head_dim", "block", "granule"), [(128, 128, 32), (64, 32, 8)])
@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda capability: "sm_{}{}".format(*capability))
def test_tail_error(head_dim: int, block: int, granule: int, capability: tuple[int, int], tmp_path: Path) -> None:
    types = dict.fromkeys(("q", "out", "k", "around", "pooled_k", "pooled_v"), "*bf16")
    types |= dict.fromkeys(("lse", "shown", "key_bias", "pooled_bias", "shares", "errors"), "*fp32")
    types |= {"scale": "fp32", **dict.fromkeys(tail_costs.RUNTIME_NUMBERS, "i32")}
    coarse = {name: kind for name, kind in types.items() if name not in ("around", "shares", "granules")} | {"v": "*bf16", "blocks": "i32"}
    for kernel, kinds, finest in ((tail_costs.tail_error_kernel, types, granule), (tail_costs.coarse_error_kernel, coarse, None)):
        constants = tail_costs.constants(head_dim, block, finest)
        compiled = compile_kernel(kernel, kinds, constants, capability, num_warps=tail_costs.WARPS, num_stages=1)
        assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", compiled.asm["ptx"])
        check(compiled, capability, tmp_path)


@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda capability: "sm_{}{}".format(*capability))
def test_quantization(head_dim: int, capability: tuple[int, int], tmp_path: Path) -> None:
    constants = compile_table.quantize_constants(head_dim, 16 if head_dim % 16 == 0 else 8)
    outputs = {"quantized": "*i8", "scales": "*fp32"}
    numbers = dict.fromkeys(quantize.RUNTIME_NUMBERS, "i32")
    q_types = {"q": "*bf16", **outputs, **numbers, "scale": "fp32"}
    lse_types = {**q_types, "mean": "*fp32", "lse_shift": "*fp32"}
    k_types = {"k": "*bf16", "mean": "*fp32", **outputs, **numbers}
    pooled_types = {**k_types, "k": "*fp32"}
    q_kernel, k_kernel = quantize.quantize_q_kernel, quantize.quantize_k_kernel
    for kernel, types in ((q_kernel, q_types), (q_kernel, lse_types), (k_kernel, k_types), (k_kernel, pooled_types)):
        check(compile_kernel(kernel, types, constants, capability, num_warps=4, num_stages=3), capability, tmp_path)


@pytest.mark.parametrize("coarse", [1, 4, 16])
@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda capability: "sm_{}{}".format(*capability))
def test_the_list_of_a_tail(coarse: int, capability: tuple[int, int], tmp_path: Path) -> None:
    types = {"kept": "*u8", "indices": "*i32", "counts": "*i32", **dict.fromkeys(tail.RUNTIME_NUMBERS, "i32")}
    compiled = compile_kernel(tail.list_tail_kernel, types, compile_table.list_constants(coarse), capability, num_warps=4, num_stages=3)
    check(compiled, capability, tmp_path)
