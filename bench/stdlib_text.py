"""The text the demo model is trained and judged on: the running Python's standard library, split by file."""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELDOUT_SHARE = 0.04
# Not Python that anybody wrote: charmap tables (near copies of one another, so a held-out one would have its twin in
# the training text), the language reference as one generated string (alone larger than all other held-out files
# together), and build configuration.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"})
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class TextFile:
    """One source file: its path relative to the standard library folder (posix form) and its decoded text."""

    path: str
    text: str

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


def is_heldout(path: str) -> bool:
    """Whether the file at `path` (relative, posix) is held out; depends on the path alone, so on no Python version."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_text(root: Path, path: str) -> str | None:
    """The file's text, or None where it is missing, empty or not UTF-8."""
    try:
        text = (root / path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text or None


def list_paths(root: Path) -> list[str]:
    """Sorted relative paths of the `*.py` files below `root` that belong to the corpus."""
    paths = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).parts
        if EXCLUDED_FOLDERS.isdisjoint(parts) and not any(part.startswith(EXCLUDED_PREFIXES) for part in parts):
            paths.append("/".join(parts))
    return sorted(paths)


def load_split(root: Path | None = None) -> tuple[list[TextFile], list[TextFile]]:
    """The training files and the held-out files of the standard library at `root` (default: the running Python's).

    A file that is byte for byte a held-out file, and any repeat of an earlier file, is left out of the training files;
    repeats among the held-out files are left out too. Reads ~30 MB from disk and blocks meanwhile.
    """
    root = root or stdlib_folder()
    train: list[TextFile] = []
    heldout: list[TextFile] = []
    seen: set[str] = set()
    paths = list_paths(root)
    for wanted, target in ((True, heldout), (False, train)):
        for path in paths:
            if is_heldout(path) is not wanted:
                continue
            text = read_text(root, path)
            if text is None or text in seen:
                continue
            seen.add(text)
            target.append(TextFile(path, text))
    return train, heldout


def gzip_bytes(data: bytes) -> int:
    """Size in bytes of what `gzip -9` makes of `data` read from standard input (no file name in the header)."""
    return len(gzip.compress(data, compresslevel=9, mtime=0))


def gzip_bits_per_byte(texts: list[str]) -> tuple[float, float]:
    """Bits per byte of `gzip -9` over `texts`: each on its own (sizes summed), and all in one stream."""
    blobs = [text.encode("utf-8") for text in texts]
    total_bytes = sum(map(len, blobs))
    per_file = 8 * sum(map(gzip_bytes, blobs)) / total_bytes
    return per_file, 8 * gzip_bytes(b"".join(blobs)) / total_bytes
