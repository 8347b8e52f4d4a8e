//! Filters, tests and functions of Jinja where minijinja's own differ or are missing.

use super::arguments::Arguments;
use super::environment::{self, Budget};
use super::json;
use super::lists::{Tuple, is_list, pairs};
use super::methods::{capitalize, is_space, pad, replace, strip};
use super::operators::{self, put};
use super::print::{invalid, text};
use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, Error, FormatStyle, State, Value, filters};
use std::borrow::Cow;

type Filter = fn(&Budget, &State, &Value, &Arguments) -> Result<Value, Error>;

const FILTERS: [(&str, Filter); 27] = [
    ("string", |_, _, value, _| own(text(value)?)),
    ("upper", |_, _, value, _| own(text(value)?.to_uppercase())),
    ("lower", |_, _, value, _| own(text(value)?.to_lowercase())),
    ("capitalize", |_, _, value, _| own(capitalize(&text(value)?))),
    ("title", |_, _, value, _| own(title(&text(value)?))),
    ("wordcount", |_, _, value, _| Ok(Value::from(words(&text(value)?)))),
    ("escape", |_, _, value, _| own(escape(&text(value)?))),
    ("e", |_, _, value, _| own(escape(&text(value)?))),
    ("tojson", |_, _, value, arguments| own(json::tojson(value, arguments)?)),
    ("trim", trim),
    ("replace", |budget, _, value, arguments| {
        let part = |at, name| Ok::<_, Error>(arguments.get(at, name)?.unwrap_or_default());
        let (old, new) = (part(0, "s_old")?, part(1, "s_new")?);
        own(replace(budget, &text(value)?, &text(&old)?, &text(&new)?, arguments.integer(2, "count")?)?)
    }),
    ("center", |budget, _, value, arguments| {
        own(pad(budget, &text(value)?, arguments.integer(0, "width")?.unwrap_or(80), " ", Some(true))?)
    }),
    ("indent", indent),
    ("truncate", truncate),
    ("join", join),
    ("format", |budget, _, value, arguments| own(put(budget, FormatStyle::Printf, &text(value)?, arguments.all())?)),
    ("length", length),
    ("count", length),
    ("items", |_, _, value, _| match value.is_undefined() {
        true => Ok(Value::from(Vec::<Value>::new())),
        false => Ok(pairs(value)?.into_iter().map(|(key, item)| Tuple::value([key, item])).collect()),
    }),
    ("dictsort", dictsort),
    ("sum", sum),
    ("int", int),
    ("float", |_, _, value, arguments| {
        let default = arguments.get(0, "default")?.unwrap_or(Value::from(0.0));
        Ok(number(value)?.map_or(default, Value::from))
    }),
    ("round", round),
    // A lazy one would nest where a loop applies it again and again.
    ("reverse", |_, _, value, _| match filters::reverse(value)? {
        list if is_list(&list) => Ok(list.try_iter()?.collect()),
        text => Ok(text),
    }),
    ("attr", |_, state, value, arguments| {
        let name = arguments.get(0, "name")?.unwrap_or_default();
        let is_dict = value.kind() == ValueKind::Map;
        match environment::attribute(&text(&name)?) {
            Some(method) => state.apply_filter(method, std::slice::from_ref(value)),
            None if is_dict => Ok(Value::UNDEFINED),
            None => value.get_item(&name),
        }
    }),
    // An operator of its own for the loop: it says what it cannot go through.
    ("for", |_, _, value, _| match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
            Err(invalid(format!("a value of the kind {} cannot be iterated over", value.kind())))
        }
        _ => Ok(value.clone()),
    }),
];

/// Adds them to an environment.
pub(super) fn add(environment: &mut Environment, budget: &Budget) {
    for (name, filter) in FILTERS {
        let budget = budget.clone();
        environment.add_filter(name, move |state: &State, value: &Value, Rest(arguments): Rest<Value>| {
            let result = filter(&budget, state, value, &Arguments::of(&arguments)?)?;
            budget.produce(result.as_str().map_or(0, str::len))?;
            Ok::<_, Error>(result)
        });
    }
    // Not of Jinja.
    for name in ["bool", "chain", "lines", "split", "zip"] {
        environment.remove_filter(name);
    }
    environment.add_test("sequence", |value: &Value| {
        is_list(value) || matches!(value.kind(), ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("iterable", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Plain)
    });
    environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_function("dict", |Rest(arguments): Rest<Value>| {
        let mut entries = Vec::new();
        for argument in arguments {
            match argument.kind() {
                ValueKind::Map => entries.extend(pairs(&argument)?),
                _ => {
                    for pair in argument.try_iter()? {
                        entries.push((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?));
                    }
                }
            }
        }
        Ok::<Value, Error>(entries.into_iter().collect())
    });
}

fn own<'a>(text: impl Into<Cow<'a, str>>) -> Result<Value, Error> {
    Ok(Value::from(text.into()))
}

fn words(text: &str) -> usize {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count()
}

fn title(text: &str) -> String {
    let parts = text.split_inclusive(|c: char| is_space(c) || "-({[<".contains(c));
    parts.map(capitalize).collect()
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

fn trim(_: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let chars = arguments.get(0, "chars")?;
    let chars = chars.as_ref().map(text).transpose()?;
    own(strip(&text(value)?, chars.as_deref(), [true, true]))
}

fn indent(budget: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let width = arguments.get(0, "width")?.unwrap_or(Value::from(4));
    let indent = match width.as_str() {
        Some(text) => text.to_owned(),
        None => pad(budget, "", i64::try_from(width)?, " ", None)?,
    };
    let (first, blank) = (arguments.is_true(1, "first")?, arguments.is_true(2, "blank")?);
    let source = text(value)?;
    budget.produce(source.matches('\n').count().saturating_mul(indent.len()))?;
    let lines = source.split('\n').enumerate().map(|(at, line)| {
        let indented = if at == 0 { first } else { blank || !line.is_empty() };
        format!("{}{line}", if indented { &indent } else { "" })
    });
    own(lines.collect::<Vec<_>>().join("\n"))
}

fn truncate(_: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let source = text(value)?;
    let size = |at, name, default| Ok::<_, Error>(arguments.integer(at, name)?.unwrap_or(default).max(0) as usize);
    let (length, leeway) = (size(0, "length", 255)?, size(3, "leeway", 5)?);
    if source.chars().count() <= length.saturating_add(leeway) {
        return own(source);
    }
    let end = arguments.get(2, "end")?.unwrap_or("...".into());
    let end = text(&end)?;
    let cut: String = source.chars().take(length.saturating_sub(end.chars().count())).collect();
    let kept =
        if arguments.is_true(1, "killwords")? { &cut } else { cut.rsplit_once(' ').map_or(&*cut, |(kept, _)| kept) };
    own(format!("{kept}{end}"))
}

fn length(_: &Budget, _: &State, value: &Value, _: &Arguments) -> Result<Value, Error> {
    if value.is_undefined() { Ok(Value::from(0)) } else { filters::length(value).map(Value::from) }
}

/// What `attribute` names in an item, such as `a.b.0`.
fn attribute(item: Value, path: &Option<Value>) -> Result<Value, Error> {
    let Some(path) = path else { return Ok(item) };
    text(path)?.split('.').try_fold(item, |item, name| match name.parse::<usize>() {
        Ok(place) => item.get_item(&Value::from(place)),
        Err(_) => item.get_item(&Value::from(name)),
    })
}

fn join(budget: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let (separator, path) = (arguments.get(0, "d")?.unwrap_or("".into()), arguments.get(1, "attribute")?);
    let separator = text(&separator)?;
    let mut out = String::new();
    for (at, item) in value.try_iter()?.enumerate() {
        let item = attribute(item, &path)?;
        let item = text(&item)?;
        budget.produce(separator.len() + item.len())?;
        out.extend([if at == 0 { "" } else { &separator }, &item]);
    }
    own(out)
}

fn dictsort(_: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let by = arguments.get(1, "by")?;
    let by_value = by.is_some_and(|by| by.as_str() == Some("value"));
    let cased = arguments.is_true(0, "case_sensitive")?;
    let key = |(key, item): &(Value, Value)| {
        let sorted = if by_value { item } else { key };
        sorted.as_str().filter(|_| !cased).map_or_else(|| sorted.clone(), |text| text.to_lowercase().into())
    };
    let mut entries = pairs(value)?;
    entries.sort_by_cached_key(key);
    if arguments.is_true(2, "reverse")? {
        entries.reverse();
    }
    Ok(entries.into_iter().map(|(key, item)| Tuple::value([key, item])).collect())
}

fn sum(budget: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let (path, start) = (arguments.get(0, "attribute")?, arguments.get(1, "start")?.unwrap_or(Value::from(0)));
    value.try_iter()?.try_fold(start, |sum, item| operators::add(budget, &sum, &attribute(item, &path)?))
}

/// A number, or the one that a text writes.
fn number(value: &Value) -> Result<Option<f64>, Error> {
    match value.kind() {
        ValueKind::Undefined => Err(invalid("an undefined value is no number")),
        ValueKind::Bool => Ok(Some(f64::from(u8::from(value.is_true())))),
        ValueKind::Number => f64::try_from(value.clone()).map(Some),
        _ => Ok(value.as_str().and_then(|text| strip(text, None, [true, true]).replace('_', "").parse().ok())),
    }
}

fn int(_: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let base = arguments.integer(1, "base")?.and_then(|base| u32::try_from(base).ok()).unwrap_or(10);
    if let Some(text) = value.as_str().filter(|_| (2..=36).contains(&base)) {
        let text = strip(text, None, [true, true]).replace('_', "").to_lowercase();
        let prefix = match base {
            16 => "0x",
            8 => "0o",
            2 => "0b",
            _ => "",
        };
        if let Ok(integer) = i64::from_str_radix(text.strip_prefix(prefix).unwrap_or(&text), base) {
            return Ok(Value::from(integer));
        }
    }
    if value.is_integer() {
        return Ok(value.clone());
    }
    let default = arguments.get(0, "default")?.unwrap_or(Value::from(0));
    Ok(number(value)?.filter(|number| number.is_finite()).map_or(default, |number| Value::from(number as i64)))
}

fn round(_: &Budget, _: &State, value: &Value, arguments: &Arguments) -> Result<Value, Error> {
    let precision = arguments.integer(0, "precision")?.unwrap_or(0).clamp(-300, 300);
    let method = arguments.get(1, "method")?.unwrap_or("common".into());
    let scale = 10f64.powi(precision as i32);
    let number = match value.kind() {
        ValueKind::Number | ValueKind::Bool => number(value)?.unwrap_or_default(),
        kind => return Err(invalid(format!("a value of the kind {kind} cannot be rounded"))),
    };
    let rounded = match method.as_str() {
        Some("common") if value.is_integer() && precision >= 0 => return Ok(value.clone()),
        // Correctly rounded from the exact binary value, as in Python.
        Some("common") if precision > 0 => format!("{number:.*}", precision as usize).parse().unwrap_or(number),
        Some("common") => (number * scale).round_ties_even() / scale,
        Some("ceil") => (number * scale).ceil() / scale,
        Some("floor") => (number * scale).floor() / scale,
        _ => return Err(invalid("the method of round is common, ceil or floor")),
    };
    if value.is_integer() && method.as_str() == Some("common") {
        return Ok(Value::from(rounded as i64));
    }
    Ok(Value::from(rounded))
}
