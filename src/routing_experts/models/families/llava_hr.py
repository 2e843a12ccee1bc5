"""LLaVA-HR: a CLIP and a ConvNeXt tower mixed, projector, Llama decoder; the package brings its classes."""

from routing_experts.models.families.registry import Family, register

register(
    Family(
        "llava_hr",
        ("image_token_id",),
        package="routing_experts.models.llava_hr",
        picture_shape=lambda config: (3, config.vision_config.input_image_size, config.vision_config.input_image_size),
        tunes_tower=lambda config: not config.vision_config.freeze_vision,
        description="LLaVA-HR, 7B and X-13B (imported by `roe import`)",
    )
)
