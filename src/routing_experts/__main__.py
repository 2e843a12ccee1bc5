"""``python -m routing_experts`` is ``roe``: launchers of several processes take a module's name."""

from routing_experts.cli import main

if __name__ == "__main__":
    main()
