//! The spread of every channel of a head.

use super::scale::{Scale, extent};
use super::svg::{Frame, Svg, WIDTH, path};
use crate::study::{ChannelSpread, Spread};

const HEIGHT: f64 = 220.0;
const FRAME: Frame = Frame { left: 46.0, right: WIDTH - 8.0, top: 28.0, bottom: HEIGHT - 46.0 };

/// A bar for each channel: from its smallest to its largest number, where nine of ten lie, and the median. `others`
/// share the axis, so that pictures can be compared.
pub(super) fn bands(spread: &ChannelSpread, others: &ChannelSpread, label: &str, description: &str) -> String {
    let channels = &spread.channels;
    let all = channels.iter().chain(&others.channels).flat_map(|spread| [spread.min, spread.max].map(f64::from));
    let [low, high] = extent(all).unwrap_or([-1.0, 1.0]);
    let air = (high - low) * 0.04;
    let y = Scale::linear([low - air, high + air], [FRAME.bottom, FRAME.top]);
    let count = channels.len();
    let x = Scale::linear([-0.5, count as f64 - 0.5], [FRAME.left, FRAME.right]);
    let mut svg = Svg::new(HEIGHT);
    svg.y_axis(FRAME, &y, label);
    let ticks: Vec<f64> = (0..count).step_by((count / 4).max(1)).map(|channel| channel as f64).collect();
    svg.x_axis(FRAME, &x, &ticks, "channel");
    let width = (FRAME.right - FRAME.left) / count as f64;
    let mut bars = |class: &str, ends: fn(&Spread) -> [f32; 2]| {
        let bar = |(channel, spread): (usize, &Spread)| {
            let x = x.at(channel as f64);
            let [from, to] = ends(spread).map(|value| y.at(f64::from(value)));
            // A bar without height would not be seen.
            [Some([x, from + 0.4]), Some([x, to - 0.4]), None]
        };
        let path = path(channels.iter().enumerate().flat_map(bar));
        svg.add(format_args!("<path d=\"{path}\" class=\"{class}\" stroke-width=\"{:.2}\"/>", width * 0.86));
    };
    bars("range", |spread| [spread.min, spread.max]);
    bars("most", |spread| [spread.p05, spread.p95]);
    bars("median", |spread| [spread.median, spread.median]);
    svg.finish(description)
}
