// SPDX-License-Identifier: GPL-2.0-only

//! The manual pages: one of the program, and one of each command, made of the command line's own description.

use crate::cli::{Cli, SECTIONS};
use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_mangen::{
    roff::{bold, roman, Roff},
    Man,
};
use std::fs;
use std::path::Path;

/// The section of programs for administrators.
const SECTION: &str = "8";

/// The name of a page's file, and its text.
type Page = (String, Vec<u8>);

/// Writes all pages, which are of `date`, to `dir`.
pub(crate) fn write(dir: &Path, date: &str) -> Result<()> {
    for (name, text) in pages(date)? {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn pages(date: &str) -> Result<Vec<Page>> {
    // Nobody looks for the manual page of `help`.
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let mut pages = vec![page(&program, date, true)?];
    for command in program
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        pages.push(page(command, date, false)?);
    }
    Ok(pages)
}

/// The page of the program, or of a command.
fn page(command: &clap::Command, date: &str, is_program: bool) -> Result<Page> {
    let man = Man::new(command.clone())
        .section(SECTION)
        .date(date)
        .source(format!("pmem {}", env!("CARGO_PKG_VERSION")))
        .manual("pmem");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    let mut see: Vec<&str> = vec!["pmem(4)"];
    if is_program {
        man.render_subcommands_section(&mut text)?;
        sections().to_writer(&mut text)?;
    } else {
        see.insert(0, "pmemctl(8)");
    }
    let mut end = Roff::new();
    end.control("SH", ["SEE ALSO"]);
    end.text([roman(see.join(", "))]);
    end.to_writer(&mut text)?;
    Ok((man.get_filename(), text))
}

/// What the help has at its end.
fn sections() -> Roff {
    let mut roff = Roff::new();
    for (title, rows) in SECTIONS {
        roff.control("SH", [title.to_uppercase().as_str()]);
        for (what, about) in rows {
            roff.control("TP", []);
            roff.text([bold(*what)]);
            roff.text([roman(*about)]);
        }
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::USAGE;
    use crate::report::Status;
    use clap::Parser;
    use std::collections::BTreeMap;

    const EXIT: [u8; 4] = [
        Status::InOrder as u8,
        Status::Faults as u8,
        Status::Error as u8,
        USAGE,
    ];

    /// The pages, as they are read: without the macros that hide a hyphen.
    fn read() -> BTreeMap<String, String> {
        let pages = pages("2026-01-02").unwrap().into_iter();
        pages
            .map(|(name, text)| (name, String::from_utf8(text).unwrap().replace("\\-", "-")))
            .collect()
    }

    #[test]
    fn each_command_and_each_option_has_its_place() {
        let mut pages = read();
        let main = pages.remove("pmemctl.8").unwrap();
        let mut program = Cli::command().disable_help_subcommand(true);
        program.build();
        for command in program.get_subcommands() {
            let name = command.get_name();
            let page = pages.remove(&format!("pmemctl-{name}.8"));
            assert_eq!(page.is_none(), command.is_hide_set(), "{name}");
            assert_eq!(
                main.contains(&format!("pmemctl-{name}(8)\n")),
                page.is_some(),
                "{name}"
            );
            let Some(page) = page else {
                continue;
            };
            assert!(page.contains("pmemctl(8), pmem(4)"), "{name}");
            assert!(page.contains(" 8 2026-01-02 "), "{name}");
            let mut options = 0;
            for argument in command.get_arguments() {
                let id = argument.get_id().as_str();
                let name_on_page = match argument.get_long() {
                    Some(long) => format!("\\fB--{long}\\fR"),
                    None => format!("<\\fI{}\\fR>", id.to_uppercase()),
                };
                assert!(page.contains(&name_on_page), "{name}: {id}");
                // What clap says of its own option depends on what else there is to say.
                if id != "help" {
                    let about = argument.get_help().map(ToString::to_string);
                    let about = about.unwrap_or_default();
                    assert!(!about.is_empty(), "{name}: {id}");
                    assert!(page.contains(&format!("\n{about}")), "{name}: {id}");
                }
                options += 1;
            }
            assert!(options >= 2, "{name}");
        }
        assert!(pages.is_empty(), "{:?}", pages.keys());
    }

    #[test]
    fn the_help_says_what_the_page_says() {
        let main = &read()["pmemctl.8"];
        let help = Cli::command().render_long_help().to_string();
        let words: Vec<&str> = help.split_whitespace().collect();
        let help = words.join(" ");
        for (title, rows) in SECTIONS {
            let heading = format!(".SH {}\n", title.to_uppercase());
            assert!(main.replace('"', "").contains(&heading), "{title}");
            for (what, about) in rows {
                assert!(help.contains(&format!("{what} {about}")), "{what}");
                let escaped = about.replace('\'', "\\*(Aq");
                assert!(
                    main.contains(&format!("{what}\\fR\n{escaped}\n")),
                    "{what}: {main}"
                );
            }
        }
    }

    #[test]
    fn examples_are_understood_and_codes_are_those_of_the_program() {
        let [(_, codes), _, (_, examples)] = SECTIONS;
        for (example, _) in examples {
            assert!(Cli::try_parse_from(example.split(' ')).is_ok(), "{example}");
        }
        let codes: Vec<u8> = codes
            .iter()
            .map(|(code, _)| code.parse().unwrap())
            .collect();
        assert_eq!(codes, EXIT);
    }

    /// The document has all commands, options that it explains exist, and the codes are the same.
    #[test]
    fn the_document_has_each_command_and_each_code() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../Documentation/pmemctl.rst"
        );
        let document = fs::read_to_string(path).unwrap();
        let column = |header: &str| -> Vec<String> {
            let (_, table) = document.split_once(&format!("\n{header}")).unwrap();
            let rows = table.lines().skip(2);
            rows.take_while(|row| !row.starts_with('='))
                .map(|row| {
                    row.trim_start_matches('`')
                        .split(['`', ' '])
                        .next()
                        .unwrap()
                        .to_owned()
                })
                .collect()
        };
        let program = Cli::command();
        let commands: Vec<&str> = program
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
            .map(|command| command.get_name())
            .collect();
        assert_eq!(column("command "), commands);
        assert_eq!(column("exit code "), EXIT.map(|code| code.to_string()));
    }
}
