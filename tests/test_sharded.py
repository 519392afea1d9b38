"""FSDP2 by accelerate's configuration file, on two CPU processes: the same as without it."""

import shutil

import accelerate.commands.launch
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, launch_two, reset_accelerate, run
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from train_text_to_image import RunError

CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
main_process_port: 0
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
"""


def launch_sharded(flags, folder):
    """Run the script in two processes with what `accelerate launch` tells them of the configuration file, on CPUs."""
    file = folder / "accelerate.yaml"
    file.write_text(CONFIGURATION)
    words = ["--config_file", str(file), "script"]
    args, _, _ = accelerate.commands.launch._validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(args)
    for result in launch_two(flags, before=[ROOT / "tests" / "sharded_on_cpu.py"], **environment):
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """Of two levels, with all blocks that the automatic policy of FSDP looks for."""
    folder = tmp_path_factory.mktemp("two_levels")
    tiny.make_stable_diffusion(folder)
    return folder


@pytest.fixture(scope="module")
def common_flags(pipeline_folder, images_folder):
    return {
        "pretrained_model_name_or_path": pipeline_folder,
        "train_data_dir": images_folder,
        "resolution": 32,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 0,
        "max_grad_norm": 0.5,
        "adam_epsilon": 1e-6,  # with the default, AdamW's first updates of gradients near 0 are their rounding errors
        "use_ema": True,
        "validation_prompts": ["red dots"],
        "validation_steps": 3,
        "validation_rows": 2,
        "logging_steps": 1,
        "seed": 0,
    }


@pytest.fixture(scope="module")
def whole(common_flags, tmp_path_factory):
    """The output folder of one process that makes the same updates."""
    output = tmp_path_factory.mktemp("whole") / "output"
    run({**common_flags, "train_batch_size": 2, "output_dir": output})
    reset_accelerate()
    return output


@pytest.fixture(scope="module")
def sharded(common_flags, tmp_path_factory):
    """The output folder of two processes that each hold a part of the model, of its optimizer and of its average."""
    folder = tmp_path_factory.mktemp("sharded")
    launch_sharded({**common_flags, "output_dir": folder / "output", "offload_ema": True}, folder)
    return folder / "output"


WEIGHTS = ["checkpoint-2/unet", "checkpoint-2/unet_ema", "checkpoint-4/unet", "checkpoint-4/unet_ema", "unet"]


def weights_of(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def scalars_of(output, tag):
    events = EventAccumulator(str(next(output.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def tensors_in(value, name=""):
    """All tensors in nested dicts and lists, {path: tensor}."""
    if torch.is_tensor(value):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {path: tensor for key, item in items for path, tensor in tensors_in(item, f"{name}/{key}").items()}


def optimizer_of(checkpoint, folder):
    """All tensors of the optimizer's state that the processes saved, {path: tensor}."""
    dcp_to_torch_save(checkpoint / "optimizer_0", folder / "optimizer.pt")
    return tensors_in(torch.load(folder / "optimizer.pt", weights_only=False))


def test_sharded_training_is_the_same_as_without(whole, sharded):
    output = sharded
    for folder in WEIGHTS:
        assert largest_difference(weights_of(whole / folder), weights_of(output / folder)) < 1e-5, folder
    assert largest_difference(weights_of(output / "unet"), weights_of(output / "checkpoint-4" / "unet")) > 1e-5  # EMA
    for tag, tolerance in {"train_loss": 1e-5, "validation_loss": 1e-5, "grad_norm": 1e-4, "lr": 0}.items():
        assert scalars_of(output, tag) == pytest.approx(scalars_of(whole, tag), rel=tolerance, abs=0), tag
    for picture in ("step-000003.png", "step-000004.png"):
        one, other = (np.asarray(Image.open(path / "validation" / picture), int) for path in (whole, output))
        assert np.abs(one - other).max() <= 1
    for file in ("model_index.json", "unet/config.json", "checkpoint-2/unet/config.json"):
        assert (output / file).read_text() == (whole / file).read_text()
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    assert largest_difference(pipeline.unet.state_dict(), weights_of(output / "unet")) == 0


def test_every_process_saves_its_part(sharded):
    parts = [path.stat().st_size for path in (sharded / "checkpoint-2" / "optimizer_0").glob("*.distcp")]
    assert len(parts) == 2
    assert max(parts) < 1.5 * min(parts)


def test_sharded_training_resumes_to_the_last_bit(sharded, common_flags, tmp_path):
    """The average is in main memory in one of the two runs, and with the model in the other."""
    shutil.copytree(sharded / "checkpoint-2", tmp_path / "output" / "checkpoint-2")
    flags = {**common_flags, "output_dir": tmp_path / "output", "resume_from_checkpoint": "latest"}
    launch_sharded(flags, tmp_path)
    for folder in WEIGHTS[2:]:
        assert largest_difference(weights_of(sharded / folder), weights_of(tmp_path / "output" / folder)) == 0, folder
    one, other = (optimizer_of(path / "checkpoint-4", tmp_path) for path in (sharded, tmp_path / "output"))
    assert len(one) > 2
    assert largest_difference(one, other) == 0


def test_a_sharded_checkpoint_is_not_taken_for_another(sharded, common_flags, tmp_path):
    checkpoint = shutil.copytree(sharded / "checkpoint-2", tmp_path / "output" / "checkpoint-2")
    with pytest.raises(RunError, match="checkpoint-2.*FSDP"):
        run({**common_flags, "output_dir": tmp_path / "output", "resume_from_checkpoint": "latest"})
    assert list((tmp_path / "output").iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("kind", "fsdp2", "message"),
    [("FSDP", False, "FSDP.*2"), ("DEEPSPEED", False, "FSDP.*2")],
)
def test_what_does_not_work_is_refused_in_a_line_that_names_what_does(
    kind, fsdp2, message, common_flags, tmp_path, monkeypatch
):
    """By what accelerate says that its configuration asks for."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    monkeypatch.setattr(Accelerator, "is_fsdp2", fsdp2)
    with pytest.raises(RunError, match=message) as error:
        run({**common_flags, "output_dir": tmp_path / "output"})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()
