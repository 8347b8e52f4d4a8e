//! The cache on a GPU against the CPU: attention of every row, and every byte of every page.
#![cfg(feature = "gpu-tests")]

#[path = "../../../cpu/src/tests/case.rs"]
mod case;
#[path = "../common/mod.rs"]
mod common;
mod fast;
mod graphs;
#[path = "../../../cpu/src/tests/made_up.rs"]
mod made_up;
mod missed;
mod random;
mod schemes;
mod sequences;

use case::Case;
use common::cuda;
use dibit_cache::{Batch, CalibratedScheme, Mode, Sequence, Sinks};
use dibit_cpu::{Cpu, CpuCache};
use dibit_cuda::{Cuda, CudaCache};
use dibit_device::{Arithmetic, Device, DeviceError, KvCache, Memory, Pass, QueryHeads};
use half::f16;
use made_up::noise;

const LAYER: usize = 1;

/// How far outputs may be from the CPU's, as a share of their root mean square: its weights of packed codes have 16 bits,
/// and what all channels of a head miss alike is in one of them once a Hadamard matrix is taken back.
const TOLERANCE: f64 = 1e-2;

/// The same where nothing is packed.
const EXACT: f64 = 1e-4;

/// Queries, keys and values.
type Data = [Vec<f32>; 3];

/// Stores whose pages can be looked at.
trait Pages {
    fn bytes(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> Vec<u8>;
}

impl Pages for CpuCache {
    fn bytes(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> Vec<u8> {
        self.page_bytes(class, block, layer, kv_head)
    }
}

impl Pages for CudaCache {
    fn bytes(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> Vec<u8> {
        self.page_bytes(class, block, layer, kv_head)
    }
}

impl Case {
    /// With attention on tensor cores.
    fn fast(self) -> Self {
        Case { arithmetic: Arithmetic::Fast, ..self }
    }

    fn widths(&self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head_dim)
    }

    fn data(&self, seed: usize, tokens: usize) -> Data {
        let widths = self.widths();
        let mut data: Data = std::array::from_fn(|i| noise(10 * seed + i + 1, tokens * widths[i], self.head_dim));
        if matches!(self.scheme.sinks, Sinks::Auto(_)) {
            // Pages of a head with few small values, with more than there are places, and with none.
            for (at, value) in data[2].chunks_exact_mut(self.head_dim).enumerate() {
                let (token, head) = (at / self.kv_heads, at % self.kv_heads);
                let every = [29, 7, usize::MAX][token / 128 % 3];
                if (token + head).is_multiple_of(every) {
                    value.iter_mut().for_each(|x| *x = f16::from_f32(0.1 * *x).to_f32());
                }
            }
        }
        data
    }
}

/// A cache on a device, with sequences in it.
struct Machine<'a, D: Device> {
    device: &'a D,
    case: &'a Case,
    cache: KvCache<D>,
}

impl<'a, D: Device> Machine<'a, D> {
    fn new(device: &'a D, case: &'a Case, len: usize, sequences: usize, max_rows: usize) -> Self {
        Machine { device, case, cache: case.cache(device, len, sequences, max_rows) }
    }

    /// One pass of some tokens of some sequences, whose data begins with their first token; returns the outputs.
    fn pass(&mut self, sequences: &mut [(&mut Sequence, usize, &Data)], mode: Mode) -> Result<Vec<f32>, DeviceError> {
        let Machine { device, case, cache } = self;
        let mut batch = Batch::new(mode);
        let mut data: Data = Default::default();
        for (sequence, rows, own) in sequences.iter_mut() {
            let new = sequence.len()..sequence.len() + *rows;
            for ((all, own), width) in data.iter_mut().zip(own.iter()).zip(case.widths()) {
                all.extend_from_slice(&own[new.start * width..new.end * width]);
            }
            cache.classify(sequence, case.classes.get(new.clone()).unwrap_or_default()).unwrap();
            cache.reserve(sequence, new.end).unwrap();
            batch.push(cache.manager(), sequence, *rows);
        }
        let large = |position: u32| if case.sinks.contains(&(position as usize)) { 1000.0 } else { 1.0 };
        let hidden: Vec<f32> = batch.positions().map(large).collect();
        let hidden = device.upload(&hidden)?;
        let [q, k, v] = data.map(|numbers| device.upload(&numbers).unwrap());
        let len = batch.rows() * case.widths()[0];
        let mut out = device.upload(&vec![f32::NAN; len])?;
        let sinks = case.head_sinks.as_ref().map(|own| device.upload(own).unwrap());
        let run = |pass: &mut Pass<D>| {
            (0..LAYER).try_for_each(|_| pass.layer(&hidden, 1).map(drop))?;
            let heads = QueryHeads { num: case.heads, softcap: case.softcap, sinks: sinks.as_ref() };
            pass.whole_layer((&hidden, 1), heads, [&q, &k, &v], &mut out)
        };
        cache.pass_once::<DeviceError>(device, &batch, run)?;
        for (sequence, rows, _) in sequences.iter_mut() {
            cache.advance(sequence, *rows);
        }
        let mut outputs = Vec::new();
        device.download(&out, 0..len, &mut outputs)?;
        Ok(outputs)
    }

    /// Passes of a sequence of its own; returns all outputs.
    fn run(&mut self, sequence: &mut Sequence, mode: Mode, passes: &[usize], data: &Data) -> Vec<f32> {
        passes.iter().flat_map(|rows| self.pass(&mut [(&mut *sequence, *rows, data)], mode).unwrap()).collect()
    }

    fn pages(&self, sequence: &Sequence) -> Vec<Vec<u8>>
    where
        D::Store: Pages,
    {
        let classes = sequence.class_tokens(0);
        let plain = sequence.blocks(0).iter().map(|block| (0, *block));
        let of_classes =
            classes.iter().enumerate().flat_map(|(class, own)| own.blocks.iter().map(move |b| (class, *b)));
        let heads = |(class, block)| {
            (0..self.case.kv_heads).map(move |head| self.cache.store().bytes(class, block, LAYER, head))
        };
        plain.chain(of_classes).flat_map(heads).collect()
    }
}

fn close(what: &str, tolerance: f64, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let squares: f64 = expected.iter().map(|x| f64::from(*x).powi(2)).sum();
    let scale = (squares / expected.len() as f64).sqrt();
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (f64::from(*got) - f64::from(*expected)).abs();
        assert!(difference <= tolerance * scale, "{what}, number {i}: {got} instead of {expected}");
    }
}

/// Runs passes on both devices and compares all that can be seen.
fn compare(cuda: &Cuda, what: &str, case: &Case, mode: Mode, passes: &[usize]) {
    compare_within([EXACT, TOLERANCE], cuda, what, case, mode, passes);
}

/// The same with tolerances of one's own, for what is seen exactly and for what is packed.
fn compare_within([exact, packed]: [f64; 2], cuda: &Cuda, what: &str, case: &Case, mode: Mode, passes: &[usize]) {
    let tokens: usize = passes.iter().sum();
    let cpu = Cpu::new(Some(2)).unwrap();
    let data = case.data(0, tokens);
    let rows = *passes.iter().max().unwrap();
    let mut reference = Machine::new(&cpu, case, tokens, 1, rows);
    let mut machine = Machine::new(cuda, case, tokens, 1, rows);
    let mut sequences = [reference.cache.open().unwrap(), machine.cache.open().unwrap()];
    let expected = reference.run(&mut sequences[0], mode, passes, &data);
    let got = machine.run(&mut sequences[1], mode, passes, &data);
    let tolerance = if case.scheme.is_exact() { exact } else { packed };
    let width = case.widths()[0];
    let mut first = 0;
    for rows in passes {
        let own = first * width..(first + rows) * width;
        // What is seen exactly is computed exactly.
        let whole = case.scheme.sees == dibit_cache::Sees::Exact && mode == Mode::Chunk && first == 0;
        let tolerance = if whole { exact } else { tolerance };
        close(
            &format!("{what}, {mode:?} {passes:?}, rows from {first} on"),
            tolerance,
            &got[own.clone()],
            &expected[own],
        );
        first += rows;
    }
    for (index, (got, expected)) in machine.pages(&sequences[1]).iter().zip(reference.pages(&sequences[0])).enumerate()
    {
        if let Some(at) = (0..got.len()).find(|at| got[*at] != expected[*at]) {
            let layout = case.layout();
            let page = &layout.layers[LAYER].pages[index % case.kv_heads];
            panic!(
                "{what}, {mode:?} {passes:?}: byte {at} of page {index} is {} and not {}: {page:?}",
                got[at], expected[at]
            );
        }
    }
}
