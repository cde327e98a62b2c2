"""Loading a model folder with its tokenizer, processors and chat template."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

from paddlemix.checkpoint import open_weights
from paddlemix.checkpoint.model_folder import VOCABULARIES, find_tuned_weights
from paddlemix.checkpoint.structure import language
from paddlemix.inference.source import Source
from paddlemix.models.mgen_vl.parameters import check_weights, parameter_shapes
from paddlemix.utils.log import logger


class Loaded(NamedTuple):
    """model: MGenLMHeadModel in eval mode. template: its ChatTemplate, from chat_template.json or the default."""

    model: Any
    tokenizer: Any
    image_processor: Any
    template: Any


def load_model(source: Union[str, Source], dtype: Optional[str] = None, device: Optional[str] = None) -> Loaded:
    """Load a model folder, or a Source, for inference; device, dtype and threads are logged.

    dtype: default as stored, if the device supports it. device: see resolve_device.

    Raises:
        UserError: the model is incomplete, its tokenizer is another model's, or the tuned weights do not fit it.
    """
    from paddlemix.auto import AutoConfigMIX, AutoModelMIX, AutoTokenizerMIX
    from paddlemix.models.mgen_vl.tokenizer import check_vocabulary
    from paddlemix.processors.images import MGenVLImageProcessor
    from paddlemix.processors.mgen_vl_processing import CHAT_TEMPLATE_NAME, ChatTemplate
    from paddlemix.utils.runtime import describe_threads, resolve_device

    chosen = resolve_device(device)
    if chosen.reason:
        logger.warning(chosen.reason)
    source = source if isinstance(source, Source) else Source(source)
    folder = source.base
    config = AutoConfigMIX.from_pretrained(folder, dtype=dtype)
    image_processor = MGenVLImageProcessor.from_config(config)
    tokenizer = AutoTokenizerMIX.from_pretrained(source.folder_of(*VOCABULARIES))
    check_vocabulary(tokenizer, config)
    template = ChatTemplate.of_folder(source.folder_of(CHAT_TEMPLATE_NAME))
    model = AutoModelMIX.from_pretrained(folder, config=config, dtype=dtype)
    put_on(model, source)
    fused = ", fused attention" if model.generates_fused() else ""
    logger.info("%s on %s in %s%s; %s", folder, chosen.value, model.config.dtype, fused, describe_threads())
    return Loaded(model, tokenizer, image_processor, template)


def put_on(model, source: Source) -> None:
    """Load the LLM of source.text and the tuned weights; adapters are applied unmerged.

    Raises:
        WeightsError: files are broken, or do not fit the model.
    """
    from paddlemix.models.lora import load_lora

    shapes = parameter_shapes(model.config)
    if source.text is not None:
        with open_weights(source.text) as reader:
            check_weights(reader, language(shapes), source.text, others=True)
            model.fill(reader, set(language(shapes)))
    if source.tuned is None:
        return
    path = find_tuned_weights(source.tuned)
    with open_weights(path) as reader:
        if any(name.endswith((".lora_A", ".lora_B")) for name in reader.keys()):
            load_lora(model, source.tuned)
        else:
            trained = {name: shapes[name] for name in reader.keys() if name in shapes}
            check_weights(reader, trained, path)
            model.fill(reader, set(trained))
    logger.info("applying the tuned weights of %s, unmerged", source.tuned)
