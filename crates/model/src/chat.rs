//! Chat templates in Jinja, as Hugging Face renders them.

use crate::ModelError;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::ser::Formatter;
use std::fmt::Write;
use std::io;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Variables for the template by name.
    pub arguments: serde_json::Map<String, serde_json::Value>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and the like, by name.
    special_tokens: serde_json::Map<String, serde_json::Value>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// The template of a `tokenizer_config.json`, or of a `chat_template.jinja`, which has precedence. `None`
    /// where the model has neither. `origin` names the model in errors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] for a broken configuration, [`ModelError::Template`] for a broken template.
    pub fn parse(
        tokenizer_config: Option<&str>,
        template: Option<&str>,
        origin: &str,
    ) -> Result<Option<Self>, ModelError> {
        let config: serde_json::Value = match tokenizer_config {
            None => serde_json::Value::Null,
            Some(text) => serde_json::from_str(text).map_err(|error| ModelError::Malformed {
                path: format!("tokenizer_config.json of {origin}"),
                reason: error.to_string(),
            })?,
        };
        let Some(source) = template.or_else(|| embedded(&config)) else { return Ok(None) };
        let mut special_tokens = serde_json::Map::new();
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            let token = config.get(name).and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
            if let Some(token) = token {
                special_tokens.insert(name.to_owned(), token.into());
            }
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|error| template_error(&error))?;
        Ok(Some(ChatTemplate { environment, special_tokens }))
    }

    /// Renders a conversation. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// [`ModelError::Template`], also where the template refuses the conversation.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ModelError> {
        let template = self.environment.get_template(NAME).map_err(|error| template_error(&error))?;
        let special = Value::from_serialize(&self.special_tokens);
        template.render(context! { messages, add_generation_prompt, ..special }).map_err(|error| template_error(&error))
    }
}

impl ChatTemplate {
    /// Renders a conversation.
    ///
    /// # Errors
    /// [`ModelError::Template`].
    pub fn render_with(&self, messages: &[Message], options: &RenderOptions) -> Result<String, ModelError> {
        self.render(messages, options.add_generation_prompt)
    }
}

fn template_error(error: &Error) -> ModelError {
    let place = error.line().map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
    ModelError::Template(format!("{}{place}", error.detail().unwrap_or("it cannot be rendered")))
}

/// The template in a `tokenizer_config.json`: a text, or the one called "default" of several.
fn embedded(config: &serde_json::Value) -> Option<&str> {
    let template = config.get("chat_template")?;
    template.as_str().or_else(|| {
        let named = template.as_array()?;
        named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"))?.get("template")?.as_str()
    })
}

/// JSON as Python's `json.dumps` writes it, without the escapes for HTML that minijinja's own filter adds.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    let written = match indent.map(|width| " ".repeat(width)) {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
        Some(indent) => {
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    };
    let invalid = |error: String| Error::new(ErrorKind::InvalidOperation, error);
    written.map_err(|error| invalid(error.to_string()))?;
    String::from_utf8(out).map_err(|error| invalid(error.to_string()))
}

/// `", "` between entries and `": "` behind keys.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

fn strftime_now(format: String) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(&format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("'{format}' is not a date format")))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    #[test]
    fn templates_come_from_either_file() {
        let config = r#"{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"}"#;
        let chat = [message("user", "Hi & <you>")];
        let template = ChatTemplate::parse(Some(config), None, "m").unwrap().unwrap();
        assert_eq!(template.render(&chat, true).unwrap(), "<s>Hi & <you>");
        let template =
            ChatTemplate::parse(Some(config), Some("{{ messages[0]['role'].title() }}"), "m").unwrap().unwrap();
        assert_eq!(template.render(&chat, false).unwrap(), "User");
        let named = r#"{"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}"#;
        assert_eq!(ChatTemplate::parse(Some(named), None, "m").unwrap().unwrap().render(&chat, true).unwrap(), "D");
        assert!(ChatTemplate::parse(Some("{}"), None, "m").unwrap().is_none());
        assert!(ChatTemplate::parse(None, None, "m").unwrap().is_none());
    }

    #[test]
    fn refusals_and_mistakes_are_errors() {
        let refuses =
            ChatTemplate::parse(None, Some("{{ raise_exception('roles must alternate') }}"), "m").unwrap().unwrap();
        let error = refuses.render(&[], true).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        assert!(ChatTemplate::parse(None, Some("{% for %}"), "m").is_err());
        assert!(ChatTemplate::parse(Some("{"), None, "m").is_err());
    }

    #[test]
    fn helpers_of_hugging_face_exist() {
        let text = "{{ {'a': ['<b>', 1]} | tojson }} {{ strftime_now('%Y') | length }}{% for i in [1, 2] %}{% break %}{% endfor %}";
        let template = ChatTemplate::parse(None, Some(text), "m").unwrap().unwrap();
        assert_eq!(template.render(&[], true).unwrap(), r#"{"a": ["<b>", 1]} 4"#);
    }
}
