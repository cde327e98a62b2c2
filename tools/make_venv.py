"""Make the project's own Python environment from its pinned files: what `make venv` runs.

    python3 tools/make_venv.py [--venv .venv] [--lock requirements/lock.txt] [--paddle auto|none|REQUIREMENT]

Nothing beyond Python's standard library is needed to run it, not even pip or ensurepip, which Debian and
Ubuntu leave out of their python3 package.

An installed Paddle is never replaced. One in the environment itself is kept. One that belongs to the Python
running this script is used in place, by a link from the environment to that Python's packages, which are not
touched. Only when there is none is the CPU wheel installed.

The lock is the pairing of Paddle and PaddleNLP: requirements/lock.txt (Paddle 3) or requirements/lock-paddle26.txt
(the contest's platform). It pins every package, the CPU wheel among them, and so says which Paddle the others fit.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import List, NamedTuple, Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import JobFailed, UserError  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402

PYTHONS = ((3, 10), (3, 12))
BUILD = "requirements/build.txt"
LOCK = "requirements/lock.txt"
CPU_WHEEL = "paddlepaddle"
PROGRAM = ("requirements.txt", "requirements/demo.txt", "requirements/test.txt")

# Asked of an interpreter in a process of its own; without importing Paddle, which takes seconds.
_DESCRIBE = """
import importlib.metadata, importlib.util, json, os, sys, sysconfig
spec = importlib.util.find_spec("paddle")
folder = os.path.dirname(spec.origin) if spec and spec.origin else None
version = None
if folder:
    for dist in importlib.metadata.distributions():
        name = (dist.metadata["Name"] or "").lower()
        if name.startswith("paddlepaddle") and str(dist.locate_file("paddle")) == folder:
            version = name + " " + dist.version
packages = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
print(json.dumps({
    "python": list(sys.version_info[:3]),
    "site": sysconfig.get_path("purelib"),
    "packages": packages,
    "paddle": folder,
    "paddle_version": version,
}))
"""


class Interpreter(NamedTuple):
    """What an interpreter has.

    python: its version. site: its own package folder; packages: all of them. paddle: the folder that Paddle
    would be imported from; paddle_version: the distribution's name and version ("paddlepaddle-gpu 3.3.1"), or
    None for a build that pip does not know.
    """

    python: List[int]
    site: str
    packages: List[str]
    paddle: Optional[str]
    paddle_version: Optional[str]


def describe(python: str) -> Interpreter:
    """Ask `python` what it has. Raises UserError when it does not run."""
    try:
        # From the top of the file system: a folder named paddle in the current one is not what is asked for.
        done = subprocess.run(
            [python, "-c", _DESCRIBE], capture_output=True, text=True, check=True, cwd=os.sep
        )
        return Interpreter(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UserError(
            f"{python} does not run ({detail}); if it belongs to a half-made environment, delete that"
        ) from None


def check_version(python: str, version: List[int]) -> None:
    low, high = PYTHONS
    if not low <= tuple(version[:2]) <= high:
        raise UserError(
            f"{python} is Python {'.'.join(map(str, version))}; the pinned packages are for 3.{low[1]} to "
            f"3.{high[1]}: say which to use with `make PYTHON=/path/to/python3.{low[1] + 1} …`"
        )


def run(command: List[str], **kwargs) -> None:
    """Run a command that must succeed. Raises JobFailed naming it otherwise."""
    done = subprocess.run(command, **kwargs)
    if done.returncode:
        raise JobFailed(f"`{' '.join(command)}` ended with status {done.returncode}; see its output above")


def has_pip(python: str) -> bool:
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def run_pip(python: str, lock: str, *arguments: str) -> None:
    """`pip install` in the environment of `python`, under the pins of `lock`."""
    # As a variable, not as -c: then the pins hold for what packages are built with, too. pip splits it at
    # blanks, which a path may have and a URL does not.
    pins = pathlib.Path(ROOT, lock).as_uri()
    # PEP 517 builds get an environment of their own; seqeval's way to fetch setuptools_scm itself fails.
    environment = dict(os.environ, PIP_CONSTRAINT=pins, PIP_USE_PEP517="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    run([python, "-m", "pip", "install", *arguments], cwd=ROOT, env=environment)


def system_packages(names: List[str], folder: str) -> bool:
    """Unpack Debian packages into `folder`, without root or installing them. False where that fails."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return False
    with tempfile.TemporaryDirectory() as downloads:
        if subprocess.run(["apt-get", "download", *names], cwd=downloads).returncode:
            return False
        for package in glob.glob(os.path.join(downloads, "*.deb")):
            run(["dpkg-deb", "-x", package, folder])
    return True


def bootstrap_pip(python: str, lock: str) -> None:
    """Put the pinned pip into an environment that was made without one.

    With the pip of the Python that runs this script; else with the wheel that Debian keeps for its own use,
    installed or fetched by `apt-get download`. Raises UserError when there is no way.
    """
    if has_pip(sys.executable):
        site = describe(python).site
        run([sys.executable, "-m", "pip", "install", "--target", site, "-r", BUILD, "-c", lock], cwd=ROOT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(os.environ)
        wheels = glob.glob("/usr/share/python-wheels/pip-*.whl")
        if not wheels and system_packages(["python3-pip-whl", "ca-certificates"], scratch):
            wheels = glob.glob(os.path.join(scratch, "usr/share/python-wheels/pip-*.whl"))
            if not os.path.exists("/etc/ssl/certs/ca-certificates.crt"):
                # Debian's pip trusts the system's certificates, which a bare system does not have.
                bundle = os.path.join(scratch, "certificates.pem")
                with open(bundle, "wb") as out:
                    for path in sorted(glob.glob(os.path.join(scratch, "usr/share/ca-certificates/*/*.crt"))):
                        with open(path, "rb") as file:
                            out.write(file.read())
                environment.setdefault("PIP_CERT", bundle)
        if not wheels:
            raise UserError(
                f"{sys.executable} has neither ensurepip nor pip; apt-get install python3-venv and try again"
            )
        pip = os.path.join(wheels[0], "pip")
        run([python, pip, "install", "-r", BUILD, "-c", lock], cwd=ROOT, env=environment)


def make_environment(venv: str, lock: str) -> str:
    """Make `venv` if it is missing, with the pip of `lock` in it, and give the path of its interpreter."""
    python = os.path.join(os.path.abspath(venv), "bin", "python")
    if not os.path.lexists(python):
        command = [sys.executable, "-m", "venv", venv]
        if importlib.util.find_spec("ensurepip") is None:
            command.insert(3, "--without-pip")
        print(f"making {venv} with Python {sys.version.split()[0]} ({sys.executable})", flush=True)
        run(command)
    check_version(python, describe(python).python)
    if not has_pip(python):
        bootstrap_pip(python, lock)
    run_pip(python, lock, "--quiet", "-r", BUILD)
    return python


def link_packages(python: str, packages: List[str]) -> None:
    """Let the environment of `python` see the package folders `packages`, behind its own."""
    lines = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in packages)
    with atomic_write(os.path.join(describe(python).site, "paddle-of-base-python.pth")) as file:
        file.write(lines)


def pinned_paddle(lock: str) -> str:
    """The version of Paddle that `lock` is for. Raises UserError when it names none."""
    path = pathlib.Path(ROOT, lock)
    pins = path.read_text(encoding="utf-8") if path.is_file() else ""
    pin = re.search(rf"^{CPU_WHEEL}==([\d.]+)$", pins, flags=re.MULTILINE)
    if not pin:
        raise UserError(f"{lock} is no lock file with a line {CPU_WHEEL}==VERSION")
    return pin.group(1)


def check_paddle(found: Interpreter, lock: str) -> None:
    """Raise UserError for a Paddle that the packages of `lock` do not work with."""
    version = (found.paddle_version or "").partition(" ")[2]
    pinned = pinned_paddle(lock)
    # 0.0.0 is what a build of Paddle's development branch calls itself.
    if version and version.split(".")[0] not in ("0", pinned.split(".")[0]):
        raise UserError(
            f"{found.paddle_version} in {found.paddle} is kept, but {lock} is for Paddle {pinned}; use another "
            f"Python (make PYTHON=…), or a wheel of its own for a new environment (make PADDLE={CPU_WHEEL}=={pinned})"
        )


def choose_paddle(python: str, wanted: str, lock: str) -> List[str]:
    """Arguments for pip that bring Paddle into the environment of `python`; none when it needs none.

    wanted: "auto" (the Paddle of the Python that runs this script, else the CPU wheel), "none", or a
    requirement (a wheel's path, or name==version). A Paddle in the environment itself comes before them all.
    """
    inside = describe(python)
    if inside.paddle:
        check_paddle(inside, lock)
        print(f"keeping {inside.paddle_version or 'Paddle'} in {inside.paddle}")
        return []
    if wanted == "none":
        print("no Paddle: install one into the environment before anything else is run")
        return []
    if wanted != "auto":
        return [wanted]
    base = describe(sys.executable)
    if not base.paddle:
        return [CPU_WHEEL]
    check_paddle(base, lock)
    link_packages(python, base.packages)
    print(f"using {base.paddle_version or 'Paddle'} in {base.paddle}, which stays as it is")
    return []


def provide_openmp(python: str) -> bool:
    """Give Paddle the libgomp.so.1 that a bare system lacks: the copy that scikit-learn's wheel carries.

    In the wheel it has a name of its own; under its common name, and loaded before anything else, it serves
    every library that asks for libgomp.so.1. True when there was one to copy.
    """
    site = describe(python).site
    copies = glob.glob(os.path.join(site, "scikit_learn.libs", "libgomp-*.so*"))
    if not copies:
        return False
    with open(copies[0], "rb") as file:
        library = file.read()
    unique, common = os.path.basename(copies[0]).encode(), b"libgomp.so.1"
    target = os.path.join(site, "libgomp", common.decode())
    with atomic_write(target, "wb") as file:
        file.write(library.replace(unique, common.ljust(len(unique), b"\0")))
    with atomic_write(os.path.join(site, "libgomp.pth")) as file:
        file.write(f"import ctypes; ctypes.CDLL({target!r}, mode=ctypes.RTLD_GLOBAL)\n")
    return True


def import_paddle(python: str) -> str:
    """Import Paddle in a process of its own; the last line of its error, or nothing when it works."""
    done = subprocess.run([python, "-c", "import paddle"], capture_output=True, text=True, cwd=ROOT)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""


def check_import(python: str) -> None:
    """Raise JobFailed when Paddle cannot be imported, after mending what can be mended."""
    problem = import_paddle(python)
    if "libgomp.so.1" in problem and provide_openmp(python):
        problem = import_paddle(python)
    if problem:
        raise JobFailed(f"Paddle is installed but does not import: {problem}")


def main(arguments: Optional[List[str]] = None) -> int:
    parser = cli.Parser(
        description=__doc__.split("\n\n")[0], epilog="Run it with the Python that the environment shall use."
    )
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--lock", default=LOCK, help="the pinned packages (default: %(default)s)")
    parser.add_argument(
        "--paddle",
        default="auto",
        help="auto: the CPU wheel unless a Paddle is found; none; or a wheel's path or a requirement",
    )
    args = parser.parse_args(arguments)

    check_version(sys.executable, list(sys.version_info[:3]))
    pinned_paddle(args.lock)
    python = make_environment(args.venv, args.lock)
    wheel = choose_paddle(python, args.paddle, args.lock)
    before = describe(python).paddle
    requirements = [part for name in PROGRAM for part in ("-r", name)]
    print("installing the pinned packages: up to 2 GB, a few minutes", flush=True)
    run_pip(python, args.lock, *wheel, "-r", BUILD, *requirements)
    after = describe(python)
    if before and after.paddle != before:
        raise JobFailed(f"the Paddle in {before} is now hidden by one in {after.paddle}; delete {args.venv}")
    if after.paddle:
        check_import(python)
        print(f"ready: {args.venv} with {after.paddle_version or 'Paddle'}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
