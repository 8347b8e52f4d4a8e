//! `--device` as a user gives it.

mod common;

use common::{Folder, Run, essence, finish, greedy, program, run, words};

/// Whether this machine can run on a GPU; then tests of how one is missed say nothing.
fn has_gpu() -> bool {
    run(&["inspect", "--device", "cuda"]).code == Some(0)
}

/// Every command that runs a model, with what it cannot do without.
fn commands(folder: &Folder) -> Vec<Vec<String>> {
    let text = folder.write("text.txt", words(200));
    let out = folder.file("out.safetensors");
    let all: [&[&str]; 9] = [
        &["generate", "Hello"],
        &["chat"],
        &["perplexity", "--text", &text],
        &["compare", "--text", &text],
        &["ruler"],
        &["calibrate", "--kv", "rotatekv", "--text", &text, "--out", &out],
        &["inspect"],
        &["bench", "attention"],
        &["bench", "decode"],
    ];
    all.map(|args| args.iter().map(|arg| (*arg).to_owned()).collect()).to_vec()
}

fn with_device(args: &[String], device: &str) -> Run {
    finish(program().args(args).args(["--device", device]))
}

#[test]
fn values_that_name_no_device_are_refused_by_every_command() {
    for args in commands(&Folder::new()) {
        with_device(&args, "cuda:x").is_usage_error(&["--device", "cuda:x", "'x' is not a number", "cuda:0"]);
        with_device(&args, "gpu").is_usage_error(&["--device", "'gpu'", "auto, cpu, cuda or cuda:N"]);
    }
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_with_the_reason() {
    if has_gpu() {
        return;
    }
    for args in commands(&Folder::new()) {
        let done = with_device(&args, "cuda");
        done.fails_with(&["--device cuda:0: ", "NVIDIA driver", "--device cpu"]);
        assert!(!done.stderr.contains("INFO"), "{}", done.stderr);
    }
}

#[test]
fn without_a_gpu_the_cpu_is_taken_and_that_is_said_once() {
    if has_gpu() {
        return;
    }
    let notes = |args: &[&str]| {
        let stderr = run(&[&["generate", "-n", "1", "Hello"], args].concat()).succeeds().stderr;
        stderr.lines().filter(|line| line.contains("device: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    for args in [&[][..], &["--device", "auto"]] {
        let notes = notes(args);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("device: CPU, ") && notes[0].contains("(no GPU: the NVIDIA driver "), "{notes:?}");
    }
    assert!(notes(&["--device", "cpu"]).is_empty());
    assert!(notes(&["--threads", "1"])[0].ends_with("(--threads is for the CPU)"));
}

#[test]
fn the_cpu_can_be_asked_for_and_computes_what_auto_computes_there() {
    let text = |args: &[&str]| essence(&greedy(&[args, &["-n", "8", "Once upon a time"]].concat()));
    assert_eq!(text(&["--device", "cpu"]), text(&["--threads", "1"]));
    let kv = ["--heads", "2/1", "--head-dim", "64", "--context", "64", "--kv", "kivi", "--repeat", "1", "--sweep", "1"];
    let report = run(&[&["bench", "attention", "--json", "--device", "cpu"], &kv[..]].concat()).json();
    assert!(report["points"][0]["device"].as_str().unwrap().starts_with("CPU, "), "{report}");
}

#[test]
fn options_of_the_cpu_are_refused_with_a_gpu() {
    run(&["generate", "--device", "cuda", "--threads", "2", "Hello"])
        .fails_with(&["--threads is for the CPU", "--device cpu"]);
    let mut command = program();
    command.env("DIBIT_ISA", "scalar").args(["generate", "--device", "cuda", "Hello"]);
    finish(&mut command).fails_with(&["--isa (or DIBIT_ISA) is for the CPU", "--device cpu"]);
    run(&["bench", "attention", "--device", "cuda", "--threads", "1,2"]).fails_with(&["--threads is for the CPU"]);
}

#[test]
fn inspect_shows_what_was_found_where_that_is_asked_for() {
    let plain = run(&["inspect", "--kv", "fp16"]).succeeds().stdout;
    assert!(!plain.contains("driver"), "{plain}");
    if has_gpu() {
        return;
    }
    for args in [&["--device"][..], &["--device", "auto"]] {
        let shown = run(&[&["inspect", "--kv", "fp16"], args].concat()).succeeds().stdout;
        assert!(shown.contains("\ndevice ") && shown.contains("\nNVIDIA driver "), "{shown}");
        assert!(shown.contains("libcuda.so.1 was not found"), "{shown}");
        let report = run(&[&["inspect", "--json"], args].concat()).json();
        assert!(report["devices"]["found"]["NVIDIA driver"].as_str().unwrap().contains("not found"), "{report}");
    }
    let cpu = run(&["inspect", "--device", "cpu"]).succeeds().stdout;
    assert!(cpu.contains("\ndevice  CPU, ") && !cpu.contains("driver"), "{cpu}");
}
