//! Giving planes to channels: reverse water-filling, by tiles of channels.

use dibit_cache::Planes;

const TILE: usize = Planes::TILE;

/// A measurement of nothing counts as so many nats.
const LEAST_COST: f64 = 1e-12;

/// Mean squared error of a code of so many planes, of a range of 1, times 12: a channel without a plane keeps the mean of
/// its group, with `p` planes its range is cut into `4^p - 1` steps.
fn error(planes: usize) -> f64 {
    match planes {
        0 => 1.0,
        _ => 1.0 / (4f64.powi(planes as i32) - 1.0).powi(2),
    }
}

/// The channels of one side of one KV head.
pub(crate) struct Group {
    /// Weight of each channel.
    weights: Vec<f64>,
    /// With how many planes the group was measured, and the logarithm of what it cost over what the weights say.
    measured: Vec<(usize, f64)>,
}

impl Group {
    /// A group that has not been measured costs what its weights say.
    pub(crate) fn new(weights: Vec<f64>) -> Self {
        Group { weights, measured: Vec::new() }
    }

    /// Channels by falling weight; tiles are cut from these.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.weights.len()).collect();
        order.sort_by(|a, b| self.weights[*b].total_cmp(&self.weights[*a]));
        order
    }

    /// The planes of each channel where the head has `count`, or less by a part of a tile.
    pub(crate) fn spend(&self, count: usize, most: usize) -> Vec<u8> {
        let order = self.order();
        let tiles: Vec<&[usize]> = order.chunks(TILE).collect();
        let savings = tiles.iter().enumerate().flat_map(|(tile, channels)| {
            let weight: f64 = channels.iter().map(|channel| self.weights[*channel]).sum();
            (0..most).map(move |planes| (tile, weight * (error(planes) - error(planes + 1))))
        });
        let mut savings: Vec<(usize, f64)> = savings.collect();
        // Savings of a tile fall with each plane, so they are taken in their order.
        savings.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut planes = vec![0; self.weights.len()];
        for (tile, _) in savings.into_iter().take(count / TILE) {
            tiles[tile].iter().for_each(|channel| planes[*channel] += 1);
        }
        planes
    }

    /// Notes what the model was found to lose with these planes.
    pub(crate) fn measure(&mut self, planes: &[u8], cost: f64) {
        let expected = self.expected(planes);
        if expected > 0.0 {
            let count = planes.iter().map(|planes| usize::from(*planes)).sum();
            self.measured.retain(|(other, _)| *other != count);
            self.measured.push((count, (cost.max(LEAST_COST) / expected).ln()));
            self.measured.sort_by_key(|(count, _)| *count);
        }
    }

    /// What is left to lose with `count` planes: what the weights say, times what measurements say of that. Between two
    /// measurements their logarithms are interpolated.
    fn loss(&self, count: usize, most: usize) -> f64 {
        let behind = self.measured.iter().position(|(other, _)| *other >= count).unwrap_or(self.measured.len());
        let factor = match (behind.checked_sub(1).map(|index| &self.measured[index]), self.measured.get(behind)) {
            (Some((a, low)), Some((b, high))) => low + (high - low) * (count - a) as f64 / (b - a) as f64,
            (Some((_, own)), None) | (None, Some((_, own))) => *own,
            (None, None) => 0.0,
        };
        self.expected(&self.spend(count, most)) * factor.exp()
    }

    fn expected(&self, planes: &[u8]) -> f64 {
        self.weights.iter().zip(planes).map(|(weight, planes)| weight * error(usize::from(*planes))).sum()
    }
}

/// Spends `total` planes on groups of `head_dim` channels, always where they save most for each. Every group gets an eighth
/// of a head's channels at least, in whole tiles, and one. Returns the planes of each channel of each group.
pub(crate) fn pooled(groups: &[&Group], head_dim: usize, total: usize, most: usize) -> Vec<Vec<u8>> {
    let least = (head_dim / 8 / TILE).max(1) * TILE;
    let losses = |group: &&Group| -> Vec<f64> {
        (least..=most * head_dim).step_by(TILE).map(|count| group.loss(count, most)).collect()
    };
    let losses: Vec<Vec<f64>> = groups.iter().map(losses).collect();
    // Tiles of planes beyond the least.
    let mut given = vec![0; groups.len()];
    let mut left = (total / TILE).saturating_sub(groups.len() * least / TILE);
    while left > 0 {
        // A measured loss may fall slowly first and then fast, so that every number of further tiles is looked at.
        let best = |(index, losses): (usize, &Vec<f64>)| {
            let now = given[index];
            let saving = |more: usize| (losses[now] - losses[now + more]) / more as f64;
            let all = (1..losses.len() - now).map(|more| (saving(more), more));
            all.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))).map(|(saving, more)| (saving, more, index))
        };
        let best = losses.iter().enumerate().filter_map(best);
        let Some((_, more, index)) = best.max_by(|a, b| a.0.total_cmp(&b.0).then(b.2.cmp(&a.2))) else { break };
        let more = more.min(left);
        given[index] += more;
        left -= more;
    }
    groups.iter().zip(given).map(|(group, tiles)| group.spend(least + tiles * TILE, most)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As many weights as tiles.
    fn group(tiles: &[f64]) -> Group {
        Group::new(tiles.iter().flat_map(|weight| [*weight; TILE]).collect())
    }

    /// The planes of each tile.
    fn of_tiles(planes: &[u8]) -> Vec<u8> {
        assert!(planes.chunks(TILE).all(|tile| tile.iter().all(|planes| *planes == tile[0])));
        planes.iter().copied().step_by(TILE).collect()
    }

    /// Tiles of planes of each group.
    fn tiles_given(groups: &[Vec<u8>]) -> Vec<usize> {
        groups.iter().map(|planes| of_tiles(planes).iter().map(|p| usize::from(*p)).sum()).collect()
    }

    #[test]
    fn planes_go_where_they_save_most() {
        let own = group(&[100.0, 1.0, 0.001, 1.0]);
        let spend = |count: usize, most| of_tiles(&own.spend(count * TILE, most));
        assert_eq!(spend(4, 3), [2, 1, 0, 1]);
        assert_eq!(spend(2, 3), [2, 0, 0, 0]);
        assert_eq!(spend(2, 1), [1, 1, 0, 0]);
        assert_eq!(spend(12, 3), [3, 3, 3, 3]);
        assert_eq!(own.spend(4 * TILE + 7, 3), own.spend(4 * TILE, 3));
        let expected = TILE as f64 * (100.0 / 225.0 + 2.0 / 9.0 + 0.001);
        assert!((own.loss(4 * TILE, 3) - expected).abs() < 1e-12 * expected);
    }

    #[test]
    fn channels_of_like_weight_share_a_tile() {
        let own = Group::new((0..2 * TILE).map(|channel| if channel % 2 == 0 { 5.0 } else { 1.0 }).collect());
        let planes = own.spend(TILE, 3);
        assert!((0..2 * TILE).all(|channel| planes[channel] == u8::from(channel % 2 == 0)));
    }

    #[test]
    fn what_was_measured_counts_where_it_was_measured() {
        let mut own = group(&[1.0; 8]);
        let expected = |count| group(&[1.0; 8]).loss(count, 3);
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        own.measure(&own.spend(64, 3), 4.0 * expected(64));
        assert!([8, 64, 128].into_iter().all(|count| near(own.loss(count, 3), 4.0 * expected(count))));
        own.measure(&own.spend(128, 3), expected(128));
        assert!(near(own.loss(128, 3), expected(128)) && near(own.loss(64, 3), 4.0 * expected(64)));
        assert!(near(own.loss(96, 3), 2.0 * expected(96)) && near(own.loss(160, 3), expected(160)));
        // The last measurement of as many planes counts, and nothing is free.
        own.measure(&own.spend(64, 3), 0.0);
        assert!(near(own.loss(64, 3), LEAST_COST));
    }

    #[test]
    fn a_pool_is_spent_on_the_groups_that_need_it() {
        let groups = [1.0, 1e-3, 2.0, 3.0].map(|weight| group(&[weight; 8]));
        let spent = pooled(&groups.each_ref(), 8 * TILE, 32 * TILE, 3);
        assert_eq!(tiles_given(&spent), [8, 1, 8, 15]);
    }

    #[test]
    fn a_loss_that_falls_late_is_looked_for() {
        let mut late = group(&[1.0; 8]);
        let costs = [(8, 1.0), (16, 0.999), (24, 0.01)];
        costs.into_iter().for_each(|(count, cost)| late.measure(&late.spend(count, 3), cost));
        let other = group(&[0.01; 8]);
        let spent = pooled(&[&late, &other], 8 * TILE, 4 * TILE, 3);
        assert_eq!(tiles_given(&spent), [3, 1]);
    }

    proptest! {
        #[test]
        fn no_swap_of_planes_saves_more(weights in prop::collection::vec(1e-6f64..1e6, 8), count in 1usize..24) {
            let planes = of_tiles(&group(&weights).spend(count * TILE, 3));
            prop_assert_eq!(planes.iter().map(|p| usize::from(*p)).sum::<usize>(), count);
            let gain = |c: usize, p: u8| weights[c] * (error(usize::from(p)) - error(usize::from(p) + 1));
            for from in (0..8).filter(|c| planes[*c] > 0) {
                for to in (0..8).filter(|c| planes[*c] < 3) {
                    prop_assert!(gain(from, planes[from] - 1) >= gain(to, planes[to]));
                }
            }
        }

        #[test]
        fn a_pool_is_spent_whatever_was_measured(
            weights in prop::collection::vec(1e-6f64..1e6, 24),
            costs in prop::collection::vec((1usize..24, 0f64..1e6), 0..12),
            total in 3usize..60,
        ) {
            let mut groups: Vec<Group> = weights.chunks(8).map(group).collect();
            for (index, (count, cost)) in costs.into_iter().enumerate() {
                let own = &mut groups[index % 3];
                own.measure(&own.spend(count * TILE, 3), cost);
            }
            let spent = pooled(&groups.iter().collect::<Vec<_>>(), 8 * TILE, total * TILE, 3);
            let spent = tiles_given(&spent);
            prop_assert_eq!(spent.iter().sum::<usize>(), total);
            prop_assert!(spent.iter().all(|count| *count >= 1));
        }
    }
}
