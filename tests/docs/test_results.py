"""README quotes records only: the table between its markers is a committed record's, word for word."""

from pathlib import Path

from routing_experts.records import Results, StudyRecord
from routing_experts.reports import results_markdown, study_markdown

ROOT = Path(__file__).parents[2]


def test_readme_table_is_the_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    record = Results.load(ROOT / "benchmarks" / "results" / "quickstart.json")
    assert table.strip() == results_markdown(record).strip()


def test_the_study_s_tables_are_the_record() -> None:
    """Guards docs/studies.md against numbers that no study measured."""
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    block = page.split("<!-- study:begin -->\n")[1].split("<!-- study:end -->")[0]
    assert block == study_markdown(StudyRecord.load(ROOT / "benchmarks" / "results" / "study.json"))
