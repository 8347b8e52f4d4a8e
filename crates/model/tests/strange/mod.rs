//! What the tests of strangers' files share: values that nobody expects, and how much memory reading them takes.
#![allow(dead_code, reason = "every test file uses a part of it")]

use proptest::prelude::*;
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, with the largest request so far.
pub struct Largest;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps what `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps what `System` asks for.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller keeps what `System` asks for.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Bytes of the largest allocation that the program has asked for.
pub fn largest_allocation() -> usize {
    LARGEST.load(Ordering::Relaxed)
}

/// As many cases as `PROPTEST_CASES` says.
pub fn cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

/// Values of a wrong kind or size.
pub fn odd_value() -> impl Strategy<Value = Value> {
    let deep = |depth: usize| (0..depth).fold(json!(0), |inner, _| json!([inner]));
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3i64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![Just(1e308), Just(-1e308), Just(1e-320), Just(50.0), Just(-0.0), Just(0.5)].prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        proptest::sample::select(vec![
            "",
            "full_attention",
            "sliding_attention",
            "linear",
            "yarn",
            "longrope",
            "dynamic",
            "llama3",
            "divisors",
            "F64"
        ])
        .prop_map(Value::from),
        (1usize..100).prop_map(deep),
        proptest::collection::vec(any::<i32>().prop_map(Value::from), 0..5).prop_map(Value::from),
        Just(json!({})),
        Just(json!({"rope_type": "linear", "factor": -0.0})),
    ]
}

/// What is done to one place of a document.
#[derive(Debug, Clone)]
pub enum Change {
    Replace(Value),
    Remove,
    Rename(String),
}

pub fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => odd_value().prop_map(Change::Replace),
        1 => Just(Change::Remove),
        1 => "[a-z_.]{0,12}".prop_map(Change::Rename),
    ]
}

/// A document with changes at places that are counted through it.
pub fn changed(document: &Value, changes: &[(usize, Change)]) -> Value {
    let mut document = document.clone();
    for (place, change) in changes {
        let count = places(&document);
        apply(&mut document, &mut (place % count.max(1)), change);
    }
    document
}

fn places(value: &Value) -> usize {
    match value {
        Value::Array(values) => values.iter().map(|value| 1 + places(value)).sum(),
        Value::Object(values) => values.values().map(|value| 1 + places(value)).sum(),
        _ => 0,
    }
}

/// Changes what is `left` places on; true once that is done.
fn apply(value: &mut Value, left: &mut usize, change: &Change) -> bool {
    match value {
        Value::Array(values) => {
            for index in 0..values.len() {
                if *left == 0 {
                    match change {
                        Change::Replace(new) => values[index] = new.clone(),
                        Change::Remove | Change::Rename(_) => drop(values.remove(index)),
                    }
                    return true;
                }
                *left -= 1;
                if apply(&mut values[index], left, change) {
                    return true;
                }
            }
        }
        Value::Object(values) => {
            let keys: Vec<String> = values.keys().cloned().collect();
            for key in keys {
                if *left == 0 {
                    match change {
                        Change::Replace(new) => drop(values.insert(key, new.clone())),
                        Change::Remove => drop(values.remove(&key)),
                        Change::Rename(name) => {
                            let old = values.remove(&key).unwrap_or_default();
                            values.insert(name.clone(), old);
                        }
                    }
                    return true;
                }
                *left -= 1;
                if values.get_mut(&key).is_some_and(|inner| apply(inner, left, change)) {
                    return true;
                }
            }
        }
        _ => {}
    }
    false
}

/// What is done to the bytes of a file.
#[derive(Debug, Clone)]
pub enum Damage {
    Flip(usize, u8),
    Cut(usize),
    Insert(usize, Vec<u8>),
}

pub fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Damage::Flip(at, byte)),
        1 => any::<usize>().prop_map(Damage::Cut),
        1 => (any::<usize>(), proptest::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ]
}

/// A file damaged within its first `within` bytes, or cut anywhere.
pub fn damaged(file: &[u8], within: usize, all: &[Damage]) -> Vec<u8> {
    let mut file = file.to_vec();
    for damage in all {
        let len = file.len().max(1);
        match damage {
            Damage::Flip(at, byte) => {
                let at = at % within.min(len);
                file.iter_mut().skip(at).take(1).for_each(|old| *old = *byte);
            }
            Damage::Cut(at) => file.truncate(at % len),
            Damage::Insert(at, bytes) => {
                let at = (at % within).min(file.len());
                file.splice(at..at, bytes.iter().copied());
            }
        }
    }
    file
}
