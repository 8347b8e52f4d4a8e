//! The filter `tojson` with the options of Python's `json.dumps`.

use super::arguments::Arguments;
use super::print::{float, invalid, text};
use minijinja::value::ValueKind;
use minijinja::{Error, Value};
use std::fmt::Write;

const DEPTH: usize = 200;

struct Options {
    ascii: bool,
    indent: Option<String>,
    comma: String,
    colon: String,
    sort: bool,
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, arguments: &Arguments) -> Result<String, Error> {
    let indent = match arguments.get(1, "indent")? {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(indent)?.clamp(0, 100) as usize),
        }),
    };
    let (mut comma, mut colon) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = arguments.get(2, "separators")? {
        comma = text(&separators.get_item_by_index(0)?)?.into_owned();
        colon = text(&separators.get_item_by_index(1)?)?.into_owned();
    }
    let (ascii, sort) = (arguments.is_true(0, "ensure_ascii")?, arguments.is_true(3, "sort_keys")?);
    let mut out = String::new();
    Options { ascii, indent, comma, colon, sort }.write(value, &mut out, 0)?;
    Ok(out)
}

impl Options {
    fn write(&self, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(invalid("tojson: the value nests too deep"));
        }
        match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => *out += &scalar(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out)?,
            ValueKind::Seq => {
                let items = value.try_iter()?.collect();
                self.entries(['[', ']'], items, out, depth, |item, out| self.write(&item, out, depth + 1))?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    let name = key.as_str().map_or_else(|| scalar(&key), |name| Ok(name.to_owned()))?;
                    entries.push((name, value.get_item(&key)?));
                }
                if self.sort {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.entries(['{', '}'], entries, out, depth, |(name, item), out| {
                    self.string(&name, out)?;
                    *out += &self.colon;
                    self.write(&item, out, depth + 1)
                })?;
            }
            kind => return Err(invalid(format!("tojson: a value of the kind {kind} is not JSON"))),
        }
        Ok(())
    }

    fn entries<T>(
        &self,
        [open, close]: [char; 2],
        entries: Vec<T>,
        out: &mut String,
        depth: usize,
        mut write: impl FnMut(T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| *out += indent);
            }
        };
        out.push(open);
        let some = !entries.is_empty();
        for (at, entry) in entries.into_iter().enumerate() {
            *out += if at == 0 { "" } else { &self.comma };
            line(out, depth + 1);
            write(entry, out)?;
        }
        if some {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) -> Result<(), Error> {
        let quoted = serde_json::to_string(text).map_err(|error| invalid(error.to_string()))?;
        for c in quoted.chars() {
            // With `ensure_ascii`, Python escapes DEL too.
            if self.ascii && !matches!(c, ' '..='~') {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            } else {
                out.push(c);
            }
        }
        Ok(())
    }
}

/// A number, truth value or null, also where it is a key.
fn scalar(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number if value.is_integer() => value.to_string(),
        ValueKind::Number => match f64::try_from(value.clone())? {
            nan if nan.is_nan() => "NaN".to_owned(),
            infinite if infinite.is_infinite() => format!("{}Infinity", if infinite < 0.0 { "-" } else { "" }),
            finite => float(finite),
        },
        kind => return Err(invalid(format!("tojson: a value of the kind {kind} cannot be a key"))),
    })
}
