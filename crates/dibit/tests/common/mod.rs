//! What the tests of the program share: running it, and checkpoints to change.
#![allow(dead_code, reason = "every test file uses a part of it")]

use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Variables of the caller that would change what the program does.
const CLEARED: [&str; 14] = [
    "RUST_LOG",
    "NO_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "HF_HOME",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
];

pub const SCHEMES: [&str; 4] = ["fp16", "kivi", "kivi-paper", "kvlinc"];

pub const FIXTURES: [&str; 5] =
    ["llama2-linear-f16", "llama32-old-bf16", "mistral-f32", "qwen2-bias-bf16", "qwen3-hd256-bf16"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The directory of a checkpoint of the repository.
pub fn fixture(name: &str) -> String {
    repository().join("fixtures").join(name).to_str().unwrap().to_owned()
}

/// So many words, each one token or more.
pub fn words(count: usize) -> String {
    let all = "the quick brown fox jumps over a lazy dog and runs away from it".split(' ').cycle();
    all.take(count).collect::<Vec<_>>().join(" ")
}

/// How a run ended.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

pub fn program() -> assert_cmd::Command {
    let mut program = assert_cmd::cargo::cargo_bin_cmd!("dibit");
    for name in CLEARED {
        program.env_remove(name);
    }
    // No test reads or writes the user's calibrations, and none makes one unasked.
    let nowhere = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-calibrations");
    program.env("DIBIT_CACHE_DIR", nowhere).env("DIBIT_CALIBRATE", "never");
    program
}

pub fn run(args: &[&str]) -> Run {
    finish(program().args(args))
}

pub fn run_with_stdin(args: &[&str], stdin: &[u8]) -> Run {
    finish(program().args(args).write_stdin(stdin))
}

pub fn finish(program: &mut assert_cmd::Command) -> Run {
    let output = program.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).expect("the program writes UTF-8");
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

impl Run {
    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// Its output as JSON; the run must have succeeded.
    pub fn json(self) -> Value {
        let run = self.succeeds();
        serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {}", run.stdout))
    }

    /// The run ended with one error: a paragraph with these words after at most some notes, and no other output.
    pub fn fails_with(&self, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{words:?}: {}", self.stderr);
        let notes = |line: &&str| line.starts_with(" INFO") || line.starts_with(" WARN");
        let error = self.stderr.lines().skip_while(notes).collect::<Vec<_>>().join("\n");
        assert!(error.starts_with("error: ") && !error.contains("\n\n"), "{words:?}: not one paragraph: {error}");
        self.shows_only(words);
    }

    /// The command line was refused, naming these words.
    pub fn is_usage_error(&self, words: &[&str]) {
        assert_eq!(self.code, Some(2), "{words:?}: {}", self.stderr);
        assert!(self.stderr.starts_with("error: ") && self.stderr.contains("--help"), "{}", self.stderr);
        self.shows_only(words);
    }

    fn shows_only(&self, words: &[&str]) {
        for word in words {
            assert!(self.stderr.contains(word), "'{word}' is not in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        assert_eq!(self.stdout, "", "{words:?}");
    }
}

/// The JSON that `generate` prints with these further arguments, for greedy decoding.
pub fn greedy(args: &[&str]) -> Value {
    run(&[&["generate", "--json", "--temperature=0"], args].concat()).json()
}

/// The parts of a completion that must not depend on how it came about; seed, times and memory are left out.
pub fn essence(completion: &Value) -> Value {
    let parts = ["prompt", "prompt_tokens", "text", "tokens", "generated_tokens", "finish_reason", "cache"];
    let part = |name: &str| completion.get(name).unwrap_or_else(|| panic!("no {name} in {completion}")).clone();
    parts.into_iter().map(|name| (name.to_owned(), part(name))).collect::<Map<_, _>>().into()
}

/// A temporary directory: often a checkpoint to be changed.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(TempDir::new().unwrap())
    }

    pub fn of_fixture(name: &str) -> Self {
        let folder = Folder::new();
        for entry in fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            fs::write(folder.0.path().join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
        folder
    }

    pub fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub fn file(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap()
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        fs::write(self.file(name), contents).unwrap();
        self.file(name)
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).unwrap();
    }

    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Sets fields of a JSON file.
    pub fn edit(&self, name: &str, changes: Value) {
        let mut json: Map<String, Value> = serde_json::from_slice(&self.read(name)).unwrap();
        json.extend(changes.as_object().unwrap().clone());
        self.write(name, serde_json::to_vec(&json).unwrap());
    }
}

/// A tensor of a safetensors file.
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// The tensors of a safetensors file.
pub fn read_tensors(file: &[u8]) -> Vec<Tensor> {
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Map<String, Value> = serde_json::from_slice(header).unwrap();
    let tensor = |(name, info): (String, Value)| {
        let numbers = |key: &str| -> Vec<usize> { serde_json::from_value(info[key].clone()).unwrap() };
        let range = numbers("data_offsets");
        Tensor {
            name,
            dtype: info["dtype"].as_str().unwrap().to_owned(),
            shape: numbers("shape"),
            data: data[range[0]..range[1]].to_vec(),
        }
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(tensor).collect()
}

/// A safetensors file of these tensors.
pub fn write_tensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for Tensor { name, dtype, shape, data: own } in tensors {
        let range = [data.len(), data.len() + own.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": range}));
        data.extend_from_slice(own);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes(), header.as_slice(), &data].concat()
}
