"""The tokenizer: ids, texts and list formats."""

import base64
import json
import multiprocessing
import pickle
import time
import unicodedata

import pytest

from paddlemix.models.mgen_vl.tokenizer import SPECIAL_TOKENS, MGenVLTokenizer
from paddlemix.utils.errors import ConfigError, ImageTagError, UserError
from tests.helpers import byte_vocab_tokenizer, refused, write_byte_vocabulary


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return byte_vocab_tokenizer(str(tmp_path_factory.mktemp("small")), n_queries=16)


@pytest.fixture(scope="module")
def real(shared):
    return MGenVLTokenizer(str(shared / "goldens" / "qwen.tiktoken"))


def goldens(shared, name):
    return json.loads((shared / "goldens" / name).read_text())


# ---- the reference's numbers


def test_reference_ids_and_text(real, shared):
    cases = goldens(shared, "tokenizer_goldens.json")
    assert len(cases) == 160
    for case in cases:
        ids = real.text_to_ids(case["text"])
        assert ids == case["ids"], case["text"]
        assert real(case["text"])["input_ids"] == ids
        assert real.decode(ids) == case["decoded"]
        assert real.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


def test_reference_sizes(real):
    assert len(real) == real.vocab_size == 151860
    assert real.pad_token_id == real.eod_id == real.eos_token_id == 151643
    assert (real.img_start_id, real.img_end_id, real.img_pad_id) == (151857, 151858, 151859)
    assert real.image_span() == [151857] + [151859] * 256 + [151858]


def test_reference_errors_are_one_type(real, shared):
    raised = 0
    for case in goldens(shared, "tokenizer_errors.json"):
        if "encode_error" in case:
            with pytest.raises(ImageTagError):
                real.text_to_ids(case["text"])
            raised += 1
        else:
            assert real.text_to_ids(case["text"]) == case["ids"]
            assert real.decode(case["ids"]) == case["text"]
    assert raised == 5


def test_reference_list_formats(real, shared):
    cases = goldens(shared, "list_format_goldens.json")
    for case in cases["from_list"]:
        assert real.from_list_format(case["list"]) == case["text"]
    for case in cases["to_list"]:
        assert real.to_list_format(case["text"]) == case["list"]


def test_a_saved_folder_gives_the_same_ids(real, shared, tmp_path):
    real.save_pretrained(str(tmp_path))
    assert (tmp_path / "mgen.tiktoken").read_bytes() == (shared / "goldens" / "qwen.tiktoken").read_bytes()
    again = MGenVLTokenizer.from_pretrained(str(tmp_path))
    for case in goldens(shared, "tokenizer_goldens.json")[::10]:
        assert again.text_to_ids(case["text"]) == case["ids"]


# ---- the same rules on a vocabulary of single bytes, checked by hand


def test_bytes_and_specials(small):
    assert len(small) == 256 + 217 and len(SPECIAL_TOKENS) == 217
    assert small.text_to_ids("aé图") == list("aé图".encode())
    assert small.text_to_ids("e\u0301") == list(unicodedata.normalize("NFC", "e\u0301").encode())
    assert small.text_to_ids("<|im_start|>a<|im_end|>") == [257, 97, 258]
    assert small.text_to_ids("<ref>a</ref>") == [256 + 208, 97, 256 + 209]
    assert (small.eod_id, small.im_start_id, small.img_start_id) == (256, 257, 256 + 214)


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """The single bytes, 256 "ab", 257 "bc", 258 "abc", 259 " a", 260 the first two bytes of 图; specials from 261."""
    path = write_byte_vocabulary(str(tmp_path_factory.mktemp("merging")))
    with open(path, "ab") as file:
        for rank, token in enumerate([b"ab", b"bc", b"abc", b" a", "图".encode()[:2]], 256):
            file.write(base64.b64encode(token) + b" %d\n" % rank)
    return MGenVLTokenizer(path, n_queries=4)


@pytest.mark.parametrize(
    "text, ids",
    [
        ("abc", [258]),  # ab (256) comes before bc (257), then ab + c
        ("bc", [257]),
        ("abbc", [256, 257]),
        ("a b", [97, 32, 98]),  # words are split before they are merged: " b" has no merge
        (" abc", [32, 258]),  # ab (256) wins over " a" (259)
        (" ac", [259, 99]),
        ("ab1c", [256, 49, 99]),  # digits stand alone
        ("a\nb", [97, 10, 98]),
        ("图", [260, 0xBE]),
        ("ab<|endoftext|>bc", [256, 261, 257]),
        ("a<img>ab</img>bc", [97, 475, 97, 98, 477, 477, 476, 257]),  # a name is bytes, never merged
    ],
)
def test_merges_by_hand(merging, text, ids):
    assert len(merging) == 261 + 217
    assert merging.text_to_ids(text) == ids
    assert merging.decode(ids) == text


def test_any_length_of_text(merging):
    """tiktoken itself gives up on a million spaces."""
    for text in (" " * 1_200_000 + "abc", "\t " * 500_000, "<img>" + "x" * 10**6 + "</img>", "<img>" * 10**5):
        started = time.process_time()
        if "<img>" in text:
            with pytest.raises(ImageTagError):
                merging.text_to_ids(text)
        else:
            assert merging.decode(merging.text_to_ids(text)) == text
        assert time.process_time() - started < 20


def test_forked_workers_encode_alike(merging):
    texts = ["abc <img>p</img>", "图" * 100, " abbc"] * 5
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(merging.text_to_ids, texts) == [merging.text_to_ids(text) for text in texts]


def test_control_tokens_of_a_user_stay_text(small):
    for text in ("<|im_end|>", "<img></img>", "a<imgpad>", "</img>", "<img>", "<|extra_0|>", "<img>x</img>"):
        assert small.plain_ids(text) == list(text.encode()) and small.decode(small.plain_ids(text)) == text
    assert small.plain_ids("<box>") == [256 + 210]
    assert small.plain_ids("<|im_end|><img>", control_tokens=True) == [258, *b"<img>"]


def test_image_spans(small):
    span = small.text_to_ids("x<img>图</img>y")
    assert span == [120, 470, *"图".encode(), *[472] * 13, 471, 121]
    assert small.decode(span) == "x<img>图</img>y"
    assert small.decode(span, skip_special_tokens=True) == "x图y"
    assert small.text_to_ids("<img></img>") == small.image_span()
    assert len(small.text_to_ids("<img>" + "p" * 16 + "</img>")) == 18


@pytest.mark.parametrize(
    "text",
    [
        "<img>",
        "a<img>b",
        "<img>a<img>b</img>",
        "<img><imgpad></img>",
        "<img><|im_end|></img>",
        "<img>12345678901234567</img>",
    ],
)
def test_malformed_image_tags(small, text):
    with pytest.raises(ImageTagError):
        small.text_to_ids(text)


def test_what_a_model_may_generate_never_fails(small):
    assert small.decode([470, 97]) == "<img>a"
    assert small.decode([471, 472, 470]) == "</img><imgpad><img>"
    assert small.decode([470] + [300] * 16 + [471]).startswith("<img>")
    assert small.decode([97, 479, 10**6]) == "a"  # beyond the vocabulary
    assert small.decode([0xE5, 0x9B]) == "\ufffd"
    assert small.decode(97) == "a" and small.decode([]) == ""


def test_lone_surrogates_are_replaced(small):
    assert small.decode(small.text_to_ids("a\ud800b")) == "a\ufffdb"


def test_long_sources_never_reach_bpe(small):
    text = small.from_list_format([{"image": base64.b64encode(bytes(999)).decode()}, {"text": "what"}])
    assert text == "Picture 1: <img></img>\nwhat"
    assert small.from_list_format([{"image": b"raw"}, {"image": "a.png"}]) == (
        "Picture 1: <img></img>\nPicture 2: <img>a.png</img>\n"
    )


def test_boxes(small):
    assert small.from_list_format([{"ref": "猫", "box": (1, 2, 3, 4)}]) == "<ref>猫</ref><box>(1,2),(3,4)</box>"
    assert small.from_list_format([{"box": [[1, 2, 3, 4], [5, 6, 7, 8]]}]).count("<box>") == 2
    assert small.to_list_format("<quad>(1,2)</quad>") == [{"quad": "(1,2)"}]
    with pytest.raises(UserError, match="video"):
        small.from_list_format([{"video": "a"}])


def test_loader_workers_get_a_copy(small):
    again = pickle.loads(pickle.dumps(small))
    assert again.text_to_ids("图<img></img>") == small.text_to_ids("图<img></img>")
    assert again.n_queries == 16 and again.decode([97]) == "a"


def test_batches_are_padded_on_the_left(small):
    batch = small(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[256, 256, 97], [98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_base_class_views(small):
    assert small.tokenize("a<|im_end|>") == [b"a", "<|im_end|>"]
    assert small.convert_tokens_to_ids("<img>") == 470
    assert small.convert_ids_to_tokens([97, 470], skip_special_tokens=True) == [b"a"]
    assert small.get_vocab()["<img>"] == 470 and len(small.get_vocab()) == 473


# ---- folders of strangers


def test_names_and_query_counts(tmp_path):
    with pytest.raises(UserError, match="no mgen.tiktoken"):
        MGenVLTokenizer.from_pretrained(str(tmp_path))
    path = write_byte_vocabulary(str(tmp_path))
    assert MGenVLTokenizer.from_pretrained(str(tmp_path)).n_queries == 256
    (tmp_path / "config.json").write_text('{"visual": {"n_queries": 9}}')
    assert MGenVLTokenizer.from_pretrained(str(tmp_path)).n_queries == 9
    (tmp_path / "tokenizer_config.json").write_text('{"n_queries": 25}')
    (tmp_path / "qwen.tiktoken").write_bytes(open(path, "rb").read())
    (tmp_path / "mgen.tiktoken").unlink()
    assert MGenVLTokenizer.from_pretrained(str(tmp_path)).n_queries == 25
    for bad in ("{", "[]", '{"n_queries": -1}', '{"n_queries": "x"}'):
        (tmp_path / "tokenizer_config.json").write_text(bad)
        with pytest.raises(ConfigError):
            MGenVLTokenizer.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "change, code",
    [
        (lambda lines: lines[:-1] + [b"??? 255"], "line"),
        (lambda lines: lines[:-1] + [b"/w=="], "line"),
        (lambda lines: lines[:-1] + [b"/w== 255 1"], "line"),
        (lambda lines: lines + [b"/w== 256"], "line"),
        (lambda lines: lines[:-1] + [b"/w== 300"], "ranks"),
        (lambda lines: lines[:-1] + [b"YWI= 255"], "bytes"),
        (lambda lines: lines[:-1] + [b"/w== -1"], "ranks"),
        (lambda lines: lines[:-1] + [b"/w== " + b"1" * 4000], "line"),
    ],
)
def test_hostile_vocabularies(tmp_path, change, code):
    path = write_byte_vocabulary(str(tmp_path))
    lines = open(path, "rb").read().splitlines()
    open(path, "wb").write(b"\n".join(change(lines)))
    with refused(UserError, code):
        MGenVLTokenizer(path)


def test_a_vocabulary_that_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        MGenVLTokenizer(str(tmp_path / "none.tiktoken"))
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        MGenVLTokenizer(str(tmp_path))


def test_a_huge_vocabulary_is_not_read(tmp_path):
    path = tmp_path / "mgen.tiktoken"
    with open(path, "wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(UserError, match="larger than 16 MB"):
        MGenVLTokenizer(str(path))
