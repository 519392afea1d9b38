"""A Hub that is down, slow or refusing, or that breaks connections off: what is tried again, what is said, what stays.

Uploads are made by runs in this process that have nothing left to train, downloads by `main` in one fresh process for
each script, up to where all is loaded. Nothing waits: `time.sleep` is replaced.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest
from conftest import ROOT, reset_accelerate, run
from hub import Hub

WRITE, READ = "hf_test_write", "hf_test_read"
SD, FLAX = "train_text_to_image", "train_text_to_image_flax"
# The requests of an upload in their order: {name: (method, part of the path)}.
PREPARATION = {"create": ("POST", "/repos/create"), "permission": ("GET", "/auth-check/write")}
UPLOAD = {
    "card": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "file": ("PUT", "/lfs/"),
    "verify": ("POST", "/objects/verify"),
    "commit": ("POST", "/commit/"),
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that `HfApi()` in this process talks to."""
    constants = huggingface_hub.constants
    with Hub() as hub:
        huggingface_hub.close_session()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", os.path.join(hub.home.name, "harnesses.json"))
        with open(constants.AGENT_HARNESSES_PATH, "w") as file:
            file.write('{"standardEnvVars": [], "harnesses": {}}')
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds of every `time.sleep`, which does not sleep."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture(scope="module")
def trained(pipeline_folder, images_folder, tmp_path_factory):
    """A function of a script to the flags of a run that is done, by which nothing is left to do but to upload."""
    done = {}

    def of_script(script):
        if script not in done:
            flags = {"pretrained_model_name_or_path": pipeline_folder, "train_data_dir": images_folder, "seed": 0}
            flags |= {"resolution": 32, "train_batch_size": 2, "max_train_steps": 1, "checkpointing_steps": 1}
            flags["output_dir"] = tmp_path_factory.mktemp("trained") / "my model"
            run(flags, script)
            reset_accelerate()
            done[script] = flags
        return done[script]

    return of_script


@pytest.fixture(params=[SD, FLAX])
def script(request):
    return request.param


@pytest.fixture
def upload(script, trained, tmp_path):
    """The flags of a run that only uploads, and its RunError."""
    flags = {**trained(script), "resume_from_checkpoint": True, "push_to_hub": True, "hub_model_id": "user/tuned"}
    shutil.copytree(flags["output_dir"], tmp_path / "my model")
    return {**flags, "hub_token": WRITE, "output_dir": tmp_path / "my model"}, importlib.import_module(script).RunError


def uploaded_files(folder):
    return {name: data for name, data in files_below(folder).items() if not name.startswith(("checkpoint-", "logs"))}


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def faults(fault, *places, times=sys.maxsize):
    """A function for `Hub.fail`: the first `times` requests at each of the places, (method, part of path), fail."""
    left = dict.fromkeys(places, times)

    def fail(method, path):
        for place in places:
            if method == place[0] and place[1] in path and left[place]:
                left[place] -= 1
                return fault
        return None

    return fail


def requests_at(hub, place):
    return [status for method, path, status in hub.requests if method == place[0] and place[1] in path]


# ----------------------------------------------------------------------------------------------------------------------
# Uploads
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "fault"), [(SD, 500), (SD, "break"), (SD, "lose"), (FLAX, 500)])
def test_an_upload_ends_complete_when_every_request_failed_once(hub, pauses, script, upload, fault, capsys):
    flags, _ = upload
    hub.fail = faults(fault, *UPLOAD.values(), times=1)
    run(flags, script)
    arrived = hub.files("user/tuned")
    assert {name: arrived[name] for name in arrived if name != ".gitattributes"} == uploaded_files(flags["output_dir"])
    assert len(hub.repo("user/tuned").history()) == 2  # a commit whose reply was lost is not made again
    for name, place in UPLOAD.items():
        assert fault in requests_at(hub, place), name  # files go up in parallel: in which order they end is open
    said = capsys.readouterr().err
    assert re.search(r"WARNING .*--push_to_hub.*again in \d+ s", said)
    assert WRITE not in said


@pytest.mark.parametrize(
    ("script", "name", "fault"),
    [*((SD, name, fault) for name in PREPARATION for fault in (401, 403, 500, "break")), (FLAX, "permission", 403)],
)
def test_what_fails_before_the_training_stops_the_run(hub, pauses, upload, script, name, fault):
    """The permission to write is tried then, also of a repository that is there: creating it succeeds for anybody."""
    flags, error = upload
    before = files_below(flags["output_dir"])
    hub.fail = faults(fault, PREPARATION[name])
    with pytest.raises(error, match="^--push_to_hub user/tuned: ") as caught:
        run(flags, script)
    assert "\n" not in str(caught.value)
    assert WRITE not in str(caught.value)
    if isinstance(fault, int):
        assert str(fault) in str(caught.value)
    assert requests_at(hub, PREPARATION[name])[0] == fault
    assert files_below(flags["output_dir"]) == before


def test_a_repository_that_exists_and_cannot_be_written(hub, flags, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("somebody else's")
    hub.add_repo("user/tuned", tmp_path / "model")
    error = importlib.import_module(SD).RunError
    with pytest.raises(error, match="^--push_to_hub user/tuned: "):
        run({**flags, "push_to_hub": True, "hub_model_id": "user/tuned", "hub_token": READ})
    assert not flags["output_dir"].exists()


@pytest.mark.parametrize(
    ("script", "name", "fault"),
    [(SD, "preupload", 403), (SD, "file", "break"), (SD, "commit", 500), (SD, "commit", 403), (FLAX, "commit", 500)],
)
def test_what_lasts_ends_an_upload_with_the_command_that_repeats_it(hub, pauses, script, upload, name, fault):
    """After three tries, with pauses in which a Hub may come back."""
    flags, error = upload
    hub.fail = faults(fault, UPLOAD[name])
    with pytest.raises(error, match="^--push_to_hub") as caught:
        run(flags, script)
    if name == "commit":
        assert requests_at(hub, UPLOAD[name]) == [fault] * 3
        assert sum(pauses) > 60
    line = str(caught.value)
    assert "\n" not in line
    assert WRITE not in line
    command = shlex.split(line[line.index("hf upload") :])
    assert command[:5] == ["hf", "upload", "user/tuned", str(flags["output_dir"]), "."]
    assert hub.files("user/tuned") == {}
    assert (flags["output_dir"] / "model_index.json").is_file()


def test_a_hub_that_is_down(hub, pauses, script, upload, monkeypatch):
    flags, error = upload
    with Hub() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(error, match="^--push_to_hub user/tuned: .*[Cc]onnect"):
        run(flags, script)


def test_offline_mode_is_no_failure_to_wait_for(hub, pauses, script, upload, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    flags, error = upload
    with pytest.raises(error, match="^--push_to_hub user/tuned: .*offline mode"):
        run(flags, script)
    assert pauses == []


# ----------------------------------------------------------------------------------------------------------------------
# Downloads
# ----------------------------------------------------------------------------------------------------------------------

# Runs `main` once for each case (name, fault, method, part of the path, times); with a cache of its own where the name
# does not say "cached". It is refused when all is loaded: the token does not permit to write. Prints {name: RunError}.
DOWNLOADS = """
import importlib, json, os, shutil, sys, time
from hub import Hub

name, folders, flags, cases = json.loads(sys.argv[1])
hub = Hub().__enter__()
os.environ.update(hub.environment("hf_test_read"))
os.environ.update({"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
time.sleep = lambda seconds: None
for repo_id, (folder, repo_type) in folders.items():
    hub.add_repo(repo_id, folder, repo_type)
script = importlib.import_module(name)
found = {}
for case, fault, method, part, times in cases:
    left = [times]
    def fail(m, path):
        if m == method and part in path and left[0]:
            left[0] -= 1
            return tuple(fault) if isinstance(fault, list) else fault
    hub.fail = fail
    if fault == "down":
        hub.server.shutdown()
        hub.server.server_close()
    if "cached" not in case:
        for folder in ("hub", "datasets", "cache"):
            shutil.rmtree(os.path.join(hub.home.name, folder), ignore_errors=True)
    try:
        script.main(script.parse_args([*flags, "--cache_dir", os.path.join(hub.home.name, "cache")]))
    except script.RunError as error:
        found[case] = str(error)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        sys.modules["accelerate.state"].GradientState._reset_state()
print(json.dumps(found))
os._exit(0)
"""
EVER = 10**9
MODEL, DATA = "--pretrained_model_name_or_path user/base: ", "--dataset_name user/pictures: "
# What a line has to tell is in the last place.
CASES = [
    ("a file 500", 500, "GET", ".safetensors", EVER, MODEL + ".*500"),
    ("a file 403", 403, "GET", ".safetensors", EVER, MODEL + ".*403"),
    ("a file broken", "break", "GET", ".safetensors", EVER, MODEL + ".*(peer closed|incomplete|broke)"),
    ("questions 401", 401, "HEAD", "/user/base", EVER, MODEL + ".*401"),
    ("questions dropped", "drop", "HEAD", "/user/base", EVER, MODEL + ".*[Ss]erver disconnected"),
    ("a picture 500", 500, "GET", ".png", EVER, DATA + ".*500"),
    ("the data set 500", 500, "HEAD", "/user/pictures", EVER, DATA + ".*500"),
    ("nothing", None, "GET", "", 0, "--push_to_hub "),
    ("cached, 500", 500, "HEAD", "/", EVER, "--push_to_hub "),
    ("cached, down", "down", "GET", "", 0, "--push_to_hub "),
]


@pytest.fixture(scope="module", params=[SD, FLAX])
def downloads(request, pipeline_folder, images_folder, tmp_path_factory):
    """The RunError that a script's `main` ends with in each of the CASES, {case: str}."""
    folder = tmp_path_factory.mktemp("downloads")
    flags = ["--dataset_name=user/pictures", "--resolution=32", "--train_batch_size=2", "--max_train_steps=1"]
    flags += [f"--output_dir={folder}/output", "--report_to=tensorboard", "--pretrained_model_name_or_path=user/base"]
    flags += ["--push_to_hub", "--hub_model_id=user/tuned"]
    folders = {"user/base": [str(pipeline_folder), "model"], "user/pictures": [str(images_folder), "dataset"]}
    cases = [case[:5] for case in CASES]
    command = [sys.executable, "-c", DOWNLOADS, json.dumps([request.param, folders, flags, cases])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert READ not in result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_failed_download_is_told_as_such(downloads, case):
    """In one line that names the flag and what failed. What is in the cache needs no Hub."""
    assert re.fullmatch(case[-1] + ".*", downloads[case[0]])
