"""What published models say of their size is not taken for damage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from gptq_transformers.loading.skeleton import check_size


@pytest.mark.parametrize("kind", sorted(CONFIG_MAPPING))
def test_the_number_of_experts_of_a_default_config_is_believed(kind: str) -> None:
    try:
        settings = json.loads(CONFIG_MAPPING[kind]().to_json_string())
    except Exception as error:  # it has no defaults, or needs a package
        pytest.skip(f"{kind} has no default config: {error}")
    many: Any = {f"tensor{i}": None for i in range(1000)}
    check_size(settings, many)
