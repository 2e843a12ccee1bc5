"""Settings of LLaVA-HR: transformers' LLaVA with another vision tower.

Nothing is imported from transformers' own families: this file is read while they may be half imported.
"""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from routing_experts.errors import ConfigError

SLOW_STRIDE = 32  # pixels that one place of a ConvNeXt's last map stands for: a stem of 4, then three halvings


class LlavaHrVisionConfig(PreTrainedConfig):
    """The two towers and what joins them. What is not told here is a CLIP tower's, named as transformers names it.

    Attributes:
        image_size: pixels a side that CLIP's positions were trained for.
        input_image_size: pixels of the square picture that both towers get, S.
        slow_hidden_sizes, slow_depths: widths and numbers of blocks of the ConvNeXt's four stages.
        slow_norm_eps: of the ConvNeXt's normalisations.
        adapter_layers: the CLIP layers, counted from 0, behind each of which an adapter mixes in the high resolution;
            none in checkpoints of the first training stage.
        freeze_vision: whether the towers stay as they are when the model is tuned.
    """

    model_type = "llava_hr_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    image_size: int = 336
    patch_size: int = 14
    input_image_size: int = 1024
    slow_hidden_sizes: list[int] | tuple[int, ...] = (192, 384, 768, 1536)
    slow_depths: list[int] | tuple[int, ...] = (3, 3, 27, 3)
    slow_norm_eps: float = 1e-6
    adapter_layers: list[int] | tuple[int, ...] = (5, 11, 17)
    freeze_vision: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.slow_hidden_sizes, self.slow_depths = list(self.slow_hidden_sizes), list(self.slow_depths)
        self.adapter_layers = list(self.adapter_layers)
        if self.input_image_size < SLOW_STRIDE or self.input_image_size % SLOW_STRIDE:
            raise ConfigError(
                f"input_image_size {self.input_image_size}: the high-resolution tower halves a picture five times, so "
                f"its side has to be a multiple of {SLOW_STRIDE}. LLaVA-HR was published with 1024."
            )
        if self.low_resolution % self.patch_size:
            raise ConfigError(
                f"input_image_size {self.input_image_size} with patches of {self.patch_size}: the low-resolution "
                f"picture of {self.low_resolution} pixels is no whole number of them. Choose a size that is."
            )
        if self.input_image_size % self.patches_per_side:
            raise ConfigError(
                f"input_image_size {self.input_image_size} gives {self.patches_per_side} visual tokens along a side: "
                "each has to stand for whole pixels. LLaVA-HR was published with 384, 768, 1024 and 1536."
            )
        low, high = sorted((self.patches_per_side, self.slow_side))
        if high % low:
            raise ConfigError(
                f"input_image_size {self.input_image_size} gives maps of {self.patches_per_side} and {self.slow_side} "
                "places a side: one has to divide the other. LLaVA-HR was published with 384, 768, 1024 and 1536."
            )
        in_order = sorted(set(self.adapter_layers)) == self.adapter_layers
        if not in_order or any(not 0 <= layer < self.num_hidden_layers for layer in self.adapter_layers):
            raise ConfigError(
                f"adapter_layers {self.adapter_layers} of a tower of {self.num_hidden_layers} layers: each has one "
                "adapter at most, and they are counted from 0. Name layers in order, up to "
                f"{self.num_hidden_layers - 1}."
            )

    @property
    def low_resolution(self) -> int:
        """Pixels a side of the picture that CLIP gets: as many patches as the ConvNeXt has places, or its own size."""
        return max(self.input_image_size * self.patch_size // SLOW_STRIDE, self.image_size)

    @property
    def patches_per_side(self) -> int:
        """CLIP's patches along a side; their square is the number of visual tokens."""
        return self.low_resolution // self.patch_size

    @property
    def slow_side(self) -> int:
        """Places along a side of the ConvNeXt's last map."""
        return self.input_image_size // SLOW_STRIDE


class LlavaHrConfig(PreTrainedConfig):
    """A LLaVA with LLaVA-HR's tower: transformers' settings of LLaVA, where all of the tower's output is taken."""

    model_type = "llava_hr"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": LlavaHrVisionConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: str = "full"  # there is no class token
    vision_feature_layer: int = -1  # what comes out behind the fusion
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, LlavaHrVisionConfig):
            self.vision_config = LlavaHrVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            settings = {"model_type": "llama"} | (self.text_config or {})
            self.text_config = CONFIG_MAPPING[settings["model_type"]](**settings)
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @property
    def image_seq_length(self) -> int:
        """Visual tokens of a picture."""
        assert isinstance(self.vision_config, LlavaHrVisionConfig), "made one of them when built"
        return self.vision_config.patches_per_side**2


MODELS: dict[str, dict[type, str]] = {
    "AutoModel": {LlavaHrVisionConfig: "LlavaHrVisionModel"},
    "AutoModelForImageTextToText": {LlavaHrConfig: "LlavaHrForConditionalGeneration"},
}
