"""A small random model that always has something to say."""

import os

import numpy as np

from tests.helpers import byte_vocab_tokenizer, make_tiny_model


def save_talking_model(folder, seed=0, **overrides) -> str:
    """A model folder like save_tiny_model's, whose answers are of visible ASCII characters only and never end early.

    A plain random model also says line breaks, half characters and nothing at all.
    """
    folder = str(folder)
    os.makedirs(folder)
    model = make_tiny_model(seed, **overrides)
    weight = model.lm_head.weight.numpy()
    spoken = np.zeros(weight.shape[1], dtype=bool)
    spoken[ord("!") : ord("~") + 1] = True
    # Logit 0; the largest of 94 random ones is above that.
    weight[:, ~spoken] = 0.0
    model.lm_head.weight.set_value(weight)
    model.save_pretrained(folder)
    byte_vocab_tokenizer(folder, n_queries=model.config.n_queries)
    return folder
