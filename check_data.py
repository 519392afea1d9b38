# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets>=4.5,<6",
#     "transformers>=5.0,<6",
#     "pillow>=11.0",
# ]
# ///
"""Report what training would refuse, cut, enlarge or leave out of a data set. Exit with 1 if it would refuse any of it.

python check_data.py --train_data_dir=my_images --resolution=512 --tokenizer=my_model
"""

import argparse
import glob
import json
import logging
import os
import re
import signal
import sys
import unicodedata
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path


class RunError(Exception):
    """An error in the data or flags, as one line."""


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_data_dir", help="folder of images with captions in a metadata.jsonl or in .txt files")
    add("--dataset_name", help="data set: a Hub id, a local copy of one, or a folder written by save_to_disk")
    add("--dataset_config_name", help="configuration of the data set, if it has several")
    add("--cache_dir", help="folder for downloaded data sets and tokenizers")
    add("--image_column", default="image", help="column of the images")
    add("--caption_column", default="text", help='column of the captions; "" checks none, for the decoder')
    add("--resolution", type=int, default=512, help="side of the square training images, in pixels")
    add("--tokenizer", help="model or tokenizer (folder or Hub id), to find captions longer than it accepts")
    add("--write_metadata", action="store_true", help="first write metadata.jsonl from .txt files or names of folders")
    args = parser.parse_args(input_args)
    if args.write_metadata and (args.dataset_name or not args.caption_column):
        parser.error("argument --write_metadata: is for --train_data_dir, with captions")
    if args.resolution <= 0 or not (args.dataset_name or args.train_data_dir):
        parser.error("give a data set, --dataset_name or --train_data_dir, and a --resolution larger than 0")
    return args


# Before the imports below, which take a second: --help and a wrong flag are answered at once.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"\nstopped before the last row\n") and os._exit(130))
    command_line = parse_args()

import datasets
import fsspec
import numpy as np
import PIL.ImageOps  # and PIL.Image
from tqdm.auto import tqdm

# Of the training scripts ----------------------------------------------------------------------------------------------
logger = logging.getLogger(__name__)
logger.disabled = True  # the report says it
PIL.Image.MAX_IMAGE_PIXELS = 2**30  # Pillow's own limit, against decompression bombs, is 179 megapixels
warnings.filterwarnings("ignore", module="PIL|accelerate|datasets|diffusers|huggingface_hub|peft|transformers")
fsspec.get_filesystem_class("zip").cachable = True  # else the directory of an archive is read again for each image
FOR_TESTS = r"[/\\](test|testing|val|validation|dev|eval)(\.zip)?([/\\]|$)"  # folders and archives, of any case


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


# The check ------------------------------------------------------------------------------------------------------------
def images_in(folder):
    """The visible images in a folder and its .zip archives, sorted."""
    files = glob.glob(os.path.join(glob.escape(os.path.abspath(folder)), "**"), recursive=True)
    archives = [f"zip://::{path}" for path in files if path.lower().endswith(".zip")]
    files += datasets.utils.file_utils.FilesIterable.from_urlpaths(archives)
    endings = tuple(datasets.packaged_modules.imagefolder.ImageFolder.EXTENSIONS)
    return sorted(path for path in files if path.partition("::")[0].lower().endswith(endings))


def write_metadata(args):
    """Write metadata.jsonl: captions are in .txt files beside the images, or else the names of their folders."""
    folder = os.path.abspath(args.train_data_dir)
    rows = []
    files = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
    if taken := [path for path in files if re.fullmatch(r"metadata\.(jsonl|csv|parquet)|.*\.zip", Path(path).name)]:
        raise RunError(f"--write_metadata: {taken[0]} exists (a metadata file stays as it is, an archive has its own)")
    captioned = {os.path.dirname(path) for path in files if path.endswith(".txt")}  # folders
    for path in images_in(folder):
        name = Path(path).relative_to(folder)
        caption = read_caption(path)
        if caption is None and (not name.parent.name or os.path.dirname(path) in captioned):
            raise RunError(f"--write_metadata: {path} has neither a .txt file nor a folder of its own kind")
        caption = name.parent.name.replace("_", " ") if caption is None else " ".join(caption.split())
        rows.append(json.dumps({"file_name": name.as_posix(), args.caption_column: caption}, ensure_ascii=False) + "\n")
    if not rows:
        raise RunError("--write_metadata: there are no images")
    Path(folder, "metadata.jsonl").write_bytes("".join(rows).encode())


def load_rows(args):
    """Load the training split as the scripts do, with undecoded images: {"bytes", "path"}."""
    source = args.dataset_name or args.train_data_dir
    if any(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
        dataset = datasets.load_from_disk(source)
    else:
        hub = {"path": source, "name": args.dataset_config_name, "data_dir": args.train_data_dir, "split": "train"}
        in_folder = {"path": "imagefolder", "data_files": {"train": os.path.join(glob.escape(source), "**")}}
        dataset = datasets.load_dataset(cache_dir=args.cache_dir, **(hub if args.dataset_name else in_folder))
    dataset = dataset["train"] if isinstance(dataset, dict) else dataset
    found = dataset.column_names
    if args.image_column not in found:
        raise RunError(f"--image_column {args.image_column}: no such column in {found}")
    columns = [args.image_column, args.caption_column]
    dataset = place_images(dataset, list(filter(None, columns)), source, not args.dataset_name)
    if args.caption_column and args.caption_column not in dataset.column_names:
        hint = 'captions belong in a metadata.jsonl (--write_metadata makes one) or in .txt files; "" checks none'
        raise RunError(f"--caption_column {args.caption_column}: no such column in {found}; {hint}")
    feature = dataset.features.get(args.caption_column, datasets.Value("string"))
    if not isinstance(getattr(feature, "feature", feature), datasets.Value):
        raise RunError(f"--caption_column {args.caption_column}: no column of text but {feature}")
    return dataset


def load_tokenizer(path, cache_dir):
    from transformers import CLIPTokenizer  # takes a second

    for subfolder in ("tokenizer", ""):
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder=subfolder, cache_dir=cache_dir)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # an empty one where there are no files
            return tokenizer
    raise RunError(f"--tokenizer {path}: there is no tokenizer")


def check_row(args, dataset, tokenizer, row):
    """Read a row. Returns [fraction of its image that the square crop cuts off] and its findings, [(kind, details)]."""
    image, captions = [*dataset[row].values(), "-"][:2]  # "-": captions are not checked
    crop = []
    found = []
    path = image and image["path"]  # of an image in an archive zip://NAME::ARCHIVE
    name = f"row {row}" + (f" ({os.path.basename(path.partition('::')[0])})" if path else "")
    try:
        if image is None:
            raise RunError("there is no image")
        width, height = read_image(image).size
        crop = [1 - min(width, height) / max(width, height)]
        if min(width, height) < args.resolution:
            found.append((f"enlarged: images smaller than {args.resolution} pixels", f"{name}: {width} x {height}"))
    except RunError as error:
        found.append(("refused: images that cannot be read", f"row {row}: {error}"))
    captions = captions or [None] if isinstance(captions, list) else [captions]
    if None in captions:
        return crop, [*found, ("refused: rows without a caption (.csv files lose None and n/a)", name)]
    found += [("kept: captions that are empty", name) for caption in captions if not str(caption).strip()]
    for tokens in tokenizer([str(caption) for caption in captions], verbose=False).input_ids if tokenizer else []:
        if len(tokens) > tokenizer.model_max_length:
            found.append((f"cut: captions of more than {tokenizer.model_max_length} tokens", f"{name}: {len(tokens)}"))
    return crop, found


def main(args):
    sys.stdout.reconfigure(errors="backslashreplace")  # a console of Windows may lack letters of file names
    try:
        if args.write_metadata:
            write_metadata(args)
        dataset = load_rows(args)
        tokenizer = load_tokenizer(args.tokenizer, args.cache_dir) if args.tokenizer else None
    except Exception as error:  # libraries raise exceptions of all kinds
        lines = dict.fromkeys(" ".join(str(each).split()) for each in (error, error.__cause__ or error))
        sys.exit(f"error: {args.dataset_name or args.train_data_dir}: {': '.join(lines)}")
    findings = {}
    crops = []
    refused = 0
    rows = ThreadPool().imap(lambda row: check_row(args, dataset, tokenizer, row), range(len(dataset)), chunksize=16)
    for crop, found in tqdm(rows, total=len(dataset), unit=" images"):
        crops += crop
        refused += any(kind.startswith("refused") for kind, _ in found)
        for kind, details in found:
            findings.setdefault(kind, []).append(details if len(findings[kind]) < 5 else None)
    source = os.path.abspath(args.dataset_name or args.train_data_dir)
    named = set(dataset.data.column(args.image_column).flatten()[1].to_pylist())
    images = images_in(source)
    for path in (path for path in images if path not in named):
        kind = "for tests" if re.search(FOR_TESTS, path.replace(source, ""), re.I) else "that no metadata line names"
        findings.setdefault(f"left out: images {kind}", []).append(path)
    texts = set(glob.glob(os.path.join(glob.escape(source), "**", "*.txt"), recursive=True))
    captions = {os.path.splitext(path)[0] + ".txt" for path in images}
    if texts & captions and texts - captions:
        findings["left out: .txt files without an image (.heic and .avif are not read)"] = sorted(texts - captions)
    average, most = (f"{share:.1%}" for share in (np.mean(crops or 0), max(crops, default=0)))
    print(f"{len(dataset):,} rows; the square crop takes {average} of an image on average, {most} at most")
    for kind, details in sorted(findings.items()):
        print(f"{len(details):>9,}  {kind}")
        for line in details[:5]:
            print(" " * 10, "".join(c if c.isprintable() else repr(c)[1:-1] for c in line))
    if refused or len(dataset) == 0:
        sys.exit(f"error: training would refuse {refused or 'all'} of {len(dataset)} rows")


if __name__ == "__main__":
    main(command_line)
