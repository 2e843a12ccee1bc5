"""Tables for papers, in LaTeX with booktabs."""

from collections.abc import Sequence

from routing_experts.reports.summary import Grid

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
    "\N{EM DASH}": "---",
    "\N{EN DASH}": "--",
}


def latex_tables(grids: Sequence[Grid]) -> str:
    """Each with its title and note as the caption."""
    return "\n".join(_latex_table(grid) for grid in grids)


def _latex_table(grid: Grid) -> str:
    columns = "".join("l" if place < grid.num_texts else "r" for place in range(len(grid.columns)))
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(grid.columns)]
    lines.append(r"\midrule")
    for place, row in enumerate(grid.rows):
        cells = [rf"\textbf{{{_escape(cell)}}}" for cell in row] if place == grid.highlighted else None
        lines.append(" & ".join(cells) + r" \\" if cells else _row(row))
    caption = _escape(f"{grid.title}. {grid.note}".strip())
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escape, cells)) + r" \\"


def _escape(text: str) -> str:
    return "".join(_ESCAPES.get(mark, mark) for mark in text)
