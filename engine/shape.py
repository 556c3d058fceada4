"""What config.json tells about a model, without torch.

Families name the same things differently, and leave out what their config class knows: that comes
from `engine.families`. What neither tells counts as unknown.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeGuard

from engine.blueprint import drawing
from engine.blueprint.drawing import Blueprint, Weight
from engine.config_keys import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    TEXT_CONFIGS,
    VOCABULARY,
    as_taken,
    stray,
    text_part,
    without,
)
from engine.errors import CheckpointError, Problem
from engine.families import family

MOST_LAYERS = 10_000
"""More than any model has; a count beyond is a mistake, and a list as long takes minutes."""

MOST_POSITIONS = 10**9
"""More than any model has."""

LONGEST = ("model_max_length", "max_sequence_length")
"""What some configs state beside that: the longest text, once rotary positions are stretched."""

ORIGINAL = "original_max_position_embeddings"

STRETCHED = frozenset({"linear", "dynamic", "yarn", "llama3", "longrope", "su"})
"""Kinds of rotary positions that reach `factor` times as far as those that were trained first."""
UP_TO = frozenset({"llama3", "longrope", "su"})
"""Those of which a config states how far the model was then trained, which may be less."""

WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "recurrent", "moe", "mlp"})
"""Layer types that attend to no keys."""

WITHOUT_KEYS = WITHOUT_ATTENTION | {"dummy"}
"""Layer types that keep no keys and values per token."""

RECURRENT = frozenset({"linear_attention", "conv", "recurrent", "hybrid", "hybrid_sliding"})
"""Layer types that keep a state, in place of keys and values or beside them."""

WINDOWED = frozenset({"sliding_attention", "chunked_attention", "hybrid_sliding"})

USUAL = RECURRENT | WINDOWED | WITHOUT_KEYS | {"full_attention", "indexed_attention"}
"""Layer types that transformers' caches know by themselves; others are a family's own."""

UNQUANTIZED = re.compile(r"embed|\.wte\.|\.wpe\.|lm_head|output_layer|experts|norm|ln_|vision")
"""What is no linear layer, or the last one, in models whose code is not known."""

LEGACY_LAYER_TYPES = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
}


@dataclass(frozen=True)
class TensorSize:
    """A tensor in a checkpoint, as its header describes it."""

    dtype: str
    """As in the safetensors header: 'BF16', 'F32', …"""
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes and abilities of a model; of its text part, where it has several parts."""

    model_type: str
    architecture: str
    """First of `architectures`, or ''."""
    layers: int
    hidden_size: int
    heads: int
    """Query heads; 0 in a model without attention."""
    kv_heads: int
    head_dim: int
    """Of queries and keys."""
    vocab_size: int
    max_positions: int | None
    """Tokens that the model was made for; None where its code sets no limit."""
    stated_positions: int | None = None
    """What config.json states of them, before rotary positions are stretched."""
    position: str
    """'rope', 'learned', 'alibi', 'sinusoidal' or 'none'."""
    rope_type: str = ""
    """How rotary positions are scaled: 'linear', 'yarn', …; 'default' where they are not."""
    rope_parameters: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Of rotary positions, as config.json has them: one mapping, or one per type of layer."""
    rotary_dim: int = 0
    """Numbers of a head that are rotated; 0 where positions are not rotary."""
    layer_types: tuple[str, ...]
    """As the caches of transformers see them; 'dummy' uses the keys of another layer."""
    kv_values: tuple[int, ...]
    """Numbers that each layer keeps per token: keys and values, or their latents in MLA."""
    sliding_window: int | None
    """Tokens that windowed layers keep; None without such layers."""
    dtype: str | None
    quantization: str | None
    """`quant_method` of a checkpoint that comes quantized."""
    tied: bool
    """The last layer is the embedding: what a checkpoint stores of it besides is not loaded."""
    remote_code: bool
    """Runs only with code from the checkpoint."""
    traits: frozenset[str]
    tensors: Mapping[str, TensorSize] = field(default_factory=dict, repr=False)
    """By name, from the safetensors headers; empty when they are not here."""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """config.json as it was read, without `ignored`, with what the choices make of it."""
    ignored: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Keys of config.json that size other models, and that this one's code does not read."""

    @property
    def weight_bytes(self) -> int | None:
        """Return the bytes of all tensors as stored, or None when unknown."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) if self.tensors else None

    @cached_property
    def blueprint(self) -> Blueprint | None:
        """Return what its code makes of the config; None where that is not known."""
        return None if self.remote_code else drawing.draw(self.config)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Return its parameters, of tied ones one; as the files name them where code is unknown."""
        return tuple(_as_stored(self.tensors)) if self.blueprint is None else self.blueprint.weights

    @property
    def weighed(self) -> bool:
        """Tell whether the bytes of its weights are known: of packed ones, as they are stored."""
        return bool(self.tensors if self.quantization else self.weights)

    @property
    def parameters(self) -> int | None:
        """Return how many numbers its weights have, or None when unknown."""
        return sum(weight.numbers for weight in self.weights if weight.trained) or None

    @property
    def misleading(self) -> list[str]:
        """Return those of `ignored` that say something else than what is so without them.

        Converters write `num_key_value_heads` for models that have as many as heads, for example.
        """
        used: dict[tuple[str, ...], int | None] = {
            LAYERS: self.layers, HIDDEN: self.hidden_size, HEADS: self.heads,
            KV_HEADS: self.kv_heads, HEAD_DIM: self.head_dim, VOCABULARY: self.vocab_size,
            POSITIONS: self.max_positions,
        }  # fmt: skip
        return [
            name
            for name, value in self.ignored.items()
            if not any(name in names and used[names] in (value, None) for names in used)
        ]

    def configured(self, names: Iterable[str], value: Any) -> Mapping[str, Any]:
        """Return the config with another value for what goes by one of these names."""
        config = copy.deepcopy(dict(self.config))
        part = text_part(config)
        assert isinstance(part, dict)
        first, *others = names
        found = [name for name in (first, *others) if name in part]
        part |= dict.fromkeys(found or [first], value)
        return config

    def kv_values_kept(self, tokens: int) -> int:
        """Return how many numbers a cache keeps of a sequence; windows keep no more than theirs."""
        window = self.sliding_window or tokens
        return sum(
            values * (min(tokens, window) if kind in WINDOWED else tokens)
            for values, kind in zip(self.kv_values, self.layer_types, strict=True)
        )


def read_shape(config: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> ModelShape:
    """Read a parsed config.json, and the tensors of the safetensors headers where known.

    Raises CheckpointError, with every key that is missing or has an impossible value.
    """
    sizes = {
        name: TensorSize(dtype=str(size.dtype), shape=tuple(size.shape), nbytes=int(size.nbytes))
        for name, size in (tensors or {}).items()
    }
    reader = _Reader(as_taken(config))
    layers = reader.layers()
    hidden = reader.count(HIDDEN)
    vocabulary = reader.count(VOCABULARY)
    heads = reader.heads()
    reader.stop_at_problems()
    head_dim = reader.head_dim(hidden, heads)
    kv_heads = reader.kv_heads(heads)
    layer_types = reader.layer_types(layers)
    position = reader.position()
    window = reader.window() if WINDOWED.intersection(layer_types) else None
    shape = ModelShape(
        model_type=reader.model_type,
        architecture=reader.architecture(),
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_positions=reader.max_positions(position),
        stated_positions=reader.stated_positions,
        position=position,
        rope_type=reader.rope_type() if position == "rope" else "",
        rope_parameters=MappingProxyType(dict(reader.rope_parameters)),
        rotary_dim=reader.rotary_dim(head_dim) if position == "rope" else 0,
        layer_types=layer_types,
        kv_values=reader.kv_values(layer_types, heads, kv_heads, head_dim),
        sliding_window=window,
        dtype=reader.dtype(),
        quantization=reader.quantization(),
        tied=reader.get("tie_word_embeddings") is not False,
        remote_code=not family(reader.model_type).known and bool(config.get("auto_map")),
        traits=frozenset(reader.traits(position, layer_types, sizes)),
        tensors=MappingProxyType(sizes),
        config=reader.config,
        ignored=reader.ignored,
    )
    reader.stop_at_problems()
    return shape


class _Reader:
    """Look keys up under any of their names, and collect what is wrong with them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[Problem] = []
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            self.complain("model_type is missing", "is this the folder of a transformers model?")
            raise CheckpointError(self.problems)
        self.model_type = model_type
        self.part = text_part(config)
        inner = self.part.get("model_type") or f"{self.model_type}_text"
        self.family = family(str(inner))
        if not self.family.known:
            self.family = family(self.model_type)
        self.ignored: Mapping[str, Any] = stray(self.part, self.family)
        if self.ignored:
            self.config = without(config, self.ignored)
            self.part = text_part(self.config)
            # Some configs compute such a value, and transformers writes it down with the others.
            self.ignored = {n: v for n, v in self.ignored.items() if self.made.get(n) != v}
        self.attention = self.mapping("attn_config")

    @cached_property
    def made(self) -> Mapping[str, Any]:
        """Return what transformers reads in the file; empty where it makes nothing of it."""
        if any(_is_number(n := self.part.get(name)) and n > MOST_LAYERS for name in LAYERS):
            return {}  # some configs would list as many
        try:
            return _Attributes(_text_attribute(drawing.configure(self.config)))
        except Exception:  # the values are wrong, which is told below, or its code is not known
            return {}

    def get(self, *names: str) -> Any:
        """Return the first value that is not null: as transformers reads it, or as it stands."""
        for source in (self.made, self.part, self.attention):
            found = [source[name] for name in names if source.get(name) is not None]
            if found:
                return found[0]
        return None

    def outer(self, name: str) -> Any:
        """Return what the whole config says, or else its text part."""
        value = self.config.get(name)
        return self.part.get(name) if value is None else value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return a part of the config; empty where it is absent."""
        value = self.outer(name)
        if value is None or isinstance(value, Mapping):
            return value or {}
        self.complain(f"{name} must be a mapping, not {value!r}")
        return {}

    def complain(self, message: str, hint: str = "") -> None:
        """Note a problem of config.json."""
        hint = hint or "mend it in config.json, or fetch that from its source again"
        self.problems.append(
            Problem(message=message, hint=hint, code="config", where="config.json")
        )

    def stop_at_problems(self) -> None:
        """Raise CheckpointError if there are problems."""
        if self.problems:
            raise CheckpointError(self.problems)

    def optional(self, *names: str) -> int | None:
        """Return a whole number above zero, or None where the key is absent."""
        value = self.get(*names)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.complain(f"{names[0]} must be a whole number above 0, not {value!r}")
            return None
        return value

    def count(self, names: tuple[str, ...]) -> int:
        """Return a whole number above zero; note a problem where the key is absent."""
        before = len(self.problems)
        value = self.optional(*names)
        if value is None and len(self.problems) == before:
            self.complain(f"{names[0]} is missing", f"or one of: {', '.join(names[1:])}")
        return value or 1

    def architecture(self) -> str:
        """Return the first of the architectures, or ''."""
        names = self.config.get("architectures") or [""]
        if not isinstance(names, list) or not isinstance(names[0], str):
            self.complain(f"architectures must be a list of names, not {names!r}")
            return ""
        return names[0]

    def layers(self) -> int:
        """Return the number of layers; hybrids such as Nemotron-H list them instead."""
        kinds = self.get("layers_block_type")
        layers = len(kinds) if isinstance(kinds, list) else self.count(LAYERS)
        if layers > MOST_LAYERS:
            self.complain(f"{LAYERS[0]} is {layers}, and no model has more than {MOST_LAYERS}")
        return layers

    def heads(self) -> int:
        """Return the number of query heads; 0 where the config class has no such thing."""
        if self.family.known and self.get(*HEADS) is None:
            return 0
        return self.count(HEADS)

    def head_dim(self, hidden: int, heads: int) -> int:
        """Return the numbers per query head."""
        if self.get("kv_lora_rank") and self.get("qk_nope_head_dim"):
            return self.count(("qk_nope_head_dim",)) + self.count(("qk_rope_head_dim",))
        stated = self.optional(*HEAD_DIM)
        if not heads:
            return stated or 0
        written = "head_dim" in self.part and stated != hidden // heads
        if written and not self.family.reads("head_dim", inside="Attention"):
            self.complain(
                f"head_dim is {stated}, and the attention of {self.model_type} has hidden_size / "
                f"heads = {hidden // heads} whatever that says: its positions would not fit",
                "remove head_dim from config.json",
            )
        if hidden % heads and stated in (None, hidden // heads):
            self.complain(f"hidden_size {hidden} does not divide by {heads} attention heads")
        return stated or hidden // heads

    def kv_heads(self, heads: int) -> int:
        """Return the number of key/value heads."""
        if not heads:
            return 0
        if self.get("multi_query") and not self.get("new_decoder_architecture"):
            return 1
        kv_heads = self.optional(*KV_HEADS) or heads
        if heads % kv_heads:
            self.complain(f"{heads} attention heads do not divide by {kv_heads} key/value heads")
        return kv_heads

    def window(self) -> int | None:
        """Return the tokens that windowed layers see; None where windows are off."""
        if self.get("use_sliding_window") is False:
            return None
        return self.optional("sliding_window", "attention_chunk_size")

    def layer_types(self, layers: int) -> tuple[str, ...]:
        """Return the kind of each layer."""
        types = self.part.get("layer_types") or self.get("layer_types")
        if types is None and not self.made:  # else its class would have made the one of the other
            types = self.part.get("layers_block_type")
        types = self._usual_layer_types(layers) if types is None else types
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            self.complain(f"layer_types must be a list of names, not {types!r}")
            return ()
        if len(types) != layers:
            self.complain(f"layer_types names {len(types)} layers, num_hidden_layers {layers}")
        shared = self.optional("num_kv_shared_layers") if self.get("num_kv_shared_layers") else 0
        own = layers - (shared or 0)
        return tuple(
            LEGACY_LAYER_TYPES.get(kind, kind) if index < own else "dummy"
            for index, kind in enumerate(types)
        )

    def _usual_layer_types(self, layers: int) -> list[str]:
        """Return the kinds where all layers are of one, and nobody says which."""
        if not self.get(*HEADS):
            return ["linear_attention"] * layers
        if not self.window():
            return ["full_attention"] * layers
        return ["sliding_attention" if self.get("sliding_window") else "chunked_attention"] * layers

    def kv_values(
        self, layer_types: tuple[str, ...], heads: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """Return how many numbers each layer keeps per token."""
        latent = 0
        if self.get("kv_lora_rank"):
            latent = self.count(("kv_lora_rank",)) + self.count(("qk_rope_head_dim",))
        elif self.get("new_decoder_architecture"):
            kv_heads = heads  # Falcon repeats its heads before it stores them
        value_dim = self.optional("v_head_dim") or head_dim

        def keeps(layer: int, kind: str) -> int:
            if kind in WITHOUT_KEYS:
                return 0
            own_heads, own_dim = self._exception(layer, kind)
            both = 2 * own_dim if own_dim else head_dim + value_dim
            return latent or (own_heads or kv_heads) * both

        return tuple(keeps(layer, kind) for layer, kind in enumerate(layer_types))

    def _exception(self, layer: int, kind: str) -> tuple[int | None, int | None]:
        """Return key/value heads and their size where a layer has its own, as in Gemma 4."""
        own = self.mapping("per_layer_config").get(str(layer), {})
        if kind == "full_attention" and not own:
            shared = self.optional("num_global_key_value_heads")
            heads = shared if self.get("attention_k_eq_v") else None
            return heads, self.optional("global_head_dim")
        return own.get("num_key_value_heads"), own.get("head_dim")

    def position(self) -> str:
        """Return how the model knows where a token stands."""
        code = self.family.model_code
        if re.search(r"\balibi\b", code) or not code:
            switch = self.get("alibi")
            if bool(code) if switch is None else switch:
                return "alibi"
        rotary = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct")
        if re.search(r"RotaryEmbedding\(|= apply_rotary", code) or (not code and self.get(*rotary)):
            return "rope"
        if "inusoidal" in code:
            return "sinusoidal"
        learned = r"wpe = |embed_positions = |position_embeddings = nn\.Emb|LearnedPositional"
        return "learned" if re.search(learned, code) else "none"

    @cached_property
    def rope_parameters(self) -> Mapping[str, Any]:
        """Return what is said of rotary positions: by today's name, the former, or the class."""
        given = self.mapping("rope_parameters") or self.mapping("rope_scaling")
        usual = self.made.get("rope_parameters")
        given = given or (usual if isinstance(usual, Mapping) else {})
        if any(isinstance(value, Mapping) for value in given.values()):
            return given
        theta = self.get("rope_theta", "rotary_emb_base")
        return given if theta is None else {"rope_theta": theta, **given}

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many numbers of a head are rotated."""
        if self.get("kv_lora_rank") and self.get("qk_rope_head_dim"):
            return self.count(("qk_rope_head_dim",))
        made = self.made.get("rope_parameters")
        given = made if isinstance(made, Mapping) and made else self.rope_parameters
        kinds = [
            kind
            for label, kind in given.items()
            if isinstance(kind, Mapping) and label not in WINDOWED
        ]
        usual = self.get("partial_rotary_factor", "rotary_pct") or 1.0
        part = (kinds[0] if kinds else given).get("partial_rotary_factor") or usual
        self.positive("partial_rotary_factor", part)
        if not _is_number(part) or part == 1:
            return head_dim
        if part > 1:
            self.complain(f"partial_rotary_factor is a part of a head, and {part} is more than all")
        if self.family.known and "partial_rotary_factor" not in self.family.model_code:
            return self._all_rotated(head_dim, part)
        return int(head_dim * part)

    def _all_rotated(self, head_dim: int, part: float) -> int:
        """Return what is rotated where a part is stated, and the model's code rotates all."""
        kind = self.rope_type()
        if kind in STRETCHED:
            self.complain(
                f"partial_rotary_factor is {part}, and {self.model_type} rotates whole heads: its "
                f"frequencies, scaled as {kind}, would be too few",
                "remove partial_rotary_factor from config.json",
            )
        self.ignored = {**self.ignored, "partial_rotary_factor": part}
        self.config = without(self.config, ["partial_rotary_factor"])
        return head_dim

    def rope_type(self) -> str:
        """Return how rotary positions are scaled; note numbers that give no frequencies."""
        given = self.rope_parameters
        kinds = [kind for kind in given.values() if isinstance(kind, Mapping)]
        outside = {name: self.outer(name) for name in ("rope_theta", "rotary_emb_base")}
        for part in (outside, given, *kinds):
            for name in ("rope_theta", "rotary_emb_base", "factor"):
                self.positive(name, part.get(name))
        full = given.get("full_attention", given)
        full = full if isinstance(full, Mapping) else {}
        return _text(full.get("rope_type") or full.get("type")) or "default"

    def positive(self, name: str, value: Any) -> None:
        """Note a problem of what should be a number above zero, where it is stated."""
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            self.complain(f"{name} must be a number above 0, not {value!r}")

    @cached_property
    def stated_positions(self) -> int | None:
        """Return the longest text that the config states."""
        return self.optional(*POSITIONS)

    def max_positions(self, position: str) -> int | None:
        """Return the longest text that the model was made for, stretched as the config says."""
        if position == "alibi":
            # It has no end, but MPT makes its biases once, for max_seq_len tokens.
            return self.optional("max_seq_len")
        stated = self.stated_positions
        if position != "rope" or stated is None:
            return stated
        return max(stated, *self._stretched(stated), *map(self._further, LONGEST))

    def _stretched(self, stated: int) -> Iterator[int]:
        """Yield how far stretched rotary positions reach: `factor` times what was trained first.

        Without an original length that is what the config states: those who write `rope_scaling`
        are asked to leave `max_position_embeddings` as it was (documentation of transformers).
        Configs with parameters for each type of layer, as Gemma's, state the whole of it.
        """
        made = self.made.get("rope_parameters")  # which divides one set among types of layers
        given = made if isinstance(made, Mapping) and made else self.rope_parameters
        kinds = [kind for label, kind in given.items() if label not in WINDOWED]
        each_layer = [kind for kind in kinds if isinstance(kind, Mapping)]
        for kind in each_layer or [given]:
            name = kind.get("rope_type") or kind.get("type")
            factor, original = kind.get("factor"), kind.get(ORIGINAL) or self.get(ORIGINAL)
            original = original or (None if each_layer else stated)
            if name not in STRETCHED or not _is_number(factor) or not _is_number(original):
                continue
            if name not in UP_TO or stated <= original:
                yield int(factor * original)

    def _further(self, name: str) -> int:
        value = self.get(name)
        # Tokenizers that state no limit state one of 10 to the power of 30.
        return value if type(value) is int and value < MOST_POSITIONS else 0

    def quantization(self) -> str | None:
        """Return what packed the weights; the first configs of bitsandbytes do not say its name."""
        given = self.mapping("quantization_config")
        if not given and self.outer("quantization_config") is not None:
            hint = "remove it where the weights are plain, or fetch config.json again"
            self.complain("quantization_config is empty: it does not say what packed them", hint)
        old = given.get("load_in_8bit") or given.get("load_in_4bit")
        return _text(given.get("quant_method")) or ("bitsandbytes" if old else None)

    def dtype(self) -> str | None:
        """Return the number format that the checkpoint names."""
        return _text(self.outer("dtype") or self.outer("torch_dtype"), drop="torch.")

    def traits(
        self, position: str, layer_types: tuple[str, ...], tensors: Mapping[str, TensorSize]
    ) -> Iterator[str]:
        """Yield what plugins may need or exclude."""
        code = self.family.traits
        yield from code - {"model.rope", "model.split_kv", "model.alibi_by_mask"}
        if position == "rope" and "model.rope" in code:
            yield "model.rope"
        if position == "rope" and self.rope_type() in ("dynamic", "longrope"):
            yield "model.rope_varies"
        if position == "alibi" and "model.alibi_by_mask" in code:
            yield "model.alibi_by_mask"
        if position in ("alibi", "sinusoidal"):
            yield f"model.{position}"
        if position == "learned":
            yield "model.learned_positions"
        yield from self.traits_of_states(set(layer_types))
        if self.get("num_experts", "num_local_experts", "n_routed_experts"):
            yield "model.moe"
        if WINDOWED.intersection(layer_types):
            yield "model.sliding"
        if self.get("attn_logit_softcapping"):
            yield "model.softcap"
        if self.get("kv_lora_rank"):
            yield "model.latent_kv"
        packed = self.outer("quantization_config")
        packed = packed if isinstance(packed, Mapping) else {}
        if packed.get("load_in_8bit") and packed.get("llm_int8_threshold", 6.0):
            yield "weights.by_pass"
        names = [name for name in tensors if not re.search(r"vision|visual|audio", name)]
        normed = any(re.search(r"\.(k|key)_(layer)?norm\.", name) for name in names)
        if any(name.endswith(".k_proj.bias") for name in names) and not normed:
            yield "model.key_bias"
        if _split(names) if tensors else "model.split_kv" in code:
            yield "model.split_kv"

    def traits_of_states(self, kinds: set[str]) -> Iterator[str]:
        """Yield what plugins must know of layers that keep a state, or nothing but that."""
        family = self.family
        states = kinds & RECURRENT
        if states or (family.stateful and kinds - USUAL):
            yield "model.recurrent"
            # Convolutions can record their past until it is known what to cut off again.
            convolves = family.cached_states == {"conv"} if family.known else states == {"conv"}
            if family.stateful or not convolves or kinds <= WITHOUT_ATTENTION:
                yield "model.uncroppable"
        if not family.takes_cache or (family.known and states and not family.cached_states):
            yield "model.own_cache"
        if family.known and kinds - USUAL:
            yield "model.own_layers"
        if kinds and kinds <= WITHOUT_ATTENTION:
            yield "model.attention_free"


def _as_stored(tensors: Mapping[str, TensorSize]) -> Iterator[Weight]:
    for name, tensor in tensors.items():
        plain = name.endswith(".weight") and len(tensor.shape) == 2
        linear = plain and not UNQUANTIZED.search(name)
        yield Weight(name=name, shape=tuple(tensor.shape), kind="", linear=linear)


def _split(names: Iterable[str]) -> bool:
    """Say whether a model has a projection each for keys and for values, packed or plain."""
    return all(any(part in name for name in names) for part in (".k_proj.", ".v_proj."))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any, *, drop: str = "") -> str | None:
    return str(value).removeprefix(drop) if value else None


class _Attributes(Mapping[str, Any]):
    """The attributes of a config."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getitem__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return getattr(self._config, name, default)
        except Exception:  # a property of it stumbles over the values
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self._config))

    def __len__(self) -> int:
        return len(vars(self._config))


def _text_attribute(config: Any) -> Any:
    for name in TEXT_CONFIGS:
        if getattr(config, name, None) is not None:
            return _text_attribute(getattr(config, name))
    # Where layers differ in it, as in Gemma 4, what holds for most: the others are asked apart.
    config.allow_global_per_layer_attribute_access = True
    return config
