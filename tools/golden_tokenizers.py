#!/usr/bin/env python3
"""Token ids of odd texts by Hugging Face tokenizers, for the tokenizers that are made of GGUF metadata and of tokenizer.json.

Writes into <out>:
  texts.json           the texts
  byte_level.json      one vocabulary of byte-level BPE, and the ids by each way of cutting texts that GGUF files name
  sentence_piece.json  two vocabularies trained by SentencePiece, as GGUF metadata has them, and their ids
  files.json           ids by tokenizer.json files of this repository
  smollm2.json         with --real: ids by the tokenizer of SmolLM2, put together from the metadata of its GGUF file

The vocabulary of byte-level BPE is trained on texts that are not cut at all. Its tokens reach over every place at which
a text could be cut, so a cut in the wrong place changes the ids. Ways of cutting are put together as the tokenizer.json
files of the families have them, not as llama.cpp's source does. Ids of SentencePiece vocabularies are those of
Hugging Face's BPE over them, and, where no special token is spelled in the text, those of SentencePiece itself.

    pip install gguf sentencepiece tokenizers
    python tools/golden_tokenizers.py --out fixtures/tokenizers --real "$(tools/real_model.sh FOLDER)"
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent
FILES = ["models/tiny/tokenizer.json", "fixtures/llama32-old-bf16/tokenizer.json"]

BOS, EOS, TURN = "<|begin|>", "<|end|>", "<|im_end|>"
STORY = (
    "Once upon a time there was a small village at the edge of a dark forest. The people who lived there told stories "
    "about wolves; nobody had seen one, but everyone was afraid."
)

TEXTS = [
    "",
    " ",
    "  ",
    "a",
    STORY,
    " leading and trailing ",
    "two  spaces,   three,    four",
    " " * 300,
    "x" + " " * 65 + "y",
    "\t",
    "\n\n\n",
    "tabs\tand\n\tlines \n  mixed\t \n",
    "windows\r\nlines\r\n\r\nand old\rones",
    "no\u00a0break\u00a0\u00a0spaces and\u2003wide\u3000ones",
    "zero\u200bwidth\u200c and \u200djoiners\u2060\ufeff",
    "\u0000\u0001\u001b[0m\u007f\u0085\u2028\u2029",
    "It's I'm you're they've he'd we'll don't",
    "IT'S I'M YOU'RE THEY'VE HE'D WE'LL DON'T 'Tis 'twas",
    "it\u2019s \u2018quoted\u2019 rock'n'roll ''''s 'S",
    "'\u017f '\u017fs it'\u017f \u212aelvin \u017ftraße",
    "'lL 'Ll 've'RE'm",
    "0 1 12 123 1234 12345 123456 1234567890123",
    "3.14159 -2.5e10 1,000,000 0x1F 10% $9.99 €5",
    "\u0661\u0662\u0663 \u096a\u096b\u096c \u00b2\u00b3 \u00bd \u2160\u2163 \u4e09\u5341",
    "naïve café résumé Ünïcödé",
    "e\u0301 n\u0303 a\u030a\u0323 decomposed, é ñ composed",
    "Z\u0351\u036b\u0343a\u0300\u0301\u0302\u0303lgo",
    "ｆｕｌｌ　ｗｉｄｔｈ ﬁ ﬂ ½",
    "数字と漢字、ひらがな。カタカナ！",
    "你好，世界。今天天气很好",
    "안녕하세요 세계",
    "สวัสดีชาวโลก ภาษาไทย",
    "नमस्ते दुनिया",
    "العربية: مرحبا بالعالم، ٣٤٥",
    "עברית שָׁלוֹם",
    "Ελληνικά ΣΊΣΥΦΟΣ ς",
    "Привет, мир! ЁЖИК",
    "İstanbul ı I i DŽ ǅ ǆ",
    "🦀👩\u200d🚀👨\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 👍🏽 🇪🇺",
    "\u2764\ufe0f \u2764 ✨🎉",
    "\U0010ffff \ue000 \ufffd \ufffe",
    "\ud7ff\ue000 \\ud83d\\ude00 &#x1F600;",
    "https://example.org/a_b/c-d?x=1&y=%20#top user@example.org",
    'fn main() { println!("{:?}", x[0]); } // ok',
    "def f(x):\n    return {\n        'a': x ** 2,\n    }\n",
    "<div class=\"a\">\n\t<p>&amp;</p>\n</div>",
    "CamelCase snake_case kebab-case SCREAMING_CASE HTTPServer iPhone",
    "...!!! ???--- ___ ~~~ === ``` /// \\\\\\",
    "path/to\\file.txt C:\\Users\\x ~/.config",
    "a" * 200,
    "ab" * 60 + "\n" * 40,
    "!" * 70 + "?" * 33,
    f"{BOS}Hello{EOS}",
    f"{BOS} spaced {EOS} ",
    f"x{TURN}\n{TURN} y",
    "<|im_start|>user\nHi<|im_end|>\n<|not_special|> <s>a</s><unk>",
    "<|begin_of_text|><|end_of_text|> <|begin|",
    "<0x0A> <0xE2> ▁ ▁▁a Ġ Ċ âĢĻ",
    "line one\n\nline three\n \n  \nline six",
    "(a)[b]{c}<d>\"e\"'f'«g»",
    "f(x)\n// y\n/* z */\r\n/// w\n/",
    "an unmerged token",
]
# A token that no merges lead to.
UNMERGED = "Ġunmerged"

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


# The expression of GPT2, for steps that follow it.
WORDS = split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def around_words(digits):
    """Llama 3's expression with three digits at most, Qwen's with one."""
    return split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# By `tokenizer.ggml.pre`: the cutter, whether texts are composed first, and whether a whole piece that is a token needs
# no merges.
WAYS = {
    "gpt-2": (GPT2, False, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False, False),
    "llama-bpe": (pre_tokenizers.Sequence([around_words(r"\p{N}{1,3}"), BYTES]), False, True),
    "smaug-bpe": (pre_tokenizers.Sequence([around_words(r"\p{N}{1,3}"), BYTES]), False, False),
    "qwen2": (pre_tokenizers.Sequence([around_words(r"\p{N}"), BYTES]), True, False),
    "tekken": (pre_tokenizers.Sequence([split(TEKKEN), BYTES]), False, True),
    "gpt-4o": (pre_tokenizers.Sequence([split(GPT4O), BYTES]), False, False),
    "deepseek-coder": (
        pre_tokenizers.Sequence(
            [
                split(r"[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split(r"[一-龥ࠀ-一가-퟿]+"),
                pre_tokenizers.Digits(individual_digits=True),
                BYTES,
            ]
        ),
        False,
        False,
    ),
    # llama.cpp's own, for files that name nothing.
    "default": (
        pre_tokenizers.Sequence(
            [split(r"[\p{P}\$\+<=>\^~\|]+"), WORDS, split(r"\p{N}+"), split("[0-9][0-9][0-9]"), BYTES]
        ),
        False,
        False,
    ),
}
ADDED = [BOS, EOS, TURN, "<|im_start|>"]


def byte_level():
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = BYTES
    trainer = trainers.BpeTrainer(
        vocab_size=1400, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    words = STORY.split()
    pairs = [f"{a} {b}\n" for a, b in zip(words, words[1:])]
    whole.train_from_iterator([text for text in TEXTS[:-1] + pairs for _ in range(2)], trainer)
    model = json.loads(whole.to_str())["model"]
    model["vocab"][UNMERGED] = len(model["vocab"])
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = model["merges"]
    ids = {}
    for name, (cutter, compose, ignore_merges) in WAYS.items():
        tokenizer = Tokenizer(
            models.BPE(
                vocab=model["vocab"], merges=[tuple(merge) for merge in merges], ignore_merges=ignore_merges
            )
        )
        tokenizer.pre_tokenizer = cutter
        if compose:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ADDED])
        ids[name] = encode(tokenizer)
    return {
        "tokens": tokens + ADDED,
        "types": [1] * len(tokens) + [3] * len(ADDED),
        "merges": [" ".join(merge) for merge in merges],
        "ids": ids,
    }


def encode(tokenizer, special=False):
    return [tokenizer.encode(text, add_special_tokens=special).ids for text in TEXTS]


def sentence_piece(prefix):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line and "\0" not in line] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=[TURN],
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = pieces.vocab_size()

    def kind(piece):
        if pieces.is_unknown(piece):
            return 2
        if pieces.is_control(piece):
            return 3
        if pieces.is_unused(piece):
            return 5
        if pieces.is_byte(piece):
            return 6
        return 4 if pieces.id_to_piece(piece) == TURN else 1

    tokens = [pieces.id_to_piece(piece) for piece in range(count)]
    scores = [pieces.get_score(piece) for piece in range(count)]
    types = [kind(piece) for piece in range(count)]
    # As transformers makes BPE of it: every way to join two pieces, by the score of what they become.
    vocab = {token: piece for piece, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, types) if kind == 1}
    ways = [
        (score, token[:at], token[at:])
        for token, score, kind in zip(tokens, scores, types)
        if kind == 1
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    ways.sort(key=lambda way: (-way[0], vocab[way[1]], vocab[way[2]]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=[way[1:] for way in ways], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ["<unk>", "<s>", "</s>"]])
    tokenizer.add_tokens([AddedToken(TURN, normalized=False)])
    ids = encode(tokenizer)
    for text, ours in zip(TEXTS, ids):
        if not any(token in text for token in ["<unk>", "<s>", "</s>", TURN, "▁"]):
            theirs = pieces.encode(text)
            assert theirs == ours, (text, pieces.encode(text, out_type=str), [tokens[i] for i in ours])
    return {"prefix": prefix, "tokens": tokens, "scores": scores, "types": types, "ids": ids}


def smollm2(path):
    import gguf

    fields = gguf.GGUFReader(path).fields
    get = lambda key: fields[f"tokenizer.ggml.{key}"].contents()
    tokens = get("tokens")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges")],
        )
    )
    tokenizer.pre_tokenizer = WAYS["smollm"][0]
    special = [token for token, kind in zip(tokens, get("token_type")) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return {"ids": encode(tokenizer)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures/tokenizers")
    parser.add_argument("--real", help="SmolLM2's GGUF file")
    args = parser.parse_args()

    def write(name, value):
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        (args.out / name).write_text(text + "\n", encoding="utf-8")

    write("texts.json", TEXTS)
    write("byte_level.json", byte_level())
    write("sentence_piece.json", [sentence_piece(True), sentence_piece(False)])
    write("files.json", {name: encode(Tokenizer.from_file(str(ROOT / name)), True) for name in FILES})
    if args.real:
        write("smollm2.json", smollm2(args.real))


if __name__ == "__main__":
    main()
