"""The tokenizer of a GGUF file: made of its header, or held against the one beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.blueprint import sources
from engine.errors import CheckpointError
from engine.loading import common, model_json
from engine.loading.gguf_header import GgufHeader, refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "tekken.json")
"""What a folder with a tokenizer of its own has."""

KINDS = ("gpt2", "llama")
"""Values of tokenizer.ggml.model of which transformers builds the tokenizer."""

_AS_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais"})
"""Ways to split text that are GPT-2's (llama.cpp, src/llama-vocab.cpp): transformers' default."""

_AS_LLAMA3 = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
    | {"jina-v5-nano", "tekken"}
)
"""Ways to split text with which llama.cpp takes a token for a whole word whatever the merges say,
and begins a text with the BOS token unless the header says otherwise."""

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_UNUSED = 5
"""Type of a token that only fills the vocabulary up."""

_HELD = re.compile(
    r"tokenizer\.(chat_template|huggingface\.json|ggml\.(model|pre|tokens|merges|scores|token_type"
    r"|(bos|eos|eot|eom|padding|unknown)_token_id|add_(bos|eos)_token|add_space_prefix"
    r"|remove_extra_whitespaces"
    # Of filling in the middle, of encoders, and of T5: neither completions nor chats use these.
    r"|(fim_\w+|prefix|suffix|middle|seperator|mask|cls)_token_id|add_sep_token|token_type_count"
    r"|precompiled_charsmap))\Z"
)


def unused(header: GgufHeader) -> list[str]:
    """Return the keys of the tokenizer that nobody knows."""
    return [n for n in header.keys if n.startswith("tokenizer.") and not _HELD.match(n)]


def lies_in(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer of its own."""
    return any(next(folder.glob(pattern), None) for pattern in FILES)


def other_than_beside(header: GgufHeader, folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the file says of chats and of the ends of answers, and the JSON beside it not."""
    file = folder / "generation_config.json"
    given = {**config, **(model_json.json_object(file) if file.is_file() else {})}
    for name, word in (("eot", "eos"), ("eom", "eos"), ("padding", "pad")):
        stated, there = (
            header.keys.get(f"tokenizer.ggml.{name}_token_id"),
            given.get(f"{word}_token_id"),
        )
        if stated is not None and there is not None and stated not in _listed(there):
            yield f"{name}_token_id={stated} of the file is not used, but {word}_token_id={there}"
    theirs, ours = header.keys.get("tokenizer.chat_template"), _template(folder)
    if isinstance(theirs, str) and isinstance(ours, str) and theirs.strip() != ours.strip():
        yield "the chat template of the file is not used, but the one beside it, which differs"


def _template(folder: Path) -> Any:
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.is_file():
        return jinja.read_text("utf-8")
    return model_json.json_object(config).get("chat_template") if config.is_file() else None


def verify_buildable(header: GgufHeader) -> None:
    """Raise CheckpointError where transformers builds no tokenizer from a header."""
    kind, split = (header.keys.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind is None or _TOKENS not in header.keys:
        raise _refused(header, "there is no tokenizer, neither in the file nor beside it")
    if kind not in KINDS:
        raise _refused(header, f"transformers builds no '{kind}' tokenizer from a GGUF file")
    if kind == "gpt2" and split not in _AS_GPT2 | _splits():
        how = "does not say how text is split" if split is None else f"splits text as '{split}'"
        raise _refused(header, f"the file {how}, which transformers cannot do from a GGUF file")


@cache
def _splits() -> frozenset[str]:
    """Return the ways to split text that the installed transformers has, read from its source."""
    file = sources.root() / "integrations" / "gguf" / "gguf_tokenizer_mapping.py"
    table = file.read_text("utf-8").partition("GGUF_PRE_TOKENIZER_SPLITS = {")[2].partition("}")[0]
    return frozenset(re.findall(r'"([^"]+)":', table))


def load(
    header: GgufHeader, folder: Path, trust_remote_code: bool, ends: Collection[int]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies in the folder, or else the file's own.

    Raises CheckpointError where there is none that can be used, or the two contradict each other.

    Args:
        ends: the tokens at which answers end, by the JSON files.
    """
    if not lies_in(folder):
        verify_buildable(header)
        found = _built(header)
        other = "the tokenizer that transformers makes of it"
        if differing := list(_differences(header, found, other, ends)):
            raise _refused(header, "; ".join(differing))
        return found
    found = common.tokenizer(folder, trust_remote_code)
    if differing := list(_differences(header, found, "the tokenizer beside it", ends)):
        hint = "take the tokenizer of the checkpoint that the file was made of"
        with suppress(CheckpointError):
            verify_buildable(header)
            if not list(_differences(header, _built(header), "its own", ())):
                hint += ", or none: then its own"
        raise _refused(header, "; ".join(differing), hint)
    return found


def _built(header: GgufHeader) -> PreTrainedTokenizerBase:
    """Return what transformers makes of a header; put right what llama.cpp does otherwise."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations import gguf

    fast: Any = PreTrainedTokenizerFast  # neither of which has annotations
    reader: Any = gguf
    try:
        with common.quiet():
            family, words, options = reader.get_gguf_tokenizer(str(header.file))
            backend, more = reader.convert_gguf_tokenizer(family, words)
            made = json.loads(backend.to_str())
            # GPT-2's class adds its <|endoftext|> to all.
            added = [each for each in made["added_tokens"] if each["id"] < header.keys[_TOKENS]]
            if header.keys.get("tokenizer.ggml.pre") in _AS_LLAMA3:
                made["model"]["ignore_merges"] = True
                options.setdefault("add_bos_token", True)
            backend = Tokenizer.from_str(json.dumps({**made, "added_tokens": added}))
            found: PreTrainedTokenizerBase = fast(tokenizer_object=backend, **options, **more)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        what = f"transformers cannot build the tokenizer: {type(error).__name__}: {first}"
        raise _refused(header, what) from error
    return found


def _refused(header: GgufHeader, why: str, hint: str = "") -> CheckpointError:
    beside = (
        "put tokenizer.json and tokenizer_config.json of the original checkpoint beside the file"
    )
    return refused(header.file, why, hint or beside, "tokenizer")


def _differences(
    header: GgufHeader, tokenizer: Any, other: str, ends: Collection[int]
) -> Iterator[str]:
    """Yield what the header says, and the tokenizer does otherwise."""
    texts = header.texts(_TOKENS, _MERGES)
    if wrong := _other_tokens(header, texts.get(_TOKENS, []), tokenizer.get_vocab()):
        yield f"{len(wrong)} tokens differ from those of {other}: {model_json.some(wrong, 3)}"
    merges = texts.get(_MERGES)
    there = _merges(tokenizer)
    if merges is not None and there is not None and merges != there:
        count = sum(a != b for a, b in zip(merges, there, strict=False))
        yield f"{count + abs(len(merges) - len(there))} merges differ from those of {other}"
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in header.keys.items()}
    for name, value in _does(tokenizer, keys.get("model")).items():
        if keys.get(name, value) is not value:
            yield f"{name} is {keys[name]} in the file, and {value} of {other}"
    eos = {tokenizer.eos_token_id, *ends}
    for name, known in (
        ("bos", {tokenizer.bos_token_id}),
        ("eos", eos),
        ("unknown", {tokenizer.unk_token_id}),
    ):
        stated, known = keys.get(f"{name}_token_id"), known - {None}
        if stated is not None and known and stated not in known:
            yield f"{name}_token_id is {stated} in the file, and {sorted(known)} of {other}"


def _does(tokenizer: Any, kind: Any) -> dict[str, bool]:
    """Return what a tokenizer does to a text, by the key that says so."""
    ids = tokenizer("a").input_ids
    does = {
        "add_bos_token": ids[:1] == [tokenizer.bos_token_id] != [None],
        "add_eos_token": ids[-1:] == [tokenizer.eos_token_id] != [None],
    }
    if kind == "llama":
        does["add_space_prefix"] = tokenizer.tokenize("a")[0].startswith("▁")
        does["remove_extra_whitespaces"] = tokenizer.tokenize("a  b") == tokenizer.tokenize("a b")
    return does


def _other_tokens(
    header: GgufHeader, tokens: list[str], vocabulary: Mapping[str, int]
) -> list[str]:
    """Return the tokens that have another text, or none, in a vocabulary."""
    types = header.keys.get("tokenizer.ggml.token_type", [])
    by_id = {index: token for token, index in vocabulary.items()}
    return [
        f"{index} is {token!r} in the file and {by_id.get(index)!r}"
        for index, token in enumerate(tokens)
        if types[index : index + 1] != [_UNUSED]
        if index not in by_id or _spelled(token) != _spelled(by_id[index])
    ]


def _spelled(token: str) -> bytes:
    """Return the bytes of a token, whether it is spelled in the alphabet of GPT-2 or plainly."""
    letters = _letters()
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.replace("▁", " ").encode("utf-8", "surrogatepass")


@cache
def _letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet: Any = bytes_to_unicode  # which has no annotations
    return {letter: byte for byte, letter in alphabet().items()}


def _merges(tokenizer: Any) -> list[str] | None:
    """Return the merges of a tokenizer of byte pairs, as a header has them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    merges = model.get("merges")
    pairs = [each.split(" ") if isinstance(each, str) else each for each in merges or ()]
    # The package `gguf` writes a blank within a token as the alphabet of GPT-2 does.
    spelled = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
    return None if merges is None else spelled


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
