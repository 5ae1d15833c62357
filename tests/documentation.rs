// SPDX-License-Identifier: GPL-2.0-only

//! What an administrator can read, against the sources: parameters, attributes, counters and messages.
//!
//! `Documentation/messages.rst` is made of the sources: `UPDATE=1 cargo test --test documentation` writes it.

use std::{
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    fs,
    path::{
        Path,
        PathBuf, //
    },
};

// The text of this tree.

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All files of Rust in `directory`, in order.
fn sources(directory: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::from(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(root().join(&directory)).unwrap() {
            let entry = entry.unwrap();
            let path = directory.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

// Rust, as far as it is needed.

#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// A name, a keyword or a number.
    Word(String),
    /// A string, also of C or of bytes, as it is in memory.
    Text(String),
    Sign(char),
}

impl Token {
    fn is(&self, sign: char) -> bool {
        *self == Token::Sign(sign)
    }

    fn word(&self) -> Option<&str> {
        match self {
            Token::Word(word) => Some(word),
            _ => None,
        }
    }

    fn text(&self) -> Option<&str> {
        match self {
            Token::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// The tokens of `source`, without comments.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let c = at(i);
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            while i < chars.len() && !(at(i) == '*' && at(i + 1) == '/') {
                i += 1;
            }
            i += 2;
        } else if c == '"' {
            let (text, end) = string(&chars, i + 1);
            tokens.push(Token::Text(text));
            i = end;
        } else if c == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            // A character; otherwise it is a lifetime.
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < chars.len() && at(i) != '\'' {
                i += 1;
            }
            i += 1;
        } else if c.is_alphanumeric() || c == '_' {
            let start = i;
            while at(i).is_alphanumeric() || at(i) == '_' {
                i += 1;
            }
            let word: String = chars[start..i].iter().collect();
            assert!(
                !(["r", "br", "cr"].contains(&word.as_str()) && ['"', '#'].contains(&at(i))),
                "raw strings are not known here"
            );
            // The letter before a string of C or of bytes is no token.
            if !(["b", "c"].contains(&word.as_str()) && at(i) == '"') {
                tokens.push(Token::Word(word));
            }
        } else {
            if !c.is_whitespace() {
                tokens.push(Token::Sign(c));
            }
            i += 1;
        }
    }
    tokens
}

/// The string from `i` on, which is after its quote, and where it ends.
fn string(chars: &[char], mut i: usize) -> (String, usize) {
    let mut text = String::new();
    loop {
        match chars[i] {
            '"' => return (text, i + 1),
            '\\' => {
                i += 1;
                match chars[i] {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    '0' => text.push('\0'),
                    '\n' => {
                        while chars[i + 1].is_whitespace() {
                            i += 1;
                        }
                    }
                    // Numbers of characters are not looked at here.
                    other => text.push(other),
                }
            }
            other => text.push(other),
        }
        i += 1;
    }
}

/// Where the group ends that opens at `open`: the index of the closing bracket.
fn close(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token {
            Token::Sign('(' | '[' | '{') => depth += 1,
            Token::Sign(')' | ']' | '}') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    panic!("a bracket is not closed");
}

/// The tokens of a file, in and outside of its module `tests`.
fn split_tests(path: &str) -> (Vec<Token>, Vec<Token>) {
    let mut outside = tokens(&read(path));
    let start = outside.windows(3).position(|window| {
        window[0].word() == Some("mod") && window[1].word() == Some("tests") && window[2].is('{')
    });
    let inside = match start {
        Some(start) => {
            let end = close(&outside, start + 2);
            outside.drain(start..=end).collect()
        }
        None => Vec::new(),
    };
    (outside, inside)
}

/// The arguments of the call whose bracket is at `open`.
fn arguments(tokens: &[Token], open: usize) -> Vec<&[Token]> {
    let end = close(tokens, open);
    let mut arguments = Vec::new();
    let (mut i, mut start) = (open + 1, open + 1);
    while i < end {
        match tokens[i] {
            Token::Sign('(' | '[' | '{') => i = close(tokens, i),
            Token::Sign(',') => {
                arguments.push(&tokens[start..i]);
                start = i + 1;
            }
            _ => {}
        }
        i += 1;
    }
    arguments.push(&tokens[start..end]);
    arguments.retain(|argument| !argument.is_empty());
    arguments
}

// reStructuredText, as far as it is needed.

struct Table {
    /// The lines before it.
    before: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// All simple tables of a document. A row whose first cell is empty goes on with the row before it.
fn tables(document: &str) -> Vec<Table> {
    let lines: Vec<&str> = document.lines().collect();
    let is_border = |line: &str| {
        line.starts_with("==") && line.contains("=  =") && !line.contains(|c| c != '=' && c != ' ')
    };
    let mut tables = Vec::new();
    let mut i = 0;
    while i < lines.len() {
        if !is_border(lines[i]) {
            i += 1;
            continue;
        }
        let mut starts = vec![0];
        starts.extend(lines[i].match_indices(" =").map(|(at, _)| at + 1));
        let end = i + lines[i..]
            .iter()
            .position(|line| line.is_empty())
            .unwrap_or(lines.len() - i);
        let mut parts: Vec<Vec<Vec<String>>> = vec![];
        for line in &lines[i..end] {
            if is_border(line) {
                parts.push(Vec::new());
                continue;
            }
            let chars: Vec<char> = line.chars().collect();
            let cells: Vec<String> = (0..starts.len())
                .map(|column| {
                    let end = starts
                        .get(column + 1)
                        .map_or(chars.len(), |&end| end.min(chars.len()));
                    let cell = chars.get(starts[column]..end).unwrap_or_default();
                    cell.iter().collect::<String>().trim().to_owned()
                })
                .collect();
            let rows = parts.last_mut().unwrap();
            match rows.last_mut() {
                Some(row) if cells[0].is_empty() => {
                    for (cell, more) in row.iter_mut().zip(cells) {
                        if !more.is_empty() {
                            *cell = format!("{cell} {more}").trim().to_owned();
                        }
                    }
                }
                _ => rows.push(cells),
            }
        }
        // What follows the last border is empty.
        parts.pop();
        let rows = parts.pop().unwrap_or_default();
        let header = parts
            .pop()
            .and_then(|mut rows| rows.pop())
            .unwrap_or_default();
        let before = lines[i.saturating_sub(3)..i].join("\n");
        tables.push(Table {
            before,
            header,
            rows,
        });
        i = end;
    }
    tables
}

/// What is between double backticks at the start of a cell.
fn literal(cell: &str) -> &str {
    cell.strip_prefix("``")
        .and_then(|rest| rest.split_once("``"))
        .map_or("", |(literal, _)| literal)
}

/// A definition list: the terms of a manual page, and what is said of each in one line.
fn definitions(document: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut lines = document.lines().peekable();
    while let Some(line) = lines.next() {
        if line.is_empty() || line.starts_with([' ', '\t']) {
            continue;
        }
        let mut text = String::new();
        while let Some(more) = lines.next_if(|line| line.starts_with("    ")) {
            text += &format!(" {}", more.trim());
        }
        if !text.is_empty() {
            found.push((line.to_owned(), text.trim().to_owned()));
        }
    }
    found
}

/// What follows the heading `title` of a document, up to the next one that is underlined in the same way.
fn section_of<'a>(document: &'a str, title: &str) -> &'a str {
    let heading = format!("\n{title}\n{}\n", "=".repeat(title.len()));
    let (_, rest) = document
        .split_once(&heading)
        .unwrap_or_else(|| panic!("there is no section {title}"));
    let end = rest.match_indices("\n===").find_map(|(at, _)| {
        let before = rest[..at].rfind('\n')?;
        Some(before)
    });
    &rest[..end.unwrap_or(rest.len())]
}

/// The first column of a table, without its markup.
fn names(table: &Table) -> Vec<String> {
    table
        .rows
        .iter()
        .map(|row| literal(&row[0]).to_owned())
        .collect()
}

// The tests.

struct Param {
    default: String,
    about: String,
}

/// What `string_params!` declares in `tokens`.
fn params(tokens: &[Token]) -> BTreeMap<String, Param> {
    let mut found = BTreeMap::new();
    for i in 0..tokens.len().saturating_sub(2) {
        if tokens[i].word() != Some("string_params")
            || !tokens[i + 1].is('!')
            || !tokens[i + 2].is('{')
        {
            continue;
        }
        let declarations = &tokens[i + 3..close(tokens, i + 2)];
        let mut declarations = declarations.split(|token| token.is(';'));
        assert_eq!(declarations.next(), Some(&[Token::Text("pmem".into())][..]));
        for declaration in declarations.filter(|declaration| !declaration.is_empty()) {
            // STATIC : "name" = default , "about"
            let [_, Token::Sign(':'), Token::Text(name), Token::Sign('='), default @ .., Token::Sign(','), Token::Text(about)] =
                declaration
            else {
                panic!("not understood: {declaration:?}");
            };
            let default = match default {
                [Token::Text(text)] => text.clone(),
                [.., Token::Word(name)] => kconfig(name),
                other => panic!("not understood: {other:?}"),
            };
            let about = about.clone();
            assert!(
                found
                    .insert(name.clone(), Param { default, about })
                    .is_none(),
                "{name}"
            );
        }
    }
    found
}

/// The default of a string in Kconfig.
fn kconfig(name: &str) -> String {
    let kconfig = read("Kconfig");
    let (_, entry) = kconfig.split_once(&format!("config {name}\n")).unwrap();
    let (_, default) = entry.split_once("default \"").unwrap();
    default.split_once('"').unwrap().0.to_owned()
}

/// All parameters of the module, and those that only tests have.
fn all_params() -> [BTreeMap<String, Param>; 2] {
    let mut found = BTreeMap::new();
    let mut of_tests = BTreeMap::new();
    for path in sources("drivers")
        .iter()
        .filter(|path| !path.ends_with("/kapi/param.rs"))
    {
        let (outside, inside) = split_tests(path);
        found.extend(params(&outside));
        of_tests.extend(params(&inside));
    }
    assert!(found.len() >= 17, "{:?}", found.keys());
    assert!(of_tests.len() >= 2, "{:?}", of_tests.keys());
    [found, of_tests]
}

impl Param {
    /// The default that `modinfo` speaks of. An empty string can stand for another one.
    fn said(&self) -> Option<&str> {
        let (_, rest) = self.about.split_once("Default: ")?;
        Some(rest.split_once(". ").map_or(rest, |(default, _)| default))
    }

    /// The default, if it is not that there is no value.
    fn effective(&self) -> Option<&str> {
        Some(self.said().unwrap_or(&self.default)).filter(|default| !default.is_empty())
    }
}

#[test]
fn all_parameters_are_documented_and_no_others() {
    let [found, of_tests] = all_params();
    let mut documented = BTreeMap::new();
    for path in [
        "Documentation/admin-guide.rst",
        "Documentation/iopmem.rst",
        "Documentation/kmem-persist.rst",
    ] {
        let tables = tables(&read(path));
        let table = tables
            .iter()
            .find(|table| table.header == ["name", "default", "meaning"]);
        for row in &table
            .unwrap_or_else(|| panic!("{path} has no table of parameters"))
            .rows
        {
            let name = literal(&row[0]).to_owned();
            assert!(
                documented.insert(name, row[1].clone()).is_none(),
                "{row:?} is there twice"
            );
        }
    }
    for (name, param) in &found {
        if let Some(said) = param.said().filter(|_| !param.default.is_empty()) {
            assert_eq!(
                said, param.default,
                "{name}: what modinfo says, and the default"
            );
        }
        let default = match param.effective() {
            None => "(none)".to_owned(),
            Some(default) => format!("``{default}``"),
        };
        assert_eq!(
            documented.remove(name),
            Some(default),
            "{name}: the documented default, and the default"
        );
    }
    assert!(documented.is_empty(), "no parameters: {documented:?}");

    let testing = read("Documentation/testing.rst");
    for name in of_tests.keys() {
        assert!(testing.contains(name), "{name} is not in testing.rst");
    }
}

#[test]
fn the_manual_page_has_all_parameters_and_no_others() {
    let page = read("Documentation/pmem.4.rst");
    let [found, _] = all_params();
    let mut documented: BTreeMap<String, (String, String)> =
        definitions(section_of(&page, "MODULE PARAMETERS"))
            .into_iter()
            .map(|(term, text)| (literal(&term).to_owned(), (term, text)))
            .collect();
    for (name, param) in &found {
        let (term, text) = documented
            .remove(name)
            .unwrap_or_else(|| panic!("{name} is not in the manual page"));
        let (_, default) = text
            .split_once("Default: ")
            .unwrap_or_else(|| panic!("{name}: no default"));
        match param.effective() {
            Some(value) => assert_eq!(default, format!("``{value}``."), "{name}"),
            // Nothing, or a rule.
            None => assert!(!default.starts_with('`'), "{name}: {default}"),
        }

        let (_, value) = term
            .split_once("``\\ =\\ *")
            .unwrap_or_else(|| panic!("{name}: not understood: {term}"));
        let (value, more) = value.split_once('*').unwrap();
        let says = |text: &str| param.about.contains(text);
        assert_eq!(value == "BOOL", says(": 0 or 1"), "{name} is {value}");
        if says("in bytes or with a unit") {
            let expected = match says("Physical address") {
                true => "ADDRESS",
                false => "SIZE",
            };
            assert_eq!(value, expected, "{name}");
        }
        let is_list = says("each range, in bytes")
            || says("for each range")
            || says("of each range are")
            || says("or one word for all")
            || says("or one number for all")
            || says("separated by commas");
        assert_eq!(more == "\\ [,...]", is_list, "{name}: {term}");
    }
    assert!(documented.is_empty(), "no parameters: {documented:?}");
}

/// The words in double backticks of the terms of a definition list.
fn terms(definitions: &[(String, String)]) -> Vec<String> {
    let parts = definitions.iter().flat_map(|(term, _)| term.split(", "));
    parts.map(|part| literal(part).to_owned()).collect()
}

#[test]
fn the_manual_page_has_all_attributes_counters_and_errors() {
    let page = read("Documentation/pmem.4.rst");
    let (disks, kmem) = section_of(&page, "SYSFS ATTRIBUTES")
        .split_once("*/sys/devices/faux/kmemN*")
        .unwrap();
    assert_eq!(
        terms(&definitions(disks)),
        read_only("drivers/device/attributes.rs")
    );
    let states: Vec<(String, bool)> = definitions(kmem)
        .into_iter()
        .map(|(term, text)| (literal(&term).to_owned(), text.contains("can be written")))
        .collect();
    assert_eq!(states, attributes("drivers/kmem/range.rs"));

    let (errors, counters) = section_of(&page, "DIAGNOSTICS")
        .split_once("/sys/kernel/debug")
        .unwrap();
    let sorted = |mut all: Vec<String>| {
        all.sort();
        all
    };
    assert_eq!(
        sorted(terms(&definitions(counters))),
        sorted(read_only("drivers/device/counters.rs"))
    );
    // What a load is refused with, in the guide and in the document of kmem.
    let mut documented = BTreeSet::new();
    for path in ["admin-guide", "kmem-persist"] {
        let tables = tables(&read(&format!("Documentation/{path}.rst")));
        let table = tables
            .iter()
            .find(|table| table.header == ["errno", "reason"])
            .unwrap();
        documented.extend(names(table));
    }
    let errors: BTreeSet<String> = terms(&definitions(errors)).into_iter().collect();
    assert_eq!(errors, documented);
}

/// The names in the `LIST` of attributes of a file, and whether they can be written.
fn attributes(path: &str) -> Vec<(String, bool)> {
    let (tokens, _) = split_tests(path);
    let list = tokens
        .windows(2)
        .position(|window| window[0].word() == Some("LIST") && window[1].is(':'));
    let list = list.unwrap_or_else(|| panic!("{path} has no LIST"));
    let equals = list
        + tokens[list..]
            .iter()
            .position(|token| token.is('='))
            .unwrap();
    // = & [ ("name", bool), ... ]
    let all: Vec<_> = arguments(&tokens, equals + 2)
        .into_iter()
        .map(|pair| match pair {
            [_, Token::Text(name), Token::Sign(','), Token::Word(writable), _] => {
                (name.clone(), writable == "true")
            }
            other => panic!("{path}: not understood: {other:?}"),
        })
        .collect();
    assert!(all.len() >= 3, "{path}: {all:?}");
    all
}

/// The names of those that can only be read.
fn read_only(path: &str) -> Vec<String> {
    let list = attributes(path).into_iter();
    list.filter(|(_, writable)| !writable)
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn all_attributes_and_counters_are_documented_and_no_others() {
    let guide = read("Documentation/admin-guide.rst");
    let tables_of_guide = tables(&guide);
    let with_header = |header: [&str; 2]| {
        let table = tables_of_guide.iter().find(|table| table.header == header);
        names(table.unwrap_or_else(|| panic!("no table with the header {header:?}")))
    };
    assert_eq!(
        with_header(["file", "content"]),
        read_only("drivers/device/attributes.rs")
    );
    assert_eq!(
        with_header(["file", "what it counts"]),
        read_only("drivers/device/counters.rs")
    );
    for path in ["drivers/device/attributes.rs", "drivers/device/counters.rs"] {
        for (name, _) in attributes(path).iter().filter(|(_, writable)| *writable) {
            assert!(
                guide.contains(&format!("/pmem/pmem0/{name}\n")),
                "how to write {name} is not in the guide"
            );
        }
    }

    let tables = tables(&read("Documentation/kmem-persist.rst"));
    let table = tables
        .iter()
        .find(|table| table.before.contains("has these attributes:"))
        .unwrap();
    let documented: Vec<_> = table
        .rows
        .iter()
        .map(|row| {
            (
                literal(&row[0]).to_owned(),
                row[1].contains("can be written"),
            )
        })
        .collect();
    assert_eq!(documented, attributes("drivers/kmem/range.rs"));
}

/// What is displayed nowhere in the log: errors that the module turns into an errno alone.
const NOT_LOGGED: [(&str, &str); 3] = [
    ("src/extent.rs", "Error"),
    ("src/kmem/blocks.rs", "Error"),
    ("src/kmem/superblock.rs", "Short"),
];

/// A name for what `expression` gives, as a reader can understand it: its last name that says something.
fn placeholder(expression: &[Token]) -> String {
    const SAY_NOTHING: [&str; 13] = [
        "self",
        "id",
        "as",
        "u64",
        "u32",
        "trim",
        "trim_end",
        "escape_default",
        "saturating_mul",
        "wrapping_sub",
        "get",
        "crate",
        "mut",
    ];
    let name = expression.iter().filter_map(Token::word).rfind(|word| {
        word.starts_with(|c: char| c.is_ascii_lowercase()) && !SAY_NOTHING.contains(word)
    });
    match name {
        Some(name) if !expression.iter().any(|token| token.is('{')) => format!("<{name}>"),
        _ => "<...>".to_owned(),
    }
}

/// `format` with names for its placeholders, which take `values` in turn.
fn named(format: &str, values: &[&[Token]]) -> String {
    let mut values = values.iter();
    let mut text = String::new();
    let mut rest = format.trim().replace("{{", "\u{1}").replace("}}", "\u{2}");
    while let Some((before, after)) = rest.split_once('{') {
        let (inside, after) = after.split_once('}').unwrap();
        text.push_str(before);
        match inside.split(':').next().unwrap() {
            "" => text.push_str(
                &values
                    .next()
                    .map_or("<...>".to_owned(), |value| placeholder(value)),
            ),
            name => text.push_str(&format!("<{}>", name.to_lowercase())),
        }
        rest = after.to_owned();
    }
    text.push_str(&rest);
    text.replace('\u{1}', "{").replace('\u{2}', "}")
}

/// Whether there is more than values of which another text tells.
fn says_something(text: &str) -> bool {
    let mut is_value = false;
    text.chars().any(|c| {
        is_value = (is_value || c == '<') && c != '>';
        !is_value && c.is_alphabetic()
    })
}

/// Level and text of what `pr_*!` prints in `path`.
fn messages(path: &str) -> Vec<(String, String)> {
    let (tokens, _) = split_tests(path);
    let mut found = Vec::new();
    for i in 0..tokens.len() {
        let Some(level) = tokens[i].word().and_then(|word| word.strip_prefix("pr_")) else {
            continue;
        };
        if !tokens.get(i + 1).is_some_and(|token| token.is('!')) {
            continue;
        }
        let arguments = arguments(&tokens, i + 2);
        let [Token::Text(format)] = arguments[0] else {
            panic!("{path}: pr_{level}! without a string: {:?}", arguments[0]);
        };
        assert!(
            format.ends_with('\n'),
            "{path}: a line that does not end: {format:?}"
        );
        found.push((level.to_owned(), named(format, &arguments[1..])));
    }
    found
}

/// What the implementations of `Display` in `path` say, but for single words.
fn displayed(path: &str) -> Vec<String> {
    let (tokens, _) = split_tests(path);
    let mut found = Vec::new();
    let mut unused: BTreeSet<_> = NOT_LOGGED
        .iter()
        .filter(|(of, _)| *of == path)
        .map(|(_, name)| *name)
        .collect();
    for i in 0..tokens.len() {
        // Display for Type ... {
        if tokens[i].word() != Some("Display")
            || tokens.get(i + 1).and_then(Token::word) != Some("for")
        {
            continue;
        }
        let Some(name) = tokens[i + 2].word() else {
            continue;
        };
        if unused.remove(name) {
            continue;
        }
        let open = i + tokens[i..].iter().position(|token| token.is('{')).unwrap();
        let end = close(&tokens, open);
        let mut j = open;
        while j < end {
            j += 1;
            if tokens[j].word() == Some("write") && tokens[j + 1].is('!') {
                let arguments = arguments(&tokens, j + 2);
                let [Token::Text(format)] = arguments[1] else {
                    panic!("{path}: write! without a string");
                };
                found.push(named(format, &arguments[2..]));
                j = close(&tokens, j + 2);
            } else if let Some(text) = tokens[j].text() {
                found.push(text.to_owned());
            }
        }
    }
    assert!(unused.is_empty(), "{path} has no Display for {unused:?}");
    found.retain(|text| says_something(text) && text.contains(' '));
    found
}

/// A table with a row for each of `rows`, the last column of which is a literal that may be long.
fn table(columns: &[&str], rows: &[Vec<String>]) -> String {
    const WIDTH: usize = 106;
    let (text, first) = columns.split_last().unwrap();
    let widths: Vec<usize> = (0..first.len())
        .map(|i| {
            rows.iter()
                .map(|row| row[i].len())
                .chain([first[i].len()])
                .max()
                .unwrap()
        })
        .collect();
    let line = |cells: &[&str], last: &str| {
        let mut line = String::new();
        for (cell, &width) in cells.iter().zip(&widths) {
            line += &format!("{cell:width$}  ");
        }
        (line + last).trim_end().to_owned() + "\n"
    };
    let equals: Vec<String> = widths.iter().map(|&width| "=".repeat(width)).collect();
    let equals: Vec<&str> = equals.iter().map(String::as_str).collect();
    let border = line(&equals, &"=".repeat(WIDTH));
    let mut table = border.clone() + &line(first, text) + &border;
    for row in rows {
        let mut cells: Vec<&str> = row[..first.len()].iter().map(String::as_str).collect();
        let mut part = String::new();
        for word in format!("``{}``", row[first.len()]).split(' ') {
            if !part.is_empty() && part.len() + 1 + word.len() > WIDTH {
                table += &line(&cells, &part);
                cells.fill("");
                // A row whose first cell is empty goes on with the one before it.
                part.clear();
            }
            if !part.is_empty() {
                part.push(' ');
            }
            part.push_str(word);
        }
        table += &line(&cells, &part);
    }
    table + &border
}

fn section(title: &str, underline: &str, body: &str) -> String {
    format!("\n{title}\n{}\n\n{body}", underline.repeat(title.len()))
}

/// `Documentation/messages.rst` as it has to be.
fn document() -> String {
    let mut document = String::from(
        "\
.. SPDX-License-Identifier: GPL-2.0-only
.. Made of the sources by ``UPDATE=1 cargo test --test documentation``; do not edit.

========
Messages
========

What the module writes to the kernel's log, in lines that begin with ``pmem:``. What is between ``<`` and ``>`` is
a value, named as in the source, or one of the texts of `Reasons`_. A message that is nothing but a reason, after
what it is about, is not in the tables. Where something is to be done, the message or the reason says what.
",
    );

    type Group = (&'static str, fn(&str) -> bool);
    let groups: [Group; 3] = [
        ("Disks", |path| {
            !path.starts_with("drivers/kmem") && !path.starts_with("drivers/kapi")
        }),
        ("Ranges that are RAM and storage at once", |path| {
            path.starts_with("drivers/kmem")
        }),
        ("Memory and lists of the kernel", |path| {
            path.starts_with("drivers/kapi")
        }),
    ];
    let drivers = sources("drivers");
    let mut lines = 0;
    for (title, belongs) in groups {
        let mut rows = Vec::new();
        for path in drivers.iter().filter(|path| belongs(path)) {
            for (level, text) in messages(path) {
                assert!(
                    ["err", "warn", "info"].contains(&level.as_str()),
                    "{path}: pr_{level}!"
                );
                lines += 1;
                if says_something(&text) {
                    rows.push(vec![level, text]);
                }
            }
        }
        sort(&mut rows);
        document += &section(title, "=", &table(&["level", "text"], &rows));
    }

    let mut reasons = String::from("They are parts of messages, after what they are about.\n");
    let groups: [Group; 2] = [
        ("Parameters and disks", |path| !path.starts_with("src/kmem")),
        ("Ranges and their formats", |path| {
            path.starts_with("src/kmem")
        }),
    ];
    let mut all = sources("src");
    all.extend(drivers);
    let mut texts = 0;
    for (title, belongs) in groups {
        let mut rows = Vec::new();
        for path in all.iter().filter(|path| belongs(path)) {
            rows.extend(
                displayed(path)
                    .into_iter()
                    .map(|text| vec![source(path), text]),
            );
        }
        texts += rows.len();
        sort(&mut rows);
        reasons += &section(title, "-", &table(&["about", "text"], &rows));
    }
    document += &section("Reasons", "=", &reasons);

    // Finding nothing would be up to date, too.
    assert!(lines >= 70, "{lines} messages are too few");
    assert!(texts >= 55, "{texts} reasons are too few");
    document
}

/// What a file is about: its name.
fn source(path: &str) -> String {
    let path = Path::new(path);
    let stem = path.file_stem().unwrap().to_str().unwrap();
    match stem {
        "mod" => path
            .parent()
            .unwrap()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned(),
        stem => stem.to_owned(),
    }
}

/// Sorts, and leaves out what is there twice.
fn sort(rows: &mut Vec<Vec<String>>) {
    // The worst level first, which is the order of the alphabet but for "info".
    rows.sort_by_key(|row| (row[0] == "info", row.clone()));
    rows.dedup();
}

#[test]
fn the_list_of_messages_is_up_to_date() {
    const PATH: &str = "Documentation/messages.rst";
    let document = document();
    if std::env::var_os("UPDATE").is_some() {
        fs::write(root().join(PATH), &document).unwrap();
    }
    for (number, (found, expected)) in read(PATH).lines().zip(document.lines()).enumerate() {
        assert_eq!(
            found,
            expected,
            "{PATH}:{}: run UPDATE=1 cargo test --test documentation",
            number + 1
        );
    }
    assert_eq!(
        read(PATH).len(),
        document.len(),
        "{PATH}: run UPDATE=1 cargo test --test documentation"
    );
    assert!(read("Documentation/index.rst").contains("   messages\n"));
}

/// The figures of the README are measured ones: a line of the document of performance has them.
#[test]
fn the_readme_has_the_figures_that_were_measured() {
    let readme = read("README.md");
    let measured = read("Documentation/performance.rst");
    let lines: Vec<Vec<&str>> = measured
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let mut found = 0;
    for row in readme.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, name, pmem, nd_pmem, _] = cells[..] else {
            continue;
        };
        if !pmem.starts_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        let mut words: Vec<&str> = name.split_whitespace().collect();
        words.extend([pmem, nd_pmem]);
        assert!(
            lines.iter().any(|line| line.starts_with(&words)),
            "{row} was not measured"
        );
        found += 1;
    }
    assert!(found >= 10, "{found} figures are too few");
}

#[test]
fn the_readme_leads_somewhere() {
    let readme = read("README.md");
    let mut found = 0;
    for (at, _) in readme.match_indices("](") {
        let (target, _) = readme[at + 2..].split_once(')').unwrap();
        let (path, _) = target.split_once('#').unwrap_or((target, ""));
        assert!(root().join(path).exists(), "{target} does not exist");
        found += 1;
    }
    assert!(found >= 10, "{found} links are too few");
}

#[test]
fn strings_are_read_as_the_compiler_reads_them() {
    let source = r#"f('"', '\'', b"\\x", c"a \
        b\n"); // "no"
        /* "no" */ pr_err!("{}: {x:#x} {{}} {:?}\n", Size(range.size()), match a { _ => "b" }); &'a str"#;
    let tokens = tokens(source);
    let texts: Vec<_> = tokens.iter().filter_map(Token::text).collect();
    assert_eq!(texts, ["\\x", "a b\n", "{}: {x:#x} {{}} {:?}\n", "b"]);
    let open = tokens
        .iter()
        .position(|token| token.word() == Some("pr_err"))
        .unwrap()
        + 2;
    let arguments = arguments(&tokens, open);
    assert_eq!(named(texts[2], &arguments[1..]), "<size>: <x> {} <...>");
}
