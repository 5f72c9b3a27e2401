"""Other vLLMs for the tests: the sources of a release without downloading it, and trees that a process can import.

vLLM's wheel has 340 MB, of which 12 MB are Python: :func:`release` reads parts of the file where it lies.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter, Signature
from pathlib import Path

from gptq_vllm.contract import without_self

_CHUNK = 1 << 20


class Unavailable(Exception):
    """A release that cannot be read from here, and why."""


def installed() -> Path:
    """Folder of the installed package ``vllm``."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def release(version: str | None = None, package: str = "vllm") -> zipfile.ZipFile:
    """The wheel of a release, by default the newest, as pip's index has it; of it only what is read is fetched.

    Raises:
        Unavailable: no network, or a server that only gives whole files.
    """
    wanted = package if version is None else f"{package}=={version}"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    found = subprocess.run([*pip, "--report", "-", wanted], capture_output=True, text=True, timeout=120)
    if found.returncode:
        raise Unavailable(f"pip finds no {wanted}: {found.stderr.strip()[-200:]}")
    url = json.loads(found.stdout)["install"][0]["download_info"]["url"]
    try:
        return zipfile.ZipFile(io.BufferedReader(_Remote(url), _CHUNK))  # type: ignore[type-var]
    except OSError as error:
        raise Unavailable(f"{url}: {error}") from error


class _Remote(io.RawIOBase):
    """A file on a server, read in parts."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            self._size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={self._at}-{end - 1}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:
                raise OSError("the server gives whole files only")
            data = answer.read()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# -- trees to import ---------------------------------------------------------------------------------------------------


def edited(target: Path, files: Mapping[str, str | None]) -> Path:
    """The installed vLLM with other text in some ``files``, by their path in the package; None leaves a file out.

    Returns:
        a folder for PYTHONPATH. All else in it are links.
    """
    _link(installed(), target / "vllm", {tuple(path.split("/")): text for path, text in files.items()})
    return target


def _link(source: Path, target: Path, files: Mapping[tuple[str, ...], str | None]) -> None:
    target.mkdir(parents=True)
    here = {path[0]: text for path, text in files.items() if len(path) == 1}
    for name, text in here.items():
        if text is not None:
            (target / name).write_text(text)
    for entry in source.iterdir():
        below = {path[1:]: text for path, text in files.items() if path[0] == entry.name and len(path) > 1}
        if below:
            _link(entry, target / entry.name, below)
        elif entry.name not in here:
            (target / entry.name).symlink_to(entry)


def unpacked(target: Path, wheel: zipfile.ZipFile, suffix: str = "") -> Path:
    """The package in ``wheel``, or only its files with ``suffix``.

    Returns:
        a folder for PYTHONPATH.
    """
    for info in sorted(wheel.infolist(), key=lambda info: info.header_offset):  # so that parts are read once
        if info.filename.startswith("vllm/") and info.filename.endswith(suffix):
            wheel.extract(info, target)
    return target


def merged(target: Path, wheel: zipfile.ZipFile) -> Path:
    """The Python files of ``wheel`` beside all other files of the installed vLLM, its binaries above all.

    Returns:
        a folder for PYTHONPATH.
    """
    unpacked(target, wheel, ".py")
    root = installed()
    for path in root.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            link = target / "vllm" / path.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return target


# -- trees to read -----------------------------------------------------------------------------------------------------

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Found = tuple[str, ast.AST]  # the module that defines something, and the definition


class SourceTree:
    """A :class:`gptq_vllm.contract.Tree` in source, which is not run.

    Args:
        read: text of a file by its path (``vllm/config/__init__.py``), None where there is none.
    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self._modules: dict[str, ast.Module | None] = {}

    @classmethod
    def of(cls, source: zipfile.ZipFile | Path) -> SourceTree:
        """Of a wheel, or of a folder that has the package ``vllm`` in it."""
        if isinstance(source, Path):
            return cls(lambda path: (source / path).read_text() if (source / path).is_file() else None)
        names = set(source.namelist())
        return cls(lambda path: source.read(path).decode() if path in names else None)

    def has(self, module: str, name: str) -> bool:
        return self._find(module, name) is not None

    def signature(self, module: str, owner: str, name: str) -> Signature | None:
        found = self._find(module, owner or name)
        if found is None:
            return None
        if isinstance(found[1], _Function):
            return _signature(found[1])
        methods = ("__new__", "__init__") if not owner else (name,)
        for _, cls in self._bases(*found):
            for node in cls.body:
                if isinstance(node, _Function) and node.name in methods:
                    return without_self(_signature(node))
        fields = [node for _, cls in self._bases(*found) for node in cls.body if isinstance(node, ast.AnnAssign)]
        return None if owner else Signature([_field(node) for node in fields])

    def mentions(self, module: str, name: str) -> set[str]:
        found = self._find(module, name)
        names = set()
        for _, cls in self._bases(*found) if found is not None else ():
            for node in ast.walk(cls):
                if isinstance(node, ast.Attribute):
                    names.add(node.attr)
                elif isinstance(node, _Function):
                    names.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
        return names

    def _bases(self, module: str, node: ast.AST) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and those that it inherits from, as far as they are vLLM's."""
        if isinstance(node, ast.ClassDef):
            yield module, node
            for base in node.bases:
                base = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(base, ast.Name) and (found := self._find(module, base.id)) is not None:
                    yield from self._bases(*found)

    def _find(self, module: str, name: str) -> _Found | None:
        """Follows imports within vLLM."""
        tree = self._parse(module)
        for node in _statements(tree.body) if tree is not None else ():
            if isinstance(node, ast.ClassDef | _Function) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._find(self._absolute(module, node), alias.name)
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = self._read(f"{module.replace('.', '/')}/__init__.py") is not None
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _parse(self, module: str) -> ast.Module | None:
        if module not in self._modules:
            base = module.replace(".", "/")
            text = self._read(f"{base}/__init__.py") or self._read(f"{base}.py")
            self._modules[module] = None if text is None else ast.parse(text)
        return self._modules[module]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for branch in ("body", "orelse", "handlers") if isinstance(node, ast.If | ast.Try) else ():
            for inner in getattr(node, branch, []):
                yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _signature(node: _Function) -> Signature:
    names = node.args
    positional = [*names.posonlyargs, *names.args]
    required = len(positional) - len(names.defaults)
    parameters = [
        Parameter(each.arg, Parameter.POSITIONAL_OR_KEYWORD, default=Parameter.empty if i < required else None)
        for i, each in enumerate(positional)
    ]
    if names.vararg is not None:
        parameters.append(Parameter(names.vararg.arg, Parameter.VAR_POSITIONAL))
    for each, default in zip(names.kwonlyargs, names.kw_defaults):
        default_value = Parameter.empty if default is None else None
        parameters.append(Parameter(each.arg, Parameter.KEYWORD_ONLY, default=default_value))
    if names.kwarg is not None:
        parameters.append(Parameter(names.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def _field(node: ast.AnnAssign) -> Parameter:
    """Of a dataclass, whose fields are passed by name here."""
    assert isinstance(node.target, ast.Name)
    default = Parameter.empty if node.value is None else None
    return Parameter(node.target.id, Parameter.KEYWORD_ONLY, default=default)
