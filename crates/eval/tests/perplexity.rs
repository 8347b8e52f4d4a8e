//! The evaluation on checkpoints: against independent figures, and against itself.

use dibit_cache::CalibratedScheme;
use dibit_cpu::Cpu;
use dibit_device::{DType, Tensor};
use dibit_eval::{EvalError, Perplexity, PerplexityOptions, perplexity};
use dibit_model::{ModelFiles, Pretrained, WeightSource, windows};
use dibit_runner::Prefill;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn load(directory: &Path) -> Pretrained {
    Pretrained::load(&ModelFiles::open(directory).unwrap(), WeightSource::Checkpoint, Some(DType::F32)).unwrap()
}

fn streaming(context: usize) -> Vec<Prefill> {
    vec![Prefill::streaming(context)]
}

fn run(model: &Pretrained, schemes: &[&str], ids: &[u32], context: usize, windows: usize) -> Perplexity {
    let cpu = Arc::new(Cpu::new(None).unwrap());
    let load = |name: &&str| match *name {
        "rotated-per-channel" => CalibratedScheme::parse(ROTATED_PER_CHANNEL, name).unwrap(),
        name => CalibratedScheme::load(name).unwrap(),
    };
    let schemes: Vec<CalibratedScheme> = schemes.iter().map(load).collect();
    let options = PerplexityOptions { context, windows: Some(windows), prefills: streaming(context) };
    perplexity(&cpu, model, &schemes, ids, options, |_| ControlFlow::Continue(())).unwrap().unwrap()
}

/// Figures of an independent implementation on WikiText-2: 4 windows of 2048 tokens, float32.
struct Anchor {
    model: &'static str,
    fp16: f64,
    /// Scheme, perplexity, KL divergence: KIVI, rotated values; then rotated keys, per token and per channel.
    schemes: [(&'static str, f64, f64); 4],
}

/// Q_C(KH), Q_T(VH): keys rotated, and quantised per channel all the same.
const ROTATED_PER_CHANNEL: &str = "name = \"rotated-per-channel\"\n[keys]\nbits = 2\ntransform = \"hadamard\"\n[values]\n\
    bits = 2\ntransform = \"hadamard\"\n[window]\ntokens = 128\nschedule = \"guaranteed\"\n";

const ANCHORS: [Anchor; 2] = [
    Anchor {
        model: "ref-llama-16m",
        fp16: 102.2,
        schemes: [
            ("kivi", 109.0, 0.0577),
            ("kvlinc", 108.2, 0.0574),
            ("quarot", 211.5, 0.671),
            ("rotated-per-channel", 138.7, 0.289),
        ],
    },
    Anchor {
        model: "ref-qwen3-59m",
        fp16: 75.81,
        schemes: [
            ("kivi", 77.42, 0.0214),
            ("kvlinc", 77.47, 0.0208),
            ("quarot", 146.7, 0.661),
            ("rotated-per-channel", 123.0, 0.475),
        ],
    },
];

#[test]
fn figures_of_the_reference_models_are_those_of_an_independent_implementation() {
    let shared = repository().join("../shared");
    let Ok(text) = std::fs::read_to_string(shared.join("data/wikitext2/wiki.test.raw")) else {
        std::io::stderr().write_all(b"skipped: the reference models and WikiText-2 are not here\n").unwrap();
        return;
    };
    for anchor in ANCHORS {
        let model = load(&shared.join("models").join(anchor.model));
        let ids = model.tokenizer.encode(&text, false).unwrap();
        let report = run(&model, &anchor.schemes.map(|(name, ..)| name), &ids, 2048, 4);
        let near = |got: f64, expected: f64, share: f64| (got - expected).abs() < share * expected;
        assert!(
            near(report.schemes[0].perplexity, anchor.fp16, 0.005),
            "{}: {:.2}",
            anchor.model,
            report.schemes[0].perplexity
        );
        for (result, (name, perplexity, kl)) in report.schemes[1..].iter().zip(anchor.schemes) {
            println!("{} {name}: {:.2}, {:.4}", anchor.model, result.perplexity, result.kl_mean);
            // With rotated keys the models are damaged so much that rounding one projection to bf16 moves perplexity by
            // 1.6 % and KL by 2 %; the independent figures have keys in f32, where the cache has fp16.
            let (perplexity_share, kl_share) = if kl > 0.1 { (0.02, 0.05) } else { (0.005, 0.1) };
            let found = (result.perplexity, result.kl_mean);
            assert!(near(found.0, perplexity, perplexity_share), "{} {name}: {found:?}", anchor.model);
            assert!(near(found.1, kl, kl_share), "{} {name}: {found:?}", anchor.model);
        }
        // Observations 2 and 3 of KVLinC, section 3.1: keys per token fail even when rotated, and keys per channel are
        // better as they are than rotated.
        let kl: Vec<f64> = report.schemes[1..].iter().map(|result| result.kl_mean).collect();
        let ([_, raw_per_channel], [rotated_per_token, rotated_per_channel]) = ([kl[0], kl[1]], [kl[2], kl[3]]);
        assert!(rotated_per_token > 1.2 * rotated_per_channel, "{}: {kl:?}", anchor.model);
        assert!(rotated_per_channel > 4.0 * raw_per_channel, "{}: {kl:?}", anchor.model);
    }
}

#[test]
fn the_reference_comes_first_and_is_added_where_it_is_missing() {
    let model = load(&repository().join("fixtures/qwen2-bias-bf16"));
    let ids: Vec<u32> = (0..1500u32).map(|i| 5 + i * i % 379).collect();
    let report = run(&model, &["kvlinc", "fp16", "kivi-paper"], &ids, 400, 2);
    let names: Vec<&str> = report.schemes.iter().map(|s| s.scheme.as_str()).collect();
    assert_eq!(names, ["fp16", "kvlinc", "kivi-paper"]);
    assert_eq!((report.windows, report.tokens), (2, 2 * 399));
    let [reference, packed, paper] = &report.schemes[..] else { panic!("three schemes") };
    assert_eq!((reference.kl_mean, reference.kl_p999, reference.top1_agreement, reference.bits), (0.0, 0.0, 1.0, 16.0));
    assert!(packed.kl_mean > 0.0 && packed.kl_p999 >= packed.kl_mean && packed.top1_agreement < 1.0);
    // 128 tokens packed of 400 under one schedule, 384 keys and 272 values under the other.
    assert!(packed.bits > paper.bits && paper.bits < 16.0);
    for result in &report.schemes {
        assert_eq!((result.nll.len(), result.kl.len()), (report.tokens, report.tokens));
        let mean = result.nll.iter().map(|&x| f64::from(x)).sum::<f64>() / report.tokens as f64;
        assert!((mean.exp() / result.perplexity - 1.0).abs() < 1e-9);
    }
    // Nothing is packed in the first 256 positions: up to the window's rounding to fp16 they are exact.
    assert!(packed.kl[..256].iter().all(|&kl| kl < 1e-4), "a window that is not full changed the model");
    assert!(packed.kl[256..].iter().any(|&kl| kl > 1e-3));
}

#[test]
fn each_way_of_reading_is_what_it_is_alone() {
    let model = load(&repository().join("fixtures/qwen2-bias-bf16"));
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let ids: Vec<u32> = (0..1500u32).map(|i| 5 + i * i % 379).collect();
    let schemes = ["kivi", "f16", "kvlinc-rotation"].map(|name| CalibratedScheme::load(name).unwrap());
    let read = |prefills: &[Prefill]| {
        let options = PerplexityOptions { context: 700, windows: Some(2), prefills: prefills.to_vec() };
        let mut asked = (0, 0);
        let progress = |own: dibit_eval::Progress| {
            asked = (asked.0 + 1, own.passes);
            ControlFlow::Continue(())
        };
        let report = perplexity(&cpu, &model, &schemes, &ids, options, progress).unwrap().unwrap();
        assert_eq!(asked.0, asked.1, "passes that were told before");
        report.schemes
    };
    let ways = [Prefill::streaming(700), Prefill::Cells(256), Prefill::Cells(128), Prefill::Exact];
    let all = read(&ways);
    // Where nothing is packed, all ways are one.
    let names: Vec<&str> = all.iter().map(|own| own.scheme.as_str()).collect();
    let [kivi, rotated] = ["kivi", "kvlinc-rotation"].map(|name| [name; 4]);
    assert_eq!(names, [&["fp16"][..], &kivi, &["f16"], &rotated].concat());
    for (index, way) in ways.iter().enumerate() {
        let alone = read(&[*way]);
        assert_eq!((&alone[1], &alone[3]), (&all[1 + index], &all[6 + index]), "{way}");
        assert_eq!(all[1 + index].bits, all[1].bits);
    }
    // The first cell is read exactly, whatever its size.
    assert!(all[2..5].iter().all(|own| own.nll[..128] == all[0].nll[..128]));
    let kl: Vec<f64> = all[1..5].iter().map(|own| own.kl_mean).collect();
    assert!(kl[3] == 0.0 && kl[1] > 0.0 && kl[1] < kl[2] && kl[1] < kl[0], "{kl:?}");
    // The first tokens of a cell see what is packed, its last ones too.
    assert!(all[2].kl[..256].iter().all(|kl| *kl == 0.0) && all[2].kl[512] > 0.0);
}

#[test]
fn texts_and_windows_that_do_not_suit_are_refused() {
    let model = load(&repository().join("fixtures/llama32-old-bf16"));
    let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
    let run = |ids: &[u32], context| {
        perplexity(
            &cpu,
            &model,
            &[],
            ids,
            PerplexityOptions { context, windows: None, prefills: streaming(context) },
            |_| ControlFlow::Continue(()),
        )
        .unwrap_err()
    };
    assert!(matches!(run(&[5; 10], 100), EvalError::TextTooShort { tokens: 10, needed: 99 }));
    for context in [0, 1, 1025] {
        assert!(matches!(run(&[5; 2000], context), EvalError::Context { limit: 1024, .. }));
    }
    assert_eq!(windows(&[7; 200], Some(0), 101, None).len(), 2);
}

#[test]
fn damaged_weights_are_no_agreement() {
    let mut model = load(&repository().join("fixtures/llama32-old-bf16"));
    let width = model.config.hidden_size;
    model.weights.norm = Tensor::from_f32(vec![f32::NAN; width], DType::F32, 1, width);
    let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
    let options = PerplexityOptions { context: 50, windows: Some(1), prefills: streaming(50) };
    let error = perplexity(&cpu, &model, &[], &[7; 100], options, |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, EvalError::NotFinite { .. }), "{error}");
}
