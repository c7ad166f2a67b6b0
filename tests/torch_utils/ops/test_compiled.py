"""Which implementation runs where, which failures are remembered, and the comparison before the first use."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnnlib.cli import UserError
from torch_utils.ops import compiled
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.build import BuildError
from torch_utils.ops.compiled import (
    auto_implementation,
    auto_means,
    auto_means_as_before,
    first_difference,
    resolve_impl,
)
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import upfirdn2d

CPU = torch.device("cpu")
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
F = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
OPS = {
    "upfirdn2d": lambda impl, x=X: upfirdn2d(x, F.to(x.device), up=2, padding=2, impl=impl),
    "bias_act": lambda impl, x=X: bias_act(x, act="swish", impl=impl),
    "conv2d_resample": lambda impl, x=X: conv2d_resample(x, torch.ones(2, 3, 3, 3, device=x.device), F.to(x.device),
                                                         down=2, padding=1, impl=impl),
}
REASON = "there is no compiler: install g++"
WARNING = f"warning: using PyTorch's own operators, which are slower: {REASON}\n"


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
    """A process that has loaded nothing, where no library can be built; a list of the kinds requested."""
    asked = []

    def refuse(kind):
        asked.append(kind)
        raise BuildError(REASON)

    forget(monkeypatch)
    monkeypatch.setattr(compiled, "find", refuse)
    return asked


def forget(monkeypatch, **failures):
    """Make this process forget which libraries were loaded or warned about, except those named."""
    monkeypatch.setattr(compiled, "_failures", failures)
    monkeypatch.setattr(compiled, "_told", set())


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """A process that has loaded nothing, on a machine where nothing is built; returns the empty folder of builds."""
    def refuse(*_, **__):
        raise AssertionError("a process is started")

    forget(monkeypatch)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.setattr("subprocess.Popen", refuse)
    return tmp_path / "builds"


@pytest.fixture
def other_cuda(monkeypatch):
    """A process with loaded CPU operators that finds a CUDA library; a list to put the result of the comparison in."""
    loaded, verdict, compared = [], [], []

    def first_difference(device):
        compared.append(device)
        if isinstance(verdict[0], Exception):
            raise verdict[0]
        return verdict[0]

    forget(monkeypatch, cpu=None)
    monkeypatch.setattr(compiled, "find", lambda kind: f"lib{kind}.so")
    monkeypatch.setattr("torch.ops.load_library", loaded.append)
    monkeypatch.setattr("torch_utils.ops.compiled.first_difference", first_difference)
    yield verdict
    assert loaded == ["libcuda.so"]
    assert compared == [torch.device("cuda")]


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


def test_auto_means_ends_after_an_error_too():
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
    forget(monkeypatch)
    monkeypatch.setattr(compiled, "find", lambda kind: asked.append(kind) or path)
    assert torch.equal(OPS["upfirdn2d"]("auto"), OPS["upfirdn2d"]("composed"))
    message = capsys.readouterr().err
    assert re.fullmatch(f"warning: using .* which are slower: [^\n]*{re.escape(str(path))}[^\n]*\n", message)
    message = f"^bias_act: impl is 'cpp', which cannot run here: .*{re.escape(str(path))}"
    with pytest.raises(RuntimeError, match=message):
        OPS["bias_act"]("cpp")
    assert asked == ["cpu"]


def test_reason_of_several_lines_becomes_one_line(monkeypatch):
    def refuse(kind):
        raise BuildError("first line\n  second line")

    forget(monkeypatch)
    monkeypatch.setattr(compiled, "find", refuse)
    assert compiled.failure_of("cpu") == "first line second line"


def test_threads_that_start_together_search_once(monkeypatch):
    asked = []

    def refuse(kind):
        asked.append(kind)
        time.sleep(0.05)  # for the others to come
        raise BuildError(REASON)

    forget(monkeypatch)
    monkeypatch.setattr(compiled, "find", refuse)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(compiled.failure_of, ["cpu"] * 4)) == [REASON] * 4
    assert asked == ["cpu"]


NOT_BUILT = "the compiled CPU operators are not built: run python -m torch_utils.ops.build once"


def test_auto_where_nothing_is_built_is_composed_with_one_line_and_builds_nothing(nothing_built, capsys):
    for op in OPS.values():
        op("auto", X.to("meta"))  # only shapes: nothing is slower
    assert capsys.readouterr().err == ""
    for _ in range(2):
        for op in OPS.values():
            assert torch.equal(op("auto"), op("composed"))
    assert capsys.readouterr().err == WARNING.replace(REASON, NOT_BUILT)
    assert compiled.describe("cpu") == f"composed ({NOT_BUILT})"
    assert not nothing_built.exists()


@pytest.mark.parametrize("op", OPS)
def test_cpp_where_nothing_is_built_raises_and_says_how_to_build(op, nothing_built):
    with pytest.raises(RuntimeError, match=f"^{op}: impl is 'cpp', which cannot run here: {re.escape(NOT_BUILT)}$"):
        OPS[op]("cpp")
    assert not nothing_built.exists()


def test_second_process_of_a_run_leaves_the_line_to_the_first(nothing_built, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert compiled.fast_implementation("cpu") == "composed"
    assert capsys.readouterr().err == ""


def test_make_ready_builds_what_was_not_there(no_library, monkeypatch):
    built = []
    monkeypatch.setattr(compiled, "library", lambda kind: built.append(kind) or f"lib{kind}.so")
    monkeypatch.setattr("torch.ops.load_library", lambda path: built.append(path))
    monkeypatch.setattr("torch.library.register_fake", lambda *_: None)
    assert compiled.failure_of("cpu") == REASON
    assert compiled.make_ready("mps") is None  # there are no operators for it
    assert built == []
    assert [compiled.make_ready("cpu") for _ in range(2)] == [None, None]
    assert built == ["cpu", "libcpu.so"]
    assert compiled.fast_implementation("cpu") == "cpp"


def test_make_ready_where_nothing_can_be_built_gives_the_compilers_reason(no_library, monkeypatch, capsys):
    def refuse(kind):
        raise BuildError("compiling the operators failed")

    monkeypatch.setattr(compiled, "library", refuse)
    monkeypatch.setattr(compiled, "find", lambda kind: None)
    assert compiled.make_ready("cuda") == "compiling the operators failed"
    assert torch.equal(OPS["bias_act"]("auto"), OPS["bias_act"]("composed"))
    assert capsys.readouterr().err == WARNING.replace(REASON, "compiling the operators failed")


# Work that is continued


def test_auto_means_as_before_what_the_work_was_started_with(capsys):
    for before, now in ((None, "cpp"), ("cpp", "cpp"), ("composed", "composed"), ("ref", "ref")):
        with auto_means_as_before(before, "cpu", "the work in x.parts") as means:
            assert means == auto_implementation("cpu") == resolve_impl("bias_act", "auto", X) == now
    assert capsys.readouterr().err == ("the work in x.parts was started with PyTorch's own operators and continues "
                                       "with them, for consistent results\n")
    assert auto_implementation("cpu") == "cpp"


def test_auto_means_as_before_without_those_operators_is_refused_in_one_line(no_library, capsys):
    for before, reason in (
            ("cpp", f"with the compiled operators (cpp), which cannot run here ({REASON}): fix that and repeat the "
                    "command, or remove it to start from scratch"),
            ("new", "with operators of another version of this program (new): remove it to start from "
                    "scratch")):
        with (pytest.raises(UserError) as caught, auto_means_as_before(before, "cpu", "the work in x.parts")):
            pass
        assert str(caught.value) == f"the work in x.parts was started {reason}"
    assert capsys.readouterr().err == ""


# CUDA, with a stand-in for its library


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


# The comparison before the first use


def test_first_difference_right_operators_agree():
    assert first_difference(CPU) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_first_difference_is_found_where_derivatives_are_off(mode, monkeypatch):
    with mode():
        assert first_difference(CPU) is None
        break_operator(monkeypatch, "bias_act", slope_scaled)
        assert "in derivative 1" in first_difference(CPU)


def shifted(op, *given):
    return op(*given).roll(1, 3)


def slope_scaled(op, *given):
    """Keep the values, and make derivatives 1 % too large."""
    y = op(*given)
    return y.detach() + 1.01 * (y - y.detach())


def slope_held(op, x, *given):
    """Replace an activation by its tangents: its second derivative is lost."""
    leaf = x.detach().requires_grad_()
    y = op(leaf, *given)
    slope, = torch.autograd.grad(y.sum(), leaf)
    return y.detach() + slope * (x - x.detach())


def flipped(op, x, f, *given):
    return op(x, f.flip(list(range(f.ndim))), *given)


def slightly_off(op, *given):
    return op(*given) + 2e-4


def undefined(op, *given):
    y = op(*given)
    return y + torch.where(torch.arange(y.shape[3]) == 5, torch.nan, 0)


def wrong_in_channels_last(op, x, *given):
    y = op(x, *given)
    return y if x.is_contiguous() else y.flip(2)


def break_operator(monkeypatch, op, fault):
    """Give a compiled operator a fault."""
    monkeypatch.setattr(compiled, f"{op}_compiled", partial(fault, getattr(compiled, f"{op}_compiled")))


FIRST_FILTERING = "a 4 x 4 filter, up=1, down=1, padding=(2, 2, 1, 1)"


@pytest.mark.parametrize(("op", "fault", "case", "order", "layout"), [
    ("upfirdn2d", shifted, FIRST_FILTERING, 0, "contiguous_format"),
    ("upfirdn2d", flipped, FIRST_FILTERING, 0, "contiguous_format"),
    ("upfirdn2d", undefined, FIRST_FILTERING, 0, "contiguous_format"),
    ("upfirdn2d", slope_scaled, FIRST_FILTERING, 1, "contiguous_format"),
    ("upfirdn2d", wrong_in_channels_last, FIRST_FILTERING, 0, "channels_last"),
    ("bias_act", shifted, "linear", 0, "contiguous_format"),
    ("bias_act", slightly_off, "linear", 0, "contiguous_format"),
    ("bias_act", slope_scaled, "linear", 1, "contiguous_format"),
    ("bias_act", slope_held, "swish", 2, "contiguous_format"),
    ("bias_act", wrong_in_channels_last, "linear", 0, "channels_last"),
])
def test_first_difference_names_the_operator_and_the_derivative(op, fault, case, order, layout, monkeypatch):
    break_operator(monkeypatch, op, fault)
    message = (re.escape(f"{op} with {case} on cpu differs from the reference by ") + "([0-9.e+-]+|nan)" +
               re.escape(f" in derivative {order} (torch.{layout}); expected at most 0.0001: please report it"))
    found = first_difference(CPU)
    assert re.fullmatch(message, found), found
