"""Plain text tables for the terminal, the same rows for JSON, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from predictors.intervals import Interval
from search.frontier import Candidate, Fidelity, check_one_kind
from search.report.content import TOP1, Entry

Cell = str | int | float | bool | Interval | None


@dataclass(frozen=True)
class Column:
    """A column: the rows' key, its title, its unit, significant digits for numbers, and what they are divided by to be in the unit."""

    key: str
    title: str
    unit: str = ""
    digits: int = 4
    divisor: int = 1

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Table:
    """Columns and rows; every row has every column's key, None where there is nothing to say."""

    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            missing = [column.key for column in self.columns if column.key not in row]
            if missing:
                raise ValueError(f"table: a row lacks {missing}; give None where there is nothing to say")

    def cells(self) -> list[list[str]]:
        """Every row's cells as text."""
        return [[shown(row[column.key], column) for column in self.columns] for row in self.rows]

    def text(self) -> str:
        """Aligned columns, text to the left and numbers to the right, without a final line feed."""
        cells = [[column.heading for column in self.columns], *self.cells()]
        widths = [max(len(row[k]) for row in cells) for k in range(len(self.columns))]
        right = [self.is_numeric(column) for column in self.columns]
        rule = ["─" * width for width in widths]
        lines = [cells[0], rule, *cells[1:]]
        padded = (
            "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True))
            for line in lines
        )
        return "\n".join(line.rstrip() for line in padded)

    def json(self) -> list[dict[str, object]]:
        """JSON-serialisable rows with full precision; an interval becomes `{mean, lo, hi}`."""
        return [{column.key: _plain(row[column.key]) for column in self.columns} for row in self.rows]

    def is_numeric(self, column: Column) -> bool:
        """Whether a column holds numbers, which stand to the right."""
        values = [row[column.key] for row in self.rows]
        return any(isinstance(v, int | float | Interval) and not isinstance(v, bool) for v in values)


def candidate_table(entries: Sequence[Entry]) -> Table:
    """Candidates of one kind of knowledge, the fastest first; the headings carry the kind. Raises `MixedKnowledge`."""
    if not entries:
        raise ValueError("table: no candidates to show")
    check_one_kind([entry.candidate for entry in entries])
    kinds = entries[0].candidate
    scores = sorted({name for entry in entries for name in entry.candidate.scores})
    dense = next((entry.candidate for entry in entries if entry.group == "dense"), None)
    asked = list(dict.fromkeys(name for entry in entries for name, _ in entry.met))
    columns = (
        Column("name", "policy"),
        Column("group", "what"),
        Column("latency_ms", f"latency, {kinds.latency_label}", "ms"),
        *([] if dense is None else [Column("ratio", "of dense", "x", 3)]),
        *(Column(f"meets {name}", f"meets {name}") for name in asked),
        Column("kl_nats", f"KL, {kinds.fidelity.value}", "nats/token", 3),
        *([] if kinds.fidelity is Fidelity.PREDICTED else [Column("kl_stderr", "± standard error", "", 1)]),
        *(Column(name, name, "%" if name == TOP1 else "") for name in scores),
        Column("size_bytes", "size", "MiB", divisor=2**20),
        Column("label", "known by"),
    )
    ordered = sorted(entries, key=lambda entry: (entry.candidate.latency_ms, entry.candidate.kl))
    ratios = [{} if dense is None else {"ratio": entry.candidate.latency_ms / dense.latency_ms} for entry in ordered]
    met = [{f"meets {name}": dict(entry.met).get(name) for name in asked} for entry in ordered]
    rows = (_row(entry, scores) | one | two for entry, one, two in zip(ordered, ratios, met, strict=True))
    return Table(columns, tuple(rows))


def predicted_table(candidates: Sequence[Candidate]) -> Table:
    """The solver's curve: predicted KL at the modelled latency."""
    return candidate_table([Entry(candidate, "search") for candidate in candidates])


def _row(entry: Entry, scores: Sequence[str]) -> dict[str, Cell]:
    c = entry.candidate
    group = {"dense": "dense model", "chosen": "the answer", "baseline": "simple", "search": "search"}[entry.group]
    row: dict[str, Cell] = {
        "name": c.name,
        "group": group,
        "latency_ms": Interval(c.latency_ms, c.latency_lo, c.latency_hi),
        "kl_nats": c.kl,
        "kl_stderr": None if c.fidelity is Fidelity.PREDICTED else c.kl_stderr,
        "size_bytes": c.size_bytes,
        "label": ", ".join(filter(None, (c.fidelity.value, c.role, "ratio of another run" if entry.rescaled else ""))),
    }
    found = {name: c.scores.get(name) for name in scores}
    if found.get(TOP1) is not None:
        found[TOP1] = 100 * c.scores[TOP1]
    return {**row, **found}


def markdown(heads: str, cells: Iterable[Iterable[str]]) -> str:
    """A Markdown table; heads: titles with ` | ` between them. Empty where there are no rows."""
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([f"| {heads} |", "|---" * (heads.count("|") + 1) + "|", *body]) if body else ""


def shown(value: Cell, column: Column) -> str:
    """A cell as text: yes or no, an interval as `5.12 [5.01, 5.30]`, nothing as `–`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Interval):
        mean, lo, hi = (_number(v / column.divisor, column.digits) for v in (value.mean, value.lo, value.hi))
        return f"{mean} [{lo}, {hi}]"
    if isinstance(value, float) or (isinstance(value, int) and column.divisor > 1):
        return _number(value / column.divisor, column.digits)
    return str(value)


def _number(value: float, digits: int) -> str:
    """`digits` significant digits, zeros kept, no exponent where a reader can do without."""
    text = f"{value:#.{digits}g}"
    return f"{value:.{digits - 1}e}" if "e" in text else text.rstrip(".")


def _plain(value: Cell) -> object:
    return {"mean": value.mean, "lo": value.lo, "hi": value.hi} if isinstance(value, Interval) else value
