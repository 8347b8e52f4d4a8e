use super::{check_context, show, warn_of_load};
use crate::args::{LoadFormat, ThroughputBenchArgs};
use crate::commands::schemes::calibrated_schemes;
use crate::commands::{announce, model_line, prepare_report, schemes};
use crate::device::on_device;
use crate::output::{bar, bytes, check_writable, note, table, write_complete};
use crate::{Outcome, memory, source};
use anyhow::Result;
use dibit_cache::CalibratedScheme;
use dibit_device::{Device, Measure};
use dibit_eval::bench::{ThroughputBench, ThroughputOptions, ThroughputPoint, ThroughputScheme, throughput};
use dibit_eval::report::{throughput_html, throughput_svg};
use std::path::Path;
use std::sync::Arc;

pub fn run(args: &ThroughputBenchArgs) -> Result<Outcome> {
    args.prefill.check()?;
    schemes(&args.kv)?;
    args.json.iter().flatten().try_for_each(|path| check_writable(path))?;
    let page = args.report.as_deref().map(prepare_report).transpose()?;
    on_device!(&args.run.open_device()?, |device| run_on(device, args, page.as_deref()))
}

fn run_on<D: Device + Measure>(device: &Arc<D>, args: &ThroughputBenchArgs, page: Option<&Path>) -> Result<Outcome> {
    let pretrained = source::load(device, &args.run.model)?;
    let made_up = args.run.model.load_format == LoadFormat::Dummy && args.calibration.calibration.is_empty();
    let schemes = if made_up {
        schemes(&args.kv)?.into_iter().map(CalibratedScheme::from).collect()
    } else {
        let schemes = calibrated_schemes(&args.kv, &args.calibration.calibration, &pretrained)?;
        schemes.iter().try_for_each(|scheme| announce(scheme, &pretrained.config))?;
        schemes
    };
    check_context(args.prompt + args.generate, &pretrained, args.run.model.load_format)?;
    warn_of_load();
    let budget = device.budget();
    let options = ThroughputOptions {
        batches: args.batch.clone(),
        prompt: args.prompt,
        generate: args.generate,
        prefill_rows: args.prefill_rows.unwrap_or(budget.prefill_rows),
        prefill: args.prefill.on(&budget),
        host_bytes: memory::available(),
        made_up,
    };
    let bar = bar(0);
    let mut shown = 0;
    let figures = throughput(device, &pretrained, &schemes, &options, |so_far, next| {
        bar.set_message(next);
        // What took minutes is not lost where a later batch fails.
        let points = || so_far.schemes.iter().flat_map(|own| own.points.iter().map(move |point| (own, point)));
        for (own, point) in points().skip(shown) {
            let speed = point.decode_tokens_per_s;
            bar.suspend(|| note(&format!("{}, batch {}: {speed:.1} tokens/s", own.scheme, point.batch)));
            shown += 1;
        }
        if let Some(Some(path)) = &args.json
            && let Ok(value) = serde_json::to_string_pretty(so_far)
        {
            // Checked before, and written once more at the end.
            write_complete(path, value.as_bytes()).ok();
        }
    })?;
    bar.finish_and_clear();
    let text = format!("{}\n{}", model_line(&pretrained, &figures.device), render(&figures));
    show(&args.json, &serde_json::to_value(&figures)?, &text)?;
    if let Some(page) = page {
        write_complete(page, throughput_html(&figures).as_bytes())?;
        write_complete(&page.with_file_name("throughput.svg"), throughput_svg(&figures).as_bytes())?;
        note(&format!("report: {}", page.display()));
    }
    Ok(Outcome::Done)
}

fn render(figures: &ThroughputBench) -> String {
    let first = &figures.schemes[0];
    let row = |own: &ThroughputScheme, point: &ThroughputPoint| {
        let over = first.at(point.batch).map(|other| point.decode_tokens_per_s / other.decode_tokens_per_s);
        vec![
            own.scheme.clone(),
            point.batch.to_string(),
            format!("{:.1}", point.decode_tokens_per_s),
            over.filter(|over| over.is_finite()).map_or_else(String::new, |over| format!("{over:.2}")),
            format!("{:.1}", point.tokens_per_s),
            format!("{:.2}", point.prefill_seconds),
            bytes(point.peak_bytes),
        ]
    };
    let rows = |own: &ThroughputScheme| own.points.iter().map(|point| row(own, point)).collect::<Vec<_>>();
    let rows: Vec<Vec<String>> = figures.schemes.iter().flat_map(rows).collect();
    let over = format!("times {}", first.scheme);
    let header = ["scheme", "batch", "tokens/s", &over, "with prompts", "prefill s", "memory"];
    let ends: String = figures.schemes.iter().map(end).collect();
    format!(
        "weights {}; memory {} in all; prompts of {} tokens, {} generated for each\n\n{}\n{ends}tokens/s of decoding, all \
         sequences together; with prompts: the time of prefill included; one run of each, after a short one\n",
        bytes(figures.weight_bytes),
        bytes(figures.memory_bytes),
        figures.prompt,
        figures.generate,
        table(&header, &rows)
    )
}

/// Where a scheme's batches ended.
fn end(own: &ThroughputScheme) -> String {
    let largest =
        own.largest.map(|batch| format!("{}: the largest batch is {batch}\n", own.scheme)).unwrap_or_default();
    let lack = own.out_of_memory.as_ref().map(|lack| match lack.batch {
        0 => format!("{}: the weights do not fit: {}\n", own.scheme, lack.reason),
        batch => format!("{}: out of memory at batch {batch}: {}\n", own.scheme, lack.reason),
    });
    largest + &lack.unwrap_or_default()
}
