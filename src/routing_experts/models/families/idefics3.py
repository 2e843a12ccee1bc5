"""Idefics3, and the first SmolVLM, whose checkpoints are of this type."""

from routing_experts.models.families.registry import Family, register

register(Family("idefics3", ("image_token_id",), description="Idefics3, and the first SmolVLM"))
