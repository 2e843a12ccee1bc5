"""LLaVA-HR (Luo et al., 2024, "Feast Your Eyes: Mixture-of-Resolution Adaptation"), which transformers lacks.

A LLaVA whose vision tower sees a picture twice: a CLIP ViT at low and a ConvNeXt at high resolution, mixed inside the
ViT by mixture-of-resolution adapters. Everything behind the tower is transformers' own LLaVA.
"""

# First: importing it registers the configurations below (``routing_experts.autoload``), which therefore have to be
# importable from there.
import transformers.models.auto.configuration_auto  # noqa: F401

from routing_experts.models.llava_hr.configuration import LlavaHrConfig, LlavaHrVisionConfig

__all__ = ["LlavaHrConfig", "LlavaHrVisionConfig"]
