//! The parts that every figure has.

use super::svg::escape;

/// A figure of the report. Fields that are markup say so.
pub(super) struct Figure {
    /// The question that the figure answers.
    pub question: &'static str,
    /// What the data answers.
    pub answer: String,
    /// Titles and pictures, as markup.
    pub panels: Vec<(String, String)>,
    /// Keys, as markup.
    pub legend: Vec<String>,
    /// What is drawn, in plain words.
    pub caption: String,
    /// What is not drawn.
    pub note: String,
    /// What can be unfolded, as markup.
    pub more: String,
}

impl Figure {
    /// The figure as markup.
    pub fn html(&self) -> String {
        let Figure { question, answer, panels, legend, caption, note, more } = self;
        let class = if panels.len() == 1 { " class=\"alone\"" } else { "" };
        let mut html = format!("<figure{class}>\n<h3>{}</h3>\n", escape(question));
        html += &format!("<p class=\"answer\">{}</p>\n{}{more}<figcaption>\n", escape(answer), pair(panels));
        if !legend.is_empty() {
            html += &format!("<ul class=\"legend\">{}</ul>\n", legend.concat());
        }
        html += &format!("<p>{}</p>\n", escape(caption));
        if !note.is_empty() {
            html += &format!("<p>{}</p>\n", escape(note));
        }
        html + "</figcaption>\n</figure>\n"
    }
}

/// Pictures beside each other, or below each other on a narrow screen. Titles may be empty.
pub(super) fn pair(panels: &[(String, String)]) -> String {
    let panel = |(title, svg): &(String, String)| {
        let title = if title.is_empty() { String::new() } else { format!("<h4>{title}</h4>") };
        format!("<div>{title}{svg}</div>\n")
    };
    format!("<div class=\"pair\">{}</div>\n", panels.iter().map(panel).collect::<String>())
}

/// A key of a legend: a small picture, whose box is 30 by 14, and text, both markup.
pub(super) fn key(picture: &str, text: &str) -> String {
    format!("<li><svg viewBox=\"0 0 30 14\" aria-hidden=\"true\">{picture}</svg><span>{text}</span></li>")
}

/// A key with a dot.
pub(super) fn dot_key(class: &str, radius: f64, text: &str) -> String {
    key(&format!("<circle cx=\"15\" cy=\"7\" r=\"{radius}\" class=\"{class}\"/>"), text)
}

/// A key with a line.
pub(super) fn line_key(class: &str, text: &str) -> String {
    let line = "<path d=\"M1 7H29\"/><circle cx=\"15\" cy=\"7\" r=\"2.6\"/>";
    key(&format!("<g class=\"line {class}\">{line}</g>"), text)
}
