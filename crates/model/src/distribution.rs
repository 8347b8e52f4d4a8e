//! Next-token distributions, from logits.

use crate::argmax;

/// A distribution over the vocabulary.
pub struct Distribution<'a> {
    logits: &'a [f32],
    /// Logarithm of the sum of the exponentials of the logits.
    log_total: f64,
    /// The most likely token, the first of equals.
    pub top: usize,
}

impl<'a> Distribution<'a> {
    /// The distribution of the logits of a whole vocabulary.
    ///
    /// # Panics
    /// If there are none.
    pub fn new(logits: &'a [f32]) -> Self {
        let top = argmax(logits);
        let largest = logits[top];
        let total: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
        Distribution { logits, log_total: f64::from(largest) + total.ln(), top }
    }

    /// Negative log-likelihood of a token, in nats.
    pub fn nll(&self, id: u32) -> f64 {
        self.log_total - f64::from(self.logits[id as usize])
    }

    /// KL divergence of `other` from this distribution, `sum p log(p / q)`, in nats.
    pub fn kl(&self, other: &Distribution) -> f64 {
        let offset = other.log_total - self.log_total;
        let terms = self.logits.iter().zip(other.logits).map(|(p, q)| {
            let weight = f64::from(((f64::from(*p) - self.log_total) as f32).exp());
            weight * (f64::from(p - q) + offset)
        });
        let sum: f64 = terms.sum();
        // Rounding can make a divergence of nothing slightly negative.
        if sum < 0.0 { 0.0 } else { sum }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_two_coins() {
        let (fair, biased) = ([0.0f32, 0.0], [3f32.ln() + 7.0, 7.0]);
        let (p, q) = (Distribution::new(&fair), Distribution::new(&biased));
        assert!((q.nll(0) - (4f64 / 3.0).ln()).abs() < 1e-6);
        assert!((p.nll(1) - 2f64.ln()).abs() < 1e-6);
        let expected = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((p.kl(&q) - expected).abs() < 1e-6);
        assert!(p.kl(&p) < 1e-9 && q.kl(&p) > 0.0);
        assert_eq!((p.top, q.top), (0, 0));
    }
}
