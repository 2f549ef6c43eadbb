"""Which implementation is chosen, what a refusal says, and what a failed self-test does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import tessera
from tessera.kernels import attention as attention_module
from tessera.kernels import backends, dispatch, gpu, reference, selftest, triton_backend
from tessera.kernels.attention import attention, explain
from tessera.kernels.block_mask import BlockMask, PooledTail
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


def test_what_is_handed_around_cannot_be_changed() -> None:
    """A choice may be kept for later calls."""
    choice = dispatch.choose(problem(device=torch.device("cpu")))
    for record, name in ((choice, "precision"), (choice.implementation, "limits"), (choice.problem, "q_len")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)
    assert not Problem(torch.device("cpu"), torch.float32, 1, 1, 8, 8, 64).key_bias, "unless one is given"


def test_a_problem_says_what_the_tensors_are() -> None:
    q, k = torch.rand(2, 6, 10, 16, dtype=torch.float16), torch.rand(2, 3, 7, 16, dtype=torch.float16)
    expected = Problem(torch.device("cpu"), torch.float16, 6, 3, 10, 7, 16, None, False, False)
    assert dispatch.describe(q, k, k) == expected
    assert dispatch.describe(q, k, k, key_bias=torch.zeros(2, 7)) == replace(expected, key_bias=True)
    assert dispatch.describe(q, k, k, blocks=(4, 2)) == replace(expected, blocks=(4, 2))
    assert dispatch.describe(q.requires_grad_(), k, k) == replace(expected, requires_grad=True)
    with torch.no_grad():
        assert dispatch.describe(q, k, k) == expected


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 3, 7, 24), (1, 3, 7, 16), (3, 3, 7, 16), (2, 4, 7, 16), (2, 12, 7, 16)])
def test_keys_that_do_not_fit_the_queries_are_refused(shape: tuple[int, ...]) -> None:
    q, k = torch.rand(2, 6, 10, 16), torch.rand(shape)
    with pytest.raises(ValueError, match="do not fit"):
        dispatch.describe(q, k, k)
    with pytest.raises(ValueError, match="do not fit"):
        dispatch.describe(q, torch.rand(2, 3, 7, 16), torch.rand(2, 3, 8, 16))
    with pytest.raises(ValueError, match=r"k has shape \(1, 2, 3, 7, 16\); expected \(batch, heads, tokens, head_dim\)"):
        dispatch.describe(q, torch.rand(1, 2, 3, 7, 16), torch.rand(2, 3, 7, 16))
    with pytest.raises(ValueError, match="expected non-empty floating-point tensors"):
        dispatch.describe(q, torch.rand(2, 3, 0, 16), torch.rand(2, 3, 0, 16))


@pytest.mark.parametrize("shape", [(1, 7), (3, 7), (2, 6), (2, 8), (7,), (2, 1, 7)])
def test_a_bias_that_does_not_fit_the_keys_is_refused(shape: tuple[int, ...]) -> None:
    q, k = torch.rand(2, 6, 10, 16), torch.rand(2, 3, 7, 16)
    with pytest.raises(ValueError, match=r"expected \(batch, k_len\) = \(2, 7\)"):
        dispatch.describe(q, k, k, key_bias=torch.zeros(shape))


def test_every_implementation_is_found_by_its_name() -> None:
    for implementation in dispatch.implementations():
        assert dispatch.named(implementation.name) is implementation
        assert dispatch.named(f"{implementation.backend}/" + implementation.precision) is implementation, "equal, not the same text"


@pytest.mark.parametrize("precision", ["", "AUTO", "a", "fp32", "zz"])
def test_an_unknown_precision_is_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=f"precision is '{precision}'; use 'auto' or one of native, fp16, bf16, int8"):
        dispatch.choose(problem(device=torch.device("cpu")), precision)


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
        ({"blocks": (128, 48)}, "int8", "block_n 48 is not a power of two >= 8"),
        ({"blocks": (8, 64)}, "native", "block_m 8 is not a power of two >= 16"),
        ({"dtype": torch.float32}, "native", "torch.float32 is not taken"),
        ({"dtype": torch.bfloat16}, "fp16", "overflow"),
        ({"dtype": torch.float64}, "int8", "torch.float64 is not taken"),
        ({"requires_grad": True}, "int8", "no gradients"),
        ({"blocks": (128, 4)}, "native", "block_n 4 is not a power of two >= 8"),
    ],
)
def test_refusals_are_sentences(on_gpu, monkeypatch: pytest.MonkeyPatch, changes: dict, precision: str, said: str) -> None:
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    on_gpu((8, 9))
    assert said in refusals(problem(**changes), precision)


@pytest.mark.parametrize("granule", [8, 16, 32, 128])
def test_granules_and_tails_are_taken(on_gpu, granule: int) -> None:
    on_gpu((9, 0))
    for tail in (None, PooledTail(4)):
        asked = problem(blocks=(128, granule), tail=tail)
        assert [explain(asked, precision).implementation.name for precision in ("int8", "native")] == ["triton/int8", "triton/native"]


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


@pytest.mark.slow
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

    def __init__(self, function, precision: str = "native", limits=(), **declared) -> None:
        self.calls = 0
        self.function = function
        self.row = Implementation("fake", precision, limits, lambda: self.run, **declared)
        dispatch._implementations.insert(0, self.row)

    def run(self, q, k, v, block_mask, key_bias, scale, return_lse, tail=None):
        self.calls += 1
        return self.function(q, k, v, block_mask, key_bias, scale, tail)


def exact(q, k, v, block_mask, key_bias, scale, tail=None):
    out, lse = reference.attention(q, k, v, block_mask=block_mask, key_bias=key_bias, scale=scale, tail=tail)
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


def full_rows(q, k, v, block_mask, key_bias, scale, tail):
    return exact(q, k, v, None, key_bias, scale)


def no_tail(q, k, v, block_mask, key_bias, scale, tail):
    return exact(q, k, v, block_mask, key_bias, scale)


def crash(*arguments):
    raise RuntimeError("PassManager::run failed")


def test_a_correct_implementation_is_tested_once() -> None:
    fake = Fake(exact)
    q = torch.randn(1, 1, 30, 16)
    for _ in range(3):
        torch.testing.assert_close(attention(q, q, q), reference.attention(q, q, q)[0].float())
    assert fake.calls == 3 + 3, "three calls, and the three problems of one self-test"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (noise, "relative error"),
        (not_finite, "not finite"),
        (wrong_lse, "log-sum-exp is off by 1.0"),
        (full_rows, "do not give zeros"),
        (no_tail, "do not give zeros"),
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


def slightly_wrong(*arguments):
    out, lse = exact(*arguments)
    return out * 1.04, lse


def test_a_new_precision_brings_its_own_tolerance() -> None:
    """No table of the self-test has to know it: what is declared decides."""
    cpu = torch.device("cpu")
    assert selftest.failure(Fake(exact, "fp8").row, cpu) is None
    assert selftest.failure(Fake(slightly_wrong, "fp8", tolerance=0.05).row, cpu) is None
    assert "relative error 0.040 against float64" in selftest.failure(Fake(slightly_wrong, "fp8", tolerance=0.03).row, cpu)
    assert "where 0.03 is allowed" in selftest.failure(Fake(slightly_wrong, "fp8").row, cpu), "what nobody declared is not taken for right"


def test_a_trusted_implementation_is_not_tested() -> None:
    fake = Fake(noise, trusted=True)
    q = torch.randn(1, 1, 20, 16)
    attention(q, q, q)
    assert fake.calls == 1


def test_the_self_test_runs_in_the_declared_dtype(on_gpu) -> None:
    seen = []

    def note(q, *rest):
        seen.append(q.dtype)
        return exact(q, *rest)

    cpu = torch.device("cpu")
    selftest.failure(Fake(note).row, cpu)
    selftest.failure(Fake(note, self_test_dtype=torch.float32).row, cpu)
    assert seen == [torch.bfloat16] * 3 + [torch.float32] * 3
    on_gpu((9, 0))
    for row in triton_backend.IMPLEMENTATIONS:
        assert row.refuse(problem(dtype=row.self_test_dtype)) is None, "an implementation is tested on what it takes"


def test_a_choice_is_what_runs() -> None:
    """The probe and the call cannot differ: neither in what they describe nor in what is disabled between them."""
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    fake = Fake(exact)
    choice = explain(attention_module.describe(q, k, v))
    assert choice.implementation is fake.row and choice.problem == attention_module.describe(q, k, v)
    later = Fake(exact)
    calls = fake.calls
    out = attention(q, k, v, choice=choice)
    assert fake.calls == calls + 1 and later.calls == 0
    torch.testing.assert_close(out, reference.attention(q, k, v)[0].float())


def no_gradients(p: Problem) -> str | None:
    return "no gradients" if p.requires_grad else None


def test_a_choice_for_another_call_is_refused() -> None:
    Fake(exact, limits=(no_gradients,))
    q = torch.randn(1, 2, 40, 16)
    choice = explain(attention_module.describe(q, q, q))
    with pytest.raises(ValueError, match="choice was made for"):
        attention(q[:, :, :39], q, q, choice=choice)
    with pytest.raises(ValueError, match="requires_grad=True"):
        attention(q.clone().requires_grad_(), q, q, choice=choice)
    with pytest.raises(ValueError, match="key_bias=True"):
        attention(q, q, q, key_bias=torch.zeros(1, 40), choice=choice)


def test_a_choice_without_an_implementation_lists_every_reason() -> None:
    q = torch.randn(1, 1, 8, 16, requires_grad=True)
    fake = Fake(exact, "int8", (no_gradients,))
    choice = explain(attention_module.describe(q, q, q), "int8")
    assert choice.implementation is None
    with pytest.raises(dispatch.NoBackendError, match="at precision 'int8' \\(fake/int8: no gradients; triton/int8: "):
        attention(q, q, q, choice=choice)
    assert fake.calls == 0


def test_the_problem_of_a_mask_that_is_yet_to_be_chosen() -> None:
    q = torch.randn(1, 2, 40, 16)
    mask = BlockMask.from_dense(torch.ones(1, 1, 3, 2, dtype=torch.bool), 16, 32)
    assert attention_module.describe(q, q, q, blocks=(16, 32)) == attention_module.describe(q, q, q, block_mask=mask)


def test_backends_made_of_torch_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "failure", crash)
    q = torch.randn(1, 1, 20, 16)
    attention(q, q, q, precision="native")


def test_an_implementation_is_registered_once() -> None:
    for implementation in dispatch.implementations():
        again = Implementation(implementation.backend, implementation.precision, (), crash)
        with pytest.raises(ValueError, match=f"two of implementation '{implementation.name}': Implementation.* and Implementation.*crash"):
            dispatch.register(again)


def test_a_precision_says_what_both_products_are_made_of() -> None:
    declared = {row.name: (row.qk, row.pv) for row in dispatch.implementations()}
    assert declared.pop("triton/int8") == ("int8", "native")
    assert declared == {name: (name.split("/")[1],) * 2 for name in declared}


def test_backends_as_data(on_gpu) -> None:
    found = tessera.backends()
    assert [backend.name for backend in found] == [row.name for row in dispatch.implementations()]
    assert {backend.name: backend.status for backend in found}["torch/native"] == "usable"
    assert all((backend.reason is None) == (backend.status == "usable") for backend in found)
    q = torch.randn(1, 2, 40, 16)
    dense = {backend.name: backend for backend in tessera.backends(attention_module.describe(q, q, q))}
    assert (dense["torch/native"].status, dense["torch/native"].reason) == ("refused", "no block mask: torch's own dense attention is faster")
    assert dense["sdpa/native"].status == "usable" and "needs an NVIDIA GPU" in dense["triton/int8"].reason
    on_gpu((9, 0))
    assert next(backend.name for backend in tessera.backends(problem(blocks=(128, 128))) if backend.status == "usable") == "triton/int8"


def test_backends_are_tested_before_they_are_called_usable() -> None:
    Fake(noise)
    first = tessera.backends()[0]
    assert (first.name, first.status) == ("fake/native", "refused") and first.reason.startswith("self-test failed on none: ")


def test_a_forced_backend_is_the_only_one_asked(on_gpu) -> None:
    on_gpu((9, 0))
    for row in (*triton_backend.IMPLEMENTATIONS, *(row for row in dispatch.implementations() if row.backend == "torch")):
        with tessera.use_backend(row.name):
            choice = explain(problem(dtype=row.self_test_dtype, blocks=(128, 128)))
            assert choice.implementation is row and not choice.refusals
    with tessera.use_backend("triton/native"):
        assert explain(problem(), "native").implementation.name == "triton/native"
        refused = explain(problem(), "int8")
    assert refused.implementation is None and refused.refusals == {"triton/native": "its precision is 'native'"}


def test_a_forced_backend_that_cannot_take_the_call_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    q = torch.randn(1, 1, 40, 16)
    reason = "no backend takes this call at precision 'auto' \\(triton/native: needs an NVIDIA GPU with CUDA; the tensors are on cpu\\)"
    with tessera.use_backend("triton/native"), pytest.raises(dispatch.NoBackendError, match=reason):
        attention(q, q, q)
    with tessera.use_backend("torch/native"), pytest.raises(dispatch.NoBackendError, match="torch/native: no block mask"):
        attention(q, q, q)
    Fake(noise)
    with tessera.use_backend("fake/native"), pytest.raises(dispatch.NoBackendError, match="fake/native: self-test failed"):
        attention(q, q, q)
    with (
        pytest.raises(ValueError, match=r"use_backend: 'cuda' is not known; use one of fake/native, triton/int8, .*, sdpa/native"),
        tessera.use_backend("cuda"),
    ):
        raise AssertionError


def test_forcing_nests_and_ends_with_its_block() -> None:
    fakes = {name: Fake(exact, name) for name in ("one", "two")}
    q = torch.randn(1, 1, 40, 16)

    def chosen() -> str:
        return explain(attention_module.describe(q, q, q)).implementation.name

    usual = chosen()
    with tessera.use_backend("fake/one"):
        assert chosen() == "fake/one"
        with pytest.raises(KeyError), tessera.use_backend("fake/two"):
            assert chosen() == "fake/two"
            calls = fakes["two"].calls
            attention(q, q, q)
            assert fakes["two"].calls == calls + 1
            raise KeyError
        assert chosen() == "fake/one"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(chosen).result() == usual, "another thread chooses as it likes"
    assert chosen() == usual
