"""Qwen2.5-VL: window-attention tower with a merger, Qwen2 decoder, positions on a grid of time, height and width."""

from routing_experts.models.families.registry import Family, register

# The tokens that open and close a picture stand for no visual features: the last one begins the question.
VISUAL_TOKENS = ("image_token_id", "video_token_id")
register(Family("qwen2_5_vl", VISUAL_TOKENS, uses_mrope=True, description="Qwen2.5-VL"))
