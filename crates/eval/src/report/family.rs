//! Schemes that differ in few choices.

use crate::{Choices, Comparison, ComparisonRow};

/// The rows that have the same key, by the order of the first of each; rows without a key are in none.
pub(super) fn families<K: PartialEq>(
    comparison: &Comparison,
    key: impl Fn(&Choices) -> Option<K>,
) -> Vec<Vec<&ComparisonRow>> {
    let mut families: Vec<(K, Vec<&ComparisonRow>)> = Vec::new();
    for row in &comparison.rows {
        let Some(key) = key(&row.choices) else { continue };
        match families.iter_mut().find(|(other, _)| *other == key) {
            Some((_, rows)) => rows.push(row),
            None => families.push((key, vec![row])),
        }
    }
    families.into_iter().map(|(_, rows)| rows).collect()
}

/// The scheme that differs from another in nothing but that it has no correction.
pub(super) fn uncorrected<'a>(comparison: &'a Comparison, choices: &Choices) -> Option<&'a ComparisonRow> {
    let bare = Choices { correction: None, ..choices.clone() };
    comparison.rows.iter().find(|row| row.choices == bare)
}

/// By how much of `before` a number is lower.
pub(super) fn gain(before: f64, after: f64) -> f64 {
    1.0 - after / before
}
