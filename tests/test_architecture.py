"""Which room may import which; docs/architecture.md draws it. A line that breaks the rule is named."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base in (ROOT, ROOT / "integrations")
    for package in sorted(base.glob("gptq_*"))
    for path in sorted(package.rglob("*.py"))
}

# What each room of the core may import beside itself and the files at the top that need no room.
FLOOR = {
    "float32_products",
    "config",
    "dialects",
    "errors",
    "foreign_settings",
    "locks",
    "module_moves",
    "output_folder",
    "name_patterns",
    "config_fields",
    "timing",
    "version",
}
ROOMS = {
    "format": set(),
    "kernels": {"format"},
    "served": {"kernels"},
    "linear": {"format", "kernels", "lazy_weight", "served"},
    "embedding": {"format", "kernels", "linear", "lazy_weight"},
    "algorithm": {"format", "kernels"},
    "distributed": set(),
    "model": {"format", "kernels", "algorithm", "distributed"},
    "training": {"format", "kernels", "linear", "embedding", "algorithm", "distributed", "model"},
    "pipeline": {"format", "kernels", "linear", "embedding", "algorithm", "distributed", "model", "training"},
    "budget": {
        "format",
        "kernels",
        "linear",
        "embedding",
        "algorithm",
        "distributed",
        "model",
        "training",
        "pipeline",
    },
    "bench": {"format", "kernels", "linear"},
}
# What each package beside the core may import of the others.
PACKAGES = {
    "gptq_autoload": set(),
    "gptq_peft": {"gptq_autoload", "gptq_transformers"},
    "gptq_transformers": {"gptq_autoload"},
    "gptq_vllm": set(),
    "gptq_cli": {"gptq_transformers"},
}
# ``python -m gptq_transformers`` starts the application, which is above the adapter.
STARTERS = {"gptq_transformers.__main__", "gptq_transformers.cli"}


class Import(NamedTuple):
    """One imported module, and for ``from module import name`` the name."""

    importer: str
    line: int
    module: str
    name: str | None

    def __str__(self) -> str:
        path = SOURCES[self.importer].relative_to(ROOT)
        return f"{path}:{self.line} imports {self.name or ''} of {self.module}".replace("  of", "")


def _imports(importer: str, path: Path) -> Iterator[Import]:
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(importer, node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield Import(importer, node.lineno, *((inner, None) if inner in SOURCES else (module, alias.name)))


def _own(found: Iterator[Import]) -> list[Import]:
    return [each for each in found if each.module.partition(".")[0] in {name.partition(".")[0] for name in SOURCES}]


IMPORTS = [each for importer, path in SOURCES.items() for each in _own(_imports(importer, path))]


def _room(module: str) -> str:
    """The folder or file of the core that ``module`` belongs to; "" for the package's face."""
    return module.partition(".")[2].partition(".")[0]


def test_rooms_of_the_core_import_only_what_lies_below_them() -> None:
    wrong = []
    for each in IMPORTS:
        room, target = _room(each.importer), _room(each.module)
        if each.importer.startswith("gptq_backend.") and target != room:
            below = ROOMS[room] | FLOOR if room in ROOMS else FLOOR
            wrong += [str(each)] * (not each.module.startswith("gptq_backend") or target not in below)
    assert not wrong, "\n".join(wrong)


def test_adapters_import_public_names_of_the_core_and_not_each_other() -> None:
    wrong = []
    for each in IMPORTS:
        package, target = each.importer.partition(".")[0], each.module.partition(".")[0]
        if package == "gptq_backend" or each.importer in STARTERS or package == target:
            continue
        if target != "gptq_backend":
            wrong += [str(each)] * (target not in PACKAGES[package])
        elif _room(each.module) in ROOMS and _room(each.module) != "linear":
            face, name = (each.module, each.name) if each.name else each.module.rsplit(".", 1)  # a module by its name
            public = importlib.import_module(face).__all__ if face.count(".") == 1 else ()
            wrong += [f"{each}, which is not in the __all__ of its room"] * (name not in public)
    assert not wrong, "\n".join(wrong)


def test_no_private_name_crosses_from_one_package_into_another() -> None:
    wrong = [
        str(each)
        for each in IMPORTS
        if each.importer.partition(".")[0] != each.module.partition(".")[0] and (each.name or "").startswith("_")
        if not (each.name or "").startswith("__")
    ]
    assert not wrong, "\n".join(wrong)


def test_one_file_imports_vllm_and_knows_every_name_that_the_others_ask_it_for() -> None:
    found = [each for importer, path in SOURCES.items() for each in _imports(importer, path)]
    wrong = [str(each) for each in found if each.module.partition(".")[0] == "vllm"]
    compat = importlib.import_module("gptq_vllm.compat")
    known = {*compat.NAMES, *vars(compat)}
    wrong += [str(each) for each in found if each.module == "gptq_vllm.compat" and each.name not in known]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["gptq_backend", *PACKAGES])
def test_imports_form_no_circle(package: str) -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES if module.startswith(package)}
    for each in IMPORTS:
        if each.importer in graph and each.module in graph and SOURCES[each.importer].name != "__init__.py":
            graph[each.importer].add(each.module)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_the_rules_see_the_imports() -> None:
    found = {(each.importer, each.module) for each in IMPORTS}
    assert ("gptq_backend.linear", "gptq_backend.kernels.table") in found
    assert any(importer.startswith("gptq_vllm") and module == "gptq_backend.format" for importer, module in found)
    assert all(_room(module) in ROOMS for module in SOURCES if SOURCES[module].parent.parent.name == "gptq_backend")


# -- sizes -------------------------------------------------------------------------------------------------------------

_LINES, _FUNCTION = 400, 60


def test_files_and_functions_are_short_enough_to_read() -> None:
    """Kernels aside, which are one loop; a function's docstring does not count, and neither do its parameters."""
    tracked = [ROOT / "setup.py", *SOURCES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    wrong = []
    for path in tracked:
        text = path.read_text(encoding="utf-8")
        if (count := text.count("\n")) > _LINES:
            wrong.append(f"{path.relative_to(ROOT)} has {count} lines, expected at most {_LINES}")
        if path.name == "programs.py":  # what Triton compiles
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node) is not None and len(node.body) > 1
                count = (node.end_lineno or 0) - node.body[1 if documented else 0].lineno + 1
                if count > _FUNCTION:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {count} lines")
    assert not wrong, "\n".join(wrong)
