# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.8.1,<1",
#     "flax>=0.12.1,<1",
#     "optax>=0.2.6,<1",
#     "orbax-checkpoint>=0.11.30,<1",
#     "datasets>=4.5,<6",
#     "transformers>=5.0,<6",
#     "safetensors>=0.8,<1",
#     "huggingface_hub>=1.23,<3",
#     "pillow>=11.0",
#     "tensorboardX>=2.6.4,<3",
#     "wandb>=0.24.1,<1",
# ]
# ///
r"""Fine-tune Stable Diffusion 1.x or 2.x on captioned images, in JAX.

    python train_text_to_image_flax.py \
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir=my_images --use_ema --learning_rate=1e-5 --max_train_steps=15000

The training minimises, over the latents x_0 of images, their captions c, timesteps t and noise ε ~ N(0, I),

    E [ w(t) · ‖ target − unet(x_t, t, c) ‖² ]    with    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε

where the target is ε (Ho et al. 2020, arXiv:2006.11239, eq. 14, on latents: Rombach et al. 2022, arXiv:2112.10752),
v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0 (Salimans & Ho 2022, arXiv:2202.00512) or x_0, as the model's scheduler says, and w(t)
is 1 or the Min-SNR weight (Hang et al. 2023, arXiv:2303.09556).

The same program runs on one chip, on all chips of a host and on many hosts.
Sections: Command line · Examples · Objective · Training · Models · Sampling · Weight files · The machinery.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def number(kind, rule, holds):
    """An argparse type: an int or float (`kind`) for which `holds` is true; the error message says the `rule`."""

    def convert(text):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{rule}, not {text}")
        return value

    convert.__name__ = kind.__name__  # argparse's message for a text that is no number shows this name
    return convert


def parse_args(input_args=None):
    """Parse `input_args` (list of str; None: the command line). Exits with status 2 if a value is impossible."""
    count = number(int, "must be larger than 0", lambda value: value > 0)
    natural = number(int, "must not be negative", lambda value: value >= 0)
    positive = number(float, "must be larger than 0", lambda value: 0 < value < math.inf)
    non_negative = number(float, "must not be negative", lambda value: 0 <= value < math.inf)
    probability = number(float, "must be from 0 to 1", lambda value: 0 <= value <= 1)
    decay = number(float, "must be from 0 to below 1", lambda value: 0 <= value < 1)
    limit = number(float, "must be larger than 0", lambda value: value > 0)  # inf: no limit

    about = {"usage": "%(prog)s FLAGS (--help lists them)", "description": __doc__.split("\n\nThe")[0]}
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    interpolations = ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="pipeline to fine-tune: a folder or a Hub id")
    add("--revision", help="branch, tag or commit of the pipeline on the Hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--non_ema_revision", help="Hub revision of the UNet to train, if it is not --revision")
    add("--cache_dir", help="folder for downloaded models and data sets")
    add("--from_pt", action="store_true", help="accepted and not needed: the format of the weights is recognised")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="data set: a Hub id, a local copy of one, or a folder written by save_to_disk")
    add("--dataset_config_name", help="configuration of the data set, if it has several")
    add("--train_data_dir", help="folder of images with captions in a metadata.jsonl or in .txt files")
    add("--image_column", default="image", help="column of the images")
    add("--caption_column", default="text", help="column of the captions; if a row has a list, one is sampled")
    add("--max_train_samples", type=count, help="train on this many rows, sampled with --seed")
    add("--resolution", type=count, default=512, help="side of the square training images, in pixels")
    add("--center_crop", action="store_true", help="crop the centre instead of a random square")
    add("--random_flip", action="store_true", help="flip half of the images horizontally, at random")
    add("--image_interpolation_mode", default="lanczos", choices=interpolations, help="filter for resizing images")
    add("--proportion_empty_prompts", type=probability, default=0, help="probability of an empty caption, for guidance")
    add("--dataloader_num_workers", type=natural, help="threads that read images; default: 1 on a CPU, else up to 16")
    add("--cache_encodings", help="folder for cached outputs of the frozen encoders, computed once before training")
    add("--skip_bad_images", action="store_true", help="read all images before training and skip unreadable ones")

    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction", "sample"], help="default: the scheduler's")
    add("--snr_gamma", type=positive, help="use Min-SNR loss weights with this gamma; the paper recommends 5.0")
    add("--noise_offset", type=non_negative, default=0, help="scale of noise that is constant within each channel")
    add("--input_perturbation", type=non_negative, default=0, help="scale of extra noise on the UNet's input; try 0.1")
    add("--dream_training", action="store_true", help="use the DREAM objective; costs one more forward pass")
    add("--dream_detail_preservation", type=non_negative, default=1.0, help="DREAM's exponent p")

    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=natural, default=0, help="seed of the whole run")
    add("--train_batch_size", type=count, default=16, help="images per device and micro-step")
    add("--gradient_accumulation_steps", type=count, default=1, help="micro-steps per update")
    add("--num_train_epochs", type=count, default=100, help="passes over the data, unless --max_train_steps is given")
    add("--max_train_steps", type=count, help="total number of updates")
    add("--learning_rate", type=positive, default=1e-4, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply that rate by devices x accumulation steps x batch size")
    add("--lr_scheduler", default="constant", choices=schedules, help="learning rate schedule, over updates")
    add("--lr_warmup_steps", type=natural, default=500, help="updates of linear warm-up (not for 'constant')")
    add("--adam_beta1", type=decay, default=0.9, help="AdamW's beta1")
    add("--adam_beta2", type=decay, default=0.999, help="AdamW's beta2")
    add("--adam_weight_decay", type=non_negative, default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=positive, default=1e-08, help="AdamW's epsilon")
    add("--max_grad_norm", type=limit, default=1.0, help="clip the gradient to this norm; inf: do not clip")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of the models' computations")
    add("--shard_params", action="store_true", help="shard weights, average and optimizer state over the devices")
    add("--local_rank", type=int, default=-1, help="accepted and not needed: the launcher tells each process its rank")
    add("--use_ema", action="store_true", help="validate and save an exponential moving average of the weights")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", default="sd-model-finetuned", help="folder for the pipeline, its checkpoints and logs")
    add("--checkpointing_steps", type=count, default=500, help="updates between checkpoints")
    add("--checkpoints_total_limit", type=count, help="keep this many checkpoints, the newest; default: all")
    add("--keep_best", action="store_true", help="also save and keep the checkpoint of the lowest validation loss")
    add("--resume_from_checkpoint", nargs="?", const="latest", help="resume from the newest checkpoint or a given one")
    add("--save_flax_weights", action="store_true", help="save the .msgpack files of FlaxStableDiffusionPipeline too")

    add = parser.add_argument_group("validation and logs").add_argument
    add("--validation_prompts", nargs="+", help="prompts to generate pictures of, quoted")
    add("--validation_epochs", type=count, default=5, help="epochs between validations")
    add("--validation_steps", type=count, help="updates between validations, instead of epochs")
    add("--validation_rows", type=natural, default=0, help="rows held out of training, to compute a validation loss")
    add("--validation_data_dir", help="folder of images with captions for the validation loss, instead of those rows")
    add("--logging_steps", type=count, default=10, help="updates between writes to the log, which holds every update")
    add("--logging_dir", default="logs", help="folder of the TensorBoard logs, inside --output_dir")
    add("--report_to", default="tensorboard", choices=["none", "tensorboard", "wandb", "all"], help="tracker, or all")
    add("--tracker_project_name", default="text2image-fine-tune", help="name of the project in the tracker")
    add("--generate", metavar="PROMPT", help="do not train: write a PNG of this prompt, at --resolution")

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="upload the result; write access is checked before training")
    add("--hub_model_id", help="repository to upload to; default: the name of --output_dir, under your account")
    add("--hub_token", help="access token; better: `hf auth login`, which keeps it out of the shell's history")

    words = sys.argv[1:] if input_args is None else input_args  # after a = shells do not expand ~
    args = parser.parse_args([word.replace("=~/", "=" + os.path.expanduser("~/"), 1) for word in words])
    if not (args.dataset_name or args.train_data_dir) and args.generate is None:
        parser.error("give a data set: --dataset_name (Hub id or folder) or --train_data_dir (folder of images)")
    if args.cache_encodings and not args.center_crop:
        parser.error("argument --cache_encodings: random crops cannot be cached; add --center_crop")
    if args.cache_encodings and Path(args.cache_encodings).resolve().is_relative_to(Path(args.output_dir).resolve()):
        parser.error("argument --cache_encodings: must not be inside --output_dir, which is uploaded as a whole")
    held_out = (args.validation_rows, args.validation_data_dir)
    if all(held_out) or (args.keep_best and not any(held_out)):
        parser.error("arguments --validation_rows, --validation_data_dir: give one of them; --keep_best needs one")
    if os.path.normpath(os.path.join("logs", args.tracker_project_name)).split(os.sep)[0] != "logs":
        parser.error(f"argument --tracker_project_name: {args.tracker_project_name} leads out of the folder of logs")
    if args.hub_token and not re.fullmatch("[!-~]+", args.hub_token):  # else connection errors print it
        parser.error("argument --hub_token: contains a space, a line break or a character outside ASCII")
    return args


# Before the imports below, which take seconds: --help and a wrong flag are answered at once.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"\nstopped\n") and os._exit(130))  # there is nothing to resume
    command_line = parse_args()

import datasets
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import PIL.ImageOps  # and PIL.Image
import safetensors.numpy
from absl import logging as absl_logging
from flax import nnx, serialization, traverse_util
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.utils import disable_progress_bars
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm.auto import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Examples: a row of the data set to arrays. All randomness of an example comes from its own generator, in fixed order.
# ----------------------------------------------------------------------------------------------------------------------


def train_transforms(image, resolution, interpolation, center_crop, random_flip, rng):
    """Resize the shorter side of an RGB `PIL.Image`, crop a square, maybe flip it. Returns uint8 (side, side, 3)."""
    resampling = PIL.Image.Resampling[interpolation.removesuffix("_exact").upper()]
    image = image.resize([int(resolution * side / min(image.size)) for side in image.size], resampling)
    # Always three random numbers, so that no flag changes those drawn after them.
    top, left, flip = rng.random(3)
    if center_crop:
        top, left = round((image.height - resolution) / 2), round((image.width - resolution) / 2)
    else:
        top, left = int(top * (image.height - resolution + 1)), int(left * (image.width - resolution + 1))
    image = image.crop((left, top, left + resolution, top + resolution))
    if random_flip and flip < 0.5:
        image = PIL.ImageOps.mirror(image)
    return np.array(image)


def choose_caption(captions, proportion_empty_prompts, rng):
    """Sample one of `captions` (a str, or a sequence of captions in any form), or "" with the given probability."""
    choice, dropout = rng.random(2)
    if dropout < proportion_empty_prompts:
        return ""
    return captions if isinstance(captions, str) else captions[int(choice * len(captions))]


def tokenize_captions(captions, tokenizer):
    """Tokenize n captions to arrays "input_ids" and "attention_mask", (n, 77) with CLIP's tokenizer."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")


def preprocess_train(args, tokenizer, row, rng):
    """Turn a row of the data set into "pixel_values" (resolution, resolution, 3), uint8, and "input_ids" (77,)."""
    crop = (args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip)
    pixel_values = train_transforms(read_image(row[args.image_column]), *crop, rng)
    caption = choose_caption(row[args.caption_column], args.proportion_empty_prompts, rng)
    return {"pixel_values": pixel_values, "input_ids": tokenize_captions([caption], tokenizer).input_ids[0]}


def encode_rows(args, tokenizer, encoder, rows, threads):
    """Encode everything that may be sampled from a batch of rows (dict of lists; images are RGB `PIL.Image`).

    Returns bytes of safetensors per row: "moments" (flips, h, w, 2 · channels) and "text_states" (captions, 77, width).
    """
    crop = (args.resolution, args.image_interpolation_mode, True, False, random_generator(0))  # has no effect
    images = threads.map(lambda image: train_transforms(image, *crop), rows[args.image_column])
    flips = [image[:, ::side] for image in images for side in ((1, -1) if args.random_flip else (1,))]
    moments = np.split(encoder("pixel_values", np.stack(flips)), len(images))
    captions = [[texts] if isinstance(texts, str) else texts for texts in rows[args.caption_column]]
    input_ids = tokenize_captions(list(itertools.chain(*captions)), tokenizer).input_ids
    text_states = np.split(encoder("input_ids", input_ids), np.cumsum([len(texts) for texts in captions])[:-1])
    pairs = zip(moments, text_states, strict=True)
    return [safetensors.numpy.save({"moments": moments, "text_states": states}) for moments, states in pairs]


def preprocess_encoded(args, dtype, empty_caption, row, rng):
    """Turn a row of `encode_rows` into "moments" and "text_states", of `dtype`; empty_caption: text states of ""."""
    blob = dict(safetensors.deserialize(row["encodings"]))  # safetensors.numpy.load cannot read bfloat16
    encodings = {name: np.frombuffer(part["data"], dtype).reshape(part["shape"]) for name, part in blob.items()}
    *_, flip = rng.random(3)  # as in train_transforms
    text_states = choose_caption(encodings["text_states"], args.proportion_empty_prompts, rng)
    return {
        "moments": encodings["moments"][int(args.random_flip and flip < 0.5)],
        "text_states": empty_caption if isinstance(text_states, str) else text_states,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Objective: from a batch to its losses.
# ----------------------------------------------------------------------------------------------------------------------


def add_noise(clean, noise, alphas_cumprod):
    """x_t = √ᾱ · x_0 + √(1 − ᾱ) · ε (arXiv:2006.11239, eq. 4). All broadcast; alphas_cumprod is ᾱ_t, in [0, 1]."""
    return alphas_cumprod**0.5 * clean + (1 - alphas_cumprod) ** 0.5 * noise


def prediction_target(prediction_type, clean, noise, alphas_cumprod):
    """The model's target, of clean's shape: ε, √ᾱ · ε − √(1 − ᾱ) · x_0 (arXiv:2202.00512) or x_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alphas_cumprod**0.5 * noise - (1 - alphas_cumprod) ** 0.5 * clean
    return clean


def predicted_noise(prediction_type, prediction, noisy, alphas_cumprod):
    """The ε that a prediction implies, given x_t: `prediction_target` solved for ε. Finite for ᾱ < 1."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return alphas_cumprod**0.5 * prediction + (1 - alphas_cumprod) ** 0.5 * noisy
    return (noisy - alphas_cumprod**0.5 * prediction) / (1 - alphas_cumprod) ** 0.5


def min_snr_weight(prediction_type, alphas_cumprod, gamma):
    """The Min-SNR-γ weight of a squared error, of ᾱ's shape, finite for all ᾱ (arXiv:2303.09556, section 3.4)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)  # 0 at ᾱ = 0, infinite at ᾱ = 1
    if prediction_type == "epsilon":
        return (gamma / snr).clip(max=1)  # min(SNR, γ) / SNR
    if prediction_type == "v_prediction":
        return snr.clip(max=gamma) / (snr + 1)
    return snr.clip(max=gamma)


def dream(noisy, noise, predicted, alphas_cumprod, detail_preservation):
    """Diffusion Rectification and Estimation-Adaptive Models (DREAM, arXiv:2312.00210, algorithm 2).

    Moves the noise by Δ = (√(1 − ᾱ))^p · (ε − ε_predicted), and x_t with it. `predicted` carries no gradient.
    Returns the new (noisy, noise).
    """
    sigma = (1 - alphas_cumprod) ** 0.5
    delta = sigma**detail_preservation * (noise - predicted)
    return noisy + sigma * delta, noise + delta


def weighted_squared_error(prediction, target, weight):
    """weight · mean squared error of every example; prediction, target (b, ...), weight (b,). Returns (b,)."""
    squared_error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return weight * squared_error.reshape(len(weight), -1).mean(1)


def training_alphas_cumprod(config):
    """ᾱ of all timesteps, float32, from a scheduler's configuration (dict). Raises RunError if it is unknown."""
    number = config.get("num_train_timesteps", 1000)
    schedule = config.get("beta_schedule", "linear")
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif schedule == "linear":  # arXiv:2006.11239
        betas = np.linspace(first, last, number)
    elif schedule == "scaled_linear":  # Stable Diffusion's: linear in √β
        betas = np.linspace(first**0.5, last**0.5, number) ** 2
    elif schedule == "squaredcos_cap_v2":  # arXiv:2102.09672, eq. 17
        signal = np.cos((np.arange(number + 1) / number + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clip(max=0.999)
    else:
        raise RunError(f"scheduler/: beta_schedule {schedule} is not known")
    alphas_cumprod = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):  # arXiv:2305.08891, algorithm 1
        root = alphas_cumprod**0.5
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas_cumprod.astype(np.float32)


def draw_noise(positions, key, latents_shape, num_train_timesteps):
    """Sample a micro-batch's timesteps and noise by the run's key and positions (b, 2) alone: high and low uint32."""

    def draw(position):
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, position[0]), position[1]), 5)
        return {
            "posterior_noise": jax.random.normal(keys[0], latents_shape),
            "timesteps": jax.random.randint(keys[1], (), 0, num_train_timesteps),
            "noise": jax.random.normal(keys[2], latents_shape),
            "offset_noise": jax.random.normal(keys[3], (1, 1, latents_shape[-1])),
            "perturbation_noise": jax.random.normal(keys[4], latents_shape),
        }

    return jax.vmap(draw)(positions)


def encode(batch, frozen, models, dtype):
    """Encode "pixel_values" (b, h, w, 3), uint8, to "moments" of the VAE's posterior (b, height, width, 2 · channels),
    and "input_ids" (b, 77) to "text_states" (b, 77, width): those of them that `batch` has. Computes in `dtype`."""
    encodings = {}
    if "pixel_values" in batch:
        levels = np.arange(256, dtype=np.float32) / 255 * 2 - 1  # a table: XLA would multiply by 255's rounded inverse
        pixel_values = jnp.asarray(levels)[batch["pixel_values"]]
        encodings["moments"] = models["vae"].module(frozen["vae"]).encode(pixel_values.astype(dtype))
    if "input_ids" in batch:
        encodings["text_states"] = models["text_encoder"].module(frozen["text_encoder"])(batch["input_ids"])
    return encodings


def mean_and_deviation(moments):
    """The posterior's mean and standard deviation, float32, of its moments (b, height, width, 2 · channels)."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.exp(0.5 * log_variance.clip(-30, 20))


def training_losses(params, frozen, batch, models, alphas_cumprod, prediction_type, args):
    """The loss of each example of a micro-batch, (b,). Deterministic: the batch holds all random numbers.

    params, frozen: weights of the UNet, in float32, and of the encoders ({} if the batch is encoded); batch: collated
    examples and the arrays of `draw_noise`; models: {"unet", ...: `Model`}; alphas_cumprod: ᾱ of all timesteps.
    """
    dtype = COMPUTE_TYPES[args.mixed_precision]
    unet = models["unet"].module(gather_weights(params, dtype))
    encodings = batch if "moments" in batch else encode(batch, frozen, models, dtype)
    mean, deviation = mean_and_deviation(encodings["moments"])
    latents = (mean + deviation * batch["posterior_noise"]) * models["vae"].config.scaling_factor

    def predict(noisy_latents):
        inputs = (noisy_latents.astype(dtype), timesteps, encodings["text_states"])
        return unet(*inputs, rematerialise=args.gradient_checkpointing).astype(jnp.float32)

    timesteps, noise = batch["timesteps"], batch["noise"]
    alphas = alphas_cumprod[timesteps][:, None, None, None]
    if args.noise_offset:
        noise = noise + args.noise_offset * batch["offset_noise"]
    input_noise = noise
    if args.input_perturbation:  # arXiv:2301.11706: on the input, not on the target
        input_noise = noise + args.input_perturbation * batch["perturbation_noise"]
    noisy_latents = add_noise(latents, input_noise, alphas)
    if args.dream_training:
        model_pred = jax.lax.stop_gradient(predict(noisy_latents))
        predicted = predicted_noise(prediction_type, model_pred, noisy_latents, alphas)
        noisy_latents, noise = dream(noisy_latents, noise, predicted, alphas, args.dream_detail_preservation)

    model_pred = predict(noisy_latents)
    target = prediction_target(prediction_type, latents, noise, alphas)
    weight = jnp.ones(len(timesteps))
    if args.snr_gamma:
        weight = min_snr_weight(prediction_type, alphas_cumprod[timesteps], args.snr_gamma)
    return weighted_squared_error(model_pred, target, weight)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

COMPUTE_TYPES = {"no": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}
FROZEN = ("vae", "text_encoder")


def mean_gradient(params, frozen, batches, key, losses, scale):
    """The mean loss and gradient over the micro-steps of an update; `scale` is fp16's loss scale. See `train_step`."""
    loss_and_gradient = jax.value_and_grad(lambda params, batch: losses(params, frozen, batch, key).mean() * scale)
    if len(batches) == 1:  # no loop: on a CPU, XLA compiles the body of one to much slower code
        total = loss_and_gradient(params, batches[0])
    else:
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        add = lambda total, batch: (jax.tree.map(jnp.add, total, loss_and_gradient(params, batch)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, zeros, jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches))
    return jax.tree.map(lambda value: value / (scale * len(batches)), total)


def train_step(state, frozen, batches, key, step, learning_rate, losses, transform, args):
    """One update. Pure. Returns the new state and {name: value to log}.

    state: of `make_train_state`; batches: of the micro-steps, [dict of arrays]; step: from 1; losses: function of
    params, frozen, batch, key. With fp16 an update of a gradient that is not finite is skipped (arXiv:1710.03740).
    """
    scale = state["loss_scale"]["scale"] if "loss_scale" in state else jnp.float32(1)
    mean_loss, gradient = mean_gradient(state["params"], frozen, batches, key, losses, scale)
    norm = optax.tree.norm(gradient)
    gradient = jax.tree.map(lambda value: value * jnp.minimum(1, args.max_grad_norm / (norm + 1e-6)), gradient)
    updates, optimizer_state = transform.update(gradient, state["optimizer"], state["params"])
    params = jax.tree.map(lambda value, update: value - learning_rate * update, state["params"], updates)
    new_state = {"params": params, "optimizer": optimizer_state}
    metrics = {"train_loss": mean_loss, "grad_norm": norm, "lr": learning_rate}
    if "loss_scale" in state:
        finite = jnp.isfinite(norm)
        before = {name: state[name] for name in new_state}
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, before)
        new_state["loss_scale"] = next_loss_scale(**state["loss_scale"], finite=finite)
        metrics["loss_scale"] = scale
    if "ema" in state:
        share = 1 - jnp.where(step > 1, jnp.minimum(0.9999, step / (step + 9)), 0.0)  # 1 - diffusers' EMA decay
        new_state["ema"] = jax.tree.map(lambda old, new: old - share * (old - new), state["ema"], new_state["params"])
    return new_state, metrics


def check_objective(prediction_type, alphas_cumprod):
    """Raise RunError if the scheduler's prediction type cannot be trained with its noise schedule."""
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise RunError(f"prediction type {prediction_type}: only epsilon, v_prediction and sample are supported")
    if prediction_type == "epsilon" and alphas_cumprod[-1] < 1e-6:  # x_T is ε itself
        raise RunError("prediction type epsilon: learns nothing at zero terminal SNR; use v_prediction or sample")


def check_architecture(models, tokenizer, resolution):
    """The latents' shape (h, w, c). Raises RunError if the models do not fit together, or to the resolution."""
    unet, vae, text_encoder = (models[part].config for part in PARTS)
    pairs = {
        "the tokenizer's tokens and the text encoder's": (len(tokenizer), text_encoder.vocab_size),
        "the UNet's input channels and the VAE's": (unet.in_channels, vae.latent_channels),
        "the UNet's context width and the text states'": (unet.cross_attention_dim, text_encoder.hidden_size),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise RunError(f"not a complete Stable Diffusion 1.x or 2.x: {what} do not match ({found}, {expected})")
    factor = 2 ** (len(vae.block_out_channels) - 1)
    if resolution % factor:
        raise RunError(f"--resolution {resolution}: must be a multiple of {factor}")
    return resolution // factor, resolution // factor, vae.latent_channels


def prepare_rows(args, data, tokenizer, models, weights):
    """The rows of each data set or their encodings, and a partial, `args` first, that turns one into an example."""
    tokenize_captions([""], tokenizer)  # sets up padding, which threads must not do at the same time
    if not args.cache_encodings:
        return data, functools.partial(preprocess_train, args, tokenizer)
    dtype = np.dtype(compute_type(args))
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    configs = [vars(models[part].config) for part in FROZEN]
    settings = [args.resolution, args.image_interpolation_mode, args.random_flip, dtype, rules, configs]
    encoder = make_encoder(args, models, weights)
    encode = functools.partial(encode_rows, args, tokenizer, encoder)
    rows = [cached_encodings(args, dataset, settings, weights, encode) for dataset in data]
    (empty_caption,) = encoder("input_ids", tokenize_captions([""], tokenizer).input_ids)
    return rows, functools.partial(preprocess_encoded, args, dtype, empty_caption)


def log_validation(images, log, args, step):
    """Write the images (list of `PIL.Image`) as one PNG grid, and to the trackers."""
    path = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
    columns = min(4, len(images))
    side = images[0].width + 2  # with a border
    grid = PIL.Image.new("RGB", (columns * side + 2, math.ceil(len(images) / columns) * side + 2))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * side + 2, index // columns * side + 2))
    with naming(f"{path} cannot be written"):
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    if log.tensorboard:
        log.tensorboard.add_images("validation", np.stack(images), step, dataformats="NHWC")
    if log.wandb:
        log.wandb.log({"validation": [log.wandb.Image(image) for image in images]}, step=step)
    logger.info(f"validation pictures: {path}")


def usage(args, name):
    """Python code that generates a picture with the result, by its `name`: --output_dir or a Hub id."""
    prompt = as_json((args.validation_prompts or ["a prompt"])[0])
    return f"""from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({as_json(name)})
pipeline({prompt}).images[0].save("picture.png")"""


def save_model_card(args, name, seed, steps, loss):
    """Write the card of the model `name`, --output_dir or a Hub id."""
    base = args.pretrained_model_name_or_path
    tags = ["stable-diffusion", "stable-diffusion-diffusers"]
    write_model_card(args, base, "UNet", name, seed, tags, f"{steps} updates{loss}", usage(args, name))


def main(args):
    """Train as the flags say. Raises RunError, and SystemExit with status 128 + its number after a signal."""
    connect_hosts()
    set_up_logging()
    if args.generate is not None:
        return generate(args)
    check_output_dir(args, args.pretrained_model_name_or_path)
    check_trackers(args)
    mesh = device_mesh(jax.devices())
    dtype = compute_type(args)

    # Where to start: at step 0 or at a checkpoint.
    checkpoint, start = find_start(args)
    first_step, examples_seen = start["step"], start["examples_seen"]

    # Models: the UNet in float32, the frozen ones in the precision of --mixed_precision.
    folder, unet_folder, scheduler_config, tokenizer, models, weights = load_pipeline(args)
    index = result_index(folder, args.variant)
    latents_shape = check_architecture(models, tokenizer, args.resolution)
    prediction_type = args.prediction_type or scheduler_config.get("prediction_type", "epsilon")
    alphas_cumprod = training_alphas_cumprod(scheduler_config)
    check_objective(prediction_type, alphas_cumprod)

    # Data, and the length of the run.
    batch_size = args.train_batch_size * jax.device_count() * args.gradient_accumulation_steps
    data, to_train, to_hold_out = load_data(args, ["image_column", "caption_column"], batch_size)
    examples_left = max(0, args.num_train_epochs * len(to_train) - examples_seen)
    last_step = max(first_step, args.max_train_steps or first_step + math.ceil(examples_left / batch_size))
    run = {"seed": args.seed, "batch_size": batch_size, "rows": len(to_train), "data": data[0]._fingerprint}
    run["architecture"] = vars(models["unet"].config)
    if checkpoint:
        before, now = start["architecture"], run["architecture"]
        if fields := [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            what = f"is of another architecture: {', '.join(fields[:3])}"
            raise RunError(f"--resume_from_checkpoint {checkpoint}: {what}")
        check_resume(args, checkpoint, start, run)
    validation_period = (args.validation_steps or 0) * batch_size or args.validation_epochs * len(to_train)  # examples

    # Training state on the devices: weights, optimizer state, average.
    transform = make_optimizer_transform(args)
    schedule = make_schedule(args, args.learning_rate * (batch_size if args.scale_lr else 1), last_step)
    rates = np.asarray(jax.vmap(schedule)(np.arange(last_step)), np.float32)  # outside the compiled update
    train_state, shardings = make_train_state(args, weights.pop("unet"), transform, mesh, checkpoint, start)
    frozen = {} if args.cache_encodings else on_devices(weights, mesh, dtype)

    # Every check has passed: from here on the run writes.
    repo_id = on_first_process(prepare_hub_repository, args) if args.push_to_hub else args.hub_model_id
    on_first_process(prepare_output_dir, args, first_step, last_step)
    log_plan(args, run, first_step, last_step, validation_period)

    # One stream of examples for the whole run, entered where the checkpoint left it.
    prepared, preprocess = prepare_rows(args, data, tokenizer, models, weights)
    stream = ExampleStream(prepared[0].select(to_train), preprocess, args.seed)
    positions = range(examples_seen, examples_seen + (last_step - first_step) * batch_size)
    micro_batches = read_ahead(args, stream, positions)
    on_first_process(save_frozen_parts, args, folder, index, tokenizer, models, weights)
    weights = weights if args.cache_encodings and args.validation_prompts else {}  # for validation pictures

    # Functions that run on the devices, each compiled once.
    def losses(params, frozen, batch, key, args):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        noise = draw_noise(batch["positions"], key, latents_shape, len(alphas_cumprod))
        alphas = jnp.asarray(alphas_cumprod)
        return training_losses(params, frozen, {**noise, **batch}, models, alphas, prediction_type, args)

    encoder = functools.partial(jax.jit(functools.partial(encode, models=models, dtype=dtype)), frozen=frozen)
    held_out = HeldOut(args, prepared[-1].select(to_hold_out), preprocess, encoder, losses, len(alphas_cumprod), start)
    update = functools.partial(train_step, losses=functools.partial(losses, args=args), transform=transform, args=args)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))
    sampler = make_sampler(models, scheduler_config, prediction_type, 20, dtype)

    def validate(step):
        encoders = frozen or on_devices(weights, mesh, dtype)  # of a cached run: there only while it samples
        bound = functools.partial(sampler, train_state.get("ema", train_state["params"]), encoders)
        images = sample_prompts(bound, args.validation_prompts, tokenizer, latents_shape, args.seed, mesh)
        if jax.process_index() == 0:
            log_validation(images, log, args, step)

    # Loop.
    stop = 0
    log = UpdateLog(args, batch_size, start, last_step)
    checkpoints = CheckpointWriter(args)
    agreed = signal_agreement(mesh)
    key = place(random_generator(args.seed, 4).integers(2**32, size=2, dtype=np.uint32), mesh)
    closing = contextlib.closing
    with closing(micro_batches), closing(log), closing(checkpoints), noted_signals() as noted:
        for step in range(first_step + 1, last_step + 1):
            batches = [log.next_batch(micro_batches) for _ in range(args.gradient_accumulation_steps)]
            scalars = (place(np.int32(step), mesh), place(rates[step - 1], mesh))
            train_state, metrics = update(train_state, frozen, batches, key, *scalars)
            log.add(step, metrics)
            examples_seen += batch_size

            stop = agreed(noted) if step < last_step else 0
            save = stop or step % args.checkpointing_steps == 0
            period_ends = examples_seen // validation_period > (examples_seen - batch_size) // validation_period
            due = period_ends and not stop and (args.validation_prompts or held_out.batches)
            if save or due or step % args.logging_steps == 0 or step in (first_step + 1, last_step):
                log.flush()
                checkpoints.finish(wait=False)
            if held_out.batches and (due or step == last_step):
                save = held_out.evaluate(step, train_state.get("ema", train_state["params"]), log) or save
            if save:
                state = {**run, "step": step, "examples_seen": examples_seen, "recent_losses": log.recent}
                checkpoints.save(train_state, {**state, "validation": [*held_out.history], "best": held_out.best})
            if due and args.validation_prompts and step < last_step:
                validate(step)
            if stop:
                break
        checkpoints.finish()
        if stop:
            name = signal.Signals(stop).name
            logger.warning(f"stopped by {name} after step {step}; --resume_from_checkpoint resumes")
            sys.exit(128 + stop)

        # Result.
        params = multihost_utils.process_allgather(train_state.get("ema", train_state["params"]), tiled=True)
        on_first_process(save_result, args, folder, unet_folder, index, models["unet"], params, prediction_type)
        if args.validation_prompts:
            validate(last_step)
    if jax.process_index() == 0:
        save_model_card(args, repo_id or args.output_dir, args.seed, last_step, held_out.summary())
    if args.push_to_hub:
        on_first_process(push_to_hub, args, repo_id)
    if jax.process_index() == 0:
        log_result(args, usage(args, args.output_dir), held_out.summary())


# Models ---------------------------------------------------------------------------------------------------------------
# Attribute paths are the names in PyTorch checkpoints, such as `down_blocks.0.attentions.1.proj_in`: that is all that
# loading and saving know. Images and latents are arrays (batch, height, width, channels).


def convolution(in_channels, out_channels, size, rngs, **options):
    """A square convolution of `size`, by default padded with `size` // 2 zeros."""
    return nnx.Conv(in_channels, out_channels, (size, size), rngs=rngs, **{"padding": size // 2, **options})


# As in PyTorch, variances are computed in two passes.
group_norm = functools.partial(nnx.GroupNorm, use_fast_variance=False)
layer_norm = functools.partial(nnx.LayerNorm, use_fast_variance=False)


def attention_kernel(device, dtype, head_size, lengths):
    """The `implementation` of attention: "cudnn", or None for XLA, which stores all attention weights. cuDNN needs half
    precision, an Nvidia GPU since Ampere, and head sizes that are multiples of 8, at most 128. For gradients, JAX needs
    even `lengths` of query and key: attention to a caption's 77 states is left to XLA."""
    capability = getattr(device, "compute_capability", "")  # of AMD's GPUs it is a name, such as gfx942
    recent = device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8
    fits = dtype in (jnp.float16, jnp.bfloat16) and head_size in range(8, 129, 8) and not any(n % 2 for n in lengths)
    return "cudnn" if recent and fits else None


def attend(query, key, value, heads, is_causal=False):
    """Multi-head attention of query (b, n, channels) to key and value (b, m, channels). Softmax in float32."""
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    lengths = (query.shape[1], key.shape[1])
    kernel = attention_kernel(jax.local_devices()[0], query.dtype, query.shape[-1], lengths)
    out = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation=kernel)
    return out.reshape(*out.shape[:2], -1)


class CLIPEncoderLayer(nnx.Module):
    """A causal, pre-norm transformer layer of CLIP, with `quick_gelu` (SD 1.x) or the exact `gelu` (SD 2.x)."""

    def __init__(self, config, rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.quick = config.hidden_act == "quick_gelu"
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nnx.Dict({name: nnx.Linear(width, width, rngs=rngs) for name in projections})
        self.layer_norm1 = layer_norm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.mlp = nnx.Dict(fc1=nnx.Linear(width, inner, rngs=rngs), fc2=nnx.Linear(inner, width, rngs=rngs))
        self.layer_norm2 = layer_norm(width, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, x):
        hidden = self.layer_norm1(x)
        query, key, value = (self.self_attn[name](hidden) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn.out_proj(attend(query, key, value, self.heads, is_causal=True))
        hidden = self.mlp.fc1(self.layer_norm2(x))
        hidden = hidden * jax.nn.sigmoid(1.702 * hidden) if self.quick else jax.nn.gelu(hidden, approximate=False)
        return x + self.mlp.fc2(hidden)


class CLIPTextModel(nnx.Module):
    """CLIP's text encoder (arXiv:2103.00020): token ids (b, n) to states (b, n, hidden_size)."""

    def __init__(self, config, rngs):
        width = config.hidden_size
        layers = [CLIPEncoderLayer(config, rngs) for _ in range(config.num_hidden_layers)]
        self.text_model = nnx.Dict(
            embeddings=nnx.Dict(
                token_embedding=nnx.Embed(config.vocab_size, width, rngs=rngs),
                position_embedding=nnx.Embed(config.max_position_embeddings, width, rngs=rngs),
            ),
            encoder=nnx.Dict(layers=nnx.List(layers)),
            final_layer_norm=layer_norm(width, epsilon=config.layer_norm_eps, rngs=rngs),
        )

    def __call__(self, input_ids):
        # Indexed, not called: nnx.Embed would cast to the dtype that it was created with.
        tables = self.text_model.embeddings
        positions = tables.position_embedding.embedding[: input_ids.shape[-1]]
        x = tables.token_embedding.embedding[...][input_ids] + positions
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


class ResnetBlock2D(nnx.Module):
    """Two convolutions around a skip connection; in the UNet, the timestep's embedding is added between them."""

    def __init__(self, in_channels, out_channels, time_channels, config, epsilon, rngs):
        self.norm1 = group_norm(in_channels, config.norm_num_groups, epsilon=epsilon, rngs=rngs)
        self.conv1 = convolution(in_channels, out_channels, 3, rngs)
        self.time_emb_proj = nnx.Linear(time_channels, out_channels, rngs=rngs) if time_channels else None
        self.norm2 = group_norm(out_channels, config.norm_num_groups, epsilon=epsilon, rngs=rngs)
        self.conv2 = convolution(out_channels, out_channels, 3, rngs)
        self.conv_shortcut = convolution(in_channels, out_channels, 1, rngs) if in_channels != out_channels else None

    def __call__(self, x, time_embedding=None):
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if time_embedding is not None:
            hidden += self.time_emb_proj(jax.nn.silu(time_embedding))[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


def resamplers(channels, exist, rngs, **options):
    """[the convolution of a down- or upsampler], or [] if the level has none."""
    return nnx.List([nnx.Dict(conv=convolution(channels, channels, 3, rngs, **options))] if exist else [])


def upsample(x, like=None):
    """Nearest-neighbour upsampling by 2, cropped to the sides of `like`, which may be odd."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return x if like is None else x[:, : like.shape[1], : like.shape[2]]


class Attention(nnx.Module):
    """Multi-head attention to a context (b, m, context_channels), or to itself without one."""

    def __init__(self, channels, context_channels, heads, use_bias, rngs):
        self.heads = heads
        self.to_q = nnx.Linear(channels, channels, use_bias=use_bias, rngs=rngs)
        self.to_k = nnx.Linear(context_channels, channels, use_bias=use_bias, rngs=rngs)
        self.to_v = nnx.Linear(context_channels, channels, use_bias=use_bias, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x, context=None):
        context = x if context is None else context
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class AttentionBlock(Attention):
    """The VAE's residual self-attention over all pixels, with one head."""

    def __init__(self, channels, config, rngs):
        super().__init__(channels, channels, 1, True, rngs)
        self.group_norm = group_norm(channels, config.norm_num_groups, epsilon=1e-6, rngs=rngs)

    def __call__(self, x):
        hidden = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(hidden).reshape(x.shape)


class VAEBlock(nnx.Module):
    """A level of the VAE: residual blocks, the first one followed by attention if there is any, then resampling. sizes:
    channels before each residual block and after the last one."""

    def __init__(self, sizes, config, rngs, attends=False, halves=False, doubles=False):
        self.resnets = nnx.List([ResnetBlock2D(*pair, None, config, 1e-6, rngs) for pair in itertools.pairwise(sizes)])
        self.attentions = nnx.List([AttentionBlock(sizes[-1], config, rngs)] if attends else [])
        right_and_bottom = {"strides": 2, "padding": ((0, 1), (0, 1))}
        self.downsamplers = resamplers(sizes[-1], halves, rngs, **right_and_bottom)
        self.upsamplers = resamplers(sizes[-1], doubles, rngs)

    def __call__(self, x):
        first, *rest = self.resnets
        for layer in (first, *self.attentions, *rest, *(sampler.conv for sampler in self.downsamplers)):
            x = layer(x)
        return self.upsamplers[0].conv(upsample(x)) if len(self.upsamplers) else x


class VAEHalf(nnx.Module):
    """The encoder (`down`) or decoder of the VAE; channels: of its levels, in the order of computation."""

    def __init__(self, in_channels, channels, out_channels, down, config, rngs):
        layers = config.layers_per_block + (not down)
        levels = [[before] + [after] * layers for before, after in itertools.pairwise([channels[0], *channels])]
        way = {"halves" if down else "doubles": True}
        blocks = [VAEBlock(sizes, config, rngs, **way if k < len(levels) else {}) for k, sizes in enumerate(levels, 1)]
        self.conv_in = convolution(in_channels, channels[0], 3, rngs)
        self.down_blocks = nnx.List(blocks if down else [])
        self.up_blocks = nnx.List([] if down else blocks)
        self.mid_block = VAEBlock([channels[-1 if down else 0]] * 3, config, rngs, config.mid_block_add_attention)
        self.conv_norm_out = group_norm(channels[-1], config.norm_num_groups, epsilon=1e-6, rngs=rngs)
        self.conv_out = convolution(channels[-1], out_channels, 3, rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The VAE of latent diffusion (arXiv:2112.10752)."""

    def __init__(self, config, rngs):
        channels = config.block_out_channels
        latents = config.latent_channels
        self.encoder = VAEHalf(config.in_channels, channels, 2 * latents, True, config, rngs)
        self.decoder = VAEHalf(latents, channels[::-1], config.out_channels, False, config, rngs)
        self.quant_conv = convolution(2 * latents, 2 * latents, 1, rngs)
        self.post_quant_conv = convolution(latents, latents, 1, rngs)

    def encode(self, pixel_values):
        """Pixels (b, height, width, 3) in [-1, 1] to the posterior's moments: channels of means, then log-variances."""
        return self.quant_conv(self.encoder(pixel_values))

    def decode(self, latents):
        """Unscaled latents to pixels, about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


class TimestepEmbedding(nnx.Module):
    """The sinusoidal embedding of the timestep (arXiv:2006.11239), then a two-layer MLP."""

    def __init__(self, config, rngs):
        self.channels = config.block_out_channels[0]
        self.shift = config.freq_shift
        self.cosine_first = config.flip_sin_to_cos
        self.linear_1 = nnx.Linear(self.channels, 4 * self.channels, rngs=rngs)
        self.linear_2 = nnx.Linear(4 * self.channels, 4 * self.channels, rngs=rngs)

    def __call__(self, timesteps, dtype):
        half = self.channels // 2
        frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - self.shift))
        angles = timesteps.astype(jnp.float32)[:, None] * frequencies
        parts = (jnp.cos(angles), jnp.sin(angles)) if self.cosine_first else (jnp.sin(angles), jnp.cos(angles))
        return self.linear_2(jax.nn.silu(self.linear_1(jnp.concatenate(parts, axis=-1).astype(dtype))))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text and a GEGLU feed-forward network (arXiv:2002.05202; exact GELU)."""

    def __init__(self, channels, heads, config, rngs):
        self.norm1 = layer_norm(channels, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(channels, channels, heads, False, rngs)
        self.norm2 = layer_norm(channels, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(channels, config.cross_attention_dim, heads, False, rngs)
        self.norm3 = layer_norm(channels, epsilon=1e-5, rngs=rngs)
        gated = nnx.Dict(proj=nnx.Linear(channels, 8 * channels, rngs=rngs))
        linear = nnx.Linear(4 * channels, channels, rngs=rngs)
        self.ff = nnx.Dict(net=nnx.Dict({"0": gated, "2": linear}))  # "1" is a dropout in PyTorch

    def __call__(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        hidden, gate = jnp.split(self.ff.net["0"].proj(self.norm3(x)), 2, axis=-1)
        return x + self.ff.net["2"](hidden * jax.nn.gelu(gate, approximate=False))


class Transformer2DModel(nnx.Module):
    """A transformer over the pixels; its projections are convolutions in SD 1.x and linear layers in SD 2.x."""

    def __init__(self, channels, heads, config, rngs):
        linear = functools.partial(nnx.Linear, channels, channels, rngs=rngs)
        projection = linear if config.use_linear_projection else lambda: convolution(channels, channels, 1, rngs)
        self.norm = group_norm(channels, config.norm_num_groups, epsilon=1e-6, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List([BasicTransformerBlock(channels, heads, config, rngs)])
        self.proj_out = projection()

    def __call__(self, x, context):
        hidden = self.proj_in(self.norm(x))
        hidden = self.transformer_blocks[0](hidden.reshape(x.shape[0], -1, x.shape[-1]), context)
        return x + self.proj_out(hidden.reshape(x.shape))


class UNetBlock(nnx.Module):
    """A level of the UNet: residual blocks, each followed by attention as long as there is any, then resampling. pairs:
    channels before and after each residual block."""

    def __init__(self, pairs, heads, attentions, config, rngs, halves=False, doubles=False):
        channels = pairs[-1][1]
        time_channels = 4 * config.block_out_channels[0]
        self.resnets = nnx.List([ResnetBlock2D(*pair, time_channels, config, config.norm_eps, rngs) for pair in pairs])
        self.attentions = nnx.List([Transformer2DModel(channels, heads, config, rngs) for _ in range(attentions)])
        self.downsamplers = resamplers(channels, halves, rngs, strides=2)
        self.upsamplers = resamplers(channels, doubles, rngs)

    def __call__(self, x, time_embedding, context, skips=None, like=None):
        """The outputs of all layers. skips: skip connections, for an up block; like: has the sides to upsample to."""
        outputs = []
        for k, resnet in enumerate(self.resnets):
            x = resnet(x if skips is None else jnp.concatenate([x, skips[k]], axis=-1), time_embedding)
            x = self.attentions[k](x, context) if k < len(self.attentions) else x
            outputs.append(x)
        outputs += [sampler.conv(x) for sampler in self.downsamplers]
        return outputs + [sampler.conv(upsample(x, like)) for sampler in self.upsamplers]


class UNet2DConditionModel(nnx.Module):
    """The UNet of Stable Diffusion 1.x and 2.x: noisy latents, timesteps (b,) and text states (b, n, d) to latents."""

    def __init__(self, config, rngs):
        channels = config.block_out_channels
        layers = config.layers_per_block
        last = len(channels) - 1
        heads = config.attention_head_dim  # misnamed in the published configurations: the number of heads
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        self.conv_in = convolution(config.in_channels, channels[0], 3, rngs)
        self.time_embedding = TimestepEmbedding(config, rngs)
        self.down_blocks = nnx.List([])
        skips = [channels[0]]
        for k, (size, kind) in enumerate(zip(channels, config.down_block_types, strict=True)):
            pairs = list(itertools.pairwise([skips[-1]] + [size] * layers))
            attentions = layers if kind.startswith("CrossAttn") else 0
            self.down_blocks.append(UNetBlock(pairs, heads[k], attentions, config, rngs, halves=k < last))
            skips += [size] * (layers + (k < last))
        self.mid_block = UNetBlock([(channels[-1], channels[-1])] * 2, heads[-1], 1, config, rngs)
        self.up_blocks = nnx.List([])
        below = channels[-1]
        for k, kind in enumerate(config.up_block_types):
            size = channels[last - k]
            attentions = layers + 1 if kind.startswith("CrossAttn") else 0
            pairs = [(skips.pop() + (size if layer else below), size) for layer in range(layers + 1)]
            self.up_blocks.append(UNetBlock(pairs, heads[last - k], attentions, config, rngs, doubles=k < last))
            below = size
        self.conv_norm_out = group_norm(channels[0], config.norm_num_groups, epsilon=config.norm_eps, rngs=rngs)
        self.conv_out = convolution(channels[0], config.out_channels, 3, rngs)

    def __call__(self, x, timesteps, context, rematerialise=False):
        """rematerialise: store only the outputs of blocks, and recompute the rest for the gradient."""
        call = nnx.remat(UNetBlock.__call__) if rematerialise else UNetBlock.__call__
        time_embedding = self.time_embedding(timesteps, x.dtype)
        skips = [self.conv_in(x)]
        for block in self.down_blocks:
            skips += call(block, skips[-1], time_embedding, context)
        x = call(self.mid_block, skips[-1], time_embedding, context)[-1]
        for block in self.up_blocks:
            used = [skips.pop() for _ in block.resnets]
            x = call(block, x, time_embedding, context, used, skips[-1] if skips else None)[-1]
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


# Sampling -------------------------------------------------------------------------------------------------------------
def predicted_clean(prediction_type, prediction, noisy, alphas_cumprod):
    """The x_0 that a prediction implies, given x_t. Finite for ᾱ > 0, with v and x_0 for ᾱ = 0 too."""
    if prediction_type == "epsilon":
        return (noisy - (1 - alphas_cumprod) ** 0.5 * prediction) / alphas_cumprod**0.5
    if prediction_type == "v_prediction":
        return alphas_cumprod**0.5 * noisy - (1 - alphas_cumprod) ** 0.5 * prediction
    return prediction


def ddim_steps(config, alphas_cumprod, number):
    """The timesteps of `number` steps of DDIM, largest first, and ᾱ before and after each: three arrays (number,). The
    scheduler's `config` (dict) says how timesteps are spaced (arXiv:2305.08891, table 2)."""
    total = len(alphas_cumprod)
    # With zero terminal SNR only the last timestep has no signal, and sampling has to start there.
    spacing = "trailing" if config.get("rescale_betas_zero_snr") else config.get("timestep_spacing", "leading")
    if spacing == "leading":
        timesteps = np.arange(number)[::-1] * (total // number) + config.get("steps_offset", 0)
    elif spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / number)).astype(int) - 1
    else:
        timesteps = np.linspace(0, total - 1, number).round().astype(int)[::-1]
    timesteps = timesteps.clip(0, total - 1)
    last = 1.0 if config.get("set_alpha_to_one", True) else alphas_cumprod[0]
    before = timesteps - total // number
    after = np.where(before >= 0, alphas_cumprod[before.clip(0)], last)
    return timesteps, alphas_cumprod[timesteps], after.astype(np.float32)


def sample(params, frozen, input_ids, latents, models, steps, prediction_type, dtype, guidance_scale=7.5):
    """Images (b, height, width, 3), uint8, of input_ids (2, b, n), those of prompts and of empty ones, and of noise: by
    DDIM (arXiv:2010.02502, eq. 12, η = 0) with classifier-free guidance (arXiv:2207.12598). steps: of `ddim_steps`."""
    unet = models["unet"].module(gather_weights(params, dtype))
    vae, text_encoder = (models[part].module(frozen[part]) for part in FROZEN)
    encoder_hidden_states = jnp.concatenate([text_encoder(input_ids[1]), text_encoder(input_ids[0])])

    def step(latents, values):
        timestep, alpha, alpha_after = values
        inputs = jnp.concatenate([latents, latents]).astype(dtype)
        predictions = unet(inputs, jnp.repeat(timestep, len(inputs)), encoder_hidden_states).astype(jnp.float32)
        unconditional, conditional = jnp.split(predictions, 2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        clean = predicted_clean(prediction_type, prediction, latents, alpha)
        return add_noise(clean, predicted_noise(prediction_type, prediction, latents, alpha), alpha_after), None

    latents, _ = jax.lax.scan(step, latents, tuple(map(jnp.asarray, steps)))
    images = vae.decode((latents / models["vae"].config.scaling_factor).astype(dtype)).astype(jnp.float32)
    return jnp.round((images / 2 + 0.5).clip(0, 1) * 255).astype(jnp.uint8)


def make_sampler(models, scheduler_config, prediction_type, number, dtype):
    """`sample` in `number` steps of DDIM, jitted: a function of (params, frozen, input_ids, latents)."""
    steps = ddim_steps(scheduler_config, training_alphas_cumprod(scheduler_config), number)
    return jax.jit(functools.partial(sample, models=models, steps=steps, prediction_type=prediction_type, dtype=dtype))


def sample_prompts(sampler, prompts, tokenizer, latents_shape, seed, mesh):
    """A `PIL.Image` of each prompt by sampler(input_ids, latents), from the same noise. Called by every process."""
    images = []
    devices = mesh.devices.size
    for first in range(0, len(prompts), devices):  # one per device at a time
        part = [*prompts[first : first + devices]]
        part += [""] * (devices - len(part))
        input_ids = np.stack([tokenize_captions(texts, tokenizer)["input_ids"] for texts in (part, [""] * devices)])
        generators = (random_generator(seed, 2, first + k) for k in range(devices))
        latents = np.stack([rng.standard_normal(latents_shape, dtype=np.float32) for rng in generators])
        inputs = (place(input_ids, mesh, PartitionSpec(None, "data")), place(latents, mesh, PartitionSpec("data")))
        pixels = multihost_utils.process_allgather(sampler(*inputs), tiled=True)
        images += [PIL.Image.fromarray(image) for image in pixels]
    return images[: len(prompts)]


def generate(args):
    """Generate a picture of --generate with the pipeline, and write it as a new PNG file to the current folder."""
    mesh = device_mesh(jax.devices())
    dtype = compute_type(args)
    _, _, scheduler_config, tokenizer, models, weights = load_pipeline(args)
    latents_shape = check_architecture(models, tokenizer, args.resolution)
    prediction_type = args.prediction_type or scheduler_config.get("prediction_type", "epsilon")
    check_objective(prediction_type, training_alphas_cumprod(scheduler_config))
    placed = on_devices(weights, mesh, dtype)
    sampler = make_sampler(models, scheduler_config, prediction_type, 50, dtype)
    sampler = functools.partial(sampler, placed["unet"], placed)
    (image,) = sample_prompts(sampler, [args.generate], tokenizer, latents_shape, args.seed, mesh)
    if jax.process_index() == 0:
        names = (f"{file_name(args.generate)}-seed-{args.seed}{suffix}.png" for suffix in ("", *range(-2, -1000, -1)))
        path = next(Path(name) for name in names if not Path(name).exists())
        with naming(f"{path} cannot be written"):
            image.save(path)
        logger.info(f"generated {path}")


def file_name(prompt):
    """A file name from a prompt (str): its letters, marks and digits, at most 150 bytes."""
    kept = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in prompt)
    return "-".join(kept.split()).encode()[:150].decode(errors="ignore") or "picture"


# Weight files ---------------------------------------------------------------------------------------------------------
class Model(NamedTuple):
    """A module apart from its weights, which are a flat dict of arrays by their names in PyTorch checkpoints."""

    config: SimpleNamespace
    graphdef: nnx.GraphDef
    paths: dict  # {name in PyTorch checkpoints: path in the module}
    shapes: dict  # {name: shape in the module}

    def module(self, weights):
        flat = {self.paths[name]: nnx.Param(value) for name, value in weights.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def make_model(module_class, config):
    """The `Model` of `module_class` for `config` (SimpleNamespace); allocates no weights."""
    rngs = SimpleNamespace(params=lambda: jax.random.key(0))  # nnx.Rngs would take seconds for SD's UNet
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module_class(config, rngs)))
    flat = list(nnx.to_flat_state(state))  # paths end with Flax's names: kernel, scale, embedding or bias
    names = [".".join([*map(str, path[:-1]), "bias" if path[-1] == "bias" else "weight"]) for path, _ in flat]
    paths = dict(zip(names, (path for path, _ in flat), strict=True))
    shapes = dict(zip(names, (variable.shape for _, variable in flat), strict=True))
    return Model(config, graphdef, paths, shapes)


def gather_weights(weights, dtype):
    """Cast the weights to `dtype` and replicate them on all devices, however they are stored: only the batch is
    sharded, as cuDNN's attention needs. For use inside jit."""
    whole = NamedSharding(device_mesh(jax.devices()), PartitionSpec())
    return {name: jax.lax.with_sharding_constraint(value.astype(dtype), whole) for name, value in weights.items()}


def flax_path_of(path):
    """The place of a weight in diffusers' Flax checkpoints, a tuple: indices are part of a name, but not in CLIP."""
    name = ".".join(map(str, path))
    if path[0] in ("encoder", "decoder") and "attentions" in path:
        for older, newer in VAE_ATTENTION.items():
            name = name.replace(f".{newer}.", f".{older}.")
    return tuple((name if path[0] == "text_model" else re.sub(r"\.(\d+)", r"_\1", name)).split("."))


def to_module_layout(path, array):
    """From PyTorch's (out, in, height, width) to (height, width, in, out), and (out, in) to (in, out)."""
    axes = (2, 3, 1, 0) if array.ndim == 4 else (1, 0)
    return array.transpose(axes) if path[-1] == "kernel" else array


def to_checkpoint_layout(path, array):
    """The inverse of `to_module_layout`."""
    axes = (3, 2, 0, 1) if array.ndim == 4 else (1, 0)
    return array.transpose(axes) if path[-1] == "kernel" else array


PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
# Names of weight files: the stem of .safetensors, and Flax's.
FILE_NAMES = dict.fromkeys(("unet", "vae"), ("diffusion_pytorch_model", "diffusion_flax_model.msgpack"))
FILE_NAMES["text_encoder"] = ("model", "flax_model.msgpack")
# Names of layers in older checkpoints of the VAE, and in Flax's.
VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def weight_files(folder, variant):
    """The weight files in a model's folder (Paths): safetensors, one or several, or Flax's msgpack. Raises RunError."""
    stem, flax_name = FILE_NAMES[folder.name]
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    names = [f"{stem}{suffix}.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif not variant and (folder / flax_name).is_file() and not (folder / names[0]).is_file():
        names = [flax_name]
    missing = ", ".join(name for name in names if not (folder / name).is_file())
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".msgpack"))
    if missing:
        pickles = "files that are not read; .bin files are not loaded; if you trust them, with PyTorch: "
        pickles += "DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)"
        only = f"{', '.join(others)}; is another --variant meant?" if others else pickles
        raise RunError(f"{folder}: {missing} is missing, only {only}")
    return [folder / name for name in names]


def read_weights(model, folder, variant):
    """A model's weights, {name: array in the module's layout, float32}, from files of any release. Raises RunError."""
    tensors = {}
    for file in weight_files(folder, variant):
        with naming(f"{file}: cannot be read"):
            if file.suffix == ".msgpack":
                tensors = traverse_util.flatten_dict(serialization.msgpack_restore(file.read_bytes()))
                places = {flax_path_of(path): name for name, path in model.paths.items()}
                tensors = {places.get(place, "/".join(place)): array for place, array in tensors.items()}
            else:
                for name, array in safetensors.numpy.load_file(file).items():
                    name = published_name(name, folder.name)
                    tensors[name] = to_module_layout(model.paths.get(name, ("",)), array)
    tensors.pop("text_model.embeddings.position_ids", None)  # saved by transformers before 4.31
    for what, names in (("missing", model.paths.keys() - tensors), ("unexpected", tensors.keys() - model.paths)):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise RunError(f"{folder}: {len(names)} tensors are {what}: {first}; is it Stable Diffusion's?")
    for name, array in tensors.items():
        if array.shape != model.shapes[name]:
            raise RunError(f"{folder}: {name} has shape {array.shape}, and config.json makes it {model.shapes[name]}")
    return {name: np.ascontiguousarray(tensors[name], np.float32) for name in model.paths}


def published_name(name, part):
    """The name of a tensor in most checkpoints, for one that an older or newer release has written."""
    if part == "text_encoder" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return re.sub(r"(?<=attentions\.0\.)(query|key|value|proj_attn)\b", lambda found: VAE_ATTENTION[found[0]], name)


# The fields of a configuration that say how a model is built, with the defaults of the libraries.
FIELDS = {
    "unet": {
        **{"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2},
        **{"cross_attention_dim": 1280, "attention_head_dim": 8, "use_linear_projection": False},
        **{"norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0},
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        **{"in_channels": 3, "out_channels": 3, "block_out_channels": [64], "layers_per_block": 1},
        **{"latent_channels": 4, "norm_num_groups": 32, "scaling_factor": 0.18215, "mid_block_add_attention": True},
    },
    "text_encoder": {
        **{"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12},
        **{"num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    },
}
# The values that further fields, or all elements of a list, have in Stable Diffusion 1.x and 2.x.
FIXED = {
    "unet": [
        ([None], "addition_embed_type class_embed_type cross_attention_norm encoder_hid_dim num_attention_heads"),
        ([None], "num_class_embeds time_cond_proj_dim timestep_post_act time_embedding_act_fn time_embedding_dim"),
        ([False], "center_input_sample dual_cross_attention only_cross_attention resnet_skip_time_act"),
        ([1], "downsample_padding mid_block_scale_factor resnet_out_scale_factor transformer_layers_per_block"),
        (["default"], "attention_type resnet_time_scale_shift"),
        (["positional"], "time_embedding_type"),
        (["silu"], "act_fn"),
        (["CrossAttnDownBlock2D", "DownBlock2D"], "down_block_types"),
        (["UNetMidBlock2DCrossAttn"], "mid_block_type"),
        (["CrossAttnUpBlock2D", "UpBlock2D"], "up_block_types"),
    ],
    "vae": [
        ([None], "latents_mean latents_std shift_factor"),
        ([True], "use_quant_conv use_post_quant_conv"),
        (["silu"], "act_fn"),
        (["DownEncoderBlock2D"], "down_block_types"),
        (["UpDecoderBlock2D"], "up_block_types"),
    ],
    "text_encoder": [(["quick_gelu", "gelu"], "hidden_act"), (["clip_text_model"], "model_type")],
}


def read_config(folder):
    """Read config.json of a model's folder as a SimpleNamespace of FIELDS. Raises RunError if FIXED is not met."""
    path = folder / "config.json"
    with naming(f"{path}"):
        config = json.loads(path.read_text())
    for allowed, field in ((allowed, field) for allowed, fields in FIXED[folder.name] for field in fields.split()):
        value = config.get(field, allowed[0])
        if not all(element in allowed for element in (value if isinstance(value, list) else [value])):
            choice = " or ".join(map(json.dumps, allowed))
            raise RunError(f"{path}: {field} is {json.dumps(value)}; in Stable Diffusion 1.x and 2.x it is {choice}")
    return SimpleNamespace(**{field: config.get(field, default) for field, default in FIELDS[folder.name].items()})


def load_pipeline(args):
    """The pipeline to start from: its folder and the UNet's, the scheduler's configuration (dict), the tokenizer,
    {part: `Model`} and {part: weights, float32}. Raises RunError."""
    folder = find_pipeline(args, args.revision)
    unet_folder = find_pipeline(args, args.non_ema_revision, "unet") if args.non_ema_revision else folder
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # on import, about models that are not used here
    from transformers import CLIPTokenizer

    with naming(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        if "beta_schedule" not in scheduler_config:  # flow matching, say
            raise RunError(f"{scheduler_config.get('_class_name')}: pipelines with this scheduler are not supported")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        folders = {"unet": unet_folder / "unet", "vae": folder / "vae", "text_encoder": folder / "text_encoder"}
        models = {part: make_model(PARTS[part], read_config(folders[part])) for part in PARTS}
        weights = {part: read_weights(models[part], folders[part], args.variant) for part in PARTS}
    return folder, unet_folder, scheduler_config, tokenizer, models, weights


def find_pipeline(args, revision, part="*"):
    """The local folder of a pipeline, or only of its sub-folder `part`; downloaded from a Hub id. Raises RunError."""
    path = args.pretrained_model_name_or_path
    name = f"--pretrained_model_name_or_path {path}"
    folder = Path(path)
    if folder.is_file():
        raise RunError(f"{name}: is a single file; convert it by from_single_file and save_pretrained")
    if path.startswith(("/", ".", "~")) and not folder.is_dir():
        raise RunError(f"{name}: there is no such folder")
    if not folder.is_dir():
        suffix = f".{args.variant}" if args.variant else ""
        kinds = (f"{suffix}.safetensors", f"{suffix}-0*-of-*.safetensors")
        wanted = [f"{part}/{stem}{kind}" for stem in ("model", "diffusion_pytorch_model") for kind in kinds]
        wanted += ["*.json", f"{part}/*.json", f"{part}/*.txt"] + ["safety_checker/model.safetensors"] * (part == "*")
        download = functools.partial(snapshot_download, path, revision=revision, cache_dir=args.cache_dir)
        with naming(name):
            folder = Path(download(allow_patterns=wanted))
            if not any((folder / "unet").glob("*.safetensors")):
                folder = Path(download(allow_patterns=[*wanted, f"{part}/*flax_model.msgpack"]))
    for needed in ("scheduler", "tokenizer", *PARTS) if part == "*" else [part]:
        if not (folder / needed).is_dir():
            raise RunError(f"{name}: has no {needed}/, which a pipeline of this kind needs")
    return folder


def result_index(folder, variant):
    """The result's model_index.json (dict): with PyTorch's class names, and no safety checker that it cannot load."""
    with naming("model_index.json"):
        index = json.loads((folder / "model_index.json").read_text())
    for part, entry in ((part, entry) for part, entry in index.items() if isinstance(entry, list)):
        if entry[0] not in (None, "diffusers", "transformers", "stable_diffusion"):
            raise RunError(f"model_index.json: {part} is of {entry[0]}; code in a model's folder is not used")
        index[part] = [name and name.removeprefix("Flax") for name in entry if (folder / part).is_dir()] or [None, None]
    names = ["model.safetensors", "pytorch_model.bin"] + [f"model.{variant}.safetensors"] * bool(variant)
    if not any((folder / "safety_checker" / name).is_file() for name in names):
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    return {**index, "_class_name": "StableDiffusionPipeline"}


def save_frozen_parts(args, folder, index, tokenizer, models, weights):
    """Write all of the result but what is trained, before the training, so that nothing can be missing after it."""
    output_dir = Path(args.output_dir)
    with naming(f"{output_dir} cannot be written"):
        for part, entry in index.items():
            if isinstance(entry, list) and entry[0] and part not in PARTS:
                code = shutil.ignore_patterns("*.py", "*.pyc", "__pycache__")  # not to be published with the result
                shutil.copytree(folder / part, output_dir / part, dirs_exist_ok=True, ignore=code)
                for path in (output_dir / part).glob(f"*.{args.variant}.safetensors") if args.variant else ():
                    path.rename(path.with_name(path.name.replace(f".{args.variant}.", ".")))
        if not (output_dir / "tokenizer" / "vocab.json").exists():  # of transformers 4: 5 saves tokenizer.json alone
            tokenizer.backend_tokenizer.model.save(str(output_dir / "tokenizer"))
        for part in FROZEN:
            save_model(args, folder / part, models[part], weights[part])


def save_model(args, source, model, weights):
    """Write a model to its folder in output_dir: the configuration in `source`, and weights in the module's layout."""
    folder = Path(args.output_dir) / source.name
    folder.mkdir(exist_ok=True)
    config = (source / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config.replace(b'"_class_name": "Flax', b'"_class_name": "'))
    stem, flax_name = FILE_NAMES[source.name]
    arrays = {name: np.ascontiguousarray(to_checkpoint_layout(model.paths[name], weights[name])) for name in weights}
    safetensors.numpy.save_file(arrays, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    if args.save_flax_weights:
        tree = traverse_util.unflatten_dict({flax_path_of(model.paths[name]): weights[name] for name in weights})
        (folder / flax_name).write_bytes(serialization.msgpack_serialize(tree))


def save_result(args, folder, unet_folder, index, model, params, prediction_type):
    """Write the trained UNet, and with it the index that makes output_dir a pipeline."""
    output_dir = Path(args.output_dir)
    with naming(f"{output_dir} cannot be written"):
        save_model(args, unet_folder / "unet", model, params)
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        name = scheduler.get("_class_name", "PNDMScheduler").removeprefix("Flax")
        scheduler |= {"_class_name": name, "prediction_type": prediction_type}  # sample as trained
        (output_dir / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        (output_dir / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        flush_to_disk(*output_dir.glob("*/*.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# The machinery
# ----------------------------------------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)
PIL.Image.MAX_IMAGE_PIXELS = 2**30  # Pillow's own limit, against decompression bombs, is 179 megapixels
warnings.filterwarnings("ignore", module="PIL|accelerate|datasets|diffusers|huggingface_hub|peft|transformers")
fsspec.get_filesystem_class("zip").cachable = True  # else the directory of an archive is read again for each image
FOR_TESTS = r"[/\\](test|testing|val|validation|dev|eval)(\.zip)?([/\\]|$)"  # folders and archives, of any case
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
CHUNK_ROWS = 1000  # mean number of rows in a file of encodings; a crash costs each process one such file
INITIAL_LOSS_SCALE = {"scale": np.float32(2.0**16), "finite_steps": np.int32(0)}  # as PyTorch's GradScaler


class RunError(Exception):
    """An error that the user can fix, as one line that names the flag, file or row. The script exits with status 1."""


def printable(text):
    """`text` on one line: line breaks, control and bidirectional characters are escaped as in JSON."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


@contextlib.contextmanager
def naming(what):
    """Re-raise any exception as a RunError: `what` (str), and one line of the exception and of its root cause."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # libraries raise exceptions of all kinds, and wrap the informative one
        root = error
        while cause := root.__cause__ or root.__context__:
            root = cause
        lines = [(str(part).strip() or type(part).__name__).splitlines()[0].rstrip(":.") for part in (error, root)]
        raise RunError(": ".join(dict.fromkeys([what, *lines]))) from error


# Data sets and the stream of examples ---------------------------------------------------------------------------------
def load_data(args, flags, batch_size):
    """[data set, maybe another for validation], rows of the first to train on, held-out rows of the last: indices."""
    sources = ["dataset_name" if args.dataset_name else "train_data_dir", "validation_data_dir"]
    parts = [load_rows(args, source, flags) for source in sources if getattr(args, source)]
    if args.max_train_samples:
        parts[0] = parts[0].select(random_generator(args.seed, 3).permutation(len(parts[0]))[: args.max_train_samples])
    if args.skip_bad_images or not args.cache_encodings:  # else the encoding names bad images
        parts = [part.select(on_first_process(readable_rows, args, part)) for part in parts]
    held_out, to_train = np.split(random_generator(args.seed, 5).permutation(len(parts[0])), [args.validation_rows])
    if args.validation_rows and len(to_train) < batch_size:
        raise RunError(f"--validation_rows {args.validation_rows}: of {len(parts[0])}, leaves no batch of {batch_size}")
    paths = (set(part.flatten()[f"{args.image_column}.path"][:]) for part in parts)
    if args.validation_data_dir and any(os.path.isabs((p or "").rpartition("::")[2]) for p in set.intersection(*paths)):
        raise RunError(f"--validation_data_dir {args.validation_data_dir}: holds images to train on")
    return parts, np.sort(to_train), range(len(parts[1])) if args.validation_data_dir else held_out


def load_rows(args, source_flag, flags):
    """Load the columns of the training split that `flags` name, images undecoded. Raises RunError."""
    source = getattr(args, source_flag)
    columns = [getattr(args, flag) for flag in flags]
    is_folder = source_flag != "dataset_name"
    if is_folder and not any(Path(source).glob("*")):
        raise RunError(f"--{source_flag} {source}: there is no such folder, or it is empty")
    with naming(f"--{source_flag} {source}"):
        if any(Path(source, name).is_file() for name in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(source)
        else:
            hub = {"path": source, "name": args.dataset_config_name, "data_dir": args.train_data_dir, "split": "train"}
            in_folder = {"path": "imagefolder", "data_files": {"train": os.path.join(glob.escape(source), "**")}}
            dataset = datasets.load_dataset(cache_dir=args.cache_dir, **(in_folder if is_folder else hub))
        dataset = dataset["train"] if isinstance(dataset, dict) else dataset
    found = dataset.column_names
    for flag, column in zip(flags, columns, strict=True):
        if column not in dataset.column_names:
            raise RunError(f"--{flag} {column}: no such column in {source}, {found}; for captions see check_data.py")
        feature = dataset.features[column]
        is_list = isinstance(feature, datasets.List)
        with naming(f"--{flag} {column}: holds {feature}, which cannot be used"):
            if flag == "image_column":
                dataset = place_images(dataset, columns, source, is_folder)
            elif getattr(feature.feature if is_list else feature, "dtype", None) not in ("string", "large_string"):
                text = dataclasses.replace(feature.feature if is_list else feature, dtype="string")  # of numbers
                dataset = dataset.cast_column(column, dataclasses.replace(feature, feature=text) if is_list else text)
        values = dataset.data.column(column)
        empty = [not row or None in row for row in values.to_pylist()] if is_list else values.is_null().to_pylist()
        if True in empty:
            path = (dataset[empty.index(True)][args.image_column] or {}).get("path") or "unnamed"
            raise RunError(f"--{flag} {column}: row {empty.index(True)} is empty, of {path}; .csv loses None and n/a")
    return dataset


def place_images(dataset, columns, source, is_folder):
    """Undecoded images by their paths on disk, those for tests left out; .txt files beside them if without metadata."""
    folder = os.path.abspath(source)
    column = columns[0]
    found = dataset.column_names
    dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
    dataset = dataset.cast_column(column, datasets.Image(decode=False))
    contents, named = dataset.data.column(column).flatten()
    if contents.null_count < len(contents):  # inside the data set's own files
        return dataset
    endings = tuple(datasets.packaged_modules.imagefolder.ImageFolder.EXTENSIONS)
    files = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
    archives = [f"zip://::{path}" for path in files if path.lower().endswith(".zip")]
    files += datasets.utils.file_utils.FilesIterable.from_urlpaths(archives)
    images = [path for path in files if path.partition("::")[0].lower().endswith(endings)]
    on_disk = {unicodedata.normalize("NFC", path): path for path in images} | {path: path for path in images}
    paths = [path if "://" in path else os.path.join(folder, path) for path in named.fill_null("").to_pylist()]
    paths = [on_disk.get(path, on_disk.get(unicodedata.normalize("NFC", path), path)) for path in paths]
    if paths != named.to_pylist():
        dataset = datasets.Dataset.from_dict(dataset.to_dict() | {column: paths}, dataset.features)
    if columns[1:] and set(found) <= {"image", "label"}:  # no metadata
        captions = [read_caption(path) for path in paths]
        dataset = dataset.add_column(columns[1], captions) if any(captions) else dataset
    left_out = r"\.(txt|json)::" + f"|{FOR_TESTS}" * is_folder  # files of an archive that are no images
    rows = [row for row, path in enumerate(paths) if not re.search(left_out, path.replace(folder, ""), re.IGNORECASE)]
    if others := sorted(set(images).difference(paths[row] for row in rows)):
        logger.warning(f"left out {len(others)} images, for tests or without metadata: {', '.join(others[:3])} ...")
    return dataset.select(rows).flatten_indices() if len(rows) < len(paths) else dataset


def read_caption(path):
    """The text of the .txt file beside an image, or None. Raises RunError."""
    text = datasets.utils.file_utils.xPath(path).with_suffix(".txt")
    try:
        return text.read_bytes().decode("utf-8-sig") if text.exists() else None
    except ValueError as error:
        raise RunError(f"{text} is not UTF-8: {error}") from error


def readable_rows(args, dataset):
    """The indices of the rows to use. Reads the first 1,000 images; with --skip_bad_images all. Raises RunError."""

    def problem(row):
        try:
            read_image(dataset[row][args.image_column])
        except RunError as error:
            return f"row {row}: {error}"

    last = len(dataset) if args.skip_bad_images else min(1000, len(dataset))
    with ThreadPool() as pool:  # Pillow decodes without the GIL
        problems = list(progress_bar(last, "image", pool.imap(problem, range(last), 100), desc="reading", leave=False))
    for message in filter(None, problems):
        if not args.skip_bad_images:
            raise RunError(f"{message}; --skip_bad_images skips such images")
        logger.warning(f"skipped: {message}")
    if all(problems):
        raise RunError("no images are left to train on")
    return [row for row in range(len(dataset)) if row >= last or not problems[row]]


def read_image(value, row="(unnamed)"):
    """Decode {"bytes": bytes or None, "path": str or None} to an upright RGB `PIL.Image` on white. Raises RunError."""
    try:
        image = PIL.ImageOps.exif_transpose(datasets.Image().decode_example(value))
        if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to 255
            image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.mode == "F":  # floats are taken as 0 to 1
            image = PIL.Image.fromarray((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for bad files
        reason = str(error).partition(", could be")[0]  # without Pillow's remark on decompression bombs
        raise RunError(f"image {value['path'] or row} cannot be read: {reason}") from error


def random_generator(seed, *key):
    """The `np.random.Generator` of `key` (ints) in the run of `seed`. SeedSequence mixes all bits of all numbers."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@functools.lru_cache(maxsize=2)  # a batch spans one or two epochs, rarely more
def permutation(seed, epoch, length):
    """The order of `length` rows in `epoch`, int64 (length,)."""
    return random_generator(seed, 0, epoch).permutation(length)


@dataclasses.dataclass
class ExampleStream:
    """All examples of a run, by position: position k is a row and its randomness, functions of the seed and k alone."""

    rows: datasets.Dataset
    preprocess: functools.partial  # (row, np.random.Generator) to a dict of tensors
    seed: int

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.rows))
        row = int(permutation(self.seed, epoch, len(self.rows))[place])
        try:
            return self.preprocess(self.rows[row], random_generator(self.seed, 1, position))
        except RunError as error:
            raise RunError(f"row {row}: {error}") from error


def read_ahead(args, stream, positions):
    """Yield micro-batches of an `ExampleStream`, dicts of arrays sharded over all devices; the last one is full, too.
    Threads read this process's share, up to two each ahead. "positions" are high and low halves, (n, 2) of uint32: JAX
    lacks 64 bits."""
    threads = args.dataloader_num_workers
    if not threads:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = 1 if jax.default_backend() == "cpu" else min(16, cores)
    own = args.train_batch_size * jax.local_device_count()

    def read(first):
        numbers = first + own * jax.process_index() + np.arange(own)
        examples = [stream[int(position)] for position in numbers]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        return {**batch, "positions": np.stack([numbers >> 32, numbers & 0xFFFFFFFF], axis=1).astype(np.uint32)}

    sharding = NamedSharding(device_mesh(jax.devices()), PartitionSpec("data"))
    executor = ThreadPoolExecutor(threads)
    submitted = (executor.submit(read, first) for first in positions[:: own * jax.process_count()])
    waiting = list(itertools.islice(submitted, 2 * threads))
    try:
        while waiting:
            waiting += itertools.islice(submitted, 1)
            yield jax.make_array_from_process_local_data(sharding, waiting.pop(0).result())
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


# Cached encodings -----------------------------------------------------------------------------------------------------
def cached_encodings(args, dataset, settings, weights, encode):
    """The rows {"encodings": bytes} of `dataset`, memory-mapped from --cache_encodings; encodes missing ones. To be
    called by every process: an error or a signal in one stops all."""
    chunks = on_first_process(list_chunks, args, dataset, settings, weights)
    missing = on_first_process(lambda: [chunk for chunk in chunks if not os.path.exists(chunk[0])])
    own = missing[jax.process_index() :: jax.process_count()]

    def encode_batch(batch):
        if noted:
            sys.exit(128 + noted[0][0])
        rows = dataset[batch["row"]]
        rows[args.image_column] = threads.starmap(read_image, zip(rows[args.image_column], batch["row"], strict=True))
        encodings = encode(rows, threads)
        bar.update(len(encodings))
        return {"encodings": encodings}

    def encode_chunk(path, first, last):
        with naming(f"--cache_encodings: rows {first} to {last - 1} cannot be encoded to {path}"):
            numbers = datasets.Dataset.from_dict({"row": range(first, last)})
            numbers.map(encode_batch, cache_file_name=path, new_fingerprint=Path(path).stem, **options)
        if noted:  # in the last batch
            sys.exit(128 + noted[0][0])

    options = {"batched": True, "batch_size": args.train_batch_size * jax.local_device_count()}
    options |= {"remove_columns": "row", "writer_batch_size": 100}
    bar = progress_bar(sum(chunk[2] - chunk[1] for chunk in own), "image", desc="encoding", disable=not own)
    with noted_signals() as noted, ThreadPool() as threads, bar:
        for turn in range(math.ceil(len(missing) / jax.process_count())):
            try:
                on_all_processes(lambda turn=turn: [encode_chunk(*chunk) for chunk in own[turn : turn + 1]])
            except SystemExit as stop:
                name = signal.Signals(stop.code - 128).name
                logger.warning(f"stopped by {name} while encoding; the same command resumes")
                raise
    with naming(f"--cache_encodings {args.cache_encodings}"):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path, *_ in chunks])


def list_chunks(args, dataset, settings, weights):
    """[(file of encodings, its first row, the row after its last)]. Its path is a digest of all that determines it."""
    digest = hashlib.sha256(json.dumps(settings, default=str).encode())
    for array in jax.tree.leaves([weights[part] for part in FROZEN]):
        digest.update(array)
    folder = Path(args.cache_encodings) / digest.hexdigest()[:16]
    with naming(f"--cache_encodings {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("tmp*"):  # the remains of a crash, unless another run is writing it
            if path.stat().st_mtime < time.time() - 86_400:
                path.unlink(missing_ok=True)
        digests = row_digests(args, dataset)
    # The row's own digest decides whether a chunk starts there: a row that is new or changed affects only its chunk.
    starts = [row for row, digest in enumerate(digests) if row == 0 or int.from_bytes(digest) % CHUNK_ROWS == 0]
    chunks = list(itertools.pairwise([*starts, len(dataset)]))
    names = [hashlib.sha256(b"".join(digests[first:last])).hexdigest()[:32] for first, last in chunks]
    return [(str(folder / f"{name}.arrow"), *chunk) for name, chunk in zip(names, chunks, strict=True)]


def row_digests(args, dataset):
    """A digest (bytes) per row, which changes with its image or captions, and not if the data's folder moves."""
    if dataset[0][args.image_column]["bytes"] is not None:  # images inside the data set's own files
        return [dataset._fingerprint.encode() + row.to_bytes(8) for row in range(len(dataset))]

    def row_digest(image, *captions):
        name, _, path = image["path"].rpartition("::")  # in an archive
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            places = (0, stat.st_size // 2, max(0, stat.st_size - 4096))
            samples = [(file.seek(place), file.read(4096)) for place in places]
        facts = [name or os.path.basename(path), stat.st_size, stat.st_mtime_ns, captions, samples]
        return hashlib.sha256(repr(facts).encode()).digest()

    with ThreadPool(16) as threads:  # to hide the latency of a network disk
        batches = (zip(*rows.values(), strict=True) for rows in dataset.iter(10_000))
        return [digest for batch in batches for digest in threads.starmap(row_digest, batch)]


def make_encoder(args, models, weights):
    """A function of ("pixel_values" or "input_ids", array of any length) that calls `encode` on local devices."""
    mesh = device_mesh(jax.local_devices())
    dtype = compute_type(args)
    frozen = on_devices({part: weights[part] for part in FROZEN}, mesh, dtype)
    compiled = jax.jit(functools.partial(encode, models=models, dtype=dtype))
    size = args.train_batch_size * mesh.size

    def encoder(name, array):
        padded = np.pad(array, [(0, -len(array) % size)] + [(0, 0)] * (array.ndim - 1))  # one shape: compiled once
        pieces = jax.device_put(np.split(padded, len(padded) // size), NamedSharding(mesh, PartitionSpec("data")))
        encodings = [compiled({name: piece}, frozen) for piece in pieces]
        return np.concatenate(jax.tree.leaves(jax.device_get(encodings)))[: len(array)]

    return encoder


# Checkpoints ----------------------------------------------------------------------------------------------------------
def list_checkpoints(output_dir):
    """The complete checkpoints in `output_dir` as [(step, Path)], oldest first."""
    steps = [(path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in steps if step.isdecimal() and path.is_dir())


def find_start(args):
    """Where the run starts: a checkpoint and its state, or None and that of step 0. To be called by every process."""
    output_dir = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    found = [path for _, path in reversed(list_checkpoints(output_dir))]
    earlier_run = bool(found) or (output_dir / "model_index.json").exists()
    if earlier_run and not wanted:
        raise RunError(f"--output_dir {output_dir}: holds an earlier run; --resume_from_checkpoint or another folder")
    if wanted and wanted != "latest":
        named = output_dir / f"checkpoint-{Path(wanted).name.removeprefix('checkpoint-')}"
        found = [Path(wanted) if Path(wanted).is_dir() else named]
    complete = ((path, state) for path in found if (state := read_checkpoint(path)))
    checkpoint, state = next(complete, (None, {"step": 0, "examples_seen": 0}))
    if wanted and not checkpoint and (earlier_run or wanted != "latest"):
        raise RunError(f"--resume_from_checkpoint {wanted}: there is no complete checkpoint in {output_dir}")
    if checkpoint and "architecture" not in state:
        raise RunError(f"--resume_from_checkpoint {checkpoint}: was written by a PyTorch script")
    if len(set(gather_values(state["step"]))) > 1:
        raise RunError(f"--output_dir {output_dir}: must be on a disk that all processes share")
    if checkpoint:
        check_flags(args, checkpoint, state["arguments"], recorded_arguments(args, args.seed))
    return checkpoint, state


def check_flags(args, checkpoint, before, now):
    """Log the flags that have changed since a checkpoint. Raises RunError if one of them cannot. before, now: dicts."""
    names = [name for name in sorted({*before, *now} - {"resume_from_checkpoint"}) if before.get(name) != now.get(name)]
    changes = {name: f"--{name} {now.get(name)} (was {before.get(name)})" for name in names}
    logger.info(f"resuming from {checkpoint}; changed: {', '.join(changes.values()) or 'nothing'}")
    fixed = ["rank", "lora_alpha", "lora_target_modules", "use_8bit_adam"] + (["use_ema"] if args.use_ema else [])
    if refused := [changes[name] for name in fixed if name in changes]:
        raise RunError(f"{checkpoint}: cannot resume with {', '.join(refused)}")


def read_checkpoint(checkpoint):
    """The state in a checkpoint (dict), or None and a warning if it is not complete."""
    try:
        state = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (checkpoint / name).stat().st_size != size:
                raise ValueError(f"{name} is not {size} bytes long")
        return state
    except (OSError, ValueError, KeyError) as error:
        hint = "; it is of diffusers' script: start from its weights" * (checkpoint / "random_states_0.pkl").exists()
        logger.warning(f"{checkpoint}: not a complete checkpoint of this script: {error}{hint}")


def check_resume(args, checkpoint, before, run):
    """Warn of what the result depends on and is not as in the checkpoint's state `before`. Raises RunError."""
    for key in (key for key in run if before[key] != run[key]):
        was = f"{key.replace('_', ' ')} was {before[key]} at {checkpoint} and is {run[key]}"
        if args.validation_rows and key in ("seed", "rows"):
            raise RunError(f"{was}; --validation_rows would hold out rows that were trained on")
        logger.warning(f"{was}; the result will differ from that of an uninterrupted run")


class CheckpointWriter:
    """Writes checkpoint-<step> atomically and in the background, then prunes older ones. To be used by every process.
    (Orbax's CheckpointManager deletes old ones in place: a crash leaves half of one under its final name.)"""

    def __init__(self, args):
        options = ocp.options.AsyncOptions(post_finalization_callback=self.complete)
        self.checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self.args = args
        self.state = self.path = None  # of the checkpoint that is being written

    def save(self, train_state, state):
        """Start to write a tree of arrays, which may be donated as soon as this returns. Raises RunError."""
        self.finish()
        self.state = state
        self.path = Path(self.args.output_dir).absolute() / f"checkpoint-{state['step']}"
        with naming(f"{self.path} cannot be written"):
            self.checkpointer.save(self.path, ocp.args.Composite(train_state=ocp.args.StandardSave(train_state)))

    def complete(self):
        """Write the state and flush. Called on the first process by a thread of Orbax, right before the renaming."""
        (partial,) = self.path.parent.glob(f"{self.path.name}.orbax-checkpoint-tmp*")
        files = (path for path in partial.glob("train_state/**/*") if path.is_file())
        files = {str(path.relative_to(partial)): path.stat().st_size for path in files}
        contents = {**self.state, "arguments": recorded_arguments(self.args, self.state["seed"]), "files": files}
        (partial / "training_state.json").write_text(json.dumps(contents, indent=2), encoding="utf-8")
        flush_to_disk(*partial.rglob("*"), partial)

    def finish(self, wait=True):
        """Wait until the checkpoint is written, or only look, then prune older ones. Raises RunError if it failed."""
        if not self.path:
            return
        with naming(f"{self.path} cannot be written"):
            self.checkpointer.check_for_errors()
            if not wait and not self.path.is_dir():
                return
            self.checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                flush_to_disk(self.path.parent)
                older = list_checkpoints(self.path.parent)[: -(self.args.checkpoints_total_limit or sys.maxsize)]
                for path in (path for step, path in older if step not in [e["step"] for e in self.state["best"]]):
                    shutil.rmtree(path.rename(path.with_name(path.name + ".partial")))  # a crash leaves no half of one
        logger.info(f"saved {self.path}")
        self.path = None

    def close(self):
        with contextlib.suppress(Exception):  # it has been raised before
            self.checkpointer.close()
        if self.path and jax.process_index() == 0:
            for partial in self.path.parent.glob(f"{self.path.name}.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)  # what a failed save leaves


def flush_to_disk(*paths):
    """Flush files and folders to disk. Files get the umask's permissions: safetensors creates them as 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        if path.is_file():
            path.chmod(0o666 & ~umask)
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # Windows opens no folders
            descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # and flushes for writers only
            os.fsync(descriptor)
            os.close(descriptor)


def check_output_dir(args, *models):
    """Raise RunError if --output_dir is not writable, or if the run would overwrite the user's files there."""
    folder = Path(args.output_dir).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    data = [Path(path) for path in (args.train_data_dir, args.validation_data_dir, args.dataset_name) if path]
    problems = {
        "is empty": not args.output_dir,
        "is the model to start from": folder in [Path(model).resolve() for model in models],
        "holds the training images": any(path.exists() and path.resolve().is_relative_to(folder) for path in data),
        "has a README.md of something else": (folder / "README.md").exists() > (folder / "model_index.json").exists(),
        "--logging_dir is a file": (folder / args.logging_dir).is_file(),
        f"{existing} cannot be written to": not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)),
    }
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise RunError(f"--output_dir {args.output_dir}: {found[0]}; name another folder")


def prepare_output_dir(args, first_step, last_step):
    """Create --output_dir, delete the remains of a crash, and set aside checkpoints that the run will write again."""
    output_dir = Path(args.output_dir)
    with naming(f"--output_dir {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in (*output_dir.glob("checkpoint-*.partial"), *output_dir.glob("checkpoint-*.orbax-checkpoint-tmp*")):
            shutil.rmtree(path)
        for step, folder in list_checkpoints(output_dir):
            if first_step < step and first_step < last_step:
                aside = folder.rename(output_dir / f"set-aside-{time.time():.0f}-{folder.name}")
                logger.info(f"{folder} is later than the checkpoint to resume from; moved to {aside}")


# Processes and signals ------------------------------------------------------------------------------------------------
@functools.cache  # once per process, however often `main` is called
def connect_hosts():
    """Join the other processes, named by the environment or found by JAX (TPU, Slurm, MPI ...). Raises RunError."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ[name] for name in names if name in os.environ]
    if len(given) in (1, 2):
        raise RunError(f"{', '.join(names)}: give all three, or none")
    try:
        places = (given[0], int(given[1]), int(given[2])) if given else ()
        jax.distributed.initialize(*places, shutdown_timeout_seconds=15)
    except (ValueError, RuntimeError) as error:  # no cluster was found, or JAX was in use before
        if given or (isinstance(error, ValueError) and "coordinator_address" not in str(error)):
            raise RunError(f"JAX cannot connect to the other processes: {str(error).splitlines()[0]}") from error
    with naming("JAX finds no device"):
        jax.devices()


def set_up_logging():
    """Let the first process log, the others only errors, and silence the libraries."""
    above_bar = logging.Handler()
    above_bar.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    above_bar.emit = lambda record: tqdm.write(printable(above_bar.format(record)), file=sys.stderr)
    logger.handlers = [above_bar]
    logger.propagate = False
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
    datasets.disable_progress_bars()
    if not sys.stderr.isatty():
        disable_progress_bars()  # of the Hub
    datasets.utils.logging.set_verbosity(max(logger.level, logging.WARNING))
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs every error that it raises, over pages
    # Of writes that fail, Orbax raises the first; asyncio would report the others one by one, also after its end.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda raised: "loop is closed" in str(raised.exc_value) or sys.__unraisablehook__(raised)


def gather_values(value):
    """The values (JSON) of all processes, in every process. To be called by all."""
    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [json.loads(row.tobytes()) for row in texts.reshape(-1, longest)]


def on_all_processes(function):
    """Call the function on every process. What it raises on one, a RunError or a SystemExit, all raise."""
    failure = None
    try:
        function()
    except (RunError, SystemExit) as error:
        (failure,) = error.args
    for first in filter(None, gather_values(failure)):
        raise RunError(first) if isinstance(first, str) else SystemExit(first)


def on_first_process(function, *arguments):
    """Call the function on the first process only. Every process returns its result, or raises its RunError."""
    results = []
    on_all_processes(lambda: results.append(function(*arguments) if jax.process_index() == 0 else None))
    return gather_values(results[0])[0]


@contextlib.contextmanager
def noted_signals():
    """Within the block, stop signals are only recorded: (signal, time). One after more than a second exits at once."""
    noted = []

    def note(signum, _):
        noted.append((signum, time.monotonic()))
        if noted[-1][1] - noted[0][1] > 1:  # before, a launcher passes on what a terminal has sent to all
            os._exit(128 + signum)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it may set handlers
    with contextlib.ExitStack() as restore:
        for signum in STOP_SIGNALS if in_main_thread else ():
            restore.callback(signal.signal, signum, signal.signal(signum, note))  # which returns the handler before
        yield noted


def signal_agreement(mesh):
    """A function of the list of `noted_signals` that returns the same signal to stop for, or 0, in every process: what
    one of them had noted at the call before, which the devices have computed by then."""
    asked = np.int32(0)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def agreed(noted):
        nonlocal asked
        signum = noted[0][0] if noted else 0
        if jax.process_count() == 1:
            return signum
        answer = int(jax.device_get(asked))
        own = np.full(jax.local_device_count(), signum, np.int32)
        asked = largest(jax.make_array_from_process_local_data(sharding, own))
        return answer

    return agreed


def end_process(status):
    """Exit with `status`, whatever threads still run. Processes that failed together meet in `shutdown` first, so that
    each can say why; the others wait for this process, until it ends."""
    if jax.process_count() > 1:
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(timeout=5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# Devices and optimizer ------------------------------------------------------------------------------------------------
def compute_type(args):
    """The type of --mixed_precision to compute in. Raises RunError if the devices do not have it."""
    if args.mixed_precision == "fp16" and jax.default_backend() == "cpu":
        raise RunError("--mixed_precision fp16: needs a GPU, a CPU has bf16")
    return COMPUTE_TYPES[args.mixed_precision]


def device_mesh(devices):
    """A mesh of the devices (list of `jax.Device`) with one axis, "data"."""
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def place(array, mesh, spec=None):
    """Put an array that every process holds on the devices of the mesh, by default replicated."""
    sharding = NamedSharding(mesh, spec or PartitionSpec())
    return jax.make_array_from_process_local_data(sharding, np.asarray(array), np.shape(array))


def on_devices(weights, mesh, dtype):
    """Put a tree of NumPy arrays, as `dtype`, on every device of the mesh."""
    return jax.tree.map(lambda array: place(array.astype(dtype), mesh), weights)


def sharding_of(weight, mesh, shard):
    """The `NamedSharding` of a weight: replicated or, if `shard`, sharded along its longest axis that divides."""
    sides = [(size, -axis) for axis, size in enumerate(weight.shape) if shard and size % mesh.devices.size == 0]
    return NamedSharding(mesh, PartitionSpec(*[None] * -max(sides)[1], "data") if sides else PartitionSpec())


def make_schedule(args, peak, last_step):
    """The learning rate as a function of the number of earlier updates, as in PyTorch. Raises RunError."""
    if args.lr_scheduler == "polynomial" and peak <= 1e-7:
        raise RunError(f"--lr_scheduler polynomial: ends at a learning rate of 1e-7, {peak} is too low to start from")
    warmup = 0 if args.lr_scheduler == "constant" else args.lr_warmup_steps
    rest = max(1, last_step - warmup)
    course = {
        "constant": optax.constant_schedule(peak),
        "constant_with_warmup": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "cosine_with_restarts": optax.cosine_decay_schedule(peak, rest),  # with one cycle, which is the default
        "polynomial": optax.polynomial_schedule(peak, 1e-7, 1, rest),
    }[args.lr_scheduler]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), course], [warmup])


def make_optimizer_transform(args):
    """AdamW (arXiv:1711.05101) without the learning rate, an `optax.GradientTransformation`."""
    adam = optax.scale_by_adam(args.adam_beta1, args.adam_beta2, args.adam_epsilon)
    return optax.chain(adam, optax.add_decayed_weights(args.adam_weight_decay))


def initial_train_state(params, transform, flags):
    """Everything that an update changes, a tree of arrays, in a run of these flags (dict)."""
    state = {"params": params, "optimizer": transform.init(params)}
    if flags["use_ema"]:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if flags["mixed_precision"] == "fp16":
        state["loss_scale"] = jax.tree.map(jnp.asarray, INITIAL_LOSS_SCALE)
    return state


def make_train_state(args, weights, transform, mesh, checkpoint, state):
    """The training state on the mesh, and its shardings: from a checkpoint with its `state`, or else from `weights`.
    What the checkpoint's run kept and this one does not is dropped; a loss scale that it lacks starts anew."""
    sharding = functools.partial(sharding_of, mesh=mesh, shard=args.shard_params)
    make = functools.partial(initial_train_state, transform=transform, flags=vars(args))
    shardings = jax.tree.map(sharding, jax.eval_shape(make, weights))
    if checkpoint is None:
        params = {name: place(array, mesh, shardings["params"][name].spec) for name, array in weights.items()}
        return jax.jit(make, out_shardings=shardings)(params), shardings
    saved = jax.eval_shape(functools.partial(make, flags=state["arguments"]), weights)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), saved)
    with naming(f"{checkpoint}: the checkpoint is damaged or of another model"), ocp.StandardCheckpointer() as reader:
        loaded = reader.restore(checkpoint.absolute() / "train_state", like)
    loaded = {"loss_scale": {name: place(value, mesh) for name, value in INITIAL_LOSS_SCALE.items()}, **loaded}
    return {name: loaded[name] for name in shardings}, shardings


def next_loss_scale(scale, finite_steps, finite):
    """Dynamic loss scaling: halved by an update that is not finite, doubled after 2,000 finite ones in a row."""
    finite_steps = jnp.where(finite, finite_steps + 1, 0)
    grown = finite_steps >= 2000
    scale = jnp.where(finite, jnp.where(grown, scale * 2, scale), jnp.maximum(scale / 2, 1))
    return {"scale": scale, "finite_steps": jnp.where(grown, 0, finite_steps)}


# Logs, model card and Hub ---------------------------------------------------------------------------------------------
def check_trackers(args):
    """Raise RunError unless the trackers of --report_to are installed."""
    packages = {"none": [], "tensorboard": ["tensorboardX"], "wandb": ["wandb"], "all": ["tensorboardX", "wandb"]}
    if missing := [package for package in packages[args.report_to] if not importlib.util.find_spec(package)]:
        raise RunError(f"--report_to {args.report_to}: not installed here, run `pip install {' '.join(missing)}`")


def progress_bar(total, unit, iterable=None, **options):
    """A tqdm bar; where stderr is no terminal, a line in the log every half minute."""
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):  # in a notebook tqdm draws a bar of its own
        line = "{desc}: {n_fmt} of {total_fmt} {unit}s{postfix}, {remaining} left"
        log = argparse.Namespace(write=lambda text: text.strip() and logger.info(text.strip()))
        options |= {"file": log, "bar_format": line, "mininterval": 30, "delay": 30, "miniters": 1, "leave": False}
    return tqdm(iterable, total=total, unit=unit, **options)


def log_plan(args, run, first_step, last_step, validation_period):
    """Log what the run will do. run: as for `check_resume`; validation_period: in examples."""
    rows = run["rows"]
    size = run["batch_size"]
    epochs = (last_step - first_step) * size / rows
    span = f"{epochs:.1f} epochs" if epochs else "no update is left"
    drawn = f"pictures every {validation_period / size:.0f}" if args.validation_prompts else "no pictures"
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, --mixed_precision {args.mixed_precision}"
    logger.info(f"fine-tuning {args.pretrained_model_name_or_path} on {device}")
    logger.info(f"{rows} images, {size} per step, steps {first_step} to {last_step} ({span}), seed {run['seed']}")
    logger.info(f"to {args.output_dir}: a checkpoint every {args.checkpointing_steps} steps, {drawn}")


def log_result(args, code, loss):
    """Log where everything is, and `code`: Python that generates a picture with the result. loss: of `HeldOut`."""
    names = [name for name in ("README.md", "validation", args.logging_dir) if Path(args.output_dir, name).exists()]
    names.append(f"checkpoints ({len(list_checkpoints(args.output_dir))})")
    logger.info(f"saved the result in {args.output_dir}; there too: {', '.join(names)}{loss}")
    tqdm.write(f"Generate a picture with it:\n\n{code}", file=sys.stderr)


class HeldOut:
    """Held-out rows and the history of their loss: mean squared error, the same crops and noise whatever the flags."""

    def __init__(self, args, rows, preprocess, encoder, losses, num_train_timesteps, start):
        off = ["random_flip", "proportion_empty_prompts", "noise_offset", "input_perturbation", "dream_training"]
        self.args = argparse.Namespace(**vars(args) | dict.fromkeys([*off, "snr_gamma"], 0) | {"center_crop": True})
        self.losses = jax.jit(functools.partial(losses, key=np.zeros(2, np.uint32), args=self.args))
        self.length = num_train_timesteps  # of the noise schedule
        self.history = start.get("validation", [])  # best: [its lowest entry], [] if that checkpoint is not here
        self.best = [e for e in start.get("best", []) if Path(args.output_dir, f"checkpoint-{e['step']}").exists()]
        preprocess = functools.partial(preprocess.func, self.args, *preprocess.args[1:])
        self.stream = ExampleStream(rows, preprocess, seed=2**64)
        self.batches = [{**batch, **encoder(batch)} for batch in read_ahead(args, self.stream, range(len(rows)))]

    def evaluate(self, step, params, log):
        """Log the loss after `step` updates. Called by every process. Returns whether --keep_best is to save for it."""
        losses = []
        for part, batch in itertools.product(range(1, 16, 2), self.batches):  # middles of eighths of the schedule
            timesteps = np.full(len(batch["positions"]), self.length * part // 16, np.int32)
            losses.append(self.losses(params, {}, {**batch, "timesteps": timesteps}))
        losses = np.concatenate(multihost_utils.process_allgather(losses, tiled=True), dtype=np.float64)
        losses = losses.reshape(4, 2, -1)[:, :, : len(self.stream.rows)]  # without padding
        names = [f"validation_loss/t{self.length * k // 4:03d}-{self.length * (k + 1) // 4 - 1:03d}" for k in range(4)]
        loss = losses.mean().item()
        values = {"validation_loss": loss, **dict(zip(names, losses.mean((1, 2)).tolist(), strict=True))}
        log.write(values, step)
        log.bar.set_description_str(f"validation loss {loss:.4f}", refresh=False)
        logger.info(f"step {step}: validation loss {loss:.4f}")
        self.history.append({"step": step, "train_loss": float(np.mean(log.recent)), **values})
        is_best = self.args.keep_best and loss < min([math.inf, *(entry["validation_loss"] for entry in self.best)])
        self.best = self.history[-1:] if is_best else self.best
        path = Path(self.args.output_dir) / "validation" / "loss.png"
        if jax.process_index() == 0 and importlib.util.find_spec("matplotlib"):
            path.parent.mkdir(exist_ok=True)
            axes = importlib.import_module("matplotlib.figure").Figure().subplots()
            table = datasets.Dataset.from_list(self.history).to_pandas()
            table.plot("step", ["train_loss", "validation_loss"], ax=axes, style=".-").figure.savefig(path)
        return is_best

    def summary(self):
        """The checkpoint that is kept for its loss, as the end of a sentence."""
        return "".join(f"; best validation loss {e['validation_loss']:.4f}: checkpoint-{e['step']}" for e in self.best)


class UpdateLog:
    """Starts the trackers and logs every update, but reads its values from the devices only in `flush`."""

    def __init__(self, args, batch_size, start, last_step):
        self.batch_size = batch_size
        self.updates = []
        self.waits = []  # for batches, as (begin, end)
        self.recent = start.get("recent_losses", [])  # at most 100, smoothed by the plot of losses
        self.nonfinite = 0
        self.tensorboard = self.wandb = None
        report_to = args.report_to if jax.process_index() == 0 else "none"
        arguments = recorded_arguments(args, args.seed)
        with naming(f"--report_to {args.report_to}"):
            if report_to in ("tensorboard", "all"):
                tensorboard = importlib.import_module("tensorboardX")
                folder = os.path.join(args.output_dir, args.logging_dir, args.tracker_project_name)
                self.tensorboard = tensorboard.SummaryWriter(folder, max_queue=10**6)  # a full one blocks training
                self.tensorboard.add_text("arguments", f"```json\n{json.dumps(arguments, indent=2)}\n```")
            if report_to in ("wandb", "all"):
                self.wandb = importlib.import_module("wandb")
                settings = {"x_disable_meta": True}  # else it keeps the command line, with the token
                self.wandb.init(project=args.tracker_project_name, config=arguments, settings=settings)
        self.bar = progress_bar(last_step, "step", initial=start["step"], disable=jax.process_index() > 0)

    def next_batch(self, batches):
        """The next micro-batch. The first one after `flush` starts the clock; the wait is logged as "data_wait"."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waits.append((begin, time.perf_counter()))
        return batch

    def add(self, step, metrics):
        """Take in an update; metrics: those of `train_step`, which stay on the devices."""
        self.updates.append((step, time.time(), metrics))
        self.bar.update()

    def flush(self):
        """Log all updates since the last time. Raises RunError if one is not finite, or the log cannot be written."""
        values = jax.device_get([metrics for *_, metrics in self.updates])  # waits for the devices; nothing else does
        seconds = time.perf_counter() - self.waits[0][0]
        waited = sum(end - begin for begin, end in self.waits)
        speed = {"examples_per_second": len(values) * self.batch_size / seconds, "data_wait": waited / seconds}
        for (step, walltime, _), metrics in zip(self.updates, values, strict=True):
            update = {name: float(value) for name, value in metrics.items()} | speed
            self.write(update, step, walltime)
            loss, norm = update["train_loss"], update["grad_norm"]
            self.recent = [*self.recent[-99:], loss]
            self.nonfinite = 0 if math.isfinite(loss + norm) else self.nonfinite + 1
            if self.nonfinite >= (20 if "loss_scale" in update else 1):  # fp16 skips some to find its loss scale
                raise RunError(f"step {step}: loss {loss}, gradient norm {norm}; try a lower --learning_rate")
        # The thread that writes dies of a full disk. Closing the log would wait for it for ever.
        if self.tensorboard and not self.tensorboard.file_writer.event_writer._worker.is_alive():
            self.tensorboard = None
            raise RunError("--logging_dir: the TensorBoard log cannot be written any more; is the disk full?")
        self.bar.set_postfix_str(f"loss={loss:.4f}, images/s={speed['examples_per_second']:.1f}", refresh=False)
        self.updates.clear()
        self.waits.clear()

    def write(self, values, step, walltime=None):
        for name, value in values.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step, walltime)
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self):
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def recorded_arguments(args, seed):
    """The flags that have a value, and the seed: plain values for trackers and files, never the access token."""
    values = {**vars(args), "seed": seed, "hub_token": None}
    return {k: as_json(v) if isinstance(v, list) else v for k, v in sorted(values.items()) if v is not None}


def as_json(value, indent=None):
    """`value` as JSON with printable characters only."""
    return "\n".join(map(printable, json.dumps(value, indent=indent, ensure_ascii=False).split("\n")))


def write_model_card(args, base, part, name, seed, tags, run, code, **metadata):
    """Write output_dir/README.md. base, part: what was trained; name: of the result; run: its length and loss."""
    source = args.dataset_name or args.train_data_dir
    if getattr(args, "rank", None):
        part = f"{part}'s adapter (LoRA, rank {args.rank})"
        tags = [*tags, "lora"]
    settings = {"library_name": "diffusers", "tags": [*tags, "text-to-image", "diffusers", "diffusers-training"]}
    base_id, data_id = (None if Path(each).exists() else each for each in (base, source))  # the Hub takes no folders
    metadata = ModelCardData(base_model=base_id, datasets=data_id and [data_id], **settings, **metadata)
    title = re.sub(r"[^\w./ -]", "-", Path(name).resolve().name if Path(name).exists() else name)
    text = f"The {part} of `{as_json(base)}`, fine-tuned on `{as_json(source)}` for {run}."
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {title}", text]
    if args.validation_prompts:
        newest = max(Path(args.output_dir, "validation").glob("step-*.png"), key=os.path.getmtime)
        prompts = as_json(args.validation_prompts, indent=2)
        parts += [f"![validation pictures](validation/{newest.name})", f"```json\n{prompts}\n```"]
    parts += ["![validation loss](validation/loss.png)"] * Path(args.output_dir, "validation", "loss.png").exists()
    flags = as_json(recorded_arguments(args, seed), indent=2)
    parts += [f"## Use\n\n```python\n{code}\n```", f"Flags of the run:\n\n```json\n{flags}\n```\n"]
    with naming(f"{args.output_dir}/README.md cannot be written"):
        Path(args.output_dir, "README.md").write_text("\n\n".join(parts), encoding="utf-8")


def prepare_hub_repository(args):
    """Create the repository to upload to, if it is missing, and check write access. Returns its id. Raises RunError."""
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with naming(f"--push_to_hub {name}"):
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    return repo_id


def push_to_hub(args, repo_id):
    """Upload output_dir without checkpoints and logs. Raises RunError with the command that uploads it by hand."""
    ignored = ["checkpoint-*/*", "set-aside-*/*", f"{glob.escape(os.path.normpath(args.logging_dir))}/*"]
    command = shlex.join(["hf", "upload", repo_id, args.output_dir, ".", *(f"--exclude={part}" for part in ignored)])
    options = {"repo_id": repo_id, "folder_path": args.output_dir, "ignore_patterns": ignored}
    for pause in (10, 60, None):  # seconds; the Hub may be unavailable at the end of days of training
        try:
            with naming("--push_to_hub"):
                HfApi(token=args.hub_token).upload_folder(**options)
            return logger.info(f"uploaded to {repo_id}")
        except RunError as error:
            if pause is None:
                raise RunError(f"{error}; the result is in {args.output_dir}, upload it by: {command}") from error
            logger.warning(f"{error}; trying again in {pause} s")
            time.sleep(pause)


def out_of_memory(args):
    """One line: what was being done when memory ran out, and the flags that need less, those that cost least first."""
    tasks = {"cached_encodings": "encoding images", "validate": "generating pictures", "next_batch": "reading images"}
    task = next((task for name, task in tasks.items() if f", in {name}\n" in traceback.format_exc()), "training")
    size = f"--train_batch_size {args.train_batch_size} and --resolution {args.resolution}"
    less = ["mixed_precision", "cache_encodings", "gradient_checkpointing", "shard_params"]
    less = [f"--{flag}" for flag in less if getattr(args, flag, True) in (None, False, "no")] + ["a lower --resolution"]
    if args.train_batch_size > 1:
        less.insert(0, "smaller batches, with more --gradient_accumulation_steps")
    return f"out of memory while {task}, with {size}; these need less, cheapest first: {', '.join(less)}"


if __name__ == "__main__":
    try:
        main(command_line)
    except Exception as error:
        of_disk = "cannot be written" in str(error)  # that has the same code
        lacking = isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in str(error) and not of_disk)
        foreseen = isinstance(error, (RunError, jax.errors.JaxRuntimeError))  # of JAX: another process is gone
        if lacking or foreseen or getattr(error, "errno", None):  # of the operating system
            line = out_of_memory(command_line) if lacking else str(error).strip().splitlines()[0]
            tqdm.write(f"error: {printable(line)}", file=sys.stderr)
        else:
            traceback.print_exc()
        end_process(1)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in a notebook the process goes on
