//! Texts that the user gives.

use anyhow::{Context, Result, bail};
use dibit_model::{ChatTemplate, Message};
use serde_json::Value;
use std::path::Path;

/// A text file, UTF-8.
pub fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the text {}", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text; convert it first", path.display()))
}

/// One text of several.
#[derive(Debug, PartialEq, Eq)]
pub enum Document {
    /// As it is.
    Text(String),
    /// A conversation.
    Messages(Vec<Message>),
}

/// What an entry of a file may be.
const FORMS: &str = "{\"text\": \"...\"}, {\"messages\": [{\"role\": \"...\", \"content\": \"...\"}, ...]} or \
                     {\"instruction\": \"...\", \"input\": \"...\", \"output\": \"...\"}";

impl Document {
    /// An entry of a file: a text, a conversation, or a sample of Alpaca; `None` for anything else.
    fn parse(value: &Value) -> Option<Self> {
        let string = |key: &str| value.get(key).and_then(Value::as_str);
        if let Some(text) = string("text") {
            return Some(Document::Text(text.to_owned()));
        }
        if let Some(messages) = value.get("messages") {
            return Some(Document::Messages(serde_json::from_value(messages.clone()).ok()?));
        }
        Some(Document::Text(alpaca(string("instruction")?, string("input").unwrap_or_default(), string("output")?)))
    }

    /// The text; of a conversation, what the model's template makes of it, or else its parts one after the other.
    pub fn render(&self, template: Option<&ChatTemplate>) -> Result<String> {
        match (self, template) {
            (Document::Text(text), _) => Ok(text.clone()),
            (Document::Messages(messages), Some(template)) => Ok(template.render(messages, false)?),
            (Document::Messages(messages), None) => {
                let parts: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
                Ok(parts.join("\n\n"))
            }
        }
    }
}

/// A sample as the makers of Alpaca lay it out for a model to learn from.
fn alpaca(instruction: &str, input: &str, output: &str) -> String {
    let (paired, input) = match input {
        "" => ("", String::new()),
        _ => (", paired with an input that provides further context", format!("### Input:\n{input}\n\n")),
    };
    format!(
        "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the \
         request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
    )
}

/// The documents of a file: of one that ends in `.jsonl`, an entry a line; of `.json`, a list of entries; of any other, the
/// whole text.
pub fn read_documents(path: &Path) -> Result<Vec<Document>> {
    let text = read(path)?;
    let ends_in = |name: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(name));
    if ends_in("json") {
        let entries: Vec<Value> = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a list in JSON; it must hold entries as {FORMS}", path.display()))?;
        let document = |(index, entry)| {
            let Some(document) = Document::parse(entry) else {
                bail!("entry {} of {} is not {FORMS}", index + 1, path.display());
            };
            Ok(document)
        };
        return entries.iter().enumerate().map(document).collect();
    }
    if !ends_in("jsonl") {
        return Ok(vec![Document::Text(text)]);
    }
    let mut documents = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("line {} of {}", index + 1, path.display());
        let value: Value = serde_json::from_str(line).with_context(|| format!("{} is not JSON", place()))?;
        match Document::parse(&value) {
            Some(document) => documents.push(document),
            None => bail!("{} has no \"text\"; every line must be an object as {FORMS}", place()),
        }
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn entries_are_texts_conversations_or_samples() {
        let text = |value: Value| Document::parse(&value).unwrap().render(None).unwrap();
        assert_eq!(text(json!({"text": "a", "id": 3})), "a");
        let chat = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
        assert_eq!(text(chat.clone()), "a\n\nb");
        let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        let template = ChatTemplate::parse(None, Some(template), "m").unwrap().unwrap();
        assert_eq!(Document::parse(&chat).unwrap().render(Some(&template)).unwrap(), "<user>a<assistant>b");
        let sample = text(json!({"instruction": "Add.", "input": "1 2", "output": "3"}));
        assert!(sample.starts_with("Below is an instruction that describes a task, paired with an input"), "{sample}");
        assert!(sample.ends_with("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"), "{sample}");
        let sample = text(json!({"instruction": "Sing.", "input": "", "output": "La"}));
        assert!(sample.ends_with("request.\n\n### Instruction:\nSing.\n\n### Response:\nLa"), "{sample}");
        for other in [json!(null), json!(["text"]), json!({"text": 3}), json!({"messages": [{"role": "user"}]})] {
            assert_eq!(Document::parse(&other), None, "{other}");
        }
    }
}
