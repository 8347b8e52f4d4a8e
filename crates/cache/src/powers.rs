//! Powers of two that heads are divided by before they are stored, where fp16 cannot hold their keys or values as they are.

/// The largest number of fp16.
const HALF_MAX: f32 = 65_504.0;

/// How much larger than what was seen a number may be before the power is raised again.
const ROOM: f32 = 4.0;

/// For each KV head of a layer the exponent of the power of two that its keys, and its values, are divided by before they
/// are stored. Queries and outputs take it back, so that attention is what it was, but for the rounding of numbers that are too
/// small for a normal fp16 then.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Powers {
    /// Exponents of keys and of values, a number for each KV head; empty where all are 0.
    exponents: [Vec<u8>; 2],
}

impl Powers {
    /// The largest exponent: no f32 needs more to fit in fp16.
    pub const MOST: u8 = 120;

    /// Takes these exponents of keys, or of values, a number for each KV head, or none.
    pub fn set(&mut self, keys: bool, exponents: Vec<u8>) {
        let is_none = exponents.iter().all(|exponent| *exponent == 0);
        self.exponents[usize::from(!keys)] = if is_none { Vec::new() } else { exponents };
    }

    /// Exponents of keys, or of values; empty where all are 0.
    pub fn exponents(&self, keys: bool) -> &[u8] {
        &self.exponents[usize::from(!keys)]
    }

    /// Whether everything is stored as it is.
    pub fn is_none(&self) -> bool {
        self.exponents.iter().flatten().all(|exponent| *exponent == 0)
    }

    /// What keys, or values, of a KV head are multiplied by before they are stored.
    pub fn factor(&self, keys: bool, kv_head: usize) -> f32 {
        let exponent = self.exponents(keys).get(kv_head).copied().unwrap_or(0);
        2f32.powi(-i32::from(exponent))
    }

    /// Raises the exponent of one of `heads` KV heads, so that fp16 holds `value`, which is what was to be stored under the
    /// exponent of now, and numbers `ROOM` times as large. The new exponent.
    pub fn raise(&mut self, keys: bool, kv_head: usize, heads: usize, value: f32) -> u8 {
        let own = &mut self.exponents[usize::from(!keys)];
        own.resize(heads, 0);
        let limit = HALF_MAX / ROOM;
        let mut rest = value.abs();
        while rest > limit && own[kv_head] < Self::MOST {
            rest /= 2.0;
            own[kv_head] += 1;
        }
        own[kv_head]
    }

    /// With one exponent, the largest, in each `frame` of heads: those are rotated together, and share groups of codes.
    pub fn alike_in(mut self, frame: usize) -> Self {
        for heads in self.exponents.iter_mut().flat_map(|own| own.chunks_mut(frame)) {
            let most = heads.iter().copied().max().unwrap_or(0);
            heads.fill(most);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_seen_fits_with_room(value in 65_504f32..f32::MAX, further in 1f32..4.0, sign in any::<bool>()) {
            let mut powers = Powers::default();
            prop_assert!(powers.is_none());
            let value = if sign { value } else { -value };
            let exponent = powers.raise(true, 1, 3, value);
            prop_assert_eq!(powers.exponents(true), [0, exponent, 0]);
            prop_assert_eq!(powers.exponents(false), []);
            let stored = value * powers.factor(true, 1);
            prop_assert!((stored * further).abs() <= 65_504.0 && stored.abs() > 8_000.0, "{}", stored);
            // What is divided and multiplied by a power of two is what it was.
            prop_assert_eq!(stored / powers.factor(true, 1), value);
            prop_assert_eq!((powers.factor(true, 0), powers.factor(false, 1)), (1.0, 1.0));
            prop_assert!(!powers.is_none());
            let alike = powers.clone().alike_in(3);
            prop_assert_eq!(alike.exponents(true), [exponent; 3]);
            // A larger number later, of what is stored under the power of now.
            prop_assert!(powers.raise(true, 1, 3, 70_000.0) > exponent);
        }
    }
}
