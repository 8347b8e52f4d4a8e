//! What a person reads: numbers with units, tables, bars.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{ErrorKind, StdoutLock, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What cannot be written where stdout fails.
pub const STDOUT: &str = "cannot write to standard output";

/// Bytes in the unit that suits them, as 1024-multiples.
pub fn bytes(count: usize) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// A time in the unit that suits it.
pub fn duration(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 1.0 => "1 s".to_owned(),
        seconds if seconds < 99.5 => format!("{seconds:.0} s"),
        seconds if seconds < 99.5 * 60.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

/// Says something on stderr, dimmed on a terminal. Where nobody can read it, it is not worth failing for.
pub fn note(text: &str) {
    let dim = anstyle::Style::new().dimmed();
    writeln!(anstream::stderr(), "{dim}{text}{dim:#}").ok();
}

/// A stderr for logs that never fails.
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        std::io::stderr().write_all(bytes).ok();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Text that goes to stdout as it comes, until that fails or Ctrl-C is pressed.
pub struct TextStream<'a> {
    stdout: StdoutLock<'static>,
    interrupted: &'a AtomicBool,
    failure: Option<std::io::Error>,
}

impl<'a> TextStream<'a> {
    pub fn new(interrupted: &'a AtomicBool) -> Self {
        TextStream { stdout: std::io::stdout().lock(), interrupted, failure: None }
    }

    /// Shows a piece of text, and says whether to go on.
    pub fn push(&mut self, text: &str) -> ControlFlow<()> {
        if self.failure.is_none() {
            self.failure = self.stdout.write_all(text.as_bytes()).and_then(|()| self.stdout.flush()).err();
        }
        if self.failure.is_some() || self.interrupted.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// Ends the last line.
    pub fn finish(mut self) -> Result<()> {
        self.failure.take().map_or_else(|| writeln!(self.stdout), Err).context(STDOUT)
    }
}

/// A table with a header; the first column is left-aligned, the others right-aligned.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([header[column].chars().count()]).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: &[String]| {
        let mut line = format!("{:<width$}", cells[0], width = widths[0]);
        for (cell, width) in cells.iter().zip(&widths).skip(1) {
            line += &format!("  {cell:>width$}");
        }
        line.trim_end().to_owned() + "\n"
    };
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    std::iter::once(&header).chain(rows).map(|row| line(row)).collect()
}

/// Names and what they stand for, in two columns.
pub fn columns(rows: &[(String, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

/// A bar on stderr; nothing where stderr is no terminal.
pub fn bar(length: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}").expect("a constant template");
    bar.with_style(style)
}

/// True where the reader of stdout went away, which is no error.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe))
}

/// Checks that a file can be written there, before long work begins. Nothing is left behind.
pub fn check_writable(path: &Path) -> Result<()> {
    if is_stream(path) { Ok(()) } else { beside(path).map(drop) }
}

/// A pipe or a device.
fn is_stream(path: &Path) -> bool {
    path.exists() && !path.is_file() && !path.is_dir()
}

/// Writes a file that appears only once it is complete. A link is followed, and what is no file (a pipe, a device)
/// is written as it is.
pub fn write_complete(path: &Path, contents: &[u8]) -> Result<()> {
    let problem = || format!("cannot write {}; is the disk full?", path.display());
    if is_stream(path) {
        return std::fs::write(path, contents).with_context(problem);
    }
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut file = beside(path)?;
    file.write_all(contents).with_context(problem)?;
    file.as_file().sync_all().with_context(problem)?;
    file.persist(path).with_context(problem)?;
    Ok(())
}

/// A temporary file in the directory of `path`.
fn beside(path: &Path) -> Result<tempfile::NamedTempFile> {
    if path.is_dir() {
        anyhow::bail!("cannot write {}: it is a directory", path.display());
    }
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !directory.is_dir() {
        anyhow::bail!("cannot write {}: the directory does not exist", path.display());
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".dibit-");
    // As for every new file, the umask decides what of this is left.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(directory).map_err(|error| {
        anyhow::anyhow!("cannot write {}: {}; choose another place for the file", path.display(), error.kind())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_the_unit_that_suits_them() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 40), "5.0 TiB");
    }

    #[test]
    fn times_take_the_unit_that_suits_them() {
        let of = |seconds| duration(Duration::from_millis(seconds));
        assert_eq!([of(200), of(40_400), of(150_000), of(9_000_000)], ["1 s", "40 s", "2 min", "2.5 h"]);
    }

    #[test]
    fn names_stand_before_what_they_stand_for() {
        let rows = [("driver", "CUDA 13.0"), ("NVRTC", "13.2")].map(|(name, value)| (name.into(), value.into()));
        assert_eq!(columns(&rows), "driver  CUDA 13.0\nNVRTC   13.2\n");
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["kvlinc".to_owned(), "2.46".to_owned()], vec!["fp16".to_owned(), "16.00".to_owned()]];
        assert_eq!(table(&["scheme", "bits"], &rows), "scheme   bits\nkvlinc   2.46\nfp16    16.00\n");
    }
}
