"""``roe quickstart``: the whole job on the pocket model and real handwritten digits, in minutes on a laptop."""

import time
from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson


def quickstart(
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/quickstart"),
    questions: Annotated[int, typer.Option(min=16, help="Held-out questions asked of every model.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the held-out questions.")] = 1000,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an earlier quickstart left.")] = False,
    json: AsJson = False,
) -> None:
    """Convert, train, evaluate and time the pocket model; write a report.

    Example: roe quickstart --output runs/first
    """
    from routing_experts.cli.judge import judge
    from routing_experts.cli.output import print_json, start
    from routing_experts.evaluation.questions import digits_questions
    from routing_experts.records import RESULTS_NAME
    from routing_experts.reports import print_results, write_report
    from routing_experts.training.recipe import load_recipe
    from routing_experts.training.run import train, tuned_base

    started = time.monotonic()
    say = start()
    console = say.progress
    recipe = load_recipe("quickstart", {"output": str(output)})
    restart |= (output / RESULTS_NAME).is_file()  # one that came to its end starts anew, a broken one goes on
    (output / RESULTS_NAME).unlink(missing_ok=True)
    console.print("[bold]1/4[/] the pocket model learns to skip its layers")
    train(recipe, console, restart)
    console.print("[bold]2/4[/] the dense control: the same base, records and steps, without routing")
    train(tuned_base(recipe), console, restart)
    console.print("[bold]3/4[/] held-out handwriting, measured seconds")
    asked = digits_questions(questions, seed)
    results, _ = judge(str(output), asked, console, seed, seconds_before=time.monotonic() - started)
    results.save(output / RESULTS_NAME)
    console.print("[bold]4/4[/] report")
    page = write_report(output)
    if json:
        print_json(results.checked_dict(), say)
        return
    print_results(results, say.results)
    say.results.print(f"report:  {page}\nresults: {output / RESULTS_NAME}\nmodel:   {output / 'model'}")
