"""How to act on a module as soon as it is complete, without importing it. Standard library only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

_acts: dict[str, Callable[[ModuleType], None]] = {}  # by name of the watched module


def watch(names: Iterable[str], act: Callable[[ModuleType], None]) -> None:
    """Call ``act`` with each module of these names, at the first look at it after it is complete. Idempotent.

    Args:
        names: of modules; for one that is complete already ``act`` is called at once.
        act: must not raise: whoever imports the module would get the error.
    """
    waiting = False
    for name in names:
        _acts[name] = act
        module = sys.modules.get(name)
        if module is None:
            waiting = True
        elif is_initializing(module):
            module.__class__ = _Watched
        else:
            act(module)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Watched(ModuleType):
    """Class of a watched module until it is complete and someone looks at it."""

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if name != "__spec__" and not is_initializing(self):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _acts[self.__name__](self)
        return get(name)


class _Finder:
    """Makes modules watched when they are imported; finds nothing by itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _acts:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Executes a module with its own loader, watched."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        if type(module) is ModuleType:
            module.__class__ = _Watched
        self.loader.exec_module(module)


def is_initializing(module: ModuleType) -> bool:
    """Whether its import is still going on."""
    return bool(getattr(module.__spec__, "_initializing", False))
