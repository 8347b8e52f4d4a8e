//! Giving planes to channels: reverse water-filling.

use dibit_cache::Planes;

/// Mean squared error of a code of so many planes, of a range of 1, times 12: a channel without a plane keeps the mean of
/// its group, with `p` planes its range is cut into `4^p - 1` steps.
pub(crate) fn error(planes: usize) -> f64 {
    match planes {
        0 => 1.0,
        _ => 1.0 / (4f64.powi(planes as i32) - 1.0).powi(2),
    }
}

/// The channels of one side of one KV head.
pub(crate) struct Group {
    /// Weight of each channel.
    pub weights: Vec<f64>,
}

impl Group {
    /// What planes save, the largest first: the channel, and the saving.
    fn savings(&self, most: usize) -> Vec<(usize, f64)> {
        let of_channel = |(channel, weight): (usize, &f64)| {
            let weight = *weight;
            (0..most).map(move |planes| (channel, weight * (error(planes) - error(planes + 1))))
        };
        let mut all: Vec<(usize, f64)> = self.weights.iter().enumerate().flat_map(of_channel).collect();
        // Savings of a channel fall with each plane, so they are taken in their order.
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all
    }

    /// The planes of each channel where the head has `count`.
    pub(crate) fn spend(&self, count: usize, most: usize) -> Vec<u8> {
        let mut planes = vec![0; self.weights.len()];
        self.savings(most).into_iter().take(count).for_each(|(channel, _)| planes[channel] += 1);
        planes
    }

    /// What is left to lose with these planes.
    pub(crate) fn loss(&self, planes: &[u8]) -> f64 {
        self.weights.iter().zip(planes).map(|(weight, planes)| weight * error(usize::from(*planes))).sum()
    }
}

/// Spends `total` planes on groups of `head_dim` channels, in steps of a sixteenth of a head's channels, always where they
/// save most. Every group gets an eighth of a head's channels at least. Returns the planes of each channel of each group.
pub(crate) fn pooled(groups: &[&Group], head_dim: usize, total: usize, most: usize) -> Vec<Vec<u8>> {
    let step = (head_dim / 16).max(1);
    let savings: Vec<Vec<(usize, f64)>> = groups.iter().map(|group| group.savings(most)).collect();
    let mut counts = vec![2 * step; groups.len()];
    let mut spent: usize = counts.iter().sum();
    while spent + step <= total {
        let saving = |index: usize| {
            let next = savings[index].get(counts[index]..counts[index] + step)?;
            Some((next.iter().map(|(_, saving)| saving).sum::<f64>(), index))
        };
        let best = (0..groups.len()).filter_map(saving).max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, index)) = best else { break };
        counts[index] += step;
        spent += step;
    }
    groups.iter().zip(counts).map(|(group, count)| group.spend(count, most)).collect()
}

/// Planes of a head whose channels have so many bits on average.
pub(crate) fn planes_of(average_bits: f32, head_dim: usize) -> usize {
    ((f64::from(average_bits) * head_dim as f64 / 2.0).round() as usize).clamp(1, Planes::MOST * head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn group(weights: Vec<f64>) -> Group {
        Group { weights }
    }

    #[test]
    fn planes_go_where_they_save_most() {
        let own = group(vec![100.0, 1.0, 0.001, 1.0]);
        assert_eq!(own.spend(4, 3), [2, 1, 0, 1]);
        assert_eq!(own.spend(2, 3), [2, 0, 0, 0]);
        assert_eq!(own.spend(2, 1), [1, 1, 0, 0]);
        assert_eq!(own.spend(12, 3), [3, 3, 3, 3]);
        assert!((own.loss(&[2, 1, 0, 1]) - (100.0 / 225.0 + 2.0 / 9.0 + 0.001)).abs() < 1e-12);
    }

    #[test]
    fn a_pool_is_spent_on_the_groups_that_need_it() {
        let groups = [1.0, 1e-3, 2.0, 3.0].map(|weight| group(vec![weight; 32]));
        let spent = pooled(&groups.each_ref(), 32, 128, 3);
        let spent: Vec<usize> =
            spent.iter().map(|planes| planes.iter().map(|p| usize::from(*p)).sum::<usize>()).collect();
        assert_eq!(spent, [32, 4, 32, 60]);
    }

    proptest! {
        #[test]
        fn no_swap_of_planes_saves_more(weights in prop::collection::vec(1e-6f64..1e6, 8), count in 1usize..24) {
            let own = group(weights.clone());
            let planes = own.spend(count, 3);
            prop_assert_eq!(planes.iter().map(|p| usize::from(*p)).sum::<usize>(), count);
            let gain = |c: usize, p: u8| weights[c] * (error(usize::from(p)) - error(usize::from(p) + 1));
            for from in (0..8).filter(|c| planes[*c] > 0) {
                for to in (0..8).filter(|c| planes[*c] < 3) {
                    prop_assert!(gain(from, planes[from] - 1) >= gain(to, planes[to]));
                }
            }
        }
    }
}
