use crate::Samples;
use std::time::Duration;

/// Times `contenders` things in turns: in each of `count` rounds every one once, in their order, so that between two
/// turns of one lie all others. `run` runs the contender of a number and says how long it took. A round before the
/// first is not counted. Returns the seconds of each contender.
///
/// # Errors
/// Those of `run`.
pub fn rounds<E>(
    count: usize,
    contenders: usize,
    mut run: impl FnMut(usize) -> Result<Duration, E>,
) -> Result<Vec<Samples>, E> {
    let mut seconds = vec![Samples::default(); contenders];
    for round in 0..=count {
        for (contender, seconds) in seconds.iter_mut().enumerate() {
            let time = run(contender)?;
            if round > 0 {
                seconds.push(time.as_secs_f64());
            }
        }
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_takes_a_turn_in_each_round() {
        let mut turns = Vec::new();
        let seconds = rounds(2, 3, |contender| {
            turns.push(contender);
            Ok::<_, ()>(Duration::from_secs(contender as u64))
        });
        assert_eq!(turns, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
        assert_eq!(seconds.unwrap()[2].spread().median, 2.0);
    }

    #[test]
    fn an_error_ends_it() {
        assert_eq!(rounds(2, 2, |contender| if contender == 1 { Err("no") } else { Ok(Duration::ZERO) }), Err("no"));
    }
}
