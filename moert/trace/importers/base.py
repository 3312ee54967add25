"""The interface of an importer, and what several of them need."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError, CorruptFileError, TransferError
from moert.trace.check import find_problem
from moert.trace.sequence import LayerInfo, Phase, Sequence, TraceHeader

MAX_LINE_BYTES = 1 << 28
"""Of a text file; a longer one is taken for damage rather than read into memory."""

BEGINNING_BYTES = 1 << 16
"""What `recognises` may look at."""


def _nobody(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class ImportOptions:
    """What a user knows of a trace that its file does not say."""

    model: str = ""
    experts: int | None = None
    """Of each layer."""
    top_k: int | None = None
    native_top_k: int | None = None
    phase: Phase = Phase.DECODE
    """What tokens are where the file does not say: decoded, each in a step of its own, or of a prompt, all of a
    sequence in one step."""
    keep_repetition: bool = True
    """Whether to keep sequences that the file marks as a model repeating itself."""
    report: Callable[[int, int], None] = _nobody
    """Called with how much of the file is read and how much there is, in any unit."""

    def need(self, name: str, path: Path) -> int:
        """A number that the file lacks.

        Raises:
            ConfigError: nobody gave it, or it is not positive.
        """
        value = getattr(self, name)
        option = f"--{name.replace('_', '-')}"
        if value is None:
            raise ConfigError(f"{path} does not say the model's {_MEANINGS[name]}; give it with {option} N")
        if value < 1:
            raise ConfigError(f"{option}={value} must be at least 1")
        return int(value)


_MEANINGS = {"experts": "number of experts a layer", "top_k": "number of experts a token (top-k)"}


class Importer(ABC):
    """Reads one format. Its name is its file's name; there is no list to add it to.

    Constructed without arguments. It reads as it goes, never a whole file that can be read in parts, and refuses what
    is malformed with the file and the line or array; nothing is skipped.
    """

    about: str = ""
    """The format in a few words, for people who choose one."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file or folder seems to be of this format, from its beginning. False where it cannot be read."""

    @abstractmethod
    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        """The header, and the sequences one after another; steps are counted from 0 over the file.

        Raises:
            ConfigError: an option is missing or contradicts the file. Here or while iterating:
            CorruptFileError: the file is malformed; the message says where.
            TransferError: it cannot be read.
        """


def beginning(path: Path, nbytes: int = BEGINNING_BYTES) -> bytes:
    """The first bytes of a file; none where there is no readable file."""
    try:
        with open(path, "rb") as file:
            return file.read(nbytes)
    except OSError:
        return b""


def malformed(path: Path, where: str, text: str) -> CorruptFileError:
    """The error for something wrong at a place in a file."""
    return CorruptFileError(f"{path}: {where}: {text}")


def cannot_read(error: OSError, path: Path) -> TransferError:
    """The error for what the operating system refused."""
    return TransferError(error.errno, f"{error.strerror or error}; cannot read it", str(path))


def read_lines(path: Path, options: ImportOptions) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, without their ends.

    Raises:
        CorruptFileError: a line is not UTF-8, or too long.
        TransferError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise malformed(path, f"line {number}", f"longer than {MAX_LINE_BYTES} bytes")
                if number % 64 == 0:
                    options.report(file.tell(), size)
                try:
                    yield number, line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise malformed(path, f"line {number}", f"not UTF-8 ({error})") from error
    except OSError as error:
        if isinstance(error, TransferError):
            raise
        raise cannot_read(error, path) from error


def refuse_text_after(path: Path, lines: Iterator[tuple[int, str]], number: int) -> None:
    """After an empty line only empty ones may follow.

    Raises:
        CorruptFileError: there is a line with text.
    """
    for later, text in lines:
        if text.strip():
            raise malformed(path, f"line {number}", f"empty, but line {later} is not")


def uniform_layers(
    num_layers: int, options: ImportOptions, path: Path, top_k: int, names: list[str] | None = None
) -> tuple[LayerInfo, ...]:
    """Layers that are all alike, with the user's number of experts.

    Raises:
        ConfigError: the number is not given, or contradicts the top-k.
    """
    experts = options.need("experts", path)
    if options.top_k is not None and options.top_k != top_k:
        raise ConfigError(f"{path} has {top_k} experts a token, --top-k says {options.top_k}")
    if top_k > experts:
        raise ConfigError(f"{path} has {top_k} experts a token, more than the {experts} of a layer (--experts)")
    names = [f"layers.{index}" for index in range(num_layers)] if names is None else names
    return tuple(LayerInfo(name, experts, top_k, options.native_top_k) for name in names)


def tokens_of(phase: Phase, num_tokens: int, first_step: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Phases and steps of tokens that are all of one phase: one step for each, but one for all of a prompt."""
    steps = np.full(num_tokens, first_step, dtype=np.int64)
    if phase is not Phase.PREFILL:
        steps += np.arange(num_tokens)
    return np.full(num_tokens, phase, dtype=np.uint8), steps


def prompt_and_decode(
    num_prompt: int, num_tokens: int, first_step: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Phases and steps of a prompt in one step and tokens decoded one by one."""
    place = np.arange(num_tokens)
    phases = np.where(place < num_prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8)
    offset = 0 if num_prompt == 0 else num_prompt - 1
    return phases, first_step + np.maximum(place - offset, 0)


def as_ids(array: npt.NDArray[Any], path: Path, where: str) -> npt.NDArray[np.int32]:
    """Expert ids of any integer dtype.

    Raises:
        CorruptFileError: they are no integers, or beyond 32 bits.
    """
    if array.dtype.kind not in "iu":
        raise malformed(path, where, f"expert ids must be integers, not {array.dtype}")
    if array.size and (int(array.max()) > 2**31 - 1 or int(array.min()) < -1):
        raise malformed(path, where, f"ids from {array.min()} to {array.max()} are no expert ids")
    return array.astype(np.int32)


def checked(sequence: Sequence, header: TraceHeader, path: Path, where: str) -> Sequence:
    """The sequence, if it is valid.

    Raises:
        CorruptFileError: it is not.
    """
    problem = find_problem(sequence, header)
    if problem is not None:
        raise malformed(path, where, f"{problem.array}: {problem.text}")
    return sequence
