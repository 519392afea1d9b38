"""What users bring as a model or a checkpoint, in all five scripts: single files, variants, missing parts, schedulers
that cannot be trained with, checkpoints of other scripts, and those at which nothing is left to do."""

import importlib
import json
import shutil

import diffusers
import pytest
import torch
from conftest import reset_accelerate, run
from safetensors.torch import load_file
from test_hub import files_below

SD, PRIOR, DECODER = "train_text_to_image", "train_text_to_image_prior", "train_text_to_image_decoder"
FLAX, SDXL = "train_text_to_image_flax", "train_text_to_image_sdxl"
BASE = {
    SD: "pretrained_model_name_or_path",
    SDXL: "pretrained_model_name_or_path",
    PRIOR: "pretrained_prior_model_name_or_path",
    DECODER: "pretrained_decoder_model_name_or_path",
    FLAX: "pretrained_model_name_or_path",
}
TRAINED = {SD: "unet", SDXL: "unet", PRIOR: "prior", DECODER: "unet", FLAX: "unet"}
FOLDER_WITHIN = {SD: "text_encoder", SDXL: "text_encoder_2", PRIOR: "prior", DECODER: "movq", FLAX: "vae"}
WEIGHTS = "diffusion_pytorch_model.safetensors"

all_scripts = pytest.mark.parametrize("script", BASE)


def flags_for(script, folders, images_folder, output_dir):
    """The flags of one update that ends with a checkpoint."""
    models = folders["train_text_to_image" if script == FLAX else script]
    flags = {"train_data_dir": images_folder, "resolution": 32, "train_batch_size": 2, "max_train_steps": 1, "seed": 0}
    flags |= {"lr_warmup_steps": 0, "checkpointing_steps": 1, "report_to": "none", "output_dir": output_dir}
    return models | flags


@pytest.fixture
def flags(script, folders, images_folder, tmp_path):
    return flags_for(script, folders, images_folder, tmp_path / "output")


@pytest.fixture(scope="module")
def trained(folders, images_folder, tmp_path_factory):
    """A function of a script that returns the flags of a finished run of one update; each is run once."""
    runs = {}

    def finished(script):
        if script not in runs:
            runs[script] = flags_for(script, folders, images_folder, tmp_path_factory.mktemp(script) / "output")
            run(runs[script], script)
            reset_accelerate()
        return runs[script]

    return finished


def refusal(flags, script):
    """The one line that the run ends with, before it writes anything new."""
    before = files_below(flags["output_dir"])
    with pytest.raises(importlib.import_module(script).RunError) as error:
        run(flags, script)
    assert "\n" not in str(error.value)
    assert files_below(flags["output_dir"]) == before
    return str(error.value)


def changed_base(flags, script, folder):
    """A copy of the pipeline to start from, and the flags that name it."""
    return shutil.copytree(flags[BASE[script]], folder), {**flags, BASE[script]: folder}


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Models ---------------------------------------------------------------------------------------------------------------


@all_scripts
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_single_file_is_refused_with_the_call_that_converts_it(script, name, flags, tmp_path):
    (tmp_path / name).write_bytes(bytes(16))
    line = refusal({**flags, BASE[script]: tmp_path / name}, script)
    assert line.startswith(f"--{BASE[script]} {tmp_path / name}: is a single file; convert it by ")
    assert "from_single_file" in line
    assert "save_pretrained" in line


@all_scripts
def test_a_folder_that_has_only_a_variant_is_named(script, flags, tmp_path):
    folder, flags = changed_base(flags, script, tmp_path / "model")
    (file,) = (folder / FOLDER_WITHIN[script]).glob("*.safetensors")
    file.rename(file.with_suffix(".fp16.safetensors"))
    line = refusal(flags, script)
    assert line.startswith(str(folder) if script == FLAX else f"--{BASE[script]} {folder}: ")
    assert FOLDER_WITHIN[script] in line.removeprefix(str(folder))
    assert ("--variant" in line) == (script in (SD, SDXL, FLAX))  # the others have no such flag
    assert "fp16" in line


@pytest.mark.parametrize("script", [SD])
def test_a_sharded_variant_is_trained(script, flags, tmp_path):
    folder, flags = changed_base(flags, script, tmp_path / "model")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size=unet.get_memory_footprint() // 2)
    assert len(list((folder / "unet").glob("*.fp16-00*.safetensors"))) > 1
    assert refusal(flags, script).endswith("unet/ has only variant fp16; change --variant or leave it out")
    for path in (*folder.glob("vae/*.safetensors"), *folder.glob("text_encoder/*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    run({**flags, "variant": "fp16", "max_train_steps": 1}, script)


@pytest.mark.parametrize("script", [SD, FLAX])
def test_parts_that_are_named_and_not_there_are_left_out(script, flags, tmp_path):
    """Those that training does not need; the result loads without them."""
    folder, flags = changed_base(flags, script, tmp_path / "model")
    absent = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    edit(folder / "model_index.json", **absent, requires_safety_checker=True)
    run(flags, script)
    assert not (flags["output_dir"] / "logs").exists()  # --report_to none
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(flags["output_dir"])
    assert [getattr(pipeline, part) for part in absent] == [None] * 3


@all_scripts
def test_a_scheduler_of_flow_matching_is_refused(script, flags, tmp_path):
    folder, flags = changed_base(flags, script, tmp_path / "model")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    line = refusal(flags, script)
    assert line.startswith("FlowMatchEulerDiscreteScheduler: pipelines with this scheduler are not supported")


# Checkpoints ----------------------------------------------------------------------------------------------------------


@all_scripts
def test_a_checkpoint_of_the_diffusers_scripts_is_refused_as_such(script, flags, capsys):
    checkpoint = flags["output_dir"] / "checkpoint-500"
    checkpoint.mkdir(parents=True)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):  # as accelerate's save_state writes
        (checkpoint / name).touch()
    line = refusal({**flags, "resume_from_checkpoint": "checkpoint-500"}, script)
    assert line.startswith("--resume_from_checkpoint checkpoint-500: there is no complete checkpoint")
    warning = capsys.readouterr().err
    assert "checkpoint-500: not a complete checkpoint of this script" in warning
    assert "it is of diffusers' script: start from its weights" in warning


def test_a_checkpoint_of_the_pytorch_script_is_refused_as_such_in_jax(trained):
    flags = {**trained(SD), "resume_from_checkpoint": "latest"}
    line = refusal(flags, FLAX)
    checkpoint = flags["output_dir"] / "checkpoint-1"
    assert line == f"--resume_from_checkpoint {checkpoint}: was written by a PyTorch script"


@pytest.mark.parametrize("script", [SD, PRIOR])
def test_a_checkpoint_of_the_jax_script_is_refused_as_such_in_pytorch(script, flags, trained):
    checkpoint = trained(FLAX)["output_dir"] / "checkpoint-1"
    line = refusal({**flags, "resume_from_checkpoint": checkpoint}, script)
    assert line == f"--resume_from_checkpoint {checkpoint}: was written by the JAX script"


@all_scripts
def test_a_resume_with_no_update_left_says_so_and_saves_the_result(script, trained, tmp_path, capsys):
    before = trained(script)
    flags = {**before, "output_dir": tmp_path / "output", "resume_from_checkpoint": True}
    shutil.copytree(before["output_dir"] / "checkpoint-1", flags["output_dir"] / "checkpoint-1")
    capsys.readouterr()
    run(flags, script)
    said = capsys.readouterr().err
    assert "steps 1 to 1 (no update is left)" in said
    assert f"saved the result in {flags['output_dir']}; " in said
    one, two = (load_file(folder / TRAINED[script] / WEIGHTS) for folder in (before["output_dir"], flags["output_dir"]))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
