//! Models by their hub id, from a hub on this machine that serves the repository's checkpoints.

mod common;

use common::{Run, finish, fixture, greedy, program};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub, the requests that it has seen, and a cache of its own.
struct Hub {
    endpoint: String,
    seen: Arc<Mutex<Vec<String>>>,
    home: tempfile::TempDir,
}

impl Hub {
    fn start() -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &log);
            }
        });
        Hub { endpoint, seen, home: tempfile::tempdir().unwrap() }
    }

    fn run(&self, args: &[&str], variables: &[(&str, &str)]) -> Run {
        let mut program = program();
        program.args(args).env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", self.home.path());
        program.envs(variables.iter().copied());
        finish(&mut program)
    }

    /// The requests since the last call.
    fn take_seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

/// Answers one request as the hub does: a list of files, or a (part of a) file.
fn answer(mut stream: TcpStream, log: &Mutex<Vec<String>>) {
    let lines: Vec<String> = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok)
        .take_while(|l| !l.is_empty())
        .collect();
    let header = |name: &str| {
        lines
            .iter()
            .filter_map(|line| line.split_once(": "))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, v)| v)
    };
    let path = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
    log.lock().unwrap().push(format!("{path} {}", header("authorization").unwrap_or("-")));
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let body = match parts[..] {
        ["api", "models", "org", name, ..] if Path::new(&fixture(name)).is_dir() => {
            let files =
                std::fs::read_dir(fixture(name)).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
            let files: Vec<_> = files.map(|name| serde_json::json!({"rfilename": name})).collect();
            Some(serde_json::json!({"siblings": files, "sha": COMMIT}).to_string().into_bytes())
        }
        ["api", "models", "org", "only-gguf", ..] => {
            Some(br#"{"siblings": [{"rfilename": "model-q4_k_m.gguf"}], "sha": "1"}"#.to_vec())
        }
        ["org", name, "resolve", _, file] => std::fs::read(Path::new(&fixture(name)).join(file)).ok(),
        _ => None,
    };
    let Some(body) = body else {
        let status = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        return stream.write_all(status.as_bytes()).unwrap();
    };
    let range = header("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let (status, body, extra) = match range {
        None => ("200 OK", &body[..], String::new()),
        Some((start, end)) => {
            let start: usize = start.parse().unwrap();
            let end = end.parse().unwrap_or(usize::MAX).min(body.len() - 1);
            (
                "206 Partial Content",
                &body[start..=end],
                format!("content-range: bytes {start}-{end}/{}\r\n", body.len()),
            )
        }
    };
    let tag: String = path.chars().filter(char::is_ascii_alphanumeric).collect();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nx-repo-commit: {COMMIT}\r\netag: \"{tag}\"\r\n{extra}connection: close\r\n\r\n",
        body.len()
    );
    // A client that has seen enough may hang up.
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok();
}

#[test]
fn a_model_is_downloaded_once_and_then_runs_offline() {
    let hub = Hub::start();
    let generate = ["generate", "--json", "--temperature", "0", "-n", "8", "--kv", "kivi", "Hello"];
    let by_id = [&generate[..], &["--model", "org/llama2-linear-f16"]].concat();
    let expected = greedy(&["-n", "8", "--kv", "kivi", "--model", &fixture("llama2-linear-f16"), "Hello"]);
    let first = hub.run(&by_id, &[("HF_TOKEN", "secret")]).succeeds().json();
    assert_eq!(first["tokens"], expected["tokens"]);
    let seen = hub.take_seen();
    assert!(seen.iter().any(|line| line.contains("model-00002-of-00002.safetensors")), "{seen:?}");
    assert!(seen.iter().all(|line| line.ends_with("Bearer secret")), "{seen:?}");
    let offline = hub.run(&by_id, &[("HF_HUB_OFFLINE", "1")]).succeeds().json();
    assert_eq!(offline["tokens"], expected["tokens"]);
    assert!(hub.take_seen().is_empty(), "offline means offline");
}

#[test]
fn a_calibration_that_was_made_for_a_directory_is_found() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().unwrap();
    let folder = ("DIBIT_CACHE_DIR", folder.path().to_str().unwrap());
    let directory = fixture("llama2-linear-f16");
    let made = ["calibrate", "--device", "cpu", "--tokens", "512", "--context", "128", "--model", &directory];
    let place = hub.run(&made, &[folder]).succeeds().stdout;
    let by_id = ["generate", "--json", "-n", "2", "Hello", "--model", "org/llama2-linear-f16"];
    let cache = hub.run(&by_id, &[folder]).json()["cache"].clone();
    assert_eq!(cache["scheme"], "dibit");
    assert!(place.starts_with(&format!("{}: dibit for ", cache["calibration"]["file"].as_str().unwrap())), "{place}");
}

#[test]
fn inspect_downloads_no_weights() {
    let hub = Hub::start();
    let report = hub.run(&["inspect", "--json", "--model", "org/mistral-f32@main"], &[]).succeeds().json();
    assert_eq!(report["architecture"], "MistralForCausalLM");
    let seen = hub.take_seen();
    assert!(!seen.is_empty() && seen.iter().all(|line| !line.contains("safetensors")), "{seen:?}");
}

#[test]
fn a_model_that_the_hub_does_not_have_is_named() {
    let hub = Hub::start();
    hub.run(&["generate", "--model", "org/nothing", "Hello"], &[]).fails_with(&["org/nothing", "no such model"]);
}

#[test]
fn gguf_files_are_not_downloaded() {
    let hub = Hub::start();
    let words = ["org/only-gguf", "GGUF", "model-q4_k_m.gguf", "give its path"];
    hub.run(&["generate", "--model", "org/only-gguf", "Hello"], &[]).fails_with(&words);
}
