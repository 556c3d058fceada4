"""Which kind of layer each tensor of a checkpoint belongs to, read from the source of its model.

As text: `engine check` has no time to import transformers. Nothing is known of models whose code
comes with the checkpoint.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from engine.families import family

HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the classes end that `AutoModelForCausalLM` makes."""

LINEAR = ("Linear", "Conv1D")
"""Layers that multiply by a matrix; Conv1D, of GPT-2, stores it the other way around."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor belongs."""

    module: str
    """As the model names it, if `exact`; as the checkpoint does, otherwise."""
    kind: str
    """Class of the module: 'Linear', 'Conv1D', 'Embedding', 'FalconLinear', …"""
    linear: bool
    """Whether it multiplies by a matrix, subclasses of `Linear` included."""
    head: bool
    """Whether it is the output layer, which gives the logits."""
    exact: bool


@cache
def source(model_type: str) -> Source:
    """Read the code of a model type once."""
    return Source(family(model_type).model_code)


@dataclass
class Source:
    """The classes in a model's code, and what modules each of them makes."""

    code: str
    _children: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)

    @cached_property
    def classes(self) -> Mapping[str, ast.ClassDef]:
        """Return every class by name."""
        try:
            body = ast.parse(self.code).body
        except SyntaxError:
            return {}
        return {node.name: node for node in body if isinstance(node, ast.ClassDef)}

    @cached_property
    def prefix(self) -> str:
        """Return what precedes the names of the model below its head: 'model.', 'transformer.'."""
        found = re.search(r'^    base_model_prefix = "(\w+)"', self.code, re.MULTILINE)
        return f"{found[1]}." if found else ""

    @cached_property
    def tops(self) -> tuple[str, ...]:
        """Return the classes with a head."""
        return tuple(name for name in self.classes if name.endswith(HEADS))

    def listed(self, name: str) -> frozenset[str]:
        """Return the words in a list that a class states under `name`, of all classes together."""
        found: set[str] = set()
        for node in self.classes.values():
            for line in node.body:
                match line:
                    case ast.Assign(targets=[ast.Name(id=stated)], value=value) if stated == name:
                        found |= {
                            each.value
                            for each in ast.walk(value)
                            if isinstance(each, ast.Constant) and isinstance(each.value, str)
                        }
        return frozenset(found)

    def place(self, tensor: str) -> Place | None:
        """Return where a tensor of the checkpoint goes; None where the code has no such place.

        Checkpoints leave prefixes out, or have others. What is below them is then looked for in
        all classes, by two names at least: one alone may mean several things.
        """
        parts = [part for part in tensor.split(".") if not part.isdigit()]
        module = tensor.rpartition(".")[0]
        for top in self.tops:
            if kind := self._follow(top, parts):
                head = len(parts) == 2 and self.is_linear(kind)
                return self._place(module, kind, head=head, exact=True)
        for dropped in range(max(len(parts) - 2, 1)):
            for name in self.classes:
                if kind := self._follow(name, parts[dropped:]):
                    module = module if dropped else self.prefix + module
                    return self._place(module, kind, head=False, exact=not dropped)
        return None

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Return the classes of all linear layers below a head."""
        found: set[str] = set()
        seen: set[str] = set()
        ahead = [kind for top in self.tops for kind in self._below(top) if not self.is_linear(kind)]
        while ahead:
            name = ahead.pop()
            if name in seen:
                continue
            seen.add(name)
            if self.is_linear(name):
                found.add(name)
            elif name in self.classes:
                ahead += self._below(name)
        return frozenset(found)

    def is_linear(self, kind: str) -> bool:
        """Tell whether a class multiplies by a matrix."""
        return kind in LINEAR or any(self.is_linear(base) for base in self._bases(kind))

    def _place(self, module: str, kind: str, *, head: bool, exact: bool) -> Place:
        linear = self.is_linear(kind)
        return Place(module=module, kind=kind, linear=linear, head=head, exact=exact)

    def _follow(self, kind: str, parts: list[str]) -> str:
        """Return the class at the end of a path of attributes, whose last is a parameter, or ''."""
        if kind not in self.classes:  # of torch or of transformers
            return kind if len(parts) == 1 and kind != "Parameter" else ""
        made = self._made(kind)
        if parts[0] not in made:
            inherits = any(base not in self.classes for base in self._bases(kind))
            return kind if len(parts) == 1 and inherits and self.is_linear(kind) else ""
        if len(parts) == 1:
            return kind
        ends = (self._follow(each, parts[1:]) for each in made[parts[0]])
        return next((end for end in ends if end), "")

    def _below(self, kind: str) -> Iterator[str]:
        for made in self._made(kind).values():
            yield from made

    def _made(self, kind: str) -> dict[str, tuple[str, ...]]:
        """Return, for each attribute of a class, the classes that its value is made with."""
        if kind not in self._children:
            self._children[kind] = {}  # against classes that inherit from themselves
            found: dict[str, tuple[str, ...]] = {}
            for base in self._bases(kind):
                found |= self._made(base)
            own: dict[str, tuple[str, ...]] = {}
            for node in ast.walk(self.classes[kind]) if kind in self.classes else ():
                match node:
                    case ast.Assign(targets=[target], value=value):
                        pass
                    case ast.AnnAssign(target=target, value=ast.expr() as value):
                        pass
                    case _:
                        continue
                match target:
                    case ast.Attribute(value=ast.Name(id="self"), attr=name):
                        own[name] = (*own.get(name, ()), *self._called(value))
            self._children[kind] = found | own
        return self._children[kind]

    def _called(self, value: ast.expr) -> Iterator[str]:
        """Yield the classes that an expression calls; by a table's name, all in the table."""
        for node in ast.walk(value):
            match node:
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                    if name[:1].isupper():
                        yield name
                case ast.Call(func=ast.Subscript(value=ast.Name(id=name))):
                    yield from self._tables.get(name, ())

    @cached_property
    def _tables(self) -> Mapping[str, tuple[str, ...]]:
        return {
            target.id: tuple(each.id for each in values if isinstance(each, ast.Name))
            for node in ast.parse(self.code).body
            if isinstance(node, ast.Assign)
            for target, values in _tables(node)
        }

    def _bases(self, kind: str) -> Iterator[str]:
        for base in self.classes[kind].bases if kind in self.classes else ():
            match base:
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    yield name


def _tables(node: ast.Assign) -> Iterable[tuple[ast.Name, list[ast.expr]]]:
    match node:
        case ast.Assign(targets=[ast.Name() as target], value=ast.Dict(values=values)):
            yield target, values
