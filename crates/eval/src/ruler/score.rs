/// The share of answers that a prediction contains, whatever their case: RULER's `string_match_all`, which scores
/// all of these tasks.
pub fn score(prediction: &str, answers: &[String]) -> f64 {
    let prediction = prediction.to_lowercase();
    let found = answers.iter().filter(|answer| prediction.contains(&answer.to_lowercase())).count();
    found as f64 / answers.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_count_wherever_they_are() {
        let answers = ["ABCDE", "FGHIJ", "KLMNO", "PQRST"].map(str::to_owned);
        assert_eq!(score(" abcde FGHIJ\nKLMNOP and PQRST.", &answers), 1.0);
        assert_eq!(score("KLMNO KLMNO ABCD", &answers), 0.25);
        assert_eq!(score("", &answers), 0.0);
        assert_eq!(score("1234567", &["1234567".to_owned()]), 1.0);
        assert_eq!(score("anything", &[]), 0.0);
    }
}
