"""Fine-tune Stable Diffusion 1.x or 2.x on captioned images, in JAX.

    python train_text_to_image_flax.py \
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir=my_images --use_ema --learning_rate=1e-5 --max_train_steps=15000

Over latents x_0 of images, their captions c, timesteps t and noise ε ~ N(0, I), it minimises

    E [ w(t) · ‖ target − unet(x_t, t, c) ‖² ]    with    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε

where target is ε (Ho et al. 2020, arXiv:2006.11239, eq. 14, with Rombach et al. 2022, arXiv:2112.10752, for the
latents), √ᾱ_t · ε − √(1 − ᾱ_t) · x_0 (v-prediction: Salimans & Ho 2022, arXiv:2202.00512) or x_0, as the model's
scheduler says, and w(t) is 1 or the Min-SNR weight (Hang et al. 2023, arXiv:2303.09556).

The same program runs on one chip, on all chips of a host and on many hosts.
"""

import argparse
import contextlib
import errno
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
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
import traceback
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
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

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="pipeline to start from: a folder or a Hub id")
    add("--revision", help="branch, tag or commit of the pipeline on the Hub")
    add("--variant", help="variant of its weight files, such as fp16")
    add("--non_ema_revision", help="Hub revision of the UNet to train, if it is not --revision")
    add("--cache_dir", help="where downloads of models and data sets are kept")
    add("--from_pt", action="store_true", help="accepted and not needed: the format of the weights is recognised")

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
    add("--dataloader_num_workers", type=int, help="processes that read images; default: 0, there are threads for it")
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
    add("--seed", type=int, default=0, help="seed of the whole run")
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
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    add("--max_nonfinite_steps", type=int, help="stop at so many non-finite updates in a row; default: 1, with fp16 20")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="what the models compute in")
    add("--shard_params", action="store_true", help="spread weights, average and optimizer state over the devices")
    add("--local_rank", type=int, default=-1, help="accepted and not needed: the launcher tells each process its rank")

    add = parser.add_argument_group("EMA").add_argument
    add("--use_ema", action="store_true", help="keep an average of the weights; it is validated and saved")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", default="sd-model-finetuned", help="folder for the pipeline, its checkpoints and logs")
    add("--checkpointing_steps", type=int, default=500, help="updates from one checkpoint to the next")
    add("--checkpoints_total_limit", type=int, help="keep the newest so many checkpoints; default: all")
    add("--resume_from_checkpoint", nargs="?", const="latest", help="go on from checkpoint-<step>, or the latest")
    add("--save_flax_weights", action="store_true", help="save the .msgpack files of FlaxStableDiffusionPipeline too")

    add = parser.add_argument_group("validation and logs").add_argument
    add("--validation_prompts", nargs="+", help="prompts to draw while training and at its end")
    add("--validation_epochs", type=int, default=5, help="passes over the data from one drawing to the next")
    add("--validation_steps", type=int, help="updates from one drawing to the next, instead of epochs")
    add(
        "--logging_steps", type=int, default=10, help="updates from one reading of the loss to the next; all are logged"
    )
    add("--logging_dir", default="logs", help="folder of the TensorBoard logs, inside --output_dir")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "all"], help="tracker, or all of them")
    add("--tracker_project_name", default="text2image-fine-tune", help="name of the project in the tracker")
    add("--generate", metavar="PROMPT", help="do not train: draw this prompt with the pipeline, and write a PNG")

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
import flax.serialization
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import PIL.Image
import PIL.ImageOps
from absl import flags as absl_flags
from absl import logging as absl_logging
from datasets.arrow_writer import ArrowWriter
from flax import nnx
from huggingface_hub import HfApi, ModelCardData, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pyarrow import compute
from safetensors import numpy as safetensors
from tqdm.auto import tqdm

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


def preprocess_train(args, tokenizer, row, rng):
    """Make a training example of a dataset's row; its crop, flip and caption are drawn from `rng` in a fixed order.

    Returns arrays: "pixel_values" (resolution, resolution, 3), uint8, and "input_ids" (77,). The rest of what is random
    about an example is drawn on the device, by `draw_noise`.
    """
    crop = (args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip)
    pixel_values = train_transforms(read_image(row[args.image_column]), *crop, rng)
    caption = choose_caption(row[args.caption_column], args.proportion_empty_prompts, rng)
    return {"pixel_values": pixel_values, "input_ids": tokenize_captions([caption], tokenizer)["input_ids"][0]}


def preprocess_encoded(args, encodings, row, rng):
    """Make the example that `preprocess_train` makes of the same row and `rng`, of its encodings.

    encodings: {name: `Encoding`}; row: of `EncodedRows`. Returns arrays: "moments" and "text_states", as of `encode`,
    instead of what the encoders make them of.
    """
    *_, flip = rng.random(3)
    states = choose_caption(row["text_states"], args.proportion_empty_prompts, rng)
    chosen = {"moments": row["moments"][int(args.random_flip and flip < 0.5)]}
    chosen["text_states"] = row["empty"]["text_states"][0] if states == "" else states
    return {
        name: np.frombuffer(value, encodings[name].dtype).reshape(encodings[name].shape)
        for name, value in chosen.items()
    }


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

    Returns arrays: "pixel_values" (1, resolution, resolution, 3), uint8, with --random_flip (2, ...), the second
    mirrored, and "input_ids" (captions, 77).
    """
    image = PIL.Image.new("RGB", [args.resolution] * 2) if row is None else read_image(row[args.image_column])
    captions = "" if row is None else row[args.caption_column]
    crop = (args.resolution, args.image_interpolation_mode, args.center_crop, False)
    pixel_values = train_transforms(image, *crop, random_generator(0))
    flips = [pixel_values, pixel_values[:, ::-1]][: 1 + args.random_flip]
    tokens = tokenize_captions([captions] if isinstance(captions, str) else captions, tokenizer)
    return {"pixel_values": np.stack(flips), "input_ids": tokens["input_ids"]}


class InputBatches:
    """An `EncoderInputs` in batches of `size` rows: "rows", "inputs" {input: the versions of all of them in one array}
    and "versions" {input: how many each row has}.

    A row that can't be read becomes {"error": str}, as in `HostShare`.
    """

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return math.ceil(len(self.source) / self.size)

    def __getitem__(self, number):
        first = number * self.size
        try:
            examples = [self.source[index] for index in range(first, min(first + self.size, len(self.source)))]
        except RunError as error:
            return {"error": str(error)}
        rows, inputs = zip(*examples, strict=True)
        joined = {name: np.concatenate([versions[name] for versions in inputs]) for name in inputs[0]}
        numbers = {name: np.array([len(versions[name]) for versions in inputs]) for name in joined}
        return {"rows": np.array(rows), "inputs": joined, "versions": numbers}


def equal_pieces(array, size):
    """Cut an array (n, ...) into pieces of `size`, the last one filled up with zeros: an array (pieces, size, ...)."""
    missing = -len(array) % size
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)).reshape(-1, size, *array.shape[1:])


def encoded_batches(args, source, encodings, models, weights):
    """What the frozen encoders make of this process's rows, an `EncoderInputs`, on its own devices.

    Yields (rows, {name: [array of a row's versions]}). The devices encode a batch while the one before is looked at.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    size, dtype = args.train_batch_size * len(devices), compute_type(args)
    make = jax.jit(functools.partial(encode, models=models, dtype=dtype))

    def encoded(name, batch):
        pieces = equal_pieces(batch["inputs"][name], size)  # of one shape, so that it is compiled once
        pieces = [jax.device_put(piece, NamedSharding(mesh, PartitionSpec("data"))) for piece in pieces]
        return [make({name: piece}, frozen) for piece in pieces]

    def versions_of(name, made, batch):
        whole = np.concatenate([piece[name] for piece in made])
        return np.split(whole, np.cumsum(batch["versions"][encodings[name].source]))[:-1]

    batches = read_ahead(InputBatches(source, size), args.dataloader_num_workers or 0)
    with contextlib.closing(batches), naming("--cache_encodings: the images cannot be encoded"):
        frozen = on_devices({part: weights[part] for part in FROZEN}, mesh, dtype)
        started = ((batch, {name: encoded(encodings[name].source, batch) for name in encodings}) for batch in batches)
        for (batch, made), _ in itertools.pairwise(itertools.chain(started, [None])):
            made = jax.device_get(made)
            yield batch["rows"], {name: versions_of(name, made[name], batch) for name in encodings}


FAILED = 2**16  # where otherwise the number of a signal is agreed upon: larger than them


def write_encodings(args, folder, source, digests, encodings, models, weights, steps):
    """Write the encodings of this process's rows, an `EncoderInputs`, to `folder`. To be called by every process.

    steps: the largest number of batches that one has. If one fails or is to stop, all end after their next batch, and
    keep what they have made. Raises RunError, or RunStopped if none has failed.
    """
    digests = np.append(digests, digest_of("empty"))
    batches = encoded_batches(args, source, encodings, models, weights)
    progress_bar = tqdm(total=source.images, desc="encoding", unit="image", disable=jax.process_index() != 0)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    agreement, failure, writer = SignalAgreement(mesh), None, EncodingsWriter(folder, encodings)

    def finish():
        writer.write()
        if failure:
            raise failure

    with contextlib.closing(batches), noted_signals() as noted, progress_bar, writer:
        for _ in range(steps + 1):  # the last one only to agree
            try:
                with writing(folder):  # whatever it is that fails, the others must hear of it
                    for rows, made in itertools.islice(batches, 0 if failure or not len(source) else 1):
                        made = {name: [[value.tobytes() for value in row] for row in made[name]] for name in encodings}
                        writer.add([digests[row] for row in rows], made)
                        progress_bar.update(sum(row < len(source.dataset) for row in rows))
            except RunError as error:
                failure = error
            if agreement.after_update([FAILED] if failure else noted):
                break
        on_all_processes(folder, finish)
        stop = int(multihost_utils.process_allgather(np.int32(noted[0] if noted else 0)).max())
    if stop:
        raise RunStopped(stop, "while encoding; the same command goes on")


def cached_rows(args, dataset, encodings, settings, inputs, models, weights):
    """All rows of `dataset` as `EncodedRows` of --cache_encodings. To be called by every process. Raises RunError.

    What is not there is made first, by all processes together; only meanwhile are the frozen weights on the devices.
    encodings: {name: `Encoding`}; settings: what else decides about them, values that JSON can hold; inputs: as of
    `EncoderInputs`; models, weights: of `load_models`.
    """
    arrays = ((f"{part}.{name}", array) for part in FROZEN for name, array in weights[part].items())
    settings = [settings, encodings, [public_config(vars(models[part].config)) for part in FROZEN]]
    folder = Path(on_first_process(lambda: str(encodings_folder(args, settings, arrays))))
    digests, missing = on_first_process(rows_to_encode, args, folder, dataset, encodings)
    if missing:
        own = missing[jax.process_index() :: jax.process_count()]
        source = EncoderInputs(dataset, own, inputs)
        steps = math.ceil(len(missing) / jax.device_count() / args.train_batch_size)
        write_encodings(args, folder, source, digests, encodings, models, weights, steps)
    rows = EncodedRows(folder, digests)
    if len(rows.missing):
        raise RunError(f"--cache_encodings {folder}: has to be on a disk that all processes see")
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------

# Attribute paths are the names in PyTorch checkpoints, such as `down_blocks.0.attentions.1.proj_in`: `name_of` is all
# there is to know about loading and saving. Images and latents are arrays (batch, height, width, channels).


def convolution(in_channels, out_channels, size, rngs, stride=1):
    """A square convolution of `size`; the edge is padded with `size` // 2 zeros."""
    return nnx.Conv(in_channels, out_channels, (size, size), strides=stride, padding=size // 2, rngs=rngs)


def group_norm(channels, config, epsilon, rngs):
    """Group normalisation in config.norm_num_groups groups; the variance is taken in two passes, as PyTorch does."""
    groups = config.norm_num_groups
    return nnx.GroupNorm(channels, groups, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def layer_norm(channels, epsilon, rngs):
    """Layer normalisation over the channels; the variance is taken in two passes, as PyTorch does."""
    return nnx.LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def attention_kernel(device, dtype, head_size):
    """What `jax.nn.dot_product_attention` is to compute with: "cudnn", or None for XLA, which holds all the weights.

    cuDNN's flash attention takes half precision and head sizes that are multiples of 8, up to 128 on each of Nvidia's
    GPUs since Ampere and up to 256 on some. device: a `jax.Device`.
    """
    capability = getattr(device, "compute_capability", "")  # of AMD's GPUs it is a name, such as gfx942
    recent = device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8
    fits = dtype in (jnp.float16, jnp.bfloat16) and head_size % 8 == 0 and head_size <= 128
    return "cudnn" if recent and fits else None


def attend(query, key, value, heads, is_causal=False):
    """Multi-head attention of query (b, n, channels) to key and value (b, m, channels). Softmax in float32."""
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    kernel = attention_kernel(jax.local_devices()[0], query.dtype, query.shape[-1])
    out = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation=kernel)
    return out.reshape(*out.shape[:2], -1)


class CLIPAttention(nnx.Module):
    """Causal self-attention of CLIP's text encoder."""

    def __init__(self, config, rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.k_proj = nnx.Linear(width, width, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, rngs=rngs)
        self.q_proj = nnx.Linear(width, width, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, is_causal=True))


class CLIPMLP(nnx.Module):
    """The feed-forward half of a CLIP layer, with `quick_gelu` (SD 1.x) or the exact `gelu` (SD 2.x)."""

    def __init__(self, config, rngs):
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x):
        x = self.fc1(x)
        return self.fc2(x * jax.nn.sigmoid(1.702 * x) if self.quick else jax.nn.gelu(x, approximate=False))


class CLIPEncoderLayer(nnx.Module):
    """A pre-norm transformer layer of CLIP."""

    def __init__(self, config, rngs):
        self.self_attn = CLIPAttention(config, rngs)
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.mlp = CLIPMLP(config, rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEmbeddings(nnx.Module):
    """Embeddings of tokens and of their places."""

    def __init__(self, config, rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, input_ids):
        # Not by calling them: nnx.Embed computes in the type that it was made with, whatever its weights are.
        tokens, positions = self.token_embedding.embedding[...], self.position_embedding.embedding[...]
        return tokens[input_ids] + positions[: input_ids.shape[-1]]


class CLIPEncoder(nnx.Module):
    """The layers of CLIP, one after the other."""

    def __init__(self, config, rngs):
        self.layers = nnx.List([CLIPEncoderLayer(config, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextTransformer(nnx.Module):
    """What `CLIPTextModel` holds under the name `text_model`."""

    def __init__(self, config, rngs):
        self.embeddings = CLIPTextEmbeddings(config, rngs)
        self.encoder = CLIPEncoder(config, rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, input_ids):
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextModel(nnx.Module):
    """CLIP's text encoder (arXiv:2103.00020): token ids (b, n) to states (b, n, hidden_size)."""

    def __init__(self, config, rngs):
        self.text_model = CLIPTextTransformer(config, rngs)

    def __call__(self, input_ids):
        return self.text_model(input_ids)


class ResnetBlock2D(nnx.Module):
    """Two convolutions around a skip connection; in the UNet, the embedded timestep is added between them."""

    def __init__(self, in_channels, out_channels, time_channels, config, epsilon, rngs):
        self.norm1 = group_norm(in_channels, config, epsilon, rngs)
        self.conv1 = convolution(in_channels, out_channels, 3, rngs)
        if time_channels:
            self.time_emb_proj = nnx.Linear(time_channels, out_channels, rngs=rngs)
        self.norm2 = group_norm(out_channels, config, epsilon, rngs)
        self.conv2 = convolution(out_channels, out_channels, 3, rngs)
        self.projects = in_channels != out_channels
        if self.projects:
            self.conv_shortcut = convolution(in_channels, out_channels, 1, rngs)

    def __call__(self, x, time_embedding=None):
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if time_embedding is not None:
            hidden += self.time_emb_proj(jax.nn.silu(time_embedding))[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return (self.conv_shortcut(x) if self.projects else x) + hidden


class Downsample2D(nnx.Module):
    """Halves the side by a strided convolution, padded evenly in the UNet and to the right and bottom in the VAE."""

    def __init__(self, channels, padding, rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=padding, rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles the sides by repeating pixels, cut to those of `like`, which are odd where an odd side was halved."""

    def __init__(self, channels, rngs):
        self.conv = convolution(channels, channels, 3, rngs)

    def __call__(self, x, like=None):
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return self.conv(x if like is None else x[:, : like.shape[1], : like.shape[2]])


class AttentionBlock(nnx.Module):
    """Self-attention of the VAE, over all pixels, with one head."""

    def __init__(self, channels, config, rngs):
        self.group_norm = group_norm(channels, config, 1e-6, rngs)
        self.to_q = nnx.Linear(channels, channels, rngs=rngs)
        self.to_k = nnx.Linear(channels, channels, rngs=rngs)
        self.to_v = nnx.Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x):
        hidden = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        hidden = attend(self.to_q(hidden), self.to_k(hidden), self.to_v(hidden), heads=1)
        return x + self.to_out[0](hidden).reshape(x.shape)


class UNetMidBlock2D(nnx.Module):
    """The middle of the VAE's halves."""

    def __init__(self, channels, config, rngs):
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, None, config, 1e-6, rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, config, rngs)] if config.mid_block_add_attention else [])

    def __call__(self, x):
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class DownEncoderBlock2D(nnx.Module):
    """A level of the VAE's encoder."""

    def __init__(self, in_channels, out_channels, is_last, config, rngs):
        sizes = [in_channels] + [out_channels] * config.layers_per_block
        self.resnets = nnx.List([ResnetBlock2D(*pair, None, config, 1e-6, rngs) for pair in itertools.pairwise(sizes)])
        self.downsamplers = nnx.List([] if is_last else [Downsample2D(out_channels, ((0, 1), (0, 1)), rngs)])

    def __call__(self, x):
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(nnx.Module):
    """A level of the VAE's decoder."""

    def __init__(self, in_channels, out_channels, is_last, config, rngs):
        sizes = [in_channels] + [out_channels] * (config.layers_per_block + 1)
        self.resnets = nnx.List([ResnetBlock2D(*pair, None, config, 1e-6, rngs) for pair in itertools.pairwise(sizes)])
        self.upsamplers = nnx.List([] if is_last else [Upsample2D(out_channels, rngs)])

    def __call__(self, x):
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """The VAE's encoder: pixels to twice the latent channels."""

    def __init__(self, config, rngs):
        channels = config.block_out_channels
        self.conv_in = convolution(config.in_channels, channels[0], 3, rngs)
        sizes = [channels[0], *channels]
        last = len(channels) - 1
        self.down_blocks = nnx.List(
            [DownEncoderBlock2D(*pair, k == last, config, rngs) for k, pair in enumerate(itertools.pairwise(sizes))]
        )
        self.mid_block = UNetMidBlock2D(channels[-1], config, rngs)
        self.conv_norm_out = group_norm(channels[-1], config, 1e-6, rngs)
        self.conv_out = convolution(channels[-1], 2 * config.latent_channels, 3, rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """The VAE's decoder: latents to pixels."""

    def __init__(self, config, rngs):
        channels = config.block_out_channels[::-1]
        self.conv_in = convolution(config.latent_channels, channels[0], 3, rngs)
        self.mid_block = UNetMidBlock2D(channels[0], config, rngs)
        sizes = [channels[0], *channels]
        last = len(channels) - 1
        self.up_blocks = nnx.List(
            [UpDecoderBlock2D(*pair, k == last, config, rngs) for k, pair in enumerate(itertools.pairwise(sizes))]
        )
        self.conv_norm_out = group_norm(channels[-1], config, 1e-6, rngs)
        self.conv_out = convolution(channels[-1], config.out_channels, 3, rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The VAE of latent diffusion (arXiv:2112.10752)."""

    def __init__(self, config, rngs):
        latents = config.latent_channels
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        self.quant_conv = convolution(2 * latents, 2 * latents, 1, rngs)
        self.post_quant_conv = convolution(latents, latents, 1, rngs)

    def encode(self, pixel_values):
        """Pixels (b, height, width, 3) in [-1, 1] to the posterior's moments: means and log-variances, one behind the
        other in the channels."""
        return self.quant_conv(self.encoder(pixel_values))

    def decode(self, latents):
        """Unscaled latents to pixels, about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


class TimestepEmbedding(nnx.Module):
    """Sines and cosines of the timestep (arXiv:2006.11239), through two layers."""

    def __init__(self, config, rngs):
        self.channels, self.shift = config.block_out_channels[0], config.freq_shift
        self.cosine_first = config.flip_sin_to_cos
        self.linear_1 = nnx.Linear(self.channels, 4 * self.channels, rngs=rngs)
        self.linear_2 = nnx.Linear(4 * self.channels, 4 * self.channels, rngs=rngs)

    def __call__(self, timesteps, dtype):
        half = self.channels // 2
        frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - self.shift))
        angles = timesteps.astype(jnp.float32)[:, None] * frequencies
        parts = (jnp.cos(angles), jnp.sin(angles)) if self.cosine_first else (jnp.sin(angles), jnp.cos(angles))
        return self.linear_2(jax.nn.silu(self.linear_1(jnp.concatenate(parts, axis=-1).astype(dtype))))


class CrossAttention(nnx.Module):
    """Attention to a context (b, m, context_channels), or to itself without one."""

    def __init__(self, channels, context_channels, heads, rngs):
        self.heads = heads
        self.to_q = nnx.Linear(channels, channels, use_bias=False, rngs=rngs)
        self.to_k = nnx.Linear(context_channels, channels, use_bias=False, rngs=rngs)
        self.to_v = nnx.Linear(context_channels, channels, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x, context=None):
        context = x if context is None else context
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nnx.Module):
    """A linear layer gated by the exact GELU of another one (arXiv:2002.05202)."""

    def __init__(self, channels, inner_channels, rngs):
        self.proj = nnx.Linear(channels, 2 * inner_channels, rngs=rngs)

    def __call__(self, x):
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """The feed-forward part of a transformer block; place 1 of `net` is a dropout in PyTorch, which no SD uses."""

    def __init__(self, channels, rngs):
        layers = {"0": GEGLU(channels, 4 * channels, rngs), "2": nnx.Linear(4 * channels, channels, rngs=rngs)}
        self.net = nnx.Dict(layers)

    def __call__(self, x):
        return self.net["2"](self.net["0"](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, channels, heads, config, rngs):
        self.norm1 = layer_norm(channels, 1e-5, rngs)
        self.attn1 = CrossAttention(channels, channels, heads, rngs)
        self.norm2 = layer_norm(channels, 1e-5, rngs)
        self.attn2 = CrossAttention(channels, config.cross_attention_dim, heads, rngs)
        self.norm3 = layer_norm(channels, 1e-5, rngs)
        self.ff = FeedForward(channels, rngs)

    def __call__(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """A transformer over the pixels; its projections are convolutions in SD 1.x and linear layers in SD 2.x."""

    def __init__(self, channels, heads, config, rngs):
        def projection():
            if config.use_linear_projection:
                return nnx.Linear(channels, channels, rngs=rngs)
            return convolution(channels, channels, 1, rngs)

        self.norm = group_norm(channels, config, 1e-6, rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List([BasicTransformerBlock(channels, heads, config, rngs)])
        self.proj_out = projection()

    def __call__(self, x, context):
        hidden = self.proj_in(self.norm(x))
        hidden = self.transformer_blocks[0](hidden.reshape(x.shape[0], -1, x.shape[-1]), context)
        return x + self.proj_out(hidden.reshape(x.shape))


class UNetBlock(nnx.Module):
    """A level of the UNet on its way down, or at the bottom: residual blocks, each followed by attention if it has any.

    sizes: channels before each residual block and after the last one.
    """

    def __init__(self, sizes, heads, has_attention, downsamples, config, rngs):
        epsilon, time_channels = config.norm_eps, 4 * config.block_out_channels[0]
        pairs = list(itertools.pairwise(sizes))
        self.resnets = nnx.List([ResnetBlock2D(*pair, time_channels, config, epsilon, rngs) for pair in pairs])
        attentions = [Transformer2DModel(sizes[-1], heads, config, rngs) for _ in pairs if has_attention]
        self.attentions = nnx.List(attentions)
        self.downsamplers = nnx.List([Downsample2D(sizes[-1], 1, rngs)] if downsamples else [])

    def __call__(self, x, time_embedding, context):
        """Returns what each layer makes, for the way up; the last one goes on down."""
        outputs = []
        for k, resnet in enumerate(self.resnets):
            x = resnet(x, time_embedding)
            if len(self.attentions):
                x = self.attentions[k](x, context)
            outputs.append(x)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(x))
        return outputs


class UNetMidBlock2DCrossAttn(nnx.Module):
    """The bottom of the UNet."""

    def __init__(self, channels, heads, config, rngs):
        arguments = (channels, channels, 4 * config.block_out_channels[0], config, config.norm_eps, rngs)
        self.resnets = nnx.List([ResnetBlock2D(*arguments) for _ in range(2)])
        self.attentions = nnx.List([Transformer2DModel(channels, heads, config, rngs)])

    def __call__(self, x, time_embedding, context):
        x = self.attentions[0](self.resnets[0](x, time_embedding), context)
        return self.resnets[1](x, time_embedding)


class UNetUpBlock(nnx.Module):
    """A level of the UNet on its way up: each residual block joins what came down with what is on its way up."""

    def __init__(self, sizes, out_channels, heads, has_attention, upsamples, config, rngs):
        epsilon, time_channels = config.norm_eps, 4 * config.block_out_channels[0]
        rest = (out_channels, time_channels, config, epsilon, rngs)
        self.resnets = nnx.List([ResnetBlock2D(size, *rest) for size in sizes])
        attentions = [Transformer2DModel(out_channels, heads, config, rngs) for _ in sizes if has_attention]
        self.attentions = nnx.List(attentions)
        self.upsamplers = nnx.List([Upsample2D(out_channels, rngs)] if upsamples else [])

    def __call__(self, x, skips, above, time_embedding, context):
        """skips: what came down, in the order of use; above: what came down at the next level, for its sides."""
        for k, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(jnp.concatenate([x, skip], axis=-1), time_embedding)
            if len(self.attentions):
                x = self.attentions[k](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, above)
        return x


class UNet2DConditionModel(nnx.Module):
    """The UNet of Stable Diffusion 1.x and 2.x: noisy latents, timesteps (b,) and text states (b, n, d) to latents."""

    def __init__(self, config, rngs):
        channels, layers = config.block_out_channels, config.layers_per_block
        last = len(channels) - 1
        heads = config.attention_head_dim  # the published name; what it counts is heads
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        self.conv_in = convolution(config.in_channels, channels[0], 3, rngs)
        self.time_embedding = TimestepEmbedding(config, rngs)
        down_blocks, skips = [], [channels[0]]
        for k, (size, kind) in enumerate(zip(channels, config.down_block_types, strict=True)):
            sizes = [skips[-1]] + [size] * layers
            attends = kind.startswith("CrossAttn")
            down_blocks.append(UNetBlock(sizes, heads[k], attends, k != last, config, rngs))
            skips += [size] * (layers + (k != last))
        self.down_blocks = nnx.List(down_blocks)
        self.mid_block = UNetMidBlock2DCrossAttn(channels[-1], heads[-1], config, rngs)
        up_blocks, below = [], channels[-1]
        for k, kind in enumerate(config.up_block_types):
            size, attends = channels[last - k], kind.startswith("CrossAttn")
            sizes = [skips.pop() + (size if layer else below) for layer in range(layers + 1)]
            up_blocks.append(UNetUpBlock(sizes, size, heads[last - k], attends, k != last, config, rngs))
            below = size
        self.up_blocks = nnx.List(up_blocks)
        self.conv_norm_out = group_norm(channels[0], config, config.norm_eps, rngs)
        self.conv_out = convolution(channels[0], config.out_channels, 3, rngs)

    def __call__(self, x, timesteps, context, rematerialise=False):
        """rematerialise: keep only what goes from block to block, and compute the rest again for the gradient."""

        def call(block, *arguments):
            return block(*arguments)

        call = nnx.remat(call) if rematerialise else call
        time_embedding = self.time_embedding(timesteps, x.dtype)
        skips = [self.conv_in(x)]
        for block in self.down_blocks:
            skips += call(block, skips[-1], time_embedding, context)
        x = call(self.mid_block, skips[-1], time_embedding, context)
        for block in self.up_blocks:
            used = [skips.pop() for _ in block.resnets]
            above = skips[-1] if skips else None
            x = call(block, x, used, above, time_embedding, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Model(NamedTuple):
    """A module apart from its weights, which are a flat dict of arrays by their names in PyTorch checkpoints."""

    config: SimpleNamespace
    graphdef: nnx.GraphDef
    paths: dict  # {name in PyTorch checkpoints: path in the module}
    shapes: dict  # {name: shape in the module}

    def module(self, weights):
        """The module with `weights`, ready to be called."""
        flat = {self.paths[name]: nnx.Param(value) for name, value in weights.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def make_model(module_class, config):
    """Build a `Model` of `module_class` for `config` (SimpleNamespace), without making any weights."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module_class(config, nnx.Rngs(0))))
    flat = {name_of(path): (path, variable.shape) for path, variable in nnx.to_flat_state(state)}
    paths, shapes = ({name: pair[index] for name, pair in flat.items()} for index in (0, 1))
    return Model(config, graphdef, paths, shapes)


def name_of(path):
    """The name in a PyTorch checkpoint of the weight at `path` in a module, a tuple that ends with Flax's name."""
    return ".".join([*map(str, path[:-1]), "bias" if path[-1] == "bias" else "weight"])


def flax_path_of(path):
    """The place of a weight in diffusers' Flax checkpoints, a tuple: indices are part of a name, but not in CLIP."""
    if path[0] in ("encoder", "decoder") and "attentions" in path:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "proj_attn"}
        path = tuple(names.get(part, part) for above, part in itertools.pairwise((None, *path)) if above != "to_out")
    if path[0] == "text_model":
        return tuple(map(str, path))
    joined = []
    for part in map(str, path):
        joined = [*joined[:-1], f"{joined[-1]}_{part}"] if part.isdecimal() else [*joined, part]
    return tuple(joined)


def to_module_layout(path, array):
    """From PyTorch's (out, in, height, width) to (height, width, in, out), and (out, in) to (in, out)."""
    if path[-1] != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_checkpoint_layout(path, array):
    """The inverse of `to_module_layout`."""
    if path[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def weight_files(folder, variant):
    """List the files with the weights of a model's folder: safetensors, one or several, or Flax's msgpack.

    Raises RunError if there are none, also if all are of another variant.
    """
    stem, flax_name = "diffusion_pytorch_model", "diffusion_flax_model.msgpack"
    if folder.name == "text_encoder":
        stem, flax_name = "model", "flax_model.msgpack"
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        with naming(f"{index}"):
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        names = [f"{stem}{suffix}.safetensors"] if variant else [f"{stem}.safetensors", flax_name]
        files = [folder / name for name in names if (folder / name).is_file()][:1]
    missing = [path.name for path in files if not path.is_file()]
    if files and not missing:
        return files
    others = ", ".join(sorted({path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".msgpack")}))
    what = (
        f"{', '.join(missing)} is missing"
        if missing
        else f"holds no weights of {f'variant {variant}' if variant else 'the plain variant'}"
    )
    hint = ""
    if any(folder.glob("*.bin")):
        hint = ", for pickles can run code; if you trust them, with PyTorch: "
        hint += "DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)"
    raise RunError(f"{folder}: {what}, only {others or 'files that are not read'}; .bin files are not loaded{hint}")


def read_weights(model, folder, variant):
    """Read a model's weights: {name: NumPy array in the module's layout, in float32}.

    Takes the names of all releases of diffusers and transformers. Raises RunError that names what is missing, not
    expected or of another shape.
    """
    tensors = {}
    for file in weight_files(folder, variant):
        with naming(f"{file}: cannot be read"):
            if file.suffix == ".msgpack":
                tensors = flatten(flax.serialization.msgpack_restore(file.read_bytes()))
                places = {flax_path_of(path): name for name, path in model.paths.items()}
                tensors = {places.get(place, "/".join(place)): array for place, array in tensors.items()}
            else:
                for name, array in safetensors.load_file(file).items():
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
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(attentions\.0\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{names[m[2]]}.", name)


def flatten(tree, place=()):
    """A nested dict as {(key, key, ...): leaf}."""
    if not isinstance(tree, dict):
        return {place: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in flatten(value, (*place, key)).items()}


def write_weights(model, weights, folder, flax_too):
    """Write weights {name: array in the module's layout} as safetensors, and as Flax's msgpack beside them if asked."""
    stem, flax_name = "diffusion_pytorch_model", "diffusion_flax_model.msgpack"
    if folder.name == "text_encoder":
        stem, flax_name = "model", "flax_model.msgpack"
    arrays = {name: np.ascontiguousarray(to_checkpoint_layout(model.paths[name], weights[name])) for name in weights}
    safetensors.save_file(arrays, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    if flax_too:
        tree = {}
        for name, array in weights.items():
            *branches, leaf = flax_path_of(model.paths[name])
            functools.reduce(lambda node, key: node.setdefault(key, {}), branches, tree)[leaf] = array
        (folder / flax_name).write_bytes(flax.serialization.msgpack_serialize(tree))


# The fields of a configuration that say how a model is built, with what the libraries take for one that is not there.
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
# The only values that further fields, or all elements of a list, have in Stable Diffusion 1.x and 2.x.
FIXED = {
    "unet": {
        **{"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "mid_block_type": ["UNetMidBlock2DCrossAttn"]},
        **{"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "act_fn": ["silu"], "attention_type": ["default"]},
        **{"conv_in_kernel": [3], "conv_out_kernel": [3], "downsample_padding": [1], "dropout": [0]},
        **{"mid_block_scale_factor": [1], "resnet_out_scale_factor": [1], "transformer_layers_per_block": [1]},
        **{"resnet_time_scale_shift": ["default"], "time_embedding_type": ["positional"]},
        **dict.fromkeys(("center_input_sample", "dual_cross_attention", "only_cross_attention"), [False]),
        **dict.fromkeys(("resnet_skip_time_act", "class_embeddings_concat"), [False]),
        **dict.fromkeys(("addition_embed_type", "class_embed_type", "cross_attention_norm", "encoder_hid_dim"), [None]),
        **dict.fromkeys(("num_attention_heads", "num_class_embeds", "time_cond_proj_dim", "timestep_post_act"), [None]),
        **dict.fromkeys(("time_embedding_act_fn", "time_embedding_dim"), [None]),
    },
    "vae": {
        **{"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "act_fn": ["silu"]},
        **dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), [True]),
        **dict.fromkeys(("latents_mean", "latents_std", "shift_factor"), [None]),
    },
    "text_encoder": {"hidden_act": ["quick_gelu", "gelu"], "model_type": ["clip_text_model"]},
}


def read_config(folder):
    """Read config.json of a model's folder as a SimpleNamespace of FIELDS. Raises RunError if FIXED is not met."""
    part = folder.name
    with naming(f"{folder / 'config.json'}"):
        config = json.loads((folder / "config.json").read_text())
    for field, allowed in FIXED[part].items():
        value = config.get(field, allowed[0])
        if not all(element in allowed for element in (value if isinstance(value, list) else [value])):
            raise RunError(
                f"{folder / 'config.json'}: {field} is {json.dumps(value)}; in Stable Diffusion 1.x and 2.x, which "
                f"alone are supported, it is {' or '.join(map(json.dumps, allowed))}"
            )
    return SimpleNamespace(**{field: config.get(field, default) for field, default in FIELDS[part].items()})


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
    squared_error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return weight * squared_error.reshape(len(weight), -1).mean(1)


def training_alphas_cumprod(config):
    """ᾱ of all timesteps, a float32 array, from a scheduler's configuration (dict). Raises RunError if unknown.

    Schedules: "linear" (arXiv:2006.11239), "scaled_linear" (Stable Diffusion's: linear in √β), "squaredcos_cap_v2"
    (arXiv:2102.09672, eq. 17), or given as trained_betas; rescaled to zero terminal SNR if the configuration says so
    (arXiv:2305.08891, algorithm 1).
    """
    number, schedule = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif schedule == "linear":
        betas = np.linspace(first, last, number)
    elif schedule == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, number) ** 2
    elif schedule == "squaredcos_cap_v2":
        signal = np.cos((np.arange(number + 1) / number + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clip(max=0.999)
    else:
        raise RunError(f"scheduler/: beta_schedule {schedule} is not known")
    alphas_cumprod = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        root = alphas_cumprod**0.5
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas_cumprod.astype(np.float32)


def draw_noise(positions, key, latents_shape, num_train_timesteps):
    """What is random about examples besides crop, flip and caption: a function of the run's key and their positions.

    positions: (b, 2), uint32, high and low half of a position; latents_shape: (height, width, channels). Returns
    arrays: "posterior_noise", "noise" and "perturbation_noise" (b, *latents_shape), "offset_noise" (b, 1, 1, channels),
    "timesteps" (b,).
    """

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


def mean_and_deviation(moments):
    """The posterior's mean and standard deviation, in float32, of its moments (b, height, width, 2 · channels)."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.exp(0.5 * log_variance.clip(-30, 20))


# A table of what the 256 values of a pixel stand for: XLA multiplies by the inverse of 255, which is not exact.
PIXEL_RANGE = np.arange(256, dtype=np.float32) / 255 * 2 - 1


def encode(batch, frozen, models, dtype):
    """What the frozen encoders make of "pixel_values" (b, height, width, 3), uint8, and "input_ids" (b, 77), of those
    that are in the batch: "moments" of the VAE's posterior and "text_states" (b, 77, width), in `dtype`."""
    made = {}
    if "pixel_values" in batch:
        pixel_values = jnp.asarray(PIXEL_RANGE)[batch["pixel_values"]]
        made["moments"] = models["vae"].module(frozen["vae"]).encode(pixel_values.astype(dtype))
    if "input_ids" in batch:
        made["text_states"] = models["text_encoder"].module(frozen["text_encoder"])(batch["input_ids"])
    return made


def training_losses(params, frozen, batch, models, alphas_cumprod, prediction_type, args):
    """The losses of a micro-batch, of shape (b,). Pure: all that is random comes with the batch.

    params: weights of the UNet, in float32; frozen: {"vae": weights, "text_encoder": weights}, in the type to compute
    in, or {} if the batch is encoded; batch: arrays of `preprocess_train` or `preprocess_encoded`, and of `draw_noise`;
    models: {"unet", "vae", "text_encoder"}: `Model`; alphas_cumprod: ᾱ of all timesteps, (num_train_timesteps,).
    """
    dtype = COMPUTE_TYPES[args.mixed_precision]
    unet = models["unet"].module({name: value.astype(dtype) for name, value in params.items()})
    encodings = batch if "moments" in batch else encode(batch, frozen, models, dtype)
    mean, deviation = mean_and_deviation(encodings["moments"])
    latents = (mean + deviation * batch["posterior_noise"]) * models["vae"].config.scaling_factor
    encoder_hidden_states = encodings["text_states"]

    def predict(noisy_latents):
        inputs = (noisy_latents.astype(dtype), timesteps, encoder_hidden_states)
        return unet(*inputs, rematerialise=args.gradient_checkpointing).astype(jnp.float32)

    timesteps, noise = batch["timesteps"], batch["noise"]
    alphas = alphas_cumprod[timesteps][:, None, None, None]
    if args.noise_offset:
        noise = noise + args.noise_offset * batch["offset_noise"]
    input_noise = noise
    if args.input_perturbation:  # arXiv:2301.11706: the input gets this noise, the target does not
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


class CheckpointWriter:
    """Writes checkpoint-<step> whole or not at all, while training goes on, then prunes older ones.

    Orbax copies the state to main memory and writes it in the background, each process what it holds; a thread of the
    first process waits for that, and gives the folder its name. To be used by every process alike.
    """

    def __init__(self, args):
        self.args, self.checkpointer = args, ocp.StandardCheckpointer()
        self.executor, self.commit_under_way = ThreadPoolExecutor(1), None

    def save(self, train_state, state):
        """Start to write `train_state` (a tree of arrays) and `state`, a dict of CHECKPOINT_KEYS.

        The arrays may be donated as soon as this returns. Raises RunError if the last checkpoint was not written.
        """
        self.finish()
        partial = Path(self.args.output_dir).absolute() / f"checkpoint-{state['step']}.partial"
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        wait_for_everyone()
        with writing(Path(self.args.output_dir) / f"checkpoint-{state['step']}"):
            self.checkpointer.save(partial / "train_state", train_state)
        self.commit_under_way = self.executor.submit(self.commit, partial, state)

    def commit(self, partial, state):
        """Wait until every process has written its part, then name and prune; in the background. Raises RunError."""
        final = Path(self.args.output_dir) / f"checkpoint-{state['step']}"
        try:
            with writing(final):
                self.checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                finish_checkpoint(self.args, partial, final, state)
        except RunError:
            if jax.process_index() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def finish(self):
        """Wait until the checkpoint under way is written. Raises RunError if that failed."""
        if self.commit_under_way:
            commit, self.commit_under_way = self.commit_under_way, None
            commit.result()
            wait_for_everyone()

    def raise_error(self):
        """Raise RunError if the checkpoint under way has failed by now; does not wait."""
        if self.commit_under_way and self.commit_under_way.done() and self.commit_under_way.exception():
            self.finish()

    def close(self):
        """Wait for what is under way, whatever becomes of it, and let the threads go."""
        self.executor.shutdown()
        self.checkpointer.close()


def load_train_state(checkpoint, like):
    """Read the tree of arrays of a checkpoint. `like`: the same tree of `jax.ShapeDtypeStruct`s. Raises RunError."""
    with naming(f"{checkpoint}: the checkpoint is damaged or of another model"), ocp.StandardCheckpointer() as reader:
        return reader.restore(checkpoint.absolute() / "train_state", like)


# ----------------------------------------------------------------------------------------------------------------------
# Reporting
# ----------------------------------------------------------------------------------------------------------------------


def predicted_clean(prediction_type, prediction, noisy, alphas_cumprod):
    """The x_0 that a prediction stands for, given x_t. Finite for ᾱ > 0, with v and x_0 for ᾱ = 0 too."""
    if prediction_type == "epsilon":
        return (noisy - (1 - alphas_cumprod) ** 0.5 * prediction) / alphas_cumprod**0.5
    if prediction_type == "v_prediction":
        return alphas_cumprod**0.5 * noisy - (1 - alphas_cumprod) ** 0.5 * prediction
    return prediction


def ddim_steps(config, alphas_cumprod, number):
    """The timesteps of `number` steps of DDIM, largest first, and ᾱ before and after each: three arrays (number,).

    config: of the model's scheduler (dict), which says how timesteps are spaced (arXiv:2305.08891, table 2).
    """
    total, spacing = len(alphas_cumprod), config.get("timestep_spacing", "leading")
    if spacing == "leading":
        timesteps = np.arange(number)[::-1] * (total // number) + config.get("steps_offset", 0)
    elif spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / number)).astype(int) - 1
    else:
        timesteps = np.linspace(0, total - 1, number).round().astype(int)[::-1]
    if config.get("rescale_betas_zero_snr"):  # only the last timestep has no signal, and drawing has to start there
        timesteps = np.round(np.arange(total, 0, -total / number)).astype(int) - 1
    timesteps = timesteps.clip(0, total - 1)
    last = 1.0 if config.get("set_alpha_to_one", True) else alphas_cumprod[0]
    before = timesteps - total // number
    after = np.where(before >= 0, alphas_cumprod[before.clip(0)], last)
    return timesteps, alphas_cumprod[timesteps], after.astype(np.float32)


def sample(params, frozen, input_ids, latents, models, steps, prediction_type, guidance_scale, dtype):
    """Draw by DDIM (arXiv:2010.02502, eq. 12, η = 0) with classifier-free guidance (arXiv:2207.12598).

    input_ids: (2, b, n), of the prompts and of empty ones; latents: noise (b, height, width, channels); steps: of
    `ddim_steps`. Returns images (b, height, width, 3), uint8.
    """
    unet = models["unet"].module({name: value.astype(dtype) for name, value in params.items()})
    vae, text_encoder = (models[part].module(frozen[part]) for part in FROZEN)
    conditional, unconditional = text_encoder(input_ids[0]), text_encoder(input_ids[1])
    encoder_hidden_states = jnp.concatenate([unconditional, conditional])

    def step(latents, values):
        timestep, alpha, alpha_after = values
        inputs, timesteps = jnp.concatenate([latents, latents]).astype(dtype), jnp.repeat(timestep, 2 * len(latents))
        without, given = jnp.split(unet(inputs, timesteps, encoder_hidden_states).astype(jnp.float32), 2)
        prediction = without + guidance_scale * (given - without)
        clean = predicted_clean(prediction_type, prediction, latents, alpha)
        return add_noise(clean, predicted_noise(prediction_type, prediction, latents, alpha), alpha_after), None

    latents, _ = jax.lax.scan(step, latents, tuple(map(jnp.asarray, steps)))
    images = vae.decode((latents / models["vae"].config.scaling_factor).astype(dtype)).astype(jnp.float32)
    return jnp.round((images / 2 + 0.5).clip(0, 1) * 255).astype(jnp.uint8)


def validation_noise(seed, index, latents_shape):
    """The noise from which validation prompt number `index` is drawn in the run of `seed`, a float32 array."""
    return random_generator(seed, 2, index).standard_normal(latents_shape, dtype=np.float32)


def draw_prompts(draw, prompts, tokenizer, latents_shape, seed, mesh):
    """Draw every prompt (list of str), one per device at a time. Returns a list of `PIL.Image`.

    draw: `sample`, jitted, as a function of (input_ids, latents). To be called by every process.
    """
    images, devices = [], mesh.devices.size
    for first in range(0, len(prompts), devices):
        part = [*prompts[first : first + devices]]
        part += [""] * (devices - len(part))
        input_ids = np.stack([tokenize_captions(texts, tokenizer)["input_ids"] for texts in (part, [""] * devices)])
        latents = np.stack([validation_noise(seed, first + k, latents_shape) for k in range(devices)])
        drawn = draw(place(input_ids, mesh, PartitionSpec(None, "data")), place(latents, mesh, PartitionSpec("data")))
        images += [PIL.Image.fromarray(image) for image in to_host(drawn, mesh)]
    return images[: len(prompts)]


def log_validation(images, trackers, args, step):
    """Write the images (list of `PIL.Image`) as one PNG grid, and to the trackers. Returns the grid's Path."""
    path = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
    columns, gap = min(4, len(images)), 2
    width, height = images[0].width + gap, images[0].height + gap
    grid = PIL.Image.new("RGB", (columns * width + gap, math.ceil(len(images) / columns) * height + gap))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width + gap, index // columns * height + gap))
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    trackers.log_images(images, step)
    logger.info(f"drew {path}")
    return path


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


def check_trackers(args):
    """Raise RunError if a tracker that --report_to names is not installed."""
    packages = {"tensorboard": ["tensorboardX"], "wandb": ["wandb"], "all": ["tensorboardX", "wandb"]}[args.report_to]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise RunError(f"--report_to {args.report_to}: not installed here, run `pip install {package}`")


class Trackers:
    """TensorBoard and W&B, as --report_to says; on the first process only."""

    def __init__(self, args, seed):
        self.tensorboard = self.wandb = None
        if jax.process_index() != 0:
            return
        arguments, project = recorded_arguments(args, seed), args.tracker_project_name
        with naming(f"--report_to {args.report_to}"):
            if args.report_to in ("tensorboard", "all"):
                from tensorboardX import SummaryWriter

                folder = os.path.join(args.output_dir, args.logging_dir, project)
                self.tensorboard = SummaryWriter(folder, max_queue=10**6)  # so that nothing waits for a full one
                self.tensorboard.add_text("arguments", f"```json\n{json.dumps(arguments, indent=2)}\n```")
            if args.report_to in ("wandb", "all"):
                import wandb

                self.wandb, self.wandb_image = (
                    wandb.init(project=project, config=arguments, **WANDB_SETTINGS),
                    wandb.Image,
                )

    def log(self, values, step, walltime):
        """values: {name: float}, of update `step`. Raises RunError if they can't be written."""
        self.check_tensorboard()
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step, walltime)
        if self.wandb:
            self.wandb.log(values, step=step)

    def log_images(self, images, step):
        """images: list of `PIL.Image` of one size."""
        if self.tensorboard:
            self.tensorboard.add_images("validation", np.stack(images), step, dataformats="NHWC")
        if self.wandb:
            self.wandb.log({"validation": [self.wandb_image(image) for image in images]}, step=step)

    def check_tensorboard(self):
        """Raise RunError if the thread that writes has died, of a full disk: what it is given then waits for ever."""
        if self.tensorboard and not self.tensorboard.file_writer.event_writer._worker.is_alive():
            self.tensorboard = None
            raise RunError("--logging_dir: the TensorBoard log cannot be written any more; is the disk full?")

    def close(self):
        """Write out what is not written yet. The log says what can't be."""
        try:
            self.check_tensorboard()
            if self.tensorboard:
                self.tensorboard.close()
        except (RunError, OSError) as error:
            logger.warning(f"--logging_dir: {first_line(error)}")
        if self.wandb:
            self.wandb.finish()


# W&B would keep the command line otherwise, and an access token in it.
WANDB_SETTINGS = {"settings": {"x_disable_meta": True}}


class StepLog:
    """Collects what is known of every update and hands it to the trackers, waiting for the device only then.

    Logged per update: loss (mean over the global batch), learning rate, norm of the gradient before clipping, with
    fp16 the loss scale, examples per second, and the share of the time in which the process waited for data. The
    last two are means since the last reading: in between, updates are only queued.
    """

    def __init__(self, trackers, args, first_step, last_step):
        self.trackers, self.args, self.updates, self.waited, self.examples = trackers, args, [], 0, 0
        self.nonfinite, self.last_step = [], last_step
        hidden = jax.process_index() != 0 or first_step >= last_step
        self.progress_bar = tqdm(initial=first_step, total=last_step, disable=hidden, unit="step")
        self.restart_clock()

    def restart_clock(self):
        """Start timing the next update now: what happened since the last one was no training."""
        self.started = time.perf_counter()

    def add(self, step, metrics, examples, waited):
        """metrics: those of `train_step`, left on the device; examples: images of all processes; waited: seconds."""
        self.updates.append((step, time.time(), metrics))
        self.waited, self.examples = self.waited + waited, self.examples + examples
        self.progress_bar.update()

    def flush(self):
        """Hand over all updates since the last time. Raises RunError."""
        if not self.updates:
            return
        values = jax.device_get([metrics for *_, metrics in self.updates])  # waits for the device here, and only here
        seconds = time.perf_counter() - self.started
        speed = {"examples_per_second": self.examples / seconds, "data_wait": self.waited / seconds}
        for (step, walltime, _), metrics in zip(self.updates, values, strict=True):
            examples = metrics.pop("examples")
            self.trackers.log({name: float(value) for name, value in metrics.items()} | speed, step, walltime)
            self.note_finite(step, metrics, examples)
            limit = nonfinite_limit(self.args, self.args.mixed_precision)
            self.check_nonfinite(1 if step == self.last_step and self.args.mixed_precision != "fp16" else limit)
        loss = f"{metrics['train_loss']:.4f}"
        self.progress_bar.set_postfix(loss=loss, images_per_second=f"{speed['examples_per_second']:.1f}")
        self.updates, self.waited, self.examples = [], 0, 0
        self.restart_clock()

    def worth_saving(self, stop):
        """Whether the weights are those of finite updates. With fp16 they are: what is not finite is left out.

        Raises RunError if they are not and the run is to stop here.
        """
        if not self.nonfinite or self.args.mixed_precision == "fp16":
            return True
        if stop:
            self.check_nonfinite(1)
        logger.warning(f"step {self.nonfinite[-1]['step']} is not finite: no checkpoint is written of it")
        return False

    def check_nonfinite(self, limit):
        """Raise RunError if `limit` updates in a row were not finite, with a file that says which examples they saw."""
        if len(self.nonfinite) >= limit:
            self.progress_bar.close()
            on_first_process(save_nonfinite, self.args, self.nonfinite)

    def note_finite(self, step, metrics, examples):
        """Remember an update that was not finite, or forget those before one that was.

        examples: arrays (micro-steps, rows), and the halves of their positions (micro-steps, rows, 2).
        """
        if np.isfinite(metrics["train_loss"]) and np.isfinite(metrics["grad_norm"]):
            self.nonfinite = []
            return
        high, low = np.moveaxis(examples["positions"].astype(np.int64), -1, 0)
        examples = {**examples, "positions": (high << 32) + low}
        lists = {name: array.flatten().tolist() for name, array in examples.items()}
        self.nonfinite.append({"step": step, "gradient_norm": float(metrics["grad_norm"]), **lists})


def recorded_arguments(args, seed):
    """The flags that have a value, and the seed: plain values for trackers and files, and never the access token."""
    values = {**vars(args), "seed": seed, "hub_token": None}
    values = {name: value for name, value in sorted(values.items()) if value is not None}
    return {name: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for name, v in values.items()}


def describe_result(args, name, steps):
    """What the card of the model `name` says of its kind: (metadata, one sentence, Python code that uses it)."""
    base, source = args.pretrained_model_name_or_path, args.dataset_name or args.train_data_dir
    tags = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training", "jax"]
    metadata = ModelCardData(
        base_model=hub_id(base),
        datasets=[source] if hub_id(source) else None,
        library_name="diffusers",
        tags=tags,
    )
    prompt = as_json((args.validation_prompts or ["a prompt"])[0])
    usage = f"""from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({as_json(name)})
pipeline({prompt}).images[0].save("picture.png")"""
    return metadata, f"{as_code(base)}, fine-tuned in JAX on {as_code(source)} for {steps} updates of its UNet.", usage


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

COMPUTE_TYPES = {"no": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}
VALIDATION_STEPS, GENERATION_STEPS = 20, 50  # of DDIM
PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
FROZEN = ("vae", "text_encoder")


def compute_type(args):
    """The type that --mixed_precision says to compute in. Raises RunError if the devices do not have it."""
    if args.mixed_precision == "fp16" and jax.default_backend() == "cpu":
        raise RunError("--mixed_precision fp16: needs a GPU, a CPU has bf16")
    return COMPUTE_TYPES[args.mixed_precision]


@functools.cache  # once per process, however often `main` is called
def connect_hosts():
    """Join the other processes of the run, if there are any, before a device is used. Raises RunError.

    Asked in this order: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, which is how to
    start processes by hand; what JAX knows of the cluster (TPU pods, Slurm, Open MPI, Kubernetes); else there is one.
    """
    if jax.distributed.is_initialized():
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    try:
        if all(given):
            jax.distributed.initialize(given[0], int(given[1]), int(given[2]), shutdown_timeout_seconds=15)
        elif any(given):
            raise RunError(f"{', '.join(names)}: give all three, or none")
        else:
            jax.distributed.initialize(shutdown_timeout_seconds=15)
    except ValueError as error:
        if all(given) or "coordinator_address" not in str(error):
            raise RunError(f"JAX cannot connect to the other processes: {first_line(error)}") from error
    except RuntimeError as error:
        if all(given):
            raise RunError(f"JAX cannot connect to the other processes: {first_line(error)}") from error
        logger.info("JAX was in use before: training on this host alone")


def wait_for_everyone():
    """Wait until every process has come this far."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("wait_for_everyone")


def on_first_process(function, *arguments):
    """Call the function on the first process alone. Every process returns its result, or raises its RunError."""
    reply = b""
    if jax.process_index() == 0:
        try:
            reply = json.dumps([function(*arguments), None]).encode()
        except RunError as error:
            reply = json.dumps([None, str(error)]).encode()
    result, error = json.loads(bytes_of_process(0, reply))
    if error:
        raise RunError(error)
    return result


def bytes_of_process(number, own):
    """What process `number` has for `own` (bytes), in every process. To be called by all."""
    if jax.process_count() == 1:
        return own
    is_source = jax.process_index() == number
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(own)), is_source))
    own = np.frombuffer(own.ljust(length), np.uint8)[:length]
    return np.asarray(multihost_utils.broadcast_one_to_all(own, is_source)).tobytes()


def on_all_processes(path, function, *arguments):
    """Call the function, which writes to `path` (Path), on every process. All wait for all, and raise RunError if one
    of them does."""
    error = b""
    try:
        with writing(path):
            function(*arguments)
    except RunError as caught:
        error = str(caught).encode()
    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(len(error))))
    if len(failed):
        raise RunError(bytes_of_process(int(failed[0]), error).decode())


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


class SignalAgreement:
    """Tells every process of a signal that one of them has noted, at the same update.

    With several processes the answer is that of the update before, which the devices have done when it is asked for.
    """

    def __init__(self, mesh):
        self.asked, self.sharding = None, NamedSharding(mesh, PartitionSpec("data"))
        self.largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.devices = len(mesh.local_devices)

    def after_update(self, noted):
        """The number of the signal to stop for, or 0; noted: the list of `noted_signals`. To be called by all."""
        number = noted[0] if noted else 0
        if jax.process_count() == 1:
            return number
        answer = 0 if self.asked is None else int(jax.device_get(self.asked))
        numbers = np.full(self.devices, number, np.int32)
        self.asked = self.largest(jax.make_array_from_process_local_data(self.sharding, numbers))
        return answer


class AboveProgressBar(logging.Handler):
    """Writes log lines to stderr without tearing the progress bar apart."""

    def emit(self, record):
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def set_up_logging():
    """Let the first process speak, the others only of errors, and no progress bar but that of the training."""
    level = logging.INFO if jax.process_index() == 0 else logging.ERROR
    handler = AboveProgressBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax would log every error over pages that it raises as well
    # Of writes that fail, Orbax raises the first. The others would be told of one by one, as they come to an end.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = tell_unraisable


def tell_unraisable(unraisable):
    """The `sys.unraisablehook` of a run: silent on what reaches Orbax's event loop behind the loop's end."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def find_pipeline(path, revision, args, part="*"):
    """The local folder of a pipeline, downloaded if `path` is an id on the Hub, or of it the `part` alone (a folder's
    name). Raises RunError."""
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise RunError(f"--pretrained_model_name_or_path {path}: there is no such folder")
    folder = Path(path)
    if not folder.is_dir():
        suffix = f".{args.variant}" if args.variant else ""
        kinds = (f"{suffix}.safetensors", f"{suffix}-0*-of-*.safetensors")
        weights = [f"{part}/{stem}{kind}" for stem in ("model", "diffusion_pytorch_model") for kind in kinds]
        options = {"revision": revision, "cache_dir": args.cache_dir}
        with naming(f"--pretrained_model_name_or_path {path}"):
            wanted = ["*.json", f"{part}/*.json", *weights]
            wanted += ["tokenizer/*", "safety_checker/model.safetensors"] if part == "*" else [f"{part}/*.txt"]
            folder = Path(with_retries(snapshot_download, path, allow_patterns=wanted, **options))
            if not any((folder / "unet").glob("*.safetensors")):
                wanted.append(f"{part}/*flax_model.msgpack")
                folder = Path(with_retries(snapshot_download, path, allow_patterns=wanted, **options))
    for needed in ("scheduler", "tokenizer", *PARTS) if part == "*" else [part]:
        if not (folder / needed).is_dir():
            what = "the folder has no" if folder == Path(path) else "it has no"
            raise RunError(
                f"--pretrained_model_name_or_path {path}: {what} {needed}/, which a pipeline of this kind needs"
            )
    return folder


def load_tokenizer(folder):
    """The tokenizer of a pipeline's folder, a `CLIPTokenizer`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # on import, about models that are not used here
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


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


def check_architecture(models, tokenizer, resolution):
    """Raise RunError unless the models fit together, and the VAE takes the resolution."""
    unet, vae, text_encoder = (models[part] for part in PARTS)
    check_tokenizer(tokenizer, text_encoder)
    if unet.config.in_channels != vae.config.latent_channels:
        raise RunError(
            f"--pretrained_model_name_or_path: the UNet takes {unet.config.in_channels} channels and the VAE makes "
            f"{vae.config.latent_channels}; inpainting and depth models are not supported"
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise RunError(
            f"--pretrained_model_name_or_path: the UNet expects text states of width {unet.config.cross_attention_dim} "
            f"and the text encoder makes {text_encoder.config.hidden_size}; only Stable Diffusion 1.x and 2.x do"
        )
    factor = vae_factor(vae)
    if resolution % factor:
        larger = (resolution // factor + 1) * factor
        raise RunError(f"--resolution {resolution}: the VAE takes multiples of {factor}, such as {larger}")


def place(array, mesh, spec):
    """Put an array that every process holds on the devices of the mesh, as `spec` (PartitionSpec) says."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def on_devices(weights, mesh, dtype):
    """Put a tree of NumPy arrays, whole and as `dtype`, on every device of the mesh."""
    return jax.tree.map(lambda array: place(array.astype(dtype), mesh, PartitionSpec()), weights)


def known_to_all(value, mesh):
    """Put a small value that every process knows on every device of the mesh, without waiting for them."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), np.asarray(value))


@functools.cache  # so that it is compiled once
def gather(mesh):
    """The function that makes arrays of the mesh whole on every device."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def to_host(tree, mesh):
    """A tree of arrays as NumPy's, whole in every process. To be called by every process."""
    return jax.tree.map(np.asarray, gather(mesh)(tree))


def spread(shape, mesh, shard):
    """How a weight of `shape` lies on the mesh: whole on every device, or cut along its longest side that divides."""
    devices = mesh.devices.size
    sides = [(size, -axis) for axis, size in enumerate(shape) if size % devices == 0]
    if not shard or not sides:
        return PartitionSpec()
    return PartitionSpec(*[None] * -max(sides)[1], "data")


class HostShare:
    """The micro-batches of a run's stream that belong to one process: number i is a dict of arrays.

    rows: examples of a micro-batch in all processes; process, processes: which of how many. A row that can't be read
    becomes {"error": str}: no exception of a script's own finds its way out of a worker process.
    """

    def __init__(self, stream, rows, process, processes):
        self.stream, self.rows, self.process, self.processes = stream, rows, process, processes

    def __len__(self):
        return len(self.stream) // self.rows

    def __getitem__(self, number):
        own = self.rows // self.processes
        first = number * self.rows + self.process * own
        try:
            examples = [self.stream[index] for index in range(first, first + own)]
        except RunError as error:
            return {"error": str(error)}
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        positions = batch["positions"]
        return {**batch, "positions": np.stack([positions >> 32, positions & 0xFFFFFFFF], axis=1).astype(np.uint32)}


def reading_threads(backend):
    """How many threads read images, each a micro-batch: where a CPU trains there is no core to spare for more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if backend == "cpu" else min(16, cores)


def read_ahead(micro_batches, num_workers):
    """Go through a `HostShare` or `InputBatches` by grain, in threads or in worker processes. A generator; raises
    RunError."""
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, which nobody has given
    threads = 0 if num_workers else reading_threads(jax.default_backend())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.source(micro_batches).to_iter_dataset(options)
    if num_workers:
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        # Shared memory saves a copy, but what is left of it at an error litters the terminal and /dev/shm.
        no_shared_memory = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = dataset.mp_prefetch(workers, end_with_parent)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, no_shared_memory)
    with naming("the training images cannot be read"):
        others = multiprocessing.active_children()
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # it counts what a sudden end leaves
        with stop_signals_blocked() if num_workers else contextlib.nullcontext():
            iterator = iter(dataset)
            first = list(itertools.islice(iterator, 1))  # the processes are started now
        workers = [process for process in multiprocessing.active_children() if process not in others]
        try:
            for batch in itertools.chain(first, iterator):
                if "error" in batch:
                    raise RunError(str(batch["error"]))
                yield batch
        finally:
            end_workers(iterator, workers)


CLOSING = "closing the data processes"


def end_workers(iterator, workers):
    """Close grain's iterator, and its processes with it, in some seconds at most: a process that ends with half a batch
    sent would leave it waiting for the other half."""
    closing = threading.Thread(target=iterator.close, daemon=True, name=CLOSING)
    closing.start()
    closing.join(timeout=5)
    for process in workers:
        process.kill()


@contextlib.contextmanager
def stop_signals_blocked():
    """Let threads and processes that are started in the block never see STOP_SIGNALS: a terminal or a scheduler sends
    them to all, and one is to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(index, count):
    """Let this data process, number `index` of `count`, end when the process that started it does, however it does."""
    ignore_stop_signals()  # multiprocessing has unblocked some again
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def join_micro_batches(micro_batches, mesh):
    """Put the micro-batches of an update (this process's rows) on the mesh: arrays (micro-steps, global rows, ...).

    Raises RunError if the rows do not divide by the devices.
    """
    devices = len(mesh.local_devices)
    rows = len(micro_batches[0]["positions"])
    if rows % devices:
        raise RunError(f"a batch of {rows} does not divide by the {devices} devices of this process")
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    stacked = {name: np.stack([batch[name] for batch in micro_batches]) for name in micro_batches[0]}
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in stacked.items()}


def make_schedule(args, peak, last_step):
    """The learning rate as a function of the number of updates before it, by the formulas of the PyTorch scripts.

    peak: what it rises to; last_step: updates in the whole run. Raises RunError if the schedule can't start there.
    """
    warmup, name = args.lr_warmup_steps, args.lr_scheduler
    if name == "constant":
        return optax.constant_schedule(peak)
    if name == "polynomial" and peak <= 1e-7:
        raise RunError(
            f"--lr_scheduler polynomial: ends at a learning rate of 1e-7, so {peak} is too low to start from"
        )
    rest = max(1, last_step - warmup)
    course = {
        "constant_with_warmup": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "cosine_with_restarts": optax.cosine_decay_schedule(peak, rest),  # with one cycle, which is the default
        "polynomial": optax.polynomial_schedule(peak, 1e-7, 1, rest),
    }[name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), course], [warmup])


def make_optimizer_transform(args):
    """AdamW (arXiv:1711.05101) but for the learning rate, an `optax.GradientTransformation`."""
    return optax.chain(
        optax.scale_by_adam(args.adam_beta1, args.adam_beta2, args.adam_epsilon),
        optax.add_decayed_weights(args.adam_weight_decay),
    )


def ema_decay(step):
    """The share of the average that stays at update `step`, counted from 1: min(0.9999, step / (step + 9)), first 0."""
    return jnp.where(step > 1, jnp.minimum(0.9999, step / (step + 9)), 0.0)


def initial_train_state(params, transform, averages, scales):
    """All that an update changes, a tree of arrays: "params", "optimizer", "ema" if it averages, and for fp16 also
    "loss_scale"."""
    state = {"params": params, "optimizer": transform.init(params)}
    if averages:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if scales:
        state["loss_scale"] = initial_loss_scale()
    return state


def initial_loss_scale():
    """The loss scale that an fp16 run starts with, as PyTorch's GradScaler."""
    return {"scale": jnp.float32(2.0**16), "finite_steps": jnp.int32(0)}


def make_train_state(args, weights, transform, mesh, checkpoint, state):
    """The state that training starts from, on the mesh: of a checkpoint (Path, with its `state`), or if that is None of
    `weights` (NumPy arrays). Returns it, and the tree of its shardings.

    What the checkpoint's run kept and this one does not is dropped; a loss scale that it lacks starts anew.
    """

    scales = args.mixed_precision == "fp16"

    def shardings_of(tree):
        return jax.tree.map(lambda x: NamedSharding(mesh, spread(x.shape, mesh, args.shard_params)), tree)

    def shapes_of(averages, scales):
        return jax.eval_shape(lambda params: initial_train_state(params, transform, averages, scales), weights)

    shardings = shardings_of(shapes_of(args.use_ema, scales))
    if checkpoint is None:
        params = {name: place(array, mesh, shardings["params"][name].spec) for name, array in weights.items()}
        make = functools.partial(initial_train_state, transform=transform, averages=args.use_ema, scales=scales)
        return jax.jit(make, out_shardings=shardings)(params), shardings
    saved = shapes_of(state["arguments"]["use_ema"], state["arguments"]["mixed_precision"] == "fp16")
    place_of = shardings_of(saved)
    like = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved, place_of)
    loaded = load_train_state(checkpoint, like)
    if scales and "loss_scale" not in loaded:
        loaded["loss_scale"] = jax.jit(initial_loss_scale, out_shardings=shardings["loss_scale"])()
    return {name: loaded[name] for name in shardings}, shardings


def mean_gradient(params, frozen, batches, key, loss, scale):
    """((loss, gradient), examples) of an update, the means of its micro-steps; the arguments are those of `train_step`.

    Gradients are taken of `scale` times the loss. examples: what `loss` says of them, one micro-step after another.
    """

    def scaled_loss(params, batch):
        value, examples = loss(params, frozen, batch, key)
        return value * scale, examples

    def gradient_of(batch):
        (value, examples), gradient = jax.value_and_grad(scaled_loss, has_aux=True)(params, batch)
        return (value, gradient), examples

    def accumulate(total, batch):
        more, examples = gradient_of(batch)
        return jax.tree.map(jnp.add, total, more), examples

    micro_steps = len(jax.tree.leaves(batches)[0])
    if micro_steps == 1:  # no loop: what is in one, XLA compiles for CPUs to much slower code
        total, examples = gradient_of({name: array[0] for name, array in batches.items()})
        examples = {name: array[None] for name, array in examples.items()}
    else:
        nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        total, examples = jax.lax.scan(accumulate, nothing, batches)
    return jax.tree.map(lambda value: value / (scale * micro_steps), total), examples


def train_step(state, frozen, batches, key, step, loss, transform, schedule, args):
    """One update. Pure; to be jitted with the last four arguments bound.

    state: of `make_train_state`; batches: arrays (micro-steps, rows, ...) of `join_micro_batches`; step: the update's
    number, from 1; loss: function of (params, frozen, batch, key) to a scalar and {name: array (rows,)}.
    Returns the new state and {name: value to log}, with "examples": {name: array (micro-steps, rows)}. With fp16 an
    update whose gradient is not finite is left out, and the loss scale halved (arXiv:1710.03740).
    """
    scale = state["loss_scale"]["scale"] if "loss_scale" in state else jnp.float32(1)
    (mean_loss, gradient), examples = mean_gradient(state["params"], frozen, batches, key, loss, scale)
    norm = optax.tree.norm(gradient)
    gradient = jax.tree.map(lambda value: value * jnp.minimum(1, args.max_grad_norm / (norm + 1e-6)), gradient)
    updates, optimizer_state = transform.update(gradient, state["optimizer"], state["params"])
    learning_rate = schedule(step - 1)
    params = jax.tree.map(lambda value, update: value - learning_rate * update, state["params"], updates)
    new_state = {"params": params, "optimizer": optimizer_state}
    metrics = {"train_loss": mean_loss, "grad_norm": norm, "lr": learning_rate, "examples": examples}
    if "loss_scale" in state:
        finite = jnp.isfinite(norm)
        before = {name: state[name] for name in new_state}
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, before)
        new_state["loss_scale"] = next_loss_scale(**state["loss_scale"], finite=finite)
        metrics["loss_scale"] = scale
    if "ema" in state:
        share = 1 - ema_decay(step)
        new_state["ema"] = jax.tree.map(lambda old, new: old - share * (old - new), state["ema"], new_state["params"])
    return new_state, metrics


def next_loss_scale(scale, finite_steps, finite):
    """Dynamic loss scaling: half at an update that was not finite, twice after 2,000 that were in a row."""
    finite_steps = jnp.where(finite, finite_steps + 1, 0)
    grown = finite_steps >= 2000
    scale = jnp.where(finite, jnp.where(grown, scale * 2, scale), jnp.maximum(scale / 2, 1))
    return {"scale": scale, "finite_steps": jnp.where(grown, 0, finite_steps)}


def load_models(folder, unet_folder, variant):
    """Read the models of a pipeline's folder. Returns {part: `Model`} and {part: weights, NumPy arrays in float32}."""
    folders = {"unet": unet_folder / "unet", "vae": folder / "vae", "text_encoder": folder / "text_encoder"}
    models = {part: make_model(PARTS[part], read_config(folders[part])) for part in PARTS}
    return models, {part: read_weights(models[part], folders[part], variant) for part in PARTS}


def save_frozen_parts(args, folder, index, models, weights):
    """Write all of the result but what is trained, before the training, so that nothing can be missing after it.

    index: of `result_index`. What is copied and not read, the safety checker, loses the variant in its name.
    """
    output_dir = Path(args.output_dir)
    with writing(output_dir):
        for part, entry in index.items():
            if isinstance(entry, list) and entry[0] and part not in PARTS and (folder / part).is_dir():
                code = shutil.ignore_patterns("*.py", "*.pyc", "__pycache__")  # the result is not to hand it on
                shutil.copytree(folder / part, output_dir / part, dirs_exist_ok=True, ignore=code)
                for path in (output_dir / part).glob(f"*.{args.variant}.safetensors") if args.variant else ():
                    path.rename(path.with_name(path.name.replace(f".{args.variant}.", ".")))
        for part in FROZEN:
            save_model(args, folder / part, models[part], weights[part])


def save_model(args, source, model, weights):
    """Write a model to its folder in output_dir, with its configuration from the folder `source`."""
    folder = Path(args.output_dir) / source.name
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    if "_class_name" in config:
        config["_class_name"] = config["_class_name"].removeprefix("Flax")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_weights(model, weights, folder, args.save_flax_weights)


def result_index(folder, variant):
    """The model_index.json of a pipeline's folder (dict), with PyTorch's class names, which Flax reads too. A safety
    checker that PyTorch can't load is left out. Raises RunError."""
    with naming("model_index.json"):
        index = json.loads((folder / "model_index.json").read_text())
    for part, entry in index.items():
        if isinstance(entry, list):
            if entry[0] not in (None, "diffusers", "transformers", "stable_diffusion"):
                raise RunError(f"model_index.json: {part} is of {entry[0]}; code in a model's folder is not used")
            index[part] = [name and name.removeprefix("Flax") for name in entry]
    names = ["model.safetensors", "pytorch_model.bin"] + [f"model.{variant}.safetensors"] * bool(variant)
    if not any((folder / "safety_checker" / name).is_file() for name in names):
        index["safety_checker"], index["requires_safety_checker"] = [None, None], False
    return {**index, "_class_name": "StableDiffusionPipeline"}


def save_result(args, folder, unet_folder, index, model, params, prediction_type):
    """Write what was trained, and with it the index that makes output_dir a pipeline."""
    output_dir = Path(args.output_dir)
    with writing(output_dir):
        save_model(args, unet_folder / "unet", model, params)
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        name = scheduler.get("_class_name", "PNDMScheduler").removeprefix("Flax")
        scheduler |= {"_class_name": name, "prediction_type": prediction_type}  # what it samples is what it learned
        (output_dir / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        (output_dir / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        flush_to_disk(*output_dir.glob("*/*.safetensors"))


def sizes_of_run(args, models):
    """How many bytes a checkpoint takes, and the result, whose parts are `models` ({part: `Model`}), in float32."""
    sizes = {part: sum(4 * math.prod(shape) for shape in model.shapes.values()) for part, model in models.items()}
    return (3 + args.use_ema) * sizes["unet"], sum(sizes.values())  # weights, average, AdamW's two moments


def make_draw(models, scheduler_config, prediction_type, number, dtype):
    """`sample` in `number` steps, jitted: a function of (params, frozen, input_ids, latents)."""
    steps = ddim_steps(scheduler_config, training_alphas_cumprod(scheduler_config), number)
    settings = {"prediction_type": prediction_type, "guidance_scale": 7.5, "dtype": dtype}
    return jax.jit(functools.partial(sample, models=models, steps=steps, **settings))


def generate(args):
    """Draw the prompt of --generate, and write it as PNG to the current folder. Raises RunError."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    folder = find_pipeline(args.pretrained_model_name_or_path, args.revision, args)
    with naming(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        tokenizer = load_tokenizer(folder / "tokenizer")
        models, weights = load_models(folder, folder, args.variant)
    check_architecture(models, tokenizer, args.resolution)
    prediction_type = args.prediction_type or scheduler_config.get("prediction_type", "epsilon")
    check_objective(prediction_type, training_alphas_cumprod(scheduler_config))
    dtype = compute_type(args)
    placed = on_devices(weights, mesh, dtype)
    draw = make_draw(models, scheduler_config, prediction_type, GENERATION_STEPS, dtype)
    draw = functools.partial(draw, placed["unet"], placed)
    latents_shape = (*[args.resolution // vae_factor(models["vae"])] * 2, models["vae"].config.latent_channels)
    image = draw_prompts(draw, [args.generate], tokenizer, latents_shape, args.seed, mesh)[0]
    if jax.process_index() == 0:
        with naming("--generate"):
            path = unused_path(f"{file_name(args.generate)}-seed-{args.seed % 2**64}")
            image.save(path)
        logger.info(f"drew {path}")


def file_name(prompt):
    """What is left of a prompt (str) in the name of a file: its letters, marks and digits, at most 150 bytes."""
    kept = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in prompt)
    return "-".join(kept.split()).encode()[:150].decode(errors="ignore") or "picture"


def unused_path(stem):
    """A Path of a PNG file in the current folder that is not there yet."""
    numbers = itertools.chain([""], map("-{}".format, itertools.count(2)))
    return next(path for path in (Path(f"{stem}{number}.png") for number in numbers) if not path.exists())


def validation_due(args, step, examples_before, examples_after, num_rows):
    """Whether to draw after update `step`: every --validation_steps, else each time so many epochs have gone by."""
    if not args.validation_prompts:
        return False
    if args.validation_steps:
        return step % args.validation_steps == 0
    period = args.validation_epochs * num_rows
    return examples_after // period > examples_before // period


def prepare_rows(args, dataset, tokenizer, models, weights, latents_shape):
    """What examples are made of: the data set's rows, or what --cache_encodings holds of them, and what makes them.

    Returns a sequence, and what `ExampleStream` makes of its rows. models, weights: of `load_models`. To be called by
    every process. Raises RunError.
    """
    tokenize_captions([""], tokenizer)  # it is set up for it now, which it must not be by several threads at once
    if not args.cache_encodings:
        return dataset, functools.partial(preprocess_train, args, tokenizer)
    *sides, channels = latents_shape
    states_shape = (tokenizer.model_max_length, models["text_encoder"].config.hidden_size)
    dtype = np.dtype(compute_type(args))
    encodings = {
        "moments": Encoding("pixel_values", np.dtype(dtype), (*sides, 2 * channels)),
        "text_states": Encoding("input_ids", np.dtype(dtype), states_shape),
    }
    settings = [args.image_interpolation_mode, args.random_flip, tokenizer_rules(tokenizer)]
    inputs = functools.partial(encoder_inputs, args, tokenizer)
    rows = cached_rows(args, dataset, encodings, settings, inputs, models, weights)
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


def end_process(status):
    """End with `status`, also where Python's own end would wait for ever.

    That is so if `end_workers` is still waiting, and with several processes. Of these the others may have failed as
    well, or wait for this one. In the first case all meet in `shutdown`, and each has said why it ends. In the second
    this one is gone after some seconds, which ends the waiting of the others.
    """
    if jax.process_count() == 1 and CLOSING not in [thread.name for thread in threading.enumerate()]:
        sys.exit(status)
    if jax.process_count() > 1:
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(timeout=5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(args):
    """Train as `args` (from `parse_args`) say. Every launcher ends here. Raises RunError, or RunStopped at a signal."""
    connect_hosts()
    with naming("JAX finds no device"):
        jax.devices()
    set_up_logging()
    if args.generate is not None:
        return generate(args)
    path = args.pretrained_model_name_or_path
    if args.check_data:
        with naming(f"--pretrained_model_name_or_path {path}"):
            tokenizer = load_tokenizer(find_pipeline(path, args.revision, args, "tokenizer") / "tokenizer")
        dataset = load_train_dataset(args, ["image_column", "caption_column"], args.seed)
        return on_first_process(check_data, args, dataset, tokenizer, args.resolution)
    check_output_dir(args, [path])
    check_trackers(args)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    dtype = compute_type(args)

    # Where the run starts: step 0, or a checkpoint.
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    start = read_checkpoint(checkpoint) if checkpoint else {"step": 0, "examples_seen": 0}
    first_step, examples_seen, seed = start["step"], start["examples_seen"], args.seed
    if (multihost_utils.process_allgather(np.int32(first_step)) != first_step).any():
        raise RunError(f"--output_dir {args.output_dir}: has to be on a disk that all processes see")
    if args.resume_from_checkpoint:
        check_resume(args, checkpoint, start, "train_state")

    # Models: the UNet in float32, the frozen ones in the precision of the mixed-precision mode.
    folder = find_pipeline(path, args.revision, args)
    unet_folder = find_pipeline(path, args.non_ema_revision, args, "unet") if args.non_ema_revision else folder
    with naming(f"--pretrained_model_name_or_path {path}"):
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        tokenizer = load_tokenizer(folder / "tokenizer")
        models, weights = load_models(folder, unet_folder, args.variant)
        index = result_index(folder, args.variant)
    architecture = public_config(vars(models["unet"].config))
    if checkpoint:
        check_same_architecture(checkpoint, start, architecture)
    check_architecture(models, tokenizer, args.resolution)
    vae_config = models["vae"].config
    prediction_type = args.prediction_type or scheduler_config.get("prediction_type", "epsilon")
    alphas_cumprod = training_alphas_cumprod(scheduler_config)
    check_objective(prediction_type, alphas_cumprod)
    latents_shape = (*[args.resolution // vae_factor(models["vae"])] * 2, vae_config.latent_channels)

    # Data.
    dataset = load_train_dataset(args, ["image_column", "caption_column"], seed)
    if args.skip_bad_images or not args.cache_encodings:
        dataset = leave_out(dataset, on_first_process(check_images, args, dataset))
    rows = args.train_batch_size * jax.device_count()
    batch_size = rows * args.gradient_accumulation_steps
    last_step, end = plan_course(args, batch_size, len(dataset), first_step, examples_seen)
    run = {"seed": seed, "batch_size": batch_size, "rows": len(dataset), "architecture": architecture}
    run["data_digest"] = on_first_process(data_digest, dataset)
    if checkpoint:
        check_same_course(checkpoint, run)

    # Training state, on the devices: from the checkpoint, or from the model.
    transform = make_optimizer_transform(args)
    schedule = make_schedule(args, args.learning_rate * (batch_size if args.scale_lr else 1), last_step)
    train_state, shardings = make_train_state(args, weights["unet"], transform, mesh, checkpoint, start)
    frozen_weights = {part: weights[part] for part in FROZEN}
    frozen = {} if args.cache_encodings else on_devices(frozen_weights, mesh, dtype)

    # All that can refuse the run without writing has spoken.
    repo_id = on_first_process(prepare_hub_repository, args) if args.push_to_hub else args.hub_model_id
    on_first_process(prepare_output_dir, args, first_step, last_step)
    if jax.process_index() == 0:
        check_disk_space(args.output_dir, *sizes_of_run(args, models))

    # One stream of examples for the whole run, entered where the checkpoint was made.
    sequence, preprocess = prepare_rows(args, dataset, tokenizer, models, weights, latents_shape)
    stream = ExampleStream(sequence, preprocess, seed, examples_seen, end)
    share = HostShare(stream, rows, jax.process_index(), jax.process_count())
    micro_batches = read_ahead(share, args.dataloader_num_workers or 0)
    on_first_process(save_frozen_parts, args, folder, index, models, weights)
    del weights  # they are on the devices now, but for what only the drawing needs
    frozen_weights = frozen_weights if args.cache_encodings and args.validation_prompts else {}
    trackers, writer = Trackers(args, seed), CheckpointWriter(args)

    # What runs on the devices, each compiled once.
    key = known_to_all(random_generator(seed, 4).integers(2**32, size=2, dtype=np.uint32), mesh)

    def loss(params, frozen, batch, key):
        noise = draw_noise(
            batch["positions"], jax.random.wrap_key_data(key, impl="threefry2x32"), latents_shape, len(alphas_cumprod)
        )
        alphas = jnp.asarray(alphas_cumprod)
        losses = training_losses(params, frozen, {**batch, **noise}, models, alphas, prediction_type, args)
        examples = {"positions": batch["positions"], "timesteps": noise["timesteps"], "losses": losses}
        return losses.mean(), examples

    update = functools.partial(train_step, loss=loss, transform=transform, schedule=schedule, args=args)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))
    draw = make_draw(models, scheduler_config, prediction_type, VALIDATION_STEPS, dtype)

    def draw_validation(step):
        averaged = train_state.get("ema", train_state["params"])
        prompts = (args.validation_prompts, tokenizer, latents_shape, seed, mesh)
        encoders = frozen or on_devices(frozen_weights, mesh, dtype)  # while it draws
        images = draw_prompts(functools.partial(draw, averaged, encoders), *prompts)
        return log_validation(images, trackers, args, step) if jax.process_index() == 0 else None

    # Loop.
    steps = f"steps {first_step} to {last_step}"
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
    logger.info(f"{len(dataset)} images, {batch_size} per step, {steps}, seed {seed}, on {devices}; compiling")
    log, agreement, stop = StepLog(trackers, args, first_step, last_step), SignalAgreement(mesh), 0
    try:
        with noted_signals() as noted:
            for step in range(first_step + 1, last_step + 1):
                wait_started = time.perf_counter()
                batches = [next(micro_batches) for _ in range(args.gradient_accumulation_steps)]
                waited = time.perf_counter() - wait_started
                batches = join_micro_batches(batches, mesh)
                train_state, metrics = update(train_state, frozen, batches, key, known_to_all(np.int32(step), mesh))
                log.add(step, metrics, batch_size, waited)

                examples_seen += batch_size
                stop = agreement.after_update(noted) if step < last_step else 0
                save = step % args.checkpointing_steps == 0 or stop
                draw_now = validation_due(args, step, examples_seen - batch_size, examples_seen, len(dataset))
                draw_now = draw_now and step < last_step and not stop
                if save or draw_now or step % args.logging_steps == 0 or step in (first_step + 1, last_step):
                    log.flush()
                    writer.raise_error()
                    save = save and log.worth_saving(stop)
                if save:
                    writer.save(train_state, {**run, "step": step, "examples_seen": examples_seen})
                if draw_now:
                    draw_validation(step)
                if save or draw_now:
                    log.restart_clock()
                if stop:
                    break
            writer.finish()
            if stop:
                raise RunStopped(stop, f"after step {step}; the same command with --resume_from_checkpoint goes on")
            params = to_host(train_state.get("ema", train_state["params"]), mesh)
            on_first_process(save_result, args, folder, unet_folder, index, models["unet"], params, prediction_type)
    except BaseException:
        trackers.close()
        raise
    finally:
        log.progress_bar.close()
        micro_batches.close()
        writer.close()

    # Result.
    validation_image = draw_validation(last_step) if args.validation_prompts else None
    if jax.process_index() == 0:
        name = repo_id or args.output_dir
        save_model_card(args, name, seed, *describe_result(args, name, last_step), validation_image)
        logger.info(f"saved the pipeline in {args.output_dir}")
    trackers.close()
    if args.push_to_hub:
        on_first_process(push_to_hub, args, repo_id)


if __name__ == "__main__":
    try:
        main(command_line)
    except RunError as error:
        tqdm.write(f"error: {printable(str(error))}", file=sys.stderr)
        end_process(1)
    except RunStopped as stopped:
        logger.warning(stopped)
        end_process(128 + stopped.signum)
    except KeyboardInterrupt:
        tqdm.write("stopped; --resume_from_checkpoint goes on from the newest checkpoint", file=sys.stderr)
        end_process(130)
    except jax.errors.JaxRuntimeError as error:  # the memory of a device is full, or another process is gone
        tqdm.write(f"error: {printable(first_line(error))}", file=sys.stderr)
        end_process(1)
    except Exception:  # nothing foreseen: a traceback, and an end
        traceback.print_exc()
        end_process(1)
