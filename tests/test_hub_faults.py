"""A Hub that is down, slow or refusing, or that breaks connections off: what is tried again, what is said, what stays.

Uploads are made by the scripts' own functions in this process, downloads by `main` in one fresh process for each
script, up to where all is loaded. But for the last test nothing waits: `time.sleep` is replaced.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
from conftest import ROOT, launch
from hub import Hub, Reply

WRITE = "hf_test_write"
PYTORCH = ["train_text_to_image", "train_text_to_image_prior", "train_text_to_image_decoder"]
SCRIPTS = [*PYTORCH, "train_text_to_image_flax"]
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
OF_THE_LIBRARY = {"preupload", "batch", "file", "verify"}  # tried 6 times by huggingface_hub itself
PASSING = [429, 500, 503, "break", "drop", "lose"]
ATTEMPTS = 4


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


@pytest.fixture(params=SCRIPTS)
def script(request, monkeypatch):
    """One of the scripts, with the lines that it warns with in `script.said`."""
    script = importlib.import_module(request.param)
    monkeypatch.setattr(script, "said", [], raising=False)
    monkeypatch.setattr(script.logger, "warning", script.said.append)
    return script


@pytest.fixture
def args(tmp_path):
    """The flags that an upload reads, and a model of a file of each kind."""
    folder = tmp_path / "my model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nbase_model: user/base\n---\n# A model\n")
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    return SimpleNamespace(hub_token=WRITE, hub_model_id="user/tuned", output_dir=str(folder), logging_dir="logs")


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


def told(fault):
    """What a line says of a fault."""
    return f"HTTP {fault} " if isinstance(fault, int) else "no answer from the Hub: "


# ----------------------------------------------------------------------------------------------------------------------
# Uploads
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", PASSING)
def test_an_upload_ends_complete_when_every_request_failed_once(hub, pauses, script, args, tmp_path, fault):
    hub.fail = faults(fault, *PREPARATION.values(), *UPLOAD.values(), times=1)
    repo_id = script.prepare_hub_repository(args)
    script.push_to_hub(args, repo_id)
    assert hub.files("user/tuned") == files_below(tmp_path / "my model")
    assert len(hub.repo("user/tuned").history()) == 2  # a commit whose reply was lost is not made again
    for name, place in {**PREPARATION, **UPLOAD}.items():
        assert requests_at(hub, place)[0] == fault, name
        assert len(requests_at(hub, place)) >= (1 if (fault, name) == ("lose", "commit") else 2), name
    assert len(script.said) == len({**PREPARATION, **UPLOAD}.keys() - OF_THE_LIBRARY)
    for line in script.said:
        assert re.fullmatch(re.escape(told(fault)) + r".*; trying again in [28] s", line)


@pytest.mark.parametrize("name", PREPARATION)
def test_what_lasts_stops_a_run_before_it_trains(hub, pauses, script, args, name):
    for fault in (401, 403, *PASSING):
        hub.requests.clear()
        pauses.clear()
        hub.fail = faults(fault, PREPARATION[name])
        with pytest.raises(script.RunError, match="^--push_to_hub user/tuned: " + told(fault)) as error:
            script.prepare_hub_repository(args)
        passes = fault in PASSING
        assert requests_at(hub, PREPARATION[name]) == [fault] * (ATTEMPTS if passes else 1)
        assert pauses == ([2, 8, 30] if passes else [])
        assert WRITE not in str(error.value) + str(script.said)


@pytest.mark.parametrize("name", UPLOAD)
def test_what_lasts_ends_an_upload_with_the_command_that_repeats_it(hub, pauses, script, args, tmp_path, name):
    repo_id = script.prepare_hub_repository(args)
    before = files_below(tmp_path / "my model")
    # What is lost has been done; and a file that has arrived is not asked about again.
    for fault in (401, 403, *(set(PASSING) - {"lose"} if name != "verify" else ())):
        hub.requests.clear()
        hub.repo("user/tuned").objects.clear()
        script.said.clear()
        hub.fail = faults(fault, UPLOAD[name])
        with pytest.raises(script.RunError, match="^--push_to_hub: " + told(fault)) as error:
            script.push_to_hub(args, repo_id)
        passes = fault in PASSING
        attempts = ATTEMPTS * (6 if name in OF_THE_LIBRARY else 1) if passes else 1
        assert requests_at(hub, UPLOAD[name]) == [fault] * attempts
        assert len(script.said) == (ATTEMPTS - 1 if passes else 0)
        line = str(error.value)
        assert "\n" not in line
        assert WRITE not in line + str(script.said)
        command = shlex.split(line.partition("upload it by: ")[2])
        assert command[:5] == ["hf", "upload", "user/tuned", args.output_dir, "."]
        assert hub.files("user/tuned") == {}
    assert files_below(tmp_path / "my model") == before
    hub.fail = lambda method, path: None
    script.push_to_hub(args, repo_id)
    assert hub.files("user/tuned") == before


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7"}, [7, 8, 30]),
        ({"Retry-After": "7200"}, [300, 300, 300]),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, [2, 8, 30]),
        ({"RateLimit": '"api";r=0;t=55'}, [55, 55, 55]),
        ({"RateLimit": '"api";r=9;t=55'}, [2, 8, 30]),
    ],
)
def test_as_long_as_the_hub_asks_for(hub, pauses, script, args, headers, expected):
    hub.fail = faults(Reply(429, headers=headers), PREPARATION["create"])
    with pytest.raises(script.RunError, match="HTTP 429 Too Many Requests"):
        script.prepare_hub_repository(args)
    assert pauses == expected


def test_a_gateway_that_answers_in_the_place_of_the_hub(hub, pauses, script, args):
    page = Reply(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"})
    hub.fail = faults(page, *PREPARATION.values(), *UPLOAD.values(), times=1)
    script.push_to_hub(args, script.prepare_hub_repository(args))
    assert "model_index.json" in hub.files("user/tuned")


def test_a_hub_that_does_not_answer(hub, pauses, script, args, monkeypatch):
    monkeypatch.setattr(script, "HUB_TIMEOUT", 0.1)
    hub.fail = faults(("slow", 1), PREPARATION["create"])
    started = time.monotonic()
    with pytest.raises(script.RunError, match="^--push_to_hub user/tuned: no answer from the Hub: .*timed out"):
        script.prepare_hub_repository(args)
    assert time.monotonic() - started < 1
    assert pauses == [2, 8, 30]


def test_a_hub_that_is_slow_is_waited_for(hub, pauses, script, args):
    hub.fail = lambda method, path: ("slow", 0.05)
    script.push_to_hub(args, script.prepare_hub_repository(args))
    assert "model_index.json" in hub.files("user/tuned")
    assert script.said == pauses == []


def test_a_hub_that_is_down_and_comes_back(hub, pauses, script, args, monkeypatch):
    constants = huggingface_hub.constants
    with Hub() as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(script.RunError, match="^--push_to_hub user/tuned: no answer from the Hub: .*refused"):
        script.prepare_hub_repository(args)
    assert pauses == [2, 8, 30]
    with pytest.raises(script.RunError, match="^--push_to_hub: no answer from the Hub: .*refused.*; the model is in "):
        script.push_to_hub(args, "user/tuned")


def test_offline_mode_is_no_failure_to_wait_for(hub, pauses, script, args, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(script.RunError, match="^--push_to_hub user/tuned: .*offline mode"):
        script.prepare_hub_repository(args)
    assert pauses == []


def test_what_has_nothing_to_do_with_the_hub_is_not_repeated(pauses, script):
    calls = []

    def broken(path, revision):
        calls.append((path, revision))
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        script.with_retries(broken, "model", revision="main")
    assert calls == [("model", "main")]
    assert pauses == []


# ----------------------------------------------------------------------------------------------------------------------
# Downloads
# ----------------------------------------------------------------------------------------------------------------------

# Runs `main` once for each case (name, fault, method, part of the path, times); with a cache of its own where the name
# does not say "cached". Prints {name: [the RunError, or "" if all was loaded; the warnings]}.
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

class Reached(Exception):
    pass

def reached(*_):
    raise Reached

script.check_images = reached  # the first thing after the models and the data set are loaded
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
    said = []
    script.logger.warning = said.append
    try:
        script.main(script.parse_args([*flags, "--cache_dir", os.path.join(hub.home.name, "cache")]))
    except Reached:
        found[case] = "", said
    except script.RunError as error:
        found[case] = str(error), said
    if times < 9 and fault != "down":
        assert left == [0], (case, left)
print(json.dumps(found))
os._exit(0)
"""
EVER = 10**9
CASES = [
    ("a file 500", 500, "GET", "config.json", 1),
    ("a file broken", "break", "GET", ".safetensors", 1),
    ("a file slow", ["slow", 1.5], "GET", ".safetensors", 1),
    ("a question 429", 429, "HEAD", "/user/", 1),
    ("a question dropped", "drop", "HEAD", "/user/", 1),
    ("a picture 503", 503, "GET", ".png", 1),
    ("the data set 500", 500, "GET", "/api/datasets/", 1),
    ("a file 500 ever", 500, "GET", ".safetensors", EVER),
    ("a file 403 ever", 403, "GET", ".safetensors", EVER),
    ("a file broken ever", "break", "GET", ".safetensors", EVER),
    ("questions 500 ever", 500, "HEAD", "/user/base", EVER),
    ("questions 403 ever", 403, "HEAD", "/user/base", EVER),
    ("questions 401 ever", 401, "HEAD", "/user/base", EVER),
    ("questions dropped ever", "drop", "HEAD", "/user/base", EVER),
    ("a picture 500 ever", 500, "GET", ".png", EVER),
    ("the data set 500 ever", 500, "HEAD", "/user/pictures", EVER),
    ("nothing", None, "GET", "", 0),
    ("cached, 500", 500, "HEAD", "/", EVER),
    ("cached, down", "down", "GET", "", 0),
]


@pytest.fixture(scope="module", params=SCRIPTS)
def downloads(request, pipeline_folder, images_folder, tmp_path_factory):
    """What a script's `main` says in each of the CASES, {case: (RunError or "", warnings)}."""
    name, folder = request.param, tmp_path_factory.mktemp("downloads")
    flags = ["--dataset_name=user/pictures", "--resolution=32", "--train_batch_size=2", "--max_train_steps=1"]
    flags += [f"--output_dir={folder}/output", "--report_to=tensorboard"]
    folders = {"user/base": [str(pipeline_folder), "model"], "user/pictures": [str(images_folder), "dataset"]}
    if name.endswith(("prior", "decoder")):
        tiny.make_kandinsky_prior(folder / "prior")
        tiny.make_kandinsky_decoder(folder / "decoder")
        half = name.rpartition("_")[2]
        other = {"prior": "decoder", "decoder": "prior"}[half]
        folders |= {"user/base": [str(folder / half), "model"], "user/other": [str(folder / other), "model"]}
        flags += [f"--pretrained_{half}_model_name_or_path=user/base"]
        flags += [f"--pretrained_{other}_model_name_or_path=user/other"]
    else:
        flags += ["--pretrained_model_name_or_path=user/base"]
    command = [sys.executable, "-c", DOWNLOADS, json.dumps([name, folders, flags, CASES])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "hf_test_read" not in result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_downloads_go_on_after_a_failure(downloads):
    for case, *_ in CASES:
        if not case.endswith("ever"):
            assert downloads[case][0] == "", case
    assert downloads["nothing"][1] == []
    for case, line in {
        "a file 500": r"HTTP 500 Internal Server Error for /user/.*config.json: Injected failure",
        "a question dropped": r"no answer from the Hub: Server disconnected.*",
        "a picture 503": r"HTTP 503 Service Unavailable for /datasets/user/pictures/.*\.png: Injected failure",
        "the data set 500": r"HTTP 500 Internal Server Error for /api/datasets/user/pictures.*: Injected failure",
    }.items():
        (said,) = downloads[case][1]
        assert re.fullmatch(line + "; trying again in 2 s", said), said


def test_a_failed_download_is_told_as_such(downloads):
    model, data = r"--pretrained_\w+ user/\w+: ", "--dataset_name user/pictures: "
    for case, line, attempts in [
        ("a file 500 ever", model + r"HTTP 500 Internal Server Error for /user/.*\.safetensors: Injected failure", 4),
        ("a file 403 ever", model + r"HTTP 403 Forbidden for /user/.*\.safetensors: Injected failure", 1),
        ("a file broken ever", model + "no answer from the Hub: peer closed connection without .*", 4),
        ("questions 500 ever", model + r"HTTP 500 Internal Server Error for /user/base/.*", 4),
        ("questions 403 ever", model + r"HTTP 403 Forbidden for /user/base/.*", 1),
        ("questions 401 ever", model + r"HTTP 401 Unauthorized for /user/base/.*", 1),
        ("questions dropped ever", model + r"no answer from the Hub: Server disconnected.*", 4),
        ("a picture 500 ever", data + r"HTTP 500 Internal Server Error for /datasets/user/pictures/.*\.png.*", 4),
        ("the data set 500 ever", data + r"HTTP 500 Internal Server Error for /datasets/user/pictures/.*", 4),
    ]:
        error, said = downloads[case]
        assert re.fullmatch(line, error), (case, error)
        assert len(said) == attempts - 1, (case, said)


def test_what_is_in_the_cache_needs_no_hub(downloads):
    assert downloads["cached, 500"][0] == ""
    assert downloads["cached, down"][0] == ""


# ----------------------------------------------------------------------------------------------------------------------
# A whole run
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_outlives_what_passes_and_says_so(flags, tmp_path):
    flags |= {"push_to_hub": True, "hub_model_id": "user/tuned", "max_train_steps": 1, "hub_token": WRITE}
    with Hub() as hub:
        hub.add_repo("user/base", flags["pretrained_model_name_or_path"])
        commit, weights = UPLOAD["commit"], ("GET", ".safetensors")
        hub.fail = faults(500, PREPARATION["create"], commit, weights, times=1)
        result = launch({**flags, "pretrained_model_name_or_path": "user/base"}, **hub.environment())
        assert result.returncode == 0, result.stderr
        assert [requests_at(hub, place)[:2] for place in (PREPARATION["create"], commit)] == [[500, 200]] * 2
        assert "model_index.json" in hub.files("user/tuned")
    assert len(re.findall(r" WARNING HTTP 500 .*; trying again in 2 s$", result.stderr, re.MULTILINE)) == 3
    assert WRITE not in result.stdout + result.stderr
