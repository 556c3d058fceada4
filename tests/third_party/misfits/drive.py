"""Build recipes one after the other in one process, and print what became of each, as JSON.

python drive.py MODEL < CASES, where CASES is a list of lists of overrides. After each the same
good recipe is built and run: whatever went wrong before, it must give the same tokens.
"""

import json
import sys
from io import StringIO
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import engine
from engine.errors import EngineError

PROMPT = "def add(a, b):"


def attempt(words: list[str]) -> dict[str, Any]:
    """Build and run a recipe, and say how that went."""
    try:
        with engine.build(engine.compose("base", words)) as session:
            return {"tokens": session.generate(PROMPT).token_ids}
    except EngineError as error:
        return {"code": error.exit_code, "message": str(error)}
    except BaseException as error:
        return {"code": 1, "message": f"{type(error).__name__}: {error}"}


def left_behind() -> list[str]:
    """Return what sessions registered with transformers and did not take back."""
    interfaces = (AttentionInterface, AttentionMaskInterface)
    names = [name for each in interfaces for name in each._global_mapping]
    return [
        name for name in [*names, *AUTO_QUANTIZER_MAPPING] if "engine" in name or "acme" in name
    ]


def main() -> None:
    """Run the cases that come on standard input."""
    common = [f"model.path={sys.argv[1]}", "model.dtype=float32", "decode.max_new_tokens=5"]
    answers, sys.stdout = sys.stdout, StringIO()  # libraries may print
    found = []
    for case in json.load(sys.stdin):
        result = attempt([*common, *case])
        found.append({**result, "after": attempt(common), "left": left_behind()})
    json.dump(found, answers)


if __name__ == "__main__":
    main()
