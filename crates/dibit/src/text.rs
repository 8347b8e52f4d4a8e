//! Texts that the user gives.

use anyhow::{Context, Result, bail};
use std::path::Path;

/// A text file, UTF-8.
pub fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the text {}", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text; convert it first", path.display()))
}

/// A text file; of one that ends in `.jsonl`, the `text` of each line, one after the other.
pub fn read_documents(path: &Path) -> Result<String> {
    let text = read(path)?;
    if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("jsonl")) {
        return Ok(text);
    }
    let mut documents = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("line {} of {}", index + 1, path.display());
        let value: serde_json::Value =
            serde_json::from_str(line).with_context(|| format!("{} is not JSON", place()))?;
        match value.get("text").and_then(serde_json::Value::as_str) {
            Some(text) => documents.push(text.to_owned()),
            None => bail!("{} has no \"text\"; every line must be an object as {{\"text\": \"...\"}}", place()),
        }
    }
    Ok(documents.join("\n\n"))
}
