"""Report what training would refuse, cut, enlarge or leave out of a data set. Exit with 1 if it would refuse any of it.

python check_data.py --train_data_dir=my_images --resolution=512 --tokenizer=my_model
"""

import argparse
import glob
import io
import os
import signal
import sys
from collections import defaultdict
from multiprocessing.pool import ThreadPool


class RunError(Exception):
    """An error in the data or flags, as one line."""


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_data_dir", help="folder of images with a metadata.jsonl of captions")
    add("--dataset_name", help="data set: a Hub id, a local copy of one, or a folder written by save_to_disk")
    add("--dataset_config_name", help="configuration of the data set, if it has several")
    add("--cache_dir", help="folder for downloaded data sets and tokenizers")
    add("--image_column", default="image", help="column of the images")
    add("--caption_column", default="text", help='column of the captions; "" checks none, for the decoder')
    add("--resolution", type=int, default=512, help="side of the square training images, in pixels")
    add("--tokenizer", help="model or tokenizer (folder or Hub id), to find captions longer than it accepts")
    args = parser.parse_args(input_args)
    if args.resolution <= 0 or not (args.dataset_name or args.train_data_dir):
        parser.error("give a data set, --dataset_name or --train_data_dir, and a --resolution larger than 0")
    return args


# Before the imports below, which take a second: --help and a wrong flag are answered at once.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"\nstopped before the last row\n") and os._exit(130))
    command_line = parse_args()

import datasets
import numpy as np
import PIL.ImageOps  # imports PIL.Image
from tqdm.auto import tqdm


def images_in(folder):
    paths = glob.iglob(os.path.join(glob.escape(os.path.abspath(folder)), "**"), recursive=True)  # no hidden ones
    return (path for path in paths if os.path.splitext(path)[1].lower() in PIL.Image.registered_extensions())


def load_rows(args):
    """Load the training split as the scripts do, with undecoded images: {"bytes", "path"}."""
    source = args.dataset_name or args.train_data_dir
    if not args.dataset_name:
        if not any(images_in(source)):
            raise RunError("there are no images in it" if os.path.isdir(source) else "there is no such folder")
        files = {"train": glob.escape(os.path.join(source, "")) + "**"}
        dataset = datasets.load_dataset("imagefolder", data_files=files, cache_dir=args.cache_dir)
    elif any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
        dataset = datasets.load_from_disk(source)
    else:
        options = {"data_dir": args.train_data_dir, "cache_dir": args.cache_dir}
        dataset = datasets.load_dataset(source, args.dataset_config_name, **options)
    dataset = dataset.get("train", ()) if isinstance(dataset, dict) else dataset
    if len(dataset) == 0:
        raise RunError("there are no rows, or no split 'train'")
    if not isinstance(dataset.features.get(args.image_column), datasets.Image):
        raise RunError(f"--image_column {args.image_column}: no column of images in {dataset.features}")
    text = dataset.features.get(args.caption_column)
    if args.caption_column and getattr(getattr(text, "feature", text), "dtype", "") not in ("string", "large_string"):
        hint = 'captions of a folder belong in its metadata.jsonl; --caption_column "" checks none'
        raise RunError(f"--caption_column {args.caption_column}: no column of text in {dataset.features}; {hint}")
    columns = [column for column in (args.image_column, args.caption_column) if column]
    return dataset.select_columns(columns).cast_column(args.image_column, datasets.Image(decode=False))


def load_tokenizer(path, cache_dir):
    from transformers import CLIPTokenizer  # takes a second

    for subfolder in ("tokenizer", ""):
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder=subfolder, cache_dir=cache_dir)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # an empty one where there are no files
            return tokenizer
    raise RunError(f"--tokenizer {path}: there is no tokenizer")


def read_image(value):
    """Decode {"bytes": bytes or None, "path": str or None} to an upright RGB `PIL.Image` on white. Raises RunError."""
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
        raise RunError(f"image {value['path'] or value.get('name', '(unnamed)')} cannot be read: {error}") from error


def check_row(args, dataset, tokenizer, row):
    """Read a row. Returns [fraction of its image that the square crop cuts off] and its findings, [(kind, details)]."""
    values, crop, found = dataset[row], [], []
    image, captions = values[args.image_column], values.get(args.caption_column, "-")
    name = f"row {row}" + (f" ({os.path.basename(image['path'])})" if image and image["path"] else "")
    try:
        if image is None:
            raise RunError("there is no image")
        width, height = read_image(image).size
        crop = [1 - min(width, height) / max(width, height)]
        if min(width, height) < args.resolution:
            found.append((f"enlarged: images smaller than {args.resolution} pixels", f"{name}: {width} x {height}"))
    except RunError as error:
        found.append(("refused: images that cannot be read", f"row {row}: {error}"))
    captions = [captions] if isinstance(captions, str) else captions or [None]
    if None in captions:
        return crop, [*found, ("refused: rows without a caption", name)]
    found += [("kept: captions that are empty", name) for caption in captions if not caption.strip()]
    for tokens in tokenizer(captions, verbose=False).input_ids if tokenizer else []:
        if len(tokens) > tokenizer.model_max_length:
            found.append((f"cut: captions of more than {tokenizer.model_max_length} tokens", f"{name}: {len(tokens)}"))
    return crop, found


def main(args):
    try:
        dataset = load_rows(args)
        tokenizer = load_tokenizer(args.tokenizer, args.cache_dir) if args.tokenizer else None
    except Exception as error:  # libraries raise exceptions of all kinds
        source = "" if str(error).startswith("--tokenizer") else f"{args.dataset_name or args.train_data_dir}: "
        sys.exit(f"error: {source}{' '.join(str(error).split())}")
    findings, crops, refused = defaultdict(list), [], 0
    rows = ThreadPool().imap(lambda row: check_row(args, dataset, tokenizer, row), range(len(dataset)), chunksize=16)
    for crop, found in tqdm(rows, total=len(dataset), unit=" images"):
        crops += crop
        refused += any(kind.startswith("refused") for kind, _ in found)
        for kind, details in found:
            findings[kind].append(details if len(findings[kind]) < 5 else None)
    if not args.dataset_name:
        named = {image["path"] for image in dataset[args.image_column]}
        findings["left out: images that no metadata line names"] = sorted(set(images_in(args.train_data_dir)) - named)
    average, most = (f"{share:.1%}" for share in (np.mean(crops or 0), max(crops, default=0)))
    print(f"{len(dataset):,} rows; the square crop takes {average} of an image on average, {most} at most")
    for kind, details in sorted(findings.items()):
        print(f"{len(details):>9,}  {kind}")
        for line in details[:5]:
            print(" " * 10, "".join(c if c.isprintable() else repr(c)[1:-1] for c in line))
    if refused:
        sys.exit(f"error: training would refuse {refused} of {len(dataset)} rows")


if __name__ == "__main__":
    main(command_line)
