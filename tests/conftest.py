"""Fixtures for all tests.

`import paddlemix` comes first: Paddle reads the thread settings while it is imported.
"""

import logging
import os
import pathlib

# Of several pytest workers each has its share of the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import paddlemix  # noqa: E402, F401

# Nothing here may reach for the network: a test that needs a file makes it. (PaddleNLP asks a hub otherwise.)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Help and reports are expected in English, whatever the locale is.
for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
    if os.environ.get(name, "").lower().startswith("zh"):
        os.environ[name] = "C.UTF-8"

import pytest  # noqa: E402

from tests.browser import Browser, find_browser  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests in a browser are slow ones."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The project's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The reference goldens and real samples: $MGEN_SHARED, or the folder `shared` beside the project."""
    folder = pathlib.Path(os.environ.get("MGEN_SHARED") or ROOT.parent / "shared").resolve()
    if not (folder / "goldens").is_dir():
        pytest.skip(f"no goldens in {folder} (set MGEN_SHARED to the folder that holds goldens/)")
    return folder


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    command = find_browser()
    if command is None:
        pytest.skip("no Chromium in the path (Debian: apt install chromium)")
    made = Browser(command)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def log_level():
    """What a test does to the log's level ends with it."""
    logger = logging.getLogger("paddlemix")
    level = logger.level
    yield
    logger.setLevel(level)
