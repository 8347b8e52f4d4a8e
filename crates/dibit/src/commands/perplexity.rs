use super::schemes::calibrated_schemes;
use super::{announce, begin_windows, evaluation_progress, interrupt_flag, schemes, window_begin};
use crate::args::{PerplexityArgs, PrefillMode};
use crate::device::on_device;
use crate::output::{STDOUT, bar, check_writable, note, table, write_complete};
use crate::{Outcome, source, text};
use anyhow::{Context, Result};
use dibit_device::Device;
use dibit_eval::{Perplexity, PerplexityOptions, perplexity};
use std::io::Write;
use std::sync::Arc;

pub fn run(args: &PerplexityArgs) -> Result<Outcome> {
    // Names that mean nothing are said before a model is loaded.
    schemes(&args.kv)?;
    args.cell.check(&args.prefill)?;
    let text = text::read(&args.text)?;
    args.json.as_deref().map(check_writable).transpose()?;
    on_device!(&args.run.open_device()?, |device| run_on(device, args, &text))
}

fn run_on<D: Device>(device: &Arc<D>, args: &PerplexityArgs, text: &str) -> Result<Outcome> {
    let mut pretrained = source::load(device, &args.run.model)?;
    begin_windows(&args.window, &mut pretrained);
    pretrained.set_context(args.context);
    let schemes = calibrated_schemes(&args.kv, &args.calibration.calibration, &pretrained)?;
    let ids = pretrained.tokenizer.encode(text, false)?;
    schemes.iter().try_for_each(|scheme| announce(scheme, &pretrained.config))?;
    let budget = device.budget();
    let prefill = |mode: &PrefillMode| args.cell.prefill(*mode, &budget, args.context);
    let options = PerplexityOptions {
        context: args.context,
        windows: args.windows.map(|n| n as usize),
        prefills: args.prefill.iter().map(prefill).collect(),
    };
    let asked = options.windows;
    let interrupted = interrupt_flag(true)?;
    let bar = bar(0);
    let report = perplexity(device, &pretrained, &schemes, &ids, options, evaluation_progress(&bar, &interrupted))?;
    bar.finish_and_clear();
    let Some(report) = report else {
        note("interrupted: no figures are shown or written");
        return Ok(Outcome::Interrupted);
    };
    if let Some(asked) = asked.filter(|asked| *asked > report.windows) {
        tracing::warn!("the text fills {} windows, fewer than the {asked} asked for", report.windows);
    }
    if let Some(path) = &args.json {
        let mut value = serde_json::to_value(&report)?;
        value["model"] = pretrained.name.clone().into();
        write_complete(path, serde_json::to_string(&value)?.as_bytes())?;
    }
    write!(std::io::stdout(), "{}", render(&report, &window_begin(&pretrained, report.bos))).context(STDOUT)?;
    Ok(Outcome::Done)
}

fn render(report: &Perplexity, begin: &str) -> String {
    let (_, own) = report.schemes.split_first().expect("the reference is there");
    // Where all were read alike, the way goes without saying.
    let many = own.iter().any(|s| s.prefill != own[0].prefill);
    let rows: Vec<Vec<String>> = report
        .schemes
        .iter()
        .map(|s| {
            let mut cells = vec![s.scheme.clone()];
            cells.extend(many.then(|| s.prefill.clone()));
            cells.extend([
                format!("{:.3}", s.perplexity),
                format!("{:.5}", s.kl_mean),
                format!("{:.4}", s.kl_p999),
                format!("{:.4}", s.top1_agreement),
                format!("{:.2}", s.bits),
                format!("{:.2}", s.allocated_bits),
                format!("{:.2}", s.packed_bits),
            ]);
            cells
        })
        .collect();
    let mut header = vec!["scheme"];
    header.extend(many.then_some("prefill"));
    header.extend(["perplexity", "KL mean", "KL 99.9%", "top-1", "bits", "allocated", "packed"]);
    format!(
        "{}{} tokens in {} windows of {}, {begin}; KL in nats against fp16; bits per cached scalar at the end of a window; packed: of those in pages\n",
        table(&header, &rows),
        report.tokens,
        report.windows,
        report.context
    )
}
