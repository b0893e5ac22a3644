"""Without Linux's own calls: what imports, interpolates and evaluates here does so on macOS and Windows too.

Only as far as one interpreter can play another platform (tests/support/other_platform.py says how far).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.small_site import SMALL

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = """
import json, sys
from pathlib import Path
from tests.support import other_platform
other_platform.hide()
from tests.test_extras import import_everything
print("REFUSED", json.dumps(import_everything()))
from cli.main import app
place = Path(sys.argv[1])
def ctpipe(*words):
    code = app([str(word) for word in words], standalone_mode=False)
    print("CODE", words[0], code or 0, flush=True)
ctpipe("phantom", place / "archive", "--patients", 3, "--size", 32, "--thin-slices", 44, "--seed", 9)
ctpipe("ingest", place / "archive", place / "store")
ctpipe("encode", place / "store", "--vae", "tiny", "--engine", "inline", "--threads", 1)
ctpipe("train", place / "store", place / "run", "--preset", "tiny", "--max-steps", 1, *sys.argv[2:])
ctpipe("evaluate", place / "store", place / "run", "--split", "test", "--steps", 1, "--threads", 1)
ctpipe("verify", place / "store")
ctpipe("gc", place / "store")
ctpipe("decode", place / "store", place / "out", "--to-dicom", "--engine", "inline")
study = next((place / "archive").rglob("*.zip"))
ctpipe("interpolate", study, place / "thin")
ctpipe("interpolate", next((place / "out").iterdir()), place / "again", "--spacing-mm", 0.5, "--no-page")
"""


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "ignore::EncodingWarning", "-c", code, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_everything_imports_and_the_commands_work_without_them(tmp_path: Path) -> None:
    done = python(COMMANDS, str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "REFUSED {}" in done.stdout.splitlines()
    codes = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CODE")]
    names = ["phantom", "ingest", "encode", "train", "evaluate", "verify", "gc", "decode", "interpolate", "interpolate"]
    assert codes == [[name, "0"] for name in names]
    assert len(list((tmp_path / "thin").glob("*/*.dcm"))) == 25


REFUSED = {
    "os.preadv": "AttributeError",
    "import fcntl": "ModuleNotFoundError",
    "os.open(path, os.O_RDONLY)": "AssertionError",
    "os.open(os.path.dirname(path), os.O_RDONLY)": "PermissionError",
    "os.fsync(os.open(path, os.O_RDONLY | os.O_BINARY))": "OSError",
    "held = open(path, 'rb'); os.replace(path, path + '.new')": "PermissionError",
    "held = open(path, 'rb'); os.unlink(path)": "PermissionError",
    "open('/proc/self/stat', 'rb')": "FileNotFoundError",
    "os.mkdir(path + ':0')": "OSError",
    "from pathlib import Path; Path(path).read_text()": "EncodingWarning",
}
"""What the stand-in must refuse to the project's code, and the error."""


def test_the_stand_in_takes_them_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something", encoding="utf-8")
    code = """
import json, os, sys
from tests.support import other_platform
other_platform.hide()
seen = {}
for body in json.loads(sys.argv[2]):
    scope = {"os": os, "path": sys.argv[1], "__name__": "latentcache.some"}
    try:
        exec(compile(body, other_platform.OURS[2] + "some.py", "exec"), scope)
    except BaseException as error:
        seen[body] = type(error).__name__
print(json.dumps(seen))
"""
    done = python(code, str(tmp_path / "file"), json.dumps(list(REFUSED)))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == REFUSED
