//! Every family under `dibit`, calibrated on it, across windows: what is cached is read as if its tokens had come one by one,
//! and others in a pass change nothing.

mod common;

use common::{options, parse, text};
use dibit_cache::{CacheLayout, CalibratedScheme, Mode, Sequence};
use dibit_calibrate::{Options, Text, calibrate};
use dibit_cpu::Cpu;
use dibit_model::{Model, ModelFiles, Pretrained, WeightSource};
use dibit_runner::{Capacity, Executor, Runner};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CONTEXT: usize = 300;
const TOKENS: usize = 420;

fn fixtures() -> Vec<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut found = vec![repository.join("fixtures/mistral-f32")];
    let families = repository.join("../shared/fixtures/arch");
    match std::fs::read_dir(&families) {
        Ok(entries) => found.extend(entries.map(|entry| entry.unwrap().path())),
        Err(_) => {
            let line = format!("skipped: {} is not here\n", families.display());
            std::io::stderr().write_all(line.as_bytes()).unwrap();
        }
    }
    found.sort();
    found
}

/// `dibit` with so many recent tokens in 16 bit: where a window is no longer than that, nothing of its layer is packed.
fn scheme(recent: usize) -> CalibratedScheme {
    parse(&format!(
        "name = \"recent {recent}\"\n[keys]\nbits = \"planes\"\naxis = \"channel\"\nfeedback = true\n\
         [values]\nbits = \"planes\"\naxis = \"channel\"\ntransform = \"basis\"\n[planes]\npool = \"model\"\n\
         [window]\ntokens = {recent}\nschedule = \"guaranteed\"\n[sinks]\nkind = \"auto\"\ncount = 4\nplaces = 32\n"
    ))
}

/// The logits behind each pass of some sequences that are read together.
fn logits(
    model: &Arc<Model<Cpu>>,
    layout: &CacheLayout,
    mode: Mode,
    texts: &[&[u32]],
    passes: &[usize],
) -> Vec<Vec<Vec<f32>>> {
    let (count, most) = (texts.len(), passes.iter().max().unwrap());
    let capacity =
        Capacity { blocks: count * layout.blocks(TOKENS), sequences: count, rows: count * most, outputs: count };
    let mut runner = Runner::new(model.clone(), layout.clone(), capacity).unwrap();
    let mut sequences: Vec<Sequence> = texts.iter().map(|_| runner.open().unwrap()).collect();
    let mut all = vec![Vec::new(); count];
    for rows in passes {
        let mut parts: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(texts)
            .map(|(sequence, text)| {
                let at = sequence.len();
                (sequence, &text[at..at + rows])
            })
            .collect();
        runner.step(mode, &mut parts).unwrap();
        let ends: Vec<usize> = (1..=count).map(|end| end * rows - 1).collect();
        let mut found = Vec::new();
        runner.logits(&ends, &mut found).unwrap();
        let vocab_size = found.len() / count;
        all.iter_mut().zip(found.chunks_exact(vocab_size)).for_each(|(all, own)| all.push(own.to_vec()));
    }
    all
}

#[test]
fn every_family_is_read_alike_however_its_tokens_come() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    for directory in fixtures() {
        let files = ModelFiles::open(&directory).unwrap();
        let own = Pretrained::load(&files, WeightSource::Checkpoint, None).unwrap();
        for recent in [128, 32] {
            let mut scheme = scheme(recent);
            let documents = vec![text(2 * CONTEXT, 5)];
            let options = Options { tokens: Some(CONTEXT), ..options(CONTEXT) };
            let made = calibrate(&cpu, &own, &scheme, &Text { documents, held_out: Vec::new() }, &options, |_| {
                ControlFlow::Continue(())
            });
            let what = format!("{}, {recent} recent tokens", directory.display());
            let made = made.unwrap_or_else(|error| panic!("{what}: {error}")).unwrap();
            scheme.calibration = Some(Arc::new(made.calibration));
            let layout = own.cache_layout(&scheme).unwrap();
            let model = Arc::new(Model::for_cache(&cpu, &own.config, &own.weights, &layout).unwrap());
            let [first, second] = [text(TOKENS, 7), text(TOKENS, 8)];
            let read = |mode: Mode, texts: &[&[u32]], passes: &[usize]| logits(&model, &layout, mode, texts, passes);

            let streamed = read(Mode::Streaming, &[&first], &[300, 120]);
            let decoded = read(Mode::Chunk, &[&first], &[1; TOKENS]);
            assert!(streamed[0] == [decoded[0][299].clone(), decoded[0][419].clone()], "{what}: streaming");

            for passes in [&[128, 128, 100, 1, 1][..], &[200, 150, 1, 69]] {
                let together = read(Mode::Chunk, &[&second, &first], passes);
                let alone = [&second, &first].map(|own| read(Mode::Chunk, &[own], passes).remove(0));
                assert!(together == alone, "{what}: passes {passes:?}");
            }
        }
    }
}
