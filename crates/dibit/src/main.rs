//! dibit: LLM inference with a key-value cache of two bits.

mod args;
mod bundled;
mod calibration_folder;
mod commands;
mod device;
mod memory;
mod output;
mod retrieval;
mod source;
mod text;

use args::{Cli, Command};
use clap::Parser;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Exit code of a run that Ctrl-C ended, as shells count it.
const INTERRUPTED: u8 = 130;

/// How a command ended.
enum Outcome {
    Done,
    Interrupted,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging();
    let result = match cli.command {
        Command::Generate(args) => commands::generate::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Perplexity(args) => commands::perplexity::run(&args),
        Command::Compare(args) => commands::compare::run(&args),
        Command::Calibrate(args) => commands::calibrate::run(&args),
        Command::Ruler(args) => commands::ruler::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Completions(args) => commands::completions::run(&args),
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let style = anstyle::Style::new().bold().fg_color(Some(anstyle::AnsiColor::Red.into()));
            writeln!(anstream::stderr(), "{style}error:{style:#} {error:#}").ok();
            ExitCode::FAILURE
        }
    }
}

/// Logs go to stderr; `RUST_LOG` chooses which. By default the program's own notes are shown.
fn start_logging() {
    let own = "warn,dibit=info,dibit_engine=info,dibit_model=info";
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(own));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| output::Log)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
}
