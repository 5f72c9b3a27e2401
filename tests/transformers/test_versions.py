"""A torch or transformers that was not tested ends in a sentence, or works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from gptq_transformers.versions import TESTED, too_old, untested
from tests.transformers.test_autoload import python

ROOT = Path(__file__).parents[2]
TRIED = ROOT / "docs" / "benchmarks" / "versions.json"
CHECKPOINT = ROOT / "tests" / "data" / "checkpoints" / "llama-4-32-sym"
LOAD = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__, model(torch.tensor([[3]])).logits.isfinite().all().item())
"""
PATH = (ROOT, ROOT / "integrations")


@pytest.mark.parametrize("package", TESTED)
def test_the_lower_bounds_are_those_of_the_package(package: str) -> None:
    oldest = ".".join(map(str, TESTED[package][0]))
    assert re.search(rf'"{package}>={re.escape(oldest)}"', (ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("package", TESTED)
def test_the_newest_is_one_that_was_tried(package: str) -> None:
    tried = [each[package] for each in json.loads(TRIED.read_text()) if each["result"] == "works"]
    newest = max(tuple(map(int, version.split(".")[:2])) for version in tried)
    assert TESTED[package][1] == newest


def test_the_page_shows_what_was_tried() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "try_versions.py"), "--table", str(TRIED)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs" / "quickstart.md").read_text()


@pytest.mark.parametrize("version", ["2.6.0", "2.6.0a0+git1234", "2.13.0+cpu", "2.15.1"])
def test_versions_within_the_bounds_need_no_word(version: str) -> None:
    assert too_old("torch", version) is None
    assert untested("torch", version) is None


def test_what_is_too_old_is_named_with_what_is_expected_and_what_to_do() -> None:
    assert too_old("transformers", "4.55.4") == (
        "transformers 4.55.4 is installed, and gptq-backend needs 4.56 or newer; "
        "run: pip install --upgrade transformers"
    )


def test_a_transformers_that_is_too_old_is_refused_when_it_is_imported() -> None:
    said = python(
        """
        import transformers
        transformers.__version__ = "4.50.0"
        try:
            import gptq_transformers
        except ValueError as error:
            print(error)
        """,
        *PATH,
    )
    assert said.startswith("transformers 4.50.0 is installed, and gptq-backend needs 4.56 or newer")


def test_newer_versions_serve_with_one_warning() -> None:
    # Not the packages' own versions, by which transformers decides what it can do.
    newer = (
        "from gptq_transformers import versions; versions.TESTED = dict.fromkeys(versions.TESTED, ((2, 0), (2, 1)))\n"
    )
    heard = "import logging, sys; logging.basicConfig(stream=sys.stdout)\n"
    said = python(newer + heard + LOAD + LOAD, *PATH)
    for package in TESTED:
        heard_of = re.escape("is newer than 2.1, the last that this gptq-backend was tested with")
        assert len(re.findall(rf"{package} \S+ {heard_of}", said)) == 1
    assert said.count("QuantLinear True") == 2


def test_a_model_loads_where_transformers_lacks_what_only_fused_layers_need() -> None:
    heard = "import gptq_transformers, logging, sys; logging.basicConfig(stream=sys.stdout)\n"
    # A copy lacks the name, as the models of transformers need it.
    lacks = """
import types, transformers.cache_utils as real
sys.modules[real.__name__] = types.ModuleType(real.__name__)
vars(sys.modules[real.__name__]).update({name: each for name, each in vars(real).items() if name != "DynamicLayer"})
"""
    said = python(heard + lacks + LOAD, *PATH)
    assert "decoder layers run module by module: transformers" in said
    assert "cannot import name 'DynamicLayer'" in said
    assert "QuantLinear True" in said


def test_a_name_that_registering_needs_and_is_gone_is_said_in_a_sentence() -> None:
    said = python(
        """
        import transformers.quantizers.auto
        del transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
        try:
            import gptq_transformers
        except ValueError as error:
            print(error)
        """,
        *PATH,
        GPTQ_BACKEND_AUTOLOAD="0",
    )
    assert "has changed what gptq-backend uses of it" in said
    assert "AUTO_QUANTIZER_MAPPING" in said
