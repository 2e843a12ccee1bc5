"""LLaVA-HR's vision tower, and the model: transformers' LLaVA around it.

Shapes: B pictures, S pixels a side, N visual tokens, D the ViT's width, C channels of the ConvNeXt's last map.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import ConvNextConfig, LlavaForConditionalGeneration
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextEncoder,
    ConvNextLayerNorm,
)

from routing_experts.errors import ModelFamilyError
from routing_experts.models.llava_hr.adapters import (
    FusionProjector,
    ResolutionAdapter,
    XavierConv2d,
    ZeroConv2d,
    as_tokens,
)
from routing_experts.models.llava_hr.configuration import LlavaHrConfig, LlavaHrVisionConfig


class FastEmbeddings(nn.Module):
    """Patches of the low-resolution picture with CLIP's positions, spread over as many patches as there are.

    CLIP's class token is left out: LLaVA-HR drops it before the first normalisation, so nothing ever reads it. Its
    position stays the table's first row, as weights are published.
    """

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.resolution = config.low_resolution
        self.side, self.trained_side = config.patches_per_side, config.image_size // patch
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + self.trained_side**2, width)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Embeds; returns [B, N, D]."""
        size = (self.resolution, self.resolution)
        small = interpolate(pixels_B3SS.float(), size=size, mode="bilinear", align_corners=True)
        patches_BND = as_tokens(self.patch_embedding(small.to(self.patch_embedding.weight.dtype)))
        return patches_BND + self.positions(patches_BND.device)

    def positions(self, device: torch.device) -> Tensor:
        """[N, D]; bicubic and antialiased in 32 bits, unlike what transformers' CLIP does on its own."""
        # Looked up, not read: weights that are kept elsewhere arrive when their module is called.
        trained_ND = self.position_embedding(torch.arange(1, 1 + self.trained_side**2, device=device))
        if self.side == self.trained_side:
            return trained_ND
        grid = trained_ND.T.reshape(1, -1, self.trained_side, self.trained_side).float()
        spread = interpolate(grid, size=(self.side, self.side), mode="bicubic", antialias=True)
        return spread.flatten(2)[0].T.to(trained_ND.dtype)


class SlowTower(nn.Module):
    """A ConvNeXt without its head: the last stage's map of the whole picture."""

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__()
        settings = ConvNextConfig(
            num_channels=config.num_channels, hidden_sizes=config.slow_hidden_sizes, depths=config.slow_depths
        )
        self.embeddings = ConvNextEmbeddings(settings)
        self.encoder: Any = ConvNextEncoder(settings)
        for module in self.modules():  # transformers writes 1e-6 into them
            if isinstance(module, ConvNextLayerNorm):
                module.eps = config.slow_norm_eps
        self.gradient_checkpointing = False  # transformers sets it, and what recomputes

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Looks; returns [B, C, S / 32, S / 32]."""
        map_BChw = self.embeddings(pixels_B3SS.to(self.embeddings.patch_embeddings.weight.dtype))
        recompute: Any = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        for stage in self.encoder.stages:
            for layer in stage.downsampling_layer:
                map_BChw = layer(map_BChw)
            for block in stage.layers:
                map_BChw = block(map_BChw) if recompute is None else recompute(block, map_BChw)
        return map_BChw


class LlavaHrVisionModel(CLIPPreTrainedModel):
    """Both towers and what joins them; its output is [B, N, D]."""

    config_class = LlavaHrVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["CLIPEncoderLayer", "ConvNextLayer", "ResolutionAdapter"]  # noqa: RUF012 (transformers' way)

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__(config)
        width, channels = config.hidden_size, config.slow_hidden_sizes[-1]
        self.embeddings = FastEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # spelled as CLIP spells it
        self.encoder = CLIPEncoder(config)  # type: ignore[arg-type]
        self.slow_tower = SlowTower(config)
        self.side = config.input_image_size
        self.adapter_layers = tuple(config.adapter_layers)
        self.adapters = nn.ModuleList([ResolutionAdapter(width, channels) for _ in config.adapter_layers])
        self.fusion_projector = FusionProjector(width, channels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Looks at pictures.

        Args:
            pixel_values: [B, 3, S, S], normalised as CLIP's are; both towers share them.
            **_: what LLaVA asks of towers whose layers it chooses from.

        Raises:
            ModelFamilyError: if they are of another size.
        """
        if pixel_values.shape[-2:] != (self.side, self.side):
            raise ModelFamilyError(
                f"pictures of {pixel_values.shape[-1]} × {pixel_values.shape[-2]} pixels: this tower was made for "
                f"{self.side} × {self.side}, and would see something else in others. Prepare them with its processor."
            )
        slow_BChw = self.slow_tower(pixel_values)  # whole, before the first adapter: all of them read its last map
        hidden_BND = self.pre_layrnorm(self.embeddings(pixel_values))
        behind = dict(zip(self.adapter_layers, self.adapters, strict=True))
        for number, layer in enumerate(self.encoder.layers):
            hidden_BND = layer(hidden_BND, attention_mask=None)
            if number in behind:
                hidden_BND = behind[number](hidden_BND, slow_BChw)
        fused_BND = self.fusion_projector(hidden_BND, slow_BChw)
        return BaseModelOutputWithPooling(last_hidden_state=fused_BND, hidden_states=(fused_BND,))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # which sets every bias to zero
        if isinstance(module, XavierConv2d):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, ZeroConv2d):
            init.zeros_(module.weight)


class LlavaHrForConditionalGeneration(LlavaForConditionalGeneration):
    """Transformers' LLaVA; its configuration brings LLaVA-HR's tower."""

    config_class = LlavaHrConfig
