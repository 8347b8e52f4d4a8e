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
    /// Cells of the size that was asked for, or of the device's.
    pub fn cells(&self, budget: &Budget) -> Prefill {
        Prefill::Cells(self.cell.unwrap_or(budget.cell))
    }

    /// A way to read prompts on a device with this budget; `context` is the longest one.
    pub fn prefill(&self, mode: PrefillMode, budget: &Budget, context: usize) -> Prefill {
        match mode {
            PrefillMode::Cells => self.cells(budget),
            PrefillMode::Exact => Prefill::Exact,
            // Where its passes end changes nothing, but for sinks that are chosen from a prompt.
            PrefillMode::Streaming => Prefill::Streaming(context.next_multiple_of(128)),
        }
    }

    /// Refuses a size of cells that nothing reads.
    pub fn check(&self, modes: &[PrefillMode]) -> Result<()> {
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
}

fn cell(text: &str) -> Result<usize, String> {
    let cell = text.parse::<u32>().map_err(|_| format!("'{text}' is no number of tokens"))? as usize;
    Prefill::Cells(cell).check().map_err(|error| error.to_string())?;
    Ok(cell)
}
