//! The operations that cost most, on one thread, through the public trait: products with weights against the speed of
//! memory, and each scheme's cache against that of fp16.

use dibit_cache::{Batch, CacheModel, CacheShape, CalibratedScheme, Mode, PAGE_TOKENS, Phase, Sequence};
use dibit_cpu::Cpu;
use dibit_device::{Arithmetic, DType, Dense, DeviceError, KvCache, Memory, Output, Pass, QueryHeads, Tensor};
use dibit_timing::{Kernels, Sweep};

/// More than the processor's caches hold, so that every matrix comes from memory.
const SWEEP_BYTES: usize = 1 << 30;

const HEADS: usize = 16;
const SHAPE: CacheShape = CacheShape { num_layers: 1, num_key_value_heads: 8, head_dim: 128 };

/// Cached tokens of attention: a few pages and the window.
const CONTEXT: usize = 1024;

/// Those that need no calibration; the reference comes first.
const SCHEMES: [&str; 6] = ["fp16", "kivi", "kvlinc", "quarot", "gear-l", "akvq-vl"];

fn main() -> Result<(), DeviceError> {
    let cpu = Cpu::new(Some(1))?;
    println!("{}\n", cpu.describe());
    linear(&cpu)?;
    append(&cpu)?;
    attention(&cpu)
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    Tensor::random(seed, 1.0, DType::F32, 1, len).to_f32()
}

fn linear(cpu: &Cpu) -> Result<(), DeviceError> {
    let sweep =
        Sweep::new(SWEEP_BYTES).map_err(|_| DeviceError::OutOfMemory { what: "the sweep", bytes: SWEEP_BYTES })?;
    for (n, k) in [(2048, 2048), (8192, 2048)] {
        for dtype in [DType::Bf16, DType::F32] {
            let title = format!("{n} x {k} {}, GB of weights", dtype.name());
            let mut kernels = Kernels::new(title, "GB/s").add("read", sweep.bytes() as f64 / 1e9, || {
                cpu.scope(|| sweep.read());
            });
            for rows in [1, 8, 64, 512] {
                // Each has a matrix of its own, which nobody has just read.
                let w = cpu.matrix(Tensor::random(rows as u64, 0.02, dtype, n, k))?;
                let (x, mut out) = (cpu.upload(&random(0, rows * k))?, cpu.buffer(rows * n)?);
                kernels = kernels.add(format!("{rows} rows"), w.num_bytes() as f64 / 1e9, move || {
                    let phase = if rows > 8 { Phase::Prefill } else { Phase::Decode };
                    cpu.scope(|| cpu.linear(phase, &x, 0..rows, &w, None, &mut out, Output::Write(0)));
                });
            }
            println!("{}", kernels.table());
        }
    }
    Ok(())
}

/// A cache of one layer and one sequence.
struct Cache {
    cache: KvCache<Cpu>,
    sequence: Sequence,
}

impl Cache {
    fn new(cpu: &Cpu, scheme: &str, capacity: usize) -> Result<Self, DeviceError> {
        let scheme = CalibratedScheme::load(scheme).expect("a built-in scheme");
        let model = CacheModel::of_shape(SHAPE).fusing(|_| true);
        let layout = scheme.layout(&model).expect("a scheme for every shape that needs no calibration");
        let blocks = layout.blocks(capacity);
        let mut cache = KvCache::new(cpu, layout, blocks, 1, capacity, Arithmetic::Exact)?;
        let mut sequence = cache.open().expect("the only sequence");
        cache.reserve(&mut sequence, capacity).expect("blocks for all tokens");
        Ok(Cache { cache, sequence })
    }

    fn append(&mut self, cpu: &Cpu, k: &Vec<f32>, v: &Vec<f32>) -> Result<(), DeviceError> {
        let rows = k.len() / (SHAPE.num_key_value_heads * SHAPE.head_dim);
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(self.cache.manager(), &self.sequence, rows);
        let store = |pass: &mut Pass<Cpu>| {
            let mut layer = pass.layer(&vec![1.0; rows], 1)?;
            layer.stage(rows, k, v)?;
            layer.pack()
        };
        self.cache.pass_once::<DeviceError>(cpu, &batch, store)?;
        self.cache.advance(&mut self.sequence, rows);
        Ok(())
    }
}

/// Caching token by token, as decoding does: a page is filled in each turn.
fn append(cpu: &Cpu) -> Result<(), DeviceError> {
    let row = cpu.upload(&random(1, SHAPE.num_key_value_heads * SHAPE.head_dim))?;
    let mut kernels = Kernels::new("storing of a token in a layer of 8 KV heads of 128", "tokens/s");
    for scheme in SCHEMES {
        // More turns than there are.
        let mut cache = Cache::new(cpu, scheme, 32 * PAGE_TOKENS)?;
        let row = &row;
        kernels = kernels.add(scheme, PAGE_TOKENS as f64, move || {
            cpu.scope(|| (0..PAGE_TOKENS).try_for_each(|_| cache.append(cpu, row, row))).expect("finite numbers");
        });
    }
    println!("{}", kernels.table());
    Ok(())
}

fn attention(cpu: &Cpu) -> Result<(), DeviceError> {
    let width = SHAPE.num_key_value_heads * SHAPE.head_dim;
    let (k, v) = (cpu.upload(&random(1, CONTEXT * width))?, cpu.upload(&random(2, CONTEXT * width))?);
    let (q, row) = (cpu.upload(&random(3, HEADS * SHAPE.head_dim))?, random(4, width));
    let title = format!("attention of a token to {CONTEXT} in the processor's caches, {HEADS} query heads on 8 of 128");
    let mut kernels = Kernels::new(title, "tokens/s");
    for scheme in SCHEMES {
        let mut cache = Cache::new(cpu, scheme, CONTEXT + 1)?;
        cache.append(cpu, &k, &v)?;
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(cache.cache.manager(), &cache.sequence, 1);
        let (q, row, mut out) = (&q, &row, cpu.buffer(HEADS * SHAPE.head_dim)?);
        kernels = kernels.add(scheme, 100.0, move || {
            let attend = |pass: &mut Pass<Cpu>| {
                let mut layer = pass.layer(row, 1)?;
                let mut rows = layer.stage(1, row, row)?;
                (0..100).try_for_each(|_| rows.attend(QueryHeads::plain(HEADS), q, &mut out))
            };
            cache.cache.pass_once::<DeviceError>(cpu, &batch, attend).expect("nothing is stored here");
        });
    }
    println!("{}", kernels.table());
    Ok(())
}
