//! How prompts are read.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use dibit_device::Budget;
use dibit_runner::Prefill;

/// A way to read a prompt.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum PrefillMode {
    /// In passes that end at the multiples of --cell tokens: a token sees its own cell exactly, and earlier ones as they are
    /// stored
    Cells,
    /// In one pass, as papers do: a prompt sees itself exactly
    Exact,
    /// As decoding token by token would
    Streaming,
}

/// The size of cells.
#[derive(Args, Clone, Copy)]
pub struct CellArgs {
    /// Tokens of a cell, a multiple of 128 [default: 256 on a CPU, 1024 on a GPU]
    #[arg(long, value_name = "TOKENS", value_parser = cell)]
    pub cell: Option<usize>,
}

/// How a command reads its prompts.
#[derive(Args, Clone, Copy)]
pub struct PrefillArgs {
    /// How a prompt is read
    #[arg(long, value_enum, default_value = "cells")]
    pub prefill: PrefillMode,
    #[command(flatten)]
    pub cell: CellArgs,
}

impl CellArgs {
    /// A way to read prompts on a device with this budget; `context` is the longest one.
    pub fn prefill(&self, mode: PrefillMode, budget: &Budget, context: usize) -> Prefill {
        match mode {
            PrefillMode::Cells => Prefill::Cells(self.cell.unwrap_or(budget.cell)),
            PrefillMode::Exact => Prefill::Exact,
            PrefillMode::Streaming => Prefill::streaming(context),
        }
    }

    /// Refuses a size of cells that nothing reads, and ways that are named twice.
    pub fn check(&self, modes: &[PrefillMode]) -> Result<()> {
        if let Some(twice) = (1..modes.len()).find(|at| modes[..*at].contains(&modes[*at])) {
            let name = modes[twice].to_possible_value();
            bail!("--prefill names {} twice", name.as_ref().map_or("a way", |name| name.get_name()));
        }
        if self.cell.is_some() && !modes.contains(&PrefillMode::Cells) {
            bail!("--cell is for --prefill cells; leave one of the two out");
        }
        Ok(())
    }
}

impl PrefillArgs {
    /// How prompts are read on a device with this budget.
    pub fn on(&self, budget: &Budget) -> Prefill {
        self.cell.prefill(self.prefill, budget, budget.cell)
    }

    /// [`CellArgs::check`].
    pub fn check(&self) -> Result<()> {
        self.cell.check(&[self.prefill])
    }

    /// The same for a command that reads no prompt where `without` is given: neither option may be then.
    pub fn check_without(&self, without: &str) -> Result<()> {
        if self.cell.cell.is_some() || self.prefill != PrefillMode::Cells {
            bail!("--prefill and --cell say how prompts are read, and {without} leaves them out");
        }
        Ok(())
    }
}

fn cell(text: &str) -> Result<usize, String> {
    let cell = text.parse::<u32>().map_err(|_| format!("'{text}' is no number of tokens"))? as usize;
    Prefill::Cells(cell).check().map_err(|error| error.to_string())?;
    Ok(cell)
}
