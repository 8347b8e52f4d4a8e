//! Options of how messages are put to a model.

use clap::{Args, ValueEnum};
use dibit_engine::EngineError;
use dibit_model::{ChatFormat, Pretrained, SpecialTokens};
use serde_json::Value;
use std::path::PathBuf;

#[derive(Args)]
pub struct ConversationArgs {
    /// A chat template in Jinja, in place of the model's
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    #[arg(
        long,
        value_name = "NAME=VALUE",
        value_parser = argument,
        help = "A variable for the chat template, as in enable_thinking=false; the value is JSON, or else a text; may be \
                repeated"
    )]
    pub template_arg: Vec<(String, Value)>,
    /// What control tokens that a message spells out do: stay text, or control
    #[arg(long, value_enum, default_value = "refuse")]
    pub special_tokens: SpecialTokensArg,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum SpecialTokensArg {
    /// They stay text: nobody can forge a turn
    Refuse,
    /// They control
    Allow,
}

impl ConversationArgs {
    /// Refuses options of messages where there are none: without `--chat`.
    pub fn check(&self, chat: bool) -> anyhow::Result<()> {
        match self.given().filter(|_| !chat) {
            Some(option) => anyhow::bail!("{option} is for messages; add --chat, or leave it out"),
            None => Ok(()),
        }
    }

    /// The first of these options that was given.
    fn given(&self) -> Option<&'static str> {
        [
            ("--chat-template", self.chat_template.is_some()),
            ("--template-arg", !self.template_arg.is_empty()),
            ("--special-tokens", self.special_tokens != SpecialTokensArg::Refuse),
        ]
        .into_iter()
        .find_map(|(name, given)| given.then_some(name))
    }

    /// How conversations are put to a model.
    pub fn format(&self, pretrained: &Pretrained) -> anyhow::Result<ChatFormat> {
        let source =
            self.chat_template.as_deref().map(|path| crate::text::read_named("chat template", path)).transpose()?;
        let Some(template) = pretrained.chat_template(source.as_deref())? else {
            return Err(EngineError::NoChatTemplate(pretrained.name.clone()).into());
        };
        Ok(ChatFormat {
            template,
            arguments: self.template_arg.iter().cloned().collect(),
            special_tokens: match self.special_tokens {
                SpecialTokensArg::Refuse => SpecialTokens::Refuse,
                SpecialTokensArg::Allow => SpecialTokens::Allow,
            },
        })
    }
}

fn argument(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("give a name and a value, as in enable_thinking=false")?;
    let is_name = |name: &str| {
        let letter = |c: char| c.is_alphanumeric() || c == '_';
        name.chars().all(letter) && name.chars().next().is_some_and(|c| !c.is_numeric())
    };
    if !is_name(name) {
        return Err(format!("'{name}' is no name of a variable"));
    }
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_json_or_texts() {
        let value = |text: &str| argument(text).unwrap().1;
        assert_eq!(argument("enable_thinking=false").unwrap(), ("enable_thinking".to_owned(), json!(false)));
        assert_eq!((value("a=[1, 2]"), value("a=low"), value("a=")), (json!([1, 2]), json!("low"), json!("")));
        for bad in ["a", "=1", "1a=2", "a b=3"] {
            assert!(argument(bad).is_err(), "{bad}");
        }
    }
}
