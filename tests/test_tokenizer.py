"""Text through a tokenizer's file."""

import io
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from rich.console import Console

import shardkit as sk
from shardkit.cli import main
from shardkit.data import DataConfig, load_text, open_shards, tokenize
from shardkit.lm import TextTrainConfig
from shardkit.lm._samples import Sampler
from shardkit.lm._summary import Summary

from .test_run import FakeStep

SIDES = ("train", "validation")

WORDS = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "<|endoftext|>": 7}


@pytest.fixture
def tokenizer(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text("a b c " * (i + 1))
    return tmp_path / "text"


def config(folder, tokenizer, **changes):
    sizes = {"seq_len": 4, "batch_size": 2, "validation_fraction": 0.2} | changes
    return DataConfig(path=str(folder), tokenizer=str(tokenizer), **sizes)


def test_files_become_tokens_with_an_end_behind_each(folder, tokenizer):
    text = load_text(config(folder, tokenizer), 8)
    assert (text.unit, text.train.vocabulary, text.train.end) == ("token", 8, 7)
    tokens = text.train.read(np.array([0]), text.train.size + 1)[0]
    assert tokens[0] == tokens[-1] == 7
    assert (tokens == 7).sum() == text.corpus.train_files + 1
    assert set(tokens[1:4].tolist()) == {1, 2, 3}
    scored = [text.validation_batch(i)["weights"].sum() for i in range(text.validation_steps)]
    assert sum(scored) == text.validation_tokens == text.validation.size
    assert text.validation_bytes > text.validation_tokens


def test_text_is_tokenized_once_into_shards_that_hold_the_same(folder, tokenizer, tmp_path, capsys):
    (folder / "empty.txt").write_text("")
    out = tmp_path / "out"
    words = ["tokenize", str(folder), str(out), "--tokenizer", str(tokenizer), "--tokens", "200"]
    assert main(words) == 0
    shards = sorted(out.iterdir())
    assert [path.name for path in shards] == [f"tokens-0000{i}.bin" for i in range(len(shards))]
    assert len(shards) > 1
    assert (
        f"shardkit train --set data.path={out} --set data.tokenizer={tokenizer} "
        "--set model.vocab=8" in capsys.readouterr().out
    )
    stream = open_shards(shards)
    assert (stream.size, len(stream.ends), stream.end) == (3 * 210 + 20, 20, 7)
    assert stream.vocabulary == 8
    train, validation = (getattr(load_text(config(folder, tokenizer)), s) for s in SIDES)
    assert train.size + validation.size == stream.size
    again = load_text(DataConfig(path=str(out), seq_len=4, batch_size=2), 8)
    assert again.train.size + again.validation.size == stream.size
    with pytest.raises(
        sk.errors.DataError, match=r"out +holds tokens-00000\.bin; nothing is overwritten"
    ):
        tokenize(folder, out)
    (tmp_path / "none").mkdir()
    with pytest.raises(sk.errors.DataError, match=r"none +holds no text"):
        tokenize(tmp_path / "none", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(folder, tokenizer):
    with pytest.raises(sk.errors.DataError) as error:
        load_text(config(folder, tokenizer), 4)
    message = str(error.value)
    assert "The tokens do not fit the model." in message
    assert f"data.tokenizer={tokenizer}  it has 8 ids; the model has model.vocab=4." in message
    assert "Fix: --set model.vocab=8" in message
    with pytest.raises(
        sk.errors.DataError, match="by the byte, which takes 256 ids; the model has"
    ):
        load_text(DataConfig(path=str(folder)), 255)


def test_what_is_no_tokenizer_says_why(folder, tmp_path):
    with pytest.raises(
        sk.errors.DataError, match=r"data\.tokenizer=.*none.*No such file or directory"
    ):
        load_text(config(folder, tmp_path / "none.json"))
    (tmp_path / "config.json").write_text('{"vocab": 3}')
    with pytest.raises(sk.errors.DataError, match="is not a tokenizer file: "):
        load_text(config(folder, tmp_path / "config.json"))


def test_text_that_is_not_utf8_shows_where(folder, tokenizer):
    for i in range(20):
        (folder / f"{i}.txt").write_bytes(b"a b \xff\xfe c")
    with pytest.raises(sk.errors.DataError) as error:
        load_text(config(folder, tokenizer))
    assert r"b'a b \xff\xfe c' is not UTF-8" in str(error.value)


def test_another_tokenizer_is_other_data(folder, tokenizer):
    text = load_text(config(folder, tokenizer))
    state = text.state(9)
    assert sk.data.resume_step(state, text) == 9
    tokenizer.write_text(tokenizer.read_text().replace('"c"', '"d"'))
    with pytest.raises(sk.errors.DataError, match=r"tokens +was 'tokenizer\.json"):
        sk.data.resume_step(state, load_text(config(folder, tokenizer)))


# --- what a model wrote


class Alphabet:
    """A model of more ids than the tokenizer has, which surely goes on from a to b to c to a."""

    def __call__(self, row):
        return row

    def logits(self, token):
        return jnp.where(
            jnp.arange(12) == token % 3 + 1, 50.0, jnp.where(jnp.arange(12) > 7, 99, 0)
        )


@pytest.fixture
def written(monkeypatch):
    """What a run with the model `Alphabet` writes."""
    model = SimpleNamespace(bind=lambda params: Alphabet())
    monkeypatch.setattr("shardkit.lm._samples.decoder_model", lambda config: model)
    return finish


def finish(text, **loop):
    """The sample of a finished run, and what it said of it."""
    out, said = io.StringIO(), []
    config = TextTrainConfig(steps=1, baselines=False, **loop)
    tuning = SimpleNamespace(loop=config, model=None, merge=lambda params: params)
    sampler = Sampler(tuning, text, sk.Strategy())
    summary = Summary(sampler, text, config, Console(file=out, width=200))
    run = SimpleNamespace(
        folder=None, step=FakeStep(), write=lambda kind, **row: None, say=said.append
    )
    summary.on_start(run, None)
    summary.on_finish(SimpleNamespace(params=None))
    return summary.result.sample, said, out.getvalue()


def test_a_sample_of_tokens_is_text_where_their_tokenizer_is_known(
    folder, tokenizer, tmp_path, written
):
    tokenize(folder, tmp_path / "out", str(tokenizer))
    for path in (folder, tmp_path / "out"):
        sample, said, shown = written(load_text(config(path, tokenizer), 12), sample=5)
        assert (sample, said) == (b"b c a b c", [])
        assert "a sample that it wrote\n  b c a b c\n" in shown


def test_shards_without_their_tokenizer_have_no_sample_and_say_so(
    folder, tokenizer, tmp_path, written
):
    tokenize(folder, tmp_path / "out", str(tokenizer))
    text = load_text(DataConfig(path=str(tmp_path / "out"), seq_len=4, batch_size=2), 12)
    sample, said, shown = written(text)
    assert (sample, "a sample" in shown) == (b"", False)
    assert said == [
        "no sample: decoding the tokens needs the tokenizer that made the shards "
        "(--set data.tokenizer=tokenizer.json)"
    ]
    assert written(text, sample=0)[1] == []


def test_a_tokenizer_that_cannot_be_that_of_the_shards_is_refused(folder, tokenizer, tmp_path):
    shard = sk.data.write_tokens(tmp_path / "a.bin", [[5, 6], [11, 7]], vocabulary=12)
    with pytest.raises(sk.errors.DataError) as error:
        load_text(config(shard, tokenizer), 12)
    message = str(error.value)
    assert "The tokenizer is not that of the shards." in message
    assert f"data.tokenizer={tokenizer}  has 8 ids; {shard} holds id 11." in message
    assert "Fix: the tokenizer that made the shards, or none: then the run" in message
