/// Names with their share of all bytes, largest first: `Q4_K 81 %, Q6_K 19 %`. One name stands alone.
pub(crate) fn mixture<'a>(parts: impl Iterator<Item = (&'a str, usize)>) -> String {
    let mut all: Vec<(&str, usize)> = Vec::new();
    for (name, bytes) in parts {
        match all.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum = sum.saturating_add(bytes),
            None => all.push((name, bytes)),
        }
    }
    if let [(name, _)] = all[..] {
        return name.to_owned();
    }
    all.sort_by_key(|(name, bytes)| (std::cmp::Reverse(*bytes), *name));
    let sum: f64 = all.iter().map(|(_, bytes)| *bytes as f64).sum();
    let share = |(name, bytes): &(&str, usize)| format!("{name} {:.0} %", 100.0 * *bytes as f64 / sum);
    all.iter().map(share).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_bytes() {
        assert_eq!(mixture([("Q6_K", 20), ("Q4_K", 50), ("Q4_K", 30)].into_iter()), "Q4_K 80 %, Q6_K 20 %");
        assert_eq!(mixture([("bf16", 1), ("bf16", 2)].into_iter()), "bf16");
    }
}
