"""--shard_params with cuDNN's attention, by JAX's own rules for it: on four simulated devices, in bfloat16."""

import json
import os

import pytest
import tiny
from diffusers import UNet2DConditionModel
from test_flax_training import run_code

ON_FOUR_DEVICES = """
import json
import cudnn_on_cpu
import jax, optax
from conftest import run

cudnn_on_cpu.script.make_optimizer_transform = lambda args: optax.identity()  # compiles faster

def keep(state, *rest, **options):
    return state, dict.fromkeys(("train_loss", "grad_norm", "lr"), 1.0)

results = {{}}
for name, flags in {runs}.items():
    if name == "drawing":  # with weights that an update returns sharded, as all do
        cudnn_on_cpu.script.train_step = keep
    cudnn_on_cpu.splits.clear()
    try:
        run(flags, "train_text_to_image_flax")
    except jax.errors.JaxRuntimeError as error:
        results[name] = [str(error)[:1000], [list(map(list, split)) for split in cudnn_on_cpu.splits]]
print(json.dumps(results))
"""


def make_model(folder, version, heads, head_size):
    """A tiny pipeline but for its UNet: one level per number of `heads`, with attention in the lowest."""
    tiny.make_stable_diffusion(folder, version)
    UNet2DConditionModel(
        sample_size=tiny.RESOLUTION // 4,
        block_out_channels=tuple(head_size * number for number in heads),
        down_block_types=[*["DownBlock2D"] * (len(heads) - 1), "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", *["UpBlock2D"] * (len(heads) - 1)],
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=heads,
        use_linear_projection=version == 2,
    ).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def compiled(images_folder, tmp_path_factory):
    """{"training" and "drawing": [the error that ends compiling, the split axes of each attention]}.

    Training with the heads of SD 2.1's upper levels, which four devices cannot share evenly; drawing with SD 1.5's.
    """
    folder = tmp_path_factory.mktemp("sharding")
    flags = {"train_data_dir": images_folder, "resolution": 32, "train_batch_size": 1, "max_train_steps": 1, "seed": 0}
    flags |= {"mixed_precision": "bf16", "shard_params": True, "report_to": "none"}
    models = {"training": make_model(folder / "2", 2, (5, 10), 8), "drawing": make_model(folder / "1", 1, (8,), 8)}
    runs = {
        name: {**flags, "pretrained_model_name_or_path": model, "output_dir": folder / name}
        for name, model in models.items()
    }
    runs["drawing"]["validation_prompts"] = "red dots"
    runs = {run: {k: v if v is True else str(v) for k, v in flags.items()} for run, flags in runs.items()}
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    result = run_code(ON_FOUR_DEVICES.format(runs=runs), XLA_FLAGS=devices)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# Self-attention of 4 transformers, forward and backward; their attention to 77 tokens is XLA's.
@pytest.mark.parametrize(("what", "number"), [("training", 2 * 4), ("drawing", 4)])
def test_cudnn_s_attention_is_split_along_the_batch_alone(what, number, compiled):
    """Query, key and value alike: all gets past JAX's checks and XLA's, up to the call that only a GPU can compile."""
    error, splits = compiled[what]
    assert "No registered implementation" in error, error
    assert "cudnn" in error
    assert len(splits) >= number
    assert all(split == [["data", None, None, None]] * 3 for split in splits), splits
