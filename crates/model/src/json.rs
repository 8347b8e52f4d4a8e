//! Numbers and token ids as strangers' JSON files spell them.

use serde_json::Value;

/// Characters of a value that errors show.
const SHOWN: usize = 60;

/// The whole number that a value is; `50.0` is one.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    // Up to here, every whole number has an `f64` of its own.
    const MOST: f64 = (1u64 << 53) as f64;
    value.as_i64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && x.abs() <= MOST).map(|x| x as i64))
}

/// The token ids that a value names: one, several, or none, which is null or -1. `None` where it is anything else.
pub(crate) fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| match whole(value)? {
        -1 => Some(None),
        id => u32::try_from(id).ok().map(Some),
    };
    let found: Option<Vec<Option<u32>>> = match value {
        Value::Null => Some(Vec::new()),
        Value::Array(values) => values.iter().map(id).collect(),
        value => id(value).map(|id| vec![id]),
    };
    Some(found?.into_iter().flatten().collect())
}

/// A value as errors show it: a long one is cut short.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whole_numbers_may_be_spelled_as_floats() {
        for (value, expected) in [(json!(50), Some(50)), (json!(50.0), Some(50)), (json!(-1), Some(-1))] {
            assert_eq!(whole(&value), expected, "{value}");
        }
        for value in [json!(50.5), json!(1e300), json!(u64::MAX), json!("50"), json!(null), json!([1])] {
            assert_eq!(whole(&value), None, "{value}");
        }
    }

    #[test]
    fn token_ids_are_one_several_or_none() {
        for (value, expected) in [
            (json!(2), vec![2]),
            (json!(2.0), vec![2]),
            (json!([1, 4]), vec![1, 4]),
            (json!([1, -1]), vec![1]),
            (json!(null), vec![]),
            (json!(-1), vec![]),
        ] {
            assert_eq!(ids(&value), Some(expected), "{value}");
        }
        for value in [json!("2"), json!(-2), json!(2.5), json!(1u64 << 32), json!([[1]]), json!({}), json!([null])] {
            assert_eq!(ids(&value), None, "{value}");
        }
    }
}
