"""A card's snippet, in an environment that has what the card says and nothing else. `make test-install` runs it.

python tests/install/check_card.py FOLDER --packages    # what the card asks for, as words for pip
python tests/install/check_card.py FOLDER               # runs its Python on a video, with FOLDER as the repository
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

REPO = "me/x"


def main(folder: Path, packages: bool) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    if packages:
        lines = re.findall(r"^pip install (.*?)(?:\s+#.*)?$", card, re.MULTILINE)
        print("\n".join(word.strip("'") for line in lines for word in line.split()))
        return
    assert importlib.util.find_spec("video_ma2mba") is None, "the package is here, so this shows nothing"
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    assert REPO in code, code
    code = code.replace(REPO, str(folder.resolve()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "it says nothing"
    print(f"as the card says: {done.stdout.strip()!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--packages" in sys.argv[2:])
