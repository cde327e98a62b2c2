"""The notebook's way to open a folder."""

import pytest

from paddlemix.auto import AutoConfigMIX, AutoModelMIX, AutoProcessorMIX, AutoTokenizerMIX
from paddlemix.utils.errors import UserError
from tests.helpers import image_base64, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_notebooks_lines(folder):
    tokenizer = AutoTokenizerMIX.from_pretrained(folder)
    processor, _ = AutoProcessorMIX.from_pretrained(folder)
    config = AutoConfigMIX.from_pretrained(folder, dtype="float32")
    model = AutoModelMIX.from_pretrained(folder, config=config, dtype="float32")
    model.eval()
    query = [{"image": image_base64()}, {"text": "请描述图片内容"}]
    inputs = processor(query=query, return_tensors="pd")
    assert inputs["images"].shape == [1, 3, 56, 56]
    query = tokenizer.from_list_format(query)
    response, history = model.chat(tokenizer, query=query, history=None, images=inputs["images"], max_new_tokens=4)
    assert history == [(query, response)]


def test_the_image_processor_knows_the_models_size(folder):
    _, image_processor = AutoProcessorMIX.from_pretrained(folder)
    assert image_processor.image_size == 56


def test_a_folder_that_is_not_there():
    for front_door in (AutoConfigMIX, AutoModelMIX, AutoProcessorMIX, AutoTokenizerMIX):
        with pytest.raises(UserError):
            front_door.from_pretrained("no/such/folder")
