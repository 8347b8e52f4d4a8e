//! Escapes in strings of the command line, where a shell makes them hard to type.

/// A string with `\n`, `\r`, `\t`, `\\`, `\"`, `\'`, `\0` and `\xNN` (a code below 80) replaced by what they stand for. Any
/// other backslash is refused, and so is an empty string.
///
/// # Errors
/// What is wrong with an escape.
pub fn parse(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("it is empty, and would do nothing; leave it out".to_owned());
    }
    let mut out = String::new();
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        if character != '\\' {
            out.push(character);
            continue;
        }
        out.push(match rest.next() {
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('0') => '\0',
            Some(same @ ('\\' | '"' | '\'')) => same,
            Some('x') => {
                let digits: String = rest.by_ref().take(2).collect();
                let hexadecimal = digits.len() == 2 && digits.chars().all(|digit| digit.is_ascii_hexdigit());
                let code = u8::from_str_radix(&digits, 16).ok().filter(|code| hexadecimal && *code < 0x80);
                char::from(code.ok_or("\\x takes two hexadecimal digits below 80")?)
            }
            Some(other) => return Err(format!("'\\{other}' is no escape; write \\\\ for a backslash")),
            None => return Err("it ends in a backslash; write \\\\ for one".to_owned()),
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_stand_for_characters() {
        assert_eq!(parse(r#"a\n\t\\\"\x41é"#).unwrap(), "a\n\t\\\"Aé");
        for bad in ["", "\\", r"\q", r"\x4", r"\xff", r"\x+1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
