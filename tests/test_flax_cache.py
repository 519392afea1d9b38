"""--cache_encodings in JAX, what travels to the devices in an update, and what computes the attention on a GPU."""

import json
import logging
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import command_line
from faults import Process, jax_places
from safetensors.numpy import load_file, save_file
from test_flax_training import SCRIPT, WEIGHTS, after_step, launch_two, run_code, same_tensors, train
from test_training import losses_of, unet_of

import train_text_to_image_flax as script


@pytest.fixture
def flags(flags, caption_lists_folder, tmp_path):
    """Nearly all that is drawn for an example; a copy of the images, as some tests change them."""
    images = shutil.copytree(caption_lists_folder, tmp_path / "images")
    flags |= {"train_data_dir": images, "center_crop": True, "random_flip": True, "proportion_empty_prompts": 0.3}
    flags |= {"use_ema": True, "adam_epsilon": 1e-5, "max_train_steps": 4}
    return {**flags, "cache_encodings": tmp_path / "encodings"}


@pytest.fixture
def written(monkeypatch):
    """The number of rows in every file of encodings that is written, the empty one among them."""
    numbers, write_part = [], script.write_part

    def counted(folder, part):
        write_part(folder, part)
        numbers.append(len(part["digest"]))

    monkeypatch.setattr(script, "write_part", counted)
    return numbers


def rows_of(flags):
    """What main makes of the data flags: the encoded rows, which are encoded first where they are not there."""
    args = script.parse_args(command_line(flags))
    folder = script.Path(args.pretrained_model_name_or_path)
    models, weights = script.load_models(folder, folder, None)
    dataset = script.load_train_dataset(args, ["image_column", "caption_column"], 0)
    side = args.resolution // 4
    tokenizer = script.load_tokenizer(folder / "tokenizer")
    return script.prepare_rows(args, dataset, tokenizer, models, weights, (side, side, 4))


def folders_in(flags):
    return sorted(flags["cache_encodings"].iterdir())


# What is trained ------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_a_run_without_the_cache(flags, tmp_path, written, monkeypatch):
    """Up to float32 rounding, for the encoders are compiled apart from the rest; AdamW divides a gradient by its own
    size, so that rounding would be all there is of one near 0, if its epsilon were not above that. The second run from
    the cache encodes nothing."""
    train({**flags, "cache_encodings": None, "output_dir": tmp_path / "plain"})
    compiled, handler = [], logging.Handler()
    handler.emit = lambda record: compiled.extend(re.findall(r"^Compiling jit\((.*?)\) ", record.getMessage()))
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        train({**flags, "output_dir": tmp_path / "first"})
    logging.getLogger("jax").removeHandler(handler)
    assert compiled.count("encode") == 2  # for images and for captions, of which there are 17 in batches of 2
    assert written == [9]
    vocabulary = len(script.load_tokenizer(flags["pretrained_model_name_or_path"] / "tokenizer"))
    held = []
    after_step(monkeypatch, lambda step: held.append([array.shape for array in jax.live_arrays()]))
    train({**flags, "output_dir": tmp_path / "second", "validation_prompts": ["red dots"], "validation_steps": 2})
    assert written == [9]
    assert len(held) == 4
    assert not any((vocabulary, 16) in shapes for shapes in held)  # the text encoder's embeddings, also after drawing
    plain, first, second = (unet_of(tmp_path / name) for name in ("plain", "first", "second"))
    assert same_tensors(first, second)
    largest = max((plain[name] - first[name]).abs().max().item() for name in plain)
    print(f"largest difference of a weight: {largest:.1e}")
    assert largest < 1e-5
    np.testing.assert_allclose(losses_of(tmp_path / "plain"), losses_of(tmp_path / "first"), rtol=1e-5)


def test_flips_captions_and_their_absence_are_drawn_as_without_the_cache(flags):
    rows, preprocess_encoded = rows_of(flags)
    dataset, preprocess_train = rows_of({**flags, "cache_encodings": None})
    folder = flags["pretrained_model_name_or_path"]
    models, weights = script.load_models(folder, folder, None)
    frozen = jax.tree.map(jnp.asarray, {part: weights[part] for part in script.FROZEN})
    encode = jax.jit(lambda batch: script.encode(batch, frozen, models, jnp.float32))
    seen = set()
    for seed in range(40):
        row = seed % 8
        encoded = preprocess_encoded(rows[row], np.random.default_rng(seed))
        example = preprocess_train(dataset[row], np.random.default_rng(seed))
        expected = encode({name: array[None] for name, array in example.items()})
        for name, array in encoded.items():
            np.testing.assert_allclose(array, expected[name][0], rtol=1e-4, atol=1e-5)
        seen |= {array.tobytes() for array in encoded.values()}
    assert len(seen) > 20  # of 16 flips and crops and 13 captions


def test_encodings_are_kept_in_the_type_to_compute_in(flags):
    rows, preprocess = rows_of({**flags, "mixed_precision": "bf16"})
    example = preprocess(rows[0], np.random.default_rng(0))
    assert {name: (array.dtype, array.shape) for name, array in example.items()} == {
        "moments": (jnp.bfloat16, (8, 8, 8)),
        "text_states": (jnp.bfloat16, (77, 16)),
    }
    folder = flags["pretrained_model_name_or_path"]
    models, weights = script.load_models(folder, folder, None)
    frozen = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), {n: weights[n] for n in script.FROZEN})
    dataset, preprocess = rows_of({**flags, "cache_encodings": None})
    inputs = {name: array[None] for name, array in preprocess(dataset[0], np.random.default_rng(0)).items()}
    for name, array in jax.jit(lambda batch: script.encode(batch, frozen, models, jnp.bfloat16))(inputs).items():
        difference = np.abs(array[0].astype(np.float32) - example[name].astype(np.float32)).max()
        assert difference <= 2**-6 * np.abs(array).max(), name  # the order of sums, in 8 bits


def batches_read(flags, workers=0):
    """What 60 positions of a run become, in micro-batches of 3."""
    rows, preprocess = rows_of(flags)
    share = script.HostShare(script.ExampleStream(rows, preprocess, 0, 0, 60), 3, 0, 1)
    return list(script.read_ahead(share, workers))


def assert_same_batches(some, others):
    assert len(some) == len(others) == 20
    for batch, other in zip(some, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(np.array_equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_data_workers_encode_and_read_encodings_too(flags, tmp_path, precision):
    flags |= {"mixed_precision": precision}
    workers = {**flags, "dataloader_num_workers": 1, "cache_encodings": tmp_path / "by_workers"}
    assert_same_batches(batches_read(flags), batches_read(workers, 1))


def test_two_processes_encode_a_share_each(flags, tmp_path, written):
    two = {**flags, "max_train_steps": 1, "train_batch_size": 1, "cache_encodings": tmp_path / "shares"}
    for status, stderr in launch_two(two, tmp_path):
        assert status == 0, stderr
    (folder,) = (tmp_path / "shares").iterdir()
    assert len(list(folder.glob("part-*.arrow"))) == 2
    theirs, _ = rows_of(two)
    assert written == []
    ours, _ = rows_of(flags)
    for row in range(8):
        for name in ("moments", "text_states"):
            arrays = ([np.frombuffer(value, np.float32) for value in rows[row][name]] for rows in (ours, theirs))
            np.testing.assert_allclose(*arrays, rtol=1e-4, atol=1e-5)


def test_a_process_that_fails_while_encoding_ends_the_other_which_keeps_what_it_made(flags, tmp_path):
    """Process 1 at its first image, where process 0 has 500 to encode."""
    saved = tiny.save_rows(tmp_path / "saved", 1000, bad=1)
    flags |= {"train_data_dir": None, "dataset_name": saved, "train_batch_size": 1}
    for status, stderr in launch_two(flags, tmp_path):
        assert status == 1
        assert len(re.findall("error: row 1: image .*cannot be read", stderr)) == 1
    (folder,) = folders_in(flags)
    (made,) = (len(datasets.Dataset.from_file(str(path))) for path in folder.glob("part-*.arrow"))
    assert 0 < made < 10


@pytest.mark.parametrize(
    "failing, says",
    [
        ("script.on_devices", "RunError: --cache_encodings: the images cannot be encoded: no memory is left"),
        ("script.EncodingsWriter.add", "cannot be written: no memory is left"),
    ],
)
def test_an_error_of_any_kind_in_one_process_while_encoding_ends_both(failing, says, flags, tmp_path):
    """One that a library raises, before the first batch or behind it."""
    code = f"""
import os, train_text_to_image_flax as script
def fail(*_):
    raise RuntimeError("no memory is left")
if os.environ["JAX_PROCESS_ID"] == "1":
    {failing} = fail
script.main(script.parse_args({command_line(flags)}))
"""
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda place: run_code(code, **place), jax_places()))
    for result in results:
        assert result.returncode == 1
        assert says in result.stderr


def test_a_signal_to_one_process_while_encoding_stops_both_which_keep_what_they_made(flags, tmp_path):
    saved = tiny.save_rows(tmp_path / "saved", 2000)
    flags |= {"train_data_dir": None, "dataset_name": saved, "train_batch_size": 1, "output_dir": tmp_path / "output"}
    processes = [
        Process(SCRIPT, flags, tmp_path / f"stderr-{index}", **place) for index, place in enumerate(jax_places())
    ]
    with processes[0] as first, processes[1] as second:
        assert first.until(lambda: re.search(r"encoding: .* \d\d+/1000 ", first.said()))
        os.kill(second.popen.pid, signal.SIGTERM)
        statuses = [process.wait() for process in processes]
    assert statuses == [128 + signal.SIGTERM] * 2, first.said() + second.said()
    assert "stopped by SIGTERM while encoding; the same command goes on" in first.said()
    (folder,) = folders_in(flags)
    made = [len(datasets.Dataset.from_file(str(path))) for path in folder.glob("part-*.arrow")]
    assert len(made) == 2
    assert max(made) - min(made) < 2
    assert max(made) < 1000


# What is encoded ------------------------------------------------------------------------------------------------------


def test_only_what_has_changed_is_encoded_again(flags, written):
    before, _ = rows_of(flags)
    before = [before[row]["moments"] for row in range(8)]
    assert written == [9]
    images = flags["train_data_dir"]
    os.utime(images / "3.png", ns=(1, 1))
    after, _ = rows_of(flags)
    assert written == [9, 1]
    assert [after[row]["moments"] for row in range(8)] == before
    path = images / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["text"] = ["blue bars", "red", "a picture of a picture"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    after, _ = rows_of(flags)
    assert written == [9, 1, 1]
    assert len(after[5]["text_states"]) == 3
    assert len(folders_in(flags)) == 1


def test_another_model_resolution_or_flip_has_a_folder_of_its_own(flags, tmp_path, written):
    rows_of(flags)
    rows_of({**flags, "resolution": 64})
    rows_of({**flags, "random_flip": False})
    rows_of({**flags, "mixed_precision": "bf16"})
    other = shutil.copytree(flags["pretrained_model_name_or_path"], tmp_path / "other")
    weights = load_file(other / "vae" / WEIGHTS)
    weights["encoder.conv_in.bias"][0] += 0.1
    save_file(weights, other / "vae" / WEIGHTS, metadata={"format": "pt"})
    rows_of({**flags, "pretrained_model_name_or_path": other})
    assert len(folders_in(flags)) == 5
    assert written == [9] * 5
    rows_of({**flags, "snr_gamma": 5.0, "seed": 3, "train_batch_size": 3})
    assert written == [9] * 5


def test_encoding_goes_on_where_it_was_broken_off(flags, written, monkeypatch):
    monkeypatch.setattr(script, "PART_BYTES", 1)  # a file for each batch of two
    counted = script.write_part

    def failing(folder, part):
        if len(written) == 2:
            raise OSError("the disk is gone")
        counted(folder, part)

    monkeypatch.setattr(script, "write_part", failing)
    with pytest.raises(script.RunError, match=r"encodings.* cannot be written: the disk is gone"):
        train(flags)
    (folder,) = folders_in(flags)
    assert len(list(folder.glob("part-*"))) == len(written) == 2
    monkeypatch.setattr(script, "write_part", counted)
    train(flags)
    assert written == [2, 2, 2, 2, 1]
    assert {path.suffix for path in folder.iterdir()} == {".arrow", ".json"}


def test_a_signal_while_encoding_keeps_what_is_made(flags, written, monkeypatch):
    encoded_batches = script.encoded_batches

    def signalled(*arguments):
        for batch in encoded_batches(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a thread notes it
            yield batch

    monkeypatch.setattr(script, "encoded_batches", signalled)
    with pytest.raises(script.RunStopped, match="^stopped by SIGTERM while encoding; the same command goes on$"):
        train(flags)
    assert written == [2]
    monkeypatch.setattr(script, "encoded_batches", encoded_batches)
    train(flags)
    assert written == [2, 7]


def test_an_image_that_cannot_be_read_is_named_or_left_out(flags, written):
    (flags["train_data_dir"] / "6.png").write_bytes(b"no picture")
    with pytest.raises(script.RunError, match=r"^row 6: image .*6\.png cannot be read"):
        train(flags)
    train({**flags, "skip_bad_images": True})
    assert sum(written) == 8


# What travels to the devices ------------------------------------------------------------------------------------------


def test_pixels_are_those_of_numpy_to_the_bit():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    models = {"vae": SimpleNamespace(module=lambda weights: SimpleNamespace(encode=lambda pixels: pixels))}
    made = jax.jit(lambda batch: script.encode(batch, {"vae": {}}, models, jnp.float32))({"pixel_values": pixels})
    np.testing.assert_array_equal(made["moments"], pixels.astype(np.float32) / 255 * 2 - 1)


@pytest.mark.parametrize("cached", [False, True])
def test_an_update_writes_over_the_last_state_and_nothing_travels_unasked(flags, tmp_path, cached, monkeypatch):
    """An implicit transfer between host and devices would raise, as far as JAX sees one on a CPU."""
    make_train_state, first = script.make_train_state, []

    def recorded(*arguments):
        made = make_train_state(*arguments)
        first.append(made[0])
        return made

    monkeypatch.setattr(script, "make_train_state", recorded)
    after_step(monkeypatch, lambda step: jax.config.update("jax_transfer_guard", "disallow" if step < 4 else "allow"))
    changes = {"logging_steps": 2, "train_data_dir": tiny.make_images(tmp_path / "few", number=3)}
    try:
        train({**flags, **changes, "cache_encodings": flags["cache_encodings"] if cached else None})
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    leaves = jax.tree.leaves(first)
    assert len(leaves) > 300
    assert all(leaf.is_deleted() for leaf in leaves)


@pytest.mark.parametrize("cached", [False, True])
def test_threads_read_what_one_thread_reads(flags, cached, monkeypatch):
    """As on an accelerator."""
    flags |= {"cache_encodings": flags["cache_encodings"] if cached else None}
    expected = batches_read(flags)
    assert script.reading_threads("cpu") == 1
    assert 1 <= script.reading_threads("gpu") <= 16
    monkeypatch.setattr(script, "reading_threads", lambda backend: 8)
    assert_same_batches(batches_read(flags), expected)


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "kernel"),
    [
        ({"platform": "gpu", "compute_capability": "9.0"}, jnp.bfloat16, 40, "cudnn"),
        ({"platform": "gpu", "compute_capability": "8.0"}, jnp.float16, 128, "cudnn"),
        ({"platform": "gpu", "compute_capability": "10.0"}, jnp.bfloat16, 64, "cudnn"),
        ({"platform": "gpu", "compute_capability": "9.0"}, jnp.float32, 64, None),
        ({"platform": "gpu", "compute_capability": "9.0"}, jnp.bfloat16, 160, None),
        ({"platform": "gpu", "compute_capability": "9.0"}, jnp.bfloat16, 36, None),
        ({"platform": "gpu", "compute_capability": "7.5"}, jnp.float16, 64, None),
        ({"platform": "gpu", "compute_capability": "gfx942"}, jnp.bfloat16, 64, None),
        ({"platform": "tpu"}, jnp.bfloat16, 64, None),
        ({"platform": "cpu"}, jnp.bfloat16, 64, None),
    ],
)
def test_attention_by_cudnn_where_it_can(device, dtype, head_size, kernel):
    assert script.attention_kernel(SimpleNamespace(**device), np.dtype(dtype), head_size) == kernel


SEVERAL = """
import jax, numpy as np
import train_text_to_image_flax as script
args = script.parse_args({words!r})
folder = script.Path(args.pretrained_model_name_or_path)
models, weights = script.load_models(folder, folder, None)
dataset = script.load_train_dataset(args, ["image_column", "caption_column"], 0)
rows, _ = script.prepare_rows(args, dataset, script.load_tokenizer(folder / "tokenizer"), models, weights, (8, 8, 4))
assert jax.device_count() == 4
np.save({path!r}, np.stack([np.frombuffer(rows[row]["moments"][1], np.float32) for row in range(len(rows))]))
"""


def test_four_devices_encode_what_one_does(flags, tmp_path):
    rows, _ = rows_of(flags)
    other = {**flags, "cache_encodings": tmp_path / "four"}
    code = SEVERAL.format(words=command_line(other), path=str(tmp_path / "moments.npy"))
    result = run_code(code, XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4")
    assert result.returncode == 0, result.stderr
    expected = [np.frombuffer(rows[row]["moments"][1], np.float32) for row in range(8)]
    np.testing.assert_allclose(np.load(tmp_path / "moments.npy"), expected, rtol=1e-5, atol=1e-5)
