"""Tests of the loopback server in `hub.py`, driven by the libraries that will talk to it."""

import hashlib
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from hub import Hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

try:
    import httpx2 as httpx  # what huggingface_hub is built on since 2.0
except ModuleNotFoundError:
    import httpx

WEIGHTS = bytes(range(256)) * 40
PICTURE = b"\x89PNG" + bytes(3000)


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """Undoes what huggingface_hub read from the environment at import, and keeps it from asking the real Hub."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    harnesses = tmp_path / "harnesses.json"
    harnesses.write_text('{"standardEnvVars": [], "harnesses": {}}')
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(harnesses))


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        # `HfApi(endpoint=)` does not reach every URL that the client builds.
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_test_write")


@pytest.fixture
def model(tmp_path):
    """A folder with files of both kinds, and some that are to be left out."""
    contents = {
        "README.md": b"---\nbase_model: user/base\n---\n# A model\n",
        "unet/config.json": b"{}",
        "unet/model.safetensors": WEIGHTS,
        "image 0.png": PICTURE,
        "small.bin": b"few",
        "empty.txt": b"",
        "step_1/notes.txt": b"no",
        "checkpoint-10/state.bin": WEIGHTS[1:],
    }
    for path, content in contents.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(content)
    return tmp_path / "model"


def read(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def status(error):
    return error.value.response.status_code


def run(code, environment, folder):
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Users, repositories and permissions
# ----------------------------------------------------------------------------------------------------------------------


def test_whoami_names_the_owner_of_a_known_token(hub, api):
    assert api.whoami()["name"] == "user"
    assert api.whoami(token="hf_test_read")["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as error:
        api.whoami(token="hf_test_unknown")
    assert status(error) == 401
    assert hub.tokens_seen == {"hf_test_write", "hf_test_read", "hf_test_unknown"}


def test_create_repo_once_or_with_exist_ok(hub, api):
    url = api.create_repo("model", private=True)
    assert (url, url.repo_id, url.repo_type) == (f"{hub.url}/user/model", "user/model", "model")
    assert api.repo_info("user/model").private
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        api.create_repo("user/model")
    assert status(error) == 409
    assert api.create_repo("user/model", exist_ok=True).repo_id == "user/model"
    assert [request for request in hub.requests if request[0] == "POST"] == [
        ("POST", "/api/repos/create", 200),
        ("POST", "/api/repos/create", 409),
        ("POST", "/api/repos/create", 409),
    ]


def test_a_dataset_may_have_the_name_of_a_model(hub, api):
    api.create_repo("user/both")
    assert api.create_repo("user/both", repo_type="dataset").repo_type == "dataset"
    api.upload_file(path_or_fileobj=b"a", path_in_repo="data.csv", repo_id="user/both", repo_type="dataset")
    assert hub.files("user/both", "dataset") == {"data.csv": b"a"}
    assert hub.files("user/both") == {}


def test_private_and_missing_repositories_look_alike(api):
    api.create_repo("user/secret", private=True)
    for repo_id in ("user/secret", "user/missing"):
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info(repo_id, token=False)
        assert status(error) == 401
    with pytest.raises(RepositoryNotFoundError) as error:
        api.model_info("user/missing")
    assert status(error) == 404
    assert api.model_info("user/secret", token="hf_test_read").id == "user/secret"


@pytest.mark.parametrize(
    ("token", "repo_id", "kind", "expected"),
    [
        ("hf_test_read", "user/model", HfHubHTTPError, 403),
        ("hf_test_write", "other/model", HfHubHTTPError, 403),
        (False, "user/model", RepositoryNotFoundError, 401),
        ("hf_test_unknown", "user/model", HfHubHTTPError, 401),
    ],
)
def test_writing_without_the_right_to_is_refused(hub, api, model, token, repo_id, kind, expected):
    hub.add_repo(repo_id, model)
    before = hub.files(repo_id)
    with pytest.raises(kind) as error:
        api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=repo_id, token=token)
    assert status(error) == expected
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(repo_id.replace("model", "new"), token=token)
    assert status(error) == expected
    assert hub.files(repo_id) == before
    assert len(hub.repos) == 1


def test_refusals_carry_the_reason(hub, api, model):
    hub.add_repo("user/model", model)
    with pytest.raises(HfHubHTTPError, match="rights to create a model under the namespace"):
        api.create_repo("user/new", token="hf_test_read")
    with pytest.raises(HfHubHTTPError, match="must use a write token"):
        api.upload_folder(repo_id="user/model", folder_path=model, token="hf_test_read")
    # The client falls back on the repository that is there already.
    assert api.create_repo("user/model", token="hf_test_read", exist_ok=True).repo_id == "user/model"


# ----------------------------------------------------------------------------------------------------------------------
# Uploads
# ----------------------------------------------------------------------------------------------------------------------


def test_upload_folder_arrives_byte_for_byte(hub, api, model):
    api.create_repo("user/model")
    ignored = ["step_*", "checkpoint-*"]
    commit = api.upload_folder(repo_id="user/model", folder_path=model, ignore_patterns=ignored, commit_message="End")

    sent = {path: content for path, content in read(model).items() if not path.startswith(("step_", "checkpoint-"))}
    assert hub.files("user/model") == sent
    assert len(sent) == 6
    lfs = {entry.path for entry in api.list_repo_tree("user/model", recursive=True) if getattr(entry, "lfs", None)}
    assert lfs == {"unet/model.safetensors", "image 0.png"}
    assert [(method, code) for method, path, code in hub.requests if path.startswith("/lfs/")] == [("PUT", 200)] * 2
    assert [(c.title, c.commit_id) for c in api.list_repo_commits("user/model")][0] == ("End", commit.oid)
    assert api.model_info("user/model").sha == commit.oid


def test_a_second_upload_commits_what_changed(hub, api, model):
    api.create_repo("user/model")
    first = api.upload_folder(repo_id="user/model", folder_path=model).oid
    assert api.upload_folder(repo_id="user/model", folder_path=model).oid == first

    (model / "unet/model.safetensors").write_bytes(WEIGHTS[::-1])
    second = api.upload_folder(repo_id="user/model", folder_path=model, delete_patterns="small.*").oid
    assert hub.files("user/model")["unet/model.safetensors"] == WEIGHTS[::-1]
    assert hub.files("user/model", revision=first)["unet/model.safetensors"] == WEIGHTS
    assert [c.commit_id for c in api.list_repo_commits("user/model")[:2]] == [second, first]
    assert [c.id for c in hub.repo("user/model").history()][:2] == [second, first]
    assert sum(path.startswith("/lfs/") for _, path, _ in hub.requests) == 4


def test_deletions(hub, api, model):
    hub.add_repo("user/model", model)
    api.delete_folder("unet", repo_id="user/model")
    api.create_commit("user/model", [CommitOperationDelete("small.bin")], commit_message="Delete")
    assert set(hub.files("user/model")) == set(read(model)) - {
        "unet/config.json",
        "unet/model.safetensors",
        "small.bin",
    }
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("small.bin", repo_id="user/model")


def test_uploads_to_a_branch_leave_main_alone(hub, api):
    api.create_repo("user/model")
    api.create_branch("user/model", branch="try/1")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="a.bin", repo_id="user/model", revision="try/1")
    assert hub.files("user/model", revision="try/1") == {"a.bin": WEIGHTS}
    assert hub.files("user/model") == {}
    assert {branch.name for branch in api.list_repo_refs("user/model").branches} == {"main", "try/1"}
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch("user/model", branch="try/1")
    assert status(error) == 409
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="user/model", revision="missing")
    with pytest.raises(RevisionNotFoundError):  # a commit is no branch
        commit = api.model_info("user/model").sha
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="user/model", revision=commit)


def test_pull_requests_are_refused(hub, api):
    api.create_repo("user/model")
    with pytest.raises(HfHubHTTPError, match="pull requests"):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="user/model", create_pr=True)
    assert hub.files("user/model") == {}


def test_lfs_contents_are_checked(hub, api, monkeypatch):
    api.create_repo("user/model")
    upload = {"path_or_fileobj": WEIGHTS, "path_in_repo": "a.bin", "repo_id": "user/model"}
    with monkeypatch.context() as patch:
        # The client believes that it has uploaded the content.
        patch.setattr("huggingface_hub._commit_api._upload_lfs_files", lambda **_: None)
        with pytest.raises(BadRequestError, match="was not uploaded"):
            api.upload_file(**upload)
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    for name, content, expected in ((oid, WEIGHTS[:-1], 400), ("0" * 64, WEIGHTS, 403)):
        put = urllib.request.Request(f"{hub.url}/lfs/model/user/model/{name}", content, method="PUT")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(put)
        assert error.value.code == expected
    assert hub.files("user/model") == {}
    api.upload_file(**upload)
    assert hub.files("user/model") == {"a.bin": WEIGHTS}


def test_a_commit_on_an_old_parent_is_refused(hub, api):
    api.create_repo("user/model")
    old = api.model_info("user/model").sha
    api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="user/model", parent_commit=old)
    add = CommitOperationAdd("b.txt", b"b")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit("user/model", [add], commit_message="b", parent_commit=old)
    assert status(error) == 412
    assert hub.files("user/model") == {"a.txt": b"a"}


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [("tags: [a", "Invalid YAML"), ("base_model: /home/me/models/sd", 'value "/home/me/models/sd" is not valid')],
)
def test_a_card_with_bad_metadata_is_refused_before_anything_is_sent(hub, api, model, metadata, problem):
    api.create_repo("user/model")
    (model / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    with pytest.raises(ValueError, match=problem):
        api.upload_folder(repo_id="user/model", folder_path=model)
    assert hub.files("user/model") == {}
    assert not any("preupload" in path for _, path, _ in hub.requests)


def test_a_commit_checks_the_card_again(hub, api, monkeypatch):
    api.create_repo("user/model")
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
    card = b"---\ndatasets: [/home/me/pictures]\n---\n"
    with pytest.raises(BadRequestError, match='value "/home/me/pictures" is not valid'):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="user/model")
    assert hub.files("user/model") == {}


def test_a_card_without_metadata_is_warned_about(hub, api):
    api.create_repo("user/model")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# A model", path_in_repo="README.md", repo_id="user/model")
    assert hub.files("user/model") == {"README.md": b"# A model"}


# ----------------------------------------------------------------------------------------------------------------------
# Downloads
# ----------------------------------------------------------------------------------------------------------------------


def test_a_snapshot_holds_what_was_seeded(hub, api, model, tmp_path):
    commit = hub.add_repo("user/model", model)
    everything = Path(api.snapshot_download("user/model", cache_dir=tmp_path / "cache"))
    assert everything.name == commit
    assert read(everything) == read(model)
    part = Path(api.snapshot_download("user/model", cache_dir=tmp_path / "part", allow_patterns="unet/*"))
    assert set(read(part)) == {"unet/config.json", "unet/model.safetensors"}


def test_listings(hub, api, model):
    hub.add_repo("user/model", model)
    top = {"README.md", "empty.txt", "image 0.png", "small.bin"}
    assert {e.path for e in api.list_repo_tree("user/model")} == top | {"unet", "step_1", "checkpoint-10"}
    assert {e.path for e in api.list_repo_tree("user/model", "unet")} == {"unet/config.json", "unet/model.safetensors"}
    assert [e.path for e in api.get_paths_info("user/model", ["small.bin", "unet", "missing"])] == ["small.bin", "unet"]
    assert api.list_repo_files("user/model") == sorted(read(model))
    assert {(s.rfilename, s.size) for s in api.model_info("user/model").siblings} == {(p, None) for p in read(model)}
    info = api.model_info("user/model", files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings} == {path: len(content) for path, content in read(model).items()}
    assert {s.lfs.sha256 for s in info.siblings if s.lfs} == {
        hashlib.sha256(content).hexdigest() for content in (WEIGHTS, WEIGHTS[1:], PICTURE)
    }


def test_revisions(hub, api, model, tmp_path):
    first = hub.add_repo("user/model", model)
    (model / "unet/config.json").write_text('{"a": 1}')
    second = hub.add_repo("user/model", model, revision="fp16")
    assert [commit.id for commit in hub.repo("user/model").history("fp16")][:2] == [second, first]
    for revision, content in {"main": "{}", first: "{}", "fp16": '{"a": 1}', second: '{"a": 1}'}.items():
        path = api.hf_hub_download("user/model", "unet/config.json", revision=revision, cache_dir=tmp_path / "cache")
        assert Path(path).read_text() == content
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("user/model", "unet/config.json", revision="missing", cache_dir=tmp_path / "cache")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("user/model", "missing.json", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("bytes=10-19", WEIGHTS[10:20]),
        ("bytes=10000-", WEIGHTS[10000:]),
        ("bytes=-5", WEIGHTS[-5:]),
        ("bytes=10230-20000", WEIGHTS[10230:]),
    ],
)
def test_parts_of_a_file(hub, model, wanted, expected):
    hub.add_repo("user/model", model)
    url = f"{hub.url}/user/model/resolve/main/unet/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": wanted})) as response:
        assert (response.status, response.read()) == (206, expected)
    with pytest.raises(urllib.error.HTTPError, match="416"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=10240-"}))


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def once(fault, method, part):
    """Fails the first request of a method to a path that contains a part."""
    left = [fault]
    return lambda m, path: left.pop() if left and m == method and part in path else None


def test_a_download_goes_on_where_the_connection_broke(hub, api, model, tmp_path):
    # The client keeps whole chunks of 10 MiB; half of this file is more than one.
    weights = WEIGHTS * 2400
    (model / "unet/model.safetensors").write_bytes(weights)
    hub.add_repo("user/model", model)
    hub.fail = once("break", "GET", "/resolve/")
    path = api.hf_hub_download("user/model", "unet/model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == weights
    assert [code for method, path, code in hub.requests if method == "GET" and "/resolve/" in path] == ["break", 206]


def test_an_upload_is_sent_again_when_the_connection_broke(hub, api):
    api.create_repo("user/model")
    hub.fail = once("break", "PUT", "/lfs/")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="a.bin", repo_id="user/model")
    assert hub.files("user/model") == {"a.bin": WEIGHTS}
    assert [code for method, _, code in hub.requests if method == "PUT"] == ["break", 200]


def test_a_commit_that_breaks_changes_nothing(hub, api):
    api.create_repo("user/model")
    hub.fail = once("break", "POST", "/commit/")
    with pytest.raises(httpx.TransportError):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="user/model")
    assert hub.files("user/model") == {}
    assert hub.requests[-1] == ("POST", "/api/models/user/model/commit/main", "break")


def test_an_injected_status_is_what_the_client_sees(hub, api):
    api.create_repo("user/model")
    hub.fail = once(500, "GET", "/api/models/")
    with pytest.raises(HfHubHTTPError, match="Injected failure") as error:
        api.model_info("user/model")
    assert status(error) == 500
    assert api.model_info("user/model").id == "user/model"


# ----------------------------------------------------------------------------------------------------------------------
# Clients that are told nothing but their environment
# ----------------------------------------------------------------------------------------------------------------------


def test_the_environment_hides_that_of_the_machine(monkeypatch):
    local = {"HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE", "https_proxy"}
    for name in local | {"OTHER"}:
        monkeypatch.setenv(name, "of the machine")
    with Hub() as hub:
        environment = hub.environment()
        assert not local & set(environment)
        assert environment["OTHER"] == "of the machine"
        assert hub.environment("hf_test_read")["HF_TOKEN"] == "hf_test_read"
        home = Path(environment["HF_HOME"])
        assert home.is_dir() and not any(home.iterdir())
    assert not home.exists()


def test_other_owners_and_tokens():
    with Hub(tokens={"hf_test_me": "write"}, user="me") as hub:
        api = HfApi(endpoint=hub.url)
        assert api.create_repo("model", token="hf_test_me").repo_id == "me/model"
        with pytest.raises(HfHubHTTPError):
            api.whoami(token="hf_test_write")


DATASETS = """
import json
from pathlib import Path
from datasets import Dataset, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from PIL import Image as Picture

folder = Path("shapes/train")
folder.mkdir(parents=True)
lines = []
for index, colour in enumerate(("red", "blue")):
    Picture.effect_noise((64, 64), 90).convert("RGB").save(folder / f"{index}.png")
    lines.append(json.dumps({"file_name": f"{index}.png", "text": colour}))
(folder / "metadata.jsonl").write_text("\\n".join(lines))
hub_pixels = lambda data: [image.tobytes() for image in data["image"]]

HfApi().create_repo("user/folder", repo_type="dataset")
HfApi().upload_folder(repo_id="user/folder", folder_path="shapes", repo_type="dataset")
data = load_dataset("user/folder", split="train")
assert data["text"][:] == ["red", "blue"], data["text"][:]
pixels = [Picture.open(folder / f"{index}.png").tobytes() for index in range(2)]
assert hub_pixels(data) == pixels

Dataset.from_dict(
    {"image": [str(folder / "1.png")], "text": ["blue"]}, Features({"image": Image(), "text": Value("string")})
).push_to_hub("user/parquet", private=True)
data = load_dataset("user/parquet", split="train")
assert data["text"][:] == ["blue"]
assert hub_pixels(data) == pixels[1:]
for hidden in ("other/secret", "other/missing"):
    try:
        load_dataset(hidden)
        raise SystemExit(f"{hidden} was loaded")
    except DatasetNotFoundError:
        pass
"""


def test_load_dataset_from_an_imagefolder_and_from_parquet(hub, model, tmp_path):
    hub.add_repo("other/secret", model, repo_type="dataset", private=True)
    run(DATASETS, hub.environment("hf_test_write"), tmp_path)
    assert hub.files("user/folder", "dataset") == read(tmp_path / "shapes")
    assert {"README.md", "data/train-00000-of-00001.parquet"} == set(hub.files("user/parquet", "dataset"))
    assert not [request for request in hub.requests if request[2] not in (200, 206, 401, 404)]


PIPELINE = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

torch.manual_seed(0)
small = dict(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4)
blocks = dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)
pipelines = [DDPMPipeline(UNet2DModel(**small, **blocks), DDPMScheduler()) for _ in range(2)]
pipelines[0].save_pretrained("local", push_to_hub=True, repo_id="user/model")
pipelines[1].save_pretrained("variant", variant="fp16")
from huggingface_hub import HfApi
HfApi().create_branch("user/model", branch="half")
HfApi().upload_folder(repo_id="user/model", folder_path="variant", revision="half")

same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.unet.parameters(), b.unet.parameters(), strict=True))
assert not same(*pipelines)
assert same(DDPMPipeline.from_pretrained("user/model"), pipelines[0])
assert same(DDPMPipeline.from_pretrained("user/model", revision="half", variant="fp16"), pipelines[1])
assert same(DDPMPipeline.from_pretrained("user/model", revision="half"), pipelines[0])
try:
    UNet2DModel.from_pretrained("user/model", subfolder="unet", variant="fp16")
    raise SystemExit("main has no such variant")
except OSError:
    pass
"""


def test_pipelines_are_pushed_and_loaded(hub, tmp_path):
    run(PIPELINE, hub.environment("hf_test_write"), tmp_path)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files("user/model")[weights] == (tmp_path / "local" / weights).read_bytes()
    assert hub.tokens_seen == {"hf_test_write"}
