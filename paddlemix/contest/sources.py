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


def python_files(folder: str) -> List[str]:
    """Python files in a folder and all below it, relative, sorted. Caches and hidden folders are passed over."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names if name.endswith(".py")]
    return sorted(found)


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
    found: List[Import] = []
    package = os.path.dirname(file).split(os.sep)

    def visit(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, file, node.lineno, guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            found.extend(Import(".".join([*base, alias.name]), file, node.lineno, guarded) for alias in node.names)
        elif isinstance(node, ast.Try):
            for child in node.body:
                visit(child, guarded or _guards(node))
            for child in [*node.handlers, *node.orelse, *node.finalbody]:
                visit(child, guarded)
        else:
            # An import is a statement: expressions, most of a tree, are passed over.
            for part in ("body", "orelse", "cases"):
                children = getattr(node, part, ())
                for child in children if isinstance(children, list) else ():
                    visit(child, guarded)

    visit(tree, False)
    return found


def _module_files(folder: str, name: str) -> Iterator[str]:
    """Files under `folder` that `import name` runs: each package's __init__, then the module. The last parts of
    `name` may be names in a module."""
    path = ""
    for part in name.split("."):
        path = os.path.join(path, part)
        if os.path.isdir(os.path.join(folder, path)):
            init = os.path.join(path, "__init__.py")
            if os.path.isfile(os.path.join(folder, init)):
                yield init
        else:
            if os.path.isfile(os.path.join(folder, path + ".py")):
                yield path + ".py"
            return


def files_needed(folder: str, script: str) -> List[str]:
    """Files under `folder` that `script` needs: what it imports directly or not, and what lies beside those modules
    without being Python (a table, a template). Relative and sorted; `script` is one of them.

    Imports by a computed name are not seen.

    Raises:
        UserError: a file cannot be read as Python.
    """
    needed, waiting = {script}, [script]
    while waiting:
        for found in imports(folder, waiting.pop()):
            for file in _module_files(folder, found.name):
                if file not in needed:
                    needed.add(file)
                    waiting.append(file)
    modules = {os.path.dirname(file) for file in needed if os.path.basename(file) != "__init__.py"}
    for package in sorted(modules - {""}):
        for parent, folders, names in os.walk(os.path.join(folder, package)):
            if parent != os.path.join(folder, package) and any(name.endswith(".py") for name in names):
                folders[:] = []
                continue
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            for name in names:
                if not name.startswith(".") and not name.endswith((".py", ".pyc", ".pyo")):
                    needed.add(os.path.relpath(os.path.join(parent, name), folder))
    return sorted(needed)


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


def foreign_imports(folder: str, files: Optional[List[str]] = None) -> Dict[str, Import]:
    """{top module: where it is first imported} of what is neither Python's own nor a file under `folder`.

    An import that may fail counts only if there is no other of the module.
    """
    found: Dict[str, Import] = {}
    standard: Dict[str, bool] = {}
    for file in python_files(folder) if files is None else [name for name in files if name.endswith(".py")]:
        beside = os.path.dirname(file)
        for one in imports(folder, file):
            top = one.top
            # A script's own folder is on its path, too.
            places = [os.path.join(folder, top), os.path.join(folder, beside, top)]
            if any(os.path.isdir(place) or os.path.isfile(place + ".py") for place in places):
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
        UserError: it is no requirement that pip takes by name.
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
