//! minijinja's environment with Python's operators, methods, filters and printing.

use super::print::{invalid, text};
use super::{filters, lists, methods, operators};
use minijinja::value::{Object, ObjectRepr, ValueKind};
use minijinja::{Environment, Error, State, Value};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many instructions a rendering may run.
const FUEL: u64 = 5_000_000;
/// How many bytes a rendering may print.
const PRINTED: usize = 64 << 20;
/// How many bytes it may produce in all on the way.
const PRODUCED: usize = 1 << 30;

/// What one rendering has printed and produced.
#[derive(Clone, Default)]
pub(super) struct Budget(Arc<[AtomicUsize; 2]>);

impl Budget {
    /// Counts bytes before a value of so many is made.
    pub(super) fn produce(&self, bytes: usize) -> Result<(), Error> {
        Self::take(&self.0[0], bytes, PRODUCED, "the template makes too large values")
    }

    fn print(&self, bytes: usize) -> Result<(), Error> {
        Self::take(&self.0[1], bytes, PRINTED, "the text grows over 64 MiB")
    }

    fn take(used: &AtomicUsize, bytes: usize, limit: usize, error: &'static str) -> Result<(), Error> {
        let before = used.fetch_add(bytes.min(limit), Ordering::Relaxed);
        if before.saturating_add(bytes) > limit { Err(invalid(error)) } else { Ok(()) }
    }
}

/// Methods of dicts that a template may ask for without a call, as in `value.items is defined`, and the filters that
/// give them.
const ATTRIBUTES: [(&str, &str); 6] = [
    ("copy", ".copy"),
    ("get", ".get"),
    ("items", ".items"),
    ("keys", ".keys"),
    ("pop", ".pop"),
    ("values", ".values"),
];

/// The filter that gives an attribute which may be a method of a dict.
pub(super) fn attribute(name: &str) -> Option<&'static str> {
    ATTRIBUTES.iter().find(|(method, _)| *method == name).map(|(_, filter)| *filter)
}

/// A method that is not called yet.
#[derive(Debug)]
struct Bound(Value, &'static str);

impl Object for Bound {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &State<'_, '_>, arguments: &[Value]) -> Result<Value, Error> {
        self.0.call_method(state, self.1, arguments)
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<built-in method {} of dict object>", self.1)
    }
}

/// The environment of one rendering.
pub(super) fn python() -> Environment<'static> {
    let budget = Budget::default();
    let mut environment = Environment::new();
    environment.set_debug(true);
    environment.set_fuel(Some(FUEL));
    let own = budget.clone();
    environment.set_formatter(move |out, _, value| {
        let text = text(value)?;
        own.print(text.len())?;
        Ok(out.write_str(&text)?)
    });
    let own = budget.clone();
    environment.set_unknown_method_callback(move |state, value, name, arguments| {
        methods::call(&own, state, value, name, arguments)
    });

    type Operator = fn(&Budget, &Value, &Value) -> Result<Value, Error>;
    let with_budget: [(&str, Operator); 4] = [
        ("~", |budget, a, b| operators::concat(budget, a, b).map(Value::from)),
        ("+", operators::add),
        ("*", operators::multiply),
        ("%", operators::remainder),
    ];
    for (name, operator) in with_budget {
        let own = budget.clone();
        environment.add_filter(name, move |a: &Value, b: &Value| operator(&own, a, b));
    }
    for name in ["/", "//", "**"] {
        environment.add_filter(name, move |a: &Value, b: &Value| operators::calculate(name, a, b));
    }
    environment.add_filter("<", |a: &Value, b: &Value| Ok::<_, Error>(operators::compare(a, b)?.is_lt()));
    environment.add_filter("<=", |a: &Value, b: &Value| Ok::<_, Error>(operators::compare(a, b)?.is_le()));
    environment.add_filter(">", |a: &Value, b: &Value| Ok::<_, Error>(operators::compare(a, b)?.is_gt()));
    environment.add_filter(">=", |a: &Value, b: &Value| Ok::<_, Error>(operators::compare(a, b)?.is_ge()));
    environment.add_filter("in", operators::contains);
    environment.add_filter("[:]", lists::slice);
    for (method, filter) in ATTRIBUTES {
        environment.add_filter(filter, move |value: &Value| {
            let is_namespace = value.as_object().is_some_and(|object| object.type_name().contains("Namespace"));
            match value.kind() {
                ValueKind::Map if !is_namespace => Ok(Value::from_object(Bound(value.clone(), method))),
                _ => value.get_attr(method),
            }
        });
    }

    environment.add_function("raise_exception", |message: Option<&Value>| -> Result<Value, Error> {
        Err(invalid(message.map(text).transpose()?.unwrap_or_default().into_owned()))
    });
    environment.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        let mut text = String::new();
        let failed = |_| invalid(format!("'{format}' is not a date format"));
        write!(text, "{}", chrono::Local::now().format(format)).map_err(failed)?;
        Ok(text)
    });
    filters::add(&mut environment, &budget);
    environment
}
