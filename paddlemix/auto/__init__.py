"""The four Auto classes known from PaddleMIX. Each loads from a local model folder; nothing is downloaded.

    tokenizer = AutoTokenizerMIX.from_pretrained(folder)
    processor, image_processor = AutoProcessorMIX.from_pretrained(folder)
    config = AutoConfigMIX.from_pretrained(folder, dtype="float32")
    model = AutoModelMIX.from_pretrained(folder, config=config, dtype="float32")

MGen-VL is the only model; MGenConfig refuses folders with another `model_type`. Importing this package is light; heavy
imports happen in the calls.
"""

from __future__ import annotations


class AutoConfigMIX:
    @staticmethod
    def from_pretrained(folder, dtype=None, **overrides):
        """config.json as an MGenConfig; `overrides` replace its values.

        Raises:
            ConfigError: the file is missing, or has invalid values.
        """
        from paddlemix.models.mgen_vl.configuration import MGenConfig

        return MGenConfig.from_pretrained(folder, dtype=dtype, **overrides)


class AutoModelMIX:
    @staticmethod
    def from_pretrained(folder, config=None, dtype=None):
        """The model with its weights, in eval mode (see MGenLMHeadModel.from_pretrained)."""
        from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

        return MGenLMHeadModel.from_pretrained(folder, config=config, dtype=dtype)


class AutoTokenizerMIX:
    @staticmethod
    def from_pretrained(folder):
        """The tokenizer of a model or LoRA folder."""
        from paddlemix.models.mgen_vl.tokenizer import MGenVLTokenizer

        return MGenVLTokenizer.from_pretrained(folder)


class AutoProcessorMIX:
    @staticmethod
    def from_pretrained(folder):
        """(processor, image_processor): prompts with images, and images alone (processors package)."""
        from paddlemix.processors.images import MGenVLImageProcessor
        from paddlemix.processors.mgen_vl_processing import ChatTemplate, MGenVLProcessor

        image_processor = MGenVLImageProcessor.from_config(AutoConfigMIX.from_pretrained(folder))
        tokenizer, template = AutoTokenizerMIX.from_pretrained(folder), ChatTemplate.of_folder(folder)
        return MGenVLProcessor(tokenizer, image_processor, template), image_processor
