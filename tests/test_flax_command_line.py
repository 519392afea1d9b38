"""The flags of the Flax script: all of upstream's with their defaults, and one clear line for bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT, command_line, launch, run
from safetensors.torch import load_file, save_file
from test_command_line import (
    BAD_INPUT,
    BAD_MODELS,
    REQUIRED,
    broken_images,
    changed_model,
    everything_below,
    images_in_a_saved_data_set,
    no_unet,
)
from test_flax_training import SCRIPT, refusal, run_code

from train_text_to_image_flax import RunError, UpdateLog, file_name, parse_args


def parse(*words):
    return vars(parse_args([*REQUIRED, *words]))


# The flags ------------------------------------------------------------------------------------------------------------


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    words = capsys.readouterr().out.split()
    assert {f"--{name}" for name in parse()} <= {word.strip("[],") for word in words}


@pytest.mark.parametrize("value", ["bf16", "fp16", "no"])
def test_resume_with_no_value_means_latest(value):
    parsed = parse("--resume_from_checkpoint", "--mixed_precision", value)
    assert (parsed["resume_from_checkpoint"], parsed["mixed_precision"]) == ("latest", value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *[(f"--{name} {value}", f"--{name}: must be larger than 0, not {value}")
          for name in ("resolution", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                       "max_train_steps", "max_train_samples", "checkpointing_steps", "checkpoints_total_limit",
                       "validation_epochs", "validation_steps", "logging_steps")
          for value in (0, -1)],
        *[(f"--{name} {value}", f"--{name}: must ")
          for name in ("learning_rate", "snr_gamma", "adam_epsilon", "adam_weight_decay", "noise_offset",
                       "input_perturbation", "dream_detail_preservation", "proportion_empty_prompts", "adam_beta1")
          for value in ("nan", "inf")],
        ("--max_grad_norm nan", "--max_grad_norm: must be larger than 0"),
        ("--max_grad_norm -1", "--max_grad_norm: must be larger than 0"),
        ("--snr_gamma 0", "--snr_gamma: must be larger than 0"),
        ("--lr_warmup_steps -1", "--lr_warmup_steps: must not be negative"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers: must not be negative"),
        ("--seed -1", "--seed: must not be negative"),
        ("--proportion_empty_prompts 1.5", "--proportion_empty_prompts: must be from 0 to 1"),
        ("--adam_beta2 1", "--adam_beta2: must be from 0 to below 1"),
        ("--resolution large", "--resolution: invalid int value"),
        ("--lr_scheduler sawtooth", "--lr_scheduler: invalid choice"),
        ("--prediction_type flow", "--prediction_type: invalid choice"),
        ("--report_to comet_ml", "--report_to: invalid choice"),
        ("--mixed_precision fp8", "--mixed_precision: invalid choice"),
        ("--image_interpolation_mode best", "--image_interpolation_mode: invalid choice"),
        ("--use_8bit_adam", "unrecognized arguments: --use_8bit_adam"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_right(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*words.split())
    assert exit_.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_clipping_of_the_gradient():
    assert parse("--max_grad_norm", "inf")["max_grad_norm"] == float("inf")


def test_no_data_set_at_all(capsys):
    """Which only drawing does without."""
    words = ["--pretrained_model_name_or_path", "model"]
    with pytest.raises(SystemExit) as exit_:
        parse_args(words)
    assert exit_.value.code == 2
    assert "--dataset_name" in capsys.readouterr().err.splitlines()[-1]
    assert parse_args([*words, "--generate", "red dots"]).generate == "red dots"


# Input that turns out bad: one line, and nothing written --------------------------------------------------------------

NOT_HERE = {"xformers"}  # a flag of the PyTorch script's


@pytest.mark.parametrize("case", sorted(BAD_INPUT.keys() - NOT_HERE))
def test_bad_input(case, flags, tmp_path, pipeline_folder):
    name, value, message = BAD_INPUT[case]
    if callable(value):
        value = value(tmp_path, pipeline_folder) if value is no_unet else value(tmp_path)
    before = everything_below(tmp_path)
    assert message in refusal({**flags, "lr_scheduler": "polynomial", name: value})
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_trained(case, flags, tmp_path, pipeline_folder):
    part, change, message = BAD_MODELS[case]
    flags["pretrained_model_name_or_path"] = changed_model(tmp_path, pipeline_folder, part, change)
    if case == "pickles":
        message = (
            "unet: diffusion_pytorch_model.safetensors is missing, only files that are not read; .bin files are not"
        )
    assert message in refusal(flags)
    assert not flags["output_dir"].exists()


def without_a_tensor(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path)


def other_shape(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"][:3].clone()}, path)


def cut_short(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def configured(**values):
    def change(folder):
        (path,) = folder.glob("*config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


BROKEN_MODELS = {
    "a missing tensor": ("unet", without_a_tensor, "unet: 1 tensors are missing: conv_in.bias; is it"),
    "another shape": ("unet", other_shape, "unet: conv_in.bias has shape (3,), and config.json makes it (16,)"),
    "a file cut short": ("unet", cut_short, "diffusion_pytorch_model.safetensors: cannot be read: "),
    "SDXL's UNet": ("unet", configured(addition_embed_type="text_time"), 'addition_embed_type is "text_time"; in'),
    "SDXL's layers": (
        "unet",
        configured(transformer_layers_per_block=[1, 2]),
        "transformer_layers_per_block is [1, 2]",
    ),
    "SD 3's VAE": ("vae", configured(use_quant_conv=False), "vae/config.json: use_quant_conv is false"),
    "another text encoder": (
        "text_encoder",
        configured(model_type="t5"),
        'text_encoder/config.json: model_type is "t5"',
    ),
    "betas of another kind": ("scheduler", configured(beta_schedule="sigmoid"), "beta_schedule sigmoid is not known"),
    "a configuration that is no JSON": (
        "vae",
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: ",
    ),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_model_that_is_damaged_or_not_stable_diffusion_is_named(case, flags, tmp_path, pipeline_folder):
    part, change, message = BROKEN_MODELS[case]
    flags["pretrained_model_name_or_path"] = changed_model(tmp_path, pipeline_folder, part, change)
    assert message in refusal(flags)
    assert not flags["output_dir"].exists()


def test_a_kandinsky_decoder(flags, tmp_path):
    tiny.make_kandinsky_decoder(tmp_path / "decoder")
    line = refusal({**flags, "pretrained_model_name_or_path": tmp_path / "decoder"})
    assert "decoder: has no tokenizer/, which a pipeline of this kind needs" in line


def test_zero_terminal_snr_with_epsilon(flags, tmp_path):
    tiny.make_stable_diffusion(tmp_path / "model", zero_terminal_snr=True)
    assert "zero terminal SNR" in refusal({**flags, "pretrained_model_name_or_path": tmp_path / "model"})


def test_a_row_without_an_image(flags, tmp_path):
    flags |= {"train_data_dir": None, "dataset_name": images_in_a_saved_data_set(tmp_path, missing=True)}
    assert "--image_column image: row 1 is empty" in refusal(flags)


def test_output_dir_among_the_images_or_over_the_model(flags, pipeline_folder):
    before = {path: path.stat().st_mtime_ns for path in pipeline_folder.rglob("*")}
    assert "holds the training images" in refusal({**flags, "output_dir": flags["train_data_dir"]})
    assert "holds the training images" in refusal({**flags, "output_dir": flags["train_data_dir"].parent})
    assert "is the model to start from" in refusal({**flags, "output_dir": pipeline_folder})
    assert {path: path.stat().st_mtime_ns for path in pipeline_folder.rglob("*")} == before


def test_generate_with_a_model_that_is_not_there(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"pretrained_model_name_or_path": "/nowhere/model", "generate": "red dots"}
    assert refusal(flags) == "--pretrained_model_name_or_path /nowhere/model: there is no such folder"
    assert list(tmp_path.iterdir()) == []


# What the user sees ---------------------------------------------------------------------------------------------------


def check_line(result, start):
    """A process ended with status 1, no traceback, and one line that starts so."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert line == result.stderr.splitlines()[-1]
    assert line.startswith(f"error: {start}")


def test_the_line_and_the_status(flags):
    check_line(launch({**flags, "train_data_dir": "nowhere"}, script=SCRIPT), "--train_data_dir nowhere: there is no")


def test_a_coordinator_given_alone(flags):
    result = launch(flags, script=SCRIPT, JAX_COORDINATOR_ADDRESS="127.0.0.1:1")
    names = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    check_line(result, f"{names}: give all three, or none")
    assert not flags["output_dir"].exists()


# Runs the script's last lines too, after some Python of the test's.
AS_MAIN = """
import runpy, sys
{preparation}
sys.argv = ["train_text_to_image_flax.py", *{words!r}]
runpy.run_path({path!r}, run_name="__main__")
"""


def launch_after(preparation, flags):
    path = str(ROOT / f"{SCRIPT}.py")
    return run_code(AS_MAIN.format(preparation=preparation, words=command_line(flags), path=path))


@pytest.mark.parametrize(("tracker", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed(flags, tracker, module):
    result = launch_after(f"sys.modules[{module!r}] = None", {**flags, "report_to": tracker})
    check_line(result, f"--report_to {tracker}: ")
    assert not flags["output_dir"].exists()


def test_a_bad_image_that_a_thread_meets(flags, tmp_path):
    """One behind the 1000 that are looked at before the training."""
    rows = [json.loads(line) for line in (broken_images(tmp_path) / "metadata.jsonl").read_text().splitlines()]
    good, bad = rows[0]["file_name"], rows[5]["file_name"]
    folder = tmp_path / "broken"
    table = {"text": ["a"] * 1010, "image": [str(folder / good)] * 1000 + [str(folder / bad)] * 10}
    make_saved(table, tmp_path / "many")
    flags |= {"train_data_dir": None, "dataset_name": tmp_path / "many", "dataloader_num_workers": 2}
    result = launch({**flags, "max_train_steps": 505}, script=SCRIPT)
    check_line(result, "row 100")
    assert "5.png cannot be read" in result.stderr


def make_saved(table, folder):
    import datasets

    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).save_to_disk(folder)


def start_endless(flags):
    """A run with two threads that read images, in a process group of its own; it has just saved checkpoint-2."""
    flags |= {"max_train_steps": 10**6, "checkpointing_steps": 2, "dataloader_num_workers": 2}
    command = [sys.executable, str(ROOT / f"{SCRIPT}.py"), *command_line(flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert next(line for line in process.stderr if "saved" in line and "checkpoint-2" in line)
    return process


def test_an_interrupt_ends_the_run_with_the_line_about_resuming(flags):
    process = start_endless(flags)
    try:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert re.search(r"WARNING stopped by SIGINT after step \d+; --resume_from_checkpoint resumes", rest)
    last = max(int(path.name.removeprefix("checkpoint-")) for path in flags["output_dir"].glob("checkpoint-*[0-9]"))
    flags |= {"max_train_steps": last + 1, "resume_from_checkpoint": True, "dataloader_num_workers": 0}
    run(flags, SCRIPT)
    assert (flags["output_dir"] / "model_index.json").is_file()


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path):
    """tensorboardX writes in a thread, and when that has died of a full disk, whatever is logged waits for it."""
    log = UpdateLog(parse_args([*REQUIRED, "--output_dir", str(tmp_path)]), 1, {"step": 0}, 2)
    worker = log.tensorboard.file_writer.event_writer._worker
    worker._record_writer.write_event = None  # what it calls: the thread dies at the next event
    log.next_batch(iter([{}]))
    log.add(1, {"train_loss": 1.0, "grad_norm": 1.0})
    with pytest.raises(RunError, match="--logging_dir: the TensorBoard log cannot be written"):
        for _ in range(100):
            log.flush()
            worker.join(timeout=0.3)
            log.next_batch(iter([{}]))
            log.add(2, {"train_loss": 1.0, "grad_norm": 1.0})
    log.close()


def test_a_folder_without_an_index_is_refused_before_anything_is_written(flags, pipeline_folder, tmp_path):
    folder = tmp_path / "no_index"
    shutil.copytree(pipeline_folder, folder, ignore=shutil.ignore_patterns("model_index.json"))
    assert "model_index.json" in refusal({**flags, "pretrained_model_name_or_path": folder})
    assert not flags["output_dir"].exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction type flow_prediction"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_generate_refuses_what_it_cannot_draw(change, message, pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "changed")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    flags = {"pretrained_model_name_or_path": folder, "resolution": 32, "generate": "red dots"}
    assert message in refusal(flags)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a picture: red/dots!", "a-picture-red-dots"),
        ("हिन्दी में चित्र", "हिन्दी-में-चित्र"),
        ("../../🎨", "picture"),
        ("猫" * 90, "猫" * 50),
    ],
)
def test_names_of_pictures(prompt, name):
    assert file_name(prompt) == name
