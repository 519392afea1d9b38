"""Data as users bring it: archives, .txt captions, folders of classes and splits, tables of paths, names with accents.

Each is loaded as the scripts load it, its images are read, and check_data.py is asked about the same files.
"""

import argparse
import io
import itertools
import json
import os
import struct
import time
import unicodedata
import zipfile
import zlib
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from warnings import catch_warnings

import datasets
import forks
import PIL.Image
import pytest
from conftest import ROOT, run

import check_data
import train_text_to_image
from train_text_to_image import RunError, load_rows, read_image, readable_rows, row_digests

NFC, NFD = (unicodedata.normalize(form, "été.png") for form in ("NFC", "NFD"))


def write_images(folder, *names):
    """Write one image per name, whose red says which."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    return folder


def png(red):
    file = io.BytesIO()
    PIL.Image.new("RGB", (32, 32), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_metadata(folder, captions):
    """captions: {file name: caption}"""
    rows = [{"file_name": name, "text": caption} for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


def captioned(folder, *names):
    return write_metadata(write_images(folder, *names), {name: f"caption of {name}" for name in names})


def archive(folder, path):
    """Pack what is in `folder` into the archive `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.rglob("*")):
            file.write(each, each.relative_to(folder))
        file.writestr("__MACOSX/._0.png", b"of a Mac")
    return path.parent


def arguments(flags):
    defaults = {"dataset_name": None, "train_data_dir": None, "dataset_config_name": None, "cache_dir": None}
    defaults |= {
        "image_column": "image",
        "max_train_samples": None,
        "skip_bad_images": False,
        "validation_data_dir": None,
    }
    paths = {name: str(flags[name]) for name in ("dataset_name", "train_data_dir") if flags.get(name)}
    return argparse.Namespace(**{**defaults, "caption_column": "text", **flags, **paths})


def source_flag(args):
    return "dataset_name" if args.dataset_name else "train_data_dir"


def load(captions=True, **flags):
    """What training reads, as [(path or None, red of the image, caption)]. Raises RunError."""
    args = arguments(flags)
    columns = ["image_column", "caption_column"][: 1 + captions]
    dataset = load_rows(args, source_flag(args), columns)
    assert readable_rows(args, dataset) == list(range(len(dataset)))
    assert len(set(row_digests(args, dataset))) == len(dataset)
    rows = [(row[args.image_column], row.get(args.caption_column)) for row in dataset]
    return [(image["path"], read_image(image).getpixel((0, 0))[0], caption) for image, caption in rows]


def check(capsys, **flags):
    """What check_data.py says: (its report, its error or None)."""
    error = None
    try:
        check_data.main(check_data.parse_args([f"--{name}={value}" for name, value in flags.items()]))
    except SystemExit as exit_:
        error = exit_.code
    return capsys.readouterr().out, error


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The lines that were logged."""
    monkeypatch.setattr(train_text_to_image.logger, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


# Archives -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("sub_folder", ["", "deep/"])
def test_images_and_metadata_in_an_archive(tmp_path, capsys, flag, sub_folder):
    captioned(tmp_path / "images" / sub_folder, "0.png", "1.PNG")
    folder = archive(tmp_path / "images", tmp_path / "data" / "train.zip")
    rows = [(number, f"caption of {name}") for number, name in enumerate(["0.png", "1.PNG"])]
    assert [row[1:] for row in load(**{flag: folder})] == rows
    assert [row[1:] for row in load(captions=False, **{flag: folder})] == [(0, None), (1, None)]
    out, error = check(capsys, **{flag: folder}, resolution=32)
    assert out.startswith("2 rows; ")
    assert error is None


def test_a_folder_with_images_and_archives(tmp_path):
    for number in (1, 2):
        captioned(tmp_path / f"images{number}", f"{number}.png")
        archive(tmp_path / f"images{number}", tmp_path / "data" / f"{number}.zip")
    captioned(tmp_path / "data", "0.png")
    assert sorted(row[2] for row in load(train_data_dir=tmp_path / "data")) == [f"caption of {n}.png" for n in range(3)]


@pytest.mark.parametrize("content", ["no archive", "no image", "tar"])
def test_an_archive_that_cannot_be_used_is_named(tmp_path, content):
    folder = tmp_path / "data"
    folder.mkdir()
    if content == "no image":
        (tmp_path / "empty").mkdir()
        archive(tmp_path / "empty", folder / "a.zip")
    else:
        (folder / ("a.tar.gz" if content == "tar" else "a.zip")).write_bytes(b"nothing")
    with pytest.raises(RunError, match="--train_data_dir .*" + "not a zip file" * (content == "no archive")):
        load(train_data_dir=folder)


def reds(paths):
    return [read_image({"bytes": None, "path": path}).getpixel((0, 0))[0] for path in paths]


@pytest.fixture(scope="module")
def large_archive(tmp_path_factory):
    """Paths of 5,000 images in one archive; the red of number k is k % 256."""
    path = tmp_path_factory.mktemp("large") / "data.zip"
    contents = [png(red) for red in range(256)]
    with zipfile.ZipFile(path, "w") as file:
        for number in range(5000):
            file.writestr(f"{number}.png", contents[number % 256])
    return [f"zip://{number}.png::{path}" for number in range(5000)]


def test_processes_and_threads_read_one_archive_at_the_same_time(large_archive):
    shares = [large_archive[first::4][:200] for first in range(4)]
    expected = [[number % 256 for number in range(first, 5000, 4)][:200] for first in range(4)]
    assert reds(large_archive[:1]) == [0]  # the archive is open before the fork
    with get_context("fork").Pool(4) as processes, ThreadPool(4) as threads:
        answer = processes.map_async(reds, shares, chunksize=1)
        assert threads.map(reds, shares, chunksize=1) == expected
        assert answer.get() == expected


def test_the_contents_of_an_archive_are_read_once(large_archive):
    """They take some 0.1 s: read again for each image, 100 of them would take 10 s."""
    assert reds(large_archive[:1]) == [0]
    started = time.monotonic()
    assert reds(large_archive[-100:]) == [number % 256 for number in range(4900, 5000)]
    assert time.monotonic() - started < 3


def test_training_from_an_archive_with_a_cache(flags, tmp_path):
    """The rows keep their digests until the archive changes."""
    captioned(tmp_path / "images", "0.png", "1.png")
    folder = archive(tmp_path / "images", tmp_path / "data" / "train.zip")
    flags |= {"train_data_dir": folder, "center_crop": True, "cache_encodings": tmp_path / "cache"}
    run({**flags, "max_train_steps": 1, "dataloader_num_workers": 2})

    def digests():
        args = arguments(flags)
        return set(row_digests(args, load_rows(args, "train_data_dir", ["image_column", "caption_column"])))

    before = digests()
    assert digests() == before
    captioned(tmp_path / "images", "1.png", "0.png")
    archive(tmp_path / "images", folder / "train.zip")
    assert digests().isdisjoint(before)


# Captions in .txt files and folders of classes ------------------------------------------------------------------------


@pytest.mark.parametrize(("packed", "flag"), [(0, "train_data_dir"), (1, "train_data_dir"), (1, "dataset_name")])
def test_captions_in_text_files(tmp_path, capsys, packed, flag):
    folder = write_images(tmp_path / "images", "0.png", "deep/1.jpg", "deep/two.words.png")
    (folder / "0.txt").write_bytes("\ufeffété,\r\n red dots\r\n".encode())
    (folder / "deep" / "1.txt").write_text("blue bars")
    (folder / "deep" / "two.words.txt").write_text("")
    if flag == "train_data_dir":  # else `datasets` counts endings, and reads texts where they are more than the images
        (folder / "deep" / "notes.txt").write_text("no caption")
    if packed:
        folder = archive(folder, tmp_path / "data" / "images.zip")
    captions = [" ".join(row[2].split()) for row in load(**{flag: folder})]
    assert captions == ["été, red dots", "blue bars", ""]
    out, error = check(capsys, **{flag: folder}, resolution=32)
    assert "1  kept: captions that are empty" in out
    assert error is None


def test_metadata_comes_before_text_files(tmp_path):
    folder = captioned(tmp_path, "0.png")
    (folder / "0.txt").write_text("another")
    assert load(train_data_dir=folder)[0][2] == "caption of 0.png"


def test_a_text_file_that_is_missing_or_in_another_encoding(tmp_path, capsys):
    folder = write_images(tmp_path, "0.png", "1.png")
    (folder / "0.txt").write_text("a")
    with pytest.raises(RunError, match=r"--caption_column text: row 1 is empty, of .*1.png"):
        load(train_data_dir=folder)
    (folder / "1.txt").write_bytes("é".encode("utf-16"))
    with pytest.raises(RunError, match="^/.*/1.txt is not UTF-8: 'utf-8' codec can't decode"):
        load(train_data_dir=folder)
    assert "1.txt is not UTF-8" in check(capsys, train_data_dir=folder)[1]


@pytest.mark.parametrize("names", [["cat/0.png", "dog/1.png"], ["cat/0.png"], ["cat/0.png", "old/dog/1.png"]])
def test_folders_of_classes(tmp_path, capsys, names):
    folder = write_images(tmp_path / "data", *names)
    with pytest.raises(RunError, match="--caption_column text: no such column .*check_data.py"):
        load(train_data_dir=folder)
    assert [row[1] for row in load(captions=False, train_data_dir=folder)] == list(range(len(names)))
    out, error = check(capsys, train_data_dir=folder)
    assert "--write_metadata" in error
    assert "\n" not in error


# check_data.py --write_metadata ---------------------------------------------------------------------------------------


def write(folder, capsys):
    words = [f"--train_data_dir={folder}", "--write_metadata", "--resolution=32"]
    try:
        return check_data.main(check_data.parse_args(words))
    except SystemExit as exit_:
        return exit_.code


def test_metadata_is_written_with_names_as_on_disk(tmp_path, capsys):
    folder = write_images(tmp_path, f"grey_cat/{NFD}", "dog/1.png", "2.png")
    (folder / "2.txt").write_text("red dots")
    assert write(folder, capsys) is None
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {"2.png": "red dots", "dog/1.png": "dog", f"grey_cat/{NFD}": "grey cat"}
    assert {row["file_name"]: row["text"] for row in rows} == names
    assert sorted(row[2] for row in load(train_data_dir=folder)) == sorted(names.values())


@pytest.mark.parametrize("name", ["metadata.jsonl", "deep/metadata.csv"])
def test_metadata_is_never_overwritten(tmp_path, capsys, name):
    folder = write_images(tmp_path, "cat/0.png")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("file_name,text\n")
    assert f"{path} exists" in write(folder, capsys)
    assert path.read_text() == "file_name,text\n"
    assert [each.name for each in folder.rglob("metadata.*")] == [path.name]


def test_no_metadata_is_written_if_a_caption_is_missing(tmp_path, capsys):
    assert "0.png has neither a .txt file nor" in write(write_images(tmp_path / "data", "0.png", "cat/1.png"), capsys)
    folder = write_images(tmp_path / "mixed", "cat/0.png", "cat/1.png")
    (folder / "cat" / "0.txt").write_text("a grey cat")  # so that "cat" is no caption for the other one
    assert "cat/1.png has neither a .txt file nor" in write(folder, capsys)
    (tmp_path / "empty").mkdir()
    assert "there are no images" in write(tmp_path / "empty", capsys)
    assert "a.zip exists (" in write(archive(tmp_path / "data", tmp_path / "packed" / "a.zip"), capsys)
    assert not list(tmp_path.rglob("metadata.*"))


# What is left out -----------------------------------------------------------------------------------------------------


def test_images_that_no_line_names(tmp_path, warnings, capsys):
    folder = captioned(tmp_path, "0.png")
    write_images(folder, "a.png", "b.JPG", "c.png", "deep/d.png", ".hidden.png")
    assert len(load(train_data_dir=folder)) == 1
    names = ", ".join(str(folder / name) for name in ("a.png", "b.JPG", "c.png"))
    assert warnings() == [f"left out 4 images, for tests or without metadata: {names} ..."]
    out, _ = check(capsys, train_data_dir=folder, resolution=32)
    assert f"        4  left out: images that no metadata line names\n           {folder}/a.png\n" in out


def test_images_in_an_archive_that_no_line_names(tmp_path, warnings, capsys):
    write_images(captioned(tmp_path / "images", "0.png"), "1.png")
    folder = archive(tmp_path / "images", tmp_path / "data" / "train.zip")
    assert len(load(train_data_dir=folder)) == 1
    path = f"zip://1.png::{folder}/train.zip"
    assert warnings() == [f"left out 1 images, for tests or without metadata: {path} ..."]
    assert (
        f"1  left out: images that no metadata line names\n           {path}\n"
        in (check(capsys, train_data_dir=folder, resolution=32)[0])
    )


@pytest.mark.parametrize("kind", ["metadata in each", "one metadata", "text files", "archives"])
@pytest.mark.parametrize("other", ["test", "Validation"])
def test_a_train_folder_beside_another(tmp_path, warnings, capsys, kind, other):
    folder = tmp_path / "data"
    names = ["train/0.png", f"{other}/1.png", f"{other}/2.png"]
    match kind:
        case "one metadata":
            captioned(folder, *names)
        case "text files":
            write_images(folder, *names)
            for name in names:
                (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
        case "metadata in each":
            captioned(folder / "train", "0.png")
            captioned(folder / other, "1.png", "2.png")
        case "archives":
            for split, *images in (["train", "0.png"], [other, "1.png", "2.png"]):
                archive(captioned(tmp_path / split, *images), folder / f"{split}.zip")
    ((path, red, _),) = load(train_data_dir=folder)
    assert red == 0
    assert "train" in path
    (line,) = warnings()
    assert line.startswith("left out 2 images, for tests or without metadata: ")
    assert "        2  left out: images for tests\n" in check(capsys, train_data_dir=folder)[0]


def test_a_test_folder_alone_is_not_trained_on(tmp_path):
    with pytest.raises(RunError, match="no images are left to train on"):
        load(train_data_dir=captioned(tmp_path / "test", "0.png").parent)
    assert len(load(train_data_dir=tmp_path / "test")) == 1  # named by the user


def test_the_splits_of_a_data_set_are_its_own(tmp_path, warnings):
    """A row of the split `train` is trained on, whatever its image's folder is called."""
    write_images(tmp_path, "val/0.png", "val/1.png")
    for split, names in {"train": ["val/0.png"], "test": ["val/1.png"]}.items():
        (tmp_path / f"{split}.csv").write_text("image,text\n" + "".join(f"{name},a\n" for name in names))
    files = "\n".join(f"  - {{split: {split}, path: {split}.csv}}" for split in ("train", "test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n")
    assert [row[1] for row in load(dataset_name=tmp_path)] == [0]
    assert warnings() == [f"left out 1 images, for tests or without metadata: {tmp_path}/val/1.png ..."]


def test_a_table_without_rows(tmp_path):
    for values in (["0.png"], [{"bytes": b"", "path": None}]):
        empty = datasets.Dataset.from_dict({"image": values, "text": ["a"]}).select([])
        empty.to_parquet(tmp_path / "train.parquet")
        with pytest.raises(RunError, match="no images are left to train on|--dataset_name .*train"):
            load(dataset_name=tmp_path)


# Columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *itertools.product(["parquet", "saved"], ["bytes", "records", "relative", "absolute"]),
        *itertools.product(["csv", "jsonl"], ["relative", "absolute"]),
    ],
)
def test_an_image_column_of_bytes_or_paths(tmp_path, capsys, kind, values):
    folder = tmp_path / "data"
    images = {
        "bytes": [png(0), png(1)],
        "records": [{"bytes": png(0), "path": "0.png"}, {"bytes": png(1), "path": None}],
        "relative": ["files/0.png", "./files/1.png"],
        "absolute": [str(tmp_path / name) for name in ("0.png", "1.png")],
    }[values]
    write_images(tmp_path, "0.png", "1.png")
    write_images(folder / "files", "0.png", "1.png")
    rows = datasets.Dataset.from_dict({"picture": images, "title": ["a", "b"]})
    match kind:
        case "parquet":
            rows.to_parquet(folder / "train.parquet")
        case "csv":
            rows.to_csv(folder / "train.csv")
        case "jsonl":
            rows.to_json(folder / "train.jsonl")
        case "saved":
            rows.save_to_disk(folder)
    flags = {"dataset_name": folder, "image_column": "picture", "caption_column": "title"}
    assert [row[1:] for row in load(**flags)] == [(0, "a"), (1, "b")]
    out, error = check(capsys, **flags)
    assert out.startswith("2 rows; ")
    assert error is None


def test_a_column_of_neither_images_nor_paths(tmp_path):
    datasets.Dataset.from_dict({"image": ["red dots"], "number": [1], "text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    lines = {"image": "image .*red dots cannot be read", "number": "--image_column number: holds .*cast from int64"}
    for column, line in lines.items():
        with pytest.raises(RunError, match=line):
            load(dataset_name=tmp_path, image_column=column)


@pytest.mark.parametrize(("captions", "text"), [([1, 22], ["1", "22"]), ([[1], [2, 3]], [["1"], ["2", "3"]])])
def test_numbers_are_text(tmp_path, capsys, captions, text):
    folder = write_images(tmp_path, "0.png", "1.png")
    write_metadata(folder, dict(zip(["0.png", "1.png"], captions, strict=True)))
    assert [row[2] for row in load(train_data_dir=folder)] == text
    assert check(capsys, train_data_dir=folder)[1] is None


@pytest.mark.parametrize("in_lists", [False, True])
def test_numbers_of_classes_are_no_text(tmp_path, capsys, in_lists):
    """As text they would be "0" and "1"."""
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(label) if in_lists else label})
    rows = {"image": [{"bytes": png(0), "path": None}] * 2, "text": [[0], [0, 1]] if in_lists else [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(RunError, match=r"--caption_column text: holds .*ClassLabel\(.*, which cannot"):
        load(dataset_name=tmp_path)
    assert f"no column of text but {features['text']}" in check(capsys, dataset_name=tmp_path)[1]


def test_a_row_without_a_path(tmp_path):
    write_images(tmp_path, "0.png")
    datasets.Dataset.from_dict({"image": ["0.png", None], "text": ["a", "b"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(RunError, match="row 1: image .* cannot be read"):
        load(dataset_name=tmp_path)


@pytest.mark.parametrize("caption", ["None", "n/a", ""])
def test_what_a_csv_file_loses(tmp_path, capsys, caption):
    folder = write_images(tmp_path, "0.png", "1.png")
    (folder / "metadata.csv").write_text(f"file_name,text\n0.png,red dots\n1.png,{caption}\n")
    with pytest.raises(RunError, match=r"row 1 is empty, of .*1.png; .csv loses None and n/a"):
        load(train_data_dir=folder)
    out, error = check(capsys, train_data_dir=folder)
    assert "1  refused: rows without a caption (.csv files lose None and n/a)\n           row 1 (1.png)" in out
    assert "refuse 1 of 2" in error


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "named"), [(NFD, NFC), (NFC, NFD)])
@pytest.mark.parametrize("kind", ["folder", "archive", "data set", "sub-folder", "paths"])
def test_names_in_another_form_of_unicode(tmp_path, warnings, written, named, kind):
    folder, flag = write_images(tmp_path / "data", written), "train_data_dir"
    match kind:
        case "archive":
            write_metadata(folder, {named: "a"})
            folder = archive(folder, tmp_path / "packed" / "train.zip")
        case "sub-folder":
            folder = write_images(tmp_path / "deep", f"{written} files/{NFD}")
            write_metadata(folder, {f"{named} files/{NFC}": "a"})
        case "paths":
            datasets.Dataset.from_dict({"image": [named], "text": ["a"]}).to_parquet(folder / "train.parquet")
            flag = "dataset_name"
        case _:
            write_metadata(folder, {named: "a"})
            flag = "dataset_name" if kind == "data set" else flag
    ((path, _, caption),) = load(**{flag: folder})
    assert written in path
    assert caption == "a"
    assert warnings() == []


def test_two_names_that_differ_in_their_form_alone(tmp_path):
    folder = captioned(tmp_path, NFC, NFD)
    if len(list(folder.glob("*.png"))) < 2:
        pytest.skip("this disk takes them for the same")
    assert [row[1:] for row in load(train_data_dir=folder)] == [(0, f"caption of {NFC}"), (1, f"caption of {NFD}")]


@pytest.mark.parametrize("number_of_images", [1, 2])
def test_ordinary_folders_keep_their_fingerprint(tmp_path, number_of_images):
    """Which resumes compare, and which names the cached encodings of data sets that hold their images."""
    folder = captioned(tmp_path / "data", *[f"{number}.png" for number in range(number_of_images)])
    datasets.load_dataset("imagefolder", data_dir=str(folder))["train"].to_parquet(tmp_path / "saved" / "train.parquet")
    files = {"train": f"{folder}/**"}
    undecoded = datasets.Image(decode=False)
    for flag, path in {"train_data_dir": folder, "dataset_name": tmp_path / "saved"}.items():
        by_hand = datasets.load_dataset(
            str(path) if flag == "dataset_name" else "imagefolder",
            **({} if flag == "dataset_name" else {"data_files": files}),
        )["train"]
        by_hand = by_hand.select_columns(["image", "text"]).cast_column("image", undecoded)
        loaded = load_rows(arguments({flag: path}), flag, ["image_column", "caption_column"])
        assert loaded._fingerprint == by_hand._fingerprint


def test_large_images(tmp_path):
    """Pillow warns above 89 million pixels and refuses above 179, both in the words of an attack."""
    side = 13_400
    PIL.Image.new("1", (side, side)).save(tmp_path / "large.png")
    with catch_warnings(action="error"):
        assert read_image({"bytes": None, "path": str(tmp_path / "large.png")}).size == (side, side)


def test_images_above_the_limit(tmp_path):
    """The header is read first: of 1,074 megapixels, which is taken, and of 2,500. Neither warns."""
    for side in (32_769, 50_000):
        PIL.Image.new("1", (8, 8)).save(tmp_path / "large.png")
        content = bytearray((tmp_path / "large.png").read_bytes())
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / "large.png").write_bytes(content)
        code = f"from train_text_to_image import *; read_image({{'bytes': None, 'path': '{tmp_path}/large.png'}})"
        result = forks.run(["-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
        reason = "exceeds limit of 2147483648 pixels" if side == 50_000 else "image file is truncated"
        assert "Warning" not in result.stderr
        assert reason in result.stderr.splitlines()[-1]
        assert "attack" not in result.stderr.splitlines()[-1]
