"""``checkpoint_format``, the label of a file, says how its codes lie; nothing else of the settings does."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_backend import CheckpointError, QuantizeConfig
from tests.format.test_layer_specs import GROUP, layer, named, specs, write


def test_the_planes_of_gptq_p_are_told_from_a_stream(tmp_path: Path) -> None:
    write(tmp_path, named("a", layer(3)) | named("b", layer(4)))
    found = specs(tmp_path, QuantizeConfig(bits=3, group_size=GROUP, checkpoint_format="gptq_p"))
    assert (found["a"].planar, found["b"].planar) == (True, False)
    assert found["a"].zero_offset == 0


def test_a_rule_without_a_layer_does_not_change_how_a_file_is_read(tmp_path: Path) -> None:
    write(tmp_path, named("a", layer(3)))
    source = {"bits": 3, "group_size": GROUP, "checkpoint_format": "gptq", "dynamic": {"nosuch": {"bits": 5}}}
    found = specs(tmp_path, QuantizeConfig.from_dict(source))["a"]
    assert (found.bits, found.planar, found.zero_offset) == (3, False, 1)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_codes_that_the_label_does_not_have_are_refused(checkpoint_format: str, tmp_path: Path) -> None:
    write(tmp_path, named("a", layer(5, outputs=64)))
    with pytest.raises(CheckpointError, match=rf"a has 5-bit codes, which .*'{checkpoint_format}' cannot .*'gptq_p'"):
        specs(tmp_path, QuantizeConfig(bits=5, group_size=GROUP, checkpoint_format=checkpoint_format))
