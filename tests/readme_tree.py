"""The files of the project with their charters, and the tree in README.md made of them (`make tree`)."""

import ast
import fnmatch
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree -->", "<!-- /tree -->"
COLUMN = 36  # where charters start; a fixed column, so that one renamed file changes one line

# files whose format has no room for a charter, or that the tree is in
UNLISTED = {"README.md", "LICENSE", "CHANGELOG.md", ".gitignore", "py.typed"}


def project_files(root: Path = ROOT) -> list[Path]:
    """Every file on disk that .gitignore does not exclude, relative to root, sorted; works without git too."""
    lines = (root / ".gitignore").read_text(encoding="utf-8").split()
    patterns = [line.strip("/") for line in lines if not line.startswith("/")]
    anchored = [line.strip("/") for line in lines if line.startswith("/")]

    def ignored(path: Path) -> bool:
        return (
            path.name == ".git"
            or any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
            or path.relative_to(root).as_posix() in anchored
        )

    found, folders = [], [root]
    while folders:
        for path in folders.pop().iterdir():
            if ignored(path):
                continue
            if path.is_dir():
                folders.append(path)
            else:
                found.append(path.relative_to(root))
    return sorted(found)


def charter(file: Path) -> str:
    """The sentence a file opens with: of a docstring in Python, of a heading or comment elsewhere; "" without one."""
    text = (ROOT / file).read_text(encoding="utf-8", errors="replace")  # pictures have no charter
    if file.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    opening = [line for line in text.splitlines()[:2] if not line.startswith("#!")]
    return opening[0].removeprefix("#").strip() if opening and opening[0].startswith("#") else ""


def tree() -> str:
    """The block between the markers: folders first, one line a file; a package's `__init__` speaks for its folder."""
    lines: list[str] = []

    def add(name: str, depth: int, sentence: str) -> None:
        lines.append(f"{'    ' * depth + name:<{COLUMN - 1}} {sentence}".rstrip())

    def walk(folder: Path, depth: int) -> None:
        inside = [file for file in listed if folder in file.parents]
        for name in sorted({file.relative_to(folder).parts[0] for file in inside if file.parent != folder}):
            package = folder / name / "__init__.py"
            add(f"{name}/", depth, charter(package) if package in listed else "")
            walk(folder / name, depth + 1)
        for file in inside:
            if file.parent == folder and file.name != "__init__.py":
                add(file.name, depth, charter(file))

    listed = [file for file in project_files() if file.name not in UNLISTED]
    walk(Path(), 0)
    return "\n".join([BEGIN, "```text", *lines, "```", END])


def main() -> int:
    """Rewrite the block in README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"README.md needs one line {BEGIN} and after it one line {END}; add them where the tree belongs")
        return 1
    before, _, rest = text.partition(BEGIN)
    readme.write_text(before + tree() + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
