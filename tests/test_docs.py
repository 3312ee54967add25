"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from families.document import document

import moert
from moert.config import OffloadConfig

ROOT = Path(__file__).parent.parent


def test_table_of_families_is_up_to_date() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    (version,) = re.findall(r"from transformers ([\d.]+)", page)
    if version != transformers.__version__:
        pytest.skip(f"docs/families.md was made from transformers {version}")
    assert page == document(), "run `make docs`"


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"moert\.([a-z_]+)\(", readme)):
        assert hasattr(moert, name), f"README calls moert.{name}"
    for path in set(re.findall(r"\]\(((?!http)[^)#]+)\)", readme)):
        assert (ROOT / path).exists(), f"README links to {path}"
    for target in set(re.findall(r"^\s*make ([a-z-]+)", readme, flags=re.M)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), f"README says `make {target}`"


def test_readme_lists_every_option() -> None:
    readme = (ROOT / "README.md").read_text()
    for option in OffloadConfig.option_names():
        assert f"`{option}`" in readme, f"README does not explain {option}"


def test_everything_public_has_a_docstring() -> None:
    for name in moert.__all__:
        if not name.startswith("__"):
            assert getattr(moert, name).__doc__, name
