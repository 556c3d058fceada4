"""What the source of the installed transformers says about a model type, read as text.

Importing transformers takes seconds; `engine check` has one. Where the source is not as expected,
nothing is known, and callers go by config.json alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from engine.blueprint import sources


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
        return Family(
            known=True,
            causal=model_type in sources.table("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
            fields=frozenset(kind.__dataclass_fields__) | frozenset(kind.attribute_map),
            config_code="\n".join(path.read_text("utf-8") for path in config_files),
            model_code="\n".join(path.read_text("utf-8") for path in model_files),
        )
    except (OSError, LookupError):
        return Family()
