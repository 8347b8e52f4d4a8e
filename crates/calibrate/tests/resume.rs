//! Calibrations that were stopped, and the state that they go on from.

mod common;

use common::{
    Folder, Parts, both, bytes, dummy, make, message, one, options, parse, resq, rotatekv, says, text, try_make,
};
use dibit_cache::CalibratedScheme;
use dibit_calibrate::{Artefact, CalibrationError, Options, calibrate};
use dibit_cpu::Cpu;
use dibit_model::Pretrained;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

const CONTEXT: usize = 20;

/// Stops before the sequence `at`; returns how many sequences were done when the run began.
fn stop(pretrained: &Pretrained, scheme: &CalibratedScheme, ids: &[u32], options: &Options, at: usize) -> usize {
    let mut first = None;
    let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
    let made = calibrate(&cpu, pretrained, scheme, &one(ids), options, |progress| {
        first.get_or_insert(progress.done);
        if progress.done == at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(made.unwrap(), None);
    first.unwrap()
}

/// The state after 2 of 5 sequences.
struct Stopped {
    folder: Folder,
    pretrained: Pretrained,
    scheme: CalibratedScheme,
    ids: Vec<u32>,
    options: Options,
}

impl Stopped {
    fn new(scheme: &str) -> Self {
        let folder = Folder::new();
        let options = Options { state: Some(folder.file("x.partial")), ..options(CONTEXT) };
        let (pretrained, scheme) = (dummy(2, 1, json!({})), parse(scheme));
        let ids = text(100, 1);
        stop(&pretrained, &scheme, &ids, &options, 2);
        Stopped { folder, pretrained, scheme, ids, options }
    }

    fn path(&self) -> &Path {
        self.options.state.as_deref().unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    fn go_on(&self) -> Result<Artefact, CalibrationError> {
        try_make(&self.pretrained, &self.scheme, &self.ids, &self.options)
    }

    /// The state is refused with these words, and left as it is.
    #[track_caller]
    fn refuses(&self, words: &[&str]) {
        let before = self.bytes();
        let path = self.path().to_str().unwrap();
        says(self.go_on(), &[words, &["cannot go on from", path, "delete it to begin again"]].concat());
        assert_eq!(self.bytes(), before);
        assert_eq!(self.folder.names(), ["x.partial"]);
    }
}

#[test]
fn stopping_anywhere_changes_nothing() {
    let ids = text(100, 1);
    for scheme in [rotatekv(2, "global", "magnitude"), resq(2), both()] {
        let (pretrained, scheme) = (dummy(3, 1, json!({})), parse(&scheme));
        let expected = bytes(&make(&pretrained, &scheme, &ids, &options(CONTEXT)));
        for first in 0..5 {
            for second in first..5 {
                let folder = Folder::new();
                let options = Options { state: Some(folder.file("x.partial")), ..options(CONTEXT) };
                assert_eq!(stop(&pretrained, &scheme, &ids, &options, first), 0);
                assert_eq!(stop(&pretrained, &scheme, &ids, &options, second), first);
                let made = make(&pretrained, &scheme, &ids, &options);
                assert!(bytes(&made) == expected, "stopped before sequences {first} and {second}");
                assert_eq!(folder.names(), ["x.partial"]);
            }
        }
    }
}

#[test]
fn what_was_gathered_is_used_and_not_gathered_again() {
    // Without the text's own keys, the sums are those of the state alone.
    let stopped = Stopped::new(&rotatekv(2, "local", "mean"));
    let mut parts = Parts::of(&stopped.bytes());
    let mut state: Value = serde_json::from_str(&parts.metadata["dibit.state"]).unwrap();
    assert_eq!(state["done"], 2);
    state["done"] = json!(5);
    parts.metadata.insert("dibit.state".into(), state.to_string());
    for layer in 0..2 {
        let descending = (0..128).flat_map(|channel| f64::from(-channel).to_le_bytes()).collect();
        *parts.tensor(&format!("layers.{layer}.channels")).2 = descending;
    }
    std::fs::write(stopped.path(), parts.bytes()).unwrap();
    for layer in stopped.go_on().unwrap().calibration.layers {
        assert!(layer.permutation.unwrap().into_iter().eq((0..128).rev()));
    }
}

#[test]
fn the_state_of_another_calibration_is_refused() {
    let stopped = Stopped::new(&both());
    let of = |change: &dyn Fn(&mut Stopped), words: &[&str]| {
        let mut other = Stopped::new(&both());
        change(&mut other);
        other.refuses(words);
    };
    of(&|run| run.ids = text(100, 2), &["of another text: "]);
    of(&|run| run.ids[94] += 1, &["of another text: "]);
    of(&|run| run.options.seed = 7, &["of another seed: 0, and this run has 7"]);
    of(&|run| run.options.context = 25, &["of another number of tokens of a sequence: 20, and this run has 25"]);
    of(&|run| run.options.tokens = Some(80), &["of another number of sequences: 5, and this run has 4"]);
    of(&|run| run.pretrained = dummy(2, 2, json!({})), &["of another model: "]);
    let scheme = |change: [&'static str; 2]| {
        move |run: &mut Stopped| run.scheme = parse(&both().replacen(change[0], change[1], 1))
    };
    of(&scheme(["local", "global"]), &["of another quantiser of keys: 2 bit per token, ", "reordered globally"]);
    of(&scheme(["0.03125", "0.125"]), &["of another quantiser of values: ", "12.5 % of channels"]);
    // What no window reads may differ.
    let mut longer = Stopped::new(&both());
    longer.ids.pop();
    longer.ids.extend([9, 9, 9]);
    assert_eq!(bytes(&longer.go_on().unwrap()), bytes(&stopped.go_on().unwrap()));
}

#[test]
fn a_damaged_state_is_refused() {
    let stopped = Stopped::new(&both());
    let whole = stopped.bytes();
    let refuses = |bytes: &[u8], words: &[&str]| {
        std::fs::write(stopped.path(), bytes).unwrap();
        stopped.refuses(words);
    };
    for len in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        refuses(&whole[..len], &[]);
    }
    let changed = |change: &dyn Fn(&mut Parts)| {
        let mut parts = Parts::of(&whole);
        change(&mut parts);
        parts.bytes()
    };
    refuses(&changed(&|parts| parts.remove("layers.1.values")), &["layers.1.values is missing"]);
    refuses(&changed(&|parts| parts.remove("layers.0.channels")), &["layers.0.channels is missing"]);
    refuses(&changed(&|parts| *parts.tensor("layers.0.values").0 = Dtype::I64), &["layers.0.values is of type I64"]);
    let shorter = changed(&|parts| {
        let (_, shape, data) = parts.tensor("layers.0.channels");
        shape[0] -= 1;
        data.truncate(8 * shape[0]);
    });
    refuses(&shorter, &["layers.0.channels is missing"]);
    for number in [f64::NAN, f64::INFINITY] {
        let broken = changed(&|parts| parts.tensor("layers.1.channels").2[..8].copy_from_slice(&number.to_le_bytes()));
        refuses(&broken, &["not finite"]);
    }
    let state = |text: &str| changed(&|parts| drop(parts.metadata.insert("dibit.state".into(), text.to_owned())));
    let own = Parts::of(&whole).metadata["dibit.state"].clone();
    refuses(&state(&own.replace("\"done\":2", "\"done\":6")), &["more sequences than the text"]);
    refuses(&state(&own.replace("\"done\":2", "\"done\":-2")), &["not the state of a calibration"]);
    refuses(&state("{}"), &["not the state of a calibration"]);
    refuses(&changed(&|parts| parts.metadata.clear()), &["not the state of a calibration"]);
    refuses(&bytes(&make(&stopped.pretrained, &stopped.scheme, &stopped.ids, &options(CONTEXT))), &["not the state"]);
    refuses(
        &state(&own.replace("\"version\":\"3\"", "\"version\":\"2\"")),
        &["another version: 2, and this run has 3"],
    );

    // Nor is a state a calibration.
    std::fs::write(stopped.path(), &whole).unwrap();
    says(Artefact::load(stopped.path()), &["x.partial", "no fingerprint"]);
    assert!(stopped.go_on().is_ok());
}

#[test]
fn a_state_that_cannot_be_kept_is_an_error() {
    let folder = Folder::new();
    let (pretrained, scheme, ids) = (dummy(2, 1, json!({})), parse(&both()), text(100, 1));
    let run = |place: &str| {
        let options = Options { state: Some(folder.file(place)), ..options(CONTEXT) };
        let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
        calibrate(&cpu, &pretrained, &scheme, &one(&ids), &options, |_| ControlFlow::Break(()))
    };
    let error = run("nowhere/x.partial").unwrap_err();
    assert!(message(&error).contains("cannot write") && message(&error).contains("nowhere/x.partial"), "{error}");
    std::fs::create_dir(folder.file("taken")).unwrap();
    says(run("taken"), &["cannot read", "taken", "directory"]);
    assert_eq!(folder.names(), ["taken"]);
}
