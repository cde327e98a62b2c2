"""Texts that hold the model's own tags: characters like any other, from conversion to chat."""

import json
import sys

import numpy as np
import pytest

from paddlemix.datasets.chatml import ChatmlDataset
from paddlemix.datasets.labels import Options, convert
from paddlemix.processors.content import with_images
from paddlemix.processors.images import MGenVLImageProcessor
from paddlemix.processors.mgen_vl_processing import ChatTemplate, encode_prompt
from paddlemix.processors.postprocess import without_grounding
from paddlemix.trainer.command_line import from_values
from paddlemix.trainer.finetune import finetune
from paddlemix.trainer.forecast import foresee
from paddlemix.utils.errors import ConfigError, UserError
from tests.helpers import byte_vocab_tokenizer, image_base64, save_tiny_model
from tests.inference.talking import save_talking_model

TAGS = [
    "</img>", "<img>", "<imgpad>", "<img></img>", "<img>x</img>", "</img><img>", "<img><img></img>", "<|im_end|>",
    "<|im_start|>", "<|endoftext|>", "<|extra_0|>", "{{user}}", "</ref>", "<box>", "<quad>(1,2)", "<img>\u0338",
]  # fmt: skip
# Their tokens may be in any text.
GROUNDING = ("</ref>", "<box>", "<quad>(1,2)")
CUSTOM = ChatTemplate(("Human <img>: ", "\n"), ("Model: ", "<|extra_7|>\n"), "系统 </img>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_vocab_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seq_length=2048, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of a conversion of rows with a tag in each caption and id; half of them are of val.json."""
    folder = tmp_path_factory.mktemp("data")
    rows = [f"id {tag}\t{image_base64(number)}\t点击{tag}这里{tag}" for number, tag in enumerate(TAGS)]
    (folder / "rows.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    result = convert(str(folder / "rows.tsv"), str(folder / "out"), Options(val_every=2, verify="decode", clean=True))
    assert result.n_train == result.n_val == len(TAGS) // 2
    return folder / "out"


def run_values(model, data, tmp_path, **changes):
    files = {"train": "train.json", "eval": "val.json"}
    entries = {part: [{"data_files": str(data / name)}] for part, name in files.items()}
    values = {
        "model_name_or_path": model, "output_dir": str(tmp_path / "run"), "dataset": entries, "do_train": True,
        "do_eval": True, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_train_epochs": 1,
        "logging_steps": 1, "max_new_tokens": 3, "eval_with_do_generation": True, "disable_tqdm": True,
        "report_to": ["none"], "save_strategy": "no", "device": "cpu",
    }  # fmt: skip
    return {**values, **changes}


@pytest.mark.parametrize("template", [None, CUSTOM])
def test_a_tag_is_its_characters(data, tokenizer, template):
    files = [str(data / "train.json"), str(data / "val.json")]
    dataset = ChatmlDataset(files, template, tokenizer, MGenVLImageProcessor(56))
    captions = []
    for index in range(len(dataset)):
        sample, (_, caption) = dataset.sample(index), dataset.record(index).turns[0]
        captions.append(caption)
        ids = sample["input_ids"].tolist()
        assert (ids.count(tokenizer.img_start_id), ids.count(tokenizer.img_end_id)) == (1, 1)
        assert caption in tokenizer.decode(ids)
        if not any(tag in caption for tag in GROUNDING):
            end = len(ids) - len((template or ChatTemplate.default()).turn(tokenizer, "", "")[-1].ids)
            told = caption.encode()
            assert ids[end - len(told) : end] == list(told)
            assert sample["labels"][end - len(told) : end].tolist() == list(told)
    assert sum("</img>" in caption for caption in captions) == 5
    assert dataset.n_skipped == 0


@pytest.mark.parametrize("mixtoken", [False, True])
def test_training_and_evaluation_use_every_record(model, data, tmp_path, mixtoken):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"conversation": ["<img>{{user}}</img>", "<imgpad>{{bot}}<|im_end|>\n"]}))
    values = run_values(model, data, tmp_path, mixtoken=mixtoken, max_length=512)
    values["dataset"]["train"][0]["chat_template"] = str(template)
    (tmp_path / "run.json").write_text(json.dumps(values))
    plan = foresee([str(tmp_path / "run.json")])
    assert plan.problems == [] and plan.data["train"].failed == plan.data["eval"].failed == 0
    metrics = finetune(from_values(values))
    assert np.isfinite(metrics["train_loss"]) and "eval_cider" in metrics
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert not any(line.get("skipped_samples") for line in state["log_history"])
    # What was trained with is what the result is asked with.
    assert ChatTemplate.of_folder(str(tmp_path / "run")) == ChatTemplate.from_file(str(template))


def test_what_was_tuned_is_asked_with_its_template(model, data, tmp_path):
    from paddlemix.checkpoint.lora_merge import merge
    from paddlemix.inference.loading import load_model
    from paddlemix.inference.source import find_source

    CUSTOM.save(str(tmp_path))
    values = run_values(model, data, tmp_path, lora=True, lora_rank=2, max_steps=1)
    values.update(do_eval=False, eval_with_do_generation=False)
    values["dataset"]["train"][0]["chat_template"] = str(tmp_path / "chat_template.json")
    finetune(from_values(values))
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    merge(model, run, merged)
    for loaded in (load_model(find_source(model, run)), load_model(find_source(run)), load_model(merged)):
        assert loaded.template == CUSTOM
    assert load_model(model).template == ChatTemplate.default()


def test_a_prompt_of_the_data_that_shows_two_images_is_refused_before_a_row_is_read(data, tmp_path):
    rows = str(data.parent / "rows.tsv")
    with pytest.raises(UserError, match="--prompt shows 2 images"):
        convert(rows, str(tmp_path), Options(prompt="<img>a</img><img>b</img>"))
    for prompt in ("</img><img>", "<img></img>是什么", "<|im_end|>"):
        assert convert(rows, str(tmp_path), Options(prompt=prompt)).n_train


def test_prediction_and_chat(tmp_path, tokenizer, capsys):
    import chat
    import predict
    from paddlemix.utils import cli

    folder = save_talking_model(tmp_path / "model", max_position_embeddings=2048, seq_length=2048)
    CUSTOM.save(folder)
    rows = [f"id{number} {tag}\t{image_base64(number)}" for number, tag in enumerate(TAGS)]
    (tmp_path / "rows.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = " ".join(TAGS)

    def call(main, *arguments):
        sys.argv = ["script", *map(str, arguments), "--max_new_tokens", "3"]
        return cli.run(main)

    options = ("--prompt", words, "--system", words)
    assert call(predict.main, tmp_path / "rows.tsv", tmp_path / "out.txt", folder, *options) == 0
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [row.split("\t")[0] for row in rows]
    assert "一张广告图片" not in "".join(lines)
    assert call(chat.main, folder, image_base64(1), words, "--system", words) == 0
    asked = capsys.readouterr().out
    assert call(predict.main, tmp_path / "rows.tsv", tmp_path / "other.txt", folder) == 0
    # Prompt and system text are seen, and prediction asks what chat asks.
    assert lines != (tmp_path / "other.txt").read_text(encoding="utf-8").splitlines()
    assert f"response: {lines[1].split(chr(9))[1]}\n" in asked


@pytest.mark.parametrize("template", [ChatTemplate.default(), CUSTOM], ids=["default", "custom"])
@pytest.mark.parametrize("tag", ["", *TAGS])
def test_the_prompt_of_prediction_is_how_training_sequences_begin(tokenizer, tmp_path, template, tag):
    """For one question by way of a dataset, a second one, and what evaluation in training asks."""
    from paddlemix.inference.captioner import caption_prompt_ids

    prompt = f"描述{tag}图片"
    if tag in ("<img></img>", "<img>x</img>", "<img><img></img>"):
        prompt = f"描述{tag[:5]}图片"  # data shows its image there; prediction always in front
    record = {"conversations": [[prompt, "一只"], ["还有" + tag.replace("/", ""), "杯子"]], "image": image_base64()}
    (tmp_path / "train.json").write_text("[\n" + json.dumps(record) + "\n]\n")
    dataset = ChatmlDataset(str(tmp_path / "train.json"), template, tokenizer, MGenVLImageProcessor(56))
    sample, question = dataset.sample(0), dataset.question(0)
    ids = sample["input_ids"].tolist()
    asked = caption_prompt_ids(tokenizer, prompt, None, 6144, template)
    assert asked == question.ids.tolist() == ids[: len(asked)]
    assert sample["labels"][len(asked) :][: len("一只".encode())].tolist() == list("一只".encode())
    assert np.array_equal(question.images, sample["images"]) and question.answer == "一只"
    history = [(with_images(prompt, 1), "一只")]
    second = encode_prompt(tokenizer, [record["conversations"][1][0]], history, template=template)
    assert second == ids[: len(second)]
    assert bytes(ids[len(second) :][: len("杯子".encode())]) == "杯子".encode()


def test_an_answer_ends_where_its_template_says(tokenizer):
    from paddlemix.models.mgen_vl.generation import CaptionGeneration, TextStreamer, decode_response

    for closing, written in (
        ("<|im_end|>\n", "<|im_end|>"), ("<|extra_7|>", "<|extra_7|>"), ("\n", "\n"), ("###\n", "###\n"),
        ("。<|im_end|>", "。<|im_end|>"), ("", ""),
    ):  # fmt: skip
        template = ChatTemplate(("", ""), ("", closing))
        stop_ids, ending = CaptionGeneration.stop_ids(tokenizer, template), template.ending(tokenizer)
        ids = tokenizer.text_to_ids("一只# 杯子" + written) + (list(b"more") if written else [])
        pieces = []
        streamer = TextStreamer(tokenizer, stop_ids, pieces.append, ending)
        for i in ids:
            streamer.put(np.array([i]))
        streamer.end()
        assert "".join(pieces) == "一只# 杯子"
        assert decode_response(tokenizer, ids, stop_ids, ending) == "一只# 杯子"
        assert len(ending) != 1 or ending[0] in stop_ids


def test_captions_hold_boxes_only_if_asked(tokenizer):
    from paddlemix.models.mgen_vl.captioning import caption
    from paddlemix.models.mgen_vl.generation import CaptionGeneration

    stop_ids = CaptionGeneration.stop_ids(tokenizer)
    for says, bare in (
        ("<ref>杯子</ref><box>(1,2),(3,4)</box>在桌上", "杯子在桌上"),
        ("两个<ref>杯子</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", "两个杯子"),
        ("<quad>(1,2),(3,4),(5,6),(7,8)</quad>价格", "价格"),
        ("<ref>杯子</ref><box>(1,2),(3", "杯子"),
        ("</box>杯子<ref>", "杯子"),
        ("点击</img>这里 a<b (1,2)", "点击</img>这里 a<b (1,2)"),
    ):
        ids = tokenizer.plain_ids(says)
        assert without_grounding(says) == bare
        assert caption(tokenizer, ids + [tokenizer.im_end_id], stop_ids) == bare
        assert caption(tokenizer, ids, stop_ids, keep_boxes=True) == says
    assert caption(tokenizer, [*b"ab", tokenizer.img_start_id, tokenizer.img_pad_id, *b"c"], stop_ids) == "abc"


@pytest.mark.parametrize("name", ["system", "conversation"])
def test_a_template_of_the_wrong_kind_is_still_refused(tmp_path, name):
    (tmp_path / "chat_template.json").write_text(json.dumps({"conversation": ["{{user}}", "{{bot}}"], name: 3}))
    with pytest.raises(ConfigError):
        ChatTemplate.of_folder(str(tmp_path))
