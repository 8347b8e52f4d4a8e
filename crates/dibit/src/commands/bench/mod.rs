//! `dibit bench`.

mod attention;
mod decode;
mod throughput;

use crate::Outcome;
use crate::args::{Bench, BenchArgs, LoadFormat, MeasureArgs};
use crate::memory;
use crate::output::{STDOUT, bytes, check_writable, write_complete};
use anyhow::{Context, Result, bail};
use dibit_device::{Device, Measure};
use dibit_model::Pretrained;
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

pub fn run(args: &BenchArgs) -> Result<Outcome> {
    match &args.what {
        Bench::Attention(args) => attention::run(args),
        Bench::Decode(args) => decode::run(args),
        Bench::Throughput(args) => throughput::run(args),
    }
}

/// Where others take turns on the cores, a long step is interrupted more often than a short one.
fn warn_of_load() {
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get());
    let load = sysinfo::System::load_average().one;
    if load > cores as f64 / 2.0 {
        tracing::warn!("this machine is busy (load {load:.1} on {cores} cores): ratios may be far off");
    }
}

impl MeasureArgs {
    fn sweep_bytes(&self) -> usize {
        self.sweep << 20
    }

    /// What would fail after long work: a file that cannot be written, caches that do not fit beside the sweep.
    fn check<D: Device + Measure>(&self, device: &Arc<D>, cache_bytes: usize) -> Result<()> {
        self.json.iter().flatten().try_for_each(|path| check_writable(path))?;
        warn_of_load();
        let (sweep, available) = (self.sweep_bytes(), device.memory().map_or_else(memory::available, |own| own.free));
        if cache_bytes.saturating_add(sweep) > available {
            bail!(
                "caches take {}, the sweep {}, and {} of memory are free; measure fewer tokens or a smaller --sweep",
                bytes(cache_bytes),
                bytes(sweep),
                bytes(available)
            );
        }
        Ok(())
    }

    fn show(&self, figures: &Value, text: &str) -> Result<()> {
        show(&self.json, figures, text)
    }
}

/// A trained model has learned its positions, and is not run beyond them; made-up weights know none.
fn check_context(longest: usize, pretrained: &Pretrained, format: LoadFormat) -> Result<()> {
    let limit = pretrained.config.max_position_embeddings;
    if longest > limit && format == LoadFormat::Auto {
        bail!(
            "this run reaches {longest} tokens, and the model supports {limit}; measure fewer, or the shape alone with \
             --load-format dummy"
        );
    }
    Ok(())
}

/// Shows figures as the user wants them: `json` is what `--json` says.
fn show(json: &Option<Option<PathBuf>>, figures: &Value, text: &str) -> Result<()> {
    let mut stdout = std::io::stdout();
    match json {
        Some(None) => return writeln!(stdout, "{figures:#}").context(STDOUT),
        Some(Some(path)) => write_complete(path, format!("{figures:#}\n").as_bytes())?,
        None => {}
    }
    write!(stdout, "{text}").context(STDOUT)
}
