"""Every command and all Python of the README: only sizes are cut, by flags appended, and names served here.

What trains runs in two processes, one for PyTorch and one for JAX, one command after the other with what stands behind
the script's name; but for the one that starts several processes, which runs as it stands. What a recipe adds to a
command is read in its text.
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
SMALL_PICTURE = 'mine", num_inference_steps=2, height=32, width=32)'
RUN_ELSEWHERE = {
    "make demo": "by hand, since it takes minutes; test_install.py looks at what it installs",
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
    tiny.make_stable_diffusion_xl(folder / "xl")
    tiny.make_stable_diffusion(folder / "sd", levels=1)  # XLA compiles it in half the time
    tiny.make_kandinsky_prior(folder / "prior")
    tiny.make_kandinsky_decoder(folder / "decoder")
    with Hub() as hub:
        card = "---\nprior:\n- kandinsky-community/kandinsky-2-2-prior\n---\n"  # as the real one's
        (folder / "decoder" / "README.md").write_text(card)
        hub.add_repo("kandinsky-community/kandinsky-2-2-prior", folder / "prior")
        hub.add_repo("kandinsky-community/kandinsky-2-2-decoder", folder / "decoder")
        hub.add_repo("stable-diffusion-v1-5/stable-diffusion-v1-5", folder / "sd")
        hub.add_repo("stabilityai/stable-diffusion-xl-base-1.0", folder / "xl")
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
    assert (len(TRAINING), len(LOOKING), len(blocks("python"))) == (6, 1, 5)


def added(*words):
    """The first command with `words` more, each of which the README says."""
    for word in words:
        assert f"`{word}`" in README or f" {word} " in README.replace("`", " "), word
    return " ".join([TRAINING[0], *words])


def script_words(command, *more):
    """What stands behind the launcher, with the script where it lies, and `more`."""
    words = shlex.split(command)
    start = next(index for index, word in enumerate(words) if word.startswith("train_text_to_image"))
    return [str(ROOT / words[start]), *words[start + 1 :], *more]


def step(command, *more):
    return ["script", command, script_words(command, *SMALL, *more)]


def drawing(block, also="", **replaced):
    code = blocks("python")[block].replace('mine")', SMALL_PICTURE) + also
    for old, new in replaced.items():
        code = code.replace(old.replace("_", "-"), new)
    return ["draws", f"Python block {block}", code]


def test_all_that_trains_in_pytorch_and_draws_with_it(workplace):
    """The first command, what the recipes add to it, and the ways of using the result; then the others."""
    folder, _ = workplace
    resume = added("--resume_from_checkpoint")
    local, on_hub = "--train_data_dir=my_images", "--dataset_name=lambdalabs/naruto-blip-captions"
    assert f"`{on_hub}` in place of `{local}`" in README
    cached = added("--center_crop", "--cache_encodings=my_encodings").replace(local, on_hub)
    notebook = blocks("python")[4].replace(local, " ".join([local, *SMALL]))
    steps = [step(TRAINING[0]), step(resume, "--max_train_steps=3")]
    steps += [drawing(0), drawing(1, checkpoint_500="checkpoint-3"), step(cached, "--output_dir=cached")]
    steps += [step(command) for command in TRAINING if "kandinsky" in command or "_sdxl" in command]
    own_prior = "\nassert pipeline.prior_prior is parts['prior_prior'] and pipeline.unet is parts['unet']"
    steps += [drawing(2, own_prior, checkpoint_500="checkpoint-2")]
    pair = 'AutoPipelineForText2Image.from_pretrained("my_decoder")'
    assert f"`{pair}`" in README
    in_one = (
        f"from diffusers import AutoPipelineForText2Image\npipeline = {pair}\n{blocks('python')[2].splitlines()[-1]}"
    )
    steps += [step(added("--rank=16", "--learning_rate=1e-4", "--output_dir=my_adapter")), drawing(3)]
    steps += [["draws", pair, in_one.replace('mine")', SMALL_PICTURE)], ["python", "notebook", notebook]]
    result = drive(steps, workplace, "pytorch")
    assert "my_model/checkpoint-2" in result.stderr
    assert (folder / "sd-model-finetuned" / "model_index.json").is_file()
    assert list((folder / "my_encodings").glob("*/*.arrow"))
    assert {command for command in TRAINING if "flax" not in command} <= {command for _, command, _ in steps}


def test_training_by_several_processes(workplace):
    """As it stands, with no more processes than there are here."""
    assert "`accelerate launch --num_processes=8 train_text_to_image.py ...`" in README
    words = [str(ROOT / word) if word.startswith("train_text") else word for word in shlex.split(TRAINING[0])]
    words[2:2] = ["--num_processes=2", "--cpu"]
    check([*words, *SMALL, "--output_dir=several"], workplace)


def test_training_in_jax_and_drawing_with_it(workplace):
    folder, _ = workplace
    steps = [step(command) for command in TRAINING if "flax" in command]
    drive([*steps, drawing(0, my_model="my_flax_model")], workplace, "jax")
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
        (conversion,) = re.findall(r"`(DiffusionPipeline\.from_pretrained\(.*?)`", README)
        exec(f"from diffusers import DiffusionPipeline\n{conversion}", {})
    run({**flags, "pretrained_model_name_or_path": folder / "converted_model"})


def test_the_tests_that_are_named_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    texts = [README, *(path.read_text() for path in (ROOT / "tests").glob("*.md"))]
    named = re.findall(r"`(test_\w+)`", "".join(texts))
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in tests, name


def test_the_flags_that_are_named_are_there():
    import check_data
    import train_text_to_image
    import train_text_to_image_decoder
    import train_text_to_image_flax
    import train_text_to_image_sdxl

    flags = vars(train_text_to_image.parse_args(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"]))
    flags |= vars(train_text_to_image_decoder.parse_args(["--train_data_dir", "b"]))
    flags |= vars(
        train_text_to_image_sdxl.parse_args(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"])
    )
    flax_flags = vars(train_text_to_image_flax.parse_args(["--pretrained_model_name_or_path", "a", "--generate", "b"]))
    flags |= {**flax_flags, **vars(check_data.parse_args(["--train_data_dir", "a"]))}
    foreign = {"num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "multi_gpu"}
    foreign |= {"nproc_per_node", "shm-size", "xla_gpu_deterministic_ops", "logdir", "help"}
    named = set(re.findall(r"--(\w[\w-]*)", README))
    assert len(named) > 50
    assert named - flags.keys() == foreign


def test_every_link_leads_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\((.*?)\)", README) + re.findall(r'<img src="(.*?)"', README)
    links = [link for link in links if not link.startswith("https://")]
    assert len(links) > 8
    for link in links:
        assert link in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 300
    assert max(map(len, re.sub(r"^[|<].*$", "", README, flags=re.MULTILINE).splitlines())) <= 120
