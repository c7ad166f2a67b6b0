"""The choice of an implementation: what runs where, and what is said and remembered when something cannot run."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ops import compiled
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.build import BuildError
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.dispatch import auto_means, resolve_impl
from torch_utils.ops.upfirdn2d import upfirdn2d

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
F = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
OPS = {
    "upfirdn2d": lambda impl, x=X: upfirdn2d(x, F.to(x.device), up=2, padding=2, impl=impl),
    "bias_act": lambda impl, x=X: bias_act(x, act="swish", impl=impl),
    "conv2d_resample": lambda impl, x=X: conv2d_resample(x, torch.ones(2, 3, 3, 3, device=x.device), F.to(x.device),
                                                         down=2, padding=1, impl=impl),
}
REASON = "there is no compiler: install g++"
WARNING = f"warning: operators are put together from PyTorch's, which is slower: {REASON}\n"


class Names(TorchDispatchMode):
    """Keeps the names of the compiled operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lesion_ops":
            self.names.append(function.name().removeprefix("lesion_ops::"))
        return function(*args, **(kwargs or {}))


def compiled_names(call) -> list[str]:
    with Names() as mode:
        call()
    return mode.names


@pytest.fixture
def no_library(monkeypatch):
    """A process that has loaded nothing, where no library can be built; the kinds that were asked for."""
    asked = []

    def library(kind):
        asked.append(kind)
        raise BuildError(REASON)

    monkeypatch.setattr(compiled, "_failures", {})
    monkeypatch.setattr(compiled, "library", library)
    return asked


@pytest.fixture
def other_cuda(monkeypatch):
    """A process with loaded CPU operators that finds a CUDA library; returns a list to hold what a comparison says."""
    loaded, verdict, compared = [], [], []

    def first_difference(device, impl):
        compared.append((device, impl))
        if isinstance(verdict[0], Exception):
            raise verdict[0]
        return verdict[0]

    monkeypatch.setattr(compiled, "_failures", {"cpu": None})
    monkeypatch.setattr(compiled, "library", lambda kind: f"lib{kind}.so")
    monkeypatch.setattr("torch.ops.load_library", loaded.append)
    monkeypatch.setattr("torch_utils.ops.self_check.first_difference", first_difference)
    yield verdict
    assert loaded == ["libcuda.so"]
    assert compared == [(torch.device("cuda"), "cuda")]


# What "auto" is


def test_auto_on_a_cpu_is_cpp():
    assert resolve_impl("bias_act", "auto", X) == "cpp"
    assert compiled.fast_implementation("cpu") == "cpp"
    assert compiled.describe("cpu") in ("cpp (AVX2)", "cpp (no AVX2)")


@pytest.mark.parametrize(("op", "names"), [
    ("upfirdn2d", ["upfirdn2d"]), ("bias_act", ["bias_act"]), ("conv2d_resample", ["upfirdn2d"])])
def test_every_op_runs_the_compiled_operator_when_auto_or_asked_to(op, names):
    for impl, expected in (("auto", names), ("cpp", names), ("composed", []), ("ref", [])):
        assert compiled_names(lambda impl=impl: OPS[op](impl)) == expected


@pytest.mark.parametrize("op", OPS)
def test_auto_on_meta_is_what_a_cpu_takes(op):
    x = X.to("meta")
    assert resolve_impl(op, "auto", x) == "cpp"
    assert OPS[op]("auto", x).shape == OPS[op]("ref").shape


def test_auto_on_another_kind_of_device_is_composed_and_builds_nothing(no_library, capsys):
    assert compiled.fast_implementation("mps") == compiled.describe("mps") == "composed"
    assert no_library == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("op", OPS)
def test_auto_means_another_implementation_for_a_while(op):
    with auto_means("ref"):
        assert compiled_names(lambda: OPS[op]("auto")) == []
        assert compiled_names(lambda: OPS[op]("cpp"))
        torch.testing.assert_close(OPS[op]("auto"), OPS[op]("ref"), rtol=0, atol=1e-4)  # 100 terms below 10
        with auto_means("auto"):
            assert resolve_impl(op, "auto", X) == "cpp"
        assert resolve_impl(op, "auto", X) == "ref"
    assert resolve_impl(op, "auto", X) == "cpp"


def test_auto_means_ends_with_an_error_too():
    with pytest.raises(KeyError), auto_means("composed"):
        raise KeyError
    assert resolve_impl("bias_act", "auto", X) == "cpp"


def test_auto_means_one_that_cannot_run_there_raises():
    with auto_means("cuda"), pytest.raises(RuntimeError, match=r"^bias_act: impl is 'cuda' and x is on cpu;"):
        OPS["bias_act"]("auto")


def test_unknown_name_raises():
    names = "expected one of auto, ref, composed, cpp, cuda"
    with pytest.raises(ValueError, match=f"^upfirdn2d: impl is 'fast'; {names}$"):
        resolve_impl("upfirdn2d", "fast", X)
    with pytest.raises(ValueError, match=f"^impl is 'fast'; {names}$"), auto_means("fast"):
        pass


@pytest.mark.parametrize(("impl", "x", "found", "expected"), [
    ("cuda", X, "cpu", "cuda"), ("cpp", X.to("meta"), "meta", "cpu")])
def test_implementation_of_another_device_raises_and_builds_nothing(impl, x, found, expected, no_library):
    message = f"bias_act: impl is '{impl}' and x is on {found}; expected x on {expected}: move it, or use 'auto'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        OPS["bias_act"](impl, x)
    assert no_library == []


# What cannot run


def test_auto_without_a_library_warns_once_and_is_composed(no_library, capsys):
    for _ in range(2):
        for op in OPS.values():
            assert torch.equal(op("auto"), op("composed"))
    assert no_library == ["cpu"]
    assert capsys.readouterr().err == WARNING
    assert resolve_impl("bias_act", "auto", X) == "composed"
    assert compiled.describe("cpu") == f"composed ({REASON})"
    assert no_library == ["cpu"]


@pytest.mark.parametrize("op", OPS)
def test_cpp_without_a_library_raises_with_the_reason(op, no_library, capsys):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{op}: impl is 'cpp', which cannot run here: {re.escape(REASON)}$"):
            OPS[op]("cpp")
    assert no_library == ["cpu"]
    assert capsys.readouterr().err == ""


def test_ref_and_composed_ask_for_no_library(no_library):
    for op in OPS.values():
        torch.testing.assert_close(op("composed"), op("ref"), rtol=0, atol=1e-4)  # 100 float32 terms below 10
    assert no_library == []


def test_library_that_the_loader_refuses_is_a_reason(monkeypatch, tmp_path, capsys):
    path = tmp_path / "operators.so"
    path.write_text("no library\n" * 100)
    asked = []
    monkeypatch.setattr(compiled, "_failures", {})
    monkeypatch.setattr(compiled, "library", lambda kind: asked.append(kind) or path)
    assert torch.equal(OPS["upfirdn2d"]("auto"), OPS["upfirdn2d"]("composed"))
    message = capsys.readouterr().err
    assert re.fullmatch(f"warning: operators .* which is slower: [^\n]*{re.escape(str(path))}[^\n]*\n", message)
    message = f"^bias_act: impl is 'cpp', which cannot run here: .*{re.escape(str(path))}"
    with pytest.raises(RuntimeError, match=message):
        OPS["bias_act"]("cpp")
    assert asked == ["cpu"]


def test_reason_of_several_lines_is_told_in_one(monkeypatch):
    def library(kind):
        raise BuildError("first line\n  second line")

    monkeypatch.setattr(compiled, "_failures", {})
    monkeypatch.setattr(compiled, "library", library)
    assert compiled.failure_of("cpu") == "first line second line"


def test_threads_that_start_together_build_once(monkeypatch):
    asked = []

    def library(kind):
        asked.append(kind)
        time.sleep(0.05)  # for the others to come
        raise BuildError(REASON)

    monkeypatch.setattr(compiled, "_failures", {})
    monkeypatch.setattr(compiled, "library", library)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(compiled.failure_of, ["cpu"] * 4)) == [REASON] * 4
    assert asked == ["cpu"]


# CUDA, whose library is a stand-in here


def test_cuda_that_agrees_is_used(other_cuda):
    other_cuda.append(None)
    assert compiled.failure_of("cuda") is None
    assert compiled.fast_implementation("cuda") == "cuda"
    assert compiled.describe("cuda") == "cuda"


def test_cuda_that_differs_from_the_reference_is_refused_and_compared_once(other_cuda, capsys):
    other_cuda.append("upfirdn2d differs by 1")
    assert [compiled.fast_implementation("cuda") for _ in range(3)] == ["composed"] * 3
    assert compiled.failure_of("cuda") == "upfirdn2d differs by 1"
    assert compiled.describe("cuda") == "composed (upfirdn2d differs by 1)"
    assert capsys.readouterr().err == WARNING.replace(REASON, "upfirdn2d differs by 1")


def test_cuda_that_fails_in_the_comparison_is_refused(other_cuda):
    other_cuda.append(RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA"))
    reason = "CUDA error: no kernel image is available Compile with TORCH_USE_CUDA_DSA"
    assert [compiled.failure_of("cuda") for _ in range(2)] == [reason] * 2


def test_cuda_without_the_cpu_operators_fails_for_their_reason(no_library):
    assert compiled.failure_of("cuda") == REASON
    assert compiled.failure_of("cpu") == REASON
    assert no_library == ["cpu"]
