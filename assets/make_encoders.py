"""Make the toy's frozen encoders: a small AutoencoderKL and a small T5, shipped beside this file.

    python assets/make_encoders.py vae     # 1500 steps, about 8 minutes on 2 cores -> assets/vae
    python assets/make_encoders.py t5      # 500 steps, under a minute               -> assets/t5

They are the classes that the released systems use (diffusers' AutoencoderKL with factor 8 and 4
latent channels; transformers' T5EncoderModel with a SentencePiece tokenizer), only small, so the
toy goes through the same code as stabilityai/sd-vae-ft-mse and DeepFloyd/t5-v1_1-xxl do, and
downloads nothing.
"""

import argparse
import io
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))
import data  # noqa: E402

# ---------------------------------------------------------------------------------------------
# The VAE. Three quarters of its pictures are toy frames, one quarter the same shapes in any colour:
# colours between the toy's four then have codes between theirs. (Grounds of any colour were tried
# too: the small network's GroupNorms wipe out what is constant over a picture, and after 500 steps
# it had learned little.)


def toy_frames(n, generator):
    """n single toy frames -> [n, 3, 64, 64] in [-1, 1]."""
    picks = torch.randint(len(data.TRIPLES), (n,), generator=generator).tolist()
    frames = [data.draw_clip(data.TRIPLES[i], generator, frames=2)[i % 2] for i in picks]
    return torch.stack(frames).float() / 127.5 - 1  # first and last frames, so all over the picture


def free_frames(n, generator):
    """n frames with a shape of any colour and size anywhere -> [n, 3, 64, 64] in [-1, 1]."""
    u = torch.rand(n, 6, generator=generator)
    # [n, 1, 64, 64]
    cover = torch.stack(
        [
            data.coverage(data.SHAPES[i % 3], u[i : i + 1, :2] * 64, 5 + 10 * u[i, 2], 64)
            for i in range(n)
        ]
    )
    paint, ground = u[:, 3:6, None, None], torch.tensor(data.GROUND).view(3, 1, 1) / 255
    return (ground + cover * (paint - ground)) * 2 - 1


def make_vae(steps, batch=24):
    """Train, whiten, save. Loss: MSE + a little KL; the decoder sees latents with some noise added.

    The noise (10% of each channel's deviation) makes it forgiving: a sampler's latents are never
    exact.
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
        scaling_factor=1.0,  # the latents are whitened below
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, weight_decay=0)
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1.5e-3 * rate
        x = torch.cat([toy_frames(batch * 3 // 4, generator), free_frames(batch // 4, generator)])
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        z = posterior.sample(generator)
        spread = z.std((0, 2, 3), keepdim=True).detach()
        z = z + 0.1 * spread * torch.randn(z.shape, generator=generator)
        mse = F.mse_loss(vae.decode(z).sample, x)
        kl = posterior.kl().mean() / z[0].numel()  # nats per latent value
        optimizer.zero_grad()
        (mse + 1e-5 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  mse {mse.item():.1e}  kl {kl.item():.2f}", flush=True)
    whiten(vae, toy_frames(512, generator))
    vae.half().save_pretrained(ASSETS / "vae")


@torch.no_grad()
def whiten(vae, x):
    """Give the toy's latents zero mean and unit variance in each channel, by changing weights
    alone.

    z' = (z - m) / s is a 1x1 convolution, and so are the VAE's last layer before the latents and
    its first behind them: the change is folded into both, and the VAE stays an ordinary
    AutoencoderKL. The posterior is narrowed tenfold, too: training leaves it wide where it costs no
    picture (one channel was mostly noise), and a diffusion model would have to learn that noise;
    the large released VAEs have little of it.
    """
    z = vae.encode(x).latent_dist.mean  # [n, 4, 8, 8]
    m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
    print("latent mean", m.tolist(), "deviation", s.tolist())
    before = vae.decode(z).sample
    quant, post = vae.quant_conv, vae.post_quant_conv  # quant gives 4 means, then 4 log variances
    quant.weight[:4] /= s.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - m) / s
    quant.bias[4:] -= 2 * (10 * s).log()
    post.bias += post.weight[:, :, 0, 0] @ m
    post.weight *= s.view(1, 4, 1, 1)
    z = vae.encode(x).latent_dist.mean
    print("whitened   ", z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist())
    print(f"largest change of the pictures {(vae.decode(z).sample - before).abs().max():.1e}")


# ---------------------------------------------------------------------------------------------
# The T5: a SentencePiece model of the captions and the alphabet, and an encoder trained as T5 was,
# by filling in masked words (arXiv 1910.10683, section 3.1.4), with a decoder that is then thrown
# away. Held-out triples take no part.

WORDS = "a the of and on in is are with to car rabbit man skiing eating watermelon road moving snow"


def make_t5(steps=500, batch=64):
    import sentencepiece
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

    folder = ASSETS / "t5"
    folder.mkdir(exist_ok=True)
    captions = [data.caption_of(t) for t in data.TRIPLES if t not in data.HELD_OUT]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # SentencePiece takes a whole word for a piece only if it meets it in two surroundings: so
        # with commas, too.
        sentence_iterator=iter(
            [text for c in captions for text in (c, c.replace(" ", ", ") + ".")] + WORDS.split()
        ),
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
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(folder)
    print(len(tokenizer), "tokens;", tokenizer.tokenize(captions[0]))
    torch.set_num_threads(1)  # faster for something this small
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0, tie_word_embeddings=False, decoder_start_token_id=0,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    draw = random.Random(0)
    for step in range(steps):
        pairs = [mask_words(draw.choice(captions).split(), draw) for _ in range(batch)]
        inputs = tokenizer([p[0] for p in pairs], padding=True, return_tensors="pt")
        labels = tokenizer([p[1] for p in pairs], padding=True, return_tensors="pt")["input_ids"]
        loss = model(**inputs, labels=labels.masked_fill(labels == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    encoder = T5EncoderModel(model.config)
    encoder.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in encoder.state_dict()}
    )
    encoder.half().save_pretrained(folder)


def mask_words(words, draw):
    """("a <extra_id_0> circle moving left", "<extra_id_0> red"): one or two words are to be filled
    in.
    """
    hidden = sorted(draw.sample(range(len(words)), draw.choice([1, 2])))
    inputs = [
        f"<extra_id_{hidden.index(i)}>" if i in hidden else word for i, word in enumerate(words)
    ]
    return " ".join(inputs), " ".join(f"<extra_id_{k}> {words[i]}" for k, i in enumerate(hidden))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["vae", "t5"])
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the VAE")
    args = parser.parse_args()
    if args.what == "vae":
        make_vae(args.steps)
    else:
        make_t5()
