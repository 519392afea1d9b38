"""check_data.py: its report and exit status, and that training refuses exactly what it says training would refuse."""

import ast
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys

import datasets
import PIL.Image
import pytest
import tiny
from conftest import ROOT, launch, run

import check_data

SD, DECODER = "train_text_to_image", "train_text_to_image_decoder"
NASTY = '3 "it\'s"\n\x1b[31m.png'  # as a file's name it would break the line, and colour what follows


def check(capsys, **flags):
    """Run check_data.py in this process. Returns the exit status, stdout and the line of the error or None."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    try:
        error = check_data.main(check_data.parse_args(words))
    except SystemExit as exit_:
        error = exit_.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert error is None or "\n" not in error
    return int(error is not None), out, error


def write_image(path, width=64, height=64):
    PIL.Image.effect_noise((width, height), 50).convert("RGB").save(path)


def write_rows(folder, captions):
    """Write images 0.png, 1.png, ... and their captions; ... stands for no entry at all."""
    folder.mkdir(exist_ok=True)
    rows = [{"file_name": f"{row}.png", "text": text} for row, text in enumerate(captions)]
    for row in rows:
        write_image(folder / row["file_name"])
    rows = [{name: value for name, value in row.items() if value is not ...} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The report -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def defects(tmp_path):
    """A folder with every defect at once."""
    captions = ["red dots", "blue bars", "green bars", "grey bars", "  ", "dots " * 100, None, ...]
    folder = write_rows(tmp_path / "data", captions)
    write_image(folder / "1.png", 200, 50)  # the crop keeps a quarter
    write_image(folder / "2.png", 30, 24)
    (folder / "3.png").unlink()
    (folder / NASTY).write_bytes(b"no picture")
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"3.png"', json.dumps(NASTY)))
    (folder / "more").mkdir()
    for name in ("extra.JPG", "more/a.png", ".hidden.png"):
        write_image(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("captions", [True, False])
def test_the_report_names_every_defect(defects, pipeline_folder, captions, capsys):
    before = files_below(defects)
    flags = {} if captions else {"caption_column": ""}
    status, out, error = check(capsys, train_data_dir=defects, resolution=48, tokenizer=pipeline_folder, **flags)
    nasty = str(defects / NASTY).replace("\n", r"\n").replace("\x1b", r"\x1b")
    cut = "        1  cut: captions of more than 77 tokens\n           row 5 (5.png): 102\n"
    empty = "        1  kept: captions that are empty\n           row 4 (4.png)\n"
    missing = "        2  refused: rows without a caption (.csv files lose None and n/a)\n"
    missing += "           row 6 (6.png)\n           row 7 (7.png)\n"
    # Of 7 images that can be read, one loses three quarters and one a fifth.
    report = f"""\
8 rows; the square crop takes {(0.75 + 0.2) / 7:.1%} of an image on average, 75.0% at most
{cut if captions else ""}\
        1  enlarged: images smaller than 48 pixels
           row 2 (2.png): 30 x 24
{empty if captions else ""}\
        2  left out: images that no metadata line names
           {defects}/extra.JPG
           {defects}/more/a.png
        1  refused: images that cannot be read
           row 3: image {nasty} cannot be read: REASON
{missing if captions else ""}"""
    assert re.sub("(?<=cannot be read: )cannot identify .*", "REASON", out) == report
    assert status == 1
    assert error == f"error: training would refuse {3 if captions else 1} of 8 rows"
    assert files_below(defects) == before


def test_captions_without_an_image(tmp_path, capsys):
    for name in ("0.png", "1.png"):
        write_image(tmp_path / name)
    for name in ("0.txt", "1.txt", "2.txt"):
        (tmp_path / name).write_text("dots")
    (tmp_path / "2.heic").write_bytes(b"not read")
    status, out, _ = check(capsys, train_data_dir=tmp_path, resolution=32)
    assert status == 0
    said = "left out: .txt files without an image (.heic and .avif are not read)"
    assert out.splitlines()[1:] == [f"        1  {said}", f"           {tmp_path}/2.txt"]


def test_every_image_is_left_out(tmp_path, capsys):
    (tmp_path / "test").mkdir()
    write_image(tmp_path / "test" / "0.png")
    status, out, error = check(capsys, train_data_dir=tmp_path, resolution=32, caption_column="")
    assert (status, error) == (1, "error: training would refuse all of 0 rows")
    assert f"left out: images for tests\n           {tmp_path}/test/0.png" in out


def test_the_cause_of_a_library_s_error_is_named(tmp_path, capsys):
    write_image(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": str(tmp_path / "0.png"), "text": "dots"}) + "\n")
    status, _, error = check(capsys, train_data_dir=tmp_path, resolution=32)
    assert status == 1
    assert "`file_name` must be a relative path" in error


def test_a_name_that_the_console_cannot_print(tmp_path):
    write_image(tmp_path / "日本.png", 20, 20)
    (tmp_path / "日本.txt").write_text("dots")
    command = [sys.executable, ROOT / "check_data.py", "--train_data_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert r"row 0 (\u65e5\u672c.png)" in done.stdout


def test_of_many_findings_five_are_named(images_folder, capsys):
    status, out, _ = check(capsys, train_data_dir=images_folder)  # at the default resolution of 512
    assert status == 0
    _, enlarged, *rows = out.splitlines()
    assert enlarged == "        8  enlarged: images smaller than 512 pixels"
    assert [row.split()[:2] for row in rows] == [["row", str(number)] for number in range(5)]


def test_lists_of_captions_are_read_one_by_one(tmp_path, pipeline_folder, capsys):
    folder = write_rows(tmp_path / "data", [["red dots", "", "dots " * 80], ["dots " * 90, " "]])
    status, out, _ = check(capsys, train_data_dir=folder, resolution=32, tokenizer=pipeline_folder / "tokenizer")
    assert status == 0
    assert "2  cut: captions of more than 77 tokens" in out
    assert "2  kept: captions that are empty" in out


@pytest.mark.parametrize("kind", ["saved dict", "saved split", "parquet", "folder"])
def test_a_local_copy_of_a_data_set(kind, images_folder, tmp_path, capsys):
    if kind != "folder":
        images = datasets.load_dataset("imagefolder", data_files={"train": str(images_folder / "**")})
    match kind:
        case "saved dict":
            images.save_to_disk(tmp_path)
        case "saved split":
            images["train"].save_to_disk(tmp_path)
        case "parquet":
            images["train"].to_parquet(tmp_path / "train.parquet")
    name = images_folder if kind == "folder" else tmp_path
    status, out, _ = check(capsys, dataset_name=name, resolution=64)
    assert status == 0
    assert out.startswith("8 rows; ")
    assert "8  enlarged: images smaller than 64 pixels" in out


@pytest.mark.parametrize("name", ["images", "nothing", "no/such-model"])
def test_a_tokenizer_that_is_not_there(name, images_folder, tmp_path, capsys):
    """transformers gives an empty one without an error."""
    path = {"images": images_folder, "nothing": tmp_path / "nothing"}.get(name, name)
    status, out, error = check(capsys, train_data_dir=images_folder, tokenizer=path)
    assert (status, out) == (1, "")
    assert str(path) in error


# As training does -----------------------------------------------------------------------------------------------------


def bad_image(folder):
    write_rows(folder, ["red dots"] * 3)
    (folder / "1.png").write_bytes(b"no picture")


def image_that_is_not_there(folder):
    write_rows(folder, ["red dots"] * 3)
    (folder / "1.png").unlink()


def image_outside(folder):
    write_rows(folder, ["red dots"] * 3)
    write_image(folder.parent / "outside.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "../outside.png", "text": "grey dots"}\n')


def no_metadata(folder):
    write_rows(folder, ["red dots"] * 3)
    (folder / "metadata.jsonl").unlink()


def broken_metadata(folder):
    write_rows(folder, ["red dots"] * 3)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text"\n')


def text_alone(folder):
    folder.mkdir()
    (folder / "0.txt").write_text("red dots")


def no_training_split(folder):
    rows = datasets.Dataset.from_dict({"text": ["red dots"]})
    datasets.DatasetDict(test=rows).save_to_disk(folder)


REFUSED = {  # {input: (function of a folder that makes it, flags)}
    "bad image": (bad_image, {}),
    "image that is not there": (image_that_is_not_there, {}),
    "image outside": (image_outside, {}),
    "bad image in a saved data set": (lambda folder: tiny.save_rows(folder, 4, bad=2), {"dataset_name": ...}),
    "no training split": (no_training_split, {"dataset_name": ...}),
    "caption None": (lambda folder: write_rows(folder, ["red dots", None]), {}),
    "missing caption": (lambda folder: write_rows(folder, ["red dots", ...]), {}),
    "empty list": (lambda folder: write_rows(folder, [["red dots"], []]), {}),
    "None in a list": (lambda folder: write_rows(folder, [["red dots"], ["grey dots", None]]), {}),
    "numbers and text": (lambda folder: write_rows(folder, [1, "red dots"]), {}),
    "no such caption column": (tiny.make_images, {"caption_column": "nothing"}),
    "captions for images": (tiny.make_images, {"image_column": "text"}),
    "images for captions": (tiny.make_images, {"caption_column": "image"}),
    "no metadata": (no_metadata, {}),
    "broken metadata": (broken_metadata, {}),
    "empty folder": (lambda folder: folder.mkdir(), {}),
    "text alone": (text_alone, {}),
    "no such folder": (lambda folder: None, {}),
    "no such data set": (lambda folder: None, {"dataset_name": "no/such-images"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_refuses_what_is_said_to_be_refused(name, flags, tmp_path, capsys):
    make, data = REFUSED[name]
    make(tmp_path / "data")
    data = {flag: tmp_path / "data" if value is ... else value for flag, value in data.items()}
    if "dataset_name" not in data:
        data["train_data_dir"] = tmp_path / "data"
    status, _, error = check(capsys, resolution=32, **data)
    assert status == 1
    assert error.startswith("error: ")
    module = importlib.import_module(SD)
    with pytest.raises(module.RunError):
        run({**flags, "train_data_dir": None, **data}, SD)
    assert not flags["output_dir"].exists()


def test_training_takes_what_is_said_to_be_taken(flags, tmp_path, pipeline_folder, capsys):
    folder = write_rows(tmp_path / "data", ["red dots", "", "dots " * 100])
    write_image(folder / "1.png", 20, 10)
    write_image(folder / "extra.png")
    status, out, _ = check(capsys, train_data_dir=folder, resolution=32, tokenizer=pipeline_folder)
    assert status == 0
    kinds = ["cut", "enlarged", "kept", "left out"]
    assert [line.split(maxsplit=1)[1].partition(":")[0] for line in out.splitlines() if line[8:9].isdigit()] == kinds
    run({**flags, "train_data_dir": folder, "max_train_steps": 1})


@pytest.mark.parametrize("make", [bad_image, no_metadata, image_outside])
def test_the_decoder_trains_without_captions(make, folders, flags, tmp_path, capsys):
    make(tmp_path / "data")
    data = {"train_data_dir": tmp_path / "data", "resolution": 32}
    status, _, _ = check(capsys, **data, caption_column="")
    flags = {**flags, **folders[DECODER], **data, "max_train_steps": 1, "pretrained_model_name_or_path": None}
    if make is no_metadata:
        assert status == 0
        run(flags, DECODER)
    else:
        assert status == 1
        with pytest.raises(importlib.import_module(DECODER).RunError):
            run(flags, DECODER)


def test_data_is_read_by_the_same_functions():
    def functions(path, names):
        text = path.read_text()
        nodes = {getattr(node, "name", None): node for node in ast.parse(text).body}
        return {name: ast.get_source_segment(text, nodes[name]) for name in names}

    shared = ["place_images", "read_caption", "read_image"]
    scripts = sorted(ROOT.glob("train_text_to_image*.py"))
    assert len(scripts) >= 4
    own = functions(ROOT / "check_data.py", shared)
    assert [script.name for script in scripts if functions(script, shared) != own] == []


# The command ----------------------------------------------------------------------------------------------------------


def test_it_needs_no_torch(images_folder, pipeline_folder):
    """Nor any other framework, with a tokenizer either."""
    code = """if True:
        import atexit, runpy, sys
        atexit.register(lambda: print({"torch", "jax", "tensorflow", "diffusers"} & sys.modules.keys()))
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    code = code.replace("sys.argv[0]", repr(str(ROOT / "check_data.py")))
    words = [f"--train_data_dir={images_folder}", f"--tokenizer={pipeline_folder}", "--resolution=32"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=100)
    assert result.stdout.splitlines()[0].startswith("8 rows; ")
    assert result.stdout.splitlines()[-1] == "set()"
    assert "8/8" in result.stderr  # the progress bar
    assert "images/s" in result.stderr


@pytest.mark.parametrize("flags", [{}, {"train_data_dir": "x", "resolution": 0}, {"train_data_dir": "x", "size": 1}])
def test_a_wrong_flag_has_status_2(flags):
    result = launch(flags, script="check_data")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("check_data.py: error: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a file that blocks its reader")
def test_ctrl_c_ends_it_at_once(tmp_path):
    folder = write_rows(tmp_path / "data", ["red dots"] * 3)
    (folder / "1.png").unlink()
    os.mkfifo(folder / "1.png")
    command = [sys.executable, str(ROOT / "check_data.py"), f"--train_data_dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        before = ""
        while "images/s" not in before:
            before += process.stderr.read(1)
        for _ in range(20):  # Python may miss one between its look for signals and a wait
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
                break
        process.kill()  # else a process that hangs would be waited for
        out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "stopped before the last row"
    assert "Traceback" not in err
