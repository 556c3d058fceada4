"""Measure this machine: run a recipe's choices on stand-ins of several sizes.

They are Llamas with random weights, and go through the engine as any model. They take turns, so
that a machine that is slower for a while is so for all of them. What they tell, `fitting` knows.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, Problem, RecipeError
from engine.planning.calibration import Calibration, ensure_writable, save
from engine.planning.fitting import Measured, fit
from engine.planning.passes import Pass, Pricer
from engine.recipe import Model, Recipe, Workload, shipped_folder
from engine.target import Target, detect

if TYPE_CHECKING:
    from engine.contexts import Figures
    from engine.session import Session

NEW = 16
"""Tokens of the answers."""
PRODUCTS = 20
"""By a large matrix, of which each measurement consists."""
ROUNDS = 5
"""Answers of each stand-in that are measured, after one that is not."""

VOCABULARY = 2048
"""Of the tokenizer that comes with the engine."""
LIMIT = 768
"""Positions of a stand-in beyond its prompt."""
MATRIX = 2**14
"""Rows and columns of the matrix whose reading is timed: far larger than a device's caches."""


@dataclass(frozen=True)
class Rig:
    """What is run to measure a kind of device."""

    sizes: Mapping[str, tuple[int, int, int]]
    """Stand-in → hidden size, inner size, layers: built in this order, which matters for the memory
    that they show. 'narrow' and 'deep' differ in layers only."""
    points: tuple[str, ...]
    """Those that tell bandwidth and arithmetic, from small to large."""
    prompt: int
    """Tokens of the prompts."""


NARROW = (64, 192, 2)
RIGS = {
    "cpu": Rig(
        sizes={
            "narrow": NARROW,
            "wide": (1024, 2816, 3),
            "small": (256, 704, 4),
            "deep": (64, 192, 18),
        },
        points=("small", "wide"),
        prompt=256,
    ),
    "cuda": Rig(
        sizes={"narrow": NARROW, "wide": (4096, 11008, 3), "deep": (64, 192, 34)},
        points=("wide",),
        prompt=4096,
    ),
}


@dataclass(kw_only=True)
class StandIn:
    """A built stand-in, and what it showed."""

    session: Session
    prompt: int
    """Tokens."""
    prices: Mapping[str, Pass]
    beside: int
    """Bytes of the stand-ins that were there before it."""
    peak_bytes: int = 0
    runs: list[Figures] = field(default_factory=list)

    def warm_up(self) -> None:
        """Answer once, and keep what memory that took: later ones would count in it."""
        self.peak_bytes = answer(self.session, self.prompt).peak_memory_bytes - self.beside

    def run(self) -> None:
        """Answer once, and keep how long that took."""
        self.runs.append(answer(self.session, self.prompt))

    @property
    def spread(self) -> float:
        """Return how many times as long the slowest run took as the fastest, per token."""
        speeds = [run.tokens_per_second or 1.0 for run in self.runs]
        return max(speeds) / min(speeds)

    def measured(self) -> Measured:
        """Return medians of all runs, and the fastest."""
        runs = {
            "prompt": [run.time_to_first_token for run in self.runs],
            "token": [1 / (run.tokens_per_second or 1.0) for run in self.runs],
        }
        return Measured(
            prices=self.prices,
            seconds={name: statistics.median(taken) for name, taken in runs.items()},
            least={name: min(taken) for name, taken in runs.items()},
            peak_bytes=self.peak_bytes,
        )


def calibrate(
    recipe: Recipe, *, progress: Callable[[str], None] = lambda step: None
) -> Calibration:
    """Measure what this machine does with the choices of a recipe, and keep it.

    Raises:
        RecipeError: when the choices do not run on a stand-in here.
        EngineError: when the figures cannot be kept.
    """
    ensure_writable()
    with standing_in(recipe, progress=progress) as models:
        for turn in range(ROUNDS):
            progress(f"measuring, turn {turn + 1} of {ROUNDS}")
            for model in models.values():
                model.run()
        return remember(recipe, models)


@contextmanager
def standing_in(
    recipe: Recipe, *, progress: Callable[[str], None] = lambda step: None
) -> Iterator[Mapping[str, StandIn]]:
    """Build the stand-ins for a recipe's model, and let each answer once.

    Raises:
        RecipeError: when the choices do not run on a stand-in here.
    """
    rig = _rig()
    with ExitStack() as stack:
        found: dict[str, StandIn] = {}
        for name, size in rig.sizes.items():
            progress(f"building a {name} model")
            folder = stack.enter_context(_folder(size, positions=rig.prompt + LIMIT))
            beside = sum(sum(each.prices["prompt"].held.values()) for each in found.values())
            changed = _stand_in(recipe, folder, rig.prompt)
            found[name] = stack.enter_context(_built(changed, rig.prompt, beside))
        yield found


def remember(recipe: Recipe, models: Mapping[str, StandIn]) -> Calibration:
    """Fit figures to what the stand-ins showed of this machine, and keep them."""
    kind = detect().kind
    reading = None if kind == "cpu" else _reading(kind)
    shown = {name: each.measured() for name, each in models.items()}
    found = replace(
        fit(shown, _rig().points, reading), spread=max(each.spread for each in models.values())
    )
    dtype = models["narrow"].prices["token"].context.dtype or "float32"
    save(recipe, dtype, found)
    return found


def _rig() -> Rig:
    return RIGS["cpu" if detect().kind == "cpu" else "cuda"]


def _reading(kind: str) -> float:
    """Return the bytes per second of a product by a matrix, as a step of one token is."""
    import torch

    matrix = torch.ones(MATRIX, MATRIX, dtype=torch.float16, device=kind)
    vector = torch.ones(MATRIX, dtype=torch.float16, device=kind)
    seconds = []
    for _ in range(ROUNDS + 1):
        torch.accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            matrix @ vector
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return PRODUCTS * matrix.nbytes / statistics.median(seconds[1:])


def _stand_in(recipe: Recipe, folder: Path, prompt: int) -> Recipe:
    """Return the recipe with a stand-in for its model, its checkpoint and its lengths."""
    from engine.recipe import compose

    plain = compose("base", [f"model.path={folder}", "load=random", "load.on_device=true"])
    asked: Any = recipe.decode
    # A context of its own would be another one there.
    cache: Any = recipe.cache
    if getattr(cache, "max_tokens", None):
        cache = replace(cache, max_tokens=None)
    return replace(
        recipe,
        model=Model(path=str(folder), dtype=recipe.model.dtype),
        target=Target(),
        load=plain.load,
        heads=plain.heads,
        cache=cache,
        decode=replace(asked, max_new_tokens=NEW, stop=[]),
        task=plain.task,
        observe=None,
        workload=Workload(batch=1, prompt_tokens=prompt),
        choices={**recipe.choices, "load": "random", "heads": "native"},
    )


@contextmanager
def _built(recipe: Recipe, prompt: int, beside: int) -> Iterator[StandIn]:
    from engine.builder import build

    with ExitStack() as stack:
        try:
            session = stack.enter_context(build(recipe))
            pricer = Pricer(recipe, session.hooks, session.shape, detect(), None)
            prices = {
                "prompt": pricer.prompt(1, prompt, NEW),
                "token": pricer.token(1, prompt, NEW, at=NEW // 2),
            }
            made = StandIn(session=session, prompt=prompt, prices=prices, beside=beside)
            made.warm_up()
        except EngineError as error:
            problems = [
                Problem(
                    message=f"these choices do not run on a stand-in here: {problem.message}",
                    hint=problem.hint,
                    code="calibration",
                    slot=problem.slot,
                )
                for problem in error.problems
            ]
            raise RecipeError(problems) from error
        yield made


def answer(session: Session, tokens: int) -> Figures:
    """Answer a prompt of so many tokens, and return the figures."""
    from engine import generate

    ids = [3 + n % (VOCABULARY - 3) for n in range(tokens)]
    values, room = generate.begin(session, ids)
    clock, last = generate.Clock(session), None
    new = min(int(session.recipe.decode.max_new_tokens), room)
    count = 0
    for step in generate.steps(session, [ids], values.cache, new, clock):
        last, count = step, count + 1
    return clock.figures(tokens, count, last)


@contextmanager
def _folder(size: tuple[int, int, int], positions: int) -> Iterator[Path]:
    """Write config and tokenizer of a stand-in."""
    hidden, inner, layers = size
    head = min(max(hidden // 16, 32), 128)  # as most models of such sizes have it
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": max(hidden // head // 4, 1),
        "head_dim": head,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    with tempfile.TemporaryDirectory(prefix="engine-calibrate-") as folder:
        place = Path(folder)
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for each in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shipped_folder() / "embedded" / each, place / each)
        yield place
