"""The scripts held together as one design. Reads their text; imports none of them."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "train_text_to_image.py",
    "train_text_to_image_prior.py",
    "train_text_to_image_decoder.py",
    "train_text_to_image_flax.py",
]
SCRIPTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES if (ROOT / name).exists()}
UPSTREAM_FLAGS = json.loads((ROOT / "tests" / "upstream_flags.json").read_text())

BANNERS = ["Command line", "Data", "Objective", "Checkpoints", "Reporting", "Training"]
BANNERS_FLAX = ["Command line", "Data", "Models", "Objective", "Checkpoints", "Reporting", "Training"]

# What each script has of its own by nature, under a name that the published guide or every script uses.
OWN = {
    "parse_args",
    "preprocess_train",
    "training_losses",
    "check_architecture",
    "log_validation",
    "describe_result",
    "main",
    "encoder_inputs",
    "encode",
    "preprocess_encoded",
    "draw_noise",
    "prepare_rows",
}
# The one function of the objective whose text is not the same in torch and in jnp; all of them are tested against one
# stored table of values.
OBJECTIVE = {"weighted_squared_error"}
# Flags that differ on purpose: {flag: why}.
INTENDED_FLAGS = {
    "proportion_empty_prompts": "the decoder has no captions",
    "resolution": "the prior never sees pixels at it: its image processor decides",
    "output_dir": "the upstream scripts' defaults",
    "train_batch_size": "the upstream scripts' defaults",
    "adam_weight_decay": "the upstream scripts' defaults",
    "seed": "the upstream scripts' defaults",
    "mixed_precision": "accelerate has a configuration of its own to default to, JAX has none",
    "report_to": "accelerate knows more trackers",
    "dataloader_num_workers": "JAX reads in threads by default, PyTorch in processes",
}
# Flags that are accepted and not needed.
WITHOUT_EFFECT = {"local_rank", "foreach_ema", "from_pt"}
# Ours beyond upstream's.
NEW = {"proportion_empty_prompts", "validation_steps", "logging_steps"}
NEW |= {"check_data", "skip_bad_images", "max_nonfinite_steps", "cache_encodings"}
FASTER = {"compile", "half_precision_norms", "optimizer_in_backward"}  # or with less memory, where PyTorch trains
NEW_FLAGS = {
    "train_text_to_image.py": NEW | FASTER,
    "train_text_to_image_prior.py": NEW | FASTER | {"gradient_checkpointing"},
    "train_text_to_image_decoder.py": NEW | FASTER,
    # What the PyTorch script has and upstream's Flax script lacks, and three flags of its own.
    "train_text_to_image_flax.py": NEW
    | {"non_ema_revision", "image_interpolation_mode", "dataloader_num_workers", "prediction_type", "snr_gamma"}
    | {"noise_offset", "input_perturbation", "dream_training", "dream_detail_preservation", "lr_warmup_steps"}
    | {
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "use_ema",
        "checkpointing_steps",
        "tracker_project_name",
    }
    | {"checkpoints_total_limit", "resume_from_checkpoint", "validation_prompts", "validation_epochs"}
    | {"shard_params", "save_flax_weights", "generate"},
}

LONGEST_MAIN, LONGEST_FUNCTION, DEEPEST = 170, 40, 5


def definitions(source):
    """{name: text} of the functions, classes and constants at the top level of a script."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
            found[node.name] = decorators + ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.get_source_segment(source, node)
    return found


def differing(tables, exempt):
    """Names that two scripts give different values: [(name, script, other script)]; tables: {script: {name: value}}."""
    first, found = {}, []
    for script, table in tables.items():
        for name, value in table.items():
            other, other_value = first.setdefault(name, (script, value))
            if value != other_value and name not in exempt:
                found.append((name, other, script))
    return found


def differing_definitions(sources, exempt):
    return differing({script: definitions(source) for script, source in sources.items()}, exempt)


def differing_flags(sources, exempt):
    return differing({script: flags(source) for script, source in sources.items()}, exempt)


def flags(source):
    """{flag: {keyword: text}} of every `add("--flag", ...)` in a script."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "add"]
    return {call.args[0].value[2:]: {k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls}


def unread_flags(source):
    """Flags whose value nothing in a script looks at as `args.<flag>`."""
    read = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
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


def functions(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def depth(node):
    """How deep the blocks in a function are nested; its own body is 0."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef)
    inner = [depth(child) + isinstance(child, blocks) for child in ast.iter_child_nodes(node)]
    return max(inner, default=0)


def imported_modules(source):
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("" if node.level else node.module.split(".")[0])
    return found


# Two scripts that break every rule at once: what the checks below must not let through.
GOOD = 'def same(a):\n    return a\n\n\nadd("--size", type=int, default=1, help="size")\nprint(args.size)\n'
BAD = 'def same(a):\n    return a + 1\n\n\nadd("--size", type=int, default=2, help="size")\nargs.seed = 3\nimport hub\n'


def test_the_checks_can_fail():
    both = {"good": GOOD, "bad": BAD}
    assert differing_definitions(both, exempt=set()) == [("same", "good", "bad")]
    assert differing_definitions(both, exempt={"same"}) == []
    assert differing_flags(both, {}) == [("size", "good", "bad")]
    assert unread_flags(BAD) == {"size"}
    assert unread_flags(GOOD) == set()
    assert writes_to_args(BAD) == [6]
    assert "hub" in imported_modules(BAD)
    assert depth(functions("def f():\n    for a in b:\n        if a:\n            pass\n")[0]) == 2


def test_there_is_something_to_check():
    assert "train_text_to_image.py" in SCRIPTS
    assert not [path.name for path in ROOT.glob("*.py") if path.name not in NAMES]


def test_same_name_same_code():
    torch_scripts = {name: source for name, source in SCRIPTS.items() if name != "train_text_to_image_flax.py"}
    assert differing_definitions(torch_scripts, exempt=OWN) == []
    assert differing_definitions(SCRIPTS, exempt=OWN | OBJECTIVE) == []


def test_same_flag_same_meaning():
    assert differing_flags(SCRIPTS, INTENDED_FLAGS) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_banners(name):
    banners = re.findall(r"^# -{100,}\n# (.+)\n# -{100,}$", SCRIPTS[name], re.MULTILINE)
    assert banners == (BANNERS_FLAX if name.endswith("flax.py") else BANNERS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_list_of_flags_is_frozen(name):
    upstream = {flag.removeprefix("--") for flag in UPSTREAM_FLAGS[name]}
    assert set(flags(SCRIPTS[name])) == upstream | NEW_FLAGS[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_an_effect(name):
    assert unread_flags(SCRIPTS[name]) - WITHOUT_EFFECT == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_args_is_never_written_to(name):
    assert writes_to_args(SCRIPTS[name]) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_of_this_repository(name):
    ours = {path.stem for folder in (ROOT, ROOT / "tests") for path in folder.glob("*.py")} | {"tests", ""}
    assert imported_modules(SCRIPTS[name]) & ours == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_sizes(name):
    for function in functions(SCRIPTS[name]):
        length = function.end_lineno - function.lineno + 1
        limit = LONGEST_MAIN if function.name == "main" else LONGEST_FUNCTION
        assert length <= limit or function.name == "parse_args", (function.name, length)
        assert depth(function) <= DEEPEST, function.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings(name):
    tree = ast.parse(SCRIPTS[name])
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name
