"""Files of trained predictors: read as they were written, and refused where they are damaged or another model's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictor_files import make_file
from safetensors.numpy import load_file

from moert.errors import ConfigError, CorruptFileError, MoertError, TransferError
from moert.predictors._choice import make_predictor
from moert.predictors._trained import About, content_hash, load_trained, read_trained, save_trained
from moert.predictors.base import Model, Need

MODEL = Model((12, 12, 9), (3, 3, 3), name="tiny", config_hash="aa")
NAMES = ("expertflow", "expertflow_routing", "pre_attention", "token_table")


def make(name: str, path: Path, model: Model = MODEL) -> object:
    return make_predictor(f"{name},file={path}", model, frozenset(Need))


def test_a_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    metrics = {"recall": 0.5, "tokens": 3}
    about = About("token_table", (4, 4), (2, 2), "tiny", "aa", "bb", {"kept": 2.0, "vocabulary": 8}, metrics, "1.2.3")
    tensors = {"a": np.arange(6, dtype=np.uint16).reshape(2, 3).T, "none": np.zeros((0, 2), dtype=np.float32)}
    save_trained(path, about, tensors)
    found = read_trained(path)
    assert found.about == about
    assert found.path == path
    for name, array in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)
        np.testing.assert_array_equal(load_file(path)[name], array), "as the library reads it"
    with pytest.raises(ValueError, match="read-only"):
        found.tensors["a"][0, 0] = 1
    assert [one.name for one in tmp_path.iterdir()] == ["it.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_model_is_refused_with_both(name: str, tmp_path: Path) -> None:
    path = make_file(name, MODEL, tmp_path)
    make(name, path)
    make(name, path, MODEL._replace(name="renamed"))
    make(name, path, MODEL._replace(name="", config_hash=""))
    message = r"was trained for another model: tiny \(configuration aa\), and this is tiny \(cc\); train one for this"
    with pytest.raises(ConfigError, match=message):
        make(name, path, MODEL._replace(config_hash="cc"))
    with pytest.raises(ConfigError, match="'tiny', and this is 'large'"):
        make(name, path, MODEL._replace(name="large", config_hash=""))
    with pytest.raises(ConfigError, match=r"3 layers of 9 or 12 experts \(tiny\), and this one has 3 layers of 12 e"):
        make(name, path, MODEL._replace(num_experts=(12, 12, 12)))


def test_a_file_of_another_predictor_is_refused(tmp_path: Path) -> None:
    path = make_file("token_table", MODEL, tmp_path)
    with pytest.raises(
        ConfigError, match="holds the predictor 'token_table', not 'expertflow'; write token_table,file"
    ):
        make("expertflow", path)
    for name in NAMES:
        with pytest.raises(ConfigError, match=f"{name}.* needs a file that `moert train-predictor` wrote"):
            make_predictor(name, MODEL, frozenset(Need))


def test_what_is_no_predictor_is_refused(tmp_path: Path) -> None:
    path = make_file("token_table", MODEL, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"moert_predictor", b"moert_predictoR"))
    with pytest.raises(ConfigError, match="holds no predictor; `moert train-predictor` makes such files"):
        read_trained(path)
    path.write_bytes(data.replace(rb"\"version\": 1", rb"\"version\": 2"))
    with pytest.raises(ConfigError, match="is of version 2, this moert reads version 1"):
        read_trained(path)
    with pytest.raises(TransferError, match="cannot read a trained predictor"):
        read_trained(tmp_path / "nowhere.safetensors")
    path.write_bytes(b"")
    with pytest.raises(CorruptFileError, match="no sound safetensors file"):
        read_trained(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_is_met_and_nothing_else_raised(place: float, bit: int, cut: bool, tmp_path: Path) -> None:
    path = make_file("pre_attention", MODEL, tmp_path)
    whole = read_trained(path)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    at = int(place * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = load_trained(path, "pre_attention", MODEL)
    except MoertError:
        return
    assert not cut
    assert at < header, "a bit of the weights has turned"
    assert found.about == whole.about
    assert all(np.array_equal(found.tensors[name], array) for name, array in whole.tensors.items())


def tamper(path: Path, name: str, array: np.ndarray | None) -> None:  # type: ignore[type-arg]
    found = read_trained(path)
    tensors = {**found.tensors, **({} if array is None else {name: array})}
    if array is None:
        del tensors[name]
    save_trained(path, found.about, tensors)


@pytest.mark.parametrize(
    ("name", "tensor", "array", "message"),
    [
        ("token_table", "prior", None, "tensor 'prior' is missing"),
        ("token_table", "prior", np.zeros((3, 11), np.float32), r"is float32 \[3, 11\], not float32 \[3, 12\]"),
        ("token_table", "prior", np.full((3, 12), -1, np.float32), "its counts make no sense"),
        ("token_table", "token_ids", np.arange(64)[::-1].copy(), "its counts make no sense"),
        ("token_table", "experts", np.full((64, 3, 6), 12, np.uint16), "expert 12 of 12"),
        ("pre_attention", "weight", np.zeros((3, 12, 16), np.float32), r"is float32 .*, not float16 \[3, 12, n\]"),
        ("pre_attention", "bias", np.full((3, 12), np.nan, np.float32), "numbers that are not finite"),
        ("expertflow", "head.weight", np.full((33, 8), np.inf, np.float32), "numbers that are not finite"),
        ("expertflow", "token_ids", np.arange(5), r"'embedding.weight' is float32 \[65, 8\], not float32 \[6, 8\]"),
    ],
)
def test_tensors_that_make_no_sense(
    name: str,
    tensor: str,
    array: np.ndarray | None,  # type: ignore[type-arg]
    message: str,
    tmp_path: Path,
) -> None:
    path = make_file(name, MODEL, tmp_path)
    tamper(path, tensor, array)
    with pytest.raises(CorruptFileError, match=message):
        make(name, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", []),
        ("num_experts", [12]),
        ("top_k", [3, 3, "3"]),
        ("options", []),
        ("model", 3),
        ("model", None),
    ],
)
def test_what_a_file_says_of_itself_is_checked(key: str, value: object, tmp_path: Path) -> None:
    path = make_file("token_table", MODEL, tmp_path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    document = json.loads(header["__metadata__"]["moert_predictor"])
    document["about"][key] = value
    if value is None:
        del document["about"][key]
    document["content_hash"] = content_hash(document["about"], read_trained(path).tensors)
    header["__metadata__"]["moert_predictor"] = json.dumps(document)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(CorruptFileError, match=rf"token_table.safetensors: .*({key}|layers)"):
        read_trained(path)


def test_sizes_that_make_no_network_are_refused(tmp_path: Path) -> None:
    path = make_file("expertflow", MODEL, tmp_path)
    found = read_trained(path)
    about = About(**{**vars(found.about), "options": {**found.about.options, "width": -3}})
    save_trained(path, about, found.tensors)
    with pytest.raises(CorruptFileError, match="is no network"):
        make("expertflow", path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_file("token_table", MODEL, tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(TransferError, match="No space left"):
        make_file("token_table", MODEL._replace(name="other"), tmp_path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
