//! Files that are not what their name says: what lies in their place, and how to get the file itself.

use crate::ModelError;
use serde_json::Value;
use std::path::Path;

/// What Git LFS pointers begin with.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// What the hub answers instead of a file, without markup.
const REFUSALS: [&str; 6] = [
    "entry not found",
    "404: not found",
    "repository not found",
    "invalid username or password",
    "access to model ",
    "access to this resource is disabled",
];

/// Bytes of a file that are looked at; an error that the hub answers with is no longer.
const LOOKED_AT: usize = 4096;

const AGAIN: &str = "fetch the file again with huggingface-cli or `curl -L`";

/// The error that names what `bytes` are in place of the file at `path`: a Git LFS pointer, a web page, an error of the
/// hub, an archive, nothing, or zeros. `None` where they are none of these.
pub(crate) fn find(path: &str, bytes: &[u8]) -> Option<ModelError> {
    let start = &bytes[..bytes.len().min(LOOKED_AT)];
    let error = |found: &str, next: &str| {
        Some(ModelError::Impostor { path: path.to_owned(), found: found.to_owned(), next: next.to_owned() })
    };
    if bytes.is_empty() {
        let reason = "it is empty; its download or copy did not finish, fetch it again".to_owned();
        return Some(ModelError::Malformed { path: path.to_owned(), reason });
    }
    if start.starts_with(LFS_POINTER) {
        let folder = Path::new(path).parent().map(|folder| folder.display().to_string());
        let place = match folder.as_deref() {
            Some("") => "its directory",
            Some(folder) => folder,
            None => "its directory",
        };
        return error("a Git LFS pointer, not the file itself", &format!("run `git lfs pull` in {place}"));
    }
    if start.starts_with(b"\x1f\x8b\x08") {
        return error("a gzip archive, not the file itself", "unpack it with gunzip, or tar where it is a .tar.gz");
    }
    if start.starts_with(b"PK\x03\x04") {
        let next = "unpack it, or fetch the model's safetensors or GGUF file";
        return error("a zip archive, as PyTorch writes its weights, not the file itself", next);
    }
    if start.len() == LOOKED_AT && start.iter().all(|byte| *byte == 0) {
        return error("a file of zeros", "its download or copy did not finish, fetch it again");
    }
    let text = String::from_utf8_lossy(start);
    let text = text.trim_start_matches(|c: char| c == '\u{feff}' || c.is_whitespace());
    let lower: String = text.chars().take(100).collect::<String>().to_lowercase();
    if ["<!doctype html", "<html", "<head"].iter().any(|tag| lower.starts_with(tag)) {
        return error("a web page (HTML), not the file itself", &format!("the download went to a page; {AGAIN}"));
    }
    if lower.starts_with("<?xml") {
        return error("an XML answer of a server, not the file itself", AGAIN);
    }
    if bytes.len() > LOOKED_AT {
        return None;
    }
    if REFUSALS.iter().any(|refusal| lower.starts_with(refusal)) {
        let found = format!("an answer of the hub, '{}', not the file itself", first_line(text));
        return error(&found, &format!("see that you have access to the model, and {AGAIN}"));
    }
    if let Some(message) = error_of_json(text) {
        let found = format!("an error of a server, '{}', not the file itself", first_line(&message));
        return error(&found, &format!("see that you have access to the model, and {AGAIN}"));
    }
    None
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().chars().take(100).collect()
}

/// What a JSON object that is an error and nothing else says.
fn error_of_json(text: &str) -> Option<String> {
    // Beside its error, an answer has a status, a message or the like.
    const MOST_KEYS: usize = 4;
    let Value::Object(object) = serde_json::from_str(text).ok()? else { return None };
    let message = object.get("error").or_else(|| object.get("errors"))?;
    (object.len() <= MOST_KEYS).then(|| message.as_str().map_or_else(|| message.to_string(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: &[u8]) -> String {
        find("models/x/config.json", bytes).unwrap_or_else(|| panic!("{bytes:?} is taken")).to_string()
    }

    #[test]
    fn what_lies_in_place_of_a_file_is_named_with_the_next_step() {
        let cases: [(&[u8], &[&str]); 12] = [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
                &["is a Git LFS pointer, not the file itself: run `git lfs pull` in models/x"],
            ),
            (b"<!DOCTYPE html><html>", &["is a web page (HTML)", "huggingface-cli or `curl -L`"]),
            (b"\xef\xbb\xbf\n <HTML lang=en>", &["is a web page (HTML)"]),
            (b"<?xml version='1.0'?><Error>", &["XML answer"]),
            (b"", &["models/x/config.json is malformed: it is empty", "fetch it again"]),
            (b"\x1f\x8b\x08\x00rest", &["gzip"]),
            (b"PK\x03\x04rest", &["zip archive", "PyTorch"]),
            (&[0; 5000], &["file of zeros", "did not finish"]),
            (b"Entry not found", &["'Entry not found'", "access"]),
            (b"Access to model x/y is restricted.", &["is restricted"]),
            (br#"{"error": "Repository not found"}"#, &["'Repository not found'", "access"]),
            (br#"{"error": {"code": 3}, "status": 401}"#, &["code"]),
        ];
        for (bytes, words) in cases {
            let message = message(bytes);
            assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
        }
    }

    #[test]
    fn files_themselves_are_none_of_these() {
        for bytes in [
            &b"{\"architectures\": [\"LlamaForCausalLM\"], \"error\": 1, \"a\": 1, \"b\": 2, \"c\": 3}"[..],
            b"GGUF\x03\0\0\0",
            b"{% for message in messages %}",
            b"<|im_start|>{{ messages }}",
            b"{",
            b"\xff\xfe",
            &[0; 100],
        ] {
            assert!(find("x", bytes).is_none(), "{bytes:?}");
        }
    }
}
