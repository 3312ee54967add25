"""The demo model's tokenizer and token streams, and the batches cut from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from stdlib_text import TextFile, load_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def train_tokenizer(files: list[TextFile], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer over `files`; its one special token ends a file and stands before the first token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, files: list[TextFile]) -> np.ndarray:
    """One stream [N] uint16: the end token, then each file followed by the end token."""
    end = np.array([tokenizer.token_to_id(END)], dtype=np.uint16)
    pieces = [end]
    for encoding in tokenizer.encode_batch([file.text for file in files], add_special_tokens=False):
        pieces += [np.array(encoding.ids, dtype=np.uint16), end]
    return np.concatenate(pieces)


def prepare(work: Path, vocab_size: int, context: int) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Tokenizer, training stream and held-out stream, made once and kept in `work`."""
    if not (work / "heldout.npy").exists():
        train, heldout = load_split()
        trained = train_tokenizer(train, vocab_size)
        trained.save(str(work / "tokenizer.json"))
        (work / "heldout.txt").write_text("".join(f"{file.path}\n" for file in heldout))
        np.save(work / "train.npy", encode(trained, train))
        np.save(work / "heldout.npy", encode(trained, heldout))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(work / "tokenizer.json")),
        bos_token=END,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, np.load(work / "train.npy"), np.load(work / "heldout.npy")


def token_sizes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """[V] int64: bytes of text each token stands for; a byte-level token has one character per byte."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if piece == END else len(piece) for piece in pieces])


class Windows:
    """Endless batches [B, context + 1] of a token stream; each epoch cuts at a new offset and shuffles anew."""

    def __init__(self, stream: np.ndarray, batch: int, context: int, seed: int) -> None:
        self.stream, self.batch, self.context, self.seed = stream, batch, context, seed
        self.epoch, self.position = 0, 0
        self._shuffle()

    def _shuffle(self) -> None:
        rng = np.random.default_rng((self.seed, self.epoch))
        offset = int(rng.integers(self.context))
        self.starts = np.arange(offset, len(self.stream) - self.context - 1, self.context)
        rng.shuffle(self.starts)

    def seek(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._shuffle()

    def next(self) -> Tensor:
        if self.position + self.batch > len(self.starts):
            self.seek(self.epoch + 1, 0)
        starts = self.starts[self.position : self.position + self.batch]
        self.position += self.batch
        rows = np.stack([self.stream[start : start + self.context + 1] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))
