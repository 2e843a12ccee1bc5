"""LLaVA-1.5 in transformers' layout: CLIP tower, projector, Llama decoder."""

from routing_experts.models.families.registry import Family, register

register(Family("llava", ("image_token_id",), description="LLaVA-1.5 (transformers' layout) and models built like it"))
