/// Turns heads of `head_dim` channels back by rotary angles, given as cosine and sine of each of the `head_dim / 2` pairs:
/// channel `c` pairs with `c + head_dim / 2`.
#[inline(always)]
pub fn turn_back(heads: &mut [f32], head_dim: usize, angles: impl Iterator<Item = (f32, f32)>) {
    let half = head_dim / 2;
    for (c, (cosine, sine)) in angles.enumerate() {
        for head in heads.chunks_exact_mut(head_dim) {
            let (a, b) = (head[c], head[c + half]);
            (head[c], head[c + half]) = (a * cosine + b * sine, b * cosine - a * sine);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_back_undoes_the_rotary_embedding() {
        let (cosine, sine) = (0.6f32, 0.8f32);
        // (1, 2) and (3, 4) are pairs; turned forwards, a cos - b sin and b cos + a sin.
        let mut heads = [0.6 - 1.6, 3.0, 1.2 + 0.8, 4.0];
        turn_back(&mut heads, 4, [(cosine, sine), (1.0, 0.0)].into_iter());
        for (got, expected) in heads.iter().zip([1.0, 3.0, 2.0, 4.0]) {
            assert!((got - expected).abs() < 1e-6, "{heads:?}");
        }
    }
}
