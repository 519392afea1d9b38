"""What a user reads: the whole of stderr, in a file and in a terminal, of all four scripts."""

import re

import forks
import pytest
from conftest import ROOT, command_line

SD, PRIOR, DECODER = "train_text_to_image", "train_text_to_image_prior", "train_text_to_image_decoder"
FLAX = "train_text_to_image_flax"
TIME = r"\d\d:\d\d:\d\d "

# python -c FAST_CLOCK SCRIPT FLAGS: tqdm's clock runs 100 times as fast, so that half a minute is 0.3 s.
FAST_CLOCK = """
import runpy, sys, time, tqdm.std

clock = time.time
tqdm.std.time = lambda: 100 * clock()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def own_flags(script, folders, images_folder, tmp_path):
    """The flags of two updates, with pictures and checkpoints."""
    models = folders[DECODER if script in (PRIOR, DECODER) else SD]
    flags = {**models, "train_data_dir": images_folder, "resolution": 32, "seed": 0}
    flags |= {"train_batch_size": 2, "max_train_steps": 2, "lr_warmup_steps": 0, "checkpointing_steps": 1}
    return {**flags, "validation_prompts": ["red dots"], "validation_steps": 1, "output_dir": tmp_path / "output"}


def said_in_a_file(flags, script, *before):
    """The lines of stderr of a run, which is no terminal. Nothing redraws a line there."""
    result = forks.run([*before, ROOT / f"{script}.py", *command_line(flags)])
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr
    return result.stderr.splitlines()


@pytest.mark.parametrize("script", [SD, PRIOR, DECODER, FLAX])
def test_every_line_of_a_log(script, own_flags, tmp_path):
    """What will happen, what happens, where everything is, and the code that uses it; nothing of any library."""
    cache = {"cache_encodings": tmp_path / "encodings", "center_crop": script in (SD, FLAX)}
    lines = said_in_a_file({**own_flags, **cache}, script)
    trained = "decoder" if script == DECODER else "prior" if script == PRIOR else None
    model = own_flags[f"pretrained_{trained}_model_name_or_path" if trained else "pretrained_model_name_or_path"]
    output = own_flags["output_dir"]
    expected = [
        f"INFO fine-tuning {model} on 1 x cpu, --mixed_precision no",
        "INFO 8 images, 2 per step, steps 0 to 2 (0.5 epochs), seed 0",
        f"INFO to {output}: a checkpoint every 1 steps, pictures every 1",
        f"INFO saved {output}/checkpoint-1",
        f"INFO validation pictures: {output}/validation/step-000001.png",
        f"INFO saved {output}/checkpoint-2",
        f"INFO validation pictures: {output}/validation/step-000002.png",
        f"INFO saved the result in {output}; there too: README.md, validation, logs, checkpoints (2)",
    ]
    end = lines.index("Generate a picture with it:")
    assert all(re.match(TIME, line) for line in lines[:end]), lines
    log = [re.sub(TIME, "", line) for line in lines[:end]]
    assert log == expected if script != FLAX else sorted(log) == sorted(expected)  # which writes in the background
    assert log[:3] + log[-1:] == expected[:3] + expected[-1:]
    card = (output / "README.md").read_text()
    assert lines[end + 1 :] == ["", *re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].splitlines()]


@pytest.mark.parametrize("script", [SD])
def test_progress_in_a_file_is_a_line_every_half_minute(script, own_flags):
    steps = 60
    quiet = {"validation_prompts": None, "checkpointing_steps": 1000, "report_to": "none", "logging_steps": 1}
    lines = said_in_a_file({**own_flags, **quiet, "max_train_steps": steps}, script, "-c", FAST_CLOCK)
    pattern = rf"{TIME}INFO (\d+) of {steps} steps, loss=\d\.\d+, images/s=\d+\.\d, [\d:]+ left"
    shown = [int(match[1]) for line in lines if (match := re.fullmatch(pattern, line))]
    assert shown == sorted(set(shown)), lines
    assert 1 < len(shown) < steps / 2, lines
    assert len(lines) == 4 + len(shown) + 6, lines  # the code has six


@pytest.mark.parametrize("script", [SD])
def test_a_terminal_has_a_bar_below_the_log(script, own_flags, tmp_path):
    with forks.Terminal(tmp_path / "stderr") as terminal:
        process = forks.Popen([ROOT / f"{script}.py", *command_line(own_flags)], terminal)
    assert process.wait(timeout=100) == 0
    terminal.copy()
    said = (tmp_path / "stderr").read_bytes().decode()  # with every "\r"
    assert re.search(r"\r100%\|█+\| 2/2 \[[^\]\n]*step/s, loss=\d\.\d+, images/s=\d+\.\d\] *\n", said), said
    assert re.search(rf"\r{TIME}INFO saved .*checkpoint-1\n", said), said
    assert " of 2 steps" not in said
