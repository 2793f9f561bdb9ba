"""STDiT, the spatial-temporal diffusion transformer of Open-Sora v1: the network alone.

Input: noisy video latents, a timestep, T5 embeddings of the caption. Output: 2C channels, the
predicted noise followed by v, from which the variance of the reverse step is computed. The
diffusion process is in sample.py. Module names are those of the released weights. "v1" is Open-Sora
v1, "the report" its technical report.

Shapes in this file:
    B batch    C latent channels (4)    H, W latent height and width
    T frames; after patchify, patches along time (in v1 the same, since a patch is 1 frame long)
    h, w patches per column and per row    S = h*w patches per frame    D hidden size
    L caption tokens    E caption channels
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# ---------------------------------------------------------------------------------------------
# Configuration
#
# The config determines all shapes and positions. Models whose configs differ only in the two scales
# can load each other's weights, which is how training moves from small to large videos.

VARIANTS = ("full", "sequential", "parallel", "latte")


@dataclass(frozen=True)
class STDiTConfig:
    depth: int = 28  # blocks
    hidden_size: int = 1152  # D, channels of a token
    num_heads: int = 16  # attention heads, D / heads = 72 channels each
    mlp_ratio: float = 4.0  # hidden channels of the MLP / D
    patch_size: tuple = (1, 2, 2)  # frames, height, width; patches of 2 frames were worse (report)
    in_channels: int = 4  # C, given by the VAE
    caption_channels: int = 4096  # E, given by the text encoder; T5-XXL has 4096
    caption_length: int = 120  # L, maximum number of caption tokens
    variant: str = "sequential"  # design of the block, one of VARIANTS; v1: sequential
    space_scale: float | tuple = 1.0  # spatial position = index / scale; a pair is (h, w)
    time_scale: float = 1.0  # temporal position = index / scale

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # config.json has no tuples
                object.__setattr__(self, name, tuple(value))


MODELS = {
    "STDiT-XL/2": STDiTConfig(),
    "toy": STDiTConfig(
        depth=4,
        hidden_size=128,
        num_heads=4,
        caption_channels=64,
        caption_length=16,
        space_scale=0.125,  # 4x4 patches (64x64 pixels) span the positions of 32x32 (512x512)
        time_scale=0.25,
    ),
}
# Patches of 2 frames are twice as far apart in time (report, section on patch embedding).
MODELS["toy-2x2x2"] = replace(MODELS["toy"], patch_size=(2, 2, 2), time_scale=0.125)

# ---------------------------------------------------------------------------------------------
# Sinusoidal embeddings
#
# Attention does not depend on the order of its tokens, so positions are added, as vectors of sines
# and cosines. A position is index / scale: at scale 0.5 a 16x16 grid covers the positions of a
# 32x32 grid, so a model trained at one size can be fine-tuned at another. Positions are computed in
# float64 and rounded once to fp32. Timesteps stay in fp32: in bf16 only 507 of 1000 are distinct.


def get_1d_sincos_pos_embed(length, dim, scale):
    """float64 [length, dim]: sines, then cosines, of the positions index / scale."""
    position = torch.arange(length, dtype=torch.float64) / scale
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = position[:, None] * frequency  # [length, dim/2]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@lru_cache(maxsize=32)  # every step uses the same few grids
def spatial_pos_embed(h, w, dim, scale, device):
    """fp32 [S, D], row-major in (h, w). The first half of the channels encodes the column, the
    second the row, as in the released weights. scale: a number or a pair (scale_h, scale_w).
    """
    scale_h, scale_w = scale if isinstance(scale, tuple) else (scale, scale)
    column = get_1d_sincos_pos_embed(w, dim // 2, scale_w).expand(h, -1, -1)  # [h, w, D/2]
    row = get_1d_sincos_pos_embed(h, dim // 2, scale_h)[:, None].expand(-1, w, -1)  # [h, w, D/2]
    return torch.cat([column, row], dim=-1).flatten(0, 1).float().to(device)


@lru_cache(maxsize=32)
def temporal_pos_embed(t, dim, scale, device):
    """fp32 [1, T, 1, D], to be added to tokens [B, T, S, D]."""
    return get_1d_sincos_pos_embed(t, dim, scale)[None, :, None].float().to(device)


# ---------------------------------------------------------------------------------------------
# Attention and MLP
#
# Self-attention acts on sequences of tokens. Which tokens form a sequence (a frame, a patch through
# time, a whole video) is decided by the rearrange around it, in attend below; that is how the four
# variants differ.


class SelfAttention(nn.Module):
    """Multi-head self-attention among N tokens. x [B, N, D]; returns [B, N, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D/heads]
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Tokens attend to the caption. x [B, T, S, D], y [B, L, D], mask [B, L], True at real tokens;
    returns [B, T, S, D].

    Frames are folded into the batch, and the caption's keys are repeated for each frame. Otherwise
    T*S queries would share L = 120 keys, and the backward pass of fused attention, which is
    parallel over batch, heads and keys, would use little of a GPU (not measured).
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y, mask=None):
        T = x.shape[1]
        q = rearrange(self.q_linear(x), "b t s (h d) -> (b t) h s d", h=self.heads)
        kv = self.kv_linear(y).repeat_interleave(T, dim=0)  # [B*T, L, 2D]
        k, v = rearrange(kv, "bt l (kv h d) -> kv bt h l d", kv=2, h=self.heads)
        if mask is not None:
            mask = mask.repeat_interleave(T, dim=0)[:, None, None]  # [B*T, 1, 1, L]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B*T, heads, S, D/heads]
        return self.proj(rearrange(out, "(b t) h s d -> b t s (h d)", t=T))


class MLP(nn.Module):
    """Linear, GELU, linear. [..., dim] -> [..., out]."""

    def __init__(self, dim, hidden, out):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def norm(x):
    """LayerNorm over channels without scale and shift, which modulate applies."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    """adaLN: scale and shift from the timestep (DiT, arXiv 2212.09748, section 3.2)."""
    return x * (1 + scale) + shift


# ---------------------------------------------------------------------------------------------
# Sequence parallelism
#
# The activations of 65,536 tokens (64x512x512 pixels) may not fit on one GPU. In sequence
# parallelism the n processes of a group share a video, each holding T/n frames. Only temporal
# attention needs all frames: an all-to-all before it gathers frames and scatters patches, and a
# second one undoes this (Dynamic Sequence Parallelism, arXiv 2403.10266). Each process sends
# (n-1)/n of its tokens twice; splitting heads (Ulysses) would send q, k, v and the output. n must
# divide T and S. Without a group (None), the three functions return x.


def all_to_all(x, gather_dim, scatter_dim, group):
    """Gather one dimension and scatter another. From [B, T/n, S, D], gather_dim=1 and scatter_dim=2
    give [B, T, S/n, D]; gather_dim=2 and scatter_dim=1 undo it.
    """
    if group is None:
        return x
    parts = torch.stack(x.chunk(group.size(), scatter_dim))  # [n, B, ...]
    parts = all_to_all_single_autograd(parts, None, None, group)  # sends parts[i] to process i
    return torch.cat(parts.unbind(), gather_dim)


def split_frames(x, group):
    """The frames of this process: [B, T/n, ...] of x [B, T, ...]."""
    return x if group is None else x.chunk(group.size(), 1)[group.rank()]


def gather_frames(x, group):
    """The frames of all processes, [B, T, ...], on each of them. x [B, T/n, ...].

    Each process computes the same loss on all frames. So in the backward pass a process receives n
    equal gradients for its frames and sums them; DDP's average over all processes divides by n.
    (An all-to-all of copies is an all-gather.)
    """
    if group is None:
        return x
    parts = x.expand(group.size(), *x.shape).contiguous()  # [n, B, T/n, ...]
    parts = all_to_all_single_autograd(parts, None, None, group)
    return torch.cat(parts.unbind(), 1)


# ---------------------------------------------------------------------------------------------
# The block
#
# Full attention over the T*S tokens of a video costs (T*S)^2. STDiT attends within each frame (S^2)
# and then, for each patch, across frames (T^2): information still passes between any two tokens.
# The rest is PixArt-alpha's block: shift, scale and gate from the timestep (one shared MLP plus a
# table per block, "adaLN-single", arXiv 2310.00426 section 2.3), cross-attention to the caption,
# MLP. The output projection of the temporal attention starts at zero, so a model that starts from
# PixArt-alpha first generates T independent PixArt images.
#
# To match the released weights, temporal attention has no norm, no shift and scale, and shares the
# gate of spatial attention; cross-attention has neither norm nor gate.
#
# The report compares four designs:
#     full        one attention over all tokens
#     sequential  spatial, then temporal attention: the choice of v1
#     parallel    both on the input of the block, outputs added; same weight names as sequential
#     latte       a PixArt block for space, then one for time with its own table and MLP, without
#                 cross-attention. The temporal block is not zero at first, so a latte model cannot
#                 start as PixArt-alpha.
# The temporal position embedding is added in the first block only: to the input of temporal
# attention (sequential, parallel) or to the tokens themselves (full, latte).


def attend(attention, x, pattern):
    """Attention within sequences of the tokens x [B, T, S, D]. The pattern "(b t) s d" makes a
    sequence of each frame, "(b s) t d" of each patch across frames, "b (t s) d" of a whole video.
    Returns [B, T, S, D].
    """
    _, t, s, _ = x.shape
    out = attention(rearrange(x, f"b t s d -> {pattern}"))
    return rearrange(out, f"{pattern} -> b t s d", t=t, s=s)


def temporal_attention(attention, x, group):
    """Attention across frames. x [B, T, S, D], with a group T/n frames; returns the same shape."""
    kind = x.device.type
    if group and torch.is_autocast_enabled(kind):  # send bf16; attention casts to it anyway
        x = x.to(torch.get_autocast_dtype(kind))
    x = all_to_all(x, gather_dim=1, scatter_dim=2, group=group)  # with a group: [B, T, S/n, D]
    x = attend(attention, x, "(b s) t d")
    return all_to_all(x, gather_dim=2, scatter_dim=1, group=group)


# Outputs kept by selective activation checkpointing: matrix products, attention, communication.
SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.all_to_all_single.default,
]


class STDiTBlock(nn.Module):
    """One block. activation_checkpointing says what is kept for the backward pass: "none": all
    activations; "full": the block's inputs, and the block is recomputed; "selective": also the
    outputs of SAVED_OPS (18 D values per token if sequential or parallel), so only norms and
    elementwise operations are recomputed.
    """

    def __init__(self, config):
        super().__init__()
        D, heads = config.hidden_size, config.num_heads
        hidden = int(D * config.mlp_ratio)
        self.variant = config.variant
        self.activation_checkpointing = "none"
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.attn = SelfAttention(D, heads)
        if self.variant != "full":
            self.attn_temp = SelfAttention(D, heads)
        self.cross_attn = CrossAttention(D, heads)
        self.mlp = MLP(D, hidden, D)
        if self.variant == "latte":
            self.scale_shift_table_temp = nn.Parameter(torch.randn(6, D) / D**0.5)
            self.mlp_temp = MLP(D, hidden, D)

    def forward(self, *inputs):
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(*inputs)
        options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing here is random
        if self.activation_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, SAVED_OPS)
        return checkpoint(self.compute, *inputs, **options)

    def compute(self, x, y, mask, modulation, temporal_pos, group=None):
        """x [B, T, S, D] tokens; y [B, L, D] caption; mask [B, L] or None; modulation [B, 6, D]
        from the timestep; temporal_pos [1, T, 1, D] in the first block, 0 in the others. Returns
        [B, T, S, D]. With a group, x and temporal_pos are this process's frames.
        """
        m = self.scale_shift_table + modulation  # [B, 6, D]
        m = m[:, :, None, None].unbind(1)  # 6 x [B, 1, 1, D]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = m

        if self.variant == "full":
            x = x + temporal_pos
        pattern = "b (t s) d" if self.variant == "full" else "(b t) s d"
        out = attend(self.attn, modulate(norm(x), shift_attn, scale_attn), pattern)
        if self.variant == "parallel":
            out = out + temporal_attention(self.attn_temp, x + temporal_pos, group)
        x = x + gate_attn * out
        if self.variant == "sequential":
            x = x + gate_attn * temporal_attention(self.attn_temp, x + temporal_pos, group)

        x = x + self.cross_attn(x, y, mask)
        x = x + gate_mlp * self.mlp(modulate(norm(x), shift_mlp, scale_mlp))

        if self.variant == "latte":
            m = (self.scale_shift_table_temp + modulation)[:, :, None, None].unbind(1)
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = m
            x = x + temporal_pos
            x_attn = modulate(norm(x), shift_attn, scale_attn)
            x = x + gate_attn * temporal_attention(self.attn_temp, x_attn, group)
            x = x + gate_mlp * self.mlp_temp(modulate(norm(x), shift_mlp, scale_mlp))
        return x


# ---------------------------------------------------------------------------------------------
# Embedders and final layer


def patchify(x, patch_size):
    """[B, C, T*pt, h*ph, w*pw] -> [B, T, S, C*pt*ph*pw], channels first as in a Conv3d's weight."""
    pt, ph, pw = patch_size
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(x, patch_size, h, w):
    """[B, T, h*w, pt*ph*pw*C] -> [B, C, T*pt, h*ph, w*pw], channels last as in released models."""
    pt, ph, pw = patch_size
    pattern = "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
    return rearrange(x, pattern, h=h, w=w, pt=pt, ph=ph, pw=pw)


class PatchEmbedder(nn.Module):
    """Patches [B, T, S, C*pt*ph*pw] -> tokens [B, T, S, D], a linear layer. self.proj is a Conv3d
    only so that its weight has the shape of the released one.
    """

    def __init__(self, config):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x):
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Timesteps [B], 0 to 999 -> [B, D]: an MLP after a sinusoidal embedding of 256 channels. The
    cosines come first, as in the released weights (in the position embeddings the sines do).
    """

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t.float()[:, None] * frequency  # [B, 128], fp32
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype))


class CaptionEmbedder(nn.Module):
    """T5 embeddings [B, L, E] -> [B, L, D]. y_embedding [L, E] is the null caption, which is used
    when there is no caption; it is a buffer and not trained, as in v1.
    """

    def __init__(self, config):
        super().__init__()
        E, D = config.caption_channels, config.hidden_size
        self.y_proj = MLP(E, D, D)
        self.register_buffer("y_embedding", torch.randn(config.caption_length, E) / E**0.5)

    def forward(self, y):
        return self.y_proj(y)


class FinalLayer(nn.Module):
    """(x [B, T, S, D], t_emb [B, D]) -> patches [B, T, S, pt*ph*pw*2C]. t_emb is the output of
    t_embedder, not of t_block.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.linear = nn.Linear(D, math.prod(config.patch_size) * 2 * config.in_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)

    def forward(self, x, t_emb):
        m = self.scale_shift_table + t_emb[:, None]  # [B, 2, D]
        shift, scale = m[:, :, None, None].unbind(1)  # 2 x [B, 1, 1, D]
        return self.linear(modulate(norm(x), shift, scale))


# ---------------------------------------------------------------------------------------------
# The network


def autocast(device):
    """The precision of the blocks: matrix products in bf16 on CUDA, fp32 on CPU and MPS. Weights,
    the loss and everything outside the blocks stay in fp32: rounding the noisy latents to bf16
    would add noise to what the network has to predict.
    """
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class STDiT(nn.Module, PyTorchModelHubMixin):
    """STDiT-XL/2 has 759,620,768 parameters, 610,856,096 of them from PixArt-alpha. save_pretrained
    writes config.json and model.safetensors, which sample.load_model reads, and a model card.
    """

    def __init__(self, config: STDiTConfig):
        super().__init__()
        if config.variant not in VARIANTS:
            raise ValueError(f"variant={config.variant!r}: expected one of {', '.join(VARIANTS)}")
        D = config.hidden_size
        self.config = config
        # Sequence-parallel group, set by train.py and sample.py; each process gets the whole video.
        self.sp_group = None
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(STDiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # Conv3d like a linear layer
                nn.init.zeros_(module.bias)
        y_proj = self.y_embedder.y_proj
        t_mlp = self.t_embedder.mlp
        for linear in (t_mlp[0], t_mlp[2], self.t_block[1], y_proj.fc1, y_proj.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        # These start at zero: the final layer and the output projections of cross-attention and (in
        # sequential and parallel) of temporal attention.
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)
            if self.config.variant in ("sequential", "parallel"):
                nn.init.zeros_(block.attn_temp.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y, mask=None):
        """Predict noise and variance.

        x [B, C, T, H, W] noisy latents; t [B] timesteps, 0 to 999; y [B, L, E] T5 embeddings;
        mask [B, L], True where a token is real, or None if all are. Returns [B, 2C, T, H, W]: C
        channels of noise, C of variance (sample.py, log_variance). Positions are computed for the
        given grid: any T, H, W that the patch divides. With sequence parallelism, the tokens in the
        comments below have T/n frames.
        """
        c = self.config
        pt, ph, pw = c.patch_size
        T, h, w = x.shape[2] // pt, x.shape[3] // ph, x.shape[4] // pw
        group = self.sp_group
        if group and (c.variant == "full" or T % group.size() or h * w % group.size()):
            sizes = f"{T} frames and {h * w} patches"
            raise ValueError(f"sp={group.size()} must divide {sizes}, and be 1 for variant=full")

        x = split_frames(patchify(x, c.patch_size), group)  # [B, T, S, C*pt*ph*pw]
        x = self.x_embedder(x) + spatial_pos_embed(h, w, c.hidden_size, c.space_scale, x.device)
        temporal_pos = temporal_pos_embed(T, c.hidden_size, c.time_scale, x.device)
        temporal_pos = split_frames(temporal_pos, group)  # [1, T, 1, D]
        # full and latte add it to the tokens themselves; a single frame gets none, so that they
        # process it as an image model does.
        if T == 1 and c.variant in ("full", "latte"):
            temporal_pos = 0.0
        t_emb = self.t_embedder(t)  # [B, D]
        modulation = self.t_block(t_emb).unflatten(1, (6, -1))  # [B, 6, D]  shared by all blocks
        y = self.y_embedder(y)  # [B, L, D]
        with autocast(x.device):
            for i, block in enumerate(self.blocks):
                pos = temporal_pos if i == 0 else 0.0
                x = block(x, y, mask, modulation, pos, group)  # [B, T, S, D]
        x = gather_frames(self.final_layer(x, t_emb), group)  # [B, T, S, pt*ph*pw*2C]
        return unpatchify(x, c.patch_size, h, w)  # [B, 2C, T*pt, H, W]
