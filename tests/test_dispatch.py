"""Which implementation is chosen, what a refusal says, and what a failed self-test does."""

from __future__ import annotations

import pytest
import torch

from tessera.kernels import attention as attention_module
from tessera.kernels import backends, dispatch, gpu, reference, selftest, triton_backend
from tessera.kernels.attention import attention, explain
from tessera.kernels.block_mask import BlockMask
from tessera.kernels.dispatch import Implementation, Problem


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with the real table and leaves no trace in it."""
    backends.register_all()
    monkeypatch.setattr(dispatch, "_implementations", list(dispatch.implementations()))
    monkeypatch.setattr(dispatch, "_disabled", {})
    monkeypatch.setattr(selftest, "_passed", {})


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretend that CUDA devices have a compute capability, that Triton works and that self-tests pass."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(gpu, "of", lambda device: gpu.from_capability(capability if device.type == "cuda" else None))
        monkeypatch.setattr(triton_backend, "_triton_problem", lambda: None)
        monkeypatch.setattr(selftest, "ensure", lambda implementation, device: True)

    return pretend


def problem(**changes) -> Problem:
    values = {
        "device": torch.device("cuda", 0),
        "dtype": torch.bfloat16,
        "num_heads": 4,
        "num_kv_heads": 4,
        "q_len": 300,
        "k_len": 300,
        "head_dim": 128,
    }
    return Problem(**values | changes)


def refusals(p: Problem, precision: str) -> str:
    """The reason of the Triton row of a precision, empty if it takes the problem."""
    return next(i for i in triton_backend.IMPLEMENTATIONS if i.precision == precision).refuse(p) or ""


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_int8_then_native_are_preferred_on_every_gpu_since_ampere(on_gpu, capability: tuple[int, int]) -> None:
    on_gpu(capability)
    for blocks in (None, (128, 128)):
        assert explain(problem(blocks=blocks)).implementation.name == "triton/int8"
        dispatch.disable("triton/int8", gpu.from_capability(capability).name, "for the test")
        choice = explain(problem(blocks=blocks))
        assert choice.implementation.name == "triton/native"
        assert choice.refusals["triton/int8"] == "for the test"
        dispatch._disabled.clear()


def test_disabling_holds_for_one_architecture_only(on_gpu) -> None:
    dispatch.disable("triton/int8", "sm_90", "for the test")
    on_gpu((9, 0))
    assert explain(problem()).implementation.name == "triton/native"
    on_gpu((8, 9))
    assert explain(problem()).implementation.name == "triton/int8"


def test_a_precision_asks_only_its_own(on_gpu) -> None:
    on_gpu((9, 0))
    for precision in dispatch.PRECISIONS:
        dtype = torch.float32 if precision == "fp16" else torch.bfloat16
        assert explain(problem(dtype=dtype), precision).implementation.name == f"triton/{precision}"


@pytest.mark.parametrize(
    ("changes", "precision", "said"),
    [
        ({"device": torch.device("cpu")}, "int8", "needs an NVIDIA GPU with CUDA; the tensors are on cpu"),
        ({"head_dim": 160}, "native", "head_dim 160 > 128"),
        ({"blocks": (128, 48)}, "int8", "block_n 48 is not a power of two >= 16"),
        ({"blocks": (8, 64)}, "native", "block_m 8 is not a power of two >= 16"),
        ({"dtype": torch.float32}, "native", "torch.float32 is not taken"),
        ({"dtype": torch.bfloat16}, "fp16", "overflow"),
        ({"dtype": torch.float64}, "int8", "torch.float64 is not taken"),
        ({"requires_grad": True}, "int8", "no gradients"),
    ],
)
def test_refusals_are_sentences(on_gpu, monkeypatch: pytest.MonkeyPatch, changes: dict, precision: str, said: str) -> None:
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    on_gpu((8, 9))
    assert said in refusals(problem(**changes), precision)


def test_odd_sizes_are_not_refused(on_gpu) -> None:
    on_gpu((8, 9))
    for changes in ({"head_dim": 40}, {"head_dim": 72}, {"head_dim": 96}, {"q_len": 1}, {"k_len": 77}, {"key_bias": True}, {"num_kv_heads": 1}):
        assert not refusals(problem(**changes), "int8")


def test_turing_is_refused_by_name(on_gpu) -> None:
    on_gpu((7, 5))
    assert "sm_75" in refusals(problem(), "native")


def test_missing_and_broken_triton_are_named(on_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu((8, 9))
    monkeypatch.undo()
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    triton_backend._triton_problem.cache_clear()
    assert "triton is not installed: pip install triton" in triton_backend._triton_problem()

    def broken(*names: str):
        raise ImportError("DLL load failed while importing libtriton")

    monkeypatch.setattr(triton_backend, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_backend, "import_module", broken)
    triton_backend._triton_problem.cache_clear()
    assert triton_backend._triton_problem() == "triton is installed but unusable: ImportError: DLL load failed while importing libtriton"
    triton_backend._triton_problem.cache_clear()


def test_a_call_on_the_cpu_never_imports_triton(run_python) -> None:
    code = (
        "import sys, torch; from tessera.kernels.attention import attention; x = torch.randn(1, 1, 20, 64); attention(x, x, x);"
        "assert 'tessera.kernels.triton_backend.attention' not in sys.modules"
    )
    run_python("-c", code)


def test_unknown_precision_is_an_error() -> None:
    x = torch.randn(1, 1, 8, 16)
    with pytest.raises(ValueError, match="precision is 'int3'; use 'auto' or one of native, fp16, bf16, int8"):
        attention(x, x, x, precision="int3")


def test_no_backend_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    x = torch.randn(1, 1, 8, 16)
    with pytest.raises(dispatch.NoBackendError, match="no backend takes this call at precision 'int8' \\(triton/int8: needs an NVIDIA GPU"):
        attention(x, x, x, precision="int8")


class Fake:
    """An implementation in front of all others that computes `function` and counts its calls."""

    def __init__(self, function) -> None:
        self.calls = 0
        self.function = function
        dispatch._implementations.insert(0, Implementation("fake", "native", (), lambda: self.run))

    def run(self, q, k, v, block_mask, key_bias, scale, return_lse):
        self.calls += 1
        return self.function(q, k, v, block_mask, key_bias, scale)


def exact(q, k, v, block_mask, key_bias, scale):
    out, lse = reference.attention(q, k, v, block_mask=block_mask, key_bias=key_bias, scale=scale)
    return out.to(q.dtype), lse.float()


def noise(*arguments):
    out, lse = exact(*arguments)
    return out * (1 + torch.randn_like(out)), lse


def not_finite(*arguments):
    out, lse = exact(*arguments)
    return torch.full_like(out, torch.nan), lse


def wrong_lse(*arguments):
    out, lse = exact(*arguments)
    return out, lse + 1


def full_rows(q, k, v, block_mask, key_bias, scale):
    return exact(q, k, v, None, key_bias, scale)


def crash(*arguments):
    raise RuntimeError("PassManager::run failed")


def test_a_correct_implementation_is_tested_once() -> None:
    fake = Fake(exact)
    q = torch.randn(1, 1, 30, 16)
    for _ in range(3):
        torch.testing.assert_close(attention(q, q, q), reference.attention(q, q, q)[0].float())
    assert fake.calls == 3 + 2, "three calls, and the two problems of one self-test"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (noise, "relative error"),
        (not_finite, "not finite"),
        (wrong_lse, "log-sum-exp is off by 1.0"),
        (full_rows, "do not give zeros"),
        (crash, "RuntimeError: PassManager::run failed"),
    ],
)
def test_a_wrong_implementation_is_disabled_and_named(function, said: str) -> None:
    fake = Fake(function)
    q = torch.randn(1, 2, 40, 32)
    mask = BlockMask.from_dense(torch.rand(1, 2, 3, 3) < 0.7, 16, 16)
    expected = reference.attention(q, q, q, block_mask=mask)[0].float()
    torch.testing.assert_close(attention(q, q, q, block_mask=mask), expected, atol=1e-5, rtol=1e-4)
    calls = fake.calls
    attention(q, q, q, block_mask=mask)
    assert fake.calls == calls, "it is never called again"
    reason = explain(attention_module.describe(q, q, q)).refusals["fake/native"]
    assert reason.startswith("self-test failed on none: ") and said in reason


def test_backends_made_of_torch_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "failure", crash)
    q = torch.randn(1, 1, 20, 16)
    attention(q, q, q, precision="native")
