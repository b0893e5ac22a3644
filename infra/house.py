"""Print the state of the house: folders, long functions, long parameter lists, import circles, modules without a test.

    python infra/house.py            # for people
    python infra/house.py --json     # for programs

It reads the source as text and runs nothing of the project.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "latentcache", "diffusion", "cli")
MAX_LINES = 60
MAX_PARAMETERS = 8
MAX_COMMAND_LINES = 100
MAX_FILES = 14
FOLDERS_WITH_MORE = {"cli/commands": 26}
"""Folders that may hold more files than others; a room's own ``__init__`` is not counted."""
UNTESTED = ROOT / "infra" / "house_untested.txt"
"""Modules that need no test of their name, one per line with the reason after a colon."""


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    name: str
    path: Path
    tree: ast.Module
    lines: int


@dataclass
class House:
    """What was counted."""

    files: int = 0
    folders: int = 0
    lines: int = 0
    largest_folders: list[tuple[str, int]] = field(default_factory=list)
    full_folders: list[tuple[str, int]] = field(default_factory=list)
    long_commands: list[tuple[str, int]] = field(default_factory=list)
    long_functions: list[tuple[str, int]] = field(default_factory=list)
    long_parameter_lists: list[tuple[str, int]] = field(default_factory=list)
    circles: list[list[str]] = field(default_factory=list)
    into_rooms: list[tuple[str, str]] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)
    unneeded_exceptions: list[str] = field(default_factory=list)


def modules() -> list[Module]:
    """Every module of the packages, the rooms' own ``__init__`` left out."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                text = path.read_text(encoding="utf-8")
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(Module(name, path, ast.parse(text), text.count("\n")))
    return found


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions and methods with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node
            yield from functions(node, f"{prefix}.{node.name}")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}.{node.name}")
        elif not isinstance(node, ast.expr):
            yield from functions(node, prefix)


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is a Triton kernel: those take pointers, strides and sizes one by one."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters of a function, ``self`` and ``cls`` not counted."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def command_lines(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Commands that a file registers, each with its lines and those of what it uses in the file, help included."""
    parts = {
        name: node
        for node in tree.body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.Assign)
            else []
        )
    }
    register = parts.get("register")
    if register is None:
        return
    registered = [node.id for node in ast.walk(register) if isinstance(node, ast.Name) and node.id in parts]
    inner = [node for node in ast.walk(register) if isinstance(node, ast.FunctionDef) and node is not register]
    for command in [*(parts[name] for name in dict.fromkeys(registered)), *inner]:
        if not isinstance(command, ast.FunctionDef):
            continue
        used: list[ast.AST] = [command]
        for node in used:  # grows while it is walked
            for name in (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in parts):
                if parts[name] not in used and name != "register":
                    used.append(parts[name])
        lines = sum((getattr(node, "end_lineno", 0) or 0) - getattr(node, "lineno", 0) + 1 for node in used)
        yield command.name, lines


def imports(module: Module, known: set[str]) -> Iterator[tuple[str, bool]]:
    """Modules of the project that a module imports when it is loaded, and whether that names the module itself."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in known else node.module), inner in known or node.module in known
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    yield alias.name, alias.name in known


def exports(known: set[str]) -> dict[tuple[str, str], str]:
    """(room, name) -> module, from the rooms' stubs."""
    found = {}
    for package in PACKAGES:
        for stub in (ROOT / package).rglob("__init__.pyi"):
            room = ".".join(stub.relative_to(ROOT).parent.parts)
            for node in ast.parse(stub.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        found[room, alias.name] = f"{room}.{node.module}"
    return found


def edges(found: list[Module]) -> dict[str, set[str]]:
    """Imports between files: what a room's stub exports is followed to the file that defines it."""
    known = {m.name for m in found}
    exported = exports(known)
    graph: dict[str, set[str]] = {m.name: set() for m in found}
    for module in found:
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] not in PACKAGES:
                continue
            for alias in node.names:
                target, room = f"{node.module}.{alias.name}", node.module
                while target not in known and (room, alias.name) in exported:  # a room may pass on an inner room's name
                    target = room = exported[room, alias.name]
                for candidate in (target, node.module):
                    if candidate in known and candidate != module.name:
                        graph[module.name].add(candidate)
                        break
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == name:
                    break
            if len(component) > 1:
                found.append(sorted(component))

    sys.setrecursionlimit(10_000)
    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def room_of(name: str) -> str:
    """The room that holds a module: its folder, streaming and codecs and pacs counted to the room around them."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("pipeline", "diffusion", "cli") and len(parts) > 2 else name


def into_rooms(found: list[Module]) -> list[tuple[str, str]]:
    """Imports that reach into another room's file for a name which that room exports."""
    known = {m.name for m in found}
    exported = set(exports(known))
    wrong = []
    for module in found:
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ImportFrom) or node.module not in known:
                continue
            theirs = node.module.rpartition(".")[0]
            if room_of(node.module) != room_of(module.name) and module.name.split(".")[0] != "latentcache":
                wrong += [
                    (module.name, f"{node.module}.{alias.name}")
                    for alias in node.names
                    if any((room, alias.name) in exported for room in (theirs, theirs.rpartition(".")[0]))
                ]
    return wrong


def untested(found: list[Module]) -> tuple[list[str], list[str]]:
    """Modules without a test of their name that the list of exceptions does not have, and exceptions without need."""
    allowed = {
        line.partition(":")[0].strip()
        for line in UNTESTED.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    }
    without = set()
    for module in found:
        *folders, last = module.name.split(".")
        place = ROOT / "tests" / Path(*folders)
        if not any(place.glob(f"test_{last}*.py")):
            without.add(module.name)
    return sorted(without - allowed), sorted(allowed - without)


def count() -> House:
    """Count everything."""
    found = modules()
    house = House(files=len(found), lines=sum(m.lines for m in found))
    folders = Counter(str(m.path.parent.relative_to(ROOT)) for m in found)
    house.folders = len(folders)
    house.largest_folders = folders.most_common(5)
    house.full_folders = [(name, n) for name, n in folders.items() if n > FOLDERS_WITH_MORE.get(name, MAX_FILES)]
    for module in found:
        library = not module.name.startswith("cli.")
        for name, node in functions(module.tree, module.name):
            if library and body_lines(node) > MAX_LINES:
                house.long_functions.append((name, body_lines(node)))
            if library and not is_kernel(node) and parameters(node) > MAX_PARAMETERS:
                house.long_parameter_lists.append((name, parameters(node)))
        if module.path.parent.name == "commands":
            commands = command_lines(module.tree)
            house.long_commands += [(f"{module.name}.{n}", k) for n, k in commands if k > MAX_COMMAND_LINES]
    house.circles = circles(edges(found))
    house.into_rooms = into_rooms(found)
    house.untested, house.unneeded_exceptions = untested(found)
    return house


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.parse_args()
    house = count()
    if options.json:
        print(json.dumps(vars(house)))
        return
    print(f"{house.files} files in {house.folders} folders, {house.lines} lines")
    print("largest folders: " + ", ".join(f"{name} {n}" for name, n in house.largest_folders))
    for title, rows in (
        (f"folders over {MAX_FILES} files", house.full_folders),
        (f"commands over {MAX_COMMAND_LINES} lines", house.long_commands),
        (f"functions over {MAX_LINES} lines", house.long_functions),
        (f"functions over {MAX_PARAMETERS} parameters", house.long_parameter_lists),
        ("import circles", house.circles),
        ("imports into another room's file", house.into_rooms),
        ("modules without a test of their name", house.untested),
        ("exceptions that are not needed", house.unneeded_exceptions),
    ):
        print(f"{title}: {len(rows)}")
        for row in rows:
            print("   ", row)


if __name__ == "__main__":
    main()
