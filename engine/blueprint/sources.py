"""Run files of the installed transformers by themselves, with stand-ins for what they import.

Nothing enters `sys.modules`, and nothing of a checkpoint runs: a config is data, and the code is
that of the library which would load the model.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar  # noqa: F401  (dataclasses looks for them in here)
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar  # noqa: F401

from engine.blueprint import stand_ins
from engine.blueprint.stand_ins import Anything, Module, Stub

SHARED = frozenset(
    {
        "activations",
        "configuration_utils",
        "integrations.heterogeneity",
        "integrations.heterogeneity.configuration_utils",
        "modeling_layers",
        "modeling_rope_utils",
        "pytorch_utils",
    }
)
"""Files of transformers, beside those of its models, that decide what a model is made of."""

REAL = frozenset(sys.stdlib_module_names) | {"packaging", "typing_extensions"}
"""Modules that are what they are."""

_AUTO = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


def root() -> Path:
    """Return the folder of the installed transformers.

    Raises:
        LookupError: when it is not installed.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise LookupError("transformers is not installed")
    return Path(spec.submodule_search_locations[0])


@cache
def table(name: str) -> Mapping[str, Any]:
    """Return one of the tables by which transformers finds its classes: model type → name.

    Raises:
        LookupError: when there is no such table.
    """
    for file in ("auto_mappings.py", "modeling_auto.py"):
        text = (root() / "models" / "auto" / file).read_text("utf-8")
        found = re.search(rf"^{name} = OrderedDict\(\n(.*?)^\)", text, re.MULTILINE | re.DOTALL)
        if found:
            return dict(ast.literal_eval(found[1].strip()))
    raise LookupError(f"transformers has no {name}")


def folder(model_type: str) -> Path:
    """Return where the code of a model type is.

    Raises:
        LookupError: when transformers does not know it.
    """
    if model_type not in table("CONFIG_MAPPING_NAMES"):
        raise LookupError(f"transformers does not know {model_type}")
    special = table("SPECIAL_MODEL_TYPE_TO_MODULE_NAME").get(model_type)
    return root() / "models" / (special or model_type.replace("-", "_"))


@cache
def config_class(model_type: str) -> Any:
    """Return the config class of a model type, made with stand-ins."""
    return _class(table("CONFIG_MAPPING_NAMES")[model_type], folder(model_type), "configuration_")


def model_class(model_type: str, auto: str = "AutoModelForCausalLM") -> Any:
    """Return the class that `auto` makes for a model type, made with stand-ins."""
    names = table(_AUTO[auto])[model_type]
    name = names[0] if isinstance(names, tuple) else names
    return _class(name, folder(model_type), "modeling_")


def _class(name: str, home: Path, prefix: str) -> Any:
    """Return a class of a folder, or of another where a model type has the classes of another."""
    for file in sorted(home.glob(f"{prefix}*.py")):
        found = vars(_module(f"transformers.models.{home.name}.{file.stem}")).get(name)
        if found is not None:
            return found
    defines = re.compile(rf"^class {name}\(", re.MULTILINE)
    for file in sorted(home.parent.glob(f"*/{prefix}*.py")):
        if defines.search(file.read_text("utf-8")):
            return vars(_module(f"transformers.models.{file.parent.name}.{file.stem}"))[name]
    raise LookupError(f"transformers has no {name}")


class PreTrainedModel(Module):
    """What transformers' class of that name does for those that inherit from it."""

    config_class: Any = None
    base_model_prefix = ""
    _tied_weights_keys: Any = None

    def __init_subclass__(cls, **_: Any) -> None:
        stated = vars(cls).get("__annotations__", {}).get("config")
        made = vars(sys.modules[__name__])["_running"]
        if stated and "config_class" not in vars(cls):
            cls.config_class = made[-1].get(stated.strip("\"'"), cls.config_class)

    def __init__(self, config: Any = None, *_: Any, **__: Any) -> None:
        self.config = config
        self.generation_config = Anything()
        if getattr(config, "_attn_implementation", None) is None:
            config._attn_implementation = "eager"  # the names of parameters are the same for all

    @classmethod
    def _from_config(cls, config: Any, **_: Any) -> Any:
        return cls(config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def get_input_embeddings(self) -> Any:
        """Return the first embedding."""
        found = (each for each in self.modules() if isinstance(each, stand_ins.Embedding))
        return next(found, Anything())


_running: list[dict[str, Any]] = []
"""Names of the files that are being run, the innermost last."""


def _auto_class(name: str) -> type:
    def from_config(config: Any, **_: Any) -> Any:
        return model_class(config.model_type, name)(config)

    return type(name, (), {"from_config": staticmethod(from_config)})


class _ConfigClasses:
    """Stand for CONFIG_MAPPING."""

    def __getitem__(self, model_type: str) -> Any:
        return config_class(model_type)

    def __contains__(self, model_type: str) -> bool:
        return model_type in table("CONFIG_MAPPING_NAMES")

    def get(self, model_type: str, default: Any = None) -> Any:
        """Return the config class of a model type."""
        return self[model_type] if model_type in table("CONFIG_MAPPING_NAMES") else default


def _stubs() -> dict[str, ModuleType]:
    """Return the modules of transformers whose names mean something, with as much as is needed."""
    makes_config = staticmethod(lambda model_type, **given: config_class(model_type)(**given))
    auto = Stub(
        "auto",
        AutoConfig=type("AutoConfig", (), {"for_model": makes_config}),
        CONFIG_MAPPING=_ConfigClasses(),
        **{name: _auto_class(name) for name in _AUTO},
    )
    mixin = type("PushToHubMixin", (), {"push_to_hub": None})
    generation = type(
        "GenerationConfig", (), {"_get_default_generation_params": staticmethod(dict)}
    )
    named = {
        "": Stub("transformers", __version__=""),
        "generation": Stub("generation", GenerationMixin=type("GenerationMixin", (), {})),
        "generation.configuration_utils": Stub("generation", GenerationConfig=generation),
        "integrations": Stub(
            "integrations", use_kernelized_func=lambda *_, **__: lambda kind: kind
        ),
        "modeling_utils": Stub("modeling_utils", PreTrainedModel=PreTrainedModel),
        "utils": Stub(
            "utils", is_torch_available=lambda: True, torch_int=int, PushToHubMixin=mixin
        ),
        "utils.generic": Stub("generic", is_timm_config_dict=lambda config: False),
        "utils.type_validators": Stub("type_validators", interval=lambda **_: _default),
        **{
            f"models.auto{file}": auto
            for file in ("", ".modeling_auto", ".configuration_auto", ".auto_factory")
        },
    }
    return {f"transformers.{name}".rstrip("."): module for name, module in named.items()}


def _default(default: Any = None, **_: Any) -> Any:
    """Return what a checked field of a config starts with."""
    return default


_modules = _stubs()


def _import(
    name: str,
    names: Mapping[str, Any] | None = None,
    local_names: Mapping[str, Any] | None = None,
    wanted: Any = (),
    level: int = 0,
) -> Any:
    """Take the place of `__import__` in the files that are run."""
    if level:
        package = str((names or {})["__package__"]).split(".")
        name = ".".join([*package[: len(package) - level + 1], *filter(None, [name])])
    top = name.partition(".")[0]
    if top in REAL:
        return __import__(name, names, local_names, wanted)
    module = _module(name)
    for part in wanted or ():
        if name.startswith("transformers.models.") and _file(f"{name}.{part}"):
            vars(module).setdefault(part, _module(f"{name}.{part}"))
    return module if wanted or level else _module(top)


def _module(name: str) -> ModuleType:
    """Return a module: run from its file, a stand-in for torch's, or one without meaning."""
    if name.partition(".")[0] == "torch":
        found: Any = stand_ins.torch
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        return found if isinstance(found, ModuleType) else Stub(name)
    if name not in _modules:
        file = _file(name)
        _modules[name] = Stub(name) if file is None else _run(name, file)
    return _modules[name]


def _file(name: str) -> Path | None:
    """Return the file of a module that is to be run, if it is one."""
    inside = name.removeprefix("transformers.")
    last = name.rpartition(".")[2]
    of_model = inside.startswith("models.") and last.startswith(("modeling_", "configuration_"))
    if not of_model and inside not in SHARED:
        return None
    path = root().joinpath(*inside.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _run(name: str, file: Path) -> ModuleType:
    module = _modules[name] = ModuleType(name)
    names = vars(module)
    names |= {
        # dataclasses looks the module of a class up, for what its annotations mean.
        "__name__": __name__,
        "__package__": name if file.name == "__init__.py" else name.rpartition(".")[0],
        "__builtins__": {**vars(builtins), "__import__": _import},
    }
    # Annotations stay text: stand-ins for types cannot be combined.
    flags = __future__.annotations.compiler_flag
    code = compile(file.read_text("utf-8"), str(file), "exec", flags=flags, dont_inherit=True)
    _running.append(names)
    try:
        exec(code, names)
    except BaseException:
        del _modules[name]
        raise
    finally:
        _running.pop()
    return module
