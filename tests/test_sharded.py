"""FSDP2 and DeepSpeed's ZeRO by accelerate's configuration files, on two CPU processes: the same as without them."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import ROOT, launch, run
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from train_text_to_image import RunError, configure_sharding, read_checkpoint

CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: 'no'
num_machines: 1
num_processes: 2
main_process_port: 0
"""
FSDP = """
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
"""
DEEPSPEED = """
deepspeed_config:
  zero_stage: {stage}
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
"""
CONFIGURATIONS = {
    "FSDP2": CONFIGURATION.format(kind="FSDP") + FSDP,
    "ZeRO-2": CONFIGURATION.format(kind="DEEPSPEED") + DEEPSPEED.format(stage=2),
    "ZeRO-3": CONFIGURATION.format(kind="DEEPSPEED") + DEEPSPEED.format(stage=3),
}


def launch_sharded(flags, folder, configuration):
    """Run the script in two processes as the text of a configuration file says, on CPUs."""
    file = folder / "accelerate.yaml"
    file.write_text(configuration)
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file))
    return launch(flags, (*launcher, str(ROOT / "tests" / "sharded_on_cpu.py")), DS_ACCELERATOR="cpu")


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
        "logging_steps": 1,
        "seed": 0,
    }


@pytest.fixture(scope="module")
def whole(common_flags, tmp_path_factory):
    """The output folder of two processes that each hold the whole model (DDP)."""
    folder = tmp_path_factory.mktemp("whole")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = launch({**common_flags, "output_dir": folder / "output"}, launcher, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    return folder / "output"


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def sharded(request, common_flags, tmp_path_factory):
    """(configuration, output folder) of two processes that each hold a part of the model or of its optimizer."""
    if request.param != "FSDP2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install deepspeed")
    folder = tmp_path_factory.mktemp("sharded")
    flags = {**common_flags, "output_dir": folder / "output", "offload_ema": True}
    result = launch_sharded(flags, folder, CONFIGURATIONS[request.param])
    assert result.returncode == 0, result.stderr
    return request.param, folder / "output"


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
    if (checkpoint / "optimizer_0").is_dir():
        dcp_to_torch_save(checkpoint / "optimizer_0", folder / "optimizer.pt")
        files = [folder / "optimizer.pt"]
    else:
        files = sorted(checkpoint.rglob("*optim_states.pt"))
    return {
        f"{file.name}{path}": tensor
        for file in files
        for path, tensor in tensors_in(torch.load(file, weights_only=False)).items()
    }


def test_sharded_training_is_the_same_as_without(whole, sharded):
    name, output = sharded
    for folder in WEIGHTS:
        assert largest_difference(weights_of(whole / folder), weights_of(output / folder)) < 1e-5, folder
    assert largest_difference(weights_of(output / "unet"), weights_of(output / "checkpoint-4" / "unet")) > 1e-5  # EMA
    for tag, tolerance in {"train_loss": 1e-5, "grad_norm": 1e-4, "lr": 0}.items():
        assert scalars_of(output, tag) == pytest.approx(scalars_of(whole, tag), rel=tolerance, abs=0), tag
    for picture in ("step-000003.png", "step-000004.png"):
        one, other = (np.asarray(Image.open(path / "validation" / picture), int) for path in (whole, output))
        assert np.abs(one - other).max() <= 1
    for file in ("model_index.json", "unet/config.json", "checkpoint-2/unet/config.json"):
        assert (output / file).read_text() == (whole / file).read_text()
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    assert largest_difference(pipeline.unet.state_dict(), weights_of(output / "unet")) == 0


def test_every_process_saves_its_part(sharded):
    name, output = sharded
    files = read_checkpoint(output / "checkpoint-2")["files"]
    parts = [
        file
        for file in files
        if ("optimizer_0" if name == "FSDP2" else "optim_states") in file and file.endswith(("distcp", "pt"))
    ]
    assert len(parts) == 2
    assert max(files[part] for part in parts) < 1.5 * min(files[part] for part in parts)


def test_sharded_training_resumes_to_the_last_bit(sharded, common_flags, tmp_path):
    name, output = sharded
    flags = {**common_flags, "output_dir": tmp_path / "output", "resume_from_checkpoint": output / "checkpoint-2"}
    result = launch_sharded(flags, tmp_path, CONFIGURATIONS[name])
    assert result.returncode == 0, result.stderr
    for folder in WEIGHTS[2:]:
        assert largest_difference(weights_of(output / folder), weights_of(tmp_path / "output" / folder)) == 0, folder
    one, other = (optimizer_of(path / "checkpoint-4", tmp_path) for path in (output, tmp_path / "output"))
    assert len(one) > 2
    assert largest_difference(one, other) == 0


def test_a_sharded_checkpoint_is_not_taken_for_another(sharded, common_flags, tmp_path):
    name, output = sharded
    kind = "FSDP" if name == "FSDP2" else "DEEPSPEED"
    with pytest.raises(RunError, match=f"of its run and this one, only one is with {kind}"):
        run({**common_flags, "output_dir": tmp_path / "output", "resume_from_checkpoint": output / "checkpoint-2"})
    assert not (tmp_path / "output").exists()


def test_what_does_not_work_is_refused():
    args = SimpleNamespace(compile=None)
    first_version = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(RunError, match="set fsdp_version: 2"):
        configure_sharding(first_version, args)
    mixed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, is_fsdp2=False, mixed_precision="bf16")
    with pytest.raises(RunError, match="DeepSpeed works here in full precision only"):
        configure_sharding(mixed, args)
