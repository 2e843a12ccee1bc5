"""Instruction sets of gigabytes: checked, drawn from and joined without being held in memory."""
