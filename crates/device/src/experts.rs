//! Mixtures of experts: gated layers of which each token takes a few.

use crate::{Dense, DeviceError, Tensor};
use dibit_cache::Phase;

/// How a token's experts are chosen: those with the largest logits of the router, of equals the first ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routing {
    /// How many experts there are.
    pub experts: usize,
    /// How many a token takes.
    pub chosen: usize,
    /// Whether the softmax that weighs them is over the chosen ones alone, or over all.
    pub normalised: bool,
}

/// The experts of tokens, each with its weight.
pub trait Experts: Dense {
    /// Matrices of one shape, one for each expert, with their biases.
    type Stack: Send + Sync + Clone;
    /// Which experts the rows of a pass take: `rows * chosen` pairs of a row and an expert, in the order of rows and, within
    /// one, of falling logits.
    type Chosen: Send;

    /// A stack of matrices `[out, in]`; `bias`, where there is one, is `[experts, out]`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn stack(&self, matrices: Vec<Tensor>, bias: Option<Tensor>) -> Result<Self::Stack, DeviceError>;

    /// Room for the choices of up to `rows` rows.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn chosen(&self, routing: Routing, rows: usize) -> Result<Self::Chosen, DeviceError>;

    /// Chooses the experts of `rows` rows by `logits`, `[row][experts]`.
    fn choose(&self, routing: Routing, logits: &Self::Buffer, rows: usize, out: &mut Self::Chosen);

    /// `x w^T + bias` for each pair, `w` being the matrix of its expert, into `[pair][out]`. `x` holds a row for each pair, or
    /// one for each row. A pair's result does not depend on what other rows have chosen.
    fn expert_linear(
        &self,
        phase: Phase,
        x: &Self::Buffer,
        of_pairs: bool,
        chosen: &mut Self::Chosen,
        stack: &Self::Stack,
        out: &mut Self::Buffer,
    );

    /// `out[first + row] += sum of weight * x[pair]` over the pairs of each row, of `width` numbers.
    fn add_experts(&self, x: &Self::Buffer, chosen: &Self::Chosen, width: usize, out: &mut Self::Buffer, first: usize);
}
