//! Numbers for readers. What is not finite is a dash.

/// Stands for a number that is unknown or not finite.
pub(super) const UNKNOWN: &str = "–";

/// Three significant digits, with separators for thousands.
pub(super) fn number(value: f64) -> String {
    if !value.is_finite() {
        return UNKNOWN.into();
    }
    let magnitude = value.abs();
    if magnitude >= 1e9 {
        return format!("{value:.1e}");
    }
    if magnitude >= 1000.0 {
        return grouped(value.round() as i64);
    }
    if magnitude < 1e-6 {
        return "0".into();
    }
    decimals(value, (2 - magnitude.log10().floor() as i32).clamp(0, 8) as usize)
}

/// A number of a table column or an axis, with a fixed number of decimals.
pub(super) fn decimals(value: f64, decimals: usize) -> String {
    match value {
        value if !value.is_finite() => UNKNOWN.into(),
        value if value.abs() >= 1000.0 => number(value),
        value => format!("{value:.decimals$}"),
    }
}

/// As short as can be, for ticks of an axis: without the zeros behind the point that say nothing.
pub(super) fn tick(value: f64) -> String {
    if value != 0.0 && value.abs() < 9.995e-4 {
        return format!("{value:.0e}");
    }
    let text = number(value);
    if text.contains('.') && !text.contains('e') {
        text.trim_end_matches('0').trim_end_matches('.').into()
    } else {
        text
    }
}

/// A share of 1 in percent.
pub(super) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1}\u{a0}%", share * 100.0) } else { UNKNOWN.into() }
}

/// By how much `value` is above `reference`, in percent, with its sign.
pub(super) fn change(value: f64, reference: f64) -> String {
    let percent = (value / reference - 1.0) * 100.0;
    match percent {
        percent if !percent.is_finite() => UNKNOWN.into(),
        percent if percent >= 100.0 => format!("+{}\u{a0}%", grouped(percent.round() as i64)),
        percent => format!("{percent:+.1}\u{a0}%"),
    }
}

/// How many times `large` is as large as `small`.
pub(super) fn times(large: f64, small: f64) -> String {
    match large / small {
        ratio if !ratio.is_finite() => UNKNOWN.into(),
        ratio if ratio >= 9.95 => format!("{} times", grouped(ratio.round() as i64)),
        ratio => format!("{ratio:.1} times"),
    }
}

/// A whole number with separators for thousands.
pub(super) fn count(value: usize) -> String {
    grouped(value as i64)
}

/// A context length as a name: `8k` for 8192, `1,000` for 1000.
pub(super) fn context(tokens: usize) -> String {
    if tokens >= 1024 && tokens.is_multiple_of(1024) { format!("{}k", count(tokens / 1024)) } else { count(tokens) }
}

/// Bytes in binary units.
pub(super) fn bytes(bytes: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{} {}", number(value), units[unit]) }
}

fn grouped(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let mut text = String::from(if value < 0 { "-" } else { "" });
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (75.812, "75.8"),
            (0.021437, "0.0214"),
            (0.0000123, "0.0000123"),
            (-2.5, "-2.50"),
            (146.74, "147"),
            (7268.4, "7,268"),
            (1234567.0, "1,234,567"),
            (3e12, "3.0e12"),
            (f64::NAN, "–"),
            (f64::NEG_INFINITY, "–"),
        ];
        for (value, expected) in cases {
            assert_eq!(number(value), expected);
        }
        assert_eq!([0.5, 2.0, 1000.0, 20.0, 2e-4].map(tick), ["0.5", "2", "1,000", "20", "2e-4"]);
        assert_eq!(
            [change(110.0, 100.0), change(99.0, 100.0), change(1e4, 100.0)],
            ["+10.0\u{a0}%", "-1.0\u{a0}%", "+9,900\u{a0}%"]
        );
        assert_eq!([change(1.0, 0.0), percent(f64::NAN), times(1.0, 0.0)], [UNKNOWN; 3]);
        assert_eq!(
            [bytes(12), bytes(9216), bytes(1023 << 20), bytes(2 << 30)],
            ["12 B", "9.00 KiB", "0.999 GiB", "2.00 GiB"]
        );
        assert_eq!([context(8192), context(131072), context(1000)], ["8k", "128k", "1,000"]);
        assert_eq!([percent(0.9253), times(7.14, 1.0), times(175.4, 1.0)], ["92.5\u{a0}%", "7.1 times", "175 times"]);
    }
}
