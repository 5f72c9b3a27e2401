"""What the plugin does in a vLLM that it was not made for: vLLM starts, and a GPTQ checkpoint gets one sentence."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptq_backend import ConfigError
from tests.transformers.checkpoints import PEERS
from tests.vllm.trees import SourceTree, edited, installed

pytest.importorskip("vllm")

from gptq_vllm import contract, gate, registration
from gptq_vllm.contract import InstalledTree, differences
from gptq_vllm.fused_moe import GPTQMoEMethod
from gptq_vllm.linear import GPTQHeadMethod

STOCK = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """Each test sees a process that did not check its vLLM yet."""
    gate.why_not.cache_clear()
    yield
    gate.why_not.cache_clear()


@pytest.mark.parametrize(
    ("version", "served", "warned"),
    [
        ("0.29.0", False, False),
        ("0.29.1.dev7+gabc", False, False),
        ("0.30.0rc1", True, False),
        ("0.32.0+cpu", True, False),
        ("0.32.1.dev5+gabc", True, False),
        ("0.33.0rc1", True, False),
        ("0.34.0", True, True),
        ("0.34.0.dev3+gabc", True, True),
        ("1.0.0", True, True),
        ("dev", True, False),
        ("0.1.dev1+gabc", True, False),  # a clone without tags
    ],
)
def test_the_version_decides_where_there_is_one(
    version: str, served: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    reason = gate.why_not()
    assert (reason is None) == served
    assert (gate.untested(version) is not None) == warned
    if reason is not None:
        assert f"serves vLLM 0.30 and newer, and vLLM {version} is installed; install a newer vLLM" in reason


def test_a_refusing_method_says_why_and_leaves_other_checkpoints_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.29.0")
    method = registration.GPTQMethod
    for name in ("gptq", "gptq_backend"):
        with pytest.raises(ConfigError, match=f"--quantization {name}: gptq-backend serves vLLM 0.30 and newer"):
            method.override_quantization_method(STOCK, name)
    assert method.override_quantization_method(STOCK, None) is None  # vLLM's own serves
    assert method.override_quantization_method({"quant_method": "awq"}, None) is None
    with pytest.raises(ConfigError, match="gptq-backend serves vLLM 0.30 and newer"):
        method.from_config(STOCK)


# -- the contract ------------------------------------------------------------------------------------------------------


def test_the_contract_holds_in_the_installed_vllm() -> None:
    assert differences(InstalledTree()) == []
    assert differences(SourceTree.of(installed().parent)) == []


def test_the_contract_says_of_our_methods_what_they_take() -> None:
    from gptq_vllm.config import GPTQBackendConfig

    ours = {
        "QuantizationConfig": GPTQBackendConfig,
        "LinearMethodBase": GPTQHeadMethod,
        "FusedMoEMethodBase": GPTQMoEMethod,
    }
    for (owner, name), wanted in contract.HOOKS.items():
        found = contract.without_self(inspect.signature(getattr(ours[owner], name)))
        names = [("**" if each.kind is each.VAR_KEYWORD else each.name) for each in found.parameters.values()]
        assert ", ".join(names) == wanted, f"{owner}.{name}"
    for owner, cls in ours.items():  # and all that we override is in it
        base = contract.import_module(contract.MODULES[owner])
        overridden = {name for each in cls.__mro__ if each.__module__.startswith("gptq_") for name in vars(each)}
        hooks = {name for name in overridden if not name.startswith("_") and hasattr(getattr(base, owner), name)}
        assert hooks <= {name for of, name in contract.HOOKS if of == owner}, owner


def _instead(old: str, new: str) -> Callable[[str], str]:
    def change(source: str) -> str:
        assert old in source
        return source.replace(old, new)

    return change


_LAYERS = "model_executor/layers"
CHANGES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "a method renamed": (
        f"{_LAYERS}/fused_moe/fused_moe_method_base.py",
        _instead("def get_fused_moe_quant_config", "def quant_config_of"),
        "FusedMoEMethodBase.get_fused_moe_quant_config is gone",
    ),
    "a hook's parameter gone": (
        f"{_LAYERS}/quantization/base_config.py",
        _instead(
            "def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module)", "def tie_weights(self)"
        ),
        r"LinearMethodBase.tie_weights\(\) is not \(layer, embed_tokens\)",
    ),
    "a hook's parameter more": (
        f"{_LAYERS}/linear.py",
        _instead(
            "x: torch.Tensor,\n        bias: torch.Tensor | None = None,\n    ) -> torch.Tensor:\n", "x, bias, y):\n"
        ),
        r"LinearMethodBase.apply\(layer, x, bias, y\) is not \(layer, x, bias\)",
    ),
    "an argument more": (
        "model_executor/utils.py",
        _instead("weight: torch.Tensor,\n", "weight: torch.Tensor,\n    mode,\n"),
        r"set_weight_attrs\(weight, mode, weight_attrs\) is not \(weight, weight_attrs\)",
    ),
    "a class moved": (
        "model_executor/models/utils.py",
        _instead("class WeightsMapper", "class NameMapper"),
        r"vllm.model_executor.models.utils.WeightsMapper is gone",
    ),
    "an attribute gone": (
        f"{_LAYERS}/fused_moe/routed_experts.py",
        _instead("swiglu_alpha", "alpha"),
        "RoutedExperts.swiglu_alpha is gone",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_vllm_changed_is_named(change: str, tmp_path: Path) -> None:
    path, edit, message = CHANGES[change]
    tree = edited(tmp_path, {path: edit((installed() / path).read_text())})
    found = differences(SourceTree.of(tree))
    assert len(found) == 1
    assert re.fullmatch(message, found[0]), found


# -- in a process ------------------------------------------------------------------------------------------------------

RUN = """
import gptq_vllm
gptq_vllm.register()
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization import get_quantization_config
def chosen(**asked):
    try:
        return ModelConfig(FOLDER, **asked).quantization
    except ValueError as error:
        return str(error).replace("\\n", " ")
print("another:", get_quantization_config("fp8").__name__)
print("asked:", chosen(quantization="gptq"))
print("unasked:", chosen())
"""


def started(tree: Path | None, before: str = "") -> tuple[dict[str, str], str]:
    """What a process finds out that runs ``before``, then the plugin as vLLM does: by label, and its log."""
    code = before + RUN.replace("FOLDER", repr(str(PEERS / "llama-4-32-sym")))
    path = os.pathsep.join([*([str(tree)] if tree is not None else []), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [line.partition(": ") for line in result.stdout.splitlines()]
    return {label: text for label, _, text in lines}, result.stdout + result.stderr


def _version(version: str) -> str:
    return f"__version__ = version = {version!r}\n__version_tuple__ = version_tuple = (0, 34, 0)\n"


def test_a_newer_vllm_without_auto_gptq_is_served_with_one_warning(tmp_path: Path) -> None:
    root = installed()
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
    files: dict[str, str | None] = {
        path: re.sub(r"(quantization|)\.auto_gptq import", r"\1.packed_gptq import", text)
        for path, text in texts.items()
        if ".auto_gptq import" in text
    }
    old = f"{_LAYERS}/quantization/auto_gptq.py"
    files |= {old: None, old.replace("auto", "packed"): texts[old], "_version.py": _version("0.34.0")}
    found, log = started(edited(tmp_path, files))
    assert found == {**found, "another": "Fp8Config", "asked": "gptq", "unasked": "gptq"}
    assert log.count("vLLM 0.34.0 is newer than 0.33, the last that this gptq-backend was tested with") == 1


def test_a_vllm_that_changed_starts_and_refuses_gptq_with_what_changed(tmp_path: Path) -> None:
    path, edit, message = CHANGES["a method renamed"]
    files = {path: edit((installed() / path).read_text()), "_version.py": _version("dev")}
    found, log = started(edited(tmp_path, files))
    assert (found["another"], found["unasked"]) == ("Fp8Config", "auto_gptq")
    assert f"--quantization gptq: vLLM dev has changed what gptq-backend uses of it ({message})" in found["asked"]
    assert log.count("install such a vLLM or a newer gptq-backend, or start vLLM with VLLM_PLUGINS=''") == 2


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("import vllm.model_executor.layers.quantization as q; del q.register_quantization_config", "not registered"),
        ("import vllm; vllm.__version__ = '0.29.0'", "GPTQ checkpoints are refused: gptq-backend serves vLLM 0.30 and"),
    ],
)
def test_a_vllm_without_a_plugin_interface_or_too_old_starts(before: str, message: str) -> None:
    found, log = started(None, before)
    assert (found["another"], found["unasked"]) == ("Fp8Config", "auto_gptq")
    assert log.count(message) == 1
