//! Values as Python prints them.

use super::lists::Tuple;
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use std::borrow::Cow;
use std::fmt::Write;

/// How deep values may nest that are printed.
const DEPTH: usize = 200;

/// An error of a template with its cause.
pub(super) fn invalid(cause: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, cause)
}

/// `str(value)`.
pub(super) fn text(value: &Value) -> Result<Cow<'_, str>, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.into());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        represent(value, &mut out, 0)?;
    }
    Ok(out.into())
}

/// `repr(value)`.
pub(super) fn represent(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    if depth > DEPTH {
        return Err(invalid("a value nests too deep to be printed"));
    }
    let mut list = |[open, close]: [&str; 2]| {
        *out += open;
        for (at, item) in value.try_iter()?.enumerate() {
            *out += if at == 0 { "" } else { ", " };
            represent(&item, out, depth + 1)?;
        }
        *out += close;
        Ok(())
    };
    match value.kind() {
        ValueKind::Undefined => *out += "Undefined",
        ValueKind::Number if !value.is_integer() => *out += &float(f64::try_from(value.clone())?),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.downcast_object_ref::<Tuple>();
            return list(tuple.map_or(["[", "]"], |tuple| ["(", if tuple.0.len() == 1 { ",)" } else { ")" }]));
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                *out += if at == 0 { "" } else { ", " };
                represent(&key, out, depth + 1)?;
                *out += ": ";
                represent(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => *out += &value.to_string(),
    }
    Ok(())
}

/// A float with the fewest digits that give it back.
pub(super) fn float(value: f64) -> String {
    let digits = format!("{value:e}");
    let Some((mantissa, exponent)) = digits.split_once('e') else { return digits.to_lowercase() };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        let code = u32::from(c);
        let _ = match c {
            '\n' => out.write_str("\\n"),
            '\r' => out.write_str("\\r"),
            '\t' => out.write_str("\\t"),
            '\\' => out.write_str("\\\\"),
            _ if c == quote => write!(out, "\\{c}"),
            // Behind a letter, a mark that combines with it is printable in Rust too.
            _ if c != '\'' && c != '"' && ['a', c].iter().collect::<String>().escape_debug().count() > 2 => {
                match code {
                    0..0x100 => write!(out, "\\x{code:02x}"),
                    0x100..0x10000 => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                }
            }
            _ => out.write_char(c),
        };
    }
    out.push(quote);
}
