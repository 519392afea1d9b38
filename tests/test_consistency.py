"""The scripts held together as one design. Reads their text; imports none of them."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sync import METADATA, REQUIREMENTS, parts, sync

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM_FLAGS = json.loads((ROOT / "tests" / "upstream_flags.json").read_text())

FLAX, CHECK_DATA = "train_text_to_image_flax.py", "check_data.py"
# Lines, at the most: before the machinery, and of the whole file; without the inline metadata, which nobody reads.
PART_ONE = {
    "train_text_to_image.py": 646,
    "train_text_to_image_sdxl.py": 713,
    "train_text_to_image_prior.py": 535,
    "train_text_to_image_decoder.py": 553,
}
WHOLE = {
    "train_text_to_image.py": 1562,
    "train_text_to_image_sdxl.py": 1629,
    "train_text_to_image_prior.py": 1451,
    "train_text_to_image_decoder.py": 1469,
    FLAX: 2270,
    CHECK_DATA: 250,  # it explains what users bring, and mends it, so that the scripts need not
}
MACHINERY, LONGEST_LINE, LONGEST_MAIN, LONGEST_FUNCTION, DEEPEST = 916, 120, 140, 40, 5

SCRIPTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in WHOLE if (ROOT / name).exists()}
TRAINING = {name: source for name, source in SCRIPTS.items() if name != CHECK_DATA}

# Of the same name, and yet of the script's own: {name: why}. All others of that name are the same text, but for what
# `compared` leaves out.
OWN = {
    "parse_args": "the flags of upstream's script",
    "noted_signals": "PyTorch's data workers are processes, and end with the script",
    "main": "the models",
}
# The same for one script alone.
OWN_OF = {
    "train_text_to_image_sdxl.py": {
        "train_transforms": "it also returns what the UNet is told of size and crop",
        "tokenize_captions": "there are two tokenizers",
    }
}
# Flags that differ on purpose: {flag: why}.
INTENDED_FLAGS = {
    "train_data_dir": "the decoder needs no captions",
    "proportion_empty_prompts": "the decoder has no captions",
    "resolution": "the prior never sees pixels at it: its image processor decides",
    "output_dir": "the upstream scripts' defaults",
    "train_batch_size": "the upstream scripts' defaults",
    "adam_weight_decay": "the upstream scripts' defaults",
    "num_validation_images": "the upstream scripts' defaults",
    "validation_epochs": "the upstream scripts' defaults",
    "tracker_project_name": "the upstream scripts' defaults",
    "seed": "the upstream scripts' defaults",
    "mixed_precision": "accelerate has a configuration of its own to default to, JAX has none",
    "report_to": "accelerate knows more trackers",
    "dataloader_num_workers": "JAX reads in threads by default, PyTorch in processes",
    "cache_encodings": "what the frozen encoders return differs",
    "pretrained_prior_model_name_or_path": "one of the halves is trained, the other validates",
    "pretrained_decoder_model_name_or_path": "one of the halves is trained, the other validates",
}
# Flags that are accepted and not needed.
WITHOUT_EFFECT = {"local_rank", "foreach_ema", "from_pt"}
# Second names of a flag, of upstream's scripts.
ANOTHER_NAME = {"validation_prompt", "lora_rank", "debug_loss"}
# Ours beyond upstream's.
NEW = {"proportion_empty_prompts", "validation_steps", "logging_steps", "skip_bad_images", "cache_encodings"}
NEW |= {"validation_rows", "validation_data_dir", "keep_best"}
NEW_IN_PYTORCH = NEW | {"compile", "deterministic", "half_precision_norms", "lora_alpha", "lora_target_modules"}
NEW_IN_PYTORCH |= {"rank", "num_validation_images", "validation_prompt", "lora_rank"}  # of upstream's LoRA scripts
NEW_FLAGS = {
    "train_text_to_image.py": NEW_IN_PYTORCH,
    "train_text_to_image_sdxl.py": NEW_IN_PYTORCH
    | {"validation_prompts", "tracker_project_name", "offload_ema", "train_text_encoder", "debug_loss"},
    "train_text_to_image_prior.py": NEW_IN_PYTORCH | {"gradient_checkpointing"},
    "train_text_to_image_decoder.py": NEW_IN_PYTORCH,
    # What the PyTorch script has and upstream's Flax script lacks, and three flags of its own.
    FLAX: NEW
    | {"non_ema_revision", "image_interpolation_mode", "dataloader_num_workers", "prediction_type", "snr_gamma"}
    | {"noise_offset", "input_perturbation", "dream_training", "dream_detail_preservation", "lr_warmup_steps"}
    | {"gradient_accumulation_steps", "gradient_checkpointing", "use_ema", "checkpointing_steps"}
    | {"tracker_project_name", "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompts"}
    | {"validation_epochs", "shard_params", "save_flax_weights", "generate"},
}

FRAMEWORK = r"\b(torch|DTensor|accelerator|Accelerator|jax|jnp|nnx|optax|ocp|orbax)\b"
MODEL = r"\b(args|unet|vae|movq|prior|image_encoder|pipeline)\b"


def top_level(source):
    """{name: node} of the functions, classes and constants at the top level of a script."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            names = [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= {name.id: node for name in names if isinstance(name.ctx, ast.Store)}
    return found


def text_of(source, node):
    decorators = [f"@{ast.unparse(decorator)}\n" for decorator in getattr(node, "decorator_list", ())]
    return "".join(decorators) + ast.get_source_segment(source, node)


def definitions(source):
    """{name: text} of what `top_level` finds."""
    return {name: text_of(source, node) for name, node in top_level(source).items()}


def compared(sources, left_out):
    """{script: {name: text}} of the definitions whose text has no match of the pattern `left_out` in any script."""
    tables = {
        script: {name: text for name, text in definitions(source).items() if name not in OWN_OF.get(script, ())}
        for script, source in sources.items()
    }
    other = {name for table in tables.values() for name, text in table.items() if re.search(left_out, text)}
    return {script: {n: t for n, t in table.items() if n not in other | OWN.keys()} for script, table in tables.items()}


def differing(tables, exempt=()):
    """Names that two scripts give different values: [(name, script, other script)]; tables: {script: {name: value}}."""
    first, found = {}, []
    for script, table in tables.items():
        for name, value in table.items():
            other, other_value = first.setdefault(name, (script, value))
            if value != other_value and name not in exempt:
                found.append((name, other, script))
    return found


def flags(source):
    """{flag: {keyword: text}} of every `add("--flag", ...)` in a script, also of a parser's method."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    calls = [
        call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) in ("add", "add_argument")
    ]
    calls = [call for call in calls if str(getattr(call.args[0], "value", "")).startswith("--")]
    return {
        name.value[2:]: {k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls for name in call.args
    }


def unread_flags(source):
    """Flags whose value nothing in a script looks at as `args.<flag>`."""
    read = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }
    return set(flags(source)) - read


def writes_to_args(source):
    """Lines at which a script assigns to an attribute of `args`."""
    written = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            written += [node.lineno] if ast.unparse(node.value) == "args" else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "vars(args).update"):
            written += [node.lineno] if "args" in ast.unparse(node) else []
    return written


def unused(source):
    """The functions, classes and constants at the top level that nothing but their own definitions reads."""
    nodes, tree = top_level(source), ast.parse(source)
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    found = []
    for name, own in nodes.items():
        elsewhere = [node for node in read if node.id == name and not own.lineno <= node.lineno <= own.end_lineno]
        found += [] if elsewhere else [name]
    return found


def functions(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def depth(node):
    """How deep the blocks in a function are nested; its own body is 0."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef)
    inner = [depth(child) + isinstance(child, blocks) for child in ast.iter_child_nodes(node)]
    return max(inner, default=0)


def too_large(source):
    """What is longer or deeper than a function or a line may be, as [str]."""
    found = [f"line {k}" for k, line in enumerate(source.splitlines(), 1) if len(line) > LONGEST_LINE]
    for function in functions(source):
        length = function.end_lineno - function.lineno + 1
        if function.name != "parse_args" and length > (LONGEST_MAIN if function.name == "main" else LONGEST_FUNCTION):
            found.append(f"{function.name}: {length} lines")
        if depth(function) > DEEPEST:
            found.append(f"{function.name}: nested {depth(function)} deep")
    return found


def imported_modules(source):
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("" if node.level else node.module.split(".")[0])
    return found


def number_of_lines(text):
    return len(METADATA.sub("", text).splitlines())


# Two scripts, of which the second breaks every rule at once: what the checks must not let through.
GOOD = """def same(a):
    return a


def own(a):
    return torch.sin(a)


def main(args):
    return same(args.size) + own(1)


add("--size", type=int, default=1, help="size")
main(args)
"""
BAD = """def same(a):
    return a + 1


def own(a):
    return jnp.sin(a)


LIMIT, OTHER = 1, 2


def deep(n):
    for a in range(n):
        while a:
            if a > 1:
                with a:
                    if a > 2:
                        try:
                            return deep(OTHER)
                        finally:
                            pass
LONG
    pass


add("--size", type=int, default=2, help="size")
args.seed = own(same(3))
import hub
""".replace("LONG", "\n" * 40 + "#" * 121)


def test_the_checks_can_fail():
    both = {"good": GOOD, "bad": BAD}
    assert differing(compared(both, FRAMEWORK)) == [("same", "good", "bad")]
    assert set(differing(compared(both, "nothing"))) == {("same", "good", "bad"), ("own", "good", "bad")}
    assert differing(compared(both, "return")) == []
    tables = {name: flags(source) for name, source in both.items()}
    assert differing(tables) == [("size", "good", "bad")]
    assert differing(tables, exempt={"size"}) == []
    assert unread_flags(BAD) == {"size"}
    assert unread_flags(GOOD) == set()
    assert writes_to_args(BAD) == [BAD.splitlines().index("args.seed = own(same(3))") + 1]
    assert writes_to_args(GOOD) == []
    assert "hub" in imported_modules(BAD)
    assert depth(functions("def f():\n    for a in b:\n        if a:\n            pass\n")[0]) == 2
    assert unused(BAD) == ["LIMIT", "deep"]
    assert unused(GOOD) == []
    start, end = (BAD[: BAD.index(text)].count("\n") for text in ("def deep", "\n\n\nadd"))
    assert too_large(BAD) == [f"line {end}", f"deep: {end - start + 1} lines", "deep: nested 6 deep"]
    assert too_large(GOOD) == []
    with pytest.raises(ValueError, match="not enough values"):
        parts(GOOD)
    assert number_of_lines(f"# /// script\n# dependencies = []\n# ///\n{GOOD}# ///\n") == number_of_lines(GOOD) + 1


def test_there_is_something_to_check():
    assert {path.name for path in ROOT.glob("*.py")} == WHOLE.keys()
    assert PART_ONE.keys() | {FLAX} == TRAINING.keys()


# The two parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PART_ONE)
def test_the_machinery_is_the_same_bytes(name):
    assert parts(SCRIPTS[name])[1] == parts(SCRIPTS["train_text_to_image.py"])[1]


def test_sync_mends_a_copy_that_differs(tmp_path):
    for name in (*SCRIPTS, *REQUIREMENTS.values()):
        shutil.copy(ROOT / name, tmp_path)
    assert sync(tmp_path) == []
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = tmp_path / "train_text_to_image_prior.py"
    own, machinery = parts(broken.read_text(encoding="utf-8"))
    assert machinery.startswith("# ---")
    broken.write_text(own + machinery.replace("\n\n\n", "\n\n\n# changed here alone\n", 1), encoding="utf-8")
    assert broken.read_bytes() != before[broken.name]
    command = [sys.executable, str(ROOT / "tests" / "sync.py"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["copied the machinery of train_text_to_image.py into train_text_to_image_prior.py"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    broken.write_text(own, encoding="utf-8")
    assert sync(tmp_path) == []  # what has no machinery gets none
    (tmp_path / FLAX).write_text(METADATA.sub("", SCRIPTS[FLAX]), encoding="utf-8")
    (tmp_path / "requirements.txt").write_text("torch>=3\n# a comment\nnumpy\n", encoding="utf-8")
    assert len(sync(tmp_path)) == 1 + len(PART_ONE)
    assert (tmp_path / FLAX).read_text(encoding="utf-8") == SCRIPTS[FLAX]
    for name in PART_ONE:
        assert packages((tmp_path / name).read_text(encoding="utf-8")) == ["torch>=3", "numpy"]


def packages(source):
    """The packages in a script's inline metadata, by the regular expression of PEP 723."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = (match for match in re.finditer(pattern, source) if match["type"] == "script")
    lines = [line.removeprefix("#").removeprefix(" ") for line in block["content"].splitlines()]
    metadata = tomllib.loads("\n".join(lines))
    assert metadata.keys() == {"requires-python", "dependencies"}
    assert metadata["requires-python"] == ">=3.11"
    return metadata["dependencies"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_inline_metadata_are_the_requirements(name):
    lines = (ROOT / REQUIREMENTS[name]).read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    named = {re.match(r"[\w-]+", package).group().lower() for package in packages(SCRIPTS[name])}
    if name == CHECK_DATA:  # datasets brings fsspec, numpy and tqdm
        assert set(packages(SCRIPTS[name])) < set(required)
        assert {"datasets", "transformers", "pillow"} == named
        third_party = {"datasets", "fsspec", "numpy", "PIL", "tqdm", "transformers"}
        assert imported_modules(SCRIPTS[name]) - sys.stdlib_module_names == third_party
    else:
        assert packages(SCRIPTS[name]) == required


def test_both_requirements_files_agree():
    bounds = [(ROOT / name).read_text(encoding="utf-8").splitlines() for name in sorted(set(REQUIREMENTS.values()))]
    bounds = [{re.match(r"[\w-]+", line).group(): line for line in lines if line[:1].isalpha()} for lines in bounds]
    shared = bounds[0].keys() & bounds[1].keys()
    assert {"datasets", "transformers", "huggingface_hub"} <= shared
    assert [bounds[0][name] for name in shared] == [bounds[1][name] for name in shared]


def test_part_one_has_one_order():
    """The same sections, and the docstring says which."""
    sections = []
    for name in PART_ONE:
        first, _ = parts(SCRIPTS[name])
        sections.append(re.findall(r"^# -{100,}\n# ([\w ]+).*\n# -{100,}$", first, re.MULTILINE))
        docstring = ast.get_docstring(ast.parse(first))
        assert all(section in docstring for section in sections[-1])
    assert sections == [["Command line", "Examples", "Objective", "Training"]] * len(PART_ONE)


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_lines_of_a_file(name):
    assert number_of_lines(SCRIPTS[name]) <= WHOLE[name]


@pytest.mark.parametrize("name", PART_ONE)
def test_the_lines_of_a_part(name):
    first, machinery = parts(SCRIPTS[name])
    assert number_of_lines(first) <= PART_ONE[name]
    assert number_of_lines(machinery) <= MACHINERY


@pytest.mark.parametrize("name", SCRIPTS)
def test_sizes_of_functions_and_lines(name):
    assert too_large(SCRIPTS[name]) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_defined_and_not_used(name):
    assert unused(SCRIPTS[name]) == []


# The same in all ------------------------------------------------------------------------------------------------------


def test_same_name_same_code():
    """In PyTorch, where no model and no flag comes in; in JAX too, where no framework does."""
    own_parts = {name: parts(SCRIPTS[name])[0] for name in PART_ONE}
    assert differing(compared(own_parts, MODEL)) == []
    model_free = compared({**own_parts, FLAX: SCRIPTS[FLAX]}, f"{FRAMEWORK}|{MODEL}")
    assert differing(model_free) == []
    machinery = {"the machinery": parts(SCRIPTS["train_text_to_image.py"])[1]}
    assert differing(compared({**machinery, FLAX: SCRIPTS[FLAX]}, FRAMEWORK)) == []


def test_same_flag_same_meaning():
    assert differing({name: flags(source) for name, source in TRAINING.items()}, INTENDED_FLAGS) == []


@pytest.mark.parametrize("name", TRAINING)
def test_the_list_of_flags_is_frozen(name):
    upstream = {flag.removeprefix("--") for flag in UPSTREAM_FLAGS[name]}
    assert set(flags(SCRIPTS[name])) == upstream | NEW_FLAGS[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_an_effect(name):
    assert flags(SCRIPTS[name])
    assert unread_flags(SCRIPTS[name]) - WITHOUT_EFFECT - ANOTHER_NAME == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_args_is_never_written_to(name):
    assert writes_to_args(SCRIPTS[name]) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_of_this_repository(name):
    ours = {path.stem for folder in (ROOT, ROOT / "tests") for path in folder.glob("*.py")} | {"tests", ""}
    assert imported_modules(SCRIPTS[name]) & ours == set()


@pytest.mark.parametrize("name", [FLAX, CHECK_DATA])
def test_no_torch_where_it_is_not_needed(name):
    assert imported_modules(SCRIPTS[name]) & {"torch", "torchvision", "accelerate", "diffusers"} == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings(name):
    assert ast.get_docstring(ast.parse(SCRIPTS[name]))
