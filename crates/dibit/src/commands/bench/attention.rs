use crate::Outcome;
use crate::args::AttentionBenchArgs;
use crate::commands::schemes;
use crate::device::{self, AnyDevice};
use crate::output::{bar, bytes, table};
use anyhow::Result;
use dibit_cache::{CacheModel, CacheShape, CalibratedScheme};
use dibit_device::{Device, Measure};
use dibit_eval::bench::{AttentionBench, AttentionFigures, AttentionOptions, AttentionPoint, attention};
use std::sync::Arc;

pub fn run(args: &AttentionBenchArgs) -> Result<Outcome> {
    let schemes: Vec<CalibratedScheme> = schemes(&args.kv)?.into_iter().map(CalibratedScheme::from).collect();
    let (mut cpus, mut gpus) = (Vec::new(), Vec::new());
    for device in devices(args)? {
        match device {
            AnyDevice::Cpu(cpu) => cpus.push(cpu),
            AnyDevice::Cuda(cuda) => gpus.push(cuda),
        }
    }
    if gpus.is_empty() { run_on(&cpus, args, &schemes) } else { run_on(&gpus, args, &schemes) }
}

/// One for each number of threads.
fn devices(args: &AttentionBenchArgs) -> Result<Vec<AnyDevice>> {
    let open = |threads| device::open(args.device.device, threads, args.device.isa.isa);
    match args.threads.as_slice() {
        [] => Ok(vec![open(None)?]),
        all => all.iter().map(|threads| open(Some(*threads))).collect(),
    }
}

fn run_on<D: Device + Measure>(
    devices: &[Arc<D>],
    args: &AttentionBenchArgs,
    schemes: &[CalibratedScheme],
) -> Result<Outcome> {
    args.measure.check(&devices[0], cache_bytes(args, schemes)?)?;
    let options = AttentionOptions {
        heads: args.heads.clone(),
        head_dim: args.head_dim,
        batches: args.batch.clone(),
        contexts: args.context.clone(),
        layers: args.layers,
        rounds: args.repeat,
        sweep_bytes: args.measure.sweep_bytes(),
    };
    let bar = bar(0);
    let figures = attention(&devices.iter().map(|device| &**device).collect::<Vec<_>>(), schemes, &options, |what| {
        bar.set_message(what)
    })?;
    bar.finish_and_clear();
    args.measure.show(&serde_json::to_value(&figures)?, &render(&figures))?;
    Ok(Outcome::Done)
}

/// Bytes of the largest caches that are held at once.
fn cache_bytes(args: &AttentionBenchArgs, schemes: &[CalibratedScheme]) -> Result<usize> {
    let mut most = 0;
    for heads in &args.heads {
        let shape =
            CacheShape { num_layers: args.layers, num_key_value_heads: heads.key_value, head_dim: args.head_dim };
        let longest = args.context.iter().max().copied().unwrap_or(0);
        let batch = args.batch.iter().max().copied().unwrap_or(1);
        let mut all = 0;
        for scheme in CalibratedScheme::with_reference(schemes)? {
            all += batch * scheme.plan(&CacheModel::of_shape(shape))?.planned_bytes(longest + 1);
        }
        most = most.max(all);
    }
    Ok(most)
}

fn render(figures: &AttentionBench) -> String {
    let header = ["scheme", "bits", "reads", "ms", "GB/s", "of read speed", "times fp16"];
    let cells = |point: &AttentionPoint| -> Vec<Vec<String>> {
        let row = |own: &AttentionFigures| {
            vec![
                own.scheme.clone(),
                format!("{:.2}", own.bits),
                bytes(own.bytes),
                format!("{:.3}", own.ms),
                format!("{:.2}", own.gb_per_s.median),
                format!("{:.0} %", 100.0 * own.share_of_read.median),
                format!("{:.2}", own.over_fp16),
            ]
        };
        point.schemes.iter().map(row).collect()
    };
    let part = |point: &AttentionPoint| {
        format!(
            "{} query heads on {} KV heads of {}, {}{} tokens; {}; memory is read at {:.1} GB/s\n{}\n",
            point.num_attention_heads,
            point.num_key_value_heads,
            figures.head_dim,
            if point.batch == 1 { String::new() } else { format!("{} sequences of ", point.batch) },
            point.context,
            point.device,
            point.read_gb_per_s,
            table(&header, &cells(point))
        )
    };
    let parts: String = figures.points.iter().map(part).collect();
    format!(
        "{parts}medians (and quartiles) of {} rounds; times fp16: how many times faster, in the same round\n\
         between two steps of a scheme {} of other memory are read\n",
        figures.rounds,
        bytes(figures.sweep_bytes)
    )
}
