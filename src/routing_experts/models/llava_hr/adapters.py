"""How LLaVA-HR mixes resolutions: adapters inside the low-resolution tower, and a fusion behind it.

Shapes: B pictures, N visual tokens, D the ViT's width, C channels of the ConvNeXt's last map, h × w its places.
Source: Luo et al., 2024, section 3, and the authors' code.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, interpolate


class XavierConv2d(nn.Conv2d):
    """A convolution that begins at random, after Xavier; a class of its own so that initialising tells it apart."""


class ZeroConv2d(nn.Conv2d):
    """A convolution that begins at zero."""


class ResolutionAdapter(nn.Module):
    """Adds what the high resolution sees to a layer's tokens, as much of it as a gate lets through.

    The low ("fast") side is refined by a depthwise convolution, the high ("slow") side is brought to its width; one
    number a picture, from the means of both, says how much of the slow side is added. Fresh, it is an identity.
    """

    def __init__(self, hidden_size: int, slow_channels: int) -> None:
        super().__init__()
        self.slow_conv = XavierConv2d(slow_channels, slow_channels, 1)
        self.slow_proj = ZeroConv2d(slow_channels, hidden_size, 1)
        self.fast_conv = XavierConv2d(hidden_size, hidden_size, 7, padding=3, groups=hidden_size)
        self.fast_proj = ZeroConv2d(hidden_size, hidden_size, 1)
        self.gate = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size // 2), nn.GELU(), nn.Linear(hidden_size // 2, 1)
        )

    def forward(self, fast_BND: Tensor, slow_BChw: Tensor) -> Tensor:
        """Mixes; returns [B, N, D]."""
        slow_BND = aligned(self.slow_proj(gelu(self.slow_conv(slow_BChw))), fast_BND.shape[1])
        map_BDnn = as_map(fast_BND)
        fast_BND = as_tokens(map_BDnn + self.fast_proj(gelu(self.fast_conv(map_BDnn))))
        return fast_BND + self.gate_values(fast_BND, slow_BND) * slow_BND

    def gate_values(self, fast_BND: Tensor, slow_BND: Tensor) -> Tensor:
        """How much of the slow side is added, from -1 to 1; [B, 1, 1]."""
        means = torch.cat([fast_BND, slow_BND], dim=-1).mean(dim=1, keepdim=True)
        return torch.tanh(self.gate(means))


class FusionProjector(nn.Module):
    """The last meeting of both towers: each side through a linear layer of its own, added."""

    def __init__(self, hidden_size: int, slow_channels: int) -> None:
        super().__init__()
        self.fast_proj = nn.Linear(hidden_size, hidden_size)
        self.slow_proj = nn.Linear(slow_channels, hidden_size)

    def forward(self, fast_BND: Tensor, slow_BChw: Tensor) -> Tensor:
        """Fuses; returns [B, N, D]."""
        return self.fast_proj(fast_BND) + self.slow_proj(aligned(slow_BChw, fast_BND.shape[1]))


def aligned(map_BDhw: Tensor, num_tokens: int) -> Tensor:
    """A map as ``num_tokens`` tokens [B, N, D]: stretched where it has fewer places, averaged where it has more.

    Stretching is bilinear with aligned corners, in 32 bits.
    """
    wanted, side = round(num_tokens**0.5), map_BDhw.shape[-1]
    if side < wanted:
        stretched = interpolate(map_BDhw.float(), size=(wanted, wanted), mode="bilinear", align_corners=True)
        map_BDhw = stretched.to(map_BDhw.dtype)
    elif side > wanted:
        map_BDhw = avg_pool2d(map_BDhw, side // wanted)
    return as_tokens(map_BDhw)


def as_tokens(map_BDhw: Tensor) -> Tensor:
    """[B, D, h, w] as [B, h · w, D]."""
    return map_BDhw.flatten(2).transpose(1, 2)


def as_map(tokens_BND: Tensor) -> Tensor:
    """[B, N, D] as a square map [B, D, √N, √N]."""
    batch, count, width = tokens_BND.shape
    side = round(count**0.5)
    return tokens_BND.transpose(1, 2).reshape(batch, width, side, side)
