//! Where the channels of heads lie: heads are computed with a multiple of 8 channels, whose pairs lie half a head apart.

use crate::ModelError;
use crate::weights::BLOCK_ROWS;
use dibit_device::Tensor;

/// Channels of a head are a multiple of this.
const CHANNELS: usize = 8;

/// How heads lie in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadPlaces {
    /// Channels of a head there.
    pub stored: usize,
    /// The first of them, which turn by a token's position: channel `i` is paired with `i + rotary / 2`.
    pub rotary: usize,
}

impl HeadPlaces {
    /// Channels of a head as it is computed: those that are stored, and zeros.
    pub fn head_dim(self) -> usize {
        self.stored.next_multiple_of(CHANNELS)
    }

    fn is_padded(self) -> bool {
        self.head_dim() != self.stored
    }

    fn is_whole(self) -> bool {
        !self.is_padded() && self.rotary == self.stored
    }

    /// For each channel of a query or key the one in the checkpoint; `None` for zeros.
    fn turned(self) -> Vec<Option<usize>> {
        let (half, pairs) = (self.head_dim() / 2, self.rotary / 2);
        let mut places = vec![None; self.head_dim()];
        for channel in 0..pairs {
            places[channel] = Some(channel);
            places[half + channel] = Some(pairs + channel);
        }
        // What is not turned takes what is left.
        let left = (pairs..half).chain(half + pairs..2 * half);
        left.zip(self.rotary..self.stored).for_each(|(place, channel)| places[place] = Some(channel));
        places
    }

    /// The same for a value.
    fn plain(self) -> Vec<Option<usize>> {
        (0..self.head_dim()).map(|channel| Some(channel).filter(|channel| *channel < self.stored)).collect()
    }

    /// A projection of queries or keys, or its bias as a column, with its rows in their places.
    pub fn turned_rows(self, tensor: Tensor) -> Result<Tensor, ModelError> {
        if self.is_whole() { Ok(tensor) } else { self.rows(&tensor, &self.turned()) }
    }

    /// A projection of values.
    pub fn value_rows(self, tensor: Tensor) -> Result<Tensor, ModelError> {
        if self.is_padded() { self.rows(&tensor, &self.plain()) } else { Ok(tensor) }
    }

    /// A vector of heads of queries or keys: a bias, a norm.
    pub fn turned_vector(self, tensor: Tensor) -> Result<Tensor, ModelError> {
        if self.is_whole() { Ok(tensor) } else { Ok(self.vector(&tensor, &self.turned())) }
    }

    /// A vector of heads of values.
    pub fn value_vector(self, tensor: Tensor) -> Result<Tensor, ModelError> {
        if self.is_padded() { Ok(self.vector(&tensor, &self.plain())) } else { Ok(tensor) }
    }

    /// A projection of outputs, which has columns for channels of values.
    pub fn output_columns(self, tensor: Tensor) -> Result<Tensor, ModelError> {
        if !self.is_padded() {
            return Ok(tensor);
        }
        self.check_numbers(&tensor)?;
        let (heads, head_dim) = (tensor.cols() / self.stored, self.head_dim());
        Ok(Tensor::from_blocks(tensor.dtype(), tensor.rows(), heads * head_dim, BLOCK_ROWS, |first, block| {
            for (i, out) in block.chunks_exact_mut(heads * head_dim).enumerate() {
                let row = tensor.row(first + i);
                for (out, own) in out.chunks_exact_mut(head_dim).zip(row.chunks_exact(self.stored)) {
                    out.fill(0.0);
                    out[..self.stored].copy_from_slice(own);
                }
            }
        }))
    }

    fn rows(self, tensor: &Tensor, places: &[Option<usize>]) -> Result<Tensor, ModelError> {
        let source = |row: usize| places[row % places.len()].map(|own| row / places.len() * self.stored + own);
        if !self.is_padded() {
            return Ok(tensor.reorder_rows(|row| source(row).expect("a row for each")));
        }
        self.check_numbers(tensor)?;
        let rows = tensor.rows() / self.stored * places.len();
        Ok(Tensor::from_blocks(tensor.dtype(), rows, tensor.cols(), 1, |row, block| match source(row) {
            Some(own) => tensor.widen_row(own, block),
            None => block.fill(0.0),
        }))
    }

    fn vector(self, tensor: &Tensor, places: &[Option<usize>]) -> Tensor {
        let all = tensor.to_f32();
        let heads = all.chunks_exact(self.stored);
        let values: Vec<f32> =
            heads.flat_map(|head| places.iter().map(|place| place.map_or(0.0, |channel| head[channel]))).collect();
        let len = values.len();
        Tensor::from_f32(values, tensor.dtype(), 1, len)
    }

    fn check_numbers(self, tensor: &Tensor) -> Result<(), ModelError> {
        match tensor.block_type() {
            None => Ok(()),
            Some(kind) => Err(ModelError::Unsupported {
                what: format!("head_dim {} with weights in {}", self.stored, kind.name()),
                supported: "multiples of 8, or f32, f16 and bf16 weights".into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dibit_device::DType;

    #[test]
    fn pairs_lie_half_a_head_apart_and_the_rest_takes_what_is_left() {
        let partial = HeadPlaces { stored: 8, rotary: 4 };
        let places: Vec<usize> = partial.turned().into_iter().flatten().collect();
        assert_eq!(places, [0, 1, 4, 5, 2, 3, 6, 7]);
        let padded = HeadPlaces { stored: 4, rotary: 4 };
        assert_eq!(padded.turned(), [Some(0), Some(1), None, None, Some(2), Some(3), None, None]);
        assert_eq!(padded.plain()[..5], [Some(0), Some(1), Some(2), Some(3), None]);
        for stored in 2..40 {
            for rotary in (2..=stored / 2 * 2).step_by(2) {
                let places = HeadPlaces { stored, rotary };
                let mut all: Vec<usize> = places.turned().into_iter().flatten().collect();
                all.sort_unstable();
                assert_eq!(all, (0..stored).collect::<Vec<_>>(), "{places:?}");
            }
        }
    }

    #[test]
    fn products_of_queries_and_keys_stay() {
        let places = HeadPlaces { stored: 12, rotary: 6 };
        let of = |seed: u64| Tensor::random(seed, 1.0, DType::F32, 2 * 12, 5);
        let dot = |a: &Tensor, b: &Tensor, rows: std::ops::Range<usize>| -> f32 {
            rows.map(|row| a.row(row).iter().zip(b.row(row)).map(|(x, y)| x * y).sum::<f32>()).sum()
        };
        let (q, k) = (of(1), of(2));
        let [own_q, own_k] = [&q, &k].map(|own| places.turned_rows(own.clone()).unwrap());
        for head in 0..2 {
            let exact = dot(&q, &k, 12 * head..12 * (head + 1));
            let got = dot(&own_q, &own_k, 16 * head..16 * (head + 1));
            assert!((got - exact).abs() < 1e-4, "{got} {exact}");
        }
        let v = places.value_rows(of(3)).unwrap();
        let o = Tensor::random(4, 1.0, DType::F32, 3, 24);
        let own_o = places.output_columns(o.clone()).unwrap();
        let product = |v: &Tensor, o: &Tensor| -> f32 {
            (0..v.rows()).map(|row| o.row(1)[row] * v.row(row).iter().sum::<f32>()).sum()
        };
        assert!((product(&v, &own_o) - product(&of(3), &o)).abs() < 1e-4);
    }
}
