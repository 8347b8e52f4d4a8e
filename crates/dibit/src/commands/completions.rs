use crate::Outcome;
use crate::args::{Cli, CompletionsArgs};
use anyhow::Result;
use clap::CommandFactory;
use std::io::Write;

pub fn run(args: &CompletionsArgs) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "dibit", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(Outcome::Done)
}
