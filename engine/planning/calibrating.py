"""Measure this machine: run a recipe's choices on stand-ins of several sizes, and fit the figures.

What a step of a narrow model takes is starting operators; of two such models the deeper one tells
how long that takes. What a wide model takes more is moving weights, and in the pass of a prompt,
arithmetic. The stand-ins are Llamas with random weights, and go through the engine as any model.
They take turns, so that a machine that is slower for a while is so for all of them.

A GPU moves the weights of a stand-in while operators are started, which then does not show: there
a product by a large matrix tells how fast it reads.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contexts import UNPACKING
from engine.errors import EngineError, Problem, RecipeError
from engine.planning.calibration import Calibration, Point, ensure_writable, save
from engine.planning.passes import Pass, Pricer
from engine.recipe import Model, Recipe, Workload, shipped_folder
from engine.target import Target, detect

if TYPE_CHECKING:
    from engine.contexts import Figures
    from engine.session import Session

NEW = 16
"""Tokens of the answers."""
REPEATS = 20
"""Steps in which bandwidth and arithmetic are told apart."""
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


@dataclass(frozen=True)
class Measured:
    """What one stand-in took."""

    prices: Mapping[str, Pass]
    """'prompt', 'token' → what the plan counts in their passes."""
    seconds: Mapping[str, float]
    """The same → medians."""
    least: Mapping[str, float]
    """The same → those of the fastest run."""
    peak_bytes: int
    """In the long prompt's run."""


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


def fit(
    found: Mapping[str, Measured], names: Sequence[str], reading: float | None = None
) -> Calibration:
    """Return the figures that give back what the stand-ins took.

    Args:
        names: of those that tell bandwidth and arithmetic.
        reading: bytes per second of a device that reads while operators are started.
    """
    launch, fixed = _launching(found["narrow"], found["deep"])
    reserve, retained = None, 1.0  # what an allocator of the device counts is tensors alone
    if reading is None:
        reserve, retained = _memory(found["narrow"], found["wide"])
        points = tuple(_point(found[name], launch, fixed) for name in names)
    else:
        beside = _beside_prompts(found["narrow"], found["deep"])
        points = tuple(_point_of_prompt(found[name], beside, reading) for name in names)
    return Calibration(
        launch=launch,
        fixed=fixed,
        points=points,
        reserve=reserve,
        retained=retained,
        measured=date.today().isoformat(),
    )


def _launching(narrow: Measured, deep: Measured) -> tuple[float, float]:
    """Return the seconds of an operator, and those of a pass beside."""
    ours, theirs = (_work(each.prices["token"])[0] for each in (narrow, deep))
    taken = deep.seconds["token"] - narrow.seconds["token"]
    launch = max(taken / (theirs - ours), 1e-7)
    fixed = narrow.seconds["token"] - launch * ours
    if fixed < 0:  # the machine was slower when it was the deep one's turn
        return deep.seconds["token"] / theirs, 0.0
    return launch, fixed


def _beside_prompts(narrow: Measured, deep: Measured) -> float:
    """Return the seconds of a long prompt's pass that are neither operators' nor the device's.

    Of the fastest runs: of a busy computer's others show that it starts operators more slowly.
    """
    launch, _ = _launching(*(replace(each, seconds=each.least) for each in (narrow, deep)))
    return max(narrow.least["prompt"] - launch * _work(narrow.prices["prompt"])[0], 0.0)


def _point(measured: Measured, launch: float, fixed: float) -> Point:
    """Return bandwidth and arithmetic: two unknowns, of a token's pass and a long prompt's."""
    passes = [(measured.prices[name], measured.seconds[name]) for name in ("token", "prompt")]
    rests = [
        max(seconds - fixed - launch * _work(priced)[0], seconds / 20) for priced, seconds in passes
    ]
    (_, moved, _), (_, _, flops) = (_work(priced) for priced, _ in passes)
    per_byte, per_flop = rests[0] / moved, rests[1] / flops
    for _ in range(REPEATS):
        # What one term moves and computes goes on at once: the slower of the two counts.
        (moved, few), (more, flops) = (_slower(priced, per_byte, per_flop) for priced, _ in passes)
        if moved:
            per_byte = max(rests[0] - few * per_flop, rests[0] / 20) / moved
        if flops:
            per_flop = max(rests[1] - more * per_byte, rests[1] / 20) / flops
    return Point(bytes=passes[0][0].weight_bytes, bandwidth=1 / per_byte, flops=1 / per_flop)


def _point_of_prompt(measured: Measured, beside: float, reading: float) -> Point:
    """Return the arithmetic, of a device whose bandwidth is known and that waits for nothing."""
    priced, seconds = measured.prices["prompt"], measured.least["prompt"] - beside
    per_flop = 1e-15
    for _ in range(REPEATS):
        moved, flops = _slower(priced, 1 / reading, per_flop)
        per_flop = max(seconds - moved / reading, seconds / 20) / flops
    return Point(bytes=measured.prices["token"].weight_bytes, bandwidth=reading, flops=1 / per_flop)


def _slower(priced: Pass, per_byte: float, per_flop: float) -> tuple[float, float]:
    """Return the bytes of the terms that wait for memory, and the operations of those that do not.

    Args:
        per_byte: seconds to move one.
        per_flop: seconds of an operation.
    """
    moved, flops = 0.0, 0.0
    for term in priced.terms:
        if term.rate == UNPACKING or term.moved * per_byte >= term.flops * per_flop:
            moved += term.moved
        else:
            flops += term.flops
    return moved, flops


def _memory(narrow: Measured, wide: Measured) -> tuple[int, float]:
    """Return what the process takes, and what it keeps of a byte that passes."""
    held = [sum(each.prices["prompt"].held.values()) for each in (narrow, wide)]
    passing = [sum(each.prices["prompt"].passing.values()) for each in (narrow, wide)]
    rest = [each.peak_bytes - size for each, size in zip((narrow, wide), held, strict=True)]
    retained = max((rest[1] - rest[0]) / max(passing[1] - passing[0], 1), 1.0)
    return max(int(rest[0] - retained * passing[0]), 0), retained


def _work(priced: Pass) -> tuple[float, float, float]:
    """Return operators, bytes and operations of a pass."""
    launches = sum(term.launches for term in priced.terms)
    moved = sum(term.moved for term in priced.terms)
    return launches, moved, sum(term.flops for term in priced.terms)


def _reading(kind: str) -> float:
    """Return the bytes per second of a product by a matrix, as a step of one token is."""
    import torch

    matrix = torch.ones(MATRIX, MATRIX, dtype=torch.float16, device=kind)
    vector = torch.ones(MATRIX, dtype=torch.float16, device=kind)
    seconds = []
    for _ in range(ROUNDS + 1):
        torch.accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(REPEATS):
            matrix @ vector
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return REPEATS * matrix.nbytes / statistics.median(seconds[1:])


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
