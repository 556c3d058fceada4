"""Refuse packed layers that this CPU does not multiply rightly, and name them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from engine.errors import Problem, RecipeError
from engine.quantizing import pricing, remembered, trial
from engine.quantizing.libraries import packed
from engine.quantizing.trial import Case
from engine.target import is_here

if TYPE_CHECKING:
    from engine.contexts import CheckContext, PrepareContext

Cases = Callable[[Mapping[str, tuple[int, int]], str], Mapping[str, Case]]
"""(layer → outputs and inputs, number format of the model) → what is to be tried of each."""

MOST = 3
"""Reasons that are told."""


def refuse_known(
    context: CheckContext,
    cases: Cases,
    who: str,
    *,
    kinds: Collection[str],
    skip: Sequence[str],
    instead: str = "quantize=none",
    hint: str = "",
) -> Iterator[Problem]:
    """Try the layers of a model that is to run on this CPU, as far as known, and refuse it.

    Args:
        who: what packs them, as the subject of a sentence.
        kinds: classes of layers that are packed.
        skip: patterns of layers that are left alone.
        instead: what to type where no layer is right; else those that fail are to be skipped.
        hint: what to type in any case.
    """
    shape = context.reshaped
    if shape is None or context.target.kind != "cpu" or not is_here(context.target):
        return
    if shape.quantization and not shape.blueprint:
        return  # of a packed checkpoint the files do not tell
    layers = pricing.to_pack(shape, kinds=kinds, skip=skip)
    sizes = {name: (weight.rows, weight.columns) for name, weight in layers.items()}
    known = cases(sizes, context.dtype or "float32")
    yield from _problems(known, who, None if shape.quantization else skip, hint, instead)


def refuse_loaded(
    context: PrepareContext,
    cases: Cases,
    who: str,
    *,
    skip: Sequence[str] | None,
    instead: str = "quantize=none",
    hint: str = "",
) -> None:
    """Do the same with the packed layers of a loaded model; note what could not be tried.

    Args:
        skip: patterns of layers that are left alone; None where the checkpoint came packed.

    Raises:
        RecipeError: where a layer fails.
    """
    found = loaded(context, cases)
    if problems := list(_problems(found, who, skip, hint, instead)):
        raise RecipeError(problems)


def loaded(context: PrepareContext, cases: Cases) -> Mapping[str, Case]:
    """Return the packed layers of a loaded model that are on the CPU; note what cannot be tried."""
    found = cases(packed(context.model), str(context.model.dtype).removeprefix("torch."))
    tried = trial.faults(found.values())
    untried = {name: case for name, case in found.items() if case not in tried}
    if untried:
        context.notes.append(
            f"whether this CPU multiplies rightly in {listed(untried)} could not be tried: the "
            "process that does it did not start, or was killed"
        )
    return found


def _problems(
    cases: Mapping[str, Case], who: str, skip: Sequence[str] | None, hint: str, instead: str
) -> Iterator[Problem]:
    wrong = failing(cases)
    if not wrong:
        return
    right = cases.keys() - wrong.keys()
    if right:
        ends = sorted({_end(name, right) for name in wrong})
        instead = f"quantize.skip_modules=[{','.join([*(skip or ()), *ends])}]"
    if skip is None:
        instead = f"the original checkpoint: model.path=FOLDER_OR_HUB_ID {instead}"
    case = cases[next(iter(wrong))]
    versions = ", ".join(f"{each} {remembered.version(each)}" for each in (case.library, "torch"))
    yield Problem(
        slot="quantize",
        code="fails-on-this-cpu",
        message=f"{who} does not work on this CPU in "
        f"{listed({name: cases[name] for name in wrong}, right)}: tried here, {reasons(wrong)}",
        hint=hint or instead,
        source=f"a trial on this machine ({remembered.cpu()}) with {versions}",
    )


def failing(cases: Mapping[str, Case]) -> dict[str, str]:
    """Try layers, unless that was done before, and return what went wrong with which."""
    tried = trial.faults(cases.values())
    return {name: tried[case] for name, case in cases.items() if tried.get(case)}


def reasons(wrong: Mapping[str, str]) -> str:
    """Phrase what went wrong in trials, each reason once."""
    return "; ".join([*dict.fromkeys(wrong.values())][:MOST])


def listed(cases: Mapping[str, Case], others: Collection[str] = ()) -> str:
    """Name layers by the ends of their names that none of the others has."""
    ends = {_end(name, others): case.inputs for name, case in cases.items()}
    return ", ".join(f"{end} ({inputs} inputs)" for end, inputs in sorted(ends.items()))


def _end(name: str, others: Collection[str]) -> str:
    """Return the shortest end of a name that none of the others has."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if not any(each.endswith(end) for each in others)), name)
