"""Every command and all Python of the README: only sizes are cut, by flags appended, and names served here.

What trains runs in two processes, one for PyTorch and one for JAX, one command after the other with what stands behind
the script's name; but for the one that starts several processes, which runs as it stands.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, reset_accelerate, run
from diffusers import DiffusionPipeline
from hub import Hub
from PIL import Image
from safetensors.torch import load_file

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--resolution=32", "--max_train_steps=2", "--checkpointing_steps=1", "--mixed_precision=no"]
RUN_ELSEWHERE = {
    "pip install -r requirements.txt": "by the Makefile",
    "pip install -r requirements_flax.txt": "by the Makefile",
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands():
    text = "".join(blocks("bash")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


TRAINING = [command for command in commands() if "train_text_to_image" in command]
LOOKING = [command for command in commands() if "check_data.py" in command]
# Runs [kind, name, content] one after the other: a script's words, or Python, of which each has to draw a new picture.
DRIVER = """
import json, os, runpy, sys

for kind, name, content in json.load(open(sys.argv[1])):
    print(f">>> {name}", file=sys.stderr, flush=True)
    if kind == "script":
        sys.argv = content
        runpy.run_path(content[0], run_name="__main__")
    else:
        exec(compile(content, name, "exec"), {"__name__": "__main__"})
        if kind == "draws":
            os.remove("picture.png")
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        sys.modules["accelerate.state"].GradientState._reset_state()
"""


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
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result


def drive(steps, workplace, name):
    folder, _ = workplace
    (folder / f"{name}.json").write_text(json.dumps(steps))
    return check([sys.executable, "-c", DRIVER, f"{name}.json"], workplace)


def test_every_command_is_run_or_accounted_for():
    assert set(commands()) == {*TRAINING, *LOOKING, *RUN_ELSEWHERE}
    assert (len(TRAINING), len(LOOKING), len(blocks("python"))) == (12, 1, 9)


def training(words):
    """The command whose text has all of `words`, or no --resume_from_checkpoint in the first place."""
    return next(command for command in TRAINING if all(word in command for word in words))


def script_words(command, *more):
    """What stands behind the launcher, with the script where it lies, and `more`."""
    words = shlex.split(command)
    start = next(index for index, word in enumerate(words) if word.startswith("train_text_to_image"))
    return [str(ROOT / words[start]), *words[start + 1 :], *more]


def step(command, *more):
    return ["script", command, script_words(command, *SMALL, *more)]


def drawing(block, **replaced):
    code = blocks("python")[block].replace('mine")', 'mine", num_inference_steps=2, height=32, width=32)')
    for old, new in replaced.items():
        code = code.replace(old.replace("_", "-"), new)
    return ["draws", f"Python block {block}", code]


def test_all_that_trains_in_pytorch_and_draws_with_it(workplace):
    """The first command, the one that resumes it and the ways of using the result; then the others."""
    folder, _ = workplace
    first, resume = TRAINING[0], training(["--resume_from_checkpoint"])
    assert resume == f"{first} --resume_from_checkpoint"
    notebook = blocks("python")[0].replace("--max_train_steps=2000", " ".join(SMALL)).replace("=my_model", "=notebook")
    steps = [step(first), step(resume, "--max_train_steps=3")]
    steps += [drawing(1), drawing(2, checkpoint_500="checkpoint-3")]
    steps += [
        step(training(["--gradient_accumulation_steps=4", "sd-naruto-model"])),
        step(training(["--cache_encodings"])),
    ]
    steps += [step(command) for command in TRAINING if "kandinsky" in command]
    steps += [drawing(3), drawing(4, checkpoint_500="checkpoint-2"), ["python", "notebook", notebook]]
    steps += [step(training(["--rank=16", "my_adapter"])), drawing(5), drawing(6), drawing(7)]
    result = drive(steps, workplace, "pytorch")
    assert "my_model/checkpoint-2" in result.stderr
    assert (folder / "notebook" / "model_index.json").is_file()
    assert (folder / "my_merged_model" / "model_index.json").is_file()
    ours = {command for _, command, _ in steps}
    assert {command for command in TRAINING if "flax" not in command} - ours == {training(["--num_processes=8"])}


def test_training_by_several_processes(workplace):
    """As it stands, with no more processes than there are here."""
    words = [
        str(ROOT / word) if word.startswith("train_text") else word for word in shlex.split(training(["_processes"]))
    ]
    words[words.index("--num_processes=8")] = "--num_processes=2"
    words.insert(2, "--cpu")
    check([*words, *SMALL, "--output_dir=several"], workplace)


def test_training_in_jax_and_drawing_with_it(workplace):
    folder, _ = workplace
    steps = [step(command) for command in TRAINING if "flax" in command]
    drive([*steps, drawing(1, my_model="my_flax_model")], workplace, "jax")
    assert Image.open(folder / "a-picture-like-mine-seed-0.png").size == (32, 32)


def test_looking_at_the_data(workplace):
    (command,) = LOOKING
    words = [str(ROOT / word) if word == "check_data.py" else word for word in shlex.split(command)]
    result = check([sys.executable, *words[1:]], workplace)
    assert "        8  enlarged: images smaller than 512 pixels" in result.stdout


def test_weights_in_pickles_are_converted(workplace):
    """As the README says; before and after it the script is tried on them."""
    folder = workplace[0]
    DiffusionPipeline.from_pretrained(folder / "sd").save_pretrained(folder / "old_model", safe_serialization=False)
    weights = folder / "old_model" / "text_encoder" / "model.safetensors"  # transformers writes nothing else any more
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    flags = {"train_data_dir": folder / "my_images", "resolution": 32, "max_train_steps": 1, "train_batch_size": 2}
    flags |= {"output_dir": folder / "from_converted", "pretrained_model_name_or_path": folder / "old_model"}
    with pytest.raises(importlib.import_module("train_text_to_image").RunError, match="safetensors"):
        run(flags)
    reset_accelerate()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        exec(compile(blocks("python")[-1], "README.md", "exec"), {})
    run({**flags, "pretrained_model_name_or_path": folder / "converted_model"})


def test_the_tests_that_are_named_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    texts = [README, *(path.read_text() for path in (ROOT / "tests").glob("*.md"))]
    named = re.findall(r"`(test_\w+)`", "".join(texts))
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in tests, name


def test_the_number_of_flags_is_true():
    import check_data
    import train_text_to_image
    import train_text_to_image_decoder
    import train_text_to_image_flax

    flags = vars(train_text_to_image.parse_args(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"]))
    assert f"lists all {len(flags)}" in README
    flags |= vars(train_text_to_image_decoder.parse_args(["--train_data_dir", "b"]))
    flax_flags = vars(train_text_to_image_flax.parse_args(["--pretrained_model_name_or_path", "a", "--generate", "b"]))
    assert f"lists all {len(flax_flags)}" in README
    flags |= {**flax_flags, **vars(check_data.parse_args(["--train_data_dir", "a"]))}
    for name in re.findall(r"`--(\w+)`", README):
        assert name in flags or name in ("quiet", "multi_gpu", "lora_rank", "validation_prompt"), name
