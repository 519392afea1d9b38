"""Trains a tiny Stable Diffusion pipeline from nothing: circles, squares and triangles of 64 x 64 pixels.

    python tests/assets/make_shapes_pipeline.py

It runs offline on a CPU and writes the folder `shapes-64` beside this file. The autoencoder learns from confetti of
triangles, quadrangles and ellipses; text encoder and UNet learn together from the captioned pictures of `shapes.py`.
None of them sees a star, and no caption names one.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# Words that are one token each. Only those of the captions in shapes.py are trained; the others are there to be taught.
WORDS = """
a an the on in of at and with to by from under over beside between background picture drawing photo painting icon
red orange yellow green blue purple pink brown black white grey gray cyan magenta violet gold silver
shape circle square triangle star heart moon cross arrow ring diamond rectangle pentagon hexagon oval ellipse cube
ball sun cloud tree leaf flower house car boat fish bird cat dog face eye hand apple drop bolt flag key crown letter
big small large tiny thick thin bright dark light round left right top bottom upper lower middle centre center corner
one two three four five
"""


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "shapes-64")
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--vae_batch_size", type=int, default=8)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--unet_steps", type=int, default=3000)
    parser.add_argument("--unet_batch_size", type=int, default=32)
    parser.add_argument("--unet_learning_rate", type=float, default=2e-3, help="Of the text encoder, too.")
    parser.add_argument("--snr_gamma", type=float, default=5.0, help="Of the Min-SNR weights.")
    parser.add_argument("--num_pictures", type=int, default=6000, help="Captioned pictures to learn from.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


def schedule(optimizer, steps, warmup=100):
    """Linear warm-up, then a cosine down to zero."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, k / steps))))
    )


def to_tensor(images):
    """A list of RGB images as a uint8 tensor of shape (count, 3, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def to_model(pixels):
    """uint8 pixels as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def make_tokenizer(folder):
    """CLIP's byte-level BPE with merges that make every word of `WORDS` one token; any other text still has tokens."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Each byte also ends a word. A one-letter word is that very token.
    words = WORDS.split() + alphabet
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: k for k, token in enumerate(tokens)}

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    for word in WORDS.split():
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ----------------------------------------------------------------------------------------------------------------------


def confetti(rng):
    """A picture of up to five overlapping triangles, quadrangles and ellipses in random colours.

    Pieces share a colour now and then, so that outlines with inward corners occur.
    """
    size, scale = shapes.SIZE, 4 * shapes.SIZE

    def colour():
        # Half of them saturated: pure channels, more or less, so that no hue is neglected.
        lows_and_highs = (0, 60), (195, 255)
        if rng.random() < 0.5:
            return tuple(rng.randint(*rng.choice(lows_and_highs)) for _ in range(3))
        return tuple(rng.randrange(256) for _ in range(3))

    ground = rng.choice([(255, 255, 255)] * 2 + [(0, 0, 0)] * 2 + [colour()])
    palette = [colour() for _ in range(rng.randint(1, 3))]
    image = Image.new("RGB", (scale, scale), ground)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 5)):
        x, y = rng.uniform(0, scale), rng.uniform(0, scale)
        reach = scale * rng.uniform(0.06, 0.4)
        fill = rng.choice(palette)
        if rng.random() < 0.3:
            width, height = reach, reach * rng.uniform(0.4, 1)
            pen.ellipse((x - width, y - height, x + width, y + height), fill=fill)
            continue
        angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.choice((3, 4))))
        pen.polygon([(x + reach * math.cos(angle), y + reach * math.sin(angle)) for angle in angles], fill=fill)
    return image.resize((size, size), Image.Resampling.BOX)


def initialise(model):
    """Starts every convolution so that signals pass it: variance-preserving weights, no bias, idle residual branches.

    PyTorch's own start shrinks the signal in every layer and adds biases of its size, and a chain of random layers
    keeps only some directions: the autoencoder then tells colours apart after thousands of steps. So the layers between
    residual blocks start near the identity.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
            if name.endswith(".conv2"):
                torch.nn.init.zeros_(module.weight)
            elif "samplers" in name or "conv_shortcut" in name or "quant_conv" in name:
                identity = torch.nn.init.dirac_(torch.empty_like(module.weight))
                module.weight.data.mul_(0.4).add_(identity)
    return model


def make_vae():
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=shapes.SIZE,
    )
    initialise(vae)
    with torch.no_grad():  # next to no noise in the latents at the start
        vae.quant_conv.weight[vae.config.latent_channels :] *= 0.1
        vae.quant_conv.bias[vae.config.latent_channels :] = -6.0
    return vae


def train_vae(args):
    """Trains the autoencoder on confetti and sets its `scaling_factor`. Returns (vae, mean absolute error in 0..1)."""
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    vae = make_vae()
    rng = random.Random(f"{args.seed} confetti")
    pictures = to_tensor([confetti(rng) for _ in range(6000)])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = schedule(optimizer, args.vae_steps)
    ema = EMAModel(vae.parameters(), decay=0.995)
    errors = []
    start = time.time()
    for step in range(args.vae_steps):
        pixels = pictures[torch.randint(len(pictures), (args.vae_batch_size,))]
        # The colours and directions of confetti mean nothing: any of these is as good a picture.
        pixels = pixels[:, torch.randperm(3)]
        pixels = pixels.transpose(2, 3) if random.random() < 0.5 else pixels
        pixels = to_model(pixels.flip([axis for axis in (2, 3) if random.random() < 0.5]))
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = F.l1_loss(decoded, pixels)
        # The error of the differences between neighbours makes outlines count, the divergence keeps the latents smooth.
        edges = sum(F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3))
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = 4 * F.mse_loss(decoded, pixels) + 0.5 * error + edges + 1e-5 * divergence
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        errors.append(error.item() / 2)
        if (step + 1) % 100 == 0:
            mean = np.mean(errors[-100:])
            print(f"vae step {step + 1}: mean absolute error {mean:.4f}, {time.time() - start:.0f} s", flush=True)
    ema.copy_to(vae.parameters())
    vae.requires_grad_(False).eval()
    return vae, float(np.mean(errors[-100:]))


@torch.no_grad()
def encode(vae, pixels):
    """Posterior means and standard deviations, each of shape (count, 4, 16, 16), of uint8 pixels."""
    posteriors = [vae.encode(to_model(part)).latent_dist for part in pixels.split(100)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


# ----------------------------------------------------------------------------------------------------------------------
# Text encoder and UNet
# ----------------------------------------------------------------------------------------------------------------------


def make_text_encoder(tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    for name, parameter in text_encoder.named_parameters():
        if name.endswith("embedding.weight"):
            # CLIP's own scale of 0.02 drowns in what the layers add; with this one a word is plain in its hidden state.
            torch.nn.init.normal_(parameter, std=0.6 if "token" in name else 0.2)
    return text_encoder


def make_unet():
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_k" in name:  # attention that picks some words at once, not the mean of 77 tokens
                parameter.mul_(5)
    return initialise(unet)


def make_scheduler():
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_unet(args, vae, tokenizer):
    """Trains text encoder and UNet together. Returns (text_encoder, unet, mean squared error of the noise)."""
    torch.manual_seed(args.seed)
    text_encoder, unet, scheduler = make_text_encoder(tokenizer), make_unet(), make_scheduler()
    examples = shapes.examples(shapes.SHAPES, args.num_pictures, seed=1_000 + args.seed)
    mean, std = encode(vae, to_tensor([shapes.draw(*example) for example in examples]))
    factor = 1 / (mean.square() + std.square() - mean.mean() ** 2).mean().sqrt().item()
    vae.register_to_config(scaling_factor=factor)
    print(f"scaling factor {factor:.4f}", flush=True)

    def tokenize(captions):
        return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    # One row of tokens per template, so that a picture's wording is drawn anew each time.
    tokens = torch.stack(
        [
            tokenize([template.format(shape=s, colour=c, background=b) for s, c, b, _ in examples])
            for template in shapes.TEMPLATES
        ]
    )
    empty = tokenize([""])[0]
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    # No weight decay: it would pull the embeddings of words that no caption holds to zero.
    optimizer = torch.optim.AdamW(
        parameters, lr=args.unet_learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    lr_scheduler = schedule(optimizer, args.unet_steps)
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    batch_size = args.unet_batch_size
    losses = []
    start = time.time()
    for step in range(args.unet_steps):
        rows = torch.randint(len(examples), (batch_size,))
        input_ids = tokens[torch.randint(len(tokens), (batch_size,)), rows]
        input_ids[torch.rand(batch_size) < args.proportion_empty_prompts] = empty
        latents = factor * (mean[rows] + std[rows] * torch.randn_like(mean[rows]))
        noise = torch.randn_like(latents)
        # One timestep from each part of the range: less noise in the gradient than independent draws.
        parts = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
        timesteps = (parts * scheduler.config.num_train_timesteps).long()
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        hidden_states = text_encoder(input_ids).last_hidden_state
        error = (unet(noisy_latents, timesteps, hidden_states).sample - noise).square().mean(dim=(1, 2, 3))
        # Min-SNR weights (Hang et al. 2023, equation 5): little noise, where only the finest detail is at stake, counts
        # less; shape and background are decided where there is much, and there the caption matters.
        loss = (error * (args.snr_gamma / snr[timesteps]).clamp(max=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(parameters)
        losses.append(error.mean().item())
        if (step + 1) % 100 == 0:
            print(f"unet step {step + 1}: loss {np.mean(losses[-100:]):.4f}, {time.time() - start:.0f} s", flush=True)
    ema.copy_to(parameters)
    return text_encoder.eval(), unet.eval(), float(np.mean(losses[-500:]))


def make_pipeline(vae, text_encoder, tokenizer, unet):
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def use_published_names(path):
    """Names the text encoder's tensors as published checkpoints do, which every release of transformers reads.

    Later releases leave the prefix out when they save a model of their own making; earlier ones then find no weights,
    and start from random ones with no more than a warning.
    """
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction_error(vae, names):
    """Mean absolute error in 0..1, and share that still passes the check, of 60 pictures encoded and decoded."""
    examples = shapes.examples(names, 60, seed=7)
    pixels = to_tensor([shapes.draw(*example) for example in examples])
    decoded = vae.decode(encode(vae, pixels)[0]).sample.clamp(-1, 1)
    error = (decoded - to_model(pixels)).abs().mean().item() / 2
    pictures = ((decoded + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    passed = [shapes.matches(picture, *example[:3]) for picture, example in zip(pictures, examples, strict=True)]
    return error, float(np.mean(passed))


def accuracy(pipeline, names, count, seed=0):
    """Share of `count` drawn pictures that show what their prompt says, by the check of shapes.py."""
    examples = shapes.examples(names, count, seed)
    prompts = [shapes.caption(*example) for example in examples]
    pictures = []
    for k in range(0, count, 30):
        part = prompts[k : k + 30]
        generators = [torch.Generator().manual_seed(seed + k + j) for j in range(len(part))]
        pictures += pipeline(part, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    return float(np.mean([shapes.matches(p, *e[:3]) for p, e in zip(pictures, examples, strict=True)]))


def main(args):
    start = time.time()
    tokenizer = make_tokenizer(args.output_dir / "tokenizer")
    vae, vae_error = train_vae(args)
    text_encoder, unet, loss = train_unet(args, vae, tokenizer)
    pipeline = make_pipeline(vae, text_encoder, tokenizer, unet)
    pipeline.save_pretrained(args.output_dir, safe_serialization=True)
    use_published_names(args.output_dir / "text_encoder" / "model.safetensors")

    seconds = time.time() - start
    pipeline.set_progress_bar_config(disable=True)
    parts = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    measured = {
        "seconds": round(seconds),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "vae_mean_absolute_error_confetti": vae_error,
        "vae_reconstruction_known": reconstruction_error(vae, shapes.SHAPES),
        "vae_reconstruction_star": reconstruction_error(vae, (shapes.NEW_SHAPE,)),
        "scaling_factor": vae.config.scaling_factor,
        "unet_loss": loss,
        "accuracy": {name: accuracy(pipeline, (name,), 60) for name in (*shapes.SHAPES, shapes.NEW_SHAPE)},
    }
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main(parse_args())
