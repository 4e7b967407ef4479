"""Numbers in Markdown pages, compared with the JSON records that they were read from.

`check` is the whole of it: every number of a page is claimed by an entry of the registry, every claim holds to the
digits that are printed, every entry matches. `tests/test_readme.py` says how entries are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("bash", "sh", "python", "yaml")  # languages of code that is run or read, not of output
_DIGITS = r"\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[+-]?\d+)?"
_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
_PLACEHOLDER = rf"([+-]?{_DIGITS}|\b(?:{'|'.join(_WORDS)})\b)"
_BOUNDS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda printed, value: printed >= value,
    "<=": lambda printed, value: printed <= value,
    ">": lambda printed, value: printed > value,
    "<": lambda printed, value: printed < value,
}


class Rows(list):
    """Rows of a record. Columns are named by their path (``copy_gains.600``); a None anywhere makes the result None."""

    def where(self, **conditions: Any) -> Rows:
        """Those whose columns equal the values, or satisfy the functions, given.

        Raises:
            LookupError: if there is none.
        """
        tests = {
            name: want if callable(want) else lambda value, want=want: value == want
            for name, want in conditions.items()
        }
        found = Rows(row for row in self if all(test(row.get(name)) for name, test in tests.items()))
        if not found:
            shown = {name: want for name, want in conditions.items() if not callable(want)}
            raise LookupError(f"no row of {len(self)} has {shown or 'what is asked for'}")
        return found

    def values(self, column: str) -> list[Any]:
        return [pick(row, column) for row in self]

    def value(self, column: str) -> Any:
        """The value of the only row."""
        if len(self) != 1:
            raise LookupError(f"{len(self)} rows where one is wanted")
        return self.values(column)[0]

    def mean(self, column: str) -> float | None:
        values = self.values(column)
        return None if None in values else mean(values)

    def spread(self, column: str) -> float | None:
        """Half of the range; None for a single row."""
        values = self.values(column)
        return None if None in values or len(values) < 2 else (max(values) - min(values)) / 2


def pick(tree: Any, path: str) -> Any:
    for key in path.split("/" if "/" in path else "."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


class Record(dict):
    """A JSON file; its list of rows is also searched by `where`."""

    def where(self, **conditions: Any) -> Rows:
        return Rows(self["rows"]).where(**conditions)


def above(value: float, reference: float) -> float:
    """By how many percent a value is above a reference."""
    return 100 * (value / reference - 1)


def about(text: str, unit: float = 1) -> Callable[[float], bool]:
    """Whether a value, in units, is the first number of the text to its printed digits."""
    printed = numbers(text)
    if not printed:
        raise LookupError(f"{text!r} holds no number")
    return lambda value: _agrees(printed[0].text, value / unit)


def source(file: str, pattern: str) -> float:
    """The number that a pattern's only group finds in a file of the repository: limits of tests, defaults.

    Raises:
        LookupError: unless the pattern finds one value.
    """
    found = set(re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
    if len(found) != 1:
        raise LookupError(f"{file} has {len(found)} values for {pattern!r}")
    return float(found.pop())


_FUNCTIONS = {"above": above, "about": about, "source": source, "mean": mean, "pick": pick, "Rows": Rows}
_FUNCTIONS |= {
    function.__name__: function for function in (abs, all, float, int, len, max, min, range, round, sorted, sum)
}


def load_records(files: Mapping[str, str], definitions: Mapping[str, str]) -> dict[str, Any]:
    """The JSON files of a registry and what it defines from them, by the names that expressions use."""
    names = {name: Record(json.loads((ROOT / file).read_text(encoding="utf-8"))) for name, file in files.items()}
    for name, expression in definitions.items():
        names[name] = _evaluate(expression, names)
    return names


def _evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    # The registry is a file of this repository, as trusted as the test itself.
    return eval(expression.strip(), {"__builtins__": {}, **_FUNCTIONS, **names})


@dataclass(frozen=True)
class Number:
    """A number of a page: its place in the text and its digits."""

    start: int
    end: int
    text: str


def numbers(text: str) -> list[Number]:
    """The numbers of a page outside of inline code, link targets, commands (but not their comments) and names.

    Digits that go on from letters, an underscore or a point belong to a name (`fp32`, `sm_90`), as do those joined to
    letters before them by a hyphen (`ZeRO-3`). An x in front is a ratio (`x16`).
    """
    text, found = _prose(text), []
    for match in re.finditer(rf"[+-]?{_DIGITS}", text):
        start, before = match.start(), text[: match.start()]
        if match[0][0] in "+-" and not re.search(r"(?:\A|[\s|(^])\Z", before):
            start, before = start + 1, before + match[0][0]  # a hyphen: 300-600
        if not re.search(r"[\w.]\Z", before) or re.search(r"(?<!\w)x\Z", before):
            found.append(Number(start, match.end(), text[start : match.end()]))
    return found


def check(text: str, entries: Mapping[str, Any], rules: Mapping[str, str], records: Mapping[str, Any]) -> list[str]:
    """What is wrong with the numbers of a page, each with its line; nothing if all is well.

    Args:
        text: The page.
        entries: Its part of the registry: `tables`, `claims` and `not_measured`.
        rules: Reason -> pattern of what is never a measurement, on any page.
        records: What expressions may name (`load_records`).
    """
    page = _Page(text, records)
    for pattern in rules.values():
        page.exempt(re.finditer(pattern, text))
    for reason, phrases in entries.get("not_measured", {}).items():
        for phrase in phrases:
            page.exempt_phrase(phrase, reason)
    for table in entries.get("tables", ()):
        page.check_table(table)
    for template in filter(None, re.split(r"\n\s*\n", entries.get("claims", "").strip())):
        page.check_claim(template)
    return page.problems + page.unclaimed()


class _Page:
    def __init__(self, text: str, records: Mapping[str, Any]) -> None:
        self.text, self.records = text, records
        self.numbers = {(number.start, number.end): number for number in numbers(text)}
        self.claimed: set[tuple[int, int]] = set()
        self.problems: list[str] = []

    def line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def unclaimed(self) -> list[str]:
        lines = self.text.splitlines()
        left = [number for place, number in sorted(self.numbers.items()) if place not in self.claimed]
        at = [(self.line(number.start), number.text) for number in left]
        return [f"line {line}: nobody claims {number} in: {lines[line - 1][:160]}" for line, number in at]

    def exempt(self, matches: Any) -> int:
        """Claim all numbers within the matches; returns how many."""
        before = len(self.claimed)
        for match in matches:
            self.claimed |= {place for place in self.numbers if match.start() <= place[0] and place[1] <= match.end()}
        return len(self.claimed) - before

    def exempt_phrase(self, phrase: str, reason: str) -> None:
        found = list(re.finditer(_literal(phrase), self.text))
        if not self.exempt(found):
            self.problems.append(f"not_measured ({reason}): {phrase!r} matches no number")

    def check_claim(self, template: str) -> None:
        literals, expressions = _split(template)
        pattern = _PLACEHOLDER.join(_literal(literal) for literal in literals)
        found = list(re.finditer(pattern, self.text))
        if not found:
            self.problems.append(f"claim matches nothing: {template!r}")
        for match in found:
            for group, expression in enumerate(expressions, 1):
                self.compare(match.start(group), match[group], expression, {})

    def compare(self, start: int, printed: str, expression: str, names: Mapping[str, Any]) -> None:
        place, where = (start, start + len(printed)), f"line {self.line(start)}: "
        if place not in self.numbers and printed not in _WORDS:
            self.problems.append(f"{where}{printed} is no number of the page: {expression}")
            return
        self.claimed.add(place)
        bound, expression = re.fullmatch(r"\s*(>=|<=|>|<)?(.*)", expression, re.DOTALL).groups()
        value = self.evaluate(expression, names, where)
        if isinstance(value, _Failed):
            return
        if value is None:
            self.problems.append(f"{where}{printed} stands where the record has nothing: {expression.strip()}")
        elif not (_BOUNDS[bound](_number(printed), value) if bound else _agrees(printed, value)):
            self.problems.append(
                f"{where}{printed} is printed, {bound or ''}{value:.6g} recorded: {expression.strip()}"
            )

    def evaluate(self, expression: str, names: Mapping[str, Any], where: str) -> Any:
        try:
            return _evaluate(expression, {**self.records, **names})
        except Exception as error:
            self.problems.append(f"{where}{expression.strip()} fails ({type(error).__name__}: {error})")
            return _Failed()

    def check_table(self, entry: Mapping[str, Any]) -> None:
        matches = list(
            re.finditer(rf"^{_literal(entry['table'])}[^\n]*\n\|[-:| ]+\|\n((?:\|[^\n]*\n?)+)", self.text, re.MULTILINE)
        )
        if len(matches) != 1:
            self.problems.append(f"{len(matches)} tables begin with {entry['table']!r}")
            return
        header = [cell.strip() for _, cell in _cells(self.text, matches[0].start())]
        unknown = {*entry["columns"], *entry.get("key", ())} - set(header)
        if unknown:
            self.problems.append(f"the table {entry['table']!r} has no column {sorted(unknown)}")
            return
        start = matches[0].start(1)
        while start < matches[0].end(1):
            self.check_row(entry, header, _cells(self.text, start), f"line {self.line(start)}: ")
            start = self.text.find("\n", start) + 1 or len(self.text)

    def check_row(self, entry: Mapping[str, Any], header: list[str], row: list[tuple[int, str]], where: str) -> None:
        cells = {name: re.sub(r"[*`]", "", cell).strip() for name, (_, cell) in zip(header, row, strict=True)}
        if cells[header[0]] in entry.get("except", ()):
            return
        first = entry.get("names", {}).get(cells[header[0]], cells[header[0]])
        names: dict[str, Any] = {"cells": cells, "name": first}
        if "rows" in entry:
            names["rows"] = self.evaluate(entry["rows"], names, where)
            if isinstance(names["rows"], _Failed):
                return
        for title, (start, cell) in zip(header, row, strict=True):
            found = [number for place, number in self.numbers.items() if start <= place[0] < start + len(cell)]
            wanted, is_key = entry["columns"].get(title), title in entry.get("key", header[:1])
            if is_key and wanted is None:
                self.claimed |= {(number.start, number.end) for number in found}
            wanted = wanted.split(";") if wanted else []
            for number, expression in zip(found, wanted, strict=False):
                self.compare(number.start, number.text, expression, names)
            for expression in () if is_key else wanted[len(found) :]:
                if self.evaluate(expression, names, where) is not None:
                    self.problems.append(f"{where}{title} prints nothing for {expression}")


class _Failed:
    """The value of an expression that raised."""


def _cells(text: str, start: int) -> list[tuple[int, str]]:
    """Start and text of every cell of the table row that begins at `start`."""
    line = text[start : text.find("\n", start) if "\n" in text[start:] else len(text)]
    bars = [match.start() for match in re.finditer(r"(?<!\\)\|", line)]
    return [(start + left + 1, line[left + 1 : right]) for left, right in zip(bars, bars[1:], strict=False)]


def _literal(phrase: str) -> str:
    """A pattern for a phrase, wherever the page breaks its lines; it neither begins nor ends inside a number."""
    words = r"\s+".join(re.escape(word) for word in re.split(r"\s+", phrase))
    return (r"(?<![\d.])" if phrase[:1].isdigit() else "") + words + (r"(?![\d]|\.\d)" if phrase[-1:].isdigit() else "")


def _split(template: str) -> tuple[list[str], list[str]]:
    """Literals and expressions of a template; braces of an expression may nest."""
    literals, expressions, depth, current = [], [], 0, ""
    for character in template:
        if character == "{" and (depth := depth + 1) == 1:
            literals.append(current)
            current = ""
        elif character == "}" and (depth := depth - 1) == 0:
            expressions.append(current)
            current = ""
        else:
            current += character
    return [*literals, current], expressions


def _number(printed: str) -> float:
    return float(_WORDS.index(printed) + 2) if printed in _WORDS else float(printed.replace(",", ""))


def _agrees(printed: str, value: float) -> bool:
    """Whether the value is within half of the last printed digit (and what floats lose)."""
    digits, _, exponent = printed.replace(",", "").partition("e")
    last = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(_number(printed) - value) <= 0.5 * last * (1 + 1e-6)


def _prose(text: str) -> str:
    """The page with all that is not prose turned to spaces, in place."""

    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    def fenced(match: re.Match) -> str:
        if match[2].strip() not in COMMANDS:
            return match[0]
        lines = match[0].split("\n")
        comments = [re.search(r"(?:^|\s)#\s.*$", line) for line in lines]
        kept = [
            " " * c.start() + line[c.start() :] if c else " " * len(line)
            for line, c in zip(lines, comments, strict=True)
        ]
        return "\n".join(kept)

    text = re.sub(r"^(```)([^\n]*)\n.*?^```[ \t]*$", fenced, text, flags=re.MULTILINE | re.DOTALL)
    for pattern in (
        r"<!--.*?-->",
        r"(?<=\])\([^)\s]*\)",
        r"https?://\S+",
        r"`[^`\n]+`",
        r"^\s*\d+\. ",
        r"(?<![\w.])[A-Za-z][\w.]*(?:-[\w.]+)+",
    ):
        text = re.sub(pattern, blank, text, flags=re.DOTALL | re.MULTILINE)
    return text
