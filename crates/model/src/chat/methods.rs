//! The methods of Python's strings, lists and dicts. Those that are not here are of minijinja's own list.

use super::arguments::Arguments;
use super::environment::Budget;
use super::lists::{Tuple, is_list, pairs};
use super::operators::put;
use super::print::{invalid, text};
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, FormatStyle, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Calls a method.
pub(super) fn call(budget: &Budget, state: &State, value: &Value, name: &str, all: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::of(all)?;
    let result = match value.as_str() {
        Some(text) => string(budget, text, name, &arguments)?,
        None if value.kind() == ValueKind::Map => dict(value, name, arguments.places())?,
        None if is_list(value) => list(value, name, arguments.places())?,
        None if value.is_undefined() => return Err(Error::from(ErrorKind::UndefinedError)),
        None => None,
    };
    let result = match result {
        Some(result) => result,
        None => unknown_method_callback(state, value, name, all)?,
    };
    budget.produce(result.as_str().map_or(0, str::len))?;
    Ok(result)
}

fn dict(value: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match (name, arguments) {
        ("items", []) => pairs(value)?.into_iter().map(|(key, item)| Tuple::value([key, item])).collect(),
        ("keys", []) => pairs(value)?.into_iter().map(|(key, _)| key).collect(),
        ("values", []) => pairs(value)?.into_iter().map(|(_, item)| item).collect(),
        ("copy", []) => value.clone(),
        ("pop" | "update" | "setdefault" | "clear", _) => return Err(invalid("a template cannot change a dict")),
        _ => return Ok(None),
    }))
}

fn list(value: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match (name, arguments) {
        ("index", [item]) => match value.try_iter()?.position(|other| other == *item) {
            Some(place) => Value::from(place),
            None => return Err(invalid(format!("{} is not in the list", text(item)?))),
        },
        ("count", [item]) => Value::from(value.try_iter()?.filter(|other| other == item).count()),
        ("copy", []) => value.clone(),
        ("append" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" | "clear", _) => {
            return Err(invalid("a template cannot change a list: write `list + [item]`"));
        }
        _ => return Ok(None),
    }))
}

/// Python's whitespace.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn str_of(value: &Value) -> Result<&str, Error> {
    value.as_str().ok_or_else(|| invalid(format!("a text is needed, not a value of the kind {}", value.kind())))
}

/// The texts of a tuple, or the one.
fn alternatives(value: &Value) -> Result<Vec<Value>, Error> {
    if is_list(value) { Ok(value.try_iter()?.collect()) } else { Ok(vec![value.clone()]) }
}

/// The part of a text that the arguments `start` and `end` of a search name, and how many characters are before it.
fn part<'a>(text: &'a str, bounds: &[Value]) -> Result<Option<(usize, &'a str)>, Error> {
    let len = text.chars().count() as i64;
    let bound = |at: usize, default: i64| match bounds.get(at).filter(|bound| !bound.is_none()) {
        None => Ok(default),
        Some(bound) => i64::try_from(bound.clone()).map(|b| if b < 0 { b.saturating_add(len).max(0) } else { b }),
    };
    let (start, end) = (bound(0, 0)?, bound(1, len)?.min(len));
    if start > end {
        return Ok(None);
    }
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    Ok(Some((start as usize, &text[byte(start)..byte(end)])))
}

/// Strips characters (whitespace if none are given) of either end.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, [left, right]: [bool; 2]) -> &'a str {
    let stripped = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(stripped) } else { text };
    if right { text.trim_end_matches(stripped) } else { text }
}

/// `text.title()`: a letter behind a letter is small.
fn title(text: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside = c.is_alphabetic();
    }
    out
}

/// `text.replace(old, new, count)`.
pub(super) fn replace(budget: &Budget, text: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let found = text.matches(old).count().min(count);
    budget.produce(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, count))
}

/// `separator.join(items)`.
fn join(budget: &Budget, separator: &str, items: &Value) -> Result<String, Error> {
    let mut out = String::new();
    for (at, item) in items.try_iter()?.enumerate() {
        let separator = if at == 0 { "" } else { separator };
        let item = str_of(&item)?.to_owned();
        budget.produce(separator.len() + item.len())?;
        out.extend([separator, &item]);
    }
    Ok(out)
}

fn split(text: &str, separator: Option<&str>, limit: Option<i64>, from_right: bool) -> Result<Value, Error> {
    let limit = limit.and_then(|limit| usize::try_from(limit).ok()).map_or(usize::MAX, |limit| limit.saturating_add(1));
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(invalid("the separator is empty")),
        Some(separator) if from_right => text.rsplitn(limit, separator).collect(),
        Some(separator) => text.splitn(limit, separator).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = strip(text, None, [!from_right, from_right]);
            while !rest.is_empty() {
                let place = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
                let (part, other) = match place {
                    Some(at) if parts.len() + 1 < limit => {
                        let width = rest[at..].chars().next().map_or(0, char::len_utf8);
                        if from_right { (&rest[at + width..], &rest[..at]) } else { (&rest[..at], &rest[at..]) }
                    }
                    _ => (rest, ""),
                };
                parts.push(part);
                rest = strip(other, None, [!from_right, from_right]);
            }
            parts
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

fn lines(text: &str, keep: bool) -> Value {
    let is_end =
        |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find(is_end).unwrap_or(rest.len());
        let end = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(0, char::len_utf8) };
        lines.push(Value::from(&rest[..at + if keep { end } else { 0 }]));
        rest = &rest[at + end..];
    }
    Value::from(lines)
}

/// Pads to a width of characters, by the shares of the missing ones before and behind.
pub(super) fn pad(budget: &Budget, text: &str, width: i64, fill: &str, centre: Option<bool>) -> Result<String, Error> {
    let len = text.chars().count();
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(len);
    budget.produce(missing.saturating_mul(fill.len()))?;
    let before = match centre {
        Some(python) => missing / 2 + usize::from(python && missing % 2 == 1 && width % 2 == 1),
        None => missing,
    };
    Ok(format!("{}{text}{}", fill.repeat(before), fill.repeat(missing - before)))
}

fn string(budget: &Budget, text: &str, name: &str, arguments: &Arguments) -> Result<Option<Value>, Error> {
    let places = arguments.places();
    let needed = |at: usize| places.get(at).ok_or_else(|| invalid(format!("{name}() needs more arguments")));
    let bounds = places.get(1..).unwrap_or_default();
    let any = |is: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(is));
    let cased =
        |is: fn(char) -> bool, not: fn(char) -> bool| Value::from(text.chars().any(is) && !text.chars().any(not));
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let chars = arguments.get(0, "chars")?;
            let chars = chars.as_ref().map(str_of).transpose()?;
            Value::from(strip(text, chars, [name != "rstrip", name != "lstrip"]))
        }
        "split" | "rsplit" => {
            let separator = arguments.get(0, "sep")?;
            let separator = separator.as_ref().map(str_of).transpose()?;
            split(text, separator, arguments.integer(1, "maxsplit")?, name == "rsplit")?
        }
        "splitlines" => lines(text, arguments.is_true(0, "keepends")?),
        "partition" | "rpartition" => {
            let separator = str_of(needed(0)?)?;
            let found = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Tuple::value(parts.map(Value::from))
        }
        "startswith" | "endswith" => {
            let Some((_, part)) = part(text, bounds)? else { return Ok(Some(false.into())) };
            let mut result = false;
            for affix in alternatives(needed(0)?)? {
                let affix = str_of(&affix)?;
                result |= if name == "startswith" { part.starts_with(affix) } else { part.ends_with(affix) };
            }
            Value::from(result)
        }
        "find" | "rfind" | "index" | "rindex" => {
            let what = str_of(needed(0)?)?;
            let found = part(text, bounds)?.and_then(|(before, part)| {
                let at = if name.starts_with('r') { part.rfind(what) } else { part.find(what) };
                at.map(|at| before + part[..at].chars().count())
            });
            match found {
                Some(at) => Value::from(at),
                None if name.ends_with("index") => return Err(invalid(format!("'{what}' is not in the text"))),
                None => Value::from(-1),
            }
        }
        "count" => {
            let what = str_of(needed(0)?)?;
            Value::from(part(text, bounds)?.map_or(0, |(_, part)| part.matches(what).count()))
        }
        "replace" => {
            let (old, new) = (str_of(needed(0)?)?, str_of(needed(1)?)?);
            Value::from(replace(budget, text, old, new, arguments.integer(2, "count")?)?)
        }
        "join" => Value::from(join(budget, text, needed(0)?)?),
        "format" => Value::from(put(budget, FormatStyle::StrFormat, text, arguments.all())?),
        "title" => Value::from(title(text)),
        "capitalize" => Value::from(capitalize(text)),
        "swapcase" => {
            let swapped = |c: char| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            };
            Value::from(text.chars().map(swapped).collect::<String>())
        }
        "removeprefix" => Value::from(text.strip_prefix(str_of(needed(0)?)?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(str_of(needed(0)?)?).unwrap_or(text)),
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            let width = arguments.integer(0, "width")?.unwrap_or(0).saturating_sub(sign.len() as i64);
            Value::from(format!("{sign}{}", pad(budget, digits, width, "0", None)?))
        }
        "center" | "ljust" | "rjust" => {
            let fill = arguments.get(1, "fillchar")?.unwrap_or(" ".into());
            let (width, fill) = (arguments.integer(0, "width")?.unwrap_or(0), str_of(&fill)?);
            Value::from(match name {
                "center" => pad(budget, text, width, fill, Some(true))?,
                "rjust" => pad(budget, text, width, fill, None)?,
                _ => {
                    format!("{text}{}", pad(budget, "", width.saturating_sub(text.chars().count() as i64), fill, None)?)
                }
            })
        }
        "isspace" => any(is_space),
        "isdigit" | "isnumeric" | "isdecimal" => any(char::is_numeric),
        "isalpha" => any(char::is_alphabetic),
        "isalnum" => any(char::is_alphanumeric),
        "islower" => cased(char::is_lowercase, char::is_uppercase),
        "isupper" => cased(char::is_uppercase, char::is_lowercase),
        "istitle" => Value::from(text.chars().any(char::is_alphabetic) && title(text) == text),
        _ => return Ok(None),
    }))
}

/// `text.capitalize()`.
pub(super) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_uppercase().chain(chars.as_str().to_lowercase().chars()).collect())
        .unwrap_or_default()
}
