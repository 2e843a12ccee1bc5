"""LLaVA-1.5 and LLaVA-HR once more, in plain arithmetic over the names that their authors publish. Slow on purpose.

No module of torch or transformers, and nothing of the package: what is not a matrix product or a convolution is a loop.
Everything is in 64 bits but the resizing, which the originals do in 32. Written from the models' description.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from published import FAST_TOWER, LLAVA_TOWER, SLOW_TOWER, Sizes

Tensors = dict[str, Tensor]


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    bias = t.get(f"{name}.bias")
    return x @ t[f"{name}.weight"].T + (0 if bias is None else bias)


def layer_norm(t: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * t[f"{name}.weight"] + t[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softmax(x: Tensor) -> Tensor:
    grown = torch.exp(x - x.max(-1, keepdim=True).values)
    return grown / grown.sum(-1, keepdim=True)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, causal: bool) -> Tensor:
    """Of one sequence: q [T, heads · d], k and v [T, kv_heads · d]."""
    size = q.shape[1] // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        mine, theirs = slice(head * size, (head + 1) * size), slice(kv * size, (kv + 1) * size)
        scores = q[:, mine] @ k[:, theirs].T / math.sqrt(size)
        if causal:
            later = torch.arange(len(q))[None, :] > torch.arange(len(q))[:, None]
            scores = scores.masked_fill(later, float("-inf"))
        out[:, mine] = softmax(scores) @ v[:, theirs]
    return out


def clip_layer(t: Tensors, name: str, x: Tensor, heads: int) -> Tensor:
    h = layer_norm(t, f"{name}.layer_norm1", x, 1e-5)
    q, k, v = (linear(t, f"{name}.self_attn.{n}_proj", h) for n in "qkv")
    x = x + linear(t, f"{name}.self_attn.out_proj", attention(q, k, v, heads, heads, causal=False))
    h = layer_norm(t, f"{name}.layer_norm2", x, 1e-5)
    return x + linear(t, f"{name}.mlp.fc2", quick_gelu(linear(t, f"{name}.mlp.fc1", h)))


def patches_of(t: Tensors, prefix: str, picture: Tensor, patch: int) -> Tensor:
    """[N, D], row by row."""
    kernel = t[f"{prefix}embeddings.patch_embedding.weight"]
    side = picture.shape[-1] // patch
    rows = []
    for row in range(side):
        for column in range(side):
            piece = picture[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            rows.append((kernel * piece).sum((1, 2, 3)))
    return torch.stack(rows)


def clip_features(t: Tensors, picture: Tensor, s: Sizes, prefix: str = LLAVA_TOWER) -> Tensor:
    """What LLaVA-1.5 takes: the last layer but one, without the class token."""
    tokens = torch.cat([t[f"{prefix}embeddings.class_embedding"][None], patches_of(t, prefix, picture, s.patch)])
    x = tokens + t[f"{prefix}embeddings.position_embedding.weight"]
    x = layer_norm(t, f"{prefix}pre_layrnorm", x, 1e-5)
    for layer in range(s.clip_layers - 1):
        x = clip_layer(t, f"{prefix}encoder.layers.{layer}", x, s.clip_heads)
    return x[1:]


def projected(t: Tensors, x: Tensor) -> Tensor:
    return linear(t, "model.mm_projector.2", gelu(linear(t, "model.mm_projector.0", x)))


def rotated(x: Tensor, heads: int) -> Tensor:
    """Llama's rotary positions: the first half of a head turns with its second half."""
    length, width = x.shape
    size = width // heads
    out = x.clone()
    for position in range(length):
        for head in range(heads):
            for i in range(size // 2):
                angle = position / 10000 ** (2 * i / size)
                a, b = x[position, head * size + i], x[position, head * size + i + size // 2]
                out[position, head * size + i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, head * size + i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rms_norm(t: Tensors, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * t[f"{name}.weight"]


def llama_logits(t: Tensors, x: Tensor, s: Sizes) -> Tensor:
    """[T, vocabulary] from embeddings [T, hidden]."""
    for layer in range(s.layers):
        name = f"model.layers.{layer}"
        h = rms_norm(t, f"{name}.input_layernorm", x)
        q, k, v = (linear(t, f"{name}.self_attn.{n}_proj", h) for n in "qkv")
        seen = attention(rotated(q, s.heads), rotated(k, s.kv_heads), v, s.heads, s.kv_heads, causal=True)
        x = x + linear(t, f"{name}.self_attn.o_proj", seen)
        h = rms_norm(t, f"{name}.post_attention_layernorm", x)
        gate, up = linear(t, f"{name}.mlp.gate_proj", h), linear(t, f"{name}.mlp.up_proj", h)
        x = x + linear(t, f"{name}.mlp.down_proj", silu(gate) * up)
    return linear(t, "lm_head", rms_norm(t, "model.norm", x))


def spliced(t: Tensors, ids: list[int], features: list[Tensor]) -> Tensor:
    """Embeddings of ids in which -200 stands for a picture, taken in order."""
    left = list(features)
    return torch.cat([left.pop(0) if i == -200 else t["model.embed_tokens.weight"][i][None] for i in ids])


def stretched(maps: Tensor, size: int) -> Tensor:
    """Bilinear, corners aligned: [C, h, h] to [C, size, size]. In 32 bits, places included, whose rounding shows."""
    maps, side = maps.float(), maps.shape[-1]
    step = np.float32(side - 1) / np.float32(size - 1)
    out = torch.zeros(len(maps), size, size)
    for row in range(size):
        for column in range(size):
            y, x = (float(np.float32(place) * step) for place in (row, column))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
            up, down, near, far = 1 - (y - top), y - top, 1 - (x - left), x - left
            out[:, row, column] = up * (near * maps[:, top, left] + far * maps[:, top, right]) + down * (
                near * maps[:, bottom, left] + far * maps[:, bottom, right]
            )
    return out.double()


def antialiased(line: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing along the last axis, which is stretched, in 32 bits."""
    side = line.shape[-1]
    scale = side / size
    assert scale <= 1
    out = torch.zeros(*line.shape[:-1], size)

    def kernel(x: float) -> float:
        x, a = abs(x), -0.5
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    for place in range(size):
        center = scale * (place + 0.5)
        first, last = max(int(center - 2 + 0.5), 0), min(int(center + 2 + 0.5), side)
        weights = [kernel(source - center + 0.5) for source in range(first, last)]
        for source, weight in zip(range(first, last), weights, strict=True):
            out[..., place] += line[..., source].float() * (weight / sum(weights))
    return out


def positions(table: Tensor, side: int) -> Tensor:
    """CLIP's patch positions over a grid of another size, [side², D]."""
    trained = round(len(table) ** 0.5)
    grid = table.T.reshape(-1, trained, trained)
    if trained != side:
        grid = antialiased(antialiased(grid, side).transpose(1, 2), side).transpose(1, 2)
    return grid.reshape(len(grid), -1).T.double()


def convnext(t: Tensors, prefix: str, picture: Tensor, s: Sizes, eps: float) -> Tensor:
    """The last stage's map, [C, S / 32, S / 32]."""

    def norm(name: str, maps: Tensor) -> Tensor:
        return layer_norm(t, name, maps.permute(1, 2, 0), eps).permute(2, 0, 1)

    def conv(name: str, maps: Tensor, **how: int) -> Tensor:
        return conv2d(maps[None], t[f"{name}.weight"], t[f"{name}.bias"], **how)[0]

    x = norm(f"{prefix}stem.1", conv(f"{prefix}stem.0", picture, stride=4))
    for stage, depth in enumerate(s.slow_depths):
        name = f"{prefix}stages.{stage}"
        if stage:
            x = conv(f"{name}.downsample.1", norm(f"{name}.downsample.0", x), stride=2)
        for block in range(depth):
            inner = f"{name}.blocks.{block}"
            y = conv(f"{inner}.conv_dw", x, padding=3, groups=len(x))
            y = layer_norm(t, f"{inner}.norm", y.permute(1, 2, 0), eps)
            y = linear(t, f"{inner}.mlp.fc2", gelu(linear(t, f"{inner}.mlp.fc1", y))) * t[f"{inner}.weight"]
            x = x + y.permute(2, 0, 1)
    return x


def tokens_of(maps: Tensor, count: int) -> Tensor:
    """[N, C] from a map that is stretched or averaged to N places."""
    wanted, side = round(count**0.5), maps.shape[-1]
    if side < wanted:
        maps = stretched(maps, wanted)
    elif side > wanted:
        ratio = side // wanted
        maps = maps.reshape(len(maps), wanted, ratio, wanted, ratio).mean((2, 4))
    return maps.reshape(len(maps), -1).T


def adapted(t: Tensors, name: str, fast: Tensor, slow_map: Tensor) -> Tensor:
    """A mixture-of-resolution adapter: fast [N, D], slow [C, h, w]."""
    places = slow_map.flatten(1).T
    inner = gelu(places @ t[f"{name}.slow_conv.weight"].flatten(1).T + t[f"{name}.slow_conv.bias"])
    slow = inner @ t[f"{name}.slow_proj.weight"].flatten(1).T + t[f"{name}.slow_proj.bias"]
    slow = tokens_of(slow.T.reshape(-1, *slow_map.shape[1:]), len(fast))
    side = round(len(fast) ** 0.5)
    grid = fast.T.reshape(1, -1, side, side)
    seen = conv2d(grid, t[f"{name}.fast_conv.weight"], t[f"{name}.fast_conv.bias"], padding=3, groups=grid.shape[1])
    refined = gelu(seen[0].flatten(1).T) @ t[f"{name}.fast_proj.weight"].flatten(1).T + t[f"{name}.fast_proj.bias"]
    fast = fast + refined
    means = torch.cat([fast, slow], dim=1).mean(0)
    gate = torch.tanh(linear(t, f"{name}.gate.2", gelu(linear(t, f"{name}.gate.0", means))))
    return fast + gate * slow


def llava_hr_features(t: Tensors, picture: Tensor, s: Sizes, eps: float, adapters: bool = True) -> Tensor:
    """[N, D] of a picture [3, S, S], before the projector."""
    side = picture.shape[-1]
    low = max(int(side / 32 * s.patch), s.image)
    small = stretched(picture, low)
    table = t[f"{FAST_TOWER}embeddings.position_embedding.weight"][1:]
    x = patches_of(t, FAST_TOWER, small, s.patch) + positions(table, low // s.patch)
    x = layer_norm(t, f"{FAST_TOWER}pre_layrnorm", x, 1e-5)
    slow = convnext(t, SLOW_TOWER, picture, s, eps)
    for layer in range(s.clip_layers):
        x = clip_layer(t, f"{FAST_TOWER}encoder.layers.{layer}", x, s.clip_heads)
        group = s.clip_layers // 4
        if adapters and (layer + 1) % group == 0 and layer + 1 < s.clip_layers:
            x = adapted(t, f"model.vision_tower.align_stages_latent.{(layer + 1) // group - 1}", x, slow)
    name = "model.vision_tower.align_stages.0"
    return linear(t, f"{name}.fast_proj", x) + linear(t, f"{name}.slow_proj", tokens_of(slow, len(x)))
