//! A table as markup.

use super::svg::escape;
use std::fmt::Write;

/// A table whose first column names the rows. All text is escaped.
pub(super) struct Sheet {
    /// What it is called by those who do not see it.
    pub label: &'static str,
    /// Titles of the columns, and what is written below them.
    pub heads: Vec<(String, String)>,
    /// The rows.
    pub rows: Vec<SheetRow>,
}

/// A row of a table.
pub(super) struct SheetRow {
    /// Whether it is shaded.
    pub best: bool,
    /// Name, and what is written below it.
    pub name: (String, String),
    /// The other cells: a figure, and a second one in small print.
    pub cells: Vec<(String, String)>,
}

impl Sheet {
    /// The table as markup.
    pub fn html(&self) -> String {
        let mut html = format!(
            "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{}\"><table>\n<thead><tr>",
            escape(self.label)
        );
        for (head, unit) in &self.heads {
            let _ = write!(html, "<th scope=\"col\">{}<small>{}</small></th>", escape(head), escape(unit));
        }
        html.push_str("</tr></thead>\n<tbody>\n");
        for SheetRow { best, name: (name, words), cells } in &self.rows {
            let class = if *best { " class=\"best\"" } else { "" };
            let (name, words) = (escape(name), escape(words));
            let _ = write!(html, "<tr{class}><th scope=\"row\">{name}<small>{words}</small></th>");
            for (figure, small) in cells {
                let small = if small.is_empty() { String::new() } else { format!("<small>{}</small>", escape(small)) };
                let _ = write!(html, "<td>{}{small}</td>", escape(figure));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</tbody></table></div>\n");
        html
    }
}

/// A cell without small print.
pub(super) fn plain(figure: String) -> (String, String) {
    (figure, String::new())
}
