//! Arguments by place or by name.

use minijinja::value::{Kwargs, Rest, from_args};
use minijinja::{Error, Value};

/// The arguments of a filter or method.
pub(super) struct Arguments<'a>(Vec<Value>, Kwargs, &'a [Value]);

impl<'a> Arguments<'a> {
    pub(super) fn of(values: &'a [Value]) -> Result<Self, Error> {
        let (Rest(places), named) = from_args(values)?;
        Ok(Arguments(places, named, values))
    }

    /// An argument, if it is given and not none.
    pub(super) fn get(&self, at: usize, name: &str) -> Result<Option<Value>, Error> {
        let value = if self.1.has(name) { Some(self.1.get::<Value>(name)?) } else { self.0.get(at).cloned() };
        Ok(value.filter(|value| !value.is_none()))
    }

    pub(super) fn integer(&self, at: usize, name: &str) -> Result<Option<i64>, Error> {
        self.get(at, name)?.map(i64::try_from).transpose()
    }

    pub(super) fn is_true(&self, at: usize, name: &str) -> Result<bool, Error> {
        Ok(self.get(at, name)?.is_some_and(|value| value.is_true()))
    }

    /// The arguments that have no name.
    pub(super) fn places(&self) -> &[Value] {
        &self.0
    }

    /// All, those with names in one value at the end.
    pub(super) fn all(&self) -> &[Value] {
        self.2
    }
}
