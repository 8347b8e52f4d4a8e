//! Compiles a template with minijinja, with Python's operators in the place of minijinja's.

use super::environment;
use minijinja::machinery::{CodeGenerator, Instruction, Instructions, Token, Vm, WhitespaceConfig};
use minijinja::machinery::{make_string_output, parse, tokenize};
use minijinja::{AutoEscape, Error, Value};
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;

const NAME: &str = "chat";
const WHITESPACE: WhitespaceConfig =
    WhitespaceConfig { keep_trailing_newline: true, lstrip_blocks: true, trim_blocks: true };

/// Whether a template can be compiled.
pub(super) fn check(source: &str) -> Result<(), Error> {
    compile(&without_generation(source)).map(|_| ())
}

/// Renders a template.
pub(super) fn render(source: &str, variables: &Map<String, Json>) -> Result<String, Error> {
    let source = without_generation(source);
    let (main, blocks) = compile(&source)?;
    let environment = environment::python();
    let mut text = String::new();
    let variables = Value::from_serialize(variables);
    Vm::new(&environment).eval(&main, variables, &blocks, &mut make_string_output(&mut text), AutoEscape::None)?;
    Ok(text)
}

/// The source with `{% generation %}` as `{% with %}`: it has a scope of its own and prints its body. All other text
/// keeps its place.
fn without_generation(source: &str) -> String {
    let mut result = source.to_owned();
    let tokens: Vec<_> = tokenize(source, false, Default::default(), WHITESPACE).map_while(Result::ok).collect();
    for tag in tokens.windows(3) {
        let [(Token::BlockStart, _), (Token::Ident(name), span), (Token::BlockEnd, _)] = tag else { continue };
        let with = match *name {
            "generation" => "with      ",
            "endgeneration" => "endwith      ",
            _ => continue,
        };
        result.replace_range(span.start_offset as usize..span.end_offset as usize, with);
    }
    result
}

type Compiled<'a> = (Instructions<'a>, BTreeMap<&'a str, Instructions<'a>>);

fn compile(source: &str) -> Result<Compiled<'_>, Error> {
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&parse(source, NAME, Default::default(), WHITESPACE)?);
    let (main, blocks) = generator.finish();
    Ok((pythonic(&main), blocks.iter().map(|(name, block)| (*name, pythonic(block))).collect()))
}

/// Replaces operators by filters of the same operands. Text is printed like a value, so that it is counted.
fn pythonic<'a>(old: &Instructions<'a>) -> Instructions<'a> {
    let all = || (0..old.len() as u32).filter_map(|at| Some((at, old.get(at)?)));
    let mut places = vec![0];
    for (_, instruction) in all() {
        let width = if matches!(instruction, Instruction::EmitRaw(_) | Instruction::PushLoop(_)) { 2 } else { 1 };
        places.push(places[places.len() - 1] + width);
    }
    let mut new = Instructions::new(NAME, old.source());
    for (at, instruction) in all() {
        let mut add = |instruction| match (old.get_span(at), old.get_line(at)) {
            (Some(span), _) => new.add_with_span(instruction, span),
            (None, Some(line)) => new.add_with_line(instruction, line as u16),
            (None, None) => new.add(instruction),
        };
        let mut instruction = match instruction {
            Instruction::EmitRaw(text) => {
                add(Instruction::LoadConst(Value::from(*text)));
                Instruction::Emit
            }
            Instruction::PushLoop(flags) => {
                add(Instruction::ApplyFilter("for", Some(1), !0));
                Instruction::PushLoop(*flags)
            }
            Instruction::GetAttr(name) => match environment::attribute(name) {
                Some(filter) => Instruction::ApplyFilter(filter, Some(1), !0),
                None => Instruction::GetAttr(name),
            },
            Instruction::Slice => Instruction::ApplyFilter("[:]", Some(4), !0),
            other => match operator(other) {
                Some(name) => Instruction::ApplyFilter(name, Some(2), !0),
                None => other.clone(),
            },
        };
        if let Instruction::Jump(target)
        | Instruction::JumpIfFalse(target)
        | Instruction::JumpIfFalseOrPop(target)
        | Instruction::JumpIfTrueOrPop(target)
        | Instruction::Iterate(target)
        | Instruction::BuildMacro(_, target, _) = &mut instruction
        {
            *target = places[*target as usize];
        }
        add(instruction);
    }
    new
}

/// The filter that does what an operator does in Python.
fn operator(instruction: &Instruction) -> Option<&'static str> {
    Some(match instruction {
        Instruction::StringConcat => "~",
        Instruction::Add => "+",
        Instruction::Mul => "*",
        Instruction::Div => "/",
        Instruction::IntDiv => "//",
        Instruction::Rem => "%",
        Instruction::Pow => "**",
        Instruction::Lt => "<",
        Instruction::Lte => "<=",
        Instruction::Gt => ">",
        Instruction::Gte => ">=",
        Instruction::In => "in",
        _ => return None,
    })
}
