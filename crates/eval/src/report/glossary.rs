/// Terms and what they mean, in plain words.
const TERMS: [(&str, &str); 14] = [
    (
        "Cache, keys and values",
        "What a model keeps of every token that it has read, so that it need not read it again. \
      Each layer keeps a few heads, each of which has one key and one value, vectors of some 100 channels.",
    ),
    (
        "Attention row",
        "How one token spreads its attention over all tokens before it: a probability for each. The \
      output is the mean of the values, weighted by the row.",
    ),
    (
        "Scheme",
        "A way to store the cache: how many bits, which numbers share a scale, what is rotated, what stays in 16 bit.",
    ),
    (
        "Bits",
        "Bits for one cached number on average, counted from all bytes in use: codes, scales, minimums, \
      and tokens that are still in 16 bit.",
    ),
    (
        "Perplexity",
        "How many words the model hesitates between, on average, when it guesses the next token of the text. Lower \
      is better; 1 would be certainty.",
    ),
    (
        "KL divergence",
        "How far one set of probabilities lies from another, here from that with exact keys and values. 0 is \
      no difference; the unit is the nat. The 99.9 % column says how far the worst token in a thousand moves.",
    ),
    (
        "Same top token",
        "Top-1 agreement: how often the most likely next token is the one that the 16-bit cache would \
      have chosen.",
    ),
    ("Retrieval", "How many facts, hidden in a long prompt, the model repeats when it is asked for them."),
    (
        "Window",
        "The most recent tokens, kept in 16 bit because most attention goes to them. They are packed when they leave \
      the window.",
    ),
    (
        "Sinks",
        "The first tokens of a text. Many models pay much attention to them whatever they say, so a scheme can keep \
      them in 16 bit for good.",
    ),
    (
        "Per channel, per token",
        "Which numbers share a scale: 128 consecutive tokens of one channel, or the channels of one \
      token. Written as an index, C or T.",
    ),
    (
        "Rotation, H",
        "A Hadamard matrix mixes numbers so that none stands out; it is undone when they are read. KH mixes \
      the channels of each token, HK the tokens of each channel.",
    ),
    (
        "Linear correction, D",
        "Trained adapters map a query, and what the codes of a key miss, to D features each. The features of all packed \
      keys are summed up in a state of fixed size, which gives back weight that quantisation took.",
    ),
    (
        "Pareto front",
        "The schemes that no other one beats in bits and in perplexity at once. To choose any other would be \
      to give something away.",
    ),
];

/// The glossary as markup.
pub(super) fn glossary() -> String {
    let entries = TERMS.iter().map(|(term, meaning)| format!("<div><dt>{term}</dt><dd>{meaning}</dd></div>\n"));
    format!("<dl class=\"glossary\">\n{}</dl>\n", entries.collect::<String>())
}
