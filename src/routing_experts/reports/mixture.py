"""What was found in an instruction set, and what was drawn or joined, as tables."""

from collections import Counter

from rich.console import Console
from rich.text import Text

from routing_experts.records import Manifest, MixtureCheck, SourceCheck
from routing_experts.reports.summary import NONE, Grid, percent
from routing_experts.reports.table import print_grids

SHOWN = 5  # faults in words, of each kind
TURNS = 5  # the last column of turns is for so many and more
KINDS = {
    "record": "records that training would refuse",
    "missing": "pictures that are not there",
    "unreadable": "files that are no pictures",
    "long": "dialogues over the limit",
}


def check_grids(record: MixtureCheck) -> list[Grid]:
    """Sources, and their lengths where they were counted."""
    counts = ("records", "turns", "faulty", "pictures", "missing", "unreadable", "misnamed")
    rows = [(one.source, *(f"{getattr(one, name):,}" for name in counts)) for one in record.sources]
    if len(rows) > 1:
        totals = (f"{sum(getattr(one, name) for one in record.sources):,}" for name in counts)
        rows.append(("all", *totals))
    rate = f", {record.bytes / 1e6 / record.seconds:.0f} MB/s" if record.bytes and record.seconds else ""
    note = f"{record.bytes / 1e6:,.1f} MB in {record.seconds:,.1f} s{rate}{_rates(record)}."
    if not record.verified:
        note += (
            " Pictures by their first bytes; --verify-images decodes them whole, and finds those that are too large."
        )
    if misnamed := sum(one.misnamed for one in record.sources):
        note += f" Misnamed: {misnamed:,} in another format than their suffix says; they are read all the same."
    if record.repeated_ids:
        note += f" {record.repeated_ids:,} records have an id that another has: no harm, but faults name records by it."
    titles = ("source", *counts)
    sources = Grid(record.name, titles, tuple(rows), highlighted=len(rows) - 1 if len(rows) > 1 else None, note=note)
    return [sources, _lengths(record)] if any(one.lengths for one in record.sources) else [sources]


def _rates(record: MixtureCheck) -> str:
    records, pictures = (sum(getattr(one, name) for one in record.sources) for name in ("records", "pictures"))
    seconds = max(record.seconds, 1e-9)
    return f", {records / seconds:,.0f} records and {pictures / seconds:,.0f} pictures a second"


def _sound(record: MixtureCheck) -> str:
    """What a check without faults says, as far as it looked."""
    what = "All of it" if record.first is None else f"What was looked at, up to {record.first:,} of the first records,"
    left = [] if any(one.lengths for one in record.sources) else ["--lengths MODEL counts tokens"]
    if sum(one.pictures for one in record.sources) and not record.verified:
        left.append("--verify-images decodes the pictures")
    return f"{what} is sound as far as was looked: {', '.join(left)}." if left else f"{what} can be trained on."


def _lengths(record: MixtureCheck) -> Grid:
    rows = tuple(_length_row(one) for one in record.sources)
    columns = ("source", "counted", "tokens", "median", "longest", "over the limit")
    return Grid("Lengths", columns, rows, note=f"Tokens, pictures' included; the limit is {record.max_length:,}.")


def _length_row(source: SourceCheck) -> tuple[str, ...]:
    of = source.lengths
    if of is None:
        return (source.source, *(NONE,) * 5)
    return (source.source, *(f"{value:,}" for value in (of.counted, of.tokens, of.median, of.longest, of.over)))


def print_check(record: MixtureCheck, console: Console) -> None:
    """Prints the tables, the first faults of each kind, and whether all is well."""
    print_grids(check_grids(record), console)
    shown: Counter[str] = Counter()
    counted = {
        "record": sum(one.faulty for one in record.sources),
        "missing": sum(one.missing for one in record.sources),
        "unreadable": sum(one.unreadable for one in record.sources),
        "long": sum(one.lengths.over for one in record.sources if one.lengths),
    }
    for kind, meaning in KINDS.items():
        if not counted[kind]:
            continue
        console.print(Text(f"{counted[kind]:,} {meaning}", style="bold red"))
        for fault in record.faults:
            if fault.kind == kind and shown[kind] < SHOWN:
                shown[kind] += 1
                console.print(Text(f"  {fault.problem}"))
        if counted[kind] > shown[kind]:
            console.print(Text("  … (--list FILE writes all)", style="dim"))
    if record.cut is not None:
        console.print(Text(f"Not read to its end: {record.cut}", style="bold red"))
    if record.is_sound:
        console.print(Text(_sound(record), style="bold green"))


def print_manifest(record: Manifest, console: Console) -> None:
    """Prints what was taken of each source, by turns."""
    sources = sorted({one.source for one in record.strata})
    rows = tuple((source, *_taken(record, source)) for source in sources)
    columns = ("source", "written", *(f"{n} turns" if n < TURNS else f"{n} and more" for n in range(1, TURNS + 1)))
    drawn = ", ".join(f"{part.name} {_weight(part.weight)}" for part in record.parts)
    note = f"{record.records:,} records: {drawn}; seed {record.seed}. In brackets: of how many."
    print_grids([Grid(record.name, columns, rows, note=note)], console)


def _taken(record: Manifest, source: str) -> list[str]:
    written, found = Counter[int](), Counter[int]()
    for one in record.strata:
        if one.source == source:
            turns = min(max(one.turns, 1), TURNS)
            written[turns] += one.written
            found[turns] += one.found
    cells = [_cell(written[turns], found[turns]) for turns in range(1, TURNS + 1)]
    return [_cell(written.total(), found.total()), *cells]


def _cell(written: int, found: int) -> str:
    return f"{written:,} ({found:,})" if found else NONE


def _weight(weight: float | None) -> str:
    if weight is None:
        return "by the authors' rule"
    return percent(weight) if weight < 1 else f"{weight:g} times"
