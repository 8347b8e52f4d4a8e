use super::check_context;
use crate::args::DecodeBenchArgs;
use crate::commands::schemes::calibrated_schemes;
use crate::commands::{announce, model_line, schemes};
use crate::device::on_device;
use crate::output::{bar, bytes, table};
use crate::{Outcome, memory, source};
use anyhow::Result;
use dibit_cache::CalibratedScheme;
use dibit_device::{Device, Measure};
use dibit_eval::bench::{DecodeBench, DecodeFigures, DecodeOptions, DecodePoint, PrefillFigures, decode};
use dibit_model::Pretrained;
use std::sync::Arc;

pub fn run(args: &DecodeBenchArgs) -> Result<Outcome> {
    schemes(&args.kv)?;
    match args.prompt {
        0 => args.prefill.check_without("--prompt 0")?,
        _ => args.prefill.check()?,
    }
    on_device!(&args.run.open_device()?, |device| run_on(device, args))
}

fn run_on<D: Device + Measure>(device: &Arc<D>, args: &DecodeBenchArgs) -> Result<Outcome> {
    let pretrained = source::load(device, &args.run.model)?;
    let schemes = calibrated_schemes(&args.kv, &args.calibration.calibration, &pretrained)?;
    schemes.iter().try_for_each(|scheme| announce(scheme, &pretrained.config))?;
    let options = DecodeOptions {
        depths: args.depth.clone(),
        batch: args.batch,
        prompt: args.prompt,
        prefill: args.prefill.on(&device.budget()),
        tokens: args.tokens,
        rounds: args.repeat,
        sweep_bytes: args.measure.sweep_bytes(),
    };
    check_context(options.longest(), &pretrained, args.run.model.load_format)?;
    args.measure.check(device, cache_bytes(&pretrained, &schemes, &options)?)?;
    let bar = bar(0);
    let figures = decode(device, &pretrained, &schemes, &options, |what| bar.set_message(what))?;
    bar.finish_and_clear();
    let peak = memory::peak();
    let mut value = serde_json::to_value(&figures)?;
    value["peak_rss_bytes"] = peak.into();
    let text = format!("{}\n{}", model_line(&pretrained, &figures.device), render(&figures, peak));
    args.measure.show(&value, &text)?;
    Ok(Outcome::Done)
}

/// Bytes of the caches of all schemes at all depths.
fn cache_bytes(pretrained: &Pretrained, schemes: &[CalibratedScheme], options: &DecodeOptions) -> Result<usize> {
    let (mut decoding, mut prompts) = (0, 0);
    for scheme in schemes {
        let layout = pretrained.config.cache_layout(scheme)?;
        let depths = options.depths.iter().copied().filter(|depth| *depth > 0).chain([0]);
        decoding += options.batch * depths.map(|depth| layout.planned_bytes(depth + options.growth())).sum::<usize>();
        prompts += layout.planned_bytes(options.prompt);
    }
    Ok(decoding.max(prompts))
}

fn render(figures: &DecodeBench, peak: Option<usize>) -> String {
    let mut text = format!(
        "weights read for a step {}; memory is read at {:.1} GB/s\n\n",
        bytes(figures.weight_bytes),
        figures.read_gb_per_s
    );
    if !figures.prefill.is_empty() {
        let row = |own: &PrefillFigures| {
            vec![own.scheme.clone(), format!("{:.1}", own.tokens_per_s), format!("{:.2}", own.over_first)]
        };
        let rows: Vec<Vec<String>> = figures.prefill.iter().map(row).collect();
        let first = format!("times {}", figures.prefill[0].scheme);
        text += &format!("prefill of {} tokens\n{}\n", figures.prompt, table(&["scheme", "tokens/s", &first], &rows));
    }
    let row = |depth: usize, own: &DecodeFigures| {
        vec![
            depth.to_string(),
            own.scheme.clone(),
            format!("{:.2}", own.tokens_per_s),
            format!("{:.2}", own.over_first),
            format!("{:.2}", own.over_depth_0),
            bytes(own.cache_bytes),
            format!("{:.2}", own.gb_per_s.median),
            format!("{:.0} %", 100.0 * own.share_of_read.median),
        ]
    };
    let rows = |point: &DecodePoint| point.schemes.iter().map(|own| row(point.depth, own)).collect::<Vec<_>>();
    let rows: Vec<Vec<String>> = figures.depths.iter().flat_map(rows).collect();
    let first = format!("times {}", figures.depths[0].schemes[0].scheme);
    let header = ["depth", "scheme", "tokens/s", &first, "times depth 0", "cache", "GB/s", "of read speed"];
    let peak = peak.map_or_else(|| "unknown".to_owned(), bytes);
    text += &format!(
        "decoding {} tokens{} in each round\n{}\nmedians (and quartiles) of {} rounds; times: how many times faster, in the \
         same round\nGB/s of weights and cache; peak memory of the whole run, {} of sweep included: {peak}\n",
        figures.tokens,
        if figures.batch == 1 { String::new() } else { format!(" of each of {} sequences", figures.batch) },
        table(&header, &rows),
        figures.rounds,
        bytes(figures.sweep_bytes)
    );
    text
}
