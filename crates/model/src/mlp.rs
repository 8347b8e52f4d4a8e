//! The gated layers of a decoder layer, or a mixture of such.

use crate::expert_weights::StackWeights;
use crate::linear::Linear;
use crate::{ExpertSpec, ExpertWeights, LinearWeights, ModelError};
use dibit_cache::Phase;
use dibit_device::{Activation, Device, Output, Routing, Tensor};

/// Weights of the gated layers.
#[derive(Clone)]
pub enum MlpWeights {
    /// One for all tokens.
    Gated(GatedWeights),
    /// A mixture of experts.
    Experts(ExpertWeights),
}

/// Weights of gated layers.
#[derive(Clone)]
pub struct GatedWeights {
    /// `[intermediate_size, hidden_size]`
    pub gate: LinearWeights,
    /// `[intermediate_size, hidden_size]`
    pub up: LinearWeights,
    /// `[hidden_size, intermediate_size]`
    pub down: LinearWeights,
}

impl MlpWeights {
    /// The gated layers; `None` for a mixture.
    pub fn gated(&self) -> Option<&GatedWeights> {
        match self {
            MlpWeights::Gated(own) => Some(own),
            MlpWeights::Experts(_) => None,
        }
    }

    /// What chooses experts.
    pub(crate) fn router(&self) -> Option<&Tensor> {
        match self {
            MlpWeights::Gated(_) => None,
            MlpWeights::Experts(own) => Some(&own.router.weight),
        }
    }

    /// All but what chooses experts.
    pub(crate) fn gated_matrices(&self) -> Vec<&Tensor> {
        match self {
            MlpWeights::Gated(GatedWeights { gate, up, down }) => vec![&gate.weight, &up.weight, &down.weight],
            MlpWeights::Experts(own) => own.matrices().collect(),
        }
    }

    /// Bytes that a token does not read: those of experts that it does not take.
    pub(crate) fn unread_bytes(&self) -> usize {
        let MlpWeights::Experts(own) = self else { return 0 };
        let all: usize = own.matrices().map(Tensor::num_bytes).sum();
        all / own.routing.experts * (own.routing.experts - own.routing.chosen)
    }
}

/// The gated layers on a device; copies share their numbers.
pub(crate) enum Mlp<D: Device> {
    Gated { gate: Linear<D>, up: Linear<D>, down: Linear<D> },
    Experts(ExpertMlp<D>),
}

/// A mixture of experts on a device.
pub(crate) struct ExpertMlp<D: Device> {
    router: Linear<D>,
    gate: D::Stack,
    up: D::Stack,
    down: D::Stack,
    routing: Routing,
}

impl<D: Device> Clone for ExpertMlp<D> {
    fn clone(&self) -> Self {
        let ExpertMlp { router, gate, up, down, routing } = self;
        ExpertMlp { router: router.clone(), gate: gate.clone(), up: up.clone(), down: down.clone(), routing: *routing }
    }
}

impl<D: Device> Clone for Mlp<D> {
    fn clone(&self) -> Self {
        match self {
            Mlp::Gated { gate, up, down } => Mlp::Gated { gate: gate.clone(), up: up.clone(), down: down.clone() },
            Mlp::Experts(own) => Mlp::Experts(own.clone()),
        }
    }
}

impl<D: Device> Mlp<D> {
    pub(crate) fn new(device: &D, weights: &MlpWeights) -> Result<Self, ModelError> {
        Ok(match weights {
            MlpWeights::Gated(GatedWeights { gate, up, down }) => Mlp::Gated {
                gate: Linear::new(device, gate)?,
                up: Linear::new(device, up)?,
                down: Linear::new(device, down)?,
            },
            MlpWeights::Experts(ExpertWeights { router, gate, up, down, routing }) => {
                let stack = |own: &StackWeights| device.stack(own.matrices.clone(), own.bias.clone());
                Mlp::Experts(ExpertMlp {
                    router: Linear::new(device, router)?,
                    gate: stack(gate)?,
                    up: stack(up)?,
                    down: stack(down)?,
                    routing: *routing,
                })
            }
        })
    }
}

/// What a mixture writes, for the rows of a tile.
pub(crate) struct ExpertSpace<D: Device> {
    /// Logits of the router, `[row][experts]`.
    logits: D::Buffer,
    /// `[pair][intermediate_size]`
    gate: D::Buffer,
    /// `[pair][intermediate_size]`
    up: D::Buffer,
    /// `[pair][hidden_size]`
    down: D::Buffer,
    chosen: D::Chosen,
    intermediate_size: usize,
}

impl<D: Device> ExpertSpace<D> {
    pub(crate) fn new(device: &D, spec: &ExpertSpec, hidden: usize, rows: usize) -> Result<Self, ModelError> {
        let (routing, pairs) = (spec.routing, rows * spec.routing.chosen);
        Ok(ExpertSpace {
            logits: device.buffer(rows * routing.experts)?,
            gate: device.buffer(pairs * spec.intermediate_size)?,
            up: device.buffer(pairs * spec.intermediate_size)?,
            down: device.buffer(pairs * hidden)?,
            chosen: device.chosen(routing, rows)?,
            intermediate_size: spec.intermediate_size,
        })
    }
}

/// Numbers that a row takes in a mixture.
pub(crate) fn expert_width(spec: &ExpertSpec, hidden: usize) -> usize {
    spec.routing.experts + spec.routing.chosen * (2 * spec.intermediate_size + hidden)
}

impl<D: Device> ExpertMlp<D> {
    /// Adds what the experts of `rows` rows make of `x` to the residual stream from row `first` on.
    pub(crate) fn run(
        &self,
        device: &D,
        phase: Phase,
        (x, rows): (&D::Buffer, usize),
        activation: Activation,
        space: &mut ExpertSpace<D>,
        (hidden, first, width): (&mut D::Buffer, usize, usize),
    ) {
        let ExpertSpace { logits, gate, up, down, chosen, intermediate_size } = space;
        self.router.run(device, phase, x, rows, logits, Output::Write(0));
        device.choose(self.routing, logits, rows, chosen);
        device.expert_linear(phase, x, false, chosen, &self.gate, gate);
        device.expert_linear(phase, x, false, chosen, &self.up, up);
        device.activate(activation, gate, up, rows * self.routing.chosen * *intermediate_size);
        device.expert_linear(phase, gate, true, chosen, &self.down, down);
        device.add_experts(down, chosen, width, hidden, first);
    }
}
