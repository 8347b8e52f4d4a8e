//! Chat templates in Jinja, as Hugging Face transformers renders them.
//!
//! minijinja parses and runs them. Where its operators, filters, methods and printing are not Python's, this module
//! has its own: `compile` puts them into the compiled template.
//!
//! What still differs from Jinja2: a tuple that a template writes is a list, also where it is printed, and needs its
//! parentheses; what `map` and `select` give is a list; operators between literals alone, such as `7 % -3`, are
//! calculated by minijinja; only the methods of dicts are there without a call; there is no unary `+`, no `varargs`
//! and no call behind a filter; a default of a macro's parameter cannot name another parameter; `str.format` has
//! neither `!r` nor `%`; the `else` of a loop is not for one whose every turn ends with `continue`. A rendering that runs too long, makes too large values or prints over 64 MiB is an error.

mod arguments;
mod compile;
mod environment;
mod filters;
mod json;
mod lists;
mod methods;
mod operators;
mod print;

use crate::tokenizer::token_text;
use crate::{ModelError, quiet_panic};
use minijinja::{Error, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

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
    /// Variables for the template by name, such as `tools`, `documents` or `enable_thinking`. They come before the
    /// special tokens of the tokenizer and before `tools` and `documents`, which are none otherwise.
    pub arguments: Map<String, Json>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    /// `bos_token` and the like, by name.
    special_tokens: Map<String, Json>,
}

const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

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
        let config: Json = match tokenizer_config {
            None => Json::Null,
            Some(text) => serde_json::from_str(text).map_err(|error| ModelError::Malformed {
                path: format!("tokenizer_config.json of {origin}"),
                reason: error.to_string(),
            })?,
        };
        let Some(source) = template.or_else(|| embedded(&config)) else {
            return match config.get("chat_template").and_then(Json::as_array).map(Vec::as_slice) {
                None | Some([]) => Ok(None),
                Some(named) => {
                    let names: Vec<&str> = named.iter().filter_map(|own| own.get("name")?.as_str()).collect();
                    let names = names.join(", ");
                    Err(ModelError::Template(format!("{origin} has templates {names}, and none called default")))
                }
            };
        };
        let mut special_tokens = Map::new();
        for name in SPECIAL_TOKENS {
            if let Some(token) = config.get(name).and_then(token_text) {
                special_tokens.insert(name.to_owned(), token.into());
            }
        }
        let additional = "additional_special_tokens";
        if let Some(tokens) = config.get(additional).and_then(Json::as_array) {
            let tokens: Vec<&str> = tokens.iter().filter_map(token_text).collect();
            special_tokens.insert(additional.to_owned(), tokens.into());
        }
        // As Jinja does: one kind of line ending, and none at the end.
        let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
        if source.ends_with('\n') {
            source.pop();
        }
        compile::check(&source).map_err(|cause| error(&cause, &source))?;
        Ok(Some(ChatTemplate { source, special_tokens }))
    }

    /// Renders a conversation. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render_values`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ModelError> {
        self.render_with(messages, &RenderOptions { add_generation_prompt, ..RenderOptions::default() })
    }

    /// Renders a conversation with options.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render_values`].
    pub fn render_with(&self, messages: &[Message], options: &RenderOptions) -> Result<String, ModelError> {
        let messages = serde_json::to_value(messages).map_err(|error| ModelError::Template(error.to_string()))?;
        self.render_values(&messages, options)
    }

    /// Renders a conversation whose messages are any JSON objects, in a list. As transformers does, entries of a
    /// message that are null are left out, and reasoning is there as both `reasoning_content` and `thinking`.
    ///
    /// # Errors
    /// [`ModelError::Template`] with the cause and the line of the template: where the template refuses the
    /// conversation, asks for what is not there, or runs too long.
    pub fn render_values(&self, messages: &Json, options: &RenderOptions) -> Result<String, ModelError> {
        let Some(messages) = messages.as_array() else {
            return Err(ModelError::Template("the messages are no list".to_owned()));
        };
        let mut variables = Map::new();
        variables.insert("messages".to_owned(), messages.iter().map(normalized).collect());
        variables.insert("tools".to_owned(), Json::Null);
        variables.insert("documents".to_owned(), Json::Null);
        variables.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
        variables.extend(self.special_tokens.clone());
        variables.extend(options.arguments.clone());
        let failed = |what: &str| ModelError::Template(format!("it cannot be rendered: {what}"));
        let render = || compile::render(&self.source, &variables).map_err(|cause| error(&cause, &self.source));
        let render = || quiet_panic::catch(render).unwrap_or_else(|panic| Err(failed(&panic)));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, render);
            let thread = thread.map_err(|error| failed(&error.to_string()))?;
            thread.join().unwrap_or_else(|_| Err(failed("the renderer panicked")))
        })
    }
}

/// How deep a template can nest values follows from how long it may run. This stack is enough to drop them.
const STACK: usize = 1 << 29;

/// The cause of a failure, the line of the template and what stands there.
fn error(cause: &Error, source: &str) -> ModelError {
    let place = cause.range().and_then(|range| source.get(range)).filter(|text| !text.contains('\n'));
    let mut text = match (cause.kind(), cause.detail()) {
        (ErrorKind::OutOfFuel, _) => "it runs for too long".to_owned(),
        (ErrorKind::UndefinedError, None) => place.map_or("an undefined value is used".to_owned(), |place| {
            format!("`{place}` asks for a part of an undefined value")
        }),
        (_, Some(detail)) => detail.to_owned(),
        (kind, None) => kind.to_string(),
    };
    if let Some(line) = cause.line() {
        text += &format!(" (line {line} of the template");
        if let Some(quoted) = source.lines().nth(line - 1) {
            text += &format!(": {}", quoted.trim().chars().take(200).collect::<String>());
        }
        text.push(')');
    }
    ModelError::Template(text)
}

/// The template in a `tokenizer_config.json`: a text, or the one called "default" of several.
fn embedded(config: &Json) -> Option<&str> {
    let template = config.get("chat_template")?;
    template.as_str().or_else(|| {
        let named = template.as_array()?;
        named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"))?.get("template")?.as_str()
    })
}

/// A message without its nulls, and with its reasoning under both names that templates read.
fn normalized(message: &Json) -> Json {
    let Json::Object(object) = message else { return message.clone() };
    let present = |name: &&str| object.get(*name).filter(|value| !value.is_null()).cloned();
    let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(present);
    let mut normalized = Map::new();
    if let Some(reasoning) = &reasoning {
        normalized.insert("thinking".to_owned(), reasoning.clone());
    }
    let entries = object.iter().filter(|(_, value)| !value.is_null());
    normalized.extend(entries.map(|(name, value)| (name.clone(), value.clone())));
    if let Some(reasoning) = reasoning {
        normalized.insert("reasoning_content".to_owned(), reasoning);
    }
    Json::Object(normalized)
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
        let others = r#"{"chat_template": [{"name": "tools", "template": "T"}, {"name": "rag", "template": "R"}]}"#;
        let error = ChatTemplate::parse(Some(others), None, "m").unwrap_err().to_string();
        assert!(error.contains("tools, rag"), "{error}");
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
