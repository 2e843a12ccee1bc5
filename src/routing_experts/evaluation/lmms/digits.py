"""The digits questions as an lmms-eval task: a folder with its YAML, its data and what scores them."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from routing_experts.data.images import load_image
from routing_experts.data.records import IMAGE_PLACEHOLDER
from routing_experts.errors import ConfigError
from routing_experts.evaluation.evaluate import MAX_NEW_TOKENS
from routing_experts.evaluation.questions import Question
from routing_experts.optional import need
from routing_experts.records import write_text

TASK = "roe_digits"
_YAML = f"""# Written by `roe data export digits`; lmms-eval finds it with --include_path and this folder.
task: {TASK}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: questions.parquet}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.shown
doc_to_text: !function utils.asked
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {MAX_NEW_TOKENS}, do_sample: false}}
process_results: !function utils.matched
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_FUNCTIONS = """from routing_experts.evaluation.lmms.scorers import asked, matched, shown

__all__ = ["asked", "matched", "shown"]
"""


def write_task(folder: Path, questions: Sequence[Question]) -> None:
    """Writes questions of one turn each as a task.

    Raises:
        ConfigError: if a question has a history, which a document of this task has no place for.
    """
    datasets = need("datasets", "eval", "writing a task")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(question) for question in questions]
    features = datasets.Features(
        {"id": datasets.Value("string"), "question": datasets.Value("string"), "answer": datasets.Value("string")}
        | {"kind": datasets.Value("string"), "image": datasets.Image()}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "questions.parquet"))
    write_text(folder / f"{TASK}.yaml", _YAML)
    write_text(folder / "utils.py", _FUNCTIONS)


def _row(question: Question) -> dict[str, Any]:
    record = question.record
    if len(record.turns) > 1:
        raise ConfigError(f"question {record.id} has {len(record.turns)} turns: a task's document asks one question.")
    picture = None
    if record.images:
        buffer = BytesIO()
        load_image(record.images[0], record.id).save(buffer, format="PNG")
        picture = {"bytes": buffer.getvalue(), "path": None}
    asked = record.turns[0].question.replace(f"{IMAGE_PLACEHOLDER}\n", "")
    return {
        "id": record.id,
        "question": asked,
        "answer": question.answer,
        "kind": question.task,
        "image": picture,
    }
