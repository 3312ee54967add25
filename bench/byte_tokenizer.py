"""A tokenizer made from nothing: one token a byte, the model's special tokens, and made-up words for all other ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONSONANTS, VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
SPECIAL_NAMES = {"bos_token_id": "<|begin|>", "eos_token_id": "<|end|>", "pad_token_id": "<|pad|>"}


def _word(number: int) -> str:
    """A pronounceable word, different for each number; `Ġ` is how byte-level tokens spell a leading space."""
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    word = ""
    while not word or number:
        number, digit = divmod(number, len(syllables))
        word += syllables[digit]
    return "Ġ" + word


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json for a model of `config` (a config.json) into `folder`.

    Text encodes to one token a byte; every id below vocab_size decodes to some text, so random output can be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {key: config[key] for key in SPECIAL_NAMES if config.get(key) is not None}
    vocabulary = {SPECIAL_NAMES[key]: place for key, place in ids.items()}
    free = (place for place in range(config["vocab_size"]) if place not in ids.values())
    vocabulary.update({letter: next(free) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())})
    vocabulary.update({_word(number): place for number, place in enumerate(free)})

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {key.removesuffix("_id"): SPECIAL_NAMES[key] for key in ids}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **named,
    ).save_pretrained(folder)
