"""Which loops over layers are proved from their source to only call them."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_transformers.fused.loop import find_loop
from gptq_transformers.fused.match import NoMatch
from gptq_transformers.fused.stack import LayerList

LOOPS = {
    "plain": "for layer in self.layers:\n    x = layer(x, **kwargs)",
    "numbered": "for i, layer in enumerate(self.layers[:3]):\n    x = layer(x, mask=self.config.masks[i], **kwargs)",
    "read": "for layer in self.layers[1:]:\n    x = layer(x, mask=masks[layer.kind], **kwargs)",
}
OTHER_LOOPS = {
    "two statements": "for layer in self.layers:\n    x = layer(x)\n    states.append(x)",
    "what it gives is changed": "for layer in self.layers:\n    x = layer(x) + x",
    "a part of it": "for layer in self.layers:\n    x = layer(x)[0]",
    "another name": "for layer in self.layers:\n    y = layer(x)",
    "another argument": "for layer in self.layers:\n    x = layer(x, x)",
    "the state again": "for layer in self.layers:\n    x = layer(x, first=x)",
    "the number": "for i, layer in enumerate(self.layers):\n    x = layer(x, number=i)",
    "a function of the layer": "for layer in self.layers:\n    x = layer(x, mask=f(layer))",
    "an item of something else": "for i, layer in enumerate(self.layers):\n    x = layer(x, mask=masks[i])",
    "else": "for layer in self.layers:\n    x = layer(x)\nelse:\n    x = x + 1",
    "the last layer afterwards": "for layer in self.layers:\n    x = layer(x)\nx = x * layer.scale",
    "twice": "for layer in self.layers:\n    x = layer(x)\nfor layer in self.layers:\n    x = layer(x)",
    "the first alone": "x = self.layers[0](x)\nfor layer in self.layers[1:]:\n    x = layer(x)",
    "backwards": "for layer in reversed(self.layers):\n    x = layer(x)",
    "in a condition": "if flag:\n    for layer in self.layers:\n        x = layer(x)",
    "not a loop": "x = self.layers(x)",
    "another model": "self = self.inner\nfor layer in self.layers:\n    x = layer(x)",
    "the model in an import": "import f as self\nfor layer in self.layers:\n    x = layer(x)",
    "variables by name": "for layer in self.layers:\n    x = layer(x)\nx = x * locals()['layer'].scale",
    "layers by name": "for layer in getattr(self, 'layers'):\n    x = layer(x)\nself.layers",
    "layers by another way": "x = self._modules['layers'][0](x)\nfor layer in self.layers:\n    x = layer(x)",
    "a global": "global layer\nfor layer in self.layers:\n    x = layer(x)",
    "a state of the model": "for layer in self.layers:\n    x = layer(x, state=self.state)",
    "a state of something else": "for layer in self.layers:\n    x = layer(x, state=states.last)",
    "a global variable": "for layer in self.layers:\n    x = layer(x, state=STATE)",
    "numbers of its own": "enumerate = f\nfor i, layer in enumerate(self.layers):\n    x = layer(x)",
}


def made(folder: Path, body: str, variable: str = "") -> Any:
    """A class with such a loop, from a file; with a variable, it is made in a function that has it as an argument."""
    lines = ["class Model:", "    def forward(self, x, states=None, flag=True, masks=None, f=None, **kwargs):"]
    lines += [f"        {line}" for line in [*body.splitlines(), "return x"]]
    if variable:
        lines = [f"def make({variable}):", *(f"    {line}" for line in lines), "    return Model", "Model = make(None)"]
    path = folder / "made.py"
    path.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location(f"made_{abs(hash(body))}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    inspect.linecache.checkcache(str(path))
    return module.Model


@pytest.mark.parametrize("name", LOOPS)
def test_loops_that_only_call_layers_are_proved(name: str, tmp_path: Path) -> None:
    loop = find_loop(made(tmp_path, LOOPS[name]), "layers")
    assert (loop.of_layers, loop.of_model) == {"numbered": ((), ("config.masks",)), "read": (("kind",), ())}.get(
        name, ((), ())
    )


@pytest.mark.parametrize("name", OTHER_LOOPS)
def test_loops_that_do_more_are_not(name: str, tmp_path: Path) -> None:
    with pytest.raises(NoMatch):
        find_loop(made(tmp_path, OTHER_LOOPS[name]), "layers")


def test_numbers_of_another_function_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(NoMatch, match="numbers its layers in a way of its own"):
        find_loop(made(tmp_path, LOOPS["numbered"], "enumerate"), "layers")


@pytest.mark.parametrize("masks", [{0: 2.0, 1: 3.0}, [torch.full((3,), 2.0), torch.full((3,), 3.0)], (2.0, 3.0), [2.0]])
@pytest.mark.parametrize("value", ["self.config.masks[i]", "layer.mask"])
def test_arguments_of_any_kind_that_differ_reach_their_layers(value: str, masks: Any, tmp_path: Path) -> None:
    class Times(nn.Module):
        def forward(self, x: Tensor, mask: Any) -> Tensor:
            return x * mask

    kind = made(tmp_path, f"for i, layer in enumerate(self.layers):\n    x = layer(x, mask={value})")
    model, results = kind(), list[Any]()
    for layers in (nn.ModuleList([Times(), Times()]), LayerList([Times(), Times()])):
        for i in range(len(masks)):
            layers[i].mask = masks[i]
        vars(layers)["_loop"] = find_loop(kind, "layers")
        model.layers, model.config = layers, SimpleNamespace(masks=masks)
        with torch.no_grad():
            try:
                results.append(model.forward(torch.ones(3)))
            except (AttributeError, IndexError) as error:  # one mask is missing
                results.append(type(error))
    assert results[0] is results[1] or torch.equal(*results)


def test_code_that_its_file_does_not_show_is_not_proved(tmp_path: Path) -> None:
    model = made(tmp_path, LOOPS["plain"])
    made(tmp_path, "\n" + LOOPS["plain"].replace("layer(x", "layer(x, a=1"))
    with pytest.raises(NoMatch, match="not what runs"):
        find_loop(model, "layers")
    model.forward = eval("lambda self, x: x")
    with pytest.raises(NoMatch):
        find_loop(model, "layers")
