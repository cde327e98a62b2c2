"""A small model with a vocabulary of its own: ranks, sizes, a whole folder."""

import subprocess
import sys

import numpy as np
import pytest

from paddlemix.utils.errors import UserError
from tools import make_tiny_model

CAPTIONS = ["一个红色的杯子放在画面左侧，价格99元。", "一个蓝色的瓶子放在画面右侧，价格19元。"] * 5


def test_ranks_start_with_the_bytes_and_keep_characters_whole():
    ranks = make_tiny_model.train_vocabulary(CAPTIONS, merges=12)
    assert ranks[:256] == [bytes([value]) for value in range(256)]
    assert len(set(ranks)) == len(ranks)
    known = set(ranks)
    assert all(character.encode() in known for character in "".join(CAPTIONS))
    words = [rank.decode() for rank in ranks[256:] if _is_text(rank) and len(rank.decode()) > 1]
    # One rank per merge: "放在画面" is in every caption, so it grows to one entry.
    assert len(words) == 12 and "放在画面" in words
    # Equal texts give equal ranks, in whatever order they come.
    assert ranks == make_tiny_model.train_vocabulary(CAPTIONS[::-1], merges=12)
    # When nothing is left to merge, it stops.
    assert len(make_tiny_model.train_vocabulary(["啊"], merges=50)) == 256 + 2


def _is_text(rank):
    try:
        rank.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_captions_of_tables(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes("a\tZm9v\t红色\r\nb\tZm9v\t蓝 色\nlonely\n".encode())
    assert make_tiny_model.read_captions([str(path)]) == ["红色", "蓝 色"]
    with pytest.raises(UserError, match="cannot read"):
        make_tiny_model.read_captions([str(tmp_path / "none.tsv")])
    path.write_bytes(b"only one column\n")
    with pytest.raises(UserError, match="no captions"):
        make_tiny_model.read_captions([str(path)])


def test_what_follows_pretrain_is_handed_on():
    args, words = make_tiny_model.parse_arguments(
        ["out", "--captions", "a", "b", "--seed", "3", "--pretrain", "c.json", "--x", "1"]
    )
    assert (args.out, args.captions, args.seed, words) == ("out", ["a", "b"], 3, ["c.json", "--x", "1"])
    assert make_tiny_model.parse_arguments(["out", "--captions", "a"])[1] == []
    with pytest.raises(UserError, match="needs the configuration"):
        make_tiny_model.parse_arguments(["out", "--captions", "a", "--pretrain"])
    with pytest.raises(UserError, match="divided"):
        make_tiny_model.parse_arguments(["out", "--captions", "a", "--heads", "3"])


def test_the_folder_is_a_model(tmp_path):
    from paddlemix.auto import AutoModelMIX, AutoProcessorMIX, AutoTokenizerMIX

    def make(name, *words):
        args, _ = make_tiny_model.parse_arguments([str(tmp_path / name), "--captions", "-", "--merges", "20", *words])
        make_tiny_model.make_model(args.out, CAPTIONS, args)
        return args.out

    folder = make("a")
    tokenizer = AutoTokenizerMIX.from_pretrained(folder)
    model = AutoModelMIX.from_pretrained(folder)
    config = model.config
    assert config.image_start_id == tokenizer.img_start_id and config.eos_token_id == tokenizer.eod_id
    assert len(tokenizer) <= config.vocab_size < len(tokenizer) + 64
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0])["input_ids"]) == CAPTIONS[0]
    assert len(tokenizer.encode(CAPTIONS[0])["input_ids"]) < len(CAPTIONS[0])
    processor, image_processor = AutoProcessorMIX.from_pretrained(folder)
    assert image_processor.image_size == config.visual["image_size"] == 84

    # Each query looks at the patch in its own place before any training: paint one, and its query changes
    # most.
    import paddle

    picture = np.random.default_rng(0).normal(size=(1, 3, 84, 84)).astype("float32")
    painted = picture.copy()
    painted[:, :, 21:42, 42:63] += 2.0
    change = model.visual(paddle.to_tensor(painted)) - model.visual(paddle.to_tensor(picture))
    assert int(change.norm(axis=-1).argmax()) == 4 * 1 + 2

    weights = [(tmp_path / name / "model_state.pdparams").read_bytes() for name in ("a",)]
    weights += [open(f"{make(*words)}/model_state.pdparams", "rb").read() for words in (("b",), ("c", "--seed", "8"))]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
def test_a_failed_pretraining_is_a_failure(root, tmp_path):
    captions = tmp_path / "captions.tsv"
    captions.write_text("".join(f"{i}\tZm9v\t{text}\n" for i, text in enumerate(CAPTIONS)), encoding="utf-8")
    command = [sys.executable, str(root / "tools" / "make_tiny_model.py"), str(tmp_path / "model")]
    command += ["--captions", str(captions), "--pretrain", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert "supervised_finetune.py ended with status 2" in done.stderr
    assert (tmp_path / "model" / "config.json").is_file()
