"""Fine-tune Stable Diffusion 1.x or 2.x on captioned images.

    accelerate launch train_text_to_image.py \
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir=my_images --use_ema --learning_rate=1e-5 --max_train_steps=15000

Over latents x_0 of images, their captions c, timesteps t and noise ε ~ N(0, I), it minimises

    E [ w(t) · ‖ target − unet(x_t, t, c) ‖² ]    with    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε

where target is ε (Ho et al. 2020, arXiv:2006.11239, eq. 14, with Rombach et al. 2022, arXiv:2112.10752, for the
latents), √ᾱ_t · ε − √(1 − ᾱ_t) · x_0 (v-prediction: Salimans & Ho 2022, arXiv:2202.00512) or x_0, as the model's
scheduler says, and w(t) is 1 or the Min-SNR weight (Hang et al. 2023, arXiv:2303.09556).
"""

import argparse
import contextlib
import functools
import glob
import io
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import diffusers
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torchvision
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast_object_list
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi, ModelCardData
from pyarrow import compute
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)


class RunError(Exception):
    """What stops a run, said in one line that names the flag, file or row. The script prints it and ends with 1."""


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    """Read the flags of `input_args` (list of str; None: the command line). Impossible values end with status 2."""
    raw, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s FLAGS (--help lists them)"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw)
    choices_of_interpolation = ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="pipeline to start from: a folder or a Hub id")
    add("--revision", help="branch, tag or commit of the pipeline on the Hub")
    add("--variant", help="variant of its weight files, such as fp16")
    add("--non_ema_revision", help="Hub revision of the UNet to train, if it is not --revision")
    add("--cache_dir", help="where downloads of models and data sets are kept")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="data set: a Hub id, a local copy of one, or a folder saved by save_to_disk")
    add("--dataset_config_name", help="configuration of that data set, if it has several")
    add("--train_data_dir", help="folder of images, with their captions in its metadata.jsonl")
    add("--image_column", default="image", help="column that holds the images")
    add("--caption_column", default="text", help="column that holds a caption, or a list to draw one from")
    add("--max_train_samples", type=int, help="train on so many rows, drawn at random with --seed")
    add("--resolution", type=int, default=512, help="side of the square training images, in pixels")
    add("--center_crop", action="store_true", help="crop the middle of an image instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images, at random")
    add("--image_interpolation_mode", default="lanczos", choices=choices_of_interpolation, help="filter for resizing")
    add("--proportion_empty_prompts", type=float, default=0, help="share of captions left out, so that guidance works")
    add("--dataloader_num_workers", type=int, default=0, help="processes that read images; 0: the main one does")

    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction", "sample"], help="default: what the scheduler says")
    add("--snr_gamma", type=float, help="weight timesteps by Min-SNR with this gamma; the paper takes 5.0")
    add("--noise_offset", type=float, default=0, help="scale of noise that is the same for all pixels of a channel")
    add("--input_perturbation", type=float, default=0, help="scale of extra noise on the UNet's input; try 0.1")
    add("--dream_training", action="store_true", help="train on what the model predicts (DREAM); a forward pass more")
    add("--dream_detail_preservation", type=float, default=1.0, help="the exponent p of DREAM; larger keeps detail")

    add = parser.add_argument_group("optimisation").add_argument
    add("--seed", type=int, help="seed of the whole run; without one it is drawn, and kept in the checkpoints")
    add("--train_batch_size", type=int, default=16, help="images per process and micro-step")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per update of the weights")
    add("--num_train_epochs", type=int, default=100, help="passes over the data, if --max_train_steps is not given")
    add("--max_train_steps", type=int, help="updates of the weights in the whole run")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply it by processes x accumulation steps x batch size")
    add("--lr_scheduler", default="constant", choices=schedules, help="course of the learning rate over the updates")
    add("--lr_warmup_steps", type=int, default=500, help="updates in which it rises from 0 (not for 'constant')")
    add("--adam_beta1", type=float, default=0.9, help="decay of AdamW's mean of gradients")
    add("--adam_beta2", type=float, default=0.999, help="decay of AdamW's mean of squared gradients")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=float, default=1e-08, help="AdamW's epsilon")
    add("--use_8bit_adam", action="store_true", help="keep AdamW's state in 8 bits (bitsandbytes)")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what accelerate is configured to")
    add("--allow_tf32", action="store_true", help="allow TF32 matrix products on NVIDIA GPUs: faster, coarser")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="attention by xformers")
    add("--local_rank", type=int, default=-1, help="accepted and not needed: the launcher tells each process its rank")

    add = parser.add_argument_group("EMA").add_argument
    add("--use_ema", action="store_true", help="keep an average of the weights; it is validated and saved")
    add("--offload_ema", action="store_true", help="keep that average in main memory between updates")
    add("--foreach_ema", action="store_true", help="accepted and not needed: the average is always updated that way")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", default="sd-model-finetuned", help="folder for the pipeline, its checkpoints and logs")
    add("--checkpointing_steps", type=int, default=500, help="updates from one checkpoint to the next")
    add("--checkpoints_total_limit", type=int, help="keep the newest so many checkpoints; default: all")
    add("--resume_from_checkpoint", nargs="?", const="latest", help="go on from checkpoint-<step>, or the latest")

    add = parser.add_argument_group("validation and logs").add_argument
    add("--validation_prompts", nargs="+", help="prompts to draw while training and at its end")
    add("--validation_epochs", type=int, default=5, help="passes over the data from one drawing to the next")
    add("--validation_steps", type=int, help="updates from one drawing to the next, instead of epochs")
    add(
        "--logging_steps", type=int, default=10, help="updates from one reading of the loss to the next; all are logged"
    )
    add("--logging_dir", default="logs", help="folder of the TensorBoard logs, inside --output_dir")
    add("--report_to", default="tensorboard", choices=LoggerType.list(), help="tracker, or all that are installed")
    add("--tracker_project_name", default="text2image-fine-tune", help="name of the project in the tracker")

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="upload the result; the permission is tried before training")
    add("--hub_model_id", help="repository to upload to; default: the name of --output_dir, under your account")
    add("--hub_token", help="access token; better: `hf auth login`, which keeps it out of the shell's history")

    args = parser.parse_args(input_args)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """End with status 2 and one line if a value can't be right whatever the model and the data are."""
    rules = {
        "must be larger than 0": lambda value: value > 0,
        "must not be negative": lambda value: value >= 0,
        "must be from 0 to 1": lambda value: 0 <= value <= 1,
        "must be from 0 to below 1": lambda value: 0 <= value < 1,
    }
    flags = {
        "must be larger than 0": """max_train_samples resolution snr_gamma train_batch_size gradient_accumulation_steps
            num_train_epochs max_train_steps learning_rate adam_epsilon max_grad_norm checkpointing_steps
            checkpoints_total_limit validation_epochs validation_steps logging_steps""",
        "must not be negative": """dataloader_num_workers noise_offset input_perturbation dream_detail_preservation seed
            lr_warmup_steps adam_weight_decay""",
        "must be from 0 to 1": "proportion_empty_prompts",
        "must be from 0 to below 1": "adam_beta1 adam_beta2",
    }
    for rule, names in flags.items():
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not (rules[rule](value) and (value < math.inf or name == "max_grad_norm")):
                parser.error(f"argument --{name}: {rule}, not {value}")
    if os.path.normpath(args.logging_dir) == ".":
        parser.error("argument --logging_dir: must name a folder of its own")
    if not args.dataset_name and not args.train_data_dir:
        parser.error("give a data set: --dataset_name (Hub id or folder) or --train_data_dir (folder of images)")


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def first_line(error):
    """The first line of what an exception says that is not empty, or else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def naming(what):
    """Turn what a library raises inside the block into a RunError whose one line starts with `what` (str)."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # libraries raise all kinds here, and wrap the telling one in others
        while error.__cause__ is not None:
            error = error.__cause__
        raise RunError(f"{what}: {first_line(error)}") from error


def load_train_dataset(args, columns, seed):
    """Load the training split that the data flags name, or --max_train_samples rows of it drawn by `seed`.

    columns: the flags that name the columns to load, such as ["image_column"]. Returns a `datasets.Dataset` whose image
    column gives {"bytes", "path"}, undecoded, so that an image which can't be read is named. Raises RunError for a
    data set, column or caption that is not as the flags say.
    """
    folder = Path(args.dataset_name or args.train_data_dir)
    if args.dataset_name and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
        with naming(f"--dataset_name {folder}"):
            dataset = datasets.load_from_disk(str(folder))
    elif args.dataset_name:
        with naming(f"--dataset_name {args.dataset_name}"):
            dataset = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, data_dir=args.train_data_dir, cache_dir=args.cache_dir
            )
    else:
        if not folder.is_dir():
            raise RunError(f"--train_data_dir {folder}: there is no such folder")
        kinds = PIL.Image.registered_extensions()
        if not any(path.suffix.lower() in kinds for path in folder.rglob("*")):
            raise RunError(f"--train_data_dir {folder}: there are no images in it")
        with naming(f"--train_data_dir {folder}"):
            files = {"train": glob.escape(str(folder)) + "/**"}
            dataset = datasets.load_dataset("imagefolder", data_files=files, cache_dir=args.cache_dir)
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise RunError(f"{folder}: the data set has no split 'train', only {', '.join(dataset)}")
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise RunError(f"{folder}: the data set has no rows")
    for flag in columns:
        check_column(dataset, flag, getattr(args, flag))
    dataset = dataset.select_columns([getattr(args, flag) for flag in columns])
    if args.max_train_samples:
        dataset = dataset.select(random_generator(seed, 3).permutation(len(dataset))[: args.max_train_samples])
    return dataset.cast_column(args.image_column, datasets.Image(decode=False))


def check_column(dataset, flag, column):
    """Raise RunError unless `column` is there and holds images (flag "image_column"), or text or lists of text."""
    if column not in dataset.column_names:
        hint = "" if len(dataset.column_names) > 1 else "; captions of a folder stand in its metadata.jsonl"
        raise RunError(f"--{flag} {column}: no such column; there are {', '.join(dataset.column_names)}{hint}")
    feature = dataset.features[column]
    if flag == "image_column" and not isinstance(feature, datasets.Image):
        raise RunError(f"--{flag} {column}: holds {feature}, not images")
    text = getattr(feature, "feature", feature)  # of a list, its elements
    if flag == "caption_column" and getattr(text, "dtype", None) not in ("string", "large_string"):
        raise RunError(f"--{flag} {column}: holds {feature}, not text or lists of text")
    row = compute.index(dataset.data.column(column).is_null(), True).as_py()  # -1 if there is none
    if row < 0 and text is not feature:
        row = next((row for row, captions in enumerate(dataset[column]) if not captions or None in captions), -1)
    if row >= 0:
        raise RunError(f"--{flag} {column}: row {row} is empty")


def check_images(dataset, image_column, limit=1000):
    """Read the first `limit` images, so that a bad one is found before the run writes anything. Raises RunError."""

    def check(row):
        try:
            read_image(dataset[row][image_column])
        except RunError as error:
            raise RunError(f"row {row}: {error}") from error

    with ThreadPoolExecutor(os.cpu_count()) as executor:  # Pillow decodes without holding Python's lock
        for _ in executor.map(check, range(min(limit, len(dataset)))):
            pass


def read_image(value):
    """Decode an image file of any mode to an upright RGB `PIL.Image` with transparency laid on white.

    `value` is {"bytes": bytes or None, "path": str or None}. Raises RunError with the file's name if that fails.
    """
    try:
        image = PIL.Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]))
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to 255
            image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.mode == "F":  # floats are taken as 0 to 1
            image = PIL.Image.fromarray((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for bad files
        raise RunError(f"image {value['path'] or '(unnamed)'} cannot be read: {error}") from error


def train_transforms(image, resolution, interpolation, center_crop, random_flip, rng):
    """Resize the shorter side, crop a square, maybe mirror it.

    image: RGB `PIL.Image`; interpolation: a name of `--image_interpolation_mode`; rng: `np.random.Generator`.
    Returns a float tensor (3, resolution, resolution) in [-1, 1].
    """
    image = transforms.resize(image, resolution, InterpolationMode(interpolation.replace("_", "-")))
    # Three draws whatever the flags are: turning one on changes nothing else that is drawn for the example.
    top, left, flip = rng.random(3)
    if center_crop:
        image = transforms.center_crop(image, resolution)
    else:
        top, left = int(top * (image.height - resolution + 1)), int(left * (image.width - resolution + 1))
        image = transforms.crop(image, top, left, resolution, resolution)
    if random_flip and flip < 0.5:
        image = transforms.hflip(image)
    return transforms.to_tensor(image) * 2 - 1


def choose_caption(captions, proportion_empty_prompts, rng):
    """Draw one of `captions` (str or list of str), or "" in the given share of cases."""
    choice, dropout = rng.random(2)
    if dropout < proportion_empty_prompts:
        return ""
    return captions if isinstance(captions, str) else captions[int(choice * len(captions))]


def tokenize_captions(captions, tokenizer):
    """Tokenize n captions (list of str) to tensors "input_ids" and "attention_mask", (n, 77) at CLIP's length."""
    length = tokenizer.model_max_length
    return tokenizer(captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt")


def preprocess_train(args, tokenizer, latents_shape, num_train_timesteps, row, rng):
    """Make a training example of a dataset's row, with everything random about it drawn from `rng` in a fixed order.

    latents_shape: (channels, height, width). Returns tensors: "pixel_values" (3, resolution, resolution) in [-1, 1],
    "input_ids" (77,), "posterior_noise" and "noise" of latents_shape, "timesteps" (), and with the flags that use
    them "offset_noise" (channels, 1, 1) and "perturbation_noise" of latents_shape.
    """

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    crop = (args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip)
    pixel_values = train_transforms(read_image(row[args.image_column]), *crop, rng)
    caption = choose_caption(row[args.caption_column], args.proportion_empty_prompts, rng)
    example = {"pixel_values": pixel_values, "input_ids": tokenize_captions([caption], tokenizer).input_ids[0]}
    example["posterior_noise"] = normal(*latents_shape)
    example["timesteps"] = torch.tensor(rng.integers(num_train_timesteps))
    example["noise"] = normal(*latents_shape)
    if args.noise_offset:
        example["offset_noise"] = normal(latents_shape[0], 1, 1)
    if args.input_perturbation:
        example["perturbation_noise"] = normal(*latents_shape)
    return example


def random_generator(seed, *key):
    """Return the `np.random.Generator` that belongs to `key` (ints) in the run of `seed`.

    NumPy's SeedSequence mixes all bits of all numbers; `torch.Generator` keeps only 32 bits of its seed.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@functools.lru_cache(maxsize=2)  # a batch lies in at most a few epochs, mostly one or two
def permutation(seed, epoch, length):
    """Return the order in which `epoch` goes through `length` rows, an int64 array."""
    return random_generator(seed, 0, epoch).permutation(length)


class ExampleStream(torch.utils.data.Dataset):
    """Positions `first` to `last` of a run: position k is (row, randomness), both functions of the seed and k alone.

    dataset: rows, a sequence of dicts; preprocess: function of (row, `np.random.Generator`) to a dict of tensors.
    """

    def __init__(self, dataset, preprocess, seed, first, last):
        self.dataset, self.preprocess, self.seed, self.first, self.last = dataset, preprocess, seed, first, last

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, index):
        position = self.first + index
        epoch, place = divmod(position, len(self.dataset))
        row = int(permutation(self.seed, epoch, len(self.dataset))[place])
        try:
            return self.preprocess(self.dataset[row], random_generator(self.seed, 1, position))
        except RunError as error:
            raise RunError(f"row {row}: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Objective
# ----------------------------------------------------------------------------------------------------------------------


def add_noise(clean, noise, alphas_cumprod):
    """x_t = √ᾱ · x_0 + √(1 − ᾱ) · ε (arXiv:2006.11239, eq. 4). All broadcast; alphas_cumprod is ᾱ_t, in [0, 1]."""
    return alphas_cumprod.sqrt() * clean + (1 - alphas_cumprod).sqrt() * noise


def prediction_target(prediction_type, clean, noise, alphas_cumprod):
    """What the model has to predict, of clean's shape: ε, √ᾱ · ε − √(1 − ᾱ) · x_0 (arXiv:2202.00512) or x_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * clean
    return clean


def predicted_noise(prediction_type, prediction, noisy, alphas_cumprod):
    """The ε that a prediction stands for, given x_t: `prediction_target` solved for ε. Finite for ᾱ < 1."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return alphas_cumprod.sqrt() * prediction + (1 - alphas_cumprod).sqrt() * noisy
    return (noisy - alphas_cumprod.sqrt() * prediction) / (1 - alphas_cumprod).sqrt()


def signal_to_noise_ratio(alphas_cumprod):
    """SNR = ᾱ / (1 − ᾱ) (arXiv:2303.09556, section 3): 0 at zero terminal SNR, infinite at ᾱ = 1."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(prediction_type, snr, gamma):
    """The Min-SNR-γ weight of a squared error, of snr's shape (arXiv:2303.09556, section 3.4).

    min(SNR, γ) for a prediction of x_0, min(SNR, γ) / SNR for ε and min(SNR, γ) / (SNR + 1) for v, written so that
    they are finite at SNR = 0.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma)


def dream(noisy, noise, predicted, alphas_cumprod, detail_preservation):
    """Diffusion Rectification and Estimation-Adaptive Models (DREAM, arXiv:2312.00210, algorithm 2).

    Moves the noise by Δ = (√(1 − ᾱ))^p · (ε − ε_predicted), and x_t with it. `predicted` carries no gradient.
    Returns the new (noisy, noise).
    """
    sigma = (1 - alphas_cumprod).sqrt()
    delta = sigma**detail_preservation * (noise - predicted)
    return noisy + sigma * delta, noise + delta


def weighted_squared_error(prediction, target, weight):
    """Mean over the batch of weight · mean squared error; prediction, target (b, ...), weight (b,). Returns ()."""
    squared_error = (prediction.float() - target.float()).square()
    return (weight * squared_error.flatten(1).mean(1)).mean()


def training_loss(batch, unet, vae, text_encoder, alphas_cumprod, prediction_type, args):
    """The loss of a micro-batch from `preprocess_train` (tensors with a batch dimension), a scalar tensor.

    alphas_cumprod: ᾱ of all timesteps, (num_train_timesteps,). Only the UNet gets a gradient. Pure: all that is
    random comes with the batch.
    """
    with torch.no_grad():
        posterior = vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * batch["posterior_noise"]
        latents = latents * vae.config.scaling_factor
        encoder_hidden_states = text_encoder(batch["input_ids"]).last_hidden_state

    timesteps, noise = batch["timesteps"], batch["noise"]
    alphas = alphas_cumprod[timesteps, None, None, None]
    if args.noise_offset:
        noise = noise + args.noise_offset * batch["offset_noise"]
    input_noise = noise
    if args.input_perturbation:  # arXiv:2301.11706: the input gets this noise, the target does not
        input_noise = noise + args.input_perturbation * batch["perturbation_noise"]
    noisy_latents = add_noise(latents, input_noise, alphas)
    if args.dream_training:
        with torch.no_grad():
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        predicted = predicted_noise(prediction_type, model_pred, noisy_latents, alphas)
        noisy_latents, noise = dream(noisy_latents, noise, predicted, alphas, args.dream_detail_preservation)

    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    target = prediction_target(prediction_type, latents, noise, alphas)
    weight = torch.ones_like(timesteps, dtype=torch.float32)
    if args.snr_gamma:
        weight = min_snr_weight(prediction_type, signal_to_noise_ratio(alphas_cumprod[timesteps]), args.snr_gamma)
    return weighted_squared_error(model_pred, target, weight)


def check_objective(prediction_type, alphas_cumprod):
    """Raise RunError if the pair can't be trained: at zero terminal SNR, x_t is ε itself and says nothing of x_0."""
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise RunError(
            f"prediction type {prediction_type}: of the scheduler's, only epsilon, v_prediction and sample are known"
        )
    if prediction_type == "epsilon" and alphas_cumprod[-1] < 1e-6:
        raise RunError(
            "prediction type epsilon: the scheduler has zero terminal SNR, where the input is pure noise and "
            "predicting it teaches nothing about the image; use v_prediction or sample"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

CHECKPOINT_STATE = "training_state.json"


def list_checkpoints(output_dir):
    """List the finished checkpoints in `output_dir` as [(step, Path)], oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((int(path.name.removeprefix("checkpoint-")), path) for path in folders if path.is_dir())


def find_checkpoint(output_dir, wanted):
    """Say where a run starts; `wanted` is the value of --resume_from_checkpoint. Returns a Path, or None for anew.

    In this order: no flag: anew, if `output_dir` holds no checkpoints or model that would be lost; "latest": the one
    with the highest step, anew if there is none; a folder that exists, "checkpoint-<step>" or "<step>": that one.
    Raises RunError.
    """
    checkpoints = list_checkpoints(output_dir)
    names = ", ".join(path.name for _, path in checkpoints)
    if wanted is None:
        if checkpoints or (Path(output_dir) / "model_index.json").exists():
            raise RunError(
                f"--output_dir {output_dir}: holds an earlier run's {names or 'model'}; add "
                "--resume_from_checkpoint to go on with it, or name another folder"
            )
        return None
    if wanted == "latest":
        return checkpoints[-1][1] if checkpoints else None
    named = Path(output_dir) / (f"checkpoint-{wanted}" if wanted.isdecimal() else Path(wanted).name)
    for path in (Path(wanted), named):
        if path.name.startswith("checkpoint-") and path.is_dir():
            return path
    raise RunError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; there are {names or 'none'}")


def read_checkpoint(checkpoint):
    """Read the state of a checkpoint folder: a dict with "step", "examples_seen", "seed", "arguments", "files".

    Raises RunError if it is not one, or if a file is missing or not as long as it was when saved.
    """
    with naming(f"{checkpoint}: not a checkpoint of this script, {CHECKPOINT_STATE}"):
        state = json.loads((checkpoint / CHECKPOINT_STATE).read_text())
        state = {name: state[name] for name in ("step", "examples_seen", "seed", "arguments", "files")}
    for name, size in state["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes long, not {size}" if path.is_file() else "missing"
            raise RunError(f"{checkpoint}: the checkpoint is damaged, {name} is {found}")
    return state


def check_resume(args, checkpoint, state, name):
    """Log where the run goes on, and which flags changed since its checkpoint. Raises RunError if it can't go on so.

    name: the folder of the trained weights in a checkpoint.
    """
    if checkpoint is None:
        logger.info(f"--resume_from_checkpoint: no checkpoint in {args.output_dir}, starting anew")
        return
    before, now = state["arguments"], recorded_arguments(args, state["seed"] if args.seed is None else args.seed)
    names = sorted((before.keys() | now.keys()) - {"resume_from_checkpoint", "output_dir"})
    changes = [f"--{name} {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
    logger.info(f"going on from {checkpoint}" + (f", now with {', '.join(changes)}" if changes else ""))
    if not (checkpoint / name).is_dir():
        raise RunError(f"--resume_from_checkpoint {checkpoint}: holds no {name}/, it is of another script")
    if args.use_ema and not before["use_ema"]:
        raise RunError(f"--use_ema: {checkpoint} holds no average, its run was without the flag")
    if args.use_8bit_adam != before["use_8bit_adam"]:
        raise RunError(f"--use_8bit_adam: the optimizer in {checkpoint} is of the other kind")


def keep_weights_apart(accelerator):
    """Let accelerate save and load all but the weights, which lie beside its files as `from_pretrained` reads them."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def load_optimizer(accelerator, optimizer, checkpoint):
    """Load all state that is no weight. Learning rate, betas and the like stay as the flags say. Raises RunError."""
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    with naming(f"{checkpoint}: the checkpoint is damaged"):
        accelerator.load_state(str(checkpoint))
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    accelerator.step = 0  # checkpoints lie between updates, whatever the number of accumulation steps was


def flush_to_disk(*paths):
    """Wait until files and folders are on disk; a folder stands for its list of names only."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)  # some network file systems refuse it for folders
        os.close(descriptor)


def remove_checkpoint(path):
    """Delete a checkpoint folder. Renamed first: a crash must not leave half of one under a checkpoint's name."""
    shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))


def save_checkpoint(accelerator, args, name, model, ema, state):
    """Write checkpoint-<step> whole or not at all, then prune older ones down to --checkpoints_total_limit.

    Holds the weights of `model` in folder `name`, those of `ema` (EMAModel or None) in <name>_ema, the optimizer's
    state, and `state`: {"step", "examples_seen", "seed"}. To be called by every process. A folder
    "checkpoint-<step>.partial" is what a crash left of one.
    """
    final = Path(args.output_dir) / f"checkpoint-{state['step']}"
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))  # optimizer, schedule, scaler, by every process that holds part of them
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(partial / name)
        if ema:
            with evaluation_weights(model, ema):
                accelerator.unwrap_model(model).save_pretrained(partial / f"{name}_ema")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        contents = {**state, "arguments": recorded_arguments(args, state["seed"]), "files": files}
        (partial / CHECKPOINT_STATE).write_text(json.dumps(contents, indent=2))
        flush_to_disk(*partial.rglob("*"), partial)
        partial.rename(final)
        flush_to_disk(final.parent)
        for _, path in list_checkpoints(args.output_dir)[: -(args.checkpoints_total_limit or sys.maxsize)]:
            remove_checkpoint(path)
        logger.info(f"saved {final}")
    accelerator.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------------
# Reporting
# ----------------------------------------------------------------------------------------------------------------------


def log_validation(pipeline, vae, text_encoder, accelerator, args, seed, step):
    """Draw every validation prompt, each from noise of its own that is the same at every step of the run.

    pipeline: the result's `StableDiffusionPipeline`; vae, text_encoder: their copies on the training device. Returns
    the Path of the grid.
    """
    images = []
    on_device = {"vae": vae, "text_encoder": text_encoder, "safety_checker": None}
    pipeline = StableDiffusionPipeline(**{**pipeline.components, **on_device}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": args.resolution, "width": args.resolution}
    for index, prompt in enumerate(args.validation_prompts):
        generator = validation_generator(seed, index)
        with torch.no_grad(), accelerator.autocast():
            images += pipeline(prompt, num_inference_steps=20, generator=generator, **size).images
    return save_validation(images, accelerator, args, step)


def validation_generator(seed, index):
    """The `torch.Generator` of validation prompt number `index` in the run of `seed`, on the CPU."""
    return torch.Generator().manual_seed(int(random_generator(seed, 2, index).integers(2**32)))


def save_validation(images, accelerator, args, step):
    """Write the images (list of `PIL.Image`) as one PNG grid, and to the trackers. Returns the grid's Path."""
    path = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    grid = torchvision.utils.make_grid([transforms.to_tensor(image) for image in images], nrow=4)
    torchvision.utils.save_image(grid, path)
    arrays = np.stack([np.asarray(image) for image in images])
    log_images = {"tensorboard": {"values": {"validation": arrays}, "dataformats": "NHWC"}}
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images(step=step, **log_images.get(tracker.name, {"values": {"validation": images}}))
    logger.info(f"drew {path}")
    return path


class UpdateLog:
    """Collects what is known of every update and hands it to the trackers, waiting for the device only then.

    Logged per update: loss (mean over the global batch), learning rate, norm of the gradient before clipping,
    examples per second, and the share of the time in which the process waited for data.
    """

    def __init__(self, accelerator, first_step, last_step):
        self.accelerator, self.updates = accelerator, []
        hidden = not accelerator.is_main_process or first_step >= last_step
        self.progress_bar = tqdm(initial=first_step, total=last_step, disable=hidden, unit="step")
        self.restart_clock()

    def restart_clock(self):
        """Start timing the next update now: what happened since the last one was no training."""
        self.started = time.perf_counter()

    def add(self, step, loss, gradient_norm, learning_rate, examples, waited):
        """loss, gradient_norm: tensors (), left on the device; examples: images of all processes; waited: seconds."""
        now = time.perf_counter()
        speed = {"examples_per_second": examples / (now - self.started), "data_wait": waited / (now - self.started)}
        self.updates.append((step, time.time(), torch.stack([loss, gradient_norm]), {"lr": learning_rate, **speed}))
        self.started = now
        self.progress_bar.update()

    def flush(self):
        """Hand over all updates since the last time. To be called by every process."""
        if not self.updates:
            return
        values = torch.stack([on_device for _, _, on_device, _ in self.updates])
        values = self.accelerator.reduce(values, "mean").tolist()  # the CPU waits for the device here, and only here
        for (step, walltime, _, on_host), (loss, gradient_norm) in zip(self.updates, values, strict=True):
            update = {"train_loss": loss, "grad_norm": gradient_norm, **on_host}
            self.accelerator.log(update, step=step, log_kwargs={"tensorboard": {"walltime": walltime}})
        speeds = [on_host["examples_per_second"] for *_, on_host in self.updates]
        speed = len(speeds) / sum(1 / speed for speed in speeds)
        self.progress_bar.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{speed:.1f}")
        self.updates.clear()


# W&B would keep the command line otherwise, and an access token in it.
TRACKER_SETTINGS = {"wandb": {"settings": {"x_disable_meta": True}}}


def recorded_arguments(args, seed):
    """The flags that have a value, and the seed: plain values for trackers and files, and never the access token."""
    values = {**vars(args), "seed": seed, "hub_token": None}
    values = {name: value for name, value in sorted(values.items()) if value is not None}
    return {name: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for name, v in values.items()}


def describe_result(args, name, steps):
    """What the card of the model `name` says of its kind: (metadata, one sentence, Python code that uses it)."""
    base, source = args.pretrained_model_name_or_path, args.dataset_name or args.train_data_dir
    metadata = ModelCardData(
        base_model=hub_id(base),
        datasets=[source] if hub_id(source) else None,
        library_name="diffusers",
        tags=["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training"],
    )
    prompt = json.dumps((args.validation_prompts or ["a prompt"])[0], ensure_ascii=False)
    usage = f"""from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({json.dumps(name)})
pipeline({prompt}).images[0].save("picture.png")"""
    return metadata, f"`{base}`, fine-tuned on `{source}` for {steps} updates of its UNet.", usage


def hub_id(name):
    """`name` if it is an id on the Hub, None if it is a local folder, which the Hub takes for no id."""
    return None if Path(name).exists() else name


def save_model_card(args, name, seed, metadata, sentence, usage, validation_image):
    """Write output_dir/README.md for the model `name`. validation_image: Path of the last grid, or None.

    metadata: `ModelCardData`; sentence: what was trained; usage: Python code.
    """
    pictures = ""
    if validation_image:
        prompts = [json.dumps(prompt, ensure_ascii=False) for prompt in args.validation_prompts]
        drawn = "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(prompts, 1))
        path = validation_image.relative_to(args.output_dir).as_posix()
        pictures = f"![pictures of the validation prompts]({path})\n\nThe pictures, row by row:\n\n{drawn}\n\n"
    flags = json.dumps(recorded_arguments(args, seed), indent=2, ensure_ascii=False)
    title = hub_id(name) or Path(name).resolve().name
    card = f"---\n{metadata.to_yaml()}\n---\n\n# {title}\n\n{sentence}\n\n{pictures}"
    card += f"## Use\n\n```python\n{usage}\n```\n\n## Flags of the training run\n\n```json\n{flags}\n```\n"
    (Path(args.output_dir) / "README.md").write_text(card, encoding="utf-8")


def prepare_hub_repository(args):
    """Create the repository to upload to, if need be, and try the permission to write. Returns its id, or RunError."""
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with naming(f"--push_to_hub {name}"):
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    return repo_id


def push_to_hub(args, repo_id):
    """Upload output_dir without checkpoints and logs. Raises RunError with the command that does it by hand."""
    logs = os.path.relpath(os.path.join(args.output_dir, args.logging_dir), args.output_dir)
    ignored = [
        "checkpoint-*/*",
        "set-aside-*/*",
        f"{glob.escape(logs)}/*",
    ]  # `*` stands for any number of sub-folders here
    try:
        api = HfApi(token=args.hub_token)
        api.upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=ignored)
    except Exception as error:  # whatever went wrong, the model is on disk and the user has to know
        exclude = [word for pattern in ignored for word in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", repo_id, args.output_dir, ".", *exclude])
        where = f"the model is in {args.output_dir}, upload it by: {command}"
        raise RunError(f"--push_to_hub: {first_line(error)}; {where}") from error
    logger.info(f"uploaded to {repo_id}")


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def on_main_process(accelerator, function, *arguments):
    """Call the function on the main process alone. Every process returns its result, or raises its RunError."""
    result = error = None
    if accelerator.is_main_process:
        try:
            result = function(*arguments)
        except RunError as caught:
            error = str(caught)
    result, error = broadcast_object_list([result, error])
    if error:
        raise RunError(error)
    return result


class AboveProgressBar(logging.Handler):
    """Writes log lines to stderr without tearing the progress bar apart."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr)


def configure_logging(accelerator, args):
    """Let the main process speak, the others only of errors, and no progress bar but that of the training.

    Raises RunError if the tracker is not installed.
    """
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    handler = AboveProgressBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity(max(level, logging.WARNING))
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    if args.report_to != "all" and not accelerator.log_with:
        raise RunError(f"--report_to {args.report_to}: not installed here, run `pip install {args.report_to}`")


@contextlib.contextmanager
def evaluation_weights(model, ema):
    """Put `model` into evaluation mode, with the weights of `ema` (EMAModel or None: its own), within the block."""
    model.eval()
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(list(model.parameters()))
        model.train()


def place_ema(ema, device, offload):
    """Put the average on the device (torch.device), or into main memory that the device reads fast."""
    if not offload:
        ema.to(device)
    elif device.type == "cuda":
        ema.pin_memory()


def update_ema(ema, parameters, device, offload):
    """Take `parameters` into the average; an offloaded one visits the device for it, without the CPU waiting."""
    stored = ema.shadow_params
    if offload:
        ema.to(device, non_blocking=True)
    ema.step(parameters)
    if offload:
        torch._foreach_copy_(stored, ema.shadow_params, non_blocking=True)
        ema.shadow_params = stored


def check_model_folder(flag, path, parts):
    """Raise RunError if `path`, the value of `flag`, is a local folder that lacks one of the sub-folders `parts`."""
    folder = Path(path)
    if not folder.is_dir() and path.startswith(("/", ".", "~")):
        raise RunError(f"--{flag} {path}: there is no such folder")
    for part in parts if folder.is_dir() else ():
        if not (folder / part).is_dir():
            raise RunError(f"--{flag} {path}: the folder has no {part}/, which a pipeline of this kind needs")
        if (folder / part / "config.json").exists() and not any((folder / part).glob("*.safetensors")):
            raise RunError(f"--{flag} {path}: {part}/ holds no .safetensors, and no other weights are loaded")


def vae_factor(vae):
    """How many pixels of an image's side a latent stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_tokenizer(tokenizer, text_encoder):
    """Raise RunError if they do not belong together: a tokenizer that lacks its files comes up empty, silently."""
    tokens, embeddings = len(tokenizer), text_encoder.config.vocab_size
    if tokens != embeddings:
        raise RunError(
            f"the tokenizer knows {tokens} tokens and the text encoder {embeddings}: is tokenizer/ complete?"
        )


def check_architecture(unet, vae, text_encoder, tokenizer, resolution):
    """Raise RunError unless the models are Stable Diffusion's 1.x or 2.x, and the VAE takes the resolution."""
    check_tokenizer(tokenizer, text_encoder)
    if unet.config.in_channels != vae.config.latent_channels:
        raise RunError(
            f"--pretrained_model_name_or_path: the UNet takes {unet.config.in_channels} channels and the VAE makes "
            f"{vae.config.latent_channels}; inpainting and depth models are not supported"
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size or unet.config.addition_embed_type:
        raise RunError(
            f"--pretrained_model_name_or_path: the UNet expects text states of width {unet.config.cross_attention_dim} "
            f"and the text encoder makes {text_encoder.config.hidden_size}; only Stable Diffusion 1.x and 2.x do"
        )
    factor = vae_factor(vae)
    if resolution % factor:
        larger = (resolution // factor + 1) * factor
        raise RunError(f"--resolution {resolution}: the VAE takes multiples of {factor}, such as {larger}")


def enable_xformers(unet):
    """Use xformers' attention. It is tried on a small tensor first. Raises RunError where it does not work."""
    try:
        import xformers.ops

        queries = torch.zeros(1, 8, 1, 16, device=unet.device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(queries, queries, queries)
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # it raises many kinds, for a missing package, device or build
        raise RunError(
            "--enable_xformers_memory_efficient_attention: xformers does not work here "
            f"({first_line(error)}); leave the flag out, PyTorch's own attention is already memory-efficient"
        ) from error


def make_optimizer(args, parameters, device, scale):
    """AdamW with `scale` times the learning rate, in 8 bits or fused where the device (torch.device) has a kernel."""
    kernel = {"fused": device.type in ("cuda", "xpu", "mps", "cpu")}
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise RunError("--use_8bit_adam: needs bitsandbytes, run `pip install bitsandbytes`") from error
        kernel = {}
    return optimizer_class(
        parameters,
        lr=args.learning_rate * scale,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **kernel,
    )


def make_lr_scheduler(args, optimizer, first_step, last_step):
    """The learning rate as a function of the update, entered at `first_step`: it has no state of its own to save."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    course = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": last_step}
    with naming(f"--lr_scheduler {args.lr_scheduler}"):
        return get_scheduler(args.lr_scheduler, optimizer, **course, last_epoch=first_step - 1)


def check_output_dir(args, models):
    """Raise RunError if the result can't be written to output_dir, or would lie among or over what is the user's.

    models: the folders or Hub ids to start from.
    """
    folder, name = Path(args.output_dir).resolve(), f"--output_dir {args.output_dir}"
    if folder in [Path(model).resolve() for model in models]:
        raise RunError(f"{name}: is the model to start from, which would be overwritten")
    if args.train_data_dir and Path(args.train_data_dir).resolve().is_relative_to(folder):
        raise RunError(f"{name}: holds the training images; name another folder")
    if (folder / "README.md").exists() and not (folder / "model_index.json").exists():
        raise RunError(f"{name}: has a README.md of something else, which the model card would replace")
    for path in (folder, folder / args.logging_dir):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise RunError(f"{name}: {existing} is a file, not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RunError(f"{name}: no permission to write to {existing}")


def prepare_output_dir(args, first_step, last_step):
    """Make output_dir, without what a crash left of checkpoints. Those behind `first_step`, which the run goes on from,
    are set aside: they belong to another course of the run. Raises RunError."""
    output_dir = Path(args.output_dir)
    with naming(f"--output_dir {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        for folder in (*output_dir.glob("checkpoint-*.partial"), *output_dir.glob("checkpoint-*.removed")):
            shutil.rmtree(folder)
        for step, folder in list_checkpoints(output_dir):
            if first_step < step <= last_step:
                aside = folder.rename(output_dir / f"set-aside-{time.time():.0f}-{folder.name}")
                logger.info(f"{folder} is of an earlier course of the run, and is now {aside}")


def validation_due(args, step, examples_before, examples_after, num_rows):
    """Whether to draw after update `step`: every --validation_steps, else each time so many epochs have gone by."""
    if not args.validation_prompts:
        return False
    if args.validation_steps:
        return step % args.validation_steps == 0
    period = args.validation_epochs * num_rows
    return examples_after // period > examples_before // period


def main(args):
    """Train as `args` (from `parse_args`) say. Every launcher ends here. Raises RunError."""
    check_output_dir(args, [args.pretrained_model_name_or_path])
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise RunError("--mixed_precision fp16: needs a GPU, a CPU has bf16")
    configure_logging(accelerator, args)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    # Where the run starts: step 0, or a checkpoint.
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    state = read_checkpoint(checkpoint) if checkpoint else {"step": 0, "examples_seen": 0, "seed": secrets.randbits(32)}
    first_step, examples_seen = state["step"], state["examples_seen"]
    seed = broadcast_object_list([state["seed"] if args.seed is None else args.seed])[0]
    if args.resume_from_checkpoint:
        check_resume(args, checkpoint, state, "unet")

    # Models: the UNet in float32, the frozen ones in the precision of the mixed-precision mode.
    path, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    weights = {**hub, "variant": args.variant, "use_safetensors": True, "dtype": torch.float32}
    unet_weights = {**weights, "revision": args.non_ema_revision or args.revision}
    frozen_weights = {**weights, "dtype": weight_dtype}
    check_model_folder("pretrained_model_name_or_path", path, ["scheduler", "tokenizer", "text_encoder", "vae", "unet"])
    with naming(f"--pretrained_model_name_or_path {path}" + (f", {checkpoint}" if checkpoint else "")):
        noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **hub)
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **hub)
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", **frozen_weights)
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae", **frozen_weights)
        if checkpoint:
            unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", use_safetensors=True)
        else:
            unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", **unet_weights)
        ema_start = unet
        if args.use_ema and checkpoint:
            ema_start = UNet2DConditionModel.from_pretrained(checkpoint / "unet_ema", use_safetensors=True)
        # All that the result is made of, in full precision, so that nothing can be missing after the training.
        pipeline = None
        if accelerator.is_main_process:
            pipeline = StableDiffusionPipeline.from_pretrained(path, unet=unet, **weights)
    check_architecture(unet, vae, text_encoder, tokenizer, args.resolution)
    ema_unet = None
    if args.use_ema:
        ema_unet = EMAModel(ema_start.parameters(), foreach=True)
        ema_unet.optimization_step = first_step
    prediction_type = args.prediction_type or noise_scheduler.config.prediction_type
    if pipeline:
        pipeline.scheduler.register_to_config(prediction_type=prediction_type)  # what it samples is what it learned
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)
    check_objective(prediction_type, alphas_cumprod)

    # Data: one stream of examples for the whole run, entered where the checkpoint was made.
    dataset = load_train_dataset(args, ["image_column", "caption_column"], seed)
    on_main_process(accelerator, check_images, dataset, args.image_column)
    batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    examples_left = max(0, args.num_train_epochs * len(dataset) - examples_seen)
    last_step = args.max_train_steps or first_step + math.ceil(examples_left / batch_size)
    end = examples_seen + max(0, last_step - first_step) * batch_size
    latents_shape = (vae.config.latent_channels, *[args.resolution // vae_factor(vae)] * 2)
    preprocess = functools.partial(preprocess_train, args, tokenizer, latents_shape, len(alphas_cumprod))
    train_dataloader = torch.utils.data.DataLoader(
        ExampleStream(dataset, preprocess, seed, examples_seen, end),
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )

    # Optimizer.
    vae.requires_grad_(False).to(accelerator.device)
    text_encoder.requires_grad_(False).to(accelerator.device)
    unet.train().to(accelerator.device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        enable_xformers(unet)
    if ema_unet:
        place_ema(ema_unet, accelerator.device, args.offload_ema)
    optimizer = make_optimizer(args, unet.parameters(), accelerator.device, batch_size if args.scale_lr else 1)
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    keep_weights_apart(accelerator)
    if checkpoint:
        load_optimizer(accelerator, optimizer, checkpoint)
    lr_scheduler = make_lr_scheduler(args, optimizer, first_step, last_step)

    # Everything that can refuse the run has spoken: from here on it writes.
    repo_id = on_main_process(accelerator, prepare_hub_repository, args) if args.push_to_hub else args.hub_model_id
    on_main_process(accelerator, prepare_output_dir, args, first_step, last_step)
    accelerator.init_trackers(args.tracker_project_name, recorded_arguments(args, seed), TRACKER_SETTINGS)

    # Loop.
    steps = f"steps {first_step} to {max(first_step, last_step)}"
    logger.info(f"{len(dataset)} images, {batch_size} per step, {steps}, seed {seed}")
    log = UpdateLog(accelerator, first_step, last_step)
    batches = iter(train_dataloader)
    for step in range(first_step + 1, last_step + 1):
        update_loss = waited = 0
        for _ in range(args.gradient_accumulation_steps):
            wait_started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - wait_started
            with accelerator.accumulate(unet):
                loss = training_loss(batch, unet, vae, text_encoder, alphas_cumprod, prediction_type, args)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            update_loss += loss.detach() / args.gradient_accumulation_steps
        if ema_unet:
            update_ema(ema_unet, unet.parameters(), accelerator.device, args.offload_ema)
        log.add(step, update_loss, gradient_norm, lr_scheduler.get_last_lr()[0], batch_size, waited)
        lr_scheduler.step()

        examples_seen += batch_size
        save = step % args.checkpointing_steps == 0
        draw = validation_due(args, step, examples_seen - batch_size, examples_seen, len(dataset)) and step < last_step
        if save or draw or step % args.logging_steps == 0 or step == last_step:
            log.flush()
        if save:
            state = {"step": step, "examples_seen": examples_seen, "seed": seed}
            save_checkpoint(accelerator, args, "unet", unet, ema_unet, state)
        if draw and accelerator.is_main_process:
            with evaluation_weights(unet, ema_unet):
                log_validation(pipeline, vae, text_encoder, accelerator, args, seed, step)
        if save or draw:
            log.restart_clock()
    log.progress_bar.close()

    # Result.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        validation_image = None
        with evaluation_weights(unet, ema_unet):
            pipeline.save_pretrained(args.output_dir)
            if args.validation_prompts:
                validation_image = log_validation(pipeline, vae, text_encoder, accelerator, args, seed, last_step)
        name = repo_id or args.output_dir
        save_model_card(args, name, seed, *describe_result(args, name, last_step), validation_image)
        logger.info(f"saved the pipeline in {args.output_dir}")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        push_to_hub(args, repo_id)


if __name__ == "__main__":
    try:
        main(parse_args())
    except RunError as error:
        reason = str(error).rpartition("RunError: ")[2].strip()  # from a data worker it comes behind a traceback
        tqdm.write(f"error: {reason}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        tqdm.write("stopped; --resume_from_checkpoint goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
