# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.10,<3",
#     "torchvision>=0.25,<1",
#     "diffusers>=0.40,<1",
#     "transformers>=5.0,<6",
#     "accelerate>=1.13,<2",
#     "peft>=0.18,<1",
#     "datasets>=4.5,<6",
#     "huggingface_hub>=1.23,<3",
#     "tensorboard>=2.20,<3",
#     "wandb>=0.24.1,<1",
# ]
# ///
r"""Fine-tune Stable Diffusion XL on captioned images.

    accelerate launch train_text_to_image_sdxl.py \
        --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \
        --train_data_dir=my_images --use_ema --learning_rate=1e-5 --max_train_steps=15000

The training minimises, over the latents x_0 of images, their captions c, timesteps t and noise ε ~ N(0, I),

    E [ w(t) · ‖ target − unet(x_t, t, c, s) ‖² ]    with    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε

where c are the penultimate hidden states of two text encoders, side by side, and the second one's pooled output, s is
the micro-conditioning on the image's size and crop (Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2), the
target is ε (Ho et al. 2020, arXiv:2006.11239, eq. 14, on latents: Rombach et al. 2022, arXiv:2112.10752),
√ᾱ_t · ε − √(1 − ᾱ_t) · x_0 (v-prediction: Salimans & Ho 2022, arXiv:2202.00512) or x_0, as the model's scheduler says,
and w(t) is 1 or the Min-SNR weight (Hang et al. 2023, arXiv:2303.09556).

Sections: Command line · Examples · Objective · Training · The machinery (the same text in every PyTorch script).
"""

import argparse
import contextlib
import copy
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
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

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
    biases = ["earlier", "later", "range", "none"]
    trackers = ["all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="pipeline to fine-tune: a folder or a Hub id")
    add("--pretrained_vae_model_name_or_path", help="another VAE, such as madebyollin/sdxl-vae-fp16-fix")
    add("--revision", help="branch, tag or commit of the pipeline on the Hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--cache_dir", help="folder for downloaded models and data sets")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="data set: a Hub id, a local copy of one, or a folder written by save_to_disk")
    add("--dataset_config_name", help="configuration of the data set, if it has several")
    add("--train_data_dir", help="folder of images with captions in a metadata.jsonl or in .txt files")
    add("--image_column", default="image", help="column of the images")
    add("--caption_column", default="text", help="column of the captions; if a row has a list, one is sampled")
    add("--max_train_samples", type=count, help="train on this many rows, sampled with --seed")
    add("--resolution", type=count, default=1024, help="side of the square training images, in pixels")
    add("--center_crop", action="store_true", help="crop the centre instead of a random square")
    add("--random_flip", action="store_true", help="flip half of the images horizontally, at random")
    add("--image_interpolation_mode", default="lanczos", choices=interpolations, help="filter for resizing images")
    add("--proportion_empty_prompts", type=probability, default=0, help="probability of an empty caption, for guidance")
    add("--dataloader_num_workers", type=natural, help="reading processes; default: up to 8 with a GPU, else 0")
    add("--cache_encodings", help="folder for cached outputs of the frozen encoders, computed once before training")
    add("--skip_bad_images", action="store_true", help="read all images before training and skip unreadable ones")

    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction", "sample"], help="default: the scheduler's")
    add("--snr_gamma", type=positive, help="use Min-SNR loss weights with this gamma; the paper recommends 5.0")
    add("--noise_offset", type=non_negative, default=0, help="scale of noise that is constant within each channel")
    add("--timestep_bias_strategy", default="none", choices=biases, help="timesteps to sample more or less often")
    add("--timestep_bias_multiplier", type=positive, default=1.0, help="their weight; that of the others is 1")
    add("--timestep_bias_portion", type=probability, default=0.25, help="fraction that is 'earlier' or 'later'")
    add("--timestep_bias_begin", type=natural, default=0, help="first timestep of 'range'")
    add("--timestep_bias_end", type=count, default=1000, help="timestep after the last one of 'range'")

    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=natural, help="seed of the whole run; default: random, and stored in the checkpoints")
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
    add("--use_8bit_adam", action="store_true", help="keep AdamW's state in 8 bits (bitsandbytes)")
    add("--max_grad_norm", type=limit, default=1.0, help="clip the gradient to this norm; inf: do not clip")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: accelerate's configuration")
    add("--deterministic", action="store_true", help="only deterministic kernels on GPUs: exact resumes, slower")
    add("--allow_tf32", action="store_true", help="allow TF32 matrix products on NVIDIA GPUs: faster, less precise")
    add("--half_precision_norms", action="store_true", help="norms output half precision: faster, less precise")
    add("--compile", action="store_true", help="compile the trained model: minutes at the start, then faster steps")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="use the attention of xformers")
    add("--enable_npu_flash_attention", action="store_true", help="use the attention of torch_npu, on an NPU")
    add("--local_rank", type=int, default=-1, help="accepted and not needed: the launcher tells each process its rank")

    add = parser.add_argument_group("EMA").add_argument
    add("--use_ema", action="store_true", help="validate and save an exponential moving average of the weights")
    add("--offload_ema", action="store_true", help="keep the average in CPU memory")

    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", "--lora_rank", type=count, help="train an adapter (LoRA) of this rank, not the whole model; try 16")
    add("--lora_alpha", type=positive, help="the adapter is scaled by this / rank; default: the rank")
    add("--lora_target_modules", nargs="+", help="layers to adapt; default: to_q to_k to_v to_out.0, of attention")
    add("--train_text_encoder", "--debug_loss", action="store_true", help="not supported: flags of diffusers' script")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", default="sdxl-model-finetuned", help="folder for the pipeline, its checkpoints and logs")
    add("--checkpointing_steps", type=count, default=500, help="updates between checkpoints")
    add("--checkpoints_total_limit", type=count, help="keep this many checkpoints, the newest; default: all")
    add("--keep_best", action="store_true", help="also save and keep the checkpoint of the lowest validation loss")
    add("--resume_from_checkpoint", nargs="?", const="latest", help="resume from the newest checkpoint or a given one")

    add = parser.add_argument_group("validation and logs").add_argument
    add("--validation_prompts", "--validation_prompt", nargs="+", help="prompts to generate pictures of, quoted")
    add("--num_validation_images", type=count, default=4, help="pictures per prompt, each from other noise")
    add("--validation_epochs", type=count, default=1, help="epochs between validations")
    add("--validation_steps", type=count, help="updates between validations, instead of epochs")
    add("--validation_rows", type=natural, default=0, help="rows held out of training, to compute a validation loss")
    add("--validation_data_dir", help="folder of images with captions for the validation loss, instead of those rows")
    add("--logging_steps", type=count, default=10, help="updates between writes to the log, which holds every update")
    add("--logging_dir", default="logs", help="folder of the TensorBoard logs, inside --output_dir")
    add("--report_to", default="tensorboard", choices=["none", *trackers], help="tracker, or all installed")
    add("--tracker_project_name", default="text2image-fine-tune-sdxl", help="name of the project in the tracker")

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="upload the result; write access is checked before training")
    add("--hub_model_id", help="repository to upload to; default: the name of --output_dir, under your account")
    add("--hub_token", help="access token; better: `hf auth login`, which keeps it out of the shell's history")

    words = sys.argv[1:] if input_args is None else input_args  # after a = shells do not expand ~
    args = parser.parse_args([word.replace("=~/", "=" + os.path.expanduser("~/"), 1) for word in words])
    if not (args.dataset_name or args.train_data_dir):
        parser.error("give a data set: --dataset_name (Hub id or folder) or --train_data_dir (folder of images)")
    if args.cache_encodings and not args.center_crop:
        parser.error("argument --cache_encodings: random crops cannot be cached; add --center_crop")
    if args.cache_encodings and Path(args.cache_encodings).resolve().is_relative_to(Path(args.output_dir).resolve()):
        parser.error("argument --cache_encodings: must not be inside --output_dir, which is uploaded as a whole")
    if (args.lora_alpha or args.lora_target_modules) and not args.rank:
        parser.error("arguments --lora_alpha and --lora_target_modules: need --rank")
    held_out = (args.validation_rows, args.validation_data_dir)
    if all(held_out) or (args.keep_best and not any(held_out)):
        parser.error("arguments --validation_rows, --validation_data_dir: give one of them; --keep_best needs one")
    if args.train_text_encoder:
        parser.error("arguments --train_text_encoder, --debug_loss: only the UNet is trained, and updates are logged")
    if os.path.normpath(args.logging_dir) == ".":
        parser.error("argument --logging_dir: must name a folder of its own")
    if os.path.normpath(os.path.join("logs", args.tracker_project_name)).split(os.sep)[0] != "logs":
        parser.error(f"argument --tracker_project_name: {args.tracker_project_name} leads out of the folder of logs")
    if args.hub_token and not re.fullmatch("[!-~]+", args.hub_token):  # else connection errors print it
        parser.error("argument --hub_token: contains a space, a line break or a character outside ASCII")
    return args


# Before the imports below, which take seconds: --help and a wrong flag are answered at once.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"\nstopped\n") and os._exit(130))  # there is nothing to resume
    command_line = parse_args()

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it recommends a package
import accelerate
import datasets
import diffusers
import fsspec
import numpy as np
import PIL.ImageOps  # and PIL.Image
import safetensors.torch
import torch
import torchvision
import transformers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, offload_models
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import HfApi, ModelCardData
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Examples: a row of the data set to tensors. All randomness of an example comes from its own generator, in fixed order.
# ----------------------------------------------------------------------------------------------------------------------


def draw_crop(args, width, height, rng):
    """Sample the crop and the flip of an image. Returns its new size (width, height), left, top, flipped and time_ids.

    time_ids: SDXL's micro-conditioning, int64 (6,): height and width of the image, top and left of the crop in the
    image as it is flipped, height and width of the crop. rng: `np.random.Generator`.
    """
    side = args.resolution
    resized = [int(side * length / min(width, height)) for length in (width, height)]
    spare_width, spare_height = (length - side for length in resized)
    # Always three random numbers, so that no flag changes those drawn after them.
    top, left, flip = rng.random(3)
    if args.center_crop:
        top, left = round(spare_height / 2), round(spare_width / 2)
    else:
        top, left = int(top * (spare_height + 1)), int(left * (spare_width + 1))
    flipped = args.random_flip and flip < 0.5
    time_ids = torch.tensor([height, width, top, spare_width - left if flipped else left, side, side])
    return resized, left, top, flipped, time_ids


def train_transforms(args, image, rng):
    """Resize, crop and maybe flip an RGB `PIL.Image`. Returns uint8 (side, side, 3) and the time_ids of `draw_crop`."""
    size, left, top, flipped, time_ids = draw_crop(args, *image.size, rng)
    resampling = PIL.Image.Resampling[args.image_interpolation_mode.removesuffix("_exact").upper()]
    image = image.resize(size, resampling).crop((left, top, left + args.resolution, top + args.resolution))
    return np.array(PIL.ImageOps.mirror(image) if flipped else image), time_ids


def choose_caption(captions, proportion_empty_prompts, rng):
    """Sample one of `captions` (a str, or a sequence of captions in any form), or "" with the given probability."""
    choice, dropout = rng.random(2)
    if dropout < proportion_empty_prompts:
        return ""
    return captions if isinstance(captions, str) else captions[int(choice * len(captions))]


def tokenize_captions(captions, tokenizers):
    """Tokenize n captions with both of CLIP's tokenizers: tensor (n, 2, 77)."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    both = [tokenizer(captions, max_length=tokenizer.model_max_length, **options).input_ids for tokenizer in tokenizers]
    return torch.from_numpy(np.stack(both, axis=1))


def timestep_distribution(args, num_train_timesteps):
    """The cumulative distribution of the timesteps, float64 (num_train_timesteps,). Raises RunError.

    Those that --timestep_bias_strategy names have the weight --timestep_bias_multiplier, all others have 1.
    """
    portion = int(args.timestep_bias_portion * num_train_timesteps)
    ranges = {"none": (0, 0), "earlier": (0, portion), "later": (num_train_timesteps - portion, num_train_timesteps)}
    ranges["range"] = (args.timestep_bias_begin, args.timestep_bias_end)
    begin, end = ranges[args.timestep_bias_strategy]
    if not begin <= end <= num_train_timesteps:
        raise RunError(f"--timestep_bias_begin {begin} --timestep_bias_end {end}: not in 0 to {num_train_timesteps}")
    weights = np.ones(num_train_timesteps)
    weights[begin:end] = args.timestep_bias_multiplier
    return weights.cumsum() / weights.cumsum()[-1]


def draw_noise(args, latents_shape, distribution, rng):
    """Sample the timestep and all noise of one example.

    latents_shape: (channels, height, width); distribution: of the timesteps, cumulative. Returns tensors
    "posterior_noise" and "noise" (latents_shape), "timesteps" () and, with --noise_offset, "offset_noise"
    (channels, 1, 1).
    """

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    drawn = {"posterior_noise": normal(*latents_shape)}
    drawn["timesteps"] = torch.tensor(np.searchsorted(distribution, rng.random(), side="right"))
    drawn["noise"] = normal(*latents_shape)
    if args.noise_offset:
        drawn["offset_noise"] = normal(latents_shape[0], 1, 1)
    return drawn


def preprocess_train(args, tokenizers, latents_shape, distribution, row, rng):
    """Turn a row of the data set into a training example.

    Returns tensors "pixel_values" (3, resolution, resolution), uint8, "time_ids" (6,), "input_ids" (2, 77), of both
    tokenizers, and those of `draw_noise`.
    """
    pixel_values, time_ids = train_transforms(args, read_image(row[args.image_column]), rng)
    caption = choose_caption(row[args.caption_column], args.proportion_empty_prompts, rng)
    example = {"pixel_values": torch.from_numpy(pixel_values).permute(2, 0, 1).contiguous(), "time_ids": time_ids}
    example["input_ids"] = tokenize_captions([caption], tokenizers)[0]
    return {**example, **draw_noise(args, latents_shape, distribution, rng)}


def encode_rows(args, tokenizers, vae, text_encoders, rows, threads):
    """Encode everything that may be sampled from a batch of rows (dict of lists; images are RGB `PIL.Image`).

    Returns bytes of safetensors per row: "moments" (flips, 2 · channels, h, w), "size", of the image, (width, height),
    "text_states" (captions, 77, width) and "text_embeds" (captions, width).
    """
    images = rows[args.image_column]
    unflipped = argparse.Namespace(**vars(args) | {"random_flip": False})
    crops = threads.map(lambda image: train_transforms(unflipped, image, random_generator(0))[0], images)
    pixel_values = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    flips = [pixel_values, pixel_values.flip(3)] if args.random_flip else [pixel_values]
    encodings = {"moments": torch.stack([encode_images(flip, vae).cpu() for flip in flips], dim=1).contiguous()}
    encodings["size"] = torch.tensor([image.size for image in images])
    captions = [[texts] if isinstance(texts, str) else texts for texts in rows[args.caption_column]]
    input_ids = tokenize_captions(list(itertools.chain(*captions)), tokenizers)
    for name, values in encode_captions(input_ids, text_encoders).items():
        encodings[name] = values.cpu().split([len(texts) for texts in captions])
    columns = zip(*encodings.values(), strict=True)
    return [safetensors.torch.save(dict(zip(encodings, row, strict=True))) for row in columns]


def preprocess_encoded(args, empty_caption, latents_shape, distribution, row, rng):
    """Turn a cached row of `encode_rows` into the same example as `preprocess_train`, with the encoders' outputs.

    empty_caption: those of "". Has "moments", "text_states" and "text_embeds", not "pixel_values" and "input_ids".
    """
    encodings = safetensors.torch.load(row["encodings"])
    *_, flipped, time_ids = draw_crop(args, *encodings["size"].tolist(), rng)
    number = choose_caption(range(len(encodings["text_embeds"])), args.proportion_empty_prompts, rng)
    conditions = empty_caption if number == "" else {name: encodings[name][number] for name in empty_caption}
    example = {"moments": encodings["moments"][int(flipped)], "time_ids": time_ids, **conditions}
    return {**example, **draw_noise(args, latents_shape, distribution, rng)}


# ----------------------------------------------------------------------------------------------------------------------
# Objective: from a batch to its losses. Nothing here is random.
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


def min_snr_weight(prediction_type, alphas_cumprod, gamma):
    """The Min-SNR-γ weight of a squared error, of ᾱ's shape, finite for all ᾱ (arXiv:2303.09556, section 3.4)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)  # 0 at ᾱ = 0, infinite at ᾱ = 1
    if prediction_type == "epsilon":
        return (gamma / snr).clip(max=1)  # min(SNR, γ) / SNR
    if prediction_type == "v_prediction":
        return snr.clip(max=gamma) / (snr + 1)
    return snr.clip(max=gamma)


def weighted_squared_error(prediction, target, weight):
    """weight · mean squared error of every example; prediction, target (b, ...), weight (b,). Returns (b,)."""
    return weight * (prediction.float() - target.float()).square().flatten(1).mean(1)


@torch.no_grad()
def encode_images(pixel_values, vae):
    """The VAE's posterior of uint8 images (b, 3, h, w): mean and log-variance, (b, 2 · channels, height, width)."""
    white = torch.full((), 255.0, device=vae.device)  # a tensor: a Python number's rounded inverse would multiply
    pixel_values = pixel_values.to(vae.device).float() / white * 2 - 1
    return vae.encode(pixel_values.to(vae.dtype)).latent_dist.parameters


@torch.no_grad()
def encode_captions(input_ids, text_encoders):
    """SDXL's conditions of tokens (b, 2, 77), one row for each text encoder.

    Returns tensors "text_states", the penultimate hidden states of both side by side (b, 77, width), and "text_embeds",
    the pooled output of the second (b, its width).
    """
    pairs = zip(text_encoders, input_ids.unbind(1), strict=True)
    outputs = [encoder(ids.to(encoder.device), output_hidden_states=True) for encoder, ids in pairs]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=2)
    return {"text_states": states, "text_embeds": outputs[1].text_embeds}


def training_losses(batch, unet, vae, text_encoders, alphas_cumprod, prediction_type, args):
    """The loss of each example of a micro-batch, (b,). Deterministic: the batch holds all random numbers.

    batch: collated examples of `preprocess_train` or `preprocess_encoded`; alphas_cumprod: ᾱ of all timesteps,
    (num_train_timesteps,). Only the UNet gets a gradient.
    """
    if "moments" not in batch:  # not cached; kept in the batch, since `HeldOut` uses its batches again
        batch["moments"] = encode_images(batch.pop("pixel_values"), vae)
        batch |= encode_captions(batch["input_ids"], text_encoders)
    posterior = DiagonalGaussianDistribution(batch["moments"])
    latents = posterior.mean.float() + posterior.std.float() * batch["posterior_noise"]
    latents = latents * vae.config.scaling_factor

    timesteps, noise = batch["timesteps"], batch["noise"]
    alphas = alphas_cumprod[timesteps, None, None, None]
    if args.noise_offset:
        noise = noise + args.noise_offset * batch["offset_noise"]
    noisy_latents = add_noise(latents, noise, alphas)

    added = {"text_embeds": batch["text_embeds"], "time_ids": batch["time_ids"]}
    model_pred = unet(noisy_latents, timesteps, batch["text_states"], added_cond_kwargs=added).sample
    target = prediction_target(prediction_type, latents, noise, alphas)
    weight = torch.ones_like(timesteps, dtype=torch.float32)
    if args.snr_gamma:
        weight = min_snr_weight(prediction_type, alphas_cumprod[timesteps], args.snr_gamma)
    return weighted_squared_error(model_pred, target, weight)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def check_pipeline(path, hub):
    """Raise RunError if model_index.json names other text encoders than the two of SDXL's base model."""
    index = StableDiffusionXLPipeline.load_config(path, **hub)
    problem = "SDXL's refiner, which has one text encoder; only the base model, with two, can be trained"
    if not index.get("text_encoder_2"):
        problem = "not Stable Diffusion XL; train_text_to_image.py trains Stable Diffusion 1.x and 2.x"
    if not index.get("text_encoder_2") or index.get("text_encoder", [None])[0] is None:
        raise RunError(f"--pretrained_model_name_or_path {path}: {problem}")


def load_vae(args, options):
    """The VAE, in float32: of the pipeline or of --pretrained_vae_model_name_or_path. Raises RunError."""
    path = args.pretrained_vae_model_name_or_path
    if not path:
        return AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **options)
    with naming(f"--pretrained_vae_model_name_or_path {path}"):
        return AutoencoderKL.from_pretrained(path, **{**options, "revision": None, "variant": None})


def check_architecture(unet, vae, text_encoders, tokenizers, resolution):
    """Return the latents' shape (c, h, w). Raises RunError if models or resolution do not fit together."""
    tokens = [len(tokenizer) for tokenizer in tokenizers]
    vocabularies = [encoder.config.vocab_size for encoder in text_encoders]
    states_width = sum(encoder.config.hidden_size for encoder in text_encoders)
    added_width = text_encoders[1].config.projection_dim + 6 * (unet.config.addition_time_embed_dim or 0)
    pairs = {
        "the tokenizers' tokens and the text encoders'": (tokens, vocabularies),
        "the tokenizers' lengths": [tokenizer.model_max_length for tokenizer in tokenizers],
        "the UNet's input channels and the VAE's": (unet.config.in_channels, vae.config.latent_channels),
        "the UNet's context width and the text states'": (unet.config.cross_attention_dim, states_width),
        "the UNet's added conditions and SDXL's": (unet.config.addition_embed_type, "text_time"),
        "the added conditions' width and SDXL's": (unet.config.projection_class_embeddings_input_dim, added_width),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise RunError(f"not a complete Stable Diffusion XL: {what} do not match ({found}, {expected})")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor:
        raise RunError(f"--resolution {resolution}: must be a multiple of {factor}")
    return vae.config.latent_channels, resolution // factor, resolution // factor


def check_objective(prediction_type, alphas_cumprod, *pipelines):
    """Raise RunError if the prediction type, the noise schedule or a pipeline's scheduler cannot be used."""
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise RunError(f"prediction type {prediction_type}: only epsilon, v_prediction and sample are supported")
    if prediction_type == "epsilon" and alphas_cumprod[-1] < 1e-6:  # x_T is ε itself
        raise RunError("prediction type epsilon: learns nothing at zero terminal SNR; use v_prediction or sample")
    for pipeline in filter(None, pipelines):
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):  # as in flow matching
            raise RunError(f"{type(pipeline.scheduler).__name__}: pipelines with this scheduler are not supported")


def apply_flags(args, unet):
    """Save memory or time in the UNet as the flags say. Raises RunError."""
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        with naming("--enable_xformers_memory_efficient_attention (PyTorch's own attention is as memory-efficient)"):
            unet.enable_xformers_memory_efficient_attention()
    if args.enable_npu_flash_attention:
        with naming("--enable_npu_flash_attention"):
            unet.enable_npu_flash_attention()
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if args.compile else ():
        block.compile()  # block by block: compiles faster than the whole model


def prepare_rows(accelerator, args, data, tokenizers, vae, text_encoders):
    """The rows of each data set or their encodings, and a partial, `args` first, that turns one into an example."""
    if not args.cache_encodings:
        for frozen in (vae, *text_encoders):
            frozen.to(accelerator.device)
        return data, functools.partial(preprocess_train, args, tokenizers)
    rules = [[tokenizer.model_max_length, tokenizer.backend_tokenizer.to_str()] for tokenizer in tokenizers]
    settings = [args.resolution, args.image_interpolation_mode, args.random_flip, str(vae.dtype), rules]
    encode = functools.partial(encode_rows, args, tokenizers, vae, text_encoders)
    rows = [cached_encodings(accelerator, args, part, settings, [vae, *text_encoders], encode) for part in data]
    with offload_models(*text_encoders, device=accelerator.device):
        conditions = encode_captions(tokenize_captions([""], tokenizers), text_encoders)
    empty_caption = {name: condition.cpu()[0] for name, condition in conditions.items()}
    return rows, functools.partial(preprocess_encoded, args, empty_caption)


def log_validation(pipeline, unet, accelerator, args, seed, step):
    """Generate a picture of each validation prompt. To be called by every process."""
    vae = pipeline.vae
    pipeline.unet = accelerator.unwrap_model(unet)
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": args.resolution, "width": args.resolution, "num_inference_steps": 25, "output_type": "latent"}

    def generate(prompt, generator):
        latents = pipeline(prompt, generator=generator, **options).images / vae.config.scaling_factor
        with torch.autocast(
            accelerator.device.type, enabled=False
        ):  # else a VAE in float32 would run, and overflow, in fp16
            return pipeline.image_processor.postprocess(vae.decode(latents.to(vae.dtype)).sample)[0]

    with offload_models(vae, pipeline.text_encoder, pipeline.text_encoder_2, device=accelerator.device):
        validate(accelerator, args, pipeline.unet, generate, seed, step)


def save_adapter(unet, folder):
    """Write the adapter as `load_lora_weights` reads it, and in kohya's format, for ComfyUI and AUTOMATIC1111."""
    adapter = get_peft_model_state_dict(unet)
    config = unet.peft_config["default"]
    StableDiffusionXLPipeline.save_lora_weights(folder, adapter, unet_lora_adapter_metadata=config.to_dict())
    kohya = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in adapter.items()})
    kohya |= {k: torch.tensor(float(config.lora_alpha)) for k in kohya if k.endswith(".alpha")}  # instead of the rank
    safetensors.torch.save_file(kohya, Path(folder, "pytorch_lora_weights_kohya.safetensors"))


def usage(args, name):
    """Python code that generates a picture with the result, by its `name`: --output_dir or a Hub id."""
    base = as_json(args.pretrained_model_name_or_path)
    prompt = as_json((args.validation_prompts or ["a prompt"])[0])
    loading = f"pipeline = StableDiffusionXLPipeline.from_pretrained({as_json(name)})"
    if args.rank:
        loading = f"""pipeline = StableDiffusionXLPipeline.from_pretrained({base})
pipeline.load_lora_weights({as_json(name)})"""
        if args.prediction_type:
            loading += f'\npipeline.scheduler.register_to_config(prediction_type="{args.prediction_type}")'
    return f"""from diffusers import StableDiffusionXLPipeline

{loading}
pipeline({prompt}).images[0].save("picture.png")"""


def save_model_card(args, name, seed, steps, loss):
    """Write the card of the model `name`, --output_dir or a Hub id."""
    tags = ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
    vae = args.pretrained_vae_model_name_or_path
    run = f"{steps} updates" + (f", with the VAE `{as_json(vae)}`" if vae else "") + loss
    write_model_card(args, args.pretrained_model_name_or_path, "UNet", name, seed, tags, run, usage(args, name))


def main(args):
    """Train as the flags say. Raises RunError; exits with status 128 + its number after a signal."""
    path = args.pretrained_model_name_or_path
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    accelerator = make_accelerator(args)
    check_folders(args)

    # Where to start: at step 0 or at a checkpoint.
    checkpoint, start, seed = find_start(accelerator, args)
    first_step, examples_seen = start["step"], start["examples_seen"]

    # Models: what trains in float32, all that is frozen in the precision of --mixed_precision.
    options = {**hub, "variant": args.variant, "use_safetensors": True, "dtype": torch.float32}
    frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    frozen_options = {**options, "dtype": frozen_dtype}
    pipeline = validation_pipeline = None
    with naming(f"--pretrained_model_name_or_path {path}" + (f", {checkpoint}" if checkpoint else "")):
        check_pipeline(path, hub)
        noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **hub)
        tokenizers = [CLIPTokenizer.from_pretrained(path, subfolder=f"tokenizer{end}", **hub) for end in ("", "_2")]
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", **frozen_options)
        text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(path, subfolder="text_encoder_2", **frozen_options)
        vae = load_vae(args, options)
        if checkpoint and not args.rank:
            unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", use_safetensors=True)
        else:
            unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", **options)
        if args.rank:
            add_adapter(args, unet, frozen_dtype, seed, checkpoint and checkpoint / "unet")
        ema_unet = args.use_ema and make_ema(accelerator, args, unet, checkpoint and checkpoint / "unet_ema")
        if accelerator.is_main_process and not args.rank:  # the result, loaded now: nothing can be missing at the end
            parts = {"unet": unet, "vae": copy.deepcopy(vae)}  # in float32
            pipeline = StableDiffusionXLPipeline.from_pretrained(path, **parts, **options)
        if args.validation_prompts or args.rank:  # with --rank for its scheduler, which is checked
            parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
            validation_pipeline = StableDiffusionXLPipeline.from_pretrained(path, **parts, **hub)
    text_encoders = [text_encoder, text_encoder_2]
    latents_shape = check_architecture(unet, vae, text_encoders, tokenizers, args.resolution)
    if not (vae.config.force_upcast and frozen_dtype == torch.float16):  # in which it overflows
        vae.to(frozen_dtype)
    for frozen in (vae, *text_encoders):
        frozen.requires_grad_(False).to(memory_format=torch.channels_last)  # faster convolutions
    prediction_type = args.prediction_type or noise_scheduler.config.prediction_type
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)
    check_objective(prediction_type, alphas_cumprod, pipeline, validation_pipeline)
    distribution = timestep_distribution(args, len(alphas_cumprod))
    for each in filter(None, (pipeline, validation_pipeline)):
        each.scheduler.register_to_config(prediction_type=prediction_type)  # sample as trained

    # Data, and the length of the run.
    batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    # Rows to train on are of the first data set, held-out rows of the last: there are two with --validation_data_dir.
    data, to_train, to_hold_out = load_data(accelerator, args, ["image_column", "caption_column"], seed, batch_size)
    examples_left = max(0, args.num_train_epochs * len(to_train) - examples_seen)
    last_step = max(first_step, args.max_train_steps or first_step + math.ceil(examples_left / batch_size))
    validation_period = (args.validation_steps or 0) * batch_size or args.validation_epochs * len(to_train)  # examples
    run = {"seed": seed, "batch_size": batch_size, "rows": len(to_train), "data": data[0]._fingerprint}

    # Optimizer.
    to_device(accelerator, args, unet.train())
    apply_flags(args, unet)
    optimizer = make_optimizer(args, unet.parameters(), accelerator.device, batch_size if args.scale_lr else 1)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if checkpoint:
        check_resume(args, checkpoint, start, run)
        load_optimizer(accelerator, unet, optimizer, checkpoint)
    schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": last_step, "last_epoch": first_step - 1}
    with naming(f"--lr_scheduler {args.lr_scheduler}"):  # a function of the update: it has no state to save
        lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **schedule)

    # Every check has passed: from here on the run writes.
    repo_id = on_main_process(accelerator, prepare_hub_repository, args) if args.push_to_hub else args.hub_model_id
    on_main_process(accelerator, prepare_output_dir, args, first_step, last_step)
    log_plan(accelerator, args, path, run, first_step, last_step, validation_period)

    # One stream of examples for the whole run, entered where the checkpoint left it.
    rows, preprocess = prepare_rows(accelerator, args, data, tokenizers, vae, text_encoders)
    frozen_parts = (vae, text_encoders, alphas_cumprod, prediction_type)
    preprocess = functools.partial(preprocess, latents_shape, distribution)
    positions = range(examples_seen, examples_seen + (last_step - first_step) * batch_size)
    batches = make_batches(accelerator, args, ExampleStream(rows[0].select(to_train), preprocess, seed), positions)
    held_out = HeldOut(accelerator, args, rows[-1].select(to_hold_out), preprocess, len(alphas_cumprod), start)

    # Loop.
    log = UpdateLog(accelerator, args, run, start, last_step)
    cpu_group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
    with contextlib.closing(batches), contextlib.closing(log.bar), noted_signals() as noted:
        for step in range(first_step + 1, last_step + 1):
            losses = []
            for _ in range(args.gradient_accumulation_steps):
                batch = log.next_batch(batches)  # next(batches), and the time that it took
                with accelerator.accumulate(unet):
                    loss = training_losses(batch, unet, *frozen_parts, args)
                    accelerator.backward(loss.mean())
                    if accelerator.sync_gradients:
                        gradient_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            if ema_unet:
                update_ema(ema_unet, unet, step)
            log.add(step, torch.cat(losses), gradient_norm, lr_scheduler.get_last_lr()[0])
            lr_scheduler.step()
            examples_seen += batch_size

            stop = noted_anywhere(noted, cpu_group) if step < last_step else 0
            save = stop or step % args.checkpointing_steps == 0
            period_ends = examples_seen // validation_period > (examples_seen - batch_size) // validation_period
            due = period_ends and not stop and (args.validation_prompts or held_out.batches)
            if save or due or step == last_step or step % args.logging_steps == 0:
                log.flush()
            if held_out.batches and (due or step == last_step):
                save = held_out.evaluate(step, ema_unet or unet, training_losses, frozen_parts, log) or save
            if save:
                state = {**run, "step": step, "examples_seen": examples_seen}
                state |= {"recent_losses": log.recent, "validation": held_out.history, "best": held_out.best}
                save_checkpoint(accelerator, args, "unet", unet, ema_unet, optimizer, state)
            if due and args.validation_prompts and step < last_step:
                log_validation(validation_pipeline, ema_unet or unet, accelerator, args, seed, step)
            if stop:
                accelerator.end_training()
                exit_after(stop, f"after step {step}; --resume_from_checkpoint resumes")
        save_result(accelerator, args, pipeline, save_adapter, unet=ema_unet or unet)

    # Validation of the result, and the model card.
    if args.validation_prompts:
        log_validation(validation_pipeline, ema_unet or unet, accelerator, args, seed, last_step)
    accelerator.end_training()
    if accelerator.is_main_process:
        save_model_card(args, repo_id or args.output_dir, seed, last_step, held_out.summary())
        if args.push_to_hub:
            push_to_hub(args, repo_id)
        log_result(args, usage(args, args.output_dir), held_out.summary())


# ----------------------------------------------------------------------------------------------------------------------
# The machinery: the same text in every PyTorch script (change it in train_text_to_image.py, then `make sync`)
# ----------------------------------------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)
PIL.Image.MAX_IMAGE_PIXELS = 2**30  # Pillow's own limit, against decompression bombs, is 179 megapixels
warnings.filterwarnings("ignore", module="PIL|accelerate|datasets|diffusers|huggingface_hub|peft|transformers")
fsspec.get_filesystem_class("zip").cachable = True  # else the directory of an archive is read again for each image
FOR_TESTS = r"[/\\](test|testing|val|validation|dev|eval)(\.zip)?([/\\]|$)"  # folders and archives, of any case
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
ADAPTER = "pytorch_lora_weights.safetensors"  # diffusers' name for it
CHUNK_ROWS = 1000  # mean number of rows in a file of encodings; a crash costs each process one such file


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
def load_data(accelerator, args, flags, seed, batch_size):
    """[data set, maybe another for validation], rows of the first to train on, held-out rows of the last: indices."""
    sources = ["dataset_name" if args.dataset_name else "train_data_dir", "validation_data_dir"]
    parts = [load_rows(args, source, flags) for source in sources if getattr(args, source)]
    if args.max_train_samples:
        parts[0] = parts[0].select(random_generator(seed, 3).permutation(len(parts[0]))[: args.max_train_samples])
    if args.skip_bad_images or not args.cache_encodings:  # else the encoding names bad images
        parts = [part.select(on_main_process(accelerator, readable_rows, args, part)) for part in parts]
    held_out, to_train = np.split(random_generator(seed, 5).permutation(len(parts[0])), [args.validation_rows])
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


def make_batches(accelerator, args, stream, positions):
    """Iterate over this process's micro-batches of an `ExampleStream`, dicts of tensors on its device."""
    on_cpu = accelerator.device.type == "cpu"
    workers = args.dataloader_num_workers
    if workers is None:  # one per core, but none where the CPU trains
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = 0 if on_cpu else max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
        if workers and os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").total < 2**30:
            logger.warning("/dev/shm is small (a container gets more by --shm-size=8g): --dataloader_num_workers 0")
            workers = 0
    options = {"num_workers": workers, "prefetch_factor": 4 if workers else None, "pin_memory": not on_cpu}
    options |= {"batch_size": args.train_batch_size, "worker_init_fn": ignore_stop_signals}
    dataloader = torch.utils.data.DataLoader(stream, sampler=positions, **options)
    return iter(accelerator.prepare_data_loader(dataloader))


# Cached encodings -----------------------------------------------------------------------------------------------------
def cached_encodings(accelerator, args, dataset, settings, models, encode):
    """The rows {"encodings": bytes} of `dataset`, memory-mapped from --cache_encodings; encodes missing ones."""
    chunks = on_main_process(accelerator, list_chunks, args, dataset, settings, models)
    missing = on_main_process(accelerator, lambda: [chunk for chunk in chunks if not chunk[0].exists()])
    own = missing[accelerator.process_index :: accelerator.num_processes]

    def encode_batch(batch):
        exit_after(noted_anywhere(noted, None), "while encoding; the same command resumes")
        rows = dataset[batch["row"]]
        rows[args.image_column] = threads.starmap(read_image, zip(rows[args.image_column], batch["row"], strict=True))
        encodings = encode(rows, threads)
        bar.update(len(encodings))
        return {"encodings": encodings}

    hidden = not own or not accelerator.is_main_process
    bar = progress_bar(sum(len(rows) for _, rows in own), "image", desc="encoding", disable=hidden)
    options = {"batched": True, "batch_size": args.train_batch_size, "remove_columns": "row"}
    on_device = offload_models(*models, device=accelerator.device, offload=bool(own))
    with on_device, noted_signals() as noted, ThreadPool() as threads, bar:
        for path, rows in own:
            with naming(f"--cache_encodings: rows {rows.start} to {rows.stop - 1} cannot be encoded to {path}"):
                numbers = datasets.Dataset.from_dict({"row": rows})
                numbers.map(encode_batch, cache_file_name=str(path), new_fingerprint=path.stem, **options)
    exit_after(noted_anywhere(noted, None), "while encoding; the same command resumes")
    accelerator.wait_for_everyone()
    parts = []
    for path, _ in chunks:
        with naming(f"--cache_encodings {path}: delete it to encode its rows again"):
            parts.append(datasets.Dataset.from_file(str(path)))
    return datasets.concatenate_datasets(parts)


def list_chunks(args, dataset, settings, models):
    """[(Path of a file of encodings, range of its rows)]. The path is a digest of models, `settings` and these rows."""
    digest = hashlib.sha256(json.dumps(settings, default=str).encode())
    for tensor in itertools.chain(*(model.state_dict().values() for model in models)):
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    folder = Path(args.cache_encodings) / digest.hexdigest()[:16]
    with naming(f"--cache_encodings {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("tmp*"):  # the remains of a crash, unless another run is writing it
            if path.stat().st_mtime < time.time() - 86_400:
                path.unlink(missing_ok=True)
        digests = row_digests(args, dataset)
    # The row's own digest decides whether a chunk starts there: a row that is new or changed affects only its chunk.
    starts = [row for row, digest in enumerate(digests) if row == 0 or int.from_bytes(digest) % CHUNK_ROWS == 0]
    chunks = [range(*limits) for limits in itertools.pairwise([*starts, len(dataset)])]
    names = [hashlib.sha256(b"".join(digests[rows.start : rows.stop])).hexdigest()[:32] for rows in chunks]
    return [(folder / f"{name}.arrow", rows) for name, rows in zip(names, chunks, strict=True)]


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


# Checkpoints and the result -------------------------------------------------------------------------------------------
def list_checkpoints(output_dir):
    """The complete checkpoints in `output_dir` as [(step, Path)], oldest first."""
    steps = [(path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in steps if step.isdecimal() and path.is_dir())


def find_start(accelerator, args):
    """Where the run starts: a checkpoint (or None), its state and the seed. To be called by every process."""
    output_dir = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    found = [path for _, path in reversed(list_checkpoints(output_dir))]
    earlier_run = bool(found) or any((output_dir / name).exists() for name in ("model_index.json", ADAPTER))
    if earlier_run and not wanted:
        raise RunError(f"--output_dir {output_dir}: holds an earlier run; --resume_from_checkpoint or another folder")
    if wanted and wanted != "latest":
        named = output_dir / f"checkpoint-{Path(wanted).name.removeprefix('checkpoint-')}"
        found = [Path(wanted) if Path(wanted).is_dir() else named]
    complete = ((path, state) for path in found if (state := read_checkpoint(path)))
    checkpoint, state = next(complete, (None, {"step": 0, "examples_seen": 0, "seed": int.from_bytes(os.urandom(4))}))
    if wanted and not checkpoint and (earlier_run or wanted != "latest"):
        raise RunError(f"--resume_from_checkpoint {wanted}: there is no complete checkpoint in {output_dir}")
    if wanted and not checkpoint:
        logger.warning(f"--resume_from_checkpoint: no checkpoint in {output_dir}, starting at step 0")
    if "architecture" in state:
        raise RunError(f"--resume_from_checkpoint {checkpoint}: was written by the JAX script")
    if len(set(gather_object([(state["step"], str(checkpoint))]))) > 1:
        raise RunError(f"--output_dir {output_dir}: must be on a disk that all processes share")
    (seed,) = broadcast_object_list([state["seed"] if args.seed is None else args.seed])
    if checkpoint:
        check_flags(args, checkpoint, state["arguments"], recorded_arguments(args, seed))
    return checkpoint, state, seed


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


def save_checkpoint(accelerator, args, name, model, ema, optimizer, state):
    """Write checkpoint-<step> atomically, with `model` in folder `name`; prune older ones. Called by every process."""
    final = Path(args.output_dir) / f"checkpoint-{state['step']}"
    partial = final.with_name(final.name + ".partial")
    with naming(f"{final} cannot be written (is its disk full?)"), contextlib.ExitStack() as cleanup:
        partial.mkdir(exist_ok=True)
        if accelerator.is_main_process:
            cleanup.callback(shutil.rmtree, partial, ignore_errors=True)  # what a failed save leaves
        if accelerator.distributed_type == "FSDP":
            accelerate.utils.save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, partial)
        elif accelerator.is_main_process:
            torch.save(optimizer.state_dict(), partial / "optimizer.bin")
        if accelerator.scaler and accelerator.is_main_process:  # fp16
            torch.save(accelerator.scaler.state_dict(), partial / "scaler.pt")
        for folder, weights in {name: model, f"{name}_ema": ema}.items():
            full = weights and full_model(accelerator, weights)
            if full and accelerator.is_main_process:
                save = full.save_lora_adapter if args.rank else full.save_pretrained
                save(partial / folder)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sizes = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*.*")}
            contents = {**state, "arguments": recorded_arguments(args, state["seed"]), "files": sizes}
            (partial / "training_state.json").write_text(json.dumps(contents, indent=2), encoding="utf-8")
            flush_to_disk(*partial.rglob("*"), partial)
            partial.rename(final)
            flush_to_disk(final.parent)
            for step, path in list_checkpoints(args.output_dir)[: -(args.checkpoints_total_limit or sys.maxsize)]:
                if step not in [entry["step"] for entry in state["best"]]:
                    shutil.rmtree(path.rename(path.with_name(path.name + ".partial")))  # a crash leaves no half of one
    logger.info(f"saved {final}")
    accelerator.wait_for_everyone()


def load_optimizer(accelerator, model, optimizer, folder):
    """Load the optimizer's state and fp16's loss scale; hyperparameters are those of the flags. Raises RunError."""
    with naming(f"{folder}: the optimizer cannot be loaded (runs with and without FSDP cannot resume each other)"):
        if accelerator.distributed_type == "FSDP":
            accelerate.utils.load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
        else:
            optimizer.load_state_dict(torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True))
        if accelerator.scaler and (folder / "scaler.pt").exists():  # not after a run in float32 or bf16
            accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
    for group in optimizer.param_groups:
        group.update(optimizer.defaults, initial_lr=optimizer.defaults["lr"])
    for parameter, state in optimizer.state.items():  # fused AdamW pairs elements by their order in memory
        state.update({k: torch.empty_like(parameter).copy_(state[k]) for k in state.keys() & {"exp_avg", "exp_avg_sq"}})


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


def full_model(accelerator, model):
    """The unwrapped model; of a sharded one a full copy on the main process, else None. Every process must call it."""
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.distributed_type != "FSDP":
        return unwrapped
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    with accelerate.init_empty_weights(include_buffers=False):
        full = type(unwrapped).from_config(unwrapped.config)
    full.load_state_dict(weights, assign=True)
    return full.eval()


def save_result(accelerator, args, pipeline, save_adapter, **trained):
    """Write `pipeline` with its trained part, or call save_adapter(model, folder). To be called by every process."""
    folder = Path(args.output_dir)
    with naming(f"{folder} cannot be written"):
        parts = {name: full_model(accelerator, model) for name, model in trained.items()}
        if accelerator.is_main_process and args.rank:
            save_adapter(*parts.values(), folder)
        elif accelerator.is_main_process:
            pipeline.register_modules(**parts)
            pipeline.save_pretrained(folder)
        if accelerator.is_main_process:
            flush_to_disk(*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors"))


def check_folders(args):
    """Raise RunError if a model is a file, missing or without weights, or --output_dir cannot or must not be used."""
    models = {flag: path for flag, path in vars(args).items() if flag.startswith("pretrained") and path}
    for flag, path in models.items():
        if Path(path).is_file():
            raise RunError(f"--{flag} {path}: is a single file; convert it by from_single_file and save_pretrained")
        if path.startswith(("/", ".")) and not Path(path).is_dir():
            raise RunError(f"--{flag} {path}: there is no such folder")
        for part in Path(path).glob("*/config.json"):
            found = {file.stem.partition(".")[2].partition("-0")[0] for file in part.parent.glob("*.safetensors")}
            if (getattr(args, "variant", None) or "") not in found and (found or any(part.parent.glob("*.bin"))):
                convert = "if you trust them: DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)"
                way = "change --variant or leave it out" if "variant" in args else "the whole weights are needed"
                hint = f"variant {min(found) or '(none)'}; {way}" if found else f"pickles, no safetensors; {convert}"
                raise RunError(f"--{flag} {path}: {part.parent.name}/ has only {hint}")
    folder = Path(args.output_dir).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    data = [Path(path) for path in (args.train_data_dir, args.validation_data_dir, args.dataset_name) if path]
    of_a_run = any((folder / name).exists() for name in ("model_index.json", ADAPTER))
    problems = {
        "is empty": not args.output_dir,
        "is the model to start from": folder in [Path(model).resolve() for model in models.values()],
        "holds the training images": any(path.exists() and path.resolve().is_relative_to(folder) for path in data),
        "has a README.md of something else": (folder / "README.md").exists() > of_a_run,
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
        for folder in output_dir.glob("checkpoint-*.partial"):  # of saving or pruning
            shutil.rmtree(folder)
        for step, folder in list_checkpoints(output_dir):
            if first_step < step and first_step < last_step:
                aside = folder.rename(output_dir / f"set-aside-{time.time():.0f}-{folder.name}")
                logger.info(f"{folder} is later than the checkpoint to resume from; moved to {aside}")


# Processes and signals ------------------------------------------------------------------------------------------------
def make_accelerator(args):
    """The `Accelerator` of the flags and of accelerate's configuration. Raises RunError if it cannot be used."""
    folders = ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir))
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # one process encodes, the others wait
    options = {"mixed_precision": args.mixed_precision, "project_config": folders, "kwargs_handlers": [patience]}
    options |= {"dataloader_config": accelerate.DataLoaderConfiguration(non_blocking=True)}
    with naming(f"--mixed_precision {args.mixed_precision}, --report_to {args.report_to}"):
        accelerator = accelerate.Accelerator(log_with=None if args.report_to == "none" else args.report_to, **options)
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps  # the launcher may have set another
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and accelerator.num_processes == 1:
        raise RunError("each process would train alone: on CPUs set ACCELERATE_USE_CPU=true for the launcher")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise RunError("--mixed_precision fp16: needs a GPU, a CPU has bf16")
    if args.half_precision_norms and accelerator.mixed_precision == "no":
        raise RunError("--half_precision_norms: needs --mixed_precision bf16 or fp16")
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP") and not accelerator.is_fsdp2:
        raise RunError("accelerate's configuration: to shard a model use FSDP with fsdp_version: 2")
    if args.rank and accelerator.distributed_type == "FSDP":
        raise RunError("--rank: adapters train without sharding; turn FSDP off in accelerate's configuration")
    if args.report_to not in ("all", "none") and not accelerator.log_with:
        raise RunError(f"--report_to {args.report_to}: not installed here, run `pip install {args.report_to}`")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    above_bar = logging.Handler()
    above_bar.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    above_bar.emit = lambda record: tqdm.write(printable(above_bar.format(record)), file=sys.stderr)
    logger.handlers = [above_bar]
    logger.propagate = False
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity(max(logger.level, logging.WARNING))
        library.utils.logging.disable_progress_bar()
    diffusers.models.modeling_utils.logger.addFilter(lambda record: "kept in float32" not in record.msg)  # without need
    if {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys() and "RANK" not in os.environ:
        logger.warning("accelerate launch: this process trains alone; add --multi_gpu, or on CPUs use torchrun")
        if os.environ["MASTER_ADDR"] not in ("127.0.0.1", "localhost"):
            raise RunError("accelerate launch: one of several processes, which would each train alone; add --multi_gpu")
    return accelerator


def on_main_process(accelerator, function, *arguments):
    """Call the function on the main process only. Every process returns its result, or raises its RunError."""
    result = None
    if accelerator.is_main_process:
        try:
            result = function(*arguments)
        except RunError as error:
            result = error
    (result,) = broadcast_object_list([result])
    if isinstance(result, RunError):
        raise result
    return result


@contextlib.contextmanager
def noted_signals():
    """Within the block, stop signals are only recorded: (signal, time). One after more than a second exits at once."""
    noted = []

    def note(signum, _):
        noted.append((signum, time.monotonic()))
        if noted[-1][1] - noted[0][1] > 1:  # before, a launcher passes on what a terminal has sent to all
            end_workers()
            os._exit(128 + signum)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it may set handlers
    with contextlib.ExitStack() as restore:
        for signum in STOP_SIGNALS if in_main_thread else ():
            restore.callback(signal.signal, signum, signal.signal(signum, note))  # which returns the handler before
        yield noted


def ignore_stop_signals(worker):
    """Leave stop signals to the main process: schedulers send them to all, and it still needs its data workers."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def exit_after(signum, where):
    """Exit with status 128 + signum at a point where the run can resume; not for 0."""
    if signum:
        logger.warning(f"stopped by {signal.Signals(signum).name} {where}")
        sys.exit(128 + signum)


def end_workers():
    """Kill the data workers: they ignore stop signals, and multiprocessing would wait for them for ever at exit."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for each worker that is killed
    for worker in torch.multiprocessing.active_children():
        worker.kill()


def noted_anywhere(noted, group):
    """The first signal noted by any process, or 0. group: of gloo, so that no GPU is waited for; None: one process."""
    if group is None:
        return noted[0][0] if noted else 0
    signum = torch.tensor(noted[0][0] if noted else 0)
    torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX, group)
    return int(signum)


# Weights, optimizer and average ---------------------------------------------------------------------------------------
def to_device(accelerator, args, model, device=None):
    """Move a model that trains, or its average, to the device. Channels-last weights are faster, but not on CPUs."""
    # FSDP needs contiguous weights; bitsandbytes makes them so in its first update, and a resumed run would differ.
    contiguous = accelerator.distributed_type == "FSDP" or args.use_8bit_adam
    if accelerator.device.type == "cuda" and not contiguous:
        model.to(memory_format=torch.channels_last)
    for module in model.modules() if args.half_precision_norms else ():
        if type(module) in (torch.nn.GroupNorm, torch.nn.LayerNorm):
            module.forward = functools.partial(half_precision_norm, module)
    # A copy, since Windows deletes no file that is mapped into memory.
    return model._apply(lambda tensor: tensor.to(device or accelerator.device, copy=True))


def half_precision_norm(norm, hidden):
    """Return a norm's output in autocast's half precision, not in float32. Statistics are in float32 either way."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return type(norm).forward(norm, hidden)
    dtype = torch.get_autocast_dtype(device)
    weight, bias = (value if value is None else value.to(dtype) for value in (norm.weight, norm.bias))
    with torch.autocast(device, enabled=False):
        if isinstance(norm, torch.nn.GroupNorm):
            return torch.nn.functional.group_norm(hidden.to(dtype), norm.num_groups, weight, bias, norm.eps)
        return torch.nn.functional.layer_norm(hidden.to(dtype), norm.normalized_shape, weight, bias, norm.eps)


def add_adapter(args, model, dtype, seed, folder=None):
    """Freeze the model in `dtype`, add a float32 adapter (arXiv:2106.09685), new or of `folder`. Raises RunError."""
    layers = args.lora_target_modules or ["to_q", "to_k", "to_v", "to_out.0"]
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [f".{name}" for name, module in model.named_modules() if isinstance(module, kinds)]
    if unknown := [layer for layer in layers if not any(name.endswith(f".{layer}") for name in names)]:
        known = sorted({re.sub(r".*\.(?=[a-z])", "", name) for name in names})  # without the path to them
        raise RunError(f"--lora_target_modules {' '.join(unknown)}: no such layer; the model has {' '.join(known)}")
    torch.nn.Module.to(model.requires_grad_(False), dtype)  # diffusers' own `to` warns for no reason
    with naming(f"--lora_target_modules {' '.join(layers)}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_generator(seed, 4).integers(2**32)))
        model.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.lora_alpha or args.rank, target_modules=layers))
    cast_training_params(model)
    if folder:
        set_peft_model_state_dict(model, safetensors.torch.load_file(folder / ADAPTER))


def make_optimizer(args, parameters, device, lr_scale=1):
    """AdamW in 8 bits, or fused if the device (torch.device) has such a kernel. Raises RunError."""
    optimizer_class = functools.partial(torch.optim.AdamW, fused=device.type in ("cuda", "xpu", "mps", "cpu"))
    if args.use_8bit_adam:
        with naming("--use_8bit_adam: needs bitsandbytes, run `pip install bitsandbytes`"):
            from bitsandbytes.optim import AdamW8bit as optimizer_class
    settings = {"lr": args.learning_rate * lr_scale, "betas": (args.adam_beta1, args.adam_beta2)}
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return optimizer_class(parameters, eps=args.adam_epsilon, weight_decay=args.adam_weight_decay, **settings)


def make_ema(accelerator, args, model, folder=None):
    """A copy of the model for the average, which shares frozen weights; when resuming, the one in `folder` (Path)."""
    if folder and not args.rank:
        ema = type(model).from_pretrained(folder, use_safetensors=True)
    else:
        ema = copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})
    if folder and args.rank:
        set_peft_model_state_dict(ema, safetensors.torch.load_file(folder / ADAPTER))
    ema.requires_grad_(False).eval()
    ema.forward = accelerate.utils.convert_outputs_to_fp32(ema.forward)  # as of the trained model in mixed precision
    is_sharded = accelerator.distributed_type == "FSDP"
    on_cpu = is_sharded or ("offload_ema" in args and args.offload_ema)
    ema = to_device(accelerator, args, ema, torch.device("cpu") if on_cpu else None)
    return accelerate.utils.fsdp2_prepare_model(accelerator, ema) if is_sharded else ema


@torch.no_grad()
def update_ema(ema, model, step):
    """ema ← decay · ema + (1 − decay) · weights after update `step` (from 1), with the decay of diffusers' EMAModel."""
    decay = min(0.9999, step / (9 + step)) if step > 1 else 0
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    averages, weights = zip(*((average, weight) for average, weight in pairs if weight.requires_grad), strict=True)
    torch._foreach_lerp_(averages, [weight.to(averages[0].device) for weight in weights], 1 - decay)


# Validation, logs and Hub ---------------------------------------------------------------------------------------------
@contextlib.contextmanager
def evaluating(accelerator, model):
    """Evaluation mode: on the device, no gradients, dropout or compilation. Yields the model's forward in autocast."""
    training = model.training
    model.eval()
    # Moving a model, even to the same device, reshards it: FSDP leaves it unsharded without a backward pass.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), offload_models(model, device=accelerator.device):
        yield accelerator.autocast()(model.__call__)
    model.train(training)


def validate(accelerator, args, model, generate, seed, step):
    """Generate every validation prompt from fixed noise, and write the pictures as one grid and to the trackers."""
    images = []
    prompts = [prompt for prompt in args.validation_prompts for _ in range(args.num_validation_images)]
    # Padded to equally many on each process: a sharded model needs all of them for every picture.
    shares = accelerator.split_between_processes(list(enumerate(prompts)), apply_padding=True)
    with evaluating(accelerator, model), accelerator.autocast(), shares as own_prompts:
        for index, prompt in own_prompts:
            generator = torch.Generator().manual_seed(int(random_generator(seed, 2, index).integers(2**32)))
            images.append((index, generate(prompt, generator)))
    images = [image for _, image in sorted(dict(gather_object(images)).items())]
    if not accelerator.is_main_process:
        return
    path = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with naming(f"{path} cannot be written"):
        path.parent.mkdir(exist_ok=True)
        torchvision.utils.save_image(pixels / 255, path, nrow=4)
    for tracker in (tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")):
        tracker.log_images({"validation": pixels if tracker.name == "tensorboard" else images}, step=step)
    logger.info(f"validation pictures: {path}")


def progress_bar(total, unit, iterable=None, **options):
    """A tqdm bar; where stderr is no terminal, a line in the log every half minute."""
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):  # in a notebook tqdm draws a bar of its own
        line = "{desc}: {n_fmt} of {total_fmt} {unit}s{postfix}, {remaining} left"
        log = argparse.Namespace(write=lambda text: text.strip() and logger.info(text.strip()))
        options |= {"file": log, "bar_format": line, "mininterval": 30, "delay": 30, "miniters": 1, "leave": False}
    return tqdm(iterable, total=total, unit=unit, **options)


def log_plan(accelerator, args, model, run, first_step, last_step, validation_period):
    """Log what the run will do. model: to start from; run: see `check_resume`; validation_period: in examples."""
    size = run["batch_size"]
    epochs = (last_step - first_step) * size / run["rows"]
    span = f" ({epochs:.1f} epochs)" if epochs else " (no update is left)"
    drawn = f"pictures every {validation_period / size:.0f}" if args.validation_prompts else "no pictures"
    device = f"{accelerator.num_processes} x {accelerator.device.type}, --mixed_precision {accelerator.mixed_precision}"
    logger.info(f"fine-tuning {model} on {device}")
    logger.info(f"{run['rows']} images, {size} per step, steps {first_step} to {last_step}{span}, seed {run['seed']}")
    logger.info(f"to {args.output_dir}: a checkpoint every {args.checkpointing_steps} steps, {drawn}")


def log_result(args, code, loss):
    """Log where everything is, and `code`: Python that generates a picture with the result. loss: of `HeldOut`."""
    names = [name for name in ("README.md", "validation", args.logging_dir) if Path(args.output_dir, name).exists()]
    names.append(f"checkpoints ({len(list_checkpoints(args.output_dir))})")
    logger.info(f"saved the result in {args.output_dir}; there too: {', '.join(names)}{loss}")
    tqdm.write(f"Generate a picture with it:\n\n{code}", file=sys.stderr)


class HeldOut:
    """Held-out rows and the history of their loss: mean squared error, the same crops and noise whatever the flags."""

    def __init__(self, accelerator, args, rows, preprocess, num_train_timesteps, start):
        off = ["random_flip", "proportion_empty_prompts", "noise_offset", "input_perturbation", "dream_training"]
        self.accelerator = accelerator
        self.args = argparse.Namespace(**vars(args) | dict.fromkeys([*off, "snr_gamma"], 0) | {"center_crop": True})
        self.length = num_train_timesteps  # of the noise schedule
        self.history = start.get("validation", [])  # best: [its lowest entry], [] if that checkpoint is not here
        self.best = [e for e in start.get("best", []) if Path(args.output_dir, f"checkpoint-{e['step']}").exists()]
        preprocess = functools.partial(preprocess.func, self.args, *preprocess.args[1:])
        self.stream = ExampleStream(rows, preprocess, seed=2**64)
        self.batches = list(make_batches(accelerator, args, self.stream, range(len(rows)))) if len(rows) else []

    def evaluate(self, step, model, training_losses, frozen_parts, log):
        """Log the loss after `step` updates. Called by every process. Returns whether --keep_best is to save for it."""
        losses = []
        with evaluating(self.accelerator, self.accelerator.unwrap_model(model)) as predict:
            for part, batch in itertools.product(range(1, 16, 2), self.batches):  # middles of eighths of the schedule
                batch["timesteps"].fill_(self.length * part // 16)
                losses.append(self.accelerator.gather(training_losses(batch, predict, *frozen_parts, self.args)))
        losses = torch.cat(losses).cpu().double().view(4, 2, -1)[:, :, : len(self.stream.rows)]  # without padding
        names = [f"validation_loss/t{self.length * k // 4:03d}-{self.length * (k + 1) // 4 - 1:03d}" for k in range(4)]
        loss = losses.mean().item()
        values = {"validation_loss": loss, **dict(zip(names, losses.mean((1, 2)).tolist(), strict=True))}
        self.accelerator.log(values, step=step)
        log.bar.set_description_str(f"validation loss {loss:.4f}", refresh=False)
        logger.info(f"step {step}: validation loss {loss:.4f}")
        self.history.append({"step": step, "train_loss": float(np.mean(log.recent)), **values})
        is_best = self.args.keep_best and loss < min([math.inf, *(entry["validation_loss"] for entry in self.best)])
        self.best = self.history[-1:] if is_best else self.best
        path = Path(self.args.output_dir) / "validation" / "loss.png"
        if self.accelerator.is_main_process and importlib.util.find_spec("matplotlib"):
            path.parent.mkdir(exist_ok=True)
            axes = importlib.import_module("matplotlib.figure").Figure().subplots()
            table = datasets.Dataset.from_list(self.history).to_pandas()
            table.plot("step", ["train_loss", "validation_loss"], ax=axes, style=".-").figure.savefig(path)
        return is_best

    def summary(self):
        """The checkpoint that is kept for its loss, as the end of a sentence."""
        return "".join(f"; best validation loss {e['validation_loss']:.4f}: checkpoint-{e['step']}" for e in self.best)


class UpdateLog:
    """Starts the trackers and logs every update, but reads loss and gradient norm from the device only in `flush`."""

    def __init__(self, accelerator, args, run, start, last_step):
        self.accelerator = accelerator
        self.batch_size = run["batch_size"]
        self.updates = []
        self.waits = []  # for batches, as (begin, end)
        self.recent = start.get("recent_losses", [])  # at most 100, smoothed by the plot of losses
        self.nonfinite = 0
        settings = {"wandb": {"settings": {"x_disable_meta": True}}}  # else it keeps the command line, with the token
        with naming(f"--report_to {args.report_to}"):
            accelerator.init_trackers(args.tracker_project_name, recorded_arguments(args, run["seed"]), settings)
        self.bar = progress_bar(last_step, "step", initial=start["step"], disable=not accelerator.is_main_process)

    def next_batch(self, batches):
        """The next micro-batch. The first one after `flush` starts the clock; the wait is logged as "data_wait"."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waits.append((begin, time.perf_counter()))
        return batch

    def add(self, step, losses, gradient_norm, learning_rate):
        """Take in an update; losses (b,) and gradient_norm () stay on the device."""
        gradient_norm = gradient_norm.full_tensor() if hasattr(gradient_norm, "full_tensor") else gradient_norm  # FSDP
        self.updates.append((step, time.time(), torch.stack([losses.mean(), gradient_norm]), learning_rate))
        self.bar.update()

    def flush(self):
        """Log all updates since the last time. To be called by every process. Raises RunError if one is not finite."""
        values = torch.stack([on_device for _, _, on_device, _ in self.updates])
        values = self.accelerator.reduce(values, "mean").tolist()  # waits for the device; nothing else does
        seconds = time.perf_counter() - self.waits[0][0]
        waited = sum(end - begin for begin, end in self.waits)
        speed = {"examples_per_second": len(values) * self.batch_size / seconds, "data_wait": waited / seconds}
        for (step, walltime, _, learning_rate), (loss, norm) in zip(self.updates, values, strict=True):
            update = {"train_loss": loss, "grad_norm": norm, "lr": learning_rate, **speed}
            self.accelerator.log(update, step=step, log_kwargs={"tensorboard": {"walltime": walltime}})
            self.recent = [*self.recent[-99:], loss]
            self.nonfinite = 0 if math.isfinite(loss + norm) else self.nonfinite + 1
            if self.nonfinite >= (20 if self.accelerator.scaler else 1):  # fp16 skips some to find its loss scale
                raise RunError(f"step {step}: loss {loss}, gradient norm {norm}; try a lower --learning_rate")
        self.bar.set_postfix_str(f"loss={loss:.4f}, images/s={speed['examples_per_second']:.1f}", refresh=False)
        self.updates.clear()
        self.waits.clear()


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


def error_line(args, error):
    """One line about a RunError, an error of the operating system or a lack of memory; of other errors None."""
    lost = isinstance(error, (ConnectionError, EOFError)) and "dataloader.py" in traceback.format_exc()
    if lost or re.search(r"worker \(pid|</torch_", str(error)):
        return "a data worker has ended: no memory, or no room in /dev/shm (--shm-size)? Lower --dataloader_num_workers"
    if not re.search("MemoryError|out of memory|allocate memory|ALLOC_FAILED", repr(error)):
        line = str(error).rpartition("RunError: ")[2].strip()  # a data worker puts a traceback before it
        return line if isinstance(error, RunError) or getattr(error, "errno", None) else None
    tasks = {"cached_encodings": "encoding images", "validate": "generating pictures", "next_batch": "reading images"}
    task = next((task for name, task in tasks.items() if f", in {name}\n" in traceback.format_exc()), "training")
    size = f"--train_batch_size {args.train_batch_size} and --resolution {args.resolution}"
    less = ["mixed_precision", "cache_encodings", "use_8bit_adam", "gradient_checkpointing"]
    less += ["offload_ema"] * args.use_ema + ["rank"]
    less = [f"--{flag}" for flag in less if getattr(args, flag, True) in (None, False, "no")] + ["a lower --resolution"]
    if args.train_batch_size > 1:
        less.insert(0, "smaller batches, with more --gradient_accumulation_steps")
    return f"out of memory while {task}, with {size}; these need less, cheapest first: {', '.join(less)}"


if __name__ == "__main__":
    try:
        main(command_line)
    except Exception as error:
        end_workers()  # first: torch's handler raises for one that has died, also in what follows
        line = error_line(command_line, error)
        if line is None:
            raise
        tqdm.write(f"error: {printable(line)}", file=sys.stderr)
        sys.exit(1)
    finally:
        end_workers()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in a notebook the process goes on
