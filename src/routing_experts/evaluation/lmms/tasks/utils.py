"""What the tasks beside this file call; lmms-eval finds functions by a file of this name."""

from routing_experts.evaluation.lmms.scorers import asked, found, shown

__all__ = ["asked", "found", "shown"]
