"""The models of the Flax script against PyTorch's on the same weights, and all forms of weight files it takes.

An error is relative: the largest absolute difference, divided by the largest absolute value.
"""

import json
import os
import re
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from train_text_to_image_flax import (
    FIELDS,
    PARTS,
    RunError,
    attend,
    make_model,
    mean_and_deviation,
    read_config,
    read_weights,
    result_index,
    save_frozen_parts,
    save_model,
    save_result,
    to_checkpoint_layout,
    to_module_layout,
)

TORCH_CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FLAX_FILES = {
    "unet": "diffusion_flax_model.msgpack",
    "vae": "diffusion_flax_model.msgpack",
    "text_encoder": "flax_model.msgpack",
}

# XLA compiles twice as fast so, and what it compiles are the same operations.
FAST = {"xla_backend_optimization_level": 0}

SHARD_SIZES = {"unet": 50_000, "vae": 100_000, "text_encoder": 20_000}  # bytes

version_1 = pytest.mark.parametrize("pipeline", [1], indirect=True)
all_parts = pytest.mark.parametrize("part", PARTS)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def fill(model, seed=0, scale=1.0):
    """Set all weights at random, also the biases and norms, which `tiny.fill` leaves 0 and 1; cheap for large ones.

    With a `scale` of 0.01 the inputs of norms are so small that a wrong epsilon shows; the attention is flat then.
    """
    rng = np.random.default_rng(seed)
    pool = torch.from_numpy(rng.standard_normal(2**21 + 7, np.float32))  # 7: rows of a matrix are not all the same
    for name, parameter in model.named_parameters():
        repeats = -(-parameter.numel() // len(pool))
        values = pool.roll(int(rng.integers(len(pool)))).repeat(repeats)[: parameter.numel()].view(parameter.shape)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif parameter.ndim == 1:
            values = 0.1 * scale * values
        else:
            values = values * (scale / parameter[0].numel() ** 0.5)
        parameter.data.copy_(values)
    return model.eval()


def load(folder, variant=None):
    """The `Model` of a part's folder, and its weights."""
    model = make_model(PARTS[folder.name], read_config(folder))
    return model, read_weights(model, folder, variant)


def save_and_load(torch_model, folder, part):
    torch_model.save_pretrained(folder / part)
    return load(folder / part)


def call(model, weights, *inputs, method=None, **options):
    """Call the module of `model`, or a method of it, compiled."""

    def function(weights, *inputs):
        module = model.module(weights)
        return (getattr(module, method) if method else module)(*inputs, **options)

    return jax.jit(function, compiler_options=FAST)(weights, *inputs)


def channels_last(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.fixture(scope="module", params=[1, 2])
def pipeline(request, tmp_path_factory):
    """A tiny pipeline of SD 1.x or 2.x with biases and norms that are not trivial, and its folder."""
    folder = tmp_path_factory.mktemp(f"version_{request.param}")
    pipeline = tiny.make_stable_diffusion(folder, version=request.param)
    for part in PARTS:
        fill(getattr(pipeline, part), seed=request.param).save_pretrained(folder / part)
    return pipeline, folder


@pytest.fixture(scope="module")
def loaded(pipeline):
    return {part: load(pipeline[1] / part) for part in PARTS}


# Parity ---------------------------------------------------------------------------------------------------------------

INPUT_IDS = np.random.default_rng(0).integers(0, 500, (2, 77))


def text_encoder_error(torch_model, model, weights, input_ids=INPUT_IDS):
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(input_ids))[0]
    return relative_error(call(model, weights, input_ids), expected)


def vae_errors(torch_model, model, weights, height=32, width=32):
    """Errors of the mean, of the standard deviation and of the picture."""
    factor = 2 ** (len(torch_model.config.block_out_channels) - 1)
    pixels = normal(2, 3, height, width)
    latents = normal(2, torch_model.config.latent_channels, height // factor, width // factor)
    with torch.no_grad():
        posterior, decoded = torch_model.encode(pixels).latent_dist, torch_model.decode(latents).sample
    mean, deviation = mean_and_deviation(call(model, weights, channels_last(pixels), method="encode"))
    actual = call(model, weights, channels_last(latents), method="decode")
    pairs = (mean, posterior.mean), (deviation, posterior.std), (actual, decoded)
    return [relative_error(array, channels_last(tensor)) for array, tensor in pairs]


def unet_inputs(config, height=8, width=8, batch=2):
    timesteps, length = torch.tensor([3, 999])[:batch], 7
    return (
        normal(batch, config.in_channels, height, width),
        timesteps,
        normal(batch, length, config.cross_attention_dim),
    )


def for_jax(latents, timesteps, states):
    return channels_last(latents), timesteps.numpy().astype(np.int32), states.numpy()


def unet_error(torch_model, model, weights, height=8, width=8, batch=2):
    inputs = unet_inputs(torch_model.config, height, width, batch)
    with torch.no_grad():
        expected = channels_last(torch_model(*inputs).sample)
    return relative_error(call(model, weights, *for_jax(*inputs)), expected)


ERRORS = {"unet": unet_error, "vae": vae_errors, "text_encoder": text_encoder_error}


@all_parts
def test_tiny_models_are_pytorch_s(pipeline, loaded, part):
    assert np.max(ERRORS[part](getattr(pipeline[0], part), *loaded[part])) < 1e-5


@all_parts
def test_epsilons_are_pytorch_s(pipeline, part, tmp_path):
    torch_model = getattr(pipeline[0], part)
    torch_model = fill(type(torch_model)(torch_model.config) if part == "text_encoder" else
                       type(torch_model).from_config(torch_model.config), scale=0.01)  # fmt: skip
    assert np.max(ERRORS[part](torch_model, *save_and_load(torch_model, tmp_path, part))) < 1e-5


def test_text_encoder_is_causal(pipeline, loaded):
    changed = INPUT_IDS.copy()
    changed[:, 40:] += 1
    before, after = (np.asarray(call(*loaded["text_encoder"], ids)) for ids in (INPUT_IDS, changed))
    assert np.array_equal(before[:, :40], after[:, :40])
    assert not np.isclose(before[:, 40:], after[:, 40:]).all(-1).any()


CROSS_DOWN, DOWN, CROSS_UP, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
THREE_LEVELS = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP),
    "layers_per_block": 2,
    "attention_head_dim": (1, 2, 3),
    "norm_num_groups": 2,
    "use_linear_projection": True,
}
UPSIDE_DOWN = {
    "block_out_channels": (16, 8),
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "in_channels": 3,
    "out_channels": 5,
    "norm_eps": 1e-2,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


@pytest.mark.parametrize(
    ("config", "size"),
    [(THREE_LEVELS, (10, 14)), (UPSIDE_DOWN, (9, 9))],
    ids=["three levels", "upside down"],
)
def test_further_unets_are_pytorch_s(config, size, tmp_path):
    """On latents with odd sides at some level."""
    torch_model = fill(UNet2DConditionModel(**config, sample_size=8, cross_attention_dim=12))
    assert unet_error(torch_model, *save_and_load(torch_model, tmp_path, "unet"), *size) < 1e-5


@pytest.mark.parametrize(
    ("channels", "settings", "size"),
    [
        ((8,), {"layers_per_block": 1}, (6, 10)),
        ((12, 4), {"layers_per_block": 2, "latent_channels": 3, "norm_num_groups": 2}, (10, 14)),
        ((4, 8, 8, 16), {"layers_per_block": 2, "mid_block_add_attention": False}, (16, 40)),
    ],
)
def test_further_vaes_are_pytorch_s(channels, settings, size, tmp_path):
    down, up = ["DownEncoderBlock2D"] * len(channels), ["UpDecoderBlock2D"] * len(channels)
    settings = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up, **settings}
    torch_model = fill(AutoencoderKL(**{"norm_num_groups": 4, **settings}))
    assert max(vae_errors(torch_model, *save_and_load(torch_model, tmp_path, "vae"), *size)) < 1e-5


def test_log_variance_is_clipped(loaded, pipeline):
    model, weights = loaded["vae"]
    bias = weights["quant_conv.bias"].copy()
    bias[4:] = [1e3, -1e3, 0, 0]
    moments = call(model, {**weights, "quant_conv.bias": bias}, normal(1, 32, 32, 3).numpy(), method="encode")
    _, deviation = mean_and_deviation(moments)
    np.testing.assert_allclose(deviation[..., 0], np.exp(10), rtol=1e-6)
    np.testing.assert_allclose(deviation[..., 1], np.exp(-15), rtol=1e-6)


def test_attention_does_not_overflow_in_float16():
    """Products of queries and keys beyond 65504, which SD 2.1 has and says by `upcast_attention`."""
    query, key, value = (normal(1, 5, 128, seed=seed).numpy() for seed in (0, 1, 2))
    arrays = [array.astype(np.float16) for array in (200 * query, 200 * key, value)]
    assert np.abs(arrays[0].astype(np.float32) @ arrays[1].astype(np.float32)[0].T).max() > 2**16
    exact = attend(*(array.astype(np.float32) for array in arrays), heads=1)
    assert relative_error(attend(*arrays, heads=1), exact) < 2**-10  # the rounding of values to 11 bits


SD_1_5_BLOCKS = {
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
}


def move_weights(torch_model, model):
    """The weights of a PyTorch model for `model`, which are taken out of it one by one, as memory is short."""
    weights = {}
    for name, parameter in torch_model.named_parameters():
        name = name if name in model.paths else f"text_model.{name}"
        weights[name] = jnp.array(to_module_layout(model.paths[name], parameter.detach().numpy()))
        parameter.data = torch.empty(0)
    return weights


def sd_1_5_model(part):
    """PyTorch's model of SD 1.5's widths, with one layer per block; UNet: without making weights twice."""
    if part == "text_encoder":
        size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 12}
        return fill(CLIPTextModel(CLIPTextConfig(**size, vocab_size=1000)))
    with torch.device("meta"):
        if part == "unet":
            channels = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
            torch_model = UNet2DConditionModel(**channels, **SD_1_5_BLOCKS, attention_head_dim=8, layers_per_block=1)
        else:
            types = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
            torch_model = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=1, **types)
    return fill(torch_model.to_empty(device="cpu"))


@all_parts
def test_models_of_real_widths_are_pytorch_s(part, tmp_path):
    torch_model = sd_1_5_model(part)
    (torch_model.config.save_pretrained if part == "text_encoder" else torch_model.save_config)(tmp_path / part)
    model = make_model(PARTS[part], read_config(tmp_path / part))
    if part == "text_encoder":
        with torch.no_grad():
            expected = [torch_model(torch.from_numpy(INPUT_IDS))[0].numpy()]
        weights = move_weights(torch_model, model)
        actual = [call(model, weights, INPUT_IDS)]
    elif part == "vae":
        pixels, latents = normal(1, 3, 64, 64), normal(1, 4, 8, 8)
        with torch.no_grad():
            posterior, decoded = torch_model.encode(pixels).latent_dist, torch_model.decode(latents).sample
        expected = [channels_last(tensor) for tensor in (posterior.mean, posterior.std, decoded)]
        weights = move_weights(torch_model, model)
        actual = [*mean_and_deviation(call(model, weights, channels_last(pixels), method="encode"))]
        actual.append(call(model, weights, channels_last(latents), method="decode"))
    else:
        inputs = unet_inputs(torch_model.config, batch=1)
        with torch.no_grad():
            expected = [channels_last(torch_model(*inputs).sample)]
        actual = [call(model, move_weights(torch_model, model), *for_jax(*inputs))]
    for array, reference in zip(actual, expected, strict=True):
        assert relative_error(array, reference) < 1e-5


# Gradients ------------------------------------------------------------------------------------------------------------


def loss_of(model, rematerialise=False):
    """A function of (weights, latents, timesteps, states, target) to a mean squared error."""

    def loss(weights, *inputs):
        *inputs, target = inputs
        return jnp.mean((model.module(weights)(*inputs, rematerialise=rematerialise) - target) ** 2)

    return loss


@pytest.fixture(scope="module")
def gradients(pipeline, loaded):
    """PyTorch's loss and gradients in the module's layout, those of the Flax script, and what they were made from."""
    unet, (model, weights) = pipeline[0].unet, loaded["unet"]
    inputs = unet_inputs(unet.config)
    target = normal(*inputs[0].shape, seed=9)
    unet.zero_grad()
    loss = torch.nn.functional.mse_loss(unet(*inputs).sample, target)
    loss.backward()
    named = unet.named_parameters()
    expected = {name: to_module_layout(model.paths[name], parameter.grad.numpy()) for name, parameter in named}
    arrays = (*for_jax(*inputs), channels_last(target))
    loss_and_gradients = jax.jit(jax.value_and_grad(loss_of(model)), compiler_options=FAST)(weights, *arrays)
    return (loss.item(), expected), loss_and_gradients, arrays


def test_gradients_are_pytorch_s(gradients):
    """Tensor by tensor: no gradient is 0 by mathematics here, as there is no norm of single channels and no attention
    to a single token, which the first line makes sure of; AdamW divides each by its own size."""
    (loss, expected), (jax_loss, actual), _ = gradients
    assert min(np.abs(gradient).max() for gradient in expected.values()) > 1e-5
    assert actual.keys() == expected.keys()
    assert float(jax_loss) == pytest.approx(loss, rel=1e-5)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


@version_1
def test_rematerialisation_changes_no_number(gradients, loaded):
    """Beyond rounding, as XLA fuses other operations."""
    _, (loss, plain), arrays = gradients
    model, weights = loaded["unet"]
    again = jax.value_and_grad(loss_of(model, rematerialise=True))
    loss_again, again = jax.jit(again, compiler_options=FAST)(weights, *arrays)
    assert float(loss_again) == pytest.approx(float(loss), rel=1e-6)
    for name, gradient in plain.items():
        assert relative_error(again[name], gradient) < 1e-5, name


@version_1
def test_rematerialisation_keeps_less_and_computes_again(gradients, loaded):
    (model, weights), inputs = loaded["unet"], gradients[2]

    def kept(loss):
        """How many numbers the forward pass keeps for the gradient, beside the weights."""
        backward = jax.eval_shape(lambda weights: jax.vjp(lambda w: loss(w, *inputs), weights)[1], weights)
        return sum(array.size for array in jax.tree.leaves(backward)) - sum(array.size for array in weights.values())

    def convolutions(function):
        return str(jax.make_jaxpr(function)(weights, *inputs)).count("conv_general_dilated[")

    plain, again = loss_of(model), loss_of(model, rematerialise=True)
    assert kept(again) < 0.25 * kept(plain)
    # Not all are computed again: the gradient does not need what the last one of a block makes.
    assert convolutions(jax.grad(again)) > convolutions(jax.grad(plain)) + convolutions(plain) / 2


@version_1
@all_parts
def test_bfloat16(pipeline, loaded, part):
    """From weights in float32, cast as training does. Each of some 30 operations in a row rounds to 8 bits, that is by
    up to 2^-9, and the roundings of many channels are random: √30 · 2^-9 = 0.01, of the root of the mean square."""
    model, weights = loaded[part]
    half = {name: jnp.asarray(array, jnp.bfloat16) for name, array in weights.items()}
    if part == "text_encoder":
        pairs = [(call(model, half, INPUT_IDS), call(model, weights, INPUT_IDS))]
    elif part == "vae":
        pixels, latents = normal(2, 32, 32, 3).numpy(), normal(2, 8, 8, 4).numpy()
        encoded = [
            mean_and_deviation(call(model, half, pixels.astype(jnp.bfloat16), method="encode")),
            mean_and_deviation(call(model, weights, pixels, method="encode")),
        ]
        assert encoded[0][0].dtype == encoded[0][1].dtype == np.float32  # what noise and latents are made from
        decoded = [
            call(model, half, latents.astype(jnp.bfloat16), method="decode"),
            call(model, weights, latents, method="decode"),
        ]
        pairs = [*zip(*encoded, strict=True), decoded]
    else:
        latents, timesteps, states = for_jax(*unet_inputs(pipeline[0].unet.config))
        low = (latents.astype(jnp.bfloat16), timesteps, states.astype(jnp.bfloat16))
        pairs = [(call(model, half, *low), call(model, weights, latents, timesteps, states))]
    assert pairs[-1][0].dtype == jnp.bfloat16
    for low, full in pairs:
        error = np.asarray(low, np.float32) - full
        assert 0 < np.sqrt(np.mean(error**2) / np.mean(full**2)) < 0.02


# Configurations -------------------------------------------------------------------------------------------------------


@all_parts
def test_defaults_are_the_libraries_(part):
    """A field that config.json leaves out has the value that the library takes then."""
    with torch.device("meta"):
        config = CLIPTextConfig() if part == "text_encoder" else TORCH_CLASSES[part]().config
    for field, default in FIELDS[part].items():
        value = getattr(config, field)
        assert (list(value) if isinstance(value, tuple) else value) == default, field


CLIP_L = """{"_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
    "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
    "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408}"""
CLIP_H = """{"_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
    "eos_token_id": 2, "hidden_act": "gelu", "hidden_size": 1024, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 16, "num_hidden_layers": 23, "pad_token_id": 1,
    "projection_dim": 512, "torch_dtype": "float32", "transformers_version": "4.25.0.dev0", "vocab_size": 49408}"""
VAE_1_4 = """{"_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D",
    "DownEncoderBlock2D", "DownEncoderBlock2D"], "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D",
    "UpDecoderBlock2D", "UpDecoderBlock2D"]}"""
VAE_2 = VAE_1_4.replace('"_diffusers_version": "0.2.2"', '"_diffusers_version": "0.8.0", "norm_num_groups": 32')
UNET_1 = """{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false,
    "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D", "DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0,
    "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "sample_size": 64, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"""
UNET_2 = (
    UNET_1.replace('"attention_head_dim": 8', '"attention_head_dim": [5, 10, 20, 20]')
    .replace('"cross_attention_dim": 768', '"cross_attention_dim": 1024')
    .replace('"sample_size": 64', '"sample_size": 96, "dual_cross_attention": false, "only_cross_attention": false')
    .replace('"out_channels": 4', '"out_channels": 4, "num_class_embeds": null, "use_linear_projection": true')
)
UNET_2_1 = UNET_2.replace(
    '"act_fn": "silu"',
    '"act_fn": "silu", "class_embed_type": null, "mid_block_type": "UNetMidBlock2DCrossAttn", '
    '"resnet_time_scale_shift": "default", "time_cond_proj_dim": null, "timestep_post_act": null, '
    '"projection_class_embeddings_input_dim": null, "time_embedding_type": "positional", "upcast_attention": true',
)


@pytest.mark.parametrize(
    ("part", "config", "parameters"),
    [
        pytest.param("unet", UNET_1, 859_520_964, id="unet 1.x"),
        pytest.param("unet", UNET_2_1, 865_910_724, id="unet 2.1"),
        pytest.param("vae", VAE_1_4, 83_653_863, id="vae 1.x"),
        pytest.param("vae", VAE_2, 83_653_863, id="vae 2.x"),
        pytest.param("text_encoder", CLIP_L, 123_060_480, id="text encoder 1.x"),
        pytest.param("text_encoder", CLIP_H, 340_387_840, id="text encoder 2.x"),
    ],
)
def test_published_configurations(part, config, parameters, tmp_path):
    """Stable Diffusion 1.4 to 2.1 as they lie on the Hub: the number of parameters, and PyTorch's names and shapes."""
    folder = write_config(tmp_path / part, json.loads(config))
    model = make_model(PARTS[part], read_config(folder))
    assert sum(np.prod(shape) for shape in model.shapes.values()) == parameters
    with torch.device("meta"):
        if part == "text_encoder":
            expected = CLIPTextModel(CLIPTextConfig.from_pretrained(folder))
        else:
            expected = TORCH_CLASSES[part].from_config(TORCH_CLASSES[part].load_config(folder))
    expected = {with_prefix(part, name): tensor.shape for name, tensor in expected.state_dict().items()}
    shapes = {
        name: to_checkpoint_layout(model.paths[name], np.empty(shape)).shape for name, shape in model.shapes.items()
    }
    assert shapes == expected


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_prefix(part, name):
    """Names of the text encoder begin with text_model. in all releases but transformers 5."""
    return f"text_model.{name}" if part == "text_encoder" and not name.startswith("text_model.") else name


WRONG_FIELDS = [
    ("unet", "act_fn", "gelu"),
    ("unet", "class_embed_type", "timestep"),
    ("unet", "num_class_embeds", 1000),
    ("unet", "addition_embed_type", "text_time"),
    ("unet", "encoder_hid_dim", 1280),
    ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("unet", "mid_block_type", None),
    ("unet", "down_block_types", ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]),
    ("unet", "up_block_types", ["UpBlock2D", "ResnetUpsampleBlock2D"]),
    ("unet", "num_attention_heads", 8),
    ("unet", "transformer_layers_per_block", [1, 2]),
    ("unet", "only_cross_attention", [False, True]),
    ("unet", "dual_cross_attention", True),
    ("unet", "attention_type", "gated"),
    ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("vae", "shift_factor", 0.1),
    ("vae", "use_quant_conv", False),
    ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    ("text_encoder", "hidden_act", "relu"),
    ("text_encoder", "model_type", "t5"),
]


@pytest.mark.parametrize(("part", "field", "value"), WRONG_FIELDS)
def test_other_architectures_are_refused(part, field, value, pipeline_folder, tmp_path):
    config = json.loads((pipeline_folder / part / "config.json").read_text())
    folder = write_config(tmp_path / part, {**config, field: value})
    message = one_line(read_config, folder)
    assert str(folder / "config.json") in message
    assert f"{field} is {json.dumps(value)}" in message


def one_line(function, *arguments):
    """The message of the RunError that a call raises."""
    with pytest.raises(RunError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", '{"in_channels": }'])
def test_configuration_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "unet").mkdir()
    if content is not None:
        (tmp_path / "unet" / "config.json").write_text(content)
    assert str(tmp_path / "unet" / "config.json") in one_line(read_config, tmp_path / "unet")


# Weight files ---------------------------------------------------------------------------------------------------------


def same_bits(weights, others):
    """Whether two dicts of arrays are the same, bit for bit."""
    assert weights.keys() == others.keys()
    pairs = [(np.asarray(weights[name]), np.asarray(others[name])) for name in weights]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def published(torch_model, part):
    """A PyTorch model's weights by their names in most checkpoints, as NumPy arrays."""
    return {with_prefix(part, name): tensor.numpy() for name, tensor in torch_model.state_dict().items()}


def in_module_layout(model, arrays):
    return {name: to_module_layout(model.paths[name], array) for name, array in arrays.items()}


def copy_part(source, tmp_path):
    """A copy of a part's folder that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "copy" / source.name))


@all_parts
def test_written_weights_are_read_and_load_in_pytorch(pipeline, loaded, part, tmp_path):
    """Bit for bit what PyTorch wrote, and what came from it."""
    torch_model, (model, weights) = getattr(pipeline[0], part), loaded[part]
    original = published(torch_model, part)
    assert same_bits(in_module_layout(model, original), weights)
    folder = write_config(tmp_path / part, json.loads((pipeline[1] / part / "config.json").read_text()))
    save_model(Namespace(output_dir=folder.parent, save_flax_weights=False), folder, model, weights)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", f"{STEMS[part]}.safetensors"]
    assert same_bits(read_weights(model, folder, None), weights)
    written = {name: tensor.numpy() for name, tensor in load_file(folder / f"{STEMS[part]}.safetensors").items()}
    assert same_bits(written, original)
    again, report = TORCH_CLASSES[part].from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert same_bits(published(again, part), original)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [False, True])
@all_parts
def test_variants_and_shards(part, shards, variant, pipeline_folder, tmp_path):
    """Under the names that diffusers and transformers write."""
    torch_model = TORCH_CLASSES[part].from_pretrained(pipeline_folder / part)
    torch_model = torch_model.half() if variant else torch_model
    options = {"max_shard_size": SHARD_SIZES[part]} if shards else {}
    torch_model.save_pretrained(tmp_path / part, variant=variant, **options)
    names = sorted(path.name for path in (tmp_path / part).iterdir() if path.name != "config.json")
    dot = f".{variant}" if variant else ""
    if shards:
        assert len(names) > 2  # an index and several files
        assert f"{STEMS[part]}.safetensors.index{dot}.json" in names
        assert f"{STEMS[part]}{dot}-00001-of-{len(names) - 1:05}.safetensors" in names
    else:
        assert names == [f"{STEMS[part]}{dot}.safetensors"]
    model, weights = load(tmp_path / part, variant)
    assert same_bits(weights, in_module_layout(model, published(torch_model.float(), part)))


@all_parts
def test_plain_and_variant_lie_side_by_side(part, pipeline_folder, tmp_path):
    folder = copy_part(pipeline_folder / part, tmp_path)
    model, weights = load(folder)
    TORCH_CLASSES[part].from_pretrained(folder).half().save_pretrained(folder, variant="fp16")
    assert same_bits(read_weights(model, folder, None), weights)
    rounded = {name: array.astype(np.float16).astype(np.float32) for name, array in weights.items()}
    assert same_bits(read_weights(model, folder, "fp16"), rounded)


@all_parts
def test_bfloat16_files(part, pipeline_folder, tmp_path):
    torch_model = TORCH_CLASSES[part].from_pretrained(pipeline_folder / part).bfloat16()
    model, weights = save_and_load(torch_model, tmp_path, part)
    assert same_bits(weights, in_module_layout(model, published(torch_model.float(), part)))


def rewrite(folder, change):
    """Put `change` of its tensors in place of a part's safetensors file."""
    file = folder / f"{STEMS[folder.name]}.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("position_ids", [False, True])
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_names_of_text_encoders(prefix, position_ids, pipeline_folder, tmp_path):
    folder = copy_part(pipeline_folder / "text_encoder", tmp_path)
    model, weights = load(folder)

    def change(tensors):
        tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        buffer = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]} if position_ids else {}
        return {**tensors, **buffer}

    rewrite(folder, change)
    assert same_bits(read_weights(model, folder, None), weights)


def test_old_names_of_the_vae_s_attention(pipeline_folder, tmp_path):
    """Stable Diffusion 1.4 to 2.1 have them, and diffusers renames them too."""
    folder = copy_part(pipeline_folder / "vae", tmp_path)
    model, weights = load(folder)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def change(tensors):
        pattern = "|".join(map(re.escape, old))
        return {re.sub(pattern, lambda match: old[match[0]], name): tensor for name, tensor in tensors.items()}

    rewrite(folder, change)
    names = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert len([name for name in names if re.search("query|key|value|proj_attn", name)]) == 16
    assert same_bits(read_weights(model, folder, None), weights)
    torch_model = AutoencoderKL.from_pretrained(folder)
    assert same_bits(in_module_layout(model, published(torch_model, "vae")), weights)


def without_first(number):
    return lambda tensors: dict(sorted(tensors.items())[number:])


def test_missing_tensors_are_named(pipeline_folder, tmp_path):
    folder = copy_part(pipeline_folder / "unet", tmp_path)
    model, _ = load(folder)
    rewrite(folder, without_first(1))
    message = one_line(read_weights, model, folder, None)
    assert message.startswith(f"{folder}: 1 tensors are missing: conv_in.bias; ")
    rewrite(folder, without_first(4))
    message = one_line(read_weights, model, folder, None)
    assert "5 tensors are missing: conv_in.bias, conv_in.weight, conv_norm_out.bias, ...; " in message
    assert "conv_norm_out.weight" not in message


def test_unexpected_tensors_are_named(pipeline_folder, tmp_path):
    folder = copy_part(pipeline_folder / "vae", tmp_path)
    model, _ = load(folder)
    rewrite(folder, lambda tensors: {**tensors, **{f"more.{k}.weight": torch.zeros(2) for k in range(4)}})
    message = one_line(read_weights, model, folder, None)
    assert f"{folder}: 4 tensors are unexpected: more.0.weight, more.1.weight, more.2.weight, ...; " in message


@pytest.mark.parametrize("shape", [(536, 16), (16, 537)])
def test_a_wrong_shape_is_named(shape, pipeline_folder, tmp_path):
    folder = copy_part(pipeline_folder / "text_encoder", tmp_path)
    model, weights = load(folder)
    name = "text_model.embeddings.token_embedding.weight"
    assert weights[name].shape == (537, 16)

    def change(tensors):
        tensors = {with_prefix("text_encoder", name): tensor for name, tensor in tensors.items()}
        return {**tensors, name: torch.zeros(shape)}

    rewrite(folder, change)
    message = one_line(read_weights, model, folder, None)
    assert message == f"{folder}: {name} has shape {shape}, and config.json makes it (537, 16)"


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_a_file_cut_short_is_named(form, length, pipeline_folder, tmp_path):
    folder = copy_part(pipeline_folder / "vae", tmp_path)
    model, weights = load(folder)
    save_model(Namespace(output_dir=folder.parent, save_flax_weights=True), folder, model, weights)
    if form == "msgpack":
        (folder / f"{STEMS['vae']}.safetensors").unlink()
    file = folder / (FLAX_FILES["vae"] if form == "msgpack" else f"{STEMS['vae']}.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    assert f"{file}: cannot be read: " in one_line(read_weights, model, folder, None)


@all_parts
def test_weights_that_are_not_there(part, pipeline_folder, tmp_path):
    folder = copy_part(pipeline_folder / part, tmp_path)
    model, weights = load(folder)
    file = folder / f"{STEMS[part]}.safetensors"
    message = one_line(read_weights, model, folder, "fp16")
    assert message.startswith(f"{folder}: {STEMS[part]}.fp16.safetensors is missing, only {file.name}; ")
    file.rename(folder / f"{STEMS[part]}.fp16.safetensors")
    message = one_line(read_weights, model, folder, None)
    assert message.startswith(f"{folder}: {file.name} is missing, only {STEMS[part]}.fp16.safetensors; ")
    (folder / f"{STEMS[part]}.fp16.safetensors").rename(folder / f"{STEMS[part]}.bin")
    message = one_line(read_weights, model, folder, None)
    assert message.startswith(f"{folder}: {file.name} is missing")
    assert ".bin files are not loaded" in message


@all_parts
def test_a_missing_shard_is_named(part, pipeline_folder, tmp_path):
    torch_model = TORCH_CLASSES[part].from_pretrained(pipeline_folder / part)
    torch_model.save_pretrained(tmp_path / part, max_shard_size=SHARD_SIZES[part])
    shard = sorted((tmp_path / part).glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    model = make_model(PARTS[part], read_config(tmp_path / part))
    message = one_line(read_weights, model, tmp_path / part, None)
    assert message.startswith(f"{tmp_path / part}: {shard.name} is missing, only ")


# Flax's files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flax_pipeline(pipeline, tmp_path_factory):
    """What the script writes with --save_flax_weights, for a UNet that diffusers' Flax can make: its norms have 32
    groups whatever the configuration says. Returns PyTorch's pipeline and the folder."""
    source, output_dir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("flax")
    pipeline, folder = pipeline
    config = {**pipeline.unet.config, "block_out_channels": (32, 64), "norm_num_groups": 32}
    shutil.copytree(folder, source, dirs_exist_ok=True)
    fill(UNet2DConditionModel.from_config(config)).save_pretrained(source / "unet")
    parts = {part: load(source / part) for part in PARTS}
    args = Namespace(output_dir=str(output_dir), save_flax_weights=True, variant=None)
    models, weights = ({part: pair[k] for part, pair in parts.items()} for k in (0, 1))
    index = result_index(source, None)
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    save_frozen_parts(args, source, index, tokenizer, models, weights)
    save_result(args, source, source, index, models["unet"], weights["unet"], "epsilon")
    return StableDiffusionPipeline.from_pretrained(source), output_dir


def flax_tree(folder):
    return flax.serialization.msgpack_restore((folder / FLAX_FILES[folder.name]).read_bytes())


def shapes_of(tree):
    return jax.tree.map(lambda array: list(array.shape), tree)


def test_flax_names_and_shapes(flax_pipeline):
    """Against flax_layout.json, which is what diffusers_039.py writes for this fixture's folder of SD 1.x: the names
    and shapes that FlaxUNet2DConditionModel and FlaxAutoencoderKL of diffusers 0.39 and FlaxCLIPTextModel of
    transformers 4.57 initialise. In SD 2.x the projections are matrices."""
    torch_pipeline, folder = flax_pipeline
    expected = json.loads((ROOT / "tests" / "flax_layout.json").read_text())
    if torch_pipeline.unet.config.use_linear_projection:
        for block in expected["unet"].values():
            for name, attention in block.items():
                for projection in ("proj_in", "proj_out") if name.startswith("attentions") else ():
                    attention[projection]["kernel"] = attention[projection]["kernel"][2:]
    for part in PARTS:
        assert shapes_of(flax_tree(folder / part)) == expected[part], part


@pytest.mark.parametrize(
    ("part", "torch_name", "flax_name", "axes"),
    [
        ("unet", "down_blocks.0.resnets.0.conv1.weight", "down_blocks_0/resnets_0/conv1/kernel", (2, 3, 1, 0)),
        ("unet", "mid_block.attentions.0.norm.weight", "mid_block/attentions_0/norm/scale", (0,)),
        ("unet", "time_embedding.linear_2.weight", "time_embedding/linear_2/kernel", (1, 0)),
        (
            "unet",
            "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0.weight",
            "up_blocks_1/attentions_1/transformer_blocks_0/attn1/to_out_0/kernel",
            (1, 0),
        ),
        (
            "unet",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias",
            "mid_block/attentions_0/transformer_blocks_0/ff/net_0/proj/bias",
            (0,),
        ),
        *[
            (
                "vae",
                f"{half}.mid_block.attentions.0.{torch_name}.weight",
                f"{half}/mid_block/attentions_0/{flax_name}/kernel",
                (1, 0),
            )
            for half in ("encoder", "decoder")
            for torch_name, flax_name in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            )
        ],
        (
            "text_encoder",
            "text_model.embeddings.token_embedding.weight",
            "text_model/embeddings/token_embedding/embedding",
            (0, 1),
        ),
        (
            "text_encoder",
            "text_model.encoder.layers.1.self_attn.q_proj.weight",
            "text_model/encoder/layers/1/self_attn/q_proj/kernel",
            (1, 0),
        ),
    ],
)
def test_flax_values(flax_pipeline, part, torch_name, flax_name, axes):
    """Square matrices and tensors of one shape, which names and shapes alone do not tell apart."""
    torch_pipeline, folder = flax_pipeline
    leaf = flax_tree(folder / part)
    for key in flax_name.split("/"):
        leaf = leaf[key]
    expected = published(getattr(torch_pipeline, part), part)[torch_name].transpose(axes)
    assert same_bits({"": leaf}, {"": expected})


@all_parts
def test_flax_files_are_read(flax_pipeline, part, tmp_path):
    """Also by themselves, and in half precision as the flax and bf16 branches on the Hub hold them."""
    folder = copy_part(flax_pipeline[1] / part, tmp_path)
    model, weights = load(folder)
    (folder / f"{STEMS[part]}.safetensors").unlink()
    assert same_bits(read_weights(model, folder, None), weights)
    tree = flax_tree(folder)
    for dtype in (jnp.bfloat16, np.float16):
        low = jax.tree.map(lambda array, dtype=dtype: array.astype(dtype), tree)
        (folder / FLAX_FILES[part]).write_bytes(flax.serialization.msgpack_serialize(low))
        rounded = {name: array.astype(dtype).astype(np.float32) for name, array in weights.items()}
        assert same_bits(read_weights(model, folder, None), rounded)


def test_missing_and_unexpected_arrays_of_flax_are_named(flax_pipeline, tmp_path):
    folder = copy_part(flax_pipeline[1] / "unet", tmp_path)
    model, _ = load(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    tree = flax_tree(folder)
    bias = tree["conv_in"].pop("bias")
    (folder / FLAX_FILES["unet"]).write_bytes(flax.serialization.msgpack_serialize(tree))
    assert "1 tensors are missing: conv_in.bias; " in one_line(read_weights, model, folder, None)
    tree["conv_in"] |= {"bias": bias, "more": bias}
    (folder / FLAX_FILES["unet"]).write_bytes(flax.serialization.msgpack_serialize(tree))
    assert "1 tensors are unexpected: conv_in/more; " in one_line(read_weights, model, folder, None)


def test_the_pipeline_loads_in_pytorch(flax_pipeline):
    torch_pipeline, folder = flax_pipeline
    again = StableDiffusionPipeline.from_pretrained(folder)
    for part in PARTS:
        assert same_bits(published(getattr(again, part), part), published(getattr(torch_pipeline, part), part))


@pytest.mark.parametrize("pairs", ["lists", "strings"])
def test_the_vocabulary_of_a_base_that_has_only_tokenizer_json(pairs, pipeline_folder, tmp_path):
    """As transformers 5 saves it, with merges in either form: the older libraries find the files that they read."""
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    original = shutil.copytree(source / "tokenizer", tmp_path / "original")
    for name in ("vocab.json", "merges.txt"):
        (source / "tokenizer" / name).unlink()
    path = source / "tokenizer" / "tokenizer.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    merges = [merge if isinstance(merge, list) else merge.split() for merge in contents["model"]["merges"]]
    contents["model"]["merges"] = merges if pairs == "lists" else [" ".join(merge) for merge in merges]
    path.write_text(json.dumps(contents), encoding="utf-8")
    models, weights = zip(*(load(source / part) for part in PARTS), strict=True)
    models, weights = (dict(zip(PARTS, values, strict=True)) for values in (models, weights))
    args = Namespace(output_dir=str(tmp_path / "output"), save_flax_weights=False, variant=None)
    (tmp_path / "output").mkdir()
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    save_frozen_parts(args, source, result_index(source, None), tokenizer, models, weights)
    result = tmp_path / "output" / "tokenizer"
    vocabularies = [json.loads((folder / "vocab.json").read_text(encoding="utf-8")) for folder in (original, result)]
    assert vocabularies[0] == vocabularies[1]
    assert (original / "merges.txt").read_text(encoding="utf-8") == (result / "merges.txt").read_text(encoding="utf-8")
    (result / "tokenizer.json").unlink()
    captions = ["a picture of red dots", "Grün & 猫!"]
    ids = [
        CLIPTokenizer.from_pretrained(folder)(captions).input_ids for folder in (pipeline_folder / "tokenizer", result)
    ]
    assert ids[0] == ids[1]


@pytest.mark.skipif(
    "DIFFUSERS_039_PYTHON" not in os.environ,
    reason="DIFFUSERS_039_PYTHON does not name a Python with diffusers 0.39, transformers 4.57 and flax",
)
def test_flax_libraries_load_the_pipeline(flax_pipeline, tmp_path):
    """Names, bits and layouts: the models make what PyTorch's make of the same inputs."""
    torch_pipeline, folder = flax_pipeline
    latents, timesteps, states = unet_inputs(torch_pipeline.unet.config)
    inputs = {"latents": latents, "timesteps": timesteps, "states": states, "input_ids": INPUT_IDS}
    np.savez(tmp_path / "inputs.npz", **inputs)
    script, files = ROOT / "tests" / "diffusers_039.py", (tmp_path / "inputs.npz", tmp_path / "outputs.npz")
    command = [os.environ["DIFFUSERS_039_PYTHON"], script, folder, *files]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    outputs = np.load(tmp_path / "outputs.npz")

    wanted = json.loads((tmp_path / "outputs.json").read_text())
    trees = {part: flax_tree(folder / part) for part in PARTS}
    assert shapes_of(trees) == wanted
    if not torch_pipeline.unet.config.use_linear_projection:
        assert wanted == json.loads((ROOT / "tests" / "flax_layout.json").read_text())
    written = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]}
    assert same_bits({name: outputs[name] for name in written}, written)

    with torch.no_grad():
        expected_states = torch_pipeline.text_encoder(torch.from_numpy(INPUT_IDS))[0]
        pixels = torch_pipeline.vae.decode(latents).sample
        prediction = torch_pipeline.unet(latents, timesteps, states).sample
    assert relative_error(outputs["states"], expected_states) < 1e-5
    assert relative_error(outputs["pixels"], pixels) < 1e-5
    assert relative_error(outputs["prediction"], prediction) < 1e-2  # its GELU is the approximate one
    assert outputs["image"].size == 32 * 32 * 3
    assert np.isfinite(outputs["image"]).all()
