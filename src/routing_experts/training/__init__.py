"""Recipes, stages as pure functions of progress, optimiser groups, and the one trainer."""
