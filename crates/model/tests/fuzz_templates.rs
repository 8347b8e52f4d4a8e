//! Templates of strangers render or are errors, whatever stands in them.

use dibit_model::{ChatTemplate, RenderOptions};
use proptest::prelude::*;
use serde_json::json;

/// Parts of templates, and characters in between.
fn source() -> impl Strategy<Value = String> {
    const PARTS: &[&str] = &[
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "{%- ",
        " -%}",
        "{# ",
        " #}",
        "for m in messages",
        "endfor",
        "if ",
        "else",
        "endif",
        "set x = ",
        "generation",
        "endgeneration",
        "raw",
        "endraw",
        "macro f(a, b=1)",
        "endmacro",
        "f(",
        ")",
        "[",
        "]",
        "messages",
        "m.content",
        "x",
        "1",
        "-3",
        "2.5",
        "'%s %d'",
        "'{}'",
        " ~ ",
        " % ",
        " * ",
        " // ",
        " ** ",
        " + ",
        " in ",
        " is ",
        " not ",
        "|",
        "tojson",
        "join",
        "indent",
        "round",
        "int",
        "trim",
        "replace(",
        ",",
        ".",
        ":",
        ".split(",
        ".strip(",
        ".format(",
        "[::-1]",
        "[-1:",
        "none",
        "true",
        "namespace(a=1)",
        "loop.index",
        "\n",
        "é🦀",
    ];
    let part = prop_oneof![
        4 => proptest::sample::select(PARTS).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    proptest::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_panics(source in source(), expression in source()) {
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": null}]);
        for template in [source, format!("{{{{ {expression} }}}}")] {
            let rendered = ChatTemplate::parse(None, Some(&template), "m")
                .and_then(|own| own.expect("a template").render_values(&messages, &RenderOptions::default()));
            if let Err(error) = rendered.map_err(|error| error.to_string()) {
                prop_assert!(error.len() > "chat template: ".len() && !error.contains("panicked"), "{}", error);
            }
        }
    }
}
