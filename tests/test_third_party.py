"""Packages by others: a good one takes part in everything, a bad one hurts only who selects it.

Both are installed with pip, into a folder of their own that only these tests have on their path.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.hookspecs import SLOTS
from tests.models import CONTEXT, tiny_model

HERE = Path(__file__).parent / "third_party"
PROMPT = "def add(a, b):"
WINDOW = 4

Command = Callable[..., subprocess.CompletedProcess[str]]
Result = Mapping[str, Any]


def _install(source: Path, folder: Path) -> None:
    # A copy, because building leaves files beside the source.
    copy = folder.parent / "sources" / folder.name / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("misfits", "__pycache__"))
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder), str(copy)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the good package alone."""
    folder = tmp_path_factory.mktemp("packages") / "good"
    _install(HERE, folder)
    return folder


@pytest.fixture(scope="module")
def both(good: Path) -> Path:
    """Return a folder with the good package and the bad one."""
    folder = good.with_name("both")
    _install(HERE, folder)
    _install(HERE / "misfits", folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return a function that runs a program with packages on its path, in an empty folder."""
    empty = tmp_path_factory.mktemp("elsewhere")

    def start(packages: Path, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        program = str(Path(sys.executable).with_name("engine"))
        command = [sys.executable, *words[1:]] if words[0] == "python" else [program, *words]
        inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        path = os.pathsep.join([str(packages), *inherited])
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            cwd=empty,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )

    return start


def _drive(run: Command, packages: Path, model: Path, cases: Sequence[Sequence[str]]) -> list[Any]:
    done = run(packages, "python", str(HERE / "misfits/drive.py"), str(model),
               text=json.dumps(cases))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    assert len(found) == len(cases)
    return found


# -- the good package ---------------------------------------------------------------------------


def test_list_names_choices_and_recipes_and_imports_none(good: Path, run: Command) -> None:
    code = (
        "import sys; sys.argv = ['engine', 'list', '--json']\n"
        "from engine.cli import main\n"
        "try: main()\n"
        "finally: print(sorted(m for m in sys.modules if 'acme' in m), file=sys.stderr)\n"
    )
    done = run(good, "python", "-c", code)
    assert done.stderr.strip().endswith("[]"), "a plugin was imported in order to be listed"
    rows = {(row["group"], row["name"]): row for row in json.loads(done.stdout)}
    assert rows["attention", "nearby"]["origin"] == "acme-recipes 0.1.0"
    assert rows["attention", "nearby"]["about"].startswith("Attend to the last `size` tokens")
    size = {"name": "size", "type": "int", "default": "64"}
    assert rows["attention", "nearby"]["options"] == [size]
    assert rows["cache", "half"]["origin"] == "acme-recipes 0.1.0"
    assert rows["attention", "sdpa"]["origin"].startswith("recipe-engine ")
    assert rows["recipes", "acme-nearby"]["about"].startswith("Each token sees")


def test_the_table_shows_the_distribution(good: Path, run: Command) -> None:
    done = run(good, "list", "attention")
    assert re.search(r"nearby\s+plugin\s+acme-recipes 0\.1\.0\s+Attend to the last", done.stdout)
    assert "attention.size: int = 64" in done.stdout
    assert "attention.size" not in run(good, "list").stdout
    assert "quantize.skip_modules: list[str] = []" in run(good, "list", "quantize").stdout


def test_verify_imports_and_tells_what_each_does(good: Path, run: Command) -> None:
    done = run(good, "list", "--verify", "--json")
    assert done.returncode == 0
    rows = {(row["group"], row["name"]): row for row in json.loads(done.stdout)}
    assert rows["attention", "nearby"]["ok"] is True
    assert rows["attention", "nearby"]["about"].startswith("Attend to the last")


def test_a_misspelled_choice_names_the_third_partys(good: Path, run: Command) -> None:
    done = run(good, "check", "base", "model.path=some/model", "attention=nearbi")
    assert done.returncode == 2
    assert "attention=nearbi" in done.stderr
    assert "did you mean attention=nearby? there are: " in done.stderr


def test_its_options_are_typed_and_checked(good: Path, tiny: Path, run: Command) -> None:
    words = ["check", "base", f"model.path={tiny}", "attention=nearby"]
    wrong = run(good, *words, "attention.size=wide")
    assert wrong.returncode == 2
    assert "attention.size" in wrong.stderr
    none = run(good, *words, "attention.size=0")
    assert none.returncode == 2
    assert "a window holds at least one token" in none.stderr
    unknown = run(good, *words, "attention.sise=8")
    assert unknown.returncode == 2
    assert "did you mean attention.size?" in unknown.stderr


def _windowed_tokens(folder: Path, window: int, count: int) -> list[int]:
    """Decode greedily with a Llama whose attention is written out, windowed, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama as llama

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    heads, width = model.config.num_attention_heads, model.config.head_dim

    def attend(layer: Any, states: torch.Tensor, cos: Any, sin: Any) -> torch.Tensor:
        length = states.shape[1]
        q, k, v = (
            projection(states).view(1, length, -1, width).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = llama.apply_rotary_pos_emb(q, k, cos, sin)
        out = torch.zeros(length, heads, width)
        for head in range(heads):
            shared = head // (heads // k.shape[1])
            for position in range(length):
                seen = slice(max(0, position - window + 1), position + 1)
                scores = k[0, shared, seen] @ q[0, head, position] / width**0.5
                out[position, head] = scores.softmax(0) @ v[0, shared, seen]
        found: torch.Tensor = layer.o_proj(out.view(1, length, -1))
        return found

    ids = list(tokenizer(PROMPT)["input_ids"])
    new: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            states = model.model.embed_tokens(torch.tensor([ids + new]))
            cos, sin = model.model.rotary_emb(states, torch.arange(states.shape[1])[None])
            for block in model.model.layers:
                normed = block.input_layernorm(states)
                states = states + attend(block.self_attn, normed, cos, sin)
                states = states + block.mlp(block.post_attention_layernorm(states))
            logits = model.lm_head(model.model.norm(states))[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second > 1e-3, "too close for float32 to tell: choose another seed"
            new.append(int(logits.argmax()))
    return new


def test_its_recipe_runs_and_the_window_is_real(good: Path, tiny: Path, run: Command) -> None:
    words = [f"model.path={tiny}", "model.dtype=float32", "decode.max_new_tokens=8"]
    done = run(
        good, "run", "acme-nearby", *words, f"attention.size={WINDOW}", "-p", PROMPT, "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected = _windowed_tokens(tiny, WINDOW, 8)
    assert answer["token_ids"] == expected
    assert expected != _windowed_tokens(tiny, 1000, 8), "the prompt is too short to tell"
    (receipt,) = [one for one in answer["receipts"] if one["slot"] == "attention"]
    assert receipt["plugin"] == "nearby"
    assert receipt["ok"] is True
    assert receipt["evidence"]["attended"] == WINDOW
    assert receipt["evidence"]["keys"] > WINDOW
    assert receipt["evidence"]["calls"] > 0


def test_a_window_as_wide_as_the_model_is_refused(good: Path, tiny: Path, run: Command) -> None:
    words = ["check", "base", f"model.path={tiny}", "attention=nearby"]
    assert run(good, *words, f"attention.size={CONTEXT - 1}").returncode == 0
    done = run(good, *words, f"attention.size={CONTEXT}")
    assert done.returncode == 2
    assert f"attention.size={CONTEXT} does nothing: the model has {CONTEXT} pos" in done.stderr
    assert "attention=native, or a smaller window" in done.stderr
    stretched = ["position_encoding=yarn", "position_encoding.factor=4"]
    assert run(good, *words, f"attention.size={CONTEXT}", *stretched).returncode == 0


def test_its_receipt_fails_with_a_mask_that_is_no_window(good: Path, run: Command) -> None:
    code = (
        "from types import SimpleNamespace as Of\n"
        "from transformers.masking_utils import sdpa_mask\n"
        "from acme_recipes.attention import Nearby\n"
        "def holds(window, mask, calls):\n"
        "    built = {'attention': Of(mask=mask)}\n"
        "    session = Of(built=built, probe=Of(attention_calls=calls))\n"
        "    return all(receipt.ok for receipt in window.receipts(session))\n"
        "def everything(**known): return sdpa_mask(allow_is_causal_skip=False, **known)\n"
        "near, wide = (Nearby(size).attention(None).mask for size in (64, 65))\n"
        "cases = [(near, 4), (near, 0), (wide, 4), (everything, 4)]\n"
        "print([holds(Nearby(), mask, calls) for mask, calls in cases])\n"
    )
    done = run(good, "python", "-c", code)
    assert done.stdout.strip() == "[True, False, False, False]", done.stderr


def test_it_works_with_our_choices(good: Path, tiny: Path, run: Command) -> None:
    window = ["attention=nearby", f"attention.size={WINDOW}"]
    caches = [["cache=none"], ["cache=dynamic"], ["cache=static"]]
    others = [["cache=half"], ["load=random"], ["quantize=bitsandbytes", "quantize.bits=8"]]
    others += [["quantize=rows"], ["quantize=rows", "load=random"]]
    cases = [[*window, *more] for more in caches + others]
    found = _drive(run, good, tiny, cases)
    expected = _windowed_tokens(tiny, WINDOW, 5)
    for case, result in zip(cases, found, strict=True):
        assert len(result.get("tokens", ())) == 5, (case, result)
        assert result["left"] == []
    assert [result["tokens"] for result in found[:3]] == [expected] * 3


def test_its_author_runs_the_contract_suite(good: Path, run: Command) -> None:
    tests = good.parent / "sources" / "good" / HERE.name
    done = run(
        good, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests),
        "--basetemp", str(tests / "tmp"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b6\d passed", done.stdout), done.stdout


# -- the bad package ----------------------------------------------------------------------------

PUPPETS = {
    "load": "load", "quantize": "quantize", "heads": "heads",
    "position_encoding": "position_encoding", "attention": "attention", "cache": "cache",
    "decode": "decode", "task": "task",
}  # fmt: skip
"""Provider hook → slot of the plugin that answers it."""

ANY_SLOT = {
    "check": "attention", "estimate": "cache", "prepare": "heads", "receipts": "quantize",
    "observe": "observe",
}  # fmt: skip
"""Collecting hook → the slot in which it is made to fail."""


def _puppet(slot: str, hook: str, how: str) -> list[str]:
    return [f"{slot}=puppet", f"{slot}.hook={hook}", f"{slot}.how={how}"]


def _misbehavior() -> dict[tuple[str, str], tuple[list[str], str]]:
    """Return (hook, how) → overrides, and what the message says."""
    cases: dict[tuple[str, str], tuple[list[str], str]] = {}
    for hook, slot in {**PUPPETS, **ANY_SLOT}.items():
        says = {
            "raises": "raised ZeroDivisionError: the puppet's string is torn",
            "quits": "raised SystemExit: 0",
            "number": r"(returned|gave) a int",
            "another": r"(returned|gave) (a list|a Term|Term\(bytes='many')",
            "nothing": r"gave no answer \(None\)",
        }
        if hook in ANY_SLOT:
            says["nothing"] = "gave no receipt" if hook == "receipts" else ""
        if hook == "decode":
            says["another"] = "which cannot be called"
        if hook == "task":
            says["another"] = says["number"] = "without probe, stream, batch, chat"
        if hook == "observe":  # whose results nobody reads
            says["number"] = says["another"] = ""
        cases |= {(hook, how): (_puppet(slot, hook, how), text) for how, text in says.items()}
    return cases


MISBEHAVIOR = _misbehavior()


@pytest.mark.parametrize(("hook", "how"), MISBEHAVIOR)
def test_a_hook_that_misbehaves_is_named(
    hook: str, how: str, bad: Mapping[tuple[str, ...], Result]
) -> None:
    overrides, text = MISBEHAVIOR[hook, how]
    result = bad[tuple(overrides)]
    if not text:
        assert len(result.get("tokens", ())) == 5, f"not an error, but: {result}"
        return
    slot = {**PUPPETS, **ANY_SLOT}[hook]
    assert result.get("code") == 5, result
    assert f"{slot}=puppet (acme-misfits 0.1.0)" in result["message"]
    assert re.search(text, result["message"]), result["message"]
    if text != "gave no receipt":
        assert f"hook {hook}:" in result["message"]


REFUSED = {
    # before loading: what is no plugin
    "attention=absent": "cannot be imported: ModuleNotFoundError: .*a_library_that_nobody",
    "attention=quitting": "cannot be imported: SystemExit",
    "attention=function": "is not a dataclass",
    "attention=plain": "is not a dataclass",
    "attention=frozen": "is a frozen dataclass",
    "attention=untyped": "has options that a recipe cannot hold",
    "attention=future": r"works with hook contract >=2; this is 1\.3",
    "attention=unreadable": "engine_api that is no range of versions",
    # registering: hooks that do not fit
    "attention=misspelled": "there is no hook 'atention'\n  did you mean attention?",
    "attention=misnamed": r"Argument\(s\) {'contxt'} are declared",
    "attention=elsewhere": "hook cache: only the plugin in the slot cache may answer this",
    "attention=traits": "hook provides: 'attention.window' where a tuple of traits was due",
    # what hooks return fails later
    "attention=fails": "raised LookupError: no kernel for this head size",
    "attention=failing-mask": "raised LookupError: no kernel for this head size",
    "cache=fails": "raised LookupError: no kernel for this head size",
    "cache=reused": "gave a cache that holds 9 tokens; each must be fresh",
    "decode=fails": "raised LookupError: no kernel for this head size",
    "decode=rubbish": "its decoder yielded 'word' where a list of 1 token ids was due",
    # lies
    "attention=liar": "did not take effect: its forward computes attention; .* in the probe 0",
    "attention=renamed": "did not take effect: .* asked sdpa, used eager",
    "attention=silent": "gave no receipt, so nothing proves that it took effect",
    "attention=honest-failure": "did not take effect: the kernel ran; evidence: kernel calls 0",
    "attention=other-slot": "hook receipts: gave a receipt for the slot 'cache'",
    "cache=liar": "did not take effect: .* known 0, sent 9",
    "cache=forgetful": "did not take effect: it keeps keys and values; .* numbers kept 0",
    "cache=nothing": "did not take effect: it changes something; .* lacks cache.none",
    "quantize=liar": "did not take effect: it changes something; .* lacks quantize.unchanged",
    "quantize=skipping": "did not take effect: it packs weights; evidence: packed tensors 0",
    "quantize=finishing": "did not take effect: it changes something; .* lacks quantize.unchanged",
    "heads=liar": "did not take effect: it changes something",
    "position_encoding=liar": "did not take effect: it changes something",
    "task=liar": "did not send anything through the model",
}


WRAPPED: dict[tuple[str, ...], str] = {
    ("observe=wrapper", "observe.hook=attention"): "hook attention: gave a str",
    ("observe=wrapper", "observe.hook=heads"): "hook heads: raised LookupError: the wrapper",
    ("observe=wrapper", "observe.hook=receipts"): "hook receipts: returned a NoneType",
}


@pytest.fixture(scope="module")
def bad(both: Path, tiny: Path, run: Command) -> dict[tuple[str, ...], Result]:
    """Return what became of every bad recipe, all built in one process."""
    cases = [tuple(overrides) for overrides, _ in MISBEHAVIOR.values()]
    cases += [(choice,) for choice in REFUSED]
    cases += WRAPPED
    return dict(zip(cases, _drive(run, both, tiny, cases), strict=True))


@pytest.mark.parametrize("choice", REFUSED)
def test_a_choice_that_does_not_keep_the_contract_is_refused(
    choice: str, bad: Mapping[tuple[str, ...], Result]
) -> None:
    result = bad[choice,]
    assert result.get("code") == 5, result
    assert re.search(REFUSED[choice], result["message"]), result["message"]
    assert choice in result["message"]
    assert "acme-misfits 0.1.0" in result["message"]


@pytest.mark.parametrize("overrides", WRAPPED)
def test_wrappers_are_told_from_what_they_wrap(
    overrides: tuple[str, ...], bad: Mapping[tuple[str, ...], Result]
) -> None:
    result = bad[overrides]
    assert result.get("code") == 5, result
    assert f"observe=wrapper (acme-misfits 0.1.0), {WRAPPED[overrides]}" in result["message"]


def test_the_engine_stays_usable_after_each(
    bad: Mapping[tuple[str, ...], Result], tiny: Path
) -> None:
    expected = _windowed_tokens(tiny, 1000, 5)
    for overrides, result in bad.items():
        assert result["after"] == {"tokens": expected}, overrides
        assert result["left"] == [], overrides


def test_a_duplicate_is_refused_naming_both(both: Path, tiny: Path, run: Command) -> None:
    done = run(both, "check", "base", f"model.path={tiny}", "attention=sdpa")
    assert done.returncode == 5
    assert "attention=sdpa is claimed by" in done.stderr
    assert "recipe-engine " in done.stderr
    assert "acme-misfits 0.1.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_shows_what_is_broken_and_why(both: Path, run: Command) -> None:
    done = run(both, "list", "--verify", "--json")
    assert done.returncode == 5
    rows = json.loads(done.stdout)
    broken = {f"{row['group']}={row['name']}" for row in rows if row["ok"] is False}
    unusable = {"absent", "quitting", "function", "plain", "frozen", "future", "unreadable"}
    unusable |= {"untyped", "misspelled", "misnamed", "elsewhere", "traits"}
    assert {f"attention={name}" for name in unusable} <= broken
    assert "attention=sdpa" in broken
    assert not {f"{slot}=puppet" for slot in SLOTS} & broken
    (absent,) = [row for row in rows if row["name"] == "absent"]
    assert "a_library_that_nobody_installed" in absent["about"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (_puppet("attention", "attention", "raises"), "hook attention: raised ZeroDivisionError"),
        (["attention=absent"], "cannot be imported"),
        (["quantize=liar"], "did not take effect"),
    ],
)
def test_the_command_exits_with_5_and_no_traceback(
    words: list[str], says: str, both: Path, tiny: Path, run: Command
) -> None:
    done = run(both, "run", "base", f"model.path={tiny}", *words, "-p", PROMPT)
    assert done.returncode == 5, done.stderr
    assert words[0] in done.stderr
    assert says in done.stderr
    assert "acme-misfits 0.1.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
