"""LoRA: an adapter trained in place of the whole model is resumed, averaged, saved and loaded as the model is."""

import importlib
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import ROOT, command_line, launch, reset_accelerate, run
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import PeftAdapterMixin
from faults import TRAINED, tensors_in
from hub import Hub
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file
from test_hub import files_below
from test_processes import finish, free_port
from test_sharded import tensors_in as nested_tensors_in
from torch.optim.optimizer import register_optimizer_step_post_hook

from train_text_to_image import RunError, parse_args, random_generator

STABLE_DIFFUSION, SDXL, PRIOR, DECODER = SCRIPTS = [
    "train_text_to_image",
    "train_text_to_image_sdxl",
    "train_text_to_image_prior",
    "train_text_to_image_decoder",
]
ADAPTER, KOHYA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
UPSTREAM = json.loads((ROOT / "tests" / "upstream_lora_flags.json").read_text())
WITH_TEXT = (STABLE_DIFFUSION, SDXL)  # the text is what the UNet is conditioned on
every_script = pytest.mark.parametrize("script", SCRIPTS)
but_sdxl = pytest.mark.parametrize("script", [STABLE_DIFFUSION, PRIOR, DECODER])  # whose machinery is the same text


@pytest.fixture(scope="module")
def bases(folders):
    """The folders of the models by their flags, {script: dict}; the Kandinsky scripts draw with both halves."""
    return {**folders, PRIOR: folders[DECODER]}


@pytest.fixture(scope="module")
def runs(bases, images_folder, tmp_path_factory):
    """A function of a script to a run with everything on: its flags, and what was seen of the model in it."""
    made = {}

    def run_of(script):
        if script not in made:
            folder = tmp_path_factory.mktemp("lora")
            flags = {**bases[script], "train_data_dir": images_folder, "output_dir": folder / "output", "seed": 0}
            flags |= {"resolution": 32, "train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 1}
            flags |= {"rank": 4, "lora_alpha": 2, "learning_rate": 1e-2, "lr_warmup_steps": 0, "use_ema": True}
            flags |= {"cache_encodings": folder / "encodings", "center_crop": script in WITH_TEXT}
            flags |= {"gradient_accumulation_steps": 2, "snr_gamma": 5.0, "gradient_checkpointing": True}
            with pytest.MonkeyPatch.context() as monkeypatch:
                seen = watch(monkeypatch)
                run({**flags, "validation_prompt": "red dots", "num_validation_images": 2}, script)
            reset_accelerate()
            made[script] = flags, seen
        return made[script]

    return run_of


def watch(monkeypatch):
    """What a run does with the library's functions: {"model": what got the adapter, and numbers of values}."""
    seen = {"copied": 0, "averaged": 0}
    add_adapter, copy, lerp = PeftAdapterMixin.add_adapter, torch.nn.Parameter.__deepcopy__, torch._foreach_lerp_

    def note_model(self, *args, **kwargs):
        seen["model"] = self
        return add_adapter(self, *args, **kwargs)

    def note_copy(self, memo):
        seen["copied"] += self.numel()
        return copy(self, memo)

    def note_average(averages, *args):
        seen["averaged"] = sum(average.numel() for average in averages)
        return lerp(averages, *args)

    monkeypatch.setattr(PeftAdapterMixin, "add_adapter", note_model)
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", note_copy)
    monkeypatch.setattr(torch, "_foreach_lerp_", note_average)
    return seen


def adapter_of(folder):
    return load_file(Path(folder) / ADAPTER)


def difference(one, other):
    assert one.keys() == other.keys()
    return max(np.abs(one[name].astype(np.float64) - other[name]).max() for name in one)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


# What is trained, and what is written ---------------------------------------------------------------------------------


@every_script
def test_what_a_run_writes_is_the_adapter_alone(script, runs):
    flags, _ = runs(script)
    folder, part = flags["output_dir"], TRAINED[script]
    result = {"README.md", "logs", "validation", ADAPTER, *([KOHYA] if script in WITH_TEXT else [])}
    assert names_in(folder) == result | {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    checkpoint = folder / "checkpoint-4"
    assert names_in(checkpoint) == {part, f"{part}_ema", "optimizer.bin", "training_state.json"}
    assert names_in(checkpoint / part) == names_in(checkpoint / f"{part}_ema") == {ADAPTER}
    weights = adapter_of(checkpoint / part)
    assert all(re.search(r"\.(to_q|to_k|to_v|to_out\.0)\.lora_[AB]\.weight$", name) for name in weights)
    assert {min(weight.shape) for weight in weights.values()} == {4}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    moments = [state["exp_avg"] for state in torch.load(checkpoint / "optimizer.bin")["state"].values()]
    assert sum(moment.numel() for moment in moments) == sum(weight.numel() for weight in weights.values())


@every_script
def test_frozen_weights_keep_every_bit_and_the_average_shares_them(script, runs, bases):
    flags, seen = runs(script)
    part, own = TRAINED[script], {PRIOR: "prior_", DECODER: "decoder_"}.get(script, "")
    before = tensors_in(bases[script][f"pretrained_{own}model_name_or_path"] / part)
    state = seen["model"].state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
    assert len(before) == len(after)
    for name, value in before.items():
        assert value.tobytes() == after[name.split()[1]].numpy().tobytes(), name
    size = sum(weight.numel() for weight in adapter_of(flags["output_dir"]).values())
    assert (seen["copied"], seen["averaged"]) == (size, size)


@every_script
def test_the_average_of_the_adapter(script, runs):
    """decay_t = min(0.9999, t / (9 + t)) for t = 2, 3, ..., after the first update it is a copy; it is the result."""
    flags, _ = runs(script)
    average = None
    for step in (1, 2, 3, 4):
        checkpoint = flags["output_dir"] / f"checkpoint-{step}"
        weights = {name: value.double() for name, value in adapter_of(checkpoint / TRAINED[script]).items()}
        decay = step / (9 + step) if step > 1 else 0
        average = {n: decay * average[n] + (1 - decay) * weights[n] if average else weights[n] for n in weights}
        for name, stored in adapter_of(checkpoint / f"{TRAINED[script]}_ema").items():
            torch.testing.assert_close(stored.double(), average[name], rtol=1e-5, atol=1e-7)
            assert step == 1 or not torch.equal(stored.double(), weights[name])
    result = {name.removeprefix("unet."): value for name, value in adapter_of(flags["output_dir"]).items()}
    assert all(
        torch.equal(value, result[name]) for name, value in adapter_of(checkpoint / f"{TRAINED[script]}_ema").items()
    )


def test_the_seed_decides_the_first_adapter(flags):
    flags |= {"rank": 2, "learning_rate": 1e-30, "adam_weight_decay": 0, "max_train_steps": 1}
    first = []
    for name, seed in (("a", 0), ("b", 0), ("c", 2**70)):
        torch.manual_seed(len(first))  # which is nobody's business
        run({**flags, "seed": seed, "output_dir": flags["output_dir"] / name})
        first.append(adapter_of(flags["output_dir"] / name))
    names = [name for name in first[0] if "lora_A" in name]
    assert all(torch.equal(first[0][name], first[1][name]) for name in names)
    assert not any(torch.equal(first[0][name], first[2][name]) for name in names)


@pytest.mark.parametrize("model", ["stable-diffusion-1.5", "stable-diffusion-xl"])
def test_the_size_of_an_adapter(model):
    """By its real configuration, without its weights: the README's numbers."""
    config = json.loads((ROOT / "tests" / "benchmarks" / "model_configs.json").read_text())[model]["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        whole = sum(weight.numel() for weight in unet.parameters())
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=layers))
    adapter = sum(weight.numel() for name, weight in unet.named_parameters() if ".lora_" in name)
    readme = " ".join((ROOT / "README.md").read_text().split())
    trained, all_of_it = (f"({4 * adapter / 1e6:.1f} MB)", f"({4 * whole / 1e9:.2f} GB)")
    assert f"{adapter:,} parameters {trained}".replace(" parameters", "", model.endswith("xl")) in readme
    assert f"{trained} in place of {whole:,} {all_of_it}" in readme


def test_the_memory_in_the_readme_is_that_of_the_table():
    """The README has some of its rows and columns, under shorter names."""
    readme, table = (
        re.findall(r"^\| (.*) \|$", (ROOT / name).read_text(), re.MULTILINE)
        for name in ("README.md", "tests/benchmarks/results/memory/table.md")
    )
    computed = {row.split(" | ")[0].strip("`"): row.split(" | ")[1:] for row in table}
    rows = {
        "none |": "--use_ema",
        "`--gradient_checkpointing --use_8bit_adam` |": "--use_ema --gradient_checkpointing --use_8bit_adam",
        "and `--offload_ema` |": "--use_ema --offload_ema --gradient_checkpointing --use_8bit_adam",
        "`--rank 16` ([LoRA](#lora)) |": "--use_ema --rank 16",
        "and `--cache_encodings --gradient_checkpointing` |": "--use_ema --rank 16 --cache_encodings "
        "--gradient_checkpointing",
    }
    for start, flags in rows.items():
        (row,) = (row for row in readme if row.startswith(start))
        cells = [cell.strip() or "no such flag" for cell in row.split("|")[1:]]
        assert cells == computed[flags], flags


# Resuming -------------------------------------------------------------------------------------------------------------


@every_script
def test_a_signal_and_a_resume_change_no_bit(script, runs, tmp_path):
    """Stopped after update 2, with no other checkpoint there."""
    flags, _ = runs(script)
    other = {**flags, "output_dir": tmp_path / "output", "checkpointing_steps": 4}
    updates = []

    def stop_in_second(*_):
        updates.append(1)
        if len(updates) == 2:
            signal.raise_signal(signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop_in_second)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(other, script)
    finally:
        hook.remove()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert {path.name for path in (tmp_path / "output").glob("checkpoint-*")} == {"checkpoint-2"}
    assert not (tmp_path / "output" / ADAPTER).exists()
    reset_accelerate()
    run({**other, "resume_from_checkpoint": True}, script)
    one, two = (tensors_in(folder / "checkpoint-4") for folder in (flags["output_dir"], tmp_path / "output"))
    assert difference(one, two) == 0.0
    assert difference(one, tensors_in(tmp_path / "output" / "checkpoint-2")) > 0.0
    results = [adapter_of(folder) for folder in (flags["output_dir"], tmp_path / "output")]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@but_sdxl
def test_a_resume_in_bf16_with_8_bit_adam_changes_no_bit(script, bases, images_folder, tmp_path, capsys):
    """Of a rank that is large enough for bitsandbytes to keep moments in 8 bits."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, see requirements.txt")
    flags = {**bases[script], "train_data_dir": images_folder, "output_dir": tmp_path / "output", "resolution": 32}
    flags |= {"rank": 256, "use_8bit_adam": True, "mixed_precision": "bf16", "max_train_steps": 4, "seed": 0}
    flags |= {"checkpointing_steps": 2, "learning_rate": 1e-3, "use_ema": True, "train_batch_size": 2}
    flags |= {"offload_ema": script in WITH_TEXT, "validation_prompts": ["red dots"]}
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = watch(monkeypatch)
        run(flags, script)
    dtypes = {".lora_" in name: weight.dtype for name, weight in seen["model"].named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    reset_accelerate()
    shutil.copytree(flags["output_dir"] / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    again = {"output_dir": tmp_path / "resumed", "gradient_checkpointing": True, "resume_from_checkpoint": True}
    run({**flags, **again}, script)
    folders = [folder / "checkpoint-4" for folder in (flags["output_dir"], tmp_path / "resumed")]
    states = [nested_tensors_in(torch.load(folder / "optimizer.bin")) for folder in folders]
    assert torch.uint8 in {value.dtype for value in states[0].values()}
    for part in (TRAINED[script], f"{TRAINED[script]}_ema"):
        states = [{**state, **adapter_of(folder / part)} for state, folder in zip(states, folders, strict=True)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert "should be kept in float32" not in capsys.readouterr().err


def test_an_adapter_of_other_flags_is_not_resumed(runs, tmp_path):
    flags = {**runs(STABLE_DIFFUSION)[0], "output_dir": tmp_path / "output", "resume_from_checkpoint": "latest"}
    shutil.copytree(runs(STABLE_DIFFUSION)[0]["output_dir"] / "checkpoint-4", tmp_path / "output" / "checkpoint-4")
    changes = {
        "--rank None (was 4), --lora_alpha None (was 2.0)": {"rank": None, "lora_alpha": None},
        "--rank 8 (was 4)": {"rank": 8},
        "--lora_alpha None (was 2.0)": {"lora_alpha": None},
        '--lora_target_modules ["to_q", "to_k"] (was None)': {"lora_target_modules": ["to_q", "to_k"]},
    }
    for said, change in changes.items():
        with pytest.raises(RunError) as error:
            run({**flags, **change})
        assert str(error.value) == f"{tmp_path / 'output' / 'checkpoint-4'}: cannot resume with {said}"
        assert names_in(tmp_path / "output") == {"checkpoint-4"}
        reset_accelerate()
    run(flags)
    assert ADAPTER in names_in(tmp_path / "output")


def test_a_rank_is_not_resumed_from_a_whole_model(flags):
    run({**flags, "max_train_steps": 1, "checkpointing_steps": 1})
    reset_accelerate()
    with pytest.raises(RunError, match=r"checkpoint-1: cannot resume with --rank 4 \(was None\)"):
        run({**flags, "rank": 4, "resume_from_checkpoint": "latest"})


def test_an_earlier_adapter_is_not_overwritten(runs):
    flags, _ = runs(STABLE_DIFFUSION)
    before = adapter_of(flags["output_dir"])
    with pytest.raises(RunError, match="holds an earlier run"):
        run({**flags, "seed": 1})
    reset_accelerate()
    checkpoints = [path.rename(path.with_name("kept-" + path.name)) for path in flags["output_dir"].glob("check*")]
    with pytest.raises(RunError, match="holds an earlier run"):
        run({**flags, "seed": 1})
    reset_accelerate()
    for path in checkpoints:
        path.rename(path.with_name(path.name.removeprefix("kept-")))
    run({**flags, "resume_from_checkpoint": "latest"})  # its own README.md stands there, and no model_index.json
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(flags["output_dir"]).items())


# Several processes, other flags ---------------------------------------------------------------------------------------


@but_sdxl
def test_two_processes_train_as_one_does(script, runs, bases, images_folder, tmp_path):
    """With AdamW's epsilon raised: its first updates of gradients near 0 are their rounding errors."""
    flags = {**bases[script], "train_data_dir": images_folder, "resolution": 32, "seed": 0, "max_train_steps": 3}
    flags |= {"rank": 4, "use_ema": True, "lr_warmup_steps": 0, "adam_epsilon": 1e-6, "checkpointing_steps": 3}
    run({**flags, "train_batch_size": 4, "output_dir": tmp_path / "one"}, script)
    words = [
        str(ROOT / f"{script}.py"),
        *command_line({**flags, "train_batch_size": 2, "output_dir": tmp_path / "two"}),
    ]
    place = {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    places = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    for status, said in finish([[sys.executable, *words]] * 2, places, tmp_path):
        assert status == 0, said
    one, two = (tensors_in(tmp_path / name / "checkpoint-3") for name in ("one", "two"))
    weights = [{n: value for n, value in tensors.items() if "optimizer" not in n} for tensors in (one, two)]
    print(f"{script}: 1 and 2 processes: {difference(*weights):.1e}")
    assert difference(*weights) <= 1e-5
    assert difference(adapter_start(weights[0]), weights[0]) > 1e-5


def adapter_start(weights):
    """Weights as far from those as an untrained adapter is: B is 0 at first."""
    return {name: value * ("lora_B" not in name) for name, value in weights.items()}


def test_cached_encodings_change_nothing_but_roundings(runs, tmp_path):
    flags, _ = runs(STABLE_DIFFUSION)
    run({**flags, "cache_encodings": None, "output_dir": tmp_path / "output", "checkpointing_steps": 4})
    one, two = (adapter_of(folder) for folder in (flags["output_dir"], tmp_path / "output"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=1e-4)


@every_script
def test_gradient_checkpointing_changes_no_bit(script, runs, tmp_path):
    flags, _ = runs(script)
    run({**flags, "gradient_checkpointing": False, "output_dir": tmp_path / "output", "checkpointing_steps": 4}, script)
    one, two = (adapter_of(folder) for folder in (flags["output_dir"], tmp_path / "output"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert all(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)  # it trains


def test_other_layers(flags):
    """Of the feed-forward parts, and convolutions."""
    run({**flags, "rank": 2, "lora_target_modules": ["ff.net.0.proj", "conv1"], "max_train_steps": 1})
    layers = {re.sub(r".*\.(?=ff|conv)|\.lora_.*", "", name) for name in adapter_of(flags["output_dir"])}
    assert layers == {"ff.net.0.proj", "conv1"}


# Loading --------------------------------------------------------------------------------------------------------------


def cells(flags):
    """The two validation pictures after the last update, side by side in their grid."""
    grid = PIL.Image.open(flags["output_dir"] / "validation" / "step-000004.png")
    return [np.asarray(grid.crop((2 + 34 * index, 2, 34 + 34 * index, 34))) for index in range(2)]


def generators():
    """Of the noise of the first two pictures of a run with seed 0."""
    for index in range(2):
        yield torch.Generator().manual_seed(int(random_generator(0, 2, index).integers(2**32)))


def assert_equal_pictures(flags, draw, levels=0):
    """What `draw` returns for the prompt and the noise of the validation is in the grid, to so many levels of 255."""
    pictures = [np.asarray(draw("red dots", generator)) for generator in generators()]
    differences = [np.abs(p.astype(int) - c).max() for p, c in zip(pictures, cells(flags), strict=True)]
    assert max(differences) <= levels, differences
    assert (pictures[0] != pictures[1]).any()  # of other noise
    return pictures


OPTIONS = {"num_inference_steps": 20, "height": 32, "width": 32}


@pytest.mark.parametrize(
    ("script", "file"),
    [(STABLE_DIFFUSION, None), (STABLE_DIFFUSION, ADAPTER), (STABLE_DIFFUSION, KOHYA), (SDXL, None), (SDXL, KOHYA)],
)
def test_pictures_of_stable_diffusion(script, file, runs, bases):
    """From the folder, from diffusers' file and from kohya's, whose alpha is not the rank."""
    flags, _ = runs(script)
    pipeline = DiffusionPipeline.from_pretrained(*bases[script].values())
    pipeline.set_progress_bar_config(disable=True)
    options = {**OPTIONS, "num_inference_steps": {STABLE_DIFFUSION: 20, SDXL: 25}[script]}

    def draw(prompt, generator):
        return pipeline(prompt, generator=generator, **options).images[0]

    base = [np.asarray(draw("red dots", generator)) for generator in generators()]
    pipeline.load_lora_weights(flags["output_dir"], **({"weight_name": file} if file else {}))
    pictures = assert_equal_pictures(flags, draw)
    assert (pictures[0] != base[0]).any()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = [np.asarray(draw("red dots", generator), dtype=int) for generator in generators()]
    assert max(np.abs(one - two).max() for one, two in zip(fused, pictures, strict=True)) <= 2
    if file == KOHYA:
        weights = load_file(flags["output_dir"] / KOHYA)
        assert all(name.startswith("lora_unet_") for name in weights)
        assert {weight.item() for name, weight in weights.items() if name.endswith(".alpha")} == {2.0}


@pytest.mark.parametrize("script", [PRIOR, DECODER])
def test_pictures_of_kandinsky(script, runs, bases):
    flags, _ = runs(script)
    prior, decoder = (
        DiffusionPipeline.from_pretrained(bases[script][f"pretrained_{half}_model_name_or_path"])
        for half in ("prior", "decoder")
    )
    for half in (prior, decoder):
        half.set_progress_bar_config(disable=True)
    model = prior.prior if script == PRIOR else decoder.unet
    for frozen in (decoder.movq, prior.image_encoder) if script == DECODER else ():
        frozen.to(memory_format=torch.channels_last)  # as in the run: MoVQ takes roundings for another code

    def draw(prompt, generator):
        embeds = prior(prompt, generator=generator)
        return decoder(**embeds, generator=generator, **OPTIONS).images[0]

    base = [np.asarray(draw("red dots", generator)) for generator in generators()]
    model.load_lora_adapter(flags["output_dir"], prefix=None, weight_name=ADAPTER)
    pictures = assert_equal_pictures(flags, draw, levels=int(script == DECODER))
    assert (pictures[0] != base[0]).any()


@every_script
def test_the_code_in_the_card_runs(script, runs, tmp_path, monkeypatch):
    flags, _ = runs(script)
    card = ModelCard.load(flags["output_dir"] / "README.md")
    assert "lora" in card.data.tags
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    assert ".load_lora_" in code
    small = "pipeline(num_inference_steps=2, height=32, width=32, prompt="
    monkeypatch.chdir(tmp_path)
    exec(compile(re.sub(r"^pipeline\(", small, code, flags=re.MULTILINE), "card", "exec"), {})
    assert (tmp_path / "picture.png").is_file()


def test_the_card_names_another_prediction_type(flags):
    run({**flags, "rank": 2, "prediction_type": "v_prediction", "max_train_steps": 1})
    code = re.search(r"```python\n(.*?)```", (flags["output_dir"] / "README.md").read_text(), re.DOTALL).group(1)
    names = {}
    exec(compile(re.sub(r"^pipeline\(.*", "", code, flags=re.MULTILINE), "card", "exec"), names)
    assert names["pipeline"].scheduler.config.prediction_type == "v_prediction"


def test_what_is_uploaded(flags):
    with Hub() as hub:
        flags |= {"rank": 2, "push_to_hub": True, "hub_model_id": "user/adapter", "checkpointing_steps": 1}
        result = launch({**flags, "max_train_steps": 1}, **hub.environment("hf_test_write"))
        assert result.returncode == 0, result.stderr
        arrived = {name: data for name, data in hub.files("user/adapter").items() if name != ".gitattributes"}
    assert arrived.keys() == {"README.md", ADAPTER, KOHYA}
    assert arrived == files_below(flags["output_dir"], "checkpoint-", "logs")
    assert b'load_lora_weights("user/adapter")' in arrived["README.md"]


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "argument --rank/--lora_rank: must be larger than 0, not 0"),
        ({"rank": 4, "lora_alpha": 0}, "argument --lora_alpha: must be larger than 0, not 0"),
        ({"lora_alpha": 4}, "--lora_alpha and --lora_target_modules: need --rank"),
        ({"lora_target_modules": ["to_q"]}, "--lora_alpha and --lora_target_modules: need --rank"),
        ({"num_validation_images": 0}, "argument --num_validation_images: must be larger than 0, not 0"),
    ],
)
def test_flags_that_cannot_be_right(flags, change, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(command_line({**flags, **change}))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["to_q", "to_x", "q"], "--lora_target_modules to_x q: no such layer; the model has .* to_out.0 to_q to_v"),
        (["down_blocks.0"], "--lora_target_modules down_blocks.0: no such layer"),
        (["norm1"], "--lora_target_modules norm1: no such layer"),
    ],
)
def test_layers_that_are_not_there(flags, layers, message):
    with pytest.raises(RunError, match=message) as error:
        run({**flags, "rank": 4, "lora_target_modules": layers})
    assert "\n" not in str(error.value)
    assert not flags["output_dir"].exists()


def test_fsdp_is_refused(flags, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(RunError, match="--rank: .*FSDP"):
        run({**flags, "rank": 4})
    assert not flags["output_dir"].exists()


def test_a_scheduler_of_another_kind_is_refused(flags, tmp_path):
    """Without a pipeline to save, and without prompts."""
    model = shutil.copytree(flags["pretrained_model_name_or_path"], tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match="FlowMatchEulerDiscreteScheduler"):
        run({**flags, "rank": 4, "pretrained_model_name_or_path": model})


@every_script
def test_a_command_line_of_upstream_s_lora_script(script):
    """Each of its flags is accepted with the same type, but for two of SDXL's; --rank has another default: none."""
    module, facts = importlib.import_module(script), UPSTREAM[f"{script.replace('image', 'image_lora', 1)}.py"]
    assert len(facts) == {STABLE_DIFFUSION: 51, SDXL: 55, PRIOR: 42, DECODER: 42}[script]
    needed = {f"--{name}": "model" for name in ("pretrained_model_name_or_path",) if script in WITH_TEXT}
    needed["--train_data_dir"] = "images"
    for flag, fact in facts.items():
        words = {"flag": [], "int": ["3"], "float": ["0.25"], "str": ["constant"]}[fact["type"]]
        words = {"--report_to": ["wandb"], "--mixed_precision": ["bf16"], "--prediction_type": ["epsilon"]}.get(
            flag, words
        )
        words = {"--image_interpolation_mode": ["bicubic"], "--timestep_bias_strategy": ["later"]}.get(flag, words)
        others = [word for name, value in needed.items() if name != flag for word in (name, value)]
        if flag in ("--train_text_encoder", "--debug_loss"):  # refused, see test_sdxl.py
            continue
        parsed = vars(module.parse_args([*others, flag, *words]))
        kind = {"flag": bool, "int": int, "float": float, "str": str}[fact["type"]]
        name = flag.removeprefix("--")
        value = parsed["validation_prompts"][0] if name == "validation_prompt" else parsed[name]
        assert isinstance(value, kind), flag
    rank = module.parse_args([*(word for pair in needed.items() for word in pair), "--lora_rank", "8"]).rank
    assert rank == 8
