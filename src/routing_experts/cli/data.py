"""``roe data``: data sets in forms that other tools read."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson

app = typer.Typer(no_args_is_help=True, help="Write data sets in forms that other tools read.")


@app.callback()
def _data() -> None:
    """Keeps the commands below commands of their own, however few they are."""


@app.command("digits")
def digits(
    folder: Annotated[Path, typer.Argument(help="Where the task goes: its YAML, its questions and what scores them.")],
    questions: Annotated[int, typer.Option(min=1, help="How many held-out questions.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 1000,
    json: AsJson = False,
) -> None:
    """Write the digits questions as a task of lmms-eval.

    Example: roe data digits tasks, then lmms-eval --model roe --include_path tasks --tasks roe_digits …
    """
    from routing_experts.cli.output import print_json, start
    from routing_experts.evaluation.lmms.digits import TASK, write_task
    from routing_experts.evaluation.questions import digits_questions

    say = start()
    write_task(folder, digits_questions(questions, seed))
    if json:
        print_json({"folder": str(folder), "task": TASK, "questions": questions, "seed": seed}, say)
        return
    say.results.print(f"task {TASK}: {folder}")
