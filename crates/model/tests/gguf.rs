//! GGUF files against the checkpoints that they were made of.

mod common;
mod passes;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use common::{Gguf, fixture, made_up, tiny};
use dibit_cache::{CalibratedScheme, Mode};
use dibit_cpu::Cpu;
use dibit_device::DType;
use dibit_model::{Message, Model, ModelError, ModelFiles, Pretrained, Tokenizer, WeightSource};
use std::path::Path;
use std::sync::Arc;

const TEXT: &str = "Once upon a time there was a small village at the edge of a dark forest. The people who lived there \
    told stories about 1234 wolves; nobody had seen one, but everyone was afraid.";

fn load(path: &Path, dtype: Option<DType>) -> Result<Pretrained, ModelError> {
    let files = if path.is_dir() { ModelFiles::open(path) } else { ModelFiles::open_gguf(path) };
    Pretrained::load(&files?, WeightSource::Checkpoint, dtype)
}

fn load_gguf(gguf: &Gguf, dtype: Option<DType>) -> Result<Pretrained, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    gguf.write(&path);
    load(&path, dtype)
}

/// Logits of all `ids`, fed in passes of these lengths.
fn logits(pretrained: &Pretrained, ids: &[u32], passes: &[usize]) -> Vec<Vec<f32>> {
    let (cpu, config) = (Arc::new(Cpu::new(Some(2)).unwrap()), &pretrained.config);
    let model = Model::new(&cpu, config, &pretrained.weights).unwrap();
    let layout = config.cache_layout(&CalibratedScheme::load("fp16").unwrap()).unwrap();
    passes::logits(&Arc::new(model), &layout, Mode::Streaming, ids, passes)
}

/// Mean divergence of the next-token distributions, in nats.
fn divergence(expected: &[Vec<f32>], found: &[Vec<f32>]) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
        row.iter().map(|x| f64::from(x - largest) - sum.ln()).collect()
    };
    let rows = expected
        .iter()
        .zip(found)
        .map(|(p, q)| log_softmax(p).iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
    rows.sum::<f64>() / expected.len() as f64
}

#[test]
fn plain_numbers_give_the_logits_of_the_checkpoint() {
    for name in ["llama2-linear-f16", "llama32-old-bf16", "mistral-f32", "qwen2-bias-bf16", "qwen3-hd256-bf16"] {
        let directory = fixture(name);
        let checkpoint = load(&directory, None).unwrap();
        let ids = checkpoint.tokenizer.encode(TEXT, true).unwrap();
        let expected = logits(&checkpoint, &ids, &[ids.len()]);
        let own = match name.rsplit('-').next() {
            Some("bf16") => GgmlDType::BF16,
            Some("f16") => GgmlDType::F16,
            _ => GgmlDType::F32,
        };
        for dtype in [GgmlDType::F32, own] {
            let gguf = load_gguf(&Gguf::of_checkpoint(&directory, dtype), None).unwrap();
            assert_eq!(gguf.config.num_parameters(), checkpoint.config.num_parameters(), "{name}");
            let found = logits(&gguf, &ids, &[ids.len()]);
            let differences = expected.iter().flatten().zip(found.iter().flatten()).map(|(a, b)| (a - b).abs());
            let worst = differences.fold(0f32, f32::max);
            assert!(worst < 1e-3, "{name} as {dtype:?}: {worst}");
        }
    }
}

#[test]
fn quantised_weights_cost_what_their_bits_allow() {
    let checkpoint = load(&tiny(), None).unwrap();
    let ids = checkpoint.tokenizer.encode(TEXT, true).unwrap();
    let expected = logits(&checkpoint, &ids, &[ids.len()]);
    // Only the down projections have rows of whole blocks of 256; the rest of the K files is Q8_0.
    for (dtype, most, name) in [
        (GgmlDType::Q8_0, 1e-3, "Q8_0"),
        (GgmlDType::Q4_0, 5e-2, "Q4_0"),
        (GgmlDType::Q6K, 2e-3, "Q6_K"),
        (GgmlDType::Q5K, 5e-3, "Q5_K"),
        (GgmlDType::Q4K, 1e-2, "Q4_K"),
    ] {
        let gguf = load_gguf(&Gguf::of_checkpoint(&tiny(), dtype), None).unwrap();
        let found = divergence(&expected, &logits(&gguf, &ids, &[ids.len()]));
        println!("{dtype:?}: KL {found:.5}, {}", gguf.weights.formats());
        assert!(found < most, "{dtype:?}: {found}");
        assert!(gguf.weights.formats().contains(name), "{}", gguf.weights.formats());
    }
}

#[test]
fn blocks_compute_what_their_numbers_do_and_rows_do_not_mix() {
    for dtype in [
        GgmlDType::Q8_0,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::Q8K,
    ] {
        let file = made_up(dtype);
        let blocks = load_gguf(&file, None).unwrap();
        let numbers = load_gguf(&file, Some(DType::F32)).unwrap();
        assert_eq!(numbers.weights.formats(), "f32");
        assert_eq!(
            blocks.weights.embed.block_type().unwrap().name().replace('_', ""),
            format!("{dtype:?}").replace('_', "")
        );
        let ids = blocks.tokenizer.encode(TEXT, true).unwrap();
        let ids = &ids[..80];
        let found = logits(&blocks, ids, &[80]);
        let apart = divergence(&logits(&numbers, ids, &[80]), &found);
        println!("{dtype:?}: KL {apart:.6}");
        assert!(apart < 1e-3, "{dtype:?}: {apart}");
        assert!(logits(&blocks, ids, &[1; 80]) == found, "{dtype:?}: a pass differs from its rows");
    }
}

#[test]
fn zeros_at_the_end_of_texts_are_not_read() {
    let mut file = made_up(GgmlDType::Q8_0);
    file.set("general.architecture", Value::String("qwen3\0\0".into()));
    file.set("tokenizer.ggml.model", Value::String("gpt2\0".into()));
    load_gguf(&file, None).unwrap();
}

#[test]
fn only_query_and_key_projections_of_a_llama_are_copied() {
    let gguf = load_gguf(&Gguf::of_checkpoint(&tiny(), GgmlDType::Q8_0), None).unwrap();
    let layer = &gguf.weights.layers[3];
    assert!(!layer.q.weight.is_shared() && !layer.k.weight.is_shared());
    let mlp = layer.mlp.gated().unwrap();
    for matrix in [&layer.v, &layer.o, &mlp.gate, &mlp.up, &mlp.down].map(|linear| &linear.weight) {
        assert!(matrix.is_shared());
    }
    assert!(gguf.weights.embed.is_shared() && gguf.weights.embed.same_numbers(&gguf.weights.lm_head));
    let qwen = load_gguf(&made_up(GgmlDType::Q4K), None).unwrap();
    assert!(qwen.weights.layers[0].q.weight.is_shared() && !qwen.config.tie_word_embeddings);
}

#[test]
fn the_tokenizer_is_that_of_the_checkpoint() {
    let texts = [
        TEXT,
        "",
        " ",
        "a",
        "It's 12345.678e-9, isn't it? I'LL SAY: they've",
        "naïve café, 数字と漢字, Ελληνικά, العربية, עברית, 🦀👩\u{200d}🚀",
        "  two spaces\n\n\n\tand tabs\r\nand   more \n ",
        "fn main() { println!(\"{:?}\", x); } // ÄÖÜ ß",
        "<|im_start|>user\nHello<|im_end|>\n<|end_of_text|> and <|not_special|>",
        "\u{0}\u{7f}\u{feff}\u{10ffff}",
    ];
    for directory in [tiny(), fixture("qwen2-bias-bf16"), fixture("llama32-old-bf16")] {
        let checkpoint = load(&directory, None).unwrap();
        let gguf = load_gguf(&Gguf::of_checkpoint(&directory, GgmlDType::BF16), None).unwrap();
        for text in texts {
            for special in [false, true] {
                let expected = checkpoint.tokenizer.encode(text, special).unwrap();
                assert_eq!(gguf.tokenizer.encode(text, special).unwrap(), expected, "{text:?}");
                let decoded = checkpoint.tokenizer.decode(&expected).unwrap();
                assert_eq!(gguf.tokenizer.decode(&expected).unwrap(), decoded, "{text:?}");
            }
        }
    }
}

#[test]
fn the_chat_template_and_the_ends_of_a_text_come_along() {
    let mut file = Gguf::of_checkpoint(&tiny(), GgmlDType::BF16);
    file.set("tokenizer.ggml.eot_token_id", Value::U32(4));
    let gguf = load_gguf(&file, None).unwrap();
    assert_eq!((&gguf.stop_token_ids[..], gguf.config.bos_token_id), (&[1, 4][..], Some(0)));
    let chat = [Message { role: "user".into(), content: "Hi".into() }];
    let render =
        |pretrained: &Pretrained| pretrained.chat_template(None).unwrap().unwrap().render(&chat, true).unwrap();
    assert_eq!(render(&gguf), render(&load(&tiny(), None).unwrap()));
}

#[test]
fn other_ways_to_cut_texts_are_known_or_refused_by_name() {
    let ids = |pre: &str, text: &str| {
        let mut file = made_up(GgmlDType::Q8_0);
        file.set("tokenizer.ggml.pre", Value::String(pre.into()));
        load_gguf(&file, None).map(|gguf| gguf.tokenizer.encode(text, false).unwrap())
    };
    for pre in ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"] {
        assert!(!ids(pre, TEXT).unwrap().is_empty(), "{pre}");
    }
    let message = ids("bloom", TEXT).err().unwrap().to_string();
    assert!(message.contains("'bloom' is not supported; supported: default, gpt-2"), "{message}");
}

/// A vocabulary of SentencePiece: `<unk>`, BOS, EOS, all bytes, and some pieces.
fn sentence_piece(prefix: bool) -> Gguf {
    let mut file = made_up(GgmlDType::Q8_0);
    let mut tokens: Vec<(String, f32, i32)> =
        vec![("<unk>".into(), 0.0, 2), ("<s>".into(), 0.0, 3), ("</s>".into(), 0.0, 3)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
    let pieces = ["he", "ll", "▁w", "or", "hell", "▁wor", "▁▁", "ld", "hello", "▁world", "▁hello"];
    tokens.extend(pieces.iter().enumerate().map(|(rank, piece)| ((*piece).to_owned(), -(rank as f32), 1)));
    tokens.extend("▁helowrd".chars().map(|piece| (piece.to_string(), -1000.0, 1)));
    while tokens.len() < 384 {
        tokens.push((format!("<unused{}>", tokens.len()), 0.0, 5));
    }
    file.set("tokenizer.ggml.tokens", Value::Array(tokens.iter().map(|t| Value::String(t.0.clone())).collect()));
    file.set("tokenizer.ggml.scores", Value::Array(tokens.iter().map(|t| Value::F32(t.1)).collect()));
    file.set("tokenizer.ggml.token_type", Value::Array(tokens.iter().map(|t| Value::I32(t.2)).collect()));
    file.set("tokenizer.ggml.model", Value::String("llama".into()));
    file.set("tokenizer.ggml.pre", Value::String("default".into()));
    file.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    file.set("tokenizer.ggml.unknown_token_id", Value::U32(0));
    file.set("tokenizer.ggml.add_space_prefix", Value::Bool(prefix));
    file.metadata.remove("tokenizer.ggml.merges");
    file.metadata.remove("tokenizer.ggml.add_bos_token");
    file
}

#[test]
fn sentence_pieces_are_joined_by_their_scores() {
    let piece = |rank: u32| 259 + rank;
    let letter = |letter: char| 259 + 11 + "▁helowrd".chars().position(|c| c == letter).unwrap() as u32;
    let tokenizer = load_gguf(&sentence_piece(true), None).unwrap().tokenizer;
    // BOS is put before a text where the file does not say otherwise; the space comes with the first word.
    assert_eq!(tokenizer.encode("hello world", true).unwrap(), [1, piece(10), piece(9)]);
    // The best score goes first: two spaces before a word are one piece, so the word has none.
    assert_eq!(tokenizer.encode(" w", false).unwrap(), [letter('▁'), piece(2)]);
    assert_eq!(tokenizer.encode("hell</s>", false).unwrap(), [letter('▁'), piece(4), 2]);
    // What is not in the vocabulary is spelled in bytes.
    assert_eq!(tokenizer.encode("é", false).unwrap(), [letter('▁'), 3 + 0xc3, 3 + 0xa9]);
    for text in ["hello world", "  hello", "é 🦀 wor\nld", ""] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, true).unwrap()).unwrap(), text);
    }
    let tokenizer = load_gguf(&sentence_piece(false), None).unwrap().tokenizer;
    assert_eq!(tokenizer.encode("hello world", false).unwrap(), [piece(8), piece(9)]);
    assert_eq!(tokenizer.decode(&[piece(9), piece(10)]).unwrap(), " world hello");
}

#[test]
fn control_tokens_of_phi3_take_the_spaces_behind_them_along() {
    let ids = |file: Gguf, text: &str| {
        let files = ModelFiles::from_gguf(Arc::new(file.bytes()), "model.gguf").unwrap();
        Tokenizer::parse(&files.tokenizer.unwrap(), 384, "m").unwrap().encode(text, false).unwrap()
    };
    let phi3 = |text: &str| ids(sentence_piece(true).named("phi3"), text);
    assert_eq!(phi3("</s>\n hello"), phi3("</s>hello"));
    assert_ne!(phi3("<s> hello"), phi3("<s>hello"));
    assert_ne!(ids(sentence_piece(true), "</s> hello"), ids(sentence_piece(true), "</s>hello"));
}
