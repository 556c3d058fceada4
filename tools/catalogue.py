"""Generate the catalogue of small Python functions that the embedded model learns.

A family is a table of slots (which numbers to keep, what to do with them, what to return, ...)
and a writer that turns one choice per slot into a name, a docstring, a question and a body.
A choice of slots is a *combination*; a stable hash of the body it stands for decides whether it is
held out, so a held-out function was never trained in any phrasing and has to be composed.
Everything is drawn from a seeded generator: the same seed gives the same text everywhere.
"""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

END = "<|end|>"
HELD_OUT_PERCENT = 8
GUIDE_SHARE = 0.01
# Parts of the standard library that are tables or tests, or that not every installation has.
LEFT_OUT = {
    *("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"),
    *("pydoc_data", "ensurepip", "__pycache__"),
}

Pick = Callable[[Sequence[str]], str]
Choice = dict[str, "Option"]


@dataclass(frozen=True)
class Option:
    """Hold one value of a slot: its key, its code and the ways to say it."""

    key: str
    code: str = ""
    says: tuple[str, ...] = ("",)
    change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Function:
    """Hold one rendered function: its text in parts, its question and its test inputs."""

    name: str
    params: tuple[str, ...]
    doc: str
    ask: str
    body: str
    inputs: tuple[tuple[Any, ...], ...]
    preamble: str = ""

    @property
    def head(self) -> str:
        """Return the imports, the signature and the docstring, without a final line break."""
        start = f"{self.preamble}\n\n\n" if self.preamble else ""
        return f'{start}def {self.name}({", ".join(self.params)}):\n    """{self.doc}"""'

    @property
    def code(self) -> str:
        """Return the whole function."""
        return f"{self.head}\n{textwrap.indent(self.body, '    ')}"


@dataclass(frozen=True)
class Family:
    """Hold a table of slots and the writer that renders one choice of them."""

    name: str
    weight: float
    slots: dict[str, tuple[Option, ...]]
    write: Callable[[Choice, Pick], Function]
    valid: Callable[[Choice], bool] = lambda choice: True
    split: bool = True
    always: tuple[str, ...] = ()

    def key(self, choice: Choice) -> str:
        """Return the stable key of a combination."""
        return "|".join([self.name, *(choice[slot].key for slot in self.slots)])

    def held_out(self, choice: Choice) -> bool:
        """Tell whether a combination is kept away from training."""
        if not self.split or self.key(choice) in self.always:
            return False
        body = f"{self.name}\n{self.write(choice, canonical).body}"
        digest = hashlib.sha256(body.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT

    def draw(self, rng: random.Random, held_out: bool) -> Choice:
        """Draw one valid combination from one side of the split."""
        while True:
            choice = {slot: rng.choice(options) for slot, options in self.slots.items()}
            if self.valid(choice) and self.held_out(choice) == held_out:
                return choice


def some(key: str, code: str = "", says: str = "", change: str = "") -> Option:
    """Make an option from texts whose alternatives are separated by bars."""
    changes = tuple(change.split("|")) if change else ()
    return Option(key, code, tuple(says.split("|")), changes)


def each(
    values: Iterable[object], key: str, code: str = "", says: str = "", change: str = ""
) -> list[Option]:
    """Make one option per value: % stands for the value in all texts."""
    return [some(*(t.replace("%", str(v)) for t in (key, code, says, change))) for v in values]


def canonical(options: Sequence[str]) -> str:
    """Pick the first way to say something: the way that answers are written."""
    return options[0]


def finish(
    names: Sequence[str],
    params: dict[str, str],
    doc: str,
    body: str,
    inputs: Sequence[tuple[Any, ...]],
    pick: Pick,
    preamble: str = "",
) -> Function:
    """Fill the parameters ($0, $1, ...) of a text: names in the code, nouns in the question."""
    ask = doc
    for place, (param, noun) in enumerate(params.items()):
        doc, ask = doc.replace(f"${place}", param), ask.replace(f"${place}", noun)
        body = body.replace(f"${place}", param)
    plain = ("compute", "solve", "process", "func")
    name = pick((*names, *names, pick(plain)))
    ask = re.sub(r"^\w+", lambda verb: f"{verb[0].lower()}s", ask)
    return Function(name, tuple(params), f"{doc}.", ask, body, tuple(inputs), preamble)


def join_name(*parts: str) -> str:
    """Join the parts of an identifier, leaving out the empty ones."""
    return re.sub(r"\W+", "_", "_".join(part for part in parts if part)).strip("_").lower()


# Tests of a number: @ is the number. `says` are adjectives; those of SIMPLE go before the noun.
SIMPLE = ("even", "odd", "positive", "negative")
BOUNDS = (*range(1, 21), 25, 30, 50, 100)
TOTAL = "Return, with a loop, the sum of #"
LOOP = "result = {}\nfor x in SOURCE:\n    if TEST:\n        {}\nreturn result"
TESTS = (
    *[some("even", "@ % 2 == 0", "even")] * 6,
    *[some("odd", "@ % 2 != 0", "odd")] * 6,
    *[some("positive", "@ > 0", "positive")] * 5,
    *[some("negative", "@ < 0", "negative")] * 5,
    *each(BOUNDS, "greater than %", "@ > %", "greater than %|above %"),
    *each(BOUNDS, "less than %", "@ < %", "less than %|below %"),
    *each(BOUNDS, "at least %", "@ >= %", "at least %"),
    *each(BOUNDS, "at most %", "@ <= %", "at most %"),
    *(some(f"divisible by {n}", f"@ % {n} == 0", f"divisible by {n}") for n in range(3, 13)),
    *(
        some(f"not divisible by {n}", f"@ % {n} != 0", f"not divisible by {n}")
        for n in range(3, 13)
    ),
    *each(BOUNDS, "not %", "@ != %", "different from %|not %"),
    *(
        some(f"between {a} and {b}", f"{a} <= @ <= {b}", f"between {a} and {b}")
        for a in range(1, 10, 2)
        for b in (10, 12, 15, 20, 30, 50)
    ),
)
MAPS = (
    *[some("", "@", "#", "use the numbers themselves")] * 4,
    some("squares", "@**2", "the squares of #", "square the numbers first"),
    some("cubes", "@**3", "the cubes of #", "cube the numbers first"),
    some("doubles", "@ * 2", "the doubles of #|twice #", "double the numbers first"),
    some("halves", "@ / 2", "the halves of #", "halve the numbers first"),
    some("absolutes", "abs(@)", "the absolute values of #", "use the absolute values"),
    some("negatives", "-@", "the negatives of #", "negate the numbers first"),
    *each(range(1, 11), "plus %", "@ + %", "#, each increased by %", "add % to each one"),
    *each(range(1, 11), "minus %", "@ - %", "#, each decreased by %", "subtract % from each"),
    *each(range(3, 11), "times %", "@ * %", "#, each multiplied by %", "multiply each by %"),
)
# How to bring the kept numbers together: ~ is `M for x in SOURCE if TEST`.
REDUCERS = (
    some("sum", "return sum(~)", "Return the sum of #|Compute the sum of #"),
    some("list", "return [~]", "Return a list of #|Return #"),
    some("max", "return max(~)", "Return the maximum of #|Return the largest of #"),
    some("min", "return min(~)", "Return the minimum of #|Return the smallest of #"),
    some("mean", "kept = [~]\nreturn sum(kept) / len(kept)", "Return the mean of #"),
    some("sorted", "return sorted(~)", "Return a sorted list of #"),
    some("set", "return {~}", "Return a set of #"),
    some("first", "return next((~), None)", "Return the first of #"),
    some("count", "return sum(1 for x in SOURCE if TEST)", "Count #|Return the count of #"),
    some("any", "return any(TEST for x in SOURCE)", "Check whether any number ^"),
    some("all", "return all(TEST for x in SOURCE)", "Check whether every number ^"),
    some("product", LOOP.format("1", "result *= MAP"), "Return the product of #"),
    some("total", LOOP.format("0", "result += MAP").replace("result", "total"), TOTAL),
    some("collect", LOOP.format("[]", "result.append(MAP)"), "Return, with a loop, a list of #"),
)
SOURCES = (
    *[some("list", "$0", "in $0", "work on a list")] * 2,
    some("range", "range(1, $0 + 1)", "from 1 to $0", "work on the numbers from 1 to n"),
    some("dict", "$0.values()", "in the values of $0", "work on the values of a dictionary"),
)
NUMBER_LISTS: tuple[list[int], ...] = (
    list(range(-12, 61)),
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 100, 101, 99, -7],
    [25, 24, 26, 50, 49, 51, 10, 11, 12, 13, 20, 30, 31],
    [8, 6],
    [],
)


def described(test: Option, noun: str, pick: Pick) -> str:
    """Say which things are kept: `the even numbers`, `the numbers greater than 5`."""
    said = pick(test.says)
    if test.key in SIMPLE:
        return f"the {said} {noun}"
    return f"the {noun} " + pick(("", "that are ")) + said


def write_numbers(choice: Choice, pick: Pick) -> Function:
    """Write a function that keeps, changes and brings together numbers."""
    reduce, change, test, source = (choice[slot] for slot in ("reduce", "map", "test", "source"))
    noun = pick(("numbers", "numbers", "values", "elements"))
    kept = f"{described(test, noun, pick)} {source.says[0]}"
    said = f"is {pick(test.says)}"
    doc = pick(reduce.says).replace("#", pick(change.says).replace("#", kept))
    doc = doc.replace("^", f"{source.says[0]} {said}")
    loop = f"MAP for x in {source.code} if TEST"
    body = reduce.code.replace("~", loop).replace("SOURCE", source.code)
    body = body.replace("MAP", change.code).replace("TEST", test.code).replace("@", "x")
    params = {
        "range": {pick(("n", "n", "limit", "stop")): "n"},
        "dict": {pick(("mapping", "mapping", "scores", "d")): pick(("a dictionary", "a dict"))},
    }.get(
        source.key,
        {pick(("numbers", "numbers", "values", "data")): pick(("a list", "a list of numbers"))},
    )
    inputs: list[tuple[Any, ...]] = [(numbers,) for numbers in NUMBER_LISTS]
    if source.key == "range":
        inputs = [(n,) for n in (0, 1, 7, 12, 40, 120)]
    elif source.key == "dict":
        inputs = [({f"k{i}": n for i, n in enumerate(numbers)},) for numbers in NUMBER_LISTS]
    names = (
        join_name(reduce.key, change.key, test.key),
        join_name(reduce.key, "of", test.key, change.key),
    )
    return finish(names, params, doc, body, inputs, pick)


def valid_numbers(choice: Choice) -> bool:
    """Leave out changes of numbers that are only counted or tested, and the signs of 1 to n."""
    if choice["source"].key == "range" and choice["test"].key in ("positive", "negative"):
        return False
    return not (choice["reduce"].key in ("count", "any", "all") and choice["map"].key)


# Tests of a word: @ is the word.
LETTERS = "abcdefghilmnoprstuw"
WORD_TESTS = (
    *each(LETTERS, "start %", '@.startswith("%")', "starting with '%'"),
    *each(LETTERS, "end %", '@.endswith("%")', "ending with '%'"),
    *each(LETTERS, "with %", '"%" in @', "containing '%'"),
    *each(LETTERS, "without %", '"%" not in @', "not containing '%'"),
    *each(range(1, 10), "longer %", "len(@) > %", "longer than % letters"),
    *each(range(2, 11), "shorter %", "len(@) < %", "shorter than % letters"),
    *each(range(2, 10), "length %", "len(@) == %", "of exactly % letters|of length %"),
    some("upper case", "@.isupper()", "in upper case"),
    some("lower case", "@.islower()", "in lower case"),
    some("digits", "@.isdigit()", "made of digits"),
)
WORD_MAPS = (
    *[some("", "@", "#", "return the words themselves")] * 3,
    some("upper", "@.upper()", "#, in upper case", "use upper case"),
    some("lower", "@.lower()", "#, in lower case", "use lower case"),
    some("capitalized", "@.capitalize()", "#, capitalized", "capitalize the words"),
    some("reversed", "@[::-1]", "#, each reversed", "reverse each word"),
    some("lengths", "len(@)", "the lengths of #", "use the lengths of the words"),
    some("initials", "@[0]", "the first letters of #", "use the first letters"),
    some("last letters", "@[-1]", "the last letters of #", "use the last letters"),
)
SEPARATORS = ((" ", "spaces"), (", ", "commas"), ("-", "dashes"), ("_", "underscores"))
WORD_REDUCERS = (
    some("list", "return [~]", "Return a list of #|Return #"),
    some("sorted", "return sorted(~)", "Return a sorted list of #"),
    some("set", "return {~}", "Return a set of #"),
    some("first", "return next((~), None)", "Return the first of #"),
    some("count", "return sum(1 for w in SOURCE if TEST)", "Count #|Return the count of #"),
    some("longest", "return max((~), key=len)", "Return the longest of #"),
    *(
        some(f"join {said}", f'return "{sep}".join(~)', f"Return, joined with {said}, #")
        for sep, said in SEPARATORS
    ),
)
WORD_SOURCES = (
    some("list", "$0", "in $0", "work on a list of words"),
    some("text", "$0.split()", "in $0|of $0", "work on a text"),
)
WORDS = (
    "The cat sat on a mat and the dog barked at an enormous elephant 42 NASA 2024 go Europe",
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho",
    "upper LOWER Mixed wonderful international hello world program function recipe lid hub pop",
    "music leaf roof below epic mac of few graph bath who shelf cosmic window",
    "one",
    "",
)


def write_words(choice: Choice, pick: Pick) -> Function:
    """Write a function that keeps, changes and brings together words."""
    reduce, change, test, source = (choice[slot] for slot in ("reduce", "map", "test", "source"))
    noun = "words" if source.key == "text" else pick(("words", "words", "strings"))
    kept = f"the {noun} {pick(test.says)} {pick(source.says)}"
    doc = pick(reduce.says).replace("#", pick(change.says).replace("#", kept))
    loop = f"MAP for w in {source.code} if TEST"
    body = reduce.code.replace("~", loop).replace("SOURCE", source.code)
    body = body.replace("MAP", change.code).replace("TEST", test.code).replace("@", "w")
    if source.key == "text":
        params = {pick(("text", "text", "sentence")): pick(("a text", "a string"))}
        inputs: list[tuple[Any, ...]] = [(line,) for line in WORDS]
    else:
        params = {pick(("words", "words", "strings")): pick(("a list", "a list of strings"))}
        inputs = [(line.split(),) for line in WORDS]
    names = (join_name(reduce.key, change.key, test.key), join_name(test.key, reduce.key))
    return finish(names, params, doc, body, inputs, pick)


def valid_words(choice: Choice) -> bool:
    """Leave out changes of counted words and lengths where text is needed."""
    reduce, change = choice["reduce"].key, choice["map"].key
    if reduce == "count":
        return not change
    return change != "lengths" or not (reduce == "longest" or reduce.startswith("join"))


# Units: how many base units each is; of data, the power of 1024.
FACTORS = {
    "length": "meters millimeters:0.001 centimeters:0.01 kilometers:1000 inches:0.0254 "
    "feet:0.3048 yards:0.9144 miles:1609.344",
    "time": "seconds minutes:60 hours:3600 days:86400 weeks:604800",
    "mass": "grams milligrams:0.001 kilograms:1000 ounces:28.3495 pounds:453.592 tonnes:1000000",
    "volume": "liters milliliters:0.001 cups:0.2366 pints:0.4732 gallons:3.7854",
}
UNITS = {
    "data": (
        some("bytes", "0", "bytes"),
        some("kilobytes", "1", "kilobytes|Kilo bytes|KB"),
        some("megabytes", "2", "megabytes|Mega bytes|MB"),
        some("gigabytes", "3", "gigabytes|Giga bytes|GB"),
        some("terabytes", "4", "terabytes|Tera bytes|TB"),
        some("petabytes", "5", "petabytes|Peta bytes|PB"),
    ),
    "temperature": (
        some("celsius", "", "Celsius|degrees Celsius"),
        some("fahrenheit", "", "Fahrenheit|degrees Fahrenheit"),
        some("kelvin", "", "Kelvin"),
    ),
    **{
        kind: tuple(
            some(unit, factor, unit)
            for unit, _, factor in (unit.partition(":") for unit in units.split())
        )
        for kind, units in FACTORS.items()
    },
}
TEMPERATURES = {
    "celsius fahrenheit": "@ * 9 / 5 + 32",
    "celsius kelvin": "@ + 273.15",
    "fahrenheit celsius": "(@ - 32) * 5 / 9",
    "fahrenheit kelvin": "(@ - 32) * 5 / 9 + 273.15",
    "kelvin celsius": "@ - 273.15",
    "kelvin fahrenheit": "(@ - 273.15) * 9 / 5 + 32",
}
ROUNDED = ", rounded to % digits|, rounded to % decimal places"
ROUND = "round the result to % digits|round the result to % decimal places"
DIGITS = (
    some("", "@", "", "return the exact result|not round the result"),
    *each(range(2, 8), "round %", "round(@, %)", ROUNDED, ROUND),
)
SHAPES = (
    some("", "return @", "", "convert one value"),
    some("list", "return [@ for x in $0]", "a list of ", "work on a list"),
)
BASES = (
    some("1024", "1024", "", "use 1024 instead of 1000"),
    some("1000", "1000", " with 1000 bytes per kilobyte", "use 1000 instead of 1024"),
)


def write_units(choice: Choice, pick: Pick) -> Function:
    """Write a conversion from one unit to another."""
    start, goal, digits, shape = (choice[slot] for slot in ("from", "to", "digits", "shape"))
    if "base" in choice:
        power = int(goal.code) - int(start.code)
        factor = choice["base"].code + (f"**{abs(power)}" if abs(power) > 1 else "")
        value = f"@ {'/' if power > 0 else '*'} {factor}"
    elif f"{start.key} {goal.key}" in TEMPERATURES:
        value = TEMPERATURES[f"{start.key} {goal.key}"]
    else:
        value = "@" + (f" * {start.code}" if start.code else "")
        value += f" / {goal.code}" if goal.code else ""
    body = shape.code.replace("@", digits.code.replace("@", value))
    body = body.replace("@", "x" if shape.key else "$0")
    verb = pick(("Convert", "Transform", "Convert"))
    base = pick(choice["base"].says) if "base" in choice else ""
    said = f"{verb} {shape.says[0]}{pick(start.says)} to {pick(goal.says)}{base}"
    own = "num_bytes" if start.key == "bytes" else start.key
    param = pick((own, own, "value", "amount") if not shape.key else ("values", "values", "items"))
    names = (f"{start.key}_to_{goal.key}", f"convert_{start.key}_to_{goal.key}")
    single = [(0,), (1,), (32,), (100,), (2.5,), (123456789,), (-40,), (987654.321,)]
    inputs = [([value for (value,) in single],), ([],)] if shape.key else single
    return finish(names, {param: param}, f"{said}{pick(digits.says)}", body, inputs, pick)


def unit_family(name: str, weight: float) -> Family:
    """Build the conversions within one table of units."""
    options = UNITS[name]
    slots = {"from": options, "to": options, "digits": DIGITS, "shape": SHAPES}
    if name == "data":
        slots["base"] = BASES
    return Family(
        name,
        weight,
        slots,
        write_units,
        valid=lambda choice: choice["from"] != choice["to"],
        always=("data|bytes|gigabytes|||1024", "data|bytes|megabytes|||1024"),
    )


# Formulas: name, parameters, expression, what it is.
FORMULAS = (
    ("rectangle_area", "width height", "width * height", "the area of a rectangle"),
    ("rectangle_perimeter", "width height", "2 * (width + height)", "the perimeter of a rectangle"),
    ("square_area", "side", "side**2", "the area of a square"),
    ("square_perimeter", "side", "4 * side", "the perimeter of a square"),
    ("circle_area", "radius", "math.pi * radius**2", "the area of a circle"),
    ("circle_circumference", "radius", "2 * math.pi * radius", "the circumference of a circle"),
    ("triangle_area", "base height", "base * height / 2", "the area of a triangle"),
    ("trapezoid_area", "a b height", "(a + b) * height / 2", "the area of a trapezoid"),
    ("cube_volume", "side", "side**3", "the volume of a cube"),
    ("cube_surface", "side", "6 * side**2", "the surface of a cube"),
    ("box_volume", "width height depth", "width * height * depth", "the volume of a box"),
    ("sphere_volume", "radius", "4 / 3 * math.pi * radius**3", "the volume of a sphere"),
    ("sphere_surface", "radius", "4 * math.pi * radius**2", "the surface of a sphere"),
    (
        "cylinder_volume",
        "radius height",
        "math.pi * radius**2 * height",
        "the volume of a cylinder",
    ),
    ("cone_volume", "radius height", "math.pi * radius**2 * height / 3", "the volume of a cone"),
    ("hypotenuse", "a b", "math.sqrt(a**2 + b**2)", "the hypotenuse of a right triangle"),
    ("average", "a b", "(a + b) / 2", "the average of two numbers"),
    ("difference", "a b", "abs(a - b)", "the absolute difference of two numbers"),
    ("speed", "distance time", "distance / time", "the speed from a distance and a time"),
    ("percentage", "part whole", "part / whole * 100", "the percentage of a part in a whole"),
    ("discount", "price percent", "price * (1 - percent / 100)", "the price after a discount"),
    ("with_tax", "price rate", "price * (1 + rate / 100)", "the price with a tax rate"),
    ("simple_interest", "amount rate years", "amount * rate * years / 100", "the simple interest"),
    ("balance", "amount rate years", "amount * (1 + rate / 100) ** years", "the compound interest"),
    ("body_mass_index", "weight height", "weight / height**2", "the body mass index"),
    ("kinetic_energy", "mass speed", "mass * speed**2 / 2", "the kinetic energy"),
    ("force", "mass acceleration", "mass * acceleration", "the force on a mass"),
    ("density", "mass volume", "mass / volume", "the density of a body"),
    ("square_root", "number", "math.sqrt(number)", "the square root of a number"),
    ("power", "base exponent", "base**exponent", "the power of a base to an exponent"),
)
GUARD = 'if TESTS:\n    raise ValueError("negative argument")\n'
RAISES = ", or raise a ValueError for a negative argument"
GUARDS = (
    some("", "", "", "accept negative arguments"),
    some("checked", GUARD, RAISES, "raise a ValueError for negative arguments"),
)


def write_formula(choice: Choice, pick: Pick) -> Function:
    """Write a formula, perhaps rounded, perhaps with a check of its arguments."""
    formula, digits, guard = (choice[slot] for slot in ("formula", "digits", "guard"))
    params, expression = formula.code.split("|")
    names = params.split()
    tests = " or ".join(f"{name} < 0" for name in names)
    value = digits.code.replace("@", expression)
    doc = f"{pick(('Return', 'Compute', 'Calculate'))} {formula.says[0]}"
    if len(names) > 1 or names[0] != "number":
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        doc += pick(("", f" from {listed}"))
    doc += pick(digits.says) + guard.says[0]
    inputs = [(3, 2, 4), (1.5, 2.5, 3), (10, 7, 1), (0, 1, 2), (-2, 3, 2), (4, -1, 2)]
    return finish(
        (formula.key, f"compute_{formula.key}", f"get_{formula.key}"),
        {name: name for name in names},
        doc,
        f"{guard.code.replace('TESTS', tests)}return {value}",
        [values[: len(names)] for values in inputs],
        pick,
        "import math" if "math." in expression else "",
    )


# Steps of a calculation: @ is what came before; the digit is how tightly the code binds.
STEPS = (
    *each(range(1, 21), "plus %", "1@ + %", "increased by %|plus %"),
    *each(range(1, 21), "minus %", "1@ - %", "decreased by %|minus %"),
    *each(range(2, 21), "times %", "2@ * %", "multiplied by %|times %"),
    *each(range(2, 21), "over %", "2@ / %", "divided by %"),
    *(some(f"modulo {n}", f"2@ % {n}", f"modulo {n}") for n in range(2, 13)),
    *[some("squared", "3@**2", "squared")] * 4,
    *[some("cubed", "3@**3", "cubed")] * 4,
    *[some("absolute", "4abs(@)", "made positive")] * 4,
)
EACH = (
    some("", "return @", "", "work on one number"),
    some("list", "return [@ for x in $0]", "", "work on a list"),
)


def write_steps(choice: Choice, pick: Pick) -> Function:
    """Write a calculation of two steps, on a number or on each number of a list."""
    first, second, each = (choice[slot] for slot in ("first", "second", "each"))
    value = first.code[1:].replace("@", "x" if each.key else "$0")
    if first.code[0] < second.code[0] < "4" or (first.code[0] == second.code[0] == "3"):
        value = f"({value})"
    value = second.code[1:].replace("@", value).replace(")**", ") ** ")
    said = f"{pick(first.says)} and then {pick(second.says)}"
    if each.key:
        params = {pick(("numbers", "numbers", "values")): pick(("a list", "a list of numbers"))}
        doc = f"Return each number of $0 {said}"
        inputs: list[tuple[Any, ...]] = [(list(range(-9, 30)),), ([],)]
    else:
        params = {pick(("number", "number", "n", "value")): "a number"}
        doc, inputs = f"Return $0 {said}", [(n,) for n in (-7, -1, 0, 1, 2, 5, 12, 2.5)]
    names = (join_name(first.key, second.key), join_name("calculate", first.key))
    return finish(names, params, doc, each.code.replace("@", value), inputs, pick)


LINKS = (
    some("and", "A and B", "A and B", "require both conditions"),
    some("or", "A or B", "A or B", "accept either condition"),
    some("only", "A", "A", "check only the first condition"),
    some("and not", "A and not B", "A but not B", "refuse the second condition"),
)


def write_check(choice: Choice, pick: Pick) -> Function:
    """Write a test of a number against one or two conditions."""
    first, second, link = (choice[slot] for slot in ("test", "other", "link"))
    code = link.code.replace("A", first.code)
    second_code = f"({second.code})" if link.key == "and not" else second.code
    code = code.replace("B", second_code).replace("@", "$0")
    said = link.says[0].replace("A", pick(first.says)).replace("B", pick(second.says))
    doc = pick(("Check whether $0 is ", "Return whether $0 is ")) + said
    other = "" if link.key == "only" else f"{link.key} {second.key}"
    names = (join_name("is", first.key, other), join_name("check", first.key, other))
    params = {pick(("number", "number", "n", "value")): "a number"}
    inputs = [(n,) for n in (*range(-12, 60), 99, 100, 101)]
    return finish(names, params, doc, f"return {code}", inputs, pick)


LABELS = (
    "yes no small big low high cold hot fail pass open closed red blue green minor adult true "
    "false cheap expensive left right near far empty full old new day night ok"
)


def write_branch(choice: Choice, pick: Pick) -> Function:
    """Write a choice between two labels."""
    test, label, other = (choice[slot] for slot in ("test", "label", "other"))
    body = f'if {test.code}:\n    return "{label.key}"\nreturn "{other.key}"'
    said = f"$0 is {pick(test.says)}"
    doc = pick(
        (
            f"Return '{label.key}' if {said}, otherwise '{other.key}'",
            f"Return '{label.key}' when {said} and '{other.key}' otherwise",
        )
    )
    params = {pick(("number", "number", "n", "value")): "a number"}
    inputs = [(n,) for n in (*range(-12, 60), 99, 100, 101)]
    names = (f"{label.key}_or_{other.key}", join_name("label", test.key))
    return finish(names, params, doc, body.replace("@", "$0"), inputs, pick)


DESCENDING = "sort in descending order first"
ORDERS = (
    some("", "$0", "$0", "keep the order"),
    some("sorted", "sorted($0)", "$0 in sorted order", "sort the list first"),
    some("descending", "sorted($0, reverse=True)", "$0 in descending order", DESCENDING),
    some("reversed", "$0[::-1]", "$0 in reverse order", "reverse the list first"),
    some("unique", "list(dict.fromkeys($0))", "$0 without duplicates", "drop duplicates"),
)
CUTS = (
    *each(range(2, 13), "first %", "@[:%]", "the first % elements of #"),
    *each(range(2, 13), "last %", "@[-%:]", "the last % elements of #"),
    *each(range(2, 9), "skip %", "@[%:]", "all but the first % elements of #"),
    *each(range(2, 9), "drop %", "@[:-%]", "all but the last % elements of #"),
    *each(range(2, 9), "every %", "@[::%]", "one of every % elements of #"),
    *each(range(10), "at %", "@[%]", "the element at index % of #"),
)
ENDS = (
    some("", "return @", "Return #", "return the elements themselves"),
    some("sum", "return sum(@)", "Return the sum of #", "return the sum"),
    some("max", "return max(@)", "Return the maximum of #", "return the maximum"),
    some("min", "return min(@)", "Return the minimum of #", "return the minimum"),
    some("length", "return len(@)", "Return the number of #", "return the number of them"),
)


def write_slice(choice: Choice, pick: Pick) -> Function:
    """Write a function that orders a list and takes a part of it."""
    cut, order, end = (choice[slot] for slot in ("cut", "order", "end"))
    doc = end.says[0].replace("#", pick(cut.says).replace("#", order.says[0]))
    body = end.code.replace("@", cut.code.replace("@", order.code))
    params = {pick(("items", "items", "values", "numbers")): "a list"}
    inputs = [([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, -2, 11],), ([2, 1, 2],), ([],)]
    names = (join_name(end.key, cut.key, order.key), join_name("take", cut.key))
    return finish(names, params, doc, body, inputs, pick)


# Steps on a text: @ is what came before.
WIDTHS = (8, 10, 12, 16, 20)
TEXT_STEPS = (
    *[some("upper", "@.upper()", "in upper case")] * 3,
    *[some("lower", "@.lower()", "in lower case")] * 3,
    *[some("capitalized", "@.capitalize()", "capitalized")] * 3,
    *[some("swapped", "@.swapcase()", "with swapped case")] * 2,
    *[some("reversed", "@[::-1]", "reversed")] * 3,
    *[some("stripped", "@.strip()", "stripped of surrounding whitespace")] * 3,
    *each(range(2, 13), "first %", "@[:%]", "cut to the first % characters"),
    *each(range(2, 13), "last %", "@[-%:]", "cut to the last % characters"),
    *each(LETTERS, "no %", '@.replace("%", "")', "without the letter '%'"),
    *(
        some(f"{c} to {d}", f'@.replace("{c}", "{d}")', f"with '{c}' replaced by '{d}'")
        for c in "aeiost"
        for d in "xyzuo"
        if c != d
    ),
    *(
        some(f"spaces to {n}", f'@.replace(" ", "{d}")', f"with spaces replaced by {n}")
        for d, n in (("_", "underscores"), ("-", "dashes"), (".", "dots"), ("", "nothing"))
    ),
    *each(WIDTHS, "padded %", "@.rjust(%)", "padded on the left to % characters"),
    *each(WIDTHS, "filled %", "@.ljust(%)", "padded on the right to % characters"),
)
TEXTS = ("  Hello World, this is a Test  ", "banana", "Mississippi river steamboats", "AbC xyz", "")


def write_text(choice: Choice, pick: Pick) -> Function:
    """Write a function that changes a text in one or two steps."""
    steps = [choice["first"], *([choice["second"]] if choice["count"].key == "two" else [])]
    code = "$0"
    for step in steps:
        code = step.code.replace("@", code)
    doc = "Return $0 " + " and then ".join(pick(step.says) for step in steps)
    names = (join_name(*(step.key for step in steps)), join_name("make", steps[0].key))
    params = {pick(("text", "text", "string", "s")): pick(("a text", "a string"))}
    return finish(names, params, doc, f"return {code}", [(text,) for text in TEXTS], pick)


FIRST_ONLY = "do only the first step"
COUNTS = (*[some("two", change=FIRST_ONLY)] * 3, some("one", change=FIRST_ONLY))
KINDS = (
    some("vowels", '@.lower() in "aeiou"', "vowels"),
    some("digits", "@.isdigit()", "digits"),
    some("letters", "@.isalpha()", "letters"),
    some("capitals", "@.isupper()", "upper case letters|capital letters"),
    some("small letters", "@.islower()", "lower case letters"),
    some("spaces", '@ == " "', "spaces"),
    *each(LETTERS, "letters %", '@ == "%"', "letters '%'"),
    *(
        some(f"letters {c} or {d}", f'@ in "{c}{d}"', f"letters '{c}' or '{d}'")
        for c in "aeiou"
        for d in "bcdrst"
    ),
)
JOIN = 'return "".join(c for c in $0 if {}TEST)'
PLACES = "return [i for i, c in enumerate($0) if TEST]"
ONLY = "check for only them"
KIND_ENDS = (
    some("count", "return sum(1 for c in $0 if TEST)", "Count the # in $0", "count them"),
    some("list", "return [c for c in $0 if TEST]", "Return a list of the # in $0", "return a list"),
    some("only", JOIN.format(""), "Return only the # of $0", "return only them"),
    some("without", JOIN.format("not "), "Return $0 without the #", "remove them"),
    some("any", "return any(TEST for c in $0)", "Check whether $0 contains any #", "check for any"),
    some("all", "return all(TEST for c in $0)", "Check whether $0 contains only #", ONLY),
    some("places", PLACES, "Return the positions of the # in $0", "return the positions"),
)


def write_kind(choice: Choice, pick: Pick) -> Function:
    """Write a function about one kind of characters of a text."""
    kind, end = choice["kind"], choice["end"]
    test = kind.code.replace("@", "c")
    opposite = f"not {test}" if test.endswith("()") else test
    opposite = opposite.replace(" in ", " not in ").replace(" == ", " != ")
    code = end.code.replace("not TEST", opposite).replace("TEST", test)
    doc = end.says[0].replace("#", pick(kind.says))
    params = {pick(("text", "text", "string", "s")): pick(("a text", "a string"))}
    names = (join_name(end.key, kind.key), join_name(kind.key, end.key))
    inputs = [(text,) for text in (*TEXTS, "abcdeiou 2024", "ABC", "777", "dud")]
    return finish(names, params, doc, code, inputs, pick)


DICT_TESTS = (
    *(
        Option(
            f"values {t.key}", t.code.replace("@", "v"), tuple(f"values are {s}" for s in t.says)
        )
        for t in TESTS
    ),
    *(
        Option(
            f"keys {t.key}", t.code.replace("@", "k"), tuple(f"keys are words {s}" for s in t.says)
        )
        for t in WORD_TESTS
    ),
)
KEPT = "k, v in $0.items() if TEST"
WHOSE = "the entries of $0 whose #"
INVERSE = f"Return, with keys and values swapped, {WHOSE}"
TOTALED = "return the sum of the values"
DICT_ENDS = (
    some("entries", f"return {{k: v for {KEPT}}}", f"Return {WHOSE}", "return a dictionary"),
    some("keys", f"return [k for {KEPT}]", f"Return the keys of {WHOSE}", "return the keys"),
    some("values", f"return [v for {KEPT}]", f"Return the values of {WHOSE}", "return the values"),
    some("inverse", f"return {{v: k for {KEPT}}}", INVERSE, "swap keys and values"),
    some("total", f"return sum(v for {KEPT})", f"Return the sum of the values of {WHOSE}", TOTALED),
)


def write_dict(choice: Choice, pick: Pick) -> Function:
    """Write a function that keeps some entries of a dictionary."""
    test, end = choice["test"], choice["end"]
    words = " ".join(WORDS).split()
    doc = end.says[0].replace("#", pick(test.says))
    params = {pick(("mapping", "mapping", "scores", "d")): pick(("a dictionary", "a dict"))}
    names = (join_name(end.key, test.key), join_name(test.key, end.key))
    inputs = [({word: n * 7 % 61 - 9 for n, word in enumerate(words)},), ({},)]
    return finish(names, params, doc, end.code.replace("TEST", test.code), inputs, pick)


PAIRS = (
    some("sums", "x + y", "the sums of"),
    some("differences", "x - y", "the differences of"),
    some("products", "x * y", "the products of"),
    some("larger", "max(x, y)", "the larger of"),
    some("smaller", "min(x, y)", "the smaller of"),
    some("distances", "abs(x - y)", "the absolute differences of"),
    some("averages", "(x + y) / 2", "the averages of"),
)
PAIR_ENDS = (
    some("list", "return [~]", "Return a list of #", "return a list"),
    *(
        some(name, f"return {name}(~)", f"Return the {said} of #", f"return the {said}")
        for name, said in (("sum", "sum"), ("max", "maximum"), ("min", "minimum"))
    ),
    some("sorted", "return sorted(~)", "Return a sorted list of #", "sort the result"),
)
PAIR_TESTS = (
    some("", "", "", "use all pairs"),
    *(
        some(
            f"first {t.key}", f" if {t.code}".replace("@", "x"), f" where the first is {t.says[0]}"
        )
        for t in TESTS
    ),
)


def write_pairs(choice: Choice, pick: Pick) -> Function:
    """Write a function over the corresponding elements of two lists."""
    pair, end, test = (choice[slot] for slot in ("pair", "end", "test"))
    doc = end.says[0].replace("#", f"{pair.says[0]} the elements of $0 and $1{test.says[0]}")
    body = end.code.replace("~", f"{pair.code} for x, y in zip($0, $1){test.code}")
    one, two = pick(("first second", "first second", "a b", "xs ys")).split()
    names = (join_name(end.key, pair.key, test.key), join_name(pair.key, end.key))
    inputs = [(list(range(-9, 120)), [n * 7 % 31 for n in range(140)]), ([3, 1], [2]), ([], [])]
    params = {one: "two lists", two: ""}
    function = finish(names, params, doc, body, inputs, pick)
    return replace(function, ask=function.ask.replace("two lists and ", "two lists"))


# Well-known functions: nothing to compose, so they are only trained. Each is followed by the
# arguments that it is tried with.
CLASSICS = '''
def factorial(n):
    """Return the factorial of n."""
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result
# (0,), (5,), (10,)
def fibonacci(n):
    """Return the n-th Fibonacci number."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
# (0,), (1,), (10,)
def fibonacci_list(n):
    """Return a list of the first n Fibonacci numbers."""
    result = []
    a, b = 0, 1
    for _ in range(n):
        result.append(a)
        a, b = b, a + b
    return result
# (0,), (8,)
def is_prime(n):
    """Check whether n is a prime number."""
    if n < 2:
        return False
    for i in range(2, int(n**0.5) + 1):
        if n % i == 0:
            return False
    return True
# (1,), (2,), (9,), (97,)
def gcd(a, b):
    """Return the greatest common divisor of a and b."""
    while b:
        a, b = b, a % b
    return a
# (12, 18), (7, 3)
def lcm(a, b):
    """Return the least common multiple of a and b."""
    x, y = a, b
    while y:
        x, y = y, x % y
    return a * b // x
# (4, 6), (7, 3)
def digit_sum(n):
    """Return the sum of the digits of n."""
    return sum(int(digit) for digit in str(n))
# (0,), (1234,)
def is_palindrome(text):
    """Check whether text is a palindrome."""
    return text == text[::-1]
# ("level",), ("cat",)
def is_anagram(a, b):
    """Check whether a and b are anagrams of each other."""
    return sorted(a) == sorted(b)
# ("listen", "silent"), ("a", "b")
def is_leap_year(year):
    """Check whether year is a leap year."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
# (1900,), (2000,), (2024,)
def is_power_of_two(n):
    """Check whether n is a power of two."""
    return n > 0 and n & (n - 1) == 0
# (0,), (8,), (12,)
def divisors(n):
    """Return a list of the divisors of n."""
    return [i for i in range(1, n + 1) if n % i == 0]
# (1,), (12,)
def count_words(text):
    """Count the words in text."""
    return len(text.split())
# ("a b c",), ("",)
def word_frequencies(text):
    """Return a dictionary with the frequency of each word in text."""
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts
# ("a b a",), ("",)
def median(numbers):
    """Return the median of numbers."""
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
# ([3, 1, 2],), ([1, 2, 3, 4],)
def flatten(lists):
    """Flatten a list of lists into one list."""
    return [item for items in lists for item in items]
# ([[1, 2], [3]],), ([],)
def chunks(items, size):
    """Split items into chunks of the given size."""
    return [items[i : i + size] for i in range(0, len(items), size)]
# ([1, 2, 3, 4, 5], 2), ([], 3)
def invert(mapping):
    """Swap the keys and the values of mapping."""
    return {value: key for key, value in mapping.items()}
# ({"a": 1},), ({},)
def merge(first, second):
    """Merge two dictionaries into a new one."""
    return {**first, **second}
# ({"a": 1}, {"b": 2}),
def clamp(value, low, high):
    """Limit value to the range from low to high."""
    return max(low, min(value, high))
# (5, 1, 3), (2, 1, 3), (0, 1, 3)
def binary_search(items, target):
    """Return the index of target in the sorted items, or -1."""
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1
# ([1, 3, 5, 7], 5), ([1, 3], 2)
def bubble_sort(items):
    """Return items sorted with bubble sort."""
    result = list(items)
    for end in range(len(result) - 1, 0, -1):
        for i in range(end):
            if result[i] > result[i + 1]:
                result[i], result[i + 1] = result[i + 1], result[i]
    return result
# ([3, 1, 2],), ([],)
def fizz_buzz(n):
    """Return Fizz, Buzz, FizzBuzz or n as a text."""
    if n % 15 == 0:
        return "FizzBuzz"
    if n % 3 == 0:
        return "Fizz"
    if n % 5 == 0:
        return "Buzz"
    return str(n)
# (3,), (5,), (15,), (7,)
def split_seconds(seconds):
    """Split seconds into hours, minutes and seconds."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return hours, minutes, seconds
# (3661,), (0,)
def add(a, b):
    """Return the sum of two numbers."""
    return a + b
# (1, 2), (-1, 1)
def subtract(a, b):
    """Return the difference of two numbers."""
    return a - b
# (1, 2), (-1, 1)
def multiply(a, b):
    """Return the product of two numbers."""
    return a * b
# (3, 2), (-1, 1)
def maximum(numbers):
    """Return the maximum of a list of numbers."""
    return max(numbers)
# ([1, 3, 2],)
def total(numbers):
    """Return the sum of a list of numbers."""
    return sum(numbers)
# ([1, 3, 2],)
def reverse(text):
    """Return text reversed."""
    return text[::-1]
# ("abc",)
def greet(name):
    """Return a greeting for name."""
    return f"Hello, {name}!"
# ("Ada",)
'''
CLASSIC = re.compile(r'def (\w+)\((.*?)\):\n    """(.*?)\."""\n(.*?)\n# (.*?)\n', re.S)
CLASSIC_OPTIONS = tuple(Option(m.group(1), m.group(0)) for m in CLASSIC.finditer(CLASSICS))


def write_classic(choice: Choice, pick: Pick) -> Function:
    """Write a well-known function."""
    match = CLASSIC.match(choice["classic"].code)
    assert match is not None
    name, params, doc, body, inputs = match.groups()
    tried = eval(f"[{inputs}]")
    names = dict.fromkeys(params.split(", "))
    return finish([name], {n: n for n in names}, doc, textwrap.dedent(body), tried, pick)


FAMILIES = (
    Family(
        "numbers",
        4.0,
        {"reduce": REDUCERS, "map": MAPS, "test": TESTS, "source": SOURCES},
        write_numbers,
        valid_numbers,
    ),
    Family(
        "words",
        2.5,
        {"reduce": WORD_REDUCERS, "map": WORD_MAPS, "test": WORD_TESTS, "source": WORD_SOURCES},
        write_words,
        valid_words,
    ),
    unit_family("data", 1.5),
    unit_family("length", 1.0),
    unit_family("time", 0.7),
    unit_family("mass", 0.7),
    unit_family("volume", 0.6),
    unit_family("temperature", 0.5),
    Family(
        "formula",
        1.5,
        {
            "formula": tuple(Option(n, f"{p}|{e}", (says,)) for n, p, e, says in FORMULAS),
            "digits": DIGITS,
            "guard": GUARDS,
        },
        write_formula,
    ),
    Family(
        "steps",
        1.3,
        {"first": STEPS, "second": STEPS, "each": EACH},
        write_steps,
        lambda choice: choice["first"] != choice["second"],
    ),
    Family(
        "check",
        1.2,
        {"test": TESTS, "other": TESTS, "link": LINKS},
        write_check,
        lambda choice: choice["test"] != choice["other"],
    ),
    Family(
        "branch",
        1.0,
        {
            "test": TESTS,
            "label": tuple(some(word, word, word) for word in LABELS.split()),
            "other": tuple(some(word, word, word) for word in LABELS.split()),
        },
        write_branch,
        lambda choice: choice["label"] != choice["other"],
    ),
    Family(
        "slice",
        1.0,
        {"cut": CUTS, "order": ORDERS, "end": ENDS},
        write_slice,
        lambda choice: not (choice["end"].key and choice["cut"].key.startswith("at")),
    ),
    Family(
        "text",
        1.5,
        {"first": TEXT_STEPS, "second": TEXT_STEPS, "count": COUNTS},
        write_text,
        lambda choice: choice["first"] != choice["second"],
    ),
    Family("kind", 1.2, {"kind": KINDS, "end": KIND_ENDS}, write_kind),
    Family("dict", 1.0, {"test": DICT_TESTS, "end": DICT_ENDS}, write_dict),
    Family("pairs", 0.8, {"pair": PAIRS, "end": PAIR_ENDS, "test": PAIR_TESTS}, write_pairs),
    Family("classic", 1.0, {"classic": CLASSIC_OPTIONS}, write_classic, split=False),
)


# How a follow-up question names a new option (#) that has no words of its own for that.
CHANGES: dict[str, tuple[str, ...]] = {
    "to": ("return # instead", "return # instead", "convert to # instead"),
    "from": ("take # instead", "start from # instead"),
    "words test": ("use the words # instead", "keep the words # instead"),
    "check test": ("check first whether it is # instead",),
    "check other": ("check second whether it is # instead",),
    "branch test": ("test whether it is # instead",),
    "dict test": ("use the entries whose # instead",),
    "pairs test": ("use only the pairs# instead",),
    "label": ("return '#' in the first case instead",),
    "other": ("return '#' otherwise instead",),
    "kind": ("use the # instead",),
    "cut": ("use # instead",),
    "pair": ("use # the elements instead",),
    "formula": ("return # instead",),
    "first": ("return it # as the first step instead",),
    "second": ("return it # as the second step instead",),
}
QUESTIONS = (
    "Please write a function in Python that #.",
    "Please write a function in Python that #.",
    "Please write a Python function that #.",
    "Write a Python function that #.",
    "Write a function that #.",
    "Can you write a Python function that #?",
    "How do I write a function in Python that #?",
    "I need a function that #.",
)
FOLLOW_UPS = (
    "How can I modify the function above to #?",
    "How can I modify the function above to #?",
    "How can I change the function above to #?",
    "Please modify the function above to #.",
    "Can you change it to #?",
    "Now change the function to #.",
)
SYSTEMS = ("You are a helpful assistant.", "You write Python functions.", "Answer with code.")
NEW_NAMES = ("helper", "run", "apply", "my_function", "calculate", "convert", "select", "transform")
GUIDE = (
    "Please write a function in Python that transforms bytes to Giga bytes.",
    "How can I modify the function above to return Mega bytes instead?",
)


@dataclass(frozen=True)
class Sample:
    """Hold a document as segments (prompt, answer, prompt, answer, ...) and what it asks for."""

    kind: str
    family: str
    segments: tuple[str, ...]
    function: Function

    @property
    def text(self) -> str:
        """Return the whole document."""
        return "".join(self.segments)


def change_words(family: Family, slot: str, new: Option, pick: Pick) -> str | None:
    """Say what a follow-up question wants, or nothing where there is no way to say it."""
    if new.change:
        return pick(new.change)
    if family.name == "numbers" and slot == "test":
        return f"use {described(new, 'numbers', pick)} instead"
    if slot in ("reduce", "end"):
        said = new.says[0].replace("Count #", "count them").replace("^", "matches")
        said = said.replace(" of #", "").replace(", #", "").replace(",", "")
        return f"{said[0].lower()}{said[1:]} instead"
    templates = CHANGES.get(f"{family.name} {slot}", CHANGES.get(slot))
    if templates is None:
        return None
    return pick(templates).replace("#", pick(new.says).replace(" of #", ""))


def follow_up(
    family: Family, choice: Choice, rng: random.Random, held_out: bool
) -> tuple[str, Choice] | None:
    """Draw a change of one slot that ends on the wanted side of the split."""
    slot = rng.choice(list(family.slots))
    target = {**choice, slot: rng.choice(family.slots[slot])}
    words = change_words(family, slot, target[slot], rng.choice)
    # What the first function does not show, a question about it cannot keep.
    hidden = choice.get("link", EACH[0]).key == "only" or choice.get("count", EACH[0]).key == "one"
    same = family.write(choice, canonical).body == family.write(target, canonical).body
    if words is None or same or not family.valid(target) or (hidden and slot in ("link", "count")):
        return None
    return (words, target) if family.held_out(target) == held_out else None


def question(text: str, first: bool = True) -> str:
    """Render a question as the chat template does, up to where the answer begins."""
    return f"{'' if first else chr(10) * 2}Question: {text}\n\nAnswer:"


def answer(function: Function) -> str:
    """Render an answer."""
    return f"\n{function.code}{END}"


def sample(rng: random.Random, held_out: bool = False, kind: str | None = None) -> Sample:
    """Draw one document: a completion, a question or a dialogue."""
    kind = kind or rng.choices(("completion", "question", "dialogue"), (35, 30, 35))[0]
    families = [family for family in FAMILIES if family.split or not held_out]
    family = rng.choices(families, [family.weight for family in families])[0]
    pick: Pick = rng.choice
    if kind == "completion":
        function = family.write(family.draw(rng, held_out), pick)
        body = textwrap.indent(function.body, "    ") + END
        # People end such a prompt before the line break, after it, or after the indentation.
        cut = rng.choices((0, 1, 5), (4, 5, 1))[0]
        whole = f"\n{body}"
        return Sample(kind, family.name, (function.head + whole[:cut], whole[cut:]), function)
    choice = family.draw(rng, held_out if kind == "question" else False)
    function = family.write(choice, canonical)
    asked = rng.choice(QUESTIONS).replace("#", family.write(choice, pick).ask)
    system = f"{rng.choice(SYSTEMS)}\n\n" if rng.random() < 0.04 else ""
    segments = [system + question(asked), answer(function)]
    turns = 0 if kind == "question" else 1 if held_out or rng.random() < 0.8 else 2
    for _ in range(turns):
        drawn = next(
            filter(None, (follow_up(family, choice, rng, held_out) for _ in range(99))), None
        )
        if not held_out and (not family.split or rng.random() < 0.06):
            name = rng.choice(NEW_NAMES)
            function = replace(function, name=name)
            words = rng.choice((f"call it {name}", f"rename it to {name}"))
        elif drawn is None:
            return sample(rng, held_out, kind)
        else:
            words, choice = drawn
            function = family.write(choice, canonical)
        asked = rng.choice(FOLLOW_UPS).replace("#", words)
        segments += [question(asked, first=False), answer(function)]
    return Sample(kind, family.name, tuple(segments), function)


def guide() -> Sample:
    """Return the guide's own dialogue."""
    family = next(family for family in FAMILIES if family.name == "data")
    options = {slot: {o.key: o for o in options} for slot, options in family.slots.items()}
    keys = {"from": "bytes", "to": "gigabytes", "digits": "", "shape": "", "base": "1024"}
    choice = {slot: options[slot][key] for slot, key in keys.items()}
    first = family.write(choice, canonical)
    second = family.write({**choice, "to": options["to"]["megabytes"]}, canonical)
    segments = (question(GUIDE[0]), answer(first), question(GUIDE[1], first=False), answer(second))
    return Sample("dialogue", "data", segments, second)


def training_sample(rng: random.Random) -> Sample:
    """Draw a training document that was run, the guide's dialogue among them now and then."""
    drawn = guide() if rng.random() < GUIDE_SHARE else sample(rng)
    check(drawn.function)
    return drawn


def held_out_samples(seed: int, count: int) -> list[Sample]:
    """Draw held-out prompts: of ten, four completions, three questions and three dialogues."""
    rng = random.Random(f"held out {seed}")
    kinds = [*["completion"] * 4, *["question"] * 3, *["dialogue"] * 3]
    found: dict[str, Sample] = {}
    while len(found) < count:
        drawn = sample(rng, held_out=True, kind=kinds[len(found) % len(kinds)])
        found.setdefault(f"{drawn.family}\n{drawn.function.body}", drawn)
    return list(found.values())


def behavior(code: str, inputs: Sequence[tuple[Any, ...]]) -> list[str]:
    """Run the first function that a text defines and describe what it does on each input."""
    space: dict[str, Any] = {}
    exec(compile(code, "<catalogue>", "exec"), space)
    function = next(v for k, v in space.items() if callable(v) and k != "__builtins__")
    described = []
    for arguments in inputs:
        try:
            result = function(*arguments)
            # The order of a set of texts differs from process to process.
            ordered = ("set", sorted(result)) if isinstance(result, set) else result
            described.append(repr(ordered))
        except Exception as error:
            described.append(type(error).__name__)
    return described


def check(function: Function) -> None:
    """Run a function on its own inputs: only errors that its callers can cause are allowed."""
    for line in behavior(function.code, function.inputs):
        if line in ("NameError", "SyntaxError", "AttributeError", "TypeError", "KeyError"):
            raise ValueError(f"{line} in\n{function.code}")


def library_files(held_out: bool) -> Iterator[Path]:
    """Yield the standard library's sources on one side of a split by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts):
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            if (digest[0] % 20 == 0) == held_out:
                yield path
