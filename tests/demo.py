"""Teaches the tiny pipeline in `assets` a word that it has never seen, "star", with the real training script.

    python tests/demo.py --output_dir demo-output
    python tests/demo.py --output_dir demo-output-flax --script train_text_to_image_flax.py
    python tests/demo.py --output_dir demo-output-lora --rank 16

Draws the pictures of stars to learn from, and beside them lets the pipeline draw some of the shapes that it knows, so
that it rehearses them: without those, all that it draws becomes a star. Asks for stars before and after fine-tuning by
`train_text_to_image.py`, of an adapter (LoRA) if there is a rank, or by its twin in JAX with the same flags, asks for
the old shapes again, and counts by the check of `shapes.py` how many pictures show what their prompt says. Exits with 1
and one line where a count misses its bound. Takes a few minutes on two CPU cores.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import shapes
import torch
import transformers
from diffusers import StableDiffusionPipeline
from freed_memory import KEEP_FREED_MEMORY
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ROOT / "tests" / "assets" / "shapes-64"
SCRIPTS = ("train_text_to_image.py", "train_text_to_image_flax.py")

NUM_TRAIN_PICTURES = 160  # of stars
NUM_REHEARSED_PICTURES = 60  # of the old shapes, drawn by the pipeline itself
NUM_DRAWN = 60  # pictures behind each figure
LEARNING_RATE = 1e-3
# Of an adapter: the shape of a star needs the convolutions too, which --lora_target_modules adds.
ADAPTER_LEARNING_RATE = 5e-3
ADAPTED_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
ADAPTED_LAYERS += ["conv", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
PROMPT = "a {colour} {shape} on {background}"
# Held against the counts: (figure, its words, lowest share, highest share).
BOUNDS = (
    ("new_before", "stars before the demo", 0.0, 0.3),
    ("new_after", "stars after the demo", 0.8, 1.0),
    ("old_after", "circles, squares and triangles after it", 0.6, 1.0),
)
GRID_ROWS = (
    ("star", "red", "white"),
    ("star", "yellow", "black"),
    ("star", "green", "white"),
    ("star", "blue", "black"),
    ("star", "purple", "white"),
    ("circle", "yellow", "black"),
    ("square", "blue", "white"),
    ("triangle", "red", "black"),
)
GRID_COLUMNS = 4


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--script", choices=SCRIPTS, default=SCRIPTS[0], help="what trains")
    parser.add_argument("--rank", type=int, help="train an adapter (LoRA) of this rank")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def training_command(script, rank, data_dir, cache_dir, model_dir, seed):
    """The command that fine-tunes, as a list of arguments. It is the one that a user would type."""
    flags = {
        "pretrained_model_name_or_path": PIPELINE,
        "train_data_dir": data_dir,
        "cache_encodings": cache_dir,
        "output_dir": model_dir,
        "resolution": shapes.SIZE,
        "train_batch_size": 16,
        "max_train_steps": 1600,
        "learning_rate": ADAPTER_LEARNING_RATE if rank else LEARNING_RATE,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "snr_gamma": 5.0,
        "checkpointing_steps": 800,
        "validation_steps": 400,
        "seed": seed,
    }
    command = [sys.executable, str(ROOT / script), "--center_crop", "--random_flip", "--use_ema"]
    if rank:
        command += ["--rank", str(rank), "--lora_target_modules", *ADAPTED_LAYERS]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    return [*command, "--validation_prompts", "a red star on white", "a blue star on black", "a green circle on white"]


def write_training_folder(folder, pipeline, seed):
    """Writes stars with their captions, and what the pipeline draws of the shapes that it knows, with theirs."""
    shapes.write_folder(folder, (shapes.NEW_SHAPE,), NUM_TRAIN_PICTURES, seed=seed)
    examples = shapes.examples(shapes.SHAPES, NUM_REHEARSED_PICTURES, seed=seed + 1)
    pictures = draw(pipeline, [example[:3] for example in examples], seed + 1)
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as metadata:
        for number, (example, picture) in enumerate(zip(examples, pictures, strict=True)):
            name = f"rehearsed-{number:03d}.png"
            picture.save(folder / name)
            metadata.write(json.dumps({"file_name": name, "text": shapes.caption(*example)}) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Drawing and counting
# ----------------------------------------------------------------------------------------------------------------------


def load_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, wanted, seed):
    """Draws one picture for each (shape, colour, background) in `wanted`; picture k starts from the seed `seed + k`."""
    pictures = []
    for start in range(0, len(wanted), 20):
        part = wanted[start : start + 20]
        prompts = [PROMPT.format(shape=s, colour=c, background=b) for s, c, b in part]
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        pictures += pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    return pictures


def count_matches(pipeline, names, seed):
    """Share of `NUM_DRAWN` pictures that match their prompts, over all colours and backgrounds of the named shapes."""
    wanted = [(s, c, b) for s, c, b, _ in shapes.examples(names, NUM_DRAWN, seed)]
    pictures = draw(pipeline, wanted, seed)
    return sum(shapes.matches(picture, *what) for picture, what in zip(pictures, wanted, strict=True)) / len(wanted)


def draw_rows(pipeline, seed):
    """`GRID_COLUMNS` pictures for each of `GRID_ROWS`, as a list of rows."""
    pictures = draw(pipeline, [row for row in GRID_ROWS for _ in range(GRID_COLUMNS)], seed)
    return [pictures[k : k + GRID_COLUMNS] for k in range(0, len(pictures), GRID_COLUMNS)]


def grid(panels, title_font_size=22):
    """Lays out panels side by side, one row for each prompt.

    Args:
        panels: dict from a panel's title to its rows of pictures.

    Returns:
        An RGB `PIL.Image`.
    """
    cell, gap, gutter, label, head = 96, 6, 30, 236, 48
    panel = GRID_COLUMNS * (cell + gap) - gap
    width = label + len(panels) * (panel + gutter)
    tops, top = [], head
    for k, (shape, _, _) in enumerate(GRID_ROWS):
        top += gutter // 2 if k and shape != shapes.NEW_SHAPE and GRID_ROWS[k - 1][0] == shapes.NEW_SHAPE else 0
        tops.append(top)
        top += cell + gap
    sheet = Image.new("RGB", (width, top + gutter - gap), (238, 238, 240))
    pen = ImageDraw.Draw(sheet)
    for k, (title, rows) in enumerate(panels.items()):
        left = label + k * (panel + gutter)
        pen.text((left + panel // 2, head // 2), title, (40, 40, 48), ImageFont.load_default(title_font_size), "mm")
        for top, pictures in zip(tops, rows, strict=True):
            for column, picture in enumerate(pictures):
                picture = picture.resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(picture, (left + column * (cell + gap), top))
    for top, (shape, colour, background) in zip(tops, GRID_ROWS, strict=True):
        text = PROMPT.format(shape=shape, colour=colour, background=background)
        pen.text((label - 18, top + cell // 2), text, (40, 40, 48), ImageFont.load_default(18), "rm")
    return sheet


def save_grid(sheet, path):
    """Saves as PNG in 256 colours, which flat pictures do not miss, at about a third of the bytes."""
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main(args):
    start = time.time()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    folder = args.output_dir.resolve()
    data_dir, cache_dir, model_dir = folder / "train-data", folder / "encodings", folder / "model"
    for earlier in (data_dir, cache_dir, model_dir):  # of a demo before this one
        shutil.rmtree(earlier, ignore_errors=True)

    print("Asking the pipeline as it is for stars, a word that it has never seen.", flush=True)
    pipeline = load_pipeline(PIPELINE)
    figures = {"new_before": count_matches(pipeline, (shapes.NEW_SHAPE,), seed=args.seed)}
    before = draw_rows(pipeline, args.seed)
    write_training_folder(data_dir, pipeline, args.seed)

    command = training_command(args.script, args.rank, data_dir, cache_dir, model_dir, args.seed)
    print(
        f"Fine-tuning on {data_dir}: {NUM_TRAIN_PICTURES} pictures of stars, and {NUM_REHEARSED_PICTURES} that the "
        f"pipeline itself drew of the shapes that it knows.\n{shlex.join(command)}",
        flush=True,
    )
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **KEEP_FREED_MEMORY})
    if result.returncode:
        sys.exit(f"demo: {args.script} ended with exit status {result.returncode}")

    print("Asking again, for stars and for the shapes that the pipeline knew.", flush=True)
    pipeline = load_pipeline(PIPELINE if args.rank else model_dir)
    if args.rank:
        pipeline.load_lora_weights(model_dir)
    figures["new_after"] = count_matches(pipeline, (shapes.NEW_SHAPE,), seed=args.seed)
    figures["old_after"] = count_matches(pipeline, shapes.SHAPES, seed=args.seed)
    save_grid(grid({"before": before, "after": draw_rows(pipeline, args.seed)}), folder / "before-after.png")

    weights = "pytorch_lora_weights.safetensors" if args.rank else "unet/diffusion_pytorch_model.safetensors"
    figures["bytes_of_weights"] = (model_dir / weights).stat().st_size
    record = {"script": args.script, "rank": args.rank, **figures, "pictures_per_figure": NUM_DRAWN}
    record["seconds"] = round(time.time() - start)
    (folder / "figures.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\nPictures that show what their prompt says:")
    for name, words, low, high in BOUNDS:
        bound = f"at least {low:.0%}" if low else f"at most {high:.0%}"
        print(f"  {words:<40} {figures[name]:>4.0%}   ({bound})")
    print(f"Pictures: {folder / 'before-after.png'}\nModel:    {model_dir}\nLogs:     {model_dir / 'logs'}")
    print(f"What was trained takes {figures['bytes_of_weights'] / 1e6:.2f} MB: {weights}")
    print(f"Took {record['seconds']} s.")
    missed = [words for name, words, low, high in BOUNDS if not low <= figures[name] <= high]
    if missed:
        sys.exit(f"demo: out of bounds: {'; '.join(missed)}")


if __name__ == "__main__":
    main(parse_args())
