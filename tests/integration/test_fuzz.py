"""The harness of tests/chaos over every reader, with few inputs; and its table holds every module that reads files."""

import ast
import re
import subprocess
import sys

import pytest
from project import ROOT

CHAOS = ROOT / "tests" / "chaos"
_READS = re.compile(
    r"read_bytes\(|read_text\(|\.open\(\"rb|imread|imdecode|Image\.open|VideoCapture|np\.load|read_json\(|read_yaml\("
    r"|read_lines\(|read_array\(|checked_content\(|ParserCreate"
)


@pytest.mark.slow
def test_few_damaged_files_of_every_reader_are_read_rightly_or_refused_by_name():
    """In a process of its own: forking is only safe before a process has threads."""
    command = [sys.executable, CHAOS / "fuzz.py", "--count", "700", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"fuzz: [\d,]+ inputs over \d+ readers in .* 0 faults", done.stdout.splitlines()[-1])


def test_every_module_of_io_that_reads_files_is_in_the_table():
    """Found on disk; what is left out says why."""
    table = ast.parse((CHAOS / "_readers.py").read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(table) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    folder = ROOT / "visionmtl" / "io"
    modules = {
        ".".join(file.relative_to(ROOT / "visionmtl").with_suffix("").parts): file.read_text(encoding="utf-8")
        for file in sorted(folder.rglob("*.py"))
    }
    reading = {name for name, text in modules.items() if _READS.search(text)}
    assert len(reading) > 8 and reading <= texts, reading - texts
    assert {name for name in texts if name.startswith("io.")} <= modules.keys()


def test_mutations_come_from_the_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(CHAOS))
    import random

    from _mutations import mutate

    content = b'{"a": [1, 2, {"b": null}], "c": "d"}'
    first, again, other = (
        [mutate(content, "a.json", random.Random(f"{seed}/{k}"), content) for k in range(50)] for seed in (0, 0, 1)
    )
    assert first == again != other and len(set(first)) > 40
