//! Merges of a SentencePiece vocabulary, which has scores instead.

use std::collections::HashMap;

/// Longer pieces are not searched for halves; no vocabulary has such.
const LONGEST_PIECE: usize = 512;

/// Every way to join two pieces to a third, best score first. Of equal scores, the longer left half goes first; of the
/// ways to one piece, that of the lower ids.
pub(super) fn merges<'a>(pieces: &[(&'a str, u32, f32)]) -> Vec<(&'a str, &'a str)> {
    let ids: HashMap<&str, u32> = pieces.iter().map(|(piece, id, _)| (*piece, *id)).collect();
    let mut all = Vec::new();
    for (piece, _, score) in pieces.iter().filter(|(piece, ..)| piece.len() <= LONGEST_PIECE) {
        let halves = piece.char_indices().skip(1).filter_map(|(at, _)| {
            let (left, right) = piece.split_at(at);
            Some((*ids.get(left)?, *ids.get(right)?, left, right))
        });
        let mut halves: Vec<_> = halves.collect();
        halves.sort_by_key(|(left, right, ..)| (*left, *right));
        all.extend(halves.into_iter().map(|(_, _, left, right)| (*score, left, right)));
    }
    let length = |text: &str| text.chars().count();
    all.sort_by(|(a, a_left, a_right), (b, b_left, b_right)| {
        b.total_cmp(a)
            .then_with(|| length(b_left).cmp(&length(a_left)))
            .then_with(|| length(b_right).cmp(&length(a_right)))
    });
    all.into_iter().map(|(_, left, right)| (left, right)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_scores_come_first_and_every_split_counts() {
        let pieces = [("a", 0, 0.0), ("b", 1, 0.0), ("c", 2, 0.0), ("bc", 3, -2.0), ("ab", 4, -1.0), ("abc", 5, -3.0)];
        assert_eq!(merges(&pieces), [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]);
    }
}
