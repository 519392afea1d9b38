"""Copies the machinery of train_text_to_image.py into the other PyTorch scripts: python tests/sync.py [FOLDER]"""

import re
import sys
from pathlib import Path

SOURCE = "train_text_to_image.py"


def parts(text):
    """Split a script in front of its machinery's banner. Raises ValueError unless there is exactly one."""
    (banner,) = re.finditer(r"^# -+\n# The machinery", text, re.MULTILINE)
    return text[: banner.start()], text[banner.start() :]


def sync(folder):
    """Returns the names of the scripts that were changed."""
    _, machinery = parts((folder / SOURCE).read_text(encoding="utf-8"))
    changed = []
    for path in sorted(folder.glob("train_text_to_image_*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem.endswith("flax") or "\n# The machinery" not in text:
            continue
        own, copy = parts(text)
        if copy != machinery:
            path.write_text(own + machinery, encoding="utf-8")
            changed.append(path.name)
    return changed


if __name__ == "__main__":
    for name in sync(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])):
        print(f"copied the machinery of {SOURCE} into {name}")
