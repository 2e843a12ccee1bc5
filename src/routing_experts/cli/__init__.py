"""The command ``roe``: one file a verb, nothing heavy imported before a verb runs."""


def main() -> None:
    """The console script's entry."""
    from routing_experts.cli.app import run

    run()
