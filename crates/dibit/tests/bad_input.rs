//! Prompts, schemes, options and places for output that cannot be used.

mod common;

use common::{Folder, fixture, run, run_with_stdin, words};

/// A small model and a scheme without notes.
fn generate(args: &[&str]) -> common::Run {
    run(&[&["generate", "--kv=kivi", "--model", &fixture("qwen2-bias-bf16")], args].concat())
}

#[test]
fn an_empty_prompt_is_refused() {
    generate(&[""]).fails_with(&["the prompt is empty"]);
    generate(&[]).fails_with(&["the prompt is empty"]);
    run_with_stdin(&["generate"], b"").fails_with(&["the prompt is empty"]);
    let folder = Folder::new();
    for blank in ["", "\n\n", " \n\t\n"] {
        let file = folder.write("prompts.txt", blank);
        generate(&["--prompts", &file]).fails_with(&["prompts.txt", "holds no prompts"]);
    }
}

#[test]
fn text_must_be_utf8_wherever_it_comes_from() {
    let folder = Folder::new();
    let file = folder.write("bad.txt", b"fine\nnot \xff fine\n");
    run_with_stdin(&["generate"], b"not \xff fine").fails_with(&["stdin", "not UTF-8", "convert it"]);
    generate(&["--prompts", &file]).fails_with(&["bad.txt", "not UTF-8", "convert it"]);
    run(&["perplexity", "--text", &file]).fails_with(&["bad.txt", "not UTF-8", "convert it"]);
    run(&["generate", "--kv", &folder.write("bad.toml", b"\xff"), "Hello"]).fails_with(&["bad.toml", "UTF-8"]);
}

#[test]
fn files_of_prompts_must_be_readable() {
    let folder = Folder::new();
    generate(&["--prompts", &folder.file("nowhere")]).fails_with(&["nowhere", "No such file"]);
    generate(&["--prompts", folder.path()]).fails_with(&[folder.path(), "cannot read the prompts"]);
}

#[test]
fn a_prompt_must_fit_the_context() {
    let prompt = words(40);
    generate(&["--json", "--context", "16", &prompt]).fails_with(&["the context is 16", "shorten the prompt"]);
    let long = words(1200);
    let beyond = generate(&["--json", &long]);
    beyond.fails_with(&["the model supports 1024", "shorten the prompt"]);
    assert!(!beyond.stderr.contains("--context"), "{}", beyond.stderr);
    let folder = Folder::new();
    let file = folder.write("prompts.txt", format!("Hello\n{long}\n"));
    generate(&["--prompts", &file]).fails_with(&["the model supports 1024", "shorten the prompt"]);
}

#[test]
fn the_context_must_suit_the_model() {
    let model = fixture("llama32-old-bf16");
    for command in ["generate", "chat"] {
        let done = run_with_stdin(&[command, "--model", &model, "--context", "1025"], b"Hello");
        done.fails_with(&["a context of 1025 tokens", "1024", "max_position_embeddings"]);
    }
}

#[test]
fn an_unknown_scheme_gets_the_nearest_name() {
    for command in [&["generate", "Hello"][..], &["inspect"], &["chat"], &["perplexity", "--text", "none.txt"]] {
        run(&[command, &["--kv", "kvlink"]].concat()).fails_with(&["'kvlink'", "did you mean 'kvlinc'?", "kivi-paper"]);
    }
    let far = run(&["inspect", "--kv", "fp16,turboquant"]);
    far.fails_with(&["'turboquant'", "fp16, kivi", ".toml"]);
    assert!(!far.stderr.contains("did you mean"), "{}", far.stderr);
}

#[test]
fn a_scheme_file_that_cannot_be_used_says_why() {
    let folder = Folder::new();
    let base = "name = \"mine\"\n[keys]\nbits = 2\n[values]\nbits = 2\n[window]\ntokens = 128\nschedule = \"kivi\"\n";
    run(&["generate", "--kv", &folder.file("nowhere.toml"), "Hello"]).fails_with(&["nowhere.toml", "No such file"]);
    let cases = [
        (base.replacen("bits = 2", "bits = 7", 1), ["keys.bits = 7", "2, 3, 4, 5, 6, 8, 16"]),
        (
            base.replacen("bits = 2", "bits = 2\nclip = 0.5", 1),
            ["keys.clip", "supported: these with quantizer = \"integer-zero\""],
        ),
        (
            format!("{base}[layers.\"0..99\"]\nkeys = {{ bits = 4 }}\n"),
            ["layers 0..99 of a model with 6", "within 0..6"],
        ),
        (
            base.replacen("bits = 2", "bits = 2\ntransform = \"basis\"", 1),
            ["needs a calibration", "dibit calibrate --kv"],
        ),
        (base.replace("tokens = 128", "tokens = 100"), ["window.tokens = 100", "multiples of 128"]),
        (base.split("[window]").next().unwrap().to_owned(), ["without a [window]", "tokens = 128"]),
        (base.replace("\"kivi\"", "\"lazy\""), ["unknown variant `lazy`", "`guaranteed`"]),
        (format!("{base}[sink]\n"), ["malformed", "unknown field `sink`"]),
        (format!("{base}[sinks]\nkind = \"first\"\ncount = 0\n"), ["sinks.count = 0", "1 to 1024"]),
        ("name = ".to_owned(), ["malformed", "line 1"]),
        (String::new(), ["malformed", "missing field `name`"]),
    ];
    run(&["inspect", "--kv", &folder.write("good.toml", base)]).succeeds();
    for (text, words) in cases {
        let file = folder.write("bad.toml", text);
        run(&["generate", "--kv", &file, "Hello"]).fails_with(&[&words[..], &["bad.toml"]].concat());
    }
}

#[test]
fn sampling_has_its_ranges() {
    let cases = [
        ("--temperature=-1", "temperature is -1"),
        ("--temperature=nan", "temperature is NaN"),
        ("--temperature=101", "between 0 (greedy) and 100"),
        ("--top-p=0", "above 0 and at most 1"),
        ("--top-p=2", "above 0 and at most 1"),
    ];
    for (option, word) in cases {
        generate(&[option, "Hello"]).fails_with(&[word, "must be"]);
        run(&["chat", "--kv=kivi", option]).fails_with(&[word, "must be"]);
    }
}

#[test]
fn command_lines_that_make_no_sense_are_refused() {
    let cases: [(&[&str], &str); 15] = [
        (&["generate", "--threads", "0", "Hello"], "--threads"),
        (&["generate", "--threads", "many", "Hello"], "--threads"),
        (&["generate", "--context", "0", "Hello"], "--context"),
        (&["generate", "--cell", "0", "Hello"], "multiple of 128"),
        (&["generate", "--cell", "200", "Hello"], "multiple of 128"),
        (&["generate", "--max-tokens=-2", "Hello"], "--max-tokens"),
        (&["generate", "--temperature", "hot", "Hello"], "--temperature"),
        (&["generate", "--dtype", "int8", "Hello"], "bf16"),
        (&["generate", "--load-format", "pickle", "Hello"], "dummy"),
        (&["generate", "--unknown", "Hello"], "--unknown"),
        (&["generate", "--prompts", "some.txt", "Hello"], "--prompts"),
        (&["generate", "--parallel", "2"], "--prompts"),
        (&["perplexity"], "--text"),
        (&["completions", "tcsh"], "zsh"),
        (&["frobnicate"], "frobnicate"),
    ];
    for (args, word) in cases {
        run(args).is_usage_error(&[word]);
    }
    let nothing = run(&[]);
    assert_eq!((nothing.code, nothing.stdout.as_str()), (Some(2), ""));
    assert!(nothing.stderr.contains("Usage: dibit <COMMAND>"), "{}", nothing.stderr);
}

#[test]
fn a_text_to_evaluate_must_fill_a_window() {
    let folder = Folder::new();
    let model = fixture("qwen2-bias-bf16");
    let perplexity = |file: &str, context: &str| {
        run(&["perplexity", "--kv=kivi", "--model", &model, "--text", file, "--context", context])
    };
    let short = folder.write("short.txt", "a short text");
    perplexity(&short, "64").fails_with(&["a window needs 63", "longer text", "--context"]);
    perplexity(&folder.write("empty.txt", ""), "64").fails_with(&["the text has 0 tokens"]);
    perplexity(&folder.file("nowhere.txt"), "64").fails_with(&["nowhere.txt", "No such file"]);
    perplexity(folder.path(), "64").fails_with(&[folder.path(), "cannot read the text"]);
    for context in ["0", "1", "1025"] {
        perplexity(&short, context).fails_with(&[&format!("a context of {context} tokens"), "between 2 and", "1024"]);
    }
}

#[test]
fn figures_that_cannot_be_written_leave_nothing_behind() {
    let folder = Folder::new();
    let text = folder.write("text.txt", words(200));
    let model = fixture("qwen2-bias-bf16");
    let perplexity = |context: &str, json: &str| {
        run(&["perplexity", "--kv=kivi", "--model", &model, "--text", &text, "--context", context, "--json", json])
    };
    std::fs::create_dir(folder.file("taken")).unwrap();
    let before = folder.names();
    perplexity("64", &folder.file("nowhere/out.json")).fails_with(&[
        "cannot write",
        "nowhere/out.json",
        "the directory does not exist",
    ]);
    perplexity("64", &folder.file("taken")).fails_with(&["cannot write", "taken", "is a directory"]);
    // The place is fine and the run fails later.
    perplexity("1024", &folder.file("out.json")).fails_with(&["a window needs 1023"]);
    assert_eq!(folder.names(), before);
    assert_eq!(std::fs::read_dir(folder.file("taken")).unwrap().count(), 0);

    let kept = folder.write("kept.json", "earlier figures");
    perplexity("1024", &kept).fails_with(&["a window needs 1023"]);
    assert_eq!(folder.read("kept.json"), b"earlier figures");
    perplexity("64", &kept).succeeds();
    assert!(folder.read("kept.json").starts_with(b"{"));
    assert_eq!(folder.names(), ["kept.json", "taken", "text.txt"]);
}

#[test]
#[cfg(unix)]
fn a_read_only_directory_is_noticed() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    let text = folder.write("text.txt", words(200));
    std::fs::create_dir(folder.file("locked")).unwrap();
    let mode = |mode| std::fs::set_permissions(folder.file("locked"), std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o555);
    if std::fs::write(folder.file("locked/probe"), "").is_ok() {
        println!("skipped: permissions do not bind this user");
        return;
    }
    let options =
        ["perplexity", "--kv=kivi", "--text", &text, "--context", "64", "--json", &folder.file("locked/out.json")];
    run(&options).fails_with(&["cannot write", "locked/out.json", "Permission denied"]);
    assert_eq!(std::fs::read_dir(folder.file("locked")).unwrap().count(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = std::process::Command::new(common::program().get_program())
        .args(["generate", "-n", "2", "--temperature", "0", "Hello"])
        .stdout(full())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write to standard output") && !stderr.contains("panicked"), "{stderr}");

    let folder = Folder::new();
    folder.write("text.txt", "Some words of a text. ".repeat(40));
    let text = folder.file("text.txt");
    let arguments =
        ["perplexity", "--kv", "fp16", "--context", "64", "--windows", "1", "--text", &text, "--json", "/dev/full"];
    run(&arguments).fails_with(&["cannot write /dev/full", "disk full"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_closed_stderr_is_no_reason_to_fail() {
    let output = std::process::Command::new("sh")
        .arg("-c")
        .arg("exec \"$0\" generate -n 2 --temperature 0 Hello 2>/dev/full")
        .arg(common::program().get_program())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.starts_with(b"Hello"));
}

#[test]
fn cells_that_nothing_reads_are_refused() {
    let exact: [&[&str]; 3] = [
        &["generate", "--prefill", "exact", "Hello"],
        &["inspect", "--prefill", "exact"],
        &["bench", "throughput", "--prefill", "exact"],
    ];
    for command in exact.into_iter().chain([&["perplexity", "--text", "none", "--kv", "kivi"][..]]) {
        run(&[command, &["--cell", "256"]].concat())
            .fails_with(&["--cell is for --prefill cells", "leave one of the two out"]);
    }
    let without: [&[&str]; 3] = [
        &["compare", "--text", "none", "--samples", "0"],
        &["bench", "decode", "--prompt", "0"],
        &["ruler", "--tasks", "copying"],
    ];
    for (command, option) in without.into_iter().flat_map(|own| [(own, "--cell=256"), (own, "--prefill=exact")]) {
        run(&[command, &[option]].concat()).fails_with(&["say how prompts are read", command[command.len() - 2]]);
    }
}
