//! Operators as in Python.

use super::environment::Budget;
use super::lists::{Tuple, is_list};
use super::print::{invalid, represent, text};
use minijinja::value::ValueKind;
use minijinja::{Error, FormatStyle, Value, format_filter};
use std::cmp::Ordering;

enum Number {
    Integer(i128),
    Float(f64),
}

impl Number {
    fn of(value: &Value) -> Option<Number> {
        match value.kind() {
            ValueKind::Bool => Some(Number::Integer(value.is_true().into())),
            ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok().map(Number::Integer),
            ValueKind::Number => f64::try_from(value.clone()).ok().map(Number::Float),
            _ => None,
        }
    }

    fn float(&self) -> f64 {
        match *self {
            Number::Integer(value) => value as f64,
            Number::Float(value) => value,
        }
    }
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    invalid(format!("`{operator}` takes no values of the kinds {} and {}", a.kind(), b.kind()))
}

/// `a ~ b`.
pub(super) fn concat(budget: &Budget, a: &Value, b: &Value) -> Result<String, Error> {
    let (a, b) = (text(a)?, text(b)?);
    budget.produce(a.len() + b.len())?;
    Ok([a, b].concat())
}

/// `a + b`.
pub(super) fn add(budget: &Budget, a: &Value, b: &Value) -> Result<Value, Error> {
    if a.as_str().is_some() && b.as_str().is_some() {
        return concat(budget, a, b).map(Value::from);
    }
    if is_list(a) && is_list(b) {
        let items: Vec<Value> = a.try_iter()?.chain(b.try_iter()?).collect();
        budget.produce(items.len() * size_of::<Value>())?;
        return Ok(Value::from(items));
    }
    calculate("+", a, b)
}

/// `a * b`.
pub(super) fn multiply(budget: &Budget, a: &Value, b: &Value) -> Result<Value, Error> {
    for (repeated, times) in [(a, b), (b, a)] {
        if !(is_list(repeated) || repeated.as_str().is_some()) {
            continue;
        }
        let Some(Number::Integer(times)) = Number::of(times) else { return Err(unsupported("*", a, b)) };
        let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
        if let Some(text) = repeated.as_str() {
            budget.produce(text.len().saturating_mul(times))?;
            return Ok(Value::from(text.repeat(times)));
        }
        let items: Vec<Value> = repeated.try_iter()?.collect();
        budget.produce(items.len().saturating_mul(size_of::<Value>()).saturating_mul(times))?;
        return Ok(std::iter::repeat_n(items, times).flatten().collect());
    }
    calculate("*", a, b)
}

/// `a % b`: of numbers, or of a text and what is put into it. As a tuple is a list here, a list is taken for one
/// value where the text has one place and the list not one item.
pub(super) fn remainder(budget: &Budget, a: &Value, b: &Value) -> Result<Value, Error> {
    let Some(format) = a.as_str() else { return calculate("%", a, b) };
    let places = format.replace("%%", "").matches('%').count();
    let mut values: Vec<Value> = if is_list(b) { b.try_iter()?.collect() } else { vec![b.clone()] };
    let tuple = b.downcast_object_ref::<Tuple>().is_some();
    if is_list(b) && !tuple && places == 1 && values.len() != 1 {
        values = vec![b.clone()];
    }
    if places != values.len() && b.kind() != ValueKind::Map {
        return Err(invalid(format!("{places} places in a text for {} values", values.len())));
    }
    put(budget, FormatStyle::Printf, format, &values).map(Value::from)
}

/// Puts values into a text.
pub(super) fn put(budget: &Budget, style: FormatStyle, format: &str, values: &[Value]) -> Result<String, Error> {
    let wide = |number: &str| number.len() > 5;
    if format.split(|c: char| !c.is_ascii_digit()).any(wide) {
        return Err(invalid("a width in a format is too large"));
    }
    let (mut format, mut values) = (format.to_owned(), values.to_vec());
    if matches!(style, FormatStyle::Printf) {
        convert(&mut format, &mut values)?;
    }
    for value in values.iter_mut().filter(|value| is_list(value)) {
        *value = Value::from(text(value)?.into_owned());
    }
    let result = format_filter(style, &format, &values)?;
    budget.produce(result.len())?;
    Ok(result)
}

/// Makes of `%r` a `%s` of what `repr` gives, and of a float at a `%d` an integer: minijinja has neither.
fn convert(format: &mut String, values: &mut [Value]) -> Result<(), Error> {
    let (mut at, mut place) = (0, 0);
    while let Some(found) = format[at..].find('%') {
        at += found + 1;
        let Some(length) = format[at..].find(|c: char| c.is_ascii_alphabetic() || c == '%' || c == '(') else { break };
        at += length;
        let (conversion, value) = (format.as_bytes()[at], values.get_mut(place));
        at += 1;
        place += usize::from(conversion != b'%');
        match (conversion, value) {
            (b'r', Some(value)) => {
                let mut text = String::new();
                represent(value, &mut text, 0)?;
                *value = Value::from(text);
                format.replace_range(at - 1..at, "s");
            }
            (b'd' | b'i', Some(value)) if value.is_number() && !value.is_integer() => {
                *value = Value::from(f64::try_from(value.clone())? as i64);
            }
            _ => {}
        }
    }
    Ok(())
}

/// An arithmetical operator.
pub(super) fn calculate(operator: &str, a: &Value, b: &Value) -> Result<Value, Error> {
    let (Some(x), Some(y)) = (Number::of(a), Number::of(b)) else { return Err(unsupported(operator, a, b)) };
    if matches!(operator, "/" | "//" | "%") && y.float() == 0.0 {
        return Err(invalid("division by zero"));
    }
    if let (Number::Integer(x), Number::Integer(y)) = (&x, &y) {
        let (x, y) = (*x, *y);
        let result = match operator {
            "+" => x.checked_add(y),
            "*" => x.checked_mul(y),
            "//" => x.checked_div(y).map(|q| q - i128::from(x % y != 0 && (x < 0) != (y < 0))),
            "%" => x.checked_rem(y).map(|r| if r != 0 && (r < 0) != (y < 0) { r + y } else { r }),
            "**" if y >= 0 => u32::try_from(y).ok().and_then(|y| x.checked_pow(y)),
            _ => return Ok(Value::from(floats(operator, x as f64, y as f64))),
        };
        let result = result.ok_or_else(|| invalid(format!("{x} {operator} {y} is out of range")))?;
        return Ok(i64::try_from(result).map_or_else(|_| Value::from(result), Value::from));
    }
    Ok(Value::from(floats(operator, x.float(), y.float())))
}

fn floats(operator: &str, x: f64, y: f64) -> f64 {
    match operator {
        "+" => x + y,
        "*" => x * y,
        "//" => (x / y).floor(),
        "%" => x - y * (x / y).floor(),
        "**" => x.powf(y),
        _ => x / y,
    }
}

/// How two values compare that have an order.
pub(super) fn compare(a: &Value, b: &Value) -> Result<Ordering, Error> {
    let both = |is: fn(&Value) -> bool| is(a) && is(b);
    if both(|value| Number::of(value).is_some()) || both(|value| value.as_str().is_some()) || both(is_list) {
        return Ok(a.cmp(b));
    }
    Err(unsupported("<", a, b))
}

/// `a in b`.
pub(super) fn contains(a: &Value, b: &Value) -> Result<bool, Error> {
    match (b.kind(), b.as_str(), a.as_str()) {
        (_, Some(text), Some(part)) => Ok(text.contains(part)),
        (ValueKind::Map, ..) => Ok(b.as_object().is_some_and(|dict| dict.get_value(a).is_some())),
        (ValueKind::Seq | ValueKind::Iterable, ..) => Ok(b.try_iter()?.any(|item| item == *a)),
        (ValueKind::Undefined, ..) => Ok(false),
        _ => Err(unsupported("in", a, b)),
    }
}
