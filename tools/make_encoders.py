"""Train the toy's frozen encoders: a small AutoencoderKL and a small T5, shipped in assets/.

    python tools/make_encoders.py vae     # 1500 steps, about 8 minutes on 2 cores -> assets/vae
    python tools/make_encoders.py t5      # 500 steps, under a minute              -> assets/t5

They are the classes of the released systems (AutoencoderKL of diffusers, with factor 8 and 4 latent
channels; T5EncoderModel of transformers, with a SentencePiece tokenizer), only small. So the toy
uses the same code as stabilityai/sd-vae-ft-mse and DeepFloyd/t5-v1_1-xxl and downloads nothing.
"""

import io
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

# ---------------------------------------------------------------------------------------------
# The VAE. Three quarters of its training images are toy frames, one quarter the same shapes in any
# color, so that colors between the toy's four have latents between theirs. (Backgrounds of any
# color were tried too: the GroupNorms of the small network remove what is constant over an image,
# and after 500 steps it had learned little.)


def toy_frames(n, generator):
    """n single toy frames -> [n, 3, 64, 64] in [-1, 1]."""
    picks = torch.randint(len(data.LABELS), (n,), generator=generator).tolist()
    frames = [data.draw_clip(data.LABELS[i], generator, frames=2)[i % 2] for i in picks]
    return torch.stack(frames).float() / 127.5 - 1  # first and last frames: all positions


def free_frames(n, generator):
    """n frames with a shape of any color and size anywhere -> [n, 3, 64, 64] in [-1, 1]."""
    u = torch.rand(n, 6, generator=generator)
    cover = []
    for i in range(n):
        center, radius = u[i : i + 1, :2] * 64, 5 + 10 * u[i, 2]
        cover.append(data.coverage(data.SHAPES[i % 3], center, radius, 64))
    cover = torch.stack(cover)  # [n, 1, 64, 64]
    foreground = u[:, 3:6, None, None]
    background = torch.tensor(data.BACKGROUND).view(3, 1, 1) / 255
    return (background + cover * (foreground - background)) * 2 - 1


def make_vae(out, steps, batch=24):
    """Train, standardize, save. Loss: MSE and a little KL. Noise of 30% of each channel's standard
    deviation is added to the latents, because the decoder will get those of a sampler, which are
    not exact.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,  # the latents are standardized below
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, weight_decay=0)
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1.5e-3 * rate
        x = torch.cat([toy_frames(batch * 3 // 4, generator), free_frames(batch // 4, generator)])
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        z = posterior.sample(generator)
        std = z.std((0, 2, 3), keepdim=True).detach()
        z = z + 0.3 * std * torch.randn(z.shape, generator=generator)
        mse = F.mse_loss(vae.decode(z).sample, x)
        kl = posterior.kl().mean() / z[0].numel()  # nats per latent value
        optimizer.zero_grad()
        (mse + 1e-5 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  mse {mse.item():.1e}  kl {kl.item():.2f}", flush=True)
    standardize(vae, toy_frames(512, generator))
    vae.half().save_pretrained(out)


@torch.no_grad()
def standardize(vae, x):
    """Change weights so that the toy's latents have zero mean and unit variance in each channel.

    z' = (z - m) / s is a 1x1 convolution, and so are the VAE's last layer before the latents and
    its first after them: the change is folded into both, and the VAE stays an AutoencoderKL. The
    standard deviation of the posterior is also divided by 10: training leaves it large where that
    changes no image (one channel was mostly noise), and a diffusion model would have to learn that
    noise. Large released VAEs have little of it.
    """
    z = vae.encode(x).latent_dist.mean  # [n, 4, 8, 8]
    m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
    print("latent mean", m.tolist(), "standard deviation", s.tolist())
    before = vae.decode(z).sample
    quant, post = vae.quant_conv, vae.post_quant_conv  # quant gives 4 means, then 4 log variances
    quant.weight[:4] /= s.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - m) / s
    quant.bias[4:] -= 2 * (10 * s).log()
    post.bias += post.weight[:, :, 0, 0] @ m
    post.weight *= s.view(1, 4, 1, 1)
    z = vae.encode(x).latent_dist.mean
    print("standardized", z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist())
    print(f"largest change of the images {(vae.decode(z).sample - before).abs().max():.1e}")


# ---------------------------------------------------------------------------------------------
# The T5: a SentencePiece model of the captions and the alphabet, and an encoder trained as T5 was,
# by filling in masked words (arXiv 1910.10683, section 3.1.4), with a decoder that is not saved.
# Captions of unseen labels are not used.

WORDS = "a the of and on in is are with to car rabbit man skiing eating watermelon road moving snow"


def make_t5(out, steps, batch=64):
    import sentencepiece
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

    out.mkdir(parents=True, exist_ok=True)
    captions = [data.caption_of(t) for t in data.LABELS if t not in data.UNSEEN]
    # SentencePiece makes a word a piece only if it occurs in two contexts: so also with commas.
    sentences = [text for c in captions for text in (c, c.replace(" ", ", ") + ".")]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences + WORDS.split()),
        model_writer=pieces,
        vocab_size=128,
        hard_vocab_limit=False,
        model_type="unigram",
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-'",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (out / "spiece.model").write_bytes(pieces.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(out)
    print(len(tokenizer), "tokens;", tokenizer.tokenize(captions[0]))
    torch.set_num_threads(1)  # faster for something this small
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        **sizes,
    )
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    rng = random.Random(0)
    for step in range(steps):
        pairs = [mask_words(rng.choice(captions).split(), rng) for _ in range(batch)]
        inputs = tokenizer([p[0] for p in pairs], padding=True, return_tensors="pt")
        labels = tokenizer([p[1] for p in pairs], padding=True, return_tensors="pt")["input_ids"]
        loss = model(**inputs, labels=labels.masked_fill(labels == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    encoder = T5EncoderModel(model.config)
    weights = {k: v for k, v in model.state_dict().items() if k in encoder.state_dict()}
    encoder.load_state_dict(weights)
    encoder.half().save_pretrained(out)


def mask_words(words, rng):
    """Mask one or two words -> ("a <extra_id_0> circle moving left", "<extra_id_0> red")."""
    inputs, targets = list(words), []
    for k, i in enumerate(sorted(rng.sample(range(len(words)), rng.choice([1, 2])))):
        inputs[i] = f"<extra_id_{k}>"
        targets += [inputs[i], words[i]]
    return " ".join(inputs), " ".join(targets)


@dataclass(frozen=True)
class EncoderConfig:
    encoder: tyro.conf.Positional[Literal["vae", "t5"]]  # what to train
    steps: int | None = None  # training steps; None: 1500 for the VAE, 500 for T5
    out: str | None = None  # folder to write; None: assets/vae or assets/t5


def main():
    c = tyro.cli(EncoderConfig, description=__doc__)
    make, steps = {"vae": (make_vae, 1500), "t5": (make_t5, 500)}[c.encoder]
    make(Path(c.out or ROOT / "assets" / c.encoder), c.steps or steps)


if __name__ == "__main__":
    data.run_command(main)
