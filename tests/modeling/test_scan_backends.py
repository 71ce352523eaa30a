"""The choice of backend: every refusal with its reason, and never another one in silence."""

import sys
import types

import pytest
import torch

from video_ma2mba.modeling import scan_backends, ssd_kernels
from video_ma2mba.modeling.scan_backends import choose_backends, why_not_causal_conv1d, why_not_mamba_ssm

from ..tiny import tiny_config, tiny_model

SHAPE = ssd_kernels.CoreShape(80, 64, 1, 128, 256, (0.0, float("inf")), 1e-5)  # the 2.7B model's
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice, import or variable of another test."""
    monkeypatch.delenv(scan_backends.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for cached in (scan_backends._choose, ssd_kernels.scan_kernels, ssd_kernels.conv_kernel):
        cached.cache_clear()
    yield
    for cached in (scan_backends._choose, ssd_kernels.scan_kernels, ssd_kernels.conv_kernel):
        cached.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    """As on a machine where both packages can be imported."""
    monkeypatch.setattr(scan_backends, "scan_kernels", lambda: None)
    monkeypatch.setattr(scan_backends, "conv_kernel", lambda: "the convolution")


@pytest.mark.parametrize("why_not", [why_not_mamba_ssm, lambda *args: why_not_causal_conv1d(*args, 4)])
def test_refuses_a_device_and_a_dtype(why_not, kernels):
    assert "'cpu'" in why_not("cpu", BF16, SHAPE)
    assert "'meta'" in why_not("meta", BF16, SHAPE)
    assert "float64" in why_not("cuda", torch.float64, SHAPE)
    assert why_not("cuda", BF16, SHAPE) is None


def test_scan_refuses_what_its_kernels_cannot_do(kernels):
    assert "'gelu'" in why_not_mamba_ssm("cuda", BF16, SHAPE, "gelu")
    wide = SHAPE._replace(num_heads=1024)
    assert "131072 bytes" in why_not_mamba_ssm("cuda", BF16, wide)
    assert why_not_mamba_ssm("cuda", BF16, wide._replace(n_groups=2)) is None


def test_convolution_refuses_what_its_kernel_cannot_do(kernels):
    assert "5 tokens wide" in why_not_causal_conv1d("cuda", BF16, SHAPE, 5)
    assert "inner = 20" in why_not_causal_conv1d("cuda", BF16, SHAPE._replace(num_heads=5, head_dim=4), 4)
    assert "conv_dim = 5132" in why_not_causal_conv1d("cuda", BF16, SHAPE._replace(state_size=6), 4)
    odd = SHAPE._replace(num_heads=20, head_dim=256)
    assert "projection = 10516" in why_not_causal_conv1d("cuda", BF16, odd, 4)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(ssd_kernels.importlib.util, "find_spec", lambda name: None)
    assert why_not_mamba_ssm("cuda", BF16, SHAPE) == "ImportError: the package mamba-ssm is not installed"


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    """A mamba_ssm whose own `__init__` fails, as where its compiled part is missing, around kernels that are fine."""
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    for name in ("ssd_combined", "selective_state_update", "layernorm_gated"):
        (folder / f"{name}.py").write_text(f"name = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    steps = "video_ma2mba.modeling.step_kernels"
    monkeypatch.setitem(sys.modules, steps, types.ModuleType(steps))  # for want of triton
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_the_packages_own_init_is_gone_past(broken_package):
    assert why_not_mamba_ssm("cuda", BF16, SHAPE) is None
    assert ssd_kernels.scan_kernels().scan.name == "ssd_combined"
    # transformers asks for the package when its own Mamba-2 is imported, and must find what is really there
    assert "mamba_ssm" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="selective_scan_cuda"):
        import mamba_ssm  # noqa: F401


def test_the_text_of_a_failing_import_is_given(broken_package):
    (broken_package / "ssd_combined.py").write_text("raise RuntimeError('0 active drivers')\n")
    assert why_not_mamba_ssm("cuda", BF16, SHAPE) == "RuntimeError: 0 active drivers"
    assert "mamba_ssm" not in sys.modules


def test_a_package_that_is_imported_already_stays(monkeypatch, broken_package):
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(broken_package.parents[1])]
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    assert why_not_mamba_ssm("cuda", BF16, SHAPE) is None
    assert sys.modules["mamba_ssm"] is package


def test_auto_takes_the_kernels_where_they_run(kernels):
    assert choose_backends("auto", "cuda", BF16, SHAPE, 4, "silu") == ("mamba_ssm", "the convolution", {})
    chosen = choose_backends("auto", "cpu", BF16, SHAPE, 4, "silu")
    assert chosen.scan == "torch"
    assert chosen.conv is None
    assert "'cpu'" in chosen.reasons["mamba_ssm"]


def test_the_convolution_alone_may_be_refused(kernels):
    chosen = choose_backends("auto", "cuda", BF16, SHAPE, 5, "silu")
    assert (chosen.scan, chosen.conv) == ("mamba_ssm", None)
    assert "5 tokens wide" in str(chosen)


def test_torch_by_name(kernels):
    assert choose_backends("torch", "cuda", BF16, SHAPE, 4, "silu") == ("torch", None, {})


def test_the_kernels_by_name_or_an_error(kernels):
    with pytest.raises(ValueError, match="'mamba_ssm' was asked for and cannot run here: the tensors are on"):
        choose_backends("mamba_ssm", "cpu", BF16, SHAPE, 4, "silu")


def test_the_variable_decides_where_the_configuration_does_not(kernels, monkeypatch):
    monkeypatch.setenv(scan_backends.VARIABLE, "torch")
    assert choose_backends("auto", "cuda", BF16, SHAPE, 4, "silu").scan == "torch"
    assert choose_backends("mamba_ssm", "cuda", BF16, SHAPE, 4, "silu").scan == "mamba_ssm"
    monkeypatch.setenv(scan_backends.VARIABLE, "cudnn")
    with pytest.raises(ValueError, match="'cudnn' is none of auto, torch, mamba_ssm"):
        choose_backends("auto", "cuda", BF16, SHAPE, 4, "silu")


def test_said_once_and_loudly_where_speed_is_lost(kernels, monkeypatch):
    said = []
    monkeypatch.setattr(scan_backends.logger, "warning", lambda text: said.append(("warning", text)))
    monkeypatch.setattr(scan_backends.logger, "info", lambda text: said.append(("info", text)))
    for _ in range(2):
        choose_backends("auto", "cuda", torch.float64, SHAPE, 4, "silu")
        choose_backends("auto", "cpu", BF16, SHAPE, 4, "silu")
        choose_backends("auto", "cuda", BF16, SHAPE, 4, "silu")
    assert [level for level, _ in said] == ["warning", "info", "info"]
    assert "float64" in said[0][1]
    assert said[2][1] == "Mamba-2: scan on mamba_ssm, convolution on causal_conv1d"


def test_a_model_hands_the_configuration_on():
    model = tiny_model(scan_backend="mamba_ssm")
    with pytest.raises(ValueError, match="cannot run here"):
        model(input_ids=torch.tensor([[2, 3]]))
    assert tiny_config().scan_backend == "auto"
    with pytest.raises(Exception, match="scan_backend"):
        tiny_config(scan_backend="cudnn")


def test_a_missing_convolution_is_named():
    assert "causal_conv1d" in why_not_causal_conv1d("cuda", BF16, SHAPE, 4)


def test_a_batch_that_no_call_of_the_kernels_can_hold():
    assert ssd_kernels.tokens_per_call(1, SHAPE) % SHAPE.chunk_size == 0
    with pytest.raises(ValueError, match="use a smaller batch"):
        ssd_kernels.tokens_per_call(2**20, SHAPE)
