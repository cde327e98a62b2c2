"""What a program imports and what its requirements.txt names, read from the text: nothing is imported or run."""

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

REQUIREMENTS_NAME = "requirements.txt"

# Package → module, where they differ and the package may not be installed here to be asked.
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
    """An import of `name` (dotted) in `file`, relative to the folder that was searched. guarded: the program goes on
    when it fails."""

    name: str
    file: str
    line: int
    guarded: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


class Requirement(NamedTuple):
    """package: its name in pip's normal form. text: the whole line without its comment."""

    package: str
    text: str


def _guards(node: ast.Try) -> bool:
    for handler in node.handlers:
        caught = [handler.type] if not isinstance(handler.type, ast.Tuple) else handler.type.elts
        if any(kind is None or getattr(kind, "id", "") in _MISSING for kind in caught):
            return True
    return False


def imports(folder: str, file: str) -> List[Import]:
    """Everything that `file`, relative to `folder`, imports: at its top, or inside functions.

    `from a import b` counts as a.b, which may be a module or a name in one; relative imports are resolved.

    Raises:
        UserError: it cannot be read as Python.
    """
    path = os.path.join(folder, file)
    try:
        with open(path, "rb") as source:
            tree = ast.parse(source.read(), filename=path)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Python: {error}") from None
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
    """Files under `folder` that `import name` runs: each package's __init__, then the module. The last parts of
    `name` may be names in a module."""
    path = ""
    for part in name.split("."):
        path = os.path.join(path, part)
        for file in (os.path.join(path, "__init__.py"), path + ".py"):
            if os.path.isfile(os.path.join(folder, file)):
                yield file


def files_reached(folder: str, script: str) -> List[str]:
    """Python files under `folder` that `script` imports, directly or not; relative and sorted, `script` among them.

    Imports by a computed name are not seen.

    Raises:
        UserError: a file cannot be read as Python.
    """
    reached, waiting = {script}, [script]
    while waiting:
        for found in imports(folder, waiting.pop()):
            new = set(_module_files(folder, found.name)) - reached
            reached |= new
            waiting += new
    return sorted(reached)


def is_standard(module: str) -> bool:
    """Whether a top module comes with Python itself."""
    # From Python 3.10 on; it also knows the modules of other systems.
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
    """{top module: where it is first imported} of what `files` import that is neither Python's own nor under `folder`.

    An import that may fail counts only if there is no other of the module.
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
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def parse_requirement(line: str) -> Optional[Requirement]:
    """A line of requirements.txt, or None for a blank one, a comment or an option.

    Raises:
        UserError: not a requirement that pip takes by name.
    """
    text = re.sub(r"(^|\s)#.*$", "", line).strip()
    if not text or text.startswith("-"):
        return None
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} does not name a package")
    return Requirement(normal(match.group(1)), text)


def modules_of(package: str) -> Set[str]:
    """Top modules that a package brings, as its installed files say, else by its name."""
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
