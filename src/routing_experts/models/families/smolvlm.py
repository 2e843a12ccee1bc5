"""SmolVLM2: SigLIP tower, connector, Llama decoder; a large picture is cut into tiles."""

from routing_experts.models.families.registry import Family, register

register(Family("smolvlm", ("image_token_id",), description="SmolVLM2, 256M to 2.2B"))
