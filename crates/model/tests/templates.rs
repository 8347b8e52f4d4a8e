//! Chat templates and expressions render as with Jinja2, set up as Hugging Face transformers does it.
//! `tools/golden_templates.py` makes the golden values.

use dibit_model::{ChatTemplate, RenderOptions};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// What is known to differ, and why.
const KNOWN: &[&str] = &[
    // A tuple of a template is a list and has parentheses.
    r#"{{ (1, 'two') }}"#,
    r#"{{ (1,) }}"#,
    r#"{{ () }}"#,
    r#"{{ [1] + (2,) }}"#,
    r#"{{ (1,) + (2,) }}"#,
    r#"{{ [1, 2] == (1, 2) }}"#,
    r#"{{ (1, 2, 3)[1:] }}"#,
    r#"{{ text.startswith(['He']) }}"#,
    r#"{{ '%s' % ('a', 'b') }}"#,
    r#"{{ 1,2 }}"#,
    r#"{{ 1, 'a', }}"#,
    r#"{% set a = 1, 2 %}{{ a }}"#,
    // minijinja calculates operators between literals itself.
    r#"{{ 7 % -3 }}"#,
    r#"{{ -7.5 % 2 }}"#,
    r#"{{ 1 / 0 }}"#,
    r#"{{ 1.0 // 0 }}"#,
    r#"{{ 1 < 'a' }}"#,
    r#"{{ none < 1 }}"#,
    r#"{{ 0 and 1 / 0 }}"#,
    // Syntax that minijinja reads in another way.
    r#"{{ +seven - -seven }}"#,
    r#"{{ nested.0.1.0 }}"#,
    r#"{{ self.x }}"#,
    r#"{{ mapping|attr('get')('a') }}"#,
    r#"{{ text|attr('upper')() }}"#,
    r#"{{ none is none is none }}"#,
    // `str.format` without `!r` and `%`, and `isidentifier`.
    r#"{{ 'a_1'.isidentifier() }}"#,
    r#"{{ '{:.2f} {:5d} {:05d} {:,} {:x} {:%}'.format(pi, 42, 42, 1234567, 255, 0.25) }}"#,
    r#"{{ '{!r} {!s}'.format('a', 'b') }}"#,
    // Dicts take any key, 1 and True are two, and a sort takes values of any kind.
    r#"{{ [1, 'a']|sort }}"#,
    r#"{{ {1: 'a', true: 'b', none: 'c', 2.5: 'd'}|tojson }}"#,
    r#"{{ {[1]: 2} }}"#,
    // A generator is a list.
    r#"{{ 'yes' if people|selectattr('age', 'gt', 99) else 'no' }}"#,
    r#"{{ people|selectattr('age', 'gt', 99)|length }}"#,
    r#"{{ people|map(attribute='name')|tojson }}"#,
    r#"{% set gen = numbers|select('odd') %}{{ gen|list }}{{ gen|list }}"#,
    // Methods of texts are there only where they are called.
    r#"{{ text.upper is callable }}"#,
    // Macros have no `varargs`, and no defaults that name other parameters.
    r#"{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, z=4) }}"#,
    r#"{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}"#,
];

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/templates")
}

fn golden(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixtures().join(name)).unwrap()).unwrap()
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// What a template gives, or its error.
fn render(template: &str, config: &Value, messages: &Value, options: &RenderOptions) -> Result<String, String> {
    let template = ChatTemplate::parse(Some(&config.to_string()), Some(template), "m").map_err(|e| e.to_string())?;
    template.unwrap().render_values(messages, options).map_err(|error| error.to_string())
}

fn with(arguments: Value) -> RenderOptions {
    RenderOptions { add_generation_prompt: true, arguments: object(&arguments) }
}

/// Says how an outcome differs from a golden case.
fn difference(case: &Value, outcome: &Result<String, String>) -> Option<String> {
    let differs = match (outcome, case["text"].as_str(), case["refused"].as_str()) {
        (Ok(text), Some(expected), _) => text != expected,
        (Err(error), None, Some(refusal)) => !error.starts_with(&format!("chat template: {refusal}")),
        (Err(_), None, None) => false,
        _ => true,
    };
    differs.then(|| format!("{case}\n  gives {outcome:?}"))
}

fn assert_none(differences: &[String], of: usize) {
    assert!(differences.is_empty(), "{} of {of} differ:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn templates_render_as_with_jinja() {
    let golden = golden("cases.json");
    let cases = golden["cases"].as_array().unwrap();
    let mut templates = std::collections::BTreeSet::new();
    let mut differences = Vec::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        templates.insert(name);
        let source = std::fs::read_to_string(fixtures().join(format!("{name}.jinja"))).unwrap();
        let messages = &golden["conversations"][case["conversation"].as_str().unwrap()];
        let arguments = case["arguments"].as_str().map_or(Map::new(), |name| object(&golden["arguments"][name]));
        let options = RenderOptions { add_generation_prompt: case["prompt"].as_bool().unwrap(), arguments };
        let difference = difference(case, &render(&source, &golden["special_tokens"], messages, &options));
        // Jinja2 goes to the `else` of a loop whose every turn ends with `continue`; minijinja only if there is none.
        if name == "internlm2" && case["conversation"] == "empty" {
            assert!(difference.is_some());
        } else {
            differences.extend(difference);
        }
    }
    assert!(templates.len() >= 45 && cases.len() > 1000);
    assert_none(&differences, cases.len());
}

#[test]
fn expressions_give_what_jinja_gives() {
    let golden = golden("expressions.json");
    let cases = golden["cases"].as_array().unwrap();
    let options = with(golden["variables"].clone());
    let mut differences = Vec::new();
    for case in cases {
        let template = case["template"].as_str().unwrap();
        let difference = difference(case, &render(template, &json!({}), &json!([]), &options));
        if KNOWN.contains(&template) {
            assert!(difference.is_some(), "{template} does not differ any more");
        } else {
            differences.extend(difference);
        }
    }
    assert!(cases.len() > 500);
    assert_none(&differences, cases.len());
}

#[test]
fn a_failure_names_its_cause_and_line() {
    let fails = |template: &str, parts: &[&str]| {
        let error = render(template, &json!({}), &json!([{"role": "user"}]), &with(json!({}))).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{error}");
        }
    };
    fails("a\nb {{ messages[0].content.x }}", &["messages[0].content.x", "undefined", "line 2", "b {{"]);
    fails("\n\n{{ raise_exception('Roles must alternate') }}", &["chat template: Roles must alternate", "line 3"]);
    fails("{% macro m() %}\n{{ raise_exception('No') }}{% endmacro %}{{ m() }}", &["chat template: No", "line 2"]);
    fails("{{ 1 +\n }}", &["line 2"]);
    fails("\n{{ messages | nosuch }}", &["nosuch", "line 2"]);
}

#[test]
fn a_runaway_template_is_an_error() {
    let nested = format!("{}{}{}", "[".repeat(100), "ns.a", "]".repeat(100));
    let loops = "{% for i in range(90000) %}";
    let ends = "{% endfor %}";
    for template in [
        format!("{loops}{loops}{ends}{ends}"),
        format!("{loops}{}{ends}", "x".repeat(1000)),
        format!("{{% set x %}}{loops}{}{ends}{{% endset %}}", "x".repeat(1000)),
        format!("{{% set ns = namespace(a='x') %}}{loops}{{% set ns.a = ns.a ~ ns.a %}}{ends}"),
        format!("{{% set ns = namespace(a=[1]) %}}{loops}{{% set ns.a = ns.a + ns.a %}}{ends}"),
        format!("{{% set ns = namespace(a=1) %}}{loops}{{% set ns.a = {nested} %}}{ends}{{{{ ns.a }}}}"),
        format!(
            "{{% set ns = namespace(a='ab') %}}{loops}{{% set ns.a = ns.a|reverse %}}{ends}{loops}{loops}{ends}{ends}"
        ),
        "{{ 'x' * 99999999999 }}".to_owned(),
        "{{ ('x' * 900000).replace('x', 'y' * 900000) }}".to_owned(),
        "{{ '{:999999999}'.format(1) }}{{ '%999999999d' % messages|length }}".to_owned(),
        "{{ 'a'.center(99999999999) }}".to_owned(),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned(),
        format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)),
    ] {
        let outcome = render(&template, &json!({}), &json!([]), &with(json!({})));
        assert!(outcome.is_err(), "{}", &template[..template.len().min(200)]);
    }
}
