"""Predicted time of a training step of STDiT-XL/2 on one GPU, part by part (a roofline model).

    python benchmarks/cost_model.py

No GPU is needed, and none was at hand: every number printed is calculated from the counts and rates
below. Compare it with what benchmarks/speed.py measures on a GPU.

Units: N tokens of a micro-batch, D hidden size, S tokens per frame, T frames, L caption tokens. A
multiplication with its addition counts as 2 FLOPs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stdit import MODELS  # noqa: E402
from train import PRESETS  # noqa: E402


@dataclass(frozen=True)
class GPU:
    peak: float = 989e12  # FLOP/s of dense bf16, data sheet
    matmul: float = 790e12  # FLOP/s of large bf16 matrix products, measured elsewhere
    # Useful FLOP/s of fused attention. Heads of 72 channels are padded to 96, temporal sequences
    # are short, and cross-attention has a mask: an assumption, to be replaced by a measurement.
    attention_forward: float = 227e12
    attention_backward: float = 145e12
    bandwidth: float = 2.9e12  # bytes/s of device memory, measured elsewhere


GPUS = {"H100": GPU(), "H200": GPU(bandwidth=4.2e12)}

# Forward pass of one block outside of matrix products and attention: bytes read and written, in
# units of one fp32 tensor [N, D]; bf16 counts half. Eager mode runs one kernel per operation,
# torch.compile one per chain of elementwise operations between matrix products.
EAGER = {
    "norm, modulate, cast (spatial attention)": 2 + 4 + 1.5,
    "gate, residual": 1.5 + 3,
    "position, rearrange, cast (temporal attention)": 2 + 2 + 1.5,
    "rearrange, gate, residual": 1 + 1.5 + 3,
    "cast, residual (cross-attention)": 1.5 + 2.5,
    "norm, modulate, cast (MLP)": 2 + 4 + 1.5,
    "GELU on 4 D channels": 4,
    "gate, residual (MLP)": 1.5 + 3,
}
COMPILED = {
    "norm, modulate, cast (spatial attention)": 1.5,
    "gate, residual, position, rearrange, cast": 3,
    "rearrange, gate, residual, cast": 3,
    "residual, norm, modulate, cast": 3,
    "GELU on 4 D channels": 4,
    "gate, residual (MLP)": 2.5,
}
BACKWARD = 2.15  # bytes of the elementwise backward pass / those of the forward pass
# AdamW reads 4 and writes 3 fp32 tensors per weight, clipping 2 and 1, the moving average 2 and 1.
OPTIMIZER_BYTES = 4 * (7 + 3 + 3)
WEIGHTS = 759_620_768


def flops(preset):
    """Returns the FLOPs of matrix products and of attention in the forward pass of one clip in all
    blocks.
    """
    m = MODELS["STDiT-XL/2"]
    T, S = tokens(preset)
    D = m.hidden_size
    per_token = 36 * D**2  # self-attention 2 x 8 D^2, cross-attention 4 D^2, MLP 16 D^2
    products = m.depth * (T * S * per_token + m.caption_length * 4 * D**2)
    return products, m.depth * T * S * 4 * D * (S + T + m.caption_length)


def tokens(preset):
    """Returns T and S, the frames of a clip and the tokens of a frame."""
    return PRESETS[preset].frames, (PRESETS[preset].size // 16) ** 2


def step(preset, gpu, compiled, checkpointing, micro_batch):
    """Returns {part: seconds} of a step with one micro-batch."""
    m = MODELS["STDiT-XL/2"]
    g = GPUS[gpu]
    T, S = tokens(preset)
    products, attention = (micro_batch * f for f in flops(preset))
    units = sum((COMPILED if compiled else EAGER).values())
    elementwise = m.depth * units * 4 * micro_batch * T * S * m.hidden_size / g.bandwidth
    recomputed = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[checkpointing]
    return {
        "matrix products": (3 + recomputed[0]) * products / g.matmul,
        "attention": (1 + recomputed[0]) * attention / g.attention_forward
        + 2.5 * attention / g.attention_backward,
        "elementwise": (1 + BACKWARD + recomputed[1]) * elementwise,
        "optimizer, EMA": OPTIMIZER_BYTES * WEIGHTS / g.bandwidth,
    }


def main():
    columns = [f"{name}, ms" for name in step("64x512x512", "H100", True, "full", 1)]
    columns = ["preset, micro-batch", "GPU", "mode", *columns, "step, ms", "tokens/s", "of peak"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for preset in ("16x256x256", "16x512x512", "64x512x512"):
        micro_batch = PRESETS[preset].micro_batch
        for gpu, g in GPUS.items():
            for compiled, mode in ((False, "full"), (True, "full"), (True, "selective")):
                parts = step(preset, gpu, compiled, mode, micro_batch)
                total = sum(parts.values())
                useful = 3 * micro_batch * sum(flops(preset))
                T, S = tokens(preset)
                cells = [f"{1000 * v:.0f}" for v in (*parts.values(), total)]
                cells += [
                    f"{micro_batch * T * S / total / 1000:.0f}k",
                    f"{useful / total / g.peak:.0%}",
                ]
                name = f"{'compiled' if compiled else 'eager'}, {mode} checkpointing"
                print(f"| {preset}, {micro_batch} | {gpu} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
