"""The rules of the house: who imports whom, what stays light, what the READMEs promise."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Folder of paddlemix/ → the folders it may import. Weights files and prompts come below the models: they know names
# and bytes, texts and ids, never a layer. Training and inference share everything below and never each other.
MAY_IMPORT = {
    "utils": set(),
    "checkpoint": {"utils"},
    "processors": {"utils"},
    "models": {"checkpoint", "processors", "utils"},
    "auto": {"models", "processors", "utils"},
    "datasets": {"processors", "utils"},
    "curation": {"datasets", "processors", "utils"},
    "metrics": {"utils"},
    "trainer": {"auto", "checkpoint", "datasets", "metrics", "models", "processors", "utils"},
    "inference": {"auto", "checkpoint", "datasets", "metrics", "models", "processors", "utils"},
    "contest": {"checkpoint", "datasets", "inference", "models", "utils"},
}

# What takes long to import, or may be missing where only weights or rows are handled.
HEAVY = {
    "paddle", "paddlenlp", "PIL", "cv2", "tiktoken", "transformers", "datasets", "scipy", "pandas", "torch",
    "matplotlib", "sklearn", "visualdl", "pycocoevalcap", "ftfy", "safetensors", "jieba", "huggingface_hub", "requests",
}  # fmt: skip

# Where the name of a package and that of its module differ.
MODULE_OF = {"pillow": "PIL", "tensorboardx": "tensorboardX"}


def house_files(*patterns):
    """Files of the project that match one of the patterns: tracked, or new and not ignored.

    Without git, as in an unpacked archive: what stands in folders that are not ignored as a whole.
    """
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = {pathlib.PurePath(name) for name in listed if name and (ROOT / name).is_file()}
    else:
        left_out = {"demo", "ckpt", "runs", "weights", "dataset", "submission"}
        tops = [top for top in ROOT.iterdir() if top.name not in left_out and not top.name.startswith(".")]
        found = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*"))]
        paths = {
            pathlib.PurePath(path.relative_to(ROOT))
            for path in found
            if path.is_file() and "__pycache__" not in path.parts
        }
    return sorted(path for path in paths if not patterns or any(path.match(pattern) for pattern in patterns))


def shipped_files():
    """The Python files that run on the contest's platform too."""
    files = house_files("*.py")
    return [path for path in files if path.parts[0] in ("paddlemix", "tools") or len(path.parts) == 1]


def parse(path, **kwargs):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path), **kwargs)


def imported_modules(tree):
    """(full dotted name, line) of everything a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def scripts():
    return [str(path) for path in house_files("*.py") if len(path.parts) == 1 or path.parts[0] == "tools"]


def test_layers():
    wrong = []
    for path in shipped_files():
        if path.parts[0] != "paddlemix" or len(path.parts) == 2:
            continue
        here = path.parts[1]
        for name, line in imported_modules(parse(path)):
            parts = name.split(".")
            if parts[0] in ("tools", "tests"):
                wrong.append(f"{path}:{line} imports {name}")
            elif parts[0] == "paddlemix" and len(parts) > 1 and (ROOT / "paddlemix" / parts[1]).is_dir():
                if parts[1] != here and parts[1] not in MAY_IMPORT[here]:
                    wrong.append(f"{path}:{line}: {here} may not import {parts[1]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["checkpoint", "contest"])
def test_weights_and_submissions_are_handled_without_paddle(package):
    names = {name for path in house_files(f"paddlemix/{package}/*.py") for name, _ in imported_modules(parse(path))}
    ours = {name.rpartition(".")[0] for name in names if name.startswith("paddlemix.")}
    status, _, modules, _ = imports_of("-c", "import " + ", ".join(sorted(ours)))
    assert status == 0 and not (modules | names) & {"paddle", "paddlenlp"}


def test_one_module_asks_for_versions():
    asks = re.compile(r"PADDLE_VERSION|\bpaddle(nlp)?\.__version__|hasattr\((paddle|F|core)\b")
    for path in shipped_files():
        if path != pathlib.PurePath("paddlemix/utils/compat.py"):
            found = asks.search((ROOT / path).read_text(encoding="utf-8"))
            assert not found, f"{path}: {found.group()} belongs into paddlemix/utils/compat.py"


def test_what_paddle26_leaves_out_imports_no_paddle():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    left_out = re.search(r"^NO_PADDLE := (.*)$", makefile, flags=re.MULTILINE).group(1).split()
    for name in left_out:
        files = house_files(f"{name}/*.py") if (ROOT / name).is_dir() else house_files(name)
        assert files, f"Makefile: {name} is not there"
        for path in files:
            for module, line in imported_modules(parse(path)):
                assert module.split(".")[0] not in ("paddle", "paddlenlp"), f"{path}:{line} imports {module}"


# Arguments that are texts, names of devices or numbers of bytes. The type of a path says whether it is written.
TEXTS = {"prompt", "system", "fallback", "device", "max_shard_size", "paddle", "child", "pretrain"}


def test_every_argument_that_is_a_path_says_so():
    """So that a ~ is the home in each of them, and what cannot be written is said at once (utils/cli.py)."""
    for path in shipped_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                given = {word.arg for word in node.keywords}
                name = node.args[0].value.lstrip("-")
                typed = given & {"type", "action", "choices"} and not any(
                    word.arg == "action" and word.value.value == "append" and "type" not in given
                    for word in node.keywords
                )
                assert typed or name in TEXTS, f"{path}:{node.lineno}: {name} has no type: is it a path (cli.path)?"


def test_no_star_imports():
    for path in house_files("*.py"):
        for name, line in imported_modules(parse(path)):
            assert not name.endswith(".*"), f"{path}:{line} imports {name}"


def test_every_import_is_in_the_requirements():
    listed = set()
    for name in ("requirements.txt", "requirements/demo.txt"):
        for line in (ROOT / name).read_text().splitlines():
            package = re.split(r"[#\s<>=;]", line.strip())[0].lower().replace("-", "_")
            listed.add(MODULE_OF.get(package, package))
    # A script's own folder is on its path, so tools import each other by name.
    ours = {"paddlemix", "tools", "paddle"} | {pathlib.PurePath(script).stem for script in scripts()}
    for path in shipped_files():
        for name, line in imported_modules(parse(path)):
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or top in ours or top in listed
            assert known, f"{path}:{line} imports {top}, which no requirements file names"


@pytest.mark.parametrize("path", shipped_files(), ids=str)
def test_python_38_can_read_it(path):
    """What `make lint` cannot see: vermin does not know the type of most names, and tries no syntax of old."""
    tree = parse(path, feature_version=(3, 8))
    postponed = any(name == "__future__.annotations" for name, _ in imported_modules(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            newer = node.attr in ("removeprefix", "removesuffix", "bit_count")
            assert not newer, f"line {node.lineno}: .{node.attr} came after 3.8"
        if isinstance(node, (ast.FunctionDef, ast.AnnAssign)):
            assert postponed, "annotations, but no `from __future__ import annotations`"


def imports_of(*command):
    """Run python; its exit status, output, the top modules it imported and the seconds it took."""
    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    names = re.findall(r"^import time:[^|]*\|[^|]*\| +([\w.]+)$", done.stderr, flags=re.MULTILINE)
    return done.returncode, done.stdout, {name.split(".")[0] for name in names}, seconds


def test_importing_the_package_is_light():
    status, _, modules, _ = imports_of("-c", "import paddlemix")
    assert status == 0 and "paddlemix" in modules
    assert not modules & (HEAVY | {"numpy"})


@pytest.mark.parametrize("script", scripts())
def test_help_is_light(script):
    """Under a second on an idle machine. Time depends on the load, so the reason for it is held here."""
    status, output, modules, seconds = imports_of(script, "--help")
    print(f"{script} --help: {seconds:.2f} s")
    assert status == 0
    assert os.path.basename(script) in output
    assert not modules & HEAVY


def fences(readme):
    """(language, text) of every fenced block of a page."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def left_column(block):
    """The lines of a drawing without the explanations, which stand behind two or more blanks."""
    return [re.split(r"(?<=\S) {2,}", line)[0].rstrip() for line in block.splitlines()]


def without_comments(block):
    """The commands of a block, and what is said about them."""
    lines = [re.match(r"(.*?)((?:^|\s)#\s.*)?$", line).groups("") for line in block.splitlines()]
    return [command.rstrip() for command, _ in lines if command.strip()], [said for _, said in lines if said]


def test_readmes_have_the_same_blocks():
    english, chinese = fences("README.md"), fences("README_zh.md")
    assert [language for language, _ in english] == [language for language, _ in chinese]
    for (language, ours), (_, theirs) in zip(english, chinese):
        assert language, "a block without a language"
        if language == "text":
            assert left_column(ours) == left_column(theirs)
        else:
            commands, _ = without_comments(ours)
            assert commands == without_comments(theirs)[0]
            untranslated = [said for said in without_comments(theirs)[1] if not re.search("[\u4e00-\u9fff]", said)]
            assert not untranslated, "README_zh.md: comments in English"


def chinese_pages():
    """(English page, Chinese page)."""
    for path in house_files("docs/zh/*.md"):
        yield ("submission/README.md" if path.stem == "submission" else f"docs/{path.name}"), str(path)


def test_the_chinese_readme_leads_to_the_chinese_pages():
    text, pages = (ROOT / "README_zh.md").read_text(encoding="utf-8"), dict(chinese_pages())
    assert {pathlib.PurePath(page).stem for page in pages.values()} == {
        "config", "predict", "evaluation", "submission", "troubleshooting",
    }  # fmt: skip
    for english, chinese in pages.items():
        assert f"({chinese})" in text and f"({english})" not in text, chinese


@pytest.mark.parametrize("english, chinese", list(chinese_pages()))
def test_a_chinese_page_has_what_the_english_one_has(english, chinese):
    """Its sections, rows of tables, blocks, and options."""
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in (english, chinese)]
    for pattern in (r"^#+ ", r"^\|", r"^    \S|^```", r"^\*\*"):
        counts = [len(re.findall(pattern, page, flags=re.MULTILINE)) for page in pages]
        assert counts[0] == counts[1], f"{pattern}: {counts}"
    options = [set(re.findall(r"--\w+", page)) - {"--help", "--lang"} for page in pages]
    assert options[0] == options[1]
    blocks = [[without_comments(block)[0] for _, block in fences(page)] for page in (english, chinese)]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/zh/troubleshooting.md"])
def test_troubleshooting_quotes_messages_that_exist(page):
    """Words of a message, with … for its values, or names that the log has."""
    messages = []
    for path in shipped_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.JoinedStr):
                parts = (one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
                messages.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    text = "\n".join(messages)
    symptoms = re.findall(r"^\| ([^|]+) \|", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    quoted = [words for symptom in symptoms for part in re.findall("`([^`]+)`", symptom) for words in part.split("; ")]
    assert len(quoted) > 20
    # A word of it may be a value of the message.
    patterns = {words: " ".join(f"(?:{re.escape(word)}|…)" for word in words.split()) for words in quoted}
    assert [words for words in quoted if "." not in words and not re.search(patterns[words], text)] == []


def readme_commands():
    """(script, flags) of every Python command in the README, lines joined where they are continued."""
    for language, block in fences("README.md"):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"(?:\S*python\S* )(\S+\.py)(.*)$", line.strip())
                if match:
                    yield match.group(1), re.findall(r" --(\w+)", match.group(2).split(" # ")[0])


def test_readme_commands_exist():
    commands = list(readme_commands())
    assert {script for script, _ in commands} >= {
        "supervised_finetune.py", "merge_lora_params.py", "chat.py", "tools/convert_labels.py",
    }  # fmt: skip
    for script, flags in commands:
        _, output, _, _ = imports_of(script, "--help")
        for flag in flags:
            assert re.search(rf"--{flag}\b", output), f"README: {script} has no --{flag}"


def test_readme_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    named = {
        target
        for language, block in fences("README.md") if language == "bash"
        for target in re.findall(r"^make (?:[A-Z]+=\S+ )*([\w-]+)", block, flags=re.MULTILINE)
    }  # fmt: skip
    assert {"demo", "test"} <= named <= targets


def test_readme_tree_is_true():
    """Everything in the tree is there, and the tree has every script and every folder of the package."""
    tree = next(block for language, block in fences("README.md") if language == "text")
    named, folder = set(), ""
    for line in left_column(tree):
        inside = line.startswith(" ")
        for name in line.split():
            named.add(folder + name if inside else name)
        if not inside:
            folder = line.split()[0]
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    packages = {f"paddlemix/{path.parts[1]}/" for path in house_files("paddlemix/*/__init__.py")}
    assert packages | set(scripts()) <= named


def test_readme_names_files_that_exist():
    for language, block in fences("README.md"):
        if language == "bash":
            for name in re.findall(r"(?<!\S)(?:config|assets|requirements|tools)/\S+", block):
                assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", [str(path) for path in house_files("docs/*.md", "docs/zh/*.md", "*/README.md")])
def test_pages_have_the_paths_of_the_readme(page):
    def outside(path):
        blocks = " ".join(block for language, block in fences(path) if language == "bash")
        return set(re.findall(r"(?<!\S)\.\./(?:weights/\S+|\w+)", blocks))

    assert outside(page) - outside("README.md") == set()


def test_no_paths_of_one_machine():
    # Written apart, so that this file is none of the finds.
    pattern = re.compile(rb"(^|[^\w.])/(wo" + rb"rk|ro" + rb"ot|ho" + rb"me|Us" + rb"ers)/")
    for path in house_files():
        for number, line in enumerate((ROOT / path).read_bytes().splitlines(), 1):
            if b"\0" in line:
                break
            assert not pattern.search(line), f"{path}:{number}: {line[:100]!r}"


def test_each_file_of_tests_says_in_one_line_what_it_holds():
    for path in house_files("*.py"):
        if path.parts[0] == "tests" and path.name != "__init__.py":
            first = (ROOT / path).read_text(encoding="utf-8").split("\n", 1)[0]
            assert re.match(r'"""\S.{15,}', first) and "pytest tests" not in first, f"{path}: {first}"


def test_no_large_file_is_tracked():
    for path in house_files():
        assert (ROOT / path).stat().st_size < 1 << 20, path


def test_run_sh_and_ci_are_posix_and_bash():
    assert (ROOT / "run.sh").read_text().startswith("#!/bin/sh\n")
    for shell, script in (("sh", "run.sh"), ("bash", ".ci/run")):
        assert subprocess.run([shell, "-n", script], cwd=ROOT).returncode == 0
