//! Conversations, as a program that feeds lines would have them.

mod common;

use common::{Folder, program, run_with_stdin};
use std::io::{Read, Write};
use std::process::{Command, Stdio};

const ANSWER: [&str; 6] = ["chat", "--temperature", "0", "-n", "12", "--kv"];

fn chat(lines: &str) -> common::Run {
    let arguments = [&ANSWER[..], &["kvlinc"]].concat();
    run_with_stdin(&arguments, lines.as_bytes())
}

#[test]
fn commands_are_understood_between_turns() {
    let done = chat("Hello\n/stats\nAnd you?\n/stats\n/reset\n/stats\n/quit\nNever read\n").succeeds();
    let stats: Vec<&str> = done.stderr.lines().filter(|line| line.contains(" messages, ")).collect();
    assert!(stats[0].starts_with("2 messages") && stats[1].starts_with("4 messages"), "{stats:?}");
    assert_eq!(stats[2], "0 messages, 0 of 8192 tokens");
    assert!(done.stderr.contains("forgotten"), "{}", done.stderr);
    assert_eq!(done.stderr.matches("tokens/s").count(), 2, "{}", done.stderr);
}

#[test]
fn a_turn_after_reset_is_a_first_turn() {
    let done = chat("Hello\nAnd you?\n/reset\nHello\n").succeeds();
    let turns: Vec<&str> = done.stderr.lines().filter(|line| line.contains("tokens/s")).collect();
    let prompt = |turn: &str| turn.split(' ').next().unwrap().to_owned();
    assert_eq!(turns.len(), 3, "{}", done.stderr);
    assert_eq!(prompt(turns[0]), prompt(turns[2]));
    let cached = |turn: &str| turn.split(", ").find(|part| part.contains("in the cache")).unwrap().to_owned();
    assert_eq!(cached(turns[0]), cached(turns[2]));
    let answers: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(answers.first(), answers.last());
}

#[test]
#[cfg(unix)]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    // A slow model, so that there is time: made-up weights of a larger shape.
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    let shape = serde_json::json!({"num_hidden_layers": 24, "intermediate_size": 8192, "hidden_size": 640, "eos_token_id": null});
    folder.edit("config.json", shape);
    folder.edit("generation_config.json", serde_json::json!({"eos_token_id": null}));
    let binary = program().get_program().to_owned();
    let mut child = Command::new(binary)
        .args(["chat", "--load-format", "dummy", "--model", folder.path(), "-n", "900", "--kv", "kivi"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"Hello\n").unwrap();
    // The first byte of the answer says that it has begun.
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    stdin.write_all(b"/stats\n/quit\n").unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains(", stopped") && stderr.contains("2 messages"), "{stderr}");
}
