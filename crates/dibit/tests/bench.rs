//! `dibit bench` as a user runs it. No test looks at how fast anything is.

mod common;

use common::{Folder, fixture, run};
use serde_json::Value;

const QUICK: [&str; 4] = ["--repeat", "2", "--sweep", "1"];

fn attention(args: &[&str]) -> Value {
    run(&[&["bench", "attention", "--json"], &QUICK[..], args].concat()).json()
}

fn decode(args: &[&str]) -> Value {
    run(&[&["bench", "decode", "--json", "--tokens", "2"], &QUICK[..], args].concat()).json()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is not a list"))
}

/// Median and quartiles are there, finite, positive and in order.
fn check_spread(value: &Value) {
    let [low, median, high] = ["low", "median", "high"].map(|name| value[name].as_f64().unwrap());
    assert!(low > 0.0 && low <= median && median <= high && high.is_finite(), "{value}");
}

#[test]
fn attention_is_measured_at_every_point() {
    let kv = ["--kv", "kivi,kvlinc", "--head-dim", "64"];
    let points = ["--heads", "4/2,2/2", "--context", "100,300", "--threads", "1,2"];
    let report = attention(&[&kv[..], &points[..]].concat());
    assert_eq!(
        (&report["head_dim"], &report["rounds"], &report["sweep_bytes"]),
        (&64.into(), &2.into(), &1048576.into())
    );
    let points = list(&report["points"]);
    let key = |point: &Value| {
        ["num_attention_heads", "num_key_value_heads", "context", "threads"].map(|name| point[name].as_u64().unwrap())
    };
    let keys: Vec<[u64; 4]> = points.iter().map(key).collect();
    let expected = [[4, 2, 100, 1], [4, 2, 100, 2], [4, 2, 300, 1], [4, 2, 300, 2]];
    assert_eq!(keys[..4], expected);
    assert_eq!(keys[4..], expected.map(|[_, kv, context, threads]| [2, kv, context, threads]));
    for point in points {
        check_spread(&point["read_gb_per_s"]);
        assert!(point["device"].as_str().unwrap().contains(&format!("{} threads", point["threads"])));
        let schemes = list(&point["schemes"]);
        let names: Vec<&str> = schemes.iter().map(|own| own["scheme"].as_str().unwrap()).collect();
        assert_eq!(names, ["fp16", "kivi", "kvlinc"]);
        for own in schemes {
            ["ms", "gb_per_s", "share_of_read", "over_fp16"].iter().for_each(|name| check_spread(&own[*name]));
        }
        assert_eq!(schemes[0]["over_fp16"]["median"], 1.0);
        // Keys and values of 2 heads of 64 channels, 2 bytes each.
        let context = point["context"].as_u64().unwrap();
        assert_eq!(schemes[0]["bytes"], 2 * 2 * 64 * 2 * context);
    }
    // 128 of 300 tokens are packed: 16 bytes of codes on either side, 2 of each key channel's scale and of its minimum,
    // and 4 for the values of a token.
    let packed = 128 * (16 + 16 + 4) + 64 * 4;
    // The correction's states: 256 features of 64 channels and 1 in fp32.
    let states = 256 * 65 * 4;
    assert_eq!(points[2]["schemes"][2]["bytes"], 2 * (packed + states + 2 * 2 * 64 * (300 - 128)));
}

#[test]
fn decoding_is_measured_at_every_depth() {
    let model = fixture("llama32-old-bf16");
    let report =
        decode(&["-m", &model, "--kv", "kvlinc,fp16", "--depth", "300,100", "--prompt", "20", "--threads", "2"]);
    assert_eq!(
        (&report["model"], &report["dtype"], &report["threads"]),
        (&model.as_str().into(), &"bf16".into(), &2.into())
    );
    assert_eq!((&report["prompt"], &report["tokens"], &report["rounds"]), (&20.into(), &2.into(), &2.into()));
    check_spread(&report["read_gb_per_s"]);
    let parameters = run(&["inspect", "-m", &model, "--json"]).json()["parameters"].as_f64().unwrap();
    // All parameters but the norms.
    let weights = report["weight_bytes"].as_f64().unwrap();
    assert!(weights < 2.0 * parameters && weights > 1.9 * parameters, "{weights} of {parameters} parameters");
    let names = |list: &[Value]| list.iter().map(|own| own["scheme"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let prefill = list(&report["prefill"]);
    assert_eq!(names(prefill), ["kvlinc", "fp16"]);
    for own in prefill {
        ["tokens_per_s", "over_first"].iter().for_each(|name| check_spread(&own[*name]));
    }
    let depths = list(&report["depths"]);
    assert_eq!(depths.iter().map(|point| point["depth"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 100, 300]);
    for point in depths {
        let schemes = list(&point["schemes"]);
        assert_eq!(names(schemes), ["kvlinc", "fp16"]);
        for own in schemes {
            let spreads = ["tokens_per_s", "over_first", "over_depth_0", "gb_per_s", "share_of_read"];
            spreads.iter().for_each(|name| check_spread(&own[*name]));
        }
        assert_eq!(schemes[0]["over_first"]["median"], 1.0);
        let fp16 = &run(&["inspect", "-m", &model, "--json", "--context", "100", "--kv", "fp16"]).json()["schemes"][0];
        let per_token = fp16["fp16_bytes"].as_u64().unwrap() / 100;
        assert_eq!(schemes[1]["cache_bytes"], per_token * point["depth"].as_u64().unwrap());
    }
    assert_eq!(depths[0]["schemes"][0]["over_depth_0"]["median"], 1.0);
    if cfg!(target_os = "linux") {
        assert!(report["peak_rss_bytes"].as_u64().unwrap() > 1 << 20, "{report}");
    }
}

#[test]
fn sequences_of_a_batch_read_as_much_each() {
    let points = ["--heads", "4/2", "--head-dim", "64", "--context", "300", "--kv", "kvlinc", "--batch", "1,3"];
    let report = attention(&points);
    let points = list(&report["points"]);
    assert_eq!(points.iter().map(|point| point["batch"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3]);
    let [one, three] = [0, 1].map(|point| list(&points[point]["schemes"]));
    for (one, three) in one.iter().zip(three) {
        assert_eq!(three["bytes"].as_u64().unwrap(), 3 * one["bytes"].as_u64().unwrap());
    }
    let model = fixture("llama32-old-bf16");
    let of =
        |batch: &str| decode(&["-m", &model, "--kv", "kvlinc", "--depth", "200", "--prompt", "0", "--batch", batch]);
    let (one, three) = (of("1"), of("3"));
    let bytes = |report: &Value| report["depths"][1]["schemes"][0]["cache_bytes"].as_u64().unwrap();
    assert_eq!((three["batch"].as_u64(), bytes(&three)), (Some(3), 3 * bytes(&one)));
}

#[test]
fn made_up_weights_have_no_longest_context() {
    let folder = Folder::new();
    let config = folder.write("config.json", std::fs::read(fixture("llama32-old-bf16") + "/config.json").unwrap());
    // The configuration says 1024.
    let long = ["--depth", "1500", "--prompt", "0", "--kv", "kvlinc"];
    let report = decode(&[&["-m", &config, "--load-format", "dummy"], &long[..]].concat());
    assert_eq!(list(&report["depths"])[1]["depth"], 1500);
    assert_eq!(list(&report["prefill"]).len(), 0);
    run(&[&["bench", "decode", "-m", &fixture("llama32-old-bf16")], &long[..]].concat())
        .fails_with(&["the model supports 1024", "--load-format dummy"]);
}

#[test]
fn every_scheme_without_calibration_runs() {
    let all = ["kivi", "kivi-paper", "quarot", "quarot-official", "gear-l", "gear", "akvq-vl"];
    let report = attention(&["--heads", "2/1", "--head-dim", "64", "--context", "400", "--kv", &all.join(",")]);
    assert_eq!(list(&report["points"][0]["schemes"]).len(), 1 + all.len());
    let model = fixture("llama32-old-bf16");
    let report = decode(&["-m", &model, "--depth", "400", "--prompt", "300", "--kv", &all.join(",")]);
    assert_eq!(list(&report["prefill"]).len(), all.len());
}

#[test]
fn figures_are_a_table_and_go_to_a_file_too() {
    let folder = Folder::new();
    let small = ["--heads", "2/1", "--head-dim", "64", "--context", "256", "--kv", "kvlinc"];
    let base = [&["bench", "attention"], &QUICK[..], &small[..]].concat();
    let table = run(&[&base[..], &["--json", &folder.file("out.json")]].concat()).succeeds().stdout;
    for part in
        ["2 query heads on 1 KV heads of 64, 256 tokens", "GB/s", "\nkvlinc ", "of 2 rounds", "1.0 MiB of other"]
    {
        assert!(table.contains(part), "'{part}' is not in {table}");
    }
    let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    assert_eq!(list(&report["points"]).len(), 1);
    let model = fixture("mistral-f32");
    let small = ["-m", &model, "--depth", "50", "--prompt", "10", "--tokens", "1"];
    let table = run(&[&["bench", "decode"], &QUICK[..], &small[..]].concat()).succeeds().stdout;
    for part in ["MistralForCausalLM", "prefill of 10 tokens", "times depth 0", "peak memory"] {
        assert!(table.contains(part), "'{part}' is not in {table}");
    }
}

#[test]
fn throughput_is_measured_at_every_batch() {
    let folder = Folder::new();
    let config = folder.write("config.json", std::fs::read(fixture("llama32-old-bf16") + "/config.json").unwrap());
    let (json, report) = (folder.file("out.json"), folder.file("report"));
    let model = ["bench", "throughput", "-m", &config, "--load-format", "dummy", "--device", "cpu"];
    let sizes = ["--kv", "fp16,kvlinc", "--batch", "3,1", "--prompt", "140", "--generate", "5"];
    let done = run(&[&model[..], &sizes[..], &["--json", &json, "--report", &report]].concat()).succeeds();
    for part in ["prompts of 140 tokens, 5 generated", "times fp16", "\nkvlinc ", "tokens/s of decoding"] {
        assert!(done.stdout.contains(part), "'{part}' is not in {}", done.stdout);
    }
    assert!(done.stderr.contains("kvlinc, batch 3: "), "{}", done.stderr);
    let figures: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    for own in list(&figures["schemes"]) {
        let batches: Vec<u64> = list(&own["points"]).iter().map(|point| point["batch"].as_u64().unwrap()).collect();
        assert_eq!((batches, &own["out_of_memory"]), (vec![1, 3], &Value::Null));
        for name in ["prefill_seconds", "decode_seconds", "decode_tokens_per_s", "tokens_per_s", "peak_bytes"] {
            assert!(own["points"][1][name].as_f64().unwrap() > 0.0, "{name} of {own}");
        }
    }
    let page = String::from_utf8(folder.read("report/index.html")).unwrap();
    assert!(page.contains("kvlinc, batch 3: ") && page.contains("140 tokens"), "{page}");
    assert!(folder.read("report/throughput.svg").starts_with(b"<svg xmlns="));
}

#[test]
fn heads_of_any_multiple_of_eight_are_measured() {
    for head_dim in [8, 72, 248] {
        let size = head_dim.to_string();
        let report = attention(&["--kv", "kivi,kvlinc", "--head-dim", &size, "--heads", "4/2", "--context", "300"]);
        let schemes = list(&report["points"][0]["schemes"]);
        assert_eq!(schemes[0]["bytes"], 2 * 2 * head_dim * 2 * 300);
        schemes.iter().for_each(|own| check_spread(&own["over_fp16"]));
    }
}

#[test]
fn what_cannot_be_measured_is_named() {
    let usage = |args: &[&str], words: &[&str]| run(&[&["bench", "attention"], args].concat()).is_usage_error(words);
    usage(&["--heads", "32/8,16/3"], &["--heads", "16 query heads are not a multiple of 3 KV heads"]);
    usage(&["--heads", "0/8"], &["--heads", "without heads"]);
    usage(&["--heads", "32"], &["--heads", "QUERY/KV"]);
    usage(&["--head-dim", "76"], &["--head-dim", "76 is not supported", "multiples of 8 from 8 to 256"]);
    usage(&["--context", "8192,0"], &["--context", "0 is not in"]);
    usage(&["--context", "many"], &["--context", "many"]);
    usage(&["--threads", "1,0"], &["--threads", "0 is not in"]);
    usage(&["--repeat", "0"], &["--repeat"]);
    usage(&["--batch", "0"], &["--batch", "0 is not in"]);
    let batch = |value: &str| run(&["bench", "throughput", "--batch", value]);
    batch("1,most").is_usage_error(&["--batch", "most", "max for as many"]);
    batch("0").is_usage_error(&["--batch", "from 1 to 65536"]);
    let fails = |args: &[&str], words: &[&str]| run(&[&["bench"], args].concat()).fails_with(words);
    fails(&["attention", "--kv", "none"], &["unknown scheme 'none'"]);
    fails(&["attention", "--context", "134217728", "--heads", "512/512"], &["of memory are free", "--sweep"]);
    fails(&["attention", "--json", "/no/such/directory/x.json"], &["/no/such/directory/x.json"]);
    fails(&["decode", "--kv", "resq"], &["resq", "--calibration"]);
    fails(&["throughput", "--prompt", "8000", "--generate", "400"], &["reaches 8400 tokens", "--load-format dummy"]);
}

#[test]
fn shapes_that_come_along_are_those_of_their_models() {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/llama-3.2-1b.json");
    let plan = run(&["inspect", "--load-format", "dummy", "--json", "-m", model.to_str().unwrap()]).json();
    assert_eq!((&plan["parameters"], &plan["context"]), (&1_235_814_400u64.into(), &131_072.into()));
    for (name, parameters) in
        [("llama-2-7b", 6_738_415_616u64), ("llama-3.1-8b", 8_030_261_248), ("qwen3-1.7b", 1_720_574_976)]
    {
        let model = model.with_file_name(format!("{name}.config.json"));
        let plan = run(&["inspect", "--load-format", "dummy", "--json", "-m", model.to_str().unwrap()]).json();
        assert_eq!(plan["parameters"], parameters, "{name}");
    }
}
