"""Settings and fixtures of all tests: no network, one thread, seeds fixed, skips with a reason."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # else trl, imported in one test, silences vLLM in later ones

import hypothesis
import pytest
import torch

# A shell starts background jobs deaf to Ctrl-C, which tests of Ctrl-C would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The tensors here are tiny: a second thread only adds waiting, most of all on a busy machine.
torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=40, derandomize=True, print_blob=True, database=None
)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):  # not its keyword, which a folder of this name gives too
                item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
