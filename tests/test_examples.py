"""Chats, completions and texts from JSON lines: their tokens, weights and rows, and bad input."""

import json

import numpy as np
import pytest

from shardkit._core.errors import DataError
from shardkit.data import DataConfig, load_examples, load_source
from shardkit.data._chat_template import TEMPLATES, choose_template
from shardkit.data._json_lines import Turn, read_examples
from shardkit.data._tokenizer import ByteTokenizer

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": "yes"},
    ]
}
COMPLETION = {"prompt": "ab", "completion": "cde"}
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n"
    "<|im_start|>assistant\nyes<|im_end|>\n"
)


def write(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", "utf-8")
    return str(path)


def make_tokenizer(path, *special, start=None, characters=95):
    """One token per character, and some special ones behind them."""
    tokenizers = pytest.importorskip("tokenizers")
    known = {chr(32 + i): i for i in range(characters)} | {"\n": characters}
    model = tokenizers.models.WordLevel(known, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([*special])
    if start:
        ids = [(name, tokenizer.token_to_id(name)) for name in start.split() if name != "$A"]
        process = tokenizers.processors.TemplateProcessing(start, special_tokens=ids)
        tokenizer.post_processor = process
    tokenizer.save(str(path))
    return str(path)


def config(path, **options):
    options = {"format": "json_lines", "tokenizer": "bytes", "batch_size": 1} | options
    return DataConfig(path=str(path), **options)


def answers(batch, decode):
    """The predicted tokens that count, as text."""
    return decode(batch["targets"][batch["weights"] > 0])


# --- templates


def render(name, chat=CHAT["messages"]):
    turns = [
        Turn(**message)
        for message in chat
        if name in ("chatml", "llama3", "plain") or message["role"] != "system"
    ]
    text, spans = TEMPLATES[name].render(turns)
    return text, [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize(
    ("name", "text", "spans"),
    [
        ("chatml", CHATML, ["2<|im_end|>", "yes<|im_end|>"]),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nso?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>",
            ["2<|eot_id|>", "yes<|eot_id|>"],
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n"
            "<start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n",
            ["2<end_of_turn>", "yes<end_of_turn>"],
        ),
        (
            "plain",
            "### system\nBe brief.\n\n### user\n1+1?\n\n### assistant\n2\n\n"
            "### user\nso?\n\n### assistant\nyes\n\n",
            ["2\n\n", "yes\n\n"],
        ),
        ("mistral", "<s>[INST] 1+1?[/INST] 2</s>[INST] so?[/INST] yes</s>", ["2</s>", "yes</s>"]),
    ],
)
def test_a_template_writes_what_its_family_was_trained_on(name, text, spans):
    assert render(name) == (text, spans)


def test_a_template_is_found_by_the_marks_that_are_tokens():
    marks = {name: dict.fromkeys(t.marks, 1) for name, t in TEMPLATES.items()}
    for name in ("chatml", "llama3", "gemma", "mistral"):
        assert choose_template(None, marks[name]).name == name
    with pytest.raises(DataError, match="has the marks of none of chatml, llama3"):
        choose_template(None, {})
    with pytest.raises(DataError, match="has the marks of chatml, llama3 of"):
        choose_template(None, marks["chatml"] | marks["llama3"])
    with pytest.raises(DataError, match=r"data.template=llama3  needs <\|begin_of_text\|>, .* as"):
        choose_template("llama3", {})
    with pytest.raises(DataError, match="Did you mean 'chatml'"):
        choose_template("chatlm", {})


# --- tokens and weights


def test_the_answers_of_a_chat_count_with_the_marks_that_end_them(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json", "</s>", "<|im_start|>", "<|im_end|>")
    path = write(tmp_path / "a.jsonl", CHAT, CHAT | {"messages": CHAT["messages"][1:]})
    examples = load_examples(config(path, tokenizer=tokenizer, seq_len=200))
    assert examples.template.name == "chatml"
    decode = examples.tokenizer.decode
    for batch in (examples.batch(0), examples.validation_batch(0)):
        assert answers(batch, decode) == b"2<|im_end|>yes<|im_end|>"
        [row], [ids] = batch["inputs"], batch["segment_ids"]
        assert CHATML.encode().endswith(decode(row[ids == 1])[20:] + b"\n")
    assert examples.stop == (96, 98)
    [prompt] = examples.prompts(1)
    assert prompt.text.endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert (decode(np.array(prompt.ids)), prompt.answer) == (prompt.text.encode(), "2")


def test_completions_count_behind_their_prompts_and_texts_as_a_whole(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json", "</s>", "<s>", start="<s> $A")
    path = write(tmp_path / "a.jsonl", COMPLETION, {"text": "xyz"})
    examples = load_examples(config(path, tokenizer=tokenizer, seq_len=16))
    decode = examples.tokenizer.decode
    rows = {answers(b, decode): b for b in (examples.batch(0), examples.validation_batch(0))}
    assert sorted(rows) == [b"cde</s>", b"xyz</s>"]
    size = (rows[b"cde</s>"]["segment_ids"] > 0).sum()
    assert decode(rows[b"cde</s>"]["inputs"][0, :size]) == b"<s>abcde"


def test_what_a_tokenizer_puts_behind_a_document_ends_an_answer_and_no_prompt(tmp_path):
    file = tmp_path / "t.json"
    tokenizer = make_tokenizer(file, "<s>", "<stop>", start="<s> $A <stop>")
    path = write(tmp_path / "a.jsonl", COMPLETION, {"prompt": "xy", "completion": "z"})
    examples = load_examples(config(path, tokenizer=tokenizer, seq_len=8))
    decode = examples.tokenizer.decode
    counted = {answers(b(0), decode) for b in (examples.batch, examples.validation_batch)}
    assert counted == {b"cde<stop>", b"z<stop>"}
    [prompt] = examples.prompts(1)
    assert decode(np.array(prompt.ids)) == b"<s>" + prompt.text.encode()
    assert examples.stop == (examples.tokenizer.end,)


def test_a_token_across_the_beginning_of_an_answer_counts():
    class Pairs(ByteTokenizer):
        def encode_spans(self, texts, start=False):
            at = [np.arange(0, len(text), 2) for text in texts]
            return [(a.astype(np.uint32), np.stack([a, a + 2], 1)) for a in at]

    from shardkit.data._encoded_examples import encode_examples
    from shardkit.data._json_lines import Example

    turns = (Turn("prompt", "abc"), Turn("completion", "def"))
    [encoded] = encode_examples([Example("a:1", turns)], Pairs(), None)
    assert encoded.counts.tolist() == [False, True, True, True]  # ab, cd, ef, end


def test_bytes_count_each_byte_of_an_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "é", "completion": "ü"}, COMPLETION)
    examples = load_examples(config(path, seq_len=16))
    decode = examples.tokenizer.decode
    rows = [answers(b, decode) for b in (examples.batch(0), examples.validation_batch(0))]
    assert sorted(rows) == [b"cde\0", "ü\0".encode()]


# --- rows


def test_packed_rows_hold_every_example_once_and_keep_them_apart(tmp_path):
    lines = [{"prompt": "p" * (i % 7), "completion": f"{i:03}"} for i in range(60)]
    path = write(tmp_path / "a.jsonl", *lines)
    options = {"seq_len": 20, "batch_size": 2, "validation_fraction": 0.2}
    packed = load_examples(config(path, packing=True, **options))
    single = load_examples(config(path, **options))
    assert packed.rows_per_epoch < single.rows_per_epoch == 48

    def read(source, make, steps):
        found = []
        for batch in map(make, range(steps)):
            for row in range(2):
                for segment in range(1, batch["segment_ids"][row].max() + 1):
                    here = batch["segment_ids"][row] == segment
                    targets, weights = batch["targets"][row][here], batch["weights"][row][here]
                    inputs = batch["inputs"][row][here]
                    assert (inputs[1:] == targets[:-1]).all()
                    text = bytes([*inputs[:1], *targets]).decode()
                    count = int(text[-4:-1]) % 7
                    assert text == "p" * count + text[-4:]
                    # The first token of an example is not predicted.
                    assert weights.tolist() == [0] * (count - 1) + [1] * (3 + (count > 0))
                    found.append(text)
                assert (batch["weights"][row][batch["segment_ids"][row] == 0] == 0).all()
        return found

    steps = -(-packed.rows_per_epoch // 2)
    epoch = read(packed, packed.batch, steps)
    held = read(packed, packed.validation_batch, packed.validation_steps)
    assert len(held) == len(set(held)) == 12
    assert len(set(epoch)) == 48
    assert not set(held) & set(epoch)
    assert set(read(single, single.validation_batch, single.validation_steps)) == set(held)
    scored = sum(packed.validation_weight(i) for i in range(packed.validation_steps))
    assert scored == packed.validation_tokens == sum(3 + (int(t[-4:-1]) % 7 > 0) for t in held)


def test_a_batch_is_a_function_of_step_and_row(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"text {i}"} for i in range(30)))
    examples = load_source(config(path, seq_len=12, batch_size=4))
    whole = examples.batch(3)
    for rows in (slice(1, 3), np.array([3, 0])):
        part = examples.batch(3, rows)
        assert all((part[name] == whole[name][rows]).all() for name in whole)
    assert (examples.batch(3)["inputs"] != examples.batch(4)["inputs"]).any()
    other = write(tmp_path / "b.jsonl", *({"text": f"text {i + 1}"} for i in range(30)))
    changed = load_source(config(other, seq_len=12, batch_size=4))
    assert examples.state(5)["crc32"] != changed.state(5)["crc32"]


def test_text_is_cut_into_parts_and_long_answers_are_left_out_and_counted(tmp_path):
    long = {"prompt": "ab", "completion": "c" * 30}
    path = write(tmp_path / "a.jsonl", {"text": "0123456789" * 2}, long, COMPLETION, COMPLETION)
    dropped = load_examples(config(path, seq_len=8, validation_fraction=0.3))
    assert [example.where for example in dropped.left_out] == ["a.jsonl:2"]
    said = dropped.describe()
    assert "1 example longer than a row dropped (first: a.jsonl:2)" in said
    parts = [e for r in (dropped.train_rows, dropped.validation_rows) for e in r.examples]
    text = [e for e in parts if e.where == "a.jsonl:1"]
    assert [bytes(e.ids.tolist()) for e in text] == [b"012345678", b"890123456", b"6789\0"]
    cut = load_examples(config(path, seq_len=8, overlong="cut", validation_fraction=0.3))
    assert "1 example longer than a row cut" in cut.describe()
    parts = [e for r in (cut.train_rows, cut.validation_rows) for e in r.examples]
    assert [bytes(e.ids.tolist()) for e in parts if e.where == "a.jsonl:2"] == [b"ab" + b"c" * 7]
    late = {"prompt": "p" * 30, "completion": "c"}
    path_of_both = write(tmp_path / "c.jsonl", long, late, COMPLETION, COMPLETION)
    both = load_examples(config(path_of_both, seq_len=8, overlong="cut")).describe()
    assert "2 examples longer than a row cut, 1 dropped whose answer begins behind it" in both
    with pytest.raises(DataError, match=r"a.jsonl:2  has 33 tokens; a row has 8 \+ 1") as error:
        load_examples(config(path, seq_len=8, overlong="error"))
    assert "Fix: --set data.seq_len=32, or --set data.overlong=drop or cut" in str(error.value)
    with pytest.raises(DataError, match="Every example is longer than a row"):
        load_examples(config(write(tmp_path / "b.jsonl", long, long), seq_len=4))


# --- bad input


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is not JSON: "),
        ("[1]", "is a list, not a JSON object"),
        ({"chat": 1}, "has the keys 'chat'; an example has messages, or prompt and completion, or"),
        ({"text": "a", "prompt": "b"}, "has the keys 'text', 'prompt'; an example has"),
        ({"text": "a", "completion": "b"}, "has the keys 'text', 'completion'; an example has"),
        ({**CHAT, "tools": [{"name": "f"}]}, "has 'tools', which no template here writes"),
        ('{"text": "a", "text": "b"}', "is not JSON: 'text' is there twice"),
        ('{"text": "\\ud800b"}', "'text' has half of a character, which UTF-8 cannot encode"),
        ({"text": ""}, "has an empty 'text', so nothing to learn"),
        ({"text": 5}, "'text' is a int, not text"),
        ({"prompt": "a"}, "'completion' is missing, not text"),
        ({"messages": []}, "has no list of messages"),
        ({"messages": [3]}, "messages[0] is not a JSON object"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages[0] has role 'tool'; known: system, user, assistant",
        ),
        ({"messages": [{"role": "user"}]}, "the content of messages[0] is missing, not text"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "has no words of the assistant, so nothing to learn",
        ),
        (
            {"messages": [*CHAT["messages"], {"role": "assistant", "content": " "}]},
            "has an empty answer, so nothing to learn",
        ),
        (
            {"messages": [*CHAT["messages"], CHAT["messages"][0]]},
            "has a system message that is not the first",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]},
            "messages[0] has 'tool_calls', which no template here writes",
        ),
    ],
)
def test_a_bad_line_is_named(line, why, tmp_path):
    path = write(tmp_path / "a.jsonl", CHAT, "", line)
    with pytest.raises(DataError) as error:
        read_examples(path)
    assert f"a.jsonl:3  {why}" in str(error.value)
    assert 'Fix: one JSON object a line: {"messages": [' in str(error.value)


def test_many_bad_lines_are_counted_and_empty_files_refused(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:10 .*\n +… +and 15 more lines like these"):
        read_examples(write(tmp_path / "a.jsonl", *["?"] * 25))
    with pytest.raises(DataError, match=r"b.jsonl  has no example"):
        read_examples(write(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="No such file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"holds no file that ends in .jsonl"):
        read_examples(tmp_path / "folder")
    (tmp_path / "c.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"c.jsonl:1  is not UTF-8"):
        read_examples(tmp_path / "c.jsonl")


def test_chats_that_do_not_fit_their_template_are_named(tmp_path):
    marks = TEMPLATES["gemma"].marks
    tokenizer = make_tokenizer(tmp_path / "t.json", "<eos>", *marks)
    mark = {"messages": [{"role": "assistant", "content": "a<end_of_turn>b"}]}
    path = write(tmp_path / "a.jsonl", CHAT, mark)
    with pytest.raises(DataError) as error:
        load_examples(config(path, tokenizer=tokenizer))
    assert "a.jsonl:1  has a system message, which template 'gemma' lacks" in str(error.value)
    assert "a.jsonl:2  has '<end_of_turn>' in a message, a mark of" in str(error.value)


def test_what_is_missing_is_said_before_anything_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", COMPLETION, COMPLETION)
    with pytest.raises(DataError, match=r"data.path  is not set\nFix: --set data.path=FILE.jsonl"):
        load_examples(DataConfig(format="json_lines"))
    with pytest.raises(DataError, match=r"or --set data.tokenizer=bytes"):
        load_examples(config(path, tokenizer=None))
    with pytest.raises(DataError, match="No example is left to train on"):
        load_examples(config(path))
    with pytest.raises(DataError, match=r"data.template=chatml  changes nothing: there is no chat"):
        load_examples(config(path, template="chatml"))
    other = write(tmp_path / "b.jsonl", COMPLETION, {"text": "b"}, {"text": "c"})
    with pytest.raises(DataError, match=r"data.batch_size=9, but the examples fill 2 rows"):
        load_examples(config(other, batch_size=9))
    with pytest.raises(DataError, match=r"which takes 256 ids; the model has model.vocab=98"):
        load_examples(config(other), 98)
    for options in ({"template": "chatml"}, {"overlong": "cut"}):
        with pytest.raises(DataError, match="changes nothing: text is no chat"):
            DataConfig(**options)
    with pytest.raises(DataError, match="changes nothing: examples are scored whole"):
        config(path, overlap=3)


def test_the_library_of_tokenizers_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    import sys

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = write(tmp_path / "a.jsonl", COMPLETION, {"text": "b"})
    with pytest.raises(DataError) as error:
        load_examples(config(path, tokenizer=str(tmp_path / "tokenizer.json")))
    assert "the library `tokenizers` is not installed" in str(error.value)
    assert "Fix: pip install 'shardkit[tokenizers]'" in str(error.value)
