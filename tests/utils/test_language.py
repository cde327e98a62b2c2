"""Help and reports in Chinese: the table has every text, with the values that the English one has."""

import ast
import os
import re
import subprocess
import sys

import pytest

from paddlemix.utils import language
from paddlemix.utils.errors import UserError


@pytest.fixture(autouse=True)
def leave_the_language():
    yield
    language.choose(None)


@pytest.fixture
def chinese():
    language.choose("zh")


def template(node):
    """A text in code as the table writes it; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(value.value if isinstance(value, ast.Constant) else "{}" for value in node.values)
    return None


def texts_of(node):
    """The texts of an expression: itself, or what a list, a condition or a comprehension gives."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return [text for one in node.elts for text in texts_of(one)]
    if isinstance(node, ast.IfExp):
        return texts_of(node.body) + texts_of(node.orelse)
    if isinstance(node, ast.ListComp):
        return texts_of(node.elt)
    if isinstance(node, ast.BinOp):
        # A text and what is joined to it.
        return [text + "{}" for text in texts_of(node.left)]
    return [text for text in [template(node)] if text]


def reported(path):
    """(text, line) of what a module adds to problems and notes, or gives as the reason why a rule waits."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        added = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr in ("append", "extend") and owner.endswith(("problems", "notes")):
                added = node.args
            elif node.func.attr in ("waits", "left_out"):
                added = node.args[:1]
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target).endswith(("problems", "notes")):
            added = [node.value]
        for text in (text for one in added for text in texts_of(one)):
            if re.search(r"[a-z]{2}", text) and " " in text:
                yield text, node.lineno


@pytest.mark.parametrize("name", ["contest/check.py", "contest/fresh.py", "trainer/forecast.py", "trainer/run.py"])
def test_every_finding_of_a_report_has_a_chinese_text(root, chinese, name):
    found = list(reported(root / "paddlemix" / name))
    assert found
    missing = [f"{name}:{line}: {text}" for text, line in found if language.tr(text) == text]
    assert not missing, "add to paddlemix/utils/zh.json:\n" + "\n".join(missing)


def test_every_rule_of_the_contest_has_a_chinese_text(chinese):
    from paddlemix.contest.check import FAIL, PASS, RULES

    for text in [PASS, FAIL, *(says for _, says in RULES.values())]:
        assert re.search("[\u4e00-\u9fff]", language.tr(text)), text


def test_both_sides_of_the_table_have_the_same_values():
    for english, chinese in language.table().items():
        fixed = [sorted(re.findall(r"%\(\w+\)s|--\w{2,}", text)) for text in (english, chinese)]
        assert fixed[0] == fixed[1], english
        if "{}" in english:
            values = [language._Value(f"value {number}") for number in range(english.count("{}"))]
            assert sorted(re.findall(r"value \d+", chinese.format(*values))) == sorted(values), english


def test_values_of_a_template_are_put_in_their_places_and_translated(chinese):
    assert language.tr("no run.sh") == "缺少 run.sh"
    assert language.tr("llm: 3 of 5 tensors differ, by at most 0.1") == "llm：5 个张量里有 3 个不同，最大相差 0.1"
    assert language.tr("weights: none usable") == "权重：没有可用的"
    weights = "权重：53 个张量，1 个文件，3.0 MiB，float32 (53)"
    assert language.tr("weights: 53 tensors in 1 file, 3.0 MiB, float32 (53)") == weights
    assert language.tr("it wrote a, b and 7 more") == "写了 a, b 等，另有 7 个"
    # A file may be named like a word of the table.
    assert language.tr("no weights") == "缺少 weights"
    assert language.tr("nobody has translated this") == "nobody has translated this"


def test_columns_of_a_table_stay_where_they_are(chinese):
    rows = [f"{name:<34}{value:>18}" for name, value in (("peak", "1.00 GiB"), ("gradients", "12.00 GiB"))]
    translated = [language.tr_row(row) for row in rows]
    assert [row.split()[0] for row in translated] == ["峰值", "梯度"]
    assert {language.columns(row) for row in translated} == {52}


@pytest.mark.parametrize(
    "words, left, name",
    [
        (["a", "--lang", "zh", "b"], ["a", "b"], "zh"),
        (["--lang=en", "--help"], ["--help"], "en"),
        (["--prompt", "x", "--", "--lang", "zh"], ["--prompt", "x", "--", "--lang", "zh"], "en"),
    ],
)
def test_the_option_is_taken_from_any_place(monkeypatch, words, left, name):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert language.take(words) == left
    assert language.chosen() == name


@pytest.mark.parametrize("words", [["--lang"], ["--lang", "de"], ["--lang="]])
def test_another_language_is_refused(words):
    with pytest.raises(UserError, match="--lang"):
        language.take(words)


@pytest.mark.parametrize(
    "variables, name",
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN.GBK", "LC_ALL": ""}, "zh"),
        ({}, "en"),
    ],
)
def test_the_locale_decides_otherwise(monkeypatch, variables, name):
    for one in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(one, raising=False)
    for one, value in variables.items():
        monkeypatch.setenv(one, value)
    assert language.chosen() == name


def test_lines_of_help_are_measured_in_columns(chinese):
    text = "回答把不超过 16 个 token 的片段重复 N 次时就此结束，该片段只留一次；价格和电话号码不算；不能与束搜索同用"
    lines = language.wrap(text, 40)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(20 < language.columns(line) <= 42 for line in lines[:-1])
    assert not any(line.startswith(("，", "。", "；")) for line in lines)


@pytest.mark.parametrize(
    "script",
    [
        "supervised_finetune.py", "merge_lora_params.py", "chat.py", "predict.py", "tools/convert_labels.py",
        "tools/convert_public.py", "tools/curate_data.py",
        "tools/evaluate_captions.py", "tools/pack_submission.py", "tools/check_submission.py", "tools/merge_results.py",
        "tools/convert_qwen_vl.py", "tools/combine_results.py", "tools/check_gpu.py", "tools/overfit_real_samples.py",
        "tools/inspect_data.py",
        "tools/score_rows.py",
    ],
)  # fmt: skip
def test_help_is_chinese_throughout(root, script):
    command = [sys.executable, script, "--help", "--lang", "zh"]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", env=dict(os.environ, COLUMNS="200"))
    assert done.returncode == 0 and done.stdout.startswith("用法：")
    body = done.stdout.split("\n\n", 1)[1]
    assert not re.search(r"(?m)^\S.*:$|。 （", body)
    for line in body.splitlines():
        option = re.match(r" {2}-?\S.*? {2,}(\S.*)$", line)
        if option and "python" not in line:
            assert re.search("[\u4e00-\u9fff]", option.group(1)), line
    # Commands and names stay; a sentence does not.
    for paragraph in body.split("\n\n"):
        assert re.search("[\u4e00-\u9fff]", paragraph) or "python " in paragraph, paragraph
