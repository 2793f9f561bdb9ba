"""STDiT, the spatial-temporal diffusion transformer of Open-Sora v1: the network alone.

It is given a noisy film (as latents of an image VAE), a diffusion timestep and a caption (as T5
tokens), and predicts the noise in the film and, in a second half of its channels, how uncertain
each step back is. What is done with that prediction stands in sample.py. Names of modules are those
of the released weights. "Report" is Open-Sora v1's technical report.

Shapes, in this file:
    B batch    C latent channels (4)    H, W latent height and width
    T frames; behind the embedder in units of the patch's frames (1 in v1)
    h, w patches per frame, down and across    S = h*w patches per frame    D hidden size
    L caption tokens    E caption channels    N length of any sequence of tokens
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

# ---------------------------------------------------------------------------------------------
# Configuration
#
# One frozen dataclass says everything that decides shapes and positions. Two models that agree in
# it can exchange weights; two that differ only in the scales can as well, which is how training
# moves from small films to large ones.


@dataclass(frozen=True)
class STDiTConfig:
    depth: int = 28  # blocks
    hidden_size: int = 1152  # D, channels of a token; a multiple of 4: sin and cos, of x and y
    num_heads: int = 16  # attention heads; D / heads = 72 channels each
    mlp_ratio: float = 4.0  # hidden channels of the MLP per token channel
    patch_size: tuple = (1, 2, 2)  # latents in a token; 2 frames in one were worse in v1
    in_channels: int = 4  # C, fixed by the VAE
    caption_channels: int = 4096  # E, fixed by the text encoder; 4096: T5-XXL
    caption_length: int = 120  # most caption tokens, and the length of the null caption
    variant: str = "sequential"  # how space and time attend: one after the other, as v1 chose
    space_scale: float | tuple = 1.0  # place = index / scale; 1 at 512x512, 0.5 at 256x256
    time_scale: float = 1.0  # index / scale; 1 for every 3rd source frame, 3/2 for every 2nd


MODELS = {
    "STDiT-XL/2": STDiTConfig(),
    "toy": STDiTConfig(
        depth=4,
        hidden_size=128,
        num_heads=4,
        caption_channels=64,
        caption_length=16,
        space_scale=0.125,  # a grid of 4x4 patches spread over the range that 512x512 has
        time_scale=0.25,
    ),
}

# ---------------------------------------------------------------------------------------------
# Where and when: sinusoids
#
# Attention does not see order. So a token is told its place by a vector of sines and cosines of it
# at frequencies from 1 down to 1/10000, and the network its timestep in the same way. Positions are
# indices divided by a scale: a model trained on 32x32 patches reads a grid of 16x16 at scale 0.5 as
# the same picture seen coarsely, and that is what makes training from small to large films cheap
# (report, T1). All of it stays in fp32: in bf16 only 507 of the 1000 timesteps would remain
# distinct.


@lru_cache(maxsize=32)
def frequencies(n, device):
    """10000^(-i/n) for i = 0 to n - 1, fp32 [n]. Worked out in float64, which Apple's GPUs lack, so
    on the CPU.
    """
    return (10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)).float().to(device)


def sinusoid(position, dim):
    """Sines and cosines of a position (any shape, fp32) at dim / 2 frequencies: two of [..., dim /
    2].
    """
    angle = position[..., None] * frequencies(dim // 2, position.device)
    return angle.sin(), angle.cos()


def scaled_index(n, scale, device):
    """0, 1/scale, ... (n - 1)/scale as fp32 [n]. With scale = inf all places are the same place."""
    return torch.tensor([i / scale for i in range(n)], dtype=torch.float32, device=device)


@lru_cache(maxsize=32)  # a run sees few grids, thousands of times
def spatial_embedding(h, w, dim, scale, device):
    """[S, D], rows in the order of patches (h, w). First half of the channels: x; second: y; each
    sin, cos.
    """
    scale_h, scale_w = scale if isinstance(scale, tuple) else (scale, scale)
    x = torch.cat(sinusoid(scaled_index(w, scale_w, device), dim // 2), dim=-1)  # [w, D/2]
    y = torch.cat(sinusoid(scaled_index(h, scale_h, device), dim // 2), dim=-1)  # [h, D/2]
    both = torch.cat([x[None].expand(h, -1, -1), y[:, None].expand(-1, w, -1)], dim=-1)
    return rearrange(both, "h w d -> (h w) d")


@lru_cache(maxsize=32)
def temporal_embedding(t, dim, scale, device):
    """[T, D], sin before cos."""
    return torch.cat(sinusoid(scaled_index(t, scale, device), dim), dim=-1)


# ---------------------------------------------------------------------------------------------
# The parts of a block: two kinds of attention, and an MLP
#
# Neither attention knows about space or time: each looks along the middle dimension of what it is
# given. Which tokens share a sequence is decided by one rearrange in Block, and that is the whole
# of STDiT.


def split_heads(x, parts, heads):
    """[B, N, parts * D] -> parts tensors of [B, heads, N, D / heads]; weights are laid out (part,
    head, channel).
    """
    return rearrange(x, "b n (p heads d) -> p b heads n d", p=parts, heads=heads).unbind(0)


class SelfAttention(nn.Module):
    """Every token of a sequence looks at all of them. [B, N, D] -> [B, N, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # 3 x [B, heads, N, D/heads]
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(D/heads)) v
        return self.proj(rearrange(out, "b heads n d -> b n (heads d)"))


class CrossAttention(nn.Module):
    """Every token looks at the caption. x [B, N, D], y [B, L, D], mask [B, L] (True: a real token).
    -> [B, N, D].
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y, mask=None):
        (q,) = split_heads(self.q_linear(x), 1, self.heads)  # [B, heads, N, D/heads]
        k, v = split_heads(self.kv_linear(y), 2, self.heads)  # [B, heads, L, D/heads]
        if mask is not None:
            mask = mask[:, None, None, :]  # [B, 1, 1, L]  padding takes no part, whoever asks
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(out, "b heads n d -> b n (heads d)"))


class MLP(nn.Module):
    """Two linear layers with GELU between them, token by token. [..., D] -> [..., D_out]."""

    def __init__(self, dim, hidden, out):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def norm(x):
    """LayerNorm without weights of its own: scale and shift come from the timestep (modulate)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    """adaLN, DiT (arXiv 2212.09748) section 3.2: the timestep sets each channel's scale and
    shift.
    """
    return norm(x) * (1 + scale) + shift


# ---------------------------------------------------------------------------------------------
# The block
#
# A film of T frames and S patches is T*S tokens. Attention among all of them costs (T*S)^2; STDiT
# lets a token look at its own frame (S^2 each) and then at its own patch through time (T^2 each),
# one after the other in every block, so that two hops connect any two tokens (report, A3). The rest
# is PixArt-alpha's block: six rows set by the timestep (a table per block + one shared MLP of t,
# "adaLN-single", arXiv 2310.00426 section 2.3), cross-attention to the caption, MLP. That a block
# starts out as exactly PixArt's is the point: the temporal projection starts at zero, so the first
# film of a model that starts from PixArt's weights is T of PixArt's pictures (A5).
#
# Things that surprise: the temporal attention has no norm and no modulation and shares the spatial
# one's gate; the cross-attention has neither norm nor gate. So the released weights want it.


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, heads = config.hidden_size, config.num_heads
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.attn = SelfAttention(D, heads)
        self.attn_temp = SelfAttention(D, heads)
        self.cross_attn = CrossAttention(D, heads)
        self.mlp = MLP(D, int(D * config.mlp_ratio), D)

    def forward(self, x, y, mask, rows, time):
        """x [B, T, S, D] tokens; y [B, L, D] caption; mask [B, L] or None; rows [B, 6, D] from the
        timestep; time [T, 1, D], or None: the temporal embedding, which only the first block is
        given. -> [B, T, S, D].
        """
        B, T, S, D = x.shape
        rows = (self.scale_shift_table + rows)[:, :, None, None]  # [B, 6, 1, 1, D]
        # [B, 1, 1, D]; attention, MLP
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows.unbind(1)

        # 1. space: each frame looks at itself
        a = rearrange(modulate(x, shift_a, scale_a), "b t s d -> (b t) s d")  # [B*T, S, D]
        x = x + gate_a * rearrange(self.attn(a), "(b t) s d -> b t s d", t=T)

        # 2. time: each patch looks through all frames. The embedding goes to this attention alone,
        # not to x.
        a = x if time is None else x + time
        a = rearrange(a, "b t s d -> (b s) t d")  # [B*S, T, D]
        x = x + gate_a * rearrange(self.attn_temp(a), "(b s) t d -> b t s d", s=S)

        # 3. caption, 4. MLP: token by token, so how they are laid out does not matter
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).view(B, T, S, D)
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))


# ---------------------------------------------------------------------------------------------
# The embedders and the final layer


class PatchEmbedder(nn.Module):
    """A patch of latents becomes a token. [B, C, T, H, W] -> [B, T/pt, S, D]."""

    def __init__(self, config):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x):
        return rearrange(self.proj(x), "b d t h w -> b t (h w) d")


class TimestepEmbedder(nn.Module):
    """t [B], 0 to 999 -> [B, D]. 256 channels of sinusoid, cos before sin, then a small MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        sin, cos = sinusoid(t.float(), 256)  # fp32, also under autocast
        return self.mlp(torch.cat([cos, sin], dim=-1).to(self.mlp[0].weight.dtype))


class CaptionEmbedder(nn.Module):
    """T5's tokens [B, L, E] -> [B, L, D]; and the null caption that stands for "no caption"."""

    def __init__(self, config):
        super().__init__()
        E, D = config.caption_channels, config.hidden_size
        self.y_proj = MLP(E, D, D)
        # Not trained in v1: the network learns to read it as it is.
        self.register_buffer("y_embedding", torch.randn(config.caption_length, E) / E**0.5)

    def forward(self, y):
        return self.y_proj(y)


class FinalLayer(nn.Module):
    """Tokens [B, T, S, D] -> patches [B, T, S, pt*ph*pw*2C]. Its two rows come from t *before*
    t_block.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.linear = nn.Linear(D, math.prod(config.patch_size) * 2 * config.in_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)

    def forward(self, x, t):
        # t [B, D] is the timestep's embedding
        # [B, 1, 1, D]
        shift, scale = (self.scale_shift_table + t[:, None])[:, :, None, None].unbind(1)
        return self.linear(modulate(x, shift, scale))


# ---------------------------------------------------------------------------------------------
# The network


class STDiT(nn.Module):
    """STDiT-XL/2 at its defaults: 759,620,768 parameters, 610,856,096 of them PixArt-alpha's."""

    def __init__(self, config: STDiTConfig):
        super().__init__()
        if config.variant != "sequential":
            raise ValueError(f"variant={config.variant!r}: only 'sequential' is there")
        if config.hidden_size % 4 or config.hidden_size % config.num_heads:
            raise ValueError(
                f"hidden_size={config.hidden_size} must divide by 4 and "
                f"num_heads={config.num_heads}"
            )
        D = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Xavier for all linears; then small embedders; then the zeros with which temporal and
        cross-attention and the output start as nothing.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                # a view: a Conv3d counts as its linear layer
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.blocks:
            # at step 0 a film is T pictures (report, A5)
            nn.init.zeros_(block.attn_temp.proj.weight)
            nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y, mask=None):
        """Predict noise and variance.

        x [B, C, T, H, W] noisy latents; t [B] timesteps (0 to 999, any real dtype);
        y [B, L, E] caption tokens; mask [B, L], true where a token is real, or None: all are. ->
        [B, 2C, T, H, W]: C channels of noise, then C of variance (sample.py, "The model's
        variance"). Any T, and any H and W that the patch divides: positions are computed for the
        grid at hand.
        """
        (pt, ph, pw), (T, H, W) = self.config.patch_size, x.shape[2:]
        if T % pt or H % ph or W % pw:
            raise ValueError(f"latents of {T}x{H}x{W} do not divide into patches of {pt}x{ph}x{pw}")
        T, h, w = T // pt, H // ph, W // pw
        D, device = self.config.hidden_size, x.device
        space = spatial_embedding(h, w, D, self.config.space_scale, device)  # [S, D]
        time = temporal_embedding(T, D, self.config.time_scale, device)[:, None]  # [T, 1, D]

        x = self.x_embedder(x) + space  # [B, T, S, D]
        t = self.t_embedder(t)  # [B, D]
        rows = self.t_block(t).unflatten(1, (6, D))  # [B, 6, D]  shared by all blocks
        y = self.y_embedder(y)  # [B, L, D]
        mask = None if mask is None else mask.bool()  # [B, L]
        for i, block in enumerate(self.blocks):
            x = block(x, y, mask, rows, time if i == 0 else None)  # [B, T, S, D]
        x = self.final_layer(x, t)  # [B, T, S, pt*ph*pw*2C]
        return unpatchify(x, self.config.patch_size, h, w)  # [B, 2C, T*pt, H, W]


def unpatchify(x, patch_size, h, w):
    """[B, T, h*w, pt*ph*pw*C] -> [B, C, T*pt, h*ph, w*pw]; within a patch the channel comes
    last.
    """
    pt, ph, pw = patch_size
    return rearrange(
        x, "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", h=h, w=w, pt=pt, ph=ph, pw=pw
    )


def drop_captions(y, mask, drop, null):
    """Put the null caption in place of some captions: (y, mask) with all of null's tokens where
    drop is true.

    y [B, L, E], mask [B, L], drop [B] bool, null [caption_length, E] (the model's
    y_embedder.y_embedding). The null caption is used whole. v1 kept the mask of the prompt that it
    stood in for, so that "no caption" meant something else after a short prompt than after a long
    one.
    """
    pad = null.shape[0] - y.shape[1]
    # [B, caption_length, E], [B, caption_length]
    y, mask = F.pad(y, (0, 0, 0, pad)), F.pad(mask.bool(), (0, pad))
    return torch.where(drop[:, None, None], null.to(y.dtype), y), mask | drop[:, None]
