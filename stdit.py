"""STDiT, the spatial-temporal diffusion transformer of Open-Sora v1: the network alone.

Input: noisy video latents, timesteps, T5 embeddings of captions. Output: twice the channels of the
latents, first the predicted noise, then `var`, which interpolates the log variance of the reverse
step (IDDPM, see sample.log_variance). Parameters have the names of the released weights.
"v1" means Open-Sora v1, "the report" docs/report_01.md in https://github.com/hpcaitech/Open-Sora.

Shapes in this file:
    B batch    C latent channels (4)    H, W latent height and width    D hidden size
    T frames; after the patch embedder T / pt, the same in v1, whose patches are one frame long
    h rows and w columns of patches    S = h*w patches per frame
    L caption tokens    E caption channels    N tokens that attend to each other
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class STDiTConfig:
    depth: int = 28  # number of blocks
    hidden_size: int = 1152  # D, channels of a token
    num_heads: int = 16  # attention heads, D / heads = 72 channels each
    mlp_ratio: float = 4.0  # hidden channels of the MLP / D
    patch_size: tuple = (1, 2, 2)  # frames, height, width; patches of 2 frames were worse (report)
    in_channels: int = 4  # C, given by the VAE
    caption_channels: int = 4096  # E, given by the text encoder; T5-XXL has 4096
    caption_length: int = 120  # L, maximum number of caption tokens
    variant: str = "sequential"  # design of the block, a key of BLOCKS; v1: sequential
    space_scale: float = 1.0  # spatial position = index / scale, see Position embeddings
    time_scale: float = 1.0  # temporal position = index / scale
    embedder_std: float | None = 0.02  # initial std of t_embedder, y_embedder; None: fan_in**-0.5

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # config.json has a list


MODELS = {
    "STDiT-XL/2": STDiTConfig(),
    "toy": STDiTConfig(
        depth=4,
        hidden_size=128,
        num_heads=4,
        caption_channels=64,
        caption_length=16,
        space_scale=0.125,  # 4x4 patches span 32x32 positions: at 1 they would be nearly equal
        time_scale=0.25,  # 8 frames span 32 positions
        embedder_std=None,  # with 0.02 embedded captions would start at 1/50 of the rms of tokens
    ),
}

# ---------------------------------------------------------------------------------------------
# Position embeddings
#
# Attention does not depend on the order of its tokens, so positions are added, as vectors of sines
# and cosines. A position is index / scale: at scale 0.5 a 16x16 grid covers the positions of a
# 32x32 grid, so a model trained at one size can be fine-tuned at another.


def get_1d_sincos_pos_embed(length, dim, scale):
    """Return sines, then cosines, of the positions index / scale: float64 [length, dim]."""
    position = torch.arange(length, dtype=torch.float64) / scale
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = position[:, None] * frequency  # [length, dim/2]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@lru_cache(maxsize=32)  # every step uses the same few grids, and none is modified
def spatial_pos_embed(h, w, dim, scale, device):
    """Return fp32 [S, D], row-major in (h, w). As in DiT and the released weights, the first half
    of the channels encodes the column, the second the row.
    """
    column = get_1d_sincos_pos_embed(w, dim // 2, scale).expand(h, -1, -1)  # [h, w, D/2]
    row = get_1d_sincos_pos_embed(h, dim // 2, scale)[:, None].expand(-1, w, -1)  # [h, w, D/2]
    return torch.cat([column, row], dim=-1).flatten(0, 1).float().to(device)


@lru_cache(maxsize=32)
def temporal_pos_embed(T, dim, scale, device):
    """Return fp32 [1, T, 1, D], to be added to tokens [B, T, S, D]."""
    return get_1d_sincos_pos_embed(T, dim, scale)[None, :, None].float().to(device)


# ---------------------------------------------------------------------------------------------
# Attention and MLP


class SelfAttention(nn.Module):
    """Multi-head self-attention. `pattern` says which tokens attend to each other:
    "(b t) s d"   those of a frame: B*T sequences of N = S tokens
    "(b s) t d"   those of a patch through time: B*S sequences of N = T tokens
    "b (t s) d"   those of a video: B sequences of N = T*S tokens
    """

    def __init__(self, dim, heads, pattern):
        super().__init__()
        self.heads = heads
        self.pattern = pattern
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, pos=None):
        """x [B, T, S, D]; pos [1, T, 1, D], added to x if it is not None. Returns [B, T, S, D]."""
        if pos is not None:
            x = x + pos
        T, S = x.shape[1:3]
        x = rearrange(x, f"b t s d -> {self.pattern}")  # [sequences, N, D]
        qkv = rearrange(
            self.qkv(x), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads
        )
        x = F.scaled_dot_product_attention(*qkv)  # [sequences, heads, N, D/heads]
        x = self.proj(rearrange(x, "b heads n d -> b n (heads d)"))  # [sequences, N, D]
        return rearrange(x, f"{self.pattern} -> b t s d", t=T, s=S)


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of a video to those of its caption. Each frame is a
    sequence of its own, with a copy of k and v: the result is that of one sequence per video, and
    the backward pass is faster, as fused attention runs in parallel over sequences, not queries.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y, mask=None):
        """x [B, T, S, D] tokens; y [B, L, D] caption; mask [B, L], True where a caption token is
        real, or None if all are. Returns [B, T, S, D].
        """
        T = x.shape[1]
        q = rearrange(self.q_linear(x), "b t s (heads d) -> (b t) heads s d", heads=self.heads)
        kv = self.kv_linear(y).repeat_interleave(T, dim=0)  # [B*T, L, 2D], in the order (b t)
        k, v = rearrange(kv, "bt l (kv heads d) -> kv bt heads l d", kv=2, heads=self.heads)
        if mask is not None:
            mask = mask.repeat_interleave(T, dim=0)[:, None, None]  # [B*T, 1, 1, L]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B*T, heads, S, D/heads]
        return self.proj(rearrange(x, "(b t) heads s d -> b t s (heads d)", t=T))


class MLP(nn.Module):
    """Linear layer, GELU, linear layer: [..., dim] to [..., out]."""

    def __init__(self, dim, hidden, out):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def norm(x):
    """LayerNorm over channels without weights; modulate applies scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    """adaLN: scale and shift depend on the timestep (DiT, arXiv 2212.09748, section 3.2)."""
    return x * (1 + scale) + shift


def split(table):
    """Split [B, n, D] into n tensors [B, 1, 1, D], which can multiply tokens [B, T, S, D]."""
    return table[:, :, None, None].unbind(1)  # from [B, n, 1, 1, D]


# ---------------------------------------------------------------------------------------------
# The block
#
# Full attention over the T*S tokens of a video costs (T*S)^2. STDiT attends within each frame (S^2,
# T times), then for each patch across frames (T^2, S times): still any two tokens are connected.
# The rest is PixArt-alpha's block: shift, scale and gate from the timestep (one MLP shared by all
# blocks plus a table per block, "adaLN-single", arXiv 2310.00426 section 2.3), cross-attention,
# MLP. The output projection of temporal attention starts at zero: with PixArt-alpha's weights in
# the rest, the model generates T independent PixArt images until it is trained on videos.


class STDiTBlock(nn.Module):
    """The block of v1: spatial, then temporal attention. The report's other designs are below."""

    def __init__(self, config):
        super().__init__()
        D, heads = config.hidden_size, config.num_heads
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.attn = SelfAttention(D, heads, "(b t) s d")  # spatial: within each frame
        self.attn_temp = SelfAttention(D, heads, "(b s) t d")  # temporal: each patch through time
        self.cross_attn = CrossAttention(D, heads)
        self.mlp = MLP(D, int(D * config.mlp_ratio), D)

    def forward(self, x, y, mask, mod, pos=None):
        """x [B, T, S, D] tokens; y [B, L, D] caption; mask [B, L] or None; mod [B, 6, D], the
        modulation, from the timestep: shift, scale and gate of attention (a), then of the MLP (m);
        pos [1, T, 1, D] temporal position embedding, or None. Returns [B, T, S, D].
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = split(self.scale_shift_table + mod)
        x = x + gate_a * self.attn(modulate(norm(x), shift_a, scale_a))
        x = x + gate_a * self.attn_temp(x, pos)  # as in v1 no norm, and gate_a again
        x = x + self.cross_attn(x, y, mask)  # neither norm nor gate
        return x + gate_m * self.mlp(modulate(norm(x), shift_m, scale_m))


class ParallelBlock(STDiTBlock):
    """Both attentions start from the same x. The weights are those of STDiTBlock."""

    def forward(self, x, y, mask, mod, pos=None):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = split(self.scale_shift_table + mod)
        spatial = self.attn(modulate(norm(x), shift_a, scale_a))
        x = x + gate_a * (spatial + self.attn_temp(x, pos))
        x = x + self.cross_attn(x, y, mask)
        return x + gate_m * self.mlp(modulate(norm(x), shift_m, scale_m))


def add_position(x, pos):
    """Add the temporal position to the tokens themselves, as full and latte do. A single frame
    gets none, so that it is treated as by the image model: the embedding of index 0 is not zero,
    its cosines are 1. (The others need no exception: temporal attention's proj starts at zero.)
    """
    return x if pos is None or x.shape[1] == 1 else x + pos


class FullBlock(STDiTBlock):
    """One attention over all tokens of the video."""

    def __init__(self, config):
        super().__init__(config)
        self.attn.pattern = "b (t s) d"
        del self.attn_temp  # full attention needs no second one

    def forward(self, x, y, mask, mod, pos=None):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = split(self.scale_shift_table + mod)
        x = add_position(x, pos)
        x = x + gate_a * self.attn(modulate(norm(x), shift_a, scale_a))
        x = x + self.cross_attn(x, y, mask)
        return x + gate_m * self.mlp(modulate(norm(x), shift_m, scale_m))


class LatteBlock(STDiTBlock):
    """A PixArt block for space, then one for time with its own table and MLP and no cross-attention
    (Latte, arXiv 2401.03048). The second is random at first, so the model does not start as an
    image model.
    """

    def __init__(self, config):
        super().__init__(config)
        D = config.hidden_size
        self.scale_shift_table_temp = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.mlp_temp = MLP(D, int(D * config.mlp_ratio), D)

    def forward(self, x, y, mask, mod, pos=None):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = split(self.scale_shift_table + mod)
        x = x + gate_a * self.attn(modulate(norm(x), shift_a, scale_a))
        x = x + self.cross_attn(x, y, mask)
        x = x + gate_m * self.mlp(modulate(norm(x), shift_m, scale_m))

        mod_temp = self.scale_shift_table_temp + mod
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = split(mod_temp)
        x = add_position(x, pos)
        x = x + gate_a * self.attn_temp(modulate(norm(x), shift_a, scale_a))
        return x + gate_m * self.mlp_temp(modulate(norm(x), shift_m, scale_m))


BLOCKS = dict(sequential=STDiTBlock, parallel=ParallelBlock, full=FullBlock, latte=LatteBlock)

# ---------------------------------------------------------------------------------------------
# Embedders and final layer


class PatchEmbedder(nn.Module):
    """A linear layer from patches to tokens: [B, C, T*pt, h*ph, w*pw] to [B, T, S, D]. The Conv3d
    only stores the weights, as released: calling it on CUDA would round to TF32.
    """

    def __init__(self, config):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x):
        pt, ph, pw = self.proj.kernel_size
        pattern = "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)"
        x = rearrange(x, pattern, pt=pt, ph=ph, pw=pw)  # [B, T, S, C*pt*ph*pw]
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Timesteps [B], 0 to 999, to [B, D]: an MLP on 128 cosines, then 128 sines (positions have the
    sines first). The angles are in fp32: of the 1000 timesteps only 507 are distinct in bf16.
    """

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t.float()[:, None] * frequency  # [B, 128], fp32
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype))


class CaptionEmbedder(nn.Module):
    """T5 embeddings [B, L, E] to [B, L, D]. y_embedding [L, E], not trained, is the null
    caption, see train.drop_captions and sample.sample_latents.
    """

    def __init__(self, config):
        super().__init__()
        E, D = config.caption_channels, config.hidden_size
        self.y_proj = MLP(E, D, D)
        self.register_buffer("y_embedding", torch.randn(config.caption_length, E) / E**0.5)

    def forward(self, y):
        return self.y_proj(y)


class FinalLayer(nn.Module):
    """Tokens [B, T, h*w, D] to [B, 2C, T*pt, h*ph, w*pw]. Shift and scale come from t_emb [B, D]
    itself, not from t_block.
    """

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        D, channels = config.hidden_size, 2 * config.in_channels
        self.linear = nn.Linear(D, math.prod(config.patch_size) * channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)

    def forward(self, x, t_emb, h, w):
        shift, scale = split(self.scale_shift_table + t_emb[:, None])  # 2 x [B, 1, 1, D]
        x = self.linear(modulate(norm(x), shift, scale))  # [B, T, S, pt*ph*pw*2C]
        pt, ph, pw = self.patch_size  # channels come last, unlike in PatchEmbedder
        pattern = "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return rearrange(x, pattern, h=h, w=w, pt=pt, ph=ph, pw=pw)


# ---------------------------------------------------------------------------------------------
# The network


def autocast(device):
    """The precision of the blocks. On CUDA, linear layers, attention and GELU are in bf16; norms,
    the residual stream x and all outside the blocks stay in fp32, as everything on CPU and MPS: at
    t = 0 the noise has a scale of 0.01, and bf16 rounds latents by up to 0.008.
    """
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class STDiT(nn.Module, PyTorchModelHubMixin):
    """STDiT-XL/2 has 760M parameters, 611M of them from PixArt-alpha. The Hub's mixin provides
    save_pretrained, which writes `config` to config.json and the weights to model.safetensors.
    """

    def __init__(self, config: STDiTConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(BLOCKS[config.variant](config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view, [out, in]
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_block[1].weight, std=0.02)
        y_proj, t_mlp = self.y_embedder.y_proj, self.t_embedder.mlp
        for linear in (t_mlp[0], t_mlp[2], y_proj.fc1, y_proj.fc2):
            std = self.config.embedder_std or linear.in_features**-0.5
            nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(self.final_layer.linear.weight)  # a new model outputs zero, as in DiT
        for block in self.blocks:  # branches that are zero change nothing at first
            nn.init.zeros_(block.cross_attn.proj.weight)  # as in PixArt-alpha
            if self.config.variant in ("sequential", "parallel"):
                nn.init.zeros_(block.attn_temp.proj.weight)

    def forward(self, x, t, y, mask=None):
        """x [B, C, T, H, W] noisy latents, any T, H, W that the patch divides; t [B] timesteps, 0
        to 999; y [B, L, E] T5 embeddings; mask [B, L], True where a caption token is real, or None
        if all are. Returns [B, 2C, T, H, W]: C channels of noise, C of var.
        """
        D, (pt, ph, pw) = self.config.hidden_size, self.config.patch_size
        T, h, w = x.shape[2] // pt, x.shape[3] // ph, x.shape[4] // pw
        pos = temporal_pos_embed(T, D, self.config.time_scale, x.device)  # [1, T, 1, D]

        x = self.x_embedder(x)  # [B, T, S, D]
        x = x + spatial_pos_embed(h, w, D, self.config.space_scale, x.device)
        t_emb = self.t_embedder(t)  # [B, D]
        mod = self.t_block(t_emb).unflatten(1, (6, D))  # [B, 6, D]  shared by all blocks
        y = self.y_embedder(y)  # [B, L, D]
        with autocast(x.device):  # x stays fp32: what is added to it in bf16 is promoted
            for i, block in enumerate(self.blocks):  # as in v1, block 0 alone gets pos
                x = block(x, y, mask, mod, pos if i == 0 else None)  # [B, T, S, D]
        return self.final_layer(x, t_emb, h, w)  # [B, 2C, T, H, W]


# ---------------------------------------------------------------------------------------------
# Scaling
#
# Activation checkpointing, compilation and sequence parallelism: optional, for the model to be
# trained. The network above does not depend on them.


def set_up_scaling(model, activation_checkpointing="none", compile=False, sp_mesh=None):
    """Prepare a model for training at scale, in place, after the copy for EMA has been made.

    activation_checkpointing: what a block keeps for the backward pass. "none": everything. "full":
    its inputs, and the block is computed again. "selective": also the outputs of matrix products,
    attention and communication; only norms and elementwise operations are computed again.
    compile: torch.compile, block by block; block 0 has a graph with pos, the others share one.
    sp_mesh: DeviceMesh for shard_frames.
    """
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing here is random
    if activation_checkpointing == "selective":
        aten = torch.ops.aten
        kinds = ("flash_attention", "cudnn_attention", "efficient_attention")
        names = [f"_scaled_dot_product_{k}" for k in (*kinds, "flash_attention_for_cpu")]
        saved = [getattr(aten, name).default for name in ("mm", "addmm", *names)]
        saved.append(torch.ops._dtensor.shard_dim_alltoall.default)  # of shard_frames
        options["context_fn"] = partial(create_selective_checkpoint_contexts, saved)
    for block in model.blocks:
        if activation_checkpointing != "none":
            # torch 2.14.1 compiles nothing, without a warning, if forward is a functools.partial,
            # so it is a nested function. A compiled block cannot be checkpointed: that raises.
            def forward(*inputs, compute=block.forward):  # the default binds this block's forward
                return checkpoint(compute, *inputs, **options)

            block.forward = forward
        if compile:
            compile_block(block)
    if sp_mesh:
        shard_frames(model, sp_mesh)


def compile_block(block):
    """Compile a block, without Inductor's mix_order_reduction: with it torch 2.14.1 loses gradients
    on GPUs, as 4 of the 6 rows of mod's gradient are never stored (pytorch issue 193061). Remove
    the line once the fix, PR 193103, is released.
    """
    import torch._inductor.config

    torch._inductor.config.triton.mix_order_reduction = False
    block.compile(dynamic=False)


def shard_frames(model, mesh):
    """Sequence parallelism, for the designs sequential and parallel: the n processes of `mesh`
    share each video, T/n frames each, as the activations of 65,536 tokens (64x512x512 pixels) may
    not fit on one GPU. n must divide T and S.

    Only temporal attention needs all frames. Before it an all-to-all gathers frames and scatters
    patches, after it another one undoes this (Dynamic Sequence Parallelism, arXiv 2403.10266). Each
    process takes the whole video and returns the whole prediction, but the gradients of its weights
    come from its own frames: the gradient is their sum over the processes (train.train_step).
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    plan = {
        # latents [B, C, T, H, W]: from the whole video to the frames of this process
        "x_embedder": tp.PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(2), use_local_output=True
        ),
        # tokens [B, T, S, D] (and pos as it is): from frames to patches, and back; the module sees
        # plain tensors of this process
        "blocks.*.attn_temp": tp.PrepareModuleInputOutput(
            input_layouts=(Shard(1), None),
            desired_input_layouts=(Shard(2), None),
            use_local_input=True,
            output_layouts=Shard(2),
            desired_output_layouts=Shard(1),
        ),
        # the prediction [B, 2C, T, H, W]: from the frames of this process to the whole video
        "final_layer": tp.PrepareModuleOutput(
            output_layouts=Shard(2), desired_output_layouts=Replicate()
        ),
    }
    tp.parallelize_module(model, mesh, plan)
