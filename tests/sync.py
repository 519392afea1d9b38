"""Copies what scripts share, as text: python tests/sync.py [FOLDER]

The machinery of train_text_to_image.py into the other PyTorch scripts; the required packages into the inline metadata
(PEP 723) at the head of each script, which uv reads.
"""

import re
import sys
from pathlib import Path

SOURCE = "train_text_to_image.py"
METADATA = re.compile(r"\A# /// script\n(?:#(?: .*)?\n)+?# ///\n")
# The packages that each script imports are those of a file; check_data.py needs three, with the bounds that they have.
REQUIREMENTS = {
    "train_text_to_image.py": "requirements.txt",
    "train_text_to_image_sdxl.py": "requirements.txt",
    "train_text_to_image_prior.py": "requirements.txt",
    "train_text_to_image_decoder.py": "requirements.txt",
    "train_text_to_image_flax.py": "requirements_flax.txt",
    "check_data.py": "requirements_flax.txt",
}
CHECK_DATA = ("datasets", "transformers", "pillow")  # datasets brings fsspec, numpy and tqdm


def parts(text):
    """Split a script in front of its machinery's banner. Raises ValueError unless there is exactly one."""
    (banner,) = re.finditer(r"^# -+\n# The machinery", text, re.MULTILINE)
    return text[: banner.start()], text[banner.start() :]


def requirements(folder, script):
    """The required packages of a script, with their bounds: lines of its requirements file."""
    lines = (folder / REQUIREMENTS[script]).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    if script == "check_data.py":
        lines = [line for line in lines if re.match(r"[\w-]+", line).group() in CHECK_DATA]
    return lines


def with_metadata(folder, path):
    """The text of a script with the inline metadata that its requirements file asks for."""
    packages = "".join(f'#     "{line}",\n' for line in requirements(folder, path.name))
    head = f'# /// script\n# requires-python = ">=3.11"\n# dependencies = [\n{packages}# ]\n# ///\n'
    return head + METADATA.sub("", path.read_text(encoding="utf-8"))


def sync(folder):
    """Returns a line on each change."""
    _, machinery = parts((folder / SOURCE).read_text(encoding="utf-8"))
    changed = []
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name in REQUIREMENTS and with_metadata(folder, path) != text:
            text = with_metadata(folder, path)
            path.write_text(text, encoding="utf-8")
            changed.append(f"wrote the packages of {REQUIREMENTS[path.name]} into {path.name}")
        if REQUIREMENTS.get(path.name) == "requirements.txt" and "\n# The machinery" in text:
            own, copy = parts(text)
            if copy != machinery:
                path.write_text(own + machinery, encoding="utf-8")
                changed.append(f"copied the machinery of {SOURCE} into {path.name}")
    return changed


if __name__ == "__main__":
    for line in sync(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])):
        print(line)
