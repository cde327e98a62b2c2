"""The page of captions: what is in the file, and how it behaves in a browser."""

import base64
import io
import json
import re

import pytest

from paddlemix.metrics import report
from paddlemix.metrics.evaluation import evaluate

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> "quoted" \'&amp; {{data}}'
RTL = "מבצע \u202eעברית (abc) \u2067ab"
N = 130


def some_evaluation(compare=True):
    """Row i shares i // 10 of 13 characters with its reference; two rows hold what may break a page."""
    letters = "甲乙丙丁戊己庚辛壬癸子丑寅"
    references = {f"id{i}": [letters + f"尾{i}"] for i in range(N)}
    captions = {f"id{i}": letters[: i // 10] + "红色两只小猫" for i in range(N)}
    captions["id0"], captions["id1"], captions["id2"] = "", HOSTILE, RTL
    references["id1"].append(HOSTILE)
    del references["id3"], captions["id3"]
    weird = '"><b>id\u2028'
    references[weird], captions[weird] = ["一二三四五"], "半个\ud800字"
    others = [{key: "乙丙丁" for key in references}] if compare else []
    return evaluate(captions, references, others, resamples=20)


def webp(color):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), color).save(buffer, "WEBP")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "my report.html"
    evaluation = some_evaluation()
    evaluation.settings["files"] = {"results": "a/tuned.txt", "references": "r.tsv", "others": ["base.txt"]}
    pictures = {f"id{i}": (webp((i, 0, 0)), "") for i in range(N - 2)}
    pictures["id128"] = (b"", "bad base64")
    report.write_report(str(path), evaluation, report.choose_rows(evaluation, 1000), pictures)
    return path


def blocks(text):
    return re.findall(r'<script type="[\w/]+" id="(\w+)">(.*?)</script>', text, flags=re.DOTALL)


def test_the_file_holds_the_data_and_nothing_of_it_as_markup(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert text.count("<script") == 3 and text.count("</script>") == 3 and "\u2028" not in text
    found = dict(blocks(text))
    data = json.loads(found["data"])
    rows = {row[0]: row for row in data["rows"]}
    assert len(rows) == N and rows["id1"][1][1] == HOSTILE and rows["id1"][3][0][0] == HOSTILE
    assert rows['"><b>id\u2028'][3][0][0] == "半个\ufffd字"
    assert rows["id2"][3][0][0] == RTL and rows["id2"][3][1][0] == "乙丙丁"
    begin, length = rows["id7"][2]
    assert base64.b64decode(found["pictures"][begin : begin + length]) == webp((7, 0, 0))
    assert rows["id128"][2] == "bad base64" and rows["id129"][2] == "no picture in the file"


def test_the_policy_allows_the_own_script_and_style_alone(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.read_text(encoding="utf-8")).group(1)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "connect-src" not in policy and "img-src data:;" in policy


def test_a_limited_page_has_the_worst_rows_in_the_order_of_the_file():
    evaluation = some_evaluation(compare=False)
    rows = report.choose_rows(evaluation, 5)
    scores = evaluation.results.scores.rows["CIDEr"]
    assert len(rows) == 5 and rows == sorted(rows)
    assert max(scores[rows]) <= min(score for i, score in enumerate(scores) if i not in rows)


# --- in a browser


IDS = "[...document.querySelectorAll('article')].map((card) => card.dataset.id)"
COUNT = "document.getElementById('count').textContent"


def test_it_opens_worst_first_and_quietly(browser, page):
    browser.open(page.as_uri() + "#lang=en")
    assert browser.run("document.title") == "How good are the captions?"
    assert browser.run(COUNT) == f"{N} rows"
    evaluation = some_evaluation()
    scores = dict(zip(evaluation.ids, evaluation.results.scores.rows["CIDEr"].round(4)))
    shown = browser.run(IDS)
    assert len(shown) >= 20
    assert [scores[key] for key in shown] == sorted(scores.values())[: len(shown)]
    assert browser.run("document.querySelectorAll('#charts svg rect').length") == 4 * 24
    browser.wait_for("[...document.querySelectorAll('article img')].some((image) => image.naturalWidth === 16)")
    assert browser.problems == []
    assert {address.split(":")[0] for address in browser.requests} <= {"file", "data", "about"}


def test_text_of_the_data_stays_text(browser, page):
    browser.open(page.as_uri() + "#lang=en&q=owned")
    assert browser.run(COUNT) == f"1 of {N} rows"
    assert browser.run("document.querySelector('article .caption').textContent") == HOSTILE
    assert browser.run("document.querySelectorAll('article script, article img[src=x]').length") == 0
    assert browser.run("document.querySelector('article .caption mark').textContent") == "owned"
    browser.open(page.as_uri() + "#row=id2")
    # Text from right to left turns its own paragraph and no other.
    card = "document.querySelector('article[data-id=id2]')"
    assert browser.run(f"getComputedStyle({card}.querySelector('.caption')).direction") == "rtl"
    assert browser.run(f"getComputedStyle({card}.querySelector('.scores')).direction") == "ltr"
    assert browser.problems == []


def test_what_differs_from_the_reference_is_marked(browser, tmp_path):
    references = {"a": ["红杯在左边", "一只猫"], "b": ["ABC 两只瓶"], "c": ["猫"]}
    captions = {"a": "红瓶在右边", "b": "ABD 三只瓶", "c": ""}
    others = [{"a": "一只狗", "b": "ABC 两只瓶", "c": "猫"}, dict.fromkeys(captions, "猫")]
    evaluation = evaluate(captions, references, others, resamples=5)
    page = tmp_path / "page.html"
    report.write_report(str(page), evaluation, [0, 1, 2], None)
    browser.open(page.as_uri() + "#lang=en&sort=file+order")

    def differs(row, selector):
        return browser.run(
            f"[...document.querySelectorAll('article')[{row}].querySelectorAll('{selector}')].map((text) =>"
            "[...text.querySelectorAll('.differs')].map((one) => one.textContent))"
        )

    assert differs(0, ".caption") == [["瓶", "右"], ["狗"], []]
    # The nearest reference has what the caption of the first file lacks; the other is left alone.
    assert differs(0, ".reference") == [["杯", "左"], []]
    # 三只 is underlined, as no reference has that number.
    assert differs(1, ".caption") == [["ABD"], [], ["猫"]] and differs(1, ".reference") == [["ABC", "两"]]
    assert browser.run("document.querySelectorAll('#scores thead th').length") == 5
    browser.open(page.as_uri() + "#lang=en&sort=CIDEr%40difference2")
    assert browser.run("document.getElementById('sort').value") == "CIDEr@difference2"
    chosen = "document.getElementById('sort').selectedOptions[0].textContent"
    assert browser.run(chosen) == "CIDEr · difference (other 2)"
    assert browser.problems == []


def test_sort_and_search_from_the_controls_and_from_the_address(browser, page):
    browser.open(page.as_uri() + "#lang=en")
    browser.run(
        "(() => { const sort = document.getElementById('sort'); sort.value = 'file order';"
        "sort.dispatchEvent(new Event('change')); document.getElementById('order').click(); })()"
    )
    assert browser.run(IDS)[:3] == ['"><b>id\u2028', "id129", "id128"]
    assert browser.run("location.hash") == "#sort=file+order&order=desc&lang=en"
    browser.press("/")
    for key in "尾12":
        browser.press(key)
    browser.wait_for(f"{COUNT} === '11 of {N} rows'")
    assert browser.run(IDS)[0] == "id129"
    address = browser.run("location.href")
    browser.press("Escape")
    assert browser.run(COUNT) == f"{N} rows"
    browser.open(address)
    assert browser.run(COUNT) == f"11 of {N} rows" and browser.run(IDS)[-1] == "id12"
    browser.open(page.as_uri() + "#lang=zh&show=empty")
    assert browser.run(IDS) == ["id0"] and browser.run("document.documentElement.lang") == "zh-CN"
    browser.open(page.as_uri() + "#sort=no-such&show=constructor&order=sideways&lang=toString&row=nobody")
    assert browser.run(IDS)[0] == "id0"
    browser.open(page.as_uri() + "#sort=CIDEr%40difference")
    evaluation = some_evaluation()
    change = evaluation.results.scores.rows["CIDEr"] - evaluation.others[0].scores.rows["CIDEr"]
    scores = dict(zip(evaluation.ids, change.round(3)))
    shown = [scores[key] for key in browser.run(IDS)]
    assert shown == sorted(shown)
    # What is sorted by is shown, with the difference to the other file.
    browser.open(page.as_uri() + "#sort=BLEU-2%40difference&lang=en")
    first = evaluation.ids.index(browser.run(IDS)[0])
    ours, theirs = (system.scores.rows["BLEU-2"][first] for system in (evaluation.results, *evaluation.others))
    assert browser.run("document.querySelector('article .scores .sorted').textContent").split() == [
        "BLEU-2", f"{ours:.2f}", f"{ours - theirs:+.3f}".replace("-", "−")
    ]  # fmt: skip
    assert browser.problems == []


def test_the_image_gain_is_shown_and_sorted_by(browser, tmp_path):
    path = tmp_path / "gains.html"
    evaluation = some_evaluation()
    report.write_report(str(path), evaluation, report.choose_rows(evaluation, 1000), None, {"id9": 0.5, "id7": -1.25})
    browser.open(path.as_uri() + "#lang=en&sort=image+gain")
    assert browser.run(IDS)[:3] == ["id7", "id9", "id0"]
    chips = "[...document.querySelectorAll('.head')].slice(0, 3).map((head) => head.querySelector('.chip').textContent)"
    assert browser.run(chips) == ["image gain -1.25", "image gain 0.50", "empty"]
    assert browser.problems == []


def test_rows_come_and_go_as_one_scrolls_and_keys_walk_through_them(browser, page):
    browser.open(page.as_uri() + "#sort=file+order")
    total = "document.querySelectorAll('article').length"
    assert browser.run(total) < N
    browser.run("document.documentElement.classList.remove('ready'); scrollTo(0, document.body.scrollHeight)")
    browser.wait_for(f"{IDS}.includes('id129')")
    browser.wait_for(f"!{IDS}.includes('id5')")
    assert browser.run(total) < N
    browser.run("scrollTo(0, 0)")
    browser.wait_for(f"{IDS}.includes('id5')")
    browser.press("j")
    browser.press("j")
    assert browser.run("document.activeElement.dataset.id") == "id1"
    browser.press("k")
    assert browser.run("document.activeElement.dataset.id") == "id0"
    assert browser.run("location.hash") == "#sort=file+order&row=id0"
    browser.open(page.as_uri() + "#sort=file+order&row=id100")
    browser.wait_for("document.activeElement.dataset.id === 'id100'")
    box = "document.activeElement.getBoundingClientRect()"
    browser.wait_for(f"{box}.top >= 0 && {box}.top < innerHeight")
    assert browser.problems == []


def test_ten_thousand_rows_have_few_elements_at_a_time(browser, tmp_path):
    evaluation = some_evaluation(compare=False)
    pictures = {key: (webp((9, 9, 9)), "") for key in evaluation.ids}
    page = tmp_path / "large.html"
    report.write_report(str(page), evaluation, list(range(N)) * 77, pictures)
    browser.open(page.as_uri() + "#lang=en&sort=file+order")
    assert browser.run(COUNT) == "10010 rows"
    browser.run("document.documentElement.classList.remove('ready'); scrollTo(0, document.body.scrollHeight)")
    last = "[...document.querySelectorAll('article')].pop()"
    browser.wait_for(f"{last}.dataset.index === '10009' && {last}.querySelector('img').naturalWidth === 16")
    browser.wait_for(f"!{IDS}.includes('id0')")
    assert browser.run("document.querySelectorAll('article').length") <= 100
    assert browser.run("document.images.length") <= 100
    browser.open(page.as_uri() + "#lang=en&sort=file+order&order=desc&q=%E5%B0%BE12")
    assert browser.run(COUNT) == f"{77 * 11} of 10010 rows" and browser.run(IDS)[0] == "id129"
    assert browser.problems == []


def test_the_browser_would_have_told(browser, tmp_path):
    """What the tests above rely on: problems and requests are noticed."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://localhost:9/x.png'><script>undefined_thing()</script>")
    browser.open(page.as_uri())
    browser.wait_for("document.readyState === 'complete'")
    assert any("undefined_thing" in problem for problem in browser.problems)
    assert "http://localhost:9/x.png" in browser.requests
