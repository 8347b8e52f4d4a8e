//! Texts that the user gives.

use anyhow::{Context, Result, anyhow, bail};
use dibit_model::{ChatFormat, Message, Tokenizer};
use serde_json::Value;
use std::path::Path;

/// A text file, UTF-8.
pub fn read(path: &Path) -> Result<String> {
    read_named("text", path)
}

/// The same; `what` it is, for errors.
pub fn read_named(what: &str, path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the {what} {}", path.display()))?;
    decode(bytes, &path.display().to_string())
}

/// A text of UTF-8 as programs of other systems write it: without its byte order mark, and with line feeds alone at the ends
/// of lines, which is said. `name` names it in errors.
pub fn decode(bytes: Vec<u8>, name: &str) -> Result<String> {
    if let [0xff, 0xfe, ..] | [0xfe, 0xff, ..] = bytes[..] {
        bail!("{name} is UTF-16 and not UTF-8 text; convert it first, as in `iconv -f UTF-16 -t UTF-8`");
    }
    let text = String::from_utf8(bytes).with_context(|| format!("{name} is not UTF-8 text; convert it first"))?;
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    if !text.contains("\r\n") {
        return Ok(text);
    }
    tracing::info!("{name} has line ends of Windows (CR LF), which are read as LF");
    Ok(text.replace("\r\n", "\n"))
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
const FORMS: &str = "{\"text\": \"...\"}, {\"messages\": [{\"role\": \"...\", \"content\": \"...\"}, ...]}, {\"conversations\": \
                     [{\"from\": \"human\", \"value\": \"...\"}, ...]} or {\"instruction\": \"...\", \"input\": \"...\", \
                     \"output\": \"...\"}";

impl Document {
    /// An entry of a file: a text, a conversation as OpenAI or ShareGPT write it, or a sample of Alpaca.
    ///
    /// # Errors
    /// What is wrong with it.
    fn parse(value: &Value) -> Result<Self, String> {
        let string = |key: &str| value.get(key).and_then(Value::as_str);
        let present = |key: &str| value.get(key).filter(|value| !value.is_null());
        if let Some(text) = present("text") {
            return text.as_str().map(|text| Document::Text(text.to_owned())).ok_or("its \"text\" is no text".into());
        }
        for (list, role, content) in [("messages", "role", "content"), ("conversations", "from", "value")] {
            if let Some(messages) = present(list) {
                let all = messages.as_array().ok_or_else(|| format!("its \"{list}\" is no list"))?;
                let read = |(index, own): (usize, &Value)| {
                    message(own, role, content).map_err(|reason| format!("message {} {reason}", index + 1))
                };
                return Ok(Document::Messages(all.iter().enumerate().map(read).collect::<Result<_, _>>()?));
            }
        }
        match (string("instruction"), string("output")) {
            (Some(instruction), Some(output)) => {
                Ok(Document::Text(alpaca(instruction, string("input").unwrap_or_default(), output)))
            }
            _ => Err(format!("it is none of {FORMS}")),
        }
    }

    /// The text, for [`Tokenizer::encode_rendered`]; of a conversation, what the model's template makes of it, or else its parts
    /// one after the other.
    pub fn render(&self, format: Option<&ChatFormat>, tokenizer: &Tokenizer) -> Result<String> {
        match (self, format) {
            (Document::Text(text), _) => Ok(text.clone()),
            (Document::Messages(messages), Some(format)) => Ok(format.render(tokenizer, messages, false)?),
            (Document::Messages(messages), None) => {
                let parts: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
                Ok(parts.join("\n\n"))
            }
        }
    }
}

/// A message of a conversation. Null for a content is none; of several parts, those of text are put together.
fn message(value: &Value, role: &str, content: &str) -> Result<Message, String> {
    let name = value.get(role).and_then(Value::as_str).ok_or_else(|| format!("has no \"{role}\""))?;
    // ShareGPT's names.
    let name = match name {
        "human" => "user",
        "gpt" | "bing" | "chatgpt" | "bard" => "assistant",
        other => other,
    };
    let part = |part: &Value| match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str))
    {
        (Some("text") | None, Some(text)) => Ok(text.to_owned()),
        (Some(kind), _) => Err(format!("has a part of type \"{kind}\"; only parts of text can be read")),
        (None, None) => Err("has a part without a type; only parts of text can be read".to_owned()),
    };
    if value.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty()) {
        return Err("calls tools, which cannot be read here; leave the conversation out".to_owned());
    }
    let content = match value.get(content) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Result<_, _>>()?,
        Some(Value::Null) => String::new(),
        None => return Err(format!("has no \"{content}\"")),
        Some(_) => return Err(format!("has a \"{content}\" that is neither a text nor a list of parts")),
    };
    Ok(Message { role: name.to_owned(), content })
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
            Document::parse(entry)
                .map_err(|reason| anyhow!("entry {} of {} cannot be read: {reason}", index + 1, path.display()))
        };
        return entries.iter().enumerate().map(document).collect();
    }
    if !ends_in("jsonl") {
        return Ok(vec![Document::Text(text)]);
    }
    entries(&text, &path.display().to_string())
}

/// The documents of a text with an entry a line; `name` names it in errors.
pub fn entries(text: &str, name: &str) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("line {} of {name}", index + 1);
        let value: Value = serde_json::from_str(line).with_context(|| format!("{} is not JSON", place()))?;
        let document = Document::parse(&value);
        documents.push(document.map_err(|reason| anyhow!("{} cannot be read: {reason}", place()))?);
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dibit_model::{ChatTemplate, SpecialTokens};
    use serde_json::json;

    #[test]
    fn entries_are_texts_conversations_or_samples() {
        let tokenizer = Tokenizer::bytes(256);
        let text = |value: Value| Document::parse(&value).unwrap().render(None, &tokenizer).unwrap();
        assert_eq!(text(json!({"text": "a", "id": 3})), "a");
        let chat = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
        assert_eq!(text(chat.clone()), "a\n\nb");
        let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        let template = ChatTemplate::parse(None, Some(template), "m").unwrap().unwrap();
        let format = ChatFormat { template, arguments: Default::default(), special_tokens: SpecialTokens::Refuse };
        let rendered = Document::parse(&chat).unwrap().render(Some(&format), &tokenizer).unwrap();
        assert_eq!(rendered, "<user>a<assistant>b");
        let sample = text(json!({"instruction": "Add.", "input": "1 2", "output": "3"}));
        assert!(sample.starts_with("Below is an instruction that describes a task, paired with an input"), "{sample}");
        assert!(sample.ends_with("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"), "{sample}");
        let sample = text(json!({"instruction": "Sing.", "input": "", "output": "La"}));
        assert!(sample.ends_with("request.\n\n### Instruction:\nSing.\n\n### Response:\nLa"), "{sample}");
    }

    #[test]
    fn conversations_of_others_are_read() {
        let read = |value: Value| Document::parse(&value).unwrap();
        let expected = |pairs: &[(&str, &str)]| {
            let message = |(role, content): &(&str, &str)| Message { role: (*role).into(), content: (*content).into() };
            Document::Messages(pairs.iter().map(message).collect())
        };
        let share = json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]});
        assert_eq!(read(share), expected(&[("system", "s"), ("user", "a"), ("assistant", "b")]));
        let nulls = json!({"text": null, "messages": null, "conversations": [{"from": "human", "value": "a", "tool_calls": []}]});
        assert_eq!(read(nulls), expected(&[("user", "a")]));
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let parts = json!({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": null}]});
        assert_eq!(read(parts), expected(&[("user", "ab"), ("assistant", "")]));
    }

    #[test]
    fn what_cannot_be_read_is_said_with_its_reason() {
        let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
        for (value, reason) in [
            (json!(null), "it is none of {\"text\""),
            (json!(["text"]), "it is none of {\"text\""),
            (json!({"text": 3}), "\"text\" is no text"),
            (json!({"messages": "a"}), "\"messages\" is no list"),
            (json!({"messages": [{"role": "user"}]}), "message 1 has no \"content\""),
            (json!({"conversations": [{"from": "gpt", "value": ""}, {"value": "x"}]}), "message 2 has no \"from\""),
            (user(json!([{"type": "image_url", "image_url": {}}])), "message 1 has a part of type \"image_url\""),
            (user(json!(3)), "neither a text nor a list of parts"),
            (json!({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}), "calls tools"),
        ] {
            let error = Document::parse(&value).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn marks_and_line_ends_of_other_systems_are_no_text() {
        assert_eq!(decode(b"\xef\xbb\xbfa\r\nb\rc\n".to_vec(), "t").unwrap(), "a\nb\rc\n");
        let error = decode(b"\xff\xfea\0".to_vec(), "t").unwrap_err().to_string();
        assert!(error.contains("t is UTF-16"), "{error}");
        assert!(decode(b"\xff".to_vec(), "t").unwrap_err().to_string().contains("t is not UTF-8"));
    }
}
