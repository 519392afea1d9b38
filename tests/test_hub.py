"""Models, data sets and uploads through the Hub's HTTP API, served on the loopback by `hub.py`."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import IMPATIENT, launch
from hub import Hub
from safetensors.torch import load_file

WRITE = "hf_test_write"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def files_below(folder, *ignored):
    """{relative path: bytes} of a folder, without sub-folders whose names begin with one of `ignored`."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(ignored)}


def test_what_arrives_is_what_output_dir_holds(hub, flags):
    """From a model and a data set on the Hub to a model on the Hub; checkpoints, logs and the token stay here."""
    hub.add_repo("user/base", flags["pretrained_model_name_or_path"])
    hub.add_repo("user/pictures", flags["train_data_dir"], repo_type="dataset")
    flags |= {"pretrained_model_name_or_path": "user/base", "dataset_name": "user/pictures", "train_data_dir": None}
    flags |= {"push_to_hub": True, "hub_model_id": "user/tuned", "hub_token": WRITE, "checkpointing_steps": 1}
    flags |= {"logging_dir": "./my [logs]/", "validation_prompts": ["red dots"]}
    result = launch(flags, **hub.environment())
    assert result.returncode == 0, result.stderr
    (flags["output_dir"] / "set-aside-1-checkpoint-1").mkdir()  # as a resume from an earlier checkpoint leaves it
    (flags["output_dir"] / "set-aside-1-checkpoint-1" / "optimizer.bin").write_bytes(b"not to be uploaded")
    again = launch({**flags, "resume_from_checkpoint": True}, **hub.environment())
    assert again.returncode == 0, again.stderr
    arrived = hub.files("user/tuned")
    assert {name: arrived[name] for name in arrived if name != ".gitattributes"} == files_below(
        flags["output_dir"], "checkpoint-", "my [logs]", "set-aside-"
    )
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= arrived.keys()
    assert "validation/step-000002.png" in arrived
    card = arrived["README.md"].decode()
    assert "base_model: user/base" in card
    assert "- user/pictures" in card
    everything = b"".join(files_below(flags["output_dir"]).values()) + (result.stdout + result.stderr).encode()
    assert WRITE.encode() not in everything
    requests = [(method, path) for method, path, _ in hub.requests]
    created = next(index for index, (method, path) in enumerate(requests) if path.endswith("/repos/create"))
    uploaded = next(index for index, (method, path) in enumerate(requests) if "/commit/" in path)
    assert created < uploaded


@pytest.mark.parametrize("script", ["train_text_to_image_prior", "train_text_to_image_decoder"])
def test_a_kandinsky_half_goes_from_the_hub_to_the_hub(script, hub, flags, tmp_path):
    tiny.make_kandinsky_prior(tmp_path / "prior")
    tiny.make_kandinsky_decoder(tmp_path / "decoder")
    hub.add_repo("kandinsky-community/kandinsky-2-2-prior", tmp_path / "prior")  # the flags' defaults
    hub.add_repo("kandinsky-community/kandinsky-2-2-decoder", tmp_path / "decoder")
    flags |= {"pretrained_model_name_or_path": None, "push_to_hub": True, "hub_model_id": "user/tuned"}
    result = launch({**flags, "checkpointing_steps": 1}, script=script, **hub.environment(WRITE))
    assert result.returncode == 0, result.stderr
    arrived = hub.files("user/tuned")
    assert {name: arrived[name] for name in arrived if name != ".gitattributes"} == files_below(
        flags["output_dir"], "checkpoint-", "logs"
    )
    card = arrived["README.md"].decode()
    assert f"base_model: kandinsky-community/kandinsky-2-2-{script.rpartition('_')[2]}" in card
    assert ("prior:\n- kandinsky-community/kandinsky-2-2-prior" in card) == script.endswith("decoder")


def test_a_revision_of_the_model(hub, flags, pipeline_folder, tmp_path):
    """The main branch holds no model at all; `v1` does, and `other` the weights that the UNet starts from."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing here")
    tiny.make_stable_diffusion(tmp_path / "other", seed=5)
    hub.add_repo("user/base", tmp_path / "empty")
    hub.add_repo("user/base", pipeline_folder, revision="v1")
    hub.add_repo("user/base", tmp_path / "other", revision="other")
    flags |= {"pretrained_model_name_or_path": "user/base", "revision": "v1", "non_ema_revision": "other"}
    flags |= {"learning_rate": 1e-30, "adam_weight_decay": 0}
    result = launch({**flags, "max_train_steps": 1}, **hub.environment())
    assert result.returncode == 0, result.stderr
    for part, origin in (("unet", tmp_path / "other"), ("vae", pipeline_folder)):
        name = "diffusion_pytorch_model.safetensors"
        one, two = load_file(flags["output_dir"] / part / name), load_file(origin / part / name)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-20)  # what was 0 has been moved by 1e-30


def test_a_failed_upload_leaves_the_model_and_says_the_command(hub, flags):
    hub.fail = lambda method, path: 403 if "/commit/" in path else None
    flags |= {"push_to_hub": True, "hub_model_id": "user/tuned", "checkpointing_steps": 1}
    result = launch(flags, (sys.executable, "-c", IMPATIENT), **hub.environment(WRITE))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: --push_to_hub")
    expected = files_below(flags["output_dir"], "checkpoint-", "logs")
    assert "model_index.json" in expected
    assert hub.files("user/tuned").keys() <= {".gitattributes"}

    hub.fail = lambda method, path: None
    command = shlex.split(re.search(r"(hf upload .*)$", line).group(1))
    command[0] = shutil.which("hf", path=str(Path(sys.executable).parent))
    upload = subprocess.run(command, env=hub.environment(WRITE), capture_output=True, text=True, timeout=120)
    assert upload.returncode == 0, upload.stderr
    arrived = hub.files("user/tuned")
    assert {name: arrived[name] for name in arrived if name != ".gitattributes"} == expected
