"""What is installed by whom: uv by the metadata at the head of each script, `make demo` by the Makefile."""

import os
import shutil
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.fixture
def uv(tmp_path):
    """A function that runs uv with an empty cache, on this Python: (words) -> `subprocess.CompletedProcess`."""
    find_uv_bin = pytest.importorskip("uv", reason="uv is not installed").find_uv_bin
    settings = {"UV_CACHE_DIR": str(tmp_path / "cache"), "UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never"}

    def run(*words):
        command, environment = [find_uv_bin(), *map(str, words)], {**os.environ, **settings}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        if "Failed to fetch" in result.stderr or "the network was disabled" in result.stderr:
            pytest.skip(f"uv reaches no package index: {result.stderr.splitlines()[-1]}")
        return result

    yield run
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_uv_finds_the_packages_of_every_script(uv, tmp_path):
    """For all versions of Python that the metadata allow, on Linux, macOS and Windows; it installs none of them."""
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
        result = uv("lock", "--script", script)
        assert result.returncode == 0, f"{script}: {result.stderr}"
        lock = (tmp_path / f"{script}.lock").read_text(encoding="utf-8")
        assert 'requires-python = ">=3.11"' in lock
        assert 'name = "datasets"' in lock


def test_uv_runs_a_script_with_nothing_installed(uv, tmp_path):
    """The one that needs no gigabytes of torch."""
    tiny.make_images(tmp_path / "my_images")
    tiny.make_tokenizer(tmp_path / "tokenizer")
    shutil.copy(ROOT / "check_data.py", tmp_path)
    result = uv("run", "check_data.py", "--train_data_dir=my_images", "--resolution=8", "--tokenizer=tokenizer")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("8 rows; ")
    assert "Installed " in result.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_the_demo_installs_no_jax(tmp_path):
    said = {}
    for demo in ("demo", "demo-flax"):
        command = [
            "make",
            "--dry-run",
            f"--directory={ROOT}",
            demo,
            f"VENV={tmp_path}/venv",
            f"PYTHON={sys.executable}",
        ]
        said[demo] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "-r requirements.txt\n" in said["demo"]
    assert "requirements_flax" not in said["demo"]
    assert "-r requirements.txt\n" in said["demo-flax"]
    assert "-r requirements_flax.txt\n" in said["demo-flax"]
