"""Proves from a model's source that its loop over the layers only calls one after the other:

    for decoder_layer in self.layers[: self.config.num_hidden_layers]:
        hidden_states = decoder_layer(hidden_states, attention_mask=causal_mask, **kwargs)

In such a loop, something that does what all of them do can take their place.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import CodeType, FunctionType
from typing import Any

from .match import NoMatch

_MORE = "the loop over its layers does more than to call them"
_DIFFER = "its layers get arguments that differ"


@dataclass(frozen=True)
class Loop:
    """A loop that was proved to be one.

    Args:
        owner: the class of the model that has the layers.
        name: of the list of layers.
        code: that of the model's ``forward``, with the loop.
        model: what ``forward`` calls the model.
        of_layers: attributes that it reads of each layer, for the layer's arguments.
        of_model: attributes of the model of which it reads, for these, the item with the layer's number.
    """

    owner: type
    name: str
    code: CodeType
    model: str
    of_layers: tuple[str, ...]
    of_model: tuple[str, ...]

    @property
    def reads(self) -> bool:
        """Whether arguments depend on the layer."""
        return bool(self.of_layers or self.of_model)

    def calls_alike(self, model: Any, layers: Sequence[Any]) -> bool:
        """Whether all layers get the same arguments, but for what the one before returned."""
        return all(_alike(list(map(attrgetter(path), layers))) for path in self.of_layers) and all(
            _alike(attrgetter(path)(model)[: len(layers)]) for path in self.of_model
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and who loads a pickle, look at the source again."""
        return loop_or_none, (self.owner, self.name)


def _alike(values: Any) -> bool:
    return isinstance(values, list) and values.count(values[0]) == len(values)


def loop_or_none(owner: type, name: str) -> Loop | None:
    """:func:`find_loop`, or None."""
    try:
        return find_loop(owner, name)
    except NoMatch:
        return None


def find_loop(owner: Any, name: str) -> Loop:
    """The loop of ``owner.forward`` over ``self.<name>``.

    Raises:
        NoMatch: there is none, it does more than to call the layers, or the source cannot be read.
    """
    function = inspect.unwrap(owner.forward)
    tree = _source_of(function)
    loops = [node for node in tree.body if isinstance(node, ast.For) and name in _attributes(node.iter)]
    if len(loops) != 1 or _attributes(tree).count(name) != 1 or not tree.args.args:
        raise NoMatch(f"{owner.__name__}.forward has no single loop over its {name}")
    model = tree.args.args[0].arg
    _check_iterable(loops[0].iter, model, function)
    body = _Body(loops[0], model, tree)
    return Loop(owner, name, function.__code__, model, tuple(body.of_layers), tuple(body.of_model))


def _source_of(function: Any) -> ast.FunctionDef:
    """The syntax tree of ``function``.

    Raises:
        NoMatch: its file does not show the code that runs.
    """
    if not isinstance(function, FunctionType):
        raise NoMatch("its forward is no function")
    try:
        lines, _ = inspect.findsource(function)
        file = ast.parse("".join(lines))
        shown = compile(file, "", "exec", dont_inherit=True)
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise NoMatch(f"the source of its forward cannot be read ({type(error).__name__})") from error
    own = function.__code__
    nodes = [node for node in ast.walk(file) if isinstance(node, ast.FunctionDef)]
    nodes = [node for node in nodes if _first_line(node) == own.co_firstlineno]
    if not nodes or own not in list(_codes(shown)):
        raise NoMatch("the source of its forward is not what runs")
    return nodes[0]


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Those of all that ``code`` defines."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _codes(each)


def _attributes(tree: ast.AST) -> list[str]:
    return [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def _path(node: ast.expr) -> tuple[str, str]:
    """``a.b.c`` -> "a", "b.c"; nothing for something else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return (node.id, ".".join(names)) if isinstance(node, ast.Name) else ("", "")


def _check_iterable(node: ast.expr, model: str, function: Any) -> None:
    """``self.layers``, ``self.layers[...]``, or either of them numbered.

    Raises:
        NoMatch: it is something else.
    """
    own = function.__globals__.get("enumerate", enumerate) is not enumerate
    if isinstance(node, ast.Call) and _path(node.func) == ("enumerate", "") and not own:
        if len(node.args) != 1 or node.keywords:
            raise NoMatch("its forward numbers its layers in a way of its own")
        node = node.args[0]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        node = node.value
    root, path = _path(node)
    if root != model or not path or "." in path:
        raise NoMatch("its forward loops over something else than its layers")


class _Body:
    """What a loop does, which is ``h = layer(h, name=value, ...)``.

    Raises:
        NoMatch: it does more, or a value is neither the same for all layers, nor read of each, nor the item of a list
            with its number.
    """

    def __init__(self, loop: ast.For, model: str, tree: ast.FunctionDef) -> None:
        self.model = model
        self.of_layers: list[str] = []
        self.of_model: list[str] = []
        numbered = isinstance(loop.iter, ast.Call)
        names = loop.target.elts if numbered and isinstance(loop.target, ast.Tuple) else [loop.target]
        targets = [each.id for each in names if isinstance(each, ast.Name)]
        if len(targets) != 1 + numbered or len(names) != len(targets) or loop.orelse or len(loop.body) != 1:
            raise NoMatch(_MORE)
        self.layer, self.number = targets[-1], targets[0] if numbered else ""
        self.result, values = self._call(loop.body[0])
        if len({self.result, model, *targets}) != 2 + len(targets):
            raise NoMatch(_MORE)
        for value in values:
            self._check(value)
        inside = set(map(id, ast.walk(loop)))
        if any(isinstance(n, ast.Name) and n.id in targets and id(n) not in inside for n in ast.walk(tree)):
            raise NoMatch("its forward names a layer outside of the loop")

    def _call(self, statement: ast.stmt) -> tuple[str, list[ast.expr]]:
        """The name of what one layer hands to the next, and the values of the other arguments."""
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=result)],
                value=ast.Call(func=ast.Name(id=self.layer), args=[ast.Name(id=given)], keywords=keywords),
            ) if result == given:
                return result, [keyword.value for keyword in keywords]
        raise NoMatch(_MORE)

    def _check(self, value: ast.expr) -> None:
        root, path = _path(value)
        match value:
            case ast.Constant():
                pass
            case ast.Subscript(value=items, slice=ast.Name(id=self.number)):
                root, path = _path(items)
                if root != self.model or not path:
                    raise NoMatch(_DIFFER)
                self.of_model.append(path)
            case ast.Subscript(value=items, slice=index):
                self._check(items)
                self._check(index)
            case ast.Attribute() if root == self.layer:
                self.of_layers.append(path)
            case ast.Name() | ast.Attribute() if root and root not in (self.layer, self.number, self.result):
                pass
            case _:
                raise NoMatch(_DIFFER)
