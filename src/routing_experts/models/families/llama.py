"""Llama on its own: text only, for benchmarks and for what shares its layers."""

from routing_experts.models.families.registry import Family, register

register(Family("llama", auto_class="AutoModelForCausalLM", description="Llama text models"))
