"""The flags: all of upstream's with their defaults, and one clear line with the right status for bad input."""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from accelerate.utils import LoggerType
from conftest import ROOT, command_line, launch, run
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from train_text_to_image import RunError, parse_args, permutation

ALL_FLAGS = json.loads((ROOT / "tests" / "upstream_flags.json").read_text())
UPSTREAM = ALL_FLAGS["train_text_to_image.py"]
NEW = {"--proportion_empty_prompts", "--validation_steps", "--logging_steps"}
NEW |= {"--skip_bad_images", "--cache_encodings", "--compile", "--deterministic"}
NEW |= {"--rank", "--lora_alpha", "--lora_target_modules", "--num_validation_images"}
NEW |= {"--validation_rows", "--validation_data_dir", "--keep_best", "--half_precision_norms"}
FASTER = {"--dataloader_num_workers"}  # with another default than upstream's, which changes the speed alone
REQUIRED = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "images"]


def parse(*words):
    return vars(parse_args([*REQUIRED, *words]))


# The flags ------------------------------------------------------------------------------------------------------------


STABLE_DIFFUSION = {"train_text_to_image": 57, "train_text_to_image_sdxl": 59, "train_text_to_image_flax": 34}


@pytest.mark.parametrize(("script", "number"), STABLE_DIFFUSION.items())
def test_the_number_of_upstream_s_flags(script, number):
    assert len(ALL_FLAGS[f"{script}.py"]) == number


@pytest.mark.parametrize(
    ("script", "flag"), [(script, flag) for script in STABLE_DIFFUSION for flag in sorted(ALL_FLAGS[f"{script}.py"])]
)
def test_flag_of_upstream(script, flag):
    """It is accepted with the same type and default, and a value of that type is what the script gets."""
    facts, name = ALL_FLAGS[f"{script}.py"][flag], flag.removeprefix("--")
    module = importlib.import_module(script)

    def parse(*words):
        parsed = vars(module.parse_args([*REQUIRED, *words]))
        return {**parsed, "validation_prompt": (parsed["validation_prompts"] or [None])[0]}  # another name of one

    if flag not in REQUIRED:
        assert parse()[name] == facts["default"] or flag in FASTER
    if facts["type"] == "flag":
        assert parse(flag)[name] is True
        return
    value = {"int": "3", "float": "0.25", "str": "constant"}[facts["type"]]
    restricted = {
        "--prediction_type": ["epsilon", "v_prediction", "sample"],
        "--report_to": ["tensorboard", "wandb", "all", "none"],
        "--image_interpolation_mode": ["bicubic", "lanczos"],
    }
    values = facts.get("choices") or restricted.get(flag) or [value]
    for value in values:
        expected = {"int": int, "float": float, "str": str}[facts["type"]](value)
        assert parse(flag, value)[name] == ([expected] if facts.get("nargs") else expected)


def test_the_flags_that_upstream_does_not_have():
    assert {f"--{name}" for name in parse()} - set(UPSTREAM) == NEW


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in {*UPSTREAM, *NEW})


@pytest.mark.parametrize("script", [name.removesuffix(".py") for name in ALL_FLAGS])
def test_help_and_a_wrong_flag_are_answered_before_the_libraries_are_imported(script):
    """By a Python without them, which gets no further with a command line that is right."""
    bare, right = (sys.executable, "-I", "-S"), {"pretrained_model_name_or_path": "model", "train_data_dir": "images"}
    right = {name: value for name, value in right.items() if f"--{name}" in ALL_FLAGS[f"{script}.py"]}
    result = launch({"help": True}, bare, script)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--output_dir" in result.stdout
    for wrong, message in [({"no_such_flag": True}, "unrecognized arguments"), ({"seed": -1}, "argument --seed: ")]:
        result = launch({**right, **wrong}, bare, script)
        assert result.returncode == 2
        usage, line = result.stderr.splitlines()
        assert message in line
    result = launch(right, bare, script)
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named " in result.stderr


@pytest.mark.parametrize("script", [name.removesuffix(".py") for name in ALL_FLAGS if "flax" not in name])
def test_the_trackers_are_those_of_accelerate(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    assert "--report_to {none," + ",".join(LoggerType.list()) + "}" in capsys.readouterr().out


def test_a_tracker_that_is_not_installed(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "aim", None)
    with pytest.raises(RunError, match="--report_to aim: .*pip install aim"):
        run({**flags, "report_to": "aim"})
    assert not flags["output_dir"].exists()


@pytest.mark.parametrize("script", [name.removesuffix(".py") for name in ALL_FLAGS])
def test_a_tilde_is_the_home_folder_in_every_path(script, monkeypatch):
    """Also behind an equals sign, where no shell replaces it."""
    monkeypatch.setenv("HOME", "/home/user")
    names = {"output_dir", "logging_dir", "train_data_dir", "dataset_name", "cache_dir", "cache_encodings"}
    names |= {"resume_from_checkpoint", *(name for name in everything_of(script) if name.startswith("pretrained_"))}
    words = ["--center_crop"] if "--center_crop" in ALL_FLAGS[f"{script}.py"] else []
    parsed = vars(importlib.import_module(script).parse_args([*words, *(f"--{name}=~/in/{name}" for name in names)]))
    assert {name: parsed[name] for name in names} == {name: f"/home/user/in/{name}" for name in names}


def everything_of(script):
    return [flag.removeprefix("--") for flag in ALL_FLAGS[f"{script}.py"]]


@pytest.mark.parametrize("script", [name.removesuffix(".py") for name in ALL_FLAGS])
def test_report_to_none(script):
    words = [f"--{name}=x" for name in everything_of(script) if name.startswith("pretrained_")]
    args = importlib.import_module(script).parse_args([*words, "--train_data_dir=x", "--report_to", "none"])
    assert args.report_to == "none"


def test_no_tracker_writes_no_log(flags):
    run({**flags, "max_train_steps": 1, "report_to": "none"})
    assert (flags["output_dir"] / "model_index.json").is_file()
    assert not (flags["output_dir"] / "logs").exists()


def test_resume_with_no_value_means_latest():
    assert parse("--resume_from_checkpoint")["resume_from_checkpoint"] == "latest"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_schedules(schedule):
    assert parse("--lr_scheduler", schedule)["lr_scheduler"] == schedule


# Values that can't be right: status 2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *[(f"--{name} {value}", f"argument --{name}: .*{value}")
          for name in ("resolution", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                       "max_train_steps", "max_train_samples", "checkpointing_steps", "checkpoints_total_limit",
                       "validation_epochs", "validation_steps", "logging_steps", "learning_rate", "max_grad_norm",
                       "snr_gamma")
          for value in (0, -1)],
        *[(f"--{name} -0.5", f"argument --{name}: .*-0.5")
          for name in ("noise_offset", "input_perturbation", "dream_detail_preservation", "adam_weight_decay",
                       "adam_epsilon", "adam_beta1", "adam_beta2", "proportion_empty_prompts")],
        *[(f"--{name} -1", f"argument --{name}: .*-1")
          for name in ("seed", "lr_warmup_steps", "dataloader_num_workers")],
        *[(f"--learning_rate {value}", f"argument --learning_rate: .*{value}") for value in ("nan", "inf")],
        *[(f"--{name} {value}", f"argument --{name}: .*{value}")
          for name, value in (("proportion_empty_prompts", 1.5), ("adam_beta1", 1), ("adam_beta2", 1))],
        ("--logging_dir .", "argument --logging_dir: "),
        ("--resolution large", "argument --resolution: .*large"),
        ("--lr_scheduler sawtooth", "--lr_scheduler: invalid choice"),
        ("--prediction_type flow", "--prediction_type: invalid choice"),
        ("--report_to paper", "--report_to: invalid choice"),
        ("--mixed_precision fp8", "--mixed_precision: invalid choice"),
        ("--image_interpolation_mode best", "--image_interpolation_mode: invalid choice"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--compile fastest", "unrecognized arguments: fastest"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_right(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*words.split())
    assert exit_.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_no_data_set_at_all(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--pretrained_model_name_or_path", "model"])
    assert exit_.value.code == 2
    assert "--dataset_name" in capsys.readouterr().err.splitlines()[-1]


# Input that turns out bad: one line, and nothing written --------------------------------------------------------------


def broken_images(tmp_path):
    folder = tiny.make_images(tmp_path / "broken")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:50])
    return folder


def records_as_captions(tmp_path):
    folder = tiny.make_images(tmp_path / "records")
    rows = [{"file_name": f"{index}.png", "text": {"en": "dots"}} for index in range(8)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def no_captions(tmp_path):
    folder = tiny.make_images(tmp_path / "no_captions")
    (folder / "metadata.jsonl").unlink()
    return folder


def dangling_metadata(tmp_path):
    folder = tiny.make_images(tmp_path / "dangling")
    (folder / "3.png").unlink()
    return folder


def empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def no_unet(tmp_path, pipeline_folder):
    shutil.copytree(pipeline_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "unet")
    return tmp_path / "model"


def a_file(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file"


def someone_s_readme(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    return tmp_path / "project"


def images_in_a_saved_data_set(tmp_path, missing):
    folder = tiny.make_images(tmp_path / "images")
    rows = {"image": [str(folder / "0.png"), None if missing else str(folder / "1.png")], "text": ["a", "b"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def changed_model(tmp_path, pipeline_folder, part, change):
    """A copy of the tiny pipeline, after `change` was done to the folder of its `part`."""
    shutil.copytree(pipeline_folder, tmp_path / "model")
    change(tmp_path / "model" / part)
    return tmp_path / "model"


def other_unet(**config):
    """A change: another UNet, of a pipeline that is not Stable Diffusion's text-to-image."""

    def change(folder):
        settings = json.loads((folder / "config.json").read_text())
        UNet2DConditionModel.from_config({**settings, **config}).save_pretrained(folder)

    return change


def without_vocabulary(folder):
    for path in folder.iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()


def weights_in_pickles(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), folder / "diffusion_pytorch_model.bin")
    path.unlink()


def other_prediction_type(folder):
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "flow"}))


BAD_MODELS = {
    "inpainting": ("unet", other_unet(in_channels=9), "Stable Diffusion 1.x or 2.x"),
    "other width": ("unet", other_unet(cross_attention_dim=32), "Stable Diffusion 1.x or 2.x"),
    "tokenizer without its files": ("tokenizer", without_vocabulary, "tokenizer"),
    "pickles": ("unet", weights_in_pickles, "safetensors"),
    "prediction type": ("scheduler", other_prediction_type, "prediction type flow"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_trained(case, flags, tmp_path, pipeline_folder):
    part, change, message = BAD_MODELS[case]
    flags["pretrained_model_name_or_path"] = changed_model(tmp_path, pipeline_folder, part, change)
    with pytest.raises(RunError, match=message):
        run(flags)
    assert not flags["output_dir"].exists()


def test_a_row_without_an_image(flags, tmp_path):
    flags |= {"train_data_dir": None, "dataset_name": images_in_a_saved_data_set(tmp_path, missing=True)}
    with pytest.raises(RunError, match="--image_column image: row 1 is empty"):
        run(flags)
    shutil.rmtree(tmp_path / "saved")
    run({**flags, "dataset_name": images_in_a_saved_data_set(tmp_path, missing=False), "max_train_steps": 1})


def test_output_dir_among_the_images(flags):
    with pytest.raises(RunError, match="holds the training images"):
        run({**flags, "output_dir": flags["train_data_dir"]})
    with pytest.raises(RunError, match="holds the training images"):
        run({**flags, "output_dir": flags["train_data_dir"].parent})
    data = {"train_data_dir": None, "dataset_name": flags["train_data_dir"]}
    with pytest.raises(RunError, match="holds the training images"):
        run({**flags, **data, "output_dir": flags["train_data_dir"]})


@pytest.mark.parametrize("script", ["train_text_to_image", "train_text_to_image_flax"])
def test_an_output_dir_that_is_empty_text(script, flags):
    """As of a variable of the shell that is not set."""
    module = importlib.import_module(script)
    with pytest.raises(module.RunError, match="--output_dir : is empty"):
        run({**flags, "output_dir": ""}, script)


BAD_INPUT = {
    "somebody's folder": ("output_dir", someone_s_readme, "has a README.md of something else"),
    "logging_dir is a file": ("logging_dir", a_file, "file"),
    "no such model folder": ("pretrained_model_name_or_path", "/nowhere/model", "_or_path /nowhere/model: "),
    "a rate that the schedule cannot take": ("learning_rate", 1e-8, "--lr_scheduler polynomial: "),
    "no such folder": ("train_data_dir", "nowhere", "--train_data_dir nowhere: "),
    "empty folder": ("train_data_dir", empty_folder, "--train_data_dir "),
    "no such data set": ("dataset_name", "nobody/nothing", "--dataset_name nobody/nothing: "),
    "no such image column": ("image_column", "picture", "--image_column picture: no such column"),
    "no such caption column": ("caption_column", "title", "--caption_column title: no such column"),
    "no metadata": ("train_data_dir", no_captions, "--caption_column text: no such column"),
    "captions that are no text": ("train_data_dir", records_as_captions, "--caption_column text: holds {'en': Value("),
    "metadata without its image": ("train_data_dir", dangling_metadata, "3.png"),
    "broken image": ("train_data_dir", broken_images, "5.png cannot be read"),
    "resolution": ("resolution", 30, "--resolution 30: "),
    "no such model": ("pretrained_model_name_or_path", "nowhere", "--pretrained_model_name_or_path nowhere: "),
    "model without a UNet": ("pretrained_model_name_or_path", no_unet, "--pretrained_model_name_or_path "),
    "output_dir is a file": ("output_dir", a_file, "--output_dir "),
    "output_dir below a file": ("output_dir", lambda tmp_path: a_file(tmp_path) / "below", "--output_dir "),
    "no such checkpoint": ("resume_from_checkpoint", "checkpoint-7", "checkpoint-7: "),
    "epsilon with fp16 on a CPU": ("mixed_precision", "fp16", "--mixed_precision fp16: "),
    "xformers": ("enable_xformers_memory_efficient_attention", True, "memory-efficient"),
}  # fmt: skip


def everything_below(folder):
    return sorted(str(path) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, flags, tmp_path, pipeline_folder):
    name, value, message = BAD_INPUT[case]
    if callable(value):
        value = value(tmp_path, pipeline_folder) if value is no_unet else value(tmp_path)
    flags |= {"lr_scheduler": "polynomial", name: value}
    before = everything_below(tmp_path)
    with pytest.raises(RunError) as error:
        run(flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert everything_below(tmp_path) == before


def test_the_line_and_the_status_that_the_user_sees(flags):
    result = launch({**flags, "image_column": "picture"})
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert re.match("error: --image_column picture: no such column.*image.*text", result.stderr.splitlines()[-1])


def test_a_bad_image_that_a_data_worker_meets(flags, tmp_path):
    """One behind the thousand that are looked at before the training."""
    row = next(row for row in permutation(0, 0, 1100) if row >= 1000)
    place = list(permutation(0, 0, 1100)).index(row)
    flags |= {"train_data_dir": None, "dataset_name": tiny.save_rows(tmp_path / "rows", 1100, bad=row)}
    with pytest.raises(RunError, match=rf"row {row}: image .* cannot be read"):
        run({**flags, "dataloader_num_workers": 1, "max_train_steps": place + 2})


def test_the_model_is_not_overwritten(flags, pipeline_folder):
    before = {path: path.stat().st_mtime_ns for path in pipeline_folder.rglob("*")}
    with pytest.raises(RunError, match="is the model to start from"):
        run({**flags, "output_dir": pipeline_folder})
    assert {path: path.stat().st_mtime_ns for path in pipeline_folder.rglob("*")} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind, not root")
def test_an_output_dir_that_cannot_be_written(flags, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunError, match="no permission"):
        run({**flags, "output_dir": tmp_path / "locked" / "output"})


def test_a_read_only_output_dir(flags):
    with pytest.raises(RunError, match="--output_dir /proc/output"):
        run({**flags, "output_dir": "/proc/output"})


def test_zero_terminal_snr_with_epsilon(flags, tmp_path):
    tiny.make_stable_diffusion(tmp_path / "model", zero_terminal_snr=True)
    flags |= {"pretrained_model_name_or_path": tmp_path / "model"}
    with pytest.raises(RunError, match="zero terminal SNR"):
        run(flags)
    assert not flags["output_dir"].exists()
    run({**flags, "prediction_type": "v_prediction", "snr_gamma": 5.0})


def test_command_line_of_the_tests():
    assert command_line({"a": 1, "b": True, "c": None, "d": ["x y", "z"]}) == ["--a", "1", "--b", "--d", "x y", "z"]
