//! Tuples, and Python's slices.

use super::print::invalid;
use minijinja::value::{Enumerator, Object, ObjectRepr, ValueKind};
use minijinja::{Error, Value};
use std::sync::Arc;

/// A tuple that a method or filter gives. One that a template writes is a list, as minijinja has it.
#[derive(Debug)]
pub(super) struct Tuple(pub Vec<Value>);

impl Tuple {
    pub(super) fn value(items: impl IntoIterator<Item = Value>) -> Value {
        Value::from_object(Tuple(items.into_iter().collect()))
    }
}

impl Object for Tuple {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }
}

pub(super) fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// The entries of a dict as pairs.
pub(super) fn pairs(dict: &Value) -> Result<Vec<(Value, Value)>, Error> {
    if dict.kind() != ValueKind::Map {
        return Err(invalid(format!("a value of the kind {} has no items", dict.kind())));
    }
    dict.try_iter()?.map(|key| dict.get_item(&key).map(|value| (key, value))).collect()
}

/// `value[start:stop:step]`.
pub(super) fn slice(value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Error> {
    let index = |bound: &Value| match bound.is_none() {
        true => Ok(None),
        false => i64::try_from(bound.clone()).map(Some).map_err(|_| invalid("a bound of a slice is no integer")),
    };
    let step = index(step)?.unwrap_or(1);
    let bounds = (index(start)?, index(stop)?);
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        return Ok(Value::from(steps(chars.len(), bounds, step)?.map(|at| chars[at]).collect::<String>()));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            let part = steps(items.len(), bounds, step)?.map(|at| items[at].clone());
            Ok(if value.downcast_object_ref::<Tuple>().is_some() { Tuple::value(part) } else { part.collect() })
        }
        kind => Err(invalid(format!("a value of the kind {kind} cannot be sliced"))),
    }
}

/// The places that a slice takes of `len`.
fn steps(len: usize, bounds: (Option<i64>, Option<i64>), step: i64) -> Result<impl Iterator<Item = usize>, Error> {
    if step == 0 {
        return Err(invalid("the step of a slice is zero"));
    }
    let len = len as i64;
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let place = |bound: i64| (if bound < 0 { bound.saturating_add(len) } else { bound }).clamp(low, high);
    let start = bounds.0.map_or(if step > 0 { low } else { high }, place);
    let stop = bounds.1.map_or(if step > 0 { high } else { low }, place);
    let inside = move |at: &i64| if step > 0 { *at < stop } else { *at > stop };
    let next = move |at: &i64| at.checked_add(step).filter(inside);
    Ok(std::iter::successors(Some(start).filter(inside), next).map(|at| at as usize))
}
