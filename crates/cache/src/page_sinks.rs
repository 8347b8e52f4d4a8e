//! Places inside a page for tokens that its codes would spoil.

use crate::AutoSinks;
use crate::HALF_BYTES;
use dibit_quant::{Bits, packed_len};

/// Places of protected tokens in a page. All offsets are bytes from the page's start.
///
/// A place has the slot of its token in the page, a byte, [`PageSinks::EMPTY`] where it has none; places that are in use come
/// first, by rising slots. Rows of keys and of values follow, one for each place: a scale and a minimum in fp16, then the
/// codes of all channels in their own order, as [`dibit_quant::pack`] packs them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PageSinks {
    /// How tokens are chosen, and how many places there are.
    pub auto: AutoSinks,
    /// Channels of a head.
    pub head_dim: usize,
    /// Offset of the slots.
    pub slots: usize,
    /// Offset of the rows of keys.
    pub keys: usize,
    /// Offset of the rows of values.
    pub values: usize,
}

impl AutoSinks {
    /// Slots of a page whose values are small beside the others', by rising slots: by the `squares` of the norms of its
    /// tokens' values in the model's own frame ([`square_norm`]), without those that are protected `elsewhere`.
    ///
    /// The median is the number in the middle of the sorted norms, the upper one of two. Where there are more tokens than
    /// places, the smallest norms win, of equals the lower slots.
    pub fn choose(self, squares: &[f32], elsewhere: &[bool]) -> Vec<usize> {
        let all = squares.iter().copied().zip(0..);
        let mut norms: Vec<(f32, usize)> = all.filter(|(_, slot)| !elsewhere[*slot]).collect();
        norms.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let Some((median, _)) = norms.get(norms.len() / 2) else { return Vec::new() };
        let limit = self.share * self.share * median;
        let small = norms.iter().take(self.places).take_while(|(norm, _)| *norm < limit);
        let mut slots: Vec<usize> = small.map(|(_, slot)| *slot).collect();
        slots.sort_unstable();
        slots
    }
}

/// Numbers of [`square_norm`] that are added on their own.
const LANES: usize = 32;

/// The sum of squares, in the one order in which every device adds them: every 32nd number by itself, then the sums by
/// halves.
pub fn square_norm(numbers: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    for numbers in numbers.chunks(LANES) {
        sums.iter_mut().zip(numbers).for_each(|(sum, x)| *sum += x * x);
    }
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        half /= 2;
    }
    sums[0]
}

impl PageSinks {
    /// The slot of a place without a token.
    pub const EMPTY: u8 = u8::MAX;

    /// Bits of a channel of keys and of values. Such tokens take much attention; where a norm follows it, what their small
    /// values miss is made as large as the rest.
    pub const BITS: Bits = Bits::Eight;

    pub(crate) fn new(auto: AutoSinks, head_dim: usize, offset: usize) -> Self {
        let keys = offset + auto.places.next_multiple_of(HALF_BYTES);
        let values = keys + auto.places * row_bytes(head_dim);
        PageSinks { auto, head_dim, slots: offset, keys, values }
    }

    /// Bytes of a row of keys, or of values.
    pub fn row_bytes(&self) -> usize {
        row_bytes(self.head_dim)
    }

    /// Offset behind the last row.
    pub(crate) fn end(&self) -> usize {
        self.values + self.auto.places * self.row_bytes()
    }

    /// Bytes of all places.
    pub fn bytes(&self) -> usize {
        self.end() - self.slots
    }
}

/// Bytes of a row: its scale and minimum, and its codes, to a multiple of two.
fn row_bytes(head_dim: usize) -> usize {
    2 * HALF_BYTES + packed_len(PageSinks::BITS, head_dim).next_multiple_of(HALF_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_are_chosen_up_to_the_places() {
        let auto = AutoSinks { first: 4, places: 8, share: 0.4 };
        // Norms of one channel; the median of those that count is 10.
        let page = |small: &[(usize, f32)]| {
            let mut values = vec![10.0; 128];
            small.iter().for_each(|(slot, norm)| values[*slot] = *norm);
            values
        };
        let choose = |values: &[f32], elsewhere: &[bool; 128]| {
            let squares: Vec<f32> = values.iter().map(|x| square_norm(&[*x])).collect();
            auto.choose(&squares, elsewhere)
        };
        let none = [false; 128];
        assert_eq!(choose(&page(&[]), &none), [0; 0]);
        assert_eq!(choose(&page(&[(127, 3.9), (5, -4.1)]), &none), [127]);
        // 8, 9 and 128 candidates.
        let some = |count: usize| page(&(0..count).map(|i| (i * 7 % 128, 1.0 + (i % 3) as f32)).collect::<Vec<_>>());
        let sorted = |mut slots: Vec<usize>| {
            slots.sort_unstable();
            slots
        };
        assert_eq!(choose(&some(8), &none), sorted((0..8).map(|i| i * 7).collect()));
        assert_eq!(choose(&some(9), &none), sorted((0..8).map(|i| i * 7).collect()));
        // All equal: none is small. Nearly all small: they are the median.
        assert_eq!(choose(&[2.0; 128], &none), [0; 0]);
        assert_eq!(choose(&some(100), &none), [0; 0]);
        // Protected elsewhere: neither chosen, nor part of the median.
        let mut elsewhere = none;
        elsewhere[127] = true;
        assert_eq!(choose(&page(&[(127, 3.9), (5, 3.0)]), &elsewhere), [5]);
        assert_eq!(choose(&page(&[]), &[true; 128]), [0; 0]);
    }

    #[test]
    fn places_take_what_their_rows_need() {
        let auto = AutoSinks { first: 4, places: 8, share: 0.4 };
        let own = PageSinks::new(auto, 64, 100);
        assert_eq!((own.slots, own.keys, own.values), (100, 108, 108 + 8 * 68));
        assert_eq!(own.bytes(), 8 + 2 * 8 * 68);
        let odd = PageSinks::new(AutoSinks { places: 3, ..auto }, 72, 0);
        assert_eq!((odd.keys, odd.row_bytes(), odd.end()), (4, 76, 4 + 2 * 3 * 76));
    }
}
