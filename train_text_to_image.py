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
import ctypes
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class RunError(Exception):
    """What stops a run, said in one line that names the flag, file or row. The script prints it and ends with 1."""


class RunStopped(Exception):
    """A signal has stopped a run where it can go on, `where` in words. The script ends with 128 + `signum`."""

    def __init__(self, signum, where):
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}")
        self.signum = signum


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    """Read the flags of `input_args` (list of str; None: the command line). Impossible values end with status 2."""
    raw, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s FLAGS (--help lists them)"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw)
    choices_of_interpolation = ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    trackers = ["all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]

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
    add("--dataloader_num_workers", type=int, help="processes that read images; default: 0, for a GPU up to 8")
    add(
        "--cache_encodings", help="folder for what the frozen encoders make of images and captions; made once, and kept"
    )
    add("--skip_bad_images", action="store_true", help="read all images before training, leave out those that can't be")
    add("--check_data", action="store_true", help="read and describe the whole data set instead of training")

    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction", "sample"], help="default: what the scheduler says")
    add("--snr_gamma", type=float, help="weight timesteps by Min-SNR with this gamma; the paper takes 5.0")
    add("--noise_offset", type=float, default=0, help="scale of noise that is the same for all pixels of a channel")
    add("--input_perturbation", type=float, default=0, help="scale of extra noise on the UNet's input; try 0.1")
    add("--dream_training", action="store_true", help="train on what the model predicts (DREAM); a forward pass more")
    add("--dream_detail_preservation", type=float, default=1.0, help="the exponent p of DREAM; larger keeps detail")

    add = parser.add_argument_group("optimisation").add_argument
    add("--seed", type=int, help="seed of the whole run; without one it is drawn, and kept in the checkpoints")
    add("--train_batch_size", type=int, default=16, help="images per device and micro-step")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per update of the weights")
    add("--num_train_epochs", type=int, default=100, help="passes over the data, if --max_train_steps is not given")
    add("--max_train_steps", type=int, help="updates of the weights in the whole run")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply it by devices x accumulation steps x batch size")
    add("--lr_scheduler", default="constant", choices=schedules, help="course of the learning rate over the updates")
    add("--lr_warmup_steps", type=int, default=500, help="updates in which it rises from 0 (not for 'constant')")
    add("--adam_beta1", type=float, default=0.9, help="decay of AdamW's mean of gradients")
    add("--adam_beta2", type=float, default=0.999, help="decay of AdamW's mean of squared gradients")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=float, default=1e-08, help="AdamW's epsilon")
    add("--use_8bit_adam", action="store_true", help="keep AdamW's state in 8 bits (bitsandbytes)")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    add("--optimizer_in_backward", action="store_true", help="update each weight once it has its gradient: less memory")
    add("--max_nonfinite_steps", type=int, help="stop at so many non-finite updates in a row; default: 1, with fp16 20")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what accelerate is configured to")
    add("--allow_tf32", action="store_true", help="allow TF32 matrix products on NVIDIA GPUs: faster, coarser")
    add("--half_precision_norms", action="store_true", help="normalise in the precision of --mixed_precision, too")
    add(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "reduce-overhead"],
        help="compile the trained model: minutes first, then maybe faster steps; reduce-overhead: with CUDA graphs",
    )
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="attention by xformers")
    add("--local_rank", type=int, default=-1, help="accepted and not needed: the launcher tells each process its rank")

    add = parser.add_argument_group("EMA").add_argument
    add("--use_ema", action="store_true", help="keep an average of the weights; it is validated and saved")
    add("--offload_ema", action="store_true", help="keep that average in main memory, and update it there")
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
    add("--report_to", default="tensorboard", choices=trackers, help="tracker, or all that are installed")
    add("--tracker_project_name", default="text2image-fine-tune", help="name of the project in the tracker")

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="upload the result; the permission is tried before training")
    add("--hub_model_id", help="repository to upload to; default: the name of --output_dir, under your account")
    add("--hub_token", help="access token; better: `hf auth login`, which keeps it out of the shell's history")

    args = parser.parse_args(input_args)
    check_args(parser, args)
    check_lever_flags(parser, args)
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
            checkpoints_total_limit validation_epochs validation_steps logging_steps max_nonfinite_steps""",
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
    project = os.path.normpath(os.path.join("logs", args.tracker_project_name))
    if not project.startswith("logs" + os.sep):
        parser.error(f"argument --tracker_project_name: {args.tracker_project_name} leads out of the logs' folder")
    if args.hub_token and not re.fullmatch("[!-~]+", args.hub_token):  # an error of the connection would quote it
        parser.error("argument --hub_token: it holds a blank, a line's end or a character outside ASCII")
    check_cache_flags(parser, args)
    if not args.dataset_name and not args.train_data_dir and getattr(args, "generate", None) is None:
        parser.error("give a data set: --dataset_name (Hub id or folder) or --train_data_dir (folder of images)")


def check_lever_flags(parser, args):
    """End with status 2 and one line if a flag for speed or memory can't go with another one."""
    if args.half_precision_norms and args.mixed_precision == "no":
        parser.error("argument --half_precision_norms: needs --mixed_precision bf16 or fp16")
    if not args.optimizer_in_backward:
        return
    if args.max_grad_norm < math.inf:
        parser.error("argument --optimizer_in_backward: nothing can be clipped by then; add --max_grad_norm=inf")
    if args.gradient_accumulation_steps > 1:
        parser.error("argument --optimizer_in_backward: leaves no gradient to --gradient_accumulation_steps")
    if args.mixed_precision == "fp16":
        parser.error("argument --optimizer_in_backward: does not work with fp16, whose gradients are scaled; take bf16")


def check_cache_flags(parser, args):
    """End with status 2 and one line if --cache_encodings can't be as it is."""
    if args.cache_encodings is None:
        return
    if not args.cache_encodings:
        parser.error("argument --cache_encodings: expected a folder")
    if not getattr(args, "center_crop", True):
        parser.error("argument --cache_encodings: a random crop is another image each time; add --center_crop")
    folder = Path(args.cache_encodings).resolve()
    if folder.is_relative_to(Path(args.output_dir).resolve()):
        parser.error("argument --cache_encodings: must not lie in --output_dir, which is uploaded as a whole")
    for flag, data in {"--train_data_dir": args.train_data_dir, "--dataset_name": args.dataset_name}.items():
        if data and folder.is_relative_to(Path(data).resolve()):
            parser.error(f"argument --cache_encodings: must not lie in {flag}, among the images")


# Before the imports below, which take seconds: --help and a wrong flag are answered at once.
if __name__ == "__main__":
    command_line = parse_args()

import datasets
import diffusers
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torchvision
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, init_empty_weights
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from datasets.arrow_writer import ArrowWriter
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi, ModelCardData, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers
from pyarrow import compute
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchvision.transforms import functional as transforms
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


HUB_PAUSES, HUB_TIMEOUT = (2, 8, 30), 60  # seconds: before each further attempt; without a sign of life
CONNECTION_ERROR = HfHubHTTPError.__bases__[0]  # httpx.HTTPError or httpx2's, as huggingface_hub is built on
MISSING_ON_HUB = (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError)


def printable(text):
    """`text` on one line: what would move a terminal's cursor, hide or reorder the rest is written as in JSON."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def first_line(error):
    """The first line of what an exception says that is not empty, or else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def telling_cause(error):
    """The exception behind `error` that says most: what failed between here and the Hub, or else its last cause.

    Where the Hub fails, libraries raise that a file is missing, often without naming the failure as the cause. Where
    the repository, revision or file is missing indeed, their sentence is the better one.
    """
    behind = error
    while behind is not None and (isinstance(behind, GatedRepoError) or not isinstance(behind, MISSING_ON_HUB)):
        if isinstance(behind, CONNECTION_ERROR):
            return behind
        behind = behind.__cause__ or behind.__context__
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error):
    """Why `error` came about, in one line; of what the Hub answers, the status and its message."""
    error = telling_cause(error)
    response = getattr(error, "response", None)
    if response is None:
        kind = "no valid JSON: " * isinstance(error, json.JSONDecodeError)
        return kind + "no answer from the Hub: " * isinstance(error, CONNECTION_ERROR) + first_line(error)
    message = getattr(error, "server_message", None)
    answer = f"HTTP {response.status_code} {response.reason_phrase} for {response.url.path}"
    return f"{answer}: {first_line(message)}" if message else answer


def pause_before_retry(error, pause):
    """The seconds, `pause` or what the Hub asks for, after which trying again may help; None if it never will."""
    if isinstance(error, json.JSONDecodeError):  # whatever stands before the Hub has answered, not the Hub
        return pause
    error = telling_cause(error)
    response = getattr(error, "response", None)
    if response is None:
        return pause if isinstance(error, CONNECTION_ERROR) else None
    if response.status_code not in (408, 429) and response.status_code < 500:
        return None
    asked = response.headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(response.headers)
    if limit and limit.remaining == 0:
        asked = str(limit.reset_in_seconds)
    return max(pause, min(int(asked), 300)) if asked.isdecimal() else pause


def with_retries(function, *arguments, **options):
    """function(*arguments, **options), which may ask the Hub, called again after a pause while its failure may pass."""
    for pause in (*HUB_PAUSES, None):
        get_session().timeout = HUB_TIMEOUT  # huggingface_hub would wait for ever; its session is a new one at times
        try:
            return function(*arguments, **options)
        except Exception as error:
            local = isinstance(error, json.JSONDecodeError) and arguments and Path(arguments[0]).exists()
            pause = None if local else pause and pause_before_retry(error, pause)
            if pause is None:
                raise
            logger.warning(f"{reason(error)}; trying again in {pause} s")
            time.sleep(pause)


@contextlib.contextmanager
def naming(what):
    """Turn what a library raises inside the block into a RunError whose one line starts with `what` (str)."""
    try:
        yield
    except (RunError, RunStopped):
        raise
    except Exception as error:  # libraries raise all kinds here, and wrap the telling one in others
        raise RunError(f"{what}: {reason(error)}") from error


@contextlib.contextmanager
def writing(path):
    """Turn what is raised while `path` (Path) is written into a RunError, which names a full disk as such."""
    try:
        with naming(f"{path} cannot be written"):
            yield
    except RunError as error:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if shutil.disk_usage(folder).free < 2**20:  # few libraries say so themselves
            raise RunError(f"{path} cannot be written: {os.strerror(errno.ENOSPC)}") from error
        raise


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
            options = {"data_dir": args.train_data_dir, "cache_dir": args.cache_dir}
            dataset = with_retries(datasets.load_dataset, args.dataset_name, args.dataset_config_name, **options)
    else:
        dataset = load_image_folder(folder, args.cache_dir)
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise RunError(f"{folder}: the data set has no split 'train', only {', '.join(dataset)}")
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise RunError(f"{folder}: the data set has no rows")
    for flag in columns:
        check_column(dataset, flag, getattr(args, flag))
        if not args.check_data:
            check_values(dataset, flag, getattr(args, flag))
    dataset = dataset.select_columns([getattr(args, flag) for flag in columns])
    if args.max_train_samples:
        dataset = dataset.select(random_generator(seed, 3).permutation(len(dataset))[: args.max_train_samples])
    return dataset.cast_column(args.image_column, datasets.Image(decode=False))


def load_image_folder(folder, cache_dir):
    """Load the value of --train_data_dir, a folder (Path) of images with a metadata file, as `datasets` does."""
    if not folder.is_dir():
        raise RunError(f"--train_data_dir {folder}: there is no such folder")
    kinds = PIL.Image.registered_extensions()
    if not any(path.suffix.lower() in kinds for path in folder.rglob("*")):
        raise RunError(f"--train_data_dir {folder}: there are no images in it")
    if links := outward_links(folder):
        logger.warning(
            f"--train_data_dir {folder}: {len(links)} symbolic links lead out of it, such as {links[0]}; "
            "what they lead to may be trained on"
        )
    with naming(f"--train_data_dir {folder}"):
        files = {"train": glob.escape(str(folder)) + "/**"}
        return datasets.load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)


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


def check_values(dataset, flag, column):
    """Raise RunError if a row of `column` (of flag "image_column" or "caption_column") has no image or no caption."""
    feature = dataset.features[column]
    values = dataset.data.column(column)
    rows = [compute.index(values.is_null(), True).as_py()]  # -1 if there is none
    if rows == [-1] and hasattr(feature, "feature"):  # lists of captions
        without = compute.list_flatten(values).is_null()
        rows = compute.filter(compute.list_parent_indices(values), without).slice(0, 1).to_pylist()
        rows.append(compute.index(compute.equal(compute.list_value_length(values), 0), True).as_py())
    if max(rows) >= 0:
        raise RunError(f"--{flag} {column}: row {min(row for row in rows if row >= 0)} is empty")


def outward_links(folder):
    """The symbolic links in `folder` (Path) that lead out of it, as ["name -> target"]."""
    root, found = folder.resolve(), []
    for parent, folders, files in os.walk(folder):
        links = [Path(parent, name) for name in folders + files if os.path.islink(os.path.join(parent, name))]
        outward = [link for link in links if not link.resolve().is_relative_to(root)]
        found += [f"{link.relative_to(folder)} -> {link.resolve()}" for link in outward]
    return sorted(found)


def read_rows(dataset, image_column, rows):
    """Read the images of `rows` (range), in threads. Yields (row, (width, height), None), or (row, None, problem)."""

    def read(row):
        try:
            return row, read_image(dataset[row][image_column]).size, None
        except RunError as error:
            return row, None, str(error)

    with ThreadPoolExecutor(os.cpu_count()) as executor:  # Pillow decodes without holding Python's lock
        for first in range(rows.start, rows.stop, 1000):  # a million rows at once would be a million futures
            yield from executor.map(read, range(first, min(first + 1000, rows.stop)))


def check_images(args, dataset):
    """Read images before the run writes anything: the first 1,000, or all of them with --skip_bad_images.

    Returns the rows to leave out. Raises RunError for one that can't be read, unless it is to be left out.
    """
    rows = range(len(dataset) if args.skip_bad_images else min(1000, len(dataset)))
    bad = {row: problem for row, _, problem in read_rows(dataset, args.image_column, rows) if problem}
    if bad and not args.skip_bad_images:
        raise RunError("row {}: {}; --skip_bad_images leaves such images out".format(*next(iter(bad.items()))))
    for row, problem in bad.items():
        logger.warning(f"left out: row {row}: {problem}")
    if len(bad) == len(dataset):
        raise RunError("--skip_bad_images: none of the images can be read")
    if args.skip_bad_images:
        logger.info(f"--skip_bad_images: {len(bad)} of {len(dataset)} images left out")
    return sorted(bad)


def leave_out(dataset, rows):
    """The dataset (`datasets.Dataset`) without `rows` (list of int)."""
    return dataset.select(np.delete(np.arange(len(dataset)), rows)) if rows else dataset


def check_data(args, dataset, tokenizer, side):
    """Read the whole data set and print what a user may want to know of it before training, with the first few rows.

    tokenizer: None if there are no captions; side: what the images' shorter side is resized to, in pixels. Raises
    RunError, after the report, if there is something that training would refuse.
    """
    bad, small, crops = [], [], []
    rows = read_rows(dataset, args.image_column, range(len(dataset)))
    for row, size, problem in tqdm(rows, total=len(dataset), unit="image"):
        if problem:
            bad.append(f"row {row}: {problem}")
            continue
        crops.append((1 - min(size) / max(size), row, f"{size[0]} x {size[1]}"))
        if min(size) < side:
            small.append(f"row {row}: {size[0]} x {size[1]}")
    missing, empty, long = check_captions(args, dataset, tokenizer) if tokenizer else ([], [], [])
    folder = Path(args.train_data_dir or args.dataset_name)
    print(f"{len(dataset)} rows")
    print_findings("images that cannot be read", bad)
    print_findings(f"images smaller than {side} pixels, which are enlarged", small)
    if tokenizer:
        print_findings("rows without a caption", missing)
        print_findings("captions that are empty", empty)
        print_findings(f"captions longer than {tokenizer.model_max_length} tokens, which are cut there", long)
    crops.sort(key=lambda crop: (-crop[0], crop[1]))
    shares = [share for share, *_ in crops]
    average, most = (f"{value:.1%}" for value in (np.mean(shares or [0]), max(shares, default=0)))
    lost = [f"row {row}: {share:.1%} of {size}" for share, row, size in crops if share > 0]
    print_findings(f"images that the square crop takes something of, {average} on average and {most} at most", lost)
    print_findings("symbolic links that lead out of the folder", outward_links(folder) if folder.is_dir() else [])
    refused = {*missing, *([] if args.skip_bad_images else bad)}
    if refused:
        raise RunError(f"--check_data: training would refuse {len(refused)} of {len(dataset)} rows")


def check_captions(args, dataset, tokenizer):
    """The rows without a caption, with an empty one, and with one that is cut, each as ["row 1: ..."]."""
    missing, empty, long = [], [], []
    for row, captions in enumerate(dataset[args.caption_column]):
        captions = [captions] if isinstance(captions, str) else captions or [None]
        if None in captions:
            missing.append(f"row {row}")
            continue
        lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
        for caption, length in zip(captions, lengths, strict=True):
            if not caption.strip():
                empty.append(f"row {row}")
            if length > tokenizer.model_max_length:
                long.append(f"row {row}: {length} tokens, {caption[:60]}...")
    return missing, empty, long


def print_findings(what, findings, limit=5):
    """Print how many findings (list of str) there are of a kind, and the first `limit`."""
    print(f"{what}: {len(findings)}")
    for finding in findings[:limit]:
        print(f"    {printable(finding)}")
    if len(findings) > limit:
        print("    ...")


def data_digest(dataset):
    """A short digest (str) of the rows' captions, image names and sizes, by which a changed data set is noticed."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(10_000):
        for column in table.columns:
            if "bytes" in getattr(column.type, "names", ()):  # of an image: its length alone, and no folder's name
                sizes = compute.binary_length(compute.struct_field(column, "bytes")).to_pylist()
                paths = compute.struct_field(column, "path").to_pylist()
                pairs = zip(sizes, paths, strict=True)  # of a folder's images the data set holds the paths alone
                sizes = [os.path.getsize(p) if size is None and p and os.path.isfile(p) else size for size, p in pairs]
                names = [path and os.path.basename(path) for path in paths]
                digest.update(json.dumps([sizes, names]).encode())
            else:
                digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()[:16]


def read_image(value):
    """Decode an image file of any mode to an upright RGB `PIL.Image` with transparency laid on white.

    `value` is {"bytes": bytes or None, "path": str or None}. Raises RunError with the file's name if that fails.
    """
    if value is None:
        raise RunError("there is no image")
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
    Returns an array (resolution, resolution, 3), uint8.
    """
    resampling = PIL.Image.Resampling[interpolation.removesuffix("_exact").upper()]
    image = image.resize([int(resolution * side / min(image.size)) for side in image.size], resampling)
    # Three draws whatever the flags are: turning one on changes nothing else that is drawn for the example.
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
    """Draw one of `captions` (str or list of str), or "" in the given share of cases."""
    choice, dropout = rng.random(2)
    if dropout < proportion_empty_prompts:
        return ""
    return captions if isinstance(captions, str) else captions[int(choice * len(captions))]


def tokenize_captions(captions, tokenizer):
    """Tokenize n captions (list of str) to arrays "input_ids" and "attention_mask", (n, 77) at CLIP's length."""
    length = tokenizer.model_max_length
    return tokenizer(captions, max_length=length, padding="max_length", truncation=True, return_tensors="np")


def preprocess_train(args, tokenizer, latents_shape, num_train_timesteps, row, rng):
    """Make a training example of a dataset's row, with everything random about it drawn from `rng` in a fixed order.

    Returns tensors: "pixel_values" (3, resolution, resolution), uint8, "input_ids" (77,), and those of `draw_noise`.
    """
    crop = (args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip)
    pixel_values = torch.from_numpy(train_transforms(read_image(row[args.image_column]), *crop, rng)).permute(2, 0, 1)
    caption = choose_caption(row[args.caption_column], args.proportion_empty_prompts, rng)
    input_ids = torch.from_numpy(tokenize_captions([caption], tokenizer).input_ids[0])
    example = {"pixel_values": pixel_values.contiguous(), "input_ids": input_ids}
    return {**example, **draw_noise(args, latents_shape, num_train_timesteps, rng)}


def preprocess_encoded(args, encodings, latents_shape, num_train_timesteps, row, rng):
    """Make the example that `preprocess_train` makes of the same row and `rng`, of its encodings.

    encodings: {name: `Encoding`}; row: of `EncodedRows`. Returns "moments" and "text_states" instead of what the
    encoders make them of.
    """
    *_, flip = rng.random(3)
    states = choose_caption(row["text_states"], args.proportion_empty_prompts, rng)
    chosen = {"moments": row["moments"][int(args.random_flip and flip < 0.5)]}
    chosen["text_states"] = row["empty"]["text_states"][0] if states == "" else states
    example = {name: as_tensor(value, encodings[name]) for name, value in chosen.items()}
    return {**example, **draw_noise(args, latents_shape, num_train_timesteps, rng)}


def draw_noise(args, latents_shape, num_train_timesteps, rng):
    """Draw what is random about an example's place in the diffusion.

    latents_shape: (channels, height, width). Returns tensors: "posterior_noise" and "noise" of latents_shape,
    "timesteps" (), and with the flags that use them "offset_noise" (channels, 1, 1) and "perturbation_noise" of
    latents_shape.
    """

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    drawn = {"posterior_noise": normal(*latents_shape)}
    drawn["timesteps"] = torch.tensor(rng.integers(num_train_timesteps))
    drawn["noise"] = normal(*latents_shape)
    if args.noise_offset:
        drawn["offset_noise"] = normal(latents_shape[0], 1, 1)
    if args.input_perturbation:
        drawn["perturbation_noise"] = normal(*latents_shape)
    return drawn


def random_generator(seed, *key):
    """Return the `np.random.Generator` that belongs to `key` (ints) in the run of `seed`.

    NumPy's SeedSequence mixes all bits of all numbers; `torch.Generator` keeps only 32 bits of its seed.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@functools.lru_cache(maxsize=2)  # a batch lies in at most a few epochs, mostly one or two
def permutation(seed, epoch, length):
    """Return the order in which `epoch` goes through `length` rows, an int64 array."""
    return random_generator(seed, 0, epoch).permutation(length)


class ExampleStream:
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
            example = self.preprocess(self.dataset[row], random_generator(self.seed, 1, position))
            return {**example, "positions": np.int64(position)}
        except RunError as error:
            raise RunError(f"row {row}: {error}") from error


class Encoding(NamedTuple):
    """What a frozen encoder makes of one version of `source`, an input of `encoder_inputs`: an array."""

    source: str
    dtype: object
    shape: tuple


ENCODINGS_LAYOUT = 1  # of the files; another number, and those of before are not read
PART_BYTES = 2**28  # of a file: about what a crash can cost, for each process


def encodings_folder(args, settings, weights):
    """The folder in --cache_encodings for what frozen models of these weights make of rows under these settings.

    settings: what else decides about an encoding, values that JSON can hold; weights: yields (name, array of bytes).
    """
    digest = hashlib.sha256(json.dumps([ENCODINGS_LAYOUT, settings], default=str).encode())
    for name, array in weights:
        digest.update(name.encode())
        digest.update(array)
    return Path(args.cache_encodings) / digest.hexdigest()[:16]


def tokenizer_rules(tokenizer):
    """What decides about the tokens of a text, as values that JSON can hold."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return [tokenizer.model_max_length, {name: rules[name] for name in rules if name not in ("truncation", "padding")}]


def digest_of(*values):
    """A 64-bit digest (int64) of values that JSON can hold; that two of n are the same has a chance of n² / 2^65."""
    return np.int64(int.from_bytes(hashlib.sha256(json.dumps(values).encode()).digest()[:8], "big", signed=True))


def as_size(size):
    """A number of bytes in words."""
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB"


def file_marks(path):
    """By what a file is told from others, in what JSON can hold: size, time of change, and its first and last 4 KB, for
    archives may give all files one time, and images without compression have one size. None if it can't be read."""
    if not path or not os.path.isfile(path):
        return None
    with contextlib.suppress(OSError), open(path, "rb") as file:
        stat, first = os.fstat(file.fileno()), file.read(4096)
        file.seek(max(stat.st_size - 4096, 0))
        return [stat.st_size, stat.st_mtime_ns, hashlib.sha256(first + file.read(4096)).hexdigest()]


def row_digests(args, dataset):
    """What tells the rows of a data set apart, and from what they were before a change.

    Of an image that has a file: its path in the data's folder, `file_marks`, and the row's captions. Of one inside the
    data set's own files: the row's number, and the sizes and times of these files. Returns int64 (rows,).
    """
    stats = [os.stat(file["filename"]) for file in dataset.cache_files]
    whole = digest_of(dataset._fingerprint, *([stat.st_size, stat.st_mtime_ns] for stat in stats))
    digests, first = whole ^ np.arange(len(dataset)), 0
    folder = os.path.abspath(args.train_data_dir or args.dataset_name) + os.sep

    def of_files(table):
        paths = compute.struct_field(table.column(args.image_column), "path").to_pylist()
        captions = [table.column(name).to_pylist() for name in table.column_names if name != args.image_column]
        rows = zip(paths, *captions, strict=True)
        return [digest_of(path and path.removeprefix(folder), file_marks(path), texts) for path, *texts in rows]

    with ThreadPoolExecutor(16) as threads:  # a disk behind a network lets each of them wait
        for table in dataset.with_format("arrow").iter(10_000):
            images = table.column(args.image_column)
            if compute.any(compute.is_null(compute.struct_field(images, "bytes"))).as_py():
                pieces = [table.slice(start, 500) for start in range(0, len(table), 500)]
                digests[first : first + len(table)] = list(itertools.chain(*threads.map(of_files, pieces)))
            first += len(table)
    return digests


class EncodedRows:
    """The encodings of a data set's rows, mapped from files: row k is {name: [bytes of each version]}.

    Versions are flips of an image, or captions. Under "empty" each row holds the encodings of no image and no caption.

    folder: of `encodings_folder`; digests: of `row_digests`. `missing` is an array of the rows that are not there, and
    of len(self) for the empty one.
    """

    def __init__(self, folder, digests):
        parts = []
        for path in sorted(folder.glob("part-*.arrow")):
            with naming(f"--cache_encodings {path} (delete it, and its rows are encoded again)"):
                parts.append(datasets.Dataset.from_file(str(path)))
        self.table = datasets.concatenate_datasets(parts).remove_columns("digest") if parts else None
        digests = np.append(digests, digest_of("empty"))
        known = [part.data.column("digest").to_numpy() for part in parts]
        known = np.concatenate([np.empty(0, np.int64), *known])
        order = np.argsort(known)
        self.places = np.searchsorted(known, digests, sorter=order)
        found = self.places < len(known)
        self.places[found] = order[self.places[found]]
        found[found] = known[self.places[found]] == digests[found]
        self.missing = np.flatnonzero(~found)
        self.empty = self.table[int(self.places[-1])] if found[-1] else None

    def __len__(self):
        return len(self.places) - 1

    def __getitem__(self, row):
        return {**self.table[int(self.places[row])], "empty": self.empty}


def rows_to_encode(args, folder, dataset, encodings):
    """Look a data set up in the cache's `folder`. Returns its `row_digests`, and the rows that are missing there.

    The two are lists of ints; see `EncodedRows`. encodings: {name: `Encoding`}. Raises RunError if the disk has no room
    for what is missing. Clears away what a crash has left, and notes the flags of the first run that
    fills the folder in it.
    """
    digests = row_digests(args, dataset)
    missing = EncodedRows(folder, digests).missing
    logger.info(f"--cache_encodings: {(missing < len(digests)).sum()} of {len(digests)} rows to be encoded in {folder}")
    for path in folder.glob("*.partial"):
        with contextlib.suppress(OSError):  # its run may just have ended it, or be another user's
            if path.stat().st_mtime < time.time() - 86_400:  # a younger one may be of a run at work
                path.unlink()
    if len(missing):
        check_writable(f"--cache_encodings {args.cache_encodings}", folder.absolute())
    needed = len(missing) * sum(math.prod(part.shape) * part.dtype.itemsize for part in encodings.values())
    disk = next(parent for parent in folder.absolute().parents if parent.exists())
    if needed > (free := shutil.disk_usage(disk).free):
        sizes = f"{as_size(free)} left, and the encodings need {as_size(needed)} or more"
        raise RunError(f"--cache_encodings {args.cache_encodings}: its disk has {sizes}")
    about = folder / "flags.json"  # for who clears up
    if len(missing) and not about.exists():
        with writing(about):
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"flags-{secrets.token_hex(8)}.partial"
            partial.write_text(as_json(recorded_arguments(args, args.seed), indent=2) + "\n")
            partial.rename(about)
    return digests.tolist(), missing.tolist()


class EncoderInputs:
    """The `rows` (ints) of a data set as the frozen encoders take them; len(dataset) stands for the empty one.

    inputs: function of a row, or None for the empty one, to {input: array of each version}.
    """

    def __init__(self, dataset, rows, inputs):
        self.dataset, self.rows, self.inputs = dataset, rows, inputs
        self.images = sum(row < len(dataset) for row in rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = int(self.rows[index])
        try:
            return row, self.inputs(self.dataset[row] if row < len(self.dataset) else None)
        except RunError as error:
            raise RunError(f"row {row}: {error}") from error


def write_part(folder, part):
    """Add a file of encodings to `folder`, whole or not at all. part: {"digest": [...], name: [[bytes, ...], ...]}."""
    path = folder / f"part-{secrets.token_hex(8)}.arrow"
    partial = path.with_suffix(".partial")
    kinds = {name: datasets.List(datasets.Value("binary")) for name in part if name != "digest"}
    features = datasets.Features({"digest": datasets.Value("int64"), **kinds})
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with ArrowWriter(path=str(partial), features=features) as writer:
                writer.write_batch(part)
                writer.finalize()
            flush_to_disk(partial)
            partial.rename(path)
            flush_to_disk(folder)
        finally:
            partial.unlink(missing_ok=True)


class EncodingsWriter:
    """Writes encodings to `folder` (Path) in files of PART_BYTES, and what is left however the block ends.

    names: of the encodings.
    """

    def __init__(self, folder, names):
        self.folder, self.names = folder, ("digest", *names)
        self.part, self.size = {name: [] for name in self.names}, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write()

    def add(self, digests, rows):
        """Take in the digests of rows, and {name: [[bytes of each version] for each row]}."""
        self.part["digest"] += digests
        for name, versions in rows.items():
            self.part[name] += versions
            self.size += sum(map(len, itertools.chain(*versions)))
        if self.size > PART_BYTES:
            self.write()

    def write(self):
        part, size = self.part, self.size
        self.part, self.size = {name: [] for name in self.names}, 0
        if size:
            write_part(self.folder, part)


def encoder_inputs(args, tokenizer, row):
    """What the frozen encoders take for all that may be drawn of a row; of None: a black image, and no caption.

    Returns tensors: "pixel_values" (1, 3, resolution, resolution), uint8, with --random_flip (2, ...), the second
    mirrored, and "input_ids" (captions, 77).
    """
    image = PIL.Image.new("RGB", [args.resolution] * 2) if row is None else read_image(row[args.image_column])
    captions = "" if row is None else row[args.caption_column]
    crop = (args.resolution, args.image_interpolation_mode, args.center_crop, False)
    pixel_values = torch.from_numpy(train_transforms(image, *crop, random_generator(0))).permute(2, 0, 1)
    flips = [pixel_values, pixel_values.flip(2)][: 1 + args.random_flip]
    tokens = tokenize_captions([captions] if isinstance(captions, str) else captions, tokenizer)
    return {"pixel_values": torch.stack(flips), "input_ids": torch.from_numpy(tokens.input_ids)}


def as_tensor(value, encoding):
    """An encoding's bytes as the tensor that an `Encoding` describes."""
    return torch.frombuffer(bytearray(value), dtype=encoding.dtype).reshape(encoding.shape)


def as_bytes(tensor):
    """The bytes of a tensor, row by row."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def join_inputs(examples):
    """Join [(row, {input: tensor})] to the rows, {input: all versions in one tensor} and {input: [their numbers]}."""
    rows, inputs = zip(*examples, strict=True)
    batch = {name: torch.cat([versions[name] for versions in inputs]) for name in inputs[0]}
    return rows, batch, {name: [len(versions[name]) for versions in inputs] for name in batch}


def encoded_rows(accelerator, args, dataset, encodings, settings, models, inputs, encode):
    """All rows of `dataset` as `EncodedRows` of --cache_encodings. To be called by every process. Raises RunError.

    What is not there is made first, by all processes together, on the device; afterwards the models (frozen encoders)
    are on the CPU. encodings: {name: `Encoding`}; settings: what else decides about them, values that JSON can hold;
    inputs: as of `EncoderInputs`; encode: function of a batch of inputs to {name: tensor}.
    """
    weights = ((name, value) for model in models for name, value in model.state_dict().items())
    weights = ((name, value.cpu().flatten().view(torch.uint8).numpy()) for name, value in weights)
    configs = [model.config if isinstance(model.config, dict) else model.config.to_dict() for model in models]
    settings = [settings, encodings, [public_config(config) for config in configs]]
    folder = on_main_process(accelerator, encodings_folder, args, settings, weights)
    digests, missing = on_main_process(accelerator, rows_to_encode, args, folder, dataset, encodings)
    if missing:
        own = missing[accelerator.process_index :: accelerator.num_processes]
        source = EncoderInputs(dataset, own, inputs)
        with visiting(accelerator, *models), writing(folder):
            encode_rows(accelerator, args, folder, source, digests, encodings, encode)
        with naming("--cache_encodings: another process has ended"):  # one that fails does so at once, not after hours
            accelerator.wait_for_everyone()
    rows = EncodedRows(folder, digests)
    if len(rows.missing):
        raise RunError(f"--cache_encodings {folder}: has to be on a disk that all processes see")
    return rows


def encode_rows(accelerator, args, folder, source, digests, encodings, encode):
    """Write the encodings of this process's rows, an `EncoderInputs`, to `folder`. Raises RunError or RunStopped."""
    digests = np.append(digests, digest_of("empty"))
    batches = make_dataloader(args, source, accelerator.device, join_inputs)
    progress_bar = tqdm(total=source.images, desc="encoding", unit="image", disable=not accelerator.is_main_process)
    with noted_signals() as noted, progress_bar:
        with EncodingsWriter(folder, encodings) as writer:
            for rows, batch, versions in batches:
                with naming("--cache_encodings: the images cannot be encoded"):
                    made = encode({name: tensor.to(accelerator.device) for name, tensor in batch.items()})
                    made = {name: made[name].cpu().split(versions[kind.source]) for name, kind in encodings.items()}
                made = {name: [[as_bytes(version) for version in row] for row in made[name]] for name in encodings}
                writer.add([digests[row] for row in rows], made)
                progress_bar.update(sum(row < len(source.dataset) for row in rows))
                if noted:
                    break
        if noted:  # maybe only while the last part was being written
            raise RunStopped(noted[0], "while encoding; the same command goes on")


@contextlib.contextmanager
def visiting(accelerator, *models):
    """Have the models on the device within the block, and afterwards where they were before."""
    homes = [next(model.parameters()).device for model in models]
    try:
        for model in models:
            to_device(accelerator, model)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)


# ----------------------------------------------------------------------------------------------------------------------
# Objective
# ----------------------------------------------------------------------------------------------------------------------


def add_noise(clean, noise, alphas_cumprod):
    """x_t = √ᾱ · x_0 + √(1 − ᾱ) · ε (arXiv:2006.11239, eq. 4). All broadcast; alphas_cumprod is ᾱ_t, in [0, 1]."""
    return alphas_cumprod**0.5 * clean + (1 - alphas_cumprod) ** 0.5 * noise


def prediction_target(prediction_type, clean, noise, alphas_cumprod):
    """What the model has to predict, of clean's shape: ε, √ᾱ · ε − √(1 − ᾱ) · x_0 (arXiv:2202.00512) or x_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alphas_cumprod**0.5 * noise - (1 - alphas_cumprod) ** 0.5 * clean
    return clean


def predicted_noise(prediction_type, prediction, noisy, alphas_cumprod):
    """The ε that a prediction stands for, given x_t: `prediction_target` solved for ε. Finite for ᾱ < 1."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return alphas_cumprod**0.5 * prediction + (1 - alphas_cumprod) ** 0.5 * noisy
    return (noisy - alphas_cumprod**0.5 * prediction) / (1 - alphas_cumprod) ** 0.5


def signal_to_noise_ratio(alphas_cumprod):
    """SNR = ᾱ / (1 − ᾱ) (arXiv:2303.09556, section 3): 0 at zero terminal SNR, infinite at ᾱ = 1."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(prediction_type, snr, gamma):
    """The Min-SNR-γ weight of a squared error, of snr's shape (arXiv:2303.09556, section 3.4).

    min(SNR, γ) for a prediction of x_0, min(SNR, γ) / SNR for ε and min(SNR, γ) / (SNR + 1) for v, written so that
    they are finite at SNR = 0.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clip(max=1)
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
    squared_error = (prediction.float() - target.float()).square()
    return weight * squared_error.flatten(1).mean(1)


def encode(batch, vae, text_encoder):
    """What the frozen encoders make of "pixel_values" and "input_ids": "moments" of the VAE's posterior, its means and
    log-variances (b, 2 · channels, height, width), and "text_states" (b, 77, width)."""
    white = torch.full((), 255.0, device=vae.device)  # a number would be taken as its inverse, which is not exact
    pixel_values = batch["pixel_values"].float() / white * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
        return {
            "moments": posterior.parameters,
            "text_states": text_encoder(batch["input_ids"]).last_hidden_state,
        }


def training_losses(batch, unet, vae, text_encoder, alphas_cumprod, prediction_type, args):
    """The losses of a micro-batch of examples (tensors with a batch dimension), of shape (b,).

    batch: of `preprocess_train` or `preprocess_encoded`; alphas_cumprod: ᾱ of all timesteps, (num_train_timesteps,).
    Only the UNet gets a gradient. Pure: all that is random comes with the batch.
    """
    encodings = batch if "moments" in batch else encode(batch, vae, text_encoder)
    posterior, encoder_hidden_states = DiagonalGaussianDistribution(encodings["moments"]), encodings["text_states"]
    latents = posterior.mean.float() + posterior.std.float() * batch["posterior_noise"]
    latents = latents * vae.config.scaling_factor

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
CHECKPOINT_KEYS = ("step", "examples_seen", "seed", "batch_size", "rows", "data_digest", "architecture")


def list_checkpoints(output_dir):
    """List the finished checkpoints in `output_dir` as [(step, Path)], oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((int(path.name.removeprefix("checkpoint-")), path) for path in folders if path.is_dir())


def find_checkpoint(output_dir, wanted):
    """Say where a run starts; `wanted` is the value of --resume_from_checkpoint. Returns a Path, or None for anew.

    In this order: no flag: anew, if `output_dir` holds no checkpoints or model that would be lost; "latest": of those
    that are whole the one with the highest step, anew if there is none at all; a folder that exists,
    "checkpoint-<step>" or "<step>": that one. Raises RunError.
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
        if not checkpoints and (Path(output_dir) / "model_index.json").exists():
            raise RunError(
                f"--resume_from_checkpoint: {output_dir} holds a finished model and no checkpoint to go on from; "
                "name another folder"
            )
        return newest_whole(output_dir, [path for _, path in reversed(checkpoints)]) if checkpoints else None
    named = Path(output_dir) / (f"checkpoint-{wanted}" if wanted.isdecimal() else Path(wanted).name)
    for path in (Path(wanted), named):
        if path.name.startswith("checkpoint-") and path.is_dir():
            return path
    raise RunError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; there are {names or 'none'}")


def newest_whole(output_dir, checkpoints):
    """The first of `checkpoints` (Paths, newest first) that is whole. The log names the others. Raises RunError."""
    problems = []
    for checkpoint in checkpoints:
        try:
            read_checkpoint(checkpoint)
            for problem in problems:
                logger.warning(f"{problem}; going on from an earlier one")
            return checkpoint
        except RunError as error:
            problems.append(error)
    raise RunError(f"--resume_from_checkpoint: no checkpoint in {output_dir} is whole; the newest: {problems[0]}")


def read_checkpoint(checkpoint):
    """Read the state of a checkpoint folder, a dict with the keys of `save_checkpoint`, "arguments" and "files".

    Raises RunError if it is not one, or if a file is missing or not as long as it was when saved.
    """
    with naming(f"{checkpoint}: not a checkpoint of this script, {CHECKPOINT_STATE}"):
        state = json.loads((checkpoint / CHECKPOINT_STATE).read_text())
        state = {name: state[name] for name in (*CHECKPOINT_KEYS, "arguments", "files")}
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
    if getattr(args, "use_8bit_adam", False) != before.get("use_8bit_adam", False):
        raise RunError(f"--use_8bit_adam: the optimizer in {checkpoint} is of the other kind")


def public_config(config):
    """What a model's configuration (dict) says of its architecture, as plain values that JSON can hold."""
    left_out = {name for name in config if name.startswith("_")} | {"sample_size", "transformers_version"}
    return json.loads(json.dumps({name: value for name, value in config.items() if name not in left_out}))


def check_same_architecture(checkpoint, state, config):
    """Raise RunError unless the checkpoint's model has the configuration (dict) of the model to start from."""
    before, now = state["architecture"], public_config(config)
    changes = [
        f"{name} {before[name]} -> {now[name]}" for name in before if before[name] != now.get(name, before[name])
    ]
    if changes:
        raise RunError(
            f"--resume_from_checkpoint {checkpoint}: is of a model with another architecture: {', '.join(changes[:3])}"
        )


def check_same_course(checkpoint, now):
    """Warn if the run does not go on with what its checkpoint was made with; now: a dict of CHECKPOINT_KEYS."""
    before = read_checkpoint(checkpoint)
    meaning = {
        "seed": "another seed",
        "batch_size": "another number of images per update",
        "rows": "another number of rows in the data set",
        "data_digest": "other captions, names or sizes of images in the data set",
    }
    for key, what in meaning.items():
        if before[key] != now[key]:
            logger.warning(
                f"{checkpoint} was made with {what}: {before[key]}, now {now[key]}; "
                "the model will not be the one of a run without the interruption"
            )


def keep_weights_apart(accelerator):
    """Let accelerate save and load all but the weights, which lie beside its files as `from_pretrained` reads them.

    Of a sharded model it keeps a second copy all the same, and wants it back.
    """
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def load_optimizer(accelerator, optimizer, checkpoint):
    """Load all state that is no weight. Learning rate, betas and the like stay as the flags say. Raises RunError."""
    files = {DistributedType.FSDP: "pytorch_model_fsdp*", DistributedType.DEEPSPEED: "pytorch_model/*optim_states.pt"}
    for kind, pattern in files.items():
        if any(checkpoint.glob(pattern)) != (accelerator.distributed_type == kind):
            runs = "of its run and this one, only one"
            raise RunError(f"--resume_from_checkpoint {checkpoint}: {runs} is with {kind.value}")
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
        try:
            with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
                os.fsync(descriptor)  # some network file systems refuse it for folders
        finally:
            os.close(descriptor)


def remove_checkpoint(path):
    """Delete a checkpoint folder. Renamed first: a crash must not leave half of one under a checkpoint's name."""
    shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))


def save_checkpoint(accelerator, args, name, model, ema, state):
    """Write checkpoint-<step> whole or not at all, then prune older ones down to --checkpoints_total_limit.

    Holds the weights of `model` in folder `name`, those of `ema` (EMAModel or None) in <name>_ema, the optimizer's
    state, and `state`, a dict of CHECKPOINT_KEYS. To be called by every process, all of which raise RunError if one of
    them can't write. A folder "checkpoint-<step>.partial" is what a crash left of one.
    """
    final = Path(args.output_dir) / f"checkpoint-{state['step']}"
    partial = final.with_name(final.name + ".partial")
    on_main_process(accelerator, functools.partial(shutil.rmtree, ignore_errors=True), partial)
    try:
        # The optimizer's, the scaler's and other state, by every process that holds part of it, then the weights.
        on_every_process(accelerator, final, accelerator.save_state, str(partial))
        on_every_process(accelerator, final, save_weights, accelerator, partial / name, model)
        if ema:
            with evaluation_weights(model, ema):
                on_every_process(accelerator, final, save_weights, accelerator, partial / f"{name}_ema", model)
        on_main_process(accelerator, finish_checkpoint, args, partial, final, state)
    except RunError:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def save_weights(accelerator, folder, model):
    """Write the model's weights to `folder` as `from_pretrained` reads them. To be called by every process."""
    whole = whole_model(accelerator, model)
    if accelerator.is_main_process:
        whole.save_pretrained(folder)


def finish_checkpoint(args, partial, final, state):
    """Add the state to a checkpoint in the folder `partial`, give it its name `final`, then prune older ones."""
    with writing(final):
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        contents = {**state, "arguments": recorded_arguments(args, state["seed"]), "files": files}
        (partial / CHECKPOINT_STATE).write_text(json.dumps(contents, indent=2))
        flush_to_disk(*partial.rglob("*"), partial)
        partial.rename(final)
        flush_to_disk(final.parent)
        for _, path in list_checkpoints(args.output_dir)[: -(args.checkpoints_total_limit or sys.maxsize)]:
            remove_checkpoint(path)
    logger.info(f"saved {final}")


# ----------------------------------------------------------------------------------------------------------------------
# Reporting
# ----------------------------------------------------------------------------------------------------------------------


def log_validation(pipeline, accelerator, args, seed, step):
    """Draw every validation prompt, each from noise of its own that is the same at every step of the run.

    pipeline: a `StableDiffusionPipeline` on the training device. To be called by every process. Returns the Path of the
    grid on the main process, else None.
    """
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": args.resolution, "width": args.resolution}

    def draw(index, prompt):
        generator = validation_generator(seed, index)
        with torch.no_grad(), accelerator.autocast():
            return pipeline(prompt, num_inference_steps=20, generator=generator, **size).images[0]

    with visiting(accelerator, pipeline.vae, pipeline.text_encoder):
        images = share_out(accelerator, args.validation_prompts, draw)
    return save_validation(images, accelerator, args, step) if accelerator.is_main_process else None


def share_out(accelerator, prompts, draw):
    """Draw the prompts (list of str), shared out over the processes; draw: function of (index, prompt) to `PIL.Image`.

    Every process draws equally often, some for nothing if need be: a model that is spread over all of them needs all.
    Returns the images in the order of the prompts, on every process.
    """
    rounds = math.ceil(len(prompts) / accelerator.num_processes)
    own = range(accelerator.process_index, rounds * accelerator.num_processes, accelerator.num_processes)
    drawn = [(index, np.asarray(draw(index, prompts[index % len(prompts)]))) for index in own]
    arrays = dict(gather_object(drawn))
    return [PIL.Image.fromarray(arrays[index]) for index in range(len(prompts))]


def validation_generator(seed, index):
    """The `torch.Generator` of validation prompt number `index` in the run of `seed`, on the CPU."""
    return torch.Generator().manual_seed(int(random_generator(seed, 2, index).integers(2**32)))


def save_validation(images, accelerator, args, step):
    """Write the images (list of `PIL.Image`) as one PNG grid, and to the trackers. Returns the grid's Path."""
    path = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
    grid = torchvision.utils.make_grid([transforms.to_tensor(image) for image in images], nrow=4)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
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

    def __init__(self, accelerator, args, first_step, last_step):
        self.accelerator, self.args, self.updates, self.nonfinite = accelerator, args, [], []
        self.last_step = last_step
        hidden = not accelerator.is_main_process or first_step >= last_step
        self.progress_bar = tqdm(initial=first_step, total=last_step, disable=hidden, unit="step")
        self.restart_clock()

    def restart_clock(self):
        """Start timing the next update now: what happened since the last one was no training."""
        self.started = time.perf_counter()

    def add(self, step, examples, gradient_norm, learning_rate, batch_size, waited):
        """Take in an update, with what it knows of each of its micro-batches' examples.

        examples: dicts of tensors (b,), "positions", "timesteps" and "losses", left on the device as is gradient_norm,
        a tensor (); batch_size: images of all processes; waited: seconds.
        """
        if isinstance(gradient_norm, DTensor):  # FSDP
            gradient_norm = gradient_norm.full_tensor()
        now = time.perf_counter()
        speed = {"examples_per_second": batch_size / (now - self.started), "data_wait": waited / (now - self.started)}
        examples = {name: torch.cat([part[name] for part in examples]) for name in examples[0]}
        loss = examples["losses"].mean()
        gradient_norm = torch.as_tensor(gradient_norm, dtype=loss.dtype, device=loss.device)  # DeepSpeed: a float
        on_device = torch.stack([loss, gradient_norm])
        self.updates.append((step, time.time(), on_device, examples, {"lr": learning_rate, **speed}))
        self.started = now
        self.progress_bar.update()

    def flush(self):
        """Hand over all updates since the last time. To be called by every process. Raises RunError."""
        if not self.updates:
            return
        values = torch.stack([on_device for _, _, on_device, _, _ in self.updates])
        values = self.accelerator.reduce(values, "mean").tolist()  # the CPU waits for the device here, and only here
        for (step, walltime, _, examples, on_host), (loss, gradient_norm) in zip(self.updates, values, strict=True):
            update = {"train_loss": loss, "grad_norm": gradient_norm, **on_host}
            with naming(f"--logging_dir {self.args.logging_dir}"):
                self.accelerator.log(update, step=step, log_kwargs={"tensorboard": {"walltime": walltime}})
            if math.isfinite(loss) and math.isfinite(gradient_norm):
                self.nonfinite = []
                continue
            self.nonfinite.append((step, gradient_norm, examples))
            limit = nonfinite_limit(self.args, self.accelerator.mixed_precision)
            self.check_nonfinite(1 if step == self.last_step and self.accelerator.mixed_precision != "fp16" else limit)
        speeds = [on_host["examples_per_second"] for *_, on_host in self.updates]
        speed = len(speeds) / sum(1 / speed for speed in speeds)
        self.progress_bar.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{speed:.1f}")
        self.updates.clear()

    def worth_saving(self, stop):
        """Whether the weights are those of finite updates. With fp16 they are: what is not finite is left out.

        Raises RunError if they are not and the run is to stop here.
        """
        if not self.nonfinite or self.accelerator.mixed_precision == "fp16":
            return True
        if stop:
            self.check_nonfinite(1)
        logger.warning(f"step {self.nonfinite[-1][0]} is not finite: no checkpoint is written of it")
        return False

    def check_nonfinite(self, limit):
        """Raise RunError if `limit` updates in a row were not finite, with a file that says which examples they saw."""
        if len(self.nonfinite) < limit:
            return
        self.progress_bar.close()
        updates = []
        for step, gradient_norm, examples in self.nonfinite:
            examples = {name: self.accelerator.gather(tensor).tolist() for name, tensor in examples.items()}
            updates.append({"step": step, "gradient_norm": gradient_norm, **examples})
        on_main_process(self.accelerator, save_nonfinite, self.args, updates)


def nonfinite_limit(args, mixed_precision):
    """How many non-finite updates in a row end the run. With fp16 the first are the loss scale's: 2^16, halved each."""
    return args.max_nonfinite_steps or (20 if mixed_precision == "fp16" else 1)


def save_nonfinite(args, updates):
    """Write what is known of the updates (dicts) whose loss or gradient is not finite, and raise RunError."""
    step = updates[-1]["step"]
    path = Path(args.output_dir) / f"nonfinite-step-{step}.json"
    with writing(path):
        path.write_text(json.dumps(json_numbers(updates), indent=2))
    what = "the loss" if not all(map(math.isfinite, updates[-1]["losses"])) else "the gradient"
    checkpoints = [checkpoint.name for _, checkpoint in list_checkpoints(args.output_dir)]
    resume = f"--resume_from_checkpoint goes on from {checkpoints[-1]}, made before it; " if checkpoints else ""
    raise RunError(
        f"step {step}: {what} is not finite; {path} holds the examples, their timesteps and losses; {resume}try other "
        "flags, such as --learning_rate"
    )


def json_numbers(value):
    """`value` (nested lists and dicts of numbers) with what JSON has no number for as a string: "nan", "inf"."""
    if isinstance(value, dict):
        return {name: json_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [json_numbers(item) for item in value]
    return value if math.isfinite(value) else str(value)


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
    prompt = as_json((args.validation_prompts or ["a prompt"])[0])
    usage = f"""from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({as_json(name)})
pipeline({prompt}).images[0].save("picture.png")"""
    return metadata, f"{as_code(base)}, fine-tuned on {as_code(source)} for {steps} updates of its UNet.", usage


def as_json(value, indent=None):
    """`value` in JSON, where only characters that show themselves stand as they are."""
    return "\n".join(map(printable, json.dumps(value, indent=indent, ensure_ascii=False).split("\n")))


def as_code(text):
    """`text` as code within a line of Markdown, whatever it holds."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def hub_id(name):
    """`name` if it is an id on the Hub, None if it is a local folder, which the Hub takes for no id."""
    return None if Path(name).exists() else name


def save_model_card(args, name, seed, metadata, sentence, usage, validation_image):
    """Write output_dir/README.md for the model `name`. validation_image: Path of the last grid, or None.

    metadata: `ModelCardData`; sentence: what was trained; usage: Python code.
    """
    pictures = ""
    if validation_image:
        drawn = "\n".join(f"{number}. {as_code(prompt)}" for number, prompt in enumerate(args.validation_prompts, 1))
        path = validation_image.relative_to(args.output_dir).as_posix()
        pictures = f"![pictures of the validation prompts]({path})\n\nThe pictures, row by row:\n\n{drawn}\n\n"
    flags = as_json(recorded_arguments(args, seed), indent=2)
    title = re.sub(r"[^\w./ -]", "-", hub_id(name) or Path(name).resolve().name)
    card = f"---\n{metadata.to_yaml()}\n---\n\n# {title}\n\n{sentence}\n\n{pictures}"
    card += f"## Use\n\n```python\n{usage}\n```\n\n## Flags of the training run\n\n```json\n{flags}\n```\n"
    path = Path(args.output_dir) / "README.md"
    with writing(path):
        path.write_text(card, encoding="utf-8")


def prepare_hub_repository(args):
    """Create the repository to upload to, if need be, and try the permission to write. Returns its id, or RunError."""
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with naming(f"--push_to_hub {name}"):
        repo_id = with_retries(api.create_repo, name, exist_ok=True).repo_id
        with_retries(api.auth_check, repo_id, write=True)
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
        with_retries(api.upload_folder, repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=ignored)
    except Exception as error:  # whatever went wrong, the model is on disk and the user has to know
        exclude = [word for pattern in ignored for word in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", repo_id, args.output_dir, ".", *exclude])
        where = f"the model is in {args.output_dir}, upload it by: {command}"
        raise RunError(f"--push_to_hub: {reason(error)}; {where}") from error
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


def on_every_process(accelerator, path, function, *arguments):
    """Call the function, which writes to `path` (Path), on every process. All wait for all, and raise RunError if one
    of them can't write."""
    error = None
    try:
        with writing(path):
            function(*arguments)
    except RunError as caught:
        error = str(caught)
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise  # the others may be waiting for this one's part of a sharded model: the launcher ends them
    errors = [error for error in gather_object([error]) if error]
    if errors:
        raise RunError(errors[0])


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what schedulers send, and Ctrl-C


@contextlib.contextmanager
def noted_signals():
    """Within the block one of STOP_SIGNALS is only noted, in the list that the block gets. A second one ends at once.

    What comes within a second of the first is the first: launchers pass on what a terminal has sent to all.
    """
    noted = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield noted
        return
    arriving, sent = socket.socketpair()
    sent.setblocking(False)
    threading.Thread(target=note_signals, args=(arriving, noted), daemon=True).start()
    wakeup = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    before = {signum: signal.signal(signum, lambda *_: None) for signum in STOP_SIGNALS}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        sent.close()


def note_signals(arriving, noted):
    """Note in a thread what arrives (socket) of STOP_SIGNALS: handlers wait while the main thread is in a library."""
    first = None
    while byte := arriving.recv(1):
        if byte[0] in STOP_SIGNALS:
            noted.append(byte[0])
            first = first or time.monotonic()
            if time.monotonic() - first > 1:
                os._exit(128 + byte[0])


def ignore_stop_signals(worker=None):
    """Leave STOP_SIGNALS to the process that started this one: a scheduler sends them to all, and one is to answer."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class SignalExchange:
    """Tells every process of a signal that one of them has noted, at the same update, and without waiting for a device.

    With several processes the answer is that of the update before: the question travels while the device computes.
    """

    def __init__(self, accelerator):
        self.asked = self.group = None
        if accelerator.num_processes > 1 and torch.distributed.is_initialized():
            self.group = torch.distributed.new_group(backend="gloo")  # among the CPUs, beside the gradients' own

    def after_update(self, noted):
        """The number of the signal to stop for, or 0; noted: the list of `noted_signals`. To be called by all."""
        if self.group is None:
            return noted[0] if noted else 0
        number = torch.tensor(noted[0] if noted else 0)
        if self.asked:
            self.asked[0].wait()
        answer = int(self.asked[1]) if self.asked else 0
        largest = torch.distributed.ReduceOp.MAX
        self.asked = (torch.distributed.all_reduce(number, largest, self.group, async_op=True), number)
        return answer


class AboveProgressBar(logging.Handler):
    """Writes log lines to stderr without tearing the progress bar apart."""

    def emit(self, record):
        tqdm.write(printable(self.format(record)), file=sys.stderr)


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


PATIENCE = timedelta(hours=2)  # how long processes wait for one that looks through the images or encodes its share


def make_accelerator(args):
    """The `Accelerator` that the flags and accelerate's configuration ask for. Raises RunError."""
    if args.report_to not in LoggerType.list():
        raise RunError(f"--report_to {args.report_to}: this accelerate knows only {', '.join(LoggerType.list())}")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    several_hosts = os.environ.get("MASTER_ADDR", "127.0.0.1") not in ("127.0.0.1", "localhost")
    by_launch = "ACCELERATE_MIXED_PRECISION" in os.environ and several_hosts
    if by_launch and "RANK" not in os.environ and accelerator.num_processes == 1:
        raise RunError("accelerate launch: this is one of several processes, but would train alone; add --multi_gpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and accelerator.num_processes == 1:
        raise RunError("each process would train alone: on CPUs set ACCELERATE_USE_CPU=true for the launcher")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise RunError("--mixed_precision fp16: needs a GPU, a CPU has bf16")
    if args.half_precision_norms and accelerator.mixed_precision == "no":
        raise RunError("--half_precision_norms: needs --mixed_precision bf16 or fp16")
    distributed = accelerator.distributed_type != DistributedType.NO
    if args.optimizer_in_backward and (distributed or accelerator.mixed_precision == "fp16"):
        raise RunError("--optimizer_in_backward: works in bf16 or float32, in one process that is not distributed")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    configure_logging(accelerator, args)
    configure_sharding(accelerator, args)
    return accelerator


def keep_freed_memory():
    """Have tensors on a CPU take the memory that others have left. glibc returns what is larger than 32 MB to the
    system, which clears every page of it again at the next step. Elsewhere this does nothing."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
        if mallopt(m_mmap_threshold, 2**30) or mallopt(m_mmap_threshold, 2**25):  # older releases take no more
            mallopt(m_trim_threshold, 2**31 - 1)


def configure_sharding(accelerator, args):
    """Let DeepSpeed follow the flags, whatever accelerate is configured to. Raises RunError for what does not work."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RunError("accelerate's configuration: of FSDP only version 2 works here; set fsdp_version: 2")
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and args.compile == "reduce-overhead":
        raise RunError("--compile reduce-overhead: CUDA graphs need weights that stay in their place; shard without it")
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    if accelerator.mixed_precision != "no":
        raise RunError("accelerate's configuration: DeepSpeed works here in full precision only; use FSDP for bf16")
    transformers.integrations.unset_hf_deepspeed_config()  # the frozen models stay whole
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config |= {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "train_micro_batch_size_per_gpu": args.train_batch_size,
    }
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # 32 bits, of weights in 32 bits


def is_sharded(parameter):
    """Whether this process holds only a part of the parameter: under FSDP, or DeepSpeed's ZeRO stage 3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def local_parameters(model):
    """The parameters of `model`, plain tensors; of those that are sharded, the parts that this process holds."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward pass leaves it whole
    parts = list(model.parameters())
    for index, parameter in enumerate(parts):
        if isinstance(parameter, DTensor):
            parts[index] = parameter.to_local()
        elif is_sharded(parameter):
            parameter.partition()  # so that the next to need it whole gathers the parts
            parts[index] = parameter.ds_tensor.detach().requires_grad_(parameter.requires_grad)
    return parts


def local_part(whole, parameter):
    """The part of `whole`, a tensor of the shape of `parameter`, that belongs to what this process holds of that."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local().clone()
    if is_sharded(parameter):  # flat, and padded to parts of equal size
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        return torch.nn.functional.pad(whole.flatten(), (-rank * size, (rank + 1) * size - whole.numel())).clone()
    return whole


def whole_model(accelerator, model):
    """The model itself, unwrapped; of a sharded one a copy with all weights on the main process's CPU, else None.

    To be called by every process.
    """
    unwrapped = accelerator.unwrap_model(model)
    if not any(map(is_sharded, unwrapped.parameters())):
        return unwrapped
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    with init_empty_weights(include_buffers=False):
        whole = type(unwrapped).from_config(unwrapped.config)
    whole.load_state_dict(weights, assign=True)
    return whole.eval()


def start_trackers(accelerator, args, seed):
    """Start what --report_to names, with the flags of the run and its seed. Raises RunError."""
    with naming(f"--report_to {args.report_to}"):
        accelerator.init_trackers(args.tracker_project_name, recorded_arguments(args, seed), TRACKER_SETTINGS)


@contextlib.contextmanager
def evaluation_weights(model, ema):
    """Put `model` into evaluation mode, with the weights of `ema` (EMAModel or None: its own), within the block."""
    model.eval()
    if ema is not None:
        ema.store(local_parameters(model))
        ema.copy_to(local_parameters(model))
    try:
        with torch.compiler.set_stance("force_eager"):  # a few pictures are not worth compiling for
            yield
    finally:
        if ema is not None:
            ema.restore(local_parameters(model))
        model.train()


def place_ema(ema, model, device, offload):
    """Put the average on the device (torch.device), or leave it in main memory.

    model: as prepared; where it is sharded, the process keeps the same part of the average.
    """
    parameters = zip(ema.shadow_params, model.parameters(), local_parameters(model), strict=True)
    ema.shadow_params = [
        torch.empty_like(local, device="cpu", requires_grad=False).copy_(local_part(average, parameter))
        for average, parameter, local in parameters
    ]
    if not offload:
        ema.to(device)


def update_ema(ema, parameters):
    """Take `parameters` into the average, in one pass."""
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    with torch.no_grad():
        torch._foreach_lerp_(ema.shadow_params, list(parameters), 1 - ema.cur_decay_value)


class AverageInMainMemory:
    """Takes weights into an average (EMAModel) that lies in main memory, while the device computes the next update.

    The weights are copied there on a stream of their own. The next step of the `optimizer` waits for that, and a thread
    takes the copies into the average.
    """

    def __init__(self, ema, parameters, accelerator, optimizer):
        self.ema, self.device, self.pending, self.copied = ema, accelerator.device, None, None
        steps = accelerator.distributed_type != DistributedType.DEEPSPEED  # which has a step of its own, without hooks
        self.stream = torch.cuda.Stream(self.device) if steps and self.device.type == "cuda" else None
        pinned = {"device": "cpu", "requires_grad": False, "pin_memory": self.stream is not None}
        self.copies = [torch.empty_like(parameter, **pinned) for parameter in parameters]
        self.thread = ThreadPoolExecutor(1)
        if self.stream:
            optimizer.optimizer.register_step_pre_hook(lambda *_: self.keep_weights())

    def update(self, parameters):
        """Start to take in what `parameters` are now."""
        self.finish()
        with torch.no_grad(), torch.cuda.stream(self.stream):  # of no stream: on the CPU, or waiting for the device
            if self.stream:
                self.stream.wait_stream(torch.cuda.default_stream(self.device))
            torch._foreach_copy_(self.copies, list(parameters), non_blocking=self.stream is not None)
        self.copied = self.stream and self.stream.record_event()
        self.pending = self.thread.submit(self.take_in)

    def take_in(self):
        """Take the copies into the average, in a thread."""
        if self.copied:
            self.copied.synchronize()
        update_ema(self.ema, self.copies)

    def keep_weights(self):
        """Let the device change no weights before they are copied."""
        if self.copied:
            torch.cuda.default_stream(self.device).wait_event(self.copied)

    def finish(self):
        """Wait until the average is up to date."""
        if self.pending:
            self.pending.result()


def check_model_folder(flag, path, parts):
    """Raise RunError if `path`, the value of `flag`, is a local folder that lacks one of the sub-folders `parts`."""
    folder = Path(path)
    if not folder.is_dir() and path.startswith(("/", ".", "~")):
        raise RunError(f"--{flag} {path}: there is no such folder")
    for part in parts if folder.is_dir() else ():
        if not (folder / part).is_dir():
            raise RunError(f"--{flag} {path}: the folder has no {part}/, which a pipeline of this kind needs")
        if (folder / part / "config.json").exists() and not any((folder / part).glob("*.safetensors")):
            raise RunError(
                f"--{flag} {path}: {part}/ holds no .safetensors, and no other weights are loaded, for pickles can run "
                "code; if you trust them: DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)"
            )


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


def data_workers(args, device):
    """--dataloader_num_workers. By default 0 where the CPU itself trains, else as many as cores but one, at most 8."""
    if args.dataloader_num_workers is not None:
        return args.dataloader_num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if device.type == "cpu" else max(0, min(8, share - 1))


def make_dataloader(args, source, device, collate_fn=None):
    """The `DataLoader` of an `ExampleStream` or `EncoderInputs`, in its order."""
    workers = data_workers(args, device)
    return torch.utils.data.DataLoader(
        source,
        batch_size=args.train_batch_size,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=collate_fn,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",
    )


def to_device(accelerator, model):
    """Move a model to the device, with its convolutions' weights in the layout that is read fastest: channels last.

    Not on a CPU for a model to be trained, whose backward passes it slows down, nor for one to be sharded, which has to
    be contiguous.
    """
    trained = any(parameter.requires_grad for parameter in model.parameters())
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if not trained or (accelerator.device.type == "cuda" and not sharded):
        model.to(memory_format=torch.channels_last)
    return model.to(accelerator.device)


def prepare_for_training(accelerator, args, model, blocks):
    """Put the model on the device, its norms as --half_precision_norms says, and its `blocks` as --compile says."""
    to_device(accelerator, model.train())
    if args.use_8bit_adam:
        model.to(memory_format=torch.contiguous_format)  # bitsandbytes would make it so in the first update
    for module in model.modules() if args.half_precision_norms else ():
        if type(module) in (torch.nn.GroupNorm, torch.nn.LayerNorm):
            module.forward = functools.partial(norm_in_half_precision, module)
    for block in blocks if args.compile else ():
        block.compile(mode=args.compile)  # one by one, which takes less time than the model as a whole


def norm_in_half_precision(norm, hidden):
    """A `GroupNorm` or `LayerNorm` that takes and gives the precision in which autocast has products of matrices.

    Left to autocast, it takes and gives float32 on GPUs. Means and variances are summed in float32 either way.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return type(norm).forward(norm, hidden)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        hidden, weight, bias = (
            value if value is None else value.to(dtype) for value in (hidden, norm.weight, norm.bias)
        )
        if isinstance(norm, torch.nn.GroupNorm):
            return torch.nn.functional.group_norm(hidden, norm.num_groups, weight, bias, norm.eps)
        return torch.nn.functional.layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps)


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


class StepInBackward:
    """Updates parameters while the backward pass goes on to the others, and frees their gradients.

    optimizer: a `torch.optim.Optimizer` with one group of parameters. Each of its steps gets those of so many bytes of
    gradients, for steps of single parameters would take the CPU longer than a GPU.
    """

    enough = 2**26

    def __init__(self, optimizer):
        self.optimizer, (self.group,) = optimizer, optimizer.param_groups
        self.ready, self.norms = [], []
        for parameter in self.group["params"]:
            parameter.register_post_accumulate_grad_hook(self.take)

    def take(self, parameter):
        """Note that `parameter` has its gradient."""
        self.ready.append(parameter)
        if sum(parameter.grad.nbytes for parameter in self.ready) >= self.enough:
            self.step()

    def step(self):
        """Update the parameters that have their gradients."""
        self.norms += torch._foreach_norm([parameter.grad for parameter in self.ready])
        parameters, self.group["params"] = self.group["params"], self.ready
        self.optimizer.step()
        self.group["params"] = parameters
        for parameter in self.ready:
            parameter.grad = None
        self.ready = []

    def finish(self):
        """Update what is left after a backward pass. Returns the norm of its whole gradient, a tensor ()."""
        if self.ready:
            self.step()
        norms, self.norms = self.norms, []
        return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradient(accelerator, args, model, in_backward):
    """Clip the whole gradient to --max_grad_norm. Returns its norm before that, a tensor ().

    in_backward: None, or a `StepInBackward`, which clips nothing and leaves no gradient to the optimizer.
    """
    if in_backward:
        return in_backward.finish()
    return accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)


def make_lr_scheduler(args, optimizer, first_step, last_step):
    """The learning rate as a function of the update, entered at `first_step`: it has no state of its own to save."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    course = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": last_step}
    with naming(f"--lr_scheduler {args.lr_scheduler}"):
        return get_scheduler(args.lr_scheduler, optimizer, **course, last_epoch=first_step - 1)


def prepare_rows(accelerator, args, dataset, tokenizer, vae, text_encoder, latents_shape):
    """What examples are made of: the data set's rows, or what --cache_encodings holds of them, and what makes them.

    Returns a sequence, and what `ExampleStream` makes of its rows but for the latents' shape and the number of
    timesteps. To be called by every process. Puts the frozen models where they are needed. Raises RunError.
    """
    frozen = [model.requires_grad_(False) for model in (vae, text_encoder)]
    if not args.cache_encodings:
        for model in frozen:
            to_device(accelerator, model)
        return dataset, functools.partial(preprocess_train, args, tokenizer)
    encodings = {
        "moments": Encoding("pixel_values", vae.dtype, (2 * latents_shape[0], *latents_shape[1:])),
        "text_states": Encoding("input_ids", vae.dtype, (tokenizer.model_max_length, text_encoder.config.hidden_size)),
    }
    settings = [args.image_interpolation_mode, args.random_flip, tokenizer_rules(tokenizer)]
    inputs = functools.partial(encoder_inputs, args, tokenizer)
    make = functools.partial(encode, vae=vae, text_encoder=text_encoder)
    rows = encoded_rows(accelerator, args, dataset, encodings, settings, frozen, inputs, make)
    return rows, functools.partial(preprocess_encoded, args, encodings)


def check_output_dir(args, models):
    """Raise RunError if what the run makes can't be written, or would lie among or over what is the user's.

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
        check_writable(name, path)
    if args.cache_encodings and not os.path.isdir(args.cache_encodings):  # a full one may be on a read-only disk
        check_writable(f"--cache_encodings {args.cache_encodings}", Path(args.cache_encodings).resolve())


def check_writable(name, path):
    """Raise RunError, which starts with `name`, unless a folder can be made or written to at `path` (Path)."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise RunError(f"{name}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"{name}: no permission to write to {existing}")


def find_start(args, name):
    """Where the run starts: (Path of a checkpoint or None, its state or that of step 0), with the seed of this run.

    name: the folder of the trained weights in a checkpoint. To be called by every process. Raises RunError.
    """
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    start = read_checkpoint(checkpoint) if checkpoint else {"step": 0, "examples_seen": 0, "seed": secrets.randbits(32)}
    if len(set(gather_object([(start["step"], str(checkpoint))]))) > 1:
        raise RunError(f"--output_dir {args.output_dir}: has to be on a disk that all processes see")
    if args.resume_from_checkpoint:
        check_resume(args, checkpoint, start, name)
    return checkpoint, {**start, "seed": broadcast_object_list([start["seed"] if args.seed is None else args.seed])[0]}


def prepare_output_dir(args, first_step, last_step):
    """Make output_dir, without what a crash left of checkpoints. Those behind `first_step`, which the run goes on from,
    are set aside if it goes on at all: they belong to another course of the run. Raises RunError."""
    output_dir = Path(args.output_dir)
    with naming(f"--output_dir {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        for folder in (*output_dir.glob("checkpoint-*.partial"), *output_dir.glob("checkpoint-*.removed")):
            shutil.rmtree(folder)
        for step, folder in list_checkpoints(output_dir):
            if first_step < step and first_step < last_step:
                aside = folder.rename(output_dir / f"set-aside-{time.time():.0f}-{folder.name}")
                logger.info(f"{folder} is of an earlier course of the run, and is now {aside}")


def expected_sizes(args, model, pipeline):
    """How many bytes a checkpoint of `model` takes, and the result, a `DiffusionPipeline`, in float32."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    trained, all_parts = (
        sum(4 * getattr(p, "ds_numel", p.numel()) for part in models for p in part.parameters())
        for models in ([model], parts)
    )
    copies = 1 + args.use_ema + (0.5 if getattr(args, "use_8bit_adam", False) else 2)  # weights, average, two moments
    return copies * trained, all_parts


def check_disk_space(output_dir, checkpoint, result):
    """Warn if the disk has less space left than one checkpoint and the result need, both in bytes."""
    free = shutil.disk_usage(output_dir).free
    if free < checkpoint + result:
        logger.warning(
            f"--output_dir {output_dir}: its disk has {as_size(free)} left; one checkpoint needs {as_size(checkpoint)} "
            f"and the result {as_size(result)}"
        )


def plan_course(args, batch_size, rows, first_step, examples_seen):
    """The update at which the run ends, and the position in its stream that comes after the last example."""
    examples_left = max(0, args.num_train_epochs * rows - examples_seen)
    last_step = max(first_step, args.max_train_steps or first_step + math.ceil(examples_left / batch_size))
    return last_step, examples_seen + (last_step - first_step) * batch_size


def save_pipeline(accelerator, pipeline, name, model, output_dir):
    """Write the result to output_dir (Path). To be called by every process.

    pipeline: of the result on the main process, a `DiffusionPipeline`, of which `model` is the part `name`.
    """
    whole = whole_model(accelerator, model)
    if accelerator.is_main_process:
        setattr(pipeline, name, whole)
        pipeline.save_pretrained(output_dir)
        flush_to_disk(*output_dir.glob("*/*.safetensors"))


def validation_due(args, step, examples_before, examples_after, num_rows):
    """Whether to draw after update `step`: every --validation_steps, else each time so many epochs have gone by."""
    if not args.validation_prompts:
        return False
    if args.validation_steps:
        return step % args.validation_steps == 0
    period = args.validation_epochs * num_rows
    return examples_after // period > examples_before // period


def main(args):
    """Train as `args` (from `parse_args`) say. Every launcher ends here. Raises RunError, or RunStopped at a signal."""
    accelerator = make_accelerator(args)
    path, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    if args.check_data:
        with naming(f"--pretrained_model_name_or_path {path}"):
            tokenizer = with_retries(CLIPTokenizer.from_pretrained, path, subfolder="tokenizer", **hub)
        dataset = load_train_dataset(args, ["image_column", "caption_column"], args.seed or 0)
        return on_main_process(accelerator, check_data, args, dataset, tokenizer, args.resolution)
    check_output_dir(args, [path])
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    # Where the run starts: step 0, or a checkpoint.
    checkpoint, start = find_start(args, "unet")
    first_step, examples_seen, seed = start["step"], start["examples_seen"], start["seed"]

    # Models: the UNet in float32, the frozen ones in the precision of the mixed-precision mode.
    weights = {**hub, "variant": args.variant, "use_safetensors": True, "dtype": torch.float32}
    unet_revision = args.non_ema_revision or args.revision
    frozen_weights = {**weights, "dtype": weight_dtype}
    check_model_folder("pretrained_model_name_or_path", path, ["scheduler", "tokenizer", "text_encoder", "vae", "unet"])
    with naming(f"--pretrained_model_name_or_path {path}" + (f", {checkpoint}" if checkpoint else "")):
        noise_scheduler = with_retries(DDPMScheduler.from_pretrained, path, subfolder="scheduler", **hub)
        tokenizer = with_retries(CLIPTokenizer.from_pretrained, path, subfolder="tokenizer", **hub)
        text_encoder = with_retries(CLIPTextModel.from_pretrained, path, subfolder="text_encoder", **frozen_weights)
        vae = with_retries(AutoencoderKL.from_pretrained, path, subfolder="vae", **frozen_weights)
        if checkpoint:
            config = with_retries(
                UNet2DConditionModel.load_config, path, subfolder="unet", **{**hub, "revision": unet_revision}
            )
            check_same_architecture(checkpoint, start, config)
            unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", use_safetensors=True)
        else:
            unet = with_retries(
                UNet2DConditionModel.from_pretrained, path, subfolder="unet", **{**weights, "revision": unet_revision}
            )
        ema_start = unet
        if args.use_ema and checkpoint:
            ema_start = UNet2DConditionModel.from_pretrained(checkpoint / "unet_ema", use_safetensors=True)
        # All that the result is made of, in full precision, so that nothing can be missing after the training.
        pipeline = drawing = None
        if accelerator.is_main_process:
            pipeline = with_retries(StableDiffusionPipeline.from_pretrained, path, unet=unet, **weights)
        if args.validation_prompts:
            parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
            parts |= {"safety_checker": None, "requires_safety_checker": False}
            drawing = with_retries(StableDiffusionPipeline.from_pretrained, path, **parts, **hub)
    check_architecture(unet, vae, text_encoder, tokenizer, args.resolution)
    ema_unet = offloaded = None
    if args.use_ema:
        ema_unet = EMAModel(ema_start.parameters(), foreach=True)
        ema_unet.optimization_step = first_step
    prediction_type = args.prediction_type or noise_scheduler.config.prediction_type
    for own in filter(None, (pipeline, drawing)):
        own.scheduler.register_to_config(prediction_type=prediction_type)  # what it samples is what it learned
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)
    check_objective(prediction_type, alphas_cumprod)

    # Data.
    dataset = load_train_dataset(args, ["image_column", "caption_column"], seed)
    if args.skip_bad_images or not args.cache_encodings:
        dataset = leave_out(dataset, on_main_process(accelerator, check_images, args, dataset))
    batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    last_step, end = plan_course(args, batch_size, len(dataset), first_step, examples_seen)
    run = {"seed": seed, "batch_size": batch_size, "rows": len(dataset), "architecture": public_config(unet.config)}
    run["data_digest"] = on_main_process(accelerator, data_digest, dataset)
    if checkpoint:
        check_same_course(checkpoint, run)

    # Optimizer.
    prepare_for_training(accelerator, args, unet, (*unet.down_blocks, unet.mid_block, *unet.up_blocks))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        enable_xformers(unet)
    optimizer = make_optimizer(args, unet.parameters(), accelerator.device, batch_size if args.scale_lr else 1)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if ema_unet:
        place_ema(ema_unet, unet, accelerator.device, args.offload_ema)
        if args.offload_ema:
            offloaded = AverageInMainMemory(ema_unet, local_parameters(unet), accelerator, optimizer)
    keep_weights_apart(accelerator)
    if checkpoint:
        load_optimizer(accelerator, optimizer, checkpoint)
    lr_scheduler = make_lr_scheduler(args, optimizer, first_step, last_step)
    in_backward = StepInBackward(optimizer.optimizer) if args.optimizer_in_backward else None

    # All that can refuse the run without writing has spoken.
    repo_id = on_main_process(accelerator, prepare_hub_repository, args) if args.push_to_hub else args.hub_model_id
    on_main_process(accelerator, prepare_output_dir, args, first_step, last_step)
    if accelerator.is_main_process:
        check_disk_space(args.output_dir, *expected_sizes(args, unet, pipeline))

    # One stream of examples for the whole run, entered where the checkpoint was made.
    latents_shape = (vae.config.latent_channels, *[args.resolution // vae_factor(vae)] * 2)
    rows, preprocess = prepare_rows(accelerator, args, dataset, tokenizer, vae, text_encoder, latents_shape)
    preprocess = functools.partial(preprocess, latents_shape, len(alphas_cumprod))
    stream = ExampleStream(rows, preprocess, seed, examples_seen, end)
    train_dataloader = accelerator.prepare_data_loader(make_dataloader(args, stream, accelerator.device))
    start_trackers(accelerator, args, seed)

    # Loop.
    logger.info(f"{len(dataset)} images, {batch_size} per step, steps {first_step} to {last_step}, seed {seed}")
    log, exchange, stop = UpdateLog(accelerator, args, first_step, last_step), SignalExchange(accelerator), 0
    batches = iter(train_dataloader)
    with noted_signals() as noted:
        for step in range(first_step + 1, last_step + 1):
            if args.compile:
                torch.compiler.cudagraph_mark_step_begin()  # within an update, CUDA graphs hold its gradients
            examples, waited = [], 0
            for _ in range(args.gradient_accumulation_steps):
                wait_started = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - wait_started
                with accelerator.accumulate(unet):
                    losses = training_losses(batch, unet, vae, text_encoder, alphas_cumprod, prediction_type, args)
                    accelerator.backward(losses.mean())
                    if accelerator.sync_gradients:
                        gradient_norm = clip_gradient(accelerator, args, unet, in_backward)
                    optimizer.step()
                    optimizer.zero_grad()
                known = {"positions": batch["positions"], "timesteps": batch["timesteps"], "losses": losses.detach()}
                examples.append(known)
            if offloaded:
                offloaded.update(local_parameters(unet))
            elif ema_unet:
                update_ema(ema_unet, local_parameters(unet))
            log.add(step, examples, gradient_norm, lr_scheduler.get_last_lr()[0], batch_size, waited)
            lr_scheduler.step()

            examples_seen += batch_size
            stop = exchange.after_update(noted) if step < last_step else 0
            save = step % args.checkpointing_steps == 0 or stop
            draw = validation_due(args, step, examples_seen - batch_size, examples_seen, len(dataset))
            draw = draw and step < last_step and not stop
            if save or draw or step % args.logging_steps == 0 or step == last_step:
                log.flush()
                if offloaded:
                    offloaded.finish()
                save = save and log.worth_saving(stop)
            if save:
                state = {**run, "step": step, "examples_seen": examples_seen}
                save_checkpoint(accelerator, args, "unet", unet, ema_unet, state)
            if draw:
                with evaluation_weights(unet, ema_unet):
                    log_validation(drawing, accelerator, args, seed, step)
            if save or draw:
                log.restart_clock()
            if stop:
                break
        log.progress_bar.close()
        if stop:
            accelerator.end_training()
            raise RunStopped(stop, f"after step {step}; the same command with --resume_from_checkpoint goes on")
        with evaluation_weights(unet, ema_unet):
            output_dir = Path(args.output_dir)
            on_every_process(accelerator, output_dir, save_pipeline, accelerator, pipeline, "unet", unet, output_dir)

    # Result.
    validation_image = None
    if args.validation_prompts:
        with evaluation_weights(unet, ema_unet):
            validation_image = log_validation(drawing, accelerator, args, seed, last_step)
    name = repo_id or args.output_dir
    card = (args, name, seed, *describe_result(args, name, last_step), validation_image)
    on_main_process(accelerator, save_model_card, *card)
    logger.info(f"saved the pipeline in {args.output_dir}")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        push_to_hub(args, repo_id)


if __name__ == "__main__":
    try:
        main(command_line)
    except RunError as error:
        line = str(error).rpartition("RunError: ")[2].strip()  # from a data worker it comes behind a traceback
        tqdm.write(f"error: {printable(line)}", file=sys.stderr)
        sys.exit(1)
    except RunStopped as stopped:
        logger.warning(stopped)
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        tqdm.write("stopped; --resume_from_checkpoint goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
