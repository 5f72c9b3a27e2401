"""Activation without a change in the user's code: every import order, the off switches, and what must survive."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gptq_autoload import stock_config
from gptq_backend.config import PLANAR_ONLY_BITS

pytest.importorskip("transformers")

_INSTALLED = any(
    entry.value == "gptq_autoload:install" for entry in importlib.metadata.entry_points(group="torch.backends")
)
needs_entry_point = pytest.mark.skipif(not _INSTALLED, reason="gptq-backend is not installed, only on the path")
_SHOW = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
quantizer, config = AUTO_QUANTIZER_MAPPING["gptq"], AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]
print(quantizer.__module__.split(".")[0], config.__module__.split(".")[0], config.__name__)
"""
OURS, STOCK = "gptq_transformers gptq_transformers GPTQConfig", "transformers transformers GPTQConfig"


def python(code: str, *path: Path, **environment: str) -> str:
    """Output of ``code`` in a new process, with ``path`` first on sys.path."""
    search = os.pathsep.join(filter(None, [*map(str, path), os.environ.get("PYTHONPATH")]))
    inherited = {k: v for k, v in os.environ.items() if k not in ("GPTQ_BACKEND_AUTOLOAD", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**inherited, "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "could not hook" not in done.stderr or "hook-error-expected" in code, done.stderr
    return done.stdout.strip()


def package(folder: Path, name: str, source: str = "") -> Path:
    """A folder for sys.path that holds an importable package."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(source))
    return folder


@needs_entry_point
@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        pytest.param("import transformers", marks=pytest.mark.slow),
        "import transformers.quantizers.auto",
        pytest.param("import transformers.quantizers", marks=pytest.mark.slow),
        pytest.param("import transformers.utils.quantization_config", marks=pytest.mark.slow),
        pytest.param("import transformers.modeling_utils", marks=pytest.mark.slow),
        "from transformers import GPTQConfig",
        "from transformers import AutoModelForCausalLM",
        pytest.param("from transformers import LlamaForCausalLM", marks=pytest.mark.slow),
        pytest.param("import gptq_autoload; gptq_autoload.install(); gptq_autoload.install()", marks=pytest.mark.slow),
        pytest.param("import gptq_backend", marks=pytest.mark.slow),
        "import gptq_transformers",
        "import torch; import gptq_transformers",
        pytest.param("import transformers.quantizers.auto; import gptq_transformers", marks=pytest.mark.slow),
        "import gptq_transformers; import transformers.quantizers.auto",
    ],
)
def test_takes_over_in_every_import_order(first: str) -> None:
    assert python(first + _SHOW) == OURS


@needs_entry_point
@pytest.mark.parametrize("switch", ["GPTQ_BACKEND_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_off_switch_leaves_transformers_alone(switch: str) -> None:
    assert python("import torch" + _SHOW, **{switch: "0"}) == STOCK


@pytest.mark.parametrize("switch", ["GPTQ_BACKEND_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
@pytest.mark.parametrize(
    "first", ["import gptq_transformers", "import transformers.quantizers.auto, gptq_transformers"]
)
def test_explicit_import_takes_over_despite_the_switch(switch: str, first: str) -> None:
    assert python(first + _SHOW, **{switch: "0"}) == OURS


@needs_entry_point
def test_stock_path_is_kept_where_it_could_work(tmp_path: Path) -> None:
    """Both packages present: the user's installation goes on as it was; one of them is not enough."""
    package(tmp_path, "optimum")
    assert python("import torch" + _SHOW, tmp_path) == OURS
    package(tmp_path, "gptqmodel")
    assert python("import torch" + _SHOW, tmp_path) == STOCK
    assert python("import gptq_transformers" + _SHOW, tmp_path) == OURS


@needs_entry_point
@pytest.mark.parametrize("first", ["", "import torch", "import transformers.quantizers.auto"])
def test_stock_config_with_module_list_needs_no_optimum(first: str) -> None:
    code = f"""
    {first}
    from transformers import GPTQConfig
    config = GPTQConfig(bits=4, modules_in_block_to_quantize=[["self_attn.q_proj"]])
    print(config.modules_in_block_to_quantize, config.to_dict()["modules_in_block_to_quantize"])
    """
    assert python(code) == "[['self_attn.q_proj']] [['self_attn.q_proj']]"


def test_stock_config_with_module_list_needs_no_optimum_after_explicit_import() -> None:
    code = """
    import gptq_transformers
    from transformers import GPTQConfig
    print(GPTQConfig(bits=4, modules_in_block_to_quantize=[["q"]]).modules_in_block_to_quantize)
    """
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "[['q']]"


@pytest.mark.parametrize("first", [pytest.param("import torch", marks=needs_entry_point), "import gptq_transformers"])
def test_stock_config_keeps_arguments_that_it_does_not_know(first: str) -> None:
    code = f"""
    {first}
    from transformers import GPTQConfig
    config = GPTQConfig(4, lm_head=True, dynamic={{"-:x": {{}}}}, static_groups=True, dataset=["text"])
    from gptq_transformers import GPTQConfig as Ours
    settings = Ours.adopt(config).to_quantize_config()
    print(config.lm_head, config.dataset, settings.lm_head, settings.static_groups, settings.dynamic)
    """
    assert python(code) == "True ['text'] True True {'-:x': {}}"


def test_stock_config_of_a_working_stock_path_is_left_alone(tmp_path: Path) -> None:
    package(tmp_path, "optimum")
    package(tmp_path, "gptqmodel")
    code = """
    import gptq_autoload; gptq_autoload.install()
    from transformers import GPTQConfig
    print(hasattr(GPTQConfig(4, lm_head=True), "lm_head"))
    """
    assert python(code, tmp_path) == "False"


@pytest.mark.parametrize("call", ["GPTQConfig(6)", "GPTQConfig(bits=6)"])
def test_stock_config_takes_codes_of_six_bits(call: str) -> None:
    code = f"""
    import gptq_transformers
    from transformers import GPTQConfig
    from gptq_transformers import GPTQConfig as Ours
    config = {call}
    settings = Ours.adopt(config).to_quantize_config()
    print(config.bits, settings.bits)
    """
    assert python(code) == "6 6"


def test_the_widths_that_the_stock_config_is_taught_are_those_in_planes() -> None:
    assert stock_config._ODD_BITS == PLANAR_ONLY_BITS  # twice, since gptq_autoload needs nothing but Python


@needs_entry_point
def test_stock_config_still_rejects_bad_values() -> None:
    code = """
    from transformers import GPTQConfig
    try:
        GPTQConfig(bits=9, modules_in_block_to_quantize=[["q"]])
    except ValueError as error:
        print("9" in str(error))
    """
    assert python(code) == "True"


@needs_entry_point
def test_import_torch_survives_a_broken_adapter(tmp_path: Path) -> None:
    package(tmp_path, "gptq_transformers", "raise RuntimeError('broken on purpose')")
    assert python("import torch  # hook-error-expected" + _SHOW, tmp_path) == STOCK


@needs_entry_point
def test_import_torch_survives_an_odd_module_table() -> None:
    """Whatever other libraries put into sys.modules, ``import torch`` must not fail because of us."""
    code = """
    import sys  # hook-error-expected
    sys.modules["transformers.quantizers.auto"] = object()
    import torch
    print(torch.ones(1).item())
    """
    assert python(code) == "1.0"


@needs_entry_point
def test_import_torch_alone_loads_nothing_of_ours() -> None:
    code = """
    import sys, torch
    print([name for name in ("gptq_backend", "gptq_transformers", "transformers", "greenlet") if name in sys.modules])
    """
    assert python(code) == "[]"


def test_install_takes_microseconds() -> None:
    code = """
    import time, torch, gptq_autoload
    start = time.perf_counter()
    for _ in range(100):
        gptq_autoload.install()
    print((time.perf_counter() - start) / 100 < 200e-6)
    """
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "True"


@needs_entry_point
def test_hooked_modules_look_untouched_afterwards() -> None:
    """Source, loader and class of the two modules are the originals, and our finder does not grow."""
    code = """
    import inspect, sys, types, torch, gptq_autoload
    import transformers.quantizers.auto as auto, transformers.utils.quantization_config as config
    gptq_autoload.install()
    assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(auto)
    print({type(module) for module in (auto, config)} == {types.ModuleType})
    print({type(module.__spec__.loader).__name__ for module in (auto, config)})
    print(sum(type(finder).__module__ == "gptq_autoload.watch" for finder in sys.meta_path) <= 1)
    """
    assert python(code).split("\n") == ["True", "{'SourceFileLoader'}", "True"]
