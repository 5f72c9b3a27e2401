"""peft is adapted in every order of imports, and left alone where it is absent, broken or of another make."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transformers.test_autoload import needs_entry_point, package, python

# An adapter on a layer of the core, without a model of transformers.
_USE = """
import torch, peft, gptq_backend
from gptq_backend.algorithm import round_to_nearest
weight = round_to_nearest(torch.randn(64, 64), gptq_backend.QuantizeConfig(bits=4, group_size=32))
layer = gptq_backend.QuantLinear.from_weight(weight)
model = peft.get_peft_model(torch.nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"]))
x = torch.randn(2, 64)
model(x).sum().backward()
print(type(model.base_model.model[0]).__module__)
"""
ADAPTED = "peft.tuners.lora.layer"
ORDERS = [
    "import torch",
    "import peft",
    "import gptq_backend; import peft",
    "from peft import LoraConfig",
    "import peft.tuners.lora",
    "import transformers, peft",
    "import gptq_transformers; import peft",
    "import peft; import gptq_transformers",
    "import gptq_peft; import peft",
    "import gptq_peft; import gptq_peft; gptq_peft.register()",
]


@needs_entry_point
@pytest.mark.parametrize(
    "first", [each if i in (1, 6) else pytest.param(each, marks=pytest.mark.slow) for i, each in enumerate(ORDERS)]
)
def test_adapters_work_in_every_import_order(first: str) -> None:
    assert python(first + _USE) == ADAPTED


@pytest.mark.parametrize(
    "first",
    [
        "import gptq_transformers",
        pytest.param("import peft, gptq_transformers", marks=pytest.mark.slow),
        pytest.param("import gptq_peft", marks=pytest.mark.slow),
        pytest.param("import peft, gptq_peft", marks=pytest.mark.slow),
    ],
)
def test_an_explicit_import_adapts_despite_the_switch(first: str) -> None:
    assert python(first + _USE, GPTQ_BACKEND_AUTOLOAD="0") == ADAPTED


def test_our_package_imports_neither_peft_nor_the_core() -> None:
    code = """
    import sys, gptq_peft
    print([name for name in ("peft", "torch", "transformers", "gptq_backend") if name in sys.modules])
    """
    assert python(code) == "[]"


@needs_entry_point
def test_a_peft_that_fails_to_import_fails_as_always(tmp_path: Path) -> None:
    package(tmp_path, "peft", "raise RuntimeError('broken peft')")
    code = """
    import gptq_backend
    for _ in range(2):
        try:
            import peft
        except RuntimeError as error:
            print(error)
    """
    assert python(code, tmp_path) == "broken peft\nbroken peft"


@needs_entry_point
@pytest.mark.parametrize("source", ["", "class tuners: pass"], ids=["empty", "other names"])
def test_a_peft_of_another_make_goes_on_after_one_sentence(source: str, tmp_path: Path) -> None:
    package(tmp_path, "peft", f"name = 'other'\n{source}")
    code = """
    import logging, torch  # hook-error-expected
    logging.basicConfig(stream=__import__("sys").stdout, format="%(message)s")
    import peft
    print(peft.name, peft.name)
    """
    sentence, last = python(code, tmp_path).split("\n")
    assert last == "other other"
    assert sentence.startswith("gptq_backend could not hook into peft (ModuleNotFoundError: ")
    assert "`import gptq_peft` shows the whole error" in sentence


@needs_entry_point
def test_import_torch_survives_an_odd_peft_in_the_module_table() -> None:
    code = """
    import sys  # hook-error-expected
    sys.modules["peft"] = object()
    import torch
    print(torch.ones(1).item())
    """
    assert python(code) == "1.0"
