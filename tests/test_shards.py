"""Token shards: what is written is what is read, and every way in which a file can be wrong."""

import os
import struct
import zlib

import numpy as np
import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.data import DataConfig, _shards, load_text, open_shards, write_tokens

DOCUMENTS = [[5, 6, 7], [8], list(range(10, 30)), [299, 0, 1]]


@pytest.fixture
def shard(tmp_path):
    return write_tokens(tmp_path / "a.bin", DOCUMENTS, vocabulary=300)


def version_1(raw):
    """A shard as it was before there were checksums of blocks."""
    fields = raw[:8] + struct.pack("<I", 1) + raw[12:48]
    return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(64, b"\0") + raw[64:-4]


def refused(paths, vocabulary=None):
    with pytest.raises(sk.errors.DataError) as error:
        open_shards(paths, vocabulary)
    return str(error.value)


@pytest.mark.parametrize(("vocabulary", "itemsize"), [(256, 1), (65_536, 2), (65_537, 4)])
@pytest.mark.parametrize("end", [None, 3])
def test_documents_come_back(tmp_path, vocabulary, itemsize, end):
    documents = [[5, 6, 7], [], [vocabulary - 1], np.arange(20)]
    path = write_tokens(tmp_path / "x.bin", documents, vocabulary, end)
    stream, tail = open_shards([path]), [] if end is None else [end]
    kept = [[*one, *tail] for one in documents if len(one)]
    assert stream.vocabulary == vocabulary
    assert list(stream.ends) == list(np.cumsum([len(one) for one in kept]))
    tokens = stream.read(np.array([stream.lead]), stream.size)[0]
    assert tokens.tolist() == [int(t) for one in kept for t in one]
    assert stream.read(np.array([0]), 1)[0, 0] == (kept[0][0] if end is None else end)
    assert stream.files[0].tokens.dtype.itemsize == itemsize
    assert not list(tmp_path.glob("*.part"))


def test_the_header_is_the_documented_one(shard):
    raw = shard.read_bytes()
    magic, version, itemsize, vocabulary, tokens, documents, end = struct.unpack_from(
        "<8sIIQQQq", raw
    )
    assert (magic, version, itemsize) == (b"SHARDTOK", 2, 2)
    assert (vocabulary, tokens, documents, end) == (300, 27, 4, -1)
    assert np.frombuffer(raw, "<u2", 4, 64).tolist() == [5, 6, 7, 8]
    assert np.frombuffer(raw, "<u8", 4, 64 + 56).tolist() == [3, 4, 24, 27]
    assert np.frombuffer(raw, "<u4", 1, 64 + 56 + 32).tolist() == [zlib.crc32(raw[64:152])]
    assert struct.unpack_from("<I", raw, 52) == (zlib.crc32(raw[152:]),)
    assert len(raw) == 64 + 56 + 32 + 4


def test_several_shards_are_one_stream_and_rows_cross_them(tmp_path, shard):
    np.save(tmp_path / "b.npy", np.arange(100, 140, dtype=np.int64))
    stream = open_shards([shard, tmp_path / "b.npy"], 300)
    whole = [t for one in DOCUMENTS for t in one] + list(range(100, 140))
    assert (stream.size, list(stream.ends)) == (67, [3, 4, 24, 27, 67])
    np.testing.assert_array_equal(stream.read(np.array([0, 20]), 40), [whole[:40], whole[20:60]])
    assert stream.read(np.array([65]), 4).tolist() == [[138, 139, 0, 0]]


def test_the_last_share_is_validation_at_the_nearest_document(tmp_path, shard):
    np.save(tmp_path / "b.npy", np.arange(40))
    train, validation = open_shards([shard, tmp_path / "b.npy"]).split(0.5)
    assert (train.size, validation.size) == (27, 40)
    train, validation = open_shards([shard]).split(0.1)
    assert (list(train.ends), list(validation.ends)) == ([3, 4, 24], [3])
    assert validation.read(np.array([0]), 3).tolist() == [[299, 0, 1]]
    # One document alone is cut.
    train, validation = open_shards([tmp_path / "b.npy"]).split(0.25)
    assert (list(train.ends), list(validation.ends)) == ([30], [10])
    assert validation.read(np.array([8]), 2).tolist() == [[38, 39]]


def test_a_folder_of_shards_is_trained_on(tmp_path, shard):
    write_tokens(tmp_path / "b.bin", [np.arange(40) + i for i in range(20)], 300)
    config = DataConfig(path=str(tmp_path), seq_len=8, batch_size=4, validation_fraction=0.1)
    text = load_text(config, 512)
    batch = text.batch(3)
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert (text.unit, text.validation_bytes) == ("token", None)
    assert text.train.size + text.validation.size == 27 + 800
    assert text.state(3)["tokens"] == "shards"


def test_shards_without_checksums_are_read(tmp_path, shard):
    old = tmp_path / "old.bin"
    old.write_bytes(version_1(shard.read_bytes()))
    one, other = open_shards([old]), open_shards([shard])
    np.testing.assert_array_equal(one.read(np.array([0]), 27), other.read(np.array([0]), 27))
    assert one.checksum() == other.checksum()
    with pytest.raises(sk.errors.DataError, match="has no checksums: it is of format 1"):
        sk.data.verify_shards([old])


def test_every_byte_is_verified_on_request(tmp_path):
    path = write_tokens(tmp_path / "a.bin", [np.arange(400_000) % 999], 1000)
    sk.data.verify_shards([path])
    raw = bytearray(path.read_bytes())
    for at in range(64, len(raw), 39_989):
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(sk.errors.DataError, match="is damaged: "):
            sk.data.verify_shards([path])
        raw[at] ^= 1


def test_a_command_verifies_the_shards_of_a_folder(tmp_path, capsys):
    folder = tmp_path / "tokens"
    folder.mkdir()
    paths = [write_tokens(folder / f"{name}.bin", [np.arange(999)], 1000) for name in "ab"]
    assert main(["shards", str(folder)]) == 0
    assert "2 token shards: intact" in capsys.readouterr().out
    raw = bytearray(paths[1].read_bytes())
    raw[1500] ^= 1
    paths[1].write_bytes(raw)
    np.save(folder / "c.npy", np.arange(9))
    assert main(["shards", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "2 token shards cannot be used" in said
    assert "b.bin  is damaged: " in said
    assert "c.npy  has no checksums: only .bin files have them" in said
    assert main(["shards", str(tmp_path / "tokens" / "a.bin"), str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
@pytest.mark.parametrize("way", ["truncate", "rewrite", "append"])
def test_a_shard_that_changes_while_it_is_read_is_told(suffix, way, tmp_path):
    path = tmp_path / f"a{suffix}"
    np.save(path, np.arange(50_000)) if suffix == ".npy" else write_tokens(
        path, [np.arange(50_000)], 65_536
    )
    stream, _ = open_shards([path]).split(0.1)
    assert stream.read(np.array([40_000]), 2).tolist() == [[40_000, 40_001]]
    os.utime(path, ns=(0, 0))
    stream, _ = open_shards([path]).split(0.1)
    match way:
        case "truncate":
            os.truncate(path, 4096)
        case "rewrite":
            path.write_bytes(path.read_bytes())
        case "append":
            with path.open("ab") as file:
                file.write(b"x")
    with pytest.raises(sk.errors.DataError, match=f"a{suffix} +has changed: it had"):
        stream.read(np.array([40_000]), 2)


def test_a_shard_may_be_replaced_by_another_file_while_it_is_read(shard):
    stream = open_shards([shard])
    shard.unlink()
    write_tokens(shard, [[1, 2]], 300)
    assert stream.read(np.array([0]), 3).tolist() == [[5, 6, 7]]
    part, _ = stream.split(0.3)
    assert part.read(np.array([0]), 3).tolist() == [[5, 6, 7]]
    shard.unlink()
    assert stream.split(0.3)[0].read(np.array([0]), 3).tolist() == [[5, 6, 7]]


def test_pipes_are_refused_and_links_followed_each_folder_once(tmp_path):
    root, other = tmp_path / "text", tmp_path / "other"
    (root / "sub").mkdir(parents=True)
    other.mkdir()
    for i in range(12):
        (root / "sub" / f"{i}.txt").write_text(f"text {i}")
        (other / f"{i}.txt").write_text(f"linked {i}")
    (root / "link").symlink_to(other)
    (root / "sub" / "up").symlink_to(root)
    corpus = sk.data.read_corpus(root, 0.3)
    assert corpus.train_files + corpus.validation_files == 24
    os.mkfifo(root / "pipe")
    with pytest.raises(sk.errors.DataError, match=r"pipe +Is a pipe, not a file"):
        sk.data.read_corpus(root, 0.3)
    os.mkfifo(tmp_path / "pipe.bin")
    assert "pipe.bin  Is a pipe, not a file." in refused([tmp_path / "pipe.bin"])


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(sk.errors.DataError, match=r"closed +Permission denied"):
        sk.data.read_corpus(tmp_path)


# --- what is wrong with a file is said before anything is compiled


def test_all_bad_shards_are_named_together(tmp_path, shard):
    whole = shard.read_bytes()
    bad = {
        "magic.bin": b"NOTTOKEN" + whole[8:],
        "newer.bin": whole[:8] + struct.pack("<I", 3) + whole[12:],
        "header.bin": whole[:24] + b"\xff" + whole[25:],
        "short.bin": whole[:100],
        "long.bin": whole + b"more",
        "empty.bin": b"",
        "ends.bin": version_1(whole)[:-8] + struct.pack("<Q", 99),
        "block.bin": whole[:70] + b"\x01" + whole[71:],
        "table.bin": whole[:-1] + b"\x01",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "cut.npy", np.arange(1000))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    np.save(tmp_path / "float.npy", np.zeros((4, 4), np.float32))
    names = [*bad, "cut.npy", "float.npy", "none.bin"]
    message = refused([shard, *(tmp_path / name for name in names)])
    assert message.startswith("12 token shards cannot be used.")
    for said in (
        "magic.bin  begins with b'NOTTOKEN', not with b'SHARDTOK': not a token shard.",
        "newer.bin  has format 3; this shardkit reads up to 2.",
        "header.bin  has a damaged header: its checksum does not match.",
        "short.bin  is truncated: its header declares 27 tokens in 4 documents, 156 bytes; "
        "it has 100 bytes, at most 18 tokens.",
        "long.bin  has 160 bytes; its header declares 156.",
        "empty.bin  begins with b'', not with b'SHARDTOK'",
        "ends.bin  has document ends that do not ascend to its number of tokens.",
        "block.bin  is damaged: bytes 64 to 152 are not what was written.",
        "table.bin  is damaged: the checksums of its blocks have another checksum.",
        "cut.npy  is truncated, or not a .npy file of numbers:",
        "float.npy  is float32[4,4], not one-dimensional integers.",
        "none.bin  No such file or directory.",
        "Fix: write it again with sk.data.write_tokens",
    ):
        assert said in message


def test_an_id_past_the_vocabulary_is_named_with_its_place(tmp_path, monkeypatch):
    tokens = np.arange(200) % 50
    tokens[137] = 77
    np.save(tmp_path / "t.npy", tokens)
    assert open_shards([tmp_path / "t.npy"]).vocabulary == 78
    expected = "t.npy  token 137 is id 77; the vocabulary has 64 ids, from 0\nFix: --set model.v"
    assert expected in refused([tmp_path / "t.npy"], 64)
    np.save(tmp_path / "n.npy", np.array([3, -1, 4]))
    assert "token 1 is id -1; the vocabulary has 64 ids" in refused([tmp_path / "n.npy"], 64)
    # In files too large to scan, where it is read: also behind a cut.
    monkeypatch.setattr(_shards, "_MAX_CHECKED", 100)
    monkeypatch.setattr(_shards, "_BLOCK_TOKENS", 50)
    _, validation = open_shards([tmp_path / "t.npy"], 64).split(0.5)
    validation.read(np.array([0]), 30)
    with pytest.raises(sk.errors.DataError, match="token 137 is id 77"):
        validation.read(np.array([0, 30]), 30)


def test_a_shard_for_a_larger_vocabulary_or_with_other_ends_is_refused(tmp_path, shard):
    message = refused([shard], 256)
    assert "a.bin  has a vocabulary of 300 ids; the model has 256." in message
    assert "Fix: --set model.vocab=300" in message
    other = write_tokens(tmp_path / "b.bin", DOCUMENTS, 300, end=2)
    assert "2 follows its documents, and nothing follows those of the first" in refused(
        [shard, other]
    )


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    for documents, why in (([[1], [300]], "document 1 +token 0 is id 300"), ([[], []], "empty")):
        with pytest.raises(sk.errors.DataError, match=why):
            write_tokens(tmp_path / "x.bin", documents, 300)
        assert not list(tmp_path.glob("*"))
    with pytest.raises(sk.errors.DataError, match=r"Fix: write_tokens\(\"x\.bin\""):
        write_tokens(tmp_path / "x.tokens", DOCUMENTS, 300)


def test_a_folder_of_shards_and_other_files_is_refused(tmp_path, shard):
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(sk.errors.DataError) as error:
        load_text(DataConfig(path=str(tmp_path)))
    assert "holds 1 token shard (.bin, .npy) and 4 other files (a.txt, b.txt, c.txt, …)." in str(
        error.value
    )


def test_the_folder_of_a_run_and_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(
        sk.errors.DataError, match=r"holds metrics\.jsonl: it is a run or its checkp"
    ):
        load_text(DataConfig(path=str(tmp_path / "run")))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(sk.errors.DataError) as error:
        load_text(DataConfig(path=str(tmp_path / "image.png")))
    assert "image.png  has a zero byte at byte 4; text has none." in str(error.value)
    assert "Fix: only text in data.path, or tokens made of it: sk.data.write_tokens" in str(
        error.value
    )


def none(folder):
    return folder / "none"


def empty(folder):
    return folder


def cut(folder):
    path = write_tokens(folder / "a.bin", DOCUMENTS, 300)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def past(folder):
    np.save(folder / "a.npy", np.arange(1000))
    return folder


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (none, "there is no such file or folder."),
        (empty, "holds no bytes."),
        (cut, "is truncated: its header declares 27 tokens"),
        (past, "token 256 is id 256; the vocabulary has 256 ids"),
    ],
)
def test_bad_data_ends_a_run_before_it_has_a_folder_or_a_program(
    path, said, tmp_path, capsys, monkeypatch
):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sk.StepSpec, "compile", None)  # a compile would be another error
    assert main(["train", "--set", f"data.path={path(tmp_path / 'data')}"]) == 2
    assert said in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["data"]
