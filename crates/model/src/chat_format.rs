//! From messages to the text that a model reads.

use crate::{ChatTemplate, Message, ModelError, RenderOptions, Tokenizer};
use serde_json::{Map, Value};

/// Whether control tokens that a message's content spells out control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SpecialTokens {
    /// They stay text: a content cannot end its turn or begin another one.
    #[default]
    Refuse,
    /// They do.
    Allow,
}

/// How conversations are put to a model.
#[derive(Debug)]
pub struct ChatFormat {
    /// The model's template, or the user's.
    pub template: ChatTemplate,
    /// Variables for the template.
    pub arguments: Map<String, Value>,
    /// What control tokens in contents do.
    pub special_tokens: SpecialTokens,
}

impl ChatFormat {
    /// The text of a conversation, for [`Tokenizer::encode_rendered`].
    ///
    /// # Errors
    /// [`ModelError::Template`], and [`ModelError::Tokenizer`] for a content that the tokenizer refuses.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let options = RenderOptions { add_generation_prompt, arguments: self.arguments.clone() };
        if self.special_tokens == SpecialTokens::Allow {
            return self.template.render_with(messages, &options);
        }
        let shielded = |message: &Message| -> Result<Message, ModelError> {
            let content = tokenizer.shield(&message.content)?.into_owned();
            Ok(Message { role: message.role.clone(), content })
        };
        let messages: Vec<Message> = messages.iter().map(shielded).collect::<Result<_, _>>()?;
        self.template.render_with(&messages, &options)
    }
}
