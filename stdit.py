"""STDiT, the spatial-temporal diffusion transformer of Open-Sora v1: the network alone.

It is given a noisy film (as latents of an image VAE), a diffusion timestep and a caption (as T5
tokens), and predicts the noise in the film and, in a second half of its channels, how uncertain
each step back is. What is done with that prediction stands in sample.py. Names of modules are those
of the released weights, which load_weights at the end of the file reads. "Report" is Open-Sora v1's
technical report.

Shapes, in this file:
    B batch    C latent channels (4)    H, W latent height and width
    T frames; behind the embedder in units of the patch's frames (1 in v1)
    h, w patches per frame, down and across    S = h*w patches per frame    D hidden size
    L caption tokens    E caption channels    N length of any sequence of tokens
"""

import hashlib
import json
import math
import os
import pickle
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

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
    variant: str = "sequential"  # how space and time attend, one of VARIANTS; v1 chose this one
    space_scale: float | tuple = 1.0  # place = index / scale, or (h, w); v1: size in pixels / 512
    time_scale: float = 1.0  # index / scale; 1 for every 3rd source frame, 3/2 for every 2nd


VARIANTS = ("full", "sequential", "parallel", "latte")

MODELS = {
    "STDiT-XL/2": STDiTConfig(),
    "toy": STDiTConfig(
        depth=4,
        hidden_size=128,
        num_heads=4,
        caption_channels=64,
        caption_length=16,
        space_scale=0.125,  # 4x4 patches are spread over the range that 512x512 pixels have
        time_scale=0.25,
    ),
}
# the same on patches of 2 frames, which are twice as far apart (report, A7)
MODELS["toy-2x2x2"] = replace(MODELS["toy"], patch_size=(2, 2, 2), time_scale=0.125)

# ---------------------------------------------------------------------------------------------
# Where and when: sinusoids
#
# Attention does not see order. So a token is told its place by a vector of sines and cosines of it
# at frequencies from 1 down to 1/10000, and the network its timestep in the same way. Positions are
# indices divided by a scale: a model trained on 32x32 patches reads a grid of 16x16 at scale 0.5 as
# the same picture seen coarsely, and that is what makes training from small to large films cheap
# (report, T1). Places are worked out in float64 and rounded once; timesteps stay in fp32, for in
# bf16 only 507 of the 1000 would remain distinct.


def sinusoid(position, frequency):
    """Sines and cosines of position [...] times frequency [n]: two of [..., n]."""
    angle = position[..., None] * frequency
    return angle.sin(), angle.cos()


def embed_places(n, scale, dim):
    """Places 0, 1/scale, ... (n - 1)/scale as [n, dim], sin before cos, float64, on the CPU. With
    scale = inf all places are the same place.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat(sinusoid(torch.arange(n, dtype=torch.float64) / scale, frequency), dim=-1)


@lru_cache(maxsize=32)  # a run sees few grids, thousands of times
def spatial_embedding(h, w, dim, scale, device):
    """fp32 [S, D], rows in the order of patches (h, w). The first half of the channels encodes x,
    the second y. scale: a number, or one each for h and w.
    """
    scale_h, scale_w = scale if isinstance(scale, tuple) else (scale, scale)
    x = embed_places(w, scale_w, dim // 2).expand(h, -1, -1)  # [h, w, D/2]
    y = embed_places(h, scale_h, dim // 2)[:, None].expand(-1, w, -1)  # [h, w, D/2]
    both = rearrange(torch.cat([x, y], dim=-1), "h w d -> (h w) d")
    return both.float().to(device)


@lru_cache(maxsize=32)
def temporal_embedding(t, dim, scale, device):
    """fp32 [T, D]."""
    return embed_places(t, scale, dim).float().to(device)


@lru_cache(maxsize=8)
def timestep_frequencies(device):
    """fp32 [128], worked out in fp32, as the released models have it."""
    return torch.exp(-math.log(10000) * torch.arange(128) / 128).to(device)


# ---------------------------------------------------------------------------------------------
# The parts of a block: two kinds of attention, and an MLP
#
# Neither attention knows about space or time: each looks along the middle dimension of what it is
# given. Which tokens share a sequence is decided by one rearrange around it (along_space,
# along_time, along_film, below), and that is the whole of STDiT.


def split_heads(x, parts, heads):
    """[B, N, parts * D] -> parts of [B, heads, N, D/heads]; laid out (part, head, channel)."""
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
    """Every token looks at the caption. x [B, N, D], y [B, L, D], mask [B, L] (True: a real token)
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
    """adaLN (DiT, arXiv 2212.09748, section 3.2): the timestep sets scale and shift of channels."""
    return norm(x) * (1 + scale) + shift


# ---------------------------------------------------------------------------------------------
# One film on several GPUs: sequence parallelism
#
# 64 frames of 512x512 are 65,536 tokens, whose activations fill a GPU. So n processes share a film:
# each has T/n of its frames, which is all that anything but the temporal attention needs. Around
# that one, an exchange makes frames whole and shares out the patches instead, and another brings
# them back (Dynamic Sequence Parallelism, arXiv 2403.10266). In each, a process sends and receives
# (n - 1) / n of its tokens once, where splitting by heads (Ulysses) would exchange q, k, v and the
# output; blocks that are recomputed exchange again. Where n does not divide T or S, empty tokens
# fill up the last shares; they are cut off before a real token could look at them. (A picture has
# one frame: then all but one process work on nothing.)


class Shard(NamedTuple):
    """A film's tokens [B, T, S, D] are shared by the n processes of a group: each has T/n frames,
    rounded up, or for a while S/n patches.
    """

    group: dist.ProcessGroup
    T: int  # frames of the whole film
    S: int  # patches of a whole frame


def exchange(x, group):
    """x [n, ...]: x[i] goes to process i -> [n, ...], what each of the n had for this one. The
    gradient goes the same way back.
    """
    return all_to_all_single_autograd(x.contiguous(), None, None, group)


def fill_up(x, dim, n):
    """Zeros at the end of a dimension, until n divides it."""
    short = -x.shape[dim] % n
    end = x.new_zeros(*x.shape[:dim], short, *x.shape[dim + 1 :])
    return torch.cat([x, end], dim) if short else x


def switch_shard(x, whole, shared, shard):
    """whole=1, shared=2: [B, T/n, S, D] -> [B, T, S/n, D]; whole=2, shared=1: back. That is, some
    of the dimension `whole` becomes all of it. Without a shard, tokens stay as they are.
    """
    if shard is None:
        return x
    n = shard.group.size()
    parts = torch.stack(fill_up(x, shared, n).chunk(n, shared))  # [n, B, ...], for each process
    x = torch.cat(exchange(parts, shard.group).unbind(), whole)
    return x.narrow(whole, 0, shard.T if whole == 1 else shard.S)


def own_frames(x, shard):
    """[B, T, ...] -> [B, T/n, ...], this process's frames."""
    if shard is None:
        return x
    n = shard.group.size()
    return fill_up(x, 1, n).chunk(n, 1)[shard.group.rank()]


def all_frames(x, shard):
    """The frames of all processes [B, T, ...], on each. Backwards, the gradients of all processes
    for the frames of this one are added up. So if each works out the loss of the whole film, a
    weight's gradient is n times what this one's frames add to it, and the mean over all processes,
    which DDP takes, is the gradient. Losses of single parts would need that factor n by hand.
    """
    if shard is None:
        return x
    n = shard.group.size()
    parts = exchange(x.expand(n, *x.shape), shard.group)  # [n, B, T/n, ...]
    return torch.cat(parts.unbind(), 1)[:, : shard.T]


# ---------------------------------------------------------------------------------------------
# The block
#
# A film of T frames and S patches is T*S tokens. Attention among all of them costs (T*S)^2; STDiT
# lets a token look at its own frame (S^2 each) and then at its own patch through time (T^2 each),
# one after the other in every block, so that two hops connect any two tokens (report, A3). The rest
# is PixArt-alpha's block: six rows set by the timestep (a table per block + one shared MLP of t,
# "adaLN-single", arXiv 2310.00426 section 2.3), cross-attention to the caption, MLP. That it starts
# out as exactly PixArt's block is the point: the temporal projection starts at zero, so the first
# film of a model that starts from PixArt's weights is T of PixArt's pictures (A5).
#
# Things that surprise: the temporal attention has no norm and no modulation and shares the spatial
# one's gate; the cross-attention has neither norm nor gate. So the released weights want it.
#
# The report compared four designs (A4), and they stand side by side here:
#     full        one attention over all tokens; the temporal embedding is added to the tokens
#     sequential  space, then time: v1's choice, of which all this is written
#     parallel    both from the same tokens, added; its weights have the same names as sequential's
#     latte       a PixArt block for space, then one for time, with rows and MLP of its own and
#                 without caption; the temporal embedding is added to the tokens, so it can't begin
#                 as PixArt even with zeros


def along_space(attention, x):
    """Each frame looks at itself. [B, T, S, D] -> [B, T, S, D]."""
    out = attention(rearrange(x, "b t s d -> (b t) s d"))  # [B*T, S, D]
    return rearrange(out, "(b t) s d -> b t s d", t=x.shape[1])


def along_time(attention, x, shard=None):
    """Each patch looks at itself in all frames. [B, T, S, D] -> [B, T, S, D]."""
    if shard and torch.is_autocast_enabled(x.device.type):  # as the attention would, but it is sent
        x = x.to(torch.get_autocast_dtype(x.device.type))
    x = switch_shard(x, 1, 2, shard)
    out = attention(rearrange(x, "b t s d -> (b s) t d"))  # [B*S, T, D]
    out = rearrange(out, "(b s) t d -> b t s d", s=x.shape[2])
    return switch_shard(out, 2, 1, shard)


def along_film(attention, x):
    """Every patch of every frame looks at all of them. [B, T, S, D] -> [B, T, S, D]."""
    out = attention(rearrange(x, "b t s d -> b (t s) d"))  # [B, T*S, D]
    return rearrange(out, "b (t s) d -> b t s d", s=x.shape[2])


def add_time(x, time):
    """x [B, T, S, D] plus the temporal embedding, in the one block that is given it."""
    return x if time is None else x + time


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, heads = config.hidden_size, config.num_heads
        hidden = int(D * config.mlp_ratio)
        self.variant = config.variant
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.attn = SelfAttention(D, heads)
        if self.variant != "full":
            self.attn_temp = SelfAttention(D, heads)
        self.cross_attn = CrossAttention(D, heads)
        self.mlp = MLP(D, hidden, D)
        if self.variant == "latte":
            self.scale_shift_table_temp = nn.Parameter(torch.randn(6, D) / D**0.5)
            self.mlp_temp = MLP(D, hidden, D)

    def forward(self, x, y, mask, rows, time, shard=None):
        """x [B, T, S, D] tokens; y [B, L, D] caption; mask [B, L] or None; rows [B, 6, D] from the
        timestep; time [1, T, 1, D], the temporal embedding, in the first block, else None
        -> [B, T, S, D]. With a shard, x and time are of this process's frames alone.
        """
        six = (self.scale_shift_table + rows)[:, :, None, None].unbind(1)  # 6 x [B, 1, 1, D]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six  # of the attention, of the MLP

        if self.variant == "sequential":  # space, then time; x itself never gets the embedding
            x = x + gate_a * along_space(self.attn, modulate(x, shift_a, scale_a))
            x = x + gate_a * along_time(self.attn_temp, add_time(x, time), shard)
        elif self.variant == "parallel":  # both look at the same tokens
            space = along_space(self.attn, modulate(x, shift_a, scale_a))
            time_too = along_time(self.attn_temp, add_time(x, time), shard)
            x = x + gate_a * (space + time_too)
        elif self.variant == "full":  # at once; here the tokens themselves must tell the time
            x = add_time(x, time)
            x = x + gate_a * along_film(self.attn, modulate(x, shift_a, scale_a))
        else:  # latte: a whole block for space; another for time follows below
            x = x + gate_a * along_space(self.attn, modulate(x, shift_a, scale_a))

        # caption and MLP: token by token, so how they are laid out does not matter
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).view_as(x)  # [B, T*S, D] and back
        x = x + gate_m * self.mlp(modulate(x, shift_m, scale_m))

        if self.variant == "latte":
            six = (self.scale_shift_table_temp + rows)[:, :, None, None].unbind(1)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six  # 6 x [B, 1, 1, D]
            x = add_time(x, time)
            x = x + gate_a * along_time(self.attn_temp, modulate(x, shift_a, scale_a), shard)
            x = x + gate_m * self.mlp_temp(modulate(x, shift_m, scale_m))
        return x


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
        sin, cos = sinusoid(t.float(), timestep_frequencies(t.device))  # fp32, also under autocast
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
    """Tokens [B, T, S, D] and t [B, D], the timestep's embedding *before* t_block
    -> patches [B, T, S, pt*ph*pw*2C].
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.linear = nn.Linear(D, math.prod(config.patch_size) * 2 * config.in_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)

    def forward(self, x, t):
        rows = (self.scale_shift_table + t[:, None])[:, :, None, None]  # [B, 2, 1, 1, D]
        shift, scale = rows.unbind(1)  # [B, 1, 1, D] each
        return self.linear(modulate(x, shift, scale))


# ---------------------------------------------------------------------------------------------
# The network


class STDiT(nn.Module):
    """STDiT-XL/2 at its defaults: 759,620,768 parameters, 610,856,096 of them PixArt-alpha's.
    Weights are fp32 (or float64); for bf16 there is autocast.
    """

    def __init__(self, config: STDiTConfig):
        super().__init__()
        if config.variant not in VARIANTS:
            raise ValueError(f"variant={config.variant!r}: expected one of {', '.join(VARIANTS)}")
        if config.hidden_size % 4 or config.hidden_size % config.num_heads:
            raise ValueError(
                f"hidden_size={config.hidden_size} must divide by 4 and "
                f"num_heads={config.num_heads}"
            )
        D = config.hidden_size
        self.config = config
        self.group = None  # of the processes that share each film; all are given the whole of it
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
            nn.init.zeros_(block.cross_attn.proj.weight)
            if self.config.variant not in ("full", "latte"):
                nn.init.zeros_(block.attn_temp.proj.weight)  # a film is T pictures (report, A5)
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
        shard = Shard(self.group, T, h * w) if self.group else None
        if shard and self.config.variant == "full":
            raise ValueError("variant=full: its attention needs all tokens at once; give sp=1")
        D, device = self.config.hidden_size, x.device
        space = spatial_embedding(h, w, D, self.config.space_scale, device)  # [S, D]
        time = temporal_embedding(T, D, self.config.time_scale, device)[None, :, None]
        # [1, T, 1, D]
        if T == 1 and self.config.variant in ("full", "latte"):  # added to the tokens themselves,
            time = None  # and those of a picture are to be as an image model knows them

        x = own_frames(self.x_embedder(x) + space, shard)  # [B, T, S, D]; shared: T/n frames
        time = time if time is None else own_frames(time, shard)
        t = self.t_embedder(t)  # [B, D]
        rows = self.t_block(t).unflatten(1, (6, D))  # [B, 6, D]  shared by all blocks
        y = self.y_embedder(y)  # [B, L, D]
        mask = None if mask is None else mask.bool()  # [B, L]
        for i, block in enumerate(self.blocks):
            x = block(x, y, mask, rows, time if i == 0 else None, shard)  # [B, T, S, D]
        x = all_frames(self.final_layer(x, t), shard)  # [B, T, S, pt*ph*pw*2C]
        return unpatchify(x, self.config.patch_size, h, w)  # [B, 2C, T*pt, H, W]

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, the Hub's usual layout, into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / ".model.safetensors")
        os.replace(folder / ".model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, source):
        """The model of a run, or that save_pretrained wrote, from a folder or a Hub name."""
        config = stored_config(source)
        if config is None:
            raise BadWeights(f"{source} holds no config.json of save_pretrained, and is no run")
        model = cls(config)
        load_weights(model, source)
        return model.eval()


def config_from(fields):
    """STDiTConfig from its JSON, where tuples have become lists."""
    return STDiTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


PRODUCTS = [getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu",
)]  # fmt: skip


def checkpoint_blocks(model, keep_products=False, **options):
    """Keep for the backward pass what enters each block, and compute its inside again: a third more
    work, for the memory of one block's inside instead of all. With keep_products, what comes out of
    matrix products and attentions is kept as well, about 18 D numbers a token and block, and little
    is computed twice. No number changes. Call it once, before torch.compile. options: of torch's
    checkpoint.
    """
    if keep_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, PRODUCTS)

    def recomputed(forward):
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False, **options)

    for block in model.blocks:
        block.forward = recomputed(block.forward)


def unpatchify(x, patch_size, h, w):
    """[B, T, h*w, pt*ph*pw*C] -> [B, C, T*pt, h*ph, w*pw]; in a patch the channel comes last."""
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
    if pad < 0:
        raise ValueError(f"captions of {y.shape[1]} tokens; the model takes up to {len(null)}")
    # [B, caption_length, E], [B, caption_length]
    y, mask = F.pad(y, (0, 0, 0, pad)), F.pad(mask.bool(), (0, pad))
    return torch.where(drop[:, None, None], null.to(y.dtype), y), mask | drop[:, None]


# ---------------------------------------------------------------------------------------------
# Released weights
#
# A model that can't read the weights that exist can be neither checked against them nor continued
# from them. Open-Sora v1's files have the names of this file; PixArt-alpha's own .pth has them too,
# without the temporal attention. diffusers' folders (PixArt-alpha, Latte-1) name the same tensors
# otherwise and keep query, key and value apart: the table below says where each of ours is found.
#
# Loading is strict. Each tensor of the model is found in the source with its shape, each tensor of
# the source has a place in the model; the exceptions are listed, with their reasons, and anything
# else is an error before any weight is changed. Files are memory-mapped: a tensor is read when it
# is copied, so the weights are never in memory twice.


class BadWeights(Exception):
    """A source of weights that can't be used: what was found where, and what was expected."""


# Ours -> the tensors of diffusers' PixArtTransformer2DModel or LatteTransformer3DModel that make
# it, row below row. N: the number of the block.
DIFFUSERS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["adaln_single.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["adaln_single.emb.timestep_embedder.linear_2"],
    "t_block.1": ["adaln_single.linear"],
    "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
    "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
    "y_embedder.y_embedding": ["caption_projection.y_embedding"],  # early versions stored it
    "blocks.N.scale_shift_table": ["transformer_blocks.N.scale_shift_table"],
    "blocks.N.attn.qkv": [f"transformer_blocks.N.attn1.to_{part}" for part in "qkv"],
    "blocks.N.attn.proj": ["transformer_blocks.N.attn1.to_out.0"],
    "blocks.N.cross_attn.q_linear": ["transformer_blocks.N.attn2.to_q"],
    "blocks.N.cross_attn.kv_linear": [f"transformer_blocks.N.attn2.to_{part}" for part in "kv"],
    "blocks.N.cross_attn.proj": ["transformer_blocks.N.attn2.to_out.0"],
    "blocks.N.mlp.fc1": ["transformer_blocks.N.ff.net.0.proj"],
    "blocks.N.mlp.fc2": ["transformer_blocks.N.ff.net.2"],
    "blocks.N.scale_shift_table_temp": ["temporal_transformer_blocks.N.scale_shift_table"],
    "blocks.N.attn_temp.qkv": [f"temporal_transformer_blocks.N.attn1.to_{part}" for part in "qkv"],
    "blocks.N.attn_temp.proj": ["temporal_transformer_blocks.N.attn1.to_out.0"],
    "blocks.N.mlp_temp.fc1": ["temporal_transformer_blocks.N.ff.net.0.proj"],
    "blocks.N.mlp_temp.fc2": ["temporal_transformer_blocks.N.ff.net.2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.scale_shift_table": ["scale_shift_table"],
}
NULL_CAPTION = "y_embedder.y_embedding"  # diffusers' folders may lack it: T5 of an empty string
# Passed over if a source has them, for positions are computed for the grid at hand.
RECOMPUTED = {"pos_embed", "pos_embed_temporal", "pos_embed.pos_embed", "temp_pos_embed"}


def diffusers_names(name):
    """"blocks.3.attn.proj.bias" -> ["transformer_blocks.3.attn1.to_out.0.bias"];
    "final_layer.scale_shift_table" -> ["scale_shift_table"].
    """
    stem, kind = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups(default="")
    number = re.search(r"^blocks\.(\d+)", stem)
    if number:
        theirs = DIFFUSERS[stem.replace(number[0], "blocks.N", 1)]
        return [their.replace(".N.", f".{number[1]}.") + kind for their in theirs]
    return [their + kind for their in DIFFUSERS[stem]]


def load_weights(model, source, null_caption=None):
    """Fill a model with weights -> the names of its tensors that are new: the source lacks them.

    source: a file (.safetensors, .pth), a folder (a run of train.py, of which the moving average is
    taken; what save_pretrained or diffusers wrote), a Hub name "owner/name", or a file there,
    "owner/name/file". If it has none of the temporal tensors (those with _temp in their name), it
    is taken for an image model, and they are new. null_caption: a function that gives
    [caption_length, E], called if the source brings none. BadWeights in all other cases, and then
    the model is as before.
    """
    found, ours = {}, model.state_dict()
    for path in find_weights(source):
        found |= open_weights(path)
    from_diffusers = "adaln_single.linear.weight" in found
    places = {name: diffusers_names(name) if from_diffusers else [name] for name in ours}
    new = [name for name in ours if "_temp" in name]
    if any(place in found for name in new for place in places[name]):
        new = []  # not an image model
    for name in new:
        del places[name]

    wanted = {place for names in places.values() for place in names}
    lacking, besides = wanted - found.keys(), found.keys() - wanted - RECOMPUTED
    if lacking == set(places[NULL_CAPTION]) and not besides:
        if null_caption is None:
            raise BadWeights(f"{source} has no null caption; give one, T5 of the empty string")
        found[lacking.pop()] = null_caption()
    if lacking or besides:
        c, both = model.config, (("lacks", lacking), ("has besides", besides))
        wrong = " and ".join(f"{verb} {listed(names)}" for verb, names in both if names)
        raise BadWeights(f"{source} {wrong}; expected a {c.variant} model, depth {c.depth}")
    for place in places["x_embedder.proj.weight"]:
        if found[place].ndim == 4:  # an image model's Conv2d: a Conv3d over one frame
            found[place] = found[place].unsqueeze(2)
    for name, names in places.items():  # several are stacked, each with its share of the rows
        rows, *rest = ours[name].shape
        for place in names:
            shape, expected = list(found[place].shape), [rows // len(names), *rest]
            if shape != expected:
                raise BadWeights(f"{source}: {place} has shape {shape}, expected {expected}")

    with torch.no_grad():
        for name, names in places.items():
            ours[name].copy_(torch.cat([found[place] for place in names]))
        for name in new:
            if "attn_temp.proj" in name and model.config.variant != "latte":
                ours[name].zero_()  # a film begins as T pictures (report, A5)
    return new


def listed(names):
    """"52 tensors (a, b, c, ...)"."""
    first = ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)
    return f"{len(names)} tensors ({first})"


def stored_config(source):
    """The STDiTConfig that lies beside weights, in a run or where save_pretrained wrote them, with
    the variant and the scales they were trained with; None if there is none.
    """
    path = Path(source) if Path(source).exists() else fetch(str(source))
    run = newest_checkpoint(path)
    file = run / "state.json" if run else path / "config.json"
    try:
        fields = json.loads(file.read_text()) if file.is_file() else {}
        fields = fields["model"] if run else fields
        return config_from(fields) if "caption_length" in fields else None  # else another's
    except (ValueError, TypeError, KeyError) as error:
        raise BadWeights(f"{file} is damaged ({error}): expected an STDiTConfig in it") from None


def newest_checkpoint(run):
    """The folder of a run's newest checkpoint, or None; a checkpoint's folder is its own."""
    if (Path(run) / "state.json").is_file():
        return Path(run)
    found = sorted(Path(run).glob("checkpoints/step_*"))
    return found[-1] if found else None


def find_weights(source):
    """The files that hold the weights of a source, as load_weights takes it: a list of paths. In a
    folder: the newest checkpoint of a run, else diffusers' transformer/, else what lies in it.
    """
    path = Path(source) if Path(source).exists() else fetch(str(source))
    if path.is_file():
        return [path]
    run = newest_checkpoint(path) or path
    for folder in (run, path / "transformer", path):
        for name in ("ema", "model", "diffusion_pytorch_model"):
            if (folder / f"{name}.safetensors").is_file():
                return [folder / f"{name}.safetensors"]
            if (index := folder / f"{name}.safetensors.index.json").is_file():  # of shards
                return [folder / shard for shard in read_index(index)]
    files = sorted(p for p in path.glob("*") if p.suffix in (".pth", ".pt", ".safetensors"))
    if len(files) != 1:
        raise BadWeights(
            f"{source} holds {len(files) or 'no'} files of weights; expected a run, a folder of "
            "save_pretrained or diffusers, or the name of one file (of the Hub: owner/name/file)"
        )
    return files


def read_index(path):
    """The names of the files that hold the shards of a model in the Hub's layout."""
    try:
        return sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadWeights(f"{path} is damaged: expected a JSON object with a weight_map") from None


# What is fetched of a Hub repository: weights of save_pretrained and of diffusers, in one file or
# in shards; neither those of its other models nor copies in other formats or precisions.
LAYOUTS = ["config.json"] + [
    f"{name}{part}"
    for name in ("model", "diffusion_pytorch_model", "transformer/diffusion_pytorch_model")
    for part in (".safetensors", ".safetensors.index.json", "-0*.safetensors")
]


def fetch(source):
    """A Hub name, "owner/name" or "owner/name/file" -> where huggingface_hub has put it."""
    from huggingface_hub import hf_hub_download, snapshot_download

    owner, name, file = (source.split("/", 2) + ["", ""])[:3]
    if not name or owner in ("", ".", "..", "~"):
        raise BadWeights(f"{source} is not there; expected a file, a folder or a Hub name")
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{name}", file))
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=LAYOUTS))
    except Exception as error:  # the Hub's own errors are of a dozen classes
        raise BadWeights(
            f"{source} is neither a path here nor to be had from the Hub "
            f"({type(error).__name__}); check its name, the network, and whether you may read it"
        ) from None


def open_weights(path):
    """The tensors of a file by name, memory-mapped: each is read when it is used."""
    try:
        check_hash(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        # weights_only: a pickle may hold code; nothing but tensors and plain containers is taken
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key in ("ema", "state_dict_ema", "state_dict", "model"):  # training scripts nest them
            content = content[key] if isinstance(content.get(key), dict) else content
        return {name: value for name, value in content.items() if torch.is_tensor(value)}
    except pickle.UnpicklingError:
        raise BadWeights(
            f"{path} is no file of tensors, or holds code besides, which is not run; expected a "
            "state dict that torch.save wrote"
        ) from None
    except (OSError, EOFError, RuntimeError, AttributeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise BadWeights(
            f"{path} can't be read ({reason}); expected .safetensors, or a state dict that "
            "torch.save wrote"
        ) from None


def check_hash(path):
    """BadWeights if a checkpoint's file is not the one whose sha256 stands in its state.json."""
    state = path.parent / "state.json"
    hashes = json.loads(state.read_text()).get("sha256", {}) if state.is_file() else {}
    if path.stem not in hashes:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != hashes[path.stem]:
        raise BadWeights(f"{path} is damaged: its sha256 is not the one in state.json")
