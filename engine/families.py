"""What the source of the installed transformers says about a model type, read as text.

Importing transformers takes seconds; `engine check` has one. Where the source is not as expected,
nothing is known, and callers go by config.json alone.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type of transformers."""

    known: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of the fields of its config class."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Usual name of a field → its name here."""
    config_code: str = ""
    """Source of its config class, with double quotes."""
    model_code: str = ""
    """Source of its modeling files."""
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    """What its config class takes for rotary positions where config.json is silent."""

    @property
    def traits(self) -> frozenset[str]:
        """Return what its code can do, whatever a config chooses."""
        signs = {
            "model.sdpa": r"^    _supports_sdpa = True",
            "model.flex": r"^    _supports_flex_attn = True",
            "model.flash": r"^    _supports_flash_attn = True",
            "model.attention_interface": r"ALL_ATTENTION_FUNCTIONS\.get_interface\(",
            "model.rope": r"ROPE_INIT_FUNCTIONS",
            "model.alibi_by_mask": r"def build_alibi_tensor\(attention_mask",
            "model.sinks": r"self\.sinks = ",
            "model.split_kv": r"self\.k_proj = .*self\.v_proj = ",
        }
        found = {
            trait
            for trait, sign in signs.items()
            if re.search(sign, self.model_code, re.MULTILINE | re.DOTALL)
        }
        named = {*self.defaults, *self.renamed}
        found |= {"model.kv_heads"} if "num_key_value_heads" in named else set()
        # Phi-3 and its kin read yarn as another word for longrope.
        found |= {"model.longrope"} if 'in ["su", "yarn"]' in self.config_code else set()
        return frozenset(found | ({"model.known"} if self.known else set()))

    @property
    def partial_rotary_factor(self) -> float:
        """Return what part of a head its code rotates where config.json is silent."""
        sign = r'"partial_rotary_factor", (?:kwargs\.pop\("rotary_pct", )?([\d.]+)\)'
        found = re.search(sign, self.config_code)
        return float(found[1]) if found else 1.0


@cache
def family(model_type: str) -> Family:
    """Read the source of the installed transformers; know nothing where that cannot be."""
    try:
        models = _transformers() / "models"
        names = _mappings(models / "auto" / "auto_mappings.py")
        class_name = names["CONFIG_MAPPING_NAMES"][model_type]
        modules = names["SPECIAL_MODEL_TYPE_TO_MODULE_NAME"]
        folder = models / modules.get(model_type, model_type.replace("-", "_"))
        files = sorted(folder.glob("configuration_*.py"))
        classes = {name: node for path in files for name, node in _classes(path)}
        model_files = sorted(folder.glob("modeling_*.py"))
        return Family(
            known=True,
            defaults=_defaults(class_name, classes),
            renamed=_renamed(classes[class_name]),
            config_code=ast.unparse(classes[class_name]).replace("'", '"'),
            model_code="\n".join(path.read_text("utf-8") for path in model_files),
            rope_parameters=_rope_parameters(classes[class_name]),
        )
    except (OSError, LookupError, StopIteration, SyntaxError, ValueError):
        return Family()


def _transformers() -> Path:
    spec = importlib.util.find_spec("transformers")
    return Path(next(iter((spec and spec.submodule_search_locations) or [])))


@cache
def _mappings(path: Path) -> dict[str, dict[str, str]]:
    """Return the name tables of transformers, by the name of the variable."""
    found = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(args=[ast.List() as pairs])
            ):
                if name in ("CONFIG_MAPPING_NAMES", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"):
                    found[name] = dict(ast.literal_eval(pairs))
    return found


def _classes(path: Path) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name, node


def _defaults(name: str, classes: Mapping[str, ast.ClassDef]) -> dict[str, Any]:
    """Return the values that a config class gives its fields, its bases' included."""
    if name not in classes:
        return {}
    found: dict[str, Any] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name):
            found |= _defaults(base.id, classes)
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = _literal(node.value)
    return found


def _renamed(config_class: ast.ClassDef) -> dict[str, str]:
    for node in config_class.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="attribute_map")], value=ast.Dict() as names):
                return dict(ast.literal_eval(names))
    return {}


def _rope_parameters(config_class: ast.ClassDef) -> dict[str, Any]:
    """Return the first mapping in a class that looks as if it told of rotary positions."""
    nodes = ast.walk(config_class)
    found = [_entries(node) for node in nodes if isinstance(node, ast.Dict)]
    marks = ("rope_type", "type", "full_attention")
    return next((each for each in found if any(mark in each for mark in marks)), {})


def _entries(node: ast.Dict) -> dict[str, Any]:
    """Return a mapping as far as it is written out in the source, mappings inside included."""
    return {
        str(key.value): _entries(value) if isinstance(value, ast.Dict) else _literal(value)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant)
    }


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal or a product of literals; None for anything else."""
    match node:
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = (_literal(left), _literal(right))
            return factors[0] * factors[1] if None not in factors else None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
