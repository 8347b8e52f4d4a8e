//! Calibrations that are made and found without being named.

mod common;
#[path = "../../model/tests/common/mod.rs"]
mod file;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::{Folder, Run, finish, program};
use file::{Gguf, tiny};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::OnceLock;

/// A model without calibrations, and a user with an empty folder for them.
struct User {
    model: Folder,
    home: Folder,
}

impl User {
    /// A tiny random model, whose sequences are short.
    fn with_small_model() -> Self {
        let model = Folder::of_fixture("llama32-old-bf16");
        model.edit("config.json", json!({"max_position_embeddings": 256}));
        User { model, home: Folder::new() }
    }

    /// The same with its calibration in the user's folder, which is made once for all tests.
    fn with_calibration() -> Self {
        static MADE: OnceLock<(String, Vec<u8>)> = OnceLock::new();
        let (name, bytes) = MADE.get_or_init(|| {
            let user = User::with_small_model();
            user.generate(&["--calibrate", "now"]).succeeds();
            (user.files().remove(0), std::fs::read(user.file()).unwrap())
        });
        let user = User::with_small_model();
        std::fs::create_dir_all(user.home.file("dibit/calibrations")).unwrap();
        user.home.write(&format!("dibit/calibrations/{name}"), bytes);
        user
    }

    /// The bundled model as a directory.
    fn with_real_model() -> Self {
        let model = Folder::new();
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            model.write(name, std::fs::read(tiny().join(name)).unwrap());
        }
        User { model, home: Folder::new() }
    }

    fn command(&self, args: &[&str]) -> assert_cmd::Command {
        let mut command = program();
        command.env_remove("DIBIT_CACHE_DIR").env_remove("DIBIT_CALIBRATE");
        command.env("XDG_CACHE_HOME", self.home.path()).env("HOME", self.home.path()).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        finish(&mut self.command(args))
    }

    fn generate(&self, further: &[&str]) -> Run {
        self.run(&[&["generate", "--device", "cpu", "-n", "2", "-m", self.model.path(), "Hello"], further].concat())
    }

    /// The user's calibrations, and whatever else lies there.
    fn files(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.home.file("dibit/calibrations")) else { return Vec::new() };
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The one file in the user's folder.
    fn file(&self) -> String {
        let files = self.files();
        assert!(files.len() == 1 && files[0].ends_with(".safetensors"), "{files:?}");
        self.home.file(&format!("dibit/calibrations/{}", files[0]))
    }
}

/// What JSON says of the calibration of a run.
fn calibration(run: Run) -> Value {
    run.json()["cache"]["calibration"].clone()
}

#[test]
fn what_cannot_run_is_refused_before_a_calibration() {
    let user = User::with_small_model();
    let refused = user.generate(&["--calibrate", "now", "-c", "100000"]);
    refused.fails_with(&["a context of 100000 tokens exceeds the 256 that the model supports"]);
    assert!(user.files().is_empty() && !refused.stderr.contains("making one"), "{}", refused.stderr);
}

#[test]
fn a_missing_calibration_is_made_once() {
    let user = User::with_small_model();
    let first = user.generate(&[]).succeeds();
    assert!(first.stderr.contains("no calibration of scheme dibit for this model yet: making one"), "{}", first.stderr);
    assert!(first.stderr.contains("; Ctrl-C skips it\n") && !first.stderr.contains("WARN"), "{}", first.stderr);
    let place = user.file();
    assert!(first.stderr.contains("\ncache    dibit: "), "{}", first.stderr);
    assert!(first.stderr.contains(&format!("; calibration: {place} (key ")), "{}", first.stderr);
    let made = std::fs::read(&place).unwrap();

    let second = user.generate(&["--json"]).json();
    assert_eq!(second["cache"]["scheme"], "dibit");
    assert_eq!(second["cache"]["calibration"]["file"], place.as_str());
    assert_eq!(second["cache"]["calibration"]["key"].as_str().unwrap().len(), 16);
    for further in [&["--kv", "dibit"][..], &["--calibrate", "never"]] {
        let again = user.generate(further).succeeds();
        assert!(again.stderr.contains(&place) && !again.stderr.contains("making one"), "{}", again.stderr);
    }
    assert_eq!(std::fs::read(user.file()).unwrap(), made);

    // `dibit calibrate` makes the same file, and says where it is; `inspect` finds it.
    std::fs::remove_file(&place).unwrap();
    let done = user.run(&["calibrate", "--device", "cpu", "-m", user.model.path()]).succeeds();
    assert!(done.stdout.starts_with(&format!("{place}: dibit for ")), "{}", done.stdout);
    assert!(std::fs::read(user.file()).unwrap() == made);
    let table = user.run(&["inspect", "-m", user.model.path()]).succeeds().stdout;
    assert!(table.contains(&format!("dibit: calibration {place} (key ")), "{table}");
    assert!(table.contains(&format!(
        "kvlinc: no calibration of this model; `dibit calibrate --kv kvlinc --model {}`",
        user.model.path()
    )));
    let report = user.run(&["inspect", "--kv", "kivi,dibit", "--json", "-m", user.model.path()]).json();
    assert_eq!(report["schemes"][0]["calibration"], Value::Null);
    assert_eq!(report["schemes"][1]["calibration"]["file"], place.as_str());
}

#[test]
fn evaluations_do_not_calibrate_by_themselves() {
    let user = User::with_small_model();
    let text = user.home.write("text.txt", common::words(400));
    let words = ["scheme dibit needs a calibration", "`dibit calibrate --kv dibit --model "];
    let model = ["--device", "cpu", "-m", user.model.path(), "--kv", "dibit"];
    user.run(&[&["perplexity", "--text", &text, "--context", "200"], &model[..]].concat()).fails_with(&words);
    user.run(&[&["ruler", "--samples", "1"], &model[..]].concat()).fails_with(&words);
    // Nor does a scheme that was asked for.
    user.generate(&["--kv", "dibit"]).fails_with(&words);
    assert!(user.files().is_empty());
    let text = ["perplexity", "--text", &text, "--context", "200"];
    let user = User::with_calibration();
    let model = ["--device", "cpu", "-m", user.model.path(), "--kv", "dibit"];
    user.run(&[&text, &model[..]].concat()).succeeds();
}

#[test]
fn who_wants_none_runs_without() {
    let user = User::with_small_model();
    let done = user.generate(&["--calibrate", "never"]).succeeds();
    let command = format!("`dibit calibrate --kv dibit --model {}` makes one", user.model.path());
    assert!(
        done.stderr.contains("no calibration of scheme dibit") && done.stderr.contains(&command),
        "{}",
        done.stderr
    );
    assert!(done.stderr.contains("\ncache    k3v2: "), "{}", done.stderr);
    assert_eq!(calibration(user.generate(&["--calibrate", "never", "--json"])), Value::Null);
    assert!(user.files().is_empty());
    user.generate(&["--calibrate", "often"]).is_usage_error(&["--calibrate", "never"]);
}

#[test]
fn a_chat_calibrates_too() {
    let user = User::with_small_model();
    let template = user.model.write("template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let args = ["chat", "--device", "cpu", "-n", "2", "-m", user.model.path(), "--chat-template", &template];
    let done = finish(user.command(&args).write_stdin("/stats\n")).succeeds();
    assert!(done.stderr.contains("making one takes about"), "{}", done.stderr);
    assert!(done.stderr.contains("\ndibit: ") && done.stderr.contains(&user.file()), "{}", done.stderr);
}

#[test]
fn every_form_of_a_model_finds_its_calibration() {
    let user = User::with_real_model();
    let made = ["calibrate", "--device", "cpu", "-m", user.model.path(), "--tokens", "2048", "--context", "512"];
    user.run(&made).succeeds();
    let place = user.file();
    assert_eq!(calibration(user.generate(&["--json", "--dtype", "f32"]))["file"], place.as_str());
    let path = user.home.file("model.gguf");
    let of = |gguf: &Gguf| {
        gguf.write(Path::new(&path));
        let args = ["generate", "--device", "cpu", "-n", "2", "--json", "--calibrate", "never", "-m", &path, "Hello"];
        calibration(user.run(&args))
    };
    for kind in [GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q2K] {
        assert_eq!(of(&Gguf::of_checkpoint(&tiny(), kind))["file"], place.as_str(), "{kind:?}");
    }
    // So do files that say rotary frequencies in another way.
    let small = User::with_calibration();
    Gguf::of_checkpoint(Path::new(small.model.path()), GgmlDType::F16).write(Path::new(&path));
    let args = ["generate", "--device", "cpu", "-n", "2", "--json", "-m", &path, "Hello"];
    assert_eq!(calibration(small.run(&args))["file"], small.file().as_str());
    // A fine-tune whose norms are the same.
    let mut gguf = Gguf::of_checkpoint(&tiny(), GgmlDType::F16);
    for (name, tensor) in &mut gguf.tensors {
        let plain = tensor.dequantize(&Device::Cpu).unwrap();
        if name.contains("attn_q") {
            let (rows, cols) = plain.dims2().unwrap();
            let ones = Tensor::ones((rows, cols), candle_core::DType::F32, &Device::Cpu).unwrap();
            let norm = |t: &Tensor| f64::from(t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt());
            let changed = (&plain + (ones * (0.03 * norm(&plain))).unwrap()).unwrap();
            *tensor = QTensor::quantize(&changed, GgmlDType::F16).unwrap();
        }
    }
    assert_eq!(of(&gguf), Value::Null);
}

#[test]
#[cfg(unix)]
fn ctrl_c_skips_a_calibration_and_goes_on() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};
    let user = User::with_real_model();
    let mut command = Command::new(program().get_program());
    command.env_remove("DIBIT_CACHE_DIR").env("XDG_CACHE_HOME", user.home.path()).env("HOME", user.home.path());
    // However long it takes: the signal comes first.
    command.args(["generate", "--device", "cpu", "--threads", "1", "--kv", "kvlinc", "--calibrate", "now", "-n", "2"]);
    command.args(["-m", user.model.path(), "Hello"]).env_remove("RUST_LOG");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("Ctrl-C skips it") {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "{said}");
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("Hello"));
    assert!(said.contains("\ncache    kvlinc: ") && user.files().is_empty(), "{said}");
}

#[test]
fn a_damaged_file_is_made_again() {
    let user = User::with_calibration();
    let place = user.file();
    let whole = std::fs::read(&place).unwrap();
    for damaged in [b"", &b"not a calibration"[..], &whole[..whole.len() - 9]] {
        std::fs::write(&place, damaged).unwrap();
        let done = user.generate(&["--calibrate", "never"]).succeeds();
        assert_eq!(done.stderr.matches("WARN").count(), 1, "{}", done.stderr);
        assert!(done.stderr.contains(&format!("{place} is not a usable calibration")), "{}", done.stderr);
        assert!(done.stderr.contains("it is ignored"), "{}", done.stderr);
    }
    let done = user.generate(&["--calibrate", "now"]).succeeds();
    assert_eq!(done.stderr.matches("WARN").count(), 1, "{}", done.stderr);
    assert!(std::fs::read(user.file()).unwrap() == whole);
}

/// The run calibrated, warned once that this cannot be kept, and used it.
#[track_caller]
fn goes_on_without_keeping(done: Run, words: &[&str]) {
    let done = done.succeeds();
    assert_eq!(done.stderr.matches("WARN").count(), 1, "{}", done.stderr);
    for word in
        [words, &["used for this run alone", "--out FILE", "\ncache    dibit: ", "calibration: in memory"]].concat()
    {
        assert!(done.stderr.contains(word), "'{word}' is not in {}", done.stderr);
    }
}

#[test]
fn a_folder_that_cannot_be_made_costs_a_warning() {
    let user = User::with_small_model();
    // A file lies where the folder should.
    user.home.write("dibit", "in the way");
    goes_on_without_keeping(user.generate(&["--calibrate", "now"]), &["cannot make the folder"]);
    let calibrate = ["calibrate", "--device", "cpu", "-m", user.model.path(), "--tokens", "512"];
    user.run(&calibrate).fails_with(&["cannot be kept in the user's folder", "--out FILE", "DIBIT_CACHE_DIR"]);
    let out = user.model.file("out.safetensors");
    user.run(&[&calibrate[..], &["--out", &out]].concat()).succeeds();
    assert!(Path::new(&out).is_file());
}

#[test]
#[cfg(unix)]
fn a_read_only_home_costs_a_warning() {
    use std::os::unix::fs::PermissionsExt;
    let user = User::with_small_model();
    let mode = |mode| std::fs::set_permissions(user.home.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o555);
    if std::fs::write(user.home.file("probe"), "").is_ok() {
        println!("skipped: permissions do not bind this user");
        return;
    }
    goes_on_without_keeping(user.generate(&["--calibrate", "now"]), &["Permission denied"]);
    mode(0o755);
    assert!(user.files().is_empty());
}

#[test]
#[cfg(unix)]
fn a_full_disk_costs_a_warning() {
    let user = User::with_small_model();
    // Files end at 512 bytes, as if the disk were full.
    let limited = "trap '' XFSZ; ulimit -f 1; exec \"$@\"";
    let generate = user.command(&[]).get_program().to_owned();
    let mut command = assert_cmd::Command::new("sh");
    command.args(["-c", limited, "sh"]).arg(generate);
    command.args(["generate", "--device", "cpu", "-n", "2", "--calibrate", "now", "-m", user.model.path(), "Hello"]);
    command.env_remove("DIBIT_CACHE_DIR").env_remove("DIBIT_CALIBRATE").env_remove("RUST_LOG");
    command.env("XDG_CACHE_HOME", user.home.path()).env("HOME", user.home.path());
    goes_on_without_keeping(finish(&mut command), &["cannot write the calibration", "File too large"]);
    assert!(user.files().is_empty(), "{:?}", user.files());
}

#[test]
fn two_runs_at_once_leave_one_whole_file() {
    let user = User::with_small_model();
    let runs: Vec<Run> = std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| user.generate(&["--temperature", "0", "--calibrate", "now"])));
        both.map(|run| run.join().unwrap()).into()
    });
    let texts: Vec<String> = runs.into_iter().map(|run| run.succeeds().stdout).collect();
    assert_eq!(texts[0], texts[1]);
    let place = user.file();
    assert_eq!(calibration(user.generate(&["--json", "--calibrate", "never"]))["file"], place.as_str());
}

#[test]
fn a_file_of_an_older_version_is_refused_with_the_command() {
    let user = User::with_calibration();
    let mut bytes = std::fs::read(user.file()).unwrap();
    let version = b"\\\"version\\\":\\\"3\\\"";
    let at = bytes.windows(version.len()).position(|window| window == version).unwrap();
    bytes[at + version.len() - 3] = b'1';
    std::fs::remove_file(user.file()).unwrap();
    let command = format!("`dibit calibrate --kv dibit --model {}`", user.model.path());
    let old = user.home.file("old.safetensors");
    std::fs::write(&old, &bytes).unwrap();
    for further in [&["--kv", "dibit"][..], &[]] {
        let words = [&old, "is of version 1 of calibrations", &command];
        user.generate(&[&["--calibration", &old], further].concat()).fails_with(&words);
    }
    // Beside the model it is said of its own scheme, if it has words or the name of that, and another one is used.
    let words = b"with error feedback";
    let at = bytes.windows(words.len()).position(|window| window == words).unwrap();
    bytes[at] = b'W';
    std::fs::create_dir(user.model.file("calibration")).unwrap();
    std::fs::write(user.model.file("calibration/dibit.safetensors"), &bytes).unwrap();
    let done = user.generate(&["--calibrate", "never"]).succeeds();
    assert_eq!(done.stderr.matches("is of version 1 of calibrations").count(), 1, "{}", done.stderr);
    assert!(done.stderr.contains(&command) && done.stderr.contains("\ncache    k3v2: "), "{}", done.stderr);
    assert!(!user.generate(&["--kv", "kvlinc"]).succeeds().stderr.contains("version 1"));
}

#[test]
fn a_calibration_of_another_model_beside_this_one_is_said() {
    let user = User::with_calibration();
    std::fs::create_dir(user.model.file("calibration")).unwrap();
    std::fs::rename(user.file(), user.model.file("calibration/dibit.safetensors")).unwrap();
    assert!(
        user.generate(&["--json"]).json()["cache"]["calibration"]["file"]
            .as_str()
            .unwrap()
            .ends_with("/calibration/dibit.safetensors")
    );
    user.model.edit("config.json", json!({"max_position_embeddings": 256, "rope_theta": 10_000.0}));
    let done = user.generate(&["--calibrate", "never"]).succeeds();
    let words = "was made for another model: its rotary frequencies are not those of this run";
    assert!(done.stderr.contains(words) && done.stderr.contains("it is ignored"), "{}", done.stderr);
}

#[test]
fn the_variable_names_the_folder() {
    let user = User::with_small_model();
    let folder = user.home.file("mine");
    let run = |further: &[&str]| {
        let args = [&["generate", "--device", "cpu", "-n", "2", "--json", "-m", user.model.path(), "Hello"], further];
        finish(user.command(&args.concat()).env("DIBIT_CACHE_DIR", &folder).env("DIBIT_CALIBRATE", "now"))
    };
    let place = calibration(run(&[]))["file"].as_str().unwrap().to_owned();
    assert!(place.starts_with(&format!("{folder}/dibit-")), "{place}");
    assert_eq!(calibration(run(&["--calibrate", "never"]))["file"], place.as_str());
    assert!(user.files().is_empty());
}
