"""Send the smallest input through a built model and write down what really ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from engine.errors import PluginError, Problem, RuntimeFailure

if TYPE_CHECKING:
    from transformers import Cache

    from engine.session import Session

PROMPT_TOKENS = 8


@dataclass
class Probe:
    """What one short prefill and one decoding step showed."""

    operators: Counter[str] = field(default_factory=Counter)
    """Every torch operator that ran, by schema name ('aten::_softmax'), and how often."""
    cache: Cache | None = None
    tokens: list[int] = field(default_factory=list)
    """Tokens given to the model, per call."""
    attention_calls: int = 0
    """How often the plugin's own attention forward ran."""

    def calls(self, *parts: str) -> int:
        """Return how often operators ran whose names have one of these in them."""
        return sum(
            count for name, count in self.operators.items() if any(part in name for part in parts)
        )

    @property
    def kept(self) -> dict[str, str | int]:
        """Return what lies in the cache, counted in its tensors, and how many tokens were sent."""
        from engine.caching.measuring import measure

        return measure(self.cache) | {"tokens sent": sum(self.tokens)}


def probe_model(session: Session) -> Probe:
    """Run a prefill and a decoding step, counting operators.

    Raises:
        RuntimeFailure: when the logits are not finite.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = Probe()

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found.operators[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    ids = (torch.arange(PROMPT_TOKENS, device=session.device) % session.embedding_rows)[None]
    found.cache = session.new_cache(1, PROMPT_TOKENS + 2).cache
    options = {"past_key_values": found.cache, "use_cache": found.cache is not None}
    before = session.attention_calls
    with torch.no_grad(), Count():  # type: ignore[no-untyped-call]
        logits = session.model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
        found.tokens.append(ids.shape[1])
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1)
        step = ids[:, -1:] if found.cache is not None else ids
        last = session.model(input_ids=step, attention_mask=torch.ones_like(ids), **options).logits
        found.tokens.append(step.shape[1])
    found.attention_calls = session.attention_calls - before
    bad = int((~torch.isfinite(last)).sum()) + int((~torch.isfinite(logits)).sum())
    if bad:
        raise RuntimeFailure(
            Problem(
                message=f"{bad} of {last.numel() + logits.numel()} logits of a short probe are NaN "
                f"or infinite in {session.model.dtype}",
                hint="model.dtype=float32, or bfloat16 where float16 overflows; "
                "quantize=none tells whether quantizing is the cause",
                code="logits-not-finite",
            )
        )
    return found


def verify_carrying(session: Session) -> None:
    """Have tokens that come one by one give what they give together, where code may lose a state.

    Raises:
        RuntimeFailure: when they do not, or another conversation gets in.
    """
    if not session.carrying.by_steps:
        share = session.carrying.lost_by_steps
        raise RuntimeFailure(
            Problem(
                message=f"the code of {session.shape.model_type} does not go on from this cache: "
                f"of what earlier tokens do to the next, {share:.0%} is lost or another "
                "conversation's",
                hint="cache=none, which sends all tokens again for each new one",
                code="state-lost",
                slot="cache",
            )
        )


@contextmanager
def failing_together(session: Session) -> Iterator[None]:
    """Take the blame from the task for what fails inside of the model: it only called it.

    Raises:
        RuntimeFailure: when the model's own code failed, and no other plugin's.
    """
    try:
        yield
    except PluginError as refusal:
        error = refusal.__cause__
        place = error and _place_in_model(session, error)
        if not place or refusal.problems[0].slot != "task":
            raise
        choices = " ".join(f"{slot}={name}" for slot, name in session.recipe.choices.items())
        what = next(iter(str(error).splitlines()), "")
        raise RuntimeFailure(
            Problem(
                message=f"this combination fails in {place}: {type(error).__name__}: {what:.300} "
                f"({choices})",
                hint="change one choice at a time to find the pair; and report it, with this "
                "message: `engine check` should have refused it",
                code="probe-failed",
            )
        ) from error


def _place_in_model(session: Session, error: BaseException) -> str:
    """Return where in the model's code an error arose; '' when the model was not running."""
    frames = list(walk_tb(error.__traceback__))
    model = session.model
    entered = [n for n, (frame, _) in enumerate(frames) if frame.f_locals.get("self") is model]
    if not entered:
        return ""
    code = ("transformers.", type(model).__module__)
    own = [
        (frame, line)
        for frame, line in frames[entered[0] :]
        if str(frame.f_globals.get("__name__", "")).startswith(code)
    ]
    frame, line = own[-1] if own else frames[-1]
    return f"{Path(frame.f_code.co_filename).name}:{line} ({frame.f_code.co_qualname})"
