"""Trains tiny models on a GPU in every way that a CPU cannot show, and compares losses and weights.

    python tests/benchmarks/gpu_checks.py --work_dir /tmp/checks --output results/checks.jsonl

Each run is a process of its own, as a user starts it; several run at a time, since only their results are compared.
Prints a line of JSON per run (exit status, seconds, losses) and per comparison (largest difference of the losses, of
the saved weights and of the saved averages), and ends with status 1 if a run failed. Without a GPU it runs all the
same, as a test of itself.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))  # for tiny.py
KINDS = ("", "_sdxl", "_prior", "_decoder", "_flax")
SD, SDXL, PRIOR, DECODER, FLAX = (f"train_text_to_image{kind}.py" for kind in KINDS)
EMA, CENTRE, EXACT = "--use_ema ", "--center_crop ", "--deterministic "
CACHE = "--cache_encodings WORK/cache-NAME "
BF16, FP16 = "--mixed_precision bf16 ", "--mixed_precision fp16 "
RUNS = {  # {name: (script, flags)}; 8 updates each, with a checkpoint after 4
    "float32": (SD, EMA),
    "float32 on the CPU": (SD, EMA),
    "tf32": (SD, EMA + "--allow_tf32"),
    "bf16": (SD, EMA + BF16 + "--validation_prompts star,circle"),
    "fp16": (SD, EMA + FP16),
    "half-precision norms": (SD, EMA + BF16 + "--half_precision_norms"),
    "deterministic": (SD, EMA + EXACT),
    "deterministic bf16": (SD, EMA + EXACT + BF16),
    "deterministic fp16": (SD, EMA + EXACT + FP16),
    "8-bit AdamW": (SD, EMA + EXACT + "--use_8bit_adam"),
    "average on the CPU": (SD, EMA + EXACT + "--offload_ema"),
    "no data workers": (SD, EMA + EXACT + "--dataloader_num_workers 0"),
    "checkpointing": (SD, EMA + EXACT + "--gradient_checkpointing"),
    "compile": (SD, EMA + "--compile"),
    "centre": (SD, EMA + EXACT + CENTRE),
    "cache": (SD, EMA + EXACT + CENTRE + CACHE),
    "centre bf16": (SD, EMA + EXACT + CENTRE + BF16),
    "cache bf16": (SD, EMA + EXACT + CENTRE + CACHE + BF16),
    "LoRA bf16": (SD, EMA + EXACT + BF16 + "--rank 4"),
    "SDXL float32": (SDXL, EMA + CENTRE + "--validation_prompts star --num_validation_images 1"),
    "SDXL bf16": (SDXL, EMA + EXACT + CENTRE + BF16),
    "SDXL cache bf16": (SDXL, EMA + EXACT + CENTRE + CACHE + BF16),
    "SDXL fp16": (SDXL, EMA + CENTRE + FP16 + "--validation_prompts star --num_validation_images 1"),  # VAE in float32
    "SDXL LoRA fp16": (SDXL, EMA + FP16 + "--rank 4 --validation_prompts star"),
    "prior bf16": (PRIOR, EMA + EXACT + BF16 + "--validation_prompts star"),
    "prior fp16": (PRIOR, EMA + FP16),
    "prior cache bf16": (PRIOR, EMA + EXACT + CACHE + BF16),
    "decoder bf16": (DECODER, EMA + EXACT + BF16 + "--validation_prompts star"),
    "decoder fp16": (DECODER, EMA + FP16),
    "decoder cache bf16": (DECODER, EMA + EXACT + CACHE + BF16),
    "JAX float32": (FLAX, EMA),
    "JAX bf16": (FLAX, EMA + BF16 + "--validation_prompts star"),
    "JAX fp16": (FLAX, EMA + FP16),
    "JAX cache bf16": (FLAX, EMA + CENTRE + CACHE + BF16),
}
RESUMED = ["float32", "deterministic", "deterministic bf16", "deterministic fp16", "8-bit AdamW", "average on the CPU"]
RESUMED += ["compile", "cache bf16", "LoRA bf16", "SDXL bf16", "prior bf16", "decoder bf16", "JAX float32", "JAX bf16"]
PAIRS = [("float32 on the CPU", "float32"), ("tf32", "float32"), ("bf16", "float32"), ("fp16", "float32")]
PAIRS += [
    ("half-precision norms", "bf16"),
    ("deterministic", "float32"),
    ("compile", "float32"),
    ("8-bit AdamW", "deterministic"),
]
PAIRS += [("average on the CPU", "deterministic"), ("no data workers", "deterministic")]
PAIRS += [("checkpointing", "deterministic"), ("cache", "centre"), ("cache bf16", "centre bf16")]
PAIRS += [("SDXL fp16", "SDXL float32"), ("SDXL cache bf16", "SDXL bf16")]
PAIRS += [("prior cache bf16", "prior bf16"), ("decoder cache bf16", "decoder bf16"), ("JAX bf16", "JAX float32")]
PAIRS += [(f"{name}, resumed", name) for name in RESUMED]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for models, images and results")
    parser.add_argument("--output", type=Path, required=True, help="file of the figures, JSON lines")
    parser.add_argument("--only", help="regular expression of the runs to do")
    parser.add_argument("--at_a_time", type=int, default=8, help="runs at a time")
    parser.add_argument("--timeout", type=float, default=100, help="seconds after which a run is ended")
    return parser.parse_args(input_args)


def make_inputs(work):
    import tiny

    tiny.make_stable_diffusion(work / "sd", levels=1)
    tiny.make_stable_diffusion_xl(work / "sdxl")
    tiny.make_kandinsky_prior(work / "prior")
    tiny.make_kandinsky_decoder(work / "decoder")
    tiny.make_images(work / "images")


def command_of(name, script, flags, work, output):
    if script in (SD, SDXL, FLAX):
        models = ["--pretrained_model_name_or_path", work / ("sdxl" if script == SDXL else "sd")]
    else:
        models = ["--pretrained_prior_model_name_or_path", work / "prior"]
        models += ["--pretrained_decoder_model_name_or_path", work / "decoder"]
    words = [sys.executable, ROOT / script, *models, "--train_data_dir", work / "images", "--resolution", 32]
    words += ["--train_batch_size", 2, "--max_train_steps", 8, "--checkpointing_steps", 4, "--seed", 0]
    words += ["--lr_warmup_steps", 0, "--logging_steps", 1, "--output_dir", output]
    flags = flags.replace("WORK", str(work)).replace("NAME", name.replace(" ", "-"))
    return [str(word) for word in words] + [word.replace(",", " ") for word in flags.split()]


def run(name, script, flags, work, timeout, resume=False):
    """One process. Returns the figures, a dict: its losses are those of the updates that it did."""
    output = work / "output" / name.replace(" ", "-").replace(",", "")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment["HF_DATASETS_CACHE"] = str(work / "datasets" / output.name)
    if "on the CPU" in name and "average" not in name:
        environment["ACCELERATE_USE_CPU"] = "true"
    command = command_of(name.removesuffix(", resumed"), script, flags, work, output)
    if resume:
        source = work / "output" / name.removesuffix(", resumed").replace(" ", "-").replace(",", "")
        output.mkdir(parents=True)
        shutil.copytree(source / "checkpoint-4", output / "checkpoint-4")
        command += ["--resume_from_checkpoint", "latest"]
    started, log = time.time(), work / f"{output.name}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=file, env=environment, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            status = "timeout"
    lines = [line for line in re.split(r"[\r\n]", log.read_text(errors="replace")) if line.strip()]
    figures = {"run": name, "status": status, "seconds": round(time.time() - started, 1)}
    if status != 0:
        return {**figures, "last_lines": lines[-6:]}
    updates = report.read_updates(output / "logs")
    pictures = len(list((output / "validation").glob("*.png"))) if (output / "validation").exists() else 0
    return {**figures, "losses": {step: loss for step, _, loss in updates}, "pictures": pictures}


def weights(folder):
    """{name: array} of everything that a result holds in safetensors."""
    from safetensors.numpy import load_file

    return {
        f"{path.relative_to(folder)}: {name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoint-" not in str(path.relative_to(folder))
        for name, value in load_file(path).items()
    }


def compare(name, base, figures, work):
    """The largest differences of two runs."""
    import numpy as np

    losses, expected = figures[name]["losses"], figures[base]["losses"]
    shared = losses.keys() & expected.keys()
    line = {"compared": name, "with": base, "loss": max(abs(losses[step] - expected[step]) for step in shared)}
    line["updates"] = len(shared)
    one, other = (weights(work / "output" / each.replace(" ", "-").replace(",", "")) for each in (name, base))
    if one.keys() != other.keys():
        return {**line, "weights": "other names"}
    return {**line, "weights": max(float(np.abs(one[key].astype("f8") - other[key]).max()) for key in one)}


def main(args):
    work, figures, one_at_a_time = args.work_dir.resolve(), {}, threading.Lock()
    work.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    make_inputs(work)

    def record(line):
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {key: value for key, value in line.items() if key != "losses"}
        print(json.dumps(shown), flush=True)

    def do(name, resume=False):
        full = f"{name}, resumed" if resume else name
        found = run(full, *RUNS[name], work, args.timeout, resume)
        record(found)
        with one_at_a_time:
            figures[full] = found
            ready = [pair for pair in PAIRS if full in pair and all("losses" in figures.get(one, {}) for one in pair)]
        for pair in ready:
            record(compare(*pair, figures, work))

    names = [name for name in RUNS if not args.only or re.search(args.only, name)]
    with ThreadPoolExecutor(args.at_a_time) as executor:
        list(executor.map(do, names))
        resumed = [name for name in RESUMED if "losses" in figures.get(name, {})]
        list(executor.map(lambda name: do(name, resume=True), resumed))
    return int(any(line["status"] != 0 for line in figures.values()))


if __name__ == "__main__":
    sys.exit(main(parse_args()))
