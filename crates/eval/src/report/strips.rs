//! Rows of dots on one axis: each row its name and, below it, its numbers.

use super::scale::Scale;
use super::svg::{Anchor, FONT, Frame, Svg, WIDTH, escape, shortened, text_width};

/// One row.
pub(super) struct Strip {
    /// Name.
    pub name: Name,
    /// What is written at the right.
    pub note: String,
    /// The dots, the most important one last.
    pub dots: Vec<Dot>,
}

/// The name of a row.
pub(super) enum Name {
    /// Text, which is shortened where there is no room for it.
    Text(String),
    /// Markup.
    Markup(String),
}

/// A dot of a row.
pub(super) struct Dot {
    /// Its number; what is not finite is not drawn.
    pub value: f64,
    /// Class of its colour.
    pub class: String,
    /// Radius.
    pub radius: f64,
    /// What it says when it is pointed at; empty for nothing.
    pub title: String,
}

/// Kind of the axis.
pub(super) enum Ticks {
    /// Bits of a number.
    Bits,
    /// Any number.
    Round,
}

const ROW: f64 = 36.0;

/// The rows below each other, over a logarithmic axis. A number of 0 is drawn at the axis' left end.
pub(super) fn strips(rows: &[Strip], ticks: Ticks, axis: &str, description: &str) -> String {
    let top = 4.0;
    let bottom = top + ROW * rows.len() as f64;
    let frame = Frame { left: 10.0, right: WIDTH - 10.0, top, bottom };
    let scale = Scale::around(
        rows.iter().flat_map(|row| row.dots.iter().map(|dot| dot.value)),
        [frame.left + 6.0, frame.right - 6.0],
    );
    let mut svg = Svg::new(bottom + 44.0);
    let values = match ticks {
        Ticks::Bits => scale.bit_ticks(34.0),
        Ticks::Round => scale.ticks(48.0),
    };
    for &value in &values {
        svg.line([scale.at(value), top], [scale.at(value), bottom], "grid");
    }
    svg.x_axis(frame, &scale, &values, axis);
    for (index, row) in rows.iter().enumerate() {
        let y = top + ROW * index as f64;
        svg.line([frame.left, y + 25.0], [frame.right, y + 25.0], "rail");
        for dot in row.dots.iter().filter(|dot| dot.value.is_finite()) {
            svg.add(format_args!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{}\" class=\"{}\">",
                scale.at(dot.value),
                y + 25.0,
                dot.radius,
                dot.class
            ));
            if !dot.title.is_empty() {
                svg.add(format_args!("<title>{}</title>", escape(&dot.title)));
            }
            svg.add(format_args!("</circle>"));
        }
        let name = match &row.name {
            Name::Text(text) => escape(&shortened(text, frame.right - frame.left - text_width(&row.note) - FONT)),
            Name::Markup(markup) => markup.clone(),
        };
        svg.text(frame.left, y + 14.0, Anchor::Start, "label", &name);
        svg.text(frame.right, y + 14.0, Anchor::End, "value", &escape(&row.note));
    }
    svg.finish(description)
}
