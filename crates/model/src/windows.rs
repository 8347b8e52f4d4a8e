/// Cuts a tokenised text into windows of `context` ids. Each begins with `bos`, if the model has one, and goes on
/// where the one before it ended; what does not fill a window is left out. `count` limits their number.
pub fn windows(ids: &[u32], bos: Option<u32>, context: usize, count: Option<usize>) -> Vec<Vec<u32>> {
    let fresh = context.saturating_sub(bos.iter().len()).max(1);
    ids.chunks_exact(fresh)
        .take(count.unwrap_or(usize::MAX))
        .map(|chunk| bos.iter().chain(chunk).copied().collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other() {
        let ids: Vec<u32> = (10..20).collect();
        assert_eq!(windows(&ids, Some(1), 4, None), [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]);
        assert_eq!(windows(&ids, None, 5, Some(1)), [[10, 11, 12, 13, 14]]);
        assert!(windows(&ids, Some(1), 12, None).is_empty());
    }
}
