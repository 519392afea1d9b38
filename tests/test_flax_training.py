"""End to end in JAX on the tiny pipeline: what a run writes, logs and resumes from, on one device and on several."""

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import diffusers
import flax
import forks
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
import tiny
import torch
import transformers
from conftest import ROOT, command_line, launch, run
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from faults import jax_places, state_of_run
from hub import Hub
from safetensors.torch import load_file
from test_checkpoints import names_in
from test_hub import files_below
from test_training import assert_wandb_has_everything, events_of, everything_written_below, losses_of, picture, unet_of

import train_text_to_image
import train_text_to_image_flax as script

SCRIPT = "train_text_to_image_flax"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PYTHONPATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def train(flags):
    run(flags, SCRIPT)


def run_code(code, **environment):
    """Run Python code in a process of its own that finds the scripts and the tests' helpers."""
    return forks.run(["-c", code], {**os.environ, **PYTHONPATH, **environment})


def run_code_afresh(code, **environment):
    """In one that has imported nothing."""
    environment = {**os.environ, **PYTHONPATH, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


def load_models(folder):
    """The models of a pipeline's folder and their weights, as the script loads them."""
    args = script.parse_args(["--pretrained_model_name_or_path", str(folder), "--generate", "a picture"])
    *_, models, weights = script.load_pipeline(args)
    return models, weights


def state_of(checkpoint):
    """Every weight, averaged weight and optimizer moment in a checkpoint of one device, {name: array}."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(checkpoint / "train_state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_state(one, other):
    """Not a bit differs between two checkpoints."""
    one, other = state_of(one), state_of(other)
    assert one.keys() == other.keys()
    assert len(one) > 200
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def with_checkpoint(checkpoint, output_dir):
    """Flags that go on from a copy of a checkpoint, as if the run had been stopped there."""
    shutil.copytree(checkpoint, output_dir / checkpoint.name)
    return {"output_dir": output_dir, "resume_from_checkpoint": True}


def after_step(monkeypatch, function):
    """Call function(step) behind every update of the runs that follow."""
    add = script.UpdateLog.add

    def recorded(self, step, *rest):
        add(self, step, *rest)
        function(step)

    monkeypatch.setattr(script.UpdateLog, "add", recorded)


@pytest.fixture(scope="module")
def whole(pipeline_folder, caption_lists_folder, tmp_path_factory):
    """A run of 12 updates with nearly everything on, which many tests look at: its flags, output_dir and `compiled`.

    36 examples in its first 6 updates, of 8 images: they end in the middle of an epoch. compiled: the names of what JAX
    compiled, and the numbers of the updates in between.
    """
    flags = {"pretrained_model_name_or_path": pipeline_folder, "train_data_dir": caption_lists_folder}
    flags |= {"resolution": 32, "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 12}
    flags |= {"learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 3, "use_ema": True, "seed": 0}
    flags |= {"random_flip": True, "proportion_empty_prompts": 0.2, "noise_offset": 0.1, "checkpointing_steps": 6}
    flags |= {"validation_prompts": ["red dots", "red dots"], "validation_steps": 5, "logging_steps": 4}
    flags |= {"output_dir": tmp_path_factory.mktemp("whole") / "output"}
    compiled, handler = [], logging.Handler()
    handler.emit = lambda record: compiled.extend(re.findall(r"^Compiling jit\((.*?)\) ", record.getMessage()))
    logging.getLogger("jax").addHandler(handler)
    with pytest.MonkeyPatch.context() as monkeypatch, jax.log_compiles():
        after_step(monkeypatch, compiled.append)
        train(flags)
    logging.getLogger("jax").removeHandler(handler)
    return SimpleNamespace(flags=flags, output=flags["output_dir"], compiled=compiled)


# The result -----------------------------------------------------------------------------------------------------------


def test_the_result_is_a_pipeline_that_draws_in_pytorch(whole, pipeline_folder):
    assert np.asarray(picture(whole.output)).shape == (32, 32, 3)
    trained, before = unet_of(whole.output), unet_of(pipeline_folder)
    assert trained.keys() == before.keys()
    assert not any(torch.equal(trained[name], before[name]) for name in trained if "weight" in name)
    for file in (f"vae/{WEIGHTS}", "text_encoder/model.safetensors"):  # frozen: the very same
        files = (load_file(folder / file) for folder in (whole.output, pipeline_folder))
        one, two = ({name.removeprefix("text_model."): tensors[name] for name in tensors} for tensors in files)
        assert same_tensors(one, two)  # newer releases leave the prefix out
    assert files_below(whole.output / "tokenizer") == files_below(pipeline_folder / "tokenizer")
    scheduler, source = (
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        for folder in (whole.output, pipeline_folder)
    )
    assert scheduler == source
    assert not list(whole.output.rglob("*.bin"))


def test_the_model_card_is_true(whole):
    from huggingface_hub import ModelCard

    card = ModelCard.load(whole.output / "README.md")
    assert card.data.base_model is None  # a local folder, which is nothing to the Hub
    assert re.search("The UNet of `.*`, fine-tuned on `.*` for 12 updates", card.text)
    assert re.findall(r"\]\(([^)]*)\)", card.text) == ["validation/step-000012.png"]
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert f'StableDiffusionPipeline.from_pretrained("{whole.output}")' in code
    compile(code, "card", "exec")
    prompts, recorded = map(json.loads, re.findall(r"```json\n(.*?)```", card.text, re.DOTALL))
    assert prompts == ["red dots", "red dots"]
    assert (recorded["max_train_steps"], recorded["lr_scheduler"], recorded["use_ema"]) == (12, "cosine", True)


def test_stable_diffusion_2_with_v_prediction(flags, tmp_path):
    tiny.make_stable_diffusion(tmp_path / "sd2", version=2, prediction_type="v_prediction", levels=1)
    flags |= {"pretrained_model_name_or_path": tmp_path / "sd2", "snr_gamma": 5.0, "dream_training": True}
    train({**flags, "max_train_steps": 1, "input_perturbation": 0.1, "scale_lr": True})
    scheduler = json.loads((flags["output_dir"] / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    picture(flags["output_dir"])
    events = events_of(flags["output_dir"])
    assert np.isfinite(events.Scalars("train_loss")[0].value)
    assert events.Scalars("lr")[0].value == pytest.approx(1e-4 * 2)  # --scale_lr: times batch size and devices


def add_safety_checker(folder, **options):
    """Give a pipeline's folder a tiny safety checker."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    config = transformers.CLIPConfig(text_config=size, vision_config=vision, projection_dim=8)
    diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker(config).save_pretrained(
        folder / "safety_checker", **options
    )
    index = json.loads((folder / "model_index.json").read_text())
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def test_weights_of_a_variant_alone_and_a_safety_checker_of_it(flags, tmp_path):
    folder = tmp_path / "half"
    pipeline = tiny.make_stable_diffusion(folder, levels=1).to(torch.float16)
    shutil.rmtree(folder)
    pipeline.save_pretrained(folder, variant="fp16")
    add_safety_checker(folder, variant="fp16")
    train({**flags, "pretrained_model_name_or_path": folder, "variant": "fp16", "max_train_steps": 1})
    result = diffusers.StableDiffusionPipeline.from_pretrained(flags["output_dir"])
    assert result.safety_checker is not None
    assert result.unet.dtype == torch.float32
    assert torch.equal(result.vae.encoder.conv_in.weight, pipeline.vae.encoder.conv_in.weight.float())


def test_from_a_folder_of_flax_to_one_that_pytorch_loads(flags, pipeline_folder, tmp_path):
    """As FlaxStableDiffusionPipeline wrote them: only .msgpack, Flax's class names, a checker that only Flax loads."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "of_flax")
    models, weights = load_models(folder)
    args = SimpleNamespace(output_dir=folder, save_flax_weights=True)
    for part, model in models.items():
        script.save_model(args, folder / part, model, weights[part])
        config = json.loads((folder / part / "config.json").read_text())
        names = {name: f"Flax{config[name]}" for name in ("_class_name",) if name in config}
        (folder / part / "config.json").write_text(json.dumps(config | names))
    add_safety_checker(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    (folder / "safety_checker" / "flax_model.msgpack").touch()
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("unet", "vae", "text_encoder", "scheduler", "safety_checker"):
        index[part][1] = f"Flax{index[part][1]}"
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FlaxStableDiffusionPipeline"}))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FlaxPNDMScheduler"}))
    train({**flags, "pretrained_model_name_or_path": folder, "max_train_steps": 1, "save_flax_weights": True})
    assert np.asarray(picture(flags["output_dir"])).shape == (32, 32, 3)
    written = b"".join(path.read_bytes() for path in flags["output_dir"].glob("**/*.json"))
    assert b'"Flax' not in written
    assert len(list(flags["output_dir"].glob("*/*.msgpack"))) == 3


def test_the_result_samples_by_the_prediction_type_it_was_trained_on(whole, tmp_path):
    flags = {**whole.flags, **with_checkpoint(whole.output / "checkpoint-12", tmp_path), "validation_prompts": None}
    train({**flags, "prediction_type": "sample"})
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["_class_name"]) == ("sample", "PNDMScheduler")


# What is computed -----------------------------------------------------------------------------------------------------


def test_accumulation_is_the_same_as_a_large_batch(whole, tmp_path):
    """2 x 3 and 1 x 6 are the same examples: equal but for the order of float sums, which updates pass on."""
    changes = {"train_batch_size": 6, "gradient_accumulation_steps": 1, "checkpointing_steps": 100}
    train({**whole.flags, **changes, "validation_prompts": None, "output_dir": tmp_path})
    one, two = np.array(losses_of(whole.output)), np.array(losses_of(tmp_path))
    print("accumulation:", np.abs(one / two - 1).max())
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_gradient_checkpointing_changes_the_loss_by_no_more_than_rounding(flags, tmp_path):
    train({**flags, "output_dir": tmp_path / "plain"})
    train({**flags, "output_dir": tmp_path / "recomputed", "gradient_checkpointing": True})
    np.testing.assert_allclose(losses_of(tmp_path / "plain"), losses_of(tmp_path / "recomputed"), rtol=1e-6)


def test_gradient_checkpointing_recomputes_every_block(pipeline_folder):
    models, weights = load_models(pipeline_folder)

    def predict(rematerialise, x, context):
        return models["unet"].module(weights["unet"])(x, jnp.zeros(1), context, rematerialise)

    for rematerialise, number in ((True, 3), (False, 0)):  # one level down, the bottom, one level up
        function = functools.partial(predict, rematerialise)
        jaxpr = jax.make_jaxpr(function)(jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 77, 16)))
        names = [equation.primitive.name for equation in jaxpr.eqns]
        assert names.count("remat2") + names.count("checkpoint") == number


def test_nothing_is_compiled_twice(whole):
    """One program for the updates and one for the drawings, whatever else happens in between."""
    assert whole.compiled.count("train_step") == 1
    assert whole.compiled.count("sample") == 1
    steady = whole.compiled[whole.compiled.index(5) + 1 :]  # behind the first drawing is the second update to draw at
    between = steady[steady.index(6) : steady.index(12)]
    assert between == list(range(6, 12))


def arguments(**changes):
    settings = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "adam_weight_decay": 0.1,
        "mixed_precision": "no",
    }
    return SimpleNamespace(**settings, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, **changes)


KEPT = {"use_ema": True, "mixed_precision": "no"}  # of a state of training


def linear_loss(params, frozen, batch, key):
    """Its gradient is the batch."""
    return sum((params[name] * batch[name]).sum() for name in params)


def small_step(state, batches, step, transform):
    """batches: of two micro-steps, as arrays (2, ...)."""
    batches = [{name: array[k] for name, array in batches.items()} for k in range(2)]
    return script.train_step(state, None, batches, None, step, 0.01 / step, linear_loss, transform, arguments())


def test_updates_are_those_of_adamw_in_pytorch():
    """With clipping where the norm is above 1, below which the gradient is left as it is, and a rate that falls."""
    rng = np.random.default_rng(0)
    start = {"a": rng.standard_normal((3, 4), np.float32), "b": rng.standard_normal(5, np.float32)}
    transform = script.make_optimizer_transform(arguments())
    state = script.initial_train_state(jax.tree.map(jnp.asarray, start), transform, KEPT)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    average = start
    for step, size in enumerate((3.0, 0.01, 1.0, 0.1, 10.0), 1):
        batches = {name: size * rng.standard_normal((2, *value.shape), np.float32) for name, value in start.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(batches[name].mean(0))
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.01 / step
        optimizer.step()
        state, metrics = small_step(state, batches, step, transform)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
        assert float(metrics["lr"]) == pytest.approx(0.01 / step)
        decay = step / (step + 9) if step > 1 else 0
        average = {name: decay * average[name] + (1 - decay) * theirs[name].detach().numpy() for name in start}
        for name in start:
            np.testing.assert_allclose(state["params"][name], theirs[name].detach().numpy(), rtol=1e-5)
            np.testing.assert_allclose(state["ema"][name], average[name], rtol=1e-5)


def test_the_decay_of_the_average_is_that_of_diffusers():
    """An average of 1 of weights that stay 0 is its own decay."""
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.9999)
    transform, zeros = script.make_optimizer_transform(arguments()), {"a": np.zeros((2, 1), np.float32)}
    update = jax.jit(functools.partial(small_step, transform=transform))
    for step in (*range(1, 30), 1000, 10**5, 10**6):
        state = script.initial_train_state({"a": jnp.zeros(1)}, transform, KEPT)
        state, _ = update({**state, "ema": {"a": jnp.ones(1)}}, zeros, step)
        assert float(state["ema"]["a"][0]) == pytest.approx(theirs.get_decay(step), abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 3, 500])
@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_schedules_are_those_of_diffusers(name, warmup):
    """Over 20 updates, and what holds after them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    ours = script.make_schedule(SimpleNamespace(lr_scheduler=name, lr_warmup_steps=warmup), 1e-3, 20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    rates = [float(ours(np.int32(count))) for count in range(20)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-10)  # float32, of which 1 - cos is taken


# Half precision -------------------------------------------------------------------------------------------------------


def test_an_update_whose_gradient_overflows_is_left_out():
    transform = script.make_optimizer_transform(arguments())
    state = script.initial_train_state({"a": jnp.arange(3.0)}, transform, {"use_ema": False, "mixed_precision": "fp16"})
    good = {"a": np.ones((2, 3), np.float32)}
    before, metrics = small_step(state, good, 1, transform)
    assert metrics["loss_scale"] == 2**16
    assert before["loss_scale"] == {"scale": 2**16, "finite_steps": 1}
    np.testing.assert_allclose(metrics["train_loss"], 3)
    after, metrics = small_step(before, {"a": np.float32([[1, 1, 1], [1, np.inf, 1]])}, 2, transform)
    assert not np.isfinite(metrics["grad_norm"])
    assert after["loss_scale"] == {"scale": 2**15, "finite_steps": 0}
    for name in ("params", "optimizer"):
        assert jax.tree.all(jax.tree.map(np.array_equal, before[name], after[name]))
    again, _ = small_step(after, good, 3, transform)
    assert not np.array_equal(again["params"]["a"], after["params"]["a"])


def test_the_loss_scale_doubles_after_2000_finite_updates_and_stays_above_1():
    state = {"scale": jnp.float32(8), "finite_steps": jnp.int32(0)}
    step = jax.jit(script.next_loss_scale)
    scales = []
    for _ in range(4001):
        state = step(**state, finite=True)
        scales.append(float(state["scale"]))
    assert scales == [8.0] * 1999 + [16.0] * 2000 + [32.0] * 2
    for _ in range(10):
        state = step(**state, finite=False)
    assert state == {"scale": 1, "finite_steps": 0}


def test_fp16_resumes_to_the_bit_and_goes_on_in_bf16_and_back(flags, tmp_path, monkeypatch):
    """The loss scale of fp16, around float32: on a CPU, JAX has no products of float16 matrices."""
    monkeypatch.setattr(script, "compute_type", lambda args: script.COMPUTE_TYPES[args.mixed_precision])
    monkeypatch.setitem(script.COMPUTE_TYPES, "fp16", jnp.float32)
    flags |= {"mixed_precision": "fp16", "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-3}
    train(flags)
    output, halves = flags["output_dir"], tmp_path / "halves"
    train({**flags, **with_checkpoint(output / "checkpoint-2", halves)})
    assert_same_state(output / "checkpoint-4", halves / "checkpoint-4")
    assert "['loss_scale']['scale']" in state_of(halves / "checkpoint-4")
    flags |= {"output_dir": halves, "resume_from_checkpoint": True}
    train({**flags, "mixed_precision": "bf16", "max_train_steps": 6})
    assert not any("loss_scale" in name for name in state_of(halves / "checkpoint-6"))
    assert all(
        value.dtype == np.float32 for name, value in state_of(halves / "checkpoint-6").items() if "ount" not in name
    )
    assert all(value.dtype == torch.float32 for value in unet_of(halves).values())
    train({**flags, "max_train_steps": 7})
    losses, scales = (
        {e.step: e.value for e in events_of(halves).Scalars(name)} for name in ("train_loss", "loss_scale")
    )
    assert sorted(losses) == [3, 4, 5, 6, 7]
    assert np.isfinite(list(losses.values())).all()
    assert sorted(scales) == [3, 4, 7]
    assert scales[7] == 2**16


def test_what_the_flags_say_is_what_is_computed(pipeline_folder):
    """Of the whole loss: in bf16 every product is, and with gradient checkpointing the blocks are computed again."""
    models, weights = load_models(pipeline_folder)

    def primitives(*words):
        args = script.parse_args(["--pretrained_model_name_or_path=a", "--train_data_dir=b", *words])
        dtype = script.COMPUTE_TYPES[args.mixed_precision]
        frozen = {part: jax.tree.map(lambda x: jnp.asarray(x, dtype), weights[part]) for part in weights}
        noise = script.draw_noise(jnp.zeros((1, 2), jnp.uint32), jax.random.key(0), (8, 8, 4), 1000)
        batch = {"pixel_values": jnp.zeros((1, 32, 32, 3), jnp.uint8), "input_ids": jnp.zeros((1, 77), int), **noise}
        rest = (models, jnp.linspace(0.99, 0.01, 1000), "epsilon", args)
        jaxpr = jax.make_jaxpr(lambda params: script.training_losses(params, frozen, batch, *rest).mean())(
            weights["unet"]
        )
        return list(every_equation(jaxpr.jaxpr))

    def types_of_convolutions(equations):
        return {str(e.invars[0].aval.dtype) for e in equations if e.primitive.name == "conv_general_dilated"}

    plain, changed = primitives(), primitives("--mixed_precision=bf16", "--gradient_checkpointing")
    assert types_of_convolutions(plain) == {"float32"}
    assert types_of_convolutions(changed) == {"bfloat16"}
    assert [sum(e.primitive.name in ("remat2", "checkpoint") for e in found) for found in (plain, changed)] == [0, 3]


def every_equation(jaxpr):
    """The equations of a jaxpr, and of those within them."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from every_equation(part)


def test_epochs_become_updates_and_the_seed_reaches_the_noise(flags, tmp_path):
    """One image, cropped in the middle: only the noise tells two seeds apart."""
    folder = tiny.make_images(tmp_path / "one", number=1)
    flags |= {"train_data_dir": folder, "center_crop": True, "max_train_steps": None, "num_train_epochs": 3}
    losses = []
    for seed in (0, 1):
        output = tmp_path / str(seed)
        train({**flags, "seed": seed, "output_dir": output})
        losses.append(losses_of(output))
    assert [len(part) for part in losses] == [2, 2]  # 3 examples in batches of 2
    assert losses[0][0] != losses[1][0]


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(whole, tmp_path, workers):
    """6 updates in a fresh process, with data workers and no drawing: not a bit differs from the run of 12."""
    flags = {**whole.flags, **with_checkpoint(whole.output / "checkpoint-6", tmp_path)}
    result = launch({**flags, "dataloader_num_workers": workers, "validation_prompts": None}, script=SCRIPT)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stderr
    assert_same_state(whole.output / "checkpoint-12", tmp_path / "checkpoint-12")
    assert same_tensors(unet_of(whole.output), unet_of(tmp_path))
    assert losses_of(whole.output)[6:] == losses_of(tmp_path)
    one, two = state_of(whole.output / "checkpoint-6"), state_of(tmp_path / "checkpoint-12")
    assert not np.array_equal(one["['ema']['conv_in.weight']"], two["['ema']['conv_in.weight']"])


@pytest.mark.parametrize("max_train_steps", [12, 7])
def test_resume_at_or_past_the_last_step_only_saves_the_result(whole, tmp_path, max_train_steps):
    flags = {**whole.flags, **with_checkpoint(whole.output / "checkpoint-12", tmp_path)}
    train({**flags, "max_train_steps": max_train_steps})
    assert same_tensors(unet_of(whole.output), unet_of(tmp_path))
    assert names_in(tmp_path) == ["checkpoint-12"]
    (grid,) = (tmp_path / "validation").iterdir()  # of the same weights from the same noise: the same picture
    assert grid.read_bytes() == (whole.output / "validation" / "step-000012.png").read_bytes()


def test_resume_without_the_average(whole, tmp_path):
    flags = {**whole.flags, **with_checkpoint(whole.output / "checkpoint-12", tmp_path), "validation_prompts": None}
    train({**flags, "use_ema": False})
    state, result = state_of(tmp_path / "checkpoint-12"), unet_of(tmp_path)
    name = "time_embedding.linear_1.weight"
    assert np.array_equal(state[f"['params']['{name}']"].T, result[name])
    assert not np.array_equal(state[f"['ema']['{name}']"].T, result[name])


def test_resume_from_an_earlier_checkpoint_and_what_is_refused(flags, capsys):
    """Checkpoints are pruned, what a crash left is removed, and later ones are set aside, not lost."""
    flags |= {"checkpointing_steps": 1, "max_train_steps": 3, "checkpoints_total_limit": 2}
    output = flags["output_dir"]
    for remains in ("checkpoint-7.orbax-checkpoint-tmp", "checkpoint-8.partial"):
        (output / remains).mkdir(parents=True)
    train(flags)
    assert names_in(output) == ["checkpoint-2", "checkpoint-3"]
    assert "holds an earlier run; --resume_from_checkpoint or another folder" in refusal(flags)
    train({**flags, "resume_from_checkpoint": "checkpoint-2"})
    (aside,) = output.glob("set-aside-*")
    assert aside.name.endswith("-checkpoint-3")
    assert_same_state(aside, output / "checkpoint-3")
    assert names_in(output) == ["checkpoint-2", "checkpoint-3"]
    assert "is later than the checkpoint to resume from" in capsys.readouterr().err
    flags |= {"resume_from_checkpoint": True, "max_train_steps": 4}
    line = refusal({**flags, "use_ema": True})
    assert line == f"{output / 'checkpoint-3'}: cannot resume with --use_ema True (was False)"


def refusal(flags):
    """The line that a run ends with."""
    with pytest.raises(script.RunError) as error:
        train(flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_damaged_checkpoint_is_refused_by_name(whole, tmp_path, capsys):
    flags = {**whole.flags, **with_checkpoint(whole.output / "checkpoint-12", tmp_path)}
    flags["resume_from_checkpoint"] = "checkpoint-12"
    checkpoint = tmp_path / "checkpoint-12"
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    for damage in (lambda: largest.write_bytes(content[:-1]), largest.unlink):
        damage()
        assert "checkpoint-12" in refusal(flags)
        assert str(largest.relative_to(checkpoint)) in capsys.readouterr().err
    largest.write_bytes(bytes(len(content)))
    assert refusal(flags).startswith(f"{checkpoint}: the checkpoint is damaged or of another model: ")
    assert not (tmp_path / "unet").exists()


def on_flush(monkeypatch, part, function):
    """Call function() at each flush of a file or folder whose path holds `part` (str)."""
    fsync = os.fsync

    def observed(descriptor):
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            function()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", observed)


def full_disk():
    raise OSError(28, "No space left on device")


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@needs_proc
def test_a_failed_save_leaves_the_older_checkpoints_alone(flags, monkeypatch):
    """The disk is full when the second checkpoint is flushed: the first still stands, and only the first."""
    on_flush(monkeypatch, "checkpoint-2.", full_disk)
    line = refusal({**flags, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_train_steps": 3})
    assert line.startswith(f"{flags['output_dir'] / 'checkpoint-2'} cannot be written: ")
    assert "No space left on device" in line
    assert [step for step, _ in script.list_checkpoints(flags["output_dir"])] == [1]
    assert script.read_checkpoint(flags["output_dir"] / "checkpoint-1")["step"] == 1


@needs_proc
def test_training_goes_on_while_a_checkpoint_is_written(flags, monkeypatch):
    """The writing of the first checkpoint waits for the update behind it; if that waited too, neither would come."""
    go_on, waited = threading.Event(), []
    on_flush(monkeypatch, "checkpoint-1.", lambda: waited.append(go_on.wait(timeout=60)))
    after_step(monkeypatch, lambda step: go_on.set() if step == 2 else None)
    train({**flags, "checkpointing_steps": 1, "checkpoints_total_limit": 1})
    assert len(waited) > 1
    assert all(waited)
    assert [step for step, _ in script.list_checkpoints(flags["output_dir"])] == [2]


# Several devices ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_device(pipeline_folder, images_folder, tmp_path_factory):
    """The flags of a run of 4 updates of 4 images, at a rate at which weights matter, and its losses."""
    flags = {"pretrained_model_name_or_path": pipeline_folder, "train_data_dir": images_folder, "resolution": 32}
    flags |= {"train_batch_size": 4, "max_train_steps": 4, "learning_rate": 1e-2, "use_ema": True, "seed": 0}
    flags |= {"checkpointing_steps": 2, "output_dir": tmp_path_factory.mktemp("one_device") / "output"}
    flags |= {"validation_rows": 3, "validation_steps": 2, "keep_best": True, "checkpoints_total_limit": 2}
    train(flags)
    return SimpleNamespace(flags=flags, output=flags["output_dir"], losses=np.array(losses_of(flags["output_dir"])))


FOUR_DEVICES = """
import json
from pathlib import Path
import jax, orbax.checkpoint as ocp
from conftest import run
shares = []
for flags in {runs}:
    run(flags, "train_text_to_image_flax")
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(Path(flags["output_dir"]) / "checkpoint-4" / "train_state")
    total = lambda part, size: sum(map(size, jax.tree.leaves(state[part])))
    of_one = lambda array: array.addressable_shards[0].data.nbytes
    shares.append([total(part, of_one) / total(part, lambda array: array.nbytes) for part in state])
assert jax.device_count() == 4
print(json.dumps(shares))
"""


@pytest.fixture(scope="module")
def four_devices(one_device, tmp_path_factory):
    """The same batch on 4 devices: "plain", "sharded", and "resumed" with sharding from the one device's checkpoint.

    Each: output_dir, and what share of the weights, of the average and of the optimizer's state each device holds.
    """
    folder = tmp_path_factory.mktemp("four_devices")
    flags = {**one_device.flags, "train_batch_size": 1}
    resumed = {**with_checkpoint(one_device.output / "checkpoint-2", folder / "resumed"), "shard_params": True}
    changes = {"plain": {}, "sharded": {"shard_params": True}, "resumed": resumed}
    runs = [{**flags, "output_dir": folder / name, **values} for name, values in changes.items()]
    runs = [{name: value if value is True else str(value) for name, value in flags.items()} for flags in runs]
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    result = run_code(FOUR_DEVICES.format(runs=runs), XLA_FLAGS=devices)
    assert result.returncode == 0, result.stderr
    assert "images, 4 per step" in result.stderr
    assert "on 4 x cpu, " in result.stderr
    shares = json.loads(result.stdout)
    return {name: (folder / name, share) for name, share in zip(changes, shares, strict=True)}


@pytest.mark.parametrize(("kind", "share"), [("plain", 1), ("sharded", 0.25)])
def test_four_devices_train_as_one_does(kind, share, one_device, four_devices):
    output, shares = four_devices[kind]
    print(kind, "on 4 devices:", np.abs(losses_of(output) / one_device.losses - 1).max())
    np.testing.assert_allclose(losses_of(output), one_device.losses, rtol=1e-5)
    assert len(shares) == 3
    assert share <= min(shares) <= max(shares) <= min(1.01 * share, 1)  # all but a few sides divide by 4


def test_a_checkpoint_of_one_device_resumes_on_four(one_device, four_devices):
    output, shares = four_devices["resumed"]
    np.testing.assert_allclose(losses_of(output), one_device.losses[2:], rtol=1e-5)
    assert max(shares) < 0.26


def test_a_spread_checkpoint_of_four_devices_resumes_on_one(one_device, four_devices, tmp_path):
    train({**one_device.flags, **with_checkpoint(four_devices["sharded"][0] / "checkpoint-2", tmp_path)})
    np.testing.assert_allclose(losses_of(tmp_path), one_device.losses[2:], rtol=1e-5)


def test_the_validation_loss_is_the_same_on_four_devices_and_after_a_resume(one_device, four_devices):
    tags = ["validation_loss", *(f"validation_loss/t{t:03d}-{t + 249}" for t in (0, 250, 500, 750))]
    losses = {}
    for output in (one_device.output, *(output for output, _ in four_devices.values())):
        entries = state_of_run(output / "checkpoint-4")["validation"]
        assert [entry["step"] for entry in entries] == [2, 4]
        losses[output.name] = [entry[tag] for tag in tags for entry in entries]
    for name, values in losses.items():
        difference = np.abs(np.divide(values, losses["output"]) - 1).max()
        print(f"{name}: {difference:.1e}")
        assert difference < 1e-6
    events = events_of(one_device.output)
    assert [event.value for tag in tags for event in events.Scalars(tag)] == pytest.approx(losses["output"], rel=1e-6)
    assert PIL.Image.open(one_device.output / "validation" / "loss.png").size[0] > 300
    best = min(losses["output"][:2])
    said = f"; best validation loss {best:.4f}: checkpoint-{2 if best == losses['output'][0] else 4}."
    card = (one_device.output / "README.md").read_text()
    assert said in card
    assert "(validation/loss.png)" in card


# Two processes --------------------------------------------------------------------------------------------------------


def launch_two(flags, folder):
    """Run the script in two processes. Returns [(status, stderr)] of both."""
    command, processes = [str(ROOT / f"{SCRIPT}.py"), *command_line(flags)], []
    for index, place in enumerate(jax_places()):
        with (folder / f"stderr-{index}").open("w") as stderr:
            processes.append(forks.Popen(command, stderr=stderr, env={**os.environ, **place}))
    try:
        statuses = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(status, (folder / f"stderr-{index}").read_text()) for index, status in enumerate(statuses)]


@pytest.mark.parametrize("case", ["column", "image", "image to be encoded"])
def test_bad_input_in_two_processes_is_said_by_both_and_ends_both(case, flags, tmp_path):
    """A column, which both look for, and an image, which the first one looks at, or the second if they are encoded."""
    line = r"^error: --caption_column title: no such column"
    if case == "column":
        flags["caption_column"] = "title"
    else:
        row = 0 if case == "image" else 1
        flags["train_data_dir"] = tiny.make_images(tmp_path / "broken")
        (tmp_path / "broken" / f"{row}.png").write_bytes(b"no picture")
        flags |= {"center_crop": True, "cache_encodings": tmp_path / "encodings"} if row else {}
        line = rf"^error: (row 0: )?image .*{row}\.png cannot be read"
    for status, stderr in launch_two(flags, tmp_path):
        assert status == 1, stderr
        assert len(re.findall(line, stderr, re.MULTILINE)) == 1, stderr
        assert "Traceback" not in stderr
        assert len(re.findall("^error: ", stderr, re.MULTILINE)) == 1
    if case == "image to be encoded":  # only once all else has been allowed
        assert list(flags["output_dir"].iterdir()) == []
    else:
        assert not flags["output_dir"].exists()


def reading(batch_size, threads):
    return SimpleNamespace(train_batch_size=batch_size, dataloader_num_workers=threads)


def test_each_process_reads_its_own_share_and_together_they_read_the_whole(monkeypatch):
    """30 positions beyond 32 bits in micro-batches of 6."""
    positions = range(2**33 - 6, 2**33 + 24)

    def share(process, processes):
        monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, batch: batch)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        read = []

        def preprocess(row, rng):
            read.append(row)
            return {"row": np.int64(row), "draw": rng.random()}

        stream = script.ExampleStream(range(8), preprocess, 0)
        batches = list(script.read_ahead(reading(6 // processes, 2), stream, positions))
        return read, batches

    (read, whole), (left_read, left), (right_read, right) = share(0, 1), share(0, 2), share(1, 2)
    assert len(whole) == len(left) == len(right) == 5
    for expected, *parts in zip(whole, left, right, strict=True):
        assert all(len(part["row"]) == 3 for part in parts)
        for name in ("row", "draw", "positions"):
            assert np.array_equal(np.concatenate([part[name] for part in parts]), expected[name])
    assert (len(read), len(left_read), len(right_read)) == (30, 15, 15)
    halves = whole[1]["positions"].astype(np.uint64)
    assert np.array_equal(halves[:, 0] * 2**32 + halves[:, 1], 2**33 + np.arange(6))


# Validation and trackers ----------------------------------------------------------------------------------------------


def cells_of(path, number):
    grid = PIL.Image.open(path)
    return [np.asarray(grid.crop((2 + 34 * k, 2, 34 + 34 * k, 34))).astype(int) for k in range(number)]


def test_validation_pictures_are_those_that_diffusers_draws_with_the_average(whole):
    """By DDIM with the saved result, which is the average, from the noise that belongs to each prompt."""
    grids = sorted((whole.output / "validation").iterdir())
    assert [path.name for path in grids] == ["step-000005.png", "step-000010.png", "step-000012.png"]
    assert [event.step for event in events_of(whole.output).Images("validation")] == [5, 10, 12]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(whole.output)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    cells = cells_of(grids[2], 2)
    for index, cell in enumerate(cells):
        noise = script.random_generator(0, 2, index).standard_normal((8, 8, 4), dtype=np.float32)
        latents = torch.from_numpy(noise).permute(2, 0, 1)[None]
        expected = pipeline("red dots", num_inference_steps=20, latents=latents, height=32, width=32).images[0]
        print("validation:", np.abs(cell - np.asarray(expected)).max())
        assert np.abs(cell - np.asarray(expected)).max() <= 1
    assert np.abs(cells[0] - cells[1]).max() > 1
    assert np.abs(cells[0] - cells_of(grids[1], 2)[0]).max() > 1


def test_the_result_is_the_average(whole):
    state, result = state_of(whole.output / "checkpoint-12"), unet_of(whole.output)
    for name in ("time_embedding.linear_1.weight", "mid_block.resnets.0.time_emb_proj.weight"):
        assert np.array_equal(state[f"['ema']['{name}']"].T, result[name])
        assert not np.array_equal(state[f"['params']['{name}']"].T, result[name])


def test_tensorboard_has_every_update(whole):
    events = events_of(whole.output)
    for name in ("train_loss", "grad_norm", "lr", "examples_per_second", "data_wait"):
        assert [event.step for event in events.Scalars(name)] == list(range(1, 13)), name
    rates = [event.value for event in events.Scalars("lr")]
    expected = [0, 1 / 3, 2 / 3, *(0.5 + 0.5 * np.cos(np.pi * np.arange(9) / 9))]
    np.testing.assert_allclose(rates, 1e-3 * np.array(expected), rtol=1e-5)
    assert all(0 < event.value < 1 for event in events.Scalars("data_wait"))
    walltimes = [event.wall_time for event in events.Scalars("train_loss")]
    assert len(set(walltimes)) == 12
    assert walltimes == sorted(walltimes)


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, *rest)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from conftest import run
run({flags!r}, "train_text_to_image_flax")
assert "torch" not in sys.modules
"""


def test_no_torch_wandb_offline_and_no_token_anywhere(flags, tmp_path):
    """A whole run in a process where torch is not found: 8 images in batches of 3, of which the third ends an epoch."""
    token = "hf_NotToBeSeenAnywhere"
    flags |= {"report_to": "all", "hub_token": token, "validation_prompts": ["red dots"], "logging_steps": 1}
    flags |= {"train_batch_size": 3, "max_train_steps": 4, "validation_epochs": 1}
    flags = {name: list(map(str, value)) if isinstance(value, list) else str(value) for name, value in flags.items()}
    code = WITHOUT_TORCH.format(flags=flags)
    result = run_code_afresh(code, WANDB_DIR=str(tmp_path), WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert_wandb_has_everything(tmp_path)
    assert len(losses_of(tmp_path / "output")) == 4
    grids = sorted(path.name for path in (tmp_path / "output" / "validation").iterdir())
    assert grids == ["step-000003.png", "step-000004.png"]
    written = everything_written_below(tmp_path) + (result.stdout + result.stderr).encode()
    assert b"red dots" in written
    assert token.encode() not in written
    picture(tmp_path / "output")


def test_importing_the_script_does_not_import_torch():
    result = run_code_afresh(f"import sys, {SCRIPT}; sys.exit('torch' in sys.modules)")
    assert result.returncode == 0, result.stderr


# Drawing --------------------------------------------------------------------------------------------------------------


def test_generate_draws_with_the_output_of_a_run_and_never_over_another_picture(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"pretrained_model_name_or_path": whole.output, "resolution": 32, "generate": "a picture: red/dots!"}
    train({**flags, "seed": 3})
    path = tmp_path / "a-picture-red-dots-seed-3.png"
    first = path.read_bytes()
    assert PIL.Image.open(path).size == (32, 32)
    assert np.asarray(PIL.Image.open(path)).std() > 1
    train({**flags, "seed": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-picture-red-dots-seed-3-2.png",
        "a-picture-red-dots-seed-3.png",
    ]
    assert path.read_bytes() == first


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parsed(flags, caption_lists_folder):
    flags |= {"train_data_dir": caption_lists_folder, "random_flip": True, "proportion_empty_prompts": 0.3}
    return script.parse_args(command_line(flags))


def rows_of(args):
    """The rows of the data set, and what turns one into an example."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(f"{args.pretrained_model_name_or_path}/tokenizer")
    dataset = script.load_rows(args, "train_data_dir", ["image_column", "caption_column"])
    return dataset, functools.partial(script.preprocess_train, args, tokenizer), tokenizer


def test_pixels_captions_and_order_are_those_of_the_pytorch_script(parsed):
    dataset, preprocess, tokenizer = rows_of(parsed)
    for position in range(16):
        row, generators = dataset[position % 8], [np.random.default_rng(position) for _ in range(2)]
        ours = preprocess(row, generators[0])
        theirs = train_text_to_image.preprocess_train(parsed, tokenizer, (4, 8, 8), 1000, row, generators[1])
        assert np.array_equal(ours["pixel_values"].transpose(2, 0, 1), theirs["pixel_values"])
        assert np.array_equal(ours["input_ids"], theirs["input_ids"])
    assert np.array_equal(script.permutation(7, 1, 8), train_text_to_image.permutation(7, 1, 8))


def test_the_number_of_threads_changes_nothing(parsed):
    stream = script.ExampleStream(*rows_of(parsed)[:2], 7)
    one, many = (list(script.read_ahead(reading(3, threads), stream, range(5, 20))) for threads in (None, 8))
    assert len(one) == len(many) == 5
    for batch, other in zip(one, many, strict=True):
        assert batch.keys() == other.keys() == {"pixel_values", "input_ids", "positions"}
        assert all(np.array_equal(batch[name], other[name]) for name in batch)


def noise_at(positions, key=0):
    positions = np.asarray(positions, np.int64)
    halves = np.stack([positions >> 32, positions & 0xFFFFFFFF], axis=1).astype(np.uint32)
    return jax.tree.map(np.asarray, script.draw_noise(halves, jax.random.key(key), (8, 8, 4), 1000))


def test_noise_is_a_function_of_the_position_and_the_key_alone():
    one, other = noise_at([3, 4, 5]), noise_at([9, 5, 2**32 + 5, 2**33 + 5])
    another_key = noise_at([5], key=1)
    for name in one:
        assert np.array_equal(one[name][2], other[name][1]), name
    for name in ("posterior_noise", "noise", "perturbation_noise", "offset_noise"):
        rows = [*one[name], *other[name][[0, 2, 3]], another_key[name][0]]
        assert len({row.tobytes() for row in rows}) == 7, name
    assert len({one[name].tobytes() for name in ("posterior_noise", "noise", "perturbation_noise")}) == 3


def test_timesteps_are_uniform_and_noise_is_normal():
    drawn = noise_at(range(2000))
    timesteps = drawn["timesteps"].astype(float)
    assert timesteps.mean() == pytest.approx(499.5, abs=4 * 288.7 / 2000**0.5)  # four standard errors
    assert timesteps.std() == pytest.approx(288.7, abs=4 * 288.7 / (5 * 2000) ** 0.5)  # of a uniform distribution
    assert 0 <= timesteps.min() < 10
    assert 990 <= timesteps.max() <= 999
    for name in ("posterior_noise", "noise", "perturbation_noise", "offset_noise"):
        assert drawn[name].mean() == pytest.approx(0, abs=4 / drawn[name].size ** 0.5), name
        assert drawn[name].std() == pytest.approx(1, abs=4 / (2 * drawn[name].size) ** 0.5), name
    assert drawn["offset_noise"].shape == (2000, 1, 1, 4)


# Hub ------------------------------------------------------------------------------------------------------------------


def test_from_a_model_and_a_data_set_on_the_hub_to_a_model_on_the_hub(flags):
    """Checkpoints, logs and the token stay here."""
    token = "hf_test_write"
    with Hub() as hub:
        hub.add_repo("user/base", flags["pretrained_model_name_or_path"])
        hub.add_repo("user/pictures", flags["train_data_dir"], repo_type="dataset")
        flags |= {"pretrained_model_name_or_path": "user/base", "dataset_name": "user/pictures", "train_data_dir": None}
        flags |= {"push_to_hub": True, "hub_model_id": "user/tuned", "hub_token": token, "checkpointing_steps": 1}
        result = launch({**flags, "save_flax_weights": True}, script=SCRIPT, **hub.environment())
        assert result.returncode == 0, result.stderr
        arrived = hub.files("user/tuned")
    assert {name: arrived[name] for name in arrived if name != ".gitattributes"} == files_below(
        flags["output_dir"], "checkpoint-", "logs"
    )
    assert names_in(flags["output_dir"]) == ["checkpoint-1", "checkpoint-2"]
    assert {f"unet/{WEIGHTS}", "unet/diffusion_flax_model.msgpack", "model_index.json"} <= arrived.keys()
    flax.serialization.msgpack_restore(arrived["unet/diffusion_flax_model.msgpack"])
    card = arrived["README.md"].decode()
    assert "base_model: user/base" in card
    assert "- user/pictures" in card
    everything = everything_written_below(flags["output_dir"]) + (result.stdout + result.stderr).encode()
    assert token.encode() not in everything
