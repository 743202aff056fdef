"""The original forward pass, stated again from its architecture, to compare with: names of weights as in the released file.

Plain PyTorch with nothing of diffusers or of this project: what agrees with it agrees for no shared reason.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


class ResBlock(nn.Module):
    def __init__(self, width, out, time_width):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x, time, text):
        h = self.in_layers(x) + self.emb_layers(time)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width, source, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, source):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return self.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GatedUnits(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GatedUnits(width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, context, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, text):
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads)])

    def forward(self, x, time, text):
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, time, text):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, time, text):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Entry(nn.Conv2d):
    def forward(self, x, time=None, text=None):
        return super().forward(x)


class Encoder(nn.Module):
    """What the UNet and the control model share: time embedding, input blocks and middle."""

    def __init__(
        self, width=320, mults=(1, 2, 4, 4), blocks=2, attention=(True, True, True, False), context=768, heads=8
    ):
        super().__init__()
        self.width, time_width = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.input_blocks = nn.ModuleList([nn.ModuleList([Entry(4, width, 3, padding=1)])])
        self.skips, here = [width], width
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                parts = [ResBlock(here, here := mult * width, time_width)]
                parts += [SpatialTransformer(here, context, heads)] if attention[level] else []
                self.input_blocks.append(nn.ModuleList(parts))
                self.skips.append(here)
            if level < len(mults) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(here)]))
                self.skips.append(here)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(here, here, time_width),
                SpatialTransformer(here, context, heads),
                ResBlock(here, here, time_width),
            ]
        )

    def embed_time(self, timesteps):
        """Cosines, then sines, of frequencies from 1 down to almost 1 / 10000."""
        half = self.width // 2
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))


def run(parts, x, time, text):
    for part in parts:
        x = part(x, time, text)
    return x


def stem(channels, width):
    convolutions = [
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 96, 3, padding=1, stride=2),
        nn.Conv2d(96, 96, 3, padding=1),
        nn.Conv2d(96, 256, 3, padding=1, stride=2),
        nn.Conv2d(256, width, 3, padding=1),
    ]
    return nn.Sequential(*(part for each in convolutions for part in (each, nn.SiLU())))[:-1]


class ControlModel(Encoder):
    def __init__(self, **options):
        super().__init__(**options)
        self.input_hint_block, self.input_cond_block = stem(6, self.width), stem(3, self.width)
        self.zero_convs = nn.ModuleList([nn.ModuleList([nn.Conv2d(width, width, 1)]) for width in self.skips])
        self.middle_block_out = nn.ModuleList([nn.Conv2d(self.skips[-1], self.skips[-1], 1)])

    def forward(self, x, timesteps, example_pair, query, text):
        time = self.embed_time(timesteps)
        hint = self.input_hint_block(example_pair) + self.input_cond_block(query)
        outputs = []
        for index, (block, zero) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            x = run(block, x, time, text)
            x = x + hint if index == 0 else x
            outputs.append(zero[0](x))
        return [*outputs, self.middle_block_out[0](run(self.middle_block, x, time, text))]


class UNet(Encoder):
    def __init__(
        self, width=320, mults=(1, 2, 4, 4), blocks=2, attention=(True, True, True, False), context=768, heads=8
    ):
        super().__init__(width, mults, blocks, attention, context, heads)
        waiting, here = list(self.skips), mults[-1] * width
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for index in range(blocks + 1):
                parts = [ResBlock(here + waiting.pop(), here := mult * width, 4 * width)]
                parts += [SpatialTransformer(here, context, heads)] if attention[level] else []
                parts += [Upsample(here)] if level and index == blocks else []
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x, timesteps, text, control):
        control = list(control)
        time = self.embed_time(timesteps)
        kept = []
        for block in self.input_blocks:
            x = run(block, x, time, text)
            kept.append(x)
        x = run(self.middle_block, x, time, text) + control.pop()
        for block in self.output_blocks:
            x = run(block, torch.cat([x, kept.pop() + control.pop()], dim=1), time, text)
        return self.out(x)


class VAEBlock(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VAEAttention(nn.Module):
    """One head over all places; its projections are 1 x 1 convolutions."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2) for part in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


class VAELevel(nn.Module):
    def __init__(self, widths, resample=None):
        super().__init__()
        self.block = nn.ModuleList([VAEBlock(before, out) for before, out in pairwise(widths)])
        if resample is not None:
            convolution = nn.Module()
            convolution.conv = nn.Conv2d(widths[-1], widths[-1], 3, **resample[1])
            setattr(self, resample[0], convolution)

    def forward(self, x):
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            return self.downsample.conv(functional.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            return self.upsample.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return x


def vae_middle(width):
    middle = nn.Module()
    middle.block_1, middle.attn_1, middle.block_2 = VAEBlock(width, width), VAEAttention(width), VAEBlock(width, width)
    return middle


class VAESide(nn.Module):
    def __init__(self, entering, leaving, middle, last):
        super().__init__()
        self.conv_in, self.mid = nn.Conv2d(*entering, 3, padding=1), vae_middle(middle)
        self.norm_out, self.conv_out = nn.GroupNorm(32, last, eps=1e-6), nn.Conv2d(last, leaving, 3, padding=1)

    def run_middle(self, x):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def leave(self, x):
        return self.conv_out(functional.silu(self.norm_out(x)))


class VAE(nn.Module):
    def __init__(self, widths=(128, 256, 512, 512), blocks=2, latents=4):
        super().__init__()
        top = widths[-1]
        self.encoder = VAESide((3, widths[0]), 2 * latents, top, top)
        self.encoder.down = nn.ModuleList()
        for level, (before, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            shrink = ("downsample", {"stride": 2}) if level < len(widths) - 1 else None
            self.encoder.down.append(VAELevel([before, *[out] * blocks], shrink))
        self.decoder = VAESide((latents, top), 3, top, widths[0])
        self.decoder.up = nn.ModuleList()
        for level, (out, before) in enumerate(zip(widths, (*widths[1:], top), strict=True)):
            grow = ("upsample", {"padding": 1}) if level else None
            self.decoder.up.append(VAELevel([before, *[out] * (blocks + 1)], grow))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1), nn.Conv2d(latents, latents, 1)

    def encode(self, x):
        """Mean and logarithm of the variance, one after the other."""
        x = self.encoder.conv_in(x)
        for level in self.encoder.down:
            x = level(x)
        return self.quant_conv(self.encoder.leave(self.encoder.run_middle(x)))

    def decode(self, z):
        x = self.decoder.run_middle(self.decoder.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.decoder.up):
            x = level(x)
        return self.decoder.leave(x)
