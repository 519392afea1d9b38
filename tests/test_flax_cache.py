"""--cache_encodings in JAX, what travels to the devices in an update, and what computes the attention on a GPU."""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import transformers
from conftest import ROOT, command_line
from faults import jax_places, state_of_run
from safetensors.numpy import load_file, save_file
from test_flax_training import SCRIPT, WEIGHTS, after_step, load_models, run_code, same_tensors, train
from test_training import losses_of, unet_of

import train_text_to_image_flax as script


@pytest.fixture
def flags(flags, caption_lists_folder, tmp_path):
    """Nearly all that is drawn for an example; a copy of the images, as some tests change them."""
    images = shutil.copytree(caption_lists_folder, tmp_path / "images")
    flags |= {"train_data_dir": images, "center_crop": True, "random_flip": True, "proportion_empty_prompts": 0.3}
    flags |= {"use_ema": True, "adam_epsilon": 1e-5, "max_train_steps": 4}
    return {**flags, "cache_encodings": tmp_path / "encodings"}


def files_in(flags):
    """The files of encodings, {name: number of rows}."""
    files = flags["cache_encodings"].rglob("*.arrow")
    return {path.name: len(datasets.Dataset.from_file(str(path))) for path in files}


def rows_of(flags):
    """What main trains on: the encoded rows, which are encoded first where they are not there."""
    args = script.parse_args(command_line(flags))
    models, weights = load_models(args.pretrained_model_name_or_path)
    dataset = script.load_rows(args, "train_data_dir", ["image_column", "caption_column"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(f"{args.pretrained_model_name_or_path}/tokenizer")
    (rows,), preprocess = script.prepare_rows(args, [dataset], tokenizer, models, weights)
    return rows, preprocess


def validation_losses(output_dir):
    """Two numbers of every quarter of the timesteps and of all, in the state of checkpoint 4."""
    entries = state_of_run(output_dir / "checkpoint-4")["validation"]
    values = [entry[tag] for entry in entries for tag in entry if tag.startswith("validation_loss")]
    assert len(values) == 10
    return values


def tensors_of(rows, row):
    """The cached tensors of a row, {name: array}, in float32."""
    return safetensors.numpy.load(rows[row]["encodings"])


def folders_in(flags):
    return sorted(flags["cache_encodings"].iterdir())


# What is trained ------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_a_run_without_the_cache(flags, tmp_path, monkeypatch):
    """Up to float32 rounding, for the encoders are compiled apart from the rest; AdamW divides a gradient by its own
    size, so that rounding would be all there is of one near 0, if its epsilon were not above that. The second run from
    the cache encodes nothing. Likewise the loss of held-out rows."""
    flags |= {"validation_rows": 3, "validation_steps": 2, "checkpointing_steps": 4}
    train({**flags, "cache_encodings": None, "output_dir": tmp_path / "plain"})
    compiled, handler = [], logging.Handler()
    handler.emit = lambda record: compiled.extend(re.findall(r"^Compiling jit\((.*?)\) ", record.getMessage()))
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        train({**flags, "output_dir": tmp_path / "first"})
    logging.getLogger("jax").removeHandler(handler)
    # For images, for captions, of which there are 17 in batches of 2, and for held-out rows, which are encoded.
    assert compiled.count("encode") == 3
    files = files_in(flags)
    assert sum(files.values()) == 8
    vocabulary = load_models(flags["pretrained_model_name_or_path"])[0]["text_encoder"].config.vocab_size
    held = []
    after_step(monkeypatch, lambda step: held.append([array.shape for array in jax.live_arrays()]))
    train({**flags, "output_dir": tmp_path / "second", "validation_prompts": ["red dots"], "validation_steps": 2})
    assert files_in(flags) == files
    assert len(held) == 4
    assert not any((vocabulary, 16) in shapes for shapes in held)  # the text encoder's embeddings, also after drawing
    plain, first, second = (unet_of(tmp_path / name) for name in ("plain", "first", "second"))
    assert same_tensors(first, second)
    largest = max((plain[name] - first[name]).abs().max().item() for name in plain)
    print(f"largest difference of a weight: {largest:.1e}")
    assert largest < 1e-5
    np.testing.assert_allclose(losses_of(tmp_path / "plain"), losses_of(tmp_path / "first"), rtol=1e-5)
    plain, first, second = (validation_losses(tmp_path / name) for name in ("plain", "first", "second"))
    assert first == second
    assert plain == pytest.approx(first, rel=1e-6)


def test_flips_captions_and_their_absence_are_drawn_as_without_the_cache(flags):
    rows, preprocess_encoded = rows_of(flags)
    dataset, preprocess_train = rows_of({**flags, "cache_encodings": None})
    models, weights = load_models(flags["pretrained_model_name_or_path"])
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
    models, weights = load_models(flags["pretrained_model_name_or_path"])
    frozen = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), {n: weights[n] for n in script.FROZEN})
    dataset, preprocess = rows_of({**flags, "cache_encodings": None})
    inputs = {name: array[None] for name, array in preprocess(dataset[0], np.random.default_rng(0)).items()}
    for name, array in jax.jit(lambda batch: script.encode(batch, frozen, models, jnp.bfloat16))(inputs).items():
        difference = np.abs(array[0].astype(np.float32) - example[name].astype(np.float32)).max()
        assert difference <= 2**-6 * np.abs(array).max(), name  # the order of sums, in 8 bits


def batches_read(flags, threads):
    """What 60 positions of a run become, in micro-batches of 3."""
    args = SimpleNamespace(train_batch_size=3, dataloader_num_workers=threads)
    return list(script.read_ahead(args, script.ExampleStream(*rows_of(flags), 0), range(60)))


def test_threads_read_the_encodings_that_one_reads(flags):
    one, many = batches_read(flags, 1), batches_read(flags, 8)
    assert len(one) == len(many) == 20
    for batch, other in zip(one, many, strict=True):
        assert batch.keys() == other.keys()
        assert all(np.array_equal(batch[name], other[name]) for name in batch)


@pytest.fixture
def small_chunks(monkeypatch):
    """Files of encodings with every row that may start one."""
    monkeypatch.setattr(script, "CHUNK_ROWS", 1)


# Runs in a process of its own, with a file for each row.
WITH_SMALL_CHUNKS = """
import runpy, sys, types
source = open({path!r}).read().replace("CHUNK_ROWS = 1000", "CHUNK_ROWS = 1")
sys.argv = ["train_text_to_image_flax.py", *{words!r}]
exec(compile(source, {path!r}, "exec"), {{"__name__": "__main__"}})
"""


def launch_two_with_small_chunks(flags, preparation=""):
    """Two processes that encode a file for each row. Returns [`subprocess.CompletedProcess`]."""
    code = preparation + WITH_SMALL_CHUNKS.format(path=str(ROOT / f"{SCRIPT}.py"), words=command_line(flags))
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda place: run_code(code, **place), jax_places()))


def test_two_processes_encode_a_share_each(flags, tmp_path, small_chunks):
    two = {**flags, "max_train_steps": 1, "train_batch_size": 1, "cache_encodings": tmp_path / "shares"}
    results = launch_two_with_small_chunks(two, "import sys\nsys.stderr.isatty = lambda: True\n")  # it shows bars
    for result in results:
        assert result.returncode == 0, result.stderr
        assert re.search("encoding: .*4/4", result.stderr)
    files = files_in(two)
    assert list(files.values()) == [1] * 8
    theirs, _ = rows_of(two)
    assert files_in(two) == files
    ours, _ = rows_of(flags)
    for row in range(8):
        for name, array in tensors_of(ours, row).items():
            np.testing.assert_allclose(tensors_of(theirs, row)[name], array, rtol=1e-4, atol=1e-5)


def test_a_process_that_fails_while_encoding_ends_the_other_which_keeps_what_it_made(flags, tmp_path):
    """Process 1 at its first image."""
    images = flags["train_data_dir"]
    (images / "1.png").write_bytes(b"no picture")
    for result in launch_two_with_small_chunks({**flags, "train_batch_size": 1}):
        assert result.returncode == 1
        assert len(re.findall(r"error: .*1\.png cannot be read", result.stderr)) == 1
        assert "Traceback" not in result.stderr
    assert list(files_in(flags).values()) == [1]


FAILING = """
import os, jax
from datasets import Dataset
def fail(*_, **__):
    raise RuntimeError("no memory is left")
if os.environ["JAX_PROCESS_ID"] == "1":
    Dataset.map = fail
"""


def test_an_error_of_any_kind_in_one_process_while_encoding_ends_both(flags):
    for result in launch_two_with_small_chunks(flags, FAILING):
        assert result.returncode == 1
        assert re.search("error: --cache_encodings: .*no memory is left", result.stderr)


SIGNALLED = """
import os, signal
from datasets import Dataset
encode_all = Dataset.map
def encode_then_signal(*arguments, **options):
    encoded = encode_all(*arguments, **options)
    if os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return encoded
Dataset.map = encode_then_signal
"""


def test_a_signal_to_one_process_while_encoding_stops_both_which_keep_what_they_made(flags):
    results = launch_two_with_small_chunks(flags, SIGNALLED)
    assert [result.returncode for result in results] == [128 + signal.SIGTERM] * 2, results[0].stderr
    assert "stopped by SIGTERM while encoding; the same command resumes" in "".join(r.stderr for r in results)
    assert 2 <= len(files_in(flags)) <= 4


# What is encoded ------------------------------------------------------------------------------------------------------


def test_only_what_has_changed_is_encoded_again(flags, small_chunks):
    """Also if a row is added in the middle."""
    before, _ = rows_of(flags)
    moments = [tensors_of(before, row)["moments"].tobytes() for row in range(8)]
    files, images = files_in(flags), flags["train_data_dir"]
    assert len(files) == 8
    os.utime(images / "3.png", ns=(1, 1))
    after, _ = rows_of(flags)
    assert len(files_in(flags).keys() - files) == 1
    assert [tensors_of(after, row)["moments"].tobytes() for row in range(8)] == moments
    path, files = images / "metadata.jsonl", files_in(flags)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["text"] = ["blue bars", "red", "a picture of a picture"]
    shutil.copy(images / "2.png", images / "2-more.png")
    rows.insert(3, {**rows[2], "file_name": "2-more.png"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    after, _ = rows_of(flags)
    assert len(files_in(flags).keys() - files) == 2
    assert sorted(len(tensors_of(after, row)["text_states"]) for row in range(9)) == [2] * 8 + [3]
    assert len(folders_in(flags)) == 1


def test_chunks_have_a_thousand_rows_on_average_and_an_added_row_changes_one(flags, monkeypatch):
    args = script.parse_args(command_line(flags))
    dataset = script.load_rows(args, "train_data_dir", ["image_column", "caption_column"])

    no_weights = dict.fromkeys(script.FROZEN, ())

    def chunks(rows):
        digests = [hashlib.sha256(str(row).encode()).digest() for row in rows]
        monkeypatch.setattr(script, "row_digests", lambda *_: digests)
        monkeypatch.setattr(type(dataset), "__len__", lambda _: len(digests))
        return {path: last - first for path, first, last in script.list_chunks(args, dataset, [], no_weights)}

    before, after = chunks(range(30_000)), chunks([*range(12_345), -1, *range(12_345, 30_000)])
    assert 500 < 30_000 / len(before) < 2000
    assert len(after.keys() - before) == 1
    assert sum(after.values()) == 30_001


def test_another_model_resolution_or_flip_has_a_folder_of_its_own(flags, tmp_path):
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
    files = files_in(flags)
    rows_of({**flags, "snr_gamma": 5.0, "seed": 3, "train_batch_size": 3})
    assert files_in(flags) == files


def test_encoding_resumes_after_a_signal_and_an_error(flags, small_chunks, monkeypatch):
    """What was encoded before stays, and what a crash has left of a file is cleared away."""
    encode_rows, encoded = script.encode_rows, []

    def counted(*arguments):
        encoded.append(len(arguments[-2]["text"]))
        if len(encoded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(encoded) == 6:
            raise OSError("the disk is gone")
        return encode_rows(*arguments)

    monkeypatch.setattr(script, "encode_rows", counted)
    with pytest.raises(SystemExit) as exit_:
        train(flags)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert len(files_in(flags)) == 3
    (folder,) = folders_in(flags)
    (folder / "tmpold").touch()
    os.utime(folder / "tmpold", (1, 1))
    with pytest.raises(script.RunError, match=r"cannot be encoded to .*: the disk is gone"):
        train(flags)
    assert len(files_in(flags)) == 5
    train(flags)
    assert len(files_in(flags)) == 8
    assert sum(encoded) == 9  # one of them twice
    assert {path.suffix for path in folder.iterdir()} == {".arrow"}


def test_an_image_that_cannot_be_read_is_named_or_left_out(flags):
    (flags["train_data_dir"] / "6.png").write_bytes(b"no picture")
    with pytest.raises(script.RunError, match=r"image .*6\.png cannot be read"):
        train(flags)
    train({**flags, "skip_bad_images": True})
    assert sum(files_in(flags).values()) == 7


def test_an_image_without_a_name_is_named_by_its_row(flags, tmp_path):
    content = (flags["train_data_dir"] / "0.png").read_bytes()
    images = [{"bytes": each, "path": None} for each in (content, content, b"no picture")]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": images, "text": ["red dots"] * 3}, features)
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(script.RunError, match="^image 2 cannot be read"):
        train({**flags, "train_data_dir": None, "dataset_name": tmp_path / "saved"})


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
    """Not to captions of 77 tokens, nor among an odd number of pixels."""
    device, dtype = SimpleNamespace(**device), np.dtype(dtype)
    assert script.attention_kernel(device, dtype, head_size, (4096, 4096)) == kernel
    for lengths in ((4096, 77), (77, 77), (81, 80)):
        assert script.attention_kernel(device, dtype, head_size, lengths) is None


SEVERAL = """
import jax
from test_flax_cache import rows_of
rows_of({flags!r})
assert jax.device_count() == 4
"""


def test_four_devices_encode_what_one_does(flags, tmp_path):
    rows, _ = rows_of(flags)
    other = {**flags, "cache_encodings": tmp_path / "four"}
    code = SEVERAL.format(flags={name: value if value is True else str(value) for name, value in other.items()})
    result = run_code(code, XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4")
    assert result.returncode == 0, result.stderr
    theirs, _ = rows_of(other)
    for row in range(8):
        for name, array in tensors_of(rows, row).items():
            np.testing.assert_allclose(tensors_of(theirs, row)[name], array, rtol=1e-5, atol=1e-5)
