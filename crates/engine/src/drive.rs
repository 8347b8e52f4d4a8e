//! Loops over the steps of an engine.

use crate::{Completion, Engine, EngineError, Event, Request, RequestId};
use dibit_cache::CacheError;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

impl Engine {
    /// Steps until a request is answered. `on_text` gets its text as it comes, which may be empty, and can end it; what
    /// happens to other requests is told by the next [`Engine::step`].
    ///
    /// # Errors
    /// Why the request failed; [`EngineError::Answered`]; [`CacheError::TooManySequences`] where it waits for sequences that
    /// are open, and is taken out.
    pub fn finish(
        &mut self,
        request: RequestId,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion, EngineError> {
        let mut done = self.drive(&[request], &mut |_, text| on_text(text))?;
        Ok(done.remove(0))
    }

    /// Continues prompts, several at once where there is room and the rest as room comes free. `on_text` gets the text of
    /// each request as it comes, at first an empty one, and can end that request.
    ///
    /// # Errors
    /// Those of [`Engine::check`] before anything runs; the first failure of model or device, which ends the others;
    /// [`CacheError::TooManySequences`] where all sequences are open.
    pub fn generate(
        &mut self,
        requests: &[Request],
        mut on_text: impl FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>, EngineError> {
        for request in requests {
            self.check(request, 0)?;
        }
        let ids = requests.iter().map(|own| self.submit(own.clone())).collect::<Result<Vec<_>, _>>()?;
        self.drive(&ids, &mut on_text)
    }

    /// Steps until some requests are answered. Where one fails, the others are taken out.
    fn drive(
        &mut self,
        ids: &[RequestId],
        on_text: &mut dyn FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>, EngineError> {
        let told = |id: &RequestId| self.events.iter().any(|event| event.request() == *id);
        if !ids.iter().all(|id| self.active.contains_key(&id.0) || told(id)) {
            return Err(EngineError::Answered);
        }
        let places: BTreeMap<RequestId, usize> = ids.iter().copied().zip(0..).collect();
        let mut done: Vec<Option<Completion>> = ids.iter().map(|_| None).collect();
        let mut stopped = vec![false; ids.len()];
        let (mut failure, mut others) = (None, Vec::new());
        while failure.is_none() && done.iter().any(Option::is_none) {
            if self.is_stuck() {
                failure = Some(CacheError::TooManySequences { capacity: self.options().sequences }.into());
                break;
            }
            for event in self.step() {
                let Some(&place) = places.get(&event.request()) else {
                    others.push(event);
                    continue;
                };
                match event {
                    Event::Text { request, text } => {
                        if !stopped[place] && on_text(place, &text).is_break() {
                            stopped[place] = true;
                            // One that is answered already is told of in a moment.
                            done[place] = self.cancel(request);
                        }
                    }
                    Event::Done { completion, .. } => done[place] = Some(completion),
                    Event::Failed { error, .. } => drop(failure.get_or_insert(error)),
                }
            }
        }
        self.events.extend(others);
        match failure {
            Some(error) => {
                ids.iter().for_each(|request| drop(self.cancel(*request)));
                Err(error)
            }
            None => Ok(done.into_iter().flatten().collect()),
        }
    }
}
