"""Routing Experts."""
