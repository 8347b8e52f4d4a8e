//! The order of rows of query and key projections.

/// In Llama files the channels that turn together lie side by side: `[head][channel of a half][half]`. Here the halves
/// of a head follow each other. Gives the row of the file for each row, of `rows` rows for so many heads.
pub(crate) fn halves_from_pairs(rows: usize, heads: usize) -> impl Fn(usize) -> usize {
    let head_dim = rows / heads;
    move |row| {
        let (head, channel) = (row / head_dim, row % head_dim);
        let (half, channel) = (channel / (head_dim / 2), channel % (head_dim / 2));
        head * head_dim + 2 * channel + half
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_in_every_head() {
        let order: Vec<usize> = (0..12).map(halves_from_pairs(12, 2)).collect();
        assert_eq!(order, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
