use crate::Outcome;
use crate::args::AttentionBenchArgs;
use crate::commands::{cpu, schemes};
use crate::output::{bar, bytes, table};
use anyhow::Result;
use dibit_cache::{CacheLayout, CacheShape, Scheme};
use dibit_eval::bench::{AttentionBench, AttentionFigures, AttentionOptions, AttentionPoint, attention};

pub fn run(args: &AttentionBenchArgs) -> Result<Outcome> {
    let schemes = schemes(&args.kv)?;
    args.measure.check(cache_bytes(args, &schemes)?)?;
    let mut threads: Vec<Option<u16>> = args.threads.iter().copied().map(Some).collect();
    if threads.is_empty() {
        threads.push(None);
    }
    let devices = threads.into_iter().map(|threads| cpu(threads, &args.isa)).collect::<Result<Vec<_>, _>>()?;
    let options = AttentionOptions {
        heads: args.heads.clone(),
        head_dim: args.head_dim,
        contexts: args.context.clone(),
        rounds: args.repeat,
        sweep_bytes: args.measure.sweep_bytes(),
    };
    let bar = bar(0);
    let figures = attention(&devices, &schemes, &options, |what| bar.set_message(what))?;
    bar.finish_and_clear();
    args.measure.show(&serde_json::to_value(&figures)?, &render(&figures))?;
    Ok(Outcome::Done)
}

/// Bytes of the largest caches that are held at once.
fn cache_bytes(args: &AttentionBenchArgs, schemes: &[Scheme]) -> Result<usize> {
    let mut most = 0;
    for heads in &args.heads {
        let shape = CacheShape { num_layers: 1, num_key_value_heads: heads.key_value, head_dim: args.head_dim };
        let longest = args.context.iter().max().copied().unwrap_or(0);
        let mut all = 0;
        for scheme in Scheme::with_reference(schemes)? {
            all += CacheLayout::new(&scheme, shape)?.planned_bytes(longest + 1);
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
            "{} query heads on {} KV heads of {}, {} tokens; {}; memory is read at {:.1} GB/s\n{}\n",
            point.num_attention_heads,
            point.num_key_value_heads,
            figures.head_dim,
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
