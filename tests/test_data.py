"""Bytes, their split, their batches, and what compressors make of them."""

import gzip
import hashlib
import lzma
import zlib

import numpy as np
import pytest

from shardkit._core.errors import DataError
from shardkit.data import (
    Corpus,
    DataConfig,
    Text,
    load_text,
    measure_baselines,
    read_corpus,
    read_standard_library,
)

ALPHABET = bytes(range(97, 123))


def text_of(train: bytes, validation: bytes = b"0123456789", **sizes) -> Text:
    return Text(Corpus("a test", train, validation, 1, 1), DataConfig(**sizes))


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"part{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"file {i}\n".encode() * 5)
    (tmp_path / ".hidden").write_bytes(b"never read")
    (tmp_path / "part1" / "__pycache__").mkdir()
    (tmp_path / "part1" / "__pycache__" / "code.pyc").write_bytes(b"\0 never read")
    return tmp_path


# --- corpora


def test_the_standard_library_is_split_by_file_and_holds_no_tests():
    corpus = read_standard_library(0.05)
    whole = corpus.train + corpus.validation
    assert len(whole) > 4_000_000
    assert 0.01 < len(corpus.validation) / len(whole) < 0.12
    assert b"class JSONDecoder" in whole
    assert b"class TestJSONDecoder" not in whole
    assert b"import jax" not in whole
    assert corpus.train.count(b"\0") == corpus.train_files


def test_a_file_stays_on_its_side_when_others_come_and_go(folder):
    before = read_corpus(folder, 0.2)
    (folder / "new.txt").write_bytes(b"new file\n")
    after = read_corpus(folder, 0.2)
    assert set(before.validation.split(b"\0")) <= set(after.validation.split(b"\0"))
    assert set(before.train.split(b"\0")) <= set(after.train.split(b"\0"))
    assert b"never read" not in after.train + after.validation


def test_the_side_of_a_file_is_the_documented_hash_of_its_path(folder):
    validation = read_corpus(folder, 0.2).validation
    for i in range(40):
        digest = hashlib.sha256(f"part{i % 3}/file{i}.txt".encode()).digest()
        expected = int.from_bytes(digest[:8], "big") / 2**64 < 0.2
        assert (f"file {i}\n".encode() * 5 + b"\0" in validation) == expected


def test_one_file_holds_out_its_tail(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(ALPHABET * 10)
    corpus = read_corpus(path, 0.1)
    assert corpus.train + corpus.validation == (ALPHABET * 9 + b"\0") + (ALPHABET + b"\0")


# --- training batches


def test_a_batch_predicts_each_byte_from_those_before():
    batch = text_of(ALPHABET * 20, seq_len=8, batch_size=4).batch(3)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "inputs": ((4, 8), "int32"),
        "targets": ((4, 8), "int32"),
        "weights": ((4, 8), "float32"),
    }
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    follows = (batch["inputs"] - 97 + 1) % 26 + 97
    inside = batch["inputs"] >= 97
    np.testing.assert_array_equal(batch["targets"][inside], follows[inside])


def test_any_step_can_be_asked_for_in_any_order_and_in_parts():
    text = text_of(ALPHABET * 20, seq_len=8, batch_size=6)
    late, early = text.batch(50), text.batch(1)
    again = text_of(ALPHABET * 20, seq_len=8, batch_size=6)
    np.testing.assert_array_equal(early["inputs"], again.batch(1)["inputs"])
    np.testing.assert_array_equal(late["inputs"], again.batch(50)["inputs"])
    parts = [again.batch(50, slice(lo, lo + 2))["targets"] for lo in (0, 2, 4)]
    np.testing.assert_array_equal(late["targets"], np.concatenate(parts))


def test_the_order_of_rows_is_the_one_that_runs_were_made_with():
    text, crc = text_of(ALPHABET * 20, bytes(range(1, 101)), seq_len=8, batch_size=3, overlap=2), 0
    for batch in [*map(text.batch, range(60)), *map(text.validation_batch, range(6))]:
        for name in ("inputs", "targets", "weights"):
            crc = zlib.crc32(batch[name].tobytes(), crc)
    assert f"{crc:08x}" == "2c823ebc"


def test_global_rows_do_not_depend_on_the_batch_size():
    small = text_of(ALPHABET * 20, seq_len=8, batch_size=2)
    large = text_of(ALPHABET * 20, seq_len=8, batch_size=6)
    rows = np.concatenate([small.batch(i)["inputs"] for i in range(30)])
    np.testing.assert_array_equal(
        rows, np.concatenate([large.batch(i)["inputs"] for i in range(10)])
    )


def test_an_epoch_reads_no_byte_twice_and_nearly_all_of_them():
    numbered = bytes(range(1, 256))
    text = text_of(numbered, seq_len=10, batch_size=1)
    for epoch in range(3):
        steps = range(epoch * text.rows_per_epoch, (epoch + 1) * text.rows_per_epoch)
        targets = np.concatenate([text.batch(i)["targets"].ravel() for i in steps])
        assert len(set(targets.tolist())) == len(targets) >= 255 - 2 * 10


def test_epochs_and_seeds_differ_in_order_and_in_where_rows_begin():
    text = text_of(ALPHABET * 20, seq_len=8, batch_size=1)
    other = text_of(ALPHABET * 20, seq_len=8, batch_size=1, seed=1)
    n = text.rows_per_epoch
    first = [text.batch(i)["inputs"].tobytes() for i in range(n)]
    second = [text.batch(n + i)["inputs"].tobytes() for i in range(n)]
    assert first != second
    assert first != [other.batch(i)["inputs"].tobytes() for i in range(n)]


# --- validation batches


@pytest.mark.parametrize("overlap", [0, 3, 7])
@pytest.mark.parametrize("size", [8, 9, 64, 65, 100])
def test_each_validation_byte_is_predicted_exactly_once(size, overlap):
    validation = np.random.default_rng(0).integers(1, 256, size).astype(np.uint8).tobytes()
    text = text_of(ALPHABET * 4, validation, seq_len=8, batch_size=3, overlap=overlap)
    batches = [text.validation_batch(i) for i in range(text.validation_steps)]
    picked = [batch["targets"][batch["weights"] == 1] for batch in batches]
    assert np.concatenate(picked).astype(np.uint8).tobytes() == validation
    assert sum(batch["weights"].sum() for batch in batches) == text.validation_tokens == size


@pytest.mark.parametrize("overlap", [0, 5])
def test_validation_rows_give_at_least_the_overlap_as_context(overlap):
    validation = bytes(range(1, 101))
    text = text_of(ALPHABET * 4, validation, seq_len=8, batch_size=2, overlap=overlap)
    for i in range(text.validation_steps):
        batch = text.validation_batch(i)
        for inputs, targets, weights in zip(*batch.values(), strict=True):
            if weights.any():
                first = int(np.argmax(weights))
                assert first >= overlap or targets[first] <= 8
                np.testing.assert_array_equal(inputs[1:], targets[:-1])


# --- baselines


def test_baselines_are_what_their_definitions_say():
    rng = np.random.default_rng(1)
    train, validation = (rng.integers(97, 101, n).astype(np.uint8).tobytes() for n in (5000, 600))
    found = measure_baselines(Corpus("random", train, validation, 1, 1))
    share = [(train.count(byte) + 1) / (len(train) + 256) for byte in validation]
    assert found.order0 == pytest.approx(-np.log2(share).mean())
    assert found.gzip == pytest.approx(8 * len(gzip.compress(validation, 9, mtime=0)) / 600)
    assert found.xz == pytest.approx(8 * len(lzma.compress(validation, preset=9)) / 600)
    # Four equally likely letters carry two bits; nothing honest can be far below.
    assert 1.99 < found.order0 < 2.1
    assert 1.95 < found.bigram < 2.5
    assert min(found.gzip, found.xz) > 1.99
    assert found.n == 600


def test_a_bigram_knows_what_follows_and_order0_does_not():
    found = measure_baselines(Corpus("abc", ALPHABET * 400, ALPHABET * 4, 1, 1))
    assert found.order0 > 4.6
    assert found.bigram < 1.0
    assert found.xz_after_train < found.xz / 4


def test_a_byte_that_training_never_saw_costs_bits_not_infinity():
    found = measure_baselines(Corpus("abc", ALPHABET * 40, b"\xff\xfe" * 8, 1, 1))
    assert 8 < found.order0 < 20
    assert 8 <= found.bigram < 20


# --- errors


def test_a_missing_path_names_itself_and_the_way_out(tmp_path):
    path = tmp_path / "no" / "such"
    with pytest.raises(DataError) as error:
        load_text(DataConfig(path=str(path)))
    message = str(error.value)
    assert f"data.path={str(path)!r}" in message
    assert "no such file or folder" in message
    assert "Fix: --set data.path=FOLDER_OF_TEXT" in message


def test_an_empty_folder_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(DataError, match=r"The corpus is empty\.\n.*holds no bytes\.\nFix: "):
            read_corpus(path)


def test_a_folder_whose_files_all_fall_on_one_side_is_refused(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"text")
    with pytest.raises(DataError) as error:
        read_corpus(tmp_path, 0.05)
    assert "The validation part of the corpus is empty." in str(error.value)
    assert "1 file fell into the other part at data.validation_fraction=0.05" in str(error.value)
    assert "--set data.validation_fraction=0.2" in str(error.value)


def test_an_unreadable_path_gives_the_reason(tmp_path):
    name = "x" * 300  # longer than a file name may be, for every user
    with pytest.raises(DataError, match=r"File name too long\.[\s\S]*Fix: --set data.path="):
        read_corpus(tmp_path / name)


def test_rows_longer_than_the_text_name_both_lengths():
    with pytest.raises(DataError) as error:
        text_of(ALPHABET, b"0123", seq_len=100, batch_size=1)
    message = str(error.value)
    assert "data.seq_len=100 is longer than all its 26 bytes" in message
    assert "data.seq_len=100 is longer than all its 4 bytes" in message
    assert "Fix: --set data.seq_len=2" in message


def test_a_batch_of_more_rows_than_an_epoch_names_both():
    with pytest.raises(DataError) as error:
        text_of(ALPHABET * 2, seq_len=8, batch_size=16)
    assert "data.batch_size=16, but an epoch has 5 rows of 8." in str(error.value)
    assert "--set data.batch_size=5" in str(error.value)


def test_impossible_sizes_are_all_reported_together():
    with pytest.raises(DataError) as error:
        DataConfig(seq_len=0, batch_size=-1, validation_fraction=1.5, overlap=-2)
    for part in (
        "data.seq_len=0",
        "data.batch_size=-1",
        "data.validation_fraction=1.5",
        "data.overlap=-2",
    ):
        assert part in str(error.value)
