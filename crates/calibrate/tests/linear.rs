//! Training of the linear correction's adapters.

mod common;

use common::{Folder, Parts, bytes, dummy, make, message, one, options, parse, says, text, try_make};
use dibit_cache::CalibratedScheme;
use dibit_calibrate::{Artefact, CalibrationError, Options, Phase, RateSchedule, Recipe, Start, Text, calibrate};
use dibit_cpu::Cpu;
use dibit_model::{ModelFiles, Pretrained, WeightSource};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

const CONTEXT: usize = 300;

/// The smallest linear correction of keys per channel, with choices of other layers.
fn scheme(further: &str) -> CalibratedScheme {
    parse(&format!(
        "name = \"corrected\"\n\
         [correction]\nkind = \"linear\"\nfeatures = 32\n\
         [keys]\nbits = 2\naxis = \"channel\"\ngroup = 128\n\
         [values]\nbits = 2\naxis = \"token\"\ngroup = 128\ntransform = \"hadamard\"\n\
         [window]\ntokens = 128\nschedule = \"guaranteed\"\n{further}"
    ))
}

fn model() -> Pretrained {
    dummy(2, 1, json!({ "num_attention_heads": 4 }))
}

fn recipe() -> Recipe {
    Recipe { steps: 4, batch_tokens: 2 * CONTEXT, ..Recipe::default() }
}

fn trained(recipe: Recipe) -> Options {
    Options { recipe, ..options(CONTEXT) }
}

/// Tokens of six sequences.
fn ids() -> Vec<u32> {
    text(6 * CONTEXT, 1)
}

/// Stops when so many sequences were seen of this run; returns steps done when it began.
fn stop(pretrained: &Pretrained, scheme: &CalibratedScheme, options: &Options, after: usize) -> usize {
    let (mut first, mut seen) = (None, 0);
    let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
    let made = calibrate(&cpu, pretrained, scheme, &one(&ids()), options, |progress| {
        first.get_or_insert(progress.steps);
        seen += 1;
        if seen > after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(made.unwrap().is_none(), "it came to its end");
    first.unwrap()
}

#[test]
fn stopping_anywhere_changes_nothing() {
    let pretrained = model();
    let gated = Recipe { gate: true, schedule: RateSchedule::Plateau, start: Start::Aligned, ..recipe() };
    let plain = Recipe { gate: false, output_weight: 2.0, ..recipe() };
    for (scheme, recipe) in [(scheme(""), gated), (scheme("[sinks]\nkind = \"first\"\ncount = 4\n"), plain)] {
        let options = trained(recipe);
        let expected = bytes(&make(&pretrained, &scheme, &ids(), &options));
        for (first, second) in [(0, 0), (1, 2), (3, 1), (6, 3), (9, 1), (11, 0)] {
            let folder = Folder::new();
            let options = Options { state: Some(folder.file("x.partial")), ..options.clone() };
            assert_eq!(stop(&pretrained, &scheme, &options, first), 0);
            stop(&pretrained, &scheme, &options, second);
            assert!(bytes(&make(&pretrained, &scheme, &ids(), &options)) == expected, "{first}, {second}");
            assert_eq!(folder.names(), ["x.partial"]);
        }
    }
}

#[test]
fn a_stopped_training_goes_on_behind_its_last_step() {
    let (pretrained, scheme, folder) = (model(), scheme(""), Folder::new());
    let options = Options { state: Some(folder.file("x.partial")), ..trained(recipe()) };
    // One held-out sequence is measured before each step of two sequences.
    stop(&pretrained, &scheme, &options, 7);
    assert_eq!(stop(&pretrained, &scheme, &options, 0), 2);
    let other = Recipe { rate: 0.02, ..recipe() };
    let run = |options: &Options| try_make(&pretrained, &scheme, &ids(), options);
    says(
        run(&Options { recipe: other, ..options.clone() }),
        &["cannot go on from", "of another recipe: 4 steps", "0.02"],
    );
    says(run(&Options { held_out: 0.5, ..options.clone() }), &["of another number of held-out sequences: 1", "has 3"]);
    let mut parts = Parts::of(&std::fs::read(folder.file("x.partial")).unwrap());
    parts.remove("training.1.second");
    folder.write("x.partial", parts.bytes());
    says(run(&options), &["cannot go on from", "training.1.second is missing"]);
}

#[test]
fn nothing_depends_on_the_number_of_threads() {
    let (pretrained, scheme) = (model(), scheme(""));
    let options = trained(Recipe { steps: 2, ..recipe() });
    let of = |threads: usize| {
        let cpu = Arc::new(Cpu::new(Some(threads)).unwrap());
        let made = calibrate(&cpu, &pretrained, &scheme, &one(&ids()), &options, |_| ControlFlow::Continue(()));
        bytes(&made.unwrap().unwrap())
    };
    let expected = of(1);
    for threads in [2, 3] {
        assert!(of(threads) == expected, "{threads} threads");
    }
    let seed = Options { seed: 1, ..options.clone() };
    assert!(bytes(&make(&pretrained, &scheme, &ids(), &seed)) != expected);
}

#[test]
fn a_file_holds_adapters_and_what_was_found() {
    let (pretrained, folder) = (model(), Folder::new());
    let without = "[layers.1]\ncorrection = \"none\"\n";
    for scheme in [scheme(""), scheme(without)] {
        let made = make(&pretrained, &scheme, &ids(), &trained(recipe()));
        made.save(&folder.file("x")).unwrap();
        assert!(Artefact::load(&folder.file("x")).unwrap() == made);
        let mut attached = scheme.clone();
        Artefact::attach(&folder.file("x"), &pretrained, &mut attached).unwrap();
        assert_eq!(attached.notice(), None);
        let training = made.training.unwrap();
        assert_eq!(training.course.iter().map(|own| own.step).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        for (layer, calibration) in made.calibration.layers.iter().enumerate() {
            let Some(adapters) = &calibration.adapters else {
                assert!(layer == 1 && scheme.linear().is_some() && training.layer(1).is_none());
                continue;
            };
            assert_eq!((adapters.features, adapters.gates.len()), (32, 4));
            let (before, after) = training.layer(layer).unwrap();
            assert!(after <= before && before > 0.0);
            for (head, gate) in adapters.gates.iter().enumerate() {
                assert_eq!(*gate > 0.0, training.improves(layer, head), "layer {layer}, head {head}");
                assert!(training.before[layer][head] > 0.0 && training.after[layer][head] > 0.0);
            }
        }
    }
}

#[test]
fn damaged_figures_are_refused() {
    let (pretrained, folder) = (model(), Folder::new());
    let whole = bytes(&make(&pretrained, &scheme(""), &ids(), &trained(recipe())));
    let refuses = |change: &dyn Fn(&mut Parts), word: &str| {
        let mut parts = Parts::of(&whole);
        change(&mut parts);
        says(Artefact::load(&folder.write("x", parts.bytes())), &["not a usable calibration", word]);
    };
    refuses(&|parts| parts.remove("layers.0.divergence_after"), "other heads before training");
    refuses(&|parts| drop(parts.metadata.remove("dibit.recipe")), "it has a tensor ");
    refuses(
        &|parts| {
            let (_, shape, data) = parts.tensor("course");
            shape[0] -= 1;
            data.truncate(4 * shape[0]);
        },
        "course is cut",
    );
}

#[test]
fn what_cannot_be_trained_says_why() {
    let (pretrained, scheme) = (model(), scheme(""));
    let run = |ids: &[u32], context: usize| {
        let options = Options { context, ..trained(recipe()) };
        try_make(&pretrained, &scheme, ids, &options)
    };
    says(run(&ids(), 256), &["sequences of 256 tokens", "--context must be at least 257"]);
    says(run(&ids()[..500], CONTEXT), &["500 tokens and 598 are needed"]);
    let held_out = Text { documents: vec![ids()], held_out: vec![ids()[..100].to_vec()] };
    let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
    let options = trained(Recipe { steps: 1, ..recipe() });
    let run = |text: &Text| calibrate(&cpu, &pretrained, &scheme, text, &options, |_| ControlFlow::Continue(()));
    says(run(&held_out), &["100 tokens and 299 are needed"]);
    let far = Options { recipe: Recipe { rate: 3e38, ..recipe() }, ..options.clone() };
    let made = try_make(&pretrained, &scheme, &ids(), &far);
    assert!(matches!(made, Err(CalibrationError::Diverged { .. })));
    says(made, &["left the finite numbers at step 0", "--learning-rate"]);
}

#[test]
fn held_out_text_is_not_trained_on() {
    let (pretrained, scheme) = (model(), scheme(""));
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let options = trained(recipe());
    let run = |documents: &[u32], held_out: &[u32]| {
        let text = Text { documents: vec![documents.to_vec()], held_out: vec![held_out.to_vec()] };
        let mut sequences = 0;
        let made = calibrate(&cpu, &pretrained, &scheme, &text, &options, |progress| {
            assert_eq!(progress.phase, Phase::Training);
            sequences = progress.sequences;
            ControlFlow::Continue(())
        });
        assert_eq!(sequences, 8);
        made.unwrap().unwrap()
    };
    let [a, b] = [run(&ids(), &text(400, 7)), run(&ids(), &text(400, 8))];
    let maps = |made: &Artefact| {
        let adapters = made.calibration.layers.iter().map(|layer| layer.adapters.clone().unwrap());
        adapters.map(|own| (own.query, own.key)).collect::<Vec<_>>()
    };
    assert!(maps(&a) == maps(&b));
    assert_ne!(a.training.unwrap().before, b.training.unwrap().before);
}

#[test]
fn statistics_and_adapters_come_in_one_file() {
    let pretrained = model();
    let side = "bits = 2\naxis = \"token\"\ngroup = 128\ntransform = \"basis\"\nhigh_precision = 0.03125\n";
    let window = "[window]\ntokens = 128\nschedule = \"guaranteed\"\n";
    let correction = "[correction]\nkind = \"linear\"\nfeatures = 32\n";
    let both = parse(&format!("name = \"both\"\n{correction}[keys]\n{side}[values]\n{side}{window}"));
    let options = trained(recipe());
    let made = make(&pretrained, &both, &ids(), &options);
    for layer in &made.calibration.layers {
        assert!(layer.key_basis.is_some() && layer.value_basis.is_some() && layer.adapters.is_some());
    }
    let expected = bytes(&made);
    let folder = Folder::new();
    let options = Options { state: Some(folder.file("x.partial")), ..options };
    // Five sequences are gathered from, then one is measured.
    for after in [2, 5, 4, 3] {
        stop(&pretrained, &both, &options, after);
    }
    assert!(bytes(&make(&pretrained, &both, &ids(), &options)) == expected);
}

/// The bundled model, which was trained: its attention has something to correct.
fn bundled() -> Pretrained {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    Pretrained::load(&ModelFiles::open(&directory).unwrap(), WeightSource::Checkpoint, None).unwrap()
}

#[test]
fn training_lowers_the_divergence_of_text_it_has_not_seen() {
    let pretrained = bundled();
    let words = include_str!("../../../docs/schemes.md").to_owned() + include_str!("../../../docs/internals.md");
    let ids = pretrained.tokenizer.encode(&words, false).unwrap();
    let scheme = CalibratedScheme::load("kvlinc").unwrap();
    let recipe = Recipe { steps: 30, batch_tokens: 1024, rows: 0.25, ..Recipe::default() };
    let options = Options { recipe, held_out: 0.2, ..options(512) };
    let made = make(&pretrained, &scheme, &ids, &options);
    let training = made.training.unwrap();
    let (before, after) = training.layer(0).unwrap();
    assert!(after < 0.99 * before, "{before} {after}");
    assert!(training.before.iter().zip(&training.after).all(|(before, after)| before.len() == 6 && after.len() == 6));
    let course: Vec<f32> = training.course.iter().map(|own| own.divergence).collect();
    assert!(course.last() < course.first(), "{course:?}");
}

#[test]
fn errors_of_the_schemes_are_kept() {
    let pretrained = model();
    let error =
        try_make(&pretrained, &CalibratedScheme::load("kivi").unwrap(), &ids(), &trained(recipe())).unwrap_err();
    assert!(message(&error).contains("needs no calibration"), "{error}");
}
