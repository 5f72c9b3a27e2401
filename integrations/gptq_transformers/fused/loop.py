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
# With these, code does to names what its syntax tree does not show.
_OPAQUE = frozenset(("delattr", "eval", "exec", "getattr", "globals", "locals", "setattr", "vars"))
_VALUES = str, int, float, bool, type(None)  # that are equal where they compare as equal


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
        """Whether all layers get the same arguments, but for what the one before returned.

        Where that cannot be read, it is False, and the loop meets the error itself, if it is one.
        """
        try:
            values = [list(map(attrgetter(path), layers)) for path in self.of_layers]
            values += [attrgetter(path)(model)[: len(layers)] for path in self.of_model]
        except Exception:
            return False
        return all(isinstance(each, list) and len(each) == len(layers) and _alike(each) for each in values)

    def __reduce__(self) -> tuple[Any, ...]:
        """Who loads a pickle looks at the source again."""
        return loop_or_none, (self.owner, self.name)

    def __deepcopy__(self, _: dict[int, Any]) -> Loop:
        return self


def _alike(values: list[Any]) -> bool:
    first = values[0]
    if type(first) in _VALUES:
        return all(type(each) is type(first) and each == first for each in values)
    return all(each is first for each in values)


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
    _check_names(tree, model, name)
    _check_iterable(loops[0].iter, model, function)
    body = _Body(loops[0], model, tree, _locals(function.__code__))
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


def _check_names(tree: ast.FunctionDef, model: str, layers: str) -> None:
    """Names mean what they seem to.

    Raises:
        NoMatch: the model's gets another meaning, or code may reach variables or the layers in other ways.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Global() | ast.Nonlocal():
                raise NoMatch("its forward sets variables of other functions")
            case ast.Name(id=name) if name in _OPAQUE:
                raise NoMatch(f"its forward uses {name}")
            case ast.Constant(value=str(value)) if value == layers:
                raise NoMatch(f"its forward may reach its {layers} by their name")
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if name == model:
                raise NoMatch(f"its forward sets {model}")
            case _ if model in (getattr(node, field, None) for field in ("name", "asname", "rest")):
                raise NoMatch(f"its forward sets {model}")


def _locals(code: CodeType) -> set[str]:
    return {*code.co_varnames, *code.co_cellvars}


def _check_iterable(node: ast.expr, model: str, function: Any) -> None:
    """``self.layers``, ``self.layers[...]``, or either of them numbered.

    Raises:
        NoMatch: it is something else.
    """
    code, known = function.__code__, function.__globals__.get("enumerate", enumerate)
    own = known is not enumerate or "enumerate" in {*_locals(code), *code.co_freevars}
    if isinstance(node, ast.Call) and _path(node.func) == ("enumerate", ""):
        if own or len(node.args) != 1 or node.keywords:
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
        NoMatch: it does more, or a value is none of these, which no layer can change: a local variable, something of
            the model's ``config``, what is read of each layer, the item of a list in ``config`` with its number.
    """

    def __init__(self, loop: ast.For, model: str, tree: ast.FunctionDef, known: set[str]) -> None:
        self.model, self.known = model, known
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
                if not self._is_of_config(root, path):
                    raise NoMatch(_DIFFER)
                self.of_model.append(path)
            case ast.Subscript(value=items, slice=index):
                self._check(items)
                self._check(index)
            case ast.Attribute() if root == self.layer:
                self.of_layers.append(path)
            case ast.Attribute() if self._is_of_config(root, path):
                pass
            case ast.Name() if root in self.known - {self.layer, self.number, self.result}:
                pass
            case _:
                raise NoMatch(_DIFFER)

    def _is_of_config(self, root: str, path: str) -> bool:
        return root == self.model and path.startswith("config.")
