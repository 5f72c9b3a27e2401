"""The core drags in no framework, and importing it changes nothing global."""

from __future__ import annotations

import subprocess
import sys

FRAMEWORKS = ("transformers", "vllm", "triton", "accelerate", "datasets", "typer", "gptq_transformers", "matplotlib")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_core_imports_no_framework() -> None:
    code = f"import sys, gptq_backend; print([name for name in {FRAMEWORKS} if name in sys.modules])"
    assert python(code) == "[]"


def test_import_leaves_torchs_settings_alone() -> None:
    settings = (
        "(torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
        "torch.backends.cuda.matmul.allow_tf32, torch.initial_seed() if seeded else 0)"
    )
    code = (
        "import torch, logging; seeded = True; torch.manual_seed(7); torch.set_num_threads(1); "
        f"before = {settings}; handlers = list(logging.root.handlers); import gptq_backend; "
        f"print({settings} == before and logging.root.handlers == handlers)"
    )
    assert python(code) == "True"


def test_autoload_module_is_standard_library_only() -> None:
    code = (
        "import sys, gptq_autoload; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    loaded = python(code)
    assert "torch" not in loaded
    assert "gptq_autoload" in loaded
    assert "gptq_backend'" not in loaded


def test_public_names_exist() -> None:
    import gptq_backend

    assert sorted(gptq_backend.__all__) == sorted(set(gptq_backend.__all__))
    assert all(hasattr(gptq_backend, name) for name in gptq_backend.__all__)


def test_a_torch_without_distributed_quantizes_in_one_process() -> None:
    code = (
        "import sys, torch; sys.modules['torch.distributed.rendezvous'] = None; "
        "torch.distributed.is_available = lambda: False; del torch.distributed.is_torchelastic_launched; "
        "import gptq_backend; from gptq_backend.distributed import joined\n"
        "with joined('cpu') as (team, place): print(team.size, place)"
    )
    assert python(code) == "1 cpu"
