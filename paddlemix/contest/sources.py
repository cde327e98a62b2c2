"""Imports of a program and packages in its requirements.txt, from the source text: nothing is imported or run."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import sysconfig
from importlib import metadata
from typing import Dict, Iterator, List, NamedTuple, Optional, Set

from paddlemix.utils.errors import UserError
from paddlemix.utils.files import open_plain

REQUIREMENTS_NAME = "requirements.txt"

# Package → module, where they differ and the package may not be installed here.
_MODULES = {
    "pillow": "PIL",
    "opencv-python": "cv2",
    "opencv-python-headless": "cv2",
    "opencv-contrib-python": "cv2",
    "scikit-learn": "sklearn",
    "scikit-image": "skimage",
    "pyyaml": "yaml",
    "python-dateutil": "dateutil",
    "protobuf": "google",
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(?:\[[\w\s,.-]*\])?\s*([<>=!~@;].*)?")
_MISSING = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


class Import(NamedTuple):
    """An import of `name` (dotted) in `file`, relative to the searched folder. guarded: a failure is caught."""

    name: str
    file: str
    line: int
    guarded: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


class Requirement(NamedTuple):
    """package: its normalised name. text: the line without its comment."""

    package: str
    text: str


def _guards(node: ast.Try) -> bool:
    for handler in node.handlers:
        caught = [handler.type] if not isinstance(handler.type, ast.Tuple) else handler.type.elts
        if any(kind is None or getattr(kind, "id", "") in _MISSING for kind in caught):
            return True
    return False


def imports(folder: str, file: str) -> List[Import]:
    """All imports of `file`, relative to `folder`, including those inside functions.

    `from a import b` counts as a.b, which may be a module or a name in one; relative imports are resolved.

    Raises:
        UserError: it is not valid Python.
    """
    path = os.path.join(folder, file)
    try:
        with open_plain(path) as source:
            tree = ast.parse(source.read(), filename=path)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Python: {error}", "not-python") from None
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and _guards(node)]
    guarded = {inner for node in tries for child in node.body for inner in ast.walk(child)}
    found: List[Import] = []
    package = os.path.dirname(file).split(os.sep)
    for node in ast.walk(tree):
        base: List[str] = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + ([node.module] if node.module else [])
        elif not isinstance(node, ast.Import):
            continue
        for alias in node.names:
            found.append(Import(".".join([*base, alias.name]), file, node.lineno, node in guarded))
    return found


def _module_files(folder: str, name: str) -> Iterator[str]:
    """Files under `folder` that `import name` executes: each package's __init__, then the module. The last parts of
    `name` may be names in a module."""
    path = ""
    for part in name.split("."):
        path = os.path.join(path, part)
        for file in (os.path.join(path, "__init__.py"), path + ".py"):
            if os.path.isfile(os.path.join(folder, file)):
                yield file


def files_reached(folder: str, script: str) -> List[str]:
    """Python files under `folder` that `script` imports, directly or not, and itself; relative and sorted.

    Imports by computed names are not found.

    Raises:
        UserError: a file is not valid Python.
    """
    reached, waiting = {script}, [script]
    while waiting:
        for found in imports(folder, waiting.pop()):
            new = set(_module_files(folder, found.name)) - reached
            reached |= new
            waiting += new
    return sorted(reached)


def is_standard(module: str) -> bool:
    """Whether a top-level module is part of the standard library."""
    # From Python 3.10 on; also has the modules of other systems.
    if module in getattr(sys, "stdlib_module_names", ()):
        return True
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    folders = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    origin = os.path.realpath(spec.origin or "")
    return not re.search(r"/(site|dist)-packages/", origin) and any(origin.startswith(f + os.sep) for f in folders)


def foreign_imports(folder: str, files: List[str]) -> Dict[str, Import]:
    """{top-level module: its first import} for modules that are neither in the standard library nor under `folder`.

    Guarded imports count only if the module has no other.
    """
    found: Dict[str, Import] = {}
    standard: Dict[str, bool] = {}
    for file in files:
        for one in imports(folder, file):
            top = one.top
            if os.path.isdir(os.path.join(folder, top)) or os.path.isfile(os.path.join(folder, top + ".py")):
                continue
            if top not in standard:
                standard[top] = is_standard(top)
            if not standard[top] and (top not in found or found[top].guarded and not one.guarded):
                found[top] = one
    return found


def normal(package: str) -> str:
    """A package's normalised name."""
    return re.sub(r"[-_.]+", "-", package).lower()


def parse_requirement(line: str) -> Optional[Requirement]:
    """A line of requirements.txt; None for a blank line, a comment or an option.

    Raises:
        UserError: it does not name a package.
    """
    text = re.sub(r"(^|\s)#.*$", "", line).strip()
    if not text or text.startswith("-"):
        return None
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} does not name a package", "requirement")
    return Requirement(normal(match.group(1)), text)


def modules_of(package: str) -> Set[str]:
    """Top-level modules of a package, from its installed files, else by its name."""
    modules = {_MODULES.get(package, package.replace("-", "_"))}
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        return modules
    for file in files:
        top = file.parts[0]
        if len(file.parts) > 1 and not top.endswith((".dist-info", ".egg-info", ".libs")) and top != "..":
            modules.add(top)
        elif len(file.parts) == 1 and top.endswith((".py", ".so")):
            modules.add(top.split(".")[0])
    return modules
