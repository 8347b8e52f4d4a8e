//! The part of each group's range that misses least, many groups at a time: what
//! [`dibit_quant::Quantizer::fit_clipped`] says, exactly.

use super::quantise::{self, PLACES, RowParameters};
use super::simd::Isa;
use dibit_quant::{Bits, Clip, Parameters, Quantizer};

/// A group on its way to its parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    /// Ends of its range.
    pub min: f32,
    pub max: f32,
    /// Bits of its codes; none where a mean stands for it.
    pub bits: Option<Bits>,
    /// Those of its whole range at first.
    pub parameters: Parameters,
}

/// Buffers of the search.
#[derive(Default)]
pub(super) struct Search {
    /// Parameters of the share that is tried.
    own: RowParameters,
    tried: Vec<Option<Parameters>>,
    errors: Vec<f32>,
    /// Errors of the parameters that are the best so far.
    least: Vec<f32>,
}

impl Group {
    /// The parameters of a share of the range; `None` where fp16 cannot hold them, or there are no codes.
    fn of_share(&self, quantizer: Quantizer, share: f32) -> Option<Parameters> {
        let (min, max) = Clip::ends(self.min, self.max, share);
        quantizer.fit_range(min, max, self.bits?).ok()
    }

    fn max_code(&self) -> u8 {
        self.bits.map_or(0, Bits::max_code)
    }
}

impl Search {
    /// Groups side by side: `rows` have one number of each.
    pub(super) fn columns<'a>(
        &mut self,
        isa: Isa,
        quantizer: Quantizer,
        rows: impl Iterator<Item = &'a [f32]> + Clone,
        groups: &mut [Group],
    ) {
        let Self { own, tried, errors, least } = self;
        own.resize(groups.len());
        least.clear();
        least.resize(groups.len(), f32::INFINITY);
        for share in Clip::SHARES {
            tried.clear();
            tried.extend(groups.iter().map(|group| group.of_share(quantizer, share)));
            for (place, (group, tried)) in groups.iter().zip(tried.iter()).enumerate() {
                own.set(place..place + 1, tried.unwrap_or(group.parameters), group.max_code());
            }
            errors.clear();
            errors.resize(groups.len(), 0.0);
            rows.clone().for_each(|row| quantise::add_squares(isa, row, own, quantizer, errors));
            for (((group, tried), error), least) in groups.iter_mut().zip(&*tried).zip(&*errors).zip(&mut *least) {
                let Some(tried) = tried.filter(|_| *error < *least) else { continue };
                (group.parameters, *least) = (tried, *error);
            }
        }
    }

    /// One group, number after number: its shares lie side by side.
    pub(super) fn row(&mut self, isa: Isa, quantizer: Quantizer, numbers: &[f32], group: &mut Group) {
        let share = |place: usize| Clip::SHARES[place.min(Clip::SHARES.len() - 1)];
        let tried: [_; PLACES] = std::array::from_fn(|place| group.of_share(quantizer, share(place)));
        self.own.resize(PLACES);
        for (place, tried) in tried.iter().enumerate() {
            self.own.set(place..place + 1, tried.unwrap_or(group.parameters), group.max_code());
        }
        let mut errors = [0.0; PLACES];
        quantise::add_squares_of_each(isa, numbers, &self.own, quantizer, &mut errors);
        let mut least = f32::INFINITY;
        for (tried, error) in tried.into_iter().zip(errors) {
            let Some(tried) = tried.filter(|_| error < least) else { continue };
            (group.parameters, least) = (tried, error);
        }
    }
}
