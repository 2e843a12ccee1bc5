"""``roe train``: a recipe to its end."""

from typing import Annotated, Any

import typer
import yaml

from routing_experts.cli.output import AsJson
from routing_experts.errors import ConfigError


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (digits, pocket …).")],
    output: Annotated[str | None, typer.Option(help="The run's folder, instead of the recipe's.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart/--resume", help="Throw away the folder's run, or go on from where it stopped.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although records or learning rates were changed meanwhile.")
    ] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Train the dense control instead: the base, same records, same steps.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Overrule a setting, e.g. --set training.steps=100.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Train nothing; count the memory of each stage, by ways to tune.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="For --estimate: how many train together.")] = 1,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="For --estimate: a dialogue's length; the recipe's longest by default.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Train a model by a recipe, or count what memory it would take.

    Example: roe train digits --output runs/mine --set training.batch_size=32
    """
    from routing_experts.cli.memory import say_memory
    from routing_experts.cli.output import print_json, start
    from routing_experts.training.processes import is_main_process
    from routing_experts.training.recipe import load_recipe
    from routing_experts.training.run import train as run_training
    from routing_experts.training.run import tuned_base

    say = start()
    overrides = parse_settings(set_ or [])
    if output is not None:
        overrides["output"] = output
    settings = load_recipe(recipe, overrides)
    settings = tuned_base(settings) if dense else settings
    if not estimate and (processes > 1 or tokens is not None):
        raise typer.BadParameter(
            "--processes and --tokens are for --estimate. To train with several, start them: torchrun "
            "--nproc_per_node 8 -m routing_experts train …"
        )
    if estimate:
        say_memory(settings, processes, tokens, json, say)
        return
    trained = run_training(settings, say.progress, restart, accept_changes)
    if not is_main_process():
        return
    if json:
        print_json({"run": settings.output, "model": str(trained.folder)}, say)
        return
    say.results.print(f"model: {trained.folder}")


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``a.b=value`` texts as values by dotted path; values are read as YAML.

    Raises:
        ConfigError: if a text has no ``=``, or its value is not YAML.
    """
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair}: expected name=value, such as training.steps=100. Add the value.")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair}: the value is not YAML ({error}). Quote it.") from error
    return values
