//! `dibit bench`.

mod attention;
mod decode;

use crate::Outcome;
use crate::args::{Bench, BenchArgs, MeasureArgs};
use crate::memory;
use crate::output::{STDOUT, bytes, check_writable, write_complete};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::Write;

pub fn run(args: &BenchArgs) -> Result<Outcome> {
    match &args.what {
        Bench::Attention(args) => attention::run(args),
        Bench::Decode(args) => decode::run(args),
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
    fn check(&self, cache_bytes: usize) -> Result<()> {
        self.json.iter().flatten().try_for_each(|path| check_writable(path))?;
        warn_of_load();
        let (sweep, available) = (self.sweep_bytes(), memory::available());
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

    /// Shows the figures as the user wants them.
    fn show(&self, figures: &Value, text: &str) -> Result<()> {
        let mut stdout = std::io::stdout();
        match &self.json {
            Some(None) => return writeln!(stdout, "{figures:#}").context(STDOUT),
            Some(Some(path)) => write_complete(path, format!("{figures:#}\n").as_bytes())?,
            None => {}
        }
        write!(stdout, "{text}").context(STDOUT)
    }
}
