"""Every command of the README, run as it stands there: only sizes are cut, by flags appended, and names served here."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline
from hub import Hub
from PIL import Image
from safetensors.torch import load_file

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--resolution=32", "--max_train_steps=2", "--checkpointing_steps=1", "--mixed_precision=no"]
RUN_ELSEWHERE = {
    "make demo": "by hand, and its parts by test_shapes.py",
    "pip install -r requirements_flax.txt": "by the Makefile",
    "make test": "what runs this",
    "make faults": "by hand, and its short form by test_faults.py",
    "make lint": "by .ci/run",
    "make benchmark": "by hand, and its parts by test_benchmarks.py",
    "pip install -r requirements.txt": "by the Makefile",
    "tensorboard --logdir my_model/logs": "a server; the events are read back in test_training.py",
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands():
    text = "".join(blocks("bash")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


TRAINING = [command for command in commands() if "train_text_to_image" in command]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with my_images, and a Hub that holds tiny models and data sets by the names in the README."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.make_images(folder / "my_images")
    tiny.make_stable_diffusion(folder / "sd")
    tiny.make_kandinsky_prior(folder / "prior")
    tiny.make_kandinsky_decoder(folder / "decoder")
    with Hub() as hub:
        hub.add_repo("kandinsky-community/kandinsky-2-2-prior", folder / "prior")
        hub.add_repo("kandinsky-community/kandinsky-2-2-decoder", folder / "decoder")
        hub.add_repo("stable-diffusion-v1-5/stable-diffusion-v1-5", folder / "sd")
        hub.add_repo("lambdalabs/naruto-blip-captions", folder / "my_images", repo_type="dataset")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        yield folder, {**hub.environment(), "PATH": path, "PYTHONPATH": str(ROOT)}


def check(command, workplace):
    folder, environment = workplace
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


def test_every_command_is_run_or_accounted_for():
    assert set(commands()) == set(TRAINING) | RUN_ELSEWHERE.keys()
    assert len(TRAINING) == 10
    assert len(blocks("python")) == 7


def words_of(command):
    """The command's words, with the script where it lies and no more processes than there are here."""
    words = [str(ROOT / word) if word.startswith("train_text_to_image") else word for word in shlex.split(command)]
    if "--num_processes=8" in words:
        words[words.index("--num_processes=8")] = "--num_processes=2"
        words.insert(2, "--cpu")
    return words


def alone(command):
    """Whether a command takes nothing of another's; those that do are run below, with it."""
    return not any(word in command for word in ("--resume", "kandinsky", "flax", "--check_data"))


@pytest.mark.parametrize("command", list(filter(alone, TRAINING)), ids=lambda command: command[:60])
def test_training_command(command, workplace):
    words = words_of(command)
    folder = Path(words[-1].removeprefix("--output_dir="))
    check([*words, *SMALL, f"--output_dir={folder}-{TRAINING.index(command)}"], workplace)


def test_the_kandinsky_pair_and_the_code_that_draws_with_it(workplace):
    for command in TRAINING:
        if "kandinsky" in command:
            check([*words_of(command), *SMALL], workplace)
    for code in blocks("python")[3:6]:
        code = code.replace("checkpoint-500", "checkpoint-2")
        code = code.replace('mine")', 'mine", height=32, width=32, num_inference_steps=2)')
        check([sys.executable, "-c", code], workplace)
        picture = workplace[0] / "picture.png"
        assert picture.is_file()
        picture.unlink()


def test_training_in_jax_and_drawing_with_it(workplace):
    for command in TRAINING:
        if "flax" in command:
            check([sys.executable, *words_of(command)[1:], *SMALL], workplace)
    picture = workplace[0] / "a-picture-like-mine-seed-0.png"
    assert Image.open(picture).size == (32, 32)
    check([sys.executable, "-c", blocks("python")[1].replace("my_model", "my_flax_model")], workplace)
    assert (workplace[0] / "picture.png").is_file()
    (workplace[0] / "picture.png").unlink()


def test_looking_at_the_data(workplace):
    (command,) = (command for command in TRAINING if "--check_data" in command)
    result = check([sys.executable, *words_of(command)[1:]], workplace)
    assert "images smaller than 512 pixels, which are enlarged: 8" in result.stdout


def test_weights_in_pickles_are_converted(workplace):
    """As the README says; before and after it the script is tried on them."""
    folder = workplace[0]
    DiffusionPipeline.from_pretrained(folder / "sd").save_pretrained(folder / "old_model", safe_serialization=False)
    weights = folder / "old_model" / "text_encoder" / "model.safetensors"  # transformers writes nothing else any more
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    flags = ["--train_data_dir=my_images", *SMALL, "--train_batch_size=2", "--output_dir=from_converted"]
    words = [sys.executable, str(ROOT / "train_text_to_image.py"), *flags, "--pretrained_model_name_or_path"]
    refused = subprocess.run([*words, "old_model"], cwd=folder, env=workplace[1], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "holds no .safetensors" in refused.stderr.splitlines()[-1]
    check([sys.executable, "-c", blocks("python")[6]], workplace)
    check([*words, "converted_model"], workplace)


def test_resume_command_and_the_code_that_uses_the_result(workplace):
    """The first training command of the README, the one that resumes it, then the two ways of using the result."""
    folder, environment = workplace
    first, resume = TRAINING[0], next(command for command in TRAINING if "--resume" in command)
    assert resume == f"{first} --resume_from_checkpoint"
    for command in (first, resume):
        steps = "--max_train_steps=3" if command is resume else "--max_train_steps=2"
        result = check([*words_of(command), *SMALL, steps], workplace)
    assert "going on from my_model/checkpoint-2" in result.stderr
    for code in blocks("python")[1:3]:
        code = code.replace("checkpoint-500", "checkpoint-3")
        check([sys.executable, "-c", code], workplace)
        assert (folder / "picture.png").is_file()
        (folder / "picture.png").unlink()


def test_notebook(workplace):
    code = blocks("python")[0].replace("--max_train_steps=2000", " ".join(SMALL)).replace("=my_model", "=from_notebook")
    check([sys.executable, "-c", code], workplace)
    assert (workplace[0] / "from_notebook" / "model_index.json").is_file()


def test_the_tests_that_are_named_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in tests, name


def test_the_number_of_flags_is_true():
    import train_text_to_image
    import train_text_to_image_decoder
    import train_text_to_image_flax

    flags = vars(train_text_to_image.parse_args(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"]))
    assert f"lists all {len(flags)}" in README
    flags |= vars(train_text_to_image_decoder.parse_args(["--train_data_dir", "b"]))
    flax_flags = vars(train_text_to_image_flax.parse_args(["--pretrained_model_name_or_path", "a", "--generate", "b"]))
    assert f"lists all {len(flax_flags)}" in README
    flags |= flax_flags
    for name in re.findall(r"`--(\w+)`", README):
        assert name in flags or name in ("quiet", "multi_gpu"), name  # of accelerate launch
