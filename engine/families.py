"""What the source of the installed transformers says about a model type, read as text.

Importing transformers takes seconds; `engine check` has one. Where the source is not as expected,
nothing is known, and callers go by config.json alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from engine.blueprint import sources

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
"""What the base class of all configs reads for those that have rotary positions."""

_READ = r"config(?:\.\w+)*\.{0}\b|getattr\(\s*(?:\w+\.)*\w*config,\s*['\"]{0}['\"]"
_MAPPED = (
    r"\bself\.{0}\b(?!\s*=[^=])|getattr\(\s*self,\s*['\"]{0}['\"]|kwargs\.\w+\(\s*['\"]{0}['\"]"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type of transformers."""

    known: bool = False
    causal: bool = False
    """Whether it has a model that continues text (AutoModelForCausalLM)."""
    fields: frozenset[str] = frozenset()
    """Names that its config class has, its own and the usual ones."""
    config_code: str = ""
    """Source of its config files."""
    model_code: str = ""
    """Source of its modeling files."""
    takes_cache: bool = True
    """Whether its causal model can be given a cache of transformers, by either of its two names."""

    @property
    def stateful(self) -> bool:
        """Tell whether its code says that generation cannot take tokens back."""
        return bool(re.search(r"^    _is_stateful = True", self.model_code, re.MULTILINE))

    @property
    def cached_states(self) -> frozenset[str]:
        """Return the kinds of states that its layers write into a cache: 'conv', 'recurrent'."""
        return frozenset(re.findall(r"\.update_(conv|recurrent)_state\(", self.model_code))

    def reads(self, name: str, inside: str = "") -> bool:
        """Tell whether its code reads a key of config.json; unknown code may read all of them.

        Args:
            inside: only classes of the model whose names have this in them.
        """
        if not self.known:
            return True
        if inside:
            classes = re.split(r"^class ", self.model_code, flags=re.MULTILINE)
            code = "".join(each for each in classes if inside in each.partition("(")[0])
            return bool(re.search(_READ.format(name), code))
        mapped = name in ROPE_KEYS and "rope_parameters" in self.fields
        return (
            mapped
            or name in self.fields
            or bool(re.search(_READ.format(name), self.model_code))
            or bool(re.search(_MAPPED.format(name), self.config_code))
        )

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
            "model.bias_by_mask": r"past_key_values\.get_mask_sizes\(.*position_bias=position_bias",
            "model.sinks": r"self\.sinks = ",
            "model.split_kv": r"self\.k_proj = .*self\.v_proj = ",
        }
        found = {
            trait
            for trait, sign in signs.items()
            if re.search(sign, self.model_code, re.MULTILINE | re.DOTALL)
        }
        # Attention from outside knows neither a model's own biases nor keys beside the cache's.
        if re.search(r"^    _layer_type = |position_bias=position_bias", self.model_code, re.M):
            found.discard("model.attention_interface")
        found |= {"model.kv_heads"} if "num_key_value_heads" in self.fields else set()
        # Phi-3 and its kin read yarn as another word for longrope.
        found |= {"model.longrope"} if 'in ["su", "yarn"]' in self.config_code else set()
        return frozenset(found | ({"model.known"} if self.known else set()))


@cache
def family(model_type: str) -> Family:
    """Read the source of the installed transformers; know nothing where that cannot be."""
    try:
        home = sources.folder(model_type)
        kind = sources.config_class(model_type)
        model_files = sorted(home.glob("modeling_*.py"))
        config_files = sorted(home.glob("configuration_*.py"))
        model_code = "\n".join(path.read_text("utf-8") for path in model_files)
        causal = sources.table("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES").get(model_type, ())
        return Family(
            known=True,
            causal=bool(causal),
            fields=frozenset(
                [*kind.__dataclass_fields__, *kind.attribute_map, *kind.attribute_map.values()]
            ),
            config_code="\n".join(path.read_text("utf-8") for path in config_files),
            model_code=model_code,
            takes_cache=all(_takes_cache(model_code, name) for name in _names(causal)),
        )
    except (OSError, LookupError):
        return Family()


def _names(classes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classes,) if isinstance(classes, str) else classes


def _takes_cache(code: str, name: str) -> bool:
    """Tell whether the forward of a class takes a cache; what is not found is taken to."""
    body = re.search(rf"^class {name}\((.*?)(?=^class |\Z)", code, re.MULTILINE | re.DOTALL)
    takes = body and re.search(r"^    def forward\((.*?)\)(?: ->.*?)?:$", body[1], re.M | re.S)
    return takes is None or bool(re.search(r"\b(past_key_values|cache_params):", takes[1]))
