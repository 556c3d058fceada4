"""decode=compiled: one token after the other, each by a compiled step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import which
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import CheckContext, DecodeContext, Decoder, Generation, Receipt
from engine.decoding.loop import Run, TokenDecoder, rehearsal
from engine.decoding.sampling import Sampling
from engine.errors import Problem, RuntimeFailure
from engine.rules import Rule

if TYPE_CHECKING:
    from engine.session import Session

MOST_GRAPHS = 1000
COMPILERS = ("g++", "c++", "clang++")
GROWING = Rule(
    code="compiled-growing-cache",
    why="it gives each token other shapes, for each of which a GPU records a graph of its own, and "
    "transformers compiles no step on such a cache",
    hint="cache=static",
    source="maybe_warning_due_to_dynamic_shape in torch/_inductor/cudagraph_utils.py; "
    "DynamicLayer.is_compileable of transformers",
    seen="transformers 5.23.0, torch 2.13.0, 2026-11-22",
)
ALIBI = Rule(
    code="compiled-alibi",
    why="the model cuts its ALiBi biases to the tokens in the cache, a number that its code looks "
    "up in a tensor, and a compiled step cannot",
    hint="decode=generate",
    source="MptAttention.forward in transformers' modeling_mpt.py",
    seen="transformers 5.23.0, torch 2.13.0, 2026-11-22",
)
DYNAMIC_ROPE = Rule(
    code="compiled-dynamic-rope",
    why="its frequencies are made anew where the text has grown, which the code decides by looking "
    "at a tensor, and a compiled step cannot",
    hint="decode=generate",
    source="dynamic_frequency_update in transformers' modeling_rope_utils.py",
    seen="transformers 5.23.0, torch 2.13.0, 2026-11-22",
)
OWN_CACHE = Rule(
    code="compiled-own-cache",
    why="its steps read from a cache of fixed size, and there is none that the model's code takes",
    hint="decode=generate",
    source="STATIC_LAYER_TYPE_MAPPING and StaticLayer in cache_utils.py of transformers",
    seen="transformers 5.23.0, 2026-11-28",
)


@dataclass
class Compiled(Sampling):
    """Decode as decode=generate does, with the step of one token compiled by torch.compile.

    The prompt goes to the model as it is; steps read from a cache of fixed size (cache=static), so
    that their shapes stay the same. On a GPU they are replayed as CUDA graphs. Ansel et al. 2024,
    doi 10.1145/3620665.3640366. The first answers wait for the compiler, tens of seconds; it
    compiles again for another batch, and once for another length of the cache. On a CPU it needs
    a C++ compiler.
    """

    needs: ClassVar[Mapping[str, Rule]] = {"cache.static": GROWING}
    excludes: ClassVar[Mapping[str, Rule]] = {
        "model.alibi": ALIBI,
        "model.own_cache": OWN_CACHE,
        "model.own_layers": OWN_CACHE,
        "model.bias_by_mask": OWN_CACHE,
    }

    @property
    def provides(self) -> tuple[str, ...]:
        """Say that steps are compiled."""
        return (*super().provides, "decode.compiled")

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a machine that cannot compile, and a model that cannot be compiled."""
        yield from super().check(context)
        if context.shape is not None and context.shape.rope_type == "dynamic":
            what = (
                f"decode=compiled does not work with the dynamic NTK of {context.shape.model_type}"
            )
            yield DYNAMIC_ROPE.problem("decode", what)
        if "target.cpu" in context.traits and not any(map(which, COMPILERS)):
            yield Problem(
                slot="decode",
                code="no-compiler",
                message="decode=compiled needs a C++ compiler on a CPU, and none of "
                f"{', '.join(COMPILERS)} is here",
                hint="apt-get install g++, or decode=generate",
            )

    @hookimpl
    def decode(self, context: DecodeContext) -> Decoder:
        """Give a decoder; it compiles when the first step comes."""
        return CompiledDecoder(self, context)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count what torch compiled, in a short run and since."""
        decoder = session.built["decode"]
        if not decoder.steps:
            decoder.warm_up(session)
        found = decoder.counters
        yield Receipt(
            slot="decode",
            claim="steps of one token are compiled",
            evidence={
                "compiled steps": decoder.steps,
                "graphs": found["graphs"],
                "operators in them": found["operators"],
                "graph breaks": found["graph breaks"],
                "compiled again": max(found["graphs"] - 1, 0),
                "oneDNN in the steps": decoder.onednn,
            },
            ok=min(found["graphs"], found["operators"], decoder.steps) > 0
            and not found["graph breaks"],
        )


class CompiledDecoder(TokenDecoder):
    """Call the compiled forward in steps of one token."""

    def __init__(self, options: Compiled, context: DecodeContext) -> None:
        import torch

        super().__init__(options, context)
        on_gpu = context.model.device.type == "cuda"
        self._forward: Any = torch.compile(
            _of_its_own(context.model.forward),
            fullgraph=True,
            mode="reduce-overhead" if on_gpu else None,
        )
        self._on_gpu = on_gpu
        # Its product of a matrix and one row in 16 bits is slower than the plain one (torch 2.13).
        self.onednn = not (context.model.device.type == "cpu" and context.model.dtype.itemsize == 2)
        self.steps = 0
        self.counters: Counter[str] = Counter()

    def start(self, generation: Generation) -> Run:
        """Prepare one generation whose steps are compiled."""
        run = super().start(generation)
        run.call = self._step
        return run

    def _step(self, **inputs: Any) -> Any:
        import torch

        model: Any = self.context.model
        if self._on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # Through the model's own call: its hooks, which count tokens, are not compiled.
        own = vars(model).get("forward")
        model.forward = self._forward
        try:
            # Beyond the limit torch would refuse to go on; batches of nine sizes reach it.
            limit = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)
            with limit, _counted(self.counters), _onednn(self.onednn):
                found = model(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeFailure(
                f"the step of {type(model).__name__} cannot be compiled: {error!s:.300}",
                hint="decode=generate",
            ) from error
        finally:
            if own is None:
                del model.forward
            else:
                model.forward = own
        self.steps += 1
        return found

    def warm_up(self, session: Session) -> None:
        """Answer a short prompt."""
        for _ in self(rehearsal(session, new=3)):
            pass


def _of_its_own(function: Any) -> Any:
    """Return a function that does the same, with code of its own.

    torch keeps what it compiles by code: that of the model's class would be one for all sessions,
    and one session would run, or count, what another has compiled.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = step.__code__.replace()
    return FunctionType(code, step.__globals__, closure=step.__closure__)


@contextmanager
def _onednn(enabled: bool) -> Iterator[None]:
    import torch

    flags: Any = torch.backends.mkldnn  # whose own context manager warns of formats of Intel GPUs
    before = flags.set_flags(enabled and flags.enabled, _fp32_precision=None)
    try:
        yield
    finally:
        flags.set_flags(before[0], _fp32_precision=None)


@contextmanager
def _counted(found: Counter[str]) -> Iterator[None]:
    """Add up what torch.compile does meanwhile."""
    from torch._dynamo.utils import counters

    before = _now(counters)
    try:
        yield
    finally:
        found.update({name: value - before[name] for name, value in _now(counters).items()})


def _now(counters: Any) -> dict[str, int]:
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "operators": counters["stats"]["calls_captured"],
        "graph breaks": sum(counters["graph_break"].values()),
    }
