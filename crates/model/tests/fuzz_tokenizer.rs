//! `tokenizer.json` files of strangers: whatever is in them, they are read or refused. `PROPTEST_CASES` sets the number of
//! cases.

#[path = "common/allocations.rs"]
mod allocations;

use allocations::largest_allocation;
use dibit_model::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::OnceLock;

/// Bytes that no allocation for a file of some KB and a text of some hundred bytes needs.
const MOST_BYTES: usize = 64 << 20;

const TEXTS: [&str; 6] = [
    "hello hell, 12 ▁he\n\n  Hello's <s> l",
    "",
    " é\u{301}\u{0}\u{200d}🦀 数字 \u{feff}",
    "                                                                    x",
    "llllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllh",
    "<0x0A>##he[UNK]</w>",
];

/// Files of each kind that the tokenizers crate reads, with every part that models have today.
fn good() -> &'static [Value] {
    static FILES: OnceLock<Vec<Value>> = OnceLock::new();
    FILES.get_or_init(|| {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let split = json!({"type": "Split", "pattern": {"Regex": r"'s| ?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"},
            "behavior": "Isolated", "invert": false});
        let letters = |marks: [&str; 3]| {
            let all: Vec<String> = ["<unk>", "<s>"].iter().chain(&marks).map(|token| (*token).to_owned()).collect();
            let all = all.into_iter().chain("helo".chars().map(String::from));
            all.chain(["he", "ll", "hell"].map(str::to_owned)).collect::<Vec<_>>()
        };
        let ids = |tokens: &[String]| -> Value { tokens.iter().cloned().zip((0..).map(|id: u32| json!(id))).collect() };
        let merges = json!([["h", "e"], ["l", "l"], ["he", "ll"]]);
        let file = |model: Value, normalizer: Value, pre: Value, decoder: Value| {
            json!({
                "version": "1.0", "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
                "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
                "added_tokens": [
                    {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false,
                     "normalized": false, "special": true},
                    {"id": 1, "content": "<s>", "single_word": true, "lstrip": true, "rstrip": true,
                     "normalized": true, "special": false},
                ],
                "normalizer": normalizer, "pre_tokenizer": pre, "decoder": decoder, "model": model,
                "post_processor": {"type": "Sequence", "processors": [bytes, {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
                }]},
            })
        };
        let tokens = letters(["Ġ", "Ċ", "Ã"]);
        let byte_level = file(
            json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                "vocab": ids(&tokens), "merges": merges}),
            json!({"type": "NFC"}),
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, split, bytes]}),
            bytes.clone(),
        );
        let tokens = letters(["▁", "<0xC3>", "<0xA9>"]);
        let pieces = file(
            json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": ids(&tokens), "merges": ["h e", "l l", "he ll"]}),
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}),
            Value::Null,
            json!({"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        );
        let scores: Vec<_> = tokens.iter().map(|token| json!([token, -(token.len() as f64)])).collect();
        let unigram = file(
            json!({"type": "Unigram", "unk_id": 0, "vocab": scores, "byte_fallback": true}),
            json!({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"},
                {"type": "Strip", "strip_left": true, "strip_right": true},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}),
        );
        let tokens = letters(["##he", "##l", "##o"]);
        let word_piece = file(
            json!({"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": ids(&tokens)}),
            json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": true}),
            json!({"type": "BertPreTokenizer"}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        );
        vec![byte_level, pieces, unigram, word_piece]
    })
}

/// Reads a file and uses it; gives whether it is read.
fn read(bytes: &[u8]) -> bool {
    let Ok(tokenizer) = Tokenizer::parse(bytes, 1 << 20, "tokenizer.json") else { return false };
    for text in TEXTS {
        if let Ok(ids) = tokenizer.encode(text, true) {
            tokenizer.decode(&ids).ok();
        }
    }
    tokenizer.decode(&[0, 1, 5, 3, 4, 8, u32::MAX]).ok();
    let mut stream = tokenizer.stream(&[1, 2]);
    for id in [3, 4, 4, 9] {
        stream.push(&tokenizer, id).ok();
    }
    stream.finish(&tokenizer).ok();
    true
}

/// Every node of a file, by its path.
fn nodes(value: &Value, path: &str, all: &mut Vec<String>) {
    all.push(path.to_owned());
    match value {
        Value::Array(list) => list.iter().enumerate().for_each(|(i, value)| nodes(value, &format!("{path}/{i}"), all)),
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            nodes(value, &format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), all);
        }),
        _ => {}
    }
}

#[derive(Debug, Clone)]
enum Change {
    Set(Value),
    /// Puts there what stands elsewhere.
    Copy(prop::sample::Index),
    Remove,
    Repeat,
}

fn change() -> impl Strategy<Value = Change> {
    let value = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|value| json!(value)),
        (-2..20i64).prop_map(|value| json!(value)),
        any::<u64>().prop_map(|value| json!(value)),
        Just(json!(u32::MAX)),
        any::<f64>().prop_map(|value| json!(value)),
        "\\PC{0,4}".prop_map(|value| json!(value)),
        prop::sample::select(vec![
            "",
            " ",
            "▁",
            "<s>",
            "<unk>",
            "é",
            "🦀",
            "(",
            "a*",
            "(a*)*b",
            "|",
            "[^",
            "Removed",
            "MergedWithNext",
            "MergedWithPrevious",
            "Contiguous",
            "BPE",
            "Unigram",
            "WordPiece",
            "WordLevel",
            "Regex",
            "always",
            "never",
            "BPEDecoder",
            "CTC",
            "Whitespace",
            "WhitespaceSplit",
            "Punctuation",
            "UnicodeScripts",
            "Precompiled",
            "FixedLength",
            "RobertaProcessing",
            "BertProcessing",
            "NFD",
            "Nmt",
        ])
        .prop_map(|value| json!(value)),
        Just(json!([])),
        Just(json!({})),
        Just(json!({"String": ""})),
        Just(json!({"Regex": ""})),
        Just(json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        Just(json!({"type": "FixedLength", "length": 0})),
        Just(json!({"type": "CTC", "pad_token": "l", "word_delimiter_token": "|", "cleanup": true})),
        Just(json!({"type": "BPEDecoder", "suffix": "</w>"})),
    ];
    prop_oneof![
        6 => value.prop_map(Change::Set),
        2 => any::<prop::sample::Index>().prop_map(Change::Copy),
        1 => Just(Change::Remove),
        1 => Just(Change::Repeat),
    ]
}

fn apply(file: &mut Value, place: &prop::sample::Index, change: Change) {
    let mut all = Vec::new();
    nodes(file, "", &mut all);
    let path = all[place.index(all.len())].clone();
    match change {
        Change::Set(value) => *file.pointer_mut(&path).unwrap() = value,
        Change::Copy(from) => {
            let value = file.pointer(&all[from.index(all.len())]).unwrap().clone();
            *file.pointer_mut(&path).unwrap() = value;
        }
        Change::Remove | Change::Repeat => {
            let Some((parent, key)) = path.rsplit_once('/') else { return };
            match (file.pointer_mut(parent).unwrap(), change) {
                (Value::Object(map), Change::Remove) => drop(map.remove(&key.replace("~1", "/").replace("~0", "~"))),
                (Value::Array(list), Change::Remove) => drop(list.remove(key.parse().unwrap())),
                (Value::Array(list), _) => {
                    let at: usize = key.parse().unwrap();
                    list.insert(at, list[at].clone());
                }
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_files_never_panic(
        file in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), change()), 1..4),
    ) {
        let mut file = file.get(good()).clone();
        for (place, change) in changes {
            apply(&mut file, &place, change);
        }
        read(file.to_string().as_bytes());
        prop_assert!(largest_allocation() < MOST_BYTES, "{} bytes at once", largest_allocation());
    }

    #[test]
    fn changed_bytes_never_panic(
        file in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        length in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = file.get(good()).to_string().into_bytes();
        for (place, value) in changes {
            let at = place.index(bytes.len());
            bytes[at] = value;
        }
        if cut {
            bytes.truncate(length.index(bytes.len()));
        }
        read(&bytes);
        prop_assert!(largest_allocation() < MOST_BYTES, "{} bytes at once", largest_allocation());
    }
}

#[test]
fn the_files_that_are_changed_are_read() {
    for file in good() {
        assert!(read(file.to_string().as_bytes()), "{file}");
    }
}
