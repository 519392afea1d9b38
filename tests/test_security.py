"""What must not get out, and what must not get in: the access token, hostile text, and code that came with the data."""

import ast
import base64
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path
from urllib.parse import quote

import huggingface_hub
import PIL.Image
import pyarrow
import pytest
import tiny
import yaml
from conftest import IMPATIENT, ROOT, command_line, reset_accelerate, run
from hub import Hub
from markdown_it import MarkdownIt
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import metadata as hparams

SUFFIXES = ("", "_sdxl", "_prior", "_decoder", "_flax")
SD, SDXL, PRIOR, DECODER, FLAX = SCRIPTS = [f"train_text_to_image{suffix}" for suffix in SUFFIXES]
TOKEN = "hf_Zq+7/Lw=9%Xk"  # a form of its own in URLs
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # all but \t and \n


@pytest.fixture(scope="module")
def model_folders(pipeline_folder, tmp_path_factory):
    """{script: {flag: folder}} of what the scripts start from."""
    folder = tmp_path_factory.mktemp("kandinsky")
    tiny.make_kandinsky_prior(folder / "prior")
    tiny.make_kandinsky_decoder(folder / "decoder")
    halves = {f"pretrained_{half}_model_name_or_path": folder / half for half in ("prior", "decoder")}
    stable_diffusion = {"pretrained_model_name_or_path": pipeline_folder}
    tiny.make_stable_diffusion_xl(folder / "xl")
    xl = {"pretrained_model_name_or_path": folder / "xl", "pretrained_vae_model_name_or_path": folder / "xl" / "vae"}
    folders = {SDXL: xl, PRIOR: halves, DECODER: halves}
    return {script: folders.get(script, stable_diffusion) for script in SCRIPTS}


every_script = pytest.mark.parametrize("script", SCRIPTS)
pytorch = pytest.mark.parametrize("script", [SD])


@pytest.fixture(params=[SD, FLAX])
def script(request):
    """PyTorch's machinery is one text: what it does is tried in one script, but for what the model decides."""
    return request.param


@pytest.fixture
def own_flags(flags, script, model_folders):
    """`flags`, with the models of `script`."""
    return {**flags, "pretrained_model_name_or_path": None, **model_folders[script]}


def files_of(folder):
    return {path for path in Path(folder).rglob("*") if not path.is_dir()}


def error_line(stderr):
    """The one line of a run that was refused."""
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


# The token ------------------------------------------------------------------------------------------------------------


def forms(secret):
    """The secret in bytes, as it is, in a URL, in JSON, and at the three offsets of base64."""
    plain = secret.encode()
    found = {plain, quote(secret).encode(), quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    for shift in range(3):  # what lies before it moves it against the groups of 3 bytes; cut what the neighbours change
        encoded = base64.b64encode(b"\0" * shift + plain)
        inner = encoded[(0, 2, 3)[shift] : len(encoded) // 4 * 4 - 4]
        found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def unpacked(data):
    """`data`, and what its parts hold that are compressed, or laid out in the blocks of a W&B log."""
    parts = [data]
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08", data):
        with contextlib.suppress(zlib.error):
            parts.append(zlib.decompressobj(47).decompress(data[match.start() :], 2**24))
    for match in re.finditer(rb"\x28\xb5\x2f\xfd", data):
        with contextlib.suppress(OSError):
            parts.append(pyarrow.CompressedInputStream(io.BytesIO(data[match.start() :]), "zstd").read(2**24))
    if data.startswith(b":W&B"):
        parts.append(wandb_records(data))
    return parts


def wandb_records(data):
    """The records of a .wandb file without the headers of LevelDB's log, which may lie in the middle of a string."""
    records, position = [], 7
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        if left < 7:
            position += left
            continue
        records.append(data[position + 7 : position + 7 + length])
        position += 7 + length
    return b"".join(records)


def places_of(secret, contents):
    """The names in {name: bytes} whose bytes hold the secret, in whatever form."""
    wanted = forms(secret)
    return [
        name
        for name, data in contents.items()
        if any(form in part for part in [*unpacked(data), str(name).encode(errors="replace")] for form in wanted)
    ]


def test_the_search_finds_a_token_in_every_form(tmp_path):
    compress = pyarrow.CompressedOutputStream(tmp_path / "zstd", "zstd")
    compress.write(TOKEN.encode())
    compress.close()
    split = b"a" * (2**15 - 7 - 7 - 5) + TOKEN.encode()  # over two blocks
    first, rest = split[: 2**15 - 14], split[2**15 - 14 :]
    blocks = b":W&B\0\0\0" + b"".join(
        b"crc_" + len(part).to_bytes(2, "little") + b"\1" + part for part in (first, rest)
    )
    assert TOKEN.encode() not in blocks
    hidden = {
        "plain": f"token={TOKEN}!",
        "json": json.dumps({"token": TOKEN}),
        "url": f"https://host/?token={quote(TOKEN, safe='')}&x",
        **{f"base64-{n}": base64.b64encode(b"u" * n + TOKEN.encode() + b"\n").decode() for n in range(3)},
        "zlib": b"head" + zlib.compress(TOKEN.encode()) + b"tail",
        "zstd": b"head" + (tmp_path / "zstd").read_bytes(),
        "wandb": blocks,
    }
    hidden = {name: data if isinstance(data, bytes) else data.encode() for name, data in hidden.items()}
    assert places_of(TOKEN, {**hidden, "none": b"hf_Zq+7/Lw"}) == list(hidden)


class Watched:
    """A process in which, and in all that come of it, one environment variable is set; they are looked at as it runs.

    Attributes: returncode, stdout, stderr; command_lines, environments: {process id: bytes}, without the first process.
    """

    def __init__(self, command, environment, folder):
        self.mark = f"WATCHED={folder}".encode()
        self.command_lines, self.environments = {}, {}
        with subprocess.Popen(
            command,
            env={**environment, "WATCHED": str(folder)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            done = threading.Event()
            watcher = threading.Thread(target=self.watch, args=(process.pid, done))
            watcher.start()
            try:
                self.stdout, self.stderr = process.communicate(timeout=300)
            finally:
                process.kill()
                done.set()
                watcher.join()
        self.returncode = process.returncode

    def watch(self, main, done):
        while not done.wait(0.05):
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    environment = (folder / "environ").read_bytes()
                    if self.mark in environment.split(b"\0") and int(folder.name) != main:
                        self.environments[int(folder.name)] = environment
                        self.command_lines[int(folder.name)] = (folder / "cmdline").read_bytes()


def everything(hub, output, process):
    """All that a run has written, said and sent, as {where: bytes}; of requests all but the header with the token."""
    contents = {path: path.read_bytes() for folder in (output, hub.home.name) for path in files_of(folder)}
    contents |= {"stdout": process.stdout, "stderr": process.stderr}
    for (kind, repo_id), repo in hub.repos.items():
        for commit in repo.history():
            said = "\n".join([kind, repo_id, commit.title, commit.message]).encode()
            contents[f"commit {commit.id}"] = said
            contents |= {f"{commit.id} {name}": file.content for name, file in commit.files.items()}
    contents["requests"] = json.dumps([request[:2] for request in hub.requests]).encode()
    return contents


def start(program, flags, environment, folder, token=None):
    """Run a script with both trackers, checkpoints, pictures and data workers in a process that is watched."""
    flags = {**flags, "report_to": "all", "checkpointing_steps": 1, "validation_prompts": ["red dots"]}
    flags |= {"dataloader_num_workers": 2, "push_to_hub": True, "hub_model_id": "user/tuned", "hub_token": token}
    temporary = tempfile.mkdtemp()  # data workers make sockets there, whose paths have 107 bytes at most
    folders = {"WANDB_DIR": str(folder / "wandb"), "TMPDIR": temporary, "HOME": str(folder)}
    (folder / "wandb").mkdir()
    try:
        return Watched([sys.executable, *program, *command_line(flags)], environment | folders, folder)
    finally:
        shutil.move(temporary, folder / "tmp")


def kinds(folder):
    """Which trackers have written below a folder."""
    return {kind for kind in ("tfevents", ".wandb") for path in files_of(folder) if kind in path.name}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes through /proc")
def test_the_token_on_the_command_line_is_nowhere_but_there(own_flags, script, tmp_path):
    with Hub({TOKEN: "write"}) as hub:
        process = start([ROOT / f"{script}.py"], own_flags, hub.environment(), tmp_path, TOKEN)
        assert process.returncode == 0, process.stderr.decode()
        assert hub.tokens_seen == {TOKEN}
        assert "README.md" in hub.files("user/tuned")
        assert kinds(tmp_path) == {"tfevents", ".wandb"}
        assert places_of(TOKEN, everything(hub, tmp_path, process)) == []
    own = next(iter(command_line({"hub_token": TOKEN})))
    # Forked data workers show the command line of the process that they are copies of; nothing else shows the token.
    script_name = f"{script}.py".encode()
    copies = {number for number, line in process.command_lines.items() if script_name in line and own.encode() in line}
    others = {number: line for number, line in process.command_lines.items() if number not in copies}
    assert any(b"wandb-core" in line for line in others.values())
    assert places_of(TOKEN, others) == []
    assert places_of(TOKEN, process.environments) == []


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes through /proc")
@pytorch
def test_the_token_in_the_environment_is_nowhere_when_the_upload_is_refused(own_flags, script, tmp_path):
    with Hub({TOKEN: "write"}) as hub:
        hub.fail = lambda method, path: 403 if "/commit/" in path else None
        program = ["-c", IMPATIENT, ROOT / f"{script}.py"]
        process = start(program, own_flags, hub.environment(TOKEN), tmp_path)
        assert process.returncode == 1
        assert re.match("error: --push_to_hub.*403", error_line(process.stderr.decode()))
        assert hub.tokens_seen == {TOKEN}
        assert kinds(tmp_path) == {"tfevents", ".wandb"}
        assert places_of(TOKEN, everything(hub, tmp_path, process)) == []
    assert any(b"wandb-core" in line for line in process.command_lines.values())
    assert places_of(TOKEN, process.command_lines) == []


BROKEN = """
import sys
import {script} as script

def broken(*_):
    raise ZeroDivisionError("not foreseen")

script.log_validation = broken
script.main(script.parse_args(sys.argv[1:]))
"""


@pytorch
def test_the_token_is_not_in_the_traceback_of_an_unforeseen_failure(own_flags, script, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN.format(script=script))
    with Hub({TOKEN: "write"}) as hub:
        environment = hub.environment() | {"PYTHONPATH": str(ROOT)}
        process = start([tmp_path / "broken.py"], own_flags, environment, tmp_path, TOKEN)
        assert process.returncode != 0
        assert b"ZeroDivisionError: not foreseen" in process.stderr
        assert places_of(TOKEN, everything(hub, tmp_path, process)) == []


@pytest.fixture
def hub_of_this_process(monkeypatch):
    constants = huggingface_hub.constants
    with Hub({TOKEN: "read"}) as hub:
        huggingface_hub.close_session()
        harnesses = os.path.join(hub.home.name, "harnesses.json")
        Path(harnesses).write_text('{"standardEnvVars": [], "harnesses": {}}')
        settings = {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url, "AGENT_HARNESSES_PATH": harnesses}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        yield hub
        huggingface_hub.close_session()


@pytest.mark.parametrize("token", [TOKEN, "hf_unknown"])
def test_a_token_that_is_refused_is_not_said(hub_of_this_process, token, own_flags, script):
    """One that may only read, and one that is not known."""
    own_flags |= {"push_to_hub": True, "hub_model_id": "user/tuned", "hub_token": token}
    with pytest.raises(
        importlib.import_module(script).RunError, match="^--push_to_hub user/tuned: .*40[13] "
    ) as caught:
        run(own_flags, script)
    assert places_of(token, {"error": str(caught.value).encode()}) == []
    assert not own_flags["output_dir"].exists()


@pytest.mark.parametrize("token", ["hf_secret\r", "hf_secret\nhf_secret", " hf_secret", "hf_secr\xe9t"])
def test_a_token_that_no_header_can_hold_is_not_said(token, own_flags, script, capsys):
    """The library for HTTP quotes such a header in its error. "\\r" is what a file of Windows leaves at its end."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).parse_args(command_line({**own_flags, "hub_token": token}))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "error: argument --hub_token: " in said
    assert "hf_s" not in said


# Hostile text ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    "\"quotes\" 'of' \"\"\"all''' kinds\\",
    "two\nlines\r\nand more\n---\nbase_model: evil/model\n---\n",
    "```\n<script>alert(1)</script>\n```",
    "`` ` ``` x ` <img src=x onerror=alert(1)> `",
    "../../../evil",
    "</code></pre><a href='http://evil.example'>click</a> <!-- ",
    "![x](http://evil.example/x.png) [click](javascript:alert(1)) <http://evil.example>",
    "- a: [b, {c: &d !!python/object/apply:os.system ['touch evil']}] # e | %s {0} ${IFS} $(touch evil)",
    "\x1b[2J\x1b]0;title\x07 \x08\x7f\x9b31m \u202eleft\u2066 \u2028 \ufeff end",
    "",
]
NAME = "a \"b\" 'c' <img src=x onerror=alert(1)> `d` [e](f) {g} \x1b[2J\n---\ntags: [evil] # *?[!h] \u202e é"
IMAGE_NAMES = [
    "\"a\" 'b' <img src=x>.png",
    "two\nlines.png",
    "\x1b[2J\x07.png",
    "```.png",
    "-rf.png",
    "%2e%2e%2f.png",
    "*?[a].png",
    " é\u202e.png",
]


def make_hostile_images(folder):
    """Images whose names and captions are hostile, and a caption of what no argument can hold."""
    tiny.make_images(folder, number=len(IMAGE_NAMES))
    captions = [*HOSTILE, "\0"]
    rows = []
    for index, name in enumerate(IMAGE_NAMES):
        (folder / f"{index}.png").rename(folder / name)
        rows.append({"file_name": name, "text": captions})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def split_card(card):
    """The front matter and the body of a model card."""
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def strings_in(code):
    """The string literals of Python code that stand alone, without those in f-strings."""
    return [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


def check_markdown(body, args):
    """The body has the headings, fences and picture that the script wrote, and neither HTML nor a link."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [token.content for token in [*tokens, *inline] if token.type.startswith("html")]
    assert not [token for token in inline if token.type == "link_open"]
    assert [token.attrs["src"] for token in inline if token.type == "image"] == ["validation/step-000002.png"]
    first, *others = [token.tag for token in tokens if token.type == "heading_open"]
    assert (first, set(others)) == ("h1", {"h2"})
    *prompts, python, flags = [token for token in tokens if token.type == "fence"]
    assert (python.info, flags.info) == ("python", "json")
    assert all(json.loads(token.content) == args["validation_prompts"] for token in prompts)
    flags = json.loads(flags.content)
    assert json.loads(flags["validation_prompts"]) == args["validation_prompts"]
    for flag in ("output_dir", "train_data_dir", "hub_model_id", "tracker_project_name"):
        assert flags[flag] == str(args[flag])
    strings = strings_in(python.content)
    assert args["validation_prompts"][0] in strings
    assert args["hub_model_id"] in strings


def text_summaries(folder):
    """The values of all flags that TensorBoard's files below a folder hold, {name: str}."""
    values, pictures = {}, 0
    for path in files_of(folder):
        for event in EventFileLoader(str(path)).Load() if "tfevents" in path.name else ():
            for value in event.summary.value:
                if value.tag == hparams.SESSION_START_INFO_TAG:
                    info = hparams.parse_session_start_info_plugin_data(value.metadata.plugin_data.content)
                    values |= {name: item.string_value for name, item in info.hparams.items()}
                elif value.tag.startswith("arguments"):
                    text = value.tensor.string_val[0].decode()
                    values |= json.loads(re.fullmatch(r"```json\n(.*)\n```", text, re.DOTALL)[1])
                elif value.tag.startswith("validation"):
                    pictures += 1
    return values, pictures


@every_script
def test_hostile_text_does_no_harm(own_flags, script, model_folders, tmp_path, capfd):
    """In prompts, captions, names of images, of the folders of data, models and output, of project and repository."""
    for number, (flag, folder) in enumerate(model_folders[script].items()):
        own_flags[flag] = tmp_path / f"{number} {NAME}"
        own_flags[flag].symlink_to(folder)
    own_flags |= {"train_data_dir": make_hostile_images(tmp_path / f"data {NAME}")}
    own_flags |= {"output_dir": tmp_path / f"output {NAME}", "validation_prompts": HOSTILE, "checkpointing_steps": 1}
    own_flags |= {"hub_model_id": f"../../evil {NAME}", "tracker_project_name": f"project {NAME}"}
    own_flags |= {"num_validation_images": 1} if script == SDXL else {}
    before = files_of(tmp_path)
    run(own_flags, script)
    output = own_flags["output_dir"]
    assert {path for path in files_of(tmp_path) - before if output not in path.parents} == set()
    said = capfd.readouterr()
    log, code = said.err.split("Generate a picture with it:\n\n")
    assert all(re.match(r"\d\d:\d\d:\d\d [A-Z]+ ", line) for line in log.splitlines()), log
    compile(code, "log", "exec")
    assert [line for line in said.err.split("\n") if CONTROL.search(line)] == []
    assert not CONTROL.search(said.out)

    front, body = split_card((output / "README.md").read_text(encoding="utf-8"))
    if script.endswith("decoder"):
        assert front.pop("prior") == [str(model_folders[script]["pretrained_prior_model_name_or_path"])]
    assert front.keys() == {"library_name", "tags"}
    assert all(re.fullmatch(r"[\w-]+", tag) for tag in [front["library_name"], *front["tags"]])
    check_markdown(body, own_flags)

    values, pictures = text_summaries(output / "logs")
    assert pictures
    assert json.loads(values["validation_prompts"]) == HOSTILE
    assert values["output_dir"] == str(output)
    with PIL.Image.open(output / "validation" / "step-000002.png") as grid:
        grid.load()


@pytest.mark.parametrize("name", ["../../evil", "..", "/evil", "a/../../evil"])
def test_the_project_of_the_tracker_stays_among_the_logs(name, own_flags, script, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).parse_args(command_line({**own_flags, "tracker_project_name": name}))
    assert ended.value.code == 2
    assert "error: argument --tracker_project_name: " in capsys.readouterr().err


def test_a_project_name_that_wandb_does_not_take_is_one_line(own_flags, script):
    module = importlib.import_module(script)
    with pytest.raises(module.RunError, match="^--report_to wandb: .*evil"):
        run({**own_flags, "report_to": "wandb", "tracker_project_name": "a/evil"}, script)


@pytorch
@pytest.mark.parametrize("name", ["../secret.png", "/{}/secret.png", "sub/../../secret.png"])
def test_metadata_reads_no_image_outside_the_folder(name, own_flags, script, tmp_path):
    folder = tiny.make_images(tmp_path / "data", number=2)
    tiny.make_images(tmp_path, number=1)
    (tmp_path / "0.png").rename(tmp_path / "secret.png")
    (tmp_path / "metadata.jsonl").unlink()
    (folder / "sub").mkdir()
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": name.format(str(tmp_path).strip("/")), "text": "a secret"}) + "\n")
    module = importlib.import_module(script)
    with pytest.raises(module.RunError, match="^--train_data_dir .*secret.png"):
        run({**own_flags, "train_data_dir": folder}, script)
    assert not own_flags["output_dir"].exists()


# Code that came with the data -----------------------------------------------------------------------------------------


@every_script
def test_no_script_asks_for_code_of_others(script):
    calls = [node for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())) if isinstance(node, ast.Call)]
    given = [keyword for call in calls for keyword in call.keywords]
    keywords = {
        keyword.arg for keyword in given if (keyword.arg, ast.unparse(keyword.value)) != ("weights_only", "True")
    }
    names = {getattr(call.func, "id", getattr(call.func, "attr", "").replace("eval", "")) for call in calls}
    assert not keywords & {"trust_remote_code", "custom_pipeline", "allow_pickle", "weights_only"}
    assert not names & {"eval", "exec", "unsafe_load", "full_load"}
    assert "trust_remote_code" not in (ROOT / f"{script}.py").read_text()


def plant(path, evidence):
    """Write a module that leaves evidence when it is imported, with the names that a loader might look for."""
    code = f"open({str(evidence)!r}, 'a').write(__file__)\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code + "class MyClass:\n    pass\n\n\nclass Builder:\n    pass\n")


@contextlib.contextmanager
def leaves_no(evidence):
    yield
    assert not evidence.exists(), evidence.read_text()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copies_of(folders, tmp_path):
    """{flag: folder} with a copy of every folder, to be changed."""
    copies = {flag: tmp_path / f"model-{number}" for number, flag in enumerate(folders)}
    for flag, folder in folders.items():
        subprocess.run(["cp", "-r", str(folder), str(copies[flag])], check=True)
    return copies


@pytorch
def test_code_in_a_data_set_does_not_run(own_flags, script, tmp_path):
    """A loading script, beside the images and of the folder's name, by --dataset_name and by --train_data_dir."""
    folder, evidence = tiny.make_images(tmp_path / "pictures", number=2), tmp_path / "evidence"
    for name in ("pictures.py", "dataset.py", "imagefolder.py", "sitecustomize.py", "__init__.py"):
        plant(folder / name, evidence)
    module = importlib.import_module(script)
    own_flags |= {"train_data_dir": None, "max_train_steps": 1}
    with leaves_no(evidence):
        for flag in ("train_data_dir", "dataset_name"):
            with contextlib.suppress(module.RunError):  # to refuse it is as good as to leave the code alone
                run({**own_flags, flag: folder, "output_dir": tmp_path / flag}, script)
                reset_accelerate()
                assert (tmp_path / flag / "model_index.json").is_file()
        with pytest.raises(module.RunError, match="^--dataset_name .*pictures.py"):
            run({**own_flags, "dataset_name": folder / "pictures.py"}, script)


# What a folder of models may say of code beside it: {what: function of (folder, a part of it)} makes it say so.
def name_a_pipeline(folder, part):
    edit(folder / "model_index.json", _class_name=["my_module", "MyClass"])


def name_a_component(folder, part):
    edit(folder / "model_index.json", **{part: ["my_module", "MyClass"]})


def name_a_package(folder, part):
    edit(folder / "model_index.json", **{part: [f"{folder.name}.my_module", "MyClass"]})


def map_automatic_classes(folder, part):
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    changes = {"auto_map": dict.fromkeys(names, "my_module.MyClass")}
    for path in folder.glob("*/*config.json"):
        edit(path, **changes)
    edit(folder / "model_index.json", **changes)


CHANGES = [name_a_pipeline, name_a_component, name_a_package, map_automatic_classes]


@pytest.mark.parametrize(
    ("script", "change"),
    [*((script, change) for script in (SD, FLAX) for change in CHANGES)]
    + [*((script, change) for script in (PRIOR, DECODER) for change in (name_a_component, map_automatic_classes))],
)
def test_code_in_a_folder_of_models_does_not_run(change, own_flags, script, model_folders, tmp_path, monkeypatch):
    """The run is refused when all is loaded, as no Hub can be reached; that of Stable Diffusion trains."""
    evidence = tmp_path / "evidence"
    copies = copies_of(model_folders[script], tmp_path)
    for folder in copies.values():
        change(folder, "scheduler")
        for place in (folder, *filter(Path.is_dir, list(folder.glob("*")))):
            plant(place / "my_module.py", evidence)
            plant(place / "__init__.py", evidence)
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)  # from where `python -m` would import
    own_flags |= {**copies, "validation_prompts": ["red dots"], "max_train_steps": 1, "push_to_hub": script != SD}
    with leaves_no(evidence), contextlib.suppress(module.RunError):
        run(own_flags, script)
    assert not any("my_module" in name for name in sys.modules)
    for path in files_of(own_flags["output_dir"]):  # nor is it handed on with the result
        assert path.suffix != ".py"


# Files that are not what their names say ------------------------------------------------------------------------------

LYING = {
    "empty": b"",
    "garbage": bytes(range(256)) * 40,
    "huge-header": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "long-header": (2**30).to_bytes(8, "little") + b"{" + b" " * 1000,
    "pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "offsets": b"",
}
header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
LYING["offsets"] = len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("script", "kind"),
    [*((script, kind) for script in (SD, FLAX) for kind in LYING), (PRIOR, "garbage"), (DECODER, "garbage")],
)
def test_a_file_that_is_not_of_safetensors_is_one_line(kind, own_flags, script, model_folders, tmp_path):
    """In the part that is trained and in one that is frozen: the error names the flag, or the file itself."""
    module = importlib.import_module(script)
    parts = {SD: ("unet", "vae"), PRIOR: ("prior", "image_encoder"), DECODER: ("unet", "movq"), FLAX: ("unet", "vae")}
    for number, part in enumerate(parts[script]):
        (tmp_path / str(number)).mkdir()
        copies = copies_of(model_folders[script], tmp_path / str(number))
        (path,) = [path for folder in copies.values() for path in folder.glob(f"{part}/*.safetensors")]
        path.write_bytes(LYING[kind])
        with pytest.raises(module.RunError) as caught:
            run({**own_flags, **copies}, script)
        assert str(caught.value).startswith(("--pretrained_", str(path)))
        assert "\n" not in str(caught.value)
        assert not own_flags["output_dir"].exists()
