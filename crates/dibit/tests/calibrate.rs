//! `dibit calibrate` as a user runs it, and what uses its files.

mod common;

use common::{Folder, Run, fixture, program, run, words};
use serde_json::Value;

/// A directory with a text and a place for a calibration.
struct Place {
    folder: Folder,
    text: String,
    out: String,
}

impl Place {
    fn new() -> Self {
        let folder = Folder::new();
        let (text, out) = (folder.write("text.txt", words(2000)), folder.file("out.safetensors"));
        Place { folder, text, out }
    }

    /// The bundled model on 4 short sequences, unless `further` says something else.
    fn calibrate(&self, kv: &str, further: &[&str]) -> Run {
        let given = |option: &str| further.contains(&option);
        let mut args = vec!["calibrate", "--device", "cpu", "--kv", kv];
        for pair in [["--text", &self.text], ["--out", &self.out], ["--tokens", "256"], ["--context", "64"]] {
            if !given(pair[0]) {
                args.extend(pair);
            }
        }
        args.extend(further);
        run(&args)
    }

    /// What is made of a text in a file of this name.
    fn artefact_of(&self, name: &str, text: &str) -> Vec<u8> {
        let text = self.folder.write(name, text);
        self.calibrate_small("resq", &["--text", &text, "--tokens", "192"]).succeeds();
        self.folder.read("out.safetensors")
    }

    /// [`Place::calibrate`] with a small model.
    fn calibrate_small(&self, kv: &str, further: &[&str]) -> Run {
        let model = fixture("qwen2-bias-bf16");
        self.calibrate(kv, &[&["--model", &model], further].concat())
    }

    /// Fails with these words and leaves the directory as it was.
    #[track_caller]
    fn fails(&self, done: impl FnOnce() -> Run, words: &[&str]) {
        let contents = || {
            let files = self.folder.names().into_iter();
            files.map(|name| (std::fs::read(self.folder.file(&name)).ok(), name)).collect::<Vec<_>>()
        };
        let before = contents();
        done().fails_with(words);
        assert_eq!(contents(), before, "{words:?}");
    }
}

/// Figures of schemes on one window of a text.
fn perplexity(place: &Place, kv: &str, further: &[&str]) -> Run {
    let options = ["perplexity", "--kv", kv, "--text", &place.text, "--context", "300", "--windows", "1"];
    run(&[&options[..], further].concat())
}

#[test]
fn a_file_is_made_and_perplexity_uses_it() {
    let place = Place::new();
    let done = place.calibrate("rotatekv", &[]).succeeds();
    assert!(done.stdout.starts_with(&format!("{}: rotatekv for tiny (bundled) from ", place.out)), "{}", done.stdout);
    assert!(
        done.stdout.contains("256 tokens in sequences of 64, text ")
            && done.stdout.contains(", seed 0, each beginning with BOS (")
    );
    assert_eq!(done.stderr, "running 4 sequences of 64 tokens\n");
    assert_eq!(place.folder.names(), ["out.safetensors", "text.txt"]);

    let json = place.folder.file("out.json");
    perplexity(&place, "rotatekv", &["--calibration", &place.out, "--json", &json]).succeeds();
    let report: Value = serde_json::from_slice(&place.folder.read("out.json")).unwrap();
    let rotated = &report["schemes"][1];
    assert_eq!(rotated["scheme"], "rotatekv");
    let kl = rotated["kl_mean"].as_f64().unwrap();
    assert!(kl > 1e-3 && kl < 10.0, "{kl}");
    let generated = run(&["generate", "--kv", "rotatekv", "--calibration", &place.out, "-n", "4", "Hello"]).succeeds();
    assert!(generated.stdout.starts_with("Hello"), "{}", generated.stdout);
}

#[test]
fn the_same_command_makes_the_same_file() {
    let place = Place::new();
    let of = |kv: &str, further: &[&str]| {
        place.calibrate_small(kv, further).succeeds();
        place.folder.read("out.safetensors")
    };
    let first = of("resq", &[]);
    for threads in ["1", "2", "3", "4"] {
        assert!(first == of("resq", &["--threads", threads]), "{threads} threads");
    }
    assert!(first != of("resq", &["--seed", "1"]));
    assert_eq!(place.folder.names(), ["out.safetensors", "text.txt"]);
}

#[test]
fn each_scheme_finds_its_own_file() {
    let place = Place::new();
    let (rotated, based) = (place.folder.file("rotated"), place.folder.file("based"));
    place.calibrate_small("rotatekv", &["--out", &rotated]).succeeds();
    place.calibrate_small("resq", &["--out", &based]).succeeds();
    let model = fixture("qwen2-bias-bf16");
    let table = |files: &str| {
        let options = ["--model", &model, "--calibration", files];
        perplexity(&place, "kivi,rotatekv,resq", &options).succeeds().stdout
    };
    let either = table(&format!("{rotated},{based}"));
    assert_eq!(either, table(&format!("{based},{rotated}")));
    let names: Vec<&str> = either.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(names[..5], ["scheme", "fp16", "kivi", "rotatekv", "resq"]);

    let nowhere = place.folder.file("nowhere");
    let files = format!("{rotated},{nowhere}");
    let of = || perplexity(&place, "resq", &["--model", &model, "--calibration", &files]);
    let quantiser = format!("{rotated} was made for another quantiser of keys: ");
    place.fails(of, &["no calibration suits scheme resq", &quantiser, &nowhere, "No such file"]);
}

#[test]
fn a_scheme_that_needs_no_calibration_is_refused() {
    let place = Place::new();
    for kv in ["kivi", "fp16"] {
        place.fails(|| place.calibrate(kv, &[]), &[kv, "needs no calibration", "use it as it is"]);
    }
    let unused = || perplexity(&place, "kivi,fp16", &["--calibration", "some.safetensors"]);
    place.fails(unused, &["none of the schemes kivi, fp16 needs a calibration", "leave --calibration out"]);
    place.fails(|| place.calibrate("rotatekw", &[]), &["'rotatekw'", "did you mean 'rotatekv'?"]);
    place.fails(|| place.calibrate(&place.folder.file("x.toml"), &[]), &["x.toml", "No such file"]);
    place.fails(|| place.calibrate("resq", &["--model", "/nowhere"]), &["no such file: /nowhere"]);
}

#[test]
fn a_missing_calibration_names_the_command_that_makes_it() {
    let place = Place::new();
    let words = ["scheme rotatekv needs a calibration", "`dibit calibrate --kv rotatekv`", "--calibration"];
    place.fails(|| perplexity(&place, "kivi,rotatekv", &[]), &words);
    place.fails(|| run(&["generate", "--kv", "rotatekv", "Hello"]), &words);
    place.fails(|| run(&["ruler", "--kv", "rotatekv", "--samples", "1"]), &words);
}

#[test]
fn a_calibration_of_something_else_is_refused() {
    let place = Place::new();
    place.calibrate_small("rotatekv", &[]).succeeds();
    let with = |kv: &str, model: &str| perplexity(&place, kv, &["--calibration", &place.out, "--model", model]);
    let own = fixture("qwen2-bias-bf16");
    with("rotatekv", &own).succeeds();
    place.fails(
        || with("rotatekv", &fixture("mistral-f32")),
        &["out.safetensors", "made for another model", "this run has"],
    );
    place.fails(|| with("rotatekv-window", &own), &["out.safetensors", "another window: none", "128 tokens"]);
    place.fails(|| with("resq", &own), &["out.safetensors", "another quantiser of keys", "dibit calibrate"]);
    let bytes = place.folder.read("out.safetensors");
    place.folder.write("out.safetensors", &bytes[..bytes.len() - 4]);
    place.fails(|| with("rotatekv", &own), &["out.safetensors", "not a usable calibration", "make it again"]);
}

#[test]
fn a_text_that_cannot_be_used_says_why() {
    let place = Place::new();
    let file = |name: &str, text: &[u8]| place.folder.write(name, text);
    let fails = |path: &str, words: &[&str]| place.fails(|| place.calibrate_small("resq", &["--text", path]), words);
    fails(&file("short.txt", b"a short text"), &["tokens and 252 are needed", "longer text", "--tokens", "--context"]);
    fails(&file("empty.txt", b""), &["0 tokens and 252 are needed"]);
    fails(&file("bad.txt", b"fine\nnot \xff fine\n"), &["bad.txt", "not UTF-8", "convert it"]);
    fails(&file("bad.jsonl", b"{\"text\": \"\xff\"}\n"), &["bad.jsonl", "not UTF-8"]);
    fails(&place.folder.file("nowhere.txt"), &["cannot read the text", "nowhere.txt", "No such file"]);
    fails(place.folder.path(), &["cannot read the text", place.folder.path()]);
    let good = "{\"text\": \"fine\"}\n\n";
    for (line, word) in [
        ("{\"text\": \"fine\"", "is not JSON"),
        ("some words", "is not JSON"),
        ("{\"txt\": \"fine\"}", "it is none of"),
        ("{\"text\": 3}", "\"text\" is no text"),
        ("[\"text\"]", "it is none of"),
        ("null", "it is none of"),
    ] {
        // Blank lines are counted.
        let path = file("lines.jsonl", format!("{good}{line}\n{good}").as_bytes());
        fails(&path, &["line 3 of ", "lines.jsonl", word]);
    }
    fails(&file("empty.jsonl", b"\n\n"), &["0 tokens"]);
}

#[test]
fn documents_are_read_one_after_the_other() {
    let place = Place::new();
    let of = |name: &str, text: &str| place.artefact_of(name, text);
    let [a, b] = [words(150), words(120)];
    let plain = of("plain.txt", &format!("{a}\n\n{b}"));
    let lines = format!("{{\"text\": \"{a}\", \"id\": 7}}\r\n\r\n{{\"id\": 8, \"text\": \"{b}\"}}");
    assert!(plain == of("lines.jsonl", &lines));
    assert!(plain == of("LINES.JSONL", &lines));
    assert!(plain != of("lines.txt", &lines));
}

#[test]
fn sequences_are_as_long_as_the_model_allows() {
    let place = Place::new();
    let of = |options: &[&str]| place.calibrate_small("rotatekv", options);
    let (model, out) = (fixture("qwen2-bias-bf16"), place.folder.file("default.safetensors"));
    let inputs = ["calibrate", "--kv", "rotatekv", "--model", &model, "--text", &place.text];
    let done = run(&[&inputs[..], &["--tokens", "1024", "--out", &out]].concat()).succeeds();
    assert!(done.stdout.contains("from 1024 tokens in sequences of 1024"), "{}", done.stdout);
    assert!(of(&["--tokens", "65"]).succeeds().stdout.contains("from 128 tokens in sequences of 64"));
    for context in ["0", "1", "1025"] {
        let words = [&format!("sequences of {context} tokens"), "between 2 and", "1024"];
        place.fails(|| of(&["--context", context]), &words);
    }
    place.fails(|| of(&["--context", "2", "--tokens", &usize::MAX.to_string()]), &["are needed", "--tokens"]);
    for options in [["--tokens", "0"], ["--tokens", "many"], ["--seed", "x"]] {
        of(&options).is_usage_error(&[options[0]]);
    }
}

#[test]
fn a_place_that_cannot_be_written_is_noticed_first() {
    let place = Place::new();
    std::fs::create_dir(place.folder.file("taken")).unwrap();
    let to = |out: &str| place.calibrate("resq", &["--out", out, "--model", "/nowhere"]);
    let nowhere = place.folder.file("nowhere/out.safetensors");
    place.fails(|| to(&nowhere), &["cannot write", &nowhere, "the directory does not exist"]);
    place.fails(|| to(&place.folder.file("taken")), &["cannot write", "taken", "is a directory"]);
    place.fails(|| to(&place.text), &["cannot write", "text.txt", "it is the text"]);
    assert_eq!(std::fs::read_dir(place.folder.file("taken")).unwrap().count(), 0);
    // An earlier calibration is kept where the run fails later.
    place.folder.write("out.safetensors", "earlier");
    place.fails(|| to(&place.out), &["no such file: /nowhere"]);
    place.fails(|| place.calibrate_small("resq", &["--tokens", "999999"]), &["are needed"]);
    place.calibrate_small("resq", &[]).succeeds();
    assert_ne!(place.folder.read("out.safetensors"), b"earlier");
}

#[test]
#[cfg(unix)]
fn what_is_no_file_is_not_replaced() {
    use std::os::unix::fs::FileTypeExt;
    let place = Place::new();
    let socket = place.folder.file("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    place.fails(|| place.calibrate_small("resq", &["--out", &socket]), &["cannot write", "socket", "not a file"]);
    assert!(std::fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
}

#[test]
#[cfg(unix)]
fn a_read_only_directory_is_noticed() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let locked = place.folder.file("locked");
    std::fs::create_dir(&locked).unwrap();
    let mode = |mode| std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o555);
    if std::fs::write(place.folder.file("locked/probe"), "").is_ok() {
        println!("skipped: permissions do not bind this user");
        return;
    }
    let out = place.folder.file("locked/out");
    place.fails(|| place.calibrate("resq", &["--out", &out]), &["cannot write", "locked/out", "Permission denied"]);
    mode(0o755);
    assert_eq!(std::fs::read_dir(&locked).unwrap().count(), 0);
}

#[test]
#[cfg(unix)]
fn ctrl_c_keeps_what_was_gathered_and_the_same_command_goes_on() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};
    let place = Place::new();
    let text = place.folder.write("text.txt", words(10_000));
    // Far more sequences than can run before the signal.
    let options = ["--text", &text, "--tokens", "6400", "--context", "64"];
    let whole = place.folder.file("whole");
    place.calibrate("resq", &[&options[..], &["--out", &whole]].concat()).succeeds();

    let mut command = Command::new(program().get_program());
    command.args(["calibrate", "--device", "cpu", "--kv", "resq", "--out", &place.out, "--threads", "1"]).args(options);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert_eq!(line, "running 100 sequences of 64 tokens\n");
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    stderr.read_to_string(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{line}");
    assert!(output.stdout.is_empty() && line.contains("stopped; the same command goes on from "), "{line}");
    assert_eq!(place.folder.names(), ["out.safetensors.partial", "text.txt", "whole"]);

    let again = |further: &[&str]| place.calibrate("resq", &[&options[..], further].concat());
    place.fails(|| again(&["--seed", "7"]), &["cannot go on from", "out.safetensors.partial", "of another seed: 0"]);
    let done = again(&[]).succeeds();
    // The signal may come before the first sequence is done.
    let so_far = done.stderr.lines().next().unwrap();
    let goes_on = so_far.starts_with(&format!("going on from {}.partial: ", place.out));
    let begins = so_far == "running 100 sequences of 64 tokens";
    assert!((goes_on && so_far.ends_with(" of 100 sequences are done")) || begins, "{}", done.stderr);
    assert_eq!(place.folder.names(), ["out.safetensors", "text.txt", "whole"]);
    assert!(place.folder.read("out.safetensors") == place.folder.read("whole"));
}

#[test]
fn a_damaged_state_is_not_gone_on_from() {
    let place = Place::new();
    place.folder.write("out.safetensors.partial", "no state");
    let words = ["cannot go on from", "out.safetensors.partial", "delete it to begin again"];
    place.fails(|| place.calibrate_small("resq", &[]), &words);
    place.folder.remove("out.safetensors.partial");
    place.calibrate_small("resq", &[]).succeeds();
    assert_eq!(place.folder.names(), ["out.safetensors", "text.txt"]);
}

/// The smallest correction, as a file in the place.
fn corrected(place: &Place) -> String {
    let scheme = "name = \"corrected\"\n[correction]\nkind = \"linear\"\nfeatures = 32\n\
                  [keys]\nbits = 2\naxis = \"channel\"\ngroup = 128\n\
                  [values]\nbits = 2\naxis = \"token\"\ngroup = 128\n\
                  [window]\ntokens = 128\nschedule = \"guaranteed\"\n";
    place.folder.write("mine.toml", scheme)
}

#[test]
fn adapters_are_trained_and_shown() {
    let place = Place::new();
    let kv = corrected(&place);
    let text = place.folder.write("text.txt", words(4000));
    let options = ["--text", &text, "--context", "320", "--batch-tokens", "640", "--tokens", "1921"];
    let done = place.calibrate_small(&kv, &options).succeeds();
    let mut lines = done.stdout.lines();
    let first = lines.next().unwrap();
    assert!(first.starts_with(&format!("{}: corrected for ", place.out)), "{first}");
    assert!(
        first.contains("4 steps of 640 tokens") && first.contains("gates") && first.contains("held out"),
        "{first}"
    );
    assert_eq!(lines.next(), Some(""));
    let header = "layer  held-out KL before    after   change  heads switched off";
    let squeezed = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(lines.next().map(squeezed), Some(squeezed(header)));
    assert!(
        done.stdout.contains("\nall ") && done.stdout.ends_with("KL of attention rows in nats\n"),
        "{}",
        done.stdout
    );
    assert!(done.stderr.starts_with("training 4 steps of 2 sequences of 320 tokens\n"), "{}", done.stderr);
    assert!(done.stderr.contains("\nstep 3 of 4, loss ") && done.stderr.contains(" without)"), "{}", done.stderr);
    let model = fixture("qwen2-bias-bf16");
    perplexity(&place, &format!("kivi,{kv}"), &["--calibration", &place.out, "--model", &model]).succeeds();
}

#[test]
fn recipes_are_chosen_by_options() {
    let place = Place::new();
    let kv = corrected(&place);
    let text = place.folder.write("text.txt", words(4000));
    let held_out = place.folder.write("held.jsonl", format!("{{\"text\": \"{}\"}}", words(700)));
    let of = |further: &[&str]| {
        let usual = ["--text", &text, "--context", "300"];
        // Statistics have so many tokens that steps would follow from them.
        let model = fixture("qwen2-bias-bf16");
        let inputs = ["calibrate", "--kv", &kv, "--model", &model, "--out", &place.out];
        run(&[&inputs[..], &usual, further].concat()).succeeds().stdout
    };
    let small = ["--steps", "1", "--batch-tokens", "300"];
    let default = of(&small);
    assert!(default.contains("1 steps of 300 tokens, rate 0.01 cosine, clip 1, gates"), "{default}");
    let paper = of(&[&small[..], &["--recipe", "paper"]].concat());
    assert!(paper.contains("1 steps of 300 tokens, rate 0.01 constant, clip 1, text"), "{paper}");
    let own = ["--learning-rate", "0.5", "--schedule", "plateau", "--clip", "0", "--mse", "2.5", "--no-gate"];
    let more = ["--init", "apart", "--queries", "0.5", "--heldout", &held_out];
    let own = of(&[&small[..], &own, &more].concat());
    let words = "rate 0.5 plateau, clip 0, output error times 2.5, started apart, 0.5 of the queries";
    assert!(own.contains(words) && own.contains(" held out, "), "{own}");
}

#[test]
fn options_of_training_need_something_to_train() {
    let place = Place::new();
    for option in
        [&["--recipe", "paper"][..], &["--steps", "3"], &["--mse", "1"], &["--no-gate"], &["--heldout", "0.1"]]
    {
        let words = [option[0], "is for training a linear correction", "resq has none", "leave it out"];
        let text = &place.text;
        let inputs = ["calibrate", "--kv", "resq", "--text", text, "--out", &place.out];
        place.fails(|| run(&[&inputs[..], option].concat()), &words);
    }
    for wrong in
        [["--queries", "0"], ["--queries", "1.5"], ["--heldout", "1"], ["--mse", "-1"], ["--learning-rate", "0"]]
    {
        place.calibrate("kvlinc", &wrong).is_usage_error(&[wrong[0]]);
    }
    place.calibrate("kvlinc", &["--steps", "2"]).is_usage_error(&["--tokens", "--steps"]);
    let short = place.folder.write("short.txt", words(50));
    place.fails(|| place.calibrate("kvlinc", &["--text", &short, "--context", "300"]), &["are needed", "longer text"]);
    place.fails(|| place.calibrate("kvlinc", &[]), &["sequences of 64 tokens", "--context must be at least 257"]);
    let held_out = place.folder.file("nowhere.txt");
    place.fails(|| place.calibrate("kvlinc", &["--heldout", &held_out]), &["cannot read the text", "nowhere.txt"]);
}

#[test]
fn entries_of_json_are_documents() {
    let place = Place::new();
    let of = |name: &str, text: &str| place.artefact_of(name, text);
    let [a, b] = [words(150), words(120)];
    let plain = of("plain.txt", &format!("{a}\n\n{b}"));
    assert!(plain == of("list.json", &format!("[{{\"text\": \"{a}\"}}, {{\"text\": \"{b}\"}}]")));
    let sample = format!("[{{\"instruction\": \"{a}\", \"input\": \"\", \"output\": \"{b}\"}}]");
    assert!(plain != of("alpaca.json", &sample));
    let fails = |text: &str, words: &[&str]| {
        let path = place.folder.write("bad.json", text);
        place.fails(|| place.calibrate_small("resq", &["--text", &path]), words);
    };
    fails("{\"text\": \"a\"}", &["bad.json is not a list in JSON"]);
    fails("[{\"text\": \"a\"}, {\"instruction\": \"a\"}]", &["entry 2 of ", "bad.json", "\"output\""]);
    // Several texts are read one after the other.
    let [first, second] = [place.folder.write("a.txt", &a), place.folder.write("b.txt", &b)];
    place.calibrate_small("resq", &["--text", &first, &second, "--tokens", "192"]).succeeds();
    assert!(plain == place.folder.read("out.safetensors"));
}

#[test]
fn help_shows_what_is_kept_and_examples() {
    let help = run(&["calibrate", "--help"]).succeeds().stdout;
    let example = "Examples:\n  dibit calibrate --model ./Qwen3-0.6B\n";
    for part in [
        example,
        "FILE.partial",
        "DIBIT_CACHE_DIR",
        "[default: dibit]",
        "a bundled mix",
        "in the user's folder",
        "[default: 16384]",
        "[default: 2048, or what",
        "the \"text\" of every line",
    ] {
        assert!(help.contains(part), "'{part}' is not in {help}");
    }
}
