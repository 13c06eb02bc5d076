"""Text to ids and back, compared with the two libraries; whole characters while streaming."""

import json
import random

import pytest
import sentencepiece
import tokenizers

from tiny_vocab import byte_fallback_json, byte_level_json, sentencepiece_model
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.tokenizer import IncrementalDecoder, Tokenizer

TEXTS = [
    "",
    " ",
    "the cat",
    " the  cat ",
    "Hello world,\n\n\thello",
    "naïve café — 日本語 🙂🇪🇺 e\u0301 \u200b\ufeff",
    "a\x00b\x7f\u2581c <0xE2> <tab ü>",
    "x" * 300 + "\r\n",
    "<|im_end|> </s> <s>",
]
KINDS = ["byte_level", "byte_fallback", "sentencepiece"]


def make(kind, *, bos_id=None, **config):
    config.setdefault("add_bos_token", False)
    files = {
        "byte_level": {"tokenizer.json": byte_level_json()},
        "byte_fallback": {"tokenizer.json": byte_fallback_json()},
        "sentencepiece": {"tokenizer.model": sentencepiece_model()},
    }[kind]
    settings = json.dumps(config).encode()
    return Tokenizer({**files, "tokenizer_config.json": settings}, bos_id=bos_id)


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_as_plain_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert not tokenizer.special_ids.intersection(ids)
    mark_is_space = tokenizer.drops_first_space
    assert tokenizer.decode(ids) == (text.replace("\u2581", " ") if mark_is_space else text)


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_as_the_libraries(text):
    ours = make("byte_level").encode(text)
    theirs = tokenizers.Tokenizer.from_buffer(byte_level_json())
    assert ours == theirs.encode(text).ids
    assert make("byte_level").decode(ours) == theirs.decode(ours)
    plain = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ours = make("sentencepiece").encode(text, parse_special=False)
    assert ours == plain.encode(text)
    assert make("sentencepiece").decode(ours) == plain.decode(ours)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_splits_at_marks_as_tokenizers_does(legacy):
    state = json.loads(byte_fallback_json())
    if not legacy:
        state["normalizer"] = None
        state["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }
    theirs = tokenizers.Tokenizer.from_str(json.dumps(state))
    ours = make("sentencepiece", legacy=legacy)
    for text in ("the cat</s>the mat", "<s>the cat</s> the", "</s></s>", "hello<s>"):
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_stream_to_the_same_text_in_whole_characters(kind):
    tokenizer = make(kind)
    source = random.Random(kind)
    for _ in range(50):
        ids = [source.randrange(tokenizer.vocab_size) for _ in range(40)]
        data = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids)
        if tokenizer.drops_first_space:
            data = data.removeprefix(b" ")
        assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["é", "日本", "🙂", "a🙂b", "👩‍👩‍👧"])
def test_half_a_character_is_never_shown(tokenizer, text):
    decoder = IncrementalDecoder(tokenizer, trim_space=True)
    shown = ""
    for token_id in tokenizer.encode(text, add_special=False):
        part = decoder.push(token_id)
        assert "\ufffd" not in part
        shown += part
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_a_tail_that_stays_broken_becomes_one_replacement_character(tokenizer):
    ids = tokenizer.encode("a🙂", add_special=False)
    assert tokenizer.decode(ids[:-1]) == "a\ufffd"
    decoder = IncrementalDecoder(tokenizer, trim_space=True)
    assert "".join(decoder.push(i) for i in ids[:-1]) == "a"
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_broken_bytes_do_not_hold_back_what_follows(tokenizer):
    broken = tokenizer.encode("é", add_special=False)[-2:-1]
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push(broken[0]) == ""
    follows = tokenizer.encode("x", add_special=False)[-1]
    assert decoder.push(follows).startswith("\ufffd")


@pytest.mark.parametrize("kind", ["byte_fallback", "sentencepiece"])
def test_the_first_space_belongs_to_a_text_only_where_it_continues_one(kind):
    tokenizer = make(kind)
    ids = tokenizer.encode("the cat")
    alone = IncrementalDecoder(tokenizer, trim_space=True)
    assert "".join(map(alone.push, ids)) == "the cat"
    continuing = IncrementalDecoder(tokenizer)
    assert "".join(map(continuing.push, ids)) == " the cat"
    spaced = tokenizer.encode("  the")
    assert tokenizer.decode(spaced) == "  the"


def test_byte_level_keeps_its_first_space():
    tokenizer = make("byte_level")
    assert not tokenizer.drops_first_space
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_special_tokens_are_parsed_only_when_asked_and_hidden_unless_asked():
    tokenizer = make("byte_level")
    end = tokenizer.id_of("<|im_end|>")
    assert tokenizer.encode("the<|im_end|>").count(end) == 1
    assert end not in tokenizer.encode("the<|im_end|>", parse_special=False)
    ids = tokenizer.encode("the<|im_end|>")
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special=False) == "the<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("<tab ü>")) == "<tab ü>"
    assert tokenizer.piece(end) == "<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_bos_once(kind):
    bos = {"byte_level": "<|im_start|>"}.get(kind, "<s>")
    with_bos = make(kind, add_bos_token=True, bos_token={"content": bos})
    ids = with_bos.encode("the")
    assert ids[0] == with_bos.bos_id
    assert ids.count(with_bos.bos_id) == 1
    assert with_bos.encode(f"{bos}the").count(with_bos.bos_id) == 1
    assert with_bos.encode("the", add_special=False) == ids[1:]
    assert with_bos.encode("") == [with_bos.bos_id]
    without = make(kind, add_bos_token=False, bos_token=bos)
    assert without.encode("the") == ids[1:]


def test_bos_by_the_rule_inside_tokenizer_json():
    data = byte_level_json(bos=True)
    by_rule = Tokenizer({"tokenizer.json": data}, bos_id=1)
    assert by_rule.bos_token == "<|im_start|>"
    ids = by_rule.encode("the")
    assert ids[0] == 1
    assert by_rule.encode("<|im_start|>the") == ids
    off = Tokenizer({"tokenizer.json": data, "tokenizer_config.json": b'{"add_bos_token": false}'})
    assert off.encode("the") == ids[1:]


def test_a_rule_of_the_file_never_adds_bos_twice():
    for bos_id in (None, 1):
        tokenizer = Tokenizer({"tokenizer.json": byte_level_json(bos=True)}, bos_id=bos_id)
        assert tokenizer.bos_id == 1
        ids = tokenizer.encode("<|im_start|>the")
        assert ids == tokenizer.encode("the")
        assert ids.count(1) == 1
        assert tokenizer.encode("the", add_special=False) == ids[1:]


def test_the_end_token_of_a_rule_is_left_out():
    library = tokenizers.Tokenizer.from_buffer(byte_level_json())
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|end|>",
        special_tokens=[("<|im_start|>", 1), ("<|end|>", 0)],
    )
    assert library.encode("the").ids[-1] == 0
    tokenizer = Tokenizer({"tokenizer.json": library.to_str().encode()})
    assert tokenizer.encode("the") == library.encode("the").ids[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_decide_what_bos_is(kind):
    bos = {"byte_level": "<|im_start|>"}.get(kind, "<s>")
    tokenizer = make(kind, bos_token=bos, add_bos_token=True, bos_id=2)
    assert tokenizer.bos_id == tokenizer.id_of(bos) == 1
    assert tokenizer.encode("the")[0] == 1
    tokenizer = make(kind, add_bos_token=True, bos_id=2)
    assert (tokenizer.bos_id, tokenizer.encode("the")[0]) == (2, 2)
    assert tokenizer.bos_token == tokenizer.piece(2)


def test_a_rule_with_a_token_that_is_not_there_is_one_error():
    state = json.loads(byte_level_json(bos=True))
    state["post_processor"]["special_tokens"] = {}
    with pytest.raises(ModelFileError, match=r"tokenizer\.json cannot be"):
        Tokenizer({"tokenizer.json": json.dumps(state).encode()})


def test_sentencepiece_adds_bos_unless_told_not_to():
    tokenizer = Tokenizer({"tokenizer.model": sentencepiece_model()}, bos_id=1)
    assert tokenizer.encode("the")[0] == 1


def test_added_tokens_beyond_a_sentencepiece_vocabulary():
    n = make("sentencepiece").vocab_size
    added = {str(n + 2): {"content": "<|im_end|>", "special": True}}
    tokenizer = make("sentencepiece", added_tokens_decoder=added)
    assert tokenizer.vocab_size == n + 3
    assert n + 2 in tokenizer.encode("the<|im_end|>")
    assert tokenizer.id_of("<|im_end|>") == n + 2
    assert tokenizer.decode([n + 2]) == ""
    assert tokenizer.decode([n + 2], skip_special=False) == "<|im_end|>"


def test_ids_outside_the_vocabulary_have_no_text(tokenizer):
    for token_id in (-1, tokenizer.vocab_size, 10**6):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.piece(token_id) is None
    assert tokenizer.id_of("no such token") is None


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(TmacError, match=r"character 1 is U\+D83D"):
        tokenizer.encode("a\ud83d")


def test_truncation_and_padding_in_the_file_are_ignored():
    source = tokenizers.Tokenizer.from_buffer(byte_level_json())
    source.enable_truncation(2)
    source.enable_padding(length=64)
    tokenizer = Tokenizer({"tokenizer.json": source.to_str().encode()})
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


@pytest.mark.parametrize(
    ("files", "error", "text"),
    [
        ({}, ModelFileError, "no tokenizer"),
        ({"tokenizer.json": b"{"}, ModelFileError, "tokenizer.json cannot be read"),
        ({"tokenizer.model": b"junk"}, ModelFileError, "tokenizer.model cannot be read"),
        ({"tokenizer_config.json": b"["}, ModelFileError, "not JSON"),
        ({"tokenizer_config.json": b"[]"}, ModelFileError, "must hold an object"),
    ],
)
def test_files_that_cannot_be_used(files, error, text):
    with pytest.raises(error, match=text):
        Tokenizer(files)


def test_a_vocabulary_of_another_kind_is_refused():
    state = json.loads(byte_level_json())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UnsupportedError, match="WordPiece"):
        Tokenizer({"tokenizer.json": json.dumps(state).encode()})
