//! `dibit ruler` as a user runs it.

mod common;

use common::{Folder, Run, fixture, run};
use serde_json::Value;

/// A small model of 1024 tokens and a scheme without notes.
fn ruler(args: &[&str]) -> Run {
    run(&[&["ruler", "--kv=kivi", "--model", &fixture("qwen2-bias-bf16")], args].concat())
}

fn lines(folder: &Folder, name: &str) -> Vec<Value> {
    let text = String::from_utf8(folder.read(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn cells(table: &str) -> Vec<Vec<&str>> {
    table.lines().map(|line| line.split_whitespace().collect()).collect()
}

#[test]
fn the_bundled_model_is_measured_and_all_figures_agree() {
    let folder = Folder::new();
    let [json, csv, dump] = ["out.json", "out.csv", "prompts.jsonl"].map(|name| folder.file(name));
    let options = ["ruler", "--kv", "fp16,kvlinc", "--tasks", "niah_single_1,niah_multivalue", "--context", "400,512"];
    let done = run(&[&options[..], &["--samples=1", "--json", &json, "--csv", &csv, "--dump", &dump]].concat());
    let done = done.succeeds();
    assert!(done.stderr.contains("noise sentences stand in for essays"), "{}", done.stderr);
    assert!(done.stdout.contains("--samples 1 --seed 42; noise stands in"), "{}", done.stdout);

    let table = cells(&done.stdout);
    assert_eq!(table[0], ["scheme", "context", "single_1", "multivalue", "mean"]);
    let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    assert_eq!((&report["model"], &report["samples"]), (&"tiny (bundled)".into(), &1.into()));
    assert_eq!((&report["haystack"], &report["chat"]), (&Value::Null, &false.into()));
    let results = report["results"].as_array().unwrap();
    let prompts = lines(&folder, "prompts.jsonl");
    let mut csv = "scheme,context,task,score\n".to_owned();
    for (index, (scheme, context)) in
        [("fp16", 400), ("fp16", 512), ("kvlinc", 400), ("kvlinc", 512)].iter().enumerate()
    {
        let row = &results[index];
        assert_eq!((&row["scheme"], &row["context"]), (&(*scheme).into(), &(*context).into()));
        let mut expected = vec![(*scheme).to_owned(), context.to_string()];
        let mut sum = 0.0;
        for (number, task) in ["niah_single_1", "niah_multivalue"].iter().enumerate() {
            let figures = &row["tasks"][number];
            let sample = &figures["samples"][0];
            let prompt = &prompts[2 * (index % 2) + number];
            assert_eq!((&figures["task"], &prompt["task"]), (&(*task).into(), &(*task).into()));
            assert_eq!(sample["outputs"], prompt["outputs"]);
            let tokens = sample["prompt_tokens"].as_u64().unwrap() + 128;
            assert!(tokens <= *context && prompt["length"] == tokens && prompt["context"] == *context);
            assert!((1..=128).contains(&sample["generated_tokens"].as_u64().unwrap()));
            let prediction = sample["prediction"].as_str().unwrap();
            let answers = prompt["outputs"].as_array().unwrap();
            let found = answers.iter().filter(|answer| prediction.contains(answer.as_str().unwrap())).count();
            let score = 100.0 * found as f64 / answers.len() as f64;
            assert_eq!((&figures["score"], &sample["score"]), (&score.into(), &(score / 100.0).into()));
            expected.push(format!("{score:.1}"));
            csv += &format!("{scheme},{context},{task},{score:.2}\n");
            sum += score;
        }
        assert_eq!(row["mean"], sum / 2.0);
        expected.push(format!("{:.1}", sum / 2.0));
        assert_eq!(table[index + 1], expected);
    }
    assert_eq!(String::from_utf8(folder.read("out.csv")).unwrap(), csv);
}

#[test]
fn figures_depend_on_the_seed_alone() {
    let folder = Folder::new();
    let of = |seed: &str, further: &[&str]| {
        let (json, dump) = (folder.file("out.json"), folder.file("prompts.jsonl"));
        let options = ["--context=1024", "--tasks=niah_single_1,niah_multikey_2", "--samples=2", "--seed", seed];
        ruler(&[&options[..], &["--json", &json, "--dump", &dump], further].concat()).succeeds();
        (folder.read("out.json"), folder.read("prompts.jsonl"))
    };
    let one = of("1", &["--parallel=1", "--threads=1"]);
    assert_eq!(one, of("1", &["--parallel=3", "--threads=2"]));
    assert_ne!(one.1, of("2", &[]).1);
}

#[test]
fn all_tasks_fit_a_short_context() {
    let folder = Folder::new();
    let dump = folder.file("prompts.jsonl");
    let done = run(&["ruler", "--kv=kivi", "--context=900", "--samples=1", "--dump", &dump]).succeeds();
    let header = "scheme context single_1 single_2 single_3 multikey_1 multikey_2 multikey_3 multivalue multiquery vt cwe \
                  fwe mean";
    assert_eq!(cells(&done.stdout)[0], header.split(' ').collect::<Vec<_>>());
    assert!(done.stdout.contains("\n\nscheme  copied"), "{}", done.stdout);
    let prompts = lines(&folder, "prompts.jsonl");
    assert_eq!(prompts.len(), 11);
    for prompt in prompts {
        let text = |name: &str| prompt[name].as_str().unwrap().to_owned();
        assert!((750..=900).contains(&prompt["length"].as_u64().unwrap()), "{prompt}");
        for answer in prompt["outputs"].as_array().unwrap() {
            let times = text("input").matches(answer.as_str().unwrap()).count();
            assert!(if text("task").starts_with("niah") { times == 1 } else { times >= 1 }, "{answer}: {prompt}");
        }
        assert!(text("answer_prefix").starts_with(' ') && text("input").ends_with(['?', '.']));
    }
}

#[test]
fn random_tokens_are_copied_less_well_from_fewer_bits() {
    let folder = Folder::new();
    let of = |further: &[&str]| {
        let (json, csv) = (folder.file("out.json"), folder.file("out.csv"));
        let options =
            ["ruler", "--kv=kivi,q4_0,q8_0", "--tasks=copying", "--samples=1", "--json", &json, "--csv", &csv];
        let done = run(&[&options[..], further].concat()).succeeds();
        let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
        (done.stdout, report, String::from_utf8(folder.read("out.csv")).unwrap())
    };
    let (stdout, report, csv) = of(&[]);
    let copying = &report["copying"];
    assert!(report["results"].as_array().unwrap().is_empty());
    assert_eq!(
        ["copied_tokens", "context", "samples", "tokens"].map(|name| copying[name].as_u64().unwrap()),
        [380, 761, 1, 379]
    );
    let table = cells(&stdout);
    assert_eq!(table[0], ["scheme", "copied", "top-1", "KL", "mean"]);
    let mut expected = "scheme,context,task,score\n".to_owned();
    let figures: Vec<[f64; 3]> = ["fp16", "kivi", "q4_0", "q8_0"]
        .iter()
        .enumerate()
        .map(|(index, scheme)| {
            let row = &copying["schemes"][index];
            assert_eq!(row["scheme"], *scheme);
            let [copied, agreement, kl] =
                ["copied", "top1_agreement", "kl_mean"].map(|name| row[name].as_f64().unwrap());
            let shown = [100.0 * copied, 100.0 * agreement].map(|share| format!("{share:.1}"));
            assert_eq!(table[index + 1], [*scheme, &shown[0], &shown[1], &format!("{kl:.4}")]);
            expected += &format!("{scheme},761,copying,{:.2}\n", 100.0 * copied);
            [copied, agreement, kl]
        })
        .collect();
    assert_eq!(csv, expected);
    assert_eq!(figures[0][1..], [1.0, 0.0]);
    assert!(figures.iter().all(|[copied, ..]| (0.0..=1.0).contains(copied)), "{figures:?}");
    let [_, kivi, four, eight] = [0, 1, 2, 3].map(|index| figures[index][2]);
    assert!(0.0 < eight && eight < four && four < kivi, "{figures:?}");
    assert_eq!((stdout, report.clone(), csv), of(&["--threads=1", "--context=512"]));
    assert_ne!(report, of(&["--seed=1"]).1);
}

#[test]
fn an_essay_comes_from_text_or_json() {
    let folder = Folder::new();
    let essay = "A red fox ran. It saw\n a \"wall\".  The end was near.";
    let text = folder.write("essay.txt", essay);
    let json = folder.write("essay.JSON", serde_json::json!({"title": 1, "text": essay}).to_string());
    let of = |haystack: &str| {
        let (dump, json) = (folder.file("prompts.jsonl"), folder.file("out.json"));
        let options =
            ["--context=900", "--tasks=niah_single_2", "--haystack", haystack, "--dump", &dump, "--json", &json];
        let done = ruler(&options).succeeds();
        assert!(!done.stderr.contains("stand in") && !done.stdout.contains("stands in"), "{}", done.stderr);
        let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
        assert_eq!(report["haystack"], haystack);
        lines(&folder, "prompts.jsonl")
    };
    let prompts = of(&text);
    assert_eq!(prompts, of(&json));
    assert!(prompts[0]["input"].as_str().unwrap().contains("It saw a \"wall\". "), "{}", prompts[0]);
}

#[test]
fn a_haystack_that_cannot_be_used_says_why() {
    let folder = Folder::new();
    let cases = [
        (folder.file("nowhere.txt"), ["cannot read the haystack", "No such file"]),
        (folder.path().to_owned(), ["cannot read the haystack", folder.path()]),
        (folder.write("empty.txt", ""), ["empty.txt", "the haystack is empty"]),
        (folder.write("blank.txt", " \n\t\n"), ["blank.txt", "give some pages of text"]),
        (folder.write("bad.txt", b"fine \xff"), ["bad.txt is not UTF-8", "convert it"]),
        (folder.write("bad.json", "{\"text\": "), ["bad.json is malformed", "EOF"]),
        (
            folder.write("other.json", "{\"essay\": \"a\"}"),
            ["other.json has no text in a field \"text\"", "plain text"],
        ),
        (folder.write("number.json", "{\"text\": 3}"), ["number.json has no text", "plain text"]),
        (folder.write("list.json", "[]"), ["list.json has no text", "plain text"]),
        (folder.write("empty.json", "{\"text\": \"\"}"), ["empty.json", "the haystack is empty"]),
    ];
    for (file, words) in cases {
        ruler(&["--haystack", &file]).fails_with(&words);
    }
}

#[test]
fn an_unknown_task_gets_the_nearest_name() {
    for (name, words) in [
        ("niah_singel_1", ["'niah_singel_1'", "did you mean 'niah_single_1'?"]),
        ("vt,niah-multiquery", ["'niah-multiquery'", "did you mean 'niah_multiquery'?"]),
        ("", ["unknown task ''", "niah_single_1, niah_single_2"]),
        ("coping", ["'coping'", "did you mean 'copying'?"]),
        ("qa_1", ["'qa_1'", "vt, cwe, fwe, copying"]),
    ] {
        ruler(&["--tasks", name]).fails_with(&words);
    }
}

#[test]
fn tasks_are_named_once_each_in_the_order_asked_for() {
    let done =
        ruler(&["--context=1024", "--samples=1", "--tasks=niah_single_2, niah_single_1,niah_single_2"]).succeeds();
    assert_eq!(cells(&done.stdout)[0], ["scheme", "context", "single_2", "single_1", "mean"]);
}

#[test]
fn a_context_must_suit_task_and_model() {
    let short = ["of them for the answer", "the context is 300", "longer --context", "--tasks"];
    for task in ["vt", "cwe", "niah_multikey_3"] {
        let needs = format!("{task} needs ");
        run(&["ruler", "--kv=kivi", "--context=300", "--tasks", task])
            .fails_with(&[&[needs.as_str()], &short[..]].concat());
    }
    let short = Folder::of_fixture("qwen2-bias-bf16");
    short.edit("config.json", serde_json::json!({"max_position_embeddings": 700}));
    run(&["ruler", "--kv=kivi", "--context=700", "--tasks=vt,copying", "-m", short.path()]).fails_with(&[
        "copying needs 76",
        "the model takes 700",
        "--tasks",
    ]);
    ruler(&["--context=512,1025"]).fails_with(&["a context of 1025 tokens", "1024", "max_position_embeddings"]);
    run(&["ruler", "--context=0"]).is_usage_error(&["--context"]);
    run(&["ruler", "--context=512,many"]).is_usage_error(&["--context"]);
    run(&["ruler", "--samples=0"]).is_usage_error(&["--samples"]);
    ruler(&["--kv=kivi,kvlink"]).fails_with(&["'kvlink'", "did you mean 'kvlinc'?"]);
}

#[test]
fn figures_that_cannot_be_written_are_known_before_anything_runs() {
    let folder = Folder::new();
    for option in ["--json", "--csv", "--dump"] {
        let file = folder.file("nowhere/out");
        ruler(&[option, &file]).fails_with(&["cannot write", "nowhere/out", "the directory does not exist"]);
    }
    assert!(folder.names().is_empty());
}

#[test]
fn with_chat_the_question_is_a_turn() {
    let folder = Folder::new();
    let of = |further: &[&str]| {
        let json = folder.file("out.json");
        let options = ["--context=1024", "--tasks=niah_single_1", "--samples=1", "--json", &json];
        let done = ruler(&[&options[..], further].concat()).succeeds();
        assert_eq!(done.stdout.contains("--seed 42 --chat"), !further.is_empty(), "{}", done.stdout);
        let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
        assert_eq!(report["chat"], !further.is_empty());
        report["results"][0]["tasks"][0]["samples"][0]["prompt_tokens"].as_u64().unwrap()
    };
    let (raw, chat) = (of(&[]), of(&["--chat"]));
    assert!(raw != chat && raw.max(chat) <= 1024 - 128, "{raw} {chat}");
    let model = fixture("llama2-linear-f16");
    run(&["ruler", "--kv=kivi", "--context=1024", "--model", &model, "--chat"]).fails_with(&[
        "has no chat template",
        "leave --chat out",
        "--chat-template",
    ]);
}

#[test]
fn prompts_longer_than_a_pass_are_announced_once() {
    let done = ruler(&["--context=1024", "--tasks=niah_single_1", "--samples=3", "--cell=256"]).succeeds();
    assert_eq!(done.stderr.matches("cells of 256").count(), 1, "{}", done.stderr);
    assert_eq!(done.stderr.matches(" is read in 4 passes").count(), 1, "{}", done.stderr);
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_a_run_without_figures() {
    use std::process::{Command, Stdio};
    let folder = Folder::new();
    let (json, dump) = (folder.file("out.json"), folder.file("prompts.jsonl"));
    // Far more prompts than can run before the signal.
    let options = ["ruler", "--kv=kivi", "--context=1024", "--tasks=niah_single_1", "--samples=400"];
    let mut command = Command::new(common::program().get_program());
    command.args(options).args(["--json", &json, "--dump", &dump]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    while !std::path::Path::new(&dump).exists() {
        std::thread::yield_now();
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.stdout.is_empty(), "{output:?}");
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted: "), "{output:?}");
    assert_eq!(folder.names(), ["prompts.jsonl"]);
}

#[test]
fn help_shows_tasks_and_examples() {
    let help = run(&["ruler", "--help"]).succeeds().stdout;
    for part in [
        "Examples:\n  dibit ruler",
        "niah_multikey_1 to 3",
        "copying is none of RULER's",
        "[default: 4096]",
        "share that is found",
    ] {
        assert!(help.contains(part), "'{part}' is not in {help}");
    }
}
