use super::number::tick;
use super::scale::Scale;
use std::fmt::Write;

/// Width of every picture, in its own units. On a phone one unit is a little less than a pixel.
pub(super) const WIDTH: f64 = 420.0;

/// Height of text that the layout reckons with: that of the narrowest screen.
pub(super) const FONT: f64 = 14.0;

/// A picture under construction.
pub(super) struct Svg {
    height: f64,
    body: String,
}

/// Where text is fixed to its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// The rectangle of a picture that data is drawn in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Frame {
    pub left: f64,
    pub right: f64,
    pub top: f64,
    pub bottom: f64,
}

impl Svg {
    /// An empty picture.
    pub fn new(height: f64) -> Self {
        Svg { height, body: String::new() }
    }

    /// Adds markup, which must be escaped.
    pub fn add(&mut self, markup: std::fmt::Arguments) {
        self.body.write_fmt(markup).expect("a string takes all text");
    }

    /// Adds text, which is markup: made by [`escape`] or `notation::svg`.
    pub fn text(&mut self, x: f64, y: f64, anchor: Anchor, class: &str, markup: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        self.add(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\"{anchor} class=\"{class}\">{markup}</text>"));
    }

    /// Adds a straight line.
    pub fn line(&mut self, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], class: &str) {
        self.add(format_args!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>"));
    }

    /// Adds the vertical axis: grid lines, ticks, and its label above.
    pub fn y_axis(&mut self, frame: Frame, scale: &Scale, label: &str) {
        for value in scale.ticks(30.0) {
            let y = scale.at(value);
            self.line([frame.left, y], [frame.right, y], "grid");
            self.text(frame.left - 6.0, y + 4.0, Anchor::End, "tick", &tick(value));
        }
        self.text(2.0, FONT, Anchor::Start, "axis", &escape(label));
    }

    /// Adds the horizontal axis below the frame, with ticks at `values`.
    pub fn x_axis(&mut self, frame: Frame, scale: &Scale, values: &[f64], label: &str) {
        self.line([frame.left, frame.bottom], [frame.right, frame.bottom], "base");
        for &value in values {
            let x = scale.at(value);
            self.line([x, frame.bottom], [x, frame.bottom + 4.0], "base");
            self.text(x, frame.bottom + 18.0, Anchor::Middle, "tick", &tick(value));
        }
        let middle = (frame.left + frame.right) / 2.0;
        self.text(middle, frame.bottom + 36.0, Anchor::Middle, "axis", &escape(label));
    }

    /// The markup so far, to be put into another picture.
    pub fn inner(&self) -> &str {
        &self.body
    }

    /// The picture, with a description for those who do not see it.
    pub fn finish(self, description: &str) -> String {
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" aria-label=\"{}\">{}</svg>\n",
            self.height,
            escape(description),
            self.body
        )
    }
}

/// A path through points; a gap where one is missing.
pub(super) fn path(points: impl Iterator<Item = Option<[f64; 2]>>) -> String {
    let mut path = String::new();
    let mut draws = false;
    for point in points {
        if let Some([x, y]) = point {
            let _ = write!(path, "{}{x:.1} {y:.1}", if draws { 'L' } else { 'M' });
        }
        draws = point.is_some();
    }
    path
}

/// Text as markup.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            character => escaped.push(character),
        }
    }
    escaped
}

/// Width of text of the height [`FONT`], as an estimate on the safe side.
pub(super) fn text_width(text: &str) -> f64 {
    let em = |character: char| match character {
        'i' | 'l' | 'j' | 't' | 'f' | '.' | ',' | '-' | ' ' | '(' | ')' => 0.36,
        'm' | 'w' | 'M' | 'W' => 0.9,
        character if character.is_ascii_uppercase() => 0.7,
        character if character.is_ascii() => 0.58,
        _ => 1.0,
    };
    text.chars().map(em).sum::<f64>() * FONT
}

/// The text, or as much of its beginning as fits.
pub(super) fn shortened(text: &str, width: f64) -> String {
    if text_width(text) <= width {
        return text.into();
    }
    let mut short = String::new();
    for character in text.chars() {
        short.push(character);
        if text_width(&short) + text_width("…") > width {
            short.pop();
            break;
        }
    }
    short + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("<a b=\"c\">'&'"), "&lt;a b=&quot;c&quot;&gt;&#39;&amp;&#39;");
        let mut svg = Svg::new(10.0);
        svg.x_axis(
            Frame { left: 0.0, right: 1.0, top: 0.0, bottom: 1.0 },
            &Scale::linear([0.0, 1.0], [0.0, 1.0]),
            &[],
            "a<b",
        );
        assert!(svg.finish("\"<").contains("aria-label=\"&quot;&lt;\""));
    }

    #[test]
    fn a_missing_point_is_a_gap() {
        let points = [Some([1.0, 2.0]), Some([3.0, 4.0]), None, Some([5.0, 6.0])];
        assert_eq!(path(points.into_iter()), "M1.0 2.0L3.0 4.0M5.0 6.0");
    }
}
