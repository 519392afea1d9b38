"""Trains Stable Diffusion's UNet on fixed tensors: what a step cannot do without, and so the limit of every script.

    python tests/benchmarks/bare_loop.py --pretrained_model_name_or_path=models --output_dir=out --use_ema [--encode]

A step is the UNet's forward and backward pass, clipping, fused AdamW and the average in one pass. No data are read or
moved: latents, text states, timesteps and noise are made once. With --encode the VAE and the text encoder run in every
step as well, on fixed pixels and tokens. It takes the flags below as `train_text_to_image.py` does, ignores the others
and logs as it does, so that `benchmark.py --versus` compares the two.
"""

import argparse
import contextlib
import copy
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.tensorboard import SummaryWriter
from transformers import CLIPTextModel

TOKENS = 77  # of a caption, padded


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--output_dir", type=Path, default="bare-loop")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encode", action="store_true", help="run the frozen encoders in every step")
    return parser.parse_known_args(input_args)[0]


class BareLoop:
    """The models, fixed tensors and optimizer of a loop. `step()` does one update and returns its loss, ()."""

    def __init__(self, args):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
        path = args.pretrained_model_name_or_path
        self.vae = AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=dtype).requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype)
        self.text_encoder.requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet").train().to(self.device)
        if self.device.type == "cuda":  # channels-last weights are faster, but not on CPUs
            self.unet.to(memory_format=torch.channels_last)
        if args.encode:
            self.vae.to(self.device, memory_format=torch.channels_last)
            self.text_encoder.to(self.device)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if args.compile:
            for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
                block.compile()
        self.ema = copy.deepcopy(self.unet).requires_grad_(False) if args.use_ema else None
        self.parameters = list(self.unet.parameters())
        self.optimizer = self.make_optimizer()
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.make_tensors(DDPMScheduler.from_pretrained(path, subfolder="scheduler"), dtype)

    def make_optimizer(self, **settings):
        return torch.optim.AdamW(self.parameters, lr=self.args.learning_rate, fused=True, **settings)

    def make_tensors(self, scheduler, dtype):
        """The fixed batch: everything that the steps read."""
        count, side = self.args.train_batch_size, self.args.resolution
        height = side // 2 ** (len(self.vae.config.block_out_channels) - 1)
        generator = torch.Generator().manual_seed(self.args.seed)

        def normal(*shape, dtype=torch.float32):
            return torch.randn(count, *shape, generator=generator).to(self.device, dtype)

        self.clean, self.noise = (normal(self.vae.config.latent_channels, height, height) for _ in range(2))
        self.timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator)
        alphas = scheduler.alphas_cumprod[self.timesteps][:, None, None, None].to(self.device)
        self.timesteps = self.timesteps.to(self.device)
        self.signal_rate, self.noise_rate = alphas**0.5, (1 - alphas) ** 0.5
        self.text_states = normal(TOKENS, self.unet.config.cross_attention_dim, dtype=dtype)
        self.pixels = normal(3, side, side, dtype=dtype).clip(-1, 1) if self.args.encode else None
        vocabulary = self.text_encoder.config.vocab_size
        self.tokens = torch.randint(vocabulary, (count, TOKENS), generator=generator).to(self.device)

    @torch.no_grad()
    def encoded(self):
        """The clean latents and the text states of the batch."""
        if not self.args.encode:
            return self.clean, self.text_states
        latents = self.vae.encode(self.pixels).latent_dist.mean.float() * self.vae.config.scaling_factor
        return latents, self.text_encoder(self.tokens).last_hidden_state

    def loss(self):
        latents, text_states = self.encoded()
        noisy = self.signal_rate * latents + self.noise_rate * self.noise
        with self.autocast:
            predicted = self.unet(noisy, self.timesteps, text_states).sample
        return torch.nn.functional.mse_loss(predicted.float(), self.noise)

    def step(self):
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()
        return loss.detach()

    @torch.no_grad()
    def average(self):
        if self.ema:
            torch._foreach_lerp_(list(self.ema.parameters()), self.parameters, 1e-4)


def main(args):
    loop, updates = BareLoop(args), []
    with contextlib.closing(SummaryWriter(args.output_dir / "logs")) as writer:
        for step in range(1, args.max_train_steps + 1):
            loss = loop.step()
            updates.append((step, time.time(), loss))
            if step % args.logging_steps == 0 or step == args.max_train_steps:
                losses = torch.stack([loss for _, _, loss in updates]).tolist()  # waits for the device
                for (number, walltime, _), loss in zip(updates, losses, strict=True):
                    writer.add_scalar("train_loss", loss, number, walltime=walltime)
                updates.clear()


if __name__ == "__main__":
    main(parse_args())
