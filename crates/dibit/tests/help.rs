//! What the program tells about itself.

mod common;

use common::{program, run};

const COMMANDS: [&str; 8] = ["generate", "chat", "perplexity", "calibrate", "ruler", "inspect", "bench", "completions"];

#[test]
fn help_lists_the_commands_and_shows_examples() {
    let help = run(&["--help"]).succeeds().stdout;
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
        let own = run(&[command, "--help"]).succeeds().stdout;
        assert!(own.contains(&format!("Usage: dibit {command}")), "{own}");
        let examples = own.split("Examples:\n").nth(1).unwrap_or_else(|| panic!("no examples in {own}"));
        assert!(examples.contains(&format!("dibit {command}")), "{examples}");
    }
    assert!(help.contains("Examples:\n  dibit generate"), "{help}");
}

#[test]
fn help_says_what_the_defaults_are() {
    let help = run(&["generate", "--help"]).succeeds().stdout;
    for part in ["bundled model", "[default: dibit,", "[default: 256]", "one for each core", "the model's"] {
        assert!(help.contains(part), "'{part}' is not in {help}");
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    assert_eq!(run(&["--version"]).succeeds().stdout, format!("dibit {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completion_scripts_name_the_commands() {
    for (shell, start) in [("bash", "_dibit()"), ("zsh", "#compdef dibit"), ("fish", "#")] {
        let done = run(&["completions", shell]).succeeds();
        assert!(done.stdout.starts_with(start) && done.stderr.is_empty(), "{shell}: {}", done.stderr);
        for name in COMMANDS.iter().chain(&["cell", "kv"]) {
            assert!(done.stdout.contains(name), "{name} is not in the script for {shell}");
        }
    }
}

#[test]
fn logs_are_chosen_by_rust_log() {
    let notes = |filter: &str| {
        let mut command = program();
        // A model without calibrations, of which something is said.
        let model = common::fixture("llama32-old-bf16");
        command.env("RUST_LOG", filter).args(["generate", "-n", "1", "-m", &model, "Hello"]);
        common::finish(&mut command).succeeds().stderr
    };
    assert!(notes("info").contains("INFO"));
    assert!(!notes("error").contains("INFO"));
}
